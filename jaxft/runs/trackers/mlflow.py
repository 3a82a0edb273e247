"""MLflow. A restarted run continues the same MLflow run.

MLFLOW_TRACKING_URI is the address of the server, and MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID the
experiment without tracking.project. Without an address MLflow keeps a database in the working directory, for
which the package mlflow is needed; the extra `track` installs its client alone, mlflow-skinny.
"""

import math
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxft.runs.terminal import printable_line
from jaxft.runs.trackers.tracker import (
    ADAPTER,
    PROJECT,
    RunEnd,
    TrackedRun,
    Tracker,
    Tracking,
    flat_settings,
    import_package,
    tracked_run,
    upload_adapter,
    with_perf,
)

PACKAGES = ("mlflow",)
STATUS: dict[RunEnd, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
BATCH = 1000  # metrics of one request, MLflow's limit
PARAMS_BATCH, LONGEST_PARAM = 100, 500  # MLflow's limits; the second, of servers before 2.8


class MLflow:
    """Logs the run in a folder to an MLflow run. A server that fails during the run ends the logging there,
    not the run. artifact: whether its adapter is uploaded at the end.
    """

    def __init__(self, mlflow: ModuleType, run_id: str, folder: Path, artifact: bool):
        self._client, self._metric, self._run_id = mlflow.MlflowClient(), mlflow.entities.Metric, run_id
        self._folder, self._artifact = folder, artifact
        self._error, self._failed = mlflow.exceptions.MlflowException, False

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the finite metrics. MLflow shows the newest value of a step that is repeated after a
        restart.
        """
        if self._failed:
            return
        now = int(1000 * time.time())
        finite = {name: float(x) for name, x in with_perf(metrics, perf).items() if math.isfinite(x)}
        points = [self._metric(name, value, now, step) for name, value in finite.items()]
        try:
            for begin in range(0, len(points), BATCH):
                self._client.log_batch(self._run_id, metrics=points[begin : begin + BATCH])
        except self._error as error:
            self._failed = True
            text = f"{_short(error)}; MLflow gets no metrics from step {step} on, metrics.jsonl has all"
            print(f"trackers=mlflow: {text}", file=sys.stderr)

    def close(self, end: RunEnd) -> None:
        """Upload the adapter of a finished run, and finish the MLflow run."""
        if not self._failed:
            if end == "finished" and self._artifact:
                upload_adapter("mlflow", self._folder, self._upload)
            try:
                self._client.set_terminated(self._run_id, STATUS[end])
            except self._error as error:
                print(f"trackers=mlflow: the run is not marked as {end}: {_short(error)}", file=sys.stderr)

    def _upload(self, adapter: Path) -> None:
        self._client.log_artifacts(self._run_id, str(adapter), ADAPTER)


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run whose id is stored in the folder. A new one gets the settings in the folder's config.json
    as parameters, which MLflow does not let a resumed run change.

    Raises ValueError if MLflow cannot be reached.
    """
    mlflow = import_package("mlflow")
    path, run = folder / "mlflow_id", tracked_run(folder)
    try:
        client = mlflow.MlflowClient()
        if not path.exists():
            path.write_text(_new_run(mlflow, client, folder.name, run))
        run_id = path.read_text().strip()
        client.update_run(run_id, status="RUNNING")
        return MLflow(mlflow, run_id, folder, run.tracking.artifact)
    except mlflow.exceptions.MlflowException as error:
        other = f", or remove {path} for a new MLflow run" if path.exists() else ""
        raise ValueError(
            f"trackers=mlflow: {_short(error)}. Set MLFLOW_TRACKING_URI to an MLflow server's address, or "
            f"install mlflow itself for a database in the working directory{other}"
        ) from error


def _new_run(mlflow: ModuleType, client: Any, name: str, run: TrackedRun) -> str:
    """Create a run with its settings; return its id."""
    tags = {tag: "true" for tag in run.tracking.tags}
    tags |= {"group": run.group} if run.group else {}
    run_id = client.create_run(_experiment(client, run.tracking), run_name=name, tags=tags).info.run_id
    flat = flat_settings(run.settings)
    params = [mlflow.entities.Param(key, str(value)[:LONGEST_PARAM]) for key, value in flat.items()]
    for begin in range(0, len(params), PARAMS_BATCH):
        client.log_batch(run_id, params=params[begin : begin + PARAMS_BATCH])
    return run_id


def _experiment(client: Any, tracking: Tracking) -> str:
    """Return the id of the experiment, which is made if there is none of this name."""
    number, name = os.environ.get("MLFLOW_EXPERIMENT_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if tracking.project is None and number and not name:
        return number
    name = tracking.project or name or PROJECT
    known = client.get_experiment_by_name(name)
    return known.experiment_id if known else client.create_experiment(name)


def _short(error: Exception) -> str:
    return printable_line(str(error))[:300]
