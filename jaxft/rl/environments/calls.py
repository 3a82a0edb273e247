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

_LOOP_LOCK = threading.Lock()
SLOWEST_CHECK = 0.5  # seconds between checks of time-outs while all calls run


class Overdue(Exception):
    """A call took longer than its time-out."""


class _Interrupt(BaseException):
    """Raised in a thread whose call was given up."""


@dataclass
class Task:
    """Work of a thread that consists of several calls in turn, each with the time-out.

    began: when the current call began, None before the first. result: of the work, or its exception.
    """

    number: int
    work: Callable[["Task"], Any]
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
        future = asyncio.run_coroutine_threadsafe(_awaited(value), event_loop())
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
            calls.submit(0, lambda task: task.call(search, "otters"))
            [(number, value)] = calls.finished(wait=True)   # an exception is returned as the value
    """

    def __init__(self, workers: int, timeout: float):
        self.workers, self.timeout = workers, timeout
        self.waiting = queue.SimpleQueue[Task | None]()
        self.results = queue.SimpleQueue[Task]()
        self.running = dict[int, Task]()  # all that are submitted and not collected
        self.threads = 0

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, number: int, work: Callable[[Task], Any]) -> None:
        """Queue work. number: under which its result is returned, which no other work in progress has."""
        self.running[number] = task = Task(number, work, self.timeout)
        if self.threads < min(self.workers, len(self.running)):
            self.threads += 1
            self._start_thread()
        self.waiting.put(task)

    def finished(self, wait: bool) -> list[tuple[int, Any]]:
        """Return (number, result or exception) of work that has ended since the last call, in the order of
        numbers. wait: until there is some; [] if nothing is in progress.
        """
        found = list[tuple[int, Any]]()
        while True:
            while not self.results.empty():
                task = self.results.get()
                if self.running.get(task.number) is task:
                    del self.running[task.number]
                    found.append((task.number, task.result))
            found += [(task.number, Overdue()) for task in self._overdue()]
            if found or not wait or not self.running:
                return sorted(found, key=lambda pair: pair[0])
            left = min(task.seconds_left for task in self.running.values())
            try:
                self.results.put(self.results.get(timeout=min(max(left, 0.001), SLOWEST_CHECK)))
            except queue.Empty:
                continue

    def close(self) -> None:
        """End the threads that are idle, and interrupt what still runs."""
        for task in self.running.values():
            _give_up(task)
        for _ in range(self.threads):
            self.waiting.put(None)
        self.running.clear()

    def _overdue(self) -> list[Task]:
        """Give up the calls that are overdue, and return their jobs."""
        overdue = [task for task in self.running.values() if task.seconds_left < 0]
        found = [task for task in overdue if _give_up(task)]
        for task in found:
            del self.running[task.number]
            self._start_thread()  # in the place of the one that hangs
        return found

    def _start_thread(self) -> None:
        threading.Thread(target=_work, args=(self.waiting, self.results), daemon=True).start()


def _work(waiting: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
    """Do jobs until None comes, or until a task was given up."""
    try:
        while (task := waiting.get()) is not None:
            if task.given_up:
                continue
            task.thread = threading.get_ident()
            try:
                result = task.work(task)
            except _Interrupt:
                return
            except BaseException as error:  # also SystemExit, which only ends the call
                result = error
            with task.lock:
                task.result, task.done = result, True
                if task.given_up:
                    return
            results.put(task)
    except _Interrupt:  # that came late
        return


def _give_up(task: Task) -> bool:
    """Mark a task as given up and interrupt its thread, unless it is done."""
    with task.lock:
        if task.done:
            return False
        task.given_up = True
        if task.thread:
            interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
            interrupt(ctypes.c_ulong(task.thread), ctypes.py_object(_Interrupt))
    return True


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop on which all async functions run, so that clients stay on one loop."""
    with _LOOP_LOCK:
        return _started_loop()


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
