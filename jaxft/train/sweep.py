"""Several runs trained together: one base in memory and one compiled step; an adapter, an optimizer and a log for each.

Every member comes out as its run alone would: `runs/<sweep>/<label>/` is a run's folder, with metrics.jsonl, config.json,
adapter/ and a model card. Beside them lie the table (README.md, summary.json), curves.png and the checkpoints of all.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.distributed import sharding
from jaxft.runs import compare
from jaxft.runs import folder as runfolder
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.interrupt import Interrupt, signal_name
from jaxft.runs.log import Log
from jaxft.runs.record import describe, differences
from jaxft.runs.report import Evaluation
from jaxft.runs.trackers.jsonl import read_entries
from jaxft.train import evaluate, export, multi_adapter, programs
from jaxft.train import loop as train
from jaxft.train.loop import Job
from jaxft.train.programs import build, start
from jaxft.train.settings import Run
from jaxft.train.sweep_programs import Meters, Shared, batches, compile_all, largest
from jaxft.weights import pretrained

# What runs that are trained together may have each for itself.
MAY_DIFFER = (
    "name",
    "objective",
    "optim",
    "seed",
    "data.seed",
    "adapter.rank",
    "adapter.alpha",
    "adapter.rslora",
)


def check(runs: Mapping[str, Run], at_once: int = 1) -> None:
    """Raise ValueError where runs can't be trained together: other differences than MAY_DIFFER, no adapter, or dropout."""
    if not runs:
        raise ValueError("a sweep has no runs; give it at least one")
    if at_once < 1 or len(runs) % at_once:
        fits = ", ".join(str(n) for n in range(1, len(runs) + 1) if len(runs) % n == 0)
        raise ValueError(f"{len(runs)} adapters don't divide into blocks of {at_once}; use one of {fits}")
    (label, first), *rest = runs.items()
    for run in runs.values():
        if run.adapter is None or run.train is not None or run.beside:
            raise ValueError(
                "runs are trained together as adapters on one base: without full=true, run.train and run.beside"
            )
        if run.adapter.dropout:
            raise ValueError(
                f"adapter.dropout={run.adapter.dropout}: adapters with dropout are trained alone; set it to 0"
            )
    known = describe(first)
    for other, run in rest:
        for line in differences(known, describe(run)):
            where = line.partition(":")[0]
            if not any(where == name or where.startswith(name + ".") for name in MAY_DIFFER):
                raise ValueError(
                    f"{other} and {label} differ in {line}; runs that are trained together differ in {', '.join(MAY_DIFFER)} only"
                )
    seeds = {run.data.seed for run in runs.values()}
    if len(seeds) > 1 and isinstance(first.data.held_out, float) and first.data.held_out:
        raise ValueError(
            f"data.held_out={first.data.held_out} is drawn by the seed, and the seeds differ; give a file, or held_out=none"
        )


def run(runs: Mapping[str, Run], name: str, root: Path = Path("runs"), at_once: int = 1) -> int:
    """Train all runs, or go on where the newest checkpoint stands. Returns the process's exit code, as train.run does.

    runs: by label, which is also the name of the member's folder. at_once: adapters in one forward pass, a divisor of their
    number; more of them cost activations and pay where one leaves the device idle.
    """
    check(runs, at_once)
    folder = runfolder.folder_of(root, name)
    lead = next(iter(runs.values()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(runfolder.lock(folder))
        stack.enter_context(jax.set_mesh(sharding.make_mesh(lead.mesh)))
        tokenizer = pretrained.load_tokenizer(lead.weights)
        shards = sharding.row_shards(sharding.make_mesh(lead.mesh))
        apart = len({r.data.seed for r in runs.values()}) > 1
        sources = [r.data.open(tokenizer, shards) for r in (runs.values() if apart else [lead])]
        general = evaluate.general_source(lead.data, lead.general, tokenizer, shards)
        for source in (*sources, general):
            programs.check_token_ids(source, lead.model, lead.weights)
        steps = lead.loop.steps or min(s.info.steps for s in sources)
        same = train.identity(lead)
        fingerprints = [{**train.data_fingerprints(s), **same} for s in sources] * (1 if apart else len(runs))
        records = {
            label: {**describe(r), **known}
            for (label, r), known in zip(runs.items(), fingerprints, strict=True)
        }
        saved = stack.enter_context(
            contextlib.closing(Checkpoints(folder / "checkpoints", lead.loop.keep_last, 0))
        )
        done = runfolder.finished_steps(folder)
        changes = _check_records(folder, records) if done or saved.latest() is not None else []
        if done >= steps:
            print((folder / "README.md").read_text(encoding="utf-8"))
            print(
                f"{folder}: this sweep is finished ({done} steps); its results are in {folder / 'README.md'}"
            )
            print("to go on with it, raise loop.steps or data.epochs; to start anew, choose another --name")
            return 0
        built = [build(r, steps) for r in runs.values()]
        restored = saved.restore(tuple(p.state for p in built))
        first = restored[2] if restored else 0
        if first > steps:
            raise ValueError(
                f"{folder}: the sweep is after step {first} already and loop.steps={steps}; raise it to go on"
            )
        log = stack.enter_context(contextlib.closing(Log(folder, steps, first, trackers=lead.trackers)))
        jobs = []
        for number, (label, r) in enumerate(runs.items()):
            own = folder / label
            own.mkdir(exist_ok=True)
            runfolder.write_record(own, records[label])
            each = stack.enter_context(contextlib.closing(Log(own, steps, first, quiet=True)))
            each.listen(built[number].objective.report.alarms)
            source, held = sources[number if apart else 0], () if general is None else general.held_out
            jobs.append(
                Job(r, steps, built[number], tokenizer, source, held, saved, each, own, records[label])
            )
        runfolder.write_json(folder / "config.json", {"members": list(runs), "at_once": at_once})
        for line in train.startup_lines(jobs[0], first, changes):
            log.message(line)
        log.message(
            "\n".join(
                [f"{len(jobs)} runs on one base:", *(f"{n:3d}  {label}" for n, label in enumerate(runs, 1))]
            )
        )
        return _go(Shared(name, folder, tuple(runs), tuple(jobs), apart, at_once, saved, log), restored)


def _check_records(folder: Path, records: dict[str, Any]) -> list[str]:
    """Harmless changes since the sweep began. Raises ValueError for others, and for other members."""
    path = folder / "config.json"
    known = runfolder.read_json(path)["members"] if path.exists() else list(records)
    if known != list(records):
        raise ValueError(
            f"{folder}: this sweep is of {', '.join(known)}; found {', '.join(records)}; choose another --name"
        )
    changes = [
        line
        for label, record in records.items()
        for line in runfolder.changes_since_start(folder / label, record)
    ]
    return list(dict.fromkeys(changes))


def _start(s: Shared, restored: Any) -> tuple[tuple[TrainState, ...], Any]:
    """(states, (base, each member's own frozen leaves)): the base is loaded once."""
    states, own, base = [], [], None
    for number, job in enumerate(s.jobs):
        state, frozen = start(job.run, job.programs, restored[0][number] if restored else None, base)
        base = frozen["base"]
        states.append(state)
        own.append(multi_adapter.own(frozen))
    return tuple(states), (base, tuple(own))


def _go(s: Shared, restored: Any) -> int:
    """Load and compile, measure, train, measure again, write the results."""
    sources = [job.source for job in (s.jobs if s.apart else s.jobs[:1])]
    if s.lead.programs.objective.facts.reference == "precomputed":
        sources = [
            train.with_reference(job.run, job.programs, source, job.record, s.log.message)
            for job, source in zip(s.jobs, sources, strict=False)
        ]
        s = replace(
            s, jobs=tuple(replace(job, source=sources[k if s.apart else 0]) for k, job in enumerate(s.jobs))
        )
    states, frozen = _start(s, restored)
    begin, shapes = time.perf_counter(), largest(sources)
    p = compile_all(s, states, frozen, batches(s, sources, 0, shapes)[1])
    s.log.message(f"compiled in {time.perf_counter() - begin:.1f} s")

    def measure(states: Any) -> list[dict[str, float]]:
        return [{f"eval_{name}": value for name, value in found.items()} for found in p.measure(states)]

    def look(states: Any) -> list[dict[str, float]]:
        general = [{"general_loss": g["loss"]} if g else {} for g in p.general(states)]
        return [{**found, **more} for found, more in zip(measure(states), general, strict=True)]

    def tell(step: int, found: list[dict[str, float]], perf: list[dict[str, float]]) -> None:
        for job, numbers, own in zip(s.jobs, found, perf, strict=True):
            if numbers:
                job.log.step(step, numbers, own)
        shown = {}
        for name in ("loss", "eval_loss"):  # by number: eight labels don't fit a line
            shown.update({f"{name} {number}": n[name] for number, n in enumerate(found, 1) if name in n})
        if shown:
            s.log.step(step, shown, _added(perf))

    kept: dict[str, Any] = restored[1] if restored else {"before": look(states), "counters": None}
    before, first, loop = kept["before"], restored[2] if restored else 0, s.lead.run.loop
    nothing: list[dict[str, float]] = [{} for _ in s.jobs]
    if not restored:
        tell(0, before, nothing)
    meters, done = Meters(s, kept["counters"]), first
    with Interrupt() as interrupt:
        for step in range(first, s.lead.steps):
            done = step + 1
            each, batch = batches(s, sources, step, shapes)
            states, found = p.step(states, frozen, sharding.place_batch(s.lead.programs.mesh, batch))
            meters.add(step, each, found)
            if done % loop.log_every == 0 or done == s.lead.steps:
                told = meters.read()
                tell(done, [numbers for numbers, _ in told], [perf for _, perf in told])
            if (
                loop.eval_every
                and done % loop.eval_every == 0
                and done < s.lead.steps
                and s.lead.source.held_out
            ):
                with meters.aside():
                    tell(done, measure(states), nothing)
            stop = interrupt.signal
            if done % loop.save_every == 0 or done == s.lead.steps or stop:
                meters.take()
                s.saved.save(
                    done, states, {"counters": [m.counters() for m in meters.each], "before": before}
                )
            if stop:
                break
        s.saved.wait()
    if interrupt.signal:
        name = signal_name(interrupt.signal)
        s.log.message(f"stopped by {name} after step {done}, saved; the same command goes on from here")
        return 128 + interrupt.signal
    after = look(states)
    tell(s.lead.steps, after, nothing)
    after = [{**numbers, **_trained(job)} for job, numbers in zip(s.jobs, after, strict=True)]
    _write(s, states, frozen, (before, after))
    return 0


def _trained(job: Job) -> dict[str, float]:
    """What the table takes from a member's training steps: how many were skipped, and the last one's numbers."""
    entries = read_entries(job.folder / "metrics.jsonl")
    last = {name: entry[name] for entry in entries for name in compare.TRAINED if entry.get(name) is not None}
    return {**last, "skipped": sum(entry.get("skipped", 0) for entry in entries)}


def _added(perf: list[dict[str, float]]) -> dict[str, float]:
    """The members' rates in sum; time and memory are of all."""
    if not perf[0]:
        return {}
    return {**perf[0], **{name: sum(own[name] for own in perf) for name in ("tokens_per_second", "mfu")}}


def _write(
    s: Shared, states: Any, frozen: Any, looks: tuple[list[dict[str, float]], list[dict[str, float]]]
) -> None:
    """Each member's adapter, card and summary; then table and picture of all."""
    for job, state, own, before, after in zip(s.jobs, states, frozen[1], *looks, strict=True):
        whole = tree.combine(state.trainable, {"base": frozen[0], **own})
        out = export.export_run(job.programs.trained, whole, job.run, job.tokenizer, job.folder)
        start, end = (Evaluation(metrics=found, samples=[]) for found in (before, after))
        words = job.programs.objective.report.summary(job.log.first, job.log.last)
        train.write_card(job, out, start, end, words)
        summary = {"steps": job.steps, "before": start, "after": end, "alarms": job.log.alarms}
        runfolder.write_json(job.folder / "summary.json", summary)
    curves = {
        label: read_entries(job.folder / "metrics.jsonl") for label, job in zip(s.labels, s.jobs, strict=True)
    }
    table = compare.Table.of(s.labels, *looks)
    compare.write(s.folder, s.name, table, curves)
    runfolder.write_json(s.folder / "summary.json", {"steps": s.lead.steps, "members": table.as_json()})
    for label, job in zip(s.labels, s.jobs, strict=True):
        for alarm in job.log.alarms:
            s.log.message(f"{label}: {alarm}")
    s.log.message("\n" + table.text())
    s.log.message(
        f"the table is in {s.folder / 'README.md'}, the curves in {s.folder / 'curves.png'}, each run's folder beside"
    )
