"""The error for a row that a chat template rejects, with a remedy that has been tried out on the row."""

import re
from collections.abc import Sequence
from dataclasses import replace

import jinja2

from jaxft.data.chat.template import REJECTIONS, Template, UnusableTemplate, failure_text, render_messages
from jaxft.data.rows.example import Message

NINE = re.compile(r"[A-Za-z0-9]{9}")  # the format of tool call ids that Mistral's templates require


def rejection(
    template: Template, messages: Sequence[Message], tools: list | None, error: Exception, what: str
) -> str:
    """Return the error message for messages that a template rejects. what: a name for them, such as "row".

    Raises UnusableTemplate if the template has the same error for a simple question and response.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    always = bool(str(error)) and failure_text(error) == template.failure
    if always and type(error) is not jinja2.TemplateError:  # which raise_exception raises
        raise UnusableTemplate(
            f"{template.name} fails ({reason.rstrip('.')}); use another tokenizer"
        ) from error
    remedies = [
        _remedy_for_system(template, messages, tools),
        _remedy_for_ids(template, messages, tools),
        _remedy_for_turns(messages, reason),
    ]
    other = "fix or remove the row"
    if always:
        other = "it rejects even a simple question and response, so use another tokenizer"
    remedy = next((found for found in remedies if found), other)
    return f"{template.name} rejects the {what}: {reason.rstrip('.')}; {remedy}"


def _renders(template: Template, messages: Sequence[Message], tools: list | None) -> bool:
    try:
        render_messages(template, messages, tools)
    except REJECTIONS:
        return False
    return True


def _remedy_for_system(template: Template, messages: Sequence[Message], tools: list | None) -> str | None:
    if template.merges or not messages or messages[0]["role"] != "system":
        return None
    if not _renders(replace(template, merges=True), messages, tools):
        return None
    return "set data.system=merge, which prepends the system message to the first user turn"


def _remedy_for_ids(template: Template, messages: Sequence[Message], tools: list | None) -> str | None:
    """Return the remedy for tool calls without ids, or with ids that are not in Mistral's format."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    results = [message for message in messages if message["role"] == "tool"]
    ids = [call.get("id") for call in calls] + [message.get("tool_call_id") for message in results]
    if all(isinstance(name, str) and NINE.fullmatch(name) for name in ids):
        return None
    if not _renders(template, list(map(_with_ids, messages)), tools):
        return None
    return "give every tool call an id of 9 letters and digits, and its result the same id as tool_call_id"


def _with_ids(message: Message) -> Message:
    calls = [{**call, "id": "a" * 9} for call in message.get("tool_calls") or ()]
    result = {"tool_call_id": "a" * 9} if message["role"] == "tool" else {}
    return {**message, **result, **({"tool_calls": calls} if calls else {})}


def _remedy_for_turns(messages: Sequence[Message], reason: str) -> str | None:
    """Return the remedy for turns that do not alternate."""
    if "alternat" not in reason.lower():
        return None
    turns = [
        i for i, m in enumerate(messages) if m["role"] in ("user", "assistant") and not m.get("tool_calls")
    ]
    roles = [messages[i]["role"] for i in turns]
    for number, (one, other) in enumerate(zip(roles, roles[1:], strict=False)):
        if one == other:
            return f"messages {turns[number]} and {turns[number + 1]} are both {one} turns; join them"
    if roles and roles[0] == "assistant":
        return "the conversation begins with an assistant turn; begin it with a user turn"
    return None
