"""How one process of several ends: with a line that it says itself, or that a shell beside it says for it."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

AGAIN = 75  # exit code where nothing is wrong with the run and it is to be started again (EX_TEMPFAIL of sysexits.h)
GONE = re.compile(
    r"(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): "  # absl's status codes: the coordination service, or another's abort
    r"|(?i:(closed|reset) by (remote )?peer|broken pipe|read timeout|timed out waiting|timeout caused pair closure)"  # gloo
    r"|(?i:remote process exited|heartbeat|tasks have crashed)"  # NCCL's ncclRemoteError; the coordination service
)


def shorten_error(error: object) -> str:
    """At most 300 characters of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def means_peer_lost(text: str) -> bool:
    """Whether jax's error says that another process is gone or silent, which a new start mends.

    What only names a library or a connection doesn't: a wrong interface or version of NCCL would be started again for ever.
    """
    return GONE.search(text) is not None


def exit_for_restart(text: str) -> NoReturn:
    """Say the last line and end this process at once with the code AGAIN, whatever its threads do."""
    os.write(2, f"{text}\n".encode())
    exit_now(AGAIN)


def exit_now(code: int) -> NoReturn:
    """End this process at once; its last line is said."""
    silence()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def exit_after(seconds: float, text: str) -> Iterator[None]:
    """Around what waits for other processes in C++: where it takes longer, `end(text)`."""
    timer = threading.Timer(seconds, exit_for_restart, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@functools.cache
def _sentinel() -> Any:
    """A shell that says the newest line it was sent when this process ends without another word: killed from outside, or aborted
    by jax's C++ runtime, which nothing in Python outlives.
    """
    script = 'trap "" TERM INT HUP; told=; while read -r line; do told=$line; done; [ -z "$told" ] || echo "$told" >&2'
    return subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def if_ended_from_outside(text: str) -> None:
    """What is to be said then, from now on."""
    pipe = _sentinel().stdin
    with contextlib.suppress(OSError):  # the shell is gone, and nothing else is wrong
        if not pipe.closed:
            pipe.write(f"{text}\n".encode())
            pipe.flush()


def silence() -> None:
    """This process has said its last line itself, or has none to say."""
    if _sentinel.cache_info().currsize and not _sentinel().stdin.closed:
        with contextlib.suppress(OSError):
            _sentinel().stdin.write(b"\n")
            _sentinel().stdin.close()
