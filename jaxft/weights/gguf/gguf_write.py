"""Write a model, or an adapter alone, as a GGUF file for llama.cpp and what is built on it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.adapters.lora import pairs_by_path
from jaxft.tree import Params
from jaxft.weights.gguf.gguf_architectures import ARCHITECTURES, StoredAs, gguf_name, stored_as
from jaxft.weights.gguf.gguf_config import architecture_for, config_fields, context_notes
from jaxft.weights.gguf.gguf_file import (
    FLOAT_TYPES,
    Field,
    GgufHeader,
    GgufTensorToWrite,
    metadata_bytes,
    write_gguf_file,
)
from jaxft.weights.gguf.gguf_llama_cpp import check_config
from jaxft.weights.gguf.gguf_quantize import MIXTURES, WRITTEN_TYPES, MixtureModel, tensor_bytes, tensor_kind
from jaxft.weights.gguf.gguf_tensors import raw_bytes
from jaxft.weights.gguf.gguf_tokenizer import tokenizer_fields, tokenizer_notes
from jaxft.weights.hf import hf_write
from jaxft.weights.hf.safetensors import TensorToWrite
from jaxft.weights.peft.peft_write import pair_tensors
from jaxft.weights.tensors import tensors_of

QUANTISATION_VERSION = 2  # of llama.cpp's block layouts
LORA_PAIR = {"a", "b", "scale"}
MERGE_INSTEAD = "merge it instead, with --gguf and without --adapter-only"


@dataclass(frozen=True)
class GgufOptions:
    """How a GGUF file is written.

    mixture: a name of gguf_quantize.MIXTURES. name: of the model, for listings. ends: token ids that end a
    completion. license: of the model, "" if unknown. source: the GGUF file that the model comes from, None
    for another model. changed: Hugging Face names of tensors whose values differ from it; of the others the
    bytes are copied where the type is the same. keep: keep the types and the metadata of the source instead
    of the mixture's types and new metadata. importances: of the inputs of weights by Hugging Face name, by
    which rounding errors are weighted.
    """

    mixture: str
    name: str
    ends: tuple[int, ...] = ()
    license: str = ""
    source: GgufHeader | None = None
    changed: frozenset[str] = frozenset()
    keep: bool = False
    importances: Mapping[str, np.ndarray] = field(default_factory=dict)


class Saved(NamedTuple):
    """The result of writing a file: the number of tensors of each type, and lines for the user."""

    counts: Counter[str]
    notes: list[str]


def save_gguf(path: Path, model: Model, base: Params, tokenizer: Any, options: GgufOptions) -> Saved:
    """Write a merged model.

    base: the tree of base weights, LazyTensors or arrays, which are read as float32. Raises ValueError, and
    leaves no file, for a model or a tokenizer that GGUF cannot express, and for weights that are not finite.
    """
    config, source = model.config, options.source
    name = source.architecture if source and options.keep else architecture_for(config)
    own, tables = config_fields(config)
    if source and options.keep:
        fields = _kept_fields(source)
    else:
        fields = [*_general_fields(options), *own, *tokenizer_fields(tokenizer, config.vocab, options.ends)]
    tied = "head" not in base
    weighted = bool(options.importances)
    mixed = MixtureModel(name, config.layers, config.heads, config.kv_heads, tied, weighted)
    tensors = []
    for table, values in tables.items():
        encode, read = partial(tensor_bytes, values, "F32"), source.tensors.get(table) if source else None
        if read is not None and (read.kind, read.shape) == ("F32", values.shape):
            encode = partial(raw_bytes, read)
        tensors.append(GgufTensorToWrite(table, "F32", values.shape, encode))
    for tensor in hf_write.tensors_to_write(base, model):
        gguf = gguf_name(name, tensor.name)
        stored = stored_as(ARCHITECTURES[name], tensor.name, config.heads, config.kv_heads)
        same = source.tensors.get(gguf) if source and tensor.name not in options.changed else None
        if source and options.keep:
            kind = _kept_kind(source, gguf, same is None)
        else:
            kind = tensor_kind(gguf, tensor.shape, options.mixture, mixed)
        encode = partial(encoded, tensor, stored, kind, options.importances.get(tensor.name))
        if same is not None and same.kind == kind and same.shape == tensor.shape:
            encode = partial(raw_bytes, same)
        tensors.append(GgufTensorToWrite(gguf, kind, tensor.shape, encode))

    notes = [] if source and options.keep else context_notes(config)

    def check(part: Path) -> None:
        notes.extend(check_config(part, config, tied, source if options.keep else None))
        notes.extend(tokenizer_notes(part, tokenizer))

    write_gguf_file(path, name, fields, tensors, check)
    return Saved(Counter(tensor.kind for tensor in tensors), notes)


def save_gguf_adapter(
    path: Path, model: Model, adapter: Params, kind: str, architecture: str | None = None
) -> int:
    """Write an adapter's pairs, for llama.cpp's --lora and Ollama's ADAPTER; return the number of weights.

    The layout is that of llama.cpp's convert_lora_to_gguf.py, read by its src/llama-adapter.cpp: for a weight
    W of the base, W.lora_a [R, in] and W.lora_b [out, R], and W + alpha / R * lora_b @ lora_a.

    kind: F32, F16 or BF16. architecture: of the base's GGUF file, None for the one that jaxft writes. Raises
    ValueError, and leaves no file, for an adapter that llama.cpp cannot apply.
    """
    if kind not in FLOAT_TYPES:
        raise ValueError(f"--gguf {kind}: an adapter alone is written as {', '.join(FLOAT_TYPES)}; use F16")
    architecture, pairs = architecture or architecture_for(model.config), pairs_by_path(adapter)
    if not pairs:
        raise ValueError(f"{path}: the adapter has no pairs to write")
    table = tensors_of(model)
    for weight, pair in pairs.items():
        if set(pair) != LORA_PAIR or weight not in table or not table[weight][0].transposed:
            raise ValueError(
                f"adapter of {weight}: llama.cpp's adapters have pairs a and b of linear layers, and no head "
                f"of its own for a tied embedding; this one has {', '.join(sorted(pair))}: {MERGE_INSTEAD}"
            )
    first = next(iter(pairs.values()))
    alpha = float(np.ravel(np.asarray(first["scale"], np.float32))[0]) * first["a"].shape[-1]
    fields = [
        Field("general.type", "STRING", "adapter"),
        Field("general.name", "STRING", path.stem),
        Field("general.file_type", "UINT32", MIXTURES[kind][0]),
        Field("adapter.type", "STRING", "lora"),
        Field("adapter.lora.alpha", "FLOAT32", alpha),
    ]
    tensors: list[GgufTensorToWrite] = []
    for weight, pair in pairs.items():
        rank = pair["a"].shape[-1]
        for tensor in table[weight]:
            name, heads = gguf_name(architecture, tensor.name), (model.config.heads, model.config.kv_heads)
            stored = stored_as(ARCHITECTURES[architecture], tensor.name, *heads)
            a, b = pair_tensors(tensor, pair, rank, alpha / rank)
            encode_a = partial(encoded, a, StoredAs(None, False), kind)
            encode_b = partial(encoded, b, stored, kind)
            tensors.append(GgufTensorToWrite(f"{name}.lora_a", kind, a.shape, encode_a))
            tensors.append(GgufTensorToWrite(f"{name}.lora_b", kind, b.shape, encode_b))
    write_gguf_file(path, architecture, fields, tensors, lambda part: None)
    return len(tensors) // 2


def encoded(
    tensor: TensorToWrite, stored: StoredAs, kind: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """Return the bytes of a tensor's values as llama.cpp stores them."""
    values = np.asarray(tensor.fetch(), np.float32)
    values = values + np.float32(1) if stored.plus_one else values
    values = permute_heads(values, stored.heads) if stored.heads else values
    return tensor_bytes(values, kind, importance)


def _kept_fields(source: GgufHeader) -> list[Field]:
    """Return the metadata of a file, without what is about its own layout."""
    layout = ("general.architecture", "general.alignment")
    return [
        Field(key, "RAW", raw)
        for key, raw in metadata_bytes(source.path).items()
        if key not in layout and not key.startswith("split.")
    ]


def _kept_kind(source: GgufHeader, name: str, changed: bool) -> str:
    """Return the type of a tensor in a file; of a head that was tied before, that of the embedding."""
    tensor = source.tensors.get(name) or source.tensors["token_embd.weight"]
    if changed and tensor.kind not in WRITTEN_TYPES:
        raise ValueError(
            f"{source.path}: tensor {name} has type {tensor.kind}, which jaxft does not write; use a type "
            "such as --gguf Q4_K_M instead of keep"
        )
    return tensor.kind


def _general_fields(options: GgufOptions) -> list[Field]:
    fields = [
        Field("general.type", "STRING", "model"),
        Field("general.name", "STRING", options.name),
        Field("general.file_type", "UINT32", MIXTURES[options.mixture][0]),
        Field("general.quantization_version", "UINT32", QUANTISATION_VERSION),
    ]
    return [*fields, Field("general.license", "STRING", options.license)] if options.license else fields


def permute_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of q or k as llama.cpp does: of each head, the two dimensions that rope rotates together
    are neighbours.
    """
    rows = len(weight)
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
