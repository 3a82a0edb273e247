"""An append-only log whose lines are chained by digests, so that a changed, removed or added line is found.

Each line is a JSON object with a `digest`: the SHA-256 of the digest before it and of its other fields.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxft.distributed.disk import fsync

DIGEST = "digest"


def next_digest(before: str, entry: dict[str, Any]) -> str:
    """Return the digest of an entry without one. before: the digest of the line before, "" for the first."""
    text = json.dumps({name: x for name, x in entry.items() if name != DIGEST}, sort_keys=True)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def read_chain(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log, [] without one, and without a last line that a killed process left half
    written. Raises ValueError for the first line that is not as it was written.
    """
    content = path.read_bytes() if path.exists() else b""
    entries: list[dict[str, Any]] = []
    before = ""
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            found = entry[DIGEST]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a line of this log ({error})") from error
        expected = next_digest(before, entry)
        if found != expected or line != _line(entry):
            raise ValueError(f"{path}:{number}: the line, or one before it, was changed after it was written")
        entries.append(entry)
        before = expected
    return entries


def append_entry(path: Path, entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Append an entry to the log that has `entries`, and return all when it is on disk."""
    before = entries[-1][DIGEST] if entries else ""
    entry = json.loads(json.dumps(entry, allow_nan=False))
    entry = {**entry, DIGEST: next_digest(before, entry)}
    size = sum(len(_line(earlier)) for earlier in entries)
    with path.open("ab") as file:
        os.truncate(path, size)  # the rest of a line that a killed process has begun
        file.write(_line(entry))
    fsync(path)
    return [*entries, entry]


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry, allow_nan=False) + "\n").encode()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
