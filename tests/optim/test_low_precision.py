"""Moments in few bits: how far codes are from values, a layer's blocks, bytes, training as with float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import assert_close
from tiny_run import Place, write_place

from jaxft.nn import param_spec
from jaxft.nn.param_spec import ParamSpec, full, lead_shape
from jaxft.nn.quant_formats import DYNAMIC
from jaxft.optim.low_precision import (
    BLOCK,
    POSITIVE,
    _rows,
    adamw_8bit,
    adamw_bf16,
    decode_blocks,
    encode_blocks,
    encoded_zeros,
)
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.rules import adamw
from jaxft.optim.update import StepInfo, stochastically_rounded

SPECS = {
    "kernel": ParamSpec((3, 64, 300), ("layers", "width", "mlp"), full(0.0)),
    "a": ParamSpec((3, 600, 8), ("layers", "width", "rank"), full(0.0)),
    "norm": ParamSpec((3, 64), ("layers", "width"), full(0.0)),
    "head": ParamSpec((64, 512), ("width", "vocab"), full(0.0)),
}


def random(path, seed, scale=1.0):
    return scale * jax.random.normal(
        jax.random.fold_in(jax.random.key(seed), list(SPECS).index(path)), SPECS[path].shape
    )


there_and_back = jax.jit(
    lambda x, stacked, signed: decode_blocks(encode_blocks(x, stacked, signed), stacked, signed),
    static_argnums=(1, 2),
)


def gradients(seed):
    return {path: random(path, seed, 10.0 ** (seed % 3 - 1)) for path in SPECS}


def test_the_codes_are_256_values_with_0_and_1():
    for table, low in ((DYNAMIC, -0.993), (POSITIVE, 0.0)):
        assert len(np.unique(table)) == 256 and 0 in table and table[-1] == 1 and abs(table[0] - low) < 1e-3
    assert np.diff(POSITIVE).max() < 0.008 and np.diff(DYNAMIC).max() < 0.015


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(SPECS)),
    st.booleans(),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
)
def test_a_value_becomes_the_nearest_level_of_its_block(seed, path, signed, scale):
    stacked, table = math.prod(lead_shape(SPECS[path])), DYNAMIC if signed else POSITIVE
    kept = jax.random.uniform(jax.random.key(seed), SPECS[path].shape) > 0.1
    x = random(path, seed, scale)
    x = x * kept.astype(x.dtype)
    x = x if signed else jnp.abs(x)
    found = np.asarray(there_and_back(x, stacked, signed))
    assert found.shape == x.shape and (found[np.asarray(x) == 0] == 0).all()
    rows, size = _rows(x.shape, stacked)
    room = -size % BLOCK

    def cut(y):
        return np.pad(np.asarray(y, np.float64).reshape(rows, size), ((0, 0), (0, room))).reshape(-1, BLOCK)  # noqa: E731

    blocks, off = cut(x), np.abs(cut(found) - cut(x))
    absmax = np.abs(blocks).max(1, keepdims=True)
    at = np.clip(np.searchsorted(table, blocks / np.maximum(absmax, 1e-300)), 1, len(table) - 1)
    nearest = np.minimum(*(np.abs(table[i].astype(np.float64) * absmax - blocks) for i in (at - 1, at)))
    assert (off <= nearest + 1e-6 * absmax).all()


def test_a_block_is_256_values_of_one_layer():
    x = random("kernel", 0).at[1].mul(1000)
    whole = encode_blocks(x, 3, True)
    assert whole.absmax.shape == (3 * 64, 2) and whole.codes.shape == x.shape
    for layer in range(3):
        alone = decode_blocks(encode_blocks(x[layer], 1, True), 1, True)
        np.testing.assert_array_equal(decode_blocks(whole, 3, True)[layer], alone)
    assert encode_blocks(random("a", 0), 3, True).absmax.shape == (3, -(-600 * 8 // BLOCK))


def trained(optimizer, steps=6, **knobs):
    """(parameters, state) after some steps of random gradients."""
    settings = Optim(optimizer=optimizer, lr=0.01, clip=None, warmup=0.0, **knobs)
    optimizer = make_optimizer(settings, SPECS, steps)
    start = {path: random(path, 99) for path in SPECS}

    @jax.jit
    def step(grads, params, state):
        return optimizer.update(grads, state, params, StepInfo(optax.tree.norm(grads), jnp.array(True)))

    params, state = start, optimizer.init(start)
    for i in range(steps):
        params, state = step(gradients(i), params, state)
    return params, state


@pytest.mark.parametrize("optimizer, most", [(adamw_8bit, 0.05), (adamw_bf16, 0.01)])
def test_the_way_of_a_parameter_is_close_to_adamws(optimizer, most):
    expected, _ = trained(adamw, weight_decay=0.1)
    found, _ = trained(optimizer, weight_decay=0.1)
    for path in SPECS:
        way, other = (x[path] - random(path, 99) for x in (expected, found))
        off = float(jnp.linalg.norm(way - other) / jnp.linalg.norm(way))
        assert off < most and (off > 0 or path == "norm"), path
    np.testing.assert_allclose(
        found["norm"], expected["norm"], rtol=0 if optimizer is adamw_bf16 else 1e-6, atol=5e-4
    )


def size(state):
    return sum(x.nbytes for x in jax.tree.leaves(state))


def test_the_first_step_is_adamws_to_rounding():
    for optimizer in (adamw_8bit, adamw_bf16):
        assert_close(trained(optimizer, 1)[0], trained(adamw, 1)[0], 1e-6)


def test_moments_take_a_quarter_or_half_of_float32s_bytes():
    big = {"kernel": ParamSpec((2, 512, 1024), ("layers", "width", "mlp"), full(0.0))}
    whole = param_spec.init_params(big, jax.random.key(0))
    state = lambda o: make_optimizer(Optim(optimizer=o), big, 9).init(whole)  # noqa: E731
    plain, small, half = map(size, map(state, (adamw, adamw_8bit, adamw_bf16)))
    assert small < 0.26 * plain and half < 0.51 * plain


def test_stochastic_rounding_is_right_in_expectation_and_leaves_what_bfloat16_holds():
    x = jnp.full(200_000, 1 + 1 / 512, jnp.float32)  # a quarter of the way to the next bfloat16
    found = stochastically_rounded(x, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(found)) == {1.0, 1 + 1 / 128} and abs(float(found.mean()) - float(x[0])) < 5e-5
    kept = jnp.array([0.0, -0.0, 1.5, -3e38, jnp.inf, -jnp.inf, 2.0**-130], jnp.bfloat16)
    np.testing.assert_array_equal(stochastically_rounded(kept.astype(jnp.float32), jax.random.key(1)), kept)
    assert bool(jnp.isnan(stochastically_rounded(jnp.array([jnp.nan]), jax.random.key(2))).all())


def test_small_changes_of_a_bfloat16_moment_are_not_lost():
    """With b2 = 0.999 a moment changes by at most a thousandth, less than half of bfloat16's spacing."""
    state = {"w": ParamSpec((4096,), ("width",), full(0.0))}
    optimizer = make_optimizer(Optim(optimizer=adamw_bf16, clip=None), state, 400)
    now, info = optimizer.init({"w": jnp.zeros(4096)}), StepInfo(jnp.float32(64), jnp.array(True))
    step = jax.jit(lambda s: optimizer.update({"w": jnp.ones(4096)}, s, {"w": jnp.zeros(4096)}, info)[1])
    for _ in range(400):
        now = step(now)
    nu = next(
        x for path, x in jax.tree_util.tree_leaves_with_path(now) if ".nu" in jax.tree_util.keystr(path)
    )
    assert (
        nu.dtype == jnp.bfloat16 and abs(float(nu.astype(jnp.float32).mean()) / (1 - 0.999**400) - 1) < 0.01
    )


@pytest.mark.parametrize("layers, signed", [(False, True), (True, False)])
@pytest.mark.parametrize("shape", [(2, 70, 300), (3, 5, 16), (2, 4096)])
def test_the_start_is_what_zeros_are_encoded_as(shape, layers, signed):
    jax.tree.map(
        np.testing.assert_array_equal,
        encoded_zeros(shape, shape[0] if layers else 1, signed),
        encode_blocks(jnp.zeros(shape), shape[0] if layers else 1, signed),
    )


def test_layers_of_a_layerwise_update_have_different_random_bits():
    """Two layers that are alike but for their first number are rounded differently."""
    specs = {"layers": ParamSpec((2, 64, 64), ("layers", "width", "mlp"), full(0.0))}
    settings = Optim(optimizer=adamw_bf16, clip=None, layerwise=True, warmup=0.0)
    optimizer = make_optimizer(settings, specs, 10)
    params = {"layers": jnp.ones((2, 64, 64))}
    grads = {"layers": jnp.full((2, 64, 64), 0.3).at[1, 0, 0].set(0.4)}
    info = StepInfo(jnp.float32(1), jnp.array(True))
    now = optimizer.update(grads, optimizer.init(params), params, info)
    first, second = next(
        x for x in jax.tree.leaves(now[1]) if x.dtype == jnp.bfloat16 and x.ndim == 3
    ).reshape(2, -1)[:, 1:]
    assert 0.1 < float((first == second).mean()) < 0.9


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    write_place(folder)
    return Place(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, more",
    [
        ("adamw_8bit", ["run.params=bfloat16", "optim.layerwise=true"]),
        ("adamw_bf16", []),
    ],
)
def test_a_run_lowers_its_loss_and_resumes_bit_for_bit(place, name, more):
    argv = ["full=true", f"optim.optimizer={name}", "lr=0.003", "samples=0", *more]
    assert place.run(*argv, f"name={name}-whole") == 0, place.err()
    place.run_with_a_kill(*argv, name=name)
    whole, parts = place.results(f"{name}-whole", 4), place.results(name, 4)
    assert whole["metrics"] == parts["metrics"] and whole["leaves"] == parts["leaves"]
    losses = [line["loss"] for line in whole["metrics"] if "loss" in line]
    assert losses[-1] < losses[0]
    kinds = {dtype for leaf, (dtype, *_) in place.leaves(name, 4).items() if ".nu." in leaf}
    assert kinds == ({"uint8", "float32"} if name == "adamw_8bit" else {"bfloat16"})
    trained = {dtype for leaf, (dtype, *_) in place.leaves(name, 4).items() if leaf.startswith("0.trainable")}
    assert trained == {"bfloat16" if more else "float32"}
