"""SHA-256 of whole files, computed once for each version of a file."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTLED_S = 2.0  # a file that is younger may change again without a visible change of its times
THREADS = 8


def cache_folder() -> Path:
    """Return JAXFT_CACHE, or ~/.cache/jaxft."""
    return Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of all bytes of a file, in hex.

    The hash is cached under (path, size, modification time, change time, inode) in JAXFT_CACHE, so that a
    large file is read once. A cache that cannot be read or written only costs time.
    """
    path = path.resolve()
    key = _version(path)
    entry = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(entry.read_bytes())
        if isinstance(known, list) and len(known) == 2 and known[0] == key:
            return known[1]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if _version(path) != key:
        raise OSError(f"{path}: the file changed while it was read; wait until it is complete")
    if time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > SETTLED_S:
        with contextlib.suppress(OSError):
            _write(entry, json.dumps([key, found]))
    return found


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file; several are read at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(file_sha256, paths))


def _version(path: Path) -> list[str | int]:
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
