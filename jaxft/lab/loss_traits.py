"""Properties of a preference loss on synthetic pairs: its inputs, its symmetries, the influence of lengths.

They are descriptions, neither right nor wrong, unless the author of the loss claims them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft.lab.loss_probe import (
    PAIR,
    Check,
    Probe,
    close,
    evaluate_each,
    evaluate_pairs,
    format_number,
    loss_at_start,
    same_result,
)
from jaxft.lab.synthetic_pairs import PER_TOKEN, TOKENS, ZERO_COLUMNS, synthetic_pairs, varied_pairs

SHORT, LONG = 8, 64  # tokens of responses that are compared by length


def describe_inputs(probe: Probe) -> Check:
    """Describe the third response, columns and state that the loss reads."""
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
        state = (
            f" with the state {', '.join(probe.declared.init)} at its start" if probe.declared.init else ""
        )
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
        return Check("reference", None, "the policy is compared with it")
    if not runs_without_reference(probe):
        return Check("reference", None, "required, but the loss does not depend on it")
    advice = (
        ""
        if not probe.declared.reads_reference
        else "; declare the loss with @reference_free to save its forward pass"
    )
    return Check("reference", None, f"not read{advice}")


def runs_without_reference(probe: Probe) -> bool:
    """Whether the loss returns values without a reference."""
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
    """Check that loss(pair) - loss(swapped pair) = -k margin, as in DPO; the margin of summed or mean
    log-ratios or log-probs.
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
    nearest = f"{format_number(-k)} times that of {what}, off by up to {format_number(residual)}"
    message = f"{law} is no multiple of a margin; nearest is {nearest}"
    message = f"{law} = 0" if close(here, there) else message
    return _refuted("antisymmetric", claimed, message)


def check_difference(probe: Probe, claimed: bool = False) -> Check:
    """Check that the loss depends on the difference of the two log-ratios alone: adding to both has no
    effect.
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
    """Describe the influence of lengths at equal sums of log-probs and at equal means, and the gradient on a
    token.
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
    """given(lengths, x) -> (log-ratios, reference's log-probs) of responses of these lengths."""
    length = {
        "chosen": np.array([LONG, SHORT, SHORT, LONG]),
        "rejected": np.array([SHORT, LONG, SHORT, LONG]),
    }
    length |= dict.fromkeys(probe.kinds[2:], np.full(4, TOKENS))
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
    """The gradient on a token of a short and of a long chosen response."""
    length = {"chosen": np.array([SHORT, LONG])} | dict.fromkeys(probe.kinds[1:], TOKENS)
    ratio = dict.fromkeys(probe.kinds, np.zeros(2))
    gradient = evaluate_pairs(probe, ratio=ratio, length=length).gradient["chosen"]
    name, values = "length, gradient", [format_number(x) for x in gradient]
    if close(gradient[:1], gradient[1:]):
        return Check(name, None, f"{values[0]} on a chosen token, of {SHORT} or of {LONG}")
    message = f"{values[0]} on a chosen token of {SHORT}, {values[1]} on one of {LONG}"
    return Check(name, None, f"{message} (equal sums of log-probs, the policy is the reference)")
