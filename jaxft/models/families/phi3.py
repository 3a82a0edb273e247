"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layer with fused projections and partial rope.

With tensor parallelism each device needs some columns of every projection. A device would get columns of one
projection only if the columns of a fused weight [I, O] were sharded, so the weight is sharded over its inputs
(axis "fused_width"). Before a matmul, one all-to-all of the weight (of the codes if it is quantised) moves to
each device its columns of every projection: 1/tensor of the weight's bytes, and no activations.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxft.distributed.sharding import constrain, mesh_size
from jaxft.models.dense import DecoderSpec, Family, attention_output, llama_specs, one_stack
from jaxft.models.dense_config import ConfigFormat, DenseConfig, fields_from_hf, fields_to_hf, window_from_hf
from jaxft.models.model import ForwardOptions
from jaxft.nn.adapters.lora import Adapted
from jaxft.nn.attention.layer_attention import Attend, Extras, uniform
from jaxft.nn.layers import biased_linear, gated, rms_norm, saveable, split_keys
from jaxft.nn.matmul import InputTap, Weight, linear
from jaxft.nn.param_spec import ParamSpec, fan_in
from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import decode_scales
from jaxft.nn.rope import Rope
from jaxft.nn.tensor_names import TensorName, WeightNames
from jaxft.nn.tree import Params


@dataclass(frozen=True)
class Phi3Config(DenseConfig):
    """Sizes of a Phi-3 or Phi-4. window: the number of keys that a query attends to; None for all."""

    window: int | None = None


def _phi3_decoder(config: Phi3Config) -> DecoderSpec:
    attention = uniform(config.layers, config.head_dim, config.rope, config.window)
    return one_stack(_specs(config), _layer, attention, _NAMES)


def _specs(c: Phi3Config) -> dict[str, Any]:
    """Return the specs: attn/qkv [D, (H + 2K) E] has the columns of q, k and v in this order, mlp/gate_up
    [D, 2F] the columns of gate and up.
    """
    specs, L, D, F = llama_specs(c), c.layers, c.width, c.mlp
    axes, columns = ("layers", "fused_width"), (c.heads + 2 * c.kv_heads) * c.head_dim
    qkv = ParamSpec((L, D, columns), (*axes, "fused_kv_heads"), fan_in(D), c.kv_heads)
    gate_up = ParamSpec((L, D, 2 * F), (*axes, "fused_mlp"), fan_in(D), F)
    layers = specs["layers"]
    layers["attn"] = {"qkv": qkv, "o": layers["attn"]["o"]}
    layers["mlp"] = {"gate_up": gate_up, "down": layers["mlp"]["down"]}
    return specs


_NAMES: WeightNames = {
    "layers/attn/qkv": TensorName("model.layers.{i}.self_attn.qkv_proj.weight", True),
    "layers/mlp/gate_up": TensorName("model.layers.{i}.mlp.gate_up_proj.weight", True),
}


def _layer(
    f: ForwardOptions[Phi3Config], p: Params, h_BTD: Float[Array, "B T D"], attend: Attend, key: Array | None
) -> tuple[Float[Array, "B T D"], Extras]:
    """Compute `h += attention(norm(h)); h += mlp(norm(h))` with fused projections."""
    c, keys = f.config, split_keys(key, 4)
    x = rms_norm(h_BTD, p["attn_norm"], c.norm_eps, f.dtype)
    o, extras = _attention(c, p["attn"], x, attend, keys[:2])
    h_BTD = h_BTD + o.astype(h_BTD.dtype)
    x = rms_norm(h_BTD, p["mlp_norm"], c.norm_eps, f.dtype)
    down = constrain(_mlp(c, p["mlp"], x, keys[2:]), "rows", "time", "act_width")
    return h_BTD + down.astype(h_BTD.dtype), extras


def _attention(
    c: Phi3Config, p: Params, x_BTD: Float[Array, "B T D"], attend: Attend, keys: Any
) -> tuple[Float[Array, "B T D"], Extras]:
    heads, (B, T, _) = (c.heads, c.kv_heads, c.kv_heads), x_BTD.shape
    parts = fused_linear(x_BTD, p["qkv"], tuple(count * c.head_dim for count in heads), keys[0])
    q, k, v = (x.reshape(B, T, count, c.head_dim) for x, count in zip(parts, heads, strict=True))
    o_BTHE, extras = attend(q, k, v)
    return attention_output(p, o_BTHE, keys[1]), extras


def _mlp(c: Phi3Config, p: Params, x_BTD: Float[Array, "B T D"], keys: Any) -> Float[Array, "B T D"]:
    gate, up = (
        saveable(constrain(part, "rows", "time", "mlp"), name)
        for part, name in zip(
            fused_linear(x_BTD, p["gate_up"], (c.mlp, c.mlp), keys[0]), ("gate", "up"), strict=True
        )
    )
    return biased_linear(p, "down", gated(gate, up), keys[1])


def fused_linear(
    x_BTI: Float[Array, "B T I"], w: Weight, widths: tuple[int, ...], key: Array | None = None
) -> list[Float[Array, "B T _"]]:
    """Return x @ w split into projections, in the order of w's columns.

    w: plain, quantised or adapted [I, sum of widths]. widths: the number of outputs of each projection. key:
    for dropout of an adapter's input. With tensor parallelism each projection is sharded over its outputs, so
    mesh.tensor must divide every width.
    """
    ways = mesh_size("tensor")
    if ways == 1:
        return jnp.split(linear(x_BTI, w, key), np.cumsum(widths)[:-1].tolist(), -1)
    y = linear(x_BTI, _spread(w, widths, ways), key)
    B, T, outs = y.shape
    y = constrain(y.reshape(B, T, ways, outs // ways), "rows", "time", "part_shards", None)
    each = np.cumsum([width // ways for width in widths])[:-1].tolist()
    parts = zip(jnp.split(y, each, -1), widths, strict=True)
    return [part.reshape(B, T, width) for part, width in parts]


def _spread(w: Weight, widths: tuple[int, ...], ways: int) -> Weight:
    """Shard the columns of a fused weight over `ways` devices, each with columns of every projection."""
    order = partial(_by_device, widths=widths, ways=ways)
    if isinstance(w, Adapted):
        of_pair = partial(order, lead=w.over)
        magnitude, gain = (
            None if x is None else of_pair(x[..., None, :])[..., 0, :] for x in (w.magnitude, w.gain)
        )
        spread = _spread(w.weight, widths, ways)
        return replace(w, weight=spread, b=of_pair(w.b), magnitude=magnitude, gain=gain)
    if isinstance(w, InputTap):
        return replace(w, weight=_spread(w.weight, widths, ways))
    if not isinstance(w, QTensor):
        return order(w, inputs="width")
    scale = w.scale if w.outer is None else decode_scales(w.scale, w.outer, w.mean)
    return replace(
        w,
        codes=order(w.codes),
        scale=None if scale is None else order(scale),
        offset=None if w.offset is None else order(w.offset),
        outer=None,
        mean=None,
    )


def _by_device(
    x: Shaped[Array, "*L I O"],
    widths: tuple[int, ...],
    ways: int,
    inputs: str = "act_width",
    lead: tuple[str, ...] = (),
) -> Shaped[Array, "*L I O"]:
    """Reorder the columns of x so that each of `ways` devices has columns of every projection; shard them.

    widths: columns of each projection. inputs: logical name of axis I in the result. lead: names of axes L.
    """
    *above, _ = x.shape
    parts = jnp.split(x, np.cumsum(widths)[:-1].tolist(), -1)
    x = jnp.concatenate([part.reshape(*above, ways, part.shape[-1] // ways) for part in parts], -1)
    x = constrain(x, *lead, inputs, "part_shards", "act_width")
    return x.reshape(*above, x.shape[-1] * x.shape[-2])


_OLD_LONGROPE = ("su", "yarn")  # in a Phi-3's config.json, transformers reads both as longrope


def _read(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    for group in ("rope_scaling", "rope_parameters"):
        rope = hf.get(group)
        if isinstance(rope, dict):
            renamed = {key: "longrope" for key in ("type", "rope_type") if rope.get(key) in _OLD_LONGROPE}
            hf = {**hf, group: {**rope, **renamed}}
    fields = fields_from_hf({"original_max_position_embeddings": 4096, **hf}, form)
    kind = fields["rope"].kind
    if kind not in ("default", "longrope"):
        raise ValueError(
            f"config: rope type {kind!r} is not supported for model_type 'phi3'; use default or longrope"
        )
    return fields | {"window": window_from_hf(hf)}


def _write(c: Phi3Config, form: ConfigFormat) -> dict[str, Any]:
    # transformers' default of pad_token_id is 32000
    return fields_to_hf(c, form) | {"sliding_window": c.window, "pad_token_id": None}


# Factors of longrope from the checkpoints' config.json files.
_PHI35_SHORT = (
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, *(1.0499999523162842,) * 5,
    1.0699999332427979, 1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094,
    1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378,
    1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903,
    1.9899996519088745, *(2.0199997425079346,) * 6, *(2.0299997329711914,) * 9, 2.0799996852874756,
    2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
    2.749999523162842, 2.8399994373321533,
)  # fmt: skip
_PHI35_LONG = (
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
    1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
    4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
    17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
    32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
    50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
    62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
    63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
    64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
    64.51000213623047, 64.52999877929688, 64.83999633789062,
)  # fmt: skip
_PHI4_MINI_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533,
    5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651,
    14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1,
    32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip


def _longrope(short: tuple[float, ...], long: tuple[float, ...], rotated: float = 1.0) -> dict[str, Any]:
    """Return rope, max_positions and window of a preset whose 4096 positions longrope extends to 131072."""
    rope = Rope(
        kind="longrope", factor=32.0, original_max_positions=4096, rotated=rotated, short_factor=short,
        long_factor=long,
    )  # fmt: skip
    return {"rope": rope, "max_positions": 131072, "window": 262144}


_CHAT = (32000, 32001, 32007)
_MINI: dict[str, Any] = dict(
    vocab=32064, width=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192, eos=_CHAT
)

PHI3_PRESETS: dict[str, Phi3Config] = {
    "microsoft/Phi-3-mini-4k-instruct": Phi3Config(**_MINI, max_positions=4096, window=2047),
    "microsoft/Phi-3.5-mini-instruct": Phi3Config(**_MINI, **_longrope(_PHI35_SHORT, _PHI35_LONG)),
    "microsoft/Phi-3-medium-4k-instruct": Phi3Config(
        vocab=32064, width=5120, layers=40, heads=40, kv_heads=10, head_dim=128, mlp=17920, eos=_CHAT,
        max_positions=4096, window=2047,
    ),
    "microsoft/phi-4": Phi3Config(
        vocab=100352, width=5120, layers=40, heads=40, kv_heads=10, head_dim=128, mlp=17920,
        rope=Rope(250000.0), max_positions=16384, bos=100257, eos=(100257, 100265),
    ),
    "microsoft/Phi-4-mini-instruct": Phi3Config(
        vocab=200064, width=3072, layers=32, heads=24, kv_heads=8, head_dim=128, mlp=8192, tied=True,
        bos=199999, eos=(200020, 199999), **_longrope((1.0,) * 48, _PHI4_MINI_LONG, rotated=0.75),
    ),
}  # fmt: skip
_FORMAT = ConfigFormat(
    "phi3", "Phi3ForCausalLM", fixed={"hidden_act": "silu"}, partial_rope=True,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 32000},
)  # fmt: skip
PHI3 = Family(Phi3Config, _FORMAT, _phi3_decoder, PHI3_PRESETS, _read, _write)
phi3 = PHI3.build
