"""EXAONE 4: OLMo 2's layer, but with q and k norms per head. In models with sliding windows, only the layers
with a window have rope.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.models.dense import dense_model, head_norms, names_of, one_stack
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
from jaxft.models.families.olmo import POST_NORM_NAMES, postnorm_layer, postnorm_specs
from jaxft.models.model import ForwardOptions, Model
from jaxft.nn.attention.layer_attention import Attend, Extras, LayerKind
from jaxft.nn.param import ParamSpec, full
from jaxft.nn.rope import Rope
from jaxft.tree import Params


@dataclass(frozen=True)
class Exaone4Config(DenseConfig):
    """Sizes of an EXAONE 4. window: keys that layers of type "sliding_attention" attend to. Layers with full
    attention have rope only if window is None. layer_types: () for full attention in all layers.
    """

    window: int | None = None
    layer_types: tuple[str, ...] = ()


def exaone4(config: Exaone4Config, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of an EXAONE 4 config. options: remat and residual of dense_model."""
    specs, norm = (
        postnorm_specs(config),
        ParamSpec((config.layers, config.head_dim), ("layers", "norm"), full(1.0)),
    )
    specs["layers"]["attn"] |= {"q_norm": norm, "k_norm": norm}
    whole = LayerKind(config.rope if config.window is None else Rope(kind="none"))
    kinds = {FULL: whole, SLIDING: LayerKind(config.rope, config.window)}
    attention = typed_layers(config.layer_types or (FULL,) * config.layers, kinds, config.head_dim)
    arch = one_stack(specs, names_of(specs, POST_NORM_NAMES), _layer, attention)
    return dense_model(config, arch, dtype, **options)


def _layer(f: ForwardOptions, p: Params, h: Any, attend: Attend, key: Any) -> tuple[Any, Extras]:
    return postnorm_layer(f, p, h, attend, key, head_norms(f.config, f.dtype))


EXAONE4_FORMAT = ConfigFormat(
    "exaone4", "Exaone4ForCausalLM", {"hidden_act": "silu"}, {"rms_norm_eps": 1e-5, "bos_token_id": 0}
)


def read_exaone4(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    """Return the fields of an Exaone4Config."""
    fields, window = fields_from_hf(hf, form), window_from_hf({"sliding_window": 4096, **hf})
    pattern, L = hf.get("sliding_window_pattern", 4), fields["layers"]
    if window is None:
        default = [FULL] * L
    elif type(pattern) is int and pattern > 0:
        default = [SLIDING if (i + 1) % pattern else FULL for i in range(L)]
    elif "layer_types" not in hf:
        raise ValueError(
            f"config: sliding_window_pattern={pattern!r:.60} is not supported; set layer_types, a list of "
            f"{FULL} or {SLIDING} for each layer"
        )
    else:
        default = []
    types = read_layer_types(hf, default)
    if window is None and SLIDING in types:
        raise ValueError("config: layer_types has sliding_attention, but sliding_window is null")
    return fields | {"window": window, "layer_types": types}


def write_exaone4(c: Exaone4Config, form: ConfigFormat) -> dict[str, Any]:
    """Return the dict of an EXAONE 4's config.json."""
    types = list(c.layer_types or (FULL,) * c.layers)
    return fields_to_hf(c, form) | {
        "sliding_window": c.window,
        "sliding_window_pattern": None if c.window is None else 4,
        "layer_types": types,
    }


_EXAONE4_COMMON: dict[str, Any] = dict(
    vocab=102400, kv_heads=8, rope=Rope(1e6, "llama3", factor=16.0, original_max_positions=8192), bos=1,
    eos=(361,),
)  # fmt: skip
EXAONE4_PRESETS: dict[str, Exaone4Config] = {
    "LGAI-EXAONE/EXAONE-4.0-1.2B": Exaone4Config(
        **_EXAONE4_COMMON, width=2048, layers=30, heads=32, head_dim=64, mlp=4096, tied=True,
        max_positions=65536, layer_types=(FULL,) * 30,
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": Exaone4Config(
        **_EXAONE4_COMMON, width=5120, layers=64, heads=40, head_dim=128, mlp=27392, max_positions=131072,
        window=4096, layer_types=(SLIDING, SLIDING, SLIDING, FULL) * 16,
    ),
}  # fmt: skip
