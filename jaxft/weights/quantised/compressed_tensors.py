"""compressed-tensors and the FP8 of DeepSeek: E4M3, int8 or int4 numbers with scales; read and written.

Read: scales per tensor, output channel, group of inputs or block. Written, as compressed-tensors: scales per
channel or group. `quant_method` of DeepSeek's layout is "fp8".
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor, Quant
from jaxft.nn.quant_formats import E4M3, pack, unpack
from jaxft.weights.hf.safetensors import FLOATS, SafetensorsFiles, read_tensor
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.quantised.gptq_awq import pack_eights, read_eights
from jaxft.weights.tensors import Index, QuantisedTensor

BlocksOf = Callable[[int, int], tuple[int, int]]  # the outputs and inputs per scale of a weight [out, in]
STATIC_SCALES = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
# The names and dtypes of the numbers of each kind; int4 has eight in an int32.
NUMBER_NAMES = {"fp8": ".weight", "int8": ".weight", "int4": ".weight_packed"}
NUMBER_DTYPES = {"fp8": np.dtype(E4M3), "int8": np.dtype(np.int8), "int4": np.dtype(np.int32)}


def _open_fp8(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    scheme, block = settings.get("activation_scheme", "dynamic"), settings.get("weight_block_size")
    if scheme != "dynamic":
        raise not_read(files.where, f"fp8 weights with activation_scheme={scheme!r}", "dynamic")
    sizes = None if block is None else block_sizes(files.where, "weight_block_size", block)
    return _scaled_weights(files, "fp8", "fp8", ".weight_scale_inv", lambda *shape: sizes or shape)


# Shared by both


def not_read(where: str, weights: str, readable: str) -> ValueError:
    """Return the error for weights that jaxft does not read."""
    return ValueError(f"{where}: {weights}, but jaxft reads {readable}; use the model's unquantised weights")


def block_sizes(where: str, name: str, value: Any) -> tuple[int, int]:
    """Return a setting that is a pair of positive integers. Raises ValueError for others."""
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"{where}: {name} in quantization_config is {value!r}, expected numbers of outputs and inputs"
        )
    return sizes[0], sizes[1]


def _scaled_weights(
    files: SafetensorsFiles, format: str, kind: str, ending: str, blocks_of: BlocksOf
) -> ff.Weights:
    """Open the weights of a format by the `ending` of the names of their scales. kind: fp8, int8 or int4."""
    static = next((name for name in files.tensors if name.endswith(STATIC_SCALES)), None)
    if static:
        raise not_read(files.where, f"{static} is a calibrated scale of activations", "dynamic ones")
    weights = {
        f"{stem}.weight": _scaled_weight(files, format, kind, stem + ending, blocks_of)
        for stem in ff.stems(files, ending)
    }
    used = {name for weight in weights.values() for name in weight.tensors}
    bare = next((n for n, x in files.tensors.items() if x.dtype == E4M3 and n not in used), None)
    if bare:
        raise ValueError(
            f"{files.where}: {bare} is FP8 without {ending.removeprefix('.')}; is the download complete?"
        )
    return weights


def _scaled_weight(
    files: SafetensorsFiles, format: str, kind: str, scales: str, blocks_of: BlocksOf
) -> QuantisedTensor:
    stem = scales.rpartition(".")[0]
    numbers, given = stem + NUMBER_NAMES[kind], files.tensors[scales]
    outs, ins = ff.matrix_shape(files, numbers, NUMBER_DTYPES[kind])
    ins *= 8 if kind == "int4" else 1
    rows, columns = blocks_of(outs, ins)
    grid = -(-outs // rows), -(-ins // columns)
    if given.dtype not in FLOATS.values():
        raise ValueError(
            f"{files.where}: the dtype of {scales} is not one of {', '.join(FLOATS)}; convert it"
        )
    alike = grid, grid[:1] if grid[1] == 1 else grid, () if grid == (1, 1) else grid
    if given.shape not in alike:
        raise ValueError(f"{files.where}: {scales} has shape {given.shape}, expected {grid}")
    layout = ff.block_layout(kind, (ins, outs), None if columns >= ins else columns, np.float32)

    def decode(index: Index) -> dict[str, Any]:
        if kind == "int4":
            codes: Any = pack(read_eights(files, numbers, (outs, ins), 1, index[::-1]).T)
        else:
            codes = read_tensor(files, numbers, index[::-1]).T.view(layout.codes.dtype)
        if kind == "fp8" and (codes & np.uint8(0x7F) == np.uint8(0x7F)).any():
            raise ValueError("it has NaN; repair the file, or download it again")
        scale = read_tensor(files, scales).astype(np.float32).reshape(grid)
        of_outputs = scale[np.arange(index[1].start, index[1].stop) // rows].T
        return {"codes": codes, "scale": of_outputs[ff.array_index(layout, "scale", index)[0]]}

    return ff.quantised_tensor(format, (numbers, scales, f"{stem}.weight_shape"), layout, decode)


FINE_GRAINED_FP8 = ff.FileFormat("fp8", _open_fp8)


# compressed-tensors

_NAME = "compressed-tensors"
FORMATS_OF_KINDS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
# QuantConfig of the weights, with the defaults. Others are facts about how they were rounded.
_DEFAULTS = {"num_bits": None, "type": None, "symmetric": True, "dynamic": False, "actorder": None,
            "strategy": None, "group_size": None, "block_structure": None}  # fmt: skip


def _open(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    where, format, weights = files.where, settings.get("format"), _common_weights(files.where, settings)
    kind = next((kind for kind, name in FORMATS_OF_KINDS.items() if name == format), None)
    if kind is None:
        raise not_read(where, f"{_NAME} weights with format={format!r}", ", ".join(FORMATS_OF_KINDS.values()))
    if settings.get("kv_cache_scheme") is not None:
        raise ValueError(
            f"{where}: {_NAME} with kv_cache_scheme, whose scales of keys and values jaxft does not read; "
            "use the model without a quantised cache"
        )
    for key, value in {**_numbers(kind), "dynamic": False, "actorder": None}.items():
        if weights[key] != value:
            stated = f"{_NAME} weights of format {format} with {key}={weights[key]!r}"
            raise not_read(where, stated, f"{key}={value!r}")
    strategy, sizes = weights["strategy"], None
    if strategy == "block":
        sizes = block_sizes(where, "block_structure", weights["block_structure"])
    elif strategy == "group":
        sizes = block_sizes(where, "group_size", (1, weights["group_size"]))
    elif strategy not in ("tensor", "channel"):
        readable = "tensor, channel, group and block"
        raise not_read(where, f"{_NAME} weights with strategy={strategy!r}", readable)

    def blocks_of(outs: int, ins: int) -> tuple[int, int]:
        return sizes or (outs if strategy == "tensor" else 1, ins)

    return _scaled_weights(files, _NAME, kind, ".weight_scale", blocks_of)


def _common_weights(where: str, settings: ff.QuantConfig) -> dict[str, Any]:
    """Return the settings of the weights, which all groups of layers must have in common."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(s, dict) and isinstance(s.get("weights"), dict) for s in schemes):
        raise ValueError(
            f"{where}: {_NAME} without weights in config_groups of quantization_config; "
            "use the model's unquantised weights"
        )
    for scheme in schemes:
        activations = scheme.get("input_activations") or {}
        static = isinstance(activations, dict) and activations and activations.get("dynamic") is not True
        if static or scheme.get("output_activations"):
            raise not_read(where, f"{_NAME} with calibrated scales of activations", "dynamic ones")
    first, *others = ({key: scheme["weights"].get(key) for key in _DEFAULTS} for scheme in schemes)
    if any(other != first for other in others):
        stated = f"{_NAME} with {len(schemes)} groups of layers whose weights differ in their format"
        raise not_read(where, stated, "one")
    return {key: _DEFAULTS[key] if value is None else value for key, value in first.items()}


def _numbers(kind: str) -> dict[str, Any]:
    bits, number = 4 if kind == "int4" else 8, "float" if kind == "fp8" else "int"
    return {"num_bits": bits, "type": number, "symmetric": True}


def _write(name: str, layout: QTensor) -> list[ff.WrittenTensor]:
    (ins, outs), (blocks, _), kind = layout.shape, layout.scale.shape, layout.kind
    stem, dtype, shape = name.removesuffix(".weight"), NUMBER_DTYPES[kind], np.array([outs, ins], np.int64)
    scale = ff.WrittenTensor(f"{name}_scale", layout.scale.dtype, (outs, blocks), lambda q: q.scale.T)
    if kind != "int4":
        return [
            ff.WrittenTensor(name, dtype, (outs, ins), lambda q: np.asarray(q.codes).T.view(dtype)),
            scale,
        ]
    return [
        ff.WrittenTensor(
            stem + NUMBER_NAMES[kind], dtype, (outs, ins // 8), lambda q: pack_eights(unpack(q.codes).T, 1)
        ),
        scale,
        ff.WrittenTensor(f"{name}_shape", shape.dtype, shape.shape, lambda q: shape),
    ]


def _config(quant: Quant, plain: list[str], packed: list[str]) -> ff.QuantConfig:
    """fp8 for matmuls in FP8 with a scale per token, int8 and int4 for activations in 16 bits."""
    numbers = _numbers(quant.kind)
    grouped = {"strategy": "group", "group_size": quant.block} if quant.block else {"strategy": "channel"}
    token = {**numbers, "strategy": "token", "dynamic": True}
    return {
        "format": FORMATS_OF_KINDS[quant.kind],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, **grouped, "dynamic": False},
                "input_activations": token if quant.kind == "fp8" else None,
            }
        },
        "ignore": [name if name == "lm_head" or "." in name else f"re:.*{name}$" for name in plain],
    }


COMPRESSED_TENSORS = ff.FileFormat(
    _NAME,
    _open,
    kinds=tuple(FORMATS_OF_KINDS),
    summary=f"{_NAME}' layout, which vLLM loads, and transformers with {_NAME} installed",
    write=_write,
    config=_config,
    int4_multiples=(8, 1),
)
