"""The tokenizer in a GGUF file's metadata, built with `tokenizers`: byte-level BPE (tokenizer.ggml.model is
gpt2) or SentencePiece BPE (llama).

transformers' AutoTokenizer(gguf_file=...) needs torch, does not split digits as the published tokenizers do,
and drops a space at the start of a SentencePiece text, which llama.cpp and SentencePiece keep.
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


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # where the metadata has none, as in llama.cpp
SPACE = "\u2581"  # SentencePiece's mark of a space
SPACES_AFTER = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3's special tokens that do not swallow them
LONGEST_PIECE = 512  # characters of a token that can be the result of merges


def build_tokenizer(header: GgufHeader) -> Any:
    """Build a transformers PreTrainedTokenizerFast with the file's special tokens and chat template.

    Raises ValueError for a vocabulary of another type, an unknown pre-tokenizer and invalid metadata.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens = header.array("tokenizer.ggml.tokens", str)
    model = header.required("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{header.path}: its tokenizer is of type {model[:60]!r}; only byte-level BPE ('gpt2') and "
            "SentencePiece BPE ('llama') are read from GGUF. Use the model's Hugging Face folder"
        )
    if tokens is None or len(set(tokens)) != len(tokens):
        what = "is missing" if tokens is None else "repeats a token"
        raise ValueError(f"{header.path}: metadata tokenizer.ggml.tokens {what}")
    types = header.array("tokenizer.ggml.token_type", int)
    if types is None and model == "gpt2":
        types = [NORMAL] * len(tokens)
    if types is None or len(types) != len(tokens):
        raise ValueError(
            f"{header.path}: metadata tokenizer.ggml.token_type has {len(types or [])} entries, but the "
            f"vocabulary has {len(tokens)} tokens; convert the model to GGUF again"
        )
    tokenizer = (_byte_level if model == "gpt2" else _sentencepiece)(header, tokens, types)
    # As the published tokenizer.json of Phi-3 and 3.5, and llama.cpp by the model's name (llama-vocab.cpp)
    phi3 = header.architecture == "phi3" and model == "llama"
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        named = [token for token, type_ in zip(tokens, types, strict=True) if type_ == kind]
        add(
            [
                AddedToken(
                    token,
                    normalized=False,
                    special=kind == CONTROL,
                    rstrip=phi3 and token not in SPACES_AFTER,
                )
                for token in named
            ]
        )
    ids = {name: special_token_id(header, name) for name in ("bos", "eos", "unk", "pad")}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    tokenizer.post_processor = _post_processor(header, ids, tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_templates(header),
        clean_up_tokenization_spaces=False,
        model_max_length=header.required(header.key("context_length"), int),
        **special,
    )


def _chat_templates(header: GgufHeader) -> str | dict[str, str] | None:
    """Return the chat template, several by name, as in a tokenizer of transformers; None without any."""
    default = header.optional("tokenizer.chat_template", "")
    names = header.array("tokenizer.chat_templates", str) or []
    others = {name: header.required(f"tokenizer.chat_template.{name}", str) for name in names}
    return {"default": default, **others} if default and others else default or None


def special_token_id(header: GgufHeader, name: str) -> int | None:
    """Return the id of a special token (a key of SPECIAL_TOKENS), None without one. Raises ValueError for an
    id that is not in the vocabulary.
    """
    key = f"tokenizer.ggml.{SPECIAL_TOKENS[name]}_token_id"
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else None
    if key not in header.metadata:
        sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
        default = SENTENCEPIECE_IDS.get(name) if sentencepiece else None
        return None if default is None or count is None or default >= count else default
    index = header.required(key, int)
    if index < 0 or (count is not None and index >= count):
        raise ValueError(
            f"{header.path}: {SPECIAL_TOKENS[name]}_token_id is {index}, the vocabulary has {count} tokens"
        )
    return index


def _byte_level(header: GgufHeader, tokens: list[str], types: list[int]) -> Any:
    from tokenizers import decoders

    pre = pre_tokenizer_of(header)
    listed = header.array("tokenizer.ggml.merges", str)
    if listed is None:
        raise ValueError(f"{header.path}: metadata tokenizer.ggml.merges is missing")
    pairs = [merge.split(" ") for merge in listed]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{header.path}: metadata tokenizer.ggml.merges has one that is not a pair")
    merges = [(first, second) for first, second in pairs]
    tokenizer = _bpe(header, tokens, merges, ignore_merges=pre.whole_words)
    apply_pre_tokenizer(tokenizer, pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(header: GgufHeader, tokens: list[str], merges: list[tuple[str, str]], **settings: Any) -> Any:
    from tokenizers import Tokenizer, models

    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **settings))
    except Exception as e:  # tokenizers raises plain Exception
        raise ValueError(f"{header.path}: its merges do not fit its vocabulary: {e}") from e


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int]) -> Any:
    """SentencePiece BPE, as the published tokenizer.json of Llama 1 and 2 has it: a space before the text and
    after each special token, spaces as SPACE, characters that are not in the vocabulary as their bytes.
    """
    from tokenizers import decoders, normalizers

    scores = header.array("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(tokens):
        raise ValueError(
            f"{header.path}: metadata tokenizer.ggml.scores must have an entry for each of the "
            f"{len(tokens)} tokens"
        )
    plain = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind not in (UNKNOWN, CONTROL, UNUSED, BYTE)
    }
    unknown = special_token_id(header, "unk")
    tokenizer = _bpe(
        header,
        tokens,
        _merges(header, plain),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = header.optional("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if prefix else [spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges(header: GgufHeader, scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, in the order of the tokens' scores, best first:
    SentencePiece merges the neighbours that make the token with the best score.
    """
    merges: list[tuple[float, str, str]] = []
    for token, score in scores.items():
        if len(token) > LONGEST_PIECE:
            raise ValueError(
                f"{header.path}: token {token[:20]!r}... has {len(token)} characters, which is more than "
                f"{LONGEST_PIECE}; use the model's Hugging Face folder"
            )
        parts = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += [(score, *part) for part in parts if part[0] in scores and part[1] in scores]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(first, second) for _, first, second in merges]


def _post_processor(header: GgufHeader, ids: dict[str, int | None], tokens: list[str]) -> Any:
    """Add the start and end tokens that the metadata says, by default as llama.cpp does."""
    from tokenizers import processors

    starts = header.required("tokenizer.ggml.model", str) == "llama" or pre_tokenizer_of(header).bos
    add_bos = header.optional("tokenizer.ggml.add_bos_token", starts) and ids["bos"] is not None
    add_eos = header.optional("tokenizer.ggml.add_eos_token", False) and ids["eos"] is not None
    if not add_bos and not add_eos:
        return processors.ByteLevel(trim_offsets=False)
    bos, eos = (tokens[ids[name] or 0] if add else "" for name, add in (("bos", add_bos), ("eos", add_eos)))
    single = [part for part in (bos, "$A", eos) if part]
    second = (bos and f"{bos}:1", "$B:1", eos and f"{eos}:1")
    named = list({token: ids[name] for name, token in (("bos", bos), ("eos", eos)) if token}.items())
    try:
        return processors.TemplateProcessing(
            single=single, pair=[*single, *(part for part in second if part)], special_tokens=named
        )
    except Exception as e:  # tokenizers raises plain Exception
        raise ValueError(f"{header.path}: its start or end token cannot be added to texts: {e}") from e
