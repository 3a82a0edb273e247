"""Machines that need not be here: what the planner knows of a chip, and the devices of a topology to compile for."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

TARGETS = Path(__file__).parent / "targets"
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What a plan needs of a chip beside devices.PEAK_BF16. Rates are bytes a second a device, in one direction.

    kind: the start of jax's device_kind. memory: bytes that the driver or the compiler gives; kept: what of it the runtime keeps
    for itself. memory_rate: of the main memory. within: to the others of its host, or for a TPU along one axis of its slice (both
    ways round); across: a device's share of its host's network.
    """

    kind: str
    memory: int
    kept: int
    memory_rate: float
    within: float
    across: float
    source: str


# kept, NVIDIA: CUDA's context, cuBLAS, cuDNN and NCCL buffers; 1 GiB is an allowance (contexts alone are 0.4 to 0.7 GiB).
# kept, TPU: libtpu's compiler says how much of the memory a program may use; what is missing to the chip's size is kept.
# links, GPUs: NVLink in one direction, a 400 or 200 Gb/s InfiniBand port a GPU (the 4090: PCIe 4.0 x16, and 10 Gb/s Ethernet).
# links, TPUs: two directions of one axis of the torus, as they are measured (the data sheets say a ninth more).
CHIPS = {
    "h100": Chip("NVIDIA H100", 84942979072, GIB, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM5 data sheet"),
    "h200": Chip("NVIDIA H200", 151397597184, GIB, 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM data sheet"),
    "a100-40": Chip("NVIDIA A100", 42331013120, GIB, 1.555e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet"),
    "a100-80": Chip("NVIDIA A100", 85100068864, GIB, 2.039e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet"),
    "rtx4090": Chip(
        "NVIDIA GeForce RTX 4090", 25386352640, GIB, 1.008e12, 32e9, 1.25e9, "NVIDIA Ada white paper"
    ),
    "v5e": Chip(
        "TPU v5 lite", 16 * GIB, GIB // 4, 819e9, 90e9, 3.125e9, "docs.cloud.google.com/tpu/docs/v5e"
    ),
    "v5p": Chip("TPU v5", 96 * GIB, GIB // 4, 2.765e12, 180e9, 6.25e9, "docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(
        "TPU v6 lite", 32 * GIB, 3 * GIB // 4, 1.64e12, 180e9, 12.5e9, "docs.cloud.google.com/tpu/docs/v6e"
    ),
}
GPUS_A_HOST = 8
MOST = {"v5e": 256, "v6e": 256, "v5p": 8960}  # chips of a slice
EXAMPLES = "h100:1, h100:8, h100:2x8 (hosts x GPUs), v5e:4x4, v5p:4x4x4 or 2xv5e:4x4 (slices)"


@dataclass(frozen=True)
class Machine:
    """Devices to compile for, and the chip that they are; None for a chip that isn't in the table."""

    name: str
    chip: Chip | None
    devices: list[Any]

    @property
    def tpu(self) -> bool:
        """Whether its devices are TPUs."""
        return self.devices[0].platform == "tpu"

    def places(self) -> list[int]:
        """The host of each GPU, or the slice of each TPU: within one of them links are fast."""
        if self.tpu:
            return [getattr(d, "slice_index", None) or 0 for d in self.devices]
        return [d.process_index for d in self.devices]

    def axes(self, group: tuple[int, ...]) -> int:
        """Axes of a TPU slice's torus that a group of devices spans, each with links of its own; 1 for other machines."""
        coordinates: list[Any] = [getattr(self.devices[i], "coords", None) for i in group]
        if not coordinates or any(c is None for c in coordinates):
            return 1
        return max(1, sum(len({c[axis] for c in coordinates}) > 1 for axis in range(len(coordinates[0]))))


def machine(name: str) -> Machine:
    """The machine of a name such as h100:8; see EXAMPLES.

    Raises ValueError for a name that isn't known, and where the plugin that compiles for it is not installed.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*):(\d+(?:x\d+)*)", name)
    sizes = [int(n) for n in match[3].split("x")] if match else []
    slices = int(match[1] or 1) if match else 0
    chip = CHIPS.get(match[2]) if match else None
    if match is None or chip is None or 0 in sizes or slices < 1:
        raise ValueError(f"--devices {name!r} is not known; use one of {', '.join(CHIPS)}, as in {EXAMPLES}")
    if chip.kind.startswith("TPU"):
        return Machine(name, chip, _tpus(name, match[2], sizes, slices))
    if match[1] or len(sizes) > 2:
        raise ValueError(
            f"--devices {name!r} is not known; GPUs are {match[2]}:GPUS, or {match[2]}:HOSTSxGPUS"
        )
    if sizes[-1] > GPUS_A_HOST:
        whole = f", such as {match[2]}:{sizes[-1] // GPUS_A_HOST}x{GPUS_A_HOST}" if len(sizes) == 1 else ""
        such = f"a host has at most {GPUS_A_HOST} GPUs; use {match[2]}:HOSTSxGPUS{whole}"
        raise ValueError(f"--devices {name!r} is no machine: {such}")
    return Machine(name, chip, _gpus(match[2], sizes))


def local() -> Machine:
    """The devices of this process's backend."""
    found = jax.devices()
    kind = found[0].device_kind
    known = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    share = (
        float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)
        if found[0].platform in ("gpu", "cuda")
        else 1.0
    )
    memory = (found[0].memory_stats() or {}).get(
        "bytes_limit", 0
    ) / share  # what jax may take of a GPU is a share of it
    near = min(known, key=lambda chip: abs(chip.memory - memory), default=None)
    return Machine(f"{len(found)} x {kind}", near, list(found))


def _gpus(kind: str, sizes: list[int]) -> list[Any]:
    from jax.experimental import topologies

    text = (TARGETS / f"{kind}.txtpb").read_text()
    hosts, each = (1, *sizes)[-2:]
    try:
        found = topologies.get_topology_desc(
            "planned", platform="cuda", target_config=text, topology=f"1x{hosts}x{each}"
        )
        return list(found.devices)
    except (RuntimeError, ValueError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(
            f"compiling for {kind} takes jax's CUDA plugin: pip install 'jaxft[cuda12]' ({reason})"
        ) from e


def _tpus(name: str, kind: str, sizes: list[int], slices: int) -> list[Any]:
    from jax.experimental import topologies

    rank = 3 if kind == "v5p" else 2
    if len(sizes) != rank:
        such = "x".join("4" * rank)
        raise ValueError(
            f"--devices {name!r} is not known; a slice of {kind} has {rank} axes, such as {kind}:{such}"
        )
    if math.prod(sizes) > MOST[kind] or any(size > 1 and size % 2 for size in sizes):
        such = (
            f"a slice of {kind} has at most {MOST[kind]} chips, and 1 or an even number of them along an axis"
        )
        raise ValueError(f"--devices {name!r} is no machine: {such}")
    layout = "x".join(map(str, sizes))
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if sizes[0] % 2 or sizes[1] % 2:  # a host has 2 x 2 chips, or here one
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with _alone():
            return list(topologies.get_topology_desc(f"{kind}:{layout}", platform="tpu", **options).devices)
    except (RuntimeError, ValueError, NotImplementedError, OSError) as e:
        reason = str(e).splitlines()[0]
        if "INVALID_ARGUMENT" in reason:
            raise ValueError(f"--devices {name!r}: libtpu has no such slice ({reason})") from e
        raise ValueError(f"compiling for {kind} takes libtpu: pip install 'jaxft[tpu]' ({reason})") from e


@contextmanager
def _alone() -> Iterator[None]:
    """libtpu without a TPU: it asks no metadata server what this machine is, and leaves another process's lock alone."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    sys_error = os.dup(2)  # libtpu complains in C++ that it finds no TPU's environment
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(sys_error, 2)
        os.close(sys_error)
        os.close(nowhere)
