"""Decisions: a model's probabilities of given choices, such as the tokens A, B and C, at one position of a
row, trained by a proper scoring rule.

The expected value of a proper scoring rule is smallest for the true probabilities (Gneiting & Raftery 2007,
doi:10.1198/016214506000001437), so training by one makes a model's probabilities match those in its rows.
"""

from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Decisions
from jaxft.nn.tree import Aux, LayerOutputs, Metrics, Params, static, struct
from jaxft.objectives.logprobs import LanguageModel
from jaxft.objectives.metrics import (
    ENTROPY,
    LOSS,
    ROWS,
    CalibrationError,
    PerRow,
    Sum,
    by_row,
    layer_metrics,
    mean_losses,
)
from jaxft.objectives.objective import Objective
from jaxft.objectives.read_positions import read_logits
from jaxft.objectives.sft import sft

ACCURACY, LOG_LOSS, BRIER, ECE = "accuracy", "log_loss", "brier", "ece"
CONFIDENCE, CORRECT = "confidence", "correct"  # of single rows: what ece compares
NONE = -1e30  # the log-probability of a choice that a row does not have; finite, since 0 * inf is NaN

PerChoice = Float[Array, "... C"]
DecisionLoss = Callable[[PerChoice, PerChoice], Float[Array, "..."]]


def cross_entropy(log_p: PerChoice, q: PerChoice) -> Float[Array, "..."]:
    """`-sum_c q_c log p_c`: the expected logarithmic score (Good 1952) of labels with probabilities q."""
    return -jnp.sum(q * log_p, -1)


def log_score(log_p: PerChoice, q: PerChoice) -> Float[Array, "..."]:
    """`sum_c q_c log(q_c / p_c)`: cross_entropy minus its smallest possible value, so that it is 0 for p = q.

    Its gradient is cross_entropy's. If q is 1 for one choice, the two are equal.
    """
    return jnp.sum(q * (jnp.log(jnp.where(q > 0, q, 1)) - log_p), -1)


def brier(log_p: PerChoice, q: PerChoice) -> Float[Array, "..."]:
    """`sum_c (p_c - q_c)^2`, from 0 to 2 (Brier 1950, "Verification of forecasts expressed in terms of
    probability").

    It is bounded, so that a wrong label costs less than with cross_entropy.

    >>> round(float(brier(jnp.log(jnp.array([0.75, 0.25])), jnp.array([1.0, 0.0]))), 3)
    0.125
    """
    return jnp.sum(jnp.square(jnp.exp(log_p) - q), -1)


def choice_log_probs(logits: Float[Array, "B M U"], choices: Int[Array, "B M C"]) -> Float[Array, "B M C"]:
    """Return the log-softmax over the choices of each decision.

    logits: of the U tokens that are choices anywhere in the batch. choices: indices into the axis U.
    Decisions with fewer than C choices are padded with -1, which has the logit NONE.
    """
    of_choices = jnp.take_along_axis(logits, jnp.maximum(choices, 0), axis=-1)
    return jax.nn.log_softmax(jnp.where(choices >= 0, of_choices, jnp.asarray(NONE, of_choices.dtype)), -1)


@struct
class Outputs:
    """The forward pass of a batch. log_p: the model's log-probabilities of the choices. q: the dataset's
    probabilities of them. weight: of each decision; 0 marks padding. sources: for each decision the index of
    its dataset in source_names; None if there is one dataset.
    """

    log_p: Float[Array, "B M C"]
    q: Float[Array, "B M C"]
    weight: Float[Array, "B M"]
    sources: Int[Any, "B M"] | None = None
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row
    source_names: tuple[str, ...] = static(default=())


def decision(model: LanguageModel, loss: DecisionLoss = cross_entropy) -> Objective:
    """`sum_d w_d loss(log p_d, q_d)` over decisions d with weights w: p is the softmax over the logits of the
    choices, q are the probabilities of the choices in the dataset.

    Only logits of tokens that are choices are computed. loss: cross_entropy, brier, log_score, or your own
    function (log_p [..., C], q [..., C]) -> [...].

    Metrics, over decisions of equal weight: accuracy (p and q have the same most probable choice), log_loss
    (cross_entropy), brier, ece (metrics.CalibrationError, where `correct` is q of the predicted choice) and
    entropy of p in nats.

    The loss of a decision between two choices, of which the first is right; only `forward` reads the model:

    >>> p, q = jnp.array([[[0.75, 0.25]]]), jnp.array([[[1.0, 0.0]]])
    >>> loss, metrics = decision(model=None, loss=brier).loss(Outputs(jnp.log(p), q, jnp.ones((1, 1))), {})
    >>> round(float(loss), 3)
    0.125
    """

    def forward(params: Params, batch: Decisions, key: Array | None, aux: Aux) -> Outputs:
        h, layers = model.hidden(params, batch, key)
        tokens = jnp.asarray(batch.tokens, jnp.int32)
        log_p = choice_log_probs(read_logits(model, params, h, batch.read, tokens), batch.choices)
        q, weight = batch.probabilities.astype(log_p.dtype), batch.token_weights.astype(log_p.dtype)
        return Outputs(log_p, q, weight, batch.sources, by_row(layers), batch.source_names)

    def decision_loss(outputs: Outputs, aux: Aux, with_rows: bool = False) -> tuple[Array, Metrics]:
        values = loss(outputs.log_p, outputs.q)
        total = jnp.sum(jnp.where(outputs.weight > 0, outputs.weight * values, 0))
        metrics = {
            **mean_losses(values, outputs.weight, outputs.sources, outputs.source_names),
            **_metrics(outputs, values if with_rows else None),
            **layer_metrics(outputs.layers),
        }
        return total, jax.lax.stop_gradient(metrics)

    eval_loss = partial(decision_loss, with_rows=True)
    return Objective(forward, decision_loss, eval_loss=eval_loss, text=sft(model))


def _metrics(outputs: Outputs, losses: Float[Array, "B M"] | None) -> Metrics:
    """Return the metrics of a batch; with `losses`, one per decision, also the PerRow values of decisions."""
    log_p, q = outputs.log_p, outputs.q
    used = (outputs.weight > 0) & (jnp.sum(q, -1) > 0)  # rows that are only scored have no probabilities
    top = jnp.argmax(log_p, -1)[..., None]
    confidence, correct = (jnp.take_along_axis(x, top, -1)[..., 0] for x in (jnp.exp(log_p), q))
    accurate = (correct >= jnp.max(q, -1)).astype(q.dtype)

    def mean(values: Float[Array, "B M"]) -> Sum:
        return Sum.of(jnp.where(used, values, 0), used)

    metrics: Metrics = {
        ACCURACY: mean(accurate),
        LOG_LOSS: mean(cross_entropy(log_p, q)),
        BRIER: mean(brier(log_p, q)),
        ECE: CalibrationError.of(confidence, correct, used),
        ENTROPY: mean(cross_entropy(log_p, jnp.exp(log_p))),
    }
    if losses is not None:
        rows = {LOSS: losses, ACCURACY: accurate, CONFIDENCE: confidence, CORRECT: correct}
        metrics |= {ROWS + name: PerRow.of(values, outputs.weight) for name, values in rows.items()}
    return metrics
