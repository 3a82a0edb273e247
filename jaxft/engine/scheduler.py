"""The scheduler of a server: a thread that owns the device, starts waiting requests in free rows and decodes
in blocks of steps.

Requests wait in a bounded queue. The thread delivers tokens as they are sampled, by calling the function of
their request, which must return at once. With ServeSizes.continues, the row of a finished request is reserved
until another request needs it: if a prompt begins with all tokens of the row, as the next message of a
conversation does, only the rest of the prompt is prefilled.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.annotations import PositiveInt, check_bounds
from jaxft.distributed.exit import shorten_error
from jaxft.engine.programs import Engine, compile_engine
from jaxft.engine.sampling import BUCKET, NONFINITE, Sampling
from jaxft.engine.session import RequestSettings, Running, Session
from jaxft.engine.state import Decoding, Slots, key_data
from jaxft.models.model import Model
from jaxft.nn.attention.kv_cache import CacheFormat
from jaxft.nn.tree import Params

End = Literal["stop", "length", "cancelled", "error"]
STOPPING = "the server is stopping"


@dataclass(frozen=True)
class ServeSizes:
    """The static arguments of a server's programs.

    rows: completions in progress. prompt, new: the most tokens of a prompt and of a completion. stops: the
    most stop tokens of a request. block: decoding steps between two looks at new requests. continues: whether
    the row of a finished request can be continued by the next; each row then has slots for prompt + new
    tokens.
    """

    rows: PositiveInt = 8
    prompt: PositiveInt = 1024
    new: PositiveInt = 512
    stops: PositiveInt = 8
    block: PositiveInt = 4
    continues: bool = False

    def __post_init__(self):
        check_bounds(self)


def compile_server(
    model: Model, sizes: ServeSizes, params: Params, mesh: Mesh | None = None, cache: CacheFormat = "compute"
) -> Engine:
    """Compile the server's programs. model: takes the adapter of each row under "rows" in its parameters, as
    models.adapted.adapted_by_row returns it. mesh: a mesh of one device, or None.
    """
    d = Decoding(
        model, Sampling(sizes.new + sizes.prompt * sizes.continues), (), 1, cache, sizes.stops,
        extends=sizes.continues, constrained=True, serving=True,
    )  # fmt: skip
    slots = Slots(sizes.rows, sizes.rows, -(-sizes.prompt // BUCKET) * BUCKET, 1)
    return compile_engine(d, params, slots, mesh)


@dataclass(frozen=True)
class TokenRequest:
    """A prompt as token ids, and the settings of its completion.

    seed, number: the random key is that of prompt `number` (from 0) of scripts/generate.py with this --seed.
    """

    prompt: tuple[int, ...]
    choice: RequestSettings
    seed: int = 0
    number: int = 0


class SampledToken(NamedTuple):
    """A token, its log-prob at temperature 1, and, if requested, the likeliest tokens with log-probs."""

    token: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


class NewTokens(NamedTuple):
    """New tokens of a request. finish: why it ended; None while it is in progress. error: what failed, or "".

    If finish is "stop", the last token is the stop token.
    """

    tokens: tuple[SampledToken, ...] = ()
    finish: End | None = None
    error: str = ""


Deliver = Callable[[NewTokens], None]


class QueueFull(RuntimeError):
    """The queue has no room for a request."""


class Stopped(RuntimeError):
    """The scheduler takes no more requests."""


@dataclass(eq=False)
class Ticket:
    """A submitted request, which any thread may cancel by setting `cancelled`; its row is free after the
    current block of steps.
    """

    request: TokenRequest
    deliver: Deliver
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give up the request: no more tokens of it are needed."""
        self.cancelled.set()

    def send(self, progress: NewTokens) -> None:
        """Call the request's `deliver`; if it raises, cancel this request."""
        try:
            self.deliver(progress)
        except Exception:
            self.cancel()


class Load(NamedTuple):
    """Counts of a scheduler. running, waiting: requests in rows and in the queue now. Since the start:
    finished: requests that ended in a row; tokens: sampled tokens; failures: failures of the device.
    """

    running: int
    waiting: int
    finished: int
    tokens: int
    failures: int


class Scheduler:
    """Completes requests with compiled programs, in a separate thread between `start` and `close`.

    queue: the most waiting requests. log: called with a line when the device fails. refusal: why no more
    requests are accepted; "" while they are. rows: the requests in rows, by their episode numbers in the
    session. idle: rows that have ended and may be continued, by the same numbers, the oldest first.
    """

    def __init__(
        self,
        engine: Engine,
        sizes: ServeSizes,
        params: Params,
        queue: int = 64,
        log: Callable[[str], None] = print,
    ):
        self.engine, self.sizes, self.params, self.queue, self.log = engine, sizes, params, queue, log
        self.rows: dict[int, Ticket] = {}
        self.idle: dict[int, Running] = {}
        self.waiting: deque[Ticket] = deque()
        self.changed = threading.Condition()
        self.closing, self.refusal = False, ""
        self.finished = self.tokens = self.failures = 0
        self.numbers = itertools.count()
        self.session: Any = Session(engine, params)
        self.thread = threading.Thread(target=self._run, name="jaxft-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def submit(self, requests: Sequence[tuple[TokenRequest, Deliver]]) -> list[Ticket]:
        """Queue requests, all or none.

        Raises ValueError for a prompt that is empty or too long, for too large a max_new, for too many stop
        tokens, and for more requests than rows and queue can ever take. Raises QueueFull if they do not fit
        into the queue now, and Stopped after `close`.
        """
        rows = self.sizes.rows
        if len(requests) > self.queue + rows:
            raise ValueError(
                f"{len(requests)} completions at once are more than the {rows} rows and {self.queue} waiting "
                "requests of this server; send fewer, or start the server with a larger --queue"
            )
        for request, _ in requests:
            self._check(request)
        tickets = [Ticket(request, deliver) for request, deliver in requests]
        self._drop_cancelled()
        with self.changed:
            if self.refusal:
                raise Stopped(self.refusal)
            if len(self.waiting) + len(tickets) > self.queue + rows - len(self.rows):
                raise QueueFull(
                    f"the server is busy: its queue of {self.queue} requests is full; try again later"
                )
            self.waiting.extend(tickets)
            self.changed.notify()
        return tickets

    def load(self) -> Load:
        """Return the scheduler's counts of current and past requests."""
        with self.changed:
            return Load(len(self.rows), len(self.waiting), self.finished, self.tokens, self.failures)

    def close(self, grace: float = 0.0) -> None:
        """Accept no more requests, continue present ones for up to `grace` seconds, and cancel the rest."""
        with self.changed:
            self.refusal = self.refusal or STOPPING
            self.changed.wait_for(lambda: self.is_idle() or self.closing, grace)
            self.closing = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()
        self._end_all(NewTokens(finish="cancelled", error="the server has stopped"))

    def is_idle(self) -> bool:
        """Whether no request is in a row or waiting."""
        return not self.waiting and not self.rows

    def _check(self, request: TokenRequest) -> None:
        sizes, choice = self.sizes, request.choice
        if not request.prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if len(request.prompt) > sizes.prompt:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, more than the {sizes.prompt} of this server; "
                "shorten it, or start the server with a larger --max-prompt"
            )
        if choice.sampling.max_new > sizes.new:
            raise ValueError(
                f"max_tokens={choice.sampling.max_new} is more than the {sizes.new} of this server; lower "
                "it, or start the server with a larger --max-new"
            )
        if len(choice.stop) > sizes.stops:
            raise ValueError(
                f"{len(choice.stop)} stop tokens are more than the {sizes.stops} of this server; send fewer"
            )

    def _run(self) -> None:
        left = NewTokens(finish="error", error="the scheduler has ended")
        try:
            while self._wait_for_requests():
                try:
                    self._fill_rows()
                    for it in self.session.step(self.sizes.block):
                        self._progress(it)
                except Exception as error:  # of the device: its requests fail, later ones may succeed
                    left = NewTokens(finish="error", error=f"the device failed: {shorten_error(error)}")
                    if not self._begin_again(left):
                        return
            left = NewTokens(finish="cancelled", error="the server has stopped")
        finally:
            self._end_all(left)  # also after a bug: nobody waits for a thread that has ended

    def _wait_for_requests(self) -> bool:
        """Wait for a request or for `close`; return False for `close`."""
        with self.changed:
            self.changed.notify_all()  # close waits for idleness
            self.changed.wait_for(lambda: self.closing or not self.is_idle())
            return not self.closing

    def _begin_again(self, failed: NewTokens) -> bool:
        """Deliver a failure to all requests in rows, and start an empty session; False if that fails, too."""
        self.log(f"{failed.error} (with {len(self.rows)} requests)")
        self.failures += 1
        for number in list(self.rows):
            self._end(number, failed)
        self.idle.clear()
        self.session = None  # its memory is free before the next one is allocated
        try:
            self.session = Session(self.engine, self.params)
        except Exception:
            with self.changed:
                self.refusal = "the device failed and does not recover; restart the command"
            self.log(self.refusal)
            return False
        return True

    def _fill_rows(self) -> None:
        """Free the rows of cancelled requests, and start waiting ones."""
        for number, ticket in list(self.rows.items()):
            if ticket.cancelled.is_set():
                self.session.drop(number)
                self._end(number, NewTokens(finish="cancelled"))
        self._drop_cancelled()
        while len(self.rows) < self.sizes.rows:
            with self.changed:
                if not self.waiting or self.closing:
                    return
                ticket = self.waiting.popleft()
                before = self._continued(ticket.request)
                number = next(self.numbers) if before is None else before.episode
                self.rows[number] = ticket
            self._start(number, ticket.request, before)

    def _continued(self, request: TokenRequest) -> Running | None:
        """Return an idle row of the same adapter whose tokens are the beginning of the prompt, with slots for
        the rest of the prompt and a completion; None if there is none.
        """
        for it in self.idle.values():
            size, choice = len(it.text), request.choice
            needed = len(request.prompt) - size + choice.sampling.max_new
            fits = it.choice.adapter == choice.adapter and needed <= self.session.space(it.episode)
            if fits and size < len(request.prompt) and tuple(it.text) == request.prompt[:size]:
                return it
        return None

    def _start(self, number: int, request: TokenRequest, before: Running | None) -> None:
        """Continue the idle row `before` or, if it is None, start a new one. number: its episode number."""
        key = jax.random.key(np.uint32(request.seed & 0xFFFFFFFF))
        new = request.choice.sampling.max_new
        if before is not None:
            del self.idle[number]
            key = jax.random.fold_in(jax.random.fold_in(key, request.number), 0)
            given = request.prompt[len(before.text) :]
            return self.session.extend(number, given, new, replace(request.choice, key=key_data(key)))
        if len(self.rows) + len(self.idle) > self.sizes.rows:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            self.session.drop(oldest)
        choice = replace(request.choice, key=key_data(key))
        return self.session.start(request.prompt, [number], request.number, choice=choice)

    def _progress(self, it: Running) -> None:
        """Deliver the new tokens of a row."""
        new = slice(it.seen, it.count)
        arrays = self.session.tokens[it.row, new].tolist(), self.session.logps[it.row, new].tolist()
        tokens = tuple(map(SampledToken, *arrays, self.session.top_of(it)))
        tokens = tokens[: len(tokens) - (tokens[-1].token == NONFINITE)]
        self.tokens += len(tokens)
        progress = NewTokens(tokens, it.finish, it.error)
        if it.finish is None:
            self.rows[it.episode].send(progress)
        elif self.sizes.continues and it.finish != "error":
            self.idle[it.episode] = it
            self._end(it.episode, progress)
        else:
            self.session.drop(it.episode)
            self._end(it.episode, progress)

    def _drop_cancelled(self) -> None:
        """Remove cancelled requests from the queue, so that they take up no space in it."""
        with self.changed:
            dropped = [ticket for ticket in self.waiting if ticket.cancelled.is_set()]
            self.waiting = deque(ticket for ticket in self.waiting if ticket not in dropped)
        for ticket in dropped:
            ticket.send(NewTokens(finish="cancelled"))

    def _end_all(self, progress: NewTokens) -> None:
        """After the thread's loop: accept no more requests, and end the present ones with `progress`."""
        with self.changed:
            self.closing, self.refusal = True, self.refusal or STOPPING
            tickets = [*self.waiting, *self.rows.values()]
            self.waiting, self.rows = deque(), {}
            self.changed.notify_all()
        for ticket in tickets:
            ticket.send(progress)

    def _end(self, number: int, progress: NewTokens) -> None:
        """Deliver the last progress of the request in a row, given by its episode number."""
        with self.changed:
            ticket = self.rows.pop(number)
            self.finished += 1
        ticket.send(progress)
