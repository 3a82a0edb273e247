"""A run compiled for a machine that need not be here: what its programs take of a device, compute, move, and how long."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from jaxft import devices, hlo, prepare, report, sharding, traffic, train, tree
from jaxft.data import pairs
from jaxft.flops import Flops, flops
from jaxft.machines import Machine
from jaxft.programs import Programs, abstract
from jaxft.quant import is_qtensor
from jaxft.roofline import ASSUMED, Estimate, by_kind, estimate

GIB = 2**30


@dataclass(frozen=True)
class Program:
    """One of a run's programs. trace() -> jax.stages.Traced; batch: what it works on beside what is resident."""

    name: str
    trace: Callable[[], Any]
    batch: Any


@dataclass(frozen=True)
class Plan:
    """What a program takes of each device, in bytes, and does in a step.

    parts: by what it holds. limit: what the device has for it, None where that isn't known. missing: None where it fits. total is
    None where the compiler gave up and didn't say how much it needs. host: bytes in the host's memory for each device. notes:
    what else is to be said of the run.
    """

    machine: str
    devices: int
    program: str
    parts: dict[str, int]
    total: int | None
    limit: int | None
    missing: int | None
    host: int
    flops: Flops
    collectives: dict[str, dict[str, float]]
    memory_traffic: float
    unknown_loops: int
    estimate: Estimate | None
    compile_seconds: float
    from_cache: bool
    largest: dict[str, int]
    gpu: bool = False
    why: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it fits the device, as far as that is known."""
        return self.missing is None

    def json(self) -> dict[str, Any]:
        """All of it as plain values."""
        each = {"flops_per_token": self.flops.model / self.flops.tokens, "fits": self.fits, "assumed": ASSUMED}
        return {**asdict(self), **each}


def programs(run: train.Run, p: Programs, batch: Any) -> list[Program]:
    """The run's programs that could be its largest. The weights and the optimizer's state are there in each of them."""
    return [Program("train step", lambda: p.train_step.trace(p.state, p.frozen, batch), batch)]


def plan(run: train.Run, machine: Machine) -> Plan:
    """The plan of the program of the run that takes most memory.

    Raises ValueError for a mesh or a batch that the run can't have on this machine.
    """
    p, batch = abstract(run, machine.devices)
    if getattr(p.objective, "precomputed", False) and isinstance(run.data, pairs.PairRows):
        shapes = pairs.abstract_pairs(run.data, sharding.row_shards(p.mesh), reference=True)
        place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.batch_sharding(p.mesh, s.shape))  # noqa: E731
        batch = jax.tree.map(place, shapes)
    machine = replace(machine, devices=list(p.mesh.devices.flat))  # in the order in which a program numbers them
    with jax.set_mesh(p.mesh):
        found = [_planned(run, p, machine, program) for program in programs(run, p, batch)]
    return max(found, key=lambda one: math.inf if one.total is None else one.total)


def _planned(run: train.Run, p: Programs, machine: Machine, program: Program) -> Plan:
    traced = program.trace()
    counts = flops(run, p, program.batch, traced)
    notes = tuple(report.unfilled(run.data, sharding.row_shards(p.mesh)))
    limit = machine.chip.memory - machine.chip.kept if machine.chip else None
    parts = resident(p)
    with _cache_hits() as hits:
        begin = time.perf_counter()
        try:
            compiled = traced.lower().compile()
        except RuntimeError as error:  # libtpu's compiler refuses what doesn't fit, and says by how much
            needed = too_much(str(error))
            if needed is None:
                raise
            total, missing = needed
            room = limit if total is None or missing is None else total - missing
            return Plan(
                machine=machine.name, devices=len(machine.devices), program=program.name, parts=parts, total=total, limit=room,
                missing=missing or 0, host=0, flops=counts, collectives={}, memory_traffic=0.0, unknown_loops=0, estimate=None,
                compile_seconds=time.perf_counter() - begin, from_cache=False, largest={}, why=_first_line(str(error)),
                notes=notes,
            )  # fmt: skip
        seconds = time.perf_counter() - begin
    devices.trim_heap()
    memory: Any = compiled.memory_analysis()
    parts["batch and counters"] = max(0, memory.argument_size_in_bytes - sum(parts.values()))
    parts["activations and temporaries"] = memory.temp_size_in_bytes
    parts["results that reuse no argument"] = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    parts["the program itself"] = memory.generated_code_size_in_bytes
    total = sum(parts.values())
    text = compiled.as_text() or ""
    module = hlo.parse(text)
    found = traffic.collectives(module, machine.places())
    moved = traffic.memory_bytes(module)
    guess = None
    if machine.chip is not None:
        peak = devices.peak_flops(machine.devices[0])
        guess = estimate(machine, (counts.model, counts.program), moved, found, peak)
    return Plan(
        machine=machine.name, devices=len(machine.devices), program=program.name,
        parts={name: size for name, size in parts.items() if size}, total=total, limit=limit,
        missing=total - limit if limit is not None and total > limit else None,
        host=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes, flops=counts,
        collectives=by_kind(found), memory_traffic=moved, unknown_loops=len(module.unknown_loops), estimate=guess,
        compile_seconds=seconds, from_cache=bool(hits), largest=largest(module),
        gpu=machine.devices[0].platform in ("gpu", "cuda"), notes=notes,
    )  # fmt: skip


def resident(p: Programs) -> dict[str, int]:
    """Bytes a device of what is there in every program: weights, what of them is packed, adapters, optimizer, references."""
    sizes = {"weights": 0, "quantised base": 0, "adapters": 0}
    for side in (p.state.trainable, p.frozen):
        for path, leaf in tree.paths(side, is_qtensor).items():
            packed = "quantised base" if p.trained.held[path].quantised else "weights"
            name = packed if prepare.in_base(path) else "adapters"
            sizes[name] += _held(leaf)
    return {**sizes, "optimizer": _held(p.state.opt_state), "reference and the like": _held(p.state.aux)}


def _held(arrays: Any) -> int:
    """Bytes a device of arrays with their shardings; 4-bit elements take half a byte."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * hlo.bits(_short(x.dtype)) // 8 for x in leaves)


def _short(dtype: Any) -> str:
    """A dtype with its bits as hlo.bits reads them: int4 and uint4 are half a byte, whatever itemsize says."""
    return "s4" if dtype.name in ("int4", "uint4") else f"u{8 * dtype.itemsize}"


@contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Fills with what the persistent compilation cache gave meanwhile."""
    hits: list[str] = []

    def hear(event: str, **_: Any) -> None:
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(hear)
    try:
        yield hits
    finally:
        if hasattr(jax.monitoring, "unregister_event_listener"):
            jax.monitoring.unregister_event_listener(hear)


def too_much(text: str) -> tuple[int | None, int | None] | None:
    """(bytes needed, bytes missing) of a compiler's complaint that a program doesn't fit; None for another complaint.

    libtpu: "Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G."
    """
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text)
    by = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT]?)", text)
    return _size(used[1], used[2]) if used else None, _size(by[1], by[2]) if by else None


def _size(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def _first_line(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())[:300]


def largest(program: hlo.Program, count: int = 5) -> dict[str, int]:
    """Bytes of the largest arrays that a compiled program makes beside its arguments, by dtype and shape.

    What only a fusion names is never in memory, and what only gives an array another name or shape makes none.
    """
    made: dict[str, int] = {}
    given: set[str] = set()
    for one, where, _, fused in hlo.walk(program):
        if fused:
            continue
        names = {f"{x.dtype}[{','.join(map(str, x.shape))}]": x.bytes for x in one.arrays}
        if one.opcode == "parameter" and where == program.entry:
            given |= names.keys()
        elif one.opcode not in traffic.FREE and not one.opcode.endswith("-start"):  # whose type holds the operands again
            made |= names
    return dict(sorted(((n, s) for n, s in made.items() if n not in given), key=lambda item: -item[1])[:count])
