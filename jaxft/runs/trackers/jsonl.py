"""metrics.jsonl: one JSON object per logged step, `{"step": 3, "loss": 1.25, ..., "perf": {...}}`.

Timings and memory are under "perf"; everything else is bit-identical in a run that is repeated or resumed.
Floats are written in full (the shortest text that reads back as the same float64). JSON has no NaN or
infinity: both are written as null.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxft.distributed.disk import write_durably
from jaxft.objectives.alarms import Entry
from jaxft.runs.chained_log import DigestWriter, whole_lines
from jaxft.runs.trackers.tracker import RunEnd

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"
HELD_OUT_ROWS = "held_out.jsonl"  # values of single held-out rows after the last step


def json_value(value: Any) -> Any:
    """The value as JSON has it: NaN and infinity as null."""
    if isinstance(value, dict):
        return {k: json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def format_line(step: int, metrics: dict[str, float], perf: dict[str, float]) -> str:
    """One line of metrics.jsonl without the newline. Raises ValueError for a metric called step or perf."""
    reserved = sorted({"step", "perf"} & metrics.keys())
    if reserved:
        raise ValueError(
            f"a metric cannot be called {reserved[0]!r}; rename it where the objective returns it"
        )
    entry = {"step": int(step), **json_value(metrics), **({"perf": json_value(perf)} if perf else {})}
    return json.dumps(entry, allow_nan=False)


def read_entries(path: Path) -> list[Entry]:
    """The objects of a metrics.jsonl; [] where there is none. A line that a killed run left half written is
    skipped.
    """
    return [entry for _, entry in _lines(path)]


def read_appended(path: Path, size: int) -> tuple[list[Entry], int]:
    """Return the entries after the first `size` bytes of a file, and its size; [] and 0 without one."""
    return [entry for _, entry in _lines(path, size)], path.stat().st_size if path.exists() else 0


def _lines(path: Path, start: int = 0) -> list[tuple[bytes, Entry]]:
    if not path.exists():
        return []
    lines = []
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    for text in content.splitlines(keepends=True):
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and text.endswith(b"\n"):
            lines.append((text, entry))
    return lines


def truncate(path: Path, step: int) -> list[Entry]:
    """Remove the entries after `step`, atomically; return the others.

    Step 0 is a fresh start: all entries are removed and its evaluation runs again.
    """
    lines = [(text, entry) for text, entry in _lines(path) if step > 0 and entry["step"] <= step]
    content = b"".join(text for text, _ in lines)
    if path.exists() and path.read_bytes() != content:
        write_durably(path, content)
    return [entry for _, entry in lines]


def step_ranges(steps: Iterable[int]) -> list[list[int]]:
    """Return steps as [first, last, distance between two], ascending."""
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and (ranges[-1][2] in (0, step - ranges[-1][1])):
            ranges[-1][1:] = [step, step - ranges[-1][1]]
        else:
            ranges.append([step, step, 0])
    return ranges


class EntrySteps:
    """The steps of the entries of a file, which a checkpoint stores."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self._steps = [entry["step"] for entry in entries]

    def add(self, step: int) -> None:
        """Add the step of a new entry."""
        self._steps.append(step)

    def logged(self) -> dict[str, Any]:
        """Return the number of entries and their steps, as JSON that `missing` takes."""
        return {"entries": len(self._steps), "steps": step_ranges(self._steps)}

    def missing(self, logged: dict[str, Any]) -> str:
        """Return which entries of an earlier `logged` are not there, "" if all are."""
        steps = {
            step for first, last, every in logged["steps"] for step in range(first, last + 1, every or 1)
        }
        missing = step_ranges(steps.difference(self._steps))
        if missing:
            return "steps " + ", ".join(
                f"{first}" if first == last else f"{first}-{last}" + f" (every {every})" * (every > 1)
                for first, last, every in missing
            )
        count = logged["entries"] - len(self._steps)
        return f"{count} of {logged['entries']} entries" if count > 0 else ""


class Jsonl:
    """Appends to a metrics.jsonl that was truncated at `start_step`, with digests (see chained_log).

    steps: of its entries.
    """

    def __init__(self, path: Path, start_step: int = 0):
        entries = truncate(path, start_step)
        self._repeated = [_without_perf(entry) for entry in entries if entry["step"] == start_step]
        self.steps = EntrySteps(entries)
        self._digests = DigestWriter(path, whole_lines(path))
        self._file = path.open("ab")

    def has(self, entry: Entry) -> bool:
        """Whether the file had this entry before the restart."""
        return entry in self._repeated

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Append a line and flush it."""
        line = (format_line(step, metrics, perf) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._digests.add(line)
        self.steps.add(step)

    def close(self, end: RunEnd) -> None:
        """Close the file and that of its digests."""
        self._file.close()
        self._digests.close()


def _without_perf(entry: Entry) -> Entry:
    return {name: value for name, value in entry.items() if name != "perf"}
