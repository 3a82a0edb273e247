"""16-bit attention over any layout of rows: at most twice the rounding of the reference implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import arrays, value_and_gradients
from test_key_ranges import SEGMENTS, row_of

from jaxft.nn.attention import attention
from jaxft.nn.attention.flash_attention import key_ranges, within_window

T = 60
FLASH = partial(attention.flash, block=16)
CUDNN = partial(attention.cudnn, implementation="xla")  # its arguments, by XLA
EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True)


def relative_to_the_reference(kernel, dtype, ranges, real):
    """The root mean square errors of outputs and gradients of real tokens, divided by the reference's."""
    real = np.asarray(real)[:, :, None, None]
    x = arrays(np.random.default_rng(0), 2, T, 4, 2, 16, dtype)
    x = (*x[:3], jnp.where(real, x[3], 0))
    with jax.enable_x64(True):
        exact = value_and_gradients(attention.dense, *(a.astype(jnp.float64) for a in x), ranges)
    rounded = value_and_gradients(attention.dense, *x, ranges)
    with jax.numpy_dtype_promotion("standard"):
        found = value_and_gradients(kernel, *x, ranges)
    out = []
    for ours, reference, truth in zip(found, rounded, exact, strict=True):
        assert ours.dtype == dtype
        ours, reference, truth = (
            np.where(real, np.asarray(a, np.float64), 0) for a in (ours, reference, truth)
        )
        errors = (np.sqrt(np.square(a - truth).mean()) for a in (ours, reference))
        floor = 1e-6 * max(1.0, np.abs(truth).max())  # of float32, which accumulates both
        out.append(next(errors) / (next(errors) + floor))
    return out


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@EXAMPLES
@given(SEGMENTS, st.integers(8, 60))
def test_blockwise_attention_of_any_layout_and_window(dtype, parts, window):
    """Next to a row of one segment: where all queries see two or three keys, gradients of queries and keys
    are small differences of numbers that are rounded to 16 bits.
    """
    segments, branches, _ = row_of(parts, T)
    rows = [jnp.asarray([x, [other] * T], jnp.int32) for x, other in ((segments, 1), (branches, 0))]
    ranges = within_window(key_ranges(*rows), jnp.int32(window))
    assert max(relative_to_the_reference(FLASH, dtype, ranges, rows[0] != 0)) <= 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@EXAMPLES
@given(st.integers(1, T), st.integers(0, T))
def test_the_form_of_cudnn_for_rows_of_any_length(dtype, first, second):
    segments = jnp.asarray(np.arange(T)[None] < np.array([[first], [second]]), jnp.int32)
    assert max(relative_to_the_reference(CUDNN, dtype, key_ranges(segments), segments != 0)) <= 2
