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
    """Scores and log-probs of a rollout: N episodes of each of G prompts, n = G N. A completion is an episode
    of one turn. All arrays are over sampled tokens: given ones, such as a tool's results, are left out.

    scores: score of each episode, NaN for none. ended: whether it ended with a stop token rather than at the
    limit. logps, reference, values: one value per token, 0 beyond the length; None without a reference or a
    critic. recomputed: whether logps are the training program's rather than the sampler's. reward_scores:
    scores by each reward, before weights and shaping. turns: number of each token's turn, None if every
    episode has one turn. turn_rewards: the part of the score that a turn has earned, at its last token; None
    for none. kl_coef: coefficient of a KL penalty that belongs in the rewards (policy_losses.KLInReward),
    None without one.
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
        """Tokens of completions that have a score."""
        return adv.token_mask(self.scored_lengths, self.logps.shape[1])

    @property
    def scored_lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of each completion, 0 for one without a score."""
        return (self.lengths * adv.has_score(self.scores)).ravel()


@dataclass(frozen=True)
class AdvantageEstimate:
    """The result of an estimator: advantages and returns (None without a critic) [n, S]; metrics, each a mean
    over the rollout's completions.
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

    kl_coef, kl: as in actor_critic. With a KL penalty in the rewards, kl_coef times the completion's KL is
    subtracted from its score first, as in TRL's RLOO. Raises ValueError if `advantage` can't be called with
    (scores, lengths).

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
    """Give every token its turn's return-to-go within the group: `R_k = r_k + gamma R_(k+1)`.

    Baseline and deviation are over the same turn of the group's episodes. The part of the score that
    no turn has earned is a reward of the last turn. With one turn it is `by_group`. Options: see by_group.
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
    Rules.shape and Rules.scale have no effect on it.
    """
    _require_no_kl(rollout, "by_each")
    total = adv.normalised_sum(rollout.reward_scores, rollout.reward_weights)
    return AdvantageEstimate(_per_token(rollout, np.where(adv.has_score(rollout.scores), total, 0)), None, {})


def group_whitened(rollout: RolloutScores) -> AdvantageEstimate:
    """Subtract each group's mean score, and whiten over all tokens: REINFORCE++ with a group baseline."""
    _require_no_kl(rollout, "group_whitened")
    centred = _per_token(rollout, adv.centred(rollout.scores))
    return AdvantageEstimate(adv.whiten(centred, rollout.token_mask), None, {})


def reinforce(
    rollout: RolloutScores, kl_coef: float | None = None, gamma: float = 1.0, kl: KLEstimate | None = None
) -> AdvantageEstimate:
    """Give every token its return from the score and a KL penalty, whitened over all tokens: REINFORCE++
    (arXiv:2501.03262).

    Options: see actor_critic.
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
    """Give every token its whitened generalised advantage (GAE): PPO.

    A token's reward is `-kl_coef KL_t`, plus the score at the last token. Returns are not whitened.

    kl_coef: None for the coefficient of the objective's KLInReward(...), 0 without one. kl: None for k1.
    """
    if rollout.values is None:
        raise ValueError(
            "actor_critic needs a critic's values. Set policy(critic=...), or use another estimator."
        )
    rewards, metrics = _token_rewards(rollout, _kl_coef(rollout, kl_coef), kl)
    if whiten_rewards:
        rewards = adv.whiten_around_mean(rewards, rollout.token_mask)
    advantages, returns = adv.gae(rewards, rollout.values, rollout.scored_lengths, gamma, lam)
    return AdvantageEstimate(adv.whiten(advantages, rollout.token_mask), returns, metrics)


def example_rollout(group: int, weights: tuple[float, ...], facts: Facts) -> RolloutScores:
    """Return a small rollout with distinct scores, to try an estimator before anything is sampled.

    group: episodes of each prompt. weights: one for each reward. facts: the objective's facts: whether it has
    a reference, values and a KL penalty in the rewards.
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
            f"{setting}={name} can't be called with ({', '.join(arguments)}): {error}. Use these parameters."
        ) from error


def _kl_coef(rollout: RolloutScores, given: float | None) -> float:
    if given is not None:
        return given
    return 0.0 if rollout.kl_coef is None else rollout.kl_coef


def _require_no_kl(rollout: RolloutScores, name: str) -> None:
    if rollout.kl_coef is not None:
        raise ValueError(
            f"this objective puts the KL penalty into the rewards, but the estimator {name} ignores it. "
            "Set policy(beta=NUMBER), or use another estimator."
        )


def _per_token(rollout: RolloutScores, x: GroupScores) -> PerToken:
    lengths, size = rollout.lengths.reshape(-1, 1), rollout.logps.shape[1]
    return np.where(np.arange(size) < lengths, x.reshape(lengths.shape), 0.0)


def _token_rewards(
    rollout: RolloutScores, coef: float, kl: KLEstimate | None
) -> tuple[PerToken, dict[str, float]]:
    """Return (reward of each token, with the KL penalty `coef`; metrics of rewards and entropy)."""
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
    """Add the rewards of turns at their last tokens, and the rest of the score at the episode's last one."""
    of_turns = np.zeros(1) if rollout.turn_rewards is None else rollout.turn_rewards
    of_turns = np.where(rollout.token_mask, of_turns, 0)
    rest = rollout.scores.ravel() - of_turns.sum(1)
    return adv.token_rewards(-(rewards + of_turns), rest, rollout.scored_lengths, 1.0)
