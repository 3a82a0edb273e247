"""A run from its settings to its results: the loop, top to bottom. What it compiles is in programs.py."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.data.source import Source
from jaxft.distributed import processes, sharding
from jaxft.distributed.watchdog import Watchdog
from jaxft.inference.generate import stop_tokens
from jaxft.rl.programs import BoundRun
from jaxft.rl.rollout import BoundRollouts
from jaxft.runs import folder as runfolder
from jaxft.runs import report
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.interrupt import Interrupt, signal_name
from jaxft.runs.log import Log, NullLog
from jaxft.runs.record import describe, differences
from jaxft.runs.report import Evaluation
from jaxft.runs.trackers.jsonl import truncate
from jaxft.train import evaluate, export, programs, reference, samples
from jaxft.train.meter import Meter, Trace
from jaxft.train.programs import Programs, build, compile_eval, compile_step, placed, reference_step, start
from jaxft.train.settings import Run
from jaxft.weights import adapters, hf_write, hub, pretrained


@dataclass(frozen=True)
class Job:
    """A run that may go: checked, locked, with its rows and its log."""

    run: Run
    steps: int
    programs: Programs
    tokenizer: Any
    source: Source[Any]
    general: tuple[Any, ...]
    saved: Checkpoints
    log: Log | NullLog
    folder: Path
    record: dict[str, Any]


def run(r: Run, record: dict[str, Any], root: Path = Path("runs")) -> int:
    """Train, or go on where the run folder's newest checkpoint stands. Returns the process's exit code.

    record: the settings as JSON (describe.describe). 0: finished; 128 + n: stopped by signal n with everything saved.
    Raises ValueError, FileNotFoundError or OSError with one line that says what to change.
    """
    folder = runfolder.folder_of(root, r.name)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(r.hosts))
        job, changes = processes.agreed(lambda: _checked(stack, r, record, folder))
        if job is None:
            return 0
        restored = job.saved.restore(job.programs.state)
        job = processes.agreed(lambda: _begun(stack, job, restored, changes))
        stack.enter_context(watchdog.over())
        return _go(job, restored, watchdog)


def _checked(
    stack: contextlib.ExitStack, r: Run, record: dict[str, Any], folder: Path
) -> tuple[Job | None, list[str]]:
    """(the run, what has changed since it was started), the same on every process; no run where it is finished."""
    processes.by_first(lambda: bool(stack.enter_context(runfolder.lock(folder))))
    stack.enter_context(jax.set_mesh(sharding.make_mesh(r.mesh)))
    tokenizer = pretrained.load_tokenizer(r.weights)
    shards = sharding.row_shards(sharding.make_mesh(r.mesh))
    source = processes.first_then_others(lambda: r.data.open(tokenizer, shards))
    general = evaluate.general_source(r.data, r.general, tokenizer, shards)
    for each in (source, general):
        programs.check_token_ids(each, r.model, r.weights)
    steps = r.loop.steps or source.info.steps
    whole = source.info.steps_per_rollout
    if steps % whole:
        near = f"{steps - steps % whole} or " if steps > whole else ""
        raise ValueError(
            f"loop.steps={steps} ends inside a rollout, of which each is {whole} steps (data.passes x data.minibatches); "
            f"set {near}{steps + whole - steps % whole}"
        )
    p = build(r, steps)
    placed(p, source.shapes[-1])  # rows that don't divide over the mesh are refused before anything is loaded
    record = {**record, **data_fingerprints(source), **identity(r)}
    processes.check_same(runfolder.process_independent(record), differences)
    saved = stack.enter_context(
        contextlib.closing(Checkpoints(folder / "checkpoints", r.loop.keep_last, r.loop.keep_best))
    )
    done, changes = processes.by_first(
        lambda: runfolder.resume_point(folder, record, saved.latest() is not None)
    )
    if done >= steps:
        if processes.is_first():
            print(f"{folder}: this run is finished ({done} steps); its results are in {folder / 'README.md'}")
            print("to go on with it, raise loop.steps or data.epochs; to start anew, choose another name=...")
        return None, changes
    held_out = () if general is None else general.held_out
    return Job(r, steps, p, tokenizer, source, held_out, saved, NullLog(), folder, record), changes


def _begun(stack: contextlib.ExitStack, job: Job, restored: Any, changes: list[str]) -> Job:
    """The run with its record written and its log open, on process 0; the opening lines are said."""
    r, p, folder, record, first = (
        job.run,
        job.programs,
        job.folder,
        job.record,
        restored[2] if restored else 0,
    )
    if first > job.steps:
        raise ValueError(
            f"{folder}: the run is after step {first} already and loop.steps={job.steps}; raise it to go on"
        )
    if restored:
        changes = runfolder.permitted_changes(folder, restored[1]["record"], record)
    if not processes.is_first():
        return job
    runfolder.write_record(folder, record)
    truncate(folder / "completions.jsonl", first)
    log = stack.enter_context(contextlib.closing(Log(folder, job.steps, first, trackers=r.trackers)))
    how_held = pretrained.storage_changes(r.weights, p.trained.stored)
    for origin in dict.fromkeys((r.start, *(one.start for one in r.beside.values()))):
        how_held += (
            adapters.base_differences(origin, record["weights_fingerprint"], r.quant) if origin else []
        )
    for line in (*startup_lines(job, first, changes), *how_held):
        log.message(line)
    log.listen(p.objective.report.alarms)
    return replace(job, log=log)


def identity(r: Run) -> dict[str, Any]:
    """What a run's record says about its weights, so that a continuation has the same: hashes, and where a folder lies."""
    known = {"weights_fingerprint": runfolder.weights_fingerprint(r.weights)}
    if Path(r.weights).exists():
        known["weights_path"] = str(Path(r.weights).resolve())
    if r.start:
        known["start_fingerprint"] = runfolder.adapter_fingerprint(adapters.adapter_folder(r.start))
    for name, one in r.beside.items():
        if one.start:
            known[f"{name}_fingerprint"] = runfolder.adapter_fingerprint(adapters.adapter_folder(one.start))
        if one.weights:
            known[f"{name}_fingerprint"] = runfolder.weights_fingerprint(one.weights)
    return known


def data_fingerprints(source: Source[Any]) -> dict[str, str]:
    """Return what a run's record stores of its data: a hash of the batches, and of the models that they depend on."""
    return {"data_fingerprint": source.info.fingerprint, **source.info.dependencies}


@dataclass(frozen=True)
class Ready:
    """A run that is loaded and compiled. measure(state): held-out numbers, by their names in the log; look(state): those, general
    text's, and answers. source: batches, with the reference's log-probs where those are computed beforehand.
    """

    job: Job
    source: Source[Any]
    frozen: Any
    train_step: Callable
    measure: Callable[[TrainState], dict[str, float]]
    look: Callable[[TrainState], dict[str, Any]]

    def whole(self, state: TrainState) -> Any:
        """All parameters."""
        return tree.combine(state.trainable, self.frozen)


def _go(job: Job, restored: tuple[TrainState, dict[str, Any], int] | None, watchdog: Watchdog) -> int:
    """Load and compile, look, train, look again, write the results."""
    watchdog.at("loading and compiling")
    ready, state = _ready(job, restored, watchdog)
    kept: dict[str, Any] = restored[1] if restored else {"before": ready.look(state), "counters": None}
    if not restored and kept["before"]["metrics"]:
        job.log.step(0, kept["before"]["metrics"], {})
    state, done, stop = _trained(ready, state, (restored[2] if restored else 0, kept), watchdog)
    watchdog.at(f"what comes after step {done}")
    if stop:
        job.log.message(
            f"stopped by {signal_name(stop)} after step {done}, saved; the same command goes on from here"
        )
        processes.meet()  # nobody leaves while another one saves
        return 128 + stop
    after: Any = ready.look(state)
    if after["metrics"]:
        job.log.step(job.steps, after["metrics"], {})
    out = export.export_run(job.programs.trained, ready.whole(state), job.run, job.tokenizer, job.folder)
    del state  # the best step's may need its room
    _finish(ready, out, kept["before"], after)
    return 0


def _ready(job: Job, restored: Any, watchdog: Watchdog) -> tuple[Ready, TrainState]:
    """(the run with its weights on the mesh and its programs compiled, the state to go on from)."""
    r, p, source, log = job.run, job.programs, job.source, job.log

    def say(line: str) -> None:
        watchdog.at(line)
        log.message(line)

    if p.objective.facts.reference == "precomputed":
        source = with_reference(r, p, source, job.record, say)
    state, frozen = start(r, p, restored[0] if restored else None)
    begin = time.perf_counter()
    bound = BoundRun(
        mesh=p.mesh,
        model=p.trained.model,
        objective=p.objective,
        state=p.state,
        frozen_shapes=p.frozen,
        frozen=frozen,
        stop=stop_tokens(r.model.config.eos, job.tokenizer),
        folder=job.folder,
        fused_backward=p.optimizer.fused_backward,
    )
    source = source.bind(bound, restored[1].get("source") if restored else None)
    evaluated = compile_eval(p, p.eval_step, frozen, source.held_out)
    on_general = compile_eval(p, p.text_step, frozen, job.general)
    whole = tree.combine(p.state.trainable, p.frozen)
    answer = samples.answerer(p.trained.model, r.sampling, whole, source, job.tokenizer, r.samples)
    train_step = compile_step(p, *source.shapes)
    processes.meet()  # the first collectives give up where another process still compiles
    asked = f" and {r.samples} held-out prompts are answered" if source.held_out and r.samples else ""
    log.message(
        f"compiled in {time.perf_counter() - begin:.1f} s"
        + ("" if restored else f"; now the loss is measured{asked}")
    )

    def measure(state: TrainState) -> dict[str, float]:
        found = source.evaluate(state)
        found = evaluated(state) if found is None else found
        return {f"eval_{name}": value for name, value in found.items()}

    def look(state: TrainState) -> dict[str, Any]:
        general = {"general_loss": on_general(state)["loss"]} if job.general else {}
        return {
            "metrics": {**measure(state), **general},
            "samples": answer(tree.combine(state.trainable, frozen)),
        }

    return Ready(job, source, frozen, train_step, measure, look), state


def _trained(
    ready: Ready, state: TrainState, begun: tuple[int, Any], watchdog: Watchdog
) -> tuple[TrainState, int, int]:
    """(the state, steps done, a signal that asked to stop or 0); begun: steps done before, and what its checkpoint keeps."""
    job, source, (done, kept) = ready.job, ready.source, begun
    r, p, log, stop = job.run, job.programs, job.log, 0
    rates = np.asarray(jax.jit(jax.vmap(p.optimizer.schedule))(jnp.arange(job.steps)))
    meter = Meter(p.trained, rates, source, r.loop.max_bad, kept["counters"])
    votes = processes.Votes(p.mesh)
    boundary = source.info.steps_per_rollout
    profile = r.loop.profile if processes.is_first() else None
    with (
        Interrupt() as interrupt,
        contextlib.closing(Trace(profile, job.folder / "profile")) as trace,
    ):
        for step in range(done, job.steps):
            done = step + 1
            watchdog.step(done)
            trace.before(done)
            stopping = votes.cast(lambda: interrupt.signal)
            if step % boundary == 0 and isinstance(source, BoundRollouts):
                watchdog.at(
                    f"the rollout before step {done}"
                )  # its bound is that of a phase: rewards may be slow functions
                batch, numbers = source.batch(step, state)
                watchdog.step(done)
            else:
                batch, numbers = source.batch(step, state)
            state, found = ready.train_step(state, ready.frozen, sharding.place_batch(p.mesh, batch))
            meter.add(step, batch, {**found, **numbers})
            trace.after(done, state)
            if done % r.loop.log_every == 0 or done == job.steps:
                log.step(done, *meter.read())
            score, stop = None, stop or stopping()
            if (
                done % boundary and done < job.steps
            ):  # inside a rollout nothing is saved, so nothing else is done
                continue
            if due(r.loop.eval_every, done, boundary) and done < job.steps and source.info.stats.held_out:
                watchdog.at(f"the evaluation after step {done}")
                with meter.aside():
                    measured = ready.measure(state)
                score = evaluate.selection_score(measured)
                log.step(done, measured, {})
            if due(r.loop.save_every, done, boundary) or done == job.steps or score is not None or stop:
                meta = {
                    "record": job.record,
                    "counters": meter.counters(),
                    "before": kept["before"],
                    "source": source.state_dict(),
                }
                watchdog.at(f"saving after step {done}")
                job.saved.save(done, state, meta, score)
            if stop:
                break
        job.saved.wait()
    return state, done, stop


def due(every: int | None, done: int, boundary: int) -> bool:
    """Whether a multiple of `every` steps has come within the last `boundary` steps."""
    return bool(every) and done // every > (done - boundary) // every  # type: ignore[operator]


def _finish(ready: Ready, out: Path, before: Evaluation, after: Evaluation) -> None:
    """Write the best step's weights if they are better, the card and the summary. out: where the last step's are; before, after:
    what was seen at step 0 and at the end.
    """
    job, log = ready.job, ready.job.log
    r, p = job.run, job.programs
    better = better_step(job.saved, after["metrics"])
    if better is not None:
        best: Any = job.saved.restore(p.state, better)
        kept_at = export.export_run(p.trained, ready.whole(best[0]), r, job.tokenizer, job.folder / "best")
        log.message(
            f"step {better} did better on held-out rows than the end; the weights of that step are in {kept_at}"
        )
    words = p.objective.report.summary(log.first, log.last)
    if processes.is_first():
        write_card(job, out, before, after, words)
        summary = {"steps": job.steps, "before": before, "after": after, "alarms": log.alarms}
        runfolder.write_json(job.folder / "summary.json", summary)
    processes.meet()  # the run is finished for all or for none
    notes = [*words, *log.alarms]
    for line in report.result_lines(job.folder, out, before, after, notes, r.model.generates):
        log.message(line)


def startup_lines(job: Job, first: int, changes: list[str]) -> list[str]:
    """What is about to happen, for the start of a run that has done `first` steps."""
    shards = sharding.row_shards(job.programs.mesh)
    return report.startup_lines(
        f"devices: {len(jax.devices())} x {jax.devices()[0].device_kind}, processes: {jax.process_count()}",
        programs.model_summary(job.programs),
        [
            f"{job.source.info.stats.summary}; {job.steps} steps",
            *report.empty_slot_lines(programs.step_rows(job.run.data, shards)),
        ],
        job.source.info.preview,
        report.resumed_lines(first, changes) if first else [],
    )


def better_step(saved: Checkpoints, metrics: dict[str, float]) -> int | None:
    """The step of a kept checkpoint that did better on held-out rows than the end; None where there is none."""
    best, end = saved.best(), evaluate.selection_score(metrics)
    return best[0] if best and end is not None and best[1] < end else None


def write_card(job: Job, out: Path, before: Evaluation, after: Evaluation, notes: list[str]) -> None:
    """Write the run's model card. notes: the objective's summary; the alarms follow it."""
    run = job.run
    located = hub.locate(run.weights, config_only=True)
    hosted = run.weights.partition("@")[0] if located.revision else None
    card = report.ModelCard(
        name=run.name,
        base=run.weights if hosted or run.weights.startswith("pypi:") else Path(run.weights).name,
        hosted=hosted,
        data=Path(run.data.train).name,
        examples=job.source.info.stats.examples,
        steps=job.steps,
        batch=run.data.batch,
        optimizer=job.programs.optimizer.name,
        lr=run.optim.lr,
        seed=run.seed,
        model=programs.model_summary(job.programs),
        adapter=run.adapter,
        merged=out.name == "model",
        before=before,
        after=after,
        notes=[*notes, *job.log.alarms],
        completions=report.completions_section(job.folder),
        pad=None if run.model.generates else hf_write.with_distinct_pad_token(job.tokenizer).pad_token_id,
    )
    (job.folder / "README.md").write_text(report.model_card(card), encoding="utf-8")


def with_reference(
    run: Run, p: Programs, source: Any, record: dict[str, Any], say: Callable[[str], None]
) -> Any:
    """The pair source with the log-probs of the model at step 0, from disk where they were computed before."""
    settings = describe(run.model) | ({"quant": describe(run.quant)} if run.quant else {})
    path = reference.place(
        reference.identity(record["weights_fingerprint"], record.get("start_fingerprint"), settings)
    )

    def compute(batches: Any) -> Any:
        state, frozen = start(run, p, None)
        whole = tree.combine(state.trainable, frozen)
        logps = reference_step(p)
        for number, batch in enumerate(batches, 1):
            yield np.asarray(logps(whole, sharding.place_batch(p.mesh, batch)))[None]
            if number % 10 == 0 or number == len(batches):
                say(f"reference log-probs: {number} of {len(batches)} batches")

    return reference.attach(source, path, compute, say)
