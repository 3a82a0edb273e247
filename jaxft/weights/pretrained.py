"""Pretrained models: architecture, tokenizer and base weights, from the hub, folders, GGUF files and
packages.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxft.distributed.exit import shorten_error
from jaxft.models import model_types
from jaxft.models.adapted import adapted
from jaxft.models.dense_config import DenseConfig
from jaxft.models.model import Model
from jaxft.models.model_types import text_config
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import ParamSpec
from jaxft.nn.quant import CHECKPOINT, QTensor, Quant, dequantize
from jaxft.nn.tree import Params
from jaxft.weights.edit import merged_weights
from jaxft.weights.edit.calibrated_base import open_codes
from jaxft.weights.gguf import gguf_config, gguf_file, gguf_tensors, gguf_tokenizer
from jaxft.weights.hf import hf_read, hub, tokenizer_files
from jaxft.weights.hf.safetensors import read_model_json
from jaxft.weights.hf.tokenizer_files import OverLimit, check_tokenizer_files
from jaxft.weights.param_loading import ParamReader, load_param, param_readers, read_quantised, store_as
from jaxft.weights.peft import peft_read
from jaxft.weights.storage import (
    Storage,
    StoredModel,
    choose_storage,
    keeps_layout,
    leaf_shapes,
    leaf_sharding,
    quantised_paths,
)
from jaxft.weights.tensors import Index, ModelFiles, QuantisedTensor, Tensor

NOT_COMPUTED = ("bos", "eos", "max_positions")  # fields of a config that change no value of the model
# Settings of transformers for dropout inside the model, which its pretraining may have used.
DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout")


def read_config(located: hub.Located) -> dict[str, Any]:
    """Return the model's configuration as the dict of a config.json, read from that file or from GGUF
    metadata. For a multimodal model it is the text decoder's. Raises ValueError if it is malformed.
    """
    if located.kind == "gguf":
        return gguf_config.gguf_config(gguf_file.read_gguf_header(located.path))
    config = text_config(read_model_json(located.path / "config.json"))
    quantised = config.get("quantization_config")
    if quantised is not None and not isinstance(quantised, dict):
        raise ValueError(
            f"{located.path / 'config.json'}: quantization_config must be an object, got {quantised!r:.60}; "
            "correct or download config.json again"
        )
    return config


def model_for(ref: str, **options: Any) -> Model:
    """Return the Model that `ref` names. options: passed to the architecture (dtype, remat, residual,
    attention_settings).

    A preset touches neither disk nor network; a hub model downloads only its config and tokenizer files. If
    the weights are on this machine and have a head that is not the embedding, the head is untied, whatever
    the config states. Raises ValueError for an architecture that is not implemented.

    >>> model_for("HuggingFaceTB/SmolLM2-135M").config.layers
    30
    """
    preset = None if Path(ref).is_dir() else model_types.preset(ref, **options)
    if preset is not None:
        return preset
    located = hub.locate(ref, config_only=True)
    where = located.path / "config.json" if located.kind == "folder" else located.path
    try:
        config = read_config(located)
        family = model_types.family_of(config)
        parsed = family.from_hf(config)
        if parsed.tied and _has_other_head(located):
            parsed = family.from_hf({**config, "tie_word_embeddings": False})
    except ValueError as e:
        named = str(e).startswith((f"{located.path}:", f"{located.path}/"))
        raise ValueError(str(e) if named else f"{where}: {e}") from e
    except (TypeError, KeyError, AttributeError, OverflowError) as e:
        raise ValueError(
            f"{where}: its configuration has a missing or invalid value ({shorten_error(e)}); "
            "correct its config.json"
        ) from e
    return family.build(parsed, **options)


def _has_other_head(located: hub.Located) -> bool:
    """Return whether a folder's files have a head that is not the embedding; False if they cannot be read."""
    if located.kind != "folder":
        return False
    try:
        return hf_read.has_other_head(hf_read.open_folder(located.path))
    except (ValueError, FileNotFoundError):  # which loading them reports
        return False


def file_notes(ref: str, model: Model) -> list[str]:
    """Return a line for each way in which the loaded model differs from the files of `ref` or their
    config.json: only a text decoder is loaded; dropout is not applied; the head is not tied.
    """
    located = hub.locate(ref, config_only=True)
    if located.kind != "folder":
        return []
    config, ignored, notes = read_config(located), open_files(ref).ignored, []
    if ignored:
        parts = sorted({name.removeprefix("model.").partition(".")[0] for name in ignored})
        notes.append(
            f"{ref}: images are not supported: only the text decoder ({config['model_type']}) of this "
            f"multimodal model is loaded and trained; exports copy the other {len(ignored)} tensors "
            f"({', '.join(parts)}) unchanged"
        )
    rates = {name: config[name] for name in DROPOUTS if config.get(name)}
    if rates:
        stated = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        notes.append(f"{ref}: its config.json has {stated}, which is not applied; adapter.dropout is")
    if "head" in model.weight_names and model_types.family_of(config).from_hf(config).tied:
        notes.append(
            f"{ref}: its config.json has tie_word_embeddings=true, but {hf_read.HEAD} is not the embedding: "
            "the head is a matrix of its own"
        )
    return notes


def open_files(ref: str) -> ModelFiles:
    """Open the tensors of `ref` under their Hugging Face names; downloads the model if necessary."""
    located = hub.locate(ref)
    if located.kind == "gguf":
        return gguf_tensors.open_gguf(gguf_file.read_gguf_header(located.path))
    return hf_read.open_folder(located.path)


def check_preset(ref: str, config: DenseConfig) -> None:
    """Raise ValueError if the files of `ref`, a preset's name, have other settings than the preset `config`.

    BOS, EOS and max_positions may differ: they change no value that the model computes.
    """
    if Path(ref).is_dir() or model_types.preset_config(ref) != config:
        return
    located = hub.locate(ref)
    hf_config = read_config(located)
    theirs = model_types.family_of(hf_config).from_hf(hf_config)
    if differing := config_differences(config, theirs):
        raise ValueError(
            f"{ref}: jaxft's settings for this name and the files' settings differ: {'; '.join(differing)}. "
            f"Use the files' folder as the model: {located.path}"
        )


def config_differences(one: Any, other: Any, ignored: Collection[str] = NOT_COMPUTED) -> list[str]:
    """Return the fields in which two configs differ, each with both values: `norm_eps 1e-05 and 1e-06`.

    Fields of rope are listed one by one. Floats may differ by float32 rounding, since GGUF files store
    float32. ignored: fields that are not compared. For configs of different classes, the only entry is the
    two class names.
    """
    if type(one) is not type(other):
        return [f"{type(one).__name__} and {type(other).__name__}"]
    lines: list[str] = []
    for name in (field.name for field in dataclasses.fields(one) if field.name not in ignored):
        a, b = getattr(one, name), getattr(other, name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            lines += [f"{name}.{line}" for line in config_differences(a, b, ())]
        elif a != b and not (type(a) is type(b) is float and math.isclose(a, b, rel_tol=1e-6)):
            lines.append(f"{name} {a!r:.60} and {b!r:.60}")
    return lines


def open_params(ref: str, model: Model) -> dict[str, ParamReader]:
    """Return by path a lazy reader for each base parameter in the files of `ref`.

    Raises ValueError if the files' tensors are not those that the model expects, or if `ref` is the name of a
    preset and the files' config.json differs from it (see check_preset).
    """
    check_preset(ref, model.config)
    return param_readers(open_files(ref), model)


def load_tokenizer(ref: str) -> Any:
    """Load the model's tokenizer, a transformers PreTrainedTokenizerFast. Code in the model's folder is never
    run. Raises ValueError for one that cannot be read or exceeds a limit of tokenizer_files.
    """
    located = hub.locate(ref, config_only=True)
    if located.kind == "gguf":
        return gguf_tokenizer.build_tokenizer(gguf_file.read_gguf_header(located.path))
    try:
        check_tokenizer_files(located.path)
        tokenizer = tokenizer_files.read_tokenizer(located.path)
        tokenizer("a 1", verbose=False)
        templates = tokenizer.chat_template
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if not isinstance(template, str | None):
                raise ValueError(f"chat_template must be a string, got type {type(template).__name__}")
    except OverLimit as e:
        raise ValueError(f"{ref}: {e}") from e
    except Exception as e:  # transformers and tokenizers raise many kinds here
        raise ValueError(f"{ref}: {tokenizer_files.reading_failed(located.path, e)}") from e
    if not tokenizer.is_fast:
        raise ValueError(
            f"{ref}: its tokenizer has no tokenizer.json, and jaxft needs a fast tokenizer, which reports "
            "where tokens are in a text; use a model that has one"
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise ValueError(
            f"{ref}: none of its chat templates ({', '.join(map(str, templates))}) is named default; give "
            "one of them that name in tokenizer_config.json"
        )
    return tokenizer


def check_token_id(ref: str, largest: int, vocab: int) -> None:
    """Raise ValueError if the largest token id of a text is not below `vocab`, the model's number of
    embeddings, because a gather would silently read another row.
    """
    if largest >= vocab:
        raise ValueError(
            f"{ref}: the tokenizer produces token id {largest}, but the model has embeddings for 0 to "
            f"{vocab - 1} only. Use the tokenizer that belongs to the model."
        )


def stored_model(
    model: Model,
    quant: Quant | None,
    ref: str | None,
    trainable: Collection[str] = (),
    trainable_dtype: DTypeLike | None = None,
) -> StoredModel:
    """Choose how each parameter of a model is stored. Other arguments and errors: see storage.choose_storage.

    ref: the model from whose files quant=checkpoint takes the layouts. Raises ValueError if quant=checkpoint
    is set and the files have no quantised weights.
    """
    layouts = {}
    if quant and quant.kind == CHECKPOINT:
        layouts = _layouts(model, quantised_paths(model.specs["base"], quant), ref)
    return choose_storage(model, trainable, quant, layouts, trainable_dtype)


def frozen_model(
    model: Model, quant: Quant | None, ref: str | None, adapter: Adapter | None = None
) -> StoredModel:
    """Return `model`, with an adapter if given, as it is stored for inference: no parameter is trainable."""
    return stored_model(adapted(model, adapter), quant, ref)


def _layouts(model: Model, paths: list[str], ref: str | None) -> dict[str, QTensor]:
    """Return by path the layouts of those parameters of `paths` that the files of `ref` store quantised."""
    if ref is None:
        raise ValueError(
            f"quant={CHECKPOINT} stores the base as its files do, and no files are named; set model="
        )
    files = open_files(ref)
    readers = param_readers(files, model)
    layouts = {path: layout for path in paths if (layout := readers[path].layout) is not None}
    if not layouts:
        reasons = (f" ({name}: {x.reason})" for name, x in files.quantised.items() if x.reason)
        raise ValueError(
            f"{ref}: no quantised weights that quant={CHECKPOINT} could store unchanged{next(reasons, '')}; "
            "use another quant, or none"
        )
    return layouts


def load_base(
    ref: str,
    stored: StoredModel,
    mesh: Mesh,
    skip: Collection[str] = (),
    adapter: Path | None = None,
    without: Params | None = None,
) -> Params:
    """Load the base parameters of `ref` onto the mesh as they are stored; a process reads only its own
    devices' shards.

    skip: paths, such as base/layers/attn/q, that are not read and are None in the result. adapter: a PEFT
    folder that is merged into the weights in float32. without: an adapter that is subtracted from the
    weights.
    """
    check_preset(ref, stored.model.config)
    files = open_files(ref)
    readers = param_readers(files, stored.model)
    if adapter is not None:
        peft_read.check_base_copies(adapter, files)
        pairs, settings = peft_read.read_adapter(adapter, stored.model, files)
        readers = merged_weights.merge_on_read(readers, stored.model, pairs, settings.trainable_token_indices)
    if without is not None:
        negated = tree.map_with_path(lambda path, x: -x if path.endswith("/b") else x, without)
        readers = merged_weights.merge_on_read(readers, stored.model, negated)

    def load(path: str, spec: ParamSpec) -> Any:
        full, reader = f"base/{path}", readers[path]
        if full in skip:
            return None
        storage = stored.storage[full]
        like = leaf_shapes(spec, storage)
        reader, unchanged = _stored_reader(reader, storage)
        return load_param(reader, like, leaf_sharding(spec, like, mesh, full), unchanged)

    return tree.map_with_path(load, stored.specs["base"], is_leaf=param_spec.is_spec)


def _stored_reader(reader: ParamReader, storage: Storage) -> tuple[ParamReader, bool]:
    """Return (reader, unchanged) to load a parameter with; the reader reads the storage's calibrated codes,
    if any, instead of the weight. unchanged: whether codes and scales are stored as they are in the files.
    """
    if storage.codes is not None:
        return replace(reader, files=open_codes(storage.codes)), True
    return reader, reader.layout is not None and keeps_layout(storage, reader.layout)


def check_adapter_base(folder: Path, ref: str) -> None:
    """Raise ValueError if an adapter has copies of embeddings that differ from the base's."""
    peft_read.check_base_copies(folder, open_files(ref))


def load_frozen(ref: str, model: Model, mesh: Mesh, quant: Quant | None = None) -> Params:
    """Load the base parameters of `ref` onto the mesh for inference: in the compute dtype, or quantised."""
    return load_base(ref, frozen_model(model, quant, ref), mesh)


def storage_changes(ref: str, stored: StoredModel) -> list[str]:
    """Return the lines of file_notes, and a line with the reason for each group of weights that the files
    quantise but that are stored in another form.
    """
    files = open_files(ref)
    groups: dict[str, list[str]] = {}
    for path, reader in param_readers(files, stored.model).items() if files.quantised else ():
        tensor = files.tensors[reader.tensors[0].name].quantised
        change = tensor and _storage_change(stored.storage[f"base/{path}"], reader.layout, tensor)
        if change:
            groups.setdefault(change, []).append(path)
    changes = [f"weights {change}: {', '.join(paths)}" for change, paths in groups.items()]
    return file_notes(ref, stored.model) + changes


def _storage_change(storage: Storage, layout: QTensor | None, tensor: QuantisedTensor) -> str:
    if layout is not None and keeps_layout(storage, layout):
        return f"stored as {tensor.method} does: {tensor.reason}" if tensor.reason else ""
    if storage.quantised and storage.quantize:
        kind = storage.quantize[0]
        method, unchanged = tensor.method, f"quant={CHECKPOINT} stores them unchanged"
        return f"quantised by {method} and rounded again to {kind}; {unchanged}"
    reason = tensor.reason
    if not reason and layout is None:
        reason = "the layers are not quantised alike, or not along their inputs"
    dtype = jnp.dtype(storage.dtype).name
    return f"quantised by {tensor.method} and dequantised to {dtype}{f' ({reason})' if reason else ''}"


def with_storage_rounding(
    readers: Mapping[str, ParamReader], model: Model, quant: Quant, ref: str
) -> dict[str, ParamReader]:
    """Return `readers`, of the files of `ref`, with values rounded as in a run with this quant."""
    stored = frozen_model(model, quant, ref)
    specs = param_spec.spec_paths(stored.specs["base"])
    return {
        path: _rounded(reader, specs[path], stored.storage[f"base/{path}"])
        for path, reader in readers.items()
    }


def _rounded(reader: ParamReader, spec: ParamSpec, storage: Storage) -> ParamReader:
    if not storage.quantised:
        return reader
    like, (source, unchanged) = leaf_shapes(spec, storage), _stored_reader(reader, storage)

    def changed(tensor: Tensor, index: Index = ()) -> np.ndarray:
        if unchanged:
            packed = replace(read_quantised(source, tensor), dtype=like.dtype)
        else:
            packed = store_as(reader.read(tensor), like)
        return np.asarray(dequantize(packed))[index]

    return replace(reader, changed=changed)
