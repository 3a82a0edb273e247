"""The flax.linen Module has the parameters, logits and gradients of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from tiny_llama import some_tokens

from jaxft.models.adapted import adapted
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.models.flax_modules import FlaxModel
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import quantize

CONFIG = LlamaConfig(vocab=40, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=64)
MODEL = llama(CONFIG, jnp.float32)
KEY = jax.random.key(3)
TOKENS = jax.tree.map(jnp.asarray, some_tokens(vocab=40))


def assert_same(a, b):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logits_of(model, whole, tokens=TOKENS):
    return model.logits(model.head(whole), model.hidden(whole, tokens)[0])


@pytest.mark.quick_cases("tied-adapted")
@pytest.mark.parametrize(
    "adapter", [None, Adapter(rank=2, alpha=4.0, targets=("q", "down", "head"))], ids=["base", "adapted"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_init_and_apply_equal_the_model(tied, adapter):
    model = llama(LlamaConfig(**{**CONFIG.__dict__, "tied": tied}), jnp.float32)
    model = model if adapter is None else adapted(model, adapter)
    module = FlaxModel(model)
    variables = module.init(KEY, TOKENS)
    assert set(variables) == {"params"}
    assert_same(variables["params"], param_spec.init_params(model.specs, KEY))
    assert np.abs(logits_of(model, variables["params"])).max() > 0.1
    assert_same(module.apply(variables, TOKENS), logits_of(model, variables["params"]))
    assert_same(
        module.apply(variables, TOKENS, method="hidden"), model.hidden(variables["params"], TOKENS)[0]
    )


def test_another_key_and_dtype_give_other_parameters():
    found = FlaxModel(MODEL, param_dtype=jnp.bfloat16).init(jax.random.key(4), TOKENS)["params"]
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(found, param_spec.init_params(MODEL.specs, jax.random.key(4), jnp.bfloat16))
    assert (
        np.asarray(found["embed"])
        != np.asarray(param_spec.init_params(MODEL.specs, KEY, jnp.bfloat16)["embed"])
    ).any()


def test_init_and_apply_under_jit():
    module = FlaxModel(MODEL)
    variables = jax.jit(module.init)(KEY, TOKENS)
    expected = module.init(KEY, TOKENS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), variables, expected
    )  # fusion may round otherwise
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, TOKENS), logits_of(MODEL, expected["params"]), atol=1e-5
    )


def loss_of(logits, tokens):
    logps = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logps, tokens.ids[:, 1:, None], -1).mean()


def test_a_step_of_a_flax_train_state_is_the_gradient_step():
    module, tx = FlaxModel(MODEL), optax.adamw(1e-2)
    state = TrainState.create(apply_fn=module.apply, params=module.init(KEY, TOKENS)["params"], tx=tx)

    @jax.jit
    def flax_step(state, tokens):
        loss, grads = jax.value_and_grad(lambda p: loss_of(state.apply_fn({"params": p}, tokens), tokens))(
            state.params
        )
        with jax.numpy_dtype_promotion("standard"):
            return state.apply_gradients(grads=grads), loss

    @jax.jit
    def our_step(p, opt, tokens):
        loss, grads = jax.value_and_grad(lambda p: loss_of(logits_of(MODEL, p, tokens), tokens))(p)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(grads, opt, p)
        return optax.apply_updates(p, updates), opt, loss

    ours = param_spec.init_params(MODEL.specs, KEY)
    opt, losses = tx.init(ours), []
    for _ in range(3):
        state, theirs = flax_step(state, TOKENS)
        ours, opt, loss = our_step(ours, opt, TOKENS)
        np.testing.assert_allclose(theirs, loss, rtol=1e-6)
        losses.append(float(loss))
    assert int(state.step) == 3 and losses[2] < losses[0] - 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, ours)


@pytest.mark.slow
def test_an_adapted_model_trains_its_adapter_only_and_its_dropout_has_a_key():
    model = adapted(MODEL, Adapter(rank=2, alpha=4.0, dropout=0.5))
    module = FlaxModel(model)
    whole = module.init(KEY, TOKENS)["params"]
    mask = tree.mask_by_path(whole, "adapter/.*/[ab]")
    tx = optax.partition({True: optax.adam(1e-2), False: optax.set_to_zero()}, mask)
    state = TrainState.create(apply_fn=module.apply, params=whole, tx=tx)
    grads = jax.grad(lambda p: loss_of(state.apply_fn({"params": p}, TOKENS), TOKENS))(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax's adam promotes its step count
        state = state.apply_gradients(grads=grads)
    moved = tree.paths(jax.tree.map(lambda new, old: bool((new != old).any()), state.params, whole))
    assert {path for path, m in moved.items() if m} == {path for path in moved if path.endswith("/b")}

    def apply(**rngs):
        return np.asarray(module.apply({"params": state.params}, TOKENS, rngs=rngs))

    assert (apply() == apply()).all() and (apply(dropout=KEY) == apply(dropout=KEY)).all()
    assert (apply(dropout=KEY) != apply()).any() and (
        apply(dropout=KEY) != apply(dropout=jax.random.key(9))
    ).any()


def test_the_module_applies_to_a_quantised_base():
    model = llama(CONFIG, jnp.bfloat16)
    plain = param_spec.init_params(model.specs, KEY, jnp.bfloat16)
    packed = {**plain, "embed": quantize(plain["embed"], "bits")}
    assert_same(FlaxModel(model).apply({"params": packed}, TOKENS), logits_of(model, plain))


@pytest.mark.slow
def test_the_module_works_as_a_submodule():
    class Scored(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(1)(FlaxModel(MODEL, name="llama").hidden(tokens))

    variables = Scored().init(KEY, TOKENS)
    assert set(variables["params"]) == {"llama", "Dense_0"}
    assert_same(
        jax.tree.map(jnp.shape, variables["params"]["llama"]),
        jax.tree.map(lambda s: s.shape, MODEL.specs, is_leaf=param_spec.is_spec),
    )
    assert Scored().apply(variables, TOKENS).shape == (2, 12, 1)
