"""Find the assistant turns in a rendered conversation, as character ranges that show each turn in full."""

import functools
import itertools
from collections.abc import Callable, Sequence
from os.path import commonprefix

from jaxft.data.chat.template import REJECTIONS, Span, Template, render_marked, render_messages
from jaxft.data.chat.template_check import (
    MARKER,
    THINKING,
    HiddenPart,
    find_parts,
    parts_of,
    shows_null,
    with_markers,
)
from jaxft.data.rows.example import Chat, Message
from jaxft.data.rows.invalid import InvalidRow

Hidden = Callable[[int], str | None]
MOST_WORK = 1 << 31  # of a row: turns times the size of a rendering; takes about 5 s
MESSAGE_WORK = 256  # what a message costs in addition to its characters


def render_turns(template: Template, chat: Chat, learned: list[int]) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the range of each assistant turn with its end-of-turn token.

    learned: indices of the messages to find, in ascending order. A turn's range is what the template's
    {% generation %} markers enclose. Without markers, it follows the prompt from which the turn would be
    generated. Raises HiddenPart if a range lacks a part or the end of the turn, or includes text after it,
    and InvalidRow if the row has so many turns that this takes too long. Also raises what render_messages
    raises.
    """
    _require_little_work(chat, learned)
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


def _require_little_work(chat: Chat, learned: Sequence[int]) -> None:
    """Raise InvalidRow if rendering the messages before each turn would take too long."""
    size = sum(len(message["content"] or "") + MESSAGE_WORK for message in chat.messages)
    if len(learned) * size > MOST_WORK:
        problem = (
            f"{len(learned)} learned turns in {len(chat.messages)} messages take too long to render one by "
            "one; split the conversation into several rows, or set data.loss_on=completion"
        )
        raise InvalidRow(chat.name, "conversation of too many turns", problem)


def is_closed(template: Template, text: str) -> bool:
    """Whether the text ends with an end-of-turn token, apart from whitespace."""
    return bool(template.ends) and text.rstrip().endswith(template.ends)


def _one_of_each(template: Template, chat: Chat, text: str, marked: list[Span]) -> dict[int, list[Span]]:
    """Return the marked range of each assistant turn, or {} if only further renderings can assign them.

    No further rendering is needed if there is one range per turn and each begins after a generation prompt.
    """
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    opening = template.opening
    if len(marked) != len(turns) or not opening.strip() or template.closing is None:
        return {}
    if not all(text.endswith(opening, 0, start) for start, _ in marked):
        return {}
    return {i: [span] for i, span in zip(turns, marked, strict=True)}


def _inside(template: Template, chat: Chat, text: str, marked: list[Span], index: int) -> list[Span]:
    """Return the marked ranges inside turn `index`, without the turn's header if it is marked too.

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
    """Return the marked ranges of a turn and its end-of-turn token, from which the model learns to stop."""
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
    lack it, so they start after their header. None if the template renders the previous messages otherwise
    when a response follows.
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
    """Return the range of a text-only turn whose content and end-of-turn token follow `start`; None for other
    turns.
    """
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

    None if the template renders the turn otherwise when fewer messages follow.
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
        longer, found, _ = marked.rpartition(marker)
        if found and text.startswith(longer):
            return len(longer)
    return None


def _exchange(template: Template, chat: Chat, text: str, index: int) -> Span:
    """Return the range in which the text differs when turn `index` has other content.

    Two other contents are tried, which have no first or last character in common.
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
    """Return where turn `index` ends. Raises HiddenPart if text[within] lacks a part or the turn's end."""
    message, (start, limit) = chat.messages[index], within
    parts = parts_of(message)
    if not parts:
        raise HiddenPart(f"message {index}, an assistant turn, has neither content nor tool calls")
    missing, shown = find_parts(parts, text, start, limit)
    lost = missing.name if missing else hidden(index)
    if lost:
        raise HiddenPart(f"it does not show {lost} of message {index}, an assistant turn")
    if shows_null(message, text[start:limit]):
        raise HiddenPart(f"it renders the content of message {index}, which is null, as the word None")
    if template.closing is None:
        return limit
    closing = template.closing.search(text, shown, limit)
    if closing is None and index < len(chat.messages) - 1:
        raise HiddenPart(f"it does not end message {index}, an assistant turn, with {template.ends[0]!r}")
    return closing.end() if closing else limit


def _make_hidden(template: Template, chat: Chat, learned: Sequence[int]) -> Hidden:
    """Return a function: turn's index → name of a part that the template drops, or None.

    One rendering in which all turns have such words is enough if it shows them all.
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

    return lambda index: _hidden_marker(template, chat, index) if index in suspects() else None


def _hidden_marker(template: Template, chat: Chat, index: int) -> str | None:
    """Return the part of turn `index` that is missing if each part is replaced by a unique word."""
    marked, parts = with_markers(chat.messages[index])
    messages = [*chat.messages[:index], marked, *chat.messages[index + 1 :]]
    try:
        text = render_messages(template, messages, chat.tools)
    except REJECTIONS:  # the template needs the replaced value
        return None
    return next((part for word, part in parts.items() if word not in text), None)
