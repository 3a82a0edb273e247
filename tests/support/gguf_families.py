"""Tiny random transformers models of every architecture whose GGUF files are read, and those files as
llama.cpp's converter (conversion/*.py) writes them, with names from the gguf package.
"""

import math

import gguf as gguf_package
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf_files import permute, write_file

HEADS, KV_HEADS, HEAD_DIM, VOCAB, CONTEXT = 4, 2, 16, 96, 64
LLAMA_MODEL = ("llama", "mistral3", "smollm3", "granite")  # LlamaModel and its subclasses in the converter
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.25, 1.5, 1.75],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
    "partial_rotary_factor": 0.75,
}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 1e4}
GLOBAL_ROPE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
GRANITE = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}  # fmt: skip
FAMILIES = {  # name -> general.architecture, model_type of transformers, its settings
    "llama": ("llama", "llama", {}),
    "mistral": ("llama", "mistral", {"sliding_window": 5}),
    "mistral small": ("mistral3", "mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", "qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32}),
    "gemma": ("gemma", "gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": HEAD_DIM,
            "sliding_window": 5,
            "rope_parameters": {"full_attention": GLOBAL_ROPE, "sliding_attention": LOCAL_ROPE},
        },
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": 5}),
    "phi4 mini": (
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", "smollm3", {"num_hidden_layers": 4}),
    "olmo2": ("olmo2", "olmo2", {}),
    "olmo3": (
        "olmo2",
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "granite": ("granite", "granite", GRANITE),
}

LONG_YARN = {**YARN, "original_max_position_embeddings": 256}  # long enough for betas to matter
ROPES = {  # of files that jaxft writes; those of phi4 mini are partial
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": LONG_YARN,
    "yarn attention_factor 1.3": {**LONG_YARN, "attention_factor": 1.3},
    "yarn attention_factor 1": {**LONG_YARN, "attention_factor": 1.0},
    "yarn mscale": {**LONG_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn betas": {**LONG_YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 90.0,
        "original_max_position_embeddings": 64,
    },
    "longrope, short texts": {"rope_type": "longrope", "original_max_position_embeddings": 256},
    "longrope, long texts": {"rope_type": "longrope", "original_max_position_embeddings": 128},
}


def with_rope(name, rope):
    """Settings of a family with one of ROPES, in all layers or in those without a window."""
    changes, rope = FAMILIES[name][2], {**ROPES[rope], "rope_theta": 1e4}
    if rope["rope_type"] == "longrope":
        pairs = 6 if name == "phi4 mini" else changes.get("head_dim", HEAD_DIM) // 2
        rope |= {
            "short_factor": [1 + i / 16 for i in range(pairs)],
            "long_factor": [1.0 + i for i in range(pairs)],
        }
        original = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
        if name == "phi4 mini":
            return {**original, "rope_parameters": {**rope, "partial_rotary_factor": 0.75}}
    if name in ("gemma3", "olmo3"):
        local = {**LOCAL_ROPE, "rope_theta": 500.0 if name == "gemma3" else 1e4}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    return {"rope_parameters": rope}


def tiny_family(name, seed=0, **more):
    """A tiny random model of a family. Norm weights have the bits of bfloat16, as published ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _, model_type, changes = FAMILIES[name]
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
    )
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(seed)
    settings = {**sizes, **ends, "initializer_range": 0.2, **changes, **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    gemma = model_type.startswith("gemma")
    for parameter_name, p in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(p, -0.5 if gemma else 0.5, 0.5 if gemma else 1.5)
            p.data = p.data.bfloat16().float()
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    return model


def family_tensors(model, architecture):
    """(name, value) of the tensors as the converter stores them: Gemma's norms with 1 added, the rows of q
    and k of LlamaModel permuted.
    """
    config = model.config
    arch = next(key for key, name in gguf_package.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf_package.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        module = name.split(".")[-2]
        if architecture in LLAMA_MODEL and module in heads:
            value = permute(value, heads[module])
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), value


def _rope_fields(config):
    """TextModel.set_gguf_parameters of conversion/base.py."""
    rope = config.rope_parameters
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    fields = [("add_rope_freq_base", full["rope_theta"])]
    kinds = gguf_package.RopeScalingType
    if full["rope_type"] == "linear":
        fields += [("add_rope_scaling_type", kinds.LINEAR), ("add_rope_scaling_factor", full["factor"])]
    if full["rope_type"] == "yarn":
        fields += [("add_rope_scaling_type", kinds.YARN), ("add_rope_scaling_factor", full["factor"])]
        fields.append(("add_rope_scaling_orig_ctx_len", full["original_max_position_embeddings"]))
        for key in ("beta_fast", "beta_slow"):
            fields += [(f"add_rope_scaling_yarn_{key}", full[key])] if key in full else []
    return fields + ([("add_rope_freq_base_swa", local["rope_theta"])] if local else [])


def _own_fields(config, architecture):
    """What set_gguf_parameters of the architecture's class in the converter adds or leaves out."""
    if architecture in LLAMA_MODEL:
        yield "add_vocab_size", config.vocab_size
        yield "add_rope_dimension_count", HEAD_DIM
    if architecture in ("gemma2", "gemma3"):
        yield "add_sliding_window", config.sliding_window
    if architecture == "gemma2":
        yield "add_attn_logit_softcapping", config.attn_logit_softcapping
        yield "add_final_logit_softcapping", config.final_logit_softcapping
    if config.model_type == "mistral" and config.sliding_window:
        yield "add_sliding_window", config.sliding_window
    if config.model_type == "olmo3":
        yield "add_sliding_window", config.sliding_window
        yield "add_sliding_window_pattern", [kind == "sliding_attention" for kind in config.layer_types]
    if architecture == "phi3":
        yield "add_rope_scaling_orig_ctx_len", config.original_max_position_embeddings
        yield "add_rope_dimension_count", int(HEAD_DIM * config.rope_parameters["partial_rotary_factor"])
        yield "add_sliding_window", config.sliding_window or 0
    if architecture == "granite":
        yield "add_attention_scale", config.attention_multiplier
        yield "add_embedding_scale", config.embedding_multiplier
        yield "add_residual_scale", config.residual_multiplier
        yield "add_logit_scale", config.logits_scaling


def _longrope(config):
    """Phi3MiniModel.generate_extra_tensors: fields and tensors."""
    rope, original = config.rope_parameters, config.original_max_position_embeddings
    attention = math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))
    tables = [
        (f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
        for kind in ("long", "short")
    ]
    return [("add_rope_scaling_attn_factors", attention)], tables


def write_family(path, name, model=None, kind=Kind.F32, fields=(), extra=()):
    """The GGUF file of a family's tiny model; fields, extra and kind as in gguf_files.write_gguf."""
    architecture = FAMILIES[name][0]
    model = model or tiny_family(name)
    config = model.config
    heads_stated = architecture not in ("phi3", "granite")  # whose config.json has no head_dim
    metadata = [
        ("add_block_count", config.num_hidden_layers),
        ("add_context_length", config.max_position_embeddings),
        ("add_embedding_length", config.hidden_size),
        ("add_feed_forward_length", config.intermediate_size),
        ("add_head_count", config.num_attention_heads),
        ("add_head_count_kv", config.num_key_value_heads),
        ("add_layer_norm_rms_eps", config.rms_norm_eps),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
        ("add_pad_token_id", 0),
        *([("add_key_length", config.head_dim), ("add_value_length", config.head_dim)] * heads_stated),
        *([] if architecture in ("gemma", "gemma2") else _rope_fields(config)),
        *_own_fields(config, architecture),
    ]
    tables = []
    if architecture == "phi3" and config.rope_parameters["rope_type"] == "longrope":
        more, tables = _longrope(config)
        metadata += more
    tensors = [*family_tensors(model, architecture), *tables, *extra]
    return write_file(path, architecture, [*metadata, *fields], tensors, kind)
