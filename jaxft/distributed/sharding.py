"""The table from logical axes to mesh axes; the only module that builds a PartitionSpec.

Other modules use logical axes ("rows", "heads", ...). `constrain` and `per_device` apply under an ambient
mesh (`jax.set_mesh`) of more than one device and are no-ops otherwise, so the same code runs on one device.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft.annotations import Bounds, check_bounds

MESH_AXES = ("slices", "data", "fsdp", "expert", "context", "tensor")  # from the slowest links to the fastest
SPARE = ("fsdp", "context")  # axes that shard weights only to save memory: gathered for matmuls

AXES: dict[str, tuple[str, ...]] = {
    "rows": ("slices", "data", "fsdp"),  # rows of a batch
    "time": ("context",),
    # rows that are each a shard of a row's time, see objectives/read_positions.py
    "read_rows": ("context", "slices", "data", "fsdp"),
    "whole_time": (),
    "layers": (),
    "width": SPARE,
    "act_width": (),
    "norm": (),
    "experts": ("expert",),  # each expert's kernel is sharded along its own axes, too, as a dense one
    "adapters": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "spread_heads": ("tensor", "context"),  # inside attention, where every head has the full time
    "head_dim": (),
    "taps": (),  # of a convolution over time
    "expert_scores": (),  # outputs of a router, one for each expert
    "mlp": ("tensor",),
    # Input axes of kernels that return to the width. With the output axis sharded instead, XLA would gather a
    # transposed copy of the stacked layers.
    "from_heads": ("tensor", *SPARE),
    "from_mlp": ("tensor", *SPARE),
    "out_width": (),
    # Kernels of several projections (phi3.py): stored sharded over inputs, since a contiguous part
    # of their outputs is not a part of the heads. "part_shards": the outputs that each device computes.
    "fused_width": (*SPARE, "tensor"),
    "fused_kv_heads": (),
    "fused_mlp": (),
    "part_shards": ("tensor",),
    "vocab": ("tensor", *SPARE),  # tensor first, so that a gather along the others does not reorder blocks
    "act_vocab": ("tensor",),
    "table_width": (),  # the embedding table is sharded over vocab only, or the gather would rematerialise it
    "rank": (),
    "tokens": (),
    "score": (),
}
FUSED_OUTPUTS = ("fused_kv_heads", "fused_mlp")
COUNTED = ("heads", "kv_heads", "from_heads", *FUSED_OUTPUTS)


AxisSize = Annotated[int, Bounds(1, also=-1)]


@dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis; one of them may be -1, which uses all remaining devices.

    slices: groups of devices with slow links between them (TPU slices, hosts); parameters are replicated
    across them.
    data: copies of the parameters within a group; each copy computes on other rows of the batch. fsdp: shards
    of parameters, gradients and optimizer state; each also computes on other rows. context: shards of the
    time axis, and of the parameters. tensor: shards of every matmul, within a host. expert: shards of a
    layer's experts, for a family of yours with mixture-of-experts layers (see models/dense.py). The families
    that ship have none and need 1.
    """

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1
    context: AxisSize = 1
    slices: AxisSize = 1
    expert: AxisSize = 1

    def __post_init__(self) -> None:
        check_bounds(self, "mesh")
        rest = [f"mesh.{axis}" for axis, size in vars(self).items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"{' and '.join(rest)} are -1, but only one axis can take all remaining devices; give the "
                "others a number"
            )


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """Make a mesh of `devices`, by default all of them.

    Raises ValueError if the sizes do not multiply to the number of devices, if mesh.slices does not fit the
    slices or hosts of the devices, or if mesh.tensor crosses hosts.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(shape, axis) for axis in MESH_AXES]
    fixed = math.prod(s for s in sizes if s != -1)
    expected = f"a multiple of {fixed}" if -1 in sizes else str(fixed)
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"{shape} needs {expected} devices, got {len(devices)}; "
            "change mesh.data, mesh.fsdp, mesh.expert or mesh.tensor"
        )
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: list[Any], sizes: list[int]) -> np.ndarray:
    """Return the devices as an array of shape `sizes`, in the order of MESH_AXES, with the fastest links
    along the last axes.

    Devices of a TPU slice share a slice_index and have fast links to one another; other devices have fast
    links only within a process.
    """

    def slice_of(device: Any) -> int:
        return getattr(device, "slice_index", None) or 0

    devices = sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))
    # not coords or slice_index: GPUs have them too, with an index per host
    linked = all(hasattr(d, "core_on_chip") for d in devices)
    groups = len({slice_of(d) if linked else d.process_index for d in devices})
    if (linked and sizes[0] % groups) or (groups > 1 and groups % sizes[0] and sizes[0] % groups):
        kind = "slices" if linked else "processes"
        raise ValueError(
            f"mesh.slices={sizes[0]}: the devices are in {groups} {kind}; use mesh.slices={groups}"
        )
    slices = np.array(devices).reshape(sizes[0], -1)
    mesh = np.stack(
        [
            mesh_utils.create_device_mesh(sizes[1:], list(group), allow_split_physical_axes=True)
            for group in slices
        ]
    )
    if not linked and any(len({d.process_index for d in row}) > 1 for row in mesh.reshape(-1, sizes[-1])):
        hosts = len({d.process_index for d in devices})
        per_host = len(devices) // hosts
        raise ValueError(
            f"mesh.tensor={sizes[-1]} crosses hosts; use a divisor of the {per_host} devices of a host"
        )
    return mesh


def partition_spec(
    mesh: Mesh | AbstractMesh,
    axes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
    path: str = "",
    heads: int | None = None,
) -> PartitionSpec:
    """Return the PartitionSpec of an array with these logical axes, the keys of AXES.

    shape: the array's shape. With it, a dimension is not sharded along mesh axes whose sizes do not divide
    it. Raises ValueError if the size of the mesh axis tensor does not divide a dimension that it shards.
    path: the array's name for this error.
    heads: number of attention heads, for the axes in COUNTED. Their dimension may be heads x head_dim; tensor
    must divide `heads` instead of the dimension, so that no head is split.
    """
    sizes = dict(mesh.shape)
    entries: list[tuple[str, ...]] = []
    for i, axis in enumerate(axes):
        mesh_axes = tuple(a for a in AXES[axis] if sizes.get(a, 1) > 1)
        if shape is not None:
            units = heads if heads and axis in COUNTED else shape[i]
            spread = "tensor" in mesh_axes or (axis in FUSED_OUTPUTS and heads is not None)
            if spread and units % sizes.get("tensor", 1):
                kind = axis.removeprefix("from_").removeprefix("fused_").replace("_", " ")
                subject = f"{units} {kind} do" if kind.endswith("s") else f"{kind} of size {units} does"
                fits = tuple(n for n in range(1, min(units, mesh.size) + 1) if units % n == 0)
                where = path or "activation"
                raise ValueError(
                    f"{where}: {subject} not divide over tensor={sizes['tensor']}; use one of {fits} "
                    "for mesh.tensor"
                )
            mesh_axes = _dividing(mesh_axes, sizes, shape[i])
        entries.append(mesh_axes)
    return _spec(entries)


def _dividing(axes: tuple[str, ...], sizes: dict[str, int], size: int) -> tuple[str, ...]:
    """Return the mesh axes, of `axes`, along which a dimension of `size` elements is sharded.

    An axis is added, tensor first, if the product of the sizes chosen so far still divides `size`. sizes:
    mesh axis -> number of devices.
    """
    chosen: list[str] = []
    for axis in sorted(axes, key=lambda axis: axis != "tensor"):
        if size % math.prod(sizes[a] for a in (*chosen, axis)) == 0:
            chosen.append(axis)
    return tuple(axis for axis in axes if axis in chosen)


def _spec(entries: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes if len(axes) > 1 else (axes[0] if axes else None) for axes in entries))


def array_sharding(
    mesh: Mesh,
    axes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
    path: str = "",
    heads: int | None = None,
) -> NamedSharding:
    """Return the NamedSharding of an array with these logical axes; see partition_spec."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, path, heads))


def shard_between_blocks(
    sharding: NamedSharding, axes: tuple[str, ...], shape: tuple[int, ...], block: int, path: str
) -> NamedSharding:
    """Adapt the sharding of a weight [..., I, O] to quantised storage, in which I is only sharded between
    blocks.

    axes, shape: the weight's logical axes and shape. block: inputs per quantisation block. path: the weight's
    name, for the error. The mesh axes fsdp and context shard the dimension that AXES assigns to them. If
    their sizes do not divide it, they shard I or O; if that is impossible, only one of them is used, or none.
    Raises ValueError if the size of the mesh axis tensor does not divide the number of blocks.
    """
    sizes = dict(sharding.mesh.shape)
    units = (*shape[:-2], shape[-2] // block if shape[-2] % block == 0 else 1, shape[-1])
    entries = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in sharding.spec]
    entries = [tuple(axis for axis in mesh_axes if axis not in SPARE) for mesh_axes in entries]
    if "tensor" in entries[-2] and units[-2] % sizes["tensor"]:
        fits = tuple(n for n in range(1, units[-2] + 1) if units[-2] % n == 0)
        raise ValueError(
            f"{path}: an input axis of {shape[-2]} in blocks of {block} can't be sharded over "
            f"tensor={sizes['tensor']}; use one of {fits} for mesh.tensor, or another quant.block"
        )
    usual = [i for i, axis in enumerate(axes) if set(SPARE) & set(AXES[axis])]
    spare = tuple(axis for axis in SPARE if sizes.get(axis, 1) > 1)
    groups = (spare, *((axis,) for axis in spare)) if usual and spare else ()
    for group, i in itertools.product(groups, (*usual, len(axes) - 2, len(axes) - 1)):
        if units[i] % math.prod(sizes[axis] for axis in (*entries[i], *group)) == 0:
            entries[i] = (*entries[i], *group)
            break
    return NamedSharding(sharding.mesh, _spec(entries))


def sharding_for_shape(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Adapt a sharding to an array with the same axes but other sizes, such as the scales of a quantised
    weight: dimensions of size 1 are not sharded.
    """
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(
            *(None if n == 1 else mesh_axes for n, mesh_axes in zip(shape, sharding.spec, strict=True))
        ),
    )


def describe_sharding(sharding: NamedSharding) -> str:
    """Format the mesh axes of each dimension, "-" for none: `-,data*fsdp,tensor`."""
    entries = (entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in sharding.spec)
    return ",".join("*".join(mesh_axes) or "-" for mesh_axes in entries)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of a fully replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def _ambient() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def is_multi_device() -> bool:
    """Whether the ambient mesh (jax.set_mesh) has more than one device."""
    return _ambient() is not None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard an activation on the ambient mesh. axes: the logical axis of each dimension; XLA decides how to
    shard a dimension whose axis is None.
    """
    mesh = _ambient()
    if mesh is None:
        return x
    spec = partition_spec(mesh, tuple(axis or "act_width" for axis in axes), x.shape)
    entries = (entry if axis else PartitionSpec.UNCONSTRAINED for axis, entry in zip(axes, spec, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def gathered_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the logical axes of a weight when a matmul uses it: it is then gathered along the mesh axes fsdp
    and context, but still sharded along tensor.

    >>> gathered_axes(("layers", "width", "mlp"))
    ('layers', 'act_width', 'mlp')
    """
    used = {"width": "act_width", "vocab": "act_vocab", "from_heads": "heads", "from_mlp": "mlp"}
    used["fused_width"] = "part_shards"  # see models/families/phi3.py
    return tuple(used.get(axis, axis) for axis in axes)


def gathered_sharding(axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding | None:
    """Return the sharding of a weight when a matmul uses it on the ambient mesh, see gathered_axes; None on a
    single device. axes, shape: the weight's logical axes and global shape.
    """
    mesh = _ambient()
    return None if mesh is None else array_sharding(mesh, gathered_axes(axes), shape)


def num_shards(axes: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Return into how many shards an array with these logical axes is divided on the ambient mesh."""
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
    """Inside `per_device`: return the index in the full dimension at which this device's shard begins. axis:
    mesh axis that shards the dimension. size: elements of a shard.
    """
    return jax.lax.axis_index(axis) * np.int32(size)


def mesh_size(axis: str) -> int:
    """Return the number of devices along an axis of the ambient mesh; 1 without a mesh."""
    mesh = _ambient()
    return 1 if mesh is None else dict(mesh.shape)[axis]


def mesh_has(axis: str) -> bool:
    """Whether the ambient mesh has more than one device along a mesh axis."""
    return mesh_size(axis) > 1


def check_context_divides(length: int) -> None:
    """Raise ValueError if rows of `length` tokens do not divide over the context axis of the ambient mesh."""
    mesh = _ambient()
    context = 1 if mesh is None else dict(mesh.shape)["context"]
    if length % context:
        raise ValueError(
            f"rows of {length} tokens do not divide over mesh.context={context}; "
            f"use a data.max_length that is divisible by {context}"
        )


def per_device(
    fn: Callable,
    in_axes: tuple[tuple[str, ...] | None, ...],
    out_axes: tuple[str, ...],
    out_shape: tuple[int, ...],
) -> Callable:
    """Return a function that applies `fn` to the local shards on each device of the ambient mesh (shard_map),
    for code that XLA cannot partition. Without such a mesh it calls `fn` on the full arrays.

    in_axes: logical axes of each argument; None for a replicated array. out_axes, out_shape: logical axes and
    global shape of the result.
    """

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
    """Return the number of shards into which a mesh divides the rows of a batch: slices x data x fsdp."""
    return math.prod(dict(mesh.shape)[axis] for axis in AXES["rows"])


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a batch's array [microbatches, rows, ...]: rows over slices, data and fsdp.

    Raises ValueError if the number of rows is not divisible by the number of shards.
    """
    parts = row_shards(mesh)
    if shape[1] % parts:
        raise ValueError(
            f"{shape[1]} rows of a microbatch do not divide over slices x data x fsdp = {parts} devices; "
            f"make data.batch / data.micro a multiple of {parts}, or change mesh.data or mesh.fsdp"
        )
    return NamedSharding(mesh, PartitionSpec(None, AXES["rows"], *(None,) * (len(shape) - 2)))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Transfer a batch's host arrays [microbatches, rows, ...] to the devices of a mesh.

    Every process passes the same global arrays and transfers only the rows of its local devices.
    """

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_callback(
            np.shape(x), batch_sharding(mesh, np.shape(x)), lambda index: np.asarray(x)[index]
        )

    return jax.tree.map(place, batch)


def per_device_vector(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a vector with one element per device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
