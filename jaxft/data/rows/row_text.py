"""Read text and Markdown files as rows of text: a file is one document, or is divided into several."""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxft.data.rows.invalid import LINE_BYTES, InvalidRow
from jaxft.data.rows.row_files import Outcome, Row
from jaxft.data.rows.text_encoding import UTF8

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
DOCUMENT = "document"
SAMPLE_BY = (DOCUMENT, "paragraph", "line")  # as in the loader "text" of the package datasets
SEPARATOR = "<|endoftext|>"  # on a line of its own, between the documents of a file


def text_files(folder: Path) -> list[Path]:
    """Return the text files of a folder and its subfolders, but hidden ones, ordered by name."""

    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    found = (path for path in folder.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES)
    return sorted(path for path in found if path.is_file() and not is_hidden(path))


def read_text(path: Path, label: str, encoding: str, sample_by: str) -> Iterator[Outcome]:
    """Yield the documents of a text file as rows {"text"}, named by the line where they begin.

    label: the file in the rows' names. sample_by: "document" is the file, or each part of it between lines
    <|endoftext|>; "paragraph" also divides it at blank lines, and "line" after each line. Blank parts are no
    rows. Raises ValueError for a part of more than LINE_BYTES, and for bytes that are not of the encoding.
    """
    errors = "surrogateescape" if encoding == UTF8 else "strict"
    with path.open(encoding=encoding, errors=errors) as file:  # line ends become \n
        try:
            for line, text in _parts(path, file, sample_by):
                yield _row(path, f"{label}:{line}", line, text)
        except UnicodeDecodeError as error:
            problem = f"not {error.encoding} text ({error.reason})"
            raise ValueError(f"{path}: {problem}; convert the file to UTF-8") from error


def _row(path: Path, name: str, line: int, text: str) -> Outcome:
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = "bytes that are not UTF-8; convert the file to UTF-8"
        return InvalidRow(f"{path}:{line}", "not UTF-8", f"the text that begins here has {problem}")
    return Row(name, {"text": text})


def _parts(path: Path, file: TextIO, sample_by: str) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of each part that is not blank."""
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
