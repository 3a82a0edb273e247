"""The checks of a preference loss; `check_loss(probe)` runs them all.

A check fails where training would go wrong: values that are not finite or not one per pair, a value that
depends on other pairs, no gradient or one in the wrong direction, a false claim. Other checks describe: the
inputs of the loss, its symmetries, the influence of lengths, and the policy that it reaches with unlimited
data on the toys of exact_toys.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.lab.exact_toys import CLAIMS, check_displacement, check_optimum, check_sign
from jaxft.lab.loss_evaluation import (
    PAIR,
    PER_TOKEN,
    TOKENS,
    ZERO_COLUMNS,
    Check,
    Curve,
    LossResult,
    Probe,
    close,
    evaluate_batch,
    evaluate_each,
    evaluate_pairs,
    format_number,
    loss_at_start,
    margin_curve,
    margin_span,
    pack_rows,
    same_result,
    shape_of,
    synthetic_pairs,
    varied_pairs,
)
from jaxft.nn.tree import nearest
from jaxft.objectives.pair import PairBatch, claims_of

SHORT, LONG = 8, 64  # tokens of responses that are compared by length
LONGEST = 4096  # tokens of a response, in the check of finite values
NO_MEAN = (
    "drop the mean or sum over pairs (the objective weights and sums them), "
    "or declare the loss with @coupled of pair.py"
)


def check_loss(probe: Probe, claims: Iterable[str] = ()) -> tuple[Check, ...]:
    """Run the checks of a loss. After a wrong shape, or values of usual pairs that are not finite, the checks
    that need them are left out.

    claims: names of CLAIMS, in addition to the claims in the loss's annotation (see pair.Claims); a false
    claim fails. Raises ValueError for an unknown claim, and if the loss raises.
    """
    claims = (*claims_of(probe.loss), *claims)
    for claim in claims:
        if claim not in CLAIMS:
            raise ValueError(f"unknown claim {claim!r}; near: {', '.join(nearest(claim, list(CLAIMS)))}")
    shape = check_shape(probe)
    if not shape.ok:
        return (shape,)  # nothing else is meaningful
    curve = margin_curve(probe, margin_span(probe))
    first = (
        shape,
        check_finite(probe, jnp.float32),
        check_finite(probe, jnp.bfloat16),
        check_empty_slots(probe),
    )
    usual = check_usual_pairs(probe, curve)
    if not usual.ok:
        return (*first, usual)
    batches = (
        (check_zero_weight(probe), check_order(probe))
        if probe.declared.coupled
        else (check_independence(probe),)
    )
    return (
        describe_inputs(probe),
        *first,
        *batches,
        describe_start(probe),
        check_first_gradient(curve),
        check_direction(curve),
        check_sign(curve, "raises_margin" in claims),
        *check_optimum(probe, claims),
        check_displacement(probe, "keeps_chosen" in claims),
        check_antisymmetry(probe, "antisymmetric" in claims),
        check_difference(probe, "difference" in claims),
        describe_reference(probe),
        *describe_lengths(probe),
    )


# One finite value per pair


def check_shape(probe: Probe) -> Check:
    """Check that the result is an array [B, P] in float32, the dtype of the log-probs."""
    expected, got = shape_of(probe.loss, probe.kinds, probe.columns)
    if not isinstance(got, jax.ShapeDtypeStruct):
        message = f"expected an array {list(expected)}, one value per pair, got a {type(got).__name__}"
        return Check("shape", False, message)
    if got.shape != expected:
        message = f"expected one value per pair, {list(expected)}, got {list(got.shape)}; {NO_MEAN}"
        return Check("shape", False, message)
    if got.dtype != jnp.float32:
        message = f"expected float32 like the log-probs, got {got.dtype}; drop the cast or comparison"
        return Check("shape", False, message)
    return Check("shape", True, f"{got.dtype} {list(got.shape)} for a batch {list(expected)}")


def extreme_pairs(probe: Probe, dtype: DTypeLike) -> PairBatch:
    """Return 72 pairs [72, 1] whose responses have 1 or LONGEST tokens, and log-probs of policy and reference
    from 0 to -1e5 in all combinations.
    """
    sums = -np.array([0.0, 1e-6, 1.0, 100.0, 1e4, 1e5])
    policy, reference = (x.ravel() for x in np.meshgrid(sums, sums))

    def rotated(x: np.ndarray, k: int) -> np.ndarray:  # so that every response meets several others
        return np.concatenate([np.roll(x, k), np.roll(x, 7 * k)])

    ratio = {kind: rotated(policy - reference, k) for k, kind in enumerate(probe.kinds)}
    known = {kind: rotated(reference, k) for k, kind in enumerate(probe.kinds)}
    n = np.arange(2 * len(policy))
    length: dict[str, Any] = dict.fromkeys(probe.kinds[2:], 1)
    length |= {"chosen": np.where(n % 2, LONGEST, 1), "rejected": np.where(n // 2 % 2, LONGEST, 1)}
    return synthetic_pairs(ratio, length, known, probe.columns, 2 * LONGEST + 1, dtype)


def check_finite(probe: Probe, dtype: DTypeLike) -> Check:
    """Check that values and gradients are finite for extreme_pairs."""
    name, pair = f"finite in {jnp.dtype(dtype).name}", extreme_pairs(probe, dtype)
    result = evaluate_each(probe, pair)
    parts = {"the value": result.value, **{f"the gradient on {k}": x for k, x in result.gradient.items()}}
    bad = {part: ~np.isfinite(x.astype(np.float32)) for part, x in parts.items()}
    count = int(np.any(list(bad.values()), 0).sum())
    if not count:
        message = "log-probs of policy and reference 0 to -1e5 in all combinations"
        return Check(name, True, f"{message}, responses of 1 and {LONGEST} tokens")
    part = next(part for part, where in bad.items() if where.any())
    n = int(np.argmax(bad[part]))
    logp, reference, length = (
        " and ".join(format_number(getattr(pair.responses[kind], field)[n, 0]) for kind in PAIR)
        for field in ("logp", "reference", "length")
    )
    where = f"log pi of chosen and rejected {logp}, reference {reference}, {length} tokens"
    message = f"{part} is {float(parts[part][n])} at {where} ({count} such pairs of {len(result.value)})"
    advice = "use a stable form: log_sigmoid, expm1, logsumexp, or capped and square of pair.py"
    return Check(name, False, f"{message}; {advice}")


def check_empty_slots(probe: Probe) -> Check:
    """Check that values and gradients are finite where responses are missing and in slots of weight 0."""
    present = {"chosen": np.array([1, 1, 0, 0, 1, 1])}
    present |= dict.fromkeys(probe.kinds[1:], np.array([1, 0, 1, 0, 1, 1]))
    length = {kind: TOKENS * x for kind, x in present.items()}
    pair = pack_rows(synthetic_pairs(dict.fromkeys(probe.kinds, 2.0), length, columns=probe.columns), 2)
    batches = {
        "where one response or both are missing": np.ones((3, 2)),
        "with slots of weight 0 among the pairs": np.array([[1, 1], [1, 0], [0, 1]]),
        "in a batch whose slots all have weight 0": np.zeros((3, 2)),
    }
    for where, weights in batches.items():
        weight: Any = weights.astype(np.float32)
        result = evaluate_batch(probe, replace(pair, weight=weight))
        gradients = {f"the gradient on {k}": x for k, x in result.gradient.items()}
        for part, x in {"a value": result.value, **gradients}.items():
            if not np.isfinite(x).all():
                message = (
                    f"{part} is not finite {where}; a missing response has log-probs 0, length 1, present 0"
                )
                return Check("empty slots", False, f"{message}: guard divisions and logs with jnp.where")
    return Check("empty slots", True, "finite where responses are missing, and in slots of weight 0")


def check_usual_pairs(probe: Probe, curve: Curve) -> Check:
    """Check that values and gradients are finite at usual log-ratios, which the other checks need."""
    name, rest = "usual pairs", "the other checks were not run"
    bad = ~np.isfinite(np.stack([curve.value, *curve.gradient.values()])).all(0)
    if bad.any():
        where = _intervals(curve.margin, bad)
        return Check(name, False, f"value or gradient is not finite at margins {where}; {rest}")
    result = evaluate_pairs(probe, **varied_pairs(probe.kinds, 24))
    if not np.isfinite(np.stack([result.value, *result.gradient.values()])).all():
        return Check(name, False, f"value or gradient is not finite at log-ratios within 8 nats; {rest}")
    return Check(name, True, "values and gradients are finite")


# Pairs in a batch


def _flat(result: LossResult) -> LossResult:
    return jax.tree.map(lambda x: x.reshape(x.size), result)


def _six_pairs(probe: Probe) -> PairBatch:
    return synthetic_pairs(**varied_pairs(probe.kinds, 6), columns=probe.columns)


def check_independence(probe: Probe) -> Check:
    """Check that a pair's value and gradient do not depend on other pairs or on weights."""
    pair = _six_pairs(probe)
    weight: Any = (pair.weight / 6).astype(np.float32)
    alone = evaluate_each(probe, pair)
    batched = _flat(evaluate_batch(probe, pack_rows(replace(pair, weight=weight), 2)))
    if same_result(alone, batched):
        message = "a pair's value and gradient are the same alone and among other pairs"
        return Check("independence", True, message)
    n = int(np.argmax(np.abs(alone.value - batched.value)))
    values = format_number(alone.value[n]), format_number(batched.value[n])
    message = f"a pair's value is {values[0]} alone and {values[1]} among six of weight 1/6"
    return Check("independence", False, f"{message}; {NO_MEAN}; leave pair.weight to the objective")


def check_zero_weight(probe: Probe) -> Check:
    """Check that slots of weight 0 do not influence the other pairs of a coupled loss."""
    pair = _six_pairs(probe)
    alone, rows = evaluate_each(probe, pair), pack_rows(pair, 2)
    weight: Any = np.array([[1, 0], [0, 0], [0, 0]], np.float32)
    batched = _flat(evaluate_batch(probe, replace(rows, weight=weight)))

    def first(result: LossResult) -> LossResult:
        return jax.tree.map(lambda x: x[:1], result)

    if not same_result(first(alone), first(batched)):
        values = format_number(alone.value[0]), format_number(batched.value[0])
        message = f"a pair has value {values[0]} alone and {values[1]} with five slots of weight 0"
        return Check("weight 0", False, f"{message}; count, sum and sort only where pair.weight > 0")
    if any(x[1:].any() for x in batched.gradient.values()):
        message = "slots of weight 0 have a gradient; sum and sort only where pair.weight > 0"
        return Check("weight 0", False, message)
    return Check("weight 0", True, "slots of weight 0 do not influence the other pairs")


def check_order(probe: Probe) -> Check:
    """Check that the order of pairs does not influence a coupled loss."""
    pair, order = _six_pairs(probe), np.array([4, 2, 0, 5, 1, 3])
    first = _flat(evaluate_batch(probe, pack_rows(pair, 2)))
    second = _flat(evaluate_batch(probe, pack_rows(jax.tree.map(lambda x: x[order], pair), 2)))
    if same_result(jax.tree.map(lambda x: x[order], first), second):
        return Check("order", True, "the order of the pairs in a batch has no influence")
    values = [", ".join(format_number(x) for x in y[:4]) for y in (first.value[order], second.value)]
    message = f"the same pairs have values {values[0]} in one order and {values[1]} in another"
    return Check("order", False, f"{message}; microbatches and meshes change the order")


# Gradients


def describe_start(probe: Probe) -> Check:
    """Describe the loss where the policy equals the reference."""
    deep, long = np.array([-24.0, -3.0, -400.0, -24.0, -24.0, -90.0]), np.array([16, 16, 16, 4, 48, 5])
    third = probe.kinds[2:]
    length = {"chosen": long, "rejected": long[[0, 1, 2, 4, 3, 5]]} | dict.fromkeys(third, TOKENS)
    known = {"chosen": deep, "rejected": np.roll(deep, 1)} | dict.fromkeys(third, -24.0)
    value = evaluate_pairs(probe, ratio=dict.fromkeys(probe.kinds, 0.0), length=length, reference=known).value
    level = evaluate_pairs(probe, ratio=dict.fromkeys(probe.kinds, np.zeros(1))).value
    text = format_number(level[0]) + (" = log 2" if abs(level[0] - math.log(2)) < 1e-5 else "")
    message = f"the value is {text} where the policy is the reference"
    if close(value, np.full_like(value, level[0])):
        return Check("start", None, f"{message}, for all log-probs and lengths")
    low, high = format_number(value.min()), format_number(value.max())
    message += f", at {TOKENS} tokens of log-prob {PER_TOKEN}"
    return Check("start", None, f"{message}; with other lengths and log-probs {low} to {high}")


def check_first_gradient(curve: Curve) -> Check:
    """Check that the gradient is not 0 where the policy equals the reference, where training starts."""
    kinds = sorted(curve.gradient, key=lambda kind: kind not in PAIR)
    gradients = np.stack([curve.gradient[kind] for kind in kinds])
    first, largest = gradients[:, len(curve.margin) // 2], np.abs(gradients).max()
    if largest == 0:
        message = "there is no gradient at any margin; check for a stop_gradient, or a loss without log-probs"
        return Check("first step", False, message)
    if np.abs(first).max() < 1e-6 * largest:
        message = (
            "there is no gradient where training starts, with the policy at the reference: nothing is learned"
        )
        return Check("first step", False, f"{message}; move the loss's flat point away from margin 0")
    text = ", ".join(f"{format_number(x)} on {kind}" for kind, x in zip(kinds, first, strict=True))
    return Check("first step", True, f"where the policy is the reference the gradient is {text}")


def check_direction(curve: Curve) -> Check:
    """Check that the gradient raises the chosen response and lowers the rejected one."""
    name = "direction"
    span = f"at margins {format_number(curve.margin[0])} to {format_number(curve.margin[-1])}"
    chosen, rejected = (curve.gradient[kind] for kind in PAIR)
    least, over = 1e-6 * max(np.abs(chosen).max(), np.abs(rejected).max()), (chosen - rejected) / 2
    if least == 0:
        return Check(name, None, "there is no gradient on the chosen or the rejected response")
    if not (over < -least).any():
        message = f"nowhere {span} does the gradient raise the margin; change the loss's sign"
        return Check(name, False, message)
    wrong = {
        "lowers the margin": over > least,
        "lowers chosen": chosen > least,
        "raises rejected": rejected < -least,
    }
    by_interval: dict[str, list[str]] = {}
    for what, where in wrong.items():
        if where.any():
            by_interval.setdefault(_intervals(curve.margin, where), []).append(what)
    if by_interval:
        message = "; ".join(f"{' and '.join(what)} at margins {where}" for where, what in by_interval.items())
        return Check(name, None, message)
    return Check(name, True, f"never lowers chosen or raises rejected, {span}")


def _intervals(margin: np.ndarray, where: np.ndarray) -> str:
    """Return the intervals of the margin where a mask is True, at most three, such as "-2 to 0, 3"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], where.astype(int), [0]])))
    ends = [(margin[a], margin[b - 1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    texts = [format_number(a) if a == b else f"{format_number(a)} to {format_number(b)}" for a, b in ends]
    return ", ".join(texts[:3]) + (" and more" if len(texts) > 3 else "")


# Inputs


def describe_inputs(probe: Probe) -> Check:
    """Describe the third kind of response, the columns and the state that the loss reads."""
    pair = synthetic_pairs(**varied_pairs(probe.kinds, 24), columns=probe.columns)
    level = evaluate_each(probe, pair)

    def reads(name: str) -> bool:
        columns = {**pair.columns, name: pair.columns[name] + np.float32(1)}
        return not same_result(level, evaluate_each(probe, replace(pair, columns=columns)))

    inputs = [f"a third response `{kind}`" for kind in probe.kinds[2:]]
    inputs += [
        f"the column `{name}` ({int(name not in ZERO_COLUMNS)} in all other checks)"
        for name in probe.columns
        if reads(name)
    ]
    message = f"reads chosen and rejected responses{''.join(', ' + what for what in inputs)}"
    if probe.declared.coupled:
        init = probe.declared.init
        state = f" with the state {', '.join(init)} at its start" if init else ""
        message += f"; it is coupled: unless stated otherwise, the checks use batches of one pair{state}"
    return Check("inputs", None, message)


def describe_reference(probe: Probe) -> Check:
    """Describe whether the loss depends on the reference's log-probs."""
    given = varied_pairs(probe.kinds, 24)
    shift = {kind: np.linspace(1, 4, 24) * (i + 1) for i, kind in enumerate(probe.kinds)}
    shifted = {
        "ratio": {kind: x + shift[kind] for kind, x in given["ratio"].items()},
        "length": given["length"],
        "reference": {kind: x - shift[kind] for kind, x in given["reference"].items()},
    }
    if not same_result(evaluate_pairs(probe, **given), evaluate_pairs(probe, **shifted)):
        return Check("reference", None, "the loss depends on its log-probs")
    if not runs_without_reference(probe):
        return Check("reference", None, "required, but the loss does not depend on it")
    advice = "; declare the loss with @reference_free to save its forward pass"
    return Check("reference", None, f"not read{advice if probe.declared.reads_reference else ''}")


def runs_without_reference(probe: Probe) -> bool:
    """Return whether the loss can be called on pairs without log-probs of a reference."""
    pair = synthetic_pairs(dict.fromkeys(probe.kinds, np.zeros(6)), columns=probe.columns)
    responses = {kind: replace(x, reference=None) for kind, x in pair.responses.items()}
    pair = replace(pair, responses=responses, tokens=replace(pair.tokens, reference=None))
    try:
        jax.eval_shape(partial(loss_at_start, probe.loss), pair)
    except Exception:  # of a user's function
        return False
    return True


# Symmetries


def check_antisymmetry(probe: Probe, claimed: bool = False) -> Check:
    """Check that loss(pair) - loss(swapped pair) = -k margin for a constant k, as for DPO. The margin is of
    summed or mean log-ratios or log-probs. claimed: whether the check fails if this is false.
    """
    given = varied_pairs(probe.kinds, 24)
    swapped = {what: {**x, "chosen": x["rejected"], "rejected": x["chosen"]} for what, x in given.items()}
    here, there = evaluate_pairs(probe, **given).value, evaluate_pairs(probe, **swapped).value
    gap = here - there
    policy = {kind: given["ratio"][kind] + given["reference"][kind] for kind in PAIR}
    ones = dict.fromkeys(PAIR, 1)
    fits = []
    for what, x in (("log-ratios", given["ratio"]), ("log-probs", policy)):
        for unit, per in (("summed", ones), ("mean", given["length"])):
            margin = x["chosen"] / per["chosen"] - x["rejected"] / per["rejected"]
            k = -float(np.dot(gap, margin) / np.dot(margin, margin))
            fits.append((float(np.abs(gap + k * margin).max()), k, f"{unit} {what}"))
    residual, k, what = min(fits)
    law = "loss(pair) - loss(swapped pair)"
    if residual < 1e-3 * np.abs(gap).max() and not close(here, there):
        message = f"yes: {law} = {format_number(-k)} times the margin of {what}"
        return Check("antisymmetric", True if claimed else None, message)
    nearest = f"{format_number(-k)} times the margin of {what}, off by up to {format_number(residual)}"
    message = f"{law} is no multiple of a margin; nearest is {nearest}"
    message = f"{law} = 0" if close(here, there) else message
    return _refuted("antisymmetric", claimed, message)


def check_difference(probe: Probe, claimed: bool = False) -> Check:
    """Check that the loss depends only on the difference of the two log-ratios: neither the same number added
    to both nor, at the same log-ratios, other lengths and log-probs of the reference change it.
    """
    given = varied_pairs(probe.kinds, 24)
    lift = {kind: np.linspace(-4, 4, 24) * (kind in PAIR) for kind in probe.kinds}
    lifted = {kind: x + lift[kind] for kind, x in given["ratio"].items()}

    def unchanged(length: Any) -> bool:
        results = [
            evaluate_pairs(probe, ratio=ratio, length=length, reference=given["reference"])
            for ratio in (given["ratio"], lifted)
        ]
        return same_result(*results)

    if unchanged(given["length"]):
        message = "yes: adding the same to both log-ratios has no effect"
        length, known = ({kind: x[::-1] for kind, x in given[y].items()} for y in ("length", "reference"))
        others = {"ratio": given["ratio"], "length": length, "reference": known}
        if not close(*(evaluate_pairs(probe, **x).value for x in (given, others))):
            text = "other lengths or log-probs of the reference, at the same log-ratios, change it"
            message = f"claimed, but {text}" if claimed else f"{message}; {text}"
            return Check("difference", False if claimed else None, message)
        return Check("difference", True if claimed else None, message)
    message = "adding the same to both log-ratios changes it"
    message += ", unless their lengths agree" if unchanged(TOKENS) else ""
    return _refuted("difference", claimed, message)


def _refuted(name: str, claimed: bool, message: str) -> Check:
    if claimed:
        return Check(name, False, f"claimed, but {message}")
    return Check(name, None, f"no: {message}")


# Lengths


def describe_lengths(probe: Probe) -> tuple[Check, Check, Check]:
    """Describe how lengths change the loss at equal summed and at equal mean log-probs, and how a response's
    length changes the gradient on its tokens.
    """

    def sums(n: Any, x: float) -> tuple[Any, Any]:
        return 0 * n + x, 0 * n + TOKENS * PER_TOKEN

    def means(n: Any, x: float) -> tuple[Any, Any]:
        return n * x, n * PER_TOKEN

    by_sum = {"at log-ratios of +2": 2.0, "at -2": -2.0}
    by_mean = {"at log-ratios of +0.1 per token": 0.1, "at -0.1": -0.1}
    return (
        _by_length(probe, "length, sums equal", sums, by_sum),
        _by_length(probe, "length, means equal", means, by_mean),
        _token_gradient(probe),
    )


def _by_length(
    probe: Probe, name: str, given: Callable[[Any, float], tuple[Any, Any]], cases: dict[str, float]
) -> Check:
    """Describe the loss of pairs of SHORT and LONG responses. given(lengths, x) -> (their log-ratios, their
    reference's log-probs). cases: text -> x.
    """
    length = dict.fromkeys(probe.kinds[2:], np.full(4, TOKENS))
    length["chosen"] = np.array([LONG, SHORT, SHORT, LONG])
    length["rejected"] = np.array([SHORT, LONG, SHORT, LONG])
    losses = []
    for x in cases.values():
        each = {kind: given(n, x if kind in PAIR else 0.0) for kind, n in length.items()}
        ratio, known = ({kind: both[i] for kind, both in each.items()} for i in range(2))
        losses.append(evaluate_pairs(probe, ratio=ratio, length=length, reference=known).value)
    if all(close(x, np.full(4, x[0])) for x in losses):
        return Check(name, None, f"{SHORT} or {LONG} tokens, the value is the same")
    values = ", ".join(
        f"{format_number(x[0])} and {format_number(x[1])} {case}"
        for case, x in zip(cases, losses, strict=True)
    )
    lower = [bool(x[0] < x[1]) for x in losses]
    if all(close(x[:1], x[1:2]) for x in losses):
        message = "lengths matter, but not which of the two responses is the longer one"
    elif all(lower) or not any(lower):
        message = (
            f"the loss is lower where the chosen response is the {'longer' if lower[0] else 'shorter'} one"
        )
    else:
        message = f"the longer response's log-ratio counts for {'more' if lower[0] else 'less'}"
    cases_text = f"{LONG} against {SHORT} tokens, chosen longer and rejected longer: {values}"
    return Check(name, None, f"{message} ({cases_text})")


def _token_gradient(probe: Probe) -> Check:
    """Describe the gradient on a token of a short and of a long chosen response."""
    length = {"chosen": np.array([SHORT, LONG])} | dict.fromkeys(probe.kinds[1:], TOKENS)
    ratio = dict.fromkeys(probe.kinds, np.zeros(2))
    gradient = evaluate_pairs(probe, ratio=ratio, length=length).gradient["chosen"]
    name, values = "length, gradient", [format_number(x) for x in gradient]
    if close(gradient[:1], gradient[1:]):
        return Check(name, None, f"{values[0]} on a chosen token, of {SHORT} or of {LONG}")
    message = f"{values[0]} on a chosen token of {SHORT}, {values[1]} on one of {LONG}"
    return Check(name, None, f"{message} (equal sums of log-probs, the policy is the reference)")
