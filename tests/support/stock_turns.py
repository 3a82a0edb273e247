"""The parts of a conversation's turns, and a chat template with what it renders of them."""

import json
from dataclasses import dataclass, field

from tiny_tokenizers import tiny

from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings

HIDDEN = None  # the template shows only a part of the turn, or doesn't end it


class Rejected(Exception):
    """The template raises for the conversation."""


@dataclass(frozen=True)
class Turn:
    """A turn by its parts. text: None stands for a content that is null.

    key: whether the thought is a key of its own or a block in the content.
    """

    role: str
    text: str | None
    thought: str = ""
    key: bool = False
    calls: tuple = ()

    def message(self, number):
        content = self.text
        extra = {}
        if self.thought and self.key:
            extra["reasoning_content"] = self.thought
        elif self.thought:
            content = f"<think>\n{self.thought}\n</think>\n\n{self.text or ''}"
        if self.calls:
            extra["tool_calls"] = [
                {"id": f"{number:04}{i:05}", "type": "function", "function": {"name": n, "arguments": a}}
                for i, (n, a) in enumerate(self.calls)
            ]
        if self.role == "tool":
            extra = {"name": "tool", "tool_call_id": f"{number - 1:04}00000"}
        return {"role": self.role, "content": content, **extra}

    @property
    def content(self):
        return self.message(0)["content"]


def messages_of(turns):
    return tuple(turn.message(number) for number, turn in enumerate(turns))


@dataclass(frozen=True)
class Stock:
    """A template and its special tokens.

    shown(turns, index): what it renders of an assistant turn after the generation prompt, up to the end of
    the turn. Raises Rejected where the template raises. settings: those of the run.
    """

    source: str
    shown: object
    eos: str
    bos: str = "<s>"
    special: tuple = field(default=())
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS

    def tokenizer(self):
        tokenizer = tiny.__wrapped__("none")
        tokenizer.add_special_tokens(
            {"bos_token": self.bos, "eos_token": self.eos, "additional_special_tokens": list(self.special)}
        )
        tokenizer.chat_template = self.source
        return tokenizer


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def text_alone(end, strip=False):
    """A template that concatenates content and drops all else. It gets "" in place of null."""

    def shown(turns, index):
        turn = turns[index]
        if turn.calls or (turn.thought and turn.key):
            return HIDDEN
        return (turn.content.strip() if strip else turn.content) + end

    return shown
