"""What a compiled step moves: bytes of its collectives, within a host or slice and across, and of its memory."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxft.plan.hlo import Array, HloProgram, Instruction, called_by, walk

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # a send of libtpu's to the other slices


@dataclass(frozen=True)
class Collective:
    """One collective of a step. size: bytes of the whole array a device: of what is gathered, before it is scattered, or reduced.

    times: how often a step runs it. group: devices that take part together. span: hosts or slices of one such group. behind: it
    runs while products do, because the program starts it before them or cuts it into pieces between theirs. summed: an all-gather
    or reduce-scatter that the compiler does as an all-reduce of the whole array, with zeros where a device has nothing, or of
    which a device uses its part (libtpu's way on large slices); it moves twice as much. crossing: the share of a permutation's
    pairs whose two devices are on different hosts or slices.
    """

    name: str
    kind: str
    size: int
    group: int
    span: int
    times: float
    dtypes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    behind: bool = False
    summed: bool = False
    crossing: float = 1.0

    @property
    def moved(self) -> float:
        """Bytes that a device sends each time, by the ring's count: (n - 1) / n of the array, twice for an all-reduce."""
        if self.kind == "collective-permute":
            return float(self.size)
        return self._rounds * self.size * (self.group - 1) / self.group

    @property
    def across(self) -> float:
        """A device's share of what leaves its host or slice each time, where those of one host share the traffic evenly."""
        if self.span == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.size * self.crossing
        own = (
            1 if self.kind == "all-to-all" else self.group / self.span
        )  # each device's part of an exchange is for one other
        return self._rounds * self.size * (self.span - 1) / self.span / own

    @property
    def gathers(self) -> bool:
        """Whether it gathers parts or scatters sums, as those of weights and their gradients, whole or in pieces."""
        return self.kind in ("all-gather", "reduce-scatter") or self.behind

    @property
    def _rounds(self) -> int:
        return 2 if self.kind == "all-reduce" or self.summed else 1


def collectives(program: HloProgram, places: Sequence[int]) -> list[Collective]:
    """Those of a step. places: the host or slice of each device, in the order of the mesh.

    An asynchronous one counts where it starts, one between TPU slices where it is sent; what a compiler cuts into several fused
    pieces (libtpu's chains) counts once.
    """
    found: dict[object, Collective] = {}
    for one, where, times, fused in walk(program):
        kind = one.opcode.removesuffix("-start")
        between = _BETWEEN.search(one.attributes) if kind == "send" else None
        if between:
            kind = between[1].lower().replace("_", "-")
            slices, size = len(set(places)), one.arrays[0].bytes
            kind = kind if kind in KINDS else "collective-permute"
            made = Collective(one.name, kind, size, slices, slices, times, (one.arrays[0].dtype,), ())
            found[where, one.name] = made
        if kind not in KINDS or between:
            continue
        chain, channel = (re.search(p, one.attributes) for p in (r'chain_id="?(\d+)', r"channel_id=(\d+)"))
        key: object = (channel[1], chain[1]) if chain and channel else (where, one.name)
        if key in found:
            if not chain:
                found[key] = replace(found[key], times=found[key].times + times)
            continue
        made = _collective(one, kind, len(places))
        if made.group > 1:
            scattered = where.startswith("all-reduce-scatter") and kind == "all-reduce"
            spans = [len({places[i] for i in group}) for group in made.groups]
            span, crossing = max(spans, default=1), sum(n > 1 for n in spans) / max(1, len(spans))
            meant = (
                "reduce-scatter"
                if scattered
                else _meant(program, where, one)
                if kind == "all-reduce"
                else kind
            )
            beside = meant in ("all-gather", "reduce-scatter") and (fused or _started(one))
            behind = beside or "windowed_dot_general" in where
            summed = meant != kind and not scattered
            found[key] = replace(
                made, times=times, span=span, crossing=crossing, kind=meant, behind=behind, summed=summed
            )
    return list(found.values())


def _started(one: Instruction) -> bool:
    """Whether other work can run between a collective's start and its end."""
    return one.opcode.endswith("-start") and '"is_sync":true' not in one.attributes


def _meant(program: HloProgram, where: str, one: Instruction) -> str:
    """What an all-reduce is for: a gather if each operand is a part in zeros, a scatter if only parts of its results are read."""
    inside = program.computations[where]
    operands = [inside[name] for name in one.operands if name in inside]
    whole = sum(sum(x.bytes for x in o.arrays) for o in operands) or 1
    if sum(sum(x.bytes for x in o.arrays) for o in operands if _padded(program, inside, o)) > whole / 2:
        return "all-gather"
    users = _users(inside)
    results = (
        [one]
        if not one.type.startswith("(")
        else [x for x in users.get(one.name, []) if x.opcode == "get-tuple-element"]
    )
    parts = sum(sum(x.bytes for x in r.arrays) for r in results if _sliced(program, r, users))
    return "reduce-scatter" if parts > whole / 2 else "all-reduce"


def _padded(program: HloProgram, inside: dict[str, Instruction], one: Instruction) -> bool:
    """Whether an array is a smaller one in zeros: a dynamic-update-slice into a broadcast constant, alone or in a fusion."""
    given = [inside[name] for name in one.operands if name in inside]
    if one.opcode == "fusion" and called_by(one):
        inner = program.computations.get(called_by(one)[0], {})
        root = next((x for x in inner.values() if x.root), None)
        source = _through(root, inner) if root else None
        if source is None or source.opcode != "dynamic-update-slice":
            return False
        into = inner.get(source.operands[0])
        if (
            into is not None
            and into.opcode == "parameter"
            and into.literal.isdigit()
            and int(into.literal) < len(given)
        ):
            return given[int(into.literal)].opcode in ("broadcast", "constant")
        return into is not None and into.opcode in ("broadcast", "constant")
    if one.opcode in ("copy", "copy-done", "copy-start", "bitcast") and given:
        return _padded(program, inside, given[0])
    return (
        one.opcode == "dynamic-update-slice" and bool(given) and given[0].opcode in ("broadcast", "constant")
    )


def _sliced(program: HloProgram, one: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """Whether all that reads an array reads a part of it."""
    whole, readers = sum(x.bytes for x in one.arrays), users.get(one.name, [])
    for user in readers:
        if user.opcode in ("bitcast", "copy", "convert", "reshape"):
            if not _sliced(program, user, users):
                return False
        elif user.opcode == "fusion" and called_by(user):
            inner = program.computations.get(called_by(user)[0], {})
            within = _users(inner)
            at = [i for i, name in enumerate(user.operands) if name == one.name]
            read = [x for x in inner.values() if x.opcode == "parameter" and x.literal in map(str, at)]
            if any(_used(x, within, whole) >= whole for x in read):
                return False
        elif user.opcode not in ("dynamic-slice", "slice"):
            return False
    return bool(readers)


def _users(inside: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    """What reads each array of a computation."""
    users: dict[str, list[Instruction]] = {}
    for x in inside.values():
        for name in x.operands:
            users.setdefault(name, []).append(x)
    return users


def _collective(one: Instruction, kind: str, devices: int) -> Collective:
    arrays = _results(one, kind)
    groups: tuple[tuple[int, ...], ...]
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.attributes)
        groups = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""))
    else:
        groups = replica_groups(one.attributes, devices)
    group = max((len(g) for g in groups), default=1)
    size = sum(x.bytes for x in arrays) * (group if kind == "reduce-scatter" else 1)
    return Collective(one.name, kind, size, group, 1, 0.0, tuple(sorted({x.dtype for x in arrays})), groups)


def _results(one: Instruction, kind: str) -> list[Array]:
    """The arrays of a collective's result; an asynchronous start's type is (operands, results, ...)."""
    if not one.opcode.endswith("-start") or kind == "all-reduce":
        return one.arrays
    parts = _parts(one.type)
    return replace(one, type=parts[1] if len(parts) > 1 else one.type).arrays


def _parts(text: str) -> list[str]:
    """The elements of a tuple's type."""
    parts, depth, start = [], 0, 1
    for i, c in enumerate(text):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(c, 0)
        if (c == "," and depth == 1) or (depth == 0 and i):
            parts.append(text[start:i].strip())
            start = i + 1
    return parts


def replica_groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Devices of each group, from any of the three forms that XLA writes; an empty list is all of them together.

    {{0,1},{2,3}}, [groups,size]<=[a,b]T(1,0), and mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}.
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
    """Device numbers in order: of `[4,2]T(1,0)` those of an array of that shape, transposed; or as they are listed."""
    if not text:
        return np.arange(devices)
    shaped = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if shaped is None:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    shape = [int(n) for n in shaped[1].split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([int(n) for n in shaped[2].split(",")]) if shaped[2] else numbers).reshape(-1)


def _along(mesh: str, order: np.ndarray, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a named mesh; of an axis 'x':(2)4 the part of size 4 below the 2 major ones."""
    sizes: list[tuple[str, int]] = [(name, int(n)) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)]
    taken: list[tuple[str, int, int]] = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        whole = dict(sizes)[name]
        taken.append((name, int(before or 1), int(size or whole)))
    shape, inside = [], []
    for name, whole in sizes:
        cuts = sorted((before, size) for n, before, size in taken if n == name)
        done = 1
        for before, size in cuts:
            shape += [before // done, size]
            inside += [False, True]
            done = before * size
        shape.append(whole // done)
        inside.append(False)
    last = [i for i, x in enumerate(inside) if x]
    first = [i for i, x in enumerate(inside) if not x]
    count = math.prod(shape[i] for i in last)
    return _rows(order.reshape(shape).transpose([*first, *last]).reshape(-1, count))


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in group) for group in groups)


FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-start", "async-update", "async-done",
)  # fmt: skip


def memory_bytes(program: HloProgram) -> float:
    """Bytes that a step reads and writes in a device's main memory: operands and results of what isn't fused into another.

    Of what is only sliced, the slice counts; of what is updated in place, the update. Arrays that the layout puts in another
    memory (a TPU's VMEM, the host's) don't count.
    """
    total = 0.0
    for one, where, times, fused in walk(program):
        if fused or one.opcode in FREE or one.opcode.endswith("-done"):
            continue
        inside = program.computations[where]
        operands = [inside[name] for name in one.operands if name in inside]
        if one.opcode == "fusion":
            total += times * _fusion_bytes(program, one, operands)
        elif one.opcode in ("dynamic-slice", "slice", "gather"):
            total += times * 2 * _main(one.arrays)
        elif one.opcode in ("slice-start", "dynamic-slice-start"):
            total += times * 2 * _main(_results(one, one.opcode))
        elif one.opcode == "dynamic-update-slice":
            total += times * 2 * _main(operands[1].arrays if len(operands) > 1 else [])
        else:
            made = [
                x for x in one.arrays if not (one.opcode == "custom-call" and x.dtype == "s8")
            ]  # a library's workspace
            start = one.opcode.endswith("-start")  # its type holds the operands again
            total += times * (sum(_main(x.arrays) for x in operands) + _main(made) / (2 if start else 1))
    return total


def _main(arrays: list[Array]) -> int:
    return sum(x.bytes for x in arrays if not re.search(r"S\([1-9]\)", x.layout))


def _fusion_bytes(program: HloProgram, one: Instruction, operands: list[Instruction]) -> float:
    inner = program.computations.get(called_by(one)[0], {}) if called_by(one) else {}
    users = _users(inner)
    total = 0.0
    for x in inner.values():
        if x.opcode == "parameter" and x.literal.isdigit() and int(x.literal) < len(operands):
            whole = _main(operands[int(x.literal)].arrays)
            total += min(whole, _used(x, users, whole))
    root = next((x for x in inner.values() if x.root), None)
    if root is None:
        return total + _main(one.arrays)
    made = one.arrays
    roots = [inner[n] for n in root.operands if n in inner] if root.opcode == "tuple" else [root]
    if len(made) != len(roots):
        return total + _main(made)
    for x, array in zip(roots, made, strict=True):
        source = _through(x, inner)
        changed = source.opcode == "dynamic-update-slice" and inner.get(source.operands[1])
        total += min(_main([array]), sum(a.bytes for a in changed.arrays) if changed else math.inf)
    return total


def _used(x: Instruction, users: dict[str, list[Instruction]], whole: int) -> float:
    """Bytes of a fusion's parameter that it reads."""
    total = 0.0
    for user in users.get(x.name, []):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode in ("bitcast", "reshape"):
            total += _used(user, users, whole)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == x.name):
            return whole
    return total


def _through(x: Instruction, inner: dict[str, Instruction]) -> Instruction:
    while x.opcode in ("bitcast", "reshape", "copy", "convert") and x.operands and x.operands[0] in inner:
        x = inner[x.operands[0]]
    return x
