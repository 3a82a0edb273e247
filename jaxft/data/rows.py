"""Read rows from JSONL, JSON, CSV, Parquet, a folder of those, or a dataset of the Hugging Face hub.

Local text files need nothing but the standard library; pyarrow and datasets are imported where they are used.
Every row has a name such as `file.jsonl:17`, which errors, the inspector and the report of a non-finite step
print.
"""

import csv
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jaxft.data.invalid import InvalidRow, InvalidRows, attempt
from jaxft.data.limits import LINE_BYTES
from jaxft.data.shipped import ROOT

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MALFORMED_CSV = "malformed CSV"


class Row(NamedTuple):
    """A row of a dataset: its name, FILE:LINE, and its columns."""

    name: str
    fields: dict[str, Any]


def find_data(ref: str) -> Path | None:
    """Return the file or folder `ref` under the working directory, else in ROOT, None if neither has it."""
    candidates = [Path(ref).expanduser()]
    if not candidates[0].is_absolute():
        candidates.append(ROOT / ref)
    return next((path for path in candidates if path.exists()), None)


def read_rows(ref: str, invalid: InvalidRows | None = None) -> list[Row]:
    """Return all rows of a file, a folder (its files by name) or `org/name[/config][:split]` on the hub.

    invalid: receives the rows that cannot be read; without it the first of them is raised as InvalidRow,
    which names file and line. Raises FileNotFoundError if `ref` is none of these, and ValueError if a file
    cannot be read or too many rows cannot.
    """
    rows: list[Row] = []
    for row in _read(ref):
        if isinstance(row, Row):
            rows.append(row)
        elif invalid is None:
            raise row
        else:
            invalid.add(row)
    if invalid is not None:
        invalid.check(ref, len(rows) + len(invalid.found))
    if not rows:
        raise ValueError(f"{ref}: the dataset has no rows; add at least one")
    return rows


def _read(ref: str) -> Iterator[Row | InvalidRow]:
    if not ref.strip():
        raise ValueError("data is empty; name a file, a folder or a hub dataset")
    path = find_data(ref)
    if path is not None:
        for file in _files(path):
            yield from _read_file(file)
    elif Path(ref).suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}(:[^/\s]+)?", ref):
        yield from _read_hub(ref)
    else:
        raise FileNotFoundError(
            f"data {ref!r} not found in {Path.cwd()} or {ROOT}; use a file ({', '.join(SUFFIXES)}), a "
            "folder of such files, or a hub dataset org/name[/config][:split]"
        )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [_regular(path)]
    files = sorted(
        p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith((".", "dataset_info"))
    )
    if not files:
        raise FileNotFoundError(
            f"{path}: the folder has no data files; add {' or '.join('*' + s for s in SUFFIXES)}"
        )
    return [_regular(file) for file in files]


def _regular(path: Path) -> Path:
    """Return the path of a file. Raises ValueError for a pipe or a device, which may never end."""
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; copy the rows into one")
    return path


def _read_file(path: Path) -> Iterator[Row | InvalidRow]:
    try:
        match path.suffix:
            case ".jsonl":
                yield from _read_lines(path)
            case ".json":
                yield from _read_json(path)
            case ".csv":
                yield from _read_csv(path)
            case ".parquet":
                yield from _read_parquet(path)
            case suffix:
                raise ValueError(f"{path}: unknown file type {suffix!r}; use one of {', '.join(SUFFIXES)}")
    except PermissionError as error:
        raise PermissionError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    except OSError as error:
        if error.filename or not error.strerror:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _parse(text: bytes, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = name if error.lineno == 1 else f"{name.rpartition(':')[0]}:{line + error.lineno - 1}"
        near = text[max(0, error.pos - 20) : error.pos + 20].decode(errors="replace").strip()
        raise InvalidRow(
            where,
            "malformed JSON",
            f"malformed JSON, {error.msg} at column {error.colno}, near {near!r}; fix or remove it",
        ) from error
    except RecursionError as error:
        raise InvalidRow(
            name, "malformed JSON", "malformed JSON, nested too deeply; fix or remove it"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRow(
            name,
            "not UTF-8",
            f"not UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8",
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise InvalidRow(name, "malformed JSON", f"malformed JSON, {error}; fix or remove it") from error


def _row(value: Any, where: str, name: str) -> Row:
    if not isinstance(value, dict):
        raise InvalidRow(
            where, "not an object", f"the row is a {type(value).__name__}; use an object with named columns"
        )
    if not any(v not in (None, "", [], {}) for v in value.values()):
        raise InvalidRow(where, "empty row", "the row is empty; fill or remove it")
    return Row(name, value)


def _line(path: Path, number: int, text: bytes) -> Row:
    where = f"{path}:{number}"
    return _row(_parse(text, where), where, f"{path.name}:{number}")


def _read_lines(path: Path) -> Iterator[Row | InvalidRow]:
    blank: list[int] = []  # editors leave blank lines at the end; elsewhere they are errors
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
            if len(line) > LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES)
                problem = f"the line has more than {LINE_BYTES >> 20} MiB; split or remove the row"
                yield InvalidRow(f"{path}:{number}", "too large", problem)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                blank.append(number)
                continue
            for at in blank:
                problem = "the row is empty (a blank line between rows); remove it"
                yield InvalidRow(f"{path}:{at}", "empty row", problem)
            blank = []
            yield attempt(_line, path, number, line.rstrip())


def _read_json(path: Path) -> Iterator[Row | InvalidRow]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"{":  # JSON lines in a .json file, as in many hub datasets
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            yield from _read_lines(path)
            return
    else:
        value = _parse(text, f"{path}:1")
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield attempt(_row, item, f"{path}:{number}", f"{path.name}:{number}")


def _read_csv(path: Path) -> Iterator[Row | InvalidRow]:
    csv.field_size_limit(LINE_BYTES)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        records = _csv_records(path, file)
        _, header = next(records, (1, []))
        if isinstance(header, InvalidRow):
            raise ValueError(str(header)) from header
        if not header or len(set(header)) < len(header):
            raise ValueError(f"{path}:1: the header {header} repeats or lacks a column name; rename them")
        for line, values in records:
            where = f"{path}:{line}"
            if isinstance(values, InvalidRow):
                if len(header) == 1 and values.reason == MALFORMED_CSV:
                    # any line would pass for a row of one column, so that none can be trusted from here on
                    raise ValueError(f"{values}; in a file of one column the next row cannot be found")
                yield values
            elif values and len(values) != len(header):
                problem = f"{len(values)} fields do not fit the {len(header)} columns ({', '.join(header)})"
                yield InvalidRow(where, "wrong number of fields", f"{problem}; fix the row")
            else:
                fields = dict(zip(header, values, strict=False))
                yield attempt(_row, fields, where, f"{path.name}:{line}")


def _csv_records(path: Path, file: TextIO) -> Iterator[tuple[int, list[str] | InvalidRow]]:
    """Yield (first line, fields) of each record of a CSV file, or what is wrong with it.

    After a record with a wrong quote, which may have swallowed others, reading continues at its second line.
    """
    again: deque[str] = deque()
    taken: list[str] = []

    def lines() -> Iterator[str]:
        while text := again.popleft() if again else file.readline(LINE_BYTES + 1):
            taken.append(text)
            if len(text) > LINE_BYTES:
                while text and not text.endswith(("\n", "\r")):
                    text = file.readline(LINE_BYTES)
                raise csv.Error(f"the line has more than {LINE_BYTES >> 20} MiB")
            yield text

    line = 1
    while True:
        taken.clear()
        try:
            values: list[str] | InvalidRow = next(csv.reader(lines(), strict=True))
            "".join(taken).encode("utf-8", "surrogateescape").decode()
            yield line, values
            line += len(taken)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text ({error.reason} at byte {error.start} of the row)"
            yield line, InvalidRow(f"{path}:{line}", "not UTF-8", f"{problem}; convert the file to UTF-8")
            line += len(taken)
        except csv.Error as error:
            text = "a quote is never closed" if "end of data" in str(error) else str(error)
            problem = f"malformed CSV, {text}; fix the quoting or remove the row"
            yield line, InvalidRow(f"{path}:{line}", MALFORMED_CSV, problem)
            again.extendleft(reversed(taken[1:]))
            line += 1


def _read_parquet(path: Path) -> Iterator[Row | InvalidRow]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; run `pip install datasets`") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise ValueError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); download it again"
        ) from error
    try:
        items: Iterable[Any] = table.to_pylist()
    except (ValueError, OverflowError):  # a time beyond the year 9999, or text that is not UTF-8
        items = (attempt(_table_row, table, i, f"{path}:{i + 1}") for i in range(table.num_rows))
    for number, item in enumerate(items, 1):
        if isinstance(item, InvalidRow):
            yield item
        else:
            item = without_added_nulls(item)
            yield attempt(_row, item, f"{path}:{number}", f"{path.name}:{number}")


def _table_row(table: Any, index: int, where: str) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        problem = f"a value cannot be read ({str(error).splitlines()[0]}); fix or remove it"
        raise InvalidRow(where, "unreadable value", problem) from error


def _read_hub(ref: str) -> Iterator[Row | InvalidRow]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data {ref!r} is not a local file, and hub datasets need the package datasets; run `pip install "
            "datasets`"
        ) from error
    dataset, _, split = ref.partition(":")
    org, name, *config = dataset.split("/")
    split = split or "train"
    try:
        data = datasets.load_dataset(f"{org}/{name}", *config, split=split)
    except Exception as error:  # its errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data {ref!r} is not a local file and cannot be loaded from the hub ({reason}); use "
            "org/name[/config][:split]"
        ) from error
    for number, item in enumerate(map(without_added_nulls, data), 1):
        yield attempt(_row, item, f"{dataset}:{split}:{number}", f"{name}:{split}:{number}")


def hub_dataset(ref: str) -> str | None:
    """Return the `org/name` of rows that are a dataset on the hub, None for files."""
    named = re.match(r"[\w-][\w.-]*/[\w.-]+(?=[/:]|$)", ref)
    return named[0] if named and find_data(ref) is None and Path(ref).suffix not in SUFFIXES else None


def without_added_nulls(item: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table without the nulls that Arrow gives nested objects for keys of other rows.

    Columns keep their nulls.
    """
    return {column: _without_nulls(value) for column, value in item.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value
