"""The interface between data and the train loop: settings open a source, and a source returns batches by
step.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Int

from jaxft.batch import TrainState
from jaxft.data.invalid import InvalidCount
from jaxft.nn.layer_attention import AttentionLayers
from jaxft.tree import Batch, Metrics

# The type that a source is bound to: `object` for fixed rows, rl's BoundRun for rollouts.
BoundTo = TypeVar("BoundTo", contravariant=True)
SomeBatch = TypeVar("SomeBatch")


class Prompt(NamedTuple):
    """Token ids of a held-out prompt, and of the response in its row, [] if the row has none."""

    ids: list[int]
    response: list[int]


class HeldOutMetrics(NamedTuple):
    """Held-out metrics of a source that evaluates itself, and values of single rows by their position."""

    metrics: dict[str, float]
    rows: dict[int, dict[str, float]]


@dataclass(frozen=True)
class SourceStats:
    """Counts of a source's rows.

    dropped: rows that were left out as too long. invalid: the invalid rows that were left out,
    by reason. largest_id: the largest token id. summary: one line for the start of a run. learned: one line
    about the fraction of the response tokens that is learned.
    """

    examples: int
    held_out: int
    dropped: int
    invalid: tuple[InvalidCount, ...]
    largest_id: int
    summary: str
    learned: str


@dataclass(frozen=True)
class SourceInfo:
    """Facts about a source that are known before its first batch.

    steps: optimizer steps of the run's epochs or tokens. fingerprint: a hash of everything that the batches
    depend on. preview: the first training row as text. steps_per_rollout: optimizer steps between two points
    where the run may be saved. samples: whether batches are sampled from the model, which takes as long as an
    evaluation. dependencies: fingerprints of other models that the batches depend on, by their name in the
    run's record. eval_cost: the work of evaluating held-out rows, relative to that of training on as many:
    without gradients a third, of sampled completions their number. learned_ends: token id -> number of
    training and held-out sequences whose last target it is, without truncated ones. warnings: lines for the
    start of a run.
    """

    steps: int
    steps_per_epoch: float
    fingerprint: str
    preview: str
    stats: SourceStats
    steps_per_rollout: int = 1
    samples: bool = False
    eval_cost: float = 1 / 3
    dependencies: dict[str, str] = field(default_factory=dict)
    learned_ends: dict[int, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Source(Protocol[BoundTo]):
    """Batches by step.

    Arrays of a training batch are [micro, rows, ...], those of a held-out batch [1, rows, ...]; each kind of
    weights sums to 1 over a training batch and over all held-out batches together. All are NumPy arrays.
    """

    @property
    def info(self) -> SourceInfo:
        """Counts, fingerprint and the number of steps."""

    @property
    def shapes(self) -> tuple[Batch, ...]:
        """The shapes that training batches have, the largest last."""

    @property
    def held_out(self) -> tuple[Batch, ...]:
        """Batches for evaluation. Empty if nothing is held out or `evaluate` does it."""

    def bind(self, run: BoundTo, saved: dict[str, Any] | None) -> "Source[BoundTo]":
        """Return the source that makes batches for this run.

        saved: `state_dict` of the checkpoint to resume from.
        """

    def batch(self, step: int, state: TrainState) -> tuple[Batch, Metrics]:
        """Return the batch of an optimizer step and metrics of its generation: a function of step and state
        alone.
        """

    def given(self, step: int) -> Batch:
        """Return what is known of a step's batch before the run has weights: the batch itself, or the prompts
        whose completions it is going to have.
        """

    def evaluate(self, state: TrainState) -> HeldOutMetrics | None:
        """Return held-out metrics, or None if the train loop is to evaluate the objective on `held_out`."""

    def limit_evaluation(self, most: int | None) -> "Source[BoundTo]":
        """Return the source whose `evaluate` reads at most so many held-out rows, None for all. Where the
        train loop evaluates on `held_out`, these are batches, of which `held_out_name` names the rows.
        """

    def row_names(self, step: int) -> list[str]:
        """Return the names of the dataset rows in each row of a batch."""

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts, fewer if there are not as many."""

    def held_out_name(self, position: int) -> str:
        """Return the name of the held-out row at a position of the values of metrics.PerRow."""

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON that a checkpoint stores of this source, in addition to TrainState."""


class Dataset(Protocol):
    """Settings of a run's data, the type of `Run.data`.

    unit: what `batch` counts, "rows", "pairs" or "prompts".
    """

    unit: ClassVar[str]

    @property
    def train(self) -> str:
        """A file, folder or hub dataset."""

    @property
    def held_out(self) -> str | float | None:
        """A fraction of the rows, another file, or "none"."""

    @property
    def holds_out(self) -> bool:
        """Whether any rows are held out."""

    @property
    def batch(self) -> int:
        """Rows, pairs or prompts (see `unit`) that are read at once."""

    @property
    def units_per_step(self) -> int:
        """Rows, pairs or prompts of one optimizer step."""

    @property
    def micro(self) -> int:
        """Microbatches of an optimizer step."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that the model sees."""

    @property
    def length_settings(self) -> tuple[str, ...]:
        """Names of the settings whose sum is max_length."""

    @property
    def packing(self) -> bool | Literal["wrapped"]:
        """Whether a row may contain several sequences. Only those of "wrapped" rows attend to one another."""

    @property
    def seed(self) -> int:
        """Seed of the order, and of the split where seed_of_split is not another one."""

    @property
    def seed_of_split(self) -> int:
        """The seed that a fraction of the rows is held out by."""

    @property
    def tokens(self) -> int | None:
        """Length of the run in tokens; None for epochs."""

    def for_attention(self, a: AttentionLayers) -> "Dataset":
        """Return the settings for a model with these attention layers, whose rope may depend on the length of
        a text. Raises ValueError for settings that such a model cannot have.
        """

    def start_lines(self, objective: Any, a: AttentionLayers) -> list[str]:
        """Return lines for the start of a run about how its log-probs are computed. objective: the run's
        Objective. a: of the model.
        """

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> Source[Any]:
        """Read and tokenise the rows and plan the batches.

        shards: parts that the mesh divides the rows of a microbatch into. cache: folder of tokenised rows.
        Raises ValueError or FileNotFoundError that names the row or the setting at fault.
        """

    def abstract(self, shards: int = 1) -> Batch:
        """Return the shapes of the largest batch that the settings allow, without reading any row."""


def open_for(a: AttentionLayers, data: Dataset, tokenizer: Any, shards: int = 1) -> Any:
    """Open data that a model with these attention layers is going to read; a Run has such data already."""
    return data.for_attention(a).open(tokenizer, shards)


@dataclass(frozen=True)
class FixedSource(Generic[SomeBatch]):
    """Members of Source that all sources with a fixed set of rows share. most_evaluated: the batches of
    `held_out` that an evaluation reads, None for all.
    """

    info: SourceInfo
    shapes: tuple[SomeBatch, ...]
    held_out: tuple[SomeBatch, ...]
    most_evaluated: int | None = field(default=None, kw_only=True)

    def bind(self, run: object, saved: dict[str, Any] | None) -> Any:
        """Return the source itself: its batches depend on the step alone."""
        return self

    def evaluate(self, state: TrainState) -> HeldOutMetrics | None:
        """Return None: the train loop evaluates the objective on `held_out`."""
        return None

    def limit_evaluation(self, most: int | None) -> Any:
        """Return the source that names the rows of the batches that the train loop chooses of `held_out`."""
        return replace(self, most_evaluated=most)

    def evaluated_batch(self, number: int) -> int:
        """Return the number in `held_out` of a batch that an evaluation reads."""
        return spread(len(self.held_out), self.most_evaluated)[number]

    def state_dict(self) -> dict[str, Any]:
        """Return {}: nothing changes during a run."""
        return {}


def spread(count: int, most: int | None) -> list[int]:
    """Return `most` of the indices below `count`, at equal distances; all of them if they are no more."""
    if most is None or count <= most:
        return [*range(count)]
    return [number * count // most for number in range(most)]


def learned_line(tokens: int, targets: int, detail: str) -> str:
    """Return the line about the fraction of the response tokens that are targets, in percent, rounded down.

    detail: the settings and rows that explain it.
    """
    percent = math.floor(1000 * targets / max(1, tokens)) / 10
    return f"{percent:.1f} % of the {tokens:,} response tokens are learned ({detail})"


def length_percentiles(lengths: Int[np.ndarray, " examples"]) -> dict[str, float]:
    """Return minimum, maximum and some percentiles of token counts."""
    names = ("min", "p10", "p50", "p90", "p99", "max")
    found = np.percentile(lengths, (0, 10, 50, 90, 99, 100))
    return {name: round(float(value), 1) for name, value in zip(names, found, strict=True)}
