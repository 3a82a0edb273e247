"""The one table from logical axes to mesh axes, and the only place that writes a PartitionSpec.

Code elsewhere names logical axes ("rows", "heads", ...). Under an ambient mesh (`jax.set_mesh`) `constrain` and
`per_device` apply; without one, or on one device, they do nothing, so the same code runs everywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

AXES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # of a batch
    "time": (),
    "layers": (),
    "width": ("fsdp",),
    "act_width": (),
    "norm": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor", "fsdp"),  # tensor first: gathering along fsdp then moves no block to another place
    "act_vocab": ("tensor",),
    "table_width": (),  # of the embedding table: sharded over vocab only, or the gather rematerialises it
    "rank": (),
}


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; -1 (at most once) takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """Mesh over all devices. Raises ValueError if the sizes don't multiply to the number of devices."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(shape, axis) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh sizes are positive, with at most one -1 for the rest; found {shape}")
    if shape.context != 1:
        raise ValueError(f"mesh.context={shape.context}: no array is cut along time yet; set mesh.context=1")
    fixed = math.prod(s for s in sizes if s != -1)
    wanted = f"a multiple of {fixed}" if -1 in sizes else str(fixed)
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(f"{shape} needs {wanted} devices, found {len(devices)}; change mesh.data, mesh.fsdp or mesh.tensor")
    return Mesh(np.array(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(
    mesh: Any, axes: tuple[str, ...], shape: tuple[int, ...] | None = None, path: str = "", heads: int | None = None
) -> PartitionSpec:
    """The mesh axes of each dimension. fsdp is left out where it doesn't divide; tensor must divide, or ValueError says so.

    heads: how many heads a flattened "heads" or "kv_heads" dimension holds; they are divided, never cut.
    """
    sizes = dict(mesh.shape)
    entries: list[tuple[str, ...]] = []
    for i, axis in enumerate(axes):
        wanted = tuple(a for a in AXES[axis] if sizes.get(a, 1) > 1)
        if shape is not None:
            units = heads if heads and axis in ("heads", "kv_heads") else shape[i]
            if "tensor" in wanted and units % sizes["tensor"]:
                kind = axis.replace("_", " ")
                found = f"{units} {kind} do" if kind.endswith("s") else f"{kind} of size {units} does"
                fits = tuple(n for n in range(1, min(units, mesh.size) + 1) if units % n == 0)
                where = path or "activation"
                raise ValueError(f"{where}: {found} not divide over tensor={sizes['tensor']}; use one of {fits}")
            if shape[i] % math.prod(sizes[a] for a in wanted):
                wanted = tuple(a for a in wanted if a == "tensor")
        entries.append(wanted)
    return _spec(entries)


def _spec(cuts: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(cut if len(cut) > 1 else (cut[0] if cut else None) for cut in cuts))


def named(
    mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...] | None = None, path: str = "", heads: int | None = None
) -> NamedSharding:
    """NamedSharding of an array with these logical axes; see partition_spec."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, path, heads))


def between_blocks(place: NamedSharding, axes: tuple[str, ...], shape: tuple[int, ...], block: int, path: str) -> NamedSharding:
    """`place` of a weight [..., I, O] with its input axis cut between blocks only, as codes that share a scale need it.

    Where fsdp doesn't divide the dimension that is its own, it takes the other one, and is left out where that fails too.
    Raises ValueError where tensor doesn't divide.
    """
    sizes = dict(place.mesh.shape)
    units = (*shape[:-2], shape[-2] // block if shape[-2] % block == 0 else 1, shape[-1])
    cuts = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in place.spec]
    cuts = [tuple(axis for axis in cut if axis != "fsdp") for cut in cuts]
    if "tensor" in cuts[-2] and units[-2] % sizes["tensor"]:
        fits = tuple(n for n in range(1, units[-2] + 1) if units[-2] % n == 0)
        raise ValueError(
            f"{path}: its input of {shape[-2]} in blocks of {block} can't be cut over tensor={sizes['tensor']}; "
            f"use one of {fits}, or another quant.block"
        )
    own = [i for i, axis in enumerate(axes) if "fsdp" in AXES[axis]]
    if own and sizes.get("fsdp", 1) > 1:
        for i in (*own, len(axes) - 2, len(axes) - 1):
            if units[i] % math.prod(sizes[axis] for axis in (*cuts[i], "fsdp")) == 0:
                cuts[i] = (*cuts[i], "fsdp")
                break
    return NamedSharding(place.mesh, _spec(cuts))


def fitted(place: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`place` for an array that stands beside the one it was made for: a dimension of 1 is not cut, another rank not at all."""
    if len(shape) != len(place.spec):
        return NamedSharding(place.mesh, PartitionSpec())
    return NamedSharding(place.mesh, PartitionSpec(*(None if n == 1 else cut for n, cut in zip(shape, place.spec, strict=True))))


def uncut(place: NamedSharding, dimension: int) -> NamedSharding:
    """`place` with a dimension whole on every device."""
    cuts = list(place.spec)
    cuts[dimension] = None
    return NamedSharding(place.mesh, PartitionSpec(*cuts))


def shown(place: NamedSharding) -> str:
    """The mesh axes of each dimension as text: `-,fsdp,tensor`."""
    cuts = (entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in place.spec)
    return ",".join("*".join(cut) or "-" for cut in cuts)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _ambient() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def is_spread() -> bool:
    """Whether the ambient mesh has several devices."""
    return _ambient() is not None


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Shard an activation by its logical axes."""
    mesh = _ambient()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))


def whole(x: jax.Array) -> jax.Array:
    """The whole array on every device."""
    return x if _ambient() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


def gathered(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of a weight as products use it: whole along fsdp, still cut along tensor."""
    return tuple({"width": "act_width", "vocab": "act_vocab"}.get(axis, axis) for axis in axes)


def whole_along_fsdp(axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a weight with these axes lies in products, on the ambient mesh; None without one."""
    mesh = _ambient()
    return None if mesh is None else named(mesh, gathered(axes), shape)


def parts(axes: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Into how many parts the ambient mesh cuts an array with these logical axes."""
    mesh = _ambient()
    if mesh is None:
        return 1
    used = [entry if isinstance(entry, tuple) else (entry,) for entry in partition_spec(mesh, axes, shape) if entry]
    return math.prod(dict(mesh.shape)[axis] for entry in used for axis in entry)


def per_device(fn: Callable, in_axes: tuple[tuple[str, ...] | None, ...], out_axes: tuple[str, ...]) -> Callable:
    """`fn` over each device's own block (shard_map); for kernels that the partitioner can't see through."""

    def call(*args):
        mesh = _ambient()
        if mesh is None:
            return fn(*args)
        specs = tuple(
            PartitionSpec() if axes is None or x is None else partition_spec(mesh, axes, x.shape)
            for axes, x in zip(in_axes, args, strict=True)
        )
        out = partition_spec(mesh, out_axes, jax.eval_shape(fn, *args).shape)
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return call


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(dict(mesh.shape)[axis] for axis in AXES["rows"])


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """[micro, rows, ...]: axis 1 over data and fsdp. Raises ValueError where the rows don't divide."""
    parts = row_shards(mesh)
    if shape[1] % parts:
        raise ValueError(
            f"{shape[1]} rows of a microbatch do not divide over data x fsdp = {parts} devices; "
            f"make data.batch / data.micro a multiple of {parts}, or change mesh.data or mesh.fsdp"
        )
    return NamedSharding(mesh, PartitionSpec(None, AXES["rows"], *(None,) * (len(shape) - 2)))


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [micro, rows, ...], the same on every process, to the mesh; each process moves the rows of its own devices."""

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_callback(np.shape(x), batch_sharding(mesh, np.shape(x)), lambda index: np.asarray(x)[index])

    return jax.tree.map(place, batch)


def one_each(mesh: Mesh) -> NamedSharding:
    """A vector with an element for each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
