"""bitsandbytes: 4-bit weights (nf4, fp4), read and written, and 8-bit ones, read.

A 4-bit weight has flat codes and blocks along the flattened [out, in], the first code of a byte in its high
bits; its quant_state is JSON in a uint8 tensor. An 8-bit weight is int8 with a scale `SCB` for each output
channel.
"""

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.nn import quant_formats as qf
from jaxft.nn.quant import QTensor, Quant
from jaxft.weights.hf.safetensors import SafetensorsFiles, read_tensor, read_view, required
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.tensors import Index, QuantisedTensor

_NAME = "bitsandbytes"
TABLES = {"nf4": qf.NF4, "fp4": qf.FP4}
STATE = ".quant_state.bitsandbytes__"
SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")  # after the weight's name


def _open(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    """Open 4-bit weights, which have a quant_state tensor, and 8-bit weights, which have scales SCB."""
    weights = {}
    for name in files.tensors:
        weight, mark, kind = name.partition(STATE)
        if mark:
            weights[weight] = _open_4bit(files, weight, kind)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            weights[weight] = _open_8bit(files, weight, name)
    return weights


class _Weight4Bit(NamedTuple):
    """A 4-bit weight [outs, ins] in the files. blocks: number of its blocks. state: parsed quant_state."""

    files: SafetensorsFiles
    name: str
    outs: int
    ins: int
    blocks: int
    state: dict[str, Any]

    def read(self, ending: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Read the tensor of the weight whose name has this ending, such as .absmax."""
        return read_tensor(self.files, self.name + ending, (), shape)


def _open_4bit(files: SafetensorsFiles, name: str, kind: str) -> QuantisedTensor:
    """Open a 4-bit weight in the smallest layout that represents it. kind: nf4 or fp4."""
    state = _read_state(files, name + STATE + kind)
    (outs, ins), block, nested = state["shape"], state["blocksize"], "nested_offset" in state
    weight = _Weight4Bit(files, name, outs, ins, -(-outs * ins // block), state)
    tensors = frozenset(name + ending for ending in ("", STATE + kind, *SCALES))
    table = weight.read(".quant_map", (16,))
    reason = "" if np.array_equal(table, TABLES[kind]) else f"its quant_map is not the table of {kind}"
    if ins % block and not reason:
        reason = f"its blocks of {block} run across its rows of {ins}"
    if reason:
        return QuantisedTensor(
            _NAME, (ins, outs), None, partial(_read_floats, weight, table), reason, tensors
        )
    layout = ff.block_layout(kind, (ins, outs), block, np.float32)
    double = nested and state["nested_blocksize"] == qf.GROUP
    if double and np.array_equal(weight.read(".nested_quant_map", (256,)), qf.DYNAMIC):
        layout = replace(
            layout,
            scale=jax.ShapeDtypeStruct(layout.scale.shape, np.uint8),
            outer=jax.ShapeDtypeStruct((-(-weight.blocks // qf.GROUP),), np.float32),
            mean=jax.ShapeDtypeStruct((), np.float32),
        )
    elif nested:
        reason = (
            "its nested_quant_map is not bitsandbytes' dynamic map in groups of 256, so its scales are "
            "stored in float32"
        )
    return ff.quantised_tensor(_NAME, tensors, layout, partial(_decode_4bit, weight, layout), reason)


def _decode_4bit(weight: _Weight4Bit, layout: QTensor, index: Index) -> dict[str, Any]:
    in_codes, in_scale = (ff.array_index(layout, array, index) for array in ("codes", "scale"))
    codes = _read_bytes(weight, (weight.outs, weight.ins // 2), in_codes[::-1]).T
    nested = layout.outer is not None
    scale = weight.read(".absmax", (weight.blocks,)) if nested else _decoded_scales(weight)
    arrays = {"codes": codes, "scale": scale.reshape(layout.scale.shape[::-1]).T[in_scale]}
    if nested:
        arrays["outer"] = weight.read(".nested_absmax", layout.outer.shape)
        arrays["mean"] = np.asarray(weight.state["nested_offset"], np.float32)
    return arrays


def _read_floats(weight: _Weight4Bit, table: np.ndarray, index: Index = ()) -> np.ndarray:
    """Return the full weight [in, out] in float32; `index` is ignored. table: values of the 16 codes."""
    count = weight.outs * weight.ins
    pairs = _read_bytes(weight, (-(-count // 2),))
    codes = np.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[:count]
    scales = np.repeat(_decoded_scales(weight), weight.state["blocksize"])[:count]
    return (table[codes] * scales).reshape(weight.outs, weight.ins).T


def _read_bytes(weight: _Weight4Bit, shape: tuple[int, ...], index: Index = ()) -> np.ndarray:
    """Read the part at `index` of the codes as uint8 of this shape; the files may store them as floats."""
    tensor, where = required(weight.files, weight.name), weight.files.where
    size, needed = math.prod(tensor.shape) * tensor.dtype.itemsize, math.prod(shape)
    if size != needed:
        raise ValueError(
            f"{where}: {weight.name} has {size} bytes, but its quant_state needs {needed}; download it again"
        )
    return read_view(tensor, np.uint8, shape, index)


def _decoded_scales(weight: _Weight4Bit) -> np.ndarray:
    """Read the scales of all blocks in float32."""
    state, absmax = weight.state, weight.read(".absmax", (weight.blocks,))
    if "nested_offset" not in state:
        return absmax.astype(np.float32)
    outer = np.repeat(weight.read(".nested_absmax"), state["nested_blocksize"])[: weight.blocks]
    return weight.read(".nested_quant_map", (256,))[absmax] * outer + np.float32(state["nested_offset"])


def _read_state(files: SafetensorsFiles, name: str) -> dict[str, Any]:
    kind = name.rpartition("__")[2]
    try:
        state = json.loads(read_tensor(files, name).tobytes())
        outs, ins = state["shape"]
        sizes = [outs, ins, state["blocksize"]]
        sizes += [state["nested_blocksize"]] if "nested_offset" in state else []
        if kind not in TABLES or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"{kind} with {sizes}")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{files.where}: {name} is not the state of a 4-bit weight ({e}); download it again"
        ) from e
    return state


def _open_8bit(files: SafetensorsFiles, weight: str, scales: str) -> QuantisedTensor:
    outs, ins = ff.matrix_shape(files, weight, np.int8)
    layout = ff.block_layout("int8", (ins, outs), None, np.float32)

    def decode(index: Index) -> dict[str, Any]:
        scale = read_tensor(files, scales, index[1:], (outs,)).astype(np.float32) * np.float32(1 / 127)
        return {"codes": read_tensor(files, weight, index[::-1]).T, "scale": scale[None]}

    return ff.quantised_tensor(_NAME, (weight, scales, f"{weight}_format"), layout, decode)


def _write(name: str, layout: QTensor) -> list[ff.WrittenTensor]:
    (ins, outs), pairs, blocks = layout.shape, math.prod(layout.codes.shape), math.prod(layout.scale.shape)
    state: dict[str, Any] = {"quant_type": layout.kind, "blocksize": layout.block, "dtype": "bfloat16",
                             "shape": [outs, ins]}  # fmt: skip
    offset_size, scale_dtype = 0, layout.scale.dtype
    nested: list[ff.WrittenTensor] = []
    if layout.outer is not None:
        state |= {"nested_blocksize": qf.GROUP, "nested_dtype": "float32"}
        offset_size = len('"nested_offset": , ') + 24  # room for a value that is known later
        nested = [
            ff.WrittenTensor(f"{name}.nested_absmax", np.float32, layout.outer.shape, lambda q: q.outer),
            ff.WrittenTensor(f"{name}.nested_quant_map", np.float32, (256,), lambda q: qf.DYNAMIC),
        ]
    size = len(json.dumps(state)) + offset_size

    def state_bytes(q: QTensor) -> np.ndarray:
        full = state if q.outer is None else {**state, "nested_offset": float(q.mean)}
        return np.frombuffer(json.dumps(full).ljust(size).encode(), np.uint8)

    return [
        ff.WrittenTensor(name, np.uint8, (pairs, 1), lambda q: np.asarray(q.codes).T.reshape(pairs, 1)),
        ff.WrittenTensor(
            f"{name}.absmax", scale_dtype, (blocks,), lambda q: np.asarray(q.scale).T.reshape(blocks)
        ),
        ff.WrittenTensor(f"{name}.quant_map", np.float32, (16,), lambda q: TABLES[q.kind]),
        *nested,
        ff.WrittenTensor(f"{name}{STATE}{layout.kind}", np.uint8, (size,), state_bytes),
    ]


def _config(quant: Quant, plain: list[str], packed: list[str]) -> ff.QuantConfig:
    return {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant.kind,
        "bnb_4bit_use_double_quant": quant.double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }


BITSANDBYTES = ff.FileFormat(
    _NAME,
    _open,
    kinds=tuple(TABLES),
    summary=f"{_NAME}' layout, which vLLM loads, and transformers with {_NAME} installed",
    write=_write,
    config=_config,
)
