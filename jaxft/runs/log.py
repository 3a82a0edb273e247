"""The log of a run: metrics go to metrics.jsonl, TensorBoard, optional trackers and the terminal; alarms are
raised on the way.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxft.distributed.disk import fsync
from jaxft.objectives.alarms import Alarms, Entry
from jaxft.runs.console import ConsoleView
from jaxft.runs.metrics_log import (
    COMPLETIONS,
    METRICS,
    EntrySteps,
    Jsonl,
    format_line,
    read_appended,
    read_entries,
    truncate,
)
from jaxft.runs.run_record import write_durable_json
from jaxft.runs.trackers import RunEnd, TensorBoard, Tracker, check_trackers

ALARMS_JSON = "alarms.json"


class NullLog:
    """A log that writes nothing, for a process that does not write the run's folder."""

    def __init__(self) -> None:
        self.alarms: list[str] = []
        self.first: Entry = {}
        self.last: Entry = {}

    def step(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool:
        """Do nothing; return False, because no tracker ends the run."""
        return False

    def sync(self) -> dict[str, Any]:
        """Do nothing; return {}, since nothing is logged."""
        return {}

    def add_alarms(self, texts: list[str]) -> None:
        """Append the alarms to the list `alarms`, and write nothing."""
        self.alarms += texts

    def message(self, *_: Any) -> None:
        """Do nothing."""

    listen = ends_at = mark = progress = tabulate = close = message


class Log:
    """The log of the run in `folder`, resumed at `start_step`; entries after that step are discarded.

    quiet: print nothing. console: where to print, standard output by default. Attributes, set from `listen`
    on: alarms, all alarms of the run; first and last, the first and the newest value of each metric.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        trackers: tuple[str | Tracker, ...] = (),
        console: Console | None = None,
    ):
        self._folder, self._total_steps = Path(folder), total_steps
        self._folder.mkdir(parents=True, exist_ok=True)
        optional = [open_tracker(self._folder, start_step) for open_tracker in check_trackers(trackers)]
        optional += [tracker for tracker in trackers if not isinstance(tracker, str)]
        (self._folder / ALARMS_JSON).unlink(missing_ok=True)  # `listen` raises earlier alarms again
        self._jsonl = Jsonl(self._folder / METRICS, start_step)
        self._completions = EntrySteps(truncate(self._folder / COMPLETIONS, start_step))
        self._completions_size = read_appended(self._folder / COMPLETIONS, 0)[1]
        board = TensorBoard(self._folder / "tensorboard", start_step)
        self._trackers: list[Tracker] = [self._jsonl, *optional, board]
        console = Console(quiet=True, force_terminal=False) if quiet else console
        self._view = ConsoleView(self._folder.name, total_steps, start_step, console)
        self.alarms: list[str] = []
        self.first: Entry = {}
        self.last: Entry = {}
        self._end: RunEnd = "failed"
        self._memory: dict[str, Any] = {}
        self._alarms: Callable[[dict[str, Any], Entry, bool], Alarms] | None = None

    def step(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool:
        """Log the metrics after `step` optimizer steps. One step may have several calls with different
        metrics. Return True if a tracker asks to end the run. Raises OSError if the disk is full.

        An entry that was logged before the restart is not repeated.
        """
        entry = json.loads(format_line(step, metrics, {}))
        if self._jsonl.has(entry):
            return False
        try:
            ends = [tracker.log(step, metrics, perf) for tracker in self._trackers]
        except OSError as error:
            text = f"cannot write metrics: {error.strerror}. Free disk space, then repeat the command"
            raise OSError(error.errno, text, str(self._folder)) from error
        self._view.log(step, metrics, perf)
        for text in self._observe(entry):
            self.message(text)
        return True in ends

    def sync(self) -> dict[str, Any]:
        """Sync metrics and completions to disk. Return their entries' steps, which `missing` later checks."""
        for path in (self._folder / METRICS, self._folder / COMPLETIONS, self._folder):
            if path.exists():
                fsync(path)
        entries, self._completions_size = read_appended(self._folder / COMPLETIONS, self._completions_size)
        for entry in entries:
            self._completions.add(entry["step"])
        return {**self._jsonl.steps.logged(), "completions": self._completions.logged()}

    def missing(self, logged: dict[str, Any]) -> list[str]:
        """Return a warning for each of metrics.jsonl and completions.jsonl that has lost entries since a
        checkpoint. logged: the return value of `sync` that the checkpoint has stored.
        """
        missing = {METRICS: self._jsonl.steps.missing(logged)}
        if "completions" in logged:  # older checkpoints have none
            missing[COMPLETIONS] = self._completions.missing(logged["completions"])
        return [
            f"warning: {self._folder / name} has lost {entries}; the log goes on without them"
            for name, entries in missing.items()
            if entries
        ]

    def listen(self, alarms: Callable[[dict[str, Any], Entry, bool], Alarms]) -> None:
        """Call `alarms(memory, entry, last)` for every entry, and print the messages that it returns.

        memory: {} in the first call, then the first item of the objective.Alarms that the last call returned.
        last: whether the entry is the evaluation of the finished run. Entries from before a restart come
        first; their messages were printed then, and are not printed again.
        """
        self._alarms = alarms
        for entry in read_entries(self._folder / METRICS):
            self._observe(entry)

    def ends_at(self, step: int) -> None:
        """Make `step` the last step of the run: its next evaluation is of the finished run."""
        self._total_steps = step
        self._view.ends_at(step)

    def _observe(self, entry: Entry) -> list[str]:
        """Update `first` and `last` by an entry; return the messages and new alarms about it."""
        if self._alarms is None:
            return []
        self.first, self.last = {**entry, **self.first}, {**self.last, **entry}
        is_last = entry["step"] == self._total_steps and "loss" not in entry
        self._memory, messages, raised = self._alarms(self._memory, entry, is_last)
        new = [f"alarm after step {entry['step']}: {text}" for text in raised]
        new = [text for text in new if text not in self.alarms]  # the last step may have two evaluations
        self.add_alarms(new)
        return [*messages, *new]

    def add_alarms(self, texts: list[str]) -> None:
        """Append alarms to alarms.json at once, so that a run that ends early has them too."""
        if texts:
            self.alarms += texts
            write_durable_json(self._folder / ALARMS_JSON, {"alarms": self.alarms})

    def message(self, text: str) -> None:
        """Print a line, above the live view where there is one."""
        self._view.message(text)

    def progress(self, text: str) -> None:
        """Show the progress of a phase of the run, such as an evaluation; "" ends the phase."""
        self._view.progress(text)

    def tabulate(self, labels: Sequence[str]) -> None:
        """Show a sweep's metrics as a table in the terminal from now on, with a column for each label."""
        self._view.tabulate(labels)

    def mark(self, end: RunEnd) -> None:
        """Set how the run ended, which `close` passes to the trackers; without this call it is "failed"."""
        self._end = end

    def close(self) -> None:
        """Close all trackers and restore the terminal. A second call does nothing."""
        with contextlib.ExitStack() as stack:
            while self._trackers:
                stack.callback(self._trackers.pop(0).close, self._end)
            stack.callback(self._view.close)
