"""Checkpoints whose linear layers are packed: bitsandbytes, GPTQ, AWQ and jaxft's own, read without rounding again.

A layout gives each packed weight a form (see forms.py), known from headers and config.json alone.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nn import quant_formats as qf
from jaxft.nn.quant import QTensor, Quant, dequantize, is_paired
from jaxft.weights.quant_layout import arrays, form, form_of, within
from jaxft.weights.safetensors import Index, Packed, Tensors, spans

Found = tuple[
    dict[str, Packed], set[str]
]  # packed weights by name; the tensors in the files that they are made of

TABLES = {"nf4": qf.NF4, "fp4": qf.FP4}
AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # the output channel of each 4 bits of an int32, lowest first
STATE = ".quant_state.bitsandbytes__"


def opened(files: Tensors, settings: dict[str, Any]) -> Tensors:
    """Tensors in which the packed weights of `files` appear under their plain names.

    settings: config.json's quantization_config. Raises ValueError for a method that isn't read and for parts that don't fit.
    """
    method = settings.get("quant_method")
    if method not in METHODS:
        raise ValueError(
            f"{files.where}: its config.json says quant_method={method!r}, and jaxft reads {', '.join(METHODS)}; "
            "take the model's plain weights"
        )
    found, used = METHODS[method](files, settings)
    shapes = {name: shape for name, shape in files.shapes.items() if name not in used}
    dtypes = {name: dtype for name, dtype in files.dtypes.items() if name not in used}
    return replace(
        files,
        shapes={**shapes, **{name: p.shape[::-1] for name, p in found.items()}},
        dtypes={**dtypes, **dict.fromkeys(found, np.dtype(np.float32))},
        read=lambda name, index=(): numbers(found[name], index) if name in found else files.read(name, index),
        packed=found,
    )


def expanded(x: Any) -> np.ndarray:
    """The numbers that a weight on the host stands for, in float32 if it is a QTensor."""
    return np.asarray(dequantize(replace(x, dtype=jnp.dtype(jnp.float32)))) if isinstance(x, QTensor) else x


def numbers(packed: Packed, index: Index = ()) -> np.ndarray:
    """Part of the numbers [out, in] that a packed weight stands for, read alone where no array stands for all of the weight."""
    form = packed.form
    if form is None or form.outer is not None or form.index is not None:
        return expanded(packed.read()).T[index]
    outs, ins = spans(index, packed.shape[::-1])
    unit = 2 * (form.block or 1)
    start, stop = ins.start // unit * unit, min(-(-ins.stop // unit) * unit, packed.shape[0])
    found = expanded(packed.read((slice(start, stop), outs)))
    return found[ins.start - start : ins.stop - start].T


def part_of(
    files: Tensors, name: str, shape: tuple[int, ...] | None = None, index: Index = (), view: Any = None
) -> np.ndarray:
    """A tensor that a packed weight is made of, or part of it. view: see tensors.read_tensor."""
    if name not in files.shapes:
        raise ValueError(f"{files.where}: {name} is missing; is the download complete?")
    if shape is not None and files.shapes[name] != shape:
        raise ValueError(f"{files.where}: {name} has shape {files.shapes[name]}, wanted {shape}")
    return files.read(name, index, view)


# bitsandbytes


def bitsandbytes(files: Tensors, settings: dict[str, Any]) -> Found:
    """4-bit weights with their quant_state, blocks along the flattened [out, in]; 8-bit weights with a scale `SCB` a channel."""
    found, used = {}, set()
    parts: dict[str, list[str]] = {}
    for name in files.shapes:
        weight, dot, _ = name.partition(".weight.")
        if dot:
            parts.setdefault(f"{weight}.weight", []).append(name)
    for name in files.shapes:
        weight, mark, kind = name.partition(STATE)
        if mark:
            found[weight] = _bnb_4bit(files, weight, kind)
            used |= {weight, *parts[weight]}
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            found[weight] = _bnb_8bit(files, weight, name)
            used |= {weight, name, f"{weight}_format"}
    return found, used


def _bnb_4bit(files: Tensors, weight: str, kind: str) -> Packed:
    state = _state(files, f"{weight}{STATE}{kind}")
    (outs, ins), block = state["shape"], state["blocksize"]
    blocks = -(-outs * ins // block)
    table = part_of(files, f"{weight}.quant_map", (16,))
    packed = partial(Packed, "bitsandbytes", (ins, outs))
    scales = partial(_bnb_scales, files, weight, blocks, state)

    def expand() -> np.ndarray:
        each = np.repeat(scales(), block)[: outs * ins]
        return (table[_bnb_codes(files, weight, outs * ins)] * each).reshape(outs, ins).T

    if not np.array_equal(table, TABLES[kind]):
        return packed(None, expand, f"its quant_map is not {kind}'s")
    if ins % block:
        return packed(None, expand, f"its blocks of {block} run on from one row of {ins} to the next")
    rows, want = ins // block, form(kind, ins, outs, block, np.float32)

    def scale(at: Index) -> np.ndarray:
        dtype = files.dtypes.get(f"{weight}.absmax")
        return part_of(
            files, f"{weight}.absmax", (blocks,), within(want, "scale", at)[::-1], (dtype, (outs, rows))
        ).T

    def codes(at: Index) -> np.ndarray:
        return _bnb_bytes(files, weight, (outs, ins // 2), within(want, "codes", at)[::-1]).T

    def plain(index: Index = ()) -> QTensor:
        at = spans(index, want.shape)
        part = (
            scale(at).astype(np.float32)
            if not nested
            else scales().reshape(outs, rows).T[within(want, "scale", at)]
        )
        return replace(want, codes=codes(at), scale=part)

    nested = "nested_offset" in state
    usual = nested and state["nested_blocksize"] == qf.GROUP
    if not usual or not np.array_equal(part_of(files, f"{weight}.nested_quant_map", (256,)), qf.DYNAMIC):
        why = "its nested_quant_map is not bitsandbytes' dynamic one in groups of 256, so its scales are held in float32"
        return packed(want, plain, why if nested else "")
    shaped: Callable[..., Any] = jax.ShapeDtypeStruct
    outer = shaped((-(-blocks // qf.GROUP),), np.float32)
    held = replace(want, scale=shaped(want.scale.shape, np.uint8), outer=outer, mean=shaped((), np.float32))

    def read(index: Index = ()) -> QTensor:
        at, outer = spans(index, want.shape), part_of(files, f"{weight}.nested_absmax", held.outer.shape)
        mean = np.asarray(state["nested_offset"], np.float32)
        return replace(held, codes=codes(at), scale=scale(at), outer=outer, mean=mean)

    return packed(held, read)


def _bnb_bytes(files: Tensors, weight: str, shape: tuple[int, ...], index: Index = ()) -> np.ndarray:
    """Part of the bytes of a weight, which bnb_4bit_quant_storage may call floats, in this shape."""
    found = math.prod(files.shapes[weight]) * files.dtypes[weight].itemsize if weight in files.shapes else 0
    if found != math.prod(shape):
        raise ValueError(
            f"{files.where}: {weight} has {found} bytes, its quant_state wants {math.prod(shape)}"
        )
    return part_of(files, weight, index=index, view=(np.uint8, shape))


def _bnb_codes(files: Tensors, weight: str, count: int) -> np.ndarray:
    found = _bnb_bytes(files, weight, (-(-count // 2),))
    return np.stack([found >> 4, found & 15], -1).reshape(-1)[:count]


def _bnb_scales(files: Tensors, weight: str, blocks: int, state: dict[str, Any]) -> np.ndarray:
    absmax = part_of(files, f"{weight}.absmax", (blocks,))
    if "nested_offset" not in state:
        return absmax.astype(np.float32)
    each = np.repeat(part_of(files, f"{weight}.nested_absmax"), state["nested_blocksize"])[:blocks]
    return part_of(files, f"{weight}.nested_quant_map", (256,))[absmax] * each + np.float32(
        state["nested_offset"]
    )


def _state(files: Tensors, name: str) -> dict[str, Any]:
    kind = name.rpartition("__")[2]
    try:
        state = json.loads(part_of(files, name).tobytes())
        outs, ins = state["shape"]
        numbers = [
            outs,
            ins,
            state["blocksize"],
            *([state["nested_blocksize"]] if "nested_offset" in state else []),
        ]
        if kind not in TABLES or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"{kind} with {numbers}")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{files.where}: {name} is no state of a 4-bit weight ({e}); download it again"
        ) from e
    return state


def _bnb_8bit(files: Tensors, weight: str, scales: str) -> Packed:
    outs, ins = files.shapes[weight]
    shape = form("int8", ins, outs, None, np.float32)

    def read(index: Index = ()) -> QTensor:
        if files.dtypes[weight] != np.int8:
            raise ValueError(f"{files.where}: {weight} is {files.dtypes[weight]}, wanted int8 beside its SCB")
        at = spans(index, shape.shape)
        scale = part_of(files, scales, (outs,), at[1:]).astype(np.float32) * np.float32(1 / 127)
        return replace(shape, codes=files.read(weight, at[::-1]).T, scale=scale[None])

    return Packed("bitsandbytes", (ins, outs), shape, read)


# GPTQ and AWQ


def _nibbles(words: np.ndarray, axis: int, order: Iterable[int] = range(8)) -> np.ndarray:
    """The eight 4-bit numbers of each int32 along `axis`; order[i]: the place of the i-th lowest four bits among the eight."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    out = np.empty((*words.shape, 8), np.uint8)
    for i, at in enumerate(order):
        out[..., at] = words >> np.uint32(4 * i) & np.uint32(15)
    return np.moveaxis(out.reshape(*words.shape[:-1], -1), -1, axis)


def _eights(
    files: Tensors,
    name: str,
    shape: tuple[int, int],
    axis: int,
    index: Index,
    order: Iterable[int] = range(8),
) -> np.ndarray:
    """Part of the 4-bit numbers of this shape that a tensor holds, eight an int32 along `axis`."""
    cut = spans(index, shape)[axis]
    words = tuple(
        slice(cut.start // 8, -(-cut.stop // 8)) if i == axis else some for i, some in enumerate(index)
    )
    stored = tuple(n // 8 if i == axis else n for i, n in enumerate(shape))
    own = slice(cut.start % 8, cut.start % 8 + cut.stop - cut.start)
    return _nibbles(part_of(files, name, stored, words), axis, order)[(slice(None),) * axis + (own,)]


def _grouped(settings: dict[str, Any], where: str) -> int | None:
    bits, group = (
        settings.get("bits", settings.get("w_bit")),
        settings.get("group_size", settings.get("q_group_size", -1)),
    )
    if bits != 4:
        raise ValueError(
            f"{where}: {settings['quant_method']} weights of {bits} bits, and jaxft reads those of 4"
        )
    if type(group) is not int or group == 0 or group < -1:
        raise ValueError(
            f"{where}: quantization_config.group_size is {group!r}, wanted a number of inputs or -1"
        )
    return None if group == -1 else group


def gptq(files: Tensors, settings: dict[str, Any]) -> Found:
    """Codes of eight inputs an int32, scales and zeros a group of inputs, with desc_act a group index for each input.

    Zeros are stored less 1, but for checkpoint_format gptq_v2. sym=true has all zeros at 8, which int4 is; others are affine4.
    """
    group, sym, ordered = (
        _grouped(settings, files.where),
        settings.get("sym", True),
        settings.get("desc_act", False),
    )
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    found, used = {}, set()
    for name, shape in files.shapes.items():
        stem, mark, _ = name.partition(".qweight")
        if not mark:
            continue
        ins, outs = 8 * shape[0], shape[1]
        kinds = ("int4", None) if sym else ("affine4", np.float32)
        want = form(kinds[0], ins, outs, group, np.float16, kinds[1], indexed=bool(ordered and group))
        read = partial(_read_gptq, files, stem, want, less)
        found[f"{stem}.weight"] = Packed("gptq", (ins, outs), want, read)
        used |= {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx", "bias")}
    return found, used


def _read_gptq(files: Tensors, stem: str, want: QTensor, less: int, index: Index = ()) -> QTensor:
    ins, outs = want.shape
    blocks, at = want.scale.shape[0], spans(index, want.shape)
    rows = within(want, "scale", at)
    scale = part_of(files, f"{stem}.scales", (blocks, outs), rows)
    zeros = _eights(files, f"{stem}.qzeros", (blocks, outs), 1, rows) + np.uint8(less) & np.uint8(15)
    _no_bias(files, stem)
    plain = np.arange(ins, dtype=np.int32) // (want.block or ins)
    group = part_of(files, f"{stem}.g_idx", (ins,)) if f"{stem}.g_idx" in files.shapes else plain
    if group.min() < 0 or group.max() >= blocks:
        raise ValueError(
            f"{files.where}: {stem}.g_idx has groups {group.min()} to {group.max()}, and there are {blocks}"
        )
    if want.index is None and not np.array_equal(group, plain):
        raise ValueError(
            f"{files.where}: {stem}.g_idx is not in order, which needs desc_act=true in quantization_config"
        )
    if want.kind == "int4" and not (zeros == 8).all():
        raise ValueError(
            f"{files.where}: {stem}.qzeros are not all 8, which needs sym=false in quantization_config"
        )
    return _affine(want, _eights(files, f"{stem}.qweight", (ins, outs), 0, at), scale, zeros, group)


def awq(files: Tensors, settings: dict[str, Any]) -> Found:
    """Codes of eight output channels an int32 in AWQ's order, scales and zeros a group of inputs: affine4."""
    group, version = _grouped(settings, files.where), str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"{files.where}: AWQ weights of version {version!r}, and jaxft reads version 'gemm'")
    found, used = {}, set()
    for name, shape in files.shapes.items():
        stem, mark, _ = name.partition(".qweight")
        if not mark:
            continue
        size = shape[0], 8 * shape[1]
        want = form("affine4", *size, group, np.float16, np.float32)
        found[f"{stem}.weight"] = Packed("awq", size, want, partial(_read_awq, files, stem, want))
        used |= {f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "bias")}
    return found, used


def _read_awq(files: Tensors, stem: str, want: QTensor, index: Index = ()) -> QTensor:
    (ins, outs), at = want.shape, spans(index, want.shape)
    blocks, rows = want.scale.shape[0], within(want, "scale", at)
    _no_bias(files, stem)
    codes = _eights(files, f"{stem}.qweight", (ins, outs), 1, at, AWQ_ORDER)
    zeros = _eights(files, f"{stem}.qzeros", (blocks, outs), 1, rows, AWQ_ORDER)
    return _affine(want, codes, part_of(files, f"{stem}.scales", (blocks, outs), rows), zeros)


def _affine(want: QTensor, codes: Any, scale: np.ndarray, zeros: np.ndarray, index: Any = None) -> QTensor:
    """`(code - zero) * scale`: with an offset of -zero * scale, which float32 holds exactly."""
    offset = None if want.offset is None else -zeros.astype(np.float32) * scale.astype(np.float32)
    return replace(
        want, codes=qf.pack(codes), scale=scale, offset=offset, index=None if want.index is None else index
    )


def _no_bias(files: Tensors, stem: str) -> None:
    if f"{stem}.bias" in files.shapes and files.read(f"{stem}.bias").any():
        raise ValueError(f"{files.where}: {stem} has a bias, and jaxft's Llama has none")


# jaxft's own


def own(files: Tensors, settings: dict[str, Any]) -> Found:
    """A QTensor's arrays as they are, `NAME.codes`, `NAME.scale` and so on; its kind, block and double in quantization_config."""
    try:
        quant = Quant(settings["kind"], settings["block"], settings["double"])
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{files.where}: its quantization_config names no form that jaxft has ({e})") from e
    found, used = {}, set()
    for name, shape in files.shapes.items():
        weight, mark, _ = name.partition(".codes")
        if not mark:
            continue
        size = (shape[0] * (2 if is_paired(quant.kind) else 1), shape[1])
        want = form_of(size, quant)
        parts = {part: f"{weight}.{part}" for part in arrays(want)}
        found[weight] = Packed("jaxft", size, want, partial(_read_own, files, parts, want))
        used |= set(parts.values())
    return found, used


def _read_own(files: Tensors, names: dict[str, str], want: QTensor, index: Index = ()) -> QTensor:
    at, shape = spans(index, want.shape), lambda part: getattr(want, part).shape
    found: dict[str, Any] = {
        part: part_of(files, name, shape(part), within(want, part, at)) for part, name in names.items()
    }
    return replace(want, **found)


METHODS: dict[str, Callable[[Tensors, dict[str, Any]], Found]] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "jaxft": own,
}
