"""Supervised fine-tuning: weighted cross-entropy of the target tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Tokens
from jaxft.objectives.logprobs import LanguageModel, LogProbs
from jaxft.objectives.metrics import ENTROPY, LOSS, TOKEN_ACCURACY, Sum, losses_by_source
from jaxft.objectives.objective import Objective, Scores
from jaxft.objectives.read_positions import read_logps, weighted_read_logp
from jaxft.tree import Aux, Metrics, Params, static, struct


@struct
class Outputs:
    """The forward pass of a batch. Only `logp` has a gradient."""

    logp: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    top1: Float[Array, "B M"]
    weight: Float[Array, "B M"]
    sources: Int[Any, "B M"] | None = None
    source_names: tuple[str, ...] = static(default=())


def sft(model: LanguageModel) -> Objective:
    """`loss = -sum_t w_t log p(target_t | tokens before)`, with the batch's token weights, which sum to 1
    over a step.

    Metrics, TRL's names: loss, entropy and mean_token_accuracy as means over the tokens with a weight, and
    loss/NAME for each of several sources.
    """

    def logprobs(params: Params, batch: Tokens, key: Array | None) -> LogProbs:
        h = model.hidden(params, batch, key)
        return read_logps(model, params, h, (batch.read, batch.targets))

    def forward(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> Outputs:
        return _outputs(logprobs(params, batch, key), batch)

    def loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        value = -jnp.sum(outputs.weight * outputs.logp)
        return value, _metrics(value, outputs)

    def one_pass(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> tuple[Array, Metrics]:
        # The weights are known beforehand, so the head's gradient is computed while a chunk's logits are in
        # memory.
        reads = batch.read, batch.targets, batch.token_weights
        total, lp = weighted_read_logp(model, params, model.hidden(params, batch, key), reads)
        return -total, _metrics(-total, _outputs(lp, batch))

    def score(params: Params, batch: Tokens, aux: Aux) -> Scores:
        return Scores(logprobs(params, batch, None).logp)

    return Objective(forward, loss, score=score, one_pass=one_pass)


def _outputs(lp: LogProbs, batch: Tokens) -> Outputs:
    without_gradient = jax.lax.stop_gradient((lp.entropy, lp.top1, batch.token_weights.astype(lp.logp.dtype)))
    return Outputs(lp.logp, *without_gradient, batch.sources, batch.source_names)


def _metrics(loss: Array, outputs: Outputs) -> Metrics:
    trained = (outputs.weight > 0).astype(outputs.weight.dtype)
    count = jnp.sum(trained)
    metrics = {
        LOSS: Sum(loss, jnp.sum(outputs.weight)),
        ENTROPY: Sum(jnp.sum(trained * outputs.entropy), count),
        TOKEN_ACCURACY: Sum(jnp.sum(trained * outputs.top1), count),
        **losses_by_source(-outputs.logp, outputs.weight, outputs.sources, outputs.source_names),
    }
    return jax.lax.stop_gradient(metrics)
