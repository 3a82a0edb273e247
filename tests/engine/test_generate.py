"""Generation: truncation as in transformers, independent rows, a cache that is updated in place, adapters."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine_of
from merged_arrays import merged_arrays
from tiny_model import tiny

from jaxft.distributed import sharding
from jaxft.engine import session as session_module
from jaxft.engine.programs import program_tracers
from jaxft.engine.sampling import (
    NONFINITE,
    Sampling,
    fast_argmax,
    left_pad,
    row_sampling,
    sample_rows,
    top_mask,
    truncated,
    without_stop,
)
from jaxft.engine.session import RequestSettings, SampledTokens, Session, complete, generate
from jaxft.engine.state import Decoding, slots_for
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import init_params
from jaxft.nn.quant import Quant
from jaxft.weights import pretrained, storage

KEY = jax.random.key(5)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [27], [8] * 30, [30, 31, 32], list(range(40)) * 2]


GREEDY = Sampling(max_new=12)


@pytest.fixture(scope="module")
def world():
    """A model without an adapter and random weights that are large enough for completions to differ."""
    model, whole = tiny(jnp.float32)
    return model, jax.tree.map(lambda x: 2 * x, whole)


@pytest.fixture(scope="module")
def greedy(world):
    """The greedy completion of each prompt in one batch."""
    return answers(world)


def answers(world, sampling=GREEDY, stop=(), prompts=PROMPTS, key=KEY, rows=5):
    return generate(Session(engine_of(world, sampling, stop, rows, 80), world[1], key), prompts)


def logits_of(model, whole, tokens):
    return jitted_logits(model.hidden, model.head, model.logits, whole, tokens)


@partial(jax.jit, static_argnums=(0, 1, 2))
def jitted_logits(hidden, head, logits, whole, tokens):
    return logits(head(whole), hidden(whole, tokens)[0])


def rows_of(sampling, count, vocab=97):
    """The settings of `count` rows that are sampled alike."""
    return jax.tree.map(lambda x: jnp.full(count, x), row_sampling(sampling, vocab))


CUTS = {
    "top_k": Sampling(temperature=1.0, top_k=7),
    "top_k beyond the vocabulary": Sampling(temperature=1.0, top_k=999),
    "top_p": Sampling(temperature=1.0, top_p=0.6),
    "tiny top_p": Sampling(temperature=1.0, top_p=1e-6),
    "cold": Sampling(temperature=0.3),
    "min_p": Sampling(temperature=1.3, min_p=0.1),
    "all": Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.05),
}


@pytest.mark.parametrize("sampling", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("is_known", [True, False], ids=["uniform", "by row"])
def test_truncated_logits_equal_transformers(sampling, is_known):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(0).normal(0, 3, (16, 97)).astype(np.float32)
    chain = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    chain += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
    chain += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    expected = torch.tensor(logits)
    for step in chain:
        expected = step(None, expected)
    own, settings = row_sampling(sampling, 97), rows_of(sampling, 16)
    found = truncated(jnp.asarray(logits) * settings.heat[:, None], settings, own if is_known else None)
    found = np.asarray(found)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert np.isfinite(found).any(1).all()


def test_the_top_mask_equals_a_sort():
    x = np.random.default_rng(2).normal(0, 1, (6, 50)).astype(np.float32)
    x[1], x[2, :30], x[3, ::2], x[4] = 1.5, -np.inf, 0.25, -np.abs(x[4]) * 1e-30
    for count in (1, 2, 7, 49, 50):
        least = np.sort(x, -1)[:, -count, None]
        np.testing.assert_array_equal(top_mask(jnp.asarray(x), jnp.ones(()), count), x >= least)
    np.testing.assert_array_equal(fast_argmax(jnp.asarray(x)), x.argmax(-1))


def test_samples_follow_the_truncated_distribution():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 1.5, 12), jnp.float32)
    sampling, count = Sampling(temperature=0.8, top_k=8, top_p=0.95), 40_000
    keys = jax.random.split(KEY, count)
    rows = jnp.broadcast_to(logits, (count, 12))
    counts = np.bincount(sample_rows(rows, rows_of(sampling, count, 12), keys), minlength=12)
    expected = count * np.asarray(jax.nn.softmax(truncated(logits[None] / 0.8, rows_of(sampling, 1, 12))[0]))
    assert (counts[expected == 0] == 0).all() and (expected == 0).any()
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < 30  # at most 7 degrees of freedom: a correct sampler exceeds this once in 10^4


def test_temperature_zero_is_the_argmax_and_so_is_top_k_one(world, greedy):
    logits = jax.random.normal(KEY, (9, 97))
    zero = Sampling(temperature=0.0, top_k=3, top_p=0.5)
    found = sample_rows(logits, rows_of(zero, 9), jax.random.split(KEY, 9))
    np.testing.assert_array_equal(found, logits.argmax(-1))
    assert answers(world, Sampling(max_new=12, temperature=2.0, top_k=1)) == greedy
    assert answers(world, key=jax.random.key(6)) == greedy


def test_greedy_completions_equal_the_full_forward_pass(world, greedy):
    model, whole = world
    for prompt, answer in zip(PROMPTS, greedy, strict=True):
        row = left_pad([prompt + answer], 1)
        logits = np.asarray(logits_of(model, whole, row))[0]
        start = row.ids.shape[1] - len(answer)
        assert len(answer) == 12
        np.testing.assert_array_equal(logits[start - 1 : -1].argmax(-1), answer)


def test_sampling_depends_on_the_key_alone(world):
    sampling = Sampling(max_new=12, temperature=1.5)
    first = answers(world, sampling)
    assert answers(world, sampling) == first
    assert answers(world, sampling, key=jax.random.key(6)) != first
    twice = answers(world, sampling, prompts=[PROMPTS[0]] * 2)
    assert twice[0] != twice[1]
    assert answers(world, sampling, prompts=[PROMPTS[0]] * 2, rows=1) == twice


@pytest.mark.quick_cases("1")
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_prompt_alone_is_completed_as_in_a_batch(world, greedy, rows):
    assert answers(world, rows=rows) == greedy


def test_a_stop_token_ends_its_row_only(world, greedy):
    stop = (greedy[0][4], greedy[3][2])
    stopped = answers(world, stop=stop)
    for before, after in zip(greedy, stopped, strict=True):
        ends = [i + 1 for i, token in enumerate(before) if token in stop]
        assert after == before[: min(ends, default=12)]
    assert len(stopped[0]) <= 5 and len({len(a) for a in stopped}) > 1
    raw = complete(Session(engine_of(world, GREEDY, stop, 5, 80), world[1], KEY), PROMPTS).tokens[:, 0]
    for row, after in zip(raw, stopped, strict=True):
        assert row.tolist() == after + [-1] * (12 - len(after))


def test_a_stop_token_is_no_part_of_a_text():
    assert without_stop([4, 7, 7], (7, 9)) == [4, 7] and without_stop(np.array([7]), (7,)) == []
    assert without_stop([7, 4], (7,)) == [7, 4] and without_stop([], (7,)) == []


def test_an_empty_prompt_and_invalid_settings_are_refused(world):
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        answers(world, prompts=[[1], []])
    for bad in (dict(max_new=0), dict(temperature=-0.1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)


SMOL = LlamaConfig(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536, max_positions=8192
)


@pytest.mark.parametrize(
    ("dtype", "quant"),
    [
        pytest.param(jnp.bfloat16, None, marks=pytest.mark.slow),
        (jnp.float32, None),
        (jnp.bfloat16, Quant("nf4")),
        pytest.param(jnp.bfloat16, Quant("int8"), marks=pytest.mark.slow),
    ],
)
def test_decoding_has_temporaries_of_less_than_a_tenth_of_the_cache(dtype, quant):
    """At the size of a rollout, with weights stored as in a run: neither the cache nor the weights are
    expanded, and the cache is updated in place.
    """
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    model, slots = llama(SMOL, dtype), slots_for(2, 8, 1024)
    with jax.set_mesh(mesh):
        base = storage.sharded_shapes(pretrained.frozen_model(model, quant, "none"), mesh)["base"]
        tracers = program_tracers(Decoding(model, Sampling(1024), (), 8), base, slots, mesh)
        memory = tracers["decode", 16, 1024, 1024]().lower().compile().memory_analysis()
    one_token = 2 * SMOL.layers * SMOL.kv_heads * SMOL.head_dim * jnp.dtype(dtype).itemsize
    cache = (2 + 16) * 1024 * one_token  # two prompts once, sixteen completions
    assert cache <= memory.alias_size_in_bytes < 1.01 * cache
    head = SMOL.vocab * SMOL.width * jnp.dtype(dtype).itemsize  # in the layout of its matmul
    assert memory.temp_size_in_bytes - head < 0.1 * cache


def test_extending_rows_does_not_copy_the_cache():
    model, slots = llama(replace(SMOL, vocab=256, layers=8), jnp.float32), slots_for(2, 8, 1024)
    base = jax.eval_shape(lambda: init_params(model.specs, KEY, jnp.float32))
    tracers = program_tracers(Decoding(model, Sampling(1024), (), 8, extends=True), base, slots)
    memory = tracers["extend", 16, 1, 64]().lower().compile().memory_analysis()
    cache = (2 + 16) * 1024 * 2 * 8 * SMOL.kv_heads * SMOL.head_dim * 4
    assert memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < 0.4 * cache


BOTH = ("q", "v", "o", "gate", "down", "head")


@pytest.mark.quick_cases("layers and head")
@pytest.mark.parametrize("targets", [BOTH, "all-linear", ("head",)], ids=["layers and head", "all", "head"])
def test_an_adapter_changes_completions_and_without_it_the_base_is_unchanged(world, greedy, targets):
    model, whole = tiny(jnp.float32, adapter=Adapter(rank=4, alpha=8.0, targets=targets))
    attached, detached = {**world[1], "adapter": whole["adapter"]}, world[1]
    assert answers((model, attached)) != greedy
    assert answers((model, detached)) == greedy
    tokens = left_pad(PROMPTS, 5)
    np.testing.assert_array_equal(logits_of(model, detached, tokens), logits_of(*world, tokens))
    assert np.abs(logits_of(model, attached, tokens) - logits_of(*world, tokens)).max() > 0.1


@pytest.mark.quick_cases("untied")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_equals_unmerged(tied):
    model, whole = tiny(jnp.float32, adapter=Adapter(rank=4, alpha=8.0, targets=BOTH), tied=tied)
    plain, _ = tiny(jnp.float32)
    merged = {"base": merged_arrays(whole["base"], whole["adapter"], jnp.float32)}
    tokens = left_pad(PROMPTS, 5)
    real = np.asarray(tokens.segments > 0)
    expected = np.asarray(logits_of(model, whole, tokens))[real]
    assert np.abs(expected - np.asarray(logits_of(model, {"base": whole["base"]}, tokens))[real]).max() > 0.1
    np.testing.assert_allclose(np.asarray(logits_of(plain, merged, tokens))[real], expected, atol=2e-5)
    assert answers((plain, merged)) == answers((model, whole))


@pytest.mark.quick_cases("*temperature=1.0*")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new=12, temperature=1.0, top_k=3)], ids=str)
def test_a_completion_ends_where_its_logits_are_nan_and_the_other_rows_do_not_change(world, sampling):
    model, whole = world
    prompts = [PROMPTS[0], [39, 3], PROMPTS[1]]  # no other row has token 39
    broken = dict(whole, base=dict(whole["base"], embed=whole["base"]["embed"].at[39].set(jnp.nan)))
    engine = engine_of(world, sampling, (), 5, 80)
    good, bad = (complete(Session(engine, params, KEY), prompts).tokens[:, 0] for params in (whole, broken))
    assert (good >= 0).all() and not (good[[0, 2], :-1] == 39).any()
    np.testing.assert_array_equal(bad[[0, 2]], good[[0, 2]])
    assert bad[1, 0] == NONFINITE and (bad[1, 1:] == -1).all()
    with pytest.raises(ValueError, match="the logits of token 1 after prompt 1 are not finite; compute in"):
        generate(Session(engine, broken, KEY), [[39, 3]])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_single_infinite_logit_ends_a_completion(world, sign):
    """The head's last column is sign times 3e38 along the last hidden state, whose entries are beyond 1."""
    model, whole = world
    h = np.asarray(model.hidden(whole, left_pad([PROMPTS[0]], 1))[0])[0, -1]
    head = whole["base"]["head"].at[:, 39].set(sign * 3e38 * np.sign(h))
    broken = dict(whole, base=dict(whole["base"], head=head))
    logits = np.asarray(model.logits(model.head(broken), h[None]))[0]
    assert np.isinf(logits[39]) and np.isfinite(logits[:39]).all()
    with pytest.raises(ValueError, match="the logits of token 1 after prompt 1 are not finite"):
        answers((model, broken), prompts=[PROMPTS[0]])


@pytest.mark.parametrize(
    "choice",
    [
        RequestSettings(Sampling(12, 1.0)),
        RequestSettings(GREEDY, grammar="a grammar"),
        RequestSettings(GREEDY, top=True),
    ],
    ids=["sampling", "grammar", "top"],
)
def test_a_request_that_an_engine_is_not_compiled_for_is_refused(world, choice):
    session = Session(engine_of(world, GREEDY, (), 5, 80), world[1])
    with pytest.raises(ValueError, match="the engine is not compiled for RequestSettings"):
        session.start([1], [0], choice=choice)


def test_the_token_of_a_later_prompt_is_named(world, monkeypatch):
    tokens = np.full((4, 1, 4), 7)
    tokens[3, 0, 2:] = NONFINITE, -1
    monkeypatch.setattr(
        session_module, "complete", lambda session, prompts: SampledTokens(tokens, np.zeros((4, 1, 4)))
    )
    with pytest.raises(ValueError, match="the logits of token 3 after prompt 4 are not finite"):
        generate(None, [[1], [2], [3], [30]])
