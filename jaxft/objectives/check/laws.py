"""What a preference loss has to obey, on the synthetic pairs of probe.py; `check(probe)` looks at it all,
traits.py included.

A check fails where training would go wrong: not one finite value a pair, a value that leans on other pairs,
no push or the wrong one, a claim that doesn't hold.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.objectives.check.probe import (
    PAIR,
    Check,
    Curve,
    Probe,
    alike,
    alone,
    curve,
    judged,
    number,
    same,
    shape_of,
    span,
    together,
)
from jaxft.objectives.check.synthetic import PER_TOKEN, TOKENS, in_rows, pairs, varied
from jaxft.objectives.check.traits import antisymmetric, difference, lengths, needs, reference
from jaxft.objectives.pair import PairBatch
from jaxft.tree import nearest

CLAIMS = ("antisymmetric", "difference")
LONG = 4096  # tokens of a long answer
ALONE = "drop the mean or sum over pairs (the objective weighs and adds them), or wrap the loss in @coupled of pair.py"


def check(probe: Probe, claims: Iterable[str] = ()) -> tuple[Check, ...]:
    """All checks of a loss. claims: what its author says of it, of CLAIMS, to fail where it doesn't hold.

    Raises ValueError where a claim isn't known, or where the loss raises.
    """
    claims = tuple(claims)
    for claim in claims:
        if claim not in CLAIMS:
            raise ValueError(f"{claim!r} can't be claimed; near: {', '.join(nearest(claim, list(CLAIMS)))}")
    shape = one_value_a_pair(probe)
    if not shape.ok:
        return (shape,)  # nothing else means anything
    seen = curve(probe, span(probe))
    first = (shape, finite(probe, jnp.float32), finite(probe, jnp.bfloat16), empty_slots(probe))
    usual = ordinary(probe, seen)
    if not usual.ok:
        return (*first, usual)
    batches = (weightless(probe), order(probe)) if probe.declared.coupled else (own_pair(probe),)
    return (
        needs(probe),
        *first,
        *batches,
        start(probe),
        first_step(seen),
        direction(seen),
        antisymmetric(probe, "antisymmetric" in claims),
        difference(probe, "difference" in claims),
        reference(probe),
        *lengths(probe),
    )


# One finite value a pair


def one_value_a_pair(probe: Probe) -> Check:
    """[B, P] in the dtype of the log-probs."""
    wanted, found = shape_of(probe.loss, probe.kinds, probe.columns)
    if not isinstance(found, jax.ShapeDtypeStruct):
        return Check(
            "shape",
            False,
            f"wanted an array {list(wanted)}, one value a pair, found a {type(found).__name__}",
        )
    if found.shape != wanted:
        return Check(
            "shape", False, f"wanted one value a pair, {list(wanted)}, found {list(found.shape)}; {ALONE}"
        )
    if found.dtype != jnp.float32:
        return Check(
            "shape",
            False,
            f"wanted float32 like the log-probs, found {found.dtype}; drop the cast or comparison",
        )
    return Check("shape", True, f"{found.dtype} {list(found.shape)} of a batch {list(wanted)}")


def extremes(probe: Probe, dtype: Any) -> PairBatch:
    """Pairs [72, 1]: policy and reference at log-probs from 0 to -1e5, alike and apart, in answers of 1 and
    of LONG tokens.
    """
    sums = -np.array([0.0, 1e-6, 1.0, 100.0, 1e4, 1e5])
    policy, known = (x.ravel() for x in np.meshgrid(sums, sums))

    def turned(x: np.ndarray, k: int) -> np.ndarray:  # so that every answer meets several others
        return np.concatenate([np.roll(x, k), np.roll(x, 7 * k)])

    ratio = {kind: turned(policy - known, k) for k, kind in enumerate(probe.kinds)}
    deep = {kind: turned(known, k) for k, kind in enumerate(probe.kinds)}
    n = np.arange(2 * len(policy))
    length = {"chosen": np.where(n % 2, LONG, 1), "rejected": np.where(n // 2 % 2, LONG, 1)} | dict.fromkeys(
        probe.kinds[2:], 1
    )
    return pairs(ratio, length, deep, probe.columns, 2 * LONG + 1, dtype)


def finite(probe: Probe, dtype: Any) -> Check:
    """Values and gradients at the extremes."""
    name, pair = f"finite in {jnp.dtype(dtype).name}", extremes(probe, dtype)
    found = alone(probe, pair)
    parts = {"the value": found.value, **{f"the gradient on {kind}": x for kind, x in found.slope.items()}}
    bad = {part: ~np.isfinite(x.astype(np.float32)) for part, x in parts.items()}
    count = int(np.any(list(bad.values()), 0).sum())
    if not count:
        return Check(
            name,
            True,
            f"log-probs of policy and reference 0 to -1e5 in any mix, answers of 1 and {LONG} tokens",
        )
    part = next(part for part, where in bad.items() if where.any())
    n = int(np.argmax(bad[part]))
    logp, known, length = (
        [number(x[n, 0]) for x in _fields(pair, what)] for what in ("logp", "reference", "length")
    )
    at = f"log pi of chosen and rejected {' and '.join(logp)}, reference {' and '.join(known)}, {' and '.join(length)} tokens"
    words = f"{part} is {float(parts[part][n])} at {at} ({count} such pairs of {len(found.value)})"
    return Check(
        name,
        False,
        f"{words}; use a stable form: log_sigmoid, expm1, logsumexp, or preference.capped and square",
    )


def _fields(pair: PairBatch, name: str) -> list[np.ndarray]:
    return [getattr(pair.responses[kind], name) for kind in PAIR]


def empty_slots(probe: Probe) -> Check:
    """Finite where answers are missing and in slots of weight 0."""
    there = {"chosen": np.array([1, 1, 0, 0, 1, 1])} | dict.fromkeys(
        probe.kinds[1:], np.array([1, 0, 1, 0, 1, 1])
    )
    length = {kind: TOKENS * x for kind, x in there.items()}
    pair = in_rows(pairs(dict.fromkeys(probe.kinds, 2.0), length, columns=probe.columns), 2)
    batches = {
        "where one answer or both are missing": np.ones((3, 2)),
        "where slots of weight 0 are among the pairs": np.array([[1, 1], [1, 0], [0, 1]]),
        "in a batch whose slots all have weight 0": np.zeros((3, 2)),
    }
    for where, weights in batches.items():
        weight: Any = weights.astype(np.float32)
        found = together(probe, replace(pair, weight=weight))
        for part, x in {
            "a value": found.value,
            **{f"the gradient on {k}": x for k, x in found.slope.items()},
        }.items():
            if not np.isfinite(x).all():
                words = (
                    f"{part} is not finite {where}; a missing answer has log-probs 0, length 1 and present 0"
                )
                return Check("empty slots", False, f"{words}: guard divisions and logs with jnp.where")
    return Check("empty slots", True, "finite where answers are missing, and in slots of weight 0")


def ordinary(probe: Probe, seen: Curve) -> Check:
    """Finite at log-ratios of a few nats, without which nothing else can be said."""
    name, rest = "usual pairs", "nothing else was looked at"
    bad = ~np.isfinite(np.stack([seen.value, *seen.slope.values()])).all(0)
    if bad.any():
        return Check(
            name, False, f"value or gradient is not finite at margins {_stretches(seen.margin, bad)}; {rest}"
        )
    found = judged(probe, **varied(probe.kinds, 24))
    if not np.isfinite(np.stack([found.value, *found.slope.values()])).all():
        return Check(name, False, f"value or gradient is not finite at log-ratios within 8 nats; {rest}")
    return Check(name, True, "values and gradients are finite")


# Pairs in a batch


def _flat(found: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(x.size), found)


def _some(probe: Probe) -> PairBatch:
    return pairs(**varied(probe.kinds, 6), columns=probe.columns)


def own_pair(probe: Probe) -> Check:
    """A pair's value is its own: the same among others, and whatever its weight."""
    pair = _some(probe)
    weight: Any = (pair.weight / 6).astype(np.float32)
    mine, found = alone(probe, pair), _flat(together(probe, in_rows(replace(pair, weight=weight), 2)))
    if alike(mine, found):
        return Check("own pair", True, "a pair's value and gradient are the same alone and among other pairs")
    n = int(np.argmax(np.abs(mine.value - found.value)))
    words = f"a pair's value is {number(mine.value[n])} alone and {number(found.value[n])} among six of weight 1/6"
    return Check("own pair", False, f"{words}; {ALONE}; leave pair.weight to the objective")


def weightless(probe: Probe) -> Check:
    """Slots of weight 0 have a neutral place in a Coupled loss, whatever they hold."""
    pair = _some(probe)
    mine, rows = alone(probe, pair), in_rows(pair, 2)
    weight: Any = np.array([[1, 0], [0, 0], [0, 0]], np.float32)
    whole = _flat(together(probe, replace(rows, weight=weight)))
    first = lambda found: jax.tree.map(lambda x: x[:1], found)  # noqa: E731
    if not alike(first(mine), first(whole)):
        words = f"a pair has value {number(mine.value[0])} alone and {number(whole.value[0])} beside five slots of weight 0"
        return Check("weight 0", False, f"{words}; count, sum and sort only where pair.weight > 0")
    if any(x[1:].any() for x in whole.slope.values()):
        return Check(
            "weight 0", False, "slots of weight 0 have a gradient; sum and sort only where pair.weight > 0"
        )
    return Check("weight 0", True, "slots of weight 0 change nothing of the other pairs")


def order(probe: Probe) -> Check:
    """The order of pairs is nothing to a Coupled loss."""
    pair, new = _some(probe), np.array([4, 2, 0, 5, 1, 3])
    first = _flat(together(probe, in_rows(pair, 2)))
    second = _flat(together(probe, in_rows(jax.tree.map(lambda x: x[new], pair), 2)))
    if alike(jax.tree.map(lambda x: x[new], first), second):
        return Check("order", True, "the order of the pairs in a batch changes nothing")
    words = f"the same pairs have values {_few(first.value[new])} in one order and {_few(second.value)} in another"
    return Check("order", False, f"{words}; microbatches and meshes lay them out as they like")


def _few(values: np.ndarray) -> str:
    return ", ".join(number(x) for x in values.ravel()[:4])


# How it pushes


def start(probe: Probe) -> Check:
    """The value where the policy is the reference."""
    deep, long = np.array([-24.0, -3.0, -400.0, -24.0, -24.0, -90.0]), np.array([16, 16, 16, 4, 48, 5])
    length = {"chosen": long, "rejected": long[[0, 1, 2, 4, 3, 5]]} | dict.fromkeys(probe.kinds[2:], TOKENS)
    known = {"chosen": deep, "rejected": np.roll(deep, 1)} | dict.fromkeys(probe.kinds[2:], -24.0)
    value = judged(probe, ratio=dict.fromkeys(probe.kinds, 0.0), length=length, reference=known).value
    level = judged(probe, ratio=dict.fromkeys(probe.kinds, np.zeros(1))).value
    shown = number(level[0]) + (" = log 2" if abs(level[0] - math.log(2)) < 1e-5 else "")
    if same(value, np.full_like(value, level[0])):
        return Check(
            "start",
            None,
            f"the value is {shown} where the policy is the reference, whatever log-probs and lengths",
        )
    words = (
        f"the value is {shown} where the policy is the reference, at {TOKENS} tokens of log-prob {PER_TOKEN}"
    )
    return Check(
        "start",
        None,
        f"{words}; with other lengths and log-probs {number(value.min())} to {number(value.max())}",
    )


def first_step(seen: Curve) -> Check:
    """A run begins where the policy is the reference: there must be a gradient."""
    kinds = sorted(seen.slope, key=lambda kind: kind not in PAIR)
    slopes = np.stack([seen.slope[kind] for kind in kinds])
    now, most = slopes[:, len(seen.margin) // 2], np.abs(slopes).max()
    if most == 0:
        return Check(
            "first step",
            False,
            "there is no gradient at any margin; is there a stop_gradient, or no log-prob in it?",
        )
    if np.abs(now).max() < 1e-6 * most:
        words = "there is no gradient where the policy is the reference, where a run begins: nothing is ever learned"
        return Check("first step", False, f"{words}; shift the loss's flat point away from margin 0")
    shown = ", ".join(f"{number(x)} on {kind}" for kind, x in zip(kinds, now, strict=True))
    return Check("first step", True, f"where the policy is the reference the gradient is {shown}")


def direction(seen: Curve) -> Check:
    """Up with the chosen answer and down with the rejected one."""
    name, reach = "direction", f"at margins {number(seen.margin[0])} to {number(seen.margin[-1])}"
    chosen, rejected = (seen.slope[kind] for kind in PAIR)
    least, over = 1e-6 * max(np.abs(chosen).max(), np.abs(rejected).max()), (chosen - rejected) / 2
    if least == 0:
        return Check(name, None, "neither the chosen nor the rejected answer is pushed")
    if not (over < -least).any():
        return Check(
            name,
            False,
            f"nowhere {reach} does it push the chosen answer over the rejected one; turn its sign",
        )
    wrong = {"the margin down": over > least, "chosen down": chosen > least, "rejected up": rejected < -least}
    found: dict[str, list[str]] = {}
    for what, where in wrong.items():
        if where.any():
            found.setdefault(_stretches(seen.margin, where), []).append(what)
    if found:
        words = "; ".join(f"{' and '.join(what)} at margins {where}" for where, what in found.items())
        return Check(name, None, f"pushes {words}")
    return Check(name, True, f"never pushes chosen down or rejected up, {reach}")


def _stretches(margin: np.ndarray, where: np.ndarray) -> str:
    """The stretches of the margin where something holds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], where.astype(int), [0]])))
    ends = [(margin[a], margin[b - 1]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    texts = [number(a) if a == b else f"{number(a)} to {number(b)}" for a, b in ends]
    return ", ".join(texts[:3]) + (" and more" if len(texts) > 3 else "")
