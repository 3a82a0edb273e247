"""Metrics of a rollout, with TRL's names where TRL has them."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from jaxft.objectives.alarms import (
    CLIPPED_RATIO,
    FAULTS_NOT_A_NUMBER,
    FAULTS_RAISED,
    FRAC_LEARNED,
    REWARD_STD,
    ZERO_STD,
)
from jaxft.objectives.metrics import PROMPT_COUNT, Max, Min, Sum
from jaxft.rl.advantages import GroupScores, has_score, nonconstant_groups, token_mask
from jaxft.rl.completions import Completions, Faults, ScoredCompletions
from jaxft.rl.estimators import RolloutScores
from jaxft.runs.metric_names import REWARD
from jaxft.tree import Metrics

NO_SCORE = "frac_unscorable"  # a fraction of the completions
MEAN_LENGTH, MIN_LENGTH, MAX_LENGTH = (f"completions/{name}_length" for name in ("mean", "min", "max"))
TERMINATED_LENGTHS = {name: f"completions/{name}_terminated_length" for name in ("mean", "min", "max")}
EOS_TOKENS = "val/num_eos_tokens"
KL = "objective/kl"
LOGP_DIFFERENCE_MEAN = "sampling/sampling_logp_difference/mean"
LOGP_DIFFERENCE_MAX = "sampling/sampling_logp_difference/max"
REWARD_FAULTS = {"raised": FAULTS_RAISED, "not_a_number": FAULTS_NOT_A_NUMBER}

MaybeMeans = dict[str, float | None]  # None for a mean over nothing


def reward_mean(name: str) -> str:
    """Return the name of the mean of one reward."""
    return f"rewards/{name}/mean"


def reward_deviation(name: str) -> str:
    """Return the name of the standard deviation of one reward."""
    return f"rewards/{name}/std"


def score_metrics(scores: GroupScores) -> dict[str, float]:
    """Return mean and deviation of the scores, and the fractions without a score and of constant groups."""
    valid = has_score(scores)
    x = np.asarray(scores, np.float64)[valid]
    constant = ~nonconstant_groups(scores)[:, :1]
    metrics = {NO_SCORE: float((~valid).mean()), ZERO_STD: float(constant.mean())}
    if len(x):
        metrics[REWARD] = float(x.mean())
    if len(x) > 1:
        metrics[REWARD_STD] = float(x.std(ddof=1))
    return metrics


def source_rewards(parts: Sequence[ScoredCompletions]) -> dict[str, Sum]:
    """Return the mean score of the completions of each source of prompts; {} for one source."""
    prompts = [part.completions.prompts for part in parts]
    sources = np.array([number for own in prompts for number in own.sources], np.int64)
    if not len(sources):
        return {}
    scores = np.concatenate([part.scores for part in parts])
    valid = has_score(scores)
    found = {}
    for number, name in enumerate(prompts[0].source_names):
        own = scores[sources == number][valid[sources == number]]
        found[f"{REWARD}/{name}"] = Sum(np.float64(own.sum()), np.float64(own.size))
    return found


def prompt_counts(
    names: Sequence[str], scores: GroupScores, reward_scores: Float[np.ndarray, "G N K"]
) -> dict[str, float]:
    """Return the number of prompts with a score of the mean reward, and of the mean of each reward that is 0
    or 1 for every completion: the completions of one prompt are not independent of one another.
    """
    parts = {REWARD: np.asarray(scores, np.float64)}
    parts |= {reward_mean(name): reward_scores[..., number] for number, name in enumerate(names)}
    counts = {name: (~np.isnan(x)).any(1).sum() for name, x in parts.items() if _are_fractions(x)}
    return {name + PROMPT_COUNT: float(count) for name, count in counts.items() if count}


def _are_fractions(x: np.ndarray) -> bool:
    return bool(np.isin(x[~np.isnan(x)], (0.0, 1.0)).all())


def reward_metrics(names: Sequence[str], reward_scores: Float[np.ndarray, "G N K"]) -> MaybeMeans:
    """Return mean and standard deviation of each reward, None if too few completions have a score."""
    metrics: MaybeMeans = {}
    for name, x in zip(names, reward_scores.reshape(-1, len(names)).T, strict=True):
        valid = x[~np.isnan(x)]
        metrics[reward_mean(name)] = float(valid.mean()) if len(valid) else None
        metrics[reward_deviation(name)] = float(valid.std(ddof=1)) if len(valid) > 1 else None
    return metrics


def fault_metrics(faults: Faults, count: int) -> dict[str, float]:
    """Return the fraction of `count` calls of rewards that raised, and that returned no finite number."""
    counts = {"raised": faults.raised, "not_a_number": faults.not_a_number}
    return {REWARD_FAULTS[kind]: x / count for kind, x in counts.items()}


def as_sums(means: Mapping[str, float | None], count: int) -> Metrics:
    """Return means over `count` completions as sums that add over steps; None is not logged."""

    def as_sum(mean: float | None) -> Sum:
        if mean is None:
            return Sum(np.float64(0), np.float64(0))
        return Sum(np.float64(mean * count), np.float64(count))

    return {name: as_sum(mean) for name, mean in means.items()}


def rollout_metrics(
    names: Sequence[str],
    scored: ScoredCompletions,
    rollout: RolloutScores,
    trained_on: Bool[np.ndarray, "..."],
    recomputed: bool,
) -> Metrics:
    """Return the metrics of a rollout, the same names every time.

    names: of the rewards. trained_on: completions that the policy is trained on. recomputed: whether the
    log-probs of `rollout` are the training program's rather than the sampler's.
    """
    completions = scored.completions
    lengths, ended, count = completions.lengths.ravel(), completions.ended.ravel(), completions.lengths.size
    means: MaybeMeans = {REWARD: None, REWARD_STD: None, **score_metrics(scored.scores)}
    if completions.lengths.shape[1] == 1:
        means.pop(ZERO_STD)  # it is about groups
    means |= _length_metrics([completions])
    means |= {FRAC_LEARNED: float(trained_on.mean())}
    means |= fault_metrics(scored.faults, scored.reward_scores.size)
    means[EOS_TOKENS] = float(ended.sum())
    terminated = lengths[ended]
    for name, reduce in (("mean", np.mean), ("min", np.min), ("max", np.max)):
        means[TERMINATED_LENGTHS[name]] = float(reduce(terminated)) if len(terminated) else None
    means |= reward_metrics(names, scored.reward_scores)
    if rollout.reference is not None:
        means[KL] = float((rollout.logps - rollout.reference).sum() / count)
    metrics = as_sums(means, count) | source_rewards([scored])
    if recomputed:
        mask = token_mask(lengths, rollout.logps.shape[1])
        difference = np.abs(completions.sampler_logps - rollout.logps)[mask]  # two programs, one model
        metrics[LOGP_DIFFERENCE_MEAN] = Sum(np.float64(difference.sum()), np.float64(difference.size))
        metrics[LOGP_DIFFERENCE_MAX] = Max(np.float64(difference.max()))
    metrics[MIN_LENGTH] = Min(np.float64(lengths.min()))
    metrics[MAX_LENGTH] = Max(np.float64(lengths.max()))
    return metrics


def evaluation_metrics(
    names: Sequence[str], parts: Sequence[ScoredCompletions], rollouts: Sequence[RolloutScores]
) -> dict[str, float]:
    """Return the metrics of held-out prompts. rollouts: the parts with a reference's log-probs, or none."""
    scores = np.concatenate([part.scores for part in parts])
    reward_scores = np.concatenate([part.reward_scores for part in parts])
    metrics = _length_metrics([part.completions for part in parts])
    metrics |= {name: x for name, x in score_metrics(scores).items() if name != ZERO_STD}
    metrics |= {name: x for name, x in reward_metrics(names, reward_scores).items() if x is not None}
    metrics |= prompt_counts(names, scores, reward_scores)
    metrics |= fault_metrics(sum((part.faults for part in parts), Faults()), reward_scores.size)
    by_source = source_rewards(parts).items()
    metrics |= {name: float(x.total / x.weight) for name, x in by_source if x.weight}
    if rollouts:
        kl = sum((rollout.logps - rollout.reference).sum() for rollout in rollouts)
        metrics[KL] = float(kl / scores.size)
    return metrics


def _length_metrics(parts: Sequence[Completions]) -> dict[str, float]:
    lengths = np.concatenate([part.lengths for part in parts])
    ended = np.concatenate([part.ended for part in parts])
    return {MEAN_LENGTH: float(lengths.mean()), CLIPPED_RATIO: float((~ended).mean())}
