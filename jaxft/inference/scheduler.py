"""The thread that owns the device: it fills free rows with waiting prompts and decodes in blocks of steps.

Requests wait in a bounded queue. Tokens are delivered to each request as they are sampled, by a function that
the scheduler's thread calls; it must return at once.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxft.inference.constraint import Constraint, Grammar
from jaxft.inference.sampling import NONFINITE, Sampling, row_sampling
from jaxft.inference.serve_programs import (
    NO_TOKEN,
    AllowedTokens,
    SampledRows,
    ServedRows,
    ServePrograms,
    all_allowed,
    new_row,
)
from jaxft.nn.lora_rows import BASE
from jaxft.tree import Params

Finish = Literal["stop", "length", "cancelled", "error"]
STOPPING = "the server is stopping"
NONFINITE_LOGITS = "the logits are not finite; compute in float32 (--dtype float32), or check the weights"


@dataclass(frozen=True)
class TokenRequest:
    """A prompt to complete.

    prompt: token ids. sampling: max_new may be at most that of the programs. seed, number: the random key is
    that of prompt `number` of generate.py with this seed. stop: token ids. adapter: see nn/lora_rows.py. top:
    whether log-probs of the most likely tokens are needed. grammar: what the completion must match.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    number: int = 0
    stop: tuple[int, ...] = ()
    adapter: int = BASE
    top: bool = False
    grammar: Grammar | None = None


class SampledToken(NamedTuple):
    """A token, its log-prob at temperature 1, and the most likely tokens with theirs, if needed."""

    token: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


class NewTokens(NamedTuple):
    """New tokens of a request, and why it ended, None while it goes on. error: what failed.

    If it ended with "stop", the last token is the stop token.
    """

    tokens: tuple[SampledToken, ...] = ()
    finish: Finish | None = None
    error: str = ""


Deliver = Callable[[NewTokens], None]


class QueueFull(RuntimeError):
    """The queue has no place for a request."""


class Stopped(RuntimeError):
    """The scheduler takes no more requests."""


@dataclass(eq=False)
class Ticket:
    """A request on its way. constraint: which of its tokens may come next, None for any. `cancelled` may be
    set by any thread; its row is then free after the block.
    """

    request: TokenRequest
    deliver: Deliver
    constraint: Constraint | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give up the request: no more tokens of it are needed."""
        self.cancelled.set()


class Load(NamedTuple):
    """Requests in rows and waiting, and the numbers since the start: finished requests, tokens, failures."""

    running: int
    waiting: int
    finished: int
    tokens: int
    failures: int


class Scheduler:
    """Completes requests with compiled programs, in a thread of its own between `start` and `close`.

    queue: the most waiting requests. log: called with a line when the device fails. refusal: why no more
    requests are taken, "" while they are.
    """

    def __init__(
        self, programs: ServePrograms, params: Params, queue: int = 64, log: Callable[[str], None] = print
    ):
        self.programs, self.params, self.queue, self.log = programs, params, queue, log
        sizes = programs.serving.sizes
        self.rows: list[Ticket | None] = [None] * sizes.rows
        self.counts = np.zeros(sizes.rows, np.int64)
        self.waiting: deque[Ticket] = deque()
        self.changed = threading.Condition()
        self.closing, self.refusal = False, ""
        self.finished = self.tokens = self.failures = 0
        self.state: ServedRows | None = programs.empty()
        self.thread = threading.Thread(target=self._run, name="jaxft-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def submit(self, requests: Sequence[tuple[TokenRequest, Deliver]]) -> list[Ticket]:
        """Queue requests, all or none.

        Raises ValueError for a prompt that is empty or too long, for too many tokens and for more requests
        than the server ever has place for, QueueFull if they do not fit into the queue now, and Stopped after
        `close`.
        """
        if len(requests) > self.queue + len(self.rows):
            raise ValueError(
                f"{len(requests)} completions at once are more than the {len(self.rows)} rows and "
                f"{self.queue} waiting places of this server; send fewer, or start the server with a larger "
                "--queue"
            )
        for request, _ in requests:
            self._check(request)
        tickets = [
            Ticket(request, deliver, request.grammar.begin() if request.grammar else None)
            for request, deliver in requests
        ]
        self._drop_cancelled()
        with self.changed:
            if self.refusal:
                raise Stopped(self.refusal)
            free = sum(ticket is None for ticket in self.rows)
            if len(self.waiting) + len(tickets) > self.queue + free:
                raise QueueFull(
                    f"the server is busy: its queue of {self.queue} places is full; try again later"
                )
            self.waiting.extend(tickets)
            self.changed.notify()
        return tickets

    def load(self) -> Load:
        """Return what the scheduler does now and has done."""
        with self.changed:
            running = sum(ticket is not None for ticket in self.rows)
            return Load(running, len(self.waiting), self.finished, self.tokens, self.failures)

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, finish the present ones for up to `grace` seconds, cancel the others."""
        with self.changed:
            self.refusal = self.refusal or STOPPING
            self.changed.wait_for(lambda: self.thread_is_idle() or self.closing, grace)
            self.closing = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()
        self._end_all(NewTokens(finish="cancelled", error="the server has stopped"))

    def thread_is_idle(self) -> bool:
        """Whether no request is in a row or waiting."""
        return not self.waiting and not any(self.rows)

    def _check(self, request: TokenRequest) -> None:
        sizes = self.programs.serving.sizes
        if not request.prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if len(request.prompt) > sizes.prompt:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens, more than the {sizes.prompt} of this server; "
                "shorten it, or start the server with a larger --max-prompt"
            )
        if request.sampling.max_new > sizes.new:
            raise ValueError(
                f"max_tokens={request.sampling.max_new} is more than the {sizes.new} of this server; lower "
                "it, or start the server with a larger --max-new"
            )
        if len(request.stop) > sizes.stops:
            raise ValueError(f"{len(request.stop)} stop tokens are more than {sizes.stops}")

    def _run(self) -> None:
        left = NewTokens(finish="error", error="the scheduler has ended")
        try:
            while self._wait_for_requests():
                try:
                    self._start_waiting()
                    self._decode()
                except Exception as error:  # of the device: its requests fail, later ones may succeed
                    text = " ".join(str(error).split())[:300] or type(error).__name__
                    left = NewTokens(finish="error", error=f"the device failed: {text}")
                    if not self._begin_again(left):
                        return
            left = NewTokens(finish="cancelled", error="the server has stopped")
        finally:
            self._end_all(left)  # also after a bug: nobody waits for a thread that has ended

    def _wait_for_requests(self) -> bool:
        """Wait for something to do; return whether the thread goes on."""
        with self.changed:
            self.changed.notify_all()  # close waits for idleness
            self.changed.wait_for(lambda: self.closing or not self.thread_is_idle())
            return not self.closing

    def _begin_again(self, failed: NewTokens) -> bool:
        """Deliver a failure to all requests in rows, and begin with an empty state, if the device has one."""
        self.log(f"{failed.error} (with {sum(map(bool, self.rows))} requests)")
        self.failures += 1
        for row, ticket in enumerate(self.rows):
            if ticket is not None:
                self._end(row, failed)
        self.state = None  # its memory is free before the next one is allocated
        try:
            self.state = self.programs.empty()
        except Exception:
            with self.changed:
                self.refusal = "the device failed and does not recover; restart the command"
            self.log(self.refusal)
            return False
        return True

    def _start_waiting(self) -> None:
        """Start waiting prompts in free rows, the lowest first."""
        for row in range(len(self.rows)):
            if self.rows[row] is not None:
                continue
            self._drop_cancelled()
            with self.changed:
                if not self.waiting or self.closing:
                    return
                ticket = self.rows[row] = self.waiting.popleft()
            self._start(row, ticket)

    def _start(self, row: int, ticket: Ticket) -> None:
        """Prefill a prompt, and deliver the first token of its completion."""
        request, programs = ticket.request, self.programs
        size = next(size for size in sorted(programs.start) if size >= len(request.prompt))
        new = new_row(programs.serving, list(request.prompt), size)
        settings = new.settings
        new.row[0], new.seed[0], new.number[0] = row, request.seed & 0xFFFFFFFF, request.number
        sampling = row_sampling(request.sampling, programs.serving.model.config.vocab)
        for array, value in zip(
            (settings.sampling.heat, settings.sampling.top_k, settings.sampling.top_p), sampling, strict=True
        ):
            array[0] = value
        settings.limit[0], settings.adapter[0] = request.sampling.max_new, request.adapter
        settings.top[0], settings.stops[0, : len(request.stop)] = request.top, request.stop
        if ticket.constraint is not None:
            _set_allowed(new.allowed, 0, ticket.constraint)
        self.state, found = programs.start[size](self.params, self.state, new)
        self.counts[row] = 0
        self._collect(row, jax.tree.map(lambda x: np.asarray(x)[0][None], found))

    def _decode(self) -> None:
        """Decode a block of the smallest number of rows that has all requests, and deliver its tokens."""
        for row, ticket in enumerate(self.rows):
            if ticket is not None and ticket.cancelled.is_set():
                self._end(row, NewTokens(finish="cancelled"))
        live = np.asarray([ticket is not None for ticket in self.rows])
        if not live.any():
            return
        last = int(np.flatnonzero(live)[-1])
        rows = min(rows for rows in self.programs.decode if rows > last)
        self.state, found = self.programs.decode[rows](self.params, self.state, live, self._allowed())
        found = jax.device_get(found)
        for row in map(int, np.flatnonzero(live)):
            self._collect(row, jax.tree.map(lambda x, row=row: x[row], found))

    def _allowed(self) -> AllowedTokens:
        """Return the tokens that rows may have next."""
        constraints = {
            row: ticket.constraint for row, ticket in enumerate(self.rows) if ticket and ticket.constraint
        }
        if not constraints:
            return self.programs.all_allowed
        allowed = all_allowed(self.programs.serving, len(self.rows))
        for row, constraint in constraints.items():
            _set_allowed(allowed, row, constraint)
        return allowed

    def _collect(self, row: int, found: SampledRows) -> None:
        """Deliver the tokens of a row. found: arrays [N, ...]."""
        ticket = self.rows[row]
        assert ticket is not None
        request, tokens = ticket.request, list[SampledToken]()
        for i, token in enumerate(found.tokens.tolist()):
            if token == NO_TOKEN:
                break
            if token == NONFINITE:
                return self._end(row, NewTokens(tuple(tokens), "error", NONFINITE_LOGITS))
            top = zip(found.top_tokens[i].tolist(), found.top_logps[i].tolist(), strict=True)
            tokens.append(SampledToken(token, float(found.logps[i]), tuple(top) if request.top else ()))
        self.counts[row] += len(tokens)
        self.tokens += len(tokens)
        if ticket.constraint is not None:
            error = ticket.constraint.accept([t.token for t in tokens if t.token not in request.stop])
            if error:
                return self._end(row, NewTokens(tuple(tokens), "error", error))
        finish: Finish | None = None
        if tokens and tokens[-1].token in request.stop:
            finish = "stop"
        elif self.counts[row] >= request.sampling.max_new:
            finish = "length"
        if finish:
            return self._end(row, NewTokens(tuple(tokens), finish))
        _deliver(ticket, NewTokens(tuple(tokens)))

    def _drop_cancelled(self) -> None:
        """Remove cancelled requests from the queue, so that they hold no place in it."""
        dropped, kept = list[Ticket](), deque[Ticket]()
        with self.changed:
            for ticket in self.waiting:
                (dropped if ticket.cancelled.is_set() else kept).append(ticket)
            self.waiting = kept
        for ticket in dropped:
            _deliver(ticket, NewTokens(finish="cancelled"))

    def _end_all(self, progress: NewTokens) -> None:
        """Take no more requests, and end all that are in rows or wait. The thread has ended."""
        with self.changed:
            self.closing, self.refusal = True, self.refusal or STOPPING
            tickets = [*self.waiting, *filter(None, self.rows)]
            self.waiting, self.rows = deque(), [None] * len(self.rows)
            self.changed.notify_all()
        for ticket in tickets:
            _deliver(ticket, progress)

    def _end(self, row: int, progress: NewTokens) -> None:
        """Deliver the last progress of a row, which is free then."""
        ticket = self.rows[row]
        assert ticket is not None
        with self.changed:
            self.rows[row] = None
            self.finished += 1
        _deliver(ticket, progress)


def _set_allowed(allowed: AllowedTokens, row: int, constraint: Constraint) -> None:
    """Set the tokens that may come next in a row."""
    words = constraint.allowed()[: allowed.words.shape[1]]
    allowed.rows[row], allowed.words[row, : len(words)] = True, words


def _deliver(ticket: Ticket, progress: NewTokens) -> None:
    """Call the request's function; a failure of it concerns this request only, which is cancelled."""
    try:
        ticket.deliver(progress)
    except Exception:
        ticket.cancel()


def complete_requests(
    programs: ServePrograms, params: Params, requests: Sequence[TokenRequest]
) -> list[list[int]]:
    """Complete requests with a scheduler of their own: token ids, up to and including a stop token.

    Raises ValueError if one of them fails.
    """
    found, ended = [list[int]() for _ in requests], SimpleQueue[str]()

    def deliver(tokens: list[int], progress: NewTokens) -> None:
        tokens.extend(sampled.token for sampled in progress.tokens)
        if progress.finish is not None:
            ended.put(progress.error)

    scheduler = Scheduler(programs, params, len(requests), log=lambda line: None)
    scheduler.start()
    try:
        scheduler.submit([(one, partial(deliver, tokens)) for one, tokens in zip(requests, found)])
        for _ in requests:
            error = ended.get()
            if error:
                raise ValueError(error)
    finally:
        scheduler.close()
    return found
