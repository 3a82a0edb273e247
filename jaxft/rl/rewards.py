"""The Reward type, plain functions as rewards, and functions that check an answer.

A reward function takes (prompt, completion, row) and returns a number. If it raises, or returns None, NaN or
no number, the completion has no score: it is counted, excluded from training and from all means, and never
silently worth 0.

An async function, such as one that asks a judge on a server, is called as soon as a completion has ended, and
runs while other completions are sampled. Plain functions are called one after the other, on the main thread.

A function with an argument `environments` is a reward of TRL that reads the objects of a run's environment:
it is called on their threads, with lists of length one. If it returns None, the episode is scored by the
other rewards.
"""

import asyncio
import copy
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float, Shaped

from jaxft.annotations import name_of
from jaxft.batch import TrainState
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.distributed import processes
from jaxft.distributed.sync import is_first
from jaxft.nn import tree
from jaxft.nn.tree import Params
from jaxft.rl.environments.calls import shared_loop
from jaxft.rl.environments.environment import finite_number, short_repr
from jaxft.rl.episodes import Ended
from jaxft.rl.rollout_layout import PackedRows, RolloutPrograms
from jaxft.rl.trajectory import Episodes, Trajectory

ASYNC_SECONDS, SPARE_SECONDS = 600.0, 5.0  # after which an async reward has no score; for its loop to say so
OBJECTS = "environments"  # the argument of TRL's reward functions that has the objects
SIGN, EXPONENT = r"(?:(?<![\w)])[-+])?", r"(?:[eE][-+]?\d+)?"  # 10-7 ends with a 7
NUMBER = re.compile(rf"{SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+){EXPONENT}")


@dataclass(frozen=True)
class Faults:
    """Counts of completions without a score, because a reward raised or returned no number. first: a message
    about the first of them.
    """

    raised: int = 0
    not_a_number: int = 0
    first: str = ""

    def __add__(self, other: "Faults") -> "Faults":
        return Faults(
            self.raised + other.raised, self.not_a_number + other.not_a_number, self.first or other.first
        )


class RewardScores(NamedTuple):
    """The scores of n completions by one reward, NaN for no score, and counts of faults. skips: completions
    that the reward leaves to the other rewards.
    """

    scores: Float[np.ndarray, " n"]
    faults: Faults = Faults()
    skips: Bool[np.ndarray, "..."] = np.zeros((), bool)


ScoreEpisodes = Callable[[Episodes, PackedRows, TrainState], RewardScores]


@runtime_checkable
class Reward(Protocol):
    """A reward of completions. Rules wraps plain functions of (prompt, completion, row)."""

    @property
    def name(self) -> str:
        """The name in metrics and in completions.jsonl."""

    def prepare(self, programs: RolloutPrograms) -> ScoreEpisodes:
        """Load the models of the reward, compile their programs, and return the scoring function."""

    def fingerprint(self) -> str | None:
        """Return a hash of the weights of a separate reward model, None without one."""
        return None

    def start_lines(self) -> list[str]:
        """Return lines for the start of a run about a separate reward model."""
        return []

    def resident(self, mesh: jax.sharding.Mesh) -> Params:
        """Return shapes and shardings of the reward's own arrays on the devices."""
        return {}


@dataclass(frozen=True)
class FunctionReward(Reward):
    """A plain function of (prompt, completion, row) as a reward, called on the first process.

    prompt: a string or a list of messages. row: the columns of the dataset row.
    """

    fn: Callable[[Any, str, dict[str, Any]], float]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ValueError(
                f"reward {self.fn!r} is neither a function of (prompt, completion, row) nor a Reward. "
                "Set rewards=module:function."
            )
        _require_reward_signature(self.fn, self.name)

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.fn)

    @property
    def is_async(self) -> bool:
        """True if the function is async."""
        return any(map(inspect.iscoroutinefunction, (self.fn, type(self.fn).__call__)))

    def begin(self, prompt: Any, completion: str, columns: dict[str, Any]) -> Callable[[], Any]:
        """Prepare a call, with copies that the function may change; return a function that returns the call's
        result or raises its exception. An async function starts now, a plain one when the returned function
        is called. columns: of the row. An async call raises TimeoutError after ASYNC_SECONDS.
        """
        given = copy.deepcopy(prompt), completion, copy.deepcopy(columns)
        if not self.is_async:
            return partial(self.fn, *given)
        coroutine: Any = self.fn(*given)
        loop, until = shared_loop(), time.monotonic() + ASYNC_SECONDS
        future = loop.begin(asyncio.wait_for(coroutine, ASYNC_SECONDS))

        def result() -> Any:
            try:
                return future.result(max(0.0, until - time.monotonic()) + SPARE_SECONDS)
            except TimeoutError:
                if future.done() and time.monotonic() < until:  # the function's own, such as a client's
                    raise
                if not future.done():  # a coroutine blocks the loop
                    loop.end()
                raise TimeoutError(
                    f"no result after {ASYNC_SECONDS:g} s; make the function faster, and await its requests"
                ) from None

        return result

    def prepare(self, programs: RolloutPrograms) -> ScoreEpisodes:
        """Return the function that scores a rollout's episodes."""

        def score(episodes: Episodes, rows: PackedRows, state: TrainState) -> RewardScores:
            prompts, chosen = episodes.prompts, np.flatnonzero(episodes.valid)

            def on_first() -> list[Any]:
                trajectories = [episodes.trajectories[i] for i in chosen]
                given = [prompts.as_given(t.prompt) for t in trajectories]
                rows = [(prompts.names[t.prompt], prompts.fields[t.prompt]) for t in trajectories]
                begun = [episodes.begun.get((self, i)) for i in chosen]
                scores, faults, _ = call_reward(self, given, [t.text for t in trajectories], rows, begun)
                return [scores.tolist(), *astuple(faults)]

            scores, *faults = processes.from_first_process(on_first)
            values = np.full(episodes.valid.size, np.nan)
            values[chosen] = scores
            return RewardScores(values, Faults(*faults))

        return score


def _require_reward_signature(fn: Callable, name: str) -> None:
    """Raise ValueError for a function that cannot be called with (prompt, completion, row), or has the
    parameters of TRL's reward functions, which score lists.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of some functions written in C
        return
    takes = "is a function of (prompt, completion, row) that returns a number"
    if OBJECTS in signature.parameters:
        raise ValueError(
            f"reward {name}{signature} has the parameter environments, which only an environment can fill. "
            "Set environment=my_env.py:Name, or leave this reward out."
        )
    if {"prompts", "completions"} & {*signature.parameters}:
        raise ValueError(
            f"reward {name}{signature} has TRL's parameters, lists of all completions; a reward here "
            f"{takes}: def {name}(prompt, completion, row), where row has the dataset's columns"
        )
    try:
        signature.bind("prompt", "completion", {})
    except TypeError as error:
        raise ValueError(f"reward {name}{signature}: {error}; a reward {takes}") from error


@dataclass(frozen=True)
class ObjectReward(Reward):
    """A reward function of TRL that reads the objects of environments: (environments, **columns) -> [number]
    or [None].

    The module `play` calls it when an episode ends and stores its values in the episode.
    """

    fn: Callable[..., Any]

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.fn)

    def prepare(self, programs: RolloutPrograms) -> ScoreEpisodes:
        """Return the function that reads the values."""

        def score(episodes: Episodes, rows: PackedRows, state: TrainState) -> RewardScores:
            scores = np.array([t.rewards.get(self.name, math.nan) for t in episodes.trajectories])
            return RewardScores(scores, skips=np.isnan(scores))

        return score


def reward_of(given: Any) -> Reward:
    """Return a user's function as a reward; a Reward unchanged.

    >>> def short(prompt, completion, row):
    ...     return float(len(completion) < 80)
    >>> reward_of(short).name
    'short'
    """
    if isinstance(given, Reward):
        return given
    try:
        reads = callable(given) and OBJECTS in inspect.signature(given).parameters
    except (TypeError, ValueError):  # of some functions written in C
        reads = False
    return ObjectReward(given) if reads else FunctionReward(given)


@dataclass(frozen=True)
class EnvironmentReward(Reward):
    """The score that a run's environment has given an episode."""

    name: str = "environment"

    def prepare(self, programs: RolloutPrograms) -> ScoreEpisodes:
        """Return the function that reads the scores."""
        return lambda episodes, rows, state: RewardScores(episodes.scores)


def unique_names(rewards: Sequence[Reward]) -> list[str]:
    """Return the names of rewards; the second reward of the same name gets the suffix _2, the third _3."""
    names = [reward.name for reward in rewards]
    return [
        name if names[:i].count(name) == 0 else f"{name}_{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


def begin_async(
    rewards: Sequence[Any], prompts: TokenisedPrompts
) -> tuple[dict[Any, Callable[[], Any]], Ended]:
    """Return (begun, ended). ended(number, episode) begins the async rewards of an episode that has ended,
    and stores each call in `begun` by (reward, number), see Episodes.begun.

    Calls begin on the first process only, and none for an episode with a fault.
    """
    begun = dict[Any, Callable[[], Any]]()
    chosen = [r for r in rewards if isinstance(r, FunctionReward) and r.is_async]

    def ended(number: int, t: Trajectory) -> None:
        for reward in chosen if is_first() and not t.fault else ():
            call = reward.begin(prompts.as_given(t.prompt), t.text, prompts.fields[t.prompt])
            begun[reward, number] = call

    return begun, ended


def call_reward(
    reward: FunctionReward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    rows: Sequence[tuple[str, dict[str, Any]]],
    begun: Sequence[Callable[[], Any] | None] = (),
) -> RewardScores:
    """Call a reward function for each completion, with copies that it may change. rows: (name, columns) of
    each completion's row. begun: for each completion the call that `begin` has returned, or None.

    >>> rows = [("row 1", {"answer": "4"})] * 2
    >>> call_reward(FunctionReward(exact), ["2 + 2?"] * 2, ["4", "5"], rows).scores
    array([1., 0.])
    """
    scores, faults = np.full(len(completions), np.nan), Faults()
    given = zip(begun or [None] * len(rows), prompts, completions, rows, strict=True)
    calls = [call or reward.begin(prompt, text, columns) for call, prompt, text, (_, columns) in given]
    for i, (call, (row, _)) in enumerate(zip(calls, rows, strict=True)):
        try:
            value = call()
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            text = " ".join(str(error).split())[:200]
            message = f"reward {reward.name} raised {type(error).__name__}: {text} ({row})"
            faults += Faults(raised=1, first=message)
            continue
        scores[i], fault = _finite_number(value, reward.name, row)
        faults += fault
    return RewardScores(scores, faults)


def check_scores(scores: Shaped[np.ndarray, "..."], name: str, row_names: Sequence[str]) -> RewardScores:
    """Return a reward's scores, NaN for those that are not finite, and their number as faults. name: of the
    reward, for messages.
    """
    numbers = [_finite_number(value, name, row) for value, row in zip(scores, row_names, strict=True)]
    return RewardScores(
        np.array([value for value, _ in numbers]), sum((fault for _, fault in numbers), Faults())
    )


def _finite_number(value: Any, name: str, row: str) -> tuple[float, Faults]:
    """Convert the value that a reward returned to a score; NaN and a fault if it is no finite real number."""
    score = finite_number(value)
    if math.isfinite(score):
        return score, Faults()
    message = f"reward {name} returned {short_repr(value)}, expected a finite number ({row})"
    return math.nan, Faults(not_a_number=1, first=message)


# Reward functions


def exact(prompt: Any, completion: str, row: dict[str, Any], column: str = "answer") -> float:
    """Return 1 if the completion equals the row's `column` up to white space and case, else 0.

    >>> exact("Capital of France?", " paris ", {"answer": "Paris"})
    1.0
    """
    return float(_normalised(completion) == _normalised(row[column]))


def number(
    prompt: Any, completion: str, row: dict[str, Any], column: str = "answer", tolerance: float = 1e-6
) -> float:
    """Return 1 if the last numbers of the completion and of the row's `column` differ by at most
    `tolerance`, relative or absolute, else 0.

    Raises ValueError for a row whose column has no number.

    >>> number("6 * 7?", "6 * 7 = 42.", {"answer": "#### 42"})
    1.0
    """
    expected, got = last_number(row[column]), last_number(completion)
    if expected is None:
        raise ValueError(
            f"column {column!r} has no number: {row[column]!r}; correct the row, or set another column"
        )
    return float(got is not None and math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance))


def json_match(prompt: Any, completion: str, row: dict[str, Any], column: str = "answer") -> float:
    """Return 1 if the whole completion is JSON with the same value as the row's `column`, else 0.

    White space, the order of keys and the notation of numbers (3 and 3.0) make no difference. Everything else
    does: a missing or an additional key, true in place of 1, text around the JSON, a repeated key. The column
    has JSON text or a JSON value; ValueError is raised for any other.

    >>> json_match("", '{"b": 2, "a": 1.0}', {"answer": {"a": 1, "b": 2}})
    1.0
    """
    answer = row[column] if isinstance(row[column], str) else json.dumps(row[column])
    try:
        expected = strict_json(answer)
    except ValueError as error:
        raise ValueError(f"column {column!r} is not JSON ({error}): {answer[:80]!r}; fix it") from None
    try:
        return float(strict_json(completion) == expected)
    except ValueError:
        return 0.0


def matches(prompt: Any, completion: str, row: dict[str, Any], pattern: str) -> float:
    """Return 1 if the whole completion, stripped of white space, matches a regular expression, else 0.

    Raises ValueError if that takes more than tree.MATCH_SECONDS.

    >>> matches("", "Yes, 3.", {}, pattern=r"(Yes|No), [0-9]+[.]")
    1.0
    """
    return float(tree.regex(pattern, "pattern", dotall=True).fullmatch(completion.strip()))


def strict_json(text: str) -> Any:
    """Parse JSON into Python values that are equal exactly if the JSON values are.

    Numbers become pairs of "number" and a Decimal, because True == 1 in Python. Raises ValueError for text
    that is not JSON, for NaN and Infinity, and for repeated keys.
    """

    def number(digits: str) -> tuple[str, Decimal]:
        return "number", Decimal(digits)

    def unknown(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(
            text, parse_int=number, parse_float=number, parse_constant=unknown, object_pairs_hook=unique
        )
    except (RecursionError, ArithmeticError) as error:  # nested too deeply; an exponent out of range
        raise ValueError(f"cannot parse the text as JSON: {error}") from error


def last_number(text: Any) -> float | None:
    """Return the last number of a text, after GSM8K's #### if it has one; None without a number.

    Thousands separators are allowed.

    >>> last_number("12 boxes hold 1,440 eggs")
    1440.0
    """
    numbers = NUMBER.findall(str(text).rpartition("####")[2].replace("\u2212", "-"))  # a typeset minus
    return float(numbers[-1].replace(",", "")) if numbers else None


def _normalised(text: Any) -> str:
    return " ".join(str(text).split()).casefold()
