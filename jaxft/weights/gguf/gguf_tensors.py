"""Tensors of GGUF files, read without torch, and their quantised blocks as QTensors with the same values.

Blocks have llama.cpp's layouts (ggml-common.h, ggml-quants.c); the gguf package dequantises
the types that no QTensor represents.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import pack
from jaxft.weights.gguf.gguf_architectures import (
    ROPE_TABLES,
    architecture_of,
    head_count,
    hf_name,
    kv_head_count,
    stored_as,
)
from jaxft.weights.gguf.gguf_file import FLOAT_TYPES, GgufHeader, GgufTensor, block_size
from jaxft.weights.hf.safetensors import map_array
from jaxft.weights.quantised.file_format import block_layout
from jaxft.weights.tensors import FileTensor, Index, ModelFiles, QuantisedTensor, full_index

CHUNK = 2**22  # elements that are dequantised at a time
Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class BlockFormat:
    """The conversion of a GGUF type to a QTensor with the same values.

    kind: the QTensor's kind. sub_block: inputs that share a scale. scale_dtype: dtype of scales and offsets;
    products of a float16 and a 6 or 8-bit number are exact in float32. bits: bits of a code in the file, if a
    code of the QTensor has more; else None.

    decode(raw [R, N, bytes of a block]), for N blocks in each of R rows: returns codes [R, N, elements of a
    block], scales [R, N, S] and offsets [R, N, S] or None, for S equal sub-blocks. Codes are as the kind
    stores them: int8; uint8 from 0 to 15 for affine4, and for int4, where it is the number plus 8.
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
        """Why the QTensor is larger than the weight in the file; "" if it is not."""
        return f"each code of {self.bits} bits takes {8 if self.kind == 'int8' else 4}" if self.bits else ""


def _halves(raw: np.ndarray) -> np.ndarray:
    """Return float16 numbers [..., n] from bytes [..., 2n]."""
    return np.ascontiguousarray(raw).view(np.float16)


def _single(raw: np.ndarray) -> np.ndarray:
    """Return float16 numbers [..., n] in float32 from bytes [..., 2n]."""
    return _halves(raw).astype(np.float32)


def _fields(raw: np.ndarray, group: int, bits: int) -> np.ndarray:
    """Unpack numbers of 1, 2 or 4 bits: of each `group` bytes the lowest bits first, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    grouped = raw.reshape(*raw.shape[:-1], -1, 1, group)
    return (grouped >> shifts & np.uint8(2**bits - 1)).reshape(*raw.shape[:-1], -1)


def q8_0(raw: np.ndarray) -> Decoded:
    """Decode Q8_0: blocks of 32 numbers of 8 bits and a float16 scale."""
    return raw[..., 2:].view(np.int8), _halves(raw[..., :2]), None


def q4_0(raw: np.ndarray) -> Decoded:
    """Decode Q4_0: blocks of 32 numbers of 4 bits, minus 8, and a float16 scale."""
    return _fields(raw[..., 2:], 16, 4), _halves(raw[..., :2]), None


def q4_1(raw: np.ndarray) -> Decoded:
    """Decode Q4_1: blocks of 32 numbers of 4 bits, a float16 scale and a float16 minimum."""
    return _fields(raw[..., 4:], 16, 4), _halves(raw[..., :2]), _halves(raw[..., 2:4])


def q4_0_as_q4_1(raw: np.ndarray) -> Decoded:
    """Decode Q4_0 as Q4_1, with the offset -8 * scale, for a parameter with other layers in Q4_1."""
    codes, scales, _ = q4_0(raw)
    if not (np.abs(scales) < 8188).all():  # 8 times larger ones, and NaN, are not float16 numbers
        raise ValueError("a scale of its Q4_0 blocks is not finite or too large")
    return codes, scales, scales * np.float16(-8)


def q5_0(raw: np.ndarray) -> Decoded:
    """Decode Q5_0: blocks of 32 numbers of 5 bits, minus 16, fifth bits separate, and a float16 scale."""
    high = np.unpackbits(raw[..., 2:6], axis=-1, bitorder="little")
    codes = _fields(raw[..., 6:], 16, 4) | high << np.uint8(4)
    return codes.view(np.int8) - np.int8(16), _halves(raw[..., :2]), None


def q2_k(raw: np.ndarray) -> Decoded:
    """Decode Q2_K: 16 sub-blocks of 16 numbers of 2 bits; each has a 4-bit scale and a 4-bit minimum,
    multiplied by two float16 of the block.
    """
    scale, minimum = _single(raw[..., 80:82]), _single(raw[..., 82:84])
    small = raw[..., :16]
    return _fields(raw[..., 16:80], 32, 2), scale * (small & 15), -(minimum * (small >> 4))


def q3_k(raw: np.ndarray) -> Decoded:
    """Decode Q3_K: 16 sub-blocks of 16 3-bit numbers, minus 4, third bits apart; 6-bit scales * float16."""
    codes = _fields(raw[..., 32:96], 32, 2) | _fields(raw[..., :32], 32, 1) << np.uint8(2)
    low, high = _fields(raw[..., 96:104], 8, 4), _fields(raw[..., 104:108], 4, 2)
    small = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
    return codes + np.uint8(4), _single(raw[..., 108:110]) * small, None


def q4_k(raw: np.ndarray) -> Decoded:
    """Decode Q4_K: 8 sub-blocks of 32 4-bit numbers; each has a scale and a minimum of 6 bits * float16."""
    scale, minimum = _single(raw[..., :2]), _single(raw[..., 2:4])
    first, second, third = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    six = np.uint8(63), np.uint8(48)
    small = np.concatenate([first & six[0], third & 15 | first >> 2 & six[1]], -1)
    lower = np.concatenate([second & six[0], third >> 4 | second >> 2 & six[1]], -1)
    return _fields(raw[..., 16:], 32, 4), scale * small, -(minimum * lower)


def q6_k(raw: np.ndarray) -> Decoded:
    """Decode Q6_K: 16 sub-blocks of 16 6-bit numbers, minus 32, top bits separate; 8-bit scales * float16."""
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


def open_gguf(header: GgufHeader) -> ModelFiles:
    """Open the tensors of a GGUF file under their Hugging Face names, shapes and row order.

    The types of BLOCK_FORMATS can also be stored as QTensors with the same values. Raises ValueError for a
    tensor of a type that the gguf package cannot dequantise.
    """
    architecture = architecture_of(header)
    weights = {name: tensor for name, tensor in header.tensors.items() if name not in ROPE_TABLES}
    tensors = {hf_name(architecture, name): tensor for name, tensor in weights.items()}
    for name, tensor in header.tensors.items():
        if not _is_readable(tensor.kind):
            raise ValueError(
                f"{tensor.path}: tensor {name} has type {tensor.kind}, which the gguf package cannot "
                "dequantise; use a file of this model in another type (Q8_0, Q4_K_M, F16, ...), or its "
                "Hugging Face folder"
            )
    counts = head_count(header), kv_head_count(header)
    opened = {}
    for name, tensor in tensors.items():
        heads, plus_one = stored_as(architecture, name, *counts)
        kind, quantised = "F32" if plus_one else tensor.kind, None
        if tensor.kind not in FLOAT_TYPES and len(tensor.shape) == 2:
            quantised = _quantised(tensor, _block_format(tensors, name), heads)
        dtype = FLOAT_TYPES.get(kind, np.dtype(np.float32))
        opened[name] = FileTensor(tensor.shape, dtype, partial(_read, tensor, heads, plus_one), quantised)
    return ModelFiles(str(header.path), opened)


def _read(tensor: GgufTensor, heads: int | None, plus_one: bool, index: Index) -> np.ndarray:
    values = read_dequantised(tensor, index, heads)
    return values.astype(np.float32) - np.float32(1) if plus_one else values


def _quantised(tensor: GgufTensor, format: BlockFormat | None, heads: int | None) -> QuantisedTensor:
    """Return a quantised weight. format: None reads it dequantised. heads: see _rows_in_file."""
    (outs, ins), method = tensor.shape, f"GGUF {tensor.kind}"
    if format is None:
        read, reason = partial(_read_expanded, tensor, heads), "no packed form has its values"
        return QuantisedTensor(method, (ins, outs), None, read, reason)
    layout = block_layout(format.kind, (ins, outs), format.sub_block, format.scale_dtype, format.offset_dtype)
    read_blocks = partial(_read_blocks, tensor, format, layout, heads)
    return QuantisedTensor(method, (ins, outs), layout, read_blocks, format.reason)


def _is_readable(kind: str) -> bool:
    """Return whether the gguf package dequantises blocks of this type: tried with one block of zeros."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, block_size(kind)[1]), np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _block_format(tensors: dict[str, GgufTensor], name: str) -> BlockFormat | None:
    """Return the BlockFormat of a tensor, None if no QTensor has its values. tensors: by Hugging Face name.

    A Q4_0 tensor is decoded as Q4_1 if the same tensor of another layer is Q4_1, so that all layers are
    alike: llama-quantize stores the first layers of mlp.down_proj of a Q4_0 model as Q4_1.
    """
    format = BLOCK_FORMATS.get(tensors[name].kind)
    if tensors[name].kind == "Q4_0" and (match := re.fullmatch(r"(model\.layers\.)\d+(\..*)", name)):
        pattern = re.compile(re.escape(match[1]) + r"\d+" + re.escape(match[2]))
        if any(tensor.kind == "Q4_1" and pattern.fullmatch(other) for other, tensor in tensors.items()):
            return Q4_0_AMONG_Q4_1
    return format


def _read_expanded(tensor: GgufTensor, heads: int | None, index: Index = ()) -> np.ndarray:
    """Read the part at `index` of a weight [in, out], dequantised to float32."""
    return read_dequantised(tensor, full_index(index, tensor.shape[::-1])[::-1], heads).T


def _read_blocks(
    tensor: GgufTensor, format: BlockFormat, layout: QTensor, heads: int | None, index: Index = ()
) -> QTensor:
    """Read codes, scales and offsets of the part at `index` of a weight [in, out], and no other blocks."""
    (ins, outs), (elements, size) = full_index(index, layout.shape), block_size(tensor.kind)
    first, last = ins.start // elements, -(-ins.stop // elements)
    raw = _read_bytes(tensor, _rows_in_file(tensor, heads)[outs], slice(first * size, last * size))
    raw = raw.reshape(len(raw), last - first, size)
    codes, scales, offsets = format.decode(raw)

    def by_input(x: np.ndarray, inputs: int) -> Any:
        start, stop = ins.start - first * elements, ins.stop - first * elements
        return x.reshape(len(raw), -1)[:, start // inputs : -(-stop // inputs)].T

    flat = by_input(codes, 1)
    return replace(
        layout,
        codes=flat if layout.kind == "int8" else pack(flat),
        scale=by_input(scales, format.sub_block),
        offset=None if offsets is None else by_input(offsets, format.sub_block),
    )


def raw_bytes(tensor: GgufTensor) -> np.ndarray:
    """Read a tensor's bytes as they are in the file."""
    return _read_bytes(tensor, slice(None), slice(None))


def _read_bytes(tensor: GgufTensor, rows: Any, columns: slice) -> np.ndarray:
    """Read the bytes `columns` of `rows` of a tensor [rows, bytes per row]. rows: a slice, or row numbers."""
    if isinstance(rows, np.ndarray) and (np.diff(rows) == 1).all():
        rows = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0)  # three times as fast
    shape = (math.prod(tensor.shape[:-1]), tensor.row_bytes)
    return map_array(tensor.path, np.uint8, tensor.offset, shape, (rows, columns))


def _rows_in_file(tensor: GgufTensor, heads: int | None) -> np.ndarray:
    """Return each Hugging Face row's number in the file. heads: of q or k, whose halves interleave."""
    count = math.prod(tensor.shape[:-1])
    rows = np.arange(count)
    return rows.reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(count) if heads else rows


def read_dequantised(tensor: GgufTensor, index: Index = (), heads: int | None = None) -> np.ndarray:
    """Read the part at `index` of a tensor, dequantised, with rows in Hugging Face order. heads: see
    _rows_in_file. Only the index's part of a matrix is read, a few rows at a time.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if len(tensor.shape) != 2 and index:
        return read_dequantised(tensor)[index]
    kind = GGMLQuantizationType[tensor.kind]
    *above, ins = full_index(index, tensor.shape)
    block, size = block_size(tensor.kind)
    start, stop = ins.start // block * block, -(-ins.stop // block) * block
    rows = _rows_in_file(tensor, heads)
    rows = rows[above[0]] if len(tensor.shape) == 2 else rows
    out = np.empty((len(rows), ins.stop - ins.start), FLOAT_TYPES.get(tensor.kind, np.float32))
    step = max(1, CHUNK // tensor.shape[-1])
    columns = slice(start // block * size, stop // block * size)
    for at in range(0, len(out), step):
        raw = _read_bytes(tensor, rows[at : at + step], columns)
        values = raw.view(out.dtype) if tensor.kind in FLOAT_TYPES else dequantize(raw, kind)
        out[at : at + step] = values[:, ins.start - start : ins.stop - start]
    return out.reshape(*(s.stop - s.start for s in above), ins.stop - ins.start)
