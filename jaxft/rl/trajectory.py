"""Episodes of reinforcement learning as segments of token ids, each sampled or given.

A completion is an episode of one sampled segment. A conversation with tools alternates: the model samples a
turn, then the environment's observation is given. The ids of an episode are its start followed by its
segments, exactly as the sampler had them: no segment is ever decoded to text and tokenised again.

Arrays per token, such as advantages, have one value for each sampled token and none for given ones. Lengths,
means and returns over them therefore skip given tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxft.data.packing.row_tasks import TokenisedPrompts

NO_LENGTH = "too_long"  # the fault of an episode that does not fit into its rows

ShownMessage = Mapping[str, Any]  # a message as the model was shown it, or a sampled turn with its text


class Fault(NamedTuple):
    """Something that went wrong in an episode. kind: one word, by which faults are counted. text: a line."""

    kind: str
    text: str


@dataclass(frozen=True)
class Segment:
    """Consecutive token ids of an episode, all sampled or all given.

    logps: log-probs of sampled tokens, at the sampling temperature; None for given tokens: an observation, a
    tool's result, or a stop token that was not sampled. reward: reward of the turn whose tokens these are;
    NaN for none. begins: whether these given tokens are the prompt of a new training row. A new row begins
    where a chat template rewrites earlier turns, so that the next turn's prompt is not the previous ids plus
    a suffix.
    """

    tokens: Int[np.ndarray, " n"]
    logps: Float[np.ndarray, " n"] | None
    reward: float = math.nan
    begins: bool = False

    @property
    def sampled(self) -> bool:
        """True if the model sampled these tokens."""
        return self.logps is not None


class TrainingRow(NamedTuple):
    """A prompt and the tokens after it. start: number of prompt tokens. sampled: which ids were sampled."""

    start: int
    ids: Int[np.ndarray, " n"]
    sampled: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    prompt: index of its prompt among the rollout's prompts. start: token ids of the prompt. segments: the
    tokens after it. score: the environment's score of the whole episode, NaN for none. ended: whether no
    limit ended it: the last turn has a stop token and the environment, if there is one, ended the episode.
    fault: the kind of the fault that excludes the episode from training and means, "" for none. turns:
    messages as the model was shown them, for completions.jsonl. faults: all faults, also errors in tool
    calls, which the model was shown and which exclude nothing. rewards: values of the reward functions that
    read the environment, by name; NaN where one returned None.
    """

    prompt: int
    start: tuple[int, ...]
    segments: tuple[Segment, ...]
    score: float = math.nan
    ended: bool = True
    fault: str = ""
    turns: tuple[ShownMessage, ...] = ()
    faults: tuple[Fault, ...] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)

    @property
    def sampled(self) -> list[Segment]:
        """The turns that the policy sampled."""
        return [s for s in self.segments if s.sampled]

    @property
    def sampled_count(self) -> int:
        """The number of sampled tokens."""
        return sum(len(s.tokens) for s in self.sampled)

    @property
    def given_count(self) -> int:
        """The number of given tokens after the prompt, with the prompts of later training rows."""
        return sum(len(s.tokens) for s in self.segments if not s.sampled)

    @property
    def text(self) -> str:
        """The text of the policy's last turn, "" without any."""
        responses = [str(turn.get("content") or "") for turn in self.turns if turn.get("role") == "assistant"]
        return responses[-1] if responses else ""

    def rows(self) -> list[TrainingRow]:
        """Return the training rows of the episode: one, unless its chat template rewrites earlier turns."""
        rows = list[list[Segment]]()
        for segment in (Segment(np.array(self.start, np.int32), None, begins=True), *self.segments):
            rows += [[]] if segment.begins else []
            rows[-1].append(segment)
        return [
            TrainingRow(
                len(row[0].tokens),
                np.concatenate([s.tokens for s in row]).astype(np.int32),
                np.concatenate([np.full(len(s.tokens), s.sampled) for s in row]),
            )
            for row in rows
        ]


@dataclass(frozen=True)
class Episodes:
    """N episodes of each of G prompts on the host; n = G N, in order of prompts.

    group: N. size: S, the most tokens that an episode may sample. longest: the most tokens of an episode
    after its prompt, given tokens included. most_turns: the most turns of an episode. begun: calls of async
    rewards that began as episodes ended, by (reward, number of the episode); each is a function that waits
    for the result and returns it.
    """

    prompts: TokenisedPrompts
    trajectories: tuple[Trajectory, ...]
    group: int
    size: int
    longest: int
    most_turns: int = 1
    begun: Mapping[Any, Callable[[], Any]] = field(default_factory=dict, repr=False)

    def by_prompt(self, values: Sequence[Any]) -> Shaped[np.ndarray, "G N"]:
        """Arrange values, one for each episode, by prompt."""
        return np.array(values).reshape(len(self.prompts), self.group)

    def per_token(self, value: Callable[[int, Segment], Any], dtype: Any) -> Shaped[np.ndarray, "n S"]:
        """Return a value for each sampled token; 0 beyond an episode's length. value: (number of a turn, its
        segment) -> a value for each of its tokens.
        """
        stacked = np.zeros((len(self.trajectories), self.size), dtype)
        for row, trajectory in zip(stacked, self.trajectories, strict=True):
            start = 0
            for turn, segment in enumerate(trajectory.sampled):
                stop = start + len(segment.tokens)
                row[start:stop] = value(turn, segment)
                start = stop
        return stacked

    @cached_property
    def lengths(self) -> Int[np.ndarray, "G N"]:
        """Sampled tokens of each episode."""
        return self.by_prompt([t.sampled_count for t in self.trajectories])

    @cached_property
    def ended(self) -> Bool[np.ndarray, "G N"]:
        """Mask of episodes that no limit and no fault ended, see Trajectory.ended."""
        return self.by_prompt([t.ended for t in self.trajectories])

    @cached_property
    def valid(self) -> Bool[np.ndarray, "G N"]:
        """Mask of episodes without a fault."""
        return self.by_prompt([not t.fault for t in self.trajectories])

    @cached_property
    def scores(self) -> Float[np.ndarray, " n"]:
        """The environment's score of each episode, NaN for none."""
        return np.array([t.score for t in self.trajectories])

    @cached_property
    def logps(self) -> Float[np.ndarray, "n S"]:
        """The sampler's log-prob of each sampled token, at the sampling temperature."""
        return self.per_token(lambda turn, s: s.logps, np.float32)

    @cached_property
    def turns(self) -> Int[np.ndarray, "n S"]:
        """The turn of each sampled token, from 0."""
        return self.per_token(lambda turn, s: turn, np.int32)

    @cached_property
    def turn_rewards(self) -> Float[np.ndarray, "n S"]:
        """The reward of each turn at its last token; 0 elsewhere and for turns without one."""

        def at_last(turn: int, s: Segment) -> Any:
            return np.where(np.arange(len(s.tokens)) == len(s.tokens) - 1, np.nan_to_num(s.reward), 0)

        return self.per_token(at_last, np.float64)

    @property
    def row_names(self) -> list[str]:
        """The name of the dataset row that each episode's prompt is from."""
        return [self.prompts.names[i // self.group] for i in range(len(self.trajectories))]

    def pick(self, numbers: Int[np.ndarray, "G A"]) -> "Episodes":
        """Return A episodes of each prompt. numbers: their indices among the prompt's episodes."""
        chosen = (np.arange(len(numbers))[:, None] * self.group + numbers).ravel()
        trajectories = tuple(self.trajectories[i] for i in chosen)
        return replace(self, trajectories=trajectories, group=numbers.shape[1], begun={})


def collect(
    prompts: TokenisedPrompts,
    trajectories: Sequence[Trajectory],
    size: int,
    longest: int,
    most_turns: int = 1,
) -> Episodes:
    """Return the trajectories of a rollout as Episodes.

    trajectories: in order of prompts, equally many of each. size, longest, most_turns: see Episodes. A
    trajectory with more than `size` sampled tokens or more than `longest` in all loses its segments and gets
    the fault NO_LENGTH.
    """

    def checked(t: Trajectory) -> Trajectory:
        if t.sampled_count <= size and t.sampled_count + t.given_count <= longest:
            return t
        faults = (*t.faults, Fault(NO_LENGTH, f"an episode has more than {longest} tokens"))
        return replace(t, segments=(), fault=NO_LENGTH, faults=faults)

    group = len(trajectories) // len(prompts)
    return Episodes(prompts, tuple(map(checked, trajectories)), group, size, longest, most_turns)
