"""Update parameters and optimizer state, all at once or layer by layer, unless the step is non-finite."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.nn.param import Specs, is_spec, spec_paths
from jaxft.tree import Grads, Mask, OptState, Params

LARGE = 1 << 26  # a matrix with at least this many elements is updated in blocks of rows
PIECE = 1 << 24  # maximum number of elements of such a block

Updated = tuple[Params, OptState]


class StepInfo(NamedTuple):
    """Facts about a step that an update needs in addition to the gradients.

    norm: global norm of the gradients. finite: if False, parameters and optimizer state stay unchanged. key:
    for the stochastic rounding of bfloat16 parameters; None if there are none. frozen: if True, the policy
    and its optimizer state stay unchanged, and without freezable.py all others too; None for no freezing.
    """

    norm: Float[Array, ""]
    finite: Bool[Array, ""]
    key: Key[Array, ""] | None = None
    frozen: Bool[Array, ""] | None = None


class LayerParts(NamedTuple):
    """A layerwise update in two parts, for a backward pass that updates a layer once its gradient exists.

    split(tree): (leaves with a layers axis, other leaves), None on the other side. update_layer(grads,
    opt_state, params, info): update one layer; layer i rounds with `fold_in(layers_key(key), i)`.
    update_rest(grads, opt_state, params, info): update the other leaves; the stacked ones and their state are
    None in its result.
    """

    split: Callable[[Params], tuple[Params, Params]]
    layers_key: Callable[[Key[Array, ""] | None], Key[Array, ""] | None]
    update_layer: Callable[[Grads, OptState, Params, StepInfo], Updated]
    update_rest: Callable[[Grads, OptState, Params, StepInfo], Updated]


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


def to_float32(x: Any) -> Any:
    """Cast 16-bit floats to float32; leave wider ones as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 2 else x, x)


def stochastically_rounded(x: Float[Array, "..."], key: Key[Array, ""]) -> Float[Array, "..."]:
    """Round float32 to one of its two neighbours in bfloat16, the nearer more often: unbiased in expectation.

    Random bits are added to the 16 bits that are dropped. Non-finite values are unchanged.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(params: Params, updates: Params, key: Key[Array, ""] | None) -> Params:
    """optax.apply_updates in float32 or wider, which rounds bfloat16 parameters stochastically.

    Most updates are smaller than half of a bfloat16's spacing and would be lost otherwise. Raises ValueError
    for bfloat16 parameters without a key.
    """
    leaves, structure = jax.tree.flatten(params)
    new: list[Array] = []
    for i, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        if p.dtype != jnp.bfloat16:
            new.append(optax.apply_updates(p, u))
        elif key is None:
            raise ValueError("bfloat16 parameters are rounded stochastically, which needs StepInfo.key")
        else:
            new.append(stochastically_rounded(p.astype(jnp.float32) + u, jax.random.fold_in(key, i)))
    return jax.tree.unflatten(structure, new)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Allow optax's implicit dtype and rank promotion, even if JAX is set to strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def is_updated(info: StepInfo) -> Bool[Array, ""]:
    """Return whether a step changes parameters and optimizer state."""
    return info.finite if info.frozen is None else info.finite & ~info.frozen


def guarded_update(
    transform: optax.GradientTransformation, grads: Grads, opt_state: OptState, params: Params, info: StepInfo
) -> Updated:
    """Return (parameters, optimizer state) after one optax update, unchanged if not `is_updated(info)`.

    The state's update depends on the new parameters, so that XLA writes each array in place: otherwise its
    CPU compiler copies the whole state first, because the new parameters read the old state.
    """
    chex.assert_trees_all_equal_shapes(grads, params)
    transform, moves = optax.with_extra_args_support(transform), is_updated(info)

    def select(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(moves, n, o), new, old)

    with standard_promotion():
        updates, _ = transform.update(grads, opt_state, params, norm=info.norm)
    new_params = select(apply_updates(params, updates, info.key), params)
    grads = jax.tree.map(_after, grads, new_params)
    with standard_promotion():
        new_state = transform.update(grads, opt_state, params, norm=info.norm)[1]
    return new_params, select(new_state, opt_state)


def _after(x: Array, done: Array) -> Array:
    """Make x depend on `done`, so that XLA computes it later. On a mesh return x itself, because `done` would
    be communicated.
    """
    if sharding.is_multi_device():
        return x

    def wait(x: Array, done: Array) -> Array:
        return jnp.where(jnp.isfinite(done.ravel()[0]), x, jnp.zeros((), x.dtype))

    return jax.lax.platform_dependent(x, done, cpu=wait, default=lambda x, done: x)


def layer_groups(specs: Specs, rowwise: bool) -> LayerGroups:
    """Group the trainable leaves (`specs`: None where frozen). rowwise: whether rows may be updated
    separately.
    """
    stacked = jax.tree.map(lambda s: "layers" in s.axes, specs, is_leaf=is_spec)
    large = [
        path
        for path, s in spec_paths(specs).items()
        if rowwise and "layers" not in s.axes and len(s.shape) == 2 and math.prod(s.shape) >= LARGE
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


def layerwise_parts(transform: optax.GradientTransformation, groups: LayerGroups) -> LayerParts:
    """Build a layerwise update from an optax transformation, which is applied to one layer at a time."""

    def split(x: Params) -> tuple[Params, Params]:
        return tree.partition(x, groups.stacked)

    def layers_key(key: Key[Array, ""] | None) -> Key[Array, ""] | None:
        return None if key is None else jax.random.fold_in(key, 0)

    return LayerParts(
        split, layers_key, partial(guarded_update, transform), partial(update_rest, transform, groups)
    )


def no_layer_parts(update: Callable[[Grads, OptState, Params, StepInfo], Updated]) -> LayerParts:
    """Build the parts of an update of all leaves at once: no leaf counts as stacked."""

    def split(x: Params) -> tuple[Params, Params]:
        return jax.tree.map(lambda _: None, x), x

    return LayerParts(split, lambda key: key, update_layer=update, update_rest=update)


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
    matrix = jax.tree.leaves(grads)[0]
    rows = matrix.shape[0]
    pieces = next(n for n in range(1, rows + 1) if rows % n == 0 and matrix.size // n <= PIECE)
    if sharding.is_multi_device():
        return update(grads, before, key)

    def has_rows(x: Array) -> bool:
        return x.ndim > 0 and x.shape[0] == rows

    def divide(x: Array) -> Array:
        if has_rows(x):
            return x.reshape(pieces, rows // pieces, *x.shape[1:])
        return jnp.repeat(x[None], pieces, 0)

    def join(x: Array, like: Array) -> Array:
        return x.reshape(like.shape) if has_rows(like) else x[0]

    done = _piece_by_piece(update, jax.tree.map(divide, grads), jax.tree.map(divide, before), key)
    return jax.tree.map(join, done, before)
