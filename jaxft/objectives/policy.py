"""The policy objective of reinforcement learning: a policy loss, a KL penalty, an entropy bonus and PPO's
critic.

`policy(model, partial(clipped, eps_high=0.28))` is linear in the batch's policy weights and in its value
weights. PPO and the GRPO family are this objective with losses of policy_losses.py and advantages and token
weights of rl/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft.annotations import above, check_bounds
from jaxft.batch import Rollout, without_fields
from jaxft.distributed.exit import shorten_error
from jaxft.nn.tree import Aux, LayerOutputs, Metrics, Params, struct
from jaxft.objectives.alarms import rollout_alarms
from jaxft.objectives.logprobs import Graded, HeadInput, LanguageModel, LogProbs
from jaxft.objectives.losses.policy_losses import (
    AdaptiveKL,
    FixedKL,
    KLInReward,
    Penalty,
    PolicyBatch,
    PolicyLoss,
    k3,
)
from jaxft.objectives.metrics import ENTROPY, KL, LOSS, Correlation, Max, Min, Sum, by_row, layer_metrics
from jaxft.objectives.objective import Facts, Objective, ReferenceKind, Report, Scores
from jaxft.objectives.pair import loss_name, require
from jaxft.objectives.preference import reference_head
from jaxft.objectives.read_positions import read_logps_of_heads, read_numbers
from jaxft.objectives.sft import sft

VALUE_LOSS, VALUE_CLIP_FRACTION = "loss/value_avg", "val/clipfrac_avg"
RETURNS_CORRELATION = "val/returns_correlation"

# (params, batch, h [B, T, D] of the policy) -> the expected return at each read position [B, M]
ValueFunction = Callable[[Params, Rollout, Array], Array]


@dataclass(frozen=True)
class Critic:
    """PPO's critic: a value function whose loss, times `coef`, is added to the policy's.

    values(params, batch, h) -> the values, see value_function. clip: how far predictions may move from the
    values at sampling before the loss is clipped, see value_loss; None for no clipping.
    """

    values: ValueFunction
    coef: Annotated[float, above(0)] = 0.1
    clip: Annotated[float | None, above(0)] = 0.2

    def __post_init__(self) -> None:
        check_bounds(self, "Critic")


def value_function(
    hidden: Callable[[Params, Rollout, Array], Array], head: Callable[[Params, Array], Array]
) -> ValueFunction:
    """Return a function (params, batch, h) -> values at the read positions, [B, M].

    hidden(params, batch, h [B, T, D] of the policy) -> the critic's hidden states [B, T, D]: a forward pass
    with another adapter, or h itself. head(params, h [N, m, D]) -> values [N, m].
    """

    def values(params: Params, batch: Rollout, h_BTD: Float[Array, "B T D"]) -> Float[Array, "B M"]:
        states = hidden(params, batch, h_BTD)
        return read_numbers(partial(head, params), states, batch.read, batch.lengths.shape[1])

    return values


def value_loss(
    values: Float[Array, "B M"], old: Float[Array, "B M"], returns: Float[Array, "B M"], clip: float | None
) -> tuple[Float[Array, "B M"], Bool[Array, "B M"]]:
    """Return (`max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2`, whether the clipped term is the larger
    one), as in TRL's PPO; with clip=None (`(v - R)^2 / 2`, False).

    values: v. old: v_old, the values at sampling. returns: R.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, jnp.zeros(values.shape, bool)
    clipped = (jnp.clip(values, old - clip, old + clip) - returns) ** 2
    return jnp.maximum(plain, clipped) / 2, clipped > plain


def critic_loss(critic: Critic, values: Float[Array, "B M"] | None, batch: Rollout) -> tuple[Array, Metrics]:
    """Return the critic's weighted loss and its metrics. Raises ValueError if values, or a field of the batch
    that the critic needs, is None.
    """
    if values is None or batch.values is None or batch.returns is None or batch.value_weights is None:
        raise ValueError(
            "a critic needs values, returns and value_weights in the batch. Take batches from "
            "rl.rollout_source.Rollouts, which compute them"
        )
    chex.assert_equal_shape([values, batch.values, batch.returns, batch.value_weights])
    weights = batch.value_weights.astype(values.dtype)
    used = (weights != 0) & (batch.responses < batch.lengths.shape[1])

    def masked(x: Array) -> Array:
        return jnp.where(used, x.astype(values.dtype), 0)

    predicted, returns = masked(values), masked(batch.returns)
    losses, clipped = value_loss(predicted, masked(batch.values), returns, critic.clip)
    cost = jnp.sum(weights * losses)
    return cost, {
        VALUE_LOSS: Sum(cost, jnp.sum(weights)),
        VALUE_CLIP_FRACTION: Sum.of(clipped.astype(values.dtype), used),
        RETURNS_CORRELATION: Correlation.of(predicted, returns, used),
    }


POLICY_LOSS, APPROX_KL = "loss/policy_avg", "policy/approxkl_avg"
KL_PER_COMPLETION = "kl_per_completion"
KL_COEF = "kl_coef"  # a metric and the key in aux
CLIP_FRACTION = "clip_ratio/region_mean"
OBSERVATION_LOSS = "loss/observation_avg"

UNUSED = ("ids", "segments", "positions", "read", "targets", "branches")  # fields of Rollout


@struct
class Outputs:
    """The outputs of the forward passes over a batch. logp and values have a gradient; entropy has one if the
    objective has an entropy bonus.

    batch: the completions without their tokens.
    """

    logp: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    values: Float[Array, "B M"] | None
    batch: Rollout
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row


def policy(
    model: LanguageModel,
    loss: PolicyLoss,
    beta: float | Penalty = 0.0,
    entropy: float = 0.0,
    temperature: float = 1.0,
    critic: Critic | None = None,
) -> Objective:
    """`sum_t w_t (loss_t + beta KL_t - entropy H_t) + coef sum_t v_t L_t`, with policy weights w, value
    weights v, entropies H and the value losses L of a critic.

    loss: a function of policy_losses.py, or your own.
    beta: 0 for no penalty and no reference; another number is FixedKL(beta). A penalty needs the reference's
        log-probs in the batch. KLInReward(...) is for a run whose rewards contain the KL. The coefficient of
        KLInReward and AdaptiveKL is stored in aux["kl_coef"].
    entropy: the coefficient of an entropy bonus, 0 for none.
    temperature: the sampling temperature; logits of policy and reference are divided by it.

    Metrics have the names of TRL's GRPO, or of TRL's PPO where GRPO has none. A logged loss is divided by the
    sum of its weights, which is 1 for most rules of rl/token_weights.py.

    >>> from functools import partial
    >>> from jaxft.objectives.losses.policy_losses import clipped
    >>> grpo = policy(model=None, loss=partial(clipped, eps_high=0.28), beta=0.04)
    >>> grpo.facts.reference, grpo.facts.critic
    ('start', False)
    """
    require(entropy >= 0, f"policy: entropy must be at least 0, got {entropy}")
    require(
        0 < temperature < float("inf"), f"policy: the sampling temperature must be above 0, got {temperature}"
    )
    penalty = (FixedKL(beta) if beta else None) if isinstance(beta, int | float) else beta
    kind: ReferenceKind = "none" if penalty is None else penalty.reference
    tempered = at_temperature(model, temperature)
    graded: Graded = ("logp", "entropy") if entropy else ("logp",)

    def forward(params: Params, batch: Rollout, key: Array | None, aux: Aux) -> Outputs:
        return forward_with(params, batch, [])[0]

    def forward_with(
        params: Params, batch: Rollout, frozen: list[HeadInput]
    ) -> tuple[Outputs, list[LogProbs]]:
        """Return the policy's Outputs, and the LogProbs of each of the frozen heads."""
        # Without dropout, so that log-probs are comparable with those at sampling (TRL's disable_dropout).
        h, layers = model.hidden(params, batch)
        heads, reads = [HeadInput(tempered, params, h), *frozen], (batch.read, batch.targets)
        lp, *others = read_logps_of_heads(heads, reads, graded, batch.lengths.shape[1])
        values = None if critic is None else critic.values(params, batch, h).astype(lp.logp.dtype)
        rows = without_fields(batch, UNUSED)
        return Outputs(lp.logp, lp.entropy, values, rows, by_row(layers)), others

    def total_loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        value, metrics = _policy_terms(loss, penalty, entropy, outputs, aux)
        metrics |= layer_metrics(outputs.layers)
        if critic is not None:
            # PPO's names in TRL
            metrics |= {"policy/clipfrac_avg": metrics[CLIP_FRACTION], "policy/entropy_avg": metrics[ENTROPY]}
            cost, value_metrics = critic_loss(critic, outputs.values, outputs.batch)
            value = value + critic.coef * cost
            metrics |= value_metrics | {LOSS: Sum(value, value_metrics[VALUE_LOSS].weight)}
        return value, jax.lax.stop_gradient(metrics)

    def score(params: Params, batch: Rollout, aux: Aux) -> Scores:
        frozen = [] if penalty is None else [reference_head(tempered, kind, (params, aux), batch)]
        # a critic on the policy's hidden states shares their pass
        outputs, others = forward_with(params, batch, frozen)
        return Scores(outputs.logp, others[0].logp if others else None, outputs.values)

    def batch_spec(batch: Rollout) -> Rollout:
        x = batch.logps
        batch = batch if penalty is None else replace(batch, reference=x)
        return batch if critic is None else replace(batch, values=x, returns=x, value_weights=x)

    def init(trainable: Params, at_base: bool) -> Aux:
        aux: dict[str, Any] = {}
        if penalty and penalty.reference == "start" and not at_base:
            policy_leaves = {
                name: x if name in ("adapter", "base") else jax.tree.map(lambda _: None, x)
                for name, x in trainable.items()
            }
            aux["reference"] = jax.tree.map(jnp.copy, policy_leaves)
        if isinstance(penalty, AdaptiveKL | KLInReward):  # a coefficient that may change or is in the rewards
            aux[KL_COEF] = jnp.asarray(penalty.coef, jnp.float32)
        return aux

    def update(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
        if not isinstance(penalty, AdaptiveKL | KLInReward):
            return aux
        kl, trained = metrics[KL_PER_COMPLETION], metrics[POLICY_LOSS].weight != 0
        coef = penalty.update(aux[KL_COEF], kl.total / jnp.maximum(kl.weight, 1), kl.weight)
        return {**aux, KL_COEF: jnp.where(trained & (kl.weight > 0), coef, aux[KL_COEF]).astype(jnp.float32)}

    def frozen_policy(batch: Rollout) -> Bool[Array, ""]:
        return jnp.all(batch.policy_weights == 0)  # only a critic is trained

    facts = Facts(
        reference=kind,
        dropout=False,
        temperature=temperature,
        kl_in_rewards=isinstance(penalty, KLInReward),
        critic=critic is not None,
        freezes_policy=True,
    )
    return Objective(
        forward, total_loss, init, update, score, frozen_policy, batch_spec, text=sft(model), facts=facts,
        report=Report(rollout_alarms),
    )  # fmt: skip


def with_target_kl(objective: Objective, target_kl: float) -> Objective:
    """Return the objective with early stopping at target_kl nats per token: after a step whose approximate KL
    is above it, the later optimizer steps on the same rollout train only the critic, if there is one.

    The KL is stored in aux["approx_kl"] as [sum, weight] of the metric policy/approxkl_avg, which the rollout
    source reads.
    """
    require(target_kl > 0, f"target_kl={target_kl} nats. Use a number above 0, or none.")

    def init(trainable: Params, at_base: bool) -> Aux:
        return {**objective.init(trainable, at_base), "approx_kl": jnp.zeros(2, jnp.float32)}

    def update(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
        kl = metrics[APPROX_KL]
        newest = jnp.stack([kl.total, kl.weight]).astype(jnp.float32)
        approx_kl = jnp.where(kl.weight > 0, newest, aux["approx_kl"])
        return {**objective.update(aux, trainable, metrics), "approx_kl": approx_kl}

    facts = replace(objective.facts, target_kl=target_kl)
    return objective._replace(init=init, update=update, facts=facts)


def echo(
    model: LanguageModel, objective: Callable[[LanguageModel], Objective], coef: float = 0.1
) -> Objective:
    """Add `-coef sum_t w_t log pi(x_t)` to a policy objective, over tokens x_t that the policy did not
    sample, such as a tool's results. The observation weights w sum to 1 over an optimizer batch.

    ECHO (Shrivastava et al. 2026, arXiv:2605.24517, where coef is 0.05): the policy learns what its actions
    lead to, in the same forward pass and from failed episodes too. The chat template's text around a result
    is included. The loss is logged as loss/observation_avg.

    objective: a function that returns the policy objective for a model. The new objective raises ValueError
    for a batch without observation weights.
    """
    require(coef > 0, f"echo={coef} must be above 0; use for example 0.1, or leave it out")
    inner = objective(model)

    def loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        value, metrics = inner.loss(outputs, aux)
        if outputs.batch.observation_weights is None:
            raise ValueError(
                "ECHO needs observation_weights in the batch. Take batches from "
                "rl.rollout_source.Rollouts(observations=True), which compute them"
            )
        weights = outputs.batch.observation_weights.astype(outputs.logp.dtype)
        cost = -jnp.sum(jnp.where(weights != 0, weights * outputs.logp, 0))
        value = value + coef * cost
        added = {OBSERVATION_LOSS: Sum(cost, jnp.sum(weights)), LOSS: Sum(value, metrics[LOSS].weight)}
        return value, metrics | jax.lax.stop_gradient(added)

    def frozen_policy(batch: Rollout) -> Bool[Array, ""]:
        return inner.frozen_policy(batch) & jnp.all(batch.observation_weights == 0)

    def batch_spec(batch: Rollout) -> Rollout:
        return replace(inner.batch_spec(batch), observation_weights=batch.policy_weights)

    facts = replace(inner.facts, observations=True)
    return inner._replace(loss=loss, frozen_policy=frozen_policy, batch_spec=batch_spec, facts=facts)


def at_temperature(model: LanguageModel, temperature: float) -> LanguageModel:
    """Return the model, and its teacher if it has one, with logits divided by the temperature."""
    if temperature == 1:
        return model

    def logits(head: Params, h: Array) -> Array:
        return model.logits(head, h) / temperature

    changed: Any = model  # a dataclass
    teacher = model.teacher and at_temperature(model.teacher, temperature)
    return replace(changed, logits=logits, teacher=teacher)


def policy_batch(outputs: Outputs) -> PolicyBatch:
    """Return the PolicyBatch for a policy loss. Without `logps` in the batch, old_logp is the current
    log-probs without gradient, so that ratios are 1.
    """
    batch, dtype = outputs.batch, outputs.logp.dtype
    chex.assert_equal_shape([outputs.logp, batch.responses, batch.advantages, batch.policy_weights])
    count = batch.lengths.shape[1]
    real = batch.responses < count

    def masked(x: Array) -> Array:
        return jnp.where(real, x.astype(dtype), 0)

    member = batch.responses[:, :, None] == jnp.arange(count, dtype=batch.responses.dtype)[None, None]
    return PolicyBatch(
        logp=masked(outputs.logp),
        old_logp=masked(jax.lax.stop_gradient(outputs.logp) if batch.logps is None else batch.logps),
        advantages=masked(batch.advantages),
        entropy=masked(outputs.entropy),
        reference=None if batch.reference is None else masked(batch.reference),
        completion=batch.responses,
        mask=real.astype(dtype),
        lengths=jnp.maximum(jnp.sum(member, 1), 1).astype(dtype),
    )


def _policy_terms(
    loss: PolicyLoss, penalty: Penalty | None, bonus: float, outputs: Outputs, aux: Aux
) -> tuple[Array, Metrics]:
    """Return the policy's loss with KL penalty and entropy bonus (coefficient: `bonus`), and its metrics."""
    batch = policy_batch(outputs)
    weights = outputs.batch.policy_weights.astype(batch.logp.dtype)

    def weighted_sum(x: Array) -> Array:
        return jnp.sum(jnp.where(weights != 0, weights * x, 0))

    value = policy_loss = weighted_sum(_checked_values(loss, batch))
    metrics: Metrics = {}
    if batch.reference is not None:
        kl = (penalty.estimate if penalty else k3)(batch.logp, batch.reference) * batch.mask
        metrics |= {
            KL: Sum.of(kl, batch.mask),
            KL_PER_COMPLETION: Sum.of(batch.total(kl), batch.total(batch.mask) > 0),
        }
    if penalty:
        if batch.reference is None:
            raise ValueError(
                "a KL penalty needs the reference's log-probs in the batch. Take batches from "
                "rl.rollout_source.Rollouts, which compute them, or set beta=0"
            )
        if not isinstance(penalty, KLInReward):
            coef = aux[KL_COEF].astype(kl.dtype) if isinstance(penalty, AdaptiveKL) else penalty.coef
            value = value + coef * weighted_sum(kl)
    if bonus:
        value = value - bonus * weighted_sum(batch.entropy)
    if isinstance(penalty, AdaptiveKL | KLInReward):
        metrics[KL_COEF] = Max(aux[KL_COEF])
    metrics[POLICY_LOSS] = Sum(policy_loss, jnp.sum(weights))
    return value, metrics | {LOSS: Sum(value, jnp.sum(weights))} | _metrics(loss, batch, weights != 0)


def _checked_values(loss: PolicyLoss, batch: PolicyBatch) -> Float[Array, "B M"]:
    """Return the loss of each token. Raises ValueError if the loss fails or does not return [B, M]."""
    name = loss_name(loss)
    try:
        values = loss(batch)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        message = f"{type(error).__name__}: {shorten_error(error)}"
        raise ValueError(f"policy loss {name} fails: {message}. Correct the loss or its settings") from error
    got = values.shape if isinstance(values, jax.Array) else type(values).__name__
    if got != batch.logp.shape:
        raise ValueError(f"policy loss {name} must return one value per token, {batch.logp.shape}; got {got}")
    return values


def _metrics(loss: PolicyLoss, batch: PolicyBatch, used: Bool[Array, "B M"]) -> Metrics:
    """Return metrics of the ratio to the sampling policy and of clipping, over the tokens with a policy
    weight (`used`), and the entropy over all tokens.

    clip_ratio/* are fractions of clipped tokens. For any loss, a token is clipped if its log-prob has no
    gradient although its advantage isn't 0: low if the advantage is negative, high if it is positive, as in
    TRL. low_min and high_max are the extremes of one completion's fraction. val/ratio_var is the mean of
    (r - 1)^2.
    """
    batch, used = jax.lax.stop_gradient(batch), used & (batch.mask > 0)
    slope = jax.grad(lambda logp: jnp.sum(jnp.where(used, loss(replace(batch, logp=logp)), 0)))(batch.logp)
    clipped, dtype = used & (slope == 0), slope.dtype
    low = (clipped & (batch.advantages < 0)).astype(dtype)
    high = (clipped & (batch.advantages > 0)).astype(dtype)
    tokens = batch.total(used.astype(dtype))

    def fraction(x: Array, if_empty: float) -> Array:
        return jnp.where(tokens > 0, batch.total(x) / jnp.maximum(tokens, 1), if_empty)

    log_ratio = batch.log_ratio
    return {
        ENTROPY: Sum.of(batch.entropy, batch.mask),
        APPROX_KL: Sum.of(log_ratio * log_ratio / 2, used),
        "val/ratio": Sum.of(batch.ratio, used),
        "val/ratio_var": Sum.of(jnp.expm1(log_ratio) ** 2, used),
        "clip_ratio/low_mean": Sum.of(low, used),
        "clip_ratio/high_mean": Sum.of(high, used),
        CLIP_FRACTION: Sum.of(low + high, used),
        "clip_ratio/low_min": Min(jnp.min(fraction(low, jnp.inf))),
        "clip_ratio/high_max": Max(jnp.max(fraction(high, -jnp.inf))),
    }
