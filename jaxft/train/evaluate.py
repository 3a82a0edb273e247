"""An objective over held-out rows: the same numbers for any batch size."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxft import tree
from jaxft.data.sft import Rows, RowSource
from jaxft.data.source import Dataset
from jaxft.objectives import metrics as m
from jaxft.objectives.objective import Objective


def make_eval_step(objective: Objective) -> Callable:
    """`(trainable, frozen, batch, aux) -> metrics` of one microbatch-shaped batch [1, rows, ...], without dropout.

    An objective that couples rows gives what it has seen of the batch instead, to be judged with the others'.
    """
    one = objective.forward if objective.facts.coupled else lambda *args: objective(*args)[1]

    def step(trainable: Any, frozen: Any, batch: Any, aux: Any) -> Any:
        rows = jax.tree.map(lambda x: x[0], batch)
        return one(tree.combine(trainable, frozen), rows, None, aux)

    return step


def evaluate(step: Callable, batches: Iterable[Any]) -> dict[str, float]:
    """Add the metrics of every batch on the host and divide once. `step(batch) -> metrics`."""
    return m.as_floats(added(step, batches))


def added(step: Callable, batches: Iterable[Any]) -> dict[str, Any]:
    """The metrics of all batches, on the host and not yet divided."""
    total: dict[str, Any] | None = None
    for batch in batches:
        found = jax.device_get(step(batch))
        total = found if total is None else m.add(total, found)
    return total or {}


def evaluate_together(see: Callable, judge: Callable, batches: Iterable[Any]) -> dict[str, float]:
    """Numbers of an objective that couples rows: `judge(seen)` of what `see(batch)` gives for all batches, row by row."""
    return m.as_floats(judge(stacked([jax.device_get(see(batch)) for batch in batches])))


def stacked(seen: list[Any]) -> Any:
    """The rows of several batches one after the other."""
    return jax.tree.map(lambda *x: np.concatenate(x), *seen)


def general_rows(data: Dataset, general: str) -> Rows:
    """Settings of the general text `general`: rows of the same shape as those of `data`, all of them held out."""
    return Rows(
        general, held_out=general, format="text", loss_on="all", too_long="truncate", max_length=data.max_length,
        batch=data.batch, micro=data.micro, packing=data.packing,
    )  # fmt: skip


def general_source(data: Dataset, general: str | None, tokenizer: Any, shards: int = 1) -> RowSource | None:
    """Batches of the general text; None without one."""
    return None if general is None else general_rows(data, general).open(tokenizer, shards)


def selection_score(metrics: dict[str, float]) -> float | None:
    """What the best checkpoint has least of: held-out loss, or minus the held-out reward; None without held-out rows."""
    if "eval_loss" in metrics:
        return metrics["eval_loss"]
    return -metrics["eval_reward"] if "eval_reward" in metrics else None
