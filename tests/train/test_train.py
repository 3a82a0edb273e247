"""Laws of the train step: additivity, packing, trainable leaves, non-finite steps, remat, optimizers."""

import re
from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, assert_close, batch_of, examples, micro, one_by_one, tiny

from jaxft.batch import TrainState
from jaxft.models.families.llama import llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.stack import REMAT
from jaxft.objectives import metrics
from jaxft.objectives.sft import sft
from jaxft.optim import layerwise as layerwise_module
from jaxft.optim import rules, schedules, update
from jaxft.optim.low_precision import adamw_8bit
from jaxft.optim.optimizer import Optim, from_optax, make_optimizer
from jaxft.optim.update import StepInfo, standard_promotion
from jaxft.runs.settings.setting_values import describe
from jaxft.train import trainable_params
from jaxft.train.evaluate import evaluate
from jaxft.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("x64")


def loss_and_grads(model, whole, batch):
    objective = sft(model)
    return jax.jit(jax.value_and_grad(lambda p, batch: objective(p, batch, None, {})[0]))(whole, batch)


def sgd(rate):
    return from_optax(optax.sgd(rate), optax.constant_schedule(rate), "sgd")


def state_of(trainable, optimizer):
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable), {}, jnp.zeros(2, jnp.int32))


def gradient_of(model, whole, batch):
    """(loss, summed gradients) of the train step: an SGD update with rate 1 is the gradient."""
    optimizer = sgd(1.0)
    step = jax.jit(make_train_step(sft(model), optimizer, 0))
    state, found = step(state_of(whole, optimizer), jax.tree.map(lambda _: None, whole), batch)
    return metrics.as_floats(found)["loss"], jax.tree.map(jnp.subtract, whole, state.trainable)


def test_gradient_accumulation_equals_one_batch_for_rows_of_unequal_length():
    model, whole = tiny()
    batch = one_by_one(examples(8))
    one = gradient_of(model, whole, micro(batch, 1))
    for count in (2, 8):
        assert_close(gradient_of(model, whole, micro(batch, count)), one)


@pytest.mark.slow
def test_the_loss_of_a_batch_is_the_sum_over_its_parts():
    model, whole = tiny()
    batch = one_by_one(examples(6))
    total = loss_and_grads(model, whole, batch)
    parts = [
        loss_and_grads(model, whole, jax.tree.map(lambda x, i=i: x[i : i + 2], batch)) for i in (0, 2, 4)
    ]
    assert_close(jax.tree.map(lambda *x: sum(x), *parts), total)


def test_packed_rows_have_the_loss_and_gradients_of_unpacked_ones():
    model, whole = tiny()
    some = examples(6)
    weight = 1 / sum(len(ids) - prompt for ids, prompt in some)
    packed = batch_of([some[:3], some[3:]], 48, 40, weight)
    assert_close(loss_and_grads(model, whole, packed), loss_and_grads(model, whole, one_by_one(some)))


def test_padding_rows_change_nothing_and_an_empty_batch_has_loss_zero():
    model, whole = tiny()
    some = examples(4)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), one_by_one(some))
    assert_close(loss_and_grads(model, whole, padded), loss_and_grads(model, whole, one_by_one(some)))
    loss, grads = loss_and_grads(model, whole, jax.tree.map(lambda x: x[4:], padded))
    assert loss == 0 and all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


def test_evaluation_has_the_same_metrics_for_any_batch_size():
    model, whole = tiny()
    batch = one_by_one(examples(8))
    step = jax.jit(evaluate.make_eval_step(sft(model)))
    frozen = jax.tree.map(lambda _: None, whole)
    found = []
    for size in (1, 2, 8):
        parts = [jax.tree.map(lambda x, i=i, n=size: x[None, i : i + n], batch) for i in range(0, 8, size)]
        found.append(evaluate.evaluate(lambda b: step(whole, frozen, b, {}), parts))
    assert found[0].keys() == {"loss", "entropy", "mean_token_accuracy"}
    for other in found[1:]:
        for name in other:
            assert other[name] == pytest.approx(found[0][name], rel=1e-12)


def lora_run(optimizer, dropout=0.0):
    _, whole = tiny(adapter=Adapter(rank=4, dropout=dropout))
    t = trainable_params.partition_params(plain_model(), Adapter(rank=4, dropout=dropout), None)
    return (*trainable_params.split_params(t, whole), jax.jit(make_train_step(sft(t.model), optimizer, 0)))


@cache
def plain_model():
    return llama(CONFIG, jnp.float64)


@cache
def adamw_run():
    """(state, trainable, frozen, step): one program, and state from which it starts."""
    optimizer = make_optimizer(Optim(weight_decay=0.1), lora_specs(), 10)
    trainable, frozen, step = lora_run(optimizer)
    return state_of(trainable, optimizer), trainable, frozen, step


def test_only_the_adapter_is_updated():
    state, trainable, frozen, step = adamw_run()
    before = jax.tree.map(np.array, frozen)
    batch = micro(one_by_one(examples(4)), 2)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    assert set(tree.paths(trainable)) == {p for p in param_spec.spec_paths(lora_specs())}
    assert all(p.endswith(("/a", "/b")) for p in tree.paths(trainable))
    for path, leaf in tree.paths(state.trainable).items():
        assert np.any(np.asarray(leaf) != np.asarray(tree.paths(trainable)[path])), path
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))


def lora_specs():
    return trainable_params.partition_params(plain_model(), Adapter(rank=4), None).trainable_specs


def test_a_nonfinite_step_changes_nothing_but_is_counted():
    state, _, frozen, step = adamw_run()
    good = micro(one_by_one(examples(4)), 2)
    bad = good.replace(token_weights=good.token_weights.at[1, 0, 0].set(jnp.nan))
    state, _ = step(state, frozen, good)
    after, found = step(state, frozen, bad)
    assert metrics.as_floats(found)["skipped"] == 1 and after.bad.tolist() == [1, 1] and after.step == 2
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))  # noqa: E731
    jax.tree.map(same, (state.trainable, state.opt_state), (after.trainable, after.opt_state))
    again, found = step(after, frozen, good)
    assert again.bad.tolist() == [1, 0] and metrics.as_floats(found)["skipped"] == 0


def test_dropout_depends_on_the_step_and_is_absent_from_evaluation():
    optimizer = sgd(0.0)
    trainable, frozen, step = lora_run(optimizer, dropout=0.5)
    batch = micro(one_by_one(examples(4)), 1)
    state = state_of(trainable, optimizer)
    state, first = step(state, frozen, batch)
    _, second = step(state, frozen, batch)
    _, first_again = step(state_of(trainable, optimizer), frozen, batch)
    losses = [metrics.as_floats(m)["loss"] for m in (first, second, first_again)]
    assert losses[0] == losses[2] and losses[0] != losses[1]


@pytest.mark.quick_cases("pairs")
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_policies_give_the_same_gradients(remat):
    """Four layers, under jit, since offloading places the buffers of a compiled program."""
    config, found = replace(plain_model().config, layers=4), []
    whole = param_spec.init_params(llama(config).specs, jax.random.key(0), jnp.float64)
    for name in ("none", remat):
        model = llama(config, jnp.float64, remat=name)
        found.append(jax.jit(lambda w, model=model: loss_and_grads(model, w, one_by_one(examples(4))))(whole))
    assert_close(found[1], found[0])


def test_remat_pairs_refuses_an_odd_number_of_layers():
    config = replace(plain_model().config, layers=3)
    model = llama(config, jnp.float32, remat="pairs")
    whole = param_spec.init_params(model.specs, jax.random.key(0))
    with pytest.raises(ValueError, match="divisible by 2, but the stack layers has 3; use remat=full"):
        model.hidden(whole, one_by_one(examples(4)))[0]


def test_a_bfloat16_residual_stream_has_a_small_rounding_error():
    wide, whole = tiny(jnp.float32)
    narrow, _ = tiny(jnp.float32, residual=jnp.bfloat16)
    batch = one_by_one(examples(4))
    a, b = (np.asarray(m.hidden(whole, batch)[0]) for m in (wide, narrow))
    off = np.abs(a - b).max() / np.abs(a).max()
    assert narrow.residual == jnp.bfloat16 and wide.residual == jnp.float32 and 1e-4 < off < 0.02
    assert describe(narrow)["residual"] == "bfloat16" and "residual" not in describe(wide)


@pytest.mark.quick_cases("adamw")
@pytest.mark.parametrize("optimizer", [rules.adamw, rules.adafactor])
@standard_promotion()  # optax's own arithmetic
def test_an_update_of_stacked_layers_equals_one_optimizer_per_layer(optimizer):
    specs = {
        "layers": {
            "w": param_spec.ParamSpec((3, 130, 140), ("layers", "width", "mlp"), param_spec.full(0.0))
        },
        "norms": param_spec.ParamSpec((3, 130), ("layers", "norm"), param_spec.full(0.0)),
    }
    settings = Optim(
        optimizer=optimizer, clip=None, weight_decay=0.01, schedule=schedules.constant_schedule, warmup=0.0
    )
    random = lambda s: param_spec.ParamSpec(s.shape, s.axes, param_spec.normal(1.0))  # noqa: E731
    stacked = param_spec.init_params(
        jax.tree.map(random, specs, is_leaf=param_spec.is_spec), jax.random.key(1)
    )
    scales = jnp.array([1.0, 100.0, 0.01], jnp.float32)  # layers whose gradients differ in size
    grads = [
        jax.tree.map(lambda p, k=k: jnp.sin(p + k) * scales.reshape(3, *[1] * (p.ndim - 1)), stacked)
        for k in range(3)
    ]

    def run(optimizer, update, start, grads):
        state = optimizer.init(start)
        for g in grads:
            start, state = update(g, state, start, StepInfo(optax.tree.norm(g), jnp.array(True)))
        return start

    def compiled(specs):
        optimizer = make_optimizer(settings, specs, 10)
        return optimizer, jax.jit(optimizer.update)

    whole = run(*compiled(specs), stacked, grads)
    single = jax.tree.map(
        lambda s: param_spec.ParamSpec(s.shape[1:], s.axes[1:], s.init), specs, is_leaf=param_spec.is_spec
    )
    of_a_layer = compiled(single)
    for i in range(3):
        layer = lambda t, i=i: jax.tree.map(lambda x: x[i], t)  # noqa: E731
        assert_close(layer(whole), run(*of_a_layer, layer(stacked), [layer(g) for g in grads]), 1e-6)


def update_case(optimizer, clip):
    specs = plain_model().specs
    start = param_spec.init_params(specs, jax.random.key(0))
    grads = jax.tree.map(lambda p: jnp.cos(50 * p).astype(p.dtype), start)
    settings = Optim(optimizer=optimizer, clip=clip, weight_decay=0.1, warmup=0.0)
    return make_optimizer(settings, specs, 10), grads, start


@pytest.mark.quick_cases("adafactor-0.3", "adamw-None", "adamw-1000000000.0")
@pytest.mark.parametrize(
    "optimizer, clip", [(rules.adamw, 0.3), (rules.adamw, 1e9), (rules.adamw, None), (rules.adafactor, 0.3)]
)
@standard_promotion()  # optax's own arithmetic
def test_an_update_equals_that_of_optax_or_is_skipped_entirely(optimizer, clip):
    made, grads, start = update_case(optimizer, clip)
    plain = [optax.clip_by_global_norm(clip)] if clip else []
    rule = optimizer(made.schedule, plain_model().specs, 0.1).transform
    reference = optax.chain(*plain, rule)
    norm, step, reference_update = optax.tree.norm(grads), jax.jit(made.update), jax.jit(reference.update)
    params, state, expected, expected_state = start, made.init(start), start, reference.init(start)
    for _ in range(3):
        params, state = step(grads, state, params, StepInfo(norm, jnp.array(True)))
        with update.standard_promotion():
            updates, expected_state = reference_update(grads, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_close(params, expected, 1e-6)
    skipped = step(grads, state, params, StepInfo(norm, jnp.array(False)))
    jax.tree.map(np.testing.assert_array_equal, skipped, (params, state))


@pytest.mark.quick_cases("adamw_8bit")
@pytest.mark.parametrize("optimizer", [rules.adamw, rules.adafactor, adamw_8bit])
def test_a_layerwise_update_equals_one_of_all_leaves_at_once(optimizer, monkeypatch):
    monkeypatch.setattr(layerwise_module, "LARGE", 1000)  # embedding and head: in pieces
    monkeypatch.setattr(layerwise_module, "PIECE", 300)
    specs = plain_model().specs
    start = param_spec.init_params(specs, jax.random.key(0))
    gradients = [jax.tree.map(lambda p, k=k: jnp.cos((50 + k) * p).astype(p.dtype), start) for k in range(3)]
    found = []
    for layerwise in (False, True):
        settings = Optim(
            optimizer=optimizer,
            clip=0.3,
            weight_decay=0.1,
            warmup=0.0,
            layerwise=layerwise,
            lr_groups=((".*/q", 2.0),),
        )
        made = make_optimizer(settings, specs, 10)
        step, params, state = jax.jit(made.update), start, made.init(start)
        for g in gradients:
            params, state = step(g, state, params, StepInfo(optax.tree.norm(g), jnp.array(True)))
        skipped = step(g, state, params, StepInfo(optax.tree.norm(g), jnp.array(False)))
        jax.tree.map(np.testing.assert_array_equal, skipped, (params, state))
        found.append(params)
    assert_close(found[1], found[0], 1e-5)
    assert len(jax.eval_shape(made.init, start).large) == (
        0 if optimizer is rules.adafactor else 1 + ("head" in start)
    )


def test_bfloat16_parameters_are_rounded_stochastically():
    """An update of 0.1 % of a parameter is below half its spacing; rounded to nearest it would be lost."""
    specs = {"w": param_spec.ParamSpec((64, 512), ("width", "mlp"), param_spec.full(1.0))}
    start = param_spec.init_params(specs, jax.random.key(0), jnp.bfloat16)
    settings = Optim(lr=1e-3, clip=None, warmup=0.0, schedule=schedules.constant_schedule)
    optimizer = make_optimizer(settings, specs, 10)
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(optimizer.init(start)))
    g = {"w": jnp.ones((64, 512), jnp.bfloat16)}
    step, info = jax.jit(optimizer.update), StepInfo(jnp.float32(1), jnp.array(True))
    params, state = start, optimizer.init(start)
    for i in range(20):
        params, state = step(g, state, params, info._replace(key=jax.random.key(i)))
    assert params["w"].dtype == jnp.bfloat16
    assert float(params["w"].astype(jnp.float32).mean()) == pytest.approx(1 - 20e-3, abs=1e-3)
    with pytest.raises(ValueError, match="which needs a random key; pass it in StepInfo.key"):
        optimizer.update(g, state, params, info)


def test_a_step_copies_neither_parameters_nor_moments():
    model, whole = tiny(jnp.float32)
    optimizer = make_optimizer(Optim(), model.specs, 10)
    state, nothing = state_of(whole, optimizer), jax.tree.map(lambda _: None, whole)
    step = jax.jit(make_train_step(sft(model), optimizer, 0), donate_argnums=0)
    text = step.lower(state, nothing, micro(one_by_one(examples(4)), 1)).compile().as_text()
    copies = re.findall(r"= (\S+)\[.+?\]\S* copy\(\S*%?state_(?:opt_state|trainable)", text)
    assert "state_opt_state" in text and "f32" not in copies


def test_weight_decay_applies_to_matrices_only():
    mask = tree.paths(rules.decay_mask(plain_model().specs))
    assert {p for p, m in mask.items() if not m} == {"layers/attn_norm", "layers/mlp_norm", "final_norm"}


def test_lr_groups_scale_the_updates_of_the_leaves_they_name():
    specs = lora_specs()
    trainable = jax.tree.map(lambda s: jnp.zeros(s.shape), specs, is_leaf=param_spec.is_spec)
    grads = jax.tree.map(jnp.ones_like, trainable)

    def updates(groups):
        optimizer = make_optimizer(Optim(lr_groups=groups, warmup=0.0), specs, 10)
        info = StepInfo(optax.tree.norm(grads), jnp.array(True))
        new, _ = optimizer.update(grads, optimizer.init(trainable), trainable, info)
        return tree.paths(new)  # from 0

    plain, plus = updates(()), updates((("adapter/.*/b", 16.0),))
    for path in plain:
        np.testing.assert_allclose(
            plus[path], plain[path] * (16.0 if path.endswith("/b") else 1.0), rtol=1e-6
        )
    with pytest.raises(ValueError, match="matches none"):
        updates((("nothing", 2.0),))


def test_a_compiled_step_transfers_nothing_between_host_and_device():
    state, _, frozen, step = adamw_run()
    args = jax.device_put((state, frozen, micro(one_by_one(examples(4)), 2)))
    compiled = step.lower(*args).compile()
    with jax.transfer_guard("disallow"):
        state, _ = compiled(*args)
    assert int(state.step) == 1
    with pytest.raises(Exception, match="Disallowed host-to-device"), jax.transfer_guard("disallow"):
        compiled(args[0].replace(step=np.int32(0)), *args[1:])  # a host value raises


def test_a_step_is_traced_once_for_any_number_of_steps():
    state, _, frozen, step = adamw_run()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step.__wrapped__, n=1))
    for _ in range(3):
        state, _ = step(state, frozen, micro(one_by_one(examples(4)), 2))
    assert int(state.step) == 3
    with pytest.raises(AssertionError, match="traced > 1 times"):
        step(state, frozen, micro(one_by_one(examples(8)), 2))  # another shape is another trace
