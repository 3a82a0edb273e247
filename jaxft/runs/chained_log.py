"""Logs whose lines are chained by digests, so that a line that is changed, removed, added or moved is found.

metrics.jsonl has its digests in metrics_digests.jsonl: line n is the SHA-256 of the digest before it and of
line n of the log. At the end of a run further digests are of its other files. Who publishes the last digest
has published the record: it cannot be changed afterwards without changing that.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxft.distributed.disk import fsync, write_durably
from jaxft.weights.hf.complete_folders import files_sha256

DIGEST, FILE = "digest", "file"


def digests_path(log: Path) -> Path:
    """Return the path of a log's digests.

    >>> digests_path(Path("runs/sft/metrics.jsonl")).name
    'metrics_digests.jsonl'
    """
    return log.with_name(f"{log.stem}_digests.jsonl")


def next_digest(before: str, content: bytes) -> str:
    """Return the digest of a line. before: the digest of the line before it, "" for the first."""
    return hashlib.sha256(f"{before}\n".encode() + content).hexdigest()


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file, [] without one, and without one that a killed process left half written."""
    content = path.read_bytes() if path.is_file() else b""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


class DigestWriter:
    """Appends digests for a log that has only the lines of `kept`; digests of other lines are removed.

    Lines that have no digest yet, as of a killed process, get one. A digest that does not fit its line stays,
    so that the change is still found.
    """

    def __init__(self, log: Path, kept: list[bytes]):
        self._path = digests_path(log)
        known = [entry for entry in _entries(self._path) if FILE not in entry][: len(kept)]
        self.last = known[-1][DIGEST] if known else ""
        for line in kept[len(known) :]:
            self.last = next_digest(self.last, line)
            known.append({DIGEST: self.last})
        content = "".join(f"{json.dumps(entry)}\n" for entry in known).encode()
        if not self._path.is_file() or self._path.read_bytes() != content:
            write_durably(self._path, content)
        self._file = self._path.open("ab")

    def add(self, line: bytes) -> None:
        """Append the digest of a line of the log."""
        self._write(line, {})

    def add_file(self, path: Path) -> None:
        """Append the digest of another file of the record."""
        (sha256,) = files_sha256([path])
        self._write(f"{path.name} {sha256}\n".encode(), {FILE: path.name, "sha256": sha256})

    def _write(self, content: bytes, more: dict[str, str]) -> None:
        self.last = next_digest(self.last, content)
        self._file.write((json.dumps({**more, DIGEST: self.last}) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file when it is on disk."""
        self._file.close()
        fsync(self._path)


def add_files(log: Path, files: Iterable[Path]) -> str:
    """Append digests of files to the digests of a finished log; return the last digest."""
    writer = DigestWriter(log, whole_lines(log))
    for path in files:
        if path.is_file():
            writer.add_file(path)
    writer.close()
    return writer.last


def digested_files(log: Path) -> set[str]:
    """Return the names of the files whose digests follow those of a log."""
    return {entry[FILE] for entry in _entries(digests_path(log)) if FILE in entry}


def append_entry(log: Path, entry: dict[str, Any]) -> None:
    """Append a JSON object to a log, and its digest; sync both to disk."""
    kept, line = whole_lines(log), (json.dumps(entry, allow_nan=False) + "\n").encode()
    writer = DigestWriter(log, kept)
    with log.open("ab") as file:
        file.write(line)
    fsync(log)
    writer.add(line)
    writer.close()


def read_unfinished(log: Path) -> list[dict[str, Any]]:
    """Return the entries of a log that a killed process may have left incomplete, [] without a log. A last
    line that has no digest is removed. Raises ValueError as check_chain does.
    """
    if not log.is_file():
        return []
    count = sum(FILE not in entry for entry in _entries(digests_path(log)))
    kept = whole_lines(log)
    kept = kept[:count] if len(kept) == count + 1 else kept
    if log.read_bytes() != b"".join(kept):
        write_durably(log, b"".join(kept))
    check_chain(log)
    return [json.loads(line) for line in kept]


def check_chain(log: Path) -> str:
    """Return the last digest of a log. Raises ValueError for the first line of it, or the first file, that is
    not as it was written, and FileNotFoundError for a log without digests.
    """
    path = digests_path(log)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the log of an earlier jaxft has no digests")
    lines, entries, last = whole_lines(log), _entries(path, strict=True), ""
    count = sum(FILE not in entry for entry in entries)
    if log.is_file() and not log.read_bytes() == b"".join(lines):
        raise ValueError(f"{log}: its last line is cut off; restore the file")
    for number, entry in enumerate(entries, 1):
        if FILE in entry:
            file = log.with_name(entry[FILE])
            if not file.is_file() or files_sha256([file]) != [entry["sha256"]]:
                raise ValueError(f"{file}: the file was changed after it was written; restore it")
            content = f"{entry[FILE]} {entry['sha256']}\n".encode()
        elif number > len(lines):
            raise ValueError(f"{log}: has {len(lines)} lines, expected {count}; restore the file")
        else:
            content = lines[number - 1]
        if entry[DIGEST] != next_digest(last, content):
            raise ValueError(
                f"{log}:{number}: the line was changed after it was written, or its digest was; restore the "
                "file"
            )
        last = entry[DIGEST]
    if len(lines) != count:
        raise ValueError(f"{log}: has {len(lines)} lines, expected {count}; restore the file")
    return last


def _entries(path: Path, strict: bool = False) -> list[dict[str, Any]]:
    """The entries of a digests file. strict: raise ValueError for a line that is none."""
    entries = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            entry = json.loads(line)
            is_entry = isinstance(entry[DIGEST], str) and (json.dumps(entry) + "\n").encode() == line
        except (ValueError, KeyError, TypeError):
            is_entry = False
        if not is_entry:
            if strict:
                raise ValueError(f"{path}:{number}: not a digest as jaxft writes it; restore the file")
            break
        entries.append(entry)
    if strict and path.read_bytes() != b"".join(whole_lines(path)):
        raise ValueError(f"{path}: its last line is cut off; restore the file")
    return entries
