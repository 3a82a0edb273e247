"""A run, or a sweep's members, before weights are loaded: settings checked, rows read, programs traced."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxft.annotations import INT32, name_of
from jaxft.batch import TrainState, widened
from jaxft.data.packing.row_cache import template_fingerprint
from jaxft.data.source import Source, SourceInfo, spread
from jaxft.distributed import processes, sharding
from jaxft.distributed.sync import is_first
from jaxft.models.adapted import HeadSettings
from jaxft.nn.tree import Batch, Metrics, Params
from jaxft.rl.rollout_layout import BoundRun, Counter, uncounted
from jaxft.rl.rollout_sampler import clear_records
from jaxft.runs import run_record
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.folder_copies import Copies, mirrored
from jaxft.runs.manifest import set_aside
from jaxft.runs.object_store import check_stored_name
from jaxft.runs.run_record import CHECKPOINTS
from jaxft.runs.settings.setting_values import describe, differences, recorded_defaults
from jaxft.train.evaluate import evaluate
from jaxft.train.evaluate.evaluate import EvaluationLimit, evaluation_limit
from jaxft.train.evaluate.scored_completions import check_scoring
from jaxft.train.export.calibrate import CalibrationPlan, plan_run
from jaxft.train.programs import Programs, build, sharded_batch, start
from jaxft.train.settings import Run
from jaxft.train.start.eva import FirstRows, first_batches
from jaxft.train.start.teacher import check_teacher_files, teacher_fingerprints
from jaxft.train.sweep import Sweep, check_members
from jaxft.weights import pretrained
from jaxft.weights.hf import hub
from jaxft.weights.hf.hf_read import stop_tokens
from jaxft.weights.initial_params import check_starts
from jaxft.weights.peft.adapter_folders import adapter_folder
from jaxft.weights.peft.peft_read import read_adapter

Record = dict[str, Any]  # settings as JSON
EndedBy = Literal["patience", "callback"]  # what ends a run before its planned steps


@dataclass(frozen=True)
class Member:
    """A single run, or one member of a sweep.

    label: its name in the sweep, "" for a single run. folder: where its results go. record: its settings as
    JSON, with hashes of its rows and weights.
    """

    label: str
    run: Run
    folder: Path
    record: Record
    programs: Programs


@dataclass(frozen=True)
class Job:
    """A run or a sweep, as `loop.run` trains it: its members, and the sources and facts that they share.

    sources: one for all members, or one for each. steps: the number of the last step, counted from 1.
    planned: the number of steps by the settings, greater than `steps` if ended_by ended the job early. stop:
    the token ids that end a completion. all_general: all batches of the general text. sweep: its settings,
    None for a single run. calibration: the inputs of the base's calibration, None without quant.calibrate.
    limit: the most that an evaluation reads. widest: the shape that batches are padded to, None for the
    smallest that a batch of every source fits into.
    """

    folder: Path
    members: tuple[Member, ...]
    sources: tuple[Source[Any], ...]
    steps: int
    planned: int
    tokenizer: Any
    stop: tuple[int, ...]
    all_general: tuple[Batch, ...]
    sweep: Sweep | None
    calibration: CalibrationPlan | None = None
    ended_by: EndedBy | None = None
    limit: EvaluationLimit = EvaluationLimit()
    widest: Batch | None = None

    @property
    def lead(self) -> Member:
        """The member whose held-out rows, general text, tokenizer, mesh and intervals are used for all."""
        return self.members[0]

    @property
    def info(self) -> SourceInfo:
        """The facts about the rows that are the same for all members."""
        return self.sources[0].info

    @property
    def held_out(self) -> tuple[Batch, ...]:
        """The held-out batches that are evaluated."""
        batches = self.sources[0].held_out
        return tuple(batches[number] for number in spread(len(batches), self.limit.rows))

    @property
    def general(self) -> tuple[Batch, ...]:
        """The batches of general text that are evaluated."""
        return tuple(self.all_general[i] for i in spread(len(self.all_general), self.limit.texts))

    def limit_evaluation(self, limit: EvaluationLimit) -> "Job":
        """Return the job whose evaluations read at most `limit` of the held-out rows and the general text."""
        sources = tuple(source.limit_evaluation(limit.rows) for source in self.sources)
        return replace(self, sources=sources, limit=limit)

    @property
    def rollout_steps(self) -> int:
        """Optimizer steps after which the job can be saved: a rollout's, or 1 without sampling."""
        return self.info.steps_per_rollout

    @property
    def abstract_states(self) -> tuple[TrainState, ...]:
        """The members' states as shapes with shardings."""
        return tuple(member.programs.state for member in self.members)

    def source_of(self, number: int) -> Source[Any]:
        """Return the source of the batches of member `number`."""
        return self.sources[min(number, len(self.sources) - 1)]

    def batch(self, step: int, states: tuple[TrainState, ...]) -> tuple[list[Batch], Batch, Metrics]:
        """Return (each source's batch, one batch of all for the train step, metrics of sampling)."""
        made = [source.batch(step, states[0]) for source in self.sources]
        batches = [batch for batch, _ in made]
        if len(batches) == 1:
            return batches, *made[0]
        shape = self.padded_shape
        return batches, jax.tree.map(lambda *x: np.concatenate(x), *[widened(b, shape) for b in batches]), {}

    @property
    def abstract_batch(self) -> Batch:
        """The shape of the largest batch that the step takes."""
        count = len(self.sources)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count * x.shape[0], *x.shape[1:]), x.dtype), self.padded_shape
        )

    @property
    def padded_shape(self) -> Batch:
        """The shape to which each source's batches are padded, so that they can be concatenated."""
        return widest_shape(self.sources) if self.widest is None else self.widest

    def to_save(
        self, counters: list[dict[str, Any]], saved: dict[str, Any], logged: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the JSON that a checkpoint stores in addition to the states.

        counters: see Meters.counters. saved: the JSON of the checkpoint before, or what evaluate_start
        returned. logged: see Logs.sync.
        """
        return {
            "records": {member.label: member.record for member in self.members},
            "counters": counters,
            "before": saved["before"],
            "scores": saved.get(
                "scores", []
            ),  # of the evaluations so far, see run_evaluations.evaluate_during
            "last_faults": saved.get("last_faults"),  # only of the last step
            "logged": logged,
            "sources": [source.state_dict() for source in self.sources],
            "ended_by": self.ended_by,
            "planned": self.planned,
            "seconds": saved.get("seconds", {}),  # see clock.Clock
            "evaluation_limit": [*self.limit],
        }


def widest_shape(sources: Sequence[Source[Any]]) -> Batch:
    """Return the smallest shape to which a batch of each source can be padded."""

    def widest(*shapes: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sizes = zip(*(s.shape for s in shapes), strict=True)
        return jax.ShapeDtypeStruct(tuple(map(max, sizes)), shapes[0].dtype)

    return jax.tree.map(widest, *(source.shapes[-1] for source in sources))


def prepare(settings: Run | Sweep, record: Record | None, folder: Path) -> Job:
    """Check the settings, read the rows and build the programs as shapes.

    record: a run's settings as JSON, by default from `settings`. Raises ValueError or FileNotFoundError
    with one line about the cause and the remedy. Every process calls it.
    """
    sweep = settings if isinstance(settings, Sweep) else None
    runs: Mapping[str, Run] = settings.runs if isinstance(settings, Sweep) else {"": settings}
    lead = next(iter(runs.values()))
    shards = sharding.row_shards(sharding.make_mesh(lead.mesh))
    tokenizer = pretrained.load_tokenizer(lead.weights)
    rows = list(runs.values()) if len({run.data.seed for run in runs.values()}) > 1 else [lead]
    sources = tuple(processes.first_then_others(partial(run.data.open, tokenizer, shards)) for run in rows)
    general = None
    if lead.general is not None:
        general = evaluate.general_rows(lead.data, lead.general).open(tokenizer, shards)
    for source in (*sources, *([general] if general else [])):
        # without this check, the model would silently use the embedding of another token
        pretrained.check_token_id(lead.weights, source.info.stats.largest_id, lead.model.config.vocab)
    largest = max(source.info.stats.largest_id for source in sources)
    check_teacher_files(lead, tokenizer, largest)
    check_scoring(lead, sources[0])
    steps = lead.loop.steps or min(source.info.steps for source in sources)
    if steps > INT32:
        raise ValueError(
            f"the run would have {steps} steps, more than 2^31 - 1; lower data.epochs or data.tokens"
        )
    _check_whole_rollouts(steps, sources[0].info.steps_per_rollout)
    if sweep and sources[0].info.samples:
        raise ValueError(
            "the members of a sweep train on the same rows and can't sample their own completions; "
            "train each of them with scripts/train.py"
        )
    calibration = processes.first_then_others(lambda: plan_run(lead, sources[0], tokenizer))
    weights, members = weight_fingerprints(lead), []
    stop = stop_tokens(lead.weights, lead.model, tokenizer)
    sampled = {"stop_tokens": list(stop)} if sources[0].info.samples else {}
    for number, (label, run) in enumerate(runs.items()):
        run = run if calibration is None else replace(run, quant=calibration.coded)
        programs, source = build(run, steps), sources[min(number, len(sources) - 1)]
        _check_weights(run, programs)
        sharded_batch(programs, source.shapes[-1])  # raises if the rows don't divide over the mesh
        recorded = {"data_fingerprint": source.info.fingerprint, **source.info.recorded}
        recorded["chat_template"] = template_fingerprint(tokenizer)
        recorded |= {} if calibration is None else {"quant": describe(run.quant)}
        settings_ = {**(record or describe(run)), **weights, **sampled, **recorded}
        members.append(Member(label, run, folder / label, settings_, programs))
    if sweep and any(member.programs.objective.facts.noise for member in members):
        raise ValueError(
            f"{name_of(lead.objective)}: the loss is random (Facts.noise), but the members of a sweep share "
            "one forward pass; train one run after the other with scripts/train.py, or use a loss without "
            "noise (sft has none with neftune=0)"
        )
    processes.check_same(run_record.process_independent(members[0].record), differences)
    held_out = () if general is None else general.held_out
    job = Job(folder, tuple(members), sources, steps, steps, tokenizer, stop, held_out, sweep, calibration)
    return job.limit_evaluation(evaluation_limit(lead, sources[0], general, steps))


def _check_weights(run: Run, programs: Programs) -> None:
    """Raise ValueError or OSError for incomplete or unfitting weight files of the base or of the adapter that
    the run starts from. It is called before anything is written into the run's folder.
    """
    pretrained.open_params(run.weights, programs.partition.stored.model)
    if run.start and run.adapter is None:
        files = pretrained.open_files(run.weights)
        read_adapter(adapter_folder(run.start), programs.partition.stored.model, files)
    heads = HeadSettings(run.adapter, run.start if run.adapter else None)
    check_starts(programs.partition.model, heads, run.weights, run.heads)


def _check_whole_rollouts(steps: int, steps_per_rollout: int) -> None:
    """Raise ValueError if the last rollout would not be used in full."""
    over = steps % steps_per_rollout
    if over:
        near = f"{steps - over} or " if steps > steps_per_rollout else ""
        raise ValueError(
            f"loop.steps={steps} ends inside a rollout. A rollout is {steps_per_rollout} steps "
            f"(data.passes x data.minibatches): set {near}{steps + steps_per_rollout - over}"
        )


def weight_fingerprints(run: Run) -> dict[str, Any]:
    """Return hashes of all weights that a run starts from, and the path or the commit of its base.

    A run resumes from the same weights only. Raises ValueError for an adapter of a run that has changed since
    that run was finished.
    """
    fingerprints = {"weights_fingerprint": run_record.weights_fingerprint(run.weights)}
    if Path(run.weights).exists():
        fingerprints["weights_path"] = str(Path(run.weights).resolve())
    revision = hub.locate(run.weights, config_only=True).revision
    fingerprints |= {"weights_revision": revision} if revision else {}
    if run.start:
        run_record.check_results(adapter_folder(run.start))
        fingerprints["start_fingerprint"] = run_record.adapter_fingerprint(adapter_folder(run.start))
    for name, head in run.heads.items():
        if head.start:
            run_record.check_results(adapter_folder(head.start))
            fingerprints[f"{name}_fingerprint"] = run_record.adapter_fingerprint(adapter_folder(head.start))
        if head.weights:
            fingerprints[f"{name}_fingerprint"] = run_record.weights_fingerprint(head.weights)
    return fingerprints | teacher_fingerprints(run.teacher)


def run_folder(settings: Run | Sweep, root: Path) -> Path:
    """Return the folder of a run or a sweep. Raises ValueError for a name that leads out of `root`, or
    that is not allowed with loop.store.
    """
    run = settings if isinstance(settings, Run) else settings.lead
    check_stored_name(settings.name, run.loop.store)
    return run_record.folder_of(root, settings.name)


@contextlib.contextmanager
def open_checkpoints(job: Job) -> Iterator[tuple[Checkpoints, Copies]]:
    """Open the checkpoints of a job, in its folder. With loop.store, fetch the folder from there if the store
    is ahead, and copy it there at every checkpoint and when the block ends. Call `accepted` of the second
    value when the settings are accepted: it makes this process the one that writes to the store.

    Raises ValueError if the store has a run with other settings, OSError if it fails.
    """
    loop, name = job.lead.run.loop, job.sweep.name if job.sweep else job.lead.run.name
    url = f"{loop.store.rstrip('/')}/{name}" if loop.store and is_first() else None
    records = {f"{m.label}/config.json" if m.label else "config.json": m.record for m in job.members}
    if job.sweep is not None:
        records = {"config.json": {"members": [member.label for member in job.members]}, **records}
    with mirrored(job.folder, url, records, defaults=recorded_defaults(job.lead.run)) as copies:
        checkpoints = Checkpoints(job.folder / CHECKPOINTS, loop.keep_last, loop.keep_best, copies=copies)
        with contextlib.closing(checkpoints):
            yield checkpoints, copies


def resume_point(job: Job, checkpoints: Checkpoints) -> tuple[int, list[str]]:
    """Return (steps of a finished run or 0, a line for each permitted change of settings since it began).

    A run is not finished if loop.steps has been raised since. A run that loop.patience ended is finished
    until loop.patience is raised, and one that a callback ended until loop.steps is. Raises ValueError for
    changes that are not permitted, FileNotFoundError for missing results without a checkpoint.
    """
    steps = run_record.finished_steps(job.folder)
    if not steps and checkpoints.latest() is None:
        _keep_own_rollouts(job)
        return 0, []
    if job.sweep is not None:
        check_members(job.folder, [member.label for member in job.members])
    changes = [
        line
        for m in job.members
        for line in run_record.changes_since_start(m.folder, m.record, recorded_defaults(m.run))
    ]
    patience, ended_by = job.lead.run.loop.patience, run_record.early_end(job.lead.folder, "patience")
    stalled = patience is not None and ended_by is not None and patience <= ended_by
    planned = run_record.early_end(job.lead.folder, "planned")  # of a run that a callback ended
    is_finished = steps >= job.steps or stalled or (planned is not None and job.steps <= planned)
    if is_finished:
        is_finished = not _damaged_results(job, checkpoints)
    return (steps if is_finished else 0), list(dict.fromkeys(changes))


def _keep_own_rollouts(job: Job) -> None:
    """Before a start at step 0, remove recorded rollouts if they are of other settings than the job's."""
    try:
        for m in job.members:
            run_record.changes_since_start(m.folder, m.record, recorded_defaults(m.run))
    except ValueError:
        clear_records(job.folder)


def _damaged_results(job: Job, checkpoints: Checkpoints) -> bool:
    """Return whether results of a finished job are missing or changed, and report the first of them. Folders
    with changed files are renamed, to keep edits. Raises FileNotFoundError if there is no checkpoint from
    which the results could be written again.
    """
    folders = {job.folder, *(member.folder for member in job.members)}
    cards = [folder / run_record.CARD for folder in folders if (folder / run_record.SUMMARY).is_file()]
    missing = [card for card in cards if not (card.is_file() and card.stat().st_size)]
    lines = [f"{card}: no such file, or it is empty" for card in missing]
    changed = [(m.folder, result) for m in job.members for result in run_record.changed_results(m.folder)]
    lines += [result.line for _, result in changed]
    if not lines:
        return False
    latest = checkpoints.latest()
    if latest is None:
        raise FileNotFoundError(
            f"{lines[0]}, and there is no checkpoint from which it could be written again. Restore it, or "
            f"delete {job.folder / run_record.SUMMARY} to train again"
        )
    edited = {run / x.path.relative_to(run).parts[0] for run, x in changed if not x.is_missing}
    for folder in sorted(edited):
        lines[0] += f"; {folder} is renamed to {set_aside(folder).name}"
    checkpoints.report(f"{lines[0]}: the results are written again from the checkpoint of step {latest}")
    return True


def load_members(
    job: Job, restored: tuple[TrainState, ...] | None, report: Callable[[str], None]
) -> tuple[tuple[TrainState, ...], tuple[Params, ...]]:
    """Return the members' states and frozen parameters on the mesh; the base is loaded once.

    report: called with lines for the user.
    """
    states, frozen, base = [], [], None
    for number, member in enumerate(job.members):
        saved = restored[number] if restored else None
        tokens = member.run.adapter.eva_tokens if member.run.adapter else 0
        batches = partial(first_batches, job.source_of(number), tokens)
        rows = FirstRows(batches, report)
        state, fixed = start(member.run, member.programs, saved, base, member.folder, rows)
        base = fixed["base"]
        states.append(state)
        frozen.append(fixed)
    return tuple(states), tuple(frozen)


def bind_sources(
    job: Job, frozen: tuple[Params, ...], saved: dict[str, Any] | None, counter: Counter = uncounted
) -> Job:
    """Return the job with sources that can sample completions from its model. frozen: each member's frozen
    parameters.

    saved: what the checkpoint stores, see `to_save`. counter: shows the progress of sampling.
    """
    p = job.lead.programs
    bound = BoundRun(
        mesh=p.mesh, model=p.partition.model, objective=p.objective, state=p.state, frozen_shapes=p.frozen,
        frozen=frozen[0], stop=job.stop, folder=job.folder, fused_backward=p.optimizer.fused_backward,
        counter=counter,
    )  # fmt: skip
    stored = saved["sources"] if saved else [None] * len(job.sources)
    sources = [source.bind(bound, old) for source, old in zip(job.sources, stored, strict=True)]
    return replace(job, sources=tuple(sources))
