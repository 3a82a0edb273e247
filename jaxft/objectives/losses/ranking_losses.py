"""Preference losses over rankings: K responses to one prompt, each with a rating of its quality.

A pair is the ranking of K = 2, so every loss of this file takes pairs as well. The best response has the
kind "chosen", the worst "rejected", and the responses between them "rank_2", "rank_3", ... in order. Ratings
are the columns score_chosen, score_rejected, score_rank_2, ... of the pairs (higher is better); without them
the order alone counts, as ratings K - 1, ..., 1, 0. In the docstrings c_i is the log-ratio log pi(y_i|x) -
log pi_ref(y_i|x) of response i, and s_i its rating. Sums run over the responses that a row has.

Three responses in the order of their log-ratios:

>>> from jaxft.lab.loss_evaluation import synthetic_pairs
>>> ranking = synthetic_pairs({"chosen": 2.0, "rank_2": 1.0, "rejected": 0.0})
>>> round(plackett_luce(ranking, beta=1.0).item(), 3)
0.721

As a setting: `jaxft train dpo data=rankings.jsonl data.responses=3 loss=plackett_luce`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

from jaxft.objectives.losses.preference_losses import Calibrated, PairLoss
from jaxft.objectives.pair import (
    PairBatch,
    PairTokens,
    PreferenceLoss,
    declaration,
    logistic,
    loss_name,
    require,
    square,
)

RATING = "score_"  # prefix of the columns of ratings


class Ranking(NamedTuple):
    """The responses of each ranking, the best first; entries where `present` is False have no meaning. ratio:
    log-ratios c_i. score: ratings s_i.
    """

    ratio: Float[Array, "B P K"]
    score: Float[Array, "B P K"]
    present: Bool[Array, "B P K"]


def ranked_kinds(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kinds of responses that are ranked, the best first: without "mismatched" and "gold"."""
    between = sorted((kind for kind in kinds if kind.startswith("rank_")), key=lambda kind: int(kind[5:]))
    return ("chosen", *between, "rejected")


def ratings(pair: PairBatch, loss: str | None = None) -> dict[str, Float[Array, "B P"]]:
    """Return the ratings of the K ranked responses, by kind ("chosen", ...). Without columns of ratings they
    are K - 1 for the best response, ..., 0 for the worst.

    loss: the name of a loss that needs the columns; None if it does not. Raises ValueError if columns are
    missing for some responses, or with `loss` for all.
    """
    kinds = ranked_kinds(tuple(pair.responses))
    missing = [RATING + kind for kind in kinds if RATING + kind not in pair.columns]
    if missing and (loss or len(missing) < len(kinds)):
        available = ", ".join(sorted(pair.columns)) or "none"
        raise ValueError(
            f"{loss or 'a loss of rankings'}: the rows have no column {missing[0]} (available: {available}). "
            f"Name the columns of ratings in data.extras, or use plackett_luce, which needs none"
        )
    if missing:
        order = range(len(kinds) - 1, -1, -1)
        return {kind: jnp.full_like(pair.weight, n) for kind, n in zip(kinds, order, strict=True)}
    return {kind: pair.columns[RATING + kind].astype(pair.weight.dtype) for kind in kinds}


def ranking_of(pair: PairBatch, loss: str | None = None) -> Ranking:
    """Return log-ratios and ratings of the K responses in each slot of the batch. loss: see `ratings`."""
    scores = ratings(pair, loss)
    responses = [pair.responses[kind] for kind in scores]
    columns = [x.ratio for x in responses], [*scores.values()], [x.present for x in responses]
    ratio, score, present = (jnp.stack(column, axis=-1) for column in columns)
    return Ranking(ratio, score, present > 0)


def _log_softmax(x: Float[Array, "B P K"], among: Bool[Array, "B P K"]) -> Float[Array, "B P K"]:
    """Return the log-softmax over the entries where `among` is True; 0 at other entries."""
    lowest = jnp.finfo(x.dtype).min / 2
    return jnp.where(among, jax.nn.log_softmax(jnp.where(among, x, lowest), axis=-1), 0)


def plackett_luce(pair: PairBatch, beta: float = 0.1) -> Calibrated:
    """`-sum_i log(exp(beta c_i) / sum_{j no better than i} exp(beta c_j))`: DPO of a ranking, as a sequence
    of choices: the best response first, then the best of the remaining ones, and so on.

    Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; for K = 2 it is DPO. The sum over j also includes
    responses with the same rating as i (Breslow 1974).
    """
    x, score, present = ranking_of(pair)
    x = beta * x
    no_better = present[..., None, :] & (score[..., None, :] <= score[..., :, None])
    lowest = jnp.finfo(x.dtype).min / 2
    total = jax.nn.logsumexp(jnp.where(no_better, x[..., None, :], lowest), axis=-1)
    return jnp.sum(jnp.where(present, total - x, 0), axis=-1)


def info_nca(pair: PairBatch, beta: float = 0.1, alpha: float = 1.0) -> PairLoss:
    """`-sum_i softmax(s / alpha)_i log softmax(beta c)_i`: the policy's choice among the responses is as
    likely as their ratings say.

    InfoNCA (Chen et al. 2024, arXiv:2402.05369, eq. 7). alpha: the temperature of the softmax over ratings;
    towards 0 only the best response counts.
    """
    require(alpha > 0, f"info_nca: alpha must be above 0, got {alpha}")
    x, score, present = ranking_of(pair, "info_nca")
    target = jnp.where(present, jnp.exp(_log_softmax(score / alpha, present)), 0)
    return -jnp.sum(target * _log_softmax(beta * x, present), axis=-1)


def nca(pair: PairBatch, beta: float = 0.1, alpha: float = 1.0) -> PairLoss:
    """`-sum_i (softmax(s / alpha)_i LS(beta c_i) + LS(-beta c_i) / K)`, LS = log sigmoid: like info_nca, but
    of each c_i itself instead of differences between them, so that the best response does not lose log-prob.

    NCA (Chen et al. 2024, arXiv:2402.05369, eq. 9). For K = 2 and alpha towards 0 it is nca_pair.
    """
    require(alpha > 0, f"nca: alpha must be above 0, got {alpha}")
    x, score, present = ranking_of(pair, "nca")
    target = jnp.where(present, jnp.exp(_log_softmax(score / alpha, present)), 0)
    count = jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1).astype(x.dtype)
    noise = jnp.where(present, log_sigmoid(-beta * x), 0) / count
    return -jnp.sum(target * log_sigmoid(beta * x) + noise, axis=-1)


def rpo_bwd_kl(pair: PairBatch, beta: float = 0.1, eta: float = 1.0) -> PairLoss:
    """`KL(softmax(eta s) || softmax(beta c))`: differences of implicit rewards should equal differences of
    ratings.

    Reward-aware preference optimisation (Adler et al. 2024, arXiv:2406.11704, section 3.3.2; Sun et al. 2025,
    arXiv:2502.00203), NeMo's rpo_bwd_kl; eta is its gt_reward_scale.
    """
    x, score, present = ranking_of(pair, "rpo_bwd_kl")
    target, policy = _log_softmax(eta * score, present), _log_softmax(beta * x, present)
    return jnp.sum(jnp.where(present, jnp.exp(target) * (target - policy), 0), axis=-1)


def rpo_fwd_kl(pair: PairBatch, beta: float = 0.1, eta: float = 1.0) -> PairLoss:
    """`KL(softmax(beta c) || softmax(eta s))`: rpo_bwd_kl with its arguments exchanged, NeMo's rpo_fwd_kl."""
    x, score, present = ranking_of(pair, "rpo_fwd_kl")
    target, policy = _log_softmax(eta * score, present), _log_softmax(beta * x, present)
    return jnp.sum(jnp.where(present, jnp.exp(policy) * (policy - target), 0), axis=-1)


def rpo_sq(pair: PairBatch, beta: float = 0.1, eta: float = 1.0) -> PairLoss:
    """The mean over pairs i, j of `(beta (c_i - c_j) - eta (s_i - s_j))^2`, NeMo's rpo_sq
    (arXiv:2406.11704).
    """
    x, score, present = ranking_of(pair, "rpo_sq")
    gap = beta * x - eta * score
    pairs = jnp.triu(present[..., :, None] & present[..., None, :], 1)
    squares = jnp.where(pairs, square(gap[..., :, None] - gap[..., None, :]), 0)
    return jnp.sum(squares, axis=(-2, -1)) / jnp.maximum(jnp.sum(pairs, axis=(-2, -1)), 1).astype(x.dtype)


def lipo(pair: PairBatch, beta: float = 0.1) -> Calibrated:
    """`-sum_{s_i > s_j} D_ij LS(beta (c_i - c_j))`, D_ij = |2^s_i - 2^s_j| |1 / log(1 + t_i) -
    1 / log(1 + t_j)| with t_i the rank of beta c_i: mistakes at the top count for more.

    LiPO-lambda (Liu et al. 2024, arXiv:2402.01878, eq. 9). Its ratings are between 0 and 1; scale larger
    ones. Equal c_i, as at the first step, have the ranks of the ratings.
    """
    x, score, present = ranking_of(pair)
    x = beta * x
    larger = x[..., None, :] > x[..., :, None]
    equal = x[..., None, :] == x[..., :, None]
    ahead = larger | jnp.tril(equal, -1)
    rank = 1 + jnp.sum(ahead & present[..., None, :], axis=-1)
    discount = 1 / jnp.log1p(rank.astype(x.dtype))
    gain = jnp.exp2(score)
    weight = jnp.abs(gain[..., :, None] - gain[..., None, :])
    weight *= jnp.abs(discount[..., :, None] - discount[..., None, :])
    better = (score[..., :, None] > score[..., None, :]) & present[..., :, None] & present[..., None, :]
    losses = jax.lax.stop_gradient(weight) * logistic(x[..., :, None] - x[..., None, :])
    return jnp.sum(jnp.where(better, losses, 0), axis=(-2, -1))


def all_pairs(loss: Callable[..., Array]) -> PreferenceLoss:
    """Return a loss for rankings: the mean of `loss`, a loss for pairs, over all pairs of responses in a
    ranking with unequal ratings, the better one as chosen.

    InstructGPT compares K responses so (Ouyang et al. 2022, arXiv:2203.02155, eq. 1). Example:
    `all_pairs(ipo)`. Raises ValueError for a coupled loss.
    """
    declared = declaration(loss)
    if declared.coupled:
        raise ValueError(
            f"all_pairs compares the responses of one row, but {loss_name(loss)} couples rows; use a loss of "
            "single pairs, such as dpo"
        )

    def of_rankings(pair: PairBatch, *args: Any, **knobs: Any) -> Array:
        scores = ratings(pair)
        total, count = jnp.zeros_like(pair.weight), jnp.zeros_like(pair.weight)
        for better, worse in combinations(scores, 2):
            responses = {"chosen": pair.responses[better], "rejected": pair.responses[worse]}
            tokens = _tokens_of(pair, better, worse)
            values = loss(replace(pair, responses=responses, tokens=tokens), *args, **knobs)
            both = (responses["chosen"].present > 0) & (responses["rejected"].present > 0)
            used = (both & (scores[better] != scores[worse])).astype(values.dtype)
            total, count = total + jnp.where(used > 0, values, 0), count + used
        return total / jnp.maximum(count, 1)

    return replace(declared, fn=of_rankings)


def _tokens_of(pair: PairBatch, better: str, worse: str) -> PairTokens:
    """Return the tokens with the responses of two kinds as chosen and rejected, and all others as padding."""
    kinds, padding = tuple(pair.responses), 2 * pair.weight.shape[1]
    slot, kind = jnp.divmod(pair.tokens.response, len(kinds))
    chosen, rejected = kind == kinds.index(better), kind == kinds.index(worse)
    number = jnp.where(chosen | rejected, 2 * slot + rejected.astype(slot.dtype), padding)
    return replace(pair.tokens, response=jnp.minimum(number, padding))
