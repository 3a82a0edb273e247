"""Number formats of packed weights: blocks of float32 to codes and scales, and back.

What encodes takes numpy and jax arrays and gives the same bits for both: sums in a fixed order, no division by a constant,
and nothing that is subnormal, which XLA takes for zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

Scales = tuple[Any, Any]  # float32 scales [..., N, 1, O], offsets alike or None

SMALLEST, LARGEST = (
    np.float32(2.0**-80),
    np.float32(2.0**80),
)  # smaller magnitudes are zero, larger ones are refused
GROUP = 256  # scales that share a scale of their own where they are quantised too

# bitsandbytes' tables (Dettmers et al. 2023, arXiv:2305.14314): NF4's levels are quantiles of the normal distribution.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(
    12.0
)  # by the lower three bits
FP4 = np.concatenate([FP4, 0 - FP4])
NF4_BOUNDS = (NF4[:-1] + NF4[1:]) * np.float32(0.5)
FP4_BOUNDS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)  # its kernels'


def dynamic_code(signed: bool = True) -> Float[np.ndarray, "256"]:
    """bitsandbytes' 8-bit dynamic code (Dettmers 2015, arXiv:1511.04561), ascending. Unsigned, it has a bit more.

    For each power of ten 10^-6 .. 1 twice as many values as for the one below it: the means of neighbours among equally
    spaced points from 0.1 to 1, which torch.linspace makes from both ends with fused multiply-adds in float32.
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


DYNAMIC = dynamic_code()
DYNAMIC_BOUNDS = (DYNAMIC[:-1] + DYNAMIC[1:]) * np.float32(0.5)


def _inverse(scale: Array) -> Array:
    """1 / scale; where a block has no extent any number will do."""
    xp = scale.__array_namespace__()
    return np.float32(1.0) / xp.maximum(scale, np.float32(2.0**-120))


def _largest(x: Array) -> Array:
    xp = x.__array_namespace__()
    return xp.max(xp.abs(x), axis=-2, keepdims=True)


def _above(x: Array, bounds: np.ndarray) -> Array:
    """How many of the bounds x is above, as uint8."""
    xp = x.__array_namespace__()
    found = xp.zeros_like(x, dtype=np.uint8)
    for bound in bounds:
        found = found + (x > bound).view(np.uint8)
    return found


def scale_largest(x: Float[Array, "*L N block O"]) -> Scales:
    """nf4's and fp4's scale: the largest magnitude of the block."""
    return _largest(x), None


def nearest_nf4(x: Array, scale: Array, offset: None) -> Array:
    """The nearest of NF4's levels times the scale."""
    return _above(x * _inverse(scale), NF4_BOUNDS)


def nearest_fp4(x: Array, scale: Array, offset: None) -> Array:
    """The nearest of FP4's levels (a sign, two bits of exponent, one of fraction) times the scale."""
    xp, scaled = x.__array_namespace__(), x * _inverse(scale)
    nth = _above(xp.abs(scaled), FP4_BOUNDS)
    code = nth ^ ((nth & np.uint8(2)) << np.uint8(1))  # ascending 0 .. 7 are the codes 0, 1, 6, 7, 4, 5, 2, 3
    return code | ((scaled < 0).astype(np.uint8) << np.uint8(3))


def scale_int8(x: Float[Array, "*L N block O"]) -> Scales:
    """The largest magnitude / 127."""
    return _largest(x) * np.float32(1 / 127), None


def nearest_int8(x: Array, scale: Array, offset: None) -> Array:
    """`x / scale` rounded to -127 .. 127."""
    xp = x.__array_namespace__()
    return xp.clip(xp.rint(x * _inverse(scale)), -127, 127).astype(np.int8)


def scale_int4(x: Float[Array, "*L N block O"]) -> Scales:
    """The largest magnitude / 7, rounded up to bfloat16."""
    return _rounded_up(_largest(x) * np.float32(1 / 7)), None


def nearest_int4(x: Array, scale: Array, offset: None) -> Array:
    """`x / scale` rounded to -7 .. 7, stored plus 8."""
    xp = x.__array_namespace__()
    return (xp.clip(xp.rint(x * _inverse(scale)), -7, 7) + np.float32(8)).astype(np.uint8)


def scale_affine4(x: Float[Array, "*L N block O"]) -> Scales:
    """The offset is the least value, rounded down to bfloat16, the scale a fifteenth of what is above it, rounded up."""
    xp = x.__array_namespace__()
    offset = _rounded_down(xp.min(x, axis=-2, keepdims=True))
    return _rounded_up((xp.max(x, axis=-2, keepdims=True) - offset) * np.float32(1 / 15)), offset


def nearest_affine4(x: Array, scale: Array, offset: Array) -> Array:
    """`(x - offset) / scale` rounded to 0 .. 15."""
    xp = x.__array_namespace__()
    return xp.clip(xp.rint((x - offset) * _inverse(scale)), 0, 15).astype(np.uint8)


def _rounded_up(x: Array) -> Array:
    """Float32 values from 0 up that bfloat16 holds, none below x."""
    return ((x.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def _rounded_down(x: Array) -> Array:
    """Float32 values of any sign that bfloat16 holds, none above x."""
    xp = x.__array_namespace__()
    toward_zero = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return xp.where(x < 0, -_rounded_up(xp.abs(x)), toward_zero)


def look_up(codes: Int[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """`table[codes]` for codes that are in range."""
    return jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def by_bits(codes: UInt8[Array, "..."], table: np.ndarray) -> Float[Array, "..."]:
    """`table[codes]` by choosing between halves of the table, bit by bit.

    The last choice is made by integer operations with scalars: `jnp.where` of two scalars makes arrays of them, which scan
    takes out of its loop and keeps, 16 of a weight's size in float32 (compiled for an H100).
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
    """`table[codes]` of 16 levels.

    On a CPU the look-up is faster, and selections are fused into small products. Elsewhere they let the codes become a
    weight in one kernel, where a look-up has the unpacked codes written out (compiled for an H100).
    """
    return jax.lax.platform_dependent(
        codes, cpu=partial(look_up, table=table), default=partial(by_bits, table=table)
    )


def encode_scales(
    absmax: Float[Array, "*L N O"],
) -> tuple[UInt8[Array, "*L N O"], Float[Array, "*L S"], Float[Array, "*L"]]:
    """Scales in the dynamic code after their mean is subtracted, in groups of 256 with a scale each.

    bitsandbytes' nested quantisation: the groups run over its order, all blocks of an output channel and then the next's.
    """
    xp = absmax.__array_namespace__()
    flat = absmax.swapaxes(-1, -2).reshape(*absmax.shape[:-2], -1)
    mean = _mean(flat)
    away = flat - mean[..., None]
    room = -away.shape[-1] % GROUP
    groups = xp.pad(away, [(0, 0)] * (away.ndim - 1) + [(0, room)]).reshape(*away.shape[:-1], -1, GROUP)
    outer = xp.max(xp.abs(groups), axis=-1)
    codes = xp.searchsorted(DYNAMIC_BOUNDS, (groups * _inverse(outer)[..., None]).reshape(-1)).astype(
        np.uint8
    )
    codes = codes.reshape(*groups.shape[:-2], -1)[..., : flat.shape[-1]]
    return codes.reshape(absmax.swapaxes(-1, -2).shape).swapaxes(-1, -2), outer, mean


def _mean(x: Float[Array, "*L M"]) -> Float[Array, "*L"]:
    """The mean of the last axis of numbers from 0 up, by halves: numpy's and XLA's own sums differ in their order."""
    xp, count = x.__array_namespace__(), x.shape[-1]
    half = 1 << max(0, (count - 1).bit_length())
    x = xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, half - count)])
    while half > 1:
        half //= 2
        x = x[..., :half] + x[..., half:]
    return _rounded_alone(x[..., 0] * np.float32(1 / count), x[..., 0])


def _rounded_alone(product: Array, positive: Array) -> Array:
    """The float32 product, and no sum that follows is contracted with it into one rounding, as XLA's CPU compiler does.

    It can't look through integer operations, and doesn't know that the sign bit of `positive` is 0.
    """
    return (product.view(np.uint32) | positive.view(np.uint32) & np.uint32(1 << 31)).view(np.float32)


def decode_scales(
    codes: UInt8[Array, "*L N O"], outer: Float[Array, "*L S"], mean: Float[Array, "*L"]
) -> Float[Array, "*L N O"]:
    """Undo encode_scales."""
    blocks, outs = codes.shape[
        -2:
    ]  # a repeat and a transpose of `outer` take XLA's CPU compiler twice as long
    along = jax.lax.broadcasted_iota(jnp.int32, (blocks, outs), 1) * jnp.int32(blocks)
    group = (along + jax.lax.broadcasted_iota(jnp.int32, (blocks, outs), 0)) // jnp.int32(GROUP)
    each = jnp.asarray(outer).at[..., group].get(mode="promise_in_bounds")
    return _rounded_alone(look_up(codes, DYNAMIC) * each, each) + mean[..., None, None]


@dataclass(frozen=True)
class Format:
    """A kind of packed weight.

    bits: of a code; two of 4 bits share a byte. block: inputs that usually share a scale, None for all of a channel.
    double: whether scales are usually quantised too, None where they can't be.
    scale: blocks of finite float32 -> scales, offsets, which `held` holds exactly. nearest: float32 values with their
    scales and offsets -> codes. decode: codes -> float32 multiples of the scale.
    """

    bits: int
    block: int | None
    double: bool | None
    held: Any
    scale: Callable[[Any], Scales]
    nearest: Callable[[Any, Any, Any], Any]
    decode: Callable[[Array], Array]


def _as_float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


FORMATS = {
    "int8": Format(8, None, None, np.float32, scale_int8, nearest_int8, _as_float),
    "int4": Format(
        4, 64, None, jnp.bfloat16, scale_int4, nearest_int4, lambda codes: _as_float(codes) - jnp.float32(8)
    ),
    "nf4": Format(4, 64, True, np.float32, scale_largest, nearest_nf4, lambda codes: level(codes, NF4)),
    "fp4": Format(4, 64, True, np.float32, scale_largest, nearest_fp4, lambda codes: level(codes, FP4)),
    "affine4": Format(4, 64, None, jnp.bfloat16, scale_affine4, nearest_affine4, _as_float),
}


def pack(codes: UInt8[Array, "*L I O"]) -> UInt8[Array, "*L I2 O"]:
    """Two 4-bit codes a byte along the input axis, the first in the high bits."""
    return codes[..., 0::2, :] << np.uint8(4) | codes[..., 1::2, :]


def unpack(packed: UInt8[Array, "*L I2 O"]) -> UInt8[Array, "*L I O"]:
    """Undo pack."""
    *lead, pairs, outs = packed.shape
    return jnp.stack([packed >> jnp.uint8(4), packed & jnp.uint8(15)], -2).reshape(*lead, 2 * pairs, outs)


def to_blocks(x: Float[Any, "*L I O"], block: int) -> Float[Any, "*L N block O"]:
    """The input axis in blocks; a short last one is filled up with copies of its last row, which change no extreme."""
    xp = x.__array_namespace__()
    *lead, ins, outs = x.shape
    room = -ins % block
    if room:
        x = xp.pad(x, [(0, 0)] * len(lead) + [(0, room), (0, 0)], mode="edge")
    return x.reshape(*lead, (ins + room) // block, block, outs)


def repeat_blocks(scale: Float[Array, "*L N O"], block: int, ins: int) -> Float[Array, "*L I O"]:
    """Each block's number for every input in it."""
    *lead, blocks, outs = scale.shape
    wide = jnp.broadcast_to(scale[..., None, :], (*lead, blocks, block, outs)).reshape(
        *lead, blocks * block, outs
    )
    return wide[..., :ins, :]


def as_zero_or_normal(x: Any) -> Any:
    """float32 with magnitudes below LEAST at zero."""
    xp = x.__array_namespace__()
    x = x.astype(np.float32)
    return xp.where(xp.abs(x) < SMALLEST, np.float32(0), x)


def check_range(x: Any) -> None:
    """Raise ValueError for NaN, infinity or a magnitude from MOST up; says how many there are and where the first is."""
    if isinstance(x, jax.core.Tracer):  # no values yet
        return
    host = np.asarray(x)
    usual = [
        (np.abs(part.astype(np.float32)) < LARGEST).all()
        for part in np.array_split(host, max(1, host.size >> 18), -1)
    ]
    if not all(usual):
        wrong = ~(np.abs(host.astype(np.float32)) < LARGEST)
        first = tuple(int(i[0]) for i in np.nonzero(wrong))
        where = f"the first {float(host[first])} at {first}"
        raise ValueError(f"{int(wrong.sum())} of {wrong.size} values are not finite or too large, {where}")
