"""Turn the scores of a rollout into advantages: NumPy in float64, on the host.

Scores are [G, N]: N completions of each of G prompts, which are a group; NaN for a completion without a
score. Such a completion is in no mean and gets advantage 0; its weight in the loss must be 0 (`has_score` is
the mask). If all scores of a group are equal, its advantages are exactly 0. Arrays [n, T] have a row of T
tokens for each of n completions; `lengths` [n] counts a completion's tokens. Values beyond that are ignored
in arguments and 0 in results.

An advantage is a function (scores, lengths) -> advantages, both [G, N]; most ignore the lengths. Advantages
and token weights (token_weights.py) combine freely.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

GroupScores = Float[np.ndarray, "G N"]
GroupMask = Bool[np.ndarray, "G N"]
GroupLengths = Int[np.ndarray, "G N"]  # tokens of each completion, 0 for an empty slot
ScoresPerReward = Float[np.ndarray, "G N K"]  # of K rewards
Lengths = Int[np.ndarray, " n"]
PerToken = Float[np.ndarray, "n T"]
Moments = Float[np.ndarray, "3"]  # count, mean, sum of squares about the mean; zeros at the start

Advantage = Callable[[GroupScores, GroupLengths], GroupScores]

# Scores


def has_score(scores: Shaped[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    """Return the mask of scores that are not NaN. Raises ValueError for integers and for infinite scores."""
    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(
            f"scores have dtype {scores.dtype}. Use floats, with NaN for a completion without a score."
        )
    if np.isinf(scores).any():
        count = int(np.isinf(scores).sum())
        raise ValueError(
            f"{count} of {scores.size} scores are infinite. Use NaN for a completion without a score."
        )
    return ~np.isnan(scores)


def nonconstant_groups(scores: GroupScores) -> GroupMask:
    """Return the mask of completions whose group has different scores: DAPO (arXiv:2503.14476, eq. 11).

    >>> nonconstant_groups(np.array([[1.0, 1.0], [1.0, 0.0]]))
    array([[False, False],
           [ True,  True]])
    """
    return np.broadcast_to(~_all_equal(scores), np.shape(scores))


def missing_eos(scores: GroupScores, ended: GroupMask, penalty: float) -> GroupScores:
    """Subtract `penalty` from the scores of completions that have not `ended`: TRL's missing_eos_penalty.
    Raises ValueError for a penalty below 0.
    """
    if penalty < 0:
        raise ValueError(
            f"missing_eos={penalty} would reward a missing end token. Use a number of at least 0."
        )
    return _float64(scores) - penalty * ~np.asarray(ended, bool)


def overlong(lengths: GroupLengths, max_new: int, soft: int) -> GroupScores:
    """Return DAPO's soft overlong punishment, to add to the scores (arXiv:2503.14476, eq. 13).

    It is 0 up to max_new - soft tokens and falls linearly from there to -1 at max_new. Raises ValueError if
    soft is not in 1 .. max_new.

    >>> overlong(np.array([[50, 90, 100]]), max_new=100, soft=20)
    array([[-0. , -0.5, -1. ]])
    """
    if not 0 < soft <= max_new:
        raise ValueError(
            f"overlong must be between 1 and max_new={max_new} tokens, got {soft}. Set such a number."
        )
    return -np.clip((np.asarray(lengths, np.float64) - (max_new - soft)) / soft, 0, 1)


def clip_scores(scores: GroupScores, low: float, high: float) -> GroupScores:
    """Clip scores to [low, high]; NaN stays NaN. Raises ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"scores are clipped to [{low}, {high}], which is empty. Use low < high.")
    return np.clip(_float64(scores), low, high)


def update_moments(moments: Moments, scores: GroupScores) -> Moments:
    """Add new scores to the running moments (count, mean, sum of squared deviations from the mean), without
    NaN (Chan et al. 1979).

    >>> update_moments(np.zeros(3), np.array([[1.0, 3.0, np.nan]]))
    array([2., 2., 2.])
    """
    x = _float64(scores)[has_score(scores)]
    count, mean, squares = _float64(moments)
    if not len(x):
        return np.array([count, mean, squares])
    delta, total = x.mean() - mean, count + len(x)
    return np.array(
        [
            total,
            mean + delta * len(x) / total,
            squares + np.square(x - x.mean()).sum() + delta**2 * count * len(x) / total,
        ]
    )


def scale_scores(scores: GroupScores, moments: Moments) -> GroupScores:
    """Divide scores by the standard deviation of all scores so far, without subtracting their mean.

    moments: see update_moments. The deviation is unbiased, and 1 until two scores differ. Engstrom et al.
    2020 (arXiv:2005.12729) do so with returns; it is TRL 0.11's use_score_scaling.
    """
    count, _, squares = _float64(moments)
    return _float64(scores) / (np.sqrt(squares / (count - 1)) if count > 1 and squares > 0 else 1.0)


def weighted_sum(rewards: ScoresPerReward, weights: Sequence[float]) -> GroupScores:
    """Return the score `sum_k w_k r_k` of K rewards, NaN if any of them is NaN. An advantage of this score is
    TRL's sum_then_normalize.

    >>> weighted_sum(np.array([[[1.0, 0.5]]]), (1.0, 0.2))
    array([[1.1]])
    """
    x, w = _checked_weights(rewards, weights)
    return (w * x).sum(-1)


def sum_of_known(rewards: ScoresPerReward, weights: Sequence[float]) -> GroupScores:
    """Return `sum_k w_k r_k` over the rewards that are not NaN; NaN if all are. It is TRL's sum, where a
    reward of None counts as 0, for rewards that apply only to some rows.
    """
    x, w = _checked_weights(rewards, weights)
    return np.where(np.isnan(x).all(-1), np.nan, np.nansum(w * x, -1))


def normalised_sum(rewards: ScoresPerReward, weights: Sequence[float], eps: float = 1e-4) -> GroupScores:
    """Return GDPO's advantages of K rewards (Liu et al. 2026, arXiv:2601.05242); TRL's normalize_then_sum.

    Each reward is normalised within its group by `grpo`, and the weighted sum of the results is standardised
    over all completions. A completion with a reward of NaN gets advantage 0. In a run set estimate=by_each;
    do not use it as Rules.combine, because by_group would divide by each group's deviation again.

    >>> normalised_sum(np.array([[[1.0, 20.0], [0.0, 0.0]]]), (1.0, 1.0)).round(2)
    array([[ 0.71, -0.71]])
    """
    x, w = _checked_weights(rewards, weights)
    each = np.stack(
        [np.where(np.isnan(x[..., k]), np.nan, grpo(x[..., k], eps=eps)) for k in range(x.shape[-1])], -1
    )
    return standardised((w * each).sum(-1), eps)


# Advantages of completions


def centred(scores: GroupScores, lengths: GroupLengths | None = None) -> GroupScores:
    """`r - mean of the group`: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783). TRL's scale_rewards=none.

    >>> centred(np.array([[1.0, 0.0, 0.0, np.nan]])).round(2)
    array([[ 0.67, -0.33, -0.33,  0.  ]])
    """
    return _zero_without_score(_centred(scores), scores)


def grpo(scores: GroupScores, lengths: GroupLengths | None = None, eps: float = 1e-4) -> GroupScores:
    """`(r - mean) / (std + eps)` of the group, std unbiased (Shao et al. 2024, arXiv:2402.03300).

    TRL's scale_rewards=group.

    >>> grpo(np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])).round(2)
    array([[ 0.87, -0.87, -0.87,  0.87],
           [ 0.  ,  0.  ,  0.  ,  0.  ]])
    """
    delta = _centred(scores)
    free = np.maximum(has_score(scores).sum(1, keepdims=True) - 1, 1)
    return _zero_without_score(delta / (np.sqrt(np.nansum(delta**2, 1, keepdims=True) / free) + eps), scores)


def grpo_batch(scores: GroupScores, lengths: GroupLengths | None = None, eps: float = 1e-4) -> GroupScores:
    """`(r - mean of the group) / (std of all scores + eps)` (arXiv:2508.08221); TRL's scale_rewards=batch."""
    x = _float64(scores)[has_score(scores)]
    return _zero_without_score(_centred(scores) / ((x.std(ddof=1) if len(x) > 1 else 0.0) + eps), scores)


def rloo(scores: GroupScores, lengths: GroupLengths | None = None) -> GroupScores:
    """`r - mean of the group's other scores` (Ahmadian et al. 2024, arXiv:2402.14740); 0 in a group of one.

    >>> rloo(np.array([[1.0, 0.0, 0.0, 1.0]])).round(2)
    array([[ 0.67, -0.67, -0.67,  0.67]])
    """
    n = has_score(scores).sum(1, keepdims=True)
    return _zero_without_score(_centred(scores) * n / np.maximum(n - 1, 1), scores)


def opo(scores: GroupScores, lengths: GroupLengths) -> GroupScores:
    """`r - sum(|y| r) / sum(|y|)`, with sums over the group, |y| tokens per completion: the optimal baseline
    (Hao et al. 2025, arXiv:2505.23585).

    >>> opo(np.array([[1.0, 0.0]]), np.array([[10, 30]]))
    array([[ 0.75, -0.25]])
    """
    x, n = _float64(scores), np.where(has_score(scores), np.asarray(lengths, np.float64), 0)
    base = np.nansum(n * x, 1, keepdims=True) / np.maximum(n.sum(1, keepdims=True), 1)
    return _zero_without_score(np.where(_all_equal(scores), x * 0, x - base), scores)


def maxrl(scores: GroupScores, lengths: GroupLengths | None = None) -> GroupScores:
    """`(r - mean) / mean` of the group, 0 in a group without success (Tajwar et al. 2026, arXiv:2602.02710).

    With binary scores, groups of N and a probability p of success, its expected gradient is the gradient of
    `-sum_k (1 - p)^k / k` up to k = N - 1, the expansion of `log p`. Raises ValueError for a negative score,
    because a negative mean would reverse the gradient.

    >>> maxrl(np.array([[1.0, 0.0, 0.0, 0.0]]))
    array([[ 3., -1., -1., -1.]])
    """
    x = _float64(scores)
    if (x < 0).any():
        raise ValueError(
            f"maxrl divides by the group's mean score, and a score is {np.nanmin(x):g}. Use rewards of at "
            "least 0, without penalties (missing_eos, overlong, a KL), or another advantage."
        )
    mean = np.nansum(x, 1, keepdims=True) / np.maximum(has_score(x).sum(1, keepdims=True), 1)
    return _zero_without_score(_centred(x) / np.where(mean > 0, mean, 1), x)


def brevity(scores: GroupScores, lengths: GroupLengths) -> GroupScores:
    """Return minus the length of each completion: gfpo's default metric, which retains the shortest."""
    return -_float64(lengths)


def token_efficiency(scores: GroupScores, lengths: GroupLengths) -> GroupScores:
    """Return `r / |y|` of each completion, its score per token: a metric for gfpo."""
    return _float64(scores) / np.maximum(lengths, 1)


def gfpo(
    scores: GroupScores,
    lengths: GroupLengths,
    retain: int | None = None,
    metric: Advantage = brevity,
    advantage: Advantage = grpo,
) -> GroupScores:
    """Return the `advantage` of the `retain` completions of each group that have the highest `metric`,
    computed among these alone; 0 for the others (Shrivastava et al. 2025, arXiv:2508.09726, eq. 2).

    retain: None for half of the group, as the paper's 8 of 16. metric: brevity, token_efficiency or your own
    function of (scores, lengths). Of completions with equal metrics the first is retained. As in the paper,
    the loss is averaged over the tokens of all completions, also of those not retained (see
    token_weights.py). Unlike the paper's, grpo's standard deviation is the unbiased one (n - 1). Raises
    ValueError unless `retain` is in 1 .. N - 1 (1 in a group of one).

    >>> scores, lengths = np.array([[1.0, 0.0, 1.0, 0.0]]), np.array([[10, 20, 40, 30]])
    >>> gfpo(scores, lengths, retain=2, advantage=centred)
    array([[ 0.5, -0.5,  0. ,  0. ]])
    """
    group = np.shape(scores)[1]
    retain = max(1, group // 2) if retain is None else retain
    if not 0 < retain < max(group, 2):
        raise ValueError(f"gfpo: retain={retain} must be 1 to {max(1, group - 1)} in a group of {group}.")
    return advantage(_highest(scores, metric(scores, lengths), np.full(len(scores), retain)), lengths)


def adaptive_gfpo(
    scores: GroupScores,
    lengths: GroupLengths,
    fractions: tuple[float, float, float, float] = (0.5, 0.5, 0.375, 0.25),
    metric: Advantage = brevity,
    advantage: Advantage = grpo,
) -> GroupScores:
    """gfpo with more completions retained for harder prompts: Adaptive Difficulty GFPO (arXiv:2508.09726).

    A prompt's difficulty is the mean score of its completions. The rollout's prompts are split by it into
    quarters; the paper splits by all prompts so far, with a t-digest. fractions: the fraction of a group that
    is retained in each quarter, from the lowest mean scores (hardest) to the highest, rounded down to a
    number of completions, at least one; the default is the paper's 8, 8, 6 and 4 of 16. metric, advantage:
    see gfpo. Raises ValueError unless 0 < fraction <= 1.
    """
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(
            f"adaptive_gfpo: fractions={fractions} must be four numbers above 0 and at most 1, such as "
            "0.5,0.5,0.375,0.25."
        )
    valid = has_score(scores)
    means = np.nansum(_float64(scores), 1) / np.maximum(valid.sum(1), 1)
    known = means[valid.any(1)]
    limits = np.quantile(known, (0.25, 0.5, 0.75)) if len(known) else np.zeros(3)
    quarters = (means[:, None] > limits).sum(1)
    retain = np.maximum(np.array(fractions)[quarters] * scores.shape[1], 1).astype(int)
    return advantage(_highest(scores, metric(scores, lengths), retain), lengths)


def standardised(advantages: GroupScores, eps: float = 1e-4) -> GroupScores:
    """`(A - mean) / (std + eps)` over the batch, 0 for NaN or if all equal. TRL: normalize_advantages."""
    x = _float64(advantages)
    valid = x[~np.isnan(x)]
    if not len(valid) or valid.max() == valid.min():
        return _zero_without_score(x * 0, x)
    return _zero_without_score((x - valid.mean()) / (valid.std(ddof=1) + eps), x)


# Advantages of tokens


def token_mask(lengths: Lengths, size: int) -> Bool[np.ndarray, "n T"]:
    """Return the mask [n, size] that is True at the first `lengths[i]` tokens of row i."""
    return np.arange(size) < np.asarray(lengths)[:, None]


def token_rewards(
    kl: PerToken, scores: Float[np.ndarray, " n"], lengths: Lengths, kl_coef: float
) -> PerToken:
    """Return `-kl_coef kl_t` with the score added at the last token (Ziegler et al. 2019, arXiv:1909.08593,
    eq. 2).

    kl: KL of each token. A completion without a score has reward 0 at every token, which keeps all results
    finite; its weight in the loss must be 0. TRL adds the score one position later if
    padding follows the last token.

    >>> token_rewards(np.array([[0.1, 0.2, 0.0]]), np.array([1.0]), np.array([2]), kl_coef=0.5)
    array([[-0.05,  0.9 ,  0.  ]])
    """
    lengths, valid = np.asarray(lengths), has_score(scores) & (np.asarray(lengths) > 0)
    rewards = np.where(token_mask(lengths * valid, kl.shape[1]), -kl_coef * _float64(kl), 0)
    rewards[np.flatnonzero(valid), lengths[valid] - 1] += _float64(scores)[valid]
    return rewards


def gae(
    rewards: PerToken, values: PerToken, lengths: Lengths, gamma: float = 1.0, lam: float = 0.95
) -> tuple[PerToken, PerToken]:
    """Return (advantages, returns): `A_t = sum_l (gamma lam)^l d_(t+l)`, `d_t = r_t + gamma V_(t+1) - V_t`,
    `R_t = A_t + V_t`.

    Schulman et al. 2015 (arXiv:1506.02438, eq. 16). The value after the last token is 0, also for a truncated
    completion. Whiten only the returned advantages: a critic learns the returns as they are. Raises
    ValueError if gamma or lam is not in [0, 1].

    >>> advantages, returns = gae(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), np.array([2]), lam=1.0)
    >>> advantages, returns
    (array([[0.5, 0.5]]), array([[1., 1.]]))
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(
            f"gamma={gamma} and lam={lam}: both must be in [0, 1]. Usual values are gamma=1.0 and lam=0.95."
        )
    mask = token_mask(lengths, rewards.shape[1])
    r, v = np.where(mask, _float64(rewards), 0), np.where(mask, _float64(values), 0)
    advantages, after = np.zeros_like(r), np.zeros(len(r))
    next_values = np.pad(v[:, 1:], ((0, 0), (0, 1)))
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_values[:, t] - v[:, t]
        after = np.where(mask[:, t], delta + gamma * lam * after, 0)
        advantages[:, t] = after
    return advantages, advantages + v


def returns_to_go(rewards: PerToken, lengths: Lengths, gamma: float = 1.0) -> PerToken:
    """Return `R_t = r_t + gamma R_(t+1)`; whitened, it is REINFORCE++ (Hu et al. 2025, arXiv:2501.03262)."""
    return gae(rewards, np.zeros_like(_float64(rewards)), lengths, gamma, 1.0)[0]


def whiten(x: PerToken, mask: Bool[np.ndarray, "n T"], eps: float = 1e-8) -> PerToken:
    """Return `(x - mean) / sqrt(var + eps)` over the mask, var unbiased; 0 elsewhere and if all are equal."""
    valid = _float64(x)[mask]
    if not len(valid) or valid.max() == valid.min():
        return np.zeros(x.shape)
    return np.where(mask, (x - valid.mean()) / np.sqrt(valid.var(ddof=1) + eps), 0)


def whiten_around_mean(x: PerToken, mask: Bool[np.ndarray, "n T"], eps: float = 1e-8) -> PerToken:
    """Whiten as `whiten`, and add the mean again, as TRL whitens rewards (shift_mean=False)."""
    mean = _float64(x)[mask].mean() if np.any(mask) else 0.0
    return np.where(mask, whiten(x, mask, eps) + mean, 0)


def _float64(x: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.asarray(x, np.float64)


def _zero_without_score(x: GroupScores, scores: GroupScores) -> GroupScores:
    """Return x, with 0 where x or the score is NaN."""
    return np.where(np.isnan(x) | np.isnan(scores), 0.0, x)


def _all_equal(scores: GroupScores) -> Bool[np.ndarray, "G 1"]:
    """Return the mask of groups whose scores are all equal, or that have no score."""
    valid, x = has_score(scores), _float64(scores)
    high, low = (np.where(valid, x, fill) for fill in (-np.inf, np.inf))
    return high.max(1, keepdims=True) <= low.min(1, keepdims=True)


def _centred(scores: Shaped[np.ndarray, "G N"]) -> GroupScores:
    """Return `r - mean of the group`; exactly 0 in a group of equal scores, whose mean may be rounded."""
    valid, x = has_score(scores), _float64(scores)
    mean = np.nansum(x, 1, keepdims=True) / np.maximum(valid.sum(1, keepdims=True), 1)
    return np.where(_all_equal(scores), x * 0, x - mean)


def _highest(scores: GroupScores, ranks: GroupScores, retain: Int[np.ndarray, " G"]) -> GroupScores:
    """Return the scores of the `retain` completions of each group that have the highest ranks, NaN for all
    others. Of completions with equal ranks the first is retained.
    """
    order = np.argsort(-np.where(has_score(scores), ranks, -np.inf), axis=1, kind="stable")
    places = np.argsort(order, axis=1)
    return np.where(places < retain[:, None], _float64(scores), np.nan)


def _checked_weights(
    rewards: ScoresPerReward, weights: Sequence[float]
) -> tuple[ScoresPerReward, Float[np.ndarray, " K"]]:
    """Return rewards and weights in float64. Raises ValueError unless there is one weight for each reward."""
    x, w = _float64(rewards), np.asarray(weights, np.float64)
    if x.shape[-1:] != w.shape:
        raise ValueError(
            f"reward_weights={w.tolist()} for {x.shape[-1]} reward(s). Set one weight for each reward."
        )
    return x, w


def check_advantages(group: int, scores: GroupScores, advantages: PerToken) -> None:
    """Raise ValueError if groups have one completion and all advantages are 0 although scores differ."""
    valid = scores[has_score(scores)]
    if group == 1 and valid.size and valid.max() > valid.min() and not advantages.any():
        raise ValueError(
            "data.group=1: advantages relative to a group of one are all 0. "
            "Use data.group of at least 2, or an estimator without groups, such as reinforce or actor_critic."
        )
