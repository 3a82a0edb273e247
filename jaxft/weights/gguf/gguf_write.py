"""Write a model, or only an adapter, as a GGUF file for llama.cpp and programs built on it.

A written file is checked for what llama.cpp would compute from it: llama.cpp ignores some metadata keys, even
some that its converter writes, while jaxft's reader (gguf_config, gguf_rope) uses all. Sources are
llama.cpp's src/llama-model.cpp, src/llama-context.cpp and src/models/, and ggml's rope_yarn;
tests/weights/gguf/test_gguf_runtime.py compares log-probs with llama.cpp's runtime.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.models import model_types
from jaxft.models.dense_config import DenseConfig
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import pairs_by_path
from jaxft.nn.rope import USED, Rope, attention_scaling, frequencies
from jaxft.nn.tree import Params
from jaxft.weights.gguf.gguf_architectures import (
    ALWAYS_READ,
    ARCHITECTURES,
    FREQUENCIES,
    LONG,
    ROPE_TABLES,
    SHORT,
    WINDOW,
    Architecture,
    StoredAs,
    gguf_name,
    stored_as,
)
from jaxft.weights.gguf.gguf_config import architecture_for, config_fields, context_notes, gguf_config
from jaxft.weights.gguf.gguf_file import (
    FLOAT_TYPES,
    Field,
    GgufHeader,
    GgufTensorToWrite,
    metadata_bytes,
    read_gguf_header,
    unwritable,
    write_gguf_file,
)
from jaxft.weights.gguf.gguf_quantize import MIXTURES, WRITTEN_TYPES, MixtureModel, tensor_bytes, tensor_kind
from jaxft.weights.gguf.gguf_tensors import raw_bytes, read_dequantised
from jaxft.weights.gguf.gguf_tokenizer import tokenizer_fields, tokenizer_notes
from jaxft.weights.hf import hf_write
from jaxft.weights.hf.safetensors import TensorToWrite
from jaxft.weights.peft.peft_write import pair_tensors
from jaxft.weights.tensors import tensors_of

QUANTISATION_VERSION = 2  # of llama.cpp's block layouts
LORA_PAIR = {"a", "b", "scale"}
MERGE_INSTEAD = "merge it instead, with --gguf and without --adapter-only"
ALWAYS_TIED, NEVER_TIED = ("gemma", "gemma2"), ("olmo2",)  # architectures, by llama.cpp's rule for the head
HEADS_OF_WIDTH = ("phi3", "olmo2")  # architectures whose heads together have the model's width in llama.cpp
# Settings that do not change the arithmetic, or follow from the tensors. Ropes are compared as numbers.
COMPARED_ELSEWHERE = {
    "architectures", "model_type", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling",
    "rope_parameters", "rope_local_base_freq", "original_max_position_embeddings", "partial_rotary_factor",
    "max_position_embeddings", "initializer_range", "use_cache", "tie_word_embeddings",
}  # fmt: skip
WINDOW_SETTINGS = {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"}
NEUTRAL: tuple[Any, ...] = (None, False, 1, 1.0, [], ())  # values of a setting that one of two families lacks


@dataclass(frozen=True)
class GgufOptions:
    """Options of writing a GGUF file.

    mixture: a name of gguf_quantize.MIXTURES. name: the model's name, for listings. ends: token ids that end
    a completion. license: the model's license, "" if unknown. source: the GGUF file that the model was loaded
    from; None if it was loaded from other files. changed: Hugging Face names of the tensors whose values
    differ from the source; the bytes of all others are copied if the type is the same. keep: use the types
    and the metadata of the source instead of the mixture's types and new metadata. importances: by Hugging
    Face name of a weight, the weights [inputs] of its rounding errors.
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
    """Write a model, with adapters already merged, as a GGUF file.

    base: the tree of base weights, LazyTensors or arrays, which are read as float32. Raises ValueError, and
    leaves no file, for a model or a tokenizer that GGUF cannot express, and for weights that are not finite.
    """
    config, source = model.config, options.source
    name = source.architecture if source and options.keep else architecture_for(config)
    of_config, tables = config_fields(config)
    if source and options.keep:
        fields = _kept_fields(source)
    else:
        fields = [
            *_general_fields(options),
            *of_config,
            *tokenizer_fields(tokenizer, config.vocab, options.ends),
        ]
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
    """Write an adapter's pairs as a GGUF file for llama.cpp's --lora and Ollama's ADAPTER. Return the number
    of pairs.

    The layout is llama.cpp's (convert_lora_to_gguf.py), read by its src/llama-adapter.cpp: for a weight W of
    the base, W.lora_a [R, in] and W.lora_b [out, R], and W + alpha / R * lora_b @ lora_a.

    kind: F32, F16 or BF16. architecture: of the base's GGUF file, None for the one that jaxft writes. Raises
    ValueError, and leaves no file, for an adapter that llama.cpp cannot apply.
    """
    if kind not in FLOAT_TYPES:
        raise ValueError(f"--gguf {kind}: an adapter alone is written as {', '.join(FLOAT_TYPES)}; use F16")
    architecture, pairs = architecture or architecture_for(model.config), pairs_by_path(adapter)
    if not pairs:
        raise ValueError(f"{path}: the adapter has no pairs to write; name a LoRA adapter")
    table = tensors_of(model)
    for weight, pair in pairs.items():
        if set(pair) != LORA_PAIR or weight not in table or not table[weight][0].transposed:
            raise ValueError(
                f"adapter of {weight} has {', '.join(sorted(pair))}: llama.cpp applies only pairs a and b "
                f"of linear layers and of a head that is not tied to the embeddings; {MERGE_INSTEAD}"
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
    """Return a tensor as bytes of GGUF type `kind`. stored: from stored_as. importance: see tensor_bytes."""
    values = np.asarray(tensor.fetch(), np.float32)
    values = values + np.float32(1) if stored.plus_one else values
    values = permute_heads(values, stored.heads) if stored.heads else values
    return tensor_bytes(values, kind, importance)


def _kept_fields(source: GgufHeader) -> list[Field]:
    """Return the metadata to copy: all but architecture, alignment and the keys of split files."""
    layout = ("general.architecture", "general.alignment")
    return [
        Field(key, "RAW", raw)
        for key, raw in metadata_bytes(source.path).items()
        if key not in layout and not key.startswith("split.")
    ]


def _kept_kind(source: GgufHeader, name: str, changed: bool) -> str:
    """Return a tensor's type in the source file (a new head gets the embedding's), if it can be written."""
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
    """Order the rows of q or k as llama.cpp does: dimensions that rope rotates together are neighbours."""
    rows = len(weight)
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


# The check of written files


class RopeNumbers(NamedTuple):
    """The numbers that define a rope. short, long: frequencies [rotated dimensions / 2] for texts of up to
    `original` tokens and for longer texts. scale: the factor on cos and sin.
    """

    short: np.ndarray
    long: np.ndarray
    original: int
    scale: float


def check_config(path: Path, config: DenseConfig, tied: bool, source: GgufHeader | None = None) -> list[str]:
    """Raise ValueError unless llama.cpp computes a written file as jaxft computes a model of this config.

    tied: whether the head is the embedding; config.tied may differ after an adapter changed the head. source:
    the file whose metadata were copied; settings that llama.cpp ignores in it too are returned as a warning.
    """
    header = read_gguf_header(path)
    name, lacking = header.architecture, _differences(config, header)
    before = _differences(config, source) if source else []
    new = [setting for setting in lacking if setting not in before]
    if new:
        raise unwritable(
            f"this model cannot be written as GGUF: llama.cpp's architecture {name} lacks {', '.join(new)}"
        )
    if name in (NEVER_TIED if tied else ALWAYS_TIED):
        actual, expected = ("tied", "untied") if tied else ("untied", "tied")
        raise unwritable(
            f"this model cannot be written as GGUF: its input and output embeddings are {actual}, but "
            f"{expected} in llama.cpp's architecture {name}"
        )
    if name in HEADS_OF_WIDTH and config.heads * config.head_dim != config.width:
        raise unwritable(
            f"{config.heads} heads of {config.head_dim} cannot be written as GGUF of architecture {name}: "
            f"llama.cpp expects that they make up the width of {config.width}"
        )
    return [f"warning: llama.cpp ignores {', '.join(lacking)}, in the source file too"] if lacking else []


def _differences(config: DenseConfig, header: GgufHeader) -> list[str]:
    """Return as name=value the settings of a config that llama.cpp ignores or reads otherwise in a file."""
    architecture = ARCHITECTURES[header.architecture]
    seen = _as_llama_cpp_reads(header)
    hf = gguf_config(  # without scaling of rope, which is compared by its numbers
        replace(
            seen,
            metadata={key: x for key, x in seen.metadata.items() if ".rope.scaling." not in key},
            tensors={name: x for name, x in seen.tensors.items() if name not in ROPE_TABLES},
        )
    )
    ours, theirs = (
        {key: value for key, value in model_types.config_to_hf(c).items() if key not in COMPARED_ELSEWHERE}
        for c in (config, model_types.family_of(hf).from_hf(hf))
    )
    if (
        WINDOW not in architecture.reads
        and (ours.get("sliding_window") or 0) >= hf["max_position_embeddings"]
    ):
        ours = {key: value for key, value in ours.items() if key not in WINDOW_SETTINGS}
        theirs = {key: value for key, value in theirs.items() if key not in WINDOW_SETTINGS}
    wrong = []
    for key in sorted(ours.keys() | theirs.keys()):
        if key in ours and key in theirs:
            same = _equal(ours[key], theirs[key])
        else:
            same = (ours[key] if key in ours else theirs[key]) in NEUTRAL or key == "layer_types"
        wrong += [] if same else [f"{key}={ours.get(key)!r:.60}"]
    for name, numbers in _ropes(seen, architecture, config.head_dim).items():
        rope = vars(config).get(name)
        if rope is not None and not _same_rope(rope, config.head_dim, numbers):
            settings = [f"{key}={getattr(rope, key)!r:.60}" for key in ("theta", *USED[rope.kind])]
            wrong.append(f"{name} of type {rope.kind!r} with {', '.join(settings)}")
    return wrong


def _as_llama_cpp_reads(header: GgufHeader) -> GgufHeader:
    """Return a header without the metadata and rope tables that llama.cpp ignores for its architecture."""
    prefix, architecture = f"{header.architecture}.", ARCHITECTURES[header.architecture]
    known = {prefix + key for key in ALWAYS_READ | architecture.reads}
    metadata = {key: x for key, x in header.metadata.items() if not key.startswith(prefix) or key in known}
    refused = set(ROPE_TABLES) - set(architecture.tables)
    return replace(
        header,
        metadata=metadata,
        tensors={name: tensor for name, tensor in header.tensors.items() if name not in refused},
    )


def _ropes(header: GgufHeader, architecture: Architecture, head_dim: int) -> dict[str, RopeNumbers]:
    """Return llama.cpp's ropes: "rope", and "local_rope" if layers with windows have another theta."""

    def number(name: str, default: float) -> float:
        return header.optional(header.key(name), default)

    length = header.required(header.key("context_length"), int)
    original = header.optional(header.key("rope.scaling.original_context_length"), length)
    dims = header.optional(header.key("rope.dimension_count"), head_dim)
    kind = header.optional(header.key("rope.scaling.type"), "linear")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if kind == "none" else factor
    theta, scale = number("rope.freq_base", 10000.0), number("rope.scaling.attn_factor", 1.0)
    local_scale = scale if architecture.local_attn_factor else 1.0
    divided = np.ones(dims // 2)  # how much of each frequency is divided by the factor
    if kind == "yarn":
        turns = (number("rope.scaling.yarn_beta_fast", 32.0), number("rope.scaling.yarn_beta_slow", 1.0))
        low, high = (dims * math.log(original / (2 * math.pi * x)) / (2 * math.log(theta)) for x in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dims - 1)
        divided = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
        growth = 0.1 * math.log(max(factor, 1.0))
        scale *= (1 + growth) / (1 + growth * number("rope.scaling.yarn_log_multiplier", 0.0))
    exponents = -np.arange(0, dims, 2) / dims
    freqs = theta**exponents * (divided / factor + 1 - divided)
    longrope = kind == "longrope" or FREQUENCIES not in architecture.tables
    tables = [header.tensors.get(name) for name in ((SHORT, LONG) if longrope else (FREQUENCIES,) * 2)]
    short, long = (freqs if table is None else freqs / read_dequantised(table) for table in tables)
    ropes = {"rope": RopeNumbers(short, long, original, scale)}
    if architecture.local_theta:
        local = number(architecture.local_theta, 10000.0) ** exponents
        ropes["local_rope"] = RopeNumbers(local, local, original, local_scale)
    return ropes


def _same_rope(rope: Rope, head_dim: int, numbers: RopeNumbers) -> bool:
    longrope = rope.kind == "longrope"
    long = replace(rope, short_factor=rope.long_factor) if longrope else rope
    expected = RopeNumbers(
        frequencies(rope, head_dim),
        frequencies(long, head_dim),
        (rope.original_max_positions or 0) if longrope else numbers.original,
        attention_scaling(rope),
    )
    pairs: Any = zip(numbers, expected, strict=True)
    return all(np.shape(x) == np.shape(y) and np.allclose(x, y, rtol=1e-5, atol=0) for x, y in pairs)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
