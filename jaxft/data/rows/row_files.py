"""Read the rows of a file in chunks, which processes can read independently of one another.

A chunk is a range of lines of a text file, a range of rows of a Parquet file or a table, or a list of rows in
memory. Every row has a name such as `file.jsonl:17`, which errors, `jaxft inspect` and the record of a
non-finite step show.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.data.rows import row_parquet
from jaxft.data.rows.invalid_rows import LINE_BYTES, InvalidRow, attempt, json_type

ROW_CHUNK_BYTES = 2 << 20  # of lines of text
CHUNK_ROWS = row_parquet.BATCH_ROWS
_AGAIN = "download it again"  # a damaged file
KEYS_OF_ROWS = ("data", "rows", "train", "examples")  # keys of lists of rows in files of one object
DUPLICATE_KEY = "duplicate key"  # the reason of an invalid row
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A row of a dataset: its name, FILE:LINE, and its columns."""

    name: str
    fields: dict[str, Any]

    def invalid(self, reason: str, problem: str) -> InvalidRow:
        """Return an InvalidRow with this row's name, for the caller to raise."""
        return InvalidRow(self.name, reason, problem)


Outcome = Row | InvalidRow


class NotRead(Enum):
    """The value, in every row, of a Parquet file's columns that are not read."""

    NOT_READ = "(not read)"


NOT_READ = NotRead.NOT_READ


# ---- chunks


@dataclass(frozen=True)
class Chunk:
    """Rows that one process reads independently of others.

    label: the prefix of the names of its rows, or the folder of several files. size: number of rows,
    unreadable rows included. read: a module's function, or a partial of one, so that it can be pickled.
    """

    label: str
    size: int
    read: Callable[[], Iterable[Outcome]]

    def rows(self) -> Iterator[Outcome]:
        """Read the rows."""
        return iter(self.read())

    def first(self, count: int) -> "Chunk":
        """Return the first `count` rows of the chunk."""
        return Chunk(self.label, count, partial(_first, self, count))

    def sample(self, before: int, total: int, count: int) -> "Chunk":
        """Return the rows of the chunk that are in a sample: `count` rows at even distances of all `total`
        rows. before: how many of all rows precede the chunk.
        """
        return Chunk(self.label, count * self.size // total, partial(_spread, self, before, total, count))


Blocks = Callable[[bytes], object]  # receives the file's bytes, block by block


def _first(chunk: Chunk, count: int) -> Iterator[Outcome]:
    return islice(chunk.rows(), count)


def _spread(chunk: Chunk, before: int, total: int, count: int) -> Iterator[Outcome]:
    for number, row in enumerate(chunk.rows(), before):
        if number * count // total < (number + 1) * count // total:
            yield row


def loaded(rows: Sequence[Outcome], label: str) -> Chunk:
    """Wrap rows that are already in memory as a Chunk."""
    return Chunk(label, len(rows), partial(iter, tuple(rows)))


def in_windows(rows: Iterable[Outcome], label: str) -> Iterator[Chunk]:
    """Yield chunks in memory, each of at most CHUNK_ROWS rows and about ROW_CHUNK_BYTES of text."""
    window: list[Outcome] = []
    size = 0
    for row in rows:
        window.append(row)
        size += sum(len(x) for x in row.fields.values() if isinstance(x, str)) if isinstance(row, Row) else 0
        if len(window) == CHUNK_ROWS or size > ROW_CHUNK_BYTES:
            yield loaded(window, label)
            window, size = [], 0
    if window:
        yield loaded(window, label)


def spread_chunks(chunks: Sequence[Chunk], count: int, least: int) -> list[Chunk]:
    """Sample `count` rows at even distances, from at least `least` evenly spaced chunks."""
    rows = sum(chunk.size for chunk in chunks)
    parts = min(len(chunks), max(least, -(-len(chunks) * count // rows)))
    chosen = [chunks[i * len(chunks) // parts] for i in range(parts)]
    ends = list(accumulate(chunk.size for chunk in chosen))
    total = ends[-1]
    befores = [0, *ends[:-1]]
    return [c.sample(before, total, min(count, total)) for c, before in zip(chosen, befores, strict=True)]


def spread_rows(
    chunks: Iterable[Chunk], count: int, report: Callable[[int], object]
) -> tuple[list[Outcome], int]:
    """Read all rows and return at most `count` of them, at even distances, and the number of all.

    report: called with the number of further rows that are read.
    """
    kept, every, total = list[Outcome](), 1, 0
    for chunk in chunks:
        before = total
        for row in chunk.rows():
            if total % every == 0:
                kept.append(row)
            total += 1
            if len(kept) == 2 * count:
                kept, every = kept[::2], 2 * every
        report(total - before)
    most = min(count, len(kept))
    return [kept[i * len(kept) // most] for i in range(most)], total


def first_chunks(chunks: Iterable[Chunk], most: int) -> Iterator[Chunk]:
    """Yield chunks of the first `most` rows."""
    for chunk in chunks:
        if chunk.size > most:
            yield chunk.first(most)
            return
        yield chunk
        most -= chunk.size
        if not most:
            return


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the file's name to the errors of the body about reading and decoding it."""
    try:
        yield
    except UnicodeDecodeError as error:
        problem = f"not {error.encoding} text ({error.reason})"
        raise ValueError(f"{path}: {problem}; convert the file to UTF-8") from error
    except PermissionError as error:
        raise PermissionError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# ---- JSON


class _DuplicateKey(Exception):
    """A JSON object has a key twice, of which json.loads would drop the first."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        raise _DuplicateKey(next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1))
    return merged


def _parse(text: bytes, name: str, line: int = 1, encoding: str | None = None) -> Any:
    """Parse JSON. name: the row in errors. line: number of the text's first line. encoding: None to detect
    UTF-16 and UTF-32, whose lines cannot be parsed one by one. Raises InvalidRow.
    """
    try:
        decoded = text if encoding is None else text.decode(encoding)
        return json.loads(decoded, object_pairs_hook=_unique)
    except _DuplicateKey as error:
        problem = f"an object has the key {str(error)[:60]!r} twice; remove one of them"
        raise InvalidRow(name, DUPLICATE_KEY, problem) from error
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8"
        raise InvalidRow(name, "not UTF-8", problem) from error
    except (ValueError, RecursionError) as error:
        problem, remedy = "a number has thousands of digits", "fix or remove it"
        if isinstance(error, RecursionError):
            problem = "nested too deeply"
        if isinstance(error, json.JSONDecodeError):
            name = name if error.lineno == 1 else f"{name.rpartition(':')[0]}:{line + error.lineno - 1}"
            near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
            problem = f"{error.msg.removesuffix(' at')} at column {error.colno}, near {near!r}"
            if error.doc.strip() in ("{", "["):  # the first line of indented JSON
                remedy = "a .jsonl file has one object per line; if this is one document, name the file .json"
        raise InvalidRow(name, "malformed JSON", f"malformed JSON, {problem}; {remedy}") from error


def row_of(value: Any, where: str, name: str) -> Row:
    """Return the columns `value` as a row. Raises InvalidRow if it is no object or all columns are empty.

    where: the row's name in errors, with the folder of its file.
    """
    if not isinstance(value, dict):
        problem = f"the row is {json_type(value)}; use an object with named columns"
        raise InvalidRow(where, "not an object", problem)
    if not any(v not in (None, "", [], {}) for v in value.values()):
        raise InvalidRow(where, "empty row", "the row is empty; fill or remove it")
    return Row(name, value)


def scan_lines(path: Path, report: Blocks) -> tuple[Chunk, ...]:
    """Read a JSONL file once and divide it into chunks of about ROW_CHUNK_BYTES. report: receives its bytes.

    Blank lines at its end are in no chunk.
    """
    starts = [(0, 1)]  # byte and number of the first line of each chunk
    at = lines = end = rows = 0  # rows: lines up to byte `end`
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            report(block)
            text = block if at else block.removeprefix(_BOM)
            if text.strip():
                end = at + len(block.rstrip())
                rows = 1 + lines + block.count(b"\n", 0, end - at)
            while (line_end := block.find(b"\n", max(0, starts[-1][0] + ROW_CHUNK_BYTES - at))) >= 0:
                starts.append((at + line_end + 1, 1 + lines + block.count(b"\n", 0, line_end + 1)))
            at, lines = at + len(block), lines + block.count(b"\n")
    bounds = zip(starts, [*starts[1:], (at, rows + 1)], strict=True)
    return tuple(
        Chunk(path.name, min(after, rows + 1) - line, partial(_read_lines, path, start, min(stop, end), line))
        for (start, line), (stop, after) in bounds
        if start < end
    )


def _read_lines(path: Path, start: int, stop: int, first: int) -> Iterator[Outcome]:
    """Read the lines from byte `start` to before byte `stop`. first: the number of the first one."""
    with named_errors(path), path.open("rb") as file:
        file.seek(start)
        number, at = first - 1, start
        while at < stop:
            line = file.readline(LINE_BYTES + 1)
            number, at = number + 1, at + len(line)
            if len(line) > LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES)
                at = file.tell()
                problem = f"the line has more than {LINE_BYTES >> 20} MiB; split or remove the row"
                yield InvalidRow(f"{path}:{number}", "too large", problem)
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield attempt(_line, path, number, line.rstrip())
            else:  # editors leave blank lines at the end; elsewhere they are errors
                problem = "the row is empty (a blank line between rows); remove it"
                yield InvalidRow(f"{path}:{number}", "empty row", problem)


def read_wide_lines(path: Path, encoding: str) -> Iterator[Outcome]:
    """Read the rows of a JSONL file in UTF-16 or UTF-32."""
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), ""), 1):
            if len(line) > LINE_BYTES:
                raise ValueError(
                    f"{path}:{number}: the line has more than {LINE_BYTES >> 20} MiB; convert the file "
                    "to UTF-8, or split the row"
                )
            if line.strip():
                yield attempt(_line, path, number, line.rstrip().encode("utf-8", "surrogatepass"))


def _line(path: Path, number: int, text: bytes) -> Row:
    where = f"{path}:{number}"
    return row_of(_parse(text, where, encoding="utf-8"), where, f"{path.name}:{number}")


def has_json_lines(path: Path) -> bool:
    """Whether a .json file begins with an object on a line and has further lines, as in many hub datasets."""
    with path.open("rb") as file:
        first = file.readline(LINE_BYTES).removeprefix(_BOM)
        if first.lstrip()[:1] != b"{" or not file.read(1 << 20).strip():
            return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def read_json(path: Path) -> Iterator[Outcome]:
    """Read the rows of a JSON file: a list of objects, one object, or lines of objects."""
    text = path.read_bytes().removeprefix(_BOM)
    try:
        value = _parse(text, f"{path}:1")
    except InvalidRow as error:
        if text.lstrip()[:1] != b"{" or error.reason == DUPLICATE_KEY:
            raise
        yield from chain.from_iterable(chunk.rows() for chunk in scan_lines(path, len))
        return
    if isinstance(value, dict) and (key := _key_of_rows(value)):
        problem = f"the rows are in the list {key!r} of one object; write this list alone to the file"
        yield InvalidRow(f"{path}:1", "rows in an object", problem)
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield attempt(row_of, item, f"{path}:{number}", f"{path.name}:{number}")


def _key_of_rows(value: dict[str, Any]) -> str | None:
    """Return the key of the list of rows in a file that is one object, None without such a list."""
    lists = (key for key in KEYS_OF_ROWS if isinstance(value.get(key), list) and value[key])
    return next((key for key in lists if all(isinstance(row, dict) for row in value[key])), None)


# ---- Parquet


def scan_groups(path: Path, used: tuple[str, ...] | None = None) -> tuple[list[Chunk], int]:
    """Divide a Parquet file into chunks of at most CHUNK_ROWS rows. Return the chunks, and how many bytes the
    columns that are read take unpacked.

    used: names of these columns, None for all. Raises ValueError for an unreadable file and for a row group
    beyond the memory limits of row_parquet.plan_group, OSError if the file cannot be opened.
    """
    before, chunks, unpacked = 0, list[Chunk](), 0
    with named_errors(path), row_parquet.open_parquet(path, str(path), _AGAIN) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            plan = row_parquet.plan_group(file, path, group, used, str(path))
            size = min(CHUNK_ROWS, plan.chunk)
            for start in range(0, count, size):
                stop = min(start + size, count)
                read = partial(_read_group, path, group, plan, range(start, stop), before)
                chunks.append(Chunk(path.name, stop - start, read))
            before, unpacked = before + count, unpacked + (plan.size if count else 0)
    return chunks, unpacked


def _read_group(
    path: Path, group: int, plan: row_parquet.GroupPlan, rows: range, before: int
) -> Iterator[Outcome]:
    """Read the rows `rows` of a row group. before: number of rows in the groups before it."""
    at, number = 0, before + rows.start  # of rows before the next
    with named_errors(path), row_parquet.open_parquet(path, str(path), _AGAIN) as file:
        for batch in row_parquet.planned_batches(file, path, group, plan):
            if at >= rows.stop:
                return
            part = batch.slice(max(0, rows.start - at), rows.stop - max(at, rows.start))
            at += batch.num_rows
            yield from rows_of_batch(part, plan.others, str(path), path.name, number)
            number += part.num_rows


def rows_of_batch(
    batch: Any, others: Collection[str], where: str, label: str, before: int
) -> Iterator[Outcome]:
    """Yield the rows of an Arrow record batch.

    others: columns that it lacks because they are not read. where: the file as errors name it. label: the
    prefix of the rows' names. before: number of the file's rows before this batch.
    """
    if row_parquet.batch_bytes(batch) > LINE_BYTES:
        half = batch.num_rows // 2
        if half:
            yield from rows_of_batch(batch.slice(0, half), others, where, label, before)
            yield from rows_of_batch(batch.slice(half), others, where, label, before + half)
        else:
            problem = f"the row takes more than {LINE_BYTES >> 20} MiB; split or remove it"
            yield InvalidRow(f"{where}:{before + 1}", "too large", problem)
        return
    try:
        items: Iterable[Any] = row_parquet.batch_rows(batch)
    except (ValueError, OverflowError):  # a time beyond the year 9999, or text that is not UTF-8
        items = (attempt(_table_row, batch, i, f"{where}:{before + i + 1}") for i in range(batch.num_rows))
    not_read = dict.fromkeys(others, NOT_READ)
    for number, item in enumerate(items, before + 1):
        if not isinstance(item, InvalidRow):
            item = without_added_nulls(item)
            item.update(not_read)
            item = attempt(row_of, item, f"{where}:{number}", f"{label}:{number}")
        yield item


def _table_row(table: Any, index: int, where: str) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        problem = f"a value cannot be read ({str(error).splitlines()[0]}); fix or remove it"
        raise InvalidRow(where, "unreadable value", problem) from error


def read_table(table: Any, rows: range, where: str, label: str) -> Iterator[Outcome]:
    """Read rows of a table of the package datasets. where: its name in errors. label: the prefix of the rows'
    names.
    """
    items = table.select(rows)
    for number, item in enumerate(map(without_added_nulls, items), rows.start + 1):
        yield attempt(row_of, item, f"{where}:{number}", f"{label}:{number}")


def without_added_nulls(item: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table without nulls in nested objects: Arrow adds them for keys that other rows have.

    Columns that are null remain.
    """
    return {column: _without_nulls(value) for column, value in item.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value
