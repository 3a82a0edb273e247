"""SFT rows as batches: batch k is a pure function of (rows, tokenizer, settings, k), so one integer resumes it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jaxft.batch import Tokens, TrainState
from jaxft.data import cache as store
from jaxft.data import chat, pack
from jaxft.data.cache import Tokenised, TokenSettings
from jaxft.data.settings import DataSettings
from jaxft.data.source import FixedSource, Prompt, SourceInfo, SourceStats, joined_names, length_percentiles
from jaxft.tree import Metrics

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("token", "sequence")


@dataclass(frozen=True)
class Rows(DataSettings):
    """Documents, prompts with completions, or conversations for next-token prediction: the data of an SFT run.

    format: "auto" or a name of formats.FORMATS. loss_on: "completion" (the last response), "assistant" (every
    assistant turn) or "all"; text rows are learned whole. max_length: tokens of a row. too_long: "truncate" keeps the
    start, "drop" leaves the example out, "error" stops. packing: several examples share a row of max_length tokens
    and do not attend to one another. weighting: "token" gives every learned token of the optimizer batch the same
    weight, "sequence" every example. Other fields: see DataSettings; batch counts packed rows, or examples without
    packing.
    """

    format: str = "auto"
    loss_on: str = "completion"
    max_length: int = 1024
    too_long: str = "truncate"
    packing: bool = True
    weighting: str = "token"
    unit: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("loss_on", chat.LOSS_ON), ("too_long", TOO_LONG), ("weighting", WEIGHTING)):
            self.require_choice(name, choices)
        self.require_at_least(2, "max_length")

    @property
    def token_settings(self) -> TokenSettings:
        """The settings that decide the tokens of a row."""
        return TokenSettings(
            self.columns, self.format, self.loss_on, self.max_length, self.too_long, self.date
        )

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "RowSource":
        """Read, tokenise (or load from the cache) and plan the batches; see Dataset.open.

        Where `shards` does not divide the rows of a microbatch, empty rows are added; they change no result.
        """
        row_count = _rows_per_microbatch(self, shards)
        pool, train, held = _split(self, tokenizer, cache)
        longest = max(pool.lengths[train].max(), pool.lengths[held].max(initial=0))
        size = self.max_length if self.packing else min(self.max_length, -(-int(longest) // 64) * 64)
        plan = lru_cache(maxsize=2)(lambda epoch: _plan(self, pool, train, size, epoch))
        held_plan = _plan(self, pool, held, size, 0)
        reads = _read_length(pool, (plan(0), held_plan), size)
        per_epoch = -(-plan(0).rows // self.batch)
        first = pool.ids[slice(*pool.offsets[train.min() :][:2])]
        info = SourceInfo(
            steps=self.total_steps(per_epoch),
            steps_per_epoch=per_epoch,
            fingerprint=_fingerprint(self, pool, (plan(0), held_plan), (self.batch, size, reads)),
            preview=tokenizer.decode(first, skip_special_tokens=False),
            stats=_stats(pool, (train, held), plan(0), (size, reads)),
        )
        shapes = _shapes(self, (row_count, size, reads))
        held_out = _held_out(pool, held_plan, (row_count, size, reads))
        held_out = tuple(replace(batch, packed=self.packing) for batch in held_out)
        return RowSource(info, (shapes,), held_out, self, pool, plan)

    def abstract(self, shards: int = 1) -> Tokens:
        """Return the shapes of the largest batch that the settings allow: T = M = max_length."""
        return _shapes(self, (_rows_per_microbatch(self, shards), self.max_length, self.max_length))


@dataclass(frozen=True)
class RowStats(SourceStats):
    """Counts of tokenised rows: rows of an epoch's batches, their size, and the lengths of the training examples."""

    truncated: int
    tokens: int
    learned_tokens: int
    lengths: dict[str, float]
    rows: int
    fill: float
    row_length: int
    read_length: int
    cache: str


@dataclass(frozen=True)
class RowSource(FixedSource[Tokens]):
    """Batches of Tokens; see Source. plan: which examples share a row, by epoch."""

    settings: Rows
    pool: Tokenised
    plan: Callable[[int], pack.Plan]

    def batch(self, step: int, state: TrainState | None = None) -> tuple[Tokens, Metrics]:
        """Return the batch of a step and no metrics."""
        rows, part = self.settings, self._rows_of(step)
        _, row_count, size = self.shapes[0].ids.shape
        shape = (rows.batch, size, self.shapes[0].read.shape[-1])
        flat = _fill(self.pool, part, shape, _weights(self.pool, part.members, rows.weighting))
        flat = replace(flat, packed=rows.packing)

        def split(x: np.ndarray) -> np.ndarray:
            grid = x.reshape(rows.micro, rows.batch // rows.micro, x.shape[-1])
            return np.pad(grid, ((0, 0), (0, row_count - grid.shape[1]), (0, 0)))

        return jax.tree.map(split, flat), {}

    def row_names(self, step: int) -> list[str]:
        """Return the names of the examples in each row of a batch."""
        part = self._rows_of(step)
        return [joined_names(self.pool.names, part.slice(r, r + 1).members) for r in range(part.rows)]

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts; a response begins at its first token with a loss."""
        found: list[Prompt] = []
        for batch in self.held_out:
            for row in range(batch.ids.shape[1]):
                ids, segments = batch.ids[0, row], batch.segments[0, row]
                reads = batch.read[0, row][batch.token_weights[0, row] > 0]
                for segment in range(1, int(segments.max(initial=0)) + 1):
                    inside = np.flatnonzero(segments == segment)
                    first = reads[segments[reads] == segment].min() + 1
                    if len(found) < count and first > inside[0]:
                        response = ids[first : inside[-1] + 1].tolist()
                        found.append(Prompt(ids[inside[0] : first].tolist(), response))
        return found

    def _rows_of(self, step: int) -> pack.Plan:
        """Return the plan of the rows of one step."""
        epoch, k = divmod(step, int(self.info.steps_per_epoch))
        return self.plan(epoch).slice(k * self.settings.batch, (k + 1) * self.settings.batch)


def _shapes(rows: Rows, shape: tuple[int, int, int]) -> Tokens:
    """Return the shapes of a batch. shape: rows of a microbatch, T, M."""
    row_count, length, reads = shape

    def array(last: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows.micro, row_count, last), dtype)

    ids, read = array(length, np.int32), array(reads, np.int32)
    return Tokens(ids, ids, ids, read, read, array(reads, np.float32), packed=rows.packing)


def _rows_per_microbatch(rows: Rows, shards: int) -> int:
    """Return the rows of a microbatch, with the empty ones that are added for the mesh."""
    if rows.batch % rows.micro:
        fits = ", ".join(str(m) for m in range(1, rows.batch + 1) if rows.batch % m == 0)
        raise ValueError(
            f"data.batch={rows.batch} is not divisible by data.micro={rows.micro} microbatches; "
            f"use a data.micro of {fits}"
        )
    return -(-rows.batch // (rows.micro * shards)) * shards


def _split(rows: Rows, tokenizer: Any, cache: Path | None) -> tuple[Tokenised, np.ndarray, np.ndarray]:
    """Return all examples and the indices of the training and the held-out ones."""
    pool = store.tokenised(rows.train, rows.token_settings, tokenizer, cache)
    count = len(pool.names)
    everything = np.arange(count)
    if not rows.holds_out:
        return pool, everything, everything[:0]
    if isinstance(rows.held_out, str):
        held = store.tokenised(rows.held_out, rows.token_settings, tokenizer, cache)
        return store.join(pool, held), everything, count + np.arange(len(held.names))
    if count < 2:
        raise ValueError(
            f"{rows.train}: data.held_out={rows.held_out} cannot split a single row; set data.held_out=none"
        )
    held_count = rows.held_out_count(count)
    order = pack.permutation(count, rows.seed, 0)
    return pool, np.sort(order[held_count:]), np.sort(order[:held_count])


def _plan(rows: Rows, pool: Tokenised, chosen: np.ndarray, size: int, epoch: int) -> pack.Plan:
    if not len(chosen):
        return pack.Plan(chosen, np.zeros(1, np.int64))
    if rows.packing:
        plan = pack.packed(pool.lengths[chosen], pool.reads[chosen], size, rows.seed, epoch)
    else:
        plan = pack.unpacked(len(chosen), rows.seed, epoch)
    return pack.Plan(chosen[plan.members], plan.offsets)


def _read_length(pool: Tokenised, plans: tuple[pack.Plan, ...], size: int) -> int:
    """Return the most read positions of a row, rounded up to 1/8 of the row so that similar data share a program."""
    most = max(int(np.add.reduceat(pool.reads[p.members], p.offsets[:-1]).max()) for p in plans if p.rows)
    step = max(1, size // 8)
    return min(-(-most // step) * step, size)


def _weights(pool: Tokenised, members: np.ndarray, weighting: str) -> np.ndarray:
    """The weight of a learned token of each example."""
    reads = pool.reads[members]
    if weighting == "token":
        return np.full(len(members), 1 / reads.sum())
    return 1 / (len(members) * reads)


def _fill(pool: Tokenised, plan: pack.Plan, shape: tuple[int, int, int], weights: np.ndarray) -> Tokens:
    """Tokens of `shape` (rows, T, M); rows that the plan doesn't have stay empty."""
    rows, length, reads = shape
    counts = pool.lengths[plan.members]
    per_row = np.diff(plan.offsets)
    row = np.repeat(np.arange(plan.rows), per_row)  # of each example
    before = np.cumsum(counts) - counts
    column = before - np.repeat(before[plan.offsets[:-1]], per_row)
    number = np.arange(len(row)) - np.repeat(plan.offsets[:-1], per_row) + 1

    where = pack.spread(pool.offsets[plan.members], counts)  # of each token, in the pool
    at = (np.repeat(row, counts), pack.spread(column, counts))
    ids, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    ids[at] = pool.ids[where]
    segments[at] = np.repeat(number, counts)
    positions[at] = pack.spread(np.zeros_like(counts), counts)

    learned = pool.learned[where].nonzero()[0]
    target_row = at[0][learned]
    slot = (target_row, np.arange(len(learned)) - np.searchsorted(target_row, target_row))
    read, targets = (np.zeros((rows, reads), np.int32) for _ in range(2))
    token_weights = np.zeros((rows, reads), np.float32)
    read[slot] = at[1][learned] - 1
    targets[slot] = pool.ids[where[learned]]
    token_weights[slot] = np.repeat(weights, counts)[learned]
    return Tokens(ids, segments, positions, read, targets, token_weights)


def _held_out(pool: Tokenised, plan: pack.Plan, shape: tuple[int, int, int]) -> tuple[Tokens, ...]:
    count = shape[0]
    weight = 1 / max(1, pool.reads[plan.members].sum())
    batches = []
    for start in range(0, plan.rows, count):
        part = plan.slice(start, start + count)
        flat = _fill(pool, part, shape, np.full(len(part.members), weight))
        batches.append(jax.tree.map(lambda x: x[None], flat))
    return tuple(batches)


def _fingerprint(
    rows: Rows, pool: Tokenised, plans: tuple[pack.Plan, ...], shape: tuple[int, int, int]
) -> str:
    digest = hashlib.sha256(repr((shape, rows.seed, rows.weighting)).encode())
    arrays = [pool.ids, pool.learned, pool.offsets] + [
        a for plan in plans for a in (plan.members, plan.offsets)
    ]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def _stats(
    pool: Tokenised, split: tuple[np.ndarray, np.ndarray], plan: pack.Plan, shape: tuple[int, int]
) -> RowStats:
    """Count rows and tokens. split: indices of the training and the held-out examples. shape: T, M."""
    train, held = split
    size, reads = shape
    lengths = pool.lengths[train]
    tokens, truncated = int(lengths.sum()), int(pool.cut.sum())
    fill = tokens / (plan.rows * size)
    return RowStats(
        examples=len(train),
        held_out=len(held),
        dropped=pool.dropped,
        largest_id=int(pool.ids.max()),
        summary=f"{len(train)} examples in {plan.rows} rows of {size} tokens ({100 * fill:.0f} % full), "
        f"{len(held)} held out, {pool.dropped} dropped, {truncated} truncated",
        truncated=truncated,
        tokens=tokens,
        learned_tokens=int(pool.reads[train].sum()),
        lengths=length_percentiles(lengths),
        rows=plan.rows,
        fill=fill,
        row_length=size,
        read_length=reads,
        cache=pool.cache,
    )
