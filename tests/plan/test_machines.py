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
        "h1000",
        "12gb",
        "v5e",
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


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("H100", "h100"), ("RTX-3090", "rtx3090"), ("3090", "rtx3090"), ("GeForce RTX 5090", "rtx5090"),
        ("A100 80GB", "a100-80"), ("a100-40", "a100-40"), ("24GB", "rtx3090"), ("80gb", "a100-80"),
        ("AMD MI300X", "mi300x"), ("a100", None), ("gb", None), ("", None),
    ],
)  # fmt: skip
def test_a_chip_has_many_spellings(spelling, name):
    assert machines.chip_name(spelling) == name


def test_a_gpu_alone_is_one_gpu_and_reaches_the_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(machines, "_gpu_devices", lambda kind, sizes: asked.append((kind, sizes)) or [None])
    for name in ("L40S", "24gb:2", "RTX 4090:2x4", "mi300x:8"):
        machines.machine(name)
    # an MI300X's program is that of an H200
    assert asked == [("l40s", [1]), ("rtx3090", [2]), ("rtx4090", [2, 4]), ("h200", [8])]


def test_a_chip_that_is_compiled_for_another_has_its_own_peak_and_memory():
    device = SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
    amd = machines.Machine("mi300x:1", machines.CHIPS["mi300x"], [device])
    own = machines.Machine("h200:1", machines.CHIPS["h200"], [device])
    assert amd.peak == 1307e12 and own.peak == devices.peak_flops(device) and amd.peak_fp8 == 2615e12
    assert "compiled for h200" in amd.notes[0] and not own.notes


def test_longer_kinds_come_before_their_prefixes():
    kinds = list(devices.PEAK_BF16)  # the first that a device's kind begins with counts
    assert not [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :] if b.startswith(a)]


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
    gpus -= {name for name, chip in machines.CHIPS.items() if chip.compiled_for in machines.CHIPS}
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
