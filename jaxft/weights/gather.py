"""Copy a parameter to the host one layer at a time, also if it is sharded over the devices of several
processes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.distributed import sharding, sync
from jaxft.nn.quant import dequantize, is_qtensor


def layer_on_host(leaf: Any, index: tuple[int, ...] = ()) -> np.ndarray:
    """Return a parameter at an index along its leading axes (all of it for ()) on the host, a QTensor
    dequantised.

    If several processes store it, only that part is gathered, and all of them call this.
    """
    leaf = jax.tree.map(lambda x: _take(x, index), leaf)
    return np.asarray(dequantize(leaf) if is_qtensor(leaf) else leaf)


def _take(x: Any, index: tuple[int, ...]) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        sync.wait_for_all()  # process 0 may still be writing the previous one
        mesh: Any = x.sharding.mesh  # type: ignore[attr-defined]
        return _gather_part(sharding.replicated(mesh))(x, tuple(map(np.int32, index)))
    return x[index] if index else x


@functools.cache
def _gather_part(replicated: Sharding) -> Callable[..., jax.Array]:
    """Compile once for all layers: the index is an argument."""

    def part(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        for number in index:
            x = jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
        return x

    return jax.jit(part, out_shardings=replicated)
