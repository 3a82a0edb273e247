"""The Llama family: Llama 1 to 3.3, SmolLM2 and everything else with model_type "llama"."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxft.distributed.sharding import check_context_divides, constrain
from jaxft.models.llama_config import PRESETS, LlamaConfig, from_hf, to_hf
from jaxft.models.model import ForwardOptions, Model, WeightNames, dense_flops, forward_options, layer_axes
from jaxft.nn.layers import embed_tokens, gated_mlp, rms_norm, saveable, split_keys
from jaxft.nn.matmul import accumulation_dtype, gather_layer, head_params, linear, lm_head
from jaxft.nn.param import ParamSpec, fan_in, full, normal
from jaxft.nn.rope import cache_lengths, example_lengths, needs_lengths, rope_angles, rotate
from jaxft.nn.scan import (
    Attend,
    Cache,
    RematPolicy,
    decode_layers,
    prefill_layers,
    repeat_cache,
    scan_layers,
)
from jaxft.tree import Batch, Params

__all__ = ["PRESETS", "LlamaConfig", "from_hf", "llama", "to_hf"]


def llama_specs(c: LlamaConfig) -> dict[str, Any]:
    """Declare the parameters, one line each."""
    L, D, F, V = c.layers, c.width, c.mlp, c.vocab
    Q, K = c.heads * c.head_dim, c.kv_heads * c.head_dim
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "table_width"), normal(0.02)),
        "layers": {
            "attn_norm": ParamSpec((L, D), ("layers", "norm"), full(1.0)),
            "attn": {
                "q": ParamSpec((L, D, Q), ("layers", "width", "heads"), fan_in(D), c.heads),
                "k": ParamSpec((L, D, K), ("layers", "width", "kv_heads"), fan_in(D), c.kv_heads),
                "v": ParamSpec((L, D, K), ("layers", "width", "kv_heads"), fan_in(D), c.kv_heads),
                "o": ParamSpec((L, Q, D), ("layers", "from_heads", "out_width"), fan_in(Q), c.heads),
            },
            "mlp_norm": ParamSpec((L, D), ("layers", "norm"), full(1.0)),
            "mlp": {
                "gate": ParamSpec((L, D, F), ("layers", "width", "mlp"), fan_in(D)),
                "up": ParamSpec((L, D, F), ("layers", "width", "mlp"), fan_in(D)),
                "down": ParamSpec((L, F, D), ("layers", "from_mlp", "out_width"), fan_in(F)),
            },
        },
        "final_norm": ParamSpec((D,), ("norm",), full(1.0)),
    }
    if not c.tied:
        specs["head"] = ParamSpec((D, V), ("table_width", "vocab"), fan_in(D))
    return specs


WEIGHT_NAMES: WeightNames = {
    "embed": ("model.embed_tokens.weight", False),
    "layers/attn_norm": ("model.layers.{i}.input_layernorm.weight", False),
    "layers/attn/q": ("model.layers.{i}.self_attn.q_proj.weight", True),
    "layers/attn/k": ("model.layers.{i}.self_attn.k_proj.weight", True),
    "layers/attn/v": ("model.layers.{i}.self_attn.v_proj.weight", True),
    "layers/attn/o": ("model.layers.{i}.self_attn.o_proj.weight", True),
    "layers/mlp_norm": ("model.layers.{i}.post_attention_layernorm.weight", False),
    "layers/mlp/gate": ("model.layers.{i}.mlp.gate_proj.weight", True),
    "layers/mlp/up": ("model.layers.{i}.mlp.up_proj.weight", True),
    "layers/mlp/down": ("model.layers.{i}.mlp.down_proj.weight", True),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}


def project_qkv(
    c: LlamaConfig, p: Params, x_BTD: Array, angles: tuple[Array, Array], keys: Any
) -> tuple[Array, Array, Array]:
    """Return queries [B, T, H, E] and keys, values [B, T, K, E] with rope applied, saveable by a remat
    policy.
    """
    B, T, _ = x_BTD.shape
    q = linear(x_BTD, p["q"], keys[0]).reshape(B, T, c.heads, c.head_dim)
    k = linear(x_BTD, p["k"], keys[1]).reshape(B, T, c.kv_heads, c.head_dim)
    v = linear(x_BTD, p["v"], keys[2]).reshape(B, T, c.kv_heads, c.head_dim)
    q = constrain(rotate(q, *angles), "rows", "time", "heads", "head_dim")
    k = constrain(rotate(k, *angles), "rows", "time", "kv_heads", "head_dim")
    v = constrain(v, "rows", "time", "kv_heads", "head_dim")
    return saveable(q, "q"), saveable(k, "k"), saveable(v, "v")


def block(
    f: ForwardOptions[LlamaConfig],
    angles: tuple[Array, Array],
    p: Params,
    h_BTD: Float[Array, "B T D"],
    attend: Attend,
    key: Array | None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Run one layer (see nn.scan). The residual stream is summed in float32 or wider and rounded once to its
    own dtype.
    """
    c, keys, residual = f.config, split_keys(key, 7), h_BTD.dtype
    p = gather_layer(p, layer_axes(llama_specs(c)))
    h_BTD = h_BTD.astype(accumulation_dtype(f.dtype))
    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, f.dtype)
    o_BTHE, extra = attend(*project_qkv(c, p["attn"], x, angles, keys[:3]))
    o = o_BTHE.reshape(*x.shape[:2], c.heads * c.head_dim)
    o = saveable(constrain(linear(o, p["attn"]["o"], keys[3]), "rows", "time", "act_width"), "o")
    h_BTD = h_BTD + o.astype(h_BTD.dtype)
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, f.dtype)
    down = constrain(gated_mlp(p["mlp"], x, keys[4:]), "rows", "time", "act_width")
    return (h_BTD + down.astype(h_BTD.dtype)).astype(residual), extra


def hidden(
    f: ForwardOptions[LlamaConfig], params: Params, tokens: Batch, key: Array | None = None
) -> Float[Array, "B T D"]:
    """Return the hidden states after the final norm, in the compute dtype."""
    c = f.config
    check_context_divides(tokens.ids.shape[1])
    positions = constrain(tokens.positions, "rows", "time")
    lengths = example_lengths(positions, tokens.segments) if needs_lengths(c.rope) else None
    angles = rope_angles(c.rope, c.head_dim, positions, lengths, f.dtype)
    keys = None if key is None else jax.random.split(key, c.layers)
    h = embed_tokens(params["embed"], tokens.ids, f.dtype, f.residual)
    h = scan_layers(partial(block, f, angles), h, params["layers"], tokens, keys, f.remat)
    return rms_norm(h, params["final_norm"], c.norm_eps, f.dtype)


def prefill(
    f: ForwardOptions[LlamaConfig], params: Params, tokens: Batch, size: int
) -> tuple[Float[Array, "B T D"], Cache]:
    """Return hidden states [B, T, D] of left-padded prompts and a key/value cache with `size` slots a row."""
    c, positions = f.config, tokens.positions
    slots = jnp.arange(positions.shape[1], dtype=positions.dtype)
    angles = rope_angles(c.rope, c.head_dim, positions, cache_lengths(positions, slots, size), f.dtype)
    h = embed_tokens(params["embed"], tokens.ids, f.dtype, f.residual)
    h, cache = prefill_layers(partial(block, f, angles), h, params["layers"], tokens, size)
    return rms_norm(h, params["final_norm"], c.norm_eps, f.dtype), cache


def decode(
    f: ForwardOptions[LlamaConfig],
    params: Params,
    cache: Cache,
    ids: Int[Array, "B"],
    positions: Int[Array, "B"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "B D"], Cache]:
    """Decode one token a row into `slot`; return hidden states [B, D] and the cache."""
    c, size = f.config, cache["visible"].shape[1]
    lengths = cache_lengths(positions[:, None], slot[None].astype(positions.dtype), size)
    angles = rope_angles(c.rope, c.head_dim, positions[:, None], lengths, f.dtype)
    h = embed_tokens(params["embed"], ids[:, None], f.dtype, f.residual)
    h, cache = decode_layers(partial(block, f, angles), h, params["layers"], cache, slot)
    return rms_norm(h[:, 0], params["final_norm"], c.norm_eps, f.dtype), cache


def llama(
    config: LlamaConfig,
    dtype: DTypeLike = jnp.bfloat16,
    remat: RematPolicy = "projections",
    residual: DTypeLike | None = None,
) -> Model:
    """Build the Model of a Llama config. dtype, remat, residual: see ForwardOptions."""
    f = forward_options(config, dtype, remat, residual)
    return Model(
        config=config,
        specs=llama_specs(config),
        weight_names={path: WEIGHT_NAMES[path] for path in WEIGHT_NAMES if path != "head" or not config.tied},
        dtype=f.dtype,
        residual=f.residual,
        hidden=partial(hidden, f),
        head=head_params,
        logits=lm_head,
        prefill=partial(prefill, f),
        decode=partial(decode, f),
        repeat_cache=repeat_cache,
        forward_flops=partial(dense_flops, config, llama_specs(config)),
    )
