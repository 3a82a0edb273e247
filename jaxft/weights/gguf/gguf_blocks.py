"""Blocks of GGUF's quantised tensors as codes, scales and offsets with the same values.

Each function takes the raw blocks [R, N, bytes of a block] of R rows and returns codes [R, N, elements of a
block], scales [R, N, S] and offsets [R, N, S] or None, for S equal sub-blocks. Codes are those of QTensor's
kind: int8; uint8 0 .. 15 of int4, which is 8 more than the number, or of affine4. The layouts of the blocks
are those of llama.cpp (ggml-common.h, ggml-quants.c). Scales of the K types are products of a float16 and a
6 or 8-bit number, which float32 represents exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class BlockFormat:
    """How a GGUF type becomes a QTensor with the same values.

    kind: of the QTensor. sub_block: inputs that share a scale. scale_dtype: of scales, and of offsets if
    kind has them. decode: see above. bits: of a code in the file, where a QTensor takes more for it.
    """

    kind: str
    sub_block: int
    scale_dtype: Any
    decode: Callable[[np.ndarray], Decoded]
    bits: int | None = None

    @property
    def offset_dtype(self) -> Any:
        """Dtype of offsets, None if there are none."""
        return self.scale_dtype if self.kind == "affine4" else None

    @property
    def reason(self) -> str:
        """Why a QTensor is larger than the file; "" where it is not."""
        return f"each code of {self.bits} bits takes {8 if self.kind == 'int8' else 4}" if self.bits else ""


def _halves(raw: np.ndarray) -> np.ndarray:
    """Return float16 numbers [..., n] from bytes [..., 2n]."""
    return np.ascontiguousarray(raw).view(np.float16)


def _single(raw: np.ndarray) -> np.ndarray:
    """Return float16 numbers [..., n] in float32 from bytes [..., 2n]."""
    return _halves(raw).astype(np.float32)


def _fields(raw: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Unpack numbers of 1, 2 or 4 bits: of each `group` bytes first the lowest bits of all, then the next
    ones.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    grouped = raw.reshape(*raw.shape[:-1], -1, 1, group)
    return (grouped >> shifts & np.uint8(2**bits - 1)).reshape(*raw.shape[:-1], -1)


def q8_0(raw: np.ndarray) -> Decoded:
    """32 numbers of 8 bits and a float16 scale."""
    return raw[..., 2:].view(np.int8), _halves(raw[..., :2]), None


def q4_0(raw: np.ndarray) -> Decoded:
    """32 numbers of 4 bits less 8, and a float16 scale."""
    return _fields(raw[..., 2:], 16, 4), _halves(raw[..., :2]), None


def q4_1(raw: np.ndarray) -> Decoded:
    """32 numbers of 4 bits, a float16 scale and minimum."""
    return _fields(raw[..., 4:], 16, 4), _halves(raw[..., :2]), _halves(raw[..., 2:4])


def q4_0_as_q4_1(raw: np.ndarray) -> Decoded:
    """Q4_0 with the offset -8 * scale, for a parameter whose other layers are Q4_1."""
    codes, scales, _ = q4_0(raw)
    if not (np.abs(scales) < 8188).all():  # 8 times larger ones, and NaN, are not float16 numbers
        raise ValueError("a scale of its Q4_0 blocks is not finite or too large")
    return codes, scales, scales * np.float16(-8)


def q5_0(raw: np.ndarray) -> Decoded:
    """32 numbers of 5 bits less 16, their highest bits apart, and a float16 scale."""
    high = np.unpackbits(raw[..., 2:6], axis=-1, bitorder="little")
    codes = _fields(raw[..., 6:], 16, 4) | high << np.uint8(4)
    return codes.view(np.int8) - np.int8(16), _halves(raw[..., :2]), None


def q2_k(raw: np.ndarray) -> Decoded:
    """16 times 16 numbers of 2 bits; a scale and a minimum of 4 bits each, times a float16 for all."""
    scale, minimum = _single(raw[..., 80:82]), _single(raw[..., 82:84])
    small = raw[..., :16]
    return _fields(raw[..., 16:80], 32, 2), scale * (small & 15), -(minimum * (small >> 4))


def q3_k(raw: np.ndarray) -> Decoded:
    """16 times 16 numbers of 3 bits less 4, their highest bits apart; a 6-bit scale each, times a float16."""
    codes = _fields(raw[..., 32:96], 32, 2) | _fields(raw[..., :32], 32, 1) << np.uint8(2)
    low, high = _fields(raw[..., 96:104], 8, 4), _fields(raw[..., 104:108], 4, 2)
    small = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    return codes + np.uint8(4), _single(raw[..., 108:110]) * small, None


def q4_k(raw: np.ndarray) -> Decoded:
    """8 times 32 numbers of 4 bits; a scale and a minimum of 6 bits each, times a float16 for all."""
    scale, minimum = _single(raw[..., :2]), _single(raw[..., 2:4])
    first, second, third = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    six = np.uint8(63), np.uint8(48)
    small = np.concatenate([first & six[0], third & 15 | first >> 2 & six[1]], -1)
    lower = np.concatenate([second & six[0], third >> 4 | second >> 2 & six[1]], -1)
    return _fields(raw[..., 16:], 32, 4), scale * small, -(minimum * lower)


def q6_k(raw: np.ndarray) -> Decoded:
    """16 times 16 numbers of 6 bits less 32, their highest two apart; an 8-bit scale each and a float16."""
    codes = _fields(raw[..., :128], 64, 4) | _fields(raw[..., 128:192], 32, 2) << np.uint8(4)
    small = raw[..., 192:208].view(np.int8)
    return codes.view(np.int8) - np.int8(32), _single(raw[..., 208:210]) * small, None


BLOCK_FORMATS = {
    "Q8_0": BlockFormat("int8", 32, np.float16, q8_0),
    "Q4_0": BlockFormat("int4", 32, np.float16, q4_0),
    "Q4_1": BlockFormat("affine4", 32, np.float16, q4_1),
    "Q5_0": BlockFormat("int8", 32, np.float16, q5_0, bits=5),
    "Q2_K": BlockFormat("affine4", 16, np.float32, q2_k, bits=2),
    "Q3_K": BlockFormat("int4", 16, np.float32, q3_k, bits=3),
    "Q4_K": BlockFormat("affine4", 32, np.float32, q4_k),
    "Q6_K": BlockFormat("int8", 16, np.float32, q6_k, bits=6),
}
Q4_0_AMONG_Q4_1 = BlockFormat("affine4", 32, np.float16, q4_0_as_q4_1)
