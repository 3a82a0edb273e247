"""The objective around a policy loss: the policy's part, a KL penalty, an entropy bonus and the critic's part, and the metrics.

`policy(model, partial(clipped, eps_high=0.28))` is linear in the batch's policy weights and in its value weights. PPO and the
GRPO family are this objective with losses of policy_losses.py, and advantages and weights of advantages.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.batch import Rollout, without_fields
from jaxft.objectives.alarms import watch_rollouts
from jaxft.objectives.kl import AdaptiveKL, FixedKL, KLInReward, Penalty, k3
from jaxft.objectives.logprobs import Graded, LanguageModel
from jaxft.objectives.metrics import Correlation, Max, Min, Sum
from jaxft.objectives.numerics import require
from jaxft.objectives.objective import Facts, Objective, Report, Scores
from jaxft.objectives.policy_losses import Drawn, PolicyLoss
from jaxft.objectives.preference import reference_params
from jaxft.objectives.read_positions import read_logps, read_numbers
from jaxft.objectives.sft import sft
from jaxft.tree import Aux, Metrics, Params, struct

Values = Callable[[Any, Rollout, Array], Array]
UNUSED = ("ids", "segments", "positions", "read", "targets", "branches")  # by a loss
KEPT = (AdaptiveKL, KLInReward)  # penalties whose coefficient is in aux


@dataclass(frozen=True)
class Critic:
    """A value function that is trained beside the policy: `coef` times its loss is added.

    values(params, batch, h [B, T, D] of the policy) -> what is to come at each read position [B, M]; see critic(). clip: how far
    from the values at drawing they are trusted, None for any distance.
    """

    values: Values
    coef: float = 0.1
    clip: float | None = 0.2

    def __post_init__(self) -> None:
        require(self.coef > 0, f"a critic's coef is above 0, found {self.coef}; leave the critic out instead")
        require(self.clip is None or self.clip > 0, f"a critic's clip is above 0 or none, found {self.clip}")


def critic(hidden: Callable[[Any, Rollout, Array], Array], head: Callable[[Any, Array], Array]) -> Values:
    """Values of `head(params, h [N, m, D]) -> [N, m]` over hidden states `hidden(params, batch, h [B, T, D] of the policy)`.

    hidden may be a second pass with another adapter, or give the policy's own states back.
    """
    return lambda params, batch, h: read_numbers(
        partial(head, params), hidden(params, batch, h), batch.read, batch.lengths.shape[1]
    )


@struct
class Outputs:
    """The forward passes of a batch, [B, M]. logp and values have a gradient, entropy where it has a coefficient.

    batch: the completions without their tokens.
    """

    logp: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    values: Float[Array, "B M"] | None
    batch: Rollout


def policy(
    model: LanguageModel,
    loss: PolicyLoss,
    beta: float | Penalty = 0.0,
    entropy: float = 0.0,
    temperature: float = 1.0,
    value: Critic | Values | None = None,
) -> Objective:
    """`sum_t w_t (loss_t + beta KL_t - entropy H_t) + coef sum_t v_t L_t` with the batch's policy weights w and value weights v.

    loss: one of policy_losses.py's or your own. beta: 0 is no penalty and no reference, another number FixedKL(beta). A penalty
    needs the reference's log-probs in the batch; KLInReward(...) is for a run whose rewards contain the KL. Its coefficient, like
    that of AdaptiveKL, is aux["kl_coef"]. entropy: the coefficient of a bonus, 0 for none. temperature: the sampling temperature
    of the completions: logits are divided by it, of the policy and of the reference. value: the critic, None for none.

    Metrics have the names of TRL's GRPO, and those of TRL's PPO where GRPO has none. A logged loss is divided by the sum of its
    weights, which changes nothing where that is 1.
    """
    require(entropy >= 0, f"the coefficient of an entropy bonus is at least 0, got {entropy}")
    require(0 < temperature < float("inf"), f"the sampling temperature is above 0, got {temperature}")
    penalty = (FixedKL(beta) if beta else None) if isinstance(beta, int | float) else beta
    critic_ = Critic(value) if value is not None and not isinstance(value, Critic) else value
    tempered = at_temperature(model, temperature)
    graded: Graded = ("logp", "entropy") if entropy else ("logp",)

    def forward(params: Params, batch: Rollout, key: Array | None, aux: Aux) -> Outputs:
        # Without dropout, so that log-probs are comparable with the sampling policy's (TRL's disable_dropout).
        h = model.hidden(params, batch, None)
        lp = read_logps(tempered, params, h, batch.read, batch.targets, graded, batch.lengths.shape[1])
        values = None if critic_ is None else critic_.values(params, batch, h).astype(lp.logp.dtype)
        return Outputs(lp.logp, lp.entropy, values, without_fields(batch, UNUSED))

    def objective_loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        value, metrics = _policy_part(loss, penalty, entropy, outputs, aux)
        if critic_ is not None:  # PPO, whose names in TRL are others
            metrics |= {
                "policy/clipfrac_avg": metrics["clip_ratio/region_mean"],
                "policy/entropy_avg": metrics["entropy"],
            }
            cost, value_metrics = _value_part(critic_, outputs)
            value = value + critic_.coef * cost
            metrics |= value_metrics | {"loss": Sum(value, value_metrics["loss/value_avg"].weight)}
        return value, jax.lax.stop_gradient(metrics)

    def score(params: Params, batch: Rollout, aux: Aux) -> Scores:
        reference = None if penalty is None else _logps(tempered, reference_params(params, aux), batch)
        outputs = forward(
            params, batch, None, aux
        )  # a critic on the policy's hidden states needs no pass of its own
        return Scores(outputs.logp, reference, outputs.values)

    def batch_spec(batch: Rollout) -> Rollout:
        x = batch.logps
        batch = batch if penalty is None else replace(batch, reference=x)
        return batch if critic_ is None else replace(batch, values=x, returns=x, value_weights=x)

    def init(trainable: Params, at_base: bool) -> Aux:
        return _init(penalty, trainable, at_base)

    def update(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
        return _updated(penalty, aux, metrics)

    facts = Facts(
        reference="none" if penalty is None else "start",
        dropout=False,
        temperature=temperature,
        kl_in_rewards=isinstance(penalty, KLInReward),
        critic=critic_ is not None,
        freezes_policy=True,
    )
    return Objective(
        forward,
        objective_loss,
        init,
        update,
        score,
        _no_policy_weight,
        batch_spec,
        sft(model),
        None,
        facts,
        Report(watch_rollouts),
    )


def _no_policy_weight(batch: Rollout) -> Array:
    """Whether no completion of the batch has a policy weight, so that only a critic is trained."""
    return jnp.all(batch.policy_weights == 0)


def at_temperature(model: LanguageModel, temperature: float) -> LanguageModel:
    """The model with its logits divided by the temperature."""
    if temperature == 1:
        return model
    return replace(model, logits=lambda head, h: model.logits(head, h) / temperature)


def _logps(model: LanguageModel, params: Params, batch: Rollout) -> Array:
    h = model.hidden(params, batch, None)
    return read_logps(model, params, h, batch.read, batch.targets, answers=batch.lengths.shape[1]).logp


def _drawn(outputs: Outputs) -> Drawn:
    """What a loss sees. Without `logps` the batch was drawn by the model that is trained, and the ratio is 1."""
    batch, dtype = outputs.batch, outputs.logp.dtype
    count = batch.lengths.shape[1]
    real = batch.answers < count
    mask = lambda x: jnp.where(real, x.astype(dtype), 0)  # noqa: E731
    member = batch.answers[:, :, None] == jnp.arange(count, dtype=batch.answers.dtype)
    return Drawn(
        logp=mask(outputs.logp),
        old=mask(jax.lax.stop_gradient(outputs.logp) if batch.logps is None else batch.logps),
        advantages=mask(batch.advantages),
        entropy=mask(outputs.entropy),
        reference=None if batch.reference is None else mask(batch.reference),
        answer=batch.answers,
        real=real.astype(dtype),
        tokens=jnp.maximum(jnp.sum(member, 1), 1).astype(dtype),
    )


def _policy_part(
    loss: PolicyLoss, penalty: Penalty | None, bonus: float, outputs: Outputs, aux: Aux
) -> tuple[Array, Metrics]:
    """The policy's loss and metrics: the loss, a KL penalty, an entropy bonus."""
    drawn = _drawn(outputs)
    weights = outputs.batch.policy_weights.astype(drawn.logp.dtype)

    def add(x: Array) -> Array:
        return jnp.sum(jnp.where(weights != 0, weights * x, 0))

    value = part = add(_values(loss, drawn))
    metrics: Metrics = {}
    if drawn.reference is not None:
        kl = (penalty.estimate if penalty else k3)(drawn.logp, drawn.reference) * drawn.real
        metrics |= {
            "kl": Sum.of(kl, drawn.real),
            "kl_per_completion": Sum.of(drawn.total(kl), drawn.total(drawn.real) > 0),
        }
    if penalty:
        if drawn.reference is None:
            raise ValueError(
                "a KL penalty needs the reference's log-probs in the batch; let the rollout give them or set beta=0"
            )
        if not isinstance(penalty, KLInReward):
            coef = aux["kl_coef"].astype(kl.dtype) if isinstance(penalty, AdaptiveKL) else penalty.coef
            value = value + coef * add(kl)
    if bonus:
        value = value - bonus * add(drawn.entropy)
    if isinstance(penalty, KEPT):
        metrics["kl_coef"] = Max(aux["kl_coef"])
    metrics["loss/policy_avg"] = Sum(part, jnp.sum(weights))
    return value, metrics | {"loss": Sum(value, jnp.sum(weights))} | _metrics(loss, drawn, weights != 0)


def _values(loss: PolicyLoss, drawn: Drawn) -> Array:
    name = getattr(getattr(loss, "func", loss), "__name__", repr(loss))
    try:
        found = loss(drawn)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"the policy loss {name} fails: {told}") from error
    if getattr(found, "shape", None) != drawn.logp.shape:
        shape = getattr(found, "shape", type(found).__name__)
        raise ValueError(f"the policy loss {name} gives one value a token, {drawn.logp.shape}; found {shape}")
    return found


def _metrics(loss: PolicyLoss, drawn: Drawn, used: Array) -> dict[str, Any]:
    """How far the policy is from the one that drew, at the tokens that have a policy loss; the entropy of all.

    clip_ratio counts the tokens that the loss holds still, whatever loss it is: those whose log-prob has no gradient although
    their advantage isn't 0; low and high by the advantage's sign, as in TRL. low_min and high_max are those of a completion.
    val/ratio_var is the mean of (r - 1)^2, as the mean of r is to be 1.
    """
    drawn, used = jax.lax.stop_gradient(drawn), used & (drawn.real > 0)
    slope = jax.grad(lambda logp: jnp.sum(jnp.where(used, loss(replace(drawn, logp=logp)), 0)))(drawn.logp)
    still = used & (slope == 0)
    low, high = (_flag(still & where, slope) for where in (drawn.advantages < 0, drawn.advantages > 0))
    tokens = drawn.total(_flag(used, slope))
    share = lambda x, none: jnp.where(tokens > 0, drawn.total(x) / jnp.maximum(tokens, 1), none)  # noqa: E731
    away = drawn.log_ratio
    return {
        "entropy": Sum.of(drawn.entropy, drawn.real),
        "policy/approxkl_avg": Sum.of(away * away / 2, used),
        "val/ratio": Sum.of(drawn.ratio, used),
        "val/ratio_var": Sum.of(jnp.expm1(away) ** 2, used),
        "clip_ratio/low_mean": Sum.of(low, used),
        "clip_ratio/high_mean": Sum.of(high, used),
        "clip_ratio/region_mean": Sum.of(low + high, used),
        "clip_ratio/low_min": Min(jnp.min(share(low, jnp.inf))),
        "clip_ratio/high_max": Max(jnp.max(share(high, -jnp.inf))),
    }


def _flag(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)


def value_loss(values: Array, old: Array, returns: Array, clip: float | None) -> tuple[Array, Array]:
    """(`max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2`, where the clipped one counts), [B, M] (as in TRL's PPO).

    With clip=None `(v - R)^2 / 2`.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, jnp.zeros(values.shape, bool)
    bounded = (jnp.clip(values, old - clip, old + clip) - returns) ** 2
    return jnp.maximum(plain, bounded) / 2, bounded > plain


def _value_part(critic_: Critic, outputs: Outputs) -> tuple[Array, dict[str, Any]]:
    batch, values = outputs.batch, outputs.values
    if values is None or batch.values is None or batch.returns is None or batch.value_weights is None:
        raise ValueError(
            "a critic needs values, returns and value_weights in the batch; let the rollout give them"
        )
    weights = batch.value_weights.astype(values.dtype)
    used = (weights != 0) & (batch.answers < batch.lengths.shape[1])
    at = lambda x: jnp.where(used, x.astype(values.dtype), 0)  # noqa: E731
    known, returns = at(values), at(batch.returns)
    losses, bounded = value_loss(known, at(batch.values), returns, critic_.clip)
    cost = jnp.sum(weights * losses)
    return cost, {
        "loss/value_avg": Sum(cost, jnp.sum(weights)),
        "val/clipfrac_avg": Sum.of(bounded.astype(values.dtype), used),
        "val/returns_correlation": Correlation.of(known, returns, used),
    }


def _init(penalty: Penalty | None, trainable: Any, at_base: bool) -> dict[str, Any]:
    """aux at step 0. at_base: the model at step 0 is the base without its adapter, so that no copy of it is needed."""
    aux: dict[str, Any] = {}
    if penalty and not at_base:
        none = lambda x: jax.tree.map(lambda _: None, x)  # noqa: E731
        own = {
            name: x if name in ("adapter", "base") else none(x) for name, x in trainable.items()
        }  # without models beside it
        aux["reference"] = jax.tree.map(jnp.copy, own)
    if isinstance(penalty, KEPT):
        aux["kl_coef"] = jnp.asarray(penalty.coef, jnp.float32)
    return aux


def _updated(penalty: Penalty | None, aux: Aux, metrics: Metrics) -> Aux:
    """An adaptive coefficient follows the KL of this step's completions, but not while the policy rests."""
    if not isinstance(penalty, KEPT):
        return aux
    kl, moved = metrics["kl_per_completion"], metrics["loss/policy_avg"].weight != 0
    found = penalty.update(aux["kl_coef"], kl.total / jnp.maximum(kl.weight, 1), kl.weight)
    return {**aux, "kl_coef": jnp.where(moved & (kl.weight > 0), found, aux["kl_coef"]).astype(jnp.float32)}
