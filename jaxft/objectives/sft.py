"""Supervised fine-tuning: weighted cross-entropy of the target tokens, and its variants."""

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Tokens
from jaxft.nn.tree import Aux, LayerOutputs, Metrics, Params, static, struct
from jaxft.objectives.logprobs import Graded, LanguageModel, LogProbs, TargetLoss
from jaxft.objectives.metrics import (
    ENTROPY,
    LOSS,
    ROWS,
    TOKEN_ACCURACY,
    PerRow,
    Sum,
    by_row,
    layer_metrics,
    losses_by_source,
)
from jaxft.objectives.objective import Facts, Objective, Scores
from jaxft.objectives.read_positions import read_logps, weighted_read_loss

NLL = "nll_loss"


@struct
class Outputs:
    """The outputs of the forward pass over a batch. `logp` has a gradient, and so have `lse` (with z-loss or
    label smoothing) and `mean_logit` (with label smoothing), which are None otherwise.
    """

    logp: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    top1: Float[Array, "B M"]
    weight: Float[Array, "B M"]
    segments: Int[Any, "B M"]  # which example of its row a target is in
    sources: Int[Any, "B M"] | None = None
    lse: Float[Array, "B M"] | None = None
    mean_logit: Float[Array, "B M"] | None = None
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row
    source_names: tuple[str, ...] = static(default=())
    row_length: int = static(default=0)


def sft(
    model: LanguageModel,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    neftune: float = 0.0,
) -> Objective:
    """Supervised fine-tuning: `loss = sum_t w_t loss(target_t | tokens before)`.

    The token weights w of a step's batch sum to 1. The loss of a token is its cross-entropy, unless
    label_smoothing, z_loss or dft change it, see TargetLoss.

    neftune: alpha of the noise that training adds to the embeddings (Jain et al. 2024, arXiv:2310.05914):
    each element is uniform in [-1, 1] times alpha / sqrt(L D), where L is the number of tokens of the
    example, in packed rows too.

    Held-out rows are evaluated by their cross-entropy, without noise. Metrics, by TRL's names: loss, entropy
    and mean_token_accuracy, as means over the tokens with a weight; nll_loss, the cross-entropy, if the loss
    differs from it; loss/NAME, the cross-entropy of each source, if there are several.

    The loss of two tokens with probabilities 1/2 and 1/4; only `forward` reads the model:

    >>> p, half = jnp.array([[0.5, 0.25]]), jnp.full((1, 2), 0.5)
    >>> example = jnp.ones((1, 2), jnp.int32)
    >>> outputs = Outputs(jnp.log(p), entropy=p, top1=p, weight=half, segments=example)
    >>> loss, metrics = sft(model=None).loss(outputs, {})
    >>> round(float(loss), 4)
    1.0397
    """
    token_loss = TargetLoss(label_smoothing, z_loss, dft)
    if not 0 <= neftune < float("inf"):
        raise ValueError(f"neftune must be finite and at least 0, got {neftune}; use an alpha such as 5")
    graded: Graded = ("logp",)
    if label_smoothing:
        graded = ("logp", "lse", "mean_logit")
    elif z_loss:
        graded = ("logp", "lse")
    noise = {"neftune": neftune} if neftune else {}

    def forward(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> Outputs:
        h, layers = model.hidden(params, batch, key, **noise)
        lp = read_logps(model, params, h, (batch.read, batch.targets), graded)
        return _outputs(lp, layers, batch, graded)

    def loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        value = jnp.sum(outputs.weight * token_loss.value(outputs))
        return value, _metrics(value, outputs, token_loss)

    def eval_loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        value = -jnp.sum(outputs.weight * outputs.logp)
        return value, {**_metrics(value, outputs, TargetLoss()), **_example_losses(outputs)}

    def total_loss(params: Params, batch: Tokens, key: Array | None) -> tuple[Array, Outputs]:
        # The weights are known beforehand, so the head's gradient is computed while a chunk's logits are in
        # memory.
        h, layers = model.hidden(params, batch, key, **noise)
        reads = batch.read, batch.targets, batch.token_weights
        total, lp = weighted_read_loss(model, params, h, reads, token_loss)
        return total, _outputs(lp, layers, batch, ())

    def one_pass(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> tuple[Array, Metrics]:
        total, outputs = total_loss(params, batch, key)
        return total, _metrics(total, outputs, token_loss)

    def eval_one_pass(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> tuple[Array, Metrics]:
        total, outputs = total_loss(params, batch, key)
        return total, {**_metrics(total, outputs, token_loss), **_example_losses(outputs)}

    def score(params: Params, batch: Tokens, aux: Aux) -> Scores:
        return Scores(forward(params, batch, None, aux).logp)

    return Objective(
        forward, loss, score=score, eval_loss=eval_loss, one_pass=one_pass, facts=Facts(noise=neftune > 0),
        eval_one_pass=eval_one_pass if token_loss.is_plain else None,
    )  # fmt: skip


def _outputs(lp: LogProbs, layers: LayerOutputs, batch: Tokens, graded: Graded) -> Outputs:
    without_gradient = jax.lax.stop_gradient((lp.entropy, lp.top1, batch.token_weights.astype(lp.logp.dtype)))
    return Outputs(
        lp.logp,
        *without_gradient,
        segments=jnp.take_along_axis(batch.segments, batch.read, axis=1),
        sources=batch.sources,
        lse=lp.lse if "lse" in graded else None,
        mean_logit=lp.mean_logit if "mean_logit" in graded else None,
        layers=by_row(layers),
        source_names=batch.source_names,
        row_length=batch.ids.shape[1],
    )


def _metrics(loss: Array, outputs: Outputs, token_loss: TargetLoss) -> Metrics:
    weight = outputs.weight
    trained = (weight > 0).astype(weight.dtype)
    count = jnp.sum(trained)
    metrics = {
        LOSS: Sum(loss, jnp.sum(weight)),
        ENTROPY: Sum(jnp.sum(trained * outputs.entropy), count),
        TOKEN_ACCURACY: Sum(jnp.sum(trained * outputs.top1), count),
        **layer_metrics(outputs.layers),
        **losses_by_source(-outputs.logp, outputs.weight, outputs.sources, outputs.source_names),
    }
    if not token_loss.is_plain:
        metrics[NLL] = Sum(-jnp.sum(weight * outputs.logp), jnp.sum(weight))
    return jax.lax.stop_gradient(metrics)


def _example_losses(outputs: Outputs) -> Metrics:
    """Return each example's mean cross-entropy as PerRow: example n >= 1 of row b is at b * (T + 1) + n."""
    B, slots = outputs.logp.shape[0], outputs.row_length + 1
    at = outputs.segments + slots * jnp.arange(B, dtype=outputs.segments.dtype)[:, None]
    values = (-outputs.weight * outputs.logp, outputs.weight)
    loss, weight = (jax.ops.segment_sum(x.ravel(), at.ravel(), B * slots) for x in values)
    mean = loss / jnp.where(weight > 0, weight, 1)
    return jax.lax.stop_gradient({ROWS + LOSS: PerRow.of(mean, weight)})
