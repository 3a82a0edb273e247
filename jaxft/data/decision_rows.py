"""Rows with a question, choices and an answer as batches of Decisions."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxft.batch import Decisions, Tokens, TrainState
from jaxft.data import cache as files
from jaxft.data import chat, formats
from jaxft.data.cache import ChunkColumns, ColumnType, ColumnTypes
from jaxft.data.decisions import (
    DECISION_SCHEMAS,
    LABEL,
    LETTERS,
    Decision,
    DecisionChoice,
    answer_tokens,
    parse,
)
from jaxft.data.flat import Flat
from jaxft.data.formats import RowFormat
from jaxft.data.invalid import InvalidRow, InvalidRows, attempt, valid
from jaxft.data.mixture import held_out_sources, parse_sources
from jaxft.data.pack import RowPlan, ranges
from jaxft.data.row_files import Row
from jaxft.data.rows import read_rows
from jaxft.data.sft import Rows, RowSource
from jaxft.data.tokenise import RowKind, Tokenising, tokenise_dataset
from jaxft.data.tokens import SFT_COLUMNS, TokenisedExamples, TokenSettings, remedy_for_too_long, row_fields
from jaxft.tree import Metrics

VERSION = ("decisions", 1)  # increase it when the same rows become other tokens
DECISION_COLUMNS: ColumnTypes = {
    **SFT_COLUMNS,
    "choices": ColumnType(np.int32, "choice_counts"),
    "probabilities": ColumnType(np.float32, "choice_counts"),
    "choice_counts": ColumnType(np.int32),
}
# Settings of Rows without a meaning here, with the values that they have.
FIXED = {"loss_on": "assistant", "weighting": "token", "sample_by": "document"}


@dataclass(frozen=True)
class DecisionTokenSettings(TokenSettings):
    """The settings that the tokens of a decision depend on; they are part of the cache key."""

    labels: tuple[str, ...] = ()
    question: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenisedDecisions(TokenisedExamples):
    """Prompts that end with the token of the most probable choice, the only one that is learned.

    choices, probabilities: tokens and probabilities of all choices, concatenated. choice_counts: the number
    of each example's choices.
    """

    choices: Flat
    probabilities: Flat
    choice_counts: Int[np.ndarray, " examples"]

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of all choices, each once."""
        return tuple(np.unique(self.choices[:]).tolist())

    def of_members(self, members: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the choices [n, C] as indices of `tokens`, -1 for none, and their probabilities [n, C]."""
        counts = self.choice_counts[members]
        first = np.cumsum(self.choice_counts, dtype=np.int64)[members] - counts
        at = np.repeat(np.arange(len(members)), counts), ranges(np.zeros_like(counts), counts)
        where, shape = ranges(first, counts), (len(members), int(self.choice_counts.max()))
        choices, probabilities = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        choices[at] = np.searchsorted(self.tokens, self.choices[where])
        probabilities[at] = self.probabilities[where]
        return choices, probabilities


@dataclass(frozen=True)
class DecisionRows(Rows):
    """Questions with choices of which one is right, or a probability of each: the data of decision models.

    format: "auto" or a name of decisions.py. labels: of rows with a text and a label, in the order of their
    letters; none: those of the training rows, sorted. question: asked about the text of such rows, or the
    instruction of a reranker's. too_long: "drop" leaves a row out that has more tokens than max_length,
    "error" stops; a decision cannot be truncated. packing: whether a row of max_length tokens has several
    decisions. Other fields: see Rows; loss_on, weighting and sample_by have no meaning here.
    """

    labels: tuple[str, ...] = ()
    question: str | None = None
    too_long: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("too_long", ("drop", "error"))
        self.require_choice("packing", (True, False))
        for name, value in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} has no meaning for decisions, which learn from the "
                    "answer alone; remove it"
                )
        if self.labels and not 2 <= len({*self.labels}) == len(self.labels) <= len(LETTERS):
            raise ValueError(f"data.labels={','.join(self.labels)}; use 2 to {len(LETTERS)} different labels")

    @property
    def token_settings(self) -> DecisionTokenSettings:
        """The settings that the tokens of a row depend on."""
        known = super().token_settings
        return DecisionTokenSettings(**vars(known), labels=self.labels, question=self.question)

    def tokenise(self, ref: str, settings: Any, tokenizer: Any, how: Tokenising) -> TokenisedDecisions:
        """Read the rows of `ref` and tokenise them, or load the tokens from the cache."""
        return tokenise_decisions(ref, settings, tokenizer, how)

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "DecisionSource":
        """Read, tokenise and plan the batches; see Dataset.open."""
        found = super(DecisionRows, self.with_labels()).open(tokenizer, shards, cache)
        rows: Any = found.split.rows
        info = replace(
            found.info,
            learned_ends={},
            stats=replace(found.info.stats, learned=_learned_line(rows, found.split.train)),
        )
        shapes = (with_choices(found.shapes[0], int(rows.choice_counts.max()), rows.tokens),)
        fields_of = {f.name: getattr(found, f.name) for f in fields(found)}
        source = DecisionSource(**{**fields_of, "info": info, "shapes": shapes})
        return replace(source, held_out=source.held_out_decisions())

    def abstract(self, shards: int = 1) -> Tokens:
        """Return the shapes of the largest batch that the settings allow."""
        return with_choices(super().abstract(shards), len(LETTERS), tuple(range(len(LETTERS))))

    def with_labels(self) -> "DecisionRows":
        """Return the settings with the labels of the training rows, if these have labels and data.labels
        names none. Raises ValueError for more labels than there are letters.
        """
        if self.labels:
            return self
        found = set[str]()
        for source in parse_sources(self.train):
            found |= _labels_of(source.ref, source.adapt(self))
        if len(found) > len(LETTERS):
            raise ValueError(
                f"data.train={self.train}: the rows have {len(found)} different labels, and a decision has "
                f"at most {len(LETTERS)} choices; name fewer by data.labels, or give each row its own choices"
            )
        return replace(self, labels=tuple(sorted(found)))


def _labels_of(ref: str, rows: DecisionRows) -> set[str]:
    """Return the labels of a dataset, none if its first row has no text and label."""
    own = list(islice(read_rows(ref), rows.max_samples))
    counts = formats.count_columns(own[:1], rows.columns, DECISION_SCHEMAS)
    format = attempt(formats.choose_format, counts, rows.format, rows.columns, DECISION_SCHEMAS)
    if isinstance(format, InvalidRow) or format.name != LABEL:
        return set()
    renamed = formats.rename_rows(format, own, rows.columns, DECISION_SCHEMAS)
    labels = [row.fields.get("label") for row in renamed if isinstance(row, Row)]
    return {DecisionChoice(label).name for label in labels if isinstance(label, str | int | float)}


def _learned_line(rows: TokenisedDecisions, train: np.ndarray) -> str:
    certain = int(np.count_nonzero(rows.probabilities[:] == 1))
    counts = rows.choice_counts[train]
    most = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.max()}"
    soft = len(rows) - certain
    detail = f"; {soft:,} rows have probabilities" if soft else ""
    return f"one token of each row is learned, its choice of {most}{detail}"


def is_decision(row: Row, columns: Sequence[str]) -> bool:
    """Whether a row has the columns of a format of decisions. columns: data.columns."""
    try:
        counts = formats.count_columns([row], columns, DECISION_SCHEMAS)
        formats.choose_format(counts, "auto", columns, DECISION_SCHEMAS)
    except ValueError:
        return False
    return True


def choice_names(rows: DecisionRows) -> dict[str, tuple[str, ...]]:
    """Return the values of the choices of every valid row, as text, by the name of the row. rows: with their
    labels, see with_labels.
    """
    held_out = held_out_sources(rows.held_out) if isinstance(rows.held_out, str) and rows.holds_out else []
    found = dict[str, tuple[str, ...]]()
    for source in (*parse_sources(rows.train), *held_out):
        own = list(islice(read_rows(source.ref), rows.max_samples))
        columns = source.adapt(rows).columns
        counts = formats.count_columns(own, columns, DECISION_SCHEMAS)
        format = formats.choose_format(counts, rows.format, columns, DECISION_SCHEMAS)
        for row in formats.rename_rows(format, own, columns, DECISION_SCHEMAS):
            decision = attempt(_read, row, format, rows.token_settings)
            if isinstance(decision, Decision):
                found[decision.name] = tuple(choice.name for choice in decision.choices)
    return found


def _read(row: Row | InvalidRow, format: RowFormat, settings: DecisionTokenSettings) -> Decision:
    return parse(valid(row), format.name, settings.labels, settings.question)


# ---- tokens


def tokenise_decisions(
    ref: str, settings: DecisionTokenSettings, tokenizer: Any, how: Tokenising
) -> TokenisedDecisions:
    """Read the rows of `ref` and tokenise them, or load the tokens from the cache."""
    kind = RowKind(
        version=VERSION,
        key=astuple(settings),
        settings=settings,
        stored=DECISION_COLUMNS,
        schemas=DECISION_SCHEMAS,
        tokenise=partial(_tokenise, settings=settings),
        further=(settings.order_by,) if settings.order_by else (),
    )
    found = tokenise_dataset(ref, kind, tokenizer, how)
    columns = row_fields(ref, found, settings.max_length)
    flat = {name: found.stored.columns[name] for name in ("choices", "probabilities")}
    return TokenisedDecisions(**{**columns, **flat}, warnings=found.notes)


def _tokenise(
    rows: Sequence[Row],
    format: RowFormat,
    tokenizer: Any,
    invalid: InvalidRows,
    settings: DecisionTokenSettings,
) -> ChunkColumns:
    """Return the columns of a chunk's rows; see RowKind."""
    renamed = formats.rename_rows(format, rows, settings.columns, DECISION_SCHEMAS)
    read = (attempt(_read, row, format, settings) for row in renamed)
    found = list(formats.by_their_names(read, format, settings.columns))
    chats = [x.prompt(settings.template) for x in found if isinstance(x, Decision)]
    prompts = chat.example_prompt_ids(chats, tokenizer, settings.template)
    columns: dict[str, list[Any]] = {name: [] for name in (*DECISION_COLUMNS, "index")}
    for number, outcome in enumerate(found):
        with invalid.skip():
            decision = valid(outcome)
            ids = valid(next(prompts))
            before, tokens = answer_tokens(tokenizer, decision.prefix, decision.answers)
            answer = tokens[int(np.argmax(decision.probabilities))]
            ids = [*ids, *before, answer]
            if len(ids) > settings.max_length:
                if settings.too_long == "error":
                    raise ValueError(
                        f"{decision.name}: {len(ids)} tokens are more than data.max_length="
                        f"{settings.max_length}; {remedy_for_too_long('max_length')}"
                    )
                continue
            order, name = 0.0, settings.order_by
            if name is not None:
                order = formats.number_of(rows[number], name, "data.order_by")
            row = {
                "ids": ids, "learned": np.arange(len(ids)) == len(ids) - 1, "counts": len(ids), "reads": 1,
                "truncated": False, "responses": 1, "learned_responses": int(decision.weight > 0),
                "ends": answer, "weights": decision.weight, "order": order, "placeholders": False,
                "pieces": 0, "mass": 1.0, "token_weights": np.zeros(0, np.float32), "weight_counts": 0,
                "choices": tokens, "probabilities": decision.probabilities, "choice_counts": len(tokens),
                "index": number,
            }  # fmt: skip
            for column, value in row.items():
                columns[column].append(value)
    part = {"index": np.asarray(columns["index"], np.int64)}
    for name, kind in DECISION_COLUMNS.items():
        if name not in files.NAMING:
            flat = np.concatenate([[], *columns[name]]) if kind.along else np.asarray(columns[name])
            part[name] = flat.astype(kind.dtype)
    return part


# ---- batches


def with_choices(rows: Tokens, most: int, tokens: tuple[int, ...]) -> Decisions:
    """Return the shapes of decisions from those of their rows. most: choices of a decision."""
    shape = (*rows.read.shape, most)
    choices, probabilities = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
    return Decisions(**vars(rows), choices=choices, probabilities=probabilities, tokens=tokens)


@dataclass(frozen=True)
class DecisionSource(RowSource):
    """Batches of Decisions; see Source."""

    def batch(self, step: int, state: TrainState | None = None) -> tuple[Decisions, Metrics]:
        """Return the batch of a step and no metrics."""
        tokens, metrics = super().batch(step)
        return self._decisions(tokens, self._rows_of(step)), metrics

    def held_out_decisions(self) -> tuple[Decisions, ...]:
        """Return the held-out batches with their choices."""
        size, found = self.shapes[0].ids.shape[1], list[Decisions]()
        for number, batch in enumerate(self.held_out):
            part = self.held_plan.slice(number * size, (number + 1) * size)
            found.append(self._decisions(batch, part))
        return tuple(found)

    def held_out_name(self, position: int) -> str:
        """Return the name of the decision at position row * M + its number in the row, of the rows that are
        evaluated.
        """
        _, rows, reads = self.held_out[0].read.shape
        row, number = divmod(position, reads)
        row = self.evaluated_batch(row // rows) * rows + row % rows
        return self.held_plan.slice(row, row + 1).names(self.split.rows.names)[0][number]

    def _decisions(self, rows: Tokens, plan: RowPlan) -> Decisions:
        """Return rows [micro, rows, ...] with the choices of the plan's members, in the order of their read
        positions.
        """
        tokenised: Any = self.split.rows
        micro, count, reads = rows.read.shape
        of_each, probability_of_each = tokenised.of_members(plan.members)
        shape = reads, of_each.shape[1]
        row = np.repeat(np.arange(plan.rows), np.diff(plan.offsets))
        number = np.arange(len(row)) - plan.offsets[row]
        per_micro = -(-self.settings.batch // self.settings.micro) if micro > 1 else count
        at = row // per_micro, row % per_micro, number
        choices = np.full((micro, count, *shape), -1, np.int32)
        probabilities = np.zeros((micro, count, *shape), np.float32)
        choices[at], probabilities[at] = of_each, probability_of_each
        return Decisions(**vars(rows), choices=choices, probabilities=probabilities, tokens=tokenised.tokens)
