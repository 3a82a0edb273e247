"""The model that a command line names, or several adapters of one base, on a mesh for inference."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.models.adapted import adapted, adapted_like
from jaxft.models.model import Model
from jaxft.nn.quant import quant
from jaxft.runs.named_weights import NamedWeights
from jaxft.serve import served
from jaxft.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf.stop_tokens import stop_tokens
from jaxft.weights.peft import adapters


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
    named: NamedWeights, mesh: Mesh, dtype: str | None = None, kind: quant.QuantKind | None = None
) -> LoadedWeights:
    """Load named weights onto a mesh.

    dtype: of the computation; None is that of the run, or bfloat16. kind: how the base is quantised; None is
    as in the run, or not at all. Raises ValueError for an adapter that doesn't fit the base.
    """
    record = named.record
    chosen = dtype or (record["model"]["dtype"] if record else "bfloat16")
    residual = None if dtype or not record else record["model"].get("residual")
    model = pretrained.model_for(named.ref, dtype=jnp.dtype(chosen), residual=residual)
    storage = quant.quant_setting(kind, record if named.adapter else None)
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
    kind: quant.QuantKind | None = None,
) -> dict[str, LoadedWeights]:
    """Load weights by name, which share one base and, if they are several, one model and one set of shapes,
    so that one compiled program takes each of them.

    named: see served.named_adapters. dtype, kind: as in load_named, if the runs have the same. Raises
    ValueError for adapters that cannot share a base or a program.
    """
    if len(named) == 1:
        return {name: load_named(weights, mesh, dtype, kind) for name, weights in named.items()}
    weights, ref = dict(named), next(iter(named.values())).ref
    chosen, residual = served.common_dtype(weights, dtype), served.common_residual(weights, dtype)
    base = pretrained.model_for(ref, dtype=jnp.dtype(chosen), residual=residual)
    frozen = pretrained.load_frozen(ref, base, mesh, served.common_quant(weights, kind))
    folders = {name: one.adapter for name, one in named.items() if one.adapter is not None}
    trees = served.load_equal_adapters(folders, ref, base, frozen, mesh)
    model, notes = adapted_like(base, next(iter(trees.values()))), pretrained.file_notes(ref, base)
    found = {}
    for name, tree in trees.items():
        tokenizer = pretrained.load_tokenizer(named[name].tokenizer)
        stop = stop_tokens(ref, base, tokenizer)
        found[name] = LoadedWeights(mesh, model, {"base": frozen, "adapter": tree}, tokenizer, stop, notes)
        notes = []  # once
    return found
