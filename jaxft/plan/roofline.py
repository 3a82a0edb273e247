"""An estimate of a step's time from what it computes and moves, with its assumptions said."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxft.plan.machines import Machine
from jaxft.plan.traffic import KINDS, Collective

PRODUCTS, MEMORY, LINKS = 0.7, 0.8, 0.8  # of the data sheets' rates; what well-made programs reach of them
ASSUMED = (
    f"products at {PRODUCTS} of the peak rate, main memory at {MEMORY} and links at {LINKS} of theirs; products, memory and "
    "collectives that the program starts beside them overlap whole, those that it waits for not at all; no launch gaps"
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step. compute, memory: of each alone; gathers: of collectives that run beside products; exchanges: of those
    that nothing runs beside. The step is the largest of the first three plus the last. weights: of what gathers and scatters
    weights and gradients, beside products or not. apart: if nothing overlapped. limit: what the step waits for. mfu, hfu: shares
    of the peak, see flops.Flops.
    """

    compute: float
    memory: float
    gathers: float
    exchanges: float
    weights: float
    step: float
    apart: float
    limit: str
    mfu: float
    hfu: float


def estimate(
    machine: Machine, flops: tuple[float, float], moved: float, found: Sequence[Collective], peak: float
) -> Estimate:
    """flops: the model's and the program's, on all devices; moved: bytes of main memory a device; peak: FLOP/s a device."""
    if machine.chip is None:
        raise ValueError(f"{machine.name}: no rates are known for this chip, so no time can be estimated")
    count = len(machine.devices)
    compute = flops[1] / (count * peak * PRODUCTS)
    memory = moved / (machine.chip.memory_rate * MEMORY)
    took = [(c, seconds(machine, c)) for c in found]
    gathers = sum(s for c, s in took if c.behind)
    exchanges = sum(s for c, s in took if not c.behind)
    weights = sum(s for c, s in took if c.gathers)
    parts = {"products": compute, "memory": memory, "gathers of weights": gathers}
    limit = max(parts, key=lambda name: parts[name])
    step = parts[limit] + exchanges
    if exchanges > parts[limit]:
        exposed = weights - gathers > exchanges / 2
        limit = "gathers of weights, beside which nothing runs" if exposed else "exchanges of activations"
    mfu, hfu = (n / (step * count * peak) for n in flops)
    apart = compute + memory + gathers + exchanges
    return Estimate(compute, memory, gathers, exchanges, weights, step, apart, limit, mfu, hfu)


def seconds(machine: Machine, c: Collective) -> float:
    """Of all runs of a collective: what stays within a host or slice, then what leaves it; of a permutation the slowest pair."""
    chip = machine.chip
    assert chip is not None
    across = c.moved if c.kind == "collective-permute" and c.span > 1 else c.across
    within = (c.moved - across) / (chip.within * machine.axes(c.groups[0] if c.groups else ()) * LINKS)
    return c.times * (within + across / (chip.across * LINKS))


def by_kind(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """Of each kind of collective: runs a step, bytes that a device sends within its host or slice, and across; and how many of
    the runs are done as all-reduces, where some are.
    """
    table: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        mine = [c for c in found if c.kind == kind]
        if mine:
            within, across = (
                sum(c.times * (c.moved - c.across) for c in mine),
                sum(c.times * c.across for c in mine),
            )
            table[kind] = {"runs": sum(c.times for c in mine), "within": within, "across": across}
            summed = sum(c.times for c in mine if c.summed)
            table[kind] |= {"summed": summed} if summed else {}
    return table
