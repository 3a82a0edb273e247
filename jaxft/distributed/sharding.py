"""The one table from logical axes to mesh axes, and the only place that writes a PartitionSpec.

Code elsewhere names logical axes ("rows", "heads", ...). Under an ambient mesh (`jax.set_mesh`) `constrain` and
`per_device` apply; without one, or on one device, they do nothing, so the same code runs everywhere.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("slices", "data", "fsdp", "context", "tensor")  # from the slowest links to the fastest
SPARE = (
    "fsdp",
    "context",
)  # what weights are cut along for their memory only: products see them whole along both

AXES: dict[str, tuple[str, ...]] = {
    "rows": ("slices", "data", "fsdp"),  # of a batch
    "time": ("context",),
    "read_rows": (
        "context",
        "slices",
        "data",
        "fsdp",
    ),  # rows of which each is a part of the time (see objectives/logps.py)
    "whole_time": (),
    "layers": (),
    "width": SPARE,
    "act_width": (),
    "norm": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "spread_heads": ("tensor", "context"),  # inside attention, where every head sees the whole time
    "head_dim": (),
    "mlp": ("tensor",),
    # Inputs of what gives back a width. Were its last dimension cut instead, XLA would copy whole stacks, turned, to gather it.
    "from_heads": ("tensor", *SPARE),
    "from_mlp": ("tensor", *SPARE),
    "out_width": (),
    "vocab": (
        "tensor",
        *SPARE,
    ),  # tensor first: gathering along the others then moves no block to another place
    "act_vocab": ("tensor",),
    "table_width": (),  # of the embedding table: sharded over vocab only, or the gather rematerialises it
    "rank": (),
    "score": (),
}


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; -1 (at most once) takes what is left.

    slices: groups of devices with slow links between them (TPU slices, hosts), each with a copy of everything. data: copies
    within a group. fsdp: parts of parameters, gradients and optimizer state. context: parts of each row's time, and of the
    parameters. tensor: parts of every product, within a host.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slices: int = 1


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """Mesh over all devices. Raises ValueError if the sizes don't multiply to the number of devices, or cut across hosts."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(shape, axis) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"mesh sizes are positive, with at most one -1 for the rest; found {shape}")
    fixed = math.prod(s for s in sizes if s != -1)
    wanted = f"a multiple of {fixed}" if -1 in sizes else str(fixed)
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"{shape} needs {wanted} devices, found {len(devices)}; change mesh.data, mesh.fsdp or mesh.tensor"
        )
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: list[Any], sizes: list[int]) -> np.ndarray:
    """Devices [slices, data, fsdp, context, tensor], neighbours along the last axes.

    TPU slices have a slice_index and, within one, links in all directions; other devices have fast links within a process.
    """
    slice_of = lambda d: getattr(d, "slice_index", None) or 0  # noqa: E731
    devices = sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))
    linked = all(
        hasattr(d, "core_on_chip") for d in devices
    )  # GPUs have coords and a slice_index too, a host's
    groups = len({slice_of(d) if linked else d.process_index for d in devices})
    if (linked and sizes[0] % groups) or (groups > 1 and groups % sizes[0] and sizes[0] % groups):
        kind = "slices" if linked else "processes"
        raise ValueError(
            f"mesh.slices={sizes[0]}: the devices are in {groups} {kind}; set mesh.slices to {groups}"
        )
    slices = np.array(devices).reshape(sizes[0], -1)
    mesh = np.stack(
        [
            mesh_utils.create_device_mesh(sizes[1:], list(some), allow_split_physical_axes=True)
            for some in slices
        ]
    )
    if not linked and any(len({d.process_index for d in row}) > 1 for row in mesh.reshape(-1, sizes[-1])):
        hosts = len({d.process_index for d in devices})
        each = len(devices) // hosts
        raise ValueError(
            f"mesh.tensor={sizes[-1]} crosses hosts, which have {each} devices each; use a divisor of that"
        )
    return mesh


def partition_spec(
    mesh: Any,
    axes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
    path: str = "",
    heads: int | None = None,
) -> PartitionSpec:
    """The mesh axes of each dimension. Those that don't divide are left out; tensor must divide, or ValueError says so.

    heads: how many heads a flattened "heads", "from_heads" or "kv_heads" dimension holds; tensor divides them, never cuts one.
    """
    sizes = dict(mesh.shape)
    entries: list[tuple[str, ...]] = []
    for i, axis in enumerate(axes):
        wanted = tuple(a for a in AXES[axis] if sizes.get(a, 1) > 1)
        if shape is not None:
            units = heads if heads and axis in ("heads", "kv_heads", "from_heads") else shape[i]
            if "tensor" in wanted and units % sizes["tensor"]:
                kind = axis.removeprefix("from_").replace("_", " ")
                found = f"{units} {kind} do" if kind.endswith("s") else f"{kind} of size {units} does"
                fits = tuple(n for n in range(1, min(units, mesh.size) + 1) if units % n == 0)
                where = path or "activation"
                raise ValueError(
                    f"{where}: {found} not divide over tensor={sizes['tensor']}; use one of {fits}"
                )
            wanted = _dividing(wanted, sizes, shape[i])
        entries.append(wanted)
    return _spec(entries)


def _dividing(axes: tuple[str, ...], sizes: dict[str, int], size: int) -> tuple[str, ...]:
    """As many of the mesh axes as divide `size` together, tensor before the others."""
    kept: list[str] = []
    for axis in sorted(axes, key=lambda axis: axis != "tensor"):
        if size % math.prod(sizes[a] for a in (*kept, axis)) == 0:
            kept.append(axis)
    return tuple(axis for axis in axes if axis in kept)


def _spec(cuts: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(cut if len(cut) > 1 else (cut[0] if cut else None) for cut in cuts))


def array_sharding(
    mesh: Mesh,
    axes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
    path: str = "",
    heads: int | None = None,
) -> NamedSharding:
    """NamedSharding of an array with these logical axes; see partition_spec."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, path, heads))


def shard_between_blocks(
    place: NamedSharding, axes: tuple[str, ...], shape: tuple[int, ...], block: int, path: str
) -> NamedSharding:
    """`place` of a weight [..., I, O] with its input axis cut between blocks only, as codes that share a scale need it.

    Where fsdp and context don't divide the dimension that is their own, they take the other one, and are left out where that
    fails too. Raises ValueError where tensor doesn't divide.
    """
    sizes = dict(place.mesh.shape)
    units = (*shape[:-2], shape[-2] // block if shape[-2] % block == 0 else 1, shape[-1])
    cuts = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in place.spec]
    cuts = [tuple(axis for axis in cut if axis not in SPARE) for cut in cuts]
    if "tensor" in cuts[-2] and units[-2] % sizes["tensor"]:
        fits = tuple(n for n in range(1, units[-2] + 1) if units[-2] % n == 0)
        raise ValueError(
            f"{path}: its input of {shape[-2]} in blocks of {block} can't be cut over tensor={sizes['tensor']}; "
            f"use one of {fits}, or another quant.block"
        )
    own = [i for i, axis in enumerate(axes) if set(SPARE) & set(AXES[axis])]
    spare = tuple(axis for axis in SPARE if sizes.get(axis, 1) > 1)
    some = (spare, *((axis,) for axis in spare)) if own and spare else ()
    for group, i in itertools.product(some, (*own, len(axes) - 2, len(axes) - 1)):
        if units[i] % math.prod(sizes[axis] for axis in (*cuts[i], *group)) == 0:
            cuts[i] = (*cuts[i], *group)
            break
    return NamedSharding(place.mesh, _spec(cuts))


def sharding_for_shape(place: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`place` for an array that stands beside the one it was made for: a dimension of 1 is not cut, another rank not at all."""
    if len(shape) != len(place.spec):
        return NamedSharding(place.mesh, PartitionSpec())
    return NamedSharding(
        place.mesh,
        PartitionSpec(*(None if n == 1 else cut for n, cut in zip(shape, place.spec, strict=True))),
    )


def unsharded_along(place: NamedSharding, dimension: int) -> NamedSharding:
    """`place` with a dimension whole on every device."""
    cuts = list(place.spec)
    cuts[dimension] = None
    return NamedSharding(place.mesh, PartitionSpec(*cuts))


def describe_sharding(place: NamedSharding) -> str:
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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard an activation by its logical axes; None leaves a dimension as it is."""
    mesh = _ambient()
    if mesh is None:
        return x
    spec = partition_spec(mesh, tuple(axis or "act_width" for axis in axes), x.shape)
    entries = (entry if axis else PartitionSpec.UNCONSTRAINED for axis, entry in zip(axes, spec, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def replicate(x: jax.Array) -> jax.Array:
    """The whole array on every device."""
    return x if _ambient() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


def gathered_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of a weight as products use it: whole along fsdp and context, still cut along tensor."""
    used = {"width": "act_width", "vocab": "act_vocab", "from_heads": "heads", "from_mlp": "mlp"}
    return tuple(used.get(axis, axis) for axis in axes)


def gathered_sharding(axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a weight with these axes lies in products, on the ambient mesh; None without one."""
    mesh = _ambient()
    return None if mesh is None else array_sharding(mesh, gathered_axes(axes), shape)


def num_shards(axes: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Into how many parts the ambient mesh cuts an array with these logical axes."""
    mesh = _ambient()
    if mesh is None:
        return 1
    used = [
        entry if isinstance(entry, tuple) else (entry,)
        for entry in partition_spec(mesh, axes, shape)
        if entry
    ]
    return math.prod(dict(mesh.shape)[axis] for entry in used for axis in entry)


def shard_start(axis: str, size: int) -> jax.Array:
    """Inside per_device: where this device's part of a dimension begins, which a mesh axis cuts into parts of `size`."""
    return jax.lax.axis_index(axis) * np.int32(size)


def mesh_has(axis: str) -> bool:
    """Whether the ambient mesh has several devices along a mesh axis."""
    mesh = _ambient()
    return mesh is not None and dict(mesh.shape)[axis] > 1


def check_context_divides(length: int) -> None:
    """Raise ValueError for rows of so many tokens that the ambient mesh can't cut over context."""
    mesh = _ambient()
    context = 1 if mesh is None else dict(mesh.shape)["context"]
    if length % context:
        raise ValueError(
            f"rows of {length} tokens do not divide over mesh.context={context}; use a data.max_length that does"
        )


def per_device(
    fn: Callable,
    in_axes: tuple[tuple[str, ...] | None, ...],
    out_axes: tuple[str, ...],
    out_shape: tuple[int, ...],
) -> Callable:
    """`fn` over each device's own block (shard_map), for what the partitioner can't see through; out_shape: of the result."""

    def call(*args):
        mesh = _ambient()
        if mesh is None:
            return fn(*args)
        specs = tuple(
            PartitionSpec() if axes is None or x is None else partition_spec(mesh, axes, x.shape)
            for axes, x in zip(in_axes, args, strict=True)
        )
        out = partition_spec(mesh, out_axes, out_shape)
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
            f"{shape[1]} rows of a microbatch do not divide over slices x data x fsdp = {parts} devices; "
            f"make data.batch / data.micro a multiple of {parts}, or change mesh.data or mesh.fsdp"
        )
    return NamedSharding(mesh, PartitionSpec(None, AXES["rows"], *(None,) * (len(shape) - 2)))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [micro, rows, ...], the same on every process, to the mesh; each process moves the rows of its own devices."""

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_callback(
            np.shape(x), batch_sharding(mesh, np.shape(x)), lambda index: np.asarray(x)[index]
        )

    return jax.tree.map(place, batch)


def per_device_vector(mesh: Mesh) -> NamedSharding:
    """A vector with an element for each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
