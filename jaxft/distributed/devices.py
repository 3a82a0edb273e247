"""What a device can do: peak matrix-product rate for MFU, and the memory in use."""

import ctypes
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s by the start of jax's device_kind, from the vendors' data sheets.
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
    """FLOP/s of dense bfloat16 products: from the table, or for a device that isn't in it measured in about 0.3 s."""
    for kind, peak in PEAK_BF16.items():
        if device.device_kind.startswith(kind):
            return peak
    size = 1024
    x = jnp.ones(
        (size, size), jnp.bfloat16
    )  # not placed: under an ambient mesh every device multiplies its own copy
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def memory_gib(device: Any) -> float:
    """Peak bytes in use on the device, or where it doesn't tell (CPU) the process's peak resident size, in GiB."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def trim_heap() -> None:
    """Give freed heap back to the system where the C library is glibc: a compilation leaves about 0.2 GiB of it behind."""
    if hasattr(ctypes.pythonapi, "malloc_trim"):
        ctypes.pythonapi.malloc_trim(0)
