"""Trackio. A restarted run continues the run of its name."""

from pathlib import Path
from types import ModuleType

from jaxft.runs.trackers.tracker import RunEnd, Tracker, import_package, with_perf

PACKAGES = ("trackio",)


class Trackio:
    """Logs to the open run of a trackio module."""

    def __init__(self, trackio: ModuleType):
        self._trackio = trackio

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the metrics."""
        self._trackio.log(with_perf(metrics, perf), step=step)

    def close(self, end: RunEnd) -> None:
        """Finish the run."""
        self._trackio.finish()


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run of project "jaxft" that is named like the folder."""
    trackio = import_package("trackio")
    trackio.init(project="jaxft", name=folder.name, resume="allow")
    return Trackio(trackio)
