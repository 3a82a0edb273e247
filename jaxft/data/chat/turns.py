"""Find the assistant turns in a rendered conversation, as character ranges, and check that each shows all of
its turn: content, reasoning and tool calls.

Chat templates silently drop parts that they don't support, such as tool calls or thinking blocks. A model
trained on such text would learn to end its turn where it should call a tool.
"""

import functools
import html
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from jaxft.data.chat.template import REJECTIONS, Span, Template, render_marked, render_messages
from jaxft.data.rows.example import Chat, Message
from jaxft.data.rows.invalid_rows import InvalidRow

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of messages in different templates
THINKING = "the thinking block"
MARKER = re.compile(r"Qx7w\d+Zk", re.IGNORECASE)  # a word of with_markers
_THOUGHT = re.compile(r"\s*(?:<think>)?(?P<thought>.*?)</think>(?P<content>.*)", re.DOTALL)


class Part(NamedTuple):
    """A part of an assistant turn. name: for errors, such as "argument city of tool call 1". spellings: texts
    of which a template writes one, such as "true" and "True".
    """

    name: str
    spellings: tuple[str, ...]


class HiddenPart(ValueError):
    """An assistant turn that the rendered text does not show exactly: a part or the turn's end is missing,
    its range includes later text, or its null content is rendered as None. Also a malformed tool call.
    """


def parts_of(message: Message) -> list[Part]:
    """Return the parts that a rendered assistant turn must show: reasoning, content and tool calls.

    A thinking block at the start of the content, up to </think>, is a separate part. Raises HiddenPart for a
    malformed tool call.
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
    """Search text[start:end] for parts. Return the first missing part or None, and the end of the part that
    ends last (`start` if a part is missing).

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
    """Return the end of the part that ends last, 0 without parts, or the first missing part. Each part is
    searched for after the previous one, then from the beginning.
    """
    at = last = 0
    for part in parts:
        match = _first(part, text, at) or _first(part, text, 0)
        if match is None:
            return part
        at = match[1]
        last = max(last, at)
    return last


def _first(part: Part, text: str, at: int) -> Span | None:
    """Return the first occurrence of a spelling of the part at or after `at`, the longest if several begin
    there; None if no spelling occurs.
    """
    matches = [(text.find(spelling, at), -len(spelling)) for spelling in part.spellings]
    start, length = min((pair for pair in matches if pair[0] >= 0), default=(-1, 0))
    return None if start < 0 else (start, start - length)


def with_markers(message: Message, first: int = 0) -> tuple[Message, dict[str, str]]:
    """Return the turn with each text replaced by a unique word, and a dict from words to names of parts.

    first: the number of the first word, for words that are unique among several turns. If a rendering lacks a
    word, the template hides that part, even if the part's text occurs elsewhere by chance.
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
            thinking = mark(thought["thought"], THINKING)
            other["content"] = f"<think>\n{thinking}\n</think>\n\n{other['content']}"
    if message.get("tool_calls"):
        other["tool_calls"] = [mark_call(call, i) for i, call in enumerate(message["tool_calls"], 1)]
    return {**message, **other}, words


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _function(call: Any) -> dict[str, Any]:
    """Return the dictionary with a call's name and arguments. Raises HiddenPart if there is none."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        raise HiddenPart(
            f"a tool call is {json.dumps(call, default=str)[:60]}; use an object with name and arguments"
        )
    return inner


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, key or scalar) for each key and each scalar in a call's arguments, nothing for None. Items
    of a list have the list's path; arguments that are a single scalar have the path "text".

    >>> [*_leaves({"at": {"x": [1, 2]}})]
    [('at', 'at'), ('at.x', 'x'), ('at.x', 1), ('at.x', 2)]
    """
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
    """Return a value as written in JSON and Python, and a string also as in HTML; strings without quotes."""
    if value is None or isinstance(value, bool):
        return str(value), json.dumps(value), str(value).lower()
    if not isinstance(value, str):
        return str(value), json.dumps(value, default=str)
    return (
        value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1],
        html.escape(value),
    )  # fmt: skip


Hidden = Callable[[int], str | None]  # turn's index → name of a part that the template drops, or None
MOST_WORK = 1 << 31  # of a row: turns times the size of a rendering; takes about 5 s
MESSAGE_WORK = 256  # what a message costs in addition to its characters


def render_turns(template: Template, chat: Chat, learned: list[int]) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the ranges of the assistant turns `learned`, each with its
    end-of-turn token.

    learned: indices of these messages, in ascending order. A turn has one range, which follows the prompt
    from which the turn would be generated. If the template has {% generation %} markers, a turn has the
    ranges that they enclose, which may be several. Raises HiddenPart if the text does not show a turn
    exactly, InvalidRow if the row has so many turns that this takes too long, and the errors of
    render_messages.
    """
    size = sum(len(message["content"] or "") + MESSAGE_WORK for message in chat.messages)
    if len(learned) * size > MOST_WORK:
        problem = (
            f"{len(learned)} learned turns in {len(chat.messages)} messages take too long to render one by "
            "one; split the conversation into several rows, or set data.loss_on=completion"
        )
        raise InvalidRow(chat.name, "conversation of too many turns", problem)
    hidden = _make_hidden(template, chat, learned)
    if not template.marked:
        text = render_messages(template, chat.messages, chat.tools)
        spans = [_turn(template, chat, text, index, hidden) for index in learned]
    else:
        text, marked = render_marked(template, chat)
        of_turn = _one_of_each(template, chat, text, marked)
        spans = [
            span
            for i in learned
            for span in _marked_turn(
                template, chat, text, i, of_turn.get(i) or _inside(template, chat, text, marked, i), hidden
            )
        ]
    return text, spans


def is_closed(template: Template, text: str) -> bool:
    """Whether the text ends with an end-of-turn token, apart from whitespace."""
    return bool(template.ends) and text.rstrip().endswith(template.ends)


def _one_of_each(template: Template, chat: Chat, text: str, marked: list[Span]) -> dict[int, list[Span]]:
    """Assign marked ranges to assistant turns by their order: {message's index: [range]}. {} unless there is
    one per turn, each after a generation prompt, and a special token ends turns: see `_inside`.
    """
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    opening = template.opening
    if len(marked) != len(turns) or not opening.strip() or template.closing is None:
        return {}
    if not all(text.endswith(opening, 0, start) for start, _ in marked):
        return {}
    return {i: [span] for i, span in zip(turns, marked, strict=True)}


def _inside(template: Template, chat: Chat, text: str, marked: list[Span], index: int) -> list[Span]:
    """Return the marked ranges inside turn `index`, without the turn's header if it is marked too. Raises
    HiddenPart if there is none, or if the last one includes text after the turn.

    Templates may mark several ranges in a turn, and turns of other roles.
    """
    start, limit = _start(template, chat, text, index), _limit(template, chat, text, index)
    if start is None or limit is None:
        first, last = _exchange(template, chat, text, index)
        start, limit = first if start is None else start, last if limit is None else limit
    spans = [(max(span[0], start), span[1]) for span in marked if start < span[1] and span[0] < limit]
    if not spans:
        raise HiddenPart(f"its generation markers do not enclose message {index}, an assistant turn")
    after = text[limit : spans[-1][1]].strip()
    if after:
        raise HiddenPart(f"its generation markers enclose {after[:40]!r} after the end of message {index}")
    return spans


def _marked_turn(
    template: Template, chat: Chat, text: str, index: int, spans: list[Span], hidden: Hidden
) -> list[Span]:
    """Return the marked ranges of a turn, the last one extended by the turn's end-of-turn token, from which
    the model learns to stop. Raises HiddenPart if they do not show the turn exactly.
    """
    start, end = spans[0][0], spans[-1][1]
    closing = template.closing.match(text, end) if template.closing else None
    if closing and not is_closed(template, text[start:end]):
        end = closing.end()
    shown = text
    for (_, left), (right, _) in itertools.pairwise(spans):  # text between them is not trained on
        shown = shown[:left] + "\n" * (right - left) + shown[right:]
    last = _checked_end(template, chat, shown, index, (start, end), hidden)
    after = text[last:end].strip()
    if after == template.variables.get("eos_token") and not text[end:].strip():
        return spans  # the EOS that ends the conversation
    if after:
        raise HiddenPart(f"its generation markers enclose {after[:40]!r} after the end of message {index}")
    return [*spans[:-1], (spans[-1][0], max(last, spans[-1][0]))]


def _turn(template: Template, chat: Chat, text: str, index: int, hidden: Hidden) -> Span:
    start = _start(template, chat, text, index)
    exact = None if start is None else _turn_of_text(template, chat, text, index, start)
    if exact is not None:
        return exact
    limit = _limit(template, chat, text, index)
    if start is None or limit is None:
        first, last = _exchange(template, chat, text, index)
        start, limit = first if start is None else start, last if limit is None else limit
    return start, _checked_end(template, chat, text, index, (start, limit), hidden)


def _start(template: Template, chat: Chat, text: str, index: int) -> int | None:
    """Return where turn `index` starts: after the previous messages and the generation prompt.

    With enable_thinking=false, Qwen 3's generation prompt ends with an empty thinking block. Earlier turns
    lack it, so they start after their header. None for the first message, and if the template renders the
    previous messages differently when a response follows.
    """
    if index == 0:
        return None
    before = chat.messages[:index]
    prefix = render_messages(template, before, chat.tools, generation=True) + template.header
    if text.startswith(prefix):
        return len(prefix)
    if template.earlier_header is None:
        return None
    prefix = render_messages(template, before, chat.tools) + template.earlier_header
    return len(prefix) if text.startswith(prefix) else None


def _turn_of_text(template: Template, chat: Chat, text: str, index: int, start: int) -> Span | None:
    """Return the range of a turn of text alone whose content and end follow `start`, None for others."""
    message = chat.messages[index]
    alone = all(part.name in (THINKING, "the content") for part in parts_of(message))
    if not (alone and message["content"]) or template.closing is None:
        return None
    near = text[start : start + 100]
    content, stripped = message["content"], message["content"].strip()
    for words, at in ((content, start), (stripped, start + len(near) - len(near.lstrip()))):
        closing = template.closing.match(text, at + len(words))
        if closing and text.startswith(words, at):
            return start, closing.end()
    return None


def _limit(template: Template, chat: Chat, text: str, index: int) -> int | None:
    """Return a position after the turn and before the content of the next message.

    None if the template renders the turn differently when fewer messages follow.
    """
    through = chat.messages[: index + 1]
    if len(through) == len(chat.messages):
        return len(text)
    alone = render_messages(template, through, chat.tools)
    if text.startswith(alone):
        return len(alone)
    if template.closing is None:  # the end of the turn is not distinguishable from the next header
        return None
    marker = "Jv5uQx7w"
    following = {**chat.messages[index + 1], "content": marker}
    for after in ((), chat.messages[index + 2 :]):  # the last question may determine where tools are shown
        try:
            marked = render_messages(template, [*through, following, *after], chat.tools)
        except REJECTIONS:
            continue
        longer, separator, _ = marked.rpartition(marker)
        if separator and text.startswith(longer):
            return len(longer)
    return None


def _exchange(template: Template, chat: Chat, text: str, index: int) -> Span:
    """Return the range of turn `index`, with its end-of-turn token, where `_start` or `_limit` is None: the
    range in which the text changes if the turn is replaced by another one.

    Two replacements are tried, which have no first or last character in common.
    """
    before, after = chat.messages[:index], chat.messages[index + 1 :]
    turns = [{"role": "assistant", "content": content} for content in ("Qx7w", "Zk9y")]

    def common(after: Sequence[Message], order: int) -> int:
        others = [render_messages(template, [*before, turn, *after], chat.tools) for turn in turns]
        return min(len(commonprefix([text[::order], other[::order]])) for other in others)

    try:
        first, last = common(after, 1), len(text) - common(after, -1)
    except REJECTIONS:  # tool results without the tool calls of this turn
        following = next((i for i, m in enumerate(after) if m["role"] == "user"), len(after))
        first, last = common(after[following:], 1), len(text)
    first = next((t.start() for t in template.special.finditer(text) if t.start() < first < t.end()), first)
    header = template.earlier_header or ""
    if header.strip() and text.startswith(header, first):
        first += len(header)
    closing = template.closing.match(text, last) if template.closing else None
    return min(first, last), closing.end() if closing else last


def _checked_end(template: Template, chat: Chat, text: str, index: int, within: Span, hidden: Hidden) -> int:
    """Return where turn `index` ends, after its end-of-turn token. Raises HiddenPart if the range `within` of
    the text does not show the turn exactly, or if the turn is empty.
    """
    message, (start, limit) = chat.messages[index], within
    parts = parts_of(message)
    if not parts:
        raise HiddenPart(f"message {index}, an assistant turn, has neither content nor tool calls")
    missing, shown = find_parts(parts, text, start, limit)
    lost = missing.name if missing else hidden(index)
    if lost:
        raise HiddenPart(f"it does not show {lost} of message {index}, an assistant turn")
    known = sum(max(spelling.count("None") for spelling in part.spellings) for part in parts)
    if message["content"] is None and text.count("None", start, limit) > known:
        raise HiddenPart(f"it renders the content of message {index}, which is null, as the word None")
    if template.closing is None:
        return limit
    closing = template.closing.search(text, shown, limit)
    if closing is None and index < len(chat.messages) - 1:
        raise HiddenPart(f"it does not end message {index}, an assistant turn, with {template.ends[0]!r}")
    return closing.end() if closing else limit


def _make_hidden(template: Template, chat: Chat, learned: Sequence[int]) -> Hidden:
    """Return a function: turn's index → name of a part that the template drops, or None.

    The conversation is rendered once with words in place of the texts of all learned turns. Only for a turn
    whose words are missing there, it is rendered again with the words of this turn alone.
    """

    @functools.cache
    def suspects() -> frozenset[int]:
        messages, turns = list(chat.messages), dict[str, int]()
        for index in learned:
            messages[index], parts = with_markers(messages[index], len(turns))
            turns |= dict.fromkeys(parts, index)
        try:
            shown = set(MARKER.findall(render_messages(template, messages, chat.tools)))
        except REJECTIONS:  # the template needs a replaced value
            return frozenset(learned)
        return frozenset(index for word, index in turns.items() if word not in shown)

    def hidden(index: int) -> str | None:
        if index not in suspects():
            return None
        marked, parts = with_markers(chat.messages[index])
        messages = [*chat.messages[:index], marked, *chat.messages[index + 1 :]]
        try:
            text = render_messages(template, messages, chat.tools)
        except REJECTIONS:  # the template needs the replaced value
            return None
        return next((part for word, part in parts.items() if word not in text), None)

    return hidden
