"""The interface between data and the train loop: settings open a source, and a source returns batches by
step.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from jaxft.batch import TrainState
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing.pack import Epochs, RowPlan
from jaxft.data.packing.tokenised import preview
from jaxft.data.rows.invalid_rows import InvalidCount
from jaxft.data.rows.mixture import SplitRows
from jaxft.nn.attention.layer_attention import AttentionLayers
from jaxft.nn.tree import Batch, Metrics

# The type that a source is bound to: `object` for fixed rows, rl's BoundRun for rollouts.
BoundTo = TypeVar("BoundTo", contravariant=True)
SomeBatch = TypeVar("SomeBatch")


class Prompt(NamedTuple):
    """Token ids of a held-out prompt, and of the response in its row, [] if the row has none."""

    ids: list[int]
    response: list[int]


class HeldOutMetrics(NamedTuple):
    """Held-out metrics of a source that evaluates itself. rows: metrics of single held-out rows, by a
    position that `held_out_name` turns into the row's name.
    """

    metrics: dict[str, float]
    rows: dict[int, dict[str, float]]


@dataclass(frozen=True)
class SourceStats:
    """Counts of a source's rows.

    examples, held_out: numbers of training and of held-out examples. dropped: rows that were left out as too
    long. invalid: the invalid rows that were left out, by reason. largest_id: the largest token id. summary:
    one line for the start of a run. learned: one line about the fraction of the response tokens that is
    learned.
    """

    examples: int
    held_out: int
    dropped: int
    invalid: tuple[InvalidCount, ...]
    largest_id: int
    summary: str
    learned: str


@dataclass(frozen=True)
class RowStats(SourceStats):
    """Statistics of tokenised rows.

    truncated: number of truncated examples. tokens: tokens of the first epoch. learned_tokens: its tokens
    with a loss. lengths: percentiles of the tokens of training examples, see length_percentiles. rows: rows
    of the first epoch's batches. fill: fraction of the slots for tokens that are used. row_length,
    read_length: slots of a row for tokens, and for tokens with a loss. cache: whether the cache had the
    tokens, such as "found" or "built"; see cache.load_or_make.
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
class SourceInfo:
    """Facts about a source that are known before its first batch.

    steps: optimizer steps of the run that data.epochs or data.tokens asks for. fingerprint: a hash of
    everything that the batches depend on. preview: the first training row as text. steps_per_rollout:
    optimizer steps between two points where the run may be saved. samples: whether batches have completions
    that the model samples during the run. recorded: further facts that the batches depend on, by name, such
    as the labels of a classifier or fingerprints of other models; the run's record contains them. eval_cost:
    the cost of evaluating a held-out row relative to training on a row: 1/3, as there are no gradients; for
    rollouts, the completions of a held-out prompt divided by those of a training prompt. learned_ends: token
    id -> number of training and held-out sequences, except truncated ones, of which it is the last target; at
    most two targets of whitespace at the end are skipped. warnings: lines for the start of a run.
    """

    steps: int
    steps_per_epoch: float
    fingerprint: str
    preview: str
    stats: SourceStats
    steps_per_rollout: int = 1
    samples: bool = False
    eval_cost: float = 1 / 3
    recorded: dict[str, Any] = field(default_factory=dict)
    learned_ends: dict[int, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Source(Protocol[BoundTo]):
    """The batches of a run, by optimizer step.

    Arrays are NumPy's: [micro, rows, ...] in a training batch, [1, rows, ...] in a held-out batch. An
    array of loss weights, such as pair_weights, sums to 1 over a training batch, and over all held-out
    batches together.
    """

    @property
    def info(self) -> SourceInfo:
        """Counts, fingerprint and the number of steps."""

    @property
    def shapes(self) -> tuple[Batch, ...]:
        """The shapes that training batches have, the largest last."""

    @property
    def held_out(self) -> tuple[Batch, ...]:
        """Held-out batches. Empty if nothing is held out, or if `evaluate` computes the held-out metrics."""

    def bind(self, run: BoundTo, saved: dict[str, Any] | None) -> "Source[BoundTo]":
        """Return the source that makes batches for this run.

        saved: `state_dict` of the checkpoint to resume from.
        """

    def batch(self, step: int, state: TrainState) -> tuple[Batch, Metrics]:
        """Return the batch of an optimizer step, and metrics about its sampled completions ({} without
        completions). Both depend only on the step and the state.
        """

    def given(self, step: int) -> Batch:
        """Return the part of a step's batch that is known before the model is loaded: the batch itself, or
        the prompts of the completions that will be sampled.
        """

    def evaluate(self, state: TrainState) -> HeldOutMetrics | None:
        """Return held-out metrics, or None if the train loop is to evaluate the objective on `held_out`."""

    def limit_evaluation(self, most: int | None) -> "Source[BoundTo]":
        """Return the source with a limit for each evaluation; None for no limit.

        If `evaluate` computes the held-out metrics, it reads at most `most` held-out prompts. Otherwise the
        train loop reads at most `most` batches of `held_out`, which stays complete. `spread` chooses the
        prompts or batches; `held_out_name` then takes an index among the values of the chosen batches.
        """

    def row_names(self, step: int) -> list[str]:
        """Return a text for each row of a batch: the names of the dataset rows in it, joined by ", "."""

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts, fewer if there are not as many."""

    def held_out_name(self, position: int) -> str:
        """Return the name of the held-out row that a value of a metrics.PerRow belongs to. position: the
        index of the value among the values of all evaluated batches.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON that a checkpoint stores of this source, in addition to TrainState."""


def open_for(a: AttentionLayers, data: DataSettings, tokenizer: Any, shards: int = 1) -> Any:
    """Adapt the settings `data` to a model with these attention layers and open them; return a Source. The
    settings of a Run are adapted already. shards: see DataSettings.open.
    """
    return data.for_attention(a).open(tokenizer, shards)


@dataclass(frozen=True)
class BatchLayout(Generic[SomeBatch]):
    """The layout of a RowSource's rows in batches; subclasses are for packed texts, pairs and decisions.

    settings: the settings of the data. split: all rows, and which are held out. plan(epoch): the examples of
    each row of an epoch; batch k has the rows from k * rows_per_step on. held_plan: the held-out examples of
    each row.
    """

    settings: Any
    split: SplitRows
    plan: Callable[[int], RowPlan]
    held_plan: RowPlan

    @property
    def rows_per_step(self) -> int:
        """Number of rows of a plan that an optimizer step reads."""
        raise NotImplementedError

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Number of tokens that each example takes in a row."""
        return self.split.rows.lengths

    def shapes(self) -> SomeBatch:
        """Return the shapes of a training batch."""
        raise NotImplementedError

    def fill(self, plan: RowPlan) -> SomeBatch:
        """Return the rows of a step as a training batch, [micro, rows, ...]."""
        raise NotImplementedError

    def evaluation(self, plan: RowPlan) -> tuple[SomeBatch, ...]:
        """Return rows as batches [1, rows, ...], whose weights sum to 1 over all of them."""
        raise NotImplementedError

    def positions(self, batch: SomeBatch) -> int:
        """Return how many values a metrics.PerRow (a metric of single rows) has for an evaluated batch."""
        raise NotImplementedError

    def name_at(self, batch: SomeBatch, number: int, position: int) -> str:
        """Return the name of the row that a value of a metrics.PerRow belongs to. number: the index of the
        held-out batch. position: the index of the value within this batch.
        """
        raise NotImplementedError

    def prompts_of(self, batch: SomeBatch, row: int) -> Iterator[Prompt]:
        """Yield the prompts of a row of a held-out batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowSource(Generic[SomeBatch]):
    """A source with a fixed set of rows; see Source.

    most_evaluated: the number of batches of `held_out` that an evaluation reads, None for all.
    """

    info: SourceInfo
    layout: BatchLayout[SomeBatch]
    held_out: tuple[SomeBatch, ...]
    epochs: Epochs
    most_evaluated: int | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, layout: Any, epochs: Epochs, tokenizer: Any, stats: SourceStats, fingerprint: str) -> Self:
        """Return the source with this layout of batches, its held-out batches and facts about its rows."""
        split = layout.split
        info = SourceInfo(
            steps=layout.settings.total_steps(epochs),
            steps_per_epoch=epochs.steps_in(0),
            fingerprint=fingerprint,
            preview=preview(split.rows, int(split.train.min()), tokenizer),
            stats=stats,
            warnings=split.warnings,
            learned_ends=split.rows.end_counts,
        )
        return cls(info, layout, layout.evaluation(layout.held_plan), epochs)

    @property
    def split(self) -> SplitRows:
        """All rows, and which of them are for training."""
        return self.layout.split

    @property
    def settings(self) -> Any:
        """The settings of the data."""
        return self.layout.settings

    @property
    def shapes(self) -> tuple[SomeBatch, ...]:
        """The shapes that training batches have."""
        return (self.layout.shapes(),)

    def bind(self, run: object, saved: dict[str, Any] | None) -> Any:
        """Return the source itself: its batches depend on the step alone."""
        return self

    def batch(self, step: int, state: TrainState | None = None) -> tuple[SomeBatch, Metrics]:
        """Return the batch of a step and no metrics."""
        return self.layout.fill(self._rows_of(step)), {}

    def given(self, step: int) -> SomeBatch:
        """Return the batch of a step."""
        return self.batch(step)[0]

    def evaluate(self, state: TrainState) -> HeldOutMetrics | None:
        """Return None: the train loop evaluates the objective on `held_out`."""
        return None

    def limit_evaluation(self, most: int | None) -> Any:
        """Return the source for an evaluation of `most` batches of `held_out`, None for all; see Source."""
        return replace(self, most_evaluated=most)

    def row_names(self, step: int) -> list[str]:
        """Return the names of the examples in each row of a batch, joined, over all microbatches in order."""
        return list(map(", ".join, self.member_names(step)))

    def member_names(self, step: int) -> list[list[str]]:
        """Return, for each row of a batch, a list of the names of its examples."""
        names = self._rows_of(step).names(self.split.rows.names)
        while not names[-1]:  # the last rows of a batch with fewer pairs
            names.pop()
        return names

    def held_out_name(self, position: int) -> str:
        """Return the name of the held-out row that a value of a metrics.PerRow belongs to; see Source."""
        evaluated, position = divmod(position, self.layout.positions(self.held_out[0]))
        number = spread(len(self.held_out), self.most_evaluated)[evaluated]
        return self.layout.name_at(self.held_out[number], number, position)

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts."""
        rows = ((batch, row) for batch in self.held_out for row in range(len(jax.tree.leaves(batch)[0][0])))
        return [*islice((prompt for where in rows for prompt in self.layout.prompts_of(*where)), count)]

    def state_dict(self) -> dict[str, Any]:
        """Return {}: nothing changes during a run."""
        return {}

    def _rows_of(self, step: int) -> RowPlan:
        """Return the part of its epoch's plan that one step reads."""
        epoch, k = self.epochs.locate(step)
        size = self.layout.rows_per_step
        return self.layout.plan(epoch).slice(k * size, (k + 1) * size)


def row_stats(
    layout: BatchLayout[Any], noun: str, shape: tuple[int, int], learned: tuple[int, str]
) -> RowStats:
    """Count rows and tokens of the first epoch. noun: a name for the examples, such as "pairs". shape: slots
    of a row for tokens, and for tokens with a loss. learned: the number of tokens with a loss, and the line
    about them.
    """
    split, rows, plan = layout.split, layout.split.rows, layout.plan(0)
    tokens, truncated = int(plan.lengths_of(layout.lengths).sum()), int(rows.truncated.sum())
    fill, further = tokens / (plan.rows * shape[0]), int((rows.pieces > 0).sum())
    pieces = f", {further} further pieces of split documents" if further else ""
    return RowStats(
        examples=len(split.train),
        held_out=len(split.held),
        dropped=rows.dropped,
        invalid=rows.invalid,
        largest_id=rows.largest_id,
        summary=f"{len(split.train)} {noun} in {plan.rows} rows of {shape[0]} tokens ({100 * fill:.0f} % "
        f"full), {len(split.held)} held out, {rows.dropped} dropped as too long, {truncated} truncated"
        f"{pieces}{split.summary}",
        learned=learned[1],
        truncated=truncated,
        tokens=tokens,
        learned_tokens=learned[0],
        lengths=length_percentiles(layout.lengths[split.train]),
        rows=plan.rows,
        fill=fill,
        row_length=shape[0],
        read_length=shape[1],
        cache=rows.cache,
    )


def plan_epochs(
    split: SplitRows, plan: Callable[[int], RowPlan], tokens: Int[np.ndarray, " examples"], rows_per_step: int
) -> Epochs:
    """Count the tokens and steps of epochs. plan(epoch): as in BatchLayout. tokens: the tokens that each
    example takes in a row.
    """

    @cache
    def batch_tokens(epoch: int) -> Int[np.ndarray, " steps"]:
        rows = plan(epoch)
        sums = rows.row_sums(rows.lengths_of(tokens))
        return np.add.reduceat(sums, np.arange(0, rows.rows, rows_per_step))

    return Epochs(batch_tokens, alike=split.mixture is None)


def fingerprint_of(settings: tuple[Any, ...], arrays: Iterable[np.ndarray | None]) -> str:
    """Return a hash of settings and arrays, 32 hexadecimal digits."""
    digest = hashlib.sha256(repr(settings).encode())
    for array in (array for array in arrays if array is not None):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def spread(count: int, most: int | None) -> list[int]:
    """Return up to `most` (None: all) of the indices below `count`, at equal distances: for 10 and 3, 0, 3
    and 6.
    """
    if most is None or count <= most:
        return [*range(count)]
    return [number * count // most for number in range(most)]


def learned_line(tokens: int, targets: int, detail: str) -> str:
    """Return the line about the fraction of the response tokens that are targets, in percent, rounded down.

    detail: text for its parentheses: the settings that decide which tokens are targets.
    """
    percent = math.floor(1000 * targets / max(1, tokens)) / 10
    return f"{percent:.1f} % of the {tokens:,} response tokens are learned ({detail})"


def length_percentiles(lengths: Int[np.ndarray, " examples"]) -> dict[str, float]:
    """Return percentiles of token counts by the names "min", "p10", "p50", "p90", "p99" and "max"."""
    names = ("min", "p10", "p50", "p90", "p99", "max")
    values = np.percentile(lengths, (0, 10, 50, 90, 99, 100))
    return {name: round(float(value), 1) for name, value in zip(names, values, strict=True)}
