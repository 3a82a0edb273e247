"""Trackio. A restarted run continues the run of its name.

Trackio's present run is a context variable: each run has a context of its own, so that the members of a sweep
are runs at the same time.
"""

from contextvars import Context
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
    """Logs the run in a folder to the open run of a trackio module in a context. artifact: whether its
    adapter is stored at the end.
    """

    def __init__(self, trackio: ModuleType, context: Context, folder: Path, artifact: bool):
        self._trackio, self._context, self._folder, self._artifact = trackio, context, folder, artifact

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the metrics."""
        self._context.run(self._trackio.log, with_perf(metrics, perf), step=step)

    def close(self, end: RunEnd) -> None:
        """Store the adapter of a finished run, and finish the run."""
        if end == "finished" and self._artifact:
            upload_adapter("trackio", self._folder, self._upload)
        self._context.run(self._trackio.finish)

    def _upload(self, adapter: Path) -> None:
        name = f"{self._folder.name}-{ADAPTER}"
        self._context.run(self._trackio.log_artifact, str(adapter), name=name, type="model")


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run that is named like the folder, with the settings in its config.json. Tags, which Trackio
    does not have, are one of these.
    """
    run, context = tracked_run(folder), Context()
    trackio = import_package("trackio")
    context.run(
        trackio.init,
        project=run.tracking.project or PROJECT,
        name=folder.name,
        group=run.group,
        config=flat_settings(run.settings),
        resume="allow",
    )
    return Trackio(trackio, context, folder, run.tracking.artifact)
