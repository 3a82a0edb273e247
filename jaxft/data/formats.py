"""The formats of rows: one table of the columns of each, and how its rows are read.

`data.format=auto` uses the one whose columns are present, of those for the kind of data that a run reads:

    SFT
    text                    {"text"}
    messages                {"messages": [{"role", "content"}, ...]} and optionally "system"
    prompt-completion       {"prompt", "completion"}: strings or messages, see conversation.py
    instruction             {"instruction", "response" or "output"}, optionally "input", "history" (Alpaca)
    conversations           {"conversations": [{"from", "value"}, ...]} and optionally "system" (ShareGPT)

    pairs
    preference              {"prompt", "chosen", "rejected"}
    implicit                {"chosen", "rejected"}, whole conversations: their common beginning is the prompt;
                            or responses to a prompt of another name, such as "question"
    ranking                 {"conversations": [{"from", "value"}], "chosen", "rejected"} (ShareGPT)
    instruction             {"instruction", "chosen", "rejected"}, optionally "input" and "history" (Alpaca)
    unpaired                {"prompt", "completion", "label"}: one response, chosen if the label is true
    unpaired-messages       {"messages", "label"}: the response is the last turn
    unpaired-conversations  {"conversations", "label"} (ShareGPT)
    unpaired-instruction    {"instruction", "response" or "output", "label"} (Alpaca)

    decisions               see decisions.py

"label" may be called "kto_tag". `format="plain"` takes the strings of formats that may be plain as text
without a chat template. All formats but text may have the columns "tools" (JSON schemas) and
"chat_template_kwargs"; those of SFT "weight" (see loss_weights.py); those of pairs "reference", from which a
third response, "gold" (data.third), is read. Which format a dataset has, and columns with other names:
format_choice.py. Prompts without responses are read from the columns of all formats, see conversation.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxft.data.columns import text_of
from jaxft.data.conversation import (
    Columns,
    SplitRow,
    Turns,
    chat_of,
    chats_of,
    holds_responses,
    other_prompt,
    plain_texts,
    require_difference,
    response_index,
    split_row,
    with_prompt,
)
from jaxft.data.decisions import DECISION, LABEL, RERANKER, parse
from jaxft.data.example import RESPONSE, Example, Text
from jaxft.data.loss_weights import row_weight, without_weights
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import Row

SFT, PAIRS, PROMPTS, DECISIONS = "sft", "pairs", "prompts", "decisions"
Parse = Callable[[Row, RowSettings], dict[str, Example]]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # columns that any conversation may have
CHAT_COLUMNS = ("system", *TEMPLATE_COLUMNS, "weight")
PAIR_COLUMNS = ("system", "reference", *TEMPLATE_COLUMNS)
_EARLIER = ("input", "history")  # further columns of an instruction
_ANSWER = ("response", "output")
_LABEL = ("label", "kto_tag")
# CSV files have strings alone, and pandas writes integers of a column with gaps as floats.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


# ---- SFT


def _text(row: Row, settings: RowSettings) -> dict[str, Example]:
    return {RESPONSE: Text(row.name, text_of(row, "text"))}


def _conversation(row: Row, settings: RowSettings, column: str) -> dict[str, Example]:
    turns = split_row(row, column, {}).prompt
    return {RESPONSE: chat_of(row, turns, response_index(turns))}


def _completion(row: Row, settings: RowSettings) -> dict[str, Example]:
    columns = {RESPONSE: "completion"}
    return {**(plain_texts(row, columns) if settings.plain else _chats(row, "prompt", columns))}


def _instruction(row: Row, settings: RowSettings) -> dict[str, Example]:
    return {**_chats(row, "instruction", {RESPONSE: response_column(row)})}


def _chats(row: Row, prompt: str, columns: Columns) -> dict[str, Any]:
    return chats_of(row, split_row(row, prompt, columns))


def response_column(row: Row) -> str:
    """Return the column of the response to an instruction, response or output."""
    columns = [c for c in _ANSWER if c in row.fields]
    names = [c for c in columns if row.fields[c] is not None] or columns[:1]
    if len(names) > 1:
        raise row.invalid(
            "two response columns",
            "the row has both 'response' and 'output'; choose one with data.columns=response=...",
        )
    return names[0]


# ---- pairs


def _pair(row: Row, settings: RowSettings, prompt: str | None) -> dict[str, Example]:
    """Return the chosen and the rejected response. prompt: its column, None for that which they share."""
    return _compared(row, settings, prompt, {"chosen": "chosen", "rejected": "rejected"})


def _labelled(
    row: Row, settings: RowSettings, prompt: str, response: str | None = None
) -> dict[str, Example]:
    """Return the response as chosen or rejected, as the row's label says. response: its column, None for that
    of an instruction.
    """
    names = [name for name in _LABEL if name in row.fields]
    name = next((name for name in names if row.fields[name] not in (None, "")), names[0])
    label = _LABELS.get(str(row.fields[name]).strip().lower())
    if label is None:
        raise row.invalid(
            "label that is neither true nor false",
            f"{name} is {repr(row.fields[name])[:40]}; use true or false (or 1 or 0)",
        )
    kind = "chosen" if label else "rejected"
    return _compared(row, settings, prompt, {kind: response or response_column(row)})


def _compared(row: Row, settings: RowSettings, prompt: str | None, columns: Columns) -> dict[str, Example]:
    """Return the prompt with each response, those of settings.kinds. columns: of the responses by kind."""
    if "gold" in settings.kinds:
        if row.fields.get("reference") is None:
            raise row.invalid(
                "missing column 'reference'",
                f"no column 'reference', from which data.third=gold reads the third response; the "
                f"row has {', '.join(map(str, row.fields))}",
            )
        columns = {**columns, "gold": "reference"}
    if settings.plain:
        texts = plain_texts(row, columns)
        require_difference(row, texts)
        return {**texts}
    chats = chats_of(row, _split_pair(row, prompt, columns))
    return {kind: without_weights(chats[kind]) for kind in settings.kinds if kind in chats}


def _split_pair(row: Row, prompt_column: str | None, columns: Columns) -> SplitRow:
    """Return the row's prompt and responses, which are checked."""
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
        raise row.invalid(
            "prompt that ends with an assistant turn",
            "the prompt ends with an assistant turn; move that turn into the responses",
        )
    return split


def _check_response(row: Row, column: str, turns: Turns) -> None:
    if not turns or not ((turns[-1]["content"] or "").strip() or turns[-1].get("tool_calls")):
        raise row.invalid(
            "empty response", f"the response in column {column!r} is empty; fill it or remove the row"
        )
    for end, turn in (("begins", turns[0]), ("ends", turns[-1])):
        if turn["role"] != "assistant":
            raise row.invalid(
                "response that is no assistant turn",
                f"the response in column {column!r} {end} with a {turn['role']} turn; it must be "
                "an assistant turn",
            )


# ---- decisions


def _decision(row: Row, settings: RowSettings, format: str) -> dict[str, Example]:
    return {RESPONSE: parse(row, format, settings.labels, settings.question)}


# ---- numbers


def _pair_weight(row: Row, settings: RowSettings) -> float:
    """Return the number in the column data.weight_column, 1 without one."""
    column = settings.weight_column
    weight = 1.0 if column is None else number_of(row, column, "data.weight_column")
    if weight < 0:
        raise row.invalid("negative weight", f"the weight in column {column!r} is {weight:g}; use 0 or more")
    return weight


def _row_weight(row: Row, settings: RowSettings) -> float:
    return row_weight(row)


def number_of(row: Row, column: str, setting: str) -> float:
    """Return the finite number in a column that a setting names. Raises InvalidRow for anything else."""
    value: Any = row.fields.get(column)
    if value is None:
        columns = ", ".join(map(str, row.fields))
        raise row.invalid(
            "missing number", f"no number in column {column!r}, which {setting} names; the row has {columns}"
        )
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # CSV files have strings alone
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise row.invalid(
            "missing number", f"column {column!r} ({setting}) is {repr(value)[:40]}; use a finite number"
        )
    return number


# ---- the table


@dataclass(frozen=True)
class RowFormat:
    """A format of rows. A new one is an entry in ROW_FORMATS and its `parse`.

    name: of data.format. task: what its rows are for. required: its columns; a tuple lists the accepted names
    of one. parse(row, settings): the prompt with each response, by kind. optional: columns that it may have.
    plain: whether its strings may be plain text. weight: of a row in the loss.
    """

    name: str
    task: str
    required: tuple[tuple[str, ...], ...]
    parse: Parse
    optional: tuple[str, ...] = PAIR_COLUMNS
    plain: bool = False
    weight: Callable[[Row, RowSettings], float] = _pair_weight

    @property
    def columns(self) -> set[str]:
        """All columns that its rows may have."""
        return {*self.optional, *(column for names in self.required for column in names)}


def _sft(name: str, required: tuple[tuple[str, ...], ...], parse: Parse, *more: str) -> RowFormat:
    return RowFormat(name, SFT, required, parse, (*more, *CHAT_COLUMNS), weight=_row_weight)


def _decision_format(name: str, required: tuple[tuple[str, ...], ...], *more: str) -> RowFormat:
    optional = ("system", "chat_template_kwargs", "weight", *more)
    return RowFormat(name, DECISIONS, required, partial(_decision, format=name), optional, weight=_row_weight)


_PROMPT, _MESSAGES, _TURNS, _INSTRUCTION = ("prompt",), ("messages",), ("conversations",), ("instruction",)
_COMPARED = (("chosen",), ("rejected",))
ROW_FORMATS = (
    RowFormat("text", SFT, (("text",),), _text, ("weight",), plain=True, weight=_row_weight),
    _sft("messages", (_MESSAGES,), partial(_conversation, column="messages")),
    replace(_sft("prompt-completion", (_PROMPT, ("completion",)), _completion), plain=True),
    _sft("instruction", (_INSTRUCTION, _ANSWER), _instruction, *_EARLIER),
    _sft("conversations", (_TURNS,), partial(_conversation, column="conversations")),
    RowFormat("preference", PAIRS, (_PROMPT, *_COMPARED), partial(_pair, prompt="prompt"), plain=True),
    RowFormat("implicit", PAIRS, _COMPARED, partial(_pair, prompt=None)),
    RowFormat("ranking", PAIRS, (_TURNS, *_COMPARED), partial(_pair, prompt="conversations")),
    RowFormat(
        "instruction", PAIRS, (_INSTRUCTION, *_COMPARED), partial(_pair, prompt="instruction"),
        (*PAIR_COLUMNS, *_EARLIER),
    ),
    RowFormat(
        "unpaired", PAIRS, (_PROMPT, ("completion",), _LABEL),
        partial(_labelled, prompt="prompt", response="completion"), plain=True,
    ),
    RowFormat(
        "unpaired-messages", PAIRS, (_MESSAGES, _LABEL),
        partial(_labelled, prompt="messages", response="messages"),
    ),
    RowFormat(
        "unpaired-conversations", PAIRS, (_TURNS, _LABEL),
        partial(_labelled, prompt="conversations", response="conversations"),
    ),
    RowFormat(
        "unpaired-instruction", PAIRS, (_INSTRUCTION, _ANSWER, _LABEL),
        partial(_labelled, prompt="instruction"), (*PAIR_COLUMNS, *_EARLIER),
    ),
    _decision_format(DECISION, (("question", "messages"), ("choices",), ("answer",))),
    _decision_format(LABEL, (("text",), ("label",))),
    _decision_format(RERANKER, (("query",), ("document",), ("label",)), "instruction"),
)  # fmt: skip
# A name for rows of a task, for errors where another one reads them.
TASKS = {
    SFT: "SFT, for which there is the recipe sft",
    PAIRS: "preference pairs; train on pairs with the recipe dpo",
    DECISIONS: "decisions; train on them with the recipe decision",
}


def formats_of(task: str, numbers: tuple[str, ...] = ()) -> dict[str, RowFormat]:
    """Return the formats of a task by name. numbers: columns of numbers that rows of each may also have."""
    return {f.name: replace(f, optional=(*f.optional, *numbers)) for f in ROW_FORMATS if f.task == task}
