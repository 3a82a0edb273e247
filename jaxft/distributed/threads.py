"""Compute on parts of host arrays, and compile, in several threads; return freed memory to the system."""

import ctypes
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any, TypeVar

Given = TypeVar("Given")
Returned = TypeVar("Returned")
Key = TypeVar("Key")
MOST_THREADS = 16  # more would wait for memory


def cores() -> int:
    """Return how many CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux only
        return os.cpu_count() or 1


def map_in_threads(fn: Callable[[Given], Returned], items: Iterable[Given]) -> list[Returned]:
    """Return `[fn(item) for item in items]`, computed in one thread per core, but at most 16 threads.

    For NumPy code: NumPy releases Python's lock while it computes on an array. After an error no further call
    begins; when the running calls have ended, the error of the earliest failed item is raised. fn runs with
    the caller's context variables, such as NumPy's error state. Freed memory is returned to the system.
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
    trim_heap()  # glibc keeps memory that a thread has freed: 45 MB of two that quantise to 4 bits
    return [call.result() for call in calls]


def compile_all(lowered: Mapping[Key, Any], platform: str, options: Any = None) -> dict[Key, Any]:
    """Compile programs that jax has lowered, and return them by the same keys. On CPUs they are compiled at
    the same time, in one thread per core.

    On a GPU they are compiled one by one, because compiling measures the speed of kernels. platform: "cpu",
    "gpu" or "tpu". options: compiler options for jax's `compile`.
    """
    run = map_in_threads if platform == "cpu" else map
    return dict(zip(lowered, run(lambda program: program.compile(options), lowered.values()), strict=True))


def trim_heap() -> None:
    """Return freed heap memory, about 0.2 GiB after a compilation, to the system (glibc only)."""
    if hasattr(ctypes.pythonapi, "malloc_trim"):
        ctypes.pythonapi.malloc_trim(0)
