"""Debugging a run: norms per layer while it trains, and a record of the first non-finite step ("my loss is NaN").

`loop.watch=layers` logs `grad_norm/<kind>/<layer>` and `update_norm/<kind>/<layer>`, where a kind is a parameter without its layer,
such as attn/q; an adapter counts as the weight that it belongs to. A norm that grows over many steps in one kind is the usual
beginning of a divergence.

`loop.debug_nonfinite=true` looks at every step's loss and gradient norm, which costs the overlap of host and device. At the first
step where one of them is not finite it writes `runs/<name>/nonfinite/step-<n>/`:

    batch.npz     the arrays of the batch, [micro, rows, ...]
    rows.json     the names of the dataset rows in each row of the batch
    norms.json    norms of parameters, gradients and layer outputs, by kind and layer

and logs the first layer whose output is not finite. If all outputs are finite it logs the layer whose gradient was the first that
is not: gradients are computed from the last layer to the first. The run itself goes on, with parameters as they were before the
step, until loop.max_bad such steps have come in a row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import QTensor, dequantize
from jaxft.objectives.metrics import Sum
from jaxft.optim.update import to_float32
from jaxft.tree import Grads, Metrics, Params

GRAD_NORM, UPDATE_NORM = "grad_norm", "update_norm"
OWN = ("base", "adapter")  # of the policy; parameters of a further head are named by it

Norms = dict[str, Float[Array, "..."]]  # by kind: [L] where the parameter is stacked


def kind_of(path: str) -> str:
    """Return the kind of a parameter: its path without the layers, the adapter's halves, and the policy's own prefix.

    `adapter/layers/attn/q/a` and `base/layers/attn/q` are both `attn/q`, `critic/adapter/layers/attn/q/a` is `critic/attn/q`.
    """
    parts = [part for part in path.split("/") if part not in ("layers", *OWN)]
    return "/".join(parts[:-1] if "adapter" in path.split("/") and len(parts) > 1 else parts)


def make_layer_norms(specs: Any) -> Callable[[Params], Norms]:
    """Return `norms(params)`: the norm of each kind of parameter, of stacked ones for each layer.

    specs: ParamSpecs of the parameters, None where a tree has none. Leaves that are None are left out.
    """
    axes = {path: spec.axes for path, spec in spec_paths(specs).items()}

    def norms(params: Params) -> Norms:
        squares: dict[str, Array] = {}
        leaves = tree.paths(params, is_leaf=lambda x: isinstance(x, QTensor))
        for path, leaf in leaves.items():
            value = to_float32(dequantize(leaf) if isinstance(leaf, QTensor) else leaf)
            summed = tuple(i for i, axis in enumerate(axes[path]) if axis != "layers")
            kind = kind_of(path)
            squares[kind] = squares.get(kind, 0) + jnp.sum(jnp.square(value), summed)
        return {kind: jnp.sqrt(square) for kind, square in squares.items()}

    return norms


def watch_layers(norms: Callable[[Params], Norms], grads: Grads, old: Params, new: Params) -> Metrics:
    """Return the norms of gradients and of the parameters' changes as metrics, with a value per layer in each (see `per_layer`)."""
    change = jax.tree.map(lambda n, o: to_float32(n) - to_float32(o), new, old)
    found: Metrics = {}
    for name, values in ((GRAD_NORM, norms(grads)), (UPDATE_NORM, norms(change))):
        found |= {f"{name}/{kind}": Sum(value, jnp.ones((), value.dtype)) for kind, value in values.items()}
    return found


def per_layer(metrics: Metrics) -> Metrics:
    """Replace each watched metric that has a value per layer by one metric per layer, on the host."""
    found: Metrics = {}
    for name, metric in metrics.items():
        if name.startswith((f"{GRAD_NORM}/", f"{UPDATE_NORM}/")) and np.ndim(metric.total) == 1:
            digits = len(str(len(metric.total) - 1))
            found |= {f"{name}/{i:0{digits}d}": Sum(x, metric.weight) for i, x in enumerate(metric.total)}
        else:
            found[name] = metric
    return found
