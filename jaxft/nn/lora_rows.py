"""Several adapters on one base, chosen for each row of a batch by an index (as in Punica, Chen et al. 2023,
arXiv:2310.18547): switching adapters changes an array, not a program.

A stack is a tree of K adapters with the base's paths and lead axes L: `a [*L, K, I, R]`, `b [*L, K, R, O]`,
`scale [*L, K]`. If one of them is a DoRA adapter, the node also has `gain [*L, K, O]`, the factors of the
outputs, which are constant in inference (weights/gains.py). Adapter 0 is the base itself.
Adapters of other kernels or smaller ranks are padded with zeros, and with gains of 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxft import tree
from jaxft.nn.lora import Adapted, adapters_axis, pair_axes, pairs_by_path
from jaxft.nn.param import ParamSpec, Specs, full, spec_paths
from jaxft.nn.replaced import base_spec, is_replacement
from jaxft.tree import Params

BASE = 0  # the number of the adapter in a stack that changes nothing


def not_stackable(adapter: Params) -> str:
    """Return why an adapter cannot be in a stack, "" if it can."""
    replaces = [path for path, node in pairs_by_path(adapter).items() if is_replacement(node)]
    return f"it trains {replaces[0]} in full" if replaces else ""


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

    Smaller ranks are padded with zeros; a kernel that only others adapt gets a zero pair, one without DoRA
    gains of 1 where others have some. Leaves may be NumPy's.
    """
    nodes = [pairs_by_path(adapter) for adapter in adapters]
    found: list[Params] = [{} for _ in adapters]
    for path in {path: None for own in nodes for path in own}:
        pairs = [own.get(path) for own in nodes]
        present = [pair for pair in pairs if pair is not None]
        rank = max(pair["a"].shape[-1] for pair in present)
        zero = {name: np.zeros_like(present[0][name]) for name in ("a", "b", "scale")}
        ones = next((np.ones_like(pair["gain"]) for pair in present if "gain" in pair), None)
        *above, last = path.split("/")
        for tree_, pair in zip(found, pairs, strict=True):
            inner = tree_
            for name in above:
                inner = inner.setdefault(name, {})
            inner[last] = _of_rank(zero if pair is None else pair, rank)
            if ones is not None:
                inner[last]["gain"] = ones if pair is None else np.asarray(pair.get("gain", ones))
    return found


def specs_like(base: Specs, adapter: Params) -> Specs:
    """Return the specs of an adapter of of_equal_shapes, which has no settings of its own."""
    specs = spec_paths(base)

    def spec_of(path: str, leaf: Any) -> ParamSpec:
        above, _, name = path.rpartition("/")
        like = base_spec(specs, above)
        return ParamSpec(tuple(leaf.shape), pair_axes(like)[name], full(0.0), like.heads)

    return tree.map_with_path(spec_of, adapter)


def stack_by_row(adapters: Sequence[Params]) -> Params:
    """Return a stack of the base and these adapters, which have numbers from 1 on. Leaves may be NumPy's."""

    def stack(path: str, *leaves: Any) -> np.ndarray:
        return np.stack(leaves, adapters_axis(path))

    first, *others = of_equal_shapes([{}, *adapters])
    return tree.map_with_path(stack, first, *others)


def in_dtype(adapter: Params, dtype: DTypeLike) -> Params:
    """Return an adapter, or a stack, in the dtype of the matmuls, which would round to it; gains stay as they
    are. Leaves are NumPy's.
    """

    def of(path: str, x: Any) -> np.ndarray:
        return np.asarray(x) if path.endswith("/gain") else np.asarray(x).astype(dtype)

    return tree.map_with_path(of, adapter)


def stored_stack(stack: Params, dtype: DTypeLike) -> Params:
    """Return a stack in this dtype, 16-bit matrices as raw bits. Leaves are NumPy's.

    XLA's CPU compiler widens stacked 16-bit floats to float32, all adapters in every call of a program.
    """

    def of(path: str, x: np.ndarray) -> np.ndarray:
        return x.view(np.uint16) if path.endswith(("/a", "/b")) and x.dtype.itemsize == 2 else x

    return tree.map_with_path(of, in_dtype(stack, dtype))


def chosen(stored: Array, at: Any, dtype: DTypeLike) -> Array:
    """Return the elements of a stack's matrix at an index. dtype: of the values that raw bits stand for."""
    own = stored[at]
    return jax.lax.bitcast_convert_type(own, dtype) if stored.dtype == jnp.uint16 else own


def adapters_of_rows(w: Adapted, dtype: DTypeLike) -> Adapted:
    """Return a weight with an adapter for each row, chosen from a stack as stored. dtype: of the matmul."""
    a, b = chosen(w.a, w.rows, dtype), chosen(w.b, w.rows, dtype)
    return replace(w, a=a, b=b, scale=w.scale[w.rows], gain=None if w.gain is None else w.gain[w.rows])


def _of_rank(node: Mapping[str, Any], rank: int) -> dict[str, np.ndarray]:
    a, b, scale = (np.asarray(node[name]) for name in ("a", "b", "scale"))
    lead, missing = [(0, 0)] * len(scale.shape), (0, rank - a.shape[-1])
    return {
        "a": np.pad(a, [*lead, (0, 0), missing]),
        "b": np.pad(b, [*lead, missing, (0, 0)]),
        "scale": scale,
    }
