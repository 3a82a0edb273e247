"""Weights & Biases. A restarted run continues the same W&B run. The members of a sweep, which are trained at
the same time, have a W&B run each.

WANDB_PROJECT, WANDB_RUN_GROUP and WANDB_TAGS count where the settings of `tracking` are not given; of W&B's
other variables, such as WANDB_ENTITY and WANDB_MODE, all do.
"""

import os
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxft.runs.trackers.tracker import (
    ADAPTER,
    PROJECT,
    RunEnd,
    Tracker,
    import_package,
    tracked_run,
    upload_adapter,
    with_perf,
)

PACKAGES = ("wandb",)


class WandB:
    """Logs the run in a folder to a W&B run. artifact: whether its adapter is uploaded at the end."""

    def __init__(self, wandb: ModuleType, run: Any, folder: Path, artifact: bool):
        self._wandb, self._run, self._folder, self._artifact = wandb, run, folder, artifact

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the metrics, with the step as one of them."""
        self._run.log({**with_perf(metrics, perf), "step": step})

    def close(self, end: RunEnd) -> None:
        """Upload the adapter of a finished run, and finish the W&B run, which W&B shows as failed if this run
        is not finished.
        """
        if end == "finished" and self._artifact:
            upload_adapter("wandb", self._folder, self._upload)
        self._run.finish(exit_code=int(end != "finished"))

    def _upload(self, adapter: Path) -> None:
        artifact = self._wandb.Artifact(f"{self._run.id}-{ADAPTER}", type="model")
        artifact.add_dir(str(adapter))
        self._run.log_artifact(artifact)


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run whose id is stored in the folder, with the settings in its config.json."""
    settings, tracking, sweep = tracked_run(folder)
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    wandb = import_package("wandb")
    run = wandb.init(
        project=tracking.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        group=tracking.group or os.environ.get("WANDB_RUN_GROUP") or sweep,
        tags=tracking.tags or None,
        config=settings,
        allow_val_change=True,  # a resumed run may have other settings
        name=folder.name,
        id=path.read_text().strip(),
        dir=str(folder),
        resume="allow",
        reinit="create_new" if sweep else None,  # does not end the other members' runs
    )
    run.define_metric("*", step_metric="step")  # W&B's own step cannot go back to a checkpoint's
    return WandB(wandb, run, folder, tracking.artifact)
