"""Rows before they are tokenised: documents, plain prompts with completions, conversations, decisions and
solutions in steps; their weights in the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.rows.row_files import Row

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
    further arguments of the chat template. given: number of messages in the row's separate prompt, 0 without
    one; data.loss_on=assistant trains on assistant turns among them only if the turns have a weight. weights:
    the messages' weights in the row, by index; 0 is not learned.
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
    """A plain-text prompt, the steps of a solution, and for each whether it is right."""

    name: str
    prompt: str
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


ANSWER_PREFIX = "choice#"
ChoiceValue = str | bool | int | float


@dataclass(frozen=True)
class DecisionChoice:
    """A choice of a decision: its value, which the answer of a row names, and an optional description."""

    value: ChoiceValue
    description: str = ""

    @property
    def name(self) -> str:
        """The value as text; booleans and numbers as JSON writes them."""
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


@dataclass(frozen=True)
class Decision:
    """A question to a model: the messages of its prompt, and the choices.

    answers: the response for each choice, after `prefix`; each is one token. probabilities: one for each
    choice, with sum 1; () if unknown. arguments: as in Chat.
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
        for it. arguments: the run's arguments of the chat template.
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
    data.order_by. numbers: the numbers in the columns data.extras. fields: all columns, if rewards may read
    them.
    """

    name: str
    examples: dict[str, Example]
    weight: float = 1.0
    order: float = 0.0
    numbers: tuple[float, ...] = ()
    fields: dict[str, Any] | None = None


def as_given(prompt: Chat | Completion) -> str | list[Message]:
    """Return a prompt as reward functions read it: plain text or one instruction as a string, a conversation
    as its messages.
    """
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
    """Whether a turn of the example's response, its text, all steps of a solution, or the last turn of a
    prompt without a response is a placeholder.
    """
    match example:
        case Chat(messages=messages, response=response):
            turns = messages[response:] or messages[-1:]
            return any(not turn.get("tool_calls") and is_placeholder(turn["content"] or "") for turn in turns)
        case Completion(prompt=prompt, completion=text):
            return is_placeholder(text or prompt)
        case Solution(steps=steps):
            return all(map(is_placeholder, steps))
        case Text(text=text):
            return is_placeholder(text)
        case _:
            return False


# ---- weights of rows and messages: the column `weight`, and the keys `weight` and `train` of a message


def message_weight(row: Row, where: str, message: dict[str, Any]) -> float | None:
    """Return the loss weight of a message's tokens, None if it has neither `train` (Axolotl: true or false)
    nor `weight` (OpenAI: 0 or 1; here any number from 0 on). where: the message as errors name it. Raises
    InvalidRow for other values, and if the two contradict each other.
    """
    train, value = message.get("train"), message.get("weight")
    if train not in (None, True, False):
        problem = f"{where} has train={repr(train)[:40]}; use true or false"
        raise row.invalid("train that is no boolean", problem)
    weight = parse_number(value)
    if value is not None and (weight is None or weight < 0):
        problem = f"{where} has weight={repr(value)[:40]}; use a finite number of at least 0"
        raise row.invalid("weight that is no number", problem)
    if train is None or weight is None:
        return weight if train is None else float(train)
    if bool(train) != (weight > 0):
        problem = f"{where} has train={bool(train)} and weight={weight:g}; remove one of them"
        raise row.invalid("contradicting weights", problem)
    return weight


def parse_number(value: Any) -> float | None:
    """Return a value, or its text as in CSV files, as a finite number; None for any other value."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def split_weights(messages: Sequence[Message]) -> tuple[tuple[Message, ...], dict[int, float]]:
    """Return the messages without their weights, as chat templates get them, and the weights by index."""
    weights = {i: message["weight"] for i, message in enumerate(messages) if "weight" in message}
    if not weights:
        return tuple(messages), weights
    return tuple({k: v for k, v in message.items() if k != "weight"} for message in messages), weights


def target_weights(chat: Chat, loss_on: str) -> dict[int, float]:
    """Return the loss weights of the learned assistant turns, by index: the message's own weight, else 1 if
    loss_on selects the turn (see loss_mask.LOSS_ON).

    Raises InvalidRow if no turn is learned (except with "all"), or if a message of another role has a weight
    that contradicts loss_on.
    """
    first = {"completion": chat.response, "assistant": chat.given, "all": 0}[loss_on]
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    for index in chat.weights.keys() - set(turns):
        _check_other_role(chat, index, loss_on)
    weights = {index: chat.weights.get(index, float(index >= first)) for index in turns}
    learned = {index: weight for index, weight in weights.items() if weight}
    if learned or loss_on == "all":
        return learned
    if chat.weights.keys() & set(turns):
        problem = "no assistant turn is learned: all have weight 0 or train=false"
        problem = f"the loss mask is empty because {problem}; remove the row"
        raise InvalidRow(chat.name, "no learned turn", problem)
    roles = ", ".join(dict.fromkeys(m["role"] for m in chat.messages))
    problem = "the loss mask is empty because there is no assistant turn, only turns of the roles "
    problem += f"{roles}; add one or set data.loss_on=all"
    raise InvalidRow(chat.name, "no assistant turn", problem)


def _check_other_role(chat: Chat, index: int, loss_on: str) -> None:
    """Raise InvalidRow if message `index`, no assistant turn, has a weight that loss_on contradicts."""
    weight = chat.weights[index]
    if weight == 1 if loss_on == "all" else weight == 0:
        return
    remedy = "or set data.loss_on=" + ("assistant" if loss_on == "all" else "all to learn every token")
    raise InvalidRow(
        chat.name,
        "weight of another role",
        f"message {index}, a {chat.messages[index]['role']} turn, has weight {weight:g}, but only assistant "
        f"turns can have one; remove the weight, {remedy}",
    )


def without_weights(chat: Chat) -> Chat:
    """Return a prompt and a response of a pair without weights of messages; in a prompt they have no effect.

    Raises InvalidRow if a message of the response has another weight than 1.
    """
    weighted = [i for i, weight in chat.weights.items() if i >= chat.response and weight != 1]
    if weighted:
        raise InvalidRow(
            chat.name,
            "weighted turns in a pair",
            f"message {weighted[0]} of a response has weight {chat.weights[weighted[0]]:g}; turns of a "
            "pair have no weights of their own: remove it, or weight pairs with data.weight_column",
        )
    return replace(chat, weights={}) if chat.weights else chat
