"""Matmuls with plain, quantised and LoRA-adapted weights, and their backward passes.

Contractions accumulate in float32 or wider, in the way that is fastest on the device. XLA's CPU compiler
converts 16-bit floats to float32 when they are stacked or concatenated, so they are stacked as raw bits.
Frozen E4M3 weights are multiplied in FP8 on devices that have FP8 matmuls. A tap on a weight collects the
inputs of its matmuls while a layer is traced, so that the layer can return values computed from them.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.distributed import sharding
from jaxft.distributed.devices import cpu_has_bfloat16_matmuls, has_fp8_matmuls
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapted, output_factors, scale_outputs
from jaxft.nn.adapters.lora_rows import adapters_of_rows
from jaxft.nn.quant import QTensor, dequantize, is_qtensor, shardings_of
from jaxft.nn.quant_formats import E4M3, e4m3
from jaxft.nn.tree import Params, static, struct


def accumulation_dtype(dtype: DTypeLike) -> Any:
    """Return the dtype that contractions of `dtype` accumulate in: float32 or wider."""
    return np.promote_types(dtype, np.float32)  # jax's own raises under strict promotion


MANY_ROWS = 64  # with 32, converting a matrix to float32 takes as long as it saves, and needs memory for it


def wide_dot(x: Array, w: Array, dims: Any) -> Array:
    """jax.lax.dot_general with the result in the accumulation dtype."""
    wide, ((contracted, _), _) = accumulation_dtype(x.dtype), dims
    rows = x.size // math.prod(x.shape[axis] for axis in contracted)

    def product(x, w):
        return jax.lax.dot_general(x, w, dims, preferred_element_type=wide)

    return _widened(product, x, w) if rows >= MANY_ROWS else product(x, w)


def wide_einsum(spec: str, x: Array, y: Array, widen: bool = True) -> Array:
    """jnp.einsum in the accumulation dtype. widen=False: never copy operands to float32 (see _widened)."""
    wide = accumulation_dtype(x.dtype)

    def product(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=wide)

    return _widened(product, x, y) if widen else product(x, y)


def _widened(product: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """Return `product(x, y)`; on a CPU without 16-bit matmuls, convert 16-bit x and y to float32 first.

    The conversion loses no precision: float32 stores the product of two 16-bit floats exactly.
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
    """Concatenate arrays of one dtype, 16-bit floats as raw bits: XLA's CPU compiler would widen them."""
    return from_bits(jnp.concatenate([to_bits(x) for x in parts], axis), parts[0].dtype)


# ---- matmuls with weights of any kind


Weight = Any  # Array | QTensor | Adapted | InputTap; an embedding or head also TokenRows or Replaced


def dot(x: Array, w: Array, contract: tuple[int, int], out: DTypeLike) -> Array:
    """Contract axis contract[0] of x with axis contract[1] of w, accumulated in float32 or wider; return
    dtype `out`.

    With tensor parallelism each device's result is cast to `out` before the sum over devices: with 16-bit
    floats this halves the bytes that they exchange.
    """
    dims = (((contract[0] % x.ndim,), (contract[1] % w.ndim,)), ((), ()))
    if sharding.mesh_has("tensor"):
        return jax.lax.dot_general(x, w, dims, preferred_element_type=out)
    return wide_dot(x, w, dims).astype(out)


def expand(w: Weight, dtype: DTypeLike) -> Array:
    """Return a weight as a plain array in the compute dtype."""
    return (dequantize(w) if isinstance(w, QTensor) else w).astype(dtype)


def expand_after(w: Weight, x: Array) -> Array:
    """Return a weight as a plain array in the dtype of x. It is dequantised only once x has been computed:
    XLA would otherwise dequantise the weights of many layers at once.
    """
    if isinstance(w, QTensor) and w.kind != "bits":
        w, _ = jax.lax.optimization_barrier((w, x))
    return expand(w, x.dtype)


def times(x: Float[Array, "... I"], w: Weight, out: DTypeLike) -> Float[Array, "... O"]:
    """Return `x @ w` in dtype `out`, multiplied in FP8 if multiplies_in_fp8(w)."""
    if multiplies_in_fp8(w):
        rounded, scale = round_rows(x, E4M3)
        return (_product(rounded, w, 0, x.dtype) * scale * _channel_scales(w, scale)).astype(out)
    return dot(x, expand_after(w, x), (-1, 0), out)


def times_transposed(g: Float[Array, "... O"], w: Weight, out: DTypeLike) -> Float[Array, "... I"]:
    """Return `g @ w^T` in dtype `out`, in FP8 if multiplies_in_fp8(w): the gradient of x in `times(x, w)`."""
    if multiplies_in_fp8(w):
        wide = g.astype(accumulation_dtype(g.dtype))
        rounded, scale = round_rows(wide * _channel_scales(w, wide), COTANGENT)
        return (_product(rounded, w, 1, g.dtype) * scale).astype(out)
    return dot(g, expand_after(w, g), (-1, 1), out)


def gather_layer(layer: Any, axes: Any) -> Any:
    """Gather the quantised weights and adapters of a layer over the mesh axes fsdp and context. Plain weights
    are unchanged.

    axes: a tree like `layer` with the names of each weight's axes. Without this XLA's partitioner gathers a
    quantised weight after dequantising it, which moves more bytes; plain weights it gathers well.
    """
    return jax.tree.map(
        gather_weight, layer, axes, is_leaf=lambda x: isinstance(x, QTensor | Adapted | InputTap)
    )


def gather_weight(w: Weight, axes: tuple[str, ...]) -> Weight:
    if isinstance(w, Adapted):
        *lead, ins, outs = sharding.gathered_axes(axes)
        a = sharding.constrain(w.a, *lead, *w.over, ins, "rank")
        b = sharding.constrain(w.b, *lead, *w.over, "rank", outs)
        return replace(w, weight=gather_weight(w.weight, axes), a=a, b=b)
    if isinstance(w, InputTap):
        return replace(w, weight=gather_weight(w.weight, axes))
    if not isinstance(w, QTensor):
        return w
    place = sharding.gathered_sharding(axes, w.shape)
    if place is None:
        return w
    return jax.tree.map(jax.lax.with_sharding_constraint, w, shardings_of(w, place))


def _flat(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def outer(x: Float[Array, "*N I"], g: Float[Array, "*N O"], out: DTypeLike) -> Float[Array, "I O"]:
    """Return `x^T g`, the gradient of a weight: the sum over N of outer products, accumulated as in dot.

    XLA's CPU compiler reaches about half its usual rate in a 16-bit matmul that contracts the first axis of
    both operands. On a CPU either x, or both g and the result, are therefore transposed, whichever has fewer
    elements. The transposition goes by blocks of rows, since XLA would fold a plain one into the matmul.
    """
    lead = tuple(range(x.ndim - 1))
    if sharding.is_multi_device():  # flattening sharded axes would move data between devices
        return wide_dot(x, g, ((lead, lead), ((), ()))).astype(out)

    def plain(x, g):
        return dot(x, g, (0, 0), out)

    def transposed(x, g):
        (rows, ins), outs = x.shape, g.shape[1]
        if rows * ins <= rows * outs + 2 * ins * outs:
            return dot(_transpose(x), g, (1, 0), out)
        return _transpose(dot(_transpose(g), x, (1, 0), out))

    x, g = _flat(x), _flat(g)
    if x.dtype.itemsize != 2 or x.shape[0] % 4 or g.shape[1] % 4:
        return plain(x, g)
    return jax.lax.platform_dependent(x, g, cpu=transposed, default=plain)


def _transpose(x: Float[Array, "N M"]) -> Float[Array, "M N"]:
    rows, columns = x.shape
    block = math.gcd(rows // 2, 64)
    return x.reshape(rows // block, block, columns).transpose(2, 0, 1).reshape(columns, rows)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x: Float[Array, "... I"], w: Weight, transposed: bool = False, wide: bool = False
) -> Float[Array, "... O"]:
    """Return `x @ w` in the dtype of x or, if `wide`, in the dtype of the accumulation: float32 or wider.

    w is [I, O], or [O, I] if `transposed`. A QTensor is dequantised here and again in the backward pass, so
    that no dequantised copy is stored in between; or it is multiplied in FP8 (multiplies_in_fp8), but not if
    `transposed` or `wide`, so that logits keep their precision. In the backward pass the cotangent is cast to
    x's dtype before both matmuls (the fast path of every backend); a weight's gradient is accumulated like
    the result.
    """
    if not (transposed or wide):
        return times(x, w, x.dtype)
    out = accumulation_dtype(x.dtype) if wide else x.dtype
    return dot(x, expand_after(w, x), (-1, 1 if transposed else 0), out)


def _matmul_fwd(x, w, transposed, wide):
    return matmul(x, w, transposed, wide), (x, w)


def _matmul_bwd(transposed, wide, residuals, g):
    x, w = residuals
    g = g.astype(x.dtype)
    if transposed or wide:
        dx = dot(g, expand_after(w, g), (-1, 0 if transposed else 1), x.dtype)
    else:
        dx = times_transposed(g, w, x.dtype)
    if isinstance(w, QTensor):
        return dx, None
    return dx, outer(*((g, x) if transposed else (x, g)), w.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@jax.custom_vjp
def lora_matmul(
    x: Float[Array, "... I"], dropped: Float[Array, "... I"], w: Weight, a: Array, b: Array, scale: Array
):
    """Return `x @ w + scale * (dropped @ a) @ b` (LoRA, Hu et al. 2021, arXiv:2106.09685), computed as one
    matmul `[x, scale dropped a] @ [w; b]` where that is faster.

    dropped: x after dropout. w: [I, O] or a QTensor. scale has no gradient. If w is multiplied in FP8, the
    mesh has tensor parallelism, or x has one token per row ([..., 1, I], in decoding), the matmuls with w and
    with b are separate.
    """
    return _lora_fwd(x, dropped, w, a, b, scale)[0]


def _lora_fwd(x, dropped, w, a, b, scale):
    s = scale.astype(x.dtype)
    xa = _low(dot(dropped, a.astype(x.dtype), (-1, 0), x.dtype) * s)
    in_fp8 = multiplies_in_fp8(w)
    # With few rows, joining w and b would move more than it saves. The two ways round differently, so a
    # decoding step always uses one and a prefill the other, however many prompts there are.
    is_short = x.shape[-2] == 1
    if sharding.mesh_has("tensor") and not in_fp8:  # concatenating sharded arrays would move them
        y = times(x, w, x.dtype) + dot(xa, b.astype(x.dtype), (-1, 0), x.dtype)
    elif in_fp8 or is_short:
        wide = accumulation_dtype(x.dtype)
        y = (times(x, w, wide) + dot(xa, b.astype(x.dtype), (-1, 0), wide)).astype(x.dtype)
    else:
        both = concat_bits([expand_after(w, x), b.astype(x.dtype)], 0)
        y = dot(concat_bits([x, xa], -1), both, (-1, 0), x.dtype)
    return y, (x, dropped, w, a, b, s)


def _lora_bwd(residuals, g):
    x, dropped, w, a, b, s = residuals
    g = g.astype(x.dtype)
    separate = sharding.mesh_has("tensor") or multiplies_in_fp8(w)
    joined = _input_gradients if separate else _input_gradients_joined
    dx, dxa = jax.lax.platform_dependent(g, w, b, cpu=joined, default=_input_gradients)
    dxa = _low(dxa * s)
    xa = _low(dot(dropped, a.astype(x.dtype), (-1, 0), x.dtype) * s)
    db = outer(xa, g, b.dtype)
    da = outer(dropped, dxa, a.dtype)
    dw = None if isinstance(w, QTensor) else outer(x, g, w.dtype)  # dead code where w is frozen
    return dx, dot(dxa, a.astype(x.dtype), (-1, 1), x.dtype), dw, da, db, None


def _low(x: Float[Array, "... R"]) -> Array:
    """Return x with its rank axis unsharded: the axis is so short that sharding it would cost more time."""
    return sharding.constrain(x, *(None,) * (x.ndim - 1), "rank")


def _input_gradients_joined(g, w, b):
    """Return `g w^T` and `g b^T` by one matmul."""
    both = dot(g, concat_bits([expand_after(w, g), b.astype(g.dtype)], 0), (-1, 1), g.dtype)
    return tuple(jnp.split(both, [both.shape[-1] - b.shape[0]], -1))


def _input_gradients(g, w, b):
    """Return `g w^T` and `g b^T` by two matmuls, for devices that run both at full rate: no copies."""
    return times_transposed(g, w, g.dtype), dot(g, b.astype(g.dtype), (-1, 1), g.dtype)


lora_matmul.defvjp(_lora_fwd, _lora_bwd)


def batched_dot(
    x: Float[Array, "K ..."], w: Float[Array, "K ..."], contract: tuple[int, int], out: DTypeLike
) -> Array:
    """Return `dot(x[k], w[k], contract, out)` for each k, stacked along K."""
    dims = (((contract[0] + 1,), (contract[1] + 1,)), ((0,), (0,)))
    return wide_dot(x, w, dims).astype(out)


@jax.custom_vjp
def multi_lora_matmul(
    x: Float[Array, "KB ... I"], dropped: Float[Array, "KB ... I"], w: Weight,
    a: Float[Array, "K I R"], b: Float[Array, "K R O"], scale: Float[Array, " K"],
) -> Float[Array, "KB ... O"]:  # fmt: skip
    """lora_matmul with K adapters: the rows of x are K equal groups, one for each adapter.

    All rows share one matmul with the base weight; the adapters' terms are added in float32 or wider.
    """
    return _loras_fwd(x, dropped, w, a, b, scale)[0]


def group_rows(x: Float[Array, "KB ... I"], count: int) -> Float[Array, "K N I"]:
    """Reshape x, whose rows are `count` = K equal groups, to [K, N, I]; N counts the tokens of a group."""
    return x.reshape(count, x.size // (count * x.shape[-1]), x.shape[-1])


def _loras_fwd(x, dropped, w, a, b, scale):
    wide, s = accumulation_dtype(x.dtype), scale.astype(x.dtype)
    xa = batched_dot(group_rows(dropped, len(a)), a.astype(x.dtype), (1, 0), x.dtype) * s[:, None, None]
    low = batched_dot(xa, b.astype(x.dtype), (1, 0), wide)
    y = times(x, w, wide)
    return (y + low.reshape(y.shape)).astype(x.dtype), (x, dropped, w, a, b, s)


def _loras_bwd(residuals, g):
    x, dropped, w, a, b, s = residuals
    g = g.astype(x.dtype)
    each_g, each_x = group_rows(g, len(a)), group_rows(dropped, len(a))
    dxa = batched_dot(each_g, b.astype(x.dtype), (1, 1), x.dtype) * s[:, None, None]
    xa = batched_dot(each_x, a.astype(x.dtype), (1, 0), x.dtype) * s[:, None, None]
    db = batched_dot(xa, each_g, (0, 0), b.dtype)
    da = batched_dot(each_x, dxa, (0, 0), a.dtype)
    dw = None if isinstance(w, QTensor) else outer(x, g, w.dtype)  # dead code where w is frozen
    ddropped = batched_dot(dxa, a.astype(x.dtype), (1, 1), x.dtype).reshape(x.shape)
    return times_transposed(g, w, x.dtype), ddropped, dw, da, db, None


multi_lora_matmul.defvjp(_loras_fwd, _loras_bwd)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Set elements of x to 0 with probability `rate`, divide others by 1 - rate; return x without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def linear(x: Float[Array, "... I"], w: Weight, key: Array | None = None) -> Float[Array, "... O"]:
    """Return `x @ w` for a plain, quantised or LoRA-adapted weight [I, O].

    key: for dropout of the adapter's input; None for no dropout. An adapted weight (lora.Adapted) may have
    several adapters: if its leaves have an axis over K adapters, the rows of x are K equal groups, one for
    each; if it has `rows` [B], row i of x uses adapter rows[i]. With a `gain` (DoRA in inference) dropout is
    not applied.
    """
    if isinstance(w, InputTap):
        w.tapped.inputs[w.name] = x
        return linear(x, w.weight, key)
    if not isinstance(w, Adapted):
        return matmul(x, w, False, False)
    if w.rows is not None:
        w = adapters_of_rows(w, x.dtype)
    fn = multi_lora_matmul if w.over else lora_matmul
    if w.gain is not None:
        return scale_outputs(fn(x, x, w.weight, w.a, w.b, w.scale), w.gain)
    dropped = dropout(x, w.dropout, key)
    if w.magnitude is None:
        return fn(x, dropped, w.weight, w.a, w.b, w.scale)
    factors = output_factors(w.magnitude, expand_after(w.weight, x), w.a, w.b, w.scale)
    y = scale_outputs(fn(dropped, dropped, w.weight, w.a, w.b, w.scale), factors)
    # as in PEFT, dropout is applied to the input of `(gain - 1) w`, too
    return y if dropped is x else y + matmul(x - dropped, w.weight, False, False)


# Taps


class Tapped:
    """The matmul inputs that the taps on weights (InputTap) collect while a layer is traced."""

    def __init__(self) -> None:
        self.inputs: dict[str, Float[Array, "... I"]] = {}

    def take(self) -> dict[str, Float[Array, "... I"]]:
        """Return the collected inputs by the names of their taps, and clear the collection.

        The inputs are tracers, valid only while the layer is traced. So the function of the layer, or the
        `observe` of a scan over layers, must call this and return the values it computes from them.
        """
        taken, self.inputs = self.inputs, {}
        return taken


@struct
class InputTap:
    """A weight [I, O] with a tap: every matmul with it stores its input in `tapped` under `name`."""

    weight: Any
    name: str = static()
    tapped: Tapped = static()


def with_taps(params: Params, paths: Collection[str]) -> tuple[Params, Tapped]:
    """Put a tap on each weight at `paths`. Return (parameters with taps, the Tapped that collects inputs)."""
    tapped = Tapped()

    def leaf(path: str, w: Any) -> Any:
        return InputTap(w, path, tapped) if path in paths else w

    return tree.map_with_path(leaf, params, is_leaf=is_qtensor), tapped


# ---- FP8
#
# With a scale s_x per row of x, its largest magnitude / 448, and the weight's scale s_w per output channel,
# `x @ w` is `(round(x / s_x) @ codes) * s_x * s_w`: a product of E4M3 numbers with the scales applied to its
# result. Emulation accumulates in float32; a device as its FP8 matmuls do, of which Hopper's keep about 14
# bits of a sum (github.com/deepseek-ai/DeepGEMM/issues/50).
#
# The gradient by x is computed as if x had not been rounded (a straight-through estimate). There s_w is along
# the contracted axis, so `g * s_w` is rounded, to COTANGENT with a scale per row. Both roundings are half to
# even. Micikevicius et al. 2022 (arXiv:2209.05433) define the formats.


# Of cotangents. A scale per row makes E5M2's range unnecessary, and it rounds half as finely as E4M3:
# in LoRA SFT of SmolLM2-135M, cotangents in E5M2 cost 0.013 nats of held-out loss (scripts/bench/README.md).
COTANGENT = E4M3
_SMALLEST_ROW = 2.0**-100  # lower bound of a row's largest magnitude: a row of zeros has a finite scale


def _on_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and has_fp8_matmuls(mesh.abstract_device)


def is_scaled_by_channel(w: QTensor) -> bool:
    """Return whether a weight is stored in fp8 (E4M3) with one scale per output channel."""
    return w.kind == "fp8" and w.block is None


def multiplies_in_fp8(w: Any) -> bool:
    """Return whether a weight is multiplied in FP8, or in emulated FP8, on the devices of the ambient mesh.

    False unless the weight is stored in fp8 with one scale per output channel: scales per block of inputs
    vary along the contracted axis, so they cannot be applied to the result of a matmul.
    """
    if not isinstance(w, QTensor) or not is_scaled_by_channel(w):
        return False
    return _on_device() if w.fp8_matmul is None else w.fp8_matmul


def _channel_scales(w: QTensor, like: Array) -> Array:
    """Return w's scales, one per output channel, as [1, ..., 1, O] with the rank and dtype of `like`."""
    return w.scale.reshape(*(1,) * (like.ndim - 1), w.scale.shape[-1]).astype(like.dtype)


def round_rows(x: Float[Array, "*N I"], dtype: DTypeLike) -> tuple[Array, Float[Array, "*N 1"]]:
    """Return x divided by a scale per row and rounded to an FP8 dtype, and the scales in float32 or wider.

    A row's largest magnitude becomes the largest number of the dtype. A row with NaN or infinity gives NaN
    once it is multiplied by its scale.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    largest = jnp.maximum(jnp.max(jnp.abs(x), -1, keepdims=True), _SMALLEST_ROW)
    limit = float(jnp.finfo(dtype).max)
    return (x * (limit / largest)).astype(dtype), largest / limit


def _product(rounded: Array, w: QTensor, contracted: int, dtype: DTypeLike) -> Array:
    """Return the matmul of FP8 numbers with w's codes, before scales are applied, in float32 or wider.

    rounded: FP8 numbers; their last axis is contracted with axis `contracted` of the codes. dtype: of the
    activations. With bfloat16 activations the matmul's output is rounded to bfloat16, which halves its bytes
    in memory and between devices; float16 has too small a range for this. Devices without FP8 matmuls
    multiply the same numbers in bfloat16 or wider, which represents them exactly.
    """
    wide, kept = accumulation_dtype(dtype), jnp.dtype(dtype)
    kept = kept if kept == jnp.bfloat16 else wide
    dims = (((rounded.ndim - 1,), (contracted,)), ((), ()))
    if _on_device():
        # FP8 matmuls want the contracted axis last: transpose one layer at a time, not the stack of all
        codes = with_layout_constraint(w.codes, Layout((0, 1)))
        return jax.lax.dot_general(rounded, e4m3(codes), dims, preferred_element_type=kept).astype(wide)
    exact = jnp.bfloat16 if kept.itemsize == 2 else wide
    # as in expand_after: not all weights at once
    codes, _ = jax.lax.optimization_barrier((w.codes, rounded))
    product = jax.lax.dot_general(
        rounded.astype(exact), e4m3(codes).astype(exact), dims, preferred_element_type=wide
    )
    return product.astype(kept).astype(wide)
