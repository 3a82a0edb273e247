"""Shardings of an optimizer's state, derived from the shardings of the parameters that it belongs to."""

from dataclasses import dataclass
from typing import Any

import jax
from optax.tree_utils import tree_map_params

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.nn.param import Specs, lead_shape, spec_paths
from jaxft.optim.optimizer import Optimizer
from jaxft.tree import OptState, Params


@dataclass(frozen=True)
class _Array:
    """Path and shape of a state array; not a pytree, so that tree_map_params treats it as a leaf."""

    path: str
    shape: tuple[int, ...]


def state_shardings(
    optimizer: Optimizer, opt_state: OptState, params: Params, specs: Specs, mesh: jax.sharding.Mesh
) -> OptState:
    """Return a tree of shardings like `opt_state`.

    opt_state, params: ShapeDtypeStructs, those of params with shardings. specs: of the parameters.

    State of a parameter is sharded as the parameter is if it has its shape, and stored in full on every
    device if the optimizer declares its field as `replicated`. State of no parameter (counts: scalars, or one
    for each parameter of a stack) is replicated. Raises ValueError for anything else, because a full copy on
    every device would silently cost memory.
    """
    everywhere = sharding.replicated(mesh)
    leads = {(), *map(lead_shape, spec_paths(specs).values())}

    def of_parameter(x: _Array, param: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        if x.shape == param.shape:
            return param.sharding
        return of_other(x, f"differs from its parameter's {list(param.shape)}")

    def of_other(x: _Array, problem: str = "belongs to no parameter") -> jax.sharding.Sharding:
        if mesh.size == 1 or not set(x.path.split("/")).isdisjoint(optimizer.replicated):
            return everywhere
        raise ValueError(
            f"optim.optimizer={optimizer.name}: its state {x.path} of shape {list(x.shape)} {problem}, so no "
            "sharding can be derived for it. Return UpdateRule(transform, replicated=(FIELD_NAME,)) to "
            "store it in full on every device."
        )

    def of_copy(copy: Any, params: Params) -> Any:
        """Shardings of a copy of the parameter tree; a leaf may be None or a node of several arrays."""
        return jax.tree.map(
            lambda param, part: jax.tree.map(lambda x: of_parameter(x, param), part), params, copy
        )

    def of_rest(x: _Array) -> jax.sharding.Sharding:
        return everywhere if x.shape in leads else of_other(x)

    arrays = tree.map_with_path(lambda path, x: _Array(path, x.shape), opt_state)
    return tree_map_params(
        optimizer.init, of_copy, arrays, params, transform_non_params=of_rest, is_leaf=lambda _: True
    )
