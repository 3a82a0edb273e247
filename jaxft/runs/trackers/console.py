"""The terminal: a live view of the run, or one plain line per logged step where output is not a terminal."""

import atexit
import collections
import math
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxft.objectives.intervals import fraction_text
from jaxft.runs import metric_names as names
from jaxft.runs.terminal import printable_message

SHORT_NAMES = {
    names.LEARNING_RATE: "lr",
    names.GRAD_NORM: "grad",
    names.TOKEN_ACCURACY: "accuracy",
    names.GENERAL_LOSS: "general loss",
    names.HELD_OUT + names.LOSS: "eval loss",
}
# These come first, the others in the order that they are logged in. A held-out metric counts by its name
# without eval_.
FIRST = (
    names.LOSS,
    names.GENERAL_LOSS,
    names.REWARD,
    names.COMPLETION_KL,
    names.ACCURACY,
    names.MARGIN,
    names.CHOSEN_REWARD,
    names.REJECTED_REWARD,
    names.CHOSEN_LOGP,
    names.KL,
    names.LEARNING_RATE,
    names.GRAD_NORM,
)
# Shown by the progress bar already, or of interest only if unusual.
HIDDEN = (names.EPOCH, names.TOKENS, names.SKIPPED, names.SECONDS)
BLOCKS = "▁▂▃▄▅▆▇█"


class ConsoleView:
    """Shows progress, the newest metrics and messages of the run called `name`. console: standard output by
    default.
    """

    def __init__(self, name: str, total_steps: int, start_step: int = 0, console: Console | None = None):
        self._name, self._total_steps, self._step = name, total_steps, start_step
        self._console = console or Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
        self._begin = time.monotonic()
        self._pace: collections.deque[tuple[int, float]] = collections.deque(maxlen=32)  # (logged step, time)
        self._metrics: dict[str, float] = {}
        self._perf: dict[str, float] = {}
        self._losses: collections.deque[float] = collections.deque(maxlen=48)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=2)
            self._live.start()
            atexit.register(self._live.stop)  # shows the cursor again where close() is never reached

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Update the live view, or print a line."""
        if step > self._step:
            self._pace.append((step, time.monotonic()))
        self._step = step
        self._metrics = {**self._metrics, **metrics}
        self._perf = perf or self._perf
        if names.LOSS in metrics:
            self._losses.append(float(metrics[names.LOSS]))
        if self._live is None:
            self.message(self._line(step, metrics, perf))

    def ends_at(self, step: int) -> None:
        """Show the progress of a run whose last step is `step`."""
        self._total_steps = step

    def message(self, text: str) -> None:
        """Print a line, above the live view where there is one."""
        text, encoding = printable_message(text), self._console.encoding
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
        return format_seconds((self._total_steps - self._step) * (now - begin) / (last - first))

    def _line(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> str:
        values = [_with_interval(n, metrics) for n in _displayed(metrics, 8)]
        values += [format_metric(n, value) for n, value in perf.items() if n not in HIDDEN]
        eta = [f"eta {self._eta()}"] if perf and step < self._total_steps else []
        return "  ".join([f"step {step}/{self._total_steps}", *values, *eta])

    def _view(self) -> Group:
        bar = Table.grid(padding=(0, 2))
        done = self._step / self._total_steps if self._total_steps else 1.0
        elapsed = f"{format_seconds(time.monotonic() - self._begin)} elapsed, eta {self._eta()}"
        width = max(10, min(40, self._console.width - 50))
        bar.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=width),
            Text(f"{self._step}/{self._total_steps}  {100 * done:.0f}%  {elapsed}"),
        )
        metrics = [_with_interval(n, self._metrics) for n in _displayed(self._metrics, 10)]
        perf = [format_metric(n, value) for n, value in self._perf.items() if n not in HIDDEN]
        rows = [Text("  ".join(metrics)), Text("  ".join(perf), style="cyan")]
        if self._console.encoding.lower().startswith("utf") and len(self._losses) > 1:
            rows.append(Text(f"loss {sparkline(list(self._losses))}", style="green"))
        return Group(bar, *[row for row in rows if row.plain])


def format_metric(name: str, value: float) -> str:
    """A metric for people: a short name, few digits."""
    label = SHORT_NAMES.get(name, name)
    if name == names.MFU:
        return f"MFU {100 * value:.1f}%"
    if name == names.SPEED:
        return f"{value:,.0f} tok/s"
    if name == names.MEMORY:
        return f"{value:.2f} GiB"
    if name == names.LEARNING_RATE:
        return f"{label} {value:.2e}"
    small = value != 0 and abs(value) < 1e-3
    return f"{label} {value:.2e}" if small or abs(value) >= 1e6 else f"{label} {value:.4g}"


def _with_interval(name: str, metrics: dict[str, float]) -> str:
    """A metric for people; an accuracy with its 95 % interval and number of pairs, where that is known."""
    value, pairs = metrics[name], metrics.get(name + names.PAIR_COUNT)
    if not pairs or not 0 <= value <= 1:
        return format_metric(name, value)
    return f"{SHORT_NAMES.get(name, name)} {fraction_text(value, pairs)}"


def _displayed(metrics: dict[str, float], most: int) -> list[str]:
    """The names of at most `most` metrics in display order, and the number of skipped steps if any."""
    trained = {name: name.removeprefix(names.HELD_OUT) for name in metrics}
    first = [name for name in metrics if trained[name] in FIRST]
    first.sort(key=lambda name: (FIRST.index(trained[name]), name != trained[name]))
    others = [
        name
        for name in metrics
        if trained[name] not in FIRST and name not in HIDDEN and not name.endswith(names.PAIR_COUNT)
    ]
    return (first + others)[:most] + ([names.SKIPPED] if metrics.get(names.SKIPPED) else [])


def sparkline(values: list[float]) -> str:
    """Values as a row of blocks; non-finite ones are blank."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def format_seconds(seconds: float) -> str:
    """3:07, or 1:03:07 from an hour up."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
