"""Policy losses: pure functions `(batch: PolicyBatch, ...) -> [B, M]`, a value per token, which policy(...)
weights and sums; and estimators of the KL to the reference, with penalties whose coefficient may be adapted
to reach a target KL.

Set a loss's parameters with `partial(clipped, eps_high=0.28)`. In the docstrings A is the advantage of a
token, r = pi / pi_old its ratio, sg(x) is x without gradient, s the ratio of a completion: the geometric mean
of its tokens' ratios. A loss can be combined with any advantage estimator and any token weights of rl/.
Published methods are such combinations (advantage estimator, token weights, loss):

PPO: gae, token_mean, clipped. GRPO: grpo, sequence_mean, clipped. Dr. GRPO: centred, constant_length,
clipped. DAPO: grpo, token_mean, clipped with eps_high=0.28, without groups of equal rewards. RLOO: rloo,
sequence_sum, policy_gradient. REINFORCE++: whitened returns, token_mean, clipped. GSPO: grpo, sequence_mean,
gspo. LUSPO: grpo, sequence_sum, gspo. CISPO: grpo, token_mean, cispo. GMPO: grpo, sequence_mean, geo_mean.
DPPO: centred, constant_length, dppo_tv or dppo_kl. MaxRL: maxrl, token_mean, clipped. GFPO: gfpo, token_mean,
clipped. GDPO: by_each, token_mean, clipped.
Values and gradients equal those in TRL 1.16's GRPOTrainer and verl where they have the loss, unless a
docstring says what differs.

One completion of two tokens, of advantage 1, whose probabilities rose by a factor of 1.1 and of 1.5:

>>> new = jnp.log(jnp.array([[0.55, 0.3]]))
>>> old = jnp.log(jnp.array([[0.5, 0.2]]))
>>> one, number = jnp.ones((1, 2)), jnp.zeros((1, 2), jnp.int32)
>>> batch = PolicyBatch(new, old, one, one, None, number, mask=one, lengths=jnp.full((1, 1), 2.0))
>>> [round(x, 2) for x in clipped(batch, eps_high=0.28)[0].tolist()]
[-1.1, -1.28]

As a setting: `jaxft train grpo loss=gspo`, or in a recipe `policy(model, partial(clipped, eps_high=0.28))`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from jaxft.annotations import above, at_least, check_bounds
from jaxft.nn.tree import struct
from jaxft.objectives.pair import capped, require, response_sums, square

# ---- KL to the reference
#
# An estimator is `(logp, reference) -> [B, M]`, for tokens that the policy sampled. As a loss, only k2 has
# the gradient of the KL for samples of the current policy: k1's is 0 in expectation, k3's is the forward
# KL's. In a reward any of them serves (Schulman 2020, "Approximating KL divergence"; Tang & Munos 2025,
# arXiv:2506.09477).

Estimator = Callable[[Array, Array], Array]
Scalar: TypeAlias = float | Array
PenaltyReference = Literal["start", "teacher"]  # the policy at step 0, or the run's second model


def k1(logp: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL estimate `log pi - log pi_ref` at a sampled token: unbiased, may be negative, high variance."""
    return logp - reference


def k2(logp: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, "..."]:
    """KL estimate `(log pi - log pi_ref)^2 / 2` at a sampled token: biased, never negative, low variance."""
    return square(logp - reference) / 2


def k3(logp: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, "..."]:
    """GRPO's KL estimate `exp(d) - 1 - d`, d = log pi_ref - log pi (capped): unbiased and never negative.

    >>> round(float(k3(jnp.asarray(-1.0), jnp.asarray(-2.0))), 3)
    0.368
    """
    d = reference - logp
    return jnp.expm1(capped(d)) - d


@dataclass(frozen=True)
class FixedKL:
    """A KL penalty of `coef` times the estimated KL to the reference; with coef 0 the KL is only logged."""

    coef: Annotated[float, at_least(0)] = 0.05
    estimate: Estimator = k3
    reference: PenaltyReference = "start"

    def __post_init__(self) -> None:
        check_bounds(self, "FixedKL")

    def update(self, coef: Scalar, kl: Scalar, count: Scalar) -> Scalar:
        """Return the coefficient unchanged."""
        return coef


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL penalty whose coefficient starts at `coef`, rises while the KL is above `target`, and falls while
    it is below.

    Ziegler et al. 2019 (arXiv:1909.08593, section 2.2). target: nats per completion. horizon: the number of
    completions in which the coefficient can change by a factor of at most about e^0.2.

    >>> round(float(AdaptiveKL(coef=0.1, target=6.0).update(0.1, kl=12.0, count=500)), 4)
    0.101
    """

    coef: Annotated[float, above(0)] = 0.2
    target: Annotated[float, above(0)] = 6.0
    horizon: Annotated[float, above(0)] = 10_000
    estimate: Estimator = k3
    reference: PenaltyReference = "start"

    def __post_init__(self) -> None:
        check_bounds(self, "AdaptiveKL")

    def update(self, coef: Scalar, kl: Scalar, count: Scalar) -> Scalar:
        """`coef (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon)` after `count` completions with a mean
        KL of `kl` nats.

        policy(...) calls it after each optimizer step that updates the policy, with the number of the step's
        completions and their current KL. TRL 0.11 calls it once per rollout with the KL at sampling, so with
        n passes over a rollout use n times TRL's horizon.
        """
        return coef * (1 + jnp.clip(kl / self.target - 1, -0.2, 0.2) * count / self.horizon)


@dataclass(frozen=True)
class KLInReward:
    """A KL penalty that is subtracted from the rewards, as in PPO, and not part of the loss. The coefficient
    is stored in aux["kl_coef"]. For AdaptiveKL, each pass over a rollout counts its completions again.
    """

    penalty: FixedKL | AdaptiveKL

    @property
    def coef(self) -> float:
        """The coefficient at step 0."""
        return self.penalty.coef

    @property
    def estimate(self) -> Estimator:
        """The estimator of the logged KL."""
        return self.penalty.estimate

    @property
    def reference(self) -> PenaltyReference:
        """The reference policy of the KL."""
        return self.penalty.reference

    def update(self, coef: Scalar, kl: Scalar, count: Scalar) -> Scalar:
        """Return the penalty's updated coefficient."""
        return self.penalty.update(coef, kl, count)


Penalty = FixedKL | AdaptiveKL | KLInReward


# ---- losses


TokenLoss = Float[Array, "B M"]
MAX_LOG_RATIO = 20.0  # bound of |log r|, where exp and its square are finite in float32 (as in verl)


@struct
class PolicyBatch:
    """The sampled tokens of a batch of completions. Only `logp` has a gradient; at padding every value is 0.

    A loss finds a token's completion by `completion`; it must not rely on the order of tokens. Its values at
    padding are ignored, but they and their gradients must be finite. A loss must be proportional to
    |advantages|, since importance weights (rl/token_weights.py) are multiplied into them.
    """

    logp: Float[Array, "B M"]
    old_logp: Float[Array, "B M"]  # log-probs at sampling
    advantages: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    completion: Int[Array, "B M"]  # 0 .. A-1; A marks padding
    mask: Float[Array, "B M"]  # 1 at a completion's token, 0 at padding
    lengths: Float[Array, "B A"]  # read positions of each completion, 1 if it has none

    @property
    def log_ratio(self) -> Float[Array, "B M"]:
        """log pi - log pi_old, clipped to +-MAX_LOG_RATIO."""
        return jnp.clip(self.logp - self.old_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)

    @property
    def ratio(self) -> Float[Array, "B M"]:
        """pi / pi_old of each token."""
        return jnp.exp(self.log_ratio)

    def total(self, x: Float[Array, "B M"]) -> Float[Array, "B A"]:
        """Sum values per token over each completion."""
        return response_sums(x * self.mask, self.completion, ("one",), self.lengths.shape[1])["one"]

    def mean(self, x: Float[Array, "B M"]) -> Float[Array, "B A"]:
        """Average values per token over each completion; 0 for a completion without tokens."""
        return self.total(x) / self.lengths

    def spread(self, x: Float[Array, "B A"]) -> Float[Array, "B M"]:
        """Repeat a value per completion at each of its tokens (0 at padding)."""
        return jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1))), self.completion, axis=1)


PolicyLoss = Callable[[PolicyBatch], TokenLoss]


def policy_gradient(batch: PolicyBatch) -> TokenLoss:
    """`-A log pi`: the policy gradient (Williams 1992) of tokens that the current policy sampled.

    verl's `gpg` (arXiv:2504.02546).
    """
    return -batch.advantages * batch.logp


def unclipped(batch: PolicyBatch) -> TokenLoss:
    """`-A r`: the policy gradient of tokens that an older policy sampled; for r = 1 its gradient equals
    policy_gradient's.
    """
    return -batch.advantages * batch.ratio


def clipped(batch: PolicyBatch, eps_low: float = 0.2, eps_high: float = 0.2) -> TokenLoss:
    """`max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))`: PPO's loss (Schulman et al. 2017, arXiv:1707.06347,
    eq. 7).

    An eps_high above eps_low is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476).
    """
    return _clipped(batch.ratio, batch.advantages, eps_low, eps_high)


def _clipped(ratio: Array, advantages: Array, eps_low: float, eps_high: float) -> TokenLoss:
    require((eps_low >= 0) & (eps_low <= 1), f"eps_low must be in [0, 1], got {eps_low}")
    require(eps_high >= 0, f"eps_high must be at least 0, got {eps_high}")
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - eps_low, 1 + eps_high))


def dual_clip(
    batch: PolicyBatch, eps_low: float = 0.2, eps_high: float = 0.2, max_ratio: float = 3.0
) -> TokenLoss:
    """The loss `clipped`, but at most `-A max_ratio` where A < 0 (Ye et al. 2019, arXiv:1912.09729; verl's
    clip_ratio_c).

    It equals TRL's two-sided clipping with delta = max_ratio (INTELLECT-2, arXiv:2505.07291),
    `max(-A min(r, max_ratio), -A clip(r))`. Raises ValueError for max_ratio <= 1 + eps_high, where the two
    differ.
    """
    require(
        max_ratio > 1 + eps_high,
        f"dual_clip: max_ratio must be above 1 + eps_high, got {max_ratio} and {eps_high}",
    )
    loss, bound = clipped(batch, eps_low, eps_high), -batch.advantages * max_ratio
    return jnp.where(batch.advantages < 0, jnp.minimum(loss, bound), loss)


def dppo_tv(batch: PolicyBatch, eps_low: float = 0.15, eps_high: float = 0.15) -> TokenLoss:
    """`-M A r`, M = 0 where A > 0 and a token's probability has risen by more than eps_high, or where A < 0
    and it has fallen by more than eps_low, else M = 1.

    DPPO (Qi et al. 2026, arXiv:2602.04879) with the total variation |pi - pi_old| of two outcomes: this token
    or any other. Unlike a clipped ratio, it lets a rare token's ratio become large, and does not let a likely
    token lose much probability. In the paper, pi_old is the sampler's policy: set Rules.ratio_to_sampler.
    """
    variation = jnp.abs(jnp.exp(batch.logp) - jnp.exp(batch.old_logp))
    return _in_trust_region(batch, variation, eps_low, eps_high)


def dppo_kl(batch: PolicyBatch, eps_low: float = 0.05, eps_high: float = 0.05) -> TokenLoss:
    """dppo_tv with the divergence `pi_old log (pi_old / pi) + (1 - pi_old) log ((1 - pi_old) / (1 - pi))`.

    DPPO with the KL of two outcomes, this token or any other, instead of the total variation
    (arXiv:2602.04879).
    """
    tiny = jnp.finfo(batch.logp.dtype).tiny

    def others(logp: Array) -> Array:
        return jnp.maximum(-jnp.expm1(logp), tiny)  # 1 - pi, accurate where pi is close to 1

    old, rest = batch.old_logp, others(batch.old_logp)
    kl = jnp.exp(old) * (old - batch.logp) + rest * (jnp.log(rest) - jnp.log(others(batch.logp)))
    return _in_trust_region(batch, kl, eps_low, eps_high)


def _in_trust_region(batch: PolicyBatch, divergence: Array, eps_low: float, eps_high: float) -> TokenLoss:
    """Return -A r, or 0 where r > 1, A > 0 and the divergence is above eps_high, or r < 1, A < 0 and it is
    above eps_low.
    """
    require((eps_low >= 0) & (eps_high >= 0), f"eps_low={eps_low} and eps_high={eps_high} must be at least 0")
    up = (batch.advantages > 0) & (batch.logp > batch.old_logp) & (divergence > eps_high)
    down = (batch.advantages < 0) & (batch.logp < batch.old_logp) & (divergence > eps_low)
    return jnp.where(up | down, 0, -batch.advantages * batch.ratio)


def gspo(batch: PolicyBatch, eps_low: float = 3e-4, eps_high: float = 4e-4) -> TokenLoss:
    """The loss `clipped` with the completion's ratio s in place of r (Zheng et al. 2025, arXiv:2507.18071).

    TRL's importance_sampling_level=sequence. Use the token weights sequence_mean; with sequence_sum it is
    LUSPO (arXiv:2602.05261).
    """
    ratio = batch.spread(jnp.exp(batch.mean(batch.log_ratio)))
    return _clipped(ratio, batch.advantages, eps_low, eps_high)


def gspo_token(batch: PolicyBatch, eps_low: float = 3e-4, eps_high: float = 4e-4) -> TokenLoss:
    """gspo for advantages that vary in a completion: its ratio is sg(s) pi / sg(pi) (arXiv:2507.18071)."""
    level = batch.spread(stop_gradient(jnp.exp(batch.mean(batch.log_ratio))))
    ratio = level * jnp.exp(batch.logp - stop_gradient(batch.logp))
    return _clipped(ratio, batch.advantages, eps_low, eps_high)


def cispo(batch: PolicyBatch, max_ratio: float = 5.0) -> TokenLoss:
    """`-sg(min(r, max_ratio)) A log pi`: every token keeps a gradient (MiniMax-M1, arXiv:2506.13585, without
    lower bound).

    max_ratio bounds the ratio itself, as TRL's epsilon_high (5 as in ScaleRL, arXiv:2510.13786).
    """
    return -stop_gradient(jnp.minimum(batch.ratio, max_ratio)) * batch.advantages * batch.logp


def sapo(batch: PolicyBatch, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLoss:
    """`-A sigmoid(tau (r - 1)) 4 / tau`, a soft gate in place of clipping; tau is tau_pos where A > 0, else
    tau_neg.

    Gao et al. 2025, arXiv:2511.20347. At r = 1 its derivative by r equals the derivative of -A r.
    """
    require(
        (tau_pos > 0) & (tau_neg > 0),
        f"sapo: tau_pos and tau_neg must be above 0, got {tau_pos} and {tau_neg}",
    )
    tau = jnp.where(batch.advantages > 0, tau_pos, tau_neg).astype(batch.logp.dtype)
    return -batch.advantages * jax.nn.sigmoid(tau * (batch.ratio - 1)) * 4 / tau


def geo_mean(batch: PolicyBatch, eps_low: float = 0.4, eps_high: float = 0.4) -> TokenLoss:
    """`-A exp(mean of the completion's clipped log-ratios)` (GMPO, Zhao et al. 2025, arXiv:2507.20673).

    A token's log r is clipped to [-eps_low, eps_high] where that increases the loss: above for A > 0, below
    otherwise. The paper's token weights are sequence_mean.
    """
    x = batch.log_ratio
    bounded = jnp.clip(x, -eps_low, eps_high)
    worse = jnp.where(batch.advantages > 0, jnp.minimum(x, bounded), jnp.maximum(x, bounded))
    return -batch.advantages * batch.spread(jnp.exp(batch.mean(worse)))


def vespo(
    batch: PolicyBatch, pos: tuple[float, float] = (2.0, 3.0), neg: tuple[float, float] = (3.0, 2.0)
) -> TokenLoss:
    """`-sg(phi) A log pi`, phi = exp(lam) w^k exp(-lam w), w the product of a completion's ratios
    (arXiv:2602.10693).

    pos, neg: (k, lam) where A >= 0 and where A < 0, with TRL's defaults. log w is clipped to [log 1e-8, 20].
    TRL's w also contains the importance weights of the sampler; set Rules.ratio_to_sampler for that.
    """
    least = jnp.log(1e-8).astype(batch.logp.dtype)
    log_w = jnp.clip(batch.spread(batch.total(batch.log_ratio)), least, MAX_LOG_RATIO)
    up = batch.advantages >= 0
    k, lam = (jnp.where(up, p, n).astype(log_w.dtype) for p, n in zip(pos, neg, strict=True))
    phi = jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))
    return -stop_gradient(phi) * batch.advantages * batch.logp


def near_policy(batch: PolicyBatch, loss: PolicyLoss = clipped, max_nats: float = 2.0) -> TokenLoss:
    """`loss`, but 0 where A < 0 and the completion's mean log pi_old - log pi is above `max_nats`.

    DeepSeek-V3.2 (arXiv:2512.02556); TRL's off_policy_mask_threshold.
    """
    far = batch.spread(batch.mean(batch.old_logp - stop_gradient(batch.logp))) > max_nats
    return jnp.where(far & (batch.advantages < 0), 0, loss(batch))


def with_corrected_kl(
    batch: PolicyBatch, loss: PolicyLoss = clipped, coef: float = 0.04, estimate: Estimator = k3
) -> TokenLoss:
    """`loss + coef r KL`: the KL estimated at tokens that an older policy sampled (DeepSeek-V3.2,
    arXiv:2512.02556).

    TRL's use_bias_correction_kl. Use it with policy(beta=FixedKL(0)), which computes the reference's
    log-probs and adds no penalty; policy's own penalties have no factor r. Raises ValueError without the
    reference's log-probs.
    """
    if batch.reference is None:
        raise ValueError(
            "with_corrected_kl needs the reference's log-probs in the batch. Set policy(beta=FixedKL(0)), "
            "which computes them and adds no penalty"
        )
    return loss(batch) + coef * batch.ratio * estimate(batch.logp, batch.reference)
