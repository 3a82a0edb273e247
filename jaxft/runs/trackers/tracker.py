"""The Tracker type, which callbacks have too, and how a run opens the optional ones by name."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias

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


class Callback:
    """A function (step, metrics), or the methods of an object that has those of a Tracker, as a tracker.

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
