"""FP8 weights of transformers' FineGrainedFP8 (DeepSeek's layout) and of compressed-tensors, whose integer
weights are read too.

A weight [out, in] has E4M3 numbers and scales for the whole tensor, for each output channel, or for blocks of
outputs and inputs, of which a QTensor stores one row per output. Scales of activations that were calibrated
are refused: jaxft scales activations by their own values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import E4M3, pack
from jaxft.weights.gptq_awq import read_eights
from jaxft.weights.model_files import Index, QuantisedTensor, full_index
from jaxft.weights.quant_layout import array_index, block_layout
from jaxft.weights.quantised_tensors import Found, read_part, require_tensor
from jaxft.weights.safetensors import FLOATS, SafetensorsFiles

COMPRESSED_FORMATS = {
    "float-quantized": "fp8",
    "int-quantized": "int8",
    "pack-quantized": "int4",
}  # of compressed-tensors
STATIC_SCALES = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
PACKED, NUMBERS = ".weight_packed", ".weight"
NUMBER_DTYPES = {"fp8": np.dtype(E4M3), "int8": np.dtype(np.int8), "int4": np.dtype(np.int32)}


@dataclass(frozen=True)
class _Weight:
    """A weight [outs, ins] in the files: its numbers, and its scales, one per `rows` outputs and `columns`
    inputs.

    kind: fp8, int8 or int4 (eight in an int32 along the inputs).
    """

    files: SafetensorsFiles
    kind: str
    numbers: str
    scales: str
    shape: tuple[int, int]
    rows: int
    columns: int

    @property
    def grid(self) -> tuple[int, int]:
        """The shape of its scales."""
        return -(-self.shape[0] // self.rows), -(-self.shape[1] // self.columns)


def find_fp8(files: SafetensorsFiles, settings: dict[str, Any]) -> Found:
    """Find FineGrainedFP8's weights, with a scale `weight_scale_inv` per block of outputs and inputs."""
    scheme, block = settings.get("activation_scheme", "dynamic"), settings.get("weight_block_size")
    if scheme != "dynamic":
        raise ValueError(
            f"{files.where}: fp8 weights with activation_scheme={scheme!r} in quantization_config, but jaxft "
            "reads dynamic; use the model's unquantised weights"
        )
    sizes = _block_sizes(files.where, "weight_block_size", block) if block is not None else None
    return _find(files, "fp8", "fp8", ".weight_scale_inv", lambda shape: sizes or shape)


def find_compressed_tensors(files: SafetensorsFiles, settings: dict[str, Any]) -> Found:
    """Find compressed-tensors' weights: E4M3 or int8 numbers, or int4 ones packed into int32, with
    `weight_scale`.
    """
    where = files.where
    format, weights = settings.get("format"), _common_weights(where, settings)
    kind = COMPRESSED_FORMATS.get(format) if isinstance(format, str) else None
    if kind is None:
        raise ValueError(
            f"{where}: compressed-tensors weights with format={format!r}, but jaxft reads "
            f"{', '.join(COMPRESSED_FORMATS)}; use the model's unquantised weights"
        )
    if settings.get("kv_cache_scheme") is not None:
        raise ValueError(
            f"{where}: compressed-tensors with kv_cache_scheme, whose scales of keys and values jaxft does "
            "not read; use the model without a quantised cache"
        )
    expected: dict[str, Any] = {
        "num_bits": 4 if kind == "int4" else 8,
        "type": "float" if kind == "fp8" else "int",
    }
    expected |= {"symmetric": True, "dynamic": False, "actorder": None}
    for key, value in expected.items():
        if weights.get(key, value) != value:
            raise ValueError(
                f"{where}: compressed-tensors weights of format {format} with {key}={weights[key]!r}, but "
                f"jaxft reads {key}={value!r}; use the model's unquantised weights"
            )
    strategy = weights.get("strategy")
    if strategy == "block":
        sizes = _block_sizes(where, "block_structure", weights.get("block_structure"))
    elif strategy == "group":
        sizes = _block_sizes(where, "group_size", (1, weights.get("group_size")))
    elif strategy in ("tensor", "channel"):
        sizes = None
    else:
        raise ValueError(
            f"{where}: compressed-tensors weights with strategy={strategy!r}, but jaxft reads tensor, "
            "channel, group and block; use the model's unquantised weights"
        )

    def blocks(shape: tuple[int, int]) -> tuple[int, int]:
        return sizes or ((shape[0] if strategy == "tensor" else 1), shape[1])

    return _find(files, "compressed-tensors", kind, ".weight_scale", blocks)


def _common_weights(where: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the weights, which all groups of layers must have in common."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(s, dict) and isinstance(s.get("weights"), dict) for s in schemes):
        raise ValueError(
            f"{where}: compressed-tensors without weights in config_groups of quantization_config"
        )
    for scheme in schemes:
        activations = scheme.get("input_activations") or {}
        static = isinstance(activations, dict) and activations and activations.get("dynamic") is not True
        if static or scheme.get("output_activations"):
            raise ValueError(
                f"{where}: compressed-tensors with calibrated scales of activations, but jaxft reads dynamic "
                "ones; use the model's unquantised weights"
            )
    # not the observer and other facts about how they were rounded
    keys = (
        "num_bits",
        "type",
        "symmetric",
        "dynamic",
        "actorder",
        "strategy",
        "group_size",
        "block_structure",
    )
    found = [{key: scheme["weights"].get(key) for key in keys} for scheme in schemes]
    if any(one != found[0] for one in found):
        raise ValueError(
            f"{where}: compressed-tensors with {len(found)} groups of layers whose weights differ in their "
            "format, but jaxft reads one; use the model's unquantised weights"
        )
    defaults = {"symmetric": True, "dynamic": False}
    return {key: defaults.get(key) if value is None else value for key, value in found[0].items()}


def _block_sizes(where: str, name: str, value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"{where}: {name} in quantization_config is {value!r}, expected numbers of outputs and inputs"
        )
    return sizes[0], sizes[1]


def _find(
    files: SafetensorsFiles,
    method: str,
    kind: str,
    suffix: str,
    blocks: Callable[[tuple[int, int]], tuple[int, int]],
) -> Found:
    """Find the weights by the suffix of their scales. blocks: of a shape, outputs and inputs per scale."""
    static = next((name for name in files.shapes if name.endswith(STATIC_SCALES)), None)
    if static:
        raise ValueError(
            f"{files.where}: {static} is a calibrated scale of activations, but jaxft reads dynamic ones; "
            "use the model's unquantised weights"
        )
    found, consumed = {}, set()
    for name in files.shapes:
        if not name.endswith(suffix):
            continue
        stem = name.removesuffix(suffix)
        weight = _weight(files, kind, stem, name, blocks)
        ins = weight.shape[1]
        block = None if weight.columns >= ins else weight.columns
        layout = block_layout(kind, (ins, weight.shape[0]), block, np.float32)
        found[f"{stem}.weight"] = QuantisedTensor(
            method, (ins, weight.shape[0]), layout, partial(_read, weight, layout)
        )
        consumed |= {name, weight.numbers, f"{stem}.weight_shape"}
    bare = next((n for n, d in files.dtypes.items() if d == NUMBER_DTYPES["fp8"] and n not in consumed), None)
    if bare:
        raise ValueError(
            f"{files.where}: {bare} is FP8 without {suffix.removeprefix('.')}; is the download complete?"
        )
    return found, consumed


def _weight(
    files: SafetensorsFiles,
    kind: str,
    stem: str,
    scales: str,
    blocks: Callable[[tuple[int, int]], tuple[int, int]],
) -> _Weight:
    numbers = stem + (PACKED if kind == "int4" else NUMBERS)
    require_tensor(files, numbers, None)
    dtype = NUMBER_DTYPES[kind]
    if files.dtypes[numbers] != dtype or len(files.shapes[numbers]) != 2:
        raise ValueError(
            f"{files.where}: {numbers} is {files.dtypes[numbers]}{list(files.shapes[numbers])}, expected a "
            f"matrix of {dtype} because it has {scales.rpartition('.')[2]}"
        )
    outs, columns = files.shapes[numbers]
    shape = outs, columns * (8 if kind == "int4" else 1)
    weight = _Weight(files, kind, numbers, scales, shape, *blocks(shape))
    grid, known = weight.grid, files.shapes[scales]
    if files.dtypes[scales] not in FLOATS.values():
        raise ValueError(f"{files.where}: the dtype of {scales} is not one of {', '.join(FLOATS)}")
    if known not in (grid, grid[:1] if grid[1] == 1 else grid) and not (grid == (1, 1) and known == ()):
        raise ValueError(f"{files.where}: {scales} has shape {known}, expected {grid}")
    return weight


def _read(weight: _Weight, layout: QTensor, index: Index = ()) -> QTensor:
    index = full_index(index, layout.shape)
    ins, outs = index
    codes: Any
    if weight.kind == "int4":
        codes = read_eights(weight.files, weight.numbers, weight.shape, 1, index[::-1]).T
        codes = pack(codes)
    else:
        codes = read_part(weight.files, weight.numbers, None, index[::-1]).T
    if weight.kind == "fp8":
        codes = codes.view(np.uint8)
        if (codes & np.uint8(0x7F) == np.uint8(0x7F)).any():
            raise ValueError("it has NaN; repair the file, or download it again")
    scales = read_part(weight.files, weight.scales).astype(np.float32).reshape(weight.grid)
    rows = np.arange(outs.start, outs.stop) // weight.rows
    of_part = scales[rows].T[array_index(layout, "scale", (ins, slice(None)))[0]]
    return replace(layout, codes=codes, scale=of_part)
