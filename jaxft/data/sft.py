"""A source of batches from rows: batch k is a pure function of (rows, tokenizer, settings, k), so one integer resumes it."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.batch import Tokens
from jaxft.data import cache as store
from jaxft.data import chat, pack
from jaxft.data.cache import Tokenised

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("token", "sequence")


@dataclass(frozen=True)
class Rows:
    """What to learn from and how it becomes batches.

    train: file, folder or hub dataset (see rows.py); held_out: a share of the rows, or a place of its own, or "none".
    columns: "ours=theirs" renames; format: "auto" or a name of formats.FORMATS.
    loss_on: "completion" (the last answer), "assistant" (every assistant turn) or "all"; text rows are learned whole.
    max_length: tokens a row; too_long: "truncate" keeps the start, "drop" leaves the example out, "error" stops.
    packing: several examples share a row of max_length tokens and don't see one another.
    batch: rows an optimizer step (packed rows, or examples without packing); micro: microbatches it is computed in.
    weighting: "token" gives every learned token of the optimizer batch the same weight, "sequence" every example.
    epochs: passes over the rows, fractions allowed; seed: of the split and the order.
    date: what a chat template that prints today's date prints.
    """

    train: str
    held_out: str | float | None = 0.05
    columns: tuple[str, ...] = ()
    format: str = "auto"
    loss_on: str = "completion"
    max_length: int = 1024
    too_long: str = "truncate"
    packing: bool = True
    batch: int = 8
    micro: int = 1
    weighting: str = "token"
    seed: int = 0
    epochs: float = 1.0
    date: str = chat.DATE

    def __post_init__(self):
        for name, choices in (("loss_on", chat.LOSS_ON), ("too_long", TOO_LONG), ("weighting", WEIGHTING)):
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name}={getattr(self, name)!r}; wanted one of {', '.join(choices)}")
        for name, least in (("max_length", 2), ("batch", 1), ("micro", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}; wanted at least {least}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"data.epochs={self.epochs}; wanted a number above 0")
        if isinstance(self.held_out, int | float) and not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out}; wanted a share from 0 up to 1, a file or none")

    def abstract(self, shards: int = 1) -> Tokens:
        """Shapes of the largest batch that the settings allow, without the rows at hand."""
        return abstract_tokens(self, shards=shards)


@dataclass(frozen=True)
class Source:
    """Batches by number. Arrays of a batch are [micro, rows, T] and [micro, rows, M], those held out [1, rows, ...].

    batch(step, state=None) is pure; names(step) names the examples of each row of that batch. The token_weights of one batch
    sum to 1, and those of all held-out batches together sum to 1 as a token mean.
    """

    steps: int
    steps_per_epoch: int
    fingerprint: str
    abstract: Tokens
    batch: Callable[..., Tokens]
    held_out: tuple[Tokens, ...]
    names: Callable[[int], list[str]]
    preview: str
    stats: dict[str, Any]


def abstract_tokens(
    rows: Rows, length: int | None = None, reads: int | None = None, shards: int = 1
) -> Tokens:
    """Shapes of a batch. Without the rows at hand: the largest that the settings allow, T = M = max_length."""
    _check_micro(rows)
    size = _micro_rows(rows, shards)
    length = length or rows.max_length

    def shape(last, dtype):
        return jax.ShapeDtypeStruct((rows.micro, size, last), dtype)

    ids, read = shape(length, np.int32), shape(reads or length, np.int32)
    weights = shape(reads or length, np.float32)
    return Tokens(ids, ids, ids, read, read, weights, packed=rows.packing)


def sft_source(
    rows: Rows, tokenizer: Any, cache: Path | None = None, process: tuple[int, int] = (0, 1), shards: int = 1
) -> Source:
    """Read, tokenise (or find in the cache) and plan; see Rows and Source.

    Every process builds the same global batch, so `process` (index, count) changes nothing yet. shards: into how many parts the
    mesh cuts the rows of a microbatch; where they don't divide, empty rows are added, which changes no number.
    Raises ValueError or FileNotFoundError in one line that names the row where a row is at fault.
    """
    _check_micro(rows)
    if not 0 <= process[0] < process[1]:
        raise ValueError(f"process {process[0]} of {process[1]}: wanted 0 <= index < count")
    pool, train, held = _split(rows, tokenizer, cache)
    longest = max(pool.lengths[train].max(), pool.lengths[held].max(initial=0))
    size = rows.max_length if rows.packing else min(rows.max_length, -(-int(longest) // 64) * 64)
    plan = lru_cache(maxsize=2)(lambda epoch: _plan(rows, pool, train, size, epoch))
    held_plan = _plan(rows, pool, held, size, 0)
    reads = _read_length(pool, (plan(0), held_plan), size)
    per_epoch = -(-plan(0).rows // rows.batch)
    shape = (rows.batch, size, reads)
    each = _micro_rows(rows, shards)

    def cut(step: int) -> pack.Plan:
        epoch, k = divmod(step, per_epoch)
        return plan(epoch).slice(k * rows.batch, (k + 1) * rows.batch)

    def batch(step: int, state: Any = None) -> Tokens:
        part = cut(step)
        flat = _fill(pool, part, shape, _weights(pool, part.members, rows.weighting))
        flat = replace(flat, packed=rows.packing)
        grid = jax.tree.map(lambda x: x.reshape(rows.micro, rows.batch // rows.micro, x.shape[-1]), flat)
        return jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, each - x.shape[1]), (0, 0))), grid)

    def names(step: int) -> list[str]:
        part = cut(step)
        return [", ".join(pool.names[i] for i in part.slice(r, r + 1).members) for r in range(part.rows)]

    return Source(
        steps=max(1, math.ceil(rows.epochs * per_epoch - 1e-9)),
        steps_per_epoch=per_epoch,
        fingerprint=_fingerprint(rows, pool, (plan(0), held_plan), shape),
        abstract=abstract_tokens(rows, size, reads, shards),
        batch=batch,
        held_out=tuple(
            replace(b, packed=rows.packing) for b in _held_out(pool, held_plan, (each, size, reads))
        ),
        names=names,
        preview=tokenizer.decode(
            pool.ids[slice(*pool.offsets[train.min() :][:2])], skip_special_tokens=False
        ),
        stats=_stats(rows, pool, (train, held), plan(0), (size, reads, per_epoch)),
    )


def _check_micro(rows: Rows) -> None:
    if rows.batch % rows.micro:
        fits = ", ".join(str(m) for m in range(1, rows.batch + 1) if rows.batch % m == 0)
        raise ValueError(
            f"data.batch={rows.batch} does not divide into data.micro={rows.micro} microbatches; use micro of {fits}"
        )


def _micro_rows(rows: Rows, shards: int) -> int:
    """Rows of a microbatch with those that are added for the mesh."""
    return -(-rows.batch // (rows.micro * shards)) * shards


def _split(rows: Rows, tokenizer: Any, cache: Path | None) -> tuple[Tokenised, np.ndarray, np.ndarray]:
    pool = store.tokenised(rows.train, rows, tokenizer, cache)
    count = len(pool.names)
    everything = np.arange(count)
    if rows.held_out in (None, "none", 0):
        return pool, everything, everything[:0]
    if isinstance(rows.held_out, str):
        held = store.tokenised(rows.held_out, rows, tokenizer, cache)
        return store.join(pool, held), everything, count + np.arange(len(held.names))
    if count < 2:
        raise ValueError(
            f"{rows.train}: one row can't be split by data.held_out={rows.held_out}; set data.held_out=none"
        )
    share = min(max(1, round(rows.held_out * count)), count - 1)
    order = pack.permutation(count, rows.seed, 0)
    return pool, np.sort(order[share:]), np.sort(order[:share])


def _plan(rows: Rows, pool: Tokenised, chosen: np.ndarray, size: int, epoch: int) -> pack.Plan:
    if not len(chosen):
        return pack.Plan(chosen, np.zeros(1, np.int64))
    if rows.packing:
        plan = pack.packed(pool.lengths[chosen], pool.reads[chosen], size, rows.seed, epoch)
    else:
        plan = pack.unpacked(len(chosen), rows.seed, epoch)
    return pack.Plan(chosen[plan.members], plan.offsets)


def _read_length(pool: Tokenised, plans: tuple[pack.Plan, ...], size: int) -> int:
    """The most read positions of a row, rounded up to an eighth of the row so that similar data share a program."""
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
    rows: Rows, pool: Tokenised, split: tuple, plan: pack.Plan, sizes: tuple[int, int, int]
) -> dict[str, Any]:
    train, held = split
    size, reads, per_epoch = sizes
    lengths = pool.lengths[train]
    tokens, learned = int(lengths.sum()), int(pool.reads[train].sum())
    percentiles = zip(
        ("min", "p10", "p50", "p90", "p99", "max"),
        np.percentile(lengths, (0, 10, 50, 90, 99, 100)),
        strict=True,
    )
    return {
        "examples": len(train),
        "held_out": len(held),
        "dropped": pool.dropped,
        "truncated": int(pool.cut.sum()),
        "tokens": tokens,
        "learned_tokens": learned,
        "learned_share": learned / tokens,
        "lengths": {name: round(float(value), 1) for name, value in percentiles},
        "rows": plan.rows,
        "fill": tokens / (plan.rows * size),
        "row_length": size,
        "read_length": reads,
        "steps_per_epoch": per_epoch,
        "largest_id": int(pool.ids.max()),
        "cache": pool.cache,
    }
