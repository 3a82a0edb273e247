"""Rollouts as episodes: sample turns, let an environment answer them, and return trajectories.

All first turns are queued at once. As soon as a turn has ended, a thread asks the environment for its answer,
while other episodes go on sampling; the answer's tokens are appended to the episode, and its next turn is
sampled. Which tokens are sampled does not depend on which answer came first.

An episode ends when the environment says so, at a limit of turns or tokens, or with a fault. An episode that
a limit ends is scored as others are: by the environment's score or, if that is None, by the sum of the turns'
rewards so far, 0 if it only called tools. Faults that exclude the episode from training and means: the
environment or a tool raises, takes longer than the time-out, returns a wrong type or too much text, or the
chat template rejects the messages. Errors in the model's own calls are returned to the model (tools.py). Both
are counted by kind.
"""

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxft.annotations import PositiveInt, above, check_bounds, name_of
from jaxft.data.chat.loss_mask import example_prompt_ids
from jaxft.data.chat.next_turn import NextPrompt, TurnWording, next_prompt
from jaxft.data.chat.tool_calls import CallFormat, call_format, template_tool_format
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.rows.example import Chat, Completion, Message
from jaxft.data.rows.invalid_rows import InvalidRow
from jaxft.distributed import processes
from jaxft.distributed.sync import is_first
from jaxft.engine.sampling import NONFINITE, without_stop
from jaxft.engine.session import Sampled
from jaxft.engine.text_stream import token_decoder
from jaxft.rl.environments.calls import Calls, Overdue, Task
from jaxft.rl.environments.environment import (
    Beginning,
    Environment,
    EpisodeState,
    FirstPrompt,
    RowColumns,
    StepResult,
    WrongType,
    checked_reward,
)
from jaxft.rl.environments.tools import ParsedTurn, answer_calls, parse_turn, turn_message, valid_text
from jaxft.rl.trajectory import Fault, Segment, ShownMessage, Trajectory

TIME_OUT, RAISED, WRONG_TYPE = "timeout", "raised", "wrong_type"
LARGE_OBSERVATION, TEMPLATE, LONG_PROMPT = "large_observation", "template", "long_prompt"
FAULT_SIZE = 200  # characters of an error's text


@dataclass(frozen=True)
class EpisodeLimits:
    """The largest sizes and times of an episode.

    turns: turns of the model. turn_tokens: tokens sampled in a turn. tokens: tokens after the prompt, sampled
    ones and answers together; where the chat template rewrites earlier turns, the whole prompt of the next
    turn counts. prompt: tokens of a prompt. timeout: seconds of each call of an environment or a tool.
    observation: characters of what reset, step or a tool returns. workers: concurrent calls.
    """

    turns: PositiveInt = 8
    turn_tokens: PositiveInt = 256
    tokens: PositiveInt = 1024
    prompt: PositiveInt = 1024
    timeout: Annotated[float, above(0)] = 30.0
    observation: PositiveInt = 1 << 16
    workers: PositiveInt = 32

    def __post_init__(self) -> None:
        check_bounds(self, "data")


@dataclass(frozen=True)
class Play:
    """The environment and the limits of episodes.

    stop: token ids that end a turn. rewards: TRL's reward functions with an argument `environments`. Each is
    called when an episode ends, with lists of one item (environments, prompts, completions and the dataset's
    columns), and returns a list of one number, or [None] for no score.
    """

    environment: Environment
    tokenizer: Any
    stop: tuple[int, ...]
    limits: EpisodeLimits = EpisodeLimits()
    rewards: tuple[Callable[..., Any], ...] = ()

    def __post_init__(self) -> None:
        if self.environment.continues and not self.tokenizer.chat_template:
            raise ValueError(
                f"environment {self.environment.name} may answer a turn, which needs a chat template, and "
                "the tokenizer has none. Set chat_template=chatml or qwen."
            )
        if self.environment.schemas and self.call_format is None:
            raise ValueError(
                f"environment {self.environment.name} has tools, but the chat template has no format of tool "
                "calls that jaxft reads. Set chat_template=qwen, or use another tokenizer."
            )

    @cached_property
    def calls(self) -> Calls:
        """The threads that call users' functions; threads with reusable objects outlive a rollout."""
        return Calls(self.limits.workers, self.limits.timeout)

    @property
    def call_format(self) -> CallFormat | None:
        """The format in which the chat template writes tool calls; None if there are no tools."""
        if not self.environment.schemas or not self.tokenizer.chat_template:
            return None
        source = self.tokenizer.get_chat_template(tools=list(self.environment.schemas))
        return call_format(template_tool_format(str(source)))


class TurnSession(Protocol):
    """A sampler of turns, such as the engine's Session, or a person who types them.

    The caller gives each episode a number. An episode occupies a row of the sampler from `start` until
    `drop`, so that it can be continued when a turn has ended.
    """

    def start(self, prompt: Sequence[int], episodes: Sequence[int], number: int, max_new: int) -> None:
        """Queue a prompt, and for each of the episodes a completion of at most `max_new` tokens.

        number: the prompt's number, from which the random keys of its completions are derived.
        """

    def extend(self, episode: int, tokens: Sequence[int], max_new: int) -> None:
        """Append given tokens to an episode whose turn has ended; sample up to `max_new` more."""

    def drop(self, episode: int) -> None:
        """End an episode. Its row is free for another."""

    def wait(self) -> list[Sampled]:
        """Sample until a turn has ended; return all that have ended, [] if no episode is in progress."""


Sampler = Callable[[jax.Array], TurnSession]  # of a key, from which the keys of all completions derive
Ended = Callable[[int, Trajectory], None]  # called with the number of an episode that has ended


def ignore(*ignored: Any) -> None:
    """Accept any arguments and do nothing."""


def rollout(
    sampler: Sampler,
    play: Play,
    rows: TokenisedPrompts,
    group: int,
    key: jax.Array,
    ended: Ended | None = None,
) -> list[Trajectory]:
    """Play `group` episodes of each of the prompts `rows`; return them in the order of the prompts, the
    `group` episodes of a prompt one after the other.

    ended: called with (number, trajectory) of each episode as soon as it has ended, for rewards that overlap
    with sampling. All processes of a run sample; the environment is called on the first.

    >>> from tokenizers import Tokenizer
    >>> from tokenizers.models import WordLevel
    >>> from transformers import PreTrainedTokenizerFast
    >>> from jaxft.rl.environments.environment import single_turn
    >>> words = {"2": 0, "+": 1, "4": 2, "end": 3}
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "end")))
    >>> class Fours:  # a session without a model: all turns are "4 end"
    ...     def __init__(self, key):
    ...         self.queue = []
    ...     def start(self, prompt, episodes, number, max_new):
    ...         self.queue += episodes
    ...     def drop(self, episode):
    ...         pass
    ...     def wait(self):
    ...         started, self.queue = self.queue, []
    ...         return [Sampled(i, np.array([2, 3]), np.zeros(2), "stop") for i in started]
    >>> rows = TokenisedPrompts(((0, 1, 0),), ("row 1",), (Completion("row 1", "2 + 2", ""),), ({},))
    >>> play = Play(single_turn(), tokenizer, stop=(3,))
    >>> [episode.text for episode in rollout(Fours, play, rows, 2, jax.random.key(0))]
    ['4', '4']
    """
    with play.calls as calls:
        return _Rollout(play, rows, group, sampler(key), calls).run(ended)


@dataclass
class _Episode:
    """An episode in progress. prompt: index of its dataset row. start: token ids of its first prompt, None
    before sampling begins. answered: number of turns that the environment has answered. stopped: whether the
    last turn ended with a stop token. asked: number of messages in its prompt. chat, state, asked: only on
    the first process.
    """

    number: int
    prompt: int
    start: tuple[int, ...] | None = None
    segments: list[Segment] = field(default_factory=list)
    answered: int = 0
    stopped: bool = False
    chat: Chat | Completion | None = None
    state: EpisodeState = None
    asked: int = 0
    sampled: ParsedTurn = ParsedTurn("", (), 0)
    messages: tuple[ShownMessage, ...] = ()
    faults: list[Fault] = field(default_factory=list)

    @property
    def turns(self) -> list[Segment]:
        """The turns that the model sampled."""
        return [s for s in self.segments if s.sampled]

    @property
    def used(self) -> int:
        """Tokens after the first prompt."""
        return sum(len(s.tokens) for s in self.segments)

    def given(self, ids: list[int], begins: bool) -> None:
        """Append tokens that are not sampled. begins: whether they are the prompt of a new training row."""
        self.segments.append(Segment(np.asarray(ids, np.int32), None, begins=begins))


class _Scored(NamedTuple):
    """Result of scoring an episode. score: by the environment; NaN if it gives no scores, None for the sum of
    the turns' rewards (0 if no turn has one). rewards: values of the reward functions that read the
    environment, by name; NaN for None.
    """

    score: float | None
    rewards: dict[str, float]


class _Answer(NamedTuple):
    """The environment's answer to a turn. faults: of the model's tool calls, which the model is shown."""

    step: StepResult
    faults: list[Fault]


class _Decision(NamedTuple):
    """The next action of an episode, decided on the first process; all values are JSON.

    number: the episode's. do: "start", "extend", "wait" (for its score) or "end". ids: token ids of a prompt
    or of the environment's reply. reward: reward of the last turn, NaN for none. score, rewards: see _Scored.
    done: whether the environment has ended the episode. fault: (kind, text) of a fault that excludes the
    episode. faults: (kind, text) of the model's faults, which do not exclude it. messages: new messages of
    the conversation.
    """

    number: int
    do: str
    ids: list[int] = []
    reward: float = math.nan
    score: float = math.nan
    rewards: dict[str, float] = {}
    done: bool = False
    fault: tuple[str, str] | None = None
    faults: list[tuple[str, str]] = []
    messages: list[Any] = []


class _Rollout:
    """Episodes in progress, from their start to their end."""

    def __init__(self, play: Play, rows: TokenisedPrompts, group: int, session: TurnSession, calls: Calls):
        self.play, self.rows, self.group, self.session, self.calls = play, rows, group, session, calls
        self.format = play.call_format
        self.decoder = token_decoder(play.tokenizer, self.format.tokens if self.format else ())
        self.episodes = [_Episode(i, i // group) for i in range(len(rows) * group)]
        self.open = set(range(len(self.episodes)))
        self.ready = dict[int, dict[int, list[int]]]()  # prompts of a row's episodes that have not started
        self.results = dict[int, Trajectory]()

    def run(self, ended: Ended | None) -> list[Trajectory]:
        """Play all episodes to their end."""
        self.ended = ended
        for episode in self.episodes:
            if self.play.environment.continues:
                self._submit(episode, partial(self.play.environment.reset, self._row(episode)))
        if not self.play.environment.continues:
            for episode in self.episodes:
                self._apply(self._begun(episode, Beginning(None, None)))
        turns = list[Sampled]()
        while self.open:
            for decision in self._decisions(wait=not turns):  # without turns, no row is in progress
                self._apply(decision)
            turns = self.session.wait()
            for sampled in turns:
                self._take(sampled)
        return [self.results[number] for number in range(len(self.episodes))]

    def _row(self, episode: _Episode) -> RowColumns:
        """Return a copy of the columns of the episode's row, with its prompt."""
        given = self.rows.as_given(episode.prompt)
        return deepcopy({"prompt": given, **self.rows.fields[episode.prompt]})

    def _submit(self, episode: _Episode, work: Callable[[Task], Any]) -> None:
        if is_first():
            self.calls.submit(episode.number, work)

    def _decisions(self, wait: bool) -> list[_Decision]:
        """Return the decisions for episodes whose call of a user's function has ended, the same on all
        processes. wait: whether to wait until a call has ended.
        """

        def on_first() -> list[Any]:
            return [self._decide(number, value) for number, value in self.calls.finished(wait)]

        return [_Decision(*fields) for fields in processes.from_first_process(on_first)]

    # ---- on the first process

    def _decide(self, number: int, value: Any) -> _Decision:
        """Return the decision after a call returned a beginning, an answer, a score or an exception."""
        episode = self.episodes[number]
        try:
            match value:
                case Beginning():
                    return self._begun(episode, value)
                case _Scored(score, rewards):
                    total = math.fsum(turn.reward for turn in episode.turns if not math.isnan(turn.reward))
                    end_score = total if score is None else score
                    return _Decision(number, "end", score=end_score, rewards=rewards)
                case _Answer():
                    return self._answered(episode, value)
                case _:
                    fault = _fault_of(value, self.play.limits)
        except InvalidRow as error:
            fault = TEMPLATE, str(error)[:FAULT_SIZE]
        is_new = episode.answered < len(episode.turns)  # the last turn is not among the messages
        messages = [turn_message(episode.sampled)] if is_new else []
        return _Decision(number, "end", fault=fault, messages=messages)

    def _begun(self, episode: _Episode, begun: Beginning) -> _Decision:
        """Return the decision to start from the environment's prompt, or from the row's own."""
        rows = self.rows
        row_prompt = rows.prompts[episode.prompt]
        chat: Any = row_prompt
        if too_large := self._too_large("the prompt of reset", begun.prompt):
            return _Decision(episode.number, "end", fault=too_large)
        if self.play.environment.continues:
            chat = _with_prompt(row_prompt, begun.prompt)
        episode.state, episode.chat = begun.state, chat
        ids = list(rows.ids[episode.prompt])
        if chat != row_prompt:
            (encoded,) = example_prompt_ids([chat], self.play.tokenizer, rows.template)
            if isinstance(encoded, InvalidRow):
                raise encoded
            ids = encoded
        if len(ids) > self.play.limits.prompt:
            most = self.play.limits.prompt
            text = f"the prompt has {len(ids)} tokens, more than data.max_prompt={most}; raise it"
            return _Decision(episode.number, "end", fault=(LONG_PROMPT, text))
        if isinstance(chat, Chat):
            messages = list(chat.messages[: chat.response])
        else:
            messages = [{"role": "user", "content": chat.prompt}]
        episode.asked = len(messages)
        return _Decision(episode.number, "start", ids, messages=messages)

    def _answered(self, episode: _Episode, answer: _Answer) -> _Decision:
        """Return the decision to continue an episode with the environment's answer, or to end it."""
        step, limits = answer.step, self.play.limits
        episode.state = step.state
        turn: Message = turn_message(episode.sampled)
        decision = _Decision(episode.number, "wait", reward=step.reward, faults=list(answer.faults))
        calls = episode.sampled.calls or episode.sampled.malformed  # of which each result is limited
        if not calls and (too_large := self._too_large("the observation", step.observation)):
            return decision._replace(do="end", fault=too_large, messages=[turn])
        over = decision._replace(done=step.done or not step.observation, messages=[turn])
        if over.done or len(episode.turns) >= limits.turns or episode.used >= limits.tokens:
            return over
        chat: Any = episode.chat
        following = self._following(episode, step.observation)
        size = len(following.ids)
        if episode.used + size >= limits.tokens or (following.restarts and size > limits.prompt):
            return over
        messages = following.messages
        episode.chat = replace(chat, messages=messages, response=len(messages))
        do = "start" if following.restarts else "extend"
        return over._replace(do=do, ids=following.ids, messages=[turn, *step.observation])

    def _too_large(self, what: str, value: Any) -> tuple[str, str] | None:
        """Return a fault if a value, as JSON, has too many characters, else None. what: the value's name."""
        size, most = len(json.dumps(value, ensure_ascii=False)), self.play.limits.observation
        text = f"{what} has {size} characters, more than data.max_observation={most}; raise it"
        return (LARGE_OBSERVATION, text) if size > most else None

    def _following(self, episode: _Episode, observation: tuple[Message, ...]) -> NextPrompt:
        """Return the prompt of the next turn. Tool calls of the last turn are written as calls or, if the
        chat template omits these, as text; tools' results that it cannot show as such become user messages.
        """
        chat: Any = episode.chat
        turn, text = turn_message(episode.sampled), self._text(episode)
        ways = [TurnWording(turn, observation)]
        if any(message["role"] == "tool" for message in observation):
            plain: Message = {"role": "assistant", "content": text}
            as_user = tuple({"role": "user", "content": message["content"]} for message in observation)
            ways += [TurnWording(plain, observation), TurnWording(plain, as_user)]
        settings: TemplateSettings = self.rows.template
        return next_prompt(chat, ways, episode.stopped, self.play.tokenizer, settings)

    # ---- on all processes

    def _apply(self, decision: _Decision) -> None:
        """Extend, start, score or end an episode as decided, the same on every process."""
        episode = self.episodes[decision.number]
        episode.messages += tuple(decision.messages)
        episode.faults += [Fault(*fault) for fault in decision.faults]
        if episode.segments and decision.do != "end":
            episode.segments[-1] = replace(episode.segments[-1], reward=decision.reward)
            episode.answered += 1
        if decision.do == "extend":
            episode.given(decision.ids, begins=False)
            self.session.extend(episode.number, decision.ids, self._turn_limit(episode))
        elif decision.do == "start":
            self._start(episode, decision.ids)
        elif decision.do == "wait":
            self._score(episode, decision.done)
        else:
            self._end(episode, decision)

    def _start(self, episode: _Episode, ids: list[int]) -> None:
        """Start a row of an episode with a prompt's ids; the first rows of a group start together."""
        if episode.start is not None:
            self.session.drop(episode.number)
            episode.given(ids, begins=True)
            return self._begin_rows(ids, [episode], self._own_number(episode))
        waiting = self.ready.setdefault(episode.prompt, {})
        waiting[episode.number] = ids
        return self._start_group(episode.prompt)

    def _start_group(self, prompt: int) -> None:
        """Start the first rows of a prompt's episodes, once each unfinished episode has its first prompt."""
        numbers = range(prompt * self.group, (prompt + 1) * self.group)
        waiting = self.ready.get(prompt, {})
        if not waiting or any(i in self.open and i not in waiting for i in numbers):
            return
        del self.ready[prompt]
        together = dict[tuple[int, ...], list[_Episode]]()
        for number in sorted(waiting):
            together.setdefault(tuple(waiting[number]), []).append(self.episodes[number])
        for order, (ids, episodes) in enumerate(together.items()):
            number = prompt if order == 0 else self._own_number(episodes[0])
            for episode in episodes:
                episode.start = ids
            self._begin_rows(list(ids), episodes, number)

    def _begin_rows(self, ids: list[int], episodes: list[_Episode], number: int) -> None:
        """Start a row of each episode from one prompt. number: the prompt's number, for the random keys."""
        numbers = [episode.number for episode in episodes]
        self.session.start(ids, numbers, number, min(map(self._turn_limit, episodes)))

    def _own_number(self, episode: _Episode) -> int:
        """Return a number for the random keys of an episode's next row that no other row has."""
        return len(self.rows) + episode.number * (self.play.limits.turns + 1) + len(episode.turns)

    def _turn_limit(self, episode: _Episode) -> int:
        limits = self.play.limits
        return min(limits.turn_tokens, limits.tokens - episode.used)

    def _take(self, sampled: Sampled) -> None:
        """Add a turn that has ended to its episode, and ask the environment for the answer."""
        episode = self.episodes[sampled.episode]
        if NONFINITE in sampled.tokens:
            raise ValueError(
                f"{self.rows.names[episode.prompt]}: the policy's logits of token {len(sampled.tokens)} of a "
                "completion are not finite; lower optim.lr, or check the weights"
            )
        logps = np.asarray(sampled.logps, np.float32)
        episode.segments.append(Segment(np.asarray(sampled.tokens, np.int32), logps))
        episode.stopped = sampled.finish == "stop"
        if not self.play.environment.continues:
            turn = {"role": "assistant", "content": self._text(episode)}
            self._apply(_Decision(episode.number, "end", done=True, messages=[turn]))
            return
        if is_first():
            episode.sampled = parse_turn(self._text(episode, True), self.format, len(episode.turns))
            asked = partial(_answer, self.play, episode.state, episode.sampled, self._text(episode))
            self._submit(episode, asked)

    def _text(self, episode: _Episode, marked: bool = False) -> str:
        """Return the text of the last turn without its stop token. marked: with the marks of tool calls."""
        ids = without_stop(episode.turns[-1].tokens, self.play.stop)
        if not marked:
            return str(self.play.tokenizer.decode(ids, skip_special_tokens=True))
        return self.decoder.decode([int(x) for x in ids if int(x) not in self.decoder.skipped])

    def _score(self, episode: _Episode, done: bool) -> None:
        """Begin to score an episode, or end it without a score. done: the environment has ended it."""
        episode.stopped = episode.stopped and done
        if self.play.environment.scored or self.play.rewards:
            given = {name: [value] for name, value in self._row(episode).items() if name != "prompt"}
            given["prompts"] = [list(episode.messages[: episode.asked])]
            given["completions"] = [list(episode.messages[episode.asked :])]
            self._submit(episode, partial(_score_of, self.play, episode.state, given))
        else:
            self._apply(_Decision(episode.number, "end"))

    def _end(self, episode: _Episode, decision: _Decision) -> None:
        """Drop the episode's row, and build its trajectory."""
        number = episode.number
        if episode.start is not None:
            self.session.drop(number)
        if decision.fault:
            episode.faults.append(Fault(*decision.fault))
        fault = decision.fault[0] if decision.fault else ""
        self.results[number] = Trajectory(
            episode.prompt, episode.start or (), tuple(episode.segments), decision.score,
            episode.stopped and not fault, fault, episode.messages, tuple(episode.faults), decision.rewards,
        )  # fmt: skip
        self.calls.release(number, keep=not fault)
        self.open.remove(number)
        if self.ended is not None:
            self.ended(number, self.results[number])
        self._start_group(episode.prompt)


# ---- work of the threads


def _answer(play: Play, state: EpisodeState, turn: ParsedTurn, text: str, task: Task) -> _Answer:
    """Call the tools that a turn calls or, if it calls none, the environment."""
    environment = play.environment
    if environment.schemas and (turn.calls or turn.malformed):
        how = task, play.limits.observation, environment.tool_errors
        messages, faults = answer_calls(turn, environment.tools(state), *how)
        return _Answer(StepResult(tuple(messages), math.nan, False, state), faults)
    return _Answer(environment.step(state, text, task), [])


def _score_of(play: Play, state: EpisodeState, given: dict[str, Any], task: Task) -> _Scored:
    """Return the environment's score, and the rewards of functions that read the environment.

    given: arguments of these functions; log_extra and log_metric, which TRL passes them, do nothing here.
    """
    environment, rewards = play.environment, dict[str, float]()
    score = environment.score(state, task) if environment.scored else math.nan
    logs = {"log_extra": ignore, "log_metric": ignore}
    for function in play.rewards:
        values = task.call(function, environments=[environment.owner(state)], **logs, **deepcopy(given))
        if not isinstance(values, list | tuple | np.ndarray) or len(values) != 1:
            name, got = name_of(function), repr(values)[:80]
            raise WrongType(f"reward {name} returned {got}, expected a list with one number")
        rewards[name_of(function)] = checked_reward(values[0])
    return _Scored(score, rewards)


def _fault_of(error: Any, limits: EpisodeLimits) -> tuple[str, str]:
    """Return (kind, text) of the fault for an exception that a call raised."""
    if isinstance(error, Overdue):
        return TIME_OUT, f"a call took more than data.timeout={limits.timeout:g} seconds"
    if isinstance(error, WrongType):
        return WRONG_TYPE, valid_text(str(error)[:FAULT_SIZE])
    return RAISED, valid_text(f"{type(error).__name__}: {' '.join(str(error).split())}"[:FAULT_SIZE])


def _with_prompt(chat: Chat | Completion, prompt: FirstPrompt) -> Chat:
    """Return a row's prompt with reset's text at the end of its last message, or reset's messages instead."""
    if isinstance(chat, Completion):
        chat = Chat(chat.name, ({"role": "user", "content": chat.prompt},), 1)
    messages = chat.messages[: chat.response]
    if isinstance(prompt, str):  # as TRL appends it
        last = messages[-1]
        messages = (*messages[:-1], {**last, "content": (last["content"] or "") + prompt})
    elif prompt is not None:
        messages = tuple(prompt)
    return replace(chat, messages=messages, response=len(messages))
