"""Rows in progress on the host: which request has which row, and what each row does next."""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array

from jaxft.engine.programs import DecodeLimits, Engine, KeptRows, given_tokens, new_prompts
from jaxft.engine.sampling import NONFINITE, Sampling, row_sampling
from jaxft.engine.state import NO_TOKEN, AllowedTokens, RowSettings, all_allowed, key_data
from jaxft.nn.lora_rows import BASE
from jaxft.tree import Params

Finish = Literal["stop", "length", "error"]
STEPS_BETWEEN_LOOKS = 16  # decoding steps of rows of which some may end or go on before others
NONFINITE_LOGITS = "the logits are not finite; compute in float32 (--dtype float32), or check the weights"


class Constraint(Protocol):
    """Follows one completion through its grammar; see inference/constraint.py."""

    def allowed(self) -> np.ndarray:
        """Return a bit for each token, in words of 32, that is set if the token may come next."""

    def accept(self, tokens: Sequence[int]) -> str:
        """Follow tokens of the completion. Return an error, "" without one."""


class Grammar(Protocol):
    """What completions must match."""

    def begin(self) -> Constraint:
        """Return the constraint of a new completion."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a request chooses.

    sampling: max_new may be at most the engine's. stop: token ids. adapter: see nn/lora_rows.py. top: whether
    log-probs of the most likely tokens are needed. grammar: what the completion must match. Other settings
    than the engine's own need an engine that serves. key: data of the random key from which those of
    completions are derived; None for the session's.
    """

    sampling: Sampling
    stop: tuple[int, ...] = ()
    adapter: int = BASE
    top: bool = False
    grammar: Grammar | None = None
    key: np.ndarray | None = None


class Sampled(NamedTuple):
    """A turn that has ended: sampled token ids, with the stop token if one was sampled, and their log-probs.

    episode: the caller's number. finish: "error" for logits that are not finite, where the last token is
    NONFINITE, and for a grammar that failed.
    """

    episode: int
    tokens: np.ndarray
    logps: np.ndarray
    finish: Finish


@dataclass(eq=False)
class Running:
    """A completion in a row.

    size: tokens of its prompt. first: the number of the token whose random key is derived from 0. begun: where
    the present turn begins. seen, count: tokens before the last call of Session.step, and now. given: tokens
    to append. finish: None while it goes on. text: all tokens, with the prompt.
    """

    episode: int
    choice: Choice
    row: int
    slot: int
    size: int
    limit: int
    constraint: Constraint | None
    text: list[int]
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
    choice: Choice


class Session:
    """Completes prompts with the rows of an engine, and goes on with rows after given tokens.

    The random key of completion i of a prompt is derived from `key`, the prompt's number and i, that of its
    token t from this key and t. So its tokens do not depend on other prompts, nor on the sizes of the engine,
    but for rounding: kernels of other shapes may add in another order, which can swap a token for one that is
    about as likely.

    keeps: whether a row stays after the end of a turn, until it is extended or dropped. choice: of requests
    that don't choose, by default the engine's sampling and stop tokens.

    >>> session = Session(engine, params, jax.random.key(0))          # doctest: +SKIP
    >>> session.start([1, 2, 3], episodes=[0, 1], number=0)           # doctest: +SKIP
    >>> [turn.episode for turn in session.wait()]                     # doctest: +SKIP
    [1]
    """

    def __init__(
        self,
        engine: Engine,
        params: Params,
        key: Array | None = None,
        keeps: bool = False,
        choice: Choice | None = None,
    ):
        d, rows = engine.decoding, engine.slots.rows
        self.engine, self.params, self.keeps = engine, params, keeps
        self.key = key_data(jax.random.key(0) if key is None else key)
        self.choice = choice or Choice(d.sampling, d.stop)
        self.state: Any = engine.empty()
        self.waiting: list[_Waiting] = []  # the longest first, so that similar lengths are prefilled together
        self.owners: list[Running | None] = [None] * rows
        self.running: dict[int, Running] = {}
        self.prefilled = 0  # tokens of prompts and given tokens, without padding
        self._changed_rows()
        self._read()

    def start(
        self,
        prompt: Sequence[int],
        episodes: Sequence[int],
        number: int = 0,
        max_new: int | None = None,
        choice: Choice | None = None,
    ) -> None:
        """Queue a prompt with a completion for each episode, of at most max_new tokens. By default the session
        chooses.
        """
        choice = choice or self.choice
        item = _Waiting(prompt, episodes, number, max_new or choice.sampling.max_new, choice)
        insort(self.waiting, item, key=lambda item: -len(item.prompt))

    def extend(
        self, episode: int, tokens: Sequence[int], max_new: int, choice: Choice | None = None
    ) -> None:
        """Append given tokens to an episode whose turn has ended, and sample up to max_new more.

        choice: new settings. With a key, which is then that of the row, the next token's is derived from it as
        that of a first token. Raises ValueError if the row has no slots for the tokens and one more.
        """
        it, space = self.running[episode], self.space(episode)
        if it.finish not in ("stop", "length"):
            raise ValueError(f"episode {episode} has no turn that has ended")
        if len(tokens) >= space:
            raise ValueError(
                f"episode {episode} has {it.count} of at most {it.count + space} tokens, so {len(tokens)} "
                "given ones do not fit; end it, or compile the engine with a larger max_new"
            )
        it.given, it.begun, it.count = [it.text[-1], *tokens], it.count + len(tokens), it.count - 1
        it.limit, it.finish = min(it.begun + max_new, it.begun - len(tokens) + space), None
        it.text.extend(tokens)
        it.choice = choice or it.choice
        it.constraint = it.choice.grammar.begin() if it.choice.grammar else None
        if choice is not None and choice.key is not None:
            it.first = it.begun

    def space(self, episode: int) -> int:
        """Return how many more tokens the row of an episode has slots for."""
        return self.engine.decoding.sampling.max_new - self.running[episode].count

    def drop(self, episode: int) -> None:
        """Give up an episode, in a row or waiting; the row is free."""
        it = self.running.pop(episode, None)
        if it is not None:
            self.owners[it.row] = None
            return
        without = (
            item._replace(episodes=[x for x in item.episodes if x != episode]) for item in self.waiting
        )
        self.waiting = [item for item in without if item.episodes]

    @property
    def busy(self) -> bool:
        """Whether a row is in progress, or there are rows for a prompt that waits."""
        if any(it.finish is None for it in self.running.values()):
            return True
        slots, needed = self.engine.slots, len(self.waiting[0].episodes) if self.waiting else 0
        has_rows = len(self.running) + needed <= slots.rows and len(self._slots()) < slots.prompts
        return needed > 0 and has_rows

    def wait(self) -> list[Sampled]:
        """Decode until at least one turn has ended; return all that have, [] when no row is in progress."""
        while self.busy:
            ended = [it for it in self.step() if it.finish]
            if ended:
                return list(map(self.sampled, ended))
        return []

    def sampled(self, it: Running) -> Sampled:
        """Return a turn, as step has returned it."""
        turn = it.row, slice(it.begun, it.count)
        return Sampled(it.episode, self.tokens[turn].copy(), self.logps[turn].copy(), it.finish or "length")

    def step(self, steps: int | None = None) -> list[Running]:
        """Run one program: extend rows, start prompts, or decode up to `steps` steps. Return the rows that
        have new tokens; `tokens` and `logps` are those of all rows.
        """
        self._fit()
        if not (self._extend() or self._start()):
            self._decode(steps)
        return self._collect()

    def _extend(self) -> bool:
        """Append given tokens to rows, as many as one program takes."""
        pending = [it for it in self.running.values() if it.given]
        if not pending:
            return False
        engine, rows = self.engine, len(self.owners)
        sizes = [size for size in engine.extend if size[0] == rows]
        longest = max(len(it.given) for it in pending)
        fits = [size for size in sizes if size[2] >= longest] or [max(sizes, key=lambda size: size[2])]
        several = [size for size in fits if size[1] > 1] if len(pending) > 1 else []
        _, together, size = several[0] if several else fits[0]
        new = given_tokens(engine.decoding, rows, together, size)
        for i, it in enumerate(pending[:together]):
            chunk, it.given = it.given[:size], it.given[size:]
            new.ids[i, : len(chunk)] = chunk
            new.lengths[i], new.counts[i], new.rows[i] = len(chunk), it.count, it.row
            new.more[i], new.firsts[i] = bool(it.given), it.first
            if it.first == it.begun:
                new.renewed[i], new.keys[i] = True, it.choice.key
            it.count += len(chunk)
            self.prefilled += len(chunk)
            self._choose(new.settings, new.allowed, i, it)
        self.state = engine.extend[rows, together, size](self.params, self.state, new)
        return True

    def _level(self) -> tuple[int, int]:
        """Return the (prompts, tokens) of the smallest program for the first waiting prompt, the longest."""
        longest = len(self.waiting[0].prompt)
        return min((size[1:] for size in self.engine.start if size[2] >= longest), key=lambda size: size[1])

    def _fitting(self, wanted: int) -> tuple[int, list[int], list[int]]:
        """Return how many of the first `wanted` waiting prompts have rows and slots, with free ones of both."""
        rows = [row for row, it in enumerate(self.owners) if it is None]
        slots = self._slots()
        free_slots = [slot for slot in range(self._prompts(len(self.owners))) if slot not in slots]
        count = needed = 0
        for item in self.waiting[:wanted]:
            needed += len(item.episodes)
            if needed > len(rows) or count == len(free_slots):
                break
            count += 1
        return count, rows, free_slots

    def _slots(self) -> set[int]:
        return {it.slot for it in self.running.values()}

    def _prompts(self, rows: int) -> int:
        return min(self.engine.slots.prompts, rows)

    def _start(self) -> bool:
        """Start waiting prompts, as many as one program takes, when there are rows for so many."""
        if not self.waiting:
            return False
        d, rows = self.engine.decoding, len(self.owners)
        together, size = self._level()
        wanted = min(together, len(self.waiting))
        count, free_rows, free_slots = self._fitting(wanted)
        in_progress = any(it.finish is None for it in self.running.values())
        if not count or (count < wanted and in_progress):
            return False
        chosen, self.waiting = self.waiting[:count], self.waiting[count:]
        prompts = [item.prompt for item in chosen]
        new = new_prompts(d, self.engine.slots, rows, (together, size), prompts)
        for i, (item, slot) in enumerate(zip(chosen, free_slots, strict=False)):
            new.slots[i], new.numbers[i] = slot, item.number
            new.keys[i] = self.key if item.choice.key is None else item.choice.key
            for place, episode in enumerate(item.episodes):
                row, grammar = free_rows.pop(0), item.choice.grammar
                it = self.owners[row] = self.running[episode] = Running(
                    episode, item.choice, row, slot, len(item.prompt), item.limit,
                    grammar.begin() if grammar else None, list(item.prompt),
                )  # fmt: skip
                new.rows[i, place] = row
                self._choose(new.settings, new.allowed, i, it)
            self.prefilled += len(item.prompt)
        self.state = self.engine.start[rows, together, size](self.params, self.state, new)
        return True

    def _choose(self, settings: RowSettings, allowed: AllowedTokens, at: int, it: Running) -> None:
        """Set what the request of a row chooses."""
        choice, vocab = it.choice, self.engine.decoding.model.config.vocab
        jax.tree.map(
            lambda array, x: array.__setitem__(at, x), settings.sampling, row_sampling(choice.sampling, vocab)
        )
        settings.limit[at], settings.adapter[at], settings.top[at] = it.limit, choice.adapter, choice.top
        settings.stops[at] = NO_TOKEN
        settings.stops[at, : len(choice.stop)] = choice.stop
        self._allow(allowed, at, it)

    def _allow(self, allowed: AllowedTokens, at: int, it: Running) -> None:
        """Set the tokens that may come next in a row."""
        if it.constraint is not None:
            words = it.constraint.allowed()[: allowed.words.shape[1]]
            allowed.rows[at], allowed.words[at, : len(words)] = True, words

    def _decode(self, steps: int | None) -> None:
        """Decode until rows can be given to waiting prompts, dropped or extended."""
        d, rows = self.engine.decoding, len(self.owners)
        live = [it for it in self.running.values() if it.finish is None]
        if not live:
            return
        longest, most = max(it.size for it in live), max(it.count for it in live)
        read, prompt = min(
            (read, prompt)
            for size, read, prompt in self.engine.decode
            if size == rows and read >= most and prompt >= longest
        )
        limit = min(read - most + 1, steps or read)
        smaller = max((to for size, to in self.engine.keep if size == rows and to < rows), default=0)
        stop = min(smaller, len(live) - 1)
        if self.waiting:
            wanted = sum(len(item.episodes) for item in self.waiting[: self._level()[0]])
            stop = len(live) - max(1, wanted - (rows - len(self.running)))
        if self.keeps:
            limit, stop = min(limit, STEPS_BETWEEN_LOOKS), len(live) - max(1, rows // 8)
        allowed = self._nothing
        if any(it.constraint for it in live):  # only the host knows which tokens may follow the next one
            limit, allowed = 1, all_allowed(d, rows)
            for it in live:
                self._allow(allowed, it.row, it)
        if any(it.choice.top for it in live):
            limit = min(limit, d.block)
        used = np.array([it is not None and it.finish != "error" for it in self.owners])
        limits = DecodeLimits(np.int32(limit), np.int32(max(stop, 0)))
        self.state = self.engine.decode[rows, read, prompt](
            self.params, self.state, used, (limits, allowed)
        )

    def _read(self) -> None:
        """Fetch what was sampled."""
        s = self.state
        self.live, self.counts, self.tokens, self.logps = jax.device_get((s.live, s.counts, s.tokens, s.logps))

    def _collect(self) -> list[Running]:
        """Return the rows that have new tokens. Rows that ended are free, unless the session keeps them."""
        self._read()
        found = []
        for it in list(self.running.values()):
            count = int(self.counts[it.row])
            if it.finish or it.given or count <= it.count:
                continue
            it.seen, it.count = it.count, count
            new = self.tokens[it.row, it.seen : count].tolist()
            it.text.extend(new)
            if new[-1] == NONFINITE:
                it.finish, it.error = "error", NONFINITE_LOGITS
            elif not self.live[it.row]:
                it.finish = "stop" if new[-1] in it.choice.stop else "length"
            if it.constraint is not None and it.finish != "error":
                it.error = it.constraint.accept([token for token in new if token not in it.choice.stop])
                it.finish = "error" if it.error else it.finish
            if it.finish and not self.keeps:
                self.drop(it.episode)
            found.append(it)
        return found

    def top_of(self, it: Running) -> list[tuple[tuple[int, float], ...]]:
        """Return the most likely tokens with their log-probs, for each new token of a row."""
        if not it.choice.top:
            return [()] * (it.count - it.seen)
        block = self.engine.decoding.block
        tokens, logps = jax.device_get((self.state.top_tokens, self.state.top_logps))
        return [
            tuple(zip(tokens[it.row, t % block].tolist(), logps[it.row, t % block].tolist(), strict=True))
            for t in range(it.seen, it.count)
        ]

    def _fit(self) -> None:
        """Continue with more rows if prompts need them, or with fewer if these are enough."""
        used, now = len(self.running), len(self.owners)
        levels = sorted({now, *(to for size, to in self.engine.keep if size == now)})
        if self.waiting:
            used += len(self.waiting[0].episodes)
            starts = {size[0] for size in self.engine.start}
            self._resize(min((to for to in levels if to in starts and to >= max(used, now)), default=now))
        else:
            self._resize(min(to for to in levels if to >= used))

    def _resize(self, rows: int) -> None:
        """Continue with a state of `rows` rows, which has all that are in use."""
        now = len(self.owners)
        if rows == now:
            return
        owned = [it for it in self.owners if it is not None]
        prompts, slots = self._prompts(rows), sorted(self._slots())
        kept = KeptRows(
            np.zeros(rows, np.int32), np.zeros(prompts, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool)
        )
        kept.prompts[: len(slots)] = slots
        self.owners = [None] * rows
        for row, it in enumerate(owned):
            kept.rows[row], kept.slots[row], kept.used[row] = it.row, slots.index(it.slot), True
            it.row, it.slot, self.owners[row] = row, slots.index(it.slot), it
        self.state = self.engine.keep[now, rows](self.state, kept)
        self._changed_rows()

    def _changed_rows(self) -> None:
        nothing = all_allowed(self.engine.decoding, len(self.owners))
        self._nothing = jax.device_put(nothing, self.state.live.sharding)
