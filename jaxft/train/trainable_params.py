"""The trainable and the frozen parameters of a run: the mask, the split that it makes, and the table that
shows it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxft.distributed import sharding
from jaxft.models.adapted import TEACHER, HeadSettings, adapted
from jaxft.models.model import Model
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter
from jaxft.nn.param_spec import Specs
from jaxft.nn.quant import QTensor, Quant, bits_per_param
from jaxft.weights import pretrained
from jaxft.weights.storage import Storage, StoredModel, in_base, leaf_shapes, leaf_sharding


@dataclass(frozen=True)
class Partition:
    """A model whose parameters are one tree {"base", "adapter", ...heads}, which of them are trainable, and
    how each is stored.

    mask: a tree like the parameters', True for trainable ones. trainable_specs: the model's specs, None for
    frozen parameters.
    """

    stored: StoredModel
    mask: Any
    trainable_specs: Specs

    @property
    def model(self) -> Model:
        """The model whose parameters are the tree of base, adapter and heads."""
        return self.stored.model

    @property
    def specs(self) -> Any:
        """The ParamSpecs of base, adapter and heads."""
        return self.stored.specs

    @property
    def storage(self) -> dict[str, Storage]:
        """The dtype or quantisation in which each parameter is stored, by path."""
        return self.stored.storage


def partition_params(
    model: Model,
    adapter: Adapter | None,
    pattern: str | tuple[str, ...] | None,
    quant: Quant | None = None,
    ref: str | None = None,
    dtype: DTypeLike | None = None,
) -> Partition:
    """Choose the trainable parameters of a model with an adapter, and how each parameter is stored.

    pattern: regular expressions (OR-ed) over parameter paths; None for the patterns of
    `trainable_patterns(model, adapter)`. An adapter's `scale`, the initial adapter and a teacher are always
    frozen. ref: where the weights come from; quant=checkpoint reads the headers of its files. dtype: dtype of
    trainable base weights, by default at least float32; ValueError if there are none. Raises ValueError for a
    pattern that matches nothing, and where `quant` selects a trainable parameter.
    """
    whole = adapted(model, adapter)
    paths = jax.tree.map(lambda _: 0, whole.specs, is_leaf=param_spec.is_spec)
    patterns = (pattern,) if isinstance(pattern, str) else pattern or trainable_patterns(model, adapter)
    mask = jax.tree.map(
        lambda *hits: any(hits), *(tree.mask_by_path(paths, regex, "train") for regex in patterns)
    )

    def is_trained(path: str, is_selected: bool) -> bool:
        is_frozen = path.startswith((f"{INITIAL_ADAPTER}/", f"{TEACHER}/"))
        return is_selected and not is_frozen and (in_base(path) or not path.endswith("/scale"))

    mask = tree.map_with_path(is_trained, mask)
    if dtype is not None and not any(jax.tree.leaves(mask["base"])):
        name = jnp.dtype(dtype).name
        raise ValueError(
            f"run.params={name} applies to trainable base weights, but there are none; use run.params=float32"
        )
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"train={pattern!r} selects no trainable parameter: "
            "an adapter's scale is frozen; select its a or b"
        )
    trainable = {path for path, is_trainable in tree.paths(mask).items() if is_trainable}
    stored = pretrained.stored_model(whole, quant, ref, trainable, dtype)
    return Partition(stored, mask, jax.tree.map(lambda m, s: s if m else None, mask, whole.specs))


def trainable_patterns(
    model: Model,
    adapter: Adapter | None,
    pattern: str | None = None,
    scorers: Mapping[str, HeadSettings] | None = None,
) -> tuple[str, ...]:
    """Return path patterns of the trainable parameters.

    By default: the adapter, or without one the base, and the model's heads; `pattern` replaces this default.
    scorers: heads such as a critic, by name; the patterns of heads with `trained` are always added.
    """
    scorers = scorers or {}
    heads = [re.escape(name) for name in model.heads if name not in (*scorers, TEACHER)]
    with_defaults = ("adapter/.*" if adapter else "base/.*", *(f"{name}(/.*)?" for name in heads))
    return (
        *((pattern,) if pattern else with_defaults),
        *(f"{re.escape(name)}/.*" for name, scorer in scorers.items() if scorer.trained),
    )


def trainable_paths(partition: Partition) -> set[str]:
    """Return the paths of the trainable parameters."""
    return {path for path, is_trainable in tree.paths(partition.mask).items() if is_trainable}


def trains_base(partition: Partition) -> bool:
    """Return whether any parameter of the base is trainable. If none is, a model with a fresh adapter
    computes the same as the base.
    """
    return any(jax.tree.leaves(partition.mask["base"]))


def split_params(partition: Partition, params: Any) -> tuple[Any, Any]:
    """Split parameters into (trainable, frozen) trees of the same structure, with None in place of the other
    tree's leaves. A QTensor is one leaf.
    """

    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, QTensor)

    return (
        jax.tree.map(lambda x, m: x if m else None, params, partition.mask, is_leaf=is_leaf),
        jax.tree.map(lambda x, m: None if m else x, params, partition.mask, is_leaf=is_leaf),
    )


def parameter_counts(partition: Partition) -> tuple[int, int]:
    """Return (number of trainable parameters, number of all parameters). A teacher's are not counted."""
    model_specs = {name: specs for name, specs in partition.specs.items() if name != TEACHER}
    return param_spec.count_params(partition.trainable_specs), param_spec.count_params(model_specs)


class ParameterRow(NamedTuple):
    """A parameter in the table: its path, shape and axes, how it is stored, its sharding (None on one
    device), and whether it is trained.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    storage: str
    sharding: str | None
    trained: bool


def parameter_rows(partition: Partition, mesh: Mesh | None = None) -> list[ParameterRow]:
    """Return a row of the parameter table for each parameter, frozen ones too. mesh: for shardings, which are
    None without it or on one device.
    """
    mask, rows = tree.paths(partition.mask), []
    for path, spec in param_spec.spec_paths(partition.specs).items():
        storage = partition.storage[path]
        x = leaf_shapes(spec, storage)
        form = (
            f"{x.kind} {bits_per_param(x):.3f} bits" if storage.quantised else jnp.dtype(storage.dtype).name
        )
        cut = None
        if mesh is not None and mesh.size > 1:
            placed = leaf_sharding(spec, x, mesh, path)
            cut = sharding.describe_sharding(placed.codes if isinstance(x, QTensor) else placed)
        rows.append(ParameterRow(path, tuple(spec.shape), tuple(spec.axes), form, cut, bool(mask[path])))
    return rows


def parameter_table(partition: Partition, mesh: Mesh | None = None) -> str:
    """Return text with a line for each parameter: path, shape, axes, storage, sharding (only on a mesh of
    several devices), and trained or frozen; then a line with the number of trained and of all parameters.
    """
    lines = []
    for row in parameter_rows(partition, mesh):
        sizes, axes = "x".join(map(str, row.shape)), ",".join(row.axes)
        cut = "" if row.sharding is None else f"{row.sharding:20s} "
        state = "trained" if row.trained else "frozen"
        lines.append(f"{row.path:32s} {sizes:>18s}  {axes:28s} {row.storage:16s} {cut}{state}")
    some, total = parameter_counts(partition)
    return "\n".join([*lines, f"{some:,} of {total:,} parameters are trained ({100 * some / total:.2f} %)"])
