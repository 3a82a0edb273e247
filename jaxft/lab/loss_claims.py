"""What a loss would learn from unlimited data, checked on exact toys against what it claims.

The toy has five responses with known rewards, of unequal lengths and log-probs, whose preferences follow
Bradley and Terry (1952). A loss that orders them in reverse or whose risk has no lower bound fails; other
properties are described, unless its author claims them:

bradley_terry: the population minimiser orders the responses by their true reward.
calibrated: its margins are the true log-odds, up to one factor.
finite: it is at finite log-probs, so that training has an end.
raises_margin: at the reference the gradient raises the margin.
keeps_chosen: chosen responses don't lose log-prob while the margin grows, even if they share features with
    the rejected ones.
antisymmetric, difference: see traits.py.
"""

from dataclasses import dataclass

import numpy as np

from jaxft.lab.exact_toys import (
    Displacement,
    Minimum,
    Toy,
    bradley_terry_toy,
    displacement,
    minimise,
    open_risk,
    overlapping,
)
from jaxft.lab.loss_probe import PAIR, Check, Curve, Probe, format_number

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
class Optimum:
    """The population minimiser of a loss, with the reward margins between responses that it implies."""

    toy: Toy
    minimum: Minimum
    margins: dict[str, np.ndarray]  # name -> [5], of each response


def find_optimum(probe: Probe) -> Optimum:
    """Minimise the risk of a loss on the toy."""
    toy = bradley_terry_toy(TOY_REWARD, TOY_REFERENCE, TOY_LENGTH)
    minimum = minimise(open_risk(probe, toy), toy)
    return Optimum(toy, minimum, _margins(toy, minimum.logp))


def _margins(toy: Toy, logp: np.ndarray) -> dict[str, np.ndarray]:
    summed = {"log-ratios": logp - toy.reference, "log-probs": logp}
    return {
        **{f"summed {name}": x for name, x in summed.items()},
        **{f"mean {name}": x / toy.length for name, x in summed.items()},
    }


def check_optimum(optimum: Optimum, claims: tuple[str, ...]) -> tuple[Check, Check, Check]:
    """Check whether the population minimiser exists, orders the responses by reward, and equals the
    log-odds.
    """
    return (
        _check_finite(optimum.minimum, "finite" in claims),
        _check_order(optimum, "bradley_terry" in claims),
        _check_calibration(optimum, "calibrated" in claims),
    )


def _claimed(name: str, claimed: bool, holds: bool, message: str) -> Check:
    """A description; a check of a claim if it is claimed."""
    if claimed and not holds:
        message = f"claimed, but {message}"
    return Check(name, holds if claimed else None, message)


def _check_finite(minimum: Minimum, claimed: bool) -> Check:
    name = "optimum"
    if not np.isfinite(minimum.risk):
        return Check(name, False, "the expected loss is not finite at any policy that the search reached")
    if not minimum.bounded:
        message = "the expected loss falls without bound as a response's probability goes to 0"
        return Check(name, False, f"{message}; bound it, with log_sigmoid or a square of the margin")
    if not minimum.finite:
        message = "with unlimited data the loss is lowest at infinite log-ratios: training has no end"
        return _claimed(name, claimed, False, message)
    return _claimed(name, claimed, True, "with unlimited data the loss is lowest at finite log-ratios")


def _orders(values: np.ndarray, reward: np.ndarray) -> int:
    """1 if values are in the order of the rewards, -1 in reverse, else 0."""
    steps = np.diff(values[np.argsort(reward)])
    least = 1e-3 * np.ptp(values)
    return int((steps > least).all()) - int((steps < -least).all())


def _check_order(optimum: Optimum, claimed: bool) -> Check:
    name, reward = "Bradley-Terry", optimum.toy.reward
    if np.abs(optimum.margins["summed log-ratios"]).max() < 1e-3:
        message = "with unlimited data the loss is lowest at the reference: nothing is learned of soft labels"
        return _claimed(name, claimed, False, message)
    orders = {what: _orders(x, reward) for what, x in optimum.margins.items()}
    fits = sorted(orders, key=lambda what: -np.corrcoef(optimum.margins[what], reward)[0, 1])
    right = [what for what in fits if orders[what] > 0]
    if not right and min(orders.values()) < 0:
        message = "with unlimited data the loss orders responses in reverse of their true reward"
        return Check(name, False, f"{message}; change its sign")
    local = _margins(optimum.toy, optimum.minimum.local)
    if right and _orders(local[right[0]], reward) < 0:
        message = (
            f"{right[0]} order the responses by true reward at the optimum, but descent from the reference "
            "ends in a local minimum that orders them in reverse"
        )
        return _claimed(name, claimed, False, message)
    if right:
        return _claimed(name, claimed, True, f"{right[0]} of the optimum order the responses by true reward")
    message = "no order of log-probs or log-ratios at the optimum is that of the true rewards"
    return _claimed(name, claimed, False, message)


def _check_calibration(optimum: Optimum, claimed: bool) -> Check:
    """Fit log-odds = k margin for each kind of margin."""
    odds = optimum.toy.reward[:, None] - optimum.toy.reward[None, :]
    fits = []
    for what, x in optimum.margins.items():
        margin = x[:, None] - x[None, :]
        size = float((margin * margin).sum())
        k = float((odds * margin).sum()) / size if size > 1e-12 else 0.0
        fits.append((float(np.abs(odds - k * margin).max()), k, what))
    residual, k, what = min(fits)
    if residual < 1e-3 and k > 0:
        message = f"the optimum's margins are true log-odds: {format_number(k)} times those of {what}"
        return _claimed("calibrated", claimed, True, message)
    message = "the optimum's margins are no multiple of the true log-odds"
    if residual < np.abs(odds).max() and k > 0:
        message += f"; nearest is {format_number(k)} times {what}, off by up to {format_number(residual)}"
    return _claimed("calibrated", claimed, False, message)


# Directions


def check_sign(curve: Curve, claimed: bool) -> Check:
    """Check that the gradient at the reference raises the margin."""
    chosen, rejected = (float(curve.gradient[kind][len(curve.margin) // 2]) for kind in PAIR)
    slope = rejected - chosen
    least = 1e-6 * max(float(np.abs(x).max()) for x in curve.gradient.values())
    if slope > least:
        return _claimed("sign", claimed, True, "the gradient at the reference raises the margin")
    what = "lowers the margin" if slope < -least else "leaves the margin"
    return _claimed("sign", claimed, False, f"the gradient at the reference {what}")


def find_displacement(probe: Probe) -> Displacement | None:
    """Compute the change of both log-probs where the two responses share most of their features."""
    toy = overlapping()
    return displacement(open_risk(probe, toy), toy)


def check_displacement(probe: Probe, claimed: bool) -> Check:
    """Check whether the chosen response loses log-prob while the margin grows."""
    moved = find_displacement(probe)
    name = "displacement"
    if moved is None:
        return _claimed(name, claimed, False, "from the reference the margin never rises by 1 nat")
    message = f"{format_number(moved.chosen)} on chosen, {format_number(moved.rejected)} on rejected"
    message = f"{message} while the margin rises by 1 nat, if the two share 90 % of their features"
    return _claimed(name, claimed, moved.chosen > 0, message)
