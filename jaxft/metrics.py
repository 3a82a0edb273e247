"""Metrics that add: steps, microbatches and evaluation combine them, and only log.py's caller divides."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.tree import struct


@struct
class Sum:
    """A weighted mean still in two parts; `total / weight` is read once, at the end."""

    total: Any
    weight: Any


@struct
class Max:
    """The largest value seen."""

    value: Any


@struct
class Min:
    """The smallest value seen."""

    value: Any


def is_metric(x: Any) -> bool:
    """For tree functions: stop at a metric."""
    return isinstance(x, Sum | Max | Min)


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, Sum):
        return Sum(a.total + b.total, a.weight + b.weight)
    on_host = not isinstance(a.value, jax.Array)  # where nothing may be compiled
    if isinstance(a, Max):
        return Max(max(a.value, b.value) if on_host else jnp.maximum(a.value, b.value))
    return Min(min(a.value, b.value) if on_host else jnp.minimum(a.value, b.value))


def add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The metrics of two parts of a batch as those of the whole."""
    return {name: _add(a[name], b[name]) for name in a}


def neutral(like: dict[str, Any]) -> dict[str, Any]:
    """The metrics of no rows at all, in the shape and dtype of `like` (arrays or abstract ones)."""

    def start(m):
        if isinstance(m, Sum):
            return Sum(jnp.zeros(m.total.shape, m.total.dtype), jnp.zeros(m.weight.shape, m.weight.dtype))
        fill = -jnp.inf if isinstance(m, Max) else jnp.inf
        return type(m)(jnp.full(m.value.shape, fill, m.value.dtype))

    return {name: start(m) for name, m in like.items()}


def read(metrics: dict[str, Any]) -> dict[str, float]:
    """Plain numbers. A mean over nothing is left out, never NaN."""
    host = jax.device_get(metrics)
    out = {}
    for name, m in host.items():
        if isinstance(m, Sum):
            if m.weight != 0:
                out[name] = float(m.total) / float(m.weight)
        else:
            out[name] = float(m.value)
    return out
