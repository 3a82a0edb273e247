"""Folders that appear only once they are complete and on disk, and SHA-256 hashes of files.

A folder in the cache stores the hashes of its files, which are verified before the files are used. A file's
hash is cached for each version of the file, or computed from the bytes that are on disk now.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from jaxft.distributed.disk import locked, make_folder, publish, temporary_folder, write_durably
from jaxft.weights.hf.safetensors import read_model_json

SETTLED_S = 2.0  # a file that is younger may change again without a visible change of its times
THREADS = 8
HASHES = "files.json"  # SHA-256 of the other files by path; links lead to files that are verified elsewhere

_Version = tuple[str, int, int, int, int]


def cache_folder() -> Path:
    """Return JAXFT_CACHE, or ~/.cache/jaxft."""
    return Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of all bytes of a file, in hex.

    The hash is cached under (path, size, modification time, change time, inode) in JAXFT_CACHE, so that a
    large file is read once. It does not notice bits that the disk flipped since then; content_sha256 does. A
    cache that cannot be read or written only costs time.
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
    """Return `sha256` of each file; several files are read at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(sha256, paths))


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


def folder_damage(folder: Path) -> str | None:
    """Return the problem with a folder of the cache as text; None if its files are as they were written."""
    try:
        if not (folder / HASHES).is_file():
            return f"{folder / HASHES} is missing"
        written = read_model_json(folder / HASHES)
        missing = [name for name in written if not (folder / name).is_file()]
        if missing:
            return f"{folder / missing[0]} is missing"
        present = files_sha256([folder / name for name in written], content_sha256)
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name, sha256 in zip(written, present, strict=True) if written[name] != sha256]
    return f"{folder / changed[0]} has changed since it was written" if changed else None


@contextlib.contextmanager
def cached_folder(out: Path) -> Iterator[Path]:
    """Yield the path of a folder to create and fill. At the end it is renamed to `out`, where it replaces a
    damaged folder; if another process has completed `out` first, that one stays. Raises OSError if the cache
    cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _naming(out):
            make_folder(out.parent)
            temporary = stack.enter_context(temporary_folder(out.parent, ".new-"))
        yield temporary / out.name
        with _naming(out):
            _write_hashes(temporary / out.name)
            with locked(out.parent):
                if out.exists():
                    if folder_damage(out) is None:
                        return
                    out.rename(temporary / "damaged")
                publish(temporary / out.name, out)


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error}); set JAXFT_CACHE to another folder") from error


def _write_hashes(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in files if path.name != HASHES]
    hashes = dict(zip(names, files_sha256([folder / name for name in names]), strict=True))
    write_durably(folder / HASHES, (json.dumps(hashes, indent=2) + "\n").encode())


def check_new_folder(out: Path) -> None:
    """Raise ValueError if `out` is a file, the working directory, or a folder that is not empty."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose a folder")
    if out.resolve() == Path.cwd():
        raise ValueError(f"--out {out} is the working directory; choose a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} exists and is not empty; choose a new folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield the path of a folder to create and fill. It has the same name as `out` and is moved to `out` at
    the end; after an error it is removed.

    Raises ValueError as check_new_folder does.
    """
    check_new_folder(out)
    target = out.resolve()  # an empty folder may be a link
    with parents_of(target), temporary_folder(target.parent, f".{target.name}-jaxft-") as temporary:
        part = temporary / target.name
        yield part
        publish(part, target)


@contextlib.contextmanager
def parents_of(out: Path) -> Iterator[None]:
    """Create the missing folders above `out`. After an error, remove the created ones that are empty."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        make_folder(out.parent)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process wrote there
                folder.rmdir()
        raise
