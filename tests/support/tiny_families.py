"""A tiny random model by transformers of every family that jaxft implements."""

from functools import cache

import jax.numpy as jnp
import numpy as np

from jaxft.batch import Tokens
from jaxft.models.model_types import family_of

VOCAB = 96
SIZES = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip

YARN = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
    rope_theta=1e4,
)  # fmt: skip

# Soft caps that bend the scores and logits of a tiny model.
GEMMA2 = dict(
    head_dim=16, query_pre_attn_scalar=24, sliding_window=7, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)  # fmt: skip
# Name of the row: model_type, and what differs from SIZES. Windows are shorter than the texts of the tests.
FAMILIES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=16, hidden_act="gelu")),
    "mistral with a window": ("mistral", dict(sliding_window=7)),
    "ministral": (
        "ministral",
        dict(
            sliding_window=7, layer_types=["full_attention", "sliding_attention"] * 2, head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 with windows": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "olmo2": ("olmo2", {}),
    "olmo3 with yarn in full attention": ("olmo3", dict(
        sliding_window=7, attention_bias=True,
        rope_parameters=dict(
            full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=5e3)
        ),
    )),
    "granite": ("granite", dict(
        tie_word_embeddings=True, embedding_multiplier=3.0, attention_multiplier=0.2,
        residual_multiplier=0.22, logits_scaling=0.5,
    )),
    "granite with biases": ("granite", dict(
        attention_bias=True, mlp_bias=True, attention_multiplier=0.4, residual_multiplier=0.5,
    )),
    "exaone4": ("exaone4", dict(sliding_window=7, head_dim=16)),
    "exaone4 without windows": ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 4)),
    "seed_oss": (
        "seed_oss",
        dict(head_dim=16, attention_out_bias=True, attention_dropout=0.0, residual_dropout=0.0),
    ),
    "cwm": ("cwm", dict(sliding_window=7, head_dim=16)),
    "internlm3": ("internlm3", dict(attention_bias=True, mlp_bias=True, head_dim=16)),
    "iquestcoder": ("iquestcoder", dict(head_dim=16)),
    "gemma": ("gemma", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": ("gemma2", GEMMA2),
    "vaultgemma": ("vaultgemma", {**GEMMA2, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        dict(
            head_dim=16, query_pre_attn_scalar=24, sliding_window=7, sliding_window_pattern=3,
            tie_word_embeddings=True, rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "gemma3 with a soft cap": (
        "gemma3_text",
        dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=7, final_logit_softcapping=3.0,
             layer_types=["full_attention"] * 4),
    ),
    "phi3 with a window": ("phi3", dict(sliding_window=7)),
    "phi4 mini": ("phi3", dict(
        hidden_size=64, tie_word_embeddings=True, partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling=dict(
            type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            long_factor=[1.0, 2.0, 3.0, 5.0, 7.0, 8.0],
        ),
    )),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, tie_word_embeddings=True)),
    "smollm3 with windows": ("smollm3", dict(
        use_sliding_window=True, sliding_window=7, no_rope_layers=[1, 0, 1, 1], attention_bias=True,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )),
}  # fmt: skip
QUICK = ("llama", "gemma3", "qwen3", "phi3 with a window", "olmo2")  # rows that are tested by default
ZERO_CENTRED = ("gemma", "vaultgemma")  # families whose norms multiply by 1 + weight


@cache
def torch_model(name, seed=0):
    """The row's transformers model with random weights, biases and norms, eager attention."""
    return random_torch(name, seed)


def torch_config(name, **more):
    """The row's configuration in transformers; more: further changes."""
    from transformers import AutoConfig

    kind, changes = FAMILIES[name]
    return AutoConfig.for_model(kind, **{**SIZES, **changes, **more})


def random_torch(name, seed=0, **more):
    """A new model of the row; more: further changes of its configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    kind, config = FAMILIES[name][0], torch_config(name, **more)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    low = -0.5 if kind.startswith(ZERO_CENTRED) else 0.5
    for path, p in model.named_parameters():
        if "norm" in path:
            torch.nn.init.uniform_(p, low, low + 1.0)
        elif p.ndim == 1:
            torch.nn.init.uniform_(p, -0.5, 0.5)
    return model


def our_model(name, dtype=jnp.float32, **options):
    """The jaxft model of a row."""
    config = torch_config(name).to_dict()
    family = family_of(config)
    return family.build(family.from_hf(config), dtype=dtype, **options)


def params_of(torch_state, model, dtype=jnp.float32):
    """The parameter tree of {name: tensor}, by the model's table of names."""
    out = {}
    for path, (name, transpose, *_) in model.weight_names.items():
        layers = range(model.config.layers) if "{i}" in name else [None]
        parts = [torch_state[name.format(i=i)].detach().numpy() for i in layers]
        parts = [p.T if transpose else p for p in parts]
        node = out
        *lead, last = path.split("/")
        for part in lead:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(np.stack(parts) if "{i}" in name else parts[0], dtype)
    return out


def both(name, dtype=jnp.float32):
    """(transformers model, jaxft model, the same parameters)."""
    theirs, ours = torch_model(name), our_model(name, dtype)
    return theirs, ours, params_of(theirs.state_dict(), ours, dtype)


def rows(ids, segments=None, positions=None, branches=None):
    """A batch of rows; by default each is one example."""
    ids = np.asarray(ids, np.int32)
    if segments is None:
        segments = np.ones_like(ids)
    if positions is None:
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    as_int = [None if x is None else jnp.asarray(x, jnp.int32) for x in (segments, positions, branches)]
    read = jnp.zeros((len(ids), 1), jnp.int32)
    return Tokens(jnp.asarray(ids), *as_int[:2], read, read, read.astype(jnp.float32), as_int[2])


def random_ids(count, time, seed=0):
    """Random token ids that are neither padding nor an end."""
    return np.random.default_rng(seed).integers(3, VOCAB, (count, time)).astype(np.int32)


def logits_of(model, params, batch):
    """Logits [B, T, V]."""
    return np.asarray(model.logits(model.head(params), model.hidden(params, batch)[0]))
