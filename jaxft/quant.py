"""Weights in a packed form. A QTensor is a leaf like any other: scan, vmap and sharding may slice it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.tree import static, struct


@struct
class QTensor:
    """A frozen weight that is expanded where it is used.

    kind "bits": the 16-bit float kept as raw uint16. It costs nothing to expand, and it keeps XLA's CPU compiler from
    converting a whole scan-stacked bfloat16 weight to float32 (measured: 3.8 GB for SmolLM2-135M).
    """

    codes: jax.Array
    kind: str = static()
    dtype: Any = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for, derived from the codes so that slices stay right."""
        return self.codes.shape


def is_qtensor(x: Any) -> bool:
    """For tree functions: stop at a QTensor."""
    return isinstance(x, QTensor)


def quantize(weight: jax.Array, kind: str) -> QTensor:
    """Pack a weight. Raises ValueError for a kind that isn't known or doesn't hold the dtype exactly."""
    if kind != "bits":
        raise ValueError(f"quantisation {kind!r} is not known; use 'bits'")
    if not jnp.issubdtype(weight.dtype, jnp.floating) or jnp.dtype(weight.dtype).itemsize != 2:
        raise ValueError(f"kind 'bits' holds 16-bit floats, found {weight.dtype}; cast the weight first")
    return QTensor(jax.lax.bitcast_convert_type(weight, jnp.uint16), "bits", jnp.dtype(weight.dtype))


def dequantize(q: QTensor) -> jax.Array:
    """The weight in its own dtype."""
    return jax.lax.bitcast_convert_type(q.codes, q.dtype)
