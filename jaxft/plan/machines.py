"""Machines that a plan can be made for without owning them: data sheets of chips, and device topologies to
compile for.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft.distributed import xla_flags

TARGETS = Path(__file__).parent / "targets"
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Memory and bandwidths of a chip; its peak FLOP/s is in devices.PEAK_BF16.

    Bandwidths are bytes per second per device, in one direction.
    kind: prefix of jax's device_kind.
    memory: bytes that the driver or the compiler reports; reserved: bytes of it that the runtime reserves.
    memory_rate: bandwidth of the main memory.
    within: bandwidth to other devices of the host, or of a TPU along one axis of its slice (both directions
    of the ring); across: a device's fraction of the network bandwidth of its host.
    """

    kind: str
    memory: int
    reserved: int
    memory_rate: float
    within: float
    across: float
    source: str


# reserved, NVIDIA: CUDA context, cuBLAS, cuDNN and NCCL buffers; 1 GiB is an allowance (contexts alone take
# 0.4 to 0.7 GiB).
# reserved, TPU: the chip's memory minus the limit that libtpu's compiler reports for a program.
# links, GPUs: NVLink in one direction, and a 400 or 200 Gb/s InfiniBand port per GPU (the 4090: PCIe 4.0 x16
# and 10 Gb/s Ethernet).
# links, TPUs: measured bandwidth of both directions of one torus axis; data sheets state 1/9 more.
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
GPUS_PER_HOST = 8
MAX_SLICE_CHIPS = {"v5e": 256, "v6e": 256, "v5p": 8960}
EXAMPLES = "h100:1, h100:8, h100:2x8 (hosts x GPUs), v5e:4x4, v5p:4x4x4 or 2xv5e:4x4 (slices)"


@dataclass(frozen=True)
class Machine:
    """Devices to compile for and their chip, which is None if CHIPS has no such chip."""

    name: str
    chip: Chip | None
    devices: list[Any]

    @property
    def platform(self) -> str:
        """The platform of its devices, as in distributed/xla_flags.py."""
        name: str = self.devices[0].platform
        return xla_flags.CUDA if name == "gpu" else name

    @property
    def tpu(self) -> bool:
        """Whether its devices are TPUs."""
        return self.devices[0].platform == "tpu"

    def domains(self) -> list[int]:
        """Return the host of each GPU, or the slice of each TPU; links inside a host or slice are fast."""
        if self.tpu:
            return [getattr(d, "slice_index", None) or 0 for d in self.devices]
        return [d.process_index for d in self.devices]

    def axes(self, group: tuple[int, ...]) -> int:
        """Return how many torus axes a group of TPUs spans, each with separate links; 1 for GPUs."""
        coordinates: list[Any] = [getattr(self.devices[i], "coords", None) for i in group]
        if not coordinates or any(c is None for c in coordinates):
            return 1
        return max(1, sum(len({c[axis] for c in coordinates}) > 1 for axis in range(len(coordinates[0]))))


def machine(name: str) -> Machine:
    """Return the machine with a name such as h100:8; see EXAMPLES.

    Raises ValueError for an unknown name, or if the plugin that compiles for it is not installed.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*):(\d+(?:x\d+)*)", name)
    sizes = [int(n) for n in match[3].split("x")] if match else []
    slices = int(match[1] or 1) if match else 0
    chip = CHIPS.get(match[2]) if match else None
    if match is None or chip is None or 0 in sizes or slices < 1:
        raise ValueError(f"--devices {name!r} is unknown; use one of {', '.join(CHIPS)}, as in {EXAMPLES}")
    if chip.kind.startswith("TPU"):
        return Machine(name, chip, _tpu_devices(name, match[2], sizes, slices))
    if match[1] or len(sizes) > 2:
        raise ValueError(f"--devices {name!r} is unknown; use {match[2]}:GPUS or {match[2]}:HOSTSxGPUS")
    if sizes[-1] > GPUS_PER_HOST:
        hosts = sizes[-1] // GPUS_PER_HOST
        example = f", such as {match[2]}:{hosts}x{GPUS_PER_HOST}" if len(sizes) == 1 else ""
        reason = f"a host has at most {GPUS_PER_HOST} GPUs; use {match[2]}:HOSTSxGPUS{example}"
        raise ValueError(f"--devices {name!r} does not exist: {reason}")
    return Machine(name, chip, _gpu_devices(match[2], sizes))


def local() -> Machine:
    """Return the devices of this process's backend as a machine."""
    found = jax.devices()
    kind = found[0].device_kind
    candidates = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    fraction = xla_flags.memory_fraction(os.environ) if found[0].platform in ("gpu", "cuda") else 1.0
    # bytes_limit is only the fraction of a GPU's memory that jax may allocate
    memory = (found[0].memory_stats() or {}).get("bytes_limit", 0) / fraction
    nearest = min(candidates, key=lambda chip: abs(chip.memory - memory), default=None)
    return Machine(f"{len(found)} x {kind}", nearest, list(found))


def _gpu_devices(kind: str, sizes: list[int]) -> list[Any]:
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
            f"compiling for {kind} needs jax's CUDA plugin: pip install 'jaxft[cuda12]' ({reason})"
        ) from e


def _tpu_devices(name: str, kind: str, sizes: list[int], slices: int) -> list[Any]:
    from jax.experimental import topologies

    rank = 3 if kind == "v5p" else 2
    if len(sizes) != rank:
        example = "x".join("4" * rank)
        raise ValueError(
            f"--devices {name!r} is unknown; a slice of {kind} has {rank} axes, such as {kind}:{example}"
        )
    if math.prod(sizes) > MAX_SLICE_CHIPS[kind] or any(size > 1 and size % 2 for size in sizes):
        limits = f"at most {MAX_SLICE_CHIPS[kind]} chips, and 1 or an even number of them along each axis"
        raise ValueError(f"--devices {name!r} does not exist: a slice of {kind} has {limits}")
    layout = "x".join(map(str, sizes))
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if sizes[0] % 2 or sizes[1] % 2:  # instead of the default of 2 x 2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with _libtpu_without_tpu():
            return list(topologies.get_topology_desc(f"{kind}:{layout}", platform="tpu", **options).devices)
    except (RuntimeError, ValueError, NotImplementedError, OSError) as e:
        reason = str(e).splitlines()[0]
        if "INVALID_ARGUMENT" in reason:
            raise ValueError(f"--devices {name!r}: libtpu does not support this slice ({reason})") from e
        raise ValueError(f"compiling for {kind} needs libtpu: pip install 'jaxft[tpu]' ({reason})") from e


@contextmanager
def _libtpu_without_tpu() -> Iterator[None]:
    """Use libtpu without a TPU: skip the metadata server and the lock file, and hide warnings."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    sys_error = os.dup(2)  # libtpu warns from C++ that it finds no TPU environment
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(sys_error, 2)
        os.close(sys_error)
        os.close(nowhere)
