"""A record of a run's first non-finite step, for "my loss is NaN" (`loop.debug_nonfinite=true`).

The loss and gradient norm of every step are checked at once, which costs the overlap of host and device. At
the first step where one of them is not finite this writes `runs/<name>/nonfinite/step-<n>/`:

    batch.npz    the arrays of the batch, [micro, rows, ...]
    rows.json    the names of the dataset rows in each row of the batch
    norms.json   norms of parameters and gradients by path, and of layer outputs
                 [pass, micro, 1 + layer, row]; the first is the embedding's

and logs the first layer whose output is not finite, or if all are finite the layer whose gradient is the
first that is not: gradients are computed from the last layer to the first. The run continues with the
parameters from before the step, until `loop.max_bad` such steps come in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.distributed import processes, sharding
from jaxft.nn.scan import record_layer_outputs
from jaxft.runs import folder as runfolder
from jaxft.train.logs import Logs
from jaxft.train.members import Job, Member
from jaxft.train.step import accumulate_gradients, step_keys
from jaxft.train.watch import make_layer_norms
from jaxft.tree import Batch, Metrics, Params

ArraysByPath = dict[str, np.ndarray]


@dataclass(frozen=True)
class Diagnosis:
    """Norms of a step: of parameters and gradients by path, [L] if stacked; of layer outputs in each pass."""

    parameters: ArraysByPath
    gradients: ArraysByPath
    outputs: list[np.ndarray]


class NonfiniteRecorder:
    """Writes the first non-finite step of each member, if `loop.debug_nonfinite` is set."""

    def __init__(self, job: Job, logs: Logs):
        self._job, self._logs = job, logs
        self._watched = set(range(len(job.members))) if job.lead.run.loop.debug_nonfinite else set()

    def check(
        self,
        step: int,
        states: Sequence[TrainState],
        frozen: Sequence[Params],
        batches: Sequence[Batch],
        metrics: Metrics,
    ) -> None:
        """Write a step that was not finite. states: after the step, which left the parameters unchanged."""
        if not self._watched:
            return
        skipped = np.atleast_1d(np.asarray(jax.device_get(metrics["skipped"].total)))
        for number in self._watched.intersection(np.flatnonzero(skipped).tolist()):
            self._watched.remove(number)
            member, batch = self._job.members[number], batches[min(number, len(batches) - 1)]
            names = self._job.source_of(number).row_names(step)
            found = diagnose(member, step, states[number], frozen[number], batch)
            folder = member.folder / "nonfinite" / f"step-{step + 1}"
            if processes.is_first():
                write_diagnosis(folder, found, batch, names)
            label = f"{member.label}: " if member.label else ""
            text = first_nonfinite(found, batch, names)
            self._logs.message(
                f"{label}step {step + 1}: the loss or gradient is not finite; {text}. Details: {folder}"
            )


def diagnose(member: Member, step: int, state: TrainState, frozen: Params, batch: Batch) -> Diagnosis:
    """Repeat a step's forward and backward pass and return norms of everything in between."""
    p, (key, _) = member.programs, step_keys(member.run.seed, step)
    objective, norms = (
        p.objective,
        make_layer_norms(p.partition.specs, lambda path: path.replace("layers/", "")),
    )

    def gradients(trainable: Params, frozen: Params, batch: Batch, aux: Any) -> Any:
        return norms(accumulate_gradients(objective, (trainable, frozen), batch, key, aux)[0])

    def outputs(trainable: Params, frozen: Params, batch: Batch, aux: Any) -> Any:
        def microbatch(i: Any) -> Any:
            rows = jax.tree.map(lambda x: x[i], batch)
            with record_layer_outputs() as recorded:
                objective.forward(tree.combine(trainable, frozen), rows, jax.random.fold_in(key, i), aux)
            return recorded

        return jax.lax.map(microbatch, np.arange(jax.tree.leaves(batch)[0].shape[0]))

    everywhere = sharding.replicated(p.mesh)
    args = state.trainable, frozen, sharding.shard_batch(p.mesh, batch), state.aux
    found = [jax.jit(fn, out_shardings=everywhere)(*args) for fn in (gradients, outputs)]
    parameters = jax.jit(norms, out_shardings=everywhere)(tree.combine(state.trainable, frozen))
    return Diagnosis(*jax.device_get((parameters, *found)))


def write_diagnosis(folder: Path, found: Diagnosis, batch: Batch, names: list[str]) -> None:
    """Write batch.npz, rows.json and norms.json."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "batch.npz", **{path.replace("/", "."): x for path, x in tree.paths(batch).items()})
    runfolder.write_durable_json(folder / "rows.json", names)
    norms = {
        name: {path: x.tolist() for path, x in getattr(found, name).items()}
        for name in ("parameters", "gradients")
    }
    runfolder.write_durable_json(
        folder / "norms.json", {**norms, "outputs": [x.tolist() for x in found.outputs]}
    )


def first_nonfinite(found: Diagnosis, batch: Batch, names: list[str]) -> str:
    """Describe the first non-finite array of a step, with the names of its rows."""
    for path, x in tree.paths(batch).items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            bad = ~np.isfinite(x).reshape(*x.shape[:2], -1).all(-1)
            return f"the batch is not finite in {path} of {_rows(bad, names)}"
    for outputs in found.outputs:  # [micro, 1 + L, rows]
        bad_layers = np.flatnonzero((~np.isfinite(outputs)).any((0, 2)))
        if len(bad_layers):
            layer = int(bad_layers[0])
            where = f"layer {layer - 1}" if layer else "the embedding"
            return (
                f"the first output that is not finite is that of {where}, "
                f"in {_rows(~np.isfinite(outputs[:, layer]), names)}"
            )
    layers = {path: np.flatnonzero(~np.isfinite(x)) for path, x in found.gradients.items() if x.ndim == 1}
    last = max((int(bad[-1]) for bad in layers.values() if len(bad)), default=None)
    if last is not None:
        paths = ", ".join(path for path, bad in layers.items() if last in bad)
        return (
            "all outputs of layers are finite; "
            f"the first gradient that is not is that of layer {last} ({paths})"
        )
    return (
        "all outputs of layers and their gradients are finite: it is the loss, or a parameter without layers"
    )


def _rows(bad: np.ndarray, names: list[str]) -> str:
    """The names of the rows where bad [micro, rows]; names follow one another over the microbatches."""
    per_micro = -(-len(names) // bad.shape[0])
    flat = [
        i * per_micro + j for i, j in np.argwhere(bad) if i * per_micro + j < len(names) and j < per_micro
    ]
    shown = ", ".join(names[i] for i in flat[:8]) + (f" and {len(flat) - 8} more" if len(flat) > 8 else "")
    return f"the rows {shown}" if flat else "padding rows"
