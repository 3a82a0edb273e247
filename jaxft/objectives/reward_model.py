"""Reward models: a scalar head learns to score the better of two responses higher (Bradley & Terry 1952), or
each step of a solution, above 0 if it is right (process_reward).
"""

from collections.abc import Callable
from dataclasses import field
from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Pairs, Tokens, without_fields
from jaxft.nn.tree import Aux, LayerOutputs, Metrics, Params, static, struct
from jaxft.objectives.alarms import (
    AlarmCheck,
    Alarms,
    Entry,
    Memory,
    accuracy_change,
    change,
    check_all_ties,
    check_more_than_length,
    check_skipped_steps,
    check_zero_gradient,
    has_numbers,
    length_note,
    run_alarms,
)
from jaxft.objectives.logprobs import LanguageModel
from jaxft.objectives.losses.ranking_losses import RATING, ranked_kinds
from jaxft.objectives.metrics import (
    HELD_OUT,
    LOSS,
    ROWS,
    Correlation,
    Max,
    Min,
    PerRow,
    Sum,
    WinRate,
    by_row,
    layer_metrics,
    mean_losses,
)
from jaxft.objectives.objective import Objective, Report
from jaxft.objectives.pair import LONGER_WINS, MARGIN_LENGTH_CORRELATION, longer_wins, wins
from jaxft.objectives.read_positions import read_scores

Rewards = Float[Array, "B P"]  # one per pair

ACCURACY, MARGIN = "accuracy", "margin"
MEAN_REWARD, MIN_REWARD, MAX_REWARD = "mean_reward", "min_reward", "max_reward"
# fmt: off
UNUSED = (
    "ids", "segments", "positions", "read", "targets", "responses", "offsets", "last", "reference",
    "branches",
)  # fields of Pairs that the loss does not read
# fmt: on


def bradley_terry(chosen: Rewards, rejected: Rewards, margin: Rewards) -> Rewards:
    """`-log sigmoid(r_chosen - r_rejected - margin)` of each pair.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; with the margin of Touvron et al. 2023, arXiv:2307.09288, eq.
    2.

    >>> one = jnp.ones((1, 1))
    >>> round(bradley_terry(2 * one, one, margin=0 * one).item(), 3)
    0.313
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


@struct
class Outputs:
    """The rewards of a batch of pairs.

    rewards: kind of response -> its rewards: "chosen" and "rejected", or with rankings of K responses all K
    kinds, from the best to the worst. batch: the pairs without tokens.
    """

    rewards: dict[str, Rewards]
    batch: Pairs
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row

    @property
    def chosen(self) -> Rewards:
        """The rewards of the best responses."""
        return self.rewards["chosen"]

    @property
    def rejected(self) -> Rewards:
        """The rewards of the worst responses."""
        return self.rewards["rejected"]


def reward(
    model: LanguageModel,
    margin: str | None = None,
    center: float = 0.0,
    loss: Callable[[Rewards, Rewards, Rewards], Rewards] = bradley_terry,
) -> Objective:
    """`sum_p w_p (loss(r_chosen, r_rejected, margin) + center (r_chosen + r_rejected)^2)`, linear in the
    pairs' weights.

    r: the score of a response. model: one with a scalar head, as models.adapted.with_scalar_head returns it.
    For a row with a ranking of K responses, the loss is the mean over its pairs of responses with unequal
    ratings (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    margin: by how much the chosen reward should be above the rejected one: a column of the pairs; "score" for
        the difference of their ratings (columns score_chosen, score_rejected, ...); None for 0.
    center: keeps rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244); without it the loss depends on
        differences of rewards only. 0.01 is usual.
    Metrics, by TRL's names: loss, accuracy, margin and the smallest, mean and largest reward.

        objective = reward(with_scalar_head(model), margin="score", center=0.01)
        loss, metrics = objective(params, batch, None, {})

    A batch of one pair with a margin of 1, whose rewards are 2 and 0; bradley_terry(2, 0, 1) is 0.313:

    >>> one, absent = jnp.ones((1, 1)), dict.fromkeys(UNUSED)
    >>> pairs = Pairs(**absent, lengths=jnp.ones((1, 1, 2), jnp.int32), mean_lengths=jnp.ones((1, 1, 2)),
    ...     pair_weights=one, index=jnp.zeros((1, 1), jnp.int32), columns={"margin": one})
    >>> outputs = Outputs({"chosen": 2 * one, "rejected": 0 * one}, pairs)
    >>> loss, metrics = reward(model=None, margin="margin").loss(outputs, {})
    >>> round(float(loss), 3)
    0.313
    """
    if not 0 <= center < float("inf"):
        raise ValueError(f"center={center}: expected a finite number of at least 0")

    def forward(params: Params, batch: Pairs, key: Array | None, aux: Aux) -> Outputs:
        # All responses go through the model together; each is scored at its last token.
        B, P, A = batch.last.shape
        h, layers = model.hidden(params, batch, key)
        r_BPA = read_scores(model, params, h, batch.last.reshape(B, P * A)).reshape(B, P, A)
        rewards = {kind: r_BPA[..., batch.kinds.index(kind)] for kind in ranked_kinds(batch.kinds)}
        return Outputs(rewards, without_fields(batch, UNUSED), by_row(layers))

    def of_two(outputs: Outputs, better: str, worse: str) -> Rewards:
        first, second = outputs.rewards[better], outputs.rewards[worse]
        ahead = _margin(outputs.batch, margin, (better, worse)).astype(first.dtype)
        return loss(first, second, ahead) + center * jnp.square(first + second)

    def reward_loss(outputs: Outputs, aux: Aux, with_rows: bool = False) -> tuple[Array, Metrics]:
        weight = outputs.batch.pair_weights.astype(outputs.chosen.dtype)
        values = _mean_over_pairs(outputs, of_two)
        value = jnp.sum(jnp.where(weight > 0, weight * values, 0))
        losses = mean_losses(values, weight, outputs.batch.sources, outputs.batch.source_names)
        rows = _values(outputs, values) if with_rows else {}
        metrics = {**losses, **_metrics(outputs), **layer_metrics(outputs.layers), **rows}
        return value, jax.lax.stop_gradient(metrics)

    eval_loss = partial(reward_loss, with_rows=True)
    return Objective(forward, reward_loss, eval_loss=eval_loss, report=Report(reward_alarms, reward_summary))


def _mean_over_pairs(outputs: Outputs, of_two: Callable[[Outputs, str, str], Rewards]) -> Rewards:
    """Return, for each slot, the mean of `of_two(outputs, better kind, worse kind)` over the pairs of its
    responses. Of more than two, pairs with equal ratings are left out.
    """
    kinds, batch = tuple(outputs.rewards), outputs.batch
    if len(kinds) == 2:
        return of_two(outputs, *kinds)
    total, count = jnp.zeros_like(outputs.chosen), jnp.zeros_like(outputs.chosen)
    for better, worse in combinations(kinds, 2):
        first, second = (batch.lengths[..., batch.kinds.index(kind)] for kind in (better, worse))
        used = (first > 0) & (second > 0)
        if RATING + better in batch.columns and RATING + worse in batch.columns:
            used &= batch.columns[RATING + better] != batch.columns[RATING + worse]
        total += jnp.where(used, of_two(outputs, better, worse), 0)
        count += used.astype(count.dtype)
    return total / jnp.maximum(count, 1)


def _margin(batch: Pairs, margin: str | None, kinds: tuple[str, str]) -> Rewards:
    """Return the margin (see `reward`) of the rewards of kinds[0] over those of kinds[1], for each pair."""
    if margin is None:
        return jnp.zeros_like(batch.pair_weights)
    if margin == "score":
        better, worse = (_column(batch, RATING + kind) for kind in kinds)
        return better - worse
    return _column(batch, margin)


def margin_columns(margin: str | None) -> tuple[str, ...]:
    """Return the columns that data.extras needs for this margin (see `reward`) of pairs; () for None."""
    if margin == "score":
        return (RATING + "chosen", RATING + "rejected")
    return () if margin is None else (margin,)


def _column(batch: Pairs, name: str) -> Rewards:
    if name not in batch.columns:
        available = ", ".join(batch.columns) or "none"
        raise ValueError(
            f"margin={name}: the pairs have no such column (available: {available}). Add data.extras={name}"
        )
    return batch.columns[name]


def _metrics(outputs: Outputs) -> Metrics:
    """Return the metrics of best and worst responses, over pairs of equal weight; in the accuracy a tie
    counts 1/2, see WinRate.
    """
    chosen, rejected, batch = outputs.chosen, outputs.rejected, outputs.batch
    used = batch.pair_weights > 0
    margin = chosen - rejected
    at = [batch.kinds.index(kind) for kind in ("chosen", "rejected")]
    lengths = [batch.lengths[..., i].astype(margin.dtype) for i in at]
    longer = lengths[0] - lengths[1]

    def mean(values: Rewards) -> Sum:
        return Sum.of(jnp.where(used, values, 0), used)

    return {
        ACCURACY: WinRate.of(margin, margin == 0, used),
        MARGIN: mean(margin),
        MEAN_REWARD: mean((chosen + rejected) / 2),
        MIN_REWARD: Min(jnp.min(jnp.where(used, jnp.minimum(chosen, rejected), jnp.inf))),
        MAX_REWARD: Max(jnp.max(jnp.where(used, jnp.maximum(chosen, rejected), -jnp.inf))),
        MARGIN_LENGTH_CORRELATION: Correlation.of(longer, margin, used),
        LONGER_WINS: mean(longer_wins(longer, margin.dtype)),
    }


def _values(outputs: Outputs, losses: Rewards) -> Metrics:
    """Return PerRow metrics of each pair: loss, margin, and 1 if it is won, 0 if lost, 1/2 for a tie."""
    weight, margin = outputs.batch.pair_weights, outputs.chosen - outputs.rejected
    by_name = {LOSS: losses, MARGIN: margin, ACCURACY: wins(margin, margin == 0)}
    return {ROWS + name: PerRow.of(values, weight) for name, values in by_name.items()}


def reward_alarms(memory: Memory, entry: Entry, last: bool) -> Alarms:
    """Return the alarms of a reward model's run for a log entry (see alarms.py): non-finite steps, a gradient
    of 0, only ties, and an accuracy no better than by preferring long or short responses.
    """
    checks: dict[str, AlarmCheck] = {
        "skipped": check_skipped_steps,
        "no gradient": check_zero_gradient,
        "length": partial(check_more_than_length, ACCURACY),
        "ties": partial(check_all_ties, ACCURACY),
    }
    return run_alarms(checks, memory, entry, last)


def reward_summary(first: Entry, last: Entry) -> list[str]:
    """Return lines that summarise a reward model's run. first, last: each metric's first and newest value."""
    lines = []
    mean, low, high = (HELD_OUT + name for name in (MEAN_REWARD, MIN_REWARD, MAX_REWARD))
    correlation = HELD_OUT + MARGIN_LENGTH_CORRELATION
    if has_numbers(last, HELD_OUT + ACCURACY):
        accuracies = accuracy_change(HELD_OUT + ACCURACY, first, last)
        lines.append(f"held-out accuracy: {accuracies}{length_note(last)}")
    if has_numbers(last, HELD_OUT + MARGIN):
        lines.append(f"held-out margin of the rewards: {change(HELD_OUT + MARGIN, first, last, 3)}")
    if has_numbers(last, mean, low, high):
        span = f"from {last[low]:.2f} to {last[high]:.2f}"
        lines.append(f"rewards of held-out responses: mean {last[mean]:.2f}, {span}")
    if has_numbers(last, correlation):
        lines.append(f"margin and length: correlation {last[correlation]:.2f}")
    return lines


RIGHT_STEPS, WRONG_STEPS = "accuracy_right_steps", "accuracy_wrong_steps"


# ---- process rewards


@struct
class StepOutputs:
    """The outputs of the forward pass over a batch: a score per step of a solution. labels: 1 for a right
    step, 0 for a wrong one. weight: 0 for padding.
    """

    score: Float[Array, "B M"]
    labels: Int[Any, "B M"]
    weight: Float[Array, "B M"]
    sources: Int[Any, "B M"] | None = None
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row
    source_names: tuple[str, ...] = static(default=())


def process_reward(model: LanguageModel) -> Objective:
    """`sum_t w_t CE(label_t, sigmoid(score_t))` over the last tokens of steps, linear in the weights.

    Lightman et al. 2023, arXiv:2305.20050. Data and loss are as in TRL's PRMTrainer, which has two logits per
    token; the score here is their difference.

    model: one with a scalar head, as models.adapted.with_scalar_head returns it. In a batch (Tokens), `read`
    has the positions of the steps' last tokens, and `targets` their labels, 1 for right and 0 for wrong.
    Metrics: loss, and the accuracy of all steps, of right steps and of wrong steps.

    The loss of one right step with a score of 1; only `forward` reads the model:

    >>> one = jnp.ones((1, 1))
    >>> loss, metrics = process_reward(model=None).loss(StepOutputs(one, one.astype(jnp.int32), one), {})
    >>> round(float(loss), 3)
    0.313
    """

    def forward(params: Params, batch: Tokens, key: Array | None, aux: Aux) -> StepOutputs:
        h, layers = model.hidden(params, batch, key)
        score = read_scores(model, params, h, batch.read)
        weight = batch.token_weights.astype(score.dtype)
        return StepOutputs(score, batch.targets, weight, batch.sources, by_row(layers), batch.source_names)

    def loss(outputs: StepOutputs, aux: Aux) -> tuple[Array, Metrics]:
        sign = (2 * outputs.labels - 1).astype(outputs.score.dtype)
        values = -jax.nn.log_sigmoid(sign * outputs.score)
        value = jnp.sum(jnp.where(outputs.weight > 0, outputs.weight * values, 0))
        losses = mean_losses(values, outputs.weight, outputs.sources, outputs.source_names)
        metrics = {**losses, **_accuracies(outputs, sign), **layer_metrics(outputs.layers)}
        return value, jax.lax.stop_gradient(metrics)

    return Objective(forward, loss, report=Report(summary=step_summary))


def _accuracies(outputs: StepOutputs, sign: Float[Array, "B M"]) -> Metrics:
    """Return the accuracies. A score above 0 predicts a right step; a score of 0 counts 1/2. sign: 1 for a
    right step, -1 for a wrong one.
    """
    used, agree = outputs.weight > 0, sign * outputs.score
    won = (agree > 0).astype(agree.dtype) + (agree == 0).astype(agree.dtype) / 2
    return {
        ACCURACY: Sum.of(won, used),
        RIGHT_STEPS: Sum.of(won, used & (sign > 0)),
        WRONG_STEPS: Sum.of(won, used & (sign < 0)),
    }


def step_summary(first: Entry, last: Entry) -> list[str]:
    """Return lines about a run's held-out accuracies. first, last: each metric's first and newest value."""
    names = {"all": HELD_OUT + ACCURACY, "right": HELD_OUT + RIGHT_STEPS, "wrong": HELD_OUT + WRONG_STEPS}
    return [
        f"held-out accuracy of {what} steps: {change(name, first, last, 3)}"
        for what, name in names.items()
        if has_numbers(last, name)
    ]
