"""Read a model's parameters from its files in parts, and load them onto a mesh.

Host memory never holds a full parameter. Each process reads, quantises and places only the parts that its own
devices store: it reads a part of a tensor, converts it, and writes it into host buffers of the local shards,
which are copied to the devices at the end. Scales that depend on parts that other processes read are computed
on the mesh. The result has the same bits as on a single device.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.distributed import sharding
from jaxft.models.model import Model
from jaxft.nn.param_spec import spec_paths
from jaxft.nn.quant import QTensor, quantize, scales
from jaxft.nn.quant_formats import encode_scales
from jaxft.weights.hf import hf_read
from jaxft.weights.quantised.file_format import array_index, arrays_of, same_layout
from jaxft.weights.tensors import (
    Index,
    ModelFiles,
    Tensor,
    cast_finite,
    full_index,
    layer_on_host,
    require_finite,
    require_finite_scales,
    tensors_of,
)

PIECE_BYTES = 1 << 22  # bytes that are read and cast at a time, so that they stay in cache
COPY_COLUMNS = 16  # columns per transposing copy: 4 times as fast as all at once
Leaf = Any  # an array or a QTensor of arrays; or of ShapeDtypeStructs or shardings, one for each array
Limits = tuple[tuple[int, int], ...]  # (start, stop) of each dimension: an index that can be a dict's key


@dataclass(frozen=True)
class ParamReader:
    """A parameter and its tensors in a model's files; `read_values` and `read_quantised` read parts of it.

    tensors: one per index along the leading axes, such as the layer, in row-major order. shape: of the full
    parameter. dtype: of the values that are read, by default the files', or float32 if the tensors' dtypes
    differ. layout: the quantised layout of all tensors in the files; None if a tensor is not quantised, if
    layouts differ, or if a tensor contains other parameters too. changed(tensor, index): returns the values
    that replace the files', such as merged ones; None to read the files.
    """

    files: ModelFiles
    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: QTensor | None
    changed: Callable[[Tensor, Index], np.ndarray] | None = None

    def read(self, tensor: Tensor, index: Index = ()) -> np.ndarray:
        """Return the part of a tensor's values [in, out] at `index`, dequantised, in the files' dtype."""
        return self.changed(tensor, index) if self.changed else tensor.read(self.files, index)


def param_readers(files: ModelFiles, model: Model) -> dict[str, ParamReader]:
    """Return readers of all base parameters by path. Raises ValueError for other tensors than the model's."""
    hf_read.check_tensors(files, model)
    readers = {}
    specs = spec_paths(model.specs.get("base", model.specs))
    for path, tensors in tensors_of(model).items():
        dtypes = {files.tensors[tensor.name].dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        layout = _common_layout(files, tensors)
        readers[path] = ParamReader(files, tensors, specs[path].shape, dtype, layout)
    return readers


def _common_layout(files: ModelFiles, tensors: Sequence[Tensor]) -> QTensor | None:
    stored = [files.tensors[tensor.name].quantised for tensor in tensors]
    layouts = [x.layout for x in stored if x is not None and x.layout is not None]
    alone = tensors[0].transposed and tensors[0].offset is None
    if not alone or len(layouts) < len(tensors) or not all(same_layout(x, layouts[0]) for x in layouts):
        return None
    return layouts[0]


def read_values(reader: ParamReader, tensor: Tensor, index: Index = ()) -> np.ndarray:
    """Read the part of a tensor's values [in, out] at `index` in the reader's dtype, dequantised if the files
    store it quantised. Raises ValueError for values that are not finite.
    """
    in_file = require_finite(tensor.turned(reader.read(tensor, index)))  # the error names the place
    return tensor.turned(in_file.astype(reader.dtype, copy=False))


def read_quantised(reader: ParamReader, tensor: Tensor, index: Index = ()) -> QTensor:
    """Read codes and scales of a quantised tensor [in, out], or of the part at `index`, which begins and ends
    at blocks.

    The reader must have a layout. Raises ValueError for scales that are not finite.
    """
    stored = reader.files.tensors[tensor.name].quantised
    value = stored and require_finite_scales(stored.read(index))
    assert isinstance(value, QTensor)
    return value


def read_whole(reader: ParamReader) -> np.ndarray:
    """Read a full parameter on the host, in the reader's dtype."""
    out = np.empty(reader.shape, reader.dtype)
    for tensor in reader.tensors:
        for index in _small_parts(reader, tensor, full_index((), tensor.values)):
            with errors_name_tensor(reader, tensor, index):
                value = read_values(reader, tensor, index)
            _copy_into(out[tensor.index][index], value)
    return out


def read_table_rows(reader: ParamReader, numbers: Sequence[int], transposed: bool) -> np.ndarray:
    """Return the vectors [N, D] of token ids, from a table [V, D] or, if `transposed`, a head [D, V]."""
    rows, (tensor,) = [], reader.tensors
    for number in numbers:
        row = (slice(number, number + 1),)
        index = full_index((slice(None), *row) if transposed else row, tensor.values)
        with errors_name_tensor(reader, tensor, index):
            rows.append(read_values(reader, tensor, index).reshape(-1))
    return np.stack(rows)


def _small_parts(reader: ParamReader, tensor: Tensor, index: Index) -> list[Index]:
    """Split the part of a tensor at `index` into parts of at most PIECE_BYTES bytes; but a part has at least
    COPY_COLUMNS rows, or columns if the files store it transposed.

    Quantised tensors are not split, because some formats dequantise only the full tensor.
    """
    if not index or reader.files.tensors[tensor.name].quantised:
        return [index]
    axis = len(index) - 1 if tensor.transposed else 0
    others = math.prod(s.stop - s.start for i, s in enumerate(index) if i != axis)
    step = max(1, PIECE_BYTES // max(1, others * reader.dtype.itemsize) // COPY_COLUMNS) * COPY_COLUMNS
    first, last = index[axis].start, index[axis].stop
    return [
        (*index[:axis], slice(start, min(start + step, last)), *index[axis + 1 :])
        for start in range(first, last, step)
    ]


@contextlib.contextmanager
def errors_name_tensor(reader: ParamReader, tensor: Tensor, index: Index) -> Iterator[None]:
    """Add the file and the tensor's name to a ValueError raised in the context, unless its message begins
    with the file; and `index`, if it is only a part of the tensor.
    """
    try:
        yield
    except ValueError as e:
        is_part = full_index(index, tensor.values) != full_index((), tensor.values)
        part = ", ".join(f"{s.start}:{s.stop}" for s in index)
        where = reader.files.where
        named = str(e).startswith((f"{where}:", f"{where}/"))
        message = str(e) if named else f"{where}: {tensor.name}: {e}"
        raise ValueError(f"{message} (in its part [{part}])" if is_part else message) from e


def _copy_into(out: np.ndarray, value: np.ndarray) -> None:
    """Set `out[...] = value`, faster than NumPy for transposed values and for dtypes such as bfloat16."""
    if out.dtype == value.dtype and out.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, value = out.view(bits), value.view(bits)
    if list(value.strides[-2:]) == sorted(value.strides[-2:], reverse=True):  # not transposed
        out[...] = value
        return
    for start in range(0, value.shape[-1], COPY_COLUMNS):
        out[..., start : start + COPY_COLUMNS] = value[..., start : start + COPY_COLUMNS]


# Loading onto a mesh


def load_param(reader: ParamReader, like: Leaf, shardings: Leaf, unchanged: bool) -> Leaf:
    """Load a parameter onto the mesh of `shardings`. All processes of the mesh call this together.

    like: the parameter as it is to be stored, a ShapeDtypeStruct or a QTensor of them. unchanged: store the
    files' codes and scales, which must have the layout of `like`; otherwise read the values in the files'
    precision and cast or quantise them. Host memory contains the local shards and one part of a tensor.
    """
    parts_by_process = _plan_parts(reader, like, shardings)
    parts = parts_by_process[jax.process_index()]
    shared = None
    if is_quantised(like) and not unchanged:
        all_parts = [part for parts in parts_by_process.values() for part in parts]
        ins_split, outs_split = (
            any(part[axis] != slice(0, reader.shape[axis]) for part in all_parts) for axis in (-2, -1)
        )
        if like.outer is not None and (ins_split or outs_split):
            return _load_with_quantised_scales(reader, like, shardings, parts)
        if like.block is None and ins_split:
            shared = _channel_scales(reader, like, shardings, parts)
    return _load_parts(reader, like, shardings, parts, unchanged, shared)


# The plan


def _plan_parts(reader: ParamReader, like: Leaf, shardings: Leaf) -> dict[int, list[Index]]:
    """Return, by process index, the parts of the parameter that the devices of a process store."""
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

    return {process: [part_of_param(x) for x in _merge_parts(local)] for process, local in shards.items()}


def _parts_of_tensors(reader: ParamReader, parts: list[Index]) -> Iterator[tuple[Tensor, Index]]:
    """Yield (tensor, index in it) for each part of the parameter and each tensor that contains some of it."""
    for tensor in reader.tensors:
        lead = len(tensor.index)
        for part in parts:
            if all(s.start <= i < s.stop for i, s in zip(tensor.index, part[:lead], strict=True)):
                yield tensor, part[lead:]


def _merge_parts(parts: set[Limits]) -> list[Limits]:
    """Merge disjoint parts of an array into one if they fill a rectangular block; else return them sorted."""

    def size(part: Limits) -> int:
        return math.prod(stop - start for start, stop in part)

    box = tuple(
        (min(start for start, _ in dimension), max(stop for _, stop in dimension))
        for dimension in zip(*parts, strict=True)
    )
    return [box] if sum(map(size, parts)) == size(box) else sorted(parts)


def _load_parts(
    reader: ParamReader,
    like: Leaf,
    shardings: Leaf,
    parts: list[Index],
    unchanged: bool = False,
    shared: np.ndarray | None = None,
) -> Leaf:
    """Read parts of a parameter, convert them unless they are stored unchanged, and place them.

    unchanged: as for load_param. shared: scales [..., 1, out] common to all parts; None computes scales for
    each part alone.
    """
    buffers = Buffers(like, shardings)
    for tensor, part in _parts_of_tensors(reader, parts):
        for index in [part] if is_quantised(like) else _small_parts(reader, tensor, part):
            with errors_name_tensor(reader, tensor, index):
                if unchanged:
                    value: Leaf = read_quantised(reader, tensor, index)
                else:
                    scale = None if shared is None else shared[tensor.index][..., index[-1]]
                    value = store_as(read_values(reader, tensor, index), like, scale)
            buffers.write(tensor.index, index, value)
    return buffers.to_devices()


# Scales that depend on several parts


def _load_with_quantised_scales(
    reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]
) -> QTensor:
    """Quantise a parameter whose scales are quantised in groups that span the whole layer.

    First every process quantises its parts with float scales; then all quantise the gathered scales, one
    layer at a time.
    """
    scale = jax.ShapeDtypeStruct(like.scale.shape, np.float32)
    plain, sharded = (replace(x, outer=None, mean=None) for x in (replace(like, scale=scale), shardings))
    floats = _load_parts(reader, plain, sharded, parts)
    names = ("scale", "outer", "mean")
    buffers = {name: Buffers(getattr(like, name), getattr(shardings, name)) for name in names}
    for tensor in reader.tensors:
        in_floats: Any = layer_on_host(floats.scale, tensor.index)
        for name, value in zip(names, encode_scales(in_floats), strict=True):
            buffers[name].write(tensor.index, (), value)
    arrays: dict[str, Any] = {name: buffers[name].to_devices() for name in names}
    return replace(floats, **arrays)


def _channel_scales(reader: ParamReader, like: QTensor, shardings: QTensor, parts: list[Index]) -> np.ndarray:
    """Return the scale [..., 1, out] of each output channel: the largest over the shards of its inputs."""
    *lead, rows, outs = like.codes.shape
    count = rows // shardings.codes.shard_shape(like.codes.shape)[-2]  # parts that the inputs are split into
    part_scales = jax.ShapeDtypeStruct((*lead, count, outs), np.float32)
    buffers = Buffers(part_scales, sharding.sharding_for_shape(shardings.codes, part_scales.shape))
    part_size = reader.shape[-2] // count
    for tensor, index in _parts_of_tensors(reader, parts):
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
    """Host memory for every distinct shard of a parameter's arrays that this process's devices store."""

    def __init__(self, like: Leaf, shardings: Leaf) -> None:
        self.like, self.arrays, self.shardings = like, _arrays_by_name(like), _arrays_by_name(shardings)
        self.shards = {
            name: {
                shard: np.empty([stop - start for start, stop in shard], x.dtype)
                for shard in sorted(set(_limits_by_device(x, self.shardings[name]).values()))
            }
            for name, x in self.arrays.items()
        }

    def write(self, lead: tuple[int, ...], index: Index, value: Leaf) -> None:
        """Copy a part of the parameter into the shards that overlap it. lead: where the part is along the
        leading axes. index: where `value` is along the other axes.
        """
        for name, x in _arrays_by_name(value).items():
            part = array_index(self.like, name, index) if isinstance(self.like, QTensor) else index
            at = full_index((*(slice(i, i + 1) for i in lead), *part), self.arrays[name].shape)
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
                    _copy_into(buffer[(..., *to)], x[of])

    def to_devices(self) -> Leaf:
        """Copy the shards to their devices, releasing each buffer in turn, and return the parameter."""
        arrays: dict[str, Any] = {}
        for name, x in self.arrays.items():
            devices: dict[Limits, list[jax.Device]] = {}
            for device, shard in _limits_by_device(x, self.shardings[name]).items():
                devices.setdefault(shard, []).append(device)
            parts = []
            for shard in list(self.shards[name]):
                buffer = self.shards[name].pop(shard)
                parts += [jax.device_put(buffer, device) for device in devices[shard]]
            arrays[name] = jax.make_array_from_single_device_arrays(x.shape, self.shardings[name], parts)
        return replace(self.like, **arrays) if isinstance(self.like, QTensor) else arrays[""]


def _limits_by_device(array: Any, sharding: Sharding) -> dict[jax.Device, Limits]:
    """Return for each of this process's devices the (start, stop) limits of its shard of the array."""
    indices = sharding.addressable_devices_indices_map(array.shape)
    return {device: limits(index or (), array.shape) for device, index in indices.items()}


def _arrays_by_name(x: Leaf) -> dict[str, Any]:
    """Return the arrays of a QTensor by name, or the one array under the name ""."""
    return arrays_of(x) if isinstance(x, QTensor) else {"": x}


# Conversion


def is_quantised(like: Leaf) -> bool:
    """Return whether `like` has fewer bits than its dtype; False for a QTensor of kind "bits" (raw bits)."""
    return isinstance(like, QTensor) and like.kind != "bits"


def store_as(value: np.ndarray, like: Leaf, scale: np.ndarray | None = None) -> Leaf:
    """Cast or quantise values on the host to the dtype, kind and blocks of `like`.

    scale: scales to quantise with, None to compute them from `value`. Raises ValueError for values that are
    too large for the dtype, and for scales that are not finite.
    """
    if not isinstance(like, QTensor):
        return cast_finite(value, like.dtype)
    if like.kind == "bits":
        return quantize(cast_finite(value, like.dtype), "bits")
    packed: Any = quantize(value, like.kind, like.block, like.outer is not None, scale)
    return replace(require_finite_scales(packed), dtype=like.dtype)


def shard_host_array(array: np.ndarray, to: Sharding) -> jax.Array:
    """Shard an array that every process has in full; each process copies only its own shards."""
    return jax.make_array_from_callback(array.shape, to, lambda index: array[index])
