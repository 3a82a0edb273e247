"""Number formats of quantised weights: blocks of float32 to codes and scales, and back.

Encoding functions accept numpy and jax arrays and return the same bits for both: sums run in a fixed order,
no constant is divided by, and subnormal numbers, which XLA treats as zero, do not occur.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    """Return the 256 values of bitsandbytes' 8-bit dynamic code (Dettmers 2015, arXiv:1511.04561), ascending.

    For each power of ten 10^-6 .. 1 the values are 10^k times the midpoints between equally spaced points
    from 0.1 to 1; each power has twice as many values as the power below it. The points are computed as
    torch.linspace computes them (from both ends, with fused multiply-adds in float32). Unsigned codes have
    twice as many points.
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
    """Return 1 / scale; a finite number where the scale is 0, as in a block of zeros."""
    xp = scale.__array_namespace__()
    return np.float32(1.0) / xp.maximum(scale, np.float32(2.0**-120))


def _largest(x: Array) -> Array:
    xp = x.__array_namespace__()
    return xp.max(xp.abs(x), axis=-2, keepdims=True)


def _above(x: Array, bounds: np.ndarray) -> Array:
    """Return how many of the bounds each element of x exceeds, as uint8."""
    xp = x.__array_namespace__()
    count = xp.zeros_like(x, dtype=np.uint8)
    for bound in bounds:
        count = count + (x > bound).view(np.uint8)
    return count


def scale_largest(x: Float[Array, "*L N block O"]) -> Scales:
    """Return the scale of nf4 and fp4, the largest magnitude of each block; no offset."""
    return _largest(x), None


def nearest_nf4(x: Array, scale: Array, offset: None) -> Array:
    """Return the nf4 code of each element: the index of the level nearest to `x / scale`."""
    return _above(x * _inverse(scale), NF4_BOUNDS)


def nearest_fp4(x: Array, scale: Array, offset: None) -> Array:
    """Return the fp4 code (sign, two exponent bits, fraction bit) of the level nearest to `x / scale`."""
    xp, scaled = x.__array_namespace__(), x * _inverse(scale)
    nth = _above(xp.abs(scaled), FP4_BOUNDS)
    code = nth ^ ((nth & np.uint8(2)) << np.uint8(1))  # ascending 0 .. 7 are the codes 0, 1, 6, 7, 4, 5, 2, 3
    return code | ((scaled < 0).astype(np.uint8) << np.uint8(3))


def scale_int8(x: Float[Array, "*L N block O"]) -> Scales:
    """Return the scale of int8, the largest magnitude of each block / 127; no offset."""
    return _largest(x) * np.float32(1 / 127), None


def nearest_int8(x: Array, scale: Array, offset: None) -> Array:
    """Return the int8 codes: `x / scale` rounded to -127 .. 127."""
    xp = x.__array_namespace__()
    return xp.clip(xp.rint(x * _inverse(scale)), -127, 127).astype(np.int8)


def scale_fp8(x: Float[Array, "*L N block O"]) -> Scales:
    """Return the scale of fp8, the largest magnitude of each block / 448 (E4M3's maximum); no offset."""
    return _largest(x) * (np.float32(1) / E4M3_LARGEST), None


def nearest_fp8(x: Array, scale: Array, offset: None) -> Array:
    """Return the fp8 codes: the bits of `x / scale` rounded to E4M3, half to even."""
    xp = x.__array_namespace__()
    scaled = xp.clip(x * _inverse(scale), -E4M3_LARGEST, E4M3_LARGEST)
    return scaled.astype(E4M3).view(np.uint8)


def scale_int4(x: Float[Array, "*L N block O"]) -> Scales:
    """Return the scale of int4, the largest magnitude of each block / 7 rounded up to bfloat16; no offset."""
    return _rounded_up(_largest(x) * np.float32(1 / 7)), None


def nearest_int4(x: Array, scale: Array, offset: None) -> Array:
    """Return the int4 codes: `x / scale` rounded to -7 .. 7, plus 8."""
    xp = x.__array_namespace__()
    return (xp.clip(xp.rint(x * _inverse(scale)), -7, 7) + np.float32(8)).astype(np.uint8)


def scale_affine4(x: Float[Array, "*L N block O"]) -> Scales:
    """Return the scale and the offset of affine4 for each block, as bfloat16 values in float32.

    offset: the minimum, rounded down. scale: (maximum - offset) / 15, rounded up.
    """
    xp = x.__array_namespace__()
    offset = _rounded_down(xp.min(x, axis=-2, keepdims=True))
    return _rounded_up((xp.max(x, axis=-2, keepdims=True) - offset) * np.float32(1 / 15)), offset


def nearest_affine4(x: Array, scale: Array, offset: Array) -> Array:
    """Return the affine4 codes: `(x - offset) / scale` rounded to 0 .. 15."""
    xp = x.__array_namespace__()
    return xp.clip(xp.rint((x - offset) * _inverse(scale)), 0, 15).astype(np.uint8)


def _rounded_up(x: Array) -> Array:
    """Round non-negative float32 values up to a bfloat16 value; the result is float32."""
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def _rounded_down(x: Array) -> Array:
    """Round float32 values of any sign down to a bfloat16 value; the result is float32."""
    xp = x.__array_namespace__()
    toward_zero = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return xp.where(x < 0, -_rounded_up(xp.abs(x)), toward_zero)


def look_up(codes: Integer[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """Return `table[codes]`; codes must be in range."""
    return jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def by_bits(codes: UInt8[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """Return `table[codes]`: each bit of a code, the highest first, selects a half of the remaining table.

    The last selection is integer arithmetic, not `jnp.where` of two scalars: XLA would make arrays of these
    and move them out of a scan over layers, 16 float32 arrays of a weight's size (compiled for an H100).
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

    On a CPU `look_up` is faster. On other backends `by_bits` dequantises in one kernel, whereas a look-up
    writes the unpacked codes to memory (compiled for an H100).
    """
    return jax.lax.platform_dependent(
        codes, cpu=partial(look_up, table=table), default=partial(by_bits, table=table)
    )


def encode_scales(absmax: Float[Array, "*L N O"]) -> tuple[UInt8[Array, "*L N O"], Float[Array, "*L S"], Any]:
    """Quantise the scales of a weight to 8 bits (bitsandbytes' nested quantisation).

    Subtract their mean, then encode groups of 256 scales by `dynamic_code`, each group with one scale of its
    own. Groups are formed in bitsandbytes' order: all blocks of an output channel, then all blocks of the
    next channel. Returns (codes, group scales, mean).
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
    """Return the mean of non-negative numbers over the last axis, with the same bits in NumPy and XLA.

    NumPy's and XLA's sums differ in the order of additions, so this adds the second half of the numbers to
    the first half until one is left.
    """
    xp, count = x.__array_namespace__(), x.shape[-1]
    half = 1 << max(0, (count - 1).bit_length())
    x = xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, half - count)])
    while half > 1:
        half //= 2
        x = x[..., :half] + x[..., half:]
    return _rounded_alone(x[..., 0] * np.float32(1 / count), x[..., 0])


def _rounded_alone(product: Array, positive: Array) -> Array:
    """Return the float32 array `product` unchanged, but rounded before a sum uses it: XLA's CPU compiler
    would fuse the multiplication and the sum.

    positive: float32 without negative numbers. The result is `product` OR the sign bit of `positive`, which
    is 0. The compiler does not know this, and does not fuse across integer operations.
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
    None for all inputs of an output channel. double: whether scales are quantised too by default, None if
    they cannot be. scale_dtype: the dtype in which scales and offsets are stored. scale(blocks of finite
    float32) -> (scales, offsets or None). nearest(float32 values, scales, offsets) -> codes. decode(codes) ->
    float32 numbers; times the scale plus the offset, they are the weights. code_dtype: of the stored codes.
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

    Weights are stored as these bits, because XLA's CPU compiler would convert E4M3 weights of all layers to a
    wider float at once.
    """
    return jax.lax.bitcast_convert_type(codes, E4M3)


FORMATS: dict[str, Format] = {  # keys: annotations.FormatName
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
    """Split the input axis into blocks; a short last one repeats its last row, which keeps its extremes."""
    xp = x.__array_namespace__()
    *lead, ins, outs = x.shape
    padding = -ins % block
    if padding:
        x = xp.pad(x, [(0, 0)] * len(lead) + [(0, padding), (0, 0)], mode="edge")
    return x.reshape(*lead, (ins + padding) // block, block, outs)


def as_zero_or_normal(x: Any) -> Any:
    """Return x in float32, with magnitudes below SMALLEST set to zero."""
    xp = x.__array_namespace__()
    x = x.astype(np.float32)
    return xp.where(xp.abs(x) < SMALLEST, np.float32(0), x)


def check_range(x: Any) -> None:
    """Raise ValueError if a weight contains NaN, infinity or magnitudes of LARGEST and above; the error shows
    how many, and the position of the first. Inside jit nothing is checked.
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
