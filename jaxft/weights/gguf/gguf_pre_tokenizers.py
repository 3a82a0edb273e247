"""How the byte-level BPE tokenizers of GGUF files split text before merging, by tokenizer.ggml.pre.

The names are llama.cpp's (src/llama-vocab.cpp). The splits are those of the models' published tokenizer.json.
llama.cpp's differ from these where its regular expressions cannot express them, and it does not normalise
Unicode.
"""

from dataclasses import dataclass
from typing import Any

from jaxft.weights.gguf.gguf_header import GgufHeader

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The end of most patterns: punctuation (followed by characters of `{also}`), line ends, spaces.
REST = r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{also}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3_PATTERN = WORDS + r"|\p{N}{1,3}" + REST.format(also="")  # also OpenAI's cl100k
QWEN2_PATTERN = WORDS + r"|\p{N}" + REST.format(also="")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Words split at capital letters: HelloWorld is two words.
CASED = r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
TEKKEN_PATTERN = CASED.format(upper=UPPER, lower=LOWER, end="") + r"|\p{N}" + REST.format(also="/")
GPT4O_PATTERN = (
    CASED.format(upper=UPPER, lower=LOWER, end=CONTRACTIONS + "?") + r"|\p{N}{1,3}" + REST.format(also="/")
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split into pieces before merging.

    pattern: the regular expression of a piece; None for GPT-2's. single_digits: every digit is a piece of its
    own. whole_words: a piece that is in the vocabulary becomes that token without merging. bos: whether texts
    begin with the BOS token by default, if the metadata lacks add_bos_token. nfc: whether text is
    NFC-normalised first.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


GPT2 = PreTokenizer()
DIGITS = PreTokenizer(single_digits=True)
LLAMA3 = PreTokenizer(LLAMA3_PATTERN, whole_words=True, bos=True)
QWEN2 = PreTokenizer(QWEN2_PATTERN, nfc=True)
PRE_TOKENIZERS = {
    "gpt-2": GPT2,
    "default": GPT2,
    "olmo": PreTokenizer(nfc=True),  # OLMo 1, of GPT-NeoX
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,  # Granite 3
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": PreTokenizer(LLAMA3_PATTERN, whole_words=True),  # SmolLM3: Llama 3's without BOS
    "dbrx": PreTokenizer(LLAMA3_PATTERN),  # Phi-4, OLMo 2 and 3, Granite 4
    "gpt-4o": PreTokenizer(GPT4O_PATTERN),  # Phi-4-mini
    "tekken": PreTokenizer(TEKKEN_PATTERN, whole_words=True, bos=True),  # Mistral since Nemo
    "qwen2": QWEN2,  # Qwen 2, 2.5 and 3
    "deepseek-r1-qwen": QWEN2,  # DeepSeek-R1's distilled Qwens
}
UNSTATED = "default"  # which llama.cpp assumes, with a warning, if tokenizer.ggml.pre is missing


def pre_tokenizer_of(header: GgufHeader) -> PreTokenizer:
    """Return how the file's tokenizer splits text. Raises ValueError for an unknown name, and for a missing
    one unless the architecture is llama, whose first files had none.
    """
    name = header.optional("tokenizer.ggml.pre", UNSTATED)
    if name == UNSTATED and header.architecture != "llama":
        raise ValueError(
            f"{header.path}: metadata tokenizer.ggml.pre is missing, so it is unknown how to split "
            "text; convert the model again with a newer llama.cpp, or use its Hugging Face folder"
        )
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{header.path}: pre-tokenizer {name[:60]!r} (tokenizer.ggml.pre) is not supported; use the "
            "model's Hugging Face folder"
        )
    return PRE_TOKENIZERS[name]


def apply_pre_tokenizer(tokenizer: Any, pre: PreTokenizer) -> None:
    """Set the normaliser and the pre-tokenizer of a tokenizers.Tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
