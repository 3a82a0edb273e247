"""Settings of XLA and jax that jaxft applies before jax starts: one table, by platform, with sources.

If the user has set one of them, the user's value is kept. JAXFT_XLA_FLAGS=off switches the table off. This
file does not import jax, because some of the settings are read when jax is imported.

Not in the table:
- Defaults of XLA. GPUs: command buffers and asynchronous collectives (xla_gpu_enable_command_buffer,
  xla_gpu_disable_async_collectives in github.com/openxla/xla/blob/main/xla/debug_options_flags.cc). TPUs:
  asynchronous all-gathers, fused with matmuls (xla_tpu_enable_async_collective_fusion and
  xla_tpu_enable_async_collective_fusion_fuse_all_gather are true in openxla.org/xla/flags_guidance).
- Flags that make one generation of devices faster and another slower: CUDA_DEVICE_MAX_CONNECTIONS
  (docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance, "Blackwell"), xla_gpu_triton_gemm_any
  (docs.jax.dev/en/latest/gpu_performance_tips.html; off by default), xla_tpu_scoped_vmem_limit_kib
  (openxla.org/xla/flags_guidance: its range depends on the chip).
"""

import importlib.util
import mmap
import os
import platform as platform_module
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

SWITCH = "JAXFT_XLA_FLAGS"
SWITCHED_OFF = ("off", "0", "false", "no", "none", "disable", "disabled")
CUDA, TPU, CPU = "cuda", "tpu", "cpu"
PLATFORM_NAMES = {CUDA: "NVIDIA GPUs", TPU: "TPUs", CPU: "CPUs"}
TUNABLES = "GLIBC_TUNABLES"  # read when a process starts: name=value, separated by colons
TUNABLES_MANUAL = "https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html"
HUGE_PAGES_FLAG = "glibc.malloc.hugetlb"
HEAP = (  # flag, value, why
    (
        "glibc.malloc.mmap_threshold", "134217728",
        "temporaries of less than 128 MiB come from the heap, not from new pages that the kernel has to "
        "clear: 446 page faults in a step of configs/sft.py instead of 1,573",
    ),
    (
        "glibc.malloc.trim_threshold", "1000000000000",
        "the end of the heap is not returned to the system when it is freed",
    ),
    (
        "glibc.malloc.arena_max", "1",
        "one heap for all threads; other heaps of glibc have at most 64 MiB and are returned",
    ),
)  # fmt: skip
HEAP_FLAGS = tuple(flag for flag, _, _ in HEAP)
HEAP_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
HUGE_PAGES_GLIBC = (2, 35)
# Up to 2.36, a heap doesn't use freed aligned blocks again (sourceware.org, bug 14581), and with the flags
# above its memory grows to several times as much; 2.37 and 2.38 were not tried.
HEAP_GLIBC = (2, 39)
RESTARTED = "JAXFT_RESTARTED"  # the process that restart() has started again
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
PCI = Path("/sys/bus/pci/devices")
# Vendor and devices of TPUs v2 to 7x, as jax knows them (jax/_src/hardware_utils.py); Google's network cards
# have the same vendor.
TPU_VENDOR = "0x1ae0"
TPU_IDS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
FRACTION = "XLA_CLIENT_MEM_FRACTION"
JAX_FRACTION = 0.75  # jax's default


@dataclass(frozen=True)
class PlatformSetting:
    """A row of the table: a setting, why it is made, and its source.

    variable: the environment variable. flag: the flag's name if the variable contains flags, "" if it has a
    single value. The row is not applied if the user has set this flag (or single value) or one of these:
    same_as, other variables with the same effect; includes, flags of XLA_FLAGS that this row would override;
    together, flags of `variable` that must be set together.
    """

    platform: str
    variable: str
    flag: str
    value: str
    why: str
    source: str
    same_as: tuple[str, ...] = ()
    includes: tuple[str, ...] = ()
    together: tuple[str, ...] = ()

    def __str__(self) -> str:
        dashes = "--" if self.flag and self.variable != TUNABLES else ""
        return f"{dashes}{self.flag or self.variable}={self.value}"


TABLE_OF_SETTINGS = (
    PlatformSetting(
        CUDA, "JAX_OPTIMIZATION_LEVEL", "", "O1",
        "latency-hiding scheduler, pipelined collectives, loops with collectives unrolled twice",
        "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance",
        includes=(  # github.com/openxla/xla/blob/main/xla/service/gpu/flag_utils.h and gpu_compiler.cc
            "xla_gpu_enable_latency_hiding_scheduler",
            "xla_gpu_enable_pipelined_all_gather", "xla_gpu_enable_pipelined_all_reduce",
            "xla_gpu_enable_pipelined_reduce_scatter", "xla_gpu_enable_while_loop_double_buffering",
            "xla_gpu_enable_while_loop_unrolling",
        ),
    ),
    PlatformSetting(
        CUDA, FRACTION, "", "0.95",
        "jax takes 0.75 of a GPU's memory by default; CUDA, cuBLAS, cuDNN and NCCL need the rest",
        "https://docs.jax.dev/en/latest/gpu_memory_allocation.html",
        ("XLA_PYTHON_CLIENT_MEM_FRACTION",),
    ),
    *(
        PlatformSetting(
            TPU, "LIBTPU_INIT_ARGS", flag, "true",
            "all-reduces of gradients over mesh.data run while the backward pass computes, also where their "
            "sizes differ",
            "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py",
        )
        for flag in (
            "xla_tpu_enable_data_parallel_all_reduce_opt", "xla_tpu_data_parallel_opt_different_sized_ops"
        )
    ),
    PlatformSetting(
        CPU, TUNABLES, HUGE_PAGES_FLAG, "1",
        "huge pages for large temporaries: 1,560 page faults in a step of configs/sft.py instead of 143,100, "
        "and 1.36 instead of 1.65 s of CPU time",
        TUNABLES_MANUAL,
    ),
    *(
        PlatformSetting(CPU, TUNABLES, flag, value, why, TUNABLES_MANUAL, HEAP_VARIABLES, together=HEAP_FLAGS)
        for flag, value, why in HEAP
    ),
)  # fmt: skip


def accelerator(environ: Mapping[str, str], dev: Path = Path("/dev"), pci: Path = PCI) -> str:
    """Return the platform that jax will use, without starting jax: "cuda", "tpu", "cpu", or another name from
    JAX_PLATFORMS.

    environ: environment variables. dev: the folder of device files. pci: the folder of PCI devices.
    """
    chosen = [name.strip() for name in environ.get("JAX_PLATFORMS", "").lower().split(",") if name.strip()]
    if chosen:
        return CUDA if chosen[0] == "gpu" else chosen[0]
    if has_tpu(dev, pci) and is_installed("libtpu"):
        return TPU
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    gpus = any(dev.glob("nvidia[0-9]*")) or (dev / "dxg").exists()  # dxg: Windows Subsystem for Linux
    return CUDA if gpus and not hidden and any(map(is_installed, PLUGINS)) else CPU


def has_tpu(dev: Path = Path("/dev"), pci: Path = PCI) -> bool:
    """Whether the machine has a TPU: a device file that TPUs use, and a PCI device with a TPU's id.

    Device files alone do not suffice: VFIO passes any device to a virtual machine. Where PCI devices are not
    listed or cannot be read, as in some containers, the device files decide.
    """
    if not (any(dev.glob("accel[0-9]*")) or any((dev / "vfio").glob("[0-9]*"))):
        return False
    vendors = list(pci.glob("*/vendor"))
    try:
        devices = [file.with_name("device") for file in vendors if file.read_text().strip() == TPU_VENDOR]
        return not vendors or any(file.read_text().strip() in TPU_IDS for file in devices)
    except OSError:
        return True


def is_installed(module: str) -> bool:
    """Whether a module could be imported; it is not imported here."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def is_off(environ: Mapping[str, str]) -> bool:
    """Whether JAXFT_XLA_FLAGS switches off the table of settings."""
    return environ.get(SWITCH, "").strip().lower() in SWITCHED_OFF


def unset_settings(platform: str, environ: Mapping[str, str]) -> list[PlatformSetting]:
    """Return the rows of TABLE_OF_SETTINGS for a platform, without those that the user has set; [] if the
    table is switched off. environ: the environment variables, in which the user sets them.
    """
    if is_off(environ):
        return []
    return [row for row in TABLE_OF_SETTINGS if row.platform == platform and not is_set(row, environ)]


def is_set(row: PlatformSetting, environ: Mapping[str, str]) -> bool:
    """Whether the user has set a row's variable or flag, or one that replaces it; see PlatformSetting."""
    names = row.same_as if row.flag else (row.variable, *row.same_as)
    flags = [("XLA_FLAGS", flag) for flag in row.includes]
    flags += [(row.variable, flag) for flag in (row.flag, *row.together) if flag]
    return any(map(environ.get, names)) or any(has_flag(*flag, environ) for flag in flags)


def has_flag(variable: str, flag: str, environ: Mapping[str, str]) -> bool:
    """Whether the value of an environment variable contains a flag: `--flag=value`, `--flag` or `--noflag`.
    Also True if XLA_FLAGS is the name of a file, which may contain the flag.
    """
    text = environ.get(variable, "")
    if variable == "XLA_FLAGS" and text.strip() and not text.lstrip().startswith("-"):
        return True  # the name of a file of flags
    names = (given.lstrip("-").partition("=")[0] for given in split_flags(variable, text))
    return any(name in (flag, f"no{flag}") for name in names)


def split_flags(variable: str, text: str) -> list[str]:
    """Split a variable's value into flags: at colons for GLIBC_TUNABLES, otherwise at spaces."""
    return text.split(":" if variable == TUNABLES else None)


def with_settings(
    platform: str, environ: Mapping[str, str], knows: Callable[[str, str], bool]
) -> dict[str, str]:
    """Return the environment variables that apply the table on a platform: variable -> new value, which
    includes the flags that the user has set.

    knows(variable, flag): whether the libraries that read the variable know the flag. XLA and libtpu abort
    the process for a flag that they do not know.
    """
    changed: dict[str, str] = {}
    for row in unset_settings(platform, environ):
        if not row.flag:
            changed[row.variable] = row.value
        elif knows(row.variable, row.flag):
            before = changed.get(row.variable, environ.get(row.variable, ""))
            separator = ":" if row.variable == TUNABLES else " "
            changed[row.variable] = f"{before}{separator}{row}".strip(separator)
    return changed


def is_known(variable: str, flag: str) -> bool:
    """Whether all installed libraries that read a variable know a flag. For GLIBC_TUNABLES: whether glibc is
    recent enough and, for huge pages, whether the system has them.
    """
    if variable == TUNABLES:
        name, text = platform_module.libc_ver()
        version = tuple(int(x) for x in text.split(".")[:2]) if name == "glibc" else ()
        if flag == HUGE_PAGES_FLAG:
            return version >= HUGE_PAGES_GLIBC and has_huge_pages()
        return version >= HEAP_GLIBC
    files = flag_libraries(variable)
    return bool(files) and all(contains_name(file, flag) for file in files)


def has_huge_pages() -> bool:
    """Whether the system gives huge pages to processes that ask for them."""
    return HUGE_PAGES.is_file() and "[never]" not in HUGE_PAGES.read_text()


def flag_libraries(variable: str) -> list[Path]:
    """Return the installed library files that parse the flags in XLA_FLAGS or in LIBTPU_INIT_ARGS.

    libtpu parses both variables. Return [] without jaxlib, or for LIBTPU_INIT_ARGS without libtpu.
    """
    path = os.environ.get("TPU_LIBRARY_PATH")
    tpu = [Path(path)] if path else libraries("libtpu", "libtpu.so")
    if variable == "LIBTPU_INIT_ARGS":
        return tpu
    jax_library = libraries("jaxlib", "libjax_common.so")
    plugins = [file for name in PLUGINS for file in libraries(name, "xla_cuda_plugin.so")]
    return jax_library and [*jax_library, *plugins, *tpu]


def libraries(module: str, name: str) -> list[Path]:
    """Return the paths of the file `name` in the folders of an installed module, usually one; [] if the
    module is not installed or has no such file.
    """
    spec = importlib.util.find_spec(module) if is_installed(module) else None
    folders = (spec.submodule_search_locations or []) if spec else []
    return [file for folder in folders if (file := Path(folder) / name).is_file()]


def contains_name(file: Path, name: str) -> bool:
    """Whether a library file contains a name as a C string."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"\0" + name.encode() + b"\0") >= 0


def apply_settings() -> None:
    """Set the environment variables of the table for the platform that jax will use.

    Call it before jax's devices are used. GLIBC_TUNABLES, the only variable for CPUs, is left to `restart`.
    """
    changed = with_settings(accelerator(os.environ), os.environ, is_known)
    changed.pop(TUNABLES, None)
    os.environ.update(changed)
    if "jax" in sys.modules:  # it has read its own variables already
        for name, value in changed.items():
            if name.startswith("JAX_"):
                sys.modules["jax"].config.update(name.lower(), value)


def restart() -> None:
    """Start this command again in the same process if the table has a value for GLIBC_TUNABLES, which is read
    only when a process starts.

    Nothing happens if this is not the process of a command, or if it has been restarted before: the system
    removes GLIBC_TUNABLES from programs with special rights, so it may be missing again.
    """
    changed, process = with_settings(accelerator(os.environ), os.environ, is_known), str(os.getpid())
    again = os.environ.get(RESTARTED) == process
    if again or TUNABLES not in changed or not is_command(sys.argv, sys.orig_argv):
        return
    environ = {**os.environ, TUNABLES: changed[TUNABLES], RESTARTED: process}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def is_command(argv: list[str], started: list[str]) -> bool:
    """Whether a process was started as `python SCRIPT ARGUMENT ...` or `jaxft COMMAND ARGUMENT ...`.

    argv: its sys.argv. started: its full command line, sys.orig_argv.
    """
    names = {Path(argv[0]).name, argv[0].partition(" ")[0]}
    arguments = len(argv) - 1
    before = started[1 : len(started) - arguments]
    same = started[len(started) - arguments :] == argv[1:]
    return bool(sys.executable) and same and any(Path(item).name in names for item in before)


def settings_in_effect(environ: Mapping[str, str]) -> list[str]:
    """Return the settings of the table that the environment contains, for this process's platform:
    `variable=value` or `--flag=value`.
    """
    if is_off(environ):
        return []
    rows = [row for row in TABLE_OF_SETTINGS if row.platform == accelerator(environ)]
    values = [(row, environ.get(row.variable, "")) for row in rows]
    return [
        str(row)
        for row, value in values
        if (str(row) in split_flags(row.variable, value) if row.flag else value == row.value)
    ]


def settings_lines(environ: Mapping[str, str]) -> list[str]:
    """Return [line], the line printed at the start about the settings in effect; [] if there are none."""
    rows = settings_in_effect(environ)
    platform = PLATFORM_NAMES.get(accelerator(environ))
    return [f"defaults for {platform}: {', '.join(rows)} ({SWITCH}=off omits them)"] if rows else []


def compiler_settings(
    platform: str, environ: Mapping[str, str]
) -> tuple[dict[str, str | bool], dict[str, str]]:
    """Return (compiler options, jax.config options), each name -> value. With them this process compiles a
    program for another platform, as a run on that platform would.

    platform: "cuda", "tpu" or "cpu". environ: the run's environment variables.
    """
    rows = unset_settings(platform, environ)
    flags_of_xla = [row for row in rows if row.flag and row.variable != TUNABLES]
    known = [row for row in flags_of_xla if is_known(row.variable, row.flag)]
    as_bool = {"true": True, "false": False}
    flags = {row.flag: as_bool.get(row.value, row.value) for row in known}
    return flags, {row.variable.lower(): row.value for row in rows if row.variable.startswith("JAX_")}


def memory_fraction(environ: Mapping[str, str]) -> float:
    """Return the fraction of a GPU's memory that jax may allocate in a process with this environment."""
    given = environ.get(FRACTION) or environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    return float(given) if given else JAX_FRACTION


def planned_memory_fraction(environ: Mapping[str, str]) -> float:
    """Return the fraction of a GPU's memory that a run started with this environment may allocate."""
    return memory_fraction({**environ, **with_settings(CUDA, environ, lambda variable, flag: False)})
