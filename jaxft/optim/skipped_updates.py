"""Optimizers that leave parameters unchanged in some steps: at loss spikes, or the policy while heads, such
as a critic, are updated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.nn.param import is_spec
from jaxft.optim.optimizer import Optimizer, Specs
from jaxft.optim.update import StepInfo, Updated, is_updated
from jaxft.tree import Grads, OptState, Params

POLICY = ("adapter", "base")  # top-level names of the policy's own parameters; the others are heads


class FreezableState(NamedTuple):
    """Optimizer states of the policy and of the heads (None without heads), and how often the policy was
    updated.
    """

    policy: OptState
    heads: OptState
    policy_updates: Int[Array, ""]


def freezable(make: Callable[[Specs], Optimizer], specs: Specs) -> Optimizer:
    """Build an optimizer for the policy and one for the heads, so that freezing one touches nothing of the
    other.

    A step with `info.frozen` leaves the policy's parameters and all of its optimizer state unchanged, counts
    included. Gradients are clipped by their global norm over policy and heads. make: builds an optimizer of
    the leaves with a spec. specs: of all trainable leaves by top-level name.
    """
    policy_specs, head_specs = _split(specs)
    policy = make(policy_specs)
    heads = make(head_specs) if jax.tree.leaves(head_specs, is_leaf=is_spec) else None

    def init(params: Params) -> FreezableState:
        is_tree = isinstance(params, dict)  # optax.tree.map_params passes one node in place of all parameters
        policy_params, head_params = _split(params) if is_tree else (params, params)
        return FreezableState(
            policy.init(policy_params),
            None if heads is None else heads.init(head_params),
            jnp.zeros((), jnp.int32),
        )

    def check(grads: Grads, opt_state: FreezableState, params: Params, info: StepInfo) -> Bool[Array, ""]:
        (policy_grads, head_grads), (policy_params, head_params) = _split(grads), _split(params)
        fine = policy.check(policy_grads, opt_state.policy, policy_params, info)
        if heads is not None:
            fine &= heads.check(head_grads, opt_state.heads, head_params, info._replace(frozen=None))
        return fine

    def update(grads: Grads, opt_state: FreezableState, params: Params, info: StepInfo) -> Updated:
        (policy_grads, head_grads), (policy_params, head_params) = _split(grads), _split(params)
        moves, info = is_updated(info), info._replace(frozen=None)
        policy_params, policy_state = policy.update(
            policy_grads, opt_state.policy, policy_params, info._replace(finite=moves)
        )
        head_state = opt_state.heads
        if heads is not None:
            head_params, head_state = heads.update(head_grads, head_state, head_params, info)
        updates = opt_state.policy_updates + moves.astype(jnp.int32)
        return _join(policy_params, head_params), FreezableState(policy_state, head_state, updates)

    return policy._replace(init=init, check=check, update=update)


def _split(params: Params) -> tuple[Params, Params]:
    """(policy, heads) of a tree by top-level name, each with None in place of the other's leaves."""

    def without(x: Any) -> Any:
        return jax.tree.map(lambda _: None, x)

    return (
        {name: x if name in POLICY else without(x) for name, x in params.items()},
        {name: without(x) if name in POLICY else x for name, x in params.items()},
    )


def _join(policy: Params, heads: Params) -> Params:
    """Undo _split."""
    return {name: policy[name] if name in POLICY else heads[name] for name in policy}


BUFFERS = ("losses", "norms")  # fields that every device stores in full


class SpikeState(NamedTuple):
    """The wrapped optimizer's state, the losses and gradient norms of the last N finite steps, and the number
    of finite steps and of skipped ones.
    """

    wrapped: OptState
    losses: Float[Array, " N"]
    norms: Float[Array, " N"]
    finite: Int[Array, ""]
    skipped: Int[Array, ""]


def skip_spikes(optimizer: Optimizer, deviations: float, steps: int) -> Optimizer:
    """Return the optimizer with an update that changes nothing at a spike.

    A step is a spike if its loss or its gradient norm is more than `deviations` standard deviations above the
    mean of the `steps` finite steps before it. These include spikes, so that after a lasting change steps are
    soon taken again. The first steps // 2 steps are never spikes (as in OLMo-core's SkipStepOptimizer). Like
    a non-finite step, a spike advances neither the learning rate nor the optimizer's count of updates.
    """

    def init(params: Params) -> SpikeState:
        zero, empty = jnp.zeros((), jnp.int32), jnp.zeros(steps, jnp.float32)
        return SpikeState(optimizer.init(params), empty, jnp.copy(empty), zero, jnp.copy(zero))

    def check(grads: Grads, opt_state: SpikeState, params: Params, info: StepInfo) -> Bool[Array, ""]:
        return optimizer.check(grads, opt_state.wrapped, params, info)

    def update(grads: Grads, opt_state: SpikeState, params: Params, info: StepInfo) -> Updated:
        past_values, now = (opt_state.losses, opt_state.norms), _of_step(info)
        jumps = [
            _is_above(x, past, opt_state.finite, deviations) for x, past in zip(now, past_values, strict=True)
        ]
        spike = info.finite & (jumps[0] | jumps[1])
        moves = info._replace(finite=info.finite & ~spike)
        params, wrapped = optimizer.update(grads, opt_state.wrapped, params, moves)
        at = opt_state.finite % steps
        losses, norms = (
            jnp.where(info.finite, past.at[at].set(x), past) for x, past in zip(now, past_values, strict=True)
        )
        count = opt_state.finite + info.finite.astype(jnp.int32)
        skipped = opt_state.skipped + spike.astype(jnp.int32)
        return params, SpikeState(wrapped, losses, norms, count, skipped)

    replicated = (*optimizer.replicated, *BUFFERS)
    return optimizer._replace(init=init, check=check, update=update, replicated=replicated)


def _of_step(info: StepInfo) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the loss and the gradient norm of a step in float32. Raises ValueError without a loss."""
    if info.loss is None:
        raise ValueError(
            "optim.skip_spikes needs the step's loss in StepInfo.loss, which is None; pass the loss"
        )
    return info.loss.astype(jnp.float32), info.norm.astype(jnp.float32)


def _is_above(
    x: Float[Array, ""], past: Float[Array, " N"], count: Int[Array, ""], deviations: float
) -> Bool[Array, ""]:
    """Whether x is more than `deviations` sample standard deviations above the mean of the past values."""
    size = past.shape[0]
    used = jnp.minimum(count, size)
    is_known = jnp.arange(size, dtype=used.dtype) < used
    n = jnp.maximum(used, 2).astype(jnp.float32)
    mean = jnp.sum(jnp.where(is_known, past, 0.0)) / n
    variance = jnp.sum(jnp.where(is_known, jax.lax.square(past - mean), 0.0)) / (n - 1)
    return (used >= size // 2) & (x - mean > deviations * jnp.sqrt(variance))
