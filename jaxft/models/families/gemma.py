"""Gemma 1 to 3 and VaultGemma: scaled embeddings, norms that multiply by 1 + weight, soft caps. Their
config.json, presets and models.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.annotations import POSITIVE_FLOAT32
from jaxft.models.dense import DecoderSpec, Family, dense_mlp, llama_specs, one_stack, self_attention
from jaxft.models.dense_config import (
    FULL,
    SLIDING,
    ConfigFormat,
    DenseConfig,
    WindowConfig,
    alternating,
    fields_from_hf,
    fields_to_hf,
    read_layer_types,
    typed_layers,
    window_from_hf,
)
from jaxft.models.model import ForwardOptions
from jaxft.nn.attention.attention import AttentionSettings
from jaxft.nn.attention.layer_attention import Attend, AttentionLayers, Extras, uniform
from jaxft.nn.layers import lm_head, rms_norm, split_keys
from jaxft.nn.matmul import accumulation_dtype
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.nn.rope import Rope, check_rope
from jaxft.nn.tensor_names import TensorName, WeightNames
from jaxft.nn.tree import Params


@dataclass(frozen=True)
class GemmaConfig(DenseConfig):
    """Sizes of a Gemma 1."""


@dataclass(frozen=True)
class Gemma2Config(WindowConfig):
    """Sizes of a Gemma 2.

    query_pre_attn_scalar: attention scores are q k^T divided by its square root. attn_softcap, final_softcap:
    c in c * tanh(x / c), which is applied to attention scores and to logits; None for no soft cap. Raises
    ValueError for a value out of range.
    """

    query_pre_attn_scalar: Annotated[float, POSITIVE_FLOAT32] = 256.0
    attn_softcap: Annotated[float | None, POSITIVE_FLOAT32, "attn_logit_softcapping"] = None
    final_softcap: Annotated[float | None, POSITIVE_FLOAT32, "final_logit_softcapping"] = None


@dataclass(frozen=True)
class VaultGemmaConfig(Gemma2Config):
    """Sizes of a VaultGemma, a Gemma 2 without the norms after attention and MLP."""


_TANH = "gelu_pytorch_tanh"
_COMMON: dict[str, Any] = {
    "head_dim": 256, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
    "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA2_DEFAULTS = {
    **_COMMON, "num_key_value_heads": 4, "hidden_activation": _TANH, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_FIXED: dict[str, Any] = {"attention_bias": False}


def _check_causal(hf: dict[str, Any]) -> None:
    """Raise ValueError for an encoder, such as EmbeddingGemma."""
    if hf.get("use_bidirectional_attention"):
        raise ValueError(
            "config: use_bidirectional_attention=true is not supported: this model is an encoder; use a "
            "causal language model"
        )


def _read_gemma(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    _check_causal(hf)
    act = hf.get("hidden_act", _TANH)
    act = _TANH if act == "gelu" else act  # the first files call the approximation gelu
    if hf.get("hidden_activation") not in (None, act):
        raise ValueError(
            f"config: hidden_activation={hf['hidden_activation']!r:.60} (read by transformers 4) and "
            f"hidden_act={act!r:.60} (read by transformers 5) differ; set both to {_TANH!r}, Google's value"
        )
    return fields_from_hf({**_COMMON, "num_key_value_heads": 16, **hf, "hidden_act": act}, form)


def _write_gemma(c: GemmaConfig, form: ConfigFormat) -> dict[str, Any]:
    hf = fields_to_hf(c, form)
    return hf | {"hidden_activation": hf["hidden_act"]}


def _capped_fields(hf: dict[str, Any], form: ConfigFormat, period: int) -> dict[str, Any]:
    """Return the fields of a Gemma2Config. Without layer_types, every period-th layer has full attention."""
    _check_causal(hf)
    fields = fields_from_hf(hf, form)
    types = read_layer_types(hf, alternating(fields["layers"], period))
    return fields | {
        "query_pre_attn_scalar": hf["query_pre_attn_scalar"],
        "window": window_from_hf(hf) if SLIDING in types else None,
        "layer_types": types,
        "attn_softcap": hf["attn_logit_softcapping"],
        "final_softcap": hf["final_logit_softcapping"],
    }


def _capped_settings(c: Gemma2Config) -> dict[str, Any]:
    """Return the settings of config.json for the fields that Gemma2Config adds to DenseConfig."""
    scalar = c.query_pre_attn_scalar
    return {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": c.window or c.max_positions,  # transformers needs a number even if no layer uses it
        "layer_types": list(c.layer_types),
        "attn_logit_softcapping": c.attn_softcap,
        "final_logit_softcapping": c.final_softcap,
    }


def _read_gemma2(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    return _capped_fields({**_GEMMA2_DEFAULTS, **hf}, form, 2)


def _write_gemma2(c: Gemma2Config, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(c, form) | _capped_settings(c)


_END_OF_TURN = 107
_G: dict[str, Any] = dict(
    vocab=256000, head_dim=256, norm_eps=1e-6, tied=True, max_positions=8192, bos=2, eos=(1,),
    activation="gelu_tanh",
)  # fmt: skip
_GEMMA_2B = GemmaConfig(**_G, width=2048, layers=18, heads=8, kv_heads=1, mlp=16384)
_GEMMA_7B = GemmaConfig(**_G, width=3072, layers=28, heads=16, kv_heads=16, mlp=24576)
_GEMMA_PRESETS: dict[str, GemmaConfig] = {
    f"google/{name}": config
    for config, names in (
        (_GEMMA_2B, ("gemma-2b", "gemma-2b-it", "gemma-1.1-2b-it")),
        (_GEMMA_7B, ("gemma-7b", "gemma-7b-it", "gemma-1.1-7b-it")),
    )
    for name in names
}


def _gemma2(size: str, **sizes: Any) -> dict[str, Gemma2Config]:
    """Return presets of a base model and its instruction-tuned version, which differ in their end tokens."""
    settings: dict[str, Any] = dict(window=4096, attn_softcap=50.0, final_softcap=30.0)
    types = alternating(sizes["layers"], 2)
    config = Gemma2Config(**(_G | settings | sizes), layer_types=types)
    name = f"google/gemma-2-{size}"
    return {name: config, f"{name}-it": replace(config, eos=(1, _END_OF_TURN))}


_GEMMA2_PRESETS: dict[str, Gemma2Config] = {
    **_gemma2("2b", width=2304, layers=26, heads=8, kv_heads=4, mlp=9216),
    **_gemma2("9b", width=3584, layers=42, heads=16, kv_heads=8, mlp=14336),
    **_gemma2(
        "27b", width=4608, layers=46, heads=32, kv_heads=16, head_dim=128, mlp=36864,
        query_pre_attn_scalar=144.0,
    ),
}  # fmt: skip


def _gemma_decoder(config: GemmaConfig) -> DecoderSpec:
    attention = uniform(config.layers, config.head_dim, config.rope)
    return _decoder(config, _gemma_specs(config), {}, attention)


def _gemma2_decoder(config: Gemma2Config) -> DecoderSpec:
    return _decoder(config, _four_norms(config), _FOUR_NORMS, _capped_attention(config, config.rope))


def _vaultgemma_decoder(config: VaultGemmaConfig) -> DecoderSpec:
    return _decoder(config, _gemma_specs(config), _FOUR_NORMS, _capped_attention(config, config.rope))


# Functions that all Gemma families share.


def _decoder(
    config: DenseConfig, specs: dict[str, Any], names: WeightNames, attention: AttentionLayers
) -> DecoderSpec:
    """Return the DecoderSpec of any Gemma family. names: tensor names that differ from Llama's."""
    cap = config.final_softcap if isinstance(config, Gemma2Config) else None
    return one_stack(
        specs,
        _gemma_layer,
        attention,
        names,
        norm=offset_rms_norm,
        embed_scale=config.width**0.5,
        logits=lm_head if cap is None else partial(_capped_logits, cap),
    )


def offset_rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float, out: DTypeLike
) -> Float[Array, "... D"]:
    """Return `x / sqrt(mean(x^2) + eps) * (1 + weight)` in the dtype `out`, computed in float32 or wider."""
    wide = weight.astype(accumulation_dtype(weight.dtype))
    return rms_norm(x, wide + jnp.ones((), wide.dtype), eps, out)


def _capped_logits(cap: float, params: Params, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Return `cap * tanh(logits / cap)` in float32 or wider."""
    logits = lm_head(params, h)
    limit = jnp.asarray(cap, logits.dtype)
    return limit * jnp.tanh(logits / limit)


def _capped_attention(c: Gemma2Config, local_rope: Rope) -> AttentionLayers:
    """Return the config's AttentionLayers, with scale and soft cap. local_rope: of layers with a window."""
    layers = typed_layers(c, c.rope, local_rope)
    return replace(layers, scale=c.query_pre_attn_scalar**-0.5, settings=AttentionSettings(c.attn_softcap))


def _gemma_layer(
    f: ForwardOptions, p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None
) -> tuple[Float[Array, "B T D"], Extras]:
    """Compute Llama's layer with Gemma's norms. Norms of q and k per head, and norms of the outputs of
    attention and MLP, are applied if the family declares them.
    """
    c, keys = f.config, split_keys(key, 7)

    def norm(x: Array, name: str, parameters: Params, dtype: DTypeLike) -> Array:
        weight = parameters.get(name)
        return x.astype(dtype) if weight is None else offset_rms_norm(x, weight, c.norm_eps, dtype)

    def norms(attn: Params, q: Array, k: Array) -> tuple[Array, Array]:
        return norm(q, "q_norm", attn, f.dtype), norm(k, "k_norm", attn, f.dtype)

    o, extras = self_attention(c, p["attn"], norm(h_BTD, "attn_norm", p, f.dtype), attend, keys[:4], norms)
    h_BTD = h_BTD + norm(o, "post_attn_norm", p, h_BTD.dtype)
    down = dense_mlp(c, p["mlp"], norm(h_BTD, "mlp_norm", p, f.dtype), keys[4:])
    return h_BTD + norm(down, "post_mlp_norm", p, h_BTD.dtype), extras


def _gemma_specs(c: DenseConfig) -> dict[str, Any]:
    """Return the specs of Gemma 1's parameters: Llama's, with norm weights that are initialised to 0."""
    specs, norm = llama_specs(c), ParamSpec((c.layers, c.width), ("layers", "norm"), full(0.0))
    specs["layers"] |= {"attn_norm": norm, "mlp_norm": norm}
    return specs | {"final_norm": ParamSpec((c.width,), ("norm",), full(0.0))}


def _four_norms(c: DenseConfig) -> dict[str, Any]:
    """Return the specs of Gemma 2's parameters: Gemma 1's, and norms after attention and MLP."""
    specs = _gemma_specs(c)
    norm = specs["layers"]["attn_norm"]
    specs["layers"] |= {"post_attn_norm": norm, "post_mlp_norm": norm}
    return specs


_FOUR_NORMS: WeightNames = {
    "layers/post_attn_norm": TensorName("model.layers.{i}.post_attention_layernorm.weight"),
    "layers/mlp_norm": TensorName("model.layers.{i}.pre_feedforward_layernorm.weight"),
    "layers/post_mlp_norm": TensorName("model.layers.{i}.post_feedforward_layernorm.weight"),
}


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Sizes of a Gemma 3. rope: for layers with full attention; local_rope: for layers with a window."""

    local_rope: Rope = Rope()

    def __post_init__(self):
        super().__post_init__()
        check_rope(self.local_rope, self.head_dim, self.max_positions)


def _gemma3_decoder(config: Gemma3Config) -> DecoderSpec:
    specs = _four_norms(config)
    norm = ParamSpec((config.layers, config.head_dim), ("layers", "norm"), full(0.0))
    specs["layers"]["attn"] |= {"q_norm": norm, "k_norm": norm}
    return _decoder(config, specs, _FOUR_NORMS, _capped_attention(config, config.local_rope))


GEMMA3_DEFAULTS: dict[str, Any] = {
    **_GEMMA2_DEFAULTS, "max_position_embeddings": 131072, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip


def _read_gemma3(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    period = hf.get("sliding_window_pattern", 6)
    if type(period) is not int or period < 1:
        raise ValueError(
            f"config: sliding_window_pattern must be a positive whole number, got {period!r:.60}"
        )
    return _capped_fields({**GEMMA3_DEFAULTS, **hf}, form, period)


def _write_gemma3(c: Gemma3Config, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(c, form, c.local_rope) | _capped_settings(c)


_GEMMA3_END_OF_TURN = 106
_LONG = {"rope": Rope(1e6, "linear", factor=8.0), "max_positions": 131072, "window": 1024, "vocab": 262208}
_SHORT = {"rope": Rope(1e6), "max_positions": 32768, "window": 512, "vocab": 262144}


def _gemma3(base: str, chat: str, **sizes: Any) -> dict[str, Gemma3Config]:
    """Return presets of a base model and its instruction-tuned version, which differ in their end tokens."""
    common: dict[str, Any] = dict(
        head_dim=256, norm_eps=1e-6, tied=True, bos=2, activation="gelu_tanh",
        layer_types=alternating(sizes["layers"], 6),
    )  # fmt: skip
    ends = {base: (1,), chat: (1, _GEMMA3_END_OF_TURN)}
    return {
        f"google/gemma-3-{name}": Gemma3Config(**(common | sizes | {"eos": eos}))
        for name, eos in ends.items()
    }


_GEMMA3_PRESETS: dict[str, Gemma3Config] = {
    **_gemma3("270m", "270m-it", width=640, layers=18, heads=4, kv_heads=1, mlp=2048, **_SHORT),
    **_gemma3("1b-pt", "1b-it", width=1152, layers=26, heads=4, kv_heads=1, mlp=6912, **_SHORT),
    **_gemma3("4b-pt", "4b-it", width=2560, layers=34, heads=8, kv_heads=4, mlp=10240, **_LONG),
    **_gemma3("12b-pt", "12b-it", width=3840, layers=48, heads=16, kv_heads=8, mlp=15360, **_LONG),
    **_gemma3(
        "27b-pt", "27b-it", width=5376, layers=62, heads=32, kv_heads=16, head_dim=128, mlp=21504,
        query_pre_attn_scalar=168.0, **_LONG,
    ),
}  # fmt: skip

_ACTIVATION = "hidden_activation"
_GEMMA2 = ConfigFormat("gemma2", "Gemma2ForCausalLM", _FIXED, activation=_ACTIVATION)
_VAULT_GEMMA = ConfigFormat("vaultgemma", "VaultGemmaForCausalLM", _FIXED, activation=_ACTIVATION)
_GEMMA3 = ConfigFormat(
    "gemma3_text", "Gemma3ForCausalLM",
    # transformers ignores a soft cap of Gemma 3's scores
    fixed=_FIXED | {"attn_logit_softcapping": None}, defaults={"rope_theta": {FULL: 1e6, SLIDING: 1e4}},
    activation=_ACTIVATION, local_theta="rope_local_base_freq",
)  # fmt: skip
_GEMMA = ConfigFormat("gemma", "GemmaForCausalLM", _FIXED)
GEMMA = Family(GemmaConfig, _GEMMA, _gemma_decoder, _GEMMA_PRESETS, _read_gemma, _write_gemma)
GEMMA2 = Family(Gemma2Config, _GEMMA2, _gemma2_decoder, _GEMMA2_PRESETS, _read_gemma2, _write_gemma2)
VAULT_GEMMA = Family(VaultGemmaConfig, _VAULT_GEMMA, _vaultgemma_decoder, {}, _read_gemma2, _write_gemma2)
GEMMA3 = Family(Gemma3Config, _GEMMA3, _gemma3_decoder, _GEMMA3_PRESETS, _read_gemma3, _write_gemma3)
