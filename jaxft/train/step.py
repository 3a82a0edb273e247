"""The train step: gradients summed over microbatches, then one guarded optimizer update; norms by layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxft.batch import TrainState
from jaxft.nn import tree
from jaxft.nn.param_spec import Specs, layer_numbers, spec_paths
from jaxft.nn.quant import QTensor, dequantize
from jaxft.nn.tree import Aux, Batch, Grads, Metrics, OptState, Params
from jaxft.objectives.metrics import LOSS_SPIKES, PerLayer, Sum, add, neutral
from jaxft.objectives.objective import Objective
from jaxft.optim.layerwise import fused_step
from jaxft.optim.optimizer import FreezableState, Optimizer, SpikeState
from jaxft.optim.update import StepInfo, to_float32

TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
GRAD_NORM, UPDATE_NORM = "grad_norm", "update_norm"
Norms = dict[str, Float[Array, "..."]]  # by kind: [L] if the parameter is stacked
Watch = Callable[[Grads, Params, Params], Metrics]  # of gradients, old and new parameters


def step_keys(seed: int, step: Int[Array, ""] | int) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Return the random keys of a step: one for the objective, one for stochastic rounding."""
    key, rounding_key = (jax.random.fold_in(jax.random.key(seed + i), step) for i in (0, 1))
    return key, rounding_key


def make_train_step(
    objective: Objective, optimizer: Optimizer, seed: int, watch: Watch | None = None
) -> TrainStep:
    """Return `train_step(state, frozen, batch [micro, rows, ...]) -> (state, metrics)`.

    The batch's weights sum to 1 over all microbatches, so gradients are added and never averaged. A step
    whose loss, gradient norm or update is not finite leaves parameters, optimizer state and aux unchanged and
    is counted. watch: called with (gradients, parameters before the update, parameters after it); returns
    further metrics.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key, rounding_key = step_keys(seed, state.step)
        if optimizer.fused_backward:
            keys = (key, rounding_key)
            trainable, opt_state, info, metrics = fused_step(
                objective, optimizer.parts, state, frozen, batch, keys
            )
            updated = trainable, opt_state
            new, counts = next_state(objective, optimizer, state, updated, info, metrics)
        else:
            grads, metrics = accumulate_gradients(objective, (state.trainable, frozen), batch, key, state.aux)
            new, counts = apply_gradients(objective, optimizer, state, batch, (grads, metrics), rounding_key)
            counts |= watch(grads, state.trainable, new.trainable) if watch else {}
        return new, {**metrics, **counts}

    return train_step


def apply_gradients(
    objective: Objective,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    summed: tuple[Grads, Metrics],
    rounding_key: Key[Array, ""],
) -> tuple[TrainState, Metrics]:
    """Return the state after one optimizer update, and its metrics. summed: (gradients, metrics) of the
    batch, summed over its microbatches.

    If `objective.frozen_policy(batch)`, the policy's parameters and their optimizer state stay unchanged
    (with a gradient of 0 Adam would still move them); a critic is updated as usual.
    """
    grads, metrics = summed
    norm = optax.tree.norm(to_float32(grads))
    frozen = objective.frozen_policy(batch) if objective.facts.freezes_policy else None
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
    info = StepInfo(norm, finite, rounding_key, frozen, metrics["loss"].total)
    info = info._replace(finite=optimizer.check(grads, state.opt_state, state.trainable, info))
    updated = optimizer.update(grads, state.opt_state, state.trainable, info)
    return next_state(objective, optimizer, state, updated, info, metrics)


def next_state(
    objective: Objective,
    optimizer: Optimizer,
    state: TrainState,
    updated: tuple[Params, OptState],
    info: StepInfo,
    metrics: Metrics,
) -> tuple[TrainState, Metrics]:
    """Return the next step's state, and the metrics grad_norm, learning_rate and skipped, and with
    optim.skip_spikes loss_spikes, the fraction of the steps that were skipped as spikes.

    updated: new parameters and optimizer state. info: gradient norm, and whether the step is finite or
    frozen.
    """
    trainable, opt_state = updated
    aux, moves = objective.update(state.aux, trainable, metrics), info.finite
    spikes = {}
    if isinstance(opt_state, SpikeState):
        is_spike = opt_state.skipped > state.opt_state.skipped
        moves = moves & ~is_spike
        spikes = {LOSS_SPIKES: Sum(is_spike.astype(info.norm.dtype), jnp.ones((), info.norm.dtype))}
    aux = jax.tree.map(lambda new, old: jnp.where(moves, new, old), aux, state.aux)
    bad = jnp.where(info.finite, state.bad * jnp.array([1, 0], jnp.int32), state.bad + 1)
    one = jnp.ones((), info.norm.dtype)
    counts = {
        "grad_norm": Sum(info.norm, one),
        "learning_rate": Sum(applied_rate(optimizer, state, info).astype(info.norm.dtype), one),
        "skipped": Sum((~info.finite).astype(info.norm.dtype), one),
    }
    return TrainState(state.step + 1, trainable, opt_state, aux, bad), {**counts, **spikes}


def applied_rate(optimizer: Optimizer, state: TrainState, info: StepInfo) -> Float[Array, ""]:
    """Return the learning rate of the policy's update in a step from `state`, 0 if the step freezes it.

    The schedule counts updates: a step that was skipped or frozen is not one.
    """
    opt_state, updates = state.opt_state, state.step - state.bad[0]
    if isinstance(opt_state, SpikeState):
        opt_state, updates = opt_state.wrapped, updates - opt_state.skipped
    if isinstance(opt_state, FreezableState):
        updates = opt_state.policy_updates
    rate = jnp.asarray(optimizer.schedule(updates))
    return rate if info.frozen is None else jnp.where(info.frozen, jnp.zeros_like(rate), rate)


def accumulate_gradients(
    objective: Objective, params: tuple[Params, Params], batch: Batch, key: Key[Array, ""], aux: Aux
) -> tuple[Grads, Metrics]:
    """Return the gradients of the trainable parameters and the metrics, both summed over all microbatches.

    params: (trainable, frozen). batch: [micro, rows, ...]. For an objective whose loss couples rows, such as
    one that compares rows of the whole batch, see _coupled_gradients.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if objective.facts.coupled and count > 1:
        return _coupled_gradients(objective, params, batch, key, aux)
    trainable, frozen = params

    def microbatch(i: int | Int[Array, ""]) -> tuple[Grads, Metrics]:
        def loss(trainable: Params) -> tuple[Float[Array, ""], Metrics]:
            rows, own_key = _microbatch(batch, i), jax.random.fold_in(key, i)
            return objective(tree.combine(trainable, frozen), rows, own_key, aux)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return grads, metrics

    return microbatch(0) if count == 1 else _sum_over(microbatch, count)


def _microbatch(batch: Batch, i: int | Int[Array, ""]) -> Batch:
    return jax.tree.map(lambda x: x[i], batch)


def _sum_over(microbatch: Callable[[Any], tuple[Grads, Metrics]], count: int) -> tuple[Grads, Metrics]:
    """Return microbatch(0) + microbatch(1) + ... in float32 or wider.

    It is a scan, so that the program's size doesn't depend on count.
    """

    def body(total: tuple[Grads, Metrics], i: Int[Array, ""]) -> tuple[tuple[Grads, Metrics], None]:
        grads, metrics = microbatch(i)
        summed = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total[0], grads)
        return (summed, add(total[1], metrics)), None

    grads, metrics = jax.eval_shape(microbatch, 0)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.float32 if s.dtype.itemsize == 2 else s.dtype), grads
    )
    return jax.lax.scan(body, (zeros, neutral(metrics)), jnp.arange(count))[0]


def _coupled_gradients(
    objective: Objective, params: tuple[Params, Params], batch: Batch, key: Key[Array, ""], aux: Aux
) -> tuple[Grads, Metrics]:
    """Return (gradients, metrics) for a loss that couples rows; they equal those of a single large
    microbatch.

    First the outputs of all microbatches are computed; then the loss of all outputs together and its
    cotangent for each; last, each microbatch is run again and its cotangents are pulled back to gradients.
    """
    trainable, frozen = params
    count = jax.tree.leaves(batch)[0].shape[0]

    def forward(trainable: Params, i: int | Int[Array, ""]) -> Any:
        rows, own_key = _microbatch(batch, i), jax.random.fold_in(key, i)
        return objective.forward(tree.combine(trainable, frozen), rows, own_key, aux)

    outputs = jax.lax.map(lambda i: forward(trainable, i), jnp.arange(count))
    rows = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), outputs)
    slope, metrics = jax.grad(lambda logp: objective.loss(replace(rows, logp=logp), aux), has_aux=True)(
        rows.logp
    )
    slope = slope.reshape(outputs.logp.shape)

    def microbatch(i: Int[Array, ""]) -> tuple[Grads, Metrics]:
        _, pull = jax.vjp(lambda t: forward(t, i).logp, trainable)
        return pull(slope[i])[0], {}

    return _sum_over(microbatch, count)[0], metrics


# Norms by layer and kind of parameter, logged with loop.watch=layers as `grad_norm/<kind>/<layer>` and
# `update_norm/<kind>/<layer>`. A norm that grows over many steps in one kind often comes before a divergence.


def kind_of(path: str) -> str:
    """Return a parameter's kind: its path without `layers`, `base`, `adapter` and an adapter's final `a` or
    `b`.

    `adapter/layers/attn/q/a` and `base/layers/attn/q` are both `attn/q`;
    `critic/adapter/layers/attn/q/a` is `critic/attn/q`.
    """
    parts = path.split("/")
    kept = parts[:-1] if "adapter" in parts else parts
    return "/".join(part for part in kept if part not in ("layers", "base", "adapter"))


def make_layer_norms(specs: Specs, name_of: Callable[[str], str] = kind_of) -> Callable[[Params], Norms]:
    """Return `norms(params)`: {kind: norm of all parameters of the kind}, one norm per layer if they are
    stacked.

    specs: ParamSpecs of the parameters. name_of(path): the kind of a parameter. An adapter's scale and
    leaves that are None are left out.
    """
    axes = {path: spec.axes for path, spec in spec_paths(specs).items()}

    def norms(params: Params) -> Norms:
        squares: dict[str, Any] = {}
        for path, leaf in tree.paths(params, is_leaf=lambda x: isinstance(x, QTensor)).items():
            if path.endswith("/scale"):
                continue
            value = to_float32(dequantize(leaf) if isinstance(leaf, QTensor) else leaf)
            summed = tuple(i for i, axis in enumerate(axes[path]) if axis != "layers")
            squares[name_of(path)] = squares.get(name_of(path), 0) + jnp.sum(jnp.square(value), summed)
        return {name: jnp.sqrt(square) for name, square in squares.items()}

    return norms


def make_watch(specs: Specs) -> Watch:
    """Return `watch(gradients, old, new)`, which computes the metrics of loop.watch=layers: norms of the
    gradients and of new - old, for each kind of parameter and each layer.

    specs: of the trainable parameters. old, new: parameters before and after an update.
    """
    norms = make_layer_norms(specs)
    layers = {kind_of(path): tuple(layer_numbers(spec)) for path, spec in spec_paths(specs).items()}

    def watch(grads: Grads, old: Params, new: Params) -> Metrics:
        change = jax.tree.map(lambda n, o: to_float32(n) - to_float32(o), new, old)
        metrics: Metrics = {}
        for name, values in ((GRAD_NORM, norms(grads)), (UPDATE_NORM, norms(change))):
            for kind, x in values.items():
                one, numbers = jnp.ones((), x.dtype), layers[kind]
                metrics[f"{name}/{kind}"] = PerLayer(x, one, numbers) if numbers else Sum(x, one)
        return metrics

    return watch
