"""Averages of the weights over steps: an exponential moving average, and that of schedule-free optimizers.

They are evaluated and exported in place of the weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxft import tree
from jaxft.tree import OptState, Params

EARLY = 9  # after t steps the average spans at most about t / 9 steps


class Averaging(NamedTuple):
    """How an optimizer averages the weights.

    wrap(transform) -> a transformation with the same updates that also maintains the average (schedule-free
    averaging changes the updates too). averaged(opt_state, params) -> the average, with the structure and
    dtypes of params.
    """

    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    averaged: Callable[[OptState, Params], Params]


class EmaState(NamedTuple):
    """The number of updates, the average, and the state of the wrapped optimizer."""

    updates: Int[Array, ""]
    average: Params
    wrapped: OptState


class ScheduleFreeState(NamedTuple):
    """The number of updates, the sum of their weights in the average, the base optimizer's weights (z in the
    paper) and its state.
    """

    updates: Int[Array, ""]
    total: Float[Array, ""]
    z: Params
    wrapped: OptState


def ema(decay: float) -> Averaging:
    """Return the averaging `average_t = d average_(t-1) + (1 - d) weights_t`, in float32 or wider.

    It starts from the weights at step 0, with `d = min(decay, t / (t + 9))`, so that they do not dominate the
    average of a short run.
    """

    def wrap(transform: optax.GradientTransformation) -> optax.GradientTransformation:
        wrapped = optax.with_extra_args_support(transform)

        def init(params: Params) -> EmaState:
            return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), wrapped.init(params))

        def update(
            grads: Params, state: EmaState, params: Params | None = None, **extra: Any
        ) -> tuple[Params, OptState]:
            updates, inner = wrapped.update(grads, state.wrapped, params, **extra)
            count = optax.safe_increment(state.updates)

            def move(average: Array, p: Array, u: Array) -> Array:
                t = count.astype(average.dtype)
                return average + (1 - jnp.minimum(decay, t / (t + EARLY))) * (p + u - average)

            return updates, EmaState(count, jax.tree.map(move, state.average, params, updates), inner)

        return optax.GradientTransformationExtraArgs(init, update)

    def averaged(opt_state: OptState, params: Params) -> Params:
        found = [state.average for state in _states_of(EmaState, opt_state)]
        return jax.tree.map(lambda x, p: x.astype(p.dtype), tree.combine(*found), params)

    return Averaging(wrap, averaged)


def schedule_free(b1: float, schedule: optax.Schedule) -> Averaging:
    """Return the averaging of schedule-free learning (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    `wrap` gets the base optimizer, which has no momentum. It updates z with the gradient at the trained
    weights `y = (1 - b1) z + b1 x`, where x is the average of z over the steps, weighted by their squared
    learning rates.
    """

    def wrap(transform: optax.GradientTransformation) -> optax.GradientTransformation:
        wrapped = optax.with_extra_args_support(transform)

        def init(params: Params) -> ScheduleFreeState:
            zero = jnp.zeros((), jnp.int32)
            return ScheduleFreeState(
                zero, zero.astype(jnp.float32), jax.tree.map(jnp.copy, params), wrapped.init(params)
            )

        def update(
            grads: Params, state: ScheduleFreeState, params: Params | None = None, **extra: Any
        ) -> tuple[Params, OptState]:
            updates, inner = wrapped.update(grads, state.wrapped, params, **extra)
            weight = jnp.square(jnp.asarray(schedule(state.updates), jnp.float32))
            total = state.total + weight
            c = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)

            def move(y: Array, z: Array, u: Array) -> Array:
                # x' = (1 - c) x + c z' and y' = (1 - b1) z' + b1 x', with x = (y - (1 - b1) z) / b1
                share = c.astype(z.dtype)
                x_b1 = y - (1 - b1) * z
                return (1 - share) * x_b1 + (b1 * share + (1 - b1)) * (z + u) - y

            moves = jax.tree.map(move, params, state.z, updates)
            z = jax.tree.map(jnp.add, state.z, updates)
            return moves, ScheduleFreeState(optax.safe_increment(state.updates), total, z, inner)

        return optax.GradientTransformationExtraArgs(init, update)

    def averaged(opt_state: OptState, params: Params) -> Params:
        z = tree.combine(*(state.z for state in _states_of(ScheduleFreeState, opt_state)))

        def average(z: Array, y: Array) -> Array:
            return ((y.astype(z.dtype) - (1 - b1) * z) / b1).astype(y.dtype)

        return jax.tree.map(average, z, params)

    return Averaging(wrap, averaged)


def _states_of(kind: type, opt_state: OptState) -> list[Any]:
    """Return the states of a type in an optimizer state.

    There is one, or one for each group of a layerwise or freezable optimizer, with None in place of the other
    groups' parameters.
    """
    is_kind = partial(_is_instance, kind)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(x)]


def _is_instance(kind: type, x: Any) -> bool:
    return isinstance(x, kind)
