"""Which metadata llama.cpp uses for each architecture, and the check of written files against it.

jaxft's own reader (gguf_config, gguf_rope) takes every key as what the model's config.json stated. llama.cpp
ignores some of them, even some that its converter writes, so a written file is checked as llama.cpp reads it.
Sources are llama.cpp's src/llama-model.cpp, src/llama-context.cpp and src/models/, and ggml's rope_yarn;
tests/weights/test_gguf_runtime.py compares log-probs of its runtime.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.models import model_types
from jaxft.models.model import ModelConfig
from jaxft.nn.rope import USED, Rope, attention_scaling, frequencies
from jaxft.weights.gguf.gguf_architectures import (
    ALWAYS_READ,
    FREQUENCIES,
    LLAMA_CPP_READS,
    LONG,
    ROPE_TABLES,
    SHORT,
    WINDOW,
    Reads,
)
from jaxft.weights.gguf.gguf_config import gguf_config
from jaxft.weights.gguf.gguf_file import GgufHeader, read_gguf_header
from jaxft.weights.gguf.gguf_tensors import read_dequantised

ALWAYS_TIED, NEVER_TIED = ("gemma", "gemma2"), ("olmo2",)  # architectures whose head llama.cpp expects so
HEADS_OF_WIDTH = ("phi3", "olmo2")  # architectures whose heads together have the model's width in llama.cpp
# Metadata that says nothing about the arithmetic, or follows from the tensors. Rope is compared by its
# numbers.
COMPARED_ELSEWHERE = {
    "architectures", "model_type", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling",
    "rope_parameters", "rope_local_base_freq", "original_max_position_embeddings", "partial_rotary_factor",
    "max_position_embeddings", "initializer_range", "use_cache", "tie_word_embeddings",
}  # fmt: skip
WINDOW_SETTINGS = {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"}
NEUTRAL: tuple[Any, ...] = (None, False, 1, 1.0, [], ())  # values of a setting that one of two families lacks


class RopeNumbers(NamedTuple):
    """A rope as numbers: the frequencies [d/2] of texts up to `original` tokens and of longer ones, and the
    factor on cos and sin.
    """

    short: np.ndarray
    long: np.ndarray
    original: int
    scale: float


def check_config(path: Path, config: ModelConfig, tied: bool, source: GgufHeader | None = None) -> list[str]:
    """Raise ValueError unless llama.cpp computes a written file as jaxft computes a model of this config.

    tied: whether the head is the embedding, which an adapter of the head may have changed. source: the file
    whose metadata were copied; what llama.cpp ignores in that file too is returned as a warning.
    """
    header = read_gguf_header(path)
    name, lacking = header.architecture, _differences(config, header)
    before = _differences(config, source) if source else []
    new = [setting for setting in lacking if setting not in before]
    if new:
        raise ValueError(
            f"this model cannot be written as GGUF: llama.cpp's architecture {name} lacks {', '.join(new)}. "
            "Write a Hugging Face folder, without --gguf"
        )
    if name in (NEVER_TIED if tied else ALWAYS_TIED):
        which = "a head that is the embedding" if tied else "a head that is not the embedding"
        raise ValueError(f"{which} cannot be written as GGUF of architecture {name}")
    if name in HEADS_OF_WIDTH and config.heads * config.head_dim != config.width:
        raise ValueError(
            f"{config.heads} heads of {config.head_dim} cannot be written as GGUF of architecture {name}: "
            f"llama.cpp expects that they make up the width of {config.width}. Write a Hugging Face folder, "
            "without --gguf"
        )
    return [f"warning: llama.cpp ignores {', '.join(lacking)}, in the source file too"] if lacking else []


def _differences(config: ModelConfig, header: GgufHeader) -> list[str]:
    """Return the settings of a config that llama.cpp does not compute from a file, as name=value."""
    reads = LLAMA_CPP_READS[header.architecture]
    seen = _as_llama_cpp_reads(header)
    hf = gguf_config(  # without scaling of rope, which is compared by its numbers
        replace(
            seen,
            metadata={key: x for key, x in seen.metadata.items() if ".rope.scaling." not in key},
            tensors={name: x for name, x in seen.tensors.items() if name not in ROPE_TABLES},
        )
    )
    ours, theirs = (
        {key: value for key, value in model_types.config_to_hf(c).items() if key not in COMPARED_ELSEWHERE}
        for c in (config, model_types.family_of(hf).from_hf(hf))
    )
    if WINDOW not in reads.metadata and (ours.get("sliding_window") or 0) >= hf["max_position_embeddings"]:
        ours = {key: value for key, value in ours.items() if key not in WINDOW_SETTINGS}
        theirs = {key: value for key, value in theirs.items() if key not in WINDOW_SETTINGS}
    wrong = []
    for key in sorted(ours.keys() | theirs.keys()):
        if key in ours and key in theirs:
            same = _equal(ours[key], theirs[key])
        else:
            same = (ours[key] if key in ours else theirs[key]) in NEUTRAL or key == "layer_types"
        wrong += [] if same else [f"{key}={ours.get(key)!r:.60}"]
    for name, numbers in _ropes(seen, reads, config.head_dim).items():
        rope = vars(config).get(name)
        if rope is not None and not _same_rope(rope, config.head_dim, numbers):
            settings = [f"{key}={getattr(rope, key)!r:.60}" for key in ("theta", *USED[rope.kind])]
            wrong.append(f"{name} of type {rope.kind!r} with {', '.join(settings)}")
    return wrong


def _as_llama_cpp_reads(header: GgufHeader) -> GgufHeader:
    """Return a header without the metadata of its architecture that llama.cpp ignores, and without tables of
    rope that it does not load.
    """
    prefix, reads = f"{header.architecture}.", LLAMA_CPP_READS[header.architecture]
    known = {prefix + key for key in ALWAYS_READ | reads.metadata}
    metadata = {key: x for key, x in header.metadata.items() if not key.startswith(prefix) or key in known}
    refused = set(ROPE_TABLES) - set(reads.tables)
    return replace(
        header,
        metadata=metadata,
        tensors={name: tensor for name, tensor in header.tensors.items() if name not in refused},
    )


def _ropes(header: GgufHeader, reads: Reads, head_dim: int) -> dict[str, RopeNumbers]:
    """Return the ropes that llama.cpp computes, by the names of a config's fields."""

    def number(name: str, default: float) -> float:
        return header.optional(header.key(name), default)

    length = header.required(header.key("context_length"), int)
    original = header.optional(header.key("rope.scaling.original_context_length"), length)
    dims = header.optional(header.key("rope.dimension_count"), head_dim)
    kind = header.optional(header.key("rope.scaling.type"), "linear")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if kind == "none" else factor
    theta, scale = number("rope.freq_base", 10000.0), number("rope.scaling.attn_factor", 1.0)
    local_scale = scale if reads.local_attn_factor else 1.0
    divided = np.ones(dims // 2)  # how much of each frequency is divided by the factor
    if kind == "yarn":
        turns = (number("rope.scaling.yarn_beta_fast", 32.0), number("rope.scaling.yarn_beta_slow", 1.0))
        low, high = (dims * math.log(original / (2 * math.pi * x)) / (2 * math.log(theta)) for x in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dims - 1)
        divided = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
        growth = 0.1 * math.log(max(factor, 1.0))
        scale *= (1 + growth) / (1 + growth * number("rope.scaling.yarn_log_multiplier", 0.0))
    exponents = -np.arange(0, dims, 2) / dims
    freqs = theta**exponents * (divided / factor + 1 - divided)
    short, long = (freqs / _divisors(header, table) for table in _tables(reads, kind))
    ropes = {"rope": RopeNumbers(short, long, original, scale)}
    if reads.local_theta:
        local = number(reads.local_theta, 10000.0) ** exponents
        ropes["local_rope"] = RopeNumbers(local, local, original, local_scale)
    return ropes


def _tables(reads: Reads, kind: str) -> tuple[str, str]:
    """Return the tables of divisors for short and for long texts. llama.cpp loads them if a file has them."""
    longrope = kind == "longrope" or FREQUENCIES not in reads.tables
    return (SHORT, LONG) if longrope else (FREQUENCIES, FREQUENCIES)


def _divisors(header: GgufHeader, table: str) -> np.ndarray | float:
    return read_dequantised(header.tensors[table]) if table in header.tensors else 1.0


def _same_rope(rope: Rope, head_dim: int, numbers: RopeNumbers) -> bool:
    longrope = rope.kind == "longrope"
    long = replace(rope, short_factor=rope.long_factor) if longrope else rope
    expected = RopeNumbers(
        frequencies(rope, head_dim),
        frequencies(long, head_dim),
        (rope.original_max_positions or 0) if longrope else numbers.original,
        attention_scaling(rope),
    )
    pairs: Any = zip(numbers, expected, strict=True)
    return all(np.shape(x) == np.shape(y) and np.allclose(x, y, rtol=1e-5, atol=0) for x, y in pairs)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
