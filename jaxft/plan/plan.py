"""A run compiled for a machine that need not be here: what its programs take of a device, compute, move, and how long."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from jaxft import tree
from jaxft.distributed import devices, sharding
from jaxft.nn.quant import is_qtensor
from jaxft.plan import hlo, traffic
from jaxft.plan.flops import Flops, flops
from jaxft.plan.machines import Machine
from jaxft.plan.programs import Program, every, steps
from jaxft.plan.roofline import ASSUMED, Estimate, by_kind, estimate
from jaxft.rl.rollout import Rollouts
from jaxft.runs.report import empty_slot_lines
from jaxft.train.programs import Programs, abstract, step_rows
from jaxft.train.settings import Run
from jaxft.weights import storage

GIB = 2**30
LARGE = 2**24  # elements of a weight that is worth a word
EFFORT = "jax_exec_time_optimization_effort"  # -1 to 1
OWN = (
    "batch and counters",
    "activations and temporaries",
    "results that reuse no argument",
    "the program itself",
)


@dataclass(frozen=True)
class Plan:
    """What a program takes of each device, in bytes, and does in a step.

    parts: by what it holds. limit: what the device has for it, None where that isn't known. missing: None where it fits. total is
    None where the compiler gave up and didn't say how much it needs. host: bytes in the host's memory for each device. notes:
    what else is to be said of the run. flops, estimate: of what trains only.
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
        """Whether it fits the device, as far as that is known."""
        return self.missing is None

    def json(self) -> dict[str, Any]:
        """All of it as plain values."""
        each = self.flops.model / self.flops.tokens if self.flops else None
        return {**asdict(self), "flops_per_token": each, "fits": self.fits, "assumed": ASSUMED}


def set_quick(quick: bool) -> None:
    """Whether compilers are asked for as little optimisation for time as they have, which libtpu alone follows."""
    jax.config.update(EFFORT, -1.0 if quick else 0.0)


def plan(run: Run, machine: Machine) -> Plan:
    """The plan of what trains; of several such programs, of the one that takes most memory.

    Raises ValueError for a mesh or a batch that the run can't have on this machine.
    """
    return plans(run, machine, steps)[0]


def plans(run: Run, machine: Machine, wanted: Callable[[Run, Programs], list[Program]] = every) -> list[Plan]:
    """A plan of each program that `wanted` gives, that which takes most memory first. Raises as plan does."""
    p, _ = abstract(run, machine.devices)
    machine = replace(
        machine, devices=list(p.mesh.devices.flat)
    )  # in the order in which a program numbers them
    with jax.set_mesh(p.mesh):
        found = [_planned(run, p, machine, program) for program in wanted(run, p)]
    return sorted(found, key=lambda one: -math.inf if one.total is None else -one.total)


def _planned(run: Run, p: Programs, machine: Machine, program: Program) -> Plan:
    traced = program.trace()
    known: dict[str, Any] = {
        "machine": machine.name,
        "devices": len(machine.devices),
        "program": program.name,
        "limit": machine.chip.memory - machine.chip.kept if machine.chip else None,
        "flops": None if program.batch is None else flops(run, p, program.batch, traced),
        "notes": (
            *empty_slot_lines(step_rows(run.data, sharding.row_shards(p.mesh))),
            *replicated_weights(p),
            *shortcuts(machine),
        ),
        "gpu": machine.devices[0].platform in ("gpu", "cuda"),
    }
    with _cache_hits() as hits:
        begin = time.perf_counter()
        try:
            compiled = traced.lower().compile()
        except RuntimeError as error:  # libtpu's compiler refuses what doesn't fit, and says by how much
            needed = too_much(str(error))
            if needed is None:
                raise
            return _refused(known, resident(p, run), needed, (time.perf_counter() - begin, str(error)))
        seconds = time.perf_counter() - begin
    devices.trim_heap()
    return _found(known, resident(p, run), compiled, machine, (seconds, bool(hits)))


def shortcuts(machine: Machine) -> tuple[str, ...]:
    """What is to be said of a quick compilation for a machine."""
    quick = getattr(jax.config, EFFORT) < 0 and machine.tpu
    told = "compiled quickly: a run gets this program with JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1, and else may take more bytes"
    return (told,) if quick else ()


def _refused(
    known: dict[str, Any],
    held: dict[str, int],
    needed: tuple[int | None, int | None],
    took: tuple[float, str],
) -> Plan:
    """Of a program that the compiler gave up. needed: bytes in all and bytes missing, where it said so."""
    (total, missing), (seconds, error) = needed, took
    limit = known["limit"] if total is None or missing is None else total - missing
    return Plan(
        **{**known, "limit": limit}, parts=held, total=total, missing=missing or 0, host=0, collectives={}, memory_traffic=0.0,
        unknown_loops=0, estimate=None, compile_seconds=seconds, from_cache=False, largest_arrays={}, why=_first_line(error),
    )  # fmt: skip


def _found(
    known: dict[str, Any], held: dict[str, int], compiled: Any, machine: Machine, took: tuple[float, bool]
) -> Plan:
    """Of a compiled program. took: seconds of its compilation, and whether it came from the cache."""
    memory: Any = compiled.memory_analysis()
    own = (
        max(0, memory.argument_size_in_bytes - sum(held.values())),
        memory.temp_size_in_bytes,
        max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        memory.generated_code_size_in_bytes,
    )
    parts = {**held, **dict(zip(OWN, own, strict=True))}
    total, limit, counts = sum(parts.values()), known["limit"], known["flops"]
    module = hlo.parse_hlo(compiled.as_text() or "")
    moves = traffic.collectives(module, machine.places())
    moved = traffic.memory_bytes(module)
    guess = None
    if machine.chip is not None and counts is not None:
        peak = devices.peak_flops(machine.devices[0])
        guess = estimate(machine, (counts.model, counts.program), moved, moves, peak)
    return Plan(
        **known, parts={name: size for name, size in parts.items() if size}, total=total,
        missing=total - limit if limit is not None and total > limit else None,
        host=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        collectives=by_kind(moves), memory_traffic=moved, unknown_loops=len(module.unknown_loops), estimate=guess,
        compile_seconds=took[0], from_cache=took[1], largest_arrays=largest_arrays(module),
    )  # fmt: skip


def resident(p: Programs, run: Run | None = None) -> dict[str, int]:
    """Bytes a device of what is there in every program: weights, what of them is packed, adapters, optimizer, references, and a
    run's reward models that are models of their own."""
    sizes = {"weights": 0, "quantised base": 0, "adapters": 0}
    for side in (p.state.trainable, p.frozen):
        for path, leaf in tree.paths(side, is_qtensor).items():
            packed = "quantised base" if p.partition.storage[path].quantised else "weights"
            name = (
                packed if storage.in_base(path) or "/base/" in path else "adapters"
            )  # a critic may have a base of its own
            sizes[name] += _held(leaf)
    rewards = run.data.rules.rewards if run is not None and isinstance(run.data, Rollouts) else ()
    reward_models = sum(_held(reward.resident(p.mesh)) for reward in rewards)
    sizes |= {"reward models": reward_models} if reward_models else {}
    return {**sizes, "optimizer": _held(p.state.opt_state), "reference and the like": _held(p.state.aux)}


def replicated_weights(p: Programs) -> list[str]:
    """A line where large weights are whole on each device although the mesh cuts weights, because no cut divides them."""
    ways = math.prod(dict(p.mesh.shape)[axis] for axis in ("fsdp", "context", "tensor"))
    leaves = tree.paths(tree.combine(p.state.trainable, p.frozen))
    whole = {
        path: x
        for path, x in leaves.items()
        if ways > 1 and x.sharding.is_fully_replicated and x.size >= LARGE
    }
    if not whole:
        return []
    each = ", ".join(f"{path} {list(x.shape)}" for path, x in whole.items())
    return [
        f"whole on each device, because nothing of it divides over the {ways} that a weight is cut over: {each}"
    ]


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


def largest_arrays(program: hlo.HloProgram, count: int = 5) -> dict[str, int]:
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
        elif one.opcode not in traffic.FREE and not one.opcode.endswith(
            "-start"
        ):  # whose type holds the operands again
            made |= names
    return dict(
        sorted(((n, s) for n, s in made.items() if n not in given), key=lambda item: -item[1])[:count]
    )
