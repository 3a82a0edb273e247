"""Read rows from JSONL, JSON, CSV, Parquet, a folder of those, or a dataset of the Hugging Face hub.

Local text files need nothing but the standard library; pyarrow and datasets are imported where they are used. Every row keeps
the name of its place, `file.jsonl:17`, for messages, for the inspector and for the list of rows of a bad step.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
REPOSITORY = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """One row: where it stands and its columns."""

    name: str
    fields: dict[str, Any]


def resolve(ref: str) -> Path | None:
    """The file or folder that `ref` names: under the working directory, else under the repository; None if neither has it."""
    candidates = [Path(ref).expanduser()]
    if not candidates[0].is_absolute():
        candidates.append(REPOSITORY / ref)
    return next((path for path in candidates if path.exists()), None)


def read_rows(ref: str) -> list[Row]:
    """All rows of `ref`: a file, a folder (its files in order of name) or `org/name[/config][:split]` on the hub.

    Raises FileNotFoundError where nothing is found and ValueError, naming file and line, where a row can't be read.
    """
    path = resolve(ref)
    if path is not None:
        rows = [row for file in _files(path) for row in _read_file(file)]
    elif Path(ref).suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}(:[^/\s]+)?", ref):
        rows = list(_read_hub(ref))
    else:
        raise FileNotFoundError(
            f"data {ref!r} not found in {Path.cwd()} or {REPOSITORY}; "
            f"give a file ({', '.join(SUFFIXES)}), a folder of such files, or a hub dataset as org/name[/config][:split]"
        )
    if not rows:
        raise ValueError(f"{ref}: found no rows; wanted at least one")
    return rows


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(
        p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith((".", "dataset_info"))
    )
    if not files:
        raise FileNotFoundError(
            f"{path}: the folder has no data files; wanted {', '.join('*' + s for s in SUFFIXES)}"
        )
    return files


def _read_file(path: Path) -> Iterator[Row]:
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
                raise ValueError(
                    f"{path}: unknown kind of file {suffix!r}; wanted one of {', '.join(SUFFIXES)}"
                )
    except PermissionError as error:
        raise PermissionError(
            f"{path}: may not be read ({error.strerror}); change its permissions"
        ) from error


def _parse(text: bytes, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = name if error.lineno == 1 else f"{name.rpartition(':')[0]}:{line + error.lineno - 1}"
        shown = text[max(0, error.pos - 20) : error.pos + 20].decode(errors="replace").strip()
        raise ValueError(
            f"{where}: malformed JSON, {error.msg} at column {error.colno}, near {shown!r}; fix or remove it"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{name}: malformed JSON, nested too deeply to be read; fix or remove it") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{name}: malformed JSON, {error}; fix or remove it") from error


def _row(value: Any, place: str, name: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: found a {type(value).__name__}, wanted an object with named columns")
    if not any(v not in (None, "", [], {}) for v in value.values()):
        raise ValueError(f"{place}: the row is empty; fill or remove it")
    return Row(name, value)


def _read_lines(path: Path) -> Iterator[Row]:
    blank = 0  # blank lines are fine at the end only, where an editor leaves them
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise ValueError(f"{path}:{blank}: the row is empty (a blank line between rows); remove it")
            yield _row(_parse(line.rstrip(), f"{path}:{number}"), f"{path}:{number}", f"{path.name}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"{":  # JSON lines under the name .json, as the hub has many
        try:
            value = json.loads(text)
        except ValueError:
            yield from _read_lines(path)
            return
    else:
        value = _parse(text, f"{path}:1")
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        yield _row(item, f"{path}:{number}", f"{path.name}:{number}")


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise ValueError(f"{path}:1: found the header {header}, wanted distinct column names")
            line = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    raise ValueError(
                        f"{path}:{line}: found {len(values)} fields, wanted {len(header)} ({', '.join(header)})"
                    )
                yield _row(dict(zip(header, values, strict=False)), f"{path}:{line}", f"{path.name}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: malformed CSV, {error}; fix the quoting") from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{line}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
            ) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow; `pip install datasets` brings it") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise ValueError(
            f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    for number, item in enumerate(table.to_pylist(), 1):
        yield _row(item, f"{path}:{number}", f"{path.name}:{number}")


def _read_hub(ref: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data {ref!r} is no local file; a hub dataset needs `pip install datasets`"
        ) from error
    place, _, split = ref.partition(":")
    org, name, *config = place.split("/")
    split = split or "train"
    try:
        data = datasets.load_dataset(f"{org}/{name}", *config, split=split)
    except Exception as error:  # its errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data {ref!r} is no local file, and the hub did not give it ({reason}); wanted org/name[/config][:split]"
        ) from error
    for number, item in enumerate(data, 1):
        yield _row(item, f"{place}:{split}:{number}", f"{name}:{split}:{number}")
