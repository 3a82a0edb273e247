"""Adapters trained together are what each is alone: products, forward passes, steps; and what a sweep refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, assert_close, examples, one_by_one

from jaxft import lora, nn, params
from jaxft.lora import Adapted, Adapter
from jaxft.models.llama import llama
from jaxft.quant import quantize


@pytest.fixture(autouse=True)
def strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# Products and forward passes


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_product_with_several_adapters_is_each_ones_own(packed):
    K, B, T, size, R, out = 3, 2, 5, 7, 2, 6
    x, a, b, scale = random(K * B, T, size), random(K, size, R, seed=1), random(K, R, out, seed=2), random(K, seed=3)
    w, g = random(size, out, seed=4), random(K * B, T, out, seed=5)
    w = quantize(w.astype(jnp.bfloat16), "bits") if packed else w

    def together(x, a, b, w):
        return nn.linear(x, Adapted(w, a, b, scale))

    def apart(x, a, b, w):
        rows = x.reshape(K, B, T, size)
        return jnp.concatenate([nn.linear(rows[k], Adapted(w, a[k], b[k], scale[k])) for k in range(K)])

    def both(fn):
        def loss(x, a, b, w_):
            return jnp.sum(g * jnp.sin(fn(x, a, b, w if packed else w_)))

        return fn(x, a, b, w), jax.grad(loss, (0, 1, 2) if packed else (0, 1, 2, 3))(x, a, b, None if packed else w)

    assert_close(both(together), both(apart))


def test_a_16_bit_product_with_several_adapters_keeps_no_expanded_weight_and_full_gradients():
    w = quantize(random(6, 5, dtype=jnp.bfloat16), "bits")
    a, b = random(4, 6, 2, dtype=jnp.float32), random(4, 2, 5, dtype=jnp.float32)
    product = lambda x, a, b: nn.linear(x, Adapted(w, a, b, jnp.ones(4, jnp.float32)))  # noqa: E731
    x = random(8, 3, 6, dtype=jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(product, x, a, b)[1], x))
    assert {leaf.dtype for leaf in kept if leaf.shape == (6, 5)} == {jnp.dtype(jnp.uint16)}
    y, pull = jax.vjp(product, x, a, b)
    assert y.dtype == jnp.bfloat16 and [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32, jnp.float32]


RANKS = (2, 5, 3)


def fresh(model, rank, seed):
    """A random adapter of a rank, its b not zero."""
    start = params.init_params(lora.adapter_specs(model.specs, Adapter(rank=rank, alpha=3.0)), jax.random.key(seed), jnp.float64)
    return jax.tree.map(lambda x: x if x.ndim < 3 or jnp.any(x) else 0.3 * random(*x.shape, seed=seed), start)


def test_a_forward_pass_with_several_adapters_is_each_ones_own_whatever_the_ranks():
    base = llama(CONFIG, jnp.float64)
    model, weights = lora.adapted(base, Adapter()), params.init_params(base.specs, jax.random.key(9), jnp.float64)
    adapters = [fresh(base, rank, seed) for seed, rank in enumerate(RANKS)]
    batch = one_by_one(examples(4))
    tiled = jax.tree.map(lambda x: jnp.concatenate([x] * len(RANKS)), batch)

    def together(adapters):
        whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), lora.stacked(adapters))
        return model.hidden({"base": weights, "adapter": whole}, tiled)

    def apart(adapters):
        return jnp.concatenate([model.hidden({"base": weights, "adapter": one}, batch) for one in adapters])

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda adapters, f=f: jnp.sum(jnp.sin(f(adapters)))))(adapters) for f in (together, apart)
    )
    assert_close(found, wanted)


def test_a_stack_gives_its_members_back():
    base = llama(CONFIG, jnp.float64)
    adapters = [fresh(base, rank, seed) for seed, rank in enumerate(RANKS)]
    stack = lora.stacked(adapters)
    assert {x.shape[0] for x in jax.tree.leaves(stack)} == {3} and stack["layers"]["attn"]["q"]["a"].shape[-1] == max(RANKS)
    for k, one in enumerate(adapters):
        assert_close(lora.member(stack, k, one), one, 0)
