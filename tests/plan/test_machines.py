"""Machines that --devices names: their peaks, memory and compilation targets.

The tests of errors without jax's CUDA plugin and libtpu are skipped where those are installed.
"""

from types import SimpleNamespace

import jax
import pytest
from tiny_plan import HAS_CUDA, HAS_TPU

from jaxft.distributed import devices
from jaxft.plan import machines


@pytest.mark.parametrize(
    "name",
    [
        "h100",
        "h100:0x",
        "b300:8",
        "h100:2x2x2",
        "../h100:1",
        "",
        "v5p:4x4",
        "v5e:4x4x4",
        "2xh100:8",
        "h100:0",
    ],
)
def test_an_unknown_machine_raises_one_line(name):
    with pytest.raises(ValueError, match="is unknown; ") as found:
        machines.machine(name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:16", "a host has at most 8 GPUs; use h100:HOSTSxGPUS, such as h100:2x8"),
        ("a100-40:2x16", "a host has at most 8 GPUs; use a100-40:HOSTSxGPUS"),
        ("v5e:32x32", "a slice of v5e has at most 256 chips"),
        ("v6e:3x3", "1 or an even number of them along each axis"),
    ],
)
def test_a_machine_that_does_not_exist_raises(name, message):
    with pytest.raises(ValueError, match=f"--devices '{name}' does not exist: .*{message}"):
        machines.machine(name)


def test_a100_variants_are_distinguished_by_memory_for_any_memory_fraction(monkeypatch):
    for fraction in ("0.75", "0.5", "0.9"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
        for name in ("a100-40", "a100-80"):
            stats = {"bytes_limit": int(machines.CHIPS[name].memory * float(fraction))}
            gpu = SimpleNamespace(
                device_kind="NVIDIA A100-SXM4", platform="gpu", memory_stats=lambda stats=stats: stats
            )
            monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
            assert machines.local().chip is machines.CHIPS[name]


def test_every_chip_has_a_peak_and_every_gpu_a_compilation_target():
    gpus = {name for name, chip in machines.CHIPS.items() if not chip.kind.startswith("TPU")}
    assert {path.stem for path in machines.TARGETS.glob("*.txtpb")} == gpus
    for name, chip in machines.CHIPS.items():
        assert any(chip.kind.startswith(kind) or kind.startswith(chip.kind) for kind in devices.PEAK_BF16), (
            name
        )
        assert chip.source and chip.reserved < chip.memory and chip.across < chip.within < chip.memory_rate
    for name in gpus:
        assert (
            f"device_memory_size: {machines.CHIPS[name].memory}\n"
            in (machines.TARGETS / f"{name}.txtpb").read_text()
        )


@pytest.mark.skipif(HAS_CUDA, reason="the CUDA plugin is installed")
def test_without_the_cuda_plugin_the_error_names_the_extra():
    with pytest.raises(ValueError, match=r"needs jax's CUDA plugin: pip install 'jaxft\[cuda12\]'"):
        machines.machine("h100:1")


@pytest.mark.skipif(HAS_TPU, reason="libtpu is installed")
def test_without_libtpu_the_error_names_the_extra():
    with pytest.raises(ValueError, match=r"needs libtpu: pip install 'jaxft\[tpu\]'"):
        machines.machine("v5e:4x4")
