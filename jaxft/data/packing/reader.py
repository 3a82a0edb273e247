"""Read a dataset as token ids: a Reader tokenises it chunk by chunk into a cache file, in this process or in
several.

Worker processes are started by `spawn`, because a process that has started JAX has threads, and a fork may
copy their locks while they are locked. Workers do not import JAX. Each has a copy of the Reader, reads its
chunks from the files and returns their columns, which this process writes in the order of the rows, so the
file is the same for any number of workers.
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
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jaxft.data.chat import loss_mask
from jaxft.data.chat.template import Template, template_of
from jaxft.data.decisions import DECISION, labels_as_choices
from jaxft.data.packing import row_cache
from jaxft.data.packing.row_cache import ChunkColumns, ColumnTypes, StoredFacts
from jaxft.data.packing.tokenised import OF_CONTENT, TokenisedRows, column_types, stored_columns
from jaxft.data.progress import RowProgress
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import format_choice
from jaxft.data.rows.conversation import PLAIN, other_columns
from jaxft.data.rows.dataset_rows import Listing, check_rows, list_chunks, sampled
from jaxft.data.rows.example import Chat, ParsedRow, has_placeholder
from jaxft.data.rows.format_choice import ChosenFormat, ColumnCounts, Formats, parse_rows
from jaxft.data.rows.formats import formats_of
from jaxft.data.rows.invalid_rows import InvalidRow, InvalidRows, Tally, valid
from jaxft.data.rows.row_files import ROW_CHUNK_BYTES, Chunk, Row, loaded
from jaxft.distributed.threads import cores

MapChunks = Callable[[Callable[..., Any], Iterable[Chunk]], Iterator[Any]]
SMALL_DATASET = 8  # chunks; up to here one process is faster, because further ones take time to start


class TokenisedRow(NamedTuple):
    """An example: the tokens and the loss mask of its prompt and of each continuation, one after the other.

    counts: tokens of each of these pieces, 0 for a missing response. truncated, responses, learned_responses,
    extras: see TokenisedRows. piece: index of the example within its row.
    """

    ids: np.ndarray
    learned: np.ndarray
    counts: Sequence[int]
    truncated: bool
    responses: int
    learned_responses: int
    extras: dict[str, Any]
    piece: int = 0


ParsedRows = Iterator[ParsedRow | InvalidRow]
CutRows = Iterator[list[TokenisedRow] | InvalidRow]
CheckChats = Callable[[Sequence[Chat], Template], tuple[str, ...]]


class RowTask(NamedTuple):
    """The purpose of reading rows, such as SFT: one object for each kind of data.

    name: `task` of its formats in formats.ROW_FORMATS; a task without formats reads each row by itself, with
    any columns. version: to be increased when the same rows become other tokens. Name and version are part of
    the cache key. limit: the setting that limits the tokens of a row. tokenise(rows, reader) yields the
    examples of each row, [] if it is too long. extras(settings): the types of further columns of examples.
    parse(format, rows, settings, task) yields the prompt and responses of each row. Both yield an InvalidRow
    for an invalid row. checks: functions that return warnings about the first conversations, given these and
    the chat template.
    """

    name: str
    version: int
    limit: str
    tokenise: Callable[[Sequence[ParsedRow], "Reader"], CutRows]
    extras: Callable[[RowSettings], ColumnTypes]
    parse: Callable[[ChosenFormat, Iterable[Row], RowSettings, str], ParsedRows] = parse_rows
    checks: tuple[CheckChats, ...] = (loss_mask.tools_warnings, loss_mask.content_warnings)


@dataclass(frozen=True)
class Tokenising:
    """Settings of tokenisation on this machine, such as workers and cache; a row's tokens don't depend on
    them.

    cache: the folder of the cache, None for the default. invalid_limit, names_first: see InvalidRows.
    workers: processes; None for one per CPU, or this process alone for a small dataset. progress: whether to
    print the progress of a long tokenisation. sample: tokenise this many rows of a larger dataset, at even
    distances; None for all. only: the name of a row, FILE:LINE, that is tokenised alone.
    """

    cache: Path | None = None
    invalid_limit: float | None = None
    workers: int | None = None
    progress: bool = False
    names_first: bool = False
    sample: int | None = None
    only: str | None = None

    def invalid_rows(self) -> InvalidRows:
        """Return a counter of a dataset's invalid rows."""
        return InvalidRows(self.invalid_limit, self.names_first)


@dataclass(frozen=True)
class Reader:
    """Everything that decides how a dataset becomes token ids. Worker processes get a copy."""

    task: RowTask
    tokenizer: Any
    settings: RowSettings
    how: Tokenising = field(default_factory=Tokenising)

    def read(self, ref: str) -> TokenisedRows:
        """Read the rows of a dataset (see dataset_rows.read_rows) and tokenise them, or load the tokens from
        the cache.

        Raises ValueError if more rows are invalid than how.invalid_limit allows, if all rows are too long,
        and if the dataset has no rows; OSError for files that cannot be read.
        """
        settings, how = self.settings, self.how
        listing = list_chunks(ref, self.used, settings.sample_by).first(settings.max_samples)
        listing = listing if how.only is None else listing.only(how.only)
        content = (listing.digest, listing.labels, *([] if how.sample is None else [how.sample]))
        version, extras = (self.task.name, self.task.version), self.task.extras(settings)
        key = row_cache.content_key(content, self.tokenizer, version, astuple(settings))
        stored, state = row_cache.load_or_make(
            row_cache.row_cache_folder(how.cache) / f"{key}.rows",
            column_types(len(settings.kinds), extras),
            partial(_tokenise, ref, listing, self),
        )
        facts, invalid = stored.facts, how.invalid_rows()
        format = ChosenFormat.of(facts["format"])
        invalid.merge(_tallies(facts["invalid"], listing.folder))
        read = facts["total"] + facts["unreadable"]
        invalid.check(ref, read)
        dropped = read - invalid.total - facts["left"]
        if not facts["left"]:
            name, why = self.task.limit, "prompts have more tokens than"
            if name == "max_length":
                why = "rows were dropped because they are longer than"
            raise ValueError(f"{ref}: all {dropped} {why} data.{name}={settings.max_length}; raise it")
        known = self.formats.get(format.name)
        columns = stored_columns(stored, settings.kinds, extras, listing.labels)
        return TokenisedRows(
            **columns,
            formats=(format.name,),
            labels=format.labels or (settings.labels if known is not None and known.labelled else ()),
            dropped=dropped,
            invalid=invalid.counts(),
            warnings=self._warnings(listing, facts),
            read=read,
            total=read if how.sample is None or read < how.sample else facts["rows"],
            cache=state,
        )

    def otherwise(self, **how: Any) -> "Reader":
        """Return a reader of the same tokens with other values in `how`, such as workers=1."""
        return replace(self, how=replace(self.how, **how))

    @property
    def formats(self) -> Formats:
        """The formats that rows may have, by name; {} for a task without formats."""
        return formats_of(self.task.name, self.settings.numbers, self.settings.unlabelled)

    @property
    def used(self) -> tuple[str, ...] | None:
        """The columns of the dataset that are read, None for all."""
        if not self.formats:
            return None
        theirs = (format_choice.split_column(item)[1] for item in self.settings.columns)
        return tuple(dict.fromkeys([*format_choice.names_in_datasets(self.formats), *theirs]))

    def format_of(self, counts: ColumnCounts, ref: str) -> ChosenFormat:
        """Return the format of a dataset with these columns. ref: the dataset, for errors. Raises ValueError
        if no row fits a format, or the labels of a classifier cannot be choices.
        """
        settings = self.settings
        if not self.formats:
            return ChosenFormat(settings.format)
        chosen = format_choice.choose_format(counts, settings.format, settings.columns, self.formats)
        if settings.labels or not self.formats[chosen.name].labelled:
            return chosen
        return chosen._replace(labels=labels_as_choices(counts.labels, ref))

    def parse(self, rows: Iterable[Row], format: ChosenFormat) -> list[ParsedRow | InvalidRow]:
        """Return each row's prompt and responses, or the error that makes it invalid."""
        return [*self.task.parse(format, rows, self.settings, self.task.name)]

    def _warnings(self, listing: Listing, facts: StoredFacts) -> tuple[str, ...]:
        """Return lines for the start of a run: how the files and their columns were read, and what the chat
        template does to their first rows.
        """
        rows, format = [Row(*row) for row in facts["examples"]], ChosenFormat.of(facts["format"])
        parsed = [row for row in self.parse(rows, format) if isinstance(row, ParsedRow)]
        others = (other_columns(Row(row.name, row.fields), format.name) for row in parsed if row.fields)
        by_other_names = dict.fromkeys(item for columns in others for item in columns.items())
        lines = format._replace(columns=(*format.columns, *by_other_names)).note()
        if format.name in self.formats:
            used = partial(format_choice.unread_columns, format, self.settings.columns, self.formats)
            unread = dict.fromkeys(chain.from_iterable(map(used, rows)))
            lines += [f"columns that are not read: {', '.join(unread)}"] if unread else []
            lines += filter(None, [self.formats[format.name].note(self.settings)])
        notes = [*listing.notes, *(f"{listing.name}: {note}" for note in lines)]
        chats = [x for row in parsed for x in row.examples.values() if isinstance(x, Chat)]
        template = template_of(self.tokenizer, self.settings.template) if chats else None
        checked = () if template is None else (check(chats, template) for check in self.task.checks)
        return (*(f"note: {line}" for line in notes), *chain.from_iterable(checked))


def _tokenise(ref: str, listing: Listing, reader: Reader, add: Callable[[ChunkColumns], None]) -> StoredFacts:
    """Tokenise each chunk, pass its columns to `add`, and return facts about the dataset."""
    all_rows, how = None, reader.how
    if how.sample is not None:
        listing, all_rows = sampled(ref, listing, how.sample, how.progress)
    invalid = how.invalid_rows()
    sources = {x: i for i, x in enumerate(listing.labels)}
    total, unreadable, left, largest, some = 0, 0, 0, 0, list[Row]()
    with start_workers(worker_count(how.workers, listing.size), reader) as run:
        format, chunks, rows = _format_of(ref, listing, reader, run)
        doing = "tokenising" if how.sample is None else "measuring the lengths of"
        with RowProgress(f"{doing} {listing.name}", rows, how.progress) as progress:
            for done in run(partial(tokenise_chunk, format=format), chunks):
                progress.add(done.rows + done.unreadable)
                invalid.merge(done.invalid)
                total, unreadable = total + done.rows, unreadable + done.unreadable
                invalid.check_begun(ref, total + unreadable, rows)
                left += done.left
                some = first_rows([*some, *done.examples], reader.settings.columns)
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
        "format": format,
        "examples": some,
        "invalid": _portable(invalid.tallies, listing.folder),
    }


def _format_of(
    ref: str, listing: Listing, reader: Reader, run: MapChunks
) -> tuple[ChosenFormat, Iterable[Chunk], int | None]:
    """Return the format of all rows, the chunks to tokenise, and the number of rows if it is known.

    The chunks of a small dataset contain its rows, so that the files are read once.
    """
    settings = reader.settings
    fixed = settings.format not in ("auto", PLAIN, DECISION)  # DECISION: all answers decide their reading
    if fixed and settings.format in reader.formats and reader.formats[settings.format].labelled:
        fixed = bool(settings.labels)
    if not reader.formats or (fixed and listing.size > ROW_CHUNK_BYTES):
        return reader.format_of(ColumnCounts(), ref), listing.chunks(), listing.rows
    invalid, counts, total = reader.how.invalid_rows(), ColumnCounts(), 0
    chunks = list[Chunk]()
    if listing.size <= ROW_CHUNK_BYTES:
        chunks = [loaded([*chunk.rows()], chunk.label) for chunk in listing.chunks()]
    with RowProgress(f"reading {listing.name}", listing.rows, reader.how.progress) as progress:
        for counted in run(count_chunk, chunks or listing.chunks()):
            before = invalid.total
            invalid.merge(counted.invalid)
            counts.merge(counted.columns)
            total += counted.rows
            progress.add(counted.rows + invalid.total - before)
    check_rows(ref, total, invalid.total, invalid)
    return reader.format_of(counts, ref), chunks or listing.chunks(), total + invalid.total


# ---- invalid rows in the cache file


def _portable(tallies: dict[str, Tally], folder: str) -> list[list]:
    """Return tallies as JSON, without the folder of the files: they may be moved."""
    stored, prefix = [], f"{folder}/"
    for reason, (rows, first) in tallies.items():
        kind = "file" if folder and first.name.startswith(prefix) else "row"
        name = first.name.removeprefix(prefix) if kind == "file" else first.name
        stored.append([reason, rows, kind, name, first.problem])
    return stored


def _tallies(stored: list[list], folder: str) -> dict[str, Tally]:
    return {
        reason: Tally(rows, InvalidRow(f"{folder}/{name}" if kind == "file" else name, reason, problem))
        for reason, rows, kind, name, problem in stored
    }


# ---- a chunk, in any process


class CountedChunk(NamedTuple):
    """A chunk after a first pass: the number of its readable rows, their columns, and the unreadable rows."""

    rows: int
    columns: ColumnCounts
    invalid: dict[str, Tally]


class TokenisedChunk(NamedTuple):
    """The result of tokenising a chunk.

    labels: for each example, the file in its row's name. part: the columns of the examples. rows, unreadable:
    numbers of rows that can and cannot be read. left: number of rows that have examples. invalid: invalid
    rows by reason. examples: see first_rows.
    """

    labels: list[str]
    part: ChunkColumns
    rows: int
    unreadable: int
    left: int
    invalid: dict[str, Tally]
    examples: list[Row]


def _read(chunk: Chunk, invalid: InvalidRows) -> list[Row]:
    rows = []
    for row in chunk.rows():
        if isinstance(row, InvalidRow):
            invalid.add(row)
        else:
            rows.append(row)
    return rows


def count_chunk(chunk: Chunk, job: Reader) -> CountedChunk:
    """Count the columns of a chunk's rows."""
    invalid = InvalidRows(job.how.invalid_limit)
    rows = _read(chunk, invalid)
    columns = format_choice.count_columns(rows, job.settings.columns, job.formats)
    return CountedChunk(len(rows), columns, invalid.tallies)


def tokenise_chunk(chunk: Chunk, job: Reader, format: ChosenFormat) -> TokenisedChunk:
    """Read and tokenise a chunk."""
    invalid = InvalidRows(job.how.invalid_limit)
    rows = _read(chunk, invalid)
    unreadable = invalid.total
    parsed, part = job.parse(rows, format), _Columns(job)
    left, labels = list[Row](), list[str]()
    examples = iter(job.task.tokenise([row for row in parsed if isinstance(row, ParsedRow)], job))
    for row, outcome in zip(rows, parsed, strict=True):
        with invalid.skip():
            valid_row, label = valid(outcome), row.name.rpartition(":")[0]
            tokenised = valid(next(examples))
            for example in tokenised:
                part.add(valid_row, example)
                labels.append(label)
            left += [row] if tokenised else []
    some = [] if format.name == "text" else first_rows(left, job.settings.columns)  # it may be long
    return TokenisedChunk(labels, part.arrays(), len(rows), unreadable, len(left), invalid.tallies, some)


class _Columns:
    """Collects the columns of a chunk's examples; see TokenisedRows."""

    def __init__(self, reader: Reader):
        self.tokenizer = reader.tokenizer
        self.types = column_types(len(reader.settings.kinds), reader.task.extras(reader.settings))
        self.values: dict[str, list[Any]] = {name: [] for name in self.types}

    def add(self, row: ParsedRow, example: TokenisedRow) -> None:
        """Add an example of a row."""
        values, extras = self.values, example.extras
        values["ids"].append(example.ids)
        values["learned"].append(example.learned)
        values["counts"] += example.counts
        values["truncated"].append(example.truncated)
        values["responses"].append(example.responses)
        values["learned_responses"].append(example.learned_responses if row.weight else 0)
        values["weights"].append(row.weight)
        values["order"].append(row.order)
        responses = (x for kind, x in row.examples.items() if kind != "rejected")
        values["placeholders"].append(any(map(has_placeholder, responses)))
        values["pieces"].append(example.piece)
        values["number"].append(int(row.name.rpartition(":")[2]))
        for name, value in extras.items():
            values[name].append(value)
            counts = self.types[name].along
            if counts is not None:
                values[counts].append(len(value))

    def arrays(self) -> ChunkColumns:
        """Return all columns but "source"; the collected values are removed."""
        part: ChunkColumns = {}
        further = next((self.values[name] for name in OF_CONTENT if name in self.values), None)
        for name, (dtype, along, width) in self.types.items():
            values = self.values.pop(name)
            if along is not None:
                part[name] = np.concatenate([*values, np.zeros(0, dtype)])
            elif values or name not in ("source", "hashes", "content", "reads", "ends"):
                part[name] = np.asarray(values, dtype).reshape(*([-1] if width is None else (-1, width)))
        ids, learned, counts = (part[name] for name in ("ids", "learned", "counts"))
        after = np.cumsum(counts).reshape(counts.shape)
        part |= _hashes(ids, learned, after, further)
        if "reads" in self.types:
            sums = np.append(np.int32(0), np.cumsum(learned, dtype=np.int32))[np.append(0, after)]
            part["reads"] = np.diff(sums).reshape(counts.shape)[:, 1:]
            part["ends"] = np.full(part["reads"].shape, -1, np.int32)  # of a missing continuation
            present = counts[:, 1:] > 0
            part["ends"][present] = _last_targets(ids, learned, after[:, 1:][present], self.tokenizer)
        return part


def _hashes(
    ids: np.ndarray, learned: np.ndarray, ends: np.ndarray, further: list[Any] | None
) -> ChunkColumns:
    """Return the hashes of each piece, and of each example's content. ends: where each piece ends in ids.
    further: what is part of each content too, such as the columns that rewards read, or None.
    """
    bounds, size = np.append(0, ends).tolist(), ends.shape[1]
    hashes = (xxhash.xxh3_64_intdigest(ids[start:end].data) for start, end in pairwise(bounds))
    content = np.empty(len(ends), np.uint64)
    for row in range(len(ends)):
        start, after_prompt, end = (bounds[i] for i in (row * size, row * size + 1, (row + 1) * size))
        whole = xxhash.xxh3_64(ids[start:end].data)
        whole.update(learned[after_prompt:end].data)
        whole.update(b"" if further is None else further[row].data)
        content[row] = whole.intdigest()
    return {"hashes": np.fromiter(hashes, np.uint64, ends.size).reshape(ends.shape), "content": content}


def _last_targets(ids: np.ndarray, learned: np.ndarray, ends: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Return the token id of each sequence's last target, skipping at most two targets of whitespace at the
    end. ends: index after the last token of each sequence.
    """
    if not len(ends):
        return np.zeros(0, np.int32)
    targets = np.flatnonzero(learned)
    last = np.searchsorted(targets, ends) - 1
    for _ in range(2):  # the line break with which some templates end turns is a target too
        last_ids = ids[targets[last]]
        blank = [int(i) for i in np.unique(last_ids) if not tokenizer.decode([int(i)]).strip()]
        last = np.maximum(last - np.isin(last_ids, blank), 0)
    return ids[targets[last]]


def first_rows(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return the rows that warnings are derived from: the first row, the first with a system message, and the
    first with tools; a row may occur more than once.

    rows: valid rows. columns: see data.columns.
    """

    def begins(value: Any) -> bool:
        first = value[0] if isinstance(value, list | tuple) and value else None
        return isinstance(first, dict) and "system" in (first.get("role"), first.get("from"))

    tools = dict(map(format_choice.split_column, columns)).get("tools", "tools")
    with_system = (row for row in rows if row.fields.get("system") or any(map(begins, row.fields.values())))
    with_tools = (row for row in rows if row.fields.get(tools))
    return [*rows[:1], *islice(with_system, 1), *islice(with_tools, 1)]


# ---- processes


_job: list[Reader] = []  # of a worker process


def worker_count(setting: int | None, size: int) -> int:
    """Return how many processes tokenise a dataset of `size` bytes. setting: data.workers."""
    if setting is not None:
        return setting
    if size <= SMALL_DATASET * ROW_CHUNK_BYTES:
        return 1
    return cores()


@contextmanager
def start_workers(count: int, job: Reader) -> Iterator[MapChunks]:
    """Yield a function that maps a function over chunks in `count` processes (1: this one) and returns the
    results in order. It calls the mapped function with a chunk and `job`.
    """
    if count == 1:
        yield lambda function, chunks: (function(chunk, job=job) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
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


def _start_worker(job: Reader) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job[:] = [job]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(function: Callable[..., Any], chunk: Chunk) -> Any:
    return function(chunk, job=_job[0])
