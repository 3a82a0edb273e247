"""FP8 weights of transformers' FineGrainedFP8 (DeepSeek's layout), read.

A weight [out, in] has E4M3 numbers and scales for the whole tensor, for each output channel, or for blocks of
outputs and inputs, of which a QTensor stores one row per output. Scales of activations that were calibrated
are refused: jaxft scales activations by their own values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxft.nn.quant_formats import E4M3, pack
from jaxft.weights.hf.safetensors import FLOATS, SafetensorsFiles, read_tensor
from jaxft.weights.model_files import Index, QuantisedTensor
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.quantised.grouped_int4 import read_eights

BlocksOf = Callable[[int, int], tuple[int, int]]  # the outputs and inputs per scale of a weight [out, in]
STATIC_SCALES = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
# The names and dtypes of the numbers of each kind; int4 has eight in an int32.
NUMBER_NAMES = {"fp8": ".weight", "int8": ".weight", "int4": ".weight_packed"}
NUMBER_DTYPES = {"fp8": np.dtype(E4M3), "int8": np.dtype(np.int8), "int4": np.dtype(np.int32)}


def _open(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    scheme, block = settings.get("activation_scheme", "dynamic"), settings.get("weight_block_size")
    if scheme != "dynamic":
        raise not_read(files.where, f"fp8 weights with activation_scheme={scheme!r}", "dynamic")
    sizes = None if block is None else block_sizes(files.where, "weight_block_size", block)
    return scaled_weights(files, "fp8", "fp8", ".weight_scale_inv", lambda *shape: sizes or shape)


# Shared with compressed-tensors


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


def scaled_weights(
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
        raise ValueError(f"{files.where}: the dtype of {scales} is not one of {', '.join(FLOATS)}")
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


FINE_GRAINED_FP8 = ff.FileFormat("fp8", _open)
