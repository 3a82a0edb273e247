"""metrics.jsonl: one JSON object per logged step, `{"step": 3, "loss": 1.25, ..., "perf": {...}}`.

Timings and memory are under "perf"; everything else is bit-identical in a run that is repeated or resumed.
Floats are written in full (the shortest text that reads back as the same float64). JSON has no NaN or
infinity: both are written as null.

The lines are chained by digests, so that a line that is changed, removed, added or moved is found: line n of
metrics_digests.jsonl is the SHA-256 of the digest before it and of line n of the log. At the end of a run,
digests of its other files follow. The last digest thus covers the whole record: once it is published, any
later change of the record is found.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxft.distributed.disk import fsync, write_durably
from jaxft.objectives.alarms import Entry
from jaxft.runs.trackers import RunEnd
from jaxft.weights.hf.complete_folders import files_sha256

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"
DIGEST, FILE = "digest", "file"  # keys of metrics_digests.jsonl
HELD_OUT_ROWS = "held_out.jsonl"  # values of single held-out rows after the last step

# Metrics of rollouts (jaxft/rl); the file of an objective has the names of its own
REWARD = "reward"
COMPLETION_KL = "objective/kl"
COMPLETION_LENGTH = "completions/mean_length"

# Metrics of the train loop (jaxft/train)
SCORES = "scores/"  # prefix of the mean scores of held-out completions, by the name of the function
LEARNING_RATE, EPOCH, TOKENS = "learning_rate", "epoch", "num_tokens"
SECONDS, SPEED, MFU, MEMORY = "seconds", "tokens_per_second", "mfu", "memory_gib"
EVALUATION_SECONDS, SAMPLING_SECONDS = "evaluation_seconds", "sampling_seconds"  # since the last entry


def json_value(value: Any) -> Any:
    """Return a value as JSON can express it: NaN and infinity become None, tuples lists."""
    if isinstance(value, dict):
        return {k: json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def format_line(step: int, metrics: dict[str, float], perf: dict[str, float]) -> str:
    """Format a line of metrics.jsonl without newline. Raises ValueError for a metric called step or perf."""
    reserved = sorted({"step", "perf"} & metrics.keys())
    if reserved:
        raise ValueError(
            f"a metric cannot be called {reserved[0]!r}; rename it where the objective returns it"
        )
    entry = {"step": int(step), **json_value(metrics), **({"perf": json_value(perf)} if perf else {})}
    return json.dumps(entry, allow_nan=False)


def read_entries(path: Path) -> list[Entry]:
    """Return the objects of a metrics.jsonl, [] if it does not exist. Lines that are not an object with a
    "step" are skipped, such as a line that a killed run left half written.
    """
    return [entry for _, entry in _lines(path)]


def read_appended(path: Path, size: int) -> tuple[list[Entry], int]:
    """Return (entries appended to a log since it had `size` bytes, its size now in bytes); ([], 0) if the
    log does not exist.
    """
    return [entry for _, entry in _lines(path, size)], path.stat().st_size if path.exists() else 0


def _lines(path: Path, start: int = 0) -> list[tuple[bytes, Entry]]:
    lines = []
    for text in whole_lines(path, start):
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            lines.append((text, entry))
    return lines


def truncate(path: Path, step: int) -> list[Entry]:
    """Remove the entries of steps later than `step` from a log, where a run resumes. Return the
    remaining entries.

    step 0 removes all entries, also step 0's, because a fresh run evaluates at step 0 again. The file is
    replaced atomically. Lines that are not entries, such as a half-written one, are removed too.
    """
    lines = [(text, entry) for text, entry in _lines(path) if step > 0 and entry["step"] <= step]
    content = b"".join(text for text, _ in lines)
    if path.exists() and path.read_bytes() != content:
        write_durably(path, content)
    return [entry for _, entry in lines]


def step_ranges(steps: Iterable[int]) -> list[list[int]]:
    """Return steps as ascending ranges [first, last, stride]; the stride of a single step is 0.

    >>> step_ranges([0, 10, 20, 25])
    [[0, 20, 10], [25, 25, 0]]
    """
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and (ranges[-1][2] in (0, step - ranges[-1][1])):
            ranges[-1][1:] = [step, step - ranges[-1][1]]
        else:
            ranges.append([step, step, 0])
    return ranges


class EntrySteps:
    """The steps of a log's entries, which a checkpoint stores to find lost entries."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self._steps = [entry["step"] for entry in entries]

    def add(self, step: int) -> None:
        """Add the step of a new entry."""
        self._steps.append(step)

    def logged(self) -> dict[str, Any]:
        """Return the number of entries and their steps, as JSON that `missing` takes."""
        return {"entries": len(self._steps), "steps": step_ranges(self._steps)}

    def missing(self, logged: dict[str, Any]) -> str:
        """Return which entries of an earlier `logged` are missing: "steps 3-9", "2 of 9 entries" or ""."""
        ranges = [range(first, last + 1, every or 1) for first, last, every in logged["steps"]]
        missing = step_ranges(set().union(*ranges).difference(self._steps))
        if missing:
            return "steps " + ", ".join(
                f"{first}" if first == last else f"{first}-{last}" + f" (every {every})" * (every > 1)
                for first, last, every in missing
            )
        count = logged["entries"] - len(self._steps)
        return f"{count} of {logged['entries']} entries" if count > 0 else ""


class Jsonl:
    """Truncates a metrics.jsonl after `start_step` and appends to it, and writes its digests.

    steps: the EntrySteps of the file.
    """

    def __init__(self, path: Path, start_step: int = 0):
        entries = truncate(path, start_step)
        self._repeated = [without_perf(entry) for entry in entries if entry["step"] == start_step]
        self.steps = EntrySteps(entries)
        self._digests = DigestWriter(path, whole_lines(path))
        self._file = path.open("ab")

    def has(self, entry: Entry) -> bool:
        """Return whether the file had this entry at the step of the restart, "perf" not compared."""
        return entry in self._repeated

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Append a line and flush it."""
        line = (format_line(step, metrics, perf) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._digests.add(line)
        self.steps.add(step)

    def close(self, end: RunEnd) -> None:
        """Close metrics.jsonl and the file of its digests."""
        self._file.close()
        self._digests.close()


def without_perf(entry: Entry) -> Entry:
    """Return an entry without its timings and memory, which differ between equal runs."""
    return {name: value for name, value in entry.items() if name != "perf"}


def digests_path(log: Path) -> Path:
    """Return the path of a log's digests.

    >>> digests_path(Path("runs/sft/metrics.jsonl")).name
    'metrics_digests.jsonl'
    """
    return log.with_name(f"{log.stem}_digests.jsonl")


def next_digest(before: str, content: bytes) -> str:
    """Return the digest of a line. before: the digest of the line before it, "" for the first."""
    return hashlib.sha256(f"{before}\n".encode() + content).hexdigest()


def whole_lines(path: Path, start: int = 0) -> list[bytes]:
    """Return the lines of a file from byte `start` on, except a last one that is half written; [] if the file
    does not exist.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(start)
        return [line for line in file if line.endswith(b"\n")]


class DigestWriter:
    """Appends digests to the digests file of a log. kept: the lines that the log has now. Digests of later
    lines and of other files are removed.

    Lines without a digest, which a killed process may leave, get one. A digest that does not fit its line is
    not corrected, so that the change is still found.
    """

    def __init__(self, log: Path, kept: list[bytes]):
        self._path = digests_path(log)
        known = [entry for entry in _entries(self._path) if FILE not in entry][: len(kept)]
        self.last = known[-1][DIGEST] if known else ""
        for line in kept[len(known) :]:
            self.last = next_digest(self.last, line)
            known.append({DIGEST: self.last})
        content = "".join(f"{json.dumps(entry)}\n" for entry in known).encode()
        if not self._path.is_file() or self._path.read_bytes() != content:
            write_durably(self._path, content)
        self._file = self._path.open("ab")

    def add(self, content: bytes, **more: str) -> None:
        """Append the digest of a line of the log, or of a line about another file. more: further keys."""
        self.last = next_digest(self.last, content)
        self._file.write((json.dumps({**more, DIGEST: self.last}) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file and sync it to disk."""
        self._file.close()
        fsync(self._path)


def add_files(log: Path, files: Iterable[Path]) -> str:
    """Append digests of the `files` that exist to the digests of a finished log; return the last digest."""
    writer = DigestWriter(log, whole_lines(log))
    for path in filter(Path.is_file, files):
        (sha256,) = files_sha256([path])
        writer.add(f"{path.name} {sha256}\n".encode(), **{FILE: path.name, "sha256": sha256})
    writer.close()
    return writer.last


def digested_files(log: Path) -> set[str]:
    """Return the names of the files whose digests add_files has appended to the digests of a log."""
    return {entry[FILE] for entry in _entries(digests_path(log)) if FILE in entry}


def append_entry(log: Path, entry: dict[str, Any]) -> None:
    """Append a JSON object to a log, and its digest; sync both to disk."""
    kept, line = whole_lines(log), (json.dumps(entry, allow_nan=False) + "\n").encode()
    writer = DigestWriter(log, kept)
    with log.open("ab") as file:
        file.write(line)
    fsync(log)
    writer.add(line)
    writer.close()


def read_unfinished(log: Path) -> list[dict[str, Any]]:
    """Return the entries of a log that a killed process may have left incomplete, [] without a log. A last
    line that has no digest is removed. Raises the errors of check_chain.
    """
    if not log.is_file():
        return []
    count = sum(FILE not in entry for entry in _entries(digests_path(log)))
    kept = whole_lines(log)
    kept = kept[:count] if len(kept) == count + 1 else kept
    if log.read_bytes() != b"".join(kept):
        write_durably(log, b"".join(kept))
    check_chain(log)
    return [json.loads(line) for line in kept]


def check_chain(log: Path) -> str:
    """Return the last digest of a log. Raises ValueError for the first line or file that has changed since
    its digest was written, and FileNotFoundError for a log without digests.
    """
    path = digests_path(log)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; restore it (logs of earlier versions never had one)")
    lines, entries, last = whole_lines(log), _entries(path, strict=True), ""
    count = sum(FILE not in entry for entry in entries)
    if log.is_file() and not log.read_bytes() == b"".join(lines):
        raise ValueError(f"{log}: its last line is incomplete; restore the file")
    for number, entry in enumerate(entries, 1):
        if FILE in entry:
            file = log.with_name(entry[FILE])
            if not file.is_file() or files_sha256([file]) != [entry["sha256"]]:
                raise ValueError(f"{file}: the file was changed after it was written; restore it")
            content = f"{entry[FILE]} {entry['sha256']}\n".encode()
        elif number > len(lines):
            raise ValueError(f"{log}: has {len(lines)} lines, expected {count}; restore the file")
        else:
            content = lines[number - 1]
        if entry[DIGEST] != next_digest(last, content):
            raise ValueError(
                f"{log}:{number}: the line was changed after it was written, or its digest was; restore the "
                "file"
            )
        last = entry[DIGEST]
    if len(lines) != count:
        raise ValueError(f"{log}: has {len(lines)} lines, expected {count}; restore the file")
    return last


def _entries(path: Path, strict: bool = False) -> list[dict[str, Any]]:
    """Return the entries of a digests file up to the first invalid line. strict: raise ValueError for it."""
    entries = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            entry = json.loads(line)
            is_entry = isinstance(entry[DIGEST], str) and (json.dumps(entry) + "\n").encode() == line
        except (ValueError, KeyError, TypeError):
            is_entry = False
        if not is_entry:
            if strict:
                raise ValueError(f"{path}:{number}: not a digest as jaxft writes it; restore the file")
            break
        entries.append(entry)
    if strict and path.read_bytes() != b"".join(whole_lines(path)):
        raise ValueError(f"{path}: its last line is incomplete; restore the file")
    return entries
