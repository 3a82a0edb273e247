"""The configuration in a GGUF file's metadata, as the dict of a config.json.

A value that a file does not state is the one that llama.cpp assumes for its architecture (src/models/), next
to the line that uses it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxft.weights.gguf.gguf_architectures import architecture_of, head_count, kv_head_count
from jaxft.weights.gguf.gguf_header import GgufHeader
from jaxft.weights.gguf.gguf_rope import ROPE_METADATA, rope_parameters, rope_scaling, rope_theta, shortest
from jaxft.weights.gguf.gguf_tokenizer import special_token_id

# Metadata of every architecture: what is read here or says nothing about the arithmetic. Others are refused,
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
    "attention.sliding_window": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that several settings follow from. rotated: head dimensions that rope turns."""

    layers: int
    width: int
    heads: int
    head_dim: int
    rotated: int


@dataclass(frozen=True)
class GgufSettings:
    """The metadata that an architecture reads besides KNOWN_METADATA.

    read: returns its settings for config.json. metadata: the keys of that. partial_rope: whether rope may
    turn some of a head's dimensions only.
    """

    read: Callable[[GgufHeader, Sizes], dict[str, Any]]
    metadata: frozenset[str] = frozenset()
    partial_rope: bool = False


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the metadata as the dict of a config.json. Raises ValueError for what would change the
    arithmetic in a way that no config.json of the architecture states.
    """
    architecture, settings = architecture_of(header), SETTINGS[header.architecture]
    _check_metadata(header, settings)
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{header.path}: tensor token_embd.weight is missing")
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
            f"{len(header.tensors)} tensors; is the download complete?"
        )
    heads = head_count(header)
    head_dim = header.optional(header.key("attention.key_length"), width // heads)
    values = header.optional(header.key("attention.value_length"), head_dim)
    rotated = header.optional(header.key("rope.dimension_count"), head_dim)
    if values != head_dim or not (rotated == head_dim or (settings.partial_rope and 0 < rotated < head_dim)):
        what = f"rope rotates {rotated}" if values == head_dim else f"values have {values}"
        raise ValueError(f"{header.path}: {what} of {head_dim} head dimensions, which is not supported")
    return Sizes(layers, width, heads, head_dim, rotated)


def _number(header: GgufHeader, name: str, default: float) -> float:
    return shortest(header.optional(header.key(name), default))


def _one_rope(header: GgufHeader, sizes: Sizes, **others: Any) -> dict[str, Any]:
    return {"rope_theta": rope_theta(header), "rope_scaling": rope_scaling(header, sizes.rotated), **others}


def _window(header: GgufHeader, default: int = 0) -> int | None:
    """Return how many keys a windowed layer sees, None without windows, which some files state as 0."""
    return header.optional(header.key("attention.sliding_window"), default) or None


def _layer_types(header: GgufHeader, sizes: Sizes, period: int) -> list[str]:
    """Return config.json's layer_types. The pattern in the metadata is a period, whose last layer sees all
    keys, or tells for each layer whether it has a window (llama_hparams::set_swa_pattern).
    """
    key = header.key("attention.sliding_window_pattern")
    if isinstance(header.metadata.get(key), list):
        windowed = header.array(key, bool) or []
        if len(windowed) != sizes.layers:
            raise ValueError(
                f"{header.path}: metadata {key} has {len(windowed)} entries for {sizes.layers} layers"
            )
    else:
        period = header.optional(key, period)
        if period < 1:
            raise ValueError(f"{header.path}: metadata {key} must be above 0, got {period}")
        windowed = [layer % period < period - 1 for layer in range(sizes.layers)]
    return ["sliding_attention" if window else "full_attention" for window in windowed]


def _llama(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Mistral's files are of architecture llama too; only a window tells them apart."""
    window = _window(header)
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return _one_rope(header, sizes, **(mistral if window else {}))


def _query_scale(sizes: Sizes, layers_of_27b: int) -> dict[str, Any]:
    """Return Gemma's query_pre_attn_scalar, which files do not state: the width of a head, but width / heads
    in the 27B models, which llama.cpp recognises by their number of layers.
    """
    is_27b = sizes.layers == layers_of_27b
    return {"query_pre_attn_scalar": sizes.width // sizes.heads if is_27b else sizes.head_dim}


def _gemma2(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Windows of 4096 in every other layer, first in layer 0; soft caps 50 and 30 (gemma2.cpp, hparams)."""
    return {
        **_one_rope(header, sizes),
        **_query_scale(sizes, layers_of_27b=46),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": _window(header, 4096),
        "layer_types": _layer_types(header, sizes, period=2),
        "attn_logit_softcapping": _number(header, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _number(header, "final_logit_softcapping", 30.0),
    }


def _gemma3(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Windows in five of six layers, whose rope has theta 10000 and no scaling (gemma3.cpp)."""
    window = _window(header)
    period = 6 if window else 1
    return {
        **_query_scale(sizes, layers_of_27b=62),
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": _layer_types(header, sizes, period),
        "rope_parameters": {
            "full_attention": rope_parameters(header, sizes.rotated),
            "sliding_attention": _default_rope(rope_theta(header, "rope.freq_base_swa")),
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": _number(header, "final_logit_softcapping", 0.0) or None,
    }


def _default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _phi3(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """The length before scaling is a setting of its own in Phi-3's config.json."""
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
    """No rope in every fourth layer (n_no_rope_layer_step in llama.cpp)."""
    return {
        **_one_rope(header, sizes),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(sizes.layers)],
        "use_sliding_window": False,
    }


def _olmo2(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """OLMo 3's files are of architecture olmo2 too; a window tells them apart: in three of four layers, whose
    rope has no scaling (olmo2.cpp).
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
            "sliding_attention": _default_rope(rope_theta(header, "rope.freq_base_swa", theta)),
        },
    }


def _granite(header: GgufHeader, sizes: Sizes) -> dict[str, Any]:
    """Scales of 0 are not applied (granite.cpp); rope.scaling.finetuned=false switches rope off."""
    if not header.optional(header.key("rope.scaling.finetuned"), True):
        raise ValueError(
            f"{header.path}: metadata {header.key('rope.scaling.finetuned')} is false, which means a Granite "
            "without rope; it is not supported"
        )
    return {
        **_one_rope(header, sizes),
        "attention_multiplier": _number(header, "attention.scale", 0.0) or sizes.head_dim**-0.5,
        "embedding_multiplier": _number(header, "embedding_scale", 0.0) or 1.0,
        "residual_multiplier": _number(header, "residual_scale", 0.0) or 1.0,
        "logits_scaling": shortest(header.required(header.key("logit_scale"), float)),
    }


WINDOWS = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
LOCAL_ROPE = frozenset({"rope.freq_base_swa"})
CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
GRANITE_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
SETTINGS = {  # by general.architecture
    "llama": GgufSettings(_llama, frozenset({"attention.sliding_window"})),
    "mistral3": GgufSettings(partial(_one_rope, sliding_window=None)),
    "qwen2": GgufSettings(partial(_one_rope, use_sliding_window=False)),
    "qwen3": GgufSettings(partial(_one_rope, use_sliding_window=False)),
    "gemma": GgufSettings(partial(_one_rope, hidden_act="gelu_pytorch_tanh")),
    "gemma2": GgufSettings(_gemma2, WINDOWS | CAPS),
    "gemma3": GgufSettings(_gemma3, WINDOWS | LOCAL_ROPE | {"final_logit_softcapping"}),
    "phi3": GgufSettings(_phi3, frozenset({"attention.sliding_window"}), partial_rope=True),
    "smollm3": GgufSettings(_smollm3),
    "olmo2": GgufSettings(_olmo2, WINDOWS | LOCAL_ROPE),
    "granite": GgufSettings(_granite, GRANITE_SCALES),
}
