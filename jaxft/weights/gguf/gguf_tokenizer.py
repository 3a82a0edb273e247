"""The tokenizer in a GGUF file's metadata, read and written: byte-level BPE (tokenizer.ggml.model is gpt2) or
SentencePiece BPE (llama).

transformers' AutoTokenizer(gguf_file=...) is not used: it needs torch, does not split digits as the published
tokenizers do, and drops a space at the start of a SentencePiece text, which llama.cpp and SentencePiece keep.

Names of pre-tokenizers (tokenizer.ggml.pre) are llama.cpp's (src/llama-vocab.cpp), but text is split as by
the models' published tokenizer.json. llama.cpp splits some texts differently, because its regular expressions
are less expressive, and it does not normalise Unicode.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.weights.gguf.gguf_file import Field, GgufHeader, read_gguf_header, unwritable

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # where the metadata has none, as in llama.cpp
SPACE = "\u2581"  # SentencePiece's mark of a space
SPACES_AFTER = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3's special tokens that keep the spaces after them
LONGEST_PIECE = 512  # characters of a token that can be the result of merges
# Texts that every pre-tokenizer of llama.cpp splits in another way, or into other tokens.
SPLIT_PROBES = (
    "It's 3 o'clock; we'll see, THEY'VE said 'twas I'd. 1234567890 3.14159",
    "HelloWorld camelCase getHTTPResponse ÄÖÜber ŽLUŤ kůň Съешь ещё İstanbul",
    "   leading,  spaces\t\ttabs \n\n \n  mixed\r\nlines   end  ",
    "for (int i = 0; i < 10; ++i) { s += a[i] * 0x1F; } // path/to/file\n/etc/x\n",
    "你好，世界。こんにちは 안녕하세요 สวัสดี नमस्ते 12十2十 a² ½ ٣٤",
    "e\u0301 A\u030a \u1100\u1161 ﬁ ① \u00a0\u2003\u200b 😀 👩‍👩‍👧‍👦 🇩🇪",
    "x",
    "",
)
PAD = "[PAD{}]"  # llama.cpp's name of rows of the embedding without a token

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
    """The rules that split text into pieces before merging.

    pattern: the regular expression of a piece; None for GPT-2's. single_digits: split text into single digits
    first. whole_words: a piece that is in the vocabulary becomes that token without merging. bos: whether
    texts begin with the BOS token if the metadata lacks add_bos_token. nfc: whether text is NFC-normalised
    first.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


GPT2 = PreTokenizer()
DIGITS = PreTokenizer(single_digits=True)
LLAMA3 = PreTokenizer(LLAMA3_PATTERN, whole_words=True, bos=True)
_QWEN2 = PreTokenizer(QWEN2_PATTERN, nfc=True)
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
    "qwen2": _QWEN2,  # Qwen 2, 2.5 and 3
    "deepseek-r1-qwen": _QWEN2,  # DeepSeek-R1's distilled Qwens
}
UNSTATED = "default"  # which llama.cpp assumes, with a warning, if tokenizer.ggml.pre is missing


def _pre_tokenizer_of(header: GgufHeader) -> PreTokenizer:
    """Return the pre-tokenizer that tokenizer.ggml.pre names. Raises ValueError for an unknown name, and for
    a missing one or "default" unless the architecture is llama, whose first files did not state it.
    """
    name = header.optional("tokenizer.ggml.pre", UNSTATED)
    if name == UNSTATED and header.architecture != "llama":
        raise ValueError(
            f"{header.path}: metadata tokenizer.ggml.pre is missing or default, so it is unknown how to "
            "split text; convert the model again with a newer llama.cpp, or use its Hugging Face folder"
        )
    if name not in PRE_TOKENIZERS:
        raise header.refusal(f"pre-tokenizer {name[:60]!r} (tokenizer.ggml.pre) is not supported")
    return PRE_TOKENIZERS[name]


def _apply_pre_tokenizer(tokenizer: Any, pre: PreTokenizer) -> None:
    """Set the normaliser and the pre-tokenizer of a tokenizers.Tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def build_tokenizer(header: GgufHeader) -> Any:
    """Build a transformers PreTrainedTokenizerFast with the file's special tokens and chat template.

    Raises ValueError for a tokenizer that is not BPE, an unknown pre-tokenizer and invalid metadata.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokens = header.array("tokenizer.ggml.tokens", str)
    model = header.required("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise header.refusal(
            f"its tokenizer is of type {model[:60]!r}; only byte-level BPE ('gpt2') and SentencePiece BPE "
            "('llama') are read from GGUF"
        )
    if tokens is None or len(set(tokens)) != len(tokens):
        what = "is missing" if tokens is None else "repeats a token"
        raise header.refusal(f"metadata tokenizer.ggml.tokens {what}")
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
    """Return the chat template, or a dict of templates by name if there are several; None without any."""
    default = header.optional("tokenizer.chat_template", "")
    names = header.array("tokenizer.chat_templates", str) or []
    others = {name: header.required(f"tokenizer.chat_template.{name}", str) for name in names}
    return {"default": default, **others} if default and others else default or None


def special_token_id(header: GgufHeader, name: str) -> int | None:
    """Return the id of a special token, None without one. name: a key of SPECIAL_TOKENS, such as "eos".
    Raises ValueError for an id that is not in the vocabulary.
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
        raise header.refusal(f"{SPECIAL_TOKENS[name]}_token_id is {index}, the vocabulary has {count} tokens")
    return index


def _byte_level(header: GgufHeader, tokens: list[str], types: list[int]) -> Any:
    from tokenizers import decoders

    pre = _pre_tokenizer_of(header)
    listed = header.array("tokenizer.ggml.merges", str)
    if listed is None:
        raise header.refusal("metadata tokenizer.ggml.merges is missing")
    pairs = [merge.split(" ") for merge in listed]
    wrong = [index for index, pair in enumerate(pairs) if len(pair) != 2]
    if wrong:
        raise header.refusal(
            f"entry {wrong[0]} of metadata tokenizer.ggml.merges has the value {listed[wrong[0]][:80]!r}, "
            "which is not a pair of tokens separated by one space"
        )
    merges = [(first, second) for first, second in pairs]
    tokenizer = _bpe(header, tokens, merges, ignore_merges=pre.whole_words)
    _apply_pre_tokenizer(tokenizer, pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(header: GgufHeader, tokens: list[str], merges: list[tuple[str, str]], **settings: Any) -> Any:
    from tokenizers import Tokenizer, models

    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **settings))
    except Exception as e:  # tokenizers raises plain Exception
        raise header.refusal(f"its merges do not fit its vocabulary: {e}") from e


def _sentencepiece(header: GgufHeader, tokens: list[str], types: list[int]) -> Any:
    """Build a SentencePiece BPE tokenizer like the published tokenizer.json of Llama 1 and 2: a space is put
    before the text and after each special token, spaces become SPACE, and characters that are not in the
    vocabulary become their bytes.
    """
    from tokenizers import decoders, normalizers

    scores = header.array("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(tokens):
        raise header.refusal(
            f"metadata tokenizer.ggml.scores must have an entry for each of the {len(tokens)} tokens, got "
            f"{len(scores or [])}"
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
    """Return all pairs of tokens that concatenate to a token, best score first, as SentencePiece merges."""
    merges: list[tuple[float, str, str]] = []
    for token, score in scores.items():
        if len(token) > LONGEST_PIECE:
            raise header.refusal(
                f"token {token[:20]!r}... has {len(token)} characters, which is more than {LONGEST_PIECE}"
            )
        parts = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += [(score, *part) for part in parts if part[0] in scores and part[1] in scores]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(first, second) for _, first, second in merges]


def _post_processor(header: GgufHeader, ids: dict[str, int | None], tokens: list[str]) -> Any:
    """Return the post-processor that adds BOS and EOS as the metadata state, else as llama.cpp does."""
    from tokenizers import processors

    starts = header.required("tokenizer.ggml.model", str) == "llama" or _pre_tokenizer_of(header).bos
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
        raise header.refusal(f"its start or end token cannot be added to texts: {e}") from e


# Writing


def tokenizer_fields(tokenizer: Any, rows: int, ends: Sequence[int]) -> list[Field]:
    """Return a tokenizer's metadata. rows: number of rows of the embedding. ends: token ids that end a
    completion.

    Raises ValueError for a tokenizer that is neither byte-level BPE nor SentencePiece BPE, has no merges,
    splits text as no pre-tokenizer of llama.cpp does, or has a token id that is not below `rows`.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise unwritable(
            f"a tokenizer of type {model['type']!r} cannot be written as GGUF; jaxft writes byte-level and "
            "SentencePiece BPE"
        )
    tokens, types = _tokens(tokenizer, state, rows)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    prefix = "tokenizer.ggml"
    if not merges:
        raise unwritable("a BPE tokenizer without merges cannot be written as GGUF")
    if model.get("byte_fallback"):
        ids = tokenizer("x", add_special_tokens=False).input_ids
        (first_token, *_) = tokenizer.convert_ids_to_tokens(ids)
        of_model = [
            Field(f"{prefix}.model", "STRING", "llama"),
            Field(f"{prefix}.pre", "STRING", "default"),
            Field(f"{prefix}.scores", "FLOAT32", _scores(tokens, merges)),
            Field(f"{prefix}.add_space_prefix", "BOOL", first_token.startswith(SPACE)),
        ]
    else:
        of_model = [
            Field(f"{prefix}.model", "STRING", "gpt2"),
            Field(f"{prefix}.pre", "STRING", _pre_name(tokenizer, bool(model.get("ignore_merges")))),
            Field(f"{prefix}.merges", "STRING", [" ".join(merge) for merge in merges]),
        ]
    return [
        *of_model,
        Field(f"{prefix}.tokens", "STRING", tokens),
        Field(f"{prefix}.token_type", "INT32", types),
        *_special_fields(tokenizer, ends, rows),
    ]


def _tokens(tokenizer: Any, state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return (tokens, their types), one of each per row of the embedding; rows without token are UNUSED."""
    by_id = {index: token for token, index in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    if max(by_id) >= rows:
        raise ValueError(
            f"the tokenizer has token id {max(by_id)} ({by_id[max(by_id)][:40]!r}), but the model has only "
            f"{rows} embeddings; use the tokenizer that belongs to the model"
        )
    unknown, fallback = state["model"].get("unk_token"), bool(state["model"].get("byte_fallback"))

    def kind(index: int) -> int:
        token = by_id.get(index)
        if token is None:
            return UNUSED
        if fallback and token == unknown:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        byte = fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return BYTE if byte else NORMAL

    return [by_id.get(i, PAD.format(i)) for i in range(rows)], [kind(i) for i in range(rows)]


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return the scores with which SentencePiece merges in the order of `merges`: 0, -1, -2, ..."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(merge), len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _pre_name(tokenizer: Any, whole_words: bool) -> str:
    """Return llama.cpp's name of the PreTokenizer that splits SPLIT_PROBES alike, or raise ValueError."""
    from tokenizers import Tokenizer, models

    def pieces(core: Any) -> list[list[str]]:
        normalised = [core.normalizer.normalize_str(t) if core.normalizer else t for t in SPLIT_PROBES]
        split = core.pre_tokenizer.pre_tokenize_str if core.pre_tokenizer else None
        return [[piece for piece, _ in split(text)] if split else [text] for text in normalised]

    expected = pieces(tokenizer.backend_tokenizer)
    tried: list[PreTokenizer] = []
    for name, pre in PRE_TOKENIZERS.items():
        if name == UNSTATED or pre in tried or pre.whole_words != whole_words:
            continue
        tried.append(pre)
        core = Tokenizer(models.BPE())
        _apply_pre_tokenizer(core, pre)
        if pieces(core) == expected:
            return name
    raise unwritable(
        "this tokenizer splits text as none of llama.cpp's pre-tokenizers that jaxft knows "
        f"({', '.join(PRE_TOKENIZERS)}), so it cannot be written as GGUF"
    )


def _special_fields(tokenizer: Any, ends: Sequence[int], rows: int) -> list[Field]:
    """Return metadata of special tokens and chat templates. ends, rows: see tokenizer_fields."""
    eos = tokenizer.eos_token_id
    others = [end for end in ends if end != eos and end < rows]
    eos = others.pop(0) if eos is None and others else eos
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    whole = tokenizer("x").input_ids
    plain = tokenizer("x", add_special_tokens=False).input_ids
    starts = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else whole[:1]
    fields = [
        Field(f"tokenizer.ggml.{name}_token_id", "UINT32", index)
        for name, index in ids.items()
        if index is not None
    ]
    adds_bos = bool(starts) and starts[0] == tokenizer.bos_token_id
    adds_eos = len(whole) > len(plain) and whole[-1] == tokenizer.eos_token_id
    fields.append(Field("tokenizer.ggml.add_bos_token", "BOOL", adds_bos))
    fields.append(Field("tokenizer.ggml.add_eos_token", "BOOL", adds_eos))
    template = tokenizer.chat_template
    templates = dict(template) if isinstance(template, dict) else {"default": template} if template else {}
    if "default" in templates:
        fields.append(Field("tokenizer.chat_template", "STRING", templates.pop("default")))
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    if named:  # under the keys of gguf's add_chat_template
        fields.append(Field("tokenizer.chat_templates", "STRING", list(named)))
    return [*fields, *(Field(f"tokenizer.chat_template.{name}", "STRING", x) for name, x in named.items())]


def tokenizer_notes(path: Path, tokenizer: Any) -> list[str]:
    """Return a warning if the tokenizer in a GGUF file produces other ids than `tokenizer` for some text,
    such as one with leading spaces if tokenizer.json does not put a space in front of texts.

    Raises ValueError if a token has another id in the file, if an added token is split, or if the ids of most
    texts differ.
    """
    read = build_tokenizer(read_gguf_header(path))
    _check_tokens(read, tokenizer)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    texts = [*SPLIT_PROBES, "".join(special)]
    wrong = [text for text in texts if _ids(read, text) != _ids(tokenizer, text)]
    if 2 * len(wrong) > len(texts):
        raise unwritable(
            f"this tokenizer cannot be written as GGUF: the text {wrong[0][:40]!r} would have other token ids"
        )
    shown = f"{wrong[0][:40]!r}" if wrong else ""
    return [f"warning: texts such as {shown} have other token ids in GGUF"] if wrong else []


def _check_tokens(read: Any, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer `read` from a file has other token ids, or splits added tokens."""
    ids = read.get_vocab()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            raise unwritable(
                f"this tokenizer cannot be written as GGUF: its token {token[:40]!r} has id {number}, and in "
                f"the file {ids.get(token)}"
            )
    for number, token in tokenizer.added_tokens_decoder.items():
        text = f"a{token.content}b"
        if _ids(read, text).count(number) != _ids(tokenizer, text).count(number):
            raise unwritable(
                f"this tokenizer cannot be written as GGUF: its token {token.content[:40]!r} (id {number}) "
                "would be split"
            )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False).input_ids
