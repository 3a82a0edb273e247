"""Compile a run's programs for a machine and return their memory, FLOPs, traffic and estimated time."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax

from jaxft.data.pairs import PairSource
from jaxft.distributed import sharding, threads, xla_flags
from jaxft.models.heads import TEACHER
from jaxft.plan import hlo, memory, traffic
from jaxft.plan.flops import Flops, flops
from jaxft.plan.machines import Machine
from jaxft.plan.programs import Program, all_programs, train_programs
from jaxft.plan.roofline import ASSUMED, Estimate, by_kind, estimate
from jaxft.runs.run_texts import empty_slot_lines
from jaxft.train.programs import Programs, abstract, step_rows
from jaxft.train.settings import Run
from jaxft.train.start.attention_kernels import attention_summary

EFFORT = "jax_exec_time_optimization_effort"  # -1 to 1
SAMPLER = "key/value cache and tokens"
PROGRAM_PARTS = (  # in addition to memory.resident
    SAMPLER,
    "batch and counters",
    "activations and temporaries",
    "outputs without donated arguments",
    "program code",
)


@dataclass(frozen=True)
class Plan:
    """Memory per device in bytes, FLOPs, traffic and estimated time of one program.

    parts: bytes by kind. total: their sum; None if the compiler ran out of memory without reporting a size.
    limit: bytes that a device has for the program, None if unknown. missing: None if the program fits.
    host: bytes in host memory per device. flops, estimate: None for programs other than train steps.
    why: the compiler's out-of-memory error. notes: further lines of the report.
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
    """Compile with the least or with the default optimisation effort, which only libtpu supports."""
    jax.config.update(EFFORT, -1.0 if quick else 0.0)


def plan(run: Run, machine: Machine, pairs: PairSource | None = None) -> Plan:
    """Return the plan of the train step, or of the largest one if there are several.

    pairs: the source of preference rows, see train_programs. Raises ValueError for a mesh or batch that this
    machine does not support.
    """
    return plans(run, machine, partial(train_programs, pairs=pairs))[0]


def plans(
    run: Run, machine: Machine, select: Callable[[Run, Programs], list[Program]] = all_programs
) -> list[Plan]:
    """Return a plan of each program that `select` returns, largest first. Raises like `plan`."""
    p, _ = abstract(run, machine.devices)
    # in mesh order, as HLO numbers devices
    machine = replace(machine, devices=list(p.mesh.devices.flat))
    with jax.set_mesh(p.mesh):
        found = [_plan_program(run, p, machine, program) for program in select(run, p)]
    return sorted(found, key=lambda one: -math.inf if one.total is None else -one.total)


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
            *memory.replicated_weights(p),
            *quick_notes(machine),
            *machine.notes,
        ),
        "gpu": machine.platform == xla_flags.CUDA,
    }
    resident = memory.resident(p, run)
    if program.state is not None:
        resident[SAMPLER] = memory.device_bytes(program.state)
    with _cache_hits() as hits:
        begin = time.perf_counter()
        try:
            compiled = _compile(traced, machine.platform)
        except RuntimeError as error:  # libtpu's compiler refuses programs that do not fit
            needed = memory.parse_out_of_memory(str(error))
            if needed is None:
                raise
            seconds = time.perf_counter() - begin
            return _oom_plan(common, resident, needed, (seconds, str(error)))
        seconds = time.perf_counter() - begin
    threads.trim_heap()
    return _compiled_plan(common, resident, compiled, machine, (seconds, bool(hits)))


def _compile(traced: jax.stages.Traced, platform: str) -> jax.stages.Compiled:
    """Compile a program with the settings that a run's process on this platform has."""
    flags, config = xla_flags.compiler_settings(platform, os.environ)
    before = {name: getattr(jax.config, name) for name in config}
    for name, value in config.items():
        jax.config.update(name, value)
    try:
        return traced.lower().compile(compiler_options=dict(flags) or None)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def quick_notes(machine: Machine) -> tuple[str, ...]:
    """Return a note if programs for this machine are compiled with the least optimisation effort."""
    quick = getattr(jax.config, EFFORT) < 0 and machine.tpu
    note = (
        "compiled with --quick: start the run with JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 to get this program; "
        "otherwise it may need more memory"
    )
    return (note,) if quick else ()


def _oom_plan(
    common: dict[str, Any],
    resident: dict[str, int],
    needed: tuple[int | None, int | None],
    took: tuple[float, str],
) -> Plan:
    """Return the plan of a program that does not fit. needed: its total and missing bytes, if reported."""
    (total, missing), (seconds, error) = needed, took
    limit = common["limit"] if total is None or missing is None else total - missing
    return Plan(
        **{**common, "limit": limit}, parts=resident, total=total, missing=missing or 0, host=0,
        collectives={}, memory_traffic=0.0, unknown_loops=0, estimate=None, compile_seconds=seconds,
        from_cache=False,
        largest_arrays={}, why=_first_line(error),
    )  # fmt: skip


def _compiled_plan(
    common: dict[str, Any],
    resident: dict[str, int],
    compiled: jax.stages.Compiled,
    machine: Machine,
    compilation: tuple[float, bool],
) -> Plan:
    """Return the plan of a compiled program. compilation: its seconds, and whether it came from the cache."""
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
    moves = traffic.collectives(module, machine.domains())
    moved = traffic.memory_bytes(module)
    time_estimate = None
    if machine.chip is not None and counts is not None:
        peak, fp8 = machine.peak, machine.peak_fp8
        pair = counts.model, counts.program
        time_estimate = estimate(machine, pair, moved, moves, peak, (counts.fp8, fp8))
    return Plan(
        **common, parts={name: size for name, size in parts.items() if size or name == TEACHER}, total=total,
        missing=total - limit if limit is not None and total > limit else None,
        host=analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes,
        collectives=by_kind(moves), memory_traffic=moved, unknown_loops=len(module.unknown_loops),
        estimate=time_estimate, compile_seconds=compilation[0], from_cache=compilation[1],
        largest_arrays=memory.largest_arrays(module),
    )  # fmt: skip


@contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Collect the persistent compilation cache's hits while the context is open."""
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


def _first_line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())[:300]
