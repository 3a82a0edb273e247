"""Files and folders that survive a power cut or a killed process.

Durable: a file's content is synced to disk before the file gets its final name; then the folder with that
name is synced. Without this, written data reaches the disk up to 30 s later, and a file may get its final
name before its content.

Temporary: the process that uses a temporary file or folder locks it. The lock ends with the process, so the
next command can recognise and remove the leftovers of killed processes. Locks of other machines may be
invisible, and some file systems have no locks: in both cases, a file counts as a leftover once it is a day
old.
"""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot sync folders


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk. An OSError names the path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Wait until a file, or a folder with everything below it, is on disk. Links are not followed."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
    if path.is_dir() or path.is_file():
        fsync(path)


def publish(part: Path, target: Path) -> None:
    """Wait until all of the file or folder `part` is on disk, rename it to `target`, and wait until the new
    name is on disk. Both paths must be on one file system.
    """
    sync_tree(part)
    part.replace(target)
    fsync(target.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file: after a power cut it has its old or all of its new content. An OSError names the path."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        publish(part, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder with its missing parents, and sync their names to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync(path.parent)


STALE_S = 24 * 3600.0
STARTED_S = 10.0  # an empty file or folder younger than this may be about to be locked


def here() -> str:
    """Return this machine's host name, for the names of temporary files: its first 16 letters and digits."""
    return re.sub(r"\W", "", platform.node())[:16] or "localhost"


def owned(path: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a temporary file or folder until the block ends, so that `remove_leftovers` keeps it."""
    return locked(path, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Lock a file or folder until the block ends. If locking fails, as on a file system without locks, the
    block runs without a lock.

    how: flags of fcntl.flock. The default waits for an exclusive lock.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is removed when the block ends. First remove the folders that
    killed processes have left there.

    prefix: the beginning of the names of these temporary folders. Everything else in `parent` whose name
    begins with it may be removed, too.
    """
    with contextlib.suppress(OSError):  # a folder that may be written and not read
        remove_leftovers(path for path in parent.iterdir() if path.name.startswith(prefix))
    begin = f"{prefix}{here()}-"
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=begin, ignore_cleanup_errors=True) as folder,
        owned(Path(folder)),
    ):
        yield Path(folder)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new binary file, open for reading and writing, in the folder of `path`. The caller renames it
    to `path` when it is complete; otherwise it is removed when the block ends.

    First remove the .tmp files of killed processes from the folder.
    """
    remove_leftovers(path.parent.glob("*.tmp"))
    part = path.with_suffix(f".{here()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with part.open("w+b") as file, owned(part):
            yield file
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove the temporary files and folders among `paths` that killed processes have left.

    Kept are links, files and folders of other users, those that a process has locked, and empty ones younger
    than 10 s. Where locks cannot be seen (see the module's docstring), a file is removed once it is a day
    old.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            if _has_owner(path):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _has_owner(path: Path) -> bool:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        age = time.time() - status.st_mtime
        is_old = age > STALE_S
        is_empty = not (os.listdir(handle) if stat.S_ISDIR(status.st_mode) else status.st_size)
        if status.st_uid != os.getuid() or (is_empty and age < STARTED_S):
            return True
        if f"{here()}-" not in path.name:
            return not is_old
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return not is_old
        return False
    finally:
        os.close(handle)
