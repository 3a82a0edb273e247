"""Update parameters and optimizer state at once, unless the step or its result is non-finite."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from jaxft.distributed import sharding
from jaxft.nn.tree import Grads, OptState, Params

Updated = tuple[Params, OptState]


class StepInfo(NamedTuple):
    """Facts about a step that an update needs in addition to the gradients.

    norm: global norm of the gradients. finite: if False, parameters and optimizer state stay unchanged. key:
    for the stochastic rounding of bfloat16 parameters; None if there are none. frozen: if True, the policy
    and its optimizer state stay unchanged (with an optimizer that is not freezable, all parameters); None for
    False. loss: of the step, for skip_spikes; None if no optimizer reads it.
    """

    norm: Float[Array, ""]
    finite: Bool[Array, ""]
    key: Key[Array, ""] | None = None
    frozen: Bool[Array, ""] | None = None
    loss: Float[Array, ""] | None = None


UpdateCheck = Callable[[Grads, OptState, Params, StepInfo], Bool[Array, ""]]


def to_float32(x: Any) -> Any:
    """Cast the 16-bit floats of a tree to float32; other leaves are unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 2 else x, x)


def stochastically_rounded(x: Float[Array, "..."], key: Key[Array, ""]) -> Float[Array, "..."]:
    """Round float32 to bfloat16, at random to one of the two nearest values, so that the expected value is x.

    Random bits are added to the 16 bits that are then dropped. Non-finite values are unchanged.
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
            raise ValueError(
                "bfloat16 parameters are rounded stochastically, which needs a random key; pass it "
                "in StepInfo.key"
            )
        else:
            new.append(stochastically_rounded(p.astype(jnp.float32) + u, jax.random.fold_in(key, i)))
    return jax.tree.unflatten(structure, new)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Allow optax's implicit dtype and rank promotion, even if JAX is set to strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def is_updated(info: StepInfo) -> Bool[Array, ""]:
    """Return whether a step changes the parameters: it is finite and `info.frozen` is None or False."""
    return info.finite if info.frozen is None else info.finite & ~info.frozen


def stays_finite(
    transform: optax.GradientTransformation, grads: Grads, opt_state: OptState, params: Params, info: StepInfo
) -> Bool[Array, ""]:
    """Return whether the step is finite and its optax update would leave every parameter finite.

    A learning rate, a factor of lr_groups or a moment may be too large although loss and gradients are
    finite. The update is computed here only for this flag, and again in `guarded_update`, which can then
    update in place; a barrier keeps XLA from storing the update in between.
    """
    grads = jax.lax.optimization_barrier(grads)
    transform = optax.with_extra_args_support(transform)

    def leaf(p: Array, u: Array) -> Array:
        new = jnp.abs(to_float32(p) + u)
        return _all(new <= float(jnp.finfo(p.dtype).max))  # False for NaN, too

    with standard_promotion():
        updates, _ = transform.update(grads, opt_state, params, norm=info.norm)
        fine = jax.tree.leaves(jax.tree.map(leaf, params, updates))
    stays = functools.reduce(jnp.logical_and, fine, info.finite)
    return stays if info.frozen is None else stays | (info.finite & info.frozen)


def all_finite(params: Params) -> Bool[Array, ""]:
    """Return whether no parameter is infinite or NaN."""
    return functools.reduce(jnp.logical_and, (_all(jnp.isfinite(x)) for x in jax.tree.leaves(params)))


def _all(x: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Return jnp.all(x). On a CPU four flags are compared as one integer, since XLA reduces flags slowly."""
    if sharding.is_multi_device() or x.size % 4:
        return jnp.all(x)

    def words(x: Array) -> Array:
        bytes_in_fours = x.astype(jnp.uint8).reshape(x.size // 4, 4)
        return jnp.all(jax.lax.bitcast_convert_type(bytes_in_fours, jnp.uint32) == 0x01010101)

    return jax.lax.platform_dependent(x, cpu=words, default=jnp.all)


def guarded_update(
    transform: optax.GradientTransformation, grads: Grads, opt_state: OptState, params: Params, info: StepInfo
) -> Updated:
    """Return (parameters, optimizer state) after one optax update, unchanged if `is_updated(info)` is False.

    The new state is computed after the new parameters, so that XLA writes each array in place. Otherwise its
    CPU compiler copies the full state first, because the new parameters are computed from the old state.
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
    """Return x so that XLA uses it only after `done`; on a mesh plain x, to save communicating `done`."""
    if sharding.is_multi_device():
        return x

    def wait(x: Array, done: Array) -> Array:
        return jnp.where(jnp.isfinite(done.ravel()[0]), x, jnp.zeros((), x.dtype))

    return jax.lax.platform_dependent(x, done, cpu=wait, default=lambda x, done: x)
