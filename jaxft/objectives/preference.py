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
from jaxft.batch import Pairs
from jaxft.nn import fused_update
from jaxft.nn.param import Model
from jaxft.objectives.alarms import watch, words
from jaxft.objectives.metrics import Correlation, Disagreement, Sum
from jaxft.objectives.pair import Answer, Coupled, Scored, check_knobs, scored, unwrap
from jaxft.objectives.read_positions import read_logps
from jaxft.objectives.sft import sft
from jaxft.tree import struct

Reference = Literal["start", "precomputed"]
SHORT = 0.9  # an answer is the shorter one below this share of the other's length


@dataclass(frozen=True)
class Moving:
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every `every` steps ref <- alpha policy + (1 - alpha) ref."""

    alpha: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.every < 1:
            raise ValueError(f"a moving reference has alpha in (0, 1] and every from 1 up, found {self}")


@struct
class Seen:
    """What the forward passes leave of a batch, [B, M] and small: all that a loss and the metrics need.

    `logp` has a gradient, nothing else has one. batch: the pairs without their tokens.
    """

    logp: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    square: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    top1: Float[Array, "B M"]
    mean_logit: Float[Array, "B M"]
    batch: Pairs


@dataclass(frozen=True)
class Preference:
    """`(params, batch, key, aux) -> (loss, metrics)` in its two halves; see preference().

    see(params, batch, key, aux) -> Seen; judge(seen, aux) -> (loss, metrics) of one microbatch or, concatenated, of many.
    start(trainable, at_base) -> aux; after_step(aux, trainable, metrics) -> aux. logps(params, batch) -> the answers' log-probs
    [B, M]; text is the objective that measures general text. watch(memory, entry, last) and words(first, last) tell the user what
    the numbers mean, see watch.py.
    """

    see: Callable[..., Seen]
    judge: Callable[..., tuple[Array, dict[str, Any]]]
    start: Callable[..., dict[str, Any]]
    after_step: Callable[..., dict[str, Any]]
    logps: Callable[..., Array]
    text: Callable[..., tuple[Array, dict[str, Any]]]
    watch: Callable[..., tuple[dict[str, Any], list[str], list[str]]]
    words: Callable[..., list[str]]
    coupled: bool
    precomputed: bool

    def __call__(
        self, params: Any, batch: Pairs, key: Array | None, aux: Any
    ) -> tuple[Array, dict[str, Any]]:
        """Both halves, for a batch that is judged alone."""
        return self.judge(self.see(params, batch, key, aux), aux)


def implicit(answer: Answer) -> Array:
    """log pi(answer) - log pi_ref(answer): DPO's implicit reward over beta."""
    return answer.ratio


def summed(answer: Answer) -> Array:
    """log pi(answer)."""
    return answer.logp


def per_token(answer: Answer) -> Array:
    """log pi(answer) / tokens, which SimPO and ORPO compare."""
    return answer.mean


def nothing(pair: Scored) -> dict[str, Array]:
    """No further metrics."""
    return {}


def preference(
    model: Model,
    loss: Callable[..., Array],
    reference: Reference | Moving | None = "start",
    beta: float = 0.1,
    reward: Callable[[Answer], Array] = implicit,
    extra: Callable[[Scored], dict[str, Array]] = nothing,
) -> Preference:
    """An objective of `loss(pair: Scored) -> [B, P]`, one of preference.py's or your own: `sum_p w_p loss_p`.

    reference: "start" is the model at step 0, for nothing where that is the base without a fresh adapter, else a frozen copy
    of the trainable leaves; "precomputed" takes log-probs that were computed once before the run; Moving follows the policy;
    None runs no reference. beta, reward: of the metrics rewards/*, beta * reward(answer). The loss has its own beta. extra(pair):
    further metrics, a value [B, P] a pair each, whose means over the pairs are logged.
    """
    check_knobs(loss)
    loss = unwrap(loss)
    if reference is None and reward is implicit:
        raise ValueError(
            "without a reference the implicit reward is unknown; give preference(...) reward=summed or per_token"
        )
    coupled = isinstance(loss, Coupled)
    return Preference(
        see=partial(_see, model, reference),
        judge=partial(_judge, loss, partial(_reward, reward, beta), extra),
        start=partial(_start, loss, reference),
        after_step=partial(_after_step, loss, reference),
        logps=lambda params, batch: answer_logps(model, params, batch, None).logp,
        text=sft(model),
        watch=partial(watch, beta if reference is not None and reward is implicit else None),
        words=words,
        coupled=coupled,
        precomputed=reference == "precomputed",
    )


def _reward(reward: Callable, beta: float, answer: Answer) -> Array:
    return beta * reward(answer)


def answer_logps(model: Model, params: Any, batch: Pairs, key: Array | None) -> Any:
    """LogProbs [B, M] of the answers' tokens; all answers go through the model together."""
    return read_logps(model, params, model.hidden(params, batch, key), batch.read, batch.targets)


def reference_params(params: Any, aux: Any) -> Any:
    """The reference's parameters: the copy that aux keeps, or the base without the adapter."""
    if "reference" in aux:
        return tree.combine(aux["reference"], fused_update.plain(params))
    return {"base": params["base"]}


def _see(model: Model, reference: Any, params: Any, batch: Pairs, key: Array | None, aux: Any) -> Seen:
    real = batch.answers < batch.lengths.shape[1] * batch.lengths.shape[2]
    mask = lambda x: jnp.where(real, x, jnp.zeros((), x.dtype))  # noqa: E731
    lp = jax.tree.map(mask, answer_logps(model, params, batch, key))
    if reference is None:
        known = None
    elif reference == "precomputed":
        if batch.reference is None:
            raise ValueError(
                "the batch has no reference log-probs; compute them first or set reference=start"
            )
        known = mask(batch.reference.astype(lp.logp.dtype))
    else:
        frozen = jax.lax.stop_gradient(reference_params(params, aux))
        known = mask(answer_logps(model, frozen, batch, None).logp)
    unread = ("ids", "segments", "positions", "read", "targets", "last", "reference", "branches")
    none: dict[str, Any] = dict.fromkeys(unread)
    rest = jax.lax.stop_gradient((known, lp.square, lp.entropy, lp.top1, lp.mean_logit))
    return Seen(lp.logp, *rest, replace(batch, **none))


def _judge(
    loss: Any, reward: Callable, extra: Callable, seen: Seen, aux: Any
) -> tuple[Array, dict[str, Any]]:
    pair = scored(seen.batch, seen.logp, seen.square, seen.reference)
    state = aux.get("loss", {})
    one = (lambda p: loss.fn(p, state)) if isinstance(loss, Coupled) else loss
    values = _values(loss, one, pair)
    used = pair.weight > 0
    value = jnp.sum(jnp.where(used, pair.weight * values, 0))
    metrics = {
        "loss": Sum(value, jnp.sum(pair.weight)),
        **_metrics(pair, reward),
        **_token_metrics(seen, pair),
    }
    metrics |= {name: _mean(x, used) for name, x in extra(pair).items()}
    if seen.reference is not None:
        start = jnp.where(used, pair.weight * one(_at_reference(pair)), 0)
        metrics["loss_at_reference"] = Sum(jnp.sum(start), jnp.sum(pair.weight))
    return value, jax.lax.stop_gradient(metrics)


def _values(loss: Any, one: Callable, pair: Scored) -> Array:
    """What the loss gives, a value a pair. Raises ValueError where a loss of the user's fails."""
    inner = loss.fn if isinstance(loss, Coupled) else loss
    while isinstance(inner, partial):
        inner = inner.func
    name = getattr(inner, "__name__", repr(inner))
    try:
        values = one(pair)
    except KeyError as error:
        known = ", ".join([*pair.answers, *pair.columns])
        told = f"the loss {name} looks for {error}, and the pairs have {known}; a column of the rows is given by data.extras"
        raise ValueError(told) from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the loss {name} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    found = getattr(values, "shape", type(values).__name__)
    if found != pair.weight.shape:
        raise ValueError(f"the loss {name} gives one value a pair, {pair.weight.shape}; found {found}")
    return values


def _at_reference(pair: Scored) -> Scored:
    """The pairs as they would be scored by a policy that is the reference."""
    same = lambda x: replace(x, logp=x.reference)  # noqa: E731
    return replace(
        pair, answers={kind: same(a) for kind, a in pair.answers.items()}, tokens=same(pair.tokens)
    )


def _mean(values: Array, where: Array) -> Sum:
    w = where.astype(values.dtype)
    return Sum(jnp.sum(w * values), jnp.sum(w))


def _metrics(pair: Scored, reward: Callable) -> dict[str, Any]:
    """TRL's numbers, every pair the same weight, and how margins go with length."""
    chosen, rejected = pair.chosen, pair.rejected
    used = pair.weight > 0
    has = {kind: used & (pair.answers[kind].present > 0) for kind in ("chosen", "rejected")}
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
        "rewards/accuracies": _mean(won, both),
        "rewards/margins": _mean(margin, both),
        "length/margin_correlation": Correlation.of(longer, margin, both),
        "length/accuracy_if_longer_wins": _mean(
            (longer > 0).astype(margin.dtype) + (longer == 0).astype(margin.dtype) / 2, both
        ),
        "label_noise": Disagreement.of(margin, both),
    }
    for name, where in sides.items():
        out[f"rewards/accuracies_chosen_{name}"] = _mean(won, both & where)
    for kind, answer in (("chosen", chosen), ("rejected", rejected)):
        out[f"rewards/{kind}"] = _mean(rewards[kind], has[kind])
        out[f"logps/{kind}"] = _mean(answer.logp, has[kind])
    return out


def _token_metrics(seen: Seen, pair: Scored) -> dict[str, Any]:
    """Means over tokens, TRL's: logits by kind, entropy of both answers, top-1 accuracy of the chosen one; and a KL estimate.

    kl is the mean of exp(d) - 1 - d with d = log pi_ref - log pi at the chosen answers' tokens (Schulman 2020's k3): exact in
    expectation for tokens that the policy draws, an indication on these, which it is taught to draw. Rejected ones, which it is
    taught to avoid, would make it explode.
    """
    kinds = tuple(pair.answers)
    used = {kind: jnp.where(pair.weight > 0, pair.answers[kind].present, 0) for kind in kinds}
    of = lambda *wanted: pair.spread({k: used[k] if k in wanted else jnp.zeros_like(used[k]) for k in kinds})  # noqa: E731
    chosen, rejected, both = of("chosen"), of("rejected"), of("chosen", "rejected")
    out: dict[str, Any] = {
        "logits/chosen": _mean(seen.mean_logit, chosen),
        "logits/rejected": _mean(seen.mean_logit, rejected),
        "entropy": _mean(seen.entropy, both),
        "mean_token_accuracy": _mean(seen.top1, chosen),
    }
    if seen.reference is not None:
        d = seen.reference - seen.logp
        out["kl"] = _mean(jnp.expm1(d) - d, chosen)
    return out


def _start(loss: Any, reference: Any, trainable: Any, at_base: bool) -> dict[str, Any]:
    """aux at step 0. at_base: the model at step 0 is the base without its adapter, so that no copy is needed."""
    aux: dict[str, Any] = {}
    if isinstance(reference, Moving) or (reference == "start" and not at_base):
        aux["reference"] = jax.tree.map(jnp.copy, trainable)
    if isinstance(reference, Moving):
        aux["steps"] = jnp.zeros((), jnp.int32)
    if isinstance(loss, Coupled) and loss.start:
        aux["loss"] = {name: jnp.asarray(value, jnp.float32) for name, value in loss.start.items()}
    return aux


def _after_step(
    loss: Any, reference: Any, aux: Any, trainable: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Running numbers of the loss, and the moving reference."""
    out = dict(aux)
    if isinstance(loss, Coupled) and loss.update is not None:
        out["loss"] = loss.update(aux["loss"], metrics)
    if isinstance(reference, Moving):
        out["steps"] = aux["steps"] + 1
        due = out["steps"] % reference.every == 0
        blend = lambda p, r: jnp.where(due, reference.alpha * p + (1 - reference.alpha) * r, r)  # noqa: E731
        out["reference"] = jax.tree.map(blend, trainable, aux["reference"])
    return out
