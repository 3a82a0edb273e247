"""Steps whose loss or gradient norm jumps are skipped: which, what they leave alone, and what is logged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.batch import TrainState
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.objectives.metrics import Sum, as_floats
from jaxft.objectives.objective import Objective
from jaxft.optim.optimizer import FreezableState, Optim, freezable, make_optimizer, skip_spikes
from jaxft.train.multi_adapter import stack_metrics
from jaxft.train.step import make_train_step

SPECS = {"base": ParamSpec((4, 6), ("width", "mlp"), full(0.0))}
SIGMA, WINDOW = 5.0, 8


def sgd(schedule, specs, weight_decay):
    return optax.sgd(schedule)


def run(losses, norms, freeze=False):
    """(states, logged metrics) of steps whose loss and gradient norm are given."""
    settings = Optim(lr=0.5, optimizer=sgd, warmup=40, clip=None)
    inner = make_optimizer(settings, SPECS, 40)
    inner = freezable(lambda specs: make_optimizer(settings, specs, 40), SPECS) if freeze else inner
    optimizer = skip_spikes(inner, SIGMA, WINDOW)

    def forward(params, batch, key, aux):
        line = jnp.sum(params["base"]) / np.sqrt(np.float32(params["base"].size)) * batch["norm"][0]
        return line - jax.lax.stop_gradient(line) + batch["loss"][0]

    def loss(outputs, aux):
        return outputs, {"loss": Sum(outputs, jnp.ones(()))}

    objective = Objective(forward, loss, update=lambda aux, params, metrics: {"moved": aux["moved"] + 1})
    params = {"base": jnp.zeros(SPECS["base"].shape)}
    aux = {"moved": jnp.int32(0)}
    states = [TrainState(jnp.int32(0), params, optimizer.init(params), aux, jnp.zeros(2, jnp.int32))]
    step, logged = jax.jit(make_train_step(objective, optimizer, 0)), []
    for value, norm in zip(losses, norms, strict=True):
        batch = {"loss": jnp.full((1, 1), value), "norm": jnp.full((1, 1), norm)}
        state, metrics = step(states[-1], {"base": None}, batch)
        states.append(state)
        logged.append({**as_floats(metrics), "rate": float(metrics["learning_rate"].total)})
    return states, logged


def is_spike(past, now):
    """The rule, by NumPy: at least half a window is known, and `now` is far above its mean."""
    known = past[-WINDOW:]
    return len(known) >= WINDOW // 2 and now > np.mean(known) + SIGMA * np.std(known, ddof=1)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_step_is_skipped_where_loss_or_norm_is_far_above_the_steps_before(freeze):
    rng = np.random.default_rng(0)
    losses, norms = 2 + 0.1 * rng.standard_normal(28), 1 + 0.05 * rng.standard_normal(28)
    losses[2] = 50.0  # too early to be a spike
    losses[14], norms[17] = 9.0, 30.0
    losses[24:] += 4  # a lasting change
    losses[10] = np.nan
    states, logged = run(np.float32(losses), np.float32(norms), freeze)
    past, updates, skipped = ([], []), 0, []
    for i in range(28):
        finite = np.isfinite(losses[i])
        spike = finite and any(is_spike(seen, x[i]) for seen, x in zip(past, (losses, norms), strict=True))
        moved = not np.array_equal(states[i].trainable["base"], states[i + 1].trainable["base"])
        assert moved == (finite and not spike), i
        assert logged[i].get("loss_spikes") == float(spike) and logged[i]["skipped"] == float(not finite)
        assert int(states[i + 1].aux["moved"]) == int(states[i].aux["moved"]) + moved
        if moved:  # the schedule counts updates only
            rate = 0.5 * (updates + 1) / 40
            assert logged[i]["rate"] == pytest.approx(rate, rel=1e-5)
            updates += 1
        skipped += [i] if spike else []
        if finite:
            past[0].append(losses[i])
            past[1].append(norms[i])
    assert skipped == [14, 17, 24]  # the change is part of the mean from the next step on
    inner = states[-1].opt_state.wrapped
    assert not freeze or int(inner.policy_updates) == updates and isinstance(inner, FreezableState)
    assert int(states[-1].opt_state.skipped) == len(skipped) and int(states[-1].bad[0]) == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(skip_spikes=(0.0, 128)), "optim.skip_spikes=0.0,128; expected above 0 as value 1"),
        (dict(skip_spikes=(6.0, 2)), "optim.skip_spikes=6.0,2; expected at least 4 as value 2"),
        (
            dict(skip_spikes=(6.0, 128), fused_backward=True, clip=None),
            "optim.skip_spikes=6.0,128 needs it; set optim.skip_spikes=none, or optim.fused_backward=false",
        ),
    ],
)
def test_what_cannot_be_skipped_is_one_line(settings, words):
    with pytest.raises(ValueError, match=words):
        Optim(**settings)


def test_members_of_a_sweep_need_not_all_skip_spikes():
    one = {"skipped": Sum(jnp.zeros(()), jnp.ones(()))}
    stacked = stack_metrics([one, {**one, "loss_spikes": Sum(jnp.ones(()), jnp.ones(()))}])
    members = [as_floats(jax.tree.map(lambda x, k=k: x[k], stacked)) for k in range(2)]
    assert members == [{"skipped": 0.0}, {"skipped": 0.0, "loss_spikes": 1.0}]
