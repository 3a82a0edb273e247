"""The flax.nnx Module has the parameters, logits and gradients of the model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_llama import some_tokens
from tiny_model import CONFIG

from jaxft.models.adapted import adapted
from jaxft.models.families.llama import llama
from jaxft.models.flax_modules import FlaxModel, NnxModel, trainable
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import quantize

MODEL = llama(CONFIG, jnp.float32)
TOKENS = jax.tree.map(jnp.asarray, some_tokens(vocab=40))
ADAPTER = Adapter(rank=2, alpha=4.0, targets=("q", "down", "head"))


def assert_same(a, b):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.quick_cases("untied-adapted")
@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["base", "adapted"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_init_and_apply_equal_the_model_and_the_linen_module(tied, adapter):
    model = llama(replace(CONFIG, tied=tied), jnp.float32)
    model = model if adapter is None else adapted(model, adapter)
    module = NnxModel(model, rngs=nnx.Rngs(params=5))
    whole = module.tree()
    assert_same(whole, param_spec.init_params(model.specs, nnx.Rngs(params=5).params()))
    linen = FlaxModel(model)
    logits = model.logits(model.head(whole), model.hidden(whole, TOKENS)[0])
    assert np.abs(logits).max() > 0.1
    assert_same(module(TOKENS), logits)
    assert_same(module(TOKENS), linen.apply({"params": whole}, TOKENS))
    assert_same(module.hidden(TOKENS), linen.apply({"params": whole}, TOKENS, method="hidden"))


def test_every_parameter_is_one_nnx_param_at_its_path():
    module = NnxModel(MODEL, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    found = {"/".join(path): value.get_value() for path, value in state}
    specs = param_spec.spec_paths(MODEL.specs)
    assert found.keys() == {f"params/{path}" for path in specs}
    assert all(x.dtype == jnp.bfloat16 and x.shape == specs[p[7:]].shape for p, x in found.items())
    shapes = nnx.eval_shape(lambda: NnxModel(MODEL, rngs=nnx.Rngs(0)))  # nothing is computed
    assert shapes.tree()["embed"].shape == (40, 32)
    with pytest.raises(ValueError, match="needs params, or rngs"):
        NnxModel(MODEL)


def test_split_and_merge_give_the_same_module_and_one_compiled_program():
    packed = quantised_base()
    module = NnxModel(MODEL, packed)
    graph, state = nnx.split(module)
    again = nnx.merge(graph, state)
    assert_same(again.tree(), packed)
    traced = []

    @nnx.jit
    def logits(module, tokens):
        traced.append(1)
        return module(tokens)

    expected = jax.jit(lambda p: MODEL.logits(MODEL.head(p), MODEL.hidden(p, TOKENS)[0]))(packed)
    for m in (module, again, NnxModel(MODEL, packed)):
        np.testing.assert_allclose(logits(m, TOKENS), expected, atol=1e-5)
    assert len(traced) == 1


def quantised_base():
    base = param_spec.init_params(MODEL.specs, jax.random.key(1))
    head = quantize(base["head"].astype(jnp.bfloat16), "int8")
    assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(head))
    return {**base, "head": head}


def loss_of(logits, tokens):
    logps = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logps, tokens.ids[:, 1:, None], -1).mean()


def test_a_train_step_updates_the_adapter_of_a_quantised_base_only():
    model = adapted(MODEL, Adapter(rank=2, alpha=4.0))
    adapter = param_spec.init_params(model.specs["adapter"], jax.random.key(2))
    whole = {"base": quantised_base(), "adapter": adapter}
    module = NnxModel(model, whole)
    wrt, tx = trainable(module, "adapter/.*/[ab]"), optax.sgd(1.0, momentum=0.9)
    optimizer = nnx.Optimizer(module, tx, wrt=wrt)

    @nnx.jit
    def train_step(module, optimizer, tokens):
        def loss(module):
            return loss_of(module(tokens), tokens)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(module)
        optimizer.update(module, grads)
        return value

    mask = tree.mask_by_path(whole, "adapter/.*/[ab]")
    moving, frozen = tree.partition(whole, mask)

    @jax.jit
    def our_step(moving, opt):
        def loss(moving):
            p = tree.combine(moving, frozen)
            return loss_of(model.logits(model.head(p), model.hidden(p, TOKENS)[0]), TOKENS)

        value, grads = jax.value_and_grad(loss)(moving)
        updates, opt = tx.update(grads, opt, moving)
        return optax.apply_updates(moving, updates), opt, value

    opt, losses = tx.init(moving), []
    for _ in range(3):
        losses.append(float(train_step(module, optimizer, TOKENS)))
        moving, opt, value = our_step(moving, opt)
        np.testing.assert_allclose(losses[-1], value, rtol=1e-6)
    assert losses[2] < losses[0] - 0.01
    after, frozen_after = tree.partition(module.tree(), mask)
    assert_same(frozen_after, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, moving)
    momentum = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim]
    assert len(momentum) == len(jax.tree.leaves(moving))


def test_the_filter_selects_the_same_parameters_inside_another_module():
    class Scored(nnx.Module):
        def __init__(self):
            self.lm, self.params = NnxModel(MODEL, rngs=nnx.Rngs(0)), nnx.Param(jnp.zeros(3))

    whole = Scored()
    found = nnx.to_flat_state(nnx.state(whole, trainable(whole.lm, "layers/attn"))).paths
    assert found == tuple(("lm", "params", "layers", "attn", name) for name in "koqv")


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="matches none of 12 parameters; near: "):
        trainable(NnxModel(MODEL, rngs=nnx.Rngs(0)), "adapter/.*")


def test_dropout_follows_the_rngs_and_the_mode():
    model = adapted(MODEL, Adapter(rank=2, alpha=4.0, dropout=0.5))
    whole = jax.tree.map(lambda x: x + 0.1, param_spec.init_params(model.specs, jax.random.key(0)))
    without, module = NnxModel(model, whole), NnxModel(model, whole, rngs=nnx.Rngs(dropout=7))
    plain = np.asarray(without(TOKENS))
    first, second = (np.asarray(module(TOKENS)) for _ in range(2))
    assert (first != plain).any() and (first != second).any()  # the stream goes on
    assert_same(NnxModel(model, whole, rngs=nnx.Rngs(dropout=7))(TOKENS), first)
    module.eval()
    assert_same(module(TOKENS), plain)
    assert_same(module(TOKENS, rngs=nnx.Rngs(1)), plain)
    module.train()
    assert (np.asarray(module(TOKENS)) != plain).any()
    given = without(TOKENS, rngs=nnx.Rngs(dropout=3))
    assert_same(given, without(TOKENS, rngs=nnx.Rngs(dropout=3)))
    assert (np.asarray(given) != plain).any()
    assert_same(NnxModel(model, whole, rngs=nnx.Rngs(params=0))(TOKENS), plain)
