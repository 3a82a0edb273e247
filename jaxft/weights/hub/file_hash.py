"""SHA-256 of whole files: cached for each version of a file, or of the bytes that are on disk now."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from jaxft.distributed.disk import make_folder, write_durably

SETTLED_S = 2.0  # a file that is younger may change again without a visible change of its times
THREADS = 8


def cache_folder() -> Path:
    """Return JAXFT_CACHE, or ~/.cache/jaxft."""
    return Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of all bytes of a file, in hex.

    The hash is cached under (path, size, modification time, change time, inode) in JAXFT_CACHE, so that a
    large file is read once: bits that a disk has flipped since, which leave all of these as they were, are
    not noticed, see content_sha256. A cache that cannot be read or written only costs time.
    """
    path = path.resolve()
    key = _version(path)
    entry = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        cached = json.loads(entry.read_bytes())
        if isinstance(cached, list) and len(cached) == 2 and cached[0] == list(key):
            return cached[1]
    sha256 = content_sha256(path)
    if _is_settled(path):
        with contextlib.suppress(OSError):
            make_folder(entry.parent)
            write_durably(entry, json.dumps([key, sha256]).encode())
    return sha256


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of the bytes that a file has on disk now, in hex; each process reads it once.

    Unlike file_sha256 it notices bits that a disk has flipped: for files that jaxft wrote, before their use.
    """
    path = path.resolve()
    return _read_once(_version(path)) if _is_settled(path) else _read(_version(path))


def files_sha256(paths: Sequence[Path], sha256: Callable[[Path], str] = file_sha256) -> list[str]:
    """Return the SHA-256 of each file; several are read at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(sha256, paths))


_Version = tuple[str, int, int, int, int]


def _version(path: Path) -> _Version:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _is_settled(path: Path) -> bool:
    stat = path.stat()
    return time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_S


def _read(version: _Version) -> str:
    path = Path(version[0])
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if _version(path) != version:
        raise OSError(f"{path}: the file changed while it was read; wait until it is complete")
    return sha256


_read_once = cache(_read)
