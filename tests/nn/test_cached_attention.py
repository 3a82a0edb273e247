"""Attention to a prompt that several completions share, and to each completion's own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.attention import dense
from jaxft.nn.cache import (
    RECENT,
    Cache,
    GivenChunk,
    Keys,
    NextToken,
    PromptKeys,
    Step,
    append,
    append_chunk,
    attend,
    settle,
    store,
)
from jaxft.nn.cached_attention import RowGroups
from jaxft.nn.key_ranges import key_ranges, within_window
from jaxft.nn.layer_attention import AttentionRule

H, K, E, S, N = 4, 2, 8, 7, 5  # heads, key heads, head size, slots of a prompt and of a completion


def completions(rng, dtype, more=0):
    """Two prompts of 7 and 4 tokens with rows 3 and 0, and row 1; row 2 is empty. One is a token ahead.

    Returns q, k, v [T, heads, E] of each live row's text, and how many tokens of it are the completion.
    """
    texts, prompts = {}, [(7, (3, 0)), (4, (1,))]
    for size, rows in prompts:
        shared = [rng.normal(0, 1, (size, heads, E)) for heads in (H, K, K)]
        for row in rows:
            new = (3 if row == 3 else 2) + more
            own = [rng.normal(0, 1, (new, heads, E)) for heads in (H, K, K)]
            texts[row] = [jnp.asarray(np.concatenate(x), dtype) for x in zip(shared, own, strict=True)], new
    return texts


def cached(texts, N):
    """Keys of prompts, rows and recent tokens as a cache stores them, all else 9."""
    prompt_k, prompt_v = np.full((2, K, E, S), 9.0), np.full((2, K, S, E), 9.0)
    visible = np.zeros((2, S), bool)
    own = [(np.full((4, K, E, n), 9.0), np.full((4, K, n, E), 9.0)) for n in (N, min(N, 2 * RECENT))]
    for row, ((_, keys, values), new) in texts.items():
        prompt, size = (1 if row == 1 else 0), len(keys) - new
        prompt_k[prompt, :, :, S - size :] = keys[:size].transpose(1, 2, 0)
        prompt_v[prompt, :, S - size :] = values[:size].swapaxes(0, 1)
        visible[prompt, S - size :] = True
        for k, v in own:
            for i in range(new):
                slot = i % k.shape[3]
                k[row, :, :, slot], v[row, :, slot] = keys[size + i], values[size + i]
    return (Keys(prompt_k, prompt_v), *(Keys(*both) for both in own)), visible


GROUPS = RowGroups(jnp.asarray([[3, 0], [1, 1]], jnp.int32), jnp.asarray([1, 2, 3, 0], jnp.int32))
COUNTS = jnp.asarray([2, 2, 0, 3], jnp.int32)


@pytest.mark.parametrize(
    ("window", "cap", "slots", "more"),
    [(None, None, N, 0), (None, 0.7, 3, 0), (4, 0.7, 64, 40), (2, None, 64, 31), (1, None, 64, 0),
     (None, None, 64, 43), (None, 0.7, 64, 30)],
)  # fmt: skip
def test_cached_attention_is_the_last_row_of_dense(window, cap, slots, more):
    """more: tokens that each completion has in addition, so that blocks of recent tokens settle."""
    rng, rule = np.random.default_rng(7), AttentionRule(window, cap)
    with jax.enable_x64(True):
        texts = completions(rng, jnp.float64, more)
        keys, visible = cached(texts, slots)
        counts = jnp.where(COUNTS > 0, COUNTS + more, 0)
        q = jnp.stack([texts[row][0][0][-1] if row in texts else jnp.zeros((H, E)) for row in range(4)])
        at = NextToken(None, counts, GROUPS)
        of_step = Step(at, jnp.asarray(visible), GROUPS.to_groups(counts))
        found = attend(q[:, None], keys, of_step, rule)[:, 0]
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


def test_recent_tokens_settle_in_the_slots_of_their_rows():
    """Rows of 4, 0 and 9 tokens get 3, 0 and 2 more; those of a window of 5 replace the oldest."""
    rows, recent = (Keys(jnp.zeros((3, K, E, n)), jnp.zeros((3, K, n, E))) for n in (N, 4))
    before, more = jnp.asarray([4, 0, 9], jnp.int32), jnp.asarray([3, 0, 2], jnp.int32)
    for step in range(3):
        k = jnp.full((3, K, E, 1), 1.0 + step)
        counts = before + jnp.minimum(step + 1, more)
        recent = append(
            recent, jnp.where((step < more)[:, None, None, None], k, 2.0), k.swapaxes(2, 3), counts
        )
    (found,) = settle(Cache(PromptKeys((), None), (rows,), (recent,), 10), before, before + more).rows
    expected = np.zeros((3, N))
    expected[0] = 2, 3, 0, 0, 1  # tokens 4, 5 and 6
    expected[2] = 2, 0, 0, 0, 1  # tokens 9 and 10
    np.testing.assert_array_equal(found.k, np.broadcast_to(expected[:, None, None], found.k.shape))


def test_the_last_tokens_of_a_chunk_are_stored_and_rows_beyond_the_last_dropped():
    keys = Keys(jnp.zeros((3, K, E, N)), jnp.zeros((3, K, N, E)))
    numbers = jnp.arange(1, 9, dtype=jnp.float32)
    k = jnp.broadcast_to(numbers, (3, K, E, 8))
    integers = [jnp.asarray(x, jnp.int32) for x in ([7, 2, 3], [4, 1, 0], [0, 0, 0], [2, 0, 3], [0, 0, 0])]
    found = append_chunk(keys, k, k.swapaxes(2, 3), GivenChunk(jnp.zeros((3, 8), jnp.int32), *integers))
    expected = np.zeros((3, N))
    expected[2] = 7, 3, 4, 5, 6  # tokens 4 to 10 of the completion, of which slot i % 5 has the last five
    expected[0, 1:3] = 1, 2
    np.testing.assert_array_equal(found.k, np.broadcast_to(expected[:, None, None], found.k.shape))
    np.testing.assert_array_equal(found.v, np.swapaxes(found.k, 2, 3))
