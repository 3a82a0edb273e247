"""Online preference pairs: the best and the worst completion of each prompt.

Online DPO: Guo et al. 2024 (arXiv:2402.04792).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Int

from jaxft.batch import Pairs, Rollout, TrainState
from jaxft.bounds import at_least
from jaxft.data import prompts
from jaxft.data.pack import RowShape
from jaxft.nn.layer_attention import AttentionLayers
from jaxft.objectives.objective import Objective
from jaxft.rl.advantages import has_score
from jaxft.rl.completions import ScoredCompletions, TrainingRollout
from jaxft.rl.layout import pack_rollout, to_microbatches
from jaxft.rl.metrics import rollout_metrics
from jaxft.rl.programs import BoundRun
from jaxft.rl.rollout import (
    BoundRollouts,
    Rollouts,
    RolloutSource,
    reward_lines,
    rope_lines,
    saved_moments,
    without_logps,
)
from jaxft.rl.rules import Rules
from jaxft.rl.sampler import compile_rollout_sampler, compile_rollout_scorer


@dataclass(frozen=True, kw_only=True)
class OnlinePairs(Rollouts):
    """Data of a preference loss on the policy's own completions: prompts, and the rules by which completions
    are scored.

    Of the rules, rewards, reward_weights, combine, shape and train_on_truncated apply; others raise
    ValueError.
    """

    group: Annotated[int, at_least(2)] = 2  # a pair needs two completions

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = self.rules
        applied = Rules(
            rules.rewards,
            reward_weights=rules.reward_weights,
            combine=rules.combine,
            shape=rules.shape,
            train_on_truncated=rules.train_on_truncated,
        )
        if rules != applied:
            raise ValueError(
                "online pairs use the rules rewards, reward_weights, combine, shape and train_on_truncated. "
                "Leave the other rules at their defaults."
            )

    def start_lines(self, objective: Objective, a: AttentionLayers) -> list[str]:
        """Return lines about reward models, and about a rope that depends on lengths; see
        Dataset.start_lines.
        """
        return [*reward_lines(self), *rope_lines(self, a)]

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "OnlinePairSource":
        """Read and tokenise the prompts; see Dataset.open. `bind` returns the source that can sample."""
        return OnlinePairSource(self, tokenizer, *prompts.split_prompts(self, tokenizer, cache), shards)

    def abstract(self, shards: int = 1) -> Pairs:
        """Return the shapes of the largest batch that the settings allow, without reading any row."""
        return pair_shapes(self, self.pair_shape(self.max_prompt), shards)

    def pair_shape(self, longest: int) -> RowShape:
        """Return the shape of a row that holds the longest prompt and two of the longest completions."""
        return RowShape(
            prompts.padded_length(longest + 2 * self.max_new), prompts.padded_length(2 * self.max_new)
        )


def pair_shapes(data: OnlinePairs, shape: RowShape, shards: int = 1) -> Pairs:
    """Return the shapes of one optimizer step's batch of pairs, one a row."""
    like = prompts.rollout_batch_shapes(data, shape, shards)
    micro, rows = like.ids.shape[:2]

    def array(*last: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((micro, rows, *last), dtype)

    number = array(1, dtype=np.float32)
    return Pairs(
        ids=like.ids, segments=like.ids, positions=like.ids, read=like.read, targets=like.read,
        responses=like.read, offsets=like.read, lengths=array(1, 2), last=array(1, 2),
        mean_lengths=array(1, 2, dtype=np.float32), pair_weights=number, index=array(1), columns={},
        branches=like.ids, sampled_length=data.max_new,
    )  # fmt: skip


@dataclass(frozen=True)
class OnlinePairSource(RolloutSource):
    """The tokenised prompts of a run whose batches are Pairs."""

    data: OnlinePairs

    @property
    def pair_shape(self) -> RowShape:
        """The shape of a row."""
        return self.data.pair_shape(prompts.longest_prompt(self.train, self.eval_prompts))

    @property
    def shapes(self) -> tuple[Pairs, ...]:
        """The shape that training batches have."""
        return (pair_shapes(self.data, self.pair_shape, self.shards),)

    def bind(self, run: BoundRun, saved: dict[str, Any] | None) -> "BoundOnlinePairs":
        """Compile the sampler and the rewards for a run and return the source that uses them."""
        programs = self.programs(run, without_logps)
        return BoundOnlinePairs(
            source=self,
            run=run,
            sampler=compile_rollout_sampler(run, self.data, self.tokenizer, self.rollout_shapes),
            scorer=compile_rollout_scorer(self.data.rules, programs, recompute_logps=False),
            shapes=self.shapes,
            moments=saved_moments(saved),
        )


@dataclass
class BoundOnlinePairs(BoundRollouts):
    """Rollouts of a compiled run whose batches are Pairs. The policy mask is one entry for each pair."""

    source: OnlinePairSource

    def _training_rollout(self, number: int, scored: ScoredCompletions, state: TrainState) -> TrainingRollout:
        """Pair the best and the worst completion of each prompt; the weight is 0 if all scores are equal.

        If no prompt of a step has a valid pair, only the optimizer's momentum is applied.
        """
        completions, rules = scored.completions, self.data.rules
        valid = has_score(scored.scores) & (completions.ended | rules.train_on_truncated)
        best = np.where(valid, scored.scores, -np.inf).argmax(1)
        worst = np.where(valid, scored.scores, np.inf).argmin(1)
        pick = np.stack([best, worst], 1)
        scores = np.take_along_axis(scored.scores, pick, 1)
        is_pair = valid.any(1) & (scores[:, 0] > scores[:, 1])
        tokens = np.take_along_axis(completions.tokens, pick[:, :, None], 1)
        lengths = np.take_along_axis(completions.lengths, pick, 1)
        rows = to_pairs(pack_rollout(completions.prompts, tokens, lengths, self.source.pair_shape))
        trained_on = np.zeros(valid.shape, bool)
        np.put_along_axis(trained_on, pick, is_pair[:, None], 1)
        rollout = self.scorer.rollout_scores(scored, state)
        metrics = rollout_metrics(rules.reward_names, scored, rollout, trained_on, recomputed=False)
        return TrainingRollout(number, rows, lengths, is_pair, valid, metrics)

    def _training_batch(
        self, rollout: TrainingRollout, chosen: Int[np.ndarray, " rows"], trains_policy: bool
    ) -> Pairs:
        """Return the batch of some prompts' pairs, with equal weights."""
        is_pair = rollout.policy_mask[chosen]
        rows: Any = jax.tree.map(lambda x: x[chosen], rollout.rows)
        weights = (is_pair / max(int(is_pair.sum()), 1)).astype(np.float32)[:, None]
        means = rollout.lengths[chosen][is_pair].mean(0) if is_pair.any() else np.ones(2)
        means = np.broadcast_to(means.astype(np.float32), rows.mean_lengths.shape).copy()
        pairs = replace(rows, pair_weights=weights, mean_lengths=means)
        return to_microbatches(pairs, self.shapes[-1], padding=2)


def to_pairs(rows: Rollout) -> Pairs:
    """Convert rows of a prompt with two completions to pairs, the first one chosen. Weights are zero."""
    lengths, is_token = rows.lengths[:, None, :], rows.responses < 2
    before = (rows.segments > 0).sum(1, keepdims=True) - rows.lengths.sum(1, keepdims=True)
    last = before + np.cumsum(rows.lengths, 1) - 1
    offsets = np.arange(rows.read.shape[1]) - np.where(rows.responses == 1, rows.lengths[:, :1], 0)
    index = np.arange(len(rows.ids), dtype=np.int32)[:, None]
    return Pairs(
        ids=rows.ids, segments=rows.segments, positions=rows.positions, read=rows.read, targets=rows.targets,
        responses=rows.responses, offsets=np.where(is_token, offsets, 0).astype(np.int32), lengths=lengths,
        last=last[:, None, :].astype(np.int32), mean_lengths=np.zeros(lengths.shape, np.float32),
        pair_weights=np.zeros(index.shape, np.float32), index=index, columns={}, branches=rows.branches,
        sampled_length=rows.sampled_length,
    )  # fmt: skip
