"""Hugging Face folders: safetensors and config.json, in and out. Tensors are read and written one at a time."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.distributed import sharding, sync
from jaxft.models import families
from jaxft.models.model import Model
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import QTensor, dequantize, is_qtensor
from jaxft.weights import quantised, quantised_write
from jaxft.weights.hub import Located, locate
from jaxft.weights.quant_layout import same_form
from jaxft.weights.safetensors import (
    DTYPES,
    FLOATS,
    Entry,
    Outgoing,
    Tensors,
    read_header,
    read_json,
    read_tensor,
    write_json,
    write_safetensors,
)

MAX_SHARD = 5_000_000_000
SCORE = "score.weight"  # of a sequence classifier
HEAD = ("lm_head.weight", True)  # also of an adapted tied head, for which a Model has no name
IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight", "attn.masked_bias")  # buffers that old files carry


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the index's, else model.safetensors, else the only one there is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(f"{index}: wanted an object 'weight_map' of tensor name to file name")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{index}: shard {name!r} is not a plain file name inside the folder")
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name}: this shard of {index.name} is missing; download the model again"
                )
        return [folder / name for name in names]
    found = sorted(
        p for p in folder.glob("*.safetensors") if not p.name.startswith(("adapter_", "consolidated"))
    )
    if len(found) > 1:
        found = [p for p in found if p.name == "model.safetensors"] or found
    if len(found) > 1:
        raise ValueError(
            f"{folder}: {len(found)} safetensors files but no model.safetensors.index.json to say which are meant"
        )
    if found:
        return found
    unsafe = [p.name for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for p in sorted(folder.glob(kind))]
    if unsafe:
        raise ValueError(
            f"{folder}: only pickled weights ({unsafe[0]}), which can run code and are not read; convert them where torch is: "
            f"transformers.AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
        )
    raise FileNotFoundError(
        f"{folder}: no .safetensors file; if the model exists only as pickled weights (.bin, .pt), convert it where torch is: "
        "transformers.AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER)"
    )


def open_folder(folder: Path) -> Tensors:
    """The tensors of a folder's safetensors files."""
    entries: dict[str, tuple[Path, Entry]] = {}
    for path in weight_files(folder):
        for name, entry in read_header(path).items():
            if name in entries:
                raise ValueError(f"{path}: tensor {name} is in {entries[name][0].name} too")
            entries[name] = (path, entry)
    unknown = np.dtype(np.void)
    files = Tensors(
        where=str(folder),
        shapes={name: e.shape for name, (_, e) in entries.items()},
        dtypes={name: DTYPES.get(e.code, unknown) for name, (_, e) in entries.items()},
        read=lambda name, index=(), view=None: read_tensor(
            entries[name][0], name, entries[name][1], index, view
        ),
    )
    config = folder / "config.json"
    settings = read_json(config).get("quantization_config") if config.is_file() else None
    return quantised.opened(files, settings) if isinstance(settings, dict) else files


def form_in(tensors: Tensors, model: Model, path: str) -> QTensor | None:
    """The form in which the files hold every layer of a parameter; None where it is not packed, or not the same in all."""
    name, transpose = model.weight_names[path]
    count = spec_paths(model.specs.get("base", model.specs))[path].shape[0] if "{i}" in name else 1
    held = [tensors.packed.get(name.format(i=i)) for i in range(count)]
    first = held[0].form if held[0] is not None else None
    if first is None or not transpose:
        return None
    return (
        first
        if all(p is not None and p.form is not None and same_form(p.form, first) for p in held)
        else None
    )


def check(tensors: Tensors, model: Model) -> None:
    """The checkpoint has exactly the model's tensors, in their shapes and a float dtype; else ValueError."""
    wanted: dict[str, tuple[int, ...]] = {}
    if model.config.layers > len(tensors.shapes):  # a garbled number would make a list of millions of names
        raise ValueError(
            f"{tensors.where}: its config says {model.config.layers} layers and there are {len(tensors.shapes)} tensors in all; "
            "is the download complete, and does its config.json belong to it?"
        )
    for path, spec in spec_paths(model.specs.get("base", model.specs)).items():
        name, transpose = model.weight_names[path]
        layered = "{i}" in name
        shape = spec.shape[1:] if layered else spec.shape
        for i in range(spec.shape[0] if layered else 1):
            wanted[name.format(i=i)] = shape[::-1] if transpose else shape
    if SCORE in tensors.shapes and "score" not in model.weight_names:
        raise ValueError(
            f"{tensors.where}: a sequence classifier, which gives scores and no text; take a language model"
        )
    missing = [name for name in wanted if name not in tensors.shapes]
    if missing:
        raise ValueError(
            f"{tensors.where}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]}; "
            "is the download complete, and does its config.json belong to it?"
        )
    allowed = {HEAD[0]} if "head" not in model.weight_names else set()  # some files repeat a tied head
    allowed |= {SCORE} if "score" in model.weight_names else set()
    extra = [n for n in tensors.shapes if n not in wanted and n not in allowed and not n.endswith(IGNORED)]
    if extra:
        raise ValueError(
            f"{tensors.where}: {len(extra)} tensors have no place in this architecture, the first is {extra[0]}; "
            "it is another architecture or more layers than its config says"
        )
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.where}: {name} has shape {tensors.shapes[name]}, its config wants {shape}"
            )
        if tensors.dtypes[name] not in FLOATS.values():
            raise ValueError(
                f"{tensors.where}: {name} is stored in a dtype that is not one of {', '.join(FLOATS)}"
            )


@dataclass(frozen=True)
class Packing:
    """How save_folder packs: the forms of a layer [in, out] by path, what makes them, what config.json says.

    pack(path, number of the layer or None, the layer) -> QTensor.
    """

    forms: Mapping[str, QTensor]
    pack: Callable[[str, int | None, np.ndarray], QTensor]
    settings: dict[str, Any]


def outgoing(base: Any, names: dict[str, tuple[str, bool]], packing: Packing | None = None) -> list[Outgoing]:
    """The tensors of a base tree under their Hugging Face names; leaves may be arrays or QTensors."""
    tensors = []
    for path, leaf in tree.paths(base, is_qtensor).items():
        name, transpose = {"head": HEAD, **names}[path]
        layered = "{i}" in name
        shape = leaf.shape[1:] if layered else leaf.shape
        for i in range(leaf.shape[0] if layered else 1):
            layer = i if layered else None
            if packing and path in packing.forms:
                make = partial(_packed_layer, packing.pack, path, leaf, layer)
                tensors += quantised_write.outgoing(
                    name.format(i=i), packing.forms[path], make, packing.settings["quant_method"]
                )
                continue
            fetch = partial(layer_array, leaf, layer, transpose)
            shape_out = tuple(shape[::-1] if transpose else shape)
            tensors.append(Outgoing(name.format(i=i), np.dtype(leaf.dtype), shape_out, fetch))
    return tensors


def _packed_layer(pack: Callable, path: str, leaf: Any, layer: int | None) -> QTensor:
    return pack(path, layer, layer_array(leaf, layer, False))


def layer_array(leaf: Any, layer: int | None, transpose: bool) -> np.ndarray:
    """One layer of a stacked leaf (None: the whole leaf) on the host; a QTensor is expanded.

    One that lies on several processes' devices is gathered, that layer only: all of them call this.
    """
    leaf = jax.tree.map(lambda x: _layer(x, layer), leaf)
    value = np.asarray(dequantize(leaf) if is_qtensor(leaf) else leaf)
    return value.T if transpose else value


def _layer(x: Any, layer: int | None) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        sync.meet()  # process 0 may still be writing the one before
        return _pick(sharding.replicated(x.sharding.mesh), layer is None)(x, np.int32(layer or 0))  # type: ignore[attr-defined]
    return x if layer is None else x[layer]


@functools.cache
def _pick(place: Any, whole: bool) -> Callable:
    return jax.jit(
        lambda x, i: x if whole else jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=place
    )


def save_folder(
    folder: str | Path,
    model: Model,
    base: Any,
    tokenizer: Any,
    ref: str | Located | None = None,
    max_shard: int = MAX_SHARD,
    packing: Packing | None = None,
) -> None:
    """A merged model as a Hugging Face folder that transformers and vLLM load.

    base: the tree of base weights, written in its leaves' dtypes or as `packing` says; with a "score" in it, the head of `model`,
    it is a sequence classifier with one label. ref: the model it came from, whose
    config.json and generation_config.json are carried over; without one they are written from model.config. tokenizer may be
    None. Of several processes all call it; process 0 writes, and its error is raised on all.
    """
    folder = Path(folder)
    sync.by_first(sync.gathered, lambda: folder.mkdir(parents=True, exist_ok=True))
    tensors = outgoing(base, model.weight_names, packing)
    shards: list[list[Outgoing]] = [[]]
    for t in tensors:
        if shards[-1] and sum(s.size for s in shards[-1]) + t.size > max_shard:
            shards.append([])
        shards[-1].append(t)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard)
    weight_map = {t.name: file for file, shard in zip(files, shards, strict=True) for t in shard}
    parameters = sum(math.prod(leaf.shape) for leaf in tree.paths(base, is_qtensor).values())
    totals = {"total_parameters": parameters, "total_size": sum(t.size for t in tensors)}
    sync.by_first(sync.gathered, lambda: _write_index(folder, weight_map, totals))
    sync.by_first(sync.gathered, lambda: _write_configs(folder, model, base, tokenizer, ref, packing))


def _write_index(folder: Path, weight_map: dict[str, str], totals: dict[str, int]) -> None:
    """The index of several files; files of an earlier model that was cut otherwise are removed."""
    index, files = folder / "model.safetensors.index.json", set(weight_map.values())
    for stale in {*folder.glob("model*.safetensors"), index} - {folder / file for file in files}:
        stale.unlink(missing_ok=True)
    if len(files) > 1:
        write_json(index, {"metadata": totals, "weight_map": weight_map}, sort=True)


def _write_configs(
    folder: Path, model: Model, base: Any, tokenizer: Any, ref: Any, packing: Packing | None
) -> None:
    config, generation = _source_configs(model, ref)
    if "score" in base:
        tokenizer = padded_apart(tokenizer)
        _classify(config, tokenizer)
    else:
        config["tie_word_embeddings"] = "head" not in base
    plain = [
        leaf.dtype
        for path, leaf in tree.paths(base, is_qtensor).items()
        if not packing or path not in packing.forms
    ]
    widest = max(map(np.dtype, plain), key=lambda dtype: dtype.itemsize)
    if packing:
        config["quantization_config"] = packing.settings
    config["dtype" if "dtype" in config else "torch_dtype"] = str(jnp.dtype(widest))
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
        generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _classify(config: dict[str, Any], tokenizer: Any) -> None:
    """What transformers wants to know of a sequence classifier. It reads a row's last token that isn't the padding token."""
    kind = config.get("architectures") or [f"{config['model_type'].capitalize()}ForCausalLM"]
    config["architectures"] = [kind[0].replace("ForCausalLM", "ForSequenceClassification")]
    config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}, READ_AT: "end token"}
    if tokenizer is not None:
        config["pad_token_id"] = tokenizer.pad_token_id


READ_AT = "reward_read_at"  # in config.json: what we write is read at the answer's end token, not at what a template adds to it


def padded_apart(tokenizer: Any) -> Any:
    """The tokenizer of a classifier: it pads with a token that no text ends with, as transformers reads the last one that isn't
    padding. Many chat models pad with their end token; they get another special token, that of the start only at need."""
    if tokenizer is None:
        return None
    ends = {tokenizer.eos_token_id, None}
    start, added = tokenizer.bos_token_id, tokenizer.added_tokens_decoder
    special = sorted(number for number, token in added.items() if token.special and number != start)
    others = (tokenizer.pad_token_id, tokenizer.unk_token_id, *special, start)
    pad = next((number for number in others if number not in ends), None)
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.convert_ids_to_tokens(pad)
    return own


def _source_configs(model: Model, ref: str | Located | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json in the source's own style, without what no longer holds, and generation_config.json."""
    config, generation = families.config_to_hf(model.config), {}
    located = locate(ref, config_only=True) if isinstance(ref, str) else ref
    if located is not None and located.kind == "folder":
        config = read_json(located.path / "config.json")
        if (located.path / "generation_config.json").is_file():
            generation = read_json(located.path / "generation_config.json")
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}
    for name in ("bos_token_id", "eos_token_id"):
        generation.setdefault(name, config.get(name))
    return config, generation
