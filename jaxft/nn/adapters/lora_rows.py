"""Several adapters on one base, chosen for each row of a batch by an index (as in Punica, Chen et al. 2023,
arXiv:2310.18547): switching adapters changes an array, not a program.

A stack is a tree of K adapters with the base's paths and lead axes L: `a [*L, K, I, R]`, `b [*L, K, R, O]`,
`scale [*L, K]`. If one of them is a DoRA adapter, the node also has `gain [*L, K, O]`, the factors of the
outputs, which are constant in inference (`with_gains`). Adapter 0 has a scale of 0: it is the base itself.
Where adapters differ in their kernels or ranks, missing entries are zeros, and gains of 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxft.nn import tree
from jaxft.nn.adapters.full_modules import base_spec, is_replacement
from jaxft.nn.adapters.lora import (
    Adapted,
    adapters_axis,
    map_kernels,
    output_factors,
    padded_pair,
    pair_axes,
    pairs_by_path,
)
from jaxft.nn.param_spec import ParamSpec, Specs, full, spec_paths
from jaxft.nn.tree import Params

BASE = 0  # the number of the adapter in a stack that changes nothing


def not_stackable(adapter: Params) -> str:
    """Return the reason why an adapter cannot be in a stack, as the end of an error; "" if it can."""
    replaces = [path for path, node in pairs_by_path(adapter).items() if is_replacement(node)]
    return f"it trains {replaces[0]} in full" if replaces else ""


def check_stackable(adapters: Mapping[str, Params]) -> None:
    """Raise ValueError if there are several adapters and one cannot be in a stack. adapters: by name."""
    for name, adapter in adapters.items():
        why = not_stackable(adapter)
        if why and len(adapters) > 1:
            raise ValueError(
                f"adapter {name} cannot be used together with others: {why}; use it alone, or merge it "
                "into its base with scripts/export.py"
            )


def of_equal_shapes(adapters: Sequence[Params]) -> list[Params]:
    """Return the adapters as trees with the same paths and shapes, so that one compiled program takes each.

    Smaller ranks are padded with zeros. A kernel that an adapter does not adapt, but another one does, gets a
    pair of zeros; and gains of 1 if any adapter has gains for it. Returns NumPy arrays.
    """
    nodes = [pairs_by_path(adapter) for adapter in adapters]
    trees: list[dict[str, Any]] = [{} for _ in adapters]
    for path in {path: None for node in nodes for path in node}:
        pairs = [node.get(path) for node in nodes]
        present = [pair for pair in pairs if pair is not None]
        rank = max(pair["a"].shape[-1] for pair in present)
        zero = {name: np.zeros_like(present[0][name]) for name in ("a", "b", "scale")}
        ones = next((np.ones_like(pair["gain"]) for pair in present if "gain" in pair), None)
        for out, pair in zip(trees, pairs, strict=True):
            plain = zero if pair is None else pair
            out[path] = padded_pair({name: np.asarray(plain[name]) for name in zero}, rank)
            if ones is not None:
                out[path]["gain"] = ones if pair is None else np.asarray(pair.get("gain", ones))
    return [tree.nested(out) for out in trees]


def specs_like(base: Specs, adapter: Params) -> Specs:
    """Return the specs of an adapter that of_equal_shapes returned. base: the specs of the base."""
    specs = spec_paths(base)

    def spec_of(path: str, leaf: Any) -> ParamSpec:
        above, _, name = path.rpartition("/")
        like = base_spec(specs, above)
        return ParamSpec(tuple(leaf.shape), pair_axes(like)[name], full(0.0), like.heads, like.numbers)

    return tree.map_with_path(spec_of, adapter)


def with_gains(base: Params, adapter: Params) -> Params:
    """Replace each `magnitude` of a DoRA adapter by `gain` [*L, O], the factors that it has on this base.

    A plain LoRA adapter is returned unchanged.
    """
    nodes = pairs_by_path(adapter)
    learned = {path: node for path, node in nodes.items() if "magnitude" in node}
    for path, gain in (_gains(base, learned) if learned else {}).items():
        nodes[path] = {name: x for name, x in nodes[path].items() if name != "magnitude"}
        nodes[path]["gain"] = np.asarray(gain)
    return tree.nested(nodes) if learned else adapter


@jax.jit
def _gains(base: Params, pairs: dict[str, dict[str, Any]]) -> dict[str, Array]:
    def factors(weight: Array, pair: dict[str, Any]) -> Array:
        return output_factors(pair["magnitude"], weight, pair["a"], pair["b"], pair["scale"])

    return map_kernels(factors, base, pairs)


def stack_by_row(adapters: Sequence[Params]) -> Params:
    """Return a stack (see above) in which the base is adapter 0 and these are 1, 2, ...; NumPy arrays."""

    def stack(path: str, *leaves: Any) -> np.ndarray:
        return np.stack(leaves, adapters_axis(path))

    first, *others = of_equal_shapes([{}, *adapters])
    return tree.map_with_path(stack, first, *others)


def in_dtype(adapter: Params, dtype: DTypeLike) -> Params:
    """Return an adapter, or a stack, as NumPy arrays in the dtype of the matmuls; gains keep their dtype."""

    def of(path: str, x: Any) -> np.ndarray:
        return np.asarray(x) if path.endswith("/gain") else np.asarray(x).astype(dtype)

    return tree.map_with_path(of, adapter)


def stored_stack(stack: Params, dtype: DTypeLike) -> Params:
    """Return a stack as NumPy arrays in this dtype; if it has 16 bits, a and b are raw bits.

    XLA's CPU compiler would convert 16-bit floats of all adapters to float32 in every call of a program.
    """

    def of(path: str, x: np.ndarray) -> np.ndarray:
        return x.view(np.uint16) if path.endswith(("/a", "/b")) and x.dtype.itemsize == 2 else x

    return tree.map_with_path(of, in_dtype(stack, dtype))


def chosen(stored: Array, at: Any, dtype: DTypeLike) -> Array:
    """Return `stored[at]` in `dtype`. stored: an `a` or `b` of stored_stack, perhaps raw bits."""
    values = stored[at]
    return jax.lax.bitcast_convert_type(values, dtype) if stored.dtype == jnp.uint16 else values


def adapters_of_rows(w: Adapted, dtype: DTypeLike) -> Adapted:
    """Return a weight with one adapter per row of the batch: adapter `w.rows[i]` of a stored stack for row i.

    w: its a, b, scale and gain are of the stack. dtype: of the matmul.
    """
    a, b = chosen(w.a, w.rows, dtype), chosen(w.b, w.rows, dtype)
    return replace(w, a=a, b=b, scale=w.scale[w.rows], gain=None if w.gain is None else w.gain[w.rows])
