"""A toy mixture of experts, for the laws of kernels with an axis of experts: a Llama whose layers have two
gated MLPs and a router that sends each token to one of them. Its files have one tensor per expert, named as
Qwen3-MoE's. three_stacks() has such layers, with a shared expert as Qwen2-MoE's, between dense ones.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.adapted import adapted
from jaxft.models.dense import (
    DecoderSpec,
    Family,
    LayerSpec,
    StackSpec,
    dense_model,
    llama_specs,
    names_of,
    one_stack,
    prenorm_layer,
    self_attention,
    with_attention,
)
from jaxft.models.dense_config import ConfigFormat, fields_from_hf, fields_to_hf
from jaxft.models.families import llama
from jaxft.nn import tree
from jaxft.nn.attention.layer_attention import uniform
from jaxft.nn.layers import gated_mlp, rms_norm, split_keys
from jaxft.nn.matmul import linear
from jaxft.nn.param_spec import ParamSpec, fan_in, init_params
from jaxft.nn.tensor_names import TensorName

KERNELS = ("gate", "up", "down")
NAMES = {"layers/mlp/router": TensorName("model.layers.{i}.mlp.gate.weight", True)} | {
    f"layers/mlp/experts/{name}": TensorName(f"model.layers.{{i}}.mlp.experts.{{x}}.{name}_proj.weight", True)
    for name in KERNELS
}


@dataclass(frozen=True)
class ExpertConfig(llama.LlamaConfig):
    """A Llama's config with a number of experts."""

    experts: int = 2


CONFIG = ExpertConfig(vocab=40, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=64)


def expert_specs(c: ExpertConfig) -> dict[str, Any]:
    """Llama's parameters with a router and experts in place of the MLP."""
    specs, (L, X, D, F) = llama_specs(c), (c.layers, c.experts, c.width, c.mlp)
    into, back = ("layers", "experts", "width", "mlp"), ("layers", "experts", "from_mlp", "out_width")
    specs["layers"]["mlp"] = {
        "router": ParamSpec((L, D, X), ("layers", "width", "expert_scores"), fan_in(D)),
        "experts": {
            "gate": ParamSpec((L, X, D, F), into, fan_in(D)),
            "up": ParamSpec((L, X, D, F), into, fan_in(D)),
            "down": ParamSpec((L, X, F, D), back, fan_in(F)),
        },
    }
    return specs


def expert_mlp(c: ExpertConfig, p: Any, x_BTD: jax.Array, keys: Any) -> jax.Array:
    """The output of each token's best expert, times its probability."""
    probabilities = jax.nn.softmax(linear(x_BTD, p["router"]), -1)
    best = jnp.argmax(probabilities, -1)[..., None]
    out = jnp.zeros_like(x_BTD)
    for x in range(c.experts):
        expert = jax.tree.map(lambda leaf, x=x: leaf[x], p["experts"])
        y = gated_mlp(expert, x_BTD, keys) * probabilities[..., x : x + 1]
        out = out + jnp.where(best == x, y, jnp.zeros((), y.dtype))
    return out


def layer(f: Any, p: Any, h: jax.Array, attend: Any, key: Any) -> tuple[jax.Array, Any]:
    """Llama's layer with experts in place of the MLP."""
    c, keys = f.config, split_keys(key, 7)
    x = rms_norm(h, p["attn_norm"], c.norm_eps, f.dtype)
    o, extras = self_attention(c, p["attn"], x, attend, keys[:4])
    h = h + o.astype(h.dtype)
    y = expert_mlp(c, p["mlp"], rms_norm(h, p["mlp_norm"], c.norm_eps, f.dtype), keys[4:])
    return h + y.astype(h.dtype), extras


def expert_decoder(config: ExpertConfig) -> DecoderSpec:
    """The decoder of a config."""
    attention = uniform(config.layers, config.head_dim, config.rope)
    return one_stack(expert_specs(config), layer, attention, NAMES)


def experts(config: ExpertConfig, dtype: Any = jnp.float32, **options: Any) -> Any:
    """Build the Model of a config."""
    return dense_model(config, expert_decoder(config), dtype, **options)


def read(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    return fields_from_hf(hf, form) | {"experts": hf["num_experts"]}


def write(config: ExpertConfig, form: ConfigFormat) -> dict[str, Any]:
    return fields_to_hf(config, form) | {"num_experts": config.experts}


FORMAT = replace(llama.LLAMA.form, model_type="tiny_experts")
FAMILY = Family(ExpertConfig, FORMAT, expert_decoder, {}, read, write)


def three_stacks(dtype=jnp.float32):
    """The model of a dense layer, two with experts and a shared one, and another dense layer."""
    config = replace(CONFIG, layers=4)
    dense, dense2 = (llama_specs(replace(config, layers=n))["layers"] for n in (1, 2))
    moe = expert_specs(replace(config, layers=2))["layers"]
    moe["mlp"] |= {"shared": dense2["mlp"]}
    specs = llama_specs(config) | {"dense": dense, "moe": moe, "tail": dense}
    del specs["layers"]
    of_moe = {path.replace("layers/", "moe/"): name for path, name in NAMES.items()} | {
        f"moe/mlp/shared/{name}": TensorName(f"model.layers.{{i}}.mlp.shared_expert.{name}_proj.weight", True)
        for name in KERNELS
    }
    of_dense = names_of({"layers": dense})
    names = {
        f"{stack}/{path.removeprefix('layers/')}": name
        for stack in ("dense", "moe", "tail")
        for path, name in of_dense.items()
    }
    stacks = tuple(
        StackSpec(name, count, (LayerSpec(fn, with_attention),))
        for name, count, fn in [
            ("dense", 1, prenorm_layer),
            ("moe", 2, layer_with_shared),
            ("tail", 1, prenorm_layer),
        ]
    )
    decoder = DecoderSpec(specs, names_of(specs, names | of_moe), stacks,
                          uniform(config.layers, config.head_dim, config.rope))  # fmt: skip
    return dense_model(config, decoder, dtype)


def layer_with_shared(f, p, h, attend, key):
    """The layer with experts, whose shared expert adds to the output of the MLP."""
    out, extras = layer(f, p, h, attend, key)
    x = rms_norm(h, p["mlp_norm"], f.config.norm_eps, f.dtype)
    return out + gated_mlp(p["mlp"]["shared"], x, split_keys(key, 3)).astype(h.dtype), extras


def tiny_experts(adapter=None, dtype=jnp.float64, config=CONFIG):
    """The model over {"base", "adapter"} and random parameters for it; an adapter's b is random too."""
    model = adapted(experts(config, dtype), adapter)
    return model, _start(config, adapter, jnp.dtype(dtype))


@functools.cache
def _start(config, adapter, dtype):
    model = adapted(experts(config, dtype), adapter)

    def shake(path, x):
        if not path.endswith("/b"):
            return x
        return 0.3 * jax.random.normal(jax.random.key(len(path)), x.shape, x.dtype)

    def start():
        wide = np.promote_types(dtype, np.float32)
        return tree.map_with_path(shake, init_params(model.specs, jax.random.key(0), wide))

    return jax.jit(start)()
