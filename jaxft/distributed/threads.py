"""Computing on parts of host arrays in several threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Returned = TypeVar("Returned")
MOST = 16  # threads: memory bandwidth limits what more of them gain


def cores() -> int:
    """Return how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux only
        return os.cpu_count() or 1


def map_in_threads(fn: Callable[[Given], Returned], items: Iterable[Given]) -> list[Returned]:
    """Return `[fn(item) for item in items]`, computed in one thread per core.

    For NumPy code: NumPy releases Python's lock while it computes on an array. If fn raises, the error of the
    first such item is raised, once the calls that have begun are done; no further call begins.
    """
    items = list(items)
    threads = min(cores(), MOST, len(items))
    if threads < 2:
        return [fn(item) for item in items]
    pool = ThreadPoolExecutor(threads, "map_in_threads")
    try:
        return list(pool.map(fn, items))
    finally:
        pool.shutdown(cancel_futures=True)
