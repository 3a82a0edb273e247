"""Rewards as plain functions of (prompt, completion, row), some that can be verified, and how a rollout is scored by them.

A reward is a number; what raises, or gives None, NaN or no number is counted and leaves the completion without a score: it is
learned from by nobody, and never silently worth 0.
"""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

Reward = Callable[[Any, str, dict[str, Any]], float]

SIGN, EXPONENT = r"(?:(?<![\w)])[-+])?", r"(?:[eE][-+]?\d+)?"  # 10-7 ends with a 7
NUMBER = re.compile(rf"{SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+){EXPONENT}")


def exact(prompt: Any, completion: str, row: dict[str, Any], column: str = "answer") -> float:
    """1 where the completion is the row's answer but for white space and case, else 0."""
    plain = lambda text: " ".join(str(text).split()).casefold()  # noqa: E731
    return float(plain(completion) == plain(row[column]))


def last_number(text: Any) -> float | None:
    """The last number in a text (after #### where GSM8K's mark stands), thousands separators allowed; None without one."""
    found = NUMBER.findall(str(text).rpartition("####")[2].replace("\u2212", "-"))  # a typeset minus
    return float(found[-1].replace(",", "")) if found else None


def number(
    prompt: Any, completion: str, row: dict[str, Any], column: str = "answer", tolerance: float = 1e-6
) -> float:
    """1 where the last number in the completion is that of the row's answer, relatively within `tolerance`, else 0.

    Raises ValueError for a row whose answer has no number.
    """
    wanted, found = last_number(row[column]), last_number(completion)
    if wanted is None:
        raise ValueError(f"column {column!r} holds no number: {row[column]!r}")
    return float(found is not None and math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance))


def matches(prompt: Any, completion: str, row: dict[str, Any], pattern: str) -> float:
    """1 where the whole completion, without white space around it, matches a regular expression, else 0."""
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


@dataclass
class Faults:
    """What went wrong while scoring: how often each kind, and the first one in words."""

    counts: dict[str, int] = field(default_factory=lambda: {"raised": 0, "not_a_number": 0})
    first: str = ""

    def note(self, kind: str, text: str) -> float:
        """Count one; the score that stands for it."""
        self.counts[kind] += 1
        self.first = self.first or text
        return math.nan


def name_of(reward: Any) -> str:
    """What a reward is called in the log: the function's name, or a scorer's."""
    while isinstance(reward, partial):
        reward = reward.func
    return str(getattr(reward, "__name__", None) or getattr(reward, "name", type(reward).__name__))


def names_of(given: Sequence[Any]) -> list[str]:
    """What several are called: one more of a name that was there before has its number behind it."""
    names = [name_of(reward) for reward in given]
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


def scored(
    rewards: Sequence[Reward],
    asked: Sequence[Any],
    completions: Sequence[str],
    rows: Sequence[tuple[str, dict[str, Any]]],
) -> tuple[Float[np.ndarray, "n K"], Faults]:
    """The score of each completion by each reward, NaN where there is none, and what went wrong.

    asked: each completion's prompt; rows: the name and the fields of its row. A reward gets copies, which it may change.
    """
    faults = Faults()
    out = np.full((len(completions), len(rewards)), np.nan)
    for k, reward in enumerate(rewards):
        name = name_of(reward)
        for i, (prompt, completion, (row, fields)) in enumerate(zip(asked, completions, rows, strict=True)):
            try:
                value = reward(copy.deepcopy(prompt), completion, copy.deepcopy(fields))
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                told = " ".join(str(error).split())[:200]
                out[i, k] = faults.note(
                    "raised", f"reward {name} raised {type(error).__name__}: {told} ({row})"
                )
                continue
            out[i, k] = _number(value, name, row, faults)
    return out, faults


def checked(
    scores: Any, name: str, rows: Sequence[tuple[str, dict[str, Any]]], faults: Faults
) -> Float[np.ndarray, " n"]:
    """What a reward gave for all completions at once; what isn't finite is counted as elsewhere. Raises ValueError for another
    number of scores than there are completions."""
    found = np.asarray(scores)
    if found.shape != (len(rows),):
        raise ValueError(
            f"reward {name} gave scores of shape {found.shape} for {len(rows)} completions; wanted one each"
        )
    return np.array([_number(value, name, row, faults) for value, (row, _) in zip(found, rows, strict=True)])


def _number(value: Any, name: str, row: str, faults: Faults) -> float:
    """A score, of whatever type has a real value; text has none, nor has an array of several."""
    if (
        not isinstance(value, str | bytes | complex | np.complexfloating)
        and hasattr(value, "__float__")
        and np.ndim(value) == 0
    ):
        try:
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if math.isfinite(score):
            return score
    return faults.note("not_a_number", f"reward {name} gave {_shown(value)}, wanted a finite number ({row})")


def _shown(value: Any) -> str:
    """A value in words, of whatever type: its own words may fail."""
    try:
        return f"{type(value).__name__} {value!r}"[:80]
    except Exception:
        return f"a {type(value).__name__}"
