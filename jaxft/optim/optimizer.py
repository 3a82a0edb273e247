"""The Optimizer type, its settings and schedules; AdamW, Adafactor, and transformations that read parameter
axes.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft import tree
from jaxft.nn.param import ParamSpec, Specs, is_spec
from jaxft.optim.layerwise import (
    LayerParts,
    init_layerwise,
    layer_groups,
    layers_stay_finite,
    layerwise_parts,
    no_layer_parts,
    update_layerwise,
)
from jaxft.optim.transforms import apply_per_layer, clip_by_global_norm, in_float32, scale_groups
from jaxft.optim.update import StepInfo, UpdateCheck, guarded_update, standard_promotion, stays_finite
from jaxft.tree import Grads, Mask, OptState, Params


def constant_schedule(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to lr, then constant; `end` is ignored."""
    return _after_warmup(lr, warmup, optax.constant_schedule(lr))


def linear_schedule(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to lr, then linear decay to `end * lr` at the last step."""
    return _after_warmup(lr, warmup, optax.linear_schedule(lr, end * lr, _steps_after_peak(warmup, steps)))


def cosine_schedule(lr: float, end: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear warm-up to lr, then cosine decay to `end * lr` at the last step."""
    down = optax.cosine_decay_schedule(lr, _steps_after_peak(warmup, steps), alpha=end)
    return _after_warmup(lr, warmup, down)


def _after_warmup(lr: float, warmup: int, then: optax.Schedule) -> optax.Schedule:
    """`lr * (k + 1) / warmup` at steps k = 0 .. warmup - 1, so that no step has rate 0; `then` starts at the
    last of them.
    """
    if warmup < 2:
        return then
    rising = optax.linear_schedule(lr / warmup, lr, warmup - 1)
    return optax.join_schedules([rising, then], [warmup - 1])


def _steps_after_peak(warmup: int, steps: int) -> int:
    """Steps from the first with the full rate to the last."""
    return max(1, steps - max(1, warmup))


class UpdateRule(NamedTuple):
    """An optax transformation with facts about its updates and state. rowwise: the update of a row depends on
    no other row, so that a large matrix may be updated in blocks of rows. replicated: fields of its state
    that every device stores in full if their shape differs from their parameter's (factored moments, scales);
    other fields of another shape are an error on a mesh, see state_sharding.
    """

    transform: optax.GradientTransformation
    rowwise: bool = False
    replicated: tuple[str, ...] = ()


class Optimizer(NamedTuple):
    """Pure functions that turn gradients into new parameters.

    init(params) -> opt_state. check(grads, opt_state, params, info) -> whether the step and its update are
    finite. update(grads, opt_state, params, info) -> (params, opt_state), unchanged if not `info.finite`, to
    which the caller has added `check`. schedule(step) -> learning rate. name: for messages and the model
    card. layerwise: stacked layers are updated one after the other; fused_backward: inside the backward pass,
    through `parts`. replicated: see UpdateRule.
    """

    init: Callable[[Params], OptState]
    check: UpdateCheck
    update: Callable[[Grads, OptState, Params, StepInfo], tuple[Params, OptState]]
    schedule: optax.Schedule
    name: str
    parts: LayerParts
    layerwise: bool = False
    fused_backward: bool = False
    replicated: tuple[str, ...] = ()


def adamw(
    schedule: optax.Schedule,
    specs: Specs,
    weight_decay: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> UpdateRule:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with float32 moments; decay on matrices only."""
    check_adam(b1, b2, eps)
    adam = optax.scale_by_adam(b1, b2, eps)
    return UpdateRule(with_decay(adam, schedule, specs, weight_decay), rowwise=True)


def adafactor(schedule: optax.Schedule, specs: Specs, weight_decay: float) -> UpdateRule:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): factored second moments, clipped updates.

    Updates are clipped at RMS 1 per layer. The learning rate is absolute (no multiplication by the
    parameter's scale) and there is no first moment.
    """
    one_layer = optax.chain(
        optax.scale_by_factored_rms(factored=True, decay_rate=0.8, min_dim_size_to_factor=128),
        optax.clip_by_block_rms(1.0),
    )
    transform = with_decay(apply_per_layer(one_layer, specs), schedule, specs, weight_decay)
    return UpdateRule(transform, replicated=("v_row", "v_col", "v"))


@dataclass(frozen=True)
class Optim:
    """Optimizer settings.

    optimizer: `(schedule, specs, weight_decay, **hyper) -> UpdateRule | optax.GradientTransformation`, with
    its hyper-parameters as keyword arguments: adamw, adafactor, those of low_precision, your own, or
    `partial(adamw, b1=0.8)`; or an optimizer of optax, such as `optax:lion`. b1, b2, eps: passed to an
    optimizer that has them; None for its default.
    schedule: constant_schedule, linear_schedule, cosine_schedule or your own. warmup: fraction of the steps
    with a rising learning rate. end: the schedule's last value as a fraction of lr. clip: largest global
    gradient norm, None for no clipping. lr_groups: (path pattern, factor) pairs; a leaf's updates are
    multiplied by the factor of the first pattern that matches it (LoRA+: `(("adapter/.*/b", 16.0),)`).
    layerwise: update stacked layers one after the other, so that only one layer's updates are in memory;
    results are the same, except for the random bits of stochastic rounding. fused_backward: do so inside the
    backward pass, so that only one layer's gradient is in memory. It needs one microbatch per step and
    clip=none, since the global norm is known only at the end; if a gradient or an update is not finite, the
    layers above it have been updated already.
    """

    lr: float = 2e-4
    optimizer: Callable[..., UpdateRule | optax.GradientTransformation] = adamw
    schedule: Callable[..., optax.Schedule] = cosine_schedule
    warmup: float = 0.05
    end: float = 0.1
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    clip: float | None = 1.0
    lr_groups: tuple[tuple[str, float], ...] = ()
    layerwise: bool = False
    fused_backward: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lr < 3.4e38 or 0 < self.lr < 1.2e-38:
            raise ValueError(f"optim.lr={self.lr} must be 0, or a float32 from 1.2e-38 to 3.4e38")
        check_adam(**{"b1": 0.0, "b2": 0.0, "eps": 1.0, **self.hyper})
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"optim.weight_decay={self.weight_decay} must be finite and at least 0")
        if not 0 <= self.end <= 1:
            raise ValueError(f"optim.end={self.end} is not between 0 and 1")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"optim.warmup={self.warmup} is a fraction of the steps; use 0 to 1")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(
                f"optim.clip={self.clip} is not finite and above 0; use a positive norm, or none"
            )
        for pattern, factor in self.lr_groups:
            if not 0 <= factor < float("inf"):
                raise ValueError(
                    f"optim.lr_groups has factor {factor} for {pattern!r}; it must be finite and at least 0"
                )
        if self.fused_backward and self.clip is not None:
            raise ValueError(
                "optim.fused_backward updates layers before the global gradient norm is known, and "
                f"optim.clip={self.clip} needs it; set optim.clip=none, or optim.fused_backward=false"
            )
        try:
            of_optax = takes_learning_rate(self.optimizer)
            given_first = (self.schedule,) if of_optax else (self.schedule, None, self.weight_decay)
            inspect.signature(self.optimizer).bind(*given_first, **self.hyper)
        except (TypeError, ValueError) as error:  # of bind, or a partial's arguments do not fit
            given = ", ".join(f"optim.{name}={value}" for name, value in self.hyper.items())
            raise ValueError(
                f"optim.optimizer={name_of(self.optimizer)} can't be called as (schedule, specs, weight_decay"
                f"{', **hyper' if given else ''}): {error}{f'; leave out {given}' if given else ''}"
            ) from error
        if of_optax and self.weight_decay and not decays_by_mask(self.optimizer):
            raise ValueError(
                f"optim.optimizer={name_of(self.optimizer)} has no weight decay that leaves out norms; set "
                f"optim.weight_decay=0, got {self.weight_decay}"
            )

    @property
    def hyper(self) -> dict[str, float]:
        """Hyper-parameters that override the optimizer's defaults."""
        settings = {"b1": self.b1, "b2": self.b2, "eps": self.eps}
        return {name: value for name, value in settings.items() if value is not None}


def check_adam(b1: float, b2: float, eps: float) -> None:
    """Raise ValueError for hyper-parameters of Adam that are out of range."""
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ValueError(f"optim.{name}={beta} is out of range; use 0 <= {name} < 1")
    if not 1e-37 < eps < 3.4e38:  # float32, in which the smallest numbers count as 0
        raise ValueError(f"optim.eps={eps} is not above 0 and finite in float32; use one such as 1e-8")


def name_of(fn: Callable) -> str:
    """Return a function's name, also of a partial or a callable object."""
    while isinstance(fn, partial):
        fn = fn.func
    return getattr(fn, "__name__", type(fn).__name__)


def make_optimizer(o: Optim, specs: Specs, steps: int) -> Optimizer:
    """Build the optimizer of the trainable leaves for a run of `steps` steps.

    specs: ParamSpecs of the trainable leaves, None elsewhere.
    """
    layerwise = o.layerwise or o.fused_backward
    rule_specs = jax.tree.map(_one_layer, specs, is_leaf=is_spec) if layerwise else specs
    try:
        schedule = promoting(o.schedule(o.lr, o.end, round(o.warmup * steps), steps))
    except TypeError as error:
        raise ValueError(
            f"optim.schedule={name_of(o.schedule)} does not take (lr, end, warmup, steps); "
            "use constant_schedule, linear_schedule or cosine_schedule"
        ) from error
    rule = make_rule(o, schedule, rule_specs)
    chain: list[optax.GradientTransformation] = [clip_by_global_norm(o.clip)] if o.clip is not None else []
    chain.append(rule.transform)
    if o.lr_groups:
        chain.append(scale_groups(o.lr_groups, rule_specs))
    transform, name = in_float32(optax.chain(*chain)), name_of(o.optimizer)
    if not layerwise:
        return from_optax(transform, schedule, name, rule.replicated)
    groups = layer_groups(specs, rule.rowwise)
    init, parts = partial(init_layerwise, transform, groups), layerwise_parts(transform, groups)
    check, update = partial(layers_stay_finite, parts), partial(update_layerwise, parts)
    return Optimizer(init, check, update, schedule, name, parts, True, o.fused_backward, rule.replicated)


def takes_learning_rate(optimizer: Callable) -> bool:
    """Whether a function makes an optimizer as those of optax do, `(learning_rate, ...)`."""
    return next(iter(inspect.signature(optimizer).parameters), "") == "learning_rate"


def decays_by_mask(optimizer: Callable) -> bool:
    """Whether a function of optax takes a weight decay, and a mask of the parameters that are decayed."""
    return {"weight_decay", "mask"} <= inspect.signature(optimizer).parameters.keys()


def make_rule(o: Optim, schedule: optax.Schedule, specs: Specs) -> UpdateRule:
    """Call `o.optimizer`. A function of optax gets the schedule as its learning rate, decays matrices only,
    and updates each layer as a parameter of its own.

    Raises ValueError for what is not an optimizer or cannot update parameters of these shapes.
    """
    name, of_optax = name_of(o.optimizer), takes_learning_rate(o.optimizer)
    masked = {"weight_decay": o.weight_decay, "mask": mask_of_matrices(specs)}
    arguments = (schedule,) if of_optax else (schedule, specs, o.weight_decay)
    extra = masked if of_optax and decays_by_mask(o.optimizer) else {}
    try:
        rule = o.optimizer(*arguments, **o.hyper, **extra)
    except (TypeError, AttributeError) as error:  # its parameters mean something else
        raise _unusable(name, error) from error
    if of_optax and isinstance(rule, optax.GradientTransformation):
        rule = apply_per_layer(rule, specs)
    if isinstance(rule, UpdateRule) and isinstance(rule.transform, optax.GradientTransformation):
        return rule
    if not isinstance(rule, optax.GradientTransformation):
        wrong = rule.transform if isinstance(rule, UpdateRule) else rule
        raise ValueError(
            f"optim.optimizer={name} returned a {type(wrong).__name__}, "
            "expected an optax.GradientTransformation or an UpdateRule"
        )
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs, is_leaf=is_spec)
    try:
        with standard_promotion():
            jax.eval_shape(lambda params: rule.update(params, rule.init(params), params), shapes)
    except Exception as error:  # whatever optax or the function raises on shapes that it cannot update
        raise _unusable(name, error) from error
    return UpdateRule(rule)


def _unusable(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"optim.optimizer={name} cannot update these parameters from their gradients alone ({reason}); "
        "use adamw, adafactor, or a function (schedule, specs, weight_decay) of your own"
    )


def from_optax(
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
    name: str,
    replicated: tuple[str, ...] = (),
) -> Optimizer:
    """Make an Optimizer that applies an optax transformation to all trainable leaves at once."""
    check, update = partial(stays_finite, transform), partial(guarded_update, transform)
    parts = no_layer_parts(update, check)
    return Optimizer(transform.init, check, update, schedule, name, parts, replicated=replicated)


def promoting(schedule: optax.Schedule) -> optax.Schedule:
    """Evaluate an optax schedule with standard dtype promotion, even if JAX is set to strict promotion."""

    def learning_rate(step: Array) -> Array:
        with standard_promotion():
            return schedule(step)

    return learning_rate


def _one_layer(s: ParamSpec) -> ParamSpec:
    """Return the spec of one layer of a stacked parameter."""
    if "layers" not in s.axes:
        return s
    i = s.axes.index("layers")
    return replace(s, shape=(*s.shape[:i], *s.shape[i + 1 :]), axes=(*s.axes[:i], *s.axes[i + 1 :]))


def decay_mask(specs: Specs) -> Mask:
    """Return True for matrices (two axes, not counting stacked layers). Norms and scalars are not decayed."""
    return jax.tree.map(lambda s: len(s.axes) - ("layers" in s.axes) >= 2, specs, is_leaf=is_spec)


def mask_of_matrices(specs: Specs) -> Callable[[Params], Any]:
    """Return a function from parameters, None at some leaves, to their decay mask."""
    decayed = tree.paths(decay_mask(specs))
    return lambda params: tree.map_with_path(lambda path, _: decayed[path], params)


def with_decay(
    direction: optax.GradientTransformation, schedule: optax.Schedule, specs: Specs, weight_decay: float
) -> optax.GradientTransformation:
    """Chain a direction, decoupled weight decay of matrices, and the negative learning rate."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask_of_matrices(specs)),
        optax.scale_by_learning_rate(schedule),
    )
