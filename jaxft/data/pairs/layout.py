"""Pairs laid out in rows of tokens, and per-position values taken back out by pair.

By branches a pair is one segment: the prompt, then its answers one after the other, each going on at the position after the
prompt. Plain, every answer is a segment of its own with the prompt in front. Everything but ids, segments, positions, branches
and read is the same either way, in the same order.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Pairs
from jaxft.data.pack import Plan, spread
from jaxft.data.pairs.batches import Room
from jaxft.data.pairs.tokens import TokenisedPairs


@dataclass(frozen=True)
class Layout:
    """The shape of a microbatch, [rows, room], and whether pairs are laid out by branches. columns: names of pool.numbers."""

    rows: int
    room: Room
    branches: bool
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Runs:
    """Stretches of tokens that stay together, a [pairs of the plan, runs of a pair] array each; of count 0 where missing."""

    start: np.ndarray  # in the pool
    count: np.ndarray
    piece: np.ndarray  # 0 the prompt, else 1 + kind
    segment: np.ndarray
    position: np.ndarray  # of the first token
    column: np.ndarray  # of the first token, in the row
    before: np.ndarray  # the column where the run's first token is predicted, the prompt's last


def tokens_of(pool: TokenisedPairs, branches: bool) -> Int[np.ndarray, " pairs"]:
    """Tokens that each pair takes in a row."""
    prompt, answers = pool.counts[:, 0], pool.counts[:, 1:]
    return answers.sum(1) + prompt * (1 if branches else (answers > 0).sum(1))


def fill(
    pool: TokenisedPairs,
    plan: Plan,
    layout: Layout,
    weights: Float[np.ndarray, " members"],
    means: Float[np.ndarray, " A"],
) -> Pairs:
    """The plan's rows as arrays [layout.rows, ...]; rows that the plan doesn't have stay empty.

    weights: of each of the plan's pairs; means: mean length of each kind of answer.
    """
    members = plan.members
    row = np.repeat(np.arange(plan.rows), np.diff(plan.offsets))  # of each pair
    slot = np.arange(len(members)) - np.repeat(plan.offsets[:-1], np.diff(plan.offsets))
    runs = _runs(pool, plan, row, layout.branches)
    counts = runs.count.ravel()
    where = spread(runs.start.ravel(), counts)  # of each token, in the pool
    each = lambda x: np.repeat(np.broadcast_to(x, runs.count.shape).ravel(), counts)  # noqa: E731
    at = (each(row[:, None]), spread(runs.column.ravel(), counts))
    ids, segments, positions, branches = (
        np.zeros((layout.rows, layout.room.length), np.int32) for _ in range(4)
    )
    ids[at] = pool.ids[where]
    segments[at] = each(runs.segment)
    positions[at] = spread(runs.position.ravel(), counts)
    branches[at] = each(runs.piece)

    learned = pool.learned[where].nonzero()[0]
    first = at[1] == each(runs.column)
    piece = each(runs.piece)[learned]
    answer = each(slot[:, None])[learned] * len(pool.kinds) + piece - 1
    place = _counted(np.repeat(np.arange(len(counts)), counts)[learned])
    read = np.where(first, each(runs.before), at[1] - 1)[learned]
    return Pairs(
        ids=ids,
        segments=segments,
        positions=positions,
        **_by_read(pool, layout, at[0][learned], (read, answer, place, where[learned])),
        **_by_slot(pool, layout, (row, slot, members), (weights, means)),
        last=_last(runs, layout, (row, slot), len(pool.kinds)),
        branches=branches if layout.branches else None,
        kinds=pool.kinds,
    )


def _runs(pool: TokenisedPairs, plan: Plan, row: np.ndarray, branches: bool) -> _Runs:
    kinds = len(pool.kinds)
    piece = np.array([0, *range(1, kinds + 1)] if branches else [k for a in range(kinds) for k in (0, a + 1)])
    start, count = pool.starts[plan.members][:, piece], pool.counts[plan.members][:, piece]
    prompt = pool.counts[plan.members, :1]
    segment = np.cumsum(np.broadcast_to(piece == 0, count.shape), axis=1)
    if not branches:  # an answer that is missing takes no prompt and no segment
        there = pool.counts[plan.members, 1:] > 0
        count = count * np.repeat(there, 2, axis=1)
        segment = np.repeat(np.cumsum(there, axis=1), 2, axis=1)
    tokens, segments = count.sum(1), segment[:, -1] if segment.size else np.zeros(0, np.int64)
    column = _before(tokens, row)[:, None] + np.cumsum(count, axis=1) - count
    opening = np.maximum.accumulate(np.where(piece == 0, column, -1), axis=1)  # where the run's prompt begins
    return _Runs(
        start=start,
        count=count,
        piece=np.broadcast_to(piece, count.shape),
        segment=_before(segments, row)[:, None] + segment,
        position=np.where(piece == 0, 0, prompt),
        column=column,
        before=opening + prompt - 1,
    )


def _before(counts: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The sum of the counts that stand before each in its row; rows must not decrease."""
    total = np.concatenate([[0], np.cumsum(counts)])
    return total[:-1] - total[np.searchsorted(row, row)]


def _counted(groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """0, 1, ... within each stretch of equal, not decreasing numbers."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _by_read(
    pool: TokenisedPairs, layout: Layout, row: np.ndarray, values: tuple[np.ndarray, ...]
) -> dict[str, Any]:
    column, answer, place, where = values
    shape, at = (layout.rows, layout.room.reads), (row, _counted(row))
    read, targets, places = (np.zeros(shape, np.int32) for _ in range(3))
    answers = np.full(shape, layout.room.slots * len(pool.kinds), np.int32)
    read[at], targets[at], answers[at], places[at] = column, pool.ids[where], answer, place
    reference = None
    if pool.reference is not None:
        reference = np.zeros(shape, np.float32)
        reference[at] = pool.reference[where]
    return {"read": read, "targets": targets, "answers": answers, "places": places, "reference": reference}


def _last(
    runs: _Runs, layout: Layout, at: tuple[np.ndarray, np.ndarray], kinds: int
) -> Int[np.ndarray, "B P A"]:
    """The column of the last token of each answer. An answer ends with a token that is learned."""
    last = np.zeros((layout.rows, layout.room.slots, kinds), np.int32)
    of = runs.piece[0] > 0 if len(runs.piece) else np.zeros(0, bool)
    if of.any():
        last[at] = np.where(runs.count[:, of] > 0, runs.column[:, of] + runs.count[:, of] - 1, 0)
    return last


def _by_slot(
    pool: TokenisedPairs, layout: Layout, at: tuple[np.ndarray, ...], values: tuple[np.ndarray, ...]
) -> dict[str, Any]:
    row, slot, members = at
    weights, means = values
    shape = (layout.rows, layout.room.slots)
    lengths = np.zeros((*shape, len(pool.kinds)), np.int32)
    pair_weights = np.zeros(shape, np.float32)
    index = np.full(shape, -1, np.int32)
    columns = {name: np.zeros(shape, np.float32) for name in layout.columns}
    lengths[row, slot], pair_weights[row, slot], index[row, slot] = pool.reads[members], weights, members
    for number, name in enumerate(layout.columns):
        columns[name][row, slot] = pool.numbers[members, number]
    mean_lengths = np.broadcast_to(means.astype(np.float32), lengths.shape).copy()
    return {
        "lengths": lengths, "mean_lengths": mean_lengths, "pair_weights": pair_weights, "index": index, "columns": columns,
    }  # fmt: skip


def abstract(layout: Layout, kinds: tuple[str, ...], micro: int, reference: bool) -> Pairs:
    """The shapes of [micro, rows, ...] batches."""
    shape = lambda *last, dtype=np.int32: jax.ShapeDtypeStruct((micro, layout.rows, *last), dtype)  # noqa: E731
    ids, read, slots = shape(layout.room.length), shape(layout.room.reads), layout.room.slots
    number = shape(slots, dtype=np.float32)
    return Pairs(
        ids=ids, segments=ids, positions=ids, read=read, targets=read, answers=read, places=read,
        lengths=shape(slots, len(kinds)), last=shape(slots, len(kinds)), mean_lengths=shape(slots, len(kinds), dtype=np.float32),
        pair_weights=number, index=shape(slots), columns=dict.fromkeys(layout.columns, number),
        reference=shape(layout.room.reads, dtype=np.float32) if reference else None,
        branches=ids if layout.branches else None, kinds=kinds,
    )  # fmt: skip


def values(batch: Pairs, x: Float[np.ndarray, "... M"]) -> dict[int, Float[np.ndarray, " tokens"]]:
    """Numbers at the read positions of a batch by pair, in order of kind and of place within the answer."""
    flat = lambda a: np.asarray(a).reshape(-1, np.shape(a)[-1])  # noqa: E731
    slots, kinds, found = np.shape(batch.index)[-1], len(batch.kinds), {}
    for answer, place, value, index in zip(
        flat(batch.answers), flat(batch.places), flat(x), flat(batch.index), strict=True
    ):
        order = np.lexsort((place, answer))
        bounds = np.searchsorted(answer[order] // kinds, np.arange(slots + 1))
        for slot, pair in enumerate(index):
            if pair >= 0:
                found[int(pair)] = value[order][bounds[slot] : bounds[slot + 1]]
    return found
