"""Weights of rows and messages in the loss: the column `weight`, and the keys `weight` and `train` of a
message.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxft.data.rows.dataset_rows import Row
from jaxft.data.rows.example import Chat, Message
from jaxft.data.rows.invalid import InvalidRow


def row_weight(row: Row) -> float:
    """Return the factor of a row's loss weights: its column `weight`, or 1 where that is missing or null.

    Raises InvalidRow for anything but a finite number of at least 0.
    """
    value = row.fields.get("weight")
    if value is None or value == "":
        return 1.0
    weight = _number(value)
    if weight is None:
        raise row.invalid(
            "weight that is no number",
            f"column 'weight' is {repr(value)[:40]}; use a finite number of at least 0, or rename the "
            "column if it is not a loss weight",
        )
    return weight


def message_weight(row: Row, where: str, message: dict[str, Any]) -> float | None:
    """Return the loss weight of a message's tokens, None if it has neither `train` (Axolotl: true or false)
    nor `weight` (OpenAI: 0 or 1; here any number from 0 on). where: the message as errors name it.
    """
    train, value = message.get("train"), message.get("weight")
    if train not in (None, True, False):
        raise row.invalid(
            "train that is no boolean", f"{where} has train={repr(train)[:40]}; use true or false"
        )
    weight = None if value is None else _number(value)
    if value is not None and weight is None:
        raise row.invalid(
            "weight that is no number",
            f"{where} has weight={repr(value)[:40]}; use a finite number of at least 0",
        )
    if train is None or weight is None:
        return weight if train is None else float(train)
    if bool(train) != (weight > 0):
        raise row.invalid(
            "contradicting weights",
            f"{where} has train={bool(train)} and weight={weight:g}; remove one of them",
        )
    return weight


def _number(value: Any) -> float | None:
    """Return a value, or its text as in CSV files, as a finite number of at least 0; None if it is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < math.inf else None


def split_weights(messages: Sequence[Message]) -> tuple[tuple[Message, ...], dict[int, float]]:
    """Return the messages without their weights, as chat templates get them, and the weights by index."""
    weights = {i: message["weight"] for i, message in enumerate(messages) if "weight" in message}
    if not weights:
        return tuple(messages), weights
    return tuple({k: v for k, v in message.items() if k != "weight"} for message in messages), weights


def target_weights(chat: Chat, loss_on: str) -> dict[int, float]:
    """Return the loss weights of the learned assistant turns, by index: the message's own weight, else 1 if
    loss_on selects the turn (see chat.LOSS_ON).

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
        raise InvalidRow(
            chat.name, "no learned turn", f"the loss mask is empty because {problem}; remove the row"
        )
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
        f"turns can have one; remove the key, {remedy}",
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
            "pair have no weights of their own: remove the key, or weight pairs with data.weight_column",
        )
    return replace(chat, weights={}) if chat.weights else chat
