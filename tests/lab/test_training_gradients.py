"""Gradients of a held-out loss through training, in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pair_batches import laid, random_pairs
from tiny_model import tiny

from jaxft.lab.study import LogRange, LossTrial, SearchedLoss
from jaxft.lab.training_gradients import (
    ShortTraining,
    TrainingNumbers,
    differentiable_adam,
    fit_source_weights,
    make_held_out_loss,
    with_source_weights,
)
from jaxft.lab.trial_arrays import searched
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.attention.attention import VARIABLE
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.optim.update import standard_promotion
from jaxft.train.multi_adapter import LOSS_KNOBS
from jaxft.tree import combine, mask_by_path, partition

STEPS = 3


def swapped(batch):
    """The same pairs with their responses exchanged, as wrong labels are."""
    others = np.where(
        batch.responses >= 2 * batch.pair_weights.shape[1], batch.responses, batch.responses ^ 1
    )
    return replace(
        batch,
        responses=others.astype(batch.responses.dtype),
        lengths=batch.lengths[..., ::-1],
        last=batch.last[..., ::-1],
        mean_lengths=batch.mean_lengths[..., ::-1],
    )


pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True)
def twice_differentiable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")


@pytest.fixture(scope="module")
def training():
    """Three steps of DPO on eight pairs. Source 1 has the pairs of source 0 with wrong labels."""
    with jax.enable_x64(True):
        return short_training()


def in_float64(x):
    return jnp.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)


def short_training():
    model, params = tiny(adapter=Adapter(rank=2))
    trainable, frozen = partition(params, mask_by_path(params, ".*/[ab]"))
    loss = SearchedLoss(dpo, {"beta": LogRange(0.05, 1.0)})
    objective = searched(model, loss, LossTrial(0, 1e-3, {"beta": 0.3}))
    right = laid(random_pairs(count=8))
    wrong = swapped(right)
    both = jax.tree.map(lambda *x: np.concatenate(x), right, wrong)
    sources = np.concatenate([np.zeros_like(right.index), np.ones_like(right.index)])
    both = replace(both, pair_weights=both.pair_weights / 2, sources=sources, source_names=("right", "wrong"))
    both, held_out = (jax.tree.map(in_float64, batch) for batch in (both, right))
    batches = jax.tree.map(lambda x: jnp.stack([x] * STEPS), both)
    aux = {**objective.init(trainable, False), LOSS_KNOBS: {"beta": jnp.asarray(0.3)}}
    return ShortTraining(
        objective, objective, trainable, frozen, aux, batches, held_out, differentiable_adam(1e-4)
    )


def numbers(beta, weights):
    return TrainingNumbers({"beta": jnp.asarray(beta)}, jnp.asarray(weights))


@pytest.mark.slow  # compiles the backward pass of a backward pass
def test_gradients_equal_finite_differences(training):
    loss = jax.jit(make_held_out_loss(training))
    at = numbers(0.3, [0.7, 0.3])
    found = jax.jit(jax.grad(make_held_out_loss(training)))(at)
    h = 1e-5
    of_beta = (loss(numbers(0.3 + h, [0.7, 0.3])) - loss(numbers(0.3 - h, [0.7, 0.3]))) / (2 * h)
    of_first = (loss(numbers(0.3, [0.7 + h, 0.3])) - loss(numbers(0.3, [0.7 - h, 0.3]))) / (2 * h)
    of_second = (loss(numbers(0.3, [0.7, 0.3 + h])) - loss(numbers(0.3, [0.7, 0.3 - h]))) / (2 * h)
    np.testing.assert_allclose(found.knobs["beta"], of_beta, rtol=1e-4)
    np.testing.assert_allclose(found.weights, [of_first, of_second], rtol=1e-4)
    assert found.weights[0] < 0 < found.weights[1]  # more of the right labels lowers the loss


@pytest.mark.slow  # compiles the backward pass of a backward pass
def test_weights_that_follow_the_gradient_leave_a_source_of_wrong_labels(training):
    path = fit_source_weights(training, sources=2, rounds=12)
    assert path[-1][1] < 0.1 and sum(path[-1]) == pytest.approx(1)
    assert path[0][1] < 0.5


def test_only_the_ratios_of_source_weights_matter(training):
    batch = jax.tree.map(lambda x: x[0], training.batches)
    one, other = (with_source_weights(batch, jnp.array(w)) for w in ([1.0, 3.0], [10.0, 30.0]))
    np.testing.assert_allclose(one.pair_weights, other.pair_weights, rtol=1e-12)
    np.testing.assert_allclose(one.pair_weights.sum(), batch.pair_weights.sum(), rtol=1e-12)
    nothing = with_source_weights(batch, jnp.array([0.0, 0.0]))
    assert float(nothing.pair_weights.sum()) == 0.0
    with pytest.raises(ValueError, match="the batch has one source"):
        with_source_weights(replace(batch, sources=None), jnp.ones(2))


@pytest.mark.slow  # compiles the backward pass of a backward pass
def test_training_without_numbers_is_plain_training(training):
    """Two sources of weight 1 leave the batch as it is: the loss is that of optax's own steps."""
    found = make_held_out_loss(training)(numbers(0.3, [1.0, 1.0]))
    trainable, opt_state = training.trainable, training.rule.init(training.trainable)
    batch = jax.tree.map(lambda x: x[0], training.batches)

    @jax.jit
    def grad(trainable):
        def loss(t):
            return training.objective(combine(t, training.frozen), batch, None, training.aux)[0]

        return jax.grad(loss)(trainable)

    for _ in range(STEPS):
        grads = grad(trainable)
        with standard_promotion():
            updates, opt_state = training.rule.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    params = combine(trainable, training.frozen)
    expected = training.objective(params, training.held_out, None, training.aux)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
