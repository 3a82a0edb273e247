"""Sessions: assign requests to the rows of an engine, run its programs, and collect the sampled tokens;
complete lists of prompts.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.engine.programs import Engine
from jaxft.engine.sampling import NONFINITE, Sampling, nonfinite_logits, row_sampling
from jaxft.engine.state import (
    NO_TOKEN,
    NO_TOP,
    OF_ALL,
    OF_ALLOWED,
    TOP_STEPS,
    RowChoices,
    all_allowed,
    given_tokens,
    key_data,
    new_prompts,
)
from jaxft.nn.adapters.lora_rows import BASE
from jaxft.nn.tree import Params

Finish = Literal["stop", "length", "error"]
# The most decoding steps of a program call if stop strings are searched, or rows extended, between calls.
STEPS_BETWEEN_LOOKS = 16
NONFINITE_LOGITS = "the logits are not finite; compute in float32 (--dtype float32), or check the weights"


@dataclass(frozen=True, eq=False)
class RequestSettings:
    """The settings of a request.

    sampling: settings other than the engine's, apart from max_new, need an engine with Decoding.serving.
    stop: token ids. adapter: index of a LoRA adapter, see lora_rows.py. top: whether to return the most
    likely tokens with their log-probs; needs Decoding.serving. among_allowed: whether these are only tokens
    that the grammar allows. grammar: a Grammar of serve/constraint.py that the completion must match; needs
    Decoding.constrained. key: data of the random key, None for the session's.
    """

    sampling: Sampling
    stop: tuple[int, ...] = ()
    adapter: int = BASE
    top: bool = False
    grammar: Any = None
    key: np.ndarray | None = None
    among_allowed: bool = False


class Sampled(NamedTuple):
    """The sampled token ids of a turn, with the stop token if one was sampled, and their log-probs.

    episode: the number that the caller gave the completion. finish: "error" if the completion cannot match
    its grammar, or if logits are not finite (the last token is then NONFINITE); "length" also for a turn in
    progress.
    """

    episode: int
    tokens: np.ndarray
    logps: np.ndarray
    finish: Finish


@dataclass(eq=False)
class Running:
    """A completion in a row of the engine. Tokens are counted from its first one, given ones included.

    slot: prompt slot. size: tokens of its prompt. limit: the count at which the present turn ends. text: all
    tokens, with the prompt. constraint: state of its grammar, None without one. first: index of the token
    that is sampled with random number 0. begun: index of the present turn's first sampled token. seen, count:
    number of tokens before the last Session.step, and now. given: tokens to append. finish: why the turn
    ended; None while it is in progress. error: what failed, or "".
    """

    episode: int
    choice: RequestSettings
    row: int
    slot: int
    size: int
    limit: int
    text: list[int]
    constraint: Any = None
    first: int = 0
    begun: int = 0
    seen: int = 0
    count: int = 0
    given: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: str = ""


class _Waiting(NamedTuple):
    prompt: Sequence[int]
    episodes: Sequence[int]
    number: int
    limit: int
    choice: RequestSettings


class Session:
    """Completes prompts with the rows of an engine, and continues rows after given tokens.

    The random key of completion i of a prompt is derived from `key`, the prompt's number and i; the key of
    its token t from this key and t. So its tokens do not depend on other prompts, nor on the sizes of the
    engine, except for rounding: kernels for other shapes may add in another order, which can replace a token
    by one that is about as likely.

    If the engine has Decoding.extends, a row is reserved after the end of a turn until it is extended or
    dropped. choice: settings of requests that are started without any; by default the engine's.

        session = Session(engine, params, jax.random.key(0))
        session.start([1, 2, 3], episodes=[0, 1])
        turns = session.wait()  # of the episodes that ended first
    """

    def __init__(
        self,
        engine: Engine,
        params: Params,
        key: Array | None = None,
        choice: RequestSettings | None = None,
    ):
        self.engine, self.params = engine, params
        self.key = key_data(jax.random.key(0) if key is None else key)
        self.choice = choice or RequestSettings(engine.decoding.sampling, engine.decoding.stop)
        self.waiting: list[_Waiting] = []  # the longest first, so that similar lengths are prefilled together
        self.running: dict[int, Running] = {}  # by episode
        self.prefilled = 0  # tokens of prompts and given tokens, without padding
        self.state, self.rows = engine.empty(), engine.slots.rows

    def start(
        self,
        prompt: Sequence[int],
        episodes: Sequence[int],
        number: int = 0,
        max_new: int | None = None,
        choice: RequestSettings | None = None,
    ) -> None:
        """Queue a prompt. episodes: numbers of the caller's choice, one for each of its completions (at most
        Decoding.group).

        number: the prompt's number, for random keys. max_new: the most tokens of a completion; None for the
        limit in `choice`, the session's settings if choice is None. Raises ValueError for settings that the
        engine is not compiled for, and for a prompt that is longer than the engine's prompt slots.
        """
        choice, d = choice or self.choice, self.engine.decoding
        if len(prompt) > (size := self.engine.slots.size):
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and this engine takes at most {size}; shorten it, or "
                "compile the engine with slots for the longest prompt (slots_for)"
            )
        same = replace(choice.sampling, max_new=d.sampling.max_new) == d.sampling
        if not (same or d.serving) or (choice.grammar and not d.constrained) or (choice.top and not d.top):
            raise ValueError(
                f"the engine is not compiled for {choice}; compile it with these settings, or for requests "
                "with settings of their own (Decoding.serving)"
            )
        limit = min(max_new or choice.sampling.max_new, d.sampling.max_new)
        item = _Waiting(prompt, episodes, number, limit, choice)
        insort(self.waiting, item, key=lambda item: -len(item.prompt))

    def extend(
        self, episode: int, tokens: Sequence[int], max_new: int, choice: RequestSettings | None = None
    ) -> None:
        """Append given tokens to an episode whose turn has ended, and sample up to max_new more.

        choice: new settings, None for the present ones. If it has a key, this becomes the row's key, and the
        next token has random number 0. Raises KeyError if the episode has no row, and ValueError if its turn
        is in progress or has failed, or if the row has no slots for the given tokens and one more.
        """
        it, space = self.running[episode], self.space(episode)
        if it.finish not in ("stop", "length"):
            raise ValueError(
                f"episode {episode} has no turn that has ended without an error; call wait before extend"
            )
        if len(tokens) >= space:
            raise ValueError(
                f"episode {episode} has {it.count} of at most {it.count + space} tokens, so {len(tokens)} "
                "given ones and a sampled one do not fit; drop it, or compile the engine with a larger "
                "max_new"
            )
        it.given, it.begun, it.choice = [it.text[-1], *tokens], it.count + len(tokens), choice or it.choice
        it.limit, it.count, it.finish = min(it.begun + max_new, it.count + space), it.count - 1, None
        it.text.extend(tokens)
        it.constraint = it.choice.grammar and it.choice.grammar.begin()
        if choice is not None and choice.key is not None:
            it.first = it.begun

    def space(self, episode: int) -> int:
        """Return how many more tokens the row of an episode has slots for."""
        return self.engine.decoding.sampling.max_new - self.running[episode].count

    def drop(self, episode: int) -> None:
        """End an episode, in a row or in the queue, without a result; its row becomes free."""
        if self.running.pop(episode, None) is None:
            items = (
                item._replace(episodes=[x for x in item.episodes if x != episode]) for item in self.waiting
            )
            self.waiting = [item for item in items if item.episodes]

    @property
    def busy(self) -> bool:
        """Whether a row is in progress, or a waiting prompt can start because enough rows are free."""
        if any(it.finish is None for it in self.running.values()):
            return True
        slots, rows = self.engine.slots, len(self.running)
        return bool(
            self.waiting
            and rows + len(self.waiting[0].episodes) <= slots.rows
            and len(self._slots()) < slots.prompts
        )

    def wait(self) -> list[Sampled]:
        """Decode until at least one turn has ended; return all that have, or [] if no row is in progress."""
        while self.busy:
            ended = [self.sampled(it) for it in self.step() if it.finish]
            if ended:
                return ended
        return []

    def sampled(self, it: Running) -> Sampled:
        """Return the tokens that a row has sampled in its present turn. it: a row that `step` returned."""
        turn = it.row, slice(it.begun, it.count)
        return Sampled(it.episode, self.tokens[turn].copy(), self.logps[turn].copy(), it.finish or "length")

    def step(self, steps: int | None = None) -> list[Running]:
        """Run one program: extend rows, start prompts, or decode up to `steps` steps (None: no such limit).
        Return the rows that have new tokens. The attributes `tokens` and `logps` [rows, max_new] then have
        all tokens so far.
        """
        self._fit()
        if not (self._extend() or self._start()):
            self._decode(steps)
        return self._collect()

    def _extend(self) -> bool:
        """Append given tokens to as many rows as one program takes, first to rows with the fewest given
        tokens. Return False if there are no given tokens.
        """
        pending = [it for it in self.running.values() if it.given]
        if not pending:
            return False
        pending.sort(key=lambda it: len(it.given))
        sizes = sorted(size[1:] for size in self.engine.extend if size[0] == self.rows)
        fits = [size for size in sizes if size[1] >= len(pending[0].given)] or [max(sizes, key=np.prod)]
        several = [size for size in fits if size[0] > 1] if len(pending) > 1 else []
        together, size = (several or fits)[0]
        new = given_tokens(self.engine.decoding, self.rows, (together, size))
        for i, it in enumerate(pending[:together]):
            chunk, it.given = it.given[:size], it.given[size:]
            new.ids[i, : len(chunk)] = chunk
            new.lengths[i], new.counts[i], new.rows[i] = len(chunk), it.count, it.row
            new.firsts[i], new.keys[i] = it.first, self.key if it.choice.key is None else it.choice.key
            it.count += len(chunk)
            self.prefilled += len(chunk)
            self._choose(new.settings, new.allowed, i, it)
        self.state = self.engine.extend[self.rows, together, size](self.params, self.state, new)
        return True

    def _start(self) -> bool:
        """Start as many waiting prompts as one program takes; False if there are none or too few rows."""
        if not self.waiting:
            return False
        slots, (together, size) = self.engine.slots, self._level()
        rows = sorted(set(range(self.rows)) - {it.row for it in self.running.values()})
        free = sorted(set(range(min(slots.prompts, self.rows))) - self._slots())
        needed = accumulate(len(item.episodes) for item in self.waiting[:together])
        count = min(len(free), sum(number <= len(rows) for number in needed))
        in_progress = any(it.finish is None for it in self.running.values())
        if not count or (count < len(self.waiting[:together]) and in_progress):
            return False
        items, self.waiting = self.waiting[:count], self.waiting[count:]
        prompts = [item.prompt for item in items]
        new = new_prompts(self.engine.decoding, slots, self.rows, (together, size), prompts)
        for i, (prompt, episodes, number, limit, choice) in enumerate(items):
            new.slots[i], new.numbers[i] = free[i], number
            new.keys[i] = self.key if choice.key is None else choice.key
            for place, episode in enumerate(episodes):
                it = Running(episode, choice, rows.pop(0), free[i], len(prompt), limit, list(prompt))
                it.constraint = choice.grammar and choice.grammar.begin()
                self.running[episode], new.rows[i, place] = it, it.row
                self._choose(new.settings, new.allowed, i, it)
            self.prefilled += len(prompt)
        self.state = self.engine.start[self.rows, together, size](self.params, self.state, new)
        return True

    def _level(self) -> tuple[int, int]:
        """Return (prompts, tokens) of the smallest program for the first and longest waiting prompt."""
        longest = len(self.waiting[0].prompt)
        return min((size[1:] for size in self.engine.start if size[2] >= longest), key=lambda size: size[1])

    def _slots(self) -> set[int]:
        return {it.slot for it in self.running.values()}

    def _choose(self, settings: RowChoices, allowed: np.ndarray, at: int, it: Running) -> None:
        """Write the settings of `it` to entry `at` of a program's arrays `settings` and `allowed`."""
        sampling = row_sampling(it.choice.sampling, self.engine.decoding.model.config.vocab)
        jax.tree.map(lambda array, x: array.__setitem__(at, x), settings.sampling, sampling)
        settings.limit[at], settings.stops[at] = it.limit, NO_TOKEN
        top = OF_ALLOWED if it.choice.among_allowed else OF_ALL
        settings.adapter[at], settings.top[at] = it.choice.adapter, top if it.choice.top else NO_TOP
        settings.stops[at, : len(it.choice.stop)] = it.choice.stop
        self._allow(allowed, at, it)

    def _allow(self, allowed: np.ndarray, at: int, it: Running) -> None:
        """Write the tokens that the grammar allows next in a row to entry `at` of `allowed`."""
        if it.constraint is not None:
            words = it.constraint.allowed()[: allowed.shape[1]]
            allowed[at], allowed[at, : len(words)] = 0, words

    def _decode(self, steps: int | None) -> None:
        """Decode at most `steps` steps (None: no such limit). Stop early when enough rows have ended to start
        waiting prompts or to use a program of fewer rows, or to look for given tokens.
        """
        live = [it for it in self.running.values() if it.finish is None]
        if not live:
            return
        longest, most = max(it.size for it in live), max(it.count for it in live)
        read, prompt = min(
            (read, prompt)
            for rows, read, prompt in self.engine.decode
            if rows == self.rows and read >= most and prompt >= longest
        )
        limit = min(read - most + 1, steps or read)
        stop = max((to for rows, to in self.engine.keep if rows == self.rows and to < rows), default=0)
        if self.waiting:
            needed = sum(len(item.episodes) for item in self.waiting[: self._level()[0]])
            stop = len(live) + self.rows - len(self.running) - needed
        if self.engine.decoding.extends:
            limit, stop = min(limit, STEPS_BETWEEN_LOOKS), len(live) - self.rows // 8
        allowed = all_allowed(self.engine.decoding, self.rows)
        if any(it.constraint for it in live):  # only the host knows which tokens may follow the next one
            limit = 1
            for it in live:
                self._allow(allowed, it.row, it)
        if any(it.choice.top for it in live):
            limit = min(limit, TOP_STEPS)
        used = np.zeros(self.rows, bool)
        used[[it.row for it in self.running.values() if it.finish != "error"]] = True
        until = np.array([limit, max(0, min(stop, len(live) - 1))], np.int32), allowed
        self.state = self.engine.decode[self.rows, read, prompt](self.params, self.state, used, until)

    def _collect(self) -> list[Running]:
        """Return the rows with new tokens. A row whose turn has ended is free, unless it may be extended."""
        s, changed = self.state, []
        live, counts, self.tokens, self.logps = jax.device_get((s.live, s.counts, s.tokens, s.logps))
        if any(it.choice.top for it in self.running.values()):
            self.top = jax.device_get((s.top_tokens, s.top_logps))
        for it in list(self.running.values()):
            count = int(counts[it.row])
            if it.finish or it.given or count <= it.count:
                continue
            it.seen, it.count = it.count, count
            new = self.tokens[it.row, it.seen : count].tolist()
            it.text.extend(new)
            if new[-1] == NONFINITE:
                it.finish, it.error = "error", NONFINITE_LOGITS
            elif not live[it.row]:
                it.finish = "stop" if new[-1] in it.choice.stop else "length"
            if it.constraint and it.finish != "error":
                it.error = it.constraint.accept([token for token in new if token not in it.choice.stop])
                it.finish = "error" if it.error else it.finish
            if it.finish and not self.engine.decoding.extends:
                self.drop(it.episode)
            changed.append(it)
        return changed

    def top_of(self, it: Running) -> list[tuple[tuple[int, float], ...]]:
        """Return, for each new token of a row, (token, log-prob) of the likeliest ones, () without `top`."""
        if not it.choice.top:
            return [()] * (it.count - it.seen)
        tokens, logps = self.top
        places = [(it.row, t % TOP_STEPS) for t in range(it.seen, it.count)]
        return [tuple(zip(tokens[at].tolist(), logps[at].tolist(), strict=True)) for at in places]

    def _fit(self) -> None:
        """Move to a state with more rows if a waiting prompt needs them, or with fewer if fewer suffice."""
        used, now = len(self.running), self.rows
        levels = [now, *(to for rows, to in self.engine.keep if rows == now)]
        if self.waiting:
            used = max(now, used + len(self.waiting[0].episodes))
            levels = [to for to in levels if to in {size[0] for size in self.engine.start}]
        rows = min((to for to in levels if to >= used), default=now)
        if rows == now:
            return
        slots = sorted(self._slots())
        kept, new_slots, flags = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool)
        prompts = np.zeros(min(self.engine.slots.prompts, rows), np.int32)
        prompts[: len(slots)] = slots
        for row, it in enumerate(self.running.values()):
            kept[row], new_slots[row], flags[row] = it.row, slots.index(it.slot), True
            it.row, it.slot = row, slots.index(it.slot)
        self.state = self.engine.keep[now, rows](self.state, kept, prompts, new_slots, flags)
        self.rows = rows


class SampledTokens(NamedTuple):
    """G completions of each of n prompts, of at most N tokens. After the end, tokens are -1 and logps 0."""

    tokens: Int[np.ndarray, "n G N"]
    logps: Float[np.ndarray, "n G N"]


def complete(
    session: Session,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
    is_enough: Callable[[list[int]], bool] | None = None,
    ended: Callable[[int], Any] | None = None,
) -> SampledTokens:
    """Sample the engine's Decoding.group completions of every prompt.

    Raises ValueError if a completion cannot match its grammar. If logits are not finite, the completion ends
    with the token NONFINITE.

    numbers: numbers of the prompts, for their random keys; by default their indices. is_enough: called with
    the tokens of each completion so far, every STEPS_BETWEEN_LOOKS steps; True ends the completion, for stop
    strings. ended: called with how many completions have ended since its last call.

    Four completions of each of two prompts, with a `model` and its `params`:

        decoding = Decoding(model, Sampling(max_new=16, temperature=1.0), stop=(2,), group=4)
        engine = compile_engine(decoding, params, slots_for(prompts=2, group=4, longest=3))
        tokens, logps = complete(Session(engine, params, jax.random.key(0)), [[1, 5, 7], [1]])
        tokens.shape  # (2, 4, 16)
    """
    d = session.engine.decoding
    group, new = d.group, d.sampling.max_new
    tokens = np.full((len(prompts) * group, new), -1, np.int32)
    logps = np.zeros(tokens.shape, np.float32)
    for i, prompt in enumerate(prompts):
        session.start(prompt, range(i * group, (i + 1) * group), i if numbers is None else numbers[i])
    while session.busy:
        count = 0
        for it in session.step(STEPS_BETWEEN_LOOKS if is_enough else None):
            turn = session.sampled(it)
            if it.error and turn.tokens[-1] >= 0:
                raise ValueError(it.error)
            if it.finish or (is_enough is not None and is_enough(turn.tokens.tolist())):
                tokens[it.episode, : len(turn.tokens)] = turn.tokens
                logps[it.episode, : len(turn.tokens)] = turn.logps
                session.drop(it.episode)
                count += 1
        if ended is not None:
            ended(count)
    shape = len(prompts), group, new
    return SampledTokens(tokens.reshape(shape), logps.reshape(shape))


def generate(session: Session, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Complete every prompt once: token ids, up to and including a stop token.

    Raises ValueError for an empty prompt, and where logits are not finite.

    >>> import jax.numpy as jnp
    >>> from jaxft.engine.programs import compile_engine
    >>> from jaxft.engine.state import Decoding, slots_for
    >>> from jaxft.models.families.llama import LlamaConfig, llama
    >>> from jaxft.nn.param_spec import init_params
    >>> sizes = {"vocab": 16, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 8}
    >>> model = llama(LlamaConfig(**sizes, max_positions=32), jnp.float32)
    >>> params = init_params(model.specs, jax.random.key(0))
    >>> decoding = Decoding(model, Sampling(max_new=4), stop=())
    >>> engine = compile_engine(decoding, params, slots_for(prompts=2, group=1, longest=3))
    >>> [len(completion) for completion in generate(Session(engine, params), [[1, 5, 7], [1]])]
    [4, 4]
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one token, for example the BOS token")
    tokens = complete(session, prompts).tokens[:, 0]
    where = nonfinite_logits(tokens)
    if where:
        raise ValueError(
            f"the logits of token {where[1] + 1} after prompt {where[0] + 1} are not finite; "
            "compute in float32, or check the weights"
        )
    return [row[row >= 0].tolist() for row in np.asarray(tokens)]
