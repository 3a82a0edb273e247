"""SmolLM3: Llama's layer, where every fourth layer has no rope."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.models.dense import (
    dense_model,
    llama_specs,
    names_of,
    one_stack,
    prenorm_layer,
    with_biases,
)
from jaxft.models.dense_config import (
    FULL,
    SLIDING,
    ConfigFormat,
    DenseConfig,
    fields_from_hf,
    fields_to_hf,
    read_layer_types,
    window_from_hf,
)
from jaxft.models.model import Model
from jaxft.nn.attention.layer_attention import AttentionLayers, LayerKind
from jaxft.nn.rope import Rope


@dataclass(frozen=True)
class SmolLM3Config(DenseConfig):
    """Sizes of a SmolLM3.

    has_rope: whether each layer has rope; () for rope in all layers. window: keys that layers of type
    "sliding_attention" attend to. layer_types: () for full attention in all layers. attention_bias, mlp_bias:
    whether the projections have biases.
    """

    has_rope: tuple[bool, ...] = ()
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False


def smollm3(config: SmolLM3Config, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a SmolLM3 config. options: remat and residual of dense_model."""
    specs = with_biases(llama_specs(config), config, config.attention_bias, config.mlp_bias)
    architecture = one_stack(specs, names_of(specs), prenorm_layer, _attention(config))
    return dense_model(config, architecture, dtype, **options)


def _attention(c: SmolLM3Config) -> AttentionLayers:
    types, has_rope = c.layer_types or (FULL,) * c.layers, c.has_rope or (True,) * c.layers
    layers = [
        LayerKind(c.rope if rotated else Rope(kind="none"), c.window if kind == SLIDING else None)
        for kind, rotated in zip(types, has_rope, strict=True)
    ]
    kinds = list(dict.fromkeys(layers))
    return AttentionLayers(tuple(kinds), tuple(map(kinds.index, layers)), c.head_dim)


SMOLLM3_FORMAT = ConfigFormat(
    "smollm3",
    "SmolLM3ForCausalLM",
    fixed={"hidden_act": "silu"},
    defaults={
        "max_position_embeddings": 32768, "rope_theta": 2000000.0, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001, "num_key_value_heads": 4,
    },
    more={"attention_bias": False, "mlp_bias": False},
)  # fmt: skip


def _rope_layers(hf: dict[str, Any], count: int) -> tuple[bool, ...]:
    """Return whether each layer has rope, from no_rope_layers (where 1 means with rope) or
    no_rope_layer_interval in config.json.
    """
    flags = hf.get("no_rope_layers")
    if flags is not None:
        if not isinstance(flags, list | tuple) or len(flags) < count or any(x not in (0, 1) for x in flags):
            raise ValueError(
                f"config: no_rope_layers must be a list of {count} numbers, 1 for a layer with rope and 0 "
                f"for one without, got {flags!r:.60}"
            )
        return tuple(map(bool, flags[:count]))
    interval = hf.get("no_rope_layer_interval", 4)
    if type(interval) is not int or interval < 1:
        raise ValueError(
            f"config: no_rope_layer_interval must be a whole number above 0, got {interval!r:.60}"
        )
    return tuple((i + 1) % interval != 0 for i in range(count))


def _sliding(hf: dict[str, Any], has_rope: Sequence[bool]) -> dict[str, Any]:
    """Return the fields `window` and `layer_types`. By default, layers without rope have the window."""
    window, used = window_from_hf(hf), bool(hf.get("use_sliding_window", False))
    default = [SLIDING if used and window and not rotated else FULL for rotated in has_rope]
    types = read_layer_types(hf, default)
    if SLIDING not in types:
        return {}
    if window is None or not used:
        raise ValueError(
            f"config: layer_types has sliding_attention, but use_sliding_window={used} and "
            f"sliding_window={window}; set both, or make every layer full_attention"
        )
    return {"window": window, "layer_types": types}


def read_smollm3(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of a SmolLM3Config."""
    fields = fields_from_hf(hf, form)
    has_rope = _rope_layers(hf, fields["layers"])
    return fields | _sliding(hf, has_rope) | {"has_rope": has_rope}


def write_smollm3(c: SmolLM3Config, form: ConfigFormat) -> dict[str, Any]:
    """Return the dict of a SmolLM3's config.json, with pad_token_id null; transformers' default is 128004."""
    return fields_to_hf(c, form) | {
        "no_rope_layers": [int(rotated) for rotated in c.has_rope or (True,) * c.layers],
        "use_sliding_window": SLIDING in c.layer_types,
        "sliding_window": c.window,
        "layer_types": list(c.layer_types or (FULL,) * c.layers),
        "pad_token_id": None,
    }


_3B: dict[str, Any] = dict(
    vocab=128256, width=2048, layers=36, heads=16, kv_heads=4, head_dim=128, mlp=11008, norm_eps=1e-6,
    tied=True, max_positions=65536, rope=Rope(5000000.0), has_rope=(True, True, True, False) * 9, bos=128000,
)  # fmt: skip

SMOLLM3_PRESETS: dict[str, SmolLM3Config] = {
    "HuggingFaceTB/SmolLM3-3B": SmolLM3Config(**_3B, eos=(128012,)),
    "HuggingFaceTB/SmolLM3-3B-Base": SmolLM3Config(**_3B, eos=(128001,)),
}
