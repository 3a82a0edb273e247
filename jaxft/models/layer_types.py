"""config.json's `layer_types`: which layers have full attention and which have a sliding window."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.nn.attention.layer_attention import AttentionLayers, LayerKind

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(hf: Mapping[str, Any], default: Sequence[str]) -> tuple[str, ...]:
    """Return the type of each layer, from config.json or the family's default. Raises ValueError if the list
    does not have one known type per layer.
    """
    types = hf.get("layer_types")
    if types is None:
        return tuple(default)
    count = hf["num_hidden_layers"]
    if not isinstance(types, list | tuple) or len(types) != count:
        raise ValueError(
            f"config: layer_types must be a list of {count} types, one per layer, got {types!r:.80}"
        )
    if unknown := [kind for kind in types if kind not in (FULL, SLIDING)]:
        raise ValueError(
            f"config: layer type {unknown[0]!r:.60} is not supported; jaxft has {FULL} and {SLIDING}"
        )
    return tuple(types)


def window_from_hf(hf: Mapping[str, Any]) -> int | None:
    """Return config.json's sliding_window. Raises ValueError unless it is null or a positive number."""
    window = hf.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"config: sliding_window must be a positive whole number or null, got {window!r}")
    return window


def typed_layers(types: Sequence[str], kinds: Mapping[str, LayerKind], head_dim: int) -> AttentionLayers:
    """Return the AttentionLayers for a type per layer. kinds: the LayerKind of each type."""
    used = list(dict.fromkeys(types))
    return AttentionLayers(
        tuple(kinds[name] for name in used), tuple(used.index(name) for name in types), head_dim
    )
