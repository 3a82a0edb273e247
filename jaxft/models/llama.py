"""The Llama family: Llama 1 to 3.3, SmolLM2 and everything else with model_type "llama"."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxft.batch import Tokens
from jaxft.distributed.sharding import constrain, refuse_uncut
from jaxft.models.llama_config import PRESETS, LlamaConfig, RopeScaling, from_hf, inverse_frequencies, to_hf
from jaxft.models.model import Model
from jaxft.nn import fused_update
from jaxft.nn.attention import attention, cached_attention
from jaxft.nn.layers import (
    accumulator,
    embed,
    from_bits,
    gathered,
    linear,
    lm_head,
    remember,
    rms_norm,
    rope,
    swiglu,
    to_bits,
)
from jaxft.nn.param import ParamSpec, constant, fan_in, is_spec, normal

__all__ = ["PRESETS", "REMAT", "LlamaConfig", "RopeScaling", "from_hf", "llama", "to_hf"]

PROJECTIONS = ("q", "k", "v", "attn_out", "attn_lse", "o", "gate", "up")


@dataclass(frozen=True)
class Remat:
    """What is kept of a layer for its backward pass.

    saved: names of what is kept beside the layer's input; None keeps everything. layers: so many in a row are one block, of
    which only the input is kept. offload: the inputs wait in the host's pinned memory.
    """

    saved: tuple[str, ...] | None
    layers: int = 1
    offload: bool = False


REMAT = {
    "offload": Remat((), offload=True),  # the least device memory; inputs go to the host and come back
    "pairs": Remat((), layers=2),  # the input of every second layer; one layer more runs twice at a time
    "full": Remat(()),  # a layer's input only
    "attention": Remat(("attn_out", "attn_lse")),  # and what attention's backward pass needs beside q, k, v
    "projections": Remat(PROJECTIONS),  # and every product's output: no product runs twice
    "none": Remat(None),  # everything
}


@dataclass(frozen=True)
class Forward:
    """What a forward pass is told beside parameters and tokens: sizes, compute dtype, the residual stream's dtype, remat policy."""

    config: LlamaConfig
    dtype: Any
    residual: Any
    remat: str


def llama_specs(c: LlamaConfig) -> dict[str, Any]:
    """One line a parameter."""
    L, D, F, V = c.layers, c.width, c.mlp, c.vocab
    Q, K = c.heads * c.head_dim, c.kv_heads * c.head_dim
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "table_width"), normal(0.02)),
        "layers": {
            "attn_norm": ParamSpec((L, D), ("layers", "norm"), constant(1.0)),
            "attn": {
                "q": ParamSpec((L, D, Q), ("layers", "width", "heads"), fan_in(D), c.heads),
                "k": ParamSpec((L, D, K), ("layers", "width", "kv_heads"), fan_in(D), c.kv_heads),
                "v": ParamSpec((L, D, K), ("layers", "width", "kv_heads"), fan_in(D), c.kv_heads),
                "o": ParamSpec((L, Q, D), ("layers", "from_heads", "out_width"), fan_in(Q), c.heads),
            },
            "mlp_norm": ParamSpec((L, D), ("layers", "norm"), constant(1.0)),
            "mlp": {
                "gate": ParamSpec((L, D, F), ("layers", "width", "mlp"), fan_in(D)),
                "up": ParamSpec((L, D, F), ("layers", "width", "mlp"), fan_in(D)),
                "down": ParamSpec((L, F, D), ("layers", "from_mlp", "out_width"), fan_in(F)),
            },
        },
        "final_norm": ParamSpec((D,), ("norm",), constant(1.0)),
    }
    if not c.tied:
        specs["head"] = ParamSpec((D, V), ("table_width", "vocab"), fan_in(D))
    return specs


NAMES: dict[str, tuple[str, bool]] = {
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


def rope_angles(c: LlamaConfig, positions: Int[Array, "B T"], dtype: Any) -> tuple[Array, Array]:
    """cos and sin [B, T, E/2] of every position, in float32 or wider."""
    wide = accumulator(dtype)
    angles = positions[..., None].astype(wide) * jnp.asarray(inverse_frequencies(c), wide)
    return jnp.cos(angles), jnp.sin(angles)


def split_keys(key: Array | None, count: int) -> Any:
    """`count` keys, or as many Nones."""
    return (None,) * count if key is None else jax.random.split(key, count)


def project_qkv(c: LlamaConfig, p: Any, x_BTD: Array, angles: Any, keys: Any) -> tuple[Array, Array, Array]:
    """Queries [B, T, H, E] and keys, values [B, T, K, E] with rope applied, named for remat."""
    B, T, _ = x_BTD.shape
    q = linear(x_BTD, p["q"], keys[0]).reshape(B, T, c.heads, c.head_dim)
    k = linear(x_BTD, p["k"], keys[1]).reshape(B, T, c.kv_heads, c.head_dim)
    v = linear(x_BTD, p["v"], keys[2]).reshape(B, T, c.kv_heads, c.head_dim)
    q = constrain(rope(q, *angles), "rows", "time", "heads", "head_dim")
    k = constrain(rope(k, *angles), "rows", "time", "kv_heads", "head_dim")
    v = constrain(v, "rows", "time", "kv_heads", "head_dim")
    return remember(q, "q"), remember(k, "k"), remember(v, "v")


def mlp(p: Any, x_BTD: Array, keys: Any) -> Array:
    """down(silu(gate(x)) * up(x))."""
    gate = remember(constrain(linear(x_BTD, p["gate"], keys[0]), "rows", "time", "mlp"), "gate")
    up = remember(constrain(linear(x_BTD, p["up"], keys[1]), "rows", "time", "mlp"), "up")
    return linear(swiglu(gate, up), p["down"], keys[2])


def block(c: LlamaConfig, p: Any, h_BTD: Array, mix: Any, dtype: Any, key: Array | None) -> tuple[Array, Any]:
    """One layer on the residual stream, which is added up in float32 or wider and rounded once to the dtype that it came in.

    `mix(p, x, keys) -> (o [B, T, H, E], extra)` is the layer's attention.
    """
    keys, residual = split_keys(key, 7), h_BTD.dtype
    p = gathered(p, jax.tree.map(lambda spec: spec.axes[1:], llama_specs(c)["layers"], is_leaf=is_spec))
    h_BTD = h_BTD.astype(accumulator(dtype))
    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, dtype)
    o_BTHE, extra = mix(p["attn"], x, keys[:3])
    o = o_BTHE.reshape(*x.shape[:2], c.heads * c.head_dim)
    o = remember(constrain(linear(o, p["attn"]["o"], keys[3]), "rows", "time", "act_width"), "o")
    h_BTD = h_BTD + o.astype(h_BTD.dtype)
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, dtype)
    down = constrain(mlp(p["mlp"], x, keys[4:]), "rows", "time", "act_width")
    return (h_BTD + down.astype(h_BTD.dtype)).astype(residual), extra


def embed_tokens(run: Forward, params: Any, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream's start, rounded to the compute dtype as every product's output is."""
    h = embed(params["embed"], constrain(ids, "rows", "time"), run.dtype).astype(run.residual)
    return constrain(h, "rows", "time", "act_width")


def hidden(run: Forward, params: Any, tokens: Tokens, key: Array | None = None) -> Float[Array, "B T D"]:
    """Final hidden states after the last norm, in the compute dtype."""
    c, dtype = run.config, run.dtype
    refuse_uncut(tokens.ids.shape[1])
    angles = rope_angles(c, constrain(tokens.positions, "rows", "time"), dtype)

    def mix(p, x, keys):
        q, k, v = project_qkv(c, p, x, angles, keys)
        return attention(q, k, v, tokens.segments, tokens.branches, tokens.packed), None

    remat = REMAT[run.remat]

    def body(h, layer):
        p, layer_key = layer
        h = checkpoint_name(h, "layer_in") if remat.offload else h
        return block(c, p, h, mix, dtype, layer_key)[0], None

    keys = None if key is None else jax.random.split(key, c.layers)
    if isinstance(params["layers"], fused_update.Consumed):
        if run.remat != "full":
            raise ValueError(
                f"optim.fused_backward runs each layer again from its input: use remat=full, found remat={run.remat}"
            )
        h = fused_update.scan(body, embed_tokens(run, params, tokens.ids), params["layers"], keys)
        return rms_norm(h, params["final_norm"], c.norm_eps, dtype)
    layers = params["layers"], keys
    if remat.layers > 1:
        if c.layers % remat.layers:
            raise ValueError(
                f"remat={run.remat} takes layers by {remat.layers}, and the model has {c.layers}; use remat=full"
            )
        layers = jax.tree.map(
            lambda x: x.reshape(c.layers // remat.layers, remat.layers, *x.shape[1:]), layers
        )
        inner = jax.checkpoint(body, policy=_policy(remat), prevent_cse=False)
        body = lambda h, some: jax.lax.scan(inner, h, some)  # noqa: E731
    if remat.saved is not None:
        body = jax.checkpoint(body, policy=_policy(remat), prevent_cse=False)
    h, _ = jax.lax.scan(body, embed_tokens(run, params, tokens.ids), layers)
    return rms_norm(h, params["final_norm"], c.norm_eps, dtype)


def _policy(remat: Remat) -> Any:
    policies, saved = jax.checkpoint_policies, remat.saved or ()
    if not remat.offload:
        return policies.save_only_these_names(*saved)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(saved),
        names_which_can_be_offloaded=["layer_in"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def head(params: Any) -> Any:
    """What logits reads: the head, or for a tied one the table and the adapter on it."""
    own = params.get("head")
    tied = own is None or getattr(own, "weight", own) is None
    return {name: params[name] for name in ("embed", "head") if name in params and (tied or name == "head")}


def as_cached_k(k_BTKE: Array) -> Array:
    """Keys in the cache's layout, [B, K, E, T], as bits."""
    return to_bits(k_BTKE.transpose(0, 2, 3, 1))


def as_cached_v(v_BTKE: Array) -> Array:
    """Values in the cache's layout, [B, K, T, E], as bits."""
    return to_bits(v_BTKE.swapaxes(1, 2))


def with_room(x: Array, axis: int, room: int) -> Array:
    """`room` more places, zero, at the end of an axis."""
    return jnp.pad(x, [(0, room if i == axis else 0) for i in range(x.ndim)])


def prefill(run: Forward, params: Any, tokens: Tokens, size: int) -> tuple[Array, dict[str, Array]]:
    """Hidden states [B, T, D] of the prompts and a key/value cache with room for `size` tokens a row.

    Prompts are left-padded (segments 0), so that every row writes its next token to the same slot. Cache: k
    [L, B, K, E, size] and v [L, B, K, size, E] as raw bits (see attention.decode), visible [B, size].
    """
    c, dtype = run.config, run.dtype
    angles = rope_angles(c, tokens.positions, dtype)

    def mix(p, x, keys):
        q, k, v = project_qkv(c, p, x, angles, keys)
        o = attention(q, k, v, tokens.segments, tokens.branches, tokens.packed)
        return o, (as_cached_k(k), as_cached_v(v))

    start = embed_tokens(run, params, tokens.ids)
    h, (k, v) = jax.lax.scan(lambda h, p: block(c, p, h, mix, dtype, None), start, params["layers"])
    room = size - tokens.ids.shape[1]
    visible = jnp.pad(tokens.segments > 0, ((0, 0), (0, room)))
    cache = {"k": with_room(k, 4, room), "v": with_room(v, 3, room), "visible": visible}
    return rms_norm(h, params["final_norm"], c.norm_eps, dtype), cache


def repeat_cache(cache: dict[str, Array], count: int) -> dict[str, Array]:
    """A cache with each row `count` times, for as many completions of each prompt."""
    if count == 1:
        return cache
    return {name: jnp.repeat(x, count, axis=0 if name == "visible" else 1) for name, x in cache.items()}


def decode(
    run: Forward, params: Any, cache: Any, ids: Int[Array, "B"], positions: Int[Array, "B"], at: Array
) -> tuple[Float[Array, "B D"], dict[str, Array]]:
    """Decode one token a row into slot `at`: hidden [B, D] and the cache, which is carried and updated in place."""
    c, dtype = run.config, run.dtype
    angles = rope_angles(c, positions[:, None], dtype)
    visible = cache["visible"] | (jnp.arange(cache["visible"].shape[1]) == at)[None]
    zero = jnp.zeros_like(at)  # of one integer type, whatever literals would have

    def body(carry, layer):
        h, k_all, v_all = carry
        p, i = layer

        def mix(p, x, keys):
            q, k, v = project_qkv(c, p, x, angles, keys)
            k_new = jax.lax.dynamic_update_slice(k_all, as_cached_k(k)[None], (i, zero, zero, zero, at))
            v_new = jax.lax.dynamic_update_slice(v_all, as_cached_v(v)[None], (i, zero, zero, at, zero))
            k_BKES, v_BKSE = (
                from_bits(jax.lax.dynamic_index_in_dim(x, i, 0, False), dtype) for x in (k_new, v_new)
            )
            return cached_attention(q[:, 0], k_BKES, v_BKSE, visible)[:, None], (k_new, v_new)

        h, (k_all, v_all) = block(c, p, h, mix, dtype, None)
        return (h, k_all, v_all), None

    start = (embed_tokens(run, params, ids[:, None]), cache["k"], cache["v"])
    (h, k, v), _ = jax.lax.scan(body, start, (params["layers"], jnp.arange(c.layers, dtype=at.dtype)))
    return rms_norm(h[:, 0], params["final_norm"], c.norm_eps, dtype), {"k": k, "v": v, "visible": visible}


def forward_flops(c: LlamaConfig, tokens: int, context: int) -> float:
    """Multiply-adds count two: every weight of the blocks and the head once a token, and causal attention over `context`."""
    per_layer = c.width * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.width * c.mlp
    scores = 2 * c.heads * c.head_dim * context / 2
    return 2.0 * tokens * (c.layers * (per_layer + scores) + c.width * c.vocab)


def llama(
    config: LlamaConfig,
    dtype: Any = jnp.bfloat16,
    remat: str = "projections",
    residual: Any = None,
) -> Model:
    """The Model of a Llama config.

    remat: what a layer keeps for its backward pass, a key of REMAT. residual: the dtype of the residual stream between layers, float32 or wider by default;
    bfloat16 halves what is kept of it, and rounds once a layer.
    """
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is not known; use one of {', '.join(REMAT)}")
    residual = accumulator(dtype) if residual is None else jnp.dtype(residual)
    forward = Forward(config, dtype, residual, remat)
    return Model(
        config=config,
        specs=llama_specs(config),
        hidden=partial(hidden, forward),
        logits=lambda head, h: lm_head(h, head),
        head=head,
        prefill=partial(prefill, forward),
        repeat_cache=repeat_cache,
        decode=partial(decode, forward),
        weight_names={path: NAMES[path] for path in NAMES if path != "head" or not config.tied},
        forward_flops=partial(forward_flops, config),
        dtype=dtype,
        residual=residual,
    )
