"""Gemma 3: Gemma 2's layer with norms of queries and keys. Layers with a sliding window have another rope.

Multimodal checkpoints (model_type "gemma3") contain it as their text decoder; see text_part.py.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.models.dense_config import ConfigFormat, fields_to_hf
from jaxft.models.families.gemma import (
    FOUR_NORMS,
    GEMMA2_DEFAULTS,
    Gemma2Config,
    alternating,
    capped_attention,
    capped_fields,
    capped_settings,
    four_norms,
    gemma_model,
)
from jaxft.models.layer_types import FULL, SLIDING
from jaxft.models.model import Model
from jaxft.nn.attention.layer_attention import LayerKind
from jaxft.nn.param import ParamSpec, full
from jaxft.nn.rope import Rope, check_rope


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Sizes of a Gemma 3. rope: of layers with full attention; local_rope: of layers with a window."""

    local_rope: Rope = Rope()

    def __post_init__(self):
        super().__post_init__()
        check_rope(self.local_rope, self.head_dim, self.max_positions)


def gemma3(config: Gemma3Config, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Gemma 3 config. options: remat and residual of dense_model."""
    specs = four_norms(config)
    norm = ParamSpec((config.layers, config.head_dim), ("layers", "norm"), full(0.0))
    specs["layers"]["attn"] |= {"q_norm": norm, "k_norm": norm}
    kinds = {FULL: LayerKind(config.rope), SLIDING: LayerKind(config.local_rope, config.window)}
    return gemma_model(config, specs, FOUR_NORMS, capped_attention(config, kinds), dtype, **options)


GEMMA3_DEFAULTS: dict[str, Any] = {
    **GEMMA2_DEFAULTS, "max_position_embeddings": 131072, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip
_FORMAT = ConfigFormat(
    "gemma3_text",
    "Gemma3ForCausalLM",
    # transformers ignores a soft cap of Gemma 3's scores
    fixed={"attention_bias": False, "attn_logit_softcapping": None},
    defaults={"rope_theta": {FULL: 1e6, SLIDING: 1e4}},
    activation="hidden_activation",
    local_theta="rope_local_base_freq",
)


def gemma3_from_hf(hf: dict[str, Any]) -> Gemma3Config:
    """Parse the config.json of a text-only Gemma 3. Raises ValueError that names a missing or unsupported
    value.
    """
    period = hf.get("sliding_window_pattern", 6)
    if type(period) is not int or period < 1:
        raise ValueError(
            f"config: sliding_window_pattern must be a positive whole number, got {period!r:.60}"
        )
    return Gemma3Config(**capped_fields({**GEMMA3_DEFAULTS, **hf}, _FORMAT, period))


def gemma3_to_hf(c: Gemma3Config) -> dict[str, Any]:
    """Return the dict of a text-only Gemma 3's config.json."""
    return fields_to_hf(c, _FORMAT, c.local_rope) | capped_settings(c)


_END_OF_TURN = 106
_LONG = {"rope": Rope(1e6, "linear", factor=8.0), "max_positions": 131072, "window": 1024, "vocab": 262208}
_SHORT = {"rope": Rope(1e6), "max_positions": 32768, "window": 512, "vocab": 262144}


def _gemma3(base: str, chat: str, **sizes: Any) -> dict[str, Gemma3Config]:
    """Return presets of a base model and its instruction-tuned version, which differ in their end tokens."""
    common: dict[str, Any] = dict(
        head_dim=256, norm_eps=1e-6, tied=True, bos=2, activation="gelu_tanh",
        layer_types=alternating(sizes["layers"], 6),
    )  # fmt: skip
    ends = {base: (1,), chat: (1, _END_OF_TURN)}
    return {
        f"google/gemma-3-{name}": Gemma3Config(**(common | sizes | {"eos": eos}))
        for name, eos in ends.items()
    }


GEMMA3_PRESETS: dict[str, Gemma3Config] = {
    **_gemma3("270m", "270m-it", width=640, layers=18, heads=4, kv_heads=1, mlp=2048, **_SHORT),
    **_gemma3("1b-pt", "1b-it", width=1152, layers=26, heads=4, kv_heads=1, mlp=6912, **_SHORT),
    **_gemma3("4b-pt", "4b-it", width=2560, layers=34, heads=8, kv_heads=4, mlp=10240, **_LONG),
    **_gemma3("12b-pt", "12b-it", width=3840, layers=48, heads=16, kv_heads=8, mlp=15360, **_LONG),
    **_gemma3(
        "27b-pt", "27b-it", width=5376, layers=62, heads=32, kv_heads=16, head_dim=128, mlp=21504,
        query_pre_attn_scalar=168.0, **_LONG,
    ),
}  # fmt: skip
