"""MLflow. A restarted run continues the same MLflow run.

MLFLOW_TRACKING_URI is the address of the server. Without it MLflow keeps a database in the working directory,
for which the package mlflow is needed; the extra `track` installs its client alone, mlflow-skinny.
"""

import math
import sys
import time
from pathlib import Path
from types import ModuleType

from jaxft.runs.terminal import printable_line
from jaxft.runs.trackers.tracker import RunEnd, Tracker, import_package, with_perf

PACKAGES = ("mlflow",)
EXPERIMENT = "jaxft"
STATUS: dict[RunEnd, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
BATCH = 1000  # metrics of one request, MLflow's limit


class MLflow:
    """Logs to an MLflow run. A server that fails during the run ends the logging there, not the run."""

    def __init__(self, mlflow: ModuleType, run_id: str):
        self._client, self._metric, self._run_id = mlflow.MlflowClient(), mlflow.entities.Metric, run_id
        self._error, self._failed = mlflow.exceptions.MlflowException, False

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the finite metrics. Those of a step that is repeated after a restart replace nothing: MLflow
        shows the newest.
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
        """Finish the MLflow run."""
        if not self._failed:
            try:
                self._client.set_terminated(self._run_id, STATUS[end])
            except self._error as error:
                print(f"trackers=mlflow: the run is not marked as {end}: {_short(error)}", file=sys.stderr)


def open_tracker(folder: Path, start_step: int) -> Tracker:
    """Open the run of the experiment "jaxft" whose id is stored in the folder.

    Raises ValueError if MLflow cannot be reached.
    """
    mlflow = import_package("mlflow")
    path = folder / "mlflow_id"
    try:
        client = mlflow.MlflowClient()
        if not path.exists():
            known = client.get_experiment_by_name(EXPERIMENT)
            experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
            path.write_text(client.create_run(experiment, run_name=folder.name).info.run_id)
        run_id = path.read_text().strip()
        client.update_run(run_id, status="RUNNING")
        return MLflow(mlflow, run_id)
    except mlflow.exceptions.MlflowException as error:
        other = f", or remove {path} for a new MLflow run" if path.exists() else ""
        raise ValueError(
            f"trackers=mlflow: {_short(error)}. Set MLFLOW_TRACKING_URI to an MLflow server's address, or "
            f"install mlflow itself for a database in the working directory{other}"
        ) from error


def _short(error: Exception) -> str:
    return printable_line(str(error))[:300]
