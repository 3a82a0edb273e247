"""How a process ends: exit codes, signals, and a last line on stderr even if it is killed.

The first SIGTERM, SIGINT or SIGHUP stops a run after the current step; the second ends the process at once. A
second SIGHUP has no effect, because a terminal that hangs up often sends two. If SIGHUP is ignored when the
process starts (nohup), it stays ignored. SIGINT does not: shell scripts start background commands with SIGINT
ignored, but SIGINT must be able to stop a run.
"""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

RESTART_CODE = 75  # exit code of a run that only needs to be started again (EX_TEMPFAIL of sysexits.h)
PEER_LOST = re.compile(
    # absl status codes: the coordination service, or the abort of another process
    r"(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): "
    # gloo
    r"|(?i:(closed|reset) by (remote )?peer|broken pipe|read timeout"
    r"|timed out waiting|timeout caused pair closure)"
    # NCCL's ncclRemoteError; the coordination service
    r"|(?i:remote process exited|heartbeat|tasks have crashed)"
)
COMMUNICATION = re.compile(r"(?i:gloo|nccl|connect|socket)")  # an error of communication, whatever its cause


class RestartError(OSError):
    """An error after which the same command can simply be started again: the exit code is RESTART_CODE."""


class PeerLostError(RestartError, TimeoutError):
    """Another process has exited or stopped responding."""


def shorten_error(error: object) -> str:
    """Return the text of an error on one line, truncated to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def means_peer_lost(text: str, connected: bool = False) -> bool:
    """Whether an error message of JAX means that another process has exited or stopped responding.

    The run can then be restarted. A message that only mentions gloo, NCCL or a connection counts only if
    `connected`: all processes have finished a step together. Before that, the cause may be a wrong network
    interface or NCCL version, and the run would be restarted forever.
    """
    return PEER_LOST.search(text) is not None or (connected and COMMUNICATION.search(text) is not None)


def exit_for_restart(text: str) -> NoReturn:
    """Print `text` to stderr and exit immediately with RESTART_CODE, without waiting for other threads."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{text}\n".encode())
    exit_now(RESTART_CODE)


def exit_now(code: int) -> NoReturn:
    """Flush stdout and stderr and end the process with exit code `code`, without waiting for other threads
    and without printing the line of `set_killed_message`.
    """
    clear_killed_message()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def exit_after(seconds: float, text: str) -> Iterator[None]:
    """Call `exit_for_restart(text)` if the body, which may block in C++ code, takes longer than `seconds`."""
    timer = threading.Timer(seconds, exit_for_restart, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@functools.cache
def _sentinel() -> Any:
    """Start a shell as a child process and return its Popen object; later calls return the same one. When
    this process ends, the shell prints the last line that this process wrote to the shell's stdin.

    JAX's C++ runtime aborts the process without running Python code, and SIGKILL cannot be caught, so only
    another process can print a message afterwards.
    """
    script = (
        'trap "" TERM INT HUP; last=; while read -r line; do last=$line; done; '
        '[ -z "$last" ] || echo "$last" >&2'
    )
    return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def set_killed_message(text: str) -> None:
    """Set the line that is printed to stderr if this process is killed or aborted. It replaces the line of an
    earlier call.
    """
    pipe = _sentinel().stdin
    with contextlib.suppress(OSError):  # a missing shell is no reason to stop the run
        if not pipe.closed:
            pipe.write(f"{text}\n".encode())
            pipe.flush()


def clear_killed_message() -> None:
    """Cancel the line of `set_killed_message`; further calls of it then have no effect."""
    if _sentinel.cache_info().currsize and not _sentinel().stdin.closed:
        with contextlib.suppress(OSError):
            _sentinel().stdin.write(b"\n")
            _sentinel().stdin.close()


SHOW_CURSOR = b"\x1b[?25h"


class Interrupt:
    """A context manager in which the first SIGTERM, SIGINT or SIGHUP does not end the process. Its number is
    stored in the attribute `signal`, which is 0 before; the training loop checks it between steps.

    The signal handlers are only replaced in the main thread.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for handled in self._old:  # the system's default, which also ends a process inside a long computation
            signal.signal(handled, signal.SIG_IGN if handled == signal.SIGHUP else signal.SIG_DFL)
        text = f"\n{signal_name(number)}: finishing this step and saving; a second signal stops at once\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            # the live view hides the cursor, and a second signal leaves no time to show it
            if sys.stdout.isatty():
                os.write(1, SHOW_CURSOR)
            os.write(2, text.encode())

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


def accept_interrupts() -> None:
    """Let SIGINT raise KeyboardInterrupt, even if the process was started with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def signal_name(number: int) -> str:
    """Return the name of a signal: SIGTERM for 15."""
    return signal.Signals(number).name
