"""The peak FLOP/s of a device, for the model FLOPs utilisation (MFU) and for `jaxft plan`; its memory use."""

import re
import resource
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s by prefix of jax's device_kind, longer ones first; from the vendors' data sheets.
PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 5090": 209e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla T4": 8.1e12,  # no bfloat16 matmuls: the rate of float32
    "AMD Instinct MI300X": 1307e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

# Dense FP8 FLOP/s with float32 accumulation, likewise.
PEAK_FP8 = {
    "NVIDIA H200": 1979e12,
    "NVIDIA H100 PCIe": 1513e12,
    "NVIDIA H100 NVL": 1671e12,
    "NVIDIA H100": 1979e12,
    "NVIDIA B200": 4500e12,
    "AMD Instinct MI300X": 2615e12,
}
# Device kinds whose FP8 matmuls XLA uses: NVIDIA GPUs of compute capability 9.0 (Hopper) and above
# (Blackwell), which the devices of an abstract mesh do not state, and TPU v7. Ada GPUs (8.9) have FP8 matmuls
# too, but XLA of jax 0.10 converts to bfloat16 there (compiled for an RTX 4090). Up to TPU v6e, FP8 has the
# rate of bfloat16 (docs.cloud.google.com/tpu/docs/tpu7x).
FP8_DEVICES = re.compile(
    r"NVIDIA (H20|H100|H200|H800|GH200|B\d00|GB\d+|Thor|RTX PRO|GeForce RTX 50\d0)\b|TPU ?v?7"
)


def has_fp8_matmuls(device: Any) -> bool:
    """Whether XLA multiplies in FP8 on a device: a jax.Device or a jax.sharding.AbstractDevice."""
    return device.platform in ("gpu", "cuda", "tpu") and FP8_DEVICES.match(device.device_kind) is not None


def peak_fp8_flops(device: Any) -> float:
    """Return the peak FLOP/s of dense FP8 matmuls from the table PEAK_FP8. A device that the table lacks has
    twice its bfloat16 peak, and a device without FP8 matmuls the result of peak_flops.
    """
    if not has_fp8_matmuls(device):
        return peak_flops(device)
    for kind, peak in PEAK_FP8.items():
        if device.device_kind.startswith(kind):
            return peak
    return 2 * peak_flops(device)  # the ratio of all devices of the table


@cache
def cpu_has_bfloat16_matmuls() -> bool:
    """Whether this host's CPU can multiply bfloat16 matrices (AVX512-BF16, AMX, or Arm's bf16); True on
    systems that do not list the CPU's features in /proc/cpuinfo.

    On other CPUs XLA converts each element to float32 during the matmul, which then has two thirds of the
    speed of a float32 matmul.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is None or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def peak_flops(device: Any) -> float:
    """Return the peak FLOP/s of a device's dense bfloat16 matmuls. On a CPU without bfloat16 matmuls it is
    the peak of float32 matmuls.

    The value comes from the table PEAK_BF16. A device that the table lacks is benchmarked, in about 0.3 s.
    """
    for kind, peak in PEAK_BF16.items():
        if device.device_kind.startswith(kind):
            return peak
    size = 1024
    # without an explicit sharding: under an ambient mesh every device multiplies its own copy
    converts = device.platform == "cpu" and not cpu_has_bfloat16_matmuls()
    x = jnp.ones((size, size), jnp.float32 if converts else jnp.bfloat16)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def memory_gib(device: Any) -> float:
    """Return the peak memory use of the device in GiB; on CPU, which has no such statistics, the peak memory
    use of this process.
    """
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
