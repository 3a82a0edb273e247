"""An objective over held-out rows: the same numbers for any batch size."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxft import metrics as m
from jaxft import tree


def make_eval_step(objective: Callable) -> Callable:
    """`(trainable, frozen, batch, aux) -> metrics` of one microbatch-shaped batch [1, rows, ...], without dropout."""

    def step(trainable: Any, frozen: Any, batch: Any, aux: Any) -> dict[str, Any]:
        rows = jax.tree.map(lambda x: x[0], batch)
        return objective(tree.combine(trainable, frozen), rows, None, aux)[1]

    return step


def evaluate(step: Callable, batches: Iterable[Any]) -> dict[str, float]:
    """Add the metrics of every batch on the host and divide once. `step(batch) -> metrics`."""
    total: dict[str, Any] | None = None
    for batch in batches:
        found = jax.device_get(step(batch))
        total = found if total is None else m.add(total, found)
    return {} if total is None else m.read(total)
