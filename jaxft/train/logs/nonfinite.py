"""A record of a run's first non-finite step, for "my loss is NaN" (`loop.debug_nonfinite=true`).

The loss and gradient norm of every step are checked at once, which costs the overlap of host and device. At
the first step where one of them, or the update, is not finite this writes `runs/<name>/nonfinite/step-<n>/`:

    batch.npz    the arrays of the batch, [micro, rows, ...]
    rows.json    the names of the dataset rows in each row of the batch
    norms.json   norms of parameters and gradients by path, and of layer outputs
                 [pass, micro, 1 + layer, row], where 0 is the embedding; a second model's in teacher_outputs

and logs the first parameter or layer output that is not finite, or if all are finite the layer whose gradient
is the first that is not: gradients are computed from the last layer to the first. The run continues with the
parameters from before the step, until `loop.max_bad` such steps come in a row.

A loss that is not finite at the very first step ends the run with that record, whatever the setting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.batch import TrainState
from jaxft.distributed import processes, sharding
from jaxft.distributed.sync import is_first
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.matmul import accumulation_dtype
from jaxft.nn.param_spec import layer_numbers, spec_paths
from jaxft.nn.quant import dequantize, is_qtensor
from jaxft.nn.tree import Batch, LayerOutputs, Metrics, Params
from jaxft.objectives.objective import Objective
from jaxft.runs import run_record
from jaxft.train.logs.logs import Logs
from jaxft.train.start.jobs import Job, Member
from jaxft.train.step import accumulate_gradients, make_layer_norms, step_keys

ROW_NORMS = "row_norms"
OUTPUTS = ("outputs", "teacher_outputs")  # fields of a Diagnosis
ArraysByPath = dict[str, np.ndarray]


@dataclass(frozen=True)
class Diagnosis:
    """Norms of a step.

    parameters, gradients: by path, [L] if stacked. outputs, teacher_outputs: for each forward pass of the
    model and of the second model, [micro, 1 + layer, row]. nonfinite: text that names the first non-finite
    parameter, "" for none. layers: numbers of the layers in a stacked array, by path.
    """

    parameters: ArraysByPath
    gradients: ArraysByPath
    outputs: list[np.ndarray]
    teacher_outputs: list[np.ndarray] = field(default_factory=list)
    nonfinite: str = ""
    layers: dict[str, range] = field(default_factory=dict)


class NonfiniteRecorder:
    """Writes the first non-finite step of each member; without `loop.debug_nonfinite` only if it is the run's
    first step and its loss is not finite.
    """

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
        """Write a step that was not finite. states: after the step, which left the parameters unchanged.

        Raises AgreedError if the loss of a run's first step is not finite.
        """
        if not self._watched and step:
            return
        skipped = np.atleast_1d(np.asarray(jax.device_get(metrics["skipped"].total)))
        loss = np.atleast_1d(np.asarray(jax.device_get(metrics["loss"].total)))
        ends = set() if step else set(np.flatnonzero(~np.isfinite(loss)).tolist())
        for number in sorted(ends | self._watched.intersection(np.flatnonzero(skipped).tolist())):
            self._watched.discard(number)
            member, batch = self._job.members[number], batches[min(number, len(batches) - 1)]
            names = self._job.source_of(number).row_names(step)
            diagnosis = diagnose(member, step, states[number], frozen[number], batch)
            folder = member.folder / "nonfinite" / f"step-{step + 1}"
            if is_first():
                write_diagnosis(folder, diagnosis, batch, names)
            label = f"{member.label}: " if member.label else ""
            text = first_nonfinite(diagnosis, batch, names)
            self._logs.message(
                f"{label}step {step + 1}: the loss, gradient or update is not finite; {text}. "
                f"Details: {folder}"
            )
            if number in ends:
                raise processes.AgreedError(
                    f"{member.folder}: the loss of the first step is not finite: {text}. Check the weights, "
                    f"the rows and the settings of the loss; details are in {folder}"
                )


def diagnose(member: Member, step: int, state: TrainState, frozen: Params, batch: Batch) -> Diagnosis:
    """Repeat a step's forward and backward pass; return norms of parameters, gradients and layer outputs."""
    p, (key, _) = member.programs, step_keys(member.run.seed, step)
    norms = make_layer_norms(p.partition.specs, str)

    def gradients(trainable: Params, frozen: Params, batch: Batch, aux: Any) -> Any:
        return norms(accumulate_gradients(p.objective, (trainable, frozen), batch, key, aux)[0])

    everywhere = sharding.replicated(p.mesh)
    args = state.trainable, frozen, sharding.shard_batch(p.mesh, batch), state.aux
    outputs = make_layer_outputs(p.partition.model, member.run.objective, key)
    computed = [jax.jit(fn, out_shardings=everywhere)(*args) for fn in (gradients, outputs)]
    params = tree.combine(state.trainable, frozen)
    parameters = jax.jit(norms, out_shardings=everywhere)(params)
    parameters, gradient_norms, output_norms = jax.device_get((parameters, *computed))
    nonfinite = first_parameter(params, p.partition.specs, p.mesh)
    layers = {path: layer_numbers(spec) for path, spec in spec_paths(p.partition.specs).items()}
    of_model, of_teacher = output_norms
    return Diagnosis(parameters, gradient_norms, of_model, of_teacher, nonfinite, layers)


def make_layer_outputs(
    model: Model, objective_of: Callable[[Model], Objective], key: Any
) -> Callable[..., Any]:
    """Return `(trainable, frozen, batch, aux) -> (norms, norms of the teacher)` of layer outputs, see
    Diagnosis. key: for dropout, None for none.
    """

    def observed(model: Model, passes: list[Array]) -> Model:
        """Return the model with forward passes that append the norms of their rows to `passes`."""

        def hidden(*args: Any, **kwargs: Any) -> Any:
            h, outputs = model.hidden(*args, **kwargs, observe=_row_norms)
            norms = outputs.pop(ROW_NORMS)
            passes.append(jnp.concatenate([norms[:1, 0], norms[:, 1]]))
            return h, outputs

        return replace(model, hidden=hidden)

    def outputs(trainable: Params, frozen: Params, batch: Batch, aux: Any) -> Any:
        def microbatch(i: Any) -> Any:
            rows = jax.tree.map(lambda x: x[i], batch)
            own_key = None if key is None else jax.random.fold_in(key, i)
            passes, of_teacher = list[Array](), list[Array]()
            teacher = model.teacher and observed(model.teacher, of_teacher)
            objective = objective_of(replace(observed(model, passes), teacher=teacher))
            objective.forward(tree.combine(trainable, frozen), rows, own_key, aux)
            return passes, of_teacher

        return jax.lax.map(microbatch, np.arange(jax.tree.leaves(batch)[0].shape[0]))

    return outputs


def _row_norms(before: Float[Array, "B T D"], after: Float[Array, "B T D"]) -> LayerOutputs:
    wide = (x.astype(accumulation_dtype(x.dtype)) for x in (before, after))
    return {ROW_NORMS: jnp.stack([jnp.sqrt(jnp.sum(jnp.square(x), (1, 2))) for x in wide])}


def first_parameter(params: Params, specs: Any, mesh: jax.sharding.Mesh) -> str:
    """Return text with the path, and the layer, of the first parameter that is not finite; "" if all are."""
    numbers = {path: layer_numbers(spec) for path, spec in spec_paths(specs).items()}

    def bad(params: Params) -> dict[str, Any]:
        flags = {}
        for path, leaf in tree.paths(params, is_leaf=is_qtensor).items():
            value = dequantize(leaf) if is_qtensor(leaf) else leaf
            axes = tuple(range(1 if numbers[path] else 0, value.ndim))
            flags[path] = jnp.any(~jnp.isfinite(value), axes)
        return flags

    for path, wrong in jax.device_get(jax.jit(bad, out_shardings=sharding.replicated(mesh))(params)).items():
        if wrong.any():
            layer = f" in layer {numbers[path][np.flatnonzero(wrong)[0]]}" if numbers[path] else ""
            return f"the parameter {path} is not finite{layer}"
    return ""


def first_of_model(
    member: Member, state: TrainState, frozen: Params, of_text: bool, batches: Sequence[Batch]
) -> str:
    """Return text that names the first non-finite parameter, or else layer output, in a forward pass of the
    batches. of_text: whether the batches are general text.
    """
    p = member.programs

    def objective_of(model: Model) -> Objective:
        objective = member.run.objective(model)
        return (objective.text or objective) if of_text else objective

    text = first_parameter(tree.combine(state.trainable, frozen), p.partition.specs, p.mesh)
    outputs = make_layer_outputs(p.partition.model, objective_of, None)
    outputs = jax.jit(outputs, out_shardings=sharding.replicated(p.mesh))
    for batch in () if text else batches:
        norms = jax.device_get(
            outputs(state.trainable, frozen, sharding.shard_batch(p.mesh, batch), state.aux)
        )
        text = text or first_output(*norms)[0]
    return text or "all parameters and all outputs of layers are finite, so only the loss itself is not"


def write_diagnosis(folder: Path, diagnosis: Diagnosis, batch: Batch, names: list[str]) -> None:
    """Write batch.npz, rows.json and norms.json."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "batch.npz", **{path.replace("/", "."): x for path, x in tree.paths(batch).items()})
    run_record.write_durable_json(folder / "rows.json", names)
    norms = {
        name: {path: x.tolist() for path, x in getattr(diagnosis, name).items()}
        for name in ("parameters", "gradients")
    }
    run_record.write_durable_json(
        folder / "norms.json",
        {**norms, **{name: [x.tolist() for x in getattr(diagnosis, name)] for name in OUTPUTS}},
    )


def first_nonfinite(diagnosis: Diagnosis, batch: Batch, names: list[str]) -> str:
    """Return text that names the first non-finite array of a step. names: of dataset rows in the batch."""
    for path, x in tree.paths(batch).items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            bad = ~np.isfinite(x).reshape(*x.shape[:2], -1).all(-1)
            return f"the batch is not finite in {path} of {_rows(bad, names)}"
    if diagnosis.nonfinite:
        return diagnosis.nonfinite
    text, bad = first_output(diagnosis.outputs, diagnosis.teacher_outputs)
    if text:
        return f"{text}, in {_rows(bad, names)}"
    layers = {
        path: [numbers[i] for i in np.flatnonzero(~np.isfinite(diagnosis.gradients[path]))]
        for path, numbers in diagnosis.layers.items()
        if numbers and path in diagnosis.gradients
    }
    last = max((bad[-1] for bad in layers.values() if bad), default=None)
    if last is not None:
        paths = ", ".join(path for path, bad in layers.items() if last in bad)
        return (
            "all outputs of layers are finite; "
            f"the first gradient that is not belongs to layer {last} ({paths})"
        )
    return (
        "all outputs of layers and their gradients are finite, so only the loss is not, or the gradient of a "
        "parameter outside of the layers"
    )


def first_output(outputs: list[np.ndarray], of_teacher: list[np.ndarray]) -> tuple[str, np.ndarray]:
    """Return (text that names the first layer with a non-finite output, mask of its rows [micro, rows]). The
    text is "" if all outputs are finite.

    outputs, of_teacher: norms [micro, 1 + layer, row] of each pass of the model and of the second model.
    """
    whose = [""] * len(outputs) + [" of the second model"] * len(of_teacher)
    for norms, model in zip([*outputs, *of_teacher], whose, strict=True):
        bad_layers = np.flatnonzero((~np.isfinite(norms)).any((0, 2)))
        if len(bad_layers):
            layer = int(bad_layers[0])
            where = f"layer {layer - 1}{model}" if layer else f"the embedding{model}"
            return f"the first output that is not finite belongs to {where}", ~np.isfinite(norms[:, layer])
    return "", np.zeros((0, 0), bool)


def _rows(bad: np.ndarray, names: list[str]) -> str:
    """Return text with the names of the rows where `bad` [micro, rows] is True. names: of all rows."""
    per_micro = -(-len(names) // bad.shape[0])
    flat = [
        i * per_micro + j for i, j in np.argwhere(bad) if i * per_micro + j < len(names) and j < per_micro
    ]
    shown = ", ".join(names[i] for i in flat[:8]) + (f" and {len(flat) - 8} more" if len(flat) > 8 else "")
    return f"the rows {shown}" if flat else "padding rows"
