"""Evaluation of an objective on held-out rows and on general text: the same metrics for any batch size."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import tree
from jaxft.data.data_settings import DataSettings
from jaxft.data.sft import Rows
from jaxft.data.source import RowSource, Source
from jaxft.distributed import processes
from jaxft.objectives import metrics as metric
from jaxft.objectives.metrics import HELD_OUT, LOSS, PerRow
from jaxft.objectives.objective import Objective, Outputs
from jaxft.runs.metric_names import (
    ACCURACY,
    BRIER,
    CHOSEN_LOGP,
    CHOSEN_REWARD,
    ECE,
    MARGIN,
    REWARD,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    SCORES,
    TOKEN_ACCURACY,
)
from jaxft.train.settings import Loop, Run, steps_between
from jaxft.tree import Aux, Batch, Metrics, Params

LOWER_IS_BETTER = ("loss", "kl", BRIER, ECE)  # ends of names
GREATER_IS_BETTER = frozenset(
    {
        ACCURACY, MARGIN, CHOSEN_REWARD, CHOSEN_LOGP, REWARD, REWARD_ACCURACY, REWARD_MARGIN, TOKEN_ACCURACY,
    }
)  # fmt: skip


def make_eval_step(objective: Objective) -> Callable[[Params, Params, Batch, Aux], Any]:
    """Return `(trainable, frozen, batch, aux) -> metrics` of a batch [1, rows, ...], without dropout.

    For an objective that couples rows it returns the outputs of the batch; the loss is computed once from the
    outputs of all batches.
    """
    objective = objective.for_evaluation()

    def step(trainable: Params, frozen: Params, batch: Batch, aux: Aux) -> Any:
        rows, params = jax.tree.map(lambda x: x[0], batch), tree.combine(trainable, frozen)
        if objective.facts.coupled:
            return objective.forward(params, rows, None, aux)
        return objective(params, rows, None, aux)[1]

    return step


def evaluate(step: Callable[[Batch], Metrics], batches: Iterable[Batch]) -> dict[str, float]:
    """Return the metrics of all batches, and the numbers of pairs: summed on the host and divided once."""
    return held_out_floats(sum_metrics(step, batches))


def held_out_floats(metrics: Metrics) -> dict[str, float]:
    """Divide metrics of held-out rows; an accuracy has its number of pairs next to it."""
    return {**metric.as_floats(metrics), **metric.pair_counts(metrics)}


def sum_metrics(
    step: Callable[[Batch], Metrics], batches: Iterable[Batch], with_rows: bool = False
) -> Metrics:
    """Return the metrics of all batches on the host, not yet divided.

    with_rows: and the values of single rows.
    """
    total: Metrics | None = None
    rows: list[Metrics] = []  # joined once: joining them batch by batch is quadratic in their number
    for batch in batches:
        metrics = step(batch)
        sums = jax.device_get({name: m for name, m in metrics.items() if not isinstance(m, PerRow)})
        total = sums if total is None else metric.add(total, sums)
        if with_rows:
            rows.append(jax.device_get({name: m for name, m in metrics.items() if isinstance(m, PerRow)}))
    return {**(total or {}), **(metric.join_rows(rows) if rows else {})}


def coupled_metrics(
    forward: Callable[[Batch], Outputs], loss_metrics: Callable[[Outputs], Metrics], batches: Iterable[Batch]
) -> Metrics:
    """Return the metrics of an objective that couples rows: `loss_metrics` of the outputs of all batches."""
    outputs = [jax.device_get(forward(batch)) for batch in batches]
    return jax.device_get(loss_metrics(jax.tree.map(lambda *x: np.concatenate(x), *outputs)))


def general_rows(data: DataSettings, general: str) -> Rows:
    """Settings that read the general text as held-out rows in the shape of `data`."""
    return Rows(
        general,
        held_out=general,
        format="text",
        loss_on="all",
        too_long="truncate",
        max_length=data.max_length,
        batch=data.batch,
        micro=data.micro,
        packing=bool(data.packing),
    )


def general_source(
    data: DataSettings, general: str | None, tokenizer: Any, shards: int = 1
) -> RowSource | None:
    """Return the source of the general text, None without one."""
    return None if general is None else general_rows(data, general).open(tokenizer, shards)


class EvaluationLimit(NamedTuple):
    """The most that an evaluation reads, None for all. rows: held-out batches, or prompts if the source
    samples. texts: batches of general text.
    """

    rows: int | None = None
    texts: int | None = None


def evaluation_limit(run: Run, source: Source[Any], text: Source[Any] | None, steps: int) -> EvaluationLimit:
    """Return the rows that an evaluation reads so that all evaluations together compute at most
    loop.eval_fraction of what training does, half of it for held-out rows and half for general text if there
    are both.

    There is an evaluation before and after training, and one every loop.eval_every steps. Nothing is limited
    unless held-out rows are a fraction of the rows; at least one batch is always read.
    """
    fraction, info = run.loop.eval_fraction, source.info
    if fraction is None or not isinstance(run.data.held_out, float) or not info.stats.held_out:
        return EvaluationLimit()
    every = run.loop.eval_every
    times = 2 + (0 if every is None else (steps - 1) // steps_between(every, steps))
    share = (fraction / 2 if text else fraction) * steps / times  # in steps of training, for one evaluation

    def most(total: int, cost: float) -> int | None:
        number = max(1, int(share / cost + 1e-9))
        return None if number >= total else number

    def most_batches(source: Source[Any]) -> int | None:
        batches = source.held_out
        return most(len(batches), source.info.eval_cost * batches[0].ids.size / trained)

    trained = math.prod(source.shapes[-1].ids.shape)
    if info.samples:
        rows = most(info.stats.held_out, info.eval_cost / run.data.units_per_step)
    else:
        rows = most_batches(source)
    return EvaluationLimit(rows, most_batches(text) if text else None)


def selection_score(metrics: dict[str, float], loop: Loop) -> float | None:
    """Return the score that selects the best checkpoint, the lower the better: loop.best_metric, or minus it
    if greater is better.

    None without held-out rows. Raises AgreedError if neither loop.greater_is_better nor the name says which
    value is better.
    """
    default = LOSS if HELD_OUT + LOSS in metrics else REWARD
    name = loop.best_metric or HELD_OUT + default
    if name not in metrics:
        return None
    greater = is_greater_better(name) if loop.greater_is_better is None else loop.greater_is_better
    if greater is None:
        raise processes.AgreedError(
            f"loop.best_metric={name}: its name does not tell whether a greater or a lower value is better; "
            "set loop.greater_is_better=true or false"
        )
    return -metrics[name] if greater else metrics[name]


def is_greater_better(name: str) -> bool | None:
    """Return whether a greater value of a held-out metric is better, by its name; None if the name does not
    imply it.
    """
    own = name.removeprefix(HELD_OUT)
    if own.endswith(LOWER_IS_BETTER):
        return False
    by_function = own.startswith(SCORES) or (own.startswith("rewards/") and own.endswith("/mean"))
    return True if by_function or own in GREATER_IS_BETTER else None


def is_stalled(scores: Sequence[float | None], patience: int) -> bool:
    """Return whether none of the last `patience` scores, the lower the better, is better than all before
    them. None is no score.
    """
    known = [math.inf if score is None else score for score in scores]
    return len(known) > patience and min(known[-patience:]) >= min(known[:-patience])
