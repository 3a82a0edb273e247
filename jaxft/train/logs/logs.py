"""The logs of a job: of a run alone, or of each of a sweep's members with an overview for the console."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax

from jaxft.data.inspection import Inspected, data_summary, inspect_prompts, inspect_source, limit_alarms
from jaxft.data.rows.invalid_rows import invalid_lines
from jaxft.data.source import RowSource, Source
from jaxft.distributed import sharding
from jaxft.distributed.processes import Watchdog
from jaxft.distributed.sync import is_first
from jaxft.objectives.intervals import interval_of, mean_interval
from jaxft.objectives.metrics import LOSS, WEIGHT, FloatMetrics
from jaxft.rl.rollout_source import PromptSource
from jaxft.runs import run_record, run_texts
from jaxft.runs.log import Log, NullLog
from jaxft.runs.metrics_log import REWARD
from jaxft.runs.run_record import DATA_JSON, PARAMETERS_JSON, write_durable_json
from jaxft.runs.run_texts import Evaluation
from jaxft.runs.settings.setting_values import recorded_defaults
from jaxft.runs.trackers import RunEnd, Tracker
from jaxft.runs.versions_and_devices import device_counts
from jaxft.train import programs
from jaxft.train.evaluate.scored_completions import held_out_prompts, position_lines
from jaxft.train.logs.clock import Clock
from jaxft.train.start.attention_kernels import attention_summary, check_attention
from jaxft.train.start.jobs import Job
from jaxft.train.start.teacher import teacher_lines
from jaxft.train.trainable_params import parameter_rows
from jaxft.weights import pretrained
from jaxft.weights.edit.extended_model import extension_notes
from jaxft.weights.hf.hf_read import stop_lines
from jaxft.weights.peft.adapter_folders import base_differences, left_out_notes, untying_notes


class Logs:
    """The members' logs, in their order. overview: a log of the sweep itself, None for a run alone.

    ends: whether a callback has ended the run. clock: the run's clock, whose seconds of evaluation and
    sampling each entry gets.
    """

    def __init__(
        self,
        members: Sequence[Log | NullLog],
        overview: Log | NullLog | None = None,
        clock: Clock | None = None,
    ):
        self.members, self._overview, self.clock = members, overview, clock or Clock()
        self.ends = False
        self._all = (*members, *([overview] if overview else []))

    def step(
        self, step: int, metrics: Sequence[FloatMetrics], perf: Sequence[FloatMetrics] | None = None
    ) -> None:
        """Log each member's metrics after `step` optimizer steps; nothing for a member whose dict is empty.
        perf: speed and memory of each member.
        """
        timings = self.clock.recent()
        perf = [{**rates, **timings} for rates in perf or [{}] * len(metrics)]
        for log, numbers, rates in zip(self.members, metrics, perf, strict=True):
            if numbers:
                self.ends |= log.step(step, numbers, rates)
        if self._overview is not None:
            shown = {  # by number: labels may be long, see ConsoleView.tabulate
                f"{name} {number}": numbers[name]
                for name in ("loss", "eval_loss")
                for number, numbers in enumerate(metrics, 1)
                if name in numbers
            }
            if shown:
                self._overview.step(step, shown, total_rates(perf))

    def sync(self) -> list[dict[str, Any]]:
        """Sync all logs to disk; return the state of each member's log as JSON, for a checkpoint."""
        return [log.sync() for log in self._all][: len(self.members)]

    def message(self, text: str) -> None:
        """Print a line."""
        (self._overview or self.members[0]).message(text)

    def progress(self, text: str) -> None:
        """Show the progress of a phase inside the run; "" ends it."""
        (self._overview or self.members[0]).progress(text)

    def ends_at(self, step: int) -> None:
        """Set the last step of the run to `step` in all logs."""
        for log in self._all:
            log.ends_at(step)

    def mark(self, end: RunEnd) -> None:
        """Pass how the run ended (such as finished or stopped) to the trackers of all logs."""
        for log in self._all:
            log.mark(end)

    def stopped(self, by: str, step: int) -> None:
        """Print that the signal `by` stopped the run after `step` steps, and mark the run as stopped."""
        self.message(f"stopped by {by} after step {step}, saved; the same command resumes")
        self.mark("stopped")

    def alarm(self, number: int, step: int, text: str) -> None:
        """Print an alarm about member `number`, counted from 0, and store it for its summary."""
        text = f"alarm after step {step}: {text}"
        self.members[number].add_alarms([text])
        if self._overview is None:
            self.message(text)  # a sweep prints all alarms at its end

    def close(self) -> None:
        """Close all logs."""
        with contextlib.ExitStack() as stack:
            for log in self._all:
                stack.callback(log.close)


def announce(watchdog: Watchdog, logs: Logs, line: str) -> None:
    """Print a line about the phase that begins, and start the watchdog's time limit for it."""
    watchdog.at(line)
    logs.message(line)


def total_rates(perf: Sequence[FloatMetrics]) -> FloatMetrics:
    """Return a sweep's speed, summed over members, and the first member's other values, such as memory."""
    if not perf[0]:
        return {}
    added = ("tokens_per_second", "mfu")
    return {name: sum(p[name] for p in perf) if name in added else x for name, x in perf[0].items()}


def open_logs(
    job: Job,
    first: int,
    saved: dict[str, Any] | None,
    changes: list[str],
    callbacks: Sequence[Tracker],
    clock: Clock,
) -> Logs:
    """Write the records, open the logs and print the start-up lines on process 0; others log nothing.

    first: steps that earlier starts have done. saved: the checkpoint's JSON, see Job.to_save. changes: lines
    about permitted changes of settings since the run began. callbacks: further trackers. clock: the run's
    clock, which continues from the checkpoint's seconds. Raises ValueError if the settings differ from the
    checkpoint's, or allow fewer steps than are done.
    """
    if first > job.steps:
        raise ValueError(
            f"{job.folder}: {first} steps are done already, but loop.steps={job.steps}. Raise it to continue."
        )
    if saved:
        records = [(m, saved["records"][m.label]) for m in job.members]
        changes = [
            line
            for m, old in records
            for line in run_record.permitted_changes(m.folder, old, m.record, recorded_defaults(m.run))
        ]
    checked = check_attention(job.lead.programs, job.abstract_batch)
    if not is_first():
        return Logs([NullLog() for _ in job.members], clock=clock)
    logs, moved = [], []
    starts_again = not first and (job.folder / "config.json").is_file()
    kernel = attention_summary(job.lead.programs, job.abstract_batch).removeprefix("attention: ")
    if job.sweep is not None:
        record = {"members": [member.label for member in job.members], "at_once": job.sweep.at_once}
        run_record.write_durable_json(job.folder / "config.json", record)
    for number, member in enumerate(job.members):
        member.folder.mkdir(exist_ok=True)
        run_record.check_paths(member.folder)
        moved += run_record.write_record(member.folder, member.record, first, kernel)
        write_contents(job, number, first)
        alone = job.sweep is None
        trackers: tuple[str | Tracker, ...] = (*member.run.trackers, *(callbacks if alone else ()))
        logs.append(Log(member.folder, job.steps, first, not alone, trackers))
    overview = None if job.sweep is None else Log(job.folder, job.steps, first, trackers=(*callbacks,))
    opened = Logs(logs, overview, clock)
    clock.resume((saved or {}).get("seconds", {}), opened.progress)
    for line in startup_lines(job, first, list(dict.fromkeys(changes))) + checked:
        opened.message(line)
    if starts_again:
        opened.message(f"{job.folder} has no complete checkpoint: the run starts again at step 0")
    for log, logged in zip(logs, (saved or {}).get("logged", []), strict=False):  # older checkpoints lack it
        for line in log.missing(logged):
            opened.message(line)
    if first:
        for line in dict.fromkeys(moved):
            opened.message(f"changed since the last start: {line}")
    lead, context = job.lead.run, job.lead.run.model.config.max_positions
    for text in [] if first else limit_alarms(lead.data, job.info.stats, job.tokenizer, context):
        for number in range(len(logs)):
            opened.alarm(number, first, text)
    for member, log in zip(job.members, logs, strict=True):
        log.listen(member.programs.objective.report.alarms)
    if overview is not None:
        overview.tabulate([member.label for member in job.members])
    return opened


def startup_lines(job: Job, first: int, changes: list[str]) -> list[str]:
    """Return the lines to print before weights are loaded. first: steps that earlier starts have done."""
    lead, info = job.lead, job.info
    rows = programs.step_rows(lead.run.data, sharding.row_shards(lead.programs.mesh))
    kinds = device_counts([device.device_kind for device in jax.devices()])
    lines = [
        f"devices: {kinds}, processes: {jax.process_count()}",
        run_texts.parameter_line(programs.model_summary(lead.programs)),
        attention_summary(lead.programs, job.abstract_batch),
        f"{info.stats.summary}; {job.planned} steps",
        info.stats.learned,
        *invalid_lines(info.stats.invalid),
        *run_texts.empty_slot_lines(rows),
        f"{run_texts.FIRST_ROW}\n{info.preview}",
    ]
    if first:
        lines += [f"resuming after step {first}", *(f"changed since the start: {x}" for x in changes)]
    lines += info.warnings
    lines += lead.run.data.start_lines(lead.programs.objective, lead.run.model.attention)
    lines += stop_lines(job.stop, info.learned_ends, job.tokenizer)
    lines += position_lines(lead.run, job.sources[0])
    lines += eval_limit_lines(job)
    lines += early_end_lines(job)
    lines += pretrained.storage_changes(lead.run.weights, lead.programs.partition.stored)
    lines += untying_notes(lead.run.model, lead.run.adapter)
    lines += left_out_notes(lead.run.model, lead.run.start)
    lines += extension_notes(lead.run.weights)
    lines += teacher_lines(lead.run, lead.programs.mesh)
    starts = [lead.run.start, *(head.start for head in lead.run.heads.values())]
    if lead.run.teacher and lead.run.teacher.shares_base:
        starts.append(lead.run.teacher.start)
    for start in dict.fromkeys(starts):
        if start:
            lines += run_record.earlier_end_notes(start)
            lines += run_record.prompt_differences(start, lead.record)
            lines += base_differences(
                start,
                lead.run.weights,
                lead.record["weights_fingerprint"],
                lead.run.quant,
                lead.run.adapter,
            )
    lines += run_record.earlier_end_notes(lead.run.weights)
    lines += run_record.prompt_differences(lead.run.weights, lead.record)
    if job.sweep is not None:
        members = [f"{number:3d}  {member.label}" for number, member in enumerate(job.members, 1)]
        lines.append("\n".join([f"{len(members)} runs on one base:", *members]))
    return lines


def first_evaluation_lines(job: Job) -> list[str]:
    """Return a line about what is evaluated before the first step, and how to avoid it; else []."""
    run, samples = job.lead.run, job.info.samples
    parts = (
        ("batches of held-out rows", len(job.held_out), "held_out=none"),
        ("held-out prompts", (job.limit.rows or job.info.stats.held_out) * samples, "held_out=none"),
        ("batches of general text", len(job.general), "general=none"),
        (
            "completions of held-out prompts",
            len(held_out_prompts(run, job.sources[0])) * run.scoring.samples,
            "score=none samples=0" if run.scoring.functions else "samples=0",
        ),
    )
    evaluated = [(f"{what}: {count}", setting) for what, count, setting in parts if count]
    what, settings = (", ".join(text for text, _ in evaluated), " ".join(setting for _, setting in evaluated))
    return [f"evaluating before the first step ({settings} leaves this out); {what}"] if evaluated else []


def eval_limit_lines(job: Job) -> list[str]:
    """Return a line if evaluations read only a part of the held-out rows or of the general text, else []."""
    sampled, texts = job.info.samples, len(job.all_general)
    total = job.info.stats.held_out if sampled else len(job.sources[0].held_out)
    parts = []
    if job.limit.rows is not None:
        parts.append(
            f"{job.limit.rows} of {total} {'held-out prompts' if sampled else 'batches of held-out rows'}"
        )
    if job.limit.texts is not None:
        parts.append(f"{job.limit.texts} of {texts} batches of general text")
    if not parts:
        return []
    fraction = job.lead.run.loop.eval_fraction
    why = "" if fraction is None else f" and compute at most {100 * fraction:g} % of what training does"
    return [f"evaluations read {' and '.join(parts)}{why} (loop.eval_fraction=none reads all)"]


def with_part(job: Job, end: Evaluation, rows: dict[int, FloatMetrics]) -> Evaluation:
    """Return the evaluation `end`; if the job limits evaluations, with a note on how many held-out rows it
    has read, and a 95 % interval of the loss or reward. rows: {index of a row that was read: its metrics}.
    """
    if job.limit.rows is None:
        return end
    total, unit = job.info.stats.held_out, f"held-out {job.lead.run.data.unit}"
    read = job.limit.rows if job.info.samples else len(rows)
    if not 0 < read <= total:  # wrapped rows have no single examples
        read, total, unit = job.limit.rows, len(job.sources[0].held_out), "batches of held-out rows"
    part = f"{read} of {total} {unit}"
    losses = [(row[LOSS], row.get(WEIGHT, 1.0)) for row in rows.values() if LOSS in row]
    rewards = [row[REWARD] for row in rows.values() if REWARD in row]
    interval = ""
    if len(losses) > 1:
        interval = f", 95 % interval of the loss {mean_interval(*zip(*losses, strict=True)).text()}"
    elif len(rewards) > 1:
        interval = f", 95 % interval of the reward {interval_of(rewards).text()}"
    line = f"the held-out metrics are of {part}{interval}; loop.eval_fraction=none reads all"
    return {**end, "part": part, "part_note": line}


def early_end_lines(job: Job) -> list[str]:
    """Return a line about the step at which loop.patience or a callback ended the job; [] if neither did."""
    if job.ended_by is None:
        return []
    if job.ended_by == "callback":
        return [f"ended after step {job.steps} of {job.planned} by a callback; raise loop.steps to train on"]
    return [
        f"ended after step {job.steps} of {job.planned}: {job.lead.run.loop.patience} evaluations without a "
        "better held-out score (loop.patience); to train on, raise it or set it to none"
    ]


def write_contents(job: Job, number: int, first: int) -> None:
    """Write parameters.json and data.json into the folder of a member, unless it resumes and has them.

    parameters.json: the rows of the parameter table. data.json: see data_summary. first: steps that earlier
    starts have done.
    """
    member = job.members[number]
    programs, paths = member.programs, [member.folder / name for name in (PARAMETERS_JSON, DATA_JSON)]
    if first and all(path.exists() for path in paths):
        return
    rows = [row._asdict() for row in parameter_rows(programs.partition, programs.mesh)]
    dataset = inspected(job.source_of(number))
    write_durable_json(paths[0], {"rows": rows})
    write_durable_json(paths[1], {} if dataset is None else data_summary(dataset, job.tokenizer))


def inspected(source: Source[Any]) -> Inspected | None:
    """Return the dataset of a run's source; None for a source that jaxft doesn't provide."""
    if isinstance(source, RowSource):
        return inspect_source(source)
    if isinstance(source, PromptSource):
        return inspect_prompts(source.data, source.train, source.eval_prompts)
    return None
