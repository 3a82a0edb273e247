"""What a run reports while it goes: metrics.jsonl, TensorBoard, optional trackers, and the terminal.

metrics.jsonl has an object a logged step: `{"step": 3, "loss": 1.25, ..., "perf": {...}}`. Timings and memory are under "perf";
everything else is the same to the bit in a run that is repeated or resumed. Floats are written in full (shortest text that
reads back as the same float64). JSON has no NaN or infinity: both are written as null.
"""

import atexit
import collections
import json
import math
import os
import platform
import re
import secrets
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SHORT = {
    "learning_rate": "lr",
    "grad_norm": "grad",
    "mean_token_accuracy": "accuracy",
    "general_loss": "general loss",
    "eval_loss": "eval loss",
}
FIRST = (  # then the others, in the order they come; of a held-out metric the name without eval_ counts
    "loss", "general_loss", "reward", "objective/kl", "rewards/accuracies", "rewards/margins", "rewards/chosen",
    "rewards/rejected", "logps/chosen", "kl", "learning_rate", "grad_norm",
)  # fmt: skip
HIDDEN = (
    "epoch",
    "num_tokens",
    "skipped",
    "seconds",
)  # shown by the bar already, or only where they say something
SPARKS = "▁▂▃▄▅▆▇█"


# Lines of metrics.jsonl


def finite(value: Any) -> Any:
    """The value as JSON has it: NaN and infinity as null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def line(step: int, metrics: dict[str, float], perf: dict[str, float]) -> str:
    """One line of metrics.jsonl, without its end."""
    taken = {"step", "perf"} & metrics.keys()
    if taken:
        raise ValueError(
            f"a metric can't be called {sorted(taken)[0]!r}; rename it where the objective returns it"
        )
    entry = {"step": int(step), **finite(metrics), **({"perf": finite(perf)} if perf else {})}
    return json.dumps(entry, allow_nan=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, without lines that are no object (one is half written when a run is killed)."""
    return [entry for _, entry in _entries(path)]


def _entries(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    found = []
    for text in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and text.endswith(b"\n"):
            found.append((text, entry))
    return found


def cut(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Leave only the lines of a run that stands at `start_step`, atomically; returns those of that step itself.

    Step 0 is a fresh start and leaves nothing: its evaluation runs again.
    """
    kept = [(text, entry) for text, entry in _entries(path) if start_step > 0 and entry["step"] <= start_step]
    whole = b"".join(text for text, _ in kept)
    if path.exists() and path.read_bytes() != whole:
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    return [entry for _, entry in kept if entry["step"] == start_step]


# Trackers: (send(step, values), finish()) of each


def _tracker(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"trackers has {name!r}, which is not installed ({error}); run pip install 'jaxft[track]'"
        ) from error


def _wandb(folder: Path) -> tuple[Callable, Callable]:
    identity = folder / "wandb_id"  # the same run goes on after a restart
    if not identity.exists():
        identity.write_text(secrets.token_hex(8))
    own = {"name": folder.name, "id": identity.read_text().strip(), "dir": str(folder)}
    run = _tracker("wandb").init(project="jaxft", resume="allow", **own)
    run.define_metric("*", step_metric="step")  # wandb's own step can't go back to a checkpoint's
    return (lambda step, values: run.log({**values, "step": step})), run.finish


def _trackio(folder: Path) -> tuple[Callable, Callable]:
    trackio = _tracker("trackio")
    trackio.init(project="jaxft", name=folder.name, resume="allow")
    return (lambda step, values: trackio.log(values, step=step)), trackio.finish


def _tensorboard(folder: Path, start_step: int) -> tuple[Callable, Callable]:
    # tensorboardX's SummaryWriter writes in a thread that dies on a full disk and leaves the run waiting: its messages, our file
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c
    from tensorboardX.summary import scalar

    (folder / "tensorboard").mkdir(exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
    file = (folder / "tensorboard" / name).open("ab")

    def write(**fields: Any) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        file.write(
            size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))
        )

    def send(step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            if math.isfinite(value):
                write(step=step, summary=scalar(tag, value))
        file.flush()  # a killed run loses nothing

    write(file_version="brain.Event:2")
    # hides what an earlier process wrote about later steps
    write(step=start_step + 1 if start_step else 0, session_log=SessionLog(status=SessionLog.START))
    return send, file.close


def open_trackers(names: tuple[str, ...], folder: Path) -> list[tuple[Callable, Callable]]:
    """The trackers of these names. Raises ValueError for one that is not known or not installed."""
    known = {"wandb": _wandb, "trackio": _trackio}
    for name in names:
        if name not in known:
            raise ValueError(f"trackers has {name!r}; known are {', '.join(known)}")
        _tracker(name)
    return [known[name](folder) for name in names]


# The terminal


def shown(name: str, value: float) -> str:
    """A metric for people: few digits, a short name."""
    label = SHORT.get(name, name)
    if name == "mfu":
        return f"MFU {100 * value:.1f}%"
    if name == "tokens_per_second":
        return f"{value:,.0f} tok/s"
    if name == "memory_gib":
        return f"{value:.2f} GiB"
    if name == "learning_rate":
        return f"{label} {value:.2e}"
    small = value != 0 and abs(value) < 1e-3
    return f"{label} {value:.2e}" if small or abs(value) >= 1e6 else f"{label} {value:.4g}"


def _ordered(metrics: dict[str, float], most: int) -> list[str]:
    bare = {n: n.removeprefix("eval_") for n in metrics}
    first = sorted(
        (n for n in metrics if bare[n] in FIRST), key=lambda n: (FIRST.index(bare[n]), n != bare[n])
    )
    names = first + [n for n in metrics if bare[n] not in FIRST and n not in HIDDEN]
    return names[:most] + (["skipped"] if metrics.get("skipped") else [])


def sparkline(values: list[float]) -> str:
    """Values as a row of blocks; non-finite ones are left blank."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Mute:
    """What a process that is not to write has instead of a Log."""

    def __init__(self) -> None:
        self.alarms: list[str] = []
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def step(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Nothing."""

    def listen(self, watch: Callable | None) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Log:
    """The log of a run in `folder`, which goes on after `start_step`: whatever it says about later steps is dropped.

    console: where the live view is drawn if it is a terminal, and plain lines are printed if not; standard output by default.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        trackers: tuple[str, ...] = (),
        console: Console | None = None,
    ):
        self.folder, self.total_steps, self.quiet = Path(folder), total_steps, quiet
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sinks = open_trackers(trackers, self.folder)
        self._again = cut(self.folder / "metrics.jsonl", start_step)
        self.alarms: list[str] = []
        self.first: dict[str, Any] = {}  # of every name in metrics.jsonl the first value,
        self.last: dict[str, Any] = {}  # and the newest; see listen()
        self._hear: Callable[[dict[str, Any]], list[str]] = lambda entry: []
        self._file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._sinks.append(_tensorboard(self.folder, start_step))
        self._console = console or Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
        self._begin = time.monotonic()
        self._step = start_step
        self._pace: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=32
        )  # logged steps: no compile time
        self._metrics: dict[str, float] = {}
        self._perf: dict[str, float] = {}
        self._losses: collections.deque[float] = collections.deque(maxlen=48)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not quiet:
            self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=2)
            self._live.start()
            atexit.register(self._live.stop)  # gives the cursor back where close() is never reached

    def step(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Log the metrics after `step` optimizer steps; several calls may speak of one step. Raises OSError on a full disk."""
        text = line(step, metrics, perf)
        entry = json.loads(text)
        entry.pop("perf", None)
        if entry in [{k: v for k, v in old.items() if k != "perf"} for old in self._again]:
            return  # said before the restart
        try:
            self._file.write(text + "\n")
            self._file.flush()
            for send, _ in self._sinks:
                send(step, {**metrics, **{f"perf/{name}": value for name, value in perf.items()}})
        except OSError as error:
            told = f"metrics can't be written: {error.strerror}; mend that and run again"
            raise OSError(error.errno, told, str(self.folder)) from error
        if step > self._step:
            self._pace.append((step, time.monotonic()))
        self._step = step
        self._metrics = {**self._metrics, **metrics}
        self._perf = perf or self._perf
        if "loss" in metrics:
            self._losses.append(float(metrics["loss"]))
        if self._live is None and not self.quiet:
            self._print(self._plain(step, metrics, perf))
        for told in self._hear(entry):
            self.message(told)

    def listen(self, watch: Callable | None) -> None:
        """Ask `watch(memory, entry, last) -> (memory, lines, alarms)` about every entry of metrics.jsonl and say what it says.

        memory is {} at first, last: of the finished run. Entries from before a restart come first; what there was to say of
        them has been said. `alarms` keeps all alarms, `first` and `last` the run's numbers.
        """
        memory: dict[str, Any] = {}

        def hear(entry: dict[str, Any]) -> list[str]:
            nonlocal memory
            self.first, self.last = {**entry, **self.first}, {**self.last, **entry}
            if watch is None:
                return []
            last = entry["step"] == self.total_steps and "loss" not in entry
            memory, lines, alarms = watch(memory, entry, last)
            self.alarms += (alarms := [f"alarm after step {entry['step']}: {text}" for text in alarms])
            return [*lines, *alarms]

        for entry in read(self.folder / "metrics.jsonl"):
            hear(entry)
        self._hear = hear

    def message(self, text: str) -> None:
        """Say something, above the live view where there is one."""
        if not self.quiet:
            self._print(text)

    def close(self) -> None:
        """Flush everything and give the terminal back. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._live.stop)
            self._live = None
        self._file.close()
        while self._sinks:
            self._sinks.pop()[1]()

    def _print(self, text: str) -> None:
        text = re.sub(
            r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text
        )  # rows of data are shown: they don't steer the terminal
        encoding = self._console.encoding
        text = text.encode(encoding, "replace").decode(encoding)
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def _eta(self) -> str:
        if len(self._pace) < 2:
            return "-"
        (first, begin), (last, now) = self._pace[0], self._pace[-1]
        return _clock((self.total_steps - self._step) * (now - begin) / (last - first))

    def _plain(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> str:
        numbers = [shown(n, metrics[n]) for n in _ordered(metrics, 8)] + [
            shown(n, perf[n]) for n in perf if n not in HIDDEN
        ]
        eta = [f"eta {self._eta()}"] if perf and step < self.total_steps else []
        return "  ".join([f"step {step}/{self.total_steps}", *numbers, *eta])

    def _view(self) -> Group:
        width = max(10, min(40, self._console.width - 50))
        bar = Table.grid(padding=(0, 2))
        elapsed = f"{_clock(time.monotonic() - self._begin)} elapsed, eta {self._eta()}"
        done = self._step / self.total_steps if self.total_steps else 1.0
        bar.add_row(
            Text(self.folder.name, style="bold"),
            ProgressBar(total=max(1, self.total_steps), completed=self._step, width=width),
            Text(f"{self._step}/{self.total_steps}  {100 * done:.0f}%  {elapsed}"),
        )
        rows = [Text("  ".join(shown(n, self._metrics[n]) for n in _ordered(self._metrics, 10)))]
        rows.append(
            Text("  ".join(shown(n, v) for n, v in self._perf.items() if n not in HIDDEN), style="cyan")
        )
        if self._console.encoding.lower().startswith("utf") and len(self._losses) > 1:
            rows.append(Text(f"loss {sparkline(list(self._losses))}", style="green"))
        return Group(bar, *[row for row in rows if row.plain])
