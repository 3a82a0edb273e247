"""A model's configuration as GGUF metadata: the inverse of gguf_config and gguf_rope.

What cannot be expressed is refused by reading the metadata back, see `check_config`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.models import families
from jaxft.models.dense_config import DenseConfig
from jaxft.models.model import ModelConfig
from jaxft.nn.rope import Rope, rotated_dims
from jaxft.weights.gguf_architectures import ARCHITECTURES
from jaxft.weights.gguf_config import gguf_config
from jaxft.weights.gguf_header import read_gguf_header
from jaxft.weights.gguf_rope import FREQUENCIES, LONG, SHORT
from jaxft.weights.gguf_write import Field

ARCHITECTURE_OF = {spec.model_type: name for name, spec in ARCHITECTURES.items() if name != "mistral3"} | {
    "mistral": "llama",
    "olmo3": "olmo2",
}
ALWAYS_TIED, NEVER_TIED = ("gemma", "gemma2"), ("olmo2",)  # architectures whose head llama.cpp expects so
# What says nothing about the arithmetic, or follows from the tensors. Rope is compared as the config has it.
COMPARED_ELSEWHERE = {
    "architectures", "model_type", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling",
    "rope_parameters", "rope_local_base_freq", "original_max_position_embeddings", "partial_rotary_factor",
    "max_position_embeddings", "initializer_range", "use_cache", "tie_word_embeddings",
}  # fmt: skip
NEUTRAL: tuple[Any, ...] = (None, False, 1, 1.0, [], ())  # values of a setting that one of two families lacks


def architecture_for(config: ModelConfig) -> str:
    """Return the GGUF architecture of a model. Raises ValueError if jaxft writes none for its family."""
    kind = families.config_to_hf(config)["model_type"]
    if kind not in ARCHITECTURE_OF:
        raise ValueError(
            f"{kind} models cannot be written as GGUF; jaxft writes {', '.join(sorted(ARCHITECTURE_OF))}. "
            "Write a Hugging Face folder, without --gguf, and convert it with llama.cpp's converter"
        )
    return ARCHITECTURE_OF[kind]


def config_fields(config: ModelConfig) -> tuple[list[Field], dict[str, np.ndarray]]:
    """Return the metadata of a model's architecture, and the tables of its rope by tensor name."""
    if not isinstance(config, DenseConfig):
        raise TypeError(f"expected a DenseConfig, got {type(config).__name__}")
    name, hf = architecture_for(config), families.config_to_hf(config)
    sizes = {
        "vocab_size": config.vocab,
        "context_length": config.max_positions,
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
    own = OWN_FIELDS.get(name)
    return [*fields, *rope, *(own(name, hf) if own else [])], tables


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
    if rope.kind == "yarn":
        numbers = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            numbers["attn_factor"] = rope.attention_factor
        elif rope.mscale_all_dim:
            numbers["log_multiplier"] = rope.mscale_all_dim
        fields += [_float(name, f"rope.scaling.yarn_{key}", value) for key, value in numbers.items()]
    if rope.kind == "longrope":
        original = rope.original_max_positions or 1
        default = math.sqrt(1 + math.log(rope.factor) / math.log(original))
        attention = default if rope.attention_factor is None else rope.attention_factor
        fields.append(_float(name, "rope.scaling.attn_factor", attention))
        for table, divisors in ((LONG, rope.long_factor), (SHORT, rope.short_factor)):
            tables[table] = np.array(divisors, np.float32)
    if rope.kind == "llama3":
        tables[FREQUENCIES] = _llama3_divisors(rope, config.head_dim)
    if rope.kind not in ("default", "linear", "yarn", "longrope", "llama3"):
        raise ValueError(f"rope type {rope.kind!r} cannot be written as GGUF; llama.cpp does not have it")
    return fields, tables


def _llama3_divisors(rope: Rope, head_dim: int) -> np.ndarray:
    """Return what each frequency is divided by: 1 for short wavelengths, factor for long ones, and between
    them a linear mix of the frequencies (transformers' rope type llama3).
    """
    turns = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # per token
    rotations = (rope.original_max_positions or 1) * turns
    mix = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mix = np.clip(mix, 0, 1)
    return (1 / (mix + (1 - mix) / rope.factor)).astype(np.float32)


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


def _gemma2(name: str, hf: dict[str, Any]) -> list[Field]:
    return [*_window(name, hf), *_pattern(name, hf, 2), *_caps(name, hf)]


def _gemma3(name: str, hf: dict[str, Any]) -> list[Field]:
    return [*_window(name, hf), *_pattern(name, hf, 6), *_local_theta(name, hf), *_caps(name, hf)]


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


OWN_FIELDS: dict[str, Callable[[str, dict[str, Any]], list[Field]]] = {
    "llama": _window,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
}


def check_config(path: Path, config: ModelConfig, tied: bool) -> None:
    """Raise ValueError unless a GGUF file's metadata are read as this config, so that llama.cpp computes the
    same. tied: whether the head is the embedding, which an adapter of the head may have changed.
    """
    header = read_gguf_header(path)
    hf = gguf_config(header)
    found = families.family_of(hf).from_hf(hf)
    differing = _differences(config, found)
    if differing:
        raise ValueError(
            f"this model cannot be written as GGUF of architecture {header.architecture}, which lacks "
            f"{', '.join(differing)}. Write a Hugging Face folder, without --gguf"
        )
    if header.architecture in (NEVER_TIED if tied else ALWAYS_TIED):
        which = "a head that is the embedding" if tied else "a head that is not the embedding"
        raise ValueError(f"{which} cannot be written as GGUF of architecture {header.architecture}")


def _differences(ours: ModelConfig, read: ModelConfig) -> list[str]:
    """Return the settings of `ours` that the config which was read does not have, as name=value."""
    a, b = families.config_to_hf(ours), families.config_to_hf(read)
    wrong = []
    for key in sorted((a.keys() | b.keys()) - COMPARED_ELSEWHERE):
        if key in a and key in b:
            same = _equal(a[key], b[key])
        else:
            same = (a[key] if key in a else b[key]) in NEUTRAL or key == "layer_types"
        wrong += [] if same else [f"{key}={a.get(key)!r:.60}"]
    for name in ("rope", "local_rope"):
        left, right = vars(ours).get(name), vars(read).get(name)
        if left is not None and right is not None:
            wrong += [
                f"{name}'s {key}={value!r:.60}"
                for key, value in vars(left).items()
                if not _equal(value, vars(right)[key])
            ]
    return wrong


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
