"""Weights of tokens in the loss: rules for an optimizer batch, and importance weights of sampled tokens.

A rule is a function (lengths, mask, max_new) -> weight of a token of each completion, [G, N]. lengths: tokens
of each completion, 0 for an empty slot. mask: completions with a loss (with a score, not filtered out, ...).
max_new: the limit of a completion's length, which most rules ignore. The weights of all tokens in the mask
sum to 1, except for constant_length and sequence_sum; outside of it they are 0.

A correction is a function (log rho [n, S], lengths [n]) -> ImportanceWeights. rho is pi_old / mu of a token:
its probability in the training program, which recomputes log-probs, over its probability in the sampler. Both
have the same parameters, but they round sums in another order, and the sampler's cache may be quantised. A
correction multiplies each token's advantage by a weight, without gradient, so that the policy loss is an
expectation under the training program; the KL penalty and the entropy bonus stay as they are. Set its bounds
with partial, as in partial(masked_tokens, least=0.5, most=5.0). The first four corrections have the values
and default bounds of TRL 1.16's vllm_importance_sampling_mode.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxft.nn.tree import Metrics
from jaxft.objectives.losses.policy_losses import MAX_LOG_RATIO
from jaxft.objectives.metrics import Max, Min, Sum
from jaxft.rl.advantages import GroupLengths, GroupMask, GroupScores, Lengths, PerToken, token_mask

TokenWeights = Callable[[GroupLengths, GroupMask, int], GroupScores]


def token_mean(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return the same weight for every token: PPO and DAPO (arXiv:2503.14476, eq. 8).

    >>> token_mean(np.array([[1, 3]]), np.array([[True, True]]), max_new=8)
    array([[0.25, 0.25]])
    """
    mask = _with_tokens(lengths, mask)
    return mask / max(int((mask * lengths).sum()), 1)


def sequence_mean(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return the same weight for every completion, shared by its tokens: GRPO (arXiv:2402.03300, eq. 3).

    >>> sequence_mean(np.array([[1, 4]]), np.array([[True, True]]), max_new=8)
    array([[0.5  , 0.125]])
    """
    mask = _with_tokens(lengths, mask)
    return mask / (np.maximum(lengths, 1) * max(int(mask.sum()), 1))


def prompt_mean(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return the same weight for every group, divided among its tokens: ScaleRL (arXiv:2510.13786)."""
    mask = _with_tokens(lengths, mask)
    tokens = (mask * lengths).sum(1, keepdims=True)
    return mask / (np.maximum(tokens, 1) * max(int((tokens > 0).sum()), 1))


def constant_length(
    lengths: GroupLengths, mask: GroupMask, max_new: int, length: int | None = None
) -> GroupScores:
    """Return `1 / (completions * length)`: Dr. GRPO (arXiv:2503.20783). length: None for max_new.

    All completions count, in the mask or not, so that the divisor is a constant. The weights sum to the mean
    over completions of (tokens with a loss) / length. Raises ValueError if a completion has more than
    `length` tokens.

    >>> constant_length(np.array([[1, 4]]), np.array([[True, True]]), max_new=8)
    array([[0.0625, 0.0625]])
    """
    length = max_new if length is None else length
    longest = np.max(lengths, initial=0)
    if longest > length:
        raise ValueError(
            f"constant_length: a completion has {longest} tokens, more than length={length}. Raise length."
        )
    return _with_tokens(lengths, mask) / (max(int((np.asarray(lengths) > 0).sum()), 1) * length)


def sequence_sum(lengths: GroupLengths, mask: GroupMask, max_new: int) -> GroupScores:
    """Return `1 / completions`: the weight of a completion is proportional to its length, as in RLOO and
    LUSPO (arXiv:2602.05261).

    The weights do not sum to 1 but to the mean length of the completions in the mask, so loss and gradients
    are larger by that factor.
    """
    mask = _with_tokens(lengths, mask)
    return mask / max(int(mask.sum()), 1)


def _with_tokens(lengths: Int[np.ndarray, "..."], mask: np.ndarray) -> np.ndarray:
    """Return the mask without empty slots. Raises ValueError unless mask and lengths have the same shape."""
    if np.shape(lengths) != np.shape(mask):
        raise ValueError(
            f"the mask of completions has shape {np.shape(mask)}, the lengths {np.shape(lengths)}. "
            "Use one entry for each completion."
        )
    return np.asarray(mask, bool) & (np.asarray(lengths) > 0)


RATIO_MEAN, RATIO_MIN, RATIO_MAX, EFFECTIVE_SAMPLES = (
    f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "min", "max", "effective_samples")
)


@dataclass(frozen=True)
class ImportanceWeights:
    """Importance weights of tokens [n, S], 0 beyond the lengths.

    samples: the same weights, once for each token or for each completion; metrics are computed from these.
    """

    tokens: PerToken
    samples: Float[np.ndarray, " m"]


Correction = Callable[[PerToken, Lengths], ImportanceWeights]


def truncated_tokens(
    log_ratio: PerToken, lengths: Lengths, least: float = 0.0, most: float = 3.0
) -> ImportanceWeights:
    """`min(max(rho, least), most)`: truncated importance sampling, TIS (Yao et al. 2025,
    fengyao.notion.site/off-policy-rl; Ionides 2008). TRL's token_truncate.

    >>> log_ratio, lengths = np.log([[1.5, 4.0, 1.0]]), np.array([2])
    >>> truncated_tokens(log_ratio, lengths).tokens
    array([[1.5, 3. , 0. ]])
    """
    return _of_tokens(_truncated(log_ratio, least, most), lengths)


def masked_tokens(
    log_ratio: PerToken, lengths: Lengths, least: float = 0.0, most: float = 3.0
) -> ImportanceWeights:
    """`rho` if least <= rho <= most, else 0. TRL's token_mask.

    With least=0.5 and most=5 it is IcePop (Ring-1T, arXiv:2510.18855).
    """
    return _of_tokens(_masked(log_ratio, least, most), lengths)


def truncated_completions(
    log_ratio: PerToken, lengths: Lengths, least: float = 0.0, most: float = 3.0
) -> ImportanceWeights:
    """`min(max(prod_t rho_t, least), most)` for every token of a completion: TIS of completions (Liu et al.
    2025, richardli.xyz/rl-collapse). TRL's sequence_truncate.
    """
    return _of_completions(_truncated(_sums(log_ratio, lengths), least, most), log_ratio, lengths)


def masked_completions(
    log_ratio: PerToken, lengths: Lengths, least: float = 0.0, most: float = 3.0
) -> ImportanceWeights:
    """`prod_t rho_t` for every token of a completion if it is in [least, most], else 0: masked importance
    sampling, MIS (Liu et al. 2025, richardli.xyz/rl-collapse). TRL's sequence_mask, its default.

    >>> log_ratio, lengths = np.log([[1.5, 1.0], [4.0, 1.0]]), np.array([2, 2])
    >>> masked_completions(log_ratio, lengths).tokens
    array([[1.5, 1.5],
           [0. , 0. ]])
    """
    return _of_completions(_masked(_sums(log_ratio, lengths), least, most), log_ratio, lengths)


def masked_geometric_means(
    log_ratio: PerToken, lengths: Lengths, least: float = 0.999, most: float = 1.001
) -> ImportanceWeights:
    """1 for every token of a completion if `(prod_t rho_t)^(1 / |y|)` is in [least, most], else 0 (Liu et al.
    2025, richardli.xyz/rl-collapse). verl's geometric rejection, with its default bounds.

    Unlike their product, the geometric mean of a completion's ratios does not grow with its length.
    """
    means = _sums(log_ratio, lengths) / np.maximum(lengths, 1)
    return _of_completions((_masked(means, least, most) > 0).astype(float), log_ratio, lengths)


def effective_samples(weights: Float[np.ndarray, " m"]) -> float:
    """`(sum w)^2 / (m sum w^2)`: the effective sample size as a fraction of the samples (Kish 1965); 0 if all
    weights are 0.

    It is 1 for equal weights and 1 / m if a single sample has all of the weight.
    """
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / (len(weights) * squares) if squares else 0.0


def weight_metrics(weights: ImportanceWeights) -> Metrics:
    """Return mean, least and largest weight, with TRL's names, and the effective sample size."""
    w = weights.samples
    count = np.float64(len(w))
    return {
        RATIO_MEAN: Sum(np.float64(w.sum()), count),
        RATIO_MIN: Min(np.float64(w.min(initial=np.inf))),
        RATIO_MAX: Max(np.float64(w.max(initial=-np.inf))),
        EFFECTIVE_SAMPLES: Sum(effective_samples(w) * count, count),
    }


def _truncated(log_ratio: np.ndarray, least: float, most: float) -> np.ndarray:
    _check_bounds(least, most)
    return np.clip(_exp(log_ratio), least, most)


def _masked(log_ratio: np.ndarray, least: float, most: float) -> np.ndarray:
    _check_bounds(least, most)
    ratio = _exp(log_ratio)
    return np.where((ratio >= least) & (ratio <= most), ratio, 0.0)


def _check_bounds(least: float, most: float) -> None:
    if not 0 <= least < most:
        raise ValueError(
            f"correction_bounds={least:g},{most:g} (least, most) are not valid bounds. Use 0 <= least < most."
        )


def _exp(log_ratio: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(np.asarray(log_ratio, np.float64), -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _sums(log_ratio: PerToken, lengths: Lengths) -> Float[np.ndarray, " n"]:
    """Return log rho of each completion, the sum over its tokens."""
    return np.where(token_mask(lengths, log_ratio.shape[1]), log_ratio, 0).sum(1, dtype=np.float64)


def _of_tokens(weights: PerToken, lengths: Lengths) -> ImportanceWeights:
    mask = token_mask(lengths, weights.shape[1])
    return ImportanceWeights(np.where(mask, weights, 0.0), weights[mask])


def _of_completions(
    weights: Float[np.ndarray, " n"], log_ratio: PerToken, lengths: Lengths
) -> ImportanceWeights:
    mask = token_mask(lengths, log_ratio.shape[1])
    return ImportanceWeights(np.where(mask, weights[:, None], 0.0), weights[np.asarray(lengths) > 0])
