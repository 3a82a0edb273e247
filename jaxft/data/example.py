"""A row before it is tokenised: a document, a plain prompt with its completion, or a conversation."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A document; every token is a target."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A plain-text prompt and its completion."""

    name: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation whose response is every assistant turn from message `response` on.

    plain: it was an instruction row, which needs no chat template. tools: JSON schemas.
    """

    name: str
    messages: tuple[Message, ...]
    response: int
    plain: bool = False
    tools: list | None = None


Example = Text | Completion | Chat
