"""A watchdog thread that ends a stalled run with stack traces and the exit code for a restart."""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from jaxft.distributed import exit, processes
from jaxft.distributed.processes import Hosts

MEDIANS, MIN_SECONDS = 20, 600.0  # default step limit: 20 median steps, at least 600 s
CLOSING = 60.0  # seconds to release resources after an error


class Watchdog:
    """Context manager that ends the process when a phase or a step exceeds its time limit.

    Report progress with `at(phase)` and `step(number)`. When the limit is exceeded, the stacks of all threads
    are printed to stderr, then one line (which process, where, for how long, what to do), and the process
    exits with code 75 (exit.RESTART_CODE). This also works while the main thread blocks in a collective
    because another process died or hangs. Time during which the whole process was suspended (a laptop in
    standby, Ctrl-Z) does not count.
    """

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        self._phase, self._limit, self._setting = "starting", hosts.phase_seconds, "hosts.phase_seconds"
        self._waited, self._step_start = 0.0, 0.0  # _step_start is 0 outside steps
        self._steps: deque[float] = deque(maxlen=64)
        self._started = self._connected = False  # a step; all processes, by finishing a step together
        self._end = threading.Event()
        shortest = min(hosts.phase_seconds, hosts.step_seconds or MIN_SECONDS)
        self._tick = min(1.0, shortest / 10)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def at(self, phase: str, after_step: bool = False) -> None:
        """Enter a phase other than a training step, limited by hosts.phase_seconds.

        after_step: the last step has finished, so all processes have reached one another.
        """
        self._step_start, self._connected = 0.0, self._connected or after_step
        self._feed(phase, self._hosts.phase_seconds, "hosts.phase_seconds")

    def step(self, number: int) -> None:
        """Enter training step `number`; the step before it has finished."""
        now = time.monotonic()
        if self._step_start:
            self._steps.append(now - self._step_start)
        self._step_start = now
        self._connected, self._started = self._connected or self._started, True
        self._feed(f"step {number}", self._step_limit(), "hosts.step_seconds")

    def _step_limit(self) -> float:
        if self._hosts.step_seconds is not None:
            return self._hosts.step_seconds
        if len(self._steps) < 3:  # the first steps set up communication and autotune kernels
            return self._hosts.phase_seconds
        return max(MIN_SECONDS, MEDIANS * statistics.median(self._steps))

    def _feed(self, phase: str, limit: float, setting: str) -> None:
        self._phase, self._limit, self._setting, self._waited = phase, limit, setting, 0.0

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Limit the time that closing may take after an error in the body.

        If the error means that another process is lost, exit immediately for a restart. After any other error
        a multi-process run has CLOSING seconds to release its resources, because closing may wait for a
        process that is gone.
        """
        try:
            yield
        except processes.AgreedError:
            raise
        except BaseException as error:
            if processes.is_peer_lost(error, self._connected):
                exit.exit_for_restart(processes.peer_lost_message(error, self._phase))
            if processes.is_multi_process():
                self._feed(
                    f"closing after an error in {self._phase} ({exit.shorten_error(error)})",
                    CLOSING,
                    "after an error",
                )
            raise

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self._tick):
            now = time.monotonic()
            self._waited += min(now - last, 2 * self._tick)
            last = now
            if self._waited > self._limit:
                self._end_process()

    def _end_process(self) -> None:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(file=2, all_threads=True)
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # the live view hides the cursor
        limit = f"limit {self._limit:g} s: {self._setting}"
        exit.exit_for_restart(
            f"{processes.process_name()}: no progress for {self._waited:.0f} s in {self._phase} ({limit}); "
            "the stack traces above show where it waits; run the same command again to resume from the "
            "newest checkpoint"
        )
