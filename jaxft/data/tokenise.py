"""Tokenise a dataset chunk by chunk, in this process or in several, into a cache file.

Worker processes are started by `spawn`, because a process that has started JAX has threads, and a fork may
copy their locks while they are locked. Workers do not import JAX. Each reads its chunks from the files and
returns their columns, which this process writes in the order of the rows, so the file is the same for any
number of workers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxft.data import cache as files
from jaxft.data import confined, formats
from jaxft.data.cache import ChunkColumns, ColumnTypes, StoredFacts, StoredRows
from jaxft.data.flat import RowNames
from jaxft.data.formats import ColumnCounts, RowFormat, Schemas
from jaxft.data.invalid import InvalidCount, InvalidRow, InvalidRows, Tally
from jaxft.data.progress import RowProgress
from jaxft.data.row_files import (
    ROW_CHUNK_BYTES,
    Chunk,
    LoadedRows,
    Row,
    in_windows,
    spread_chunks,
    spread_rows,
)
from jaxft.data.row_text import DOCUMENT
from jaxft.data.rows import Listing, check_rows, list_chunks
from jaxft.data.urls import is_remote
from jaxft.distributed.threads import cores

MapChunks = Callable[[Callable[..., Any], Iterable[Chunk]], Iterator[Any]]
LEAST_PARTS = 32  # chunks that a sample is spread over, if there are as many
SMALL_DATASET = 8  # chunks; up to here one process is faster, because further ones take time to start


class RowSettings(Protocol):
    """The settings that rows of every kind have."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See data.columns."""

    @property
    def format(self) -> str:
        """See data.format."""

    @property
    def max_samples(self) -> int | None:
        """See data.max_samples."""


@dataclass(frozen=True)
class RowKind:
    """How rows of one kind are tokenised; worker processes get a copy.

    version: of the code, and key: the settings that the tokens depend on; both are part of the cache key.
    stored: the columns that `tokenise` returns, and those of files.NAMING. schemas: the accepted formats,
    None if rows need no common one and any column may be used. further: columns that settings name, in
    addition to those of the formats. sample_by: see list_chunks.
    tokenise(rows, format, tokenizer, invalid): the columns of the examples; "index" is the index in `rows` of
    each example's row. Rows that are too long or invalid have no example.
    """

    version: Any
    key: tuple
    settings: RowSettings
    stored: ColumnTypes
    schemas: Schemas | None
    tokenise: Callable[[Sequence[Row], RowFormat, Any, InvalidRows], ChunkColumns]
    further: tuple[str, ...] = ()
    sample_by: str = DOCUMENT

    @property
    def used(self) -> tuple[str, ...] | None:
        """The columns of the dataset that are read, None for all."""
        if self.schemas is None:
            return None
        theirs = (formats.split_column(item)[1] for item in self.settings.columns)
        return tuple(dict.fromkeys([*formats.names_in_datasets(self.schemas), *theirs, *self.further]))


class Tokenising(NamedTuple):
    """Settings that the tokens do not depend on.

    cache: the folder of the cache, None for the default. invalid_limit, names_first: see InvalidRows.
    workers: processes; None for one per CPU, or this one alone for a small dataset. progress: whether to
    print the progress of a long tokenisation. sample: tokenise so many rows of a larger dataset, at even
    distances; None for all. counted: called with the number of rows of a sample, and of the dataset's, None
    if that is not known. only: the name of a row, FILE:LINE, that is tokenised alone.
    """

    cache: Path | None = None
    invalid_limit: float | None = None
    workers: int | None = None
    progress: bool = False
    names_first: bool = False
    sample: int | None = None
    counted: Callable[[int, int | None], object] | None = None
    only: str | None = None


DEFAULT_TOKENISING = Tokenising()


@dataclass(frozen=True)
class TokenisedDataset:
    """A tokenised dataset.

    names: the row of each example. largest_id: the largest token id. dropped: number of rows that were left
    out as too long. invalid: the invalid rows that were left out. examples: see first_rows. notes: lines
    about how the rows were read where neither files nor settings say it. state: whether the columns were in
    the cache, see cache.load_or_make.
    """

    stored: StoredRows
    names: RowNames
    largest_id: int
    dropped: int
    invalid: tuple[InvalidCount, ...]
    examples: tuple[Row, ...]
    notes: tuple[str, ...]
    state: str


def tokenise_dataset(ref: str, kind: RowKind, tokenizer: Any, how: Tokenising) -> TokenisedDataset:
    """Read the rows of `ref` and tokenise them, or load the tokens from the cache.

    Raises ValueError if rows are invalid, or more of them than how.invalid_limit allows, and if the dataset
    has no rows.
    """
    listing = list_chunks(ref, kind.used, kind.sample_by).first(kind.settings.max_samples)
    listing = listing if how.only is None else row_alone(listing, how.only)
    content = (listing.digest, listing.labels, *([] if how.sample is None else [how.sample]))
    key = files.content_key(content, tokenizer, kind.version, kind.key)
    stored, state = files.load_or_make(
        files.row_cache_folder(how.cache) / f"{key}.arrow",
        kind.stored,
        partial(_tokenise, ref, listing, kind, tokenizer, how),
    )
    facts, invalid = stored.facts, InvalidRows(how.invalid_limit, how.names_first)
    invalid.merge(_tallies(facts["invalid"], listing.folder))
    names = RowNames(listing.labels, stored.columns["source"], stored.columns["number"])
    read = facts["total"] + facts["unreadable"]
    if how.sample is not None and how.counted is not None:
        how.counted(read, read if read < how.sample else facts["rows"])
    invalid.check(ref, read)
    dropped = read - invalid.total - facts["left"]
    examples = tuple(Row(name, fields) for name, fields in facts["examples"])
    own = [f"{_name(listing)}: {note}" for note in facts["notes"]]
    notes = tuple(f"note: {line}" for line in (*listing.notes, *own))
    return TokenisedDataset(
        stored, names, facts["largest_id"], dropped, invalid.counts(), examples, notes, state
    )


def row_alone(listing: Listing, name: str) -> Listing:
    """Return a dataset of the row with this name alone, or of none."""

    def chunks() -> Iterator[Chunk]:
        for chunk in listing.chunks():
            rows = [row for row in chunk.rows() if Path(row.name).name == name]  # an error has the folder too
            yield from [LoadedRows(tuple(rows), chunk.label)] if rows else []

    return replace(listing, digest=f"{listing.digest} {name}", chunks=chunks, rows=None)


def sampled(ref: str, listing: Listing, count: int, progress: bool = False) -> tuple[Listing, int | None]:
    """Return a dataset of `count` rows at even distances of a larger one, and the number of all rows.

    Where the rows must be read to count them, all are read; of files on the network only the first ones,
    and their number stays unknown. progress: see Tokenising.
    """
    if is_remote(ref):
        return listing.first(count), None
    if listing.rows is None:
        with RowProgress(f"reading {_name(listing)}", None, progress) as shown:
            rows, total = spread_rows(listing.chunks(), count, shown.add)
        chunks = [*in_windows(rows, listing.folder or listing.labels[0])]
        size = listing.size * len(rows) // max(1, total)
        return replace(listing, size=size, chunks=lambda: iter(chunks), rows=len(rows)), total
    if listing.rows <= count:
        return listing, listing.rows
    parts = spread_chunks([*listing.chunks()], count, LEAST_PARTS)
    size = listing.size * count // listing.rows
    return replace(listing, size=size, chunks=lambda: iter(parts), rows=count), listing.rows


def _tokenise(
    ref: str,
    listing: Listing,
    kind: RowKind,
    tokenizer: Any,
    how: Tokenising,
    add: Callable[[ChunkColumns], None],
) -> StoredFacts:
    """Tokenise all chunks; see cache.load_or_make."""
    all_rows = None
    if how.sample is not None:
        listing, all_rows = sampled(ref, listing, how.sample, how.progress)
    invalid = InvalidRows(how.invalid_limit, how.names_first)
    sources = {x: i for i, x in enumerate(listing.labels)}
    total, unreadable, left, largest, some = 0, 0, 0, 0, list[Row]()
    with start_workers(worker_count(how.workers, listing.size), (kind, tokenizer, how.invalid_limit)) as run:
        format, chunks, rows = _format_of(ref, listing, kind, run, how)
        doing = "tokenising" if how.sample is None else "measuring the lengths of"
        with RowProgress(f"{doing} {_name(listing)}", rows, how.progress) as progress:
            for done in run(partial(tokenise_chunk, format=format), chunks):
                progress.add(done.rows + done.unreadable)
                invalid.merge(done.invalid)
                total, unreadable = total + done.rows, unreadable + done.unreadable
                invalid.check_begun(ref, total + unreadable, rows)
                left += done.left
                some = first_rows([*some, *done.examples], kind.settings.columns)
                count = len(done.part["number"])
                if count:
                    largest = max(largest, int(done.part["ids"].max(initial=0)))
                    add({**done.part, "source": np.array([sources[label] for label in done.labels])})
    check_rows(ref, total, unreadable, invalid)
    return {
        "total": total,
        "rows": all_rows,
        "unreadable": unreadable,
        "left": left,
        "largest_id": largest,
        "notes": format.note(),
        "examples": some,
        "invalid": _portable(invalid.tallies, listing.folder),
    }


def _format_of(
    ref: str, listing: Listing, kind: RowKind, run: MapChunks, how: Tokenising
) -> tuple[RowFormat, Iterable[Chunk], int | None]:
    """Return the format of all rows, the chunks to tokenise, and the number of rows if it is known.

    The chunks of a small dataset contain its rows, so that the files are read once.
    """
    fixed = kind.settings.format not in ("auto", formats.PLAIN)
    if kind.schemas is None or (fixed and listing.size > ROW_CHUNK_BYTES):
        counts = ColumnCounts()
        return _choose(counts, kind), listing.chunks(), listing.rows
    invalid, counts, total = InvalidRows(how.invalid_limit, how.names_first), ColumnCounts(), 0
    chunks = list[Chunk]()
    if listing.size <= ROW_CHUNK_BYTES:
        chunks = [LoadedRows(tuple(chunk.rows()), chunk.label) for chunk in listing.chunks()]
    with RowProgress(f"reading {_name(listing)}", listing.rows, how.progress) as progress:
        for found in run(count_chunk, chunks or listing.chunks()):
            before = invalid.total
            invalid.merge(found.invalid)
            counts.merge(found.columns)
            total += found.rows
            progress.add(found.rows + invalid.total - before)
    check_rows(ref, total, invalid.total, invalid)
    return _choose(counts, kind), chunks or listing.chunks(), total + invalid.total


def _name(listing: Listing) -> str:
    return listing.labels[0] if len(listing.labels) == 1 else f"{len(listing.labels)} files"


def _choose(counts: ColumnCounts, kind: RowKind) -> RowFormat:
    if kind.schemas is None:
        return RowFormat(kind.settings.format)
    return formats.choose_format(counts, kind.settings.format, kind.settings.columns, kind.schemas)


# ---- invalid rows in the cache file


def _portable(tallies: dict[str, Tally], folder: str) -> list[list]:
    """Return tallies as JSON, without the folder of the files: they may be moved."""

    def where(name: str) -> list[str]:
        inside = bool(folder) and name.startswith(f"{folder}/")
        return ["file", name[len(folder) + 1 :]] if inside else ["row", name]

    return [[reason, rows, *where(first.name), first.problem] for reason, (rows, first) in tallies.items()]


def _tallies(stored: list[list], folder: str) -> dict[str, Tally]:
    def name_of(kind: str, name: str) -> str:
        return f"{folder}/{name}" if kind == "file" else name

    return {
        reason: Tally(rows, InvalidRow(name_of(kind, name), reason, problem))
        for reason, rows, kind, name, problem in stored
    }


# ---- a chunk, in any process


class CountedChunk(NamedTuple):
    """The number of rows of a chunk that can be read, their columns, and the other rows."""

    rows: int
    columns: ColumnCounts
    invalid: dict[str, Tally]


class TokenisedChunk(NamedTuple):
    """The columns of a chunk's examples. labels: what the name of each example's row begins with. rows,
    unreadable: numbers of rows that can and cannot be read. left: number of rows that have examples.
    examples: see first_rows.
    """

    labels: list[str]
    part: ChunkColumns
    rows: int
    unreadable: int
    left: int
    invalid: dict[str, Tally]
    examples: list[Row]


class _Job(NamedTuple):
    """What a process needs to tokenise chunks."""

    kind: RowKind
    tokenizer: Any
    invalid_limit: float | None


def _read(chunk: Chunk, invalid: InvalidRows) -> list[Row]:
    rows = []
    for row in chunk.rows():
        if isinstance(row, InvalidRow):
            invalid.add(row)
        else:
            rows.append(row)
    return rows


def count_chunk(chunk: Chunk, job: _Job) -> CountedChunk:
    """Count the columns of a chunk's rows."""
    invalid = InvalidRows(job.invalid_limit)
    rows = _read(chunk, invalid)
    kind = job.kind
    assert kind.schemas is not None
    counts = formats.count_columns(rows, kind.settings.columns, kind.schemas)
    return CountedChunk(len(rows), counts, invalid.tallies)


def tokenise_chunk(chunk: Chunk, job: _Job, format: RowFormat) -> TokenisedChunk:
    """Read and tokenise a chunk."""
    invalid = InvalidRows(job.invalid_limit)
    rows = _read(chunk, invalid)
    unreadable = invalid.total
    part = job.kind.tokenise(rows, format, job.tokenizer, invalid)
    index = part.pop("index")
    left = [rows[i] for i in index]
    names = [row.name.rpartition(":") for row in left]
    part["number"] = np.array([int(number) for _, _, number in names], np.int64)
    some = [] if format.name == "text" else first_rows(left, job.kind.settings.columns)  # it may be long
    return TokenisedChunk(
        [label for label, _, _ in names],
        part,
        len(rows),
        unreadable,
        len(np.unique(index)),
        invalid.tallies,
        some,
    )


def first_rows(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return the rows that warnings are derived from: the first, and the first with a system message and with
    tools.

    rows: the valid ones. columns: see data.columns.
    """
    return [*rows[:1], *_first_row_with_system(rows), *_first_row_with_tools(rows, columns)]


def _first_row_with_tools(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return the first row that has tools, [] without any. columns: see data.columns."""
    renamed = (item.partition("=") for item in columns)
    name = next((theirs.strip() for ours, _, theirs in renamed if ours.strip() == "tools"), "tools")
    return next(([row] for row in rows if row.fields.get(name)), [])


def _first_row_with_system(rows: Sequence[Row]) -> list[Row]:
    """Return the first row with a column of messages that begins with a system message, [] without any."""

    def begins(value: Any) -> bool:
        first = value[0] if isinstance(value, list | tuple) and value else None
        return isinstance(first, dict) and "system" in (first.get("role"), first.get("from"))

    return next(
        ([row] for row in rows if row.fields.get("system") or any(map(begins, row.fields.values()))), []
    )


# ---- processes


_job: list[_Job] = []  # of a worker process


def worker_count(setting: int | None, size: int) -> int:
    """Return how many processes tokenise a dataset of `size` bytes. setting: data.workers."""
    if setting is not None:
        return setting
    if size <= SMALL_DATASET * ROW_CHUNK_BYTES:
        return 1
    return cores()


@contextmanager
def start_workers(count: int, job: tuple) -> Iterator[MapChunks]:
    """Yield a function that maps a function over chunks, in order, in `count` processes."""
    if count == 1:
        here = _Job(*job)
        yield lambda function, chunks: (function(chunk, job=here) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=job
    )

    def run(function: Callable[..., Any], chunks: Iterable[Chunk]) -> Iterator[Any]:
        pending: deque[Future] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_in_worker, function, chunk))
            if len(pending) > 2 * count:  # results that wait take memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield run
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {count} processes that tokenise the rows has died: out of memory, or started by a "
            'script without `if __name__ == "__main__":`; set a smaller data.workers, or 1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(*job: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    confined.confine()
    _job[:] = [_Job(*job)]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(function: Callable[..., Any], chunk: Chunk) -> Any:
    return function(chunk, job=_job[0])
