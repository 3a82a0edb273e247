"""Load a parameter from a model's files onto a mesh.

Each process reads, quantises and places only the parts that its own devices store: it reads a part of a
tensor, converts it, and writes it into host buffers of the local shards, which are copied to the devices at
the end. Scales that depend on parts that other processes read are computed on the mesh. The result has the
same bits as on a single device.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.distributed import sharding
from jaxft.nn.quant import QTensor, quantize, scales
from jaxft.nn.quant_formats import encode_scales
from jaxft.weights import finite
from jaxft.weights.model_files import Index, full_index
from jaxft.weights.param_reader import (
    ParamReader,
    copy_into,
    errors_name_tensor,
    read_quantised,
    read_values,
    small_parts,
)
from jaxft.weights.quantised.file_format import array_index, arrays_of
from jaxft.weights.tensors import Tensor, layer_on_host

Leaf = Any  # an array or a QTensor of arrays; or of ShapeDtypeStructs or shardings, one for each array
Limits = tuple[tuple[int, int], ...]  # (start, stop) of each dimension: an index that can be a dict's key


def load_param(reader: ParamReader, like: Leaf, shardings: Leaf, unchanged: bool) -> Leaf:
    """Load a parameter onto the mesh of `shardings`. All processes of the mesh call this together.

    like: the parameter as it is to be stored, a ShapeDtypeStruct or a QTensor of them. unchanged: store the
    codes and scales in the files, whose layout is that of `like`; otherwise the values are cast or quantised
    from the files' own precision. Host memory holds the local shards of the parameter and one part of a
    tensor.
    """
    parts_by_process = plan_parts(reader, like, shardings)
    parts = parts_by_process[jax.process_index()]
    shared = None
    if is_quantised(like) and not unchanged:
        all_parts = [part for parts in parts_by_process.values() for part in parts]
        ins_split, outs_split = (
            any(part[axis] != slice(0, reader.shape[axis]) for part in all_parts) for axis in (-2, -1)
        )
        if like.outer is not None and (ins_split or outs_split):
            return load_with_quantised_scales(reader, like, shardings, parts)
        if like.block is None and ins_split:
            shared = channel_scales(reader, like, shardings, parts)
    return load_parts(reader, like, shardings, parts, unchanged, shared)


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


def load_parts(
    reader: ParamReader,
    like: Leaf,
    shardings: Leaf,
    parts: list[Index],
    unchanged: bool = False,
    shared: np.ndarray | None = None,
) -> Leaf:
    """Read parts of a parameter, convert them unless they are stored unchanged, and place them.

    unchanged: as for load_param. shared: scales [..., 1, out] that other parts have too; None for those of
    each part alone.
    """
    buffers = Buffers(like, shardings)
    for tensor, part in parts_of_tensors(reader, parts):
        for index in [part] if is_quantised(like) else small_parts(reader, tensor, part):
            with errors_name_tensor(reader, tensor, index):
                if unchanged:
                    value: Leaf = read_quantised(reader, tensor, index)
                else:
                    scale = None if shared is None else shared[tensor.index][..., index[-1]]
                    value = store_as(read_values(reader, tensor, index), like, scale)
            buffers.write(tensor.index, index, value)
    return buffers.to_devices()


# Scales that depend on several parts


def load_with_quantised_scales(
    reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]
) -> QTensor:
    """Quantise a parameter whose scales are quantised in groups that span the whole layer.

    First every process quantises its parts with float scales; then all quantise the gathered scales, one
    layer at a time.
    """
    scale = jax.ShapeDtypeStruct(like.scale.shape, np.float32)
    plain, sharded = (replace(x, outer=None, mean=None) for x in (replace(like, scale=scale), shardings))
    floats = load_parts(reader, plain, sharded, parts)
    names = ("scale", "outer", "mean")
    buffers = {name: Buffers(getattr(like, name), getattr(shardings, name)) for name in names}
    for tensor in reader.tensors:
        in_floats: Any = layer_on_host(floats.scale, tensor.index)
        for name, value in zip(names, encode_scales(in_floats), strict=True):
            buffers[name].write(tensor.index, (), value)
    arrays: dict[str, Any] = {name: buffers[name].to_devices() for name in names}
    return replace(floats, **arrays)


def channel_scales(reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]) -> np.ndarray:
    """Return the scale [..., 1, out] of each output channel: the largest scale of the parts of its inputs."""
    *lead, rows, outs = like.codes.shape
    count = rows // shardings.codes.shard_shape(like.codes.shape)[-2]  # parts that the inputs are split into
    part_scales = jax.ShapeDtypeStruct((*lead, count, outs), np.float32)
    buffers = Buffers(part_scales, sharding.sharding_for_shape(shardings.codes, part_scales.shape))
    part_size = reader.shape[-2] // count
    for tensor, index in parts_of_tensors(reader, parts):
        with errors_name_tensor(reader, tensor, index):
            value = scales(read_values(reader, tensor, index), like.kind, like.block)
        *above, ins, outs = index
        part_rows = slice(ins.start // part_size, ins.stop // part_size)
        value = np.broadcast_to(value, (*value.shape[:-2], part_rows.stop - part_rows.start, value.shape[-1]))
        buffers.write(tensor.index, (*above, part_rows, outs), value)
    return layer_on_host(buffers.to_devices()).max(-2, keepdims=True)


# Host buffers of the shards of this process's devices


def limits(index: Index, shape: tuple[int, ...]) -> Limits:
    """Return (start, stop) of each dimension of an index into an array of this shape."""
    return tuple((s.start, s.stop) for s in full_index(index, shape))


class Buffers:
    """Host memory for every distinct shard, of each array of a parameter, that this process's devices
    store.
    """

    def __init__(self, like: Leaf, shardings: Leaf) -> None:
        self.like, self.arrays, self.shardings = like, arrays_by_name(like), arrays_by_name(shardings)
        self.shards = {
            name: {
                shard: np.empty([stop - start for start, stop in shard], x.dtype)
                for shard in sorted(set(limits_by_device(x, self.shardings[name]).values()))
            }
            for name, x in self.arrays.items()
        }

    def write(self, lead: tuple[int, ...], index: Index, value: Leaf) -> None:
        """Write a value, which is the part at `index` of the parameter at `lead` along its leading axes, into
        the shards that overlap it.
        """
        for name, x in arrays_by_name(value).items():
            own = array_index(self.like, name, index) if isinstance(self.like, QTensor) else index
            at = full_index((*(slice(i, i + 1) for i in lead), *own), self.arrays[name].shape)
            x = np.asarray(x)
            x = x.reshape((1,) * len(lead) + x.shape)
            for shard, buffer in self.shards[name].items():
                overlap = [
                    (max(s.start, start), min(s.stop, stop))
                    for s, (start, stop) in zip(at, shard, strict=True)
                ]
                if all(start < stop for start, stop in overlap):
                    to: Any = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, shard))
                    of: Any = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(overlap, at))
                    copy_into(buffer[(..., *to)], x[of])

    def to_devices(self) -> Leaf:
        """Copy the shards to their devices, each buffer being released before the next is copied; return the
        parameter.
        """
        arrays: dict[str, Any] = {}
        for name, x in self.arrays.items():
            devices: dict[Limits, list[jax.Device]] = {}
            for device, shard in limits_by_device(x, self.shardings[name]).items():
                devices.setdefault(shard, []).append(device)
            parts = []
            for shard in list(self.shards[name]):
                buffer = self.shards[name].pop(shard)
                parts += [jax.device_put(buffer, device) for device in devices[shard]]
            arrays[name] = jax.make_array_from_single_device_arrays(x.shape, self.shardings[name], parts)
        return replace(self.like, **arrays) if isinstance(self.like, QTensor) else arrays[""]


def limits_by_device(array: Any, sharding: Sharding) -> dict[jax.Device, Limits]:
    """Return the shard of an array that each of this process's devices stores."""
    indices = sharding.addressable_devices_indices_map(array.shape)
    return {device: limits(index or (), array.shape) for device, index in indices.items()}


def arrays_by_name(x: Leaf) -> dict[str, Any]:
    """Return the arrays of a QTensor by name, or the one array under the name ""."""
    return arrays_of(x) if isinstance(x, QTensor) else {"": x}


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


def shard_host_array(array: np.ndarray, to: Sharding) -> jax.Array:
    """Shard an array that every process has in full; each process copies only its own shards."""
    return jax.make_array_from_callback(array.shape, to, lambda index: array[index])
