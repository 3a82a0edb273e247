"""The Tracker type, which callbacks have too, and how a run opens the optional ones by name."""

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from jaxft.runs import trackers
from jaxft.runs.terminal import printable_line

OPEN = ("tensorboard",)  # trackers that every run has; naming one changes nothing
ALWAYS = ("tracker", "jsonl", "console", *OPEN)  # files of this folder that are not optional trackers

PROJECT = "jaxft"  # where neither a setting nor the tracker's environment variable names one
ADAPTER = "adapter"  # the folder of a run that is uploaded

RunEnd: TypeAlias = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be resumed


@dataclass(frozen=True)
class Tracking:
    """How optional trackers file a run.

    project: of W&B and Trackio, experiment of MLflow; None for WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or
    MLFLOW_EXPERIMENT_ID, or else jaxft. group: runs that are shown together; None for the sweep that the
    run is a member of. tags: words to filter runs by. artifact: upload the adapter at the end; full weights
    are never uploaded.
    """

    project: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    artifact: bool = True

    def __post_init__(self) -> None:
        for name in ("project", "group"):
            if getattr(self, name) == "":
                raise ValueError(f"tracking.{name} is empty; give a name, or none")


class TrackedRun(NamedTuple):
    """A run's settings as its config.json has them, how trackers file it, and the sweep that it is a member
    of, None for a run alone.
    """

    settings: dict[str, Any]
    tracking: Tracking
    sweep: str | None = None

    @property
    def group(self) -> str | None:
        """The group that is set, or else the sweep."""
        return self.tracking.group or self.sweep


class Tracker(Protocol):
    """A destination of metrics, or a callback of a run that is started from Python. The file of a tracker
    that settings name has `open_tracker(folder, start_step) -> Tracker`, and PACKAGES, the optional packages
    that it imports.

    A resumed run opens its trackers again with the step that it continues from; entries after that step are
    to be replaced.
    """

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool | None:
        """Record the metrics after `step` optimizer steps. One step may have several calls, with different
        metrics: of training, and of an evaluation as eval_*. True ends the run after this step.
        """

    def close(self, end: RunEnd) -> None:
        """Flush and finish. end: how the run ended."""


class Callback:
    """A function (step, metrics), or an object with the methods of a Tracker, as a tracker.

    Metrics contain timings and memory as perf/name. An error that it raises becomes a RuntimeError, which
    keeps its traceback. Raises ValueError for anything else than these two.
    """

    def __init__(self, callback: Any):
        is_function = callable(callback)
        if not is_function and not {"log", "close"} <= {*dir(callback)}:
            raise ValueError(
                "a callback is a function (step, metrics), or an object with the methods log(step, metrics, "
                f"perf) and close(end); got {type(callback).__name__}"
            )
        self._callback, self._is_function = callback, is_function

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool:
        """Call it; True ends the run."""
        try:
            if self._is_function:
                return self._callback(step, with_perf(metrics, perf)) is True
            return self._callback.log(step, metrics, perf) is True
        except Exception as error:
            raise RuntimeError(
                f"a callback raised {type(error).__name__} after step {step}: {error}"
            ) from error

    def close(self, end: RunEnd) -> None:
        """Close an object."""
        if not self._is_function:
            self._callback.close(end)


def with_perf(metrics: dict[str, float], perf: dict[str, float]) -> dict[str, float]:
    """One dict of both; timings and memory as perf/name."""
    return {**metrics, **{f"perf/{name}": value for name, value in perf.items()}}


def tracked_run(folder: Path) -> TrackedRun:
    """Read the run in a folder; without a config.json, one without settings."""
    settings, above = (_read_settings(place) for place in (folder, folder.parent))
    fields = settings.get("tracking") or {}
    tracking = Tracking(**{**fields, "tags": tuple(fields.get("tags", ()))})
    is_member = folder.name in (above.get("members") or ())
    return TrackedRun(settings, tracking, folder.parent.name if is_member else None)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return settings


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names, as on the command line, without None."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def check_trackers(trackers_or_names: tuple[str | Tracker, ...]) -> list[ModuleType]:
    """Import optional trackers and their packages. Raises ValueError for one that is unknown or whose package
    is missing.
    """
    names = [one for one in trackers_or_names if isinstance(one, str)]
    known = sorted(m.name for m in pkgutil.iter_modules(trackers.__path__) if m.name not in ALWAYS)
    for name in names:
        if name not in (*known, *OPEN):
            raise ValueError(f"trackers has {name!r}; use {', '.join(sorted((*known, *OPEN)))}")
    chosen = [name for name in names if name not in OPEN]
    modules = [importlib.import_module(f"{trackers.__name__}.{name}") for name in chosen]
    for module in modules:
        for package in module.PACKAGES:
            import_package(package)
    return modules


def open_trackers(
    trackers_or_names: tuple[str | Tracker, ...], folder: Path, start_step: int
) -> list[Tracker]:
    """Open the optional trackers that are given by name; return them and the given objects. Raises as
    check_trackers does, before any is open.
    """
    opened = [module.open_tracker(folder, start_step) for module in check_trackers(trackers_or_names)]
    return opened + [one for one in trackers_or_names if not isinstance(one, str)]


def upload_adapter(tracker: str, folder: Path, send: Callable[[Path], object]) -> None:
    """Send the adapter of a run, if it has one. A failure is reported on standard error and ends nothing,
    since the run has its results.
    """
    if not (folder / ADAPTER).is_dir():
        return
    try:
        send(folder / ADAPTER)
    except Exception as error:  # of storage, network or account, which each package reports in its own way
        text = printable_line(str(error))[:300] or type(error).__name__
        print(f"trackers={tracker}: the adapter is not uploaded: {text}", file=sys.stderr)


def import_package(package: str) -> ModuleType:
    """Import a tracker's package. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"trackers has {package!r}, which is not installed ({error}); run pip install 'jaxft[track]'"
        ) from error
