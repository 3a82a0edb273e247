"""The preference objective: a loss over pairs of responses, its reference policy and its metrics.

`preference(model, loss=partial(dpo, beta=0.1))` is the sum of the pairs' losses times their weights. If the
loss couples the pairs of a batch (see PreferenceLoss), the train step computes it once from the log-probs of
all microbatches, so that gradient accumulation is still exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.annotations import ABOVE_ZERO_TO_ONE, PositiveInt, check_bounds
from jaxft.batch import Pairs, without_fields
from jaxft.distributed.exit import shorten_error
from jaxft.nn import stack, tree
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, padded_pair
from jaxft.nn.tree import Aux, Batch, LayerOutputs, Metrics, Params, struct
from jaxft.objectives.alarms import preference_alarms, preference_summary
from jaxft.objectives.logprobs import HeadInput, LanguageModel, LogProbs
from jaxft.objectives.metrics import Sum, by_row, layer_metrics, mean_losses
from jaxft.objectives.objective import Facts, Objective, ReferenceKind, Report, Scores
from jaxft.objectives.pair import (
    LOSS_AT_REFERENCE,
    REFERENCE_RANK_ERROR,
    LossState,
    PairBatch,
    Response,
    check_knobs,
    declaration,
    loss_name,
    loss_values,
    pair_batch,
    pair_metrics,
    pair_token_metrics,
    pair_values,
)
from jaxft.objectives.read_positions import read_logps_of_heads
from jaxft.objectives.sft import sft

# Fields of Pairs that neither losses nor metrics read
UNUSED = ("ids", "segments", "positions", "read", "targets", "last", "reference", "branches")


@dataclass(frozen=True)
class EMAReference:
    """The moving reference of TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): every `every` steps
    ref <- alpha policy + (1 - alpha) ref.

    The mean is taken over weights; for LoRA adapters, over the products a b. It is stored as an adapter with
    twice the rank (for alpha = 1, with the same rank). The part of the newest mean that does not fit into
    this rank is dropped; its norm, as a fraction of the mean's, is logged as `reference_rank_error`.
    """

    alpha: Annotated[float, ABOVE_ZERO_TO_ONE] = 0.6
    every: PositiveInt = 512

    def __post_init__(self) -> None:
        check_bounds(self, "EMAReference")


Reference = Literal["start", "precomputed", "teacher"] | EMAReference | None


@struct
class Outputs:
    """Outputs of the forward passes over a batch, from which loss and metrics are computed. Only `logp` has a
    gradient. reference: the reference's log-probs. Other arrays: see LogProbs.
    """

    logp: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    log_sum_p2: Float[Array, "B M"]
    entropy: Float[Array, "B M"]
    top1: Float[Array, "B M"]
    mean_logit: Float[Array, "B M"]
    batch: Pairs
    layers: LayerOutputs = field(default_factory=dict)  # by row, see metrics.by_row


def implicit_reward(response: Response) -> Float[Array, "B P"]:
    """Return log pi(response) - log pi_ref(response): DPO's implicit reward, divided by beta."""
    return response.ratio


def summed_logp(response: Response) -> Float[Array, "B P"]:
    """Return log pi(response), summed over its tokens."""
    return response.logp


def mean_logp(response: Response) -> Float[Array, "B P"]:
    """Return log pi(response), averaged over its tokens, which SimPO and ORPO compare."""
    return response.mean


def no_extra_metrics(pair: PairBatch) -> dict[str, Float[Array, "B P"]]:
    """Return no metrics."""
    return {}


def with_beta(loss: Callable[..., Array], beta: float, **knobs: float) -> dict[str, Any]:
    """Return the arguments `loss` and `beta` of `preference`, so that the metrics rewards/* have the loss's
    beta. knobs: further arguments of the loss.

    >>> from jaxft.objectives.losses.preference_losses import dpo
    >>> preference(model=None, **with_beta(dpo, 0.3)).facts.reference
    'start'
    """
    return {"loss": partial(loss, beta=beta, **knobs), "beta": beta}


def preference(
    model: LanguageModel,
    loss: Callable[..., Array],
    reference: Reference = "start",
    beta: float = 0.1,
    reward: Callable[[Response], Array] = implicit_reward,
    extra: Callable[[PairBatch], dict[str, Array]] = no_extra_metrics,
) -> Objective:
    """Preference objective `sum_p w_p loss_p` over pairs p. loss: a function (pair: PairBatch) -> [B, P], of
    preference_losses.py or your own.

    reference: "start" is the policy at step 0. It takes no memory if that is the base, as with a fresh
        adapter; otherwise aux stores a copy of the trainable leaves. "precomputed" reads log-probs that were
        computed once before the run; "teacher" is the run's second model (Run.teacher); EMAReference follows
        the policy; with None there is no reference.
    beta, reward: the metrics rewards/* are beta * reward(response). The loss has its own beta.
    extra(pair) -> further metrics {name: [B, P]}, logged as means over the pairs.

    >>> from functools import partial
    >>> from jaxft.objectives.losses.preference_losses import dpo
    >>> from jaxft.objectives.losses.reference_free_losses import simpo
    >>> preference(model=None, loss=partial(dpo, beta=0.3), beta=0.3).facts.reference
    'start'
    >>> preference(model=None, loss=simpo, reference=None, reward=mean_logp).facts.reference
    'none'
    >>> preference(model=None, loss=partial(dpo, betta=0.3))
    Traceback (most recent call last):
    ValueError: loss dpo: got an unexpected keyword argument 'betta'. Its parameters: beta, score
    """
    check_knobs(loss)
    declared = declaration(loss)
    if reference is None and reward is implicit_reward:
        raise ValueError(
            "without a reference there is no implicit reward. Set preference(reward=summed_logp) or "
            "preference(reward=mean_logp)"
        )
    ema = reference if isinstance(reference, EMAReference) else None
    kind: ReferenceKind = "moving" if isinstance(reference, EMAReference) else reference or "none"

    def logprobs(
        params: Params, batch: Pairs, key: Array | None, aux: Aux
    ) -> tuple[LogProbs, Array | None, LayerOutputs]:
        """Return the policy's LogProbs, the reference's log-probs (None if there is no reference, or they are
        precomputed), and the policy's layer outputs.
        """
        h, layers = model.hidden(params, batch, key)
        heads = [HeadInput(model, params, h)]
        if kind in ("start", "moving", "teacher"):
            heads.append(reference_head(model, kind, (params, aux), batch))
        lp, *others = read_logps_of_heads(heads, (batch.read, batch.targets))
        return lp, others[0].logp if others else None, layers

    def forward(params: Params, batch: Pairs, key: Array | None, aux: Aux) -> Outputs:
        lp, reference_logp, layers = logprobs(params, batch, key, aux)
        if kind == "precomputed":
            reference_logp = _precomputed(batch).astype(lp.logp.dtype)
        lp, reference_logp = _without_padding(batch, (lp, reference_logp))
        constants = (reference_logp, lp.log_sum_p2, lp.entropy, lp.top1, lp.mean_logit)
        constants = jax.lax.stop_gradient(constants)
        return Outputs(lp.logp, *constants, without_fields(batch, UNUSED), by_row(layers))

    def pair_loss(outputs: Outputs, aux: Aux, with_rows: bool = False) -> tuple[Array, Metrics]:
        pair = pair_batch(outputs.batch, outputs.logp, outputs.log_sum_p2, outputs.reference)
        state = aux.get("loss", {})
        values = _checked_values(loss, pair, state)
        used = pair.weight > 0
        value = jnp.sum(jnp.where(used, pair.weight * values, 0))

        def scaled_reward(response: Response) -> Array:
            return beta * reward(response)

        metrics = {
            **mean_losses(values, pair.weight, outputs.batch.sources, outputs.batch.source_names),
            **pair_metrics(pair, scaled_reward),
            **pair_token_metrics(pair, outputs.mean_logit, outputs.entropy, outputs.top1),
            **layer_metrics(outputs.layers),
            **(pair_values(pair, values, scaled_reward) if with_rows else {}),
        }
        metrics |= {name: Sum.of(x, used) for name, x in extra(pair).items()}
        if "rank_error" in aux:
            metrics[REFERENCE_RANK_ERROR] = Sum(aux["rank_error"], jnp.ones_like(aux["rank_error"]))
        if outputs.reference is not None and kind != "teacher":
            start = jnp.where(used, pair.weight * loss_values(loss, _at_reference(pair), state), 0)
            metrics[LOSS_AT_REFERENCE] = Sum(jnp.sum(start), jnp.sum(pair.weight))
        return value, jax.lax.stop_gradient(metrics)

    def eval_loss(outputs: Outputs, aux: Aux) -> tuple[Array, Metrics]:
        state = {"loss": declared.eval_state(aux["loss"])} if declared.init else {}
        return pair_loss(outputs, {**aux, **state}, with_rows=True)

    def init(trainable: Params, at_base: bool) -> Aux:
        aux: dict[str, Any] = {}
        if ema or (kind == "start" and not at_base):
            aux["reference"] = jax.tree.map(jnp.copy, trainable)
        if ema:
            aux |= {"steps": jnp.zeros((), jnp.int32), "rank_error": jnp.zeros(())}
        if ema and ema.alpha < 1:
            aux["reference"] = widened_pairs(aux["reference"])
        if declared.init:
            aux["loss"] = {name: jnp.asarray(value, jnp.float32) for name, value in declared.init.items()}
        return aux

    def update(aux: Aux, trainable: Params, metrics: Metrics) -> Aux:
        out = dict(aux)
        if declared.init:
            out["loss"] = declared.update(aux["loss"], metrics)
        return out if ema is None else out | _update_reference(ema, aux, trainable)

    def score(params: Params, batch: Pairs, aux: Aux) -> Scores:
        lp, reference_logp, _ = logprobs(params, batch, None, aux)
        return Scores(lp.logp, reference_logp)

    implicit_beta = beta if reference is not None and reward is implicit_reward else None
    from_start = kind != "teacher"
    facts = Facts(declared.coupled, kind, starts_tied=implicit_beta is not None and from_start)
    summary = partial(preference_summary, starts_tied=from_start)
    return Objective(
        forward, pair_loss, init, update, score, eval_loss=eval_loss, text=sft(model), facts=facts,
        report=Report(partial(preference_alarms, implicit_beta), summary),
    )  # fmt: skip


def reference_head(
    model: LanguageModel, kind: ReferenceKind, trees: tuple[Params, Aux], batch: Batch
) -> HeadInput:
    """Run the reference policy without gradients; return its head and hidden states. trees: (params, aux)."""
    params, aux = trees
    if kind == "teacher":
        if model.teacher is None:
            raise ValueError(
                "the reference is the run's teacher, but the run has none. Set Run.teacher, or in a recipe "
                "reference_model"
            )
        model = model.teacher
    else:
        params = reference_params(params, aux)
    frozen = jax.lax.stop_gradient(params)
    return HeadInput(model, frozen, model.hidden(frozen, batch)[0])


def reference_params(params: Params, aux: Aux) -> Params:
    """Return the reference's parameters: those in aux; without any, the base without the trained adapter, but
    with the frozen "initial_adapter" if the run has one.
    """
    if "reference" in aux:
        return tree.combine(aux["reference"], stack.unfused(params))
    initial = {"adapter": params[INITIAL_ADAPTER]} if INITIAL_ADAPTER in params else {}
    return {"base": params["base"], **initial}


def _without_padding(batch: Pairs, arrays: Any) -> Any:
    """Set arrays [B, M] to 0 at read positions that belong to no response."""
    real = batch.responses < batch.lengths.shape[1] * batch.lengths.shape[2]
    return jax.tree.map(lambda x: jnp.where(real, x, jnp.zeros((), x.dtype)), arrays)


def _precomputed(batch: Pairs) -> Float[Array, "B M"]:
    if batch.reference is None:
        raise ValueError(
            "reference=precomputed needs the reference's log-probs in the batch, which jaxft.train computes "
            "before a run. Set reference=start, or fill the field Pairs.reference"
        )
    return batch.reference


def _checked_values(loss: Callable[..., Array], pair: PairBatch, state: LossState) -> Float[Array, "B P"]:
    """Return the loss of each pair. Raises ValueError if the loss fails or does not return [B, P]."""
    name = loss_name(loss)
    try:
        values = loss_values(loss, pair, state)
    except KeyError as error:
        available = ", ".join([*pair.responses, *pair.columns])
        raise ValueError(
            f"loss {name}: the pairs have no field {error} (available: {available}). "
            f"Use one of them, or name a column of the rows in data.extras"
        ) from error
    except (TypeError, AttributeError, IndexError) as error:
        message = f"{type(error).__name__}: {shorten_error(error)}"
        raise ValueError(f"loss {name} fails: {message}. Correct the loss or its settings") from error
    got = values.shape if isinstance(values, jax.Array | np.ndarray) else type(values).__name__
    if got != pair.weight.shape:
        raise ValueError(f"loss {name} must return one value per pair, {pair.weight.shape}; got {got}")
    return values


def _at_reference(pair: PairBatch) -> PairBatch:
    """Return the pairs with the policy's log-probs replaced by the reference's."""

    def at_reference(x: Any) -> Any:
        return replace(x, logp=x.reference)

    responses = {kind: at_reference(x) for kind, x in pair.responses.items()}
    return replace(pair, responses=responses, tokens=at_reference(pair.tokens))


def _update_reference(ema: EMAReference, aux: Aux, trainable: Params) -> Aux:
    """Return {"reference", "steps", "rank_error"}: the aux of a moving reference after a step."""
    steps, old = aux["steps"] + 1, aux["reference"]

    def updated() -> tuple[Params, Array]:
        if ema.alpha == 1:
            return trainable, jnp.zeros_like(aux["rank_error"])
        blended, error = blend(trainable, old, ema.alpha)
        return blended, error.astype(aux["rank_error"].dtype)

    reference, error = jax.lax.cond(steps % ema.every == 0, updated, lambda: (old, aux["rank_error"]))
    return {"steps": steps, "reference": reference, "rank_error": error}


# Weighted means of weights that are given as low-rank pairs: `alpha a b + (1 - alpha) a' b'` as one pair.
# Separate means of a and b would be off by `alpha (1 - alpha) (a - a') (b - b')`. The mean of the products
# has up to the sum of the two ranks. It is reduced to the nearest product of a fixed rank (Eckart & Young
# 1936), and the norm of the dropped part is returned.

RANKS = 2  # rank of a blend, in ranks of the adapter


def widened_pairs(params: Params) -> Params:
    """Pad every LoRA pair (a, b) of a tree with zeros to twice its rank (RANKS), so that `blend` can store a
    mean of two pairs in it.

    A pair with None for a or b is left unchanged. Raises ValueError for DoRA.
    """
    if isinstance(params, dict) and params.get("magnitude") is not None:
        raise ValueError(
            "a moving reference averages adapters, and a mean of DoRA adapters has no low rank; set "
            "adapter.dora=false, or moving=none"
        )
    if _is_pair(params):
        return padded_pair(params, RANKS * params["a"].shape[-1])
    if isinstance(params, dict):
        return {name: widened_pairs(x) for name, x in params.items()}
    return params


def blend(new: Params, old: Params, alpha: float) -> tuple[Params, Float[Array, ""]]:
    """Return `alpha new + (1 - alpha) old` of two trees (of LoRA pairs, the mean of the products a b) and its
    relative error.

    old: a tree from widened_pairs; the result has its ranks. The error is the Frobenius norm of everything
    that does not fit into these ranks, divided by the norm of all means of products; 0 without pairs.
    """
    squares: list[tuple[Array, Array]] = []

    def walk(new: Params, old: Params) -> Params:
        if _is_pair(old):
            a, b, dropped, total = _blended_pair((new["a"], new["b"]), (old["a"], old["b"]), alpha)
            squares.append((dropped, total))
            return {**old, "a": a, "b": b}
        if isinstance(old, dict):
            return {name: walk(new[name], x) for name, x in old.items()}
        return jax.tree.map(lambda n, o: alpha * n + (1 - alpha) * o, new, old)

    with jax.default_matmul_precision("highest"):
        blended = walk(new, old)
    sides = zip(*squares, strict=True) if squares else ((), ())
    dropped, total = (sum((x.astype(jnp.float32) for x in side), jnp.float32(0)) for side in sides)
    return blended, jnp.sqrt(dropped / jnp.where(total > 0, total, 1))


def _is_pair(node: Any) -> bool:
    """Return whether a node of a tree of parameters has both a and b of a low-rank pair."""
    return isinstance(node, dict) and node.get("a") is not None and node.get("b") is not None


def _blended_pair(
    new: tuple[Array, Array], old: tuple[Array, Array], alpha: float
) -> tuple[Array, Array, Array, Array]:
    """Return (a [..., I, R], b [..., R, O], squared norm of the dropped part, squared norm of the full mean);
    R is the rank of `old`.
    """
    wide = np.promote_types(old[0].dtype, np.float32)
    a = jnp.concatenate([new[0].astype(wide), old[0].astype(wide)], -1)
    b = jnp.concatenate([alpha * new[1].astype(wide), (1 - alpha) * old[1].astype(wide)], -2)
    left, core_left = jnp.linalg.qr(a)
    right, core_right = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vt = jnp.linalg.svd(core_left @ jnp.swapaxes(core_right, -1, -2), full_matrices=False)
    rank = old[0].shape[-1]
    root = jnp.sqrt(s[..., :rank])
    a = left @ (u[..., :rank] * root[..., None, :])
    b = (root[..., :, None] * vt[..., :rank, :]) @ jnp.swapaxes(right, -1, -2)
    pair, squares = padded_pair({"a": a, "b": b}, rank), jnp.square(s)
    a, b = pair["a"].astype(old[0].dtype), pair["b"].astype(old[1].dtype)
    return a, b, jnp.sum(squares[..., rank:]), jnp.sum(squares)
