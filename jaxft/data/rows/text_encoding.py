"""The encoding of a text file that doesn't name it: UTF-8, UTF-16, or Windows' cp1252."""

import codecs
import re
from pathlib import Path

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

    A file that is not UTF-8 is cp1252 if its bytes above 127 are few, and nearly all where that encoding has
    letters inside words, quotes or dashes; up to two thirds may be words of one letter. A file with valid
    characters of UTF-8 is damaged UTF-8, of which readers find the rows.
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
