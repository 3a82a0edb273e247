"""What a run compiles: the train step, evaluation, and the shapes, shardings and start of all that they work on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.batch import TrainState
from jaxft.data.source import Dataset, Source
from jaxft.distributed import devices, sharding
from jaxft.models.heads import HeadSettings, with_heads
from jaxft.models.model import Model
from jaxft.nn import param
from jaxft.objectives.objective import Objective
from jaxft.optim.optimizer import Optimizer, make_optimizer
from jaxft.optim.state_sharding import state_shardings
from jaxft.runs.report import ModelSummary, StepRows
from jaxft.train import evaluate, partition
from jaxft.train.settings import Run
from jaxft.train.step import make_train_step
from jaxft.tree import Aux, Params
from jaxft.weights import init, pretrained, storage


@dataclass(frozen=True)
class Programs:
    """A run's compiled programs and what they work on: everything but the weights' values and the rows."""

    trained: partition.Partition
    mesh: Any
    objective: Objective
    optimizer: Optimizer
    state: TrainState  # shapes and shardings
    frozen: Any  # shapes and shardings
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped
    text_step: jax.stages.Wrapped  # the token loss of general text, whatever is trained


def build(run: Run, steps: int, devices_: list[Any] | None = None) -> Programs:
    """Functions and shapes of a run of `steps` steps, from its settings alone: no weights, rows or network."""
    longest = run.model.config.max_positions
    if run.data.max_length > longest:
        raise ValueError(
            f"data.max_length={run.data.max_length} is beyond the model's {longest} positions; lower it"
        )
    mesh = sharding.make_mesh(run.mesh, devices_)
    model, dtype = with_heads(run.model, run.beside), None if run.params == "float32" else jnp.bfloat16
    what = partition.trainable_patterns(model, run.adapter, run.train, run.beside)
    t = partition.partition_params(model, run.adapter, what, run.quant, run.weights, dtype)
    objective = run.objective(t.model)
    dropout = (
        run.adapter.dropout if run.adapter and not run.start else 0
    )  # what SFT trained with dropout goes on without
    if dropout and not objective.facts.dropout:
        found = f"adapter.dropout={dropout}, and this objective compares log-probs with those at drawing, without it"
        raise ValueError(f"{found}; set adapter.dropout=0")
    optimizer = make_optimizer(run.optim, t.trainable_specs, steps)
    trainable, frozen = partition.split_params(t, storage.sharded_shapes(t.stored, mesh))
    opt_state = jax.eval_shape(optimizer.init, trainable)
    places = state_shardings(optimizer, opt_state, trainable, mesh)
    opt_state = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), opt_state, places
    )
    everywhere = sharding.replicated(mesh)
    small = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)  # noqa: E731
    aux = jax.eval_shape(start_aux(run, t, objective), trainable)
    places = aux_shardings(aux, trainable, mesh)
    aux = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), aux, places)
    state = TrainState(small(()), trainable, opt_state, aux, small((2,)))
    step = jax.jit(
        make_train_step(objective, optimizer, run.seed),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, state), everywhere),
    )
    eval_step = jax.jit(evaluate.make_eval_step(objective), out_shardings=everywhere)
    text = objective.text or objective
    text_step = jax.jit(evaluate.make_eval_step(text), out_shardings=everywhere)
    if optimizer.fused_backward and (
        objective.facts.reference != "precomputed"
    ):  # refused before anything is loaded
        jax.eval_shape(step, state, frozen, run.data.abstract(sharding.row_shards(mesh)))
    return Programs(t, mesh, objective, optimizer, state, frozen, step, eval_step, text_step)


def start_aux(run: Run, t: partition.Partition, objective: Objective) -> Callable:
    """`aux of (trainable at step 0)`: what the objective keeps beside the parameters."""
    at_base = run.adapter is not None and run.start is None and not partition.trains_base(t)
    return lambda trainable: objective.init(trainable, at_base)


def aux_shardings(aux: Aux, trainable: Params, mesh: Any) -> Any:
    """Shardings of aux: its "reference" is a copy of some or all trainable parameters, everything else is replicated."""
    everywhere = sharding.replicated(mesh)
    places = {name: jax.tree.map(lambda _: everywhere, x) for name, x in aux.items() if name != "reference"}
    if "reference" in aux:
        same = lambda x, like: None if x is None else like.sharding  # noqa: E731
        places["reference"] = jax.tree.map(same, aux["reference"], trainable, is_leaf=lambda x: x is None)
    return places


def abstract(run: Run, devices_: list[Any] | None = None) -> tuple[Programs, Any]:
    """A run as shapes: its programs and one batch, the largest that the settings allow."""
    p = build(run, run.loop.steps or 1000, devices_)
    largest = run.data.abstract(sharding.row_shards(p.mesh))
    return p, placed(p, p.objective.batch_spec(largest))


def start(run: Run, p: Programs, restored: TrainState | None, base: Any = None) -> tuple[TrainState, Any]:
    """(state, frozen): weights loaded leaf by leaf, and at step 0 a fresh adapter and optimizer. A restored state has its own.

    base: the frozen base of another run, for one that trains nothing of it.
    """
    if base is None:
        skip = partition.trainable_paths(p.trained) if restored is not None else ()
        base = pretrained.load_base(run.weights, p.trained.stored, p.mesh, skip)
    own = HeadSettings(run.adapter, run.start)
    whole = {
        "base": base,
        **init.init_all_but_base(p.trained.model, p.mesh, run.seed, own, run.weights, run.beside),
    }
    trainable, frozen = partition.split_params(p.trained, whole)
    if restored is not None:
        return restored, frozen
    places = jax.tree.map(lambda s: s.sharding, p.state)
    aux = start_aux(run, p.trained, p.objective)
    fresh = lambda t: TrainState(jnp.int32(0), t, p.optimizer.init(t), aux(t), jnp.zeros(2, jnp.int32))  # noqa: E731
    return jax.jit(fresh, out_shardings=places, donate_argnums=0)(trainable), frozen


def reference_step(p: Programs) -> jax.stages.Wrapped:
    """`(parameters, batch [1, rows, ...]) -> log-probs [rows, ...]` of the model at step 0, which pairs then carry with them."""

    def one(params: Any, batch: Any) -> Any:
        return p.objective.score(params, jax.tree.map(lambda x: x[0], batch), {}).logps

    return jax.jit(one, out_shardings=sharding.replicated(p.mesh))


def compile_step(p: Programs, *batches: Any) -> Any:
    """The train step for its one shape, or its few; another shape is an error afterwards, never a silent compile."""
    compiled = {
        batch.ids.shape: p.train_step.lower(p.state, p.frozen, placed(p, batch)).compile()
        for batch in batches
    }
    devices.trim_heap()
    if len(compiled) == 1:
        return next(iter(compiled.values()))
    return lambda state, frozen, batch: compiled[batch.ids.shape](state, frozen, batch)


def compile_eval(p: Programs, step: jax.stages.Wrapped, frozen: Any, batches: tuple[Any, ...]) -> Callable:
    """`evaluated(state) -> numbers` of held-out batches, compiled for their one shape."""
    if not batches:
        return lambda state: {}
    compiled = step.lower(p.state.trainable, p.frozen, placed(p, batches[0]), p.state.aux).compile()

    def on(state: TrainState) -> Callable:
        return lambda batch: compiled(state.trainable, frozen, sharding.place_batch(p.mesh, batch), state.aux)

    if step is p.text_step or not p.objective.facts.coupled:
        return lambda state: evaluate.evaluate(on(state), batches)
    shape = jax.eval_shape(step, p.state.trainable, p.frozen, batches[0], p.state.aux)
    many = lambda x: jax.ShapeDtypeStruct((len(batches) * x.shape[0], *x.shape[1:]), x.dtype)  # noqa: E731
    aux = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p.state.aux.get("loss", {}))
    judge = (
        jax.jit(lambda seen, state: p.objective.loss(seen, {"loss": state})[1])
        .lower(jax.tree.map(many, shape), aux)
        .compile()
    )

    def together(state: TrainState) -> dict[str, float]:
        kept = jax.device_get(state.aux.get("loss", {}))
        return evaluate.evaluate_together(on(state), lambda seen: judge(seen, kept), batches)

    return together


def placed(p: Programs, batch: Any) -> Any:
    place = lambda x: sharding.batch_sharding(p.mesh, x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), batch)


def step_rows(data: Dataset, shards: int) -> StepRows:
    """The rows of an optimizer step by the settings `data`, of which each microbatch is sharded over `shards` devices."""
    return StepRows(data.unit, data.batch, data.micro, shards, data.batch // data.units_per_step)


def check_token_ids(source: Source[Any] | None, model: Model, ref: str) -> None:
    """Raise ValueError if the rows contain a token id beyond the model's embeddings: a gather would read another row."""
    largest = source.info.stats.largest_id if source else 0
    if largest >= model.config.vocab:
        raise ValueError(
            f"{ref}: the tokenizer produces token id {largest}, and the model has embeddings for 0 to "
            f"{model.config.vocab - 1} only. Use the tokenizer that belongs to the model."
        )


def model_summary(p: Programs) -> ModelSummary:
    """Parameter counts and quantisation, for reports."""
    t = p.trained
    counts = param.count_params(t.trainable_specs), param.count_params(t.specs)
    return ModelSummary(*counts, storage.quantisation_summary(t.stored), t.model.generates)
