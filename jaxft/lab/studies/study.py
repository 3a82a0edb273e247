"""Declare a study: a comparison of preference losses whose rows, seeds and searched hyperparameters are fixed
before training.

`jaxft study FILE` runs it. FILE has a function `study() -> Study`; knobs are a loss's hyperparameters:

    from jaxft.lab.studies.study import LogRange, SearchedLoss, Study, study_recipe
    from jaxft.objectives.losses.preference_losses import dpo, ipo

    def study() -> Study:
        return Study(
            name="dpo-or-ipo",
            recipe=study_recipe("dpo", "loop.steps=26"),
            losses={
                "dpo": SearchedLoss(dpo, {"beta": LogRange(0.03, 0.3)}),
                "ipo": SearchedLoss(ipo, {"beta": LogRange(0.03, 0.3)}),
            },
            lr=LogRange(2e-5, 2e-4),
            trials=6,
            seeds=(0, 1, 2),
        )
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jaxft.annotations import (
    ABOVE_ZERO_TO_ONE,
    INSIDE_ZERO_AND_ONE,
    PositiveFloat,
    PositiveInt,
    Seed,
    above,
    check_bounds,
    one_of,
)
from jaxft.lab.loss_evaluation import loss_knobs
from jaxft.nn.tree import nearest
from jaxft.objectives.pair import ACCURACY, MARGIN, check_knobs, loss_name
from jaxft.runs.settings.setting_values import describe, differences, find_file, format_error, run_file
from jaxft.runs.versions_and_devices import versions
from jaxft.train.settings import Run
from jaxft.train.start import open_settings

METRICS_OF_PAIRS = (ACCURACY, MARGIN)  # have a value for each held-out pair, in the same unit for all losses
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)  # bases of Halton's sequence: for the learning rate, then for each knob


@dataclass(frozen=True)
class LogRange:
    """Numbers from `low` to `high`, searched evenly on a logarithmic scale."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(
                f"LogRange({self.low}, {self.high}): use finite numbers above 0, the lower one first"
            )

    def at(self, fraction: float) -> float:
        """Return the number at a fraction of the range, rounded to 4 digits.

        >>> LogRange(1e-5, 1e-3).at(0.5)
        0.0001
        """
        return float(f"{self.low * (self.high / self.low) ** fraction:.4g}")


Values = tuple[float, ...] | LogRange  # that a search tries for a knob or the learning rate


@dataclass(frozen=True)
class SearchedLoss:
    """A preference loss `(pair, **knobs) -> [B, P]`, and the values of its knobs to search.

    Knobs that are not listed keep their defaults; set one with `partial(ipo, beta=0.1)`.
    """

    fn: Callable[..., Array]
    knobs: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class LossTrial:
    """A learning rate and knobs with which a loss is trained. number: 0, 1, ... within the loss."""

    number: int
    lr: float
    knobs: Mapping[str, float]

    def __str__(self) -> str:
        knobs = {"lr": self.lr, **self.knobs}
        return ", ".join(f"{name}={value:g}" for name, value in knobs.items())


class Rung(NamedTuple):
    """A stage of successive halving: `trials` trials of each loss are trained up to step `steps`."""

    trials: int
    steps: int


@dataclass(frozen=True)
class Study:
    """A comparison of preference losses with the same budget for each.

    name: results are in runs/NAME. recipe: a run on pairs with a fresh adapter; each of `losses` replaces its
    loss, and its loop.steps is the length of a full run. losses: by label. lr: learning rates to search, the
    same for every loss. trials: number of settings (learning rate and knobs) of each loss, all trained with
    the first seed. keep: fraction of the trials that train on after each stage of successive halving; 1
    trains all to the end. seeds: of the final runs of each loss with its best setting; a seed determines the
    adapter at step 0 and the order of the rows. metric: selects settings and compares losses, on held-out
    pairs: rewards/accuracies, or rewards/margins in nats. margin: the largest difference of the metric that
    does not matter, for tests of equivalence; None for no test. tuning: fraction of the held-out prompts on
    which settings are selected; losses are compared on the others. evaluations: how many a full run has.

    >>> from jaxft.objectives.losses.preference_losses import dpo, ipo
    >>> losses = {"dpo": SearchedLoss(dpo, {"beta": LogRange(0.03, 0.3)}), "ipo": SearchedLoss(ipo)}
    >>> study = Study("dpo-or-ipo", study_recipe("dpo", "loop.steps=26"), losses, lr=LogRange(2e-5, 2e-4))
    >>> study.trials, study.seeds
    (6, (0, 1, 2))
    """

    name: str
    recipe: Run
    losses: Mapping[str, SearchedLoss]
    lr: tuple[PositiveFloat, ...] | LogRange
    trials: PositiveInt = 6
    keep: Annotated[float, ABOVE_ZERO_TO_ONE] = 1 / 3
    seeds: tuple[Seed, ...] = (0, 1, 2)
    metric: Annotated[str, one_of(METRICS_OF_PAIRS)] = ACCURACY
    margin: Annotated[float | None, above(0)] = None
    tuning: Annotated[float, INSIDE_ZERO_AND_ONE] = 0.5
    evaluations: PositiveInt = 4

    def __post_init__(self) -> None:
        check_bounds(self, "study")
        if len(self.losses) < 2:
            raise ValueError(f"study.losses has {len(self.losses)} losses; a comparison needs at least 2")
        if not (isinstance(self.seeds, tuple) and 0 < len(self.seeds) == len({*self.seeds})):
            raise ValueError(f"study.seeds={self.seeds}: expected a tuple of different seeds")
        if not self.recipe.loop.steps:
            raise ValueError(
                "study.recipe has loop.steps=None, but the stages of the search depend on it; set loop.steps"
            )
        if self.recipe.adapter is None or self.recipe.start or self.recipe.data.unit != "pairs":
            raise ValueError(
                "study.recipe must train a fresh adapter on pairs, such as configs/dpo.py; "
                "leave out full=true and start"
            )
        if not self.recipe.data.holds_out:
            raise ValueError("study.recipe holds out no pairs to compare the losses on; set held_out")
        kind = self.recipe.objective(self.recipe.model).facts.reference
        if kind not in ("start", "none"):
            raise ValueError(
                f"study.recipe has a {kind} reference, but a study's reference is the policy at step 0; "
                "set reference=start"
            )
        self._check_stages()
        _check_values("study", "lr", self.lr)
        for label, loss in self.losses.items():
            _check_loss(label, loss)
            self.trials_of(label)

    def _check_stages(self) -> None:
        """Raise ValueError if a stage of successive halving has no step of training."""
        steps = self.recipe.loop.steps or 0

        def rise(steps: int) -> bool:
            ends = [rung.steps for rung in self._rungs(steps)]
            return all(before < after for before, after in zip([0, *ends], ends, strict=False))

        if not rise(steps):
            enough = next(more for more in range(steps, 2**31) if rise(more))
            ends = ", ".join(str(rung.steps) for rung in self.rungs)
            raise ValueError(
                f"study.trials={self.trials}, keep={self.keep:g}: with loop.steps={steps} the stages end at "
                f"steps {ends}, so that one has no step. Set loop.steps to {enough} or more, or lower "
                "study.trials"
            )

    def trials_of(self, label: str) -> list[LossTrial]:
        """Return the trials of a loss. Raises ValueError if its values have fewer combinations than `trials`.

        With a LogRange, trials are points of Halton's sequence, which fills the ranges evenly, and all losses
        have the same learning rates. If all values are listed, they are a fixed random choice of
        combinations.
        """
        searched = {"lr": self.lr, **self.losses[label].knobs}
        if all(isinstance(values, tuple) for values in searched.values()):
            every = product(*(values for values in searched.values() if isinstance(values, tuple)))
            grid = list(dict.fromkeys(every))
            order = np.random.default_rng(0).permutation(len(grid))[: self.trials]
            points = [grid[i] for i in sorted(order)]
        else:
            points = [
                tuple(
                    _value(values, _halton(number, base))
                    for values, base in zip(searched.values(), PRIMES, strict=False)
                )
                for number in range(self.trials)
            ]
        if len(set(points)) < self.trials:
            raise ValueError(
                f"study.trials={self.trials}, but {label} has only {len(set(points))} settings; list more "
                "values, or use a wider LogRange"
            )
        return [
            LossTrial(number, lr, dict(zip(self.losses[label].knobs, knobs, strict=True)))
            for number, (lr, *knobs) in enumerate(points)
        ]

    @property
    def rungs(self) -> list[Rung]:
        """The stages of successive halving: each trains a fraction `keep` of the previous stage's trials, the
        best ones, up to about 1 / keep times as many steps.

        With trials=6, keep=1/3 and 18 steps: 6 trials to step 2, the best 2 to step 6, the best 1 to step 18.
        """
        return self._rungs(self.recipe.loop.steps or 0)

    def _rungs(self, steps: int) -> list[Rung]:
        counts = [self.trials]
        while counts[-1] > 1 and self.keep < 1:
            counts.append(max(1, math.floor(round(counts[-1] * self.keep, 9))))
        last = len(counts) - 1
        return [
            Rung(count, max(1, math.ceil(round(steps * self.keep ** (last - number), 9))))
            for number, count in enumerate(counts)
        ]

    @property
    def waves(self) -> int:
        """Number of waves: each trains one trial of every loss in a stage, or with another seed."""
        return sum(rung.trials for rung in self.rungs) + len(self.seeds) - 1

    @property
    def steps_per_loss(self) -> int:
        """Number of optimizer steps of each loss: its trials, and the final runs with other seeds."""
        done = [0, *(rung.steps for rung in self.rungs)]
        search = sum(r.trials * (r.steps - before) for r, before in zip(self.rungs, done, strict=False))
        return search + (len(self.seeds) - 1) * (self.recipe.loop.steps or 0)


def _check_loss(label: str, loss: SearchedLoss) -> None:
    """Raise ValueError for an unusable label, or for knobs or values that cannot be searched."""
    if not label or any(sign in label for sign in "/\\,= "):
        raise ValueError(f"study.losses has the label {label!r}; use letters, digits, - and _")
    known = loss_knobs(loss.fn)
    for name, values in loss.knobs.items():
        if name not in known:
            near = ", ".join(nearest(name, list(known), 5)) or "none, it has no knobs"
            raise ValueError(
                f"study.losses[{label}]: {loss_name(loss.fn)} has no knob {name!r}; near: {near}"
            )
        if isinstance(known[name][1], bool | str) or callable(known[name][1]):
            fixed = f"partial({loss_name(loss.fn)}, {name}=...)"
            raise ValueError(
                f"study.losses[{label}]: {name} is not a number and cannot be searched; set it with {fixed}"
            )
        _check_values(f"study.losses[{label}]", name, values)
    if len(loss.knobs) >= len(PRIMES):
        raise ValueError(
            f"study.losses[{label}]: at most {len(PRIMES) - 1} knobs can be searched; "
            "set some of them with partial"
        )
    check_knobs(loss.fn)


def _check_values(where: str, name: str, values: Any) -> None:
    """Raise ValueError unless `values` is a LogRange or a tuple of finite numbers."""
    if isinstance(values, LogRange):
        return
    if not isinstance(values, tuple):
        raise ValueError(f"{where}: {name}={values!r}; expected a LogRange, or a tuple of numbers")
    if not values:
        raise ValueError(f"{where}: {name} has no values; list some, or leave it out")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: {name} has the value {value!r}; use finite numbers")


def _value(values: Values, fraction: float) -> float:
    return values.at(fraction) if isinstance(values, LogRange) else values[int(fraction * len(values))]


def _halton(number: int, base: int) -> float:
    """Return a number of Halton's sequence (1960) in (0, 1): the digits of number + 1 in `base`, mirrored at
    the point. In base 2 the sequence is 1/2, 1/4, 3/4, 1/8, ...
    """
    number, point, scale = number + 1, 0.0, 1.0
    while number:
        scale /= base
        number, digit = divmod(number, base)
        point += digit * scale
    return point


def study_recipe(recipe: str, *overrides: str) -> Run:
    """Return the Run of `jaxft train RECIPE OVERRIDES`; lengths and batches that are not set fit the rows."""
    return open_settings.fitted(open_settings.resolve(recipe, list(overrides)))[0].value


def load_study(path: str) -> tuple[Study, Path]:
    """Return (the Study that a Python file declares, the file's path). Raises ValueError or OSError."""
    file = find_file(path)
    make = vars(run_file(file)).get("study")
    if not callable(make):
        raise ValueError(f"{path} has no function study() -> Study; add one")
    try:
        made = make()
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a user's file
        raise ValueError(f"{path}: {format_error(error, file)}") from error
    if not isinstance(made, Study):
        raise ValueError(f"{path}: study() returned type {type(made).__name__}; expected a Study")
    return made, file


def declare(study: Study, file: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study's declaration: all that is fixed before training, as JSON, with its SHA-256 (`digest`).

    file: the Python file of the study. facts: hashes of rows and weights, and the held-out pairs.
    """
    trials = {label: [str(trial) for trial in study.trials_of(label)] for label in study.losses}
    body = {
        "study": describe(replace(study, name="")),
        "trials": trials,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "facts": dict(facts),
        "versions": versions(),
    }
    body = json.loads(json.dumps(body))
    return {**body, "digest": digest_of(body)}


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_declared(folder: Path, known: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if a study's stored declaration `known` was edited, or is not the new one, `now`."""
    body = {name: value for name, value in known.items() if name != "digest"}
    if known.get("digest") != digest_of(body):
        raise ValueError(
            f"{folder / 'declaration.json'} was edited after the study was declared: it does not match its "
            "digest; restore it, or start a new study with another name="
        )
    if known["digest"] == now["digest"]:
        return
    lines = [line for line in differences(known, now) if not line.startswith(("digest", "file_sha256"))]
    shown = "; ".join(lines[:3]) or "only text of its file that changes no setting"
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    raise ValueError(
        f"{folder}: the study has changed since it was declared: {shown}{more}. Undo that, or choose another "
        "name="
    )
