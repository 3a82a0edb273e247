"""A training step that updates each stacked layer inside the backward pass (optim.fused_backward)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from jaxft import tree
from jaxft.batch import TrainState
from jaxft.nn.stack import CallCount, FusedLayers, float_bits, from_float_bits
from jaxft.objectives.objective import Objective
from jaxft.optim.layerwise import joined_states
from jaxft.optim.optimizer import Optimizer
from jaxft.optim.rules import stack_of
from jaxft.optim.update import StepInfo, Updated, all_finite, to_float32
from jaxft.tree import Batch, Grads, Metrics, OptState, Params

OFF = "optim.fused_backward=false"


class FusedStep(NamedTuple):
    """The outputs of a fused backward pass: parameters and optimizer state, facts about the step, metrics."""

    trainable: Params
    opt_state: OptState
    info: StepInfo
    metrics: Metrics


def fused_step(
    objective: Objective,
    optimizer: Optimizer,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    keys: tuple[Key[Array, ""], Key[Array, ""]],
) -> FusedStep:
    """Compute the loss of a batch [1, rows, ...] and update every parameter on the way back.

    keys: for the objective and for stochastic rounding. A non-finite loss changes nothing. If only the
    gradient or the update of a layer is non-finite, that layer and the leaves without layers stay unchanged;
    the other layers are updated. The norm of such a step is NaN. Raises ValueError where no layers of the
    base are trained, for several microbatches, and for an objective that runs the model more than once.
    """
    parts = optimizer.parts
    check_fused(optimizer, state.trainable, jax.tree.leaves(batch)[0].shape[0])
    (stacks, rest), states = parts.split(state.trainable), parts.states(state.opt_state.layers)
    uses = CallCount()

    def update_layer(
        number: int, grads: Grads, norm: Float[Array, ""], before: Updated, i: Array
    ) -> tuple[Updated, Float[Array, ""]]:
        layer, own_state = before
        own_state = jax.tree.map(from_float_bits, own_state, states[number])
        rounding = parts.layers_key(keys[1], number)
        key = None if rounding is None else jax.random.fold_in(rounding, i)
        info = StepInfo(norm, jnp.isfinite(norm), key)
        new = parts.update_layer(grads, own_state, layer, info)
        finite = info.finite & all_finite(new[0])
        layer, own_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (layer, own_state))
        return (layer, jax.tree.map(float_bits, own_state)), jnp.where(finite, norm, jnp.nan)

    def loss(
        rest: Params, stacks: list[Params], states: list[OptState], squares: list[Array]
    ) -> tuple[Array, Metrics]:
        params, fused = tree.combine(rest, frozen), dict[str, FusedLayers]()
        for number, (layers, *carried) in enumerate(zip(stacks, states, squares, strict=True)):
            name = stack_of(next(iter(tree.paths(layers))))
            pick = partial(_layers_of_base, name)
            update = partial(update_layer, number)
            fused[name] = FusedLayers(layers, pick(frozen), carried[0], carried[1], pick, update, uses)
        params = {**params, "base": {**params["base"], **fused}}
        return objective(params, jax.tree.map(lambda x: x[0], batch), keys[0], state.aux)

    zeros = [jnp.zeros((), jax.tree.leaves(to_float32(layers))[0].dtype) for layers in stacks]
    total, pull, metrics = jax.vjp(loss, rest, stacks, jax.tree.map(float_bits, states), zeros, has_aux=True)
    if uses.count != len(stacks):
        raise ValueError(
            "optim.fused_backward needs an objective that runs the model once per step, "
            f"and this one runs it {uses.count // len(stacks)} times; set {OFF}"
        )
    fine = jnp.isfinite(metrics["loss"].total)
    grads, new_stacks, new_states, squares = pull(jnp.where(fine, jnp.ones_like(total), jnp.nan))
    norm = jnp.sqrt(sum(squares[1:], squares[0]) + optax.tree.norm(to_float32(grads), squared=True))
    info = StepInfo(norm, jnp.isfinite(norm) & fine, keys[1])
    info = info._replace(finite=parts.check_rest(grads, state.opt_state, state.trainable, info))
    new_rest, opt_state = parts.update_rest(grads, state.opt_state, state.trainable, info)
    new_states = jax.tree.map(from_float_bits, new_states, states)
    opt_state = opt_state._replace(layers=joined_states(new_states))
    return FusedStep(tree.combine(*new_stacks, new_rest), opt_state, info, metrics)


def _layers_of_base(name: str, params: Params) -> Params:
    return params["base"][name]


def check_fused(optimizer: Optimizer, trainable: Params, microbatches: int) -> None:
    """Raise ValueError for several microbatches, or unless the trainable stacked leaves are base layers."""
    if microbatches != 1:
        raise ValueError(
            "optim.fused_backward updates a layer as soon as its gradient exists, "
            f"but a step has {microbatches} microbatches; "
            f"set data.micro=1, or {OFF}"
        )
    paths = [path for layers in optimizer.parts.split(trainable)[0] for path in tree.paths(layers)]
    others = [path for path in paths if not path.startswith("base/")]
    if others or not paths:
        got = f"{others[0]} is trainable" if others else "none of them is trainable"
        raise ValueError(f"optim.fused_backward updates layers of the base, but {got}; set {OFF}")
