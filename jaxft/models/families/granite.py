"""Granite 3: Llama's layer with multipliers on embeddings, attention scores, residual branches and logits."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.distributed.sharding import constrain
from jaxft.models.dense import (
    dense_model,
    llama_specs,
    names_of,
    one_stack,
    self_attention,
    with_biases,
)
from jaxft.models.dense_config import ConfigFormat, DenseConfig
from jaxft.models.model import ForwardOptions, Model
from jaxft.nn.attention.layer_attention import Attend, Extras, uniform
from jaxft.nn.layers import gated_mlp, lm_head, rms_norm, split_keys
from jaxft.nn.rope import Rope
from jaxft.tree import Params

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True)
class GraniteConfig(DenseConfig):
    """Sizes of a Granite 3. embedding_multiplier, attention_multiplier: factors on embeddings and attention
    scores. residual_multiplier: factor on the outputs of attention and MLP. logits_scaling: divisor of the
    logits. attention_bias, mlp_bias: whether the projections have biases.
    """

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in MULTIPLIERS:
            value = getattr(self, name)
            if not 1e-37 < abs(value) < 3.4e38:
                raise ValueError(f"config: {name} must be finite in float32 and not 0, got {value}")


def granite(config: GraniteConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Granite config. options: remat and residual of dense_model."""
    specs = with_biases(llama_specs(config), config, config.attention_bias, config.mlp_bias)
    attention = uniform(config.layers, config.head_dim, config.rope)
    arch = one_stack(
        specs,
        names_of(specs),
        _layer,
        replace(attention, scale=config.attention_multiplier),
        embed_scale=config.embedding_multiplier,
        logits=partial(_logits, config),
    )
    return dense_model(config, arch, dtype, **options)


def _layer(
    f: ForwardOptions, p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None
) -> tuple[Float[Array, "B T D"], Extras]:
    """Compute `h += m attention(norm(h)); h += m mlp(norm(h))` with m = residual_multiplier."""
    c, keys = f.config, split_keys(key, 7)
    multiplier = jnp.asarray(c.residual_multiplier, h_BTD.dtype)
    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, f.dtype)
    o, extras = self_attention(c, p["attn"], x, attend, keys[:4])
    h_BTD = h_BTD + o.astype(h_BTD.dtype) * multiplier
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, f.dtype)
    down = constrain(gated_mlp(p["mlp"], x, keys[4:]), "rows", "time", "act_width")
    return h_BTD + down.astype(h_BTD.dtype) * multiplier, extras


def _logits(c: GraniteConfig, head: Params, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
    logits = lm_head(head, h)
    return logits / jnp.asarray(c.logits_scaling, logits.dtype)


GRANITE_FORMAT = ConfigFormat(
    "granite", "GraniteForCausalLM", {"hidden_act": "silu"},
    more={**dict.fromkeys(MULTIPLIERS, 1.0), "attention_bias": False, "mlp_bias": False},
)  # fmt: skip


_2B: dict[str, Any] = dict(
    width=2048, layers=40, heads=32, kv_heads=8, head_dim=64, mlp=8192, attention_multiplier=0.015625,
    logits_scaling=8.0,
)  # fmt: skip
_8B: dict[str, Any] = dict(
    width=4096, layers=40, heads=32, kv_heads=8, head_dim=128, mlp=12800, attention_multiplier=0.0078125,
    logits_scaling=16.0,
)  # fmt: skip


def _base_and_instruct(version: str, vocab: int, theta: float) -> dict[str, GraniteConfig]:
    """Return presets of a release's base models and their instruction-tuned versions, which have the same
    settings.
    """
    common: dict[str, Any] = dict(
        vocab=vocab, rope=Rope(theta), tied=True, max_positions=131072, bos=0, eos=(0,),
        embedding_multiplier=12.0, residual_multiplier=0.22,
    )  # fmt: skip
    return {
        f"ibm-granite/granite-{version}-{size}-{kind}": GraniteConfig(**common, **sizes)
        for size, sizes in (("2b", _2B), ("8b", _8B))
        for kind in ("base", "instruct")
    }


GRANITE_PRESETS: dict[str, GraniteConfig] = {
    **_base_and_instruct("3.1", 49155, 5e6),
    **_base_and_instruct("3.3", 49159, 1e7),
}
