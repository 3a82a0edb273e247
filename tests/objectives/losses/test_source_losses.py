"""The losses of several sources: each is that of its rows alone, and weighted they add up to the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import ONLY_W, by_table, laid, loss_gradients_metrics, micro, pairs_for, start_aux
from tiny_model import examples, one_by_one, tiny

from jaxft.objectives import metrics
from jaxft.objectives.sft import sft

NAMES = ("first", "second", "unused")


def losses(found):
    return [found.get(f"loss/{name}") for name in NAMES]


def test_losses_of_sources_are_those_of_their_examples_alone(x64):
    some = examples(6)
    with jax.numpy_dtype_promotion("standard"):
        model, whole = tiny()
    objective = jax.jit(lambda batch: sft(model)(whole, batch, None, {})[1])
    batch = one_by_one(some)
    numbers = np.repeat(np.array([0, 1, 1, 0, 1, 1])[:, None], batch.read.shape[1], 1)
    marked = batch.replace(sources=jnp.asarray(numbers, np.int32), source_names=NAMES)
    found = metrics.as_floats(objective(marked))
    for number in (0, 1):
        where = jnp.asarray(numbers == number)
        weights = jnp.where(where, batch.token_weights, 0.0)
        alone = metrics.as_floats(objective(batch.replace(token_weights=weights / weights.sum())))
        assert found[f"loss/{NAMES[number]}"] == pytest.approx(alone["loss"], rel=1e-12)
    assert "loss/unused" not in found and not any(map(np.isnan, found.values()))
    parts = [metrics.as_floats(objective(marked))["loss"], metrics.as_floats(objective(batch))["loss"]]
    assert parts[0] == pytest.approx(parts[1], rel=1e-12)


def test_losses_of_sources_of_pairs_are_means_over_their_pairs(x64):
    objective, table = by_table("dpo")
    pool = pairs_for("dpo")
    batch = laid(pool)
    numbers = np.where(batch.index % 3 == 0, 0, 1).astype(np.int32)
    marked = batch.replace(sources=numbers, source_names=NAMES)
    aux = start_aux(objective)
    loss, _, found = loss_gradients_metrics(objective, table, ONLY_W, micro(marked, 2), aux)
    weights = [batch.pair_weights[(numbers == n) & (batch.index >= 0)].sum() for n in (0, 1)]
    first, second, unused = losses(found)
    assert unused is None and first != pytest.approx(second)
    assert first * weights[0] + second * weights[1] == pytest.approx(float(loss), rel=1e-6)
    for number, expected in ((0, first), (1, second)):
        alone = laid(pool, weights=pool.weights * (np.where(np.arange(8) % 3 == 0, 0, 1) == number))
        assert loss_gradients_metrics(objective, table, ONLY_W, micro(alone, 2), aux)[0] == pytest.approx(
            expected, rel=1e-6
        )
