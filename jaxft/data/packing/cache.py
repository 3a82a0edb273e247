"""Tokenised rows on disk: Arrow files of columns, named by a hash of everything that the columns depend on.

A file is an Arrow IPC file with a record batch for each chunk of the dataset, then JSON with facts about the
dataset, the length of the JSON, and a checksum of all of these. It is written under a temporary name and
renamed when it is complete. Its columns are memory-mapped: see Flat.
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

    releases: functions that are called after each copy. That of a mapped file unmaps the pages that were
    read, which would otherwise count as memory of the process until it ends; the system still caches them.
    """

    def __init__(self, parts: Sequence[np.ndarray], releases: Sequence[Callable[[], object]] = ()):
        self.parts = tuple(part for part in parts if len(part)) or tuple(parts[:1])
        self.releases = tuple(dict.fromkeys(releases))
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the values at a slice, an index or an array of indices, all at least 0."""
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        found = self._gather(np.asarray(index))
        self._release()
        return found

    def _release(self) -> None:
        for release in self.releases:
            release()

    def _gather(self, index: np.ndarray) -> np.ndarray:
        if len(self.parts) == 1:
            return self.parts[0][index]
        of = np.searchsorted(self.starts, index, "right") - 1
        found = np.empty((*index.shape, *self.parts[0].shape[1:]), self.parts[0].dtype)
        for number in np.unique(of):
            here = of == number
            found[here] = self.parts[number][index[here] - self.starts[number]]
        return found

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1:
            raise ValueError(f"a step of {step} between the values of a Flat; use an array of indices")
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
        """Return the values of both, the other's last."""
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
            raise IndexError(f"item {index} of {self.size}")
        return self.make(index)

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, range(self.size))


class RowNames(Made[str]):
    """The names of rows, FILE:LINE.

    labels: names of files. sources: index of each row's file in `labels`. numbers: its line.
    """

    def __init__(self, labels: Sequence[str], sources: Flat, numbers: Flat):
        super().__init__(len(numbers), self._name)
        self.labels, self.sources, self.numbers = tuple(labels), sources, numbers

    def _name(self, index: int) -> str:
        return f"{self.labels[int(self.sources[index])]}:{int(self.numbers[index])}"

    def concatenate(self, other: "RowNames") -> "RowNames":
        """Return the names of both, the other's last."""
        sources = Flat([part + len(self.labels) for part in other.sources.parts])
        return RowNames(
            (*self.labels, *other.labels),
            self.sources.concatenate(sources),
            self.numbers.concatenate(other.numbers),
        )


CORRUPT_FILE = (  # what zipfile, numpy and pyarrow raise for flipped bits
    OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, OverflowError, AttributeError,
    TypeError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
NAMING = ("source", "number")  # the columns of a row's name
_NO_TOKENS = (*NAMING, "placeholders")  # columns that say nothing about the tokens
_TAIL = struct.Struct("<Q16s")  # bytes of the JSON, checksum


class ColumnType(NamedTuple):
    """The type of a column. An example has one value, `width` values, or as many as column `along` gives."""

    dtype: Any
    along: str | None = None
    width: int | None = None


ColumnTypes = Mapping[str, ColumnType]
ChunkColumns = dict[str, np.ndarray]  # the columns of a chunk's examples; those with `along` are flat
StoredFacts = dict[str, Any]  # JSON
Make = Callable[[Callable[[ChunkColumns], None]], StoredFacts]


class StoredRows(NamedTuple):
    """The columns of a file and its facts: those that `make` returned, and `digest`, a hash of the columns
    with tokens, their masks and weights.
    """

    columns: dict[str, Flat]
    facts: StoredFacts


class CannotWrite(Exception):
    """The cache cannot be written; the message is the system's reason."""


def row_cache_folder(cache: Path | None = None) -> Path:
    """Return the folder of tokenised rows: under `cache`, else $JAXFT_CACHE, else ~/.cache/jaxft."""
    root = cache or os.environ.get("JAXFT_CACHE") or Path.home() / ".cache" / "jaxft"
    return Path(root).expanduser() / "rows"


def content_key(rows: Any, tokenizer: Any, version: Any, settings: tuple) -> str:
    """Hash everything that the tokens depend on: rows (their hash and the names of their files), tokenizer,
    chat template, settings and the version of the tokenising code.
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
    """Load the rows of a cache file, or make and store them. Return them, and which of these was done.

    make(add): calls add with the columns of each chunk of the dataset, and returns facts about the dataset.
    The second value is "found", "built", "rebuilt" (the file was corrupt) or "not written (REASON)". If the
    cache cannot be written, the rows stay in memory, and the next run makes them again.
    """
    state = "built"
    if path.exists():
        found = load_rows(path, columns)
        if found is not None:
            return found, "found"
        state = "rebuilt"
    try:
        _write_file(path, columns, make)
        found = load_rows(path, columns)
        if found is None:
            raise CannotWrite("it cannot be read again")
    except CannotWrite as error:
        memory = io.BytesIO()
        _write(memory, columns, make)
        return _parse(memory.getbuffer(), columns), f"not written ({error})"
    return found, state


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
    """Return the table in the bytes of a file, without copying the columns. releases: see Flat."""
    import pyarrow

    end = len(data) - _TAIL.size
    begin = end - _TAIL.unpack_from(data, end)[0]
    facts = json.loads(bytes(data[begin:end]))
    reader = pyarrow.ipc.open_file(pyarrow.py_buffer(data).slice(0, begin))
    if not reader.schema.equals(_schema(columns)):
        raise ValueError("the file has other columns")
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    found = {}
    for name, column in columns.items():
        parts = [_values(batch.column(name), column) for batch in batches]
        shape = (0,) if column.width is None else (0, column.width)
        found[name] = Flat(parts or [np.empty(shape, column.dtype)], releases)
    return StoredRows(found, facts)


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
    import pyarrow

    digests = {name: hashlib.sha256() for name in columns if name not in _NO_TOKENS}
    with _writing():
        writer = pyarrow.ipc.new_file(file, _schema(columns))

    def add(part: ChunkColumns) -> None:
        arrays = {name: np.ascontiguousarray(part[name], c.dtype) for name, c in columns.items()}
        for name, digest in digests.items():
            digest.update(arrays[name].data)
        with _writing():
            writer.write_batch(_batch(arrays, columns))

    facts = make(add)
    whole = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in digests.items())
    facts = facts | {"digest": hashlib.sha256(whole.encode()).hexdigest()}
    text = json.dumps(facts, default=str).encode()
    with _writing():
        writer.close()
        file.write(text + len(text).to_bytes(8, "little"))
        file.flush()
        checksum = _checksum(file, file.tell())
        file.write(checksum)


# ---- Arrow. pyarrow's own conversions of arrays import pandas where it is installed, which takes 0.4 s.


def _schema(columns: ColumnTypes) -> Any:
    import pyarrow

    def kind(column: ColumnType) -> Any:
        value = pyarrow.from_numpy_dtype(_stored_dtype(column))
        if column.along is not None:
            return pyarrow.list_(value)
        return value if column.width is None else pyarrow.list_(value, column.width)

    return pyarrow.schema([(name, kind(column)) for name, column in columns.items()])


def _stored_dtype(column: ColumnType) -> Any:
    """Return the dtype in the file: Arrow has 8 booleans in a byte, which cannot be mapped as an array."""
    return np.dtype(np.uint8) if column.dtype is np.bool_ else np.dtype(column.dtype)


def _batch(part: ChunkColumns, columns: ColumnTypes) -> Any:
    import pyarrow

    arrays = []
    for name, column in columns.items():
        values = _to_arrow(part[name].view(_stored_dtype(column)).ravel())
        if column.along is not None:
            counts = part[column.along]
            ends = np.cumsum(counts.reshape(len(counts), -1).sum(1))
            offsets = _to_arrow(np.concatenate([[0], ends]).astype(np.int32))
            values = pyarrow.ListArray.from_arrays(offsets, values)
        elif column.width is not None:
            values = pyarrow.FixedSizeListArray.from_arrays(values, column.width)
        arrays.append(values)
    return pyarrow.RecordBatch.from_arrays(arrays, schema=_schema(columns))


def _to_arrow(values: np.ndarray) -> Any:
    """Return an Arrow array of the same memory."""
    import pyarrow

    buffers = [None, pyarrow.py_buffer(values)]
    return pyarrow.Array.from_buffers(pyarrow.from_numpy_dtype(values.dtype), len(values), buffers)


def _from_arrow(array: Any, dtype: Any) -> np.ndarray:
    """Return a one-dimensional array of the same memory. dtype: of the size of the Arrow array's."""
    memory, size = array.buffers()[-1], np.dtype(dtype).itemsize
    if array.null_count:
        raise ValueError("a column has missing values")
    return np.ndarray((len(array),), dtype, memory or b"", array.offset * size)


def _values(array: Any, column: ColumnType) -> np.ndarray:
    """Return the values of a stored column without copying them."""
    if column.along is None and column.width is None:
        return _from_arrow(array, column.dtype)
    values = _from_arrow(array.values, column.dtype)
    return values if column.width is None else values.reshape(len(array), column.width)
