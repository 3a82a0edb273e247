"""Tokenised rows, and their cache on disk under a key of everything they depend on."""

import contextlib
import hashlib
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxft.data import chat, formats
from jaxft.data.rows import Row, read_rows

VERSION = 2  # counts changes to what rows become
BROKEN = (  # what zipfile and numpy raise at flipped bits
    OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, OverflowError, AttributeError, TypeError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
_ARRAYS = {"ids": np.int32, "learned": np.bool_, "offsets": np.int64, "kept": np.int64, "cut": np.bool_}


@dataclass(frozen=True)
class TokenSettings:
    """The settings that decide the tokens and the loss mask of a row, and with them the key of the cache."""

    columns: tuple[str, ...]
    format: str
    loss_on: str
    max_length: int
    too_long: str
    date: str


@dataclass(frozen=True)
class Tokenised:
    """Examples one after the other: example i is ids[offsets[i]:offsets[i + 1]]; `learned` marks tokens that are targets.

    An example's first token is never a target. `kept` numbers the rows that are left after dropping, `cut` marks truncated ones.
    """

    ids: Int[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " examples_plus_1"]
    kept: Int[np.ndarray, " examples"]
    cut: Bool[np.ndarray, " examples"]
    names: tuple[str, ...]
    dropped: int = 0
    cache: str = field(default="off", compare=False)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def reads(self) -> Int[np.ndarray, " examples"]:
        """Learned tokens of each example."""
        return np.diff(np.concatenate([[0], np.cumsum(self.learned)])[self.offsets])


def tokenised(ref: str, rows: TokenSettings, tokenizer: Any, cache: Path | None = None) -> Tokenised:
    """The rows of `ref` as tokens, from the cache if it has them; a cache that can't be read is made anew."""
    found = read_rows(ref)
    path = cache_folder(cache) / f"{content_key(found, rows, tokenizer)}.npz"
    stored, state = load(path, _ARRAYS, lambda stored: _sound(stored, len(found)))
    if stored is None:
        stored = _tokenise(found, rows, tokenizer)
        state = save(path, stored) or state
    if not len(stored["kept"]):
        raise ValueError(
            f"{ref}: all {len(found)} rows were dropped, longer than data.max_length={rows.max_length}; raise it"
        )
    names = tuple(found[i].name for i in stored["kept"])
    return Tokenised(**stored, names=names, dropped=len(found) - len(names), cache=state)


def join(first: Tokenised, second: Tokenised) -> Tokenised:
    """The examples of both, the first's in front."""
    return Tokenised(
        ids=np.concatenate([first.ids, second.ids]),
        learned=np.concatenate([first.learned, second.learned]),
        offsets=np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        kept=np.concatenate([first.kept, second.kept]),
        cut=np.concatenate([first.cut, second.cut]),
        names=first.names + second.names,
        dropped=first.dropped + second.dropped,
        cache=first.cache,
    )


def cache_folder(cache: Path | None = None) -> Path:
    """Where tokenised rows are kept: under `cache`, else $JAXFT_CACHE, else ~/.cache/jaxft."""
    root = cache or os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft"
    return Path(root).expanduser() / "rows"


def content_key(found: Sequence[Row], rows: TokenSettings, tokenizer: Any) -> str:
    """A hash of all that decides the tokens: rows, tokenizer, template, settings, and this code's version."""
    return key_of(found, tokenizer, VERSION, astuple(rows))


def key_of(found: Sequence[Row], tokenizer: Any, version: Any, settings: tuple) -> str:
    """A hash of rows, tokenizer, template, settings and the version of the code that reads them."""
    digest = hashlib.sha256()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if getattr(tokenizer, "is_fast", False)
        else type(tokenizer).__name__
    )
    for part in (version, settings, special, getattr(tokenizer, "chat_template", None), backend):
        digest.update(json.dumps(part, default=str).encode() + b"\0")
    for row in found:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()[:40]


def _tokenise(found: Sequence[Row], rows: TokenSettings, tokenizer: Any) -> dict[str, np.ndarray]:
    examples = formats.normalise(found, rows.format, rows.columns)
    pieces, masks, kept, cut = [], [], [], []
    for number, (ids, learned) in enumerate(chat.tokenise(examples, tokenizer, rows.loss_on, rows.date)):
        long = len(ids) > rows.max_length
        if long and rows.too_long == "drop":
            continue
        learned[0] = False
        _check(found[number].name, learned, rows)
        pieces.append(ids[: rows.max_length])
        masks.append(learned[: rows.max_length])
        kept.append(number)
        cut.append(long)
    values = {
        "ids": np.concatenate(pieces) if pieces else [],
        "learned": np.concatenate(masks) if masks else [],
        "offsets": np.cumsum([0, *map(len, pieces)]),
        "kept": kept,
        "cut": cut,
    }
    return {name: np.asarray(values[name], dtype) for name, dtype in _ARRAYS.items()}


def _check(name: str, learned: np.ndarray, rows: TokenSettings) -> None:
    if not learned.any():
        raise ValueError(
            f"{name}: empty loss mask, no token to learn with data.loss_on={rows.loss_on}; fix or remove the row"
        )
    if len(learned) <= rows.max_length:
        return
    advice = "raise data.max_length or set data.too_long=drop"
    if not learned[: rows.max_length].any():
        at = int(learned.argmax())
        raise ValueError(
            f"{name}: the prompt has {at} tokens and data.max_length={rows.max_length} leaves no answer; {advice}"
        )
    if rows.too_long == "error":
        raise ValueError(
            f"{name}: {len(learned)} tokens, more than data.max_length={rows.max_length}; {advice} or truncate"
        )


def _sound(stored: dict[str, np.ndarray], count: int) -> bool:
    sizes = [len(stored[name]) for name in ("ids", "learned", "offsets", "kept", "cut")]
    tokens, examples = sizes[0], sizes[3]
    fits = sizes == [tokens, tokens, examples + 1, examples, examples] and stored["offsets"][-1] == tokens
    return bool(fits and (stored["kept"] < count).all())


def load(path: Path, dtypes: dict[str, Any], sound: Callable) -> tuple[dict[str, np.ndarray] | None, str]:
    """The arrays of a cache file, None where they must be made (anew); and in a word which it was."""
    if not path.exists():
        return None, "built"
    try:
        with (
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):  # the zip's checksums find flipped bits
            stored = {name: arrays[name] for name in dtypes}
        fine = all(stored[name].dtype == dtype for name, dtype in dtypes.items()) and sound(stored)
        return (stored, "found") if fine else (None, "rebuilt")
    except BROKEN:
        return None, "rebuilt"


def save(path: Path, stored: Any) -> str | None:
    """Write under another name and rename, so that no reader sees half a file. A cache that can't be written is only slower."""
    temporary = path.with_suffix(
        f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    )  # of one of many hosts that share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **stored)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return f"not written ({error.strerror})"
    return None
