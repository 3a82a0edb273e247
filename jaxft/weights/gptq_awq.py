"""GPTQ and AWQ checkpoints, read and written: 4-bit codes, eight in an int32, with a scale and a zero per
group of inputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jaxft.nn import quant_formats as qf
from jaxft.nn.quant import QTensor
from jaxft.weights.model_files import Index, QuantisedTensor, full_index
from jaxft.weights.quant_layout import array_index, block_layout
from jaxft.weights.quantised_tensors import Found, read_part
from jaxft.weights.safetensors import SafetensorsFiles, TensorToWrite

IN_ORDER = tuple(range(8))
SYMMETRIC_ZERO = 8  # the code of 0.0 in int4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output channel of each 4 bits of an int32, lowest first


def find_gptq(files: SafetensorsFiles, settings: dict[str, Any]) -> Found:
    """Find GPTQ weights: eight inputs per int32, scales and zeros per group, with desc_act a group index for
    each input.

    Zeros are stored less 1, except in format gptq_v2. With sym=true all zeros are 8, which is int4; others
    are affine4.
    """
    format = _format(files.where, settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    group, sym = _group_size(settings, files.where), settings.get("sym", True)
    indexed = bool(settings.get("desc_act", False) and group)
    zero_shift = 0 if format == "gptq_v2" else 1
    found, consumed = {}, set()
    for name, shape in files.shapes.items():
        stem, mark, _ = name.partition(".qweight")
        if not mark:
            continue
        size = 8 * shape[0], shape[1]
        kind, offset_dtype = ("int4", None) if sym else ("affine4", np.float32)
        layout = block_layout(kind, size, group, np.float16, offset_dtype, indexed)
        read = partial(_read_gptq, files, stem, layout, zero_shift)
        found[f"{stem}.weight"] = QuantisedTensor("gptq", size, layout, read)
        consumed |= {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    return found, consumed


def _read_gptq(
    files: SafetensorsFiles, stem: str, layout: QTensor, zero_shift: int, index: Index = ()
) -> QTensor:
    ins, outs = layout.shape
    blocks, index = layout.scale.shape[0], full_index(index, layout.shape)
    rows = array_index(layout, "scale", index)
    scale = read_part(files, f"{stem}.scales", (blocks, outs), rows)
    zeros = read_eights(files, f"{stem}.qzeros", (blocks, outs), 1, rows) + np.uint8(zero_shift) & np.uint8(
        15
    )
    in_order = np.arange(ins, dtype=np.int32) // (layout.block or ins)
    groups = read_part(files, f"{stem}.g_idx", (ins,)) if f"{stem}.g_idx" in files.shapes else in_order
    if groups.min() < 0 or groups.max() >= blocks:
        raise ValueError(
            f"{files.where}: {stem}.g_idx has groups {groups.min()} to {groups.max()}, but there are {blocks}"
        )
    if layout.index is None and not np.array_equal(groups, in_order):
        raise ValueError(
            f"{files.where}: {stem}.g_idx is not in order, which requires desc_act=true in "
            "quantization_config"
        )
    if layout.kind == "int4" and not (zeros == 8).all():
        raise ValueError(
            f"{files.where}: {stem}.qzeros are not all 8, which requires sym=false in quantization_config"
        )
    codes = read_eights(files, f"{stem}.qweight", (ins, outs), 0, index)
    return _affine(layout, codes, scale, zeros, groups)


def find_awq(files: SafetensorsFiles, settings: dict[str, Any]) -> Found:
    """Find AWQ weights: eight output channels per int32 in AWQ's order, scales and zeros per group of inputs;
    affine4.
    """
    _format(files.where, settings, ("version", "format", "checkpoint_format"), ("gemm",))
    group = _group_size(settings, files.where)
    found, consumed = {}, set()
    for name, shape in files.shapes.items():
        stem, mark, _ = name.partition(".qweight")
        if not mark:
            continue
        size = shape[0], 8 * shape[1]
        layout = block_layout("affine4", size, group, np.float16, np.float32)
        found[f"{stem}.weight"] = QuantisedTensor(
            "awq", size, layout, partial(_read_awq, files, stem, layout)
        )
        consumed |= {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")}
    return found, consumed


def _read_awq(files: SafetensorsFiles, stem: str, layout: QTensor, index: Index = ()) -> QTensor:
    (ins, outs), index = layout.shape, full_index(index, layout.shape)
    blocks, rows = layout.scale.shape[0], array_index(layout, "scale", index)
    codes = read_eights(files, f"{stem}.qweight", (ins, outs), 1, index, AWQ_ORDER)
    zeros = read_eights(files, f"{stem}.qzeros", (blocks, outs), 1, rows, AWQ_ORDER)
    return _affine(layout, codes, read_part(files, f"{stem}.scales", (blocks, outs), rows), zeros)


def _format(where: str, settings: dict[str, Any], keys: tuple[str, ...], readable: tuple[str, ...]) -> str:
    """Return the layout of the packed weights, which tools name under several keys; by default the first of
    `readable`.

    Raises ValueError for a layout that is not readable, and for keys that disagree.
    """
    given = {key: settings[key] for key in keys if settings.get(key) is not None}
    names = {str(value).lower() for value in given.values()} or {readable[0]}
    stated = ", ".join(f"{key}={value!r}" for key, value in given.items())
    if len(names) > 1:
        raise ValueError(
            f"{where}: quantization_config has {stated}, which are different layouts; remove the wrong one"
        )
    if not names <= set(readable):
        method = settings["quant_method"]
        raise ValueError(
            f"{where}: {method} weights with {stated} in quantization_config, but jaxft reads "
            f"{' and '.join(readable)}"
        )
    return names.pop()


def _group_size(settings: dict[str, Any], where: str) -> int | None:
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size", -1))
    if bits != 4:
        raise ValueError(
            f"{where}: {settings['quant_method']} weights of {bits!r:.60} bits, but jaxft reads those of 4"
        )
    if type(group) is not int or group == 0 or group < -1:
        raise ValueError(
            f"{where}: quantization_config.group_size is {group!r}, expected a number of inputs or -1"
        )
    return None if group == -1 else group


def read_eights(
    files: SafetensorsFiles,
    name: str,
    shape: tuple[int, int],
    axis: int,
    index: Index,
    order: Iterable[int] = IN_ORDER,
) -> np.ndarray:
    """Read the part at `index` of 4-bit numbers of this shape, of which `axis` has eight in each int32."""
    part = full_index(index, shape)[axis]
    words = tuple(slice(part.start // 8, -(-part.stop // 8)) if i == axis else s for i, s in enumerate(index))
    stored = tuple(n // 8 if i == axis else n for i, n in enumerate(shape))
    inside = slice(part.start % 8, part.start % 8 + part.stop - part.start)
    return _unpack_eights(read_part(files, name, stored, words), axis, order)[
        (slice(None),) * axis + (inside,)
    ]


def _unpack_eights(words: np.ndarray, axis: int, order: Iterable[int]) -> np.ndarray:
    """Unpack the eight 4-bit numbers of each int32 along `axis`; order[i]: the position of the i-th lowest
    four bits.
    """
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    out = np.empty((*words.shape, 8), np.uint8)
    for i, position in enumerate(order):
        out[..., position] = words >> np.uint32(4 * i) & np.uint32(15)
    return np.moveaxis(out.reshape(*words.shape[:-1], -1), -1, axis)


def _affine(
    layout: QTensor, codes: Any, scale: np.ndarray, zeros: np.ndarray, groups: np.ndarray | None = None
) -> QTensor:
    """Return `(code - zero) * scale` with an offset of -zero * scale, which float32 represents exactly."""
    offset = None if layout.offset is None else -zeros.astype(np.float32) * scale.astype(np.float32)
    index = None if layout.index is None else groups
    return replace(layout, codes=qf.pack(codes), scale=scale, offset=offset, index=index)


def pack_eights(codes: np.ndarray, axis: int, order: Iterable[int] = IN_ORDER) -> np.ndarray:
    """Pack 4-bit numbers along `axis`, whose size is a multiple of eight, into int32: the inverse of
    read_eights.
    """
    codes = np.moveaxis(codes, axis, -1)
    eights = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for i, position in enumerate(order):
        words |= eights[..., position] << np.uint32(4 * i)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def tensors_of_gptq(name: str, layout: QTensor, make: Callable[[], QTensor]) -> list[TensorToWrite]:
    """Return the tensors of an int4 weight `name` in GPTQ's layout, all zeros 8. make: called for the codes
    and for the scales, returns the weight on the host.
    """
    (ins, outs), blocks, stem = layout.shape, layout.scale.shape[0], name.removesuffix("weight")
    zeros = np.full((blocks, outs), SYMMETRIC_ZERO - 1, np.uint8)  # stored less 1
    i32 = np.dtype(np.int32)
    groups = np.arange(ins, dtype=np.int32) // np.int32(layout.block or ins)
    return [
        TensorToWrite(f"{stem}qweight", i32, (ins // 8, outs), lambda: pack_eights(_codes(make()), 0)),
        TensorToWrite(f"{stem}qzeros", i32, (blocks, outs // 8), lambda: pack_eights(zeros, 1)),
        _scales_to_write(f"{stem}scales", layout, make),
        TensorToWrite(f"{stem}g_idx", i32, (ins,), lambda: groups),
    ]


def tensors_of_awq(name: str, layout: QTensor, make: Callable[[], QTensor]) -> list[TensorToWrite]:
    """Return the tensors of an int4 weight `name` in AWQ's layout, as tensors_of_gptq does."""
    (ins, outs), blocks, stem = layout.shape, layout.scale.shape[0], name.removesuffix("weight")
    zeros = np.full((blocks, outs), SYMMETRIC_ZERO, np.uint8)
    i32 = np.dtype(np.int32)

    def codes() -> np.ndarray:
        return pack_eights(_codes(make()), 1, AWQ_ORDER)

    return [
        TensorToWrite(f"{stem}qweight", i32, (ins, outs // 8), codes),
        TensorToWrite(f"{stem}qzeros", i32, (blocks, outs // 8), lambda: pack_eights(zeros, 1, AWQ_ORDER)),
        _scales_to_write(f"{stem}scales", layout, make),
    ]


def _codes(q: QTensor) -> np.ndarray:
    return np.asarray(qf.unpack(q.codes))


def _scales_to_write(name: str, layout: QTensor, make: Callable[[], QTensor]) -> TensorToWrite:

    def scales() -> np.ndarray:
        return np.asarray(with_float16_scales(make(), name)[0].scale)

    return TensorToWrite(name, np.dtype(np.float16), layout.scale.shape, scales)


def with_float16_scales(q: QTensor, name: str) -> tuple[QTensor, int]:
    """Return an int4 weight with its scales in float16, as GPTQ and AWQ store them, and how many of these
    lost digits: float16 has more digits than bfloat16, but not its range. name: of the weight, for the error.

    Raises ValueError for scales above the range.
    """
    wide = np.asarray(q.scale, np.float32)
    if wide.max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(
            f"{name}: the scale {wide.max():.3g} is too large for float16, in which GPTQ and AWQ store "
            "scales; use --format compressed-tensors"
        )
    narrow = wide.astype(np.float16)
    return replace(q, scale=narrow), int(np.count_nonzero(narrow.astype(np.float32) != wide))


def gptq_settings(block: int | None, plain: list[str], packed: list[str]) -> dict[str, Any]:
    """Return quantization_config of weights written by `tensors_of_gptq`. plain: last names of modules that
    are not quantised. packed: names of those that are, inside a layer.

    GPTQModel and vLLM read the exceptions in `dynamic`, transformers (optimum) modules_in_block_to_quantize.
    """
    skipped: dict[str, Any] = {f"-:.*\\.{name}$": {} for name in plain if name != "lm_head"}
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": block or -1,
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" not in plain,
        "checkpoint_format": "gptq",
        **({"dynamic": skipped, "modules_in_block_to_quantize": [packed]} if skipped else {}),
    }


def awq_settings(block: int | None, plain: list[str]) -> dict[str, Any]:
    """Return quantization_config of weights written by `tensors_of_awq`. plain: modules that are not
    quantised.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": block or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": plain,
    }
