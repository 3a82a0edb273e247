"""The compiled programs of a sweep, its batches, and the numbers that each member logs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.batch import TrainState, widened
from jaxft.distributed import devices, sharding
from jaxft.objectives import metrics
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.log import Log
from jaxft.train import evaluate
from jaxft.train.loop import Job
from jaxft.train.meter import Meter
from jaxft.train.multi_adapter import Together, gradients, judge_each, make_eval_step, make_update, together


@dataclass(frozen=True)
class Shared:
    """What the members of a sweep have in common. jobs: a member each, in the order of the labels."""

    name: str
    folder: Path
    labels: tuple[str, ...]
    jobs: tuple[Job, ...]
    apart: bool  # each learns from batches of its own
    at_once: int
    saved: Checkpoints
    log: Log

    @property
    def lead(self) -> Job:
        """The member whose held-out rows, general text and tokenizer serve for all."""
        return self.jobs[0]


@dataclass(frozen=True)
class Programs:
    """Compiled for the one shape of each. step(states, frozen, batch); measure(states) -> numbers of each member."""

    step: Callable
    measure: Callable[[Any], list[dict[str, float]]]
    general: Callable[[Any], list[dict[str, float]]]


def make_step(t: Together, jobs: Sequence[Job]) -> Callable:
    """`(states, frozen, batch) -> (states, metrics [K])`: every member's own step."""
    updates = [make_update(job.programs.objective, job.programs.optimizer) for job in jobs]

    def step(
        states: tuple[TrainState, ...], frozen: Any, batch: Any
    ) -> tuple[tuple[TrainState, ...], dict[str, Any]]:
        grads, found = gradients(t, [s.trainable for s in states], frozen, batch, [s.aux for s in states])
        done = [update(s, k, grads, found) for k, (update, s) in enumerate(zip(updates, states, strict=True))]
        told = jax.tree.map(lambda *x: jnp.stack(x), *[more for _, more in done])
        return tuple(state for state, _ in done), {**found, **told}

    return step


def compile_all(s: Shared, states: Any, frozen: Any, batch: Any) -> Programs:
    p, everywhere = s.lead.programs, sharding.replicated(s.lead.programs.mesh)
    objectives = [job.programs.objective for job in s.jobs]
    t = together(objectives, s.apart, s.at_once)
    places = jax.tree.map(lambda x: x.sharding, states)
    step = jax.jit(make_step(t, s.jobs), donate_argnums=0, out_shardings=(places, everywhere))
    compiled = step.lower(states, frozen, sharding.place_batch(p.mesh, batch)).compile()
    measure = compile_eval(t, s, frozen, s.lead.source.held_out)
    text = together([o.text or o for o in objectives], at_once=s.at_once)
    general = compile_eval(text, s, frozen, s.lead.general)
    devices.trim_heap()
    return Programs(compiled, measure, general)


def compile_eval(
    t: Together, s: Shared, frozen: Any, batches: tuple[Any, ...]
) -> Callable[[Any], list[dict[str, float]]]:
    """`numbers(states)` of held-out batches, a dict a member."""
    count = len(s.jobs)
    if not batches:
        return lambda states: [{} for _ in range(count)]
    p, states = s.lead.programs, [job.programs.state for job in s.jobs]
    step = jax.jit(make_eval_step(t), out_shardings=sharding.replicated(p.mesh))
    place = lambda batch: sharding.place_batch(p.mesh, batch)  # noqa: E731
    auxes = [state.aux for state in states]
    see = step.lower([state.trainable for state in states], frozen, place(batches[0]), auxes).compile()

    def on(states, batch):
        return see([x.trainable for x in states], frozen, place(batch), [x.aux for x in states])  # noqa: E731

    def read(total: Any) -> list[dict[str, float]]:
        return [metrics.as_floats(jax.tree.map(lambda x, k=k: x[k], total)) for k in range(count)]

    if not t.coupled:
        return lambda states: read(evaluate.added(partial(on, states), batches))
    shape = jax.eval_shape(step, [x.trainable for x in states], frozen, batches[0], auxes)
    many = lambda x: jax.ShapeDtypeStruct((count, len(batches) * x.shape[1], *x.shape[2:]), x.dtype)  # noqa: E731
    kept = lambda states: [{"loss": x.aux["loss"]} if "loss" in x.aux else {} for x in states]  # noqa: E731
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kept(states))
    judge = jax.jit(partial(judge_each, t)).lower(jax.tree.map(many, shape), bare).compile()

    def judged(states: Any) -> list[dict[str, float]]:
        seen = [jax.device_get(on(states, batch)) for batch in batches]
        whole = jax.tree.map(lambda *x: np.concatenate(x, 1), *seen)
        return read(jax.device_get(judge(whole, jax.device_get(kept(states)))))

    return judged


class Meters:
    """A meter.Meter a member, fed one step behind the device."""

    def __init__(self, s: Shared, kept: list[Any] | None):
        self._jobs = s.jobs
        rates = [
            np.asarray(jax.jit(jax.vmap(job.programs.optimizer.schedule))(jnp.arange(job.steps)))
            for job in s.jobs
        ]
        never = s.lead.steps + 1  # a member that is not finite stays as it is, and the others go on
        self.each = [
            Meter(job.programs.trained, rate, job.source, never, None if kept is None else kept[k])
            for k, (job, rate) in enumerate(zip(s.jobs, rates, strict=True))
        ]
        self._waiting: list[tuple[int, list[Any], Any]] = []

    def add(self, step: int, batches: list[Any], found: Any) -> None:
        """Note a step and take in the one before it."""
        self._waiting.append((step, batches, found))
        self.take(1)

    def take(self, leave: int = 0) -> None:
        """Take in all steps but the newest `leave`."""
        while len(self._waiting) > leave:
            step, batches, found = self._waiting.pop(0)
            host = jax.device_get(found)
            for k, meter in enumerate(self.each):
                meter.add(step, batches[min(k, len(batches) - 1)], jax.tree.map(lambda x, k=k: x[k], host))

    def read(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        """(metrics, perf) of each member. Waits for the device."""
        self.take()
        return [meter.read() for meter in self.each]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out of the next reading the time that is spent inside."""
        self.take()
        with contextlib.ExitStack() as stack:
            for meter in self.each:
                stack.enter_context(meter.aside())
            yield


def batches(s: Shared, sources: list[Any], step: int, shapes: Any) -> tuple[list[Any], Any]:
    """(the batch of each member that has its own, the batch that the step takes)."""
    if not s.apart:
        batch, _ = sources[0].batch(step, None)
        return [batch], batch
    each = [source.batch(step, None)[0] for source in sources]
    return each, jax.tree.map(lambda *x: np.concatenate(x), *[widened(batch, shapes) for batch in each])


def largest(sources: list[Any]) -> Any:
    """Shapes that hold every member's batches."""
    shapes = [source.shapes[-1] for source in sources]
    return jax.tree.map(
        lambda *x: jax.ShapeDtypeStruct(tuple(map(max, zip(*(s.shape for s in x)))), x[0].dtype), *shapes
    )
