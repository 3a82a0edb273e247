"""What a run trains and what it keeps: specs, the trainable mask, weights on the mesh, and all of it as shapes only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import params, sharding, tree, weights
from jaxft.lora import Adapter, adapted, adapter_specs
from jaxft.params import Model, ParamSpec
from jaxft.quant import QTensor
from jaxft.weights import peft


@dataclass(frozen=True)
class Trained:
    """A model over the whole tree {"base", "adapter"} and which of its leaves are trained.

    specs, mask: trees of the same structure. trainable_specs: None where a leaf is frozen.
    """

    model: Model
    mask: Any
    trainable_specs: Any

    @property
    def specs(self) -> Any:
        """ParamSpecs of the whole tree."""
        return self.model.specs


def trained(model: Model, adapter: Adapter | None, pattern: str | None) -> Trained:
    """Decide by path what is trained: the adapter's a and b, or without an adapter the base; or what `pattern` matches.

    An adapter's `scale` is never trained. Raises ValueError for a pattern that matches nothing.
    """
    whole = adapted(model, adapter)
    default = "adapter/.*" if adapter else "base/.*"
    mask = tree.mask_by_path(jax.tree.map(lambda _: 0, whole.specs, is_leaf=params.is_spec), pattern or default)
    mask = tree.map_with_path(lambda path, m: m and not (path.startswith("adapter/") and path.endswith("/scale")), mask)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"train={pattern!r} leaves nothing to train: an adapter's scale is fixed; name its a or b")
    return Trained(whole, mask, jax.tree.map(lambda m, s: s if m else None, mask, whole.specs))


def is_matrix(spec: ParamSpec) -> bool:
    """Two axes beside the stacked layers."""
    return len(spec.axes) - ("layers" in spec.axes) == 2


def stored(spec: ParamSpec, is_trained: bool, dtype: Any) -> tuple[Any, bool]:
    """(dtype, packed?) of a leaf: float32 or wider where trained, else the compute dtype; 16-bit matrices as raw bits."""
    if is_trained:
        return jnp.promote_types(dtype, jnp.float32), False
    return dtype, is_matrix(spec) and jnp.dtype(dtype).itemsize == 2


def make_store(t: Trained, mesh: Any, frozen_only: bool = False) -> Callable[[str, np.ndarray], Any]:
    """`store(path, array)` for weights.load_base: cast on the host, place on the mesh, pack what is frozen.

    frozen_only: a restored run has its trained leaves already; None stands for them.
    """
    specs, mask = params.spec_paths(t.specs), tree.paths(t.mask)

    def store(path: str, array: np.ndarray) -> Any:
        spec, full = specs[f"base/{path}"], f"base/{path}"
        if frozen_only and mask[full]:
            return None
        dtype, packed = stored(spec, mask[full], t.model.dtype)
        host = array.astype(dtype, copy=False)
        place = params.place(spec, mesh, full)
        if not packed:
            return jax.device_put(host, place)
        return QTensor(jax.device_put(host.view(np.uint16), place), "bits", jnp.dtype(dtype))

    return store


def load_frozen(ref: str, model: Model, mesh: Any) -> Any:
    """The base tree of `ref` on the mesh with nothing trained, as inference holds it: in the compute dtype, packed."""
    whole = adapted(model, None)
    mask = jax.tree.map(lambda _: False, whole.specs, is_leaf=params.is_spec)
    return weights.load_base(ref, model, make_store(Trained(whole, mask, jax.tree.map(lambda _: None, mask)), mesh))


def load_adapter(folder: str | Path, model: Model, mesh: Any) -> tuple[Any, Adapter]:
    """A PEFT adapter folder on the mesh, and its settings. Raises ValueError for an adapter that doesn't fit the model."""
    loaded, settings = peft.load_adapter(folder, model)
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    places = params.shardings(adapter_specs(model.specs, settings), mesh)
    return jax.tree.map(lambda x, place: jax.device_put(x.astype(dtype), place), loaded, places), settings


def only_pairs(t: Trained) -> bool:
    """Whether nothing but an adapter's a and b is trained, so that a fresh adapter is the base."""
    return not any(jax.tree.leaves(t.mask["base"]))


def adapter_settings(start: str, model: Model) -> Adapter:
    """The settings of the adapter in a PEFT folder, or in the folder of a run that wrote one."""
    return peft.load_adapter(adapter_folder(start), model)[1]


def adapter_of(start: str | None, rank: int | None, model: Model) -> Adapter:
    """A fresh adapter's settings (rank 16 if None, alpha twice that), or those of the adapter that `start` names."""
    if start is None:
        return Adapter(rank=16 if rank is None else rank, alpha=2.0 * (16 if rank is None else rank))
    if rank is not None:
        raise ValueError(f"rank={rank} is a fresh adapter's, and the one in {start} has a rank of its own; leave one of them out")
    return adapter_settings(start, model)


def adapter_folder(start: str) -> Path:
    """The PEFT folder that `start` names: itself, or `adapter` below a run's folder."""
    inner = Path(start) / "adapter"
    return inner if inner.is_dir() else Path(start)


def start_adapter(t: Trained, mesh: Any, seed: int, settings: Adapter | None = None, start: str | None = None) -> Any:
    """A fresh adapter on the mesh, or the one of the PEFT folder `start`, whose settings must be the run's."""
    specs, dtype = t.specs["adapter"], jnp.promote_types(t.model.dtype, jnp.float32)
    places = params.shardings(specs, mesh)
    if start is not None:
        loaded, found = peft.load_adapter(adapter_folder(start), t.model)
        if settings is None or replace(found, dropout=settings.dropout) != settings:
            raise ValueError(f"{start}: holds an adapter with {found}, and the run's is {settings}; take the folder's settings")
        return jax.tree.map(lambda x, place: jax.device_put(x.astype(dtype), place), loaded, places)
    init = jax.jit(lambda key: params.init_params(specs, key, dtype), out_shardings=places)
    return init(jax.random.key(seed))


def abstract_params(t: Trained, mesh: Any) -> Any:
    """The whole tree as ShapeDtypeStructs with shardings, as it will be held."""

    def leaf(path, spec, is_trained):
        dtype, packed = stored(spec, is_trained, t.model.dtype)
        if path.startswith("adapter/"):
            dtype, packed = jnp.promote_types(t.model.dtype, jnp.float32), False
        place = params.place(spec, mesh, path)
        shape = jax.ShapeDtypeStruct(spec.shape, jnp.uint16 if packed else dtype, sharding=place)
        return QTensor(shape, "bits", jnp.dtype(dtype)) if packed else shape

    return tree.map_with_path(leaf, t.specs, t.mask, is_leaf=params.is_spec)


def split(t: Trained, whole: Any) -> tuple[Any, Any]:
    """(trainable, frozen) of the whole tree; a packed leaf is frozen as one."""
    whole_leaf = lambda x: x is None or isinstance(x, QTensor)  # noqa: E731
    return (
        jax.tree.map(lambda x, m: x if m else None, whole, t.mask, is_leaf=whole_leaf),
        jax.tree.map(lambda x, m: None if m else x, whole, t.mask, is_leaf=whole_leaf),
    )


def like_params(shapes: Any, trainable: Any, mesh: Any) -> Any:
    """Shardings for a tree that mirrors the parameters (optimizer state).

    A leaf that ends in a parameter's path and has its shape lies as the parameter does, any other one on every device.
    """
    known = {path: x for path, x in tree.paths(trainable).items()}

    def place(path, x):
        parts = path.split("/")
        for i in range(len(parts)):
            found = known.get("/".join(parts[i:]))
            if found is not None and found.shape == x.shape:
                return found.sharding
        return sharding.replicated(mesh)

    return tree.map_with_path(place, shapes)


def table(t: Trained) -> str:
    """One line a parameter: path, shape, axes, trained or frozen; then the counts."""
    mask = tree.paths(t.mask)
    rows = [
        f"{path:32s} {'x'.join(map(str, s.shape)):>18s}  {','.join(s.axes):28s} {'trained' if mask[path] else 'frozen'}"
        for path, s in params.spec_paths(t.specs).items()
    ]
    total, some = params.count(t.specs), params.count(t.trainable_specs)
    return "\n".join([*rows, f"{some:,} of {total:,} parameters are trained ({100 * some / total:.2f} %)"])
