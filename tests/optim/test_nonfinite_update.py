"""An update that would leave a parameter infinite or NaN changes nothing, for every optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import examples, micro, one_by_one, tiny

from jaxft.batch import TrainState
from jaxft.models.families.llama import llama
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.objectives import metrics
from jaxft.objectives.sft import sft
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.rules import adafactor, adamw
from jaxft.optim.update import StepInfo
from jaxft.train import trainable_params
from jaxft.train.step import make_train_step

SPECS = {
    "layers": {"w": ParamSpec((3, 16, 32), ("layers", "width", "mlp"), full(0.0))},
    "head": ParamSpec((16, 32), ("width", "vocab"), full(0.0)),
}
BIG = float(np.finfo(np.float32).max)


def sgd(schedule, specs, weight_decay):
    return optax.sgd(schedule)


def at_the_second_step(rate):
    """A schedule of 0.01 that is `rate` at the second step."""

    def make(lr, end, warmup, steps):
        return lambda step: jnp.where(step == 1, jnp.float32(rate), jnp.float32(0.01))

    return make


def stepped(settings, dtype=jnp.float32):
    """(step, parameters, optimizer state): step(params, state) -> (params, state, whether it was finite)."""
    optimizer = make_optimizer(settings, SPECS, 10)
    params = jax.tree.map(
        lambda s: jnp.ones(s.shape, dtype), SPECS, is_leaf=lambda s: isinstance(s, ParamSpec)
    )
    grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    grads = jax.tree.map(lambda g: g.astype(dtype), grads)

    @jax.jit
    def step(params, state):
        info = StepInfo(jnp.float32(1.0), jnp.array(True), jax.random.key(0))
        info = info._replace(finite=optimizer.check(grads, state, params, info))
        return *optimizer.update(grads, state, params, info), info.finite

    return step, params, optimizer.init(params)


def assert_same(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, two)


CASES = [
    (adamw, False, np.inf),
    (adamw, True, np.nan),
    pytest.param(adamw, False, BIG, marks=pytest.mark.slow),
    pytest.param(adamw, True, BIG, marks=pytest.mark.slow),
    pytest.param(adafactor, False, BIG, marks=pytest.mark.slow),
    (adafactor, True, BIG),
    (adamw_8bit, False, BIG),
    pytest.param(adamw_8bit, True, BIG, marks=pytest.mark.slow),
    (adamw_bf16, False, BIG),
    (sgd, True, BIG),
]


@pytest.mark.parametrize("optimizer, layerwise, rate", CASES)
def test_a_step_with_an_infinite_update_changes_neither_parameters_nor_state(optimizer, layerwise, rate):
    groups = (("layers/.*", 8.0),)  # the largest float32 overflows where it is multiplied
    step, params, state = stepped(
        Optim(optimizer=optimizer, schedule=at_the_second_step(rate), layerwise=layerwise, lr_groups=groups)
    )
    params, state, first = step(params, state)
    after, after_state, second = step(params, state)
    assert first and not second
    assert_same((after, after_state), (params, state))
    assert np.isfinite(np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(after)])).all()


def test_rows_in_pieces_are_checked_too(monkeypatch):
    monkeypatch.setattr("jaxft.optim.layerwise.LARGE", 64)
    monkeypatch.setattr("jaxft.optim.layerwise.PIECE", 64)
    groups = (("head", BIG),)
    step, params, state = stepped(
        Optim(optimizer=adamw, schedule=at_the_second_step(1e3), layerwise=True, lr_groups=groups)
    )
    assert len(state.large) == 1
    *after, finite = step(params, state)  # 0.01 * BIG is finite
    assert finite
    *again, finite = step(*after)
    assert not finite
    assert_same(tuple(again), tuple(after))


def test_the_largest_bfloat16_is_not_rounded_up_to_infinity():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    rate = at_the_second_step(0.003 * largest)
    step, params, state = stepped(Optim(optimizer=sgd, schedule=rate, clip=None), jnp.bfloat16)
    params = jax.tree.map(lambda p: jnp.full_like(p, largest), params)
    _, state, first = step(params, state)
    assert (
        first and largest * 1.003 < BIG
    )  # 0.01 is far below a spacing; the second update is finite in float32
    after, _, finite = step(params, state)
    assert not finite
    assert_same(after, params)


def test_a_check_needs_no_copy_of_the_parameters():
    """The flag must be known before anything is overwritten; the update is not stored until then."""
    shape = {"w": ParamSpec((1024, 1024), ("width", "mlp"), full(0.0))}
    optimizer = make_optimizer(Optim(), shape, 10)
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, grads):
        info = StepInfo(optax.tree.norm(grads), jnp.array(True))
        info = info._replace(finite=optimizer.check(grads, state, params, info))
        return optimizer.update(grads, state, params, info)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22 // 8


def trained(**settings):
    """(train step, first state, frozen parameters) of a tiny model trained in full."""
    model, whole = tiny(jnp.float32, remat="full")
    parts = trainable_params.partition_params(llama(model.config, jnp.float32, remat="full"), None, None)
    trainable, frozen = trainable_params.split_params(parts, whole)
    optimizer = make_optimizer(Optim(clip=None, **settings), parts.trainable_specs, 10)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable), {}, jnp.zeros(2, jnp.int32))
    return jax.jit(make_train_step(sft(parts.model), optimizer, 0)), state, frozen


def test_a_train_step_counts_an_infinite_update():
    step, state, frozen = trained(schedule=at_the_second_step(np.inf))
    batch = micro(one_by_one(examples(4)), 1)
    state, _ = step(state, frozen, batch)
    after, found = step(state, frozen, batch)
    assert metrics.as_floats(found)["skipped"] == 1 and after.bad.tolist() == [1, 1] and after.step == 2
    assert np.isfinite(metrics.as_floats(found)["loss"])
    assert_same((after.trainable, after.opt_state), (state.trainable, state.opt_state))


def test_a_fused_layer_with_an_infinite_update_is_unchanged_and_counted():
    """The middle layer's `o` is so large that its decay overflows; `v` makes up for it in the loss."""
    step, state, frozen = trained(
        schedule=at_the_second_step(np.inf),
        fused_backward=True,
        weight_decay=1.0,
        lr_groups=((".*/o", 1e27),),
    )
    attn = state.trainable["base"]["layers"]["attn"]
    attn["v"], attn["o"] = attn["v"].at[1].multiply(1e-15), attn["o"].at[1].multiply(1e15)
    after, found = step(state, frozen, micro(one_by_one(examples(4)), 1))
    assert metrics.as_floats(found)["skipped"] == 1 and np.isfinite(metrics.as_floats(found)["loss"])
    moved = jax.tree.map(
        lambda a, b: [bool((x != y).any()) for x, y in zip(a, b)], state.trainable, after.trainable
    )
    assert moved["base"]["layers"]["mlp"]["up"] == [True, False, True]
    assert not any(moved["base"]["embed"])
    for leaf in jax.tree.leaves(after.trainable):
        assert np.isfinite(np.asarray(leaf)).all()
