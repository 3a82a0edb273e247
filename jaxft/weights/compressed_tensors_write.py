"""Quantised weights in compressed-tensors' layouts: fp8 and int8 with a scale per output channel, int4 with
one per group of inputs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import E4M3, unpack
from jaxft.weights.fp8_files import COMPRESSED_FORMATS, NUMBER_DTYPES, PACKED
from jaxft.weights.gptq_awq import pack_eights
from jaxft.weights.safetensors import TensorToWrite


def tensors_of_compressed(name: str, layout: QTensor, make: Callable[[], QTensor]) -> list[TensorToWrite]:
    """Return the tensors of a weight `name` of kind fp8, int8 or int4. make: called for the numbers and for
    the scales, returns the weight on the host.
    """
    (ins, outs), blocks = layout.shape, layout.scale.shape[0]
    scale_dtype = np.dtype(layout.scale.dtype)

    def scales() -> np.ndarray:
        return np.ascontiguousarray(np.asarray(make().scale).T)

    def by_channel() -> np.ndarray:
        codes = np.ascontiguousarray(np.asarray(make().codes).T)
        return codes.view(E4M3) if layout.kind == "fp8" else codes

    def packed() -> np.ndarray:
        return pack_eights(np.asarray(unpack(make().codes)).T, 1)

    scale = TensorToWrite(f"{name}_scale", scale_dtype, (outs, blocks), scales)
    dtype = NUMBER_DTYPES[layout.kind]
    if layout.kind != "int4":
        return [TensorToWrite(name, dtype, (outs, ins), by_channel), scale]
    stem, shape = name.removesuffix(".weight"), np.array([outs, ins], np.int64)
    return [
        TensorToWrite(stem + PACKED, dtype, (outs, ins // 8), packed),
        scale,
        TensorToWrite(f"{name}_shape", shape.dtype, shape.shape, lambda: shape),
    ]


def compressed_settings(kind: str, block: int | None, plain: list[str]) -> dict[str, Any]:
    """Return quantization_config of weights written by `tensors_of_compressed`: fp8 for matmuls in FP8 with a
    scale per token, int8 and int4 for activations in 16 bits. plain: names of modules that are not quantised.
    """
    numbers: dict[str, Any] = {
        "num_bits": 4 if kind == "int4" else 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
    }
    grouped = {"strategy": "group", "group_size": block} if block else {"strategy": "channel"}
    token = {**numbers, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": {kind: format for format, kind in COMPRESSED_FORMATS.items()}[kind],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, **grouped, "dynamic": False},
                "input_activations": token if kind == "fp8" else None,
            }
        },
        "ignore": [name if name == "lm_head" else f"re:.*{name}$" for name in plain],
    }
