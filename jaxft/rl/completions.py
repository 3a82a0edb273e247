"""The types of a rollout on the host: completions as sampled, with scores, and as training rows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.batch import Pairs, Rollout
from jaxft.data.pack import RowShape
from jaxft.data.prompt_rows import TokenisedPrompts
from jaxft.tree import Metrics

TABLE_ROWS, PER_PROMPT = 8, 2  # of completions.jsonl, for each rollout


@dataclass(frozen=True)
class Completions:
    """N completions of each of G prompts, as sampled.

    tokens: -1 beyond the length. sampler_logps: at the sampling temperature. ended: by a stop token rather
    than by the limit. rows: packed for the model, in `row_shape`.
    """

    prompts: TokenisedPrompts
    tokens: Int[np.ndarray, "G N S"]
    sampler_logps: Float[np.ndarray, "n S"]
    lengths: Int[np.ndarray, "G N"]
    ended: Bool[np.ndarray, "G N"]
    texts: tuple[str, ...]
    row_shape: RowShape
    rows: Rollout

    @property
    def prompt_index(self) -> list[int]:
        """The number of each completion's prompt."""
        group = self.lengths.shape[1]
        return [i // group for i in range(len(self.texts))]

    @property
    def row_names(self) -> list[str]:
        """The name of the dataset row that each completion's prompt is from."""
        return [self.prompts.names[i] for i in self.prompt_index]


@dataclass(frozen=True)
class Faults:
    """Counts of completions that a reward gave no score. first: a message about the first of them."""

    raised: int = 0
    not_a_number: int = 0
    first: str = ""

    def __add__(self, other: "Faults") -> "Faults":
        return Faults(
            self.raised + other.raised, self.not_a_number + other.not_a_number, self.first or other.first
        )


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions with the scores of each reward, their combination, and that after shaping; NaN for none."""

    completions: Completions
    reward_scores: Float[np.ndarray, "G N K"]
    combined: Float[np.ndarray, "G N"]
    scores: Float[np.ndarray, "G N"]
    faults: Faults


@dataclass(frozen=True)
class TrainingRollout:
    """A rollout from which training batches are built: rows of all prompts, without weights.

    policy_mask: completions (or pairs) that the policy is trained on. scored: completions that have a score.
    """

    number: int
    rows: Rollout | Pairs
    lengths: Int[np.ndarray, "G N"]
    policy_mask: Bool[np.ndarray, "..."]
    scored: Bool[np.ndarray, "G N"]
    metrics: Metrics


def table_indices(count: int, group: int) -> list[int]:
    """Return which completions are in completions.jsonl: the first two of the first prompts.

    count: completions of the rollout. group: completions of each prompt.
    """
    return [i for i in range(count) if i % group < PER_PROMPT][:TABLE_ROWS]


def append_table(path: Path, step: int, scored: ScoredCompletions, names: list[str]) -> None:
    """Append some completions with their rewards to completions.jsonl. names: of the rewards."""
    completions, (_, group, count) = scored.completions, scored.reward_scores.shape
    by_reward, scores = scored.reward_scores.reshape(-1, count), scored.scores.ravel()
    prompts = completions.prompts
    with path.open("a", encoding="utf-8") as file:
        for i in table_indices(len(completions.texts), group):
            entry = {
                "step": step,
                "row": prompts.names[i // group],
                "prompt": prompts.as_given(i // group),
                "completion": completions.texts[i],
                "rewards": {name: _json_number(x) for name, x in zip(names, by_reward[i], strict=True)},
                "reward": _json_number(scores[i]),
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _json_number(x: Any) -> float | None:
    return None if np.isnan(x) else float(x)
