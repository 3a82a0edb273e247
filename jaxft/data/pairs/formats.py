"""Normalise preference rows of several formats to a prompt and the responses that are compared.

Accepted formats (`format="auto"` uses the one whose columns are present):

    preference   {"prompt", "chosen", "rejected"}
    implicit     {"chosen", "rejected"}, whole conversations: their common beginning is the prompt
    ranking      {"conversations": [{"from", "value"}], "chosen", "rejected"} (ShareGPT), optionally "system"
    instruction  {"instruction", "chosen", "rejected"} and optionally "input" and "system" (Alpaca)
    unpaired     {"prompt", "completion", "label"}: one response, the chosen one if the label is true

A response is a string, a message or a list of messages: the turns after the prompt, or the whole
conversation. A prompt is a list of messages or a string, which is the user's turn; `format="plain"` uses the
strings of preference and unpaired rows as plain text instead. A conversation may be one string as in hh-rlhf,
"\\n\\nHuman: ...\\n\\nAssistant: ...". A third response, "gold" (data.third), is read from the column
"reference".
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxft.data import formats
from jaxft.data.chat import DATE
from jaxft.data.example import Chat, Completion, Message
from jaxft.data.formats import Schemas
from jaxft.data.invalid import InvalidRow, attempt, valid
from jaxft.data.rows import Row

PAIR_SCHEMAS = Schemas(
    required={
        "preference": (("prompt",), ("chosen",), ("rejected",)),
        "implicit": (("chosen",), ("rejected",)),
        "ranking": (("conversations",), ("chosen",), ("rejected",)),
        "instruction": (("instruction",), ("chosen",), ("rejected",)),
        "unpaired": (("prompt",), ("completion",), ("label",)),
    },
    optional={
        "preference": ("system", "tools", "reference"),
        "implicit": ("tools", "reference"),
        "ranking": ("system", "tools", "reference"),
        "instruction": ("input", "system", "reference"),
        "unpaired": ("system", "tools", "reference"),
    },
    example="prompt=...,chosen=...,rejected=...",
)
PLAIN = "plain"
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")

Turns = list[Message]
Columns = dict[str, str]  # kind of response -> its column


@dataclass(frozen=True)
class PairTokenSettings:
    """The settings that the tokens of a pair depend on; they are part of the cache key.

    extras: columns of numbers. kinds: the kinds of responses of a row, with or without "gold".
    """

    columns: tuple[str, ...] = ()
    format: str = "auto"
    max_length: int = 1024
    too_long: str = "truncate"
    date: str = DATE
    extras: tuple[str, ...] = ()
    weight_column: str | None = None
    kinds: tuple[str, ...] = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class PairExample:
    """Responses to one prompt by kind, None for a missing one. extras: the numbers of the extra columns."""

    name: str
    responses: dict[str, Chat | Completion | None]
    extras: tuple[float, ...]
    weight: float


def normalise_pairs(rows: Sequence[Row], settings: PairTokenSettings) -> list[PairExample]:
    """Return every row as a PairExample. All have one format, by default the one that most rows fit.

    Raises InvalidRow for the first row that does not have it, and ValueError for wrong settings.
    """
    return [valid(pair) for pair in normalise_each_pair(rows, settings)]


def normalise_each_pair(
    rows: Sequence[Row], settings: PairTokenSettings
) -> Iterator[PairExample | InvalidRow]:
    """Yield every row as a PairExample, or what is wrong with it; see normalise_pairs."""
    plain = settings.format == PLAIN
    if settings.format not in ("auto", PLAIN, *PAIR_SCHEMAS.required):
        raise ValueError(
            f"data.format={settings.format!r}; use auto, {PLAIN} or one of {', '.join(PAIR_SCHEMAS.required)}"
        )
    numbers = (*settings.extras, *([settings.weight_column] if settings.weight_column else []))
    optional = {name: (*names, *numbers) for name, names in PAIR_SCHEMAS.optional.items()}
    schemas = replace(PAIR_SCHEMAS, optional=optional)
    format, renamed = formats.detect_format(
        rows, "auto" if plain else settings.format, settings.columns, schemas
    )
    if plain and format not in ("preference", "unpaired"):
        raise ValueError(
            f"{rows[0].name}: data.format={PLAIN} is for preference and unpaired rows, and this row has "
            f"format {format}; set data.format=auto"
        )

    def convert(row: Row | InvalidRow) -> PairExample:
        return _pair(valid(row), format, settings)

    return (attempt(convert, row) for row in renamed)


def _pair(row: Row, format: str, settings: PairTokenSettings) -> PairExample:
    columns = _columns(row, format, settings)
    responses: dict[str, Chat | Completion]
    if settings.format == PLAIN:
        prompt = formats.text_of(row, "prompt", empty=True)
        texts = {kind: formats.text_of(row, column) for kind, column in columns.items()}
        _require_difference(row, texts)
        responses = {kind: Completion(row.name, prompt, text) for kind, text in texts.items()}
    else:
        responses = _conversations(row, format, columns)
    weight = (
        1.0 if settings.weight_column is None else _number(row, settings.weight_column, "data.weight_column")
    )
    if weight < 0:
        raise InvalidRow(
            row.name,
            "negative weight",
            f"the weight in column {settings.weight_column!r} is {weight:g}; use 0 or more",
        )
    extras = tuple(_number(row, column, "data.extras") for column in settings.extras)
    return PairExample(row.name, {kind: responses.get(kind) for kind in settings.kinds}, extras, weight)


def _columns(row: Row, format: str, settings: PairTokenSettings) -> Columns:
    gold = {"gold": "reference"} if "gold" in settings.kinds else {}
    if gold and row.fields.get("reference") is None:
        raise InvalidRow(
            row.name,
            "missing column 'reference'",
            f"no column 'reference', from which data.third=gold reads the third response; the "
            f"row has {', '.join(map(str, row.fields))}",
        )
    if format != "unpaired":
        return {"chosen": "chosen", "rejected": "rejected", **gold}
    label = row.fields["label"]
    if not isinstance(label, int) or label not in (0, 1):  # bool is an int
        raise InvalidRow(
            row.name,
            "label that is neither true nor false",
            f"label is {repr(label)[:40]}; use true or false (or 1 or 0)",
        )
    return {"chosen" if label else "rejected": "completion", **gold}


def _number(row: Row, column: str, setting: str) -> float:
    value = row.fields.get(column)
    if value is None:
        columns = ", ".join(map(str, row.fields))
        raise InvalidRow(
            row.name,
            "missing number",
            f"no number in column {column!r}, which {setting} names; the row has {columns}",
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRow(
            row.name,
            "missing number",
            f"column {column!r} ({setting}) is {repr(value)[:40]}; use a finite number",
        )
    return float(value)


def _require_difference(row: Row, responses: dict) -> None:
    if "chosen" in responses and responses.get("rejected") == responses["chosen"]:
        raise InvalidRow(
            row.name, "identical responses", "chosen and rejected are identical; change one or remove the row"
        )


# ---- conversations


def _conversations(row: Row, format: str, columns: Columns) -> dict[str, Chat | Completion]:
    single = False
    match format:
        case "implicit":
            prompt, found = _implicit(row, columns)
        case "ranking":
            prompt = formats.system_of(row) + formats.messages_of(row, "conversations", "from", "value")
            found = _after_each(row, columns, prompt)
        case "instruction":
            prompt, single = formats.instruction_of(row), True
            found = _after_each(row, columns, prompt)
        case _ if isinstance(formats.json_of(row, "prompt"), str):
            prompt, found, single = _string_prompt(row, columns)
        case _:
            prompt = formats.system_of(row) + formats.messages_of(row, "prompt")
            found = _after_each(row, columns, prompt)
    _require_difference(row, found)
    for kind, turns in found.items():
        _check_response(row, columns[kind], turns)
    if prompt[-1]["role"] == "assistant":
        raise InvalidRow(
            row.name,
            "prompt that ends with an assistant turn",
            "the prompt ends with an assistant turn; move that turn into the responses",
        )
    single = single and all(len(turns) == 1 for turns in found.values())
    tools = formats.tools_of(row)
    return {
        kind: Chat(row.name, (*prompt, *turns), len(prompt), single, tools) for kind, turns in found.items()
    }


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


def _turns(row: Row, column: str) -> Turns:
    """Return the column's messages; a string is an assistant turn."""
    value = formats.json_of(row, column)
    if isinstance(value, str):
        return [{"role": "assistant", "content": formats.text_of(row, column)}]
    items = [value] if isinstance(value, dict) else value
    first = items[0] if isinstance(items, list) and items else None
    names = ("from", "value") if isinstance(first, dict) and "from" in first else ("role", "content")
    return formats.messages_of(Row(row.name, {column: items}), column, *names)


def _after_each(row: Row, columns: Columns, prompt: Turns) -> dict[str, Turns]:
    return {kind: _after(row, column, prompt, _turns(row, column)) for kind, column in columns.items()}


def _after(row: Row, column: str, prompt: Turns, turns: Turns) -> Turns:
    """Return the turns after the prompt from a column with these turns or with the whole conversation."""
    if turns[: len(prompt)] == prompt:
        return turns[len(prompt) :]
    if turns[0]["role"] == "assistant":
        return turns
    at = next((i for i, (a, b) in enumerate(zip(prompt, turns, strict=False)) if a != b), len(turns))
    raise InvalidRow(
        row.name,
        "conversation that differs from the prompt",
        f"column {column!r} begins with a {turns[0]['role']} turn, and its message {at} differs "
        "from the prompt's; put the prompt's messages in front, or the response alone",
    )


def _string_prompt(row: Row, columns: Columns) -> tuple[Turns, dict[str, Turns], bool]:
    text = formats.text_of(row, "prompt")
    strings = all(isinstance(formats.json_of(row, column), str) for column in columns.values())
    if strings and text.lstrip().startswith("Human:") and text.rstrip().endswith("\n\nAssistant:"):
        whole = {
            kind: dialogue(row, "prompt", f"{text} {formats.text_of(row, column)}")
            for kind, column in columns.items()
        }
        return _dialogue_ends(row, whole)
    question = [*formats.system_of(row), {"role": "user", "content": text}]
    found = {kind: _turns(row, column) for kind, column in columns.items()}
    if all(turns[0]["role"] == "assistant" for turns in found.values()):
        return question, found, True
    prompt = _shared(list(found.values())) if len(found) > 1 else next(iter(found.values()))[:-1]
    if not prompt or (prompt[-1]["content"] or "").strip() != text.strip():
        _require_difference(row, found)
        raise InvalidRow(
            row.name,
            "conversation that differs from the prompt",
            f"the common beginning of the conversations in {' and '.join(columns.values())} does "
            "not end with the prompt; use the responses alone, or conversations that contain the prompt",
        )
    return prompt, {kind: turns[len(prompt) :] for kind, turns in found.items()}, False


def _shared(conversations: list[Turns]) -> Turns:
    """Return the common first messages of all conversations."""
    first = conversations[0]

    def differs(i: int) -> bool:
        return any(i >= len(c) or c[i] != first[i] for c in conversations)

    return first[: next((i for i in range(len(first)) if differs(i)), len(first))]


# ---- implicit prompts: the common beginning of the responses


def _implicit(row: Row, columns: Columns) -> tuple[Turns, dict[str, Turns]]:
    pair = {kind: column for kind, column in columns.items() if kind != "gold"}
    values = [formats.json_of(row, column) for column in pair.values()]
    if all(isinstance(value, str) for value in values):
        prompt, found, _ = _dialogue_ends(
            row, {kind: dialogue(row, c, formats.text_of(row, c)) for kind, c in pair.items()}
        )
    elif any(isinstance(value, str) for value in values):
        raise InvalidRow(
            row.name,
            "responses of different types",
            "only one of 'chosen' and 'rejected' is a string; use two strings or two lists of messages",
        )
    else:
        whole = {kind: _turns(row, column) for kind, column in pair.items()}
        _require_difference(row, whole)
        prompt = _shared(list(whole.values()))
        if not prompt:
            raise InvalidRow(
                row.name,
                "conversations without a common beginning",
                "chosen and rejected have no common first message, so there is no prompt; use "
                "conversations with a common beginning, or a column 'prompt'",
            )
        found = {kind: turns[len(prompt) :] for kind, turns in whole.items()}
        first = [turns[0] for turns in found.values() if turns]
        if any(turn["role"] != "assistant" for turn in first):
            raise InvalidRow(
                row.name,
                "dialogues that differ before the last turn",
                f"chosen and rejected differ in message {len(prompt)}, which is not an assistant "
                "turn; fix or remove the row",
            )
    if "gold" in columns:
        found["gold"] = _after(row, columns["gold"], prompt, _turns(row, columns["gold"]))
    return prompt, found


def dialogue(row: Row, column: str, text: str) -> Turns:
    """Parse "\\n\\nHuman: ...\\n\\nAssistant: ..." (hh-rlhf) into turns.

    Raises ValueError that names the row.
    """
    before, *parts = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not parts or parts[0] != "Human":
        raise InvalidRow(
            row.name,
            "string that is no dialogue",
            f"column {column!r} is a string that does not begin with 'Human:'; without a column "
            "'prompt' use a list of messages or a dialogue '\\n\\nHuman: ...\\n\\nAssistant: ...'",
        )
    return [
        {"role": _SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _dialogue_ends(row: Row, whole: dict[str, Turns]) -> tuple[Turns, dict[str, Turns], bool]:
    """Split dialogues that differ in their last turn alone into the prompt and the responses."""
    _require_difference(row, whole)
    prompt, *others = [turns[:-1] for turns in whole.values()]
    if any(other != prompt for other in others):
        at = len(_shared(list(whole.values()))) + 1
        raise InvalidRow(
            row.name,
            "dialogues that differ before the last turn",
            f"the dialogues differ in turn {at}, before their last turn; fix the row so that "
            "only the last turn differs, or remove it",
        )
    if not prompt:
        raise InvalidRow(
            row.name,
            "dialogue without a prompt",
            "a dialogue of one turn has no prompt; use '\\n\\nHuman: ...\\n\\nAssistant: ...'",
        )
    return prompt, {kind: turns[-1:] for kind, turns in whole.items()}, False
