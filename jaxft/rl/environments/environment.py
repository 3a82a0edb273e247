"""The Environment type, and environments from users' functions and classes and from OpenEnv servers.

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
        def reset(self, **row): ...                             # an object plays one episode after another
        def guess(self, number: int) -> str: ...                # public methods are tools
        def get_reward(self) -> float: ...                      # may be async

    def won(environments, **columns):                 # or its reward, for rewards=my_env.py:won
        return [environment.won for environment in environments]

    ENVIRONMENTS = {"guess": Guess, "game": Game}     # several: a row's column `environment` names its own

A reward function is the environment of one turn: without an environment, an episode ends with its first turn.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import methodcaller
from typing import Annotated, Any, NamedTuple

import numpy as np

from jaxft.annotations import ENVIRONMENTS, ShortNames, name_of
from jaxft.data.packing.row_tasks import ENVIRONMENT, EVERY_ROW
from jaxft.data.rows.columns import messages_of, tool_schema
from jaxft.data.rows.example import Message
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.data.rows.row_files import Row
from jaxft.rl.environments.calls import Task
from jaxft.rl.environments.tools import MODELS_ERRORS, Tool, by_name, valid_text

EnvironmentClass = Annotated[Callable, ShortNames.of(ENVIRONMENTS, or_dict=True)]  # of a setting
RowColumns = dict[str, Any]
Schema = dict[str, Any]  # of a tool
EpisodeState = Any
FirstPrompt = str | Sequence[Message] | None
CLASS_SHAPES = (
    "Define reset(self, row) and step(self, state, text), or reset(self, **row) with tools as methods."
)


class WrongType(Exception):
    """An environment returned a value of a wrong type."""


def _state(state: EpisodeState) -> Any:
    return state


def _first(state: EpisodeState) -> Any:
    return state[0]


class Beginning(NamedTuple):
    """The beginning of an episode. prompt: messages, or text that is appended to the row's last user message;
    None for the row's own prompt.
    """

    prompt: FirstPrompt
    state: EpisodeState


class StepResult(NamedTuple):
    """The answer to a turn. observation: messages that the model is shown; () ends the episode, as `done`
    does. reward: reward of the turn, NaN for none.
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
    score(state, task) -> the score of the episode; None: the sum of its turns' rewards, 0 if no turn has one,
    as when a limit ends an episode that only called tools. task.call calls a user's function, with the
    time-out. name: in logs and metrics. scored: whether its episodes have a score at all. continues: whether
    they may have a second turn. resets: whether reset may return a prompt; a class whose reset is annotated
    `-> None` declares that it does not. prompts: whether reset always returns a prompt, as in a class whose
    reset is annotated `-> str`, so that rows need no prompt. by_name: the schemas of each of several
    environments, by the value of a row's column `environment`; {} where all rows have `schemas`. tool_errors:
    exceptions of tools that are returned to the model; others exclude the episode. owner(state) -> the object
    that rewards with an argument `environments` read.

    A class or a function is shorter, see environment_of. Written out, with the number of turns as the state:

    >>> def step(turns, text, task):
    ...     answer = ({"role": "user", "content": "Are you sure?"},)
    ...     return StepResult(answer, reward=float("yes" in text), done=turns == 1, state=turns + 1)
    >>> doubt = Environment(
    ...     "doubt", lambda row, task: Beginning(None, state=0), step, tools=lambda turns: {}, schemas=(),
    ...     score=lambda turns, task: None,
    ... )
    >>> doubt.step(1, "yes", None).done
    True
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
    prompts: bool = False
    by_name: Mapping[str, tuple[Schema, ...]] = field(default_factory=dict)
    tool_errors: tuple[type[Exception], ...] = MODELS_ERRORS
    owner: Callable[[EpisodeState], Any] = _state

    @property
    def row_tools(self) -> str:
        """The schemas of the tools that prompts list, as JSON, "" without tools; see
        row_settings.RowSettings.
        """
        schemas = self.by_name or ({EVERY_ROW: self.schemas} if self.schemas else {})
        return json.dumps(schemas) if schemas else ""


def single_turn() -> Environment:
    """Return the environment whose episodes end with their first turn and have no score of their own."""
    return Environment("none", _own_prompt, _end, _no_tools, (), _no_score, False, False, False)


def environment_of(given: Any, tools: Sequence[Tool] = ()) -> Environment:
    """Return the environment that a user's file defines, with further tools.

    given: an Environment, a function (state, text, row) -> (observation, reward, done, state), a class with
    reset(row) and step(state, text), or a class of TRL's environment_factory; a function without arguments
    that makes the object of an episode; a dict of these by name. None: only the tools, and an episode ends
    with the first turn that calls none. Raises ValueError for anything else.

    >>> def guess(state, text, row):
    ...     right = text.strip() == row["answer"]
    ...     return (None if right else "Wrong, try again."), float(right), right, state
    >>> environment_of(guess).name, environment_of(guess).continues
    ('guess', True)
    >>> from jaxft.rl.environments.shipped_environments import Calculator
    >>> [schema["function"]["name"] for schema in environment_of(Calculator).schemas]
    ['add', 'multiply']
    """
    if given is None:
        environment = single_turn()
    elif isinstance(given, Environment):
        environment = given
    elif isinstance(given, Mapping) and given:
        environment = _of_several({str(name): environment_of(value) for name, value in given.items()})
    elif inspect.isclass(_without_partial(given)):
        environment = _of_class(_without_partial(given), given)
    elif callable(given) and not inspect.signature(given).parameters:
        environment = _of_class(_made_by(given), given)
    elif callable(given):
        environment = _of_function(given)
    elif "reset" in dir(given):
        name = type(given).__name__
        raise ValueError(
            f"environment is an object of class {name}, but concurrent episodes need one object each. Set "
            f"environment= to the class {name}, or to a function without arguments that makes an object."
        )
    else:
        raise ValueError(
            f"environment: {short_repr(given)} is neither a class nor a function (state, text, row) -> "
            "(observation, reward, done, state). Set environment=my_env.py:Name."
        )
    return with_tools(environment, tools) if tools else environment


def with_tools(environment: Environment, tools: Sequence[Tool]) -> Environment:
    """Return the environment with further tools."""
    added = by_name(tools)
    existing = {schema["function"]["name"] for schema in environment.schemas}
    if existing & added.keys():
        raise ValueError(
            f"tools: the environment {environment.name} already has a tool {min(existing & added.keys())}. "
            "Rename one, or leave that environment out with environment=none."
        )

    def all_tools(state: EpisodeState) -> Mapping[str, Tool]:
        return {**environment.tools(state), **added}

    more = tuple(map(tool_schema, tools))
    return replace(
        environment,
        name=environment.name if environment.name != "none" else "tools",
        tools=all_tools,
        schemas=(*environment.schemas, *more),
        continues=True,
        by_name={name: (*schemas, *more) for name, schemas in environment.by_name.items()},
    )


# ---- users' functions and classes


def _of_function(function: Callable[..., Any]) -> Environment:
    if not _takes(function, 3):
        raise ValueError(
            f"environment {name_of(function)} takes {inspect.signature(function)}; use (state, text, row)."
        )

    def reset(row: RowColumns, task: Task) -> Beginning:
        return Beginning(None, (None, row))

    def step(state: EpisodeState, text: str, task: Task) -> StepResult:
        inner, row = state
        result = checked_step(task.call(function, inner, text, row))
        return result._replace(state=(result.state, row))

    return Environment(name_of(function), reset, step, _no_tools, (), _no_score, resets=False, owner=_first)


def _of_several(parts: Mapping[str, Environment]) -> Environment:
    """Return the environment that plays each episode in one of `parts`, named by the row's column
    `environment`, as with a dict of TRL's factories. That column is not passed on.
    """

    def reset(row: RowColumns, task: Task) -> Beginning:
        columns = {name: value for name, value in row.items() if name != ENVIRONMENT}
        part = parts[row[ENVIRONMENT]]
        begun = part.reset(columns, task)
        return begun._replace(state=(part, begun.state))

    def step(state: EpisodeState, text: str, task: Task) -> StepResult:
        part, inner = state
        result = part.step(inner, text, task)
        return result._replace(state=(part, result.state))

    def tools(state: EpisodeState) -> Mapping[str, Tool]:
        return state[0].tools(state[1])

    def score(state: EpisodeState, task: Task) -> float | None:
        return state[0].score(state[1], task) if state[0].scored else None

    each = parts.values()
    return Environment(
        ",".join(parts),
        reset,
        step,
        tools,
        tuple(schema for part in each for schema in part.schemas),
        score,
        scored=any(part.scored for part in each),
        continues=any(part.continues for part in each),
        resets=any(part.resets for part in each),
        prompts=all(part.prompts for part in each),
        by_name={name: part.schemas for name, part in parts.items()},
        tool_errors=tuple({error for part in each for error in part.tool_errors}),
        owner=lambda state: state[0].owner(state[1]),
    )


@cache
def _made_by(factory: Callable[[], Any]) -> type:
    """Return the class of a factory's objects, by making one, which may connect to a server."""
    try:
        return type(factory())
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"environment {name_of(factory)}() raised {text:.150}; fix that call") from error


def _of_class(given: type, make: Callable[[], Any]) -> Environment:
    """Return the environment of a class. make(): makes the object of an episode.

    Raises ValueError for a class without reset, for a make that needs arguments, or for a method that cannot
    be a tool.
    """
    name = given.__name__
    functions = inspect.getmembers(given, inspect.isfunction)
    members = {
        name: function
        for name, function in functions
        if not isinstance(inspect.getattr_static(given, name), staticmethod)
    }
    if "reset" not in members:
        raise ValueError(f"environment {name} has no reset. {CLASS_SHAPES}")
    if missing := _missing_argument(make):
        raise ValueError(
            f"environment {name}: {missing}, but jaxft makes its objects without arguments. Set environment= "
            f"to a function without arguments that returns a {name}."
        )
    native = "step" in members and _takes(members["step"], 3) and _takes(members["reset"], 2)
    of_kind = _of_native if native and "get_reward" not in members else _of_trl
    try:
        return of_kind(name, make, members)
    except ValueError as error:
        if "step" in members and not native:  # such as a class for gym
            raise ValueError(f"environment {name}: {error} If step is not a tool: {CLASS_SHAPES}") from error
        raise


def _missing_argument(make: Callable[[], Any]) -> str:
    """Return why `make` cannot be called without arguments; "" if it can."""
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        return str(error)
    except ValueError:  # a class whose base is written in C
        return ""
    return ""


def _of_native(name: str, make: Callable[[], Any], members: Mapping[str, Any]) -> Environment:
    """Return the environment of a class with reset(row) -> prompt and step(state, text).

    make: makes the object of an episode. members: its methods; the public ones except reset and step are
    tools. The first state is None.
    """
    methods = _tool_methods(members, ("reset", "step"))

    def reset(row: RowColumns, task: Task) -> Beginning:
        self = task.call(make)
        return Beginning(_checked_prompt(task.call(self.reset, row)), (self, None))

    def step(state: EpisodeState, text: str, task: Task) -> StepResult:
        self, inner = state
        result = checked_step(task.call(self.step, inner, text))
        return result._replace(state=(self, result.state))

    def tools(state: EpisodeState) -> Mapping[str, Tool]:
        return {method: getattr(state[0], method) for method in methods}

    environment = Environment(name, reset, step, tools, _schemas(methods), _no_score, owner=_first)
    return _with_prompts(environment, members["reset"])


def _of_trl(name: str, make: Callable[[], Any], members: Mapping[str, Any]) -> Environment:
    """Return the environment of a class as TRL's environment_factory takes it: an object plays one episode
    after another, and any exception of a tool is returned to the model.
    """
    methods = _tool_methods(members, ("reset", "get_reward"))
    rewards = "get_reward" in members

    def reset(row: RowColumns, task: Task) -> Beginning:
        self = task.object(make)
        return Beginning(_checked_prompt(task.call(self.reset, **row)), self)

    def tools(state: EpisodeState) -> Mapping[str, Tool]:
        return {method: getattr(state, method) for method in methods}

    def score(state: EpisodeState, task: Task) -> float | None:
        return checked_reward(task.call(state.get_reward)) if rewards else math.nan

    environment = Environment(name, reset, _end, tools, _schemas(methods), score, scored=rewards)
    return _with_prompts(replace(environment, tool_errors=(Exception,)), members["reset"])


def _tool_methods(members: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    return {name: x for name, x in members.items() if not name.startswith("_") and name not in others}


def _schemas(methods: Mapping[str, Any]) -> tuple[Schema, ...]:
    return tuple(map(tool_schema, methods.values()))


def _with_prompts(environment: Environment, reset: Callable[..., Any]) -> Environment:
    """Return the environment with `resets` and `prompts` set from the return annotation of `reset`."""
    annotation = inspect.signature(reset).return_annotation
    return replace(environment, resets=annotation not in (None, "None"), prompts=annotation in (str, "str"))


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function accepts `count` positional arguments, needs at least one, and lacks
    **keywords.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    by_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return 1 <= len(needed) <= count <= len(positional) and not by_any_name


def _without_partial(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


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
    """Check the value that a user's step returned, and return it as a StepResult. Raises WrongType."""
    if not isinstance(value, tuple) or len(value) != 4:
        raise WrongType(f"step returned {short_repr(value)}, expected (observation, reward, done, state)")
    observation, reward, done, state = value
    if not isinstance(done, bool | np.bool_):
        raise WrongType(f"step returned done={short_repr(done)}, expected True or False")
    return StepResult(_messages(observation), checked_reward(reward), bool(done), state)


def _messages(observation: Any) -> tuple[Message, ...]:
    """Return an observation as messages: a text is a user message."""
    if isinstance(observation, str) and observation:
        observation = {"role": "user", "content": observation}
    if isinstance(observation, dict):
        observation = [observation]
    empty = observation is None or (isinstance(observation, str | list | tuple) and not observation)
    return () if empty else _checked_messages("the observation", observation)


def _checked_messages(what: str, value: Any) -> tuple[Message, ...]:
    """Return `value` as messages for a chat template, with valid text. Raises WrongType about `what`."""
    try:
        if not isinstance(value, list | tuple):
            raise TypeError("no list")
        copied = json.loads(valid_text(json.dumps(value, ensure_ascii=False)))
        return tuple(messages_of(Row(what, {"messages": copied}), "messages"))
    except InvalidRow as error:
        raise WrongType(f"{what}: {error.problem}".replace("; fix or remove the row", "")) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongType(f"{what} is {short_repr(value)}, expected a string, messages or None") from error


def _checked_prompt(value: Any) -> FirstPrompt:
    if value is None or isinstance(value, str):
        return value if value is None else valid_text(value)
    return list(_checked_messages("the prompt of reset", value))


def checked_reward(value: Any) -> float:
    """Return a reward as a float, NaN for None. Raises WrongType if it is not a finite real number."""
    number = finite_number(value)
    if math.isnan(number) and value is not None:
        raise WrongType(f"the reward is {short_repr(value)}, expected a finite number or None")
    return number


def finite_number(value: Any) -> float:
    """Return a finite real number, also a scalar array, as a float; NaN for anything else."""
    if isinstance(value, str | bytes | complex | np.complexfloating):
        return math.nan
    try:
        number = float(value) if np.shape(value) == () else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def short_repr(value: Any) -> str:
    """Return the type and repr of any value, at most 80 characters.

    >>> short_repr(3)
    'int 3'
    """
    try:
        return f"{type(value).__name__} {value!r}"[:80]
    except Exception:  # its repr may raise
        return f"a {type(value).__name__}"


NOT_SHOWN = ("done", "reward", "metadata")  # fields of an observation that its result has too


def _no_options(row: RowColumns) -> dict[str, Any]:
    return {}


def openenv(
    connect: Callable[[], Any],
    action: Callable[[str], Any],
    options: Callable[[RowColumns], dict[str, Any]] = _no_options,
    observation: Callable[[Any], str] | None = None,
    name: str = "openenv",
) -> Environment:
    """Return the environment of an OpenEnv server, through a client of the package openenv, for
    environment=my_env.py:echo:

        from echo_env import EchoAction, EchoEnv

        echo = openenv(lambda: EchoEnv(base_url="http://host:8000"), lambda text: EchoAction(message=text))

    The client may be any object whose reset(**options) and step(action) return a result with `observation`,
    `reward` and `done`; both may be async. The model reads the observation as text; the score is the sum of
    the rewards.

    connect: makes a client. A client serves one episode at a time, then the next one, unless the episode had
    a fault; at the end its close() is called. action: a turn's text -> the action; raises ValueError if the
    text has no action. options: a row -> arguments of reset, such as a seed. observation: an observation ->
    text for the model, by default its only field that is a string, or JSON.
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

    return Environment(name, reset, step, _no_tools, (), _no_score)


def observation_text(observation: Any) -> str:
    """Return an observation, a dictionary or an object with fields, as text.

    Its fields done, reward and metadata, private fields and fields of None are left out. A single string is
    returned as it is, other fields as JSON, "" if none is left.

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
