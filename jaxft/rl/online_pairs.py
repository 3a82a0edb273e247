"""Online preference pairs: the best and the worst episode of each prompt.

Online DPO: Guo et al. 2024 (arXiv:2402.04792).
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int

from jaxft.annotations import count_from
from jaxft.batch import Pairs, Rollout
from jaxft.data.packing.pack import RowShape
from jaxft.data.prompts import Prompts, padded_length, rollout_batch_shapes
from jaxft.rl.advantages import has_score
from jaxft.rl.rollout_layout import pack_episodes, to_microbatches
from jaxft.rl.rollout_metrics import rollout_metrics
from jaxft.rl.rollout_rules import Rules
from jaxft.rl.rollout_source import BatchKind, Rollouts, ScoredRollout, TrainingRollout


def pair_shapes(data: Prompts, longest: int, shards: int = 1) -> tuple[Pairs]:
    """Return the shape of a step's batch, alone in a tuple. A row has slots for a prompt of `longest` tokens
    with two episodes of the greatest length. shards: number of devices among which the mesh divides rows.
    """
    tokens, reads = 2 * data.episode_length, 2 * data.sampled_length
    shape = RowShape(padded_length(longest * min(data.starts_per_row, 2) + tokens), padded_length(reads))
    like = rollout_batch_shapes(data, shape, shards)
    micro, rows = like.ids.shape[:2]
    two = jax.ShapeDtypeStruct((micro, rows, 2), np.int32)
    empty = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), replace(like, lengths=two, last=two))
    return (jax.tree.map(lambda x: jax.ShapeDtypeStruct((micro, *x.shape), x.dtype), to_pairs(empty)),)


def pairs_of(data: Rollouts, rollout: ScoredRollout, shape: Pairs) -> TrainingRollout:
    """Pair the best and the worst episode of each prompt; a prompt whose scores are all equal has no pair.

    shape: shape of a batch, see pair_shapes. The result's policy_mask has one entry for each prompt: whether
    it has a pair.
    """
    scored, rules = rollout.scored, data.rules
    valid = has_score(scored.scores) & (scored.episodes.ended | rules.train_on_truncated)
    best = np.where(valid, scored.scores, -np.inf).argmax(1)
    worst = np.where(valid, scored.scores, np.inf).argmin(1)
    pick = np.stack([best, worst], 1)
    scores = np.take_along_axis(scored.scores, pick, 1)
    is_pair = valid.any(1) & (scores[:, 0] > scores[:, 1])
    trained_on = np.zeros(valid.shape, bool)
    np.put_along_axis(trained_on, pick, is_pair[:, None], 1)
    pairs = scored.episodes.pick(pick)
    rows = to_pairs(pack_episodes(pairs, [RowShape(shape.ids.shape[-1], shape.read.shape[-1])]).rows)
    metrics = rollout_metrics(rules.reward_names, scored, rollout.tokens, trained_on)
    return TrainingRollout(rollout.number, rows, pairs.lengths, is_pair, valid, metrics)


def to_pairs(rows: Rollout) -> Pairs:
    """Convert rows of a prompt with two episodes, the first preferred, to pairs whose weights are 0."""
    lengths, count = rows.lengths[:, None, :], len(rows.ids)
    assert rows.last is not None  # rollout_layout.py writes it
    offsets = np.zeros_like(rows.read)
    for response in (0, 1):
        of_response = rows.responses == response
        offsets = np.where(of_response, np.cumsum(of_response, 1) - 1, offsets)
    return Pairs(
        ids=rows.ids, segments=rows.segments, positions=rows.positions, read=rows.read, targets=rows.targets,
        responses=rows.responses, offsets=offsets.astype(np.int32), lengths=lengths,
        last=rows.last[:, None, :], mean_lengths=np.zeros(lengths.shape, np.float32),
        pair_weights=np.zeros((count, 1), np.float32), index=np.arange(count, dtype=np.int32)[:, None],
        columns={}, branches=rows.branches, sampled_length=rows.sampled_length,
    )  # fmt: skip


def best_and_worst_batch(
    data: Rollouts,
    rollout: TrainingRollout,
    chosen: Int[np.ndarray, " rows"],
    trains_policy: bool,
    shape: Pairs,
) -> Pairs:
    """Return the batch of the pairs of some prompts, with equal weights that sum to 1. chosen: indices of
    these prompts. trains_policy has no effect.

    If none of these prompts has a pair, all gradients are 0, and only the optimizer's momentum is applied.
    """
    is_pair = rollout.policy_mask[chosen]
    rows: Any = jax.tree.map(lambda x: x[chosen], rollout.rows)
    weights = (is_pair / max(int(is_pair.sum()), 1)).astype(np.float32)[:, None]
    means = rollout.lengths[chosen][is_pair].mean(0) if is_pair.any() else np.ones(2)
    means = np.broadcast_to(means.astype(np.float32), rows.mean_lengths.shape).copy()
    return to_microbatches(replace(rows, pair_weights=weights, mean_lengths=means), shape)


@dataclass(frozen=True, kw_only=True)
class OnlinePairs(Rollouts):
    """Data of a preference loss on the policy's own episodes: prompts, and the rules that score the episodes.

    Of the fields of `rules`, rewards, reward_weights, combine, shape and train_on_truncated apply; any other
    that differs from its default raises ValueError. Other fields: see Rollouts.
    """

    group: Annotated[int, count_from(2)] = 2  # a pair needs two completions
    kind: ClassVar[BatchKind] = BatchKind(pair_shapes, pairs_of, best_and_worst_batch)

    def __post_init__(self) -> None:
        super().__post_init__()
        applied = ("rewards", "reward_weights", "combine", "shape", "train_on_truncated")
        others = [x for x in fields(Rules) if x.name not in applied]
        ignored = [x.name for x in others if getattr(self.rules, x.name) != x.default]
        if ignored:
            raise ValueError(
                "online pairs use only rewards, reward_weights, combine, shape and train_on_truncated. "
                f"Leave {', '.join(ignored)} unset."
            )
