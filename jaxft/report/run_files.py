"""Read the files of a run's folder that its report shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.objectives.alarms import Entry
from jaxft.report.ranking import read_held_out
from jaxft.runs.log import ALARMS_JSON
from jaxft.runs.metrics_log import COMPLETIONS, METRICS, read_entries
from jaxft.runs.run_record import DATA_JSON, PARAMETERS_JSON, SUMMARY, read_saved_json
from jaxft.runs.run_texts import Sample


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's folder; {} and [] for a file that does not exist (yet).

    settings, environment: config.json and env.json. entries: the lines of metrics.jsonl. is_finished:
    summary.json is of the last step (a run that was extended has one of an earlier step). notes, alarms: the
    run's messages. before, after: samples for held-out prompts, before and after training. completions: the
    lines of completions.jsonl. parameters: rows of the parameter table. data: see inspection.data_summary.
    rows: see ranking.read_held_out. seconds: phase of a finished run -> its time.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    entries: list[Entry]
    is_finished: bool
    notes: list[str]
    alarms: list[str]
    before: list[Sample]
    after: list[Sample]
    completions: list[dict[str, Any]]
    parameters: list[dict[str, Any]]
    data: dict[str, Any]
    rows: dict[str, dict[str, float]]
    seconds: dict[str, float]


def runs_among(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return (folders of runs and sweeps, other existing paths), since a pattern such as runs/seeds/* matches
    both. A single path is not checked, nor are several of which none is a run: they are in the first list.
    """
    if len(paths) < 2:
        return list(paths), []
    others = [path for path in paths if path.exists() and not (path / METRICS).is_file()]
    others = [path for path in others if path.is_file() or not sweep_members(path)]
    kept = [path for path in paths if path not in others]
    return (kept, others) if kept else (list(paths), [])


def folders_of_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the folders of runs by name; a sweep's folder is replaced by its members' folders.

    Raises ValueError for a folder without metrics.jsonl, and for two runs of the same name.
    """
    by_label: dict[str, Path] = {}
    for path in paths:
        members = sweep_members(path)
        for label, folder in members.items() if members else [(path.resolve().name, path)]:
            if not (folder / METRICS).is_file():
                remedy = "use the folder of a run or a sweep, such as runs/sft"
                raise ValueError(f"{folder}: has no metrics.jsonl; {remedy}")
            if label in by_label:
                raise ValueError(
                    f"{folder} and {by_label[label]}: both are called {label}; rename one of the folders, or "
                    "leave one out"
                )
            by_label[label] = folder
    return by_label


def sweep_members(folder: Path) -> dict[str, Path]:
    """Return label -> folder of each run of a sweep, {} if the folder is not of a sweep."""
    path = folder / "config.json"
    labels = read_saved_json(path).get("members", []) if path.is_file() else []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: members is not a list of names: {str(labels)[:80]}; restore the file")
    if wrong := [label for label in labels if Path(label).name != label]:
        raise ValueError(f"{path}: members: {wrong[0]!r} is no folder in {folder}; restore the file")
    return {label: folder / label for label in labels}


def read_run(name: str, folder: Path) -> RunFiles:
    """Read a run, finished or not. Raises ValueError that names a damaged file."""
    entries = read_entries(folder / METRICS)
    if not entries:
        raise ValueError(f"{folder / METRICS}: has no entry yet; wait for the first step")
    summary = _json(folder / SUMMARY)
    is_finished = bool(summary) and summary.get("steps") == entries[-1]["step"]
    if not is_finished:
        summary = _json(folder / ALARMS_JSON)
    return RunFiles(
        name=name,
        folder=folder,
        settings=_json(folder / "config.json"),
        environment=_json(folder / "env.json"),
        entries=entries,
        is_finished=is_finished,
        notes=_list(summary, "notes", str),
        alarms=_list(summary, "alarms", str),
        before=[_sample(x) for x in _list(summary.get("before"), "samples", dict)],
        after=[_sample(x) for x in _list(summary.get("after"), "samples", dict)],
        completions=[dict(entry) for entry in read_entries(folder / COMPLETIONS)],
        parameters=_list(_json(folder / PARAMETERS_JSON), "rows", dict),
        data=_json(folder / DATA_JSON),
        rows=read_held_out(folder),
        seconds=_seconds(summary.get("perf")),
    )


def _seconds(perf: Any) -> dict[str, float]:
    """Return phase -> seconds from `perf` of a summary.json, {} if it has another form."""
    phases = perf.get("seconds") if isinstance(perf, dict) else None
    items = phases.items() if isinstance(phases, dict) else ()
    return {name: float(x) for name, x in items if isinstance(x, int | float) and not isinstance(x, bool)}


def _json(path: Path) -> dict[str, Any]:
    return read_saved_json(path) if path.exists() else {}


def _list(record: Any, name: str, kind: type) -> list[Any]:
    """Return the values of type `kind` in the list record[name]; [] without such a list."""
    values = record.get(name) if isinstance(record, dict) else None
    return [x for x in values if isinstance(x, kind)] if isinstance(values, list) else []


def _sample(record: dict[str, Any]) -> Sample:
    names = ("prompt", "completion", "reference")
    prompt, completion, reference = (str(record.get(name, "")) for name in names)
    return Sample(prompt=prompt, completion=completion, reference=reference, finish="stop")
