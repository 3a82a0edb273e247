"""Laws of attention with sharded time where heads do not divide: it equals `dense` and is evenly divided."""

import functools
import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import arrays, assert_close, packed, products, value_and_gradients
from test_key_ranges import SEGMENTS, row_of
from tiny_model import tiny

from jaxft.batch import Tokens
from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh
from jaxft.nn.attention import attention
from jaxft.nn.attention.attention import RING_LEAST, AttentionSettings
from jaxft.nn.attention.flash_attention import key_ranges, visible, within_window
from jaxft.nn.attention.pallas_attention import KernelOptions, Tile, Tiles, pallas_gradients, pallas_output
from jaxft.nn.attention.ring_attention import BlockKernel

ROW = ("rows", "whole_time")
SOFTCAP = 4.0


def attend(least, softcap):
    """Attention with a ring from `least` tokens per device."""

    def fn(q, k, v, ranges):
        with mock.patch.object(attention, "RING_LEAST", least):
            return attention.attention(q, k, v, ranges, True, AttentionSettings(softcap))

    return fn


FUNCTIONS = {
    (name, softcap): attend(least, softcap)
    for name, least in (("gathered", 2**30), ("ring", 0))
    for softcap in (None, SOFTCAP)
}


def placed(mesh, x, ranges):
    """q, k, v and the cotangent of o sharded over time, and the ranges as a model has them."""
    heads = ("heads", "kv_heads", "kv_heads", "heads")
    axes = [("rows", "time", axis, "head_dim") for axis in heads]
    x = [jax.device_put(a, array_sharding(mesh, names, a.shape)) for a, names in zip(x, axes, strict=True)]
    return *x, jax.tree.map(lambda a: jax.device_put(a, array_sharding(mesh, ROW, a.shape)), ranges)


def on_mesh(fn, mesh, x, ranges):
    with jax.set_mesh(mesh):
        return value_and_gradients(fn, *placed(mesh, x, ranges))


@functools.cache
def windowed_program(layout):
    """Attention and its gradients, compiled for rows of 80 tokens on a mesh of 2 x 4 devices."""
    mesh = make_mesh(MeshShape(data=2, context=4))
    x, row = arrays(np.random.default_rng(0), 2, 80, 6, 2, 8, jnp.float32), jnp.ones((2, 80), jnp.int32)
    args = placed(mesh, x, within_window(key_ranges(row, row), jnp.int32(9)))
    with jax.set_mesh(mesh):
        compiled = value_and_gradients.lower(FUNCTIONS[layout, SOFTCAP], *args).compile()
    return mesh, x, compiled


DENSE = partial(attention.dense, softcap=SOFTCAP)


@pytest.mark.parametrize("layout", ["gathered", "ring"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(SEGMENTS, st.integers(1, 60))
def test_any_layout_and_window_equals_dense(layout, parts, window):
    """A row of any layout that sources write, a soft cap, and three query heads per key head; next to it a
    row of padding.
    """
    mesh, x, compiled = windowed_program(layout)
    segments, branches, _ = row_of(parts, 80)
    rows = (jnp.asarray([x, [0] * 80], jnp.int32) for x in (segments, branches))
    ranges = within_window(key_ranges(*rows), jnp.int32(window))
    assert_close(compiled(*placed(mesh, x, ranges)), value_and_gradients(DENSE, *x, ranges), 1e-5)


def test_a_ring_passes_blocks_on_and_no_device_has_all_keys():
    """The text of a compiled program has the shapes of one device."""
    gathered, ring = (windowed_program(layout)[2].as_text() for layout in ("gathered", "ring"))
    all_keys = r"f32\[1,80,2,8\]"
    assert re.search(all_keys, gathered) and not re.search(all_keys, ring)
    assert "collective-permute(" in ring
    others = r"(all-gather|all-to-all|all-reduce|reduce-scatter)\("
    between_devices = r"replica_groups=(\{\{\d+,|\[\d+,(?!1\])\d+\])"  # a group of one moves nothing
    assert re.search(f"{others}.*{between_devices}", gathered)
    assert not re.search(f"{others}.*{between_devices}", ring)


@pytest.mark.parametrize(
    ("layout", "shape", "T", "kv_heads", "branched"),
    [
        ("ring", MeshShape(2, context=2, tensor=2), 34, 2, True),  # three heads each; an odd number of tokens
        pytest.param("gathered", MeshShape(1, context=8), 24, 3, False, marks=pytest.mark.slow),
        pytest.param("ring", MeshShape(1, context=8), 8, 3, False, marks=pytest.mark.slow),
        pytest.param("ring", MeshShape(1, context=8), 24, 6, True, marks=pytest.mark.slow),
        # the device in the middle swaps with itself
        pytest.param("ring", MeshShape(1, context=5), 35, 2, True, marks=pytest.mark.slow),
        pytest.param("gathered", MeshShape(1, context=5), 35, 2, True, marks=pytest.mark.slow),
        pytest.param("gathered", MeshShape(2, context=2, tensor=2), 34, 2, True, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_equal_dense(layout, shape, T, kv_heads, branched):
    rng = np.random.default_rng(T)
    x = arrays(rng, 2, T, 6, kv_heads, 8, jnp.float32)
    segments, branches = packed(rng, 2, T)
    ranges = key_ranges(segments, branches if branched else None)
    devices = jax.devices()[: 5 if shape.context == 5 else 8]
    found = on_mesh(FUNCTIONS[layout, None], make_mesh(shape, devices), x, ranges)
    assert_close(found, value_and_gradients(attention.dense, *x, ranges), 1e-5)


def test_the_error_of_16_bits_is_that_of_one_device():
    """Outputs and gradients of blocks of keys are added in float32 and rounded once."""
    rng = np.random.default_rng(1)
    x = arrays(rng, 1, 128, 3, 1, 16, jnp.bfloat16)
    ranges = key_ranges(*packed(rng, 1, 128))
    with jax.enable_x64(True):
        exact = value_and_gradients(attention.dense, *(a.astype(jnp.float64) for a in x), ranges)
    found = on_mesh(FUNCTIONS["ring", None], make_mesh(MeshShape(1, context=8)), x, ranges)
    rounded = value_and_gradients(attention.flash, *x, ranges)
    for ours, reference, truth in zip(found, rounded, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        ours, reference, truth = (np.asarray(a, np.float64) for a in (ours, reference, truth))
        assert np.square(ours - truth).mean() <= 1.1**2 * np.square(reference - truth).mean()


@pytest.mark.slow
def test_a_ring_of_the_kernels_for_nvidia_gpus_equals_dense():
    options = KernelOptions(Tiles(*[Tile(16, 16)] * 3), interpret=True)
    kernel = BlockKernel(*(partial(fn, options=options) for fn in (pallas_output, pallas_gradients)))
    rng = np.random.default_rng(3)
    x, ranges = arrays(rng, 2, 80, 6, 2, 16, jnp.float32), key_ranges(*packed(rng, 2, 80))
    with mock.patch.dict(attention.BLOCK_KERNELS, {attention.flash: kernel}):
        found = on_mesh(attend(0, None), make_mesh(MeshShape(4, context=2)), (*x,), ranges)
    assert_close(found, value_and_gradients(attention.dense, *x, ranges), 1e-5)


def pairs_like(q, k, ranges):
    """The pairs that a call of a kernel computes, in every element of an array like q."""
    seen = visible(ranges, jnp.arange(k.shape[1], dtype=jnp.int32))
    return jnp.full(q.shape, seen.sum(dtype=jnp.int32), q.dtype)


def test_every_device_computes_as_many_pairs_in_total_and_in_each_step_of_a_ring():
    """For a causal row, of which contiguous parts would have 1/64 to 15/64 of the pairs."""

    def counting(q, k, v, ranges, softcap):
        return pairs_like(q, k, ranges)

    def counting_block(qkv, ranges, softcap):
        """The log-sum-exp is the count too, so that the step with the most pairs has all the weight."""
        pairs = pairs_like(*qkv[:2], ranges)
        return pairs, pairs[..., 0].swapaxes(1, 2)

    T, devices = 4096, 8
    q, k = jnp.zeros((1, T, 3, 1)), jnp.zeros((1, T, 1, 1))
    ranges, shape = key_ranges(jnp.ones((1, T), jnp.int32)), MeshShape(1, context=devices)
    even = T * (T + 1) / 2 / devices
    with (
        jax.set_mesh(make_mesh(shape)),
        mock.patch.object(attention, "kernel_for", lambda *_: counting),
        mock.patch.dict(attention.BLOCK_KERNELS, {counting: BlockKernel(counting_block, None)}),
    ):
        of_devices = jax.jit(attend(2**30, None))(q, k, k, ranges)
        largest_step = jax.jit(attend(0, None))(q, k, k, ranges)
    np.testing.assert_allclose(of_devices, even, rtol=0.01)
    np.testing.assert_allclose(largest_step, even / devices, rtol=0.01)


def test_saved_names_avoid_running_the_ring_again():
    x = arrays(np.random.default_rng(9), 1, 32, 3, 1, 8, jnp.float32)
    ranges, policies = key_ranges(jnp.ones((1, 32), jnp.int32)), jax.checkpoint_policies

    def layers(q, k, v, ranges, policy):
        def layer(x, _):
            attend = FUNCTIONS["ring", None]
            return jax.checkpoint(lambda x: attend(x, k, v, ranges), policy=policy)(x), None

        return jax.lax.scan(layer, q, length=3)[0]

    names = policies.save_only_these_names("attn_out", "attn_lse")
    with jax.set_mesh(make_mesh(MeshShape(1, context=8))):
        found = [
            products(partial(value_and_gradients, partial(layers, policy=policy)), *x, ranges)
            for policy in (names, policies.everything_saveable, policies.nothing_saveable)
        ]
    one, both = 2 * 2, 2 * 5  # matmuls of a block of keys in the loop, and of the last block after it
    assert found == [one + both, one + both, one + one + both]


def sends(jaxpr, devices, times=1):
    """Count the arrays that each device passes on to the next one, in loops as often as they run."""
    step, found = {(i, (i + 1) % devices) for i in range(devices)}, 0
    for eqn in jaxpr.eqns:
        found += times * (eqn.primitive.name == "ppermute" and set(eqn.params["perm"]) == step)
        inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for x in eqn.params.values():
            x = getattr(x, "jaxpr", x)
            found += sends(x, devices, inner) if hasattr(x, "eqns") else 0
    return found


def test_no_block_of_keys_is_sent_back_to_where_it_came_from():
    """With n devices keys and values are sent n - 1 times in each direction, and their gradients n times."""
    x, devices = arrays(np.random.default_rng(9), 1, 32, 3, 1, 8, jnp.float32), 8
    ranges = key_ranges(jnp.ones((1, 32), jnp.int32))
    with jax.set_mesh(make_mesh(MeshShape(1, context=devices))):
        jaxpr = jax.make_jaxpr(partial(value_and_gradients, FUNCTIONS["ring", None]))(*x, ranges)
    assert sends(jaxpr.jaxpr, devices) == 2 * (devices - 1) + 2 * (devices - 1) + 2 * devices


@pytest.mark.parametrize(
    ("length", "heads", "expected"),
    [
        (8 * RING_LEAST, (6, 2), "keys in a ring over mesh.context: 6 heads"),
        (RING_LEAST, (6, 2), "keys gathered over mesh.context: 6 heads"),
        (RING_LEAST, (24, 3), "keys gathered over mesh.context: 3 kv heads"),
    ],
)
def test_long_rows_are_in_a_ring_and_the_start_up_line_says_so(length, heads, expected):
    q = jax.ShapeDtypeStruct((1, length, heads[0], 64), jnp.bfloat16)
    with jax.set_mesh(make_mesh(MeshShape(1, context=8))):
        line = attention.attention_line(q, heads[1])
    assert line == (
        f"attention: blockwise XLA (flash), {expected} do not divide over mesh.context x mesh.tensor"
    )


@pytest.mark.parametrize("asked", ["gathered", "ring"])
@pytest.mark.parametrize(("length", "heads"), [(64 * RING_LEAST, (6, 2)), (64, (6, 2)), (64, (8, 8))])
def test_a_setting_asks_for_a_ring_or_gathered_keys_whatever_the_heads_and_the_length(asked, length, heads):
    """Without it rows of 64 tokens are gathered, long ones are in a ring, and 8 heads are divided."""
    q = jax.ShapeDtypeStruct((1, length, heads[0], 64), jnp.bfloat16)
    text = {"gathered": "keys gathered", "ring": "keys in a ring"}[asked]
    with jax.set_mesh(make_mesh(MeshShape(1, context=8))):
        line = attention.attention_line(q, heads[1], settings=AttentionSettings(context_keys=asked))
        automatic = attention.attention_line(q, heads[1])
    assert line == f"attention: blockwise XLA (flash), {text} over mesh.context: context_keys={asked}"
    assert "context_keys" not in automatic


@pytest.mark.parametrize("asked", ["auto", "gathered", "ring"])
def test_a_model_attends_as_its_setting_asks(asked):
    """Its 4 heads divide over 4 devices."""
    model, params = tiny(jnp.float32, attention_settings=AttentionSettings(context_keys=asked))
    ids = jnp.ones((2, 16), jnp.int32)
    batch = Tokens(ids, ids, ids, ids, ids, jnp.ones((2, 16)))
    with (
        jax.set_mesh(make_mesh(MeshShape(2, context=4))),
        mock.patch.object(attention, "ring", side_effect=attention.ring) as ring,
        mock.patch.object(attention, "balanced", side_effect=attention.balanced) as gathered,
    ):
        jax.eval_shape(model.hidden, params, batch)
    assert (bool(gathered.call_count), bool(ring.call_count)) == (asked == "gathered", asked == "ring")


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="context_keys='rings'; use one of auto, gathered, ring"):
        AttentionSettings(context_keys="rings")


def test_a_ring_with_the_reference_kernel_is_refused():
    q = jax.ShapeDtypeStruct((1, 64, 6, 64), jnp.float32)
    choice = AttentionSettings(context_keys="ring", kernel="reference")
    refused = pytest.raises(ValueError, match="context_keys=ring .* attention=reference does not support")
    with jax.set_mesh(make_mesh(MeshShape(1, context=8))), refused:
        attention.attention_line(q, 2, settings=choice)
