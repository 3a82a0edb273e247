"""Limits that protect a run from other people's files: time and memory of chat templates, size of rows."""

import contextlib
import ctypes
import functools
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

LINE_BYTES = 64 << 20  # of one line in a text file
RENDER_SECONDS = 20.0
RENDER_BYTES = 1 << 30
RENDER_CHARACTERS = 16 << 20
_AGAIN = 0.5  # seconds after which TooSlow is raised again, since a template may catch it


class TooSlow(Exception):
    """Raised in a thread that exceeds its time limit."""


@contextlib.contextmanager
def render_limits() -> Iterator[None]:
    """Run the body within RENDER_SECONDS and RENDER_BYTES; see time_limit and memory_limit."""
    with (
        memory_limit(RENDER_BYTES),
        time_limit(RENDER_SECONDS),
    ):  # in this order TooSlow lifts the memory limit
        yield


# ---- time


class _Alarm:
    """Raises TooSlow in the main thread by a signal, which also interrupts arithmetic on huge integers."""

    def __init__(self) -> None:
        self.armed = False

    def ring(self, signum: int, frame: Any) -> None:
        """Raise TooSlow if a limited body is running."""
        if self.armed:
            raise TooSlow

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise TooSlow in the body after `seconds`. A timer that was already set is restored afterwards."""
        other = signal.getsignal(signal.SIGALRM)
        if other != self.ring:
            signal.signal(signal.SIGALRM, self.ring)
        begin = time.monotonic()
        self.armed = True
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if other not in (self.ring, signal.SIG_DFL, None):
                signal.signal(signal.SIGALRM, other)  # otherwise `ring` remains installed, and does nothing
            if left:
                left = max(left + begin - time.monotonic(), 1e-6)
                signal.setitimer(signal.ITIMER_REAL, left, interval)


class _Watch:
    """A background thread that raises TooSlow in threads that exceed their time limit."""

    def __init__(self) -> None:
        self.lock, self.changed = threading.Lock(), threading.Event()
        self.deadlines: dict[int, float] = {}
        threading.Thread(target=self._watch, name="time-limit", daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self.lock:
                now = time.monotonic()
                for thread in [t for t, deadline in self.deadlines.items() if deadline < now]:
                    self.deadlines[thread] = now + _AGAIN
                    _raise_in(thread, ctypes.py_object(TooSlow))
                idle = not self.deadlines
                self.changed.clear()
            self.changed.wait(None if idle else 0.5)

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise TooSlow in the body after `seconds`, between two Python instructions."""
        thread = threading.get_ident()
        with self.lock:
            wake = not self.deadlines
            self.deadlines[thread] = time.monotonic() + seconds
        if wake:
            self.changed.set()
        try:
            yield
        finally:
            with self.lock:
                del self.deadlines[thread]
                _raise_in(thread, None)  # cancels a TooSlow that has not been raised yet


def _raise_in(thread: int, kind: Any) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)


_ALARM = _Alarm()


@functools.cache
def _watch_of(process: int) -> _Watch:
    return _Watch()


def time_limit(seconds: float) -> contextlib.AbstractContextManager[None]:
    """Return a context that raises TooSlow in its body after `seconds`. Such contexts must not be nested.

    Outside of the main thread, a single long operation in C is not interrupted.
    """
    if threading.current_thread() is threading.main_thread():
        return _ALARM.limit(seconds)
    return _watch_of(os.getpid()).limit(seconds)


# ---- memory


class _Memory:
    """The memory limit of the process. Threads share it, so it is lifted when the last limited body ends."""

    def __init__(self) -> None:
        self.lock, self.bodies = threading.Lock(), 0
        self.before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def enter(self, count: int) -> None:
        """Set the limit, unless another thread's body has set it."""
        with self.lock:
            if not self.bodies:
                soft, hard = self.before = resource.getrlimit(resource.RLIMIT_AS)
                values = [x for x in (_size() + count, soft, hard) if x != resource.RLIM_INFINITY]
                resource.setrlimit(resource.RLIMIT_AS, (min(values), hard))
            self.bodies += 1

    def leave(self) -> None:
        """Lift the limit when the last body ends."""
        with self.lock:
            self.bodies -= 1
            if not self.bodies:
                resource.setrlimit(resource.RLIMIT_AS, self.before)


_MEMORY = _Memory()


@functools.cache
def _sizes_of(process: int) -> int | None:
    """Return a file descriptor of /proc/self/statm; None on systems without it."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _size() -> int:
    """Return the size of the process's address space in bytes."""
    file = _sizes_of(os.getpid())
    return 0 if file is None else int(os.pread(file, 64, 0).split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def memory_limit(count: int) -> Iterator[None]:
    """Raise MemoryError in the body if the process allocates `count` bytes more than it has now. Linux only.

    The limit applies to all threads, so the body must be short.
    """
    if _sizes_of(os.getpid()) is None:
        yield
        return
    _MEMORY.enter(count)
    try:
        yield
    finally:
        _MEMORY.leave()
