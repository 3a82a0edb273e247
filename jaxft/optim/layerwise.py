"""Updates that need less memory. optim.layerwise updates stacked layers one after the other, and large
matrices in blocks of rows, so that only one layer's updates are in memory. optim.fused_backward updates each
layer inside the backward pass, so that only one layer's gradients are in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from jaxft.batch import TrainState
from jaxft.distributed import sharding
from jaxft.nn import tree
from jaxft.nn.param_spec import Specs, is_spec, kernel, lead_axes, spec_paths
from jaxft.nn.stack import CallCount, FusedLayers, float_bits, from_float_bits, layer_at, put_layer
from jaxft.nn.tree import Batch, Grads, Mask, Metrics, OptState, Params
from jaxft.objectives.objective import Objective
from jaxft.optim.rules import stack_of
from jaxft.optim.update import (
    StepInfo,
    UpdateCheck,
    Updated,
    all_finite,
    guarded_update,
    stays_finite,
    to_float32,
)

LARGE = 1 << 26  # a matrix with at least this many elements is updated in blocks of rows
PIECE = 1 << 24  # maximum number of elements of such a block


class LayerParts(NamedTuple):
    """A layerwise update in two parts, stacked layers and other leaves, for a backward pass that updates a
    layer once its gradient exists.

    split(tree) -> ([the leaves of each stack of layers], other leaves), trees with None for all other leaves.
    states(LayerwiseState.layers) -> the optimizer state of each stack. update_layer(grads, opt_state, params,
    info): update one layer. layers_key(key, n) -> the key k of stack n; its layer i is rounded with
    fold_in(k, i). update_rest(grads, opt_state, params, info): update the other leaves; stacked leaves and
    their state are None in its result. check_layer, check_rest: stays_finite for these two updates.
    """

    split: Callable[[Params], tuple[list[Params], Params]]
    states: Callable[[OptState], list[OptState]]
    layers_key: Callable[[Key[Array, ""] | None, int], Key[Array, ""] | None]
    update_layer: Callable[[Grads, OptState, Params, StepInfo], Updated]
    update_rest: Callable[[Grads, OptState, Params, StepInfo], Updated]
    check_layer: UpdateCheck
    check_rest: UpdateCheck


class LayerwiseState(NamedTuple):
    """Optimizer states of a layerwise optimizer: one for the stacked leaves (see joined_states), one for the
    other leaves, and one for each large matrix.
    """

    layers: OptState
    rest: OptState
    large: tuple[OptState, ...]


@dataclass(frozen=True)
class LayerGroups:
    """The groups into which a layerwise optimizer divides the trainable leaves.

    stacks: for each stack of layers a mask of its leaves. large: paths of matrices without a layers axis that
    are updated in blocks of rows. All other leaves are updated together.
    """

    stacks: tuple[Mask, ...]
    large: tuple[str, ...]


def layer_groups(specs: Specs, rowwise: bool) -> LayerGroups:
    """Group the trainable leaves for layerwise updates: the leaves of each stack of layers, each large matrix
    without a layers axis (only if `rowwise`), and the rest.

    specs: None for frozen leaves. rowwise: whether large matrices are updated in blocks of rows, see
    UpdateRule.
    """
    large = [
        path
        for path, s in spec_paths(specs).items()
        if rowwise and kernel(s) and not lead_axes(s) and math.prod(s.shape) >= LARGE
    ]
    return LayerGroups(_stack_masks(specs), tuple(large))


def init_layerwise(
    transform: optax.GradientTransformation, groups: LayerGroups, params: Params
) -> LayerwiseState:
    """Return the optimizer state of each group; the state of stacked layers has the layers axis too."""
    if not jax.tree.leaves(params):  # optax's tree_map_params passes one node in place of all parameters
        state = transform.init(params)
        layers = joined_states([state] * len(groups.stacks))
        return LayerwiseState(layers, state, (state,) * len(groups.large))
    stacks, rest, large = _split(groups, params)
    states = joined_states([jax.vmap(transform.init)(layers) for layers in stacks])
    return LayerwiseState(states, transform.init(rest), tuple(map(transform.init, large)))


def update_layerwise(
    parts: LayerParts, grads: Grads, opt_state: LayerwiseState, params: Params, info: StepInfo
) -> Updated:
    """Return (parameters, optimizer state) after updating leaves without layers, then each layer in turn."""
    rest, rest_state = parts.update_rest(grads, opt_state, params, info)
    update, states = partial(_update_piece, parts.update_layer, info), list[OptState]()
    stacks = zip(parts.split(grads)[0], parts.split(params)[0], parts.states(opt_state.layers), strict=True)
    for number, (layer_grads, *before) in enumerate(stacks):
        key = parts.layers_key(info.key, number)
        layers, state = _piece_by_piece(update, layer_grads, tuple(before), key)
        rest, states = tree.combine(layers, rest), [*states, state]
    return rest, rest_state._replace(layers=joined_states(states))


def layers_stay_finite(
    parts: LayerParts, grads: Grads, opt_state: LayerwiseState, params: Params, info: StepInfo
) -> Bool[Array, ""]:
    """Return whether the step is finite and update_layerwise would leave every parameter finite."""
    fine = parts.check_rest(grads, opt_state, params, info)
    states = parts.states(opt_state.layers)
    for layers in zip(parts.split(grads)[0], states, parts.split(params)[0], strict=True):
        fine = _all_pieces(parts.check_layer, info, layers, fine)
    return fine


def update_rest(
    transform: optax.GradientTransformation,
    groups: LayerGroups,
    grads: Grads,
    opt_state: LayerwiseState,
    params: Params,
    info: StepInfo,
) -> Updated:
    """Update the leaves without a layers axis. Stacked leaves and their state are None in the result."""
    _, rest_grads, large_grads = _split(groups, grads)
    _, rest, large = _split(groups, params)
    update = partial(_update_piece, partial(guarded_update, transform), info)
    keys = [None if info.key is None else jax.random.fold_in(info.key, i) for i in range(1, 2 + len(large))]
    rest, rest_state = update(rest_grads, (rest, opt_state.rest), keys[0])
    done = [
        _rows_in_pieces(update, g, (p, state), key)
        for g, p, state, key in zip(large_grads, large, opt_state.large, keys[1:], strict=True)
    ]
    state = LayerwiseState(None, rest_state, tuple(state for _, state in done))
    return tree.combine(rest, *(p for p, _ in done)), state


def check_rest(
    transform: optax.GradientTransformation,
    groups: LayerGroups,
    grads: Grads,
    opt_state: LayerwiseState,
    params: Params,
    info: StepInfo,
) -> Bool[Array, ""]:
    """Return whether the step is finite and update_rest would leave every parameter finite."""
    _, rest_grads, large_grads = _split(groups, grads)
    _, rest, large = _split(groups, params)
    check = partial(stays_finite, transform)
    fine = check(rest_grads, opt_state.rest, rest, info)
    for g, state, p in zip(large_grads, opt_state.large, large, strict=True):
        pieces = _row_pieces(g)
        if pieces == 1:
            fine &= check(g, state, p, info)
        else:
            divide = partial(_divide_rows, jax.tree.leaves(g)[0].shape[0], pieces)
            fine = _all_pieces(check, info, jax.tree.map(divide, (g, state, p)), fine)
    return fine


def layerwise_parts(transform: optax.GradientTransformation, groups: LayerGroups) -> LayerParts:
    """Build a layerwise update from an optax transformation, which is applied to one layer at a time."""

    def layers_key(key: Key[Array, ""] | None, number: int) -> Key[Array, ""] | None:
        first = None if key is None else jax.random.fold_in(key, 0)
        return jax.random.fold_in(first, 2**31 + number) if first is not None and number else first

    def states(state: OptState) -> list[OptState]:
        return [state] if len(groups.stacks) == 1 else list(state or ())

    return LayerParts(
        partial(_split_stacks, masks=groups.stacks),
        states,
        layers_key,
        partial(guarded_update, transform),
        partial(update_rest, transform, groups),
        partial(stays_finite, transform),
        partial(check_rest, transform, groups),
    )


def no_layer_parts(
    update: Callable[[Grads, OptState, Params, StepInfo], Updated], check: UpdateCheck
) -> LayerParts:
    """Return the LayerParts of an optimizer that updates all leaves at once: no leaf counts as stacked."""
    return LayerParts(lambda x: ([], x), lambda _: [], lambda key, _: key, update, update, check, check)


def _stack_masks(specs: Specs) -> tuple[Mask, ...]:
    """Return for each stack of layers a mask of its leaves. specs: None for frozen leaves."""
    stacks = {path: stack_of(path) for path, spec in spec_paths(specs).items() if "layers" in spec.axes}

    def mask(stack: str) -> Mask:
        return tree.map_with_path(lambda path, _: stacks.get(path) == stack, specs, is_leaf=is_spec)

    return tuple(mask(stack) for stack in dict.fromkeys(stacks.values()))


def _split_stacks(x: Params, masks: tuple[Mask, ...]) -> tuple[list[Params], Params]:
    """Return (the leaves of each stack, other leaves): trees with None for all other leaves."""
    stacks = []
    for mask in masks:
        layers, x = tree.partition(x, mask)
        stacks.append(layers)
    return stacks, x


def joined_states(states: list[OptState]) -> OptState:
    """Join the optimizer states of all stacks: None for no stack, the state for one, a tuple for several."""
    return states[0] if len(states) == 1 else tuple(states) or None


def _split(groups: LayerGroups, x: Any) -> tuple[list[Any], Any, list[Any]]:
    """Split a tree like the trainable parameters by group: (each stack, other leaves, each large matrix)."""
    stacks, others = _split_stacks(x, groups.stacks)

    def only(name: str) -> Any:
        return tree.map_with_path(lambda path, x: x if path == name else None, others)

    rest = tree.map_with_path(lambda path, x: None if path in groups.large else x, others)
    return stacks, rest, [only(name) for name in groups.large]


def _update_piece(
    update: Callable, info: StepInfo, grads: Grads, before: Updated, key: Key[Array, ""] | None
) -> Updated:
    """Call `update` on a layer or block of rows. before: (parameters, optimizer state). key: for rounding."""
    params, opt_state = before
    return update(grads, opt_state, params, info._replace(key=key))


def _all_pieces(
    check: UpdateCheck, info: StepInfo, pieces: tuple[Grads, OptState, Params], fine: Bool[Array, ""]
) -> Bool[Array, ""]:
    """Return whether `fine` is True and `check` is True for every layer or block of rows: for every index of
    the first axis of `pieces`, (gradients, optimizer state, parameters).
    """

    def one(i: Array, fine: Array) -> Array:
        grads, opt_state, params = layer_at(pieces, i)
        return fine & check(grads, opt_state, params, info)

    return jax.lax.fori_loop(0, jax.tree.leaves(pieces)[0].shape[0], one, fine)


def _piece_by_piece(update: Callable, grads: Grads, before: Updated, key: Key[Array, ""] | None) -> Updated:
    """Apply `update(grads, before, key)` to each index i of the leaves' first axis, in place. The key of i is
    fold_in(key, i).
    """

    def one(i: Array, now: Any) -> Any:
        own_key = None if key is None else jax.random.fold_in(key, i)
        return put_layer(now, update(layer_at(grads, i), layer_at(now, i), own_key), i)

    return jax.lax.fori_loop(0, jax.tree.leaves(grads)[0].shape[0], one, before)


def _rows_in_pieces(update: Callable, grads: Grads, before: Updated, key: Key[Array, ""] | None) -> Updated:
    """Update a large matrix in blocks of rows by `_piece_by_piece`; on a mesh, all rows at once. State
    without the axis of rows is the same for all blocks.
    """
    rows, pieces = jax.tree.leaves(grads)[0].shape[0], _row_pieces(grads)
    if sharding.is_multi_device():
        return update(grads, before, key)
    divide = partial(_divide_rows, rows, pieces)

    def join(x: Array, like: Array) -> Array:
        return x.reshape(like.shape) if _has_rows(like, rows) else x[0]

    done = _piece_by_piece(update, jax.tree.map(divide, grads), jax.tree.map(divide, before), key)
    return jax.tree.map(join, done, before)


def _row_pieces(grads: Grads) -> int:
    """Return the number of equal blocks of rows in which a large matrix is updated: the least for which a
    block has at most PIECE elements; 1 on a mesh of several devices.
    """
    matrix = jax.tree.leaves(grads)[0]
    if sharding.is_multi_device():
        return 1
    rows = matrix.shape[0]
    return next(n for n in range(1, rows + 1) if rows % n == 0 and matrix.size // n <= PIECE)


def _has_rows(x: Array, rows: int) -> bool:
    return x.shape[:1] == (rows,)


def _divide_rows(rows: int, pieces: int, x: Array) -> Array:
    """Reshape an array [rows, ...] to [pieces, rows / pieces, ...]; repeat an array without rows."""
    if _has_rows(x, rows):
        return x.reshape(pieces, rows // pieces, *x.shape[1:])
    return jnp.repeat(x[None], pieces, 0)


# ---- inside the backward pass


OFF = "optim.fused_backward=false"


class FusedStep(NamedTuple):
    """The outputs of a fused backward pass: parameters and optimizer state, facts about the step, metrics."""

    trainable: Params
    opt_state: OptState
    info: StepInfo
    metrics: Metrics


def fused_step(
    objective: Objective,
    parts: LayerParts,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    keys: tuple[Key[Array, ""], Key[Array, ""]],
) -> FusedStep:
    """Compute the loss of a batch [1, rows, ...] and update every parameter in the backward pass.

    parts: of the optimizer. keys: (for the objective, for stochastic rounding). If the loss is not finite,
    nothing changes. If only the gradient or update of a layer is not finite, that layer and the leaves
    without layers stay unchanged, the other layers are updated, and the step's norm is NaN. Raises ValueError
    if no layers of the base are trained, for several microbatches, and for an objective that runs the model
    more than once.
    """
    check_fused(parts, state.trainable, jax.tree.leaves(batch)[0].shape[0])
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
            pick, update = partial(_layers_of_base, name), partial(update_layer, number)
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


def check_fused(parts: LayerParts, trainable: Params, microbatches: int) -> None:
    """Raise ValueError if optim.fused_backward cannot be used: for several microbatches, if no layers are
    trainable, or if other stacked leaves than the base's are.
    """
    if microbatches != 1:
        raise ValueError(
            "optim.fused_backward updates a layer as soon as its gradient exists, but a step has "
            f"{microbatches} microbatches; set data.micro=1, or {OFF}"
        )
    paths = [path for layers in parts.split(trainable)[0] for path in tree.paths(layers)]
    others = [path for path in paths if not path.startswith("base/")]
    if others or not paths:
        got = f"{others[0]} is trainable" if others else "none of them is trainable"
        raise ValueError(f"optim.fused_backward updates layers of the base, but {got}; set {OFF}")
