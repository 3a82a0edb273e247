"""Compare two models by the verdicts of judges on their answers to the same prompts.

A judge compares the two answers to each prompt in both orders. A verdict is 1 if the first model wins, 0 if
the other does, 1/2 for a tie; the value of a prompt is the mean over both orders. A prompt that lacks the
verdict in one order has no value, because a preference for the first place would decide it.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from jaxft.objectives.intervals import LEVEL, Interval, paired_fractions, sign_test
from jaxft.report.statistics import components, needed

MOST_WITHOUT = 0.5  # a judge with a larger fraction of replies without a verdict is refused
RIDGE = 0.01  # penalty that keeps the regression finite where one model always wins
BOOTSTRAPS = 1000
INSTRUCTION = (
    "You compare two answers to the same prompt. Decide which one is better: more correct, more helpful, and "
    "closer to what was asked for. Length is no merit, and neither is the order of the answers. Give a short "
    "reason first. Then end with [[A]] if answer A is better, with [[B]] if answer B is better, or with "
    "[[C]] if they are equally good."
)
_VERDICT = re.compile(r"\[\[\s*(A\s*>+\s*B|B\s*>+\s*A|A\s*=\s*B|B\s*=\s*A|[ABC]|tie)\s*\]\]", re.IGNORECASE)
_ALONE = re.compile(r"\W*(A|B|C|tie)\W*", re.IGNORECASE)


class Match(NamedTuple):
    """Two models' answers, one and other, to a prompt. name: name of the prompt's row. prompt: a string or a
    list of messages. columns: the row's columns.
    """

    name: str
    prompt: Any
    one: str
    other: str
    columns: dict[str, Any]


class Verdicts(NamedTuple):
    """A judge's verdicts: 1 where the first model wins, 0 where the other does, 1/2 for a tie, NaN for none.

    first [P]: with the first model's answer shown first. second [P]: with it shown second.
    """

    first: Float[np.ndarray, " P"]
    second: Float[np.ndarray, " P"]


class Judge(Protocol):
    """A judge, which compares two models' answers to prompts."""

    @property
    def name(self) -> str:
        """The name in tables."""

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the verdicts on each match, one for each order of the answers."""


# Questions and replies


def question(prompt: Any, a: str, b: str) -> list[dict[str, str]]:
    """Return the messages that ask a model which answer is better.

    >>> [message["role"] for message in question("What is 2 + 2?", "4", "5")]
    ['system', 'user']
    """
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    parts = (("prompt", prompt), ("answer A", a), ("answer B", b))
    text = "\n\n".join(f"<{title}>\n{content}\n</{title}>" for title, content in parts)
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]


def verdict(reply: str) -> float:
    """Return 1 if a reply prefers answer A, 0 for B, 1/2 for a tie, and NaN if it names none.

    The last mark counts: [[A]], [[B]], or [[C]] or [[tie]] for a tie; or Arena-Hard's [[A>>B]], [[A>B]],
    [[A=B]]. A reply that is only such a letter or "tie" needs no brackets.

    >>> verdict("B has the right sum. [[B]]"), verdict("[[A=B]]"), verdict("Both are fine.")
    (0.0, 0.5, nan)
    """
    marks = _VERDICT.findall(reply)
    alone = _ALONE.fullmatch(reply.strip())
    mark = marks[-1] if marks else alone[1] if alone else None
    if mark is None:
        return math.nan
    mark = re.sub(r"\s", "", mark).upper()
    if mark in ("C", "TIE") or "=" in mark:
        return 0.5
    return 1.0 if mark[0] == "A" else 0.0


def in_both_orders(matches: Sequence[Match]) -> list[list[dict[str, str]]]:
    """Return two questions for each match: the first model's answer as A, then as B."""
    return [
        question(match.prompt, *answers)
        for match in matches
        for answers in ((match.one, match.other), (match.other, match.one))
    ]


def values_of(replies: Sequence[str], judge: str) -> Verdicts:
    """Return the verdicts in a judge's replies. replies: two for each match, in the order of in_both_orders.

    judge: its name, for errors. Raises ValueError if more than half of the replies have no verdict.
    """
    verdicts = np.array([verdict(reply) for reply in replies])
    without = int(np.isnan(verdicts).sum())
    if without > MOST_WITHOUT * len(verdicts):
        example = next(reply for reply, value in zip(replies, verdicts, strict=True) if math.isnan(value))
        raise ValueError(
            f"judge {judge}: {without} of {len(verdicts)} replies have no verdict [[A]], [[B]] or [[C]], "
            f"such as {example[-80:]!r}; use a larger model, or more tokens for its replies (--judge-max-new)"
        )
    return Verdicts(verdicts[0::2], 1 - verdicts[1::2])


def values_of_scores(one: Float[np.ndarray, " P"], other: Float[np.ndarray, " P"]) -> Verdicts:
    """Return verdicts, the same for both orders, from two models' scores: the higher one wins, equal scores
    are a tie, and with a NaN there is no verdict.
    """
    difference = one - other
    values = np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2)
    return Verdicts(values, values)


# Results


@dataclass(frozen=True)
class Judged:
    """A judge's verdicts on P prompts, and the lengths of both models' answers in characters [P]."""

    judge: str
    values: Verdicts
    one_length: Float[np.ndarray, " P"]
    other_length: Float[np.ndarray, " P"]

    @property
    def by_prompt(self) -> Float[np.ndarray, " P"]:
        """The values of the prompts, means over both orders; NaN if one of them has no verdict."""
        return (self.values.first + self.values.second) / 2

    @property
    def known(self) -> np.ndarray:
        """Mask [P] of the prompts that have a value."""
        return ~np.isnan(self.by_prompt)

    def as_json(self) -> dict[str, Any]:
        """Return the result as a dict: counts, win rates with 95 % intervals, and p of a sign test; without
        any value only judge, prompts and without_verdict. Intervals may be NaN.
        """
        values = self.by_prompt[self.known]
        if not len(values):
            return {"judge": self.judge, "prompts": 0, "without_verdict": len(self.known)}
        wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
        controlled, interval = length_controlled(self)
        first, second = (v[self.known] for v in self.values)
        longer = np.sign(self.one_length - self.other_length)[self.known]
        return {
            "judge": self.judge,
            "prompts": len(values),
            "without_verdict": int((~self.known).sum()),
            "wins": wins,
            "ties": len(values) - wins - losses,
            "losses": losses,
            "win_rate": float(values.mean()),
            "win_rate_interval": list(win_rate_interval(values)),
            "length_controlled": controlled,
            "length_controlled_interval": list(interval),
            "p": sign_test(wins, losses),
            "longer": int((longer > 0).sum()),
            "shorter": int((longer < 0).sum()),
            "orders_disagree": float((first != second).mean()),
            "first_shown_wins": float(np.concatenate([first, 1 - second]).mean()),
        }


def win_rate_interval(values: Float[np.ndarray, " P"]) -> Interval:
    """Return the 95 % interval of the win rate, the mean of the prompts' values; see paired_fractions."""
    difference = paired_fractions((1 - values).tolist(), values.tolist()).interval
    return Interval((1 + difference.low) / 2, (1 + difference.high) / 2)


def length_controlled(judged: Judged, resamples: int = BOOTSTRAPS) -> tuple[float, Interval]:
    """Return the win rate that a judge would give to answers of equal length, with its 95 % interval.

    Dubois et al. 2024 (AlpacaEval 2, arXiv:2404.04475): values follow logistic(theta + phi tanh(d / std(d))),
    d the difference of the lengths, and the result is logistic(theta). Their third term, the difficulty of
    each prompt, is left out, as it is estimated from many models' results. The penalty RIDGE (theta^2 +
    phi^2) / 2, added to the summed log loss, keeps both finite. The interval is a percentile bootstrap over
    prompts, NaN where all values are the same.
    """
    y = judged.by_prompt[judged.known]
    d = (judged.one_length - judged.other_length)[judged.known]
    x = np.tanh(d / max(float(d.std()), 1e-12)) if d.std() > 0 else np.zeros_like(d)
    rate = float(_logistic_fit(x, y))
    if np.ptp(y) == 0:
        return rate, Interval(math.nan, math.nan)
    random = np.random.default_rng(0)
    again = [random.integers(0, len(y), len(y)) for _ in range(resamples)]
    rates = [float(_logistic_fit(x[rows], y[rows])) for rows in again]
    low, high = np.quantile(rates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return rate, Interval(float(low), float(high))


def _logistic_fit(x: np.ndarray, y: np.ndarray) -> float:
    """Return logistic(theta) of the regression in `length_controlled`, by Newton's method."""
    design = np.stack([np.ones_like(x), x], axis=1)
    beta = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (p - y) + RIDGE * beta
        hessian = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        beta = beta - step * min(1.0, 4 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-beta[0])))


def kappa(one: Judged, other: Judged) -> float:
    """Return Cohen's kappa (1960) of two judges' values as win, tie or loss: their agreement, corrected for
    chance. NaN if no prompt has a value of both, or if all values of both are the same, such as wins.
    """
    both = one.known & other.known
    a, b = (np.sign(judged.by_prompt[both] - 0.5) for judged in (one, other))
    if not both.any():
        return math.nan
    agree = float((a == b).mean())
    by_chance = sum(float((a == kind).mean() * (b == kind).mean()) for kind in (-1, 0, 1))
    return (agree - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def agreements(judged: Sequence[Judged]) -> dict[tuple[str, str], float]:
    """Return (name, name) -> kappa of every two judges."""
    return {(a.judge, b.judge): kappa(a, b) for a, b in itertools.combinations(judged, 2)}


def verdict_lines(judged: Judged, one: str, other: str) -> list[str]:
    """Return a judge's result as lines for the terminal. one, other: names of the models."""
    result = judged.as_json()
    if not result["prompts"]:
        return [f"{judged.judge}: no prompt has a verdict"]
    rate, controlled = (_with_interval(result, key) for key in ("win_rate", "length_controlled"))
    low, high = result["win_rate_interval"]
    better = (one if low > 0.5 else other if high < 0.5 else None) if result["p"] < 1 - LEVEL else None
    lines = [
        f"{judged.judge}: {one} wins {result['wins']}, ties {result['ties']}, loses {result['losses']} of "
        f"{result['prompts']} prompts against {other}",
        f"  win rate {rate}, at equal length {controlled}, p = {result['p']:.2g} (sign test): "
        + (f"{better} is better" if better else needed_line(judged)),
    ]
    if result["without_verdict"]:
        lines.append(f"  {result['without_verdict']} prompts without a verdict in both orders are left out")
    if bool(result["longer"]) != bool(result["shorter"]):
        never = "shorter" if result["longer"] else "longer"
        lines.append(
            f"  the answers of {one} are never the {never} ones, so the win rate at equal length is an "
            "extrapolation"
        )
    if result["orders_disagree"] > 0:
        lines.append(
            f"  the two orders disagree for {result['orders_disagree']:.0%} of the prompts; the answer shown "
            f"first wins {result['first_shown_wins']:.0%}"
        )
    return lines


def needed_line(judged: Judged) -> str:
    """Return "not distinguishable", and how many prompts would show the difference, if that is known."""
    values = judged.by_prompt[judged.known] - 0.5
    count = None
    if len(values) > 1:
        count = needed(components(values[None]), float(values.mean()), 1, len(values))[0]
    if count is None:
        return "not distinguishable"
    return f"not distinguishable; a difference of this size would need about {count:,} prompts"


def _with_interval(result: dict[str, Any], key: str) -> str:
    low, high = result[f"{key}_interval"]
    if not math.isfinite(low + high):
        return f"{result[key]:.2f}"
    return f"{result[key]:.2f} [{max(low, 0):.2f}, {min(high, 1):.2f}]"
