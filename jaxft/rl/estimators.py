"""What a rollout's scores mean for each token: advantages, and returns where there is a critic. Host side, float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.rl import advantages as adv


@dataclass(frozen=True)
class Sampled:
    """A rollout as numbers: G prompts, N completions of each, n = G N of them in order; per-token arrays [n, S], 0 beyond the
    length. scores: NaN where there is none; each: of every reward alone, as it was given, with its weight in `weights`. aux: has
    the kl_coef of a penalty that belongs in the rewards (kl.KLInReward), else nothing."""

    scores: Float[np.ndarray, "G N"]
    lengths: Int[np.ndarray, "G N"]
    ended: Bool[np.ndarray, "G N"]  # by a stop token, not by the limit
    logps: Float[np.ndarray, "n S"]
    reference: Float[np.ndarray, "n S"] | None
    values: Float[np.ndarray, "n S"] | None
    aux: dict[str, Any]
    each: Float[np.ndarray, "G N K"] | None = None
    weights: tuple[float, ...] = ()

    @property
    def inside(self) -> Bool[np.ndarray, "n S"]:
        """Where there is a token of a completion that has a score."""
        known = adv.scorable(self.scores)
        return adv.inside((self.lengths * known).ravel(), self.logps.shape[1])


@dataclass(frozen=True)
class Estimate:
    """Advantages and returns [n, S]; numbers for the log, each a mean over the rollout."""

    advantages: Float[np.ndarray, "n S"]
    returns: Float[np.ndarray, "n S"] | None
    told: dict[str, float]


def by_group(
    sampled: Sampled, advantage: Callable = adv.grpo, kl_coef: float | None = None, kl: Callable | None = None
) -> Estimate:
    """Every token of a completion has the completion's advantage within its group: GRPO, Dr. GRPO, RLOO, OPO.

    advantage(scores [G, N]) -> [G, N]; one that asks for `lengths` gets those of the completions. kl_coef: with a KL in the
    rewards the scores are less kl_coef times the completion's KL, as in TRL's RLOO; see actor_critic.
    """
    more = {"lengths": sampled.lengths} if adv.asks(advantage, "lengths") else {}
    coef = _coef(sampled, kl_coef)
    rewards, told = _rewards(sampled, coef, kl) if coef else (None, {})
    scores = sampled.scores if rewards is None else _summed(rewards, sampled.scores)
    return Estimate(
        adv.at_tokens(advantage(scores, **more), sampled.lengths, sampled.logps.shape[1]), None, told
    )


def by_each(sampled: Sampled) -> Estimate:
    """Each reward is made an advantage within its group alone, then they are added and standardised (GDPO).

    It takes the rewards as they were given, whatever shape and scale made of their sum.
    """
    if sampled.each is None:
        raise ValueError("by_each needs the scores of each reward, and this rollout has their sum alone")
    found = np.where(adv.scorable(sampled.scores), adv.normalised_sum(sampled.each, sampled.weights), 0)
    return Estimate(adv.at_tokens(found, sampled.lengths, sampled.logps.shape[1]), None, {})


def group_whitened(sampled: Sampled) -> Estimate:
    """REINFORCE++ with a group's baseline: the score less its group's mean, whitened over all tokens."""
    spread = adv.at_tokens(adv.centred(sampled.scores), sampled.lengths, sampled.logps.shape[1])
    return Estimate(adv.whiten(spread, sampled.inside), None, {})


def reinforce(
    sampled: Sampled, kl_coef: float | None = None, gamma: float = 1.0, kl: Callable | None = None
) -> Estimate:
    """REINFORCE++ (arXiv:2501.03262): what is to come of score and -kl_coef KL, whitened over all tokens; see actor_critic."""
    rewards, told = _rewards(sampled, _coef(sampled, kl_coef), kl)
    return Estimate(adv.whiten(adv.returns_to_go(rewards, _flat(sampled), gamma), sampled.inside), None, told)


def actor_critic(
    sampled: Sampled, kl_coef: float | None = None, gamma: float = 1.0, lam: float = 0.95, whiten_rewards: bool = False,
    kl: Callable | None = None,
) -> Estimate:  # fmt: skip
    """PPO's: generalised advantages of `-kl_coef KL_t` and the score at the end, whitened; returns are made before whitening.

    kl_coef: None takes that of the objective's penalty where it is KLInReward(...), else 0. kl(logp, reference) -> per token, k1
    by default.
    """
    if sampled.values is None:
        raise ValueError(
            "actor_critic needs a critic's values; give policy(...) a value, or take an estimate without a critic"
        )
    rewards, told = _rewards(sampled, _coef(sampled, kl_coef), kl)
    if whiten_rewards:
        rewards = adv.whiten_around_mean(rewards, sampled.inside)
    found, returns = adv.gae(rewards, sampled.values, _flat(sampled), gamma, lam)
    return Estimate(adv.whiten(found, sampled.inside), returns, told)


KNOW_NO_KL = (by_each, group_whitened)


def plain(fn: Any) -> Any:
    """The function below partial(...)."""
    while isinstance(fn, partial):
        fn = fn.func
    return fn


def needs_a_group(estimate: Any) -> bool:
    """Whether all advantages are 0 with one completion of each prompt."""
    of = estimate.keywords.get("advantage", adv.grpo) if isinstance(estimate, partial) else adv.grpo
    return plain(estimate) in KNOW_NO_KL or (plain(estimate) is by_group and plain(of) in adv.OF_GROUPS)


def _coef(sampled: Sampled, given: float | None) -> float:
    return float(sampled.aux.get("kl_coef", 0.0)) if given is None else given


def _summed(rewards: Float[np.ndarray, "n S"], scores: Float[np.ndarray, "G N"]) -> Float[np.ndarray, "G N"]:
    """What a completion's tokens have together, NaN where it has no score."""
    return np.where(adv.scorable(scores), rewards.sum(1).reshape(scores.shape), np.nan)


def _flat(sampled: Sampled) -> Int[np.ndarray, " n"]:
    return (sampled.lengths * adv.scorable(sampled.scores)).ravel()


def _rewards(
    sampled: Sampled, coef: float, kl: Callable | None
) -> tuple[Float[np.ndarray, "n S"], dict[str, float]]:
    """Rewards of each token, and TRL's numbers about them."""
    here, scores = sampled.inside, sampled.scores.ravel()
    if coef and sampled.reference is None:
        raise ValueError(
            f"a KL of {coef} in the rewards needs the reference's log-probs; give policy(...) beta=KLInReward(...)"
        )
    away = np.zeros(here.shape)
    if sampled.reference is not None:
        away = np.asarray(kl(sampled.logps, sampled.reference)) if kl else sampled.logps - sampled.reference
    away = np.where(here, away, 0)
    count = max(int(adv.scorable(scores).sum()), 1)
    penalty = -coef * away.sum() / count
    mean, entropy = float(np.nansum(scores)) / count, -float(np.where(here, sampled.logps, 0).sum()) / count
    told = {"objective/non_score_reward": penalty, "objective/rlhf_reward": penalty + mean}
    told |= {"objective/scores": mean, "objective/entropy": entropy}
    return adv.token_rewards(away, scores, _flat(sampled), coef), told
