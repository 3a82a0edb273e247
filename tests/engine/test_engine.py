"""Completions do not depend on how an engine schedules them: rows, refills, dropped rows, order, group."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import described
from tiny_model import CONFIG, tiny

from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.engine import session
from jaxft.engine import state as engine_state
from jaxft.engine.sampling import NONFINITE, Sampling
from jaxft.engine.session import Session, complete

KEY, STOP = jax.random.key(5), (7, 11, 23)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab, size).tolist() for size in (3, 40, 1, 9, 17, 5, 30, 2, 11)]
SAMPLED = Sampling(max_new=20, temperature=1.2, top_k=9)


@pytest.fixture(scope="module")
def world():
    model, whole = tiny(jnp.float32)
    return model, jax.tree.map(lambda x: 2 * x, whole)


@pytest.fixture(scope="module")
def expected(world):
    """Three completions of each prompt, all in progress at the same time."""
    return completed(world, 27, 3)


def completed(world, rows, group, sampling=SAMPLED, **options):
    engine = engine_of(world, sampling, STOP, rows, 64, group, len(PROMPTS), **options)
    return complete(Session(engine, world[1], KEY), PROMPTS)


def test_completions_end_at_a_stop_token_or_the_limit(expected):
    lengths = (expected.tokens >= 0).sum(2)
    assert lengths.min() < 5 and lengths.max() == 20 and len(np.unique(lengths)) > 5
    for tokens, logps, length in zip(
        expected.tokens.reshape(27, 20), expected.logps.reshape(27, 20), lengths.ravel(), strict=True
    ):
        assert length == 20 or tokens[length - 1] in STOP
        assert not np.isin(tokens[: length - 1], STOP).any() and (tokens[length:] == -1).all()
        assert (logps[:length] < 0).all() and not logps[length:].any()


@pytest.mark.quick_cases("6")
@pytest.mark.parametrize("rows", [3, 6, 12])
def test_tokens_are_the_same_with_any_number_of_rows(world, expected, rows):
    found = completed(world, rows, 3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.logps, expected.logps)


def test_a_completion_depends_on_its_number_and_that_of_its_prompt_only(world, expected):
    engine = engine_of(world, SAMPLED, STOP, 6, 64, 3, len(PROMPTS))
    order = [4, 0, 8, 2]
    found = complete(Session(engine, world[1], KEY), [PROMPTS[i] for i in order], order)
    np.testing.assert_array_equal(found.tokens, expected.tokens[order])
    one = completed(world, 9, 1)
    np.testing.assert_array_equal(one.tokens[:, 0], expected.tokens[:, 0])
    twice = complete(Session(engine, world[1], KEY), [PROMPTS[0]] * 2).tokens
    assert len({tuple(row) for row in twice.reshape(6, 20).tolist()}) == 6


def test_a_completion_ends_early_where_there_is_enough_and_the_others_go_on(world, expected, monkeypatch):
    monkeypatch.setattr(session, "STEPS_BETWEEN_LOOKS", 3)
    marks = range(0, CONFIG.vocab, 6)
    engine = engine_of(world, SAMPLED, STOP, 6, 64, 3, len(PROMPTS))
    ended, shown = [], []

    def is_enough(tokens):
        shown.append(tokens)
        return any(x in marks for x in tokens)

    found = complete(Session(engine, world[1], KEY), PROMPTS, None, is_enough, ended.append)
    shorter = 0
    assert sum(ended) == 27 and len(ended) > 4
    for tokens in shown:  # a row that has ended is not decoded further
        assert not any(x in marks for x in tokens[:-4])
    for own, whole in zip(found.tokens.reshape(27, 20), expected.tokens.reshape(27, 20), strict=True):
        count, total = (own >= 0).sum(), (whole >= 0).sum()
        np.testing.assert_array_equal(own[:count], whole[:count])
        marked = np.flatnonzero(np.isin(whole, marks))
        assert count == total or marked[0] < count <= marked[0] + 4
        shorter += count < total
    assert 5 < shorter < 25


def test_rows_are_dropped_and_more_slots_are_read_as_completions_go_on(world, monkeypatch):
    """With programs for 27, 14 and 7 rows that read 5, 10 and 20 slots, three of which run."""
    monkeypatch.setattr(engine_state, "FEWEST_ROWS", 4)
    monkeypatch.setattr(engine_state, "SMALLEST_READ", 5)
    sampling, stop = Sampling(max_new=20, temperature=1.25, top_k=9), tuple(range(0, 40, 5))
    engine = engine_of(world, sampling, stop, 27, 64, 3, len(PROMPTS))
    assert sorted(engine.decode) == [(7, 20, 64), (14, 20, 64), (27, 5, 64), (27, 10, 64), (27, 20, 64)]
    ran = []

    def recorded(name, run):
        return lambda *args: (ran.append(name), run(*args))[1]

    spied = replace(engine, decode={name: recorded(name, run) for name, run in engine.decode.items()})
    found = complete(Session(spied, world[1], KEY), PROMPTS)
    assert ran == [(27, 5, 64), (14, 20, 64), (7, 20, 64)]
    monkeypatch.setattr(engine_state, "FEWEST_ROWS", 99)
    plain = engine_of(world, sampling, stop, 26, 64, 2, 13)
    np.testing.assert_array_equal(
        complete(Session(plain, world[1], KEY), PROMPTS).tokens, found.tokens[:, :2]
    )


def test_a_step_reads_half_of_the_prompt_slots_while_all_prompts_are_short(world, monkeypatch):
    monkeypatch.setattr(engine_state, "SMALLEST_PROMPT_READ", 64)
    prompts = [[3, 9], RNG.integers(0, CONFIG.vocab, 100).tolist(), [5], RNG.integers(0, 40, 64).tolist()]
    narrow, wide = (engine_of(world, SAMPLED, (), 1, size, 1, 4) for size in (128, 192))
    assert sorted(narrow.decode) == [(2, 20, 64), (2, 20, 128)]
    ran = []

    def recorded(name, run):
        return lambda *args: (ran.append(name[2]), run(*args))[1]

    spied = replace(narrow, decode={name: recorded(name, run) for name, run in narrow.decode.items()})
    found = complete(Session(spied, world[1], KEY), prompts)
    assert ran == [128, 64, 64, 64]  # the longest first
    monkeypatch.setattr(engine_state, "SMALLEST_PROMPT_READ", 999)
    plain = engine_of(world, SAMPLED, (), 3, 128, 1, 4)
    assert sorted(plain.decode) == [(3, 20, 128)] and sorted(wide.decode) == [(2, 20, 128), (2, 20, 192)]
    np.testing.assert_array_equal(found.tokens, complete(Session(plain, world[1], KEY), prompts).tokens)


def test_short_prompts_are_not_padded_to_the_longest(world, monkeypatch):
    monkeypatch.setattr(engine_state, "SMALLEST_PREFILL", 64)
    monkeypatch.setattr(engine_state, "PREFILLED_TOKENS", 200)
    sizes = 70, 3, 180, 64, 1, 9, 33
    prompts = [RNG.integers(0, CONFIG.vocab, size).tolist() for size in sizes]
    engine = engine_of(world, SAMPLED, STOP, 14, 192, 2, 7)
    assert sorted(engine.start) == [(14, 1, 192), (14, 3, 64)]
    ran = []

    def recorded(name, run):
        def spied(params, state, new):
            ran.append((name[1:], sorted(new.tokens.segments.sum(1).tolist())))
            return run(params, state, new)

        return spied

    spied = replace(engine, start={name: recorded(name, run) for name, run in engine.start.items()})
    found = complete(Session(spied, world[1], KEY), prompts)
    assert ran == [
        ((1, 192), [180]), ((1, 192), [70]), ((3, 64), [9, 33, 64]), ((3, 64), [0, 1, 3]),
    ]  # fmt: skip
    monkeypatch.setattr(engine_state, "SMALLEST_PREFILL", 999)
    plain = engine_of(world, SAMPLED, STOP, 12, 192, 2, 7)
    assert sorted(plain.start) == [(12, 1, 192)]
    np.testing.assert_array_equal(complete(Session(plain, world[1], KEY), prompts).tokens, found.tokens)


@pytest.mark.quick_cases("4-16")
@pytest.mark.parametrize(("group", "rows"), [(1, 4), (1, 8), (4, 16)])
def test_rows_that_ended_take_waiting_prompts_before_the_others_end(world, group, rows):
    """Steps of decoding are far fewer than if all rows waited for the longest of them."""
    sampling, count = Sampling(max_new=64, temperature=1.0), 6 * rows // group
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    engine, steps = engine_of(world, sampling, STOP, rows, 64, group, count), []

    def counted(run):
        def counting(params, state, *rest):
            before = np.array(state.counts)
            after = run(params, state, *rest)
            steps.append(int((np.array(after.counts) - before).max()))
            return after

        return counting

    spied = replace(engine, decode={name: counted(run) for name, run in engine.decode.items()})
    lengths = (complete(Session(spied, world[1], KEY), prompts).tokens >= 0).sum(-1)
    waiting = sum(part.max() - 1 for part in np.array_split(lengths.ravel(), 6))
    work = (lengths - 1).sum() / rows  # if every row were in use all the time
    assert work <= sum(steps) < 0.7 * waiting, (work, sum(steps), waiting)


def test_on_accelerators_rows_that_ended_leave_by_default(monkeypatch):
    """Prompts wait for rows of an engine, or its programs for fewer rows run."""
    mesh = make_mesh(MeshShape(data=8))
    assert engine_state.rows_in_progress(None, mesh) is None and engine_state.row_levels(40, None) == [
        40,
        20,
        10,
    ]
    monkeypatch.setattr(engine_state, "first_device", lambda mesh: described("gpu", "NVIDIA H100 80GB HBM3"))
    assert (
        engine_state.rows_in_progress(None, None) == 256
        and engine_state.rows_in_progress(None, mesh) == 8 * 256
    )
    assert engine_state.rows_in_progress(12, mesh) == 12
    assert engine_state.slots_for(64, 16, 100, engine_state.rows_in_progress(None, None)).rows == 256
    assert engine_state.row_levels(256, None) == [256, 128, 64] and engine_state.row_levels(100, None) == [
        100
    ]
    assert engine_state.row_levels(256, mesh) == [256]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=14))
def test_any_prompts_in_any_order_have_their_own_completions(world, expected, numbers):
    engine = engine_of(world, SAMPLED, STOP, 6, 64, 3, len(PROMPTS))
    found = complete(Session(engine, world[1], KEY), [PROMPTS[i] for i in numbers], numbers)
    np.testing.assert_array_equal(found.tokens, expected.tokens[numbers])


def test_a_row_is_usable_after_a_completion_that_was_not_finite(world):
    model, whole = world
    broken = dict(whole, base=dict(whole["base"], embed=whole["base"]["embed"].at[39].set(jnp.nan)))
    prompts = [[39, 3], [1, 2], [4, 39], [5, 6], [8]]
    engine = engine_of(world, SAMPLED, STOP, 1, 64, 1, len(PROMPTS))
    good, bad = (complete(Session(engine, params, KEY), prompts).tokens[:, 0] for params in (whole, broken))
    assert (bad[[0, 2], 0] == NONFINITE).all() and not (good[[1, 3, 4], :-1] == 39).any()
    np.testing.assert_array_equal(bad[[1, 3, 4]], good[[1, 3, 4]])


def test_a_quantised_cache_changes_log_probs_a_little(world):
    greedy = Sampling(max_new=20)
    exact, difference = completed(world, 9, 1, greedy), {}
    for cache in ("int8", "fp8"):
        found = completed(world, 9, 1, greedy, cache=cache)
        same = np.cumprod(exact.tokens == found.tokens, -1).astype(bool) & (exact.tokens >= 0)
        difference[cache] = np.abs(exact.logps - found.logps)[same].mean()
        assert same.mean() > 0.3
    assert 1e-4 < difference["int8"] < 0.5 * difference["fp8"] < 0.1  # 7 and 3 bits of mantissa


def test_sizes():
    assert engine_state.slots_for(8, 8, 1000) == engine_state.Slots(64, 8, 1024, 8)
    assert engine_state.slots_for(96, 1, 70, 32) == engine_state.Slots(32, 32, 128, 8)
    assert engine_state.slots_for(96, 1, 70, 8) == engine_state.Slots(8, 8, 128, 2)
    assert engine_state.slots_for(10, 4, 64, 18) == engine_state.Slots(16, 8, 64, 1)
    assert engine_state.slots_for(2, 8, 1, 3) == engine_state.Slots(8, 2, 64, 1)
    assert engine_state.slots_for(10, 1, 64) == engine_state.Slots(10, 10, 64, 5)
    assert engine_state.read_levels(16) == [16] and engine_state.read_levels(128) == [64, 128]
    assert engine_state.read_levels(1000) == [256, 512, 1024]
    levels = [
        engine_state.prefill_levels(engine_state.Slots(8, 8, size, 8), None)
        for size in (256, 320, 1024, 8192)
    ]
    assert levels == [
        [(8, 256)], [(8, 128), (6, 320)], [(8, 256), (2, 1024)], [(4, 512), (1, 2048), (1, 8192)],
    ]  # fmt: skip
    mesh = make_mesh(MeshShape(data=8))
    assert engine_state.prefill_levels(engine_state.Slots(8, 8, 1024, 8), mesh) == [(8, 256), (8, 1024)]
    d = engine_state.Decoding(None, Sampling(16), ())
    levels = [
        engine_state.decode_levels(d, engine_state.Slots(8, 8, size, 8), None) for size in (256, 512, 1088)
    ]
    assert levels == [[(8, 16, 256)], [(8, 16, 256), (8, 16, 512)], [(8, 16, 576), (8, 16, 1088)]]
    served = replace(d, sampling=Sampling(200), serving=True)
    assert engine_state.decode_levels(served, engine_state.Slots(8, 8, 512, 1), None) == [(8, 256, 512)]
    goes_on = engine_state.decode_levels(
        replace(served, extends=True), engine_state.Slots(8, 8, 512, 1), None
    )
    assert goes_on == [(8, 64, 512), (8, 128, 512), (8, 256, 512)]
    assert engine_state.extend_levels(2, 512) == [(1, 64)]
    assert engine_state.extend_levels(64, 1536) == [(1, 64), (1, 512), (4, 64)]
