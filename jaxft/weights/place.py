"""Load a parameter from a model's files onto a mesh.

Each process reads, quantises and places only the parts that its own devices store. `load_param` first plans
which parts of it each process needs. Then it stores the parameter in one of four ways:

- load_unchanged: the codes and scales in the files, if they are quantised already
- load_floats: floats, cast to another dtype
- load_quantised: quantised, each part on its own
- load_with_quantised_scales: quantised, with scales that depend on parts that other processes read

Each of them runs the same loop: read a part of a tensor, convert it, write it into host buffers of the local
shards. At the end the buffers are copied to the devices. The result has the same bits as on a single device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.distributed import sharding
from jaxft.nn.quant import QTensor, quantize, scales
from jaxft.nn.quant_formats import encode_scales
from jaxft.weights import finite
from jaxft.weights.model_files import Index
from jaxft.weights.param_reader import (
    ParamReader,
    errors_name_tensor,
    read_quantised,
    read_values,
    small_parts,
)
from jaxft.weights.shard_buffers import ArrayBuffers, Leaf, Limits, ShardBuffers, limits
from jaxft.weights.tensors import Tensor


def load_param(reader: ParamReader, like: Leaf, shardings: Leaf, unchanged: bool) -> Leaf:
    """Load a parameter onto the mesh of `shardings`. All processes of the mesh call this together.

    like: the parameter as it is to be stored, a ShapeDtypeStruct or a QTensor of them. unchanged: store the
    codes and scales in the files, whose layout is that of `like`; otherwise the values are cast or quantised
    from the files' own precision. Host memory holds the local shards of the parameter and one part of a
    tensor.
    """
    parts_by_process = plan_parts(reader, like, shardings)
    parts = parts_by_process[jax.process_index()]
    if unchanged:
        return load_unchanged(reader, like, shardings, parts)
    if not is_quantised(like):
        return load_floats(reader, like, shardings, parts)
    all_parts = [part for parts in parts_by_process.values() for part in parts]
    ins_split, outs_split = (
        any(part[axis] != slice(0, reader.shape[axis]) for part in all_parts) for axis in (-2, -1)
    )
    if like.outer is not None and (ins_split or outs_split):
        return load_with_quantised_scales(reader, like, shardings, parts)
    if like.block is None and ins_split:
        shared_scales = channel_scales(reader, like, shardings, parts)
        return load_quantised(reader, like, shardings, parts, shared_scales)
    return load_quantised(reader, like, shardings, parts)


# The plan


def plan_parts(reader: ParamReader, like: Leaf, shardings: Leaf) -> dict[int, list[Index]]:
    """Return for each process the parts of the parameter that its devices store."""
    array, array_sharding = (like, shardings)
    if isinstance(like, QTensor):
        array, array_sharding = like.codes, shardings.codes
    shards: dict[int, set[Limits]] = {}
    for device, index in array_sharding.devices_indices_map(array.shape).items():
        shards.setdefault(device.process_index, set()).add(limits(index, array.shape))
    inputs_per_code = reader.shape[-2] // array.shape[-2] if isinstance(like, QTensor) else 1

    def part_of_param(shard: Limits) -> Index:
        index = [slice(start, stop) for start, stop in shard]
        if inputs_per_code > 1:
            index[-2] = slice(index[-2].start * inputs_per_code, index[-2].stop * inputs_per_code)
        return tuple(index)

    return {process: [part_of_param(x) for x in merge_parts(local)] for process, local in shards.items()}


def parts_of_tensors(reader: ParamReader, parts: list[Index]) -> Iterator[tuple[Tensor, Index]]:
    """Yield the tensors that contain these parts of the parameter, each with the part of its values."""
    for tensor in reader.tensors:
        lead = len(tensor.index)
        for part in parts:
            if all(s.start <= i < s.stop for i, s in zip(tensor.index, part[:lead], strict=True)):
                yield tensor, part[lead:]


def merge_parts(parts: set[Limits]) -> list[Limits]:
    """Merge disjoint parts of an array into one if their union is a box; otherwise return them sorted."""

    def size(part: Limits) -> int:
        return math.prod(stop - start for start, stop in part)

    box = tuple(
        (min(start for start, _ in dimension), max(stop for _, stop in dimension))
        for dimension in zip(*parts, strict=True)
    )
    return [box] if sum(map(size, parts)) == size(box) else sorted(parts)


# Four ways to store a parameter


def load_unchanged(reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]) -> QTensor:
    """Load codes and scales as the files store them."""
    buffers = ShardBuffers(like, shardings)
    for tensor, index in parts_of_tensors(reader, parts):
        with errors_name_tensor(reader, tensor, index):
            value = read_quantised(reader, tensor, index)
        buffers.write(tensor.index, index, value)
    return buffers.to_devices()


def load_floats(reader: ParamReader, like: Leaf, shardings: Leaf, parts: list[Index]) -> Leaf:
    """Load floats, cast to the dtype of `like`; 16-bit ones may be stored as raw bits."""
    buffers = ShardBuffers(like, shardings)
    for tensor, part in parts_of_tensors(reader, parts):
        for index in small_parts(reader, tensor, part):
            with errors_name_tensor(reader, tensor, index):
                value = store_as(read_values(reader, tensor, index), like)
            buffers.write(tensor.index, index, value)
    return buffers.to_devices()


def load_quantised(
    reader: ParamReader,
    like: QTensor,
    shardings: QTensor,
    parts: list[Index],
    shared_scales: np.ndarray | None = None,
) -> QTensor:
    """Quantise each part on its own. shared_scales: scales [..., 1, out] for all parts of a channel."""
    buffers = ShardBuffers(like, shardings)
    for tensor, index in parts_of_tensors(reader, parts):
        scale = None if shared_scales is None else shared_scales[tensor.index][..., index[-1]]
        with errors_name_tensor(reader, tensor, index):
            value = store_as(read_values(reader, tensor, index), like, scale)
        buffers.write(tensor.index, index, value)
    return buffers.to_devices()


def load_with_quantised_scales(
    reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]
) -> QTensor:
    """Quantise a parameter whose scales are quantised in groups that span the whole layer.

    First every process quantises its parts with float scales; then all quantise the gathered scales, one
    layer at a time.
    """
    float_scales = jax.ShapeDtypeStruct(like.scale.shape, np.float32)
    floats = load_quantised(
        reader,
        replace(like, scale=float_scales, outer=None, mean=None),
        replace(shardings, outer=None, mean=None),
        parts,
    )
    names = ("scale", "outer", "mean")
    buffers = {name: ArrayBuffers(getattr(like, name), getattr(shardings, name)) for name in names}
    for tensor in reader.tensors:
        gathered = gather(take_part, floats.scale, tuple(map(np.int32, tensor.index)))
        for name, value in zip(names, encode_scales(gathered), strict=True):
            buffers[name].write(tensor.index, (), value)
    arrays: dict[str, Any] = {name: buffers[name].to_devices() for name in names}
    return replace(floats, **arrays)


def channel_scales(reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]) -> np.ndarray:
    """Return the scale [..., 1, out] of each output channel: the largest scale of the parts of its inputs."""
    *lead, rows, outs = like.codes.shape
    count = rows // shardings.codes.shard_shape(like.codes.shape)[-2]  # parts that the inputs are split into
    part_scales = jax.ShapeDtypeStruct((*lead, count, outs), np.float32)
    buffers = ArrayBuffers(part_scales, sharding.sharding_for_shape(shardings.codes, part_scales.shape))
    part_size = reader.shape[-2] // count
    for tensor, index in parts_of_tensors(reader, parts):
        with errors_name_tensor(reader, tensor, index):
            value = scales(read_values(reader, tensor, index), like.kind, like.block)
        *above, ins, outs = index
        part_rows = slice(ins.start // part_size, ins.stop // part_size)
        value = np.broadcast_to(value, (*value.shape[:-2], part_rows.stop - part_rows.start, value.shape[-1]))
        buffers.write(tensor.index, (*above, part_rows, outs), value)
    return gather(largest_part, buffers.to_devices())


# Conversion


def is_quantised(like: Leaf) -> bool:
    """Whether a parameter stored like this takes fewer bits than its dtype."""
    return isinstance(like, QTensor) and like.kind != "bits"


def store_as(value: np.ndarray, like: Leaf, scale: np.ndarray | None = None) -> Leaf:
    """Cast or quantise values on the host to the dtype, kind and blocks of `like`. scale: see
    nn.quant.quantize.

    Raises ValueError for values or scales that are too large for their dtype.
    """
    if not isinstance(like, QTensor):
        return finite.cast_finite(value, like.dtype)
    if like.kind == "bits":
        return quantize(finite.cast_finite(value, like.dtype), "bits")
    packed: Any = quantize(value, like.kind, like.block, like.outer is not None, scale)
    return replace(finite.require_finite_scales(packed), dtype=like.dtype)


# Between the host and the mesh


def shard_host_array(array: np.ndarray, to: Sharding) -> jax.Array:
    """Shard an array that every process has in full; each process copies only its own shards."""
    return jax.make_array_from_callback(array.shape, to, lambda index: array[index])


def gather(fn: Callable[..., jax.Array], x: Any, *rest: Any) -> Any:
    """Compute `fn(x, *rest)` on the mesh of x and return it as a NumPy array on every host."""
    return np.asarray(jax.jit(fn, out_shardings=sharding.replicated(x.sharding.mesh))(x, *rest))


def take_part(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """`x[index]`."""
    return x[index]


def largest_part(x: jax.Array) -> jax.Array:
    """The largest of the parts on axis -2."""
    return x.max(-2, keepdims=True)
