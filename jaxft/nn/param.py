"""Parameters declared once: init, abstract shapes, shardings and the count table derive from a tree of ParamSpec."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.distributed import sharding

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def normal(std: float) -> Init:
    """Gaussian with the given standard deviation."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def fan_in(size: int) -> Init:
    """Gaussian with variance 1 / size."""
    return normal(size**-0.5)


def kaiming_uniform(size: int) -> Init:
    """Uniform in +-sqrt(1 / size): torch's kaiming_uniform_(a=sqrt(5)), which PEFT uses for LoRA's A."""
    bound = size**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def full(value: float) -> Init:
    """Every element is `value`."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, a logical axis name for each dimension (see sharding.AXES) and how it starts.

    heads: how many heads its "heads" or "kv_heads" axis holds, so that a mesh cuts between heads only.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    heads: int | None = None

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a spec of shape {self.shape} needs {len(self.shape)} axes, found {self.axes}")


def is_spec(x: Any) -> bool:
    """For tree functions: stop at a ParamSpec."""
    return isinstance(x, ParamSpec)


def spec_paths(specs: Any) -> dict[str, ParamSpec]:
    """Every spec under its path."""
    return tree.paths(specs, is_spec)


def init_params(specs: Any, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Fresh arrays for a spec tree; the key of a leaf depends on its path only, so one leaf more changes no other."""

    def start(path, spec):
        return spec.init(jax.random.fold_in(key, path_hash(path)), spec.shape, dtype)

    return tree.map_with_path(start, specs, is_leaf=is_spec)


def abstract_params(specs: Any, dtype: Any = jnp.float32) -> Any:
    """The tree of ShapeDtypeStruct that init_params would fill."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs, is_leaf=is_spec)


def sharding_of(spec: ParamSpec, mesh: Any, path: str) -> Any:
    """The NamedSharding of one parameter; `path` names it where it doesn't fit the mesh."""
    return sharding.named(mesh, spec.axes, spec.shape, path, spec.heads)


def shardings(specs: Any, mesh: Any) -> Any:
    """The NamedSharding of every leaf."""
    return tree.map_with_path(lambda path, s: sharding_of(s, mesh, path), specs, is_leaf=is_spec)


def count_params(specs: Any) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in spec_paths(specs).values())


def path_hash(path: str) -> int:
    """32 bits of a name."""
    h = 2166136261  # FNV-1a: stable across processes, unlike hash()
    for byte in path.encode():
        h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    return h
