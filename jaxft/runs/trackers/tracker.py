"""The Tracker type, which callbacks have too, and how a run opens the optional ones by name."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, TypeAlias

from jaxft.runs import trackers

OPEN = ("tensorboard",)  # trackers that every run has; naming one changes nothing
ALWAYS = ("tracker", "jsonl", "console", *OPEN)  # files of this folder that are not optional trackers

RunEnd: TypeAlias = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be resumed


class Tracker(Protocol):
    """A destination of metrics, or a callback of a run that is started from Python. The file of a tracker
    that settings name has `open_tracker(folder, start_step) -> Tracker`, and PACKAGES, the optional packages
    that it imports.

    A resumed run opens its trackers again with the step that it continues from; entries after that step are
    to be replaced.
    """

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool | None:
        """Record the metrics after `step` optimizer steps. One step may have several calls, with different
        metrics: those of training, and of an evaluation as eval_*. True ends the run after this step.
        """

    def close(self, end: RunEnd) -> None:
        """Flush and finish. end: how the run ended."""


class FunctionTracker:
    """A function (step, metrics) as a tracker."""

    def __init__(self, function: Callable[[int, dict[str, float]], object]):
        self._function = function

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool:
        """Call the function; True ends the run."""
        return self._function(step, with_perf(metrics, perf)) is True

    def close(self, end: RunEnd) -> None:
        """Do nothing."""


def with_perf(metrics: dict[str, float], perf: dict[str, float]) -> dict[str, float]:
    """One dict of both; timings and memory as perf/name."""
    return {**metrics, **{f"perf/{name}": value for name, value in perf.items()}}


def open_trackers(
    trackers_or_names: tuple[str | Tracker, ...], folder: Path, start_step: int
) -> list[Tracker]:
    """Return trackers, and open those that are given by name, without those that every run has. Raises
    ValueError, before any is open, for one that is unknown or whose package is missing.
    """
    names = [one for one in trackers_or_names if isinstance(one, str)]
    known = sorted(m.name for m in pkgutil.iter_modules(trackers.__path__) if m.name not in ALWAYS)
    for name in names:
        if name not in (*known, *OPEN):
            raise ValueError(f"trackers has {name!r}; known are {', '.join(sorted((*known, *OPEN)))}")
    chosen = [name for name in names if name not in OPEN]
    modules = [importlib.import_module(f"{trackers.__name__}.{name}") for name in chosen]
    for module in modules:
        for package in module.PACKAGES:
            import_package(package)
    opened = [module.open_tracker(folder, start_step) for module in modules]
    return opened + [one for one in trackers_or_names if not isinstance(one, str)]


def import_package(package: str) -> ModuleType:
    """Import a tracker's package. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"trackers has {package!r}, which is not installed ({error}); run pip install 'jaxft[track]'"
        ) from error
