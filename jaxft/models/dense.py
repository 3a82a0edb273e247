"""Build the Model of a dense decoder family from its layers; functions that compute usual parts of layers.

A family (llama.py, qwen.py, ...) declares a `DecoderSpec`: its parameters, their names in Hugging Face
files, the attention settings of each layer, and the functions that compute the layers of its stacks; most
have `one_stack` of layers that are all alike. `dense_model` builds the Model from it.

To add mixture-of-experts layers, a family calls its MLP function in its layer function and declares
kernels [L, X, D, F] with axes ("layers", "experts", "width", "mlp"), with {x} for the expert in their names.
Adapters, quantisation, files, optimizers and plans work on them as on other kernels. It also needs its own
forward_flops: dense_flops counts every kernel as used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxft.distributed.sharding import check_context_divides, constrain
from jaxft.models.dense_config import Activation, ConfigFormat, DenseConfig, fields_from_hf, fields_to_hf
from jaxft.models.model import ForwardOptions, Model, dense_flops
from jaxft.nn import tree
from jaxft.nn.attention.attention import AttentionSettings
from jaxft.nn.attention.attention_mixer import attention_mixer
from jaxft.nn.attention.kv_cache import Cache, CacheFormat, GivenChunk, NextToken, PromptKeys
from jaxft.nn.attention.layer_attention import Attend, AttentionLayers, Extras
from jaxft.nn.layers import (
    biased_linear,
    embed_tokens,
    gated_mlp,
    head_params,
    lm_head,
    neftune_noise,
    rms_norm,
    saveable,
    split_keys,
)
from jaxft.nn.matmul import accumulation_dtype, gather_layer
from jaxft.nn.param_spec import ParamSpec, Specs, fan_in, full, is_spec, normal, spec_paths
from jaxft.nn.stack import (
    REMAT,
    BlockLayer,
    Layer,
    Mix,
    Mixer,
    Observe,
    RematPolicy,
    RowOptions,
    Stack,
    Stacks,
    layer_places,
    layers_of,
    run_stacks,
    scan_stacks,
)
from jaxft.nn.tensor_names import TensorName, WeightNames
from jaxft.nn.tree import Batch, LayerOutputs, Params

# (options, params, h [B, T, D], mix, dropout key) -> (h, the extras of mix); see nn/stack.py.
LayerFunction = Callable[[ForwardOptions, Params, Array, Mix, Array | None], tuple[Array, Extras]]
Norm = Callable[[Array, Array, float, DTypeLike], Array]
ACTIVATION_FUNCTIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class LayerSpec:
    """A layer of a stack's blocks. layer: the function that computes it. mixer(config, attention settings of
    these layers) -> its Mixer. name: the key of its parameters in the stack's parameters; "" if a block has
    one layer.
    """

    layer: LayerFunction
    mixer: Callable[[DenseConfig, AttentionLayers], Mixer]
    name: str = ""


@dataclass(frozen=True)
class StackSpec:
    """A stack of `blocks` equal blocks of layers. name: the key of its parameters in the model's tree."""

    name: str
    blocks: int
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True)
class DecoderSpec:
    """A family's parameters and functions, from which dense_model builds its Model.

    specs: the parameters. names: their tensor names in Hugging Face files. stacks: the layers. attention:
    rope, window and soft cap of each layer of the model; None in its layout for a recurrent layer. norm: the
    final norm. embed_scale: factor on the embeddings, None for 1. logits: (head parameters, h) -> logits.
    """

    specs: Specs
    names: WeightNames
    stacks: tuple[StackSpec, ...]
    attention: AttentionLayers
    norm: Norm = rms_norm
    embed_scale: float | None = None
    logits: Callable[[Params, Array], Array] = lm_head


def with_attention(config: DenseConfig, attention: AttentionLayers) -> Mixer:
    """Return the Mixer of layers with attention, as a LayerSpec's `mixer`."""
    return attention_mixer(attention, config.kv_heads)


def one_stack(
    specs: Specs,
    layer: LayerFunction,
    attention: AttentionLayers,
    names: WeightNames | None = None,
    **more: Any,
) -> DecoderSpec:
    """Return the DecoderSpec of a family whose layers all have attention and are computed by one function.

    names: of parameters, see names_of. more: further fields of the DecoderSpec.
    """
    stack = StackSpec("layers", len(attention.layout), (LayerSpec(layer, with_attention),))
    return DecoderSpec(specs, names_of(specs, names), (stack,), attention, **more)


@dataclass(frozen=True)
class Family:
    """A family's functions and data.

    config: the class of its configs. form: how its config.json differs from other families'. decoder(config)
    -> the DecoderSpec. presets: configs by checkpoint name. read(hf, form) -> the fields of a config as a
    dict, from the dict of a config.json; it raises ValueError for a missing or unsupported setting.
    write(config, form) -> the dict of a config.json.
    """

    config: type
    form: ConfigFormat
    decoder: Callable[[Any], DecoderSpec]
    presets: Mapping[str, DenseConfig]
    read: Callable[[dict[str, Any], ConfigFormat], dict[str, Any]] = fields_from_hf
    write: Callable[[Any, ConfigFormat], dict[str, Any]] = fields_to_hf

    def build(self, config: Any, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
        """Build the Model of a config. options: further arguments of dense_model."""
        return dense_model(config, self.decoder(config), dtype, **options)

    def from_hf(self, hf: dict[str, Any]) -> DenseConfig:
        """Return the config for the dict of a config.json; see `read` for its errors."""
        return self.config(**self.read(hf, self.form))

    def to_hf(self, config: Any) -> dict[str, Any]:
        """Return the dict of the config.json for a config."""
        return self.write(config, self.form)


@dataclass(frozen=True)
class Decoder:
    """A DecoderSpec, the compute options, and the layers that are built with these options."""

    options: ForwardOptions
    architecture: DecoderSpec
    stacks: Stacks


def dense_model(
    config: DenseConfig,
    architecture: DecoderSpec,
    dtype: DTypeLike,
    remat: RematPolicy = "projections",
    residual: DTypeLike | None = None,
    attention_settings: AttentionSettings = AttentionSettings(),
) -> Model:
    """Build the Model of an architecture. Raises ValueError for an unknown remat policy.

    dtype, remat: see ForwardOptions. residual: dtype of the residual stream between layers, None for float32
    or wider; bfloat16 halves the memory of layers' inputs, and rounds the stream once per layer.
    attention_settings: choose a kernel; the soft cap is the architecture's.
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat={remat!r}; use one of {', '.join(REMAT)}")
    settings = replace(attention_settings, softcap=architecture.attention.settings.softcap)
    layers = replace(architecture.attention, settings=settings)
    stream = accumulation_dtype(dtype) if residual is None else jnp.dtype(residual)
    options = ForwardOptions(config, dtype, stream, remat)
    d = Decoder(options, architecture, _stacks(options, architecture, layers))
    return Model(
        config=config,
        specs=_numbered(architecture.specs, d.stacks),
        weight_names=architecture.names,
        attention=layers,
        stacks=d.stacks,
        dtype=d.options.dtype,
        residual=d.options.residual,
        hidden=partial(hidden, d),
        embed=partial(_embed, d),
        head=head_params,
        logits=architecture.logits,
        prefill=partial(prefill, d),
        extend=partial(extend, d),
        decode=partial(decode, d),
        empty_cache=partial(empty_cache, d),
        forward_flops=partial(dense_flops, config, architecture.specs, architecture.attention),
    )


def _stacks(options: ForwardOptions, architecture: DecoderSpec, attention: AttentionLayers) -> Stacks:
    """Return the architecture's layers with their compute options and attention settings."""
    stacks, first = list[Stack](), 0
    for stack in architecture.stacks:
        layers, end = list[BlockLayer](), first + stack.blocks * len(stack.layers)
        for i, spec in enumerate(stack.layers):
            numbers = range(first + i, end, len(stack.layers))
            specs = architecture.specs[stack.name]
            run = _one_layer(options, spec.layer, specs[spec.name] if spec.name else specs)
            layers.append(
                BlockLayer(run, spec.mixer(options.config, attention.part(numbers)), numbers, spec.name)
            )
        stacks.append(Stack(stack.name, tuple(layers)))
        first = end
    return tuple(stacks)


def _numbered(specs: Specs, stacks: Stacks) -> Specs:
    """Set the `numbers` of stacked specs (see ParamSpec), unless the default, 0, 1, ..., is right."""
    if len(layers_of(stacks)) == 1:
        return specs
    numbers = {place.path: place.layer.numbers for place in layer_places(stacks)}

    def of(path: str, spec: ParamSpec) -> ParamSpec:
        stacked = [x for above, x in numbers.items() if path.startswith(f"{above}/")]
        return replace(spec, numbers=stacked[0]) if stacked else spec

    return tree.map_with_path(of, specs, is_leaf=is_spec)


def _embed(d: Decoder, params: Params, ids: Int[Array, "B T"]) -> Array:
    f, arch = d.options, d.architecture
    h = embed_tokens(params["embed"], ids, f.dtype, f.residual)
    if arch.embed_scale is None:
        return h
    scale = jnp.asarray(arch.embed_scale, f.dtype)  # rounded to the compute dtype, as in transformers
    return (h.astype(f.dtype) * scale).astype(f.residual)


def _one_layer(f: ForwardOptions, compute: LayerFunction, specs: Specs) -> Layer:
    """Wrap `compute` as a layer function for nn/stack.py, which first gathers the layer's parameters.

    `compute` gets the residual stream in float32 or wider; its result is rounded once, to the stream's dtype.
    """

    axes = jax.tree.map(lambda spec: spec.axes[1:], specs, is_leaf=is_spec)  # without the stacked axis

    def layer(p: Params, h: Array, mix: Mix, key: Array | None) -> tuple[Array, Extras]:
        p = gather_layer(p, axes)
        out, extras = compute(f, p, h.astype(accumulation_dtype(f.dtype)), mix, key)
        return out.astype(h.dtype), extras

    return layer


def _final_norm(d: Decoder, params: Params, h: Array) -> Array:
    return d.architecture.norm(h, params["final_norm"], d.options.config.norm_eps, d.options.dtype)


def hidden(
    d: Decoder,
    params: Params,
    tokens: Batch,
    key: Array | None = None,
    neftune: float = 0.0,
    observe: Observe | None = None,
) -> tuple[Float[Array, "B T D"], LayerOutputs]:
    """Return the hidden states after the final norm, in the compute dtype, and the layers' outputs.

    See Model.hidden. neftune: alpha of the noise that is added to the embeddings if there is a key.
    """
    check_context_divides(tokens.ids.shape[1])
    layers = d.options.config.layers
    keys = None if key is None else jax.random.split(key, layers)
    h = _embed(d, params, tokens.ids)
    if key is not None and neftune:
        noise = neftune_noise(jax.random.fold_in(key, layers), tokens.segments, h.shape[-1], neftune)
        wide = accumulation_dtype(h.dtype)
        h = (h.astype(wide) + noise.astype(wide)).astype(h.dtype)
    h, outputs = scan_stacks(d.stacks, h, params, tokens, keys, RowOptions(d.options.remat, observe))
    return _final_norm(d, params, h), outputs


def prefill(d: Decoder, params: Params, tokens: Batch, new: int) -> tuple[Float[Array, "P T D"], PromptKeys]:
    """Return the hidden states [P, T, D] of P left-padded prompts of T tokens, and their cache. new: the
    maximum number of tokens of a completion.
    """
    h = _embed(d, params, tokens.ids)
    h, parts = run_stacks(d.stacks, h, params, lambda _, mixer: mixer.prompts(tokens, new, h.dtype))
    return _final_norm(d, params, h), PromptKeys(parts, tokens.segments > 0)


def extend(
    d: Decoder, params: Params, cache: Cache, chunk: GivenChunk
) -> tuple[Float[Array, "r C D"], Cache]:
    """Append up to C given tokens to each of r rows. Return their hidden states [r, C, D] and the cache."""
    h = _embed(d, params, chunk.ids)
    h, rows = run_stacks(d.stacks, h, params, lambda i, mixer: mixer.chunk(cache.part(i), chunk, h.dtype))
    return _final_norm(d, params, h), replace(cache, rows=rows)


def decode(
    d: Decoder, params: Params, cache: Cache, ids: Int[Array, " R"], at: NextToken
) -> tuple[Float[Array, "R D"], Cache]:
    """Append one token to each of R rows. Return their hidden states [R, D] and the cache."""
    h = _embed(d, params, ids[:, None])
    h, rows = run_stacks(d.stacks, h, params, lambda i, mixer: mixer.token(cache.part(i), at, h.dtype))
    return _final_norm(d, params, h)[:, 0], replace(cache, rows=rows)


def empty_cache(
    d: Decoder, prompts: tuple[int, int], rows: int, new: int, stored: CacheFormat = "compute"
) -> Cache:
    """Return an empty cache. prompts: (number of prompts, token slots of a prompt). rows: the number of rows,
    each with slots for `new` tokens. stored: the format of keys and values.
    """
    parts = [
        layers.mixer.empty(prompts, (rows, new), d.options.dtype, stored) for layers in layers_of(d.stacks)
    ]
    of_prompts, of_rows = zip(*parts, strict=True)
    return Cache(PromptKeys(of_prompts, jnp.zeros(prompts, bool)), of_rows, new)


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
) -> tuple[Float[Array, "B T D"], Extras]:
    """Compute attention with its four projections. Return its output and the extras of `attend`.

    keys: the dropout keys of q, k, v and o; None disables dropout. norms(p, q [B, T, H, E], k [B, T, K, E])
    -> (q, k), applied before rope.
    """
    B, T, _ = x_BTD.shape
    q = biased_linear(p, "q", x_BTD, keys[0]).reshape(B, T, c.heads, c.head_dim)
    k = biased_linear(p, "k", x_BTD, keys[1]).reshape(B, T, c.kv_heads, c.head_dim)
    v = biased_linear(p, "v", x_BTD, keys[2]).reshape(B, T, c.kv_heads, c.head_dim)
    o_BTHE, extras = attend(*norms(p, q, k), v)
    return attention_output(p, o_BTHE, keys[3]), extras


def attention_output(p: Params, o_BTHE: Float[Array, "B T H E"], key: Any) -> Float[Array, "B T D"]:
    """Apply the output projection to the heads' attention outputs. key: for an adapter's dropout, or None."""
    B, T, H, E = o_BTHE.shape
    o = biased_linear(p, "o", o_BTHE.reshape(B, T, H * E), key)
    return saveable(constrain(o, "rows", "time", "act_width"), "o")


def dense_mlp(c: DenseConfig, p: Params, x_BTD: Float[Array, "B T D"], keys: Any) -> Float[Array, "B T D"]:
    """Compute the gated MLP with the config's activation. keys: the dropout keys of gate, up and down."""
    down = gated_mlp(p, x_BTD, keys, ACTIVATION_FUNCTIONS[c.activation])
    return constrain(down, "rows", "time", "act_width")


def prenorm_layer(
    f: ForwardOptions, p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None,
    multiplier: Array | None = None,
) -> tuple[Float[Array, "B T D"], Extras]:  # fmt: skip
    """Compute Llama's layer: `h += attention(norm(h)); h += mlp(norm(h))`; with norms of each head of q and k
    if the family declares them. multiplier: a factor on the outputs of attention and MLP, None for 1.
    """
    c, keys = f.config, split_keys(key, 7)
    norms = head_norms(c, f.dtype) if "q_norm" in p["attn"] else no_norms

    def add(h: Array, branch: Array) -> Array:
        branch = branch.astype(h.dtype)
        return h + (branch if multiplier is None else branch * multiplier)

    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, f.dtype)
    o, extras = self_attention(c, p["attn"], x, attend, keys[:4], norms)
    h_BTD = h_BTD + o.astype(h_BTD.dtype)
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, f.dtype)
    return h_BTD + dense_mlp(c, p["mlp"], x, keys[4:]).astype(h_BTD.dtype), extras


def head_norms(c: DenseConfig, dtype: DTypeLike) -> Callable:
    """Return a `norms` function for self_attention that normalises each head (q_norm and k_norm [E])."""

    def norms(p: Params, q: Array, k: Array) -> tuple[Array, Array]:
        return rms_norm(q, p["q_norm"], c.norm_eps, dtype), rms_norm(k, p["k_norm"], c.norm_eps, dtype)

    return norms


# Parameter declarations that many families share.


def llama_specs(c: DenseConfig) -> dict[str, Any]:
    """Return the specs of Llama's parameters."""
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


QKV, ATTENTION, MLP = ("q", "k", "v"), ("q", "k", "v", "o"), ("gate", "up", "down")  # projections


def add_biases(specs: dict[str, Any], names: Sequence[str]) -> None:
    """Add a bias to each of the projections `names` in the specs of a model with one stack."""
    for name in names:
        parameters = specs["layers"]["attn" if name in ATTENTION else "mlp"]
        weight = parameters[name]
        (L, _, outs), axis = weight.shape, weight.axes[-1]
        axis, heads = ("norm", None) if axis == "out_width" else (axis, weight.heads)
        parameters[f"{name}_bias"] = ParamSpec((L, outs), ("layers", axis), full(0.0), heads)


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
    """Return the Hugging Face name of every parameter in `specs`. others: the names, by path, that Llama does
    not have or that differ from Llama's.
    """
    names = LLAMA_NAMES | (others or {})
    return {path: names[path] for path in spec_paths(specs)}
