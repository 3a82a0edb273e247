"""What a preference loss sees: log-probs of answers by policy and reference, summed and per token."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Pairs
from jaxft.tree import struct


@struct
class Answer:
    """One kind of answer, an array element a pair. `present` is 0 in empty slots and where a row lacks this answer."""

    logp: Float[Array, "B P"]  # log pi(answer | prompt), summed over its tokens
    reference: Float[Array, "B P"] | None  # the same of the reference; None in a run without one
    length: Float[Array, "B P"]  # tokens; 1 where the answer is not present
    mean_length: Float[Array, "B P"]  # mean over the optimizer batch's answers of this kind
    present: Float[Array, "B P"]

    @property
    def ratio(self) -> Float[Array, "B P"]:
        """log pi(answer) - log pi_ref(answer). Raises ValueError in a run without a reference."""
        if self.reference is None:
            raise ValueError(
                "this loss compares with a reference and the objective has none; give preference(...) a reference"
            )
        return self.logp - self.reference

    @property
    def mean(self) -> Float[Array, "B P"]:
        """Log-prob per token."""
        return self.logp / self.length


@struct
class PerToken:
    """The read positions of the rows, in no layout that a loss may rely on but `answer` and `place`."""

    logp: Float[Array, "B M"]
    reference: Float[Array, "B M"] | None
    square: Float[Array, "B M"]  # log sum_v p_v^2, no gradient
    answer: Int[Array, "B M"]  # slot * A + kind; P * A marks padding
    place: Int[Array, "B M"]  # 0, 1, ... within the answer


@struct
class Scored:
    """The pairs of a batch. A loss is `(pair: Scored, ...) -> [B, P]`, one value a pair, and never a mean over pairs.

    What it gives for slots whose `weight` is 0 is ignored but must be finite, and so must be its gradient there.
    """

    answers: dict[str, Answer]
    tokens: PerToken
    columns: dict[str, Float[Array, "B P"]]
    weight: Float[Array, "B P"]

    @property
    def chosen(self) -> Answer:
        """The preferred answer."""
        return self.answers["chosen"]

    @property
    def rejected(self) -> Answer:
        """The other one."""
        return self.answers["rejected"]

    def total(self, x: Float[Array, "B M"]) -> dict[str, Float[Array, "B P"]]:
        """Sums of a per-token quantity over each answer."""
        return by_answer(x, self.tokens.answer, tuple(self.answers), self.weight.shape[1])

    def spread(self, x: dict[str, Float[Array, "B P"]]) -> Float[Array, "B M"]:
        """A value of each answer at each of its tokens (0 at padding)."""
        stacked = jnp.stack([x[kind] for kind in self.answers], -1)
        flat = stacked.reshape(stacked.shape[0], stacked.shape[1] * stacked.shape[2])
        padded = jnp.pad(flat, ((0, 0), (0, 1)))
        return jnp.take_along_axis(padded, self.tokens.answer, axis=1)


def by_answer(
    x: Float[Array, "B M"], answer: Int[Array, "B M"], kinds: tuple[str, ...], slots: int
) -> dict[str, Float[Array, "B P"]]:
    """Sums of x over the tokens of each answer of each slot."""
    count = slots * len(kinds)
    member = (answer[:, :, None] == jnp.arange(count, dtype=answer.dtype)).astype(x.dtype)
    sums = jnp.einsum("bm,bma->ba", x, member, precision=jax.lax.Precision.HIGHEST)
    sums = sums.reshape(x.shape[0], slots, len(kinds))
    return {kind: sums[..., i] for i, kind in enumerate(kinds)}


def scored(batch: Pairs, logp: Any, square: Any, reference: Any) -> Scored:
    """Log-probs at the read positions, put in order by pair."""
    slots, dtype = batch.pair_weights.shape[1], logp.dtype
    sums = by_answer(logp, batch.answers, batch.kinds, slots)
    known = {} if reference is None else by_answer(reference, batch.answers, batch.kinds, slots)
    answers = {
        kind: Answer(
            logp=sums[kind],
            reference=known.get(kind),
            length=jnp.maximum(batch.lengths[..., i], 1).astype(dtype),
            mean_length=jnp.maximum(batch.mean_lengths[..., i], 1.0).astype(dtype),
            present=(batch.lengths[..., i] > 0).astype(dtype),
        )
        for i, kind in enumerate(batch.kinds)
    }
    tokens = PerToken(logp, reference, square, batch.answers, batch.places)
    return Scored(answers, tokens, batch.columns, batch.pair_weights.astype(dtype))


@dataclass(frozen=True)
class Coupled:
    """A loss whose value for a pair depends on the batch's other pairs: sorts, batch means, running statistics.

    fn(pair, state) -> [B, P], called once an optimizer step with the pairs of all microbatches and mesh parts together, so
    that it is exact under accumulation. Slots of weight 0 must have a neutral place in it. state: the running numbers,
    `start` at first; `update(state, metrics) -> state` moves them after a step (metrics: this step's, of the whole batch).

    It is a type, not a flag on a function, so that no partial hides it: `partial(loss, beta=...)` of one is undone by
    `unwrap`, and a call from inside another function is refused, because that one would not be known to couple.
    """

    fn: Callable[..., Array]
    start: dict[str, float] = field(default_factory=dict)
    update: Callable[[Any, Any], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Refused: see above."""
        name = getattr(self.fn, "__name__", repr(self.fn))
        raise ValueError(
            f"{name} couples the pairs of a batch; give it to preference(...) itself, or wrap its caller in Coupled"
        )


def check_knobs(loss: Callable) -> None:
    """Raise ValueError where a loss can't be called with the pairs alone: a knob that it doesn't have, or one without a value."""
    inner = unwrap(loss)
    fn, given = (inner.fn, ("pair", "state")) if isinstance(inner, Coupled) else (inner, ("pair",))
    name, set_ = fn, dict[str, Any]()
    while isinstance(name, partial):
        set_ = {**name.keywords, **set_}
        name = name.func
    knobs = ", ".join(f"{key}={value}" for key, value in set_.items())
    try:
        inspect.signature(fn).bind(*given)
    except (TypeError, ValueError) as error:
        found = ", ".join(list(inspect.signature(name).parameters)[len(given) :]) or "none"
        told = f"the loss {getattr(name, '__name__', name)} has the knobs: {found}; it is called with ({', '.join(given)})"
        raise ValueError(
            told + (f" and {knobs}; give it those, or leave them out of the config" if knobs else "")
        ) from error


def unwrap(loss: Callable) -> Callable:
    """The loss with a Coupled inside partials brought to the outside."""
    if isinstance(loss, partial):
        inner = unwrap(loss.func)
        if isinstance(inner, Coupled):
            return replace(inner, fn=partial(inner.fn, *loss.args, **loss.keywords))
    return loss
