"""Peak matmul rate of a device, for MFU, and its memory use."""

import ctypes
import resource
import sys
import time
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
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device: Any) -> float:
    """Return the peak FLOP/s of dense bfloat16 matmuls.

    Taken from PEAK_BF16; a device without an entry is benchmarked in about 0.3 s.
    """
    for kind, peak in PEAK_BF16.items():
        if device.device_kind.startswith(kind):
            return peak
    size = 1024
    # without an explicit sharding: under an ambient mesh every device multiplies its own copy
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def memory_gib(device: Any) -> float:
    """Return the peak memory use in GiB: of the device, or on CPU (no statistics) of the process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def trim_heap() -> None:
    """Return freed heap memory, about 0.2 GiB after a compilation, to the system (glibc only)."""
    if hasattr(ctypes.pythonapi, "malloc_trim"):
        ctypes.pythonapi.malloc_trim(0)
