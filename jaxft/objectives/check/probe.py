"""A preference loss on synthetic pairs, without a model: its values, its gradients, its curve over the
margin.

`probe(name, loss)` finds out what a loss has to be given and compiles it; `alone` and `together` call it;
`check` of laws.py says what to make of it. A margin is c - r, the summed log-ratio log pi(y) - log pi_ref(y)
of the chosen answer minus that of the rejected one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.objectives.check.synthetic import PER_TOKEN, TOKENS, in_rows, pairs
from jaxft.objectives.pair import PairBatch, PreferenceLoss, declaration, loss_values
from jaxft.tree import struct

PAIR = ("chosen", "rejected")
THIRDS = ("mismatched", "gold")  # a third answer that a loss may want
ROWS = 96  # pairs that are judged at once; one number, so that a loss is compiled once
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes far longer than the few calls of a program
SPANS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@struct
class Judged:
    """Values of pairs, and of each kind of answer the slope d value / d log pi(answer): what a nat more does
    to the loss, spread evenly over the answer's tokens. A negative slope pushes the answer up.
    """

    value: Float[Any, "..."]
    slope: dict[str, Float[Any, "..."]]


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well (None: it is neither well nor not), and what was found."""

    name: str
    ok: bool | None
    words: str


@dataclass(frozen=True)
class Probe:
    """A loss, the kinds of answers and the columns that it is given, and its two compiled forms."""

    name: str
    loss: Callable[..., Array]
    declared: PreferenceLoss
    kinds: tuple[str, ...]
    columns: tuple[str, ...]
    each: Callable[[PairBatch], Judged]
    batch: Callable[[PairBatch], Judged]


@dataclass(frozen=True)
class Curve:
    """Values and slopes [N] over margins [N]."""

    margin: np.ndarray
    value: np.ndarray
    slope: dict[str, np.ndarray]


# A loss and what it needs


def call(loss: Callable, pair: PairBatch) -> Array:
    """The loss's values, with its state at step 0."""
    init = declaration(loss).init
    return loss_values(loss, pair, {name: jnp.asarray(x, jnp.float32) for name, x in init.items()})


def probe(name: str, loss: Callable, columns: Iterable[str] = ()) -> Probe:
    """The loss with what it needs: the third answer with which it works, columns that it looks up (1 in all
    pairs, `margin` 0).

    columns: further ones. Raises ValueError with the loss's own message, `from` its error, where it fails
    whatever it is given.
    """
    failed = dict[str, tuple[str, Exception]]()
    for kinds in (PAIR, *((*PAIR, third) for third in THIRDS)):
        try:
            known = _columns(loss, kinds, tuple(dict.fromkeys(("margin", *columns))))
        except Exception as error:  # a user's function raises what it likes
            failed.setdefault(said(error), (kinds[-1], error))
            continue
        judge = partial(_judge, loss)
        each, batch = (jax.jit(fn, compiler_options=QUICK) for fn in (jax.vmap(judge), judge))
        return Probe(name, loss, declaration(loss), kinds, known, each, batch)
    texts = [
        f"with a third answer `{kind}`: {text}" if kind in THIRDS else text
        for text, (kind, _) in failed.items()
    ]
    raise ValueError(f"{name} fails: {'; '.join(texts)}") from next(iter(failed.values()))[1]


def _columns(loss: Callable, kinds: tuple[str, ...], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns, and those that the loss looks for in vain. Raises what the loss raises."""
    try:
        shape_of(loss, kinds, columns)
    except KeyError as error:
        name = error.args[0] if error.args else None
        if not isinstance(name, str) or name in (*columns, *PAIR, *THIRDS) or len(columns) > 16:
            raise
        return _columns(loss, kinds, (*columns, name))
    return columns


def shape_of(loss: Callable, kinds: tuple[str, ...], columns: tuple[str, ...]) -> tuple[tuple[int, int], Any]:
    """A batch's shape [B, P], and the shape and dtype that the loss gives for it."""
    pair = in_rows(pairs(dict.fromkeys(kinds, np.zeros(6)), columns=columns), 2)
    return (3, 2), jax.eval_shape(partial(call, loss), pair)


def said(error: Exception) -> str:
    """An error in one line, the beginning of a long one."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + ' ...'}"


# Values and slopes


def _moved(pair: PairBatch, nats: dict[str, Array]) -> PairBatch:
    """The pairs with `nats` more log-prob of each kind of answer, spread evenly over its tokens."""
    answers = {kind: replace(a, logp=a.logp + nats[kind]) for kind, a in pair.responses.items()}
    each = pair.spread({kind: nats[kind] / a.length for kind, a in pair.responses.items()})
    return replace(pair, responses=answers, tokens=replace(pair.tokens, logp=pair.tokens.logp + each))


def _judge(loss: Callable, pair: PairBatch) -> Judged:
    """As the objective does it: slots without weight are left out of the sum, not out of the computation."""

    def total(nats: dict[str, Array]) -> tuple[Array, Array]:
        values = call(loss, _moved(pair, nats))
        return jnp.sum(jnp.where(pair.weight > 0, values, jnp.zeros((), values.dtype))), values

    slope, value = jax.grad(total, has_aux=True)(
        {kind: jnp.zeros_like(pair.weight) for kind in pair.responses}
    )
    return Judged(value, slope)


def _run(probe: Probe, fn: Callable[[PairBatch], Judged], pair: PairBatch) -> Judged:
    try:
        return jax.tree.map(np.asarray, fn(pair))
    except Exception as error:  # a user's function is traced here, forward and backward
        where = f"on a batch {list(pair.weight.shape[-2:])} in {pair.weight.dtype}"
        raise ValueError(f"{probe.name} fails {where}: {said(error)}") from error


def together(probe: Probe, pair: PairBatch) -> Judged:
    """Values and slopes [B, P] of pairs that are one batch. Raises ValueError where the loss fails."""
    return _run(probe, probe.batch, pair)


def alone(probe: Probe, pair: PairBatch) -> Judged:
    """Values and slopes [N] of pairs [N, 1], each in a batch of its own. Raises ValueError where the loss
    fails.
    """
    N = pair.weight.shape[0]
    parts = []
    for begin in range(0, N, ROWS):
        rows = np.minimum(np.arange(begin, begin + ROWS), N - 1)
        found = _run(probe, probe.each, jax.tree.map(lambda x, rows=rows: x[rows][:, None], pair))
        parts.append(jax.tree.map(lambda x, n=N - begin: x[:n, 0, 0], found))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def judged(probe: Probe, **given: Any) -> Judged:
    """alone() of the pairs that pairs() makes of `ratio`, `length`, `reference`."""
    return alone(probe, pairs(**given, columns=probe.columns))


def same(*found: np.ndarray) -> bool:
    """Equal as far as float32 goes."""
    if not all(np.isfinite(x).all() for x in found):
        return False
    scale = max(float(np.abs(x).max(initial=0)) for x in found)
    return all(bool((np.abs(x - found[0]) <= 1e-4 * scale).all()) for x in found)


def alike(*found: Judged) -> bool:
    """The same values and the same slopes."""
    slopes = [np.stack(list(x.slope.values())) for x in found]
    return same(*(x.value for x in found)) and same(*slopes)


# Curves


def at_margin(probe: Probe, margin: np.ndarray, length: Mapping[str, Any] | int = TOKENS) -> Judged:
    """Pairs [N] of which half the margin is the chosen answer's gain and half the rejected one's loss, each a
    batch of its own.

    The reference's log-probs are low enough for the policy's to stay below 0, and the same for all margins.
    """
    known = -max(-TOKENS * PER_TOKEN, 0.55 * float(np.abs(margin).max()))
    ratio = {"chosen": margin / 2, "rejected": -margin / 2} | dict.fromkeys(probe.kinds[2:], 0.0)
    return judged(probe, ratio=ratio, length=length, reference=known)


def span(probe: Probe) -> float:
    """How far in nats the margin has to go for the curve to show its bends: the least of SPANS within which
    the slope over the margin changes by most of what it is at 0. For DPO that is 3 / beta.
    """
    for reach in SPANS:
        found = at_margin(probe, np.linspace(-reach, reach, 25))
        slope = found.slope["chosen"] - found.slope["rejected"]
        if not np.isfinite(slope).all():
            break
        if np.abs(slope - slope[12]).max() > 0.8 * np.abs(slope[12]) > 0:
            return reach
    return 30.0  # a straight line, one that is flat at 0, one with holes: nothing to go by


def curve(probe: Probe, span: float, length: Mapping[str, Any] | int = TOKENS) -> Curve:
    """The loss over margins from -span to span, closer together near 0."""
    margin = span * np.sinh(np.linspace(-3, 3, 2 * ROWS - 1)) / np.sinh(3.0)
    found = at_margin(probe, margin, length)
    return Curve(margin, found.value, found.slope)


def number(x: Any) -> str:
    """A number in few digits."""
    return f"{float(x) + 0.0:.4g}"  # no -0
