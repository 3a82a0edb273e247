"""A rollout's episodes on the host: trajectories by prompt, with their sampled tokens as arrays [n, S]."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jaxft.data.prompt_rows import TokenisedPrompts
from jaxft.rl.trajectory import (
    Fault,
    ShownMessage,
    Trajectory,
    episode_ids,
    sampled_logps,
    turn_of_token,
    turn_rewards,
)

NO_LENGTH = "too_long"  # the fault of an episode that does not fit into its rows


@dataclass(frozen=True)
class Episodes:
    """N episodes of each of G prompts; n = G N, in order.

    episodes: the training rows of each, the first one first. texts: of each episode's last sampled turn.
    group: N. size: S, the most tokens that an episode may sample. longest: the most tokens of an episode
    after its prompt, given ones included. most_turns: of an episode. begun: results of async rewards that
    were called as episodes ended, by (reward, number of the episode).
    """

    prompts: TokenisedPrompts
    episodes: tuple[tuple[Trajectory, ...], ...]
    texts: tuple[str, ...]
    group: int
    size: int
    longest: int
    most_turns: int = 1
    begun: Mapping[Any, Callable[[], Any]] = field(default_factory=dict, repr=False)

    def by_prompt(self, values: Sequence[Any]) -> Shaped[np.ndarray, "G N"]:
        """Arrange a value of each episode by prompt."""
        return np.array(values).reshape(len(self.prompts), self.group)

    def per_token(self, values: Sequence[np.ndarray], dtype: Any = np.float32) -> Shaped[np.ndarray, "n S"]:
        """Stack the values of each episode's sampled tokens; 0 beyond its length."""
        stacked = np.zeros((len(self.episodes), self.size), dtype)
        for row, own in zip(stacked, values, strict=True):
            row[: len(own)] = own
        return stacked

    @cached_property
    def lengths(self) -> Int[np.ndarray, "G N"]:
        """Sampled tokens of each episode."""
        return self.by_prompt([sum(part.sampled_count for part in parts) for parts in self.episodes])

    @cached_property
    def ended(self) -> Bool[np.ndarray, "G N"]:
        """Which episodes ended by a stop token or by the environment rather than by a limit."""
        return self.by_prompt([parts[-1].ended for parts in self.episodes])

    @cached_property
    def valid(self) -> Bool[np.ndarray, "G N"]:
        """Which episodes have no fault."""
        return self.by_prompt([not parts[0].fault for parts in self.episodes])

    @cached_property
    def scores(self) -> Float[np.ndarray, " n"]:
        """The environment's score of each episode, NaN for none."""
        return np.array([parts[0].score for parts in self.episodes])

    @cached_property
    def logps(self) -> Float[np.ndarray, "n S"]:
        """The sampler's log-prob of each sampled token, at the sampling temperature."""
        return self.per_token([_joined(parts, sampled_logps) for parts in self.episodes])

    @cached_property
    def turns(self) -> Int[np.ndarray, "n S"]:
        """The turn of each sampled token, from 0."""
        return self.per_token([_turns(parts) for parts in self.episodes], np.int32)

    @cached_property
    def turn_rewards(self) -> Float[np.ndarray, "n S"]:
        """The reward of each turn at its last token; 0 elsewhere and for turns without one."""
        return self.per_token([_rewards_at_ends(parts) for parts in self.episodes], np.float64)

    @property
    def prompt_index(self) -> list[int]:
        """The number of each episode's prompt."""
        return [i // self.group for i in range(len(self.episodes))]

    @property
    def row_names(self) -> list[str]:
        """The name of the dataset row that each episode's prompt is from."""
        return [self.prompts.names[i] for i in self.prompt_index]

    def pick(self, numbers: Int[np.ndarray, "G A"]) -> "Episodes":
        """Return A episodes of each prompt, by their numbers in its group."""
        chosen = (np.arange(len(numbers))[:, None] * self.group + numbers).ravel().tolist()
        return replace(
            self,
            episodes=tuple(self.episodes[i] for i in chosen),
            texts=tuple(self.texts[i] for i in chosen),
            group=numbers.shape[1],
            begun={},
        )


def collect(
    prompts: TokenisedPrompts,
    trajectories: Sequence[Trajectory],
    size: int,
    longest: int,
    most_turns: int = 1,
) -> Episodes:
    """Arrange the trajectories of a rollout, in order of prompt and episode. size, longest, most_turns: see
    Episodes.
    """
    episodes: list[tuple[Trajectory, ...]] = []
    for trajectory in trajectories:
        if trajectory.part:
            episodes[-1] += (trajectory,)
        else:
            episodes.append((trajectory,))
    for number, parts in enumerate(episodes):
        if len(sampled_tokens(parts)) > size or row_tokens(parts) > longest:
            faults = (*parts[0].faults, Fault(NO_LENGTH, f"an episode has more than {longest} tokens"))
            episodes[number] = (replace(parts[0], segments=(), fault=NO_LENGTH, faults=faults),)
    texts = tuple(last_text(parts[0].turns) for parts in episodes)
    return Episodes(prompts, tuple(episodes), texts, len(episodes) // len(prompts), size, longest, most_turns)


def sampled_tokens(parts: Sequence[Trajectory]) -> Int[np.ndarray, " n"]:
    """Return the sampled token ids of an episode."""
    return np.concatenate(
        [np.zeros(0, np.int32), *(s.tokens for p in parts for s in p.segments if s.sampled)]
    )


def row_tokens(parts: Sequence[Trajectory]) -> int:
    """Return the tokens of an episode in its rows: after its prompt, with the starts of later rows."""
    return sum(len(episode_ids(part)) for part in parts) - len(parts[0].start)


def given_count(parts: Sequence[Trajectory]) -> int:
    """Return the number of given tokens of an episode after its prompt."""
    return row_tokens(parts) - len(sampled_tokens(parts))


def turn_count(parts: Sequence[Trajectory]) -> int:
    """Return the number of turns that the policy sampled."""
    return sum(segment.sampled for part in parts for segment in part.segments)


def last_text(turns: Sequence[ShownMessage]) -> str:
    """Return the text of the policy's last turn, "" without any."""
    own = [str(turn.get("content") or "") for turn in turns if turn.get("role") == "assistant"]
    return own[-1] if own else ""


def _joined(parts: Sequence[Trajectory], values: Any) -> np.ndarray:
    return np.concatenate([values(part) for part in parts])


def _turns(parts: Sequence[Trajectory]) -> Int[np.ndarray, " n"]:
    """The turn of each sampled token over all rows of an episode."""
    found, first = [], 0
    for part in parts:
        found.append(first + turn_of_token(part))
        first += turn_count([part])
    return np.concatenate(found)


def _rewards_at_ends(parts: Sequence[Trajectory]) -> Float[np.ndarray, " n"]:
    """The reward of each turn at its last sampled token, 0 elsewhere."""
    turns, rewards = _turns(parts), _joined(parts, turn_rewards)
    last = np.diff(turns, append=len(rewards)) > 0
    return np.where(last, np.nan_to_num(rewards)[turns], 0.0) if len(turns) else np.zeros(0)
