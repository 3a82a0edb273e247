"""The compiled programs of a sweep: one step, one evaluation for all members."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft.batch import TrainState
from jaxft.distributed import sharding, threads
from jaxft.objectives import metrics
from jaxft.objectives.metrics import FloatMetrics
from jaxft.train.compiled import (
    EVALUATING,
    Compiled,
    HeldOut,
    RowMetrics,
    States,
    compile_averages,
    compile_eval,
    compile_last_loss,
    compile_samples,
)
from jaxft.train.evaluate import evaluate
from jaxft.train.logs.clock import Clock
from jaxft.train.programs import sharded_batch
from jaxft.train.start.jobs import Job
from jaxft.train.sweep.multi_adapter import (
    LOSS_KNOBS,
    MultiAdapter,
    SharedFrozen,
    combine_objectives,
    gradients,
    loss_metrics,
    make_adapters_eval_step,
    make_update,
    own_params,
    stack_metrics,
)
from jaxft.tree import Batch, Metrics, Params


def compile_sweep(job: Job, frozen: tuple[Params, ...], clock: Clock) -> Compiled:
    """Compile the programs of a sweep's members together. clock: shows the progress of evaluation."""
    assert job.sweep is not None
    p, at_once = job.lead.programs, job.sweep.at_once
    objectives = [member.programs.objective for member in job.members]
    adapters = combine_objectives(objectives, len(job.sources) > 1, at_once)
    shared = SharedFrozen(frozen[0]["base"], tuple(own_params(own) for own in frozen))
    states = job.abstract_states
    shardings = jax.tree.map(lambda x: x.sharding, states)
    step = jax.jit(
        make_step(adapters, job), donate_argnums=0, out_shardings=(shardings, sharding.replicated(p.mesh))
    )
    with clock.part("train step"):
        compiled = step.lower(states, shared, sharded_batch(p, job.abstract_batch)).compile()
    of_rows = partial(compile_sweep_metrics, adapters, job, shared)
    with clock.part("evaluation"):
        totals = compile_eval(of_rows, job.held_out, partial(clock.over, EVALUATING))

    def held_out(states: States, with_rows: bool) -> list[HeldOut]:
        return [HeldOut.of(total) for total in totals(states, with_rows)]

    last_loss = compile_last_loss(job.sources[0], of_rows)
    texts = combine_objectives([o.text or o for o in objectives], at_once=at_once)
    text_totals = compile_eval(partial(compile_sweep_metrics, texts, job, shared), job.general)

    def general(states: States) -> list[FloatMetrics]:
        return [metrics.as_floats(total) for total in text_totals(states, False)]

    threads.trim_heap()

    def joint_step(states: States, frozen: tuple[Params, ...], batch: Batch) -> tuple[States, Metrics]:
        return compiled(states, shared, sharding.shard_batch(p.mesh, batch))

    with clock.part("samples"):
        sample = compile_samples(job, frozen, clock)
    return Compiled(joint_step, held_out, general, sample, last_loss, compile_averages(job))


def make_step(adapters: MultiAdapter, job: Job) -> Callable:
    """Return `(states, frozen, batch) -> (states, metrics [K])`, the train step of every member."""
    updates = [make_update(m.programs.objective, m.programs.optimizer, m.programs.watch) for m in job.members]

    def step(states: States, frozen: Any, batch: Batch) -> tuple[States, Metrics]:
        trainable, aux = [s.trainable for s in states], [s.aux for s in states]
        grads, metrics = gradients(adapters, trainable, frozen, batch, aux)
        own = _own_batches(batch, len(states)) if adapters.separate_rows else [batch] * len(states)
        done = [
            update(state, k, grads, metrics, own[k])
            for k, (update, state) in enumerate(zip(updates, states, strict=True))
        ]
        counts = stack_metrics([more for _, more in done])
        return tuple(state for state, _ in done), {**metrics, **counts}

    return step


def _own_batches(batch: Batch, count: int) -> list[Batch]:
    """The batches of the members, which are concatenated along the microbatches."""
    micro = jax.tree.leaves(batch)[0].shape[0] // count
    return [jax.tree.map(lambda x, k=k: x[k * micro : (k + 1) * micro], batch) for k in range(count)]


def compile_sweep_metrics(
    adapters: MultiAdapter, job: Job, frozen: Any, shape: Batch, batch_count: int
) -> RowMetrics:
    """Return `metrics(states, batches, with_rows)`, not yet divided, of `batch_count` batches of one shape
    [1, rows, ...] together. with_rows: see compile_metrics.
    """
    count = len(job.members)
    mesh, states = job.lead.programs.mesh, job.abstract_states
    step = jax.jit(make_adapters_eval_step(adapters), out_shardings=sharding.replicated(mesh))
    trainable, aux = [s.trainable for s in states], [s.aux for s in states]
    compiled = step.lower(trainable, frozen, sharded_batch(job.lead.programs, shape), aux).compile()

    def on_batch(states: States, batch: Batch) -> Any:
        own, aux = [s.trainable for s in states], [s.aux for s in states]
        return compiled(own, frozen, sharding.shard_batch(mesh, batch), aux)

    def read(total: Metrics) -> list[Metrics]:
        return [jax.tree.map(lambda x, k=k: x[k], total) for k in range(count)]

    if not adapters.coupled:
        return lambda states, batches, with_rows: read(
            evaluate.sum_metrics(partial(on_batch, states), batches, with_rows)
        )

    def all_rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, batch_count * x.shape[1], *x.shape[2:]), x.dtype)

    shapes = jax.tree.map(all_rows, jax.eval_shape(step, trainable, frozen, shape, aux))
    loss_aux = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _loss_aux(states))
    compute_metrics = jax.jit(partial(loss_metrics, adapters)).lower(shapes, loss_aux).compile()

    def coupled(states: States, batches: Iterable[Batch], with_rows: bool) -> list[Metrics]:
        outputs = [jax.device_get(on_batch(states, batch)) for batch in batches]
        joined = jax.tree.map(lambda *x: np.concatenate(x, 1), *outputs)
        return read(jax.device_get(compute_metrics(joined, jax.device_get(_loss_aux(states)))))

    return coupled


def _loss_aux(states: tuple[TrainState, ...]) -> list[dict[str, Any]]:
    """The part of the members' aux that their losses read."""
    return [{name: s.aux[name] for name in ("loss", LOSS_KNOBS) if name in s.aux} for s in states]
