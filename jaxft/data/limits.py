"""Limits on what files of others may cost: the time and memory of chat templates, the size of rows."""

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

LINE_BYTES = 64 << 20  # of a row in a text file
RENDER_SECONDS = 20.0
RENDER_BYTES = 1 << 30
RENDER_CHARACTERS = 16 << 20
_AGAIN = 0.5  # seconds after which TooSlow is raised again: a template engine may catch it


class TooSlow(Exception):
    """Raised in the thread that is out of time."""


@contextlib.contextmanager
def render_limits() -> Iterator[None]:
    """Run the body within RENDER_SECONDS and RENDER_BYTES; see time_limit and memory_limit."""
    with memory_limit(RENDER_BYTES), time_limit(RENDER_SECONDS):  # TooSlow never keeps memory limited
        yield


# ---- time


class _Alarm:
    """Raises TooSlow in the main thread by a signal, which interrupts arithmetic on huge integers too."""

    def __init__(self) -> None:
        self.armed = False

    def ring(self, signum: int, frame: Any) -> None:
        """Raise TooSlow if the time of a body has run out."""
        if self.armed:
            raise TooSlow

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise TooSlow in the body after `seconds`. Another timer of the process goes on afterwards."""
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
                signal.signal(signal.SIGALRM, other)  # without another one, `ring` stays: it does nothing
            if left:
                left = max(left + begin - time.monotonic(), 1e-6)
                signal.setitimer(signal.ITIMER_REAL, left, interval)


class _Watch:
    """A thread that raises TooSlow in another one, whose time has run out."""

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
        """Raise TooSlow in the body after `seconds`, between two of its Python instructions."""
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
                _raise_in(thread, None)  # instead of a TooSlow that has not arrived yet


def _raise_in(thread: int, kind: Any) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)


_ALARM = _Alarm()


@functools.cache
def _watch_of(process: int) -> _Watch:
    return _Watch()


def time_limit(seconds: float) -> contextlib.AbstractContextManager[None]:
    """Return a context that raises TooSlow in its body if that is not done in `seconds`; not to be nested.

    In other threads than the main one a single long operation in C is not interrupted.
    """
    if threading.current_thread() is threading.main_thread():
        return _ALARM.limit(seconds)
    return _watch_of(os.getpid()).limit(seconds)


# ---- memory


class _Memory:
    """The limit on the process's memory, which threads share: it ends with the last body."""

    def __init__(self) -> None:
        self.lock, self.bodies = threading.Lock(), 0
        self.before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def enter(self, count: int) -> None:
        """Limit the memory, unless another thread's body has done so."""
        with self.lock:
            if not self.bodies:
                soft, hard = self.before = resource.getrlimit(resource.RLIMIT_AS)
                values = [x for x in (_size() + count, soft, hard) if x != resource.RLIM_INFINITY]
                resource.setrlimit(resource.RLIMIT_AS, (min(values), hard))
            self.bodies += 1

    def leave(self) -> None:
        """Undo `enter`."""
        with self.lock:
            self.bodies -= 1
            if not self.bodies:
                resource.setrlimit(resource.RLIMIT_AS, self.before)


_MEMORY = _Memory()


@functools.cache
def _sizes_of(process: int) -> int | None:
    """Return a file descriptor of the process's sizes; None where there is no such file."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _size() -> int:
    """Return the bytes of the process's address space."""
    file = _sizes_of(os.getpid())
    return 0 if file is None else int(os.pread(file, 64, 0).split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def memory_limit(count: int) -> Iterator[None]:
    """Raise MemoryError in the body if the process needs `count` bytes more than now; Linux only.

    The limit holds for all threads, so the body must be short.
    """
    if _sizes_of(os.getpid()) is None:
        yield
        return
    _MEMORY.enter(count)
    try:
        yield
    finally:
        _MEMORY.leave()
