"""Skip steps whose loss or gradient norm is a spike, such as those with broken rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.optim.optimizer import Optimizer
from jaxft.optim.update import StepInfo, Updated
from jaxft.tree import Grads, OptState, Params

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
        seen, now = (opt_state.losses, opt_state.norms), _of_step(info)
        jumps = [_is_above(x, past, opt_state.finite, deviations) for x, past in zip(now, seen, strict=True)]
        spike = info.finite & (jumps[0] | jumps[1])
        moves = info._replace(finite=info.finite & ~spike)
        params, wrapped = optimizer.update(grads, opt_state.wrapped, params, moves)
        at = opt_state.finite % steps
        losses, norms = (
            jnp.where(info.finite, past.at[at].set(x), past) for x, past in zip(now, seen, strict=True)
        )
        count = opt_state.finite + info.finite.astype(jnp.int32)
        skipped = opt_state.skipped + spike.astype(jnp.int32)
        return params, SpikeState(wrapped, losses, norms, count, skipped)

    replicated = (*optimizer.replicated, *BUFFERS)
    return optimizer._replace(init=init, check=check, update=update, replicated=replicated)


def _of_step(info: StepInfo) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the loss and the gradient norm of a step in float32. Raises ValueError without a loss."""
    if info.loss is None:
        raise ValueError("skip_spikes needs the step's loss in StepInfo.loss")
    return info.loss.astype(jnp.float32), info.norm.astype(jnp.float32)


def _is_above(
    x: Float[Array, ""], past: Float[Array, " N"], count: Int[Array, ""], deviations: float
) -> Bool[Array, ""]:
    """Whether x is more than `deviations` sample standard deviations above the mean of the past values."""
    size = past.shape[0]
    known = jnp.minimum(count, size)
    is_known = jnp.arange(size, dtype=known.dtype) < known
    n = jnp.maximum(known, 2).astype(jnp.float32)
    mean = jnp.sum(jnp.where(is_known, past, 0.0)) / n
    variance = jnp.sum(jnp.where(is_known, jax.lax.square(past - mean), 0.0)) / (n - 1)
    return (known >= size // 2) & (x - mean > deviations * jnp.sqrt(variance))
