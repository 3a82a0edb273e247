"""Calls of users' functions in threads, each with a time-out: environments, tools and rewards.

A call that hangs never holds up the others. After its time-out it is given up: Python code in it is
interrupted, a call that hangs elsewhere keeps its thread, and another thread takes that one's place. A call
that ends the process itself (os._exit, a crash in C) cannot be caught; code of a model runs in
jaxft.rl.environments.sandbox.
"""

import asyncio
import ctypes
import functools
import inspect
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

SLOWEST_CHECK = 0.5  # seconds between checks of time-outs while all calls run


class Overdue(Exception):
    """A call took longer than its time-out."""


class _Interrupt(BaseException):
    """Raised in a thread whose call was given up."""


@dataclass
class Job:
    """Work of a thread that consists of several calls in turn, each with the time-out.

    began: when the current call began, None before the first. result: of the work, or its exception.
    """

    number: int
    work: Callable[["Job"], Any]
    timeout: float
    began: float | None = None
    given_up: bool = False
    done: bool = False
    result: Any = None
    thread: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Return function(*args, **named) and what it awaits. The time-out begins anew."""
        self.began = time.monotonic()
        value = function(*args, **named)
        if not inspect.isawaitable(value):
            return value
        future = asyncio.run_coroutine_threadsafe(_awaited(value), _event_loop())
        try:
            return future.result(self.timeout)
        except TimeoutError:
            if future.done():  # raised by the function itself
                raise
            future.cancel()
            raise Overdue from None

    @property
    def seconds_left(self) -> float:
        """Seconds until the current call is overdue."""
        return self.timeout if self.began is None else self.began + self.timeout - time.monotonic()


class Calls:
    """A pool of threads. `submit` work, then collect it by `finished`; `close` at the end.

    Example:

        with Calls(workers=8, timeout=30.0) as calls:
            calls.submit(0, lambda job: job.call(search, "otters"))
            [(number, value)] = calls.finished(wait=True)   # an exception is returned as the value
    """

    def __init__(self, workers: int, timeout: float):
        self.workers, self.timeout = workers, timeout
        self.waiting = queue.SimpleQueue[Job | None]()
        self.results = queue.SimpleQueue[Job]()
        self.running = dict[int, Job]()  # all that are submitted and not collected
        self.threads = 0

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, number: int, work: Callable[[Job], Any]) -> None:
        """Queue work. number: under which its result is returned, which no other work in progress has."""
        self.running[number] = job = Job(number, work, self.timeout)
        if self.threads < min(self.workers, len(self.running)):
            self.threads += 1
            self._start_thread()
        self.waiting.put(job)

    def finished(self, wait: bool) -> list[tuple[int, Any]]:
        """Return (number, result or exception) of work that has ended since the last call, in the order of
        numbers. wait: until there is some; [] if nothing is in progress.
        """
        found = list[tuple[int, Any]]()
        while True:
            while not self.results.empty():
                job = self.results.get()
                if self.running.get(job.number) is job:
                    del self.running[job.number]
                    found.append((job.number, job.result))
            found += [(job.number, Overdue()) for job in self._overdue()]
            if found or not wait or not self.running:
                return sorted(found, key=lambda pair: pair[0])
            left = min(job.seconds_left for job in self.running.values())
            try:
                self.results.put(self.results.get(timeout=min(max(left, 0.001), SLOWEST_CHECK)))
            except queue.Empty:
                continue

    def close(self) -> None:
        """End the threads that are idle, and interrupt what still runs."""
        for job in self.running.values():
            _give_up(job)
        for _ in range(self.threads):
            self.waiting.put(None)
        self.running.clear()

    def _overdue(self) -> list[Job]:
        """Give up the calls that are overdue, and return their jobs."""
        overdue = [job for job in self.running.values() if job.seconds_left < 0]
        found = [job for job in overdue if _give_up(job)]
        for job in found:
            del self.running[job.number]
            self._start_thread()  # in the place of the one that hangs
        return found

    def _start_thread(self) -> None:
        threading.Thread(target=_work, args=(self.waiting, self.results), daemon=True).start()


def _work(waiting: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
    """Do jobs until None comes, or until a job was given up."""
    try:
        while (job := waiting.get()) is not None:
            if job.given_up:
                continue
            job.thread = threading.get_ident()
            try:
                result = job.work(job)
            except _Interrupt:
                return
            except BaseException as error:  # also SystemExit, which only ends the call
                result = error
            with job.lock:
                job.result, job.done = result, True
                if job.given_up:
                    return
            results.put(job)
    except _Interrupt:  # that came late
        return


def _give_up(job: Job) -> bool:
    """Mark a job as given up and interrupt its thread, unless it is done."""
    with job.lock:
        if job.done:
            return False
        job.given_up = True
        if job.thread:
            interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
            interrupt(ctypes.c_ulong(job.thread), ctypes.py_object(_Interrupt))
    return True


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop on which all async functions run, so that clients stay on one loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
