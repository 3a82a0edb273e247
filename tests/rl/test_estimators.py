"""What scores mean for each token, against the sums written out."""

from functools import partial

import numpy as np
import pytest

from jaxft.rl import advantages, estimators
from jaxft.rl.estimators import Sampled

LENGTHS = np.array([[2, 3], [1, 2]])
SCORES = np.array([[1.0, 3.0], [2.0, np.nan]])


def sampled(**changes):
    """Two prompts with two completions each, the last one without a score."""
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
    return Sampled(**{**parts, "aux": {"kl_coef": np.float32(0.25)}, **changes})


def whitened(rows):
    """Rows of numbers, all of them whitened together, as the trained completions' rows [4, 4]."""
    flat = np.concatenate(rows)
    out, at = np.zeros((4, 4)), 0
    for i, row in enumerate(rows):
        out[i, : len(row)] = (flat[at : at + len(row)] - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
        at += len(row)
    return out


def to_go(s, coef):
    """What is still to come of each completion that has a score: its score less the KL of its tokens from here on."""
    rows = []
    for i, count in enumerate(LENGTHS.ravel()[:3]):
        kl = (s.logps - s.reference)[i, :count]
        rows.append(np.array([SCORES.ravel()[i] - coef * kl[t:].sum() for t in range(count)]))
    return rows


def test_every_token_has_its_completions_advantage():
    found = estimators.by_group(sampled(aux={}), advantage=advantages.centred)
    assert (
        found.advantages.tolist() == [[-1, -1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
        and found.returns is None
    )


def test_an_advantage_that_asks_for_lengths_gets_them():
    found = estimators.by_group(sampled(aux={}), advantage=advantages.opo)
    wanted = advantages.opo(SCORES, LENGTHS)
    np.testing.assert_allclose(found.advantages[:, 0], wanted.ravel(), rtol=1e-12)
    assert wanted.any()


@pytest.mark.parametrize("given", [{}, {"kl_coef": 0.25}], ids=["the objective's", "given"])
def test_a_kl_in_the_rewards_of_a_group_is_taken_from_its_scores(given):
    """As in TRL's RLOO, before the group's baseline."""
    s = sampled(aux={} if given else {"kl_coef": np.float32(0.25)})
    kl = (s.logps - s.reference).sum(1).reshape(2, 2)
    found = estimators.by_group(s, advantage=advantages.rloo, **given)
    wanted = advantages.rloo(SCORES - 0.25 * kl)
    np.testing.assert_allclose(found.advantages[:, 0], wanted.ravel(), rtol=1e-10)
    assert wanted[0, 0] == pytest.approx(-wanted[0, 1]) != -2 and not found.advantages[3].any()
    assert found.told["objective/non_score_reward"] == pytest.approx(-0.25 * kl.ravel()[:3].mean())


def test_which_estimates_need_several_completions_of_a_prompt():
    of = lambda fn: partial(estimators.by_group, advantage=fn)  # noqa: E731
    assert all(
        map(
            estimators.needs_a_group,
            (estimators.by_group, estimators.by_each, of(advantages.rloo), of(advantages.grpo)),
        )
    )
    free = (
        estimators.actor_critic,
        partial(estimators.reinforce, kl_coef=0.1),
        of(lambda scores: scores - 0.5),
    )
    assert not any(map(estimators.needs_a_group, free))


def test_each_reward_is_normalised_alone():
    each = np.random.default_rng(1).normal(size=(2, 2, 3))
    found = estimators.by_each(sampled(each=each, weights=(1.0, 0.5, 2.0)))
    wanted = advantages.normalised_sum(each, (1.0, 0.5, 2.0)).ravel()
    np.testing.assert_allclose(found.advantages[:3, 0], wanted[:3], rtol=1e-12)
    assert not found.advantages[3].any()  # it has no score
    with pytest.raises(ValueError, match="needs the scores of each reward"):
        estimators.by_each(sampled())


def test_reinforce_whitens_what_is_to_come():
    s = sampled()
    found = estimators.reinforce(s, kl_coef=0.5)
    np.testing.assert_allclose(found.advantages, whitened(to_go(s, 0.5)), rtol=1e-10, atol=1e-12)
    kl = sum((s.logps - s.reference)[i].sum() for i in range(3))
    assert found.told["objective/non_score_reward"] == pytest.approx(-0.5 * kl / 3)
    assert found.told["objective/rlhf_reward"] == pytest.approx((6 - 0.5 * kl) / 3)
    assert found.told["objective/scores"] == pytest.approx(2)
    assert found.told["objective/entropy"] == pytest.approx(-s.logps[:3].sum() / 3)


def test_a_critics_advantage_without_bootstrapping_is_what_is_to_come_less_its_value():
    """And returns stay returns, though the advantages are whitened; the coefficient is the controller's."""
    s = sampled()
    found, goal = estimators.actor_critic(s, kl_coef=None, lam=1.0), to_go(s, 0.25)
    np.testing.assert_allclose(
        found.advantages, whitened([g - s.values[i, : len(g)] for i, g in enumerate(goal)]), atol=1e-12
    )
    for row, wanted in zip(found.returns, goal):
        np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=1e-10)
    assert not found.returns[3].any()


def test_a_groups_baseline_is_taken_before_whitening():
    wanted = whitened([[-1.0, -1.0], [1.0, 1.0, 1.0], [0.0]])
    np.testing.assert_allclose(
        estimators.group_whitened(sampled()).advantages, wanted, rtol=1e-10, atol=1e-12
    )


def test_what_an_estimate_lacks_is_told():
    with pytest.raises(ValueError, match="needs a critic's values"):
        estimators.actor_critic(sampled(values=None))
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        estimators.reinforce(sampled(reference=None))
