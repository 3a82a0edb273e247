"""Several adapters on one base, chosen for each row of a batch by an index (as in Punica, Chen et al. 2023,
arXiv:2310.18547): switching adapters changes an array, not a program.

A stack is a tree of K adapters with the base's paths: `a [L, K, I, R]`, `b [L, K, R, O]`, `scale [L, K]`.
Adapter 0 is zero, the base itself. Adapters of other kernels or smaller ranks are padded with zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxft.nn.lora import Adapted, pairs_by_path
from jaxft.nn.replaced import is_replacement
from jaxft.tree import Params

BASE = 0  # the number of the adapter in a stack that changes nothing


def not_stackable(adapter: Params) -> str:
    """Return why an adapter cannot be in a stack, "" if it can."""
    for path, node in pairs_by_path(adapter).items():
        if is_replacement(node):
            return f"it trains {path} in full"
        if "magnitude" in node:
            return "it is a DoRA adapter"
        if not path.startswith("layers/"):
            return f"it adapts {path}, which is outside of the layers"
    return ""


def check_stackable(adapters: Mapping[str, Params]) -> None:
    """Raise ValueError if one of several adapters, by name, cannot share a program with the others."""
    for name, adapter in adapters.items():
        why = not_stackable(adapter)
        if why and len(adapters) > 1:
            raise ValueError(
                f"adapter {name} cannot be used together with others: {why}; use it alone, or use what "
                "scripts/export.py merges"
            )


def of_equal_shapes(adapters: Sequence[Params]) -> list[Params]:
    """Return the adapters as trees of the same paths and shapes, so that one compiled program takes each.

    Smaller ranks are padded with zeros; a kernel that only others adapt gets a zero pair. Leaves may be
    NumPy's.
    """
    nodes = [pairs_by_path(adapter) for adapter in adapters]
    found: list[Params] = [{} for _ in adapters]
    for path in {path: None for own in nodes for path in own}:
        pairs = [own.get(path) for own in nodes]
        like = next(pair for pair in pairs if pair is not None)
        rank = max(pair["a"].shape[-1] for pair in pairs if pair is not None)
        zero = {name: np.zeros_like(like[name]) for name in ("a", "b", "scale")}
        *above, last = path.split("/")
        for tree, pair in zip(found, pairs, strict=True):
            inner = tree
            for name in above:
                inner = inner.setdefault(name, {})
            inner[last] = _of_rank(zero if pair is None else pair, rank)
    return found


def stack_by_row(adapters: Sequence[Params]) -> Params:
    """Return a stack of the base and these adapters, which have numbers from 1 on. Leaves may be NumPy's."""
    equal = of_equal_shapes(adapters)
    base = jax.tree.map(np.zeros_like, equal[0])
    return jax.tree.map(lambda *leaves: np.stack(leaves, 1), base, *equal)


def stored_stack(stack: Params, dtype: DTypeLike) -> Params:
    """Return a stack in this dtype, 16-bit matrices as raw bits. Leaves are NumPy's.

    XLA's CPU compiler widens stacked 16-bit floats to float32, all adapters in every call of a program.
    """

    def of(path: Any, x: Any) -> np.ndarray:
        x = np.asarray(x).astype(dtype)
        return x.view(np.uint16) if path[-1].key in ("a", "b") and x.dtype.itemsize == 2 else x

    return jax.tree_util.tree_map_with_path(of, stack)


def adapters_of_rows(w: Adapted, dtype: DTypeLike) -> Adapted:
    """Return a weight with an adapter for each row, chosen from a stack as stored. dtype: of the matmul."""

    def of(x: Array) -> Array:
        own = x[w.rows]
        return jax.lax.bitcast_convert_type(own, dtype) if x.dtype == jnp.uint16 else own

    return replace(w, a=of(w.a), b=of(w.b), scale=w.scale[w.rows])


def _of_rank(node: Mapping[str, Any], rank: int) -> dict[str, np.ndarray]:
    a, b, scale = (np.asarray(node[name]) for name in ("a", "b", "scale"))
    missing = rank - a.shape[-1]
    return {
        "a": np.pad(a, [(0, 0), (0, 0), (0, missing)]),
        "b": np.pad(b, [(0, 0), (0, missing), (0, 0)]),
        "scale": scale,
    }


def attach_rows(base: Any, stack: Any, rows: Int[Array, " B"]) -> Any:
    """Return the base tree in which row i of the activations has adapter rows[i] of the stack. None: none."""
    if not stack:
        return base
    if stack.keys() == {"a", "b", "scale"}:
        layers = len(stack["scale"])
        of_layers = jnp.broadcast_to(rows[None], (layers, *rows.shape))
        return Adapted(base, stack["a"], stack["b"], stack["scale"], rows=of_layers)
    return {**base, **{name: attach_rows(base[name], node, rows) for name, node in stack.items()}}
