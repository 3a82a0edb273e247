"""Paired comparisons of two settings over held-out prompts and training seeds.

Two settings that are trained with the same seeds s and evaluated on the same prompts p differ by d[s, p] =
second[s, p] - first[s, p]. A study reports the mean of d. The variance of this mean has three components,
which are estimated separately: seeds, prompts, and the residual of each pair (s, p) (the crossed two-way
model with random effects). More prompts lower only the second and the third, more seeds only the first and
the third. From these a study computes how many prompts, or how many seeds, it would need to find a difference
that it could not distinguish from 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxft.objectives.intervals import LEVEL, Interval

POWER = 0.8  # probability of finding a difference for which sample sizes are computed
UNFEASIBLE = 1_000_000  # a number of prompts or seeds that nobody can have
RESAMPLES = 4000


def _special() -> Any:
    """Return scipy.special, which most runs do not need and which takes time to import."""
    import scipy.special

    return scipy.special


class Components(NamedTuple):
    """The variances of the three random terms in d[s, p] = mean + seed[s] + prompt[p] + rest[s, p]."""

    seeds: float
    prompts: float
    rest: float

    def error(self, seeds: float, prompts: float) -> float:
        """Return the standard error of the mean over this many seeds and prompts."""
        return math.sqrt(self.seeds / seeds + self.prompts / prompts + self.rest / (seeds * prompts))


class Adjusted(NamedTuple):
    """p-values of one of several comparisons, adjusted by holm. difference: of the hypothesis that the
    settings are equal. equivalence: of the hypothesis that they differ by more than a margin.
    """

    difference: float
    equivalence: float = 1.0


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two settings.

    seeds, prompts: how many. mean: of the second setting minus the first. error: its standard error, with
    `freedom` degrees of freedom (Satterthwaite). p: two-sided, of the hypothesis of no difference, but at
    least the smallest p of a sign test over the prompts, so that five prompts never show a difference.
    interval: at 95 %, by Student's distribution. bootstrap: at 95 %, by resampling seeds and prompts. effect:
    Cohen's d, the mean over the standard deviation of the prompts' differences. wins: fraction of prompts on
    which the second setting's value is larger; a tie counts 1/2. unpaired_error: the standard error if each
    setting had its own seeds and prompts.
    """

    seeds: int
    prompts: int
    mean: float
    error: float
    freedom: float
    p: float
    interval: Interval
    bootstrap: Interval
    effect: float
    wins: float
    unpaired_error: float
    components: Components

    def different(self, p: float | None = None) -> bool:
        """Whether the test and the bootstrap both exclude 0. p: adjusted by holm, in place of self.p."""
        return (self.p if p is None else p) < 1 - LEVEL and not self.bootstrap.has(0)

    def verdict(
        self, adjusted: Adjusted | None = None, margin: float | None = None, unit: str = "prompts"
    ) -> str:
        """Return "different", "equivalent within ...", or "not distinguishable" and how much data it needs.

        adjusted: p-values for one of several comparisons. margin: the largest difference that does not
        matter; None: equivalence is not tested. unit: plural noun for prompts, such as "pairs".
        """
        if adjusted is None:
            adjusted = Adjusted(self.p, 1.0 if margin is None else equivalence(self, margin))
        if self.different(p=adjusted.difference):
            return "different"
        if margin is not None and adjusted.equivalence < 1 - LEVEL:
            return f"equivalent within {margin:g}"
        level = (1 - LEVEL) * (self.p / adjusted.difference if adjusted.difference else 1.0)
        return f"not distinguishable; {needed_text(self, margin, unit, level)}"


def paired_difference(
    one: Float[np.ndarray, "S P"],
    other: Float[np.ndarray, "S P"],
    weights: Float[np.ndarray, " P"] | None = None,
    key: int = 0,
) -> Difference:
    """Compare two settings by their values for the same seeds S and prompts P.

    A prompt with a value that is not finite is left out. With one seed the result is about it alone. weights:
    of each prompt in the mean. A weighted mean m is linearised: w (d - m) / mean(w) + m takes the place of d
    (Cochran 1977, Sampling Techniques, 6.3). key: random seed of the bootstrap. Raises ValueError for fewer
    than two prompts.

    >>> same = paired_difference(np.zeros((3, 10)), np.zeros((3, 10)))
    >>> same.mean, same.p
    (0.0, 1.0)
    """
    first, second = np.asarray(one, np.float64), np.asarray(other, np.float64)
    whole = np.isfinite(first).all(0) & np.isfinite(second).all(0)
    first, second = first[:, whole], second[:, whole]
    w = np.ones(first.shape[1]) if weights is None else np.asarray(weights, np.float64)[whole]
    seeds, prompts = first.shape
    if prompts < 2:
        raise ValueError(
            f"{prompts} prompts have values of both settings; a comparison needs at least 2, so add held-out "
            "prompts"
        )
    d, first, second = (_linearised(x, w / w.mean()) for x in (second - first, first, second))
    mean, (error, freedom), by_prompt = float(d.mean()), _error(d), d.mean(0)
    half = float(_special().stdtrit(freedom, (1 + LEVEL) / 2)) * error
    spread = float(by_prompt.std(ddof=1))
    return Difference(
        seeds=seeds,
        prompts=prompts,
        mean=mean,
        error=error,
        freedom=freedom,
        p=max(_two_sided(mean, error, freedom), 2.0 ** (1 - prompts)),
        interval=Interval(mean - half, mean + half),
        bootstrap=bootstrap(d, key),
        effect=mean / spread if spread else 0.0 if mean == 0 else math.copysign(math.inf, mean),
        wins=float(((by_prompt > 0) + 0.5 * (by_prompt == 0)).mean()),
        unpaired_error=math.hypot(_error(first)[0], _error(second)[0]),
        components=components(d),
    )


def _linearised(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return values whose mean and standard error equal the weighted ones of x. w: weights, of mean 1."""
    mean = (w * x).mean()
    return mean + w * (x - mean)


def components(d: Float[np.ndarray, "S P"]) -> Components:
    """Estimate the variances s, p and r of seeds, prompts and the rest from a two-way table d.

    The mean squares of seeds, prompts and the rest have the expectations r + P s, r + S p and r (Searle,
    Casella & McCulloch 1992, Variance Components, 4.4). A negative estimate becomes 0. With one seed, s and r
    are 0, and p contains the rest.
    """
    by_seed, by_prompt, rest = _mean_squares(d)
    seeds, prompts = d.shape
    if seeds == 1:
        return Components(0.0, by_prompt, 0.0)
    return Components(
        max(0.0, (by_seed - rest) / prompts), max(0.0, (by_prompt - rest) / seeds), max(0.0, rest)
    )


def _mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares (MS_s, MS_p, MS_r) of seeds, prompts and the rest of a two-way table."""
    seeds, prompts = d.shape
    mean, by_seed, by_prompt = d.mean(), d.mean(1), d.mean(0)
    rest = d - by_seed[:, None] - by_prompt[None] + mean
    of_seeds = prompts * np.square(by_seed - mean).sum() / max(1, seeds - 1)
    of_prompts = seeds * np.square(by_prompt - mean).sum() / (prompts - 1)
    of_rest = np.square(rest).sum() / max(1, (seeds - 1) * (prompts - 1))
    return float(of_seeds), float(of_prompts), float(of_rest)


def _error(d: np.ndarray) -> tuple[float, float]:
    """Return (standard error of the mean of d [seeds, prompts], its degrees of freedom)."""
    return _error_of(_mean_squares(d), *d.shape)


def _error_of(mean_squares: tuple[float, float, float], seeds: int, prompts: int) -> tuple[float, float]:
    """Return (standard error of the mean, its degrees of freedom) from _mean_squares.

    The variance of the mean is (MS_s + MS_p - MS_r) / SP, but at least max(MS_s, MS_p) / SP: otherwise a
    negative estimate of a part would make the error too small.
    """
    by_seed, by_prompt, rest = mean_squares
    if seeds == 1:
        return math.sqrt(by_prompt / prompts), prompts - 1.0
    parts = (by_seed, seeds - 1), (by_prompt, prompts - 1), (-rest, (seeds - 1) * (prompts - 1))
    total, largest = by_seed + by_prompt - rest, max(parts[:2])
    if total <= largest[0] * (1 + 1e-12):
        return math.sqrt(largest[0] / (seeds * prompts)), float(largest[1])
    freedom = total**2 / sum(x**2 / n for x, n in parts)
    return math.sqrt(total / (seeds * prompts)), float(max(seeds - 1, freedom))


def _two_sided(mean: float, error: float, freedom: float) -> float:
    if error == 0:
        return float(mean == 0)
    return float(2 * _special().stdtr(freedom, -abs(mean) / error))


def bootstrap(d: Float[np.ndarray, "S P"], key: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return the 95 % percentile interval of the mean of d, resampling seeds and prompts with replacement.

    Resampling both never understates the variance (Owen 2007, The pigeonhole bootstrap, Annals of Applied
    Statistics 1, 386-411), apart from a factor (n - 1) / n for n seeds or prompts. To undo this factor, the
    deviations of the seeds' and the prompts' means are multiplied by sqrt(n / (n - 1)). key: random seed.
    """
    seeds, prompts = d.shape
    mean, by_seed, by_prompt = d.mean(), d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    rest = d - by_seed - by_prompt + mean
    wider = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    x = mean + wider * (by_seed - mean) + math.sqrt(prompts / (prompts - 1)) * (by_prompt - mean) + rest
    random = np.random.default_rng(key)
    of_seeds, of_prompts = (_resampled(random, resamples, count) for count in x.shape)
    means = ((of_seeds @ x) * of_prompts).sum(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(low), float(high))


def _resampled(random: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """Draw `resamples` times `count` of `count` units, with replacement. Return [resamples, count]: how often
    each unit is drawn, divided by `count`.
    """
    picked = random.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(picked.ravel(), minlength=resamples * count).reshape(resamples, count) / count


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values of several comparisons, adjusted: with probability 95 %, no true hypothesis has an
    adjusted p-value below 0.05 (Holm 1979, Scandinavian Journal of Statistics 6, 65-70). p: in any order,
    which the result has too.

    >>> [round(x, 6) for x in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, (len(p) - rank) * p[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def equivalence(d: Difference, margin: float) -> float:
    """Return the p-value of the hypothesis that the true difference is outside of [-margin, margin].

    It is the larger p of two one-sided tests (Schuirmann 1987, TOST). If all differences are equal, there is
    no standard error; then p is (1 - margin)^n, the probability that none of n prompts differs although a
    fraction `margin` of all prompts differs by 1; or 1 if the difference is at least `margin`. Raises
    ValueError for a margin of 0 or less.
    """
    if margin <= 0:
        raise ValueError(
            f"an equivalence test has margin={margin}; use a number above 0: the largest difference that "
            "does not matter"
        )
    if d.error == 0:
        return 1.0 if abs(d.mean) >= margin else (1 - min(1.0, margin)) ** d.prompts
    return float(max(_special().stdtr(d.freedom, (side * d.mean - margin) / d.error) for side in (1, -1)))


def power(gap: float, error: float, freedom: float, level: float = 1 - LEVEL) -> float:
    """Return the probability that a two-sided t test at `level` finds a true difference of `gap`.

    error: the standard error of the estimated difference, with `freedom` degrees of freedom.

    >>> round(power(1.0, 1.0, 1000), 3)
    0.17
    """
    limit, shift = float(_special().stdtrit(freedom, 1 - level / 2)), abs(gap) / error
    missed = _special().nctdtr(freedom, shift, limit)  # NaN where it is too small to compute
    if np.isnan(missed):
        missed = _special().ndtr(limit - shift)
    return float(1 - missed + np.nan_to_num(_special().nctdtr(freedom, shift, -limit)))


def needed(
    parts: Components, gap: float, seeds: int, prompts: int, level: float = 1 - LEVEL
) -> tuple[int | None, int | None]:
    """Return (number of prompts, number of seeds), of which each alone would suffice to find a true
    difference of `gap` with probability 80 %; None if no number up to UNFEASIBLE does.

    parts: the variances per seed and prompt. seeds, prompts: how many there are now. level: of the test.
    """
    finds = partial(_finds, parts, gap, level)
    if gap == 0:
        return None, None
    return _least(lambda n: finds(seeds, n), prompts), _least(lambda n: finds(n, prompts), seeds)


def _finds(parts: Components, gap: float, level: float, seeds: int, prompts: int) -> bool:
    """Whether a t test at `level` finds a true difference of `gap` with probability 80 % or more."""
    squares = (parts.rest + prompts * parts.seeds, parts.rest + seeds * parts.prompts, parts.rest)
    error, freedom = _error_of(squares, seeds, prompts)
    if 2.0 ** (1 - prompts) >= level:  # the least p that there is
        return False
    return error == 0 or power(gap, error, freedom, level) >= POWER


def _least(suffices: Callable[[int], bool], known: int) -> int | None:
    """Return the least number n above `known` for which suffices(n); None if there is none up to UNFEASIBLE.
    It assumes that a larger number suffices too.
    """
    low, high = known, UNFEASIBLE
    if not suffices(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def needed_text(
    d: Difference, margin: float | None = None, unit: str = "prompts", level: float = 1 - LEVEL
) -> str:
    """Return a sentence: how many more prompts or seeds a test at `level` would need to find the difference.

    The true difference is assumed to be the estimated one, or `margin` if that is larger. unit: plural noun
    for prompts.
    """
    if d.error == 0 and d.mean == 0:
        return _needed_of_none(d, margin, unit)
    gap = max(abs(d.mean), margin or 0.0)
    counts = needed(d.components, gap, d.seeds, d.prompts, level)
    choices = [
        f"about {count - known:,} more {name}"
        for name, count, known in zip((unit, "seeds"), counts, (d.prompts, d.seeds), strict=True)
        if count is not None
    ]
    if d.seeds == 1:
        choices = [text for text in choices if text.endswith(unit)] + ["at least 2 more seeds"]
    if not choices:
        per_seed = d.prompts / d.seeds
        finds = partial(_finds, d.components, gap, level)
        both = _least(lambda n: finds(n, math.ceil(n * per_seed)), d.seeds) if gap else None
        if both is not None:
            more = f"{both - d.seeds:,} more seeds and {math.ceil(both * per_seed) - d.prompts:,} more {unit}"
            choices = [f"about {more} together"]
    if not choices:
        return f"no feasible number of {unit} or seeds would find a difference as small as this"
    return f"{' or '.join(choices)} would be needed to find a difference of {gap:.3g}"


def _needed_of_none(d: Difference, margin: float | None, unit: str) -> str:
    """Return needed_text for two settings that are equal on all prompts: no number of prompts would find a
    difference, but more prompts would show that they are equivalent within `margin`.
    """
    if margin is None:
        return f"no {unit} differ, and no feasible number of {unit} or seeds would find a difference of 0"
    more = math.ceil(math.log(1 - LEVEL) / math.log1p(-min(margin, 0.999))) - d.prompts
    return (
        f"no {unit} differ; about {max(1, more):,} more {unit} would be needed to call them equivalent "
        f"within {margin:g}"
    )
