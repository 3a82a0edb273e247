"""compressed-tensors: E4M3, int8 or int4 numbers with scales per tensor, output channel, group of inputs or
block; read, and with scales per channel or group written.
"""

from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor, Quant
from jaxft.nn.quant_formats import unpack
from jaxft.weights.hf.safetensors import SafetensorsFiles
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.quantised.fp8 import NUMBER_DTYPES, NUMBER_NAMES, block_sizes, not_read, scaled_weights
from jaxft.weights.quantised.grouped_int4 import pack_eights

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

    return scaled_weights(files, _NAME, kind, ".weight_scale", blocks_of)


def _common_weights(where: str, settings: ff.QuantConfig) -> dict[str, Any]:
    """Return the settings of the weights, which all groups of layers must have in common."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(s, dict) and isinstance(s.get("weights"), dict) for s in schemes):
        raise ValueError(f"{where}: {_NAME} without weights in config_groups of quantization_config")
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
