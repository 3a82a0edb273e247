"""Decide which pairs share a batch and a row: pure functions of (token counts, seed, epoch).

A batch is a number of pairs, not of rows, and all batches have one shape, so their token counts should be
similar: pairs are sorted into strata of similar length, and every batch gets one pair of each stratum. The
choice within a stratum is random, except for the stratum with the widest range of lengths: its long pairs go
to the batches with the fewest tokens from the other strata.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from jaxft.data.packing.pack import ORDER_WINDOW, WINDOW, RowPlan, RowShape, ascending, permutation, round_up


def order_batches(
    tokens: Int[np.ndarray, " n"],
    size: int,
    seed: int,
    epoch: int,
    keys: Float[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, "batches size"]:
    """Return the pairs of each batch of an epoch: every pair once, `size` per batch, the last batch padded
    with -1. With keys, batches go from small to large ones, except among ORDER_WINDOW batches.
    """
    order = permutation(len(tokens), seed, 1, epoch) if keys is None else ascending(keys, seed)
    whole = len(tokens) // size * size
    window = (max(1, WINDOW // size) if keys is None else ORDER_WINDOW) * size
    parts = [
        _stratified(order[i : i + window][: whole - i], tokens, size, (seed, 2, epoch, i))
        for i in range(0, whole, window)
    ]
    full = np.concatenate(parts) if parts else np.empty((0, size), np.int64)
    full = full if keys is not None else full[permutation(len(full), seed, 3, epoch)]
    rest = order[whole:]
    last = np.append(rest, np.full(size - len(rest), -1))[None]
    return np.concatenate([full, last]) if len(rest) else full


def _stratified(
    pairs: np.ndarray, tokens: np.ndarray, size: int, key: tuple[int, ...]
) -> Int[np.ndarray, "batches size"]:
    count = len(pairs) // size
    strata = pairs[np.argsort(tokens[pairs], kind="stable")].reshape(size, count)
    shuffled = np.argsort(permutation(len(pairs), *key).reshape(size, count), axis=1)
    strata = np.take_along_axis(strata, shuffled, axis=1)
    lengths = tokens[strata]
    widest = int(np.ptp(lengths, axis=1).argmax())
    others = lengths.sum(0) - lengths[widest]
    by_length = strata[widest][np.argsort(-lengths[widest], kind="stable")]
    strata[widest, np.argsort(others, kind="stable")] = by_length
    return strata.T


def assign_rows(
    members: Int[np.ndarray, "batches size"], tokens: Int[np.ndarray, " n"], rows: int
) -> RowPlan:
    """Return the rows of all batches one after the other, `rows` of each: from long to short, each pair in
    turn goes to the row with fewest tokens.

    members: the pairs of each batch; padding is -1.
    """
    counts = np.where(members < 0, -1, tokens[members])
    order = np.argsort(-counts, axis=1, kind="stable")
    members, counts = np.take_along_axis(members, order, 1), np.take_along_axis(counts, order, 1)
    load = np.zeros((len(members), rows), np.int64)
    row = np.zeros(members.shape, np.int64)
    batches = np.arange(len(members))
    for column in range(members.shape[1]):
        shortest, present = load.argmin(1), members[:, column] >= 0
        row[present, column] = shortest[present]
        load[batches[present], shortest[present]] += counts[present, column]
    row += batches[:, None] * rows
    return plan_rows(members[members >= 0], row[members >= 0], len(members) * rows)


def plan_rows(members: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"], rows: int) -> RowPlan:
    """Return the plan of pairs that are assigned to `row`."""
    order = np.argsort(row, kind="stable")
    return RowPlan(members[order], np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]))


def check_fit(
    plan: RowPlan, tokens: Int[np.ndarray, " n"], reads: Int[np.ndarray, " n"], shape: RowShape
) -> None:
    """Raise ValueError if a batch does not fit the row shape, which was planned for the run's epochs."""
    most = [int(plan.row_sums(x[plan.members]).max()) for x in (tokens, reads, np.ones_like(reads))]
    if most[0] > shape.length or most[1] > shape.reads or most[2] > shape.slots:
        raise ValueError(
            f"a batch after the last planned epoch needs rows of {most[0]} tokens, {most[1]} read positions "
            f"and {most[2]} pairs, but rows have {shape.length}, {shape.reads} and {shape.slots}; raise "
            "data.epochs to cover loop.steps and start the same command again"
        )


def row_shape(
    tokens: Int[np.ndarray, " n"], reads: Int[np.ndarray, " n"], plans: Iterable[RowPlan]
) -> RowShape:
    """Return a row shape that holds the fullest row of any batch, rounded up so that similar data share a
    program.

    plans: the rows of each epoch. Any pair alone fits as well.
    """
    most_tokens, most_reads, slots = int(tokens.max()), int(reads.max()), 1
    for plan in plans:
        most_tokens = max(most_tokens, int(plan.row_sums(tokens[plan.members]).max()))
        most_reads = max(most_reads, int(plan.row_sums(reads[plan.members]).max()))
        slots = max(slots, int(np.diff(plan.offsets).max()))
    length = round_up(most_tokens, 64)
    return RowShape(length, min(round_up(most_reads, length // 8), length), slots)


def fit_rows(
    pairs: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " all"],
    reads: Int[np.ndarray, " all"],
    shape: RowShape,
) -> RowPlan:
    """Pack pairs of no particular batch: from long to short, each into the first row that it fits."""
    pairs = pairs[np.argsort(-tokens[pairs], kind="stable")]
    left = np.empty((len(pairs), 3), np.int64)
    left[:] = (shape.length, shape.reads, shape.slots)
    row = np.empty(len(pairs), np.int64)
    used = 0
    for number, pair in enumerate(pairs):
        need = np.array([tokens[pair], reads[pair], 1])
        fits = np.flatnonzero((left[: used + 1] >= need).all(1))
        if not len(fits):
            raise ValueError(
                f"a pair of {need[0]} tokens and {need[1]} read positions does not fit a row of "
                f"{shape.length} tokens, {shape.reads} read positions and {shape.slots} pairs; use rows that "
                "are planned for these pairs"
            )
        row[number] = fits[0]
        left[fits[0]] -= need
        used = max(used, int(fits[0]) + 1)
    return plan_rows(pairs, row, used)


def derangement(groups: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"] | None:
    """Return for each member a partner from another group, every member once; None if one group has more than
    half of the members.

    Members are sorted by group, so a shift by the size of the largest group leads out of every group.
    """
    order = permutation(len(groups), seed, 4)
    sizes = np.bincount(groups)
    step = int(sizes.max())
    if 2 * step > len(groups):
        return None
    first = np.full(len(sizes), len(groups))
    np.minimum.at(first, groups[order], np.arange(len(groups)))  # groups are in order of their first members
    order = order[np.argsort(first[groups[order]], kind="stable")]
    partner = np.empty(len(groups), np.int64)
    partner[order] = np.roll(order, -step)
    return partner
