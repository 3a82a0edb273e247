"""Transformations of updates that know a parameter's layers, path or dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.nn.param import Specs, is_spec, spec_paths
from jaxft.optim.update import to_float32
from jaxft.tree import Mask, OptState, Params


def apply_per_layer(transform: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
    """Apply a transformation to each layer of a stacked leaf as to a separate parameter. Other leaves are
    unaffected. Statistics of a full parameter (factored moments, block RMS) would otherwise mix layers.
    """
    masks = stack_masks(specs)

    def init(params: Params) -> OptState:
        if not jax.tree.leaves(params):  # a placeholder in place of all parameters, see init_layerwise
            return (joined_states([transform.init(params) for _ in masks]), transform.init(params))
        stacks, rest = split_stacks(params, masks)
        return (joined_states([jax.vmap(transform.init)(layers) for layers in stacks]), transform.init(rest))

    def update(updates: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        (stacks, rest), nothing = split_stacks(updates, masks), ([None] * len(masks), None)
        own_stacks, own_rest = nothing if params is None else split_stacks(params, masks)
        new_rest, rest_state = transform.update(rest, state[1], own_rest)
        new, states = [new_rest], []
        for layers, of_stack, own in zip(stacks, states_of_stacks(state[0], masks), own_stacks, strict=True):
            layers, of_stack = jax.vmap(transform.update)(layers, of_stack, own)
            new, states = [*new, layers], [*states, of_stack]
        return tree.combine(*reversed(new)), (joined_states(states), rest_state)

    return optax.GradientTransformation(init, update)


def stack_of(path: str) -> str:
    """Return the name of the stack that a stacked parameter is in: "layers" for base/layers/attn/q and for
    critic/adapter/layers/attn/q/a.
    """
    parts = path.split("/")
    return parts[max((i + 1 for i, part in enumerate(parts) if part in ("base", "adapter")), default=0)]


def stack_masks(specs: Specs) -> tuple[Mask, ...]:
    """Return a mask of the leaves with a layers axis for each stack of layers. specs: None where frozen."""
    stacks = {path: stack_of(path) for path, spec in spec_paths(specs).items() if "layers" in spec.axes}

    def mask(stack: str) -> Mask:
        return tree.map_with_path(lambda path, _: stacks.get(path) == stack, specs, is_leaf=is_spec)

    return tuple(mask(stack) for stack in dict.fromkeys(stacks.values()))


def split_stacks(x: Params, masks: tuple[Mask, ...]) -> tuple[list[Params], Params]:
    """Return the leaves of each stack, and the other leaves; None on the other sides."""
    stacks = []
    for mask in masks:
        layers, x = tree.partition(x, mask)
        stacks.append(layers)
    return stacks, x


def joined_states(states: list[OptState]) -> OptState:
    """Return the optimizer states of all stacks as one: that of a single stack itself, None for no stack."""
    return states[0] if len(states) == 1 else tuple(states) or None


def states_of_stacks(state: OptState, masks: tuple[Mask, ...]) -> list[OptState]:
    """Invert joined_states."""
    return [state] if len(masks) == 1 else list(state or ())


def scale_groups(groups: tuple[tuple[str, float], ...], specs: Specs) -> optax.GradientTransformation:
    """Multiply each leaf's update by the factor of the first pattern that matches its path."""
    factors = jax.tree.map(lambda _: 1.0, specs, is_leaf=is_spec)
    for pattern, factor in reversed(groups):
        mask = tree.mask_by_path(factors, pattern, "optim.lr_groups")
        factors = jax.tree.map(lambda hit, old, new=factor: new if hit else old, mask, factors)
    by_path = tree.paths(factors)
    return optax.stateless(lambda updates, _: tree.map_with_path(lambda path, u: by_path[path] * u, updates))


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scale updates down to a global norm of at most `limit`. norm: the global norm if it is already
    computed.
    """

    def update(
        updates: Params, state: OptState, params: Params | None = None, *, norm: Array | None = None, **_: Any
    ) -> tuple[Params, OptState]:
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.minimum(limit / norm, jnp.ones((), norm.dtype))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Cast 16-bit gradients and parameters to float32 for a transformation.

    Its state and updates are then float32 as well.
    """
    transform = optax.with_extra_args_support(transform)

    def update(
        updates: Params, state: OptState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, OptState]:
        params = None if params is None else to_float32(params)
        return transform.update(to_float32(updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: transform.init(to_float32(params)), update)
