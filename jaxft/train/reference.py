"""Log-probs of a frozen reference, computed once and kept on disk by content.

A pair's entry is found by what decides it: weights, adapter, model settings, and the tokens of its prompt and answers. So a
changed row or model is computed anew, and nothing else is.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data import cache as store
from jaxft.distributed import processes

VERSION = 1  # counts changes to how log-probs are computed


def identity(weights: str, adapter: str | None, settings: Any) -> str:
    """A name for the reference: hashes of its weights and its adapter, and the model's settings as JSON."""
    told = json.dumps([VERSION, weights, adapter, settings], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:40]


def place(name: str, cache: Path | None = None) -> Path:
    """The file of a reference's log-probs."""
    return store.row_cache_folder(cache).parent / "reference" / f"{name}.npz"


def load(path: Path) -> dict[str, np.ndarray]:
    """Log-probs by the pair's key; nothing where there is no file or it can't be read whole."""
    try:
        with (
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):  # the zip's checksums find flipped bits
            keys, offsets, values = (arrays[name] for name in ("keys", "offsets", "values"))
        if len(offsets) != len(keys) + 1 or offsets[-1] != len(values):
            return {}
        return dict(zip(keys.tolist(), np.split(values, offsets[1:-1]), strict=True))
    except store.CORRUPT_FILE:
        return {}


def save(path: Path, known: dict[str, np.ndarray]) -> str | None:
    """Write under another name and rename. Returns what went wrong, which only costs time in the next run, or None."""
    part = path.with_suffix(f".{os.getpid()}.tmp")
    lengths = [len(x) for x in known.values()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(
                file,
                keys=np.array(list(known)),
                offsets=np.cumsum([0, *lengths]),
                values=np.concatenate(list(known.values())),
            )
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        return f"{path}: the reference log-probs can't be kept ({error.strerror})"
    return None


def attach(
    source: Any, path: Path, compute: Callable[[Iterable[Any]], Iterable[np.ndarray]], say: Callable
) -> Any:
    """The pair source with the reference's log-probs of every pair, from the file where it has them.

    compute(batches) -> log-probs [1, rows, M] of each batch; asked for the missing pairs only.
    """
    known = load(path)
    if not processes.all_alike(sorted(known)):  # hosts with caches of their own
        known = {}
    missing = [i for i, key in enumerate(source.keys) if key not in known]
    say(
        f"reference log-probs: {len(source.keys) - len(missing)} of {len(source.keys)} pairs found, {len(missing)} to compute"
    )
    if missing:
        batches = source.cover(missing)
        for batch, found in zip(batches, compute(batches), strict=True):
            values = source.values(batch, found)
            known.update({source.keys[i]: value.astype(np.float32) for i, value in values.items()})
        told = save(path, known) if processes.is_first() else None
        if told:
            say(told)
    return source.with_reference({i: known[key] for i, key in enumerate(source.keys)})
