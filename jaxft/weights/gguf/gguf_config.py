"""The configuration in a GGUF file's metadata, read as the dict of a config.json, and written.

For a value that a file does not state, jaxft uses the default of llama.cpp for the architecture
(src/models/); it is next to the line that needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxft.models import model_types
from jaxft.models.dense_config import DenseConfig
from jaxft.models.families.llama import MistralConfig
from jaxft.models.model import ModelConfig
from jaxft.nn.rope import Rope, rotated_dims
from jaxft.weights.gguf.gguf_architectures import (
    ARCHITECTURES,
    CAPS,
    FINAL_CAP,
    GRANITE_SCALES,
    LOCAL_THETA,
    WINDOW,
    WINDOWS,
    architecture_of,
    head_count,
    kv_head_count,
)
from jaxft.weights.gguf.gguf_file import Field, GgufHeader
from jaxft.weights.gguf.gguf_rope import (
    ROPE_METADATA,
    decimal_field,
    float_field,
    rope_fields,
    rope_parameters,
    rope_scaling,
    rope_theta,
    shortest,
)
from jaxft.weights.gguf.gguf_tokenizer import special_token_id

# Metadata of every architecture that is read here or does not change the arithmetic. Others are refused,
# because llama.cpp runs several variants of an architecture under one name.
KNOWN_METADATA = ROPE_METADATA | {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "tensor_data_layout",
}  # fmt: skip
NEUTRAL_METADATA: dict[str, Any] = {  # values with which the model is the plain architecture
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    WINDOW: 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}

ARCHITECTURE_OF = {spec.model_type: name for name, spec in ARCHITECTURES.items() if name != "mistral3"} | {
    "mistral": "llama",
    "olmo3": "olmo2",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that several settings depend on. rotated: dimensions of a head that rope rotates."""

    layers: int
    width: int
    heads: int
    head_dim: int
    rotated: int


@dataclass(frozen=True)
class GgufSettings:
    """How the settings of one architecture are read from and written to GGUF metadata.

    read(header, sizes): returns settings for config.json. metadata: keys that `read` reads in addition to
    KNOWN_METADATA. partial_rope: whether rope may rotate only some of a head's dimensions. write: functions
    of (architecture, config.json) that return metadata.
    """

    read: Callable[[GgufHeader, Sizes], dict[str, Any]]
    metadata: frozenset[str] = frozenset()
    partial_rope: bool = False
    write: tuple[Callable[[str, dict[str, Any]], list[Field]], ...] = ()


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the metadata as the dict of a config.json. Raises ValueError for metadata that may change what
    the model computes and that config.json cannot express for this architecture.
    """
    architecture, settings = architecture_of(header), SETTINGS[header.architecture]
    _check_metadata(header, settings)
    if "token_embd.weight" not in header.tensors:
        raise ValueError(
            f"{header.path}: tensor token_embd.weight is missing; use a GGUF file of a language model"
        )
    sizes = _sizes(header, settings)
    ends = (special_token_id(header, name) for name in ("eos", "eot", "eom"))
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": kv_head_count(header),
        "head_dim": sizes.head_dim,
        "intermediate_size": header.required(header.key("feed_forward_length"), int),
        "max_position_embeddings": header.required(header.key("context_length"), int),
        "rms_norm_eps": shortest(header.required(header.key("attention.layer_norm_rms_epsilon"), float)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": special_token_id(header, "bos"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": special_token_id(header, "pad"),
        **settings.read(header, sizes),
    }


def _check_metadata(header: GgufHeader, settings: GgufSettings) -> None:
    known = KNOWN_METADATA | settings.metadata
    for name, value in header.metadata.items():
        key = name.removeprefix(f"{header.architecture}.")
        neutral = key in known or (key in NEUTRAL_METADATA and value == NEUTRAL_METADATA[key])
        if name != key and not neutral:
            raise ValueError(
                f"{header.path}: metadata {name[:60]}={str(value)[:60]!r} is not supported, because it may "
                "change what the model computes; use the model's Hugging Face folder"
            )


def _sizes(header: GgufHeader, settings: GgufSettings) -> Sizes:
    layers, width = (header.required(header.key(name), int) for name in ("block_count", "embedding_length"))
    if layers > len(header.tensors):
        raise ValueError(
            f"{header.path}: metadata {header.key('block_count')} is {layers}, but the file has only "
            f"{len(header.tensors)} tensors; it is probably incomplete; download it again"
        )
    heads = head_count(header)
    head_dim = header.optional(header.key("attention.key_length"), width // heads)
    values = header.optional(header.key("attention.value_length"), head_dim)
    rotated = header.optional(header.key("rope.dimension_count"), head_dim)
    if values != head_dim or not (rotated == head_dim or (settings.partial_rope and 0 < rotated < head_dim)):
        what = f"rope rotates {rotated}" if values == head_dim else f"values have {values}"
        raise ValueError(
            f"{header.path}: {what} of {head_dim} head dimensions, which is not supported; "
            "use the model's Hugging Face folder"
        )
    return Sizes(layers, width, heads, head_dim, rotated)


def _one_rope(header: GgufHeader, sizes: Sizes, **others: Any) -> dict[str, Any]:
    return {"rope_theta": rope_theta(header), "rope_scaling": rope_scaling(header, sizes.rotated), **others}


def _window(header: GgufHeader, default: int = 0) -> int | None:
    """Return the number of keys in a layer's window; None without windows, which some files state as 0."""
    return header.optional(header.key(WINDOW), default) or None


def _layer_types(header: GgufHeader, sizes: Sizes, period: int) -> list[str]:
    """Return config.json's layer_types. The metadata either list whether each layer has a window, or state a
    period (by default `period`): then the last layer of each period has full attention, and all others have
    windows (llama_hparams::set_swa_pattern).
    """
    key = header.key("attention.sliding_window_pattern")
    if isinstance(header.metadata.get(key), list):
        windowed = header.array(key, bool) or []
        if len(windowed) != sizes.layers:
            raise ValueError(
                f"{header.path}: metadata {key} has {len(windowed)} entries for {sizes.layers} layers; "
                "use the model's Hugging Face folder"
            )
    else:
        period = header.optional(key, period)
        if period < 1:
            raise ValueError(
                f"{header.path}: metadata {key} must be above 0, got {period}; "
                "use the model's Hugging Face folder"
            )
        windowed = [layer % period < period - 1 for layer in range(sizes.layers)]
    return ["sliding_attention" if window else "full_attention" for window in windowed]


def _llama(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read Llama's settings, or Mistral's if there is a window: both have the architecture llama."""
    window = _window(header)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return _one_rope(header, sizes, **(mistral if window else {}))


def _query_scale(sizes: Sizes, layers_of_27b: int) -> dict[str, Any]:
    """Return Gemma's query_pre_attn_scalar, which files do not state: width / heads in the 27B models, which
    are recognised by their number of layers, as in llama.cpp; head_dim in all others.
    """
    is_27b = sizes.layers == layers_of_27b
    return {"query_pre_attn_scalar": sizes.width // sizes.heads if is_27b else sizes.head_dim}


def _gemma2(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read Gemma 2's settings: windows of 4096 in even layers, soft caps 50 and 30 (gemma2.cpp, hparams)."""
    return {
        **_one_rope(header, sizes),
        **_query_scale(sizes, layers_of_27b=46),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": _window(header, 4096),
        "layer_types": _layer_types(header, sizes, period=2),
        "attn_logit_softcapping": decimal_field(header, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": decimal_field(header, "final_logit_softcapping", 30.0),
    }


def _gemma3(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read Gemma 3's settings: windows in five of six layers, where rope is not scaled (gemma3.cpp)."""
    window = _window(header)
    period = 6 if window else 1
    return {
        **_query_scale(sizes, layers_of_27b=62),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": _layer_types(header, sizes, period),
        "rope_parameters": {
            "full_attention": rope_parameters(header, sizes.rotated),
            "sliding_attention": _default_rope(rope_theta(header, LOCAL_THETA)),
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": decimal_field(header, "final_logit_softcapping", 0.0) or None,
    }


def _default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _phi3(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read Phi-3's settings; its config.json has original_max_position_embeddings outside rope_scaling."""
    length = header.required(header.key("context_length"), int)
    original = header.optional(header.key("rope.scaling.original_context_length"), length)
    scaling = rope_scaling(header, sizes.rotated)
    if scaling:
        scaling.pop("original_max_position_embeddings", None)
    return {
        "rope_theta": rope_theta(header),
        "rope_scaling": scaling,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": sizes.rotated / sizes.head_dim,
        "sliding_window": _window(header),
    }


def _smollm3(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read SmolLM3's settings; every fourth layer has no rope (n_no_rope_layer_step in llama.cpp)."""
    return {
        **_one_rope(header, sizes),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(sizes.layers)],
        "use_sliding_window": False,
    }


def _olmo2(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read OLMo 2's settings, or OLMo 3's if there is a window: both have the architecture olmo2. OLMo 3 has
    windows in three of four layers, whose rope is not scaled (olmo2.cpp).
    """
    window = _window(header)
    if window is None:
        return _one_rope(header, sizes)
    theta = rope_theta(header)
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(header, sizes, period=4),
        "rope_parameters": {
            "full_attention": rope_parameters(header, sizes.rotated),
            "sliding_attention": _default_rope(rope_theta(header, LOCAL_THETA, theta)),
        },
    }


def _granite(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Read Granite's settings. A multiplier that is missing or 0 becomes 1, for attention head_dim**-0.5.
    Raises ValueError for rope.scaling.finetuned=false, which means no rope.
    """
    if not header.optional(header.key("rope.scaling.finetuned"), True):
        raise ValueError(
            f"{header.path}: metadata {header.key('rope.scaling.finetuned')} is false, which means a Granite "
            "without rope; it is not supported; use the model's Hugging Face folder"
        )
    return {
        **_one_rope(header, sizes),
        "attention_multiplier": decimal_field(header, "attention.scale", 0.0) or sizes.head_dim**-0.5,
        "embedding_multiplier": decimal_field(header, "embedding_scale", 0.0) or 1.0,
        "residual_multiplier": decimal_field(header, "residual_scale", 0.0) or 1.0,
        "logits_scaling": shortest(header.required(header.key("logit_scale"), float)),
    }


# Writing


def architecture_for(config: ModelConfig) -> str:
    """Return the GGUF architecture of a model. Raises ValueError if jaxft writes none for its family."""
    kind = model_types.config_to_hf(config)["model_type"]
    if kind not in ARCHITECTURE_OF:
        raise ValueError(
            f"{kind} models cannot be written as GGUF; jaxft writes {', '.join(sorted(ARCHITECTURE_OF))}. "
            "Write a Hugging Face folder, without --gguf, and convert it with llama.cpp's converter"
        )
    rope = config.rope if isinstance(config, MistralConfig) else Rope()
    if (rope.beta_fast, rope.beta_slow) != (Rope.beta_fast, Rope.beta_slow):
        return "mistral3"  # which alone reads YaRN's betas
    return ARCHITECTURE_OF[kind]


def config_fields(config: ModelConfig) -> tuple[list[Field], dict[str, np.ndarray]]:
    """Return (metadata that states a model's architecture, tables of rope divisors by tensor name). Raises
    ValueError for a model that jaxft cannot write as GGUF.
    """
    if not isinstance(config, DenseConfig):
        raise TypeError(f"expected a DenseConfig, got {type(config).__name__}")
    name, hf = architecture_for(config), model_types.config_to_hf(config)
    sizes = {
        "vocab_size": config.vocab,
        "context_length": _exact_context(name, config),
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.mlp,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": rotated_dims(config.rope, config.head_dim),
    }
    fields = [Field(f"{name}.{key}", "UINT32", value) for key, value in sizes.items()]
    fields.append(float_field(name, "attention.layer_norm_rms_epsilon", config.norm_eps))
    rope, tables = rope_fields(name, config)
    special = [field for part in SETTINGS[name].write for field in part(name, hf)]
    return [*fields, *rope, *special], tables


def context_notes(config: ModelConfig) -> list[str]:
    """Return warnings if llama.cpp computes the same log-probs as jaxft only for texts up to some length, or
    only with some context size.
    """
    assert isinstance(config, DenseConfig)  # checked by config_fields
    name, rope, notes = architecture_for(config), config.rope, []
    exact, original = _exact_context(name, config), rope.original_max_positions or 0
    if exact < config.max_positions:
        notes.append(
            f"warning: llama.cpp's architecture {name} ignores the sliding window: the file's context length "
            f"is set to {exact}, up to which log-probs are right (the model has {config.max_positions})"
        )
    if rope.kind == "longrope" and exact > original:
        notes.append(
            f"warning: llama.cpp chooses LongRoPE's factors by its context size: run it with -c {original} "
            f"for texts up to {original} tokens, and with a larger one for longer texts"
        )
    return notes


def _window_fields(name: str, hf: dict[str, Any]) -> list[Field]:
    window = hf.get("sliding_window")
    return [Field(f"{name}.attention.sliding_window", "UINT32", window)] if window else []


def _pattern_fields(name: str, hf: dict[str, Any], period: int) -> list[Field]:
    """Return the metadata that states which layers have windows; [] without windows, or if they are in all
    layers but each `period`-th, which is llama.cpp's default for the architecture. hf: a config.json.
    """
    windowed = [kind == "sliding_attention" for kind in hf["layer_types"]]
    if not hf.get("sliding_window") or windowed == [i % period < period - 1 for i in range(len(windowed))]:
        return []
    return [Field(f"{name}.attention.sliding_window_pattern", "BOOL", windowed)]


def _local_theta_fields(name: str, hf: dict[str, Any]) -> list[Field]:
    theta = hf["rope_parameters"]["sliding_attention"]["rope_theta"]
    return [float_field(name, LOCAL_THETA, theta)]


def _caps_fields(name: str, hf: dict[str, Any]) -> list[Field]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return [float_field(name, cap, hf[cap]) for cap in caps if hf.get(cap)]


def _phi3_fields(name: str, hf: dict[str, Any]) -> list[Field]:
    fields = [Field(f"{name}.attention.sliding_window", "UINT32", hf.get("sliding_window") or 0)]
    if not hf.get("rope_scaling"):
        key = f"{name}.rope.scaling.original_context_length"
        fields.append(Field(key, "UINT32", hf["max_position_embeddings"]))
    return fields


def _olmo2_fields(name: str, hf: dict[str, Any]) -> list[Field]:
    if hf["model_type"] != "olmo3":
        return []
    return [*_window_fields(name, hf), *_pattern_fields(name, hf, 4), *_local_theta_fields(name, hf)]


def _granite_fields(name: str, hf: dict[str, Any]) -> list[Field]:
    return [
        float_field(name, "attention.scale", hf["attention_multiplier"]),
        float_field(name, "embedding_scale", hf["embedding_multiplier"]),
        float_field(name, "residual_scale", hf["residual_multiplier"]),
        float_field(name, "logit_scale", hf["logits_scaling"]),
    ]


def _exact_context(architecture: str, config: DenseConfig) -> int:
    """Return the length up to which llama.cpp computes the same as the model: the window if llama.cpp ignores
    windows in this architecture, else the model's context.
    """
    window = model_types.config_to_hf(config).get("sliding_window")
    if not window or WINDOW in ARCHITECTURES[architecture].reads:
        return config.max_positions
    return min(config.max_positions, window)


SETTINGS = {  # by general.architecture
    "llama": GgufSettings(_llama, frozenset({WINDOW}), write=(_window_fields,)),
    "mistral3": GgufSettings(partial(_one_rope, sliding_window=None)),
    "qwen2": GgufSettings(partial(_one_rope, use_sliding_window=False)),
    "qwen3": GgufSettings(partial(_one_rope, use_sliding_window=False)),
    "gemma": GgufSettings(partial(_one_rope, hidden_act="gelu_pytorch_tanh")),
    "gemma2": GgufSettings(
        _gemma2, WINDOWS | CAPS, write=(_window_fields, partial(_pattern_fields, period=2), _caps_fields)
    ),
    "gemma3": GgufSettings(
        _gemma3,
        WINDOWS | {LOCAL_THETA, FINAL_CAP},
        write=(_window_fields, partial(_pattern_fields, period=6), _local_theta_fields, _caps_fields),
    ),
    "phi3": GgufSettings(_phi3, frozenset({WINDOW}), partial_rope=True, write=(_phi3_fields,)),
    "smollm3": GgufSettings(_smollm3),
    "olmo2": GgufSettings(_olmo2, WINDOWS | {LOCAL_THETA}, write=(_olmo2_fields,)),
    "granite": GgufSettings(_granite, GRANITE_SCALES, write=(_granite_fields,)),
}
