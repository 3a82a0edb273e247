"""Read CSV and TSV files, and documents of text and Markdown files, in whatever encoding they have."""

import codecs
import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

from jaxft.data.rows.invalid_rows import LINE_BYTES, InvalidRow, attempt
from jaxft.data.rows.row_files import Outcome, Row, row_of

UTF8 = "utf-8-sig"  # with a byte order mark or without
CP1252 = "cp1252"  # of Excel and editors on Windows in Western Europe and America
_BLOCK = 1 << 16
_SAMPLE = 4 << 20  # bytes around the first that are not UTF-8, by which cp1252 is told from damaged UTF-8
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HIGH = bytes(range(0x80, 0x100))
_PAIR = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# In cp1252: letters that touch an ASCII letter, and signs such as quotes and dashes; not its unused codes.
_USUAL = re.compile(
    rb"(?<=[A-Za-z])[\xc0-\xff]|[\xc0-\xff](?=[A-Za-z])|[\x80\x82-\x8c\x8e\x91-\x9c\x9e-\xbf]"
)
# Words of one letter in French, Italian, Portuguese and Czech: à, è, é, í, ó, ò, ú and the same in capitals.
_LETTERS = rb"[\xc0\xc8\xc9\xcd\xd2\xd3\xda\xe0\xe8\xe9\xed\xf2\xf3\xfa]"
_ALONE = re.compile(rb"(?<=[\s'\"(;,])" + _LETTERS + rb"(?=[\s'\");,.!?])")


def wide_encoding(path: Path) -> str | None:
    """Return the encoding of a text file of 16 or 32 bits a character by its first bytes, None for others."""
    with path.open("rb") as file:
        first = file.read(64)
    mark = next((name for mark, name in _MARKS if first.startswith(mark)), UTF8)
    if mark != UTF8:
        return mark
    zeros = first[::2].count(0), first[1::2].count(0)
    if len(first) < 8 or max(zeros) <= len(first) // 4 or min(zeros):  # ASCII has one zero in two bytes
        return None
    return "utf-16-be" if zeros[0] else "utf-16-le"


def sniff_encoding(path: Path) -> str:
    """Return the encoding of a text file, by its byte order mark or by all of its bytes.

    A file that is not UTF-8 is cp1252 if its bytes above 127 are few, and in that encoding nearly all are
    letters inside words, quotes or dashes; up to two thirds may be words of one letter. A file with any
    multi-byte character of UTF-8 is damaged UTF-8, whose invalid rows the readers find.
    """
    wide = wide_encoding(path)
    if wide is not None:
        return wide
    with path.open("rb") as file:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block := file.read(_BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
            return UTF8
        except UnicodeDecodeError:
            file.seek(max(0, file.tell() - _SAMPLE // 2))
            sample = file.read(_SAMPLE)
    high = len(sample) - len(sample.translate(None, _HIGH))
    if high > 0.2 * len(sample) or b"\0" in sample or _PAIR.search(sample):
        return UTF8
    usual = len(_USUAL.findall(sample))
    alone = min(len(_ALONE.findall(sample)), 2 * usual)
    return CP1252 if usual + alone >= max(1, 0.9 * high) else UTF8


def encoding_note(path: Path, encoding: str) -> list[str]:
    """Return a line about a file that is not UTF-8, [] for one that is."""
    if encoding == UTF8:
        return []
    by = " by its bytes; if letters are wrong, convert it to UTF-8" if encoding == CP1252 else ""
    return [f"{path.name} is not UTF-8 and is read as {encoding.upper()}{by}"]


TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
DOCUMENT = "document"
SAMPLE_BY = (DOCUMENT, "paragraph", "line")  # as in the loader "text" of the package datasets
SEPARATOR = "<|endoftext|>"  # on a line of its own, between the documents of a file


def text_files(folder: Path) -> list[Path]:
    """Return the text files of a folder and its subfolders, except hidden ones, ordered by name."""

    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    paths = (path for path in folder.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES)
    return sorted(path for path in paths if path.is_file() and not is_hidden(path))


def read_text(path: Path, label: str, encoding: str, sample_by: str) -> Iterator[Outcome]:
    """Yield the documents of a text file as rows {"text"}, named by the line where they begin.

    label: the file in the rows' names. sample_by: "document" is the file, or each part of it between lines
    <|endoftext|>; "paragraph" also divides it at blank lines, and "line" after each line. Blank parts are no
    rows. Raises ValueError for a part of more than LINE_BYTES, and UnicodeDecodeError for bytes that the
    encoding does not have; with UTF-8, a part with such bytes is an InvalidRow instead.
    """
    errors = "surrogateescape" if encoding == UTF8 else "strict"
    with path.open(encoding=encoding, errors=errors) as file:  # line ends become \n
        for line, text in _parts(path, file, sample_by):
            try:
                text.encode()
                yield Row(f"{label}:{line}", {"text": text})
            except UnicodeEncodeError:
                problem = "the text that begins here has bytes that are not UTF-8; convert the file to UTF-8"
                yield InvalidRow(f"{path}:{line}", "not UTF-8", problem)


def _parts(path: Path, file: TextIO, sample_by: str) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of each part that is not blank. sample_by: see read_text."""
    lines, first, size = list[str](), 1, 0
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), ""), 1):
        bare = line.strip()
        is_end = bare == SEPARATOR
        if not is_end and (bare or lines):
            first = first if lines else number
            lines.append(line)
            size += len(line)
        if size > LINE_BYTES:
            raise ValueError(
                f"{path}:{first}: the text has more than {LINE_BYTES >> 20} MiB; divide it by lines "
                f"{SEPARATOR}, or set data.sample_by=paragraph or line"
            )
        if lines and (is_end or sample_by == "line" or (sample_by == "paragraph" and not bare)):
            yield first, "".join(lines).rstrip()
            lines, size = [], 0
    if lines:
        yield first, "".join(lines).rstrip()


MALFORMED_CSV = "malformed CSV"
CSV_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NAMED = re.compile(r'(?i)"?sep=([^\w\s"]|\t)"?\r?\n')  # the first line of files for Excel
_DELIMITER_SAMPLE = 1 << 16  # characters by which the delimiter is chosen
_SAMPLE_RECORDS = 20


class CsvText(NamedTuple):
    """The encoding and dialect of a CSV file. named: its first line, such as "sep=;", names the delimiter."""

    encoding: str = UTF8
    delimiter: str = ","
    named: bool = False

    def notes(self, path: Path) -> list[str]:
        """Return lines about the encoding and the delimiter, if the file's suffix does not imply them."""
        usual = "\t" if path.suffix == ".tsv" else ","
        if self.delimiter == usual:
            return encoding_note(path, self.encoding)
        by = _DELIMITERS.get(self.delimiter, self.delimiter)
        return [*encoding_note(path, self.encoding), f"the columns of {path.name} are separated by {by}"]


def sniff_csv(path: Path) -> CsvText:
    """Return the encoding and the delimiter of a CSV file. A first line for Excel may name the delimiter.
    Otherwise, of the delimiters in the header, it is the one with which most of the first records have as
    many fields as the header.
    """
    encoding = sniff_encoding(path)
    with path.open(newline="", encoding=encoding, errors="replace") as file:
        sample = file.read(_DELIMITER_SAMPLE)
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
