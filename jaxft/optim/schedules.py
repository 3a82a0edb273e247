"""Learning-rate schedules: functions `(lr, end, warmup, steps, **options) -> optax.Schedule`.

lr: the peak learning rate. end: the last learning rate as a fraction of lr. warmup: number of steps with a
rising rate. steps: number of steps of the run. `optim.schedule` names a schedule, and `optim.schedule_kwargs`
sets its options.
"""

from typing import Any

import numpy as np
import optax
from jaxtyping import Array

from jaxft.optim.update import standard_promotion


def constant_schedule(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to lr, then constant; `end` is ignored."""
    return _after_warmup(lr, warmup, optax.constant_schedule(lr))


def linear_schedule(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to lr, then linear decay to `end * lr` at the last step.

    >>> rate = linear_schedule(lr=1.0, end=0.0, warmup=2, steps=6)
    >>> [round(float(rate(step)), 2) for step in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _after_warmup(lr, warmup, optax.linear_schedule(lr, end * lr, _steps_after_peak(warmup, steps)))


def cosine_schedule(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to lr, then cosine decay to `end * lr` at the last step."""
    down = optax.cosine_decay_schedule(lr, _steps_after_peak(warmup, steps), alpha=end)
    return _after_warmup(lr, warmup, down)


def wsd_schedule(lr: float, end: float, warmup: int, steps: int, *, decay: float = 0.2) -> optax.Schedule:
    """Warmup-stable-decay (Hu et al. 2024, arXiv:2404.06395): linear warm-up to lr, constant, then linear
    decay to `end * lr` at the last step.

    decay: fraction of the steps with a falling rate, above 0 and at most 1.

    >>> rate = wsd_schedule(lr=1.0, end=0.0, warmup=1, steps=6, decay=0.5)
    >>> [round(float(rate(step)), 2) for step in range(6)]
    [1.0, 1.0, 1.0, 0.67, 0.33, 0.0]
    """
    if not 0 < decay <= 1:
        raise ValueError(
            f"optim.schedule_kwargs=decay:{decay} is a fraction of the steps; use one above 0 and at most 1"
        )
    after_peak = _steps_after_peak(warmup, steps)
    falling = min(after_peak, max(1, round(decay * steps)))
    down = optax.linear_schedule(lr, end * lr, falling, transition_begin=after_peak - falling)
    return _after_warmup(lr, warmup, down)


def cosine_with_restarts_schedule(
    lr: float, end: float, warmup: int, steps: int, *, cycles: float = 4
) -> optax.Schedule:
    """Linear warm-up to lr, then `cycles` cosine decays of equal length, each from lr to `end * lr` (SGDR,
    Loshchilov & Hutter 2017, arXiv:1608.03983). With cycles=1 it equals cosine_schedule.
    """
    if cycles < 1 or cycles != int(cycles):
        raise ValueError(
            f"optim.schedule_kwargs=cycles:{cycles} is not a whole number of at least 1; use one such as 3"
        )
    starts = np.round(np.linspace(0, _steps_after_peak(warmup, steps) + 1, int(cycles) + 1)).astype(int)
    lengths = np.diff(starts)
    if lengths.min() < 1:
        raise ValueError(
            f"optim.schedule_kwargs=cycles:{cycles}: every cycle needs a step, and the run has {steps} steps "
            f"with {warmup} of warm-up; use fewer cycles"
        )
    decays = [optax.cosine_decay_schedule(lr, max(1, int(n) - 1), alpha=end) for n in lengths]
    return _after_warmup(lr, warmup, optax.join_schedules(decays, starts[1:-1].tolist()))


def promoting(schedule: optax.Schedule) -> optax.Schedule:
    """Wrap a schedule to run with standard dtype promotion, even if JAX is set to strict promotion."""

    def learning_rate(step: Any) -> Array:
        with standard_promotion():
            return schedule(step)

    return learning_rate


def _after_warmup(lr: float, warmup: int, then: optax.Schedule) -> optax.Schedule:
    """Return a schedule of `lr * (k + 1) / warmup` at steps k = 0 .. warmup - 1, so that no step has rate 0.

    Its step warmup - 1 is step 0 of the schedule `then`, which starts at lr.
    """
    if warmup < 2:
        return then
    rising = optax.linear_schedule(lr / warmup, lr, warmup - 1)
    return optax.join_schedules([rising, then], [warmup - 1])


def _steps_after_peak(warmup: int, steps: int) -> int:
    """Return how many steps of the run follow the first step at the full rate; at least 1."""
    return max(1, steps - max(1, warmup))
