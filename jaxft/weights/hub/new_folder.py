"""New folders with results, written in one step: a command that fails leaves no part of what it writes, nor
of the folders above it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxft.distributed.disk import make_folder, publish, temporary_folder


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
    """Yield the path of a folder to create and fill. It has the name of `out` and becomes `out` at the end;
    after an error it is removed.

    Raises ValueError as check_new_folder does.
    """
    check_new_folder(out)
    target = out.resolve()  # an empty folder may be a link
    with (
        parents_of(target),
        temporary_folder(target.parent, f".{target.name}-jaxft-") as temporary,
    ):
        part = temporary / target.name
        yield part
        publish(part, target)


@contextlib.contextmanager
def parents_of(out: Path) -> Iterator[None]:
    """Create the folders above `out` that do not exist; after an error those are removed that are empty."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        make_folder(out.parent)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process wrote there
                folder.rmdir()
        raise
