"""Read the rows of a CSV or TSV file; a malformed record makes one row invalid."""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

from jaxft.data.rows.invalid import LINE_BYTES, InvalidRow, attempt
from jaxft.data.rows.row_files import Outcome, row_of
from jaxft.data.rows.text_encoding import UTF8, encoding_note, sniff_encoding

MALFORMED_CSV = "malformed CSV"
CSV_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NAMED = re.compile(r'(?i)"?sep=([^\w\s"]|\t)"?\r?\n')  # the first line of files for Excel
_SAMPLE = 1 << 16  # characters by which the delimiter is chosen
_SAMPLE_RECORDS = 20


class CsvText(NamedTuple):
    """How the text of a CSV file is read. named: its first line, such as "sep=;", names the delimiter."""

    encoding: str = UTF8
    delimiter: str = ","
    named: bool = False

    def notes(self, path: Path) -> list[str]:
        """Return lines about what its suffix does not say."""
        usual = "\t" if path.suffix == ".tsv" else ","
        if self.delimiter == usual:
            return encoding_note(path, self.encoding)
        line = (
            f"the columns of {path.name} are separated by {_DELIMITERS.get(self.delimiter, self.delimiter)}"
        )
        return [*encoding_note(path, self.encoding), line]


def sniff_csv(path: Path) -> CsvText:
    """Return the encoding and the delimiter of a CSV file: the one that a first line for Excel names, or of
    those that divide its header, the one with which most of the first records have as many fields as it.
    """
    encoding = sniff_encoding(path)
    with path.open(newline="", encoding=encoding, errors="replace") as file:
        sample = file.read(_SAMPLE)
    if named := _NAMED.match(sample):
        return CsvText(encoding, named[1], True)
    usual, fits = "\t" if path.suffix == ".tsv" else ",", dict[str, float]()
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):  # of several that fit alike, the first is taken
        try:
            records = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
            widths = [len(record) for record in islice(records, _SAMPLE_RECORDS)]
        except csv.Error:  # a field that is larger than the limit
            continue
        if widths and widths[0] > 1:
            fits[delimiter] = widths.count(widths[0]) / len(widths)
    return CsvText(encoding, max(fits, key=fits.__getitem__) if fits else usual)


def read_csv(path: Path, text: CsvText) -> Iterator[Outcome]:
    """Read the rows of a CSV file. Spaces around the names of columns are removed."""
    csv.field_size_limit(LINE_BYTES)
    errors = "surrogateescape" if text.encoding == UTF8 else "strict"
    with path.open(newline="", encoding=text.encoding, errors=errors) as file:
        records = _csv_records(path, file, text.delimiter)
        if text.named:
            next(records)
        _, header = next(records, (1, []))
        if isinstance(header, InvalidRow):
            raise ValueError(str(header)) from header
        header = [name.strip() for name in header]
        if not header:
            raise ValueError(f"{path}:1: the file has no header; begin it with a line of column names")
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


def _csv_records(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str] | InvalidRow]]:
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
            values: list[str] | InvalidRow = next(csv.reader(lines(), delimiter=delimiter, strict=True))
            "".join(taken).encode("utf-8", "surrogateescape").decode()
            yield line, values
            line += len(taken)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            if error.encoding != "utf-8":  # a character of UTF-16 or cp1252, after which no line is certain
                problem = f"not {error.encoding} text ({error.reason}) from line {line} on"
                raise ValueError(f"{path}: {problem}; convert the file to UTF-8") from error
            problem = f"not UTF-8 text ({error.reason} at byte {error.start} of the row)"
            yield line, InvalidRow(f"{path}:{line}", "not UTF-8", f"{problem}; convert the file to UTF-8")
            line += len(taken)
        except csv.Error as error:
            text = "a quote is never closed" if "end of data" in str(error) else str(error)
            problem = f"malformed CSV, {text}; fix the quoting or remove the row"
            yield line, InvalidRow(f"{path}:{line}", MALFORMED_CSV, problem)
            again.extendleft(reversed(taken[1:]))
            line += 1
