"""Rules of a rollout: how completions are scored, which ones are trained on, and with which advantages and
weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from jaxft.annotations import at_least, check_bounds
from jaxft.rl import advantages as adv
from jaxft.rl.advantages import GroupLengths, GroupMask, GroupScores, Moments, ScoresPerReward
from jaxft.rl.estimators import AdvantageEstimator, by_group, require_signature
from jaxft.rl.rewards import EnvironmentReward, Faults, Reward, RewardScores, reward_of, unique_names
from jaxft.rl.token_weights import Correction, TokenWeights, token_mean
from jaxft.rl.trajectory import Episodes

Combine = Callable[[ScoresPerReward, Sequence[float]], GroupScores]
Shape = Callable[[GroupScores, GroupLengths, GroupMask], GroupScores]
Scale = Callable[[GroupScores, Moments], GroupScores]
Filter = Callable[[GroupScores], GroupMask]


@dataclass(frozen=True)
class ScoredEpisodes:
    """Episodes with their scores; NaN for an episode without a score. reward_scores: the scores by each
    reward. combined: the result of Rules.combine. scores: the result of Rules.shape. faults: of the rewards.
    """

    episodes: Episodes
    reward_scores: ScoresPerReward
    combined: GroupScores
    scores: GroupScores
    faults: Faults


@dataclass(frozen=True)
class Rules:
    """Rules by which a rollout is scored and trained on.

    rewards: plain functions of (prompt, completion, row), which become FunctionRewards, functions of TRL with
        an argument `environments`, or other Rewards.
    estimate: the advantage estimator, see estimators.py.
    token_weights: the weight of each completion's tokens in an optimizer batch, see token_weights.py.
    reward_weights: a factor for each reward, 1 by default.
    combine: (scores [G, N, K], reward_weights) -> scores [G, N] of K rewards.
    shape: (scores, lengths, ended) -> scores: penalties and bounds, such as shape_scores; or none.
    scale: (scores, moments of all scores so far) -> scores, such as advantages.scale_scores; or none.
        Metrics show the scores before scaling.
    filter: (scores) -> mask of completions to train on, such as advantages.nonconstant_groups; or none for
        all. It sees the scores before `shape`, so that a group with equal rewards does not pass because of
        its lengths.
    train_on_truncated: whether to train on completions without an end token, cut off at max_new.
    warm_up: number of rollouts at the start that train the critic alone.
    correction: importance weights between sampler and training program, see token_weights.py; none without.
    ratio_to_sampler: whether the ratio of a policy loss is to the sampler's probabilities rather than to the
        training program's at sampling: verl's bypass mode, advised for DPPO (arXiv:2602.04879, section 5.2).

    >>> from jaxft.rl.rewards import exact
    >>> def brief(prompt, completion, row):
    ...     return -len(completion) / 100
    >>> rules = Rules((exact, brief), reward_weights=(1.0, 0.5), filter=adv.nonconstant_groups)
    >>> rules.reward_names, rules.freezes_policy
    (['exact', 'brief'], True)
    """

    rewards: tuple[Reward, ...]
    estimate: AdvantageEstimator = by_group
    token_weights: TokenWeights = token_mean
    reward_weights: tuple[float, ...] = ()
    combine: Combine = adv.weighted_sum
    shape: Shape | None = None
    scale: Scale | None = None
    filter: Filter | None = None
    train_on_truncated: bool = True
    warm_up: Annotated[int, at_least(0)] = 0
    correction: Correction | None = None
    ratio_to_sampler: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "data.rules")
        if not self.rewards:
            raise ValueError("a rollout needs a reward. Set rewards=module:function.")
        rewards = tuple(map(reward_of, self.rewards))
        object.__setattr__(self, "rewards", rewards)
        count, names = len(rewards), ", ".join(self.reward_names)
        if self.reward_weights and len(self.reward_weights) != count:
            raise ValueError(
                f"reward_weights={list(self.reward_weights)} for the rewards {names}. Set one weight for "
                "each reward."
            )
        if not np.isfinite(self.reward_weights).all():
            raise ValueError(f"reward_weights={self.reward_weights} must be finite. Set finite numbers.")
        if not self.reward_weights:
            object.__setattr__(self, "reward_weights", (1.0,) * count)
        require_signature(self.token_weights, "token_weights", ("lengths", "mask", "max_new"))
        if self.filter is not None:
            require_signature(self.filter, "filter", ("scores",))
        if self.correction is not None:
            require_signature(self.correction, "correction", ("log_ratio", "lengths"))
            self.correction(np.zeros((1, 1)), np.ones(1, int))  # it checks its bounds
            if self.ratio_to_sampler:
                raise ValueError(
                    "correction is for a ratio to the training program, and ratio_to_sampler=true is a "
                    "ratio to the sampler. Set only one of them."
                )

    @property
    def reward_names(self) -> list[str]:
        """Names of the rewards in metrics, made unique."""
        return unique_names(self.rewards)

    @property
    def freezes_policy(self) -> bool:
        """True if an optimizer step may contain no completion to train the policy on."""
        return bool(self.warm_up) or self.filter is not None or not self.train_on_truncated

    @property
    def turn_weight(self) -> float:
        """The weight of per-turn rewards: the environment's entry of reward_weights, 0 if the environment's
        score is no reward of the run.
        """
        is_environment = [isinstance(reward, EnvironmentReward) for reward in self.rewards]
        return float(np.dot(is_environment, self.reward_weights))

    def score(self, episodes: Episodes, by_reward: Sequence[RewardScores]) -> ScoredEpisodes:
        """Combine and shape the scores of each reward.

        A reward that skips an episode adds 0 to the episode's score. An episode has no score (NaN) if it has
        a fault, if a reward failed on it, or if all rewards skip it.
        """
        lengths, valid = episodes.lengths, episodes.valid
        each = np.stack([reward.scores for reward in by_reward], 1).astype(np.float64)
        each = np.where(valid[..., None], each.reshape(*lengths.shape, len(by_reward)), np.nan)
        skips = np.stack([np.broadcast_to(reward.skips, valid.size) for reward in by_reward], 1)
        skips = skips.reshape(each.shape) & valid[..., None]
        skips &= ~skips.all(-1, keepdims=True)
        combined = scores = self.combine(np.where(skips, 0.0, each), self.reward_weights)
        if self.shape is not None:
            scores = self.shape(combined, lengths, episodes.ended)
        faults = sum((reward.faults for reward in by_reward), Faults())
        return ScoredEpisodes(episodes, each, combined, scores, faults)

    def policy_mask(self, scored: ScoredEpisodes) -> GroupMask:
        """Return the mask of episodes that the policy is trained on."""
        mask = adv.has_score(scored.scores) & (scored.episodes.ended | self.train_on_truncated)
        return mask & (True if self.filter is None else self.filter(scored.combined))


def fault_messages(scored: ScoredEpisodes) -> dict[str, str]:
    """Return a message about the first fault of each kind, by kind; "reward" for faults of rewards."""
    messages = {}
    if scored.faults.first:
        messages["reward"] = (
            f"{scored.faults.first}; this completion has no score. Further faults are only counted."
        )
    episodes = scored.episodes
    for trajectory, row in zip(episodes.trajectories, episodes.row_names, strict=True):
        for kind, text in trajectory.faults:
            what = "this episode has no score" if kind == trajectory.fault else "the policy was shown it"
            message = f"{kind}: {text} ({row}); {what}. Further faults of this kind are only counted."
            messages.setdefault(kind, message)
    return messages


def shape_scores(
    scores: GroupScores,
    lengths: GroupLengths,
    ended: GroupMask,
    missing_eos: float = 0.0,
    limit: float | None = None,
    overlong: tuple[int, int] | None = None,
) -> GroupScores:
    """Clip scores to +-limit, add the overlong penalty and subtract missing_eos from truncated completions.

    Set its options with partial to use it as Rules.shape. limit, overlong: None for neither. overlong:
    (max_new, soft) of advantages.overlong.
    """
    scores = scores if limit is None else adv.clip_scores(scores, -limit, limit)
    scores = scores if overlong is None else scores + adv.overlong(lengths, *overlong)
    return adv.missing_eos(scores, ended, missing_eos)
