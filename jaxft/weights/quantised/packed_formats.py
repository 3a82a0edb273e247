"""GPTQ, AWQ, compressed-tensors and the FP8 of DeepSeek: codes and scales; read and written.

GPTQ and AWQ have 4-bit codes, eight in an int32, with a scale and a zero per group. GPTQ packs codes along
the inputs and is written with symmetric codes only; AWQ packs them along the outputs in an order of its own.
compressed-tensors has E4M3, int8 or int4 numbers with scales per tensor, output channel, group of inputs or
block, and is written with scales per channel or group. DeepSeek's layout has the `quant_method` "fp8".
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxft.nn.quant import QTensor, Quant
from jaxft.nn.quant_formats import E4M3, pack, unpack
from jaxft.weights.hf.safetensors import FLOATS, UNSUPPORTED, SafetensorsFiles, read_tensor
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.tensors import Index, QuantisedTensor

IN_ORDER = tuple(range(8))
ZERO = 8  # the code of 0.0 in int4


def read_eights(
    files: SafetensorsFiles,
    name: str,
    shape: tuple[int, ...],
    axis: int,
    index: Index,
    order: Iterable[int] = IN_ORDER,
) -> Any:
    """Read the part at `index` of 4-bit codes of this shape. The files pack eight codes along `axis` into an
    int32.

    order[i]: the position, from 0 to 7, of the code in the i-th lowest four bits of the int32.
    """
    part, stored, at = index[axis], [*shape], [*index]
    stored[axis], at[axis] = shape[axis] // 8, slice(part.start // 8, -(-part.stop // 8))
    words = np.moveaxis(read_tensor(files, name, tuple(at), tuple(stored)).view(np.uint32), axis, -1)
    codes = np.empty((*words.shape, 8), np.uint8)
    for i, position in enumerate(order):
        codes[..., position] = words >> np.uint32(4 * i) & np.uint32(15)
    first, (rows, columns) = part.start % 8, words.shape
    codes = codes.reshape(rows, 8 * columns)[:, first : first + part.stop - part.start]
    return np.moveaxis(codes, -1, axis)


def pack_eights(codes: Any, axis: int, order: Iterable[int] = IN_ORDER) -> np.ndarray:
    """Pack codes along `axis`, whose size is a multiple of eight, into int32: the inverse of read_eights."""
    codes = np.moveaxis(np.asarray(codes), axis, -1)
    eights = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for i, position in enumerate(order):
        words |= eights[..., position] << np.uint32(4 * i)
    return np.moveaxis(words, -1, axis).view(np.int32)


class Grouping(NamedTuple):
    """The packing of a weight [in, out] in GPTQ or AWQ files.

    axis: the axis of the codes along which an int32 packs eight; zeros are always packed along the outputs.
    order: see read_eights. shift: a number that is added to the zeros in the files after reading.
    """

    axis: int
    order: tuple[int, ...] = IN_ORDER
    shift: int = 0


def _read_grouped(
    files: SafetensorsFiles, stem: str, layout: QTensor, how: Grouping, index: Index
) -> dict[str, Any]:
    """Read the part at `index` of the weight `stem`.weight, with values `(code - zero) * scale`, as a
    QTensor's arrays by name. In an affine4 layout the offset is -zero * scale, exact in float32. Raises
    ValueError for an int4 layout unless all zeros are 8.
    """
    grid, rows = layout.scale.shape, ff.array_index(layout, "scale", index)
    codes = read_eights(files, f"{stem}.qweight", layout.shape, how.axis, index, how.order)
    zeros = read_eights(files, f"{stem}.qzeros", grid, 1, rows, how.order) + np.uint8(how.shift)
    zeros, scale = zeros & np.uint8(15), read_tensor(files, f"{stem}.scales", rows, grid)
    arrays = {"codes": pack(codes), "scale": scale}
    if layout.offset is not None:
        return arrays | {"offset": -zeros.astype(np.float32) * scale.astype(np.float32)}
    if not (zeros == ZERO).all():
        raise ValueError(
            f"{files.where}: {stem}.qzeros are not all 8, which requires sym=false in quantization_config; "
            "set it, or download the model again"
        )
    return arrays


def write_grouped(name: str, layout: QTensor, how: Grouping) -> list[ff.WrittenTensor]:
    """Return the tensors qweight, qzeros and scales of an int4 weight `name`."""
    grid, stem, packed = layout.scale.shape, name.removesuffix("weight"), [*layout.shape]
    packed[how.axis] //= 8

    def codes(q: QTensor) -> np.ndarray:
        return pack_eights(unpack(q.codes), how.axis, how.order)

    def zeros(q: QTensor) -> np.ndarray:
        return pack_eights(np.full(grid, ZERO - how.shift), 1, how.order)

    return [
        ff.WrittenTensor(f"{stem}qweight", np.int32, tuple(packed), codes),
        ff.WrittenTensor(f"{stem}qzeros", np.int32, (grid[0], grid[1] // 8), zeros),
        ff.WrittenTensor(f"{stem}scales", np.float16, grid, lambda q: q.scale),
    ]


def group_size(where: str, settings: ff.QuantConfig) -> int | None:
    """Return how many inputs share a scale by a GPTQ or AWQ quantization_config, None if all do. Raises
    ValueError unless codes have 4 bits.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size", -1))
    if bits != 4:
        raise ValueError(
            f"{where}: {settings['quant_method']} weights of {bits!r:.60} bits, but jaxft reads only 4 bits; "
            "use the model's unquantised weights"
        )
    if type(group) is not int or group == 0 or group < -1:
        raise ValueError(
            f"{where}: quantization_config.group_size is {group!r}, expected a number of inputs or -1; "
            "correct config.json"
        )
    return None if group == -1 else group


def variant(where: str, settings: ff.QuantConfig, keys: tuple[str, ...], readable: tuple[str, ...]) -> str:
    """Return the layout that quantization_config states under one of `keys`, by default the first of
    `readable`. Raises ValueError for a layout that is not in `readable`, and for keys that state different
    ones.
    """
    given = {key: settings[key] for key in keys if settings.get(key) is not None}
    names = {str(value).lower() for value in given.values()} or {readable[0]}
    stated = ", ".join(f"{key}={value!r}" for key, value in given.items())
    if len(names) > 1:
        raise ValueError(
            f"{where}: quantization_config has {stated}, which are different layouts; remove the wrong one"
        )
    if not names <= set(readable):
        raise ValueError(
            f"{where}: {settings['quant_method']} weights with {stated} in quantization_config, but jaxft "
            f"reads {' and '.join(readable)}; "
            "use the model's unquantised weights"
        )
    return names.pop()


# GPTQ

ZEROS_LESS_1 = Grouping(axis=0, shift=1)


def _open_gptq(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    """Open GPTQ weights: int4 with sym=true, where all zeros are 8, else affine4.

    Zeros are stored less 1, except in gptq_v2. With desc_act, g_idx states the group of each input.
    """
    version = variant(files.where, settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    how = ZEROS_LESS_1 if version == "gptq" else Grouping(axis=0)
    group = group_size(files.where, settings)
    kind, offset_dtype = ("int4", None) if settings.get("sym", True) else ("affine4", np.float32)
    indexed = bool(settings.get("desc_act", False) and group)

    def weight(stem: str) -> QuantisedTensor:
        rows, outs = ff.matrix_shape(files, f"{stem}.qweight", np.int32)
        layout = ff.block_layout(kind, (8 * rows, outs), group, np.float16, offset_dtype, indexed)
        tensors = [f"{stem}.{tensor}" for tensor in ("qweight", "qzeros", "scales", "g_idx")]
        return ff.quantised_tensor("gptq", tensors, layout, partial(_decode_gptq, files, stem, layout, how))

    return {f"{stem}.weight": weight(stem) for stem in ff.stems(files, ".qweight")}


def _decode_gptq(
    files: SafetensorsFiles, stem: str, layout: QTensor, how: Grouping, index: Index
) -> dict[str, Any]:
    ins, blocks, name = layout.shape[0], layout.scale.shape[0], f"{stem}.g_idx"
    in_order = np.arange(ins, dtype=np.int32) // (layout.block or ins)
    groups = read_tensor(files, name, (), (ins,)) if name in files.tensors else in_order
    if groups.min() < 0 or groups.max() >= blocks:
        raise ValueError(
            f"{files.where}: {name} has group numbers from {groups.min()} to {groups.max()}, but the weight "
            f"has only groups 0 to {blocks - 1}; download the file again"
        )
    if layout.index is None and not np.array_equal(groups, in_order):
        raise ValueError(
            f"{files.where}: {name} is not in order, which requires desc_act=true in quantization_config; "
            "set it, or download the model again"
        )
    arrays = _read_grouped(files, stem, layout, how, index)
    return arrays if layout.index is None else {**arrays, "index": groups}


def _write_gptq(name: str, layout: QTensor) -> list[ff.WrittenTensor]:
    ins, index = layout.shape[0], f"{name.removesuffix('weight')}g_idx"
    groups = ff.WrittenTensor(
        index, np.int32, (ins,), lambda q: np.arange(ins, dtype=np.int32) // (q.block or ins)
    )
    return [*write_grouped(name, layout, ZEROS_LESS_1), groups]


def _config_gptq(quant: Quant, plain: list[str], packed: list[str]) -> ff.QuantConfig:
    """Return GPTQ's quantization_config. GPTQModel and vLLM read the modules that are not quantised from
    `dynamic`, transformers (optimum) reads the quantised ones from modules_in_block_to_quantize. plain,
    packed: see FileFormat.
    """
    names = [name for name in plain if name != "lm_head"]
    skipped: dict[str, Any] = {
        f"-:{re.escape(name)}$" if "." in name else f"-:.*\\.{name}$": {} for name in names
    }
    return {
        "bits": 4,
        "group_size": quant.block or -1,
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" not in plain,
        "checkpoint_format": "gptq",
        **({"dynamic": skipped, "modules_in_block_to_quantize": [packed]} if skipped else {}),
    }


GPTQ = ff.FileFormat(
    "gptq",
    _open_gptq,
    kinds=("int4",),
    summary="GPTQ's layout, which vLLM loads, and transformers with gptqmodel and optimum installed",
    head_summary="GPTQ's layout, which vLLM loads, but transformers not: it leaves out a quantised head",
    write=_write_gptq,
    config=_config_gptq,
    scale_dtype=np.float16,
    int4_multiples=(8, 8),
)


# AWQ

AWQ_GROUPING = Grouping(axis=1, order=(0, 2, 4, 6, 1, 3, 5, 7))


def _open_awq(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    variant(files.where, settings, ("version", "format", "checkpoint_format"), ("gemm",))
    group = group_size(files.where, settings)

    def weight(stem: str) -> QuantisedTensor:
        ins, columns = ff.matrix_shape(files, f"{stem}.qweight", np.int32)
        layout = ff.block_layout("affine4", (ins, 8 * columns), group, np.float16, np.float32)
        tensors = [f"{stem}.{tensor}" for tensor in ("qweight", "qzeros", "scales")]
        return ff.quantised_tensor(
            "awq", tensors, layout, partial(_read_grouped, files, stem, layout, AWQ_GROUPING)
        )

    return {f"{stem}.weight": weight(stem) for stem in ff.stems(files, ".qweight")}


AWQ = ff.FileFormat(
    "awq",
    _open_awq,
    kinds=("int4",),
    summary="AWQ's layout, which vLLM loads, and transformers with gptqmodel (autoawq before transformers 5) "
    "installed",
    write=partial(write_grouped, how=AWQ_GROUPING),
    config=lambda quant, plain, packed: {
        "bits": 4,
        "group_size": quant.block or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": plain,
    },
    scale_dtype=np.float16,
    with_head=False,
    int4_multiples=(8, 8),
)


# ---- compressed-tensors and DeepSeek's FP8


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
    """Return the error for a model with `weights` that jaxft does not read. readable: those that it reads."""
    return ValueError(f"{where}: {weights}, but jaxft reads {readable}; use the model's unquantised weights")


def block_sizes(where: str, name: str, value: Any) -> tuple[int, int]:
    """Return the setting `name` as (outputs, inputs) of a block. Raises ValueError unless its value is a pair
    of positive integers.
    """
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(
            f"{where}: {name} in quantization_config is {value!r}, expected [outputs, inputs], two "
            "positive whole numbers; correct config.json"
        )
    return sizes[0], sizes[1]


def _scaled_weights(
    files: SafetensorsFiles, format: str, kind: str, ending: str, blocks_of: BlocksOf
) -> ff.Weights:
    """Open all weights of a format whose scales have names with this ending. kind: fp8, int8 or int4.
    blocks_of(outputs, inputs): returns the numbers (outputs, inputs) that share a scale.
    """
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
        scales = bare.removesuffix(".weight") + ending
        raise ValueError(
            f"{files.where}: the FP8 tensor {bare} has no scale tensor ({scales}); download the model again"
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
            f"{files.where}: the dtype of {scales} is not one of {', '.join(FLOATS)}"
            f"{'' if given.dtype == UNSUPPORTED else f', but {given.dtype}'}; use the model's "
            "unquantised weights"
        )
    alike = grid, grid[:1] if grid[1] == 1 else grid, () if grid == (1, 1) else grid
    if given.shape not in alike:
        raise ValueError(
            f"{files.where}: {scales} has shape {given.shape}, expected {grid}; download the model again"
        )
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

_COMPRESSED = "compressed-tensors"
FORMATS_OF_KINDS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
# QuantConfig of the weights, with the defaults. Others are facts about how they were rounded.
_COMPRESSED_DEFAULTS = {
    "num_bits": None, "type": None, "symmetric": True, "dynamic": False, "actorder": None, "strategy": None,
    "group_size": None, "block_structure": None,
}  # fmt: skip


def _open_compressed(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    where, format, weights = files.where, settings.get("format"), _common_weights(files.where, settings)
    kind = next((kind for kind, name in FORMATS_OF_KINDS.items() if name == format), None)
    if kind is None:
        readable = ", ".join(FORMATS_OF_KINDS.values())
        raise not_read(where, f"{_COMPRESSED} weights with format={format!r}", readable)
    if settings.get("kv_cache_scheme") is not None:
        raise ValueError(
            f"{where}: {_COMPRESSED} with kv_cache_scheme, whose scales of keys and values jaxft does not "
            "read; use the model without a quantised cache"
        )
    for key, value in {**_numbers(kind), "dynamic": False, "actorder": None}.items():
        if weights[key] != value:
            stated = f"{_COMPRESSED} weights of format {format} with {key}={weights[key]!r}"
            raise not_read(where, stated, f"{key}={value!r}")
    strategy, sizes = weights["strategy"], None
    if strategy == "block":
        sizes = block_sizes(where, "block_structure", weights["block_structure"])
    elif strategy == "group":
        sizes = block_sizes(where, "group_size", (1, weights["group_size"]))
    elif strategy not in ("tensor", "channel"):
        readable = "tensor, channel, group and block"
        raise not_read(where, f"{_COMPRESSED} weights with strategy={strategy!r}", readable)

    def blocks_of(outs: int, ins: int) -> tuple[int, int]:
        return sizes or (outs if strategy == "tensor" else 1, ins)

    return _scaled_weights(files, _COMPRESSED, kind, ".weight_scale", blocks_of)


def _common_weights(where: str, settings: ff.QuantConfig) -> dict[str, Any]:
    """Return the weights' settings in config_groups. Raises ValueError unless all groups have the same."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(s, dict) and isinstance(s.get("weights"), dict) for s in schemes):
        raise ValueError(
            f"{where}: {_COMPRESSED} without weights in config_groups of quantization_config; "
            "use the model's unquantised weights"
        )
    for scheme in schemes:
        activations = scheme.get("input_activations") or {}
        static = isinstance(activations, dict) and activations and activations.get("dynamic") is not True
        if static or scheme.get("output_activations"):
            raise not_read(where, f"{_COMPRESSED} with calibrated scales of activations", "dynamic ones")
    first, *others = ({key: scheme["weights"].get(key) for key in _COMPRESSED_DEFAULTS} for scheme in schemes)
    if any(other != first for other in others):
        stated = f"{_COMPRESSED} with {len(schemes)} groups of layers whose weights have different formats"
        raise not_read(where, stated, "one")
    return {key: _COMPRESSED_DEFAULTS[key] if value is None else value for key, value in first.items()}


def _numbers(kind: str) -> dict[str, Any]:
    bits, number = 4 if kind == "int4" else 8, "float" if kind == "fp8" else "int"
    return {"num_bits": bits, "type": number, "symmetric": True}


def _write_compressed(name: str, layout: QTensor) -> list[ff.WrittenTensor]:
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


def _config_compressed(quant: Quant, plain: list[str], packed: list[str]) -> ff.QuantConfig:
    """Return the quantization_config; fp8 quantises activations too, per token, int8 and int4 do not. plain,
    packed: see FileFormat.
    """
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
    _COMPRESSED,
    _open_compressed,
    kinds=tuple(FORMATS_OF_KINDS),
    summary=f"{_COMPRESSED}' layout, which vLLM loads, and transformers with {_COMPRESSED} installed",
    write=_write_compressed,
    config=_config_compressed,
    int4_multiples=(8, 1),
)
