"""Llama against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import decoded, prefilled

from jaxft.batch import Tokens
from jaxft.models.families.llama import llama
from jaxft.models.model_types import FAMILIES

torch = pytest.importorskip("torch")

SHAPES = {
    "mha": dict(num_attention_heads=4, num_key_value_heads=4),
    "gqa": dict(num_attention_heads=4, num_key_value_heads=2),
    "mqa": dict(num_attention_heads=4, num_key_value_heads=1),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "head_dim": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24),
    "linear": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "llama3": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500.0,
        },
    ),
}


def tiny_hf(**changes):
    """A random Hugging Face Llama whose weights are large enough to make logits differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=3, max_position_embeddings=256
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, **changes)).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def base_of(hf, model, dtype=jnp.float32):
    """The jaxft parameter tree of a torch model, by the name table of the model."""
    state = {k: v.detach().numpy() for k, v in hf.state_dict().items()}
    out = {}
    for path, (name, transpose, *_) in model.weight_names.items():
        layers = range(model.config.layers) if "{i}" in name else [None]
        parts = [state[name.format(i=i)] for i in layers]
        parts = [p.T if transpose else p for p in parts]
        node = out
        *lead, last = path.split("/")
        for part in lead:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(np.stack(parts) if "{i}" in name else parts[0], dtype)
    return out


def tokens_of(ids):
    """A batch of plain rows."""
    ids = jnp.asarray(ids)
    rows, size = ids.shape
    positions = jnp.broadcast_to(jnp.arange(size), (rows, size))
    zero = jnp.zeros((rows, 1), jnp.int32)
    return Tokens(ids, jnp.ones_like(ids), positions, zero, zero, zero.astype(jnp.float32))


@pytest.mark.quick_cases("gqa", "tied", "head_dim", "llama3")
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape):
    hf = tiny_hf(**SHAPES[shape])
    model = llama(FAMILIES["llama"].from_hf(hf.config.to_dict()), jnp.float32)
    params = base_of(hf, model)
    ids = np.random.default_rng(0).integers(0, 97, (2, 70)).astype(np.int32)
    with torch.no_grad():
        expected = hf(torch.tensor(ids).long()).logits.numpy()
    found = model.logits(model.head(params), model.hidden(params, tokens_of(ids))[0])
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)


def test_decoding_with_a_cache_equals_the_full_forward_pass():
    hf = tiny_hf(**SHAPES["gqa"])
    model = llama(FAMILIES["llama"].from_hf(hf.config.to_dict()), jnp.float32)
    params = base_of(hf, model)
    ids = np.random.default_rng(1).integers(0, 97, (2, 12)).astype(np.int32)
    pad = 3  # row 1 is 3 tokens shorter, padded on the left
    ids[1, :pad] = 0
    batch = tokens_of(ids)
    segments = np.ones_like(ids)
    segments[1, :pad] = 0
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    batch = batch.replace(segments=jnp.asarray(segments), positions=jnp.asarray(positions))
    whole = np.asarray(model.hidden(params, batch)[0])
    start = jax.tree.map(lambda x: x[:, :8] if x.shape[1] == 12 else x, batch)
    h, cache = prefilled(model, params, start, 4)
    np.testing.assert_allclose(np.asarray(h)[0], whole[0, :8], atol=1e-5)
    for at in range(8, 12):
        token = batch.ids[:, at], batch.positions[:, at]
        h, cache = decoded(model, params, cache, token, at - 8)
        np.testing.assert_allclose(np.asarray(h), whole[:, at], atol=1e-5)
