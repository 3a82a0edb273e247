"""Checkpoints with quantised linear layers: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors and jaxft's own,
read without rounding again.

Each method's reader finds the quantised weights and their layouts (see quant_layout.py) from headers and
config.json alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.nn.quant import QTensor, Quant, dequantize, is_paired
from jaxft.weights import safetensors
from jaxft.weights.bitsandbytes import find_bitsandbytes
from jaxft.weights.fp8_files import find_compressed_tensors, find_fp8
from jaxft.weights.gptq_awq import find_awq, find_gptq
from jaxft.weights.model_files import Index, ModelFiles, QuantisedTensor, full_index
from jaxft.weights.quant_layout import array_index, array_names, quantize_layout
from jaxft.weights.quantised_tensors import Found, read_part
from jaxft.weights.safetensors import SafetensorsFiles


def open_quantised(files: SafetensorsFiles, settings: dict[str, Any]) -> ModelFiles:
    """Return the tensors of a model whose quantised weights appear under the names of the plain weights.

    settings: config.json's quantization_config. Raises ValueError for a method that is not supported and for
    inconsistent tensors.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"{files.where}: its config.json has quant_method={method!r}, but jaxft reads "
            f"{', '.join(METHODS)}; "
            "use the model's unquantised weights"
        )
    quantised, consumed = METHODS[method](files, settings)
    shapes = {name: shape for name, shape in files.shapes.items() if name not in consumed}
    dtypes = {name: dtype for name, dtype in files.dtypes.items() if name not in consumed}

    def read(name: str, index: Index = ()) -> np.ndarray:
        if name in quantised:
            return dequantised_part(quantised[name], index)
        return safetensors.read_tensor(files, name, index)

    return ModelFiles(
        files.where,
        {**shapes, **{name: tensor.shape[::-1] for name, tensor in quantised.items()}},
        {**dtypes, **dict.fromkeys(quantised, np.dtype(np.float32))},
        read,
        quantised,
    )


def dequantised(x: QTensor | np.ndarray) -> np.ndarray:
    """Return a weight on the host in float32 if it is a QTensor, else itself."""
    return np.asarray(dequantize(replace(x, dtype=jnp.dtype(jnp.float32)))) if isinstance(x, QTensor) else x


def dequantised_part(tensor: QuantisedTensor, index: Index = ()) -> np.ndarray:
    """Return the part of a quantised weight [out, in] at `index`; only its blocks are read where no array is
    for all of it.
    """
    layout = tensor.layout
    if layout is None or layout.outer is not None or layout.index is not None:
        return dequantised(tensor.read()).T[index]
    outs, ins = full_index(index, tensor.shape[::-1])
    unit = 2 * (layout.block or 1)
    start, stop = ins.start // unit * unit, min(-(-ins.stop // unit) * unit, tensor.shape[0])
    blocks = dequantised(tensor.read((slice(start, stop), outs)))
    return blocks[ins.start - start : ins.stop - start].T


def find_jaxft(files: SafetensorsFiles, settings: dict[str, Any]) -> Found:
    """Find weights that jaxft wrote: the arrays of a QTensor as NAME.codes, NAME.scale and so on."""
    try:
        quant = Quant(settings["kind"], settings["block"], settings["double"])
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{files.where}: its quantization_config is not a format of jaxft ({e})") from e
    found, consumed = {}, set()
    for name, shape in files.shapes.items():
        weight, mark, _ = name.partition(".codes")
        if not mark:
            continue
        size = (shape[0] * (2 if is_paired(quant.kind) else 1), shape[1])
        layout = quantize_layout(size, quant)
        arrays = {array: f"{weight}.{array}" for array in array_names(layout)}
        found[weight] = QuantisedTensor("jaxft", size, layout, partial(_read_jaxft, files, arrays, layout))
        consumed |= set(arrays.values())
    return found, consumed


def _read_jaxft(
    files: SafetensorsFiles, names: dict[str, str], layout: QTensor, index: Index = ()
) -> QTensor:
    index = full_index(index, layout.shape)
    arrays: dict[str, Any] = {
        array: read_part(files, name, getattr(layout, array).shape, array_index(layout, array, index))
        for array, name in names.items()
    }
    return replace(layout, **arrays)


METHODS: dict[str, Callable[[SafetensorsFiles, dict[str, Any]], Found]] = {
    "bitsandbytes": find_bitsandbytes,
    "gptq": find_gptq,
    "awq": find_awq,
    "fp8": find_fp8,
    "compressed-tensors": find_compressed_tensors,
    "jaxft": find_jaxft,
}
