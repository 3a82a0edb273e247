"""The train loop: `run` takes a run, or a sweep of several, from its settings to its results."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxft.distributed import processes, sharding
from jaxft.distributed.exit import Interrupt, signal_name
from jaxft.distributed.processes import Watchdog
from jaxft.runs import run_record
from jaxft.runs.folder_copies import Copies
from jaxft.runs.metrics_log import METRICS
from jaxft.runs.trackers import Tracker
from jaxft.train.compiled import Compiled, compile_run
from jaxft.train.evaluate.run_evaluations import (
    continued,
    end_by_callback,
    end_if_due,
    evaluate_during,
    evaluate_end,
    evaluate_start,
    last_faults,
)
from jaxft.train.export.finished_run import export_best, export_members, report_finished, write_reports
from jaxft.train.logs.clock import Clock
from jaxft.train.logs.logs import Logs, announce, open_logs
from jaxft.train.logs.meter import Meters, Trace
from jaxft.train.logs.nonfinite import NonfiniteRecorder
from jaxft.train.multi_adapter import compile_sweep
from jaxft.train.settings import Run, steps_between
from jaxft.train.start.jobs import (
    Job,
    Record,
    bind_sources,
    load_members,
    open_checkpoints,
    prepare,
    resume_point,
    run_folder,
)
from jaxft.train.start.reference_logprobs import precompute
from jaxft.train.sweep import Sweep, check_members, reason_to_separate, with_one_split, write_table

SIGNAL = 128  # the exit code of a run that signal n stopped is 128 + n
END_RUN = 1000  # the vote of a callback that ends the run; votes for a signal have its number


def run(
    settings: Run | Sweep,
    record: Record | None = None,
    root: Path = Path("runs"),
    callbacks: Sequence[Tracker] = (),
    clock: Clock | None = None,
) -> int:
    """Train, or resume from the newest checkpoint; return the exit code of the process.

    record: the settings as JSON, for config.json; by default from `settings`. root: the folder in which the
    run's folder is. callbacks: trackers in addition to run.trackers. clock: a running Clock that already
    counts earlier work, such as measuring the rows' lengths. Returns 0 if finished, 1 if a member of a sweep
    is not, 128 + n if signal n stopped it. Raises ValueError or OSError with a remedy.
    """
    lead = settings if isinstance(settings, Run) else settings.lead
    loop, folder, clock = lead.loop, run_folder(settings, root), clock or Clock()
    with ExitStack() as stack:
        # ---------- Settings, rows, shapes: a user error ends all processes here ----------
        watchdog = stack.enter_context(Watchdog(lead.hosts))
        with processes.agreement():
            processes.from_first_process(lambda: bool(stack.enter_context(run_record.lock(folder))))
            stack.enter_context(jax.set_mesh(sharding.make_mesh(lead.mesh)))
            job = prepare(settings, record, folder)
            checkpoints, copies = stack.enter_context(open_checkpoints(job))
            finished, changes = processes.from_first_process(lambda: resume_point(job, checkpoints))
        if finished:
            return report_finished(job, finished)

        # ---------- The newest checkpoint; the log ----------
        states, saved, first = checkpoints.restore(job.abstract_states) or (None, None, 0)
        job = continued(job, saved, first)
        with processes.agreement():
            logs = stack.enter_context(closing(open_logs(job, first, saved, changes, callbacks, clock)))
            copies.accepted()  # of loop.store, now that no setting can be refused
        stack.enter_context(watchdog.guard())

        # ---------- Weights on the mesh, sources, compiled programs ----------
        job, states, frozen, compiled = load_and_compile(job, states, saved, logs, watchdog)

        # ---------- The model before training ----------
        saved = saved or evaluate_start(job, compiled, states, frozen, logs)

        # ---------- Training ----------
        meters, nonfinite = Meters(job, saved["counters"]), NonfiniteRecorder(job, logs)
        votes, done, stop = processes.Votes(job.lead.programs.mesh), first, 0
        with Interrupt() as interrupt, closing(Trace(loop.profile, folder / "profile")) as trace:
            for step in range(first, job.steps):
                done = step + 1
                stopping = votes.cast(lambda: END_RUN if logs.ends else interrupt.signal)
                rows, batch, sampled = next_batch(job, step, states, clock, watchdog)
                trace.before(done)
                states, metrics = compiled.step(states, frozen, batch)
                nonfinite.check(step, states, frozen, rows, metrics)
                meters.add(step, rows, {**metrics, **sampled})
                trace.after(done, states)
                if done % loop.log_every == 0 or done == job.steps:
                    logs.step(done, *meters.read())
                stop = stop or stopping()
                if stop == END_RUN and done % job.rollout_steps == 0:
                    job, stop = end_by_callback(job, saved, done, logs, meters), 0
                if done == job.steps:
                    saved["last_faults"] = last_faults(compiled, states, rows[0])
                if done % job.rollout_steps and done < job.steps:
                    continue  # save, evaluate and stop between rollouts only
                scores = []
                if due(loop.eval_every, done, job) and done < job.steps and job.info.stats.held_out:
                    with meters.paused():
                        watchdog.at(f"the evaluation after step {done}", after_step=True)
                        scores = evaluate_during(job, compiled, states, done, saved, logs)
                    job = end_if_due(job, saved, done, logs, meters)
                if due(loop.save_every, done, job) or done == job.steps or scores or stop:
                    saved["seconds"], counters = clock.phases(), meters.counters()  # waits for the step
                    watchdog.at(f"saving after step {done}", after_step=True)
                    checkpoints.save(done, states, job.to_save(counters, saved, logs.sync()), scores)
                if stop or done == job.steps:
                    break
        clock.at("saving")
        checkpoints.wait()
        watchdog.at(f"final evaluation and export (after step {done})")
        if stop:
            return stopped(stop, done, logs, copies)

        # ---------- The model after training: evaluation, weights, model card ----------
        after, finished = evaluate_end(job, compiled, states, saved.get("last_faults"), logs)
        weights = export_members(job, compiled.averaged(states), frozen, finished)
        del states  # make room for the best step's state
        export_best(job, checkpoints, compiled, frozen, after, logs)
        write_reports(job, logs, weights, saved["before"], after)
        return 0 if all(finished) else 1


def load_and_compile(
    job: Job, states: Any, saved: dict[str, Any] | None, logs: Logs, watchdog: Watchdog
) -> tuple[Job, Any, Any, Compiled]:
    """Load weights onto the mesh, and compile the programs. Log-probs of a precomputed reference policy are
    computed here too, unless they are cached.

    states, saved: arrays and JSON of the checkpoint, None without one. Returns (the job with sources that can
    sample completions from the model, each member's state, each member's frozen parameters, the programs).
    """
    watchdog.at("loading and compiling")
    logs.message(f"rows and settings read in {logs.clock.at('loading')}")
    job = precompute(job, partial(announce, watchdog, logs))
    states, frozen = load_members(job, states, partial(announce, watchdog, logs))
    logs.message(f"weights loaded in {logs.clock.at('compiling')}; compiling, or reading from the cache")
    with logs.clock.part("rollouts"):
        job = bind_sources(job, frozen, saved, logs.clock.counter)
    compiled = (compile_run if job.sweep is None else compile_sweep)(job, frozen, logs.clock)
    processes.barrier()  # collectives time out if another process is still compiling
    logs.message(f"compiled in {logs.clock.at('training')}")
    return job, states, frozen, compiled.timed(logs.clock)


def next_batch(
    job: Job, step: int, states: Any, clock: Clock, watchdog: Watchdog
) -> tuple[Any, Any, dict[str, Any]]:
    """Return (each source's batch, the batch that the train step takes, metrics of sampling) of a step. The
    first step of a rollout samples and scores the completions.
    """
    if job.info.samples and step % job.rollout_steps == 0:
        watchdog.at(f"the rollout before step {step + 1}")  # rewards may be slow functions
    with clock.within("sampling" if job.info.samples else "training"), clock.first("first batch"):
        prepared = job.batch(step, states)
    watchdog.step(step + 1)
    return prepared


def stopped(signal: int, done: int, logs: Logs, copies: Copies) -> int:
    """Report that the signal number `signal` stopped the run after `done` steps, to the log and to the copies
    in loop.store; return the exit code of the process, 128 + `signal`.
    """
    logs.stopped(signal_name(signal), done)
    copies.stopped()
    processes.barrier()  # no process exits while another still saves
    return SIGNAL + signal


def due(every: float | None, done: int, job: Job) -> bool:
    """Return whether something that happens at an interval, such as an evaluation, is due after `done` steps:
    whether a multiple of the interval was reached since the last step or, in a run that samples completions,
    since the last rollout.

    every: the interval in steps, below 1 as a fraction of the run's steps; None for never.
    """
    if every is None:
        return False
    steps = steps_between(every, job.steps)
    return done // steps > (done - job.rollout_steps) // steps


def train_sweep(
    name: str,
    runs: Mapping[str, Run],
    at_once: int | None = None,
    root: Path = Path("runs"),
    clock: Clock | None = None,
) -> int:
    """Train the runs of a sweep, or resume them; return the exit code, see `run`.

    If they can share a program, all are trained together, else one after the other. They are set to hold out
    the same rows first.

    runs: by label, which is also the name of the run's folder in the sweep's. at_once: how many adapters go
    through the model in one forward pass. Runs that cannot share a program raise ValueError if it is given;
    None is 1 and permits training one after the other. clock: see `run`; runs that are trained
    one after the other have clocks of their own.
    """
    runs = with_one_split(runs)
    reason = reason_to_separate(runs) if at_once is None else ""
    if not reason:
        return run(Sweep(name, runs, 1 if at_once is None else at_once), root=root, clock=clock)
    print(f"{len(runs)} runs, one after the other: {reason}", flush=True)
    return _train_each(name, runs, root)


def _train_each(name: str, runs: Mapping[str, Run], root: Path) -> int:
    """Train one run after the other, then write the sweep's table; return the exit code, see `run`.

    A run that ends with non-finite steps or a non-finite loss is not in the table, and the others are trained
    nevertheless; the exit code is then 1.
    """
    folder, failed = run_record.folder_of(root, name), []
    record: dict[str, Any] = {"members": list(runs), "at_once": None}
    check_members(folder, record["members"])
    folder.mkdir(parents=True, exist_ok=True)
    run_record.write_durable_json(folder / "config.json", record)
    for label, member in runs.items():
        print(f"\n{label}:", flush=True)
        try:
            code = run(member, root=root)
        except processes.AgreedError as error:
            if not (folder / label / METRICS).is_file():  # its settings are at fault
                raise
            print(error, flush=True)
            failed.append(label)
            continue
        if code >= SIGNAL:
            return code
    ends = {
        label: run_record.read_saved_json(folder / label / run_record.SUMMARY)
        for label in runs
        if label not in failed
    }
    if not ends:
        raise ValueError(
            f"{folder}: none of its runs is finished; correct the errors above and start the same command "
            "again"
        )
    before, after = (
        {label: end[side]["metrics"] for label, end in ends.items()} for side in ("before", "after")
    )
    steps = max(end["steps"] for end in ends.values())
    print(f"\n{write_table(folder, name, steps, (before, after), failed)}")
    print(f"the table is in {folder / run_record.CARD}, the curves in {folder / 'curves.png'}")
    return int(bool(failed))
