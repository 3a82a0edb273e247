"""Initialise the parameters outside the base: adapters and heads, fresh or loaded from folders."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.models.adapted import SCORE, TEACHER, HeadSettings, as_checkpoint
from jaxft.models.model import Model
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter
from jaxft.nn.adapters.lora_specs import differing_fields
from jaxft.nn.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.param_loading import (
    load_param,
    param_readers,
    read_table_rows,
    read_whole,
    shard_host_array,
)
from jaxft.weights.peft import peft_read
from jaxft.weights.peft.adapter_folders import adapter_folder


def init_all_but_base(
    model: Model,
    mesh: Mesh,
    seed: int,
    policy: HeadSettings,
    ref: str | None = None,
    scorers: Mapping[str, HeadSettings] | None = None,
) -> dict[str, Params]:
    """Initialise adapters and heads, or load them from their start folders; return them by name in the tree
    of model.specs, such as "adapter", "score" or a critic's name.

    model: its specs are the tree {"base", "adapter", ...heads} of all parameters. The base, the teacher and
    the initial adapter (edit/lora_start.py) are not in the result. policy: settings of the policy's adapter
    and head. Without policy.start, the head is loaded from the files of `ref`, the base, if they contain one.
    scorers: settings by name of critics and reward models on the same base. Raises FileNotFoundError for a
    missing start folder, ValueError if its adapter has other settings, and for a frozen reward model without
    a head.
    """
    scorers, key = scorers or {}, jax.random.key(seed)
    others = {"base", INITIAL_ADAPTER, TEACHER, *scorers}
    specs = {name: specs for name, specs in model.specs.items() if name not in others}
    for start in dict.fromkeys(x.start for x in (policy, *scorers.values())):
        if start is not None and ref is not None and adapter_folder(start).is_dir():
            pretrained.check_adapter_base(adapter_folder(start), ref)
    out = _init_parts(specs, model, mesh, key, policy, ref)
    for name, scorer in scorers.items():
        scorer_key = jax.random.fold_in(key, param_spec.path_hash(name))
        out[name] = _init_parts(model.specs[name], model, mesh, scorer_key, scorer, ref)
    return out


def check_starts(
    model: Model, policy: HeadSettings, ref: str, scorers: Mapping[str, HeadSettings] | None = None
) -> None:
    """Check the start folders of the policy and of the scorers, without loading anything onto devices.

    All arguments are as in init_all_but_base. Raises FileNotFoundError for a missing folder, ValueError for
    one that cannot be read or whose adapter has other settings than the run's.
    """
    parts = {name: specs for name, specs in model.specs.items() if name in ("adapter", "score")}
    for settings, specs in [
        (policy, parts),
        *((x, model.specs[name]) for name, x in (scorers or {}).items()),
    ]:
        if settings.start is None:
            continue
        if adapter_folder(settings.start).is_dir():
            pretrained.check_adapter_base(adapter_folder(settings.start), ref)
        folder = _start_folder(settings)
        _check_start(settings, peft_read.read_declared(folder, model), specs, model)


def _init_parts(
    specs: dict[str, Any],
    model: Model,
    mesh: Mesh,
    key: jax.Array,
    settings: HeadSettings,
    ref: str | None = None,
) -> dict[str, Params]:
    """Return the parameters in `specs` of the policy or of one scorer, loaded from settings.start or
    settings.weights; those that no folder contains are initialised.

    specs: by name, an adapter, a head or both; or a full base and a head if settings.weights is set. key:
    random key of the initialisation. ref: the base, whose files may have a head.
    """
    dtype = np.promote_types(model.dtype, np.float32)
    loaded: dict[str, Params] = {}
    if settings.weights is not None:
        loaded = _load_classifier(settings.weights, specs, model, mesh)
    if settings.start is not None:
        files = None if ref is None else pretrained.open_files(ref)
        loaded, declared = peft_read.read_parts(_start_folder(settings), model, files)
        _check_start(settings, (tuple(loaded), declared), specs, model)
    elif "score" in specs and ref is not None and model.heads.keys() == {"score"}:
        files = pretrained.open_files(ref)  # a reward model's; a language model has no head
        if SCORE.template in files.tensors:
            loaded = {"score": read_whole(param_readers(files, as_checkpoint(model))["score"])}
    if not settings.trained and "score" not in loaded:
        source = settings.start or settings.weights
        if source is None:
            raise ValueError(
                "a frozen scorer needs the folder of a reward model; set `start` of its HeadSettings"
            )
        raise ValueError(
            f"{source} is not a reward model: it has no scalar head; give the folder of a run of "
            "configs/reward.py, or a sequence classifier with one label"
        )
    out = {}
    for name, part in specs.items():
        shardings = param_spec.shardings(part, mesh)
        if name == "base":
            out[name] = loaded[name]
        elif name in loaded:
            out[name] = jax.tree.map(
                lambda x, to: shard_host_array(x.astype(dtype), to), loaded[name], shardings
            )
        else:
            out[name] = jax.jit(
                lambda key, part=part: param_spec.init_params(part, key, dtype), out_shardings=shardings
            )(key)
            if settings.adapter is not None and settings.adapter.replaces_weights:
                out[name] = _with_base_weights(out[name], part, model, mesh, (settings.adapter, ref))
    return out


def _with_base_weights(
    params: Params, specs: param_spec.Specs, model: Model, mesh: Mesh, source: tuple[Adapter, str | None]
) -> Params:
    """Return an adapter whose modules_to_save, biases and token rows start at the base's values.

    source: (the adapter's settings, the ref of the base whose files are read).
    """
    settings, ref = source
    if ref is None:
        raise ValueError(
            "adapter.modules_to_save, adapter.bias and adapter.trainable_token_indices start from the base's "
            "files; set model="
        )
    readers = pretrained.open_params(ref, model)
    if "head" not in readers:  # the embedding table [V, D], transposed
        (tensor,) = readers["embed"].tensors
        tensor = replace(tensor, transposed=True, values=tensor.values[::-1])
        readers["head"] = replace(readers["embed"], tensors=(tensor,), shape=tensor.values, layout=None)
    dtype = np.promote_types(model.dtype, np.float32)

    def start(path: str, spec: param_spec.ParamSpec, fresh: jax.Array) -> jax.Array:
        above, _, name = path.rpartition("/")
        if name not in ("weight", "rows"):
            return fresh
        to = param_spec.sharding_of(spec, mesh, path)
        if name == "rows":
            rows = read_table_rows(
                readers[above], settings.trainable_token_indices, transposed=above == "head"
            )
            return shard_host_array(rows.astype(dtype), to)
        like = jax.ShapeDtypeStruct(spec.shape, dtype)
        return load_param(readers[above], like, to, unchanged=False)

    return tree.map_with_path(start, specs, params, is_leaf=param_spec.is_spec)


def _start_folder(settings: HeadSettings) -> Path:
    """Return the adapter folder that settings.start names. Raises FileNotFoundError if it does not exist."""
    start = str(settings.start)
    folder = adapter_folder(start)
    if not folder.is_dir():
        hint = "" if settings.trained else "; a classifier on the hub is org/name@revision"
        raise FileNotFoundError(
            f"{start}: no such folder of a run or an adapter (relative to {Path.cwd()}){hint}"
        )
    return folder


def _check_start(
    settings: HeadSettings, declared: tuple[tuple[str, ...], Adapter], specs: dict[str, Any], model: Model
) -> None:
    """Raise ValueError if the run trains no adapter, or if the one in settings.start has other settings than
    the run's, or a scalar head that the run lacks. declared: from peft_read.read_declared.
    """
    (parts, theirs), start = declared, str(settings.start)
    base = model.specs.get("base", model.specs)
    ours = settings.adapter
    if ours is None:
        raise ValueError(
            f"{start}: it has an adapter, but this run trains none; leave start out, or set adapter"
        )
    fields = differing_fields(base, theirs, ours, model.weight_names)
    if fields:
        values = [", ".join(f"{name}={getattr(x, name)!r}" for name in fields) for x in (theirs, ours)]
        raise ValueError(
            f"{start}: its adapter has {values[0]}, but the run's has {values[1]}; use the folder's settings"
        )
    if "score" in parts and "score" not in specs:
        raise ValueError(
            f"{start}: a reward model's adapter, but this run has no scalar head; use a language model's "
            "adapter"
        )


def _load_classifier(ref: str, specs: dict[str, Any], model: Model, mesh: Mesh) -> dict[str, Params]:
    """Load the classifier `ref`: return its base on the mesh, and "score", its head on the host, if the files
    contain one. specs: {"base", "score"}, for the base's shardings.
    """
    dtype = np.promote_types(model.dtype, np.float32)
    files = pretrained.open_files(ref)
    in_both = {**specs["base"], **({"score": specs["score"]} if SCORE.template in files.tensors else {})}
    names = {path: name for path, name in model.weight_names.items() if path != "head"} | {"score": SCORE}
    readers = param_readers(
        files, replace(model, specs=in_both, weight_names=names, heads={}, generates=False)
    )

    def load(path: str, spec: param_spec.ParamSpec) -> jax.Array:
        like = jax.ShapeDtypeStruct(spec.shape, dtype)
        return load_param(readers[path], like, param_spec.sharding_of(spec, mesh, path), unchanged=False)

    base = tree.map_with_path(load, specs["base"], is_leaf=param_spec.is_spec)
    return {"base": base, **({"score": read_whole(readers["score"])} if "score" in in_both else {})}
