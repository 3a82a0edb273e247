"""A rollout on the host: how it is scored and learned from, its completions, and how they become rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from jaxft.batch import Rollout
from jaxft.data.prompts import Asked, Room
from jaxft.rl import advantages as adv
from jaxft.rl import estimators, rewards
from jaxft.rl.estimators import Estimate, Sampled


@dataclass(frozen=True)
class ByScorer:
    """A reward that a frozen model with a scalar head gives, one of Run.beside's by its name.

    unread: a token that it isn't read at, but before, as transformers' classifiers are not at their padding.
    """

    name: str = "reward"
    unread: int | None = None


class ForAll(Protocol):
    """A reward that scores all completions of a rollout together, such as a reward model of its own (scorer.ByModel).

    opened(mesh): called once, before the first step; what it gives is called by every process, (prompts, completions) ->
    scores [n], NaN where there is none.
    """

    @property
    def name(self) -> str:
        """What the log calls it."""

    def opened(self, mesh: Any) -> Callable[[list[Any], list[str]], np.ndarray]:
        """The function that scores."""


@dataclass(frozen=True)
class Rules:
    """How completions are scored and what is learned from them.

    rewards: functions of (prompt, completion, row), see rewards.py, ByScorer and ForAll; weights: one each. combine(scores
    [G, N, K], weights) -> [G, N]. shape(scores, lengths, ended) -> scores, each [G, N]: penalties and bounds. scale(scores,
    moments of all scores so far) -> scores that are learned from, such as advantages.scaled; it comes after shape, and what is
    logged is as it was before. estimate: Sampled -> Estimate, see estimates.py. weigh(lengths, keep) -> the weight of a token of
    each completion [G, N], over an optimizer batch. keep(scores) -> which completions are learned from, such as
    advantages.varied. cut_off: whether those that the limit ended are, too. warm_up: so many rollouts first teach the critic
    alone. target_kl: once the policy is this far from the one that drew (policy/approxkl_avg of a step), the rest of the rollout
    teaches only the critic.
    """

    rewards: tuple[Callable | ByScorer | ForAll, ...]
    estimate: Callable[[Sampled], Estimate] = estimators.by_group
    weigh: Callable[..., np.ndarray] = adv.token_mean
    weights: tuple[float, ...] = ()
    combine: Callable[..., np.ndarray] = adv.weighted_sum
    shape: Callable[..., np.ndarray] | None = None
    scale: Callable[..., np.ndarray] | None = None
    keep: Callable[..., np.ndarray] | None = None
    cut_off: bool = True
    warm_up: int = 0
    target_kl: float | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("a rollout needs a reward, found none; give rewards=module:function")
        if not all(
            callable(reward) or isinstance(reward, ByScorer) or hasattr(reward, "opened")
            for reward in self.rewards
        ):
            raise ValueError(
                f"rewards are functions of (prompt, completion, row), found {self.rewards}; give module:function"
            )
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl is above 0 or none, found {self.target_kl}")
        if self.weights and len(self.weights) != len(self.rewards):
            names = ", ".join(rewards.names_of(self.rewards))
            raise ValueError(
                f"{len(self.rewards)} rewards ({names}) need as many weights, found {len(self.weights)}"
            )
        if not np.isfinite(self.weights).all():
            raise ValueError(f"weights of rewards are finite, found {self.weights}")
        if self.warm_up < 0:
            raise ValueError(f"warm_up is a number of rollouts from 0 up, found {self.warm_up}")
        given = (("weigh", self.weigh, ("lengths", "keep"), ("most",)), ("keep", self.keep, ("scores",), ()))
        of = self.estimate.keywords.get("advantage") if isinstance(self.estimate, partial) else None
        for name, fn, first, more in (*given, ("advantage", of, ("scores",), ("lengths",))):
            if fn is not None:
                adv.check_takes(fn, name, first, more)

    @property
    def each_weight(self) -> tuple[float, ...]:
        """The weight of each reward, 1 unless told."""
        return self.weights or (1.0,) * len(self.rewards)

    def weighed(self, lengths: np.ndarray, keep: np.ndarray, most: int) -> np.ndarray:
        """What `weigh` gives; most: the limit of a completion's tokens, for one that asks for it."""
        more = {"most": most} if adv.asks(self.weigh, "most") else {}
        return self.weigh(lengths, keep, **more)


def bounded(
    scores: np.ndarray, lengths: np.ndarray, ended: np.ndarray, missing_eos: float = 0.0, limit: float | None = None,
    overlong: tuple[int, int] | None = None,
) -> np.ndarray:  # fmt: skip
    """A shape for Rules: scores less `missing_eos` where a completion has no end, held within +-limit before that.

    overlong: (most, soft) of advantages.overlong, which is added.
    """
    scores = scores if limit is None else adv.clipped(scores, -limit, limit)
    scores = scores if overlong is None else scores + adv.overlong(lengths, *overlong)
    return adv.missing_eos(scores, ended, missing_eos)


NOTHING = np.zeros((0, 0))


@dataclass(frozen=True)
class Completions:
    """A rollout on the host: G prompts, N completions of each. tokens [G, N, S], -1 beyond the length; drawn [G N, S]: the
    sampler's log-probs; rows: as the model reads them, of a size; each: scores by reward, [G N, K]; scores [G, N]."""

    asked: Asked
    tokens: np.ndarray
    drawn: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    texts: list[str]
    room: Room
    rows: Rollout
    each: np.ndarray = field(default_factory=lambda: NOTHING)
    scores: np.ndarray = field(default_factory=lambda: NOTHING)
    faults: rewards.Faults = field(default_factory=rewards.Faults)


@dataclass(frozen=True)
class Learned:
    """A rollout as it is learned from: arrays of all its rows, and for each completion whether it counts."""

    number: int
    rows: Any  # a Rollout, or Pairs
    lengths: np.ndarray
    kept: np.ndarray
    known: np.ndarray
    told: dict[str, Any]


def fits(asked: Asked, lengths: np.ndarray, room: Room) -> bool:
    """Whether every prompt has room in its row with all of its completions."""
    count = lengths.sum(1)
    return bool(
        count.max() <= room.reads and (np.array([len(ids) for ids in asked.ids]) + count).max() <= room.length
    )


def laid(
    asked: Asked, tokens: np.ndarray, lengths: np.ndarray, room: Room, size: tuple[int, int] | None = None
) -> Rollout:
    """Rows of a prompt and its completions, which share it and don't see one another; numbers are zero.

    size: (rows, places for completions in each) where that is more than there are; the others stay empty.
    """
    rows, places = size or lengths.shape
    ids, segments, positions, branches = (np.zeros((rows, room.length), np.int32) for _ in range(4))
    read, targets = (np.zeros((rows, room.reads), np.int32) for _ in range(2))
    answers, zero = np.full((rows, room.reads), places, np.int32), np.zeros((rows, room.reads), np.float32)
    counts = np.zeros((rows, places), np.int32)
    counts[: len(lengths), : lengths.shape[1]] = lengths
    for r, prompt in enumerate(asked.ids):
        start = at = len(prompt)
        ids[r, :at], segments[r, :at], positions[r, :at] = prompt, 1, np.arange(at)
        m = 0
        for j in np.flatnonzero(lengths[r]):
            n = lengths[r, j]
            span, reads = slice(at, at + n), slice(m, m + n)
            ids[r, span] = targets[r, reads] = tokens[r, j, :n]
            segments[r, span], branches[r, span], positions[r, span] = 1, j + 1, start + np.arange(n)
            read[r, m], read[r, m + 1 : m + n] = start - 1, at + np.arange(n - 1)
            answers[r, reads] = j
            at, m = at + n, m + n
    numbers = {name: zero for name in ("logps", "advantages", "policy_weights")}
    return Rollout(
        ids, segments, positions, read, targets, answers, **numbers, lengths=counts, branches=branches
    )


def by_read(x: np.ndarray, lengths: np.ndarray, reads: int) -> np.ndarray:
    """Numbers of each completion's tokens [G N, S] at the read positions of the rows [G, reads], float32."""
    out = np.zeros((len(lengths), reads), np.float32)
    apart = np.asarray(x).reshape(*lengths.shape, -1)
    for r, (row, count) in enumerate(zip(apart, lengths, strict=True)):
        out[r, : count.sum()] = row[adv.inside(count, apart.shape[2])]
    return out


def by_token(x: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """The other way round: numbers at read positions [G, M] as [G N, size], 0 beyond each length, float64."""
    out = np.zeros((*lengths.shape, size))
    for r, count in enumerate(lengths):
        out[r][adv.inside(count, size)] = x[r, : count.sum()]
    return out.reshape(lengths.size, size)
