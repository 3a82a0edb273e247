"""From gradients to updates: schedules, weight decay by axes, and the optax chain over the trainable leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.params import is_spec


def constant(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """lr after a linear warm-up from 0."""
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), optax.constant_schedule(lr)], [warmup])


def linear(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to lr, then a line to `end * lr` at the last step."""
    down = optax.linear_schedule(lr, end * lr, max(1, steps - warmup))
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), down], [warmup])


def cosine(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to lr, then half a cosine to `end * lr` at the last step."""
    down = optax.cosine_decay_schedule(lr, max(1, steps - warmup), alpha=end)
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), down], [warmup])


def adamw(o: "Optim", schedule: optax.Schedule, specs: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with float32 moments; decay on matrices only."""
    return optax.chain(
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, decay_mask(specs)),
        optax.scale_by_learning_rate(schedule),
    )


def adafactor(o: "Optim", schedule: optax.Schedule, specs: Any) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): factored second moments, updates clipped at RMS 1, each layer its own.

    The learning rate is absolute (no multiplication by the parameter's scale) and there is no first moment.
    """
    each = optax.chain(
        optax.scale_by_factored_rms(factored=True, decay_rate=0.8, min_dim_size_to_factor=128),
        optax.clip_by_block_rms(1.0),
    )
    return optax.chain(
        per_layer(each, specs),
        optax.add_decayed_weights(o.weight_decay, decay_mask(specs)),
        optax.scale_by_learning_rate(schedule),
    )


@dataclass(frozen=True)
class Optim:
    """Optimizer settings. optimizer: adamw or adafactor; schedule: constant, linear or cosine (functions of this module).

    warmup: share of the steps with a rising learning rate. end: the schedule's last value as a share of lr. clip: the
    largest global gradient norm, None for no clipping. lr_groups: (path pattern, factor) pairs; a leaf's updates are
    multiplied by the factor of the first pattern that matches it (LoRA+: `(("adapter/.*/b", 16.0),)`).
    """

    lr: float = 2e-4
    optimizer: Callable[..., optax.GradientTransformation] = adamw
    schedule: Callable[..., optax.Schedule] = cosine
    warmup: float = 0.05
    end: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    lr_groups: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"optim.lr is a number from 0 up, found {self.lr}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"optim.b1 and b2 are from 0 up to below 1, found {self.b1} and {self.b2}")
        if not (0 <= self.weight_decay < float("inf") and 0 <= self.end <= 1 and self.eps > 0):
            found = f"weight_decay={self.weight_decay}, end={self.end}, eps={self.eps}"
            raise ValueError(f"optim: weight_decay is from 0 up, end between 0 and 1, eps above 0; found {found}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"optim.warmup is a share of the steps between 0 and 1, found {self.warmup}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim.clip is above 0 or none, found {self.clip}")


def decay_mask(specs: Any) -> Any:
    """True for matrices: two axes beside the stacked layers. Norms and scalars are not decayed."""
    return jax.tree.map(lambda s: len(s.axes) - ("layers" in s.axes) >= 2, specs, is_leaf=is_spec)


def per_layer(tx: optax.GradientTransformation, specs: Any) -> optax.GradientTransformation:
    """`tx` on every layer of a stacked leaf as if it were a parameter of its own, and on the other leaves as it is.

    Whatever looks at a whole parameter (factored moments, block RMS) would otherwise mix the layers.
    """
    stacked = jax.tree.map(lambda s: "layers" in s.axes, specs, is_leaf=is_spec)

    def split(x):
        return (None, None) if x is None else tree.partition(x, stacked)

    def init(params):
        layered, plain = split(params)
        return (jax.vmap(tx.init)(layered) if jax.tree.leaves(layered) else None, tx.init(plain))

    def update(updates, state, params=None):
        (layered, plain), (p_layered, p_plain) = split(updates), split(params)
        new_plain, plain_state = tx.update(plain, state[1], p_plain)
        if state[0] is None:
            return new_plain, (None, plain_state)
        new_layered, layered_state = jax.vmap(tx.update)(layered, state[0], p_layered)
        return tree.combine(new_layered, new_plain), (layered_state, plain_state)

    return optax.GradientTransformation(init, update)


def scale_groups(groups: tuple[tuple[str, float], ...], specs: Any) -> optax.GradientTransformation:
    """Multiply each leaf's update by the factor of the first pattern that matches its path."""
    factors = jax.tree.map(lambda _: 1.0, specs, is_leaf=is_spec)
    for pattern, factor in reversed(groups):
        mask = tree.mask_by_path(factors, pattern)
        factors = jax.tree.map(lambda hit, old, new=factor: new if hit else old, mask, factors)
    return optax.stateless(lambda updates, _: jax.tree.map(lambda f, u: f * u, factors, updates))


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scale the updates down to a global norm of `limit`; their norm, where it is known, is given as `norm`."""

    def update(updates, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.minimum(limit / norm, jnp.ones((), norm.dtype))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def guarded_update(
    tx: optax.GradientTransformation, grads: Any, norm: Array, ok: Array, before: tuple[Any, Any]
) -> tuple[Any, Any]:
    """(parameters, optimizer state) after one update by gradients of global norm `norm`; as before if not `ok`.

    The state's update waits for the parameters' one, so that each array is written in place: left to itself, XLA's CPU
    compiler copies the whole state first, because the new parameters read the old state.
    """
    tx = optax.with_extra_args_support(tx)
    params, state = before
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)  # noqa: E731
    updates, _ = tx.update(grads, state, params, norm=norm)
    moved = keep(optax.apply_updates(params, updates), params)
    grads = jax.tree.map(_after, grads, moved)
    return moved, keep(tx.update(grads, state, params, norm=norm)[1], state)


def _after(x: Array, done: Array) -> Array:
    """x, in a form that can't be computed before `done`, which is finite."""

    def waits(x, done):
        return jnp.where(jnp.isfinite(done.ravel()[0]), x, jnp.zeros((), x.dtype))

    return jax.lax.platform_dependent(x, done, cpu=waits, default=lambda x, done: x)


def make_optimizer(o: Optim, specs: Any, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The chain for the trainable leaves (`specs`: their ParamSpecs, None elsewhere) and its schedule over `steps` steps."""
    try:
        schedule = o.schedule(o.lr, o.end, round(o.warmup * steps), steps)
    except TypeError as error:
        name = getattr(o.schedule, "__name__", o.schedule)
        told = f"optim.schedule={name} does not take (lr, end, warmup, steps); use constant, linear or cosine"
        raise ValueError(told) from error
    parts: list[Any] = [clip_by_global_norm(o.clip)] if o.clip is not None else []
    parts.append(o.optimizer(o, schedule, specs))
    if o.lr_groups:
        parts.append(scale_groups(o.lr_groups, specs))
    return optax.chain(*parts), schedule
