"""Norms of gradients and updates by layer and kind of parameter, logged in training (`loop.watch=layers`).

The metrics are `grad_norm/<kind>/<layer>` and `update_norm/<kind>/<layer>`. A kind is a parameter without its
layer, such as attn/q; an adapter counts as the weight that it is attached to. A norm that grows over many
steps in one kind often comes before a divergence.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.nn.param import Specs, layer_numbers, spec_paths
from jaxft.nn.quant import QTensor, dequantize
from jaxft.objectives.metrics import PerLayer, Sum
from jaxft.optim.update import to_float32
from jaxft.tree import Grads, Metrics, Params

GRAD_NORM, UPDATE_NORM = "grad_norm", "update_norm"
Norms = dict[str, Float[Array, "..."]]  # by kind: [L] if the parameter is stacked
Watch = Callable[[Grads, Params, Params], Metrics]  # of gradients, old and new parameters


def kind_of(path: str) -> str:
    """Return a parameter's kind: its path without layers, an adapter's halves and the policy's own prefix.

    `adapter/layers/attn/q/a` and `base/layers/attn/q` are both `attn/q`;
    `critic/adapter/layers/attn/q/a` is `critic/attn/q`.
    """
    parts = path.split("/")
    own = parts[:-1] if "adapter" in parts else parts
    return "/".join(part for part in own if part not in ("layers", "base", "adapter"))


def make_layer_norms(specs: Specs, name_of: Callable[[str], str] = kind_of) -> Callable[[Params], Norms]:
    """Return `norms(params)`: the norm of each kind of parameter, for each layer if it is stacked.

    specs: ParamSpecs of the parameters. name_of(path): the kind that a parameter counts in. An adapter's
    scale and leaves that are None are left out.
    """
    axes = {path: spec.axes for path, spec in spec_paths(specs).items()}

    def norms(params: Params) -> Norms:
        squares: dict[str, Any] = {}
        for path, leaf in tree.paths(params, is_leaf=lambda x: isinstance(x, QTensor)).items():
            if path.endswith("/scale"):
                continue
            value = to_float32(dequantize(leaf) if isinstance(leaf, QTensor) else leaf)
            summed = tuple(i for i, axis in enumerate(axes[path]) if axis != "layers")
            squares[name_of(path)] = squares.get(name_of(path), 0) + jnp.sum(jnp.square(value), summed)
        return {name: jnp.sqrt(square) for name, square in squares.items()}

    return norms


def make_watch(specs: Specs) -> Watch:
    """Return `watch(grads, old, new) -> metrics`: of trainable parameters, by layer."""
    norms = make_layer_norms(specs)
    layers = {kind_of(path): tuple(layer_numbers(spec)) for path, spec in spec_paths(specs).items()}

    def watch(grads: Grads, old: Params, new: Params) -> Metrics:
        change = jax.tree.map(lambda n, o: to_float32(n) - to_float32(o), new, old)
        metrics: Metrics = {}
        for name, values in ((GRAD_NORM, norms(grads)), (UPDATE_NORM, norms(change))):
            for kind, x in values.items():
                one, numbers = jnp.ones((), x.dtype), layers[kind]
                metrics[f"{name}/{kind}"] = PerLayer(x, one, numbers) if numbers else Sum(x, one)
        return metrics

    return watch
