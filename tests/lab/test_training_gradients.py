"""Gradients of a held-out loss through training, in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dpo_place import write_pair_place
from pair_batches import laid, random_pairs
from prepared import working_directory
from tiny_model import tiny

import jaxft
from jaxft.lab.studies.study import LogRange, LossTrial, SearchedLoss
from jaxft.lab.studies.trial_arrays import searched
from jaxft.lab.training_gradients import (
    ShortTraining,
    TrainingNumbers,
    differentiable_adam,
    fit_source_weights,
    held_out_gradient,
    make_held_out_loss,
    short_training,
    with_source_weights,
)
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.attention.attention import VARIABLE
from jaxft.nn.tree import combine, mask_by_path, partition
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.optim.update import standard_promotion
from jaxft.train.multi_adapter import LOSS_KNOBS

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
        return tiny_training()


def in_float64(x):
    return jnp.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)


def tiny_training():
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
        objective, objective, trainable, frozen, aux, batches,
        jax.tree.map(lambda x: x[None], held_out), differentiable_adam(1e-4),
    )  # fmt: skip


def numbers(beta, weights):
    return TrainingNumbers({"beta": jnp.asarray(beta)}, jnp.asarray(weights))


@pytest.mark.slow  # compiles the backward pass of a backward pass
def test_gradients_equal_finite_differences(training):
    loss = jax.jit(make_held_out_loss(training))
    at = numbers(0.3, [0.7, 0.3])
    found = held_out_gradient(training, at)
    h = 1e-5
    of_beta = (loss(numbers(0.3 + h, [0.7, 0.3])) - loss(numbers(0.3 - h, [0.7, 0.3]))) / (2 * h)
    of_first = (loss(numbers(0.3, [0.7 + h, 0.3])) - loss(numbers(0.3, [0.7 - h, 0.3]))) / (2 * h)
    of_second = (loss(numbers(0.3, [0.7, 0.3 + h])) - loss(numbers(0.3, [0.7, 0.3 - h]))) / (2 * h)
    np.testing.assert_allclose(found.knobs["beta"], of_beta, rtol=1e-4)
    np.testing.assert_allclose(found.weights, [of_first, of_second], rtol=1e-4)
    assert found.weights[0] < 0 < found.weights[1]  # more of the right labels lowers the loss


@pytest.mark.slow  # compiles the backward pass of a backward pass
def test_weights_that_follow_the_gradient_leave_a_source_of_wrong_labels(training):
    path = fit_source_weights(training, rounds=12)
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
    with pytest.raises(ValueError, match=r"1 weights for 2 sources \(right, wrong\)"):
        with_source_weights(batch, jnp.ones(1))  # jax would read the last weight for the second source
    one = training._replace(batches=replace(training.batches, sources=None, source_names=()))
    with pytest.raises(ValueError, match="the batches have one source"):
        fit_source_weights(one)


def test_the_held_out_loss_keeps_its_own_knobs(training):
    """Without a step of training beta has no effect, and the loss is that of beta 0.3."""
    still = training._replace(rule=optax.sgd(0.0))
    loss = jax.jit(make_held_out_loss(still))
    one, other = (float(loss(numbers(beta, [1.0, 1.0]))) for beta in (0.3, 0.9))
    batch = jax.tree.map(lambda x: x[0], training.held_out)
    params = combine(training.trainable, training.frozen)
    assert one == other == pytest.approx(float(training.objective(params, batch, None, training.aux)[0]))


def test_a_moving_reference_moves_during_the_steps(training):
    """The objective's own state is updated after each step, as in training: it counts them."""

    def update(aux, trainable, metrics):
        return {**aux, "count": aux["count"] + 1}

    def counted(params, batch, key, aux):
        return aux["count"] * jnp.ones(()), {}

    objective = training.objective._replace(update=update)
    counting = training._replace(
        objective=objective, aux={**training.aux, "count": jnp.zeros(())}, held_out_objective=counted
    )
    assert float(make_held_out_loss(counting)(numbers(0.3, [1.0, 1.0]))) == STEPS


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
    held_out = jax.tree.map(lambda x: x[0], training.held_out)
    expected = training.objective(params, held_out, None, training.aux)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_prepared_recipe_is_trained_on_its_batches_and_evaluated_on_all_held_out_pairs(tmp_path):
    """Its steps and losses are written out. Another loss with the recipe's beta is the recipe's."""
    write_pair_place(tmp_path)
    with working_directory(tmp_path), jax.enable_x64(False):
        parts = jaxft.prepare("config.py", batch=4, held_out=0.5, data="pairs.jsonl", beta=0.1)
        assert len(parts.source.held_out) > 1
        lr, trainable = 1e-3, parts.state.trainable
        training = short_training(parts, 2, lr, dpo, {"beta": 0.1})
        at = TrainingNumbers({"beta": jnp.float32(0.1)}, jnp.ones(1))
        found = float(jax.jit(make_held_out_loss(training))(at))
        rule = differentiable_adam(lr)
        state = rule.init(trainable)
        loss = jax.jit(
            jax.value_and_grad(lambda t, batch: parts.objective(combine(t, parts.frozen), batch, None, {})[0])
        )
        with jax.set_mesh(parts.mesh):
            for step in range(2):
                batch = jax.tree.map(lambda x: x[0], parts.batch(step))
                grads = loss(trainable, batch)[1]
                with standard_promotion():
                    updates, state = rule.update(grads, state)
                trainable = optax.apply_updates(trainable, updates)
            held_out = [jax.tree.map(lambda x: jnp.asarray(x[0]), batch) for batch in parts.source.held_out]
            expected = sum(float(loss(trainable, batch)[0]) for batch in held_out)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_recipe_that_cannot_be_differentiated_is_one_line(tmp_path, monkeypatch):
    write_pair_place(tmp_path)
    monkeypatch.setenv(VARIABLE, "flash")
    with working_directory(tmp_path), jax.enable_x64(False):
        parts = jaxft.prepare("config.py", held_out=0.5)
        with pytest.raises(ValueError, match="no second derivative; set attention=reference"):
            short_training(parts, 2, 1e-3)
        with pytest.raises(ValueError, match="knobs={'beta': 0.2} are parameters of loss="):
            short_training(parts, 2, 1e-3, knobs={"beta": 0.2})
    monkeypatch.setenv(VARIABLE, "reference")
    with working_directory(tmp_path), jax.enable_x64(False):
        parts = jaxft.prepare("config.py", held_out=None)
        with pytest.raises(ValueError, match="the recipe holds out no rows"):
            short_training(parts, 2, 1e-3)
