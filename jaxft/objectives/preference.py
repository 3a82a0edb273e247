"""The objective around a preference loss: one forward pass over the pairs, one over the reference, the metrics.

`preference(model, loss=partial(dpo, beta=0.1))` is linear in the batch's pair weights, unless the loss is Coupled: then
train.py judges all microbatches' log-probs together and is exact all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.batch import Pairs, without_fields
from jaxft.nn import fused_update
from jaxft.objectives.alarms import watch, words
from jaxft.objectives.logprobs import LanguageModel, LogProbs
from jaxft.objectives.metrics import Correlation, Disagreement, Sum
from jaxft.objectives.objective import Facts, Objective, Report, Scores
from jaxft.objectives.pair import (
    LossState,
    PairBatch,
    Response,
    check_knobs,
    declaration,
    loss_name,
    loss_values,
    pair_batch,
)
from jaxft.objectives.read_positions import read_logps
from jaxft.objectives.sft import sft
from jaxft.tree import Aux, Metrics, Params, struct

UNUSED = ("ids", "segments", "positions", "read", "targets", "last", "reference", "branches")  # by a loss
SHORT = 0.9  # an answer is the shorter one below this share of the other's length


@dataclass(frozen=True)
class EMAReference:
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every `every` steps ref <- alpha policy + (1 - alpha) ref."""

    alpha: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.every < 1:
            raise ValueError(f"EMAReference: alpha is in (0, 1] and every at least 1, got {self}")


Reference = Literal["start", "precomputed"] | EMAReference | None


@struct
class Outputs:
    """The forward passes of a batch, [B, M] and small: all that a loss and the metrics need. Only `logp` has a gradient.

    batch: the pairs without their tokens.
    """

    logp: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    log_sum_p2: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    top1: Float[Array, "B M"]
    mean_logit: Float[Array, "B M"]
    batch: Pairs


def implicit(answer: Response) -> Array:
    """log pi(answer) - log pi_ref(answer): DPO's implicit reward over beta."""
    return answer.ratio


def summed(answer: Response) -> Array:
    """log pi(answer)."""
    return answer.logp


def per_token(answer: Response) -> Array:
    """log pi(answer) / tokens, which SimPO and ORPO compare."""
    return answer.mean


def nothing(pair: PairBatch) -> dict[str, Array]:
    """No further metrics."""
    return {}


def preference(
    model: LanguageModel,
    loss: Callable[..., Array],
    reference: Reference = "start",
    beta: float = 0.1,
    reward: Callable[[Response], Array] = implicit,
    extra: Callable[[PairBatch], dict[str, Array]] = nothing,
) -> Objective:
    """An objective of `loss(pair: PairBatch) -> [B, P]`, one of preference_losses.py's or your own: `sum_p w_p loss_p`.

    reference: "start" is the model at step 0, free where that is the base without a fresh adapter, else a frozen copy of the
    trainable leaves; "precomputed" reads log-probs that were computed once before the run; EMAReference follows the policy;
    None runs no reference. beta, reward: of the metrics rewards/*, beta * reward(answer). The loss has its own beta. extra(pair):
    further metrics, one value per pair [B, P] each, whose means over the pairs are logged.
    """
    check_knobs(loss)
    declared = declaration(loss)
    if reference is None and reward is implicit:
        raise ValueError(
            "without a reference the implicit reward is unknown; give preference(...) reward=summed or per_token"
        )
    ema = reference if isinstance(reference, EMAReference) else None

    def logprobs(params: Params, batch: Pairs, key: Array | None) -> LogProbs:
        return read_logps(model, params, model.hidden(params, batch, key), batch.read, batch.targets)

    def reference_logps(params: Params, batch: Pairs, aux: Aux) -> Array:
        frozen = jax.lax.stop_gradient(reference_params(params, aux))
        return logprobs(frozen, batch, None).logp

    def forward(params: Params, batch: Pairs, key: Array | None, aux: Aux) -> Outputs:
        lp = _without_padding(batch, logprobs(params, batch, key))
        known = None
        if reference == "precomputed":
            known = _without_padding(batch, _precomputed(batch).astype(lp.logp.dtype))
        elif reference is not None:
            known = _without_padding(batch, reference_logps(params, batch, aux))
        constants = jax.lax.stop_gradient((known, lp.log_sum_p2, lp.entropy, lp.top1, lp.mean_logit))
        return Outputs(lp.logp, *constants, without_fields(batch, UNUSED))

    def objective_loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        pair = pair_batch(outputs.batch, outputs.logp, outputs.log_sum_p2, outputs.reference)
        state = aux.get("loss", {})
        values = _checked_values(loss, pair, state)
        used = pair.weight > 0
        value = jnp.sum(jnp.where(used, pair.weight * values, 0))
        metrics = {
            "loss": Sum(value, jnp.sum(pair.weight)),
            **_metrics(pair, lambda answer: beta * reward(answer)),
            **_token_metrics(outputs, pair),
        }
        metrics |= {name: Sum.of(x, used) for name, x in extra(pair).items()}
        if outputs.reference is not None:
            start = jnp.where(used, pair.weight * loss_values(loss, _at_reference(pair), state), 0)
            metrics["loss_at_reference"] = Sum(jnp.sum(start), jnp.sum(pair.weight))
        return value, jax.lax.stop_gradient(metrics)

    def init(trainable: Params, at_base: bool) -> Aux:
        aux: dict[str, Any] = {}
        if ema or (reference == "start" and not at_base):
            aux["reference"] = jax.tree.map(jnp.copy, trainable)
        if ema:
            aux["steps"] = jnp.zeros((), jnp.int32)
        if declared.init:
            aux["loss"] = {name: jnp.asarray(value, jnp.float32) for name, value in declared.init.items()}
        return aux

    def update(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
        out = dict(aux)
        if declared.init:
            out["loss"] = declared.update(aux["loss"], metrics)
        return out | _moved(ema, aux, trainable) if ema else out

    def score(params: Params, batch: Pairs, aux: Aux) -> Scores:
        known = None
        if reference not in (None, "precomputed"):
            known = reference_logps(params, batch, aux)
        return Scores(logprobs(params, batch, None).logp, known)

    kind: Any = "moving" if ema else reference or "none"
    return Objective(
        forward,
        objective_loss,
        init,
        update,
        score,
        text=sft(model),
        facts=Facts(coupled=declared.coupled, reference=kind),
        report=Report(partial(watch, beta if reference is not None and reward is implicit else None), words),
    )


def reference_params(params: Any, aux: Any) -> Any:
    """The reference's parameters: the copy that aux keeps, or the base without the adapter."""
    if "reference" in aux:
        return tree.combine(aux["reference"], fused_update.plain(params))
    return {"base": params["base"]}


def _without_padding(batch: Pairs, tree: Any) -> Any:
    """Arrays [B, M] with 0 where a read position belongs to no answer."""
    real = batch.answers < batch.lengths.shape[1] * batch.lengths.shape[2]
    return jax.tree.map(lambda x: jnp.where(real, x, jnp.zeros((), x.dtype)), tree)


def _precomputed(batch: Pairs) -> Array:
    if batch.reference is None:
        raise ValueError("the batch has no reference log-probs; compute them first or set reference=start")
    return batch.reference


def _checked_values(loss: Callable[..., Array], pair: PairBatch, state: LossState) -> Array:
    """The loss's values [B, P]. Raises ValueError that names the loss if it fails or returns another shape."""
    name = loss_name(loss)
    try:
        values = loss_values(loss, pair, state)
    except KeyError as error:
        known = ", ".join([*pair.responses, *pair.columns])
        raise ValueError(
            f"loss {name}: the pairs have no field {error} (available: {known}). "
            f"Add a column of the rows with data.extras"
        ) from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"loss {name} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    found = getattr(values, "shape", type(values).__name__)
    if found != pair.weight.shape:
        raise ValueError(f"loss {name} returns one value per pair, {pair.weight.shape}; got {found}")
    return values


def _at_reference(pair: PairBatch) -> PairBatch:
    """The pairs as they would be scored by a policy that is the reference."""
    same = lambda x: replace(x, logp=x.reference)  # noqa: E731
    return replace(
        pair, responses={kind: same(a) for kind, a in pair.responses.items()}, tokens=same(pair.tokens)
    )


def _metrics(pair: PairBatch, reward: Callable) -> dict[str, Any]:
    """TRL's numbers, every pair the same weight, and how margins go with length."""
    chosen, rejected = pair.chosen, pair.rejected
    used = pair.weight > 0
    has = {kind: used & (pair.responses[kind].present > 0) for kind in ("chosen", "rejected")}
    both = has["chosen"] & has["rejected"]
    rewards = {"chosen": reward(chosen), "rejected": reward(rejected)}
    margin = rewards["chosen"] - rewards["rejected"]
    won = jnp.where(jnp.isnan(margin), margin, (margin > 0).astype(margin.dtype))
    longer = chosen.length - rejected.length
    sides = {
        "longer": rejected.length < SHORT * chosen.length,
        "shorter": chosen.length < SHORT * rejected.length,
    }
    sides["alike"] = ~(sides["longer"] | sides["shorter"])
    out: dict[str, Any] = {
        "rewards/accuracies": Sum.of(won, both),
        "rewards/margins": Sum.of(margin, both),
        "length/margin_correlation": Correlation.of(longer, margin, both),
        "length/accuracy_if_longer_wins": Sum.of(
            (longer > 0).astype(margin.dtype) + (longer == 0).astype(margin.dtype) / 2, both
        ),
        "label_noise": Disagreement.of(margin, both),
    }
    for name, where in sides.items():
        out[f"rewards/accuracies_chosen_{name}"] = Sum.of(won, both & where)
    for kind, answer in (("chosen", chosen), ("rejected", rejected)):
        out[f"rewards/{kind}"] = Sum.of(rewards[kind], has[kind])
        out[f"logps/{kind}"] = Sum.of(answer.logp, has[kind])
    return out


def _token_metrics(outputs: Outputs, pair: PairBatch) -> dict[str, Any]:
    """Means over tokens, TRL's: logits by kind, entropy of both answers, top-1 accuracy of the chosen one; and a KL estimate.

    kl is the mean of exp(d) - 1 - d with d = log pi_ref - log pi at the chosen answers' tokens (Schulman 2020's k3): exact in
    expectation for tokens that the policy draws, an indication on these, which it is taught to draw. Rejected ones, which it is
    taught to avoid, would make it explode.
    """
    kinds = tuple(pair.responses)
    used = {kind: jnp.where(pair.weight > 0, pair.responses[kind].present, 0) for kind in kinds}
    of = lambda *wanted: pair.spread({k: used[k] if k in wanted else jnp.zeros_like(used[k]) for k in kinds})  # noqa: E731
    chosen, rejected, both = of("chosen"), of("rejected"), of("chosen", "rejected")
    out: dict[str, Any] = {
        "logits/chosen": Sum.of(outputs.mean_logit, chosen),
        "logits/rejected": Sum.of(outputs.mean_logit, rejected),
        "entropy": Sum.of(outputs.entropy, both),
        "mean_token_accuracy": Sum.of(outputs.top1, chosen),
    }
    if outputs.reference is not None:
        d = outputs.reference - outputs.logp
        out["kl"] = Sum.of(jnp.expm1(d) - d, chosen)
    return out


def _moved(ema: EMAReference, aux: Aux, trainable: Params) -> Aux:
    """The reference after a step, and its count of steps."""
    steps = aux["steps"] + 1
    due = steps % ema.every == 0

    def blend(p: Array, r: Array) -> Array:
        return jnp.where(due, ema.alpha * p + (1 - ema.alpha) * r, r)

    return {"steps": steps, "reference": jax.tree.map(blend, trainable, aux["reference"])}
