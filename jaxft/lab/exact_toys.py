"""Exact toys: a prompt whose few responses are enumerated, so that all expectations are sums.

A Toy has the true reward of each response, the reference's log-probs and the probability that one response
is preferred to another. The risk of a loss is its expectation over all ordered pairs. `minimise` returns the
policy of the lowest risk, which the loss would reach with unlimited data, `quality` its true reward, win rate
and KL, and `displacement` whether chosen responses lose log-prob on the way.

    toy = bradley_terry_toy([0.0, 1.0, 2.0])
    risk = open_risk(probe("dpo", partial(dpo, beta=0.5)), toy)
    best = minimise(risk, toy)
    np.exp(best.logp)         # reference * exp(reward / 0.5), normalised
    quality(toy, best.logp)   # true reward, win rate against the reference, KL

Everything is computed in float64.

The checks at the end are of properties that a loss's author may claim (see pair.Claims); a property that is
not claimed is only described. The first three are of a toy of five responses of unequal lengths and
log-probs, on which a loss also fails if its optimum orders them in reverse or its risk has no lower bound:

bradley_terry: the policy of the lowest risk orders the responses by their true reward.
calibrated: its margins are the true log-odds times a constant.
finite: its log-ratios are finite, so that training has an end.
raises_margin: at the reference a step against the gradient raises the margin of a pair, without a toy.
keeps_chosen: on the toy `overlapping()`, whose chosen and rejected responses share features, the chosen
    response gains log-prob while the margin grows.

Two further claims, antisymmetric and difference, are checked in loss_checks.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxft.lab.loss_evaluation import (
    PAIR,
    Check,
    Curve,
    Probe,
    evaluate_pairs,
    format_number,
    loss_knobs,
    one_line,
    synthetic_pairs,
)
from jaxft.objectives.losses.ranking_losses import RATING
from jaxft.objectives.pair import PairBatch

COPIES = 512  # pairs of the batch that stands for the population of a coupled loss
FAR = 1e4  # nats from the reference where a search ends
END_MARGIN = 1.0  # nats, the mean margin at which a path from the reference ends
KINK = 1e-5  # gradient per nat above which a search has not ended at a smooth minimum
FLAT = 1e-7  # a rise of the risk, relative to its change since the reference, that counts as 0
CLAIMS = (
    "antisymmetric",
    "difference",
    "bradley_terry",
    "calibrated",
    "finite",
    "raises_margin",
    "keeps_chosen",
)
TOY_REWARD = (0.0, 0.5, 0.9, 1.4, 1.7)
TOY_REFERENCE = (0.3, -1.0, 0.6, -0.4, 0.1)
TOY_LENGTH = (14, 6, 11, 20, 9)


@dataclass(frozen=True)
class Toy:
    """A prompt with N possible responses.

    reference: log-probs of the reference policy. reward: true rewards. prefer: [i, j] is the probability
    that response i is preferred to j. compared: [i, j] is how often the two are compared, symmetric, with
    sum 1. length: tokens. features: [N, F] of a log-linear policy, logits = reference + features @ theta.
    """

    reference: Float[np.ndarray, " N"]
    reward: Float[np.ndarray, " N"]
    prefer: Float[np.ndarray, "N N"]
    compared: Float[np.ndarray, "N N"]
    length: Int[np.ndarray, " N"]
    features: Float[np.ndarray, "N F"]

    def with_noise(self, flipped: float) -> "Toy":
        """Return the toy with a fraction of the labels flipped."""
        return replace(self, prefer=(1 - flipped) * self.prefer + flipped * self.prefer.T)

    def annotators_reward(self, bias: float) -> Float[np.ndarray, " N"]:
        """Return the true rewards plus `bias` per 10 tokens."""
        return self.reward + bias * self.length / 10

    def with_annotators(self, bias: float = 0.0, circle: float = 0.0) -> "Toy":
        """Return the toy with other annotators, who prefer i to j with probability sigmoid(a_i - a_j + c).

        a: annotators_reward(bias). c: `circle` if j = i + 1, -circle if i = j + 1, else 0, where response 0
        comes after the last one; c is 0 for two responses.
        """
        N, a = len(self.reward), self.annotators_reward(bias)
        after = np.eye(N)[:, np.arange(-1, N - 1)] if N > 2 else np.zeros((N, N))  # [i, i + 1] is 1
        gap = a[:, None] - a[None, :] + circle * (after - after.T)
        return replace(self, prefer=1 / (1 + np.exp(-gap)))


def bradley_terry_toy(
    reward: Sequence[float],
    reference: Sequence[float] | None = None,
    length: Sequence[int] | None = None,
    features: Any = None,
) -> Toy:
    """Return a toy in which i is preferred to j with probability sigmoid(reward_i - reward_j).

    reference: log-probs up to a constant, equal by default. length: tokens, 1 by default. features: one per
    response by default, a tabular policy. All pairs are compared equally often. Raises ValueError for fewer
    than two responses.
    """
    r = np.asarray(reward, np.float64)
    N = len(r)
    if N < 2:
        raise ValueError(f"a toy of {N} responses has no pairs; give the rewards of two or more")
    known = log_softmax(np.zeros(N) if reference is None else np.asarray(reference, np.float64))
    prefer = 1 / (1 + np.exp(r[None, :] - r[:, None]))
    compared = (1 - np.eye(N)) / (N * (N - 1))
    tokens = np.ones(N, int) if length is None else np.asarray(length, int)
    return Toy(known, r, prefer, compared, tokens, np.eye(N) if features is None else np.asarray(features))


def log_softmax(logits: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return log-probs of logits."""
    top = logits - logits.max()
    return top - np.log(np.exp(top).sum())


# The risk of a loss


class Risk(NamedTuple):
    """Functions that return a policy's expected loss and its gradient, at a change of the logits from the
    reference's, or at the theta of a log-linear policy.
    """

    of_logits: Callable[[np.ndarray], tuple[float, np.ndarray]]
    of_theta: Callable[[np.ndarray], tuple[float, np.ndarray]]  # change of logits = features @ theta


def population(probe: Probe, toy: Toy) -> tuple[PairBatch, dict[str, Int[np.ndarray, " pairs"]]]:
    """Return (the toy's ordered pairs, weighted by how often each occurs, kind such as "chosen" -> each
    pair's response, as an index into the toy's). The weights sum to 1.

    A coupled loss may count pairs, so it gets COPIES pairs of equal weight: each pair is repeated as often as
    its weight, rounded, demands. A `mismatched` response is independent of the pair, `gold` is the one of the
    highest reward. The columns score_* are true rewards, other columns as in synthetic_pairs.
    """
    chosen, rejected = np.nonzero(toy.compared)
    weight = 2 * (toy.compared * toy.prefer)[chosen, rejected]
    if probe.declared.coupled:
        counts = np.diff(np.round(np.cumsum(weight) * COPIES), prepend=0).astype(int)
        chosen, rejected = np.repeat(chosen, counts), np.repeat(rejected, counts)
        weight = np.full(len(chosen), 1 / len(chosen))
    either = np.random.default_rng(0).permutation(np.concatenate([chosen, rejected]))[: len(chosen)]
    others = {"mismatched": either, "gold": np.full(len(chosen), np.argmax(toy.reward))}
    index = {"chosen": chosen, "rejected": rejected} | {kind: others[kind] for kind in probe.kinds[2:]}
    length = {kind: toy.length[i] for kind, i in index.items()}
    known = {kind: toy.reference[i] for kind, i in index.items()}
    reads = max(160, int(np.sum([*length.values()], 0).max()))
    zeros = dict.fromkeys(index, np.zeros(len(chosen)))
    pair = synthetic_pairs(zeros, length, known, probe.columns, reads, np.float64)
    columns: Any = {name: x.astype(np.float64) for name, x in pair.columns.items()}
    for name in columns:
        if name.removeprefix(RATING) in index and name.startswith(RATING):
            columns[name] = toy.reward[index[name.removeprefix(RATING)]][:, None]
    means: Any = {kind: np.full_like(x.length, weight @ x.length[:, 0]) for kind, x in pair.responses.items()}
    responses = {kind: replace(x, mean_length=means[kind]) for kind, x in pair.responses.items()}
    given: Any = weight[:, None]
    return replace(pair, responses=responses, columns=columns, weight=given), index


def open_risk(probe: Probe, toy: Toy, **knobs: float) -> Risk:
    """Return the expectation of a loss over the toy's pairs. knobs: values of the loss's parameters, such as
    beta=0.5; all values share a compiled program. Raises ValueError for an unknown knob; the functions of the
    result raise it if the loss fails.
    """
    known = loss_knobs(probe.loss)
    if unknown := [name for name in knobs if name not in known]:
        available = ", ".join(known) or "none"
        raise ValueError(f"{probe.name} has no knob {unknown[0]!r}; its knobs: {available}")
    pair, index = population(probe, toy)
    given = {name: np.float64(x) for name, x in knobs.items()}

    def of_logits(logits: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            with jax.enable_x64(True):
                value, gradient = probe.run_risk(
                    np.asarray(logits, np.float64), toy.reference, pair, index, given
                )
        except Exception as error:  # a user's function is traced here, with arrays for its knobs
            named = f" with the knobs {', '.join(given)} as arrays" if given else ""
            raise ValueError(f"{probe.name} fails in float64{named}: {one_line(error)}") from error
        return float(value), np.asarray(gradient, np.float64)

    def of_theta(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = of_logits(toy.features @ theta)
        return value, toy.features.T @ gradient

    return Risk(of_logits, of_theta)


# The policy that a loss would reach


@dataclass(frozen=True)
class Minimum:
    """The policy of the lowest risk.

    logp: its log-probs. finite: whether the risk rises beyond it; if not, the optimum is at infinite
    log-ratios, and logp is where the search ended. bounded: whether the risk has a lower bound. local: its
    log-probs where descent from the reference ends; not logp if that is a local minimum of higher risk.
    """

    logp: Float[np.ndarray, " N"]
    risk: float
    finite: bool
    bounded: bool
    local: Float[np.ndarray, " N"]


def minimise(risk: Risk, toy: Toy) -> Minimum:
    """Return the policy of the lowest risk: the best end of four descents, from the reference, from a point
    next to it, and from two policies that follow the true reward. If the risk is not finite at the reference,
    return the reference.
    """
    from scipy.optimize import minimize  # not at the top: most commands do not need it

    def far(x: np.ndarray) -> None:
        if np.abs(x).max() > FAR:
            raise StopIteration

    zero = np.zeros(toy.features.shape[1])
    options = {"gtol": 1e-11}
    first, along = risk.of_theta(zero)[0], toy.features.T @ (toy.reward - toy.reward.mean())
    if not math.isfinite(first):
        return Minimum(toy.reference, first, False, True, toy.reference)
    nudge = np.random.default_rng(0).normal(0, 0.1, zero.shape)  # leaves kinks and saddle points
    ends = list[tuple[float, np.ndarray]]()
    for start in (zero, nudge, 5.0 * along, 50.0 * along):
        with np.errstate(all="ignore"):
            end = minimize(risk.of_theta, start, jac=True, method="BFGS", options=options, callback=far)
        failed = math.isnan(end.fun) or not np.isfinite(end.x).all()
        ends.append((first, zero) if failed else (float(end.fun), end.x))
    lowest = min(value for value, _ in ends)
    near = 1e-4 * abs(first - lowest) + 1e-9
    best, theta = next((value, x) for value, x in ends if value <= lowest + FLAT * near)
    if np.abs(theta).max() < FAR:
        best, theta = _past_kinks(risk, best, theta)
    reached = min(ends[:2], key=lambda end: end[0])
    logits = toy.features @ theta
    falls = [first - risk.of_logits(k * logits)[0] for k in (1.0, 2.0, 4.0)]
    bounded = not (falls[2] - falls[1] > 0.5 * (falls[1] - falls[0]) > 0.05 * falls[0])
    logp = log_softmax(toy.reference + logits)
    further = [logits, *(-50.0 * np.eye(len(logp)))]  # along the way, and each response to probability 0
    rises = [risk.of_logits(logits + step)[0] - best > FLAT * abs(falls[0]) for step in further]
    finite = all(rises) or not logits.any()
    local = logp if reached[0] <= best + near else log_softmax(toy.reference + toy.features @ reached[1])
    return Minimum(logp, best, finite, bounded, local)


def _past_kinks(risk: Risk, value: float, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """Continue by Nelder and Mead's simplex method where BFGS has stopped too early, such as at a kink of a
    hinge. Return (value, theta), the same as given if the gradient is below KINK there.
    """
    from scipy.optimize import minimize

    for _ in range(2):  # a second simplex, since the first may collapse
        if not np.abs(risk.of_theta(theta)[1]).max() > KINK:
            break
        sides = np.diag(np.full(len(theta), 0.2 * np.abs(theta).max() + 0.1))
        options = {"adaptive": True, "xatol": 1e-7, "fatol": 1e-12, "maxfev": 3000}
        options["initial_simplex"] = theta + np.concatenate([0 * theta[None], sides])
        end = minimize(lambda x: risk.of_theta(x)[0], theta, method="Nelder-Mead", options=options)
        if not end.fun < value:
            break
        value, theta = float(end.fun), end.x
    return value, theta


@dataclass(frozen=True)
class Quality:
    """A policy's expected true reward, its win rate against the reference, and its KL from it in nats."""

    reward: float
    win_rate: float
    kl: float


def quality(toy: Toy, logp: Float[np.ndarray, " N"]) -> Quality:
    """Return the Quality of a policy with log-probs logp, exact sums over its responses."""
    pi, reference = np.exp(logp), np.exp(toy.reference)
    return Quality(
        float(pi @ toy.reward),
        float(pi @ toy.prefer @ reference),
        float(pi @ (logp - toy.reference)),
    )


def best_policy(toy: Toy, beta: float) -> Float[np.ndarray, " N"]:
    """Return the log-probs of reference * exp(reward / beta), the policy of the highest reward - beta KL."""
    return log_softmax(toy.reference + toy.reward / beta)


# Displacement


class DisplacementPath(NamedTuple):
    """Changes of the mean log-probs of chosen and rejected responses [n + 1] before and after n steps."""

    chosen: Float[np.ndarray, " n1"]
    rejected: Float[np.ndarray, " n1"]


def displacement_path(risk: Risk, toy: Toy) -> DisplacementPath:
    """Descend the gradient from the reference until the mean margin is END_MARGIN, for at most 1000 steps of
    length END_MARGIN / 100 in theta. Where the gradient is 0 the path ends.
    """
    weight = 2 * toy.compared * toy.prefer
    theta = np.zeros(toy.features.shape[1])
    size, moved = END_MARGIN / 100, [np.zeros(2)]
    for _ in range(10 * 100):
        slope = risk.of_theta(theta)[1]
        if not np.abs(slope).max() > 1e-12:
            break
        theta = theta - size * slope / np.linalg.norm(slope)
        c = log_softmax(toy.reference + toy.features @ theta) - toy.reference
        moved.append(np.array([weight.sum(1) @ c, weight.sum(0) @ c]))
        if moved[-1][0] - moved[-1][1] >= END_MARGIN:
            break
    return DisplacementPath(*np.array(moved).T)


def displacement(path: DisplacementPath) -> tuple[float, float] | None:
    """Return the changes of the mean log-probs of (chosen, rejected) responses, in nats, at the end of a
    path; None if its margin does not rise to END_MARGIN.

    Chosen responses may lose probability although the margin grows, where responses share features
    (Razin et al. 2024, arXiv:2410.08847).
    """
    chosen, rejected = float(path.chosen[-1]), float(path.rejected[-1])
    return (chosen, rejected) if chosen - rejected >= END_MARGIN else None


def overlapping(overlap: float = 0.9) -> Toy:
    """Return a toy of two responses that are compared and have similar features, and of three responses that
    are in no pair, which the reference prefers and whose features are random.

    overlap: the cosine between the features of the two.
    """
    rng, outside = np.random.default_rng(0), 3
    N = 2 + outside
    basis = np.linalg.qr(rng.normal(size=(N + 1, N + 1)))[0]
    near = np.sqrt(overlap) * basis[0] + np.sqrt(1 - overlap) * basis[1:3]
    features = np.concatenate([near, rng.normal(size=(outside, N + 1)) / np.sqrt(N + 1)])
    toy = bradley_terry_toy([2.0, 0.0, *[1.0] * outside], [0, 0, *[1.0] * outside], features=features)
    compared = np.zeros((N, N))
    compared[0, 1] = compared[1, 0] = 0.5
    return replace(toy, compared=compared)


# The vector field of a loss


class PushField(NamedTuple):
    """The direction in which a loss moves the log-ratios of a pair: minus its gradient [C, R], at log-ratios
    of the chosen response [C] and of the rejected one [R].
    """

    chosen: np.ndarray
    rejected: np.ndarray
    push_chosen: np.ndarray
    push_rejected: np.ndarray


def vector_field(probe: Probe, reach: float, count: int = 9) -> PushField:
    """Return the PushField of a loss at `count` log-ratios of each response, from -reach to reach."""
    grid = np.linspace(-reach, reach, count)
    c, r = (x.ravel() for x in np.meshgrid(grid, grid, indexing="ij"))
    ratio = {"chosen": c, "rejected": r} | dict.fromkeys(probe.kinds[2:], 0.0)
    evaluated = evaluate_pairs(probe, ratio=ratio, reference=-max(24.0, 1.1 * reach))
    pushes = (-evaluated.gradient[kind].reshape(count, count) for kind in PAIR)
    return PushField(grid, grid, *pushes)


# Checks of claims


Margins = dict[str, np.ndarray]  # name, such as "summed log-ratios" -> rewards of the responses


def _margins(toy: Toy, logp: np.ndarray) -> Margins:
    """Return four rewards that a policy with log-probs logp implies for each response."""
    summed = {"log-ratios": logp - toy.reference, "log-probs": logp}
    return {
        **{f"summed {name}": x for name, x in summed.items()},
        **{f"mean {name}": x / toy.length for name, x in summed.items()},
    }


def check_optimum(probe: Probe, claims: tuple[str, ...]) -> tuple[Check, Check, Check]:
    """Check whether on the toy of five responses the policy of the lowest risk is finite, orders the
    responses by true reward, and has margins that are the true log-odds. claims: names of CLAIMS.
    """
    toy = bradley_terry_toy(TOY_REWARD, TOY_REFERENCE, TOY_LENGTH)
    minimum = minimise(open_risk(probe, toy), toy)
    margins, local = _margins(toy, minimum.logp), _margins(toy, minimum.local)
    return (
        _check_finite(minimum, "finite" in claims),
        _check_order(toy.reward, margins, local, "bradley_terry" in claims),
        _check_calibration(toy.reward, margins, "calibrated" in claims),
    )


def _claimed(name: str, claimed: bool, holds: bool, message: str) -> Check:
    """Return a check that passes if the property holds; a description if it is not claimed."""
    if claimed and not holds:
        message = f"claimed, but {message}"
    return Check(name, holds if claimed else None, message)


def _check_finite(minimum: Minimum, claimed: bool) -> Check:
    name = "optimum"
    if not np.isfinite(minimum.risk):
        message = "the expected loss is not finite at the reference or at the best policy found"
        return Check(name, False, message)
    if not minimum.bounded:
        message = "the expected loss falls without bound as a response's probability goes to 0"
        return Check(name, False, f"{message}; bound it, with log_sigmoid or a square of the margin")
    if not minimum.finite:
        message = "with unlimited data the loss is lowest at infinite log-ratios: training has no end"
        return _claimed(name, claimed, False, message)
    return _claimed(name, claimed, True, "with unlimited data the loss is lowest at finite log-ratios")


def _orders(values: np.ndarray, reward: np.ndarray) -> int:
    """Return 1 if values are in the order of the rewards, -1 if in reverse, else 0."""
    steps = np.diff(values[np.argsort(reward)])
    least = 1e-3 * np.ptp(values)
    return int((steps > least).all()) - int((steps < -least).all())


def _check_order(reward: np.ndarray, margins: Margins, local: Margins, claimed: bool) -> Check:
    """Check the order of the margins of the optimum and, in `local`, of the end of a descent from the
    reference.
    """
    name = "Bradley-Terry"
    if np.abs(margins["summed log-ratios"]).max() < 1e-3:
        message = "with unlimited data the loss is lowest at the reference: noisy labels teach it nothing"
        return _claimed(name, claimed, False, message)
    orders = {what: _orders(x, reward) for what, x in margins.items()}
    fits = sorted(orders, key=lambda what: -np.corrcoef(margins[what], reward)[0, 1])
    right = [what for what in fits if orders[what] > 0]
    if not right and min(orders.values()) < 0:
        message = "with unlimited data the loss orders responses in reverse of their true reward"
        return Check(name, False, f"{message}; change its sign")
    if right and _orders(local[right[0]], reward) < 0:
        message = (
            f"{right[0]} order the responses by true reward at the optimum, but descent from the reference "
            "ends in a local minimum that orders them in reverse"
        )
        return _claimed(name, claimed, False, message)
    if right:
        return _claimed(name, claimed, True, f"{right[0]} of the optimum order the responses by true reward")
    message = "no order of log-probs or log-ratios at the optimum equals the true rewards' order"
    return _claimed(name, claimed, False, message)


def _check_calibration(reward: np.ndarray, margins: Margins, claimed: bool) -> Check:
    """Check that log-odds = k margin for one kind of margin; k is fitted by least squares."""
    odds = reward[:, None] - reward[None, :]
    fits = []
    for what, x in margins.items():
        margin = x[:, None] - x[None, :]
        size = float((margin * margin).sum())
        k = float((odds * margin).sum()) / size if size > 1e-12 else 0.0
        fits.append((float(np.abs(odds - k * margin).max()), k, what))
    residual, k, what = min(fits)
    if residual < 1e-3 and k > 0:
        message = f"the optimum's margins are true log-odds: {format_number(k)} times the margins of {what}"
        return _claimed("calibrated", claimed, True, message)
    message = "the optimum's margins are no multiple of the true log-odds"
    if residual < np.abs(odds).max() and k > 0:
        message += f"; nearest is {format_number(k)} times {what}, off by up to {format_number(residual)}"
    return _claimed("calibrated", claimed, False, message)


# Directions


def check_sign(curve: Curve, claimed: bool) -> Check:
    """Check that a step against the gradient at the reference raises the margin."""
    chosen, rejected = (float(curve.gradient[kind][len(curve.margin) // 2]) for kind in PAIR)
    slope = rejected - chosen
    least = 1e-6 * max(float(np.abs(x).max()) for x in curve.gradient.values())
    if slope > least:
        return _claimed("sign", claimed, True, "the gradient at the reference raises the margin")
    what = "lowers the margin" if slope < -least else "leaves the margin"
    return _claimed("sign", claimed, False, f"the gradient at the reference {what}")


def find_displacement(probe: Probe) -> DisplacementPath:
    """Return the displacement_path of a loss on the toy `overlapping()`."""
    toy = overlapping()
    return displacement_path(open_risk(probe, toy), toy)


def check_displacement(probe: Probe, claimed: bool) -> Check:
    """Check whether the chosen response gains log-prob while the margin grows, see find_displacement."""
    moved = displacement(find_displacement(probe))
    name = "displacement"
    if moved is None:
        return _claimed(name, claimed, False, "from the reference the margin never rises by 1 nat")
    message = f"{format_number(moved[0])} on chosen, {format_number(moved[1])} on rejected"
    message = f"{message} while the margin rises by 1 nat, if the two share 90 % of their features"
    return _claimed(name, claimed, moved[0] > 0, message)
