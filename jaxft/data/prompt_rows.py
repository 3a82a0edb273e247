"""Tokenise the prompts of rollouts, and store them with the columns of their rows in a memory-mapped file."""

import base64
import datetime
import decimal
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, Float, Int, UInt64

from jaxft.data import chat
from jaxft.data.cache import ChunkColumns, ColumnType, ColumnTypes
from jaxft.data.columns import column_of
from jaxft.data.conversation import NO_PROMPT, other_columns, prompt_of
from jaxft.data.example import Chat, Completion, Message, as_given
from jaxft.data.flat import Flat, Made, RowNames
from jaxft.data.formats import RowFormat, number_of, split_column
from jaxft.data.invalid import InvalidCount, InvalidRow, InvalidRows, add_counts, attempt, valid
from jaxft.data.left_out import has_placeholder
from jaxft.data.mixture import Mixture
from jaxft.data.row_files import Row
from jaxft.data.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.tokenise import RowKind, Tokenising, tokenise_dataset
from jaxft.data.tokens import remedy_for_too_long
from jaxft.data.urls import file_name

VERSION = ("prompts", 3)  # increase it when the same rows become other tokens
ENVIRONMENT, EVERY_ROW = "environment", ""  # the column that names a row's environment, of several
PROMPT_COLUMN_TYPES: ColumnTypes = {
    "ids": ColumnType(np.int32, "counts"),
    "counts": ColumnType(np.int32),
    "fields": ColumnType(np.uint8, "field_bytes"),
    "field_bytes": ColumnType(np.int32),
    "hashes": ColumnType(np.uint64, width=2),
    "order": ColumnType(np.float64),
    "placeholders": ColumnType(np.bool_),
    "source": ColumnType(np.int32),
    "number": ColumnType(np.int64),
}


@dataclass(frozen=True)
class PromptTokenSettings:
    """The settings that the tokens of a prompt depend on; they are part of the cache key.

    tools: JSON of name -> schemas of the tools that a row's prompt has, where the row's column ENVIRONMENT is
    this name, or of EVERY_ROW; "" for those of the rows themselves. optional: whether a row without a prompt
    has an empty one, to which an environment adds.
    """

    columns: tuple[str, ...]
    format: str
    max_prompt: int
    too_long: str
    template: TemplateSettings
    order_by: str | None = None
    max_samples: int | None = None
    tools: str = ""
    optional: bool = False

    @property
    def tools_by_row(self) -> dict[str, list[Any]]:
        """The schemas by name, {} without any."""
        return json.loads(self.tools) if self.tools else {}


@dataclass(frozen=True)
class TokenisedPrompts:
    """Prompts as token ids, with the names and columns of their rows.

    prompts: the messages or texts before tokenising. template: how they were rendered. sources: for each
    prompt, the index of its source in source_names; both are () for a single source.
    """

    ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    prompts: tuple[Chat | Completion, ...]
    fields: tuple[dict[str, Any], ...]
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS
    sources: tuple[int, ...] = ()
    source_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def as_given(self, number: int) -> str | list[Message]:
        """Return a prompt as reward functions read it: a string or the messages."""
        return as_given(self.prompts[number])


@dataclass(frozen=True)
class PromptRows:
    """Prompts in a memory-mapped file, read when they are used.

    chosen: the indices in the file of the prompts that this object contains; all other arrays are indexed as
    the file is. ids, offsets: the tokens of prompt i are ids[offsets[i]:offsets[i + 1]]. texts, text_offsets:
    the columns of its row as JSON. hashes: of the tokens, and of tokens and columns together. largest_id: the
    largest token id. dropped: number of prompts that were left out as too long. invalid: the invalid rows
    that were left out. examples: prompts that warnings are derived from. order: the numbers of data.order_by,
    0 without it. placeholders: mask of prompts that are placeholders (see left_out.py). sources: the index of
    each prompt's source in source_names, which is () for a single source. formats: data.format of each
    source. notes: see TokenisedDataset. left_out: a clause that counts the prompts that data.drop has left
    out. mixture: the weights of the sources, if they have any; its indices are positions in `chosen`.
    """

    settings: PromptTokenSettings
    chosen: Int[np.ndarray, " prompts"]
    ids: Flat
    offsets: Int[np.ndarray, " all_plus_1"]
    texts: Flat
    text_offsets: Int[np.ndarray, " all_plus_1"]
    hashes: UInt64[np.ndarray, "all 2"]
    row_names: RowNames
    largest_id: int
    dropped: int
    invalid: tuple[InvalidCount, ...]
    examples: tuple[Chat | Completion, ...]
    order: Float[np.ndarray, " all"]
    placeholders: Bool[np.ndarray, " all"]
    sources: Int[np.ndarray, " all"]
    formats: tuple[str, ...]
    notes: tuple[str, ...] = ()
    left_out: str = ""
    source_names: tuple[str, ...] = ()
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> Int[np.ndarray, " prompts"]:
        """Tokens of each prompt."""
        return np.diff(self.offsets)[self.chosen]

    @property
    def names(self) -> Sequence[str]:
        """The names of the rows."""
        return Made(len(self), self._name)

    @property
    def fields(self) -> Sequence[dict[str, Any]]:
        """The columns of the rows."""
        return Made(len(self), self._fields)

    @property
    def token_ids(self) -> Sequence[tuple[int, ...]]:
        """The token ids of the prompts."""
        return Made(len(self), self._ids)

    def select(self, numbers: Sequence[int] | Int[np.ndarray, " n"]) -> TokenisedPrompts:
        """Read the prompts with these indices."""
        names = tuple(self._name(i) for i in numbers)
        fields = tuple(self._fields(i) for i in numbers)
        of_prompts = self.sources[self.chosen[np.asarray(numbers, np.int64)]]
        prompts = (
            row_prompt(Row(name, columns), self.formats[source], self.settings)
            for name, columns, source in zip(names, fields, of_prompts, strict=True)
        )
        ids = tuple(self._ids(i) for i in numbers)
        sources = of_prompts if self.source_names else ()
        return TokenisedPrompts(
            ids, names, tuple(prompts), fields, self.settings.template, tuple(map(int, sources)),
            self.source_names,
        )  # fmt: skip

    def subset(self, numbers: Int[np.ndarray, " n"]) -> "PromptRows":
        """Return the prompts with these indices, without the counts of what was left out."""
        return replace(self, chosen=self.chosen[numbers], dropped=0, invalid=())

    def concatenate(self, other: "PromptRows") -> "PromptRows":
        """Return all prompts of both, the other's last, which have the next source number."""
        sources = np.full(len(other.sources), self.sources.max() + 1)
        return replace(
            self,
            chosen=np.arange(len(self.order) + len(other.order)),
            ids=self.ids.concatenate(other.ids),
            offsets=np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            texts=self.texts.concatenate(other.texts),
            text_offsets=np.concatenate([self.text_offsets, other.text_offsets[1:] + self.text_offsets[-1]]),
            hashes=np.concatenate([self.hashes, other.hashes]),
            row_names=self.row_names.concatenate(other.row_names),
            largest_id=max(self.largest_id, other.largest_id),
            dropped=self.dropped + other.dropped,
            invalid=add_counts(self.invalid, other.invalid),
            examples=self.examples + other.examples,
            formats=self.formats + other.formats,
            notes=self.notes + other.notes,
            placeholders=np.concatenate([self.placeholders, other.placeholders]),
            order=np.concatenate([self.order, other.order]),
            sources=np.concatenate([self.sources, sources]),
        )

    def _name(self, number: int) -> str:
        return str(self.row_names[self.chosen[number]])

    def _ids(self, number: int) -> tuple[int, ...]:
        start, stop = self.offsets[self.chosen[number] :][:2]
        return tuple(self.ids[start:stop].tolist())

    def _fields(self, number: int) -> dict[str, Any]:
        start, stop = self.text_offsets[self.chosen[number] :][:2]
        return json.loads(self.texts[start:stop].tobytes(), object_hook=_value_of)


def tokenise_prompts(ref: str, settings: PromptTokenSettings, tokenizer: Any, how: Tokenising) -> PromptRows:
    """Read the prompts of `ref` and tokenise them as training does, or load the tokens from the cache.

    Raises ValueError that names the row.
    """
    kind = RowKind(
        version=VERSION,
        key=astuple(settings),
        settings=settings,
        stored=PROMPT_COLUMN_TYPES,
        schemas=None,
        tokenise=partial(_tokenise, settings=settings),
    )
    found = tokenise_dataset(ref, kind, tokenizer, how)
    if not len(found.names):
        raise ValueError(
            f"{ref}: all {found.dropped} prompts have more tokens than data.max_prompt="
            f"{settings.max_prompt}; raise it"
        )
    columns = found.stored.columns
    renamed = [rename_columns(row, settings.columns) for row in found.examples]
    examples = [row_prompt(row, settings.format, settings) for row in renamed]
    others = dict.fromkeys(item for row in renamed for item in other_columns(row, settings.format).items())
    read = RowFormat(settings.format, columns=tuple(others)).note()
    notes = [f"note: {file_name(ref)}: {note}" for note in read]

    def offsets(counts: str) -> Int[np.ndarray, " all_plus_1"]:
        return np.concatenate([[0], np.cumsum(np.asarray(columns[counts]), dtype=np.int64)])

    return PromptRows(
        settings=settings,
        chosen=np.arange(len(found.names)),
        ids=columns["ids"],
        offsets=offsets("counts"),
        texts=columns["fields"],
        text_offsets=offsets("field_bytes"),
        hashes=np.asarray(columns["hashes"]),
        row_names=found.names,
        largest_id=found.largest_id,
        dropped=found.dropped,
        invalid=found.invalid,
        examples=tuple(examples),
        order=np.asarray(columns["order"]),
        placeholders=np.asarray(columns["placeholders"]),
        sources=np.zeros(len(found.names), np.int64),
        formats=(settings.format,),
        notes=(*found.notes, *notes),
    )


def rename_columns(row: Row, columns: Sequence[str]) -> Row:
    """Return the row with the columns that items of data.columns, "ours=theirs", name, and all others.

    Raises InvalidRow if the row lacks one of them.
    """
    fields = dict(row.fields)
    for item in columns:
        ours, theirs = split_column(item)
        theirs = column_of(row.fields, theirs)
        if theirs not in row.fields:
            raise InvalidRow(
                row.name,
                f"missing column {theirs!r}",
                f"no column {theirs!r}, which data.columns={ours}={theirs} names; the row has "
                f"{', '.join(map(str, row.fields))}",
            )
        fields[ours] = row.fields[theirs]
    return Row(row.name, fields)


def row_prompt(row: Row, format: str, settings: PromptTokenSettings) -> Chat | Completion:
    """Return the prompt of a row with its tools. Raises InvalidRow, also for an environment that is none."""
    prompt: Chat | Completion
    try:
        prompt = prompt_of(row, format)
    except InvalidRow as error:
        if error.reason != NO_PROMPT or not settings.optional:
            raise
        prompt = Chat(row.name, ({"role": "user", "content": ""},), 1)
    fields, tools = row.fields, settings.tools_by_row
    if not tools:
        return prompt
    name = EVERY_ROW if EVERY_ROW in tools else fields.get(ENVIRONMENT)
    if not isinstance(name, str) or name not in tools:
        raise InvalidRow(
            prompt.name,
            "unknown environment",
            f"column {ENVIRONMENT!r} is {name!r}, which names no environment; use {', '.join(tools)}",
        )
    if isinstance(prompt, Completion):
        prompt = Chat(prompt.name, ({"role": "user", "content": prompt.prompt},), 1, plain=True)
    return replace(prompt, tools=tools[name] or prompt.tools)


def _tokenise(
    rows: Sequence[Row],
    format: RowFormat,
    tokenizer: Any,
    invalid: InvalidRows,
    settings: PromptTokenSettings,
) -> ChunkColumns:
    """Return the columns of a chunk's prompts; see RowKind."""

    def read(row: Row | InvalidRow) -> Chat | Completion:
        return row_prompt(valid(row), settings.format, settings)

    renamed = [attempt(rename_columns, row, settings.columns) for row in rows]
    examples = [attempt(read, row) for row in renamed]
    found = [prompt for prompt in examples if not isinstance(prompt, InvalidRow)]
    tokenised = chat.example_prompt_ids(found, tokenizer, settings.template)
    index, ids, texts, hashes = list[int](), list[np.ndarray](), list[np.ndarray](), list[list[int]]()
    order, column, empty = list[float](), settings.order_by, list[bool]()
    for number, (outcome, example) in enumerate(zip(renamed, examples, strict=True)):
        with invalid.skip():
            row = valid(outcome)
            if isinstance(example, InvalidRow):
                raise example
            tokens = valid(next(tokenised))
            if not tokens:
                raise InvalidRow(
                    row.name, "empty prompt", "the prompt has no tokens; fill it or remove the row"
                )
            if len(tokens) > settings.max_prompt:
                if settings.too_long == "error":
                    raise ValueError(
                        f"{row.name}: the prompt has {len(tokens)} tokens, more than "
                        f"data.max_prompt={settings.max_prompt}; {remedy_for_too_long('max_prompt')}"
                    )
                continue
            order.append(0.0 if column is None else number_of(row, column, "data.order_by"))
            index.append(number)
            empty.append(has_placeholder(example))
            ids.append(np.asarray(tokens, np.int32))
            texts.append(np.frombuffer(json.dumps(row.fields, default=_json_of).encode(), np.uint8))
            of_ids = xxhash.xxh3_64(ids[-1].tobytes())
            first = of_ids.intdigest()
            of_ids.update(texts[-1].tobytes())
            hashes.append([first, of_ids.intdigest()])
    return {
        "ids": np.concatenate([*ids, np.zeros(0, np.int32)]),
        "counts": np.array([len(x) for x in ids], np.int32),
        "fields": np.concatenate([*texts, np.zeros(0, np.uint8)]),
        "field_bytes": np.array([len(x) for x in texts], np.int32),
        "hashes": np.array(hashes, np.uint64).reshape(-1, 2),
        "order": np.array(order, np.float64),
        "placeholders": np.array(empty, np.bool_),
        "index": np.array(index, np.int64),
    }


# ---- values that JSON lacks, of columns that rewards read

_TYPE = "__type__"
_READERS: dict[str, Callable[[str], Any]] = {
    "bytes": base64.b64decode,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "Decimal": decimal.Decimal,
}


def _json_of(value: Any) -> Any:
    """Return JSON for a value of a table: of other types than _READERS its text."""
    name = type(value).__name__
    if isinstance(value, bytes):
        return {_TYPE: name, "value": base64.b64encode(value).decode()}
    if isinstance(value, datetime.date | datetime.time):
        return {_TYPE: name, "value": value.isoformat()}
    return {_TYPE: name, "value": str(value)} if isinstance(value, decimal.Decimal) else str(value)


def _value_of(found: dict[str, Any]) -> Any:
    """Return the value that `_json_of` has stored."""
    if found.keys() == {_TYPE, "value"} and found[_TYPE] in _READERS:
        return _READERS[found[_TYPE]](found["value"])
    return found
