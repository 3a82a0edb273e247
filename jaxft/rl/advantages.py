"""From scores to advantages and weights, on the host and in float64; a Rollout takes them in float32.

scores [G, N] are of G prompts with N completions each, and stay floating point from end to end. NaN is a completion that can't
be scored: it is in nobody's mean, its advantage is 0, and `scorable` says where its weight must be 0. Where every scored
completion of a group has the same score the group's advantages are exactly 0. Per-token arrays are [n, T] with `lengths` [n];
what stands beyond a completion's length is not read, and is 0 in what comes back.

Advantage functions and weight rules combine freely. A weight rule gives the weight of each token of a completion, over a whole
optimizer batch: keep [G, N] says which completions have a loss (scorable, not cut off, in a group that varies, ...). The
weights of all tokens that have one sum to 1, but for constant_length and sequence_sum; where nothing is kept they are all 0.
"""

import inspect
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Scores = Float[np.ndarray, "G N"]
Flags = Bool[np.ndarray, "G N"]
GroupLengths = Int[np.ndarray, "G N"]  # tokens of each completion, 0 for one that isn't there
Lengths = Int[np.ndarray, " n"]
PerToken = Float[np.ndarray, "n T"]

# Scores


def scorable(scores: Scores) -> Flags:
    """Which completions have a score. Raises ValueError for scores that are not floating point, or infinite."""
    x = np.asarray(scores)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"scores are floating point with NaN for unscorable, found {x.dtype}; convert them with float()"
        )
    if np.isinf(x).any():
        raise ValueError(
            f"{int(np.isinf(x).sum())} of {x.size} scores are infinite; give NaN for what can't be scored"
        )
    return ~np.isnan(x)


def varied(scores: Scores) -> Flags:
    """Which completions are in a group whose scores differ: DAPO's dynamic filter (Yu et al. 2025, arXiv:2503.14476, eq. 11)."""
    return np.broadcast_to(~_equal(scores), np.shape(scores))


def missing_eos(scores: Scores, ended: Flags, penalty: float) -> Scores:
    """Scores less `penalty` where a completion has no end-of-turn token (TRL's missing_eos_penalty), which is from 0 up."""
    if penalty < 0:
        raise ValueError(f"a penalty for a missing end is from 0 up, found {penalty}")
    return _double(scores) - penalty * ~np.asarray(ended, bool)


def overlong(lengths: GroupLengths, most: int, soft: int) -> Scores:
    """What is added to a long completion's score: 0 up to most - soft tokens, from there linearly down to -1 at most.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13). Raises ValueError for a soft that is not in 1 .. most.
    """
    if not 0 < soft <= most:
        raise ValueError(f"overlong: soft is in 1 .. {most} (the most tokens), found {soft}")
    return -np.clip((np.asarray(lengths, np.float64) - (most - soft)) / soft, 0, 1)


def clipped(scores: Scores, low: float, high: float) -> Scores:
    """Scores held within [low, high]; NaN stays. Raises ValueError for an empty range."""
    if not low < high:
        raise ValueError(f"a range of scores has low < high, found {low} and {high}")
    return np.clip(_double(scores), low, high)


Moments = Float[np.ndarray, "3"]  # count, mean, sum of squares about the mean; zeros at the start


def seen(moments: Moments, scores: Scores) -> Moments:
    """The moments with more scores (Chan et al. 1979), NaN left out."""
    x = _double(scores)[scorable(scores)]
    n, mean, squares = _double(moments)
    if not len(x):
        return np.array([n, mean, squares])
    away, total = x.mean() - mean, n + len(x)
    return np.array(
        [
            total,
            mean + away * len(x) / total,
            squares + np.square(x - x.mean()).sum() + away**2 * n * len(x) / total,
        ]
    )


def scaled(scores: Scores, moments: Moments) -> Scores:
    """Scores over the running standard deviation (unbiased), which is 1 before two scores that differ were seen.

    Engstrom et al. 2020 (arXiv:2005.12729), of scores in place of returns; TRL 0.11's use_score_scaling. The mean stays.
    """
    n, _, squares = _double(moments)
    return _double(scores) / (np.sqrt(squares / (n - 1)) if n > 1 and squares > 0 else 1.0)


def weighted_sum(rewards: Float[np.ndarray, "G N K"], weights: Any) -> Scores:
    """Scores of K rewards, `sum_k w_k r_k`: then any advantage function is TRL's sum_then_normalize.

    A completion that one of them can't score has no score.
    """
    x, w = _several(rewards, weights)
    return (w * x).sum(-1)


def sum_of_known(rewards: Float[np.ndarray, "G N K"], weights: Any) -> Scores:
    """weighted_sum over the rewards that give a completion a score: one that gives none counts as 0, as TRL's None does.

    For rewards that are meant for some of the rows only. NaN where all are.
    """
    x, w = _several(rewards, weights)
    return np.where(np.isnan(x).all(-1), np.nan, np.nansum(w * x, -1))


def normalised_sum(rewards: Float[np.ndarray, "G N K"], weights: Any, eps: float = 1e-4) -> Scores:
    """Advantages of K rewards of which each is made a grpo advantage first, then summed, then standardised over the batch.

    GDPO (arXiv:2601.05242); TRL's normalize_then_sum. NaN as in weighted_sum. estimates.by_each makes a run learn from it.
    """
    x, w = _several(rewards, weights)
    each = np.stack(
        [np.where(np.isnan(x[..., k]), np.nan, grpo(x[..., k], eps)) for k in range(x.shape[-1])], -1
    )
    return standardised((w * each).sum(-1), eps)


def counts(scores: Scores) -> dict[str, float]:
    """TRL's reward, reward_std (over the batch) and frac_reward_zero_std (groups that teach nothing), and frac_unscorable."""
    known = scorable(scores)
    x = _double(scores)[known]
    out = {"frac_unscorable": float((~known).mean()), "frac_reward_zero_std": float(_equal(scores).mean())}
    if len(x):
        out["reward"] = float(x.mean())
    if len(x) > 1:
        out["reward_std"] = float(x.std(ddof=1))
    return out


def asks(fn: Any, name: str) -> bool:
    """Whether a function has a parameter of that name which nothing has given a value yet."""
    parameter = inspect.signature(fn).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def check_takes(fn: Any, name: str, first: tuple[str, ...], more: tuple[str, ...]) -> None:
    """Raise ValueError where `fn` can't be called with `first` in their places and those of `more` that it asks for by name."""
    try:
        inspect.signature(fn).bind(*first, **{other: other for other in more if asks(fn, other)})
    except TypeError as error:
        told = f"{name}={getattr(fn, '__name__', fn)} can't be called with ({', '.join(first)}): {error}"
        raise ValueError(f"{told}; it may ask for {', '.join(more)} too" if more else told) from error


# Advantages of groups


def centred(scores: Scores) -> Scores:
    """`r - mean of the group`: Dr. GRPO's (Liu et al. 2025, arXiv:2503.20783). TRL's scale_rewards=none."""
    return _known(_centred(scores), scores)


def grpo(scores: Scores, eps: float = 1e-4) -> Scores:
    """`(r - mean) / (std + eps)` of the group, std unbiased (Shao et al. 2024, arXiv:2402.03300); TRL's scale_rewards=group."""
    away = _centred(scores)
    free = np.maximum(scorable(scores).sum(1, keepdims=True) - 1, 1)
    return _known(away / (np.sqrt(np.nansum(away**2, 1, keepdims=True) / free) + eps), scores)


def grpo_batch(scores: Scores, eps: float = 1e-4) -> Scores:
    """`(r - mean of the group) / (std of all scores + eps)` (arXiv:2508.08221); TRL's scale_rewards=batch."""
    x = _double(scores)[scorable(scores)]
    return _known(_centred(scores) / ((x.std(ddof=1) if len(x) > 1 else 0.0) + eps), scores)


def rloo(scores: Scores) -> Scores:
    """`r - mean of the group's others` (Ahmadian et al. 2024, arXiv:2402.14740). Alone in its group a completion has 0."""
    n = scorable(scores).sum(1, keepdims=True)
    return _known(_centred(scores) * n / np.maximum(n - 1, 1), scores)


def opo(scores: Scores, lengths: GroupLengths) -> Scores:
    """`r - sum |y| r / sum |y|` over the group: the baseline of least variance (Hao et al. 2025, arXiv:2505.23585)."""
    x, n = _double(scores), np.where(scorable(scores), np.asarray(lengths, np.float64), 0)
    base = np.nansum(n * x, 1, keepdims=True) / np.maximum(n.sum(1, keepdims=True), 1)
    return _known(np.where(_equal(scores), x * 0, x - base), scores)


def remax(scores: Scores, greedy: Float[np.ndarray, " G"]) -> Scores:
    """`r - score of the greedy completion` (Li et al. 2023, arXiv:2310.10505). 0 where the greedy one has no score."""
    return _known(_double(scores) - _double(greedy)[:, None], scores)


OF_GROUPS = (centred, grpo, grpo_batch, rloo, opo)  # those that compare the completions of a group


def standardised(advantages: Scores, eps: float = 1e-4) -> Scores:
    """`(A - mean) / (std + eps)` over the batch, NaN left out; TRL's RLOO normalize_advantages. 0 where all are equal."""
    x = _double(advantages)
    known = x[~np.isnan(x)]
    if not len(known) or known.max() == known.min():
        return _known(x * 0, x)
    return _known((x - known.mean()) / (known.std(ddof=1) + eps), x)


# Advantages of tokens


def inside(lengths: Lengths, length: int) -> Bool[np.ndarray, "n T"]:
    """Which of `length` places hold a token of the completion."""
    return np.arange(length) < np.asarray(lengths)[:, None]


def token_rewards(
    kl: PerToken, scores: Float[np.ndarray, " n"], lengths: Lengths, kl_coef: float
) -> PerToken:
    """`-kl_coef kl_t`, and the score added at the last token (Ziegler et al. 2019, arXiv:1909.08593, eq. 2).

    A completion that can't be scored has no reward at all, so that what is made of it is finite; it must not be kept. TRL puts
    the score one place later, where padding follows the last token.
    """
    lengths, here = np.asarray(lengths), scorable(scores) & (np.asarray(lengths) > 0)
    rewards = np.where(inside(lengths * here, kl.shape[1]), -kl_coef * _double(kl), 0)
    rewards[np.flatnonzero(here), lengths[here] - 1] += _double(scores)[here]
    return rewards


def gae(rewards: PerToken, values: PerToken, lengths: Lengths, gamma: float = 1.0, lam: float = 0.95) -> Any:
    """(advantages, returns) [n, T]: `A_t = sum_l (gamma lam)^l d_(t+l)`, `d_t = r_t + gamma V_(t+1) - V_t`, `R_t = A_t + V_t`.

    Schulman et al. 2015 (arXiv:1506.02438, eq. 16). The value after the last token is 0: a completion that is cut off ends there
    too. Whiten the advantages afterwards, so that returns stay returns. Raises ValueError for a gamma or lam beyond [0, 1].
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam are in [0, 1], found {gamma} and {lam}")
    r, v, real = _double(rewards), _double(values), inside(lengths, rewards.shape[1])
    r, v = np.where(real, r, 0), np.where(real, v, 0)
    out, later = np.zeros_like(r), np.zeros(len(r))
    after = np.pad(v[:, 1:], ((0, 0), (0, 1)))
    for t in reversed(range(r.shape[1])):
        later = np.where(real[:, t], r[:, t] + gamma * after[:, t] - v[:, t] + gamma * lam * later, 0)
        out[:, t] = later
    return out, out + v


def returns_to_go(rewards: PerToken, lengths: Lengths, gamma: float = 1.0) -> PerToken:
    """`R_t = r_t + gamma R_(t+1)`: whitened they are the advantages of REINFORCE++ (Hu et al. 2025, arXiv:2501.03262)."""
    return gae(rewards, np.zeros_like(_double(rewards)), lengths, gamma, 1.0)[0]


def at_tokens(advantages: Scores, lengths: GroupLengths, length: int) -> PerToken:
    """A number of each completion at each of its tokens, [G N, length].

    whiten(at_tokens(centred(scores), ...), ...) is REINFORCE++ with a group's baseline (arXiv:2501.03262).
    """
    flat = np.asarray(lengths).ravel()
    return np.where(inside(flat, length), _double(advantages).reshape(len(flat), 1), 0)


def whiten(x: PerToken, where: Bool[np.ndarray, "n T"], eps: float = 1e-8) -> PerToken:
    """`(x - mean) / sqrt(var + eps)` over the places of `where`, var unbiased as in TRL; 0 elsewhere, and where all are equal."""
    known = _double(x)[where]
    if not len(known) or known.max() == known.min():
        return np.zeros(x.shape)
    return np.where(where, (x - known.mean()) / np.sqrt(known.var(ddof=1) + eps), 0)


def whiten_around_mean(x: PerToken, where: Bool[np.ndarray, "n T"], eps: float = 1e-8) -> PerToken:
    """whiten, with the mean added again: how TRL whitens rewards (shift_mean=False)."""
    mean = _double(x)[where].mean() if np.any(where) else 0.0
    return np.where(where, whiten(x, where, eps) + mean, 0)


# Weights of tokens


def token_mean(lengths: GroupLengths, keep: Flags) -> Scores:
    """Every token weighs the same: PPO's and DAPO's (arXiv:2503.14476, eq. 8)."""
    keep = _kept(lengths, keep)
    return _weights(keep, max(int((keep * lengths).sum()), 1))


def sequence_mean(lengths: GroupLengths, keep: Flags) -> Scores:
    """Every completion weighs the same, and so do the tokens of each: GRPO's (arXiv:2402.03300, eq. 3)."""
    keep = _kept(lengths, keep)
    return _weights(keep, np.maximum(lengths, 1) * max(int(keep.sum()), 1))


def prompt_mean(lengths: GroupLengths, keep: Flags) -> Scores:
    """Every group weighs the same, and so do all tokens of a group (ScaleRL, arXiv:2510.13786)."""
    keep = _kept(lengths, keep)
    tokens = (keep * lengths).sum(1, keepdims=True)
    return _weights(keep, np.maximum(tokens, 1) * max(int((tokens > 0).sum()), 1))


def constant_length(lengths: GroupLengths, keep: Flags, most: int) -> Scores:
    """`1 / (completions * most)` a token: Dr. GRPO's (arXiv:2503.20783), most the length at which completions are cut off.

    All completions count, kept or not, so that the divisor is a constant. So the weights sum to the mean over all completions
    of (tokens that have a loss) / most, which is 1 only where all are kept and none ends early. Raises ValueError for a
    completion longer than that.
    """
    if np.max(lengths, initial=0) > most:
        raise ValueError(
            f"constant_length: completions have at most {most} tokens, found {np.max(lengths)}; give the limit"
        )
    return _weights(_kept(lengths, keep), max(int((np.asarray(lengths) > 0).sum()), 1) * most)


def sequence_sum(lengths: GroupLengths, keep: Flags) -> Scores:
    """`1 / completions` a token: a completion weighs by its length, as in RLOO's policy gradient and LUSPO (arXiv:2602.05261).

    The weights sum to the mean length of what is kept, and losses and gradients are as much larger.
    """
    keep = _kept(lengths, keep)
    return _weights(keep, max(int(keep.sum()), 1))


def _kept(lengths: Any, keep: Any) -> Any:
    if np.shape(lengths) != np.shape(keep):
        raise ValueError(
            f"keep says of each completion whether it has a loss, {np.shape(lengths)}; found {np.shape(keep)}"
        )
    return np.asarray(keep, bool) & (np.asarray(lengths) > 0)


def _weights(keep: Any, divisor: Any) -> Scores:
    return keep / divisor


def _double(x: Any) -> Any:
    return np.asarray(x, np.float64)


def _known(x: Any, scores: Any) -> Scores:
    """0 where there is no score or no baseline for it."""
    return np.where(np.isnan(x) | np.isnan(scores), 0.0, x)


def _equal(scores: Any) -> Any:
    """Groups whose scored completions all have the same score, or that have none, [G, 1]."""
    known, x = scorable(scores), _double(scores)
    top, low = (np.where(known, x, fill) for fill in (-np.inf, np.inf))
    return top.max(1, keepdims=True) <= low.min(1, keepdims=True)


def _centred(scores: Any) -> Any:
    """`r - mean of the group` in float64, exactly 0 where all are equal (a mean of equal numbers may be off by a rounding)."""
    known, x = scorable(scores), _double(scores)
    mean = np.nansum(x, 1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    return np.where(_equal(scores), x * 0, x - mean)


def _several(rewards: Any, weights: Any) -> tuple[Any, Any]:
    x, w = _double(rewards), _double(weights)
    if x.shape[-1:] != w.shape:
        raise ValueError(f"{x.shape[-1]} rewards need as many weights, found {w.shape}")
    return x, w
