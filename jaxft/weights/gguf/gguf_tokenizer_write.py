"""A tokenizer as GGUF metadata: the inverse of gguf_tokenizer."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.weights.gguf.gguf_header import read_gguf_header
from jaxft.weights.gguf.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNSTATED,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
    apply_pre_tokenizer,
    build_tokenizer,
)
from jaxft.weights.gguf.gguf_write import Field

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


def tokenizer_fields(tokenizer: Any, rows: int, ends: Sequence[int]) -> list[Field]:
    """Return a tokenizer's metadata. rows: of the embedding. ends: token ids that end a completion.

    Raises ValueError for a tokenizer that is neither byte-level BPE nor SentencePiece BPE, that splits text
    as no pre-tokenizer of llama.cpp does, or that has more tokens than rows.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"a tokenizer of type {model['type']!r} cannot be written as GGUF; jaxft writes byte-level and "
            "SentencePiece BPE"
        )
    tokens, types = _tokens(tokenizer, state, rows)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    prefix = "tokenizer.ggml"
    if not merges:
        raise ValueError("a byte-level tokenizer without merges cannot be written as GGUF")
    if model.get("byte_fallback"):
        own = [
            Field(f"{prefix}.model", "STRING", "llama"),
            Field(f"{prefix}.pre", "STRING", "default"),
            Field(f"{prefix}.scores", "FLOAT32", _scores(tokens, merges)),
            Field(f"{prefix}.add_space_prefix", "BOOL", _begins_with_space(tokenizer)),
        ]
    else:
        own = [
            Field(f"{prefix}.model", "STRING", "gpt2"),
            Field(f"{prefix}.pre", "STRING", _pre_name(tokenizer, bool(model.get("ignore_merges")))),
            Field(f"{prefix}.merges", "STRING", [" ".join(merge) for merge in merges]),
        ]
    return [
        *own,
        Field(f"{prefix}.tokens", "STRING", tokens),
        Field(f"{prefix}.token_type", "INT32", types),
        *_special_fields(tokenizer, ends, rows),
    ]


def _tokens(tokenizer: Any, state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the token and its type of every row of the embedding."""
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
    """Return scores with which SentencePiece merges in the order of `merges`: tokens that are merged earlier
    have higher ones, as in the files of SentencePiece, whose BPE scores are 0, -1, -2, ...
    """
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(merge), len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _begins_with_space(tokenizer: Any) -> bool:
    """Whether a space is put in front of texts."""
    ids = tokenizer("x", add_special_tokens=False).input_ids
    return bool(tokenizer.convert_ids_to_tokens(ids)[0].startswith(SPACE))


def _pre_name(tokenizer: Any, whole_words: bool) -> str:
    """Return the name of the pre-tokenizer that normalises and splits the probes as this tokenizer does."""
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
        apply_pre_tokenizer(core, pre)
        if pieces(core) == expected:
            return name
    raise ValueError(
        "this tokenizer splits text as none of llama.cpp's pre-tokenizers that jaxft knows "
        f"({', '.join(PRE_TOKENIZERS)}), so it cannot be written as GGUF; write a Hugging Face folder, "
        "without --gguf"
    )


def _special_fields(tokenizer: Any, ends: Sequence[int], rows: int) -> list[Field]:
    """Return ids of special tokens, whether texts begin and end with them, and the chat template."""
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
    found = tokenizer.chat_template
    templates = dict(found) if isinstance(found, dict) else {"default": found} if found else {}
    if "default" in templates:
        fields.append(Field("tokenizer.chat_template", "STRING", templates.pop("default")))
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    if named:  # under the keys of gguf's add_chat_template
        fields.append(Field("tokenizer.chat_templates", "STRING", list(named)))
    return [*fields, *(Field(f"tokenizer.chat_template.{name}", "STRING", x) for name, x in named.items())]


def tokenizer_notes(path: Path, tokenizer: Any) -> list[str]:
    """Return a line if a GGUF file's tokenizer has other ids for some text, as SentencePiece has for leading
    spaces if tokenizer.json does not put another one in front.

    Raises ValueError if a token of the file has another id, if an added token is split, or if the ids of most
    texts differ: the file would be of no use.
    """
    read = build_tokenizer(read_gguf_header(path))
    _check_tokens(read, tokenizer)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    texts = [*SPLIT_PROBES, "".join(special)]
    wrong = [text for text in texts if _ids(read, text) != _ids(tokenizer, text)]
    if 2 * len(wrong) > len(texts):
        raise ValueError(
            f"this tokenizer cannot be written as GGUF: the text {wrong[0][:40]!r} would have other token "
            "ids; write a Hugging Face folder, without --gguf"
        )
    shown = f"{wrong[0][:40]!r}" if wrong else ""
    return [f"warning: texts such as {shown} have other token ids in GGUF"] if wrong else []


def _check_tokens(read: Any, tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer read from a file has other ids for its tokens, or splits added ones."""
    ids = read.get_vocab()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            raise ValueError(
                f"this tokenizer cannot be written as GGUF: its token {token[:40]!r} has id {number}, and in "
                f"the file {ids.get(token)}; write a Hugging Face folder, without --gguf"
            )
    for number, token in tokenizer.added_tokens_decoder.items():
        text = f"a{token.content}b"
        if _ids(read, text).count(number) != _ids(tokenizer, text).count(number):
            raise ValueError(
                f"this tokenizer cannot be written as GGUF: its token {token.content[:40]!r} (id {number}) "
                "would be split; write a Hugging Face folder, without --gguf"
            )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False).input_ids
