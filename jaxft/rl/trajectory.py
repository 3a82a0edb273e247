"""Episodes of reinforcement learning as segments of token ids, each sampled or given.

A completion is an episode of one sampled segment. A conversation with tools alternates: the model samples a
turn, then the environment's observation is given. The ids of an episode are its start followed by its
segments, exactly as the sampler had them: no segment is ever decoded to text and tokenised again.

Arrays per token, such as advantages, have one value for each sampled token and none for given ones. Lengths,
means and returns over them therefore skip given tokens.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

ShownMessage = Mapping[str, Any]  # a message as the model was shown it, or a sampled turn with its text


class Fault(NamedTuple):
    """Something that went wrong in an episode. kind: one word, by which faults are counted. text: a line."""

    kind: str
    text: str


@dataclass(frozen=True)
class Segment:
    """Consecutive token ids of an episode, all sampled or all given.

    logps: of sampled tokens, at the sampling temperature; None for given tokens: an observation, a tool's
    result, or a stop token that was not sampled. reward: of the turn that these sampled tokens are; NaN for
    none.
    """

    tokens: Int[np.ndarray, " n"]
    logps: Float[np.ndarray, " n"] | None
    reward: float = math.nan

    @property
    def sampled(self) -> bool:
        """Whether the model sampled these tokens."""
        return self.logps is not None


@dataclass(frozen=True)
class Trajectory:
    """One episode, or one training row of an episode whose template cuts earlier turns.

    prompt: index of the dataset row in the rollout. start: token ids of the prompt. score: the environment's
    of the whole episode, NaN for none. ended: by a stop token or by the environment rather than by a limit.
    fault: the kind of the fault that excludes the episode from training and means, "" for none. turns:
    messages as the model was shown them, for completions.jsonl. faults: all of them, also calls that were
    answered with an error message and exclude nothing.
    part, parts: which training row of the episode it is, and how many there are. Where a template rewrites
    earlier turns, the next turn's prompt is not the previous ids plus a suffix: a new row begins, whose start
    is the prompt as rendered. All rows of an episode have its score, fault and turns.
    """

    prompt: int
    start: tuple[int, ...]
    segments: tuple[Segment, ...]
    score: float = math.nan
    ended: bool = True
    fault: str = ""
    turns: tuple[ShownMessage, ...] = ()
    faults: tuple[Fault, ...] = ()
    part: int = 0
    parts: int = 1

    @property
    def sampled_count(self) -> int:
        """The number of sampled tokens."""
        return sum(len(s.tokens) for s in self.segments if s.sampled)


def episode_ids(trajectory: Trajectory) -> Int[np.ndarray, " n"]:
    """Return all token ids: the start, then each segment."""
    parts = [np.asarray(trajectory.start, np.int32), *(s.tokens for s in trajectory.segments)]
    return np.concatenate(parts).astype(np.int32)


def sampled_mask(trajectory: Trajectory) -> Bool[np.ndarray, " n"]:
    """Return which of `episode_ids` were sampled."""
    parts = [np.zeros(len(trajectory.start), bool)]
    parts += [np.full(len(s.tokens), s.sampled) for s in trajectory.segments]
    return np.concatenate(parts)


def sampled_logps(trajectory: Trajectory) -> Float[np.ndarray, " n"]:
    """Return the sampler's log-prob of each sampled token."""
    parts = [s.logps for s in trajectory.segments if s.logps is not None]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)


def turn_rewards(trajectory: Trajectory) -> Float[np.ndarray, " t"]:
    """Return the reward of each sampled segment, NaN for none."""
    return np.array([s.reward for s in trajectory.segments if s.sampled], np.float64)


def turn_of_token(trajectory: Trajectory) -> Int[np.ndarray, " n"]:
    """Return for each sampled token the number of its turn, from 0."""
    lengths = [len(s.tokens) for s in trajectory.segments if s.sampled]
    return np.repeat(np.arange(len(lengths)), lengths)


def fault_counts(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Return how often each kind of fault occurred."""
    return dict(Counter(f.kind for t in trajectories if t.part == 0 for f in t.faults))
