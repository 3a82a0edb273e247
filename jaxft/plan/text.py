"""Plans in words: one for people, several as a table that says where more devices stop helping."""

import json
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxft.distributed import sharding
from jaxft.plan import machines
from jaxft.plan.flops import Flops
from jaxft.plan.plan import GIB, OWN, Plan, plan
from jaxft.plan.roofline import ASSUMED, Estimate
from jaxft.train import partition, programs
from jaxft.train.settings import Run

PREALLOCATED = (
    0.75  # of a GPU's memory, what jax takes where XLA_PYTHON_CLIENT_MEM_FRACTION doesn't say otherwise
)


def plan_report(p: Plan) -> str:
    """The plan for people."""
    gib = lambda size: f"{size / GIB:9.3f} GiB"  # noqa: E731
    lines = [f"{p.program} on {p.machine}, {p.devices} device{'s' * (p.devices > 1)}; per device:"]
    lines += [f"  {name:32s} {gib(size)}" for name, size in p.parts.items()]
    if p.total is not None:
        lines.append(f"  {'in all':32s} {gib(p.total)}")
    lines += [f"  {'in the host memory':32s} {gib(p.host)}"] if p.host else []
    lines += [_verdict(p), *p.notes]
    lines += [] if p.flops is None else [_counts(p.flops)]
    for kind, row in p.collectives.items():
        moved = f"{gib(row['within'])} within, {gib(row['across'])} across hosts or slices"
        twice = f", {row['summed']:.0f} as all-reduces, which move twice as much" if row.get("summed") else ""
        lines.append(f"  {kind:19s} {row['runs']:7.0f} runs {moved}{twice}")
    lines += [] if p.estimate is None or p.flops is None else _time(p.flops, p.estimate)
    lines += (
        ["largest: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in p.largest_arrays.items())]
        if p.largest_arrays
        else []
    )
    lines.append(f"compiled in {p.compile_seconds:.1f} s" + (" (from the cache)" if p.from_cache else ""))
    lines += (
        [f"{p.unknown_loops} loops of unknown length are counted as one round"] if p.unknown_loops else []
    )
    return "\n".join(lines)


def record(step: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    """A step's plan as plain values, with what each of the run's programs takes; it fits where all of them do."""
    each = {p.program: {"total": p.total, "own": _own(p), "fits": p.fits} for p in plans}
    return {**step.json(), "programs": each, "fits": all(p.fits for p in plans)}


def programs_report(plans: Sequence[Plan]) -> str:
    """What each program of a run takes of a device beside what is there in all of them, and whether the largest fits."""
    held = min(p.total - _own(p) if p.total is not None else sum(p.parts.values()) for p in plans)
    each = (
        f"{p.program} {_own(p) / GIB:.3f}" if p.total is not None else f"{p.program} too much" for p in plans
    )
    most = max(plans, key=lambda p: math.inf if p.total is None else p.total)
    return (
        f"{held / GIB:.3f} GiB a device are there in every program; beside them GiB of {', '.join(each)}\n"
        f"the largest is {most.program}: {_verdict(most)}"
    )


def _own(p: Plan) -> int:
    """Bytes a device of a program's own: all but the weights, the optimizer and what else stays."""
    return sum(p.parts.get(name, 0) for name in OWN)


def _counts(f: Flops) -> str:
    empty = (
        f" and in the {100 * f.empty:.0f} % of its {f.places:,} places that are empty"
        if f.places > f.tokens
        else ""
    )
    return (
        f"FLOPs: {f.model / f.tokens:.3e} a token, {f.model:.3e} a step of {f.tokens:,} tokens (forward and backward by the "
        f"model's formula); the program runs {f.program:.3e}, {100 * (f.program / f.model - 1):.0f} % more to recompute, for "
        f"adapters{empty}"
    )


def _time(f: Flops, e: Estimate) -> list[str]:
    parts = f"products {e.compute:.3f} s, memory {e.memory:.3f}, gathers {e.gathers:.3f}, exchanges {e.exchanges:.3f}"
    rate = f"MFU {100 * e.mfu:.0f} %, HFU {100 * e.hfu:.0f} %, {f.tokens / e.step:,.0f} tokens/s"
    step = f"step: {e.step:.3f} s, {rate}; waits for {e.limit} ({parts}; {e.apart:.3f} if nothing overlapped)"
    return [step, f"assumed: {ASSUMED}"]


def dry_run(run: Run, record: dict[str, Any]) -> str:
    """The resolved settings, the parameter table, and the plan for this machine's devices."""
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        table = partition.parameter_table(programs.abstract(run)[0].partition, mesh)
    return "\n".join([json.dumps(record, indent=2), table, plan_report(plan(run, machines.local()))])


def _verdict(p: Plan) -> str:
    if p.limit is None and p.missing is None:
        return "the device's memory is not known"
    if not p.fits:
        of = f" of {p.limit / GIB:.2f} GiB" if p.limit else ""
        return f"does not fit: {(p.missing or 0) / GIB:.2f} GiB{of} are missing" + (
            f" ({p.why})" if p.why else ""
        )
    assert p.limit is not None and p.total is not None
    text = f"fits, {(p.limit - p.total) / GIB:.2f} of {p.limit / GIB:.2f} GiB are free"
    if p.total > PREALLOCATED * p.limit and p.gpu:
        text += "; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, jax takes 0.75 of a GPU by itself"
    return text


def scaling(plans: Sequence[Plan]) -> str:
    """A row a machine: bytes a device, bytes of collectives, time, and why not faster; then how far more devices help.

    The law: a device gathers the same weights however many share them, while its products shrink with its tokens. So gathers
    that run beside products are hidden as long as there are tokens enough a device, and those that nothing runs beside take more
    than half of a step where there are fewer.
    """
    lines = [
        f"{'machine':14s} {'devices':>7s} {'tokens':>10s} {'GiB':>7s} {'within':>8s} {'across':>8s} {'step s':>7s} {'MFU %':>6s} "
        f"{'tokens/s':>11s} {'a device':>8s}  waits for"
    ]
    for p in plans:
        within, across = (
            sum(row[side] for row in p.collectives.values()) / GIB for side in ("within", "across")
        )
        size = f"{p.total / GIB:7.2f}" if p.total is not None else "      ?"
        tokens = p.flops.tokens if p.flops else 0
        start = f"{p.machine:14s} {p.devices:7d} {tokens:10,d} {size} {within:8.2f} {across:8.2f}"
        e = p.estimate
        if e is None or not p.fits:
            lines.append(f"{start}  does not fit" if not p.fits else start)
            continue
        rate = tokens / e.step
        lines.append(
            f"{start} {e.step:7.3f} {100 * e.mfu:6.1f} {rate:11,.0f} {rate / p.devices:8,.0f}  {e.limit}"
        )
    lines += [least(p) for p in plans if p.estimate is not None and p.fits]
    return "\n".join(lines)


def least(p: Plan) -> str:
    """The tokens a device at which products take as long as the gathers, and what that means for the number of devices."""
    e = p.estimate
    assert e is not None and p.flops is not None
    each = p.flops.tokens / p.devices
    if not e.weights:
        return f"{p.machine}: {each:,.0f} tokens a device; its program gathers nothing, so nothing waits for that"
    enough = each * e.weights / e.compute
    takes = f"{p.machine}: {each:,.0f} tokens a device; gathers take {e.weights:.3f} s and products {e.compute:.3f}"
    if e.gathers > e.weights / 2:
        why = f"so from {enough:,.0f} tokens a device down a step waits for gathers: one of B tokens gains nothing beyond"
    else:
        why = (
            f"and nothing runs beside the gathers: from {enough:,.0f} tokens a device down they take more than half of a step, "
            "and one of B tokens gains less than double from any number beyond"
        )
    return (
        f"{takes}, {why} B / {enough:,.0f} devices cut by fsdp alone (mesh.tensor or mesh.context then cut a row further, and "
        "exchange activations; mesh.data gathers within fewer devices)"
    )
