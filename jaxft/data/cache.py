"""Files of arrays on disk, named by a hash of everything that the arrays depend on."""

import contextlib
import hashlib
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.invalid import InvalidRow
from jaxft.data.rows import Row

CORRUPT_FILE = (  # what zipfile and numpy raise for flipped bits
    OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, OverflowError, AttributeError,
    TypeError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip

Arrays = dict[str, Any]  # name -> array of the file
INVALID_DTYPE = {"invalid": np.uint8}  # the array of `pack_invalid`


def row_cache_folder(cache: Path | None = None) -> Path:
    """Return the folder of tokenised rows: under `cache`, else $JAXFT_CACHE, else ~/.cache/jaxft."""
    root = cache or os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft"
    return Path(root).expanduser() / "rows"


def content_key(rows: Sequence[Row], tokenizer: Any, version: Any, settings: tuple) -> str:
    """Hash everything that the tokens depend on: rows, tokenizer, chat template, settings and the version of
    the tokenising code.
    """
    digest = hashlib.sha256()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    for part in (version, settings, special, tokenizer.chat_template, backend):
        digest.update(json.dumps(part, default=str).encode() + b"\0")
    for row in rows:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()[:40]


def pack_invalid(invalid: Sequence[InvalidRow]) -> np.ndarray:
    """Return the invalid rows as an array of bytes, in which a cache file stores them."""
    return np.frombuffer(json.dumps([row.args for row in invalid]).encode(), np.uint8)


def unpack_invalid(packed: np.ndarray) -> list[InvalidRow]:
    """Return the invalid rows that `pack_invalid` has packed."""
    return [InvalidRow(*args) for args in json.loads(packed.tobytes())]


def template_fingerprint(tokenizer: Any) -> str:
    """Return a hash of the tokenizer's chat template, "none" without one."""
    if not tokenizer.chat_template:
        return "none"
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()[:16]


def load_or_make(
    path: Path, dtypes: Mapping[str, Any], is_sound: Callable[[Arrays], bool], make: Callable[[], Arrays]
) -> tuple[Arrays, str]:
    """Return the arrays of a cache file, or make and store them; and how they came about.

    The second value is "found", "built", "rebuilt" (the file was corrupt) or "not written (REASON)". A cache
    that cannot be written only costs time.
    """
    state = "built"
    if path.exists():
        arrays = load_arrays(path, dtypes)
        if arrays is not None and is_sound(arrays):
            return arrays, "found"
        state = "rebuilt"
    arrays = make()
    failure = save_arrays(path, arrays)
    return arrays, f"not written ({failure})" if failure else state


def load_arrays(path: Path, dtypes: Mapping[str, Any]) -> Arrays | None:
    """Return the named arrays of a file, or None if one of them is missing, corrupt or of another dtype."""
    try:
        with (
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as stored,
        ):  # checks the zip's checksums
            arrays = {name: stored[name] for name in dtypes}
    except CORRUPT_FILE:
        return None
    return arrays if all(arrays[name].dtype == dtype for name, dtype in dtypes.items()) else None


def save_arrays(path: Path, arrays: Arrays) -> str | None:
    """Write to a temporary file and rename it, so that no reader sees a partial file. Return the reason of a
    failure.
    """
    temporary = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")  # hosts may share the folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return error.strerror
    return None
