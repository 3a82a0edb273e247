"""Tokenised rows on disk: files of columns, named by a hash of everything that the columns depend on.

A file has an array of each column, chunk after chunk of the dataset; then JSON with the offsets of the arrays
and facts about the dataset; then the length of the JSON and a checksum of all this. It is written under a
temporary name and renamed when it is complete. Its columns are memory-mapped: see Flat.
"""

import contextlib
import hashlib
import io
import json
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import xxhash

from jaxft.distributed.disk import temporary_file

Item = TypeVar("Item")


class Flat:
    """Arrays that are read as if concatenated along their first axis; indexing copies only the chosen values.

    releases: functions that are called after each copy. The function of a mapped file unmaps the pages that
    were read, which would otherwise count as memory of the process until it ends; the system still caches
    them.
    """

    def __init__(self, parts: Sequence[np.ndarray], releases: Sequence[Callable[[], object]] = ()):
        self.parts = tuple(part for part in parts if len(part)) or tuple(parts[:1])
        self.releases = tuple(dict.fromkeys(releases))
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the values at a slice of step 1, an index or an array of indices, all at least 0."""
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self))[:2])
        values = self._gather(np.asarray(index))
        self._release()
        return values

    def _release(self) -> None:
        for release in self.releases:
            release()

    def _gather(self, index: np.ndarray) -> np.ndarray:
        if len(self.parts) == 1:
            return self.parts[0][index]
        of = np.searchsorted(self.starts, index, "right") - 1
        values = np.empty((*index.shape, *self.parts[0].shape[1:]), self.parts[0].dtype)
        for number in np.unique(of):
            here = of == number
            values[here] = self.parts[number][index[here] - self.starts[number]]
        return values

    def _slice(self, start: int, stop: int) -> np.ndarray:
        if stop <= start:
            return self.parts[0][:0]
        first, last = np.searchsorted(self.starts, (start, stop - 1), "right") - 1
        pieces = [
            self.parts[i][max(0, start - self.starts[i]) : stop - self.starts[i]]
            for i in range(first, last + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        self._release()
        return whole if dtype is None else whole.astype(dtype)

    def concatenate(self, other: "Flat") -> "Flat":
        """Return these values and then the other's."""
        return Flat((*self.parts, *other.parts), (*self.releases, *other.releases))


class Made(Sequence[Item]):
    """A sequence of `size` items; reading item i calls make(i)."""

    def __init__(self, size: int, make: Callable[[int], Item]):
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.size))]
        index = int(index) + (self.size if index < 0 else 0)
        if not 0 <= index < self.size:
            raise IndexError(f"no item {index}: the sequence has {self.size} items, from 0 on")
        return self.make(index)

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, range(self.size))


class RowNames(Made[str]):
    """The names of rows, FILE:LINE.

    labels: names of files. sources: index of each row's file in `labels`. numbers: line of each row.
    """

    def __init__(self, labels: Sequence[str], sources: Flat, numbers: Flat):
        super().__init__(len(numbers), self._name)
        self.labels, self.sources, self.numbers = tuple(labels), sources, numbers

    def _name(self, index: int) -> str:
        return f"{self.labels[int(self.sources[index])]}:{int(self.numbers[index])}"

    def concatenate(self, other: "RowNames") -> "RowNames":
        """Return these names and then the other's."""
        sources = Flat([part + len(self.labels) for part in other.sources.parts])
        return RowNames(
            (*self.labels, *other.labels),
            self.sources.concatenate(sources),
            self.numbers.concatenate(other.numbers),
        )


CORRUPT_FILE = (  # what zipfile, numpy and json raise for flipped bits
    OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, OverflowError, AttributeError,
    TypeError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
NAMING = ("source", "number")  # the columns of a row's name
_NO_TOKENS = (*NAMING, "placeholders")  # columns that say nothing about the tokens
_ALIGN = 64  # bytes: each array begins at a multiple of it
_TAIL = struct.Struct("<Q16s")  # bytes of the JSON, checksum


class ColumnType(NamedTuple):
    """The type of a column. An example has one value, `width` values, or as many as column `along` says."""

    dtype: Any
    along: str | None = None
    width: int | None = None


ColumnTypes = Mapping[str, ColumnType]
ChunkColumns = dict[str, np.ndarray]  # the columns of a chunk's examples; those with `along` are flat
StoredFacts = dict[str, Any]  # JSON
Make = Callable[[Callable[[ChunkColumns], None]], StoredFacts]


class StoredRows(NamedTuple):
    """The rows of a cache file. facts: the dictionary that load_or_make's `make` returned, and in it
    `digest`, a hash of the columns of tokens, masks and weights.
    """

    columns: dict[str, Flat]
    facts: StoredFacts


class CannotWrite(Exception):
    """The cache cannot be written; the message is the reason."""


def row_cache_folder(cache: Path | None = None) -> Path:
    """Return the folder of tokenised rows: under `cache`, else $JAXFT_CACHE, else ~/.cache/jaxft."""
    root = cache or os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft"
    return Path(root).expanduser() / "rows"


def content_key(rows: Any, tokenizer: Any, version: Any, settings: tuple) -> str:
    """Return a hash of everything that the tokens depend on: rows (their hash and the names of their files),
    tokenizer, chat template, settings and the version of the tokenising code.
    """
    digest = hashlib.sha256()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    for part in (version, settings, special, tokenizer.chat_template, backend, rows):
        digest.update(json.dumps(part, default=str).encode() + b"\0")
    return digest.hexdigest()[:40]


def template_fingerprint(tokenizer: Any) -> str:
    """Return a hash of the tokenizer's chat template, "none" without one."""
    if not tokenizer.chat_template:
        return "none"
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()[:16]


# ---- files


def load_or_make(path: Path, columns: ColumnTypes, make: Make) -> tuple[StoredRows, str]:
    """Load the rows of a cache file, or make and store them. Return the rows, and whether they were loaded:
    "found", "built", "rebuilt" (the file was corrupt) or "not written (REASON)".

    make(add): calls add with the columns of each chunk of the dataset, and returns facts about the dataset.
    If the cache cannot be written, the rows stay in memory, and the next run makes them again.
    """
    state = "built"
    if path.exists():
        stored = load_rows(path, columns)
        if stored is not None:
            return stored, "found"
        state = "rebuilt"
    try:
        _write_file(path, columns, make)
        stored = load_rows(path, columns)
        if stored is None:
            raise CannotWrite("it cannot be read again")
    except CannotWrite as error:
        memory = io.BytesIO()
        _write(memory, columns, make)
        return _parse(memory.getbuffer(), columns), f"not written ({error})"
    return stored, state


def load_rows(path: Path, columns: ColumnTypes) -> StoredRows | None:
    """Return the rows of a file, memory-mapped, or None if it is corrupt or has other columns."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - _TAIL.size
            checksum = _checksum(file, size + 8)  # before the file is mapped, so that it takes no memory
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if _TAIL.unpack_from(mapped, size)[1] != checksum:
            return None
        return _parse(mapped, columns, [partial(mapped.madvise, mmap.MADV_DONTNEED)])
    except CORRUPT_FILE:
        return None


def _checksum(file: BinaryIO, size: int) -> bytes:
    digest = xxhash.xxh3_128()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _parse(data: Any, columns: ColumnTypes, releases: Sequence[Callable[[], object]] = ()) -> StoredRows:
    """Return the columns in the bytes of a file, without copying them. releases: see Flat."""
    end = len(data) - _TAIL.size
    facts = json.loads(bytes(data[end - _TAIL.unpack_from(data, end)[0] : end]))
    places = facts.pop("places")
    if facts.pop("types") != _types(columns):
        raise ValueError("the file has other columns")
    arrays = {}
    for name, (dtype, _, width) in columns.items():
        shape = () if width is None else (width,)
        parts = [np.ndarray((count, *shape), dtype, data, offset) for offset, count in places[name]]
        arrays[name] = Flat(parts or [np.empty((0, *shape), dtype)], releases)
    return StoredRows(arrays, facts)


def _types(columns: ColumnTypes) -> list[list[Any]]:
    return [[name, np.dtype(c.dtype).str, c.along, c.width] for name, c in columns.items()]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CannotWrite(error.strerror or error) from error


def _write_file(path: Path, columns: ColumnTypes, make: Make) -> None:
    """Write to a temporary file and rename it, so that no reader sees a partial file."""
    with contextlib.ExitStack() as stack:
        with _writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(temporary_file(path))
        _write(file, columns, make)
        with _writing():
            file.close()
            Path(file.name).replace(path)


def _write(file: BinaryIO, columns: ColumnTypes, make: Make) -> None:
    digests = {name: hashlib.sha256() for name in columns if name not in _NO_TOKENS}
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in columns}  # offset, length of each array

    def add(part: ChunkColumns) -> None:
        for name, column in columns.items():
            array = np.ascontiguousarray(part[name], column.dtype)
            if name in digests:
                digests[name].update(array.data)
            with _writing():
                file.write(bytes(-file.tell() % _ALIGN))
                places[name].append((file.tell(), len(array)))
                file.write(array.data)

    facts = make(add)
    whole = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in digests.items())
    facts = facts | {"digest": hashlib.sha256(whole.encode()).hexdigest()}
    text = json.dumps(facts | {"places": places, "types": _types(columns)}, default=str).encode()
    with _writing():
        file.write(text + len(text).to_bytes(8, "little"))
        file.flush()
        checksum = _checksum(file, file.tell())
        file.write(checksum)
