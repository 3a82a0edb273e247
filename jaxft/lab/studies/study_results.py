"""The results of a study: paired comparisons at the end and at the same KL, curves, and sensitivity to knobs.

Compared are the metric's means over the pairs of each held-out prompt; prompts that selected settings are
left out. A policy that has moved further from the reference is likely to have a higher accuracy, whatever its
loss. So losses are also compared where their policies have the same KL, at four levels. There they are
compared once more with prompts weighted so that longer and shorter chosen responses count the same: a policy
that has only learned to prefer length is right wherever the chosen response is the longer one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxft.lab.studies.halving import (
    DECLARATION,
    EVALUATIONS,
    LEDGER,
    HeldOutPairs,
    PairsEvaluation,
    check_state,
    read_evaluations,
    trial_folder,
)
from jaxft.objectives.metrics import HELD_OUT, KL
from jaxft.objectives.pair import ACCURACY, MARGIN
from jaxft.report.statistics import Adjusted, Difference, equivalence, holm, paired_difference
from jaxft.runs.metrics_log import check_chain, whole_lines
from jaxft.runs.run_record import CHECKPOINTS, read_saved_json
from jaxft.weights.hf.complete_folders import files_sha256

KL_LEVELS = (0.25, 0.5, 0.75, 1.0)  # of the largest KL that both losses reach
START = {ACCURACY: 0.5}  # at step 0, where the policy is the reference; the margin is 0 there


def finite_mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, NaN if there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


@dataclass(frozen=True)
class FinalCurve:
    """The E evaluations of a loss's final run; the first one is at step 0.

    kl: KL per token to the reference. values: the study's metric for each of P compared prompts. per_token:
    growth of the margin, in nats, for each token by which the chosen response is longer than the rejected
    one. metrics: all logged metrics by name; {} at step 0.
    """

    steps: tuple[int, ...]
    kl: Float[np.ndarray, " E"]
    values: Float[np.ndarray, "E P"]
    per_token: Float[np.ndarray, " E"]
    metrics: tuple[Mapping[str, float], ...]

    @property
    def diverged(self) -> bool:
        """Whether no compared prompt has a finite value after the last step."""
        return not np.isfinite(self.values[-1]).any()

    @property
    def largest_kl(self) -> float:
        """The largest finite KL among the evaluations."""
        return float(self.kl[np.isfinite(self.kl)].max())

    def at_kl(self, kl: float) -> Float[np.ndarray, " P"]:
        """Return the values at the KL `kl`, interpolated linearly between evaluations, sorted by their KL."""
        order = [n for n in np.argsort(self.kl, kind="stable") if np.isfinite(self.kl[n])]
        weights = [np.interp(kl, self.kl[order], row) for row in np.eye(len(order))]
        return np.asarray(weights) @ self.values[order]


@dataclass(frozen=True)
class Sensitivity:
    """Best, median and worst metric of a loss's trials after the first stage, which ends at `step`.

    The metric is the mean over the prompts that select settings; -inf for a trial that diverged.
    """

    step: int
    best: float
    median: float
    worst: float


@dataclass(frozen=True)
class LossOutcome:
    """The results of one loss. winner: its best setting. trials: (setting, last step, metric on the prompts
    that select settings, None if the trial diverged) of each trial. curves: the final run of each seed.
    """

    label: str
    winner: str
    trials: tuple[tuple[str, int, float | None], ...]
    sensitivity: Sensitivity
    curves: tuple[FinalCurve, ...]

    @property
    def final(self) -> Float[np.ndarray, "S P"]:
        """Return the values after the last step, one for each seed and compared prompt."""
        return np.stack([curve.values[-1] for curve in self.curves])

    @property
    def mean(self) -> float:
        """The mean final value over prompts and the seeds that did not diverge; NaN if all did."""
        return finite_mean(self.final)

    @property
    def largest_kl(self) -> float:
        """The largest KL that the runs of all seeds have reached."""
        return min(curve.largest_kl for curve in self.curves)

    def at_kl(self, kl: float) -> Float[np.ndarray, "S P"]:
        """Return the values at the KL `kl`, one for each seed and compared prompt."""
        return np.stack([curve.at_kl(kl) for curve in self.curves])


@dataclass(frozen=True)
class MatchedKL:
    """A comparison of two losses whose policies have the same KL. p: adjusted for all such comparisons.

    same_length: the comparison with prompts weighted so that longer and shorter chosen responses count the
    same; None if none are longer, or none are shorter. length_p: its adjusted p-value.
    """

    kl: float
    difference: Difference
    p: float
    same_length: Difference | None = None
    length_p: float = 1.0

    @property
    def winner(self) -> int:
        """Return 1 if the second loss is better, -1 if the first one is, 0 if the difference may be
        chance.
        """
        return int(np.sign(self.difference.mean)) if self.difference.different(p=self.p) else 0

    @property
    def length_winner(self) -> int:
        """The winner in `same_length`, as in `winner`; 0 without it."""
        d = self.same_length
        return int(np.sign(d.mean)) if d is not None and d.different(p=self.length_p) else 0


@dataclass(frozen=True)
class Duel:
    """A comparison of two losses. difference: the second minus the first. p, equivalence_p: adjusted for all
    duels of the study (Holm). matched: comparisons from low to high KL. margin: see Study. diverged: number
    of diverged runs by loss; the seeds of these runs are left out.
    """

    one: str
    other: str
    difference: Difference
    p: float
    matched: tuple[MatchedKL, ...]
    margin: float | None
    equivalence_p: float = 1.0
    diverged: Mapping[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The result in words: which loss is better at the end, and whether it also is at the same KL."""
        left_out = [
            f"{label} diverged with {n} seed{'s' * (n > 1)}" for label, n in self.diverged.items() if n
        ]
        return "; ".join([self._verdict(), *left_out])

    def _verdict(self) -> str:
        text = self.difference.verdict(Adjusted(self.p, self.equivalence_p), self.margin)
        if text != "different":
            return text
        sign = int(np.sign(self.difference.mean))
        better = self.other if sign > 0 else self.one
        winners = [point.winner for point in self.matched]
        if not winners:
            return f"{better} is better at the end; one of the two never leaves the reference"
        if all(w == sign for w in winners):
            where = " and at every KL that both reach"
            if self.matched[-1].same_length and self.matched[-1].length_winner != sign:
                where += ", but not where longer and shorter chosen responses count the same"
            return f"{better} is better at the end{where}"
        if -sign in winners:
            return f"{better} is better at the end, but worse at some KL that both reach"
        if winners[-1] == sign:
            return (
                f"{better} is better at the end and at the largest KL that both reach, but not at every "
                "smaller one"
            )
        return f"{better} is better at the end; at the same KL they are not distinguishable"


@dataclass(frozen=True)
class StudyResult:
    """A finished study. declaration: see declare. log: entries of study.jsonl. digest: of its last line."""

    folder: Path
    declaration: Mapping[str, Any]
    metric: str
    losses: tuple[LossOutcome, ...]
    duels: tuple[Duel, ...]
    pairs: HeldOutPairs
    log: tuple[Mapping[str, Any], ...]
    digest: str

    @property
    def order(self) -> list[LossOutcome]:
        """The losses, the highest mean first; those that diverged last."""
        return sorted(self.losses, key=lambda loss: math.inf if math.isnan(loss.mean) else -loss.mean)

    def lines(self) -> list[str]:
        """Return the conclusions as sentences."""
        lines = [
            f"{d.other} against {d.one}, {self.metric}: {d.difference.mean:+.4f} "
            f"{d.difference.interval.text(4)}, p = {d.p:.2g} (Holm): {d.verdict}"
            for d in self.duels
        ]
        first = self.losses[0].final
        for loss in self.losses:
            if diverged := [n for n, curve in enumerate(loss.curves) if curve.diverged]:
                seeds = ", ".join(str(self.declaration["study"]["seeds"][n]) for n in diverged)
                lines.append(f"{loss.label} diverged with seed {seeds}: no held-out value is finite")
        if len(self.losses[0].curves) < 2:
            lines.append("with one seed, these results are about that seed alone")
        if not any(d.difference.different(p=d.p) for d in self.duels):
            size = f"{first.shape[1]} prompts and {len(first)} seeds"
            lines.append(f"no loss is better than another with {size}")
        return lines


def read_study(folder: Path) -> StudyResult:
    """Read a finished study. Raises ValueError or OSError if it is not finished or its files have changed."""
    log = [json.loads(line) for line in whole_lines(folder / LEDGER)]
    if not log or not log[-1].get("finished"):
        raise ValueError(f"{folder} is not a finished study; run its command again, which continues it")
    digest = check_study(folder, log)
    declaration = read_saved_json(folder / DECLARATION)
    pairs = HeldOutPairs.of_json(declaration["facts"]["held_out"])
    metric, margin = declaration["study"]["metric"], declaration["study"]["margin"]
    labels = declaration["study"]["losses"]
    losses = tuple(_loss_outcome(folder, label, declaration, log, pairs) for label in labels)
    duels = duels_of(losses, margin, length_weights(pairs))
    return StudyResult(folder, declaration, metric, losses, duels, pairs, tuple(log), digest)


def check_study(folder: Path, log: Sequence[Mapping[str, Any]]) -> str:
    """Check a study's files against its log; return the digest of the log's last line.

    Raises ValueError for a changed file, and FileNotFoundError for a log without digests.
    """
    digest = check_chain(folder / LEDGER)
    newest: dict[Path, str] = {}
    states: dict[Path, tuple[Path, str]] = {}
    for entry in log:
        for label, files in entry.get("files", {}).items():
            place = trial_folder(folder, label, entry["trials"][label], entry["seed"])
            newest |= {place / name: sha256 for name, sha256 in files.items()}
            states[place] = place / CHECKPOINTS / str(entry["steps"][1]), entry["states"][label]
    for path, sha256 in newest.items():
        if not path.is_file() or files_sha256([path]) != [sha256]:
            raise ValueError(f"{path}: the file was changed after it was written; restore it")
    for checkpoint, sha256 in states.values():
        if checkpoint.is_dir():  # it may be removed to save space
            check_state(checkpoint, sha256)
    return digest


def _loss_outcome(
    folder: Path,
    label: str,
    declared: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    pairs: HeldOutPairs,
) -> LossOutcome:
    """Read a loss's results. declared: the study's declaration."""
    winner, seeds = log[-1]["winners"][label], declared["study"]["seeds"]
    last: dict[int, tuple[int, float | None]] = {}
    stages: dict[int, list[float | None]] = {}
    for wave in log:
        if "wave" in wave and wave["seed"] == seeds[0]:
            step, score = wave["steps"][1], wave["scores"][label]
            last[wave["trials"][label]] = step, score
            stages.setdefault(step, []).append(score)
    settings = declared["trials"][label]
    trials = tuple((setting, *last[number]) for number, setting in enumerate(settings))
    step, scores = next(iter(stages.items()))
    values = sorted(-math.inf if x is None else x for x in scores)
    sensitivity = Sensitivity(step, values[-1], median(values), values[0])
    finals = [trial_folder(folder, label, winner["trial"], seed) for seed in seeds]
    runs = [read_evaluations(final / EVALUATIONS) for final in finals]
    curves = final_curves(runs, declared["study"]["metric"], pairs)
    return LossOutcome(label, winner["setting"], trials, sensitivity, curves)


def final_curves(
    runs: Sequence[Sequence[PairsEvaluation]], metric: str, pairs: HeldOutPairs
) -> tuple[FinalCurve, ...]:
    """Return the curve of each seed's run, at the steps at which all were evaluated; only the first seed's
    run is also evaluated at the ends of the stages.
    """
    common = set.intersection(*({e.step for e in run} for run in runs))
    return tuple(final_curve([e for e in run if e.step in common], metric, pairs) for run in runs)


def final_curve(evaluations: Sequence[PairsEvaluation], metric: str, pairs: HeldOutPairs) -> FinalCurve:
    """Return the curve of a run: step 0, where the policy is the reference, and then its evaluations."""
    values = [pairs.by_prompt(e.rows[metric], tuning=False) for e in evaluations]
    first = np.full_like(values[0], START.get(metric, 0.0))
    kl = [0.0, *(e.metrics[HELD_OUT + KL] for e in evaluations)]
    steps = (0, *(e.step for e in evaluations))
    slopes = np.array([0.0, *(margin_per_token(e.rows[MARGIN], pairs) for e in evaluations)])
    metrics = {}, *(e.metrics for e in evaluations)
    return FinalCurve(steps, np.asarray(kl), np.stack([first, *values]), slopes, metrics)


def margin_per_token(margins: Sequence[float], pairs: HeldOutPairs) -> float:
    """Return the least-squares slope of the compared prompts' margins over the number of tokens by which the
    chosen response is longer; NaN if that number is the same for all prompts, or no margin is finite.
    """
    x, y = (pairs.by_prompt(values, tuning=False) for values in (pairs.longer, margins))
    known = np.isfinite(y)
    if not known.any():
        return math.nan
    x, y = x[known] - x[known].mean(), y[known]
    return float(x @ y / (x @ x)) if x.any() else math.nan


def length_weights(pairs: HeldOutPairs) -> Float[np.ndarray, " P"] | None:
    """Return weights of the compared prompts, with which longer and shorter chosen responses count the same
    in total; None if no chosen response is longer, or none is shorter.
    """
    longer = np.sign(pairs.by_prompt(pairs.longer, tuning=False))
    counts = {side: int((longer == side).sum()) for side in (1, -1)}
    if not all(counts.values()):
        return None
    half = sum(counts.values()) / 2
    return np.select([longer == side for side in counts], [half / n for n in counts.values()], 1.0)


def duels_of(
    losses: Sequence[LossOutcome], margin: float | None, weights: Float[np.ndarray, " P"] | None = None
) -> tuple[Duel, ...]:
    """Compare every two losses that both have finite values with some seed, at the end and at the same KL."""
    two = [(one, other, both) for one, other in combinations(losses, 2) if (both := _finite(one, other))]
    ends = [paired_difference(one.final, other.final) for *_, (one, other) in two]
    points = []
    for number, (*_, (one, other)) in enumerate(two):
        largest = min(one.largest_kl, other.largest_kl)
        for kl in (fraction * largest for fraction in KL_LEVELS if largest > 0):
            values = one.at_kl(kl), other.at_kl(kl)
            balanced = None if weights is None else paired_difference(*values, weights)
            points.append((number, MatchedKL(kl, paired_difference(*values), 1.0, balanced)))
    adjusted = holm([point.difference.p for _, point in points])
    of_length = holm([1.0 if point.same_length is None else point.same_length.p for _, point in points])
    same = holm([1.0 if margin is None else equivalence(d, margin) for d in ends])
    known = [
        (number, replace(point, p=p, length_p=length_p))
        for (number, point), p, length_p in zip(points, adjusted, of_length, strict=True)
    ]
    return tuple(
        Duel(
            one.label, other.label, ends[n], p, tuple(point for number, point in known if number == n),
            margin, same[n], {loss.label: sum(c.diverged for c in loss.curves) for loss in (one, other)},
        )
        for n, ((one, other, _), p) in enumerate(zip(two, holm([d.p for d in ends]), strict=True))
    )  # fmt: skip


def _finite(one: LossOutcome, other: LossOutcome) -> tuple[LossOutcome, LossOutcome] | None:
    """Return both losses without the seeds with which either diverged; None if no seed is left."""
    pairs = zip(one.curves, other.curves, strict=True)
    kept = [pair for pair in pairs if not any(curve.diverged for curve in pair)]
    if not kept:
        return None
    first, second = zip(*kept, strict=True)
    return replace(one, curves=first), replace(other, curves=second)
