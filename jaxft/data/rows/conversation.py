"""Split a row into its prompt and its responses, the same for SFT, preferences, reward models, rollouts and
generation.

A string as a prompt is a user turn, and a string as a response an assistant turn; with `data.format=plain`
both are plain text. A prompt may also be an hh-rlhf dialogue that ends with "\\n\\nAssistant:". A response is
a string, a message or a list of messages: either the turns after the prompt or the full conversation. The
columns `system`, `tools` and `chat_template_kwargs` apply to every prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxft.data.rows.columns import (
    COLUMN_SYNONYMS,
    dialogue_of,
    further_columns,
    instruction_of,
    is_dialogue,
    is_open_dialogue,
    json_of,
    messages_of,
    other_name,
    respelled,
    suggested_columns,
    template_arguments_of,
    text_of,
    tools_of,
    with_system,
)
from jaxft.data.rows.example import Chat, Completion, Message, split_weights, without_weights
from jaxft.data.rows.row_files import Row

PLAIN = "plain"  # the value of data.format for which strings are plain text
NO_PROMPT = "no prompt"  # the reason of an invalid row
PROMPT_COLUMNS = ("prompt", "instruction", "messages", "conversations")
PROMPT_FORMATS = ("auto", PLAIN, *PROMPT_COLUMNS, "implicit")
_KNOWN = frozenset((
    *PROMPT_COLUMNS, "input", "history", "system", "tools", "chat_template_kwargs", "completion", "response",
    "output", "chosen", "rejected",
))  # fmt: skip

Turns = list[Message]
Columns = dict[str, str]  # kind of response -> its column


@dataclass(frozen=True)
class SplitRow:
    """A prompt and the responses to it, by kind, such as "chosen".

    instruction: the prompt is one instruction, with or without a system message; it needs no chat template.
    """

    prompt: Turns
    responses: dict[str, Turns]
    instruction: bool = False


def split_row(row: Row, column: str | None, responses: Columns) -> SplitRow:
    """Split a row into messages.

    column: the column of the prompt, which is prompt, instruction, messages or conversations. With None, the
    responses are full conversations and the prompt is their common beginning. responses: column of each kind;
    without any the prompt is the full conversation. Raises InvalidRow.
    """
    if column is None:
        return _split_conversations(row, responses)
    if column == "prompt":
        prompt, instruction = _prompt(row, responses)
    elif column == "instruction":
        prompt, instruction = instruction_of(row), not row.fields.get("history")
    else:
        prompt, instruction = with_system(row, messages_of(row, column)), False
    turns_of = {kind: _after(row, name, prompt) for kind, name in responses.items()}
    return SplitRow(prompt, turns_of, instruction and all(len(turns) == 1 for turns in turns_of.values()))


def response_index(turns: Sequence[Message]) -> int:
    """Return the index of the assistant turn at the end of a conversation, or its length if it ends with
    another turn.
    """
    return len(turns) - 1 if turns and turns[-1]["role"] == "assistant" else len(turns)


def chats_of(row: Row, split: SplitRow) -> dict[str, Chat]:
    """Return the prompt with each response, by kind."""
    at = len(split.prompt)
    return {
        kind: chat_of(row, (*split.prompt, *turns), at, split.instruction, at)
        for kind, turns in split.responses.items()
    }


def chat_of(
    row: Row, turns: Sequence[Message], response: int, instruction: bool = False, given: int = 0
) -> Chat:
    """Return messages as a Chat, with the columns `tools` and `chat_template_kwargs` of the row.

    response: see response_index. instruction: see SplitRow. given: see Chat. Raises InvalidRow if the
    response follows an empty user turn.
    """
    asked = turns[response - 1] if response else None
    if asked and asked["role"] == "user" and not (asked["content"] or "").strip():
        problem = "the prompt ends with an empty user turn; fill it or remove the row"
        raise row.invalid("empty prompt", problem)
    tools, arguments = tools_of(row), template_arguments_of(row)
    messages, weights = split_weights(turns)
    return Chat(row.name, messages, response, instruction, tools, arguments, given, weights)


def compared_chats(row: Row, prompt_column: str | None, columns: Columns) -> dict[str, Chat]:
    """Return the prompt with each response of a pair or ranking, by kind. prompt_column: None for the common
    beginning of the responses. columns: column of each kind. Raises InvalidRow, also for responses that are
    no assistant turns.
    """
    if prompt_column is None and holds_responses(row) and other_prompt(row) is not None:
        row = with_prompt(row)
        prompt_column = "prompt" if row.fields.get("prompt") is not None else "instruction"
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
        problem = "the prompt ends with an assistant turn; move that turn into the responses"
        raise row.invalid("prompt that ends with an assistant turn", problem)
    return {kind: without_weights(chat) for kind, chat in chats_of(row, split).items()}


def _check_response(row: Row, column: str, turns: Turns) -> None:
    if not turns or not ((turns[-1]["content"] or "").strip() or turns[-1].get("tool_calls")):
        problem = f"the response in column {column!r} is empty; fill it or remove the row"
        raise row.invalid("empty response", problem)
    for end, turn in (("begins", turns[0]), ("ends", turns[-1])):
        if turn["role"] != "assistant":
            raise row.invalid(
                "response that is no assistant turn",
                f"the response in column {column!r} {end} with a {turn['role']} turn; it must be "
                "an assistant turn",
            )


def plain_texts(row: Row, responses: Columns) -> dict[str, Completion]:
    """Return the plain-text prompt with each response, by kind. responses: column of each kind."""
    prompt = _plain_prompt(row, empty=True)
    return {kind: Completion(row.name, prompt, text_of(row, column)) for kind, column in responses.items()}


def _plain_prompt(row: Row, empty: bool = False) -> str:
    for column in ("system", "tools", "chat_template_kwargs"):
        if row.fields.get(column):
            problem = f"column {column!r} has no meaning in plain text; remove it, or set data.format=auto"
            raise row.invalid(f"column {column!r} with plain text", problem)
    return text_of(row, "prompt", empty)


def require_difference(row: Row, responses: dict) -> None:
    """Raise InvalidRow if the chosen and the rejected response are the same."""
    if "chosen" in responses and responses.get("rejected") == responses["chosen"]:
        problem = "chosen and rejected are identical; change one or remove the row"
        raise row.invalid("identical responses", problem)


# ---- prompts without responses, of any kind of row


class _Reading(NamedTuple):
    """A way to read a row's prompt. column: the prompt's column; None: the prompt is the common beginning of
    the responses. responses: columns that may begin with the prompt and turns before it that `column` lacks.
    """

    column: str | None
    responses: tuple[str, ...] = ()


def prompt_in_columns(row: Row, format: str = "auto") -> Chat | Completion:
    """Return the prompt, without a response, of a row whose columns have jaxft's names; SFT and preferences
    have the same prompt. For rows of other formats: format_choice.prompt_of.

    format: one of PROMPT_FORMATS: "auto", "plain", the column of the prompt, or "implicit" for the common
    beginning of chosen and rejected. Raises InvalidRow, for example if columns have different prompts.
    """
    row = with_prompt(row, format)
    if format == PLAIN:
        _require_column(row, "prompt" in row.fields)
        return Completion(row.name, _plain_prompt(row), "")
    (first, split), *others = [(reading, _read(row, reading)) for reading in _readings(row, format)]
    for other, also in others:
        if also.prompt != split.prompt:
            names = " and ".join(_describe(reading) for reading in (first, other))
            raise row.invalid(
                "columns with different prompts",
                f"{names} have different prompts; choose one with data.format=prompt, instruction, messages, "
                "conversations or implicit, or remove a column",
            )
    if not split.prompt:
        raise row.invalid("empty prompt", "the prompt is empty; add a user turn before the assistant turn")
    return chat_of(row, split.prompt, len(split.prompt), split.instruction, len(split.prompt))


def with_prompt(row: Row, format: str = "auto") -> Row:
    """Add the columns that a row has only in another spelling or under a synonym, such as question for
    prompt. All columns of the row stay.
    """
    row = _respelled(row)
    return _with_columns(row, other_columns(row, format))


def other_columns(row: Row, format: str = "auto") -> dict[str, str]:
    """Map the columns that a row has only under another name to that name: {"prompt": "question"}."""
    row = _respelled(row)
    name = other_prompt(row) if format in ("auto", PLAIN) else None
    others = {} if name is None else {"prompt": name}
    context = other_name(row.fields, "input")
    if name is not None and format == "auto" and context and isinstance(row.fields[context], str):
        is_question = name.strip().lower() in COLUMN_SYNONYMS["instruction"]
        others = {"instruction": name, "input": context} if is_question else others
    if format == "auto":
        optional = ("system", "input") if row.fields.get("instruction") is not None else ("system",)
        others |= further_columns(row.fields, optional)
    return others


def _respelled(row: Row) -> Row:
    return _with_columns(row, respelled(tuple(row.fields), _KNOWN))


def _with_columns(row: Row, columns: dict[str, str]) -> Row:
    """Return the row with further columns: `columns` maps each new name to the column that it copies."""
    if not columns:
        return row
    return Row(row.name, {**row.fields, **{ours: row.fields[theirs] for ours, theirs in columns.items()}})


def other_prompt(row: Row) -> str | None:
    """Return the column, such as question, that is read as the prompt of a row without a prompt; None if the
    row has one.
    """
    has = {column for column, value in row.fields.items() if value is not None}
    if has & {*PROMPT_COLUMNS}:
        return None
    if {"chosen", "rejected"} <= has and not holds_responses(row):
        return None  # whole conversations, whose common beginning is the prompt
    return other_name(row.fields, "prompt")


def holds_responses(row: Row) -> bool:
    """Whether chosen and rejected are responses as text, not dialogues that begin with a prompt."""
    values = [json_of(row, column) for column in ("chosen", "rejected")]
    return all(isinstance(value, str) and not is_dialogue(value) for value in values)


def _readings(row: Row, format: str) -> list[_Reading]:
    """Return every way in which SFT or preferences would read the row's prompt."""

    def has(*columns: str) -> bool:
        return all(row.fields.get(column) is not None for column in columns)

    compared = ("chosen", "rejected")
    if format == "implicit" or (format == "auto" and not any(map(has, PROMPT_COLUMNS)) and has(*compared)):
        if format == "auto" and "prompt" in row.fields and has(*compared) and holds_responses(row):
            text_of(row, "prompt")  # raises: the prompt is null, and these texts are responses to it
        _require_column(row, has(*compared))
        return [_Reading(None, compared)]
    known: tuple[tuple[str, ...], ...] = (("completion",), compared)
    sets = [columns for columns in known if has(*columns)] or [()]
    if format != "auto":
        _require_column(row, has(format))
        return [_Reading(format, columns) for columns in (sets if format == "prompt" else [()])]
    readings = [_Reading(column) for column in ("messages", "conversations") if has(column)]
    if has("prompt") and (sets != [()] or not readings):
        readings += [_Reading("prompt", columns) for columns in sets]
    if has("instruction") and (has("response") or has("output") or not readings):
        readings.append(_Reading("instruction"))
    _require_column(row, bool(readings))
    return readings


def _read(row: Row, reading: _Reading) -> SplitRow:
    responses = {column: column for column in reading.responses}
    if reading.column in ("messages", "conversations"):
        turns = split_row(row, reading.column, {}).prompt
        return SplitRow(turns[: response_index(turns)], {})
    if reading.column != "prompt":
        return split_row(row, reading.column, responses)
    prompt, instruction = _prompt(row, responses)
    if prompt[-1]["role"] == "assistant":
        problem = "the prompt ends with an assistant turn; move that turn into the response"
        raise row.invalid("prompt that ends with an assistant turn", problem)
    return SplitRow(prompt, {}, instruction)


def _describe(reading: _Reading) -> str:
    column = [] if reading.column is None else [repr(reading.column)]
    return " with ".join([*column, *([", ".join(map(repr, reading.responses))] if reading.responses else [])])


def _require_column(row: Row, present: bool) -> None:
    if not present:
        suggestion = suggested_columns([str(name) for name in row.fields], ["prompt"])
        raise row.invalid(
            NO_PROMPT,
            f"the columns {', '.join(map(str, row.fields))} include no prompt; add prompt, messages or "
            f"instruction, or rename a column, for example with {suggestion}",
        )


# ---- prompts


def _prompt(row: Row, responses: Columns) -> tuple[Turns, bool]:
    """Return the column `prompt` as messages, and whether it is a single instruction.

    A string is a user turn. If the responses are full conversations, the prompt is their common beginning,
    and the string must be its last turn.
    """
    if not isinstance(json_of(row, "prompt"), str):
        return with_system(row, messages_of(row, "prompt")), False
    text = text_of(row, "prompt")
    if is_open_dialogue(text):
        return with_system(row, dialogue_of(row, "prompt", f"{text} -")[:-1]), False
    whole = [turns for name in responses.values() if (turns := _whole_conversation(row, name))]
    if not whole:
        return with_system(row, [{"role": "user", "content": text}]), True
    prompt = _shared(whole) if len(whole) > 1 else whole[0][:-1]
    if len(whole) < len(responses) or not prompt or (prompt[-1]["content"] or "").strip() != text.strip():
        names = " and ".join(responses.values())
        raise row.invalid(
            "conversation that differs from the prompt",
            f"the common beginning of the conversations in {names} does not end with the prompt; use "
            "responses without earlier turns, or conversations that contain the prompt",
        )
    return with_system(row, prompt), False


def _whole_conversation(row: Row, column: str) -> Turns | None:
    """Return the column's turns if it has a full conversation, not only a response; None otherwise."""
    value = json_of(row, column)
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list | tuple) or not items or not all(isinstance(i, dict) for i in items):
        return None
    turns = _turns(row, column)
    return None if turns[0]["role"] == "assistant" else turns


def _shared(conversations: Sequence[Turns]) -> Turns:
    """Return the common first messages of all conversations."""
    first = conversations[0]

    def differs(i: int) -> bool:
        return any(i >= len(c) or c[i] != first[i] for c in conversations)

    return first[: next((i for i in range(len(first)) if differs(i)), len(first))]


# ---- responses


def _turns(row: Row, column: str) -> Turns:
    """Return the column's messages; a string is an assistant turn."""
    value = json_of(row, column)
    if not isinstance(value, str):
        items = [value] if isinstance(value, dict) else value
        return messages_of(Row(row.name, {column: items}), column)
    text, prompt = text_of(row, column), row.fields.get("prompt")
    if not (isinstance(prompt, str) and is_open_dialogue(prompt)):
        return [{"role": "assistant", "content": text}]
    turns = dialogue_of(row, column, f"Human: -\n\nAssistant: {text}")
    if len(turns) > 2:
        raise row.invalid(
            "response with further turns",
            f"column {column!r} has further turns after the response; use the assistant's next turn only",
        )
    return turns[1:]


def _after(row: Row, column: str, prompt: Turns) -> Turns:
    """Return a column's turns after the prompt, which it may begin with. Raises InvalidRow for others."""
    turns = _turns(row, column)
    if turns[0]["role"] != "system" and prompt and prompt[0]["role"] == "system":
        prompt = prompt[1:]  # the column `system` is not repeated in the responses
    if turns[: len(prompt)] == prompt:
        return turns[len(prompt) :]
    if turns[0]["role"] == "assistant":
        return turns
    at = next((i for i, (a, b) in enumerate(zip(prompt, turns, strict=False)) if a != b), len(turns))
    wrong = f"its message {at} differs from the prompt"
    if at == len(turns):
        wrong = f"it ends after {at} of the prompt's {len(prompt)} messages"
    raise row.invalid(
        "conversation that differs from the prompt",
        f"column {column!r} begins with a {turns[0]['role']} turn like a full conversation, but {wrong}; "
        "repeat the prompt's messages there, or use the response only",
    )


# ---- implicit prompts: the common beginning of the responses


def _split_conversations(row: Row, columns: Columns) -> SplitRow:
    pair = {kind: column for kind, column in columns.items() if kind != "gold"}
    values = [json_of(row, column) for column in pair.values()]
    if all(isinstance(value, str) for value in values):
        dialogues = {kind: dialogue_of(row, c, text_of(row, c)) for kind, c in pair.items()}
        split = _split_dialogues(row, dialogues)
    elif any(isinstance(value, str) for value in values):
        problem = "only one of 'chosen' and 'rejected' is a string; use two strings or two lists of messages"
        raise row.invalid("responses of different types", problem)
    else:
        split = _split_at_difference(row, {kind: _turns(row, column) for kind, column in pair.items()})
    prompt = with_system(row, split.prompt)
    gold = {"gold": _after(row, columns["gold"], prompt)} if "gold" in columns else {}
    return SplitRow(prompt, split.responses | gold)


def _split_at_difference(row: Row, whole: dict[str, Turns]) -> SplitRow:
    require_difference(row, whole)
    prompt = _shared(list(whole.values()))
    if not prompt:
        raise row.invalid(
            "conversations without a common beginning",
            "chosen and rejected have no common first message, so there is no prompt; use conversations with "
            "a common beginning, or a column 'prompt'",
        )
    responses = {kind: turns[len(prompt) :] for kind, turns in whole.items()}
    if any(turns and turns[0]["role"] != "assistant" for turns in responses.values()):
        raise row.invalid(
            "dialogues that differ before the last turn",
            f"chosen and rejected differ in message {len(prompt)}, which is not an assistant turn; fix or "
            "remove the row",
        )
    return SplitRow(prompt, responses)


def _split_dialogues(row: Row, whole: dict[str, Turns]) -> SplitRow:
    """Split dialogues that differ in their last turn alone. whole: the turns of each, by kind."""
    require_difference(row, whole)
    prompt, *others = [turns[:-1] for turns in whole.values()]
    if any(other != prompt for other in others):
        at = len(_shared(list(whole.values()))) + 1
        raise row.invalid(
            "dialogues that differ before the last turn",
            f"the dialogues differ in turn {at}, before their last turn; fix the row so that only the last "
            "turn differs, or remove it",
        )
    if not prompt:
        problem = "a dialogue needs a prompt and a response; use '\\n\\nHuman: ...\\n\\nAssistant: ...'"
        raise row.invalid("dialogue without a prompt", problem)
    return SplitRow(prompt, {kind: turns[-1:] for kind, turns in whole.items()})
