"""The Optimizer type: hyper-parameters of functions and partials, invalid ones, and a run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import Place, write_place

from jaxft.batch import TrainState
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.objectives.metrics import Sum
from jaxft.objectives.objective import Objective
from jaxft.optim.low_precision import adamw_8bit, adamw_bf16
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.rules import UpdateRule, adafactor, adamw
from jaxft.optim.schedules import constant_schedule, cosine_schedule, linear_schedule
from jaxft.optim.update import StepInfo
from jaxft.train.step import make_train_step

SPECS = {"w": ParamSpec((4, 6), ("width", "mlp"), full(0.0))}


def momentum(schedule, specs, weight_decay, *, decay=0.9, nesterov=False):
    """A user's optimizer: a plain optax transformation."""
    return optax.sgd(schedule, decay, nesterov)


def after(settings, steps=3):
    """Parameters after some steps of gradients that change."""
    optimizer = make_optimizer(settings, SPECS, 10)
    params = {"w": jnp.zeros((4, 6))}
    state, info = optimizer.init(params), StepInfo(jnp.float32(1), jnp.array(True))
    for i in range(steps):
        grads = {"w": jnp.sin(jnp.arange(24.0).reshape(4, 6) + i)}
        params, state = optimizer.update(grads, state, params, info)
    return np.asarray(params["w"])


@pytest.mark.parametrize("optimizer", [adamw, adamw_8bit, adamw_bf16])
def test_hyper_parameters_are_set_by_optim_or_bound_to_the_function(optimizer):
    settings = Optim(optimizer=optimizer, b1=0.5, eps=1e-3)
    bound = Optim(optimizer=partial(optimizer, b1=0.5, eps=1e-3))
    np.testing.assert_array_equal(after(settings), after(bound))
    assert np.abs(after(bound) - after(Optim(optimizer=optimizer))).max() > 1e-6


def test_settings_win_over_what_is_bound():
    assert make_optimizer(Optim(optimizer=partial(adamw, b1=0.5)), SPECS, 10).name == "adamw"
    np.testing.assert_array_equal(
        after(Optim(optimizer=partial(adamw, b1=0.5), b1=0.9)), after(Optim(optimizer=adamw))
    )


def test_a_plain_optax_transformation_is_an_optimizer_with_its_own_hyper_parameters():
    plain = after(Optim(optimizer=momentum, warmup=0.0, clip=None))
    nesterov = after(Optim(optimizer=partial(momentum, nesterov=True), warmup=0.0, clip=None))
    assert np.abs(plain).max() > 0 and np.abs(plain - nesterov).max() > 0
    assert make_optimizer(Optim(optimizer=partial(momentum, nesterov=True)), SPECS, 10).name == "momentum"


def test_the_neutral_parts_of_an_optimizer_update_everything_as_the_rest():
    optimizer = make_optimizer(Optim(), SPECS, 10)
    params = {"w": jnp.ones((4, 6))}
    layers, rest = optimizer.parts.split(params)
    assert not (optimizer.layerwise or optimizer.fused_backward) and jax.tree.leaves(layers) == []
    assert rest is params and optimizer.parts.update_rest is optimizer.update


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"optimizer": adafactor, "b1": 0.8},
            "optim.optimizer=adafactor can't be called .*leave out optim.b1=0.8",
        ),
        ({"optimizer": partial(adamw, nesterov=True)}, "optim.optimizer=adamw can't be called .*nesterov"),
        ({"optimizer": lambda specs: None}, "can't be called as \\(schedule, specs, weight_decay\\)"),
        ({"b1": 0.5, "optimizer_kwargs": (("b1", 0.6),)}, "optim.b1 and optim.optimizer_kwargs both set b1"),
        ({"b1": 1.0}, "optim.b1=1.0; expected at least 0 and below 1, or none"),
        ({"b2": -0.1}, "optim.b2=-0.1; expected at least 0"),
        ({"eps": 0.0}, "optim.eps=0.0; expected above 1e-37"),
        ({"warmup": 2.5}, "optim.warmup=2.5: use a fraction of the steps"),
    ],
)
def test_hyper_parameters_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Optim(**settings)


def test_what_a_function_returns_is_checked():
    with pytest.raises(ValueError, match="wrong returned a tuple, expected an optax.GradientTransformation"):
        make_optimizer(Optim(optimizer=wrong), SPECS, 10)
    rule = "an UpdateRule whose transform is a NoneType, expected an optax.GradientTransformation as its"
    with pytest.raises(ValueError, match=rule):
        make_optimizer(Optim(optimizer=wrong_rule), SPECS, 10)
    with pytest.raises(ValueError, match="optim.b2=2.0 is out of range"):
        make_optimizer(Optim(optimizer=partial(adamw, b2=2.0)), SPECS, 10)
    with pytest.raises(ValueError, match="optim.schedule=wrong does not take"):
        make_optimizer(Optim(schedule=wrong), SPECS, 10)


def wrong_rule(schedule, specs, weight_decay):
    return UpdateRule(None)


def wrong(schedule, specs, weight_decay):
    return (1, 2)


def test_a_rule_is_updated_by_rows_only_if_it_declares_rowwise(monkeypatch):
    monkeypatch.setattr("jaxft.optim.layerwise.LARGE", 8)

    def by_rows(rule):
        made = make_optimizer(Optim(optimizer=rule, layerwise=True), SPECS, 10)
        return len(jax.eval_shape(made.init, {"w": jnp.zeros((4, 6))}).large)

    assert by_rows(adamw) == by_rows(partial(adamw, b1=0.8)) == 1
    assert by_rows(momentum) == by_rows(adafactor) == 0
    assert by_rows(lambda *args: UpdateRule(momentum(*args), rowwise=True)) == 1


@pytest.mark.slow
def test_a_run_with_a_partial_ends_with_its_model_card(tmp_path):
    write_place(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from functools import partial\nfrom jaxft.optim.rules import adamw\nslow = partial(adamw, b1=0.8)\n"
    )
    place = Place(tmp_path)
    assert place.run("optim.optimizer=mine.py:slow", "samples=0", "name=partial") == 0, place.err()
    assert "parameters trained, adamw with lr" in (place.runs("partial") / "README.md").read_text()


@pytest.mark.parametrize("schedule", [constant_schedule, linear_schedule, cosine_schedule])
@pytest.mark.parametrize("warmup, steps", [(0, 7), (1, 7), (3, 10), (10, 10), (0, 1)])
def test_no_step_has_rate_0_and_the_end_is_the_last_step(schedule, warmup, steps):
    rates = [float(schedule(0.5, 0.1, warmup, steps)(k)) for k in range(steps)]
    rising = [0.5 * (k + 1) / warmup for k in range(warmup)]
    np.testing.assert_allclose(rates[:warmup], rising, rtol=1e-6)
    peak = max(warmup - 1, 0)
    assert rates[peak] == pytest.approx(0.5) and min(rates) > 0
    if peak < steps - 1:
        assert rates[-1] == pytest.approx(0.5 if schedule is constant_schedule else 0.05)
        assert all(after <= before for before, after in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_the_logged_rate_is_that_of_the_update():
    """SGD on a gradient of 1 moves a weight by the rate. A skipped step is no update: the schedule waits."""
    settings = Optim(lr=0.5, optimizer=partial(momentum, decay=None), warmup=0.3, clip=None)
    optimizer = make_optimizer(settings, SPECS, 10)

    def loss(outputs, aux):
        one = jnp.ones(())
        return outputs, {"loss": Sum(outputs, one)}

    objective = Objective(lambda params, batch, key, aux: jnp.sum(params["w"] * batch["x"]), loss)
    params = {"w": jnp.zeros(SPECS["w"].shape)}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, jnp.zeros(2, jnp.int32))
    step, rates = jax.jit(make_train_step(objective, optimizer, 0)), []
    for number in range(6):
        bad = number in (1, 4)
        batch = {"x": jnp.full(1, jnp.nan if bad else 1.0)}
        new, found = step(state, {"w": None}, batch)
        moved, rate = float((state.trainable["w"] - new.trainable["w"]).max()), found["learning_rate"].total
        assert moved == (0 if bad else pytest.approx(float(rate), rel=1e-5))
        rates += [] if bad else [float(rate)]
        state = new
    np.testing.assert_allclose(rates, [float(optimizer.schedule(k)) for k in range(4)], rtol=1e-6)


STACKED = {
    "w": ParamSpec((3, 4, 6), ("layers", "width", "mlp"), full(0.0)),
    "norm": ParamSpec((3, 4), ("layers", "width"), full(0.0)),
}


def first_step(settings, params):
    """(parameters after one step with gradients that differ from layer to layer, its learning rate)."""
    made = make_optimizer(settings, STACKED, 10)
    grads = jax.tree.map(lambda x: jnp.sin(jnp.arange(1.0, 1 + x.size)).reshape(x.shape) * 0.1, params)
    info = StepInfo(jnp.float32(1), jnp.array(True))
    return made.update(grads, made.init(params), params, info)[0], float(made.schedule(0)), grads


@pytest.mark.parametrize("layerwise", [False, True])
def test_lion_of_optax_moves_by_the_sign_of_the_gradient_and_decays_matrices_only(layerwise):
    """Chen et al. 2023, algorithm 2: with a momentum of 0 the first update is lr (sign(g) + wd w)."""
    plain = {"lr": 0.1, "clip": None, "warmup": 0.0, "layerwise": layerwise}
    settings = Optim(optimizer=optax.lion, weight_decay=0.5, **plain)
    params = {"w": jnp.full((3, 4, 6), 2.0), "norm": jnp.full((3, 4), 2.0)}
    after, lr, grads = first_step(settings, params)
    assert lr > 0
    np.testing.assert_allclose(after["w"], 2.0 - lr * (np.sign(grads["w"]) + 0.5 * 2.0), rtol=1e-6)
    np.testing.assert_allclose(after["norm"], 2.0 - lr * np.sign(grads["norm"]), rtol=1e-6)
    assert make_optimizer(settings, STACKED, 10).name == "lion"


def test_an_optimizer_of_optax_treats_each_layer_as_a_parameter_of_its_own():
    """LAMB scales a parameter's update by the norm of the parameter, so layers must not share it."""
    sizes = jnp.array([1.0, 10.0, 100.0])[:, None, None]
    params = {"w": jnp.ones((3, 4, 6)) * sizes, "norm": jnp.ones((3, 4))}
    settings = Optim(lr=0.1, optimizer=optax.lamb, clip=None, warmup=0.0)
    after, lr, _ = first_step(settings, params)
    moved = np.linalg.norm(np.asarray(after["w"] - params["w"]).reshape(3, -1), axis=1)
    np.testing.assert_allclose(moved, lr * np.sqrt(24.0) * np.array([1.0, 10.0, 100.0]), rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer, settings, words",
    [
        (optax.lbfgs, {}, "optim.optimizer=lbfgs cannot update these parameters from their gradients alone"),
        (optax.scale_by_lion, {}, "optim.optimizer=scale_by_lion cannot update these parameters"),
        (optax.sgd, {"weight_decay": 0.1}, "optim.optimizer=sgd has no `mask` .*optim.weight_decay=0"),
        (optax.lion, {"eps": 1e-6}, "optim.optimizer=lion can't be called .*leave out optim.eps=1e-06"),
        (optax.cosine_decay_schedule, {}, "optim.optimizer=cosine_decay_schedule "),
    ],
)
def test_what_optax_has_and_cannot_be_used_is_one_line(optimizer, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_optimizer(Optim(optimizer=optimizer, **settings), STACKED, 10)
    assert "\n" not in str(caught.value)
