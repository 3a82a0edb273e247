"""Reports of plans: one in detail, or several as a table with the limit of useful devices."""

import math
import os
from collections.abc import Sequence
from typing import Any

from jaxft.data.progress import time_in_words
from jaxft.distributed import xla_flags
from jaxft.plan.flops import Flops
from jaxft.plan.machines import GIB
from jaxft.plan.plan import PROGRAM_PARTS, Plan
from jaxft.plan.roofline import ASSUMED, Estimate


def plan_report(p: Plan) -> str:
    """Return the full report of a plan."""

    def gib(size: float) -> str:
        return f"{size / GIB:9.3f} GiB"

    lines = [f"{p.program} on {p.machine}, {p.devices} device{'s' * (p.devices > 1)}; per device:"]
    lines += [f"  {name:32s} {gib(size)}" for name, size in p.parts.items()]
    if p.total is not None:
        lines.append(f"  {'total':32s} {gib(p.total)}")
    lines += [f"  {'host memory':32s} {gib(p.host)}"] if p.host else []
    lines += [_verdict(p), *p.notes]
    lines += [] if p.flops is None else [_flops_line(p.flops)]
    for kind, row in p.collectives.items():
        moved = f"{gib(row['within'])} within, {gib(row['across'])} across hosts or slices"
        count = row.get("as_all_reduce")
        twice = f", {count:.0f} as all-reduces, which move twice as much" if count else ""
        lines.append(f"  {kind:19s} {row['runs']:7.0f} runs {moved}{twice}")
    lines += [] if p.estimate is None or p.flops is None else _time_lines(p.flops, p.estimate)
    lines += (
        [
            "largest arrays, GiB: "
            + ", ".join(f"{name} {size / GIB:.2f}" for name, size in p.largest_arrays.items())
        ]
        if p.largest_arrays
        else []
    )
    lines.append(
        f"compiled in {time_in_words(p.compile_seconds)}" + (" (from the cache)" if p.from_cache else "")
    )
    lines += (
        [f"{p.unknown_loops} loops of unknown length are counted as one iteration"] if p.unknown_loops else []
    )
    return "\n".join(lines)


def record(step: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return a train step's plan as plain values, with the bytes of all programs; all of them must fit."""
    programs_ = {
        p.program: {"total": p.total, "program_bytes": _program_bytes(p), "fits": p.fits} for p in plans
    }
    return {**step.json(), "programs": programs_, "fits": all(p.fits for p in plans)}


def programs_report(plans: Sequence[Plan]) -> str:
    """Return the bytes of each program in addition to resident arrays, and whether the largest fits."""
    resident = min(
        p.total - _program_bytes(p) if p.total is not None else sum(p.parts.values()) for p in plans
    )
    sizes = (
        f"{p.program} {_program_bytes(p) / GIB:.3f}" if p.total is not None else f"{p.program} out of memory"
        for p in plans
    )
    most = max(plans, key=lambda p: math.inf if p.total is None else p.total)
    return (
        f"resident in all programs: {resident / GIB:.3f} GiB per device; in addition: {', '.join(sizes)}\n"
        f"the largest is {most.program}: {_verdict(most)}"
    )


def _program_bytes(p: Plan) -> int:
    """Return the bytes per device of a program, without the resident arrays."""
    return sum(p.parts.get(name, 0) for name in PROGRAM_PARTS)


def _flops_line(f: Flops) -> str:
    empty = (
        f" and on the {100 * f.empty_fraction:.0f} % of its {f.slots:,} token slots that are empty"
        if f.slots > f.tokens
        else ""
    )
    return (
        f"FLOPs: {f.model / f.tokens:.3e} per token, {f.model:.3e} per step of {f.tokens:,} tokens (forward "
        f"and backward by the model's formula); the program runs {f.program:.3e}, "
        f"{100 * (f.program / f.model - 1):.0f} % more for recomputation, adapters{empty}"
    )


def _time_lines(f: Flops, e: Estimate) -> list[str]:
    parts = (
        f"seconds of matmuls {e.compute:.3f}, memory {e.memory:.3f}, overlapped collectives "
        f"{e.overlapped:.3f}, exposed collectives {e.exposed:.3f}; without overlap {e.serial:.3f}"
    )
    rate = f"MFU {100 * e.mfu:.0f} %, HFU {100 * e.hfu:.0f} %, {f.tokens / e.step:,.0f} tokens/s"
    lines = [f"step: {e.step:.3f} s, {rate}; limited by {e.bottleneck} ({parts})"]
    if f.fp8:
        lines.append(
            f"FP8: {100 * f.fp8 / f.program:.0f} % of the program's FLOPs; in bfloat16 its matmuls would "
            f"take {e.without_fp8:.3f} s instead of {e.compute:.3f}"
        )
    return [*lines, f"assumed: {ASSUMED}"]


def _verdict(p: Plan) -> str:
    if p.limit is None and p.missing is None:
        return "the device's memory is unknown"
    if not p.fits:
        limit = f" the limit of {p.limit / GIB:.2f} GiB" if p.limit else " the limit"
        error = f" ({p.why})" if p.why else ""
        return f"does not fit: exceeds{limit} by {(p.missing or 0) / GIB:.2f} GiB{error}"
    assert p.limit is not None and p.total is not None
    text = f"fits, {(p.limit - p.total) / GIB:.2f} of {p.limit / GIB:.2f} GiB are free"
    fraction = xla_flags.planned_memory_fraction(os.environ)
    if p.gpu and p.total > fraction * p.limit:
        text += f"; set {xla_flags.FRACTION}=0.99, a run allocates {fraction:g} of a GPU's memory"
    return text


def scaling_report(plans: Sequence[Plan]) -> str:
    """Return a table with a row per machine, then the number of devices beyond which more do not help.

    A device gathers the same weights on any number of devices, while its matmuls shrink with its tokens. So
    overlapped gathers are hidden while a device has enough tokens, and exposed gathers take more than half
    of a step below that number of tokens.
    """
    lines = [
        f"{'machine':14s} {'devices':>7s} {'tokens':>10s} {'GiB':>7s} {'within':>8s} {'across':>8s} "
        f"{'step s':>7s} {'MFU %':>6s} {'tokens/s':>11s} {'/device':>8s}  limited by"
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
            f"{start} {e.step:7.3f} {100 * e.mfu:6.1f} {rate:11,.0f} {rate / p.devices:8,.0f}  {e.bottleneck}"
        )
    lines += [scaling_limit(p) for p in plans if p.estimate is not None and p.fits]
    return "\n".join(lines)


def scaling_limit(p: Plan) -> str:
    """Return a line with the tokens per device at which matmuls take as long as weight gathers."""
    e = p.estimate
    assert e is not None and p.flops is not None
    per_device = p.flops.tokens / p.devices
    if not e.weights:
        return f"{p.machine}: {per_device:,.0f} tokens per device; the program gathers no weights"
    enough = per_device * e.weights / e.compute
    times = f"weight gathers take {e.weights:.3f} s and matmuls {e.compute:.3f} s"
    if e.overlapped > e.weights / 2:
        effect = f"Below {enough:,.0f} tokens per device gathers limit a step: B tokens are not faster"
    else:
        effect = (
            f"Gathers are exposed: below {enough:,.0f} tokens per device they take more than half of a step, "
            "and B tokens are at most twice as fast"
        )
    return (
        f"{p.machine}: {per_device:,.0f} tokens per device; {times}. {effect} on more than "
        f"B / {enough:,.0f} devices with fsdp alone (mesh.tensor or mesh.context shard rows further and "
        "communicate activations; mesh.data gathers over fewer devices)"
    )
