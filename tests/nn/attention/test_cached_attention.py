"""Attention to a prompt that several completions share, and to each completion's own tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.attention.attention import dense
from jaxft.nn.attention.flash_attention import key_ranges, within_window
from jaxft.nn.attention.kv_cache import (
    GivenChunk,
    Keys,
    NextToken,
    RowGroups,
    Step,
    append,
    append_chunk,
    attend,
    store,
)
from jaxft.nn.attention.layer_attention import AttentionRule

H, K, E, S, N = 4, 2, 8, 7, 5  # heads, key heads, head size, slots of a prompt and of a completion


def completions(rng, dtype):
    """Two prompts of 7 and 4 tokens with rows 3 and 0, and row 1; row 2 is empty. One is a token ahead.

    Returns q, k, v [T, heads, E] of each live row's text, and how many tokens of it are the completion.
    """
    texts, prompts = {}, [(7, (3, 0)), (4, (1,))]
    for size, rows in prompts:
        shared = [rng.normal(0, 1, (size, heads, E)) for heads in (H, K, K)]
        for row in rows:
            new = 3 if row == 3 else 2
            own = [rng.normal(0, 1, (new, heads, E)) for heads in (H, K, K)]
            texts[row] = [jnp.asarray(np.concatenate(x), dtype) for x in zip(shared, own, strict=True)], new
    return texts


def cached(texts, N):
    """Keys of prompts and rows as a cache stores them, all else 9."""
    prompt_k, prompt_v = np.full((2, K, E, S), 9.0), np.full((2, K, S, E), 9.0)
    k, v, visible = np.full((4, K, E, N), 9.0), np.full((4, K, N, E), 9.0), np.zeros((2, S), bool)
    for row, ((_, keys, values), new) in texts.items():
        prompt, size = (1 if row == 1 else 0), len(keys) - new
        prompt_k[prompt, :, :, S - size :] = keys[:size].transpose(1, 2, 0)
        prompt_v[prompt, :, S - size :] = values[:size].swapaxes(0, 1)
        visible[prompt, S - size :] = True
        for i in range(new):
            k[row, :, :, i % N], v[row, :, i % N] = keys[size + i], values[size + i]
    return prompt_k, prompt_v, k, v, visible


GROUPS = RowGroups(jnp.asarray([[3, 0], [1, 1]], jnp.int32), jnp.asarray([1, 2, 3, 0], jnp.int32))
COUNTS = jnp.asarray([2, 2, 0, 3], jnp.int32)


@pytest.mark.parametrize(
    ("window", "cap", "slots"), [(None, None, N), (None, 0.7, 3), (4, 0.7, N), (2, None, 2), (1, None, 1)]
)
def test_cached_attention_is_the_last_row_of_dense(window, cap, slots):
    rng, rule = np.random.default_rng(7), AttentionRule(window, cap)
    with jax.enable_x64(True):
        texts = completions(rng, jnp.float64)
        prompt_k, prompt_v, k, v, visible = cached(texts, slots)
        keys = Keys(prompt_k[None], prompt_v[None]), Keys(k[None], v[None])
        q = jnp.stack([texts[row][0][0][-1] if row in texts else jnp.zeros((H, E)) for row in range(4)])
        at = NextToken(None, COUNTS, GROUPS)
        step = Step(at, jnp.asarray(visible), GROUPS.to_groups(COUNTS))
        found = attend(q[:, None], keys, jnp.int32(0), step, rule)[:, 0]
        for row, ((q, k, v), _) in texts.items():
            ranges = within_window(key_ranges(jnp.ones((1, len(q)), jnp.int32)), window)
            expected = dense(q[None], k[None], v[None], ranges, cap)[0, -1]
            np.testing.assert_allclose(found[row], expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_stored_keys_have_the_error_of_their_format(dtype):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(0, 2, shape), jnp.float32) for shape in ((3, K, E, S), (3, K, S, E)))
    like = Keys(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros(()), jnp.zeros(()))
    stored = store(k, v, like)
    for x, q, scale, axis in ((k, stored.k, stored.k_scale, 2), (v, stored.v, stored.v_scale, 3)):
        assert q.dtype == dtype and scale.shape == (3, K, S)
        q = q if dtype == jnp.int8 else jax.lax.bitcast_convert_type(q, jnp.float8_e4m3fn)
        largest = np.abs(x).max(axis, keepdims=True)
        bound = largest / 254 if dtype == jnp.int8 else np.maximum(np.abs(x) / 16, largest / 448 / 1024)
        assert (np.abs(q.astype(jnp.float32) * jnp.expand_dims(scale, axis) - x) <= bound * 1.001).all()
    zeros = store(jnp.zeros_like(k), jnp.zeros_like(v), like)
    assert not np.asarray(zeros.k, np.float32).any() and not np.asarray(zeros.v_scale).any()


def test_a_token_is_stored_in_the_slots_of_its_layer_only():
    keys = Keys(jnp.ones((3, 2, K, E, N)), jnp.ones((3, 2, K, N, E)))
    k, v = jnp.full((2, K, E, 1), 5.0), jnp.full((2, K, 1, E), 6.0)
    put, counts = jax.jit(partial(append, keys, k, v)), jnp.asarray([N + 3, 1])
    found = put(jnp.int32(1), counts)
    expected_k, expected_v = np.ones(keys.k.shape), np.ones(keys.v.shape)
    for row, slot in enumerate((2, 0)):
        expected_k[1, row, ..., slot], expected_v[1, row, :, slot] = 5, 6
    np.testing.assert_array_equal(found.k, expected_k)
    np.testing.assert_array_equal(found.v, expected_v)
    unused = put(jnp.int32(1), counts, used=jnp.asarray(False))
    np.testing.assert_array_equal(unused.k, keys.k)
    np.testing.assert_array_equal(unused.v, keys.v)


def test_the_last_tokens_of_a_chunk_are_stored_and_rows_beyond_the_last_dropped():
    keys = Keys(jnp.zeros((2, 3, K, E, N)), jnp.zeros((2, 3, K, N, E)))
    numbers = np.outer((1.0, 10.0), np.arange(1, 9)).astype(np.float32)  # of two layers
    k = jnp.broadcast_to(numbers[:, None, None, None], (2, 3, K, E, 8))
    integers = [jnp.asarray(x, jnp.int32) for x in ([7, 2, 3], [4, 1, 0], [0, 0, 0], [2, 0, 3], [0, 0, 0])]
    chunk = GivenChunk(jnp.zeros((3, 8), jnp.int32), *integers)
    found = append_chunk(keys, Keys(k, k.swapaxes(3, 4)), chunk)
    expected = np.zeros((2, 3, N))
    expected[0, 2] = 7, 3, 4, 5, 6  # tokens 4 to 10 of the completion, of which slot i % 5 has the last five
    expected[0, 0, 1:3] = 1, 2
    expected[1] = 10 * expected[0]
    np.testing.assert_array_equal(found.k, np.broadcast_to(expected[:, :, None, None], found.k.shape))
    np.testing.assert_array_equal(found.v, np.swapaxes(found.k, 3, 4))
