"""Gemma 1, Gemma 2 and VaultGemma: scaled embeddings, norms that multiply by 1 + weight, soft caps."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.models.dense import (
    dense_mlp,
    dense_model,
    llama_specs,
    names_of,
    one_stack,
    self_attention,
)
from jaxft.models.dense_config import DenseConfig
from jaxft.models.gemma_config import Gemma2Config, GemmaConfig, VaultGemmaConfig
from jaxft.models.layer_types import FULL, SLIDING, typed_layers
from jaxft.models.model import ForwardOptions, Model
from jaxft.nn.attention import AttentionSettings
from jaxft.nn.contractions import accumulation_dtype
from jaxft.nn.layer_attention import Attend, AttentionLayers, Extras, LayerKind, uniform
from jaxft.nn.layers import rms_norm, split_keys
from jaxft.nn.lm_head import lm_head
from jaxft.nn.param import ParamSpec, full
from jaxft.nn.tensor_names import TensorName, WeightNames
from jaxft.tree import Params


def gemma(config: GemmaConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Gemma 1 config. options: remat and residual of dense_model."""
    attention = uniform(config.layers, config.head_dim, config.rope)
    return gemma_model(config, gemma_specs(config), {}, attention, dtype, **options)


def gemma2(config: Gemma2Config, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Gemma 2 config. options: remat and residual of dense_model."""
    kinds = {FULL: LayerKind(config.rope), SLIDING: LayerKind(config.rope, config.window)}
    attention = capped_attention(config, kinds)
    return gemma_model(config, four_norms(config), FOUR_NORMS, attention, dtype, **options)


def vaultgemma(config: VaultGemmaConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a VaultGemma config. options: remat and residual of dense_model."""
    kinds = {FULL: LayerKind(config.rope), SLIDING: LayerKind(config.rope, config.window)}
    attention, names = capped_attention(config, kinds), {"layers/mlp_norm": FOUR_NORMS["layers/mlp_norm"]}
    return gemma_model(config, gemma_specs(config), names, attention, dtype, **options)


# Functions that all Gemma families share.


def gemma_model(
    config: DenseConfig, specs: dict[str, Any], names: WeightNames, attention: AttentionLayers,
    dtype: DTypeLike, **options: Any,
) -> Model:  # fmt: skip
    """Build the Model of any Gemma family. names: tensor names that differ from Llama's."""
    cap = config.final_softcap if isinstance(config, Gemma2Config) else None
    architecture = one_stack(
        specs,
        names_of(specs, names),
        gemma_layer,
        attention,
        norm=offset_rms_norm,
        embed_scale=config.width**0.5,
        logits=lm_head if cap is None else partial(capped_logits, cap),
    )
    return dense_model(config, architecture, dtype, **options)


def offset_rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float, out: DTypeLike
) -> Float[Array, "... D"]:
    """Return `x / sqrt(mean(x^2) + eps) * (1 + weight)`, computed in float32 or wider, as `out`."""
    wide = weight.astype(accumulation_dtype(weight.dtype))
    return rms_norm(x, wide + jnp.ones((), wide.dtype), eps, out)


def capped_logits(cap: float, params: Params, h: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Return `cap * tanh(logits / cap)` in float32 or wider."""
    logits = lm_head(params, h)
    limit = jnp.asarray(cap, logits.dtype)
    return limit * jnp.tanh(logits / limit)


def capped_attention(c: Gemma2Config, kinds: dict[str, LayerKind]) -> AttentionLayers:
    """Return the AttentionLayers of a config, with its scale and soft cap of the scores. kinds: the LayerKind
    of each layer type.
    """
    layers = typed_layers(c.layer_types, kinds, c.head_dim)
    return replace(layers, scale=c.query_pre_attn_scalar**-0.5, settings=AttentionSettings(c.attn_softcap))


def gemma_layer(
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


def gemma_specs(c: DenseConfig) -> dict[str, Any]:
    """Declare Gemma 1's parameters: Llama's, with norm weights that are initialised to 0."""
    specs, norm = llama_specs(c), ParamSpec((c.layers, c.width), ("layers", "norm"), full(0.0))
    specs["layers"] |= {"attn_norm": norm, "mlp_norm": norm}
    return specs | {"final_norm": ParamSpec((c.width,), ("norm",), full(0.0))}


def four_norms(c: DenseConfig) -> dict[str, Any]:
    """Declare Gemma 2's parameters: Gemma 1's, and norms after attention and MLP."""
    specs = gemma_specs(c)
    norm = specs["layers"]["attn_norm"]
    specs["layers"] |= {"post_attn_norm": norm, "post_mlp_norm": norm}
    return specs


FOUR_NORMS: WeightNames = {
    "layers/post_attn_norm": TensorName("model.layers.{i}.post_attention_layernorm.weight"),
    "layers/mlp_norm": TensorName("model.layers.{i}.pre_feedforward_layernorm.weight"),
    "layers/post_mlp_norm": TensorName("model.layers.{i}.post_feedforward_layernorm.weight"),
}
