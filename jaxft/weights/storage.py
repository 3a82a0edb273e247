"""How each parameter is stored on the mesh: dtype, quantisation, and the shardings of its arrays."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxft.distributed import sharding
from jaxft.distributed.devices import has_fp8_matmuls
from jaxft.models.model import Model
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import target_paths
from jaxft.nn.matmul import is_scaled_by_channel, multiplies_in_fp8
from jaxft.nn.param_spec import ParamSpec
from jaxft.nn.quant import CHECKPOINT, QTensor, Quant, bits_per_param, is_paired, quantize, shardings_of
from jaxft.weights.quantised.file_format import same_layout


@dataclass(frozen=True)
class Storage:
    """The storage of one parameter: its dtype, or its quantisation.

    quantize: (kind, block, double), the arguments of nn.quant.quantize; None for a plain array, or if layout
    is set. layout: the checkpoint's quantised layout of one layer, as ShapeDtypeStructs, if its codes and
    scales are stored unchanged. fp8_matmul: see nn.quant.Quant. codes: name of the calibrated codes in the
    cache (weights/edit/calibrated_base.py) that replace the checkpoint's weights; None without calibration.
    """

    dtype: DTypeLike
    quantize: tuple[str, int | None, bool | None] | None = None
    layout: QTensor | None = None
    fp8_matmul: bool | None = None
    codes: str | None = None

    @property
    def quantised(self) -> bool:
        """Whether the parameter is stored with fewer bits than its dtype."""
        return self.layout is not None or self.quantize is not None and self.quantize[0] != "bits"


@dataclass(frozen=True)
class StoredModel:
    """A model over the full tree {"base", "adapter", ...heads}, and the storage of each parameter by path."""

    model: Model
    storage: dict[str, Storage]

    @property
    def specs(self) -> Any:
        """ParamSpecs of the full tree."""
        return self.model.specs


def choose_storage(
    model: Model,
    trainable: Collection[str],
    quant: Quant | None,
    layouts: Mapping[str, QTensor],
    trainable_dtype: DTypeLike | None = None,
) -> StoredModel:
    """Choose the storage of every parameter of `model`, whose specs are the full tree {"base", ...heads}.

    Trainable parameters and all parameters outside the base are stored in float32 or wider; trainable
    parameters of the base in `trainable_dtype` if it is given. Frozen parameters of the base are stored in
    the compute dtype (16-bit matrices as raw bits), or quantised where `quant.targets` selects them.
    trainable: paths in the full tree. layouts: the checkpoint's quantised layouts by path in the base, for
    quant=checkpoint. Raises ValueError if `quant` selects a trainable parameter, or if quant.fp8_matmul is
    set and the checkpoint has no FP8 weights with a scale per output channel.
    """
    if quant and quant.kind == CHECKPOINT:
        selected = list(layouts)
    else:
        selected = quantised_paths(model.specs["base"], quant) if quant else []
    clash = next((path for path in selected if f"base/{path}" in trainable), None)
    if quant and clash:
        raise ValueError(
            f"quant={quant.kind} freezes base/{clash}, which is trainable; train an adapter, or set "
            "quant=none"
        )
    by_channel = any(map(is_scaled_by_channel, layouts.values()))
    if quant and quant.kind == CHECKPOINT and quant.fp8_matmul and not by_channel:
        raise ValueError(
            "quant.fp8_matmul=true, but the files have no FP8 weights with a scale per output channel; omit "
            "it, or use quant=fp8"
        )
    storage = {}
    wide = max(model.dtype, jnp.float32, key=lambda dtype: jnp.dtype(dtype).itemsize)
    for path, spec in param_spec.spec_paths(model.specs).items():
        if path in trainable or not in_base(path):
            own_dtype = trainable_dtype is not None and in_base(path)
            storage[path] = Storage(jnp.dtype(trainable_dtype) if own_dtype else wide)
        elif quant and path.removeprefix("base/") in selected:
            layout = layouts.get(path.removeprefix("base/"))
            arguments = None if layout else (quant.kind, quant.block, quant.double)
            codes = quant.codes if "layers" in spec.axes else None
            storage[path] = Storage(model.dtype, arguments, layout, quant.fp8_matmul, codes)
        else:
            as_bits = param_spec.kernel(spec) and jnp.dtype(model.dtype).itemsize == 2
            storage[path] = Storage(model.dtype, ("bits", None, None) if as_bits else None)
    return StoredModel(model, storage)


def in_base(path: str) -> bool:
    """Return whether a path such as base/layers/attn/q is a weight of the base."""
    return path.startswith("base/")


def quantised_paths(base: Any, quant: Quant) -> list[str]:
    """Return the paths of the kernels that `quant.targets` selects. Raises ValueError if there are none."""
    if quant.targets == "all-linear":
        return target_paths(base, "all-linear")
    matrices = [path for path, spec in param_spec.spec_paths(base).items() if param_spec.kernel(spec)]
    pattern = tree.regex(quant.targets, "quant.targets")
    selected = [path for path in matrices if pattern.fullmatch(path)]
    if not selected:
        raise ValueError(
            f"quant.targets={quant.targets!r} matches no matrix; use a pattern of {', '.join(matrices)}"
        )
    return selected


def keeps_layout(storage: Storage, layout: QTensor) -> bool:
    """Return whether a parameter with this layout in the checkpoint can keep its codes and scales."""
    if not storage.quantised:
        return False
    if storage.layout is not None:
        return same_layout(layout, storage.layout)
    layer = jax.ShapeDtypeStruct(layout.shape, storage.dtype)
    return same_layout(layout, jax.eval_shape(lambda x: quantize(x, *(storage.quantize or ())), layer))


def leaf_shapes(spec: ParamSpec, storage: Storage) -> Any:
    """Return a parameter as it is stored: a ShapeDtypeStruct, or a QTensor of them."""
    x, arguments = jax.ShapeDtypeStruct(spec.shape, storage.dtype), storage.quantize
    if storage.layout is not None:
        stacked = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*spec.shape[:-2], *x.shape), x.dtype), storage.layout
        )
        return replace(stacked, dtype=jnp.dtype(storage.dtype), fp8_matmul=storage.fp8_matmul)
    if arguments is None:
        return x
    return replace(jax.eval_shape(lambda x: quantize(x, *arguments), x), fp8_matmul=storage.fp8_matmul)


def leaf_sharding(spec: ParamSpec, leaf: Any, mesh: Mesh, path: str) -> Any:
    """Return the sharding of a parameter as stored, for a QTensor one for each array. path: for messages."""
    full = param_spec.sharding_of(spec, mesh, path)
    if not isinstance(leaf, QTensor):
        return full
    if leaf.block or is_paired(leaf.kind):
        block = leaf.block if leaf.block and leaf.index is None else 2
        full = sharding.shard_between_blocks(full, spec.axes, spec.shape, block, path)
    return shardings_of(leaf, full)


def sharded_shapes(stored: StoredModel, mesh: Mesh) -> Any:
    """Return the full tree as it is stored on the mesh, as ShapeDtypeStructs with shardings."""

    def leaf(path: str, spec: ParamSpec) -> Any:
        x = leaf_shapes(spec, stored.storage[path])
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            x,
            leaf_sharding(spec, x, mesh, path),
        )

    return tree.map_with_path(leaf, stored.specs, is_leaf=param_spec.is_spec)


def quantisation_summary(stored: StoredModel, mesh: Mesh | None = None) -> str:
    """Return a line with the quantised fraction of the base, its format and its bits per parameter; "" if
    nothing is quantised. With a mesh it also states how FP8 weights are multiplied there.
    """
    all_specs = param_spec.spec_paths(stored.specs)
    by_path = {
        path: leaf_shapes(spec, stored.storage[path])
        for path, spec in all_specs.items()
        if in_base(path) and stored.storage[path].quantised
    }
    leaves = list(by_path.values())
    if not leaves:
        return ""
    sizes = [math.prod(q.shape) for q in leaves]
    mean_bits = sum(bits_per_param(q) * size for q, size in zip(leaves, sizes, strict=True)) / sum(sizes)
    base = sum(math.prod(spec.shape) for path, spec in all_specs.items() if in_base(path))
    text = (
        f"{100 * sum(sizes) / base:.0f} % of the base in {leaves[0].kind}, {mean_bits:.3f} bits a parameter"
    )
    text += ", calibrated" if any(storage.codes for storage in stored.storage.values()) else ""
    if mesh is None or leaves[0].kind != "fp8":
        return text
    of_layers = next((q for path, q in by_path.items() if "layers" in all_specs[path].axes), None)
    if of_layers is None:
        return f"{text}, dequantised, as only layers are multiplied in FP8"
    return f"{text}, {fp8_matmuls(of_layers, mesh)}"


def fp8_matmuls(q: QTensor, mesh: Mesh) -> str:
    """Return words such as "multiplied in FP8": how a mesh multiplies a layer's FP8 weight `q`, and why."""
    device = mesh.devices.flat[0]
    here, kind = has_fp8_matmuls(device), device.device_kind
    with jax.set_mesh(mesh):
        multiplied = multiplies_in_fp8(q)
    if multiplied:
        return "multiplied in FP8" if here else f"multiplied in FP8, which is emulated on {kind}"
    if q.block is not None:
        reason = "its scales are per block of inputs"
    else:
        reason = "quant.fp8_matmul=false" if q.fp8_matmul is False else f"{kind} has no FP8 matmuls"
    return f"dequantised before matmuls ({reason})"
