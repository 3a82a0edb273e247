"""The token ids between two assistant turns: the end of the first, the messages that answer it, and the next
generation prompt.

A conversation that a model continues keeps its given and its sampled ids; none of them is tokenised again.
What the template adds after a turn is a suffix of text: the rendering with the turn and its answers, minus
the rendering up to the end of the turn. Only this suffix is tokenised.

A template that rewrites what comes before, such as one that drops earlier reasoning, has no such suffix: the
next prompt is then rendered as a whole and begins a new row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxft.data.chat.loss_mask import example_prompt_ids, rendered_ids
from jaxft.data.chat.template import REJECTIONS, Template, render_messages, template_of
from jaxft.data.chat.turns import HiddenPart, parts_of, render_turns
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.rows.example import Chat, Message
from jaxft.data.rows.invalid import InvalidRow, valid

SOME_TEXT = "Qx7w"  # content in the place of a turn without any, whose place in a rendering cannot be found


class TurnWording(NamedTuple):
    """One way to write a turn as a message, and the messages that answer it."""

    turn: Message
    answers: tuple[Message, ...]


class NextPrompt(NamedTuple):
    """The prompt of the next turn.

    ids: the ids to append to the conversation; with `restarts`, the whole prompt, which begins a new row.
    messages: the conversation up to this prompt.
    """

    ids: list[int]
    restarts: bool
    messages: tuple[Message, ...]


class _Suffix(NamedTuple):
    """The text after a turn: its end token (end; "" for none) and everything behind it (rest)."""

    end: str
    rest: str


def next_prompt(
    chat: Chat, ways: Sequence[TurnWording], stopped: bool, tokenizer: Any, settings: TemplateSettings
) -> NextPrompt:
    """Return the prompt after a turn that answers the messages of `chat`.

    ways: alternative wordings of the turn; the first that the template appends without a change of earlier
    text is used, else the first that it renders. stopped: whether the turn's stop token was sampled; if not,
    the returned ids begin with the template's end token. Raises InvalidRow if the template rejects all ways.

    Example: with ChatML, a sampled turn "4<|im_end|>" and the answer {"role": "user", "content": "Why?"}, the
    ids encode "\\n<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n".
    """
    template = template_of(tokenizer, settings)
    if template is None:
        raise InvalidRow(
            chat.name, "no chat template", "a further turn needs a chat template; set chat_template=chatml"
        )
    template = template.of_chat(chat)
    number, suffix = _first_suffix(template, chat, ways)
    if suffix is None:
        return _restart(chat, (*ways[number:], *ways[:number]), tokenizer, settings)
    messages = (*chat.messages, ways[number].turn, *ways[number].answers)
    ids, before = rendered_ids(suffix.end + suffix.rest, tokenizer), list[int]()
    if stopped and suffix.end:
        before = rendered_ids(suffix.end, tokenizer)
    return NextPrompt(ids[len(before) :], False, messages)


def _first_suffix(template: Template, chat: Chat, ways: Sequence[TurnWording]) -> tuple[int, _Suffix | None]:
    """Return (index, suffix) of the first way that the template appends without a change of earlier text;
    without one, (index, None) of the first way that it shows in full, else (0, None).
    """
    prompt, shown = render_messages(template, chat.messages, chat.tools, generation=True), list[int]()
    for number, way in enumerate(ways):
        try:
            suffix = _suffix(template, chat, way, prompt)
        except (HiddenPart, InvalidRow, *REJECTIONS):
            continue
        if suffix is not None:
            return number, suffix
        shown.append(number)
    return (shown or [0])[0], None


def _suffix(template: Template, chat: Chat, way: TurnWording, prompt: str) -> _Suffix | None:
    """Return the text that follows the turn; None if the template rewrites the text before it. prompt: the
    rendered prompt of the turn.

    Raises HiddenPart if it doesn't show all of the turn and its answers, and the errors of render_messages.
    """
    index, turn = len(chat.messages), way.turn
    if not parts_of(turn):
        turn = {**turn, "content": SOME_TEXT}
    messages = (*chat.messages, turn, *way.answers)
    text, spans = render_turns(template, replace(chat, messages=messages, response=index), [index])
    whole = render_messages(template, messages, chat.tools, generation=True)
    _require_answers(template, chat, (*chat.messages, turn), way.answers)
    end = spans[-1][1]
    if not text.startswith(prompt) or whole[:end] != text[:end]:
        return None
    ends = [x for x in template.ends if text.endswith(x, 0, end)]
    return _Suffix(max(ends, key=len, default=""), whole[end:])


def _require_answers(
    template: Template, chat: Chat, before: tuple[Message, ...], answers: tuple[Message, ...]
) -> None:
    """Raise HiddenPart if the template drops the content of an answer, a message after those in `before`."""
    words = [f"Qx7w{number}Zk" for number in range(len(answers))]
    marked = [{**answer, "content": word} for answer, word in zip(answers, words, strict=True)]
    text = render_messages(template, [*before, *marked], chat.tools).lower()
    if not all(word.lower() in text for word in words):
        raise HiddenPart("it does not show the content of a message that answers the turn")


def _restart(
    chat: Chat, ways: Sequence[TurnWording], tokenizer: Any, settings: TemplateSettings
) -> NextPrompt:
    """Return the whole conversation as a prompt of a new row. Raises InvalidRow if all ways are rejected."""
    for way in ways:
        messages = (*chat.messages, way.turn, *way.answers)
        (ids,) = example_prompt_ids(
            [replace(chat, messages=messages, response=len(messages), plain=False)], tokenizer, settings
        )
        if not isinstance(ids, InvalidRow):
            return NextPrompt(ids, True, messages)
    return NextPrompt(valid(ids), True, messages)


_TURNS = {"a turn": "Zk9y", "a turn with a <think> block": "<think>\nJv5u\n</think>\n\nZk9y"}
_ANSWERS = {"the user answers": "user", "a tool answers": "tool"}


def restart_notes(tools: Sequence[Any], tokenizer: Any, settings: TemplateSettings) -> tuple[str, ...]:
    """Return a note about turns after which the chat template rewrites the conversation, () if it never does.

    tools: schemas of the tools that may answer.
    """
    if template_of(tokenizer, settings) is None:
        return ()
    chat, rewriting = (
        Chat("probe", ({"role": "user", "content": SOME_TEXT},), 1, tools=list(tools) or None),
        list[str](),
    )
    for turn, content in _TURNS.items():
        for answer, role in _ANSWERS.items():
            wording = TurnWording(
                {"role": "assistant", "content": content}, ({"role": role, "content": SOME_TEXT},)
            )
            if role == "tool" and not tools:
                continue
            try:
                restarts = next_prompt(chat, [wording], True, tokenizer, settings).restarts
            except InvalidRow:
                continue
            rewriting += [f"{turn} that {answer}"] if restarts else []
    if not rewriting:
        return ()
    return (
        f"note: the chat template rewrites earlier turns after {', '.join(rewriting)}: there a new training "
        "row begins, whose prompt is the conversation as the template then renders it",
    )
