"""Trackio. A restarted run continues the run of its name."""

from pathlib import Path
from types import ModuleType

from jaxft.runs.trackers.tracker import (
    ADAPTER,
    PROJECT,
    RunEnd,
    Tracker,
    flat_settings,
    import_package,
    tracked_run,
    upload_adapter,
    with_perf,
)

PACKAGES = ("trackio",)


class Trackio:
    """Logs the run in a folder to the open run of a trackio module. artifact: whether its adapter is stored
    at the end.
    """

    def __init__(self, trackio: ModuleType, folder: Path, artifact: bool):
        self._trackio, self._folder, self._artifact = trackio, folder, artifact

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the metrics."""
        self._trackio.log(with_perf(metrics, perf), step=step)

    def close(self, end: RunEnd) -> None:
        """Store the adapter of a finished run, and finish the run."""
        if end == "finished" and self._artifact:
            upload_adapter("trackio", self._folder, self._upload)
        self._trackio.finish()

    def _upload(self, adapter: Path) -> None:
        name = f"{self._folder.name}-{ADAPTER}"
        self._trackio.log_artifact(str(adapter), name=name, type="model")


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run that is named like the folder, with the settings in its config.json. Tags, which Trackio
    does not have, are one of these.
    """
    settings, tracking = tracked_run(folder)
    trackio = import_package("trackio")
    trackio.init(
        project=tracking.project or PROJECT,
        name=folder.name,
        group=tracking.group,
        config=flat_settings(settings),
        resume="allow",
    )
    return Trackio(trackio, folder, tracking.artifact)
