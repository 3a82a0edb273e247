"""Computing on parts of host arrays in several threads."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

Given = TypeVar("Given")
Returned = TypeVar("Returned")
MOST_THREADS = 16  # more would wait for memory


def cores() -> int:
    """Return how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux only
        return os.cpu_count() or 1


def map_in_threads(fn: Callable[[Given], Returned], items: Iterable[Given]) -> list[Returned]:
    """Return `[fn(item) for item in items]`, computed in one thread per core.

    For NumPy code: NumPy releases Python's lock while it computes on an array. After an error no further call
    begins, and once those that have begun are done, the first error in the order of the items is raised. The
    caller's context variables, such as NumPy's error state, have their values in fn.
    """
    items = list(items)
    threads = min(cores(), MOST_THREADS, len(items))
    if threads < 2:
        return [fn(item) for item in items]
    with ThreadPoolExecutor(threads, "map_in_threads") as pool:
        calls = [pool.submit(copy_context().run, fn, item) for item in items]
        try:
            wait(calls, return_when=FIRST_EXCEPTION)
        finally:
            for call in calls:
                call.cancel()
    return_freed_memory()
    return [call.result() for call in calls]


def return_freed_memory() -> None:
    """Return memory that has been freed to the system, where the C library is glibc.

    It gives each thread a heap of its own and keeps what a thread has freed there, although the thread has
    ended: 45 MB of two threads that quantise to 4 bits.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
