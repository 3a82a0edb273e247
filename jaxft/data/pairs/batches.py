"""Which pairs share a batch and a row: pure functions of (token counts, seed, epoch).

A batch is a number of pairs, not of rows, and all batches run in one shape, so their token counts should be alike: pairs are
sorted into strata of like length, and every batch gets one of each. Which one is shuffled, but for the stratum whose lengths
are spread widest: there the long ones go to the batches that the other strata left short.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxft.data.pack import WINDOW, Plan, permutation


@dataclass(frozen=True)
class Room:
    """What a row holds at most: tokens, read positions and pairs."""

    length: int
    reads: int
    slots: int


def batches(
    tokens: Int[np.ndarray, " n"], size: int, seed: int, epoch: int
) -> Int[np.ndarray, "batches size"]:
    """Every pair once, `size` a batch; -1 fills the last batch where there are fewer left."""
    order = permutation(len(tokens), seed, 1, epoch)
    whole = len(tokens) // size * size
    window = max(1, WINDOW // size) * size
    found = [
        _dealt(order[i : i + window][: whole - i], tokens, size, (seed, 2, epoch, i))
        for i in range(0, whole, window)
    ]
    full = np.concatenate(found) if found else np.empty((0, size), np.int64)
    full = full[permutation(len(full), seed, 3, epoch)]
    rest = order[whole:]
    last = np.append(rest, np.full(size - len(rest), -1))[None]
    return np.concatenate([full, last]) if len(rest) else full


def _dealt(
    pairs: np.ndarray, tokens: np.ndarray, size: int, key: tuple[int, ...]
) -> Int[np.ndarray, "batches size"]:
    count = len(pairs) // size
    strata = pairs[np.argsort(tokens[pairs], kind="stable")].reshape(size, count)
    shuffled = np.argsort(permutation(len(pairs), *key).reshape(size, count), axis=1)
    strata = np.take_along_axis(strata, shuffled, axis=1)
    lengths = tokens[strata]
    widest = int(np.ptp(lengths, axis=1).argmax())
    others = lengths.sum(0) - lengths[widest]
    ranked = strata[widest][np.argsort(-lengths[widest], kind="stable")]
    strata[widest, np.argsort(others, kind="stable")] = ranked
    return strata.T


def deal(
    members: Int[np.ndarray, "batches size"], tokens: Int[np.ndarray, " n"], rows: int
) -> tuple[Int[np.ndarray, "batches size"], Int[np.ndarray, "batches size"]]:
    """(the pairs of each batch from long to short, the row of each): each in turn goes to the row with the fewest tokens.

    Empty places (-1) come last and get row -1.
    """
    counts = np.where(members < 0, -1, tokens[members])
    order = np.argsort(-counts, axis=1, kind="stable")
    members, counts = np.take_along_axis(members, order, 1), np.take_along_axis(counts, order, 1)
    load = np.zeros((len(members), rows), np.int64)
    row = np.full(members.shape, -1)
    every = np.arange(len(members))
    for place in range(members.shape[1]):
        at, there = load.argmin(1), members[:, place] >= 0
        row[there, place] = at[there]
        load[every[there], at[there]] += counts[there, place]
    return members, row


def row_plan(members: Int[np.ndarray, " size"], row: Int[np.ndarray, " size"], rows: int) -> Plan:
    """The pairs of one batch row by row."""
    there = members >= 0
    members, row = members[there], row[there]
    order = np.argsort(row, kind="stable")
    return Plan(members[order], np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]))


def most(row: Int[np.ndarray, "batches size"], counts: Int[np.ndarray, "batches size"], rows: int) -> int:
    """The largest sum of counts over the pairs of a row."""
    total = np.zeros((len(row), rows), np.int64)
    batch, place = np.nonzero(row >= 0)
    np.add.at(total, (batch, row[batch, place]), counts[batch, place])
    return int(total.max(initial=0))


def fit(
    pairs: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " all"], reads: Int[np.ndarray, " all"], room: Room
) -> Plan:
    """Rows for pairs whose batches don't matter: from long to short, each into the first row that has room for it."""
    pairs = pairs[np.argsort(-tokens[pairs], kind="stable")]
    left = np.empty((len(pairs), 3), np.int64)
    left[:] = (room.length, room.reads, room.slots)
    row = np.empty(len(pairs), np.int64)
    used = 0
    for number, pair in enumerate(pairs):
        need = np.array([tokens[pair], reads[pair], 1])
        fits = np.flatnonzero((left[: used + 1] >= need).all(1))
        if not len(fits):
            raise ValueError(
                f"a pair of {need[0]} tokens and {need[1]} read positions does not fit a row of {room}"
            )
        row[number] = fits[0]
        left[fits[0]] -= need
        used = max(used, int(fits[0]) + 1)
    return row_plan(pairs, row, used)


def derangement(groups: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"] | None:
    """A partner for each, every one once and never of the same group; None where one group is more than half.

    Members of a group stand together, so a shift by the largest group's size leads out of every group.
    """
    order = permutation(len(groups), seed, 4)
    sizes = np.bincount(groups)
    step = int(sizes.max())
    if 2 * step > len(groups):
        return None
    place = np.full(len(sizes), len(groups))
    np.minimum.at(place, groups[order], np.arange(len(groups)))  # a group stands where its first member comes
    order = order[np.argsort(place[groups[order]], kind="stable")]
    partner = np.empty(len(groups), np.int64)
    partner[order] = np.roll(order, -step)
    return partner
