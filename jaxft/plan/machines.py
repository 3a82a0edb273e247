"""Machines that a plan can be made for without owning them: data sheets of chips, device topologies to
compile for, and a table of the models and methods that fit them.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft.distributed import devices, xla_flags

TPU_DOCS = "docs.cloud.google.com/tpu/docs/"
TARGETS = Path(__file__).parent / "targets"
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Memory and bandwidths of a chip; its peak FLOP/s is in devices.PEAK_BF16.

    Bandwidths are bytes per second per device, in one direction.
    kind: prefix of jax's device_kind.
    memory: bytes that the driver or the compiler reports; reserved: bytes of it that the runtime reserves.
    memory_rate: bandwidth of the main memory.
    within: bandwidth of a GPU to the other GPUs of its host, or of a TPU along one axis of its slice (both
    directions of the ring); across: network bandwidth of a host divided by its devices.
    source: where the figures are published.
    compiled_for: name in CHIPS of a similar chip that a plan compiles for instead, None for the chip itself.
    """

    kind: str
    memory: int
    reserved: int
    memory_rate: float
    within: float
    across: float
    source: str
    compiled_for: str | None = None


# reserved, NVIDIA: CUDA context, cuBLAS, cuDNN and NCCL buffers; 1 GiB is an allowance (contexts alone take
# 0.4 to 0.7 GiB).
# reserved, TPU: the chip's memory minus the limit that libtpu's compiler reports for a program.
# memory, NVIDIA: as CUDA reports it (torch.cuda.get_device_properties), less than on the data sheet.
# links, GPUs: NVLink (MI300X: Infinity Fabric) in one direction, and a 400 or 200 Gb/s port per GPU. Cards
# without NVLink: PCIe x16 of their generation (3.0: 16 GB/s, 4.0: 32, 5.0: 64) and 10 Gb/s Ethernet, or the
# network of the usual cloud host divided by its GPUs (L40S 100 Gb/s, A10G and L4 12.5).
# links, TPUs: measured bandwidth of both directions of one torus axis; data sheets state 1/9 more.
CHIPS = {
    "h100": Chip("NVIDIA H100", 84942979072, GIB, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM5 data sheet"),
    "h200": Chip("NVIDIA H200", 151397597184, GIB, 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM data sheet"),
    "a100-40": Chip("NVIDIA A100", 42331013120, GIB, 1.555e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet"),
    "a100-80": Chip("NVIDIA A100", 85100068864, GIB, 2.039e12, 300e9, 25e9, "NVIDIA A100 SXM data sheet"),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 25386352640, GIB, 1.008e12, 32e9, 1.25e9,
                    "NVIDIA Ada white paper"),
    "t4": Chip("Tesla T4", 15828254720, GIB, 3.2e11, 16e9, 1.25e9, "NVIDIA T4 data sheet"),
    "l4": Chip("NVIDIA L4", 23795335168, GIB, 3e11, 32e9, 1.5625e9, "NVIDIA L4 data sheet"),
    "a10g": Chip("NVIDIA A10G", 23684186112, GIB, 6e11, 32e9, 1.5625e9, "NVIDIA A10 data sheet, AWS G5"),
    "rtx3090": Chip("NVIDIA GeForce RTX 3090", 25437405184, GIB, 9.36e11, 32e9, 1.25e9,
                    "NVIDIA Ampere GA102 white paper"),
    "rtx5090": Chip("NVIDIA GeForce RTX 5090", 33652998144, GIB, 1.792e12, 64e9, 1.25e9,
                    "NVIDIA RTX Blackwell white paper"),
    "l40s": Chip("NVIDIA L40S", 47803531264, GIB, 8.64e11, 32e9, 12.5e9, "NVIDIA L40S data sheet"),
    "b200": Chip("NVIDIA B200", 191514017792, GIB, 8e12, 900e9, 50e9, "NVIDIA DGX B200 data sheet"),
    "mi300x": Chip("AMD Instinct MI300X", 192 * GIB, 2 * GIB, 5.3e12, 448e9, 50e9,
                   "AMD Instinct MI300X data sheet", "h200"),
    "v5e": Chip("TPU v5 lite", 16 * GIB, GIB // 4, 819e9, 90e9, 3.125e9, f"{TPU_DOCS}v5e"),
    "v5p": Chip("TPU v5", 96 * GIB, GIB // 4, 2.765e12, 180e9, 6.25e9, f"{TPU_DOCS}v5p"),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 3 * GIB // 4, 1.64e12, 180e9, 12.5e9, f"{TPU_DOCS}v6e"),
}  # fmt: skip
GPUS_PER_HOST = 8
# The GPU that stands for others with so much memory, in GB as they are sold.
BY_MEMORY = {
    "16gb": "t4", "24gb": "rtx3090", "32gb": "rtx5090", "40gb": "a100-40", "48gb": "l40s", "80gb": "a100-80",
    "141gb": "h200", "180gb": "b200", "192gb": "mi300x",
}  # fmt: skip
MAX_SLICE_CHIPS = {"v5e": 256, "v6e": 256, "v5p": 8960}
EXAMPLES = "h100:8, h100:2x8 (hosts x GPUs), 24gb (a GPU of that memory), v5e:4x4 or 2xv5e:4x4 (slices)"


@dataclass(frozen=True)
class Machine:
    """Devices to compile for. name: for reports, such as h100:8. chip: their data sheet, None if CHIPS has
    none. devices: jax's devices, or devices of a topology description, for which jax can only compile.
    """

    name: str
    chip: Chip | None
    devices: list[Any]

    @property
    def platform(self) -> str:
        """The platform of the devices: "cuda" for any GPU, "tpu" or "cpu"."""
        name: str = self.devices[0].platform
        return xla_flags.CUDA if name == "gpu" else name

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of a device."""
        if self.chip is not None and self.chip.compiled_for is not None:
            return devices.PEAK_BF16[self.chip.kind]
        return devices.peak_flops(self.devices[0])

    @property
    def peak_fp8(self) -> float:
        """Dense FP8 FLOP/s of a device, or its bfloat16 FLOP/s if it computes no FP8."""
        if self.chip is not None and self.chip.compiled_for is not None:
            return devices.PEAK_FP8.get(self.chip.kind, self.peak)
        return devices.peak_fp8_flops(self.devices[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for the report if programs are compiled for another chip (Chip.compiled_for), else empty."""
        if self.chip is None or self.chip.compiled_for is None:
            return ()
        return (f"compiled for {self.chip.compiled_for}, with the memory and the speed of {self.chip.kind}",)

    @property
    def tpu(self) -> bool:
        """Whether its devices are TPUs."""
        return self.devices[0].platform == "tpu"

    def domains(self) -> list[int]:
        """Return the index of each device's host (GPUs) or slice (TPUs), within which links are fast."""
        if self.tpu:
            return [getattr(d, "slice_index", None) or 0 for d in self.devices]
        return [d.process_index for d in self.devices]

    def axes(self, group: tuple[int, ...]) -> int:
        """Return how many axes of the torus the TPUs at indices `group` span, at least 1; 1 for GPUs."""
        coordinates: list[Any] = [getattr(self.devices[i], "coords", None) for i in group]
        if not coordinates or any(c is None for c in coordinates):
            return 1
        return max(1, sum(len({c[axis] for c in coordinates}) > 1 for axis in range(len(coordinates[0]))))


def machine(name: str) -> Machine:
    """Return the machine with a name such as h100:8; see EXAMPLES. A GPU without a count is one GPU.

    Raises ValueError for an unknown name, or if the plugin that compiles for it is not installed.
    """
    match = re.fullmatch(r"(?:(\d+)x(?=v))?([a-z0-9][\w -]*?)(?::(\d+(?:x\d+)*))?", name.strip().lower())
    kind = chip_name(match[2]) if match else None
    chip = CHIPS.get(kind or "")
    layout = (match and match[3]) or ("1" if chip and not chip.kind.startswith("TPU") else "")
    sizes = [int(n) for n in layout.split("x")] if layout else []
    slices = int(match[1] or 1) if match else 0
    if match is None or kind is None or chip is None or not sizes or 0 in sizes or slices < 1:
        raise ValueError(f"--devices {name!r} is unknown; use one of {', '.join(CHIPS)}, as in {EXAMPLES}")
    if chip.kind.startswith("TPU"):
        return Machine(name, chip, _tpu_devices(name, kind, sizes, slices))
    if match[1] or len(sizes) > 2:
        raise ValueError(f"--devices {name!r} is unknown; use {kind}:GPUS or {kind}:HOSTSxGPUS")
    if sizes[-1] > GPUS_PER_HOST:
        hosts = sizes[-1] // GPUS_PER_HOST
        example = f", such as {kind}:{hosts}x{GPUS_PER_HOST}" if len(sizes) == 1 else ""
        reason = f"a host has at most {GPUS_PER_HOST} GPUs; use {kind}:HOSTSxGPUS{example}"
        raise ValueError(f"--devices {name!r} does not exist: {reason}")
    return Machine(name, chip, _gpu_devices(chip.compiled_for or kind, sizes))


def chip_name(text: str) -> str | None:
    """Return a GPU's name in CHIPS, "rtx3090" for RTX-3090, 3090 or a memory size such as 24GB; None if it is
    unknown.
    """
    plain = (
        re.sub(r"[\s_-]", "", text.lower()).removeprefix("nvidia").removeprefix("amd").removeprefix("geforce")
    )
    if plain in BY_MEMORY:
        return BY_MEMORY[plain]
    spellings = {re.sub(r"[_-]", "", name): name for name in CHIPS}
    spellings |= {name.removeprefix("rtx"): name for name in CHIPS if name.startswith("rtx")}
    return spellings.get(plain) or spellings.get(plain.removesuffix("gb"))


def local() -> Machine:
    """Return a machine of jax's devices in this process; its chip is None if CHIPS has none of their kind."""
    devices = jax.devices()
    kind = devices[0].device_kind
    candidates = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    fraction = xla_flags.memory_fraction(os.environ) if devices[0].platform in ("gpu", "cuda") else 1.0
    # bytes_limit is only the fraction of a GPU's memory that jax may allocate
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0) / fraction
    nearest = min(candidates, key=lambda chip: abs(chip.memory - memory), default=None)
    return Machine(f"{len(devices)} x {kind}", nearest, list(devices))


def _gpu_devices(kind: str, sizes: list[int]) -> list[Any]:
    from jax.experimental import topologies

    text = (TARGETS / f"{kind}.txtpb").read_text()
    hosts, each = (1, *sizes)[-2:]
    try:
        topology = topologies.get_topology_desc(
            "planned", platform="cuda", target_config=text, topology=f"1x{hosts}x{each}"
        )
        return list(topology.devices)
    except (RuntimeError, ValueError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(
            f"compiling for {kind} needs jax's CUDA plugin: pip install 'jaxft[cuda12]'; without it, `jaxft "
            f"plan` without arguments prints what fits where ({reason})"
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
        raise ValueError(
            f"--devices {name!r} does not exist: a slice of {kind} has {limits}; use a slice within that"
        )
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
            raise ValueError(
                f"--devices {name!r}: libtpu does not support this slice ({reason}); use another slice"
            ) from e
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


FITS_FILE = Path(__file__).parent / "fits.json"  # sizes of programs that scripts/bench/fits.py compiled
MODELS = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "70B": "meta-llama/Llama-3.3-70B-Instruct",
    "405B": "meta-llama/Llama-3.1-405B-Instruct",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "Qwen3-32B": "Qwen/Qwen3-32B",
    "Gemma-3-27B": "google/gemma-3-27b-it",
}
TRAINING = ("full", "LoRA", "QLoRA")
OBJECTIVES = ("sft", "dpo")
GPUS = ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8")
HARDWARE = {
    "rtx4090": ("RTX 4090 24 GB", GPUS[:4]),
    "a100-40": ("A100 40 GB", GPUS),
    "h100": ("H100 80 GB", GPUS),
    "v5e": ("TPU v5e 16 GB", ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v6e": ("TPU v6e 32 GB", ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": ("TPU v5p 95 GB", ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")),
}
TABLE_NOTES = """\
GiB per device x the smallest number of devices that fits it (no factor: one device; v5p comes in slices of
four chips; – is more than the largest number tried). One row of 2048 tokens per device, remat=full; full is
Adafactor with bfloat16 weights and fused_backward=true. Read RTX 4090 for other GPUs of 24 GB (RTX 3090, L4
and A10G have 1 to 2 GB less), A100 40 GB for an L40S, H100 for an A100 of 80 GB, an H200, B200 or MI300X.

jaxft plan sft --devices 24gb data=rows.jsonl --price 0.5 plans a run of yours: memory, time, hours and money.
It compiles the run, for NVIDIA and AMD GPUs with jax's CUDA plugin (pip install 'jaxft[cuda12]'), for TPUs
with libtpu (pip install 'jaxft[tpu]'); no GPU or TPU is needed."""

Cells = Mapping[str, dict[str, Any]]


def stored_cells() -> dict[str, Any]:
    """Return the results of compiling train steps for machines, as stored in fits.json.

    The keys are "chip:size model method objective", such as "h100:2x8 8B LoRA sft". A value, called a cell,
    has `fits`, `total` (bytes per device), `devices` (how many) and further facts.
    """
    cells: dict[str, Any] = json.loads(FITS_FILE.read_text(encoding="utf-8"))
    return cells


def smallest(cells: Cells, chip: str, model: str, method: str, objective: str) -> dict[str, Any] | None:
    """Return the cell of the smallest machine with this chip that a train step fits; see stored_cells.

    model, method, objective: as in the keys of `cells`. The sizes of HARDWARE[chip] are tried in order. The
    cell gets `name`, the size as text, such as "2x8". Returns {} if no size fits, and None if a size without
    a cell, which has not been compiled, comes before one that fits.
    """
    for size in HARDWARE[chip][1]:
        cell = cells.get(f"{chip}:{size} {model} {method} {objective}")
        if cell is None:
            return None
        if cell["fits"]:
            return {**cell, "name": size}
    return {}


def cell_text(planned: Mapping[str, Any] | None) -> str:
    """Return a result of `smallest` as text, such as "12.3" (GiB on one device) or "12.3 × 8" (GiB per device
    on 8 devices); "–" for {}, "" for None.
    """
    if planned is None:
        return ""
    if not planned:
        return "–"
    size = f"{planned['total'] / 2**30:.1f}"
    return size if planned["devices"] == 1 else f"{size} × {planned['devices']}"


def rows_of_fits(
    cells: Cells,
    hardware: Sequence[str] = tuple(HARDWARE),
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] = TRAINING,
    objectives: Sequence[str] = OBJECTIVES,
) -> list[list[str]]:
    """Return rows of a table: names of a model, a method and an objective, then cell_text for each chip.

    cells: from stored_cells. hardware: keys of HARDWARE. models: keys of MODELS. methods, objectives: items
    of TRAINING and OBJECTIVES. A row for "dpo" shows the smallest machine that both SFT and DPO fit. A row
    without any text for a chip is left out.
    """
    rows = []
    for model, method, objective in itertools.product(models, methods, objectives):
        row = []
        for chip in hardware:
            best = smallest(cells, chip, model, method, objective)
            first = smallest(cells, chip, model, method, "sft") if objective == "dpo" else best
            if best and first:  # SFT and DPO both have to fit
                best = max(best, first, key=lambda planned: (planned["devices"], planned["total"]))
            row.append(cell_text(best))
        if any(row):
            name = MODELS[model].partition("/")[2].removesuffix("-Instruct")
            rows.append([name, method, "SFT" if objective == "sft" else "SFT + DPO", *row])
    return rows


def fits_report() -> str:
    """Return a table for a terminal: the memory and devices that each model and method needs."""
    rows = [["", "", "", *(name for name, _ in HARDWARE.values())], *rows_of_fits(stored_cells())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(["What fits where:", "", *lines, "", TABLE_NOTES])
