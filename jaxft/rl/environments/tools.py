"""Tools: plain functions that a model calls, their JSON schemas, and calls in the text of a turn.

A function's signature and its docstring in Google's style (with an `Args:` section) give the schema that the
model is shown, see data.rows.columns.tool_schema. Calls are read in the format of the chat template, as
the server reads them.

Failures that the model can cause are returned to it as error messages: an unknown name, malformed JSON, wrong
arguments, a ValueError, TypeError, ArithmeticError or LookupError of the tool, a result that is too long. Any
other exception and a time-out exclude the episode. Classes of TRL's environment_factory return all exceptions
to the model, as TRL does.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from jaxft.annotations import name_of
from jaxft.data.chat.tool_calls import CallFormat, CallStream, ToolCall
from jaxft.data.rows.columns import tool_schema
from jaxft.data.rows.example import Message
from jaxft.rl.environments.calls import Task
from jaxft.rl.trajectory import Fault

Tool = Callable[..., Any]
MODELS_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError)  # returned to the model
MOST_CALLS = 16  # of one turn
ERROR_SIZE = 200  # characters of an error's text
UNKNOWN_TOOL, MALFORMED_CALL, BAD_ARGUMENTS = "unknown_tool", "malformed_call", "bad_arguments"
TOOL_ERROR, LARGE_RESULT, TOO_MANY_CALLS = "tool_error", "large_result", "too_many_calls"
CALL_KEYS = {"type", "id", "name", "arguments", "parameters"}  # of a call in JSON
JSON_TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "array": list,
    "object": dict,
}


class ParsedTurn(NamedTuple):
    """A sampled turn. text: the text without calls. malformed: number of calls that are not JSON."""

    text: str
    calls: tuple[ToolCall, ...]
    malformed: int


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Return tools by their names. Raises ValueError for two of one name.

    >>> by_name([max, min]).keys()
    dict_keys(['max', 'min'])
    """
    names = [name_of(tool) for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"tools: two tools are named {twice}. Rename one.")
    return dict(zip(names, tools, strict=True))


def parse_turn(text: str, format: CallFormat | None, number: int) -> ParsedTurn:
    """Parse the tool calls in the text of a turn. number: the turn's number, from which the ids of its calls
    are made, so that they are the same in each run.

    >>> from jaxft.data.chat.tool_calls import call_format
    >>> text = '<tool_call>\\n{"name": "add", "arguments": {"a": 1, "b": 2}}\\n</tool_call>'
    >>> parse_turn(text, call_format("hermes"), 0).calls[0].name
    'add'
    """
    if format is None:
        return ParsedTurn(text, (), 0)
    rest, calls = CallStream(format).add(text, True)
    malformed = rest.count(format.opens) or int(format.bare and not calls and _is_like_a_call(rest))
    named = (
        ToolCall(call.index, f"call{number % 100:02}{call.index % 1000:03}", call.name, call.arguments)
        for call in calls
    )
    return ParsedTurn(rest, tuple(named), min(malformed, MOST_CALLS))


def _is_like_a_call(text: str) -> bool:
    """Return whether text that is not marked as a call seems to be a failed one, rather than an answer in
    JSON.
    """
    if not text.lstrip().startswith("{"):
        return False
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return '"name"' in text
    return isinstance(parsed, dict) and "name" in parsed and parsed.keys() <= CALL_KEYS


def turn_message(turn: ParsedTurn) -> Message:
    """Return a turn as an assistant message, with its tool calls in the key tool_calls."""
    message: Message = {"role": "assistant", "content": turn.text}
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in turn.calls
        ]
    return message


def answer_calls(
    turn: ParsedTurn,
    tools: Mapping[str, Tool],
    task: Task,
    longest: int,
    errors: tuple[type[Exception], ...] = MODELS_ERRORS,
) -> tuple[list[Message], list[Fault]]:
    """Call the tools that a turn names, one after the other. Return (a message for each call, also for each
    malformed one; the faults).

    longest: the most characters of a result. errors: exceptions that are returned to the model; any other is
    raised, and excludes the episode.
    """
    messages, faults = list[Message](), list[Fault]()
    for call in turn.calls:
        text, fault = _result_of(call, tools, task, longest, errors)
        if fault:
            fault = Fault(fault.kind, valid_text(fault.text[:ERROR_SIZE]))
            text = error_text(fault.text)
            faults.append(fault)
        messages.append({"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text})
    for _ in range(turn.malformed):
        fault = Fault(MALFORMED_CALL, "the tool call is not valid JSON with a name and arguments")
        faults.append(fault)
        messages.append({"role": "tool", "content": error_text(fault.text)})
    return messages, faults


def error_text(text: str) -> str:
    """Return the content of a tool message that reports an error to the model."""
    return json.dumps({"error": text}, ensure_ascii=False)


def valid_text(text: str) -> str:
    """Return text with U+FFFD in place of unpaired surrogates, which no tokenizer accepts."""
    is_valid = text.isascii()  # most texts are, which takes no copy
    return text if is_valid else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _result_of(
    call: ToolCall, tools: Mapping[str, Tool], task: Task, longest: int, errors: tuple[type[Exception], ...]
) -> tuple[str, Fault | None]:
    """Return (text of a call's result, None), or ("", fault) with a fault that the model is shown."""
    tool = tools.get(call.name)
    if call.index >= MOST_CALLS:
        return "", Fault(TOO_MANY_CALLS, f"only {MOST_CALLS} calls of a turn are answered")
    if tool is None:
        return "", Fault(UNKNOWN_TOOL, f"there is no tool {call.name!r}; there are {', '.join(tools)}")
    arguments = json.loads(call.arguments)
    try:
        inspect.signature(tool).bind(**arguments)
        _check_types(arguments, _properties(tool.__func__ if inspect.ismethod(tool) else tool))
    except TypeError as error:
        return "", Fault(BAD_ARGUMENTS, f"{call.name}: {error}")
    try:
        text = result_text(task.call(tool, **arguments))
    except errors as error:
        return "", Fault(TOOL_ERROR, f"{type(error).__name__}: {' '.join(str(error).split())}")
    if len(text) > longest:
        return "", Fault(
            LARGE_RESULT, f"the result of {call.name} has {len(text)} characters, more than {longest}"
        )
    return text, None


@cache
def _properties(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the schemas of a tool's arguments, by argument name."""
    properties: Mapping[str, Any] = tool_schema(function)["function"]["parameters"]["properties"]
    return properties


def _check_types(arguments: Mapping[str, Any], properties: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument without its schema's type. properties: name -> schema."""
    for name, value in arguments.items():
        schema = properties.get(name, {})
        if not _is_of(value, schema):
            expected = f"one of {schema['enum']}" if "enum" in schema else f"of type {schema.get('type')}"
            raise TypeError(f"argument {name!r} is {json.dumps(value)[:60]}, expected {expected}")


def _is_of(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a JSON value fits a schema's `type` (one, a list, or none for any), `enum`, `nullable`
    and, for a list, `items`.
    """
    if value is None:
        return bool(schema.get("nullable")) or "type" not in schema
    if "enum" in schema:
        return value in schema["enum"]
    types = schema.get("type", [*JSON_TYPES])
    names = [types] if isinstance(types, str) else types
    if isinstance(value, bool):
        return "boolean" in names
    if isinstance(value, list) and "array" in names:
        return all(_is_of(item, schema.get("items", {})) for item in value)
    return any(isinstance(value, JSON_TYPES[name]) for name in names if name in JSON_TYPES)


def result_text(value: Any) -> str:
    """Return a tool's result as text: a string unchanged, other values as JSON.

    >>> result_text("as it is"), result_text({"degrees": 7})
    ('as it is', '{"degrees": 7}')
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return valid_text(text)
