"""Several adapters on one base in one program, each with its loss, learning rate, clipping and skipped steps;
and the programs of a sweep, one step and one evaluation for all members.

`lax.map` runs over blocks of `at_once` adapters, so that activations are stored for one block at a time. The
rows of a block go through the model together. A reference policy that all adapters share runs once.

Each of the K runs has its own tree of trainable parameters. `SharedFrozen` holds the base once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxft.batch import TrainState
from jaxft.data.source import HeldOutMetrics
from jaxft.distributed import sharding, threads
from jaxft.nn import tree
from jaxft.nn.adapters import lora
from jaxft.nn.tree import Aux, Batch, Grads, Metrics, Params
from jaxft.objectives import metrics
from jaxft.objectives.metrics import FloatMetrics, neutral
from jaxft.objectives.objective import Facts, Objective, Outputs
from jaxft.optim.optimizer import Optimizer
from jaxft.train.compiled import (
    EVALUATING,
    Compiled,
    RowMetrics,
    States,
    compile_averages,
    compile_eval,
    compile_last_loss,
    compile_samples,
    divided,
)
from jaxft.train.evaluate import evaluate
from jaxft.train.logs.clock import Clock
from jaxft.train.programs import sharded_batch
from jaxft.train.start.jobs import Job
from jaxft.train.step import Watch, accumulate_gradients, apply_gradients

LOSS_KNOBS = "knobs"  # key in aux of a loss's knobs that are arrays, as in a study


class SharedFrozen(NamedTuple):
    """Frozen parameters: `base`, which all adapters share, and in `own` each adapter's, such as scales."""

    base: Params
    own: tuple[Params, ...]


@dataclass(frozen=True)
class MultiAdapter:
    """K objectives over one base, with an adapter each.

    lead: index of the objective whose forward pass is used for all. reference: the kind of reference policy
    that the objectives use, "none" if none does, see Facts. separate_rows: each adapter has its own batches,
    [K * micro, rows, ...], instead of the same for all. at_once: adapters that go through the model in one
    forward pass; a divisor of K.
    """

    objectives: tuple[Objective, ...]
    lead: int
    reference: str
    separate_rows: bool = False
    at_once: int = 1

    @property
    def coupled(self) -> bool:
        """True if the loss of any objective couples rows; then all losses are computed from full batches."""
        return any(o.facts.coupled for o in self.objectives)

    @property
    def shares_reference(self) -> bool:
        """True if the reference policy is the same for all adapters and runs once."""
        return self.reference == "start" and not self.separate_rows


def combine_objectives(
    objectives: Sequence[Objective], separate_rows: bool = False, at_once: int = 1
) -> MultiAdapter:
    """Combine the objectives of several adapters into one MultiAdapter, which documents the arguments.
    Raises ValueError for different kinds of reference.
    """
    kinds = [o.facts.reference for o in objectives]
    used = sorted({kind for kind in kinds if kind != "none"})
    if len(used) > 1:
        raise ValueError(
            f"the objectives have different kinds of reference ({', '.join(used)}); use one kind for all"
        )
    lead = next((i for i, kind in enumerate(kinds) if kind != "none"), 0)
    return MultiAdapter(tuple(objectives), lead, kinds[lead], separate_rows, at_once)


def gradients(
    adapters: MultiAdapter,
    trainable: Sequence[Params],
    frozen: SharedFrozen,
    batch: Batch,
    aux: Sequence[Aux],
) -> tuple[Grads, Metrics]:
    """Return each adapter's gradients of its loss, and its metrics, stacked: every leaf is [K, ...].

    trainable, aux: one per adapter. batch: [micro, rows, ...], or [K * micro, rows, ...] if each adapter has
    its own rows.
    """
    key = jax.random.key(0)  # unused: adapters with dropout are trained alone
    no_base, rows, K = trainable[0]["base"], _row_count(batch), len(adapters.objectives)
    batch = _with_reference(adapters, trainable, frozen, batch, aux)
    if adapters.separate_rows:
        batch = jax.tree.map(lambda x: x.reshape(K, x.shape[0] // K, *x.shape[1:]), batch)

    def block_rows(x: Array, number: Int[Array, ""]) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, number * adapters.at_once, adapters.at_once)
        return jnp.moveaxis(part, 0, 1).reshape(part.shape[1], part.shape[0] * part.shape[2], *part.shape[3:])

    def block(number: Any, stacks: tuple[Params, Params], references: Params | None) -> tuple[Grads, Metrics]:
        own_batch = (
            jax.tree.map(partial(block_rows, number=number), batch) if adapters.separate_rows else batch
        )
        params = ({"base": no_base, **stacks[0]}, {"base": frozen.base, **stacks[1]})
        objective = _block_objective(adapters, number, rows, references)
        grads, metrics = accumulate_gradients(objective, params, own_batch, key, aux)
        return own_params(grads), metrics

    return _map_blocks(adapters, block, _stacks(trainable, frozen), _own_references(adapters, aux))


def make_update(objective: Objective, optimizer: Optimizer, watch: Watch | None = None) -> Callable:
    """Return `update(state, k, gradients [K], metrics [K], batch) -> (state, further metrics)`, the optimizer
    update of adapter k by its part of the stacked gradients.

    An adapter whose loss, gradient or update is not finite stays unchanged; the others continue.
    """
    no_rounding = jax.random.key(0)  # adapters are float32

    def update(
        state: TrainState, k: int, grads: Grads, metrics: Metrics, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        grads_k = {**state.trainable, **lora.adapter_of_stack(grads, k, own_params(state.trainable))}
        summed = grads_k, jax.tree.map(lambda x: x[k], metrics)
        new, counts = apply_gradients(objective, optimizer, state, batch, summed, no_rounding)
        return new, {**counts, **(watch(grads_k, state.trainable, new.trainable) if watch else {})}

    return update


def make_adapters_eval_step(adapters: MultiAdapter) -> Callable:
    """Return `(trainable, frozen, batch [1, rows, ...], aux) -> metrics [K]` of held-out rows shared by all.

    If any loss couples rows, it returns the model's outputs [K, rows, ...] instead; loss_metrics makes
    metrics of the outputs of all batches.
    """
    evaluated = tuple(objective.for_evaluation() for objective in adapters.objectives)
    same_rows = replace(adapters, objectives=evaluated, separate_rows=False)

    def step(trainable: Sequence[Params], frozen: SharedFrozen, batch: Batch, aux: Sequence[Aux]) -> Any:
        stacks, rows = _stacks(trainable, frozen), _row_count(batch)
        batch = _first(_with_reference(same_rows, trainable, frozen, batch, aux))

        def block(number: Any, stacks: tuple[Params, Params], references: Params | None) -> Any:
            params = {"base": frozen.base, **tree.combine(*stacks)}
            outputs = _forward(same_rows, params, batch, references)
            if adapters.coupled:
                G = adapters.at_once
                return jax.tree.map(lambda x: x.reshape(G, x.shape[0] // G, *x.shape[1:]), outputs)
            return _loss(same_rows, number, rows, outputs, aux)[1]

        return _map_blocks(same_rows, block, stacks, _own_references(same_rows, aux))

    return step


def loss_metrics(adapters: MultiAdapter, outputs: Outputs, aux: Sequence[Aux]) -> Metrics:
    """Return each adapter's metrics, [K], from the outputs of all held-out batches, [K, rows, ...]."""
    own = zip(adapters.objectives, _slices(outputs, len(aux)), aux, strict=True)
    return stack_metrics([o.for_evaluation().loss(x, a)[1] for o, x, a in own])


def own_params(params: Params) -> Params:
    """Return an adapter's parameters: `params` without the base, which the adapters share."""
    return {name: x for name, x in params.items() if name != "base"}


def _block_objective(
    adapters: MultiAdapter, number: int | Int[Array, ""], rows: int, references: Params | None
) -> Objective:
    """Return the objective of a block, the adapters that go through the model together: the sum of their
    losses.

    number: the block's index, from 0. rows: rows of each adapter in a microbatch. references: each adapter's
    reference policy, [K, ...]; None if there is none or all share one.
    """

    def forward(params: Params, batch: Batch, key: Array | None, aux: Aux) -> Outputs:
        return _forward(adapters, params, batch, references)

    def loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        return _loss(adapters, number, rows, outputs, aux)

    return Objective(forward, loss, facts=Facts(coupled=adapters.coupled))


def _stacks(trainable: Sequence[Params], frozen: SharedFrozen) -> tuple[Params, Params]:
    """Return the (trainable, frozen) parameters of the adapters, each leaf [K, ...]."""
    return lora.stack_adapters([own_params(x) for x in trainable]), lora.stack_adapters(frozen.own)


def _row_count(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[1]


def _first(stack: Any) -> Any:
    return jax.tree.map(lambda x: x[0], stack)


def _slices(stack: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x, k=k: x[k], stack) for k in range(count)]


def _map_blocks(adapters: MultiAdapter, fn: Callable, stacks: Any, references: Params | None) -> Any:
    """Call fn(index, stacks, references) for each block of adapters; return the results, joined to [K, ...].

    stacks, references: [K, ...]; fn gets the [at_once, ...] of its block.
    """
    count = len(adapters.objectives) // adapters.at_once
    blocks = jax.tree.map(lambda x: x.reshape(count, adapters.at_once, *x.shape[1:]), (stacks, references))
    if count == 1:
        return fn(0, *_first(blocks))
    results = jax.lax.map(lambda args: fn(args[0], *args[1]), (jnp.arange(count), blocks))
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), results)


def _own_references(adapters: MultiAdapter, aux: Sequence[Aux]) -> Params | None:
    """Return the reference policy that each adapter has in its aux, stacked [K, ...]; None if aux has none or
    the adapters share one.
    """
    lead = aux[adapters.lead]
    if adapters.shares_reference or "reference" not in lead:
        return None
    return lora.stack_adapters([own_params((a if "reference" in a else lead)["reference"]) for a in aux])


def _with_reference(
    adapters: MultiAdapter,
    trainable: Sequence[Params],
    frozen: SharedFrozen,
    batch: Batch,
    aux: Sequence[Aux],
) -> Batch:
    """Return the batch with the reference's log-probs if all adapters share it, else the batch as it is."""
    if not adapters.shares_reference:
        return batch
    lead, params = adapters.lead, {"base": frozen.base}
    if "reference" in aux[lead]:
        adapter = tree.combine(own_params(trainable[lead]), frozen.own[lead])
        params = tree.combine(aux[lead]["reference"], {**params, **adapter})

    def logp(rows: Batch) -> Array:
        return adapters.objectives[lead].forward(params, rows, None, {}).logp

    count = jax.tree.leaves(batch)[0].shape[0]
    known = logp(_first(batch))[None] if count == 1 else jax.lax.map(logp, batch)
    return replace(batch, reference=jax.lax.stop_gradient(known))


def _forward(adapters: MultiAdapter, params: Params, batch: Batch, references: Params | None) -> Outputs:
    """Return the outputs of a block's adapters, [at_once * rows, ...]. params: [at_once, ...]."""

    joined = _first if adapters.at_once == 1 else lora.several
    block = {"base": params["base"], **joined(own_params(params))}
    if not adapters.separate_rows:
        batch = jax.tree.map(lambda x: jnp.concatenate([x] * adapters.at_once), batch)
    no_base = jax.tree.map(lambda x: None, params["base"])
    aux = {}
    if references is not None:
        aux = {"reference": {"base": no_base, **joined(references)}}
    outputs = adapters.objectives[adapters.lead].forward(block, batch, None, aux)
    # the lead's own forward pass of the reference, if any, is then dead code and no part of the program
    return replace(outputs, reference=batch.reference) if adapters.shares_reference else outputs


def _loss(
    adapters: MultiAdapter, number: int | Int[Array, ""], rows: int, outputs: Outputs, aux: Sequence[Aux]
) -> tuple[Array, Metrics]:
    """Return (sum of the losses, metrics [at_once]) of a block's outputs. number, rows: see _block_objective.

    outputs: the rows of all microbatches, one microbatch after the other.
    """
    G, objectives = adapters.at_once, adapters.objectives

    def of_adapter(g: int, x: Array) -> Array:
        micro = x.shape[0] // (G * rows)
        own = x.reshape(micro, G, rows, *x.shape[1:])[:, g]
        return own.reshape(micro * rows, *x.shape[1:])

    parts = [jax.tree.map(partial(of_adapter, g), outputs) for g in range(G)]
    shapes = [jax.eval_shape(o.loss, parts[0], a)[1] for o, a in zip(objectives, aux, strict=True)]
    names = _union(shapes)

    def block_loss(first: int, parts: list[Outputs]) -> tuple[Array, Metrics]:
        losses = [objectives[first + g].loss(parts[g], aux[first + g]) for g in range(G)]
        total = sum((loss for loss, _ in losses[1:]), losses[0][0])
        return total, stack_metrics([metrics for _, metrics in losses], names)

    branches = [partial(block_loss, first) for first in range(0, len(objectives), G)]
    return branches[0](parts) if len(branches) == 1 else jax.lax.switch(number, branches, parts)


def _union(each: Sequence[Metrics]) -> Metrics:
    """Return {name: a metric of that name} for every name in any of the adapters' metrics."""
    return {name: metric for metrics in each for name, metric in metrics.items()}


def stack_metrics(each: Sequence[Metrics], names: Metrics | None = None) -> Metrics:
    """Stack the adapters' metrics by name, each to [K]. names: {name: a metric of the same type}, by default
    of all that any adapter has. An adapter that lacks a metric gets a zero, or for a maximum -inf.
    """
    names = _union(each) if names is None else names
    whole = [
        {name: metrics.get(name) or neutral({name: like})[name] for name, like in names.items()}
        for metrics in each
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *whole)


def compile_sweep(job: Job, frozen: tuple[Params, ...], clock: Clock) -> Compiled:
    """Compile the programs of a sweep's members together. clock: shows the progress of evaluation."""
    assert job.sweep is not None
    p, at_once = job.lead.programs, job.sweep.at_once
    objectives = [member.programs.objective for member in job.members]
    adapters = combine_objectives(objectives, len(job.sources) > 1, at_once)
    shared = SharedFrozen(frozen[0]["base"], tuple(own_params(rest) for rest in frozen))
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

    def held_out(states: States, with_rows: bool) -> list[HeldOutMetrics]:
        return [divided(total) for total in totals(states, with_rows)]

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
        batches, K = [batch] * len(states), len(states)
        if adapters.separate_rows:  # [K * micro, rows, ...]
            micro = jax.tree.leaves(batch)[0].shape[0] // K
            batches = [jax.tree.map(lambda x, k=k: x[k * micro : (k + 1) * micro], batch) for k in range(K)]
        done = [
            update(state, k, grads, metrics, batches[k])
            for k, (update, state) in enumerate(zip(updates, states, strict=True))
        ]
        counts = stack_metrics([more for _, more in done])
        return tuple(state for state, _ in done), {**metrics, **counts}

    return step


def compile_sweep_metrics(
    adapters: MultiAdapter, job: Job, frozen: Any, shape: Batch, batch_count: int
) -> RowMetrics:
    """Return `metrics(states, batches, with_rows)`: each member's metrics, summed over `batch_count` batches
    of the shape [1, rows, ...], not yet divided by their weights. with_rows: see compile_metrics.
    """
    count = len(job.members)
    mesh, states = job.lead.programs.mesh, job.abstract_states
    step = jax.jit(make_adapters_eval_step(adapters), out_shardings=sharding.replicated(mesh))
    trainable, aux = [s.trainable for s in states], [s.aux for s in states]
    compiled = step.lower(trainable, frozen, sharded_batch(job.lead.programs, shape), aux).compile()

    def on_batch(states: States, batch: Batch) -> Any:
        trainable, aux = [s.trainable for s in states], [s.aux for s in states]
        return compiled(trainable, frozen, sharding.shard_batch(mesh, batch), aux)

    if not adapters.coupled:
        return lambda states, batches, with_rows: _slices(
            evaluate.sum_metrics(partial(on_batch, states), batches, with_rows), count
        )

    def all_rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, batch_count * x.shape[1], *x.shape[2:]), x.dtype)

    shapes = jax.tree.map(all_rows, jax.eval_shape(step, trainable, frozen, shape, aux))
    loss_aux = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _loss_aux(states))
    compute_metrics = jax.jit(partial(loss_metrics, adapters)).lower(shapes, loss_aux).compile()

    def coupled(states: States, batches: Iterable[Batch], with_rows: bool) -> list[Metrics]:
        outputs = [jax.device_get(on_batch(states, batch)) for batch in batches]
        joined = jax.tree.map(lambda *x: np.concatenate(x, 1), *outputs)
        return _slices(jax.device_get(compute_metrics(joined, jax.device_get(_loss_aux(states)))), count)

    return coupled


def _loss_aux(states: tuple[TrainState, ...]) -> list[dict[str, Any]]:
    """Return the part of each member's aux that its loss reads."""
    return [{name: s.aux[name] for name in ("loss", LOSS_KNOBS) if name in s.aux} for s in states]
