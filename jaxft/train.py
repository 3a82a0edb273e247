"""A run from its settings to its results: the train step, and the loop, top to bottom."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from jaxft import (
    attention,
    devices,
    distributed,
    evaluate,
    metrics,
    prepare,
    reference,
    report,
    runfolder,
    samples,
    sharding,
    tree,
    weights,
)
from jaxft.accumulate import accumulated
from jaxft.checkpoint import Checkpoints
from jaxft.data.pairs import PairRows
from jaxft.data.source import Rows, Source, sft_source
from jaxft.describe import describe, differences
from jaxft.generate import Sampling
from jaxft.in_backward import updated
from jaxft.log import Log, Mute
from jaxft.lora import Adapter
from jaxft.optim import Optim, guarded_update, make_optimizer, wide
from jaxft.params import Model
from jaxft.quant import Quant
from jaxft.tree import struct
from jaxft.watchdog import Watchdog


@dataclass(frozen=True)
class Loop:
    """Cadences, in optimizer steps. steps: the run's length, None for data.epochs. log_every: metrics are means over as many
    steps. keep_last, keep_best: checkpoints that stay, the newest and those with the lowest eval_loss. max_bad: non-finite
    steps in a row that end the run. profile: first and last step of a profiler trace (`loop.profile=10:15`), None for none.
    """

    steps: int | None = None
    log_every: int = 1
    eval_every: int | None = None
    save_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    max_bad: int = 5
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "save_every", "keep_last", "max_bad"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"loop.{name} is at least 1, found {value}")
        if self.keep_best < 0:
            raise ValueError(f"loop.keep_best is at least 0, found {self.keep_best}")
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"loop.profile is the first and the last step of a trace, counted from 1; found {self.profile}")


@dataclass(frozen=True)
class Run:
    """All of a run. `objective(model)` gives the objective, `source(data, tokenizer)` the batches.

    weights: where the base comes from (see weights.hub). adapter: LoRA, None trains the base. start: a PEFT folder, or a run's,
    whose adapter training begins with. train: a path pattern of what is trained instead of the default. quant: how the frozen
    base is held, None in the compute dtype. params: how trained weights of the base are held; bfloat16 ones have bfloat16
    gradients, added up in float32 over microbatches, and are rounded stochastically. general: a text file whose loss before
    and after shows forgetting. samples: prompts of held-out rows answered before and after.
    """

    name: str
    weights: str
    model: Model
    objective: Callable[[Model], Callable]
    data: Rows | PairRows
    source: Callable[..., Any] = sft_source
    adapter: Adapter | None = field(default_factory=Adapter)
    start: str | None = None
    train: str | None = None
    quant: Quant | None = None
    params: Literal["float32", "bfloat16"] = "float32"
    optim: Optim = field(default_factory=Optim)
    mesh: sharding.MeshShape = field(default_factory=sharding.MeshShape)
    hosts: distributed.Hosts = field(default_factory=distributed.Hosts)
    loop: Loop = field(default_factory=Loop)
    seed: int = 0
    general: str | None = None
    samples: int = 3
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new=96))
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples is from 0 up, found {self.samples}")


@struct
class TrainState:
    """All that is needed to go on. bad: non-finite steps so far, and of those the last in a row."""

    step: Int[Any, ""]
    trainable: Any
    opt_state: Any
    aux: Any
    bad: Int[Any, "2"]


def make_train_step(objective: Callable, tx: Any, seed: int) -> Callable:
    """`(state, frozen, batch [micro, rows, ...]) -> (state, metrics)`: the microbatches' gradients are added, then one update.

    The batch's weights sum to 1 over all microbatches, so nothing is averaged here. A step whose loss or gradient norm is
    not finite changes neither parameters, optimizer state nor aux; it is counted. (With optim.in_backward, see in_backward.py.)
    """

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        key, rounding = (jax.random.fold_in(jax.random.key(seed + i), state.step) for i in (0, 1))
        now = state.trainable, state.opt_state
        if getattr(tx, "in_backward", False):
            trainable, opt_state, norm, ok, found = updated(objective, tx, now, frozen, batch, (key, rounding), state.aux)
        else:
            grads, found = accumulated(objective, (state.trainable, frozen), batch, key, state.aux)
            norm = optax.tree.norm(wide(grads))
            ok = jnp.isfinite(norm) & jnp.isfinite(found["loss"].total)
            trainable, opt_state = guarded_update(tx, grads, norm, ok, now, rounding)
        aux = objective.after_step(state.aux, trainable, found) if hasattr(objective, "after_step") else state.aux
        aux = jax.tree.map(lambda new, old: jnp.where(ok, new, old), aux, state.aux)
        bad = jnp.where(ok, state.bad * jnp.array([1, 0], jnp.int32), state.bad + 1)
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
    tx: Any  # an optax.GradientTransformation or an optim.InTurn
    schedule: Callable
    state: TrainState  # shapes and shardings
    frozen: Any  # shapes and shardings
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped
    text_step: jax.stages.Wrapped  # the token loss of general text, whatever is trained


def build(run: Run, steps: int, devices_: list[Any] | None = None) -> Programs:
    """Functions and shapes of a run of `steps` steps, from its settings alone: no weights, rows or network."""
    longest = run.model.config.max_positions
    if run.data.max_length > longest:
        raise ValueError(f"data.max_length={run.data.max_length} is beyond the model's {longest} positions; lower it")
    mesh = sharding.make_mesh(run.mesh, devices_)
    packed = getattr(run.data, "packing", True)
    model = run.model.with_attention(attention.choose(mesh, run.model.config.head_dim, run.model.dtype, packed))
    t = prepare.trained(model, run.adapter, run.train, run.quant, run.weights, jnp.bfloat16 if run.params == "bfloat16" else None)
    objective = run.objective(t.model)
    tx, schedule = make_optimizer(run.optim, t.trainable_specs, steps)
    trainable, frozen = prepare.split(t, prepare.abstract_params(t, mesh))
    opt_state = jax.eval_shape(tx.init, trainable)
    places = prepare.like_params(opt_state, trainable, mesh)
    opt_state = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), opt_state, places)
    everywhere = sharding.replicated(mesh)
    small = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)  # noqa: E731
    aux = jax.eval_shape(start_aux(run, t, objective), trainable)
    places = prepare.like_params(aux, trainable, mesh)
    aux = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), aux, places)
    state = TrainState(small(()), trainable, opt_state, aux, small((2,)))
    step = jax.jit(
        make_train_step(objective, tx, run.seed),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, state), everywhere),
    )
    eval_step = jax.jit(evaluate.make_eval_step(objective), out_shardings=everywhere)
    text = getattr(objective, "text", objective)
    text_step = jax.jit(evaluate.make_eval_step(text), out_shardings=everywhere)
    if getattr(tx, "in_backward", False) and not getattr(objective, "precomputed", False):  # refused before anything is loaded
        jax.eval_shape(step, state, frozen, run.data.abstract(sharding.row_shards(mesh)))
    return Programs(t, mesh, objective, tx, schedule, state, frozen, step, eval_step, text_step)


def start_aux(run: Run, t: prepare.Trained, objective: Callable) -> Callable:
    """`aux of (trainable at step 0)`: what the objective keeps beside the parameters."""
    if not hasattr(objective, "start"):
        return lambda trainable: {}
    at_base = run.adapter is not None and run.start is None and prepare.only_pairs(t)
    return lambda trainable: objective.start(trainable, at_base)


def abstract(run: Run, devices_: list[Any] | None = None) -> tuple[Programs, Any]:
    """A run as shapes: its programs and one batch, the largest that the settings allow."""
    p = build(run, run.loop.steps or 1000, devices_)
    batch = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.batch_sharding(p.mesh, s.shape)),
        run.data.abstract(sharding.row_shards(p.mesh)),
    )
    return p, batch


def start(run: Run, p: Programs, restored: TrainState | None, base: Any = None) -> tuple[TrainState, Any]:
    """(state, frozen): weights loaded leaf by leaf, and at step 0 a fresh adapter and optimizer. A restored state has its own.

    base: the frozen base of another run, for one that trains nothing of it.
    """
    if base is None:
        base = prepare.load_base(run.weights, p.trained, p.mesh, frozen_only=restored is not None)
    whole = {"base": base}
    if run.adapter:
        whole["adapter"] = prepare.start_adapter(p.trained, p.mesh, run.seed, run.adapter, run.start)
    trainable, frozen = prepare.split(p.trained, whole)
    if restored is not None:
        return restored, frozen
    places = jax.tree.map(lambda s: s.sharding, p.state)
    aux = start_aux(run, p.trained, p.objective)
    fresh = lambda t: TrainState(jnp.int32(0), t, p.tx.init(t), aux(t), jnp.zeros(2, jnp.int32))  # noqa: E731
    return jax.jit(fresh, out_shardings=places, donate_argnums=0)(trainable), frozen


def compile_step(p: Programs, batch: Any) -> jax.stages.Compiled:
    """The train step for its one shape; another shape is an error afterwards, never a silent compile."""
    compiled = p.train_step.lower(p.state, p.frozen, _placed(p, batch)).compile()
    devices.trim_heap()
    return compiled


def compile_eval(p: Programs, step: jax.stages.Wrapped, frozen: Any, batches: tuple[Any, ...]) -> Callable:
    """`evaluated(state) -> numbers` of held-out batches, compiled for their one shape."""
    if not batches:
        return lambda state: {}
    compiled = step.lower(p.state.trainable, p.frozen, _placed(p, batches[0]), p.state.aux).compile()

    def on(state: TrainState) -> Callable:
        return lambda batch: compiled(state.trainable, frozen, sharding.place_batch(p.mesh, batch), state.aux)

    if step is p.text_step or not getattr(p.objective, "coupled", False):
        return lambda state: evaluate.evaluate(on(state), batches)
    shape = jax.eval_shape(step, p.state.trainable, p.frozen, batches[0], p.state.aux)
    many = lambda x: jax.ShapeDtypeStruct((len(batches) * x.shape[0], *x.shape[1:]), x.dtype)  # noqa: E731
    aux = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p.state.aux.get("loss", {}))
    objective: Any = p.objective
    judge = jax.jit(lambda seen, state: objective.judge(seen, {"loss": state})[1]).lower(jax.tree.map(many, shape), aux).compile()

    def together(state: TrainState) -> dict[str, float]:
        kept = jax.device_get(state.aux.get("loss", {}))
        return evaluate.evaluate_together(on(state), lambda seen: judge(seen, kept), batches)

    return together


def _placed(p: Programs, batch: Any) -> Any:
    place = lambda x: sharding.batch_sharding(p.mesh, x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), batch)


@dataclass(frozen=True)
class Job:
    """A run that may go: checked, locked, with its rows and its log."""

    run: Run
    steps: int
    programs: Programs
    tokenizer: Any
    source: Source
    general: tuple[Any, ...]
    saved: Checkpoints
    log: Log | Mute
    folder: Path
    record: dict[str, Any]


def run(r: Run, record: dict[str, Any], root: Path = Path("runs")) -> int:
    """Train, or go on where the run folder's newest checkpoint stands. Returns the process's exit code.

    record: the settings as JSON (describe.describe). 0: finished; 128 + n: stopped by signal n with everything saved.
    Raises ValueError, FileNotFoundError or OSError with one line that says what to change.
    """
    folder = runfolder.place(root, r.name)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(r.hosts))
        job, changes = distributed.agreed(lambda: _checked(stack, r, record, folder))
        if job is None:
            return 0
        restored = job.saved.restore(job.programs.state)
        job = distributed.agreed(lambda: _begun(stack, job, restored, changes))
        stack.enter_context(watchdog.over())
        return _go(job, restored, watchdog)


def _checked(stack: contextlib.ExitStack, r: Run, record: dict[str, Any], folder: Path) -> tuple[Job | None, list[str]]:
    """(the run, what has changed since it was started), the same on every process; no run where it is finished."""
    distributed.by_first(lambda: bool(stack.enter_context(runfolder.lock(folder))))
    stack.enter_context(jax.set_mesh(sharding.make_mesh(r.mesh)))
    tokenizer = weights.load_tokenizer(r.weights)
    shards = sharding.row_shards(sharding.make_mesh(r.mesh))
    source = distributed.first_then_others(lambda: r.source(r.data, tokenizer, shards=shards))
    general = report.general_source(r.data, r.general, tokenizer, shards)
    for each in (source, general):
        report.check_ids(each, r.model, r.weights)
    steps = r.loop.steps or source.steps
    p = build(r, steps)
    _placed(p, source.abstract)  # rows that don't divide over the mesh are refused before anything is loaded
    record = {**record, "data_fingerprint": source.fingerprint, **identity(r)}
    distributed.check_same(runfolder.shared_part(record), differences)
    saved = stack.enter_context(contextlib.closing(Checkpoints(folder / "checkpoints", r.loop.keep_last, r.loop.keep_best)))
    done, changes = distributed.by_first(lambda: runfolder.standing(folder, record, saved.latest() is not None))
    if done >= steps:
        if distributed.is_first():
            print(f"{folder}: this run is finished ({done} steps); its results are in {folder / 'README.md'}")
            print("to go on with it, raise loop.steps or data.epochs; to start anew, choose another name=...")
        return None, changes
    held_out = () if general is None else general.held_out
    return Job(r, steps, p, tokenizer, source, held_out, saved, Mute(), folder, record), changes


def _begun(stack: contextlib.ExitStack, job: Job, restored: Any, changes: list[str]) -> Job:
    """The run with its record written and its log open, on process 0; the opening lines are said."""
    r, p, folder, record, first = job.run, job.programs, job.folder, job.record, restored[2] if restored else 0
    if first > job.steps:
        raise ValueError(f"{folder}: the run is after step {first} already and loop.steps={job.steps}; raise it to go on")
    if restored:
        changes = runfolder.compare(folder, restored[1]["record"], record)
    if not distributed.is_first():
        return job
    runfolder.open_record(folder, record)
    log = stack.enter_context(contextlib.closing(Log(folder, job.steps, first, trackers=r.trackers)))
    how_held = prepare.changed_by_holding(r.weights, p.trained)
    how_held += prepare.started_elsewhere(r.start, record["weights_identity"], r.quant) if r.start else []
    for line in (*report.opening(p.trained, job.source, job.steps, first, changes), *how_held):
        log.message(line)
    log.listen(getattr(p.objective, "watch", None))
    return replace(job, log=log)


def identity(r: Run) -> dict[str, Any]:
    """What a run's record says about its weights, so that a continuation has the same: hashes, and where a folder lies."""
    known = {"weights_identity": runfolder.weights_identity(r.weights)}
    if Path(r.weights).exists():
        known["weights_at"] = str(Path(r.weights).resolve())
    if r.start:
        known["start_identity"] = runfolder.adapter_identity(prepare.adapter_folder(r.start))
    return known


def _go(job: Job, restored: tuple[TrainState, dict[str, Any], int] | None, watchdog: Watchdog) -> int:
    """Load and compile, look, train, look again, write the results."""
    r, p, source, log = job.run, job.programs, job.source, job.log
    watchdog.at("loading and compiling")
    if getattr(p.objective, "precomputed", False):
        def say(line: str) -> None:
            watchdog.at(line)
            log.message(line)

        source = with_reference(r, p, source, job.record, say)
    state, frozen = start(r, p, restored[0] if restored else None)
    begin = time.perf_counter()
    evaluated = compile_eval(p, p.eval_step, frozen, source.held_out)
    on_general = compile_eval(p, p.text_step, frozen, job.general)
    whole = tree.combine(p.state.trainable, p.frozen)
    kernel = attention.choose(p.mesh, r.model.config.head_dim, r.model.dtype)  # prompts are padded in front
    model = p.trained.model.with_attention(kernel)
    answer = samples.answerer(model, r.sampling, whole, source, job.tokenizer, r.samples)
    train_step = compile_step(p, source.abstract)
    distributed.meet()  # the first collectives give up where another process still compiles
    asked = f" and {r.samples} held-out prompts are answered" if source.held_out and r.samples else ""
    log.message(f"compiled in {time.perf_counter() - begin:.1f} s" + ("" if restored else f"; now the loss is measured{asked}"))

    def measure(state: TrainState) -> dict[str, float]:
        return {f"eval_{name}": value for name, value in evaluated(state).items()}

    def look(state: TrainState) -> dict[str, Any]:
        general = {"general_loss": on_general(state)["loss"]} if job.general else {}
        return {"metrics": {**measure(state), **general}, "samples": answer(tree.combine(state.trainable, frozen))}

    kept: dict[str, Any] = restored[1] if restored else {"before": look(state), "counters": None}
    before, first = kept["before"], restored[2] if restored else 0
    if not restored and before["metrics"]:
        log.step(0, before["metrics"], {})
    rates = np.asarray(jax.jit(jax.vmap(p.schedule))(jnp.arange(job.steps)))
    meter = report.Meter(p.trained, rates, source, r.loop.max_bad, kept["counters"])
    votes, stop = distributed.Votes(p.mesh), 0
    profile = r.loop.profile if distributed.is_first() else None
    with runfolder.Interrupt() as interrupt, contextlib.closing(report.Trace(profile, job.folder / "profile")) as trace:
        for step in range(first, job.steps):
            done = step + 1
            watchdog.step(done)
            trace.before(done)
            stopping = votes.cast(lambda: interrupt.signal)
            batch = source.batch(step, state)
            state, found = train_step(state, frozen, sharding.place_batch(p.mesh, batch))
            meter.add(step, batch, found)
            trace.after(done, state)
            if done % r.loop.log_every == 0 or done == job.steps:
                log.step(done, *meter.read())
            score = None
            if r.loop.eval_every and done % r.loop.eval_every == 0 and done < job.steps and source.held_out:
                watchdog.at(f"the evaluation after step {done}")
                with meter.aside():
                    numbers = measure(state)
                score = numbers["eval_loss"]
                log.step(done, numbers, {})
            stop = stopping()
            if done % r.loop.save_every == 0 or done == job.steps or score is not None or stop:
                meta = {"record": job.record, "counters": meter.counters(), "before": before}
                watchdog.at(f"saving after step {done}")
                job.saved.save(done, state, meta, score)
            if stop:
                break
        job.saved.wait()
    watchdog.at(f"what comes after step {done}")
    if stop:
        log.message(f"stopped by {runfolder.signal_name(stop)} after step {done}, saved; the same command goes on from here")
        distributed.meet()  # nobody leaves while another one saves
        return 128 + stop

    after = look(state)
    if after["metrics"]:
        log.step(job.steps, after["metrics"], {})
    out = report.export(p.trained, tree.combine(state.trainable, frozen), r, job.tokenizer, job.folder)
    better = report.better_step(job.saved, after["metrics"])
    if better is not None:
        del state
        best: Any = job.saved.restore(p.state, better)
        kept_at = report.export(p.trained, tree.combine(best[0].trainable, frozen), r, job.tokenizer, job.folder / "best")
        log.message(f"the held-out loss was lower after step {better} than at the end; the weights of that step are in {kept_at}")
    words: list[str] = getattr(p.objective, "words", lambda first, last: [])(log.first, log.last)
    if distributed.is_first():
        report.write_card(job, out, before, after, words)
        summary = {"steps": job.steps, "before": before, "after": after, "alarms": log.alarms}
        runfolder.write_json(job.folder / "summary.json", summary)
    distributed.meet()  # the run is finished for all or for none
    for line in report.closing(job, out, before, after, words):
        log.message(line)
    return 0


def with_reference(run: Run, p: Programs, source: Any, record: dict[str, Any], say: Callable[[str], None]) -> Any:
    """The pair source with the log-probs of the model at step 0, from disk where they were computed before."""
    objective = p.objective
    settings = describe(run.model) | ({"quant": describe(run.quant)} if run.quant else {})
    path = reference.place(reference.identity(record["weights_identity"], record.get("start_identity"), settings))

    def compute(batches: Any) -> Any:
        state, frozen = start(run, p, None)
        whole = tree.combine(state.trainable, frozen)
        one = lambda params, batch: objective.logps(params, jax.tree.map(lambda x: x[0], batch))  # type: ignore[attr-defined] # noqa: E731
        logps = jax.jit(one, out_shardings=sharding.replicated(p.mesh))
        for number, batch in enumerate(batches, 1):
            yield np.asarray(logps(whole, sharding.place_batch(p.mesh, batch)))[None]
            if number % 10 == 0 or number == len(batches):
                say(f"reference log-probs: {number} of {len(batches)} batches")

    return reference.attach(source, path, compute, say)
