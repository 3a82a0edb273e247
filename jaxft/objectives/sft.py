"""Supervised fine-tuning: weighted cross-entropy of the target tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.batch import Tokens
from jaxft.nn.param import Model
from jaxft.objectives.logprobs import LogProbs
from jaxft.objectives.metrics import Sum
from jaxft.objectives.read_positions import read_logps, weighted_read_logp
from jaxft.tree import struct


@struct
class Read:
    """What a forward pass leaves of a batch: `logp` has a gradient, nothing else has one."""

    logp: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    top1: Float[Array, "B M"]
    weight: Float[Array, "B M"]


@dataclass(frozen=True)
class Supervised:
    """`(params, batch, key, aux) -> (loss, metrics)`; see sft(). Its two halves serve several adapters on one base."""

    model: Model

    def __call__(
        self, params: Any, batch: Tokens, key: Array | None, aux: Any
    ) -> tuple[Array, dict[str, Any]]:
        """In one pass, as the weights are known beforehand."""
        reads = batch.read, batch.targets, batch.token_weights
        total, lp = weighted_read_logp(self.model, params, self.model.hidden(params, batch, key), reads)
        return -total, _metrics(-total, _read(lp, batch))

    def see(self, params: Any, batch: Tokens, key: Array | None, aux: Any) -> Read:
        """The forward pass."""
        h = self.model.hidden(params, batch, key)
        return _read(read_logps(self.model, params, h, batch.read, batch.targets), batch)

    def judge(self, seen: Read, aux: Any) -> tuple[Array, dict[str, Any]]:
        """Loss and metrics of what was seen."""
        loss = -jnp.sum(seen.weight * seen.logp)
        return loss, _metrics(loss, seen)


def sft(model: Model) -> Supervised:
    """`loss = -sum_t w_t log p(target_t | before)`, with the batch's own token weights (they sum to 1 over a step).

    Metrics, TRL's names: loss, entropy and mean_token_accuracy as means over the tokens that have a loss.
    """
    return Supervised(model)


def _read(lp: LogProbs, batch: Tokens) -> Read:
    rest = jax.lax.stop_gradient((lp.entropy, lp.top1, batch.token_weights.astype(lp.logp.dtype)))
    return Read(lp.logp, *rest)


def _metrics(loss: Array, seen: Read) -> dict[str, Any]:
    trained = (seen.weight > 0).astype(seen.weight.dtype)
    count = jnp.sum(trained)
    metrics = {
        "loss": Sum(loss, jnp.sum(seen.weight)),
        "entropy": Sum(jnp.sum(trained * seen.entropy), count),
        "mean_token_accuracy": Sum(jnp.sum(trained * seen.top1), count),
    }
    return jax.lax.stop_gradient(metrics)
