"""bitsandbytes' layout of quantised weights: 4-bit (nf4, fp4) and 8-bit ones read, 4-bit ones written.

A 4-bit weight has flat codes and blocks along the flattened [out, in], the first code of a byte in its high
bits; its quant_state is JSON in a uint8 tensor. An 8-bit weight is int8 with a scale `SCB` for each output
channel.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft.nn import quant_formats as qf
from jaxft.nn.quant import QTensor
from jaxft.weights import safetensors
from jaxft.weights.model_files import Index, QuantisedTensor, full_index
from jaxft.weights.quant_layout import array_index, block_layout
from jaxft.weights.quantised_tensors import Found, read_part, require_tensor
from jaxft.weights.safetensors import SafetensorsFiles, TensorToWrite

TABLES = {"nf4": qf.NF4, "fp4": qf.FP4}
STATE = ".quant_state.bitsandbytes__"


def find_bitsandbytes(files: SafetensorsFiles, settings: dict[str, Any]) -> Found:
    """Find the 4-bit weights, which have a quant_state, and the 8-bit weights, which have an SCB."""
    found, consumed = {}, set()
    parts: dict[str, list[str]] = {}
    for name in files.shapes:
        weight, dot, _ = name.partition(".weight.")
        if dot:
            parts.setdefault(f"{weight}.weight", []).append(name)
    for name in files.shapes:
        weight, mark, kind = name.partition(STATE)
        if mark:
            found[weight] = _find_4bit(files, weight, kind)
            consumed |= {weight, *parts[weight]}
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = _find_8bit(files, weight, name)
            consumed |= {weight, name, f"{weight}_format"}
    return found, consumed


@dataclass(frozen=True)
class _Weight4Bit:
    """A 4-bit weight `name` [outs, ins] in the files. blocks: number of blocks. state: its quant_state."""

    files: SafetensorsFiles
    name: str
    outs: int
    ins: int
    blocks: int
    state: dict[str, Any]

    @property
    def nested(self) -> bool:
        """Whether its scales are quantised."""
        return "nested_offset" in self.state


def _find_4bit(files: SafetensorsFiles, name: str, kind: str) -> QuantisedTensor:
    """Return a 4-bit weight in the smallest layout that represents it."""
    state = _read_state(files, f"{name}{STATE}{kind}")
    (outs, ins), block = state["shape"], state["blocksize"]
    weight = _Weight4Bit(files, name, outs, ins, -(-outs * ins // block), state)
    tensor = partial(QuantisedTensor, "bitsandbytes", (ins, outs))
    table = read_part(files, f"{name}.quant_map", (16,))
    if not np.array_equal(table, TABLES[kind]):
        return tensor(None, partial(_read_floats, weight, table), f"its quant_map is not that of {kind}")
    if ins % block:
        reason = f"its blocks of {block} run across its rows of {ins}"
        return tensor(None, partial(_read_floats, weight, table), reason)
    layout = block_layout(kind, (ins, outs), block, np.float32)
    double = weight.nested and state["nested_blocksize"] == qf.GROUP
    if not double or not np.array_equal(read_part(files, f"{name}.nested_quant_map", (256,)), qf.DYNAMIC):
        reason = (
            "its nested_quant_map is not bitsandbytes' dynamic map in groups of 256, so its scales are "
            "stored in float32"
        )
        return tensor(layout, partial(_read_float_scales, weight, layout), reason if weight.nested else "")
    layout = replace(
        layout,
        scale=jax.ShapeDtypeStruct(layout.scale.shape, np.uint8),
        outer=jax.ShapeDtypeStruct((-(-weight.blocks // qf.GROUP),), np.float32),
        mean=jax.ShapeDtypeStruct((), np.float32),
    )
    return tensor(layout, partial(_read_quantised_scales, weight, layout))


def _read_floats(weight: _Weight4Bit, table: np.ndarray, index: Index = ()) -> np.ndarray:
    """Dequantise all of a weight that no QTensor represents."""
    count = weight.outs * weight.ins
    found = _read_bytes(weight, (-(-count // 2),))
    codes = np.stack([found >> 4, found & 15], -1).reshape(-1)[:count]
    scales = np.repeat(_decoded_scales(weight), weight.state["blocksize"])[:count]
    return (table[codes] * scales).reshape(weight.outs, weight.ins).T


def _read_float_scales(weight: _Weight4Bit, layout: QTensor, index: Index = ()) -> QTensor:
    index = full_index(index, layout.shape)
    if weight.nested:
        scales = _decoded_scales(weight).reshape(weight.outs, -1).T[array_index(layout, "scale", index)]
    else:
        scales = _read_absmax(weight, layout, index).astype(np.float32)
    return replace(layout, codes=_read_codes(weight, layout, index), scale=scales)


def _read_quantised_scales(weight: _Weight4Bit, layout: QTensor, index: Index = ()) -> QTensor:
    index = full_index(index, layout.shape)
    return replace(
        layout,
        codes=_read_codes(weight, layout, index),
        scale=_read_absmax(weight, layout, index),
        outer=read_part(weight.files, f"{weight.name}.nested_absmax", layout.outer.shape),
        mean=np.asarray(weight.state["nested_offset"], np.float32),
    )


def _read_codes(weight: _Weight4Bit, layout: QTensor, index: Index) -> np.ndarray:
    return _read_bytes(weight, (weight.outs, weight.ins // 2), array_index(layout, "codes", index)[::-1]).T


def _read_bytes(weight: _Weight4Bit, shape: tuple[int, ...], index: Index = ()) -> np.ndarray:
    """Read part of the codes as bytes of this shape; bnb_4bit_quant_storage may store them as floats."""
    files, name = weight.files, weight.name
    size = math.prod(files.shapes[name]) * files.dtypes[name].itemsize if name in files.shapes else 0
    if size != math.prod(shape):
        raise ValueError(f"{files.where}: {name} has {size} bytes, its quant_state needs {math.prod(shape)}")
    return safetensors.read_view(files, name, np.uint8, shape, index)


def _read_absmax(weight: _Weight4Bit, layout: QTensor, index: Index) -> np.ndarray:
    """Read the scales [blocks of inputs, out] of a part, quantised or not."""
    name = f"{weight.name}.absmax"
    require_tensor(weight.files, name, (weight.blocks,))
    rows = (weight.outs, weight.blocks // weight.outs)
    in_file = array_index(layout, "scale", index)[::-1]
    return safetensors.read_view(weight.files, name, weight.files.dtypes[name], rows, in_file).T


def _decoded_scales(weight: _Weight4Bit) -> np.ndarray:
    """Read the scales of all blocks in float32."""
    files, name, state = weight.files, weight.name, weight.state
    absmax = read_part(files, f"{name}.absmax", (weight.blocks,))
    if not weight.nested:
        return absmax.astype(np.float32)
    outer = np.repeat(read_part(files, f"{name}.nested_absmax"), state["nested_blocksize"])[: weight.blocks]
    table = read_part(files, f"{name}.nested_quant_map", (256,))
    return table[absmax] * outer + np.float32(state["nested_offset"])


def _read_state(files: SafetensorsFiles, name: str) -> dict[str, Any]:
    kind = name.rpartition("__")[2]
    try:
        state = json.loads(read_part(files, name).tobytes())
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


def _find_8bit(files: SafetensorsFiles, weight: str, scales: str) -> QuantisedTensor:
    outs, ins = files.shapes[weight]
    layout = block_layout("int8", (ins, outs), None, np.float32)
    return QuantisedTensor(
        "bitsandbytes", (ins, outs), layout, partial(_read_8bit, files, weight, scales, layout)
    )


def _read_8bit(
    files: SafetensorsFiles, weight: str, scales: str, layout: QTensor, index: Index = ()
) -> QTensor:
    if files.dtypes[weight] != np.int8:
        raise ValueError(
            f"{files.where}: {weight} is {files.dtypes[weight]}, expected int8 because it has an SCB"
        )
    index = full_index(index, layout.shape)
    scale = read_part(files, scales, layout.shape[1:], index[1:]).astype(np.float32) * np.float32(1 / 127)
    return replace(layout, codes=read_part(files, weight, None, index[::-1]).T, scale=scale[None])


def tensors_of_4bit(name: str, layout: QTensor, make: Callable[[], QTensor]) -> list[TensorToWrite]:
    """Return the tensors of a 4-bit weight `name`. make: called for each of them, returns the weight on the
    host.
    """
    ins, outs = layout.shape
    blocks = math.prod(layout.scale.shape)
    state: dict[str, Any] = {
        "quant_type": layout.kind,
        "blocksize": layout.block,
        "dtype": "bfloat16",
        "shape": [outs, ins],
    }

    def by_channel(x: Any) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(x).T).reshape(-1)

    f32, u8 = np.dtype(np.float32), np.dtype(np.uint8)
    scale_dtype = np.dtype(layout.scale.dtype)
    tensors = [
        TensorToWrite(name, u8, (ins * outs // 2, 1), lambda: by_channel(make().codes)[:, None]),
        TensorToWrite(f"{name}.absmax", scale_dtype, (blocks,), lambda: by_channel(make().scale)),
        TensorToWrite(f"{name}.quant_map", f32, (16,), lambda: TABLES[layout.kind]),
    ]
    offset_size = 0
    if layout.outer is not None:
        state |= {"nested_blocksize": qf.GROUP, "nested_dtype": "float32"}
        offset_size = len('"nested_offset": , ') + 24  # its value is known when the weight is
        tensors += [
            TensorToWrite(f"{name}.nested_absmax", f32, layout.outer.shape, lambda: np.asarray(make().outer)),
            TensorToWrite(f"{name}.nested_quant_map", f32, (256,), lambda: qf.DYNAMIC),
        ]
    size = len(json.dumps(state)) + offset_size

    def state_bytes() -> np.ndarray:
        full = state if layout.outer is None else {**state, "nested_offset": float(make().mean)}
        return np.frombuffer(json.dumps(full).ljust(size).encode(), np.uint8)

    return [*tensors, TensorToWrite(f"{name}{STATE}{layout.kind}", u8, (size,), state_bytes)]
