"""Model families: a table from model_type in config.json to the family's config, builder and presets.

To add a family, write its file next to llama.py and add a row to FAMILIES.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxft.models.dense_config import DenseConfig
from jaxft.models.families import (
    exaone,
    gemma,
    gemma3,
    granite,
    llama,
    llama_relatives,
    mistral,
    olmo,
    phi3,
    qwen,
    smollm3,
)
from jaxft.models.model import Model, ModelConfig
from jaxft.models.unsupported import refusal


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
        llama_relatives.SeedOssConfig,
        llama_relatives.seed_oss_from_hf,
        llama_relatives.seed_oss_to_hf,
        llama_relatives.seed_oss,
        llama_relatives.SEED_OSS_PRESETS,
    ),
    "cwm": Family(
        llama_relatives.CwmConfig, llama_relatives.cwm_from_hf, llama_relatives.cwm_to_hf, mistral.mistral, {}
    ),
    "internlm3": Family(
        llama_relatives.InternLM3Config,
        llama_relatives.internlm3_from_hf,
        llama_relatives.internlm3_to_hf,
        llama.llama,
        {},
    ),
    "iquestcoder": Family(
        llama_relatives.IQuestCoderConfig,
        llama_relatives.iquestcoder_from_hf,
        llama_relatives.iquestcoder_to_hf,
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
        gemma3.Gemma3Config, gemma3.gemma3_from_hf, gemma3.gemma3_to_hf, gemma3.gemma3, gemma3.GEMMA3_PRESETS
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
    known = any(type(config) is family.config for family in FAMILIES.values())
    return not known or config_to_hf(config)["model_type"] not in WITHOUT_CLASSIFIER


def with_vocab(model: Model, vocab: int) -> Model:
    """Return the base model with a table of another number of rows."""
    family = next(family for family in FAMILIES.values() if type(model.config) is family.config)
    config: Any = model.config
    return family.build(replace(config, vocab=vocab), dtype=model.dtype)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return a config as the dict of a config.json."""
    family = next(family for family in FAMILIES.values() if type(config) is family.config)
    return family.to_hf(config)
