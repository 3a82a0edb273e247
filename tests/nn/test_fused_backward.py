"""Updates inside the backward pass equal updates after it, without storing the gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpo_place import write_pair_place
from prepared import prepare
from tiny_model import CONFIG, assert_close, examples, micro, one_by_one, tiny
from tiny_run import Place, write_place

from jaxft.batch import TrainState
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import param_spec
from jaxft.nn.stack import float_bits, from_float_bits
from jaxft.objectives import metrics
from jaxft.objectives.objective import Objective
from jaxft.objectives.sft import sft
from jaxft.optim import rules
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.rules import muon
from jaxft.optim.schedules import constant_schedule
from jaxft.train import trainable_params
from jaxft.train.step import make_train_step


def batch(count=4, parts=1):
    return micro(one_by_one(examples(count)), parts)


def case(
    optimizer=rules.adamw,
    pattern=None,
    dtype=jnp.float32,
    held=None,
    tied=False,
    objective=sft,
    groups=((".*/q", 2.0),),
    **more,
):
    """step(fused) -> (compiled step, initial state, frozen parameters) of a tiny model trained in full."""
    model, whole = tiny(dtype, tied=tied, remat="full")
    t = trainable_params.partition_params(
        llama(model.config, dtype, remat="full"), None, pattern, None, None, held
    )
    whole = jax.tree.map(lambda x: x if held is None else x.astype(held), whole)
    trainable, frozen = trainable_params.split_params(t, whole)

    def build(fused):
        o = Optim(lr=0.01, optimizer=optimizer, clip=None, weight_decay=0.1, warmup=0.0, layerwise=True,
        fused_backward=fused,
                  lr_groups=groups, **more)  # fmt: skip
        made = make_optimizer(o, t.trainable_specs, 10)
        step = jax.jit(make_train_step(objective(t.model), made, 0), donate_argnums=())
        return (
            step,
            TrainState(jnp.int32(0), trainable, made.init(trainable), {}, jnp.zeros(2, jnp.int32)),
            frozen,
        )

    return build


SOME = "base/(layers/attn|layers/mlp/up|embed)(/.*)?"
CASES = [
    pytest.param(
        getattr(rules, name), pattern, tied,
        id=f"{name}-{'some' if pattern else 'all'}-{'tied' if tied else 'head'}",
    )
    for name in ("adamw", "adafactor")
    for pattern in (None, SOME)
    for tied in (False, True)
]  # fmt: skip


AVERAGED = [
    pytest.param(muon, {"ema": 0.9}, id="muon-ema", marks=pytest.mark.slow),
    pytest.param(rules.schedule_free_adamw, {"schedule": constant_schedule}, id="schedule-free",
                 marks=pytest.mark.slow),
]  # fmt: skip


def three_steps(optimizer, pattern, tied, **settings):
    """Parameters, optimizer state and metrics after three steps: of the layerwise and the fused update."""
    with jax.enable_x64(True):
        build = case(optimizer, pattern, jnp.float64, tied=tied, **settings)
        found = []
        for fused in (False, True):
            step, state, frozen = build(fused)
            reported = []
            for n in range(3):
                state, m = step(state, frozen, batch(4 + n))
                reported.append({name: metrics.as_floats(m)[name] for name in ("loss", "grad_norm")})
            found.append((state.trainable, state.opt_state, reported))
    return found


@pytest.mark.parametrize("optimizer, settings", AVERAGED)
def test_fused_steps_with_an_average_equal_layerwise_updates(optimizer, settings):
    layerwise, fused = three_steps(optimizer, None, False, **settings)
    assert_close(fused, layerwise, 1e-10)


@pytest.mark.quick_cases("adafactor-some-tied")
@pytest.mark.parametrize("optimizer, pattern, tied", CASES)
def test_three_fused_steps_equal_layerwise_updates(optimizer, pattern, tied):
    layerwise, fused = three_steps(optimizer, pattern, tied)
    assert_close(fused, layerwise, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [adamw_8bit, adamw_bf16])
def test_integer_optimizer_state_passes_through_as_floats(optimizer, monkeypatch):
    monkeypatch.setattr("jaxft.optim.low_precision.SMALL", 64)
    build, found = case(optimizer), []
    for fused in (False, True):
        step, state, frozen = build(fused)
        for n in range(2):
            state, _ = step(state, frozen, batch(4 + n))
        found.append(state)
    assert jax.tree.map(lambda x: x.dtype, found[0]) == jax.tree.map(lambda x: x.dtype, found[1])
    assert_close(found[1].trainable, found[0].trainable, 2e-3)  # a code may be its neighbour


def test_float_bits_preserve_every_bit():
    for dtype in (np.uint8, np.int8, np.uint16, np.int32, np.uint32):
        x = np.frombuffer(np.random.default_rng(0).bytes(1 << 16), dtype)
        worn = jax.jit(lambda x: jax.lax.scan(lambda c, x: (c, x), 0, float_bits(x))[1])(x)
        assert jnp.issubdtype(worn.dtype, jnp.floating)
        np.testing.assert_array_equal(jax.jit(partial(from_float_bits, like=x))(worn), x)
    assert float_bits(jnp.ones(3)).dtype == jnp.float32


def test_bfloat16_parameters_are_rounded_as_by_layerwise_updates():
    build, found = case(rules.adafactor, SOME, held=jnp.bfloat16), []
    for fused in (False, True):
        step, state, frozen = build(fused)
        found.append(step(state, frozen, batch())[0].trainable)
    assert_same = [
        np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, found), strict=True)
    ]
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)} and min(assert_same) > 0.98


def test_a_loss_that_is_not_finite_changes_nothing():
    step, state, frozen = case()(True)
    good = batch()
    bad = good.replace(token_weights=good.token_weights.at[0, 0, 0].set(jnp.inf))
    after, found = step(state, frozen, bad)
    assert metrics.as_floats(found)["skipped"] == 1 and after.bad.tolist() == [1, 1]

    def assert_same(a, b):
        return np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(assert_same, (state.trainable, state.opt_state), (after.trainable, after.opt_state))


def test_a_layer_whose_gradient_overflows_is_unchanged():
    """The weights of the middle layer are so large that its gradients have no finite norm; the one above is
    updated before.
    """
    step, state, frozen = case()(True)
    weights = state.trainable["base"]["layers"]["attn"]
    weights["v"] = weights["v"].at[1].multiply(1e-30)  # its output vanishes, its gradient doesn't
    weights["o"] = weights["o"].at[1].multiply(1e30)
    after, found = step(state, frozen, batch())
    assert metrics.as_floats(found)["skipped"] == 1 and np.isfinite(metrics.as_floats(found)["loss"])
    moved = jax.tree.map(
        lambda a, b: [bool((x != y).any()) for x, y in zip(a, b)], state.trainable, after.trainable
    )
    assert moved["base"]["layers"]["mlp"]["up"] == [True, False, True]
    assert not any(moved["base"]["embed"]) and all(
        bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after)
    )


def test_gradients_of_all_layers_never_exist_together():
    config = LlamaConfig(**{**CONFIG.__dict__, "layers": 24, "width": 64, "mlp": 256})
    t = trainable_params.partition_params(llama(config, jnp.float32, remat="full"), None, None)
    whole = jax.eval_shape(lambda: param_spec.init_params(t.specs, jax.random.key(0)))
    layers, taken = param_spec.count_params(t.specs["base"]["layers"]) * 4, {}
    for fused in (False, True):
        o = Optim(optimizer=rules.adafactor, clip=None, layerwise=True, fused_backward=fused)
        optimizer = make_optimizer(o, t.trainable_specs, 10)

        def shape(shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        state = TrainState(shape(()), whole, jax.eval_shape(optimizer.init, whole), {}, shape((2,)))
        step = jax.jit(make_train_step(sft(t.model), optimizer, 0), donate_argnums=0)
        memory = step.lower(state, jax.tree.map(lambda _: None, whole), batch()).compile().memory_analysis()
        taken[fused] = memory.temp_size_in_bytes
    assert taken[False] - taken[True] > 0.75 * layers, (taken, layers)


def test_incompatible_settings_are_refused():
    with pytest.raises(
        ValueError, match="optim.clip=1.0 needs it; set optim.clip=none, or optim.fused_backward=false"
    ):
        Optim(fused_backward=True)
    step, state, frozen = case()(True)
    with pytest.raises(ValueError, match="a step has 2 microbatches; set data.micro=1"):
        step(state, frozen, batch(4, 2))

    def twice(model):
        one = sft(model)

        def forward(params, batch, key, aux):
            return jax.tree.map(jnp.add, one(params, batch, key, aux), one(params, batch, key, aux))

        return Objective(forward, lambda outputs, aux: outputs)

    step, state, frozen = case(objective=twice)(True)
    with pytest.raises(ValueError, match="runs the model once per step, and this one runs it 2 times;"):
        step(state, frozen, batch())
    step, state, frozen = case(pattern="base/embed", groups=())(True)
    with pytest.raises(ValueError, match="but none of them is trainable"):
        step(state, frozen, batch())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused_backward")
    write_place(folder)
    return Place(folder)


ARGV = ("lr=0.003", "samples=0", "remat=full", "optim.fused_backward=true", "optim.clip=none")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_fused_run_reduces_the_loss(place, devices):
    more = ["mesh.data=2", "mesh.fsdp=4", "batch=8"] if devices > 1 else ["run.params=bfloat16"]
    assert place.run("full=true", *ARGV, *more, f"name=whole-{devices}", devices=devices) == 0, place.err()
    losses = [line["loss"] for line in place.results(f"whole-{devices}", 4)["metrics"] if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(place):
    argv = ["full=true", *ARGV, "run.params=bfloat16", "optim.optimizer=adamw_8bit"]
    assert place.run(*argv, "name=alone") == 0, place.err()
    place.run_with_a_kill(*argv, name="killed")
    alone, killed = place.results("alone", 4), place.results("killed", 4)
    assert alone["metrics"] == killed["metrics"] and alone["leaves"] == killed["leaves"]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["start", "precomputed"])
def test_dpo_equals_layerwise_updates(tmp_path, reference):
    write_pair_place(tmp_path)
    place = Place(tmp_path)
    argv = ("full=true", "remat=full", f"reference={reference}", "optim.clip=none", "lr=0.003")
    losses = []
    for name in ("layerwise", "fused_backward"):
        code = place.run(
            *argv, f"optim.{name}=true", f"name={name}-{reference}", JAXFT_CACHE=str(tmp_path / "cache")
        )
        assert code == 0, place.err()
        losses.append([line["loss"] for line in place.metrics(f"{name}-{reference}") if "loss" in line])
    assert losses[0][0] == pytest.approx(np.log(2), rel=1e-4) and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_an_incompatible_run_is_refused_before_it_loads_weights(place):
    for more, message in (
        ([], "updates layers of the base, but adapter"),
        (["full=true", "micro=2"], "has 2 microbatches"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(place.folder, *ARGV, *more, "name=refused")
