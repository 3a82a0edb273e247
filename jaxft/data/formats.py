"""Normalise rows of several formats to one of three types: Text, Completion (of a prompt) or Chat.

Accepted formats (`format="auto"` uses the one whose columns are present):

    text               {"text"}
    messages           {"messages": [{"role", "content"}, ...]} and optionally "system"
    prompt-completion  {"prompt", "completion"}, each a string or both lists of messages
    instruction        {"instruction", "response" or "output"} and optionally "input" and "system" (Alpaca)
    conversations      {"conversations": [{"from", "value"}, ...]} and optionally "system" (ShareGPT)

`columns=("prompt=question", "completion=answer")` renames columns: left jaxft's name, right the dataset's.
Conversations may have a column "tools" (JSON schemas).
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.example import Chat, Completion, Example, Message, Text
from jaxft.data.invalid import InvalidRow, attempt, valid
from jaxft.data.rows import Row
from jaxft.tree import nearest

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


@dataclass(frozen=True)
class Schemas:
    """The formats of one kind of rows.

    required: the columns of each format; a tuple lists the accepted names of one column. optional: further
    columns that a format may have. example: a value of data.columns for error messages.
    """

    required: dict[str, tuple[tuple[str, ...], ...]]
    optional: dict[str, tuple[str, ...]]
    example: str


SFT_SCHEMAS = Schemas(
    required={
        "text": (("text",),),
        "messages": (("messages",),),
        "prompt-completion": (("prompt",), ("completion",)),
        "instruction": (("instruction",), ("response", "output")),
        "conversations": (("conversations",),),
    },
    optional={
        "text": (),
        "messages": ("system", "tools"),
        "prompt-completion": ("tools",),
        "instruction": ("input", "system"),
        "conversations": ("system", "tools"),
    },
    example="prompt=...,completion=...",
)


def normalise_rows(rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()) -> list[Example]:
    """Return every row as an Example. All have one format, by default the one that most rows fit.

    Raises InvalidRow for the first row that does not have it, and ValueError for wrong settings.
    """
    examples: list[Example] = []
    for outcome in normalise_each(rows, format, columns):
        if isinstance(outcome, InvalidRow):
            raise outcome
        examples.append(outcome)
    return examples


def normalise_each(
    rows: Sequence[Row], format: str = "auto", columns: Sequence[str] = ()
) -> Iterator[Example | InvalidRow]:
    """Yield every row as an Example, or what is wrong with it; see normalise_rows."""
    chosen, renamed = detect_format(rows, format, columns, SFT_SCHEMAS)

    def convert(row: Row | InvalidRow) -> Example:
        return _example(valid(row), chosen)

    return (attempt(convert, row) for row in renamed)


def detect_format(
    rows: Sequence[Row], format: str, columns: Sequence[str], schemas: Schemas
) -> tuple[str, Iterator[Row | InvalidRow]]:
    """Return the name of the format, and the rows with renamed columns and all columns that the format
    requires. "auto" chooses the format that most rows fit, of equally many the first.
    """
    mapping = _column_mapping(columns, schemas)
    renamed = [attempt(_rename, row, mapping, schemas) for row in rows]
    chosen = _most_common_format(renamed, set(mapping), schemas) if format == "auto" else format
    if chosen not in schemas.required:
        raise ValueError(f"data.format={format!r}; use auto or one of {', '.join(schemas.required)}")

    def require(row: Row | InvalidRow) -> Row:
        return _require_columns(valid(row), chosen, schemas)

    return chosen, (attempt(require, row) for row in renamed)


def _most_common_format(rows: Sequence[Row | InvalidRow], mapped: set[str], schemas: Schemas) -> str:
    """Return the format that most rows fit. Raises the first row's InvalidRow if none fits one."""
    columns = Counter(tuple(row.fields) for row in rows if isinstance(row, Row))
    examples = {tuple(row.fields): row for row in reversed(rows) if isinstance(row, Row)}
    votes: Counter[str] = Counter()
    for names, count in columns.items():
        format = attempt(_detect, examples[names], mapped, schemas)
        if not isinstance(format, InvalidRow):
            votes[format] += count
    return votes.most_common(1)[0][0] if votes else _detect(valid(rows[0]), mapped, schemas)


def describe_schemas(schemas: Schemas) -> str:
    """Return the formats and their columns in one line."""
    formats = schemas.required.items()
    return "; ".join(f"{name} ({' + '.join(' or '.join(c) for c in columns)})" for name, columns in formats)


def _column_mapping(columns: Sequence[str], schemas: Schemas) -> dict[str, str]:
    known = sorted(
        {c for group in schemas.required.values() for names in group for c in names}
        | {c for o in schemas.optional.values() for c in o}
    )
    mapping: dict[str, str] = {}
    for item in columns:
        ours, theirs = split_column(item)
        if ours not in known:
            raise ValueError(
                f"data.columns: {item!r} maps to unknown column {ours!r}; use one of "
                f"{', '.join(nearest(ours, known))}"
            )
        if ours in mapping:
            raise ValueError(
                f"data.columns: {ours!r} is mapped twice, from {mapping[ours]!r} and {theirs!r}; keep one"
            )
        mapping[ours] = theirs
    return mapping


def split_column(item: str) -> tuple[str, str]:
    """Split an item of data.columns, "ours=theirs". Raises ValueError for another form."""
    ours, equals, theirs = (part.strip() for part in item.partition("="))
    if not (ours and equals and theirs):
        raise ValueError(
            f"data.columns: {item!r} is not of the form ours=theirs, for example prompt=question"
        )
    return ours, theirs


def _rename(row: Row, mapping: dict[str, str], schemas: Schemas) -> Row:
    if not mapping:
        return row
    for ours, theirs in mapping.items():
        if theirs not in row.fields and not any(ours in extra for extra in schemas.optional.values()):
            raise InvalidRow(
                row.name,
                f"missing column {theirs!r}",
                f"no column {theirs!r}, which data.columns={ours}={theirs} names; the row has "
                f"{', '.join(map(str, row.fields))}",
            )
    spellings = {
        c
        for group in schemas.required.values()
        for names in group
        if set(names) & set(mapping)
        for c in names
    }
    others = {c: v for c, v in row.fields.items() if c not in mapping.values() and c not in spellings}
    return Row(row.name, others | {ours: row.fields.get(theirs) for ours, theirs in mapping.items()})


def _has(fields: dict, columns: tuple[tuple[str, ...], ...]) -> bool:
    return all(any(c in fields for c in names) for names in columns)


def _detect(row: Row, mapped: set[str], schemas: Schemas) -> str:
    needed = schemas.required

    def uses_mapped(name: str) -> bool:  # a format without a column of data.columns is not meant
        return mapped <= {c for names in needed[name] for c in names} | set(schemas.optional[name])

    fits = [name for name, columns in needed.items() if _has(row.fields, columns) and uses_mapped(name)]
    fits = [name for name in fits if not any(set(needed[name]) < set(needed[other]) for other in fits)]
    if len(fits) == 1:
        return fits[0]
    columns = ", ".join(map(str, row.fields))
    if fits:
        raise InvalidRow(
            row.name,
            "columns of two formats",
            f"the columns {columns} fit the formats {' and '.join(fits)}; set data.format to one of them",
        )
    raise InvalidRow(
        row.name,
        "columns of no format",
        f"the columns {columns} fit no format; accepted are {describe_schemas(schemas)}; rename "
        f"columns with data.columns={schemas.example}",
    )


def _require_columns(row: Row, format: str, schemas: Schemas) -> Row:
    fields, required = row.fields, schemas.required[format]
    if not _has(fields, required):
        missing = next(names for names in required if not any(c in fields for c in names))
        raise InvalidRow(
            row.name,
            f"missing column {' or '.join(map(repr, missing))}",
            f"no column {' or '.join(missing)}, which format {format} requires; the row has "
            f"{', '.join(map(str, fields))}; accepted formats are {describe_schemas(schemas)}",
        )
    return row


def _example(row: Row, format: str) -> Example:
    match format:
        case "text":
            return Text(row.name, text_of(row, "text"))
        case "messages":
            return _chat(row, system_of(row) + messages_of(row, "messages"))
        case "conversations":
            return _chat(row, system_of(row) + messages_of(row, "conversations", "from", "value"))
        case "prompt-completion":
            return _prompt_completion(row)
        case _:
            return _instruction(row)


def text_of(row: Row, column: str, empty: bool = False) -> str:
    """Return the column's text.

    Raises ValueError, naming the row, if it is no string, or blank and not `empty`.
    """
    value = row.fields[column]
    if not isinstance(value, str):
        problem = f"column {column!r} has type {type(value).__name__}; use a string"
        raise InvalidRow(row.name, f"column {column!r} of a wrong type", problem)
    _encodable(row, column, value)
    if not empty and not value.strip():
        raise InvalidRow(
            row.name, f"empty column {column!r}", f"column {column!r} is empty; fill it or remove the row"
        )
    return value


def _encodable(row: Row, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"column {column!r} has an unpaired surrogate ({error.reason}); fix the text"
        raise InvalidRow(row.name, "unpaired surrogate", problem) from error


def json_of(row: Row, column: str) -> Any:
    """Return the column, parsed if a table format has stored a list of objects as a JSON string."""
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
        problem = f"{column}[{index}] has content of type {type(content).__name__}; use a string"
        raise InvalidRow(row.name, "content of a wrong type", problem)
    if content:
        _encodable(row, column, content)
    return content


def messages_of(row: Row, column: str, role: str = "role", content: str = "content") -> list[Message]:
    """Return the column's messages with the roles user, assistant, system and tool.

    Errors name the row and the message.
    """
    value = json_of(row, column)
    if not isinstance(value, list | tuple) or not value:
        what = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
        problem = f"column {column!r} is {what}; use a list of {{{role!r}, {content!r}}} objects"
        raise InvalidRow(row.name, "column without messages", problem)
    messages = []
    for index, item in enumerate(value):
        if (
            not isinstance(item, dict)
            or not isinstance(item.get(role), str)
            or not (content in item or "tool_calls" in item)
        ):
            keys = ", ".join(map(str, item)) if isinstance(item, dict) else type(item).__name__
            problem = f"{column}[{index}] has {keys}; it needs {role!r} and {content!r}"
            raise InvalidRow(row.name, "message without role or content", problem)
        unlearned = next(
            (k for k in ("weight", "train") if k in item and item[k] is not None and not item[k]), None
        )
        if unlearned:
            raise InvalidRow(
                row.name,
                "message with a training weight",
                f"{column}[{index}] has {unlearned}={item[unlearned]!r}, which is not supported; "
                "remove the key or the row, and set data.loss_on",
            )
        rest = {k: v for k, v in item.items() if k not in (role, content) and v is not None}
        text = _content(row, column, index, item.get(content))
        if text is None and "tool_calls" not in rest:
            raise InvalidRow(
                row.name, "message without role or content", f"{column}[{index}] has no content; use a string"
            )
        name = ROLES.get(item[role], item[role])
        if name == "assistant" and not (text or "").strip() and "tool_calls" not in rest:
            problem = f"{column}[{index}], an assistant turn, is empty; fill it or remove the row"
            raise InvalidRow(row.name, "empty assistant turn", problem)
        messages.append({"role": name, "content": text, **rest})
    return messages


def system_of(row: Row) -> list[Message]:
    """Return the column `system` as a message, [] without one."""
    text = row.fields.get("system")
    return [{"role": "system", "content": text_of(row, "system")}] if text else []


def tools_of(row: Row) -> list | None:
    """Return the column `tools`, None without one."""
    if not row.fields.get("tools"):
        return None
    tools = json_of(row, "tools")
    if not isinstance(tools, list):
        problem = f"column 'tools' has type {type(tools).__name__}; use a list of JSON schemas"
        raise InvalidRow(row.name, "tools of a wrong type", problem)
    return tools


def _chat(row: Row, messages: list[Message]) -> Chat:
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return Chat(row.name, tuple(messages), turns[-1] if turns else len(messages), tools=tools_of(row))


def _prompt_completion(row: Row) -> Example:
    lists = [isinstance(json_of(row, c), list | tuple) for c in ("prompt", "completion")]
    if lists[0] != lists[1]:
        problem = "one of 'prompt' and 'completion' is a string and one a list; use two strings or two lists"
        raise InvalidRow(row.name, "prompt and completion of different types", problem)
    if not lists[0]:
        return Completion(row.name, text_of(row, "prompt", empty=True), text_of(row, "completion"))
    prompt = messages_of(row, "prompt")
    return Chat(row.name, (*prompt, *messages_of(row, "completion")), len(prompt), tools=tools_of(row))


def _instruction(row: Row) -> Chat:
    names = [c for c in ("response", "output") if c in row.fields]
    if len(names) > 1:
        problem = "the row has both 'response' and 'output'; choose one with data.columns=response=..."
        raise InvalidRow(row.name, "two responses", problem)
    messages = [*instruction_of(row), {"role": "assistant", "content": text_of(row, names[0])}]
    return Chat(row.name, tuple(messages), len(messages) - 1, plain=True)


def instruction_of(row: Row) -> list[Message]:
    """Return the columns `instruction`, `input` and `system` as the messages before a response."""
    user = text_of(row, "instruction")
    if row.fields.get("input"):
        user = f"{user}\n\n{text_of(row, 'input')}"
    return [*system_of(row), {"role": "user", "content": user}]
