"""The Optimizer type, its settings, how an optimizer is built from them, and the shardings of its state.

skip_spikes and freezable wrap an optimizer so that some steps leave parameters unchanged: all of them at a
spike of the loss, or the policy's while heads, such as a critic, are updated.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from optax.tree_utils import tree_map_params

from jaxft.annotations import (
    BELOW_ONE,
    INSIDE_ZERO_AND_ONE,
    OPTIMIZERS,
    POSITIVE_FLOAT32,
    SCHEDULES,
    ZERO_TO_ONE,
    Bounds,
    NonNegativeFloat,
    PositiveFloat,
    ShortNames,
    above,
    at_least,
    check_bounds,
    count_from,
    name_of,
)
from jaxft.distributed import sharding
from jaxft.nn import tree
from jaxft.nn.param_spec import ParamSpec, Specs, is_spec, kernel, lead_axes, lead_shape, spec_paths
from jaxft.nn.tree import Grads, OptState, Params
from jaxft.optim.layerwise import (
    LayerParts,
    init_layerwise,
    layer_groups,
    layers_stay_finite,
    layerwise_parts,
    no_layer_parts,
    update_layerwise,
)
from jaxft.optim.rules import (
    Averaging,
    UpdateRule,
    adamw,
    apply_per_layer,
    clip_by_global_norm,
    ema,
    in_float32,
    mask_of_matrices,
    scale_groups,
)
from jaxft.optim.schedules import constant_schedule, cosine_schedule, promoting
from jaxft.optim.update import (
    StepInfo,
    UpdateCheck,
    Updated,
    guarded_update,
    is_updated,
    standard_promotion,
    stays_finite,
)


class Optimizer(NamedTuple):
    """Pure functions that turn gradients into new parameters.

    init(params) -> opt_state. check(grads, opt_state, params, info) -> whether the step and its update are
    finite; store the result in info.finite. update(grads, opt_state, params, info) -> (params, opt_state),
    unchanged if info.finite is False. schedule(step) -> learning rate. name: for messages and the model card.
    layerwise: stacked layers are updated one after the other; fused_backward: inside the backward pass, by
    `parts`. replicated: see UpdateRule. averaged(opt_state, params) -> the averaged parameters, which are
    evaluated and exported in place of params; None without averaging.
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
    averaged: Callable[[OptState, Params], Params] | None = None


LORA_B = tree.regex("(.*/)?adapter/.*/b", "optim.lora_plus")
IN_ADAPTER = tree.regex("(.*/)?adapter/.*", "optim.lora_plus")
EMBEDDING_PAIR = tree.regex("(.*/)?adapter/embed/[ab]", "optim.lora_plus")
EMBEDDING_LR = 1e-6  # of pairs on the embedding table with LoRA+, PEFT's loraplus_lr_embedding
MakeRule = Annotated[Callable[..., UpdateRule | optax.GradientTransformation], ShortNames.of(OPTIMIZERS)]
MakeSchedule = Annotated[Callable[..., optax.Schedule], ShortNames.of(SCHEDULES)]


@dataclass(frozen=True)
class Optim:
    """Optimizer settings.

    lr: the highest learning rate, after the warmup. optimizer: a function of rules.py or low_precision.py,
    one of optax such as `optax:lamb`, or your own. It is called as `(schedule, specs, weight_decay, **hyper)
    -> UpdateRule | optax.GradientTransformation` with its hyper-parameters as keyword arguments. b1: decay of
    the average of gradients; none for the optimizer's default, 0.9 of AdamW and Lion. b2: decay of the
    average of squared gradients; none for the optimizer's default, 0.999 of AdamW and 0.99 of Lion. eps:
    added to the root of the average square; none for the optimizer's default, 1e-8 of AdamW. weight_decay:
    decoupled, of matrices only, the embedding table included (see rules.decay_mask). optimizer_kwargs:
    further arguments of the optimizer, pairs of a name and a value. schedule: one of schedules.py or your
    own. schedule_kwargs: the schedule's options, such as decay:0.1. warmup: number of steps with a rising
    learning rate, or below 1 their fraction of all steps. end: the schedule's last value as a fraction of lr.
    clip: largest global gradient norm, none for no clipping. lr_groups: (path pattern, factor) pairs; a
    leaf's updates are multiplied by the factor of the first pattern that matches its path. lora_plus:
    learning rate of the LoRA matrices b, as a multiple of the learning rate of a (LoRA+, Hayou et al. 2024,
    arXiv:2402.12354; 16 in the paper); patterns of lr_groups take precedence. As in PEFT, it also applies to
    an adapter's vectors (DoRA's magnitudes, norms, biases), and a pair on the embedding table has the
    learning rate 1e-6. ema: decay of a moving average of the trained weights, which is evaluated and exported
    in their place. skip_spikes: (D, N) skips a step whose loss or gradient norm is more than D standard
    deviations above the mean of the N steps before it, see skip_spikes. layerwise: update stacked layers one
    after the other, so that only one layer's updates are in memory; results are the same, except for the
    random bits of stochastic rounding. fused_backward: update layers inside the backward pass, so that only
    one layer's gradient is in memory. It needs one microbatch per step and clip=none, since the global norm
    is known only at the end. If the gradient of a layer is not finite, later layers are already updated.
    """

    lr: Annotated[float, Bounds(1.2e-38, 3.4e38, also=0)] = 2e-4  # float32
    optimizer: MakeRule = adamw
    schedule: MakeSchedule = cosine_schedule
    warmup: Annotated[float, at_least(0)] = 0.05
    end: Annotated[float, ZERO_TO_ONE] = 0.1
    b1: Annotated[float | None, BELOW_ONE] = None
    b2: Annotated[float | None, BELOW_ONE] = None
    eps: Annotated[float | None, POSITIVE_FLOAT32] = None
    weight_decay: Annotated[float, at_least(0)] = 0.0
    clip: Annotated[float | None, above(0)] = 1.0
    lr_groups: tuple[tuple[str, NonNegativeFloat], ...] = ()
    lora_plus: Annotated[float | None, above(0)] = None
    ema: Annotated[float | None, INSIDE_ZERO_AND_ONE] = None
    skip_spikes: tuple[PositiveFloat, Annotated[int, count_from(4)]] | None = None
    optimizer_kwargs: tuple[tuple[str, float | None], ...] = ()
    schedule_kwargs: tuple[tuple[str, float], ...] = ()
    layerwise: bool = False
    fused_backward: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "optim")
        if self.warmup >= 1 and not (self.warmup < 2**31 and self.warmup == int(self.warmup)):
            raise ValueError(
                f"optim.warmup={self.warmup}: use a fraction of the steps, from 0 to below 1, or a whole "
                "number of steps"
            )
        spikes = None if self.skip_spikes is None else ",".join(map(str, self.skip_spikes))
        for name, value in {"clip": self.clip, "skip_spikes": spikes}.items():
            if self.fused_backward and value is not None:
                raise ValueError(
                    "optim.fused_backward updates layers before the global gradient norm is known, and "
                    f"optim.{name}={value} needs it; set optim.{name}=none, or optim.fused_backward=false"
                )
        _check_optimizer(self)

    @property
    def _adam(self) -> dict[str, float]:
        return {k: x for k, x in (("b1", self.b1), ("b2", self.b2), ("eps", self.eps)) if x is not None}

    @property
    def hyper(self) -> dict[str, float | None]:
        """The optimizer's keyword arguments: b1, b2 and eps if they are set, and optimizer_kwargs."""
        return {**self._adam, **dict(self.optimizer_kwargs)}


def _check_optimizer(o: Optim) -> None:
    """Raise ValueError if the optimizer does not accept its hyper-parameters or the weight decay."""
    twice = [name for name, _ in o.optimizer_kwargs if name in o._adam]
    if twice:
        both = f"optim.{twice[0]} and optim.optimizer_kwargs both set {twice[0]}; remove one of them"
        raise ValueError(both)
    of_optax = False
    try:
        of_optax = takes_learning_rate(o.optimizer)
        first = (o.schedule,) if of_optax else (o.schedule, None, o.weight_decay)
        inspect.signature(o.optimizer).bind(*first, **o.hyper)
    except (TypeError, ValueError) as error:  # of bind, or a partial's arguments do not fit
        given = [f"optim.{name}={value}" for name, value in o._adam.items()]
        given += [f"optim.optimizer_kwargs={name}:{value}" for name, value in o.optimizer_kwargs]
        several = "those that it does not accept: " if len(given) > 1 else ""
        raise ValueError(
            f"optim.optimizer={name_of(o.optimizer)} can't be called as "
            f"(schedule{'' if of_optax else ', specs, weight_decay'}{', **hyper' if given else ''}): {error}"
            f"{'; leave out ' if given else ''}{several}{', '.join(given)}"
        ) from error
    if of_optax and o.weight_decay and not decays_by_mask(o.optimizer):
        raise ValueError(
            f"optim.optimizer={name_of(o.optimizer)} has no `mask` to exempt norms from weight decay; set "
            f"optim.weight_decay=0, got {o.weight_decay}"
        )


def make_optimizer(o: Optim, specs: Specs, steps: int, all_specs: Specs | None = None) -> Optimizer:
    """Build the optimizer of the trainable leaves for a run of `steps` steps.

    specs: ParamSpecs of the trainable leaves, None elsewhere. all_specs: if `specs` has only some of the
    trainable leaves (see freezable), the specs of all, among which each pattern of lr_groups must match one.

    >>> from jaxft.nn.param_spec import full
    >>> specs = {"w": ParamSpec((2, 3), ("width", "mlp"), full(1.0))}
    >>> optimizer = make_optimizer(Optim(lr=0.1, clip=None, weight_decay=0.0), specs, steps=10)
    >>> params = {"w": jnp.ones((2, 3))}
    >>> info = StepInfo(norm=jnp.asarray(1.0), finite=jnp.asarray(True))
    >>> moved, _ = optimizer.update({"w": jnp.ones((2, 3))}, optimizer.init(params), params, info)
    >>> round(float(moved["w"][0, 0]), 3)
    0.9
    """
    layerwise = o.layerwise or o.fused_backward
    rule_specs = jax.tree.map(_one_layer, specs, is_leaf=is_spec) if layerwise else specs
    schedule = make_schedule(o, steps)
    rule, name = make_rule(o, schedule, rule_specs), name_of(o.optimizer)
    moves = rule.transform
    rates = rate_groups(o, rule_specs)
    if rates:
        moves = optax.chain(moves, scale_groups(rates, specs if all_specs is None else all_specs))
    averaging = _averaging(o, rule)
    if averaging is not None:
        moves = averaging.wrap(moves)
    clipping = [] if o.clip is None else [clip_by_global_norm(o.clip)]
    transform = in_float32(optax.chain(*clipping, moves))
    averaged = None if averaging is None else averaging.averaged
    if not layerwise:
        return from_optax(transform, schedule, name, rule.replicated)._replace(averaged=averaged)
    groups = layer_groups(specs, rule.rowwise)
    init, parts = partial(init_layerwise, transform, groups), layerwise_parts(transform, groups)
    check, update = partial(layers_stay_finite, parts), partial(update_layerwise, parts)
    made = Optimizer(init, check, update, schedule, name, parts, True, o.fused_backward, rule.replicated)
    return made._replace(averaged=averaged)


def make_schedule(o: Optim, steps: int) -> optax.Schedule:
    """Build the schedule of a run of `steps` steps. Raises ValueError if it does not accept its arguments."""
    warmup = round(o.warmup * steps) if o.warmup < 1 else int(o.warmup)
    arguments = (o.lr, o.end, warmup, steps)
    try:
        return promoting(o.schedule(*arguments, **dict(o.schedule_kwargs)))
    except TypeError as error:
        given = "".join(f", {name}" for name, _ in o.schedule_kwargs)
        raise ValueError(
            f"optim.schedule={name_of(o.schedule)} does not take (lr, end, warmup, steps{given}); "
            f"use {', '.join(SCHEDULES)}{', and change optim.schedule_kwargs' if given else ''}"
        ) from error


def rate_groups(o: Optim, specs: Specs) -> tuple[tuple[str, float], ...]:
    """Return (path pattern, factor) pairs for scale_groups: o.lr_groups, then the groups of o.lora_plus, if
    it is set and `specs` has LoRA matrices b.
    """
    paths = spec_paths(specs)
    if o.lora_plus is None or not any(map(LORA_B.fullmatch, paths)):
        return o.lr_groups
    embedding = [path for path in paths if EMBEDDING_PAIR.fullmatch(path)]
    adapter = {p: spec for p, spec in paths.items() if IN_ADAPTER.fullmatch(p) and p not in embedding}
    faster = [path for path, spec in adapter.items() if LORA_B.fullmatch(path) or kernel(spec) is None]
    plain = EMBEDDING_LR / o.lr if o.lr else 1.0
    groups = ("|".join(map(re.escape, embedding)), plain), ("|".join(map(re.escape, faster)), o.lora_plus)
    return (*o.lr_groups, *(group for group in groups if group[0]))


def _averaging(o: Optim, rule: UpdateRule) -> Averaging | None:
    """Return the weight averaging of optim.ema or of a schedule-free optimizer (`rule`); None without either.

    Raises ValueError if a schedule-free optimizer is used with optim.ema, or with another schedule than
    constant.
    """
    if rule.averaging is None:
        return None if o.ema is None else ema(o.ema)
    name = f"optim.optimizer={name_of(o.optimizer)}"
    if o.ema is not None:
        raise ValueError(f"{name} already averages the weights; set optim.ema=none, got {o.ema}")
    if o.schedule is not constant_schedule:
        raise ValueError(
            f"{name} averages instead of lowering the learning rate; set optim.schedule=constant, got "
            f"{name_of(o.schedule)}"
        )
    return rule.averaging


def takes_learning_rate(optimizer: Callable) -> bool:
    """Return whether a function has the signature of optax's optimizers, `(learning_rate, ...)`."""
    return next(iter(inspect.signature(optimizer).parameters), "") == "learning_rate"


def decays_by_mask(optimizer: Callable) -> bool:
    """Return whether an optax optimizer has the arguments `weight_decay` and `mask` (which leaves decay)."""
    return {"weight_decay", "mask"} <= inspect.signature(optimizer).parameters.keys()


def make_rule(o: Optim, schedule: optax.Schedule, specs: Specs) -> UpdateRule:
    """Call `o.optimizer` and return its UpdateRule. An optax optimizer gets the schedule as its learning
    rate, decays matrices only, and updates each layer as a separate parameter.

    Raises ValueError if the function is not an optimizer or cannot update parameters of these shapes.
    """
    name, of_optax = name_of(o.optimizer), takes_learning_rate(o.optimizer)
    masked: dict[str, object] = {"weight_decay": o.weight_decay, "mask": mask_of_matrices(specs)}
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
        wrong, expected = f"a {type(rule).__name__}", "an optax.GradientTransformation or an UpdateRule"
        if isinstance(rule, UpdateRule):
            wrong = f"an UpdateRule whose transform is a {type(rule.transform).__name__}"
            expected = "an optax.GradientTransformation as its transform"
        raise ValueError(f"optim.optimizer={name} returned {wrong}, expected {expected}")
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
    """Make an Optimizer that applies an optax transformation to all trainable leaves at once.

    name: for messages. replicated: names of fields of its state that every device stores in full, see
    UpdateRule.
    """
    check, update = partial(stays_finite, transform), partial(guarded_update, transform)
    parts = no_layer_parts(update, check)
    return Optimizer(transform.init, check, update, schedule, name, parts, replicated=replicated)


def _one_layer(s: ParamSpec) -> ParamSpec:
    """Return the spec of one layer of a parameter with a layers axis; another spec unchanged."""
    return replace(s, shape=s.shape[1:], axes=s.axes[1:]) if "layers" in lead_axes(s) else s


@dataclass(frozen=True)
class _Array:
    """Path and shape of an array in an optimizer state, as a leaf for tree_map_params."""

    path: str
    shape: tuple[int, ...]


def state_shardings(
    optimizer: Optimizer, opt_state: OptState, params: Params, specs: Specs, mesh: jax.sharding.Mesh
) -> OptState:
    """Return a tree of shardings like `opt_state`.

    opt_state, params: trees of ShapeDtypeStructs, with shardings in params. specs: of the parameters.

    A state array with its parameter's shape has the parameter's sharding. Arrays in fields that the optimizer
    declares as `replicated`, and counts (scalars, or one per layer of a stack) are stored in full on every
    device. Raises ValueError for any other array, since a full copy on every device would cost memory.
    """
    everywhere = sharding.replicated(mesh)
    leads = {(), *map(lead_shape, spec_paths(specs).values())}

    def of_parameter(x: _Array, param: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        if x.shape == param.shape:
            return param.sharding
        return of_other(x, f"differs from its parameter's {list(param.shape)}")

    def of_other(x: _Array, problem: str = "belongs to no parameter") -> jax.sharding.Sharding:
        if mesh.size == 1 or not set(x.path.split("/")).isdisjoint(optimizer.replicated):
            return everywhere
        raise ValueError(
            f"optim.optimizer={optimizer.name}: its state {x.path} of shape {list(x.shape)} {problem}, so no "
            "sharding can be derived for it. Return UpdateRule(transform, replicated=(FIELD_NAME,)) to "
            "store it in full on every device."
        )

    def of_copy(copy: Any, params: Params) -> Any:
        """Return the shardings of a state tree with one node per parameter: None, or one or more arrays."""
        return jax.tree.map(
            lambda param, part: jax.tree.map(lambda x: of_parameter(x, param), part), params, copy
        )

    def of_rest(x: _Array) -> jax.sharding.Sharding:
        return everywhere if x.shape in leads else of_other(x)

    arrays = tree.map_with_path(lambda path, x: _Array(path, x.shape), opt_state)
    return tree_map_params(
        optimizer.init, of_copy, arrays, params, transform_non_params=of_rest, is_leaf=lambda _: True
    )


# ---- steps that leave parameters unchanged


POLICY = ("adapter", "base")  # top-level names of the policy's own parameters; the others are heads


class FreezableState(NamedTuple):
    """State of freezable: optimizer states of the policy and of the heads (None without heads), and the
    number of updates of the policy.
    """

    policy: OptState
    heads: OptState
    policy_updates: Int[Array, ""]


def freezable(make: Callable[[Specs], Optimizer], specs: Specs) -> Optimizer:
    """Build an optimizer with separate states for the policy and for the heads, such as a critic's.

    A step with `info.frozen` updates only the heads: the policy's parameters and optimizer state, counts
    included, are unchanged. Gradients are clipped by their global norm over policy and heads. make(specs)
    builds the optimizer of the leaves with a spec. specs: of all trainable leaves, {top-level name: tree}.
    """
    policy_specs, head_specs = _split(specs)
    policy = make(policy_specs)
    heads = make(head_specs) if jax.tree.leaves(head_specs, is_leaf=is_spec) else None

    def init(params: Params) -> FreezableState:
        is_tree = isinstance(params, dict)  # optax.tree.map_params passes one node in place of all parameters
        policy_params, head_params = _split(params) if is_tree else (params, params)
        head_state = None if heads is None else heads.init(head_params)
        return FreezableState(policy.init(policy_params), head_state, jnp.zeros((), jnp.int32))

    def check(grads: Grads, opt_state: FreezableState, params: Params, info: StepInfo) -> Bool[Array, ""]:
        (policy_grads, head_grads), (policy_params, head_params) = _split(grads), _split(params)
        fine = policy.check(policy_grads, opt_state.policy, policy_params, info)
        if heads is not None:
            fine &= heads.check(head_grads, opt_state.heads, head_params, info._replace(frozen=None))
        return fine

    def update(grads: Grads, opt_state: FreezableState, params: Params, info: StepInfo) -> Updated:
        (policy_grads, head_grads), (policy_params, head_params) = _split(grads), _split(params)
        moves, info = is_updated(info), info._replace(frozen=None)
        of_policy = info._replace(finite=moves)
        policy_params, policy_state = policy.update(policy_grads, opt_state.policy, policy_params, of_policy)
        head_state = opt_state.heads
        if heads is not None:
            head_params, head_state = heads.update(head_grads, head_state, head_params, info)
        updates = opt_state.policy_updates + moves.astype(jnp.int32)
        joined = {name: policy_params[name] if name in POLICY else head_params[name] for name in params}
        return joined, FreezableState(policy_state, head_state, updates)

    return policy._replace(init=init, check=check, update=update)


def _split(params: Params) -> tuple[Params, Params]:
    """Split a tree by top-level name: (policy, heads), each with None for the leaves of the other."""

    def without(x: Any) -> Any:
        return jax.tree.map(lambda _: None, x)

    return (
        {name: x if name in POLICY else without(x) for name, x in params.items()},
        {name: without(x) if name in POLICY else x for name, x in params.items()},
    )


BUFFERS = ("losses", "norms")  # fields that every device stores in full


class SpikeState(NamedTuple):
    """State of skip_spikes. wrapped: the wrapped optimizer's state. losses, norms: losses and gradient norms
    of the last N finite steps. finite, skipped: number of finite steps, and of steps skipped as spikes.
    """

    wrapped: OptState
    losses: Float[Array, " N"]
    norms: Float[Array, " N"]
    finite: Int[Array, ""]
    skipped: Int[Array, ""]


def skip_spikes(optimizer: Optimizer, deviations: float, steps: int) -> Optimizer:
    """Wrap an optimizer so that a step that is a spike changes nothing.

    A step is a spike if its loss or its gradient norm is more than `deviations` standard deviations above the
    mean of the `steps` finite steps before it. That mean includes earlier spikes, so that after a lasting
    change steps are soon taken again. The first steps // 2 finite steps are never spikes (as in OLMo-core's
    SkipStepOptimizer). A spike advances neither the learning rate nor the optimizer's count of updates.
    """

    def init(params: Params) -> SpikeState:
        zero, empty = jnp.zeros((), jnp.int32), jnp.zeros(steps, jnp.float32)
        return SpikeState(optimizer.init(params), empty, jnp.copy(empty), zero, jnp.copy(zero))

    def check(grads: Grads, opt_state: SpikeState, params: Params, info: StepInfo) -> Bool[Array, ""]:
        return optimizer.check(grads, opt_state.wrapped, params, info)

    def update(grads: Grads, opt_state: SpikeState, params: Params, info: StepInfo) -> Updated:
        pairs = list(zip(_of_step(info), (opt_state.losses, opt_state.norms), strict=True))
        of_loss, of_norm = (_is_above(x, past, opt_state.finite, deviations) for x, past in pairs)
        spike = info.finite & (of_loss | of_norm)
        moves = info._replace(finite=info.finite & ~spike)
        params, wrapped = optimizer.update(grads, opt_state.wrapped, params, moves)
        at = opt_state.finite % steps
        losses, norms = (jnp.where(info.finite, past.at[at].set(x), past) for x, past in pairs)
        count = opt_state.finite + info.finite.astype(jnp.int32)
        skipped = opt_state.skipped + spike.astype(jnp.int32)
        return params, SpikeState(wrapped, losses, norms, count, skipped)

    replicated = (*optimizer.replicated, *BUFFERS)
    return optimizer._replace(init=init, check=check, update=update, replicated=replicated)


def _of_step(info: StepInfo) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the loss and the gradient norm of a step in float32. Raises ValueError if info.loss is None."""
    if info.loss is None:
        problem = "optim.skip_spikes needs the step's loss, but StepInfo.loss is None; pass the loss there"
        raise ValueError(problem)
    return info.loss.astype(jnp.float32), info.norm.astype(jnp.float32)


def _is_above(
    x: Float[Array, ""], past: Float[Array, " N"], count: Int[Array, ""], deviations: float
) -> Bool[Array, ""]:
    """Return whether x is more than `deviations` sample standard deviations above the mean of past values.

    count: how many finite steps there were; only min(count, N) of the past values are set.
    """
    size = past.shape[0]
    used = jnp.minimum(count, size)
    is_known = jnp.arange(size, dtype=used.dtype) < used
    n = jnp.maximum(used, 2).astype(jnp.float32)
    mean = jnp.sum(jnp.where(is_known, past, 0.0)) / n
    variance = jnp.sum(jnp.where(is_known, jax.lax.square(past - mean), 0.0)) / (n - 1)
    return (used >= size // 2) & (x - mean > deviations * jnp.sqrt(variance))
