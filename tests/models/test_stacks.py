"""A model of two stacks, one of whose blocks have two kinds of layers (support/two_stacks.py): whatever runs
layers, trains them or names them follows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_continuation import differences
from tiny_families import random_ids, rows
from two_stacks import two_stacks

from jaxft.batch import TrainState
from jaxft.models.adapted import adapted
from jaxft.nn.param import init_params
from jaxft.nn.scan import layer_places, run_layer
from jaxft.objectives import metrics
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.train.step import make_train_step

BATCH = rows(random_ids(2, 12), segments=[[1] * 7 + [2] * 5, [1] * 10 + [0] * 2],
             positions=[[*range(7), *range(5)], [*range(10), 0, 0]])  # fmt: skip
BATCH = BATCH.replace(
    read=jnp.arange(8)[None].repeat(2, 0), targets=BATCH.ids[:, 1:9], token_weights=jnp.full((2, 8), 1 / 16)
)


@pytest.fixture(scope="module", autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params(x64):
    return init_params(two_stacks().specs, jax.random.key(0), jnp.float64)


def test_layers_run_in_the_order_of_the_stacks_and_of_their_blocks(params):
    model = two_stacks()
    places = layer_places(model.stacks)
    expected = ["first 0", "blocks/recurrent 0", "blocks/full 0", "blocks/recurrent 1", "blocks/full 1"]
    assert [f"{x.path} {x.index}" for x in places] == expected
    h, means, states = model.embed(params, BATCH.ids), [], []
    for place in places:
        own = jax.tree.map(lambda x, i=place.index: x[i], place.specs(params))
        h, outputs = run_layer(place.layer, h, own, BATCH, place.index)
        means += [outputs["first_channel"].total] if "first_channel" in outputs else []
        states += [outputs["state"]] if "state" in outputs else []
    found, outputs = jax.jit(model.hidden)(params, BATCH)
    norm = jnp.sqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + model.config.norm_eps)
    np.testing.assert_allclose(found, h / norm * params["final_norm"], rtol=1e-12)
    np.testing.assert_allclose(outputs["first_channel"].total, jnp.stack(means), rtol=1e-12)
    np.testing.assert_allclose(outputs["state"], jnp.stack(states), rtol=1e-12)
    assert outputs["first_channel"].numbers == (0, 2, 4)


def test_a_text_in_chunks_has_the_log_probs_of_one_forward_pass(params):
    """With shared prompts, states of prompts that rows start from, and rows of other lengths."""
    for error in differences(two_stacks(window=7), params):
        assert error.max() < 1e-10, error.max()


def loss_and_gradient(model, params):
    objective = sft(model)

    def loss(params):
        outputs = objective.forward(params, BATCH, None, {})  # an objective that reads its model's layers
        value, found = objective.loss(outputs, {})
        return value + jnp.mean(outputs.layers["state"]) + jnp.mean(
            outputs.layers["first_channel"].total
        ), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_an_objective_reads_outputs_of_layers_whatever_is_rematerialised(params):
    (value, found), expected = loss_and_gradient(two_stacks(remat="none"), params)
    logged = metrics.as_floats(found)
    assert [name for name in logged if "/" in name] == [f"first_channel/{i}" for i in (0, 2, 4)]
    for remat in ("full", "pairs"):
        if remat == "pairs":  # the first stack has one block
            with pytest.raises(ValueError, match="groups layers by 2, but .* 1"):
                loss_and_gradient(two_stacks(remat=remat), params)
            continue
        (same, _), grads = loss_and_gradient(two_stacks(remat=remat), params)
        np.testing.assert_allclose(same, value, rtol=1e-12)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14), grads, expected)


@pytest.mark.parametrize("kind", ["layerwise", "fused_backward"])
def test_layers_that_are_updated_one_by_one_are_those_of_one_update(params, kind):
    found = []
    for options in ({}, {kind: True}):
        model = adapted(two_stacks(remat="full"), None)
        optimizer = make_optimizer(Optim(lr=1e-2, clip=None, warmup=0.0, **options), model.specs, 10)
        whole = {"base": params}
        state = TrainState(jnp.int32(0), whole, optimizer.init(whole), {}, jnp.zeros(2, jnp.int32))
        step = jax.jit(make_train_step(sft(model), optimizer, 0))
        frozen = jax.tree.map(lambda _: None, whole)
        for _ in range(2):
            state, reported = step(state, frozen, jax.tree.map(lambda x: x[None], BATCH))
        found.append((state.trainable, metrics.as_floats(reported)))
    (expected, before), (updated, after) = found
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), updated, expected)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-6)
    assert np.abs(expected["base"]["first"]["attn"]["q"] - params["first"]["attn"]["q"]).max() > 1e-3
