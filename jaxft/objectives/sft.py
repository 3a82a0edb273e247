"""Supervised fine-tuning: weighted cross-entropy of the target tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.batch import Tokens
from jaxft.metrics import Sum
from jaxft.objectives.logps import gather_read, weighted_logp
from jaxft.params import Model


def sft(model: Model) -> Callable:
    """`loss = -sum_t w_t log p(target_t | before)`, with the batch's own token weights (they sum to 1 over a step).

    Metrics, TRL's names: loss, entropy and mean_token_accuracy as means over the tokens that have a loss.
    """

    def objective(params: Any, batch: Tokens, key: Array | None, aux: Any) -> tuple[Array, dict[str, Any]]:
        h = gather_read(model.hidden(params, batch, key), batch.read)
        total, lp = weighted_logp(model, params, h, batch.targets, batch.token_weights)
        loss, w = -total, batch.token_weights.astype(lp.logp.dtype)
        seen = jnp.sum(w)
        trained = (w > 0).astype(lp.logp.dtype)
        count = jnp.sum(trained)
        metrics = {
            "loss": Sum(loss, seen),
            "entropy": Sum(jnp.sum(trained * lp.entropy), count),
            "mean_token_accuracy": Sum(jnp.sum(trained * lp.top1), count),
        }
        return loss, jax.lax.stop_gradient(metrics)

    return objective
