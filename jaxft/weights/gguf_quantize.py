"""Quantise matrices to GGUF's block types.

Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 have the bytes of llama.cpp's reference (ggml-quants.c): rounded from a
block's largest value, or from its limits. The K types, and the others with importances, are fitted, see
gguf_k_quants.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from jaxft.weights import finite
from jaxft.weights.gguf_header import FLOAT_TYPES
from jaxft.weights.gguf_k_quants import FITTED, fitted_bytes, half_bytes, pack_4_bits, pack_5_bits
from jaxft.weights.safetensors import WRITE_ADVICE

QUANTIZED_AT_A_TIME = 2**22  # values that are quantised at a time
LARGEST_HALF = 65504.0  # of float16, the type of scales
_BLOCK = 32


def tensor_bytes(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Return a tensor [rows, inputs], or a vector in a type without blocks, as the bytes of a GGUF type.

    importance: of each input, by which rounding errors are weighted; types without blocks and Q8_0 take none.
    Raises ValueError for values that are not finite or too large.
    """
    finite.require_finite(values, WRITE_ADVICE)
    if kind in FLOAT_TYPES:
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(values.astype(FLOAT_TYPES[kind]))
        if not finite.is_finite(cast):
            raise ValueError(
                f"some values are too large for {kind}; use --gguf BF16, F32 or a quantised type"
            )
        return cast.view(np.uint8)
    if np.abs(values).max(initial=0) > LARGEST_HALF:
        raise ValueError(f"some values are too large for {kind}; use --gguf BF16 or F32")
    if kind not in QUANTIZERS or (importance is not None and kind != "Q8_0"):
        return fitted_bytes(values, importance, kind)
    quantize, rows = QUANTIZERS[kind], max(1, QUANTIZED_AT_A_TIME // values.shape[-1])
    parts = [
        quantize(np.asarray(values[at : at + rows], np.float32).reshape(-1, _BLOCK))
        for at in range(0, len(values), rows)
    ]
    return np.concatenate(parts) if parts else np.empty((0,), np.uint8)


def _q8_0(x: np.ndarray) -> np.ndarray:
    """32 numbers of 8 bits and a float16 scale."""
    scale = np.abs(x).max(-1) / np.float32(127)
    scaled = x * _inverse(scale)
    codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)  # halves away from zero
    return np.concatenate([half_bytes(scale), codes.astype(np.int8).view(np.uint8)], -1)


def _symmetric(x: np.ndarray, zero: int, pack: Callable[..., np.ndarray]) -> np.ndarray:
    """Numbers less `zero`, and a scale: the value that is furthest from zero is -zero times the scale."""
    furthest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[:, 0]
    scale = furthest / np.float32(-zero)
    return pack(_codes(x * _inverse(scale) + np.float32(zero + 0.5), 2 * zero - 1), scale)


def _with_minimum(x: np.ndarray, levels: int, pack: Callable[..., np.ndarray]) -> np.ndarray:
    """Numbers from 0 to `levels`, a scale and the minimum."""
    low = x.min(-1)
    scale = (x.max(-1) - low) / np.float32(levels)
    return pack(_codes((x - low[:, None]) * _inverse(scale) + np.float32(0.5), levels), scale, low)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / scale[:, None]
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _codes(shifted: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.trunc(shifted), 0, most).astype(np.uint8)[:, None]


QUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _q8_0,
    "Q4_0": partial(_symmetric, zero=8, pack=pack_4_bits),
    "Q5_0": partial(_symmetric, zero=16, pack=pack_5_bits),
    "Q4_1": partial(_with_minimum, levels=15, pack=pack_4_bits),
    "Q5_1": partial(_with_minimum, levels=31, pack=pack_5_bits),
}
WRITTEN_TYPES = {*FLOAT_TYPES, *QUANTIZERS, *FITTED}
