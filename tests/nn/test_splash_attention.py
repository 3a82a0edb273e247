"""Laws of splash attention for TPUs, interpreted on the CPU, and its programs lowered for TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from test_attention import abstract_ranges, arrays, assert_close, described, packed, value_and_gradients

from jaxft.nn import attention
from jaxft.nn.attention import AttentionNeeds
from jaxft.nn.key_ranges import key_ranges

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
@pytest.mark.parametrize(("branched", "kernels"), [(False, 3), (True, 5)])
def test_the_kernels_lower_for_tpus_without_repeated_keys_or_a_t_by_t_array(branched, kernels):
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, 64), jnp.bfloat16) for heads in (8, 2, 2, 8)]
    ranges = abstract_ranges(2, 1000, branches=branched)
    with jax.numpy_dtype_promotion("standard"):
        traced = value_and_gradients.trace(attention.splash, *shapes, ranges)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @tpu_custom_call") == kernels
    assert "2x2x1024x64xbf16" in text and "1024x1024" not in text
