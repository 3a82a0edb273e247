"""The interface of preference losses: the log-probs that a loss reads (PairBatch), the facts that it declares
(PreferenceLoss), and metrics of pairs by TRL's names; numerically stable building blocks of losses, and the
check of their settings.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxft.batch import Pairs
from jaxft.nn.tree import Metrics, struct
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

# ---- building blocks of losses


def require(ok: Any, message: str) -> None:
    """Raise ValueError(message) if `ok` is False. A traced `ok`, from a sweep's setting, is not checked."""
    if not isinstance(ok, jax.core.Tracer) and not ok:
        raise ValueError(message)


def capped(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cap x so that exp(x) stays finite: at 80, in float16 at 11 (TRL's caps). No gradient above the cap."""
    return jnp.minimum(x, 11.0 if x.dtype == jnp.float16 else 80.0)


def square(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x^2, with |x| clipped at half the square root of the dtype's maximum: the square is finite."""
    limit = float(jnp.finfo(x.dtype).max) ** 0.5 / 2
    return jnp.square(jnp.clip(x, -limit, limit))


def logistic(x: Float[Array, "..."], label_smoothing: float | Array = 0.0) -> Float[Array, "..."]:
    """Return -(1 - eps) log sigmoid(x) - eps log sigmoid(-x): the cross-entropy of a label that is wrong with
    probability eps = label_smoothing. Raises ValueError for eps outside [0, 0.5].
    """
    require(
        (label_smoothing >= 0) & (label_smoothing <= 0.5),
        f"label_smoothing must be in [0, 0.5], got {label_smoothing}; set 0 for no smoothing",
    )
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def log1mexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return log(1 - exp(x)) for x <= 0 without loss of digits; constant above -1e-12 (-6e-5 in float16),
    where the true value goes to minus infinity.

    It is log(-expm1(x)) above -log 2, and log1p(-exp(x)) below. Each gets only arguments in its range, so
    that gradients are finite.

    >>> x = jnp.float32(-1e-9)  # exp(x) rounds to 1
    >>> float(jnp.log(1 - jnp.exp(x))), round(float(log1mexp(x)), 3)
    (-inf, -20.723)
    """
    x = jnp.minimum(x, -max(1e-12, float(jnp.finfo(x.dtype).tiny)))
    near = x > -0.6931471805599453
    by_expm1 = jnp.log(-jnp.expm1(jnp.where(near, x, -0.5)))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, by_expm1, by_log1p)


# ---- preference losses


LossState = Mapping[str, Array]  # scalars that a loss carries from step to step, such as BCO's mean reward


@struct
class Response:
    """The responses of one kind, such as "chosen": one for each of the P pairs that a row has space for (its
    slots). present: 1, or 0 if the slot has no response of this kind.
    """

    logp: Float[Array, "B P"]  # log pi(response | prompt), summed over its tokens
    reference: Float[Array, "B P"] | None  # log pi_ref(response | prompt); None without a reference
    length: Float[Array, "B P"]  # tokens; 1 where the response is missing
    mean_length: Float[Array, "B P"]  # mean over the optimizer batch's responses of this kind
    present: Float[Array, "B P"]

    @property
    def ratio(self) -> Float[Array, "B P"]:
        """The log-ratio log pi(response) - log pi_ref(response). Raises ValueError without a reference."""
        if self.reference is None:
            raise ValueError(
                "this loss reads the reference's log-probs, but the objective has no reference. "
                "Set preference(reference='start')"
            )
        return self.logp - self.reference

    @property
    def mean(self) -> Float[Array, "B P"]:
        """Mean log-prob of the response's tokens."""
        return self.logp / self.length


@struct
class PairTokens:
    """The log-probs of the tokens of all responses, in any order. `response` and `position` say where a token
    belongs.

    The id of a response is slot * A + kind: its pair's slot in the row, and its index among the A kinds in
    PairBatch.responses (0 chosen, 1 rejected).
    """

    logp: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    log_sum_p2: Float[Array, "B M"]  # log sum_v p_v^2, without gradient
    response: Int[Array, "B M"]  # slot * A + kind; P * A marks padding
    position: Int[Array, "B M"]  # 0, 1, ... within the response


@struct
class PairBatch:
    """Log-probs of a batch of preference pairs. A loss is `(pair: PairBatch, ...) -> [B, P]`: a value per
    pair, never a mean.

    A row has slots for P pairs; an empty slot has weight 0. The loss of an empty slot is ignored, but it and
    its gradient must be finite. responses: by kind, such as "chosen". columns: numeric columns of the rows
    by name, such as those in data.extras.
    """

    responses: dict[str, Response]
    tokens: PairTokens
    columns: dict[str, Float[Array, "B P"]]
    weight: Float[Array, "B P"]

    @property
    def chosen(self) -> Response:
        """The preferred response."""
        return self.responses["chosen"]

    @property
    def rejected(self) -> Response:
        """The rejected response."""
        return self.responses["rejected"]

    def total(self, x: Float[Array, "B M"]) -> dict[str, Float[Array, "B P"]]:
        """Sum values per token over each response's tokens; return the sums by kind, such as "chosen"."""
        return response_sums(x, self.tokens.response, tuple(self.responses), self.weight.shape[1])

    def spread(self, x: dict[str, Float[Array, "B P"]]) -> Float[Array, "B M"]:
        """Repeat each response's value, given by kind, at each of its tokens (0 at padding)."""
        stacked = jnp.stack([x[kind] for kind in self.responses], -1)
        flat = stacked.reshape(stacked.shape[0], stacked.shape[1] * stacked.shape[2])
        padded = jnp.pad(flat, ((0, 0), (0, 1)))
        return jnp.take_along_axis(padded, self.tokens.response, axis=1)


def response_sums(
    x: Float[Array, "B M"], response: Int[Array, "B M"], kinds: tuple[str, ...], slots: int
) -> dict[str, Float[Array, "B P"]]:
    """Sum x over the tokens of each response; return the sums by kind. response: for each token the id of its
    response, slot * len(kinds) + the index of its kind; padding has slots * len(kinds). slots: P.
    """
    count = slots * len(kinds)
    member = (response[:, :, None] == jnp.arange(count, dtype=response.dtype)[None, None]).astype(x.dtype)
    sums = jnp.einsum("bm,bma->ba", x, member, precision=jax.lax.Precision.HIGHEST)
    sums = sums.reshape(x.shape[0], slots, len(kinds))
    return {kind: sums[..., i] for i, kind in enumerate(kinds)}


def pair_batch(
    batch: Pairs,
    logp: Float[Array, "B M"],
    log_sum_p2: Float[Array, "B M"],
    reference: Float[Array, "B M"] | None,
) -> PairBatch:
    """Return the PairBatch of a batch. logp, reference: log-probs of the policy and of the reference (None if
    there is none) at the batch's read positions. log_sum_p2: the policy's, see LogProbs.
    """
    chex.assert_equal_shape([logp, log_sum_p2, batch.responses])
    slots, dtype = batch.pair_weights.shape[1], logp.dtype
    sums = response_sums(logp, batch.responses, batch.kinds, slots)
    reference_sums: dict[str, Array] = {}
    if reference is not None:
        reference_sums = response_sums(reference, batch.responses, batch.kinds, slots)
    responses = {
        kind: Response(
            logp=sums[kind],
            reference=reference_sums.get(kind),
            length=jnp.maximum(batch.lengths[..., i], 1).astype(dtype),
            mean_length=jnp.maximum(batch.mean_lengths[..., i], 1.0).astype(dtype),
            present=(batch.lengths[..., i] > 0).astype(dtype),
        )
        for i, kind in enumerate(batch.kinds)
    }
    tokens = PairTokens(logp, reference, log_sum_p2, batch.responses, batch.offsets)
    return PairBatch(responses, tokens, batch.columns, batch.pair_weights.astype(dtype))


def same_state(state: LossState, metrics: Metrics) -> LossState:
    """Return the state unchanged: the default of PreferenceLoss.update."""
    return state


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss, a function fn(pair, ...) -> [B, P], with facts that the objective must know. A plain
    function is treated as PreferenceLoss(function).

    coupled: the value of a pair depends on the batch's other pairs (sorts, batch means, running statistics).
    Such a loss is fn(pair, state, ...). It is called once per optimizer step with the pairs of all
    microbatches and devices together, so that accumulation is exact; slots of weight 0 must not influence it.
    state: a dict of scalars. init: the state at step 0. update(state, metrics of the full batch) -> the state
    after a step. eval_state(state) -> the state for the loss of held-out pairs. reads_reference: the loss
    reads `ratio` or `reference`, so that the objective needs a reference policy.
    """

    fn: Callable[..., Array]
    coupled: bool = False
    reads_reference: bool = True
    init: dict[str, float] = field(default_factory=dict)
    update: Callable[[Any, Metrics], LossState] = same_state
    eval_state: Callable[[Any], LossState] = dict

    def __call__(self, pair: PairBatch, *args: Any, state: LossState | None = None, **knobs: Any) -> Array:
        """Return the loss of each pair. Raises ValueError for a coupled loss without `state`: a loss that
        calls it must be declared as coupled too, and pass its `state` on.
        """
        if not self.coupled:
            return self.fn(pair, *args, **knobs)
        if state is None:
            raise ValueError(
                f"{loss_name(self)} couples the pairs of a batch, but was called without its state. "
                "Pass it to preference(...) itself, or declare its caller with @coupled and pass state=state"
            )
        return self.fn(pair, *args, state=state, **knobs)


@dataclass(frozen=True)
class Claims:
    """Properties that the author of a loss claims in its return annotation; jaxft.lab checks them. See
    lab/exact_toys.py for their names.

        def mine(pair, beta: float = 0.1) -> Annotated[PairLoss, Claims.of("difference", "calibrated")]: ...

    They hold for all values of the loss's numeric parameters (knobs), and for the default of a parameter that
    is a function.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, *names: str) -> "Claims":
        """Return Claims(names)."""
        return cls(names)


def claims_of(loss: Callable[..., Array]) -> tuple[str, ...]:
    """Return the names of the claims of a loss; () if it has none, or if a partial sets a parameter whose
    default is a function to another function.
    """
    fn = declaration(loss).fn
    if isinstance(fn, partial | PreferenceLoss):
        return claims_of(fn)
    given, default = loss_signature(loss).parameters, loss_signature(fn).parameters
    for name, parameter in given.items():
        if callable(parameter.default) and parameter.default is not default[name].default:
            return ()
    try:
        annotation = typing.get_type_hints(fn, include_extras=True).get("return")
    except (NameError, TypeError):  # an annotation that cannot be read claims nothing
        return ()
    return tuple(name for x in typing.get_args(annotation)[1:] if isinstance(x, Claims) for name in x.names)


def coupled(
    fn: Callable[..., Array] | None = None,
    *,
    init: dict[str, float] | None = None,
    update: Callable[[Any, Metrics], LossState] = same_state,
    eval_state: Callable[[Any], LossState] = dict,
) -> Any:
    """Declare a loss `fn(pair, state, ...)` whose value for a pair depends on the batch's other pairs; see
    PreferenceLoss.

    A decorator, plain or with arguments: `@coupled` or `@coupled(init={"mean": 0.0}, update=next_mean)`.
    """
    if fn is None:
        return partial(coupled, init=init, update=update, eval_state=eval_state)
    return PreferenceLoss(fn, coupled=True, init=init or {}, update=update, eval_state=eval_state)


def reference_free(fn: Callable[..., Array]) -> PreferenceLoss:
    """Declare a loss `fn(pair, ...)` that reads no log-probs of a reference, so that none is needed."""
    return PreferenceLoss(fn, reads_reference=False)


def declaration(loss: Callable[..., Array]) -> PreferenceLoss:
    """Return the PreferenceLoss inside of partials; for a plain function, one with default facts."""
    while isinstance(loss, partial):
        loss = loss.func
    return loss if isinstance(loss, PreferenceLoss) else PreferenceLoss(loss)


def loss_values(loss: Callable[..., Array], pair: PairBatch, state: LossState) -> Any:
    """Call a loss with the pairs, and with its state if it is coupled. The result's shape is not checked."""
    return loss(pair, state=state) if declaration(loss).coupled else loss(pair)


def loss_name(loss: Callable[..., Array]) -> str:
    """Return the name of a loss's function."""
    fn = declaration(loss).fn
    return loss_name(fn) if isinstance(fn, partial | PreferenceLoss) else getattr(fn, "__name__", repr(fn))


def loss_signature(loss: Callable[..., Array]) -> inspect.Signature:
    """Return the signature of a loss for its caller: without `state`, and with the values that partials set
    as defaults.

    Raises TypeError if a partial sets a parameter that the loss does not have.
    """
    if isinstance(loss, PreferenceLoss):
        signature = loss_signature(loss.fn)
        return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "state"])
    if not isinstance(loss, partial):
        return inspect.signature(loss)
    signature = loss_signature(loss.func)
    given = signature.bind_partial(*loss.args, **loss.keywords).arguments
    free = list(signature.parameters.values())[len(loss.args) :]
    for i, p in enumerate(free):
        if p.name in given and p.kind != p.VAR_KEYWORD:
            free[i] = p.replace(default=given[p.name], kind=p.KEYWORD_ONLY)
    return signature.replace(parameters=sorted(free, key=lambda p: p.kind))


def check_knobs(loss: Callable[..., Array]) -> None:
    """Raise ValueError if a loss cannot be called with the pairs alone: a partial sets an unknown parameter
    (knob), or a parameter has no value.
    """
    try:
        loss_signature(loss).bind("pair")
    except (TypeError, ValueError) as error:
        knobs = ", ".join(list(loss_signature(declaration(loss)).parameters)[1:]) or "none"
        raise ValueError(f"loss {loss_name(loss)}: {error}. Its parameters: {knobs}") from error


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

SIMILAR = 0.9  # lengths are alike if the shorter response has this fraction of the longer one's tokens

TIE_ROUNDING = 1e-5  # of a log-prob that two programs compute in float32


def pair_metrics(pair: PairBatch, reward: Callable[[Response], Array]) -> Metrics:
    """Return metrics over the pairs of weight above 0, each counted once: accuracy, margin, rewards,
    log-probs, and how margins depend on lengths. reward(response) -> [B, P].

    An accuracy counts a tie as 1/2 and has no value if all pairs are ties (see WinRate), as before the first
    step, when the policy is the reference. A pair is a tie if its rewards are equal, or if both responses
    have the reference's log-probs up to rounding.
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
    """Return PerRow metrics of each pair: its loss and, if it has both responses, its margin and its accuracy
    (1 if won, 0 if lost, 1/2 for a tie).
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
    """Return 1/2 where `tied` is True, else 1 for a margin above 0 and 0 for any other."""
    return jnp.where(tied, 0.5, (margin > 0).astype(margin.dtype))


def _is_reference(response: Response) -> Bool[Array, "B P"]:
    """Return whether a response's log-prob is the reference's up to rounding; False without a reference."""
    if response.reference is None:
        return jnp.zeros(response.logp.shape, bool)
    return jnp.abs(response.logp - response.reference) <= TIE_ROUNDING * jnp.abs(response.reference)


def longer_wins(longer: Float[Array, "B P"], dtype: DTypeLike) -> Float[Array, "B P"]:
    """Return 1 where the chosen length minus the rejected one, `longer`, is above 0, 1/2 at 0, else 0."""
    return (longer > 0).astype(dtype) + (longer == 0).astype(dtype) / 2


def pair_token_metrics(
    pair: PairBatch, mean_logit: Float[Array, "B M"], entropy: Float[Array, "B M"], top1: Float[Array, "B M"]
) -> Metrics:
    """Return TRL's means over tokens (logits of chosen and of rejected responses, entropy of both, top-1
    accuracy of chosen ones) and a KL. mean_logit, entropy, top1: the policy's, see LogProbs.

    kl is the mean of exp(d) - 1 - d with d = log pi_ref - log pi at the chosen responses' tokens (Schulman
    2020's k3). Its expectation is the KL only for tokens sampled from the policy, so here it is an
    indication. Rejected tokens are left out: training makes them unlikely, and the value would explode.
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
