"""Laws of the kernels for NVIDIA GPUs, interpreted on the CPU, and their programs lowered for CUDA."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    abstract_ranges,
    arrays,
    assert_close,
    key_operands,
    packed,
    repeating,
    value_and_gradients,
)
from test_key_ranges import SEGMENTS, row_of

from jaxft.nn.attention import attention
from jaxft.nn.attention.flash_attention import key_ranges, visible, within_window
from jaxft.nn.attention.pallas_attention import (
    KernelOptions,
    Tile,
    Tiles,
    key_visits,
    query_visits,
    tiles_for,
)

# The smallest tiles of a matmul, of unequal sizes, so that rows of 40 tokens have several.
SMALL = Tiles(Tile(32, 16), Tile(16, 16), Tile(16, 32))
KERNEL = partial(attention.pallas, options=KernelOptions(SMALL, interpret=True))


@cache
def with_cap(kernel, softcap):
    """The same function each time, so that hundreds of examples are compiled once."""
    return partial(kernel, softcap=softcap)


def assert_equals_dense(x, ranges, softcap=None, tolerance=1e-5, kernel=KERNEL):
    found = value_and_gradients(with_cap(kernel, softcap), *x, ranges)
    assert_close(found, value_and_gradients(with_cap(attention.dense, softcap), *x, ranges), tolerance)


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "E", "window", "softcap", "branched"),
    [
        (1, 64, 3, 1, 24, 9, 1.5, True),  # three heads on one key head; a head that is padded to 32
        # odd length, grouped heads
        pytest.param(2, 90, 4, 2, 16, None, None, True, marks=pytest.mark.slow),
        pytest.param(2, 90, 4, 2, 16, None, None, False, marks=pytest.mark.slow),
        pytest.param(2, 33, 2, 2, 16, 20, None, False, marks=pytest.mark.slow),
        pytest.param(1, 64, 3, 1, 24, 9, 1.5, False, marks=pytest.mark.slow),
        pytest.param(2, 33, 2, 2, 16, 20, None, True, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, 1, 16, None, 0.7, False, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_equal_dense(B, T, H, K, E, window, softcap, branched):
    rng = np.random.default_rng(T)
    x = arrays(rng, B, T, H, K, E, jnp.float32)
    segments, branches = packed(rng, B, T)
    ranges = within_window(key_ranges(segments, branches if branched else None), window)
    assert_equals_dense(x, ranges, softcap)


def check_layout(parts, window, softcap):
    """A row of any layout that sources write, with a padded row next to it."""
    segments, branches, _ = row_of(parts, 60)
    rows = (jnp.asarray([x, [0] * 60], jnp.int32) for x in (segments, branches))
    x = arrays(np.random.default_rng(0), 2, 60, 4, 2, 16, jnp.float32)
    assert_equals_dense(x, within_window(key_ranges(*rows), jnp.int32(window)), softcap)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(SEGMENTS, st.integers(1, 40))
def test_any_layout_and_window_equals_dense(parts, window):
    check_layout(parts, window, None)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(SEGMENTS, st.integers(1, 40), st.sampled_from([None, 0.5, 4.0]))
def test_many_layouts_windows_and_soft_caps_equal_dense(parts, window, softcap):
    check_layout(parts, window, softcap)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_error_of_16_bits_is_at_most_twice_the_rounding_of_the_reference(dtype):
    rng = np.random.default_rng(1)
    x = arrays(rng, 2, 200, 4, 2, 64, dtype)
    ranges = key_ranges(*packed(rng, 2, 200))
    with jax.enable_x64(True):
        exact = value_and_gradients(attention.dense, *(a.astype(jnp.float64) for a in x), ranges)
    kernel = partial(attention.pallas, options=KernelOptions(interpret=True))
    found, rounded = (value_and_gradients(fn, *x, ranges) for fn in (kernel, attention.dense))
    for ours, reference, truth in zip(found, rounded, exact, strict=True):
        assert ours.dtype == dtype
        ours, reference, truth = (np.asarray(a, np.float64) for a in (ours, reference, truth))
        error, least = np.abs(ours - truth).max(), np.abs(reference - truth).max()
        assert error <= 2 * least


@pytest.mark.slow
def test_queries_without_keys_return_zeros_and_take_no_gradient():
    x = arrays(np.random.default_rng(4), 2, 40, 2, 1, 16, jnp.float32)
    for found in value_and_gradients(KERNEL, *x, key_ranges(jnp.zeros((2, 40), jnp.int32))):
        assert not np.any(found)


@pytest.mark.slow
def test_masked_keys_change_nothing():
    """Bit for bit: other segments and branches, later tokens and padding may have any finite value."""
    rng = np.random.default_rng(3)
    q, k, v, do = arrays(rng, 1, 64, 2, 1, 16, jnp.float32)
    segments = jnp.repeat(jnp.asarray([[1, 2, 3, 0]], jnp.int32), 16, axis=1)
    branches = jnp.asarray([[0] * 20 + [1] * 6 + [2] * 6 + [0] * 32], jnp.int32)
    mine = jnp.asarray([*range(16, 20), *range(26, 30)])  # a prompt and most of its second response
    others = jnp.ones(64, bool).at[mine].set(False)[None, :, None, None]
    do, ranges = jnp.where(others, 0, do), key_ranges(segments, branches)
    before = value_and_gradients(KERNEL, q, k, v, do, ranges)
    after = value_and_gradients(KERNEL, *(jnp.where(others, x + 50, x) for x in (q, k, v)), do, ranges)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, mine], y[:, mine])
    for gradient in after[1:]:
        assert not np.any(np.where(others, gradient, 0))


@pytest.mark.slow
def test_a_part_of_the_queries_sees_the_keys_of_the_full_row():
    rng = np.random.default_rng(5)
    q, k, v, do = arrays(rng, 2, 80, 4, 2, 16, jnp.float32)
    ranges = key_ranges(*packed(rng, 2, 80))
    part = slice(30, 71)
    of_part = jax.tree.map(lambda x: x[:, part], ranges)
    assert_equals_dense((q[:, part], k, v, do[:, part]), of_part)


@pytest.mark.quick_cases("32x16")
@pytest.mark.parametrize("tile", [Tile(16, 16), Tile(32, 16), Tile(16, 32)], ids=["16x16", "32x16", "16x32"])
def test_only_blocks_with_a_visible_key_are_visited(tile):
    """Rows in whole blocks, so that the range of blocks of each block of queries has no gap."""
    segments = jnp.repeat(jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0], [0] * 8], jnp.int32), 32, axis=1)
    branches = jnp.repeat(jnp.asarray([[0, 1, 2, 2, 0, 1, 1, 0], [0] * 8], jnp.int32), 32, axis=1)
    ranges = key_ranges(segments, branches)
    seen = np.asarray(visible(ranges, jnp.arange(256, dtype=jnp.int32)))
    C, D = 256 // tile.queries, 256 // tile.keys
    needed = seen.reshape(2, C, tile.queries, D, tile.keys).any((2, 4))
    of_queries, of_keys = key_visits(ranges, tile), query_visits(ranges, tile, D)
    for b, c in np.ndindex(2, C):
        prompt, prompts, own, total = of_queries[b, c].tolist()
        visited = [*range(prompt, prompt + prompts), *range(own, own + total - prompts)]
        assert visited == np.flatnonzero(needed[b, c]).tolist()
    for b, d in np.ndindex(2, D):
        first, count = of_keys[b, d].tolist()
        queries = np.flatnonzero(needed[b, :, d])
        assert [first, first + count] == ([queries[0], queries[-1] + 1] if queries.size else [0, 0])


def kernels_in(jaxpr):
    """Count the kernels in a jaxpr and all jaxprs inside it."""
    inner = [x for eqn in jaxpr.eqns if eqn.primitive.name != "pallas_call" for x in eqn.params.values()]
    found = sum(eqn.primitive.name == "pallas_call" for eqn in jaxpr.eqns)
    return found + sum(kernels_in(getattr(x, "jaxpr", x)) for x in inner if hasattr(x, "eqns"))


def layers(q, k, v, ranges, policy):
    """Three layers as a model runs them: scanned, rematerialised."""

    def layer(x, _):
        return jax.checkpoint(lambda x: KERNEL(x, k, v, ranges), policy=policy)(x), None

    return jax.lax.scan(layer, q, length=3)[0]


def test_saved_names_avoid_recomputing_the_forward_kernel():
    x = arrays(np.random.default_rng(9), 1, 32, 2, 1, 16, jnp.bfloat16)
    ranges, policies = key_ranges(jnp.ones((1, 32), jnp.int32)), jax.checkpoint_policies
    names = policies.save_only_these_names("attn_out", "attn_lse")
    count = [
        kernels_in(jax.make_jaxpr(partial(value_and_gradients, partial(layers, policy=policy)))(*x, ranges))
        for policy in (names, policies.everything_saveable, policies.nothing_saveable)
    ]
    assert count == [1 + 2, 1 + 2, 1 + 1 + 2]


def lowered(attend, T, heads, head_dim):
    shapes = [jax.ShapeDtypeStruct((2, T, n, head_dim), jnp.bfloat16) for n in (heads, 2, 2, heads)]
    traced = value_and_gradients.trace(attend, *shapes, abstract_ranges(2, T, branches=True))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.quick_cases("1000-8-128", "1100-6-64")
@pytest.mark.parametrize(
    ("T", "heads", "head_dim"),
    [
        *((1000, 8, head_dim) for head_dim in (64, 80, 128, 256)),
        (1100, 6, 64),  # nine blocks of 128; three query heads per key head
        (1100, 14, 128),  # seven
    ],
)
def test_the_kernels_lower_for_cuda_without_repeated_keys_or_a_t_by_t_array(T, heads, head_dim):
    text, padded = lowered(partial(attention.pallas, softcap=30.0), T, heads, head_dim), -(-T // 128) * 128
    # output, gradient of queries, gradients of keys and values: each takes the keys and values of two heads
    assert key_operands(text, "xla.gpu.triton", f"2x{padded}x2x{head_dim}") == [2, 2, 2]
    assert f"{padded}x{padded}" not in text
    tensors = re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text)
    assert max(math.prod(map(int, dims.split("x"))) for dims in tensors) == 2 * padded * heads * head_dim


def test_repeated_keys_would_be_found():
    text = lowered(repeating(attention.pallas), 1000, 8, 64)
    assert key_operands(text, "xla.gpu.triton", "2x1024x2x64") == [0, 0, 0]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_tiles_fit_the_shared_memory_of_every_gpu_since_ampere(head_dim):
    """Triton stages the tiles of its loop `stages` times and the tile of a matmul's operand once."""
    padded, limit = 2 ** (head_dim - 1).bit_length(), 99 * 1024
    tiles = tiles_for(head_dim)
    for tile, looped, kept in (
        (tiles.output, tiles.output.keys, tiles.output.queries),
        (tiles.queries, tiles.queries.keys, 2 * tiles.queries.queries),
        (tiles.keys, tiles.keys.queries, 2 * tiles.keys.keys),
    ):
        assert 2 * padded * (2 * looped * tile.stages + kept) <= limit
