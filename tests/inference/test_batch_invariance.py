"""Completions are the same to the bit however many others are computed with them, in bfloat16 too (CPUs)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine_of

from jaxft.inference import batch_invariance
from jaxft.inference.sampling import Sampling
from jaxft.models.adapted import adapted
from jaxft.models.llama import llama
from jaxft.models.llama_config import LlamaConfig
from jaxft.nn.param import init_params

# As wide as it takes for XLA to choose other kernels for other numbers of rows.
CONFIG = LlamaConfig(vocab=5000, width=192, layers=2, heads=3, kv_heads=1, head_dim=64, mlp=512, tied=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab, size).tolist() for size in (3, 40, 1, 9, 17, 5, 30, 2, 11, 60)]
STOP = tuple(range(0, CONFIG.vocab, 40))
KEY = jax.random.key(5)


def completions(dtype, rows, longest, group, **options):
    """Of all prompts; their lengths differ, so that rows are taken by the next prompts at different steps."""
    model = adapted(llama(CONFIG, dtype), None)
    params = jax.jit(lambda: init_params(model.specs, jax.random.key(0), jnp.float32))()
    sampling = Sampling(max_new=70, temperature=1.0, top_p=0.95)
    engine = engine_of((model, params), sampling, STOP, rows, longest, group, len(PROMPTS), **options)
    return engine.complete(params, PROMPTS, KEY)


@pytest.mark.parametrize(
    ("dtype", "group", "sizes", "options"),
    [
        (jnp.bfloat16, 1, ((1, 64), (7, 128)), {}),
        pytest.param(jnp.bfloat16, 4, ((4, 64), (16, 64)), {"cache": "int8"}, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 1, ((1, 64), (2, 64), (4, 128)), {}, marks=pytest.mark.slow),
    ],
)
def test_tokens_and_log_probs_are_equal_in_any_batch(dtype, group, sizes, options):
    expected = completions(dtype, len(PROMPTS) * group, 64, group, **options)
    lengths = (expected.tokens >= 0).sum(-1)
    assert lengths.min() < 20 and lengths.max() == 70
    for rows, longest in sizes:
        found = completions(dtype, rows, longest, group, **options)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.logps, expected.logps)


def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch):
    batch_invariance.compiler_options.cache_clear()
    assert batch_invariance.compiler_options("cpu") and not batch_invariance.compiler_options("gpu")
    monkeypatch.setattr(batch_invariance, "NO_YNNPACK_REDUCTIONS", {"xla_cpu_of_another_version": "1"})
    batch_invariance.compiler_options.cache_clear()
    assert not batch_invariance.compiler_options("cpu")
    batch_invariance.compiler_options.cache_clear()
