"""A source of pairs to compare: batch k is a pure function of (rows, tokenizer, settings, k), as source.py's is for SFT."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.batch import Pairs, TrainState
from jaxft.data import pack
from jaxft.data.pairs import batches as pair_plan
from jaxft.data.pairs import layout as pair_layout
from jaxft.data.pairs import tokens as pair_store
from jaxft.data.pairs.batches import Room
from jaxft.data.pairs.formats import PairTokenSettings
from jaxft.data.pairs.layout import Layout
from jaxft.data.pairs.tokens import TokenisedPairs
from jaxft.data.settings import DataSettings
from jaxft.data.sft import RowStats
from jaxft.data.source import FixedSource, Prompt, SourceInfo, joined_names, length_percentiles
from jaxft.tree import Metrics

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("pair", "token")
LAYOUTS = ("auto", "branches", "plain")
THIRD = (None, "mismatched", "gold")
PAYS = 0.02  # the share of the tokens that branches must save to be chosen


@dataclass(frozen=True)
class PairRows(DataSettings):
    """Responses to compare: the data of a run with a preference loss or a reward model.

    All pairs of one prompt stay on one side of the split into training and held-out rows.
    format: "auto", "plain" or a name of pairs/formats.py. max_length: tokens of a prompt and one response.
    too_long: "truncate" keeps the start, "drop" leaves the pair out, "error" stops. weighting: "pair" gives every pair
    of the optimizer batch the same weight, "token" every token of its responses. weight_column: a column of numbers
    that multiply the weights. extras: columns of numbers that the loss can read. layout: "branches" stores a prompt
    once for all its responses, "plain" before each; "auto" uses branches where they save 2 % of the tokens.
    unpaired: also accept rows of one response and a label, for losses of single responses (KTO, BCO). third: a third
    response, "mismatched" (another pair's, for KTO's KL) or "gold" (column reference, for TPO). Other fields: see
    DataSettings; batch counts pairs.
    """

    format: str = "auto"
    max_length: int = 1024
    too_long: str = "truncate"
    weighting: str = "pair"
    weight_column: str | None = None
    extras: tuple[str, ...] = ()
    layout: str = "auto"
    unpaired: bool = False
    third: str | None = None
    unit: ClassVar[str] = "pairs"
    packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices: tuple[tuple[str, tuple], ...] = (
            ("too_long", TOO_LONG), ("weighting", WEIGHTING), ("layout", LAYOUTS), ("third", THIRD),
        )  # fmt: skip
        for name, known in choices:
            self.require_choice(name, known)
        self.require_at_least(2, "max_length")
        if len(set(self.extras)) < len(self.extras):
            raise ValueError(f"data.extras={','.join(self.extras)} names a column twice; name each once")

    @property
    def token_settings(self) -> PairTokenSettings:
        """The settings that decide the tokens of a pair."""
        kinds = ("chosen", "rejected", "gold") if self.third == "gold" else ("chosen", "rejected")
        return PairTokenSettings(
            self.columns, self.format, self.max_length, self.too_long, self.date, self.extras,
            self.weight_column, kinds,
        )  # fmt: skip

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of responses in a pair."""
        read = self.token_settings.kinds
        return (*read, "mismatched") if self.third == "mismatched" else read

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "PairSource":
        """Read, tokenise (or load from the cache) and plan the batches; see Dataset.open.

        A microbatch has `shards` rows. They, data.micro and data.layout change neither which pairs a step sees nor the
        fingerprint.
        """
        count = _row_count(self, shards)
        pool, train, held = _split(self, tokenizer, cache)
        _check_both(self, pool)
        if self.third == "mismatched":
            pool = _mismatched(self, pool, (train, held))
        joined = pair_layout.tokens_of(
            pool, True
        )  # also with a plain layout: the order must not depend on it

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return _filled(train, pair_plan.batches(joined[train], self.batch, self.seed, epoch))

        apart = pair_layout.tokens_of(pool, False)
        saved = float(1 - joined[train].sum() / apart[train].sum())
        branches = self.layout == "branches" or (self.layout == "auto" and saved >= PAYS)
        tokens = joined if branches else apart
        epochs = range(math.ceil(self.epochs))
        room = _room(pool, tokens, [pair_plan.deal(order(epoch), tokens, count) for epoch in epochs], count)
        layout = Layout(shards, room, branches, self.extras)
        pairs = PreparedPairs(self, pool, train, held, count, layout, order)
        info = SourceInfo(
            steps=self.total_steps(len(order(0))),
            steps_per_epoch=len(order(0)),
            fingerprint=_fingerprint(pairs),
            preview=_preview(pool, int(train.min()), tokenizer),
            stats=_stats(pairs, saved),
        )
        return _source(info, pairs)

    def abstract(self, shards: int = 1, reference: bool = False) -> Pairs:
        """Return the shapes of the largest batch that the settings allow: equally full rows, all responses max_length long.

        reference: with the reference's log-probs.
        """
        count = _row_count(self, shards)
        length = _rounded(-(-self.batch // count) * len(self.kinds) * self.max_length, 64)
        room = Room(length, length, self.batch - count + 1)
        layout = Layout(shards, room, self.layout != "plain", self.extras)
        return pair_layout.abstract(layout, self.kinds, self.micro, reference)


@dataclass(frozen=True)
class PairStats(RowStats):
    """Counts of tokenised pairs.

    prompt_end_moved: pairs where a token spans the end of the prompt. chosen_longer: fraction of the pairs whose chosen
    response is the longer one. shared_prompts_save: fraction of the tokens that the layout "branches" saves.
    """

    layout: str
    pairs_per_row: int
    prompt_end_moved: int
    chosen_longer: float
    shared_prompts_save: float


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs, which are trained on and which held out, their rows, and the order of the batches.

    row_count: rows of all microbatches together. order: the pairs of each batch of an epoch.
    """

    settings: PairRows
    pool: TokenisedPairs
    train: np.ndarray
    held: np.ndarray
    row_count: int
    layout: Layout
    order: Callable[[int], np.ndarray]

    @cached_property
    def tokens(self) -> Int[np.ndarray, " pairs"]:
        """Tokens that each pair takes in a row."""
        return pair_layout.tokens_of(self.pool, self.layout.branches)


@dataclass(frozen=True)
class PairSource(FixedSource[Pairs]):
    """Batches of Pairs; see Source. keys: a hash of each pair's tokens, trained on or held out."""

    pairs: PreparedPairs
    keys: tuple[str, ...]

    def batch(self, step: int, state: TrainState | None = None) -> tuple[Pairs, Metrics]:
        """Return the batch of a step and no metrics."""
        rows, pool, layout = self.pairs.settings, self.pairs.pool, self.pairs.layout
        part = self._rows_of(step)
        weights, means = _shares(rows, pool, part.members)
        whole = replace(layout, rows=self.pairs.row_count)
        flat = pair_layout.fill(pool, part, whole, weights[part.members], means)
        return jax.tree.map(lambda x: x.reshape(rows.micro, layout.rows, *x.shape[1:]), flat), {}

    def row_names(self, step: int) -> list[str]:
        """Return the names of the pairs in each row of a batch, the rows of all microbatches one after the other."""
        part = self._rows_of(step)
        names = [joined_names(self.pairs.pool.names, part.slice(r, r + 1).members) for r in range(part.rows)]
        while not names[-1]:  # the last rows of a batch with fewer pairs
            names.pop()
        return names

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts with their chosen response."""
        found: list[Prompt] = []
        for batch in self.held_out:
            for row in range(batch.ids.shape[1]):
                found += _prompts(batch, row, count - len(found))
        return found

    def cover(self, indices: Sequence[int]) -> tuple[Pairs, ...]:
        """Return evaluation batches of these pairs in the shape of the held-out ones. Their weights sum to 1."""
        return _cover(self.pairs, np.asarray(indices, np.int64))

    def values(self, batch: Pairs, x: Float[np.ndarray, "... M"]) -> dict[int, Float[np.ndarray, " tokens"]]:
        """Return numbers at the read positions of a batch by pair, in order of kind and place."""
        return pair_layout.values(batch, x)

    def with_reference(self, logps: dict[int, Float[np.ndarray, " tokens"]]) -> "PairSource":
        """Return this source with the reference's log-probs in its batches, one array for every pair."""
        return _source(self.info, replace(self.pairs, pool=_with_reference(self.pairs.pool, logps)))

    def _rows_of(self, step: int) -> pack.Plan:
        """Return the plan of the rows of one step."""
        pairs = self.pairs
        epoch, k = divmod(step, int(self.info.steps_per_epoch))
        (members,), (row,) = pair_plan.deal(pairs.order(epoch)[k : k + 1], pairs.tokens, pairs.row_count)
        return pair_plan.row_plan(members, row, pairs.row_count)


def _source(info: SourceInfo, pairs: PreparedPairs) -> PairSource:
    pool, micro = pairs.pool, pairs.settings.micro
    shapes = pair_layout.abstract(pairs.layout, pool.kinds, micro, pool.reference is not None)
    return PairSource(info, (shapes,), _cover(pairs, pairs.held), pairs, pool.keys())


def _prompts(batch: Pairs, row: int, count: int) -> list[Prompt]:
    """Return up to `count` prompts of a row with their chosen response."""
    found = []
    kinds = len(batch.kinds)
    for slot in np.flatnonzero(batch.pair_weights[0, row] > 0)[:count]:
        where = np.flatnonzero(batch.answers[0, row] == slot * kinds + batch.kinds.index("chosen"))
        if not len(where):
            continue
        last = batch.read[0, row, where[0]]
        inside = np.flatnonzero(batch.segments[0, row] == batch.segments[0, row, last])
        prompt = batch.ids[0, row, inside[0] : last + 1].tolist()
        found.append(Prompt(prompt, batch.targets[0, row, where].tolist()))
    return found


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
    pool = pair_store.tokenised_pairs(rows.train, rows.token_settings, tokenizer, cache)
    count = len(pool.names)
    everything = np.arange(count)
    if not rows.holds_out:
        return pool, everything, everything[:0]
    if isinstance(rows.held_out, str):
        held = pair_store.tokenised_pairs(rows.held_out, rows.token_settings, tokenizer, cache)
        return pair_store.join(pool, held), everything, count + np.arange(len(held.names))
    if count < 2:
        raise ValueError(
            f"{rows.train}: one pair can't be split by data.held_out={rows.held_out}; set data.held_out=none"
        )
    prompts = pool.same(0)
    if not prompts.any():  # all pairs have one prompt
        prompts = everything
    least = 2 if rows.third == "mismatched" else 1
    share = rows.held_out_count(count, least)
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


def _cover(pairs: PreparedPairs, members: np.ndarray) -> tuple[Pairs, ...]:
    pool, layout = pairs.pool, pairs.layout
    if len(members) and (members.min() < 0 or members.max() >= len(pool.names)):
        raise ValueError(
            f"got pairs {members.min()} to {members.max()}, the source has 0 to {len(pool.names) - 1}; "
            "pass indices of this source"
        )
    plan = pair_plan.fit(members, pairs.tokens, pool.reads.sum(1), layout.room)
    weights, means = _shares(pairs.settings, pool, members)
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


# ---- fingerprint, preview and statistics


def _fingerprint(pairs: PreparedPairs) -> str:
    """Hash all that decides the sum over a batch; not how it is divided into microbatches, rows and segments."""
    rows, pool = pairs.settings, pairs.pool
    digest = hashlib.sha256(repr((rows.batch, rows.seed, rows.weighting, pool.kinds, rows.extras)).encode())
    tokens = (pool.ids, pool.learned, pool.offsets, pool.numbers, pool.weights)
    for array in (*tokens, pairs.train, pairs.held, pairs.order(0)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def _preview(pool: TokenisedPairs, pair: int, tokenizer: Any) -> str:
    names = ("prompt", *pool.kinds)
    lines = [
        f"{name}: {tokenizer.decode(pool.piece(pair, number), skip_special_tokens=False)}"
        for number, name in enumerate(names)
        if name == "prompt" or pool.counts[pair, number]
    ]
    moved = int(pool.moved.sum())
    if moved:
        lines.append(
            f"in {moved} of {len(pool.moved)} pairs the response does not begin where the prompt ends: "
            "a token spans the border"
        )
    return "\n".join(lines)


def _stats(pairs: PreparedPairs, saved: float) -> PairStats:
    """Count pairs, rows and tokens. saved: the fraction of the tokens that branches save."""
    pool, room = pairs.pool, pairs.layout.room
    lengths, reads = pairs.tokens[pairs.train], pool.reads[pairs.train]
    total, rows, truncated = int(lengths.sum()), len(pairs.order(0)) * pairs.row_count, int(pool.cut.sum())
    fill = total / (rows * room.length)
    paired = reads[(reads[:, :2] > 0).all(1)]
    return PairStats(
        examples=len(pairs.train),
        held_out=len(pairs.held),
        dropped=pool.dropped,
        largest_id=int(pool.ids.max()),
        summary=f"{len(pairs.train)} pairs in {rows} rows of {room.length} tokens ({100 * fill:.0f} % full), "
        f"{len(pairs.held)} held out, {pool.dropped} dropped, {truncated} truncated",
        truncated=truncated,
        tokens=total,
        learned_tokens=int(reads.sum()),
        lengths=length_percentiles(lengths),
        rows=rows,
        fill=fill,
        row_length=room.length,
        read_length=room.reads,
        cache=pool.cache,
        layout="branches" if pairs.layout.branches else "plain",
        pairs_per_row=room.slots,
        prompt_end_moved=int(pool.moved.sum()),
        chosen_longer=float((paired[:, 0] > paired[:, 1]).mean()) if len(paired) else 0.0,
        shared_prompts_save=saved,
    )
