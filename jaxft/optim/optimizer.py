"""From gradients to updates: schedules, weight decay by axes, and the optax chain over the trainable leaves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.nn.param import ParamSpec, is_spec

LARGE, PIECE = (
    1 << 26,
    1 << 24,
)  # elements of a leaf whose rows are updated in turn; at most so many at a time


def constant(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """lr after a linear warm-up from 0."""
    return optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), optax.constant_schedule(lr)], [warmup]
    )


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
        decayed(o, specs),
        optax.scale_by_learning_rate(schedule),
    )


adamw.by_row = True  # type: ignore[attr-defined]  # rows of a leaf can be updated apart from one another


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
        decayed(o, specs),
        optax.scale_by_learning_rate(schedule),
    )


@dataclass(frozen=True)
class Optim:
    """Optimizer settings. optimizer: adamw or adafactor; schedule: constant, linear or cosine (functions of this module).

    warmup: share of the steps with a rising learning rate. end: the schedule's last value as a share of lr. clip: the
    largest global gradient norm, None for no clipping. lr_groups: (path pattern, factor) pairs; a leaf's updates are
    multiplied by the factor of the first pattern that matches it (LoRA+: `(("adapter/.*/b", 16.0),)`). in_turn: update stacked
    layers one after the other, so that memory holds the update of one; the numbers are the same, but for the random bits of
    what is rounded stochastically. in_backward: do so inside the backward pass, so that memory holds the gradient of one
    layer too; for one microbatch a step and clip=none, since the gradients' norm is known only afterwards. Where a gradient
    is not finite then, the layers above it have moved already.
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
    in_turn: bool = False
    in_backward: bool = False

    def __post_init__(self):
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"optim.lr is a number from 0 up, found {self.lr}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"optim.b1 and b2 are from 0 up to below 1, found {self.b1} and {self.b2}")
        if not (0 <= self.weight_decay < float("inf") and 0 <= self.end <= 1 and self.eps > 0):
            found = f"weight_decay={self.weight_decay}, end={self.end}, eps={self.eps}"
            raise ValueError(
                f"optim: weight_decay is from 0 up, end between 0 and 1, eps above 0; found {found}"
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"optim.warmup is a share of the steps between 0 and 1, found {self.warmup}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optim.clip is above 0 or none, found {self.clip}")
        if self.in_backward and self.clip is not None:
            raise ValueError(f"optim.in_backward updates layers before the gradients' norm is known, and optim.clip={self.clip} "
                             "needs it; set optim.clip=none, or optim.in_backward=false")  # fmt: skip


def decay_mask(specs: Any) -> Any:
    """True for matrices: two axes beside the stacked layers. Norms and scalars are not decayed."""
    return jax.tree.map(lambda s: len(s.axes) - ("layers" in s.axes) >= 2, specs, is_leaf=is_spec)


def decayed(o: "Optim", specs: Any) -> optax.GradientTransformation:
    """Weight decay of matrices, in a tree of all leaves or of some."""
    known = tree.paths(decay_mask(specs))
    return optax.add_decayed_weights(o.weight_decay, partial(tree.map_with_path, lambda path, _: known[path]))


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
    known = tree.paths(factors)
    return optax.stateless(lambda updates, _: tree.map_with_path(lambda path, u: known[path] * u, updates))


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scale the updates down to a global norm of `limit`; their norm, where it is known, is given as `norm`."""

    def update(updates, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.minimum(limit / norm, jnp.ones((), norm.dtype))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def stochastically_rounded(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """float32 to one of its two neighbours in bfloat16, the nearer one more often: right in expectation.

    A random number is added to the 16 bits that are cut off. Not finite values stay what they are.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    cut = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


def wide(x: Any) -> Any:
    """16-bit floats as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 2 else x, x)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` for gradients and parameters of any dtype: 16-bit ones are widened for it, so that state and updates are float32."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        return tx.update(wide(updates), state, None if params is None else wide(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update)


def moved_by(params: Any, updates: Any, key: Array | None) -> Any:
    """Parameters and updates added up, in float32 or wider; into bfloat16 ones they are rounded stochastically, since most
    updates are smaller than half a bfloat16's spacing."""
    leaves, shape = jax.tree.flatten(params)
    moved: list[Array] = []
    for i, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        if p.dtype != jnp.bfloat16:
            moved.append(optax.apply_updates(p, u))
        elif key is None:
            raise ValueError("bfloat16 parameters are rounded stochastically, which takes a key")
        else:
            moved.append(stochastically_rounded(p.astype(jnp.float32) + u, jax.random.fold_in(key, i)))
    return jax.tree.unflatten(shape, moved)


def guarded_update(
    tx: optax.GradientTransformation,
    grads: Any,
    norm: Array,
    ok: Array,
    before: tuple[Any, Any],
    key: Array | None = None,
) -> tuple[Any, Any]:
    """(parameters, optimizer state) after one update by gradients of global norm `norm`; as before if not `ok`.

    The state's update waits for the parameters' one, so that each array is written in place: left to itself, XLA's CPU
    compiler copies the whole state first, because the new parameters read the old state. key: of the rounding of bfloat16
    parameters.
    """
    if isinstance(tx, InTurn):
        return tx.apply(grads, norm, ok, before, key)
    tx = optax.with_extra_args_support(tx)
    params, state = before
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)  # noqa: E731
    updates, _ = tx.update(grads, state, params, norm=norm)
    moved = keep(moved_by(params, updates, key), params)
    grads = jax.tree.map(_after, grads, moved)
    return moved, keep(tx.update(grads, state, params, norm=norm)[1], state)


@dataclass(frozen=True)
class InTurn:
    """An optimizer that updates stacked layers one after the other, each as if it were a parameter of its own.

    tx: for the leaves of one layer, and for those without layers. stacked: which leaves have layers. by_row: large tables and
    heads are updated a few rows at a time too, since tx works on each element, or on blocks within a row. in_backward: the
    layers' turn comes inside the backward pass (jaxft.optim.fused_backward). init(params) -> state;
    apply(gradients, norm, ok, (params, state), key) -> (params, state), each array written in place.
    """

    tx: optax.GradientTransformation
    stacked: Any
    by_row: bool
    in_backward: bool = False

    def _groups(self, x: Any) -> tuple[Any, Any, list[Any]]:
        """(stacked leaves, the rest, each large leaf alone)."""
        layered, plain = tree.partition(x, self.stacked)
        large = [
            path
            for path, leaf in tree.paths(plain).items()
            if self.by_row and leaf.ndim == 2 and leaf.size >= LARGE
        ]
        alone = [
            tree.map_with_path(lambda path, x, own=own: x if path == own else None, plain) for own in large
        ]
        return layered, tree.map_with_path(lambda path, x: None if path in large else x, plain), alone

    def init(self, params: Any) -> Any:
        """The state of each group, that of the layers stacked."""
        layered, plain, alone = self._groups(params)
        states = jax.vmap(self.tx.init)(layered) if jax.tree.leaves(layered) else None
        return states, self.tx.init(plain), tuple(map(self.tx.init, alone))

    def apply(
        self, grads: Any, norm: Array, ok: Array, before: tuple[Any, Any], key: Array | None
    ) -> tuple[Any, Any]:
        """As guarded_update."""
        others, (_, *other_states) = self.apply_others(grads, norm, ok, before, key)
        layered, state = self.layers(before[0]), before[1][0]
        if state is not None:
            update = lambda g, now, key: guarded_update(self.tx, g, norm, ok, now, key)  # noqa: E731
            layered, state = _piece_by_piece(
                update, self.layers(grads), (layered, state), self.layers_key(key)
            )
        return tree.combine(layered, others), (state, *other_states)

    def apply_others(
        self, grads: Any, norm: Array, ok: Array, before: tuple[Any, Any], key: Array | None
    ) -> tuple[Any, Any]:
        """`apply` of the leaves without layers: None in the place of those with layers, and of their state."""
        _, g_plain, g_alone = self._groups(grads)
        _, plain, alone = self._groups(before[0])
        _, plain_state, alone_state = before[1]
        update = lambda g, now, key: guarded_update(self.tx, g, norm, ok, now, key)  # noqa: E731
        keys = [None if key is None else jax.random.fold_in(key, i) for i in range(1, 2 + len(alone))]
        plain, plain_state = update(g_plain, (plain, plain_state), keys[0])
        many = zip(g_alone, alone, alone_state, keys[1:], strict=True)
        done = [_rows_in_turn(update, g, (p, own), key) for g, p, own, key in many]
        return tree.combine(plain, *(p for p, _ in done)), (None, plain_state, tuple(own for _, own in done))

    def layers(self, x: Any) -> Any:
        """The stacked leaves of a tree like the trainable one, None for the others."""
        return tree.partition(x, self.stacked)[0]

    @staticmethod
    def layers_key(key: Array | None) -> Array | None:
        """What the layers' roundings are drawn from: layer i's from `fold_in(layers_key, i)`."""
        return None if key is None else jax.random.fold_in(key, 0)


def _piece_by_piece(update: Callable, grads: Any, now: Any, key: Array | None) -> Any:
    """`update(gradients, (params, state), key)` of each number of the leaves' first axis, written in place."""

    def one(i: Array, now: Any) -> Any:
        at = partial(jax.tree.map, lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False))
        new = update(at(grads), at(now), None if key is None else jax.random.fold_in(key, i))
        return jax.tree.map(lambda x, piece: jax.lax.dynamic_update_index_in_dim(x, piece, i, 0), now, new)

    return jax.lax.fori_loop(0, jax.tree.leaves(grads)[0].shape[0], one, now)


def _rows_in_turn(update: Callable, grads: Any, now: Any, key: Array | None) -> Any:
    """_piece_by_piece of a large leaf's rows on one device. What of the state has no rows (a count) is the same for all."""
    leaf = jax.tree.leaves(grads)[0]
    rows = leaf.shape[0]
    pieces = next(n for n in range(1, rows + 1) if rows % n == 0 and leaf.size // n <= PIECE)
    if sharding.is_spread():
        return update(grads, now, key)
    has_rows = lambda x: x.ndim > 0 and x.shape[0] == rows  # noqa: E731

    def cut(x):
        return (
            x.reshape(pieces, rows // pieces, *x.shape[1:]) if has_rows(x) else jnp.repeat(x[None], pieces, 0)
        )  # noqa: E731

    join = lambda x, like: x.reshape(like.shape) if has_rows(like) else x[0]  # noqa: E731
    done = _piece_by_piece(update, jax.tree.map(cut, grads), jax.tree.map(cut, now), key)
    return jax.tree.map(join, done, now)


def _after(x: Array, done: Array) -> Array:
    """x, in a form that can't be computed before `done`, which is finite. On a mesh that would move `done`: x as it is."""
    if sharding.is_spread():
        return x

    def waits(x, done):
        return jnp.where(jnp.isfinite(done.ravel()[0]), x, jnp.zeros((), x.dtype))

    return jax.lax.platform_dependent(x, done, cpu=waits, default=lambda x, done: x)


def make_optimizer(o: Optim, specs: Any, steps: int) -> tuple[Any, optax.Schedule]:
    """The chain for the trainable leaves (`specs`: their ParamSpecs, None elsewhere) and its schedule over `steps` steps."""
    stacked = jax.tree.map(lambda s: "layers" in s.axes, specs, is_leaf=is_spec)
    in_turn = o.in_turn or o.in_backward
    if in_turn:  # what is made below sees one layer
        specs = jax.tree.map(
            lambda s, layered: _one_layer(s) if layered else s, specs, stacked, is_leaf=is_spec
        )
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
    tx = in_float32(optax.chain(*parts))
    by_row = getattr(o.optimizer, "by_row", False)
    return InTurn(tx, stacked, by_row, o.in_backward) if in_turn else tx, schedule


def _one_layer(s: ParamSpec) -> ParamSpec:
    at = s.axes.index("layers")
    return replace(s, shape=(*s.shape[:at], *s.shape[at + 1 :]), axes=(*s.axes[:at], *s.axes[at + 1 :]))
