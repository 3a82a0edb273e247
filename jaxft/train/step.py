"""The train step: gradients summed over microbatches, then one guarded optimizer update."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.objectives import metrics
from jaxft.objectives.objective import Objective
from jaxft.optim.fused_backward import fused_step
from jaxft.optim.optimizer import Optimizer
from jaxft.optim.update import StepInfo, to_float32

Found = tuple[Any, dict[str, Any]]  # gradients like the trainable leaves, metrics


def make_train_step(objective: Objective, optimizer: Optimizer, seed: int) -> Callable:
    """`(state, frozen, batch [micro, rows, ...]) -> (state, metrics)`: the microbatches' gradients are added, then one update.

    The batch's weights sum to 1 over all microbatches, so nothing is averaged here. A step whose loss or gradient norm is
    not finite changes neither parameters, optimizer state nor aux; it is counted. (With optim.fused_backward, see fused_backward.py.)
    Where `objective.frozen_policy(batch)` the model's own parameters rest: they and the optimizer's state
    of them stay as they were, which a gradient of 0 alone wouldn't do to Adam, while models beside it go on.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        key, rounding = (jax.random.fold_in(jax.random.key(seed + i), state.step) for i in (0, 1))
        now = state.trainable, state.opt_state
        if optimizer.fused_backward:
            trainable, opt_state, (norm, ok, _), found = fused_step(
                objective, optimizer, state, frozen, batch, (key, rounding)
            )
        else:
            grads, found = accumulate_gradients(objective, (state.trainable, frozen), batch, key, state.aux)
            norm = optax.tree.norm(to_float32(grads))
            ok = jnp.isfinite(norm) & jnp.isfinite(found["loss"].total)
            info = StepInfo(norm, ok, rounding)
            trainable, opt_state = optimizer.update(grads, state.opt_state, state.trainable, info)
            if objective.facts.freezes_policy:
                still = objective.frozen_policy(batch)
                trainable, opt_state = (
                    stayed(still, *pair, state.trainable) for pair in zip((trainable, opt_state), now)
                )
        aux = objective.update(state.aux, trainable, found)
        aux = jax.tree.map(lambda new, old: jnp.where(ok, new, old), aux, state.aux)
        bad = jnp.where(ok, state.bad * jnp.array([1, 0], jnp.int32), state.bad + 1)
        one = jnp.ones((), norm.dtype)
        found = {
            **found,
            "grad_norm": metrics.Sum(norm, one),
            "skipped": metrics.Sum((~ok).astype(norm.dtype), one),
        }
        return TrainState(state.step + 1, trainable, opt_state, aux, bad), found

    return train_step


def stayed(still: Any, new: Any, old: Any, trainable: Any) -> Any:
    """`new`, or where `still` the old values of what belongs to the model's own adapter and base: of parameters, or of an
    optimizer's state, whose leaves lie below the names that they have in `trainable`."""

    def leaf(path: Any, new: Any, old: Any) -> Any:
        name = next((key.key for key in path if getattr(key, "key", None) in trainable), None)
        return jnp.where(still, old, new) if name in ("adapter", "base") else new

    return jax.tree_util.tree_map_with_path(leaf, new, old)


def accumulate_gradients(
    objective: Objective, params: tuple[Any, Any], batch: Any, key: Array, aux: Any
) -> Found:
    """(gradients, metrics) of `objective` over a batch [micro, rows, ...]; params: (trainable, frozen).

    The batch's weights sum to 1 over all microbatches, so parts are added and nothing is averaged.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if objective.facts.coupled and count > 1:
        return _coupled(objective, params, batch, key, aux)
    trainable, frozen = params

    def one(i):
        def loss(trainable):
            return objective(
                tree.combine(trainable, frozen), _part(batch, i), jax.random.fold_in(key, i), aux
            )

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return grads, found

    return one(0) if count == 1 else _added(one, count)


def _part(batch: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], batch)


def _added(one: Callable, count: int) -> Found:
    """Sum of one(0), one(1), ... in float32 or wider: a scan, so that the program doesn't grow with the microbatches."""

    def body(total, i):
        grads, found = one(i)
        return (
            jax.tree.map(lambda t, g: t + g.astype(t.dtype), total[0], grads),
            metrics.add(total[1], found),
        ), None

    grads, found = jax.eval_shape(one, 0)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.float32 if s.dtype.itemsize == 2 else s.dtype), grads
    )
    return jax.lax.scan(body, (zeros, metrics.neutral(found)), jnp.arange(count))[0]


def _coupled(objective: Objective, params: tuple[Any, Any], batch: Any, key: Array, aux: Any) -> Found:
    """All microbatches' log-probs first; loss and cotangents from the whole; then each pulls its cotangents back."""
    trainable, frozen = params
    count = jax.tree.leaves(batch)[0].shape[0]

    def see(trainable, i):
        return objective.forward(
            tree.combine(trainable, frozen), _part(batch, i), jax.random.fold_in(key, i), aux
        )

    seen = jax.lax.map(lambda i: see(trainable, i), jnp.arange(count))
    rows = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), seen)
    slope, found = jax.grad(lambda logp: objective.loss(replace(rows, logp=logp), aux), has_aux=True)(
        rows.logp
    )
    slope = slope.reshape(seen.logp.shape)

    def one(i):
        _, pull = jax.vjp(lambda t: see(t, i).logp, trainable)
        return pull(slope[i])[0], {}

    return _added(one, count)[0], found
