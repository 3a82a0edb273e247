"""One step of training in which the stacked layers are updated inside the backward pass (optim.in_backward)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.nn.fused_update import Consumed, Uses, disguised, undisguised
from jaxft.objectives.objective import Objective
from jaxft.optim.optimizer import InTurn, guarded_update, wide

LAYERS = "base/layers/"
OFF = "optim.in_backward=false"


def updated(
    objective: Objective,
    tx: InTurn,
    now: tuple[Any, Any],
    frozen: Any,
    batch: Any,
    keys: tuple[Array, Array],
    aux: Any,
) -> tuple[Any, Any, Array, Array, dict[str, Any]]:
    """(trainable, optimizer state, gradients' global norm, whether all was finite, metrics) after a step.

    now: (trainable, optimizer state). batch: [1, rows, ...]. keys: the objective's and the rounding's. A loss that is not
    finite changes nothing. Where only a layer's gradient is not, that layer and the leaves without layers stay as they were, and
    the layers above it have moved already. Raises ValueError for what can't be had in this way: layers that aren't
    trained, several microbatches, an objective that runs the model twice.
    """
    refuse(tx, now[0], jax.tree.leaves(batch)[0].shape[0])
    layered, rest, state = tx.layers(now[0]), tree.partition(now[0], tx.stacked)[1], now[1][0]
    key, uses = tx.layers_key(keys[1]), Uses()

    def update(grads: Any, norm: Array, before: tuple[Any, Any], i: Array) -> tuple[Any, Any]:
        layer, own = before
        own = jax.tree.map(undisguised, own, state)
        rounding = None if key is None else jax.random.fold_in(key, i)
        layer, own = guarded_update(tx.tx, grads, norm, jnp.isfinite(norm), (layer, own), rounding)
        return layer, jax.tree.map(disguised, own)

    def loss(rest: Any, layered: Any, state: Any, squares: Array) -> tuple[Array, dict[str, Any]]:
        whole = tree.combine(rest, frozen)
        base = whole["base"]
        layers = Consumed(
            layered, frozen["base"]["layers"], state, squares, lambda x: x["base"]["layers"], update, uses
        )
        return objective(
            {**whole, "base": {**base, "layers": layers}}, jax.tree.map(lambda x: x[0], batch), keys[0], aux
        )

    zero = jnp.zeros((), jax.tree.leaves(wide(layered))[0].dtype)
    told: Any = jax.vjp(loss, rest, layered, jax.tree.map(disguised, state), zero, has_aux=True)
    total, pull, found = told
    if uses.count != 1:
        raise ValueError(
            f"optim.in_backward wants an objective that runs the model once a step, found {uses.count}; set {OFF}"
        )
    fine = jnp.isfinite(found["loss"].total)
    grads, layered, state_after, squares = pull(jnp.where(fine, jnp.ones_like(total), jnp.nan))
    norm = jnp.sqrt(squares + optax.tree.norm(wide(grads), squared=True))
    ok = jnp.isfinite(norm) & fine
    others, (_, *other_states) = tx.apply_others(grads, norm, ok, now, keys[1])
    return (
        tree.combine(layered, others),
        (jax.tree.map(undisguised, state_after, state), *other_states),
        norm,
        ok,
        found,
    )


def refuse(tx: InTurn, trainable: Any, parts: int) -> None:
    """Raise ValueError for several microbatches, and where what is trained has no layers or isn't the base's."""
    if parts != 1:
        raise ValueError(f"optim.in_backward updates a layer by its first gradient, and a step has {parts} microbatches; "
                         f"set data.micro=1, or {OFF}")  # fmt: skip
    paths = list(tree.paths(tx.layers(trainable)))
    wrong = next((path for path in paths if not path.startswith(LAYERS)), None if paths else "none")
    if wrong:
        raise ValueError(
            f"optim.in_backward updates the base's layers, and what is trained of layers is {wrong}; set {OFF}"
        )
