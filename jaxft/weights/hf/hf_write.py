"""Write a model as a Hugging Face folder that transformers and vLLM load, one tensor at a time."""

import copy
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.distributed import sync
from jaxft.models import model_types
from jaxft.models.adapted import as_checkpoint
from jaxft.models.dense_config import for_transformers_4
from jaxft.models.model import Model
from jaxft.models.model_types import text_config, text_part
from jaxft.nn import tree
from jaxft.nn.param_spec import is_spec
from jaxft.nn.quant import QTensor, is_qtensor
from jaxft.nn.tree import Params
from jaxft.weights.hf.hf_read import (
    EMBEDDING,
    HEAD,
    WEIGHT_INDEX,
    decoder_tensors,
    joined_eos,
    tokenizer_ends,
    weight_files,
)
from jaxft.weights.hf.hub import Located, locate
from jaxft.weights.hf.safetensors import (
    SafetensorsFiles,
    TensorToWrite,
    open_safetensors,
    read_model_json,
    write_model_json,
    write_safetensors,
)
from jaxft.weights.hf.tokenizer_files import (
    PROCESSOR_TEMPLATE,
    TEMPLATES_FOLDER,
    is_unchanged,
    write_tokenizer,
)
from jaxft.weights.quantised.quantised_checkpoints import quantised_tensors
from jaxft.weights.tensors import Tensor, tensor_on_host, tensors_of

# Files of processors and tokenizers, and custom code; others in a model's folder may be anything.
SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
NOT_COPIED = ("config.json", "untrained_tokens.json", "adapter_config.json", "trainer_state.json")
MAX_SHARD = 5_000_000_000  # bytes
# Key of config.json: rewards are read at the end token, not at text that a template adds after it.
READ_AT = "reward_read_at"
# transformers' classifiers whose names are not the language model's with another ending.
CLASSIFIERS = {"Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}


@dataclass(frozen=True)
class LayerQuantizer:
    """The quantisation of the weights that `save_folder` writes.

    layouts: by parameter path, the layout of each of its tensors [in, out]. quantize(tensor, values [in,
    out]): returns a QTensor in that layout. settings: quantization_config for config.json. layout_name: a
    sentence on the file format, for the user. notes: lines for the user, added while weights are quantised.
    """

    layouts: Mapping[str, QTensor]
    quantize: Callable[[Tensor, np.ndarray], QTensor]
    settings: dict[str, Any]
    layout_name: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WriteOptions:
    """Options of writing weights to a Hugging Face folder.

    max_shard: largest size of a weights file in bytes. quant: None writes floats. changed: paths of the
    parameters whose values differ from the files of the source model; None if all may. text_only: write only
    the text decoder of a multimodal model.
    """

    max_shard: int = MAX_SHARD
    quant: LayerQuantizer | None = None
    changed: Collection[str] | None = None
    text_only: bool = False


def save_folder(
    folder: str | Path,
    model: Model,
    base: Params,
    tokenizer: Any,
    ref: str | Located | None = None,
    options: WriteOptions = WriteOptions(),  # noqa: B008
) -> None:
    """Write a model's weights, configuration and tokenizer to a Hugging Face folder.

    base: the tree of base weights, arrays, QTensors or LazyTensors, which are written in their dtypes or
    quantised. With a "score", the scalar head of `model`, the folder is a sequence classifier with one label.
    tokenizer: None writes none. ref: the source model, whose config.json and generation_config.json are
    carried over; None writes them from model.config. If ref is multimodal, the result is multimodal too, and
    all but the decoder's changed weights is copied, except that a classifier, quantised weights and
    options.text_only are written as a text model. With several processes, all call this; process 0 writes,
    and its error is raised on all.
    """
    import huggingface_hub

    folder = Path(folder)
    sync.exchange_first(sync.gather_texts, lambda: folder.mkdir(parents=True, exist_ok=True))
    tensors = tensors_to_write(base, model, options.quant)
    if not options.text_only and not options.quant and "score" not in base:
        located = locate(ref) if isinstance(ref, str) else ref
        if located is not None and multimodal_config(located):
            _save_multimodal(folder, model, base, tokenizer, located, options)
            return
    by_name = {t.name: t for t in tensors}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda t: t.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=options.max_shard,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, [by_name[name] for name in names])
    parameters = sum(math.prod(leaf.shape) for leaf in tree.paths(base, is_qtensor).values())
    totals = {"total_parameters": parameters, "total_size": sum(t.size for t in tensors)}

    def write_others() -> None:
        _write_index(folder, split.tensor_to_filename, totals)
        config, generation = _source_configs(model, ref)
        _write_configs(folder, config, generation, tokenizer, base, options.quant)

    sync.exchange_first(sync.gather_texts, write_others)


def multimodal_config(located: Located) -> dict[str, Any] | None:
    """Return the config.json of a multimodal model, None for another model."""
    config = read_model_json(located.path / "config.json") if located.kind == "folder" else {}
    return config if text_part(config) else None


def _save_multimodal(
    folder: Path, model: Model, base: Params, tokenizer: Any, located: Located, options: WriteOptions
) -> None:
    """Write a multimodal model with the decoder `base`, see save_folder."""
    leaves, source = tree.paths(base, is_qtensor), located.path
    table = tensors_of(model, tied_head=True)
    paths = [
        path
        for path, leaf in leaves.items()
        if options.changed is None or path in options.changed or is_qtensor(leaf)
    ]
    names = {tensor.name for path in paths for tensor in table[path]}
    tensors = [tensor for tensor in tensors_to_write(base, model) if tensor.name in names]
    _write_multimodal_weights(folder, source, tensors, tied="head" not in base)

    def write_others() -> None:
        _write_multimodal_config(folder, source, _changed_settings(model, base, located, tensors))
        _copy_small_files(folder, source)
        if tokenizer is not None and not is_unchanged(tokenizer, source):
            (folder / PROCESSOR_TEMPLATE).unlink(missing_ok=True)  # processors prefer it to the new file
            _write_tokenizer(folder, _source_configs(model, located)[1], tokenizer)

    sync.exchange_first(sync.gather_texts, write_others)


def _changed_settings(
    model: Model, base: Params, located: Located, tensors: Collection[TensorToWrite]
) -> dict[str, Any]:
    """Return by name the settings of a multimodal model's decoder that differ from its config.json: any of
    vocab_size, tie_word_embeddings and dtype. tensors: the decoder's changed tensors.
    """
    old, out = text_config(read_model_json(located.path / "config.json")), dict[str, Any]()
    if model.config.vocab != old["vocab_size"]:
        out["vocab_size"] = model.config.vocab
    if "head" in base and "head" not in model.weight_names:
        out["tie_word_embeddings"] = False
    widest = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize, default=None)
    stated = old.get("dtype") or old.get("torch_dtype")
    if widest is not None and stated and jnp.dtype(stated).itemsize < widest.itemsize:
        out["dtype"] = str(widest)
    return out


def save_configs(folder: Path, model: Model, tokenizer: Any, ref: Located) -> None:
    """Write all files that save_folder writes except the weights. ref: the source model."""
    config, generation = _source_configs(model, ref)
    base = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, model.dtype), model.specs, is_leaf=is_spec
    )
    _write_configs(folder, config, generation, tokenizer, base, None)


def save_template(folder: Path, model: Model, tokenizer: Any, ref: Located) -> None:
    """Write the configuration and the tokenizer of a model whose weights are unchanged from the folder `ref`.

    config.json is copied, for a multimodal model the processor's files too; generation_config.json gets the
    tokenizer's end tokens.
    """
    if multimodal_config(ref):
        _copy_small_files(folder, ref.path)
    shutil.copyfile(ref.path / "config.json", folder / "config.json")
    _write_tokenizer(folder, _source_configs(model, ref)[1], tokenizer)


def tensors_to_write(base: Params, model: Model, quant: LayerQuantizer | None = None) -> list[TensorToWrite]:
    """Return the tensors of a base tree under their Hugging Face names; their values are computed when they
    are written. quant: quantises the parameters in its `layouts`; None: none. QTensors in `base` are
    dequantised first.
    """
    leaves = tree.paths(base, is_qtensor)
    table = tensors_of(as_checkpoint(model) if "score" in leaves else model, tied_head=True)
    parts: dict[str, list[Tensor]] = {}  # by name: one, or several of a tensor that parameters share
    for path in leaves:
        for tensor in table[path]:
            parts.setdefault(tensor.name, []).append(tensor)
    out = []
    for name, (tensor, *_) in parts.items():
        fetch = partial(tensor_on_host, parts[name], leaves)
        if quant and tensor.path in quant.layouts:
            make, method = partial(_quantised, quant, tensor, fetch), quant.settings["quant_method"]
            out += quantised_tensors(name, quant.layouts[tensor.path], make, method)
            continue
        out.append(TensorToWrite(name, np.dtype(leaves[tensor.path].dtype), tensor.shape, fetch))
    return out


def _quantised(quant: LayerQuantizer, tensor: Tensor, fetch: Callable[[], np.ndarray]) -> QTensor:
    return quant.quantize(tensor, tensor.turned(fetch()))


def _write_index(folder: Path, weight_map: dict[str, str], totals: dict[str, int]) -> None:
    """Write the index if there are several weight files, and remove stale weight files from the folder.
    weight_map: file name by tensor name. totals: the index's metadata.
    """
    index, files = folder / WEIGHT_INDEX, set(weight_map.values())
    for stale in {*folder.glob("model*.safetensors"), index} - {folder / file for file in files}:
        stale.unlink(missing_ok=True)
    if len(files) > 1:
        write_model_json(index, {"metadata": totals, "weight_map": weight_map}, sort=True)


def _source_configs(model: Model, ref: str | Located | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (config.json, generation_config.json) of the source, or written from model.config without one.
    quantization_config and _name_or_path are left out; EOS tokens of model.config are added to the second.

    transformers refuses to load a pad_token_id outside the vocabulary, such as -1: in config.json it becomes
    null, in generation_config.json it is left out.
    """
    config, generation = model_types.config_to_hf(model.config), {}
    located = locate(ref, config_only=True) if isinstance(ref, str) else ref
    if located is not None and located.kind == "folder":
        config = text_config(read_model_json(located.path / "config.json"))
        if (located.path / "generation_config.json").is_file():
            generation = read_model_json(located.path / "generation_config.json")
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}
    config["vocab_size"] = model.config.vocab
    generation.setdefault("bos_token_id", config.get("bos_token_id"))
    generation["eos_token_id"] = joined_eos(generation.get("eos_token_id"), model.config.eos)
    if generation.get("pad_token_id") not in range(model.config.vocab):
        generation.pop("pad_token_id", None)
    if config.get("pad_token_id", 0) not in range(model.config.vocab):
        config["pad_token_id"] = None  # not removed, since some families have a default
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not config.get("rope_scaling"):
        # written by transformers 5; 4.57 and llama.cpp's converter would silently take their own defaults
        config |= for_transformers_4(rope, config.get("model_type", ""))
    return config, generation


def _write_configs(
    folder: Path,
    config: dict[str, Any],
    generation: dict[str, Any],
    tokenizer: Any,
    base: Params,
    quant: LayerQuantizer | None,
) -> None:
    """Write config.json for the parameters in `base`, the tokenizer's files and generation_config.json."""
    if "score" in base:
        tokenizer = with_distinct_pad_token(tokenizer)
        _make_classifier(config, tokenizer)
    else:
        config["tie_word_embeddings"] = "head" not in base
    dtypes = [
        np.dtype(leaf.dtype)
        for path, leaf in tree.paths(base, is_qtensor).items()
        if not quant or path not in quant.layouts
    ]
    if quant:
        config["quantization_config"] = quant.settings
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(jnp.dtype(widest))
    write_model_json(folder / "config.json", config)
    _write_tokenizer(folder, generation, tokenizer)


def _write_tokenizer(folder: Path, generation: dict[str, Any], tokenizer: Any) -> None:
    """Write the tokenizer's files, and generation_config.json with its padding and EOS tokens."""
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer)
        generation.setdefault("pad_token_id", tokenizer.pad_token_id)
        ends = tokenizer_ends(tokenizer)  # so that vLLM and transformers stop there too
        generation["eos_token_id"] = joined_eos(generation["eos_token_id"], ends)
    write_model_json(
        folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None}
    )


def _make_classifier(config: dict[str, Any], tokenizer: Any) -> None:
    """Change a config.json in place from a language model's to a sequence classifier's with one label."""
    kind = config.get("architectures") or [f"{config['model_type'].capitalize()}ForCausalLM"]
    name = kind[0].replace("ForCausalLM", "ForSequenceClassification")
    config["architectures"] = [CLASSIFIERS.get(kind[0], name)]
    config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}, READ_AT: "end token"}
    if tokenizer is not None:
        config["pad_token_id"] = tokenizer.pad_token_id


def with_distinct_pad_token(tokenizer: Any) -> Any:
    """Return the tokenizer with a padding token other than its EOS token, if it has such a token.

    transformers' classifiers read the last token that is not padding, and many chat models pad with their EOS
    token. Their padding becomes another special token; the BOS token only if there is no other.
    """
    if tokenizer is None:
        return None
    ends = {tokenizer.eos_token_id, None}
    start, added = tokenizer.bos_token_id, tokenizer.added_tokens_decoder
    special = sorted(number for number, token in added.items() if token.special and number != start)
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, *special, start)
    pad = next((number for number in candidates if number not in ends), None)
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = changed.convert_ids_to_tokens(pad)
    return changed


# Multimodal models: everything but the trained decoder is copied byte for byte


def _write_multimodal_weights(
    folder: Path, source: Path, tensors: Iterable[TensorToWrite], tied: bool
) -> None:
    """Write a copy of a multimodal model's weight files with new values for some tensors of its decoder. With
    several processes, all call this, and process 0 writes.

    source: the model's folder. tensors: the new values, under the names of the text-only model. tied: whether
    the head is the embedding. If `source` lacks a head, it is added; other new tensors raise ValueError.
    """
    files, new = weight_files(source), {tensor.name: tensor for tensor in tensors}
    opened = open_safetensors(source, files)
    stored = decoder_tensors(opened.where, opened.tensors)
    if tied and HEAD in stored and EMBEDDING in new:  # some files repeat a tied head
        new[HEAD] = new[EMBEDDING]
    changed = _with_stored_names(opened.where, stored, new)
    home = opened.tensors[stored[EMBEDDING]].path
    of_files: dict[Path, list[TensorToWrite]] = {path: [] for path in files}
    for tensor in changed:
        of_files[opened.tensors[tensor.name].path if tensor.name in opened.tensors else home].append(tensor)
    for path, of_file in of_files.items():
        write_safetensors(folder / path.name, of_file, path)
    sync.exchange_first(
        sync.gather_texts, lambda: _write_multimodal_index(folder, opened, changed, home.name)
    )


def _with_stored_names(
    where: str, stored: Mapping[str, str], tensors: Mapping[str, TensorToWrite]
) -> list[TensorToWrite]:
    """Give a text model's tensors the names in a multimodal model's files. stored: from decoder_tensors."""
    in_old_files = stored[EMBEDDING].startswith("language_model.")
    names = {HEAD: f"language_model.{HEAD}" if in_old_files else HEAD, **stored}
    if missing := [name for name in tensors if name not in names]:
        raise ValueError(
            f"{where}: {missing[0]} of the text decoder is missing; use the model's folder as it was when "
            "the decoder was trained"
        )
    return [replace(tensor, name=names[name]) for name, tensor in tensors.items()]


def _write_multimodal_index(
    folder: Path, opened: SafetensorsFiles, changed: list[TensorToWrite], home: str
) -> None:
    """Write the index of the weight files if the source has one: updated if tensors were added, to the file
    `home`, or changed their size, else a copy.
    """
    path = Path(opened.where) / WEIGHT_INDEX
    if not path.is_file():
        return
    new = [tensor.name for tensor in changed if tensor.name not in opened.tensors]
    sizes = {name: math.prod(x.shape) * x.dtype.itemsize for name, x in opened.tensors.items()}
    grown = sum(tensor.size - sizes.get(tensor.name, 0) for tensor in changed)
    if not new and not grown:
        shutil.copyfile(path, folder / path.name)
        return
    index = read_model_json(path)
    index["weight_map"] |= dict.fromkeys(new, home)
    if isinstance(index.get("metadata"), dict) and isinstance(index["metadata"].get("total_size"), int):
        index["metadata"]["total_size"] += grown
    write_model_json(folder / path.name, index)


def _write_multimodal_config(folder: Path, source: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json of the multimodal model in the folder `source` with other settings of its decoder:
    any of vocab_size, tie_word_embeddings and dtype. Without any, the file is copied.
    """
    if not settings:
        shutil.copyfile(source / "config.json", folder / "config.json")
        return
    config = read_model_json(source / "config.json")
    text = config.get("text_config", config)
    for name, value in settings.items():
        key = "torch_dtype" if name == "dtype" and "torch_dtype" in config else name
        for group, needed in ((config, name != "vocab_size"), (text, name == "vocab_size")):
            if needed or key in group:
                group[key] = value
    write_model_json(folder / "config.json", config)


def _copy_small_files(folder: Path, source: Path) -> None:
    """Copy the files of a multimodal model's processor and tokenizer."""
    for path in (*sorted(source.iterdir()), *sorted(source.glob(f"{TEMPLATES_FOLDER}/*.jinja"))):
        skipped = path.name in NOT_COPIED or path.name.endswith(".index.json")
        if path.suffix in SMALL_SUFFIXES and path.is_file() and not skipped:
            out = folder / path.relative_to(source)
            out.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out)
