"""The Tracker type, and how a run opens the optional ones by name."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, TypeAlias

from jaxft.runs import trackers

OPEN = ("tensorboard",)  # trackers that every run has; naming one changes nothing
ALWAYS = ("tracker", "jsonl", "console", *OPEN)  # files of this folder that are not optional trackers

RunEnd: TypeAlias = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be resumed


class Tracker(Protocol):
    """A destination of metrics. Its file has `open_tracker(folder, start_step) -> Tracker`, and PACKAGES, the
    optional packages that it imports.

    A resumed run opens its trackers again with the step that it continues from; entries after that step are
    to be replaced.
    """

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Record the metrics after `step` optimizer steps. One step may have several calls, with different
        metrics.
        """

    def close(self, end: RunEnd) -> None:
        """Flush and finish. end: how the run ended."""


def with_perf(metrics: dict[str, float], perf: dict[str, float]) -> dict[str, float]:
    """One dict of both; timings and memory as perf/name."""
    return {**metrics, **{f"perf/{name}": value for name, value in perf.items()}}


def open_trackers(names: tuple[str, ...], folder: Path, start_step: int) -> list[Tracker]:
    """Open optional trackers, without those that every run has. Raises ValueError, before any is open, for
    one that is unknown or whose package is missing.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(trackers.__path__) if m.name not in ALWAYS)
    for name in names:
        if name not in (*known, *OPEN):
            raise ValueError(f"trackers has {name!r}; known are {', '.join(sorted((*known, *OPEN)))}")
    chosen = [name for name in names if name not in OPEN]
    modules = [importlib.import_module(f"{trackers.__name__}.{name}") for name in chosen]
    for module in modules:
        for package in module.PACKAGES:
            import_package(package)
    return [module.open_tracker(folder, start_step) for module in modules]


def import_package(package: str) -> ModuleType:
    """Import a tracker's package. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"trackers has {package!r}, which is not installed ({error}); run pip install 'jaxft[track]'"
        ) from error
