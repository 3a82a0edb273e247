"""The configuration in a GGUF file's metadata, as the dict of a config.json."""

import math
from typing import Any

import numpy as np

from jaxft.weights.gguf import PLAIN_TYPES, head_count, kv_head_count, read_dequantised
from jaxft.weights.gguf_header import GgufHeader
from jaxft.weights.gguf_tokenizer import special_token_id

# Metadata llama.*: what is read here or says nothing about the arithmetic. Others are refused, because
# llama.cpp runs several variants of the architecture under this name.
KNOWN_METADATA = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "tensor_data_layout",
}  # fmt: skip
NEUTRAL_METADATA: dict[str, Any] = {  # values with which the model is a plain Llama
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "rope.scaling.attn_factor": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Return the metadata as the dict of a config.json. Raises ValueError unless it is a plain Llama."""
    path, required, optional = header.path, header.required, header.optional
    _check_plain_llama(header)
    heads, width = head_count(header), required("llama.embedding_length", int)
    head_dim = optional("llama.attention.key_length", width // heads)
    values = optional("llama.attention.value_length", head_dim)
    rotated = optional("llama.rope.dimension_count", head_dim)
    if rotated != head_dim or values != head_dim:
        what = f"rope rotates {rotated}" if rotated != head_dim else f"values have {values}"
        raise ValueError(f"{path}: {what} of {head_dim} head dimensions, which is not supported")
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing")
    ends = (special_token_id(header, name) for name in ("eos", "eot"))
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": required("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_head_count(header),
        "head_dim": head_dim,
        "intermediate_size": required("llama.feed_forward_length", int),
        "max_position_embeddings": required("llama.context_length", int),
        "rms_norm_eps": _short(required("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _theta(header),
        "rope_scaling": _rope_scaling(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": special_token_id(header, "bos"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }


def _check_plain_llama(header: GgufHeader) -> None:
    architecture = header.required("general.architecture", str)
    experts = header.optional(f"{architecture}.expert_count", 0)
    if architecture != "llama" or experts:
        what = architecture + (f" with {experts} experts" if experts else "")
        raise ValueError(
            f"{header.path}: its architecture is {what[:60]!r}, but jaxft reads only GGUF files of "
            "architecture 'llama'"
        )
    for name, value in header.metadata.items():
        key = name.removeprefix("llama.")
        neutral = key in KNOWN_METADATA or (key in NEUTRAL_METADATA and value == NEUTRAL_METADATA[key])
        if name != key and not neutral:
            raise ValueError(
                f"{header.path}: metadata {name[:60]}={str(value)[:60]!r} is not supported, because it may "
                "change what the model computes; use the model's Hugging Face folder"
            )


def _short(value: float) -> float:
    """Return a float32 as the shortest decimal that rounds to it: 1e-5, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _theta(header: GgufHeader) -> float:
    return _short(header.optional("llama.rope.freq_base", 10000.0))


def _rope_scaling(header: GgufHeader, head_dim: int) -> dict[str, Any] | None:
    """Return config.json's rope_scaling: linear by a factor, or Llama 3's by a table of divisors."""
    kind = header.optional("llama.rope.scaling.type", "linear")  # llama.cpp's default
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{header.path}: rope scaling {kind!r} is not supported; jaxft reads none, linear and Llama "
            "3's scaling"
        )
    factor, has_table = _linear_factor(header), "rope_freqs.weight" in header.tensors
    if factor != 1.0 and (kind == "none" or has_table):
        other = "rope_freqs.weight" if has_table else "llama.rope.scaling.type=none"
        raise ValueError(f"{header.path}: rope has the linear factor {factor} and {other}; remove one")
    if has_table:
        return _llama3_scaling(header, head_dim)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _linear_factor(header: GgufHeader) -> float:
    """Return by how much positions are divided. llama.rope.scale_linear is the key of files before
    September 2023; 0 means 1, as in llama.cpp.
    """
    keys = ("llama.rope.scaling.factor", "llama.rope.scale_linear")
    given = {key: header.required(key, float) or 1.0 for key in keys if key in header.metadata}
    if len(set(given.values())) > 1:
        stated = " and ".join(f"{key}={value}" for key, value in given.items())
        raise ValueError(f"{header.path}: metadata {stated} contradict each other; remove the wrong one")
    return _short(next(iter(given.values()), 1.0))


def _llama3_scaling(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """Return Llama 3's scaling by the factor of the largest divisor. Raises ValueError for another table."""
    table = header.tensors["rope_freqs.weight"]
    if table.kind not in PLAIN_TYPES or not math.prod(table.shape):
        raise ValueError(f"{header.path}: rope_freqs.weight must be numbers of type {', '.join(PLAIN_TYPES)}")
    divisors = read_dequantised(table).astype(np.float64).ravel()
    factor = _short(divisors.max())
    wavelengths = 2 * math.pi * _theta(header) ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{header.path}: rope_freqs.weight is not Llama 3's scaling (1, 4, 8192), the only table that "
            "is supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
