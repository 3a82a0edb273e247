"""KL to the reference: estimators at sampled tokens, and penalties whose coefficient may follow a target.

An estimator is `(logp, reference) -> [B, M]`, for tokens that the policy sampled. As a loss, only k2 has the
gradient of the KL for samples of the current policy: k1's is 0 in expectation, k3's is the forward KL's. In a
reward any of them serves (Schulman 2020, "Approximating KL divergence"; Tang & Munos 2025, arXiv:2506.09477).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.annotations import above, at_least, check_bounds
from jaxft.objectives.losses.numerics import capped, square

Estimator = Callable[[Array, Array], Array]
Scalar: TypeAlias = float | Array
PenaltyReference = Literal["start", "teacher"]  # the policy at step 0, or the run's second model


def k1(logp: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log pi - log pi_ref`: unbiased, of either sign, with a high variance."""
    return logp - reference


def k2(logp: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, "..."]:
    """`(log pi - log pi_ref)^2 / 2`: biased, never negative, with a low variance."""
    return square(logp - reference) / 2


def k3(logp: Float[Array, "..."], reference: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(d) - 1 - d` with d = log pi_ref - log pi, exponent capped: unbiased and never negative; GRPO's.

    >>> round(float(k3(jnp.asarray(-1.0), jnp.asarray(-2.0))), 3)
    0.368
    """
    d = reference - logp
    return jnp.expm1(capped(d)) - d


@dataclass(frozen=True)
class FixedKL:
    """A penalty of `coef` times the estimate; with coef 0 the KL is only logged."""

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
    """A penalty whose coefficient starts at `coef` and rises while the KL is above `target`.

    Ziegler et al. 2019 (arXiv:1909.08593, section 2.2). target: nats per completion. horizon: the number of
    completions in which the coefficient can change by a factor of about e^0.2.

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

        policy(...) calls it after each optimizer step that updates the policy, with that step's completions
        and their current KL. With several passes over a rollout, a horizon is as many times shorter as in TRL
        0.11, which calls it once per rollout with the KL at sampling.
        """
        return coef * (1 + jnp.clip(kl / self.target - 1, -0.2, 0.2) * count / self.horizon)


@dataclass(frozen=True)
class KLInReward:
    """A penalty that the rewards contain, as in PPO, so that the loss has none. Its coefficient is
    aux["kl_coef"].

    An adaptive one counts the completions of each optimizer step, so that each pass over a rollout counts.
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
        """The reference of the KL."""
        return self.penalty.reference

    def update(self, coef: Scalar, kl: Scalar, count: Scalar) -> Scalar:
        """Update the coefficient as the penalty does."""
        return self.penalty.update(coef, kl, count)


Penalty = FixedKL | AdaptiveKL | KLInReward
