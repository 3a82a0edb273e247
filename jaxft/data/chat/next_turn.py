"""The token ids between two assistant turns: the end of the first turn, the messages that answer it (such as
a tool's result), and the generation prompt of the next turn.

In a rollout of several turns, the token ids of earlier prompts and sampled turns are never tokenised again.
Only the text that the chat template writes after a turn is tokenised: the rendered conversation with the turn
and its answers, without the text up to the end of the turn.

Some templates change earlier text when messages follow, such as one that drops earlier reasoning. The next
prompt is then rendered and tokenised in full, and begins a new training row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxft.data.chat.loss_mask import example_prompt_ids, rendered_ids
from jaxft.data.chat.template import REJECTIONS, Template, render_messages, template_of
from jaxft.data.chat.turns import HiddenPart, parts_of, render_turns
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.rows.example import Chat, Message
from jaxft.data.rows.invalid_rows import InvalidRow, valid

SOME_TEXT = "Qx7w"  # content for an empty turn, which could not be found in a rendered text


class TurnWording(NamedTuple):
    """A sampled turn as a message, and the messages that answer it.

    A turn may have several wordings: a tool call can be text in its content, or an entry of tool_calls.
    """

    turn: Message
    answers: tuple[Message, ...]


class NextPrompt(NamedTuple):
    """The prompt of the next turn.

    restarts: whether it begins a new training row, because the template changes earlier text. ids: the whole
    prompt if it restarts, else the token ids to append to the conversation. messages: the conversation up to
    the next turn, which this prompt renders.
    """

    ids: list[int]
    restarts: bool
    messages: tuple[Message, ...]


class _Suffix(NamedTuple):
    """The rendered text after a turn's end. end: the end-of-turn token, which the turn includes; "" for none.
    rest: all text after that token.
    """

    end: str
    rest: str


def next_prompt(
    chat: Chat, ways: Sequence[TurnWording], stopped: bool, tokenizer: Any, settings: TemplateSettings
) -> NextPrompt:
    """Return the prompt that follows a sampled turn and the messages that answer it.

    chat: the conversation before the turn. ways: alternative wordings of the turn; the first that the
    template appends without a change of earlier text is used, else the first that it renders. stopped:
    whether the model sampled the end-of-turn token; if not, the returned ids begin with it. Raises InvalidRow
    if the template rejects all ways, or the tokenizer has no template.

    Example: with ChatML, a sampled turn "4<|im_end|>" and the answer {"role": "user", "content": "Why?"}, the
    ids encode "\\n<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n".
    """
    template = template_of(tokenizer, settings)
    if template is None:
        problem = "a further turn needs a chat template; set chat_template=chatml"
        raise InvalidRow(chat.name, "no chat template", problem)
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
    """Return (index, text after the turn) of the first wording that the template appends without a change of
    earlier text. If there is none: (index, None) of the first wording that it shows in full, else (0, None).
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
    """Return the text that follows the turn, None if the template rewrites earlier text.

    chat: the conversation before the turn. prompt: its text, with the generation prompt. Raises HiddenPart if
    the template does not show all of the turn and its answers, and the errors of render_turns.
    """
    index, turn = len(chat.messages), way.turn
    if not parts_of(turn):
        turn = {**turn, "content": SOME_TEXT}
    messages = (*chat.messages, turn, *way.answers)
    text, spans = render_turns(template, replace(chat, messages=messages, response=index), [index])
    whole = render_messages(template, messages, chat.tools, generation=True)
    words = [f"Qx7w{number}Zk" for number in range(len(way.answers))]
    marked = [{**answer, "content": word} for answer, word in zip(way.answers, words, strict=True)]
    shown = render_messages(template, [*chat.messages, turn, *marked], chat.tools).lower()
    if not all(word.lower() in shown for word in words):
        raise HiddenPart("it does not show the content of a message that answers the turn")
    end = spans[-1][1]
    if not text.startswith(prompt) or whole[:end] != text[:end]:
        return None
    ends = [x for x in template.ends if text.endswith(x, 0, end)]
    return _Suffix(max(ends, key=len, default=""), whole[end:])


def _restart(
    chat: Chat, ways: Sequence[TurnWording], tokenizer: Any, settings: TemplateSettings
) -> NextPrompt:
    """Return the whole conversation as the prompt of a new row, in the first wording that is accepted."""
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
    """Return a log line that lists the turns (with or without thinking, answered by the user or a tool) after
    which the chat template changes earlier text; () if it never does.

    tools: schemas of the tools that may answer.
    """
    if template_of(tokenizer, settings) is None:
        return ()
    chat = Chat("probe", ({"role": "user", "content": SOME_TEXT},), 1, tools=list(tools) or None)
    rewriting = list[str]()
    for turn, content in _TURNS.items():
        for answer, role in _ANSWERS.items():
            if role == "tool" and not tools:
                continue
            replies = ({"role": role, "content": SOME_TEXT},)
            wording = TurnWording({"role": "assistant", "content": content}, replies)
            try:
                restarts = next_prompt(chat, [wording], True, tokenizer, settings).restarts
            except InvalidRow:
                continue
            rewriting += [f"{turn} that {answer}"] if restarts else []
    if not rewriting:
        return ()
    return (
        f"note: the chat template rewrites earlier turns after {', '.join(rewriting)}: a new training row "
        "begins after such a turn; its prompt is the rewritten conversation",
    )
