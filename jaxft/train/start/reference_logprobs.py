"""Log-probs of a frozen reference policy, computed once before training and cached on disk.

A hash of weights, adapter and model settings names the file in the cache, and a hash of prompt and responses
is the key of a pair in it. So only new and changed rows are computed, and all rows for another model.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.packing import row_cache
from jaxft.data.packing.pair_layout import values_by_pair
from jaxft.distributed import processes, sharding
from jaxft.distributed.sync import is_first
from jaxft.nn import tree
from jaxft.nn.tree import Batch
from jaxft.runs.settings.setting_values import describe
from jaxft.train.export.calibrate import Progress, calibrate_base
from jaxft.train.programs import Programs, reference_step, start
from jaxft.train.settings import Run
from jaxft.train.start.jobs import Job

VERSION = 1  # counts changes of how log-probs are computed


def precompute(job: Job, report: Progress) -> Job:
    """Compute the calibrated base and the reference's log-probs, or find them in the cache; return the job
    that uses them, with the log-probs in every batch if its objective wants them precomputed. report: called
    with lines for the user.
    """
    calibrate_base(job.calibration, job.folder, report)
    if job.lead.programs.objective.facts.reference != "precomputed":
        return job
    sources = [
        add_reference_logps(member.run, member.programs, source, member.record, report)
        for member, source in zip(job.members, job.sources, strict=False)
    ]
    return replace(job, sources=tuple(sources))


def add_reference_logps(run: Run, p: Programs, source: Any, record: dict[str, Any], report: Progress) -> Any:
    """Return the pair source with log-probs of the model at step 0, computed now where the cache has none.

    record: the run's settings with the fingerprints of its weights.
    """
    settings = describe(run.model) | ({"quant": describe(run.quant)} if run.quant else {})
    if run.adapter and (run.adapter.changes_base or run.adapter.replaces_weights or run.adapter.dora):
        settings["adapter"] = describe(run.adapter)
    name = reference_fingerprint(record["weights_fingerprint"], record.get("start_fingerprint"), settings)

    def compute(batches: Any) -> Iterator[np.ndarray]:
        state, frozen = start(run, p, None)
        params, logps = tree.combine(state.trainable, frozen), reference_step(p)
        for number, batch in enumerate(batches, 1):
            yield np.asarray(logps(params, sharding.shard_batch(p.mesh, batch)))[None]
            if number % 10 == 0 or number == len(batches):
                report(f"reference log-probs: {number} of {len(batches)} batches")

    return add_cached_logps(source, cache_file(name), compute, report)


def reference_fingerprint(weights: str, adapter: str | None, settings: Any) -> str:
    """Return a reference policy's name in the cache: a hash of its weights, adapter and model settings."""
    text = json.dumps([VERSION, weights, adapter, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def cache_file(name: str, cache: Path | None = None) -> Path:
    """Return the file in the cache with a reference policy's log-probs. name: the result of
    reference_fingerprint. cache: the folder of the cache, None for the default.
    """
    return row_cache.row_cache_folder(cache).parent / "reference" / f"{name}.npz"


def load_reference_logps(path: Path) -> dict[str, np.ndarray]:
    """Return {hash of a pair: log-probs of its responses}; {} if there is no file or it is damaged."""
    try:
        # the zip's checksums find flipped bits
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            keys, offsets, values = (arrays[name] for name in ("keys", "offsets", "values"))
        if len(offsets) != len(keys) + 1 or offsets[-1] != len(values):
            return {}
        return dict(zip(keys.tolist(), np.split(values, offsets[1:-1]), strict=True))
    except row_cache.CORRUPT_FILE:
        return {}


def write_logps(path: Path, logps: dict[str, np.ndarray]) -> str | None:
    """Write {hash of a pair: log-probs} atomically. Returns None, or a line about an error: it costs only
    time, because the next run computes them again.
    """
    part = path.with_suffix(f".{os.getpid()}.tmp")
    lengths = [len(x) for x in logps.values()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(
                file,
                keys=np.array(list(logps)),
                offsets=np.cumsum([0, *lengths]),
                values=np.concatenate(list(logps.values())),
            )
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        return (
            f"{path}: the reference log-probs can't be cached ({error.strerror}); the next run computes them "
            "again"
        )
    return None


def add_cached_logps(
    source: Any, path: Path, compute: Callable[[list[Batch]], Iterable[np.ndarray]], report: Progress
) -> Any:
    """Return the pair source with the reference's log-probs of every pair, which are read from the file
    `path` or computed and added to it.

    compute(batches) yields log-probs [1, rows, M] of each batch; it is called for the missing pairs only.
    """
    known = load_reference_logps(path)
    if not processes.all_equal(sorted(known)):  # hosts with caches of their own
        known = {}
    missing = [i for i, key in enumerate(source.keys) if key not in known]
    count = len(source.keys)
    report(
        f"reference log-probs: {count - len(missing)} of {count} pairs are cached, {len(missing)} to compute"
    )
    if missing:
        batches = source.cover(missing)
        for batch, batch_logps in zip(batches, compute(batches), strict=True):
            values = values_by_pair(batch, batch_logps)
            known.update({source.keys[i]: value.astype(np.float32) for i, value in values.items()})
        failure = write_logps(path, known) if is_first() else None
        if failure:
            report(failure)
    return source.with_reference({i: known[key] for i, key in enumerate(source.keys)})
