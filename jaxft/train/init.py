"""How what stands beside a run's base begins: its adapter and head, and further models with theirs, fresh or from folders."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.models.heads import SCORE, Scorer, in_files
from jaxft.nn import param
from jaxft.nn.lora import Adapter
from jaxft.nn.param import Model
from jaxft.train.partition import Trained, adapter_folder
from jaxft.weights import parameters, peft, pretrained
from jaxft.weights import place as shards


def start_adapter(
    t: Trained, mesh: Any, seed: int, settings: Adapter | None = None, start: str | None = None
) -> Any:
    """A fresh adapter on the mesh, or the one of the PEFT folder `start`, whose settings must be the run's."""
    only = {"adapter": t.specs["adapter"]}
    return _parts(only, t.model, mesh, jax.random.key(seed), Scorer(settings, start))["adapter"]


def start_beside(
    t: Trained,
    mesh: Any,
    seed: int,
    own: Scorer,
    ref: str | None = None,
    beside: Mapping[str, Scorer] | None = None,
) -> dict[str, Any]:
    """All of the whole tree but the base, on the mesh: fresh, or as the folders hold it where they do.

    own: settings of the run's own adapter and head; without a start the head begins as the base's files, those of `ref`, hold it.
    beside: of the further models on the base. Raises ValueError for a folder whose adapter isn't the run's, and for a frozen
    model without a head.
    """
    beside, key = beside or {}, jax.random.key(seed)
    mine = {name: specs for name, specs in t.specs.items() if name != "base" and name not in beside}
    out = _parts(mine, t.model, mesh, key, own, ref)
    for name, one in beside.items():
        out[name] = _parts(t.specs[name], t.model, mesh, jax.random.fold_in(key, param.hash_of(name)), one)
    return out


def _parts(
    specs: dict[str, Any], model: Model, mesh: Any, key: Any, how: Scorer, ref: str | None = None
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
    elif "score" in specs and ref is not None and model.beside.keys() == {"score"}:
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
                lambda x, place: shards.cut(x.astype(dtype), place), loaded[name], places
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
    names = {path: name for path, name in model.names.items() if path != "head"} | {"score": SCORE}
    found = parameters.leaves(tensors, replace(model, specs=known, names=names, beside={}))

    def load(path: str, spec: Any) -> Any:
        return shards.load(
            found[path], jax.ShapeDtypeStruct(spec.shape, dtype), param.place(spec, mesh, path), False
        )

    base = tree.map_with_path(load, specs["base"], is_leaf=param.is_spec)
    return {"base": base, **({"score": parameters.whole(found["score"])} if "score" in known else {})}


def _score_in(ref: str, model: Model) -> dict[str, Any]:
    """The head that the files of a base have, of a reward model in full; none of a language model."""
    tensors = pretrained.open_tensors(ref)
    if SCORE[0] not in tensors.shapes:
        return {}
    return {"score": parameters.whole(parameters.leaves(tensors, in_files(model))["score"])}
