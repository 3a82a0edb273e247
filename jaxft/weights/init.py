"""Initialise parameters outside the base: adapters and heads, fresh or loaded from folders."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.models.heads import SCORE, HeadSettings, as_checkpoint
from jaxft.models.model import Model
from jaxft.nn import param
from jaxft.nn.lora import Adapter
from jaxft.weights import parameters, peft, place, pretrained
from jaxft.weights.adapters import adapter_folder


def init_adapter(
    model: Model, mesh: Any, seed: int, settings: Adapter | None = None, start: str | None = None
) -> Any:
    """Initialise the adapter of a model over the whole tree, or load that of the PEFT folder `start`, with equal settings."""
    only = {"adapter": model.specs["adapter"]}
    return _parts(only, model, mesh, jax.random.key(seed), HeadSettings(settings, start))["adapter"]


def init_all_but_base(
    model: Model,
    mesh: Any,
    seed: int,
    own: HeadSettings,
    ref: str | None = None,
    scorers: Mapping[str, HeadSettings] | None = None,
) -> dict[str, Any]:
    """Initialise or load all parameters outside the base of a model over the whole tree.

    own: settings of the policy's adapter and head; without a start, the head is loaded from the base's files, those of `ref`,
    if they hold one. scorers: of the further models on the base. Raises ValueError where a folder's adapter has other settings,
    and for a frozen model without a head.
    """
    scorers, key = scorers or {}, jax.random.key(seed)
    mine = {name: specs for name, specs in model.specs.items() if name != "base" and name not in scorers}
    out = _parts(mine, model, mesh, key, own, ref)
    for name, one in scorers.items():
        part_key = jax.random.fold_in(key, param.path_hash(name))
        out[name] = _parts(model.specs[name], model, mesh, part_key, one)
    return out


def _parts(
    specs: dict[str, Any], model: Model, mesh: Any, key: Any, how: HeadSettings, ref: str | None = None
) -> dict[str, Any]:
    """An adapter, a head, or both; or a base of its own with a head."""
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    loaded: dict[str, Any] = {}
    if how.weights is not None:
        loaded = _whole_in(how.weights, specs, model, mesh, dtype)
    if how.start is not None:
        if not adapter_folder(how.start).is_dir():
            hub = "" if how.trained else "; a classifier on the hub is org/name@revision"
            raise FileNotFoundError(
                f"{how.start}: no such folder of a run or an adapter (relative to {Path.cwd()}){hub}"
            )
        loaded, found = peft.load_parts(adapter_folder(how.start), model)
        if how.adapter is None or replace(found, dropout=how.adapter.dropout) != how.adapter:
            told = f"holds an adapter with {found}, and the run's is {how.adapter}"
            raise ValueError(f"{how.start}: {told}; take the folder's settings")
        if "score" in loaded and "score" not in specs:
            raise ValueError(
                f"{how.start}: holds a reward model's adapter, which this run can't begin with; take another one"
            )
    elif "score" in specs and ref is not None and model.heads.keys() == {"score"}:
        loaded = _score_in(ref, model)
    if not how.trained and "score" not in loaded:
        raise ValueError(
            f"a frozen scorer begins with a reward model's folder, found start={how.start}; give it one"
        )
    out = {}
    for name, each in specs.items():
        places = param.shardings(each, mesh)
        if name == "base":
            out[name] = loaded[name]
        elif name in loaded:
            out[name] = jax.tree.map(
                lambda x, sharding: place.cut(x.astype(dtype), sharding), loaded[name], places
            )
        else:
            out[name] = jax.jit(
                lambda key, each=each: param.init_params(each, key, dtype), out_shardings=places
            )(key)
    return out


def _whole_in(ref: str, specs: dict[str, Any], model: Model, mesh: Any, dtype: Any) -> dict[str, Any]:
    """A base of a scorer's own on the mesh, in `dtype`, and the head where the files hold one."""
    tensors = pretrained.open_tensors(ref)
    known = {**specs["base"], **({"score": specs["score"]} if SCORE[0] in tensors.shapes else {})}
    names = {path: name for path, name in model.weight_names.items() if path != "head"} | {"score": SCORE}
    found = parameters.leaves(tensors, replace(model, specs=known, weight_names=names, heads={}))

    def load(path: str, spec: Any) -> Any:
        return place.load(
            found[path], jax.ShapeDtypeStruct(spec.shape, dtype), param.sharding_of(spec, mesh, path), False
        )

    base = tree.map_with_path(load, specs["base"], is_leaf=param.is_spec)
    return {"base": base, **({"score": parameters.whole(found["score"])} if "score" in known else {})}


def _score_in(ref: str, model: Model) -> dict[str, Any]:
    """The head that the files of a base have, of a reward model in full; none of a language model."""
    tensors = pretrained.open_tensors(ref)
    if SCORE[0] not in tensors.shapes:
        return {}
    return {"score": parameters.whole(parameters.leaves(tensors, as_checkpoint(model))["score"])}
