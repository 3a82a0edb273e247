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


def layer_on_host(leaf: Any, layer: int | None, transpose: bool) -> np.ndarray:
    """Return one layer of a stacked parameter (None: all of one without layers) on the host, a QTensor
    dequantised.

    If several processes store it, only that layer is gathered, and all of them call this.
    """
    leaf = jax.tree.map(lambda x: _take(x, layer), leaf)
    value = np.asarray(dequantize(leaf) if is_qtensor(leaf) else leaf)
    return value.T if transpose else value


def _take(x: Any, layer: int | None) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        sync.wait_for_all()  # process 0 may still be writing the previous one
        mesh: Any = x.sharding.mesh  # type: ignore[attr-defined]
        take = _gather_layer(sharding.replicated(mesh), layer is None)
        return take(x, np.int32(layer or 0))
    return x if layer is None else x[layer]


@functools.cache
def _gather_layer(replicated: Sharding, whole: bool) -> Callable[..., jax.Array]:
    """Compile once for all layers: the layer is an argument."""
    return jax.jit(
        lambda x, i: x if whole else jax.lax.dynamic_index_in_dim(x, i, keepdims=False),
        out_shardings=replicated,
    )
