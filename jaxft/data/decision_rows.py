"""Rows with a question, choices and an answer as batches of Decisions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from jaxft.annotations import one_of
from jaxft.batch import Decisions, Tokens
from jaxft.data.chat import loss_mask
from jaxft.data.data_settings import DataSettings
from jaxft.data.decisions import LETTERS, answer_tokens
from jaxft.data.packing.pack import RowPlan, ranges
from jaxft.data.packing.reader import CutRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.row_cache import ColumnTypes
from jaxft.data.packing.row_tasks import text_columns, too_long
from jaxft.data.packing.tokenised import MASS, PROBABILITIES, TOKEN_WEIGHTS, Ragged, TokenisedRows, ragged
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.example import RESPONSE, Decision, ParsedRow
from jaxft.data.rows.formats import DECISIONS
from jaxft.data.rows.invalid_rows import InvalidRow, attempt, valid
from jaxft.data.sft import PackedBatches, Rows
from jaxft.data.source import RowSource

CHOICES, NAMES = "choices", "names"  # extras: the tokens of all choices, and their values as JSON
TOO_LONG = ("drop", "error")
# Settings of Rows without a meaning here, and the values that they must have.
FIXED = {"loss_on": "assistant", "weighting": "token", "sample_by": "document"}


# ---- tokens


def _extras(settings: RowSettings) -> ColumnTypes:
    more = {**ragged(CHOICES, np.int32), **ragged(PROBABILITIES, np.float32), **ragged(NAMES, np.uint8)}
    return {**text_columns(settings), **more}


def _tokenise(rows: Sequence[ParsedRow], reader: Reader) -> CutRows:
    """Yield a list for each row: its prompt with the token of the most probable choice; [] if too long."""
    template = reader.settings.template
    decisions: list[Any] = [row.examples[RESPONSE] for row in rows]
    chats = [decision.prompt(template.arguments) for decision in decisions]
    prompts = loss_mask.example_prompt_ids(chats, reader.tokenizer, template)
    for decision, prompt in zip(decisions, prompts, strict=True):
        yield attempt(_example, decision, prompt, reader)


DECISION_TASK = RowTask(DECISIONS, 5, "max_length", _tokenise, _extras, checks=())


def _example(decision: Decision, prompt: list[int] | InvalidRow, reader: Reader) -> list[TokenisedRow]:
    before, tokens = answer_tokens(reader.tokenizer, decision.prefix, decision.answers)
    ids, limit = np.array([*valid(prompt), *before], np.int32), reader.settings.max_length
    if len(ids) >= limit:
        if reader.settings.too_long == "error":
            raise too_long(decision.name, f"{len(ids) + 1} tokens are", limit, truncates=False)
        return []
    ids = np.append(ids, np.int32(tokens[int(np.argmax(decision.probabilities or [0.0]))]))
    extras = {
        MASS: 1.0, TOKEN_WEIGHTS: np.zeros(0, np.float32), CHOICES: np.array(tokens, np.int32),
        PROBABILITIES: np.array(decision.probabilities or [0.0] * len(tokens), np.float32),
        NAMES: np.frombuffer(json.dumps([x.name for x in decision.choices]).encode(), np.uint8),
    }  # fmt: skip
    learned = np.arange(len(ids)) == len(ids) - 1
    return [TokenisedRow(ids, learned, (len(ids) - 1, 1), False, 1, 1, extras)]


# ---- settings


@dataclass(frozen=True)
class DecisionRows(Rows):
    """Questions with choices, of which one is right or each has a probability: the data of decision models.

    format: "auto", "decision", "label" or "reranker". labels: the choices of rows with a text and a label, in
    the order of their letters; none: the labels in the training rows, sorted and recorded with the run and
    its weights. question: the question about the text of such rows, or the instruction in a reranker's rows.
    unlabelled: the rows are only scored: they may lack an answer, or have choices of their own in place of
    the labels. too_long: "drop" leaves out a row of more than max_length tokens, "error" ends the run; a
    decision cannot be truncated. packing: whether a row of max_length tokens has several decisions. Other
    fields: see Rows; loss_on, weighting and sample_by have no meaning here.
    """

    labels: tuple[str, ...] = ()
    question: str | None = None
    unlabelled: bool = False
    too_long: Annotated[str, one_of(TOO_LONG)] = "drop"
    packing: bool = True
    task: ClassVar[RowTask] = DECISION_TASK
    held_out_mask = DataSettings.held_out_mask  # rows with the same question are on one side

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} has no meaning for decisions, which learn from the "
                    "answer alone; remove it"
                )
        if self.labels and not 2 <= len({*self.labels}) == len(self.labels) <= len(LETTERS):
            raise ValueError(f"data.labels={','.join(self.labels)}; use 2 to {len(LETTERS)} different labels")

    @property
    def token_settings(self) -> RowSettings:
        return replace(
            super().token_settings, labels=self.labels, question=self.question, unlabelled=self.unlabelled
        )

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> RowSource[Any]:
        opened = super().open(tokenizer, shards, cache)
        rows, train = opened.split.rows, opened.split.train
        if self.labels and not rows.labels and not self.unlabelled:
            raise ValueError(
                f"data.labels={','.join(self.labels)} are the choices of rows with a text and a label; the "
                f"rows of data.train={self.train} have other choices; remove data.labels"
            )
        stats = replace(opened.info.stats, learned=_learned_line(rows, train))
        recorded = {"formats": [*rows.formats], "labels": [*rows.labels]}
        return replace(opened, info=replace(opened.info, learned_ends={}, stats=stats, recorded=recorded))

    @property
    def batches(self) -> Callable[..., PackedBatches]:
        return DecisionBatches

    def abstract(self, shards: int = 1) -> Tokens:
        """Return the shapes of the largest batch that the settings allow. shards: see DataSettings.open."""
        return with_choices(super().abstract(shards), len(LETTERS), tuple(range(len(LETTERS))))

    def settled(self, train: Sequence[TokenisedRows]) -> "DecisionRows":
        """Return the settings with the labels of the training rows, if these have any and data.labels is
        empty. Raises ValueError for sources with different labels.
        """
        label_sets = dict.fromkeys(rows.labels for rows in train if rows.labels)
        if len(label_sets) > 1:
            sets = " and ".join(",".join(labels)[:80] for labels in label_sets)
            raise ValueError(
                f"data.train={self.train}: the sources have different labels, {sets}; set data.labels to the "
                "labels that every text chooses from, or give each row a column of choices"
            )
        return replace(self, labels=next(iter(label_sets), ()))


def _learned_line(rows: TokenisedRows, train: np.ndarray) -> str:
    soft = len(train) - int(np.count_nonzero(rows.extras[PROBABILITIES].of(train) == 1))
    counts = rows.extras[CHOICES].counts[train]
    most = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.max()}"
    detail = f"; {soft:,} rows have probabilities" if soft else ""
    return f"one token of each row is learned, its choice of {most}{detail}"


def choice_names(rows: TokenisedRows, example: int) -> list[str]:
    """Return the values of the choices of example `example`, as text."""
    names: list[str] = json.loads(rows.extras[NAMES][example].tobytes())
    return names


# ---- batches


def with_choices(rows: Tokens, most: int, tokens: tuple[int, ...]) -> Decisions:
    """Return the shapes of a batch of decisions. rows: the shapes of its token arrays. most: the largest
    number of choices. tokens: see Decisions.
    """
    shape = (*rows.read.shape, most)
    choices, probabilities = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
    return Decisions(**vars(rows), choices=choices, probabilities=probabilities, tokens=tokens)


@dataclass(frozen=True)
class DecisionBatches(PackedBatches):
    """Decisions packed into rows."""

    @property
    def choices(self) -> Ragged:
        """The token ids of the choices of each example of split.rows."""
        choices: Ragged = self.split.rows.extras[CHOICES]
        return choices

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The token ids of all choices, each once, ascending."""
        return tuple(np.unique(self.choices.values[:]).tolist())

    def shapes(self) -> Decisions:
        return with_choices(super().shapes(), int(self.choices.counts.max()), self.tokens)

    def fill(self, plan: RowPlan) -> Decisions:
        return self._with_choices(super().fill(plan), plan)

    def evaluation(self, plan: RowPlan) -> tuple[Decisions, ...]:
        """Return rows as held-out batches [1, rows, ...], in which every decision has the same weight."""
        size, rows = self.shape[0], self.split.rows
        parts = (plan.slice(start, start + size) for start in range(0, plan.rows, size))
        equal = replace(self.split, rows=replace(rows, weights=np.ones(len(rows))))
        filled = super(DecisionBatches, replace(self, split=equal)).evaluation(plan)
        return tuple(map(self._with_choices, filled, parts))

    def positions(self, batch: Tokens) -> int:
        """Return how many values a metrics.PerRow has for a batch: one for each element of `batch.read`."""
        return int(np.prod(batch.read.shape))

    def name_at(self, batch: Tokens, number: int, position: int) -> str:
        """Return the name of the row whose decision is at a position in flat batch.read; see BatchLayout."""
        return self.split.rows.names[self.example_at(batch, number, position)]

    def example_at(self, batch: Tokens, number: int, position: int) -> int:
        """Return the index in split.rows of the decision at a position in flat batch.read."""
        _, rows, reads = batch.read.shape
        row, decision = divmod(position, reads)
        return int(self.held_plan.members[self.held_plan.offsets[number * rows + row] + decision])

    def _with_choices(self, rows: Tokens, plan: RowPlan) -> Decisions:
        """Return token arrays with the choices of the plan's examples, in the order of read positions."""
        (micro, count, reads), table = rows.read.shape, self.choices
        counts = table.counts[plan.members]
        row = np.repeat(np.arange(plan.rows), np.diff(plan.offsets))  # of each member
        number = np.arange(len(row)) - plan.offsets[row]
        per_micro = -(-self.settings.batch // self.settings.micro) if micro > 1 else count
        of_choices = (np.repeat(x, counts) for x in (row // per_micro, row % per_micro, number))
        at = (*of_choices, ranges(np.zeros_like(counts), counts))
        where = ranges(table.offsets[plan.members], counts)
        shape = micro, count, reads, int(table.counts.max())
        choices, probabilities = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        choices[at] = np.searchsorted(self.tokens, table.values[where])
        probabilities[at] = self.split.rows.extras[PROBABILITIES].values[where]
        return Decisions(**vars(rows), choices=choices, probabilities=probabilities, tokens=self.tokens)
