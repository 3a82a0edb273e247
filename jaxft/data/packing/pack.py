"""Pack examples into rows and order the rows: a pure function of (lengths, seed, epoch); count steps.

`pack_examples` does not split examples; `wrap_examples` concatenates documents and cuts them anywhere.

pack_examples is first-fit decreasing within windows of WINDOW examples. An example's window depends on the
seed alone. From epoch to epoch, examples change places only with examples of the same length and the same
number of read positions, so every epoch has the same number of rows and the same largest row, and one
compiled program serves all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

WINDOW = 2**16
ORDER_WINDOW = 4  # optimizer steps whose examples are packed together if data.order_by sorts them


@dataclass(frozen=True)
class RowShape:
    """The capacity of a row: tokens, read positions (tokens with a loss), and slots for pairs."""

    length: int
    reads: int
    slots: int = 1


@dataclass(frozen=True)
class RowPlan:
    """The examples of each row: row r consists of members[offsets[r]:offsets[r + 1]], in that order.

    starts, counts: the part of each member that is in the row: its first token, and the number of tokens.
    None: each member is in its row in full.
    """

    members: Int[np.ndarray, " examples"]
    offsets: Int[np.ndarray, " rows_plus_1"]
    starts: Int[np.ndarray, " examples"] | None = None
    counts: Int[np.ndarray, " examples"] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> "RowPlan":
        """Return the plan of rows `start` to before `stop`, fewer at the end of the epoch."""
        offsets = self.offsets[start : min(stop, self.rows) + 1]
        chosen = slice(offsets[0], offsets[-1])
        parts = [None if x is None else x[chosen] for x in (self.starts, self.counts)]
        return RowPlan(self.members[chosen], offsets - offsets[0], *parts)

    def lengths_of(self, lengths: Int[np.ndarray, " all"]) -> Int[np.ndarray, " examples"]:
        """Return the number of tokens of each member. lengths: number of tokens of each example."""
        return lengths[self.members] if self.counts is None else self.counts

    def row_sums(self, values: Int[np.ndarray, " examples"]) -> Int[np.ndarray, " rows"]:
        """Return the sum of the members' values in each row."""
        return np.diff(np.append(0, np.cumsum(values))[self.offsets])

    @property
    def is_first(self) -> Bool[np.ndarray, " examples"]:
        """Mask of the members that are the first of their row."""
        mask = np.zeros(len(self.members), bool)
        mask[self.offsets[:-1]] = True
        return mask

    def names(self, names: Sequence[str]) -> list[list[str]]:
        """Return a list for each row: the names of its examples. names: the name of every example."""
        bounds = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [[names[i] for i in self.members[start:stop]] for start, stop in bounds]


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
    """Return the index of each example's row: the first row of `size` tokens that has room for it. lengths:
    number of tokens of each example, descending, from at most `size` to 1.

    >>> first_fit(np.array([5, 4, 3, 2]), 8).tolist()
    [0, 1, 0, 1]
    """
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
    the rows. lengths, reads: number of tokens and of targets of each example.
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


def ascending(keys: Float[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"]:
    """Return indices from the smallest to the largest key. Equal keys are shuffled once, for all epochs."""
    rank = np.empty(len(keys), np.int64)
    rank[permutation(len(keys), seed, 1)] = np.arange(len(keys))
    return np.lexsort((rank, keys))


def pack_in_order(
    lengths: Int[np.ndarray, " n"], keys: Float[np.ndarray, " n"], size: int, rows: int, seed: int
) -> RowPlan:
    """Pack the examples from small to large keys, such as their difficulty, into rows of at most `size`
    tokens.

    Examples that fill ORDER_WINDOW steps of `rows` rows are packed together, first-fit decreasing. The rows
    of such a window go from small to large mean keys. seed: shuffles examples of equal keys, once for all
    epochs.
    """
    order = ascending(keys, seed)
    window = (np.cumsum(lengths[order]) - 1) // (size * rows * ORDER_WINDOW)
    members, sizes = [], []
    for part in np.split(order, np.flatnonzero(np.diff(window)) + 1):
        part = part[np.argsort(-lengths[part], kind="stable")]
        row = first_fit(lengths[part], size)
        mean = np.bincount(row, keys[part]) / np.bincount(row)
        place = np.empty(len(mean), np.int64)
        place[np.argsort(mean, kind="stable")] = np.arange(len(mean))
        members.append(part[np.argsort(place[row], kind="stable")])
        sizes.append(np.bincount(place[row]))
    return RowPlan(np.concatenate(members), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


def one_per_row(
    count: int, seed: int, epoch: int, order_by: Float[np.ndarray, " n"] | None = None
) -> RowPlan:
    """Put each example into a separate row, and shuffle the rows or sort them by `order_by`."""
    order = permutation(count, seed, 1, epoch) if order_by is None else ascending(order_by, seed)
    return RowPlan(order, np.arange(count + 1))


def wrap_examples(
    lengths: Int[np.ndarray, " n"],
    documents: Int[np.ndarray, " n"],
    size: int,
    key: tuple[int, int],
    order_by: Float[np.ndarray, " n"] | None = None,
) -> RowPlan:
    """Concatenate documents in random order, cut them into rows of `size` tokens, and shuffle the rows.

    documents: the index of the document that each example is a part of; a document's parts follow one
    another. key: seed and epoch. order_by: sort documents by these numbers, and leave the rows in that order.
    Every token is in one row. The last row may be shorter; if one token remained for it, it takes another
    from the row before.
    """
    seed, epoch = key
    first = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1))
    parts = np.diff(np.append(first, len(documents)))
    order = permutation(len(first), seed, 1, epoch) if order_by is None else ascending(order_by[first], seed)
    members = ranges(first[order], parts[order])
    ends = np.cumsum(lengths[members])
    begins = ends - lengths[members]
    cuts = np.append(np.arange(0, ends[-1], size), ends[-1])
    if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:  # a row of one token would have no target
        cuts[-2] -= 1
    low = np.searchsorted(ends, cuts[:-1], side="right")
    per_row = np.searchsorted(begins, cuts[1:], side="left") - low
    index, row = ranges(low, per_row), np.repeat(np.arange(len(per_row)), per_row)
    starts = np.maximum(cuts[row] - begins[index], 0)
    counts = np.minimum(cuts[row + 1] - begins[index], lengths[members[index]]) - starts
    plan = RowPlan(np.arange(len(index)), np.concatenate([[0], np.cumsum(per_row)]))
    if order_by is None:
        plan = _shuffle_rows(plan.members, per_row, seed, epoch)
    return RowPlan(members[index[plan.members]], plan.offsets, starts[plan.members], counts[plan.members])


def _shuffle_rows(members: np.ndarray, sizes: np.ndarray, seed: int, epoch: int) -> RowPlan:
    order = permutation(len(sizes), seed, 3, epoch)
    starts = (np.cumsum(sizes) - sizes)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes[order])])
    return RowPlan(members[ranges(starts, sizes[order])], offsets)


def limit_reads(plan: RowPlan, reads: Int[np.ndarray, " members"], most: int) -> RowPlan:
    """Divide each row of more than `most` targets. reads: number of each member's targets, at most `most`."""
    total = np.add.reduceat(reads, plan.offsets[:-1]) if plan.rows else reads
    cuts = []
    for row in np.flatnonzero(total > most):
        used = 0
        for member in range(plan.offsets[row], plan.offsets[row + 1]):
            used += int(reads[member])
            if used > most:
                cuts.append(member)
                used = int(reads[member])
    return replace(plan, offsets=np.sort(np.append(plan.offsets, cuts).astype(np.int64))) if cuts else plan


def split_lengths(length: int, size: int) -> Int[np.ndarray, " pieces"]:
    """Return the lengths of the pieces that a document is split into: `size` tokens each but for the last.

    A last piece of one token, which would have no target, takes another from the one before. size: 3 or more.

    >>> split_lengths(7, size=3).tolist()
    [3, 2, 2]
    """
    pieces = np.full(-(-length // size), size)
    pieces[-1] = length - size * (len(pieces) - 1)
    if pieces[-1] == 1 and len(pieces) > 1:
        pieces[-2:] += (-1, 1)
    return pieces


def ranges(starts: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """Return the ranges start, start + 1, ..., start + count - 1 one after the other.

    >>> ranges(np.array([5, 9]), np.array([2, 3])).tolist()
    [5, 6, 9, 10, 11]
    """
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def number_groups(values: Shaped[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
    """Number the groups of equal rows, in order of their first row, and return the number of each row's
    group.
    """
    if values.shape[1] == 1:  # much faster
        values = values[:, 0]
    _, first, group = np.unique(values, axis=0, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[group.ravel()]


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Epochs:
    """Passes over the rows.

    batch_tokens(epoch): tokens of each batch of an epoch. alike: whether every epoch has the same number of
    batches and of tokens; False if rows are packed and sources have weights.
    """

    batch_tokens: Callable[[int], Int[np.ndarray, " steps"]]
    alike: bool = True

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""
        return len(self.batch_tokens(0 if self.alike else epoch))

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step in that epoch)."""
        if self.alike:
            return divmod(step, self.steps_in(0))
        epoch = 0
        while step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step

    def steps_of_epochs(self, epochs: float) -> int:
        """Return how many optimizer steps a number of epochs has, which may be a fraction; at least 1."""
        if self.alike:
            return max(1, math.ceil(epochs * self.steps_in(0) - 1e-9))
        whole = math.floor(epochs)
        rest = (epochs - whole) * self.steps_in(whole) if epochs > whole else 0.0
        return max(1, sum(map(self.steps_in, range(whole))) + math.ceil(rest - 1e-9))

    def steps_of_tokens(self, tokens: int) -> int:
        """Return the number of optimizer steps after which at least `tokens` tokens were read."""
        steps = epoch = 0
        if self.alike:
            total = int(self.batch_tokens(0).sum())
            epoch, tokens = divmod(tokens - 1, total)
            steps, tokens = epoch * self.steps_in(0), tokens + 1
        while True:
            read = np.cumsum(self.batch_tokens(epoch))
            if tokens <= read[-1]:
                return steps + int(np.searchsorted(read, tokens)) + 1
            steps, tokens, epoch = steps + len(read), tokens - int(read[-1]), epoch + 1
