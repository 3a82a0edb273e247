"""Parameters, declared once: initial values, shapes, shardings and counts derive from a tree of ParamSpec."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxft.distributed import sharding
from jaxft.nn import tree
from jaxft.nn.tree import Params

Init = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
Specs: TypeAlias = Any  # a tree of ParamSpec, None where a leaf is frozen or absent
LEAD_AXES = ("layers", "experts")  # along which a model stacks parameters of one kind, outermost first
PER_CHANNEL = ("taps", "head_dim")  # along which a parameter has several values of each channel


def normal(std: float) -> Init:
    """Return an initialiser: Gaussian with the given standard deviation."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return init


def fan_in(size: int) -> Init:
    """Return an initialiser: Gaussian with variance 1 / size."""
    return normal(size**-0.5)


def kaiming_uniform(size: int) -> Init:
    """Return an initialiser: uniform in +-sqrt(1 / size); torch's kaiming_uniform_(a=sqrt(5)) of fan-in."""
    bound = size**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)

    return init


def full(value: float) -> Init:
    """Return an initialiser that sets every element to `value`."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each axis (see sharding.AXES) and its initialiser.

    heads: number of heads along its "heads" or "kv_heads" axis; a mesh shards that axis between heads only.
    For the outputs of a fused projection: the number that mesh.tensor must divide. numbers: the indices in
    the model of the layers that are stacked along its "layers" axis; None for 0, 1, ... (layer_numbers).

    >>> up = ParamSpec((2, 8, 32), ("layers", "width", "mlp"), fan_in(8))
    >>> count_params({"up": up}), kernel(up).lead
    (512, ('layers',))
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    heads: int | None = None
    numbers: range | None = None

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"a spec of shape {self.shape} needs {len(self.shape)} axis names, got {self.axes}; pass one "
                "name per dimension"
            )


class KernelAxes(NamedTuple):
    """The names of a kernel's axes. lead: the axes along which it is stacked; ins: inputs; outs: outputs."""

    lead: tuple[str, ...]
    ins: str
    outs: str

    @property
    def is_router(self) -> bool:
        """Whether the kernel is a router, which scores experts; in transformers it is no linear layer."""
        return self.outs == "expert_scores"


def lead_axes(spec: ParamSpec) -> tuple[str, ...]:
    """Return the names of the axes that a parameter is stacked along: the LEAD_AXES that it starts with."""
    return tuple(takewhile(LEAD_AXES.__contains__, spec.axes))


def lead_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Return the sizes of the axes that a parameter is stacked along."""
    return spec.shape[: len(lead_axes(spec))]


def kernel(spec: ParamSpec) -> KernelAxes | None:
    """Return the axes of a parameter that is a matrix or a stack of matrices; None for other parameters, such
    as a norm's vector or a depthwise convolution's [channel, tap].

    >>> kernel(ParamSpec((2, 8, 4, 6), ("layers", "experts", "width", "mlp"), full(0.0)))
    KernelAxes(lead=('layers', 'experts'), ins='width', outs='mlp')
    """
    lead = lead_axes(spec)
    axes = spec.axes[len(lead) :]
    return None if len(axes) != 2 or axes[-1] in PER_CHANNEL else KernelAxes(lead, *axes)


def map_stack(fn: Callable, lead: Sequence[int], *stacks: Any) -> Any:
    """Apply `fn(*parameters)` to the parameters at each index of stacked arrays, one index after another.

    lead: the sizes of the axes along which the arrays are stacked. Returns the stacked results.
    """
    return jax.lax.map(lambda layer: map_stack(fn, lead[1:], *layer), stacks) if lead else fn(*stacks)


def is_spec(x: Any) -> bool:
    """Return whether a node is a ParamSpec. Pass it as `is_leaf` to tree functions over specs."""
    return isinstance(x, ParamSpec)


def layer_numbers(spec: ParamSpec) -> range:
    """Return the indices in the model of the layers that are stacked along a parameter's "layers" axis:
    `spec.numbers`, or 0, 1, ... if it is None. Without a "layers" axis the range is empty.
    """
    sizes = dict(zip(spec.axes, spec.shape, strict=True))
    return range(sizes.get("layers", 0)) if spec.numbers is None else spec.numbers


def spec_paths(specs: Specs) -> dict[str, ParamSpec]:
    """Return every spec by its path."""
    return tree.paths(specs, is_spec)


def init_params(specs: Specs, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Initialise all parameters. A parameter's random key depends only on `key` and its path, so that adding
    a parameter changes no other.

    >>> specs = {"norm": ParamSpec((4,), ("width",), full(1.0))}
    >>> init_params(specs, jax.random.key(0))["norm"].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    def start(path, spec):
        return spec.init(jax.random.fold_in(key, path_hash(path)), spec.shape, dtype)

    return tree.map_with_path(start, specs, is_leaf=is_spec)


def sharding_of(spec: ParamSpec, mesh: Mesh, path: str) -> Any:
    """Return a parameter's NamedSharding. Raises ValueError, naming `path`, if an axis cannot be sharded."""
    return sharding.array_sharding(mesh, spec.axes, spec.shape, path, spec.heads)


def shardings(specs: Specs, mesh: Mesh) -> Any:
    """Return a tree like `specs` with the NamedSharding of every parameter."""
    return tree.map_with_path(lambda path, s: sharding_of(s, mesh, path), specs, is_leaf=is_spec)


def count_params(specs: Specs) -> int:
    """Return the number of elements of all parameters."""
    return sum(math.prod(s.shape) for s in spec_paths(specs).values())


def path_hash(path: str) -> int:
    """Return a 32-bit hash of a path, the same in every process."""
    h = 2166136261  # FNV-1a: stable across processes, unlike hash()
    for byte in path.encode():
        h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    return h
