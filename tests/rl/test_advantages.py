"""Advantages against plain loops written from the papers, and the laws of scores."""

import inspect
import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.rl import advantages as A
from jaxft.rl.rollout_metrics import score_metrics

NAN = float("nan")
ADVANTAGES = {
    "centred": A.centred, "grpo": A.grpo, "grpo_batch": A.grpo_batch, "rloo": A.rloo, "opo": A.opo,
    "maxrl": lambda scores, lengths: A.maxrl(scores + 20),
    "gfpo": lambda scores, lengths: A.gfpo(scores, lengths, retain=min(2, max(1, scores.shape[1] - 1))),
}  # fmt: skip


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def advantage(name, scores):
    """The advantages of completions of 1 to 5 tokens."""
    lengths = np.broadcast_to(np.arange(scores.shape[1]) % 5 + 1, scores.shape)
    return ADVANTAGES[name](scores, lengths)


def some_scores(seed=0, groups=5, count=4):
    """Group 2 lacks two scores, group 3 has one, group 4 none, and those of the last are equal."""
    scores = np.random.default_rng(seed).normal(0.3, 1.7, (groups, count))
    scores[1, [0, 2]] = scores[2, 1:] = scores[3] = NAN
    scores[4] = 0.1
    return scores


def valid(group):
    return [float(x) for x in group if x == x]


def by_hand(scores, one):
    """one(score, all scores of its group) for every completion with a score, 0 for the others."""
    return np.array([[one(x, valid(group)) if x == x else 0.0 for x in group] for group in scores])


def unchecked(fn):
    """The function without the run-time check of its annotations, for arguments that they exclude."""
    return inspect.unwrap(fn)


def std(xs):
    return statistics.stdev(xs) if len(xs) > 1 else 0.0


def test_group_advantages_are_their_formulas():
    scores = some_scores()
    mean = statistics.fmean
    flat = valid(scores.ravel())
    assert_close(A.centred(scores), by_hand(scores, lambda x, g: x - mean(g)))
    assert_close(A.grpo(scores), by_hand(scores, lambda x, g: (x - mean(g)) / (std(g) + 1e-4)))
    assert_close(A.grpo_batch(scores), by_hand(scores, lambda x, g: (x - mean(g)) / (std(flat) + 1e-4)))

    def others(x, group):
        return (sum(group) - x) / (len(group) - 1) if len(group) > 1 else x

    assert_close(A.rloo(scores), by_hand(scores, lambda x, g: x - others(x, g)))


def test_opo_weights_the_baseline_by_length():
    scores, lengths = np.array([[1.0, 0.0, NAN, 0.5]]), np.array([[2, 6, 9, 2]])
    assert_close(A.opo(scores, lengths), [[1 - 0.3, -0.3, 0, 0.2]])  # (2 * 1 + 6 * 0 + 2 * 0.5) / 10


def test_maxrl_raises_the_likelihood_of_success():
    """arXiv:2602.02710, Algorithm 1: (1 / K) sum_i r_i S_i - (1 / N) sum_i S_i with K successes among N
    completions and their scores S, and nothing without a success. Its mean over all draws of N Bernoulli(p)
    is the gradient of -sum_(k < N) (1 - p)^k / k: for S_i = d log P(i) / dp and N = 4, at p = 0.3,
    1 + 0.7 + 0.49 = 2.19 (theorem 5 in its appendix D: one order less than without a baseline).
    """
    p, n, total = 0.3, 4, 0.0
    for draw in itertools.product((0.0, 1.0), repeat=n):
        r = np.array(draw)
        score = np.where(r == 1, 1 / p, -1 / (1 - p))
        estimate = (r * score).sum() / max(r.sum(), 1) - score.mean() if r.any() else 0.0
        assert_close((A.maxrl(r[None])[0] * score).mean(), estimate)
        total += estimate * np.prod(np.where(r == 1, p, 1 - p))
    assert total == pytest.approx(2.19, rel=1e-12)
    assert_close(
        A.maxrl(np.array([[1.0, 0.0, NAN, 0.0, 0.0]])), [[3, -1, 0, -1, -1]]
    )  # without a score: no part
    assert_close(A.maxrl(np.array([[0.9, 0.3]])), [[0.5, -0.5]])


def test_maxrl_refuses_negative_scores():
    with pytest.raises(ValueError, match="a score is -0.2. Use rewards of at least 0, without penalties"):
        A.maxrl(np.array([[1.0, -0.2, NAN]]))


def test_gfpo_compares_the_retained_completions_only():
    """arXiv:2508.09726, eq. 2, by hand: of lengths 5 1 3 3 the two shortest are the second and the third;
    their scores 0 and 1 have mean 1/2 and the unbiased deviation 1/sqrt(2); the paper's is 1/2.
    """
    scores, lengths = np.array([[4.0, 0.0, 1.0, 9.0]]), np.array([[5, 1, 3, 3]])
    a = 0.5 / (0.5**0.5 + 1e-4)
    assert_close(A.gfpo(scores, lengths, retain=2), [[0, -a, a, 0]])
    assert_close(A.gfpo(scores, lengths), [[0, -a, a, 0]])  # half of the group
    assert_close(A.gfpo(scores, lengths, 2, advantage=A.centred), [[0, -0.5, 0.5, 0]])
    # Scores of each token: 0.8, 0, 1/3, 3
    assert_close(A.gfpo(scores, lengths, 2, A.token_efficiency, A.centred), [[-2.5, 0, 0, 2.5]])
    unscored = np.array([[4.0, NAN, 1.0, 9.0]])
    assert_close(A.gfpo(unscored, lengths, 2, advantage=A.centred), [[0, 0, -4, 4]])
    for retain in (0, 4, 9):
        with pytest.raises(ValueError, match=f"gfpo: retain={retain} must be 1 to 3 in a group of 4"):
            A.gfpo(scores, lengths, retain)


def test_adaptive_gfpo_retains_more_completions_of_harder_prompts():
    """arXiv:2508.09726: 8, 8, 6 and 4 of 16 from the hardest quarter of prompts to the easiest."""
    means = np.array([0.7, 0.1, 0.4, 0.2, 0.9, 0.3, 0.8, 0.6])  # two prompts in each quarter
    scores = means[:, None] + np.tile([-0.1, 0.1], 8)  # so that each retained completion has an advantage
    lengths = np.random.default_rng(0).permuted(np.tile(np.arange(1, 17), (8, 1)), axis=1)
    found = A.adaptive_gfpo(
        scores, lengths, advantage=lambda scores, lengths: A.centred(scores) + ~np.isnan(scores)
    )
    expected = [6, 8, 8, 8, 4, 8, 4, 6]
    assert (found != 0).sum(1).tolist() == expected
    assert [sorted(row[kept]) for row, kept in zip(lengths, found != 0, strict=True)] == [
        [*range(1, count + 1)] for count in expected
    ]
    same = A.adaptive_gfpo(scores, lengths, (0.5,) * 4)
    assert_close(same, A.gfpo(scores, lengths))
    with pytest.raises(
        ValueError, match="adaptive_gfpo: fractions=.* must be four numbers above 0 and at most 1"
    ):
        A.adaptive_gfpo(scores, lengths, (0.5, 0.5, 0.0, 2.0))


@pytest.mark.parametrize(
    "advantage",
    [A.centred, A.grpo, A.grpo_batch, A.rloo, A.opo, A.maxrl, A.gfpo, A.adaptive_gfpo],
    ids=lambda advantage: advantage.__name__,
)
def test_a_rollout_without_scores_has_advantages_of_0(advantage):
    assert_close(advantage(np.full((2, 4), NAN), np.full((2, 4), 5)), np.zeros((2, 4)))


def test_rloo_is_the_centred_score_times_n_over_n_minus_1():
    scores = np.random.default_rng(1).normal(0, 1, (6, 4))
    assert_close(A.rloo(scores), A.centred(scores) * 4 / 3)
    assert_close(A.rloo(scores).sum(1), np.zeros(6))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_equal_scores_are_exactly_zero(name):
    for value, count in itertools.product((0.1, 1 / 3, -7.3, 1e9, 0.0), (1, 3, 7)):
        scores = np.array([[value] * count, [value] * (count - 1) + [NAN], list(np.arange(count) + 0.5)])
        assert not advantage(name, scores)[:2].any()
        nonconstant = A.nonconstant_groups(scores)
        assert not nonconstant[:2].any() and nonconstant[2].all() == (count > 1)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_completions_without_a_score_do_not_change_other_advantages(name):
    scores = some_scores(3)
    wide = np.concatenate([scores, np.full((5, 2), NAN)], 1)
    assert_close(advantage(name, wide)[:, :4], advantage(name, scores))
    assert not advantage(name, wide)[:, 4:].any() and np.isfinite(advantage(name, wide)).all()


def test_score_metrics_count_groups_without_signal():
    found = score_metrics(some_scores())
    flat = valid(some_scores().ravel())
    assert found["frac_unscorable"] == (2 + 3 + 4) / 20
    assert found["frac_reward_zero_std"] == 3 / 5  # one score, none, all even
    assert_close([found["reward"], found["reward_std"]], [statistics.fmean(flat), std(flat)])
    assert score_metrics(np.full((2, 2), NAN)) == {"frac_unscorable": 1.0, "frac_reward_zero_std": 1.0}


def test_scores_stay_floating_point():
    """Scores between 0 and 1 truncated to integers would leave no advantage at all."""
    scores = np.array([[0.25, 0.75], [0.1, 0.9]])
    assert_close(A.centred(scores), [[-0.25, 0.25], [-0.4, 0.4]])
    rewards = A.token_rewards(np.zeros((2, 3)), np.array([0.25, -0.6]), np.array([3, 1]), 0.1)
    assert_close(rewards, [[0, 0, 0.25], [-0.6, 0, 0]])
    narrow = A.token_rewards(
        np.zeros((2, 3), np.float32), np.array([0.25, -0.6], np.float32), np.array([3, 1]), 0.1
    )
    np.testing.assert_allclose(narrow, rewards, rtol=1e-7)
    for wrong, message in (
        (np.array([[1, 0]]), "scores have dtype int64. Use floats"),
        (np.array([[np.inf, 0.0]]), "1 of 2 scores are infinite"),
    ):
        for fn in (A.grpo, A.rloo, score_metrics, A.has_score):
            with pytest.raises(ValueError, match=message):
                unchecked(fn)(wrong)


# Several rewards, clipping, scaling, penalties


def test_weighted_sum_has_a_score_only_where_every_reward_has():
    rewards = np.random.default_rng(0).normal(0, 1, (3, 4, 2))
    rewards[0, 1, 0] = rewards[1, 2] = NAN
    scores = A.weighted_sum(rewards, (1.0, 0.5))
    assert np.isnan(scores).sum() == 2 and np.isnan(scores[1, 2]) and np.isnan(scores[0, 1])
    assert_close(scores[2], rewards[2, :, 0] + 0.5 * rewards[2, :, 1])
    total = A.sum_of_known(rewards, (1.0, 0.5))
    assert np.isnan(total).sum() == 1 and np.isnan(total[1, 2])
    assert_close(total[0, 1], 0.5 * rewards[0, 1, 1])
    assert_close(total[2], scores[2])
    with pytest.raises(ValueError, match=r"reward_weights=\[1.0\] for 2 reward\(s\)"):
        A.weighted_sum(rewards, (1.0,))


def test_normalised_sum_standardises_the_sum_of_grpo_advantages():
    rewards = np.random.default_rng(2).normal(0, 1, (3, 4, 2))
    rewards[0, 1, 0] = rewards[1, 2] = NAN
    rewards[2, :, 1] = 0.7
    total = np.full((3, 4), NAN)
    for g, i in itertools.product(range(3), range(4)):
        parts = []
        for k, weight in enumerate((1.0, 0.5)):
            column = valid(rewards[g, :, k])
            if rewards[g, i, k] == rewards[g, i, k]:
                parts.append(weight * (rewards[g, i, k] - statistics.fmean(column)) / (std(column) + 1e-4))
        total[g, i] = sum(parts) if len(parts) == 2 else NAN
    flat = valid(total.ravel())
    expected = np.nan_to_num((total - statistics.fmean(flat)) / (std(flat) + 1e-4))
    assert_close(A.normalised_sum(rewards, (1.0, 0.5)), expected)


def test_gdpo_tells_two_rewards_from_one_where_grpo_does_not():
    """Two completions, two rewards (arXiv:2601.05242, figure 2): the better one is better by one reward, or
    by both. GRPO of the sum is +-1/sqrt(2) for both groups; GDPO's sums are +-1/sqrt(2) and +-sqrt(2), whose
    deviation over the batch is sqrt(5/3).
    """
    rewards = np.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    half, root = 0.5**0.5, 2**0.5
    grpo = A.grpo(A.weighted_sum(rewards, (1.0, 1.0)))
    np.testing.assert_allclose(grpo, [[-half, half]] * 2, rtol=2e-4)
    expected = np.array([[-half, half], [-root, root]]) / (5 / 3) ** 0.5
    np.testing.assert_allclose(A.normalised_sum(rewards, (1.0, 1.0)), expected, rtol=3e-4)


def test_clipping_and_penalties_follow_their_formulas_and_keep_nan():
    scores = np.array([[-9.0, 0.3, NAN, 8.0]])
    np.testing.assert_array_equal(A.clip_scores(scores, -5, 5), [[-5, 0.3, NAN, 5]])
    np.testing.assert_array_equal(
        A.missing_eos(scores, np.array([[True, False, False, True]]), 1.5), [[-9, -1.2, NAN, 8]]
    )
    np.testing.assert_array_equal(A.overlong(np.array([[3, 6, 8, 10, 12]]), 10, 4), [[0, 0, -0.5, -1, -1]])
    with pytest.raises(ValueError, match="Use low < high"):
        A.clip_scores(scores, 2, 2)
    with pytest.raises(ValueError, match="overlong must be between 1 and max_new=10 tokens, got 0"):
        A.overlong(np.array([[3]]), 10, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.one_of(st.floats(-50, 50), st.just(NAN)), max_size=5), max_size=5))
def test_running_moments_equal_those_of_all_scores_together(parts):
    moments = np.zeros(3)
    for part in parts:
        moments = A.update_moments(moments, np.array([part], float))
    flat = np.array(valid(itertools.chain(*parts)))
    assert moments[0] == len(flat)
    if len(flat):
        np.testing.assert_allclose(
            moments[1:], [flat.mean(), np.square(flat - flat.mean()).sum()], rtol=1e-9, atol=1e-9
        )


def test_scaling_divides_by_the_running_standard_deviation():
    first, second = np.array([[1.0, 4.0], [NAN, 2.5]]), np.array([[0.0, 9.0]])
    moments = A.update_moments(A.update_moments(np.zeros(3), first), second)
    np.testing.assert_array_equal(np.isnan(A.scale_scores(first, moments)), np.isnan(first))
    assert_close(A.scale_scores(second, moments), second / std([1, 4, 2.5, 0, 9]))
    np.testing.assert_array_equal(A.scale_scores(first, np.zeros(3)), first)
    np.testing.assert_array_equal(
        A.scale_scores(first, A.update_moments(np.zeros(3), np.array([[2.0, 2.0]]))), first
    )


# Tokens


def gae_by_hand(rewards, values, length, gamma, lam):
    """The sum itself, term by term."""
    after = [*values[1:length], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_its_sum_over_ragged_completions(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values, lengths = rng.normal(0, 1, (5, 7)), rng.normal(0, 1, (5, 7)), np.array([7, 1, 4, 0, 6])
    advantages, returns = A.gae(rewards, values, lengths, gamma, lam)
    for i, n in enumerate(lengths):
        assert_close(advantages[i, :n], gae_by_hand(rewards[i], values[i], n, gamma, lam))
        assert_close(returns[i, :n], advantages[i, :n] + values[i, :n])
        assert not advantages[i, n:].any() and not returns[i, n:].any()
    far = np.where(A.token_mask(lengths, 7), 0, NAN)
    for found, expected in zip(
        A.gae(rewards + far, values + far, lengths, gamma, lam), (advantages, returns), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_gae_with_gamma_and_lambda_1_is_return_minus_value():
    rng = np.random.default_rng(4)
    kl, values, lengths = rng.normal(0, 1, (3, 5)), rng.normal(0, 1, (3, 5)), np.array([5, 2, 3])
    rewards = A.token_rewards(kl, np.array([1.5, -0.25, 0.0]), lengths, 0.1)
    advantages, returns = A.gae(rewards, values, lengths, 1.0, 1.0)
    assert_close(A.returns_to_go(rewards, lengths), returns)
    for i, (n, score) in enumerate(zip(lengths, (1.5, -0.25, 0.0), strict=True)):
        assert_close(returns[i, :n], [score - 0.1 * kl[i, t:n].sum() for t in range(n)])
        assert_close(advantages[i, :n], returns[i, :n] - values[i, :n])


def test_completions_without_a_score_have_token_rewards_of_zero():
    kl = np.ones((3, 4))
    found = A.token_rewards(kl, np.array([NAN, 2.0, 1.0]), np.array([3, 2, 0]), 0.5)
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [-0.5, 1.5, 0, 0], [0, 0, 0, 0]])


def test_discounted_returns_are_their_sum():
    rewards, gamma = np.array([[1.0, 0.0, -2.0, 9.0]]), 0.5
    np.testing.assert_array_equal(A.returns_to_go(rewards, np.array([3]), gamma), [[1 - 0.5, -1, -2, 0]])


def test_whitening_has_mean_0_and_unbiased_variance_1_over_the_mask():
    rng = np.random.default_rng(5)
    x, where = rng.normal(3, 2, (4, 6)), A.token_mask(np.array([6, 2, 0, 5]), 6)
    flat = [float(v) for v in x[where]]
    deviation = (statistics.variance(flat) + 1e-8) ** 0.5
    expected = np.where(where, (x - statistics.fmean(flat)) / deviation, 0)
    assert_close(A.whiten(x, where), expected)
    assert_close(A.whiten_around_mean(x, where), np.where(where, expected + statistics.fmean(flat), 0))
    np.testing.assert_array_equal(A.whiten(np.where(where, x, NAN), where), A.whiten(x, where))
    for few in (np.zeros((4, 6), bool), A.token_mask(np.array([1, 0, 0, 0]), 6)):
        assert not A.whiten(x, few).any()


def test_group_whitening_is_over_tokens():
    scores, lengths = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[3, 1], [2, 2]])
    mask = A.token_mask(lengths.ravel(), 3)
    found = A.whiten(np.where(mask, A.centred(scores).reshape(-1, 1), 0), mask)
    tokens = [0.5] * 3 + [-0.5] + [0] * 4
    expected = [
        (x - statistics.fmean(tokens)) / (statistics.variance(tokens) + 1e-8) ** 0.5 for x in (0.5, -0.5, 0)
    ]
    assert_close(
        found, [[expected[0]] * 3, [expected[1], 0, 0], [expected[2]] * 2 + [0], [expected[2]] * 2 + [0]]
    )


def test_standardising_ignores_completions_without_a_score():
    advantages = np.array([[1.0, -2.0], [NAN, 0.5]])
    flat = [1, -2, 0.5]
    assert_close(
        A.standardised(advantages), np.nan_to_num((advantages - statistics.fmean(flat)) / (std(flat) + 1e-4))
    )
    assert not A.standardised(np.array([[2.0, 2.0]])).any()


@pytest.mark.parametrize("wrong", [{"gamma": 1.5}, {"lam": -0.1}, {"lam": NAN}])
def test_gae_refuses_gamma_and_lambda_outside_0_to_1(wrong):
    with pytest.raises(ValueError, match=r"gamma=.* and lam=.* must be in \[0, 1\]"):
        A.gae(np.ones((1, 2)), np.ones((1, 2)), np.array([2]), **wrong)


def test_a_negative_missing_eos_penalty_is_refused():
    with pytest.raises(ValueError, match="missing_eos=-1.0 would reward a missing end token"):
        A.missing_eos(np.ones((1, 1)), np.ones((1, 1), bool), -1.0)


def test_a_group_of_one_without_any_score_is_no_error():
    A.check_advantages(1, np.full((3, 1), NAN), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="data.group=1"):
        A.check_advantages(1, np.array([[1.0], [2.0]]), np.zeros((2, 4)))
