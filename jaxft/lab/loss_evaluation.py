"""Evaluate preference losses on synthetic pairs, without a model.

`parse_losses` reads losses from a command line: `name` or `file.py:name,beta=0.2`. `synthetic_pairs` makes a
batch with given log-ratios, lengths and log-probs. `probe(name, loss)` finds the inputs that a loss needs and
compiles it. `evaluate_each` and `evaluate_batch` return its values and gradients, and `margin_curve` those
over the margin: the log-ratio log pi(y) - log pi_ref(y) of the chosen response minus that of the rejected
one. loss_checks.py checks the results.
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.annotations import PREFERENCE_LOSSES
from jaxft.distributed.exit import shorten_error
from jaxft.nn.tree import nearest, struct
from jaxft.objectives.pair import (
    PairBatch,
    PairTokens,
    PreferenceLoss,
    Response,
    declaration,
    loss_signature,
    loss_values,
)
from jaxft.runs.settings.setting_values import UNANNOTATED, find_file, load_callable, parse_value

TOKENS = 16  # default length of a response
PER_TOKEN = -1.5  # default log-prob per token of the reference
ZERO_COLUMNS = ("margin", "score_rejected")  # other columns are 1
READS = 160  # read positions of a row; one size, so that a loss is compiled once
PAIR = ("chosen", "rejected")
RATING_COLUMNS = ("score_chosen", "score_rejected")  # columns that a loss of rankings may need
THIRDS = ("mismatched", "gold")  # a third response that a loss may need
ROWS = 96  # pairs that are evaluated at once; one number, so that a loss is compiled once
NO_OPTIMISATION = {"xla_backend_optimization_level": 0}  # compiling takes far longer than the few calls
SPANS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of margins, in nats; see margin_span


# Losses by name


@dataclass(frozen=True)
class NamedLoss:
    """A loss of the command line: its label in tables, its function with knobs (parameters), its file."""

    label: str
    fn: Callable
    file: Path


def parse_losses(texts: Sequence[str], known: Sequence[NamedLoss] = ()) -> list[NamedLoss]:
    """Parse losses, each `name` or `name,knob=value,...`, without duplicates and losses that are in `known`.

    A loss that has the label of another one is labelled with its file too. Raises ValueError for an unknown
    loss or knob or a value that the knob does not take, and FileNotFoundError for a missing file.
    """
    by_label = {loss.label: loss for loss in known}
    listed = {(loss.file, loss.label) for loss in known}
    for text in texts:
        loss = parse_loss(text)
        if (loss.file, loss.label) in listed:
            continue
        listed.add((loss.file, loss.label))
        labels = (loss.label, f"{loss.file.stem}:{loss.label}", f"{loss.file}:{loss.label}")
        label = next(label for label in labels if label not in by_label)
        by_label[label] = replace(loss, label=label)
    return list(by_label.values())[len(known) :]


def parse_loss(text: str) -> NamedLoss:
    """Parse one loss, `name` or `name,knob=value,...`. Raises as parse_losses."""
    name, *items = re.split(r",(?=\s*[^\W\d]\w*\s*=)", text)
    fn, file = _function(name.strip())
    available, values = loss_knobs(fn), dict[str, Any]()
    for item in items:
        knob, _, given = (x.strip() for x in item.partition("="))
        if knob not in available:
            near = ", ".join(nearest(knob, list(available), 5)) or "none, it has no knobs"
            raise ValueError(f"{name} has no knob {knob!r}; near: {near}")
        values[knob] = _knob_value(item.strip(), given, *available[knob])
    label = ",".join([name.rpartition(":")[2], *(item.replace(" ", "") for item in items)])
    return NamedLoss(label, partial(fn, **values) if values else fn, file)


def loss_knobs(loss: Callable) -> dict[str, tuple[Any, Any]]:
    """Return knob -> (annotation, default) of a loss; knobs are its parameters after the pair."""
    named = list(loss_signature(loss).parameters.values())[1:]
    try:
        hints = typing.get_type_hints(inspect.unwrap(declaration(loss).fn))
    except (NameError, TypeError):  # an unreadable annotation counts as none
        hints = {}
    return {
        p.name: (hints.get(p.name, UNANNOTATED), p.default)
        for p in named
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def loss_beta(loss: Callable, otherwise: float) -> float:
    """Return the default of a loss's beta; `otherwise` if it has none, or no numeric one."""
    default = loss_knobs(loss).get("beta", (None, None))[1]
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    return float(default) if is_number else otherwise


def _function(name: str) -> tuple[Callable, Path]:
    """Return (loss, its file) of `file.py:name`, `package.module:name`, or a name such as `dpo`."""
    if ":" not in name and name not in PREFERENCE_LOSSES:
        near = ", ".join(nearest(name, list(PREFERENCE_LOSSES), 5))
        raise ValueError(f"no loss is called {name!r}; near: {near}. Use file.py:name for a loss in a file")
    full = PREFERENCE_LOSSES.get(name, name)
    fn, where = load_callable(full), full.rpartition(":")[0]
    return fn, find_file(where) if where.endswith(".py") else Path(inspect.getfile(sys.modules[where]))


def _knob_value(item: str, text: str, kind: Any, default: Any) -> Any:
    """Parse the value of a knob as the type of its annotation, or else of its default."""
    if kind in (UNANNOTATED, Any):
        if default is UNANNOTATED or default is None:
            raise ValueError(
                f"{item}: the knob has neither an annotation nor a default. Annotate it in the loss"
            )
        kind = Callable if callable(default) else type(default)
        kind = int | float if kind is int else kind  # a default of 1 does not exclude 0.5
    try:
        return parse_value(text, kind)
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from error


# Synthetic pairs


def synthetic_pairs(
    ratio: Mapping[str, Any],
    length: Mapping[str, Any] | int = TOKENS,
    reference: Mapping[str, Any] | float = TOKENS * PER_TOKEN,
    columns: Iterable[str] = ("margin",),
    reads: int = READS,
    dtype: DTypeLike = np.float32,
) -> PairBatch:
    """Return pairs [N, 1] of NumPy arrays, such as synthetic_pairs({"chosen": 1.0, "rejected": -1.0}).

    ratio: summed log-ratio of each kind of response. length: tokens, 0 for a missing response. reference:
    summed log-prob of the reference. Each is a number or an array [N]. A log-prob is spread evenly over the
    response's tokens; log sum_v p_v^2 is -1. columns: names; `margin` and `score_rejected` are 0, others 1.
    reads: positions of a row that have a loss. Raises ValueError if a pair has more tokens than `reads`.
    """
    kinds = tuple(sorted(ratio))  # the order of a dict's keys after jax.jit
    given = [
        np.atleast_1d(x[kind] if isinstance(x, Mapping) else x)
        for x in (ratio, length, reference)
        for kind in kinds
    ]
    table = np.stack(np.broadcast_arrays(*given)).astype(np.float64)  # [3 A, N]
    ratios, lengths, known = table.reshape(3, len(kinds), table.shape[1]).swapaxes(1, 2)
    longest = int(lengths.sum(1).max())
    if longest > reads:
        raise ValueError(
            f"a pair of {longest} tokens exceeds reads={reads}. Use synthetic_pairs(reads={longest})"
        )
    exists, divisor = lengths > 0, np.maximum(lengths, 1)
    known = np.where(exists, known, 0.0)
    logp = known + np.where(exists, ratios, 0.0)

    def column(x: np.ndarray) -> Any:
        return x[:, None].astype(dtype)

    mean = [divisor[exists[:, k], k].mean() if exists[:, k].any() else 1.0 for k in range(len(kinds))]
    responses = {
        kind: Response(
            logp=column(logp[:, k]),
            reference=column(known[:, k]),
            length=column(divisor[:, k]),
            mean_length=column(np.full(len(logp), mean[k])),
            present=column(exists[:, k]),
        )
        for k, kind in enumerate(kinds)
    }
    given_columns: Any = {
        name: np.full((len(logp), 1), float(name not in ZERO_COLUMNS), np.float32) for name in columns
    }
    return PairBatch(
        responses,
        _tokens(logp / divisor, known / divisor, lengths.astype(int), reads, dtype),
        given_columns,
        column(np.ones(len(logp))),
    )


def _tokens(
    logp: np.ndarray, known: np.ndarray, lengths: np.ndarray, reads: int, dtype: DTypeLike
) -> PairTokens:
    """Return the tokens of N rows of one pair each, from log-probs per token and lengths [N, A]."""
    N, A = lengths.shape
    response, position = np.full((N, reads), A, np.int32), np.zeros((N, reads), np.int32)
    for n, row in enumerate(lengths):
        response[n, : row.sum()] = np.repeat(np.arange(A), row)
        position[n, : row.sum()] = np.concatenate([np.arange(count) for count in row])
    real = response < A

    def at(x: np.ndarray) -> Any:
        return np.where(real, np.take_along_axis(x, np.minimum(response, A - 1), 1), 0.0).astype(dtype)

    ids: Any = response
    positions: Any = position
    return PairTokens(at(logp), at(known), at(np.full((N, A), -1.0)), ids, positions)


def pack_rows(pair: PairBatch, slots: int) -> PairBatch:
    """Arrange pairs [N, 1] as a batch [N / slots, slots]. Raises ValueError if slots does not divide N."""
    N, A = pair.weight.shape[0], len(pair.responses)
    if N % slots:
        raise ValueError(f"{N} pairs do not fill rows of {slots}. Use a multiple of {slots} pairs")
    slot = (np.arange(N, dtype=np.int32) % slots)[:, None]
    ids: Any = np.where(pair.tokens.response < A, pair.tokens.response + slot * A, slots * A).astype(np.int32)
    whole = replace(pair, tokens=replace(pair.tokens, response=ids))
    return jax.tree.map(lambda x: x.reshape(N // slots, slots * x.shape[1]), whole)


def varied_pairs(kinds: tuple[str, ...], count: int) -> dict[str, Any]:
    """Return arguments of synthetic_pairs for distinct pairs with log-ratios from -8 to 8."""
    rng, reach = np.random.default_rng(0), 8.0
    ratio = {kind: rng.uniform(-reach, reach, count) for kind in kinds}
    length = {kind: rng.permutation(np.linspace(4, 48, count)).astype(int) for kind in kinds}
    return {
        "ratio": ratio,
        "length": length,
        "reference": {kind: -reach - rng.uniform(4, 40, count) for kind in kinds},
    }


# A loss and its inputs


@struct
class LossResult:
    """Losses of pairs, and for each kind of response the gradient d loss / d log pi(response).

    The response's log-prob changes evenly over its tokens. Training raises it if the gradient is negative.
    """

    value: Float[Any, "..."]
    gradient: dict[str, Float[Any, "..."]]


@dataclass(frozen=True)
class Check:
    """The result of a check. ok: whether it passes; None for a description that neither passes nor fails."""

    name: str
    ok: bool | None
    message: str


@dataclass(frozen=True)
class Probe:
    """A loss, the kinds of responses and the columns that it needs, and its compiled functions."""

    name: str
    loss: Callable[..., Array]
    declared: PreferenceLoss
    kinds: tuple[str, ...]
    columns: tuple[str, ...]
    run_each: Callable[[PairBatch], LossResult]
    run_batch: Callable[[PairBatch], LossResult]
    run_risk: Callable[..., tuple[Array, Array]]  # _risk and its gradient with respect to `logits`


@dataclass(frozen=True)
class Curve:
    """Losses and gradients [N] at margins [N]."""

    margin: np.ndarray
    value: np.ndarray
    gradient: dict[str, np.ndarray]


def loss_at_start(loss: Callable[..., Array], pair: PairBatch) -> Array:
    """Return the loss of each pair [B, P], with the loss's state at step 0."""
    init = declaration(loss).init
    return loss_values(loss, pair, {name: jnp.asarray(x, jnp.float32) for name, x in init.items()})


def probe(name: str, loss: Callable[..., Array], columns: Iterable[str] = ()) -> Probe:
    """Find which third response (mismatched, gold or none) and which columns a loss needs, and compile it.

    name: its label in errors. columns: that the pairs have in any case. Raises ValueError with the loss's
    messages if it fails with all these inputs.
    """
    failed = dict[str, tuple[str, Exception]]()
    inputs = [(PAIR, ()), *(((*PAIR, third), ()) for third in THIRDS), (PAIR, RATING_COLUMNS)]
    for kinds, ratings in inputs:
        try:
            needed = _find_columns(loss, kinds, tuple(dict.fromkeys(("margin", *columns, *ratings))))
        except Exception as error:  # a user's function may raise anything
            failed.setdefault(one_line(error), (kinds[-1], error))
            continue
        run = partial(_run_with_gradient, loss)
        each, batch = (jax.jit(fn, compiler_options=NO_OPTIMISATION) for fn in (jax.vmap(run), run))
        risk = jax.jit(jax.value_and_grad(partial(_risk, loss)), compiler_options=NO_OPTIMISATION)
        return Probe(name, loss, declaration(loss), kinds, needed, each, batch, risk)
    texts = [
        f"with a third response `{kind}`: {text}" if kind in THIRDS else text
        for text, (kind, _) in failed.items()
    ]
    raise ValueError(f"{name} fails: {'; '.join(texts)}") from next(iter(failed.values()))[1]


def _find_columns(
    loss: Callable[..., Array], kinds: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[str, ...]:
    """Return `columns` plus those for which the loss raises KeyError. Passes its other errors on."""
    try:
        shape_of(loss, kinds, columns)
    except KeyError as error:
        name = error.args[0] if error.args else None
        if not isinstance(name, str) or name in (*columns, *PAIR, *THIRDS) or len(columns) > 16:
            raise
        return _find_columns(loss, kinds, (*columns, name))
    return columns


def shape_of(
    loss: Callable[..., Array], kinds: tuple[str, ...], columns: tuple[str, ...]
) -> tuple[tuple[int, int], Any]:
    """Return ((B, P) of a test batch, shape and dtype of the loss on it), without computing the loss."""
    pair = pack_rows(synthetic_pairs(dict.fromkeys(kinds, np.zeros(6)), columns=columns), 2)
    return (3, 2), jax.eval_shape(partial(loss_at_start, loss), pair)


def one_line(error: Exception) -> str:
    """Return an error's type and message on one line, the message truncated to 300 characters."""
    return f"{type(error).__name__}: {shorten_error(error)}"


# Values and gradients


def add_nats(pair: PairBatch, nats: dict[str, Array]) -> PairBatch:
    """Return the pairs with nats[kind] added to each response's log-prob, spread evenly over its tokens."""
    responses = {kind: replace(x, logp=x.logp + nats[kind]) for kind, x in pair.responses.items()}
    each = pair.spread({kind: nats[kind] / x.length for kind, x in pair.responses.items()})
    return replace(pair, responses=responses, tokens=replace(pair.tokens, logp=pair.tokens.logp + each))


def _run_with_gradient(loss: Callable[..., Array], pair: PairBatch) -> LossResult:
    """Return the value of each pair, and gradients of the sum over the pairs whose weight is above 0."""

    def total(nats: dict[str, Array]) -> tuple[Array, Array]:
        values = loss_at_start(loss, add_nats(pair, nats))
        return jnp.sum(jnp.where(pair.weight > 0, values, jnp.zeros((), values.dtype))), values

    zeros = {kind: jnp.zeros_like(pair.weight) for kind in pair.responses}
    gradient, value = jax.grad(total, has_aux=True)(zeros)
    return LossResult(value, gradient)


def _risk(
    loss: Callable[..., Array],
    logits: Array,
    reference: Array,
    pair: PairBatch,
    index: dict[str, Array],
    knobs: dict[str, Array],
) -> Array:
    """Return the expected loss of a policy over N enumerated responses: the weighted sum over pairs [n, 1].

    reference: log-probs [N]. logits: [N], which the policy adds to them. index: the response of each pair, by
    kind. knobs: of the loss, in place of its defaults.
    """
    c = jax.nn.log_softmax(reference + logits) - reference
    moved = add_nats(pair, {kind: c[i][:, None] for kind, i in index.items()})
    return jnp.sum(moved.weight * loss_at_start(partial(loss, **knobs) if knobs else loss, moved))


def _run(probe: Probe, fn: Callable[[PairBatch], LossResult], pair: PairBatch) -> LossResult:
    try:
        return jax.tree.map(np.asarray, fn(pair))
    except Exception as error:  # a user's function is traced here, forward and backward
        where = f"on a batch {list(pair.weight.shape[-2:])} in {pair.weight.dtype}"
        raise ValueError(f"{probe.name} fails {where}: {one_line(error)}") from error


def evaluate_batch(probe: Probe, pair: PairBatch) -> LossResult:
    """Return losses and gradients [B, P] of pairs in one batch. Raises ValueError if the loss fails."""
    return _run(probe, probe.run_batch, pair)


def evaluate_each(probe: Probe, pair: PairBatch) -> LossResult:
    """Return losses and gradients [N] of pairs [N, 1], each in a separate batch. Raises ValueError if the
    loss fails.
    """
    N = pair.weight.shape[0]
    parts = []
    for begin in range(0, N, ROWS):
        rows = np.minimum(np.arange(begin, begin + ROWS), N - 1)
        result = _run(probe, probe.run_each, jax.tree.map(lambda x, rows=rows: x[rows][:, None], pair))
        parts.append(jax.tree.map(lambda x, n=N - begin: x[:n, 0, 0], result))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def evaluate_pairs(probe: Probe, **given: Any) -> LossResult:
    """Return evaluate_each for synthetic_pairs(**given): `ratio`, and perhaps `length` and `reference`."""
    return evaluate_each(probe, synthetic_pairs(**given, columns=probe.columns))


def close(*arrays: np.ndarray) -> bool:
    """Whether arrays are finite and equal within 1e-4 of their largest absolute value."""
    if not all(np.isfinite(x).all() for x in arrays):
        return False
    scale = max(float(np.abs(x).max(initial=0)) for x in arrays)
    return all(bool((np.abs(x - arrays[0]) <= 1e-4 * scale).all()) for x in arrays)


def same_result(*results: LossResult) -> bool:
    """Whether losses and gradients are equal, as in close."""
    gradients = [np.stack(list(x.gradient.values())) for x in results]
    return close(*(x.value for x in results)) and close(*gradients)


# Curves


def evaluate_margins(
    probe: Probe, margin: np.ndarray, length: Mapping[str, Any] | int = TOKENS
) -> LossResult:
    """Return values and gradients [N] of a pair for each margin [N] in nats, each in a separate batch.

    length: tokens of all responses, or of each kind by name. The chosen response's log-ratio is half the
    margin, the rejected one's minus half of it, and 0 for other kinds. The reference's log-probs are the same
    for all margins, and so low that the policy's stay below 0.
    """
    known = -max(-TOKENS * PER_TOKEN, 0.55 * float(np.abs(margin).max()))
    ratio = {"chosen": margin / 2, "rejected": -margin / 2} | dict.fromkeys(probe.kinds[2:], 0.0)
    return evaluate_pairs(probe, ratio=ratio, length=length, reference=known)


def margin_span(probe: Probe) -> float:
    """Return the largest margin to plot, in nats, so that a loss's curvature shows; 30 for DPO, beta=0.1.

    It is the smallest of SPANS within which the slope differs from its value at 0 by more than 80 %; 30 if
    there is none, if the slope at 0 is 0, or if a slope is not finite.
    """
    for reach in SPANS:
        result = evaluate_margins(probe, np.linspace(-reach, reach, 25))
        slope = result.gradient["chosen"] - result.gradient["rejected"]
        if not np.isfinite(slope).all():
            break
        if np.abs(slope - slope[12]).max() > 0.8 * np.abs(slope[12]) > 0:
            return reach
    return 30.0  # a loss that is linear, is flat at 0, or is not finite


def margin_curve(probe: Probe, span: float, length: Mapping[str, Any] | int = TOKENS) -> Curve:
    """Return the loss at margins from -span to span nats, which are closer together near 0."""
    margin = span * np.sinh(np.linspace(-3, 3, 2 * ROWS - 1)) / np.sinh(3.0)
    result = evaluate_margins(probe, margin, length)
    return Curve(margin, result.value, result.gradient)


def format_number(x: Any) -> str:
    """Return a number with four significant digits."""
    return f"{float(x) + 0.0:.4g}"  # no -0
