"""KL to the reference: estimators at drawn tokens, and penalties whose coefficient may follow a target.

An estimator is `(logp, reference) -> [B, M]`, for tokens that the policy drew. As a loss only k2's gradient is that of the KL
where the policy has just drawn: k1's is 0 in expectation, k3's is the forward KL's. In a reward any of them serves (Schulman
2020, "Approximating KL divergence"; Tang & Munos 2025, arXiv:2506.09477).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.objectives.numerics import capped, require, square

Estimator = Callable[[Array, Array], Array]


def k1(logp: Float[Array, "B M"], reference: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """`log pi - log pi_ref`: exact in expectation, of either sign, its variance high."""
    return logp - reference


def k2(logp: Float[Array, "B M"], reference: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """`(log pi - log pi_ref)^2 / 2`: not exact, never negative, its variance low."""
    return square(logp - reference) / 2


def k3(logp: Float[Array, "B M"], reference: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """`exp(d) - 1 - d` with d = log pi_ref - log pi: exact in expectation and never negative; GRPO's. The exponent is capped."""
    d = reference - logp
    return jnp.expm1(capped(d)) - d


@dataclass(frozen=True)
class FixedKL:
    """A penalty of `coef` times the estimate; with coef 0 the KL is only measured."""

    coef: float = 0.05
    estimate: Estimator = k3

    def __post_init__(self) -> None:
        require(self.coef >= 0, f"a KL penalty's coef is from 0 up, found {self.coef}")

    def update(self, coef: Any, kl: Any, count: Any) -> Any:
        """The coefficient, which stays."""
        return coef


@dataclass(frozen=True)
class AdaptiveKL:
    """A penalty whose coefficient starts at `coef` and rises while the KL is above `target`.

    Ziegler et al. 2019 (arXiv:1909.08593, section 2.2). target: nats a completion. horizon: completions in which the coefficient
    can change by a factor of about e^0.2.
    """

    coef: float = 0.2
    target: float = 6.0
    horizon: float = 10_000
    estimate: Estimator = k3

    def __post_init__(self) -> None:
        require(
            self.coef > 0,
            f"an adaptive KL penalty begins with a coef above 0, found {self.coef}; 0 would stay 0",
        )
        require(
            self.target > 0 and self.horizon > 0,
            f"target and horizon are above 0, found {self.target} and {self.horizon}",
        )

    def update(self, coef: Any, kl: Any, count: Any) -> Any:
        """`coef (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon)`, after `count` completions of `kl` nats in the mean.

        Numbers or arrays, in a program or outside. policy(...) calls it after each optimizer step that teaches the policy, with
        that step's completions and the KL as it is estimated then: with several passes over a rollout a horizon is as many times
        shorter as in TRL 0.11, which calls it once a rollout with the KL at drawing.
        """
        return coef * (1 + jnp.clip(kl / self.target - 1, -0.2, 0.2) * count / self.horizon)


@dataclass(frozen=True)
class KLInReward:
    """A penalty that the rewards have, as in PPO: the loss has none of it. Its coefficient is aux["kl_coef"].

    An adaptive one counts the completions of each optimizer step, so that each pass over a rollout counts.
    """

    penalty: FixedKL | AdaptiveKL

    @property
    def coef(self) -> float:
        """The coefficient at the start."""
        return self.penalty.coef

    @property
    def estimate(self) -> Estimator:
        """What is logged as the KL."""
        return self.penalty.estimate

    def update(self, coef: Any, kl: Any, count: Any) -> Any:
        """The penalty's own."""
        return self.penalty.update(coef, kl, count)


Penalty = FixedKL | AdaptiveKL | KLInReward
