"""A tokenizer's chat template: rendering conversations, the beginning and the end of an assistant turn, and
remedies for rows that the template rejects.
"""

import json
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, lru_cache
from os.path import commonprefix
from typing import Any

import jinja2

from jaxft.data.row_settings import DATE, DEFAULT_TEMPLATE_SETTINGS, MERGE, TemplateSettings
from jaxft.data.rows.example import Chat, Message
from jaxft.data.rows.invalid_rows import similar_names

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

LONGEST_TEXT = 2 << 20  # characters of one text that is tokenised; each may take 500 bytes
RENDER_SECONDS = 20.0  # that a template may take for one conversation in the main thread of a process
Span = tuple[int, int]  # a range of characters of a rendered text: first, one after the last
PROBES = ("Qx7w", "Zk9y", "Jv5u")  # the contents of a question, a response and the next question
PROBE_TOOLS = (
    {"type": "function", "function": {
        "name": "Nm2k", "description": "Pd6c", "parameters": {
            "type": "object", "properties": {"Tp4z": {"type": "string", "description": "Pd6c"}},
            "required": ["Tp4z"]}}},
)  # fmt: skip
REJECTIONS = (jinja2.TemplateError, TypeError)  # what a template raises for messages that it can't render


class UnusableTemplate(ValueError):
    """A chat template that no row can use, or that is too slow. It ends a run even with data.invalid=drop."""


class TemplateFault(jinja2.TemplateError):
    """The code of a chat template fails, such as by a division by zero, without a call of raise_exception."""


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with a pinned date. It contains no tokenizer, so copying it is cheap.

    name: how errors call it. source: its Jinja text. date: passed to it as date_string. variables: texts of
    special tokens by the names that templates use, such as bos_token. tokens: all special and added tokens.
    marked: whether it has {% generation %} markers. opening: the generation prompt, such as
    "<|im_start|>assistant\\n". header: the text between a prompt and its response, if there is no generation
    prompt; else "". earlier_header: the text between a prompt and a response that another message follows;
    None if the text of the prompt changes when they follow. ends: the texts that end an assistant turn, such
    as "<|im_end|>"; () if no special token does. last_ends: the ones that end a conversation's last
    turn. arguments: further arguments that it is rendered with, by name. merges: whether a system message is
    put in front of the first user turn. failure: the error that it raises even for a simple question and
    response, "" for none. last_tokens: ids of the special tokens that end the last turn. tool_use: the
    template of conversations with tools, None if it is this one. needs_content: null contents, as in turns of
    tool calls, become "", because it rejects null or renders it as the word None. needs_parts: contents are
    passed as lists of one text part, as the templates of vision models expect.
    """

    name: str
    source: str
    date: str
    variables: Mapping[str, str]
    tokens: tuple[str, ...]
    marked: bool
    opening: str = ""
    header: str = ""
    earlier_header: str | None = None
    ends: tuple[str, ...] = ()
    last_ends: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = False
    failure: str = ""
    last_tokens: tuple[int, ...] = ()
    tool_use: "Template | None" = None
    needs_content: bool = False
    needs_parts: bool = False

    @cached_property
    def closing(self) -> re.Pattern | None:
        """A regex for the end of an assistant turn with the whitespace before it, None if no special token
        ends a turn.
        """
        return re.compile(rf"\s*(?:{_any_of(self.ends)})") if self.ends else None

    @cached_property
    def special(self) -> re.Pattern:
        """A regex for any special token of the tokenizer."""
        return re.compile(_any_of(token for token in self.tokens if token.strip()) or "(?!)")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The token ids that end the last turn of a conversation, at which generation stops."""
        others = self.tool_use.stop_tokens if self.tool_use else ()
        return tuple(dict.fromkeys([*self.last_tokens, *others]))

    def of_chat(self, chat: Chat) -> "Template":
        """Return the template for a conversation: the one for tools if the conversation has tools, as
        transformers' apply_chat_template chooses. The conversation's arguments override the run's.
        """
        chosen = self.tool_use if chat.tools and self.tool_use else self
        return replace(chosen, arguments={**chosen.arguments, **chat.arguments}) if chat.arguments else chosen


def name_of_template(tokenizer: Any) -> str:
    """Return how errors call a tokenizer's chat template, such as "the chat template of Qwen/Qwen3-0.6B"."""
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def template_of(tokenizer: Any, settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS) -> Template | None:
    """Return the tokenizer's chat template, None if it has none. It prints settings.date in place of today's
    date.

    Raises ValueError for an argument (data.chat_template_kwargs) that the template does not read, and for a
    date in another format than "26 Jul 2024"; UnusableTemplate if the template does not render turns in their
    order, or takes too long.
    """
    unread = _unread_arguments(tokenizer, settings)
    if unread:
        words = sorted(set(re.findall(r"[A-Za-z_]\w+", " ".join(_sources(tokenizer)))))
        near = f"near: {', '.join(similar_names(unread[0], words))}" if words else "there is no template"
        raise ValueError(
            f"data.chat_template_kwargs: {name_of_template(tokenizer)} does not read {unread[0]!r} ({near}); "
            "correct or remove it"
        )
    if not tokenizer.chat_template:
        return None
    try:
        day = datetime.strptime(settings.date, "%d %b %Y")
    except ValueError as error:
        raise ValueError(f"data.date={settings.date!r} is not a date like {DATE!r}; correct it") from error
    source, *others = (
        _STRFTIME.sub(lambda m: json.dumps(day.strftime(m[2])), text) for text in _sources(tokenizer)
    )
    template = _probed(tokenizer, source, settings)
    return replace(template, tool_use=_probed(tokenizer, others[0], settings, True)) if others else template


def settings_for(tokenizer: Any, settings: TemplateSettings) -> TemplateSettings:
    """Return the settings without the items of chat_template_kwargs that the tokenizer's template does not
    read: a run's reward model, for example, may have another template than the run's model.
    """
    unread = _unread_arguments(tokenizer, settings)
    kept = (item for item in settings.chat_template_kwargs if item.partition("=")[0].strip() not in unread)
    return replace(settings, chat_template_kwargs=tuple(kept))


def _sources(tokenizer: Any) -> list[str]:
    """Return the texts of the template and of another one for tools, [] without a template."""
    if not tokenizer.chat_template:
        return []
    sources = (tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=list(PROBE_TOOLS)))
    return list(dict.fromkeys(map(str, sources)))


def _unread_arguments(tokenizer: Any, settings: TemplateSettings) -> list[str]:
    source = " ".join(_sources(tokenizer))
    return [name for name in settings.arguments if not re.search(rf"\b{name}\b", source)]


@lru_cache(maxsize=16)
def _probed(tokenizer: Any, source: str, settings: TemplateSettings, tools: bool = False) -> Template:
    """Return a Template whose fields, such as `opening` and `ends`, are found by rendering short
    conversations.

    source: the template's Jinja text. tools: whether the conversations have a tool. If the template fails for
    them, or omits a content, `ends` is the EOS token. Raises UnusableTemplate.
    """
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    bare = Template(
        name_of_template(tokenizer), source, settings.date,
        variables={key: str(token) for key, token in tokenizer.special_tokens_map.items()},
        tokens=tuple(dict.fromkeys([*added, *tokenizer.all_special_tokens])),
        marked=bool(_GENERATION.search(source)), arguments=settings.arguments,
        merges=settings.system == MERGE,
    )  # fmt: skip
    failures = []
    for system in ([], [{"role": "system", "content": "Kb5h"}]):  # which some templates require
        try:
            given = list(PROBE_TOOLS) if tools else None
            needing = replace(bare, needs_parts=_needs_parts(bare, system, given))
            needing = replace(needing, needs_content=_needs_content(needing, system, given))
            probed = _probed_after(needing, system, given)
            last = (bare.special.findall(end)[-1] for end in probed.last_ends)
            return replace(probed, last_tokens=tuple(map(tokenizer.convert_tokens_to_ids, last)))
        except UnusableTemplate:
            raise
        except REJECTIONS as error:
            failures.append(failure_text(error))
        except (LookupError, ValueError):  # it omits parts of these conversations
            failures.append("")
    ends = (tokenizer.eos_token,) if tokenizer.eos_token else ()
    return replace(bare, ends=ends, failure=failures[0] if all(failures) else "")


def failure_text(error: Exception) -> str:
    """Return the message of a template's error, with the line of a syntax error."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return str(error)


def _probed_after(bare: Template, system: list[Message], tools: list | None) -> Template:
    """Return the template `bare` with the fields `opening`, `header`, `earlier_header`, `ends` and
    `last_ends`, found by rendering short conversations.

    system: their messages before the first question. tools: schemas, None for none. Raises UnusableTemplate
    if turns are not in their order, ValueError or IndexError if the response is missing, and the errors of
    render_messages.
    """

    def rendered(messages: Sequence[Message], generation: bool = False) -> str:
        return render_messages(bare, messages, tools, generation)

    asked = [*system, {"role": "user", "content": "Qx7w"}]
    answered = [*asked, {"role": "assistant", "content": "Zk9y"}]
    longest = rendered([*answered, {"role": "user", "content": "Jv5u"}])
    places = [longest.find(word) for word in PROBES]
    if min(places) >= 0 and places != sorted(places):
        raise UnusableTemplate(
            f"{bare.name} does not render the turns of a conversation in their order; use another tokenizer"
        )
    prompt, opened = rendered(asked), rendered(asked, True)
    opening = opened[len(commonprefix([prompt, opened])) :]
    before, behind = rendered(answered).split("Zk9y")
    between = longest.split("Zk9y")[1].split("Jv5u")[0]
    header = before.removeprefix(prompt) if not opening and before.startswith(prompt) else ""
    earlier = longest.split("Zk9y")[0]
    earlier_header = earlier.removeprefix(prompt) if earlier.startswith(prompt) else None
    last, inner = _ends_of_text(bare.special, opening, behind, between)
    last = tuple(dict.fromkeys([*last, *_ends_of_calls(bare, asked, tools)])) if last else ()
    ends = tuple(dict.fromkeys([*last, *inner]))
    header = header if header.strip() else ""
    return replace(
        bare, opening=opening, header=header, earlier_header=earlier_header, ends=ends, last_ends=last
    )


def _any_of(tokens: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def _ends_of_text(
    special: re.Pattern, opening: str, behind: str, between: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the text that ends the last assistant turn, and the text that ends earlier ones, each as a list
    of one text, [] if no special token does. opening: the generation prompt. behind: the text after the last
    response. between: the text between a response and the next question.
    """
    shared = list(special.finditer(commonprefix([behind, between])))
    if shared:
        end = behind[shared[0].start() : shared[-1].end()]
        return [end], [end]
    last, inner = special.findall(behind), special.findall(between)
    if not last:
        return [], []
    # A single token between two turns opens the second.
    return last[:1], inner[:1] if len(inner) > 1 and inner[0] not in special.findall(opening) else []


def _ends_of_calls(bare: Template, asked: list[Message], tools: list | None) -> list[str]:
    """Return the special token that ends an assistant turn of tool calls, as a list; [] without one, if it
    ends every call of the turn, or if calls are not rendered. asked: the messages before the turn.
    """
    for count, content in ((2, None), (2, ""), (1, None), (1, "")):
        calls = [_probe_call(number) for number in range(count)]
        results = [
            {"role": "tool", "content": "Rt8p", "name": call["function"]["name"], "tool_call_id": call["id"]}
            for call in calls
        ]
        turns = [*asked, {"role": "assistant", "content": content, "tool_calls": calls}]
        try:
            last, inner = render_messages(bare, turns, tools), render_messages(bare, turns + results, tools)
        except REJECTIONS:
            continue
        *within, behind = last.split("Wm3t")
        between = inner.split("Wm3t")[-1].split("Rt8p")[0]
        if len(within) != count:
            continue
        special = list(bare.special.finditer(commonprefix([behind, between])))
        if not special or behind[special[-1].end() :].strip():
            return []
        end = special[-1][0]
        return [] if any(end in text for text in within[1:]) else [end]  # which would end each call
    return []


def _needs_content(bare: Template, system: list[Message], tools: list | None) -> bool:
    """Whether a turn of tool calls needs "" as content: null is rejected or rendered as the word None."""
    texts, asked = list[str | None](), [*system, {"role": "user", "content": PROBES[0]}]
    for content in (None, ""):
        turn = {"role": "assistant", "content": content, "tool_calls": [_probe_call(0)]}
        try:
            texts.append(render_messages(bare, [*asked, turn], tools))
        except REJECTIONS:
            texts.append(None)
    null, empty = texts
    return empty is not None and (null is None or null.count("None") > empty.count("None"))


def _needs_parts(bare: Template, system: list[Message], tools: list | None) -> bool:
    """Whether a question is rendered only if its content is a list of parts."""
    asked = [*system, {"role": "user", "content": PROBES[0]}]
    for template in (bare, replace(bare, needs_parts=True)):
        try:
            if PROBES[0] in render_messages(template, asked, tools):
                return template.needs_parts
        except REJECTIONS:
            continue
    return False


def _probe_call(number: int) -> dict[str, Any]:
    function = {"name": f"Zk9y{number}", "arguments": {"Jv5u": "Wm3t"}}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def with_merged_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the first message, if it is a system message, put in front of the content of
    the first user turn; unchanged if there is no user turn.

    >>> with_merged_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    [{'role': 'user', 'content': 'Be brief.\\n\\nWhy?'}]
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or messages[0]["role"] != "system":
        return list(messages)
    system, user = messages[0]["content"] or "", messages[first]
    merged = {**user, "content": f"{system}\n\n{user['content'] or ''}"}
    return [*messages[1:first], merged, *messages[first + 1 :]]


def render_messages(
    template: Template, messages: Sequence[Message], tools: list | None = None, generation: bool = False
) -> str:
    """Return the conversation as the template renders it, with the generation prompt if `generation`.

    Raises jinja2.TemplateError or TypeError if the template rejects the messages and, in the main thread of a
    process, UnusableTemplate if it takes more than RENDER_SECONDS. The server renders in other threads, which
    have no time limit.
    """
    (text,), _ = _render(template, messages, tools, add_generation_prompt=generation)
    return text


def render_marked(template: Template, chat: Chat) -> tuple[str, list[Span]]:
    """Return the conversation as text, and the character ranges that its {% generation %} markers enclose.
    Raises the errors of render_messages.
    """
    (text,), (ranges,) = _render(template, chat.messages, chat.tools, return_assistant_tokens_mask=True)
    return text, ranges


def _render(template: Template, messages: Sequence[Message], tools: list | None, **options: Any) -> Any:
    """Render a conversation in transformers' sandbox. Return ([text], [character ranges]); the second list is
    empty unless the option return_assistant_tokens_mask asks for the ranges inside {% generation %} markers.

    options: arguments of transformers' render_jinja_template. A null content is passed to the template, which
    apply_chat_template of transformers 5 does not do: some templates render tool calls only then. The
    arguments of tool calls are passed as objects and, if that raises TypeError, as JSON text: templates such
    as DeepSeek-R1's append them to text. Raises the errors of render_messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = with_merged_system(messages) if template.merges else list(messages)
    if template.needs_content:
        conversation = [m if m["content"] is not None else {**m, "content": ""} for m in conversation]
    if template.needs_parts:
        parts = ([{"type": "text", "text": m["content"] or ""}] for m in conversation)
        conversation = [{**m, "content": part} for m, part in zip(conversation, parts, strict=True)]
    variables = {**template.variables, "date_string": template.date, **template.arguments}

    def run(messages: list[Message]) -> Any:
        return render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template.source, **options, **variables
        )

    try:
        with _time_limit(RENDER_SECONDS):
            try:
                rendered = run(conversation)
            except TypeError:
                if not any(message.get("tool_calls") for message in conversation):
                    raise
                rendered = run(list(map(_with_text_arguments, conversation)))
    except REJECTIONS:
        raise
    except _TooSlow as error:
        slow = f"{template.name} takes more than {RENDER_SECONDS:g} s for a conversation"
        raise UnusableTemplate(f"{slow}; use another tokenizer") from error
    except Exception as error:  # a template is a program, and may raise anything
        raise TemplateFault(f"{type(error).__name__}: {error}") from error
    text = rendered[0][0]
    if len(text) > LONGEST_TEXT:
        raise jinja2.TemplateError(f"it renders {len(text)} characters, more than {LONGEST_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} of the rendered text is an unpaired surrogate"
        raise jinja2.TemplateError(problem) from error
    return rendered


class _TooSlow(Exception):
    """A rendering takes more than RENDER_SECONDS."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TooSlow if the `with` block takes more than `seconds`, in the main thread of a process.

    Other threads receive no signals and have no limit. Data workers are processes, so that their rows have
    one; the server's requests have none. It does not interrupt a single operation of a template, such as
    9**9**9.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _with_text_arguments(message: Message) -> Message:
    """Return the message with the arguments of its tool calls as JSON text."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": as_text(call["function"])}
        if call.get("arguments") is None:
            return call
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [as_text(call) for call in calls]} if calls else message


NINE = re.compile(r"[A-Za-z0-9]{9}")  # the format of tool call ids that Mistral's templates require


def rejection(
    template: Template, messages: Sequence[Message], tools: list | None, error: Exception, what: str
) -> str:
    """Return the text of an error for messages that a template rejects, with a remedy.

    error: the error that the template raised. what: a noun for the messages, such as "row". Raises
    UnusableTemplate if the template raises this error even for a simple question and response, unless the
    template itself raises it by a call of raise_exception.
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
    remedy = next(filter(None, remedies), other)
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
    """Return the remedy for tool calls without ids in Mistral's format, None if such ids do not help."""
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
    """Return the remedy for turns that do not alternate, if `reason`, the template's error, is about it."""
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
