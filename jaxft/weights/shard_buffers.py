"""Host buffers for the shards of a parameter that this process's devices store, filled part by part."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.nn.quant import QTensor
from jaxft.weights.model_files import Index, full_index
from jaxft.weights.param_reader import copy_into
from jaxft.weights.quant_layout import array_index, array_names

Leaf = Any  # an array or a QTensor of arrays; or of ShapeDtypeStructs or shardings, one for each array
Limits = tuple[
    tuple[int, int], ...
]  # (start, stop) of each dimension of a part: an index that can be a dict's key


def limits(index: Index, shape: tuple[int, ...]) -> Limits:
    """Return (start, stop) of each dimension of an index into an array of this shape."""
    return tuple((s.start, s.stop) for s in full_index(index, shape))


class ArrayBuffers:
    """Host memory for every distinct shard of an array that this process's devices store."""

    def __init__(self, like: Any, sharding: Sharding) -> None:
        self.shape, self.sharding = like.shape, sharding
        indices = sharding.addressable_devices_indices_map(like.shape).values()
        shards = sorted({limits(index or (), like.shape) for index in indices})
        self.shards = {
            shard: np.empty([stop - start for start, stop in shard], like.dtype) for shard in shards
        }

    def write(self, lead: tuple[int, ...], index: Index, value: Any) -> None:
        """Write a value that is the part of `array[lead]` at `index` into the shards that overlap it."""
        value = np.asarray(value)
        index = full_index((*(slice(i, i + 1) for i in lead), *index), self.shape)
        value = value.reshape(*(1 for _ in lead), *value.shape)
        for shard, buffer in self.shards.items():
            overlap = [
                (max(s.start, start), min(s.stop, stop))
                for s, (start, stop) in zip(index, shard, strict=True)
            ]
            if all(start < stop for start, stop in overlap):
                to: Any = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, shard))
                of: Any = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(overlap, index))
                copy_into(buffer[(..., *to)], value[of])

    def to_devices(self) -> jax.Array:
        """Copy the shards to their devices, each buffer being released before the next is copied; return the
        array.
        """
        devices: dict[Limits, list[jax.Device]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            devices.setdefault(limits(index or (), self.shape), []).append(device)
        arrays = []
        for shard in sorted(self.shards):
            buffer = self.shards.pop(shard)
            arrays += [jax.device_put(buffer, device) for device in devices[shard]]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


class ShardBuffers:
    """The buffers of a parameter: of its array, or of each array of a QTensor."""

    def __init__(self, like: Leaf, shardings: Leaf) -> None:
        self.like, by_name = like, arrays_by_name(shardings)
        self.arrays = {name: ArrayBuffers(x, by_name[name]) for name, x in arrays_by_name(like).items()}

    def write(self, lead: tuple[int, ...], index: Index, value: Leaf) -> None:
        """Write a value that is the part of the kernel [..., in, out] at `lead` that `index` selects."""
        for name, x in arrays_by_name(value).items():
            in_array = array_index(self.like, name, index) if isinstance(self.like, QTensor) else index
            self.arrays[name].write(lead, in_array, x)

    def to_devices(self) -> Leaf:
        """Copy the shards to their devices; return the parameter."""
        arrays: dict[str, Any] = {name: self.arrays.pop(name).to_devices() for name in list(self.arrays)}
        return replace(self.like, **arrays) if isinstance(self.like, QTensor) else arrays[""]


def arrays_by_name(x: Leaf) -> dict[str, Any]:
    """Return the arrays of a QTensor by name, or the one array under the name ""."""
    return {name: getattr(x, name) for name in array_names(x)} if isinstance(x, QTensor) else {"": x}
