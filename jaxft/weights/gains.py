"""The factors of DoRA's outputs as constants, for adapters that are not trained: several of them, and plain
LoRA ones, then share a program.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.nn import dora
from jaxft.nn.lora import is_pair
from jaxft.nn.param import map_stack
from jaxft.nn.quant import dequantize, is_qtensor
from jaxft.tree import Params


def with_gains(base: Params, adapter: Params) -> Params:
    """Return an adapter with `gain` [*L, O], factors of its outputs on this base, in place of `magnitude`.

    Leaves are NumPy's. One of plain LoRA is returned as it is.
    """
    weights = tree.paths(base, is_qtensor)

    def walk(node: Params, path: str) -> Params:
        if not isinstance(node, dict):
            return node
        if not is_pair(node):
            return {name: walk(inner, f"{path}/{name}".strip("/")) for name, inner in node.items()}
        if "magnitude" not in node:
            return node
        pair = {name: node[name] for name in ("a", "b", "scale")}
        is_tied = path not in weights  # the head
        gain = _gains(weights["embed" if is_tied else path], node, is_tied)
        return {**pair, "gain": np.asarray(gain)}

    return walk(adapter, "")


@partial(jax.jit, static_argnums=2)
def _gains(weight: Any, node: Params, is_tied: bool) -> Float[Array, "*L O"]:
    def of_kernel(weight: Any, node: Params) -> Array:
        plain = dequantize(weight) if is_qtensor(weight) else weight
        plain = plain.T if is_tied else plain
        return dora.output_factors(node["magnitude"], plain, node["a"], node["b"], node["scale"])

    return map_stack(of_kernel, node["scale"].shape, weight, node)
