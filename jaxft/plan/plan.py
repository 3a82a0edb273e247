"""Compile a run's programs for a machine and return their memory, FLOPs, traffic and estimated time.

The programs are traced for abstract arrays of the largest shapes that the run's settings allow. The time of a
step is a roofline of FLOPs, memory traffic and collectives.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.data.pairs import PairRows, PairSource
from jaxft.data.prompts import padded_length, rollout_batch_shapes
from jaxft.distributed import sharding, threads, xla_flags
from jaxft.distributed.exit import shorten_error
from jaxft.engine.programs import program_tracers
from jaxft.engine.state import Decoding, Slots, slots_for, state_shapes
from jaxft.models.adapted import TEACHER
from jaxft.nn import tree
from jaxft.nn.tree import Batch, Params
from jaxft.plan import hlo, program_bytes
from jaxft.plan.machines import Machine
from jaxft.plan.program_bytes import COLLECTIVES, Collective
from jaxft.rl.online_pairs import OnlinePairs
from jaxft.rl.reward_models import HeadReward, head_scores
from jaxft.rl.rollout_layout import score_tokens
from jaxft.rl.rollout_sampler import engine_sizes
from jaxft.rl.rollout_source import Rollouts
from jaxft.runs.run_texts import empty_slot_lines
from jaxft.train import programs
from jaxft.train.evaluate import evaluate
from jaxft.train.programs import Programs, abstract, reference_step, sharded_batch, step_rows
from jaxft.train.settings import Run
from jaxft.train.start.attention_kernels import attention_summary

MATMULS, MEMORY, LINKS = 0.7, 0.8, 0.8  # fractions of the data sheets' rates that good programs reach
ASSUMED = (
    f"matmuls at {MATMULS} of peak FLOP/s, main memory at {MEMORY} and links at {LINKS} of peak bandwidth; "
    "matmuls, memory traffic and asynchronous collectives overlap completely, other collectives not at all; "
    "no launch gaps"
)


@dataclass(frozen=True)
class Estimate:
    """Estimated times of a step in seconds: step = max(compute, memory, overlapped) + exposed.

    compute, memory: seconds of the matmuls and of the memory traffic alone.
    overlapped, exposed: seconds of collectives that run during matmuls, and of all other collectives.
    weights: seconds of the collectives that gather weights and scatter gradients, overlapped or exposed.
    serial: seconds of a step in which nothing overlaps.
    bottleneck: name of the part that takes the longest, such as "matmuls" or "exposed weight gathers".
    mfu, hfu: Flops.model and Flops.program per second, as fractions of the peak FLOP/s of bfloat16.
    without_fp8: seconds of the matmuls if those in FP8 ran in bfloat16.
    """

    compute: float
    memory: float
    overlapped: float
    exposed: float
    weights: float
    step: float
    serial: float
    bottleneck: str
    mfu: float
    hfu: float
    without_fp8: float


def estimate(
    machine: Machine,
    flops: tuple[float, float],
    moved: float,
    moves: Sequence[Collective],
    peak: float,
    fp8: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Estimate the time of a step.

    flops: Flops.model and Flops.program; moved: bytes of main memory traffic per device; moves: the step's
    collectives; peak: bfloat16 FLOP/s per device. fp8: Flops.fp8, and the peak FLOP/s of FP8 per device.
    Raises ValueError for a machine whose chip is not in machines.CHIPS.
    """
    if machine.chip is None:
        raise ValueError(f"{machine.name}: the chip's speed is unknown; add it to jaxft.plan.machines.CHIPS")
    count = len(machine.devices)
    without_fp8 = flops[1] / (count * peak * MATMULS)
    compute = without_fp8 - fp8[0] * (1 / peak - 1 / fp8[1]) / (count * MATMULS) if fp8[0] else without_fp8
    memory = moved / (machine.chip.memory_rate * MEMORY)
    took = [(c, seconds(machine, c)) for c in moves]
    overlapped = sum(s for c, s in took if c.overlapped)
    exposed = sum(s for c, s in took if not c.overlapped)
    weights = sum(s for c, s in took if c.gathers_or_scatters)
    parts = {"matmuls": compute, "memory": memory, "overlapped weight gathers": overlapped}
    bottleneck = max(parts, key=lambda name: parts[name])
    step = parts[bottleneck] + exposed
    if exposed > parts[bottleneck]:
        mostly_weights = weights - overlapped > exposed / 2
        bottleneck = "exposed weight gathers" if mostly_weights else "activation collectives"
    mfu, hfu = (n / (step * count * peak) for n in flops)
    serial = compute + memory + overlapped + exposed
    return Estimate(
        compute, memory, overlapped, exposed, weights, step, serial, bottleneck, mfu, hfu, without_fp8
    )


def seconds(machine: Machine, c: Collective) -> float:
    """Return the seconds of all executions of a collective in a step.

    Its traffic within hosts or slices and its traffic between them do not overlap. A permutation takes as
    long as its slowest pair.
    """
    chip = machine.chip
    assert chip is not None
    across = c.moved if c.kind == "collective-permute" and c.span > 1 else c.across
    within = (c.moved - across) / (chip.within * machine.axes(c.groups[0] if c.groups else ()) * LINKS)
    return c.times * (within + across / (chip.across * LINKS))


def by_kind(moves: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """Return the totals of each kind of collective, such as "all-gather", in a step.

    Keys of a kind's totals: runs: executions. within, across: bytes that a device sends inside its host or
    slice, and to other hosts or slices. as_all_reduce: executions that the compiler implements as
    all-reduces; absent if 0.
    """
    table: dict[str, dict[str, float]] = {}
    for kind in COLLECTIVES:
        if same := [c for c in moves if c.kind == kind]:
            within = sum(c.times * (c.moved - c.across) for c in same)
            across = sum(c.times * c.across for c in same)
            table[kind] = {"runs": sum(c.times for c in same), "within": within, "across": across}
            as_all_reduce = sum(c.times for c in same if c.as_all_reduce)
            table[kind] |= {"as_all_reduce": as_all_reduce} if as_all_reduce else {}
    return table


FP8 = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@dataclass(frozen=True)
class Flops:
    """FLOPs and tokens of one train step, summed over all devices.

    tokens: tokens of the run's largest batch, with every row at the maximum length.
    slots: token slots of the program; more than `tokens` if the batch does not fill the sharded rows.
    model: FLOPs that the algorithm needs, which MFU counts: forward passes times 2 (frozen base) or 3
    (trained base), plus the forward pass of a reference or teacher in the step; for filled rows only.
    program: FLOPs of all matmuls that run, including recomputation and empty rows, which HFU counts.
    fp8: the part of `program` in FP8.
    Attention kernels skip masked blocks and are not in the jaxpr. Both counts use the model's formula for
    them: causal attention over the full row.
    """

    tokens: int
    slots: int
    model: float
    program: float
    fp8: float = 0.0

    @property
    def empty_fraction(self) -> float:
        """The fraction of the token slots that are empty."""
        return 1 - self.tokens / self.slots


def flops(run: Run, p: programs.Programs, batch: Batch, traced: jax.stages.Traced) -> Flops:
    """Count the FLOPs of a train step. Call it in the context of the mesh, `jax.set_mesh(p.mesh)`.

    p: the run's programs. traced: the train step. batch: shapes [micro, rows, ...] for which it is traced.
    """
    micro, count, length = batch.ids.shape
    slots, model = micro * count * length, p.partition.model
    rows = programs.step_rows(run.data, sharding.row_shards(p.mesh))
    filled = rows.filled / rows.slots
    microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    params = tree.combine(p.state.trainable, p.frozen)
    loss = jax.make_jaxpr(lambda params, batch: p.objective(params, batch, None, p.state.aux)[0])
    forward = micro * matmul_flops(loss(params, microbatch).jaxpr)
    plain = model.forward_flops(slots, 0)
    attention = model.forward_flops(slots, length) - plain
    second, second_attention = 0.0, 0.0
    if model.teacher is not None:
        second = model.teacher.forward_flops(slots, 0, micro * count * batch.read.shape[-1])
        second_attention = model.teacher.forward_flops(slots, length) - model.teacher.forward_flops(slots, 0)
    forwards = max(1, round((forward - second) / plain))  # 2 with a live reference
    passes = forwards + (2 if any(jax.tree.leaves(p.partition.mask["base"])) else 1)
    useful = min(plain, (forward - second) / forwards) * passes + second  # less without a loss at some
    done = max(useful, matmul_flops(traced.jaxpr.jaxpr))
    all_attention = passes * attention + second_attention
    program_flops = done + all_attention * done / useful
    fp8 = matmul_flops(traced.jaxpr.jaxpr, is_fp8)
    return Flops(round(slots * filled), slots, (useful + all_attention) * filled, program_flops, fp8)


def is_fp8(eqn: Any) -> bool:
    """Whether all operands of an equation are in FP8."""
    return all(jnp.dtype(x.aval.dtype) in FP8 for x in eqn.invars)


def matmul_flops(jaxpr: Any, counts: Callable[[Any], bool] | None = None) -> float:
    """Return the FLOPs of a jaxpr's matmuls, summed over all devices.

    counts(equation): whether a matmul is included; None for all. A scan counts once per iteration, a
    conditional as its most expensive branch. Kernels and while loops are skipped; in jaxft they contain only
    attention.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general" and (counts is None or counts(eqn)):
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr, counts) for branch in eqn.params["branches"])
        elif name not in ("while", "pallas_call"):
            times = eqn.params["length"] if name == "scan" else 1
            times *= eqn.params["mesh"].size if name == "shard_map" else 1
            total += times * sum(matmul_flops(inner, counts) for inner in _inner_jaxprs(eqn.params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


@dataclass(frozen=True)
class Program:
    """One program of a run.

    trace() traces it, for compilation. batch: shapes of a train step's batch, None for other programs. state:
    shapes of the rows that a sampler has in progress (key/value cache and tokens), None for other programs.
    """

    name: str
    trace: Callable[[], jax.stages.Traced]
    batch: Batch = None
    state: Any = None


def train_programs(run: Run, p: Programs, pairs: PairSource | None = None) -> list[Program]:
    """Return the train step of a run, in a list. pairs: an open source of its preference rows, which knows
    the shape of their batches; None to use the largest shape that the settings allow.
    """
    batch: Any = run.data.abstract(sharding.row_shards(p.mesh))
    if pairs is not None:
        batch = pairs.layout.shapes(_precomputed(run, p))
    elif _precomputed(run, p) and isinstance(run.data, PairRows):
        batch = run.data.abstract(sharding.row_shards(p.mesh), reference=True)
    batch = sharded_batch(p, p.objective.batch_spec(batch))
    return [Program("train step", lambda: p.train_step.trace(p.state, p.frozen, batch), batch)]


def all_programs(run: Run, p: Programs) -> list[Program]:
    """Return the train step and all other programs of a run.

    As far as the run's settings ask for them, these are evaluation, sample completions, evaluation on the
    text of Run.general, precomputed reference log-probs, and for rollouts sampling, log-probs and reward
    heads.
    """
    shards, params = sharding.row_shards(p.mesh), tree.combine(p.state.trainable, p.frozen)
    (first,) = listed = train_programs(run, p)

    def add(name: str, step: Any, batch: Batch) -> None:
        one = _one_microbatch(batch)
        args = (p.state.trainable, p.frozen)
        listed.append(Program(name, lambda: step.trace(*args, sharded_batch(p, one), p.state.aux)))

    if isinstance(run.data, Rollouts):
        listed += _rollout_programs(run, p, params, first.batch)
    elif run.data.holds_out:
        add("evaluation", p.eval_step, first.batch)
        if run.samples:
            stop = tuple(run.model.config.eos)
            decoding = Decoding(p.partition.model, run.sampling, stop)
            slots = slots_for(run.samples, 1, run.data.max_length)
            listed += _sampling("sample completions", p, params, decoding, slots)
    if run.general is not None and p.objective.text is not None:  # otherwise it is the evaluation program
        add("general text", p.text_step, evaluate.general_rows(run.data, run.general).abstract(shards))
    if _precomputed(run, p):
        plain = _one_microbatch(run.data.abstract(shards))
        listed.append(
            Program("reference log-probs", lambda: reference_step(p).trace(params, sharded_batch(p, plain)))
        )
    return listed


def _one_microbatch(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)


def _rollout_programs(run: Run, p: Programs, params: Params, batch: Batch) -> list[Program]:
    """Return the programs of rollouts: sampling, log-probs with the training program, and reward heads."""
    data: Any = run.data
    size, stop = padded_length(data.max_prompt), tuple(run.model.config.eos)
    d, slots = engine_sizes(data, p.partition.model, stop, data.group, size, p.mesh)
    listed = _sampling("rollout sampling", p, params, d, slots)
    if not isinstance(data, OnlinePairs):
        logps: Any = jax.jit(partial(score_tokens, p.objective))
        listed.append(Program("rollout log-probs", lambda: logps.trace(params, p.state.aux, batch)))
    else:  # it samples groups and trains on pairs
        shape = data.group_row_shape(data.max_prompt)
        batch = sharded_batch(p, rollout_batch_shapes(data, shape, sharding.row_shards(p.mesh)))
    for reward in data.rules.rewards:
        if isinstance(reward, HeadReward):
            score: Any = jax.jit(partial(head_scores, p.partition.model, reward))
            trace = partial(score.trace, params, p.state.aux, batch)
            listed.append(Program(f"reward head {reward.name}", trace))
    return listed


def _sampling(name: str, p: Programs, params: Params, d: Decoding, slots: Slots) -> list[Program]:
    """Return the two programs of a sampler that need the most memory: the prefill of the longest prompt, and
    decoding that reads all keys of the cache. name: the decoding program's name, such as "rollout sampling".
    """
    tracers = program_tracers(d, params, slots, p.mesh)
    start = max((key for key in tracers if key[0] == "start"), key=lambda key: key[3])
    decode = max(key for key in tracers if key[0] == "decode")
    state = state_shapes(d, slots, slots.rows, p.mesh)
    prefill = Program(f"{name}: prefill", tracers[start], state=state)
    return [prefill, Program(name, tracers[decode], state=state)]


def _precomputed(run: Run, p: Programs) -> bool:
    return p.objective.facts.reference == "precomputed" and isinstance(run.data, PairRows)


EFFORT = "jax_exec_time_optimization_effort"  # -1 to 1
SAMPLER = "key/value cache and tokens"
PROGRAM_PARTS = (  # in addition to program_bytes.resident
    SAMPLER,
    "batch and counters",
    "activations and temporaries",
    "outputs without donated arguments",
    "program code",
)


@dataclass(frozen=True)
class Plan:
    """Memory per device in bytes, FLOPs, traffic and estimated time of one program.

    machine, program: names. devices: how many. parts: bytes by kind, such as "weights"; only the resident
    arrays if the compiler ran out of memory. total: the sum of `parts`, or then the compiler's figure, None
    if it reports none. limit: bytes that a device has for the program, None if unknown. missing: bytes above
    the limit, 0 if the compiler does not report how many; None if the program fits or the limit is unknown.
    host: bytes in host memory per device. flops, estimate: None for programs other than train steps; estimate
    also for an unknown chip or after an out-of-memory error. collectives: see by_kind. memory_traffic: bytes
    of main memory that a step reads and writes per device. unknown_loops: how many loops count as one
    iteration, as their length is unknown. from_cache: whether the program came from jax's compilation cache.
    largest_arrays: bytes by dtype and shape, such as "bf16[8,128]". gpu: whether the devices are NVIDIA or
    AMD GPUs. why: the compiler's out-of-memory error, None without one. notes: further lines of the report.
    """

    machine: str
    devices: int
    program: str
    parts: dict[str, int]
    total: int | None
    limit: int | None
    missing: int | None
    host: int
    flops: Flops | None
    collectives: dict[str, dict[str, float]]
    memory_traffic: float
    unknown_loops: int
    estimate: Estimate | None
    compile_seconds: float
    from_cache: bool
    largest_arrays: dict[str, int]
    gpu: bool = False
    why: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the program fits the device, or the limit is unknown."""
        return self.missing is None

    def json(self) -> dict[str, Any]:
        """Return all fields as plain values, with FLOPs per token and the assumptions of the estimate."""
        per_token = self.flops.model / self.flops.tokens if self.flops else None
        return {**asdict(self), "flops_per_token": per_token, "fits": self.fits, "assumed": ASSUMED}


def set_quick(quick: bool) -> None:
    """Set how hard XLA optimises: as little as possible if `quick`, else the default. Affects only TPUs."""
    jax.config.update(EFFORT, -1.0 if quick else 0.0)


def plan(run: Run, machine: Machine, pairs: PairSource | None = None) -> Plan:
    """Return the plan of the train step. pairs: an open source of preference rows, see train_programs.

    Raises ValueError if the run's mesh or batch does not divide over the machine's devices.
    """
    return plans(run, machine, partial(train_programs, pairs=pairs))[0]


def plans(
    run: Run, machine: Machine, select: Callable[[Run, Programs], list[Program]] = all_programs
) -> list[Plan]:
    """Return the plans of the programs of select(run, programs), largest total first; raises like `plan`."""
    p, _ = abstract(run, machine.devices)
    # in mesh order, as HLO numbers devices
    machine = replace(machine, devices=list(p.mesh.devices.flat))
    with jax.set_mesh(p.mesh):
        planned = [_plan_program(run, p, machine, program) for program in select(run, p)]
    return sorted(planned, key=lambda item: -math.inf if item.total is None else -item.total)


def _plan_program(run: Run, p: Programs, machine: Machine, program: Program) -> Plan:
    traced = program.trace()
    common: dict[str, Any] = {
        "machine": machine.name,
        "devices": len(machine.devices),
        "program": program.name,
        "limit": machine.chip.memory - machine.chip.reserved if machine.chip else None,
        "flops": None if program.batch is None else flops(run, p, program.batch, traced),
        "notes": (
            *([] if program.batch is None else [attention_summary(p, program.batch)]),
            *empty_slot_lines(step_rows(run.data, sharding.row_shards(p.mesh))),
            *program_bytes.replicated_weights(p),
            *quick_notes(machine),
            *machine.notes,
        ),
        "gpu": machine.platform == xla_flags.CUDA,
    }
    resident = program_bytes.resident(p, run)
    if program.state is not None:
        resident[SAMPLER] = program_bytes.device_bytes(program.state)
    with _cache_hits() as hits:
        begin = time.perf_counter()
        try:
            compiled = _compile(traced, machine.platform)
        except RuntimeError as error:  # libtpu's compiler refuses programs that do not fit
            needed = program_bytes.parse_out_of_memory(str(error))
            if needed is None:
                raise
            common |= {"compile_seconds": time.perf_counter() - begin, "from_cache": False}
            return _oom_plan(common, resident, needed, str(error))
        common |= {"compile_seconds": time.perf_counter() - begin, "from_cache": bool(hits)}
    threads.trim_heap()
    return _compiled_plan(common, resident, compiled, machine)


def _compile(traced: jax.stages.Traced, platform: str) -> jax.stages.Compiled:
    """Compile a program with the compiler flags and jax settings that a run has on `platform`."""
    flags, config = xla_flags.compiler_settings(platform, os.environ)
    before = {name: getattr(jax.config, name) for name in config}
    for name, value in config.items():
        jax.config.update(name, value)
    try:
        return traced.lower().compile(compiler_options=dict(flags) or None)
    except OverflowError as error:
        raise ValueError("the batch has more than 2^31 - 1 positions; lower data.batch") from error
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def quick_notes(machine: Machine) -> tuple[str, ...]:
    """Return (note,) if set_quick(True) holds and affects this machine, else ()."""
    quick = getattr(jax.config, EFFORT) < 0 and machine.tpu
    note = (
        "compiled with --quick: start the run with JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 to get this program; "
        "otherwise it may need more memory"
    )
    return (note,) if quick else ()


def _oom_plan(
    common: dict[str, Any], resident: dict[str, int], needed: tuple[int | None, int | None], error: str
) -> Plan:
    """Return the plan of a program that the compiler refuses, as it does not fit.

    common: fields of Plan that do not depend on the result. resident: bytes by kind, see
    program_bytes.resident. needed: total bytes and bytes above the limit, None if the error lacks them.
    """
    total, missing = needed
    limit = common["limit"] if total is None or missing is None else total - missing
    return Plan(
        **{**common, "limit": limit}, parts=resident, total=total, missing=missing or 0, host=0,
        collectives={}, memory_traffic=0.0, unknown_loops=0, estimate=None, largest_arrays={},
        why=shorten_error(error.split("\n\n")[0]),
    )  # fmt: skip


def _compiled_plan(
    common: dict[str, Any], resident: dict[str, int], compiled: jax.stages.Compiled, machine: Machine
) -> Plan:
    """Return the plan of a compiled program. common, resident: see _oom_plan."""
    analysis: Any = compiled.memory_analysis()
    sizes = (
        max(0, analysis.argument_size_in_bytes - sum(resident.values())),
        analysis.temp_size_in_bytes,
        max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        analysis.generated_code_size_in_bytes,
    )
    parts = {**resident, **dict(zip(PROGRAM_PARTS[1:], sizes, strict=True))}
    total, limit, counts = sum(parts.values()), common["limit"], common["flops"]
    module = hlo.parse_hlo(compiled.as_text() or "")
    moves = program_bytes.collectives(module, machine.domains())
    moved = program_bytes.memory_bytes(module)
    time_estimate = None
    if machine.chip is not None and counts is not None:
        pair, fp8 = (counts.model, counts.program), (counts.fp8, machine.peak_fp8)
        time_estimate = estimate(machine, pair, moved, moves, machine.peak, fp8)
    return Plan(
        **common, parts={name: size for name, size in parts.items() if size or name == TEACHER}, total=total,
        missing=total - limit if limit is not None and total > limit else None,
        host=analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes,
        collectives=by_kind(moves), memory_traffic=moved, unknown_loops=len(module.unknown_loops),
        estimate=time_estimate, largest_arrays=program_bytes.largest_arrays(module),
    )  # fmt: skip


@contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Yield a list that gets an item per hit of jax's compilation cache while the context is open."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        if hasattr(jax.monitoring, "unregister_event_listener"):
            jax.monitoring.unregister_event_listener(listen)
