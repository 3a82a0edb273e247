"""Laws of splash attention for TPUs, interpreted on the CPU, and its programs lowered for TPUs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import equal_groups
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import AbstractMesh
from test_attention import (
    abstract_ranges,
    arrays,
    assert_close,
    described,
    key_operands,
    packed,
    repeating,
    value_and_gradients,
)

from jaxft.batch import Tokens
from jaxft.models.families.llama import GraniteConfig, LlamaConfig, granite, llama
from jaxft.nn.attention import attention
from jaxft.nn.attention.attention import AttentionNeeds, AttentionSettings
from jaxft.nn.attention.flash_attention import key_ranges, within_window
from jaxft.nn.attention.kv_cache import NextToken
from jaxft.nn.attention.layer_attention import AttentionLayers, LayerKind, attend_rows, example_angles
from jaxft.nn.attention.splash_attention import scaled, splash_of_scaled
from jaxft.nn.param_spec import init_params
from jaxft.nn.rope import Rope

TPU = described("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("T", "branched", "softcap"),
    [
        pytest.param(200, False, 0.8, marks=pytest.mark.slow),
        (200, True, None),
        pytest.param(128, False, None, marks=pytest.mark.slow),
        pytest.param(128, True, 0.8, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_equal_dense_when_interpreted(T, branched, softcap):
    rng = np.random.default_rng(10)
    q, k, v, do = arrays(rng, 2, T, 4, 2, 64, jnp.float32)
    segments, branches = packed(rng, 2, T)
    ranges = key_ranges(segments, branches if branched else None)
    real = segments[:, :, None, None] != 0  # padding queries may return any finite number
    do = jnp.where(real, do, 0)
    with jax.numpy_dtype_promotion("standard"):
        kernel = partial(attention.splash, softcap=softcap, interpret=True)
        found = value_and_gradients(kernel, q, k, v, do, ranges)
    expected = value_and_gradients(partial(attention.dense, softcap=softcap), q, k, v, do, ranges)
    assert np.all(np.isfinite(found[0]))
    assert_close([jnp.where(real, x, 0) for x in found], expected, 1e-5)


def dense_of_scaled(q, k, v, ranges):
    """The reference without a scale: heads are padded to 256, so that it divides scores by 16, and queries
    are multiplied by 16, neither of which is rounded.
    """
    q, *kv = (jnp.pad(x, ((0, 0),) * 3 + ((0, 256 - x.shape[3]),)) for x in (q, k, v))
    return attention.dense(q * jnp.asarray(16, q.dtype), *kv, ranges)[..., : v.shape[3]]


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "branched"), [(64, True), (64, False), (128, True), (80, False)])
def test_the_error_of_bfloat16_is_that_of_its_rounding(head_dim, branched):
    """The root mean square, of outputs and gradients, is at most twice that of the reference in bfloat16.

    Queries are scaled in float32 and rounded once, as by the layers of a model.
    """
    rng = np.random.default_rng(11)
    q, k, v, do = arrays(rng, 4, 128, 4, 2, head_dim, jnp.float32)
    segments, branches = packed(rng, 4, 128)
    ranges = key_ranges(segments, branches if branched else None)
    real = segments[:, :, None, None] != 0
    x = q * jnp.float32(1 / np.sqrt(head_dim)), k, v, jnp.where(real, do, 0)
    x = [a.astype(jnp.bfloat16) for a in x]
    with jax.enable_x64(True):
        exact = value_and_gradients(dense_of_scaled, *(a.astype(jnp.float64) for a in x), ranges)
    rounded = value_and_gradients(dense_of_scaled, *x, ranges)
    with jax.numpy_dtype_promotion("standard"):
        found = value_and_gradients(partial(splash_of_scaled, interpret=True), *x, ranges)
    for ours, reference, truth in zip(found, rounded, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        ours, reference, truth = (
            np.where(real, np.asarray(a, np.float64), 0) for a in (ours, reference, truth)
        )
        assert np.square(ours - truth).mean() <= 2**2 * np.square(reference - truth).mean()


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Return a function that calls a jitted function as on a TPU, with splash interpreted."""
    monkeypatch.setitem(
        attention.OF_SCALED_QUERIES, attention.splash, partial(splash_of_scaled, interpret=True)
    )
    mesh = AbstractMesh((1,), ("data",), abstract_device=TPU)

    def call(fn, *args):
        with jax.sharding.use_abstract_mesh(mesh), jax.numpy_dtype_promotion("standard"):
            return jax.jit(fn)(*args)

    return call


def turned(x, positions, theta):
    """Rope in float64 by complex numbers: pairs (i, i + E/2) turn by position * theta^(-2i/E)."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    turns = np.exp(1j * np.asarray(positions)[:, :, None, None] * theta ** (-np.arange(half) / half))
    pairs = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize(
    ("head_dim", "scale", "total", "softcap", "window", "branched"),
    [
        (80, None, 1 / np.sqrt(80), None, None, False),
        pytest.param(128, 0.3, 0.3, 2.0, None, True, marks=pytest.mark.slow),
        (80, 0.3, 0.3, None, 50, False),  # flash
        pytest.param(128, None, 1 / np.sqrt(128), None, None, True, marks=pytest.mark.slow),
    ],
)
def test_layers_on_a_tpu_multiply_scores_by_the_total_scale(
    on_a_tpu, head_dim, scale, total, softcap, window, branched
):
    rng = np.random.default_rng(12)
    q, k, v, do = arrays(rng, 1, 128, 4, 2, head_dim, jnp.float32)
    segments, branches = packed(rng, 1, 128)
    positions, ranges = jnp.arange(128)[None], key_ranges(segments, branches if branched else None)
    real = segments[:, :, None, None] != 0
    do = jnp.where(real, do, 0)
    kinds = (LayerKind(Rope(500.0), window),)
    layers = AttentionLayers(kinds, (0,), head_dim, scale, AttentionSettings(softcap))

    def layer(q, k, v):
        angles = example_angles(layers, positions, segments, q.dtype)
        return attend_rows(layers, None, (q, k, v), angles, ranges, True)

    def results(q, k, v, do):
        o, back, keys = jax.vjp(layer, q, k, v, has_aux=True)
        return (o, *back(do)), keys

    (o, *gradients), keys = on_a_tpu(results, q, k, v, do)
    with jax.enable_x64(True):
        # attention.dense divides scores by sqrt(E)
        factor = total * np.sqrt(head_dim)
        x = jnp.asarray(factor * turned(q, positions, 500.0)), jnp.asarray(turned(k, positions, 500.0))
        dense = partial(attention.dense, softcap=softcap)
        wide = (a.astype(jnp.float64) for a in (v, do))
        expected, dq, dk, dv = value_and_gradients(dense, *x, *wide, within_window(ranges, window))
    dq, dk = factor * turned(dq, -positions, 500.0), turned(dk, -positions, 500.0)
    found = [jnp.where(real, a, 0) for a in (o, *gradients)]
    assert_close(found, (expected, dq, dk, dv), 1e-5)
    np.testing.assert_allclose(keys[0], x[1], atol=1e-5 * np.abs(k).max())
    np.testing.assert_array_equal(keys[1], v)


@pytest.mark.quick_cases("80-None", "128-0.3")
@pytest.mark.parametrize(("head_dim", "scale"), [(64, None), (80, None), (128, None), (128, 0.3)])
def test_layers_on_a_tpu_round_scaled_queries_once(on_a_tpu, monkeypatch, head_dim, scale):
    """Half a unit in the last place. Queries that are rounded after rope and again when they are scaled have
    errors of up to a full one.
    """
    rng = np.random.default_rng(13)
    q, k, v, _ = arrays(rng, 1, 128, 4, 2, head_dim, jnp.bfloat16)
    segments, positions = jnp.ones((1, 128), jnp.int32), jnp.arange(128)[None]
    layers = AttentionLayers((LayerKind(Rope(500.0)),), (0,), head_dim, scale)
    monkeypatch.setitem(attention.OF_SCALED_QUERIES, attention.splash, lambda q, *rest: q)

    def queries(q, k, v):
        angles = example_angles(layers, positions, segments, q.dtype)
        return attend_rows(layers, None, (q, k, v), angles, key_ranges(segments), True)[0]

    found = on_a_tpu(queries, q, k, v)
    assert found.dtype == jnp.bfloat16
    total = 1 / np.sqrt(head_dim) if scale is None else scale
    exact = total * turned(q, positions, 500.0)
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    angles = total * 3e-5  # the error of float32 angles
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= unit / 2 + angles)


SIZES = dict(vocab=40, width=32, layers=2, heads=4, kv_heads=2, head_dim=80, mlp=48, max_positions=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        granite(GraniteConfig(**SIZES, attention_multiplier=0.3), jnp.float32),
        llama(LlamaConfig(**SIZES), jnp.float32),
    ],
    ids=["granite", "llama"],
)
def test_training_prefill_and_decoding_on_a_tpu_equal_training_on_a_cpu(on_a_tpu, model):
    """The last token is decoded: cached attention has a scale, and the cache has no queries."""
    rng, T = np.random.default_rng(14), 24
    params = init_params(model.specs, jax.random.key(0), jnp.float32)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    ids, row = jnp.asarray(rng.integers(0, 40, (2, T)), jnp.int32), jnp.ones((2, T), jnp.int32)
    tokens = Tokens(ids, row, jnp.broadcast_to(jnp.arange(T), (2, T)), *[jnp.zeros((2, 1))] * 3)
    expected = jax.jit(model.hidden)(params, tokens)[0]

    def generated(params, tokens):
        prompts = jax.tree.map(lambda x: x[:, : T - 1], tokens)
        h, keys = model.prefill(params, prompts, 2)
        cache = replace(model.empty_cache((2, T - 1), 2, 2), prompts=keys)
        last = jnp.full(2, T - 1, jnp.int32), jnp.ones(2, jnp.int32), equal_groups(2, 1)
        decoded, _ = model.decode(params, cache, tokens.ids[:, -1], NextToken(*last))
        return jnp.concatenate([h, decoded[:, None]], 1)

    for found in (on_a_tpu(model.hidden, params, tokens)[0], on_a_tpu(generated, params, tokens)):
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_scaled_queries_are_rounded_once(head_dim):
    """All 128 significands; with a factor in bfloat16 some would be rounded to their other neighbour."""
    q = jnp.broadcast_to(jnp.arange(128, 256, dtype=jnp.bfloat16)[None, :, None, None], (1, 128, 1, head_dim))
    exact = np.asarray(q, np.float64) / np.sqrt(head_dim)
    assert scaled(q).dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled(q), exact.astype(jnp.bfloat16))


def test_without_the_backward_kernels_shared_prompts_use_flash(monkeypatch):
    """They have no public name, so another version of jax may not have them."""
    choose = partial(attention.kernel_for, TPU, 64, jnp.bfloat16, AttentionNeeds(branches=True))
    assert choose() is attention.splash
    monkeypatch.setattr(splash_attention_kernel, "_splash_attention_bwd", lambda q, do: None)
    assert choose() is attention.flash
    monkeypatch.delattr(splash_attention_kernel, "_splash_attention_bwd")
    assert choose() is attention.flash
    assert attention.kernel_for(TPU, 64, jnp.bfloat16, AttentionNeeds()) is attention.splash


# the two forward calls for shared prompts are one function of the module
@pytest.mark.quick_cases("True-5-1000-8", "False-3-1100-6")
@pytest.mark.parametrize(
    ("branched", "kernels", "T", "heads"),
    [
        (False, 3, 1000, 8),
        (True, 5, 1000, 8),
        (False, 3, 1100, 6),  # nine blocks of 128; three query heads per key head
        (True, 5, 1100, 14),  # seven
    ],
)
def test_the_kernels_lower_for_tpus_without_repeated_keys_or_a_t_by_t_array(branched, kernels, T, heads):
    text, padded = lowered(attention.splash, T, heads, branched), -(-T // 128) * 128
    assert key_operands(text, "custom_call @tpu_custom_call", f"2x2x{padded}x64") == [2] * kernels
    assert f"{padded}x{padded}" not in text


def lowered(attend, T, heads, branched):
    shapes = [jax.ShapeDtypeStruct((2, T, n, 64), jnp.bfloat16) for n in (heads, 2, 2, heads)]
    ranges = abstract_ranges(2, T, branches=branched)
    with jax.numpy_dtype_promotion("standard"):
        traced = value_and_gradients.trace(attend, *shapes, ranges)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


def test_repeated_keys_would_be_found():
    text = lowered(repeating(attention.splash), 1000, 8, False)
    assert key_operands(text, "custom_call @tpu_custom_call", "2x2x1024x64") == [0, 0, 0]
