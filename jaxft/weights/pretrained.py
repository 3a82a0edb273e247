"""Models in and out: from the hub, folders, GGUF files and packages; to Hugging Face folders and PEFT adapters."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.models import families
from jaxft.models.adapted import adapted
from jaxft.models.model import Model
from jaxft.nn import param
from jaxft.nn.lora import Adapter
from jaxft.nn.param import ParamSpec
from jaxft.nn.quant import CHECKPOINT, QTensor, Quant, dequantize
from jaxft.weights import gguf, gguf_tokenizer, hf, hub, parameters, place
from jaxft.weights.safetensors import Index, Tensors, read_json
from jaxft.weights.storage import (
    StoredModel,
    choose_storage,
    keeps_layout,
    leaf_shapes,
    leaf_sharding,
    quantised_paths,
)


def read_config(located: hub.Located) -> dict[str, Any]:
    """The model's configuration as the dict of a config.json, from that file or from GGUF metadata."""
    if located.kind == "gguf":
        return gguf.read_config(gguf.read_header(located.path))
    return read_json(located.path / "config.json")


def model_for(ref: str, **options: Any) -> Model:
    """The Model that `ref` names; options go to the architecture (dtype, remat, residual).

    A ref among the presets touches neither disk nor network, a local one the network not, another one only the hub's
    config.json. Raises ValueError for an architecture that isn't implemented.
    """
    known = None if Path(ref).is_dir() else families.preset(ref, **options)
    if known is not None:
        return known
    located = hub.locate(ref, config_only=True)
    try:
        config = read_config(located)
        family = families.family_of(config)
        parsed = family.from_hf(config)
    except ValueError as e:
        raise ValueError(str(e) if str(located.path) in str(e) else f"{located.path}: {e}") from e
    except (TypeError, KeyError, AttributeError, OverflowError) as e:
        raise ValueError(
            f"{located.path}: its configuration has a missing or malformed value ({hub.one_line(e)})"
        ) from e
    return family.build(parsed, **options)


def open_leaves(ref: str, model: Model) -> dict[str, parameters.Leaf]:
    """The base parameters in the files of `ref` by path, each read when and where it is asked for, names and shapes checked."""
    return parameters.leaves(open_tensors(ref), model)


def open_tensors(ref: str) -> Tensors:
    """The tensors of `ref` under their Hugging Face names, each read when it is asked for."""
    located = hub.locate(ref)
    return (
        gguf.open_file(gguf.read_header(located.path))
        if located.kind == "gguf"
        else hf.open_folder(located.path)
    )


def load_tokenizer(ref: str) -> Any:
    """The model's tokenizer, a transformers PreTrainedTokenizerFast. Code from the model's folder is never run."""
    located = hub.locate(ref, config_only=True)
    if located.kind == "gguf":
        return gguf_tokenizer.load_tokenizer(gguf.read_header(located.path))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(located.path), trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # transformers and tokenizers raise many kinds here
        reason = hub.one_line(e)
        raise ValueError(
            f"{ref}: no tokenizer could be loaded from {located.path} ({reason}); it needs a tokenizer.json"
        ) from e
    if not tokenizer.is_fast:
        raise ValueError(
            f"{ref}: its tokenizer has no tokenizer.json (a fast tokenizer), which offsets and batches need"
        )
    return tokenizer


def stored_model(
    model: Model,
    quant: Quant | None,
    ref: str | None,
    trainable: Collection[str] = (),
    trainable_dtype: Any = None,
) -> StoredModel:
    """Choose how each parameter of `model`, a model over the whole tree, is stored; for quant=checkpoint, as the files of `ref` do.

    See storage.choose_storage. Raises ValueError where quant=checkpoint finds no quantised weights.
    """
    layouts = {}
    if quant and quant.kind == CHECKPOINT:
        layouts = _layouts(model, quantised_paths(model.specs["base"], quant), ref)
    return choose_storage(model, trainable, quant, layouts, trainable_dtype)


def frozen_model(
    model: Model, quant: Quant | None, ref: str | None, adapter: Adapter | None = None
) -> StoredModel:
    """Return the model over the whole tree with every parameter stored as inference needs it."""
    return stored_model(adapted(model, adapter), quant, ref)


def _layouts(model: Model, paths: list[str], ref: str | None) -> dict[str, QTensor]:
    """Return the quantised layouts of those of these base parameters that the files of `ref` hold quantised, from headers."""
    if ref is None:
        raise ValueError("quant=checkpoint stores the base as its files do, and no files are named")
    tensors = open_tensors(ref)
    hf.check(tensors, model)
    layouts = {path: hf.form_in(tensors, model, path) for path in paths}
    found = {path: layout for path, layout in layouts.items() if layout is not None}
    if not found:
        why = next((f"; of {name}, {p.why}" for name, p in tensors.packed.items() if p.why), "")
        raise ValueError(
            f"{ref}: holds no weights packed as quant=checkpoint would keep them{why}; use another quant, or none"
        )
    return found


def load_base(ref: str, stored: StoredModel, mesh: Any, skip: Collection[str] = ()) -> Any:
    """Load the base parameters of `ref` onto the mesh as they are stored; a process reads only what its devices hold.

    skip: paths in the whole tree of parameters that are not read; None stands for them.
    """
    leaves = open_leaves(ref, stored.model)

    def load(path: str, spec: ParamSpec) -> Any:
        full, leaf = f"base/{path}", leaves[path]
        if full in skip:
            return None
        storage = stored.storage[full]
        like = leaf_shapes(spec, storage)
        kept = leaf.form is not None and keeps_layout(storage, leaf.form)
        return place.load(leaf, like, leaf_sharding(spec, like, mesh, full), kept)

    return tree.map_with_path(load, stored.specs["base"], is_leaf=param.is_spec)


def load_frozen(ref: str, model: Model, mesh: Any, quant: Quant | None = None) -> Any:
    """Load the base parameters of `ref` onto the mesh for inference: in the compute dtype, or quantised."""
    return load_base(ref, frozen_model(model, quant, ref), mesh)


def storage_changes(ref: str, stored: StoredModel) -> list[str]:
    """Return a line for each group of weights that are quantised in the files but stored otherwise, with the reason."""
    tensors = open_tensors(ref)
    groups: dict[str, list[str]] = {}
    for path in param.spec_paths(stored.specs["base"]):
        name = stored.model.weight_names[path][0].format(i=0)
        if name not in tensors.packed:
            continue
        layout, p = hf.form_in(tensors, stored.model, path), tensors.packed[name]
        storage = stored.storage[f"base/{path}"]
        if layout is not None and keeps_layout(storage, layout):
            how = f"kept as {p.method} holds them: {p.why}" if p.why else ""
        elif storage.quantised and storage.quantize:
            kind = storage.quantize[0]
            how = (
                f"packed by {p.method} and rounded again to {kind}; quant=checkpoint leaves them as they are"
            )
        else:
            why = p.why or (
                "" if layout is not None else "the layers are not packed alike, or not along their inputs"
            )
            how = f"packed by {p.method} and expanded to {jnp.dtype(storage.dtype).name}{f' ({why})' if why else ''}"
        groups.setdefault(how, []).append(path)
    return [f"weights {how}: {', '.join(paths)}" for how, paths in groups.items() if how]


def with_storage_rounding(tensors: Tensors, model: Model, quant: Quant, ref: str) -> Tensors:
    """Return a checkpoint's tensors, those of `ref`, rounded as a run that quantises them computes with them."""
    stored = frozen_model(model, quant, ref)
    known = {}
    for path, spec in param.spec_paths(model.specs).items():
        name, transpose = model.weight_names[path]
        storage = stored.storage[f"base/{path}"]
        if storage.quantised:
            layout = hf.form_in(tensors, model, path)
            kept = layout is not None and keeps_layout(storage, layout)
            like = leaf_shapes(spec, storage)
            for i in range(spec.shape[0] if "{i}" in name else 1):
                known[name.format(i=i)] = (like, transpose, kept)

    def read(name: str, index: Index = ()) -> np.ndarray:
        if name not in known:
            return tensors.read(name, index)
        like, transpose, kept = known[name]
        value: Any = tensors.packed[name].read() if kept else tensors.read(name)
        packed: Any = (
            replace(value, dtype=like.dtype) if kept else place.hold(value.T if transpose else value, like)
        )
        value = np.asarray(dequantize(packed))
        return (value.T if transpose else value)[index]

    return replace(tensors, read=read)
