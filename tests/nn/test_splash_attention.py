"""Laws of splash attention for TPUs, interpreted on the CPU, and its programs lowered for TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
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

from jaxft.nn import attention
from jaxft.nn.attention import AttentionNeeds
from jaxft.nn.key_ranges import key_ranges
from jaxft.nn.splash_attention import scaled

TPU = described("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("T", "branched", "softcap"),
    [
        (200, False, 0.8),
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


@pytest.mark.parametrize(
    ("head_dim", "branched", "most"),
    [
        (64, True, 2),
        pytest.param(64, False, 2, marks=pytest.mark.slow),
        # q / sqrt(E) is rounded to bfloat16, which the reference does not do
        pytest.param(128, True, 2.5, marks=pytest.mark.slow),
        pytest.param(80, False, 2.5, marks=pytest.mark.slow),
    ],
)
def test_the_error_of_bfloat16_is_that_of_its_rounding(head_dim, branched, most):
    """The root mean square, of outputs and gradients, relative to that of the reference in bfloat16."""
    rng = np.random.default_rng(11)
    x = arrays(rng, 1, 128, 4, 2, head_dim, jnp.bfloat16)
    segments, branches = packed(rng, 1, 128)
    ranges = key_ranges(segments, branches if branched else None)
    real = segments[:, :, None, None] != 0
    x = (*x[:3], jnp.where(real, x[3], 0))
    with jax.enable_x64(True):
        exact = value_and_gradients(attention.dense, *(a.astype(jnp.float64) for a in x), ranges)
    rounded = value_and_gradients(attention.dense, *x, ranges)
    with jax.numpy_dtype_promotion("standard"):
        found = value_and_gradients(partial(attention.splash, interpret=True), *x, ranges)
    for ours, reference, truth in zip(found, rounded, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        ours, reference, truth = (
            np.where(real, np.asarray(a, np.float64), 0) for a in (ours, reference, truth)
        )
        assert np.square(ours - truth).mean() <= most**2 * np.square(reference - truth).mean()


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
