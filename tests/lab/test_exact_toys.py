"""Exact toys: population minimisers with known solutions, qualities, and the checks of wrong losses."""

import math
import re
from dataclasses import replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jaxft.lab.exact_toys import (
    Risk,
    bradley_terry_toy,
    displacement,
    displacement_path,
    minimise,
    open_risk,
    overlapping,
    quality,
    vector_field,
)
from jaxft.lab.loss_checks import check_loss
from jaxft.lab.loss_evaluation import probe
from jaxft.objectives.losses import preference_losses as P
from jaxft.objectives.losses import reference_free_losses as F
from jaxft.objectives.pair import Claims, claims_of

REWARD, REFERENCE = [0.2, 1.5, -0.7, 0.9], [0.1, -1.3, 0.8, -0.2]


def optimum(loss, toy):
    return minimise(open_risk(probe("it", loss), toy), toy)


def normalised(logits):
    return logits - math.log(sum(math.exp(x) for x in logits))


def margin(pair):
    return pair.chosen.ratio - pair.rejected.ratio


# Known solutions


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_dpo_with_unlimited_data_is_the_reference_times_the_exponential_of_the_reward(beta):
    """Rafailov et al. 2023, eq. 4: pi = ref exp(reward / beta) / Z."""
    toy = bradley_terry_toy(REWARD, REFERENCE)
    found = optimum(partial(P.dpo, beta=beta), toy)
    expected = normalised(np.array(REFERENCE) + np.array(REWARD) / beta)
    np.testing.assert_allclose(found.logp, expected, atol=1e-6)
    assert found.finite and found.bounded


def test_ipo_with_unlimited_data_is_the_exponential_of_the_mean_preference():
    """With responses of one token, IPO fits c_i - c_j to (p_ij - 1/2) / beta by least squares over all pairs,
    so c_i is the mean of (p_ij - 1/2) / beta over j, i included, up to a constant (Azar et al. 2023).
    """
    toy, beta = bradley_terry_toy(REWARD, REFERENCE), 0.4
    expected = normalised(np.array(REFERENCE) + (toy.prefer - 0.5).mean(1) / beta)
    np.testing.assert_allclose(optimum(partial(P.ipo, beta=beta), toy).logp, expected, atol=1e-6)


def test_flipped_labels_shrink_the_log_odds_that_dpo_learns():
    """Two responses: sigmoid(beta D) = (1 - f) p + f (1 - p). `robust` with that f learns p itself."""
    beta, flipped, p = 0.5, 0.2, 1 / (1 + math.exp(-1.0))
    toy = bradley_terry_toy([1.0, 0.0]).with_noise(flipped)
    for loss, q in (
        (P.dpo, (1 - flipped) * p + flipped * (1 - p)),
        (partial(P.robust, label_smoothing=0.2), p),
    ):
        c = optimum(partial(loss, beta=beta), toy).logp - toy.reference
        assert c[0] - c[1] == pytest.approx(math.log(q / (1 - q)) / beta, abs=1e-5)


def test_biased_annotators_teach_dpo_their_reward():
    """DPO with unlimited data is reference * exp(r / beta), where r is the reward that labels follow."""
    beta, bias, length = 0.5, 0.8, [14, 6, 11, 20]
    toy = bradley_terry_toy(REWARD, REFERENCE, length)
    liked = np.array(REWARD) + bias * np.array(length) / 10
    found = optimum(partial(P.dpo, beta=beta), toy.with_annotators(bias=bias)).logp
    np.testing.assert_allclose(found, normalised(toy.reference + liked / beta), atol=1e-5)


def test_annotators_in_a_circle_prefer_each_response_to_the_next_one():
    toy = bradley_terry_toy([1.0, 1.0, 1.0, 1.0]).with_annotators(circle=2.0)
    for i in range(4):
        assert toy.prefer[i, (i + 1) % 4] == pytest.approx(1 / (1 + math.exp(-2.0)))
        assert toy.prefer[(i + 1) % 4, i] == pytest.approx(1 / (1 + math.exp(2.0)))
        assert toy.prefer[i, (i + 2) % 4] == 0.5
    plain = bradley_terry_toy(REWARD, REFERENCE)
    np.testing.assert_array_equal(plain.with_annotators().prefer, plain.prefer)


@pytest.mark.parametrize("reward", [REWARD, [0.0, 0.4, 0.9, 1.3, 2.0, 0.7]])
def test_the_risk_of_hinge_is_that_of_a_linear_program(reward):
    """min sum_ij w_ij t_ij over log-ratios c and t, where t_ij >= 0 and t_ij >= 1 - beta (c_i - c_j)."""
    toy, beta = bradley_terry_toy(reward), 0.1
    N = len(reward)
    i, j = np.nonzero(1 - np.eye(N))
    rows = np.arange(len(i))
    above = np.zeros((len(i), N + len(i)))
    above[rows, i], above[rows, j], above[rows, N + rows] = -beta, beta, -1.0
    cost = np.concatenate([np.zeros(N), 1 / (1 + np.exp(toy.reward[j] - toy.reward[i])) / (N * (N - 1) / 2)])
    bounds = [(None, None)] * N + [(0, None)] * len(i)
    expected = linprog(cost, A_ub=above, b_ub=-np.ones(len(i)), bounds=bounds).fun
    assert optimum(partial(P.hinge, beta=beta), toy).risk == pytest.approx(expected, abs=1e-6)


def test_nll_with_unlimited_data_is_the_distribution_of_chosen_responses():
    toy = bradley_terry_toy(REWARD, REFERENCE)
    wins = 2 * (toy.compared * toy.prefer).sum(1)
    np.testing.assert_allclose(np.exp(optimum(P.nll, toy).logp), wins, atol=1e-6)


def test_preferences_in_a_circle_leave_dpo_at_the_reference():
    """Three responses beat one another in a circle, with log-odds of 2, so no reward explains them."""
    circle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    toy = bradley_terry_toy([0.0, 0.0, 0.0], reference=[0.0, 1.0, 2.0])
    toy = replace(toy, prefer=1 / (1 + np.exp(-2.0 * circle)))
    np.testing.assert_allclose(optimum(P.dpo, toy).logp, toy.reference, atol=1e-5)


def test_a_loss_that_rewards_the_margin_without_end_has_no_bound():
    assert not optimum(lambda pair: -0.1 * margin(pair), bradley_terry_toy(REWARD)).bounded
    saturating = optimum(P.apo_zero, bradley_terry_toy(REWARD))
    assert saturating.bounded and not saturating.finite


def test_a_risk_that_is_not_a_number_ends_the_search():
    toy = bradley_terry_toy(REWARD)

    def nan(x):
        return math.nan, np.zeros_like(x)

    def nan_beyond_the_reference(x):
        return (math.nan if np.abs(x).max() > 0 else 1.0), x - 1.0

    assert math.isnan(minimise(Risk(nan, nan), toy).risk)
    found = minimise(Risk(nan_beyond_the_reference, nan_beyond_the_reference), toy)
    assert found.risk == 1.0 and np.allclose(found.logp, toy.reference)


def test_a_toy_of_one_response_and_an_unknown_knob_are_one_line():
    with pytest.raises(ValueError, match="^dpo has no knob 'bta'; its knobs: beta, score$"):
        open_risk(probe("dpo", P.dpo), bradley_terry_toy([0.0, 1.0]), bta=0.5)
    with pytest.raises(ValueError, match="give the rewards of two or more"):
        bradley_terry_toy([1.0])


def test_quality_is_the_expectation_over_responses():
    toy = bradley_terry_toy([0.0, 1.0])
    found = quality(toy, np.log([0.25, 0.75]))
    win = 1 / (1 + math.exp(-1.0))
    assert found.reward == pytest.approx(0.75)
    assert found.win_rate == pytest.approx(0.5 * 0.5 + 0.5 * (0.75 * win + 0.25 * (1 - win)))
    assert found.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_shared_features_lower_the_chosen_response_under_dpo_and_not_under_dpop():
    toy = overlapping()
    assert displacement(displacement_path(open_risk(probe("dpo", P.dpo), toy), toy))[0] < 0
    assert displacement(displacement_path(open_risk(probe("dpop", P.dpop), toy), toy))[0] > 0
    apart = overlapping(overlap=0.0)
    assert displacement(displacement_path(open_risk(probe("dpo", P.dpo), apart), apart))[0] > 0


def test_the_field_of_dpo_is_its_formula():
    found = vector_field(probe("dpo", partial(P.dpo, beta=0.2)), 6.0, 5)
    c, r = np.meshgrid(found.chosen, found.rejected, indexing="ij")
    push = 0.2 / (1 + np.exp(0.2 * (c - r)))
    np.testing.assert_allclose(found.push_chosen, push, rtol=1e-5)
    np.testing.assert_allclose(found.push_rejected, -push, rtol=1e-5)


# Claims


def not_of_the_margin(
    pair, beta: float = 0.1
) -> Annotated[P.PairLoss, Claims.of("difference", "calibrated")]:
    return P.logistic(beta * (pair.chosen.ratio - 0.9 * pair.rejected.ratio))


def endless(pair, beta: float = 0.1) -> Annotated[P.PairLoss, Claims.of("finite")]:
    return jax.nn.sigmoid(-beta * margin(pair))


def wrong_reference(pair, beta: float = 0.1) -> P.Calibrated:
    """DPO that adds the reference's margin in place of subtracting it."""
    known = pair.chosen.reference - pair.rejected.reference
    return P.logistic(beta * (pair.chosen.logp - pair.rejected.logp + known))


def without_reference(pair, beta: float = 0.1) -> Annotated[P.PairLoss, Claims.of("difference")]:
    """A function of the margin of log-probs, where that of log-ratios is claimed."""
    return P.logistic(beta * (pair.chosen.logp - pair.rejected.logp))


@pytest.mark.parametrize(
    "loss, name, text",
    [
        (lambda pair: P.logistic(-0.1 * margin(pair)), "Bradley-Terry", "in reverse .* change its sign"),
        (not_of_the_margin, "difference", "claimed, but adding the same to both log-ratios changes it"),
        (without_reference, "difference", "claimed, but other lengths or log-probs of the reference"),
        (endless, "optimum", "claimed, but .* infinite log-ratios"),
        (lambda pair: -0.1 * margin(pair), "optimum", "falls without bound"),
        (wrong_reference, "calibrated", "claimed, but"),
    ],
    ids=[
        "a wrong sign",
        "no function of the margin",
        "no reference",
        "no end",
        "no bound",
        "the reference's sign",
    ],
)
def test_a_wrong_loss_is_named(loss, name, text):
    found = next(c for c in check_loss(probe("it", loss)) if c.name == name)
    assert found.ok is False and re.search(text, found.message)


def test_claims_are_read_from_the_annotation_for_other_numbers_but_not_for_other_functions():
    assert "calibrated" in claims_of(P.dpo) and claims_of(partial(P.dpo, beta=0.3)) == claims_of(P.dpo)
    assert claims_of(partial(P.dpo, score=P.forward_kl)) == ()
    assert claims_of(P.wpo(P.dpo)) == () == claims_of(P.mix((P.dpo, 1.0)))
    assert claims_of(F.simpo) == ("bradley_terry", "finite", "raises_margin")
    assert claims_of(lambda pair: jnp.zeros(())) == ()
