"""Tool calls in the text of a completion, in the formats that chat templates train models to write.

Hermes (Qwen 2.5 and 3, SmolLM3, EXAONE 4), with JSON between tags:
    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
Llama 3.1 to 3.3, as the whole completion or after a special token; semicolons separate several calls:
    <|python_tag|>{"name": "f", "parameters": {"a": 1}}
Mistral, after a special token, as a list (to 2024) or as a name with its arguments:
    [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]    [TOOL_CALLS]f[ARGS]{"a": 1}

A tag within a JSON string, such as </tool_call> in an argument, does not end a call. A malformed call, such
as one with invalid JSON, remains text. The last call of a completion needs no closing tag.
"""

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

ToolFormat = Literal["hermes", "llama3", "mistral", "none"]
TOOL_FORMATS: tuple[ToolFormat, ...] = get_args(ToolFormat)
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A tool call. index: its number in the completion, from 0. id: a new random one, not the model's.
    arguments: the JSON text of an object.
    """

    index: int
    id: str
    name: str
    arguments: str


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class CallFormat:
    """A format of tool calls.

    opens: the tag before a call. closes: the tag after it; None if a call ends at the next opening tag or
    with the text. parse: text between the tags -> (name, arguments) of each call in it; raises ValueError or
    RecursionError. bare: whether a completion that begins with "{" is a call without an opening tag. tokens:
    special tokens that are part of the format. make_id: returns a new id that the chat template accepts.
    """

    opens: str
    closes: str | None
    parse: Callable[[str], list[tuple[str, Any]]]
    bare: bool = False
    tokens: tuple[str, ...] = ()
    make_id: Callable[[], str] = _long_id


def template_tool_format(source: str) -> ToolFormat:
    """Return the format of the tool calls that a chat template renders, "none" if it is not a known one.

    source: the template's Jinja text. The templates of Qwen3-Coder and GLM 4.5, which write XML between the
    tags of Hermes, have "none".
    """
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source:
        return "none" if "<function=" in source or "<arg_key>" in source else "hermes"
    is_llama = "<|start_header_id|>" in source and '"parameters": ' in source
    return "llama3" if PYTHON_TAG in source or is_llama else "none"


def call_format(name: ToolFormat) -> CallFormat | None:
    """Return the CallFormat with a name, None for "none"."""
    if name == "hermes":
        return CallFormat("<tool_call>", "</tool_call>", _hermes, tokens=("<tool_call>", "</tool_call>"))
    if name == "llama3":
        return CallFormat(PYTHON_TAG, None, _llama3, True, (PYTHON_TAG,))
    if name == "mistral":
        tokens = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
        return CallFormat("[TOOL_CALLS]", None, _mistral, tokens=tokens, make_id=_nine_characters)
    return None


class CallStream:
    """Extract tool calls from a text that arrives in pieces. count: the number of calls so far.

    Whitespace before calls, between them and after the last is dropped, as chat templates add their own.
    """

    def __init__(self, format: CallFormat):
        self.format, self.count = format, 0
        self._waiting = ""  # text that is a part of a call, or may become one
        self._searched = 0  # how many of its characters have been searched for the tag that ends the call
        self._quoted: bool | None = False  # whether a JSON string is open there; None if it cannot be JSON
        self._has_text = self._follows_call = False  # of what was removed: any text; a call at the end

    def add(self, text: str, is_last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """Read the next piece of a response; return the text and the tool calls that are complete now.

        Text that may yet turn out to be part of a call is returned later. is_last: no more pieces follow.
        """
        self._waiting += text
        calls, texts = list[ToolCall](), list[str]()
        while self._waiting:
            if is_last and self._follows_call and self._waiting.isspace():
                break
            begin, inner = self._opening()
            if inner is None:
                texts.append(self._take(self._text_end(is_last)))
                break
            texts.append(self._take(begin))
            end = self._call_end(inner - begin, is_last)
            if end is None:
                break
            parsed = self._parsed(self._waiting[:end])
            text = self._take(end)
            texts += [] if parsed else [text]
            self._follows_call, calls = bool(parsed), calls + parsed
        return "".join(texts), tuple(calls)

    def _take(self, size: int) -> str:
        """Remove the first `size` characters of the waiting text, and return them."""
        text, self._waiting = self._waiting[:size], self._waiting[size:]
        if text:
            self._searched, self._quoted, self._follows_call = 0, False, False
            self._has_text = self._has_text or not text.isspace()
        return text

    def _opening(self) -> tuple[int, int | None]:
        """Return where the next call begins in the waiting text, from the whitespace before it on, and where
        its opening tag ends: (0, 0) for a call without this tag, (0, None) if there is no call.
        """
        text, opens = self._waiting, self.format.opens
        if self.format.bare and not self._has_text and text.lstrip().startswith("{"):
            return 0, 0
        at = text.find(opens)
        return (0, None) if at < 0 else (len(text[:at].rstrip()), at + len(opens))

    def _text_end(self, is_last: bool) -> int:
        """Return how many characters of the waiting text, which has no call, are certain to remain text:
        whitespace at its end and the beginning of an opening tag may yet belong to a call.
        """
        text, opens = self._waiting, self.format.opens
        if is_last:
            return len(text)
        begun = next((n for n in range(len(opens) - 1, 0, -1) if text.endswith(opens[:n])), 0)
        return len(text[: len(text) - begun].rstrip())

    def _call_end(self, start: int, is_last: bool) -> int | None:
        """Return where the first call ends, None if it may go on. start: where its opening tag ends."""
        text, mark = self._waiting, self.format.closes or self.format.opens
        at = self._next_mark(mark, start)
        if at is None and is_last and self._quoted:  # a string without an end
            self._quoted, self._searched = None, start
        if at is None and self._quoted is None:
            position = text.find(mark, max(start, self._searched - len(mark)))
            at, self._searched = (None if position < 0 else position), len(text)
        if at is None:
            return len(text) if is_last else None
        return at + len(mark) if self.format.closes else len(text[:at].rstrip())

    def _next_mark(self, mark: str, start: int) -> int | None:
        """Return where the tag `mark` begins in the waiting text, at `start` or later and outside of JSON
        strings. None if it is not there yet, or if a string is invalid; then `_quoted` is None.
        """
        text, at = self._waiting, max(start, self._searched)
        while self._quoted is not None and at < len(text):
            if not self._quoted and mark.startswith(text[at : at + len(mark)]):
                if at + len(mark) <= len(text):
                    return at
                break
            step = 2 if self._quoted and text[at] == "\\" else 1
            if at + step > len(text):
                break
            if text[at] == '"':
                self._quoted = not self._quoted
            elif self._quoted and text[at] < " ":  # JSON has such a character as an escape only
                self._quoted, self._searched = None, start
                return None
            at += step
        self._searched = at
        return None

    def _parsed(self, text: str) -> list[ToolCall]:
        """Return the calls in the text of a call with its tags, [] if any of them is malformed."""
        text = text.strip().removeprefix(self.format.opens).removesuffix(self.format.closes or "").strip()
        try:
            named = [(name, _as_json(arguments)) for name, arguments in self.format.parse(text)]
        except (ValueError, RecursionError):
            return []
        self.count += len(named)
        first = self.count - len(named)
        return [
            ToolCall(index, self.format.make_id(), name, arguments)
            for index, (name, arguments) in enumerate(named, first)
        ]


def _as_json(arguments: Any) -> str:
    """Return a call's arguments, a dictionary or JSON text, as the JSON text of an object. Raises ValueError
    for anything else, and for NaN, infinity and unpaired surrogates.
    """
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # no half of a surrogate pair
    return text


def _named(item: Any) -> tuple[str, Any]:
    """Return the name and the arguments (or None) of a call in JSON. Raises ValueError without a name."""
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        raise ValueError("a call needs a name")
    return item["name"], item.get("arguments", item.get("parameters"))


def _hermes(text: str) -> list[tuple[str, Any]]:
    """Return (name, arguments) of each call in a text. A call without arguments has {}."""
    parsed = json.loads(text)
    calls = map(_named, parsed if isinstance(parsed, list) else [parsed])
    return [(name, {} if arguments is None else arguments) for name, arguments in calls]


def _llama3(text: str) -> list[tuple[str, Any]]:
    """Return (name, arguments) of each call in a text. Arguments are None if they are missing; the text is
    then no call, since other JSON may have a name too.
    """
    calls, rest = list[tuple[str, Any]](), text
    while rest:
        item, end = json.JSONDecoder().raw_decode(rest)
        calls.append(_named(item))
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return calls


_MISTRAL_CALL = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")


def _mistral(text: str) -> list[tuple[str, Any]]:
    named = _MISTRAL_CALL.match(text)
    return [(named[1], text[named.end() :])] if named else _hermes(text)


def _nine_characters() -> str:
    """Return a random id of 9 digits and letters, as Mistral's templates require it."""
    return secrets.token_hex(5)[:9]
