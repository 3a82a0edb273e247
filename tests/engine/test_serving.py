"""The server's programs and scheduler: completions equal the engine's whatever the other rows do; switching
settings and adapters compiles nothing.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_served as tiny
from engines import engine_of
from merged_arrays import merged_arrays

from jaxft.engine.sampling import Sampling, left_pad, row_sampling, sample_rows
from jaxft.engine.scheduler import QueueFull, Scheduler, Stopped
from jaxft.engine.session import RequestSettings, Session, generate
from jaxft.engine.state import TOP
from jaxft.models.adapted import adapted
from jaxft.models.families.llama import llama

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (3, 40, 1, 9, 100, 5, 30, 2, 11)]
SAMPLED = Sampling(12, 0.8, 20, 0.9)


@pytest.fixture(scope="module")
def scheduler():
    started, lines = tiny.scheduler()
    yield started
    started.close()
    assert not lines


def engine_completions(seed, adapter=None):
    """What generate.py makes of the prompts."""
    like = adapter or "polite"
    params = {"base": tiny.base(), "adapter": tiny.adapter(like)}
    if adapter is None:
        params["adapter"] = jax.tree.map(jnp.zeros_like, params["adapter"])
    world = adapted(tiny.MODEL, tiny.ADAPTERS[like]), params
    engine = engine_of(world, SAMPLED, tiny.STOP, len(PROMPTS), 128)
    return generate(Session(engine, params, jax.random.key(seed)), PROMPTS)


def numbered(seed, **options):
    return [
        tiny.TokenRequest(tuple(prompt), RequestSettings(SAMPLED, tiny.STOP, **options), seed, number)
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.quick_cases("0")
@pytest.mark.parametrize("seed", [0, 7, 2**31 + 3, 2**40 + 9])
def test_completions_equal_those_of_generate_for_the_same_seed(scheduler, seed):
    expected = engine_completions(seed)
    completions = tiny.complete(scheduler, numbered(seed))
    assert [one.ids for one in completions] == expected
    for one in completions:
        assert one.finish == ("stop" if one.ids[-1] in tiny.STOP else "length")
    assert len({len(ids) for ids in expected}) > 1 or seed


def test_an_adapter_s_completions_equal_those_of_generate_with_it(scheduler):
    completions = tiny.complete(scheduler, numbered(3, adapter=1))
    assert [one.ids for one in completions] == engine_completions(3, "polite") != engine_completions(3)


@pytest.mark.slow
def test_16_adapters_of_all_ranks_and_kinds_each_have_the_completions_of_their_merged_models(scheduler):
    names = list(tiny.ADAPTERS | tiny.OTHERS)
    assert len(names) == 16
    requests = [
        tiny.TokenRequest(tuple(PROMPTS[3]), RequestSettings(Sampling(10), adapter=i)) for i in range(17)
    ]
    completions = [one.ids for one in tiny.complete(scheduler, requests)]
    logits = jax.jit(
        lambda params, row: tiny.MODEL.logits(tiny.MODEL.head(params), tiny.MODEL.hidden(params, row)[0])
    )
    for ids, adapter in zip(completions, [{}, *map(tiny.adapter, names)], strict=True):
        merged = merged_arrays(tiny.base(), adapter, jnp.float32)
        row = left_pad([PROMPTS[3] + ids], 1, 64)
        assert logits(merged, row)[0, -len(ids) - 1 : -1].argmax(-1).tolist() == ids
    assert len({tuple(ids) for ids in completions}) >= 15


def test_a_completion_does_not_depend_on_the_other_rows_and_nothing_is_compiled(scheduler):
    requests = [
        tiny.TokenRequest(
            tuple(PROMPTS[i % len(PROMPTS)]),
            RequestSettings(
                Sampling(
                    1 + i % 24, (0.0, 0.7, 1.5)[i % 3], (None, 5, 40)[i % 3], (None, 0.8, 1.0)[i % 2],
                    (None, 0.05)[i % 5 == 0],
                ),
                ((), tiny.STOP, (5, 6))[i % 3], adapter=i % 17, top=i % 4 == 0,
            ),
            seed=i,
        )
        for i in range(40)
    ]  # fmt: skip
    alone = [tiny.complete(scheduler, [one])[0].ids for one in requests]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    try:
        together = [one.ids for one in tiny.complete(scheduler, requests)]
    finally:
        jax.monitoring.clear_event_listeners()
    assert together == alone and not compiled
    assert {len(ids) for ids in alone} >= {1, 2, 3} and len({tuple(ids[:4]) for ids in alone}) > 20


def model_logps(dtype, prompt, ids, name="terse"):
    """Log-probs [N, V] before each token of a completion with an adapter, by the model alone."""
    model = adapted(llama(tiny.MODEL.config, dtype), tiny.ADAPTERS[name])
    params = {"base": tiny.base(), "adapter": tiny.adapter(name)}
    params = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, params)
    row = left_pad([prompt + ids], 1, 128)
    logits = jax.jit(lambda p: model.logits(model.head(p), model.hidden(p, row)[0]))(params)
    return np.asarray(jax.nn.log_softmax(logits[0, -len(ids) - 1 : -1], -1))


def test_greedy_is_the_most_likely_token_and_log_probs_are_those_of_the_model(scheduler):
    """Within three times the model's rounding: exact is float64, and cached keys are added in another order.

    Weights are so large that rounding in float32 alone changes single log-probs by 7e-4 on some CPUs; another
    adapter changes those of every token by several nats.
    """
    ours, rounding, changed = [], [], []
    for prompt in PROMPTS[:4] + PROMPTS[5:]:
        request = tiny.TokenRequest(tuple(prompt), RequestSettings(Sampling(10), adapter=2, top=True))
        again = tiny.TokenRequest(tuple(prompt), RequestSettings(Sampling(10, 1.5, 1), adapter=2), seed=9)
        (greedy, sampled) = tiny.complete(scheduler, [request, again])
        assert greedy.ids == sampled.ids and not sampled.tokens[0].top
        rounded = model_logps(jnp.float32, prompt, greedy.ids)
        with jax.enable_x64(True):
            exact = model_logps(jnp.float64, prompt, greedy.ids)
            other = model_logps(jnp.float64, prompt, greedy.ids, "polite")
        for i, token in enumerate(greedy.tokens):
            order = np.argsort(-exact[i], kind="stable")[:TOP]
            assert token.token == order[0] == token.top[0][0] and len(token.top) == TOP
            assert token.logp == token.top[0][1]
            ours.append([logp for _, logp in token.top] - exact[i, order])
            rounding.append((rounded - exact)[i, order])
            changed.append(np.abs(other - exact)[i, order].max())
    assert np.square(ours).mean() < 3**2 * np.square(rounding).mean() < 3**2 * 1e-4**2
    assert np.abs(ours).max() < 3 * np.abs(rounding).max() < 1e-3 * min(changed)


def test_rows_are_sampled_as_each_alone():
    logits = jax.random.normal(jax.random.key(1), (7, 50)) * 3
    keys = jax.random.split(jax.random.key(2), 7)
    settings = [
        Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.3, top_k=4),
        Sampling(temperature=2.0, top_p=0.4), Sampling(temperature=0.9, top_k=7, top_p=0.7),
        Sampling(temperature=1.0, top_k=99, top_p=1.0), Sampling(temperature=1.0, min_p=0.3),
    ]  # fmt: skip
    each = [row_sampling(s, 50) for s in settings]
    tokens = sample_rows(logits, jax.tree.map(lambda *x: jnp.stack(x), *each), keys)
    alone = [
        int(sample_rows(logits[i : i + 1], jax.tree.map(lambda x: x[None], own), keys[i : i + 1], s)[0])
        for i, (s, own) in enumerate(zip(settings, each, strict=True))
    ]
    assert tokens.tolist() == alone


def test_a_row_is_free_after_its_request_is_cancelled(scheduler):
    collected = [tiny.Collected() for _ in range(8)]
    requests = [tiny.request(PROMPTS[0], max_new=24, temperature=0.0) for _ in collected]
    tickets = scheduler.submit([(request, one) for request, one in zip(requests, collected, strict=True)])
    for ticket in tickets[:7]:
        ticket.cancel()
    assert all(one.ended.wait(30) for one in collected)
    assert collected[7].finish == "length" or collected[7].ids[-1] in tiny.STOP
    assert sum(one.finish == "cancelled" for one in collected) >= 4  # those that waited, at least
    assert scheduler.load().running == scheduler.load().waiting == 0


def test_a_full_queue_refuses_all_of_a_request_and_a_closed_one_everything():
    full, _ = tiny.scheduler(queue=2)
    gate = tiny.Gate()
    try:
        running = [tiny.Collected() for _ in range(6)]
        full.submit([(tiny.request(PROMPTS[0], max_new=24), gate(one)) for one in running])
        with pytest.raises(QueueFull, match="queue of 2 requests"):
            full.submit([(tiny.request(PROMPTS[0]), print)] * 3)
        with pytest.raises(ValueError, match="7 completions at once"):  # which no waiting helps
            full.submit([(tiny.request(PROMPTS[0]), print)] * 7)
        gate.open.set()
        assert all(one.ended.wait(30) for one in running)
    finally:
        gate.open.set()
        full.close()
    with pytest.raises(Stopped, match="stopping"):
        full.submit([(tiny.request(PROMPTS[0]), print)])


def test_cancelled_requests_hold_no_place_in_the_queue():
    small, _ = tiny.scheduler(queue=2)
    gate = tiny.Gate()
    try:
        running, waiting = ([tiny.Collected() for _ in range(n)] for n in (4, 4))
        small.submit([(tiny.request(PROMPTS[0]), gate(one)) for one in running])
        first = small.submit([(tiny.request(PROMPTS[0]), one) for one in waiting[:2]])
        for ticket in first:
            ticket.cancel()
        small.submit([(tiny.request(PROMPTS[0]), one) for one in waiting[2:]])
        assert [one.finish for one in waiting[:2]] == ["cancelled"] * 2
        with pytest.raises(QueueFull):
            small.submit([(tiny.request(PROMPTS[0]), print)])
        gate.open.set()
        assert all(one.ended.wait(30) for one in running + waiting)
        assert "cancelled" not in {one.finish for one in running + waiting[2:]}
    finally:
        gate.open.set()
        small.close()


WRONG = {
    "the prompt is empty": dict(prompt=[]),
    "129 tokens, more than the 128": dict(prompt=[1] * 129),
    "max_tokens=25 is more than the 24": dict(prompt=[1], max_new=25),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_the_programs_cannot_do_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        scheduler.submit([(tiny.request(**WRONG[message]), print)])


def test_a_failure_of_the_device_ends_its_requests_only():
    engine, fail = tiny.engine(), [True]

    def broken(*args):
        if fail.pop() if fail else False:
            raise RuntimeError("RESOURCE_EXHAUSTED: out\nof memory")
        return run(*args)

    ((size, run),) = engine.decode.items()
    failing, lines = tiny.scheduler(own=replace(engine, decode={size: broken}))
    first, second = (tiny.complete(failing, [tiny.request(PROMPTS[0], seed)])[0] for seed in (1, 1))
    failing.close()
    assert first.finish == "error" and "out of memory" in first.progress[-1].error
    assert second.finish in ("stop", "length") and second.ids[:1] == first.ids[:1]
    assert len(lines) == 1 and "\n" not in lines[0] and failing.failures == 1


def test_requests_end_with_a_device_that_does_not_recover():
    engine, states = tiny.engine(), [tiny.engine().empty]

    def broken(*args):
        raise RuntimeError("halted")

    decode = dict.fromkeys(engine.decode, broken)
    failing, lines = tiny.scheduler(own=replace(engine, empty=lambda: states.pop()(), decode=decode))
    ended = tiny.complete(failing, [tiny.request(PROMPTS[0])] * 6)
    assert {one.finish for one in ended} == {"error"} and "halted" in ended[-1].progress[-1].error
    failing.thread.join(30)
    with pytest.raises(Stopped, match="does not recover"):
        failing.submit([(tiny.request(PROMPTS[0]), print)])
    assert len(lines) == 2
    failing.close(1.0)


def test_a_completion_that_is_not_finite_ends_with_an_error():
    params = {**tiny.params(), "base": {**tiny.base(), "embed": tiny.base()["embed"].at[39].set(jnp.nan)}}
    started = Scheduler(tiny.engine(), tiny.SIZES, params)
    started.start()
    bad, good = tiny.complete(started, [tiny.request([39, 3], temperature=0.0), tiny.request([5], max_new=1)])
    started.close()
    assert bad.finish == "error" and "not finite" in bad.progress[-1].error and good.finish != "error"
