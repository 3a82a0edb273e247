"""A small tree of arrays that are sharded in several ways, equal in all processes of a test."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SPECS = {
    "w": P("x", "y"),
    "stack": {"k": P(None, "y", None)},
    "codes": P("y"),
    "whole": P(),
    "step": P(),
    "none": P(),
}


def values(seed: int) -> dict[str, Any]:
    """The leaves on the host."""
    random = np.random.default_rng(seed)
    return {
        "w": random.standard_normal((16, 24)).astype(np.float32),
        "stack": {"k": random.standard_normal((3, 8, 16)).astype(jnp.bfloat16)},
        "codes": random.integers(0, 65536, (8, 4)).astype(np.uint16),
        "whole": random.standard_normal(5).astype(np.float32),
        "step": np.int32(seed),
        "none": np.zeros((0, 3), np.float32),
    }


def places(*shape: int) -> Any:
    """Shardings of the leaves on a mesh of all devices, in as many axes as `shape` has."""
    sizes = shape if len(shape) == 3 else (*shape, 1)
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("x", "y", "z"))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P))


def state(seed: int, *shape: int) -> Any:
    """The leaves on the devices."""

    def put(v, place):
        return jax.make_array_from_callback(np.shape(v), place, lambda index: np.asarray(v)[index])  # noqa: E731

    return jax.tree.map(put, values(seed), places(*shape))


def like(*shape: int) -> Any:
    """The state's shapes and places."""
    return jax.tree.map(
        lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), values(0), places(*shape)
    )


def differs(found: Any, seed: int, *shape: int) -> list[str]:
    """Return the leaves of which a shard of this process has other bits, or another place on the mesh, than
    expected.
    """
    wrong = []
    for (path, leaf), expected, place in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(values(seed)),
        jax.tree.leaves(places(*shape)),
        strict=True,
    ):
        whole = np.asarray(expected)
        same = all(np.asarray(s.data).tobytes() == whole[s.index].tobytes() for s in leaf.addressable_shards)
        if not same or leaf.sharding != place or leaf.dtype != whole.dtype:
            wrong.append(jax.tree_util.keystr(path))
    return wrong
