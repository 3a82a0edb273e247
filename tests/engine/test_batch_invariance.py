"""Completions are the same to the bit however many others are computed with them, in bfloat16 too (CPUs)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine_of

from jaxft.engine import programs
from jaxft.engine.sampling import Sampling
from jaxft.engine.session import Session, complete
from jaxft.models.adapted import adapted
from jaxft.models.dense_config import FULL, SLIDING
from jaxft.models.families.llama import LlamaConfig, MistralConfig, llama, mistral
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import init_params

# So wide that XLA chooses other kernels for sums of 10 rows than for those of 7 (from 4096 elements on).
SIZES = dict(vocab=5000, width=576, layers=2, heads=9, kv_heads=3, head_dim=64, mlp=768, tied=True)
PLAIN = llama, LlamaConfig(**SIZES)
EVERY_HEAD = llama, LlamaConfig(**{**SIZES, "kv_heads": 9})
WINDOWS = mistral, MistralConfig(**SIZES, window=100, layer_types=(FULL, SLIDING))
LORA = Adapter(rank=4, alpha=8.0)
RNG = np.random.default_rng(0)
LENGTHS = (3, 40, 1, 9, 17, 300, 30, 2, 130, 60)  # prefilled in several programs
PROMPTS = [RNG.integers(0, SIZES["vocab"], size).tolist() for size in LENGTHS]
STOP = tuple(range(0, SIZES["vocab"], 25))
MAX_NEW = 40
KEY = jax.random.key(5)


def completions(family, dtype, rows, longest, group, adapter=None, **options):
    """Of all prompts; their lengths differ, so that rows are taken by the next prompts at different steps."""
    build, config = family
    model = adapted(build(config, dtype), adapter)
    params = jax.jit(lambda: init_params(model.specs, jax.random.key(0), jnp.float32))()
    params["adapter"] = jax.tree.map(lambda x: x + 0.02, params.get("adapter", {}))
    sampling = Sampling(max_new=MAX_NEW, temperature=1.0, top_p=0.95)
    engine = engine_of((model, params), sampling, STOP, rows, longest, group, len(PROMPTS), **options)
    return complete(Session(engine, params, KEY), PROMPTS)


@pytest.mark.parametrize(
    ("family", "dtype", "group", "sizes", "options"),
    [
        (WINDOWS, jnp.bfloat16, 1, ((1, 512),), {"adapter": LORA}),
        pytest.param(WINDOWS, jnp.bfloat16, 1, ((2, 320), (7, 1088)), {}, marks=pytest.mark.slow),
        pytest.param(
            PLAIN, jnp.bfloat16, 4, ((4, 320), (16, 448)), {"cache": "int8"}, marks=pytest.mark.slow
        ),
        pytest.param(PLAIN, jnp.float32, 1, ((1, 320), (2, 384), (4, 448)), {}, marks=pytest.mark.slow),
        pytest.param(EVERY_HEAD, jnp.float32, 1, ((3, 320),), {"adapter": LORA}, marks=pytest.mark.slow),
    ],
)
def test_tokens_and_log_probs_are_equal_in_any_batch(family, dtype, group, sizes, options):
    expected = completions(family, dtype, len(PROMPTS) * group, 320, group, **options)
    lengths = (expected.tokens >= 0).sum(-1)
    assert lengths.min() < 20 and lengths.max() == MAX_NEW
    for rows, longest in sizes:
        found = completions(family, dtype, rows, longest, group, **options)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.logps, expected.logps)


@pytest.mark.slow
@pytest.mark.parametrize("family", [PLAIN, EVERY_HEAD])
def test_a_completion_is_the_same_in_groups_of_any_size(family):
    expected = completions(family, jnp.bfloat16, 40, 320, 4)
    for group in (1, 2):
        found = completions(family, jnp.bfloat16, 10, 448, group)
        np.testing.assert_array_equal(found.tokens, expected.tokens[:, :group])
        np.testing.assert_array_equal(found.logps, expected.logps[:, :group])


def test_an_option_that_xla_does_not_have_is_left_out(monkeypatch):
    programs.compiler_options.cache_clear()
    assert programs.compiler_options("cpu") and not programs.compiler_options("gpu")
    monkeypatch.setattr(programs, "NO_YNNPACK_REDUCTIONS", {"xla_cpu_of_another_version": "1"})
    programs.compiler_options.cache_clear()
    assert not programs.compiler_options("cpu")
    programs.compiler_options.cache_clear()
