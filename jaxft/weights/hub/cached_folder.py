"""Folders of the cache that are computed once. They appear complete and on disk, with the hashes of their
files, which are verified before they are used. Earlier versions wrote no hashes: see adopt_folder.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from jaxft.distributed.disk import locked, make_folder, publish, temporary_folder, write_durably
from jaxft.weights.hf.safetensors import read_model_json
from jaxft.weights.hub.file_hash import content_sha256, files_sha256

HASHES = "files.json"  # SHA-256 of the other files by path; links lead to files that are verified elsewhere


def folder_damage(folder: Path) -> str | None:
    """Return the problem with a folder of the cache; None if it has the files that were written."""
    try:
        if not (folder / HASHES).is_file():
            return f"{folder / HASHES} is missing, as where an earlier version wrote the folder"
        written = read_model_json(folder / HASHES)
        missing = [name for name in written if not (folder / name).is_file()]
        if missing:
            return f"{folder / missing[0]} is missing"
        present = files_sha256([folder / name for name in written], content_sha256)
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name, sha256 in zip(written, present, strict=True) if written[name] != sha256]
    return f"{folder / changed[0]} has changed since it was written" if changed else None


def adopt_folder(folder: Path) -> None:
    """Write the hashes of a folder that an earlier version wrote without them, and whose content a run's
    record has confirmed.
    """
    if folder.is_dir() and not (folder / HASHES).is_file():
        with _naming(folder), locked(folder):
            _write_hashes(folder)


@contextlib.contextmanager
def cached_folder(out: Path) -> Iterator[Path]:
    """Yield the path of a folder to create and fill. At the end it becomes `out`, in place of a damaged one,
    unless another process was faster. Raises OSError if the cache cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _naming(out):
            make_folder(out.parent)
            temporary = stack.enter_context(temporary_folder(out.parent, ".new-"))
        yield temporary / out.name
        with _naming(out):
            _publish(temporary / out.name, out, temporary / "damaged")


@contextlib.contextmanager
def _naming(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error}); set JAXFT_CACHE to another folder") from error


def _publish(part: Path, out: Path, aside: Path) -> None:
    _write_hashes(part)
    with locked(out.parent):
        if out.exists():
            if folder_damage(out) is None:
                return
            out.rename(aside)
        publish(part, out)


def _write_hashes(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in files if path.name != HASHES]
    hashes = dict(zip(names, files_sha256([folder / name for name in names]), strict=True))
    write_durably(folder / HASHES, (json.dumps(hashes, indent=2) + "\n").encode())
