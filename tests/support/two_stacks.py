"""A family with two stacks, and two kinds of layers in the second one's blocks: a recurrence and attention.

    x = norm(h); s_t = a_t s_{t-1} + v_t, a = sigmoid(x A), v = x V; h += s O

The first layer has attention and is a stack of its own; then `blocks` blocks of a recurrent layer and one
with attention. The attention layers are Llama's.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxft.models.dense import (
    DecoderSpec,
    LayerSpec,
    StackSpec,
    dense_model,
    llama_specs,
    names_of,
    prenorm_layer,
    with_attention,
)
from jaxft.models.families.llama import LlamaConfig
from jaxft.nn.attention.flash_attention import visible
from jaxft.nn.attention.kv_cache import RecurrentState
from jaxft.nn.attention.layer_attention import AttentionLayers, Extras, LayerKind, batch_ranges
from jaxft.nn.layers import rms_norm, split_keys
from jaxft.nn.matmul import linear
from jaxft.nn.param_spec import ParamSpec, fan_in, full
from jaxft.nn.rope import Rope
from jaxft.nn.stack import LayerMean, Mixer, Pass
from jaxft.nn.tensor_names import TensorName

W = 12  # channels of the recurrence
SIZES = dict(vocab=96, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=128)
NAMES = {
    "blocks/recurrent/norm": TensorName("model.layers.{i}.input_layernorm.weight"),
    "blocks/recurrent/mix/decay": TensorName("model.layers.{i}.recurrence.decay_proj.weight", True),
    "blocks/recurrent/mix/value": TensorName("model.layers.{i}.recurrence.value_proj.weight", True),
    "blocks/recurrent/mix/out": TensorName("model.layers.{i}.recurrence.out_proj.weight", True),
}


def two_stacks(dtype=jnp.float64, blocks=2, window=None, **options):
    """The model, of 1 + 2 * blocks layers."""
    config = LlamaConfig(**SIZES, layers=1 + 2 * blocks)
    layers = {count: llama_specs(replace(config, layers=count))["layers"] for count in (1, blocks)}
    recurrent = {
        "norm": ParamSpec((blocks, config.width), ("layers", "norm"), full(1.0)),
        "mix": {
            name: ParamSpec((blocks, *shape), ("layers", *axes), fan_in(shape[0]))
            for name, shape, axes in [
                ("decay", (config.width, W), ("width", "mlp")),
                ("value", (config.width, W), ("width", "mlp")),
                ("out", (W, config.width), ("from_mlp", "out_width")),
            ]
        },
    }
    specs = llama_specs(config)
    del specs["layers"]
    specs |= {"first": layers[1], "blocks": {"recurrent": recurrent, "full": layers[blocks]}}
    names = NAMES | {
        f"{stack}/{path.removeprefix('layers/')}": name
        for path, name in names_of({"layers": layers[1]}).items()
        for stack in ("first", "blocks/full")
    }
    layout = (0, *(None, 0) * blocks)
    attention = AttentionLayers((LayerKind(Rope(), window),), layout, config.head_dim)
    full_layer = LayerSpec(_with_mean, with_attention, "full")
    stacks = (
        StackSpec("first", 1, (replace(full_layer, name=""),)),
        StackSpec("blocks", blocks, (LayerSpec(_recurrent_layer, _recurrence, "recurrent"), full_layer)),
    )
    return dense_model(
        config, DecoderSpec(specs, names_of(specs, names), stacks, attention), dtype, **options
    )


def _with_mean(f, p, h, attend, key):
    """Llama's layer, which reports the mean square of its first channel, with a gradient."""
    h, extras = prenorm_layer(f, p, h, attend, key)
    total = jnp.sum(jnp.square(h[..., 0]), 1)
    return h, extras._replace(outputs={"first_channel": LayerMean(total, jnp.full_like(total, h.shape[1]))})


def _recurrent_layer(f, p, h, mix, key):
    keys, x = split_keys(key, 3), rms_norm(h, p["norm"], f.config.norm_eps, f.dtype)
    decay = jax.nn.sigmoid(linear(x, p["mix"]["decay"], keys[0]))
    s, extras = mix(decay, linear(x, p["mix"]["value"], keys[1]))
    out = linear(s, p["mix"]["out"], keys[2]).astype(h.dtype)
    return h + out, extras._replace(outputs={"state": jnp.mean(jnp.square(s), (1, 2))})


def _recurrence(config, attention):
    """The Mixer of mix(decay, value [B, T, W]) -> s; a cache has s [L, B, W] of each prompt and row."""
    count = (config.layers - 1) // 2

    def empty(prompts, rows, dtype, stored):
        return tuple(_state(jnp.zeros((count, size, W), dtype)) for size in (prompts[0], rows[0]))

    return Mixer(_rows, _prompts, _token, _chunk, empty)


def _state(value):
    return RecurrentState(value, ("mlp",))


def _over_rows(tokens):
    ranges = batch_ranges(tokens)

    def mix(decay, value):
        T = decay.shape[1]
        seen = visible(ranges, jnp.arange(T, dtype=jnp.int32))  # [B, t, s]: s is before t in its text, or t
        later = jnp.tril(jnp.ones((T, T), bool), -1)  # [u, s]: u is after s
        between = (seen[:, :, :, None] & later[None, None]).astype(decay.dtype)  # [B, t, u, s]
        logs = jnp.einsum("btus,buw->btsw", between, jnp.log(decay))
        return jnp.einsum("btsw,bsw->btw", jnp.where(seen[..., None], jnp.exp(logs), 0), value)

    return mix


def _rows(tokens, dtype):
    over = _over_rows(tokens)
    return Pass(lambda x, _: lambda *args: (over(*args), Extras()))


def _prompts(tokens, new, dtype):
    def mix(x, _):
        def mixed(decay, value):
            s = _over_rows(tokens)(decay, value)
            return s, Extras((None, s[:, -1]))

        return mixed

    return Pass(mix, end=lambda _, states: _state(states))


def _token(cache, at, dtype):
    def mix(x, _):
        of_prompts, of_rows = x
        group = at.groups.rows.shape[1]
        begun = at.groups.to_rows(jnp.repeat(of_prompts[:, None], group, 1))
        start = jnp.where((at.counts == 1)[:, None], begun, of_rows)

        def mixed(decay, value):
            s = decay[:, 0] * start + value[:, 0]
            return s[:, None], Extras((None, s))

        return mixed

    return Pass(mix, _values(cache), end=lambda _, states: _state(states))


def _values(cache):
    return cache.prompts.layers.value, cache.rows.value


def _chunk(cache, chunk, dtype):
    def mix(x, _):
        of_prompts, of_rows = x
        start = jnp.where((chunk.counts == 0)[:, None], of_prompts[chunk.prompts], of_rows[chunk.rows])

        def mixed(decay, value):
            def step(s, at):
                decay, value, i = at
                new = decay * s + value
                return jnp.where((i < chunk.lengths)[:, None], new, s), new

            xs = (
                decay.swapaxes(0, 1),
                value.swapaxes(0, 1),
                jnp.arange(decay.shape[1], dtype=chunk.lengths.dtype),
            )
            last, s = jax.lax.scan(step, start, xs)
            return s.swapaxes(0, 1), Extras((None, last))

        return mixed

    def end(_, states):
        return _state(cache.rows.value.at[:, chunk.rows].set(states, mode="drop"))

    return Pass(mix, _values(cache), end=end)
