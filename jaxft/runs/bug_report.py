"""Facts for a bug report: versions, processor, memory, devices, flags and attention kernels."""

import contextlib
import json
import os
import platform
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import jax
import jax.numpy as jnp

from jaxft.data.rows.shipped import IS_CLONE, ROOT
from jaxft.nn.attention.attention import AttentionNeeds, kernel_for
from jaxft.runs.environment import FLAGS, commit, versions
from jaxft.runs.terminal import backend_error, printable_line

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "bf16")


def bug_report() -> dict[str, Any]:
    """Return facts about jaxft and this machine, as JSON values.

    If JAX cannot start its backend, the error is one of the facts ("device_error").
    """
    found = {
        "jaxft": {"commit": commit(), "installed": installation()},
        "system": platform.platform(),
        "cpu": processor(),
        "memory_gib": memory(),
        **versions(),
        "flags": {name: printable_line(os.environ[name]) for name in FLAGS if os.environ.get(name)},
        "variables_of_jaxft": sorted(name for name in os.environ if name.startswith("JAXFT_")),
    }
    try:
        return {**found, **devices()}
    except (RuntimeError, AssertionError) as error:  # a plugin that doesn't fit the driver, no such device
        reason = backend_error(error) or printable_line(str(error))
        return {**found, "devices": {}, "device_error": reason}


def installation() -> str:
    """Return how jaxft is installed: "wheel", "editable" (`pip install -e .` of this clone) or "no"."""
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
    return {
        "name": name[1] if name else platform.machine(),
        "cores": os.cpu_count(),
        "features": features,
    }


def memory() -> dict[str, float]:
    """Return the total and the available memory in GiB; {} where /proc/meminfo does not exist."""
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
