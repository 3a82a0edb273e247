"""Batch invariance: a row's tokens do not depend on how many other rows are computed with it.

Random keys belong to rows, so only rounding could make a difference: a kernel that adds in another order for
another number of rows, which in bfloat16 now and then swaps a token for one that is about as likely. What
does that on CPUs, measured bit by bit, is avoided here: matmuls of one row, and reductions by YNNPACK.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models.model import Model
from jaxft.tree import Params

FEWEST_ROWS_OF_MATMULS = 2  # XLA multiplies one row by other kernels than several

# XLA's CPU compiler leaves reductions of 4096 elements or more to YNNPACK, which adds in another order than
# its own loops (both in github.com/openxla/xla, xla/backends/cpu). This is the list of what YNNPACK computes.
NO_YNNPACK_REDUCTIONS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


@cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """Return the options for jax's `compile` with which a sum of a row does not depend on the number of rows.

    platform: of the devices, "cpu", "gpu" or "tpu". {} where none is known, or the installed XLA has no such
    option.
    """
    if platform != "cpu":
        return {}
    try:
        jax.jit(jnp.negative).lower(jax.ShapeDtypeStruct((), "float32")).compile(NO_YNNPACK_REDUCTIONS)
    except jax.errors.JaxRuntimeError:
        return {}
    return NO_YNNPACK_REDUCTIONS


def row_logits(model: Model, params: Params, h_RD: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """Return the logits of hidden states of R rows. A single row is multiplied as two that are equal."""
    rows = len(h_RD)
    if rows < FEWEST_ROWS_OF_MATMULS:
        h_RD = jax.lax.optimization_barrier(jnp.repeat(h_RD, FEWEST_ROWS_OF_MATMULS, 0))
    return model.logits(model.head(params), h_RD)[:rows]
