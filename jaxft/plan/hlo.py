"""Parser of HLO text: instructions of a compiled program, and how often a step runs each of them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)")


class Array(NamedTuple):
    """An array of an HLO type such as f32[8,128]{1,0}. layout: the text in braces, "" without any; S(n)
    in it is a memory space other than main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Size in bytes; 4-bit elements take half a byte."""
        return -(-bits(self.dtype) * math.prod(self.shape) // 8)


@dataclass(frozen=True)
class Instruction:
    """One HLO instruction: `name = type opcode(operands), attributes`.

    operands: names of the instructions whose results it reads. literal: the text between the brackets, such
    as a constant's value or a parameter's index. root: whether the instruction is marked ROOT, so that its
    result is the result of the computation that contains it.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def arrays(self) -> list[Array]:
        """Types of the result's arrays: one, or a tuple's elements in order."""
        return arrays(self.type)

    @property
    def bytes(self) -> int:
        """Size of all arrays of the result."""
        return sum(array.bytes for array in self.arrays)


@dataclass(frozen=True)
class HloProgram:
    """A parsed HLO module.

    computations: name of a computation -> name of an instruction in it -> the instruction. entry: name of the
    computation that the program starts with. unknown_loops: names of the while loops whose trip count is
    unknown, which count as one iteration; empty until `walk` visits them.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    unknown_loops: list[str] = field(default_factory=list)


def bits(dtype: str) -> int:
    """Return the bits per element of a dtype in XLA's spelling (bf16, u8, f8e4m3fn); 8 for pred."""
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 8


def arrays(text: str) -> list[Array]:
    """Parse the arrays of an HLO type: one, or several for a tuple such as (f32[8,128]{1,0}, u32[])."""
    return [
        Array(t, tuple(int(n) for n in dims.split(",") if n), layout or "")
        for t, dims, layout in _ARRAY.findall(text)
    ]


def parse_hlo(text: str) -> HloProgram:
    """Parse the text that `compiled.as_text()` returns; an empty text becomes a program without computations.

    Raises ValueError if another text has no complete entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, now = "", None
    for line in text.splitlines():
        if now is None:
            head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if head and not line.startswith((" ", "HloModule")):
                now = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        # a line of a kernel's multi-line attributes may begin with a bracket too
        elif re.fullmatch(r"\}(, execution_thread=.*)?", line.rstrip()):
            now = None
        elif (op := _instruction(line)) is not None:
            now[op.name] = op
    if text and (not entry or now is not None):
        raise ValueError(
            "the HLO text of the compiled program has no complete entry computation; it begins "
            f"{text[:60]!r}. This version of jax may have another HLO syntax: use the one that jaxft requires"
        )
    return HloProgram(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    call = re.match(r"\s*([\w-]+)\(", rest[end:])
    if call is None:
        return None
    opened = end + call.end() - 1
    closed = _closing(rest, opened)
    inside = rest[opened + 1 : closed]
    named = re.findall(r"%([\w.-]+)", inside) or re.findall(r"(?:^|[ ,])([A-Za-z][\w.-]*)(?=,|$)", inside)
    kind, attributes = rest[:end].strip(), rest[closed + 1 :]
    return Instruction(head[2], kind, call[1], tuple(named), inside, attributes, head[1] is not None)


def _closing(text: str, start: int) -> int:
    """Return the index of the `)` that closes the `(` at `start`; the length of `text` if none does."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def walk(program: HloProgram) -> Iterator[tuple[Instruction, str, float, bool]]:
    """Yield (instruction, name of its computation, executions per step, whether it is inside a fusion).

    Trip counts of nested loops multiply. Every branch of a conditional counts as executed.
    """
    yield from _walk(program, program.entry, 1.0, False)


def _walk(
    program: HloProgram, name: str, times: float, fused: bool
) -> Iterator[tuple[Instruction, str, float, bool]]:
    for op in program.computations.get(name, {}).values():
        yield op, name, times, fused
        called = called_computations(op)
        iterations = trip_count(program, op, name) if op.opcode == "while" else 1
        if op.opcode in ("while", "call", "conditional", "fusion", "async-start"):
            for inner in called:
                yield from _walk(program, inner, times * iterations, fused or op.opcode == "fusion")


def called_computations(op: Instruction) -> list[str]:
    """Return the names of the computations that an instruction calls."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
    more = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
    return [*_CALLED.findall(op.attributes), *more]


def trip_count(program: HloProgram, loop: Instruction, where: str) -> int:
    """Return the trip count of a while loop.

    It is the compiler's annotation, or computed from the counter's start, step and limit; without both it is
    1 and the loop is added to program.unknown_loops. where: name of the computation that has the loop.
    """
    annotated = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if annotated:
        return int(annotated[1])
    condition, body = (re.search(rf"{part}=%?([\w.-]+)", loop.attributes) for part in ("condition", "body"))
    count = _counter_trips(program, loop, where, condition[1], body[1]) if condition and body else None
    if count is None and loop.name not in program.unknown_loops:
        program.unknown_loops.append(loop.name)
    return 1 if count is None else count


def _counter_trips(
    program: HloProgram, loop: Instruction, where: str, condition: str, body: str
) -> int | None:
    """Return the trip count of a loop `for (i = start; i < limit; i += step)` with constants; else None.

    where, condition, body: names of the computations that contain the loop, test the counter and change it.
    """
    inside = program.computations.get(condition, {})
    root = next((op for op in inside.values() if op.root), None)
    compare = root
    if root is not None and root.opcode == "fusion":  # a fused comparison has its operands in order
        fused = program.computations.get(called_computations(root)[0], {}).values()
        compare = next((op for op in fused if op.opcode == "compare"), None)
    if root is None or compare is None or compare.opcode != "compare":
        return None
    sides = root.operands
    if len(sides) != 2 or "direction=LT" not in compare.attributes:
        return None
    counter, limit = inside.get(sides[0]), _constant(inside.get(sides[1]))
    index = re.search(r"index=(\d+)", counter.attributes) if counter else None
    if index is None or limit is None:
        return None
    outer, inner = program.computations[where], program.computations.get(body, {})
    start = _constant(_copied(outer, _element(outer, loop.operands, int(index[1]))))
    step = _copied(inner, _element(inner, None, int(index[1])))
    if step is not None and step.opcode == "fusion" and called_computations(step):  # a fused addition
        inner = program.computations.get(called_computations(step)[0], {})
        step = next((op for op in inner.values() if op.root), None)
    added = step.operands if step is not None and step.opcode == "add" else ()
    by = next((n for n in (_constant(inner.get(name)) for name in added) if n), None)
    return None if start is None or by is None else max(0, -(-(limit - start) // by))


def _element(inside: dict[str, Instruction], named: tuple[str, ...] | None, index: int) -> Instruction | None:
    """Return the instruction whose result is element `index` of a tuple.

    inside: the instructions of a computation by name. named: named[0] is the instruction that builds the
    tuple; None for the root. Returns None if that is no `tuple` instruction or has no such element.
    """
    op = inside.get(named[0]) if named else next((i for i in inside.values() if i.root), None)
    if op is None or op.opcode != "tuple" or index >= len(op.operands):
        return None
    return inside.get(op.operands[index])


def _copied(inside: dict[str, Instruction], op: Instruction | None) -> Instruction | None:
    """Return the instruction that `op` copies, bitcasts or converts, perhaps in several steps; `op` if it
    does nothing of this kind, None if its operand is not in the computation `inside`.
    """
    copies = ("copy", "bitcast", "convert", "copy-done", "copy-start")
    while op is not None and op.opcode in copies and op.operands:
        op = inside.get(op.operands[0])
    return op


def _constant(op: Instruction | None) -> int | None:
    if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.literal):
        return None
    return int(op.literal)
