"""A tokenizer's chat template: rendering conversations, and what begins and ends an assistant turn."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

import jinja2

from jaxft.data.example import Chat, Message

DATE = "26 Jul 2024"  # Llama 3's default; a template that prints today's date would change tokens at midnight
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

Span = tuple[int, int]  # characters of a rendered text


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with a pinned date.

    marked: it has {% generation %} markers. opening: the generation prompt. closing: matches an end-of-turn
    token.
    """

    tokenizer: Any
    source: str
    date: str
    marked: bool
    opening: str
    closing: re.Pattern | None


def template_of(tokenizer: Any, date: str = DATE) -> Template | None:
    """Return the tokenizer's template with today's date replaced by `date` ("26 Jul 2024"), None if it has
    none.
    """
    if not tokenizer.chat_template:
        return None
    try:
        day = datetime.strptime(date, "%d %b %Y")
    except ValueError as error:
        raise ValueError(f"data.date={date!r}; use a day like {DATE!r}") from error
    source = _STRFTIME.sub(lambda m: json.dumps(day.strftime(m[2])), tokenizer.get_chat_template())
    bare = Template(tokenizer, source, date, bool(_GENERATION.search(source)), "", None)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    try:
        opening = _opening(bare)
        ends = special - _openers(bare, special, opening)
    except (
        jinja2.TemplateError,
        TypeError,
        LookupError,
    ):  # the template rejects or omits parts of a plain conversation
        opening, ends = "", special
    closing = re.compile(rf"\s*(?:{_any_of(ends)})+") if ends else None
    return Template(tokenizer, source, date, bare.marked, opening, closing)


def _any_of(tokens: set[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def _opening(bare: Template) -> str:
    """Return the generation prompt, "" if the template has none."""
    user = [{"role": "user", "content": "x"}]
    without, opened = render_messages(bare, user), render_messages(bare, user, generation=True)
    return opened[len(commonprefix([without, opened])) :]


def _openers(bare: Template, special: set[str], opening: str) -> set[str]:
    """Return the special tokens that open a turn.

    These are the tokens of the generation prompt, and those between a response and the next question that do
    not follow a last response as well.
    """
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "Qx7w"), ("assistant", "Zk9y"), ("user", "Jv5u"))
    ]
    find = re.compile(_any_of(special)).findall
    behind = find(render_messages(bare, turns[:2]).split("Zk9y")[1])
    between = find(render_messages(bare, turns).split("Zk9y")[1].split("Jv5u")[0])
    closers = len(behind) if between[: len(behind)] == behind else 1
    return set(find(opening)) | set(between[closers:])


def render_messages(
    template: Template, messages: Sequence[Message], tools: list | None = None, generation: bool = False
) -> str:
    """Return the conversation as the template renders it, with the generation prompt if asked to.

    Raises jinja2.TemplateError or TypeError if the template rejects the messages.
    """
    return template.tokenizer.apply_chat_template(
        list(messages), tools=tools, chat_template=template.source, tokenize=False,
        add_generation_prompt=generation, date_string=template.date,
    )  # fmt: skip


def render_marked(template: Template, chat: Chat) -> tuple[str, list[Span]]:
    """Return the conversation as text, and the ranges that the {% generation %} markers enclose."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # (texts, ranges)
        conversations=[list(chat.messages)], tools=chat.tools, chat_template=template.source,
        return_assistant_tokens_mask=True, date_string=template.date, **template.tokenizer.special_tokens_map,
    )  # fmt: skip
    return rendered[0][0], rendered[1][0]
