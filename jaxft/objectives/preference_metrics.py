"""Metrics of preference pairs: TRL's names, how margins relate to length, and the names as constants."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxft.objectives.metrics import (
    ENTROPY,
    KL,
    LOSS,
    ROWS,
    TOKEN_ACCURACY,
    Correlation,
    LabelNoise,
    PerRow,
    Sum,
    WinRate,
)
from jaxft.objectives.pair import PairBatch, Response
from jaxft.tree import Metrics

ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
CHOSEN_REWARD, REJECTED_REWARD = "rewards/chosen", "rewards/rejected"
CHOSEN_LOGP, REJECTED_LOGP = "logps/chosen", "logps/rejected"
LOSS_AT_REFERENCE = "loss_at_reference"  # the loss where the policy is the reference
REFERENCE_RANK_ERROR = "reference_rank_error"  # of TR-DPO's newest blend of adapters
MARGIN_LENGTH_CORRELATION = "length/margin_correlation"
LONGER_WINS = "length/accuracy_if_longer_wins"
LABEL_NOISE = "label_noise"
# Accuracy by which response is the longer one: the chosen one, neither, the rejected one.
ACCURACY_BY_LENGTH = {name: f"rewards/accuracies_chosen_{name}" for name in ("longer", "shorter", "alike")}

SIMILAR = (
    0.9  # lengths are alike if the shorter response has at least this fraction of the longer one's tokens
)

TIE_ROUNDING = 1e-5  # of a log-prob that two programs compute in float32


def pair_metrics(pair: PairBatch, reward: Callable[[Response], Array]) -> Metrics:
    """Means over pairs of equal weight: accuracy, margin, rewards and log-probs, and how margins relate to
    length.

    An accuracy counts a tie as 1/2, and does not exist where all pairs are ties (see WinRate), as before the
    first step, when the policy is the reference. A tie has equal rewards, or log-probs of both responses that
    are those of the reference up to rounding.
    """
    chosen, rejected = pair.chosen, pair.rejected
    used = pair.weight > 0
    has_chosen, has_rejected = used & (chosen.present > 0), used & (rejected.present > 0)
    both = has_chosen & has_rejected
    chosen_reward, rejected_reward = reward(chosen), reward(rejected)
    margin = chosen_reward - rejected_reward
    tied = (margin == 0) | (_is_reference(chosen) & _is_reference(rejected))
    longer = chosen.length - rejected.length
    out: Metrics = {
        ACCURACY: WinRate.of(margin, tied, both),
        MARGIN: Sum.of(margin, both),
        MARGIN_LENGTH_CORRELATION: Correlation.of(longer, margin, both),
        LONGER_WINS: Sum.of(longer_wins(longer, margin.dtype), both),
        LABEL_NOISE: LabelNoise.of(margin, both),
    }
    groups = {
        "longer": rejected.length < SIMILAR * chosen.length,
        "shorter": chosen.length < SIMILAR * rejected.length,
    }
    groups["alike"] = ~(groups["longer"] | groups["shorter"])
    for name, where in groups.items():
        out[ACCURACY_BY_LENGTH[name]] = WinRate.of(margin, tied, both & where)
    return out | {
        CHOSEN_REWARD: Sum.of(chosen_reward, has_chosen),
        CHOSEN_LOGP: Sum.of(chosen.logp, has_chosen),
        REJECTED_REWARD: Sum.of(rejected_reward, has_rejected),
        REJECTED_LOGP: Sum.of(rejected.logp, has_rejected),
    }


def pair_values(pair: PairBatch, losses: Float[Array, "B P"], reward: Callable[[Response], Array]) -> Metrics:
    """Return the loss of each pair; where it has both responses, its margin, and 1 if it is won, 0 if it is
    lost and 1/2 for a tie.
    """
    used = pair.weight > 0
    both = used & (pair.chosen.present > 0) & (pair.rejected.present > 0)
    margin = reward(pair.chosen) - reward(pair.rejected)
    tied = (margin == 0) | (_is_reference(pair.chosen) & _is_reference(pair.rejected))
    return {
        ROWS + LOSS: PerRow.of(losses, pair.weight),
        ROWS + MARGIN: PerRow.of(margin, both),
        ROWS + ACCURACY: PerRow.of(wins(margin, tied), both),
    }


def wins(margin: Float[Array, "B P"], tied: Bool[Array, "B P"]) -> Float[Array, "B P"]:
    """Return 1 for a margin above 0, 1/2 for a tie, else 0."""
    return jnp.where(tied, 0.5, (margin > 0).astype(margin.dtype))


def _is_reference(response: Response) -> Bool[Array, "B P"]:
    """Whether a response's log-prob is the reference's up to rounding; False without a reference."""
    if response.reference is None:
        return jnp.zeros(response.logp.shape, bool)
    return jnp.abs(response.logp - response.reference) <= TIE_ROUNDING * jnp.abs(response.reference)


def longer_wins(longer: Float[Array, "B P"], dtype: DTypeLike) -> Float[Array, "B P"]:
    """Return 1 where the chosen response is the longer one (`longer` > 0), 1/2 for a tie, else 0."""
    return (longer > 0).astype(dtype) + (longer == 0).astype(dtype) / 2


def pair_token_metrics(
    pair: PairBatch,
    mean_logit: Float[Array, "B M"],
    entropy: Float[Array, "B M"],
    top1: Float[Array, "B M"],
) -> Metrics:
    """Means over tokens, TRL's: logits of chosen and rejected, entropy of both, top-1 accuracy of the chosen
    one; and a KL.

    kl is the mean of exp(d) - 1 - d with d = log pi_ref - log pi at the chosen responses' tokens (Schulman
    2020's k3). It is exact in expectation for tokens sampled from the policy, an indication on these, which
    training makes likelier. At rejected tokens, which training makes unlikely, it would explode.
    """
    kinds = tuple(pair.responses)
    used = {kind: jnp.where(pair.weight > 0, pair.responses[kind].present, 0) for kind in kinds}

    def mask(*selected: str) -> Array:
        return pair.spread({k: used[k] if k in selected else jnp.zeros_like(used[k]) for k in kinds})

    chosen, rejected, both = mask("chosen"), mask("rejected"), mask("chosen", "rejected")
    out: Metrics = {
        "logits/chosen": Sum.of(mean_logit, chosen),
        "logits/rejected": Sum.of(mean_logit, rejected),
        ENTROPY: Sum.of(entropy, both),
        TOKEN_ACCURACY: Sum.of(top1, chosen),
    }
    if pair.tokens.reference is not None:
        d = pair.tokens.reference - pair.tokens.logp
        out[KL] = Sum.of(jnp.expm1(d) - d, chosen)
    return out
