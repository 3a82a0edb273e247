"""What a preference loss is like, on the synthetic pairs of probe.py: what it needs, its symmetries, what
lengths do to it.

None of it is right or wrong, unless the author of a loss claims it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft.objectives.check.probe import PAIR, Check, Probe, alike, alone, call, judged, number, same
from jaxft.objectives.check.synthetic import PER_TOKEN, TOKENS, pairs, varied
from jaxft.objectives.pair import PairBatch

BRIEF, LONG = 8, 64  # tokens of answers that are compared by length


def needs(probe: Probe) -> Check:
    """What the loss reads besides chosen and rejected answers."""
    pair = pairs(**varied(probe.kinds, 24), columns=probe.columns)
    level = alone(probe, pair)

    def reads(name: str) -> bool:
        return not alike(
            level,
            alone(probe, replace(pair, columns={**pair.columns, name: pair.columns[name] + np.float32(1)})),
        )

    found = [f"a third answer `{kind}`" for kind in probe.kinds[2:]]
    found += [
        f"the column `{name}` ({int(name != 'margin')} in what follows)"
        for name in probe.columns
        if reads(name)
    ]
    words = f"reads chosen and rejected answers{''.join(', ' + what for what in found)}"
    if probe.declared.coupled:
        state = (
            f" with the state {', '.join(probe.declared.init)} at its start" if probe.declared.init else ""
        )
        words += f"; it is coupled: where nothing else is said, what follows is of a batch of one pair{state}"
    return Check("needs", None, words)


def reference(probe: Probe) -> Check:
    """Whether anything changes with the reference's log-probs."""
    given = varied(probe.kinds, 24)
    down = {kind: np.linspace(1, 4, 24) * (i + 1) for i, kind in enumerate(probe.kinds)}
    moved = {
        "ratio": {kind: x + down[kind] for kind, x in given["ratio"].items()},
        "length": given["length"],
        "reference": {kind: x - down[kind] for kind, x in given["reference"].items()},
    }
    if not alike(judged(probe, **given), judged(probe, **moved)):
        return Check("reference", None, "compares the policy with it")
    if runs_without_reference(probe):
        return Check(
            "reference",
            None,
            "never looks at it: preference(...) without one (reference=None) saves its forward pass",
        )
    return Check("reference", None, "asks for it, and nothing depends on it")


def runs_without_reference(probe: Probe) -> bool:
    """Whether the loss gives values where there is no reference."""
    pair = pairs(dict.fromkeys(probe.kinds, np.zeros(6)), columns=probe.columns)
    try:
        jax.eval_shape(partial(call, probe.loss), _without_reference(pair))
    except Exception:  # of a user's function
        return False
    return True


def _without_reference(pair: PairBatch) -> PairBatch:
    answers = {kind: replace(a, reference=None) for kind, a in pair.responses.items()}
    return replace(pair, responses=answers, tokens=replace(pair.tokens, reference=None))


# Symmetries


def antisymmetric(probe: Probe, claimed: bool = False) -> Check:
    """loss(pair) - loss(swapped pair) = -k margin for one k, as in DPO; the margin of sums or means,
    log-ratios or log-probs.
    """
    given = varied(probe.kinds, 24)
    turned = {what: {**x, "chosen": x["rejected"], "rejected": x["chosen"]} for what, x in given.items()}
    here, there = judged(probe, **given).value, judged(probe, **turned).value
    gap = here - there
    policy = {kind: given["ratio"][kind] + given["reference"][kind] for kind in PAIR}
    ones = dict.fromkeys(PAIR, 1)
    fits = []
    for what, x in (("log-ratios", given["ratio"]), ("log-probs", policy)):
        for unit, per in (("summed", ones), ("mean", given["length"])):
            margin = x["chosen"] / per["chosen"] - x["rejected"] / per["rejected"]
            k = -float(np.dot(gap, margin) / np.dot(margin, margin))
            fits.append((float(np.abs(gap + k * margin).max()), k, f"{unit} {what}"))
    rest, k, what = min(fits)
    law = "loss(pair) - loss(swapped pair)"
    if rest < 1e-3 * np.abs(gap).max() and not same(here, there):
        return Check(
            "antisymmetric",
            True if claimed else None,
            f"yes: {law} = {number(-k)} times the margin of {what}",
        )
    words = f"{law} is no multiple of a margin; nearest is {number(-k)} times that of {what}, off by up to {number(rest)}"
    words = f"{law} = 0" if same(here, there) else words
    return (
        Check("antisymmetric", False, f"claimed, but {words}")
        if claimed
        else Check("antisymmetric", None, f"no: {words}")
    )


def difference(probe: Probe, claimed: bool = False) -> Check:
    """Only the difference of the two log-ratios counts: a rise of both by as much changes nothing."""
    given = varied(probe.kinds, 24)
    lift = {kind: np.linspace(-4, 4, 24) * (kind in PAIR) for kind in probe.kinds}
    up = {kind: x + lift[kind] for kind, x in given["ratio"].items()}

    def unmoved(length: Any) -> bool:
        return alike(
            *(
                judged(probe, ratio=ratio, length=length, reference=given["reference"])
                for ratio in (given["ratio"], up)
            )
        )

    if unmoved(given["length"]):
        return Check(
            "difference",
            True if claimed else None,
            "yes: a rise of both log-ratios by as much changes nothing",
        )
    words = "a rise of both log-ratios by as much changes it" + (
        ", unless their lengths agree" if unmoved(TOKENS) else ""
    )
    return (
        Check("difference", False, f"claimed, but {words}")
        if claimed
        else Check("difference", None, f"no: {words}")
    )


# Lengths


def lengths(probe: Probe) -> tuple[Check, Check, Check]:
    """What the lengths of answers do, at equal sums of log-probs and at equal means; and how hard a token is
    pushed.
    """

    def sums(n: Any, x: float) -> tuple[Any, Any]:
        return 0 * n + x, 0 * n + TOKENS * PER_TOKEN

    def means(n: Any, x: float) -> tuple[Any, Any]:
        return n * x, n * PER_TOKEN

    return (
        _by_length(probe, "length, sums equal", sums, {"at log-ratios of +2": 2.0, "at -2": -2.0}),
        _by_length(
            probe, "length, means equal", means, {"at log-ratios of +0.1 a token": 0.1, "at -0.1": -0.1}
        ),
        _push(probe),
    )


def _by_length(
    probe: Probe, name: str, given: Callable[[Any, float], tuple[Any, Any]], cases: dict[str, float]
) -> Check:
    """given(lengths, x) -> (log-ratios, reference's log-probs) of answers of these lengths in the case x."""
    length = {
        "chosen": np.array([LONG, BRIEF, BRIEF, LONG]),
        "rejected": np.array([BRIEF, LONG, BRIEF, LONG]),
    }
    length |= dict.fromkeys(probe.kinds[2:], np.full(4, TOKENS))
    found = []
    for x in cases.values():
        each = {kind: given(n, x if kind in PAIR else 0.0) for kind, n in length.items()}
        ratio, known = ({kind: both[i] for kind, both in each.items()} for i in range(2))
        found.append(judged(probe, ratio=ratio, length=length, reference=known).value)
    if all(same(x, np.full(4, x[0])) for x in found):
        return Check(name, None, f"{BRIEF} or {LONG} tokens, the value is the same")
    shown = ", ".join(
        f"{number(x[0])} and {number(x[1])} {case}" for case, x in zip(cases, found, strict=True)
    )
    lower = [bool(x[0] < x[1]) for x in found]
    if all(same(x[:1], x[1:2]) for x in found):
        words = "lengths matter, and not which of the two answers is the longer one"
    elif all(lower) or not any(lower):
        words = f"the loss is lower where the chosen answer is the {'longer' if lower[0] else 'shorter'} one"
    else:
        words = f"the longer answer's log-ratio counts for {'more' if lower[0] else 'less'}"
    return Check(
        name, None, f"{words} ({LONG} against {BRIEF} tokens, chosen longer and rejected longer: {shown})"
    )


def _push(probe: Probe) -> Check:
    length = {"chosen": np.array([BRIEF, LONG])} | dict.fromkeys(probe.kinds[1:], TOKENS)
    slope = judged(probe, ratio=dict.fromkeys(probe.kinds, np.zeros(2)), length=length).slope["chosen"]
    if same(slope[:1], slope[1:]):
        return Check(
            "length, gradient", None, f"{number(slope[0])} on a chosen token, of {BRIEF} or of {LONG}"
        )
    words = f"{number(slope[0])} on a chosen token of {BRIEF}, {number(slope[1])} on one of {LONG}"
    return Check("length, gradient", None, f"{words} (equal sums of log-probs, the policy is the reference)")
