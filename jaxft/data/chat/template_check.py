"""Check that a rendered assistant turn shows all content, reasoning and tool calls of its message.

Chat templates silently drop what they don't support, such as tool calls or thinking blocks. A model trained
on such text would learn to end its turn where it should call a tool.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxft.data.chat.template import Span
from jaxft.data.rows.example import Message

REASONING = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # keys of messages, as different templates read them
THINKING = "the thinking block"
MARKER = re.compile(r"Qx7w\d+Zk", re.IGNORECASE)  # a word of with_markers
_THOUGHT = re.compile(r"\s*(?:<think>)?(?P<thought>.*?)</think>(?P<content>.*)", re.DOTALL)


class Part(NamedTuple):
    """A part of an assistant turn, and the ways in which a template may write it."""

    name: str
    spellings: tuple[str, ...]


class HiddenPart(ValueError):
    """The rendered text lacks a part of an assistant turn, or its end."""


def parts_of(message: Message) -> list[Part]:
    """Return the parts that a rendered assistant turn must show: reasoning, content and tool calls.

    A thinking block at the start of the content, up to </think>, is a part of its own.
    """
    parts = [Part(f"the {key}", (message[key],)) for key in REASONING if _is_text(message.get(key))]
    if _is_text(message["content"]):
        thought = _THOUGHT.fullmatch(message["content"])
        texts = [(THINKING, thought["thought"])] if thought else []
        texts.append(("the content", thought["content"] if thought else message["content"]))
        parts += [Part(name, (text.strip(),)) for name, text in texts if text.strip()]
    for number, call in enumerate(message.get("tool_calls") or (), 1):
        function = _function(call)
        parts.append(Part(f"the name of tool call {number}", _spellings(function.get("name"))))
        for path, value in _leaves(function.get("arguments")):
            parts.append(Part(f"argument {path} of tool call {number}", _spellings(value)))
    return parts


def find_parts(parts: Sequence[Part], text: str, start: int, end: int) -> tuple[Part | None, int]:
    """Search text[start:end] for parts. Return the first missing one or None, and where the last one ends.

    Whitespace may differ, since templates strip it, or add it around thinking blocks.
    """
    last = _last_end(parts, text[start:end])
    if isinstance(last, int):
        return None, start + last
    where = [i for i in range(start, end) if not text[i].isspace()]
    bare = [Part(part.name, tuple("".join(s.split()) for s in part.spellings)) for part in parts]
    last = _last_end(bare, "".join(text[i] for i in where))
    if isinstance(last, Part):
        return last, start
    return None, where[last - 1] + 1 if last else start


def _last_end(parts: Sequence[Part], text: str) -> Part | int:
    """Return where the last part ends, or the first missing part. Each is searched after the previous one
    first.
    """
    at = last = 0
    for part in parts:
        found = _first(part, text, at) or _first(part, text, 0)
        if found is None:
            return part
        at = found[1]
        last = max(last, at)
    return last


def _first(part: Part, text: str, at: int) -> Span | None:
    """Return the first occurrence of one of the spellings, the longest if several begin there."""
    found = [(text.find(spelling, at), -len(spelling)) for spelling in part.spellings]
    start, length = min((pair for pair in found if pair[0] >= 0), default=(-1, 0))
    return None if start < 0 else (start, start - length)


def shows_null(message: Message, text: str) -> bool:
    """Whether content that is null is rendered as the word None."""
    if message["content"] is not None:
        return False
    known = sum(max(s.count("None") for s in part.spellings) for part in parts_of(message))
    return text.count("None") > known


def with_markers(message: Message, first: int = 0) -> tuple[Message, dict[str, str]]:
    """Return the turn with each text replaced by a unique word, and the name of the part for each word.

    first: the number of the first word, for words that are unique among several turns.

    A rendering without a word hides that part, even if the part's own text occurs elsewhere by chance.
    """
    words: dict[str, str] = {}

    def mark(value: Any, name: str) -> Any:
        match value:
            case str() if value.strip():
                word = f"Qx7w{first + len(words)}Zk"
                words[word] = name
                return word
            case dict():
                return {mark(key, name): mark(item, name) for key, item in value.items()}
            case list() | tuple():
                return [mark(item, name) for item in value]
            case _:
                return value

    def mark_call(call: Any, number: int) -> Any:
        function = _function(call)
        marked = {
            key: mark(function[key], f"the {key} of tool call {number}")
            for key in ("name", "arguments")
            if key in function
        }
        return {**call, "function": {**function, **marked}} if "function" in call else {**call, **marked}

    other = {key: mark(message[key], f"the {key}") for key in REASONING if _is_text(message.get(key))}
    if _is_text(message["content"]):
        thought = _THOUGHT.fullmatch(message["content"])
        other["content"] = mark(thought["content"] if thought else message["content"], "the content")
        if thought and thought["thought"].strip():
            other["content"] = (
                f"<think>\n{mark(thought['thought'], THINKING)}\n</think>\n\n{other['content']}"
            )
    if message.get("tool_calls"):
        other["tool_calls"] = [mark_call(call, i) for i, call in enumerate(message["tool_calls"], 1)]
    return {**message, **other}, words


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _function(call: Any) -> dict[str, Any]:
    """Return name and arguments of a tool call, {"function": {...}} or without that level."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        raise HiddenPart(
            f"a tool call is {json.dumps(call, default=str)[:60]}; use an object with name and arguments"
        )
    return inner


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each key and each scalar in a call's arguments."""
    match value:
        case dict():
            for key, item in value.items():
                inner = f"{path}.{key}" if path else str(key)
                yield inner, key
                yield from _leaves(item, inner)
        case list() | tuple():
            for item in value:
                yield from _leaves(item, path)
        case None if not path:  # no arguments
            return
        case _:
            yield path or "text", value


def _spellings(value: Any) -> tuple[str, ...]:
    """Return a value as written in JSON, Python and HTML, strings without quotes."""
    if value is None or isinstance(value, bool):
        return str(value), json.dumps(value), str(value).lower()
    if not isinstance(value, str):
        return str(value), json.dumps(value, default=str)
    return (
        value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1],
        html.escape(value),
    )  # fmt: skip
