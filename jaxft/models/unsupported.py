"""The error for an unsupported model_type, which names the parts of such models that jaxft lacks."""

import re
from collections.abc import Mapping
from typing import Any

from jaxft.models.dense_config import ACTIVATIONS
from jaxft.tree import nearest

RECURRENT = "state-space, recurrent, convolution or linear-attention layers"
# Parts that jaxft lacks. Each has two patterns: settings of config.json that show it (their value is not
# null, false, 0 or empty), and model types that have it, for a config.json that lacks these settings.
PARTS = {
    "an encoder next to its decoder": (
        r"is_encoder_decoder|(num_)?(encoder|decoder)_layers",
        r"m?t5.*|m?bart|pegasus.*|whisper",
    ),
    "parts for images, audio or video": (
        r"(vision|audio|image|speech|text|thinker|talker|vit|vq|vqgan|backbone)_(tower_)?config"
        r"|(image|audio|video)_token_(id|index)|mm_vision_tower",
        r".*_vl(_moe)?|.*llava.*|idefics.*|voxtral|.*vision.*|.*multimodal|.*_omni|mllama|pixtral|paligemma",
    ),
    "mixture-of-experts layers": (
        r".*experts?|moe_.*|.*_moe_.*",
        r".*moe.*|mixtral|deepseek_v[23].*|gpt_oss|dbrx|jamba|llama4.*",
    ),
    RECURRENT: (
        r".*mamba_.*|mamba_.*|ssm_.*|state_size|conv_kernel|conv_L_cache|lru_width|linear_.*heads|.*recurrent_.*"
        r"|layers_block_type|block_types|qk_dim_factor",
        r".*mamba.*|jamba|rwkv.*|xlstm|lfm[23].*|zamba.*|bamba|falcon_h1|qwen3_(next|5.*)|recurrent_gemma"
        r"|.*hybrid|nemotron_h|minimax",
    ),
    "multi-head latent attention": (r"kv_lora_rank", r"deepseek_v[23]|minicpm3"),
    "an encoder with attention in both directions": (r"type_vocab_size", r".*bert.*"),
}
# Named only for a model that has none of PARTS.
LAYER_NORM = "layer norms with a mean"
LAYER_NORMS = re.compile(r"layer_?norm_eps(ilon)?|norm_epsilon|layernorm_epsilon")
OTHER_TYPES = {
    r"glm4?|helium|ernie4_5": "rope that rotates neighbouring dimensions",
    r"hunyuan_v1_dense": "norms of queries and keys after rope",
    r"ministral3": "queries that are scaled by their position",
    r"granite_swa": "attention sinks",
    r"diffllama": "differential attention",
    r"gemma3n_text|gemma4.*": "embeddings for each layer",
    r"gpt2|gpt_neox|gptj|opt|bloom|falcon|phi|stablelm|starcoder2|cohere2?|mpt|olmo": LAYER_NORM,
}
LAYER_KINDS = re.compile(r"linear_attention|.*conv|mamba.*|recurrent|gated_delta.*")  # of layer_types


def missing_parts(hf: Mapping[str, Any]) -> list[str]:
    """Return the parts of a config.json's model that jaxft lacks, as noun phrases; [] if its settings show
    none.
    """
    kind = str(hf.get("model_type"))
    shown = [name for name, value in _flat(hf) if value not in (None, False, 0, "", [], {})]
    found = [
        part
        for part, (settings, types) in PARTS.items()
        if re.fullmatch(types, kind) or any(re.fullmatch(settings, name) for name in shown)
    ]
    types = hf.get("layer_types")
    if (
        RECURRENT not in found
        and isinstance(types, list)
        and any(LAYER_KINDS.fullmatch(str(t)) for t in types)
    ):
        found.append(RECURRENT)
    return found or _other(hf, kind, shown)


def _other(hf: Mapping[str, Any], kind: str, shown: list[str]) -> list[str]:
    known = [part for types, part in OTHER_TYPES.items() if re.fullmatch(types, kind)]
    if not known and any(map(LAYER_NORMS.fullmatch, shown)):
        known = [LAYER_NORM]
    activation = hf.get("hidden_act")
    if not known and isinstance(activation, str) and activation not in ACTIVATIONS:
        known = [f"the activation {activation}"]
    return known


def _flat(hf: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the settings at the top level and those in attn_config and ffn_config."""
    inner = [hf.get(name) for name in ("attn_config", "ffn_config")]
    return [*hf.items(), *(item for group in inner if isinstance(group, Mapping) for item in group.items())]


def refusal(hf: Mapping[str, Any], implemented: list[str]) -> str:
    """Return the error for a config.json whose model_type is not one of those `implemented`."""
    kind, parts = hf.get("model_type"), missing_parts(hf)
    line = f"model_type {kind!r:.60} is not supported"
    if kind is None:
        line = "config: model_type is missing"
    elif parts:
        line += f": it has {' and '.join(parts)}"
    elif isinstance(kind, str):
        line += f" (near: {', '.join(nearest(kind, implemented))})"
    text = hf.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if inner in implemented:
        return (
            f"{line}; its text decoder ({inner}) is supported: save it as a model of its own with "
            "transformers, and load that"
        )
    return f"{line}; supported types: python scripts/help.py models"
