"""Process reward models: a scalar head scores each step of a solution, above 0 if it is right.

Lightman et al. 2023, arXiv:2305.20050. Data and loss are as in TRL's PRMTrainer, whose two logits of a token
are one score here, their difference.
"""

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Tokens
from jaxft.objectives.alarms import (
    AlarmCheck,
    Alarms,
    Entry,
    Memory,
    change,
    check_skipped_steps,
    check_zero_gradient,
    has_numbers,
    run_alarms,
)
from jaxft.objectives.logprobs import LanguageModel
from jaxft.objectives.metrics import HELD_OUT, Sum, by_row, layer_metrics, mean_losses
from jaxft.objectives.objective import Objective, Report
from jaxft.objectives.read_positions import read_scores
from jaxft.tree import Aux, LayerOutputs, Metrics, Params, static, struct

ACCURACY, RIGHT_STEPS, WRONG_STEPS = "accuracy", "accuracy_right_steps", "accuracy_wrong_steps"


@struct
class Outputs:
    """The forward pass of a batch: a score per step. labels: 1 for a right step, 0 for a wrong one."""

    score: Float[Array, "B M"]
    labels: Int[Any, "B M"]
    weight: Float[Array, "B M"]
    sources: Int[Any, "B M"] | None = None
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row
    source_names: tuple[str, ...] = static(default=())


def process_reward(model: LanguageModel) -> Objective:
    """`sum_t w_t CE(label_t, sigmoid(score_t))` over the last tokens of steps, linear in the weights.

    model: with a scalar head, models.heads.with_scalar_head's. A batch's `read` are the last tokens of steps,
    and its `targets` their labels, 1 for right and 0 for wrong. Metrics: loss; accuracy, also of the right
    and of the wrong steps alone, as most steps of a dataset are right.

    The loss of one right step with a score of 1; only `forward` reads the model:

    >>> one = jnp.ones((1, 1))
    >>> loss, metrics = process_reward(model=None).loss(Outputs(one, one.astype(jnp.int32), one), {})
    >>> round(float(loss), 3)
    0.313
    """

    def forward(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> Outputs:
        h, layers = model.hidden(params, batch, key)
        score = read_scores(model, params, h, batch.read)
        weight = batch.token_weights.astype(score.dtype)
        return Outputs(score, batch.targets, weight, batch.sources, by_row(layers), batch.source_names)

    def loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        sign = (2 * outputs.labels - 1).astype(outputs.score.dtype)
        values = -jax.nn.log_sigmoid(sign * outputs.score)
        value = jnp.sum(jnp.where(outputs.weight > 0, outputs.weight * values, 0))
        losses = mean_losses(values, outputs.weight, outputs.sources, outputs.source_names)
        metrics = {**losses, **_accuracies(outputs, sign), **layer_metrics(outputs.layers)}
        return value, jax.lax.stop_gradient(metrics)

    return Objective(forward, loss, report=Report(_alarms, _summary))


def _accuracies(outputs: Outputs, sign: Float[Array, "B M"]) -> Metrics:
    """Fractions of the steps whose score has the sign of their label; a score of 0 counts 1/2."""
    used, agree = outputs.weight > 0, sign * outputs.score
    won = (agree > 0).astype(agree.dtype) + (agree == 0).astype(agree.dtype) / 2
    return {
        ACCURACY: Sum.of(won, used),
        RIGHT_STEPS: Sum.of(won, used & (sign > 0)),
        WRONG_STEPS: Sum.of(won, used & (sign < 0)),
    }


def _alarms(memory: Memory, entry: Entry, last: bool) -> Alarms:
    checks: dict[str, AlarmCheck] = {"skipped": check_skipped_steps, "no gradient": check_zero_gradient}
    return run_alarms(checks, memory, entry, last)


def _summary(first: Entry, last: Entry) -> list[str]:
    """Return lines about a run's held-out accuracies. first, last: each metric's first and newest value."""
    names = {"all": HELD_OUT + ACCURACY, "right": HELD_OUT + RIGHT_STEPS, "wrong": HELD_OUT + WRONG_STEPS}
    return [
        f"held-out accuracy of {what} steps: {change(name, first, last, 3)}"
        for what, name in names.items()
        if has_numbers(last, name)
    ]
