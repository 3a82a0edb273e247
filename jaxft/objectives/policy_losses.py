"""Policy losses: pure functions `(drawn, knobs) -> [B, M]`, a value a token, which policy(...) of policy.py weighs and adds.

Set knobs with `partial(clipped, eps_high=0.28)`. In the docstrings A is the advantage of a token, r = pi / pi_old its ratio,
sg(x) is x without a gradient, s the ratio of a whole completion: the geometric mean of its tokens' ratios. A loss is tied to no
advantage function or weight rule of advantages.py, and the methods that people name are triples of them:

PPO: gae, token_mean, clipped. GRPO: grpo, sequence_mean, clipped. Dr. GRPO: centred, constant_length, clipped. DAPO: grpo,
token_mean, clipped with eps_high=0.28, and groups of equal rewards left out. RLOO: rloo, sequence_sum, plain. REINFORCE++:
whitened returns, token_mean, clipped. GSPO: grpo, sequence_mean, gspo. LUSPO: grpo, sequence_sum, gspo. CISPO: grpo, token_mean,
cispo. GMPO: grpo, sequence_mean, geo_mean. Values and gradients are those of TRL 1.16's GRPOTrainer and of verl where they have
the loss, unless a docstring says what differs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from jaxft.objectives.kl import Estimator, k3
from jaxft.objectives.numerics import require
from jaxft.objectives.pair import response_sums
from jaxft.tree import struct

TokenLoss = Float[Array, "B M"]
FAR = 20.0  # log-ratios are held within +-FAR, where exp and its square stay finite in float32 (verl's bound)


@struct
class Drawn:
    """The read positions of a batch, in no layout that a loss may rely on but `answer`. Only `logp` has a gradient.

    At padding every number is 0. What a loss gives there is ignored but must be finite, and so must be its gradient.
    """

    logp: Float[Array, "B M"]
    old: Float[Array, "B M"]  # log-probs when the completions were drawn
    advantages: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    answer: Int[Array, "B M"]  # 0 .. A-1; A marks padding
    real: Float[Array, "B M"]  # 1 at a completion's token, 0 at padding
    tokens: Float[Array, "B A"]  # read positions of each completion, 1 where it has none

    @property
    def log_ratio(self) -> Float[Array, "B M"]:
        """log pi - log pi_old, held within +-FAR."""
        return jnp.clip(self.logp - self.old, -FAR, FAR)

    @property
    def ratio(self) -> Float[Array, "B M"]:
        """pi / pi_old of each token."""
        return jnp.exp(self.log_ratio)

    def total(self, x: Float[Array, "B M"]) -> Float[Array, "B A"]:
        """Sums of a per-token quantity over each completion."""
        return response_sums(x * self.real, self.answer, ("one",), self.tokens.shape[1])["one"]

    def mean(self, x: Float[Array, "B M"]) -> Float[Array, "B A"]:
        """Means of a per-token quantity over each completion, 0 where it has no tokens."""
        return self.total(x) / self.tokens

    def spread(self, x: Float[Array, "B A"]) -> Float[Array, "B M"]:
        """A value of each completion at each of its tokens (0 at padding)."""
        return jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1))), self.answer, axis=1)


PolicyLoss = Callable[[Drawn], TokenLoss]


def plain(drawn: Drawn) -> TokenLoss:
    """`-A log pi`: the policy gradient (Williams 1992), of tokens that this policy drew. verl's `gpg` (arXiv:2504.02546)."""
    return -drawn.advantages * drawn.logp


def unclipped(drawn: Drawn) -> TokenLoss:
    """`-A r`: the policy gradient of tokens that an older policy drew; r = 1 gives plain's gradient."""
    return -drawn.advantages * drawn.ratio


def clipped(drawn: Drawn, eps_low: float = 0.2, eps_high: float = 0.2) -> TokenLoss:
    """`max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))`: PPO's (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    A higher eps_high than eps_low is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476).
    """
    return _clipped(drawn.ratio, drawn.advantages, eps_low, eps_high)


def _clipped(ratio: Array, advantages: Array, eps_low: float, eps_high: float) -> TokenLoss:
    require((eps_low >= 0) & (eps_low <= 1), f"eps_low is in [0, 1], found {eps_low}")
    require(eps_high >= 0, f"eps_high is from 0 up, found {eps_high}")
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - eps_low, 1 + eps_high))


def dual_clip(drawn: Drawn, eps_low: float = 0.2, eps_high: float = 0.2, most: float = 3.0) -> TokenLoss:
    """clipped, and where A < 0 at most `-A most` (Ye et al. 2019, arXiv:1912.09729; verl's clip_ratio_c).

    The same function as TRL's two-sided clipping with delta = most (INTELLECT-2, arXiv:2505.07291): `max(-A min(r, most),
    -A clip(r))`. Raises ValueError for most <= 1 + eps_high, where the two differ and neither makes sense.
    """
    require(most > 1 + eps_high, f"dual_clip: most is above 1 + eps_high, found {most} and {eps_high}")
    loss, bound = clipped(drawn, eps_low, eps_high), -drawn.advantages * most
    return jnp.where(drawn.advantages < 0, jnp.minimum(loss, bound), loss)


def gspo(drawn: Drawn, eps_low: float = 3e-4, eps_high: float = 4e-4) -> TokenLoss:
    """clipped, with the ratio s of the whole completion for each of its tokens (Zheng et al. 2025, arXiv:2507.18071).

    TRL's importance_sampling_level=sequence. Its weights are sequence_mean; with sequence_sum it is LUSPO (arXiv:2602.05261).
    """
    ratio = drawn.spread(jnp.exp(drawn.mean(drawn.log_ratio)))
    return _clipped(ratio, drawn.advantages, eps_low, eps_high)


def gspo_token(drawn: Drawn, eps_low: float = 3e-4, eps_high: float = 4e-4) -> TokenLoss:
    """gspo for advantages that vary within a completion: the ratio is sg(s) pi / sg(pi) (arXiv:2507.18071)."""
    level = drawn.spread(stop_gradient(jnp.exp(drawn.mean(drawn.log_ratio))))
    ratio = level * jnp.exp(drawn.logp - stop_gradient(drawn.logp))
    return _clipped(ratio, drawn.advantages, eps_low, eps_high)


def cispo(drawn: Drawn, most: float = 5.0) -> TokenLoss:
    """`-sg(min(r, most)) A log pi`: every token keeps a gradient (MiniMax-M1, arXiv:2506.13585, without a lower bound).

    most is a bound of the ratio itself, TRL's epsilon_high (5 as in ScaleRL, arXiv:2510.13786).
    """
    return -stop_gradient(jnp.minimum(drawn.ratio, most)) * drawn.advantages * drawn.logp


def sapo(drawn: Drawn, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLoss:
    """`-A sigmoid(tau (r - 1)) 4 / tau`, tau by the sign of A: a soft gate for clipping (Gao et al. 2025, arXiv:2511.20347).

    At r = 1 the slope is that of -A r.
    """
    require(
        (tau_pos > 0) & (tau_neg > 0), f"sapo: tau_pos and tau_neg are above 0, found {tau_pos} and {tau_neg}"
    )
    tau = jnp.where(drawn.advantages > 0, tau_pos, tau_neg).astype(drawn.logp.dtype)
    return -drawn.advantages * jax.nn.sigmoid(tau * (drawn.ratio - 1)) * 4 / tau


def geo_mean(drawn: Drawn, eps_low: float = 0.4, eps_high: float = 0.4) -> TokenLoss:
    """`-A exp(mean of the completion's clipped log-ratios)` (GMPO, Zhao et al. 2025, arXiv:2507.20673).

    A token's log r is clipped to [-eps_low, eps_high] where that makes it worse: min for A > 0, max else. The paper's weights are
    sequence_mean.
    """
    x = drawn.log_ratio
    bounded = jnp.clip(x, -eps_low, eps_high)
    worse = jnp.where(drawn.advantages > 0, jnp.minimum(x, bounded), jnp.maximum(x, bounded))
    return -drawn.advantages * drawn.spread(jnp.exp(drawn.mean(worse)))


def vespo(
    drawn: Drawn, pos: tuple[float, float] = (2.0, 3.0), neg: tuple[float, float] = (3.0, 2.0)
) -> TokenLoss:
    """`-sg(phi) A log pi`, phi = exp(lam) w^k exp(-lam w) of w, the product of a completion's ratios (arXiv:2602.10693).

    pos, neg: (k, lam) where A >= 0 and where A < 0; log w is held within log 1e-8 and 20. TRL's defaults.
    """
    log_w = jnp.clip(drawn.spread(drawn.total(drawn.log_ratio)), jnp.log(1e-8).astype(drawn.logp.dtype), FAR)
    up = drawn.advantages >= 0
    k, lam = (jnp.where(up, p, n).astype(log_w.dtype) for p, n in zip(pos, neg, strict=True))
    phi = jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))
    return -stop_gradient(phi) * drawn.advantages * drawn.logp


def near_policy(drawn: Drawn, loss: PolicyLoss = clipped, most: float = 2.0) -> TokenLoss:
    """`loss`, and 0 where A < 0 and the completion's mean log pi_old - log pi is above `most` nats.

    DeepSeek-V3.2 (arXiv:2512.02556); TRL's off_policy_mask_threshold.
    """
    far = drawn.spread(drawn.mean(drawn.old - stop_gradient(drawn.logp))) > most
    return jnp.where(far & (drawn.advantages < 0), 0, loss(drawn))


def with_corrected_kl(
    drawn: Drawn, loss: PolicyLoss = clipped, coef: float = 0.04, estimate: Estimator = k3
) -> TokenLoss:
    """`loss + coef r KL`: the KL estimated at tokens that an older policy drew (DeepSeek-V3.2, arXiv:2512.02556).

    TRL's use_bias_correction_kl. It stands in the place of policy(beta=...), which takes r for 1. Raises ValueError without the
    reference's log-probs.
    """
    if drawn.reference is None:
        raise ValueError(
            "with_corrected_kl needs the reference's log-probs; let the rollout give them (Rollout.reference)"
        )
    return loss(drawn) + coef * drawn.ratio * estimate(drawn.logp, drawn.reference)
