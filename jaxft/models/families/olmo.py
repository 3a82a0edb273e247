"""OLMo 2, OLMo 3 and EXAONE 4: norms after attention and MLP instead of before.

OLMo's q and k norms are over all heads at once, EXAONE's per head. In OLMo 3, three of four layers have a
sliding window and another rope; in an EXAONE 4 with sliding windows, only the layers with a window have rope.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from jaxft.models.dense import (
    ATTENTION,
    DecoderSpec,
    Family,
    add_biases,
    dense_mlp,
    head_norms,
    llama_specs,
    one_stack,
    self_attention,
)
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
from jaxft.nn.attention.layer_attention import Attend, Extras, uniform
from jaxft.nn.layers import rms_norm, split_keys
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.nn.rope import Rope
from jaxft.nn.tensor_names import TensorName, WeightNames
from jaxft.nn.tree import Params


@dataclass(frozen=True)
class Olmo2Config(DenseConfig):
    """Sizes of an OLMo 2. attention_bias: whether all four projections of attention have biases."""

    attention_bias: bool = False


@dataclass(frozen=True)
class Olmo3Config(Olmo2Config, WindowConfig):
    """Sizes of an OLMo 3. rope: for layers with full attention; local_rope: for layers with a window."""

    window: int | None = 4096
    local_rope: Rope = Rope()


def _olmo2_decoder(config: Olmo2Config) -> DecoderSpec:
    attention = uniform(config.layers, config.head_dim, config.rope)
    return one_stack(_specs(config), _layer, attention, _NAMES)


def _olmo3_decoder(config: Olmo3Config) -> DecoderSpec:
    attention = typed_layers(config, config.rope, config.local_rope)
    return one_stack(_specs(config), _layer, attention, _NAMES)


def _specs(c: Olmo2Config) -> dict[str, Any]:
    specs = _postnorm_specs(c)
    for norm, heads in (("q_norm", c.heads), ("k_norm", c.kv_heads)):
        shape = (c.layers, heads * c.head_dim)
        specs["layers"]["attn"][norm] = ParamSpec(shape, ("layers", "norm"), full(1.0))
    if c.attention_bias:
        add_biases(specs, ATTENTION)
    return specs


def _layer(f: ForwardOptions, p: Params, h: Any, attend: Attend, key: Any) -> tuple[Any, Extras]:
    def norm(x: Array, weight: Array) -> Array:
        return rms_norm(x.reshape(*x.shape[:2], -1), weight, f.config.norm_eps, f.dtype).reshape(x.shape)

    def norms(p: Params, q: Array, k: Array) -> tuple[Array, Array]:
        return norm(q, p["q_norm"]), norm(k, p["k_norm"])

    return _postnorm_layer(f, p, h, attend, key, norms)


# A layer with norms after attention and MLP, which EXAONE 4 uses too.

_NAMES: WeightNames = {
    "layers/post_attn_norm": TensorName("model.layers.{i}.post_attention_layernorm.weight"),
    "layers/post_mlp_norm": TensorName("model.layers.{i}.post_feedforward_layernorm.weight"),
}


def _postnorm_specs(c: DenseConfig) -> dict[str, Any]:
    specs = llama_specs(c)
    for norm in ("attn_norm", "mlp_norm"):
        specs["layers"][f"post_{norm}"] = specs["layers"].pop(norm)
    return specs


def _postnorm_layer(
    f: ForwardOptions, p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None,
    norms: Callable[[Params, Array, Array], tuple[Array, Array]],
) -> tuple[Float[Array, "B T D"], Extras]:  # fmt: skip
    """Compute `h += norm(attention(h)); h += norm(mlp(h))`. norms: see self_attention."""
    c, keys = f.config, split_keys(key, 7)
    o, extras = self_attention(c, p["attn"], h_BTD.astype(f.dtype), attend, keys[:4], norms)
    h_BTD = h_BTD + rms_norm(o, p["post_attn_norm"], c.norm_eps, h_BTD.dtype)
    down = dense_mlp(c, p["mlp"], h_BTD.astype(f.dtype), keys[4:])
    return h_BTD + rms_norm(down, p["post_mlp_norm"], c.norm_eps, h_BTD.dtype), extras


def _read_olmo3(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 4096, **hf})
    types = read_layer_types(hf, alternating(fields["layers"], 4))
    return fields | {"window": window, "layer_types": types}


def _write_olmo3(c: Olmo3Config, form: ConfigFormat) -> dict[str, Any]:
    out = fields_to_hf(c, form, c.local_rope)
    if c.rope.theta != c.local_rope.theta:  # transformers 4 cannot express that; 5 reads rope_parameters
        del out["rope_theta"]
    return out | {"sliding_window": c.window, "layer_types": list(c.layer_types)}


_SIZES: dict[str, Any] = dict(
    head_dim=128, rope=Rope(500000.0), norm_eps=1e-6, bos=None, eos=(100257,)  # <|endoftext|>
)  # fmt: skip
_YARN = Rope(
    500000.0, kind="yarn", factor=8.0, original_max_positions=8192, beta_fast=32.0, beta_slow=1.0,
    attention_factor=1.2079441541679836,
)  # fmt: skip


def _olmo2(name: str, **sizes: Any) -> dict[str, Olmo2Config]:
    """Return presets of a base model and its instruction-tuned version, which have the same settings."""
    config = Olmo2Config(vocab=100352, max_positions=4096, **_SIZES, **sizes)
    return {f"allenai/{name}": config, f"allenai/{name}-Instruct": config}


def _olmo3(*names: str, layers: int, **sizes: Any) -> dict[str, Olmo3Config]:
    """Return presets of a base model and the models trained from it, which have the same settings."""
    settings = _SIZES | {"rope": _YARN, "local_rope": _SIZES["rope"], "layer_types": alternating(layers, 4)}
    config = Olmo3Config(vocab=100278, max_positions=65536, layers=layers, **settings, **sizes)
    return {f"allenai/{name}": config for name in names}


_OLMO2_PRESETS: dict[str, Olmo2Config] = {
    **_olmo2("OLMo-2-0425-1B", width=2048, layers=16, heads=16, kv_heads=16, mlp=8192),
    **_olmo2("OLMo-2-1124-7B", width=4096, layers=32, heads=32, kv_heads=32, mlp=11008),
    **_olmo2("OLMo-2-1124-13B", width=5120, layers=40, heads=40, kv_heads=40, mlp=13824),
    **_olmo2("OLMo-2-0325-32B", width=5120, layers=64, heads=40, kv_heads=8, mlp=27648),
}
_OLMO3_PRESETS: dict[str, Olmo3Config] = {
    **_olmo3(
        "Olmo-3-1025-7B", "Olmo-3-7B-Instruct", "Olmo-3-7B-Think",
        width=4096, layers=32, heads=32, kv_heads=32, mlp=11008,
    ),
    **_olmo3(
        "Olmo-3-1125-32B", "Olmo-3-32B-Think", width=5120, layers=64, heads=40, kv_heads=8, mlp=27648,
    ),
}  # fmt: skip

_DEFAULTS = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279}
_BIAS = {"attention_bias": False}
_OLMO2 = ConfigFormat("olmo2", "Olmo2ForCausalLM", {"hidden_act": "silu"}, _DEFAULTS, _BIAS)
_OLMO3 = ConfigFormat(
    "olmo3", "Olmo3ForCausalLM", {"hidden_act": "silu"}, _DEFAULTS | {"rope_theta": 500000.0}, _BIAS,
    local_theta="rope_theta",
)  # fmt: skip
OLMO2 = Family(Olmo2Config, _OLMO2, _olmo2_decoder, _OLMO2_PRESETS)
OLMO3 = Family(Olmo3Config, _OLMO3, _olmo3_decoder, _OLMO3_PRESETS, _read_olmo3, _write_olmo3)


# ---- EXAONE 4


@dataclass(frozen=True)
class Exaone4Config(WindowConfig):
    """Sizes of an EXAONE 4. Layers with full attention have rope only if window is None."""


def _exaone4_decoder(config: Exaone4Config) -> DecoderSpec:
    specs = _postnorm_specs(config)
    norm = ParamSpec((config.layers, config.head_dim), ("layers", "norm"), full(1.0))
    specs["layers"]["attn"] |= {"q_norm": norm, "k_norm": norm}
    full_rope = config.rope if config.window is None else Rope(kind="none")
    attention = typed_layers(config, full_rope, config.rope)
    return one_stack(specs, _exaone4_layer, attention, _NAMES)


def _exaone4_layer(f: ForwardOptions, p: Params, h: Any, attend: Attend, key: Any) -> tuple[Any, Extras]:
    return _postnorm_layer(f, p, h, attend, key, head_norms(f.config, f.dtype))


def _read_exaone4(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 4096, **hf})
    pattern, default = hf.get("sliding_window_pattern", 4), (FULL,) * fields["layers"]
    if window is not None and type(pattern) is int and pattern > 0:
        default = alternating(fields["layers"], pattern)
    elif window is not None and "layer_types" not in hf:
        raise ValueError(
            f"config: sliding_window_pattern={pattern!r:.60} is not supported; set layer_types, a list of "
            f"{FULL} or {SLIDING} for each layer"
        )
    return fields | {"window": window, "layer_types": read_layer_types(hf, default)}


def _write_exaone4(c: Exaone4Config, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(c, form) | {
        "sliding_window": c.window,
        "sliding_window_pattern": None if c.window is None else 4,
        "layer_types": list(c.types),
    }


_EXAONE4_COMMON: dict[str, Any] = dict(
    vocab=102400, kv_heads=8, rope=Rope(1e6, "llama3", factor=16.0, original_max_positions=8192), bos=1,
    eos=(361,),
)  # fmt: skip
_EXAONE4_PRESETS: dict[str, Exaone4Config] = {
    "LGAI-EXAONE/EXAONE-4.0-1.2B": Exaone4Config(
        **_EXAONE4_COMMON, width=2048, layers=30, heads=32, head_dim=64, mlp=4096, tied=True,
        max_positions=65536, layer_types=(FULL,) * 30,
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": Exaone4Config(
        **_EXAONE4_COMMON, width=5120, layers=64, heads=40, head_dim=128, mlp=27392, max_positions=131072,
        window=4096, layer_types=(SLIDING, SLIDING, SLIDING, FULL) * 16,
    ),
}  # fmt: skip
_EXAONE4 = ConfigFormat(
    "exaone4", "Exaone4ForCausalLM", {"hidden_act": "silu"}, {"rms_norm_eps": 1e-5, "bos_token_id": 0}
)
EXAONE4 = Family(Exaone4Config, _EXAONE4, _exaone4_decoder, _EXAONE4_PRESETS, _read_exaone4, _write_exaone4)
