"""Pack examples into rows and order the rows: a pure function of (lengths, seed, epoch).

First-fit decreasing within windows of WINDOW examples. Which window an example is in depends on the seed
alone. From epoch to epoch examples are exchanged only with examples of the same length and the same number of
read positions, so every epoch has the same number of rows and the same largest row, and one compiled program
serves all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

WINDOW = 2**16


@dataclass(frozen=True)
class RowShape:
    """The capacity of a row: tokens, read positions, and slots for pairs."""

    length: int
    reads: int
    slots: int = 1


@dataclass(frozen=True)
class RowPlan:
    """The examples of each row: row r holds members[offsets[r]:offsets[r + 1]], in that order."""

    members: Int[np.ndarray, " examples"]
    offsets: Int[np.ndarray, " rows_plus_1"]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> "RowPlan":
        """Return rows `start` to `stop`, fewer at the end of the epoch."""
        offsets = self.offsets[start : min(stop, self.rows) + 1]
        return RowPlan(self.members[offsets[0] : offsets[-1]], offsets - offsets[0])

    def names(self, names: Sequence[str]) -> list[str]:
        """Return the names of each row's examples, separated by commas."""
        bounds = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [", ".join(names[i] for i in self.members[start:stop]) for start, stop in bounds]


def permutation(count: int, *key: int) -> Int[np.ndarray, " count"]:
    """Return a shuffle of range(count) that depends on the integers in `key` alone, in every version of
    numpy.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part % 2**64))
    return np.argsort(_mix(state + _mix(np.arange(count, dtype=np.uint64))), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)  # splitmix64, https://prng.di.unimi.it/splitmix64.c
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def first_fit(lengths: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " n"]:
    """Return the row of each example if each in turn goes into the first row with enough free tokens; lengths
    must not increase. Examples of one length are placed together: a row receives free // length of them
    before the next row gets any.
    """
    if len(lengths) and (lengths[0] > size or lengths[-1] < 1):
        raise ValueError(
            f"lengths of {lengths[-1]} to {lengths[0]} do not fit rows of {size} tokens; use lengths of 1 to "
            f"{size}"
        )
    rows = np.empty(len(lengths), np.int64)
    values, counts = np.unique(-lengths, return_counts=True)
    room = np.empty(0, np.int64)
    open_rows = np.empty(0, np.int64)  # those with room for the shortest example, in order of opening
    done = used = 0
    for length, count in zip(-values, counts, strict=True):
        fits = room // length
        taken = np.clip(count - (np.cumsum(fits) - fits), 0, fits)
        rest, per_row = count - taken.sum(), size // length
        new = -(-rest // per_row)
        opened = np.full(new, per_row)
        if new:
            opened[-1] = rest - per_row * (new - 1)
        open_rows = np.concatenate([open_rows, np.arange(used, used + new)])
        taken = np.concatenate([taken, opened])
        room = np.concatenate([room, np.full(new, size)]) - taken * length
        rows[done : done + count] = np.repeat(open_rows, taken)
        keep = room >= lengths[-1]
        open_rows, room, done, used = open_rows[keep], room[keep], done + count, used + new
    return rows


def pack_examples(
    lengths: Int[np.ndarray, " n"], reads: Int[np.ndarray, " n"], size: int, seed: int, epoch: int
) -> RowPlan:
    """Pack the examples into rows of at most `size` tokens, each example into exactly one row, and shuffle
    the rows.
    """
    rank = np.empty(len(lengths), np.int64)
    rank[permutation(len(lengths), seed, 1, epoch)] = np.arange(len(lengths))
    windows = permutation(len(lengths), seed, 2)
    members, sizes = [], []
    for start in range(0, len(lengths), WINDOW):
        window = windows[start : start + WINDOW]
        window = window[np.lexsort((rank[window], -reads[window], -lengths[window]))]
        rows = first_fit(lengths[window], size)
        members.append(window[np.argsort(rows, kind="stable")])
        sizes.append(np.bincount(rows))
    return _shuffle_rows(np.concatenate(members), np.concatenate(sizes), seed, epoch)


def one_per_row(count: int, seed: int, epoch: int) -> RowPlan:
    """Put each example into a separate row and shuffle the rows."""
    return RowPlan(permutation(count, seed, 1, epoch), np.arange(count + 1))


def _shuffle_rows(members: np.ndarray, sizes: np.ndarray, seed: int, epoch: int) -> RowPlan:
    order = permutation(len(sizes), seed, 3, epoch)
    starts = (np.cumsum(sizes) - sizes)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes[order])])
    return RowPlan(members[ranges(starts, sizes[order])], offsets)


def ranges(starts: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """Return the ranges start, start + 1, ..., start + count - 1 one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def number_groups(values: Shaped[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
    """Return the number of each row's group of equal rows; groups are numbered in order of their first."""
    if values.shape[1] == 1:  # much faster
        values = values[:, 0]
    _, first, group = np.unique(values, axis=0, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[group.ravel()]


def round_up(value: int, multiple: int) -> int:
    """Return the next multiple of `multiple`."""
    return -(-value // multiple) * multiple
