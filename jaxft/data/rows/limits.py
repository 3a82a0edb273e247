"""Limits that protect a run from other people's files: time and memory of chat templates, size of rows."""

import contextlib
import functools
import os
import resource
import signal
from collections.abc import Iterator
from typing import Any

LINE_BYTES = 64 << 20  # of one line in a text file
LONGEST_TEXT = 2 << 20  # of one text that is tokenised; a tokenizer takes up to 500 bytes for each
RENDER_SECONDS = 20.0
RENDER_BYTES = 1 << 30
_AGAIN = 0.5  # seconds after which TooSlow is raised again, since a template may catch it
_UNINTERRUPTED = 5.0  # further seconds of one operation in C, after which the process is killed


class TooSlow(Exception):
    """Raised in a rendering that exceeds its time limit."""


@contextlib.contextmanager
def render_limits() -> Iterator[None]:
    """Limit the rendering to RENDER_SECONDS and RENDER_BYTES, which hold for all threads of the process.

    Only for processes that do nothing else, see confined.py, in their main thread.
    """
    with (
        memory_limit(RENDER_BYTES),
        _ALARM.limit(RENDER_SECONDS),
    ):  # in this order TooSlow lifts the memory limit
        yield


class _Alarm:
    """Raises TooSlow in the main thread by a signal, which also interrupts arithmetic on huge integers."""

    def __init__(self) -> None:
        self.armed = False

    def ring(self, signum: int, frame: Any) -> None:
        """Raise TooSlow if a limited rendering is running."""
        if self.armed:
            raise TooSlow

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raise TooSlow in the rendering after `seconds`. If it goes on, SIGVTALRM ends the process."""
        signal.signal(signal.SIGALRM, self.ring)
        self.armed = True
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _UNINTERRUPTED)
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


_ALARM = _Alarm()


@functools.cache
def _sizes_of(process: int) -> int | None:
    """Return a file descriptor of /proc/self/statm; None on systems without it."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


@contextlib.contextmanager
def memory_limit(count: int) -> Iterator[None]:
    """Raise MemoryError in the body if the process allocates `count` bytes more than it has now. Linux only.

    It applies to all threads of the process.
    """
    file = _sizes_of(os.getpid())
    if file is None:
        yield
        return
    size = int(os.pread(file, 64, 0).split()[0]) * resource.getpagesize()
    soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    values = [x for x in (size + count, soft, hard) if x != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(values), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
