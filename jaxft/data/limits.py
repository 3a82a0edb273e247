"""Limits on what files of others may cost: the time and memory of chat templates, the size of rows."""

import contextlib
import ctypes
import functools
import os
import resource
import threading
import time
from collections.abc import Iterator

LINE_BYTES = 64 << 20  # of a row in a text file
RENDER_SECONDS = 20.0
RENDER_BYTES = 4 << 30
RENDER_CHARACTERS = 16 << 20


class TooSlow(Exception):
    """Raised in the thread that is out of time."""


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
                late = [thread for thread, deadline in self.deadlines.items() if deadline < now]
                for thread in late:
                    del self.deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(TooSlow)
                    )
                idle = not self.deadlines
                self.changed.clear()
            self.changed.wait(None if idle else 0.5)


@functools.cache
def _watch_of(process: int) -> _Watch:
    return _Watch()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the body if its Python code is not done in `seconds`; not to be nested."""
    watch, thread = _watch_of(os.getpid()), threading.get_ident()
    with watch.lock:
        wake = not watch.deadlines
        watch.deadlines[thread] = time.monotonic() + seconds
    if wake:
        watch.changed.set()
    try:
        yield
    finally:
        with watch.lock:
            watch.deadlines.pop(thread, None)


@contextlib.contextmanager
def memory_limit(count: int) -> Iterator[None]:
    """Raise MemoryError in the body if the process needs `count` bytes more than now; Linux only.

    The limit holds for all threads, so this is for the start of a run, when nothing else works.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + count
    except OSError:
        yield
        return
    limits = [x for x in (limit, soft, hard) if x != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
