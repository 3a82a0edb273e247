"""What processes do together: all go on, or all stop with the same error. One process alone just acts.

An exchange gives each process's text to all: `gathered` over the devices, `Files` through a folder that all of them see.
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

Exchange = Callable[[str], list[str]]
PATIENCE = 86400  # seconds; gloo's own collectives give up after 30, and a watchdog decides what is too long
KINDS = (OSError, ValueError, MemoryError)


def is_first() -> bool:
    """Whether this is the process that writes and speaks: process 0, or the only one. Alone, no device is touched."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@functools.cache
def _meetings() -> Iterator[int]:
    return itertools.count()


def wait_for_all() -> None:
    """Wait until all processes are here, without a device. For the main thread, as `gathered`."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # slow to import, and only several processes need it here

        ocp.multihost.get_barrier_sync_fn()(key=f"jaxft-meet-{next(_meetings())}", timeout_ms=1000 * PATIENCE)


def gather_texts(mine: str) -> list[str]:
    """Every process's text, by process, over the devices.

    For the main thread only, at the same point among its other collectives on every process: from another thread it could meet
    a training step's collectives in another order than on the other processes, and wait for ever.
    """
    wait_for_all()
    data = np.frombuffer(mine.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32)).reshape(-1)
    room = max(1024, 1 << (int(sizes.max()) - 1).bit_length())  # few sizes, so few programs
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - data.size))).reshape(-1, room)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


class FileExchange:
    """Every process's text, by process, through files in `folder`, in the order that JAX's coordination service keeps.

    It meets no device, so any thread may use it. topic: the same on all processes, and never used before. A process that can't
    write tells at least its errno, in the name of an empty file. Raises OSError where one doesn't come within `limit` seconds.
    """

    def __init__(self, folder: Path, topic: str, limit: float):
        import orbax.checkpoint as ocp  # slow, and only checkpoints need it

        self._folder, self._topic, self._limit, self._count = folder, topic, limit, 0
        self._barrier = ocp.multihost.get_barrier_sync_fn()

    def __call__(self, mine: str) -> list[str]:
        self._count += 1
        path = self._folder / f"{self._count}.{jax.process_index()}"
        try:
            path.with_suffix(path.suffix + ".part").write_text(mine, encoding="utf-8")
            path.with_suffix(path.suffix + ".part").rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                (self._folder / f"{path.name}.errno{error.errno}").touch()
        self._wait("told")
        texts = [self._read(number) for number in range(jax.process_count())]
        self._wait("heard")  # so that nobody takes the folder away under a slower one
        return texts

    def _wait(self, what: str) -> None:
        try:
            self._barrier(key=f"{self._topic}-{self._count}-{what}", timeout_ms=int(1000 * self._limit))
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:200]
            raise TimeoutError(
                f"a process is gone, or did not come within {self._limit:g} s ({why})"
            ) from error

    def _read(self, number: int) -> str:
        name = f"{self._count}.{number}"
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except OSError:
            told = [p.suffix for p in self._folder.glob(f"{name}.errno*")] if self._folder.is_dir() else []
            digits = told[0].removeprefix(".errno") if told else ""
            known = int(digits) if digits.isdigit() else errno.EIO
            why = (
                os.strerror(known)
                if told
                else f"nothing of it is in {self._folder}; do all processes see the same folder?"
            )
            return json.dumps({"error": why, "kind": 0, "errno": known})


def settle(exchange: Exchange, act: Callable[[], Any]) -> list[Any]:
    """`act()` on every process; then, on all, what each gave (JSON) by process, or the error of the first that failed.

    An OSError keeps its number, a ValueError and a MemoryError their kind; others become a RuntimeError.
    """
    if jax.process_count() == 1:
        return [act()]
    own: Exception | None = None
    try:
        mine = json.dumps({"said": act()})
    except Exception as error:
        own = error
        kind = next((i for i, k in enumerate(KINDS) if isinstance(error, k)), len(KINDS))
        number = getattr(error, "errno", None)
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        mine = json.dumps({"error": text[:2000] or type(error).__name__, "kind": kind, "errno": number})
    said = [json.loads(text) for text in exchange(mine)]
    for number, one in enumerate(said):
        if "error" in one:
            raise _rebuilt(number, one) from own
    return [one["said"] for one in said]


def _rebuilt(number: int, told: dict[str, Any]) -> Exception:
    text = f"process {number}: {told['error']}"
    kind = KINDS[told["kind"]] if told["kind"] < len(KINDS) else RuntimeError
    return OSError(told["errno"] or errno.EIO, text) if kind is OSError else kind(text)


def exchange_first(exchange: Exchange, act: Callable[[], Any]) -> Any:
    """What `act()` gave (JSON) on process 0, on all of them; its error too."""
    return settle(exchange, lambda: act() if is_first() else None)[0]
