"""Check that the files of a run or a study are unchanged, and that repeating a training step gives the same
bits.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import __version__
from jaxft.distributed import sharding
from jaxft.distributed.processes import Watchdog
from jaxft.lab.studies.appendix import REPORT, appendix_files
from jaxft.lab.studies.halving import DECLARATION, LEDGER, TRIALS
from jaxft.lab.studies.study import check_declared
from jaxft.lab.studies.study_results import check_study, read_study
from jaxft.report.run_files import sweep_members
from jaxft.runs import run_record
from jaxft.runs.checkpoint import Checkpoints, verify
from jaxft.runs.log import NullLog
from jaxft.runs.manifest import NAME, Corrupt, check_files, named_leaves, read_manifest
from jaxft.runs.metrics_log import (
    METRICS,
    check_chain,
    digested_files,
    digests_path,
    format_line,
    read_entries,
    whole_lines,
    without_perf,
)
from jaxft.runs.run_record import CHECKPOINTS
from jaxft.runs.settings.setting_values import recorded_defaults
from jaxft.runs.versions_and_devices import environment, environment_changes
from jaxft.train.evaluate.run_evaluations import continued
from jaxft.train.logs.logs import Logs
from jaxft.train.logs.meter import Meters
from jaxft.train.loop import load_and_compile, next_batch
from jaxft.train.start import open_settings
from jaxft.train.start.jobs import Job, prepare


def record_problems(folder: Path) -> Iterator[str]:
    """Yield a line about each change in the folder of a run, a sweep (with its members) or a study: of the
    log, the files with digests (only the first change of these and the log), weights and checkpoints.

    Raises FileNotFoundError for a folder without a log, and for a log without digests.
    """
    if (folder / DECLARATION).is_file():
        yield from _study_problems(folder)
        return
    members = sweep_members(folder)
    for member in members.values():
        yield from record_problems(member)
    if not (folder / METRICS).is_file():
        if not members:  # a sweep whose runs were trained one after the other has no log
            raise FileNotFoundError(f"{folder / METRICS}: no such file; name the folder of a run or a study")
        return
    try:
        check_chain(folder / METRICS)
        yield from _removed_lines(folder)
    except ValueError as error:
        yield str(error)
    yield from (changed.line for changed in run_record.changed_results(folder))
    yield from _checkpoint_problems(folder)


def _checkpoint_problems(folder: Path) -> Iterator[str]:
    for checkpoint in sorted((folder / CHECKPOINTS).glob("*/" + NAME)):
        try:
            verify(checkpoint.parent)
            check_files(checkpoint.parent, read_manifest(checkpoint.parent)["files"])
        except (Corrupt, ValueError, OSError) as error:
            yield f"{checkpoint.parent}: {error}"


def _removed_lines(folder: Path) -> Iterator[str]:
    """Yield a line if the last lines of a finished run's log, or of its digests file, were removed.

    The log must reach the summary's last step, and the digests file must end with digests of the run's files.
    """
    steps, log = run_record.finished_steps(folder), folder / METRICS
    reached = max((entry["step"] for entry in read_entries(log)), default=0)
    missing = [
        name for name in run_record.RECORD if (folder / name).is_file() and name not in digested_files(log)
    ]
    if reached < steps:
        yield f"{log}: ends at step {reached}, but the run at step {steps}; its last lines were removed"
    elif steps and reached == steps and missing:  # a resumed run has no such digests until it finishes again
        yield f"{digests_path(log)}: has no digest of {', '.join(missing)}; its last lines were removed"


def _study_problems(folder: Path) -> Iterator[str]:
    try:
        known = run_record.read_saved_json(folder / DECLARATION)
        check_declared(folder, known, known)
        if (folder / DECLARATION).read_bytes() != run_record.durable_json(known):
            yield (
                f"{folder / DECLARATION}: its spaces or the order of its keys were changed; restore the file "
                "from a copy"
            )
        check_chain(folder / LEDGER)  # before its lines are parsed
        log = [json.loads(line) for line in whole_lines(folder / LEDGER)]
        check_study(folder, log)
        if log and log[0].get("declared") != known["digest"]:
            yield (
                f"{folder / LEDGER}: its first line names the digest of another declaration than "
                f"{DECLARATION}; one of the two files is from another study"
            )
        for trial in sorted((folder / TRIALS).iterdir()) if (folder / TRIALS).is_dir() else ():
            yield from _checkpoint_problems(trial)
        yield from _page_problems(folder, bool(log) and bool(log[-1].get("finished")))
    except ValueError as error:
        yield str(error)


def _page_problems(folder: Path, finished: bool) -> Iterator[str]:
    """Yield a line for each page or table that differs from the one made from the record, or about a page of
    an unfinished study. Pictures are not compared: their bytes depend on matplotlib's version.
    """
    page = folder / REPORT
    if page.is_file() and not finished:
        yield f"{folder / LEDGER}: is not finished, but the study has {REPORT}; its last lines were removed"
    if not finished:
        return
    for path, content in appendix_files(read_study(folder)).items():
        if path.is_file() and _without_picture(path.read_bytes()) != _without_picture(content):
            yield (
                f"{path}: differs from what jaxft {__version__} writes for this study; write it again by "
                f"`jaxft study {folder} --report`"
            )


def _without_picture(content: bytes) -> bytes:
    return re.sub(rb"data:image/png;base64,[^\"]*", b"", content)


def recompute_step(folder: Path, step: int) -> list[str]:
    """Repeat a run's training up to `step`, from the checkpoint before it or from the start, and compare with
    the log and, if there is one, the checkpoint of that step. Return a line about each comparison.

    Nothing is written. Raises ValueError if a bit differs, if settings have changed that affect the result,
    for a run that samples its batches or has no command line in its record, or if the step was not logged;
    Corrupt for a damaged checkpoint.
    """
    logged = [without_perf(e) for e in read_entries(folder / METRICS) if e["step"] == step and "loss" in e]
    if not logged:
        raise ValueError(f"{folder / METRICS}: has no training metrics of step {step}; choose a logged step")
    line = run_record.read_record(folder).get("command", {}).get("line") or []
    if not line:
        raise ValueError(
            f"{folder / 'config.json'} has no command line; a step can be repeated only of a run that "
            "`jaxft train` started"
        )
    settings, _ = open_settings.fitted(open_settings.resolve(line[0], line[1:]))
    run = settings.value
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        job = prepare(run, settings.describe(), folder)
        changes = run_record.changes_since_start(folder, job.lead.record, recorded_defaults(run))
        if job.info.samples:
            raise ValueError(
                f"{folder}: its batches are sampled, so a step cannot be repeated; --step works only for "
                "runs on fixed rows, such as SFT or DPO"
            )
        saved = Checkpoints(folder / CHECKPOINTS)
        before = max((number for number in saved.steps() if number < step), default=0)
        for number in {before, step} & {*saved.steps()}:
            verify(folder / CHECKPOINTS / str(number))  # before restore, which renames a corrupt checkpoint
        metrics, state = _steps(job, saved, before, step)
        after = saved.restore(job.abstract_states, step) if step in saved.steps() else None
    origin = f"the checkpoint of step {before}" if before else "the start"
    where = f"step {step}, computed again from {origin}"
    reasons, record = changes, folder / "env.json"
    if record.is_file():
        reasons = [*changes, *environment_changes(run_record.read_saved_json(record), environment())]
    because = f" (since then: {'; '.join(reasons[:4])})" if reasons else ""
    if metrics not in logged:
        names = [name for name, value in logged[-1].items() if metrics.get(name) != value]
        shown = ", ".join(f"{name} {logged[-1][name]} -> {metrics.get(name)}" for name in names[:4])
        raise ValueError(f"{folder}: {where}, has other metrics than the log: {shown}{because}")
    lines = [f"{where}: its {len(metrics) - 1} metrics equal the log's, to the bit"]
    if after is not None:
        wrong = differing_leaves(state, after[0])
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(
                f"{folder}: {where}, has another state than its checkpoint: {wrong[0]}{more}{because}"
            )
        lines.append(f"{where}: its state equals the checkpoint's, to the bit")
    return lines


def _steps(job: Job, saved: Checkpoints, before: int, step: int) -> tuple[dict[str, Any], Any]:
    """Train from the checkpoint of step `before` (0: from the start) to `step`; return (the log entry of
    `step`, the states after it).
    """
    restored = saved.restore(job.abstract_states, before) if before else None
    states, meta = (restored[0], restored[1]) if restored else (None, None)
    job = continued(job, meta, before)
    logs = Logs([NullLog()])
    job, states, frozen, compiled = load_and_compile(job, states, meta, logs, Watchdog(job.lead.run.hosts))
    meters = Meters(job, meta["counters"] if meta else None)
    numbers: list[dict[str, float]] = [{}]
    for number in range(before, step):
        rows, batch, sampled = next_batch(job, number, states, logs.clock, Watchdog(job.lead.run.hosts))
        states, metrics = compiled.step(states, frozen, batch)
        meters.add(number, rows, {**metrics, **sampled})
        if (number + 1) % job.lead.run.loop.log_every == 0 or number + 1 == job.steps:
            numbers, _ = meters.read()
    return json.loads(format_line(step, numbers[0], {})), states


def differing_leaves(one: Any, other: Any) -> list[str]:
    """Return the paths of the arrays that differ in at least one bit between two pytrees of one structure."""
    first, second = (
        {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()} for tree in (one, other)
    )
    return [name for name, x in first.items() if x.tobytes() != second[name].tobytes()]
