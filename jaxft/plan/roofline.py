"""The FLOPs of a train step, and its time by a roofline of FLOPs, memory traffic and collectives."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.plan.machines import Machine
from jaxft.plan.program_bytes import COLLECTIVES, Collective
from jaxft.train import programs
from jaxft.train.settings import Run
from jaxft.tree import Batch

MATMULS, MEMORY, LINKS = 0.7, 0.8, 0.8  # fractions of the data sheets' rates that good programs reach
ASSUMED = (
    f"matmuls at {MATMULS} of peak FLOP/s, main memory at {MEMORY} and links at {LINKS} of peak bandwidth; "
    "matmuls, memory traffic and asynchronous collectives overlap completely, other collectives not at all; "
    "no launch gaps"
)


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of a step: max(compute, memory, overlapped) + exposed.

    compute, memory: seconds of the matmuls and of the memory traffic alone.
    overlapped: seconds of the collectives that run during matmuls; exposed: of all others.
    weights: seconds of the collectives that gather weights and scatter gradients, overlapped or exposed.
    serial: seconds of a step in which nothing overlaps.
    bottleneck: the largest part of the step, as text.
    mfu, hfu: fractions of the peak FLOP/s of bfloat16, see flops.Flops.
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
    found: Sequence[Collective],
    peak: float,
    fp8: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Estimate the time of a step.

    flops: of the model and of the program, on all devices; moved: bytes of main memory traffic per device;
    peak: FLOP/s per device. fp8: the program's FLOPs in FP8, and their peak FLOP/s. Raises
    ValueError for a machine whose chip is not in machines.CHIPS.
    """
    if machine.chip is None:
        raise ValueError(f"{machine.name}: unknown chip; add it to jaxft.plan.machines.CHIPS")
    count = len(machine.devices)
    without_fp8 = flops[1] / (count * peak * MATMULS)
    compute = without_fp8 - fp8[0] * (1 / peak - 1 / fp8[1]) / (count * MATMULS) if fp8[0] else without_fp8
    memory = moved / (machine.chip.memory_rate * MEMORY)
    took = [(c, seconds(machine, c)) for c in found]
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
    """Return the seconds of a collective in a step: within hosts or slices, then across.

    A permutation takes as long as its slowest pair.
    """
    chip = machine.chip
    assert chip is not None
    across = c.moved if c.kind == "collective-permute" and c.span > 1 else c.across
    within = (c.moved - across) / (chip.within * machine.axes(c.groups[0] if c.groups else ()) * LINKS)
    return c.times * (within + across / (chip.across * LINKS))


def by_kind(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """Total the collectives by kind: runs per step, and bytes sent per device within and across domains.

    A domain is a host or slice. as_all_reduce is the number of runs implemented as all-reduces, absent if 0.
    """
    table: dict[str, dict[str, float]] = {}
    for kind in COLLECTIVES:
        same = [c for c in found if c.kind == kind]
        if same:
            within, across = (
                sum(c.times * (c.moved - c.across) for c in same),
                sum(c.times * c.across for c in same),
            )
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
    (trained base), plus the forward pass of a live reference, for filled rows only.
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
    """Count the FLOPs of a train step traced for the batch [micro, rows, ...], inside its mesh context."""
    micro, count, length = batch.ids.shape
    slots, model = micro * count * length, p.partition.model
    rows = programs.step_rows(run.data, sharding.row_shards(p.mesh))
    filled = rows.filled / rows.slots
    microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    params = tree.combine(p.state.trainable, p.frozen)
    forward = micro * matmul_flops(
        jax.make_jaxpr(lambda params, batch: p.objective(params, batch, None, p.state.aux)[0])(
            params, microbatch
        ).jaxpr
    )
    plain, attention = (
        model.forward_flops(slots, 0),
        model.forward_flops(slots, length) - model.forward_flops(slots, 0),
    )
    second, second_attention = 0.0, 0.0
    if model.teacher is not None:
        second = model.teacher.forward_flops(slots, 0, micro * count * batch.read.shape[-1])
        second_attention = model.teacher.forward_flops(slots, length) - model.teacher.forward_flops(slots, 0)
    forwards = max(1, round((forward - second) / plain))  # 2 with a live reference
    passes = forwards + (2 if any(jax.tree.leaves(p.partition.mask["base"])) else 1)
    useful = min(plain, (forward - second) / forwards) * passes + second  # less without a loss at some
    done = max(useful, matmul_flops(traced.jaxpr.jaxpr))
    all_attention = passes * attention + second_attention
    model_flops = useful + all_attention
    program_flops = done + all_attention * done / useful
    fp8 = matmul_flops(traced.jaxpr.jaxpr, is_fp8)
    return Flops(round(slots * filled), slots, model_flops * filled, program_flops, fp8)


def is_fp8(eqn: Any) -> bool:
    """Whether all operands of an equation are in FP8."""
    return all(jnp.dtype(x.aval.dtype) in FP8 for x in eqn.invars)


def _is_any(eqn: Any) -> bool:
    return True


def matmul_flops(jaxpr: Any, counts: Callable[[Any], bool] = _is_any) -> float:
    """Return the FLOPs of the matmuls in a jaxpr that `counts` selects, by their equation, on all devices.

    Scans count once per iteration, and a conditional as its most expensive branch. Kernels and while loops
    are skipped; in jaxft they contain only attention.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general" and counts(eqn):
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
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner
