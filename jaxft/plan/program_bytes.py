"""Bytes of a run's compiled programs: in the memory of a device, and moved by a step.

Memory: resident arrays, the largest arrays of a program, out-of-memory errors. Traffic: collectives within
and across hosts or slices, and main memory.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxft.models.adapted import TEACHER
from jaxft.nn import tree
from jaxft.nn.quant import is_qtensor
from jaxft.plan import hlo
from jaxft.plan.hlo import Array, HloProgram, Instruction, called_computations, walk
from jaxft.rl.rollout_source import Rollouts
from jaxft.train.programs import Programs
from jaxft.train.settings import Run
from jaxft.weights import storage

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # libtpu's send to other slices


@dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    name: of its HLO instruction. kind: one of COLLECTIVES, by its effect, see as_all_reduce. size: bytes of
    the full array: after a gather, before a scatter, or reduced. group: devices per replica group. span:
    hosts or slices per group. times: executions per step. dtypes: of its arrays, as XLA spells them. groups:
    indices of the devices of each group; (from, to) pairs for a permutation. overlapped: it runs during
    matmuls, because the program starts it before them or splits both into interleaved pieces.
    as_all_reduce: an all-gather or reduce-scatter that the compiler implements as an all-reduce of the full
    array, zero-padded or sliced (as libtpu does on large slices); it moves twice as many bytes.
    crossing: fraction of a permutation's pairs that connect different hosts or slices.
    """

    name: str
    kind: str
    size: int
    group: int
    span: int
    times: float
    dtypes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    overlapped: bool = False
    as_all_reduce: bool = False
    crossing: float = 1.0

    @property
    def moved(self) -> float:
        """Bytes a device sends per execution: (n - 1) / n of the array of n devices, twice if all-reduce."""
        if self.kind == "collective-permute":
            return float(self.size)
        return self._passes * self.size * (self.group - 1) / self.group

    @property
    def across(self) -> float:
        """Bytes that leave a host or slice in an execution, divided by the devices that send them."""
        if self.span == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.size * self.crossing
        # devices of a host split the traffic of a ring; in an all-to-all every device sends different data
        senders = 1 if self.kind == "all-to-all" else self.group / self.span
        return self._passes * self.size * (self.span - 1) / self.span / senders

    @property
    def gathers_or_scatters(self) -> bool:
        """Whether it counts as weight communication: an all-gather, a reduce-scatter, or overlapped."""
        return self.kind in ("all-gather", "reduce-scatter") or self.overlapped

    @property
    def _passes(self) -> int:
        return 2 if self.kind == "all-reduce" or self.as_all_reduce else 1


def collectives(program: HloProgram, domains: Sequence[int]) -> list[Collective]:
    """Return the collectives of a step. domains: the host or slice of each device, in mesh order.

    An asynchronous collective counts at its start instruction, a collective between TPU slices at its send.
    The fused pieces of a collective that libtpu splits into a chain count once.
    """
    by_key: dict[object, Collective] = {}
    for op, where, times, fused in walk(program):
        kind = op.opcode.removesuffix("-start")
        between = _BETWEEN.search(op.attributes) if kind == "send" else None
        if between:
            kind = between[1].lower().replace("_", "-")
            slices, size = len(set(domains)), op.arrays[0].bytes
            kind = kind if kind in COLLECTIVES else "collective-permute"
            made = Collective(op.name, kind, size, slices, slices, times, (op.arrays[0].dtype,), ())
            by_key[where, op.name] = made
        if kind not in COLLECTIVES or between:
            continue
        chain, channel = (re.search(p, op.attributes) for p in (r'chain_id="?(\d+)', r"channel_id=(\d+)"))
        key: object = (channel[1], chain[1]) if chain and channel else (where, op.name)
        if key in by_key:
            if not chain:
                by_key[key] = replace(by_key[key], times=by_key[key].times + times)
            continue
        made = _collective(op, kind, len(domains))
        if made.group > 1:
            scattered = where.startswith("all-reduce-scatter") and kind == "all-reduce"
            spans = [len({domains[i] for i in group}) for group in made.groups]
            purpose = kind
            if kind == "all-reduce":
                purpose = "reduce-scatter" if scattered else _purpose(program, where, op)
            # other work can run between the start and the end of a collective
            asynchronous = fused or (op.opcode.endswith("-start") and '"is_sync":true' not in op.attributes)
            gathers = purpose in ("all-gather", "reduce-scatter")
            by_key[key] = replace(
                made, times=times, span=max(spans, default=1),
                crossing=sum(n > 1 for n in spans) / max(1, len(spans)), kind=purpose,
                overlapped=(gathers and asynchronous) or "windowed_dot_general" in where,
                as_all_reduce=purpose != kind and not scattered,
            )  # fmt: skip
    return list(by_key.values())


def _purpose(program: HloProgram, where: str, op: Instruction) -> str:
    """Return the purpose of the all-reduce `op` in the computation `where`, as a name of COLLECTIVES.

    It is an all-gather if most bytes of its operands are zero-padded shards, a reduce-scatter if its readers
    only slice most bytes of its results, otherwise an all-reduce.
    """
    inside = program.computations[where]
    operands = [inside[name] for name in op.operands if name in inside]
    total = sum(o.bytes for o in operands) or 1
    if sum(o.bytes for o in operands if _padded(program, inside, o)) > total / 2:
        return "all-gather"
    users, results = _users(inside), [op]
    if op.type.startswith("("):
        results = [x for x in users.get(op.name, []) if x.opcode == "get-tuple-element"]
    parts = sum(r.bytes for r in results if _sliced(program, r, users))
    return "reduce-scatter" if parts > total / 2 else "all-reduce"


def _padded(program: HloProgram, inside: dict[str, Instruction], op: Instruction) -> bool:
    """Whether `op` makes a zero-padded shard: a dynamic-update-slice into a constant, also in a fusion."""
    given, constants = [inside[name] for name in op.operands if name in inside], ("broadcast", "constant")
    if op.opcode == "fusion" and called_computations(op):
        inner = program.computations.get(called_computations(op)[0], {})
        root = next((x for x in inner.values() if x.root), None)
        source = _through(root, inner) if root else None
        if source is None or source.opcode != "dynamic-update-slice":
            return False
        into = inner.get(source.operands[0])
        if into is not None and (number := _parameter(into, len(given))) is not None:
            into = given[number]
        return into is not None and into.opcode in constants
    if op.opcode in ("copy", "copy-done", "copy-start", "bitcast") and given:
        return _padded(program, inside, given[0])
    return op.opcode == "dynamic-update-slice" and bool(given) and given[0].opcode in constants


def _parameter(op: Instruction, count: int) -> int | None:
    """Return the index of a parameter instruction if it is below `count`, None for other instructions."""
    is_known = op.opcode == "parameter" and op.literal.isdigit() and int(op.literal) < count
    return int(op.literal) if is_known else None


def _sliced(program: HloProgram, op: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether all instructions that read the result of `op` read only a slice of it. users: from _users."""
    size, readers = op.bytes, users.get(op.name, [])
    for user in readers:
        if user.opcode in ("bitcast", "copy", "convert", "reshape"):
            if not _sliced(program, user, users):
                return False
        elif user.opcode == "fusion" and called_computations(user):
            inner = program.computations.get(called_computations(user)[0], {})
            within = _users(inner)
            at = [i for i, name in enumerate(user.operands) if name == op.name]
            read = [x for x in inner.values() if x.opcode == "parameter" and x.literal in map(str, at)]
            if any(_bytes_read(x, within, size) >= size for x in read):
                return False
        elif user.opcode not in ("dynamic-slice", "slice"):
            return False
    return bool(readers)


def _users(inside: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    """Return, by the name of each instruction of a computation, the instructions that read its result."""
    users: dict[str, list[Instruction]] = {}
    for x in inside.values():
        for name in x.operands:
            users.setdefault(name, []).append(x)
    return users


def _collective(op: Instruction, kind: str, devices: int) -> Collective:
    arrays = _results(op, kind)
    groups: tuple[tuple[int, ...], ...]
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", op.attributes)
        groups = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""))
    else:
        groups = replica_groups(op.attributes, devices)
    group = max((len(g) for g in groups), default=1)
    size = sum(x.bytes for x in arrays) * (group if kind == "reduce-scatter" else 1)
    return Collective(op.name, kind, size, group, 1, 0.0, tuple(sorted({x.dtype for x in arrays})), groups)


def _results(op: Instruction, kind: str) -> list[Array]:
    """Return the result arrays of a collective; the type of a `-start` lists its operands before them."""
    if not op.opcode.endswith("-start") or kind == "all-reduce":
        return op.arrays
    parts = _parts(op.type)
    return replace(op, type=parts[1] if len(parts) > 1 else op.type).arrays


def _parts(text: str) -> list[str]:
    """Split the type of a tuple into the types of its elements."""
    parts, depth, start = [], 0, 1
    for i, c in enumerate(text):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(c, 0)
        if (c == "," and depth == 1) or (depth == 0 and i):
            parts.append(text[start:i].strip())
            start = i + 1
    return parts


def replica_groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Parse the device indices of each replica group from the attributes of a collective.

    devices: how many the program has. An empty list of groups, or none, means one group of all devices.
    XLA has three formats: {{0,1},{2,3}}, [groups,size]<=[a,b]T(1,0), and
    mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}.
    """
    listed = re.search(r"replica_groups=\{((?:\{[\d, ]*\},?\s*)*)\}", attributes)
    if listed:
        groups = tuple(
            tuple(int(n) for n in re.findall(r"\d+", g)) for g in re.findall(r"\{([\d, ]*)\}", listed[1])
        )
        return groups or (tuple(range(devices)),)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _rows(_order(iota[3], devices).reshape(int(iota[1]), int(iota[2])))
    named = re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}",
        attributes,
    )
    if named:
        return _along(named[1], _order(named[2], devices), named[3])
    return (tuple(range(devices)),)


def _order(text: str | None, devices: int) -> np.ndarray:
    """Parse the order of the devices of a mesh. `[4,2]T(1,0)` is an iota of shape [4, 2], transposed; other
    texts list the indices; None is 0, 1, 2, ...
    """
    if not text:
        return np.arange(devices)
    shaped = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if shaped is None:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    shape = [int(n) for n in shaped[1].split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([int(n) for n in shaped[2].split(",")]) if shaped[2] else numbers).reshape(-1)


def _along(mesh: str, order: np.ndarray, axes: str) -> tuple[tuple[int, ...], ...]:
    """Return the device indices of each group along `axes` of a mesh such as 'x'=2,'y'=4.

    order: the devices of the mesh, see _order. In `axes`, 'x':(2)4 is the sub-axis of size 4 that follows a
    more major sub-axis of size 2.
    """
    sizes: list[tuple[str, int]] = [(name, int(n)) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)]
    selected: list[tuple[str, int, int]] = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        selected.append((name, int(before or 1), int(size or dict(sizes)[name])))
    shape, inside = [], []
    for name, full_size in sizes:
        sub_axes = sorted((before, size) for n, before, size in selected if n == name)
        done = 1
        for before, size in sub_axes:
            shape += [before // done, size]
            inside += [False, True]
            done = before * size
        shape.append(full_size // done)
        inside.append(False)
    last = [i for i, x in enumerate(inside) if x]
    first = [i for i, x in enumerate(inside) if not x]
    count = math.prod(shape[i] for i in last)
    return _rows(order.reshape(shape).transpose([*first, *last]).reshape(-1, count))


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in group) for group in groups)


NO_TRAFFIC = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
)  # fmt: skip

UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # updates in place -> the operand that is written


def memory_bytes(program: HloProgram) -> float:
    """Return the bytes of main memory that a step reads and writes, per device.

    These are the operands and results of all instructions outside fusions. If an array is only sliced, only
    the slice counts; if it is updated in place, only the update. Arrays whose layout is in another memory (a
    TPU's VMEM, the host's) do not count.
    """
    total = 0.0
    for op, where, times, fused in walk(program):
        if fused or op.opcode in NO_TRAFFIC or op.opcode.endswith("-done"):
            continue
        inside = program.computations[where]
        operands = [inside[name] for name in op.operands if name in inside]
        if op.opcode == "fusion":
            total += times * _fusion_bytes(program, op, operands)
        elif op.opcode in ("dynamic-slice", "slice", "gather"):
            total += times * 2 * _main(op.arrays)
        elif op.opcode in ("slice-start", "dynamic-slice-start"):
            total += times * 2 * _main(_results(op, op.opcode))
        elif op.opcode == "dynamic-update-slice":
            total += times * 2 * _main(operands[1].arrays if len(operands) > 1 else [])
        else:
            # the s8 result of a library call is its workspace
            made = [x for x in op.arrays if not (op.opcode == "custom-call" and x.dtype == "s8")]
            start = op.opcode.endswith("-start")  # its type repeats the operands
            total += times * (sum(_main(x.arrays) for x in operands) + _main(made) / (2 if start else 1))
    return total


def _main(arrays: list[Array]) -> int:
    """Return the bytes of the arrays that are in main memory, by their layout."""
    return sum(x.bytes for x in arrays if not re.search(r"S\([1-9]\)", x.layout))


def _fusion_bytes(program: HloProgram, op: Instruction, operands: list[Instruction]) -> float:
    inner = program.computations.get(called_computations(op)[0], {}) if called_computations(op) else {}
    users = _users(inner)
    total = 0.0
    for x in inner.values():
        if (number := _parameter(x, len(operands))) is not None:
            size = _main(operands[number].arrays)
            total += min(size, _bytes_read(x, users, size))
    root = next((x for x in inner.values() if x.root), None)
    if root is None:
        return total + _main(op.arrays)
    made = op.arrays
    roots = [inner[n] for n in root.operands if n in inner] if root.opcode == "tuple" else [root]
    if len(made) != len(roots):
        return total + _main(made)
    for x, array in zip(roots, made, strict=True):
        source = _through(x, inner)
        changed = inner.get(source.operands[UPDATES[source.opcode]]) if source.opcode in UPDATES else None
        total += min(_main([array]), changed.bytes if changed else math.inf)
    return total


def _bytes_read(x: Instruction, users: dict[str, list[Instruction]], size: int) -> float:
    """Return the bytes that a fusion reads of its parameter `x` of `size` bytes. users: from _users."""
    total = 0.0
    for user in users.get(x.name, []):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.bytes
        elif user.opcode in ("bitcast", "reshape"):
            total += _bytes_read(user, users, size)
        elif not (user.opcode in UPDATES and user.operands[0] == x.name):
            return size
    return total


def _through(x: Instruction, inner: dict[str, Instruction]) -> Instruction:
    """Follow bitcasts, reshapes, copies and conversions from `x` back to the instruction that they read."""
    while x.opcode in ("bitcast", "reshape", "copy", "convert") and x.operands and x.operands[0] in inner:
        x = inner[x.operands[0]]
    return x


LARGE_WEIGHT = 2**24  # elements


def resident(p: Programs, run: Run | None = None) -> dict[str, int]:
    """Return the bytes per device of the arrays that are in memory during every program, by kind.

    The keys are "weights" (unquantised), "quantised base", "adapters", "optimizer" (its state), "references"
    (all auxiliary state), TEACHER if there is one, and "reward models" if `run` has some with other weights.
    """
    sizes = {"weights": 0, "quantised base": 0, "adapters": 0}
    sizes |= {} if p.partition.model.teacher is None else {TEACHER: 0}  # 0 if it is the base
    for side in (p.state.trainable, p.frozen):
        for path, leaf in tree.paths(side, is_qtensor).items():
            kind = "quantised base" if p.partition.storage[path].quantised else "weights"
            in_base = storage.in_base(path) or "/base/" in path  # a critic may have a separate base
            part = TEACHER if path.startswith(f"{TEACHER}/") else kind if in_base else "adapters"
            sizes[part] += device_bytes(leaf)
    rewards = run.data.rules.rewards if run is not None and isinstance(run.data, Rollouts) else ()
    reward_models = sum(device_bytes(reward.resident(p.mesh)) for reward in rewards)
    sizes |= {"reward models": reward_models} if reward_models else {}
    return {**sizes, "optimizer": device_bytes(p.state.opt_state), "references": device_bytes(p.state.aux)}


def replicated_weights(p: Programs) -> list[str]:
    """Return [line], which lists the weights of LARGE_WEIGHT elements or more that every device has in full
    because the mesh divides none of their axes; [] if there are none.
    """
    ways = math.prod(dict(p.mesh.shape)[axis] for axis in ("fsdp", "context", "tensor"))
    weights = ", ".join(
        f"{path} {list(x.shape)}"
        for path, x in tree.paths(tree.combine(p.state.trainable, p.frozen)).items()
        if ways > 1 and x.sharding.is_fully_replicated and x.size >= LARGE_WEIGHT
    )
    return [f"replicated, as no axis is divisible into {ways} shards: {weights}"] if weights else []


def device_bytes(arrays: Any) -> int:
    """Return the bytes per device of a pytree of sharded arrays; 4-bit elements take half a byte."""
    total = 0
    for x in jax.tree.leaves(arrays):
        bits = 4 if x.dtype.name in ("int4", "uint4") else 8 * x.dtype.itemsize  # numpy counts a full byte
        total += math.prod(x.sharding.shard_shape(x.shape)) * bits // 8
    return total


def parse_out_of_memory(text: str) -> tuple[int | None, int | None] | None:
    """Parse (bytes needed, bytes missing) from a compiler's out-of-memory error, each None if the error lacks
    it; None for other errors.

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
    """Return the bytes of the `count` largest arrays that a compiled program allocates, largest first.

    The keys are dtypes and shapes, such as "bf16[8,128]"; arrays of equal dtype and shape are one item.
    Left out are dtypes and shapes of arguments, views such as bitcasts, and values inside fusions, which are
    never in memory.
    """
    made: dict[str, int] = {}
    arguments: set[str] = set()
    for op, where, _, fused in hlo.walk(program):
        if fused:
            continue
        names = {f"{x.dtype}[{','.join(map(str, x.shape))}]": x.bytes for x in op.arrays}
        if op.opcode == "parameter" and where == program.entry:
            arguments |= names.keys()
        # the type of a `-start` repeats its operands
        elif op.opcode not in NO_TRAFFIC and not op.opcode.endswith("-start"):
            made |= names
    largest = sorted((name for name in made if name not in arguments), key=lambda name: -made[name])
    return {name: made[name] for name in largest[:count]}
