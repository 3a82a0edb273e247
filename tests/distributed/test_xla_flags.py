"""The platform's defaults for XLA and glibc: what the user sets stays, and unknown flags are never set."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft.distributed import xla_flags
from jaxft.distributed.xla_flags import CPU, CUDA, TPU, PlatformSetting
from jaxft.plan import plan

GPU_FLAG = "xla_gpu_enable_latency_hiding_scheduler"
ROWS = (
    PlatformSetting(CUDA, "XLA_FLAGS", GPU_FLAG, "true", "why", "source"),
    PlatformSetting(CUDA, "XLA_FLAGS", "xla_second", "3", "why", "source"),
    PlatformSetting(CUDA, "FRACTION", "", "0.95", "why", "source", ("OLD_FRACTION",)),
    PlatformSetting(TPU, "LIBTPU_INIT_ARGS", "xla_tpu_third", "true", "why", "source"),
)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(xla_flags, "TABLE_OF_SETTINGS", ROWS)


def settings(platform=CUDA, knows=lambda variable, flag: True, **environ):
    return xla_flags.with_settings(platform, environ, knows)


def test_every_row_has_a_reason_and_a_source():
    for row in xla_flags.TABLE_OF_SETTINGS:
        assert row.platform in (CUDA, TPU, CPU) and row.value and row.why
        assert row.source.startswith("https://")
        assert bool(row.flag) == (row.variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", xla_flags.TUNABLES))


def test_a_platform_gets_its_rows(rows):
    assert settings() == {"XLA_FLAGS": f"--{GPU_FLAG}=true --xla_second=3", "FRACTION": "0.95"}
    assert settings(TPU) == {"LIBTPU_INIT_ARGS": "--xla_tpu_third=true"}
    assert settings(CPU) == {}


@pytest.mark.parametrize(
    "given", ["--xla_second=5", "--xla_second", "-xla_second=5", "--a=b  --xla_second=5", "--noxla_second"]
)
def test_the_users_value_of_a_flag_and_other_flags_stay(rows, given):
    assert settings(XLA_FLAGS=given)["XLA_FLAGS"] == f"{given} --{GPU_FLAG}=true"


def test_a_flag_whose_name_begins_with_that_of_another_is_another(rows):
    assert "--xla_second=3" in settings(XLA_FLAGS="--xla_second_try=1")["XLA_FLAGS"]


@pytest.mark.parametrize("name", ["FRACTION", "OLD_FRACTION"])
def test_the_users_value_of_a_variable_stays_under_any_of_its_names(rows, name):
    assert "FRACTION" not in settings(**{name: "0.5"})


def test_a_file_of_flags_stays(rows):
    assert "XLA_FLAGS" not in settings(XLA_FLAGS="/home/me/flags.txt")


@pytest.mark.parametrize("flags", [f"--{GPU_FLAG}=false", "--xla_gpu_enable_pipelined_all_reduce=false"])
def test_an_optimisation_level_that_switches_on_what_the_user_switched_off_is_not_set(flags):
    assert settings()["JAX_OPTIMIZATION_LEVEL"] == "O1"
    assert settings(XLA_FLAGS="--xla_second=3")["JAX_OPTIMIZATION_LEVEL"] == "O1"
    assert "JAX_OPTIMIZATION_LEVEL" not in settings(XLA_FLAGS=flags)


def test_an_unknown_flag_is_not_set(rows):
    assert settings(knows=lambda variable, flag: flag != "xla_second")["XLA_FLAGS"] == f"--{GPU_FLAG}=true"


@pytest.mark.parametrize("off", ["off", "OFF", "0", "none", "disable"])
def test_one_variable_switches_all_off(rows, off):
    assert settings(JAXFT_XLA_FLAGS=off) == {}
    assert (
        xla_flags.settings_lines({"JAXFT_XLA_FLAGS": off, "JAX_PLATFORMS": "cuda", "FRACTION": "0.95"}) == []
    )


def test_the_start_up_line_lists_what_is_in_effect(rows):
    environ = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_second=5 --mine=1"}
    environ |= settings(**environ)
    (line,) = xla_flags.settings_lines(environ)
    assert line.startswith(f"defaults for NVIDIA GPUs: --{GPU_FLAG}=true, FRACTION=0.95 (JAXFT_XLA_FLAGS=off")
    assert settings(**environ) == {}  # processes that this one starts have them already
    assert xla_flags.settings_lines({"JAX_PLATFORMS": "cpu", "FRACTION": "0.95"}) == []


@pytest.mark.parametrize(
    ("environ", "files", "installed", "found"),
    [
        ({}, ["nvidia0", "nvidiactl"], "jax_plugins.xla_cuda12", CUDA),
        ({}, ["nvidia0"], "jax_plugins.xla_cuda13", CUDA),
        ({}, ["dxg"], "jax_plugins.xla_cuda12", CUDA),
        ({}, ["nvidia0"], "", CPU),  # a GPU that jax cannot use
        ({}, [], "jax_plugins.xla_cuda12", CPU),  # a plugin without a GPU
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], "jax_plugins.xla_cuda12", CPU),
        ({"JAX_PLATFORMS": "cpu"}, ["nvidia0"], "jax_plugins.xla_cuda12", CPU),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], "", CUDA),
        ({"JAX_PLATFORMS": "GPU"}, [], "", CUDA),
        ({}, ["accel0"], "libtpu", TPU),
        ({}, ["vfio/0"], "libtpu", TPU),
        ({}, ["accel0"], "", CPU),
        ({}, [], "libtpu", CPU),
        ({"JAX_PLATFORMS": "tpu,cpu"}, [], "", TPU),
        ({"JAX_PLATFORMS": "rocm"}, [], "", "rocm"),
    ],
)
def test_the_platform_is_known_without_starting_jax(monkeypatch, tmp_path, environ, files, installed, found):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(xla_flags, "is_installed", lambda module: module == installed)
    assert xla_flags.accelerator(environ, tmp_path, tmp_path / "none") == found


GPU, NETWORK, CHIP = ("0x10de", "0x2330"), ("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")


@pytest.mark.parametrize(
    ("pci", "found"), [([GPU], CUDA), ([GPU, NETWORK], CUDA), ([NETWORK, CHIP], TPU), ([], TPU)]
)
def test_a_gpu_that_is_passed_by_vfio_is_no_tpu(monkeypatch, tmp_path, pci, found):
    """With libtpu and a CUDA plugin installed; Google's network card is in every virtual machine there."""
    for name in ("dev/nvidia0", "dev/vfio/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for number, ids in enumerate(pci):
        folder = tmp_path / "pci" / f"0000:00:{number:02}.0"
        folder.mkdir(parents=True)
        for name, text in zip(("vendor", "device"), ids, strict=True):
            (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr(xla_flags, "is_installed", lambda module: True)
    assert xla_flags.accelerator({}, tmp_path / "dev", tmp_path / "pci") == found
    for file in (tmp_path / "pci").glob("*/vendor"):  # cannot be read: the device files decide
        file.unlink()
        file.mkdir()
    assert xla_flags.accelerator({}, tmp_path / "dev", tmp_path / "pci") == TPU


def test_on_a_cpu_nothing_changes(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = dict(os.environ)
    xla_flags.apply_settings()
    assert dict(os.environ) == before and jax.config.jax_optimization_level == "UNKNOWN"


HUGE = "glibc.malloc.hugetlb=1"
THRESHOLD = "glibc.malloc.mmap_threshold=134217728"
TRIM = "glibc.malloc.trim_threshold=1000000000000"
ARENAS = "glibc.malloc.arena_max=1"
OWN = ":".join([HUGE, THRESHOLD, TRIM, ARENAS])


def test_tunables_are_separated_by_colons_and_the_users_stay():
    other = "glibc.malloc.check=1"
    assert settings(CPU) == {"GLIBC_TUNABLES": OWN}
    assert settings(CPU, GLIBC_TUNABLES=other) == {"GLIBC_TUNABLES": f"{other}:{OWN}"}
    given = f"glibc.malloc.hugetlb=0:{other}"
    assert settings(CPU, GLIBC_TUNABLES=given) == {"GLIBC_TUNABLES": f"{given}:{THRESHOLD}:{TRIM}:{ARENAS}"}
    assert settings(CPU, GLIBC_TUNABLES=OWN) == {}
    (line,) = xla_flags.settings_lines({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": f"{other}:{HUGE}"})
    assert line.startswith(f"defaults for CPUs: {HUGE} (")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("MALLOC_ARENA_MAX", "4"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=4"),
    ],
)
def test_a_heap_of_the_users_is_left_as_it_is(name, value):
    found = settings(CPU, **{name: value})["GLIBC_TUNABLES"]
    assert found == (f"{value}:{HUGE}" if name == "GLIBC_TUNABLES" else HUGE)


def test_glibc_knows_the_tunables_and_takes_the_values():
    if not is_recent_glibc():
        pytest.skip("needs glibc 2.39")
    loader = next(Path("/").glob("lib*/ld-linux-*"))
    listed = subprocess.run(
        [loader, "--list-tunables"], env={"GLIBC_TUNABLES": OWN}, capture_output=True, text=True, check=True
    ).stdout
    lines = dict(line.split(": ", 1) for line in listed.splitlines() if ": " in line)
    for flag, value in (setting.split("=") for setting in OWN.split(":")):
        assert int(lines[flag].split()[0], 0) == int(value)


def is_recent_glibc():
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 39)


def test_tunables_need_a_recent_glibc_and_huge_pages_a_system_that_has_them(monkeypatch, tmp_path):
    pages = tmp_path / "enabled"
    monkeypatch.setattr(xla_flags, "HUGE_PAGES", pages)

    def known(name, version):
        monkeypatch.setattr(xla_flags.platform_module, "libc_ver", lambda: (name, version))
        given = xla_flags.with_settings(CPU, {}, xla_flags.is_known).get("GLIBC_TUNABLES", "")
        return given.split(":")

    assert known("glibc", "2.41") == [THRESHOLD, TRIM, ARENAS]
    pages.write_text("always madvise [never]")
    assert known("glibc", "2.39") == [THRESHOLD, TRIM, ARENAS]
    pages.write_text("always [madvise] never")
    assert known("glibc", "2.39") == [HUGE, THRESHOLD, TRIM, ARENAS]
    assert known("glibc", "2.36") == known("glibc", "2.35") == [HUGE]
    assert known("glibc", "2.34") == known("", "") == known("musl", "2.41") == [""]


@pytest.mark.parametrize(
    ("argv", "started", "expected"),
    [
        (["a/train.py", "sft", "lr=1"], ["python", "-X", "dev", "a/train.py", "sft", "lr=1"], True),
        (["train.py"], ["python", "-m", "cProfile", "train.py"], True),
        (["jaxft train", "sft"], ["python", "/bin/jaxft", "train", "sft"], True),
        (["a/train.py", "sft"], ["python", "-c", "from multiprocessing.forkserver import main"], False),
        (["a/train.py"], ["python", "-m", "pytest", "tests"], False),
        (["a/train.py", "sft"], ["python", "other.py", "sft"], False),
    ],
)
def test_only_the_process_of_a_command_is_started_again(argv, started, expected):
    assert xla_flags.is_command(argv, started) is expected


def start_again(tmp_path, first="pass", **environ):
    """Return the process id and the lines of a command that restarts itself. first: its first statement."""
    script = tmp_path / "command.py"
    script.write_text(
        f"import os, sys; {first}; from jaxft.distributed import xla_flags; print('begin', flush=True);"
        "xla_flags.restart(); print(os.getpid(), sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))"
    )
    process = subprocess.Popen(
        [sys.executable, script, "a b", "--c"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLIBC_TUNABLES": "", **environ},
        stdout=subprocess.PIPE,
        text=True,
    )
    return process.pid, process.communicate(timeout=60)[0].splitlines()


def test_a_command_starts_again_once_as_the_same_process_with_the_same_arguments(tmp_path):
    if not is_recent_glibc():
        pytest.skip("needs glibc 2.39")
    heap = f"{THRESHOLD}:{TRIM}:{ARENAS}"
    pid, lines = start_again(tmp_path)
    assert lines in (
        ["begin", "begin", f"{pid} ['a b', '--c'] {tunables}"] for tunables in (OWN, heap)
    )  # without huge pages where the system has none
    pid, lines = start_again(tmp_path, JAXFT_XLA_FLAGS="off")
    assert lines == ["begin", f"{pid} ['a b', '--c'] "]


def test_a_command_whose_tunables_are_removed_starts_again_only_once(tmp_path):
    if not is_recent_glibc():
        pytest.skip("needs glibc 2.39")
    pid, lines = start_again(tmp_path, "os.environ.pop('GLIBC_TUNABLES', None)")
    assert lines == ["begin", "begin", f"{pid} ['a b', '--c'] None"]


def start(code, **environ):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environ, capture_output=True, text=True
    )


def test_a_process_on_a_gpu_starts_jax_with_the_defaults_and_all_flags_that_are_known():
    names = [row.flag for row in xla_flags.TABLE_OF_SETTINGS if row.variable == "XLA_FLAGS"]
    flags = [
        f"--{name}"
        for name in ("xla_gpu_enable_triton_gemm", *names)
        if xla_flags.is_known("XLA_FLAGS", name)
    ]
    assert flags
    code = (
        "import os; from jaxft.runs import terminal; terminal.quiet(); import jax;"
        "print(jax.config.jax_optimization_level, os.environ['XLA_CLIENT_MEM_FRACTION']);"
        "jax.config.update('jax_platforms', 'cpu'); jax.devices()"  # no GPU is here
    )
    done = start(code, JAX_PLATFORMS="cuda", XLA_FLAGS=" ".join(flags))
    assert done.returncode == 0 and done.stdout.split() == ["O1", "0.95"], done.stderr


def test_jaxlib_ends_the_process_at_a_flag_that_is_unknown():
    for flag in ("xla_gpu_no_such_flag", GPU_FLAG.removesuffix("er")):
        assert not xla_flags.is_known("XLA_FLAGS", flag)
    done = start("import jax; jax.devices()", XLA_FLAGS="--xla_gpu_no_such_flag")
    assert done.returncode != 0 and "xla_gpu_no_such_flag" in done.stderr


def test_a_plan_is_compiled_with_the_settings_of_a_run(monkeypatch):
    option = PlatformSetting(CPU, "XLA_FLAGS", "xla_cpu_enable_fast_math", "true", "why", "source")
    level = PlatformSetting(CPU, "JAX_OPTIMIZATION_LEVEL", "", "O1", "why", "source")
    monkeypatch.setattr(xla_flags, "TABLE_OF_SETTINGS", (option, level))
    seen = {}

    class Lowered:
        def compile(self, compiler_options):
            seen.update(compiler_options, level=jax.config.jax_optimization_level)

    class Traced:
        def lower(self):
            return Lowered()

    plan._compile(Traced(), CPU)
    assert seen == {"xla_cpu_enable_fast_math": True, "level": "O1"}
    assert jax.config.jax_optimization_level == "UNKNOWN"
    plan._compile(jax.jit(jnp.sin).trace(1.0), CPU)  # XLA accepts the option by this name
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert xla_flags.compiler_settings(CPU, os.environ) == ({}, {})  # the user's stay


def test_the_fraction_of_a_gpus_memory_is_the_users_or_the_tables():
    assert xla_flags.memory_fraction({}) == 0.75  # what jax takes without any setting
    assert xla_flags.planned_memory_fraction({}) == 0.95
    assert xla_flags.planned_memory_fraction({"JAXFT_XLA_FLAGS": "off"}) == 0.75
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert xla_flags.planned_memory_fraction({name: "0.5"}) == 0.5
