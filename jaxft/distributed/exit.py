"""Process exit in multi-process runs: exit codes, and a last line on stderr even if the process is killed."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
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
    """An error after which the same command only needs to be started again: the exit code is RESTART_CODE."""


class PeerLostError(RestartError, TimeoutError):
    """Another process has exited or stopped responding."""


def shorten_error(error: object) -> str:
    """Return the text of an error on one line, truncated to 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def means_peer_lost(text: str, connected: bool = False) -> bool:
    """Whether an error message of JAX means that another process has exited or stopped responding.

    Such a run can be restarted. Messages that only name a library or a connection match only if the processes
    were `connected` before, that is, finished a step together: until then, the cause may be a wrong network
    interface or NCCL version, and the run would be restarted forever.
    """
    return PEER_LOST.search(text) is not None or (connected and COMMUNICATION.search(text) is not None)


def exit_for_restart(text: str) -> NoReturn:
    """Print `text` to stderr and exit immediately with RESTART_CODE, without waiting for other threads."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{text}\n".encode())
    exit_now(RESTART_CODE)


def exit_now(code: int) -> NoReturn:
    """Exit immediately with `code`, without waiting for other threads; drop the killed message."""
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
    """A child shell that prints the last line written to its stdin when this process ends.

    JAX's C++ runtime aborts the process without running Python code, and SIGKILL cannot be caught, so only
    another process can print a message afterwards.
    """
    script = (
        'trap "" TERM INT HUP; last=; while read -r line; do last=$line; done; '
        '[ -z "$last" ] || echo "$last" >&2'
    )
    return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def set_killed_message(text: str) -> None:
    """Set the line printed to stderr if this process is killed or aborted; it replaces an earlier one."""
    pipe = _sentinel().stdin
    with contextlib.suppress(OSError):  # a missing shell is no reason to stop the run
        if not pipe.closed:
            pipe.write(f"{text}\n".encode())
            pipe.flush()


def clear_killed_message() -> None:
    """Print nothing when this process ends."""
    if _sentinel.cache_info().currsize and not _sentinel().stdin.closed:
        with contextlib.suppress(OSError):
            _sentinel().stdin.write(b"\n")
            _sentinel().stdin.close()
