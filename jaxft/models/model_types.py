"""The family of each `model_type` in config.json: its config, builder and presets; and the error for a
model_type that is not supported, which names the parts of such models that jaxft lacks.

To add a family, write its file next to llama.py and add a row to FAMILIES.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxft.models.dense_config import ACTIVATIONS, DenseConfig
from jaxft.models.families import exaone, gemma, granite, llama, mistral, olmo, phi3, qwen, smollm3
from jaxft.models.model import Model, ModelConfig
from jaxft.tree import nearest


@dataclass(frozen=True)
class Family:
    """A family's functions and data.

    config: the class of its configs. from_hf, to_hf: parse the dict of a config.json and return one; from_hf
    raises ValueError for unsupported settings. build(config, **options of dense_model) -> Model. presets:
    configs by checkpoint name.
    """

    config: type
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    to_hf: Callable[[Any], dict[str, Any]]
    build: Callable[..., Model]
    presets: Mapping[str, ModelConfig]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        llama.LlamaConfig,
        llama.from_hf,
        llama.to_hf,
        llama.llama,
        llama.PRESETS,
    ),
    "mistral": Family(
        mistral.MistralConfig,
        mistral.mistral_from_hf,
        mistral.mistral_to_hf,
        mistral.mistral,
        mistral.MISTRAL_PRESETS,
    ),
    "ministral": Family(
        mistral.MistralConfig, mistral.ministral_from_hf, mistral.mistral_to_hf, mistral.mistral, {}
    ),
    "qwen2": Family(qwen.QwenConfig, qwen.qwen2_from_hf, qwen.qwen2_to_hf, qwen.qwen2, qwen.QWEN2_PRESETS),
    "qwen3": Family(qwen.Qwen3Config, qwen.qwen3_from_hf, qwen.qwen3_to_hf, qwen.qwen3, qwen.QWEN3_PRESETS),
    "olmo2": Family(olmo.Olmo2Config, olmo.olmo2_from_hf, olmo.olmo2_to_hf, olmo.olmo2, olmo.OLMO2_PRESETS),
    "olmo3": Family(olmo.Olmo3Config, olmo.olmo3_from_hf, olmo.olmo3_to_hf, olmo.olmo3, olmo.OLMO3_PRESETS),
    "granite": Family(
        granite.GraniteConfig,
        granite.granite_from_hf,
        granite.granite_to_hf,
        granite.granite,
        granite.GRANITE_PRESETS,
    ),
    "exaone4": Family(
        exaone.Exaone4Config,
        exaone.exaone4_from_hf,
        exaone.exaone4_to_hf,
        exaone.exaone4,
        exaone.EXAONE4_PRESETS,
    ),
    "seed_oss": Family(
        llama.SeedOssConfig,
        llama.seed_oss_from_hf,
        llama.seed_oss_to_hf,
        llama.seed_oss,
        llama.SEED_OSS_PRESETS,
    ),
    "cwm": Family(llama.CwmConfig, llama.cwm_from_hf, llama.cwm_to_hf, mistral.mistral, {}),
    "internlm3": Family(
        llama.InternLM3Config,
        llama.internlm3_from_hf,
        llama.internlm3_to_hf,
        llama.llama,
        {},
    ),
    "iquestcoder": Family(
        llama.IQuestCoderConfig,
        llama.iquestcoder_from_hf,
        llama.iquestcoder_to_hf,
        llama.llama,
        {},
    ),
    "gemma": Family(
        gemma.GemmaConfig,
        gemma.gemma_from_hf,
        gemma.gemma_to_hf,
        gemma.gemma,
        gemma.GEMMA_PRESETS,
    ),
    "gemma2": Family(
        gemma.Gemma2Config,
        gemma.gemma2_from_hf,
        gemma.gemma2_to_hf,
        gemma.gemma2,
        gemma.GEMMA2_PRESETS,
    ),
    "vaultgemma": Family(
        gemma.VaultGemmaConfig,
        gemma.vaultgemma_from_hf,
        gemma.vaultgemma_to_hf,
        gemma.vaultgemma,
        {},
    ),
    "gemma3_text": Family(
        gemma.Gemma3Config, gemma.gemma3_from_hf, gemma.gemma3_to_hf, gemma.gemma3, gemma.GEMMA3_PRESETS
    ),
    "phi3": Family(phi3.Phi3Config, phi3.phi3_from_hf, phi3.phi3_to_hf, phi3.phi3, phi3.PHI3_PRESETS),
    "smollm3": Family(
        smollm3.SmolLM3Config,
        smollm3.smollm3_from_hf,
        smollm3.smollm3_to_hf,
        smollm3.smollm3,
        smollm3.SMOLLM3_PRESETS,
    ),
}


def preset_config(ref: str) -> ModelConfig | None:
    """Return the config of a preset checkpoint name; None for another name."""
    return next((f.presets[ref] for f in FAMILIES.values() if ref in f.presets), None)


def preset(ref: str, **options: Any) -> Model | None:
    """Build the model of a preset checkpoint name; None for another name. options: see Family.build."""
    for family in FAMILIES.values():
        if ref in family.presets:
            return family.build(family.presets[ref], **options)
    return None


def family_of(hf_config: dict[str, Any]) -> Family:
    """Return the family of a config.json. Raises ValueError for an unsupported model_type, with the parts of
    such models that jaxft lacks.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(refusal(hf_config, list(FAMILIES)))
    return FAMILIES[kind]


def is_tied(config: ModelConfig) -> bool:
    """Whether the config ties the head to the embedding."""
    return isinstance(config, DenseConfig) and config.tied


# Model types without a sequence classifier in transformers 5.
WITHOUT_CLASSIFIER = ("granite", "cwm", "internlm3", "iquestcoder", "vaultgemma")


def has_classifier(config: ModelConfig) -> bool:
    """Whether transformers has a sequence classifier for this family, to load its reward models."""
    has_family = any(type(config) is family.config for family in FAMILIES.values())
    return not has_family or config_to_hf(config)["model_type"] not in WITHOUT_CLASSIFIER


def with_vocab(model: Model, vocab: int) -> Model:
    """Return the base model with a table of another number of rows."""
    family = next(family for family in FAMILIES.values() if type(model.config) is family.config)
    config: Any = model.config
    return family.build(replace(config, vocab=vocab), dtype=model.dtype)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return a config as the dict of a config.json."""
    family = next(family for family in FAMILIES.values() if type(config) is family.config)
    return family.to_hf(config)


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
    missing = [
        part
        for part, (settings, types) in PARTS.items()
        if re.fullmatch(types, kind) or any(re.fullmatch(settings, name) for name in shown)
    ]
    types = hf.get("layer_types")
    if (
        RECURRENT not in missing
        and isinstance(types, list)
        and any(LAYER_KINDS.fullmatch(str(t)) for t in types)
    ):
        missing.append(RECURRENT)
    return missing or _other(hf, kind, shown)


def _other(hf: Mapping[str, Any], kind: str, shown: list[str]) -> list[str]:
    parts = [part for types, part in OTHER_TYPES.items() if re.fullmatch(types, kind)]
    if not parts and any(map(LAYER_NORMS.fullmatch, shown)):
        parts = [LAYER_NORM]
    activation = hf.get("hidden_act")
    if not parts and isinstance(activation, str) and activation not in ACTIVATIONS:
        parts = [f"the activation {activation}"]
    return parts


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
