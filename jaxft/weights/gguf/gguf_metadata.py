"""A model's configuration as GGUF metadata: the inverse of gguf_config and gguf_rope.

A written file is checked as llama.cpp reads it, see gguf_llama_cpp.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxft.models import model_types
from jaxft.models.dense_config import DenseConfig
from jaxft.models.families.mistral import MistralConfig
from jaxft.models.model import ModelConfig
from jaxft.nn.rope import Rope, attention_scaling, frequencies, rotated_dims
from jaxft.weights.gguf.gguf_architectures import ARCHITECTURES
from jaxft.weights.gguf.gguf_llama_cpp import exact_context
from jaxft.weights.gguf.gguf_rope import FREQUENCIES, LONG, SHORT
from jaxft.weights.gguf.gguf_write import Field

ARCHITECTURE_OF = {spec.model_type: name for name, spec in ARCHITECTURES.items() if name != "mistral3"} | {
    "mistral": "llama",
    "olmo3": "olmo2",
}


def architecture_for(config: ModelConfig) -> str:
    """Return the GGUF architecture of a model. Raises ValueError if jaxft writes none for its family."""
    kind = model_types.config_to_hf(config)["model_type"]
    if kind not in ARCHITECTURE_OF:
        raise ValueError(
            f"{kind} models cannot be written as GGUF; jaxft writes {', '.join(sorted(ARCHITECTURE_OF))}. "
            "Write a Hugging Face folder, without --gguf, and convert it with llama.cpp's converter"
        )
    rope = config.rope if isinstance(config, MistralConfig) else Rope()
    if (rope.beta_fast, rope.beta_slow) != (Rope.beta_fast, Rope.beta_slow):
        return "mistral3"  # which alone reads YaRN's betas
    return ARCHITECTURE_OF[kind]


def config_fields(config: ModelConfig) -> tuple[list[Field], dict[str, np.ndarray]]:
    """Return the metadata of a model's architecture, and the tables of its rope by tensor name."""
    if not isinstance(config, DenseConfig):
        raise TypeError(f"expected a DenseConfig, got {type(config).__name__}")
    name, hf = architecture_for(config), model_types.config_to_hf(config)
    sizes = {
        "vocab_size": config.vocab,
        "context_length": exact_context(name, config),
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.mlp,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": rotated_dims(config.rope, config.head_dim),
    }
    fields = [Field(f"{name}.{key}", "UINT32", value) for key, value in sizes.items()]
    fields.append(_float(name, "attention.layer_norm_rms_epsilon", config.norm_eps))
    rope, tables = _rope_fields(name, config)
    own = [field for part in OWN_FIELDS.get(name, ()) for field in part(name, hf)]
    return [*fields, *rope, *own], tables


def context_notes(config: ModelConfig) -> list[str]:
    """Return warnings about the lengths up to which llama.cpp computes what the model does."""
    assert isinstance(config, DenseConfig)  # checked by config_fields
    name, rope, notes = architecture_for(config), config.rope, []
    exact, original = exact_context(name, config), rope.original_max_positions or 0
    if exact < config.max_positions:
        notes.append(
            f"warning: llama.cpp's architecture {name} ignores the sliding window: the file's context length "
            f"is set to {exact}, up to which log-probs are right (the model has {config.max_positions})"
        )
    if rope.kind == "longrope" and exact > original:
        notes.append(
            f"warning: llama.cpp chooses LongRoPE's factors by its context size: run it with -c {original} "
            f"for texts up to {original} tokens, and with a larger one for longer texts"
        )
    return notes


def _float(architecture: str, key: str, value: float) -> Field:
    return Field(f"{architecture}.{key}", "FLOAT32", float(value))


def _rope_fields(name: str, config: DenseConfig) -> tuple[list[Field], dict[str, np.ndarray]]:
    rope = config.rope
    tables: dict[str, np.ndarray] = {}
    fields = [_float(name, "rope.freq_base", rope.theta)]
    if rope.kind in ("linear", "yarn"):
        fields += [
            Field(f"{name}.rope.scaling.type", "STRING", rope.kind),
            _float(name, "rope.scaling.factor", rope.factor),
        ]
    if rope.kind in ("yarn", "longrope"):
        key = f"{name}.rope.scaling.original_context_length"
        fields.append(Field(key, "UINT32", rope.original_max_positions))
    attention = attention_scaling(rope)
    if rope.kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            fields.append(_float(name, f"rope.scaling.yarn_{key}", getattr(rope, key)))
        attention /= 1 + 0.1 * math.log(max(rope.factor, 1.0))  # llama.cpp multiplies by its default
    if rope.kind == "longrope" or not math.isclose(attention, 1, rel_tol=1e-6):
        fields.append(_float(name, "rope.scaling.attn_factor", attention))
    if rope.kind == "longrope":
        if name != "phi3":  # whose converter states no type
            fields.append(Field(f"{name}.rope.scaling.type", "STRING", "longrope"))
        for table, divisors in ((LONG, rope.long_factor), (SHORT, rope.short_factor)):
            tables[table] = np.array(divisors, np.float32)
    if rope.kind == "llama3":
        plain = frequencies(Rope(rope.theta, rotated=rope.rotated), config.head_dim)
        tables[FREQUENCIES] = (plain / frequencies(rope, config.head_dim)).astype(np.float32)
    if rope.kind not in ("default", "linear", "yarn", "longrope", "llama3"):
        raise ValueError(f"rope type {rope.kind!r} cannot be written as GGUF; llama.cpp does not have it")
    return fields, tables


def _window(name: str, hf: dict[str, Any]) -> list[Field]:
    window = hf.get("sliding_window")
    return [Field(f"{name}.attention.sliding_window", "UINT32", window)] if window else []


def _pattern(name: str, hf: dict[str, Any], period: int) -> list[Field]:
    """State which layers have windows, if it is not every layer but each period's last."""
    windowed = [kind == "sliding_attention" for kind in hf["layer_types"]]
    if not hf.get("sliding_window") or windowed == [i % period < period - 1 for i in range(len(windowed))]:
        return []
    return [Field(f"{name}.attention.sliding_window_pattern", "BOOL", windowed)]


def _local_theta(name: str, hf: dict[str, Any]) -> list[Field]:
    theta = hf["rope_parameters"]["sliding_attention"]["rope_theta"]
    return [_float(name, "rope.freq_base_swa", theta)]


def _caps(name: str, hf: dict[str, Any]) -> list[Field]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return [_float(name, cap, hf[cap]) for cap in caps if hf.get(cap)]


def _phi3(name: str, hf: dict[str, Any]) -> list[Field]:
    fields = [Field(f"{name}.attention.sliding_window", "UINT32", hf.get("sliding_window") or 0)]
    if not hf.get("rope_scaling"):
        key = f"{name}.rope.scaling.original_context_length"
        fields.append(Field(key, "UINT32", hf["max_position_embeddings"]))
    return fields


def _olmo2(name: str, hf: dict[str, Any]) -> list[Field]:
    if hf["model_type"] != "olmo3":
        return []
    return [*_window(name, hf), *_pattern(name, hf, 4), *_local_theta(name, hf)]


def _granite(name: str, hf: dict[str, Any]) -> list[Field]:
    return [
        _float(name, "attention.scale", hf["attention_multiplier"]),
        _float(name, "embedding_scale", hf["embedding_multiplier"]),
        _float(name, "residual_scale", hf["residual_multiplier"]),
        _float(name, "logit_scale", hf["logits_scaling"]),
    ]


OWN_FIELDS: dict[str, tuple[Callable[[str, dict[str, Any]], list[Field]], ...]] = {
    "llama": (_window,),
    "gemma2": (_window, partial(_pattern, period=2), _caps),
    "gemma3": (_window, partial(_pattern, period=6), _local_theta, _caps),
    "phi3": (_phi3,),
    "olmo2": (_olmo2,),
    "granite": (_granite,),
}
