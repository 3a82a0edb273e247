"""Functions that run code of other people, such as chat templates, in a process of their own.

Limits of time and memory apply to all threads of a process (limits.py). A training run or a server therefore
starts one further process, which does not import JAX, and calls these functions there. It ends with its
parent, and another takes its place if it dies. Processes that tokenise rows have no other work: they are
confined themselves, and call the functions directly.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from jaxft.data import limits
from jaxft.data.invalid import Value

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxft.data import confined; "
    "confined.serve()"
)
_confined = list[bool]()  # True in a process that is confined


class Died(Exception):
    """The confined process has ended during a call. code: as Popen.returncode."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def confine() -> None:
    """Declare that this process, by its main thread, runs nothing but functions for which limits hold."""
    _confined[:] = [True]


def call(function: Callable[..., Value], *args: object) -> Value:
    """Return function(*args), a function of a module, in a confined process, or raise the error that it
    raises.

    Arguments and result are copied. Raises TooSlow or Died if the process ends. Calls of several threads wait
    for one another.
    """
    return function(*args) if _confined else _process_of(os.getpid()).call(function, args)


class _Process:
    """A confined process of this process, started when it is first used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def call(self, function: Callable[..., Value], args: tuple) -> Value:
        """See `call`."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            try:
                self.pipe.send(((limits.RENDER_SECONDS, limits.RENDER_BYTES), function, args))
                failed, value = self.pipe.recv()
            except (EOFError, OSError) as error:
                code = self.stop()
                raise limits.TooSlow if code == -signal.SIGVTALRM else Died(code) from error
            except BaseException:  # such as KeyboardInterrupt, after which a response would be another call's
                self.stop()
                raise
        if failed:
            raise value
        return value

    def _start(self) -> None:
        self.stop()
        ours, theirs = socket.socketpair()
        with theirs:
            path = json.dumps(list(map(str, sys.path)))
            argv = [sys.executable, "-P", "-c", _START, path, str(theirs.fileno())]
            null = subprocess.DEVNULL
            self.process = subprocess.Popen(
                argv, stdin=null, stdout=null, stderr=null, pass_fds=[theirs.fileno()]
            )
        self.pipe = Connection(ours.detach())

    def stop(self) -> int:
        """End the process, if there is one, and return its code."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        self.pipe.close()
        try:
            return process.wait(1)  # it may have died by itself, and ends when its pipe is closed
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


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
            (limits.RENDER_SECONDS, limits.RENDER_BYTES), function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            outcome = False, function(*args)
        except Exception as error:
            outcome = True, error
        try:
            pipe.send(outcome)
        except OSError:
            return
