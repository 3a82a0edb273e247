"""Number formats of quantised weights: blocks of float32 to codes and scales, and back.

Encoding functions accept numpy and jax arrays and return the same bits for both: sums run in a fixed order,
no constant is divided by, and subnormal numbers, which XLA treats as zero, do not occur.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

from jaxft.distributed.threads import map_in_threads

Scales = tuple[Any, Any]  # float32 scales [..., N, 1, O], offsets alike or None

# Smaller magnitudes become zero, larger ones are an error.
SMALLEST, LARGEST = np.float32(2.0**-80), np.float32(2.0**80)
GROUP = 256  # quantised scales that share a scale

# bitsandbytes' tables (Dettmers et al. 2023, arXiv:2305.14314). The levels of NF4 are quantiles of the normal
# distribution.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
     1.0], np.float32,
)  # fmt: skip
FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12.0)
FP4 = np.concatenate([FP4, 0 - FP4])  # by the lower three bits, then the sign
NF4_BOUNDS = (NF4[:-1] + NF4[1:]) * np.float32(0.5)
FP4_BOUNDS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)  # its kernels'


def dynamic_code(signed: bool = True) -> Float[np.ndarray, "256"]:
    """Return bitsandbytes' 8-bit dynamic code (Dettmers 2015, arXiv:1511.04561), ascending.

    Each power of ten 10^-6 .. 1 has twice as many values as the one below it: the means of neighbours among
    equally spaced points from 0.1 to 1, which torch.linspace computes from both ends with fused multiply-adds
    in float32. Without a sign there is one bit more.
    """
    low, values = np.float32(0.1), [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        step = np.float64((np.float32(1) - low) / np.float32(count))
        up = np.arange(count + 1)
        points = np.where(up <= (count + 1) // 2 - 1, low + step * up, 1.0 - step * (count - up)).astype(
            np.float32
        )
        means = np.float32(10.0 ** (i - 6)) * ((points[:-1] + points[1:]) * np.float32(0.5))
        values += [*means, *(-means if signed else ())]
    return np.sort(np.array(values, np.float32))


E4M3 = jnp.float8_e4m3fn  # of fp8: a sign, four exponent bits, three fraction bits; no infinity
E4M3_LARGEST = np.float32(jnp.finfo(E4M3).max)  # 448

DYNAMIC = dynamic_code()
DYNAMIC_BOUNDS = (DYNAMIC[:-1] + DYNAMIC[1:]) * np.float32(0.5)


def _inverse(scale: Array) -> Array:
    """Return 1 / scale, finite where a block is all zeros."""
    xp = scale.__array_namespace__()
    return np.float32(1.0) / xp.maximum(scale, np.float32(2.0**-120))


def _largest(x: Array) -> Array:
    xp = x.__array_namespace__()
    return xp.max(xp.abs(x), axis=-2, keepdims=True)


def _above(x: Array, bounds: np.ndarray) -> Array:
    """Count the bounds that x is above, as uint8."""
    xp = x.__array_namespace__()
    count = xp.zeros_like(x, dtype=np.uint8)
    for bound in bounds:
        count = count + (x > bound).view(np.uint8)
    return count


def scale_largest(x: Float[Array, "*L N block O"]) -> Scales:
    """Scale of nf4 and fp4: the largest magnitude of the block."""
    return _largest(x), None


def nearest_nf4(x: Array, scale: Array, offset: None) -> Array:
    """Code of the nearest NF4 level times the scale."""
    return _above(x * _inverse(scale), NF4_BOUNDS)


def nearest_fp4(x: Array, scale: Array, offset: None) -> Array:
    """Code of the nearest FP4 level (a sign, two exponent bits, one fraction bit) times the scale."""
    xp, scaled = x.__array_namespace__(), x * _inverse(scale)
    nth = _above(xp.abs(scaled), FP4_BOUNDS)
    code = nth ^ ((nth & np.uint8(2)) << np.uint8(1))  # ascending 0 .. 7 are the codes 0, 1, 6, 7, 4, 5, 2, 3
    return code | ((scaled < 0).astype(np.uint8) << np.uint8(3))


def scale_int8(x: Float[Array, "*L N block O"]) -> Scales:
    """Scale of int8: the largest magnitude / 127."""
    return _largest(x) * np.float32(1 / 127), None


def nearest_int8(x: Array, scale: Array, offset: None) -> Array:
    """Code of int8: `x / scale` rounded to -127 .. 127."""
    xp = x.__array_namespace__()
    return xp.clip(xp.rint(x * _inverse(scale)), -127, 127).astype(np.int8)


def scale_fp8(x: Float[Array, "*L N block O"]) -> Scales:
    """Scale of fp8: the largest magnitude / 448, which becomes the largest number of E4M3."""
    return _largest(x) * (np.float32(1) / E4M3_LARGEST), None


def nearest_fp8(x: Array, scale: Array, offset: None) -> Array:
    """Code of fp8: the bits of `x / scale` rounded to E4M3, half to even."""
    xp = x.__array_namespace__()
    scaled = xp.clip(x * _inverse(scale), -E4M3_LARGEST, E4M3_LARGEST)
    return scaled.astype(E4M3).view(np.uint8)


def scale_int4(x: Float[Array, "*L N block O"]) -> Scales:
    """Scale of int4: the largest magnitude / 7, rounded up to bfloat16."""
    return _rounded_up(_largest(x) * np.float32(1 / 7)), None


def nearest_int4(x: Array, scale: Array, offset: None) -> Array:
    """Code of int4: `x / scale` rounded to -7 .. 7, plus 8."""
    xp = x.__array_namespace__()
    return (xp.clip(xp.rint(x * _inverse(scale)), -7, 7) + np.float32(8)).astype(np.uint8)


def scale_affine4(x: Float[Array, "*L N block O"]) -> Scales:
    """Scale and offset of affine4: (max - offset) / 15 rounded up, the minimum rounded down, in bfloat16."""
    xp = x.__array_namespace__()
    offset = _rounded_down(xp.min(x, axis=-2, keepdims=True))
    return _rounded_up((xp.max(x, axis=-2, keepdims=True) - offset) * np.float32(1 / 15)), offset


def nearest_affine4(x: Array, scale: Array, offset: Array) -> Array:
    """Code of affine4: `(x - offset) / scale` rounded to 0 .. 15."""
    xp = x.__array_namespace__()
    return xp.clip(xp.rint((x - offset) * _inverse(scale)), 0, 15).astype(np.uint8)


def _rounded_up(x: Array) -> Array:
    """Round non-negative float32 values up to bfloat16, in float32."""
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def _rounded_down(x: Array) -> Array:
    """Round float32 values of any sign down to bfloat16, in float32."""
    xp = x.__array_namespace__()
    toward_zero = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return xp.where(x < 0, -_rounded_up(xp.abs(x)), toward_zero)


def look_up(codes: Integer[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """Return `table[codes]`; codes must be in range."""
    return jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def by_bits(codes: UInt8[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """Return `table[codes]` by selecting halves of the table, bit by bit.

    The last selection uses integer operations with scalars: `jnp.where` of two scalars makes arrays of them,
    which XLA hoists out of a scan and stores, 16 of a weight's size in float32 (compiled for an H100).
    """
    levels = table.view(np.int32)
    lowest = -(codes & np.uint8(1)).astype(jnp.int32)  # all bits or none

    def half(start: int, size: int) -> Any:
        if size == 2:
            low, high = levels[start], levels[start + 1]
            return (lowest & np.int32(low ^ high)) ^ low
        upper = (codes & np.uint8(size // 2)) != 0
        return jnp.where(upper, half(start + size // 2, size // 2), half(start, size // 2))

    return jax.lax.bitcast_convert_type(half(0, len(table)), jnp.float32)


def level(codes: UInt8[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """Return `table[codes]` for a table of 16 levels.

    A look-up is faster on a CPU. On other backends selections dequantise in one kernel, whereas a look-up
    writes the unpacked codes to memory (compiled for an H100).
    """
    return jax.lax.platform_dependent(
        codes, cpu=partial(look_up, table=table), default=partial(by_bits, table=table)
    )


def encode_scales(absmax: Float[Array, "*L N O"]) -> tuple[UInt8[Array, "*L N O"], Float[Array, "*L S"], Any]:
    """Quantise scales: subtract their mean, then the dynamic code in groups of 256 with a scale each.

    This is bitsandbytes' nested quantisation. Groups follow its order: all blocks of an output channel, then
    all blocks of the next. Returns (codes, group scales, mean).
    """
    xp = absmax.__array_namespace__()
    flat = absmax.swapaxes(-1, -2).reshape(*absmax.shape[:-2], -1)
    mean = _mean(flat)
    centred = flat - mean[..., None]
    padding = [(0, 0)] * (centred.ndim - 1) + [(0, -centred.shape[-1] % GROUP)]
    groups = xp.pad(centred, padding).reshape(*centred.shape[:-1], -1, GROUP)
    outer = xp.max(xp.abs(groups), axis=-1)
    codes = xp.searchsorted(DYNAMIC_BOUNDS, (groups * _inverse(outer)[..., None]).reshape(-1)).astype(
        np.uint8
    )
    codes = codes.reshape(*groups.shape[:-2], -1)[..., : flat.shape[-1]]
    return codes.reshape(absmax.swapaxes(-1, -2).shape).swapaxes(-1, -2), outer, mean


def _mean(x: Float[Array, "*L M"]) -> Any:
    """Mean of non-negative numbers over the last axis, by halves: numpy and XLA sum in other orders."""
    xp, count = x.__array_namespace__(), x.shape[-1]
    half = 1 << max(0, (count - 1).bit_length())
    x = xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, half - count)])
    while half > 1:
        half //= 2
        x = x[..., :half] + x[..., half:]
    return _rounded_alone(x[..., 0] * np.float32(1 / count), x[..., 0])


def _rounded_alone(product: Array, positive: Array) -> Array:
    """Return the float32 product, rounded before any following sum: XLA's CPU compiler would fuse the two.

    It cannot look through integer operations, and doesn't know that the sign bit of `positive` is 0.
    """
    return (product.view(np.uint32) | positive.view(np.uint32) & np.uint32(1 << 31)).view(np.float32)


def decode_scales(
    codes: UInt8[Array, "*L N O"], outer: Float[Array, "*L S"], mean: Any
) -> Float[Array, "*L N O"]:
    """Invert encode_scales."""
    blocks, outs = codes.shape[-2:]
    # a repeat and a transpose of `outer` take XLA's CPU compiler twice as long
    along = jax.lax.broadcasted_iota(jnp.int32, (blocks, outs), 1) * jnp.int32(blocks)
    group = (along + jax.lax.broadcasted_iota(jnp.int32, (blocks, outs), 0)) // jnp.int32(GROUP)
    each = jnp.asarray(outer).at[..., group].get(mode="promise_in_bounds")
    return _rounded_alone(look_up(codes, DYNAMIC) * each, each) + mean[..., None, None]


@dataclass(frozen=True)
class Format:
    """A number format of quantised weights.

    bits: bits of a code; two 4-bit codes share a byte. block: default number of inputs that share a scale,
    None for all of a channel. double: whether scales are quantised too by default, None if they cannot be.
    scale_dtype: stores scales and offsets exactly. scale: blocks of finite float32 -> (scales, offsets).
    nearest: (float32 values, scales, offsets) -> codes. decode: codes -> float32 multiples of the scale.
    code_dtype: dtype of the stored codes.
    """

    bits: int
    block: int | None
    double: bool | None
    scale_dtype: Any
    scale: Callable[[Any], Scales]
    nearest: Callable[[Any, Any, Any], Any]
    decode: Callable[[Array], Array]
    code_dtype: Any = np.uint8


def _as_float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


def e4m3(codes: UInt8[Array, "..."]) -> Array:
    """Return the E4M3 numbers whose bits are `codes`.

    Stored as E4M3, XLA's CPU compiler would convert the stacked layers to a wider float at once.
    """
    return jax.lax.bitcast_convert_type(codes, E4M3)


FormatName = Literal["int8", "fp8", "int4", "nf4", "fp4", "affine4"]
FORMATS: dict[str, Format] = {
    "int8": Format(8, None, None, np.float32, scale_int8, nearest_int8, _as_float, np.int8),
    "fp8": Format(8, None, None, np.float32, scale_fp8, nearest_fp8, lambda codes: _as_float(e4m3(codes))),
    "int4": Format(
        4, 64, None, jnp.bfloat16, scale_int4, nearest_int4, lambda codes: _as_float(codes) - jnp.float32(8)
    ),
    "nf4": Format(4, 64, True, np.float32, scale_largest, nearest_nf4, lambda codes: level(codes, NF4)),
    "fp4": Format(4, 64, True, np.float32, scale_largest, nearest_fp4, lambda codes: level(codes, FP4)),
    "affine4": Format(4, 64, None, jnp.bfloat16, scale_affine4, nearest_affine4, _as_float),
}


def pack(codes: UInt8[Array, "*L I O"]) -> UInt8[Array, "*L I2 O"]:
    """Pack two 4-bit codes into a byte along the input axis, the first in the high bits."""
    return codes[..., 0::2, :] << np.uint8(4) | codes[..., 1::2, :]


def unpack(packed: UInt8[Array, "*L I2 O"]) -> UInt8[Array, "*L I O"]:
    """Invert pack."""
    *lead, pairs, outs = packed.shape
    return jnp.stack([packed >> jnp.uint8(4), packed & jnp.uint8(15)], -2).reshape(*lead, 2 * pairs, outs)


def to_blocks(x: Float[Any, "*L I O"], block: int) -> Float[Any, "*L N block O"]:
    """Split the input axis into blocks; a short last block is padded with its last row, which changes no
    extreme.
    """
    xp = x.__array_namespace__()
    *lead, ins, outs = x.shape
    padding = -ins % block
    if padding:
        x = xp.pad(x, [(0, 0)] * len(lead) + [(0, padding), (0, 0)], mode="edge")
    return x.reshape(*lead, (ins + padding) // block, block, outs)


def repeat_blocks(scale: Float[Array, "*L N O"], block: int, ins: int) -> Float[Array, "*L I O"]:
    """Repeat the number of each block for its inputs."""
    *lead, blocks, outs = scale.shape
    wide = jnp.broadcast_to(scale[..., None, :], (*lead, blocks, block, outs)).reshape(
        *lead, blocks * block, outs
    )
    return wide[..., :ins, :]


def as_zero_or_normal(x: Any) -> Any:
    """Return float32 with magnitudes below SMALLEST set to zero."""
    xp = x.__array_namespace__()
    x = x.astype(np.float32)
    return xp.where(xp.abs(x) < SMALLEST, np.float32(0), x)


def check_range(x: Any) -> None:
    """Raise ValueError for NaN, infinity and magnitudes from LARGEST up, with their number and the first
    position.
    """
    if isinstance(x, jax.core.Tracer):  # no values yet
        return
    host = np.asarray(x)

    def in_range(part: np.ndarray) -> bool:
        return bool((np.abs(part.astype(np.float32)) < LARGEST).all())

    if not all(map_in_threads(in_range, np.array_split(host, max(1, host.size >> 18), -1))):
        wrong = ~(np.abs(host.astype(np.float32)) < LARGEST)
        first = tuple(int(i[0]) for i in np.nonzero(wrong))
        where = f"the first {float(host[first])} at {first}"
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.size} values are not finite or too large, {where}; correct the "
            "weight, or set quant=none"
        )
