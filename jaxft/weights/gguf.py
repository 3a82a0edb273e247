"""GGUF files of Llama architecture: config and tensors, read without torch. The gguf package dequantises the
blocks.
"""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import pack
from jaxft.weights.gguf_header import GgufHeader, GgufTensor
from jaxft.weights.model_files import Index, ModelFiles, QuantisedTensor, full_index
from jaxft.weights.quant_layout import array_index, block_layout
from jaxft.weights.safetensors import map_array

PLAIN_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTISED = {
    "Q8_0": "int8",
    "Q4_0": "int4",
    "Q4_1": "affine4",
}  # and the kind of QTensor with the same values
CHUNK = 2**22  # elements that are dequantised at a time

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in BLOCK_NAMES:
        return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"
    return NAMES.get(name, name)


def open_gguf(header: GgufHeader) -> ModelFiles:
    """Open the tensors of a GGUF file under their Hugging Face names and in that layout."""
    tensors = {_hf_name(name): tensor for name, tensor in header.tensors.items()}
    for name, tensor in header.tensors.items():
        if tensor.kind not in PLAIN_TYPES and tensor.kind not in QUANTISED:
            raise ValueError(
                f"{header.path}: tensor {name} has type {tensor.kind}, but jaxft reads "
                f"{', '.join([*PLAIN_TYPES, *QUANTISED])}; "
                "use a file of this model in one of these types, or its Hugging Face folder"
            )
    heads = {"q_proj": header.required("llama.attention.head_count"), "k_proj": _kv_heads(header)}

    def heads_of(name: str) -> int | None:
        return heads.get(name.split(".")[-2]) if name.count(".") else None

    def read(name: str, index: Index = ()) -> np.ndarray:
        return _read_values(header.path, tensors[name], heads_of(name), index)

    quantised = {}
    for name, tensor in tensors.items():
        if tensor.kind in QUANTISED and len(tensor.shape) == 2:
            layout = _layout(tensor)
            read_blocks = partial(_read_blocks, header.path, tensor, layout, heads_of(name))
            quantised[name] = QuantisedTensor(f"GGUF {tensor.kind}", tensor.shape[::-1], layout, read_blocks)
    return ModelFiles(
        where=str(header.path),
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: PLAIN_TYPES.get(tensor.kind, np.dtype(np.float32)) for name, tensor in tensors.items()},
        read=read,
        quantised=quantised,
    )


def _layout(tensor: GgufTensor) -> QTensor:
    """Q8_0 as int8, Q4_0 as int4, Q4_1 as affine4, in blocks of 32 inputs with the file's float16 scales."""
    kind, (outs, ins) = QUANTISED[tensor.kind], tensor.shape
    offset_dtype = np.float16 if kind == "affine4" else None
    return block_layout(kind, (ins, outs), 32, np.float16, offset_dtype)


def _read_blocks(
    path: Path, tensor: GgufTensor, layout: QTensor, heads: int | None, index: Index = ()
) -> QTensor:
    """Read scales, offsets and codes of part of a tensor. The first 16 codes of a block are the low halves of
    its bytes.
    """
    ins, outs = full_index(index, layout.shape)
    rows, block_size = _whole_heads(outs, tensor.shape[0], heads), tensor.row_bytes // layout.scale.shape[0]
    blocks = array_index(layout, "scale", (ins, outs))[0]
    raw = _read_bytes(path, tensor, rows, slice(blocks.start * block_size, blocks.stop * block_size))
    raw = raw.reshape(len(raw), -1, block_size)
    count = 1 if layout.offset is None else 2  # float16 numbers at the start of a block
    scales = np.ascontiguousarray(raw[..., : 2 * count]).view(np.float16)
    codes = raw[..., 2 * count :]
    codes = codes.view(np.int8) if layout.kind == "int8" else np.concatenate([codes & 15, codes >> 4], -1)

    def by_input(x: np.ndarray) -> np.ndarray:
        return _select_rows(x, rows, outs, tensor.shape[0], heads).T

    flat: Any = by_input(codes.reshape(len(raw), -1))
    return replace(
        layout,
        codes=flat if layout.kind == "int8" else pack(flat),
        scale=by_input(scales[..., 0]),
        offset=None if layout.offset is None else by_input(scales[..., 1]),
    )


def _read_bytes(path: Path, tensor: GgufTensor, rows: slice, columns: slice) -> np.ndarray:
    """Read some bytes of some rows of a tensor [rows, bytes per row]."""
    shape = (math.prod(tensor.shape[:-1]), tensor.row_bytes)
    return map_array(path, np.uint8, tensor.offset, shape, (rows, columns))


def _read_values(path: Path, tensor: GgufTensor, heads: int | None, index: Index) -> np.ndarray:
    """Read part of a tensor, dequantised, in the order of rows of Hugging Face."""
    index = full_index(index, tensor.shape)
    rows = _whole_heads(index[0], tensor.shape[0], heads)
    values = _dequantised(path, tensor, (rows, *index[1:]))
    return _select_rows(values, rows, index[0], tensor.shape[0], heads)


def _dequantised(path: Path, tensor: GgufTensor, index: Index = ()) -> np.ndarray:
    """Read part of a tensor as it is in the file, dequantised a few rows at a time; all of one that is not
    2-D.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if len(tensor.shape) != 2 and index:
        return _dequantised(path, tensor)[index]
    kind = GGMLQuantizationType[tensor.kind]
    *above, ins = full_index(index, tensor.shape)
    block, size = GGML_QUANT_SIZES[kind]
    start, stop = ins.start // block * block, -(-ins.stop // block) * block
    first = above[0].start if len(tensor.shape) == 2 else 0
    shape = [s.stop - s.start for s in above]
    out = np.empty((math.prod(shape), ins.stop - ins.start), PLAIN_TYPES.get(tensor.kind, np.float32))
    step = max(1, CHUNK // tensor.shape[-1])
    columns = slice(start // block * size, stop // block * size)
    for at in range(0, len(out), step):
        part = out[at : at + step]
        raw = _read_bytes(path, tensor, slice(first + at, first + at + len(part)), columns)
        values = raw.view(out.dtype) if tensor.kind in PLAIN_TYPES else dequantize(raw, kind)
        part[:] = values[:, ins.start - start : ins.stop - start]
    return out.reshape(*shape, ins.stop - ins.start)


def _whole_heads(rows: slice, count: int, heads: int | None) -> slice:
    """Return the rows of all heads that contain these of `count` rows; without heads, the same rows."""
    size = count // heads if heads else 1
    return slice(rows.start // size * size, -(-rows.stop // size) * size)


def _select_rows(weight: np.ndarray, read: slice, rows: slice, count: int, heads: int | None) -> np.ndarray:
    """Select `rows` from a weight of which the rows `read` of `count` were read, whole heads in llama.cpp's
    order.
    """
    if heads:
        weight = _unpermute(weight, len(weight) * heads // count)
    return weight[rows.start - read.start : rows.stop - read.start]


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows: it interleaves the two halves that rope rotates together."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _kv_heads(header: GgufHeader) -> int:
    count = header.metadata.get(
        "llama.attention.head_count_kv", header.required("llama.attention.head_count")
    )
    if isinstance(count, list):
        if len(set(count)) != 1:
            raise ValueError(
                f"{header.path}: its layers have different numbers of kv heads {count[:8]}, which is not "
                "supported"
            )
        count = count[0]
    return count


def _short(value: float) -> float:
    """Return a float32 as the shortest decimal that rounds to it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the metadata as the dict of a config.json. Raises ValueError unless it is a plain Llama."""
    path, metadata, required = header.path, header.metadata, header.required
    if required("general.architecture") != "llama" or metadata.get("llama.expert_count", 0):
        what = metadata["general.architecture"] + (
            " with experts" if metadata.get("llama.expert_count", 0) else ""
        )
        raise ValueError(
            f"{path}: its architecture is {what}, but jaxft reads only GGUF files of architecture llama"
        )
    heads, width = required("llama.attention.head_count"), required("llama.embedding_length")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise ValueError(f"{path}: expected whole numbers of heads and width, got {heads!r} and {width!r}")
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        rotated = metadata["llama.rope.dimension_count"]
        raise ValueError(
            f"{path}: rope rotates {rotated} of {head_dim} head dimensions, which is not supported"
        )
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    eos = [
        metadata[key]
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in metadata
    ]
    eos = list(dict.fromkeys(eos))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(header),
        "head_dim": head_dim,
        "intermediate_size": required("llama.feed_forward_length"),
        "max_position_embeddings": required("llama.context_length"),
        "rms_norm_eps": _short(required("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    return config


def _rope_scaling(header: GgufHeader, head_dim: int) -> dict[str, Any] | None:
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _short(header.required("llama.rope.scaling.factor"))}
    if kind != "none":
        raise ValueError(
            f"{header.path}: rope scaling {kind!r} is not supported; jaxft reads none, linear and Llama "
            "3's scaling"
        )
    if "rope_freqs.weight" not in header.tensors:
        return None
    divisors = _dequantised(header.path, header.tensors["rope_freqs.weight"]).astype(np.float64).ravel()
    factor = _short(divisors.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = _short(header.metadata.get("llama.rope.freq_base", 10000.0))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{header.path}: rope_freqs.weight is not Llama 3's scaling (1, 4, 8192), the only table that "
            "is supported"
        )
    return scaling
