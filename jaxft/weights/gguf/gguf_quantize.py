"""Quantise matrices to GGUF's block types, and choose the type of each tensor in a mixture such as Q4_K_M.

Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are quantised by the gguf package, with the same bytes as llama.cpp's
reference (ggml-quants.c). The scales of the K types, and of all types but Q8_0 if importances are given, are
fitted by weighted least squares.

The fit follows llama.cpp's quantisers. Each trial scale gives the codes of a sub-block, and these codes the
scale and the minimum that fit them best; the trial with the smallest weighted error wins. The weights of
errors are importances times sqrt(2 mean(x^2) + x^2), for Q6_K only importances; without importances they are
sqrt(mean(x^2)) + |x| for types with a minimum, and x^2 for the others. jaxft adds two steps, which make
errors smaller than llama.cpp's: for types with a minimum, scale and minimum are fitted again, REFITS times,
to the codes that they round to; and Q4_K and Q5_K choose a sub-block's 6-bit scale and minimum by its error.
The fit is compiled with jax for a fixed number of blocks, and runs on the default device.

Mixtures are llama-quantize's of llama.cpp (src/llama-quant.cpp), for dense models.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.nn.tree import nearest
from jaxft.weights.gguf.gguf_file import FLOAT_TYPES, block_size
from jaxft.weights.hf.safetensors import WRITE_ADVICE
from jaxft.weights.tensors import is_finite, require_finite

LARGEST_HALF = 65504.0  # of float16, the type of scales
CHUNKS = (2**20, 2**16)  # values of a compiled program, for large and for small tensors
SUPER = 256  # values of a block of a K type
REFITS = 3  # times that a fitted scale and minimum are fitted to the codes that they round to


def tensor_bytes(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Return a tensor [rows, inputs], or a vector in a type without blocks, as the bytes of a GGUF type.

    importance: weights [inputs] of rounding errors, None for equal ones; ignored for Q8_0 and for types
    without blocks. Raises ValueError for values that are not finite or too large.
    """
    require_finite(values, WRITE_ADVICE)
    if kind in FLOAT_TYPES:
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(values.astype(FLOAT_TYPES[kind]))
        if not is_finite(cast):
            raise ValueError(
                f"some values are too large for {kind}, up to {float(np.abs(values).max()):.3g}; use --gguf "
                "BF16, F32 or a quantised type"
            )
        return cast.view(np.uint8)
    if np.abs(values).max(initial=0) > LARGEST_HALF:
        raise ValueError(
            f"some values are too large for {kind}, up to {float(np.abs(values).max()):.3g}; use "
            "--gguf BF16 or F32"
        )
    if kind not in SIMPLE or (importance is not None and kind != "Q8_0"):
        return _fitted_bytes(values, importance, kind)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    with np.errstate(all="ignore"):  # of blocks so small that their scale is 0
        return quantize(values, GGMLQuantizationType[kind])


# Fitted blocks


class Trials(NamedTuple):
    """Trial scales: the i-th of `number` maps the largest value to FittedType.levels + start + i * step."""

    start: float
    step: float
    number: int


@dataclass(frozen=True)
class FittedType:
    """How a GGUF type is fitted and packed.

    blocks: number of values in a block and in a sub-block. levels: the largest code of types with a minimum;
    other types have codes from -levels to levels - 1. offset: whether the type has a minimum. trials: trial
    scales for a fit without and with importances. pack: returns the bytes of blocks from the arrays that the
    fit returns.
    """

    blocks: tuple[int, int]
    levels: int
    offset: bool
    trials: tuple[Trials, Trials]
    pack: Callable[..., np.ndarray]


def _fitted_bytes(values: np.ndarray, importance: np.ndarray | None, kind: str) -> np.ndarray:
    """Return a matrix [rows, inputs] as the bytes of a type in FITTED. importance: see tensor_bytes."""
    spec = FITTED[kind]
    block, sub = spec.blocks
    large, small = CHUNKS
    chunk = large if values.size >= large else small
    fit = _fit_offset if spec.offset else _fit_symmetric
    trials = spec.trials[importance is not None]
    parts = []
    for x, weights, count in _chunks(values, importance, chunk // block, block):
        shape = (len(x), block // sub, sub)
        arrays = fit(
            x.reshape(shape),
            None if weights is None else weights.reshape(shape),
            spec.levels,
            trials,
            block == SUPER,
        )
        parts.append(spec.pack(*(np.asarray(array)[:count] for array in arrays)))
    return np.concatenate(parts)


def _chunks(
    values: np.ndarray, importance: np.ndarray | None, count: int, block: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """Yield a matrix [rows, inputs] in chunks, in row-major order: (values [count, block], importances of the
    same shape or None, number of blocks that are not padding). Zeros pad the last chunk.
    """
    blocks = values.reshape(-1, block)
    per_row = values.shape[-1] // block
    of_row = None
    if importance is not None:  # about 1, so that products of their sums stay normal numbers
        wide = importance.astype(np.float64)
        of_row = (wide / (wide.mean() or 1.0)).astype(np.float32).reshape(per_row, block)
    for at in range(0, len(blocks), count):
        x = np.asarray(blocks[at : at + count], np.float32)
        used = len(x)
        x = np.concatenate([x, np.zeros((count - used, block), np.float32)]) if used < count else x
        weights = None if of_row is None else of_row[np.arange(at, at + count) % per_row]
        yield x, weights, used


def _weights(x: Float[Array, "N S E"], importance: Float[Array, "N S E"] | None) -> Float[Array, "N S E"]:
    square = jnp.square(x)
    if importance is None:
        return jnp.sqrt(square.mean(-1, keepdims=True)) + jnp.abs(x)
    return importance * jnp.sqrt(2 * square.mean((-2, -1), keepdims=True) + square)


def _safe(x: Array) -> Array:
    """Return 1 / x, and 0 where x is 0."""
    return jnp.where(x == 0, 0.0, 1.0 / jnp.where(x == 0, 1.0, x))


@partial(jax.jit, static_argnames=("levels", "trials", "nested"))
def _fit_offset(
    x: Float[Array, "N S E"],
    importance: Float[Array, "N S E"] | None,
    levels: int,
    trials: Trials,
    nested: bool,
) -> tuple[Array, ...]:
    """Fit x by scale * code + minimum in N blocks of S sub-blocks, with codes from 0 to levels. Return
    (codes, float16 scales, float16 minima); if nested, minima are at most 0, and _nested_offset makes the
    result.
    """
    w = _weights(x, importance)
    low = x.min(-1)
    low = jnp.minimum(low, 0.0) if nested else low
    span = x.max(-1) - low
    shifted = x - low[..., None]
    total, total_x = w.sum(-1), (w * x).sum(-1)

    def fitted(codes: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes = jnp.clip(jnp.rint(codes), 0, levels)
        weighted = w * codes
        one, two, mixed = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        inverse = _safe(total * two - one * one)
        scale, base = (total * mixed - total_x * one) * inverse, (two * total_x - one * mixed) * inverse
        if nested:
            scale = jnp.where(base > 0, mixed * _safe(two), scale)
            base = jnp.minimum(base, 0.0)
        error = (w * jnp.square(scale[..., None] * codes + base[..., None] - x)).sum(-1)
        better = (error < best[2]) & (inverse > 0) & (scale > 0)
        return jax.tree.map(partial(jnp.where, better), (scale, base, error), best)

    def trial(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top = levels + trials.start + trials.step * i.astype(jnp.float32)
        return fitted(shifted * (top * _safe(span))[..., None], best)

    def refit(_: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return fitted((x - best[1][..., None]) * _safe(best[0])[..., None], best)

    best = (span / levels, low, jnp.full_like(span, jnp.inf))
    best = jax.lax.fori_loop(0, trials.number, trial, best)
    scale, base, _ = jax.lax.fori_loop(0, REFITS, refit, best)
    if nested:
        return _nested_offset(x, w, scale, base, levels)
    half = (scale.astype(jnp.float16), base.astype(jnp.float16))
    step, base = (a.astype(jnp.float32) for a in half)
    codes = jnp.clip(jnp.rint((x - base[..., None]) * _safe(step)[..., None]), 0, levels)
    return (codes.astype(jnp.uint8), *half)


def _nested_offset(x: Array, w: Array, scale: Array, base: Array, levels: int) -> tuple[Array, ...]:
    """Quantise scales and minima (`base`) of sub-blocks [N, S] to 6-bit multiples of two float16 per block:
    of the nearest multiples and their neighbours, the pair with the smallest error. x: values [N, S, E]. w:
    weights of their errors. Return (codes, 6-bit scales, 6-bit minima, float16 of scales, of minima).
    """

    def six_bits(numbers: Array) -> tuple[Array, Array, Array]:
        unit = (numbers.max(-1) / 63).astype(jnp.float16)
        wide = unit.astype(jnp.float32)[..., None]
        return jnp.clip(jnp.rint(numbers * _safe(wide)), 0, 63), unit, wide

    (near, unit, wide), (near_low, low_unit, wide_low) = six_bits(scale), six_bits(-base)

    def rounded(scales: Array, lows: Array) -> tuple[Array, Array]:
        step, shift = (wide * scales)[..., None], (wide_low * lows)[..., None]
        codes = jnp.clip(jnp.rint((x + shift) * _safe(step)), 0, levels)
        return codes, (w * jnp.square(step * codes - shift - x)).sum(-1)

    def trial(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scales, lows = (jnp.clip(n + move, 0, 63) for n, move in ((near, i // 3 - 1), (near_low, i % 3 - 1)))
        _, error = rounded(scales, lows)
        return jax.tree.map(partial(jnp.where, error < best[2]), (scales, lows, error), best)

    start = (near, near_low, rounded(near, near_low)[1])
    scales, lows, _ = jax.lax.fori_loop(0, 9, trial, start)
    codes, _ = rounded(scales, lows)
    return codes.astype(jnp.uint8), scales.astype(jnp.uint8), lows.astype(jnp.uint8), unit, low_unit


@partial(jax.jit, static_argnames=("levels", "trials", "nested"))
def _fit_symmetric(
    x: Float[Array, "N S E"],
    importance: Float[Array, "N S E"] | None,
    levels: int,
    trials: Trials,
    nested: bool,
) -> tuple[Array, ...]:
    """Fit x by scale * code in N blocks of S sub-blocks, with codes from -levels to levels - 1. Return (codes
    + levels, float16 scales); if nested, (codes + levels, 8-bit scales of sub-blocks, float16 per block).
    """
    w = jnp.square(x) if importance is None else importance if nested else _weights(x, importance)
    index = jnp.abs(x).argmax(-1, keepdims=True)
    largest = jnp.take_along_axis(x, index, -1)[..., 0]

    def trial(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        top = levels + trials.start + trials.step * i.astype(jnp.float32)
        codes = jnp.clip(jnp.rint(x * (-top * _safe(largest))[..., None]), -levels, levels - 1)
        weighted = w * codes
        two, mixed = (weighted * codes).sum(-1), (weighted * x).sum(-1)
        scale = mixed * _safe(two)
        gain = mixed * scale  # how much smaller the error is than with zeros
        better = gain > best[1]
        return jnp.where(better, scale, best[0]), jnp.where(better, gain, best[1])

    scale, _ = jax.lax.fori_loop(0, trials.number, trial, (-largest / levels, jnp.zeros_like(largest)))
    if nested:
        index = jnp.abs(scale).argmax(-1, keepdims=True)
        unit = (jnp.take_along_axis(scale, index, -1)[..., 0] / -128).astype(jnp.float16)
        wide = unit.astype(jnp.float32)[..., None]
        scales = jnp.clip(jnp.rint(scale * _safe(wide)), -128, 127)
        step, stored = wide * scales, [scales.astype(jnp.int8), unit]
    else:
        half = scale.astype(jnp.float16)
        step, stored = half.astype(jnp.float32), [half]
    codes = jnp.clip(jnp.rint(x * _safe(step)[..., None]), -levels, levels - 1)
    return ((codes + levels).astype(jnp.uint8), *stored)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack 4-bit numbers [..., 2n]: the first half in the low bits, the second half in the high ones."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << np.uint8(4)


def _half_bytes(x: np.ndarray) -> np.ndarray:
    """Return the bytes of float16 numbers [N, n], or [N], as [N, 2n]."""
    return np.ascontiguousarray(x.astype(np.float16)).reshape(len(x), -1).view(np.uint8)


def _pack_4_bits(codes: np.ndarray, *scales: np.ndarray) -> np.ndarray:
    """Return the bytes of blocks of 32 4-bit codes [N, 1, 32]. scales: scales, and minima if any, [N, 1]."""
    return np.concatenate([*map(_half_bytes, scales), nibbles(codes[:, 0])], -1)


def _pack_5_bits(codes: np.ndarray, *scales: np.ndarray) -> np.ndarray:
    """Return the bytes of blocks of 32 5-bit codes [N, 1, 32], fifth bits first. scales: as _pack_4_bits."""
    high = np.packbits(codes[:, 0] >> np.uint8(4), axis=-1, bitorder="little")
    return np.concatenate([*map(_half_bytes, scales), high, nibbles(codes[:, 0] & np.uint8(15))], -1)


def _pack_scales(scales: np.ndarray, lows: np.ndarray) -> np.ndarray:
    """Pack the 6-bit scales and minima of 8 sub-blocks into 12 bytes.

    Bytes 0 to 3 have the scales of sub-blocks 0 to 3 in their low six bits, bytes 4 to 7 their minima. Bytes
    8 to 11 have the low four bits of sub-blocks 4 to 7: scales low, minima high. The two high bits of these
    scales are at the top of bytes 0 to 3, the two high bits of these minima at the top of bytes 4 to 7.
    """
    top = np.uint8(6)
    first, second = scales[:, :4], scales[:, 4:]
    low_first, low_second = lows[:, :4], lows[:, 4:]
    return np.concatenate(
        [
            first | second >> np.uint8(4) << top,
            low_first | low_second >> np.uint8(4) << top,
            second & np.uint8(15) | low_second << np.uint8(4),
        ],
        -1,
    )


def _pack_q4_k(
    codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, unit: np.ndarray, low: np.ndarray
) -> np.ndarray:
    pairs = nibbles(codes.reshape(len(codes), 4, 64)).reshape(len(codes), -1)
    return np.concatenate([_half_bytes(unit), _half_bytes(low), _pack_scales(scales, lows), pairs], -1)


def _pack_q5_k(
    codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, unit: np.ndarray, low: np.ndarray
) -> np.ndarray:
    head = _pack_q4_k(codes & np.uint8(15), scales, lows, unit, low)
    bits = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")[:, 0]  # bit s is of sub-block s
    return np.concatenate([head[:, :16], bits, head[:, 16:]], -1)


def _pack_q6_k(codes: np.ndarray, scales: np.ndarray, unit: np.ndarray) -> np.ndarray:
    halves = codes.reshape(len(codes), 2, 128)
    low = nibbles(halves & np.uint8(15)).reshape(len(codes), -1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    quarters = (halves >> np.uint8(4)).reshape(len(codes), 2, 4, 32) << shifts
    high = np.bitwise_or.reduce(quarters, axis=2).reshape(len(codes), -1)
    return np.concatenate([low, high, scales.view(np.uint8), _half_bytes(unit)], -1)


_AROUND = Trials(-0.9, 0.1, 19)
_WIDE = Trials(-0.9, 0.05, 37)
FITTED = {
    "Q4_K": FittedType((SUPER, 32), 15, True, (Trials(-1.0, 0.1, 21), _WIDE), _pack_q4_k),
    "Q5_K": FittedType((SUPER, 32), 31, True, (Trials(-0.5, 0.1, 16), _WIDE), _pack_q5_k),
    "Q6_K": FittedType((SUPER, 16), 32, False, (_AROUND, _AROUND), _pack_q6_k),
    "Q4_0": FittedType((32, 32), 8, False, (_AROUND, _AROUND), _pack_4_bits),
    "Q5_0": FittedType((32, 32), 16, False, (_AROUND, _AROUND), _pack_5_bits),
    "Q4_1": FittedType((32, 32), 15, True, (_WIDE, _WIDE), _pack_4_bits),
    "Q5_1": FittedType((32, 32), 31, True, (_WIDE, _WIDE), _pack_5_bits),
}
SIMPLE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # which the gguf package rounds
WRITTEN_TYPES = {*FLOAT_TYPES, *SIMPLE, *FITTED}

# Mixtures

# name -> number in general.file_type, type of most matrices
MIXTURES = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_1": (9, "Q5_1"),
    "Q5_0": (8, "Q5_0"),
    "Q4_K_M": (15, "Q4_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_1": (3, "Q4_1"),
    "Q4_0": (2, "Q4_0"),
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Types for a matrix whose inputs are not a multiple of 256, and the last resort.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAST_FALLBACK = "F16"


@dataclass(frozen=True)
class MixtureModel:
    """The properties of a model that determine its tensors' types in a mixture such as Q4_K_M, which stores
    some tensors with more bits than others.

    architecture: its GGUF name. tied: whether the embedding is also the head. weighted: whether importances
    of the matrices' inputs are given (llama.cpp's imatrix).
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    weighted: bool = False


def mixture_named(name: str) -> str:
    """Return a key of MIXTURES for a user's spelling (q4_k_m, Q4_K). Raises ValueError for other names."""
    mixture = name.upper().replace("-", "_")
    mixture = ALIASES.get(mixture, mixture)
    if mixture not in MIXTURES:
        near = ", ".join(nearest(mixture, list(MIXTURES)))
        raise ValueError(
            f"--gguf {name[:40]}: not a type of GGUF files that jaxft writes; near: {near}; all: "
            f"{', '.join(MIXTURES)}"
        )
    return mixture


def tensor_kind(name: str, shape: tuple[int, ...], mixture: str, model: MixtureModel) -> str:
    """Return the type of a tensor: F32 for a vector; for a matrix the type that the mixture chooses, or a
    fallback if the inputs are not a multiple of that type's block. name: GGUF name. mixture: key of MIXTURES.
    """
    if len(shape) < 2:
        return "F32"
    default = MIXTURES[mixture][1]
    if default in FLOAT_TYPES:
        return default
    chosen = _mixed(name, shape[-1], mixture, model)
    if shape[-1] % block_size(chosen)[0]:
        chosen = FALLBACKS.get(chosen, LAST_FALLBACK)
    return chosen if shape[-1] % block_size(chosen)[0] == 0 else LAST_FALLBACK


def _mixed(name: str, inputs: int, mixture: str, model: MixtureModel) -> str:
    default = MIXTURES[mixture][1]
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        if inputs % block_size(default)[0] or default == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return default
    layer, module, layers = int(match[1]), match[2], model.layers
    few = layer < layers // 8
    many = few or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if module in ("attn_v", "attn_qkv"):
        chosen = default
        if mixture in ("Q4_K_M", "Q5_K_M") and many:
            chosen = "Q6_K"
        elif mixture == "Q4_K_S" and layer < 4:
            chosen = "Q5_K"
        is_70b = model.architecture == "llama" and layers == 80 and model.heads != model.kv_heads
        return "Q5_K" if is_70b and chosen == "Q4_K" else chosen
    if module == "ffn_down":
        if mixture in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if many else default
        if few and mixture == "Q4_K_S":
            return "Q5_K"
        if few and model.weighted and mixture in ("Q4_0", "Q5_0"):
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mixture]
    return default
