"""The settings that every kind of training data has, and their checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from jaxtyping import Bool

from jaxft.annotations import BELOW_ONE, ZERO_TO_ONE, PositiveInt, Seed, above, at_least, check_bounds, one_of
from jaxft.data.packing.pack import Epochs, permutation
from jaxft.data.packing.reader import Reader, RowTask, Tokenising
from jaxft.data.packing.tokenised import TokenisedRows
from jaxft.data.row_settings import DATE, SYSTEM, TURN, RowSettings, TemplateSettings
from jaxft.data.rows.conversation import PLAIN
from jaxft.data.rows.invalid_rows import DROP, ERROR, FEW, FEW_ROWS, INVALID
from jaxft.distributed.sync import is_first
from jaxft.nn.attention.layer_attention import AttentionLayers
from jaxft.nn.tree import Batch

DUPLICATES, PLACEHOLDERS = DROPPED = ("duplicates", "placeholders")  # the choices of data.drop


@dataclass(frozen=True)
class DataSettings:
    """Settings of a run's data: where rows come from and how many an optimizer step uses.

    train: a file, folder or hub dataset (see dataset_rows.py), or several (see mixture.py). held_out: a
    fraction of the rows, another file, or "none". format: the format of the rows; "auto" detects it from
    their columns. columns: renames columns of the dataset, jaxft's name first: prompt=question reads
    "question" as the prompt. batch: rows of one optimizer step, over all devices. micro: number of
    microbatches that a step is computed in. seed: seed of the order, and of the split unless split_seed is
    set. split_seed: seed of the split into training and held-out rows, so that runs with other seeds hold out
    the same rows. epochs: passes over the rows, fractions allowed; none if tokens is set. tokens: the length
    of the run in tokens, in place of epochs. date: the date that chat templates print as today's.
    chat_template_kwargs: further arguments of the chat template, "name=value", such as enable_thinking=false;
    a row's column of that name overrides them. system: a system message is a "turn" of its own, or "merge"
    puts it in front of the first user turn, for templates without that role. invalid: "few" leaves out,
    counts and reports up to 1 % invalid rows of a dataset, and ends the run with the first one's error if
    there are more; "error" ends the run at the first one; "drop" leaves out as many as invalid_limit allows.
    invalid_limit: the largest fraction of a dataset's rows that "drop" may leave out. workers: processes that
    tokenise the rows; none: one per CPU, or this process alone for a dataset of at most 16 MiB. order_by: a
    column of numbers; every epoch goes from its smallest to its largest (a curriculum). none: every epoch is
    shuffled. max_samples: how many of each dataset's first rows are read; none: all. drop: rows that are left
    out and counted, any of "duplicates" (training rows with the tokens of another one or of a row of a
    held-out file) and "placeholders" (responses such as N/A, nan or -).
    """

    train: str
    held_out: str | Annotated[float, BELOW_ONE] | None = 0.05
    format: str = "auto"
    columns: tuple[str, ...] = ()
    batch: PositiveInt = 8
    micro: PositiveInt = 1
    seed: Seed = 0
    epochs: Annotated[float | None, above(0)] = 1.0
    tokens: Annotated[int | None, at_least(1)] = None
    date: str = DATE
    chat_template_kwargs: tuple[str, ...] = ()
    system: Annotated[str, one_of(SYSTEM)] = TURN
    invalid: Annotated[str, one_of(INVALID)] = FEW
    invalid_limit: Annotated[float, ZERO_TO_ONE] = 0.05
    workers: PositiveInt | None = None
    order_by: str | None = None
    max_samples: Annotated[int | None, at_least(1)] = None
    drop: tuple[Annotated[str, one_of(DROPPED)], ...] = ()
    split_seed: Seed | None = None
    unit: ClassVar[str]  # what `batch` counts, "rows", "pairs" or "prompts"
    task: ClassVar[RowTask]  # what the rows are read for

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        if self.template_settings != TemplateSettings(self.date) and self.format == PLAIN:
            raise ValueError(
                f"data.format={PLAIN} renders no chat template, so data.chat_template_kwargs and data.system "
                "have no effect; remove them, or set data.format=auto"
            )
        if (self.epochs is None) == (self.tokens is None):
            raise ValueError(
                f"data.epochs={self.epochs} and data.tokens={self.tokens}: set exactly one of them, and the "
                "other to none"
            )

    @property
    def length_settings(self) -> tuple[str, ...]:
        """Names of the settings whose sum is max_length."""
        return ("max_length",)

    @property
    def template_settings(self) -> TemplateSettings:
        """The settings that decide how a chat template renders a row."""
        return TemplateSettings(self.date, self.chat_template_kwargs, self.system)

    @property
    def allowed_invalid(self) -> float | None:
        """The largest fraction of a dataset's rows that may be left out as invalid, None for none at all."""
        return {FEW: FEW_ROWS, ERROR: None, DROP: self.invalid_limit}[self.invalid]

    def row_settings(self, **own: Any) -> RowSettings:
        """Return RowSettings with the settings of this class. own: fields that one kind of data adds."""
        return RowSettings(
            columns=self.columns, format=self.format, template=self.template_settings,
            order_by=self.order_by, max_samples=self.max_samples, **own,
        )  # fmt: skip

    @property
    def token_settings(self) -> RowSettings:
        """The settings that the tokens of a row depend on."""
        raise NotImplementedError

    def reader(self, tokenizer: Any, cache: Path | None = None) -> Reader:
        """Return the reader that tokenises the rows. cache: see `open`."""
        few = self.invalid == FEW
        how = Tokenising(cache, self.allowed_invalid, self.workers, progress=is_first(), names_first=few)
        return Reader(self.task, tokenizer, self.token_settings, how)

    def settled(self, train: Sequence[TokenisedRows]) -> Self:
        """Return the settings, with those filled in that follow from the training rows, such as the labels of
        a classifier. train: the tokenised rows of each dataset in data.train.
        """
        return self

    def for_attention(self, a: AttentionLayers) -> Self:
        """Return the settings adapted to a model: where its rope depends on the length of a text, pairs
        cannot share a prompt. a: the model's attention layers. Raises ValueError for settings that the model
        rules out, such as data.layout=branches.
        """
        return self

    def start_lines(self, objective: Any, a: AttentionLayers) -> list[str]:
        """Return lines to print at the start of a run, about how its log-probs are computed. objective: the
        run's Objective. a: the model's attention layers.
        """
        return []

    @property
    def units_per_step(self) -> int:
        """Number of rows, pairs or prompts (see `unit`) of one optimizer step."""
        return self.batch

    @property
    def seed_of_split(self) -> int:
        """The seed of the split into training and held-out rows, if held_out is a fraction."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def holds_out(self) -> bool:
        """Whether any rows are held out."""
        return self.held_out not in (None, "none", 0)

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> Any:
        """Read and tokenise the rows and plan the batches; return a Source.

        shards: parts that the mesh divides the rows of a microbatch into. cache: the folder of the cache,
        None for the default. Raises ValueError or OSError that names the row, the file or the setting at
        fault.
        """
        raise NotImplementedError

    def abstract(self, shards: int = 1) -> Batch:
        """Return the shapes of the largest batch, without reading a row. shards: see `open`."""
        raise NotImplementedError

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest sequence that the model sees."""
        raise NotImplementedError

    @property
    def packing(self) -> bool | Literal["wrapped"]:
        """Whether a row of a batch may have several sequences. If "wrapped", they attend to one another."""
        raise NotImplementedError

    @property
    def least_held_out(self) -> int:
        """The smallest number of rows to hold out if held_out is a fraction."""
        return 1

    def held_out_mask(self, rows: TokenisedRows) -> Bool[np.ndarray, " rows"]:
        """Return a mask of a dataset's rows, True for rows to hold out: about the fraction held_out of them.

        Rows with the same prompt are on the same side, and neither side is empty. If all rows have the same
        prompt, each row is assigned by itself.
        """
        prompts = rows.group_by(0)
        groups = prompts if prompts.any() else np.arange(len(rows))
        shuffled = groups[permutation(len(rows), self.seed_of_split, 0)]
        distinct = shuffled[np.sort(np.unique(shuffled, return_index=True)[1])]
        sizes = np.bincount(groups)[distinct]
        count = self.held_out_count(len(rows), self.least_held_out)
        return np.isin(groups, distinct[:-1][(np.cumsum(sizes) - sizes < count)[:-1]])

    def held_out_count(self, count: int, least: int = 1) -> int:
        """Return how many of `count` rows to hold out if held_out is a fraction: at least `least`, and never
        all.
        """
        return min(max(least, round(float(self.held_out or 0) * count)), count - 1)

    def held_out_notes(self, held: int, count: int) -> tuple[str, ...]:
        """Return a note if many more of `count` rows are held out than the fraction held_out asks for."""
        if not self.holds_out or isinstance(self.held_out, str):
            return ()
        wanted = self.held_out_count(count)
        if held <= max(2 * wanted, wanted + 2):
            return ()
        return (
            f"note: {held:,} of {count:,} rows are held out, and data.held_out={self.held_out} asks for "
            f"{wanted:,}: rows with the same prompt stay together. Set data.held_out to a file "
            "or to none",
        )

    def total_steps(self, epochs: Epochs) -> int:
        """Return the run's number of optimizer steps. epochs: the steps and tokens of every epoch."""
        if self.tokens is not None:
            return epochs.steps_of_tokens(self.tokens)
        return epochs.steps_of_epochs(self.epochs or 1.0)
