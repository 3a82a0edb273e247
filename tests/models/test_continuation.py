"""A text that is continued from a cache has the log-probs of one forward pass, however it is cut."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import FAMILIES, VOCAB, both, our_model, params_of, random_ids, torch_model

from jaxft.batch import Rollout, Tokens
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn.attention.kv_cache import GivenChunk, NextToken, RowGroups, insert_prompts
from jaxft.nn.param_spec import init_params
from jaxft.nn.rope import Rope

PROMPT, NEW, CHUNK, STEPS = 16, 48, 20, 3  # slots; tokens of a chunk; decoding steps after all chunks
# Tokens of each row's prompt and of its chunks. Chunks are longer and shorter than a window of 7, or empty.
CUTS = (
    ((16, 20, 15), (5, 1, 7), (9, 8, 0), (1, 20, 20)),
    ((3, 2, 2), (16, 0, 1), (8, 13, 20), (15, 6, 6)),
)
R = len(CUTS[0])
LENGTH = PROMPT + NEW


def jit(fn):
    """Compile without optimisation, which would take longer than these tiny programs run."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def numbers(count):
    """0, 1, ... [1, count]."""
    return jnp.arange(count, dtype=jnp.int32)[None]


def texts(ids, segments, positions):
    """Rows of tokens without losses."""
    none = jnp.zeros((R, 1), jnp.int32)
    return Tokens(ids, segments.astype(jnp.int32), positions, none, none, none.astype(jnp.float32))


def rollout(ids, prompts):
    """Texts as completions of prompts of these lengths."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ids.shape)
    t = texts(ids, jnp.ones(ids.shape), positions)
    none, branches = t.token_weights, (positions >= prompts[:, None]).astype(jnp.int32)
    return Rollout(
        t.ids, t.segments, positions, t.read, t.read, t.read, none, none, none, t.read, branches=branches,
        sampled_length=NEW,
    )  # fmt: skip


def log_probs(model, params, h):
    """Log-probs [..., V]."""
    return jax.nn.log_softmax(model.logits(model.head(params), h), -1)


def continued(model, stored, params, ids, cuts):
    """Log-probs [R, T, V] by prefill, two extensions and STEPS decoding steps; NaN beyond the text.

    Prompts are in slots in reverse order, and each extension has a row more, which is dropped.
    """
    starts = jnp.cumsum(cuts, 1, dtype=jnp.int32)
    index = starts[:, :1] - PROMPT + numbers(PROMPT)
    positions = jnp.maximum(index, 0)
    prompts = texts(jnp.take_along_axis(ids, positions, 1), index >= 0, positions)
    h, keys = model.prefill(params, prompts, NEW)
    slots = jnp.arange(R - 1, -1, -1, dtype=jnp.int32)
    cache = insert_prompts(model.empty_cache((R, PROMPT), R, NEW, stored), keys, slots, model.dtype)
    out = jnp.full((R, LENGTH, VOCAB), jnp.nan, model.dtype)
    all_rows = numbers(R)[0][:, None]

    def put(out, h, at, valid):
        return out.at[all_rows, jnp.where(valid, at, LENGTH)].set(log_probs(model, params, h), mode="drop")

    out = put(out, h, index, index >= 0)
    order = jnp.asarray((2, 0, 3, 1, R), jnp.int32)  # of the rows of a chunk
    for number in (1, 2):
        at = starts[:, number - 1, None] + numbers(CHUNK)
        one = GivenChunk(
            jnp.take_along_axis(ids, jnp.minimum(at, LENGTH - 1), 1), cuts[:, number],
            starts[:, number - 1] - starts[:, 0], starts[:, number - 1], all_rows[:, 0], slots,
        )  # fmt: skip
        one = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]])[order], one)
        h, cache = model.extend(params, cache, replace(one, rows=order))
        h = h[jnp.argsort(order)[:R]]
        out = put(out, h, at, numbers(CHUNK) < cuts[:, number, None])

    def step(carry, i):
        cache, out = carry
        at = starts[:, -1] + i
        groups = RowGroups(slots[:, None], slots)
        ids_R = jnp.take_along_axis(ids, at[:, None], 1)[:, 0]
        h, cache = model.decode(params, cache, ids_R, NextToken(at, at - starts[:, 0] + 1, groups))
        return (cache, put(out, h[:, None], at[:, None], True)), None

    return jax.lax.scan(step, (cache, out), numbers(STEPS)[0])[0][1]


def differences(model, params, stored="compute"):
    """The differences of log-probs from one forward pass, for every cut."""
    ids = jnp.asarray(random_ids(R, LENGTH, seed=5), jnp.int32)

    def forward(params, ids, prompts):
        return log_probs(model, params, model.hidden(params, rollout(ids, prompts))[0])

    forward, run = jit(forward), jit(partial(continued, model, stored))
    for cuts in CUTS:
        cuts = jnp.asarray(cuts, jnp.int32)
        expected, found = forward(params, ids, cuts[:, 0]), run(params, ids, cuts)
        given = np.arange(LENGTH)[None] < np.asarray(cuts.sum(1) + STEPS)[:, None]
        np.testing.assert_array_equal(np.isfinite(found).all(-1), given)
        yield np.abs(np.asarray(found - expected))[given]


@pytest.mark.quick_cases("gemma3")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_in_chunks_has_the_log_probs_of_one_forward_pass(name, x64):
    """In float64, so that nothing but rounding is left."""
    model = our_model(name, jnp.float64)
    params = params_of(torch_model(name).state_dict(), model, np.float64)
    for error in differences(model, params):
        assert error.max() < 1e-10, error.max()


def test_chunks_have_log_probs_of_one_forward_pass_in_float32():
    _, model, params = both("llama")
    for error in differences(model, params):
        assert error.max() < 1e-5, error.max()


@pytest.mark.slow
def test_chunks_have_the_angles_of_a_rope_that_depends_on_the_length(x64):
    rope = Rope(kind="dynamic", factor=2.0, original_max_positions=32)
    sizes = dict(vocab=VOCAB, width=32, layers=2, heads=4, kv_heads=2, mlp=48, max_positions=64)
    model = llama(LlamaConfig(**sizes, head_dim=8, rope=rope), jnp.float64)
    params = init_params(model.specs, jax.random.key(0), jnp.float64)
    for error in differences(model, params):
        assert error.max() < 1e-10, error.max()


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "bound"), [("int8", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_quantised_cache_changes_log_probs_of_chunks_a_little(name, stored, bound):
    _, model, params = both(name)
    for error in differences(model, params, stored):
        assert 1e-5 < error.mean() < bound, error.mean()
