"""Matmuls of activations and cotangents with frozen E4M3 weights, in FP8 on devices that have such matmuls.

With a scale s_x per row of x, its largest magnitude / 448, and the weight's scale s_w per output channel,
`x @ w` is `(round(x / s_x) @ codes) * s_x * s_w`: a product of E4M3 numbers with the scales applied to its
result. Emulation accumulates in float32; a device as its FP8 matmuls do, of which Hopper's keep about 14 bits
of a sum (github.com/deepseek-ai/DeepGEMM/issues/50).

The gradient by x is computed as if x had not been rounded (a straight-through estimate). There s_w is along
the contracted axis, so `g * s_w` is rounded, to GRADIENT with a scale per row. Both roundings are half to
even. Micikevicius et al. 2022 (arXiv:2209.05433) define the formats.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.distributed.devices import has_fp8_matmuls
from jaxft.nn.contractions import accumulation_dtype
from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import E4M3, e4m3

# Of cotangents. A scale per row makes E5M2's range unnecessary, and it rounds half as finely as E4M3:
# in LoRA SFT of SmolLM2-135M, cotangents in E5M2 cost 0.013 nats of held-out loss (scripts/bench/README.md).
GRADIENT = E4M3
SMALLEST = 2.0**-100  # of a row: a row of zeros has a finite inverse scale


def _on_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and has_fp8_matmuls(mesh.abstract_device)


def is_scaled_by_channel(w: QTensor) -> bool:
    """Whether a weight has E4M3 numbers with a scale per output channel."""
    return w.kind == "fp8" and w.block is None


def multiplies_in_fp8(w: Any) -> bool:
    """Whether matmuls with a weight run in FP8, or emulate it, on the devices of the ambient mesh.

    Weights with a scale per block of inputs never do: scales along the contracted axis cannot be applied to
    the result.
    """
    if not isinstance(w, QTensor) or not is_scaled_by_channel(w):
        return False
    return _on_device() if w.fp8_matmul is None else w.fp8_matmul


def forward(x: Float[Array, "*N I"], w: QTensor) -> Float[Array, "*N O"]:
    """Return `x @ w` in float32 or wider, with the rows of x rounded to E4M3."""
    rounded, scale = round_rows(x, E4M3)
    return _product(rounded, w, 0, x.dtype) * scale * _channel_scales(w, scale)


def input_gradient(g: Float[Array, "*N O"], w: QTensor) -> Float[Array, "*N I"]:
    """Return `g @ w^T` in float32 or wider, with the rows of `g * scale of w` rounded to GRADIENT."""
    wide = g.astype(accumulation_dtype(g.dtype))
    rounded, scale = round_rows(wide * _channel_scales(w, wide), GRADIENT)
    return _product(rounded, w, 1, g.dtype) * scale


def _channel_scales(w: QTensor, like: Array) -> Array:
    """Return w's scales [1, O] with the rank and dtype of another array."""
    return w.scale.reshape(*(1,) * (like.ndim - 1), w.scale.shape[-1]).astype(like.dtype)


def round_rows(x: Float[Array, "*N I"], dtype: DTypeLike) -> tuple[Array, Float[Array, "*N 1"]]:
    """Return x divided by a scale per row and rounded to an FP8 dtype, and the scales in float32 or wider.

    A row's largest magnitude becomes the largest number of the dtype. Rows with NaN or infinity become NaN.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    largest = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), SMALLEST)
    limit = float(jnp.finfo(dtype).max)
    return (x * (limit / largest)).astype(dtype), largest / limit


def _product(rounded: Array, w: QTensor, contracted: int, dtype: DTypeLike) -> Array:
    """Contract the last axis of FP8 numbers with an axis of w's codes, in float32 or wider.

    dtype: of the activations. With bfloat16 activations the product is bfloat16 too, which halves its memory
    traffic and, where the contracted axis is sharded, the bytes of its reduction; float16 has too small a
    range. Emulation multiplies the same numbers in bfloat16 or wider, which represents them exactly.
    """
    wide, kept = accumulation_dtype(dtype), jnp.dtype(dtype)
    kept = kept if kept == jnp.bfloat16 else wide
    dims = (((rounded.ndim - 1,), (contracted,)), ((), ()))
    if _on_device():
        # FP8 matmuls want the contracted axis last: transpose one layer at a time, not the stack of all
        codes = with_layout_constraint(w.codes, Layout((0, 1)))
        return jax.lax.dot_general(rounded, e4m3(codes), dims, preferred_element_type=kept).astype(wide)
    exact = jnp.bfloat16 if kept.itemsize == 2 else wide
    # as in matmul.expand_after: not all weights at once
    codes, _ = jax.lax.optimization_barrier((w.codes, rounded))
    product = jax.lax.dot_general(
        rounded.astype(exact), e4m3(codes).astype(exact), dims, preferred_element_type=wide
    )
    return product.astype(kept).astype(wide)
