"""The facts that decide a run's metrics apart from its settings: versions, devices, flags.

They are recorded at each start. `jaxft env` prints them, and more facts about the machine, for bug reports.
"""

import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import jax
import jax.numpy as jnp

from jaxft import __version__
from jaxft.data.rows.shipped import IS_CLONE, ROOT
from jaxft.distributed import xla_flags
from jaxft.nn.attention import attention
from jaxft.nn.attention.attention import AttentionNeeds, kernel_for
from jaxft.runs.terminal import backend_error, printable_line

# Libraries whose version may change numbers, tokens or files. Those that are not installed are left out.
LIBRARIES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas",
    "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes",
    "transformers", "tokenizers", "jinja2", "safetensors", "gguf", "datasets", "pyarrow",
)  # fmt: skip
FLAGS = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "JAX_PLATFORMS", "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE",
    "JAX_OPTIMIZATION_LEVEL", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT",
    xla_flags.TUNABLES, xla_flags.FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION", xla_flags.SWITCH,
    attention.VARIABLE,
)  # fmt: skip
COMPARED = ("python", "packages", "flags", "devices", "processes", "attention", "commit")


def versions() -> dict[str, Any]:
    """Return the versions of Python, of jaxft and of the installed LIBRARIES."""
    packages = {"jaxft": __version__}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {"python": platform.python_version(), "packages": packages}


def commit() -> str | None:
    """Return the git commit of this clone of jaxft, None for an installed package and without git."""
    if not (ROOT / ".git").exists():  # else git finds another repository that the package is in
        return None
    try:
        git = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:  # git is not installed
        return None
    return git.stdout.strip() or None


def environment(step: int = 0, attention: str | None = None) -> dict[str, Any]:
    """Return versions, flags, devices and the git commit of this process.

    step: how many optimizer steps earlier starts of the run have done. attention: a text with the train
    step's attention kernel and why it was chosen. Both are returned under their names.
    """
    return {
        **versions(),
        "flags": {name: os.environ[name] for name in FLAGS if os.environ.get(name)},
        "platform_defaults": xla_flags.settings_in_effect(os.environ),  # those among the flags
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "attention": attention,
        "commit": commit(),
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line such as "jax: 0.7.0 -> 0.7.1" for each difference between two starts of a run: in
    versions, flags, devices, number of processes, attention kernel and commit. before, now: from environment.
    """
    lines = []
    for name in COMPARED:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            lines += [f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in keys]
        elif name == "devices" and old != new:
            lines.append(f"devices: {device_counts(old)} -> {device_counts(new)}")
        elif old != new and name in before:  # earlier versions of jaxft recorded less
            lines.append(f"{name}: {old} -> {new}")
    return lines


def device_counts(devices: Any) -> str:
    """Return the kinds of devices with their numbers: 8 x NVIDIA H100. devices: the kind of each."""
    if not isinstance(devices, list) or not devices:
        return "none"
    kinds = {str(kind): sum(str(other) == str(kind) for other in devices) for kind in devices}
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "bf16")


def bug_report() -> dict[str, Any]:
    """Return facts about jaxft and this machine, as JSON values.

    If JAX cannot start its backend, the error is one of the facts ("device_error").
    """
    facts = {
        "jaxft": {"commit": commit(), "installed": installation()},
        "system": platform.platform(),
        "cpu": processor(),
        "memory_gib": memory(),
        **versions(),
        "flags": {name: printable_line(os.environ[name]) for name in FLAGS if os.environ.get(name)},
        "variables_of_jaxft": sorted(name for name in os.environ if name.startswith("JAXFT_")),
    }
    try:
        return {**facts, **devices()}
    except (RuntimeError, AssertionError) as error:  # a plugin that doesn't fit the driver, no such device
        reason = backend_error(error) or printable_line(str(error))
        return {**facts, "devices": {}, "device_error": reason}


def installation() -> str:
    """Return how jaxft is installed: "wheel"; "editable" (`pip install -e .` of this clone); or "no" for a
    clone that is not installed.
    """
    if not IS_CLONE:
        return "wheel"
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, KeyError):
        origin = json.loads(metadata.distribution("jaxft").read_text("direct_url.json") or "{}")
        if origin["dir_info"]["editable"] and url2pathname(urlsplit(origin["url"]).path) == str(ROOT):
            return "editable"
    return "no"


def processor() -> dict[str, Any]:
    """Return the processor's name, its number of logical CPUs, and its instruction sets for matmuls."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"(?:flags|Features)\s*: (.*)", text)
    features = [feature for feature in CPU_FEATURES if flags and feature in flags[1].split()]
    return {"name": name[1] if name else platform.machine(), "cores": os.cpu_count(), "features": features}


def memory() -> dict[str, float]:
    """Return {"total": ..., "available": ...} memory in GiB; {} where /proc/meminfo does not exist."""
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        sizes = dict(re.findall(r"(\w+): +(\d+) kB", text))
        names = {"total": "MemTotal", "available": "MemAvailable"}
        return {key: round(int(sizes[name]) / 2**20, 1) for key, name in names.items() if name in sizes}
    return {}


def devices() -> dict[str, Any]:
    """Return JAX's backend, the number of devices of each kind, their memory, and their attention kernels."""
    first, kinds = jax.devices()[0], Counter(device.device_kind for device in jax.devices())
    limit = (first.memory_stats() or {}).get("bytes_limit")
    kernels = {
        f"{dtype}{' with shared prompts' * branches}": kernel_for(
            first, 64, jnp.dtype(dtype), AttentionNeeds(branches=branches)
        ).__name__
        for dtype in ("bfloat16", "float32")
        for branches in (False, True)
    }
    return {
        "backend": jax.default_backend(),
        "devices": dict(kinds),
        "device_memory_gib": round(limit / 2**30, 1) if limit else None,
        "attention": kernels,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return a bug report as lines of text."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {shown(item)}" for key, item in value.items())
        lines.append(f"{name.replace('_', ' ') + ':':20}{shown(value)}")
    return lines


def shown(value: Any) -> str:
    """Return a value as text: items of a list with spaces between them, an empty value as "none"."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if text and value is not None else "none"
