"""Bring preference rows into one shape: a prompt and the answers to it that are compared.

Accepted formats (`format="auto"` takes the one whose columns are there):

    preference   {"prompt", "chosen", "rejected"}
    implicit     {"chosen", "rejected"}, whole conversations: what they begin with in common is the prompt
    ranking      {"conversations": [{"from", "value"}, ...], "chosen", "rejected"} and optionally "system" (ShareGPT)
    instruction  {"instruction", "chosen", "rejected"} and optionally "input" and "system" (Alpaca)
    unpaired     {"prompt", "completion", "label"}: one answer, which is the chosen one where the label is true

An answer is a string, a message or a list of messages: the turns after the prompt, or the whole conversation. A prompt is a
list of messages or a string, which is the user's turn; `format="plain"` keeps the strings of preference and unpaired rows as
plain text instead. A conversation may be one string as in hh-rlhf, "\\n\\nHuman: ...\\n\\nAssistant: ...". A third answer, "gold"
(data.third), stands in the column "reference".
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxft.data import formats
from jaxft.data.chat import DATE
from jaxft.data.formats import Chat, Completion, Forms, Message
from jaxft.data.rows import Row

FORMS = Forms(
    needed={
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
Columns = dict[str, str]  # kind of answer -> the column it stands in


@dataclass(frozen=True)
class PairTokenSettings:
    """The settings that decide the tokens of a pair, and with them the key of the cache.

    extras: columns of numbers. kinds: the kinds of answers that a row has, "gold" among them or not.
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
class Pair:
    """Answers by kind, all with the same prompt; None where the row has none. numbers: of the extra columns."""

    name: str
    answers: dict[str, Chat | Completion | None]
    numbers: tuple[float, ...]
    weight: float


def normalise_pairs(rows: Sequence[Row], settings: PairTokenSettings) -> list[Pair]:
    """Every row as a Pair; the format is decided once, from the first row. Raises ValueError that names the row."""
    plain = settings.format == PLAIN
    if settings.format not in ("auto", PLAIN, *FORMS.needed):
        raise ValueError(
            f"data.format={settings.format!r}; wanted auto, {PLAIN} or one of {', '.join(FORMS.needed)}"
        )
    numbers = (*settings.extras, *([settings.weight_column] if settings.weight_column else []))
    forms = replace(FORMS, optional={name: (*names, *numbers) for name, names in FORMS.optional.items()})
    format, renamed = formats.decided(rows, "auto" if plain else settings.format, settings.columns, forms)
    if plain and format not in ("preference", "unpaired"):
        raise ValueError(
            f"{rows[0].name}: data.format={PLAIN} is for preference and unpaired rows, found {format}; leave it out"
        )
    return [_pair(row, format, settings) for row in renamed]


def _pair(row: Row, format: str, settings: PairTokenSettings) -> Pair:
    columns = _columns(row, format, settings)
    answers: dict[str, Chat | Completion]
    if settings.format == PLAIN:
        prompt = formats.string(row, "prompt", empty=True)
        found = {kind: formats.string(row, column) for kind, column in columns.items()}
        _refuse_identical(row, found)
        answers = {kind: Completion(row.name, prompt, text) for kind, text in found.items()}
    else:
        answers = _conversations(row, format, columns)
    weight = (
        1.0 if settings.weight_column is None else _number(row, settings.weight_column, "data.weight_column")
    )
    if weight < 0:
        raise ValueError(
            f"{row.name}: the weight in column {settings.weight_column!r} is {weight:g}; wanted 0 or more"
        )
    numbers = tuple(_number(row, column, "data.extras") for column in settings.extras)
    return Pair(row.name, {kind: answers.get(kind) for kind in settings.kinds}, numbers, weight)


def _columns(row: Row, format: str, settings: PairTokenSettings) -> Columns:
    gold = {"gold": "reference"} if "gold" in settings.kinds else {}
    if gold and row.fields.get("reference") is None:
        found = ", ".join(map(str, row.fields))
        raise ValueError(
            f"{row.name}: no column 'reference', which data.third=gold takes the third answer from; found: {found}"
        )
    if format != "unpaired":
        return {"chosen": "chosen", "rejected": "rejected", **gold}
    label = row.fields["label"]
    if not isinstance(label, int) or label not in (0, 1):  # bool is an int
        raise ValueError(f"{row.name}: label is {repr(label)[:40]}, wanted true or false (or 1 or 0)")
    return {"chosen" if label else "rejected": "completion", **gold}


def _number(row: Row, column: str, setting: str) -> float:
    value = row.fields.get(column)
    if value is None:
        found = ", ".join(map(str, row.fields))
        raise ValueError(f"{row.name}: no number in column {column!r} ({setting}); found columns: {found}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{row.name}: column {column!r} ({setting}) is {repr(value)[:40]}, wanted a finite number"
        )
    return float(value)


def _refuse_identical(row: Row, found: dict) -> None:
    if "chosen" in found and found.get("rejected") == found["chosen"]:
        raise ValueError(f"{row.name}: chosen and rejected are identical; a pair needs two different answers")


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
        case _ if isinstance(formats.parsed(row, "prompt"), str):
            prompt, found, single = _string_prompt(row, columns)
        case _:
            prompt = formats.system_of(row) + formats.messages_of(row, "prompt")
            found = _after_each(row, columns, prompt)
    _refuse_identical(row, found)
    for kind, turns in found.items():
        _check_answer(row, columns[kind], turns)
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{row.name}: the prompt ends with an assistant turn; wanted the user's, move it to the answers"
        )
    single = single and all(len(turns) == 1 for turns in found.values())
    tools = formats.tools_of(row)
    return {
        kind: Chat(row.name, (*prompt, *turns), len(prompt), single, tools) for kind, turns in found.items()
    }


def _check_answer(row: Row, column: str, turns: Turns) -> None:
    if not turns or not (turns[-1]["content"].strip() or "tool_calls" in turns[-1]):
        raise ValueError(f"{row.name}: the answer in column {column!r} is empty; fill it or remove the row")
    for place, turn in (("begins", turns[0]), ("ends", turns[-1])):
        if turn["role"] != "assistant":
            raise ValueError(
                f"{row.name}: the answer in column {column!r} {place} with a {turn['role']} turn, wanted assistant"
            )


def _turns(row: Row, column: str) -> Turns:
    """The column's messages; a string is an assistant turn."""
    value = formats.parsed(row, column)
    if isinstance(value, str):
        return [{"role": "assistant", "content": formats.string(row, column)}]
    items = [value] if isinstance(value, dict) else value
    first = items[0] if isinstance(items, list) and items else None
    names = ("from", "value") if isinstance(first, dict) and "from" in first else ("role", "content")
    return formats.messages_of(Row(row.name, {column: items}), column, *names)


def _after_each(row: Row, columns: Columns, prompt: Turns) -> dict[str, Turns]:
    return {kind: _after(row, column, prompt, _turns(row, column)) for kind, column in columns.items()}


def _after(row: Row, column: str, prompt: Turns, turns: Turns) -> Turns:
    """What follows the prompt in a column that holds the turns after it, or the conversation from its start."""
    if turns[: len(prompt)] == prompt:
        return turns[len(prompt) :]
    if turns[0]["role"] == "assistant":
        return turns
    at = next((i for i, (a, b) in enumerate(zip(prompt, turns, strict=False)) if a != b), len(turns))
    raise ValueError(
        f"{row.name}: column {column!r} begins with a turn of {turns[0]['role']} and is not the prompt's conversation (message "
        f"{at} differs); wanted the prompt's messages in front, or the answer alone"
    )


def _string_prompt(row: Row, columns: Columns) -> tuple[Turns, dict[str, Turns], bool]:
    text = formats.string(row, "prompt")
    strings = all(isinstance(formats.parsed(row, column), str) for column in columns.values())
    if strings and text.lstrip().startswith("Human:") and text.rstrip().endswith("\n\nAssistant:"):
        whole = {
            kind: dialogue(row, "prompt", f"{text} {formats.string(row, column)}")
            for kind, column in columns.items()
        }
        return _dialogue_ends(row, whole)
    question = [*formats.system_of(row), {"role": "user", "content": text}]
    found = {kind: _turns(row, column) for kind, column in columns.items()}
    if all(turns[0]["role"] == "assistant" for turns in found.values()):
        return question, found, True
    prompt = _shared(list(found.values())) if len(found) > 1 else next(iter(found.values()))[:-1]
    if not prompt or prompt[-1]["content"].strip() != text.strip():
        _refuse_identical(row, found)
        raise ValueError(
            f"{row.name}: the conversations in {' and '.join(columns.values())} do not begin alike up to a message that is the "
            "prompt; wanted the answers alone, or conversations that hold the prompt"
        )
    return prompt, {kind: turns[len(prompt) :] for kind, turns in found.items()}, False


def _shared(conversations: list[Turns]) -> Turns:
    """The messages that all begin with."""
    first = conversations[0]
    differs = lambda i: any(i >= len(c) or c[i] != first[i] for c in conversations)  # noqa: E731
    return first[: next((i for i in range(len(first)) if differs(i)), len(first))]


# ---- prompts that are told by what the answers share


def _implicit(row: Row, columns: Columns) -> tuple[Turns, dict[str, Turns]]:
    pair = {kind: column for kind, column in columns.items() if kind != "gold"}
    values = [formats.parsed(row, column) for column in pair.values()]
    if all(isinstance(value, str) for value in values):
        prompt, found, _ = _dialogue_ends(
            row, {kind: dialogue(row, c, formats.string(row, c)) for kind, c in pair.items()}
        )
    elif any(isinstance(value, str) for value in values):
        raise ValueError(
            f"{row.name}: of 'chosen' and 'rejected' one is a string; wanted both strings or both lists of messages"
        )
    else:
        whole = {kind: _turns(row, column) for kind, column in pair.items()}
        _refuse_identical(row, whole)
        prompt = _shared(list(whole.values()))
        if not prompt:
            raise ValueError(
                f"{row.name}: chosen and rejected share no first message, so there is no prompt; wanted conversations that begin "
                "alike, or a column 'prompt'"
            )
        found = {kind: turns[len(prompt) :] for kind, turns in whole.items()}
        first = [turns[0] for turns in found.values() if turns]
        if any(turn["role"] != "assistant" for turn in first):
            raise ValueError(
                f"{row.name}: chosen and rejected differ in message {len(prompt)}, which is no answer"
            )
    if "gold" in columns:
        found["gold"] = _after(row, columns["gold"], prompt, _turns(row, columns["gold"]))
    return prompt, found


def dialogue(row: Row, column: str, text: str) -> Turns:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..." (hh-rlhf). Raises ValueError that names the row."""
    before, *parts = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not parts or parts[0] != "Human":
        raise ValueError(
            f"{row.name}: column {column!r} is a string that does not begin with 'Human:'; without a column 'prompt' wanted a "
            "list of messages or a dialogue '\\n\\nHuman: ...\\n\\nAssistant: ...'"
        )
    return [
        {"role": _SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _dialogue_ends(row: Row, whole: dict[str, Turns]) -> tuple[Turns, dict[str, Turns], bool]:
    """Dialogues differ in their last turn and nowhere before."""
    _refuse_identical(row, whole)
    prompt, *others = [turns[:-1] for turns in whole.values()]
    if any(other != prompt for other in others):
        at = len(_shared(list(whole.values()))) + 1
        raise ValueError(
            f"{row.name}: the dialogues differ before their last turn (in turn {at}); wanted one prompt and two answers, repair "
            "or remove the row"
        )
    if not prompt:
        raise ValueError(
            f"{row.name}: a dialogue of one turn has no prompt; wanted '\\n\\nHuman: ...\\n\\nAssistant: ...'"
        )
    return prompt, {kind: turns[-1:] for kind, turns in whole.items()}, False
