"""Rows of a plan as arrays: tokens, segments, targets and their weights."""

from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Tokens
from jaxft.data.pack import RowPlan, ranges, round_up
from jaxft.data.tokens import TokenisedExamples


def member_counts(examples: TokenisedExamples, plan: RowPlan) -> Int[np.ndarray, " members"]:
    """Return the tokens of each member of a plan."""
    return examples.lengths[plan.members] if plan.counts is None else plan.counts


def member_targets(examples: TokenisedExamples, plan: RowPlan) -> Int[np.ndarray, " members"]:
    """Return the targets of each member of a plan; of wrapped rows all tokens but the first."""
    if plan.counts is None:
        return examples.reads[plan.members]
    return plan.counts - plan.is_first


def tokens_per_row(examples: TokenisedExamples, plan: RowPlan) -> Int[np.ndarray, " rows"]:
    """Return the tokens of each row of a plan."""
    return np.diff(np.append(0, np.cumsum(member_counts(examples, plan)))[plan.offsets])


def read_length(
    examples: TokenisedExamples, plans: tuple[RowPlan, ...], size: int, chosen: Int[np.ndarray, " n"]
) -> int:
    """Return the largest number of read positions in a row, or in one of the chosen examples alone.

    It is rounded up to a multiple of 1/8 of the row, so that similar data share a compiled program.
    """
    alone = int(examples.reads[chosen].max(initial=1))
    targets = ((p, member_targets(examples, p)) for p in plans if p.rows)
    most = max(int(np.add.reduceat(counts, p.offsets[:-1]).max()) for p, counts in targets)
    return min(round_up(max(most, alone), max(1, size // 8)), size)


def weights_of_members(
    examples: TokenisedExamples, plan: RowPlan, weighting: str
) -> Float[np.ndarray, " members"]:
    """Return the weight of a target of each member, which a turn's own weight then multiplies.

    The products sum to 1 over all targets of the plan, or are all 0 if all examples have weight 0.
    """
    factors = examples.weights[plan.members]
    mass = examples.mass[plan.members] if plan.counts is None else member_targets(examples, plan)
    total = (factors * mass).sum() if weighting == "token" else factors.sum()
    scale = factors / total if total else factors
    return scale if weighting == "token" else scale / mass


def fill_rows(
    examples: TokenisedExamples,
    plan: RowPlan,
    shape: tuple[int, int, int],
    weights: Float[np.ndarray, " members"],
    sources: Int[np.ndarray, " examples"] | None = None,
) -> Tokens:
    """Return the plan's rows as arrays of `shape` (rows, T, M); further rows stay empty.

    Each member is a segment. A wrapped row, whose plan has starts, is a single segment. sources: the index of
    each example's source; None for a single source.
    """
    rows, length, reads = shape
    counts = member_counts(examples, plan)
    per_row = np.diff(plan.offsets)
    row = np.repeat(np.arange(plan.rows), per_row)  # of each member
    before = np.cumsum(counts) - counts
    column = before - np.repeat(before[plan.offsets[:-1]], per_row)
    number = np.arange(len(row)) - np.repeat(plan.offsets[:-1], per_row) + 1

    first = examples.offsets[plan.members] + (0 if plan.starts is None else plan.starts)
    where = ranges(first, counts)  # index of each token in examples.ids
    at = (np.repeat(row, counts), ranges(column, counts))
    ids, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    ids[at] = examples.ids[where]
    wrapped = plan.starts is not None
    segments[at] = 1 if wrapped else np.repeat(number, counts)
    positions[at] = at[1] if wrapped else ranges(np.zeros_like(counts), counts)

    learned = (at[1] > 0 if wrapped else examples.learned[where]).nonzero()[0]
    target_row = at[0][learned]
    slot = (target_row, np.arange(len(learned)) - np.searchsorted(target_row, target_row))
    read, targets = (np.zeros((rows, reads), np.int32) for _ in range(2))
    token_weights = np.zeros((rows, reads), np.float32)
    read[slot] = at[1][learned] - 1
    targets[slot] = examples.ids[where[learned]]
    token_weights[slot] = np.repeat(weights, counts)[learned]
    if examples.weight_counts[plan.members].any():
        token_weights[slot] *= _own_weights(examples, plan.members)[learned]
    found = Tokens(ids, segments, positions, read, targets, token_weights)
    if sources is None:
        return found
    number_of = np.zeros((rows, reads), np.int32)
    number_of[slot] = np.repeat(sources[plan.members], counts)[learned]
    return replace(found, sources=number_of)


def _own_weights(
    examples: TokenisedExamples, members: Int[np.ndarray, " members"]
) -> Float[np.ndarray, " tokens"]:
    """Return the weight of each token of the members within its example, 1 in examples without weights."""
    own = examples.weight_counts[members]
    weights = np.ones(examples.lengths[members].sum(), np.float32)
    where = ranges(examples.weight_offsets[members], own)
    weights[np.repeat(own > 0, examples.lengths[members])] = examples.token_weights[where]
    return weights


def held_out_batches(
    examples: TokenisedExamples,
    plan: RowPlan,
    shape: tuple[int, int, int],
    sources: Int[np.ndarray, " examples"] | None = None,
) -> tuple[Tokens, ...]:
    """Return batches [1, rows, ...] of a plan, whose weights sum to 1 over all of them. shape: rows, T, M."""
    count = shape[0]
    weights = weights_of_members(examples, plan, "token")
    batches = []
    for start in range(0, plan.rows, count):
        part = plan.slice(start, start + count)
        own = weights[plan.offsets[start] :][: len(part.members)]
        flat = fill_rows(examples, part, shape, own, sources)
        batches.append(jax.tree.map(lambda x: x[None], flat))
    return tuple(batches)
