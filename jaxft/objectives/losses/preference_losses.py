"""Preference losses over chosen and rejected responses against a reference: pure functions `(pair, ...) ->
[B, P]`.

Set a loss's parameters with `partial(ipo, beta=0.1)` and pass the result to `preference(...)`. In the
docstrings c and r are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected response,
summed over tokens; |c| and |r| the two responses' lengths in tokens; s_c = score(c), s_r = score(r);
D = s_c - s_r; LS = log sigmoid; eps = label_smoothing. Values and gradients equal those in TRL 1.16's
DPOTrainer unless a docstring says what differs. Losses without a reference and losses of single responses are
in reference_free_losses.py.

Losses with a parameter `score` apply it to c and r; by default it is the log-ratio itself. The other scores
belong to other f-divergences, and for those a term that depends on the prompt alone cancels only in D.

A pair whose chosen response has a log-ratio of 2, and the rejected one of -1:

>>> from functools import partial
>>> from jaxft.lab.loss_evaluation import synthetic_pairs
>>> pair = synthetic_pairs({"chosen": 2.0, "rejected": -1.0}, length=10)
>>> round(dpo(pair, beta=0.1).item(), 3)
0.554
>>> mine = mix((partial(ipo, beta=1.0), 1.0), (dpo, 0.5))
>>> round(mine(pair).item(), 3)
0.317

As a setting: `jaxft train dpo loss=ipo beta=1`; in a recipe `preference(model, loss=partial(ipo, beta=1.0))`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from jaxft.nn.tree import Metrics
from jaxft.objectives.pair import (
    Claims,
    LossState,
    PairBatch,
    PreferenceLoss,
    Response,
    capped,
    coupled,
    declaration,
    logistic,
    loss_name,
    loss_values,
    reference_free,
    require,
    square,
)

PairLoss = Float[Array, "B P"]
OfMargin = Annotated[PairLoss, Claims.of("difference", "bradley_terry", "finite", "raises_margin")]
Calibrated = Annotated[
    PairLoss,
    Claims.of("difference", "antisymmetric", "bradley_terry", "calibrated", "finite", "raises_margin"),
]
NAMED = ("__module__", "__name__", "__qualname__", "__doc__")  # what a loss around a loss takes from it
Score = Callable[[Array], Array]


def reverse_kl(ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the log-ratio itself: the score of DPO, which follows from the reverse KL divergence."""
    return ratio


def forward_kl(ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the score 1 - exp(-ratio) of the forward KL divergence (Wang et al. 2023, arXiv:2309.16240).

    -ratio is capped at 80; TRL's overflows at a ratio below -88 in float32.
    """
    return -jnp.expm1(capped(-ratio))


def js_divergence(ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the score log 2 + log sigmoid(ratio) of the Jensen-Shannon divergence (arXiv:2309.16240)."""
    return math.log(2) + log_sigmoid(ratio)


def alpha_divergence(ratio: Float[Array, "..."], alpha: float = 0.5) -> Float[Array, "..."]:
    """Return the score (exp((alpha - 1) ratio) - 1) / (alpha - 1) of the alpha divergence (arXiv:2309.16240).

    At alpha = 1 it is its limit, the ratio. The exponent is capped.
    """
    k = alpha - 1.0
    limit = jnp.abs(k) < 1e-6
    safe = jnp.where(limit, 1.0, k).astype(ratio.dtype)
    return jnp.where(limit, ratio, jnp.expm1(capped(safe * ratio)) / safe)


def _scores(pair: PairBatch, score: Score) -> tuple[Array, Array]:
    return score(pair.chosen.ratio), score(pair.rejected.ratio)


def _difference(pair: PairBatch, score: Score) -> Array:
    chosen, rejected = _scores(pair, score)
    return chosen - rejected


def _mean_difference(pair: PairBatch, score: Score) -> Array:
    chosen, rejected = _scores(pair, score)
    return chosen / pair.chosen.length - rejected / pair.rejected.length


def dpo(pair: PairBatch, beta: float = 0.1, score: Score = reverse_kl) -> Calibrated:
    """`-LS(beta D)` (Rafailov et al. 2023, arXiv:2305.18290); TRL's `sigmoid`. log 2 at the reference."""
    return logistic(beta * _difference(pair, score))


def cdpo(
    pair: PairBatch, beta: float = 0.1, label_smoothing: float = 0.1, score: Score = reverse_kl
) -> OfMargin:
    """`-(1 - eps) LS(beta D) - eps LS(-beta D)`: labels are wrong with probability eps (Mitchell 2023).

    Not in TRL 1.16.
    """
    return logistic(beta * _difference(pair, score), label_smoothing)


def dpo_margin(pair: PairBatch, beta: float = 0.1, score: Score = reverse_kl) -> Calibrated:
    """`-LS(beta D - m)` with m the rows' `margin`, or the difference of their ratings `score_chosen` and
    `score_rejected`: DPO with an offset (Amini et al. 2024, arXiv:2402.10571).

    Not in TRL's DPO. Raises ValueError if the rows have no such columns.
    """
    x, ratings = beta * _difference(pair, score), ("score_chosen", "score_rejected")
    if "margin" in pair.columns:
        margin = pair.columns["margin"]
    elif {*ratings} <= pair.columns.keys():
        margin = pair.columns[ratings[0]] - pair.columns[ratings[1]]
    else:
        available = ", ".join(sorted(pair.columns)) or "none"
        raise ValueError(
            f"dpo_margin: the rows have no column `margin` (available: {available}). Add it, or "
            f"{','.join(ratings)}, with data.extras, or use dpo"
        )
    return logistic(x - margin.astype(x.dtype))


def dpop(
    pair: PairBatch, beta: float = 0.1, penalty: float = 50.0
) -> Annotated[PairLoss, Claims.of("raises_margin", "keeps_chosen")]:
    """`-LS(beta (c - r - penalty relu(-c)))`: penalises a chosen response that loses log-prob.

    DPOP (Pal et al. 2024, arXiv:2402.13228).
    """
    c, r = _scores(pair, reverse_kl)
    return logistic(beta * (c - r - penalty * jax.nn.relu(-c)))


def rdpo(
    pair: PairBatch, beta: float = 0.1, alpha: float = 0.01, score: Score = reverse_kl
) -> Annotated[PairLoss, Claims.of("finite", "raises_margin")]:
    """`-LS(beta D + alpha (|c| - |r|))`: R-DPO, which penalises length (Park et al. 2024, arXiv:2403.19159).

    The policy maximises reward - alpha |y| with a KL penalty beta, so reward = beta log(pi / pi_ref) + alpha
    |y|: the term alpha |y| explains preferences for longer responses, and the policy does not learn them.
    """
    return logistic(beta * _difference(pair, score) + alpha * (pair.chosen.length - pair.rejected.length))


def hinge(
    pair: PairBatch, beta: float = 0.1, score: Score = reverse_kl
) -> Annotated[PairLoss, Claims.of("difference", "raises_margin")]:
    """`relu(1 - beta D)`: hinge loss on D = score(c) - score(r), the scores of the log-ratios of the chosen
    and the rejected response (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425; RSO, arXiv:2309.06657).
    """
    return jax.nn.relu(1 - beta * _difference(pair, score))


def squared_hinge(pair: PairBatch, beta: float = 0.1, score: Score = reverse_kl) -> OfMargin:
    """`relu(1 - beta D)^2`: SLiC-HF's margin (arXiv:2305.10425) with a smooth edge. Not in TRL."""
    return square(hinge(pair, beta, score))


def ipo(
    pair: PairBatch, beta: float = 0.1, score: Score = reverse_kl
) -> Annotated[PairLoss, Claims.of("antisymmetric", "bradley_terry", "finite", "raises_margin")]:
    """`(s_c / |c| - s_r / |r| - 1 / (2 beta))^2`, per token as its authors use it (Azar et al. 2023,
    arXiv:2310.12036).
    """
    return square(_mean_difference(pair, score) - 1 / (2 * beta))


def sigmoid_norm(
    pair: PairBatch, beta: float = 0.1, score: Score = reverse_kl
) -> Annotated[PairLoss, Claims.of("bradley_terry", "calibrated", "finite", "raises_margin")]:
    """`-LS(beta (s_c / |c| - s_r / |r|))`: DPO of mean log-ratios (Tulu 3, arXiv:2411.15124)."""
    return logistic(beta * _mean_difference(pair, score))


def exo_pair(
    pair: PairBatch, beta: float = 0.1, label_smoothing: float = 1e-3, score: Score = reverse_kl
) -> OfMargin:
    """`q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps)`, q = sigmoid(beta D).

    EXO (Ji et al. 2024, arXiv:2402.00856). Raises ValueError at eps = 0, where log eps is infinite.
    """
    ok = (label_smoothing > 0) & (label_smoothing < 1)
    require(ok, f"exo_pair: label_smoothing must be in (0, 1), got {label_smoothing}; its paper uses 1e-3")
    x = beta * _difference(pair, score)
    wins = sigmoid(x) * (log_sigmoid(x) - jnp.log1p(-label_smoothing))
    return wins + sigmoid(-x) * (log_sigmoid(-x) - jnp.log(label_smoothing))


def robust(
    pair: PairBatch, beta: float = 0.1, label_smoothing: float = 0.1, score: Score = reverse_kl
) -> Annotated[PairLoss, Claims.of("difference", "antisymmetric", "raises_margin")]:
    """`[-(1 - eps) LS(beta D) + eps LS(-beta D)] / (1 - 2 eps)` (Chowdhury et al. 2024, arXiv:2403.00409).

    If a fraction eps of the labels is flipped, its expected value is dpo's on the right labels. Raises
    ValueError for eps outside [0, 0.5), where TRL warns.
    """
    eps = label_smoothing
    problem = f"robust: label_smoothing must be in [0, 0.5), got {eps}; it is the fraction of flipped labels"
    require((eps >= 0) & (eps < 0.5), problem)
    x = beta * _difference(pair, score)
    return (-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / (1 - 2 * eps)


def discopop(pair: PairBatch, beta: float = 0.1, tau: float = 0.05, score: Score = reverse_kl) -> PairLoss:
    """`-LS(x) (1 - m) + exp(-x) m`, x = beta D, m = sigmoid(x / tau) (Lu et al. 2024, arXiv:2406.08414).

    It isn't convex: near D = 0 it lowers the margin. The second term is computed as exp(LS(x / tau) - x);
    TRL's is infinity times 0 for x < -88.
    """
    require(tau > 0, f"discopop: tau must be above 0, got {tau}; its paper uses 0.05")
    x = beta * _difference(pair, score)
    return -log_sigmoid(x) * sigmoid(-x / tau) + jnp.exp(capped(log_sigmoid(x / tau) - x))


def nca_pair(pair: PairBatch, beta: float = 0.1) -> PairLoss:
    """`-LS(beta c) - LS(-beta c) / 2 - LS(-beta r) / 2` (Chen et al. 2024, arXiv:2402.05369)."""
    c, r = beta * pair.chosen.ratio, beta * pair.rejected.ratio
    return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


def bco_pair(pair: PairBatch, beta: float = 0.1) -> PairLoss:
    """`-LS(beta c) - LS(-beta r)`: BCO (Jung et al. 2024, arXiv:2404.04656) without the shift of
    reference_free_losses.bco.
    """
    return -log_sigmoid(beta * pair.chosen.ratio) - log_sigmoid(-beta * pair.rejected.ratio)


def sppo_hard(
    pair: PairBatch, beta: float = 0.1
) -> Annotated[PairLoss, Claims.of("antisymmetric", "bradley_terry", "finite", "raises_margin")]:
    """`(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2`: SPPO with certain wins (Wu et al. 2024,
    arXiv:2405.00675).
    """
    return square(pair.chosen.ratio - 0.5 / beta) + square(pair.rejected.ratio + 0.5 / beta)


def apo_zero(pair: PairBatch, beta: float = 0.1) -> PairLoss:
    """`sigmoid(-beta c) + sigmoid(beta r)`: for chosen responses that are better than the policy's samples.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    return sigmoid(-beta * pair.chosen.ratio) + sigmoid(beta * pair.rejected.ratio)


def apo_down(pair: PairBatch, beta: float = 0.1) -> PairLoss:
    """APO-down, `sigmoid(beta c) + sigmoid(-beta (c - r))`: for chosen responses that are worse than the
    policy's samples (arXiv:2408.06266, eq. 8).
    """
    c, r = pair.chosen.ratio, pair.rejected.ratio
    return sigmoid(beta * c) + sigmoid(-beta * (c - r))


@reference_free
def nll(pair: PairBatch) -> Annotated[PairLoss, Claims.of("finite", "keeps_chosen")]:
    """`-log pi(chosen) / mean |c|`, whose weighted sum is minus the mean log-prob of the step's chosen
    tokens; TRL's `sft`.

    The mean is over the whole optimizer batch; TRL's is over a microbatch, so that it depends on how the
    batch is split.
    """
    return -pair.chosen.logp / pair.chosen.mean_length


def _reference(response: Response) -> Array:
    if response.reference is None:
        raise ValueError(
            "aot sorts the reference's log-probs, but the objective has no reference. Set "
            "preference(reference='start')"
        )
    return response.reference


def _order(x: Float[Array, " N"], weight: Float[Array, " N"]) -> Array:
    """Return indices that sort x in ascending order, with slots of weight 0 at the end."""
    return jnp.argsort(jnp.where(weight > 0, x, jnp.inf))


def _against_same_rank(
    x: Float[Array, "B P"], y: Float[Array, "B P"], weight: Float[Array, "B P"]
) -> Float[Array, "B P"]:
    """Return x minus the y of the same rank: the nth smallest y for the nth smallest x; in the order of x.
    Pairs of weight 0 rank last, in x and in y.
    """
    flat_x, flat_y, used = x.reshape(x.size), y.reshape(y.size), weight.reshape(weight.size)
    rank = jnp.argsort(_order(flat_x, used))
    return (flat_x - flat_y[_order(flat_y, used)][rank]).reshape(x.shape)


@coupled
def aot(pair: PairBatch, state: LossState, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """`-(1 - eps) LS(beta d) - eps LS(-beta d)`, d = sort(log pi(chosen) - log pi(rejected)) - sort(the
    reference's).

    The policy's margins should stochastically dominate the reference's (Melnyk et al. 2024,
    arXiv:2406.05882). Sorts the full optimizer batch; TRL sorts each microbatch. The value returned for a
    pair is the loss of the rank that its policy margin has.
    """
    policy = pair.chosen.logp - pair.rejected.logp
    reference = _reference(pair.chosen) - _reference(pair.rejected)
    return logistic(beta * _against_same_rank(policy, reference, pair.weight), label_smoothing)


@coupled
def aot_unpaired(
    pair: PairBatch, state: LossState, beta: float = 0.1, label_smoothing: float = 0.0
) -> PairLoss:
    """aot with d = sort(c) - sort(r): chosen and rejected responses need not share a prompt
    (arXiv:2406.05882).

    The value returned for a pair is the loss of the rank that its chosen response has.
    """
    d = _against_same_rank(pair.chosen.ratio, pair.rejected.ratio, pair.weight)
    return logistic(beta * d, label_smoothing)


def mix(*parts: tuple[Callable[..., Array], float]) -> PreferenceLoss:
    """Return the loss `sum_k w_k loss_k(pair)` of parts (loss_k, w_k). It is coupled if one of them is.

    MPO (Wang et al. 2024, arXiv:2411.10442) is `mix((dpo, 0.8), (bco_pair, 0.2), (nll, 1.0))`, RPO (Pang et
    al. 2024, arXiv:2404.19733) `mix((dpo, 1.0), (nll, 1.0))`.
    """
    require(len(parts) > 0, "mix has no losses; pass (loss, weight) pairs")
    declared = [declaration(loss) for loss, _ in parts]

    def state_of(i: int, state: LossState) -> dict[str, Any]:
        return {name: state[f"{name}.{i}"] for name in declared[i].init}

    def mixed(pair: PairBatch, state: LossState | None = None) -> Array:
        first, *rest = (
            weight * loss_values(loss, pair, state_of(i, state or {}))
            for i, (loss, weight) in enumerate(parts)
        )
        return sum(rest, first)

    def joined(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        return {f"{name}.{i}": x for i, state in enumerate(states) for name, x in state.items()}

    def update(state: LossState, metrics: Metrics) -> dict[str, Any]:
        new = (loss.update(state_of(i, state), metrics) for i, loss in enumerate(declared))
        return {**state, **joined(new)}

    def eval_state(state: LossState) -> dict[str, Any]:
        return {**state, **joined(loss.eval_state(state_of(i, state)) for i, loss in enumerate(declared))}

    return PreferenceLoss(
        mixed,
        coupled=any(loss.coupled for loss in declared),
        reads_reference=any(loss.reads_reference for loss in declared),
        init=joined(loss.init for loss in declared),
        update=update,
        eval_state=eval_state,
    )


def wpo(loss: Callable[..., Array]) -> PreferenceLoss:
    """Return the loss `w_c w_r loss`, w = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2), where w
    has no gradient.

    WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2): responses that the policy is likely to sample count for
    more. wpo(nll) weights each pair; TRL's `sft` with use_weighting weights the batch's mean log-prob. Raises
    ValueError for a coupled loss.
    """
    declared = declaration(loss)
    if declared.coupled:
        raise ValueError(
            f"wpo weights each pair, but {loss_name(loss)} couples the pairs of a batch. Apply wpo to other "
            f"losses, and add this one by mix((wpo(dpo), 1.0), ({loss_name(loss)}, 1.0))"
        )

    @wraps(loss, NAMED, updated=())
    def weighted(pair: PairBatch, *args: Any, **knobs: Any) -> Array:
        aligned = pair.total(pair.tokens.logp - pair.tokens.log_sum_p2)
        chosen, rejected = aligned["chosen"] / pair.chosen.length, aligned["rejected"] / pair.rejected.length
        weight = jnp.exp(chosen) * jnp.exp(rejected)
        return jax.lax.stop_gradient(weight) * loss(pair, *args, **knobs)

    return replace(declared, fn=weighted)


def _length_desensitised(pair: PairBatch, alpha: float) -> PairBatch:
    """Return the pairs with the log-probs of all tokens after the first min(|c|, |r|) of a response
    multiplied by alpha; pairs that lack one of the two responses are unchanged.
    """
    c, r = pair.chosen, pair.rejected
    both = (c.present > 0) & (r.present > 0)
    shared = jnp.where(both, jnp.minimum(c.length, r.length), jnp.maximum(c.length, r.length))
    position = pair.tokens.position.astype(pair.tokens.logp.dtype)
    near = position < pair.spread({kind: shared for kind in pair.responses})

    def shortened(x: Array) -> dict[str, Array]:
        return pair.total(jnp.where(near, x, alpha * x))

    logp = shortened(pair.tokens.logp)
    reference = {} if pair.tokens.reference is None else shortened(pair.tokens.reference)
    changed = {
        kind: replace(pair.responses[kind], logp=logp[kind], reference=reference.get(kind))
        for kind in ("chosen", "rejected")
    }
    return replace(pair, responses={**pair.responses, **changed})


def length_desensitised(loss: Callable[..., Array], alpha: float = 0.5) -> PreferenceLoss:
    """Return the loss with every log-prob of a response, of policy and reference, replaced by
    `sum_{t <= n} log pi(y_t) + alpha sum_{t > n} log pi(y_t)`, n = min(|c|, |r|).

    LD-DPO (Liu et al. 2024, arXiv:2409.06411), for any loss; the lengths that the loss reads are unchanged.
    For TRL's combination with `sft` use `mix((length_desensitised(dpo), 1.0), (nll, 1.0))`.
    """

    @wraps(loss, NAMED, updated=())
    def desensitised(pair: PairBatch, *args: Any, **knobs: Any) -> Array:
        return loss(_length_desensitised(pair, alpha), *args, **knobs)

    return replace(declaration(loss), fn=desensitised)
