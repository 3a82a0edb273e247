"""A thread that ends a run in which nothing moves any more, so that a scheduler starts it again."""

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

TIMES, LEAST = 20, 600.0  # a step is stalled beyond so many medians, and seconds
ENDING = 60.0  # seconds to close things in after an error


class Watchdog:
    """While it is entered, the run has to tell what it does: `at` a phase, or `step` by step, each within its bound.

    Where it doesn't: every thread's stack on stderr, then a line that says who, where, how long and what to do, then exit code 75
    (exit.AGAIN). It works in a process that waits for one that died or hangs, too. Time in which the whole process was
    stopped (a laptop that sleeps, Ctrl-Z) doesn't count.
    """

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        self._phase, self._bound, self._setting = "starting", hosts.phase_seconds, "hosts.phase_seconds"
        self._waited, self._since = 0.0, 0.0  # the second is the present step's begin, 0 where there is none
        self._steps: deque[float] = deque(maxlen=64)
        self._end = threading.Event()
        least = min(hosts.phase_seconds, hosts.step_seconds or LEAST)
        self._tick = min(1.0, least / 10)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def at(self, phase: str) -> None:
        """What begins now, which isn't a step."""
        self._since = 0.0
        self._feed(phase, self._hosts.phase_seconds, "hosts.phase_seconds")

    def step(self, number: int) -> None:
        """Step `number` begins, and the one before it is through."""
        now = time.monotonic()
        if self._since:
            self._steps.append(now - self._since)
        self._since = now
        self._feed(f"step {number}", self._step_bound(), "hosts.step_seconds")

    def _step_bound(self) -> float:
        if self._hosts.step_seconds is not None:
            return self._hosts.step_seconds
        if len(self._steps) < 3:  # the first ones set up communication and find their algorithms
            return self._hosts.phase_seconds
        return max(LEAST, TIMES * statistics.median(self._steps))

    def _feed(self, phase: str, bound: float, setting: str) -> None:
        self._phase, self._bound, self._setting, self._waited = phase, bound, setting, 0.0

    @contextlib.contextmanager
    def over(self) -> Iterator[None]:
        """Around all that computes. A process that is alone since another one died ends here at once; after any other error there
        is a minute to close things in, since what they wait for may be a process that is gone.
        """
        try:
            yield
        except processes.AgreedError:
            raise
        except BaseException as error:
            if processes.is_loss(error):
                exit.exit_for_restart(processes.lost(error, self._phase))
            if processes.several():
                self._feed(
                    f"closing after an error in {self._phase} ({exit.shorten_error(error)})",
                    ENDING,
                    "after an error",
                )
            raise

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self._tick):
            now = time.monotonic()
            self._waited += min(now - last, 2 * self._tick)
            last = now
            if self._waited > self._bound:
                self._bark()

    def _bark(self) -> None:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(file=2, all_threads=True)
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # the live view hides the cursor
        bound = f"bound {self._bound:g} s: {self._setting}"
        exit.exit_for_restart(
            f"{processes.who()}: nothing moved for {self._waited:.0f} s in {self._phase} ({bound}); the stacks above show "
            "where it waits; start the same command again, it goes on from the newest checkpoint"
        )
