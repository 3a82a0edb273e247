"""Operations that succeed on all processes or raise the same error on all of them.

They exchange texts through an `Exchange`: `gather_texts` over the devices, or a `FileExchange` through a
shared folder. In a single-process run nothing is exchanged.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxft.distributed.disk import write_durably
from jaxft.distributed.exit import PeerLostError

Exchange = Callable[[str], list[str]]  # this process's text -> the texts of all processes, by process index
# Seconds that a barrier waits. gloo's collectives time out after 30 s, so a barrier precedes them; whether
# the run is stalled is decided by the watchdog.
TIMEOUT = 86400
ERROR_TYPES = (OSError, ValueError, MemoryError, ImportError)


def is_first() -> bool:
    """Whether this is process 0, which writes and prints. Initialises no device in a single-process run."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@functools.cache
def _barrier_numbers() -> Iterator[int]:
    return itertools.count()


def wait_for_all() -> None:
    """Block until all processes have called this function; no device is used. Call it from the main thread
    only, at the same point of the program on every process.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # slow to import, and only multi-process runs need it here

        key = f"jaxft-meet-{next(_barrier_numbers())}"
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * TIMEOUT)


def gather_texts(text: str) -> list[str]:
    """Return every process's text, by process index, with an all-gather over the devices.

    Call it from the main thread only, at the same point of the program on every process: collectives issued
    from another thread could be ordered differently relative to a training step's, which deadlocks.
    """
    wait_for_all()
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32)).reshape(-1)
    # powers of two, so few programs are compiled
    padded = max(1024, 1 << (int(sizes.max()) - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(data, (0, padded - data.size))).reshape(-1, padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def array_of_first(x: np.ndarray) -> np.ndarray:
    """Return process 0's array on every process. x: an array with the same shape and dtype on all processes.

    Call it from the main thread only, for the reason that gather_texts states.
    """
    if jax.process_count() == 1:
        return x
    wait_for_all()
    return np.asarray(multihost_utils.broadcast_one_to_all(x))


class FileExchange:
    """Exchange of texts through files in a shared folder, with barriers of JAX's coordination service.

    It uses no device, so any thread may call it. folder: an existing folder that all processes see. topic:
    name of the exchange, the same on all processes, and used by no earlier exchange. limit: timeout in
    seconds.

    Calling it with this process's text returns the texts of all processes, by process index. For a process
    that could not write its file, the text is the JSON of an error, as in run_on_all. Raises PeerLostError (a
    TimeoutError, an OSError) if a process does not arrive in time.
    """

    def __init__(self, folder: Path, topic: str, limit: float):
        import orbax.checkpoint as ocp  # slow to import, and only checkpoints need it

        self._folder, self._topic, self._limit, self._count = folder, topic, limit, 0
        self._barrier = ocp.multihost.get_barrier_sync_fn()

    def __call__(self, text: str) -> list[str]:
        self._count += 1
        path = self._folder / f"{self._count}.{jax.process_index()}"
        try:
            write_durably(path, text.encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                (self._folder / f"{path.name}.errno{error.errno}").touch()
        self._wait("written")
        texts = [self._read(process) for process in range(jax.process_count())]
        self._wait("read")  # so that no process deletes the folder before a slower one has read it
        return texts

    def _wait(self, event: str) -> None:
        try:
            self._barrier(key=f"{self._topic}-{self._count}-{event}", timeout_ms=int(1000 * self._limit))
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:200]
            raise PeerLostError(
                f"a process is gone or did not arrive within {self._limit:g} s ({why})"
            ) from error

    def _read(self, process: int) -> str:
        name = f"{self._count}.{process}"
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except OSError:
            failures = self._folder.glob(f"{name}.errno*") if self._folder.is_dir() else ()
            digits = next((path.suffix.removeprefix(".errno") for path in failures), None)
            number = int(digits) if digits and digits.isdigit() else errno.EIO
            missing = f"its file is missing in {self._folder}; check that all processes see the same folder"
            why = missing if digits is None else os.strerror(number)
            return json.dumps({"error": why, "kind": 0, "errno": number})


def run_on_all(exchange: Exchange, fn: Callable[[], Any]) -> list[Any]:
    """Call `fn()` on every process, and return the results of all processes by process index, on each one.

    exchange: sends the results, as JSON, to the other processes. If fn raises on any process, every process
    raises the error of the failed process with the lowest index, with that index in the text. An OSError
    keeps its errno and becomes a plain OSError; a ValueError, MemoryError or ImportError stays one; any other
    error becomes a RuntimeError.
    """
    if jax.process_count() == 1:
        return [fn()]
    local_error: Exception | None = None
    try:
        text = json.dumps({"result": fn()})
    except Exception as error:
        local_error = error
        kind = next((i for i, k in enumerate(ERROR_TYPES) if isinstance(error, k)), len(ERROR_TYPES))
        number = getattr(error, "errno", None)
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = json.dumps({"error": message[:2000] or type(error).__name__, "kind": kind, "errno": number})
    replies = [json.loads(reply) for reply in exchange(text)]
    for process, reply in enumerate(replies):
        if "error" in reply:
            raise _rebuild_error(process, reply) from local_error
    return [reply["result"] for reply in replies]


def _rebuild_error(process: int, reply: dict[str, Any]) -> Exception:
    text = f"process {process}: {reply['error']}"
    kind = ERROR_TYPES[reply["kind"]] if reply["kind"] < len(ERROR_TYPES) else RuntimeError
    return OSError(reply["errno"] or errno.EIO, text) if kind is OSError else kind(text)


def exchange_first(exchange: Exchange, fn: Callable[[], Any]) -> Any:
    """Call `fn()` on process 0 only, and return its result on every process. If it raises, every process
    raises an error as in run_on_all. exchange: sends the result, as JSON, to the other processes.
    """
    return run_on_all(exchange, lambda: fn() if is_first() else None)[0]
