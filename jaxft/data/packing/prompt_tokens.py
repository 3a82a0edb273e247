"""Prompts of rollouts as token ids, with the columns of their rows as JSON."""

import base64
import datetime
import decimal
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxft.data.chat import loss_mask
from jaxft.data.chat.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.packing.cache import ColumnTypes
from jaxft.data.packing.reader import CutRows, ParsedRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.sft_tokens import remedy_for_too_long
from jaxft.data.packing.tokenised import ROW_FIELDS, TokenisedRows, ragged
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import formats
from jaxft.data.rows.columns import column_of
from jaxft.data.rows.conversation import NO_PROMPT, prompt_of
from jaxft.data.rows.example import PROMPT, Chat, Completion, Message, ParsedRow, as_given
from jaxft.data.rows.format_choice import ChosenFormat, split_column
from jaxft.data.rows.formats import number_of
from jaxft.data.rows.invalid import InvalidRow, attempt, valid
from jaxft.data.rows.row_files import Row

ENVIRONMENT, EVERY_ROW = "environment", ""  # the column that names a row's environment, of several


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


def _parse(format: ChosenFormat, rows: Iterable[Row], settings: RowSettings, task: str) -> ParsedRows:
    def read(row: Row) -> ParsedRow:
        renamed, column = rename_columns(row, settings.columns), settings.order_by
        prompt = row_prompt(renamed, settings)
        order = 0.0 if column is None else number_of(renamed, column, "data.order_by")
        return ParsedRow(row.name, {PROMPT: prompt}, order=order, fields=renamed.fields)

    return (attempt(read, row) for row in rows)


def _tokenise(rows: Sequence[ParsedRow | InvalidRow], reader: Reader) -> CutRows:
    """Yield each prompt as an example without a response, [] if it is left out as too long."""
    prompts: list[Any] = [row.examples[PROMPT] for row in rows if isinstance(row, ParsedRow)]
    tokenised = loss_mask.example_prompt_ids(prompts, reader.tokenizer, reader.settings.template)
    for row in rows:
        yield row if isinstance(row, InvalidRow) else attempt(_prompt_of, row, next(tokenised), reader)


def _prompt_of(row: ParsedRow, outcome: list[int] | InvalidRow, reader: Reader) -> list[TokenisedRow]:
    ids, limit = np.asarray(valid(outcome), np.int32), reader.settings.max_length
    if not len(ids):
        raise InvalidRow(row.name, "empty prompt", "the prompt has no tokens; fill it or remove the row")
    if len(ids) > limit:
        if reader.settings.too_long == "error":
            raise ValueError(
                f"{row.name}: the prompt has {len(ids)} tokens, more than data.max_prompt={limit}; "
                f"{remedy_for_too_long('max_prompt')}"
            )
        return []
    text = np.frombuffer(json.dumps(row.fields, default=_json_of).encode(), np.uint8)
    return [TokenisedRow(ids, np.zeros(len(ids), bool), [len(ids)], False, 0, 0, {ROW_FIELDS: text})]


def _extras(settings: RowSettings) -> ColumnTypes:
    """Return the further column: the columns of the dataset as JSON, which rewards read."""
    return ragged(ROW_FIELDS, np.uint8)


PROMPT_TASK = RowTask(formats.PROMPTS, 4, "max_prompt", _tokenise, _extras, _parse)


def row_fields(rows: TokenisedRows, number: int) -> dict[str, Any]:
    """Return the columns of a row of the dataset."""
    return json.loads(rows.extras[ROW_FIELDS][number].tobytes(), object_hook=_value_of)


def rename_columns(row: Row, columns: Sequence[str]) -> Row:
    """Return the row with the columns that items of data.columns, "ours=theirs", name, and all others.

    Raises InvalidRow if the row lacks one of them.
    """
    fields = dict(row.fields)
    for item in columns:
        ours, theirs = split_column(item)
        theirs = column_of(row.fields, theirs)
        if theirs not in row.fields:
            raise row.invalid(
                f"missing column {theirs!r}",
                f"no column {theirs!r}, which data.columns={ours}={theirs} names; the row has "
                f"{', '.join(map(str, row.fields))}",
            )
        fields[ours] = row.fields[theirs]
    return Row(row.name, fields)


def row_prompt(row: Row, settings: RowSettings) -> Chat | Completion:
    """Return the prompt of a row with its tools. Raises InvalidRow, also for an environment that is none."""
    prompt: Chat | Completion
    try:
        prompt = prompt_of(row, settings.format)
    except InvalidRow as error:
        if error.reason != NO_PROMPT or not settings.optional:
            raise
        prompt = Chat(row.name, ({"role": "user", "content": ""},), 1)
    fields, tools = row.fields, json.loads(settings.tools) if settings.tools else {}
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
