"""Device memory of a run's programs: resident arrays, largest arrays, and out-of-memory errors."""

import math
import re
from typing import Any

import jax

from jaxft import tree
from jaxft.models.heads import TEACHER
from jaxft.nn.quant import is_qtensor
from jaxft.plan import hlo, traffic
from jaxft.rl.rollout import Rollouts
from jaxft.train.programs import Programs
from jaxft.train.settings import Run
from jaxft.weights import storage

LARGE_WEIGHT = 2**24  # elements


def resident(p: Programs, run: Run | None = None) -> dict[str, int]:
    """Return the bytes per device of the arrays that are in memory during every program, by kind.

    These are unquantised weights, quantised weights, adapters, the teacher's parameters, optimizer state,
    auxiliary state such as references, and separate reward models of `run`.
    """
    sizes = {"weights": 0, "quantised base": 0, "adapters": 0}
    sizes |= {} if p.partition.model.teacher is None else {TEACHER: 0}  # 0 if it is the base
    for side in (p.state.trainable, p.frozen):
        for path, leaf in tree.paths(side, is_qtensor).items():
            kind = "quantised base" if p.partition.storage[path].quantised else "weights"
            in_base = storage.in_base(path) or "/base/" in path  # a critic may have a separate base
            own = TEACHER if path.startswith(f"{TEACHER}/") else kind if in_base else "adapters"
            sizes[own] += device_bytes(leaf)
    rewards = run.data.rules.rewards if run is not None and isinstance(run.data, Rollouts) else ()
    reward_models = sum(device_bytes(reward.resident(p.mesh)) for reward in rewards)
    sizes |= {"reward models": reward_models} if reward_models else {}
    return {**sizes, "optimizer": device_bytes(p.state.opt_state), "references": device_bytes(p.state.aux)}


def replicated_weights(p: Programs) -> list[str]:
    """Return a line that lists large weights which are replicated because the mesh does not divide them."""
    ways = math.prod(dict(p.mesh.shape)[axis] for axis in ("fsdp", "context", "tensor"))
    leaves = tree.paths(tree.combine(p.state.trainable, p.frozen))
    replicated = {
        path: x
        for path, x in leaves.items()
        if ways > 1 and x.sharding.is_fully_replicated and x.size >= LARGE_WEIGHT
    }
    if not replicated:
        return []
    weights = ", ".join(f"{path} {list(x.shape)}" for path, x in replicated.items())
    return [f"replicated, as no axis is divisible into {ways} shards: {weights}"]


def device_bytes(arrays: Any) -> int:
    """Return the bytes per device of arrays with shardings; 4-bit elements take half a byte."""
    leaves = jax.tree.leaves(arrays)
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * hlo.bits(_hlo_dtype(x.dtype)) // 8 for x in leaves
    )


def _hlo_dtype(dtype: Any) -> str:
    """Return a dtype in the spelling of hlo.bits; numpy's itemsize of int4 and uint4 is a full byte."""
    return "s4" if dtype.name in ("int4", "uint4") else f"u{8 * dtype.itemsize}"


def parse_out_of_memory(text: str) -> tuple[int | None, int | None] | None:
    """Parse (bytes needed, bytes missing) from a compiler's out-of-memory error; None for other errors.

    libtpu: "Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded hbm capacity by
    8.75G."
    """
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", text)
    by = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMGT]?)", text)
    return _size(used[1], used[2]) if used else None, _size(by[1], by[2]) if by else None


def _size(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def largest_arrays(program: hlo.HloProgram, count: int = 5) -> dict[str, int]:
    """Return the bytes of the largest arrays that a compiled program allocates, by dtype and shape.

    Arguments do not count, nor values inside fusions, which are never in memory, nor views such as bitcasts.
    """
    made: dict[str, int] = {}
    arguments: set[str] = set()
    for one, where, _, fused in hlo.walk(program):
        if fused:
            continue
        names = {f"{x.dtype}[{','.join(map(str, x.shape))}]": x.bytes for x in one.arrays}
        if one.opcode == "parameter" and where == program.entry:
            arguments |= names.keys()
        # the type of a `-start` repeats its operands
        elif one.opcode not in traffic.NO_TRAFFIC and not one.opcode.endswith("-start"):
            made |= names
    return dict(
        sorted(((n, s) for n, s in made.items() if n not in arguments), key=lambda item: -item[1])[:count]
    )
