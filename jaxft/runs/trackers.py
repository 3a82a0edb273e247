"""Destinations of a run's metrics: the Tracker type, which callbacks have too, TensorBoard, which every run
has, and the optional W&B, Trackio and MLflow. A resumed run continues the same run in each tracker.
"""

import importlib
import json
import math
import os
import platform
import secrets
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from jaxft.runs.settings.setting_values import load_callable
from jaxft.runs.terminal import printable_line

OPEN = ("tensorboard",)  # trackers that every run has; naming one changes nothing
PROJECT = "jaxft"  # where neither a setting nor the tracker's environment variable names one
ADAPTER = "adapter"  # the folder of a run that is uploaded

RunEnd: TypeAlias = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to be resumed
MLFLOW_STATUS: dict[RunEnd, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
METRICS_BATCH = 1000  # of one request, MLflow's limit
PARAMS_BATCH, LONGEST_PARAM = 100, 500  # MLflow's limits; the second of servers before 2.8


@dataclass(frozen=True)
class Tracking:
    """Names and tags under which optional trackers store a run.

    project: project of W&B and Trackio, experiment of MLflow; none for WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME
    or MLFLOW_EXPERIMENT_ID, or else jaxft. group: runs that are shown together; none for the sweep that the
    run is a member of. tags: words to filter runs by. artifact: upload the adapter at the end; full weights
    are never uploaded.
    """

    project: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    artifact: bool = True

    def __post_init__(self) -> None:
        for name in ("project", "group"):
            if getattr(self, name) == "":
                raise ValueError(f"tracking.{name} is empty; give a name, or none")


class TrackedRun(NamedTuple):
    """A run as trackers receive it: its settings as in config.json, its Tracking, and the sweep that it is a
    member of, None for a run alone.
    """

    settings: dict[str, Any]
    tracking: Tracking
    sweep: str | None = None

    @property
    def group(self) -> str | None:
        """tracking.group, else the sweep; None without both."""
        return self.tracking.group or self.sweep


class Tracker(Protocol):
    """A destination of metrics, or a callback of a run that is started from Python. On the command line:
    `trackers=wandb`, trackio or mlflow, or `trackers=file.py:open_mine`, (folder, start_step) -> Tracker.

    A resumed run opens its trackers again with the step that it continues from; entries after that step are
    to be replaced.

    >>> class Printed:
    ...     def log(self, step, metrics, perf):
    ...         print(f"step {step}: {metrics.get('loss')}")
    ...         return metrics.get("loss", 1.0) < 0.1  # end the run
    ...     def close(self, end):
    ...         print(end)
    >>> Printed().log(20, {"loss": 0.05}, {"seconds": 0.2})
    step 20: 0.05
    True

    `jaxft.train("sft", rows, callbacks=[Printed()])` logs to it.
    """

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> bool | None:
        """Record the metrics after `step` optimizer steps. One step may have several calls with different
        metrics: training metrics, and eval_* for an evaluation. perf: timings and memory. Return True to end
        the run after this step.
        """

    def close(self, end: RunEnd) -> None:
        """Flush and finish. end: how the run ended."""


OpenTracker: TypeAlias = Callable[[Path, int], Tracker]  # (folder, start_step)


class Callback:
    """A Tracker that passes metrics to a callback: a function (step, metrics), or an object with the methods
    log and close of a Tracker. ValueError for anything else.

    A function's `metrics` also has timings and memory, by names such as perf/seconds. If the callback raises
    an error when metrics are passed to it, `log` raises a RuntimeError.
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
        """Call the callback; return whether it returned True, which ends the run."""
        try:
            if self._is_function:
                return self._callback(step, with_perf(metrics, perf)) is True
            return self._callback.log(step, metrics, perf) is True
        except Exception as error:
            raise RuntimeError(
                f"a callback raised {type(error).__name__} after step {step}: {error}; correct "
                "the callback, or leave it out"
            ) from error

    def close(self, end: RunEnd) -> None:
        """Close the callback if it is an object."""
        if not self._is_function:
            self._callback.close(end)


def with_perf(metrics: dict[str, float], perf: dict[str, float]) -> dict[str, float]:
    """Merge both dicts; the names of timings and memory get the prefix perf/."""
    return {**metrics, **{f"perf/{name}": value for name, value in perf.items()}}


def tracked_run(folder: Path) -> TrackedRun:
    """Read the run in a folder; without a config.json its settings are {}."""
    settings, above = (_read_settings(place) for place in (folder, folder.parent))
    fields = settings.get("tracking") or {}
    tracking = Tracking(**{**fields, "tags": tuple(fields.get("tags", ()))})
    is_member = folder.name in (above.get("members") or ())
    return TrackedRun(settings, tracking, folder.parent.name if is_member else None)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return settings


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of nested settings, without those that are None."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def upload_adapter(tracker: str, folder: Path, send: Callable[[Path], object]) -> None:
    """Send the adapter of a run, if it has one. A failure is reported on standard error and ends nothing,
    since the run has its results.
    """
    if not (folder / ADAPTER).is_dir():
        return
    try:
        send(folder / ADAPTER)
    except Exception as error:  # of storage, network or account, which each package reports in its own way
        text = printable_line(str(error))[:300] or type(error).__name__
        print(f"trackers={tracker}: the adapter is not uploaded: {text}", file=sys.stderr)


def import_package(package: str) -> ModuleType:
    """Import a tracker's package. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"trackers has {package!r}, which is not installed ({error}); run pip install 'jaxft[track]'"
        ) from error


class TensorBoard:
    """Appends scalars to a new event file in a folder.

    tensorboardX's SummaryWriter writes in a thread that dies on a full disk, and the run then waits for it
    forever. Its messages are therefore written here, without that thread.
    """

    def __init__(self, folder: Path, start_step: int):
        # Imported here, because tensorboardX imports torch where that is installed, which takes seconds.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._crc32c = Event, scalar, masked_crc32c
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write(file_version="brain.Event:2")
        # A session that starts at a step hides the entries of an earlier process for later steps.
        start = SessionLog(status=SessionLog.START)
        self._write(step=start_step + 1 if start_step else 0, session_log=start)

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Write the finite metrics, and flush: a killed run loses nothing."""
        for tag, value in with_perf(metrics, perf).items():
            if math.isfinite(value):
                self._write(step=step, summary=self._scalar(tag, value))
        self._file.flush()

    def close(self, end: RunEnd) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", self._crc32c(part)) for part in (size, data)]
        self._file.write(size + checks[0] + data + checks[1])


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


def open_wandb(folder: Path, start_step: int) -> Tracker:
    """Open the W&B run of a run folder, with the settings in its config.json. The run's id is stored in the
    folder; a folder without one gets a new id. Each member of a sweep, all trained at the same time, has a
    separate W&B run, by default in a group with the sweep's name.

    W&B's environment variables, such as WANDB_ENTITY and WANDB_MODE, apply; WANDB_PROJECT, WANDB_RUN_GROUP
    and WANDB_TAGS only where `tracking` leaves these settings open.
    """
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


class Trackio:
    """Logs the run in a folder to the open run of a trackio module. artifact: whether its adapter is stored
    at the end.

    Trackio's present run is a context variable: each run has a context of its own, so that the members of a
    sweep are runs at the same time.
    """

    def __init__(self, trackio: ModuleType, context: Context, folder: Path, artifact: bool):
        self._trackio, self._context, self._folder, self._artifact = trackio, context, folder, artifact

    def log(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Send the metrics to Trackio."""
        self._context.run(self._trackio.log, with_perf(metrics, perf), step=step)

    def close(self, end: RunEnd) -> None:
        """Store the adapter of a finished run, and finish the Trackio run."""
        if end == "finished" and self._artifact:
            upload_adapter("trackio", self._folder, self._upload)
        self._context.run(self._trackio.finish)

    def _upload(self, adapter: Path) -> None:
        name = f"{self._folder.name}-{ADAPTER}"
        self._context.run(self._trackio.log_artifact, str(adapter), name=name, type="model")


def open_trackio(folder: Path, start_step: int) -> Tracker:
    """Open the Trackio run with the folder's name and the settings in its config.json. Trackio has no tags:
    they are only among the settings.
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
            for begin in range(0, len(points), METRICS_BATCH):
                self._client.log_batch(self._run_id, metrics=points[begin : begin + METRICS_BATCH])
        except self._error as error:
            self._failed = True
            text = f"{_short_error(error)}; MLflow gets no metrics from step {step} on, metrics.jsonl has all"
            print(f"trackers=mlflow: {text}", file=sys.stderr)

    def close(self, end: RunEnd) -> None:
        """Upload the adapter of a finished run, and finish the MLflow run."""
        if not self._failed:
            if end == "finished" and self._artifact:
                upload_adapter("mlflow", self._folder, self._upload)
            try:
                self._client.set_terminated(self._run_id, MLFLOW_STATUS[end])
            except self._error as error:
                text = f"the run is not marked as {end}: {_short_error(error)}"
                print(f"trackers=mlflow: {text}", file=sys.stderr)

    def _upload(self, adapter: Path) -> None:
        self._client.log_artifacts(self._run_id, str(adapter), ADAPTER)


def open_mlflow(folder: Path, start_step: int) -> Tracker:
    """Open the MLflow run whose id is stored in the folder. A new one gets the settings in the folder's
    config.json as parameters, which MLflow does not let a resumed run change.

    MLFLOW_TRACKING_URI is the address of the server, and MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID the
    experiment without tracking.project. Without an address MLflow keeps a database in the working directory,
    for which the package mlflow is needed; the extra `track` installs its client alone, mlflow-skinny.
    Raises ValueError if MLflow cannot be reached.
    """
    mlflow = import_package("mlflow")
    path, run = folder / "mlflow_id", tracked_run(folder)
    try:
        client = mlflow.MlflowClient()
        if not path.exists():
            path.write_text(_new_mlflow_run(mlflow, client, folder.name, run))
        run_id = path.read_text().strip()
        client.update_run(run_id, status="RUNNING")
        return MLflow(mlflow, run_id, folder, run.tracking.artifact)
    except mlflow.exceptions.MlflowException as error:
        other = f", or remove {path} for a new MLflow run" if path.exists() else ""
        raise ValueError(
            f"trackers=mlflow: {_short_error(error)}. Set MLFLOW_TRACKING_URI to an MLflow server's address, "
            f"or install mlflow itself for a database in the working directory{other}"
        ) from error


def _new_mlflow_run(mlflow: ModuleType, client: Any, name: str, run: TrackedRun) -> str:
    """Create a run with its settings; return its id."""
    tags = {tag: "true" for tag in run.tracking.tags}
    tags |= {"group": run.group} if run.group else {}
    experiment, given = os.environ.get("MLFLOW_EXPERIMENT_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if run.tracking.project is not None or given or not experiment:
        project = run.tracking.project or given or PROJECT
        known = client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else client.create_experiment(project)
    run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    flat = flat_settings(run.settings)
    params = [mlflow.entities.Param(key, str(value)[:LONGEST_PARAM]) for key, value in flat.items()]
    for begin in range(0, len(params), PARAMS_BATCH):
        client.log_batch(run_id, params=params[begin : begin + PARAMS_BATCH])
    return run_id


def _short_error(error: Exception) -> str:
    return printable_line(str(error))[:300]


OPENERS: dict[str, OpenTracker] = {"mlflow": open_mlflow, "trackio": open_trackio, "wandb": open_wandb}


def check_trackers(trackers_or_names: tuple[str | Tracker, ...]) -> list[OpenTracker]:
    """Return the functions that open the optional trackers that are given by name, and import their packages.
    Raises ValueError for one that is unknown or whose package is missing.
    """
    names = [tracker for tracker in trackers_or_names if isinstance(tracker, str) and tracker not in OPEN]
    for name in names:
        if name not in OPENERS and ":" not in name:
            known = ", ".join(sorted((*OPENERS, *OPEN)))
            raise ValueError(f"trackers has {name!r}; use {known}, or FILE.py:FUNCTION of your own")
        if name in OPENERS:
            import_package(name)
    return [OPENERS.get(name) or load_callable(name) for name in names]
