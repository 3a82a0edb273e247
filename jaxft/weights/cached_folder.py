"""Folders of the cache that are computed once. They appear complete and on disk, with the hashes of their
files, which are verified before they are used.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxft.distributed.temporary import locked, temporary_folder
from jaxft.weights.file_hash import files_sha256
from jaxft.weights.new_folder import make_folder, publish
from jaxft.weights.safetensors import read_model_json, write_model_json

HASHES = "files.json"  # SHA-256 of the other files by path; links lead to files that are verified elsewhere


def folder_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder of the cache; None if it has the files that were written."""
    try:
        known = read_model_json(folder / HASHES) if (folder / HASHES).is_file() else {}
        missing = [name for name in (HASHES, *known) if not (folder / name).is_file()]
        if missing:
            return f"{folder / missing[0]} is missing"
        found = files_sha256([folder / name for name in known])
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name, sha256 in zip(known, found, strict=True) if known[name] != sha256]
    return f"{folder / changed[0]} has changed since it was written" if changed else None


@contextlib.contextmanager
def cached_folder(out: Path) -> Iterator[Path]:
    """Yield the path of a folder to create and fill. At the end it becomes `out`, in place of a damaged one,
    unless another process was faster. Raises OSError if the cache cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _naming(out):
            make_folder(out.parent)
            own = stack.enter_context(temporary_folder(out.parent, ".new-"))
        yield own / out.name
        with _naming(out):
            _publish(own / out.name, out, own / "damaged")


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error}); set JAXFT_CACHE to another folder") from error


def _publish(part: Path, out: Path, aside: Path) -> None:
    files = sorted(path for path in part.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(part).as_posix() for path in files]
    write_model_json(part / HASHES, dict(zip(names, files_sha256(files), strict=True)))
    with locked(out.parent):
        if out.exists():
            if folder_damage(out) is None:
                return
            out.rename(aside)
        publish(part, out)
