"""Mistral and Ministral: Llama's layer with a sliding window in all layers, in some, or in none."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.models.dense import dense_model, llama_specs, names_of, one_stack, prenorm_layer
from jaxft.models.dense_config import (
    FULL,
    SLIDING,
    ConfigFormat,
    DenseConfig,
    fields_from_hf,
    fields_to_hf,
    read_layer_types,
    typed_layers,
    window_from_hf,
)
from jaxft.models.model import Model
from jaxft.nn.attention.layer_attention import LayerKind
from jaxft.nn.rope import Rope


@dataclass(frozen=True)
class MistralConfig(DenseConfig):
    """Sizes of a Mistral. window: keys that layers of type "sliding_attention" attend to. layer_types: () for
    full attention in all layers.
    """

    window: int | None = None
    layer_types: tuple[str, ...] = ()


def mistral(config: MistralConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Mistral config. options: remat and residual of dense_model."""
    specs = llama_specs(config)
    kinds = {FULL: LayerKind(config.rope), SLIDING: LayerKind(config.rope, config.window)}
    attention = typed_layers(config.layer_types or (FULL,) * config.layers, kinds, config.head_dim)
    return dense_model(config, one_stack(specs, names_of(specs), prenorm_layer, attention), dtype, **options)


_DEFAULTS = {"max_position_embeddings": 4096 * 32}
MISTRAL_FORMAT = ConfigFormat("mistral", "MistralForCausalLM", defaults=_DEFAULTS)
MINISTRAL_FORMAT = ConfigFormat("ministral", "MinistralForCausalLM", defaults=_DEFAULTS)


def read_mistral(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of a MistralConfig."""
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 4096, **hf})
    # transformers reads a config.json of model_type mistral that has layer_types as a ministral's.
    types = read_layer_types(hf, (SLIDING if window else FULL,) * fields["layers"])
    if SLIDING not in types:
        return fields
    if window is None:
        raise ValueError("config: layer_types has sliding_attention, but sliding_window is null")
    return fields | {"window": window, "layer_types": types}


def write_mistral(c: MistralConfig, form: ConfigFormat) -> dict[str, Any]:
    """Return the dict of a config.json, of model_type "ministral" if only some layers have a window."""
    if len(set(c.layer_types)) == 2:
        return fields_to_hf(c, MINISTRAL_FORMAT) | {
            "sliding_window": c.window,
            "layer_types": list(c.layer_types),
        }
    return fields_to_hf(c, MISTRAL_FORMAT) | {"sliding_window": c.window}


_7B: dict[str, Any] = dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336)
_WINDOW = MistralConfig(vocab=32000, **_7B, max_positions=32768, window=4096, layer_types=(SLIDING,) * 32)
_V3 = MistralConfig(vocab=32768, **_7B, rope=Rope(1e6), max_positions=32768)
_NEMO = MistralConfig(
    vocab=131072, width=5120, layers=40, heads=32, kv_heads=8, head_dim=128, mlp=14336, rope=Rope(1e6),
    max_positions=131072,
)  # fmt: skip
_SMALL = replace(_NEMO, mlp=32768, rope=Rope(1e8), max_positions=32768)

MISTRAL_PRESETS: dict[str, MistralConfig] = {
    "mistralai/Mistral-7B-v0.1": _WINDOW,
    "mistralai/Mistral-7B-Instruct-v0.1": _WINDOW,
    "mistralai/Mistral-7B-Instruct-v0.2": replace(_V3, vocab=32000),
    "mistralai/Mistral-7B-v0.3": _V3,
    "mistralai/Mistral-7B-Instruct-v0.3": _V3,
    "mistralai/Mistral-Nemo-Base-2407": replace(_NEMO, max_positions=128000),
    "mistralai/Mistral-Nemo-Instruct-2407": _NEMO,
    "mistralai/Mistral-Small-Instruct-2409": MistralConfig(
        vocab=32768, width=6144, layers=56, heads=48, kv_heads=8, head_dim=128, mlp=16384, rope=Rope(1e6),
        max_positions=32768,
    ),
    "mistralai/Mistral-Small-24B-Base-2501": _SMALL,
    "mistralai/Mistral-Small-24B-Instruct-2501": _SMALL,
}  # fmt: skip
