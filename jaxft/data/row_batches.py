"""Rows of a plan as arrays: tokens, segments, targets and their weights."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Tokens
from jaxft.data.pack import RowPlan, ranges, round_up
from jaxft.data.tokenised import MASS, TOKEN_WEIGHTS, Ragged, TokenisedRows


def member_counts(examples: TokenisedRows, plan: RowPlan) -> Int[np.ndarray, " members"]:
    """Return the tokens of each member of a plan."""
    return examples.lengths[plan.members] if plan.counts is None else plan.counts


def member_targets(examples: TokenisedRows, plan: RowPlan) -> Int[np.ndarray, " members"]:
    """Return the targets of each member of a plan; of wrapped rows all tokens but the first."""
    if plan.counts is None:
        return examples.targets[plan.members]
    return plan.counts - plan.is_first


def read_length(
    examples: TokenisedRows, plans: tuple[RowPlan, ...], size: int, chosen: Int[np.ndarray, " n"]
) -> int:
    """Return the largest number of read positions in a row, or in one of the chosen examples alone.

    It is rounded up to a multiple of 1/8 of the row, so that similar data share a compiled program.
    """
    alone = int(examples.targets[chosen].max(initial=1))
    most = max(int(plan.row_sums(member_targets(examples, plan)).max()) for plan in plans if plan.rows)
    return min(round_up(max(most, alone), max(1, size // 8)), size)


def weights_of_members(
    examples: TokenisedRows, plan: RowPlan, weighting: str
) -> Float[np.ndarray, " members"]:
    """Return the weight of a target of each member, which a turn's own weight then multiplies.

    The products sum to 1 over all targets of the plan, or are all 0 if all examples have weight 0.
    """
    factors = examples.weights[plan.members]
    mass = examples.extras[MASS][plan.members] if plan.counts is None else member_targets(examples, plan)
    total = (factors * mass).sum() if weighting == "token" else factors.sum()
    scale = factors / total if total else factors
    return scale if weighting == "token" else scale / mass


def fill_rows(
    examples: TokenisedRows,
    plan: RowPlan,
    shape: tuple[int, ...],
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
    own: Ragged = examples.extras[TOKEN_WEIGHTS]
    if own.counts[plan.members].any():
        token_weights[slot] *= _own_weights(own, plan.members, examples.lengths)[learned]
    found = Tokens(ids, segments, positions, read, targets, token_weights)
    if sources is None:
        return found
    number_of = np.zeros((rows, reads), np.int32)
    number_of[slot] = np.repeat(sources[plan.members], counts)[learned]
    return replace(found, sources=number_of)


def _own_weights(
    own: Ragged, members: Int[np.ndarray, " members"], lengths: Int[np.ndarray, " examples"]
) -> Float[np.ndarray, " tokens"]:
    """Return the weight of each token of the members within its example, 1 in examples without weights."""
    weights = np.ones(lengths[members].sum(), np.float32)
    where = ranges(own.offsets[members], own.counts[members])
    weights[np.repeat(own.counts[members] > 0, lengths[members])] = own.values[where]
    return weights
