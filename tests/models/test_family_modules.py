"""The flax.linen and flax.nnx modules of every family: parameters, loss and a train step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_families import FAMILIES, both, random_ids, rows, torch_model

from jaxft.models.flax_modules import FlaxModel, NnxModel
from jaxft.nn.param_spec import spec_paths
from jaxft.nn.tree import paths

torch = pytest.importorskip("torch")

TIME = 20


def next_token_loss(logits, ids):
    logps = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logps, jnp.asarray(ids)[:, 1:, None], -1).mean()


def torch_loss(name, ids):
    """Loss of transformers on the row's model."""
    with torch.no_grad():
        logits = torch_model(name)(torch.tensor(ids).long()).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten().long()
    ).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_both_modules_have_the_loss_of_transformers_and_the_same_train_step(name):
    _, model, params = both(name)
    ids = random_ids(2, TIME)
    batch, tx = rows(ids), optax.sgd(0.1)
    linen, module = FlaxModel(model), NnxModel(model, params)
    fresh = linen.init(jax.random.key(0), batch)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    assert paths(module.tree()).keys() == spec_paths(model.specs).keys()
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @jax.jit
    def linen_step(params):
        loss, grads = jax.value_and_grad(lambda p: next_token_loss(linen.apply({"params": p}, batch), ids))(
            params
        )
        updates, _ = tx.update(grads, tx.init(params), params)
        return loss, optax.apply_updates(params, updates)

    @nnx.jit
    def nnx_step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: next_token_loss(m(batch), ids))(module)
        optimizer.update(module, grads)
        return loss

    loss, moved = linen_step(params)
    np.testing.assert_allclose(float(loss), torch_loss(name, ids), rtol=1e-5)
    np.testing.assert_allclose(float(nnx_step(module, optimizer)), float(loss), rtol=1e-6)
    for path, value in paths(moved).items():
        np.testing.assert_allclose(paths(module.tree())[path], value, atol=1e-6, err_msg=path)
        assert (np.asarray(value) != np.asarray(paths(params)[path])).any(), path
    np.testing.assert_array_less(float(next_token_loss(module(batch), ids)), float(loss))
