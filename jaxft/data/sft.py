"""SFT rows as batches: batch k is a pure function of (rows, tokenizer, settings, k), so one integer resumes
it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jaxft.batch import Tokens, TrainState
from jaxft.data import chat, pack
from jaxft.data.pack import RowPlan
from jaxft.data.settings import DataSettings
from jaxft.data.source import FixedSource, Prompt, SourceInfo, SourceStats, learned_line, length_percentiles
from jaxft.data.tokens import (
    TokenisedRows,
    TokenSettings,
    count_ids,
    split_rows,
    tokenise_rows,
)
from jaxft.tree import Metrics

TOO_LONG = ("truncate", "drop", "error")
WEIGHTING = ("token", "sequence")


@dataclass(frozen=True)
class Rows(DataSettings):
    """Documents, prompts with completions, or conversations for next-token prediction: the data of an SFT
    run.

    format: "auto", "plain" or a name of formats.py. loss_on: "assistant" (every assistant turn of a
    conversation), "completion" (the response that ends it) or "all"; of a row with a prompt of its own only
    the response is a target, and every token of a text row is one. max_length: tokens of a row. too_long:
    "truncate" keeps the start, "drop" leaves the example out, "error" stops. packing: several examples share
    a row of max_length tokens and do not attend to one another. weighting: "token" gives every target token
    of the optimizer batch the same weight, "sequence" every example. Other fields: see DataSettings; batch
    counts packed rows, or examples without packing.
    """

    loss_on: str = "assistant"
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
        """The settings that the tokens of a row depend on."""
        return TokenSettings(
            self.columns, self.format, self.loss_on, self.max_length, self.too_long, self.template_settings
        )

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "RowSource":
        """Read, tokenise (or load from the cache) and plan the batches; see Dataset.open.

        Where `shards` does not divide the rows of a microbatch, empty rows are added; they change no result.
        """
        row_count = _rows_per_microbatch(self, shards)

        def tokenise(ref: str) -> TokenisedRows:
            return tokenise_rows(ref, self.token_settings, tokenizer, self.tokenising(cache))

        examples, train, held = split_rows(self, tokenise, self._held_out_mask)
        longest = max(examples.lengths[train].max(), examples.lengths[held].max(initial=0))
        size = self.max_length if self.packing else min(self.max_length, pack.round_up(int(longest), 64))

        @lru_cache(maxsize=2)
        def plan(epoch: int) -> RowPlan:
            return _plan(self, examples, train, size, epoch)

        held_plan = _plan(self, examples, held, size, 0)
        reads = _read_length(examples, (plan(0), held_plan), size)
        per_epoch = -(-plan(0).rows // self.batch)
        first = examples.ids[slice(*examples.offsets[train.min() :][:2])]
        info = SourceInfo(
            steps=self.total_steps(per_epoch),
            steps_per_epoch=per_epoch,
            fingerprint=_fingerprint(self, examples, (plan(0), held_plan), (self.batch, size, reads)),
            preview=tokenizer.decode(first, skip_special_tokens=False),
            stats=_stats(self, examples, (train, held), plan(0), (size, reads)),
            warnings=examples.warnings,
            learned_ends=count_ids(examples.ends[~examples.truncated]),
        )
        shapes = _shapes(self, (row_count, size, reads))
        held_out = _held_out_batches(examples, held_plan, (row_count, size, reads))
        held_out = tuple(replace(batch, packed=self.packing) for batch in held_out)
        return RowSource(info, (shapes,), held_out, self, examples, plan)

    def _held_out_mask(self, examples: TokenisedRows) -> np.ndarray:
        mask = np.zeros(len(examples), bool)
        mask[pack.permutation(len(examples), self.seed, 0)[: self.held_out_count(len(examples))]] = True
        return mask

    def abstract(self, shards: int = 1) -> Tokens:
        """Return the shapes of the largest batch that the settings allow: T = M = max_length."""
        return _shapes(self, (_rows_per_microbatch(self, shards), self.max_length, self.max_length))


@dataclass(frozen=True)
class RowStats(SourceStats):
    """Counts of tokenised rows: rows of an epoch's batches, their size, and the lengths of the training
    examples.
    """

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
    examples: TokenisedRows
    plan: Callable[[int], RowPlan]

    def batch(self, step: int, state: TrainState | None = None) -> tuple[Tokens, Metrics]:
        """Return the batch of a step and no metrics."""
        rows, part = self.settings, self._rows_of(step)
        _, row_count, size = self.shapes[0].ids.shape
        shape = (rows.batch, size, self.shapes[0].read.shape[-1])
        flat = _fill(self.examples, part, shape, _weights(self.examples, part.members, rows.weighting))
        flat = replace(flat, packed=rows.packing)

        def split(x: np.ndarray) -> np.ndarray:
            grid = x.reshape(rows.micro, rows.batch // rows.micro, x.shape[-1])
            return np.pad(grid, ((0, 0), (0, row_count - grid.shape[1]), (0, 0)))

        return jax.tree.map(split, flat), {}

    def row_names(self, step: int) -> list[str]:
        """Return the names of the examples in each row of a batch."""
        return self._rows_of(step).names(self.examples.names)

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts; the response is the last run of tokens with a loss."""
        found: list[Prompt] = []
        for batch in self.held_out:
            for row in range(batch.ids.shape[1]):
                ids, segments = batch.ids[0, row], batch.segments[0, row]
                reads = batch.read[0, row][batch.token_weights[0, row] > 0]
                for segment in range(1, int(segments.max(initial=0)) + 1):
                    inside = np.flatnonzero(segments == segment)
                    targets = np.sort(reads[segments[reads] == segment]) + 1
                    first = int(targets[np.diff(targets, prepend=-1) > 1][-1])
                    end = int(targets[-1]) + 1
                    if len(found) < count and first > inside[0]:
                        found.append(Prompt(ids[inside[0] : first].tolist(), ids[first:end].tolist()))
        return found

    def _rows_of(self, step: int) -> RowPlan:
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
            f"data.batch={rows.batch} is not divisible by data.micro={rows.micro} microbatches; use a "
            f"data.micro of {fits}"
        )
    return pack.round_up(rows.batch // rows.micro, shards)


def _plan(rows: Rows, examples: TokenisedRows, chosen: np.ndarray, size: int, epoch: int) -> RowPlan:
    if not len(chosen):
        return RowPlan(chosen, np.zeros(1, np.int64))
    if rows.packing:
        plan = pack.pack_examples(examples.lengths[chosen], examples.reads[chosen], size, rows.seed, epoch)
    else:
        plan = pack.one_per_row(len(chosen), rows.seed, epoch)
    return RowPlan(chosen[plan.members], plan.offsets)


def _read_length(examples: TokenisedRows, plans: tuple[RowPlan, ...], size: int) -> int:
    """Return the most read positions of a row, rounded up to 1/8 of the row so that similar data share a
    program.
    """
    most = max(int(np.add.reduceat(examples.reads[p.members], p.offsets[:-1]).max()) for p in plans if p.rows)
    step = max(1, size // 8)
    return min(pack.round_up(most, step), size)


def _weights(examples: TokenisedRows, members: np.ndarray, weighting: str) -> np.ndarray:
    """Return the weight of one target token of each example."""
    reads = examples.reads[members]
    if weighting == "token":
        return np.full(len(members), 1 / reads.sum())
    return 1 / (len(members) * reads)


def _fill(examples: TokenisedRows, plan: RowPlan, shape: tuple[int, int, int], weights: np.ndarray) -> Tokens:
    """Return the plan's rows as arrays of `shape` (rows, T, M); further rows stay empty."""
    rows, length, reads = shape
    counts = examples.lengths[plan.members]
    per_row = np.diff(plan.offsets)
    row = np.repeat(np.arange(plan.rows), per_row)  # of each example
    before = np.cumsum(counts) - counts
    column = before - np.repeat(before[plan.offsets[:-1]], per_row)
    number = np.arange(len(row)) - np.repeat(plan.offsets[:-1], per_row) + 1

    where = pack.ranges(examples.offsets[plan.members], counts)  # index of each token in examples.ids
    at = (np.repeat(row, counts), pack.ranges(column, counts))
    ids, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    ids[at] = examples.ids[where]
    segments[at] = np.repeat(number, counts)
    positions[at] = pack.ranges(np.zeros_like(counts), counts)

    learned = examples.learned[where].nonzero()[0]
    target_row = at[0][learned]
    slot = (target_row, np.arange(len(learned)) - np.searchsorted(target_row, target_row))
    read, targets = (np.zeros((rows, reads), np.int32) for _ in range(2))
    token_weights = np.zeros((rows, reads), np.float32)
    read[slot] = at[1][learned] - 1
    targets[slot] = examples.ids[where[learned]]
    token_weights[slot] = np.repeat(weights, counts)[learned]
    return Tokens(ids, segments, positions, read, targets, token_weights)


def _held_out_batches(
    examples: TokenisedRows, plan: RowPlan, shape: tuple[int, int, int]
) -> tuple[Tokens, ...]:
    count = shape[0]
    weight = 1 / max(1, examples.reads[plan.members].sum())
    batches = []
    for start in range(0, plan.rows, count):
        part = plan.slice(start, start + count)
        flat = _fill(examples, part, shape, np.full(len(part.members), weight))
        batches.append(jax.tree.map(lambda x: x[None], flat))
    return tuple(batches)


def _fingerprint(
    rows: Rows, examples: TokenisedRows, plans: tuple[RowPlan, ...], shape: tuple[int, int, int]
) -> str:
    digest = hashlib.sha256(repr((shape, rows.seed, rows.weighting, examples.digest)).encode())
    for array in (array for plan in plans for array in (plan.members, plan.offsets)):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _stats(
    rows: Rows,
    examples: TokenisedRows,
    split: tuple[np.ndarray, np.ndarray],
    plan: RowPlan,
    shape: tuple[int, int],
) -> RowStats:
    """Count rows and tokens. split: indices of the training and the held-out examples. shape: T, M."""
    train, held = split
    size, reads = shape
    lengths = examples.lengths[train]
    tokens, truncated = int(lengths.sum()), int(examples.truncated.sum())
    fill = tokens / (plan.rows * size)
    return RowStats(
        examples=len(train),
        held_out=len(held),
        dropped=examples.dropped,
        invalid=examples.invalid,
        largest_id=examples.largest_id,
        summary=f"{len(train)} examples in {plan.rows} rows of {size} tokens ({100 * fill:.0f} % full), "
        f"{len(held)} held out, {examples.dropped} dropped as too long, {truncated} truncated",
        learned=_learned_line(rows, examples, train),
        truncated=truncated,
        tokens=tokens,
        learned_tokens=int(examples.reads[train].sum()),
        lengths=length_percentiles(lengths),
        rows=plan.rows,
        fill=fill,
        row_length=size,
        read_length=reads,
        cache=examples.cache,
    )


def _learned_line(rows: Rows, examples: TokenisedRows, train: np.ndarray) -> str:
    """Return the line about the learned fraction of the response tokens of the training examples."""
    targets = int(examples.learned_responses[train].sum())
    others = int(examples.reads[train].sum()) - targets
    detail = f"data.loss_on={rows.loss_on}"
    detail += f", and {others:,} tokens of prompts" if others else ""
    cut = int(examples.truncated[train].sum())
    if cut:
        detail += f", {cut:,} of {len(train):,} rows are truncated to data.max_length={rows.max_length}"
    return learned_line(int(examples.responses[train].sum()), targets, detail)
