"""Rows before they are tokenised: documents, plain prompts with completions, conversations, decisions and
solutions in steps.
"""

from dataclasses import dataclass, field
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
    """A conversation: the prompt is messages[:response], the response is what follows.

    plain: the prompt is one instruction, which needs no chat template. tools: JSON schemas. arguments:
    further arguments of the chat template. given: earlier assistant turns than this message are never learned
    with data.loss_on=assistant; 0 in a conversation, `response` where the row has a prompt of its own.
    weights: of those messages that have one in the row, by index; 0 is not learned.
    """

    name: str
    messages: tuple[Message, ...]
    response: int
    plain: bool = False
    tools: list | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    given: int = field(default=0, compare=False)
    weights: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Solution:
    """A plain-text prompt, the steps of a solution, and for each whether it is right. weight: as in Text."""

    name: str
    prompt: str
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    weight: float = 1.0


ANSWER_PREFIX = "choice#"
ChoiceValue = str | bool | int | float


@dataclass(frozen=True)
class DecisionChoice:
    """A choice of a decision: its value, which the answer of a row names, and an optional description."""

    value: ChoiceValue
    description: str = ""

    @property
    def name(self) -> str:
        """The value as text: JSON's for booleans and numbers."""
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


@dataclass(frozen=True)
class Decision:
    """A question to a model: the messages of its prompt, and the choices.

    answers: the response for each choice, after `prefix`; each is one token. probabilities: of the choices,
    which sum to 1; () where they are not known. arguments: as in Chat.
    """

    name: str
    messages: tuple[Message, ...]
    choices: tuple[DecisionChoice, ...]
    answers: tuple[str, ...]
    prefix: str = ANSWER_PREFIX
    probabilities: tuple[float, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)

    def prompt(self, arguments: dict[str, Any]) -> Chat:
        """Return the conversation that the response follows, without thinking unless the run or the row asks
        for it. arguments: of the run's chat template.
        """
        arguments = {"enable_thinking": False, **arguments, **self.arguments}
        plain = [message["role"] for message in self.messages] == ["user"]
        return Chat(self.name, self.messages, len(self.messages), plain, arguments=arguments)


Example = Text | Completion | Chat | Decision | Solution
PROMPT, RESPONSE = "prompt", "response"  # the kinds of a prompt without a response, and of a single response


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row of a dataset as its format reads it.

    examples: the prompt with each of its responses, by kind: "response" for SFT, "chosen" and "rejected" in a
    pair, or "prompt" alone. weight: a factor of the weights of all targets. order: the number in the column
    data.order_by. numbers: those in the columns data.extras. fields: all columns, where rewards read them.
    """

    name: str
    examples: dict[str, Example]
    weight: float = 1.0
    order: float = 0.0
    numbers: tuple[float, ...] = ()
    fields: dict[str, Any] | None = None


def as_given(prompt: Chat | Completion) -> str | list[Message]:
    """Return a prompt as reward functions read it: one instruction as a string, else the messages."""
    if isinstance(prompt, Completion):
        return prompt.prompt
    is_string = prompt.plain and len(prompt.messages) == 1
    return str(prompt.messages[0]["content"]) if is_string else list(prompt.messages)


# ---- placeholders


# Texts that spreadsheets, pandas and annotators write where there is no response; in lower case.
_NOTHING = frozenset((
    "n/a", "na", "n.a.", "#n/a", "<na>", "nan", "null", "none", "nil", "undefined", "tbd", "tba", "todo", "-",
    "--", "---", "...", "…", "???", "[deleted]", "[removed]", "[empty]", "(empty)", "(none)", "(blank)",
    "#ref!", "#value!", "#name?", "#null!",
))  # fmt: skip


def is_placeholder(text: str) -> bool:
    """Whether a text stands for a missing one, such as "N/A" or "nan"."""
    return text.strip().lower() in _NOTHING


def has_placeholder(example: Example) -> bool:
    """Whether the response of an example, its text, or the end of a prompt without a response, is a
    placeholder.
    """
    match example:
        case Chat(messages=messages, response=response):
            turns = messages[response:] or messages[-1:]
            return any(not turn.get("tool_calls") and is_placeholder(turn["content"] or "") for turn in turns)
        case Completion(prompt=prompt, completion=""):
            return is_placeholder(prompt)
        case Completion(completion=text):
            return is_placeholder(text)
        case Solution(steps=steps):
            return all(map(is_placeholder, steps))
        case Text(text=text):
            return is_placeholder(text)
        case _:
            return False
