"""Gradients of a whole optimizer batch from its microbatches: sums, and two passes where an objective couples the rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft import tree
from jaxft.objectives import metrics

Found = tuple[Any, dict[str, Any]]  # gradients like the trainable leaves, metrics


def accumulated(objective: Callable, params: tuple[Any, Any], batch: Any, key: Array, aux: Any) -> Found:
    """(gradients, metrics) of `objective` over a batch [micro, rows, ...]; params: (trainable, frozen).

    The batch's weights sum to 1 over all microbatches, so parts are added and nothing is averaged.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if getattr(objective, "coupled", False) and count > 1:
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


def _coupled(objective: Any, params: tuple[Any, Any], batch: Any, key: Array, aux: Any) -> Found:
    """All microbatches' log-probs first; loss and cotangents from the whole; then each pulls its cotangents back."""
    trainable, frozen = params
    count = jax.tree.leaves(batch)[0].shape[0]

    def see(trainable, i):
        return objective.see(
            tree.combine(trainable, frozen), _part(batch, i), jax.random.fold_in(key, i), aux
        )

    seen = jax.lax.map(lambda i: see(trainable, i), jnp.arange(count))
    rows = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), seen)
    slope, found = jax.grad(lambda logp: objective.judge(replace(rows, logp=logp), aux), has_aux=True)(
        rows.logp
    )
    slope = slope.reshape(seen.logp.shape)

    def one(i):
        _, pull = jax.vjp(lambda t: see(t, i).logp, trainable)
        return pull(slope[i])[0], {}

    return _added(one, count)[0], found
