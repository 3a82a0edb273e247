"""Updates of stacked layers one after the other, and of large matrices in blocks of rows, so that only one
layer's updates are in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.nn.param import Specs, is_spec, kernel, lead_axes, spec_paths
from jaxft.optim.update import StepInfo, UpdateCheck, Updated, guarded_update, stays_finite
from jaxft.tree import Grads, Mask, OptState, Params

LARGE = 1 << 26  # a matrix with at least this many elements is updated in blocks of rows
PIECE = 1 << 24  # maximum number of elements of such a block


class LayerParts(NamedTuple):
    """A layerwise update in two parts, for a backward pass that updates a layer once its gradient exists.

    split(tree): (leaves with a layers axis, other leaves), None on the other side. update_layer(grads,
    opt_state, params, info): update one layer; layer i rounds with `fold_in(layers_key(key), i)`.
    update_rest(grads, opt_state, params, info): update the other leaves; the stacked ones and their state are
    None in its result. check_layer, check_rest: `stays_finite` of these updates.
    """

    split: Callable[[Params], tuple[Params, Params]]
    layers_key: Callable[[Key[Array, ""] | None], Key[Array, ""] | None]
    update_layer: Callable[[Grads, OptState, Params, StepInfo], Updated]
    update_rest: Callable[[Grads, OptState, Params, StepInfo], Updated]
    check_layer: UpdateCheck
    check_rest: UpdateCheck


class LayerwiseState(NamedTuple):
    """Optimizer states of a layerwise optimizer: of the stacked leaves, of the other leaves, and of each
    large matrix.
    """

    layers: OptState
    rest: OptState
    large: tuple[OptState, ...]


@dataclass(frozen=True)
class LayerGroups:
    """Which trainable leaves a layerwise optimizer updates together.

    stacked: mask of the leaves with a layers axis. large: paths of matrices without a layers axis that are
    updated in blocks of rows.
    """

    stacked: Mask
    large: tuple[str, ...]


def layer_groups(specs: Specs, rowwise: bool) -> LayerGroups:
    """Group the trainable leaves (`specs`: None where frozen). rowwise: whether rows may be updated
    separately.
    """
    stacked = jax.tree.map(lambda s: "layers" in s.axes, specs, is_leaf=is_spec)
    large = [
        path
        for path, s in spec_paths(specs).items()
        if rowwise and kernel(s) and not lead_axes(s) and math.prod(s.shape) >= LARGE
    ]
    return LayerGroups(stacked, tuple(large))


def init_layerwise(
    transform: optax.GradientTransformation, groups: LayerGroups, params: Params
) -> LayerwiseState:
    """Return the optimizer state of each group; that of stacked leaves is stacked too."""
    any_layers = any(jax.tree.leaves(groups.stacked))
    if not jax.tree.leaves(
        params
    ):  # optax.tree_utils.tree_map_params passes one node in place of all parameters
        state = transform.init(params)
        return LayerwiseState(state if any_layers else None, state, (state,) * len(groups.large))
    layers, rest, large = _split(groups, params)
    state = jax.vmap(transform.init)(layers) if any_layers else None
    return LayerwiseState(state, transform.init(rest), tuple(map(transform.init, large)))


def update_layerwise(
    parts: LayerParts, grads: Grads, opt_state: LayerwiseState, params: Params, info: StepInfo
) -> Updated:
    """Return (parameters, optimizer state) after updating the other leaves, then the layers one by one."""
    rest, rest_state = parts.update_rest(grads, opt_state, params, info)
    layers, state = parts.split(params)[0], opt_state.layers
    if state is not None:
        update = partial(_update_piece, parts.update_layer, info)
        layer_grads, key = parts.split(grads)[0], parts.layers_key(info.key)
        layers, state = _piece_by_piece(update, layer_grads, (layers, state), key)
    return tree.combine(layers, rest), rest_state._replace(layers=state)


def layers_stay_finite(
    parts: LayerParts, grads: Grads, opt_state: LayerwiseState, params: Params, info: StepInfo
) -> Bool[Array, ""]:
    """`stays_finite` of update_layerwise: of the rest and of the layers one by one."""
    fine = parts.check_rest(grads, opt_state, params, info)
    if opt_state.layers is None:
        return fine
    layers = parts.split(grads)[0], opt_state.layers, parts.split(params)[0]
    return _all_pieces(partial(_check_piece, parts.check_layer, info), layers, fine)


def update_rest(
    transform: optax.GradientTransformation,
    groups: LayerGroups,
    grads: Grads,
    opt_state: LayerwiseState,
    params: Params,
    info: StepInfo,
) -> Updated:
    """Update the leaves without a layers axis; the stacked ones and their state are None in the result."""
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
    """`stays_finite` of update_rest."""
    _, rest_grads, large_grads = _split(groups, grads)
    _, rest, large = _split(groups, params)
    fine = stays_finite(transform, rest_grads, opt_state.rest, rest, info)
    check = partial(_check_piece, partial(stays_finite, transform), info)
    for g, state, p in zip(large_grads, opt_state.large, large, strict=True):
        pieces = _row_pieces(g)
        if pieces == 1:
            fine &= check((g, state, p))
        else:
            divide = partial(_divide_rows, jax.tree.leaves(g)[0].shape[0], pieces)
            fine = _all_pieces(check, jax.tree.map(divide, (g, state, p)), fine)
    return fine


def layerwise_parts(transform: optax.GradientTransformation, groups: LayerGroups) -> LayerParts:
    """Build a layerwise update from an optax transformation, which is applied to one layer at a time."""

    def split(x: Params) -> tuple[Params, Params]:
        return tree.partition(x, groups.stacked)

    def layers_key(key: Key[Array, ""] | None) -> Key[Array, ""] | None:
        return None if key is None else jax.random.fold_in(key, 0)

    return LayerParts(
        split,
        layers_key,
        partial(guarded_update, transform),
        partial(update_rest, transform, groups),
        partial(stays_finite, transform),
        partial(check_rest, transform, groups),
    )


def no_layer_parts(
    update: Callable[[Grads, OptState, Params, StepInfo], Updated], check: UpdateCheck
) -> LayerParts:
    """Build the parts of an update of all leaves at once: no leaf counts as stacked."""

    def split(x: Params) -> tuple[Params, Params]:
        return jax.tree.map(lambda _: None, x), x

    return LayerParts(split, lambda key: key, update, update, check, check)


def _split(groups: LayerGroups, x: Any) -> tuple[Any, Any, list[Any]]:
    """Split a tree like the trainable parameters into (stacked leaves, other leaves, [each large matrix])."""
    layers, others = tree.partition(x, groups.stacked)

    def only(name: str) -> Any:
        return tree.map_with_path(lambda path, x: x if path == name else None, others)

    rest = tree.map_with_path(lambda path, x: None if path in groups.large else x, others)
    return layers, rest, [only(name) for name in groups.large]


def _update_piece(
    update: Callable, info: StepInfo, grads: Grads, before: Updated, key: Key[Array, ""] | None
) -> Updated:
    """Call `update` on a block of rows or layers, with (parameters, optimizer state) as one value and a
    separate key.
    """
    params, opt_state = before
    return update(grads, opt_state, params, info._replace(key=key))


def _check_piece(
    check: UpdateCheck, info: StepInfo, piece: tuple[Grads, OptState, Params]
) -> Bool[Array, ""]:
    """`check` with (gradients, optimizer state, parameters) as one value."""
    return check(*piece, info)


def _all_pieces(check: Callable, pieces: Any, fine: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether `fine` and `check(piece)` for each index of the leaves' first axis."""

    def one(i: Array, fine: Array) -> Array:
        piece = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), pieces)
        return fine & check(piece)

    return jax.lax.fori_loop(0, jax.tree.leaves(pieces)[0].shape[0], one, fine)


def _piece_by_piece(update: Callable, grads: Grads, before: Updated, key: Key[Array, ""] | None) -> Updated:
    """Apply `update(grads, before, key)` to each index of the leaves' first axis, in place."""

    def one(i: Array, now: Any) -> Any:
        at = partial(jax.tree.map, lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False))
        new = update(at(grads), at(now), None if key is None else jax.random.fold_in(key, i))
        return jax.tree.map(lambda x, piece: jax.lax.dynamic_update_index_in_dim(x, piece, i, 0), now, new)

    return jax.lax.fori_loop(0, jax.tree.leaves(grads)[0].shape[0], one, before)


def _rows_in_pieces(update: Callable, grads: Grads, before: Updated, key: Key[Array, ""] | None) -> Updated:
    """Apply `_piece_by_piece` to blocks of rows of a large matrix; state without rows is the same for all
    blocks. On a mesh update the matrix at once.
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
    """The number of pieces that the rows of a large matrix are updated in; 1 on a mesh."""
    matrix = jax.tree.leaves(grads)[0]
    if sharding.is_multi_device():
        return 1
    rows = matrix.shape[0]
    return next(n for n in range(1, rows + 1) if rows % n == 0 and matrix.size // n <= PIECE)


def _has_rows(x: Array, rows: int) -> bool:
    return x.shape[:1] == (rows,)


def _divide_rows(rows: int, pieces: int, x: Array) -> Array:
    """Divide the first axis of an array with rows into [pieces, rows of a piece]; repeat any other array."""
    if _has_rows(x, rows):
        return x.reshape(pieces, rows // pieces, *x.shape[1:])
    return jnp.repeat(x[None], pieces, 0)
