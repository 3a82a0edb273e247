"""Adapters trained together equal each trained separately: matmuls, forward passes, steps, evaluation."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import laid, micro, random_pairs, start_aux
from tiny_model import CONFIG, assert_close, examples, one_by_one

from jaxft.batch import TrainState
from jaxft.models.adapted import adapted
from jaxft.models.families.llama import llama
from jaxft.nn import matmul, param_spec, tree
from jaxft.nn.adapters import lora
from jaxft.nn.adapters.lora import Adapted, Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.quant import quantize
from jaxft.objectives import metrics
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.preference import EMAReference, mean_logp, preference
from jaxft.objectives.sft import sft
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.schedules import linear_schedule
from jaxft.train import trainable_params
from jaxft.train.multi_adapter import (
    SharedFrozen,
    combine_objectives,
    gradients,
    loss_metrics,
    make_adapters_eval_step,
    make_update,
    own_params,
)
from jaxft.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("x64")


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# Matmuls and forward passes


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "quantised"])
def test_a_matmul_with_several_adapters_equals_one_matmul_per_adapter(packed):
    K, B, T, size, R, out = 3, 2, 5, 7, 2, 6
    x, a, b, scale = (
        random(K * B, T, size),
        random(K, size, R, seed=1),
        random(K, R, out, seed=2),
        random(K, seed=3),
    )
    w, g = random(size, out, seed=4), random(K * B, T, out, seed=5)
    w = quantize(w.astype(jnp.bfloat16), "bits") if packed else w

    def together(x, a, b, w):
        return matmul.linear(x, Adapted(w, a, b, scale, over=(lora.ADAPTERS,)))

    def apart(x, a, b, w):
        rows = x.reshape(K, B, T, size)
        return jnp.concatenate([matmul.linear(rows[k], Adapted(w, a[k], b[k], scale[k])) for k in range(K)])

    def both(fn):
        def loss(x, a, b, w_):
            return jnp.sum(g * jnp.sin(fn(x, a, b, w if packed else w_)))

        return fn(x, a, b, w), jax.grad(loss, (0, 1, 2) if packed else (0, 1, 2, 3))(
            x, a, b, None if packed else w
        )

    assert_close(both(together), both(apart))


def test_a_16_bit_matmul_with_several_adapters_saves_no_dequantised_weight_and_has_float32_gradients():
    w = quantize(random(6, 5, dtype=jnp.bfloat16), "bits")
    a, b = random(4, 6, 2, dtype=jnp.float32), random(4, 2, 5, dtype=jnp.float32)
    scale = jnp.ones(4, jnp.float32)
    product = lambda x, a, b: matmul.linear(x, Adapted(w, a, b, scale, over=(lora.ADAPTERS,)))  # noqa: E731
    x = random(8, 3, 6, dtype=jnp.bfloat16)
    saved = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(product, x, a, b)[1], x))
    assert {leaf.dtype for leaf in saved if leaf.shape == (6, 5)} == {jnp.dtype(jnp.uint16)}
    y, pull = jax.vjp(product, x, a, b)
    assert y.dtype == jnp.bfloat16 and [g.dtype for g in pull(y)] == [jnp.bfloat16, jnp.float32, jnp.float32]


RANKS = (2, 5, 3)


def fresh(model, rank, seed):
    """A random adapter of a rank with b != 0."""
    start = param_spec.init_params(
        adapter_specs(model.specs, Adapter(rank=rank, alpha=3.0)),
        jax.random.key(seed),
        jnp.float64,
    )
    return jax.tree.map(lambda x: x if x.ndim < 3 or jnp.any(x) else 0.3 * random(*x.shape, seed=seed), start)


@pytest.mark.slow
def test_a_forward_pass_with_adapters_of_several_ranks_equals_one_pass_per_adapter():
    base = llama(CONFIG, jnp.float64)
    model, weights = (
        adapted(base, Adapter()),
        param_spec.init_params(base.specs, jax.random.key(9), jnp.float64),
    )
    adapters = [fresh(base, rank, seed) for seed, rank in enumerate(RANKS)]
    batch = one_by_one(examples(4))
    tiled = jax.tree.map(lambda x: jnp.concatenate([x] * len(RANKS)), batch)

    def together(adapters):
        whole = lora.several({"adapter": lora.stack_adapters(adapters)})
        return model.hidden({"base": weights, **whole}, tiled)[0]

    def apart(adapters):
        return jnp.concatenate(
            [model.hidden({"base": weights, "adapter": one}, batch)[0] for one in adapters]
        )

    found, expected = (
        jax.jit(jax.value_and_grad(lambda adapters, f=f: jnp.sum(jnp.sin(f(adapters)))))(adapters)
        for f in (together, apart)
    )
    assert_close(found, expected)


def test_adapters_are_recovered_from_their_stack():
    base = llama(CONFIG, jnp.float64)
    adapters = [fresh(base, rank, seed) for seed, rank in enumerate(RANKS)]
    adapters = [{**x, "embed": {"scale": jnp.asarray(k / 3)}} for k, x in enumerate(adapters)]  # no layers
    stack = lora.stack_adapters(adapters)
    assert {x.shape[0] for x in jax.tree.leaves(stack)} == {3} and stack["layers"]["attn"]["q"]["a"].shape[
        -1
    ] == max(RANKS)
    for k, one in enumerate(adapters):
        assert_close(lora.adapter_of_stack(stack, k, one), one, 0)


# Steps

BASE = llama(CONFIG, jnp.float64)
STEPS = 3
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time to compile


@dataclass(frozen=True)
class One:
    """Settings of one adapter. own_reference: the reference is its initial adapter, not the base."""

    objective: Any
    rank: int = 2
    optim: Optim = Optim(lr=0.02, warmup=0.0)
    seed: int = 0
    own_reference: bool = False


def pairwise(loss, reference="start", **knobs):
    knobs |= {"reward": mean_logp} if reference is None else {}
    return partial(preference, loss=loss, reference=reference, **knobs)


MIXED = (
    One(pairwise(partial(P.dpo, beta=0.5), beta=0.5)),
    One(
        pairwise(partial(P.ipo, beta=0.2), beta=0.2),
        rank=5,
        optim=Optim(lr=0.01, clip=0.05, warmup=0.0, schedule=linear_schedule),
    ),
    One(
        pairwise(partial(F.bco, beta=0.3), beta=0.3),
        rank=3,
        optim=Optim(lr=0.03, clip=None, weight_decay=0.1),
        seed=1,
    ),
    One(pairwise(F.simpo, reference=None), rank=4, optim=Optim(lr=0.02, b1=0.5, warmup=0.0), seed=2),
)


@pytest.fixture(scope="module")
def weights():
    with jax.enable_x64(True):
        return param_spec.init_params(BASE.specs, jax.random.key(9), jnp.float64)


def begin(one, weights):
    """(partition, objective, optimizer, state at step 0, frozen) of one adapter."""
    t = trainable_params.partition_params(
        BASE, Adapter(rank=one.rank, alpha=3.0, targets=("q", "down")), None
    )
    adapter = param_spec.init_params(t.specs["adapter"], jax.random.key(one.seed), jnp.float64)
    adapter = tree.map_with_path(
        lambda path, x: 0.3 * random(*x.shape, seed=7) if path.endswith("/b") else x, adapter
    )
    trainable, frozen = trainable_params.split_params(t, {"base": weights, "adapter": adapter})
    objective = one.objective(t.model)
    optimizer = make_optimizer(one.optim, t.trainable_specs, STEPS)
    aux = start_aux(objective, trainable, not one.own_reference)
    return (
        t,
        objective,
        optimizer,
        TrainState(jnp.int32(0), trainable, optimizer.init(trainable), aux, jnp.zeros(2, jnp.int32)),
        frozen,
    )


def numbers(found):
    return {name: jax.tree.map(np.asarray, m) for name, m in found.items()}


def train_separately(one, weights, batches):
    """(state after the last step, metrics of every step) of an adapter trained separately."""
    _, objective, optimizer, state, frozen = begin(one, weights)
    step, logged = jit(make_train_step(objective, optimizer, 0)), []
    for batch in batches:
        state, found = step(state, frozen, batch)
        logged.append(numbers(found))
    return state, logged


def train_together(ones, weights, batches, **options):
    """(states after the last step, metrics of every step) of adapters trained together."""
    begun = [begin(one, weights) for one in ones]
    t = combine_objectives([b[1] for b in begun], **options)
    states, frozen = [b[3] for b in begun], SharedFrozen(weights, tuple(own_params(b[4]) for b in begun))
    evaluate, logged = jit(partial(gradients, t)), []
    updates = [jit(make_update(b[1], b[2])) for b in begun]
    for batch in batches:
        grads, found = evaluate([s.trainable for s in states], frozen, batch, [s.aux for s in states])
        done = [
            update(s, k, grads, found, batch)
            for k, (update, s) in enumerate(zip(updates, states, strict=True))
        ]
        states = [state for state, _ in done]
        each = jax.tree.map(lambda *x: jnp.stack(x), *[more for _, more in done])
        logged.append(numbers({**found, **each}))
    return states, logged


def assert_equal_to_separate(found, expected):
    """Compare adapters trained together (found) with each one trained separately (expected)."""
    states, steps = found
    for k, (own, own_steps) in enumerate(expected):
        for now, own_now in zip(steps, own_steps, strict=True):
            for name, metric in own_now.items():
                for x, y in zip(jax.tree.leaves(now[name]), jax.tree.leaves(metric), strict=True):
                    np.testing.assert_allclose(
                        x[k], y, rtol=1e-10, atol=1e-12, err_msg=f"adapter {k}: {name}"
                    )
        assert_close(states[k], own)


def standard():
    """Standard dtype promotion, which optax needs."""
    return jax.numpy_dtype_promotion("standard")


def some_batches(count, parts=1, **options):
    return [micro(laid(random_pairs(count=7, seed=i), **options), parts) for i in range(count)]


BATCHES = [laid(random_pairs(count=7, seed=i)) for i in range(STEPS)]
in_parts = lambda count: [micro(batch, count) for batch in BATCHES]  # noqa: E731


@pytest.fixture(scope="module")
def separate(weights):
    """A function that returns the first adapters of MIXED, each trained separately."""

    @cache
    def trained(k):
        with jax.enable_x64(True), standard():
            return train_separately(MIXED[k], weights, in_parts(1))

    return lambda count: [trained(k) for k in range(count)]


@pytest.mark.quick_cases("2-1-2")
@pytest.mark.parametrize("count, parts, at_once", [(2, 1, 2), (4, 1, 1), (4, 2, 2), (4, 1, 4)], ids=str)
def test_adapters_trained_together_equal_each_one_trained_separately(
    weights, separate, count, parts, at_once
):
    with standard():
        together = train_together(MIXED[:count], weights, in_parts(parts), at_once=at_once)
        assert_equal_to_separate(together, separate(count))


@pytest.mark.quick_cases("start")
@pytest.mark.parametrize("reference", ["start", EMAReference(0.5, 2)], ids=["start", "moving"])
def test_adapters_whose_state_has_a_reference_equal_each_one_trained_separately(weights, reference):
    ones = [One(pairwise(partial(P.dpo, beta=beta), reference), own_reference=True) for beta in (0.2, 0.9)]
    with standard():
        assert_equal_to_separate(
            train_together(ones, weights, in_parts(1)),
            [train_separately(one, weights, in_parts(1)) for one in ones],
        )


@pytest.mark.slow
def test_adapters_on_separate_rows_equal_each_one_trained_separately(weights):
    ones = [replace(MIXED[0], seed=seed) for seed in (3, 4)]
    own = [[micro(laid(random_pairs(count=7, seed=10 * k + i)), 2) for i in range(STEPS)] for k in range(2)]
    batches = [jax.tree.map(lambda *x: np.concatenate(x), *each) for each in zip(*own, strict=True)]
    with standard():
        expected = [train_separately(one, weights, rows) for one, rows in zip(ones, own, strict=True)]
        for at_once in (1, 2):
            assert_equal_to_separate(
                train_together(ones, weights, batches, separate_rows=True, at_once=at_once), expected
            )


def test_supervised_adapters_equal_each_one_trained_separately(weights):
    ones = [One(sft, rank=rank, optim=Optim(lr=lr, warmup=0.0)) for rank, lr in ((2, 0.01), (4, 0.05))]
    batches = [micro(one_by_one(examples(4, seed=i)), 2) for i in range(STEPS)]
    with standard():
        assert_equal_to_separate(
            train_together(ones, weights, batches), [train_separately(one, weights, batches) for one in ones]
        )


def broken(pair):
    return P.dpo(pair) * jnp.asarray(jnp.nan, pair.weight.dtype)


def test_a_non_finite_adapter_is_frozen_and_the_others_continue(weights, separate):
    ones = [MIXED[0], replace(MIXED[0], objective=pairwise(broken)), MIXED[1]]
    with standard():
        states, logged = train_together(ones, weights, in_parts(1))
        initial = begin(ones[1], weights)[3]
        others = (
            [states[0], states[2]],
            [jax.tree.map(lambda x: x[jnp.array([0, 2])], now) for now in logged],
        )
        assert_equal_to_separate(others, separate(2))
    assert_close((states[1].trainable, states[1].opt_state), (initial.trainable, initial.opt_state), 0)
    assert (
        states[1].bad.tolist() == [STEPS, STEPS]
        and [now["skipped"].total.tolist() for now in logged] == [[0, 1, 0]] * STEPS
    )


def infinite(lr, end, warmup, steps):
    return lambda step: jnp.full((), jnp.inf)


@pytest.mark.slow
def test_an_adapter_with_an_infinite_update_is_unchanged_and_the_others_continue(weights, separate):
    ones = [MIXED[0], replace(MIXED[0], optim=Optim(schedule=infinite)), MIXED[1]]
    with standard():
        states, logged = train_together(ones, weights, in_parts(1))
        initial = begin(ones[1], weights)[3]
        kept = [jax.tree.map(lambda x: x[jnp.array([0, 2])], now) for now in logged]
        assert_equal_to_separate(([states[0], states[2]], kept), separate(2))
    assert_close((states[1].trainable, states[1].opt_state), (initial.trainable, initial.opt_state), 0)
    assert states[1].bad.tolist() == [STEPS, STEPS]


# Evaluation, cost


@pytest.mark.slow
def test_evaluation_of_several_adapters_equals_one_evaluation_per_adapter(weights):
    with standard():
        begun = [begin(one, weights) for one in MIXED]
        t = combine_objectives([b[1] for b in begun], at_once=2)
        trainable, aux = [b[3].trainable for b in begun], [b[3].aux for b in begun]
        frozen = SharedFrozen(weights, tuple(own_params(b[4]) for b in begun))
        step = jit(make_adapters_eval_step(t))
        seen = [step(trainable, frozen, jax.tree.map(lambda x: x[None], batch), aux) for batch in BATCHES[:2]]
        found = loss_metrics(t, jax.tree.map(lambda *x: jnp.concatenate(x, 1), *seen), aux)
        whole = jax.tree.map(lambda *x: np.concatenate(x), *BATCHES[:2])
        for k, (_, objective, _, state, own) in enumerate(begun):
            expected = jit(lambda *x, o=objective: o.for_evaluation()(*x))(
                tree.combine(state.trainable, own), whole, None, state.aux
            )[1]
            mine = metrics.as_floats(jax.tree.map(lambda x, k=k: x[k], found))
            for name, value in metrics.as_floats(expected).items():
                np.testing.assert_allclose(
                    mine[name], value, rtol=1e-10, atol=1e-12, err_msg=f"adapter {k}: {name}"
                )


def counted(model, calls):
    """The model, which appends the rows of each forward pass whose result is used to `calls`."""

    def append(count, _):
        calls.append(int(count))
        return np.zeros((), np.int32)

    def hidden(params, batch, key=None):
        h, outputs = model.hidden(params, batch, key)
        shape = jax.ShapeDtypeStruct((), jnp.int32)
        nothing = jax.pure_callback(
            append, shape, jnp.asarray(batch.ids.shape[0]), jax.lax.stop_gradient(h[0, 0, 0])
        )
        return h + nothing.astype(h.dtype), outputs

    return replace(model, hidden=hidden)


@pytest.mark.quick_cases("3*")
@pytest.mark.parametrize("at_once, rows", [(1, [4, 4, 4, 4]), (3, [4, 12])], ids=str)
def test_the_reference_forward_pass_runs_once_for_all_adapters(weights, at_once, rows):
    calls = []
    ones = [replace(MIXED[0], objective=lambda model: pairwise(P.dpo)(counted(model, calls)))] * 3
    with standard():
        train_together(ones, weights, in_parts(1)[:1], at_once=at_once)
    assert sorted(calls) == rows


@pytest.mark.slow
def test_the_base_is_in_memory_once_for_any_number_of_adapters(weights):
    def arguments(count):
        begun = [begin(MIXED[0], weights)] * count
        t = combine_objectives([b[1] for b in begun])
        frozen = SharedFrozen(weights, tuple(own_params(b[4]) for b in begun))
        args = [b[3].trainable for b in begun], frozen, in_parts(1)[0], [b[3].aux for b in begun]
        return jit(partial(gradients, t)).lower(*args).compile().memory_analysis().argument_size_in_bytes

    adapter = begin(MIXED[0], weights)[3].trainable
    scales = CONFIG.layers * 2 * 8
    assert arguments(4) - arguments(2) == 2 * (sum(x.nbytes for x in jax.tree.leaves(adapter)) + scales)


def test_objectives_with_different_references_are_refused(weights):
    t, objective, *_ = begin(MIXED[0], weights)
    moving = pairwise(P.dpo, EMAReference())(t.model)
    with pytest.raises(ValueError, match="different kinds of reference .moving, start."):
        combine_objectives([objective, moving])
