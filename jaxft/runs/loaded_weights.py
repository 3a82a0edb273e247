"""The model that a command line names, or several adapters of one base, on a mesh for inference."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.models.adapted import adapted, adapted_like
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import check_stackable, in_dtype, of_equal_shapes, with_gains
from jaxft.nn.quant import Quant, QuantKind, quant_setting
from jaxft.runs.named_weights import NamedWeights
from jaxft.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf.stop_tokens import stop_tokens
from jaxft.weights.peft import adapters, peft


class LoadedWeights(NamedTuple):
    """A model with its parameters {"base", "adapter"}, without "adapter" for a model alone.

    stop: token ids that end a completion. notes: lines for the user.
    """

    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any
    stop: tuple[int, ...]
    notes: list[str]


def load_named(
    named: NamedWeights, mesh: Mesh, dtype: str | None = None, kind: QuantKind | None = None
) -> LoadedWeights:
    """Load named weights onto a mesh.

    dtype: of the computation; None is that of the run, or bfloat16. kind: how the base is quantised; None is
    as in the run, or not at all. Raises ValueError for an adapter that doesn't fit the base.
    """
    record = named.record
    chosen = dtype or (record["model"]["dtype"] if record else "bfloat16")
    residual = None if dtype or not record else record["model"].get("residual")
    model = pretrained.model_for(named.ref, dtype=jnp.dtype(chosen), residual=residual)
    storage = quant_setting(kind, record if named.adapter else None)
    params, settings = {"base": pretrained.load_frozen(named.ref, model, mesh, storage)}, None
    if named.adapter:
        pretrained.check_adapter_base(named.adapter, named.ref)
        params["adapter"], settings = adapters.load_adapter(named.adapter, model, mesh, named.ref)
    tokenizer = pretrained.load_tokenizer(named.tokenizer)
    notes = pretrained.file_notes(named.ref, model)
    stop = stop_tokens(named.ref, model, tokenizer)
    return LoadedWeights(mesh, adapted(model, settings), params, tokenizer, stop, notes)


def load_each(
    named: Mapping[str, NamedWeights],
    mesh: Mesh,
    dtype: str | None = None,
    kind: QuantKind | None = None,
) -> dict[str, LoadedWeights]:
    """Load weights by name, which share one base and, if they are several, one model and one set of shapes,
    so that one compiled program takes each of them.

    named: see named_weights.named_adapters. dtype, kind: as in load_named, if the runs have the same. Raises
    ValueError for adapters that cannot share a base or a program.
    """
    if len(named) == 1:
        return {name: load_named(weights, mesh, dtype, kind) for name, weights in named.items()}
    weights, ref = dict(named), next(iter(named.values())).ref
    chosen, residual = common_dtype(weights, dtype), common_residual(weights, dtype)
    base = pretrained.model_for(ref, dtype=jnp.dtype(chosen), residual=residual)
    frozen = pretrained.load_frozen(ref, base, mesh, common_quant(weights, kind))
    folders = {name: one.adapter for name, one in named.items() if one.adapter is not None}
    trees = load_equal_adapters(folders, ref, base, frozen, mesh)
    model, notes = adapted_like(base, next(iter(trees.values()))), pretrained.file_notes(ref, base)
    found = {}
    for name, tree in trees.items():
        tokenizer = pretrained.load_tokenizer(named[name].tokenizer)
        stop = stop_tokens(ref, base, tokenizer)
        found[name] = LoadedWeights(mesh, model, {"base": frozen, "adapter": tree}, tokenizer, stop, notes)
        notes = []  # once
    return found


def common_dtype(named: dict[str, NamedWeights], dtype: str | None) -> str:
    """Return `dtype` or, if it is None, the compute dtype of the runs. Raises ValueError if they differ."""
    found = {n.record["model"]["dtype"]: name for name, n in named.items() if n.record}
    if dtype is None and len(found) > 1:
        raise ValueError(f"the runs {' and '.join(found.values())} have different dtypes; set --dtype")
    return dtype or next(iter(found), "bfloat16")


def common_residual(named: dict[str, NamedWeights], dtype: str | None) -> str | None:
    """Return the dtype of the residual stream of the runs; None is the model's default, also with a `dtype`
    of the command line. Raises ValueError if the runs differ.
    """
    found = {n.record["model"].get("residual"): name for name, n in named.items() if n.record and not dtype}
    if len(found) > 1:
        raise ValueError(
            f"the runs {' and '.join(found.values())} have residual streams of different dtypes; set "
            "--dtype, which computes all of them alike"
        )
    return next(iter(found), None)


def common_quant(named: dict[str, NamedWeights], kind: QuantKind | None) -> Quant | None:
    """Return how the base is quantised: as `kind` or the runs of the adapters say. Raises ValueError if they
    differ.
    """
    settings = {
        name: quant_setting(kind, n.record if n.adapter else None) for name, n in named.items() if n.adapter
    }
    if not settings:
        return quant_setting(kind, None)
    (first, quant), *others = settings.items()
    for name, other in others:
        if other != quant:
            raise ValueError(f"{first} and {name} have differently quantised bases; set --quant")
    return quant


def load_equal_adapters(
    folders: Mapping[str, Path], ref: str, model: Model, base: Params, mesh: Mesh
) -> dict[str, Params]:
    """Load adapters by name as trees of the same shapes, so that one program takes each. Arguments and
    errors: as in read_adapters.
    """
    loaded = read_adapters(folders, ref, model, base)
    equal = [in_dtype(one, model.dtype) for one in of_equal_shapes(list(loaded.values()))]
    return adapters.on_every_device(dict(zip(loaded, equal, strict=True)), None, mesh)


def read_adapters(folders: Mapping[str, Path], ref: str, model: Model, base: Params) -> dict[str, Params]:
    """Read adapters by name, those of DoRA with the gains of their outputs.

    base: the parameters of `ref`, as they are stored. Raises ValueError for an adapter that does not fit the
    base or, of several, that cannot share a program with others.
    """
    for folder in folders.values():
        pretrained.check_adapter_base(folder, ref)
    files = pretrained.open_files(ref)
    found = {name: peft.read_adapter(folder, model, files)[0] for name, folder in folders.items()}
    check_stackable(found)
    return {name: with_gains(base, one) for name, one in found.items()}
