"""Reward models: a scalar head is taught to score the better of two answers higher (Bradley & Terry 1952)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.batch import Pairs, without_fields
from jaxft.objectives.alarms import Alarms, by_length, change, skipped
from jaxft.objectives.logprobs import LanguageModel
from jaxft.objectives.metrics import Correlation, Max, Min, Sum
from jaxft.objectives.objective import Objective, Report
from jaxft.objectives.read_positions import read_scores
from jaxft.tree import Aux, Metrics, Params, struct

Values = Float[Array, "B P"]
UNUSED = (
    "ids",
    "segments",
    "positions",
    "read",
    "targets",
    "answers",
    "places",
    "last",
    "reference",
    "branches",
)  # fields of Pairs that the loss does not read


def bradley_terry(chosen: Values, rejected: Values, margin: Values) -> Values:
    """-log sigmoid(r_chosen - r_rejected - margin), a value a pair (Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin of
    Touvron et al. 2023, arXiv:2307.09288, eq. 2)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


@struct
class Outputs:
    """The forward pass of a batch: a reward per response. batch: the pairs without their tokens."""

    chosen: Values
    rejected: Values
    batch: Pairs


def reward(
    model: LanguageModel,
    margin: str | None = None,
    center: float = 0.0,
    loss: Callable[[Values, Values, Values], Values] = bradley_terry,
) -> Objective:
    """`sum_p w_p (loss(r_chosen, r_rejected, margin) + center (r_chosen + r_rejected)^2)`, linear in the pairs' weights.

    model: with a scalar head, models.heads.scorer's. margin: a column of the pairs, by how much the chosen response should be
    ahead; None for 0. center: keeps rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244), since the rest of the loss
    depends on differences alone; 0.01 is usual. Metrics, TRL's names: loss, accuracy, margin and the smallest, mean and largest
    reward.
    """
    if not 0 <= center < float("inf"):
        raise ValueError(f"center={center}; expected a number from 0 up")

    def forward(params: Params, batch: Pairs, key: Array | None, aux: Aux) -> Outputs:
        # All responses go through the model together; each is scored at its last token.
        B, P, A = batch.last.shape
        h = model.hidden(params, batch, key)
        r_BPA = read_scores(model, params, h, batch.last.reshape(B, P * A)).reshape(B, P, A)
        chosen, rejected = (r_BPA[..., batch.kinds.index(kind)] for kind in ("chosen", "rejected"))
        return Outputs(chosen, rejected, without_fields(batch, UNUSED))

    def objective_loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        chosen, rejected, dtype = outputs.chosen, outputs.rejected, outputs.chosen.dtype
        weight = outputs.batch.pair_weights.astype(dtype)
        ahead = jnp.zeros((), dtype) if margin is None else _column(outputs.batch, margin).astype(dtype)
        values = loss(chosen, rejected, ahead) + center * jnp.square(chosen + rejected)
        value = jnp.sum(jnp.where(weight > 0, weight * values, 0))
        return value, jax.lax.stop_gradient({"loss": Sum(value, jnp.sum(weight)), **_metrics(outputs)})

    return Objective(forward, objective_loss, report=Report(alarms, summary))


def _column(batch: Pairs, name: str) -> Values:
    if name not in batch.columns:
        found = ", ".join(batch.columns) or "none"
        raise ValueError(
            f"margin={name} is no column of the pairs, which have {found}; name it in data.extras too"
        )
    return batch.columns[name]


def alarms(memory: dict[str, Any], entry: dict[str, Any], last: bool) -> Alarms:
    """Whether more than length was learned, and steps that were not finite; see watch.py."""
    number = {
        name: value for name, value in entry.items() if isinstance(value, int | float)
    }  # null was not finite
    memory, lines, found_alarms = skipped(memory, number, last, None)
    found, guess = number.get("eval_accuracy"), by_length(number)
    if last and found is not None and guess is not None and found <= guess[0]:
        told = (
            f"held-out accuracy is {found:.2f} and always taking the {guess[1]} answer gives {guess[0]:.2f}"
        )
        found_alarms = [
            *found_alarms,
            f"{told}: nothing was learned but length, if that. Train longer, or with a higher optim.lr",
        ]
    return Alarms(memory, lines, found_alarms)


def summary(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """How the run went, in plain lines. first, last: of every name in metrics.jsonl the first value and the newest."""
    there = lambda *names: all(isinstance(last.get(name), int | float) for name in names)  # noqa: E731
    lines = []
    if there("eval_accuracy"):
        guess = by_length(last)
        beside = f"; always taking the {guess[1]} answer gives {guess[0]:.2f}" if guess else ""
        lines.append(f"held-out accuracy: {change('eval_accuracy', first, last, 2)}{beside}")
    if there("eval_margin"):
        lines.append(f"held-out margin of the rewards: {change('eval_margin', first, last, 3)}")
    if there("eval_mean_reward", "eval_min_reward", "eval_max_reward"):
        mean, low, high = (last[f"eval_{name}_reward"] for name in ("mean", "min", "max"))
        lines.append(f"rewards of held-out answers: {mean:.2f} in the mean, {low:.2f} to {high:.2f}")
    if there("eval_length/margin_correlation"):
        lines.append(f"margin and length: correlation {last['eval_length/margin_correlation']:.2f}")
    return lines


def _metrics(outputs: Outputs) -> dict[str, Any]:
    """Every pair the same weight; a tie is no win."""
    chosen, rejected, batch = outputs.chosen, outputs.rejected, outputs.batch
    used = batch.pair_weights > 0
    margin = chosen - rejected
    won = jnp.where(jnp.isnan(margin), margin, (margin > 0).astype(margin.dtype))
    count = lambda kind: batch.lengths[..., batch.kinds.index(kind)].astype(margin.dtype)  # noqa: E731
    longer = count("chosen") - count("rejected")
    by_length = (longer > 0).astype(margin.dtype) + (longer == 0).astype(margin.dtype) / 2
    return {
        "accuracy": _mean(won, used),
        "margin": _mean(margin, used),
        "mean_reward": _mean((chosen + rejected) / 2, used),
        "min_reward": Min(jnp.min(jnp.where(used, jnp.minimum(chosen, rejected), jnp.inf))),
        "max_reward": Max(jnp.max(jnp.where(used, jnp.maximum(chosen, rejected), -jnp.inf))),
        "length/margin_correlation": Correlation.of(longer, margin, used),
        "length/accuracy_if_longer_wins": _mean(by_length, used),
    }


def _mean(values: Values, where: Array) -> Sum:
    w = where.astype(values.dtype)
    return Sum(jnp.sum(jnp.where(where, values, 0)), jnp.sum(w))
