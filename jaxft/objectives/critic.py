"""The critic of PPO: a value function trained together with the policy, and its clipped loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.annotations import above, check_bounds
from jaxft.batch import Rollout
from jaxft.objectives.metrics import Correlation, Sum
from jaxft.objectives.read_positions import read_numbers
from jaxft.tree import Metrics, Params

VALUE_LOSS, VALUE_CLIP_FRACTION = "loss/value_avg", "val/clipfrac_avg"
RETURNS_CORRELATION = "val/returns_correlation"

# (params, batch, h [B, T, D] of the policy) -> the expected return at each read position [B, M]
ValueFunction = Callable[[Params, Rollout, Array], Array]


@dataclass(frozen=True)
class Critic:
    """A value function whose loss is added to the policy's, times `coef`.

    clip: how far from the values at sampling the predictions may move before the loss is clipped, None for no
    clipping.
    """

    values: ValueFunction
    coef: Annotated[float, above(0)] = 0.1
    clip: Annotated[float | None, above(0)] = 0.2

    def __post_init__(self) -> None:
        check_bounds(self, "Critic")


def value_function(
    hidden: Callable[[Params, Rollout, Array], Array], head: Callable[[Params, Array], Array]
) -> ValueFunction:
    """Return the value function `head(params, h [N, m, D]) -> [N, m]` of hidden states.

    hidden(params, batch, h [B, T, D] of the policy) -> [B, T, D] is a forward pass with another adapter, or
    returns h.
    """

    def values(params: Params, batch: Rollout, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B M"]:
        states = hidden(params, batch, h_BTD)
        return read_numbers(partial(head, params), states, batch.read, batch.lengths.shape[1])

    return values


def value_loss(
    values: Float[Array, "B M"], old: Float[Array, "B M"], returns: Float[Array, "B M"], clip: float | None
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """(`max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2`, where the clipped term is the larger one); as in
    TRL's PPO.

    With clip=None `(v - R)^2 / 2`.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, jnp.zeros(values.shape, bool)
    clipped = (jnp.clip(values, old - clip, old + clip) - returns) ** 2
    return jnp.maximum(plain, clipped) / 2, clipped > plain


def critic_loss(critic: Critic, values: Float[Array, "B M"] | None, batch: Rollout) -> tuple[Array, Metrics]:
    """Return the critic's weighted loss and its metrics. Raises ValueError if the batch lacks a field."""
    if values is None or batch.values is None or batch.returns is None or batch.value_weights is None:
        raise ValueError(
            "a critic needs values, returns and value_weights in the batch. Let the rollout compute them"
        )
    chex.assert_equal_shape([values, batch.values, batch.returns, batch.value_weights])
    weights = batch.value_weights.astype(values.dtype)
    used = (weights != 0) & (batch.responses < batch.lengths.shape[1])

    def masked(x: Array) -> Array:
        return jnp.where(used, x.astype(values.dtype), 0)

    predicted, returns = masked(values), masked(batch.returns)
    losses, clipped = value_loss(predicted, masked(batch.values), returns, critic.clip)
    cost = jnp.sum(weights * losses)
    return cost, {
        VALUE_LOSS: Sum(cost, jnp.sum(weights)),
        VALUE_CLIP_FRACTION: Sum.of(clipped.astype(values.dtype), used),
        RETURNS_CORRELATION: Correlation.of(predicted, returns, used),
    }
