"""The model around the layers of every dense decoder family, and functions that compute parts of layers.

A family (llama.py, qwen.py, ...) declares a `DenseArchitecture`: its parameters, their names in Hugging Face
files, the attention settings of each layer, and one function that computes a layer. `dense_model` builds the
Model from it.

To add mixture-of-experts layers, a family calls an MLP function of its own in its layer function and declares
kernels [L, X, D, F] with axes ("layers", "experts", "width", "mlp"), with {x} for the expert in their names.
Adapters, quantisation, files, optimizers and plans work on them as on other kernels. It also needs its own
forward_flops: dense_flops counts every kernel as used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxft.distributed.sharding import check_context_divides, constrain
from jaxft.models.dense_config import Activation, DenseConfig
from jaxft.models.model import ForwardOptions, Model, dense_flops, forward_options, layer_axes
from jaxft.nn.attention import AttentionSettings
from jaxft.nn.cache import (
    Cache,
    CacheFormat,
    GivenChunk,
    LayerKeys,
    NextToken,
    PromptKeys,
    empty_keys,
    row_slots,
)
from jaxft.nn.decode_layers import decode_layers, extend_layers, prefill_layers
from jaxft.nn.layer_attention import Attend, AttentionLayers
from jaxft.nn.layers import (
    biased_linear,
    embed_tokens,
    gated_mlp,
    neftune_noise,
    rms_norm,
    saveable,
    split_keys,
)
from jaxft.nn.lm_head import head_params, lm_head
from jaxft.nn.matmul import gather_layer
from jaxft.nn.param import ParamSpec, Specs, fan_in, full, normal, spec_paths
from jaxft.nn.products import accumulation_dtype
from jaxft.nn.scan import Layer, LayerOptions, RematPolicy, run_layer, scan_layers
from jaxft.nn.tensor_names import TensorName, WeightNames
from jaxft.tree import Batch, Params

# (options, params, h [B, T, D], attend, dropout key) -> (h, second result of attend); see nn/scan.py.
LayerFunction = Callable[[ForwardOptions, Params, Array, Attend, Array | None], tuple[Array, Any]]
Norm = Callable[[Array, Array, float, DTypeLike], Array]
ACTIVATION_FUNCTIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class DenseArchitecture:
    """A family's parameters and functions, from which dense_model builds its Model.

    specs: the parameters. names: their tensor names in Hugging Face files. layer: computes one layer.
    attention: rope, window and soft cap of each layer. norm: the final norm. embed_scale: factor on the
    embeddings, None for 1. logits: (head parameters, h) -> logits.
    """

    specs: Specs
    names: WeightNames
    layer: LayerFunction
    attention: AttentionLayers
    norm: Norm = rms_norm
    embed_scale: float | None = None
    logits: Callable[[Params, Array], Array] = lm_head


@dataclass(frozen=True)
class Decoder:
    """An architecture with its compute options."""

    options: ForwardOptions
    architecture: DenseArchitecture


def dense_model(
    config: DenseConfig,
    architecture: DenseArchitecture,
    dtype: DTypeLike = jnp.bfloat16,
    remat: RematPolicy = "projections",
    residual: DTypeLike | None = None,
    attention_settings: AttentionSettings = AttentionSettings(),
) -> Model:
    """Build the Model of an architecture. dtype, remat, residual: see ForwardOptions. attention_settings:
    their soft cap is replaced by the architecture's.
    """
    settings = replace(attention_settings, softcap=architecture.attention.settings.softcap)
    layers = replace(architecture.attention, settings=settings)
    architecture = replace(architecture, attention=layers)
    d = Decoder(forward_options(config, dtype, remat, residual), architecture)
    return Model(
        config=config,
        specs=architecture.specs,
        weight_names=architecture.names,
        attention=layers,
        dtype=d.options.dtype,
        residual=d.options.residual,
        hidden=partial(hidden, d),
        embed=partial(_embed, d),
        layer=partial(layer_forward, d),
        head=head_params,
        logits=architecture.logits,
        prefill=partial(prefill, d),
        extend=partial(extend, d),
        decode=partial(decode, d),
        empty_cache=partial(empty_cache, d),
        forward_flops=partial(dense_flops, config, architecture.specs, architecture.attention),
    )


def _embed(d: Decoder, params: Params, ids: Int[Array, "B T"]) -> Array:
    f, arch = d.options, d.architecture
    h = embed_tokens(params["embed"], ids, f.dtype, f.residual)
    if arch.embed_scale is None:
        return h
    scale = jnp.asarray(arch.embed_scale, f.dtype)  # rounded to the compute dtype, as in transformers
    return (h.astype(f.dtype) * scale).astype(f.residual)


def _one_layer(d: Decoder) -> Layer:
    """Return the layer function for nn/scan.py. It gathers the layer's parameters, adds to the residual
    stream in float32 or wider, and rounds that once, to its own dtype.
    """
    f, arch = d.options, d.architecture

    def layer(p: Params, h: Array, attend: Attend, key: Array | None) -> tuple[Array, Any]:
        p = gather_layer(p, layer_axes(arch.specs))
        out, extra = arch.layer(f, p, h.astype(accumulation_dtype(f.dtype)), attend, key)
        return out.astype(h.dtype), extra

    return layer


def _final_norm(d: Decoder, params: Params, h: Array) -> Array:
    return d.architecture.norm(h, params["final_norm"], d.options.config.norm_eps, d.options.dtype)


def hidden(
    d: Decoder, params: Params, tokens: Batch, key: Array | None = None, neftune: float = 0.0
) -> Float[Array, "B T D"]:
    """Return the hidden states after the final norm, in the compute dtype. neftune: alpha of the noise that
    is added to the (scaled) embeddings if there is a key.
    """
    check_context_divides(tokens.ids.shape[1])
    layers = d.options.config.layers
    keys = None if key is None else jax.random.split(key, layers)
    h = _embed(d, params, tokens.ids)
    if key is not None and neftune:
        noise = neftune_noise(jax.random.fold_in(key, layers), tokens.segments, h.shape[-1], neftune)
        wide = accumulation_dtype(h.dtype)
        h = (h.astype(wide) + noise.astype(wide)).astype(h.dtype)
    options = LayerOptions(d.architecture.attention, d.options.remat)
    h = scan_layers(_one_layer(d), h, params["layers"], tokens, keys, options)
    return _final_norm(d, params, h)


def layer_forward(
    d: Decoder, params: Params, h_BTD: Float[Array, "B T D"], tokens: Batch, kind: Any = None
) -> Float[Array, "B T D"]:
    """Return the residual stream after one layer. params: the layer's, without the stacked axis. kind: its
    number in attention.kind_numbers; None if that is None.
    """
    return run_layer(_one_layer(d), h_BTD, params, tokens, d.architecture.attention, kind)


def prefill(d: Decoder, params: Params, tokens: Batch, new: int) -> tuple[Float[Array, "P T D"], PromptKeys]:
    """Return hidden states [P, T, D] of left-padded prompts, and their keys. new: the most tokens of a
    completion.
    """
    h, layers = _embed(d, params, tokens.ids), params["layers"]
    h, keys = prefill_layers(_one_layer(d), h, layers, tokens, new, d.architecture.attention)
    return _final_norm(d, params, h), keys


def extend(
    d: Decoder, params: Params, cache: Cache, chunk: GivenChunk
) -> tuple[Float[Array, "r C D"], Cache]:
    """Process a chunk of given tokens per row. Return hidden states [r, C, D] and the cache with them."""
    h = _embed(d, params, chunk.ids)
    h, cache = extend_layers(_one_layer(d), h, params["layers"], cache, chunk, d.architecture.attention)
    return _final_norm(d, params, h), cache


def decode(
    d: Decoder, params: Params, cache: Cache, ids: Int[Array, " R"], at: NextToken
) -> tuple[Float[Array, "R D"], Cache]:
    """Process one token per row. Return hidden states [R, D] and the cache with it."""
    h = _embed(d, params, ids[:, None])
    h, cache = decode_layers(_one_layer(d), h, params["layers"], cache, at, d.architecture.attention)
    return _final_norm(d, params, h)[:, 0], cache


def empty_cache(
    d: Decoder, prompts: tuple[int, int], rows: int, new: int, stored: CacheFormat = "compute"
) -> Cache:
    """Return a cache without any tokens. prompts: their number, and slots of each. rows: of `new` tokens."""
    (count, size), a = prompts, d.architecture.attention

    def keys(rows: int, slots: int) -> LayerKeys:
        return empty_keys(a, d.options.config.kv_heads, rows, slots, d.options.dtype, stored)

    return Cache(
        PromptKeys(keys(count, size), jnp.zeros((count, size), bool)), keys(rows, row_slots(new)), new
    )


# Parts of layers. The residual stream is summed in float32 or wider; matmuls use the compute dtype.


def no_norms(p: Params, q: Array, k: Array) -> tuple[Array, Array]:
    """Return queries and keys unchanged, for families that don't normalise them."""
    return q, k


def self_attention(
    c: DenseConfig,
    p: Params,
    x_BTD: Float[Array, "B T D"],
    attend: Attend,
    keys: Any,
    norms: Callable[[Params, Array, Array], tuple[Array, Array]] = no_norms,
) -> tuple[Float[Array, "B T D"], Any]:
    """Compute attention with its four projections. Return it and the second result of `attend`.

    keys: the dropout keys of q, k, v and o; None disables dropout. norms(p, q [B, T, H, E], k [B, T, K, E]):
    applied to queries and keys before rope.
    """
    B, T, _ = x_BTD.shape
    q = biased_linear(p, "q", x_BTD, keys[0]).reshape(B, T, c.heads, c.head_dim)
    k = biased_linear(p, "k", x_BTD, keys[1]).reshape(B, T, c.kv_heads, c.head_dim)
    v = biased_linear(p, "v", x_BTD, keys[2]).reshape(B, T, c.kv_heads, c.head_dim)
    o_BTHE, extra = attend(*norms(p, q, k), v)
    return attention_output(p, o_BTHE, keys[3]), extra


def attention_output(p: Params, o_BTHE: Float[Array, "B T H E"], key: Any) -> Float[Array, "B T D"]:
    """Apply the output projection to the attended heads."""
    B, T, H, E = o_BTHE.shape
    o = biased_linear(p, "o", o_BTHE.reshape(B, T, H * E), key)
    return saveable(constrain(o, "rows", "time", "act_width"), "o")


def dense_mlp(c: DenseConfig, p: Params, x_BTD: Float[Array, "B T D"], keys: Any) -> Float[Array, "B T D"]:
    """Compute the gated MLP with the config's activation. keys: the dropout keys of gate, up and down."""
    down = gated_mlp(p, x_BTD, keys, ACTIVATION_FUNCTIONS[c.activation])
    return constrain(down, "rows", "time", "act_width")


def prenorm_layer(
    f: ForwardOptions, p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None,
    norms: Callable[[Params, Array, Array], tuple[Array, Array]] = no_norms,
) -> tuple[Float[Array, "B T D"], Any]:  # fmt: skip
    """Compute Llama's layer: `h += attention(norm(h)); h += mlp(norm(h))`."""
    c, keys = f.config, split_keys(key, 7)
    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, f.dtype)
    o, extra = self_attention(c, p["attn"], x, attend, keys[:4], norms)
    h_BTD = h_BTD + o.astype(h_BTD.dtype)
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, f.dtype)
    return h_BTD + dense_mlp(c, p["mlp"], x, keys[4:]).astype(h_BTD.dtype), extra


def head_norms(c: DenseConfig, dtype: DTypeLike, norm: Norm = rms_norm) -> Callable:
    """Return a `norms` function for self_attention that normalises each head (q_norm and k_norm [E])."""

    def norms(p: Params, q: Array, k: Array) -> tuple[Array, Array]:
        return norm(q, p["q_norm"], c.norm_eps, dtype), norm(k, p["k_norm"], c.norm_eps, dtype)

    return norms


# Parameter declarations that many families share.


def llama_specs(c: DenseConfig) -> dict[str, Any]:
    """Declare Llama's parameters."""
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


def qkv_biases(c: DenseConfig) -> dict[str, ParamSpec]:
    """Declare the biases of the q, k and v projections."""
    Q, K = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "q_bias": ParamSpec((c.layers, Q), ("layers", "heads"), full(0.0), c.heads),
        "k_bias": ParamSpec((c.layers, K), ("layers", "kv_heads"), full(0.0), c.kv_heads),
        "v_bias": ParamSpec((c.layers, K), ("layers", "kv_heads"), full(0.0), c.kv_heads),
    }


def attention_biases(c: DenseConfig) -> dict[str, ParamSpec]:
    """Declare the biases of the q, k, v and o projections."""
    return qkv_biases(c) | {"o_bias": ParamSpec((c.layers, c.width), ("layers", "norm"), full(0.0))}


def mlp_biases(c: DenseConfig) -> dict[str, ParamSpec]:
    """Declare the biases of the gate, up and down projections."""
    L, D, F = c.layers, c.width, c.mlp
    return {
        "gate_bias": ParamSpec((L, F), ("layers", "mlp"), full(0.0)),
        "up_bias": ParamSpec((L, F), ("layers", "mlp"), full(0.0)),
        "down_bias": ParamSpec((L, D), ("layers", "norm"), full(0.0)),
    }


def with_biases(specs: dict[str, Any], c: DenseConfig, attention: bool, mlp: bool) -> dict[str, Any]:
    """Return `specs` with biases added to attention, to the MLP, or to both."""
    layers = dict(specs["layers"])
    if attention:
        layers["attn"] = layers["attn"] | attention_biases(c)
    if mlp:
        layers["mlp"] = layers["mlp"] | mlp_biases(c)
    return {**specs, "layers": layers}


LLAMA_NAMES: WeightNames = {
    "embed": TensorName("model.embed_tokens.weight"),
    "layers/attn_norm": TensorName("model.layers.{i}.input_layernorm.weight"),
    "layers/attn/q": TensorName("model.layers.{i}.self_attn.q_proj.weight", True),
    "layers/attn/k": TensorName("model.layers.{i}.self_attn.k_proj.weight", True),
    "layers/attn/v": TensorName("model.layers.{i}.self_attn.v_proj.weight", True),
    "layers/attn/o": TensorName("model.layers.{i}.self_attn.o_proj.weight", True),
    "layers/mlp_norm": TensorName("model.layers.{i}.post_attention_layernorm.weight"),
    "layers/mlp/gate": TensorName("model.layers.{i}.mlp.gate_proj.weight", True),
    "layers/mlp/up": TensorName("model.layers.{i}.mlp.up_proj.weight", True),
    "layers/mlp/down": TensorName("model.layers.{i}.mlp.down_proj.weight", True),
    "final_norm": TensorName("model.norm.weight"),
    "head": TensorName("lm_head.weight", True),
    # parameters of some families only
    "layers/attn/q_bias": TensorName("model.layers.{i}.self_attn.q_proj.bias"),
    "layers/attn/k_bias": TensorName("model.layers.{i}.self_attn.k_proj.bias"),
    "layers/attn/v_bias": TensorName("model.layers.{i}.self_attn.v_proj.bias"),
    "layers/attn/o_bias": TensorName("model.layers.{i}.self_attn.o_proj.bias"),
    "layers/mlp/gate_bias": TensorName("model.layers.{i}.mlp.gate_proj.bias"),
    "layers/mlp/up_bias": TensorName("model.layers.{i}.mlp.up_proj.bias"),
    "layers/mlp/down_bias": TensorName("model.layers.{i}.mlp.down_proj.bias"),
    "layers/attn/q_norm": TensorName("model.layers.{i}.self_attn.q_norm.weight"),
    "layers/attn/k_norm": TensorName("model.layers.{i}.self_attn.k_norm.weight"),
}


def names_of(specs: Specs, others: WeightNames | None = None) -> WeightNames:
    """Return the Hugging Face name of every parameter in `specs`. others: names that the family adds to
    Llama's, or has in place of them.
    """
    known = LLAMA_NAMES | (others or {})
    return {path: known[path] for path in spec_paths(specs)}
