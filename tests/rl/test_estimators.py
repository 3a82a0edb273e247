"""Advantage estimators against their sums, written out."""

import numpy as np
import pytest

from jaxft.rl import advantages, estimators
from jaxft.rl.estimators import RolloutScores

LENGTHS = np.array([[2, 3], [1, 2]])
SCORES = np.array([[1.0, 3.0], [2.0, np.nan]])


def rollout(**changes):
    """Scores of two prompts with two completions each, the last one without a score."""
    rng = np.random.default_rng(0)
    inside = np.arange(4) < LENGTHS.reshape(4, 1)
    logps, reference, values = (np.where(inside, rng.normal(size=(4, 4)), 0) for _ in range(3))
    parts = {
        "scores": SCORES,
        "lengths": LENGTHS,
        "ended": LENGTHS > 0,
        "logps": logps,
        "reference": reference,
        "values": values,
    }
    parts |= {"reward_scores": SCORES[..., None], "reward_weights": (1.0,), "kl_coef": 0.25}
    return RolloutScores(**{**parts, **changes})


def whitened(rows):
    """Values of the first three completions, whitened together, as [4, 4]."""
    flat = np.concatenate(rows)
    out, at = np.zeros((4, 4)), 0
    for i, row in enumerate(rows):
        out[i, : len(row)] = (flat[at : at + len(row)] - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
        at += len(row)
    return out


def returns(s, coef):
    """The returns of each completion with a score: its score minus the KL of its tokens from here on."""
    rows = []
    for i, count in enumerate(LENGTHS.ravel()[:3]):
        kl = (s.logps - s.reference)[i, :count]
        rows.append(np.array([SCORES.ravel()[i] - coef * kl[t:].sum() for t in range(count)]))
    return rows


def test_by_group_gives_every_token_its_completions_advantage():
    estimate = estimators.by_group(rollout(kl_coef=None), advantage=advantages.centred)
    assert estimate.advantages.tolist() == [[-1, -1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert estimate.returns is None


def test_by_group_passes_lengths_to_the_advantage():
    estimate = estimators.by_group(rollout(kl_coef=None), advantage=advantages.opo)
    expected = advantages.opo(SCORES, LENGTHS)
    np.testing.assert_allclose(estimate.advantages[:, 0], expected.ravel(), rtol=1e-12)
    assert expected.any()


def test_by_group_refuses_a_function_that_is_no_advantage():
    with pytest.raises(ValueError, match=r"advantage=overlong can't be called with \(scores, lengths\)"):
        estimators.by_group(rollout(kl_coef=None), advantage=advantages.overlong)


@pytest.mark.parametrize("given", [{}, {"kl_coef": 0.25}], ids=["the objective's", "given"])
def test_by_group_subtracts_the_kl_in_the_rewards_from_the_scores(given):
    """As in TRL's RLOO, before the group's baseline."""
    s = rollout(kl_coef=None if given else 0.25)
    kl = (s.logps - s.reference).sum(1).reshape(2, 2)
    estimate = estimators.by_group(s, advantage=advantages.rloo, **given)
    expected = advantages.rloo(SCORES - 0.25 * kl)
    np.testing.assert_allclose(estimate.advantages[:, 0], expected.ravel(), rtol=1e-10)
    assert expected[0, 0] == pytest.approx(-expected[0, 1]) != -2 and not estimate.advantages[3].any()
    penalty = estimate.metrics["objective/non_score_reward"]
    assert penalty == pytest.approx(-0.25 * kl.ravel()[:3].mean())


def test_by_each_normalises_each_reward_alone():
    reward_scores = np.random.default_rng(1).normal(size=(2, 2, 3))
    several = {"reward_scores": reward_scores, "reward_weights": (1.0, 0.5, 2.0), "kl_coef": None}
    estimate = estimators.by_each(rollout(**several))
    expected = advantages.normalised_sum(reward_scores, (1.0, 0.5, 2.0)).ravel()
    np.testing.assert_allclose(estimate.advantages[:3, 0], expected[:3], rtol=1e-12)
    assert not estimate.advantages[3].any()  # it has no score


@pytest.mark.parametrize("estimator", [estimators.by_each, estimators.group_whitened])
def test_an_estimator_without_a_kl_refuses_an_objective_that_leaves_it_to_the_rewards(estimator):
    with pytest.raises(ValueError, match="puts the KL penalty into the rewards, but the estimator"):
        estimator(rollout(kl_coef=0.0))


def test_reinforce_whitens_returns():
    s = rollout()
    estimate = estimators.reinforce(s, kl_coef=0.5)
    np.testing.assert_allclose(estimate.advantages, whitened(returns(s, 0.5)), rtol=1e-10, atol=1e-12)
    kl, metrics = sum((s.logps - s.reference)[i].sum() for i in range(3)), estimate.metrics
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.5 * kl / 3)
    assert metrics["objective/rlhf_reward"] == pytest.approx((6 - 0.5 * kl) / 3)
    assert metrics["objective/scores"] == pytest.approx(2)
    assert metrics["objective/entropy"] == pytest.approx(-s.logps[:3].sum() / 3)


def test_actor_critic_with_lambda_1_is_whitened_return_minus_value():
    """Returns are not whitened, and the KL's coefficient is the objective's."""
    s = rollout()
    estimate, expected = estimators.actor_critic(s, lam=1.0), returns(s, 0.25)
    advantage = whitened([r - s.values[i, : len(r)] for i, r in enumerate(expected)])
    np.testing.assert_allclose(estimate.advantages, advantage, atol=1e-12)
    for row, expected_row in zip(estimate.returns, expected):
        np.testing.assert_allclose(row[: len(expected_row)], expected_row, rtol=1e-10)
    assert not estimate.returns[3].any()


def test_group_whitened_subtracts_the_group_mean_before_whitening():
    estimate = estimators.group_whitened(rollout(kl_coef=None))
    expected = whitened([[-1.0, -1.0], [1.0, 1.0, 1.0], [0.0]])
    np.testing.assert_allclose(estimate.advantages, expected, rtol=1e-10, atol=1e-12)


def test_an_estimator_names_what_a_rollout_lacks():
    with pytest.raises(ValueError, match="needs a critic's values"):
        estimators.actor_critic(rollout(values=None))
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        estimators.reinforce(rollout(reference=None))
