"""Leaves onto a mesh: each process reads, packs and places the parts that its own devices hold."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxft.distributed import sharding
from jaxft.nn.quant import QTensor, quantize, scales
from jaxft.nn.quant_formats import encode_scales
from jaxft.weights.parameters import Leaf, as_packed, copy_into, each, numbers, pieces
from jaxft.weights.quant_layout import arrays, within
from jaxft.weights.safetensors import Index, spans

Spans = tuple[tuple[int, int], ...]  # (start, stop) of every dimension
Part = tuple[int, Index, Any]  # layer, where in it [in, out], what it is there: an array or a QTensor


def load(leaf: Leaf, like: Any, places: Any, kept: bool) -> Any:
    """A leaf on a mesh as `like` holds it, a ShapeDtypeStruct or a QTensor of them; places: its shardings alike.

    kept: whether the files' packed weights are taken as they are. Otherwise numbers are cast or quantised from the files' own
    precision, with the bits that the whole leaf would give. Host memory is what the process's devices hold of the leaf, and a
    layer of that. All processes of the mesh call this together.
    """
    by_process = boxes_by_process(leaf, like, places)
    boxes = by_process[jax.process_index()]
    if kept:
        keep = lambda *part: replace(as_packed(leaf, *part), dtype=like.dtype)  # noqa: E731
        return fill(leaf, like, places, each(leaf, boxes, keep))
    if not is_quantised(like):
        boxes = [piece for box in boxes for piece in pieces(leaf, box)]
        return fill(leaf, like, places, each(leaf, boxes, lambda *part: hold(numbers(leaf, *part), like)))
    every = [box for some in by_process.values() for box in some]
    cut = [
        any(box[i] != slice(0, n) for box in every) for i, n in enumerate(leaf.layer)
    ]  # by dimension, between processes
    if like.outer is not None and any(cut):
        return _scales_packed_together(leaf, like, places, boxes)
    scale = _scales_of_channels(leaf, like, places, boxes) if like.block is None and cut[0] else None

    def make(layer: int, at: Index) -> Any:
        known = scale if scale is None or not leaf.stacked else scale[layer]
        return hold(numbers(leaf, layer, at), like, None if known is None else known[:, at[1]])

    return fill(leaf, like, places, each(leaf, boxes, make))


def is_quantised(like: Any) -> bool:
    """Whether it has fewer bits than the numbers it stands for."""
    return isinstance(like, QTensor) and like.kind != "bits"


def hold(value: np.ndarray, like: Any, scale: Any = None) -> Any:
    """Numbers as `like` holds them, cast or packed on the host. scale: see quant.quantize."""
    if not isinstance(like, QTensor):
        return value.astype(like.dtype, copy=False)
    if like.kind == "bits":
        return quantize(value.astype(like.dtype, copy=False), "bits")
    return replace(quantize(value, like.kind, like.block, like.outer is not None, scale), dtype=like.dtype)


# Which parts


def numbers_of(index: Index, shape: tuple[int, ...]) -> Spans:
    """An index as numbers, which can be compared and be a key."""
    return tuple((cut.start, cut.stop) for cut in spans(index, shape))


def boxed(parts: set[Spans]) -> list[Spans]:
    """One box where the parts of an array fill one, else each part."""
    box = tuple((min(start), max(stop)) for start, stop in (zip(*cuts) for cuts in zip(*parts)))
    size = lambda part: math.prod(stop - start for start, stop in part)  # noqa: E731
    return [box] if sum(map(size, parts)) == size(box) else sorted(parts)


def boxes_by_process(leaf: Leaf, like: Any, places: Any) -> dict[int, list[Index]]:
    """The parts of each layer [in, out] that each process needs."""
    first, place = (like.codes, places.codes) if isinstance(like, QTensor) else (like, places)
    held: dict[int, set[Spans]] = {}
    for device, index in place.devices_indices_map(first.shape).items():
        held.setdefault(device.process_index, set()).add(numbers_of(index, first.shape))
    by_code = (
        leaf.shape[-2] // first.shape[-2] if isinstance(like, QTensor) else 1
    )  # inputs that share a byte

    def in_layer(box: Spans) -> Index:
        cuts = [slice(*cut) for cut in box[len(leaf.shape) - len(leaf.layer) :]]
        if by_code > 1:
            cuts[-2] = slice(cuts[-2].start * by_code, cuts[-2].stop * by_code)
        return tuple(cuts)

    return {process: [in_layer(box) for box in boxed(parts)] for process, parts in held.items()}


# Filling them


def fill(leaf: Leaf, like: Any, places: Any, parts: Iterable[Part]) -> Any:
    """The arrays of a leaf from parts of it, which together are what this process's devices hold."""
    shapes, where = _by_name(like), _by_name(places)
    held = {name: own_shards(x, where[name]) for name, x in shapes.items()}
    for layer, at, value in parts:
        lead = (slice(layer, layer + 1),) if leaf.stacked else ()
        for name, x in _by_name(value).items():
            inner = within(like, name, at) if isinstance(like, QTensor) else at
            put(held[name], x[None] if leaf.stacked else x, spans((*lead, *inner), shapes[name].shape))
    done: dict[str, Any] = {name: placed(held.pop(name), x, where[name]) for name, x in shapes.items()}
    return replace(like, **done) if isinstance(like, QTensor) else done[""]


def _by_name(x: Any) -> dict[str, Any]:
    if not isinstance(x, QTensor):
        return {"": x}
    return {part: getattr(x, part) for part in arrays(x)}


def own_shards(x: Any, place: Any) -> dict[Spans, np.ndarray]:
    """Room for every different part of an array that this process's devices hold."""
    found = {numbers_of(index, x.shape) for index in place.addressable_devices_indices_map(x.shape).values()}
    return {part: np.empty([stop - start for start, stop in part], x.dtype) for part in sorted(found)}


def put(shards: dict[Spans, np.ndarray], value: Any, at: Index) -> None:
    """Copy what lies `at` in the whole array into the shards that have some of it."""
    for part, shard in shards.items():
        both = [
            (max(cut.start, start), min(cut.stop, stop)) for cut, (start, stop) in zip(at, part, strict=True)
        ]
        if all(start < stop for start, stop in both):
            to: Any = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(both, part))
            of = tuple(slice(a - cut.start, b - cut.start) for (a, b), cut in zip(both, at))
            copy_into(shard[(..., *to)], np.asarray(value)[of])


def placed(shards: dict[Spans, np.ndarray], x: Any, place: Any) -> jax.Array:
    """The array of the shards, each let go when its devices have it."""
    devices: dict[Spans, list[Any]] = {}
    for device, index in place.addressable_devices_indices_map(x.shape).items():
        devices.setdefault(numbers_of(index, x.shape), []).append(device)
    there = []
    for part in sorted(shards):
        shard = shards.pop(part)
        there += [jax.device_put(shard, device) for device in devices[part]]
    return jax.make_array_from_single_device_arrays(x.shape, place, there)


def cut(array: np.ndarray, place: Any) -> jax.Array:
    """A host array that every process has onto a mesh, each process placing its own parts."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


# What a part alone doesn't tell


def _everywhere(fn: Callable, *args: Any) -> Any:
    """`fn` of arrays on a mesh, on every host."""
    return np.asarray(jax.jit(fn, out_shardings=sharding.replicated(args[0].sharding.mesh))(*args))


def _scales_of_channels(leaf: Leaf, like: QTensor, places: QTensor, boxes: list[Index]) -> np.ndarray:
    """The scales [..., 1, O] over all inputs of a leaf of which each process has some: the largest of all parts'."""
    count = (
        like.codes.shape[-2] // places.codes.shard_shape(like.codes.shape)[-2]
    )  # parts that the inputs are cut into
    each_part = jax.ShapeDtypeStruct((*like.codes.shape[:-2], count, like.codes.shape[-1]), np.float32)
    place = sharding.fitted(places.codes, each_part.shape)
    shards, size = own_shards(each_part, place), leaf.shape[-2] // count
    make = lambda layer, at: scales(numbers(leaf, layer, at), like.kind, like.block)  # noqa: E731
    for layer, (ins, outs), value in each(leaf, boxes, make):
        lead = (slice(layer, layer + 1),) if leaf.stacked else ()
        rows = slice(ins.start // size, ins.stop // size)
        value = np.broadcast_to(value, (rows.stop - rows.start, value.shape[-1]))
        put(shards, value[None] if leaf.stacked else value, (*lead, rows, outs))
    return _everywhere(lambda x: x.max(-2, keepdims=True), placed(shards, each_part, place))


def _scales_packed_together(leaf: Leaf, like: QTensor, places: QTensor, boxes: list[Index]) -> QTensor:
    """A quantised leaf whose scales are quantised over all of a layer, of which each process has a part."""
    floats = jax.ShapeDtypeStruct(like.scale.shape, np.float32)
    plain, there = replace(like, scale=floats, outer=None, mean=None), replace(places, outer=None, mean=None)
    found = fill(leaf, plain, there, each(leaf, boxes, lambda *part: hold(numbers(leaf, *part), plain)))
    some = {name: x for name, x in _by_name(like).items() if name in ("scale", "outer", "mean")}
    shards = {name: own_shards(x, getattr(places, name)) for name, x in some.items()}
    for layer in range(len(leaf.names)):
        lead = (slice(layer, layer + 1),) if leaf.stacked else ()
        one = (
            _everywhere(_layer, found.scale, np.int32(layer))
            if leaf.stacked
            else _everywhere(lambda x: x, found.scale)
        )
        for name, value in zip(("scale", "outer", "mean"), encode_scales(one), strict=True):
            put(shards[name], value[None] if leaf.stacked else value, spans(lead, some[name].shape))
    return replace(
        found, **{name: placed(shards[name], x, getattr(places, name)) for name, x in some.items()}
    )


def _layer(x: jax.Array, layer: jax.Array) -> jax.Array:
    return x[layer]
