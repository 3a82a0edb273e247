"""Transformations of updates that know a parameter's layers, path or dtype."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.nn.param import Specs, is_spec, lead_axes, spec_paths
from jaxft.optim.update import to_float32
from jaxft.tree import OptState, Params


def apply_per_layer(transform: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
    """Apply a transformation to each parameter of a stack (over layers, say) as to a separate
    parameter. Statistics of a full parameter (factored moments, block RMS) would otherwise mix them.
    """
    leads = {path: lead_axes(spec) for path, spec in spec_paths(specs).items()}
    kinds = {path: (lead, stack_of(path) if "layers" in lead else "") for path, lead in leads.items()}
    own_kinds = {((), ""), *kinds.values()}
    masks = {
        kind: tree.map_with_path(lambda path, _, kind=kind: kinds[path] == kind, specs, is_leaf=is_spec)
        for kind in sorted(own_kinds, key=lambda kind: (-len(kind[0]), kind))
    }

    def parts(x: Params | None) -> list[Params | None]:
        return [None if x is None else tree.partition(x, mask)[0] for mask in masks.values()]

    def each(fn: Callable, lead: tuple[str, ...], *args: Any) -> Any:
        return fn(*args) if not lead else jax.vmap(partial(each, fn, lead[1:]))(*args)

    def init(params: Params) -> OptState:
        if not jax.tree.leaves(params):  # a placeholder in place of all parameters, see init_layerwise
            return (transform.init(params),) * len(masks)
        return tuple(
            each(transform.init, lead if jax.tree.leaves(own) else (), own)
            for (lead, _), own in zip(masks, parts(params), strict=True)
        )

    def update(updates: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        found = [
            each(transform.update, lead if jax.tree.leaves(own[0]) else (), *own)
            for (lead, _), *own in zip(masks, parts(updates), state, parts(params), strict=True)
        ]
        return tree.combine(*(new for new, _ in found)), tuple(state for _, state in found)

    return optax.GradientTransformation(init, update)


def stack_of(path: str) -> str:
    """Return the name of the stack that a stacked parameter is in: "layers" for base/layers/attn/q and for
    critic/adapter/layers/attn/q/a.
    """
    parts = path.split("/")
    return parts[max((i + 1 for i, part in enumerate(parts) if part in ("base", "adapter")), default=0)]


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
