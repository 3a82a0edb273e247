"""Functions that run untrusted code, such as chat templates, in a process of their own.

Limits of time and memory apply to all threads of a process (limits.py). A training run or a server therefore
starts one further process, which does not import JAX, and calls these functions there. It ends with its
parent, and another takes its place if it dies; a call during which something else kills it is made once more.
Processes that tokenise rows have no other work: they are confined themselves, and call the functions
directly. A process that sends nothing for SILENT_SECONDS, for example because it was stopped, is killed.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxft.data.rows import limits
from jaxft.data.rows.invalid import Value

SILENT_SECONDS = 600.0  # of one call, which may render a conversation many times
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxft.data import confined; "
    "confined.serve()"
)
_confined = list[bool]()  # True in a process that is confined


class Died(Exception):
    """The confined process has ended during a call. code: as Popen.returncode. reason: the last line that it
    has written to its stderr.
    """

    def __init__(self, code: int, reason: str):
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class Silent(Exception):
    """The confined process sent no result of a call for SILENT_SECONDS and was killed."""


def confine() -> None:
    """Declare that this process, by its main thread, runs nothing but functions for which limits hold."""
    _confined[:] = [True]


def call(function: Callable[..., Value], *args: object) -> Value:
    """Return function(*args), or raise its error; see `call_all`."""
    return call_all(function, [args])[0]


def call_all(function: Callable[..., Value], calls: Sequence[tuple]) -> list[Value]:
    """Return function(*args) for the arguments of each call, in a confined process; raise the first error.

    function: of a module, called again if something kills the process, such as the system for lack of memory.
    Arguments and results are copied. Raises TooSlow or Died if the process ends, and Silent if it is killed
    here. Calls of several threads wait for one another.
    """
    if _confined:
        return [function(*args) for args in calls]
    return _process_of(os.getpid()).call_all(function, calls)


class _Process:
    """A confined process of this process, started when it is first used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.reason = ""
        atexit.register(self.stop)

    def call_all(self, function: Callable[..., Value], calls: Sequence[tuple]) -> list[Value]:
        """See `call_all`."""
        try:
            return self._call_all(function, calls)
        except Died as error:
            if error.code != -signal.SIGKILL:
                raise
            return self._call_all(function, calls)

    def _call_all(self, function: Callable[..., Value], calls: Sequence[tuple]) -> list[Value]:
        outcomes = list[tuple[bool, Any]]()  # whether a call failed; its result or error
        done, silent = threading.Event(), threading.Event()
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            watch = (self.process, outcomes, done, silent)
            threading.Thread(target=_kill_if_silent, args=watch, daemon=True).start()
            try:
                self.pipe.send(((limits.RENDER_SECONDS, limits.RENDER_BYTES), function, calls))
                while len(outcomes) < len(calls) and not (outcomes and outcomes[-1][0]):
                    outcomes.append(self.pipe.recv())
            except (EOFError, OSError) as error:
                code = self.stop()
                if silent.is_set():
                    raise Silent from error
                slow = code == -signal.SIGVTALRM
                raise limits.TooSlow if slow else Died(code, self.reason) from error
            except BaseException:  # such as KeyboardInterrupt, after which a response would be another call's
                self.stop()
                raise
            finally:
                done.set()
        if outcomes and outcomes[-1][0]:
            raise outcomes[-1][1]
        return [value for _, value in outcomes]

    def _start(self) -> None:
        self.stop()
        ours, theirs = socket.socketpair()
        with theirs:
            here = Path(__file__).resolve().parents[2]  # sys.path may have "", the working directory of then
            path = json.dumps([str(here), *map(str, sys.path)])
            argv = [sys.executable, "-P", "-c", _START, path, str(theirs.fileno())]
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (stop closes it)
            null = subprocess.DEVNULL
            self.process = subprocess.Popen(
                argv, stdin=null, stdout=null, stderr=self.errors, pass_fds=[theirs.fileno()]
            )
        self.pipe = Connection(ours.detach())

    def stop(self) -> int:
        """End the process, if there is one, and return its code; `reason` is the last line of its stderr."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        self.pipe.close()
        try:
            code = process.wait(1)  # it may have died by itself, and ends when its pipe is closed
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        with self.errors:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
        self.reason = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
        return code


def _kill_if_silent(
    process: subprocess.Popen, outcomes: list, done: threading.Event, silent: threading.Event
) -> None:
    """Kill the process after SILENT_SECONDS without a further outcome. Time in which this one is stopped too
    does not count.
    """
    count, waits = 0, 0
    while waits < 60:
        if done.wait(SILENT_SECONDS / 60):
            return
        count, waits = len(outcomes), waits + 1 if len(outcomes) == count else 0
    silent.set()
    process.kill()


@functools.cache
def _process_of(parent: int) -> _Process:
    return _Process()


def serve() -> None:
    """Call functions for the parent until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach all processes; the parent ends this one
    confine()
    pipe = Connection(int(sys.argv[2]))
    while True:
        try:
            (limits.RENDER_SECONDS, limits.RENDER_BYTES), function, calls = pipe.recv()
            for args in calls:
                try:
                    outcome = False, function(*args)
                except Exception as error:
                    outcome = True, error
                pipe.send(outcome)
                if outcome[0]:
                    break
        except (EOFError, OSError):
            return
