"""A run compiled for a machine that is not here: what its train step takes of a device's memory."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxft import train

TARGETS = Path(__file__).parent / "targets"


def devices(name: str) -> list[Any]:
    """Devices of a machine such as h100:1, h100:8 or h100:2x8 (hosts x GPUs), described by a file in targets/.

    Raises ValueError for a name that isn't known, and where jax's CUDA plugin, which compiles for them, is not installed.
    """
    known = sorted(path.stem for path in TARGETS.glob("*.txtpb"))
    match = re.fullmatch(r"(\w+):(?:(\d+)x)?(\d+)", name)
    if match is None or match[1] not in known:
        raise ValueError(f"--devices {name!r} is not known; use {' or '.join(known)}:GPUS, or :HOSTSxGPUS for several hosts")
    from jax.experimental import topologies

    text = (TARGETS / f"{match[1]}.txtpb").read_text()
    try:
        shape = f"1x{match[2] or 1}x{match[3]}"
        return list(topologies.get_topology_desc("planned", platform="cuda", target_config=text, topology=shape).devices)
    except (RuntimeError, ValueError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"compiling for {match[1]} takes jax's CUDA plugin: pip install 'jaxft[cuda12]' ({reason})") from e


def plan(run: train.Run, machine: list[Any]) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes a device of each part of the state, of temporaries and in total at the train step's peak; see `largest`)."""
    p, batch = train.abstract(run, machine)
    with jax.set_mesh(p.mesh):
        compiled = train.compile_step(p, batch)
    memory: Any = compiled.memory_analysis()
    frozen = {"frozen base": p.frozen.get("base"), "frozen adapter": p.frozen.get("adapter")}
    parts = {**frozen, "trained": p.state.trainable, "optimizer": p.state.opt_state, "reference and the like": p.state.aux}
    sizes = {name: _held(jax.tree.leaves(part)) for name, part in parts.items()}
    found = {name: size for name, size in sizes.items() if size}
    found["temporaries"] = memory.temp_size_in_bytes
    reused = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found["in all"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes + reused
    return found, largest(compiled.as_text() or "")


def largest(text: str, count: int = 5) -> dict[str, int]:
    """Bytes of the largest arrays that a compiled program makes beside its arguments, by dtype and shape.

    Its text has a paragraph a computation; what those that others call from within (fusions) name is never in memory.
    """
    inner = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    found: dict[str, int] = {}
    given: set[str] = set()
    for paragraph in text.split("\n\n"):
        head = re.match(r"(ENTRY )?%?([\w.-]+) ", paragraph)
        if head is None or head[2] in inner:
            continue
        for dtype, dims, operation in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", paragraph):
            name = f"{dtype}[{dims}]"
            found[name] = _bits(dtype) * math.prod(map(int, filter(None, dims.split(",")))) // 8
            given |= {name} if head[1] and operation == "parameter" else set()
    made = [(name, size) for name, size in found.items() if name not in given]
    return dict(sorted(made, key=lambda item: -item[1])[:count])


def _bits(dtype: str) -> int:
    """Of an element of a dtype as XLA writes it: pred, bf16, u8, f8e4m3fn."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8


def _held(leaves: Iterable[Any]) -> int:
    """Bytes a device of arrays with their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def words(found: dict[str, int], arrays: dict[str, int]) -> str:
    """One line a part, in GiB; then the largest arrays that the step computes."""
    lines = [f"{name:24s} {size / 2**30:8.2f} GiB per device" for name, size in found.items()]
    return "\n".join([*lines, "largest: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in arrays.items())])


