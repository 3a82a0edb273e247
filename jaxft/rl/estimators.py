"""Estimate advantages of tokens, and returns for a critic, from the scores of a rollout.

NumPy in float64, on the host.

An estimator is a function RolloutScores -> AdvantageEstimate. Set its options with partial, as in
partial(actor_critic, lam=0.9).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxft.objectives.objective import Facts
from jaxft.rl import advantages as adv
from jaxft.rl.advantages import Advantage, GroupLengths, GroupMask, GroupScores, PerToken, ScoresPerReward

# Metrics, with TRL's names
NON_SCORE_REWARD, RLHF_REWARD = "objective/non_score_reward", "objective/rlhf_reward"
MEAN_SCORE, ENTROPY = "objective/scores", "objective/entropy"

KLEstimate = Callable[[PerToken, PerToken], PerToken]  # (log-probs, the reference's) -> KL of each token


@dataclass(frozen=True)
class RolloutScores:
    """Scores and log-probs of a rollout: n = G N episodes, N of each of G prompts, in the order of prompts.

    An episode of one turn is a completion. S: the most tokens that an episode samples. Arrays [n, S] have a
    value for each sampled token and 0 beyond an episode's length; tokens that the environment gave, such as a
    tool's result, are in no array.

    scores: score of each episode, NaN for none. lengths: sampled tokens of each episode. ended: whether no
    limit of tokens or turns and no fault ended it. logps: the policy's log-probs, by the training program if
    `recomputed`, else by the sampler. reference: the reference's log-probs, None without a reference. values:
    a critic's values, None without a critic. reward_scores: score by each reward, before weights and
    penalties. turns: index of the turn of each token, from 0. turn_rewards: reward of each turn at its last
    token, 0 at others; it is a part of the episode's score. Both are None if all episodes have one turn.
    kl_coef: coefficient of a KL penalty that belongs in the rewards (policy_losses.KLInReward), None without
    such a penalty.
    """

    scores: GroupScores
    lengths: GroupLengths
    ended: GroupMask
    logps: Float[np.ndarray, "n S"]
    reference: Float[np.ndarray, "n S"] | None
    values: Float[np.ndarray, "n S"] | None
    reward_scores: ScoresPerReward
    reward_weights: tuple[float, ...]
    kl_coef: float | None = None
    turns: Int[np.ndarray, "n S"] | None = None
    turn_rewards: Float[np.ndarray, "n S"] | None = None
    recomputed: bool = False

    @property
    def token_mask(self) -> Bool[np.ndarray, "n S"]:
        """Mask of the sampled tokens of episodes that have a score."""
        return adv.token_mask(self.scored_lengths, self.logps.shape[1])

    @property
    def scored_lengths(self) -> Int[np.ndarray, " n"]:
        """Sampled tokens of each episode, 0 for an episode without a score."""
        return (self.lengths * adv.has_score(self.scores)).ravel()


@dataclass(frozen=True)
class AdvantageEstimate:
    """The result of an estimator. advantages: of each sampled token. returns: the values that a critic is
    trained to predict, None from an estimator that uses no critic. metrics: means over the rollout's
    episodes, by name.
    """

    advantages: Float[np.ndarray, "n S"]
    returns: Float[np.ndarray, "n S"] | None
    metrics: dict[str, float]


AdvantageEstimator = Callable[[RolloutScores], AdvantageEstimate]


def by_group(
    rollout: RolloutScores,
    advantage: Advantage = adv.grpo,
    kl_coef: float | None = None,
    kl: KLEstimate | None = None,
) -> AdvantageEstimate:
    """Give every token its completion's advantage within the group: GRPO, Dr. GRPO, RLOO, OPO.

    advantage: a function (scores, lengths) -> advantages; ValueError is raised if it cannot be called so.
    kl_coef, kl: as in actor_critic. With a KL penalty in the rewards, kl_coef times the completion's KL is
    subtracted from its score first, as in TRL's RLOO.

    >>> rollout = example_rollout(group=2, weights=(1.0,), facts=Facts())
    >>> rollout.scores
    array([[0., 1.],
           [2., 3.]])
    >>> by_group(rollout, adv.rloo).advantages
    array([[-1., -1., -1.],
           [ 1.,  1.,  1.],
           [-1., -1., -1.],
           [ 1.,  1.,  1.]])
    """
    require_signature(advantage, "advantage", ("scores", "lengths"))
    coef, scores = _kl_coef(rollout, kl_coef), rollout.scores
    metrics: dict[str, float] = {}
    if coef:
        rewards, metrics = _token_rewards(rollout, coef, kl)
        total = rewards.sum(1).reshape(scores.shape)
        scores = np.where(adv.has_score(scores), total, np.nan)
    return AdvantageEstimate(_per_token(rollout, advantage(scores, rollout.lengths)), None, metrics)


def by_turn(rollout: RolloutScores, advantage: Advantage = adv.grpo, gamma: float = 1.0) -> AdvantageEstimate:
    """Give every token the advantage of its turn: turn k of an episode is compared with turn k of the other
    episodes of its group.

    `advantage` (see by_group) is applied to the returns of turn k, `R_k = r_k + gamma R_(k+1)`, where r_k is
    the turn's reward. An episode's last turn also gets the part of the score that is in no turn's reward. If
    all episodes have one turn, the result is by_group's. Raises ValueError for an objective with a KL penalty
    in the rewards.
    """
    _require_no_kl(rollout, "by_turn")
    mask = rollout.token_mask
    turns = np.zeros(mask.shape, int) if rollout.turns is None else rollout.turns
    count = 1 + int(turns[mask].max(initial=0))
    rewards = _with_turn_rewards(rollout, np.zeros(mask.shape))
    by_turns = np.stack([np.where(turns == k, rewards, 0).sum(1) for k in range(count)], 1)
    has_turn = np.stack([((turns == k) & mask).any(1) for k in range(count)], 1)
    returns, out, shape = np.zeros(len(mask)), np.zeros(mask.shape), rollout.scores.shape
    for k in reversed(range(count)):
        returns = by_turns[:, k] + gamma * returns
        of_turn = np.where(has_turn[:, k], returns, np.nan).reshape(shape)
        turn_advantages = advantage(of_turn, rollout.lengths).reshape(-1, 1)
        out = np.where((turns == k) & mask, turn_advantages, out)
    return AdvantageEstimate(out, None, {})


def by_each(rollout: RolloutScores) -> AdvantageEstimate:
    """Compute GRPO's advantages of each reward, and standardise their weighted sum: GDPO (arXiv:2601.05242).

    Rules.shape and Rules.scale have no effect on it. Raises ValueError for a KL penalty in the rewards.
    """
    _require_no_kl(rollout, "by_each")
    total = adv.normalised_sum(rollout.reward_scores, rollout.reward_weights)
    return AdvantageEstimate(_per_token(rollout, np.where(adv.has_score(rollout.scores), total, 0)), None, {})


def group_whitened(rollout: RolloutScores) -> AdvantageEstimate:
    """Subtract each group's mean from its scores, and whiten over all tokens: REINFORCE++ with a group
    baseline. Raises ValueError for a KL penalty in the rewards.
    """
    _require_no_kl(rollout, "group_whitened")
    centred = _per_token(rollout, adv.centred(rollout.scores))
    return AdvantageEstimate(adv.whiten(centred, rollout.token_mask), None, {})


def reinforce(
    rollout: RolloutScores, kl_coef: float | None = None, gamma: float = 1.0, kl: KLEstimate | None = None
) -> AdvantageEstimate:
    """Give every token its return, the sum of the later rewards, whitened over all tokens: REINFORCE++
    (arXiv:2501.03262).

    Rewards and kl_coef, gamma, kl: see actor_critic.
    """
    rewards, metrics = _token_rewards(rollout, _kl_coef(rollout, kl_coef), kl)
    returns = adv.returns_to_go(rewards, rollout.scored_lengths, gamma)
    return AdvantageEstimate(adv.whiten(returns, rollout.token_mask), None, metrics)


def actor_critic(
    rollout: RolloutScores,
    kl_coef: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    kl: KLEstimate | None = None,
) -> AdvantageEstimate:
    """Give every token its generalised advantage (GAE), whitened over all tokens: PPO.

    A token's reward is `-kl_coef KL_t`, plus the turn's reward at a turn's last token, plus the remaining
    score at the last token of the episode. Returns are not whitened. Raises ValueError without a critic's
    values, and for kl_coef without a reference.

    kl_coef: None for the coefficient of the objective's KLInReward(...), or 0 if the objective has none.
    gamma, lam: discount and lambda of GAE. whiten_rewards: whether to whiten the rewards first, with their
    mean added again. kl: (log-probs, the reference's) -> KL of each token; None for their difference, k1.
    """
    if rollout.values is None:
        raise ValueError(
            "estimate=actor_critic needs a critic's values. Set policy(critic=...), or estimate=reinforce."
        )
    rewards, metrics = _token_rewards(rollout, _kl_coef(rollout, kl_coef), kl)
    if whiten_rewards:
        rewards = adv.whiten_around_mean(rewards, rollout.token_mask)
    advantages, returns = adv.gae(rewards, rollout.values, rollout.scored_lengths, gamma, lam)
    return AdvantageEstimate(adv.whiten(advantages, rollout.token_mask), returns, metrics)


def example_rollout(group: int, weights: tuple[float, ...], facts: Facts) -> RolloutScores:
    """Return a small rollout with distinct scores, to try an estimator before anything is sampled.

    group: episodes of each prompt. weights: one for each reward. facts: of the run's objective, which say
    whether the rollout has a reference, a critic's values and a KL penalty in the rewards.
    """
    scores = np.arange(2.0 * group).reshape(2, group)
    tokens = np.zeros((2 * group, 3))
    return RolloutScores(
        scores=scores,
        lengths=np.full((2, group), 3),
        ended=np.ones((2, group), bool),
        logps=tokens,
        reference=None if facts.reference == "none" else tokens,
        values=tokens if facts.critic else None,
        reward_scores=np.repeat(scores[..., None], len(weights), -1),
        reward_weights=weights,
        kl_coef=0.1 if facts.kl_in_rewards else None,
    )


def require_signature(fn: Callable, setting: str, arguments: tuple[str, ...]) -> None:
    """Raise ValueError, naming the setting, if `fn` can't be called with these positional arguments."""
    try:
        inspect.signature(fn).bind(*arguments)
    except TypeError as error:
        name = fn.__name__ if inspect.isfunction(fn) else repr(fn)
        raise ValueError(
            f"{setting}={name} can't be called with ({', '.join(arguments)}): {error}. "
            "Give the function these parameters."
        ) from error


def _kl_coef(rollout: RolloutScores, given: float | None) -> float:
    if given is not None:
        return given
    return 0.0 if rollout.kl_coef is None else rollout.kl_coef


def _require_no_kl(rollout: RolloutScores, name: str) -> None:
    if rollout.kl_coef is not None:
        raise ValueError(
            f"this objective puts the KL penalty into the rewards, but the estimator {name} ignores it. "
            "Set policy(beta=NUMBER), or use an estimator with a KL penalty, such as by_group or reinforce."
        )


def _per_token(rollout: RolloutScores, x: GroupScores) -> PerToken:
    lengths, size = rollout.lengths.reshape(-1, 1), rollout.logps.shape[1]
    return np.where(np.arange(size) < lengths, x.reshape(lengths.shape), 0.0)


def _token_rewards(
    rollout: RolloutScores, coef: float, kl: KLEstimate | None
) -> tuple[PerToken, dict[str, float]]:
    """Return (reward of each token; metrics of rewards, KL and entropy). kl: see actor_critic. Raises
    ValueError for a coefficient without a reference.
    """
    mask, scores = rollout.token_mask, rollout.scores.ravel()
    if coef and rollout.reference is None:
        raise ValueError(
            f"a KL penalty of {coef} in the rewards needs the reference's log-probs. Set "
            "policy(beta=KLInReward(...))."
        )
    kl_values = np.zeros(mask.shape)
    if rollout.reference is not None:
        kl_values = (
            np.asarray(kl(rollout.logps, rollout.reference)) if kl else rollout.logps - rollout.reference
        )
    kl_values = np.where(mask, kl_values, 0)
    count = max(int(adv.has_score(scores).sum()), 1)
    penalty = -coef * kl_values.sum() / count
    mean = float(np.nansum(scores)) / count
    entropy = -float(np.where(mask, rollout.logps, 0).sum()) / count
    metrics = {
        NON_SCORE_REWARD: penalty,
        RLHF_REWARD: penalty + mean,
        MEAN_SCORE: mean,
        ENTROPY: entropy,
    }
    return _with_turn_rewards(rollout, -coef * kl_values), metrics


def _with_turn_rewards(rollout: RolloutScores, rewards: PerToken) -> PerToken:
    """Add each turn's reward at the turn's last token, and the remaining score at the episode's last one."""
    of_turns = np.zeros(1) if rollout.turn_rewards is None else rollout.turn_rewards
    of_turns = np.where(rollout.token_mask, of_turns, 0)
    rest = rollout.scores.ravel() - of_turns.sum(1)
    return adv.token_rewards(-(rewards + of_turns), rest, rollout.scored_lengths, 1.0)
