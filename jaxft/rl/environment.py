"""The Environment type, and environments from users' functions and classes.

An environment begins an episode from a row of the dataset, and answers each turn of the model with an
observation, a reward, or the end. It is a value of functions; what changes in an episode is its `state`,
which they pass on.

    def guess(state, text, row):                      # a function; state is None in the first turn
        right = text.strip() == row["answer"]
        return (None if right else "Wrong, try again."), float(right), right, state

    class Guess:                                      # a class, of which each episode has an object
        def reset(self, row): return "Guess a number."          # None: the row's own prompt
        def step(self, state, text): ...                        # (observation, reward, done, state)

    class Guess:                                      # TRL's environment_factory, unchanged
        def reset(self, **row): ...
        def guess(self, number: int) -> str: ...                # public methods are tools
        def get_reward(self) -> float: ...                      # may be async

A reward function is the environment of one turn: without an environment, an episode ends with its first turn.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.columns import tool_schema
from jaxft.data.example import Message
from jaxft.rl.environments.calls import Task
from jaxft.rl.environments.tools import Tool, by_name
from jaxft.short_names import name_of

RowColumns = dict[str, Any]
Schema = dict[str, Any]  # of a tool
EpisodeState = Any
FirstPrompt = str | Sequence[Message] | None
MESSAGE_ROLES = ("system", "user", "assistant", "tool")


class WrongType(Exception):
    """An environment returned something else than its type says."""


class Beginning(NamedTuple):
    """The beginning of an episode. prompt: messages, or text that is appended to the row's last user message;
    None for the row's own prompt.
    """

    prompt: FirstPrompt
    state: EpisodeState


class StepResult(NamedTuple):
    """What answers a turn. observation: messages that the model is shown; () ends the episode, as `done`
    does. reward: of the turn, NaN for none.
    """

    observation: tuple[Message, ...]
    reward: float
    done: bool
    state: EpisodeState


@dataclass(frozen=True)
class Environment:
    """An environment as functions.

    reset(row, task) -> Beginning. step(state, text, task) -> StepResult, for a turn without tool calls.
    tools(state) -> the functions that the model may call, by name, which `schemas` describe to it.
    score(state, task) -> the score of the episode; None: the sum of its turns' rewards. task.call calls a
    user's function, with the time-out. name: in logs and metrics. scored: whether its episodes have a score
    at all. continues: whether they may have a second turn. resets: whether reset may return a prompt; a class
    says that its own does not by `-> None`.
    """

    name: str
    reset: Callable[[RowColumns, Task], Beginning]
    step: Callable[[EpisodeState, str, Task], StepResult]
    tools: Callable[[EpisodeState], Mapping[str, Tool]]
    schemas: tuple[Schema, ...]
    score: Callable[[EpisodeState, Task], float | None]
    scored: bool = True
    continues: bool = True
    resets: bool = True


def single_turn() -> Environment:
    """Return the environment whose episodes end with their first turn and have no score of their own."""
    return Environment("none", _own_prompt, _end, _no_tools, (), _no_score, False, False, False)


def environment_of(given: Any, tools: Sequence[Tool] = ()) -> Environment:
    """Return the environment of what a user's file defines, with further tools.

    given: an Environment, a function (state, text, row) -> (observation, reward, done, state), a class with
    reset(row) and step(state, text), or a class of TRL's environment_factory; a function without arguments
    makes the object of an episode. None: tools alone, an episode ends with the first turn that calls none.
    Raises ValueError for anything else.
    """
    if given is None:
        found = single_turn()
    elif isinstance(given, Environment):
        found = given
    elif inspect.isclass(given):
        found = _of_class(given, given)
    elif callable(given) and not inspect.signature(given).parameters:
        found = _of_class(type(given()), given)
    elif callable(given):
        found = _of_function(given)
    else:
        raise ValueError(
            f"environment: {short_repr(given)} is neither a class nor a function (state, text, row) -> "
            "(observation, reward, done, state). Set environment=my_env.py:Name."
        )
    return with_tools(found, tools) if tools else found


def with_tools(environment: Environment, tools: Sequence[Tool]) -> Environment:
    """Return the environment with further tools."""
    added = by_name(tools)
    own = {schema["function"]["name"] for schema in environment.schemas}
    if own & added.keys():
        raise ValueError(f"tools: the environment has its own {min(own & added.keys())}. Rename one.")

    def all_tools(state: EpisodeState) -> Mapping[str, Tool]:
        return {**environment.tools(state), **added}

    schemas = (*environment.schemas, *map(tool_schema, tools))
    name = environment.name if environment.name != "none" else "tools"
    return replace(environment, name=name, tools=all_tools, schemas=schemas, continues=True)


# ---- users' functions and classes


def _of_function(function: Callable[..., Any]) -> Environment:
    if not _takes(function, 3):
        name, signature = name_of(function), inspect.signature(function)
        raise ValueError(f"environment {name} takes {signature}; use (state, text, row).")

    def reset(row: RowColumns, task: Task) -> Beginning:
        return Beginning(None, (None, row))

    def step(state: EpisodeState, text: str, task: Task) -> StepResult:
        inner, row = state
        found = checked_step(task.call(function, inner, text, row))
        return found._replace(state=(found.state, row))

    return Environment(name_of(function), reset, step, _no_tools, (), _no_score, resets=False)


def _of_class(given: type, make: Callable[[], Any]) -> Environment:
    """Return the environment of a class with reset(row) -> prompt and step(state, text), whose first state is
    None, or of one that TRL's environment_factory takes. Its other public methods are tools. make: makes the
    object of an episode.
    """
    members = dict(inspect.getmembers(given, inspect.isfunction))
    if "reset" not in members:
        raise ValueError(
            f"environment {given.__name__} has no reset. Define reset(self, row) and step(self, state, "
            "text), or reset(self, **row) with tools as methods."
        )
    native = "step" in members and _takes(members["step"], 3) and _takes(members["reset"], 2)
    others = ("reset", "step" if native else "get_reward")
    methods = {name: x for name, x in members.items() if not name.startswith("_") and name not in others}
    rewards = not native and "get_reward" in members

    def reset(row: RowColumns, task: Task) -> Beginning:
        self = task.call(make)
        prompt = task.call(self.reset, row) if native else task.call(self.reset, **row)
        return Beginning(_checked_prompt(prompt), (self, None))

    def step(state: EpisodeState, text: str, task: Task) -> StepResult:
        if not native:
            return _end(state, text, task)
        self, inner = state
        found = checked_step(task.call(self.step, inner, text))
        return found._replace(state=(self, found.state))

    def tools(state: EpisodeState) -> Mapping[str, Tool]:
        return {name: getattr(state[0], name) for name in methods}

    def score(state: EpisodeState, task: Task) -> float | None:
        return _checked_reward(task.call(state[0].get_reward)) if rewards else None

    schemas, resets = tuple(map(tool_schema, methods.values())), _returns(members["reset"])
    scored = native or rewards
    return Environment(given.__name__, reset, step, tools, schemas, score, scored=scored, resets=resets)


def _returns(function: Callable[..., Any]) -> bool:
    """Whether a function may return something, by its annotation."""
    return inspect.signature(function).return_annotation not in (None, "None")


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes `count` positional arguments and no arguments by arbitrary names."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    by_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return len(needed) <= count <= len(positional) and not by_any_name


def _own_prompt(row: RowColumns, task: Task) -> Beginning:
    return Beginning(None, None)


def _end(state: EpisodeState, text: str, task: Task) -> StepResult:
    return StepResult((), math.nan, True, state)


def _no_tools(state: EpisodeState) -> Mapping[str, Tool]:
    return {}


def _no_score(state: EpisodeState, task: Task) -> float | None:
    return None


# ---- checks of what they return


def checked_step(value: Any) -> StepResult:
    """Return what a user's step returned as a StepResult. Raises WrongType."""
    if not isinstance(value, tuple) or len(value) != 4:
        raise WrongType(f"step returned {short_repr(value)}, expected (observation, reward, done, state)")
    observation, reward, done, state = value
    if not isinstance(done, bool | np.bool_):
        raise WrongType(f"step returned done={short_repr(done)}, expected True or False")
    return StepResult(_messages(observation), _checked_reward(reward), bool(done), state)


def _messages(observation: Any) -> tuple[Message, ...]:
    """Return an observation as messages: a text is a user message."""
    if observation is None or observation == "":
        return ()
    if isinstance(observation, str):
        return ({"role": "user", "content": observation},)
    found = [observation] if isinstance(observation, dict) else observation
    if isinstance(found, list | tuple) and all(map(_is_message, found)):
        return tuple(found)
    raise WrongType(f"the observation is {short_repr(observation)}, expected a string, messages or None")


def _is_message(value: Any) -> bool:
    """Whether a value is a message with a text, all of which is JSON."""
    if not (isinstance(value, dict) and value.get("role") in MESSAGE_ROLES):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value.get("content"), str)


def _checked_prompt(value: Any) -> FirstPrompt:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value and all(map(_is_message, value)):
        return list(value)
    raise WrongType(f"reset returned {short_repr(value)}, expected a string, messages or None")


def _checked_reward(value: Any) -> float:
    """Return a reward as a float, NaN for None. Raises WrongType if it is not a finite real number."""
    if value is None:
        return math.nan
    is_real = isinstance(value, bool | int | float | np.integer | np.floating | np.bool_)
    if is_real and math.isfinite(value):
        return float(value)
    raise WrongType(f"the reward is {short_repr(value)}, expected a finite number or None")


def short_repr(value: Any) -> str:
    """Return the type and the repr of a value of any type."""
    try:
        return f"{type(value).__name__} {value!r}"[:80]
    except Exception:  # its repr may raise
        return f"a {type(value).__name__}"
