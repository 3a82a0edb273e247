"""Tensors of GGUF files, read without torch: the gguf package dequantises blocks."""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import pack
from jaxft.weights.gguf.gguf_architectures import (
    architecture_of,
    head_count,
    hf_name,
    kv_head_count,
    stored_as,
)
from jaxft.weights.gguf.gguf_blocks import BLOCK_FORMATS, Q4_0_AMONG_Q4_1, BlockFormat
from jaxft.weights.gguf.gguf_header import FLOAT_TYPES, GgufHeader, GgufTensor, block_size
from jaxft.weights.hf.safetensors import map_array
from jaxft.weights.model_files import FileTensor, Index, ModelFiles, QuantisedTensor, full_index
from jaxft.weights.quantised.file_format import block_layout

CHUNK = 2**22  # elements that are dequantised at a time
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # see gguf_rope


def open_gguf(header: GgufHeader) -> ModelFiles:
    """Open the tensors of a GGUF file under their Hugging Face names and in that layout.

    Every type that the gguf package dequantises can be read. Those of gguf_blocks.BLOCK_FORMATS can also be
    stored as QTensors with the same values.
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
    found = {}
    for name, tensor in tensors.items():
        heads, plus_one = stored_as(architecture, name, *counts)
        kind, quantised = "F32" if plus_one else tensor.kind, None
        if tensor.kind not in FLOAT_TYPES and len(tensor.shape) == 2:
            quantised = _quantised(tensor, _block_format(tensors, name), heads)
        dtype = FLOAT_TYPES.get(kind, np.dtype(np.float32))
        found[name] = FileTensor(tensor.shape, dtype, partial(_read, tensor, heads, plus_one), quantised)
    return ModelFiles(str(header.path), found)


def _read(tensor: GgufTensor, heads: int | None, plus_one: bool, index: Index) -> np.ndarray:
    values = read_dequantised(tensor, index, heads)
    return values.astype(np.float32) - np.float32(1) if plus_one else values


def _quantised(tensor: GgufTensor, format: BlockFormat | None, heads: int | None) -> QuantisedTensor:
    """Return a weight in blocks of a format; None if no QTensor has their values."""
    (outs, ins), method = tensor.shape, f"GGUF {tensor.kind}"
    if format is None:
        read, reason = partial(_read_expanded, tensor, heads), "no packed form has its values"
        return QuantisedTensor(method, (ins, outs), None, read, reason)
    layout = block_layout(format.kind, (ins, outs), format.sub_block, format.scale_dtype, format.offset_dtype)
    read_blocks = partial(_read_blocks, tensor, format, layout, heads)
    return QuantisedTensor(method, (ins, outs), layout, read_blocks, format.reason)


def _is_readable(kind: str) -> bool:
    """Whether the gguf package dequantises blocks of this type: tried with one block of zeros."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, block_size(kind)[1]), np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _block_format(tensors: dict[str, GgufTensor], name: str) -> BlockFormat | None:
    """Return the format of a tensor's blocks, for Q4_0 that of Q4_1 if another layer is Q4_1.

    llama-quantize stores the first layers of mlp.down_proj of a Q4_0 model as Q4_1.
    """
    format = BLOCK_FORMATS.get(tensors[name].kind)
    if tensors[name].kind == "Q4_0" and (match := re.fullmatch(r"(model\.layers\.)\d+(\..*)", name)):
        pattern = re.compile(re.escape(match[1]) + r"\d+" + re.escape(match[2]))
        if any(tensor.kind == "Q4_1" and pattern.fullmatch(other) for other, tensor in tensors.items()):
            return Q4_0_AMONG_Q4_1
    return format


def _read_expanded(tensor: GgufTensor, heads: int | None, index: Index = ()) -> np.ndarray:
    """Read part of a weight [in, out] in float32."""
    return read_dequantised(tensor, full_index(index, tensor.shape[::-1])[::-1], heads).T


def _read_blocks(
    tensor: GgufTensor, format: BlockFormat, layout: QTensor, heads: int | None, index: Index = ()
) -> QTensor:
    """Read codes, scales and offsets of part of a weight [in, out]; only its blocks are read."""
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
    """Read some bytes of some rows of a tensor [rows, bytes per row]. rows: a slice, or their numbers."""
    if isinstance(rows, np.ndarray) and (np.diff(rows) == 1).all():
        rows = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0)  # three times as fast
    shape = (math.prod(tensor.shape[:-1]), tensor.row_bytes)
    return map_array(tensor.path, np.uint8, tensor.offset, shape, (rows, columns))


def _rows_in_file(tensor: GgufTensor, heads: int | None) -> np.ndarray:
    """Return the number in the file of each row of Hugging Face's. Of q and k, llama.cpp interleaves the two
    halves of each head that rope rotates together.
    """
    count = math.prod(tensor.shape[:-1])
    rows = np.arange(count)
    return rows.reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(count) if heads else rows


def read_dequantised(tensor: GgufTensor, index: Index = (), heads: int | None = None) -> np.ndarray:
    """Read part of a tensor, dequantised a few rows at a time; all of one that is not 2-D. heads: of q or k,
    whose rows are returned in the order of Hugging Face.
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
