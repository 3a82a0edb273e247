"""Reward models: a scalar head is taught to score the better of two answers higher (Bradley & Terry 1952)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.batch import Pairs
from jaxft.nn.param import Model
from jaxft.objectives.alarms import Told, by_length, change, skipped
from jaxft.objectives.metrics import Correlation, Max, Min, Sum
from jaxft.objectives.read_positions import read_scores
from jaxft.tree import struct

Values = Float[Array, "B P"]


def bradley_terry(chosen: Values, rejected: Values, margin: Values) -> Values:
    """-log sigmoid(r_chosen - r_rejected - margin), a value a pair (Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin of
    Touvron et al. 2023, arXiv:2307.09288, eq. 2)."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


@struct
class Rewards:
    """What a forward pass leaves of a batch: a reward an answer. batch: the pairs without their tokens."""

    chosen: Values
    rejected: Values
    batch: Pairs


@dataclass(frozen=True)
class Reward:
    """`(params, batch, key, aux) -> (loss, metrics)`; see reward(). Its two halves serve several adapters on one base."""

    model: Model
    loss: Callable[[Values, Values, Values], Values]
    margin: str | None
    center: float

    def __call__(
        self, params: Any, batch: Pairs, key: Array | None, aux: Any
    ) -> tuple[Array, dict[str, Any]]:
        """Both halves."""
        return self.judge(self.see(params, batch, key, aux), aux)

    def see(self, params: Any, batch: Pairs, key: Array | None, aux: Any) -> Rewards:
        """The forward pass: all answers go through the model together, and each is scored at its last token."""
        B, P, A = batch.last.shape
        h = self.model.hidden(params, batch, key)
        r_BPA = read_scores(self.model, params, h, batch.last.reshape(B, P * A)).reshape(B, P, A)
        of = lambda kind: r_BPA[..., batch.kinds.index(kind)]  # noqa: E731
        unread = (
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
        )
        none: dict[str, Any] = dict.fromkeys(unread)
        return Rewards(of("chosen"), of("rejected"), replace(batch, **none))

    def judge(self, seen: Rewards, aux: Any) -> tuple[Array, dict[str, Any]]:
        """Loss and metrics of what was seen."""
        chosen, rejected, dtype = seen.chosen, seen.rejected, seen.chosen.dtype
        weight = seen.batch.pair_weights.astype(dtype)
        margin = jnp.zeros((), dtype) if self.margin is None else self._margin(seen.batch).astype(dtype)
        values = self.loss(chosen, rejected, margin) + self.center * jnp.square(chosen + rejected)
        value = jnp.sum(jnp.where(weight > 0, weight * values, 0))
        return value, jax.lax.stop_gradient({"loss": Sum(value, jnp.sum(weight)), **_metrics(seen)})

    def _margin(self, batch: Pairs) -> Values:
        if self.margin not in batch.columns:
            found = ", ".join(batch.columns) or "none"
            raise ValueError(
                f"margin={self.margin} is no column of the pairs, which have {found}; name it in data.extras too"
            )
        return batch.columns[self.margin]

    def watch(self, memory: dict[str, Any], entry: dict[str, Any], last: bool) -> Told:
        """Whether more than length was learned, and steps that were not finite; see watch.py."""
        number = {
            name: value for name, value in entry.items() if isinstance(value, int | float)
        }  # null was not finite
        memory, lines, alarms = skipped(memory, number, last, None)
        found, guess = number.get("eval_accuracy"), by_length(number)
        if last and found is not None and guess is not None and found <= guess[0]:
            told = f"held-out accuracy is {found:.2f} and always taking the {guess[1]} answer gives {guess[0]:.2f}"
            alarms = [
                *alarms,
                f"{told}: nothing was learned but length, if that. Train longer, or with a higher optim.lr",
            ]
        return memory, lines, alarms

    def words(self, first: dict[str, Any], last: dict[str, Any]) -> list[str]:
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


def reward(
    model: Model,
    margin: str | None = None,
    center: float = 0.0,
    loss: Callable[[Values, Values, Values], Values] = bradley_terry,
) -> Reward:
    """`sum_p w_p (loss(r_chosen, r_rejected, margin) + center (r_chosen + r_rejected)^2)` over pairs, linear in their weights.

    model: with a scalar head, models.heads.scorer's. margin: a column of the pairs' numbers, by how much the chosen answer is to
    be ahead; None for 0. center: holds rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244), of which the rest of the loss
    only knows differences; 0.01 is usual. Metrics, TRL's names: loss, accuracy, margin and the least, mean and largest reward.
    """
    if not 0 <= center < float("inf"):
        raise ValueError(f"center={center}; wanted a number from 0 up")
    return Reward(model, loss, margin, center)


def _metrics(seen: Rewards) -> dict[str, Any]:
    """Every pair the same weight; a tie is no win."""
    chosen, rejected, batch = seen.chosen, seen.rejected, seen.batch
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
