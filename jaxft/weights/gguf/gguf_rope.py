"""Rope settings in a GGUF file's metadata and tensors: read as a config.json's rope_scaling, and written.

Keys and defaults are llama.cpp's (src/llama-model.cpp, src/llama-context.cpp).
"""

import math
from typing import Any

import numpy as np

from jaxft.models.dense_config import DenseConfig
from jaxft.nn.rope import Rope, attention_scaling, frequencies
from jaxft.weights.gguf.gguf_architectures import FREQUENCIES, LONG, SHORT
from jaxft.weights.gguf.gguf_file import FLOAT_TYPES, Field, GgufHeader
from jaxft.weights.gguf.gguf_tensors import read_dequantised

YARN_NUMBERS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}  # by config.json's names
YARN_KEYS = {*YARN_NUMBERS, "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"}
ROPE_METADATA = {
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.attn_factor", *(f"rope.scaling.{key}" for key in YARN_KEYS),
}  # fmt: skip


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to this float32: 1e-5, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def decimal_field(header: GgufHeader, name: str, default: float) -> float:
    """Return the architecture's metadata `name`, by default `default`, as its shortest decimal."""
    return shortest(header.optional(header.key(name), default))


def rope_theta(header: GgufHeader, name: str = "rope.freq_base", default: float = 10000.0) -> float:
    """Return rope's theta from the metadata `name`, or the default if the file does not state it."""
    return decimal_field(header, name, default)


def rope_parameters(header: GgufHeader, rotated: int) -> dict[str, Any]:
    """Return RoPE's theta and scaling as `rope_parameters` of a transformers 5 config.json.

    rotated: the rotated dimensions of a head.
    """
    scaling = rope_scaling(header, rotated) or {"rope_type": "default"}
    return {**scaling, "rope_theta": rope_theta(header)}


def rope_scaling(header: GgufHeader, rotated: int) -> dict[str, Any] | None:
    """Return rope_scaling as in a config.json; None without scaling. rotated: rotated dimensions of a head.

    Raises ValueError for a type of scaling that jaxft does not read, for tables that are missing or have the
    wrong length, if metadata and tables contradict each other, or if no rope_scaling can express them.
    """
    kind_key = header.key("rope.scaling.type")
    kind = header.optional(kind_key, "linear")  # llama.cpp's default
    if LONG in header.tensors or SHORT in header.tensors:
        kind = "longrope" if kind_key not in header.metadata else kind  # Phi-3's files lack that key
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(
            f"{header.path}: rope scaling {kind[:60]!r} is not supported; jaxft reads none, linear, yarn, "
            "longrope and Llama 3's scaling; use the model's Hugging Face folder"
        )
    _check_keys(header, kind)
    if kind == "yarn":
        return _yarn_scaling(header)
    if kind == "longrope":
        return _longrope_scaling(header, rotated)
    factor, has_table = _linear_factor(header), FREQUENCIES in header.tensors
    if factor != 1.0 and (kind == "none" or has_table):
        other = FREQUENCIES if has_table else f"{kind_key}=none"
        raise ValueError(
            f"{header.path}: rope has the linear factor {factor} and {other}, which contradict each other; "
            "use the model's Hugging Face folder"
        )
    if has_table:
        return _llama3_scaling(header, rotated)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _check_keys(header: GgufHeader, kind: str) -> None:
    """Raise ValueError if a table or metadata belongs to another type of scaling than `kind`."""
    tables = {FREQUENCIES: {"none", "linear"}, LONG: {"longrope"}, SHORT: {"longrope"}}
    numbers = {f"rope.scaling.{name}": {"yarn"} for name in YARN_KEYS}
    numbers["rope.scaling.attn_factor"] = {"yarn", "longrope"}
    stated = [name for name in tables if name in header.tensors and kind not in tables[name]]
    for name, kinds in numbers.items():
        value = header.optional(header.key(name), 1.0)
        neutral = (1.0, -1.0, 0.0) if name.endswith("yarn_ext_factor") else (1.0,)
        stated += [f"metadata {header.key(name)}"] if kind not in kinds and value not in neutral else []
    if stated:
        is_stated = header.key("rope.scaling.type") in header.metadata
        raise ValueError(
            f"{header.path}: {stated[0]} does not belong to rope scaling {kind!r} "
            f"({'stated' if is_stated else 'not stated'} in the file); use the model's Hugging Face folder"
        )


def _linear_factor(header: GgufHeader) -> float:
    """Return the factor that divides positions: rope.scaling.factor, or rope.scale_linear in files from
    before September 2023. 0 means 1, as in llama.cpp.
    """
    keys = (header.key("rope.scaling.factor"), header.key("rope.scale_linear"))
    given = {key: header.required(key, float) or 1.0 for key in keys if key in header.metadata}
    if len(set(given.values())) > 1:
        stated = " and ".join(f"{key}={value}" for key, value in given.items())
        raise ValueError(
            f"{header.path}: metadata {stated} contradict each other; use the model's Hugging Face folder"
        )
    return shortest(next(iter(given.values()), 1.0))


def _original_length(header: GgufHeader) -> int:
    """Return the context length before scaling; by default the model's."""
    length = header.required(header.key("context_length"), int)
    return header.optional(header.key("rope.scaling.original_context_length"), length)


def _yarn_scaling(header: GgufHeader) -> dict[str, Any]:
    """Return YaRN's rope_scaling.

    llama.cpp multiplies rope.scaling.attn_factor by 0.1 log(factor) + 1, the default of config.json's
    attention_factor. Its converter (conversion/base.py, mistral3.py) writes attention_factor as
    yarn_attn_factor, which llama.cpp ignores, and mscale_all_dim as yarn_log_multiplier.
    """
    factor = _linear_factor(header)
    extrapolation = header.optional(header.key("rope.scaling.yarn_ext_factor"), 1.0)
    if not math.isfinite(factor) or factor < 1 or extrapolation not in (1.0, -1.0):
        wrong = f"factor {factor}" if extrapolation in (1.0, -1.0) else f"yarn_ext_factor {extrapolation}"
        raise ValueError(
            f"{header.path}: yarn rope scaling with {wrong} is not supported; use the model's Hugging Face "
            "folder"
        )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_length(header),
    }

    def stated(name: str) -> float | None:
        key = header.key(f"rope.scaling.{name}")
        return shortest(header.required(key, float)) if key in header.metadata else None

    for name, hf in YARN_NUMBERS.items():
        scaling |= {} if stated(name) is None else {hf: stated(name)}
    names = ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier")
    extra, attention, multiplier = (stated(name) for name in names)
    extra, multiplier = None if extra == 1.0 else extra, multiplier or None
    given = [name for name, x in zip(names, (extra, attention, multiplier), strict=True) if x is not None]
    if len(given) > 1:
        raise ValueError(
            f"{header.path}: yarn rope scaling has two attention factors, {' and '.join(given)}; use the "
            "model's Hugging Face folder"
        )
    if multiplier is not None:
        return scaling | {"mscale": 1.0, "mscale_all_dim": multiplier}
    if extra is not None:
        attention = shortest(extra * (0.1 * math.log(factor) + 1.0))
    return scaling | ({} if attention is None else {"attention_factor": attention})


def _longrope_scaling(header: GgufHeader, rotated: int) -> dict[str, Any]:
    """Return LongRoPE's rope_scaling from its two tables of divisors.

    rope.scaling.attn_factor becomes attention_factor, unless it is the default in config.json: sqrt(1 +
    log(context length / original length) / log(original length)).
    """
    missing = [name for name in (LONG, SHORT) if name not in header.tensors]
    if missing:
        raise ValueError(
            f"{header.path}: rope scaling 'longrope' needs tensor {missing[0]}; "
            "use the model's Hugging Face folder"
        )
    long, short = (_table(header, name) for name in (LONG, SHORT))
    for name, table in ((LONG, long), (SHORT, short)):
        if len(table) != rotated // 2:
            raise ValueError(
                f"{header.path}: {name} has {len(table)} numbers, but rope rotates {rotated // 2} pairs of "
                "dimensions; "
                "use the model's Hugging Face folder"
            )
    scaling = {
        "rope_type": "longrope",
        "long_factor": [shortest(x) for x in long],
        "short_factor": [shortest(x) for x in short],
        "original_max_position_embeddings": _original_length(header),
    }
    length, original = header.required(header.key("context_length"), int), _original_length(header)
    if original < 2 or length < original:
        raise ValueError(
            f"{header.path}: rope scaling 'longrope' from {original} to {length} tokens is not supported; "
            "the original length must be above 1 and at most the context length. "
            "Use the model's Hugging Face folder"
        )
    default = math.sqrt(1 + math.log(length / original) / math.log(original))
    attention = shortest(header.optional(header.key("rope.scaling.attn_factor"), 1.0))
    if not math.isclose(attention, default, rel_tol=1e-5):
        scaling["attention_factor"] = attention
    return scaling


def _table(header: GgufHeader, name: str) -> np.ndarray:
    """Return a table of divisors in float64. Raises ValueError if they are not all positive and finite."""
    table = header.tensors[name]
    if table.kind not in FLOAT_TYPES or not math.prod(table.shape):
        raise ValueError(
            f"{header.path}: {name} must have numbers of type {', '.join(FLOAT_TYPES)}, got {table.kind} "
            f"{table.shape}; use the model's Hugging Face folder"
        )
    divisors = read_dequantised(table).astype(np.float64).ravel()
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ValueError(
            f"{header.path}: {name} must contain finite numbers above 0, got {divisors.min():g} to "
            f"{divisors.max():g}; use the model's Hugging Face folder"
        )
    return divisors


def _llama3_scaling(header: GgufHeader, rotated: int) -> dict[str, Any]:
    """Return Llama 3's rope_scaling from the table of divisors, the largest of which is the factor.

    The table does not state the original length; 8192 with suitable low_freq_factor and high_freq_factor
    expresses any other. Raises ValueError for a table that is not Llama 3's.
    """
    divisors, theta, original = _table(header, FREQUENCIES), rope_theta(header), 8192
    factor = shortest(divisors.max())
    turns = original * theta ** (-np.arange(0, rotated, 2) / rotated) / (2 * math.pi)
    for low, high in _llama3_limits(divisors, factor, turns):
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"{header.path}: {FREQUENCIES} is not a table of Llama 3's rope scaling, the only supported one; use "
        "the model's Hugging Face folder"
    )


def _llama3_limits(divisors: np.ndarray, factor: float, turns: np.ndarray) -> list[tuple[float, float]]:
    """Return candidates of (low_freq_factor, high_freq_factor): Llama 3's (1, 4), and two limits fitted to
    the frequencies that are divided by more than 1 and less than `factor`; [] unless there is one divisor per
    frequency. turns: full turns of each frequency in the original length.
    """
    if divisors.shape != turns.shape:
        return []
    undivided = (factor / divisors - 1) / max(factor - 1, 1e-6)  # 0 to 1, up to low and from high on
    between = (undivided > 1e-4) & (undivided < 1 - 1e-4)
    if between.sum() < 2:
        return [(1.0, 4.0)]
    slope, offset = np.polyfit(turns[between], undivided[between], 1)
    low, high = (float(f"{(share - offset) / slope:.6g}") if slope > 0 else 0.0 for share in (0, 1))
    return [(1.0, 4.0), (low, high)] if 0 < low < high else [(1.0, 4.0)]


# Writing


def float_field(architecture: str, key: str, value: float) -> Field:
    """Return the metadata entry `architecture.key` with a float32 value."""
    return Field(f"{architecture}.{key}", "FLOAT32", float(value))


def rope_fields(name: str, config: DenseConfig) -> tuple[list[Field], dict[str, np.ndarray]]:
    """Return (the metadata of a model's rope, its tables of divisors by tensor name). name: the GGUF
    architecture. Raises ValueError for a type of rope that llama.cpp does not have.
    """
    rope = config.rope
    tables: dict[str, np.ndarray] = {}
    fields = [float_field(name, "rope.freq_base", rope.theta)]
    if rope.kind in ("linear", "yarn"):
        fields += [
            Field(f"{name}.rope.scaling.type", "STRING", rope.kind),
            float_field(name, "rope.scaling.factor", rope.factor),
        ]
    if rope.kind in ("yarn", "longrope"):
        key = f"{name}.rope.scaling.original_context_length"
        fields.append(Field(key, "UINT32", rope.original_max_positions))
    attention = attention_scaling(rope)
    if rope.kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            fields.append(float_field(name, f"rope.scaling.yarn_{key}", getattr(rope, key)))
        attention /= 1 + 0.1 * math.log(max(rope.factor, 1.0))  # llama.cpp multiplies by its default
    if rope.kind == "longrope" or not math.isclose(attention, 1, rel_tol=1e-6):
        fields.append(float_field(name, "rope.scaling.attn_factor", attention))
    if rope.kind == "longrope":
        if name != "phi3":  # whose converter states no type
            fields.append(Field(f"{name}.rope.scaling.type", "STRING", "longrope"))
        for table, divisors in ((LONG, rope.long_factor), (SHORT, rope.short_factor)):
            tables[table] = np.array(divisors, np.float32)
    if rope.kind == "llama3":
        plain = frequencies(Rope(rope.theta, rotated=rope.rotated), config.head_dim)
        tables[FREQUENCIES] = (plain / frequencies(rope, config.head_dim)).astype(np.float32)
    if rope.kind not in ("default", "linear", "yarn", "longrope", "llama3"):
        raise ValueError(
            f"rope type {rope.kind!r} cannot be written as GGUF; llama.cpp does not have it; "
            "write a Hugging Face folder, without --gguf"
        )
    return fields, tables
