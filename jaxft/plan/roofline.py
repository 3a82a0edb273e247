"""Roofline estimate of a step's time from its FLOPs, memory traffic and collectives."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxft.plan.machines import Machine
from jaxft.plan.traffic import COLLECTIVES, Collective

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
    peak: FLOP/s per device. fp8: those of the program's FLOPs that are in FP8, and their peak FLOP/s. Raises
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
