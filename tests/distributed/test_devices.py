"""Peak FLOP/s by device kind, the benchmark of unlisted devices, and memory use."""

import types
from pathlib import Path

import jax
import pytest

from jaxft.distributed.devices import (
    PEAK_BF16,
    PEAK_FP8,
    cpu_has_bfloat16_matmuls,
    has_fp8_matmuls,
    memory_gib,
    peak_flops,
    peak_fp8_flops,
)

KINDS = {  # values of jax's device_kind
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def device(kind, **stats):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


@pytest.mark.parametrize("kind", KINDS)
def test_every_device_kind_has_its_data_sheet_peak(kind):
    assert peak_flops(device(kind)) == KINDS[kind]


def test_table_lists_longer_prefixes_first():
    for names in map(list, (PEAK_BF16, PEAK_FP8)):
        for i, long in enumerate(names):
            assert not [short for short in names[:i] if long.startswith(short)], long


def test_devices_with_fp8_matmuls():
    yes = """NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe, NVIDIA H200, NVIDIA GH200 480GB, NVIDIA H20,
        NVIDIA B200, NVIDIA B300 SXM6 AC, NVIDIA GB200, NVIDIA GB10, TPU7x, TPU v7x,
        NVIDIA RTX PRO 6000 Blackwell Workstation Edition, NVIDIA GeForce RTX 5090"""
    no = """NVIDIA A100-SXM4-80GB, NVIDIA A10G, NVIDIA RTX A6000, NVIDIA GeForce RTX 3090, Tesla T4,
        NVIDIA GeForce GTX 1080, NVIDIA A40, Tesla V100-SXM2-16GB, TPU v5 lite, TPU v5, TPU v6 lite, TPU v4,
        Quadro RTX 5000, AMD Instinct MI250, NVIDIA L4, NVIDIA L40S, NVIDIA RTX 6000 Ada Generation,
        NVIDIA GeForce RTX 4090"""
    for kinds, expected in ((yes, True), (no, False)):
        for kind in kinds.split(","):
            kind = " ".join(kind.split())
            one = types.SimpleNamespace(platform="tpu" if "TPU" in kind else "gpu", device_kind=kind)
            assert has_fp8_matmuls(one) == expected, kind
            if kind.startswith(tuple(PEAK_FP8)):  # others are benchmarked
                assert peak_fp8_flops(one) / peak_flops(one) == pytest.approx(2, rel=0.02)
    assert not has_fp8_matmuls(jax.devices()[0])


def test_unlisted_device_is_benchmarked():
    peak = peak_flops(jax.devices()[0])
    assert 1e9 < peak < 1e15


def test_memory_is_the_peak_of_the_device_or_else_of_the_process():
    assert memory_gib(device("x", peak_bytes_in_use=3 * 2**30, bytes_in_use=1)) == 3.0
    assert 0.05 < memory_gib(jax.devices()[0]) < 1024


@pytest.mark.parametrize(("listed", "expected"), [
    ("flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\n", True),
    ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
    ("model name\t: a CPU\nflags\t\t: fpu avx2 avx512f\nbugs\t\t: none\n", False),
    ("BogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\n", True),
    ("BogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm\n", False),
    ("processor\t: 0\n", True),
])  # fmt: skip
def test_bfloat16_matmuls_of_a_cpu_are_read_from_its_list_of_features(monkeypatch, listed, expected):
    monkeypatch.setattr(Path, "read_text", lambda path, **kwargs: listed)
    cpu_has_bfloat16_matmuls.cache_clear()
    try:
        assert cpu_has_bfloat16_matmuls() is expected
    finally:
        cpu_has_bfloat16_matmuls.cache_clear()
