"""Matmuls in FP8, emulated on the CPU: values by their definition, adapters, residuals, devices, a mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_model import CONFIG, assert_close

from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.models.families.llama import llama
from jaxft.nn import matmul, param_spec
from jaxft.nn.adapters.lora import ADAPTERS, Adapted, Adapter
from jaxft.nn.layers import lm_head
from jaxft.nn.quant import Quant, dequantize, quantize
from jaxft.nn.quant_formats import E4M3
from jaxft.train import trainable_params
from jaxft.weights import storage

DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # quicker to compile


def random(*shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.1, 3, (*shape[:-1], 1)), dtype)


def weight(ins, outs, seed=9, fp8_matmul=True):
    q = quantize(np.asarray(random(outs, ins, seed=seed)).T, "fp8")
    return replace(jax.tree.map(jnp.asarray, q), fp8_matmul=fp8_matmul)


def codes(w):
    return np.asarray(w.codes).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def rounded(x, dtype):
    """Rows divided by a scale, which makes their largest magnitude that of an FP8 dtype, and rounded by
    ml_dtypes; and the scales. Both in float64.
    """
    x = np.asarray(x).astype(np.float32)
    largest = np.abs(x).max(-1, keepdims=True)
    limit = np.float32(ml_dtypes.finfo(dtype).max)
    return (x * (limit / largest)).astype(dtype).astype(np.float64), np.float64(largest) / limit


@DTYPES
def test_forward_is_the_product_of_rounded_rows_and_codes_times_both_scales(dtype):
    x, w = random(2, 7, 48, dtype=dtype), weight(48, 24)
    rows, scale = rounded(x, ml_dtypes.float8_e4m3fn)
    expected = rows @ codes(w) * scale * np.float64(w.scale)
    found = jit(lambda x, w: matmul.linear(x, w))(x, w)
    assert found.dtype == dtype
    # two roundings to bfloat16: of the product, and of the scaled one
    np.testing.assert_allclose(
        np.float64(found), expected, rtol=2**-7 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
    )
    exact = np.float64(x) @ np.asarray(dequantize(w), np.float64)
    bound = np.abs(np.float64(x)) @ np.abs(np.asarray(dequantize(w), np.float64)) * 2.0**-4
    bound += (
        np.abs(np.float64(x)).max(-1, keepdims=True)
        * 2.0**-10
        / 448
        * np.abs(codes(w)).sum(0)
        * np.float64(w.scale)
    )
    assert np.all(np.abs(expected - exact) <= bound) and np.abs(expected - exact).max() > 0


@DTYPES
def test_the_input_gradient_is_that_of_scaled_rows_in_e4m3_and_ignores_the_rounding_of_the_input(dtype):
    x, w, g = random(7, 48, dtype=dtype), weight(48, 24), random(7, 24, seed=1, dtype=dtype)
    rows, scale = rounded(np.float32(g) * np.float32(w.scale), ml_dtypes.float8_e4m3fn)
    expected = rows @ codes(w).T * scale
    gradient = jit(lambda x, g: jax.vjp(lambda x: matmul.linear(x, w), x)[1](g)[0])
    found = gradient(x, g)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.float64(found), expected, rtol=2**-7 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(found, gradient(2 * x + 1, g))


def test_adapters_are_multiplied_in_the_compute_dtype_and_added():
    w, plain = weight(48, 24), weight(48, 24, fp8_matmul=False)
    x, g = random(6, 5, 48, dtype=jnp.bfloat16), random(6, 5, 24, seed=4, dtype=jnp.bfloat16)
    base, exact = (jit(matmul.linear)(x, one) for one in (w, plain))
    assert np.any(base != exact)
    for lead in ((), (3,)):
        a, b, scale = random(*lead, 48, 4, seed=2), random(*lead, 4, 24, seed=3), jnp.full(lead, 0.7)

        @jit
        def both(w, x, a, b, g, scale=scale):
            over = (ADAPTERS,) * len(scale.shape)
            y, back = jax.vjp(lambda x, a, b: matmul.linear(x, Adapted(w, a, b, scale, over=over)), x, a, b)
            return y, *back(g)

        (y, dx, da, db), (other, *others) = (both(one, x, a, b, g) for one in (w, plain))
        assert_near(np.float32(y) - np.float32(base), np.float32(other) - np.float32(exact), 2**-6)
        assert np.any(dx != others[0])
        assert_near(dx, others[0], 2**-3)  # E4M3 rounds by at most a sixteenth
        assert_near(da, others[1], 2**-7)  # the base does not matter
        assert_near(db, others[2], 2**-7)


def assert_near(found, expected, fraction):
    expected = np.float32(expected)
    np.testing.assert_allclose(np.float32(found), expected, atol=fraction * np.abs(expected).max())


def test_rows_are_rounded_alone_and_what_is_not_finite_stays_so():
    x, w = random(5, 32), weight(32, 8)
    fn, other = jit(matmul.linear), np.array(x)
    other[1], other[2, 3], other[3, 0] = 0, np.nan, np.inf
    y, found = np.asarray(fn(x, w)), np.asarray(fn(other, w))
    np.testing.assert_array_equal(found[[0, 4]], y[[0, 4]])
    assert not found[1].any() and np.isnan(found[2:4]).all()


def test_blocks_of_inputs_logits_and_other_devices_use_the_dequantised_weight():
    x, w = random(5, 32), weight(32, 8)
    blocks = replace(w, block=16, scale=np.concatenate([w.scale, 2 * w.scale]))
    for fn, one in (
        (matmul.linear, replace(w, fp8_matmul=None)),
        (lambda x, w: lm_head({"head": w}, x), w),
        (matmul.linear, blocks),
    ):
        found, expected = jit(lambda x, w, fn=fn: (fn(x, w), x @ dequantize(w)))(x, one)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", [0, 1, 3])
def test_residuals_are_the_input_and_the_codes(adapters):
    w = weight(42, 6)
    if adapters:
        each = (adapters,) if adapters > 1 else ()
        a, b, over = jnp.ones((*each, 42, 2)), jnp.ones((*each, 2, 6)), (ADAPTERS,) * len(each)
        w = Adapted(w, a, b, jnp.ones(each), over=over)
    x = jnp.ones((3, 42), jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: matmul.linear(x, w), x)[1], x))
    assert {x.dtype for x in kept if x.shape[-2:] == (42, 6)} == {jnp.dtype(jnp.uint8)}
    assert all(x.dtype != E4M3 for x in kept)


@pytest.mark.parametrize("axes", [("width", "mlp"), ("mlp", "width")], ids=["column", "row"])
def test_an_fp8_matmul_on_a_mesh_equals_one_device(x64, axes):
    mesh, spec = make_mesh(MeshShape(2, 2, 2)), param_spec.ParamSpec((64, 64), axes, param_spec.full(0.0))
    w, x = weight(64, 64), random(8, 3, 64, dtype=jnp.float64)

    def loss(x, w):
        return jnp.sum(jnp.sin(matmul.linear(x, w)))

    one = jit(jax.value_and_grad(loss))(x, w)
    sharded = jax.tree.map(jax.device_put, w, storage.leaf_sharding(spec, w, mesh, "w"))
    assert sharded.codes.sharding.shard_shape(w.codes.shape) == (32, 32)
    with jax.set_mesh(mesh):
        place = sharding.array_sharding(mesh, ("rows", "time", "act_width"))
        many = jit(jax.value_and_grad(loss))(jax.device_put(x, place), sharded)
    assert_close(jax.device_get(many), jax.device_get(one))


def test_the_summary_states_how_fp8_weights_are_multiplied():
    mesh, w = make_mesh(MeshShape(1), jax.devices()[:1]), weight(32, 8)
    for setting, block, expected in (
        (None, None, "dequantised before matmuls (cpu has no FP8 matmuls)"),
        (False, None, "dequantised before matmuls (quant.fp8_matmul=false)"),
        (True, None, "multiplied in FP8, which is emulated on cpu"),
        (True, 16, "dequantised before matmuls (its scales are per block of inputs)"),
    ):
        assert storage.fp8_matmuls(replace(w, fp8_matmul=setting, block=block), mesh) == expected
    model = llama(replace(CONFIG, tied=False))
    for targets, ending in (
        ("head", ", dequantised, as only layers are multiplied in FP8"),
        ("head|layers/mlp/.*", ", multiplied in FP8, which is emulated on cpu"),
    ):
        parts = trainable_params.partition_params(
            model, Adapter(), None, Quant("fp8", targets=targets, fp8_matmul=True)
        )
        assert storage.quantisation_summary(parts.stored, mesh).endswith(ending)
