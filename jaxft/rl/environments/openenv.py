"""OpenEnv servers as environments, through the clients of the package openenv.

    from echo_env import EchoAction, EchoEnv
    from jaxft.rl.environments.openenv import openenv

    echo = openenv(lambda: EchoEnv(base_url="http://localhost:8000"), lambda text: EchoAction(message=text))

and environment=my_env.py:echo. Any object with reset(**options) and step(action) will do that return an
observation, a reward and whether the episode is done, as StepResult has them; either may be async. Its
observation is the text that the model reads; the score is the sum of the rewards.
"""

import json
from collections.abc import Callable
from operator import methodcaller
from typing import Any

from jaxft.rl.environments.calls import Task
from jaxft.rl.environments.environment import (
    Beginning,
    Environment,
    EpisodeState,
    RowColumns,
    StepResult,
    checked_step,
)
from jaxft.rl.environments.tools import Tool

NOT_SHOWN = ("done", "reward", "metadata")  # fields of an observation that its result has too


def openenv(
    connect: Callable[[], Any],
    action: Callable[[str], Any],
    options: Callable[[RowColumns], dict[str, Any]] = lambda row: {},
    observation: Callable[[Any], str] | None = None,
    name: str = "openenv",
) -> Environment:
    """Return the environment of an OpenEnv server.

    connect: makes a client; each serves one episode at a time and is used again, unless that had a fault; its
    close() is called at the end. action: a turn's text -> the
    action; ValueError for text that is none. options: a row -> arguments of reset, such as a seed.
    observation: an observation -> text for the model, by default its only field that is a string, or JSON.
    """
    text_of = observation or observation_text

    def reset(row: RowColumns, task: Task) -> Beginning:
        client = task.object(connect, methodcaller("close"))
        result = task.call(client.reset, **options(row))
        return Beginning(text_of(result.observation) or None, client)

    def step(client: EpisodeState, text: str, task: Task) -> StepResult:
        try:
            chosen = action(text)
        except ValueError as error:
            return checked_step((f"That is no action: {error}", 0.0, False, client))
        result = task.call(client.step, chosen)
        shown = None if result.done else text_of(result.observation)
        return checked_step((shown, result.reward, bool(result.done), client))

    def score(client: EpisodeState, task: Task) -> float | None:
        return None

    def tools(state: EpisodeState) -> dict[str, Tool]:
        return {}

    return Environment(name, reset, step, tools, (), score)


def observation_text(observation: Any) -> str:
    """Return an observation, a dictionary or an object with fields, as text.

    Example: observation_text({"echoed_message": "hi", "reward": 0.1}) == "hi"
    """
    if isinstance(observation, str):
        return observation
    fields = observation if isinstance(observation, dict) else vars(observation)
    shown = {
        key: value
        for key, value in fields.items()
        if key not in NOT_SHOWN and not key.startswith("_") and value is not None
    }
    texts = [value for value in shown.values() if isinstance(value, str)]
    if len(shown) == 1 and texts:
        return texts[0]
    return json.dumps(shown, ensure_ascii=False, default=str) if shown else ""
