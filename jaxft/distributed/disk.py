"""Write files in one step, and so that a power cut leaves the old one or the new one.

Written data reaches the disk up to 30 s later, and an empty file may get its final name before its
content: so everything is synced before it is renamed, and the folder of the new name after.
"""

import contextlib
import errno
import os
from pathlib import Path

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot sync folders


def fsync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on disk. Raises OSError that names it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Return when a file, or a folder with everything below it, is on disk. Links are not followed."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
    if path.is_dir() or path.is_file():
        fsync(path)


def publish(part: Path, target: Path) -> None:
    """Give a file or a folder its final name when all of it is on disk; the name is too when this returns."""
    sync_tree(part)
    part.replace(target)
    fsync(target.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises OSError that names it."""
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
    """Create a folder, and those above it that do not exist, whose names are then on disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync(path.parent)
