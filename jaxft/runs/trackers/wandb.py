"""Weights & Biases. A restarted run continues the same W&B run."""

import secrets
from pathlib import Path
from typing import Any

from jaxft.runs.trackers.tracker import RunEnd, Tracker, import_package, with_perf

PACKAGES = ("wandb",)


class WandB:
    """Logs to a W&B run."""

    def __init__(self, run: Any):
        self._run = run

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the metrics, with the step as one of them."""
        self._run.log({**with_perf(metrics, perf), "step": step})

    def close(self, end: RunEnd) -> None:
        """Finish the W&B run, which W&B shows as failed if this run is not finished."""
        self._run.finish(exit_code=int(end != "finished"))


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run of project "jaxft" whose id is stored in the folder."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    settings = {"name": folder.name, "id": path.read_text().strip(), "dir": str(folder)}
    run = import_package("wandb").init(project="jaxft", resume="allow", **settings)
    run.define_metric("*", step_metric="step")  # W&B's own step cannot go back to a checkpoint's
    return WandB(run)
