"""Llama 1 to 3.3, SmolLM2 and all other models with model_type "llama"."""

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
from jaxft.models.llama_config import PRESETS, LlamaConfig, from_hf, to_hf
from jaxft.models.model import Model
from jaxft.nn.layer_attention import uniform

__all__ = ["PRESETS", "LlamaConfig", "from_hf", "llama", "to_hf"]


def llama(config: LlamaConfig, dtype: DTypeLike = jnp.bfloat16, **options: Any) -> Model:
    """Build the Model of a Llama config. options: remat and residual of dense_model."""
    specs = with_biases(llama_specs(config), config, config.attention_bias, config.mlp_bias)
    attention = uniform(config.layers, config.head_dim, config.rope)
    return dense_model(config, one_stack(specs, names_of(specs), prenorm_layer, attention), dtype, **options)
