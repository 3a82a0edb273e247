"""Progress of a long pass over rows, on standard error, and durations as text."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

FIRST, EVERY, EVERY_ON_TERMINAL = 3.0, 10.0, 0.5  # seconds before the first line, and between two lines


class RowProgress:
    """Print the number of rows done, rows per second and the time left, after the first FIRST seconds.

    On a terminal each line replaces the one before. phase: the first words of a line, such as "tokenising
    rows.jsonl". total: rows of the dataset, None if unknown. enabled: False prints nothing. clock: returns
    the time in seconds.
    """

    def __init__(
        self, phase: str, total: int | None, enabled: bool, clock: Callable[[], float] = time.monotonic
    ):
        self._phase = "".join(c if c.isprintable() else "?" for c in phase)
        self._total, self._clock, self._rows, self._printed = total, clock, 0, False
        self._terminal = sys.stderr.isatty()
        self._begin = clock()
        self._next = self._begin + FIRST if enabled else float("inf")

    def __enter__(self) -> "RowProgress":
        return self

    def add(self, rows: int) -> None:
        """Count further rows as done. Print a line if one is due, or at the last row if any was printed."""
        self._rows += rows
        now = self._clock()
        if not (self._printed if self._rows == self._total else now >= self._next):
            return
        self._next = now + (EVERY_ON_TERMINAL if self._terminal else EVERY)
        self._printed = True
        begin, end = ("\r", "\x1b[K") if self._terminal else ("", "\n")
        print(f"{begin}{self._line(now - self._begin)}", end=end, file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._printed and self._terminal:
            print(file=sys.stderr)

    def _line(self, seconds: float) -> str:
        rate = max(self._rows, 1) / max(seconds, 1e-9)
        speed = f"{rate:,.0f} rows/s"
        if self._total is None:
            return f"{self._phase}: {self._rows:,} rows, {speed}"
        if self._rows == self._total:
            return f"{self._phase}: {self._rows:,} rows in {clock_time(seconds)}, {speed}"
        eta = clock_time((self._total - self._rows) / rate)
        return f"{self._phase}: {self._rows:,} of {self._total:,} rows, {speed}, eta {eta}"


def time_in_words(seconds: float) -> str:
    """Format a time as 4.2 s, 3 min 27 s or 1 h 03 min; from three days up, as 4.5 days."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def clock_time(seconds: float) -> str:
    """Format a time as 3:07, or as 1:03:07 from an hour up."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
