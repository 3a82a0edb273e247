"""Normalise preference rows of several formats to a prompt and the responses that are compared.

Accepted formats (`format="auto"` uses the one whose columns are present):

    preference              {"prompt", "chosen", "rejected"}
    implicit                {"chosen", "rejected"}, whole conversations: their common beginning is the prompt;
                            or responses to a prompt of another name, such as "question"
    ranking                 {"conversations": [{"from", "value"}], "chosen", "rejected"} (ShareGPT)
    instruction             {"instruction", "chosen", "rejected"}, optionally "input" and "history" (Alpaca)
    unpaired                {"prompt", "completion", "label"}: one response, chosen if the label is true
    unpaired-messages       {"messages", "label"}: the response is the last turn
    unpaired-conversations  {"conversations", "label"} (ShareGPT)
    unpaired-instruction    {"instruction", "response" or "output", "label"} (Alpaca)

"label" may be called "kto_tag". Prompts, responses and the columns that go with them are read as for SFT, see
conversation.py; `format="plain"` takes the strings of preference and unpaired rows as plain text. A third
response, "gold" (data.third), is read from the column "reference".
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from jaxft.data import formats
from jaxft.data.conversation import (
    PLAIN,
    Columns,
    SplitRow,
    Turns,
    chats_of,
    holds_responses,
    other_prompt,
    plain_texts,
    require_difference,
    response_index,
    split_row,
    with_prompt,
)
from jaxft.data.example import Chat, Completion
from jaxft.data.formats import TEMPLATE_COLUMNS, RowFormat, Schemas
from jaxft.data.invalid import InvalidRow, attempt, valid
from jaxft.data.loss_weights import without_weights
from jaxft.data.rows import Row
from jaxft.data.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings

_COMPARED = (("chosen",), ("rejected",))
_LABEL = ("label", "kto_tag")
# CSV files have strings alone, and pandas writes integers of a column with gaps as floats.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_PROMPT_COLUMNS = {
    "preference": "prompt",
    "implicit": None,
    "ranking": "conversations",
    "instruction": "instruction",
    "unpaired": "prompt",
    "unpaired-messages": "messages",
    "unpaired-conversations": "conversations",
    "unpaired-instruction": "instruction",
}
PAIR_SCHEMAS = Schemas(
    required={
        "preference": (("prompt",), *_COMPARED),
        "implicit": _COMPARED,
        "ranking": (("conversations",), *_COMPARED),
        "instruction": (("instruction",), *_COMPARED),
        "unpaired": (("prompt",), ("completion",), _LABEL),
        "unpaired-messages": (("messages",), _LABEL),
        "unpaired-conversations": (("conversations",), _LABEL),
        "unpaired-instruction": (("instruction",), ("response", "output"), _LABEL),
    },
    optional={
        name: (
            "system",
            "reference",
            *TEMPLATE_COLUMNS,
            *(("input", "history") if "instruction" in name else ()),
        )
        for name in _PROMPT_COLUMNS
    },
    strings=("preference", "unpaired"),
    example=("prompt", "chosen", "rejected"),
)


@dataclass(frozen=True)
class PairTokenSettings:
    """The settings that the tokens of a pair depend on; they are part of the cache key.

    extras: columns of numbers. kinds: the kinds of responses of a row, with or without "gold".
    """

    columns: tuple[str, ...] = ()
    format: str = "auto"
    max_length: int = 1024
    too_long: str = "truncate"
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS
    extras: tuple[str, ...] = ()
    weight_column: str | None = None
    kinds: tuple[str, ...] = ("chosen", "rejected")
    order_by: str | None = None
    max_samples: int | None = None


@dataclass(frozen=True, slots=True)
class PairExample:
    """Responses to one prompt by kind, None for a missing one.

    extras: the numbers of the columns data.extras. order: the number of the column data.order_by.
    """

    name: str
    responses: dict[str, Chat | Completion | None]
    extras: tuple[float, ...]
    weight: float
    order: float = 0.0


def normalise_pairs(rows: Sequence[Row], settings: PairTokenSettings) -> list[PairExample]:
    """Return every row as a PairExample. All have one format, by default the one that most rows fit.

    Raises InvalidRow for the first row that does not have it, and ValueError for wrong settings.
    """
    return [valid(pair) for pair in normalise_each_pair(rows, settings)]


def normalise_each_pair(
    rows: Sequence[Row], settings: PairTokenSettings
) -> Iterator[PairExample | InvalidRow]:
    """Yield every row as a PairExample or an InvalidRow; see normalise_pairs."""
    schemas = pair_schemas(settings)
    counts = formats.count_columns(rows, settings.columns, schemas)
    return normalise_pairs_as(
        formats.choose_format(counts, settings.format, settings.columns, schemas), rows, settings
    )


def pair_schemas(settings: PairTokenSettings) -> Schemas:
    """Return the formats of preference rows, with the columns of numbers that the settings name."""
    numbers = (*settings.extras, *filter(None, (settings.weight_column, settings.order_by)))
    optional = {name: (*names, *numbers) for name, names in PAIR_SCHEMAS.optional.items()}
    return replace(PAIR_SCHEMAS, optional=optional)


def normalise_pairs_as(
    format: RowFormat, rows: Iterable[Row], settings: PairTokenSettings
) -> Iterator[PairExample | InvalidRow]:
    """Yield every row as a PairExample of this format or an InvalidRow."""

    def convert(row: Row | InvalidRow) -> PairExample:
        return _pair(valid(row), format.name, settings)

    renamed = formats.rename_rows(format, rows, settings.columns, pair_schemas(settings))
    return formats.by_their_names((attempt(convert, row) for row in renamed), format, settings.columns)


def _pair(row: Row, format: str, settings: PairTokenSettings) -> PairExample:
    columns = _columns(row, format, settings)
    responses: dict[str, Chat | Completion]
    if settings.format == PLAIN:
        responses = dict(plain_texts(row, columns))
        require_difference(row, responses)
    else:
        chats = chats_of(row, _split(row, format, columns))
        responses = {kind: without_weights(chat) for kind, chat in chats.items()}
    weight = (
        1.0
        if settings.weight_column is None
        else formats.number_of(row, settings.weight_column, "data.weight_column")
    )
    if weight < 0:
        raise InvalidRow(
            row.name,
            "negative weight",
            f"the weight in column {settings.weight_column!r} is {weight:g}; use 0 or more",
        )
    extras = tuple(formats.number_of(row, column, "data.extras") for column in settings.extras)
    column = settings.order_by
    order = 0.0 if column is None else formats.number_of(row, column, "data.order_by")
    return PairExample(
        row.name, {kind: responses.get(kind) for kind in settings.kinds}, extras, weight, order
    )


def _columns(row: Row, format: str, settings: PairTokenSettings) -> Columns:
    gold = {"gold": "reference"} if "gold" in settings.kinds else {}
    if gold and row.fields.get("reference") is None:
        raise InvalidRow(
            row.name,
            "missing column 'reference'",
            f"no column 'reference', from which data.third=gold reads the third response; the "
            f"row has {', '.join(map(str, row.fields))}",
        )
    if not format.startswith("unpaired"):
        return {"chosen": "chosen", "rejected": "rejected", **gold}
    names = [name for name in _LABEL if name in row.fields]
    name = next((name for name in names if row.fields[name] not in (None, "")), names[0])
    label = _LABELS.get(str(row.fields[name]).strip().lower())
    if label is None:
        raise InvalidRow(
            row.name,
            "label that is neither true nor false",
            f"{name} is {repr(row.fields[name])[:40]}; use true or false (or 1 or 0)",
        )
    response = "completion" if format == "unpaired" else _PROMPT_COLUMNS[format]
    if format == "unpaired-instruction":
        response = formats.response_column(row)
    return {"chosen" if label else "rejected": str(response), **gold}


def _split(row: Row, format: str, columns: Columns) -> SplitRow:
    """Return the row's prompt and responses, which are checked."""
    prompt_column = _PROMPT_COLUMNS[format]
    if prompt_column is None and holds_responses(row) and other_prompt(row) is not None:
        row, prompt_column = with_prompt(row), "prompt"
    require_difference(row, {kind: row.fields[column] for kind, column in columns.items()})
    split = split_row(row, prompt_column, {k: c for k, c in columns.items() if c != prompt_column})
    ending = [kind for kind, column in columns.items() if column == prompt_column]
    if ending:  # the conversation ends with the response
        at = response_index(split.prompt)
        split = SplitRow(split.prompt[:at], {ending[0]: split.prompt[at:], **split.responses})
    require_difference(row, split.responses)
    for kind, turns in split.responses.items():
        _check_response(row, columns[kind], turns)
    if split.prompt and split.prompt[-1]["role"] == "assistant":
        raise InvalidRow(
            row.name,
            "prompt that ends with an assistant turn",
            "the prompt ends with an assistant turn; move that turn into the responses",
        )
    return split


def _check_response(row: Row, column: str, turns: Turns) -> None:
    if not turns or not ((turns[-1]["content"] or "").strip() or turns[-1].get("tool_calls")):
        raise InvalidRow(
            row.name,
            "empty response",
            f"the response in column {column!r} is empty; fill it or remove the row",
        )
    for end, turn in (("begins", turns[0]), ("ends", turns[-1])):
        if turn["role"] != "assistant":
            raise InvalidRow(
                row.name,
                "response that is no assistant turn",
                f"the response in column {column!r} {end} with a {turn['role']} turn; it must be "
                "an assistant turn",
            )
