"""Bring a row's columns into one of three shapes: text, prompt and completion, or a conversation.

Accepted formats (`format="auto"` takes the one whose columns are there):

    text               {"text"}
    messages           {"messages": [{"role", "content"}, ...]} and optionally "system"
    prompt-completion  {"prompt", "completion"}, each a string or both lists of messages
    instruction        {"instruction", "response" or "output"} and optionally "input" and "system" (Alpaca)
    conversations      {"conversations": [{"from", "value"}, ...]} and optionally "system" (ShareGPT)

`columns=("prompt=question", "completion=answer")` renames: ours on the left. Conversations may carry "tools" (JSON schemas).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.rows import Row
from jaxft.tree import nearest

FORMATS: dict[
    str, tuple[tuple[str, ...], ...]
] = {  # format -> its columns; a tuple lists spellings of one column
    "text": (("text",),),
    "messages": (("messages",),),
    "prompt-completion": (("prompt",), ("completion",)),
    "instruction": (("instruction",), ("response", "output")),
    "conversations": (("conversations",),),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "text": (),
    "messages": ("system", "tools"),
    "prompt-completion": ("tools",),
    "instruction": ("input", "system"),
    "conversations": ("system", "tools"),
}
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}

Message = dict[str, Any]


@dataclass(frozen=True)
class Forms:
    """The formats of one kind of rows by name: columns each needs, columns each may have, and a mapping as an example."""

    needed: dict[str, tuple[tuple[str, ...], ...]]
    optional: dict[str, tuple[str, ...]]
    example: str


SFT = Forms(FORMATS, OPTIONAL, "prompt=...,completion=...")


@dataclass(frozen=True, slots=True)
class Text:
    """A document; all of it is learned."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """Plain text that goes on with `completion` after `prompt`."""

    name: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the answer is every assistant turn from message `answer` on. `plain`: it came from an instruction row."""

    name: str
    messages: tuple[Message, ...]
    answer: int
    plain: bool = False
    tools: list | None = None


Example = Text | Completion | Chat


def normalise(rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()) -> list[Example]:
    """Every row as an Example; the format is decided once, from the first row.

    Raises ValueError that lists the found columns and the accepted formats where the format is unclear, and names the row
    where a later one does not fit.
    """
    chosen, renamed = decided(rows, format, columns, SFT)
    return [_example(row, chosen) for row in renamed]


def decided(
    rows: Sequence[Row], format: str, columns: Sequence[str], forms: Forms
) -> tuple[str, Iterator[Row]]:
    """The name of the format, and the rows under our names of columns, each with all that the format needs."""
    mapping = _mapping(columns, forms)
    first = _rename(rows[0], mapping, forms)
    chosen = _detect(first, set(mapping), forms) if format == "auto" else format
    if chosen not in forms.needed:
        raise ValueError(f"data.format={format!r}; wanted auto or one of {', '.join(forms.needed)}")
    return chosen, (_complete(_rename(row, mapping, forms), chosen, forms) for row in rows)


def accepted(forms: Forms = SFT) -> str:
    """The formats and their columns in one line, for messages."""
    return "; ".join(
        f"{name} ({' + '.join(' or '.join(c) for c in columns)})" for name, columns in forms.needed.items()
    )


def _mapping(columns: Sequence[str], forms: Forms) -> dict[str, str]:
    known = sorted(
        {c for group in forms.needed.values() for names in group for c in names}
        | {c for o in forms.optional.values() for c in o}
    )
    mapping: dict[str, str] = {}
    for item in columns:
        ours, equals, theirs = (part.strip() for part in item.partition("="))
        if not (ours and equals and theirs):
            raise ValueError(f"data.columns: found {item!r}, wanted ours=theirs, for example prompt=question")
        if ours not in known:
            raise ValueError(
                f"data.columns: {item!r} maps to unknown column {ours!r}; near: {', '.join(nearest(ours, known))}"
            )
        if ours in mapping:
            raise ValueError(f"data.columns: {ours!r} is mapped twice, from {mapping[ours]!r} and {theirs!r}")
        mapping[ours] = theirs
    return mapping


def _rename(row: Row, mapping: dict[str, str], forms: Forms) -> Row:
    if not mapping:
        return row
    for ours, theirs in mapping.items():
        if theirs not in row.fields and not any(ours in extra for extra in forms.optional.values()):
            found = ", ".join(map(str, row.fields))
            raise ValueError(
                f"{row.name}: no column {theirs!r} (data.columns maps {ours}={theirs}); found columns: {found}"
            )
    spellings = {
        c for group in forms.needed.values() for names in group if set(names) & set(mapping) for c in names
    }
    kept = {c: v for c, v in row.fields.items() if c not in mapping.values() and c not in spellings}
    return Row(row.name, kept | {ours: row.fields.get(theirs) for ours, theirs in mapping.items()})


def _has(fields: dict, columns: tuple[tuple[str, ...], ...]) -> bool:
    return all(any(c in fields for c in names) for names in columns)


def _detect(row: Row, mapped: set[str], forms: Forms) -> str:
    needed = forms.needed

    def uses_mapped(name):  # a mapping says which format is meant
        return mapped <= {c for names in needed[name] for c in names} | set(forms.optional[name])

    fits = [name for name, columns in needed.items() if _has(row.fields, columns) and uses_mapped(name)]
    fits = [name for name in fits if not any(set(needed[name]) < set(needed[other]) for other in fits)]
    if len(fits) == 1:
        return fits[0]
    found = ", ".join(map(str, row.fields))
    if fits:
        raise ValueError(
            f"{row.name}: columns fit {' and '.join(fits)}; set data.format to one of them; found columns: {found}"
        )
    raise ValueError(
        f"{row.name}: found columns: {found}; wanted {accepted(forms)}; map them with data.columns={forms.example}"
    )


def _complete(row: Row, format: str, forms: Forms) -> Row:
    fields, needed = row.fields, forms.needed[format]
    if not _has(fields, needed):
        missing = next(names for names in needed if not any(c in fields for c in names))
        found = ", ".join(map(str, fields))
        raise ValueError(
            f"{row.name}: no column {' or '.join(missing)} (format {format}); found columns: {found}; wanted {accepted(forms)}"
        )
    return row


def _example(row: Row, format: str) -> Example:
    match format:
        case "text":
            return Text(row.name, string(row, "text"))
        case "messages":
            return _chat(row, system_of(row) + messages_of(row, "messages"))
        case "conversations":
            return _chat(row, system_of(row) + messages_of(row, "conversations", "from", "value"))
        case "prompt-completion":
            return _prompt_completion(row)
        case _:
            return _instruction(row)


def string(row: Row, column: str, empty: bool = False) -> str:
    """The column's text. Raises ValueError that names the row where it isn't one, or is blank though not `empty`."""
    value = row.fields[column]
    if not isinstance(value, str):
        raise ValueError(f"{row.name}: column {column!r} is {type(value).__name__}, wanted a string")
    _encodable(row, column, value)
    if not empty and not value.strip():
        raise ValueError(f"{row.name}: column {column!r} is empty; fill it or remove the row")
    return value


def _encodable(row: Row, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{row.name}: column {column!r} holds half a character ({error.reason}); repair the text"
        ) from error


def parsed(row: Row, column: str) -> Any:
    """The column, read as JSON if a table format stored a list of objects as a string; other text stays text."""
    value = row.fields[column]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            return value
        return (
            found if isinstance(found, list) and found and all(isinstance(x, dict) for x in found) else value
        )
    return value


def _content(row: Row, column: str, index: int, content: Any) -> Any:
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(
            f"{row.name}: {column}[{index}] has content of type {type(content).__name__}, wanted a string"
        )
    if content:
        _encodable(row, column, content)
    return content


def messages_of(row: Row, column: str, role: str = "role", content: str = "content") -> list[Message]:
    """The column's messages under our names of roles. Raises ValueError that names the row and the message."""
    value = parsed(row, column)
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(
            f"{row.name}: column {column!r} is {what}, wanted a list of {{{role!r}, {content!r}}} objects"
        )
    messages = []
    for index, item in enumerate(value):
        if (
            not isinstance(item, dict)
            or not isinstance(item.get(role), str)
            or not (content in item or "tool_calls" in item)
        ):
            keys = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
            raise ValueError(f"{row.name}: {column}[{index}] has {keys}; wanted {role!r} and {content!r}")
        unlearned = next(
            (k for k in ("weight", "train") if k in item and item[k] is not None and not item[k]), None
        )
        if unlearned:
            raise ValueError(
                f"{row.name}: {column}[{index}] has {unlearned}={item[unlearned]!r}, which isn't supported; data.loss_on decides "
                "what is learned: drop the key, or the turn's row"
            )
        rest = {k: v for k, v in item.items() if k not in (role, content) and v is not None}
        text = _content(row, column, index, item.get(content))
        if text is None and "tool_calls" not in rest:
            raise ValueError(f"{row.name}: {column}[{index}] has no content; wanted a string")
        name = ROLES.get(item[role], item[role])
        if name == "assistant" and not (text or "").strip() and "tool_calls" not in rest:
            raise ValueError(
                f"{row.name}: {column}[{index}], an assistant turn, is empty; fill it or remove the row"
            )
        messages.append({"role": name, "content": text or "", **rest})
    return messages


def system_of(row: Row) -> list[Message]:
    """The column `system` as a message, if it is there."""
    text = row.fields.get("system")
    return [{"role": "system", "content": string(row, "system")}] if text else []


def tools_of(row: Row) -> list | None:
    """The column `tools`, if it is there."""
    if not row.fields.get("tools"):
        return None
    tools = parsed(row, "tools")
    if not isinstance(tools, list):
        raise ValueError(
            f"{row.name}: column 'tools' is {type(tools).__name__}, wanted a list of JSON schemas"
        )
    return tools


def _chat(row: Row, messages: list[Message]) -> Chat:
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return Chat(row.name, tuple(messages), turns[-1] if turns else len(messages), tools=tools_of(row))


def _prompt_completion(row: Row) -> Example:
    lists = [isinstance(parsed(row, c), list | tuple) for c in ("prompt", "completion")]
    if lists[0] != lists[1]:
        raise ValueError(
            f"{row.name}: of 'prompt' and 'completion' one is a string and one a list; wanted both the same"
        )
    if not lists[0]:
        return Completion(row.name, string(row, "prompt", empty=True), string(row, "completion"))
    prompt = messages_of(row, "prompt")
    return Chat(row.name, (*prompt, *messages_of(row, "completion")), len(prompt), tools=tools_of(row))


def _instruction(row: Row) -> Chat:
    answers = [c for c in ("response", "output") if c in row.fields]
    if len(answers) > 1:
        raise ValueError(
            f"{row.name}: found both 'response' and 'output'; say which with data.columns=response=..."
        )
    messages = [*instruction_of(row), {"role": "assistant", "content": string(row, answers[0])}]
    return Chat(row.name, tuple(messages), len(messages) - 1, plain=True)


def instruction_of(row: Row) -> list[Message]:
    """The columns `instruction`, `input` and `system` as the messages before an answer."""
    user = string(row, "instruction")
    if row.fields.get("input"):
        user = f"{user}\n\n{string(row, 'input')}"
    return [*system_of(row), {"role": "user", "content": user}]
