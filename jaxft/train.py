"""A run from its settings to its results: the train step, and the loop, top to bottom."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from jaxft import attention, evaluate, metrics, prepare, report, runfolder, sharding, tree, weights
from jaxft.checkpoint import Checkpoints
from jaxft.data.source import Rows, Source, abstract_tokens, sft_source
from jaxft.generate import Sampling, make_generate
from jaxft.log import Log
from jaxft.lora import Adapter
from jaxft.optim import Optim, make_optimizer
from jaxft.params import Model
from jaxft.tree import struct


@dataclass(frozen=True)
class Loop:
    """Cadences, in optimizer steps. steps: the run's length, None for data.epochs. max_bad: non-finite steps in a row that
    end the run. profile: (first, last) step of a trace, None for none."""

    steps: int | None = None
    log_every: int = 1
    eval_every: int | None = None
    save_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    max_bad: int = 5
    profile: tuple[int, int] | None = None


@dataclass(frozen=True)
class Run:
    """All of a run. `objective(model)` gives the objective, `source(data, tokenizer)` the batches.

    weights: where the base comes from (see weights.hub). adapter: LoRA, None trains the base. train: a path pattern of what
    is trained instead of the default. general: a text file whose loss before and after shows forgetting. samples: prompts
    of held-out rows answered before and after.
    """

    name: str
    weights: str
    model: Model
    objective: Callable[[Model], Callable]
    data: Rows
    source: Callable[..., Source] = sft_source
    adapter: Adapter | None = field(default_factory=Adapter)
    train: str | None = None
    optim: Optim = field(default_factory=Optim)
    mesh: sharding.MeshShape = field(default_factory=sharding.MeshShape)
    loop: Loop = field(default_factory=Loop)
    seed: int = 0
    general: str | None = None
    samples: int = 3
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new=96))
    trackers: tuple[str, ...] = ()


@struct
class TrainState:
    """All that is needed to go on. bad: non-finite steps so far, and of those the last in a row."""

    step: Int[Any, ""]
    trainable: Any
    opt_state: Any
    aux: Any
    bad: Int[Any, "2"]


def make_train_step(objective: Callable, tx: optax.GradientTransformation, seed: int) -> Callable:
    """`(state, frozen, batch [micro, rows, ...]) -> (state, metrics)`: the microbatches' gradients are added, then one update.

    The batch's weights sum to 1 over all microbatches, so nothing is averaged here. A step whose loss or gradient norm is
    not finite changes neither parameters, optimizer state nor aux; it is counted.
    """

    def gradients(state, frozen, rows, key):
        def loss(trainable):
            return objective(tree.combine(trainable, frozen), rows, key, state.aux)

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        return grads, found

    def accumulated(state, frozen, batch, key):
        count = jax.tree.leaves(batch)[0].shape[0]
        part = lambda i: jax.tree.map(lambda x: x[i], batch)  # noqa: E731
        if count == 1:
            return gradients(state, frozen, part(0), jax.random.fold_in(key, 0))

        def body(total, i):
            grads, found = gradients(state, frozen, part(i), jax.random.fold_in(key, i))
            return (jax.tree.map(jnp.add, total[0], grads), metrics.add(total[1], found)), None

        shapes = jax.eval_shape(lambda: gradients(state, frozen, part(0), key))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[0])
        return jax.lax.scan(body, (zeros, metrics.neutral(shapes[1])), jnp.arange(count))[0]

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, found = accumulated(state, frozen, batch, key)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(norm) & jnp.isfinite(found["loss"].total)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        moved = optax.apply_updates(state.trainable, updates)
        aux = objective.after_step(state.aux, moved, found) if hasattr(objective, "after_step") else state.aux
        before, after = (state.trainable, state.opt_state, state.aux), (moved, opt_state, aux)
        trainable, opt_state, aux = jax.tree.map(lambda new, old: jnp.where(ok, new, old), after, before)
        bad = jnp.where(ok, state.bad * jnp.array([1, 0]), state.bad + 1)
        one = jnp.ones((), norm.dtype)
        found = {**found, "grad_norm": metrics.Sum(norm, one), "skipped": metrics.Sum((~ok).astype(norm.dtype), one)}
        return TrainState(state.step + 1, trainable, opt_state, aux, bad), found

    return train_step


@dataclass(frozen=True)
class Programs:
    """A run's compiled programs and what they work on: everything but the weights' values and the rows."""

    trained: prepare.Trained
    mesh: Any
    objective: Callable
    tx: optax.GradientTransformation
    schedule: Callable
    state: TrainState  # shapes and shardings
    frozen: Any  # shapes and shardings
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped


def build(run: Run, steps: int, devices_: list[Any] | None = None) -> Programs:
    """Functions and shapes of a run of `steps` steps, from its settings alone: no weights, rows or network."""
    mesh = sharding.make_mesh(run.mesh, devices_)
    model = run.model.with_attention(attention.choose(mesh, run.model.config.head_dim, run.model.dtype))
    t = prepare.trained(model, run.adapter, run.train)
    objective = run.objective(t.model)
    tx, schedule = make_optimizer(run.optim, t.trainable_specs, steps)
    trainable, frozen = prepare.split(t, prepare.abstract_params(t, mesh))
    opt_state = jax.eval_shape(tx.init, trainable)
    places = prepare.like_params(opt_state, trainable, mesh)
    opt_state = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), opt_state, places)
    everywhere = sharding.replicated(mesh)
    small = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)  # noqa: E731
    state = TrainState(small(()), trainable, opt_state, {}, small((2,)))
    step = jax.jit(
        make_train_step(objective, tx, run.seed),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, state), everywhere),
    )
    eval_step = jax.jit(evaluate.make_eval_step(objective), out_shardings=everywhere)
    return Programs(t, mesh, objective, tx, schedule, state, frozen, step, eval_step)


def abstract(run: Run, devices_: list[Any] | None = None) -> tuple[Programs, Any]:
    """A run as shapes: its programs and one batch, the largest that the settings allow."""
    p = build(run, run.loop.steps or 1000, devices_)
    batch = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.batch_sharding(p.mesh, s.shape)),
        abstract_tokens(run.data),
    )
    return p, batch


def start(run: Run, p: Programs, restored: TrainState | None) -> tuple[TrainState, Any]:
    """(state, frozen): weights loaded leaf by leaf, and at step 0 a fresh adapter and optimizer. A restored state has its own."""
    store = prepare.make_store(p.trained, p.mesh, frozen_only=restored is not None)
    whole = {"base": weights.load_base(run.weights, run.model, store)}
    if run.adapter:
        whole["adapter"] = prepare.start_adapter(p.trained, p.mesh, run.seed)
    trainable, frozen = prepare.split(p.trained, whole)
    if restored is not None:
        return restored, frozen
    places = jax.tree.map(lambda s: s.sharding, p.state)
    fresh = lambda t: TrainState(jnp.int32(0), t, p.tx.init(t), {}, jnp.zeros(2, jnp.int32))  # noqa: E731
    return jax.jit(fresh, out_shardings=places, donate_argnums=0)(trainable), frozen


def compile_step(p: Programs, batch: Any) -> jax.stages.Compiled:
    """The train step for its one shape; another shape is an error afterwards, never a silent compile."""
    return p.train_step.lower(p.state, p.frozen, _placed(p, batch)).compile()


def compile_eval(p: Programs, frozen: Any, *held_out: tuple[Any, ...]) -> Callable:
    """`evaluated(state, batches) -> numbers`, compiled for the shape of each group of batches."""
    shape = lambda batch: tuple(x.shape for x in jax.tree.leaves(batch))  # noqa: E731
    compiled = {}
    for batches in held_out:
        for batch in batches[:1]:
            if shape(batch) not in compiled:
                lowered = p.eval_step.lower(p.state.trainable, p.frozen, _placed(p, batch), p.state.aux)
                compiled[shape(batch)] = lowered.compile()

    def evaluated(state: TrainState, batches: tuple[Any, ...]) -> dict[str, float]:
        def one(batch):
            return compiled[shape(batch)](state.trainable, frozen, sharding.place_batch(p.mesh, batch), state.aux)

        return evaluate.evaluate(one, batches)

    return evaluated


def _placed(p: Programs, batch: Any) -> Any:
    place = lambda x: sharding.batch_sharding(p.mesh, x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), batch)


def run(r: Run, record: dict[str, Any], root: Path = Path("runs")) -> int:
    """Train, or go on where the run folder's newest checkpoint stands. Returns the process's exit code.

    record: the settings as JSON (describe.describe). 0: finished; 128 + n: stopped by signal n with everything saved.
    Raises ValueError, FileNotFoundError or OSError with one line that says what to change.
    """
    folder = root / r.name
    with runfolder.lock(folder), runfolder.Interrupt() as interrupt, jax.set_mesh(sharding.make_mesh(r.mesh)):
        tokenizer = weights.load_tokenizer(r.weights)
        source = r.source(r.data, tokenizer)
        steps = r.loop.steps or source.steps
        record = {**record, "fingerprint": source.fingerprint}
        p = build(r, steps)
        saved = Checkpoints(folder / "checkpoints", keep_last=r.loop.keep_last, keep_best=r.loop.keep_best)
        changes = runfolder.check(folder, record, resuming=saved.latest() is not None)
        if runfolder.finished(folder) >= steps:
            print(f"{folder}: this run is finished ({steps} steps); results in {folder / 'summary.json'}")
            return 0
        restored = saved.restore(p.state)
        state, frozen = start(r, p, restored[0] if restored else None)
        first, counters = (restored[2], restored[1]["counters"]) if restored else (0, {"num_tokens": 0})
        runfolder.open_record(folder, record)

        log = Log(folder, total_steps=steps, start_step=first, trackers=r.trackers)
        for line in report.opening(p.trained, source, steps, first, changes):
            log.message(line)
        general = report.general_rows(r.data, r.general, tokenizer)
        begin = time.perf_counter()
        evaluated = compile_eval(p, frozen, source.held_out, general)
        train_step = compile_step(p, source.abstract)
        log.message(f"compiled the train and evaluation steps in {time.perf_counter() - begin:.1f} s")
        generate = make_generate(p.trained.model, r.sampling, report.stop_tokens(r.model.config.eos, tokenizer))

        def look(state: TrainState) -> dict[str, Any]:
            whole = tree.combine(state.trainable, frozen)
            loss = {f"eval_{name}": value for name, value in evaluated(state, source.held_out).items()}
            if general:
                loss["general_loss"] = evaluated(state, general)["loss"]
            return {"metrics": loss, "samples": report.samples(generate, whole, source, tokenizer, r.samples)}

        if first == 0:
            before = look(state)
            runfolder.write_json(folder / "before.json", before)
            log.step(0, before["metrics"], {})
        meter = report.Meter(p.trained, p.schedule, source, counters)
        for step in range(first, steps):
            with report.trace(r.loop.profile, step, folder / "profile"):
                batch = source.batch(step, state)
                state, found = train_step(state, frozen, sharding.place_batch(p.mesh, batch))
                meter.add(step, batch, found)
            done = step + 1
            if done % r.loop.log_every == 0 or done == steps:
                log.step(done, *meter.read())
                meter.stop_if_bad(state.bad, r.loop.max_bad)
            score = None
            if r.loop.eval_every and done % r.loop.eval_every == 0 and done < steps and source.held_out:
                numbers = {f"eval_{name}": value for name, value in evaluated(state, source.held_out).items()}
                score = numbers["eval_loss"]
                log.step(done, numbers, {})
                meter.restart()
            if done % r.loop.save_every == 0 or done == steps or score is not None or interrupt.signal:
                saved.save(done, state, {"record": record, "counters": meter.counters}, score)
            if interrupt.signal and done < steps:
                saved.close()
                log.message(f"stopped by signal {interrupt.signal} after step {done}; saved, the same command goes on from here")
                log.close()
                return 128 + interrupt.signal
        saved.close()

        after = look(state)
        log.step(steps, after["metrics"], {})
        out = report.export(p.trained, tree.combine(state.trainable, frozen), r, tokenizer, folder)
        before = runfolder.read_json(folder / "before.json")
        for line in report.closing(out, before, after):
            log.message(line)
        report.write_card(r, folder, out, before, after)
        runfolder.write_json(folder / "summary.json", {"steps": steps, "before": before, "after": after})
        log.close()
        return 0


def dry_run(run: Run, record: dict[str, Any]) -> str:
    """The resolved settings, the parameter table and the planned bytes of the train step on the local devices."""
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        p, batch = abstract(run)
        memory: Any = compile_step(p, batch).memory_analysis()
    parts = {
        "parameters, optimizer and batch": memory.argument_size_in_bytes,
        "activations and temporaries": memory.temp_size_in_bytes,
        "results that reuse no argument": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    sizes = [f"{name:34s} {size / 2**30:8.3f} GiB per device" for name, size in parts.items()]
    return "\n".join([json.dumps(record, indent=2), prepare.table(p.trained), *sizes])
