"""Calls of users' functions in threads, each with a time-out: environments, tools and rewards.

One thread makes all calls of an episode, because objects of sqlite3 or Playwright may only be used in the
thread that made them. Async functions run on an event loop of this episode alone, so that a blocking one
delays no other episode. After its time-out a call is given up, with its thread, its loop and their objects:
coroutines are cancelled, Python code is interrupted, and a call that hangs in C code is left running. A call
that ends the process (os._exit, a crash in C) cannot be caught; the sandbox for code that a model wrote is
run_python in shipped_environments.py.
"""

import asyncio
import ctypes
import functools
import inspect
import queue
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
SLOWEST_CHECK = 0.5  # seconds between checks of time-outs while all calls run
CLOSE_SECONDS = 2.0  # for objects to be closed at the end


class Overdue(Exception):
    """A call took longer than its time-out."""


class NeedsMainThread(BaseException):
    """A user's function set a signal, which Python permits on the main thread only."""


class _Interrupt(BaseException):
    """Raised in a thread whose call was given up."""


@dataclass
class Task:
    """Work of an episode, which its thread does in several calls; each may take `timeout` seconds.

    number: the episode's number. began: time at which the current call began, None before the first. awaited:
    the future of an async function's result. has_slot: whether it is one of the concurrent calls, whose
    number is limited. result: the work's result, or its exception.
    """

    number: int
    work: Callable[["Task"], Any]
    timeout: float
    worker: "_Worker"
    began: float | None = None
    awaited: Future | None = None
    has_slot: bool = False
    given_up: bool = False
    done: bool = False
    result: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call function(*args, **named), await its result if it is async, and return it. The time-out begins
        with each call. Raises NeedsMainThread, and the function's exceptions.
        """
        self.began = time.monotonic()
        try:
            value = function(*args, **named)
            if not inspect.isawaitable(value):
                return value
            self.awaited = self.worker.loop.begin(value)
            try:
                return self.awaited.result()
            finally:
                self.awaited.cancel()
        except ValueError as error:
            if "signal only works in main thread" in str(error):
                raise NeedsMainThread(
                    "a function sets a signal, such as signal.alarm for a time-out, which works on the main "
                    "thread only; remove it: data.timeout limits each call"
                ) from error
            raise

    def object(self, make: Callable[[], T], close: Callable[[T], Any] | None = None) -> T:
        """Return this thread's object of make(). The first call makes it; later calls, also in later
        episodes of the thread, return the same one. close: called with it when the thread ends.
        """
        objects = self.worker.objects
        if make not in objects:
            objects[make] = made = self.call(make)
            if close is not None:
                self.worker.closing.append(functools.partial(close, made))
        return objects[make]

    @property
    def seconds_left(self) -> float:
        """Seconds until the current call is overdue."""
        return self.timeout if self.began is None else self.began + self.timeout - time.monotonic()


class EventLoop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop, self.ended = asyncio.new_event_loop(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def begin(self, value: Awaitable[Any]) -> Future:
        """Start a coroutine (or another awaitable); return a future of its result."""
        return asyncio.run_coroutine_threadsafe(_awaited(value), self.loop)

    def end(self) -> None:
        """Cancel all coroutines and end the thread; interrupt a coroutine that blocks it."""
        self.ended = True
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.loop.stop)
        if asyncio.current_task(self.loop) is not None:
            _interrupt(self.thread)

    def _run(self) -> None:
        with suppress(_Interrupt), asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.get_loop().run_forever()  # closing the runner cancels its coroutines


@functools.cache
def _shared_loops() -> list[EventLoop]:
    return [EventLoop()]


def shared_loop() -> EventLoop:
    """Return the event loop that all async rewards run on, so that they can reuse their clients; a new one if
    it has ended.
    """
    loops = _shared_loops()
    if loops[0].ended:
        loops[0] = EventLoop()
    return loops[0]


class _Worker:
    """A thread that makes the calls of an episode, with its objects and its event loop.

    slots: limits the concurrent calls of all workers. closing: functions that close the objects. episode:
    number of the episode that started the thread.
    """

    def __init__(self, episode: int, slots: threading.Semaphore, results: "queue.SimpleQueue[Task]"):
        self.episode, self.slots, self.results = episode, slots, results
        self.tasks = queue.SimpleQueue[Task | None]()
        self.objects, self.closing = dict[Any, Any](), list[Callable[[], Any]]()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @functools.cached_property
    def loop(self) -> EventLoop:
        """The event loop of async calls, which begins with the first."""
        return EventLoop()

    def end(self) -> None:
        """Close the objects and end the thread."""
        self.tasks.put(None)

    def give_up(self, task: Task) -> bool:
        """Interrupt a task and end the thread. Return False if the task is done already."""
        with task.lock:
            if task.done:
                return False
            task.given_up = True
            if task.has_slot:
                self.slots.release()
                _interrupt(self.thread)
        if task.awaited is not None:
            task.awaited.cancel()
        self.end()
        return True

    def _run(self) -> None:
        """Do tasks until `end` is called, or until a task was given up."""
        with suppress(_Interrupt):  # that came late
            while (task := self.tasks.get()) is not None and self._done(task):
                self.results.put(task)
        with suppress(_Interrupt):
            self._close()

    def _done(self, task: Task) -> bool:
        """Do a task. Return False if it was given up."""
        self.slots.acquire()
        with task.lock:
            task.has_slot = True
            if task.given_up:
                self.slots.release()
                return False
        try:
            result = task.work(task)
        except _Interrupt:
            return False
        except BaseException as error:  # also SystemExit, which only ends the call
            result = error
        with task.lock:
            if task.given_up:
                return False
            task.result, task.done = result, True
            self.slots.release()
        return True

    def _close(self) -> None:
        for close in self.closing:
            with suppress(Exception):
                value = close()
                if inspect.isawaitable(value):
                    self.loop.begin(value).result(CLOSE_SECONDS)
        self.closing.clear()
        self.objects.clear()
        if "loop" in vars(self):
            self.loop.end()


class Calls:
    """A thread for each episode in progress: `submit` work of an episode, collect results by `finished`, and
    `release` an episode that is over. As a context manager, it abandons unfinished calls at the end.

    workers: the most concurrent calls. timeout: seconds of each call.

    Example:

        with Calls(workers=8, timeout=30.0) as calls:
            calls.submit(0, lambda task: task.call(search, "otters"))
            [(number, value)] = calls.finished(wait=True)   # an exception is returned as the value
    """

    def __init__(self, workers: int, timeout: float):
        self.timeout, self.slots = timeout, threading.Semaphore(workers)
        self.results = queue.SimpleQueue[Task]()
        self.running = dict[int, Task]()  # all that are submitted and not collected
        self.workers, self.idle = dict[int, _Worker](), list[_Worker]()  # by episode; of none
        weakref.finalize(self, _end, self.idle)

    def __enter__(self) -> "Calls":
        self.idle.sort(key=lambda worker: -worker.episode)  # an episode has the same objects in each rollout
        return self

    def __exit__(self, *exception: object) -> None:
        for number, task in self.running.items():
            self.workers[number].give_up(task)
        self.running.clear()
        for number in [*self.workers]:
            self.release(number, keep=False)

    def submit(self, number: int, work: Callable[[Task], Any]) -> None:
        """Queue work of an episode by its number. The episode must have no other work in progress."""
        if number not in self.workers:
            self.workers[number] = self.idle.pop() if self.idle else self._started(number)
        worker = self.workers[number]
        self.running[number] = task = Task(number, work, self.timeout, worker)
        worker.tasks.put(task)

    def finished(self, wait: bool) -> list[tuple[int, Any]]:
        """Return (episode's number, result or exception) of work that has ended since the last call, sorted
        by number. wait: whether to wait until some has ended. [] if nothing is in progress.
        """
        results = list[tuple[int, Any]]()
        while True:
            while not self.results.empty():
                task = self.results.get()
                if self.running.get(task.number) is task:
                    del self.running[task.number]
                    results.append((task.number, task.result))
            results += self._overdue()
            if results or not wait or not self.running:
                return sorted(results, key=lambda pair: pair[0])
            left = min(task.seconds_left for task in self.running.values())
            try:
                self.results.put(self.results.get(timeout=min(max(left, 0.001), SLOWEST_CHECK)))
            except queue.Empty:
                continue

    def release(self, number: int, keep: bool) -> None:
        """End an episode, given by its number. keep: whether its thread's objects may be used again."""
        worker = self.workers.pop(number, None)
        if worker is not None and keep and worker.objects:
            self.idle.append(worker)
        elif worker is not None:
            worker.end()

    def _overdue(self) -> list[tuple[int, Overdue]]:
        """Give up the calls that are overdue, and return them."""
        overdue = [task for task in self.running.values() if task.seconds_left < 0]
        given_up = [task.number for task in overdue if self.workers[task.number].give_up(task)]
        for number in given_up:
            del self.running[number], self.workers[number]
        return [(number, Overdue()) for number in given_up]

    def _started(self, episode: int) -> _Worker:
        try:
            return _Worker(episode, self.slots, self.results)
        except RuntimeError as error:
            raise ValueError(
                f"{error}: each concurrent episode needs a thread, and {len(self.workers)} have started. "
                "Raise the system's limit of threads (ulimit -u), or lower data.batch or data.group."
            ) from None


def _end(idle: list[_Worker]) -> None:
    """End threads, and wait for a while until they have closed their objects."""
    until = time.monotonic() + CLOSE_SECONDS
    for worker in idle:
        worker.end()
    for worker in idle:
        worker.thread.join(max(0.0, until - time.monotonic()))
    idle.clear()


def _interrupt(thread: threading.Thread) -> None:
    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
    interrupt(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupt))


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value
