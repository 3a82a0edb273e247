"""Find the assistant turns in a rendered conversation, as ranges of characters that show all of the turn."""

from os.path import commonprefix

from jaxft.data.example import Chat
from jaxft.data.template import REJECTIONS, Span, Template, render_marked, render_messages
from jaxft.data.template_check import HiddenPart, find_parts, parts_of, shows_null, with_markers


def render_turns(template: Template, chat: Chat, learned: list[int]) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the ranges of the `learned` assistant turns in it, in order, each
    with its end-of-turn token.

    A turn is what the template's {% generation %} markers enclose or, without markers, what follows the
    prompt that generation would start from. Raises HiddenPart if a turn's range lacks a part or the end of
    the turn, or goes beyond it, and what render_messages raises.
    """
    if not template.marked:
        text = render_messages(template, chat.messages, chat.tools)
        return text, [_turn(template, chat, text, index) for index in learned]
    text, marked = render_marked(template, chat)
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    spans = [[span] for span in marked]
    if len(marked) != len(turns):
        spans = _spans_of_each(template, chat, text, marked, turns)
    of_turn = dict(zip(turns, spans, strict=True))
    return text, [span for i in learned for span in _marked_turn(template, chat, text, i, of_turn[i])]


def is_closed(template: Template, text: str) -> bool:
    """Whether the text ends with an end-of-turn token, apart from whitespace."""
    return bool(template.ends) and text.rstrip().endswith(template.ends)


def _marked_turn(template: Template, chat: Chat, text: str, index: int, spans: list[Span]) -> list[Span]:
    """Return the marked ranges of a turn, extended by its end-of-turn token: without it the model would not
    learn to stop.
    """
    start, end = spans[0][0], spans[-1][1]
    closing = template.closing.match(text, end) if template.closing else None
    if closing and not is_closed(template, text[start:end]):
        end = closing.end()
    after = text[_checked_end(template, chat, text, index, (start, end)) : end].strip()
    if after:
        raise HiddenPart(f"its generation markers enclose {after[:40]!r} after the end of message {index}")
    return [*spans[:-1], (spans[-1][0], end)]


def _spans_of_each(
    template: Template, chat: Chat, text: str, marked: list[Span], turns: list[int]
) -> list[list[Span]]:
    """Return the marked ranges of each turn, of a template that has several of a turn or none."""
    begin, spans = 0, []
    for index in turns:
        limit = _limit(template, chat, text, index) or len(text)
        spans.append([span for span in marked if begin <= span[0] < limit])
        if not spans[-1]:
            raise HiddenPart(f"its generation markers do not enclose message {index}, an assistant turn")
        begin = spans[-1][-1][1]
    return spans


def _turn(template: Template, chat: Chat, text: str, index: int) -> Span:
    start = _start(template, chat, text, index)
    exact = None if start is None else _turn_of_text(template, chat, text, index, start)
    if exact is not None:
        return exact
    limit = _limit(template, chat, text, index)
    if start is None or limit is None:
        first, last = _exchange(template, chat, text, index)
        start, limit = first if start is None else start, last if limit is None else limit
    return start, _checked_end(template, chat, text, index, (start, limit))


def _start(template: Template, chat: Chat, text: str, index: int) -> int | None:
    """Return where generation would start: after the previous messages and the generation prompt or header.

    None if the template renders the previous messages in another way when a response follows.
    """
    if index == 0:
        return None
    prefix = render_messages(template, chat.messages[:index], chat.tools, generation=True) + template.header
    return len(prefix) if text.startswith(prefix) else None


def _turn_of_text(template: Template, chat: Chat, text: str, index: int, start: int) -> Span | None:
    """Return the range of a turn of text alone, if its content and an end-of-turn token follow the start."""
    message = chat.messages[index]
    if [part.name for part in parts_of(message)] != ["the content"] or template.closing is None:
        return None
    near = text[start : start + 100]
    content, stripped = message["content"], message["content"].strip()
    for words, at in ((content, start), (stripped, start + len(near) - len(near.lstrip()))):
        closing = template.closing.match(text, at + len(words))
        if closing and text.startswith(words, at):
            return start, closing.end()
    return None


def _limit(template: Template, chat: Chat, text: str, index: int) -> int | None:
    """Return a place after the turn that is not after the beginning of the next message's content.

    None if there is none because the template renders the turn in another way when fewer messages follow.
    """
    through = chat.messages[: index + 1]
    if len(through) == len(chat.messages):
        return len(text)
    alone = render_messages(template, through, chat.tools)
    if text.startswith(alone):
        return len(alone)
    if template.closing is None:  # the end of the turn could not be told from the next one's header
        return None
    marker = "Jv5uQx7w"
    following = {**chat.messages[index + 1], "content": marker}
    try:
        longer, found, _ = render_messages(template, [*through, following], chat.tools).rpartition(marker)
    except REJECTIONS:
        return None
    return len(longer) if found and text.startswith(longer) else None


def _exchange(template: Template, chat: Chat, text: str, index: int) -> Span:
    """Return the range that changes with the response: two others have no common first or last character."""
    before, after = chat.messages[:index], chat.messages[index + 1 :]
    turns = [{"role": "assistant", "content": content} for content in ("Qx7w", "Zk9y")]
    others = [render_messages(template, [*before, turn, *after], chat.tools) for turn in turns]
    first = min(len(commonprefix([text, other])) for other in others)
    last = len(text) - min(len(commonprefix([text[::-1], other[::-1]])) for other in others)
    closing = template.closing.match(text, last) if template.closing else None
    return min(first, last), closing.end() if closing else last


def _checked_end(template: Template, chat: Chat, text: str, index: int, within: Span) -> int:
    """Return where turn `index` ends. Raises HiddenPart if text[within] lacks a part or the end of it."""
    message, (start, limit) = chat.messages[index], within
    parts = parts_of(message)
    if not parts:
        raise HiddenPart(f"message {index}, an assistant turn, has neither content nor tool calls")
    missing, shown = find_parts(parts, text, start, limit)
    hidden = missing.name if missing else _hidden_marker(template, chat, index)
    if hidden:
        raise HiddenPart(f"it does not show {hidden} of message {index}, an assistant turn")
    if shows_null(message, text[start:limit]):
        raise HiddenPart(f"it shows the content of message {index}, which is null, as the word None")
    if template.closing is None:
        return limit
    closing = template.closing.search(text, shown, limit)
    if closing is None and index < len(chat.messages) - 1:
        raise HiddenPart(f"it does not end message {index}, an assistant turn, with {template.ends[0]!r}")
    return closing.end() if closing else limit


def _hidden_marker(template: Template, chat: Chat, index: int) -> str | None:
    """Return which part of turn `index` is missing when each is a word that occurs nowhere else."""
    marked, parts = with_markers(chat.messages[index])
    messages = [*chat.messages[:index], marked, *chat.messages[index + 1 :]]
    try:
        text = render_messages(template, messages, chat.tools)
    except REJECTIONS:  # for what the words stand in place of
        return None
    return next((part for word, part in parts.items() if word not in text), None)
