"""A source of pairs to compare: batch k is a pure function of (rows, tokenizer, settings, k), as source.py's is for SFT."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxft.batch import Pairs
from jaxft.data import chat, pack
from jaxft.data.pairs import batches as pair_plan
from jaxft.data.pairs import layout as pair_layout
from jaxft.data.pairs import tokens as pair_store
from jaxft.data.pairs.batches import Room
from jaxft.data.pairs.formats import kinds_of
from jaxft.data.pairs.layout import Layout
from jaxft.data.pairs.tokens import TokenisedPairs

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("pair", "token")
LAYOUTS = ("auto", "branches", "plain")
THIRD = (None, "mismatched", "gold")
PAYS = 0.02  # the share of the tokens that branches must save to be chosen


@dataclass(frozen=True)
class PairRows:
    """Which answers to compare and how they become batches.

    train: file, folder or hub dataset (see rows.py); held_out: a share of the rows, or a place of its own, or "none". All pairs
    of one prompt stay on one side of the split.
    columns: "ours=theirs" renames; format: "auto", "plain" or a name of pair_formats.FORMS.
    max_length: tokens of a prompt and one answer; too_long: "truncate" keeps the start, "drop" leaves the pair out, or "error".
    batch: pairs an optimizer step; micro: microbatches it is computed in.
    weighting: "pair" gives every pair of the optimizer batch the same weight, "token" every token of its answers.
    weight_column: a column of numbers that multiply the weights. extras: columns of numbers that the loss gets to see.
    layout: "branches" stores a prompt once for all its answers, "plain" before each; "auto" takes branches where they save 2 %.
    unpaired: rows of one answer and a label are taken too, for losses of single answers (KTO, BCO).
    third: a further answer, "mismatched" (another pair's, for KTO's KL) or "gold" (column reference, for TPO).
    epochs: passes over the pairs, fractions allowed; seed: of the split and the order.
    date: what a chat template that prints today's date prints.
    """

    train: str
    held_out: str | float | None = 0.05
    columns: tuple[str, ...] = ()
    format: str = "auto"
    max_length: int = 1024
    too_long: str = "truncate"
    batch: int = 8
    micro: int = 1
    weighting: str = "pair"
    weight_column: str | None = None
    extras: tuple[str, ...] = ()
    layout: str = "auto"
    unpaired: bool = False
    third: str | None = None
    seed: int = 0
    epochs: float = 1.0
    date: str = chat.DATE

    def __post_init__(self):
        choices: tuple[tuple[str, tuple], ...] = (
            ("too_long", TOO_LONG), ("weighting", WEIGHTING), ("layout", LAYOUTS), ("third", THIRD),
        )  # fmt: skip
        for name, wanted in choices:
            if getattr(self, name) not in wanted:
                raise ValueError(
                    f"data.{name}={getattr(self, name)!r}; wanted one of {', '.join(map(str, wanted)).lower()}"
                )
        for name, least in (("max_length", 2), ("batch", 1), ("micro", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}; wanted at least {least}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"data.epochs={self.epochs}; wanted a number above 0")
        if isinstance(self.held_out, int | float) and not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out}; wanted a share from 0 up to 1, a file or none")
        if len(set(self.extras)) < len(self.extras):
            raise ValueError(f"data.extras={','.join(self.extras)} names a column twice")

    def abstract(self, shards: int = 1) -> Pairs:
        """Shapes of the largest batch that the settings allow, without the rows at hand."""
        return abstract_pairs(self, shards)


@dataclass(frozen=True)
class PairSource:
    """Batches by number. Arrays of a batch are [micro, rows, ...], those held out [1, rows, ...], rows one of each shard.

    batch(step, state=None) is pure; names(step) names the pairs of each row of that batch, rows of all microbatches one after
    the other. pair_weights of one batch sum to 1, and those of all held-out batches together.

    pairs: how many there are, trained on or held out; keys: a hash of each one's tokens. cover(indices): evaluation batches of
    those pairs, shaped as the held-out ones, whose weights sum to 1. values(batch, x): numbers at the read positions by pair, in
    order of kind and place. with_reference(values): this source with the reference's log-probs, one such array for every pair.
    """

    steps: int
    steps_per_epoch: int
    fingerprint: str
    abstract: Pairs
    batch: Callable[..., Pairs]
    held_out: tuple[Pairs, ...]
    names: Callable[[int], list[str]]
    preview: str
    stats: dict[str, Any]
    pairs: int
    keys: tuple[str, ...]
    cover: Callable[[Sequence[int]], tuple[Pairs, ...]]
    values: Callable[[Pairs, Any], dict[int, Float[np.ndarray, " tokens"]]]
    with_reference: Callable[[dict[int, Any]], "PairSource"]


@dataclass(frozen=True)
class _Work:
    """What a source is made of: the pairs, which are trained on and which held out, the rows and their shape."""

    rows: PairRows
    pool: TokenisedPairs
    train: np.ndarray
    held: np.ndarray
    count: int  # rows of all microbatches
    layout: Layout
    order: Callable[[int], np.ndarray]  # the batches of an epoch


def abstract_pairs(rows: PairRows, shards: int = 1, reference: bool = False) -> Pairs:
    """Shapes of the largest batch that the settings allow: every answer as long as max_length, the rows equally full."""
    count = _row_count(rows, shards)
    kinds = (*kinds_of(rows), "mismatched") if rows.third == "mismatched" else kinds_of(rows)
    length = _rounded(-(-rows.batch // count) * len(kinds) * rows.max_length, 64)
    layout = Layout(shards, Room(length, length, rows.batch - count + 1), rows.layout != "plain", rows.extras)
    return pair_layout.abstract(layout, kinds, rows.micro, reference)


def pair_source(
    rows: PairRows,
    tokenizer: Any,
    cache: Path | None = None,
    process: tuple[int, int] = (0, 1),
    shards: int = 1,
) -> PairSource:
    """Read, tokenise (or find in the cache) and plan; see PairRows and PairSource.

    shards: rows of a microbatch, as many as the mesh cuts it into. They, data.micro and data.layout change neither which pairs a
    step sees nor the fingerprint. Every process builds the same global batch, so `process` (index, count) changes nothing yet.
    Raises ValueError or FileNotFoundError in one line that names the row where a row is at fault.
    """
    count = _row_count(rows, shards)
    if not 0 <= process[0] < process[1]:
        raise ValueError(f"process {process[0]} of {process[1]}: wanted 0 <= index < count")
    pool, train, held = _split(rows, tokenizer, cache)
    _check_both(rows, pool)
    if rows.third == "mismatched":
        pool = _mismatched(rows, pool, (train, held))
    joined = pair_layout.tokens_of(
        pool, True
    )  # of both layouts the same, so that the layout doesn't change the order
    order = lru_cache(maxsize=2)(
        lambda epoch: _filled(train, pair_plan.batches(joined[train], rows.batch, rows.seed, epoch))
    )
    apart = pair_layout.tokens_of(pool, False)
    saved = 1 - joined[train].sum() / apart[train].sum()
    branches = rows.layout == "branches" or (rows.layout == "auto" and saved >= PAYS)
    tokens = joined if branches else apart
    epochs = range(math.ceil(rows.epochs))
    room = _room(pool, tokens, [pair_plan.deal(order(epoch), tokens, count) for epoch in epochs], count)
    work = _Work(rows, pool, train, held, count, Layout(shards, room, branches, rows.extras), order)
    return _source(work, {"shared_prompts_save": float(saved)}, tokenizer)


def _source(work: _Work, told: dict[str, Any], tokenizer: Any) -> PairSource:
    rows, pool, layout = work.rows, work.pool, work.layout
    tokens = pair_layout.tokens_of(pool, layout.branches)
    per_epoch = len(work.order(0))

    def cut(step: int) -> pack.Plan:
        epoch, k = divmod(step, per_epoch)
        (members,), (row,) = pair_plan.deal(work.order(epoch)[k : k + 1], tokens, work.count)
        return pair_plan.row_plan(members, row, work.count)

    def batch(step: int, state: Any = None) -> Pairs:
        part = cut(step)
        weights, means = _shares(rows, pool, part.members)
        flat = pair_layout.fill(pool, part, replace(layout, rows=work.count), weights[part.members], means)
        return jax.tree.map(lambda x: x.reshape(rows.micro, layout.rows, *x.shape[1:]), flat)

    def names(step: int) -> list[str]:
        part = cut(step)
        each = [", ".join(pool.names[i] for i in part.slice(r, r + 1).members) for r in range(part.rows)]
        return each[
            : len(each) - next(i for i, name in enumerate(reversed(each)) if name)
        ]  # a short batch's rows at the end

    return PairSource(
        steps=max(1, math.ceil(rows.epochs * per_epoch - 1e-9)),
        steps_per_epoch=per_epoch,
        fingerprint=_fingerprint(work),
        abstract=pair_layout.abstract(layout, pool.kinds, rows.micro, pool.reference is not None),
        batch=batch,
        held_out=_cover(work, work.held),
        names=names,
        preview=_preview(pool, int(work.train.min()), tokenizer),
        stats={**_stats(work, tokens), **told},
        pairs=len(pool.names),
        keys=pool.keys(),
        cover=lambda indices: _cover(work, np.asarray(indices, np.int64)),
        values=pair_layout.values,
        with_reference=lambda found: _source(
            replace(work, pool=_with_reference(pool, found)), told, tokenizer
        ),
    )


def _check_both(rows: PairRows, pool: TokenisedPairs) -> None:
    """Raise ValueError, naming the first, for answers without another one to compare with, unless they are asked for."""
    alone = np.flatnonzero((pool.reads[:, :2] == 0).any(1))
    if len(alone) and not rows.unpaired:
        raise ValueError(
            f"{pool.names[alone[0]]}: one answer with a label ({len(alone)} such rows), and this run compares two; use "
            "configs/kto.py, or data.unpaired=true with another loss of single answers"
        )


def _row_count(rows: PairRows, shards: int) -> int:
    count = rows.micro * shards
    if rows.batch < count:
        raise ValueError(
            f"data.batch={rows.batch} pairs do not fill data.micro={rows.micro} microbatches of {shards} rows; "
            f"use a batch of at least {count} or a smaller micro"
        )
    return count


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step


# ---- who is trained on


def _split(
    rows: PairRows, tokenizer: Any, cache: Path | None
) -> tuple[TokenisedPairs, np.ndarray, np.ndarray]:
    pool = pair_store.tokenised_pairs(rows.train, rows, tokenizer, cache)
    count = len(pool.names)
    everything = np.arange(count)
    if rows.held_out in (None, "none", 0):
        return pool, everything, everything[:0]
    if isinstance(rows.held_out, str):
        held = pair_store.tokenised_pairs(rows.held_out, rows, tokenizer, cache)
        return pair_store.join(pool, held), everything, count + np.arange(len(held.names))
    if count < 2:
        raise ValueError(
            f"{rows.train}: one pair can't be split by data.held_out={rows.held_out}; set data.held_out=none"
        )
    prompts = pool.same(0)
    if not prompts.any():  # all pairs have one prompt
        prompts = everything
    least = 2 if rows.third == "mismatched" else 1
    share = min(max(least, round(rows.held_out * count)), count - 1)
    shuffled = prompts[pack.permutation(count, rows.seed, 0)]
    distinct = shuffled[np.sort(np.unique(shuffled, return_index=True)[1])]
    sizes = np.bincount(prompts)[distinct]
    some = distinct[:-1][(np.cumsum(sizes) - sizes < share)[:-1]]
    chosen = np.isin(prompts, some)
    return pool, everything[~chosen], everything[chosen]


def _mismatched(rows: PairRows, pool: TokenisedPairs, split: tuple[np.ndarray, ...]) -> TokenisedPairs:
    """Every pair with an answer of another one of its side of the split: of another prompt, or of another answer at least."""
    donors = np.arange(len(pool.names))
    prompts, both = pool.same(0), pool.same(*range(1 + len(pool.kinds)))
    for members in filter(len, split):
        partner = pair_plan.derangement(prompts[members], rows.seed)
        partner = pair_plan.derangement(both[members], rows.seed) if partner is None else partner
        if partner is None:
            raise ValueError(
                f"{pool.names[members[0]]}: data.third=mismatched takes each pair's third answer from another pair, and more "
                f"than half of {len(members)} are the same; add rows, or change data.held_out"
            )
        donors[members] = members[partner]
    return pair_store.with_mismatched(pool, donors, rows.max_length)


def _filled(train: np.ndarray, batches: np.ndarray) -> np.ndarray:
    return np.where(batches < 0, -1, train[batches])


def _room(
    pool: TokenisedPairs, tokens: np.ndarray, dealt: list[tuple[np.ndarray, np.ndarray]], rows: int
) -> Room:
    """What the fullest row of any batch holds, rounded up so that similar data share a program; any pair alone fits too."""
    reads = pool.reads.sum(1)
    ones = np.ones_like(reads)
    most = lambda x: max(pair_plan.most(row, x[members], rows) for members, row in dealt)  # noqa: E731
    length = _rounded(max(most(tokens), int(tokens.max())), 64)
    return Room(length, min(_rounded(max(most(reads), int(reads.max())), length // 8), length), most(ones))


# ---- batches


def _shares(rows: PairRows, pool: TokenisedPairs, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight of each pair of the pool in a batch of these members, mean length of each kind of answer among them).

    Weights sum to 1, or are all 0 where the column's are. A pair of weight 0 doesn't count for the mean lengths either.
    """
    weights = np.zeros(len(pool.names))
    weights[members] = pool.weights[members] * (
        pool.reads[members].sum(1) if rows.weighting == "token" else 1
    )
    lengths = pool.reads[weights > 0]
    means = lengths.sum(0) / np.maximum((lengths > 0).sum(0), 1)
    return weights / max(weights.sum(), np.finfo(np.float64).tiny), means


def _cover(work: _Work, members: np.ndarray) -> tuple[Pairs, ...]:
    pool, layout = work.pool, work.layout
    if len(members) and (members.min() < 0 or members.max() >= len(pool.names)):
        raise ValueError(
            f"pairs {members.min()} to {members.max()} asked for; the source has 0 to {len(pool.names) - 1}"
        )
    plan = pair_plan.fit(
        members, pair_layout.tokens_of(pool, layout.branches), pool.reads.sum(1), layout.room
    )
    weights, means = _shares(work.rows, pool, members)
    parts = [plan.slice(start, start + layout.rows) for start in range(0, plan.rows, layout.rows)]
    filled = (pair_layout.fill(pool, part, layout, weights[part.members], means) for part in parts)
    return tuple(jax.tree.map(lambda x: x[None], batch) for batch in filled)


def _with_reference(pool: TokenisedPairs, found: dict[int, Any]) -> TokenisedPairs:
    count, wanted = len(pool.names), pool.reads.sum(1)
    missing = [pool.names[i] for i in range(count) if i not in found]
    if missing:
        raise ValueError(
            f"reference log-probs: {len(missing)} of {count} pairs lack them, first {missing[0]}; compute all"
        )
    for i, name in enumerate(pool.names):
        if len(found[i]) != wanted[i] or not np.isfinite(found[i]).all():
            raise ValueError(
                f"reference log-probs of {name}: found {len(found[i])}, wanted {wanted[i]} finite numbers"
            )
    reference = np.zeros(len(pool.ids), np.float32)
    reference[pool.learned] = np.concatenate([found[i] for i in range(count)])
    return replace(pool, reference=reference)


# ---- what is told of it


def _fingerprint(work: _Work) -> str:
    """A hash of all that decides the sum over a batch; not of how that sum is cut into microbatches, rows and segments."""
    rows, pool = work.rows, work.pool
    digest = hashlib.sha256(repr((rows.batch, rows.seed, rows.weighting, pool.kinds, rows.extras)).encode())
    for array in (
        pool.ids,
        pool.learned,
        pool.offsets,
        pool.numbers,
        pool.weights,
        work.train,
        work.held,
        work.order(0),
    ):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def _preview(pool: TokenisedPairs, pair: int, tokenizer: Any) -> str:
    names = ("prompt", *pool.kinds)
    shown = [
        f"{name}: {tokenizer.decode(pool.piece(pair, number), skip_special_tokens=False)}"
        for number, name in enumerate(names)
        if name == "prompt" or pool.counts[pair, number]
    ]
    moved = int(pool.moved.sum())
    note = f"in {moved} of {len(pool.moved)} pairs the answer begins elsewhere than the prompt ends; a token spans the border"
    return "\n".join([*shown, *([note] if moved else [])])


def _stats(work: _Work, tokens: np.ndarray) -> dict[str, Any]:
    pool, room, per_epoch = work.pool, work.layout.room, len(work.order(0))
    lengths, reads = tokens[work.train], pool.reads[work.train]
    total, learned, rows = int(lengths.sum()), int(reads.sum()), per_epoch * work.count
    percentiles = zip(
        ("min", "p10", "p50", "p90", "p99", "max"),
        np.percentile(lengths, (0, 10, 50, 90, 99, 100)),
        strict=True,
    )
    paired = reads[(reads[:, :2] > 0).all(1)]
    return {
        "examples": len(work.train),
        "held_out": len(work.held),
        "dropped": pool.dropped,
        "truncated": int(pool.cut.sum()),
        "tokens": total,
        "learned_tokens": learned,
        "learned_share": learned / total,
        "lengths": {name: round(float(value), 1) for name, value in percentiles},
        "rows": rows,
        "fill": total / (rows * room.length),
        "row_length": room.length,
        "read_length": room.reads,
        "steps_per_epoch": per_epoch,
        "largest_id": int(pool.ids.max()),
        "cache": pool.cache,
        "layout": "branches" if work.layout.branches else "plain",
        "pairs_a_row": room.slots,
        "prompt_end_moved": int(pool.moved.sum()),
        "chosen_longer": float((paired[:, 0] > paired[:, 1]).mean()) if len(paired) else 0.0,
    }
