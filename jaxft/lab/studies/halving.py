"""Run a study: successive halving of each loss's trials, then its best setting with every seed.

One compiled program trains a trial of every loss at once: each is a LoRA adapter on a shared base, with the
learning rate and the loss's knobs (hyperparameters) as arrays, so that the next trial needs no compilation.
Trials that are trained at the same time are a wave; they see the same rows in the same order.

runs/<study>/ has declaration.json, the log study.jsonl, and a run's folder for each trial,
trials/<loss>-<number>-seed<seed>/, which `jaxft compare` and `jaxft report` can read. A wave is written when
it is complete: a study that is killed repeats the wave that it was in, with the same results to the bit.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.batch import TrainState, widened
from jaxft.data.source import Source
from jaxft.distributed import processes, sharding
from jaxft.distributed.disk import write_durably
from jaxft.distributed.exit import Interrupt, signal_name
from jaxft.lab.studies.study import LossTrial, Study, check_declared, declare, digest_of
from jaxft.lab.studies.trial_arrays import make_set_trial, plain_run, run_of
from jaxft.nn import tree
from jaxft.nn.tree import Params
from jaxft.objectives.metrics import HELD_OUT, FloatMetrics
from jaxft.objectives.pair import ACCURACY, MARGIN
from jaxft.objectives.preference import preference
from jaxft.runs import manifest, run_record
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.metrics_log import (
    HELD_OUT_ROWS,
    METRICS,
    append_entry,
    format_line,
    json_value,
    read_unfinished,
)
from jaxft.runs.run_record import CHECKPOINTS
from jaxft.runs.settings.setting_values import describe
from jaxft.train.compiled import Compiled, States
from jaxft.train.logs.clock import Clock
from jaxft.train.multi_adapter import compile_sweep
from jaxft.train.programs import start
from jaxft.train.settings import steps_between
from jaxft.train.start.jobs import Job, load_members, prepare, weight_fingerprints, widest_shape
from jaxft.train.sweep import Sweep
from jaxft.weights.hf.complete_folders import files_sha256

DECLARATION, LEDGER, EVALUATIONS = "declaration.json", "study.jsonl", "evaluations.jsonl"
TRIALS = "trials"  # folder of the trials' folders
FEW_PROMPTS = 20  # a comparison on fewer prompts finds only very large differences

PairValues = dict[str, list[float]]  # values of the held-out pairs by metric, in the order of HeldOutPairs


@dataclass(frozen=True)
class HeldOutPairs:
    """The held-out pairs of a study. Each field has a value per pair.

    prompts: index of its prompt. tuning: whether it selects settings rather than compares losses. longer:
    number of tokens of the chosen response minus that of the rejected one.
    """

    names: tuple[str, ...]
    prompts: tuple[int, ...]
    tuning: tuple[bool, ...]
    longer: tuple[int, ...]

    @staticmethod
    def of(source: Any, fraction: float) -> "HeldOutPairs":
        """Return a source's held-out pairs. A random `fraction` of their prompts, the same in every study of
        these rows, selects settings. Raises ValueError for two rows of one name.
        """
        held, rows = np.asarray(source.split.held), source.split.rows
        names = tuple(rows.names[i] for i in held)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"{len(twice)} held-out rows have the name of another one, such as {twice[0]}: two of the "
                "files in held_out have the same name; rename one"
            )
        groups = np.unique(rows.group_by(0)[held], return_inverse=True)[1]
        count = int(groups.max()) + 1
        tuning = np.random.default_rng(0).permutation(count)[: round(fraction * count)]
        chosen, rejected = (rows.counts[held, 1 + rows.kinds.index(kind)] for kind in ("chosen", "rejected"))
        return HeldOutPairs(
            names,
            tuple(groups.tolist()),
            tuple(np.isin(groups, tuning).tolist()),
            tuple((chosen.astype(np.int64) - rejected).tolist()),
        )

    @staticmethod
    def of_json(saved: Mapping[str, Any]) -> "HeldOutPairs":
        """Return the pairs of which `json` returned `saved`."""
        return HeldOutPairs(*(tuple(saved[field.name]) for field in fields(HeldOutPairs)))

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    def prompt_counts(self) -> tuple[int, int]:
        """Return how many prompts (select settings, compare losses)."""
        known = dict(zip(self.prompts, self.tuning, strict=True))
        return sum(known.values()), len(known) - sum(known.values())

    def by_prompt(self, values: Sequence[float], tuning: bool) -> np.ndarray:
        """Return the mean of `values`, one per pair, for each prompt that selects settings (tuning=True) or
        compares losses.
        """
        x, prompts = np.asarray(values, np.float64), np.asarray(self.prompts)
        chosen = np.asarray(self.tuning) == tuning
        numbers, inverse = np.unique(prompts[chosen], return_inverse=True)
        return np.bincount(inverse, x[chosen], len(numbers)) / np.bincount(inverse)


def trial_folder(folder: Path, label: str, number: int, seed: int) -> Path:
    """Return the folder of a trial, given by its loss's label, its number and its seed."""
    return folder / TRIALS / f"{label}-{number}-seed{seed}"


@dataclass(frozen=True)
class Wave:
    """A trial of each loss, trained together from step `first` to `last` with one seed."""

    seed: int
    trials: Mapping[str, LossTrial]
    first: int
    last: int

    @property
    def key(self) -> str:
        """The name of the wave in the log."""
        numbers = ",".join(f"{label}-{trial.number}" for label, trial in self.trials.items())
        return f"seed {self.seed}, steps {self.first}-{self.last}: {numbers}"

    def folder(self, root: Path, label: str) -> Path:
        """Return the folder of a loss's trial. root: the study's folder."""
        return trial_folder(root, label, self.trials[label].number, self.seed)


@dataclass(frozen=True)
class Lab:
    """The objects that all waves of a study share. sources, initial: of each seed, the rows and the states of
    all losses at step 0.
    """

    study: Study
    job: Job
    sources: Mapping[int, Source[Any]]
    pairs: HeldOutPairs
    compiled: Compiled
    initial: Mapping[int, States]
    frozen: tuple[Params, ...]
    _pairs_at: dict[int, int] = field(default_factory=dict)

    def pair_at(self, position: int) -> int:
        """Return the index in `pairs` of the pair at `position`, as in Source.held_out_name; cached, because
        the row's name is read from a file.
        """
        if position not in self._pairs_at:
            name = self.job.sources[0].held_out_name(position)
            self._pairs_at[position] = self.pairs.names.index(name)
        return self._pairs_at[position]


def run_study(study: Study, file: Path, root: Path = Path("runs"), clock: Clock | None = None) -> int:
    """Run a study, or continue it; return the exit code: 0 if it is finished, 128 + n if signal n stopped it.

    Raises ValueError or OSError before anything is trained, and ValueError if a file of an earlier wave has
    changed.
    """
    folder = run_record.folder_of(root, study.name)
    with run_record.lock(folder), jax.set_mesh(sharding.make_mesh(study.recipe.mesh)):
        lab, done = declared_lab(study, file, folder, clock or Clock())
        if lab is None:
            print(f"{folder}: this study is finished", flush=True)
            return 0
        with Interrupt() as interrupt:
            if train_waves(lab, folder, done, interrupt) is None:
                print(f"stopped by {signal_name(interrupt.signal)}; the same command continues", flush=True)
                return 128 + interrupt.signal
    return 0


# Before training


def declared_lab(
    study: Study, file: Path, folder: Path, clock: Clock
) -> tuple[Lab | None, list[dict[str, Any]]]:
    """Write the declaration of a study, or check the study against it. Return (the Lab, None if the study is
    finished; the entries of its log). Call it within jax.set_mesh of the recipe's mesh.
    """
    job, sources = prepare_study(study, folder)
    pairs = HeldOutPairs.of(job.sources[0], study.tuning)
    lines = plan_lines(study, pairs)
    check_losses(study, job)
    rows = {str(seed): source.info.fingerprint for seed, source in sources.items()}
    facts = {"rows": rows, "held_out": pairs.json(), **weight_fingerprints(job.lead.run)}
    now = declare(study, file, facts)
    path = folder / DECLARATION
    if path.exists():
        check_declared(folder, run_record.read_saved_json(path), now)
    else:
        run_record.write_durable_json(path, now)
    print(f"declaration {now['digest'][:12]}: {path}", *lines, sep="\n", flush=True)
    done = read_unfinished(folder / LEDGER)
    if not done:
        done = logged(folder, done, {"declared": now["digest"]})
    elif done[0].get("declared") != now["digest"]:
        raise ValueError(f"{folder / LEDGER}: the log belongs to another declaration; choose another name=")
    if done[-1].get("finished"):
        return None, done
    return open_lab(study, job, sources, pairs, clock), done


def prepare_study(study: Study, folder: Path) -> tuple[Job, dict[int, Source[Any]]]:
    """Read the rows and trace the programs. Return (a job that trains all losses with the first seed,
    seed -> its source of rows). The job's row shape fits the batches of all seeds.
    """
    first = study.seeds[0]
    runs = {label: run_of(study, label, first) for label in study.losses}
    job = prepare(Sweep(study.name, runs), None, folder)
    shards = sharding.row_shards(job.lead.programs.mesh)
    sources = {first: job.sources[0]}
    for seed in study.seeds[1:]:
        data = run_of(study, next(iter(study.losses)), seed).data
        sources[seed] = processes.first_then_others(partial(data.open, job.tokenizer, shards))
    return replace(job, widest=widest_shape([*sources.values()])), sources


def plan_lines(study: Study, pairs: HeldOutPairs) -> list[str]:
    """Return lines about the budget and the prompts. Raises ValueError for too few prompts."""
    tuning, compared = pairs.prompt_counts()
    if tuning < 1 or compared < 2:
        raise ValueError(
            f"the recipe holds out {tuning + compared} prompts, of which {tuning} select settings and "
            f"{compared} are compared; too few for any conclusion. Hold out more with data.held_out"
        )
    stages = ", then ".join(f"{r.trials} to step {r.steps}" for r in study.rungs)
    lines = [
        f"each of {len(study.losses)} losses: {study.trials} trials on seed {study.seeds[0]} ({stages}), the "
        f"best one on {len(study.seeds)} seeds; {study.steps_per_loss} optimizer steps",
        f"{tuning} held-out prompts select settings, {compared} are compared",
    ]
    if compared < FEW_PROMPTS:
        lines.append(f"warning: {compared} prompts are few: only very large differences can be found")
    if len(study.seeds) < 2:
        lines.append("warning: with one seed the results are about that seed alone")
    return lines


def check_losses(study: Study, job: Job) -> None:
    """Trace every loss on the shape of the rows: with its knobs as arrays, then with each trial's knobs.

    Raises ValueError for a loss that needs a column or a response that the rows lack, or that rejects a value
    of a knob.
    """
    for label, member in zip(study.losses, job.members, strict=True):
        p, fn = member.programs, study.losses[label].fn

        def forward(state: TrainState, frozen: Params, batch: Any, objective: Any = p.objective) -> Any:
            rows = jax.tree.map(lambda x: x[0], batch)
            return objective.forward(tree.combine(state.trainable, frozen), rows, None, state.aux)

        outputs = jax.eval_shape(forward, p.state, p.frozen, job.sources[0].shapes[-1])
        try:
            jax.eval_shape(p.objective.loss, outputs, p.state.aux)
            for trial in study.trials_of(label):
                plain = preference(member.run.model, partial(fn, **trial.knobs), beta=1.0)
                jax.eval_shape(plain.loss, outputs, p.state.aux)
        except ValueError as error:
            raise ValueError(f"study.losses[{label}]: {error}") from error


def open_lab(
    study: Study, job: Job, sources: Mapping[int, Source[Any]], pairs: HeldOutPairs, clock: Clock
) -> Lab:
    """Load the base model, make all seeds' states at step 0, and compile the programs."""
    print(f"rows and settings read in {clock.at('loading')}", flush=True)
    states, frozen = load_members(job, None, print)
    initial = {study.seeds[0]: states}
    for seed in study.seeds[1:]:
        runs = [run_of(study, label, seed) for label in study.losses]
        initial[seed] = tuple(
            start(run, member.programs, None, frozen[0]["base"])[0]
            for run, member in zip(runs, job.members, strict=True)
        )
    print(f"weights loaded in {clock.at('compiling')}; compiling, or reading from the cache", flush=True)
    compiled = compile_sweep(job, frozen, clock)
    print(f"compiled in {clock.at('training')}", flush=True)
    return Lab(study, job, sources, pairs, compiled, initial, frozen)


# Waves


def train_waves(
    lab: Lab, folder: Path, done: list[dict[str, Any]], interrupt: Interrupt
) -> list[dict[str, Any]] | None:
    """Train all waves that are not yet in the log. Return the log, or None if a signal stopped the study.
    done: the log so far.
    """
    study, seed = lab.study, lab.study.seeds[0]
    alive = {label: study.trials_of(label) for label in study.losses}
    first = 0
    for number, rung in enumerate(study.rungs):
        waves = [
            Wave(seed, {label: trials[i] for label, trials in alive.items()}, first, rung.steps)
            for i in range(rung.trials)
        ]
        for wave in waves:
            if interrupt.signal:
                return None
            done = train_wave(lab, folder, wave, done)
        last = number + 1 == len(study.rungs)
        keep = 1 if last else study.rungs[number + 1].trials
        alive = {label: best_trials(done, label, waves)[:keep] for label in alive}
        first = rung.steps
    winners = {label: trials[0] for label, trials in alive.items()}
    for other in study.seeds[1:]:
        if interrupt.signal:
            return None
        done = train_wave(lab, folder, Wave(other, winners, 0, first), done)
    winner = {label: {"trial": trial.number, "setting": str(trial)} for label, trial in winners.items()}
    return logged(folder, done, {"finished": True, "winners": winner})


def best_trials(done: Sequence[Mapping[str, Any]], label: str, waves: Sequence[Wave]) -> list[LossTrial]:
    """Return a loss's trials in these waves, the best first; a trial that diverged is last, and ties are in
    order of the trials' numbers. done: the log.
    """
    scores = {entry["wave"]: entry["scores"][label] for entry in done if "wave" in entry}

    def rank(wave: Wave) -> tuple[float, int]:
        score = scores[wave.key]
        return (math.inf if score is None else -score), wave.trials[label].number

    return [wave.trials[label] for wave in sorted(waves, key=rank)]


def logged(folder: Path, done: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Append an entry to the study's log; return all entries. done: the earlier ones."""
    append_entry(folder / LEDGER, entry)
    return [*done, entry]


def train_wave(lab: Lab, folder: Path, wave: Wave, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train a wave unless it is in the log `done`; write its trials' folders and entry; return the log."""
    if any(entry.get("wave") == wave.key for entry in done):
        return done
    states = start_states(lab, folder, wave, done)
    source, steps = lab.sources[wave.seed], lab.study.recipe.loop.steps or wave.last
    every = steps_between(1 / lab.study.evaluations, steps)
    shape = lab.job.padded_shape
    evaluations: list[list[PairsEvaluation]] = [[] for _ in wave.trials]
    for step in range(wave.first, wave.last):
        batch = widened(source.batch(step, states[0])[0], shape)
        states, metrics = lab.compiled.step(states, lab.frozen, batch)
        if (step + 1) % every == 0 or step + 1 == wave.last:
            now = evaluate_states(lab, states, step + 1, metrics)
            for earlier, newest in zip(evaluations, now, strict=True):
                earlier.append(newest)
    files: dict[str, dict[str, str]] = {}
    scores: dict[str, float | None] = {}
    for label, state, evaluated in zip(wave.trials, states, evaluations, strict=True):
        files[label] = write_trial(lab, folder, wave, label, state, evaluated)
        scores[label] = tuning_score(lab, evaluated[-1])
    texts = ", ".join(f"{label} {'-' if x is None else f'{x:.4f}'}" for label, x in scores.items())
    number = sum("wave" in entry for entry in done) + 1
    print(f"{number} of {lab.study.waves}, {wave.key}: tuning {lab.study.metric}: {texts}", flush=True)
    entry = {"wave": wave.key, "seed": wave.seed, "steps": [wave.first, wave.last], "scores": scores}
    entry["trials"] = {label: trial.number for label, trial in wave.trials.items()}
    saved = {label: wave.folder(folder, label) / CHECKPOINTS / str(wave.last) for label in wave.trials}
    entry["states"] = {label: state_sha256(checkpoint) for label, checkpoint in saved.items()}
    return logged(folder, done, {**entry, "files": files})


@dataclass(frozen=True)
class PairsEvaluation:
    """An evaluation of the held-out pairs after a step. metrics: by name. rows: a value of each pair."""

    step: int
    metrics: FloatMetrics
    rows: PairValues


def start_states(lab: Lab, folder: Path, wave: Wave, done: Sequence[Mapping[str, Any]]) -> States:
    """Return the states of a wave's trials: from their checkpoints or, at step 0, the initial states with the
    trials' learning rates and knobs.

    done: the log. Raises ValueError if a file of an earlier wave differs from its hash in the log.
    """
    set_trial = make_set_trial(lab.study)
    states = []
    before = [x for x in done if x.get("seed") == wave.seed and x["steps"][1] == wave.first]
    for number, (label, trial) in enumerate(wave.trials.items()):
        if wave.first == 0:
            state = jax.tree.map(lambda x: x.copy(), lab.initial[wave.seed][number])  # the step donates it
            states.append(set_trial(state, trial))
            continue
        earlier = next(entry for entry in before if entry["trials"][label] == trial.number)
        check_earlier(wave.folder(folder, label), earlier, label)
        with contextlib.closing(checkpoints_of(wave.folder(folder, label))) as saved:
            restored = saved.restore(lab.job.abstract_states[number], wave.first)
        assert restored is not None
        states.append(restored[0])
    return tuple(states)


def check_earlier(trial: Path, wave: Mapping[str, Any], label: str) -> None:
    """Raise ValueError if a trial's evaluations up to the end of an earlier wave, or its checkpoint there,
    differ from their hashes in the log.

    trial: folder. wave: entry in the log. Later evaluations are ignored: a killed wave may have written them.
    """
    step, path = wave["steps"][1], trial / EVALUATIONS
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if json.loads(line)["step"] <= step)
    if hashlib.sha256(kept).hexdigest() != wave["files"][label][path.name]:
        raise ValueError(f"{path}: the file was changed after it was written; restore it")
    check_state(trial / CHECKPOINTS / str(step), wave["states"][label])


def check_state(checkpoint: Path, sha256: str) -> None:
    """Raise ValueError if the hash of a checkpoint's arrays is not `sha256`, the one in the log."""
    if state_sha256(checkpoint) != sha256:
        raise ValueError(f"{checkpoint}: the checkpoint was changed after it was written; restore it")


def state_sha256(checkpoint: Path) -> str:
    """Return a hash of a checkpoint's arrays, from its manifest. Raises ValueError for a damaged manifest."""
    try:
        leaves = manifest.read_manifest(checkpoint)["leaves"]
    except manifest.Corrupt as error:
        raise ValueError(f"{checkpoint}: {error}; restore it") from error
    return digest_of(leaves)


def checkpoints_of(trial: Path) -> Checkpoints:
    """Return the checkpoints of a trial's folder. The newest two are kept: a wave that is killed before it is
    in the log is repeated from the older one.
    """
    return Checkpoints(trial / CHECKPOINTS, keep_last=2, keep_best=0)


def evaluate_states(lab: Lab, states: States, step: int, metrics: Any) -> list[PairsEvaluation]:
    """Evaluate each state on the held-out pairs after step `step`. metrics: of training in that step."""
    trained = jax.device_get({name: metrics[name] for name in ("loss", "skipped")})
    evaluations = []
    for k, (means, rows) in enumerate(lab.compiled.evaluate(lab.compiled.averaged(states), True)):
        values: dict[str, list[float]] = {}
        for at, row in rows.items():
            for name, value in row.items():
                values.setdefault(name, [math.nan] * len(lab.pairs.names))[lab.pair_at(at)] = value
        values[ACCURACY] = [
            x if math.isfinite(m) else m for x, m in zip(values[ACCURACY], values[MARGIN], strict=True)
        ]
        logged = {name: float(x.total[k] / x.weight[k]) for name, x in trained.items()}
        named = {HELD_OUT + name: value for name, value in means.items()}
        evaluations.append(PairsEvaluation(step, {**logged, **named}, values))
    return evaluations


def tuning_score(lab: Lab, evaluation: PairsEvaluation) -> float | None:
    """Return the metric's mean over the prompts that select settings; None without a finite value."""
    values = lab.pairs.by_prompt(evaluation.rows[lab.study.metric], tuning=True)
    finite = values[np.isfinite(values)]  # NaN: a pair has weight 0, or the loss diverged
    return float(finite.mean()) if len(finite) else None


def write_trial(
    lab: Lab, folder: Path, wave: Wave, label: str, state: TrainState, evaluations: list[PairsEvaluation]
) -> dict[str, str]:
    """Write a trial's folder after a wave; return file name -> SHA-256."""
    trial_path = wave.folder(folder, label)
    (trial_path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with contextlib.closing(checkpoints_of(trial_path)) as saved:
        saved.save(wave.last, state, {})
    earlier = read_evaluations(trial_path / EVALUATIONS) if wave.first else []
    every = [*(e for e in earlier if e.step <= wave.first), *evaluations]
    run = plain_run(lab.study, label, wave.trials[label], wave.seed)
    run_record.write_durable_json(trial_path / "config.json", describe(run))
    lines = [
        json.dumps({"step": e.step, "metrics": json_value(e.metrics), "rows": json_value(e.rows)})
        for e in every
    ]
    write_durably(trial_path / EVALUATIONS, "".join(f"{line}\n" for line in lines).encode())
    logged = [format_line(e.step, e.metrics, {}) for e in every]
    write_durably(trial_path / METRICS, "".join(f"{line}\n" for line in logged).encode())
    rows = [
        json.dumps({"row": name, **json_value({key: x[i] for key, x in every[-1].rows.items()})})
        for i, name in enumerate(lab.pairs.names)
    ]
    write_durably(trial_path / HELD_OUT_ROWS, "".join(f"{row}\n" for row in rows).encode())
    names = ("config.json", EVALUATIONS, METRICS, HELD_OUT_ROWS)
    return dict(zip(names, files_sha256([trial_path / name for name in names]), strict=True))


def read_evaluations(path: Path) -> list[PairsEvaluation]:
    """Read a trial's evaluations; a value that was not finite is NaN."""

    def number(x: float | None) -> float:
        return math.nan if x is None else x

    evaluations = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        rows = {name: [number(x) for x in values] for name, values in entry["rows"].items()}
        metrics = {name: number(x) for name, x in entry["metrics"].items()}
        evaluations.append(PairsEvaluation(entry["step"], metrics, rows))
    return evaluations
