"""Read the rows of a CSV file; a malformed record makes one row invalid."""

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxft.data.invalid import InvalidRow, attempt
from jaxft.data.limits import LINE_BYTES
from jaxft.data.row_files import Outcome, row_of

MALFORMED_CSV = "malformed CSV"


def read_csv(path: Path) -> Iterator[Outcome]:
    """Read the rows of a CSV file."""
    csv.field_size_limit(LINE_BYTES)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        records = _csv_records(path, file)
        _, header = next(records, (1, []))
        if isinstance(header, InvalidRow):
            raise ValueError(str(header)) from header
        if not header:
            raise ValueError(f"{path}:1: the file has no header; begin it with a line of column names")
        if len(header) == 1 and any(separator in header[0] for separator in ";\t|"):
            raise ValueError(
                f"{path}:1: the header is a single column, {header[0]!r}; separate the columns with commas"
            )
        if len(set(header)) < len(header):
            raise ValueError(f"{path}:1: the header {header} repeats a column name; rename one of them")
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
                yield attempt(row_of, fields, where, f"{path.name}:{line}")


def _csv_records(path: Path, file: TextIO) -> Iterator[tuple[int, list[str] | InvalidRow]]:
    """Yield (first line, fields or InvalidRow) of each record of a CSV file.

    A record with a wrong quote may have swallowed others, so reading continues at its second line.
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
