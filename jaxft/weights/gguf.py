"""GGUF files of Llama architecture: config, tensors and tokenizer from one file, read without torch.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here (the gguf package's reader
takes seconds for a vocabulary); blocks are expanded by the gguf package.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import pack
from jaxft.weights.quant_layout import form, within
from jaxft.weights.safetensors import Index, Packed, Range, Tensors, read_range, spans

SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
PACKED = ("Q8_0", "Q4_0", "Q4_1")
CHUNK = 2**22  # elements expanded at a time

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


@dataclass(frozen=True)
class Info:
    """A tensor in the file: its type's name, shape (rows first), bytes a row and where it starts."""

    kind: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Info]

    def need(self, key: str) -> Any:
        """A metadata value that has to be there; ValueError names it."""
        if key not in self.metadata:
            raise ValueError(
                f"{self.path}: metadata {key} is missing, so this file can't be read as a Llama model"
            )
        return self.metadata[key]


class _Cursor:
    """Reads values from a buffer in order; runs past the end with ValueError."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("it ends inside its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > 4:
            raise ValueError(f"a metadata value has unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in SCALARS:
            return np.frombuffer(
                self.take(count * np.dtype(SCALARS[inner]).itemsize), SCALARS[inner]
            ).tolist()
        if count > len(self.data) - self.at:
            raise ValueError("it ends inside its header")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(path: Path) -> Header:
    """Metadata and tensor table of a GGUF file, every tensor checked against the file's size. ValueError names the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _parse(_Cursor(data), len(data))
    except (ValueError, OverflowError, struct.error) as e:
        raise ValueError(f"{path}: not a complete GGUF file: {e}; download it again") from e
    return Header(path, metadata, tensors)


def _parse(cursor: _Cursor, total: int) -> tuple[dict[str, Any], dict[str, Info]]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version:#x}, and little-endian versions 2 and 3 are read")
    count, pairs = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("<I"))
    listed = []
    for _ in range(count):
        name, rank = cursor.text(), cursor.number("<I")
        if rank > 4:
            raise ValueError(f"tensor {name[:100]} has {rank} dimensions")
        listed.append(
            (
                name,
                struct.unpack(f"<{rank}Q", cursor.take(8 * rank)),
                cursor.number("<I"),
                cursor.number("<Q"),
            )
        )
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError(f"its alignment is {align}")
    start = -(-cursor.at // align) * align
    tensors = {}
    for name, dims, code, offset in listed:
        try:
            kind = GGMLQuantizationType(code)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as e:
            raise ValueError(f"tensor {name} has type {code}, which this gguf package does not know") from e
        shape = tuple(reversed(dims)) or (1,)
        info = Info(kind.name, shape, shape[-1] // block * size, start + offset)
        end = info.offset + math.prod(shape[:-1]) * info.row_bytes
        if shape[-1] % block or end > total:
            raise ValueError(f"tensor {name} {shape} ends at byte {end}, the file has {total}")
        tensors[name] = info
    return metadata, tensors


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in BLOCK_NAMES:
        return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"
    return NAMES.get(name, name)


def open_file(header: Header) -> Tensors:
    """The tensors under their Hugging Face names and in their layout; packed types expanded to float32, or as they are."""
    infos = {_hf_name(name): info for name, info in header.tensors.items()}
    for name, info in header.tensors.items():
        if info.kind not in PLAIN and info.kind not in PACKED:
            raise ValueError(
                f"{header.path}: tensor {name} has type {info.kind}; jaxft reads {', '.join([*PLAIN, *PACKED])}: "
                "use such a file of this model, or its Hugging Face folder"
            )
    heads = {"q_proj": header.need("llama.attention.head_count")}
    heads["k_proj"] = _kv_heads(header)

    def heads_of(name: str) -> int | None:
        return heads.get(name.split(".")[-2]) if name.count(".") else None

    def packed(name: str, info: Info) -> Packed:
        want = _form(info)
        read = partial(_packed, header.path, info, want, heads_of(name))
        return Packed(f"GGUF {info.kind}", (info.shape[1], info.shape[0]), want, read)

    return Tensors(
        where=str(header.path),
        shapes={name: info.shape for name, info in infos.items()},
        dtypes={name: PLAIN.get(info.kind, np.dtype(np.float32)) for name, info in infos.items()},
        read=lambda name, index=(): _read(header.path, infos[name], heads_of(name), index),
        packed={
            name: packed(name, info)
            for name, info in infos.items()
            if info.kind in PACKED and len(info.shape) == 2
        },
    )


def _form(info: Info) -> QTensor:
    """Q8_0 as int8, Q4_0 as int4, Q4_1 as affine4, in blocks of 32 inputs with the file's float16 scales."""
    kind = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "affine4"}[info.kind]
    return form(kind, info.shape[1], info.shape[0], 32, np.float16, np.float16 if kind == "affine4" else None)


def _packed(path: Path, info: Info, want: QTensor, heads: int | None, index: Index = ()) -> QTensor:
    """The blocks of part of a tensor taken apart: scales, offsets, codes; each row's first 16 codes of a block are the low
    halves."""
    ins, outs = spans(index, want.shape)
    rows, size = _whole_heads(outs, info.shape[0], heads), info.row_bytes // want.scale.shape[0]
    blocks = within(want, "scale", (ins, outs))[0]
    raw = _raw(path, info, rows, slice(blocks.start * size, blocks.stop * size))
    raw = raw.reshape(len(raw), -1, size)
    numbers, body = (2 if want.offset is not None else 1), 2 if want.offset is None else 4
    scales = np.ascontiguousarray(raw[..., : 2 * numbers]).view(np.float16)
    codes = raw[..., body:]
    codes = codes.view(np.int8) if want.kind == "int8" else np.concatenate([codes & 15, codes >> 4], -1)
    by_input = lambda x: _own_rows(x, rows, outs, info.shape[0], heads).T  # noqa: E731
    flat: Any = by_input(codes.reshape(len(raw), -1))
    return replace(
        want,
        codes=flat if want.kind == "int8" else pack(flat),
        scale=by_input(scales[..., 0]),
        offset=None if want.offset is None else by_input(scales[..., 1]),
    )


def _raw(path: Path, info: Info, rows: slice, some: slice = slice(None)) -> np.ndarray:
    """Some bytes of some rows of a tensor [rows, bytes a row]."""
    shape = (math.prod(info.shape[:-1]), info.row_bytes)
    return read_range(path, "a tensor", Range(np.dtype(np.uint8), shape, info.offset), (rows, some))


def _read(path: Path, info: Info, heads: int | None, index: Index) -> np.ndarray:
    """Part of a tensor's numbers."""
    at = spans(index, info.shape)
    rows = _whole_heads(at[0], info.shape[0], heads)
    return _own_rows(_expand(path, info, (rows, *at[1:])), rows, at[0], info.shape[0], heads)


def _expand(path: Path, info: Info, index: Index = ()) -> np.ndarray:
    """Part of a tensor as it lies in the file, read and expanded a few rows at a time; of more than two axes the whole."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if len(info.shape) != 2 and index:
        return _expand(path, info)[index]
    kind = GGMLQuantizationType[info.kind]
    *above, ins = spans(index, info.shape)
    block, size = GGML_QUANT_SIZES[kind]
    start, stop = ins.start // block * block, -(-ins.stop // block) * block
    first = above[0].start if len(info.shape) == 2 else 0
    lengths = [cut.stop - cut.start for cut in above]
    out = np.empty((math.prod(lengths), ins.stop - ins.start), PLAIN.get(info.kind, np.float32))
    step = max(1, CHUNK // info.shape[-1])
    for at in range(0, len(out), step):
        part = out[at : at + step]
        raw = _raw(
            path,
            info,
            slice(first + at, first + at + len(part)),
            slice(start // block * size, stop // block * size),
        )
        values = raw.view(out.dtype) if info.kind in PLAIN else dequantize(raw, kind)
        part[:] = values[:, ins.start - start : ins.stop - start]
    return out.reshape(*lengths, ins.stop - ins.start)


def _whole_heads(rows: slice, count: int, heads: int | None) -> slice:
    """The rows of the heads in which these rows of `count` are; these rows where there are no heads."""
    size = count // heads if heads else 1
    return slice(rows.start // size * size, -(-rows.stop // size) * size)


def _own_rows(weight: np.ndarray, held: slice, rows: slice, count: int, heads: int | None) -> np.ndarray:
    """Rows of a weight of `count` of which `held` are there, whole heads in llama.cpp's order."""
    if heads:
        weight = _unpermute(weight, len(weight) * heads // count)
    return weight[rows.start - held.start : rows.stop - held.start]


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows: it interleaves the two halves that rope rotates together."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _kv_heads(header: Header) -> int:
    count = header.metadata.get("llama.attention.head_count_kv", header.need("llama.attention.head_count"))
    if isinstance(count, list):
        if len(set(count)) != 1:
            raise ValueError(
                f"{header.path}: layers differ in their number of kv heads {count[:8]}, which is not supported"
            )
        count = count[0]
    return count


def _short(value: float) -> float:
    """A float32 as the shortest decimal that rounds to it: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_config(header: Header) -> dict[str, Any]:
    """The metadata as the dict of a config.json. ValueError where the file is no plain Llama."""
    path, metadata, need = header.path, header.metadata, header.need
    if need("general.architecture") != "llama" or metadata.get("llama.expert_count", 0):
        what = metadata["general.architecture"] + (
            " with experts" if metadata.get("llama.expert_count", 0) else ""
        )
        raise ValueError(f"{path}: its architecture is {what}; jaxft reads GGUF files of architecture llama")
    heads, width = need("llama.attention.head_count"), need("llama.embedding_length")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise ValueError(f"{path}: wanted whole numbers of heads and width, found {heads!r} and {width!r}")
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        turned = metadata["llama.rope.dimension_count"]
        raise ValueError(f"{path}: rope turns {turned} of {head_dim} head dimensions, which is not supported")
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
        "num_hidden_layers": need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(header),
        "head_dim": head_dim,
        "intermediate_size": need("llama.feed_forward_length"),
        "max_position_embeddings": need("llama.context_length"),
        "rms_norm_eps": _short(need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    return config


def _rope_scaling(header: Header, head_dim: int) -> dict[str, Any] | None:
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _short(header.need("llama.rope.scaling.factor"))}
    if kind != "none":
        raise ValueError(
            f"{header.path}: rope scaling {kind!r} is not supported; jaxft reads none, linear and Llama 3's"
        )
    if "rope_freqs.weight" not in header.tensors:
        return None
    divisors = _expand(header.path, header.tensors["rope_freqs.weight"]).astype(np.float64).ravel()
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
            f"{header.path}: rope_freqs.weight is not Llama 3's scaling (1, 4, 8192), the only such table supported"
        )
    return scaling
