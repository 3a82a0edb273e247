"""Folders of runs that commands name: on this machine, or fetched from an object store into the cache."""

import hashlib
import json
import re
import sys
from pathlib import Path

from jaxft.runs.mirror import Mirror
from jaxft.runs.store import check_store_url, open_store
from jaxft.weights.file_hash import cache_folder

IN_STORE = re.compile(r"(gs|s3)://")
LEVELS = 3  # of a run, a member of a sweep, and its adapter/ or model/
FETCHED = "fetched.json"  # the names of the files that were fetched, beside the folder


def local_folder(place: str) -> Path:
    """Return the folder of a run on this machine. One in an object store is fetched first; see fetch_run."""
    return fetch_run(place) if IN_STORE.match(place) else Path(place)


def is_fetched(folder: Path) -> bool:
    """Whether a folder is one that local_folder has fetched."""
    return folder.is_relative_to(cache_folder() / "runs")


def fetch_run(url: str) -> Path:
    """Fetch a run's folder, or that of a sweep, without its checkpoints into the cache; return it there.

    url: that of the folder, or of a folder in it. Files that are there already are not fetched again, and
    those that the store has no longer are deleted. Raises ValueError for a wrong address, FileNotFoundError
    if the store has no run there, and OSError if the store fails.
    """
    check_store_url(url, "run")
    parts = url.rstrip("/").split("/")
    for size in range(len(parts), max(len(parts) - LEVELS, 2), -1):
        root = "/".join(parts[:size])
        place = cache_folder() / "runs" / hashlib.sha256(root.encode()).hexdigest()[:16]
        folder, listed = place / parts[size - 1], place / FETCHED
        names = Mirror(folder, open_store(root), _report).fetch_results()
        if not names:
            continue
        before = json.loads(listed.read_bytes()) if listed.is_file() else []
        for name in set(before) - set(names):
            (folder / name).unlink(missing_ok=True)
        listed.write_text(json.dumps(names))
        return folder.joinpath(*parts[size:])
    raise FileNotFoundError(
        f"{url}: no run is there; name the folder of one that was trained with loop.store=..., such as "
        "s3://bucket/runs/sft"
    )


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
