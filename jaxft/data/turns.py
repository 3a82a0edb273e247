"""Find the assistant turns in a rendered conversation, as ranges of characters."""

from os.path import commonprefix

from jaxft.data.example import Chat
from jaxft.data.template import Span, Template, render_messages


def turn_range(template: Template, chat: Chat, text: str, index: int) -> Span:
    """Return the range of assistant turn `index` in the rendered conversation, including its end-of-turn
    token.

    The content is searched after the rendered messages before it. If the template rewrites earlier turns or
    the response itself, the range is found by rendering the conversation with another response in its place.
    """
    message = chat.messages[index]
    start = _start(template, chat, text, index)
    if start is not None and "tool_calls" not in message:
        for content, at in (
            (message["content"], start),
            (message["content"].strip(), start + _space(text, start)),
        ):
            end = _close(template, text, at + len(content)) if text.startswith(content, at) else None
            if end is not None:
                return start, end
    if start is not None:
        through = render_messages(template, chat.messages[: index + 1], chat.tools)
        if text.startswith(through) and len(through) > start:
            return start, _last_close(template, text, start, len(through))
    first, last = _exchange(template, chat, text, index)
    return first if start is None else start, _close(template, text, last) or last


def _start(template: Template, chat: Chat, text: str, index: int) -> int | None:
    """Return where generation would start: after the previous messages and the generation prompt, if there is
    one.
    """
    if index == 0:
        return None
    prefix = render_messages(template, chat.messages[:index], chat.tools, generation=True)
    if not text.startswith(prefix):
        return None
    content = chat.messages[index]["content"].strip()
    if template.opening or (content and text.startswith(content, len(prefix) + _space(text, len(prefix)))):
        return len(prefix)
    return None  # the text between is a header, which is no target


def _exchange(template: Template, chat: Chat, text: str, index: int) -> Span:
    others = with_other_response(template, chat, index)
    first = min(len(commonprefix([text, other])) for other in others)
    last = len(text) - min(len(commonprefix([text[::-1], other[::-1]])) for other in others)
    if first >= last:
        raise TypeError(f"it omits message {index}, an assistant turn")
    return first, last


def with_other_response(template: Template, chat: Chat, index: int) -> list[str]:
    """Render the conversation with two other responses in turn `index` without a common first or last
    character.
    """
    before, after = chat.messages[:index], chat.messages[index + 1 :]
    others = [{"role": "assistant", "content": content} for content in ("Qx7w", "Zk9y")]
    return [render_messages(template, [*before, other, *after], chat.tools) for other in others]


def extended_end(template: Template, text: str, start: int, end: int) -> int:
    """Return the end of a marked turn including its end-of-turn token: without it the model would not learn
    to stop.
    """
    return end if is_closed(template, text[start:end]) else _close(template, text, end) or end


def _space(text: str, at: int) -> int:
    rest = text[at : at + 100]
    return len(rest) - len(rest.lstrip())


def _close(template: Template, text: str, at: int) -> int | None:
    match = template.closing.match(text, at) if template.closing else None
    return match.end() if match else None


def _last_close(template: Template, text: str, start: int, end: int) -> int:
    ends = [m.end() for m in template.closing.finditer(text, start, end)] if template.closing else []
    return ends[-1] if ends and not text[ends[-1] : end].strip() else end


def is_closed(template: Template, text: str) -> bool:
    """Whether the text ends with an end-of-turn token, apart from whitespace."""
    end = len(text.rstrip())
    return template.closing is not None and any(m.end() == end for m in template.closing.finditer(text))
