"""Update rules (AdamW, schedule-free AdamW, Adafactor, Muon), averages of weights, transformations."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxft.nn import tree
from jaxft.nn.param_spec import ParamSpec, Specs, is_spec, kernel, lead_axes, spec_paths
from jaxft.nn.tree import Mask, OptState, Params
from jaxft.optim.update import to_float32


class Averaging(NamedTuple):
    """An average of the weights that an optimizer maintains.

    wrap(transform) -> a transformation with the same updates that also maintains the average (schedule-free
    averaging changes the updates too). averaged(opt_state, params) -> the average, with the structure and
    dtypes of params.
    """

    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    averaged: Callable[[OptState, Params], Params]


class UpdateRule(NamedTuple):
    """An optax transformation with facts about its updates and state.

    rowwise: the update of a matrix's row depends on no other row, so that a large matrix may be updated in
    blocks of rows. replicated: names of fields in its state that every device stores in full, for arrays that
    do not have their parameter's shape (factored moments, scales); see optimizer.state_shardings. averaging:
    of a schedule-free optimizer; None for other optimizers.
    """

    transform: optax.GradientTransformation
    rowwise: bool = False
    replicated: tuple[str, ...] = ()
    averaging: Averaging | None = None


def adamw(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with float32 moments; weight decay of matrices only.

    >>> from jaxft.nn.param_spec import ParamSpec, full
    >>> norm = ParamSpec((2,), ("width",), full(1.0))
    >>> specs = {"kernel": ParamSpec((2, 3), ("width", "mlp"), full(0.0)), "norm": norm}
    >>> rule = adamw(optax.constant_schedule(1e-3), specs, weight_decay=0.1, b2=0.95)
    >>> rule.rowwise, decay_mask(specs)
    (True, {'kernel': True, 'norm': False})
    """
    check_adam(b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps)
    return UpdateRule(with_decay(adam, schedule, specs, weight_decay), rowwise=True)


def schedule_free_adamw(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): averaging in place of momentum and of a
    falling learning rate. The averaged weights are evaluated and exported.

    It needs optim.schedule=constant, which has a warm-up. b1: gradients are taken at (1 - b1) times the base
    optimizer's weights plus b1 times their average; above 0.
    """
    check_adam(b1, b2, eps)
    if b1 == 0:
        raise ValueError("optim.b1=0 is out of range for schedule_free_adamw; use a number such as 0.9")
    rms = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    transform = with_decay(rms, schedule, specs, weight_decay)
    return UpdateRule(transform, rowwise=True, averaging=schedule_free(b1, schedule))


def adafactor(schedule: optax.Schedule, specs: Specs, weight_decay: float) -> UpdateRule:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): factored second moments, clipped updates.

    The update of each layer is clipped to a root mean square of 1. The learning rate is absolute (not
    multiplied by the parameter's scale), and there is no first moment.
    """
    one_layer = optax.chain(
        optax.scale_by_factored_rms(factored=True, decay_rate=0.8, min_dim_size_to_factor=128),
        optax.clip_by_block_rms(1.0),
    )
    transform = with_decay(apply_per_layer(one_layer, specs), schedule, specs, weight_decay)
    return UpdateRule(transform, replicated=("v_row", "v_col", "v"))


def check_adam(b1: float, b2: float, eps: float) -> None:
    """Raise ValueError for hyper-parameters of Adam that are out of range."""
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ValueError(f"optim.{name}={beta} is out of range; use 0 <= {name} < 1")
    if not 1e-37 < eps < 3.4e38:  # float32, in which the smallest numbers count as 0
        raise ValueError(f"optim.eps must be above 0 and finite in float32, got {eps}; use for example 1e-8")


def decay_mask(specs: Specs) -> Mask:
    """Return a mask of the parameters with weight decay: matrices, the embedding table and the head included;
    no norms, biases and scalars.
    """
    return jax.tree.map(lambda s: kernel(s) is not None, specs, is_leaf=is_spec)


def mask_of_matrices(specs: Specs) -> Callable[[Params], Any]:
    """Return a function for optax's `mask`, from parameters (some may be None) to their decay_mask."""
    decayed = tree.paths(decay_mask(specs))
    return lambda params: tree.map_with_path(lambda path, _: decayed[path], params)


def with_decay(
    direction: optax.GradientTransformation, schedule: optax.Schedule, specs: Specs, weight_decay: float
) -> optax.GradientTransformation:
    """Return the update -rate * (direction + weight_decay * weights of matrices), rate = schedule(step)."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask_of_matrices(specs)),
        optax.scale_by_learning_rate(schedule),
    )


EARLY = 9  # after t steps the average spans at most about t / 9 steps


class EmaState(NamedTuple):
    """State of `ema`. updates: number of updates so far. average: the averaged weights. wrapped: the state of
    the optimizer that updates the weights.
    """

    updates: Int[Array, ""]
    average: Params
    wrapped: OptState


class ScheduleFreeState(NamedTuple):
    """State of schedule_free.

    updates: number of updates so far. total: the sum of their squared learning rates. z: the base optimizer's
    parameters. wrapped: the state of the base optimizer.
    """

    updates: Int[Array, ""]
    total: Float[Array, ""]
    z: Params
    wrapped: OptState


def ema(decay: float) -> Averaging:
    """Return the averaging `average_t = d average_(t-1) + (1 - d) weights_t`, in float32 or wider.

    It starts from the weights at step 0. d = min(decay, t / (t + 9)) is small at first, so that these weights
    do not dominate the average of a short run.
    """

    def wrap(transform: optax.GradientTransformation) -> optax.GradientTransformation:
        wrapped = optax.with_extra_args_support(transform)

        def init(params: Params) -> EmaState:
            return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), wrapped.init(params))

        def update(
            grads: Params, state: EmaState, params: Params | None = None, **extra: Any
        ) -> tuple[Params, OptState]:
            updates, inner = wrapped.update(grads, state.wrapped, params, **extra)
            count = optax.safe_increment(state.updates)

            def move(average: Array, p: Array, u: Array) -> Array:
                t = count.astype(average.dtype)
                return average + (1 - jnp.minimum(decay, t / (t + EARLY))) * (p + u - average)

            return updates, EmaState(count, jax.tree.map(move, state.average, params, updates), inner)

        return optax.GradientTransformationExtraArgs(init, update)

    def averaged(opt_state: OptState, params: Params) -> Params:
        averages = [state.average for state in _states_of(EmaState, opt_state)]
        return jax.tree.map(lambda x, p: x.astype(p.dtype), tree.combine(*averages), params)

    return Averaging(wrap, averaged)


def schedule_free(b1: float, schedule: optax.Schedule) -> Averaging:
    """Return the averaging of schedule-free learning (Defazio et al. 2024, arXiv:2405.15682, algorithm 1).

    `wrap` gets the base optimizer, which has no momentum. The trained weights are y = (1 - b1) z + b1 x: the
    base optimizer updates z with the gradient at y, and x is the average of z over the steps, weighted by
    squared learning rates.
    """

    def wrap(transform: optax.GradientTransformation) -> optax.GradientTransformation:
        wrapped = optax.with_extra_args_support(transform)

        def init(params: Params) -> ScheduleFreeState:
            zero, z = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
            return ScheduleFreeState(zero, zero.astype(jnp.float32), z, wrapped.init(params))

        def update(
            grads: Params, state: ScheduleFreeState, params: Params | None = None, **extra: Any
        ) -> tuple[Params, OptState]:
            updates, inner = wrapped.update(grads, state.wrapped, params, **extra)
            weight = jnp.square(jnp.asarray(schedule(state.updates), jnp.float32))
            total = state.total + weight
            c = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)

            def move(y: Array, z: Array, u: Array) -> Array:
                # x' = (1 - c) x + c z' and y' = (1 - b1) z' + b1 x', with x = (y - (1 - b1) z) / b1
                share = c.astype(z.dtype)
                x_b1 = y - (1 - b1) * z
                return (1 - share) * x_b1 + (b1 * share + (1 - b1)) * (z + u) - y

            moves = jax.tree.map(move, params, state.z, updates)
            z = jax.tree.map(jnp.add, state.z, updates)
            return moves, ScheduleFreeState(optax.safe_increment(state.updates), total, z, inner)

        return optax.GradientTransformationExtraArgs(init, update)

    def averaged(opt_state: OptState, params: Params) -> Params:
        z = tree.combine(*(state.z for state in _states_of(ScheduleFreeState, opt_state)))

        def average(z: Array, y: Array) -> Array:
            return ((y.astype(z.dtype) - (1 - b1) * z) / b1).astype(y.dtype)

        return jax.tree.map(average, z, params)

    return Averaging(wrap, averaged)


def _states_of(kind: type, opt_state: OptState) -> list[Any]:
    """Return all states of the type `kind` in an optimizer state.

    An optimizer that updates parameters in groups (layerwise: by layers; freezable: policy and heads) has one
    for each group, with None for the parameters of other groups.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


# Transformations that know the layers, path or dtype of a parameter


def apply_per_layer(transform: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
    """Apply a transformation separately to each layer of a stacked parameter (see param.LEAD_AXES).

    Otherwise statistics of a parameter (factored moments, root mean squares) would mix its layers.
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
            each(transform.init, lead if jax.tree.leaves(part) else (), part)
            for (lead, _), part in zip(masks, parts(params), strict=True)
        )

    def update(updates: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        updated = [
            each(transform.update, lead if jax.tree.leaves(args_of_part[0]) else (), *args_of_part)
            for (lead, _), *args_of_part in zip(masks, parts(updates), state, parts(params), strict=True)
        ]
        return tree.combine(*(new for new, _ in updated)), tuple(state for _, state in updated)

    return optax.GradientTransformation(init, update)


def stack_of(path: str) -> str:
    """Return the name of the stack that a stacked parameter is in: "layers" for base/layers/attn/q and for
    critic/adapter/layers/attn/q/a.
    """
    parts = path.split("/")
    return parts[max((i + 1 for i, part in enumerate(parts) if part in ("base", "adapter")), default=0)]


def scale_groups(groups: tuple[tuple[str, float], ...], specs: Specs) -> optax.GradientTransformation:
    """Multiply each leaf's update by the factor of the first pattern that matches its path, 1 without a
    match.

    Raises ValueError for a pattern that matches no path.
    """
    factors = jax.tree.map(lambda _: 1.0, specs, is_leaf=is_spec)
    for pattern, factor in reversed(groups):
        mask = tree.mask_by_path(factors, pattern, "optim.lr_groups")
        factors = jax.tree.map(lambda hit, old, new=factor: new if hit else old, mask, factors)
    by_path = tree.paths(factors)
    return optax.stateless(lambda updates, _: tree.map_with_path(lambda path, u: by_path[path] * u, updates))


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scale updates down to a global norm of at most `limit`. Pass `norm` to `update` if it is known."""

    def update(
        updates: Params, state: OptState, params: Params | None = None, *, norm: Array | None = None, **_: Any
    ) -> tuple[Params, OptState]:
        norm = optax.tree.norm(updates) if norm is None else norm
        factor = jnp.minimum(limit / norm, jnp.ones((), norm.dtype))
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def in_float32(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wrap a transformation so that it gets 16-bit gradients and parameters cast to float32; its state and
    updates are then float32 as well.
    """
    transform = optax.with_extra_args_support(transform)

    def update(
        updates: Params, state: OptState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, OptState]:
        params = None if params is None else to_float32(params)
        return transform.update(to_float32(updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: transform.init(to_float32(params)), update)


# ---- Muon: orthogonalised momentum for the kernels of layers, AdamW for all other parameters


QUINTIC = (3.4445, -4.7750, 2.0315)  # c of the Newton-Schulz iteration c0 x + (c1 A + c2 A^2) x, A = x x'
ITERATIONS = 5
TABLE_AXES = {"vocab", "table_width"}  # axes of embeddings, of heads, and of adapters on a head


class MuonState(NamedTuple):
    """The momentum of each matrix."""

    momentum: Params


def muon(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    momentum: float = 0.95,
    rms: float | None = 0.2,
) -> UpdateRule:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) with Nesterov momentum.

    Each layer's kernels, and the LoRA matrices on them, are updated by the semi-orthogonal matrix nearest to
    their momentum. Embeddings, heads, norms and biases are updated by AdamW with b1=0.9 and b2=0.999.

    rms: root mean square of an update's elements (Liu et al. 2025, arXiv:2502.16982). 0.2 is near AdamW's, so
    that AdamW's learning rates and weight decay can be used; it is `match_rms_adamw` of torch.optim.Muon.
    None scales by sqrt(max(1, outputs / inputs)) as the original does, for learning rates near 0.02.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"optim.optimizer_kwargs=momentum:{momentum} is out of range; use 0 <= momentum < 1")
    kinds = tree.paths(jax.tree.map(_kind, specs, is_leaf=is_spec))
    direction = optax.partition(
        {"matrix": scale_by_muon(momentum, rms), "other": optax.scale_by_adam()},
        lambda params: tree.map_with_path(lambda path, _: kinds[path], params),
    )
    return UpdateRule(with_decay(direction, schedule, specs, weight_decay))


def _kind(spec: ParamSpec) -> str:
    """Return "matrix" for parameters that Muon updates, the kernels of layers; "other" for all else."""
    return "matrix" if kernel(spec) and TABLE_AXES.isdisjoint(spec.axes) else "other"


def scale_by_muon(momentum: float, rms: float | None) -> optax.GradientTransformation:
    """Replace every gradient by Muon's update (see muon) of the matrices in the last two axes of a leaf."""

    def init(params: Params) -> OptState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def direction(mean: Array, grad: Array) -> Array:
        nesterov = momentum * mean + (1 - momentum) * grad
        inputs, outputs = grad.shape[-2:]
        scale = math.sqrt(max(1, outputs / inputs)) if rms is None else rms * math.sqrt(max(inputs, outputs))
        return scale * orthogonalized(nesterov)

    def update(grads: Params, state: MuonState, params: Params | None = None) -> tuple[Params, OptState]:
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, grads)
        return jax.tree.map(direction, mean, grads), MuonState(mean)

    return optax.GradientTransformation(init, update)


def orthogonalized(x: Float[Array, "*batch I O"]) -> Float[Array, "*batch I O"]:
    """Return approximately the nearest semi-orthogonal matrix of each matrix: `u v'` of its SVD `x = u s v'`.

    Five quintic Newton-Schulz iterations bring the singular values to between 0.7 and 1.2; a matrix of zeros
    stays zero.

    >>> x = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    >>> bool(jnp.all(jnp.abs(jnp.diag(orthogonalized(x)) - 1) < 0.35))
    True
    """
    if x.shape[-2] > x.shape[-1]:
        return jnp.swapaxes(orthogonalized(jnp.swapaxes(x, -1, -2)), -1, -2)
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)), 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = QUINTIC[0] * x + (QUINTIC[1] * gram + QUINTIC[2] * (gram @ gram)) @ x
    return x
