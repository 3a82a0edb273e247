"""Packed weights: exact, sliceable leaves whose shape follows their codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.quant import QTensor, dequantize, is_qtensor, quantize
from jaxft.sharding import MeshShape, make_mesh, named

EVERY = np.arange(2**16, dtype=np.uint16).reshape(4, 128, 128)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_bits_hold_every_value_exactly(dtype):
    weight = jnp.asarray(EVERY.view(jnp.dtype(dtype)))  # NaNs with their payloads, infinities, subnormals, both zeros
    q = quantize(weight, "bits")
    assert q.codes.dtype == jnp.uint16 and q.dtype == dtype and q.shape == weight.shape
    np.testing.assert_array_equal(q.codes, EVERY)
    back = jax.jit(dequantize)(q)
    assert back.dtype == dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.uint16), EVERY)


def test_scan_vmap_and_indexing_slice_it_and_the_shape_follows():
    q = quantize(jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4), "bits")
    x = jnp.ones(3, jnp.bfloat16)

    def body(total, layer):
        assert layer.shape == (3, 4)
        return total + x @ dequantize(layer), None

    total, _ = jax.lax.scan(body, jnp.zeros(4, jnp.bfloat16), q)
    np.testing.assert_array_equal(total, np.arange(24).reshape(2, 3, 4).sum((0, 1)))
    assert jax.vmap(dequantize)(q).shape == (2, 3, 4)
    assert jax.tree.map(lambda x: x[0], q).shape == (3, 4)
    assert jax.eval_shape(lambda: q).shape == (2, 3, 4)


def test_it_is_one_leaf_for_who_asks_and_its_kind_is_structure():
    q = quantize(jnp.ones((2, 2), jnp.bfloat16), "bits")
    assert is_qtensor(q) and not is_qtensor(q.codes) and len(jax.tree.leaves(q)) == 1
    assert jax.tree.leaves({"w": q}, is_leaf=is_qtensor) == [q]
    other = quantize(jnp.ones((2, 2), jnp.float16), "bits")
    assert jax.tree.structure(q) != jax.tree.structure(other)


def test_it_is_sharded_like_the_weight_it_stands_for():
    mesh = make_mesh(MeshShape(2, 2, 2))
    place = named(mesh, ("layers", "width", "mlp"), (3, 8, 8))
    weight = jnp.arange(3 * 8 * 8, dtype=jnp.bfloat16).reshape(3, 8, 8)
    q = jax.device_put(quantize(weight, "bits"), place)
    assert q.codes.addressable_shards[0].data.shape == (3, 4, 4)
    out = jax.jit(dequantize)(q)
    assert out.sharding.is_equivalent_to(place, 3)
    np.testing.assert_array_equal(out, weight)


def test_what_cannot_be_packed_is_refused_in_one_line():
    with pytest.raises(ValueError, match="quantisation 'int3' is not known; use "):
        quantize(jnp.ones((2, 2), jnp.bfloat16), "int3")
    with pytest.raises(ValueError, match="kind 'bits' holds 16-bit floats, found float32; cast the weight first"):
        quantize(jnp.ones((2, 2), jnp.float32), "bits")
    for wrong in (jnp.int16, jnp.uint16):
        with pytest.raises(ValueError, match="kind 'bits' holds 16-bit floats"):
            quantize(jnp.ones((2, 2), wrong), "bits")


def test_it_has_no_gradient_of_its_own():
    q = QTensor(jnp.zeros((2, 2), jnp.uint16), "bits", jnp.dtype(jnp.bfloat16))
    with pytest.raises(TypeError):
        jax.grad(lambda q: dequantize(q).sum().astype(jnp.float32))(q)
