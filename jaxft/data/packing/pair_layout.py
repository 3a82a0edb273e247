"""Plan which pairs share a batch and a row, and arrange them in rows of tokens.

A batch is a number of pairs, not of rows, and all batches have one shape, so their token counts should be
similar: pairs are sorted into strata of similar length, and every batch gets one pair of each stratum. The
choice within a stratum is random, except for the stratum with the widest range of lengths: its long pairs go
to the batches with the fewest tokens from the other strata.

With branches a pair is one segment of its row: the prompt, then its responses one after the other, each
continuing at the position after the prompt. Without branches every response is a separate segment that starts
with the prompt. For the same pairs in a row, only ids, segments, positions, branches, read and last differ.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Pairs
from jaxft.data.packing import pack
from jaxft.data.packing.row_cache import Flat
from jaxft.data.packing.tokenised import NUMBERS, TokenisedRows

# ---- which pairs share a batch and a row


def order_batches(
    tokens: Int[np.ndarray, " n"],
    size: int,
    seed: int,
    epoch: int,
    keys: Float[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, "batches size"]:
    """Return the pairs of each batch of an epoch: every pair once, `size` per batch, the last batch padded
    with -1. tokens: length of each pair. With keys, a number for each pair, batches go from small to large
    keys, except within windows of ORDER_WINDOW batches.
    """
    order = pack.permutation(len(tokens), seed, 1, epoch) if keys is None else pack.ascending(keys, seed)
    whole = len(tokens) // size * size
    window = (max(1, pack.WINDOW // size) if keys is None else pack.ORDER_WINDOW) * size
    parts = [
        _stratified(order[i : i + window][: whole - i], tokens, size, (seed, 2, epoch, i))
        for i in range(0, whole, window)
    ]
    full = np.concatenate(parts) if parts else np.empty((0, size), np.int64)
    full = full if keys is not None else full[pack.permutation(len(full), seed, 3, epoch)]
    rest = order[whole:]
    last = np.append(rest, np.full(size - len(rest), -1))[None]
    return np.concatenate([full, last]) if len(rest) else full


def _stratified(
    pairs: np.ndarray, tokens: np.ndarray, size: int, key: tuple[int, ...]
) -> Int[np.ndarray, "batches size"]:
    count = len(pairs) // size
    strata = pairs[np.argsort(tokens[pairs], kind="stable")].reshape(size, count)
    shuffled = np.argsort(pack.permutation(len(pairs), *key).reshape(size, count), axis=1)
    strata = np.take_along_axis(strata, shuffled, axis=1)
    lengths = tokens[strata]
    widest = int(np.ptp(lengths, axis=1).argmax())
    others = lengths.sum(0) - lengths[widest]
    by_length = strata[widest][np.argsort(-lengths[widest], kind="stable")]
    strata[widest, np.argsort(others, kind="stable")] = by_length
    return strata.T


def assign_rows(
    members: Int[np.ndarray, "batches size"], tokens: Int[np.ndarray, " n"], rows: int
) -> pack.RowPlan:
    """Divide each batch into `rows` rows: from long to short, each pair goes to the row with the fewest
    tokens. Return the rows of all batches one after the other.

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


def plan_rows(members: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"], rows: int) -> pack.RowPlan:
    """Return the plan of `rows` rows in which pair members[i] is in row row[i]."""
    order = np.argsort(row, kind="stable")
    return pack.RowPlan(members[order], np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]))


def check_fit(
    plan: pack.RowPlan, tokens: Int[np.ndarray, " n"], reads: Int[np.ndarray, " n"], shape: pack.RowShape
) -> None:
    """Raise ValueError if a batch does not fit the row shape, which was planned for the run's epochs.

    tokens, reads: numbers of tokens and targets of each pair.
    """
    most = [int(plan.row_sums(x[plan.members]).max()) for x in (tokens, reads, np.ones_like(reads))]
    if most[0] > shape.length or most[1] > shape.reads or most[2] > shape.slots:
        raise ValueError(
            f"batches past the last planned epoch do not fit the compiled row shape: they need {most[0]} "
            f"tokens, {most[1]} read positions and {most[2]} pairs, but rows have {shape.length}, "
            f"{shape.reads} and {shape.slots}; raise data.epochs to cover loop.steps and start the "
            "same command again"
        )


def row_shape(
    tokens: Int[np.ndarray, " n"], reads: Int[np.ndarray, " n"], plans: Iterable[pack.RowPlan]
) -> pack.RowShape:
    """Return a row shape that fits the fullest row of any plan, and any pair alone, rounded up so that
    similar data share a compiled program.

    tokens, reads: numbers of tokens and targets of each pair. plans: the rows of each epoch.
    """
    most_tokens, most_reads, slots = int(tokens.max()), int(reads.max()), 1
    for plan in plans:
        most_tokens = max(most_tokens, int(plan.row_sums(tokens[plan.members]).max()))
        most_reads = max(most_reads, int(plan.row_sums(reads[plan.members]).max()))
        slots = max(slots, int(np.diff(plan.offsets).max()))
    length = pack.round_up(most_tokens, 64)
    return pack.RowShape(length, min(pack.round_up(most_reads, length // 8), length), slots)


def fit_rows(
    pairs: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, " all"],
    reads: Int[np.ndarray, " all"],
    shape: pack.RowShape,
) -> pack.RowPlan:
    """Pack pairs into rows of a shape, whatever their batch: from long to short, each into the first row that
    it fits. pairs: indices of these pairs. tokens, reads: numbers of tokens and targets of all pairs. shape:
    one that each of them fits.
    """
    pairs = pairs[np.argsort(-tokens[pairs], kind="stable")]
    left = np.empty((len(pairs), 3), np.int64)
    left[:] = (shape.length, shape.reads, shape.slots)
    row = np.empty(len(pairs), np.int64)
    used = 0
    for number, pair in enumerate(pairs):
        need = np.array([tokens[pair], reads[pair], 1])
        first = np.flatnonzero((left[: used + 1] >= need).all(1))[0]
        row[number] = first
        left[first] -= need
        used = max(used, int(first) + 1)
    return plan_rows(pairs, row, used)


# ---- rows of tokens


@dataclass(frozen=True)
class PairLayout:
    """The shape and packing of the microbatches of pairs.

    rows: rows of a microbatch. shape: the capacity of a row. branches: whether responses share the tokens of
    their prompt. columns: names of the columns of numbers. max_length: see Pairs. reference: the reference
    model's log-prob of each token in TokenisedRows.ids; None before they are computed.
    """

    rows: int
    shape: pack.RowShape
    branches: bool
    columns: tuple[str, ...] = ()
    max_length: int = 0
    reference: Float[np.ndarray, " tokens"] | None = None


@dataclass(frozen=True)
class BatchMeans:
    """Quantities that depend on all pairs of an optimizer batch: the weight of each pair and the mean length
    of each kind of response, in target tokens.
    """

    weights: Float[np.ndarray, " pairs"]
    lengths: Float[np.ndarray, " A"]


@dataclass(frozen=True)
class _Runs:
    """Runs of consecutive tokens, a prompt or a response each. Each field is an array [pairs of the plan,
    runs of a pair]; the run of a missing response has count 0.
    """

    start: np.ndarray  # index into TokenisedRows.ids
    count: np.ndarray
    piece: np.ndarray  # 0 the prompt, else 1 + kind
    segment: np.ndarray
    position: np.ndarray  # of the first token
    column: np.ndarray  # of the first token, in the row
    before: np.ndarray  # the column from which the run's first token is predicted: the prompt's last


def tokens_per_pair(pairs: TokenisedRows, branches: bool) -> Int[np.ndarray, " pairs"]:
    """Return each pair's tokens in a row. branches: count the prompt once, not once per response."""
    prompt, responses = pairs.counts[:, 0], pairs.counts[:, 1:]
    return responses.sum(1) + prompt * (1 if branches else (responses > 0).sum(1))


def batch_means(pairs: TokenisedRows, members: Int[np.ndarray, " n"], weighting: str) -> BatchMeans:
    """Return pair weights and mean response lengths of a batch of these members. weighting: see PairRows.

    Weights sum to 1, or are all 0 if the weight column is 0 for all members. The means leave out pairs of
    weight 0.
    """
    weights = np.zeros(len(pairs))
    weights[members] = pairs.weights[members] * (pairs.targets[members] if weighting == "token" else 1)
    lengths = pairs.reads[weights > 0]
    means = lengths.sum(0) / np.maximum((lengths > 0).sum(0), 1)
    return BatchMeans(weights / max(weights.sum(), np.finfo(np.float64).tiny), means)


def fill_pairs(pairs: TokenisedRows, plan: pack.RowPlan, layout: PairLayout, means: BatchMeans) -> Pairs:
    """Return the plan's rows as arrays [layout.rows, ...]; if the plan has fewer rows, the last are empty."""
    members = plan.members
    row = np.repeat(np.arange(plan.rows), np.diff(plan.offsets))  # of each pair
    slot = np.arange(len(members)) - np.repeat(plan.offsets[:-1], np.diff(plan.offsets))
    runs = _runs(pairs, plan, row, layout.branches)
    counts = runs.count.ravel()
    where = pack.ranges(runs.start.ravel(), counts)  # index of each token in pairs.ids

    def per_token(x: np.ndarray) -> np.ndarray:
        return np.repeat(np.broadcast_to(x, runs.count.shape).ravel(), counts)

    at = (per_token(row[:, None]), pack.ranges(runs.column.ravel(), counts))
    shape = (layout.rows, layout.shape.length)
    ids, segments, positions, branches = (np.zeros(shape, np.int32) for _ in range(4))
    ids[at] = pairs.ids[where]
    segments[at] = per_token(runs.segment)
    positions[at] = pack.ranges(runs.position.ravel(), counts)
    branches[at] = per_token(runs.piece)

    learned = pairs.learned[where].nonzero()[0]
    first = at[1] == per_token(runs.column)
    piece = per_token(runs.piece)[learned]
    answer = per_token(slot[:, None])[learned] * len(pairs.kinds) + piece - 1
    place = _count_within(np.repeat(np.arange(len(counts)), counts)[learned])
    read = np.where(first, per_token(runs.before), at[1] - 1)[learned]
    last = np.zeros((layout.rows, layout.shape.slots, len(pairs.kinds)), np.int32)  # 0: no such response
    if len(members):
        responses = runs.piece[0] > 0
        count, column = runs.count[:, responses], runs.column[:, responses]
        last[row, slot] = np.where(count > 0, column + count - 1, 0)
    return Pairs(
        ids=ids,
        segments=segments,
        positions=positions,
        **_read_arrays(pairs, layout, at[0][learned], (read, answer, place, where[learned])),
        **_slot_arrays(pairs, layout, (row, slot, members), means),
        last=last,
        branches=branches if layout.branches else None,
        kinds=pairs.kinds,
        max_length=layout.max_length,
    )


def _runs(pairs: TokenisedRows, plan: pack.RowPlan, row: np.ndarray, branches: bool) -> _Runs:
    kinds = len(pairs.kinds)
    piece = np.array([0, *range(1, kinds + 1)] if branches else [k for a in range(kinds) for k in (0, a + 1)])
    start, count = pairs.starts[plan.members][:, piece], pairs.counts[plan.members][:, piece]
    prompt = pairs.counts[plan.members, :1]
    segment = np.cumsum(np.broadcast_to(piece == 0, count.shape), axis=1)
    if not branches:  # a missing response takes no prompt and no segment
        present = pairs.counts[plan.members, 1:] > 0
        count = count * np.repeat(present, 2, axis=1)
        segment = np.repeat(np.cumsum(present, axis=1), 2, axis=1)
    tokens, segments = count.sum(1), segment[:, -1] if segment.size else np.zeros(0, np.int64)
    column = _sum_before(tokens, row)[:, None] + np.cumsum(count, axis=1) - count
    prompt_column = np.maximum.accumulate(np.where(piece == 0, column, -1), axis=1)  # of the run's prompt
    return _Runs(
        start=start,
        count=count,
        piece=np.broadcast_to(piece, count.shape),
        segment=_sum_before(segments, row)[:, None] + segment,
        position=np.where(piece == 0, 0, prompt),
        column=column,
        before=prompt_column + prompt - 1,
    )


def _sum_before(counts: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the sum of the counts before each one in the same row. row: of each count, ascending."""
    total = np.concatenate([[0], np.cumsum(counts)])
    return total[:-1] - total[np.searchsorted(row, row)]


def _count_within(groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return 0, 1, ... within each run of equal numbers; groups must not decrease."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _read_arrays(
    pairs: TokenisedRows, layout: PairLayout, row: np.ndarray, values: tuple[np.ndarray, ...]
) -> dict[str, Any]:
    """Return the fields of Pairs of shape [rows, M]. row: the row of each target.

    values: for each target the column that predicts it, its response id, its position in the response, and
    its index in pairs.ids.
    """
    column, answer, place, where = values
    shape, at = (layout.rows, layout.shape.reads), (row, _count_within(row))
    read, targets, offsets = (np.zeros(shape, np.int32) for _ in range(3))
    responses = np.full(shape, layout.shape.slots * len(pairs.kinds), np.int32)
    read[at], targets[at], responses[at], offsets[at] = column, pairs.ids[where], answer, place
    reference = None
    if layout.reference is not None:
        reference = np.zeros(shape, np.float32)
        reference[at] = layout.reference[where]
    return {
        "read": read,
        "targets": targets,
        "responses": responses,
        "offsets": offsets,
        "reference": reference,
    }


def _slot_arrays(
    pairs: TokenisedRows, layout: PairLayout, at: tuple[np.ndarray, ...], means: BatchMeans
) -> dict[str, Any]:
    """Return the fields of Pairs of shape [rows, P, ...]. at: row, slot and index of each pair."""
    row, slot, members = at
    shape = (layout.rows, layout.shape.slots)
    lengths = np.zeros((*shape, len(pairs.kinds)), np.int32)
    pair_weights = np.zeros(shape, np.float32)
    index = np.full(shape, -1, np.int32)
    columns = {name: np.zeros(shape, np.float32) for name in layout.columns}
    lengths[row, slot], index[row, slot] = pairs.reads[members], members
    pair_weights[row, slot] = means.weights[members]
    for number, name in enumerate(layout.columns):
        columns[name][row, slot] = pairs.extras[NUMBERS][members, number]
    mean_lengths = np.broadcast_to(means.lengths.astype(np.float32), lengths.shape).copy()
    return {
        "lengths": lengths, "mean_lengths": mean_lengths, "pair_weights": pair_weights, "index": index,
        "columns": columns,
    }  # fmt: skip


def pair_batch_shapes(layout: PairLayout, kinds: tuple[str, ...], micro: int, reference: bool) -> Pairs:
    """Return the shapes of batches [micro, rows, ...]. reference: with the reference model's log-probs."""

    def array(*last: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((micro, layout.rows, *last), dtype)

    ids, read, slots = array(layout.shape.length), array(layout.shape.reads), layout.shape.slots
    number, per_kind = array(slots, dtype=np.float32), array(slots, len(kinds))
    return Pairs(
        ids=ids, segments=ids, positions=ids, read=read, targets=read, responses=read, offsets=read,
        lengths=per_kind, last=per_kind, mean_lengths=array(slots, len(kinds), dtype=np.float32),
        pair_weights=number, index=array(slots),
        columns=dict.fromkeys(layout.columns, number),
        reference=array(layout.shape.reads, dtype=np.float32) if reference else None,
        branches=ids if layout.branches else None, kinds=kinds, max_length=layout.max_length,
    )  # fmt: skip


def values_by_pair(batch: Pairs, x: Float[np.ndarray, "... M"]) -> dict[int, Float[np.ndarray, " tokens"]]:
    """Return a dict from a pair's index in split.rows to the values of its target tokens: one response after
    the other, in the order of batch.kinds. x: a value, such as a log-prob, for each element of batch.read.
    """

    def flat(a: Any) -> np.ndarray:
        return np.asarray(a).reshape(-1, np.shape(a)[-1])

    slots, kinds, values = np.shape(batch.index)[-1], len(batch.kinds), {}
    rows = zip(flat(batch.responses), flat(batch.offsets), flat(x), flat(batch.index), strict=True)
    for answer, place, value, index in rows:
        order = np.lexsort((place, answer))
        bounds = np.searchsorted(answer[order] // kinds, np.arange(slots + 1))
        for slot, pair in enumerate(index):
            if pair >= 0:
                values[int(pair)] = value[order][bounds[slot] : bounds[slot + 1]]
    return values


def with_sources(batch: Pairs, names: tuple[str, ...], numbers: np.ndarray | None = None) -> Pairs:
    """Add the source of each pair to a batch, or without numbers to its shapes; unchanged without names.

    names: the names of the sources, () for a single one. numbers: the index of each pair's source, for all
    pairs of the dataset.
    """
    if not names:
        return batch
    sources = batch.index
    if numbers is not None:
        sources = np.where(batch.index < 0, 0, numbers[batch.index]).astype(np.int32)
    return replace(batch, sources=sources, source_names=names)


# ---- mismatched responses


def mismatch_responses(
    pairs: TokenisedRows, sides: tuple[Int[np.ndarray, " _"], ...], seed: int, limit: int
) -> TokenisedRows:
    """Add to each pair a response of another pair on the same side of the split. The other pair has another
    prompt or, if that is impossible for a side, other tokens. sides: the training and the held-out pairs.
    limit: the most tokens of the prompt with that response. Raises ValueError if more than half of the pairs
    on a side are equal.
    """
    donors = np.arange(len(pairs))
    prompts, everything = pairs.group_by(0), pairs.group_by(*range(1 + len(pairs.kinds)))
    for members in filter(len, sides):
        partner = derangement(prompts[members], seed)
        partner = derangement(everything[members], seed) if partner is None else partner
        if partner is None:
            raise ValueError(
                f"{pairs.names[members[0]]}: data.third=mismatched takes each pair's third response from "
                f"another pair, and more than half of these {len(members)} pairs are the same; add rows or "
                "change data.held_out"
            )
        donors[members] = members[partner]
    return with_mismatched(pairs, donors, limit)


def with_mismatched(pairs: TokenisedRows, donors: Int[np.ndarray, " pairs"], limit: int) -> TokenisedRows:
    """Add a response "mismatched" to each pair i: a response of pair donors[i], truncated to `limit` tokens
    with the prompt.

    Donors with both responses give the chosen and the rejected one in turn: KTO's reference point is a mean
    over both kinds (arXiv:2402.01306, section 4.1), as in TRL, which makes two rows of a pair.
    """
    has_response = pairs.counts[donors, 1:3] > 0
    column = 1 + has_response.argmax(1)
    both = np.flatnonzero(has_response.all(1))
    column[both] = 1 + np.arange(len(both)) % 2
    counts = np.minimum(pairs.counts[donors, column], limit - pairs.counts[:, 0])
    ends = np.where(counts < pairs.counts[donors, column], -1, pairs.ends[donors, column - 1])
    starts = np.column_stack([pairs.starts, pairs.starts[donors, column]])
    counts = np.column_stack([pairs.counts, counts])
    where, offsets = pack.ranges(starts.ravel(), counts.ravel()), np.concatenate([[0], np.cumsum(counts)])
    learned = pairs.learned[where]
    without_prompt = counts[:, 0] == 0
    learned[offsets[:-1].reshape(counts.shape)[without_prompt, -1]] = False
    bounds = np.concatenate([[0], np.cumsum(learned)])[offsets]
    hashes = np.asarray(pairs.hashes)
    digest = hashlib.sha256(pairs.digest.encode() + learned.tobytes() + donors.tobytes())
    return replace(
        pairs,
        kinds=(*pairs.kinds, "mismatched"),
        ids=Flat([pairs.ids[where]]),
        learned=Flat([learned]),
        counts=counts,
        reads=np.diff(bounds).reshape(counts.shape)[:, 1:],
        ends=np.column_stack([pairs.ends, ends]),
        hashes=Flat([np.column_stack([hashes, hashes[donors, column]])]),
        digest=digest.hexdigest(),
    )


def derangement(groups: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " n"] | None:
    """Return the index of each member's partner, which is in another group; every member is a partner once.
    None if one group has more than half of the members. groups: the group of each member.

    Members are sorted by group, then shifted by the size of the largest group, which leads out of any group.
    """
    order = pack.permutation(len(groups), seed, 4)
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
