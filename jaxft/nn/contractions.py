"""Contractions that accumulate in float32 or wider, in the way that is fastest on the device; and 16-bit
floats as raw bits, in which XLA's CPU compiler stacks and concatenates them without widening.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxft.distributed.devices import cpu_has_bfloat16_matmuls


def accumulation_dtype(dtype: DTypeLike) -> Any:
    """Return the dtype that contractions of `dtype` accumulate in: float32 or wider."""
    return np.promote_types(dtype, np.float32)  # jax's own raises under strict promotion


MANY_ROWS = 64  # with 32 rows, converting a matrix takes as long as it saves, and a copy of it in memory


def wide_dot(x: Array, w: Array, dims: Any) -> Array:
    """jax.lax.dot_general with the result in the accumulation dtype."""
    wide, ((contracted, _), _) = accumulation_dtype(x.dtype), dims
    rows = x.size // math.prod(x.shape[axis] for axis in contracted)

    def product(x, w):
        return jax.lax.dot_general(x, w, dims, preferred_element_type=wide)

    return _widened(product, x, w) if rows >= MANY_ROWS else product(x, w)


def wide_einsum(spec: str, x: Array, y: Array, widen: bool = True) -> Array:
    """jnp.einsum with the result in the accumulation dtype. widen=False: for operands that are not to be
    copied in float32.
    """
    wide = accumulation_dtype(x.dtype)

    def product(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=wide)

    return _widened(product, x, y) if widen else product(x, y)


def _widened(product: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """Apply a product to 16-bit floats converted to float32 on a CPU that does not multiply them itself.

    The products of single elements are exact in float32 either way.
    """
    if x.dtype.itemsize != 2 or cpu_has_bfloat16_matmuls():
        return product(x, y)

    def converted(x, y):
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=converted, default=product)


def to_bits(x: Array) -> Array:
    """Return 16-bit floats as uint16, others unchanged: XLA's CPU compiler widens stacked bfloat16 arrays."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: DTypeLike) -> Array:
    """Invert to_bits."""
    return jax.lax.bitcast_convert_type(x, dtype) if jnp.dtype(dtype).itemsize == 2 else x


def concat_bits(parts: Sequence[Array], axis: int) -> Array:
    """Concatenate arrays of one dtype, 16-bit floats as raw bits, which XLA's CPU compiler doesn't widen."""
    return from_bits(jnp.concatenate([to_bits(x) for x in parts], axis), parts[0].dtype)
