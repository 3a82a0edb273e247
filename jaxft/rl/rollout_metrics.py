"""Metrics of a rollout, with TRL's names where TRL has them."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from jaxft.nn.tree import Metrics
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
from jaxft.rl.environments import tools
from jaxft.rl.episodes import LARGE_OBSERVATION, LONG_PROMPT, RAISED, TEMPLATE, TIME_OUT, WRONG_TYPE
from jaxft.rl.estimators import RolloutScores
from jaxft.rl.rollout_rules import ScoredEpisodes
from jaxft.rl.trajectory import NO_LENGTH, Episodes
from jaxft.runs.metrics_log import REWARD

NO_SCORE = "frac_unscorable"  # a fraction of the completions
MEAN_LENGTH, MIN_LENGTH, MAX_LENGTH = (f"completions/{name}_length" for name in ("mean", "min", "max"))
TERMINATED_LENGTHS = {name: f"completions/{name}_terminated_length" for name in ("mean", "min", "max")}
EOS_TOKENS = "val/num_eos_tokens"
KL = "objective/kl"
LOGP_DIFFERENCE_MEAN = "sampling/sampling_logp_difference/mean"
LOGP_DIFFERENCE_MAX = "sampling/sampling_logp_difference/max"
TURNS, GIVEN_TOKENS = "episodes/turns", "episodes/given_tokens"  # means over episodes
TOOL_CALLS, TOOL_FAILURES = "tools/call_frequency", "tools/failure_frequency"  # of an episode; of a call
TOOL_ERRORS = (
    tools.UNKNOWN_TOOL, tools.MALFORMED_CALL, tools.BAD_ARGUMENTS, tools.TOOL_ERROR, tools.LARGE_RESULT,
    tools.TOO_MANY_CALLS,
)  # fmt: skip
EXCLUDING = (
    TIME_OUT, RAISED, WRONG_TYPE, LARGE_OBSERVATION, TEMPLATE, LONG_PROMPT, NO_LENGTH,
)  # fmt: skip

MaybeMeans = dict[str, float | None]  # None for a mean over nothing


def score_metrics(scores: GroupScores) -> dict[str, float]:
    """Return mean and deviation of the scores, and the fractions without a score and of groups with equal
    scores. The mean is missing if there is no score, the deviation if there are fewer than two.
    """
    valid = has_score(scores)
    x = np.asarray(scores, np.float64)[valid]
    constant = ~nonconstant_groups(scores)[:, :1]
    metrics = {NO_SCORE: float((~valid).mean()), ZERO_STD: float(constant.mean())}
    if len(x):
        metrics[REWARD] = float(x.mean())
    if len(x) > 1:
        metrics[REWARD_STD] = float(x.std(ddof=1))
    return metrics


def source_rewards(scored: ScoredEpisodes) -> dict[str, Sum]:
    """Return the mean score of each dataset's completions, by name; {} for a single dataset."""
    prompts, means = scored.episodes.prompts, dict[str, Sum]()
    for number, name in enumerate(prompts.source_names):
        scores = scored.scores[np.array(prompts.sources) == number]
        scores = scores[has_score(scores)]
        means[f"{REWARD}/{name}"] = Sum(np.float64(scores.sum()), np.float64(scores.size))
    return means


def prompt_counts(
    names: Sequence[str], scores: GroupScores, reward_scores: Float[np.ndarray, "G N K"]
) -> dict[str, float]:
    """For each mean reward whose values are all 0 or 1, count the prompts with a score.

    Confidence intervals use these counts, because completions of one prompt are not independent. Keys are the
    names of the means, followed by PROMPT_COUNT.
    """
    parts = {REWARD: np.asarray(scores, np.float64)}
    parts |= {f"rewards/{name}/mean": reward_scores[..., number] for number, name in enumerate(names)}
    fractions = {name: x for name, x in parts.items() if np.isin(x[~np.isnan(x)], (0.0, 1.0)).all()}
    counts = {name: (~np.isnan(x)).any(1).sum() for name, x in fractions.items()}
    return {name + PROMPT_COUNT: float(count) for name, count in counts.items() if count}


def _means(names: Sequence[str], scored: ScoredEpisodes) -> MaybeMeans:
    """Return the means that rollouts and evaluations log; None where too few completions have a score."""
    episodes, faults, count = scored.episodes, scored.faults, scored.reward_scores.size
    lengths, ended = episodes.lengths[episodes.valid], episodes.ended[episodes.valid]
    means: MaybeMeans = {REWARD: None, REWARD_STD: None, **score_metrics(scored.scores)}
    means[MEAN_LENGTH] = float(lengths.mean()) if len(lengths) else None
    means[CLIPPED_RATIO] = float((~ended).mean()) if len(lengths) else None
    means |= {FAULTS_RAISED: faults.raised / count, FAULTS_NOT_A_NUMBER: faults.not_a_number / count}
    for name, x in zip(names, scored.reward_scores.reshape(-1, len(names)).T, strict=True):
        valid = x[~np.isnan(x)]
        means[f"rewards/{name}/mean"] = float(valid.mean()) if len(valid) else None
        means[f"rewards/{name}/std"] = float(valid.std(ddof=1)) if len(valid) > 1 else None
    return means


def episode_metrics(episodes: Episodes) -> dict[str, Sum]:
    """Return turns, given tokens, tool calls and faults of episodes of several turns; {} for others.

    `tools/errors/KIND` counts calls that were answered with an error, `episodes/faults/KIND` episodes that
    are excluded from training and means; both are per episode.
    """
    if episodes.most_turns == 1:
        return {}
    count, valid = np.float64(len(episodes.trajectories)), [t for t in episodes.trajectories if not t.fault]
    calls = [len(turn.get("tool_calls") or ()) for t in valid for turn in t.turns]
    shown = Counter(fault.kind for t in episodes.trajectories for fault in t.faults)
    excluded = Counter(t.fault for t in episodes.trajectories)

    def mean(values: Sequence[int], over: int) -> Sum:
        return Sum(np.float64(sum(values)), np.float64(over))

    errors = [shown[kind] for kind in TOOL_ERRORS]
    return {
        TURNS: mean([len(t.sampled) for t in valid], len(valid)),
        GIVEN_TOKENS: mean([t.given_count for t in valid], len(valid)),
        TOOL_CALLS: mean(calls, len(valid)),
        TOOL_FAILURES: mean(errors, max(sum(calls), sum(errors))),
        **{f"tools/errors/{kind}": Sum(np.float64(shown[kind]), count) for kind in TOOL_ERRORS},
        **{f"episodes/faults/{kind}": Sum(np.float64(excluded[kind]), count) for kind in EXCLUDING},
    }


def as_sums(means: Mapping[str, float | None], count: int) -> Metrics:
    """Return means over `count` completions as sums that add over steps; None gets weight 0."""
    weights = {name: np.float64(0 if mean is None else count) for name, mean in means.items()}
    return {name: Sum(np.float64((mean or 0) * count), weights[name]) for name, mean in means.items()}


def rollout_metrics(
    names: Sequence[str], scored: ScoredEpisodes, rollout: RolloutScores, trained_on: Bool[np.ndarray, "..."]
) -> Metrics:
    """Return the metrics of a rollout, the same names every time.

    names: names of the rewards. trained_on: completions that the policy is trained on.
    """
    episodes = scored.episodes
    valid, count = episodes.valid, episodes.lengths.size
    lengths, ended = episodes.lengths[valid], episodes.ended[valid]
    means = _means(names, scored)
    if episodes.group == 1:
        means.pop(ZERO_STD)  # it is about groups
    means[FRAC_LEARNED] = float(trained_on.mean())
    means[EOS_TOKENS] = float(ended.sum())
    terminated = lengths[ended]
    for name, reduce in (("mean", np.mean), ("min", np.min), ("max", np.max)):
        means[TERMINATED_LENGTHS[name]] = float(reduce(terminated)) if len(terminated) else None
    if rollout.reference is not None:
        means[KL] = _kl(episodes, rollout)
    metrics = as_sums(means, count) | source_rewards(scored) | episode_metrics(episodes)
    if rollout.recomputed:
        mask = token_mask(episodes.lengths.ravel(), episodes.size)
        difference = np.abs(episodes.logps - rollout.logps)[mask]  # two programs, one model
        metrics[LOGP_DIFFERENCE_MEAN] = Sum(np.float64(difference.sum()), np.float64(difference.size))
        metrics[LOGP_DIFFERENCE_MAX] = Max(np.float64(difference.max(initial=0)))
    metrics[MIN_LENGTH] = Min(np.float64(lengths.min(initial=episodes.size)))
    metrics[MAX_LENGTH] = Max(np.float64(lengths.max(initial=0)))
    return metrics


def evaluation_metrics(
    names: Sequence[str], scored: ScoredEpisodes, rollout: RolloutScores | None
) -> dict[str, float]:
    """Return the metrics of held-out prompts. names: names of rewards. rollout: None without a reference."""
    means = _means(names, scored) | prompt_counts(names, scored.scores, scored.reward_scores)
    sums = source_rewards(scored) | episode_metrics(scored.episodes)
    means |= {name: float(x.total / x.weight) for name, x in sums.items() if x.weight}
    if rollout is not None:
        means[KL] = _kl(scored.episodes, rollout)
    return {name: x for name, x in means.items() if x is not None and name != ZERO_STD}


def _kl(episodes: Episodes, rollout: RolloutScores) -> float:
    """Return the mean over episodes of `sum_t (log pi - log pi_ref)` at their sampled tokens."""
    valid = episodes.valid.ravel()
    return float((rollout.logps - rollout.reference)[valid].sum() / max(valid.sum(), 1))
