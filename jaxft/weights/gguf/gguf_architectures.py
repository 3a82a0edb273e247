"""The supported architectures of GGUF files: names and layouts of tensors, and metadata that llama.cpp reads.

Sources are llama.cpp's converter (convert_hf_to_gguf.py and its folder conversion/), its src/llama-model.cpp
and src/models/.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxft.weights.gguf.gguf_file import GgufHeader, unwritable

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
NORMS_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NORMS_AROUND = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **NORMS_AFTER}
FUSED = {  # Phi-3's q, k, v and gate, up are one tensor each, in this order, as in its Hugging Face files
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


# Tensors of rope: divisors of frequencies.
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TABLES = (FREQUENCIES, LONG, SHORT)
# Metadata keys, after the name of the architecture.
WINDOW, LOCAL_THETA = "attention.sliding_window", "rope.freq_base_swa"
FINAL_CAP = "final_logit_softcapping"
WINDOWS = frozenset({WINDOW, "attention.sliding_window_pattern"})
CAPS = frozenset({"attn_logit_softcapping", FINAL_CAP})
GRANITE_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
MISTRAL_READS = frozenset({"attention.temperature_scale", "rope.scaling.yarn_log_multiplier",
                           "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"})  # fmt: skip
GEMMA2_READS, GEMMA3_READS = WINDOWS | CAPS | {LOCAL_THETA}, WINDOWS | {FINAL_CAP, LOCAL_THETA}
GRANITE_READS = GRANITE_SCALES | {"rope.scaling.finetuned"}
ALWAYS_READ = frozenset({  # keys that llama.cpp reads for every architecture
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "expert_count", "expert_used_count", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
})  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The layout of one architecture's tensors in GGUF files, and the metadata that llama.cpp reads for it.

    model_type, model_class: model_type and architecture class in config.json. modules: a layer's modules,
    GGUF name to Hugging Face name. interleaved: whether the rows of q and k are permuted for rope over
    neighbouring dimensions (LlamaModel.permute of the converter). norms_plus_one: whether 1 is added to the
    weights of all norms, as for Gemma, which multiplies by 1 + weight where llama.cpp multiplies by the
    weight. biases: GGUF names of the modules that have a bias.

    reads: metadata keys in addition to ALWAYS_READ that change what llama.cpp computes. tables: rope tensors
    that llama.cpp loads; it refuses a file with further ones. local_theta: metadata key of rope's theta in
    layers with windows, whose frequencies are not scaled; None if all layers have the same rope.
    local_attn_factor: whether rope.scaling.attn_factor applies in layers with windows.
    """

    model_type: str
    model_class: str
    modules: dict[str, str]
    interleaved: bool = False
    norms_plus_one: bool = False
    biases: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    tables: tuple[str, ...] = ()
    local_theta: str | None = None
    local_attn_factor: bool = False


LLAMA_MODULES = {**PROJECTIONS, **NORMS_BEFORE}
GEMMA_MODULES = {**PROJECTIONS, **NORMS_AROUND}
OLMO_MODULES = {**PROJECTIONS, **NORMS_AFTER, **QK_NORMS}
QWEN2_BIASES = frozenset({"attn_q", "attn_k", "attn_v"})
_LLAMA = Architecture("llama", "LlamaForCausalLM", LLAMA_MODULES, interleaved=True, tables=ROPE_TABLES)
ARCHITECTURES = {
    "llama": _LLAMA,  # converted Mistrals have windows, which llama.cpp ignores
    "mistral3": replace(_LLAMA, model_type="mistral", model_class="MistralForCausalLM", reads=MISTRAL_READS),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA_MODULES, biases=QWEN2_BIASES),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", LLAMA_MODULES | QK_NORMS),
    "gemma": Architecture("gemma", "GemmaForCausalLM", LLAMA_MODULES, norms_plus_one=True),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", GEMMA_MODULES, norms_plus_one=True, reads=GEMMA2_READS
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA_MODULES | QK_NORMS,
        norms_plus_one=True,
        reads=GEMMA3_READS,
        local_theta=LOCAL_THETA,
        local_attn_factor=True,
    ),  # fmt: skip
    # llama.cpp reads Phi-3's window, and then sets it to 0
    "phi3": Architecture("phi3", "Phi3ForCausalLM", FUSED | NORMS_BEFORE, tables=(LONG, SHORT)),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA_MODULES, interleaved=True),
    "olmo2": Architecture(
        "olmo2", "Olmo2ForCausalLM", OLMO_MODULES, reads=WINDOWS, local_theta="rope.freq_base"
    ),
    "granite": replace(_LLAMA, model_type="granite", model_class="GraniteForCausalLM", reads=GRANITE_READS),
}


def architecture_of(header: GgufHeader) -> Architecture:
    """Return the architecture of a file. Raises ValueError if it is not supported or has experts."""
    name = header.architecture
    experts = header.optional(f"{name}.expert_count", 0)
    if name not in ARCHITECTURES or experts:
        what = f"{name[:60]!r}" + (f" with {experts} experts" if experts else "")
        raise ValueError(
            f"{header.path}: GGUF architecture {what} is not supported; use a model of a supported one, see "
            "python scripts/help.py models"
        )
    return ARCHITECTURES[name]


def hf_name(architecture: Architecture, name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor. A tensor that the architecture does not have keeps its
    name, and loading the file then raises an error.
    """
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return NAMES.get(name, name)
    layer, module, kind = match.groups()
    if module not in architecture.modules or (kind == "bias" and module not in architecture.biases):
        return name
    return f"model.layers.{layer}.{architecture.modules[module]}.{kind}"


def gguf_name(architecture: str, name: str) -> str:
    """Return a tensor's GGUF name by its Hugging Face name. Raises ValueError if there is none."""
    spec = ARCHITECTURES[architecture]
    plain = {hf: gguf for gguf, hf in NAMES.items()}
    if name in plain:
        return plain[name]
    module, _, kind = name.removeprefix("model.layers.").rpartition(".")
    layer, _, module = module.partition(".")
    modules = {hf: gguf for gguf, hf in spec.modules.items()}
    if module not in modules or (kind == "bias" and modules[module] not in spec.biases):
        raise unwritable(
            f"{name} cannot be written as GGUF: llama.cpp's architecture {architecture} has no such tensor"
        )
    return f"blk.{layer}.{modules[module]}.{kind}"


class StoredAs(NamedTuple):
    """How a tensor's values in GGUF differ from the Hugging Face values. heads: number of heads within which
    the rows of q or k are permuted (see gguf_write.permute_heads); None for rows in the same order. plus_one:
    whether 1 is added.
    """

    heads: int | None
    plus_one: bool


def stored_as(architecture: Architecture, name: str, heads: int, kv_heads: int) -> StoredAs:
    """Return how a tensor's values are stored. name: the tensor's Hugging Face name. heads: query heads."""
    ordered = {"q_proj": heads, "k_proj": kv_heads} if architecture.interleaved else {}
    module = name.rpartition(".")[0].rpartition(".")[2]
    return StoredAs(ordered.get(module), architecture.norms_plus_one and name.endswith("norm.weight"))


def head_count(header: GgufHeader) -> int:
    """Return the number of query heads."""
    return _count_in_all_layers(header, "attention.head_count")


def kv_head_count(header: GgufHeader) -> int:
    """Return the number of key and value heads."""
    stated = header.key("attention.head_count_kv") in header.metadata
    return _count_in_all_layers(header, "attention.head_count_kv") if stated else head_count(header)


def _count_in_all_layers(header: GgufHeader, name: str) -> int:
    """Return the count at `name`, which some files list by layer. Raises ValueError if layers differ."""
    key = header.key(name)
    if isinstance(header.metadata.get(key), list):
        counts = header.array(key, int) or []
        if len(set(counts)) != 1:
            raise header.refusal(f"metadata {key} must be the same for all layers, got {counts[:8]}")
        count = counts[0]
    else:
        count = header.required(key, int)
    if count < 1:
        raise header.refusal(f"metadata {key} must be above 0, got {count}")
    return count
