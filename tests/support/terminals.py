"""The other end of a pseudo-terminal: what a user types, and what the screen gets."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A pseudo-terminal. slave: the descriptor that the program reads and writes."""

    def __init__(self, columns=80, lines=24):
        self.master, self.slave = pty.openpty()
        self.raw, self.at = b"", 0
        self.resize(columns, lines)

    def resize(self, columns, lines):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def text(self):
        """All output without escape sequences."""
        return ESCAPES.sub("", self.raw.decode("utf-8", "replace")).replace("\r\n", "\n")

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, text, seconds=30.0):
        """Wait until the output after the last expected text has this one; return what came before it."""
        deadline = time.monotonic() + seconds
        while (found := self.text.find(text, self.at)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no {text!r} in {self.text[self.at :]!r}"
            self.raw += os.read(self.master, 4096)
        before, self.at = self.text[self.at : found], found + len(text)
        return before

    def has_output(self, seconds):
        """Whether the program writes something within this time."""
        return bool(select.select([self.master], [], [], seconds)[0])

    def drain(self):
        """Read what there is."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.raw += os.read(self.master, 4096)
            except OSError:  # the other end is closed
                return

    def close(self):
        os.close(self.master)
        os.close(self.slave)
