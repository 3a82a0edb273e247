"""The facts that decide a run's metrics apart from its settings: versions, devices, flags; recorded at each
start.
"""

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from typing import Any

import jax

from jaxft import __version__
from jaxft.data.rows.shipped import ROOT
from jaxft.distributed import xla_flags
from jaxft.nn.attention import attention

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
    """Return versions, flags, devices and the git commit of this process, which begins after `step` steps.

    attention: the train step's attention kernel and why it runs.
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


def with_earlier_starts(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of env.json: this start, with all earlier ones under "earlier", oldest first.

    before: the content of env.json so far, None at the first start.
    """
    if before is None:
        return {**now, "earlier": []}
    earlier = before.get("earlier", [])
    last = {name: value for name, value in before.items() if name != "earlier"}
    return {**now, "earlier": [*earlier, last] if isinstance(earlier, list) else [last]}


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each version, flag or device that differs between two starts."""
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
