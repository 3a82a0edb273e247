"""Batch invariance: a row's tokens do not depend on how many other rows are computed with it.

Random keys belong to rows, so only rounding could make a difference: a kernel that adds in another order for
another number of rows, which in bfloat16 now and then swaps a token for one that is about as likely. On one
CPU device that multiplies bfloat16 itself, equal bits need programs without YNNPACK's reductions
(compiler_options), no matmuls of a single row (row_logits, and engine.slots_for), sums over multiples of 64
slots of keys (nn/cache.py), and blocks of attention that do not depend on how far a prompt is padded
(nn/flash_attention.py). That no other operation depends on the number of rows was measured, and is tested.

In float32 this holds for up to 32 rows in progress: matmuls of 33 or more add in another order. CPUs that
do not multiply bfloat16 have such a limit at 64 rows in bfloat16 (products.MANY_ROWS). Accelerators and
meshes have no such promise.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models.model import Model
from jaxft.tree import Params

MIN_MATMUL_ROWS = 2  # XLA multiplies one row by other kernels than several

# XLA's CPU compiler leaves reductions of 4096 elements or more to YNNPACK, which adds in another order than
# its own loops (both in github.com/openxla/xla, xla/backends/cpu). With this option it runs only matmuls.
NO_YNNPACK_REDUCTIONS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


@cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """Return the options for jax's `compile` with which a sum of a row does not depend on the number of rows.

    platform: of the devices, "cpu", "gpu" or "tpu". {} where none is known, or if the installed XLA has no
    such option: then sums may be rounded differently with other numbers of rows.
    """
    if platform != "cpu":
        return {}
    try:
        jax.jit(jnp.negative).lower(jax.ShapeDtypeStruct((), "float32")).compile(NO_YNNPACK_REDUCTIONS)
    except jax.errors.JaxRuntimeError:
        return {}
    return NO_YNNPACK_REDUCTIONS


def row_logits(model: Model, params: Params, h_RD: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """Return the logits of hidden states of R rows. A single row is duplicated."""
    rows = len(h_RD)
    if rows < MIN_MATMUL_ROWS:
        h_RD = jax.lax.optimization_barrier(jnp.repeat(h_RD, MIN_MATMUL_ROWS, 0))
    return model.logits(model.head(params), h_RD)[:rows]
