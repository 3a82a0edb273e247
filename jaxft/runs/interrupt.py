"""SIGTERM, SIGINT and SIGHUP: the first stops a run after its step, the second ends the process at once.

A terminal that hangs up sends SIGHUP, often twice, so that a second one has no effect. Where it is ignored
from the start (nohup), it stays ignored. SIGINT does not: a script starts what it runs in the background with
SIGINT ignored, and it is to end a run there in every phase.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

SHOW_CURSOR = b"\x1b[?25h"


class Interrupt:
    """A context in which the first SIGTERM, SIGINT or SIGHUP only sets `signal`, checked between steps."""

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
    """Let SIGINT raise KeyboardInterrupt also where it is ignored from the start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name
