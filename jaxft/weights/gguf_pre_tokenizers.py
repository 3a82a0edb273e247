"""How the byte-level BPE tokenizers of GGUF files split text before merging, by tokenizer.ggml.pre.

The names are llama.cpp's (src/llama-vocab.cpp). What they mean here is what the published tokenizer.json of
the models does, which differs where llama.cpp's regular expressions cannot express it, and in Unicode
normalisation, which llama.cpp leaves out.
"""

from dataclasses import dataclass
from typing import Any

from jaxft.weights.gguf_header import GgufHeader

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# What most patterns end with: punctuation (`{also}`: other characters that may follow it), line ends, spaces.
REST = r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{also}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3_PATTERN = WORDS + r"|\p{N}{1,3}" + REST.format(also="")  # also OpenAI's cl100k
QWEN2_PATTERN = WORDS + r"|\p{N}" + REST.format(also="")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Words that begin with capital letters or consist of them, so that HelloWorld is two.
CASED = r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
TEKKEN_PATTERN = CASED.format(upper=UPPER, lower=LOWER, end="") + r"|\p{N}" + REST.format(also="/")
GPT4O_PATTERN = (
    CASED.format(upper=UPPER, lower=LOWER, end=CONTRACTIONS + "?") + r"|\p{N}{1,3}" + REST.format(also="/")
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merging.

    pattern: the regular expression of a piece; None for GPT-2's. single_digits: every digit is a piece.
    whole_words: a piece that is in the vocabulary is that token, whatever the merges make of it. bos: whether
    texts begin with the BOS token where the metadata does not say. nfc: whether text is NFC-normalised first.
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
UNSTATED = "default"  # what llama.cpp assumes, with a warning, where tokenizer.ggml.pre is missing


def pre_tokenizer_of(header: GgufHeader) -> PreTokenizer:
    """Return how the file's tokenizer splits text. Raises ValueError for a name that is not known, and where
    none is stated in a file of another architecture than llama, whose first files had none.
    """
    name = header.optional("tokenizer.ggml.pre", UNSTATED)
    if name == UNSTATED and header.architecture != "llama":
        raise ValueError(
            f"{header.path}: metadata tokenizer.ggml.pre does not state how its tokenizer splits text; "
            "convert the model again with a newer llama.cpp, or use its Hugging Face folder"
        )
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{header.path}: pre-tokenizer {name[:60]!r} is not known ({', '.join(PRE_TOKENIZERS)}); use the "
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
