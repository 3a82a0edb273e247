"""Confidence intervals of fractions and means, and comparisons of two models on the same rows.

All intervals are two-sided at 95 %.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
NORMAL = 1.959963984540054  # 97.5 % of a standard normal distribution are below


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """Return the interval as `[low, high]`."""
        return f"[{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def has(self, value: float) -> bool:
        """Return whether a value is inside."""
        return self.low <= value <= self.high


class Paired(NamedTuple):
    """The mean difference of two models on the same rows, the second minus the first.

    rows: number of rows. interval: of the difference. p: p-value of the sign test; None if the models' values
    are not all 0, 1 or 1/2.
    """

    rows: int
    difference: float
    interval: Interval
    p: float | None

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is unlikely to be chance: p < 0.05 or, without p, an interval without 0."""
        return not self.interval.has(0) if self.p is None else self.p < 1 - LEVEL

    def text(self, unit: str = "rows") -> str:
        """Return the difference, its interval, p, and whether the models differ, as a line of text."""
        test = "" if self.p is None else f", sign test p = {self.p:.2g}"
        verdict = "different" if self.distinguishable else f"not distinguishable with {self.rows:,} {unit}"
        return f"{self.difference:+.3f} {self.interval.text()}{test}: {verdict}"


def wilson(fraction: float, count: float) -> Interval:
    """Return Wilson's interval of a fraction p of n = `count` independent trials.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96. E. B. Wilson 1927,
    Probable inference, the law of succession, and statistical inference, JASA 22, 209-212. It stays within
    [0, 1] and covers well for small counts (Brown, Cai & DasGupta 2001, Statistical Science 16, 101-133). If
    trials have values between 0 and 1, such as ties that count 1/2, it is somewhat too wide.

    Returns [NaN, NaN] if the fraction is NaN, such as the accuracy of a model whose outputs are not finite.
    Raises ValueError for a fraction outside [0, 1] and for a count of 0 or less.
    """
    if math.isnan(fraction):
        return Interval(math.nan, math.nan)
    if count <= 0 or not 0 <= fraction <= 1:
        raise ValueError(
            f"wilson needs a fraction in [0, 1] of a count above 0, got fraction={fraction}, count={count}"
        )
    square = NORMAL**2
    centre = fraction + square / (2 * count)
    half = NORMAL * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count**2))
    size = 1 + square / count
    return Interval(max(0.0, (centre - half) / size), min(1.0, (centre + half) / size))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value that wins and losses are equally likely: min(1, 2 P(X <= min(wins,
    losses))), X ~ Binomial(wins + losses, 1/2).

    For two models on the same rows this is McNemar's exact test (McNemar 1947, Psychometrika 12, 153-157).
    Count only the rows on which one model is right and the other one wrong.
    """
    from scipy.special import bdtr  # not at the top: most commands do not need it

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """Return the interval of the mean of independent values: mean -+ t s / sqrt(n), where s is their standard
    deviation and t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom.

    weights: for a weighted mean m = sum w x / sum w, such as losses of rows weighted by their tokens; then s
    is the deviation of the linearised values w (x - m) / mean(w) (Cochran 1977, Sampling Techniques, 6.3).
    The interval is infinite for fewer than two values.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    mean, n = float((w * x).sum() / w.sum()), len(x)
    if n < 2:
        return Interval(-math.inf, math.inf)
    from scipy.special import stdtrit  # not at the top: most commands do not need it

    spread = np.sqrt(np.square(w * (x - mean) / w.mean()).sum() / (n - 1))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * spread / math.sqrt(n))
    return Interval(mean - half, mean + half)


def interval_of(values: Sequence[float]) -> Interval:
    """Return the interval of the mean of a value per row: Wilson's if all are 0, 1 or 1/2, else Student's.
    NaN values are left out; [NaN, NaN] if none remains.
    """
    known = [x for x in values if not math.isnan(x)]
    if not known:
        return Interval(math.nan, math.nan)
    return wilson(float(np.mean(known)), len(known)) if _are_wins(known) else mean_interval(known)


def prompt_means(scores: Float[np.ndarray, "n G"]) -> list[float]:
    """Return for each of n prompts the mean score of its G completions, without NaN; NaN if all are NaN."""
    return [math.nan if np.isnan(group).all() else float(np.nanmean(group)) for group in scores]


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare the values of two models on the same rows, in the same order: by paired_fractions if all are 0,
    1 or 1/2, else by paired_means. Rows where either value is NaN are left out; without any other row the
    difference is NaN, and its interval infinite.
    """
    pairs = [(x, y) for x, y in zip(first, second, strict=True) if not math.isnan(x + y)]
    if not pairs:
        return Paired(0, math.nan, Interval(-math.inf, math.inf), None)
    first, second = [x for x, _ in pairs], [y for _, y in pairs]
    compare = paired_fractions if _are_wins(first + second) else paired_means
    return compare(first, second)


def _are_wins(values: Sequence[float]) -> bool:
    return set(values) <= {0.0, 0.5, 1.0}


def paired_means(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None
) -> Paired:
    """Return mean(second) - mean(first) of two models' values on the same rows, with the mean_interval of the
    rows' differences; its p is None. weights: of the rows in these means; None for equal ones.
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    w = np.ones_like(differences) if weights is None else np.asarray(weights, np.float64)
    mean = float((w * differences).sum() / w.sum())
    return Paired(len(differences), mean, mean_interval(differences.tolist(), w.tolist()), None)


def paired_fractions(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Return the difference of two models' accuracies on the same rows; values are 1 for right, 0 for wrong
    and 1/2 for a tie.

    p: sign_test of the rows where they differ. interval: sum d / (n + 2) -+ z sqrt(1 + sum d^2 - (sum d)^2 /
    (n + 2)) / (n + 2) for differences d and z = 1.96, the Wald interval with 1/2 added to each cell
    of the table of right and wrong (Agresti & Min 2005, Statistics in Medicine 24, 729-740, "Wald+2").
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    n, total = len(differences) + 2, float(differences.sum())
    half = NORMAL * math.sqrt(max(0.0, 1 + float(np.square(differences).sum()) - total**2 / n)) / n
    interval = Interval(max(-1.0, total / n - half), min(1.0, total / n + half))
    p = sign_test(int((differences > 0).sum()), int((differences < 0).sum()))
    return Paired(len(differences), total / len(differences), interval, p)


def fraction_text(fraction: float, count: float | None, unit: str = "pairs") -> str:
    """Return a fraction as text, with its interval and `count` in `unit`, unless the count is None or 0."""
    if not count:
        return f"{fraction:.2f}"
    return f"{fraction:.2f} {wilson(fraction, count).text(2)} of {count:,.0f} {unit}"
