"""Preference losses without a reference (SimPO, CPO, ORPO, AlphaPO, TPO), and losses of single responses
(KTO, BCO, APO).

Notation: c, r, LS and eps as in preference_losses.py; lp = log pi(y|x), summed over tokens, and a = lp / |y|,
with _c for the chosen and _r for the rejected response; nll = -lp_c / mean |c|, whose weighted sum is the
mean over the step's chosen tokens. The formulas equal TRL 1.16's trainers of the same name unless a docstring
says what differs; TRL's nll is a mean over a microbatch.

A pair of 10 tokens each, with log-probs of -8 and -10:

>>> from jaxft.lab.loss_evaluation import synthetic_pairs
>>> pair = synthetic_pairs({"chosen": 2.0, "rejected": 0.0}, length=10, reference=-10.0)
>>> round(simpo(pair, beta=2.0, gamma=0.0).item(), 3)
0.513

As a setting: `jaxft train simpo gamma=0.5`, or in a recipe `preference(model, loss=partial(simpo, gamma=0.5),
reference=None, reward=mean_logp)`.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array

from jaxft.nn.tree import Metrics
from jaxft.objectives.losses.preference_losses import PairLoss, nll
from jaxft.objectives.pair import (
    CHOSEN_REWARD,
    REJECTED_REWARD,
    Claims,
    LossState,
    PairBatch,
    Response,
    capped,
    coupled,
    log1mexp,
    logistic,
    reference_free,
    require,
    square,
)


@reference_free
def simpo(
    pair: PairBatch, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Annotated[PairLoss, Claims.of("bradley_terry", "finite", "raises_margin")]:
    """`-(1 - eps) LS(x) - eps LS(-x)`, x = beta (a_c - a_r) - gamma (Meng et al. 2024, arXiv:2405.14734).

    The defaults are in the paper's range; TRL's are beta=0.1 and gamma=0.5, and TRL adds 1.0 nll by default.
    """
    return logistic(beta * (pair.chosen.mean - pair.rejected.mean) - gamma, label_smoothing)


@reference_free
def alphapo(
    pair: PairBatch, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25, label_smoothing: float = 0.0
) -> PairLoss:
    """simpo of the rewards `(1 - exp(-alpha a)) / alpha` instead of a (Gupta et al. 2025, arXiv:2501.03884).

    The exponent is capped at 80, where TRL overflows. Raises ValueError at alpha = 0, which is simpo.
    """
    require(alpha != 0, "alphapo: alpha is 0, where it is simpo; use simpo or another alpha")
    c, r = (-jnp.expm1(capped(-alpha * x.mean)) / alpha for x in (pair.chosen, pair.rejected))
    return logistic(beta * (c - r) - gamma, label_smoothing)


@reference_free
def cpo(
    pair: PairBatch, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0
) -> Annotated[PairLoss, Claims.of("finite", "raises_margin", "keeps_chosen")]:
    """`-(1 - eps) LS(x) - eps LS(-x) + alpha nll`, x = beta (lp_c - lp_r) (Xu et al. 2024, arXiv:2401.08417).

    CPO-SimPO is `mix((simpo, 1.0), (nll, alpha))`.
    """
    return logistic(beta * (pair.chosen.logp - pair.rejected.logp), label_smoothing) + alpha * nll(pair)


@reference_free
def cpo_hinge(pair: PairBatch, beta: float = 0.1, alpha: float = 1.0) -> PairLoss:
    """`relu(1 - beta (lp_c - lp_r)) + alpha nll`: TRL's CPO with loss_type hinge."""
    return jax.nn.relu(1 - beta * (pair.chosen.logp - pair.rejected.logp)) + alpha * nll(pair)


@reference_free
def cpo_ipo(pair: PairBatch, beta: float = 0.1, alpha: float = 1.0) -> PairLoss:
    """`(a_c - a_r - 1 / (2 beta))^2 + alpha nll`: TRL's CPO with loss_type ipo."""
    return square(pair.chosen.mean - pair.rejected.mean - 1 / (2 * beta)) + alpha * nll(pair)


def log_odds(pair: PairBatch) -> PairLoss:
    """Return ORPO's log-odds ratio: log [odds(chosen) / odds(rejected)], odds = p / (1 - p), p = exp(a)."""
    c, r = pair.chosen.mean, pair.rejected.mean
    return (c - r) - (log1mexp(c) - log1mexp(r))


@reference_free
def orpo(
    pair: PairBatch, beta: float = 0.1
) -> Annotated[PairLoss, Claims.of("finite", "raises_margin", "keeps_chosen")]:
    """`nll - beta LS(log_odds)` (Hong et al. 2024, arXiv:2403.07691).

    nll covers the response's tokens, as in the paper; TRL's covers prompt and response.
    """
    return nll(pair) - beta * log_sigmoid(log_odds(pair))


def orpo_metrics(pair: PairBatch) -> dict[str, Array]:
    """Return TRL's ORPO metrics nll_loss, log_odds_ratio and log_odds_chosen, for preference(extra=...)."""
    odds = log_odds(pair)
    return {"nll_loss": nll(pair), "log_odds_ratio": log_sigmoid(odds), "log_odds_chosen": odds}


def kto_metrics(pair: PairBatch) -> dict[str, Array]:
    """Return the metric kl_mismatched: the log-ratio of mismatched responses. The positive part of its mean
    is KTO's reference point.

    For preference(extra=...); TRL calls it `kl`.
    """
    return {"kl_mismatched": _mismatched(pair).ratio}


def _response(pair: PairBatch, loss: str, kind: str, source: str) -> Response:
    if kind not in pair.responses:
        available = ", ".join(pair.responses)
        raise ValueError(f"{loss} needs a third response `{kind}` (available: {available}). It is {source}")
    return pair.responses[kind]


def _mismatched(pair: PairBatch) -> Response:
    return _response(pair, "kto", "mismatched", "another row's response: set data.third=mismatched")


def _gold_nll(pair: PairBatch) -> Array:
    gold = _response(pair, "tpo", "gold", "a column of the rows, TRL's `reference`: set data.third=gold")
    return -gold.logp / gold.mean_length


@reference_free
def tpo(pair: PairBatch, beta: float = 0.01, alpha: float = 1.0, label_smoothing: float = 0.0) -> PairLoss:
    """`-(1 - eps) LS(x) - eps LS(-x) + alpha nll_gold`, x = beta (lp_c - lp_r): triple preferences, with a
    third response `gold` to imitate (Saeidi et al. 2024, arXiv:2405.16681). Without one, use `partial(cpo,
    alpha=0.0)`.
    """
    return logistic(beta * (pair.chosen.logp - pair.rejected.logp), label_smoothing) + alpha * _gold_nll(pair)


@reference_free
def tpo_hinge(pair: PairBatch, beta: float = 0.01, alpha: float = 1.0) -> PairLoss:
    """`relu(1 - beta (lp_c - lp_r)) + alpha nll_gold`: TRL's TPO with loss_type hinge."""
    return jax.nn.relu(1 - beta * (pair.chosen.logp - pair.rejected.logp)) + alpha * _gold_nll(pair)


@reference_free
def tpo_ipo(pair: PairBatch, beta: float = 0.01, alpha: float = 1.0) -> PairLoss:
    """`(a_c - a_r - 1 / (2 beta))^2 + alpha nll_gold`: TRL's TPO with loss_type ipo."""
    return square(pair.chosen.mean - pair.rejected.mean - 1 / (2 * beta)) + alpha * _gold_nll(pair)


@reference_free
def tpo_l(
    pair: PairBatch, beta: float = 0.01, gamma: float = 0.5, alpha: float = 1.0, label_smoothing: float = 0.0
) -> PairLoss:
    """`-(1 - eps) LS(x) - eps LS(-x) + alpha nll_gold`, x = beta (a_c - a_r) - gamma: TPO-L
    (arXiv:2405.16681).
    """
    x = beta * (pair.chosen.mean - pair.rejected.mean) - gamma
    return logistic(x, label_smoothing) + alpha * _gold_nll(pair)


def _over_responses(pair: PairBatch, chosen: Array, rejected: Array) -> PairLoss:
    """Return the mean of two losses, of the chosen and of the rejected response, over the responses that a
    slot has: one in unpaired rows, two in pairs.
    """
    total = pair.chosen.present * chosen + pair.rejected.present * rejected
    return total / jnp.maximum(pair.chosen.present + pair.rejected.present, 1.0)


def apo_zero_unpaired(
    pair: PairBatch, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> PairLoss:
    """`desirable sigmoid(-beta c)` of a chosen response, `undesirable sigmoid(beta r)` of a rejected one.

    arXiv:2408.06266; TRL's KTOTrainer with loss_type apo_zero_unpaired. desirable, undesirable: the two
    weights. A slot with both responses has the mean of the two losses.
    """
    chosen = desirable_weight * sigmoid(-beta * pair.chosen.ratio)
    return _over_responses(pair, chosen, undesirable_weight * sigmoid(beta * pair.rejected.ratio))


def _weighted_mean(x: Array, weight: Array) -> Array:
    """Return sum w x / sum w; 0 if all weights are 0."""
    total = jnp.sum(weight)
    return jnp.sum(jnp.where(weight > 0, weight * x, 0)) / jnp.where(total > 0, total, 1)


@coupled
def kto(
    pair: PairBatch,
    state: LossState,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PairLoss:
    """`desirable sigmoid(-beta (c - kl))` of a chosen response, `undesirable sigmoid(-beta (kl - r))` of a
    rejected one.

    kl = max(0, mean log-ratio of the step's `mismatched` responses), without gradient (Ethayarajh et al.
    2024, arXiv:2402.01306). A mismatched response is another row's response, with this row's prompt. The mean
    is over the full optimizer batch; TRL's is over a microbatch. A slot with both responses has the mean of
    the two losses. desirable, undesirable: the two weights.
    """
    mismatched = _mismatched(pair)
    kl = jnp.maximum(_weighted_mean(mismatched.ratio, pair.weight * mismatched.present), 0)
    kl = jax.lax.stop_gradient(kl)
    chosen = desirable_weight * sigmoid(-beta * (pair.chosen.ratio - kl))
    return _over_responses(pair, chosen, undesirable_weight * sigmoid(-beta * (kl - pair.rejected.ratio)))


def _merged(state: LossState, mean: Array, count: Array) -> dict[str, Array]:
    """Return the state (running mean of rewards, their count) after `count` more rewards with this mean."""
    total = state["count"].astype(mean.dtype) + count
    old = state["delta"].astype(mean.dtype)
    return {"delta": old + (mean - old) * (count / jnp.maximum(total, 1)), "count": total}  # n / inf is 0


def _bco_update(state: LossState, metrics: Metrics) -> dict[str, Array]:
    chosen, rejected = metrics[CHOSEN_REWARD], metrics[REJECTED_REWARD]
    count = chosen.weight + rejected.weight
    merged = _merged(state, (chosen.total + rejected.total) / jnp.maximum(count, 1), count)
    return {name: x.astype(state[name].dtype) for name, x in merged.items()}


def _bco_eval_state(state: LossState) -> dict[str, Array]:
    """Return the state with an infinite count, so that held-out rewards do not move the mean."""
    return {**state, "count": jnp.full_like(state["count"], jnp.inf)}


@coupled(init={"delta": 0.0, "count": 0.0}, update=_bco_update, eval_state=_bco_eval_state)
def bco(pair: PairBatch, state: LossState, beta: float = 0.1) -> PairLoss:
    """`-LS(beta c - delta)` of a chosen response, `-LS(delta - beta r)` of a rejected one, delta the mean of
    all rewards so far.

    Rewards are beta c and beta r, without gradient; delta includes this step's (Jung et al. 2024,
    arXiv:2404.04656; TRL 1.13's BCOTrainer). Held-out pairs use the last delta of training. After a step
    delta is updated from the metrics rewards/chosen and rewards/rejected, so the beta of preference(...) must
    equal this one. Every response has the same weight in delta, independent of its row's weight. A slot
    with both responses has the mean of the two losses. TRL's density ratio weights (UDM) are not implemented.
    """
    c, r = beta * pair.chosen.ratio, beta * pair.rejected.ratio
    used = (pair.weight > 0).astype(c.dtype)
    here = jnp.concatenate([used * pair.chosen.present, used * pair.rejected.present])
    mean = _weighted_mean(jnp.concatenate([c, r]), here)
    delta = jax.lax.stop_gradient(_merged(state, mean, jnp.sum(here))["delta"])
    return _over_responses(pair, -log_sigmoid(c - delta), -log_sigmoid(delta - r))
