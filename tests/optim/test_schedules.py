"""Schedules that stay and fall, and that restart: their laws, and transformers' own on the same steps."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup, get_wsd_schedule

from jaxft.nn.param_spec import ParamSpec, full
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.schedules import cosine_schedule, cosine_with_restarts_schedule, wsd_schedule

SPECS = {"w": ParamSpec((2, 2), ("width", "mlp"), full(0.0))}


def rates(schedule, warmup, steps, lr=0.5, end=0.0):
    made = schedule(lr, end, warmup, steps)
    return np.array([float(made(k)) for k in range(steps)])


def of_transformers(make, steps, **settings):
    """The rates of steps 1 .. steps of a scheduler of torch, whose step 0 has the rate 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler, found = make(optimizer, **settings), []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return np.array(found)


def test_wsd_is_that_of_transformers():
    """Ours has its full rate at the last step of the warm-up and the lowest at the last step of all: those
    are transformers' steps 1 to 20.
    """
    theirs = of_transformers(
        get_wsd_schedule, 20, num_warmup_steps=4, num_stable_steps=11, num_decay_steps=5,
        min_lr_ratio=0.2, decay_type="linear",
    )  # fmt: skip
    ours = rates(partial(wsd_schedule, decay=0.25), 4, 20, end=0.2)
    np.testing.assert_allclose(ours[3:], theirs[3:], rtol=1e-6)  # its warm-up rises from end, not from 0
    np.testing.assert_allclose(ours[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-6)


def test_restarts_are_those_of_transformers_up_to_the_lowest_rate():
    """A cycle of transformers ends a step before the rate 0, ours at it: one curve, on n and n + 1 steps."""
    theirs = of_transformers(
        get_cosine_with_hard_restarts_schedule_with_warmup, 11, num_warmup_steps=2,
        num_training_steps=14, num_cycles=4,
    )  # fmt: skip
    ours = rates(partial(cosine_with_restarts_schedule, cycles=3), 2, 13)
    for cycle in range(3):  # of 4 steps from the last of the warm-up on
        falling = 0.5 * 0.5 * (1 + np.cos(np.pi * np.arange(4) / 3))
        np.testing.assert_allclose(ours[1 + 4 * cycle :][:4], falling, atol=1e-7)
        np.testing.assert_allclose(theirs[1 + 3 * cycle :][:3], ours[1 + 4 * cycle :][:3], atol=1e-7)


@pytest.mark.parametrize("warmup, steps", [(0, 7), (1, 7), (3, 10), (10, 10), (0, 1), (5, 6)])
@pytest.mark.parametrize("schedule", [wsd_schedule, partial(cosine_with_restarts_schedule, cycles=1)])
def test_the_ends_are_those_of_the_other_schedules(schedule, warmup, steps):
    found, cosine = rates(schedule, warmup, steps, end=0.1), rates(cosine_schedule, warmup, steps, end=0.1)
    peak = max(warmup - 1, 0)
    np.testing.assert_allclose(found[: peak + 1], cosine[: peak + 1], rtol=1e-6)
    assert found.min() > 0 and found[-1] == pytest.approx(cosine[-1])
    if schedule is not wsd_schedule:
        np.testing.assert_allclose(found, cosine, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule, kwargs, words",
    [
        (wsd_schedule, (("decay", 0.0),), "decay:0.0 is a fraction of the steps"),
        (wsd_schedule, (("cycles", 2.0),), "optim.schedule=wsd_schedule does not take .*cycles"),
        (cosine_with_restarts_schedule, (("cycles", 1.5),), "cycles:1.5 is not a whole number"),
        (cosine_with_restarts_schedule, (("cycles", 20.0),), "cycles:20.0: every cycle needs a step"),
        (cosine_schedule, (("decay", 0.5),), "use constant, linear, cosine, wsd, cosine_with_restarts"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(schedule, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make_optimizer(Optim(schedule=schedule, schedule_kwargs=kwargs), SPECS, 10)
