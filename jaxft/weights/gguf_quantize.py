"""Quantise matrices to GGUF's block types.

Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 have the bytes of llama.cpp's reference (ggml-quants.c): rounded from a
block's largest value, or from its limits. The K types, and the others with importances, are fitted, see
gguf_k_quants.
"""

import numpy as np

from jaxft.weights import finite
from jaxft.weights.gguf_k_quants import FITTED, fitted_bytes, half_bytes, high_bits, nibbles
from jaxft.weights.gguf_types import FLOAT_TYPES
from jaxft.weights.gguf_write import float_bytes
from jaxft.weights.safetensors import WRITE_ADVICE

QUANTIZED_AT_A_TIME = 2**22  # values that are quantised at a time
LARGEST_HALF = 65504.0  # of float16, the type of scales
_BLOCK = 32


def tensor_bytes(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Return a tensor [rows, inputs], or a vector in a type without blocks, as the bytes of a GGUF type.

    importance: of each input, by which rounding errors are weighted; types without blocks and Q8_0 take none.
    Raises ValueError for values that are not finite or too large.
    """
    if kind in FLOAT_TYPES:
        return float_bytes(values, kind)
    finite.require_finite(values, WRITE_ADVICE)
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
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)  # halves away from zero
    return _joined(scale, codes.astype(np.int8).view(np.uint8))


def _q4_0(x: np.ndarray) -> np.ndarray:
    """32 numbers of 4 bits less 8, and a float16 scale: the largest value is -8 times the scale."""
    scale = _largest(x) / np.float32(-8)
    return _joined(scale, nibbles(_codes(x * _inverse(scale) + np.float32(8.5), 15)))


def _q5_0(x: np.ndarray) -> np.ndarray:
    """32 numbers of 5 bits less 16, and a float16 scale: the largest value is -16 times the scale."""
    scale = _largest(x) / np.float32(-16)
    codes = _codes(x * _inverse(scale) + np.float32(16.5), 31)
    return _joined(scale, high_bits(codes), nibbles(codes & np.uint8(15)))


def _q4_1(x: np.ndarray) -> np.ndarray:
    """32 numbers of 4 bits, a float16 scale and minimum."""
    low, scale = _limits(x, 15)
    return _joined(scale, half_bytes(low), nibbles(_codes((x - low) * _inverse(scale) + np.float32(0.5), 15)))


def _q5_1(x: np.ndarray) -> np.ndarray:
    """32 numbers of 5 bits, a float16 scale and minimum."""
    low, scale = _limits(x, 31)
    codes = _codes((x - low) * _inverse(scale) + np.float32(0.5), 31)
    return _joined(scale, half_bytes(low), high_bits(codes), nibbles(codes & np.uint8(15)))


def _largest(x: np.ndarray) -> np.ndarray:
    """Return the value of each block that is furthest from zero, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)


def _limits(x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the minimum of each block, and a step between it and the maximum."""
    low = x.min(-1, keepdims=True)
    return low, (x.max(-1, keepdims=True) - low) / np.float32(steps)


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _codes(shifted: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.trunc(shifted), 0, most).astype(np.uint8)


def _joined(scale: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate([half_bytes(scale), *parts], axis=-1)


QUANTIZERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1}
WRITTEN_TYPES = {*FLOAT_TYPES, *QUANTIZERS, *FITTED}
