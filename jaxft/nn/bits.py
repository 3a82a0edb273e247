"""16-bit floats as raw bits, in which XLA's CPU compiler stacks and concatenates them without widening."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def to_bits(x: Array) -> Array:
    """Return 16-bit floats as uint16, others unchanged: XLA's CPU compiler widens stacked bfloat16 arrays."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Array, dtype: DTypeLike) -> Array:
    """Invert to_bits."""
    return jax.lax.bitcast_convert_type(x, dtype) if jnp.dtype(dtype).itemsize == 2 else x


def concat_bits(parts: Sequence[Array], axis: int) -> Array:
    """Concatenate arrays of one dtype, 16-bit floats as raw bits, which XLA's CPU compiler doesn't widen."""
    return from_bits(jnp.concatenate([to_bits(x) for x in parts], axis), parts[0].dtype)
