"""The terminal: a live view of the run, or one plain line per logged step where output is not a terminal."""

import atexit
import collections
import math
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxft.data.progress import clock_time, time_in_words
from jaxft.objectives.alarms import CLIPPED_RATIO, GENERAL_LOSS, REWARD_STD, ZERO_STD
from jaxft.objectives.intervals import fraction_text
from jaxft.objectives.metrics import (
    GRAD_NORM,
    HELD_OUT,
    KL,
    LOSS,
    SKIPPED,
    TOKEN_ACCURACY,
    count_of,
    without_count,
)
from jaxft.objectives.pair import ACCURACY, CHOSEN_LOGP, CHOSEN_REWARD, MARGIN, REJECTED_REWARD
from jaxft.runs.metrics_log import (
    COMPLETION_KL,
    COMPLETION_LENGTH,
    EPOCH,
    EVALUATION_SECONDS,
    LEARNING_RATE,
    MEMORY,
    MFU,
    REWARD,
    SAMPLING_SECONDS,
    SECONDS,
    SPEED,
    TOKENS,
)
from jaxft.runs.run_texts import ROW_TEXTS
from jaxft.runs.terminal import printable_message, printable_text

SHORT_NAMES = {
    LEARNING_RATE: "lr",
    GRAD_NORM: "grad",
    TOKEN_ACCURACY: "accuracy",
    GENERAL_LOSS: "general loss",
    HELD_OUT + LOSS: "eval loss",
    REWARD_STD: "reward std",
    COMPLETION_LENGTH: "length",
    CLIPPED_RATIO: "truncated",
    ZERO_STD: "equal groups",
    EVALUATION_SECONDS: "evaluated in",
    SAMPLING_SECONDS: "sampled in",
}
# These come first, the others in the order that they are logged in. A held-out metric counts by its name
# without eval_.
FIRST = (
    LOSS, GENERAL_LOSS, REWARD, REWARD_STD, COMPLETION_LENGTH,
    CLIPPED_RATIO, ZERO_STD, COMPLETION_KL, ACCURACY, MARGIN,
    CHOSEN_REWARD, REJECTED_REWARD, CHOSEN_LOGP, KL, LEARNING_RATE,
    GRAD_NORM,
)  # fmt: skip
# Shown by the progress bar already, or of interest only if unusual.
HIDDEN = (EPOCH, TOKENS, SKIPPED, SECONDS)
PERCENTAGES = (CLIPPED_RATIO, ZERO_STD)
CLIPPED_STEPS = "clip_ratio"  # metrics of a policy loss that are 0 in a run with one update per rollout
MOST, MOST_OF_ROLLOUTS = 8, 10  # metrics of a line
FIRST_PROGRESS, EVERY_PROGRESS = 3.0, 10.0  # seconds before the first line about a phase, and between two
TOTAL, SHORTEST_PHASE = "total", 1.0  # the time of all phases; seconds of a phase that is listed
LABEL_WIDTH = 14  # of a column of a sweep's table
BLOCKS = "▁▂▃▄▅▆▇█"


class ConsoleView:
    """Shows progress, the newest metrics and messages of the run called `name`. console: where to print,
    standard output by default.
    """

    def __init__(self, name: str, total_steps: int, start_step: int = 0, console: Console | None = None):
        self._name, self._total_steps, self._step = name, total_steps, start_step
        self._console = console or Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
        self._begin = time.monotonic()
        self._pace: collections.deque[tuple[int, float]] = collections.deque(maxlen=32)  # (logged step, time)
        self._metrics: dict[str, float] = {}
        self._perf: dict[str, float] = {}
        self._losses: collections.deque[float] = collections.deque(maxlen=48)
        self._status, self._next_line = "", 0.0  # of a phase inside the run
        self._columns: tuple[str, ...] = ()
        self._needs_head = False  # of the table
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=2)
            self._live.start()
            atexit.register(self._live.stop)  # shows the cursor again where close() is never reached

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Update the live view, or print a line. perf: speed, memory and timings by metric name."""
        if step > self._step:
            now = time.monotonic()
            if not self._pace and SECONDS in perf:
                self._pace.append((self._step, now - perf[SECONDS]))
            self._pace.append((step, now))
        self._step = step
        self._metrics = {**self._metrics, **metrics}
        self._perf = perf if SPEED in perf else self._perf
        if LOSS in metrics:
            self._losses.append(float(metrics[LOSS]))
        if self._live is None:
            self.message(self._line(step, metrics, perf))

    def tabulate(self, labels: Sequence[str]) -> None:
        """Show a sweep's metrics as a table from now on, with a column for each label. The metric "loss 1" is
        the loss of the first label.
        """
        self._columns, self._needs_head = tuple(labels), True

    def progress(self, text: str) -> None:
        """Show the progress of a phase of the run, such as an evaluation; "" ends the phase. Without a live
        view, print a line after 3 s and then every 10 s.
        """
        now = time.monotonic()
        if not (text and self._status):
            self._next_line = now + FIRST_PROGRESS
        self._status = text
        if text and self._live is None and now >= self._next_line:
            self._next_line = now + EVERY_PROGRESS
            self.message(text)

    def ends_at(self, step: int) -> None:
        """Make `step` the run's last step, to which progress and the remaining time refer."""
        self._total_steps = step

    def message(self, text: str) -> None:
        """Print a line, above the live view if there is one. URLs lose their secrets, except in lines that
        show prompts or completions.
        """
        shown = printable_text if text.startswith(ROW_TEXTS) else printable_message
        text, encoding = shown(text), self._console.encoding
        text = text.encode(encoding, "replace").decode(encoding)
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Restore the terminal. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._live.stop)
            self._live = None

    def _eta(self) -> str:
        if len(self._pace) < 2:
            return "-"
        (first, begin), (last, now) = self._pace[0], self._pace[-1]
        return clock_time((self._total_steps - self._step) * (now - begin) / (last - first))

    def _line(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> str:
        most = MOST_OF_ROLLOUTS if REWARD in metrics else MOST
        values = [_with_interval(n, metrics) for n in _displayed(metrics, most)]
        rates = _rates(perf)
        eta = [f"eta {self._eta()}"] if SPEED in perf and step < self._total_steps else []
        if self._columns:
            return "\n".join(self._rows(step, metrics, [*rates, *eta]))
        texts = [f"step {step}/{self._total_steps}", *values, *rates, *eta]
        if metrics.get(ZERO_STD) == 1 and not metrics.get(GRAD_NORM):  # no gradient
            texts.append("(nothing learned: the rewards of every group are equal)")
        return "  ".join(texts)

    def _rows(self, step: int, metrics: dict[str, float], rates: list[str]) -> list[str]:
        """Return the lines of a sweep's table: one for each metric, and in the first call a heading above
        them. rates: texts about speed and memory, which are appended to the last line.
        """
        kinds = dict.fromkeys(name.rpartition(" ")[0] for name in metrics)
        head = [self._row("step", "", [_shorten(label) for label in self._columns])] * self._needs_head
        self._needs_head, lines = False, []
        for kind in kinds:
            cells = [metrics.get(f"{kind} {number}") for number in range(1, len(self._columns) + 1)]
            texts = ["" if value is None else f"{value:.4g}" for value in cells]
            lines.append(self._row(f"{step}/{self._total_steps}", SHORT_NAMES.get(kind, kind), texts))
        return [*head, *lines[:-1], "  ".join([lines[-1], *rates])]

    def _row(self, first: str, kind: str, cells: Sequence[str]) -> str:
        widths = [max(len(_shorten(label)), 8) for label in self._columns]
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return "  ".join([f"{first:<{len(str(self._total_steps)) * 2 + 1}}  {kind:<9}", *padded])

    def _view(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        done = self._step / self._total_steps if self._total_steps else 1.0
        elapsed = f"{clock_time(time.monotonic() - self._begin)} elapsed, eta {self._eta()}"
        width = max(10, min(40, self._console.width - 50))
        bar.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=width),
            Text(f"{self._step}/{self._total_steps}  {100 * done:.0f}%  {elapsed}"),
        )
        if self._columns:
            kinds = dict.fromkeys(name.rpartition(" ")[0] for name in self._metrics)
            table = Table("", *(SHORT_NAMES.get(kind, kind) for kind in kinds), box=None)
            for number, label in enumerate(self._columns, 1):
                cells = (self._metrics.get(f"{kind} {number}") for kind in kinds)
                table.add_row(label, *("" if x is None else f"{x:.4g}" for x in cells))
            return Group(bar, table, *[Text(self._status)] * bool(self._status))
        metrics = [_with_interval(n, self._metrics) for n in _displayed(self._metrics, 10)]
        rows = [Text("  ".join(metrics)), Text("  ".join(_rates(self._perf)), style="cyan")]
        if self._console.encoding.lower().startswith("utf") and len(self._losses) > 1:
            rows.append(Text(f"loss {sparkline(list(self._losses))}", style="green"))
        rows.append(Text(self._status, style="dim"))
        return Group(bar, *[row for row in rows if row.plain])


def format_metric(name: str, value: float) -> str:
    """Return a metric as text for the terminal: a short name and few digits, such as "MFU 41.3%"."""
    label = SHORT_NAMES.get(name, name)
    if name == MFU:
        return f"MFU {100 * value:.1f}%"
    if name == SPEED:
        return f"{value:,.0f} tok/s"
    if name == MEMORY:
        return f"{value:.2f} GiB"
    if name in PERCENTAGES:
        return f"{label} {100 * value:.0f}%"
    if name in (EVALUATION_SECONDS, SAMPLING_SECONDS):
        return f"{label} {time_in_words(value)}"
    if name == LEARNING_RATE:
        return f"{label} {value:.2e}"
    small = value != 0 and abs(value) < 1e-3
    return f"{label} {value:.2e}" if small or abs(value) >= 1e6 else f"{label} {value:.4g}"


def _with_interval(name: str, metrics: dict[str, float]) -> str:
    """Return a metric as text for the terminal. If `metrics` has the number of pairs or prompts behind an
    accuracy, or behind a mean of rewards that are 0 or 1, add that number and the 95 % interval.
    """
    value, count = metrics[name], count_of(metrics, name)
    if count is None or not 0 <= value <= 1:
        return format_metric(name, value)
    return f"{SHORT_NAMES.get(name, name)} {fraction_text(value, count.number, unit=count.unit)}"


def _rates(perf: dict[str, float]) -> list[str]:
    """Return speed and memory as texts, and the seconds of evaluation and sampling if 1 s or more."""
    times = (EVALUATION_SECONDS, SAMPLING_SECONDS)
    shown = {name: x for name, x in perf.items() if name not in HIDDEN and not (name in times and x < 1)}
    return [format_metric(name, value) for name, value in shown.items()]


def _displayed(metrics: dict[str, float], most: int) -> list[str]:
    """Return at most `most` names of metrics in display order, then SKIPPED if steps were skipped."""
    trained = {name: name.removeprefix(HELD_OUT) for name in metrics}
    first = [name for name in metrics if trained[name] in FIRST]
    first.sort(key=lambda name: (FIRST.index(trained[name]), name != trained[name]))
    others = [
        name
        for name in metrics
        if trained[name] not in FIRST and name not in HIDDEN and without_count(name) == name
    ]
    others = [name for name in others if metrics[name] or not trained[name].startswith(CLIPPED_STEPS)]
    return (first + others)[:most] + ([SKIPPED] if metrics.get(SKIPPED) else [])


def sparkline(values: list[float]) -> str:
    """Return values as block characters from ▁ to █: a blank for a non-finite one, "" if all are."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def _shorten(label: str) -> str:
    return label if len(label) <= LABEL_WIDTH else f"{label[: LABEL_WIDTH - 1]}…"


def time_by_phase(seconds: dict[str, float]) -> str:
    """Return a run's time with its phases of 1 s or more: 3 min 24 s (loading 3.3 s, training 3 min 20 s).

    seconds: by phase, and under TOTAL for the run.
    """
    phases = [
        f"{phase} {time_in_words(x)}"
        for phase, x in seconds.items()
        if phase != TOTAL and x >= SHORTEST_PHASE
    ]
    return time_in_words(seconds[TOTAL]) + (f" ({', '.join(phases)})" if phases else "")
