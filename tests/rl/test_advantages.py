"""Advantages and weights against plain loops written from the papers; the laws that scores and weights keep."""

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.rl import advantages as A

NAN = float("nan")
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)  # noqa: E731
RULES = {
    "token_mean": A.token_mean,
    "sequence_mean": A.sequence_mean,
    "prompt_mean": A.prompt_mean,
    "constant_length": lambda lengths, keep: A.constant_length(lengths, keep, most=20),
    "sequence_sum": A.sequence_sum,
}
GROUPS = {
    "centred": A.centred,
    "grpo": A.grpo,
    "grpo_batch": A.grpo_batch,
    "rloo": A.rloo,
    "opo": lambda scores: A.opo(scores, np.broadcast_to(np.arange(scores.shape[1]) % 5 + 1, scores.shape)),
}


def some_scores(seed=0, groups=5, count=4):
    """Fractions, negative ones too; the second group lacks two scores, the third has one, the fourth none, the last is even."""
    scores = np.random.default_rng(seed).normal(0.3, 1.7, (groups, count))
    scores[1, [0, 2]] = scores[2, 1:] = scores[3] = NAN
    scores[4] = 0.1
    return scores


def known(group):
    return [float(x) for x in group if x == x]


def by_hand(scores, one):
    """one(score, all of its group) for every completion that has a score, 0 for the others."""
    return np.array([[one(x, known(group)) if x == x else 0.0 for x in group] for group in scores])


def std(xs):
    return statistics.stdev(xs) if len(xs) > 1 else 0.0


def test_group_advantages_are_their_formulas():
    scores = some_scores()
    mean = statistics.fmean
    flat = known(scores.ravel())
    close(A.centred(scores), by_hand(scores, lambda x, g: x - mean(g)))
    close(A.grpo(scores), by_hand(scores, lambda x, g: (x - mean(g)) / (std(g) + 1e-4)))
    close(A.grpo_batch(scores), by_hand(scores, lambda x, g: (x - mean(g)) / (std(flat) + 1e-4)))
    others = lambda x, g: (sum(g) - x) / (len(g) - 1) if len(g) > 1 else x  # noqa: E731
    close(A.rloo(scores), by_hand(scores, lambda x, g: x - others(x, g)))
    greedy = np.array([0.5, -1.0, NAN, 2.0, 0.25])
    wanted = np.where(np.isnan(scores) | np.isnan(greedy)[:, None], 0, scores - greedy[:, None])
    close(A.remax(scores, greedy), wanted)


def test_opo_weighs_the_baseline_by_length():
    scores, lengths = np.array([[1.0, 0.0, NAN, 0.5]]), np.array([[2, 6, 9, 2]])
    close(A.opo(scores, lengths), [[1 - 0.3, -0.3, 0, 0.2]])  # (2 * 1 + 6 * 0 + 2 * 0.5) / 10


def test_the_leave_one_out_baseline_is_unbiased_and_grpo_without_std_is_its_shrunk_version():
    scores = np.random.default_rng(1).normal(0, 1, (6, 4))
    close(A.rloo(scores), A.centred(scores) * 4 / 3)
    close(A.rloo(scores).sum(1), np.zeros(6))


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_of_equal_scores_has_advantage_zero_to_the_bit(name):
    for value, count in itertools.product((0.1, 1 / 3, -7.3, 1e9, 0.0), (1, 3, 7)):
        scores = np.array([[value] * count, [value] * (count - 1) + [NAN], list(np.arange(count) + 0.5)])
        assert not GROUPS[name](scores)[:2].any()
        assert A.varied(scores)[0].any() == A.varied(scores)[1].any() == False  # noqa: E712
        assert A.varied(scores)[2].all() == (count > 1)


@pytest.mark.parametrize("name", GROUPS)
def test_what_cannot_be_scored_changes_nobodys_advantage(name):
    scores = some_scores(3)
    wide = np.concatenate([scores, np.full((5, 2), NAN)], 1)
    close(GROUPS[name](wide)[:, :4], GROUPS[name](scores))
    assert not GROUPS[name](wide)[:, 4:].any() and np.isfinite(GROUPS[name](wide)).all()


def test_counts_say_what_taught_nothing():
    found = A.counts(some_scores())
    flat = known(some_scores().ravel())
    assert found["frac_unscorable"] == (2 + 3 + 4) / 20
    assert found["frac_reward_zero_std"] == 3 / 5  # one score, none, all even
    close([found["reward"], found["reward_std"]], [statistics.fmean(flat), std(flat)])
    assert A.counts(np.full((2, 2), NAN)) == {"frac_unscorable": 1.0, "frac_reward_zero_std": 1.0}


def test_scores_stay_floating_point():
    """Scores between 0 and 1 truncated to integers would leave no advantage at all."""
    scores = np.array([[0.25, 0.75], [0.1, 0.9]])
    close(A.centred(scores), [[-0.25, 0.25], [-0.4, 0.4]])
    rewards = A.token_rewards(np.zeros((2, 3)), np.array([0.25, -0.6]), np.array([3, 1]), 0.1)
    close(rewards, [[0, 0, 0.25], [-0.6, 0, 0]])
    narrow = A.token_rewards(
        np.zeros((2, 3), np.float32), np.array([0.25, -0.6], np.float32), np.array([3, 1]), 0.1
    )
    np.testing.assert_allclose(narrow, rewards, rtol=1e-7)
    for wrong, words in (
        (np.array([[1, 0]]), "floating point.*found int64"),
        (np.array([[np.inf, 0.0]]), "1 of 2 .* infinite"),
    ):
        for fn in (A.grpo, A.rloo, A.counts, A.scorable):
            with pytest.raises(ValueError, match=words):
                fn(wrong)


# Several rewards, clipping, scaling, penalties


def test_several_rewards_are_summed_and_then_normalised():
    rewards = np.random.default_rng(0).normal(0, 1, (3, 4, 2))
    rewards[0, 1, 0] = rewards[1, 2] = NAN
    scores = A.weighted_sum(rewards, (1.0, 0.5))
    assert (
        np.isnan(scores).sum() == 2 and np.isnan(scores[1, 2]) and np.isnan(scores[0, 1])
    )  # what one can't score has no score
    close(scores[2], rewards[2, :, 0] + 0.5 * rewards[2, :, 1])
    known = A.sum_of_known(rewards, (1.0, 0.5))
    assert np.isnan(known).sum() == 1 and np.isnan(known[1, 2])
    close(known[0, 1], 0.5 * rewards[0, 1, 1])
    close(known[2], scores[2])
    with pytest.raises(ValueError, match="2 rewards need as many weights"):
        A.weighted_sum(rewards, (1.0,))


def test_several_rewards_are_normalised_and_then_summed():
    rewards = np.random.default_rng(2).normal(0, 1, (3, 4, 2))
    rewards[0, 1, 0] = rewards[1, 2] = NAN
    rewards[2, :, 1] = 0.7
    total = np.full((3, 4), NAN)
    for g, i in itertools.product(range(3), range(4)):
        parts = []
        for k, weight in enumerate((1.0, 0.5)):
            column = known(rewards[g, :, k])
            if rewards[g, i, k] == rewards[g, i, k]:
                parts.append(weight * (rewards[g, i, k] - statistics.fmean(column)) / (std(column) + 1e-4))
        total[g, i] = sum(parts) if len(parts) == 2 else NAN
    flat = known(total.ravel())
    wanted = np.nan_to_num((total - statistics.fmean(flat)) / (std(flat) + 1e-4))
    close(A.normalised_sum(rewards, (1.0, 0.5)), wanted)


def test_scores_are_clipped_and_penalised_and_nan_stays():
    scores = np.array([[-9.0, 0.3, NAN, 8.0]])
    np.testing.assert_array_equal(A.clipped(scores, -5, 5), [[-5, 0.3, NAN, 5]])
    np.testing.assert_array_equal(
        A.missing_eos(scores, np.array([[True, False, False, True]]), 1.5), [[-9, -1.2, NAN, 8]]
    )
    np.testing.assert_array_equal(A.overlong(np.array([[3, 6, 8, 10, 12]]), 10, 4), [[0, 0, -0.5, -1, -1]])
    with pytest.raises(ValueError, match="low < high, found 2 and 2"):
        A.clipped(scores, 2, 2)
    with pytest.raises(ValueError, match="soft is in 1 .. 10"):
        A.overlong(np.array([[3]]), 10, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.one_of(st.floats(-50, 50), st.just(NAN)), max_size=5), max_size=5))
def test_running_moments_are_those_of_all_scores_at_once(parts):
    moments = np.zeros(3)
    for part in parts:
        moments = A.seen(moments, np.array([part], float))
    flat = np.array(known(itertools.chain(*parts)))
    assert moments[0] == len(flat)
    if len(flat):
        np.testing.assert_allclose(
            moments[1:], [flat.mean(), np.square(flat - flat.mean()).sum()], rtol=1e-9, atol=1e-9
        )


def test_scaling_divides_by_the_running_deviation():
    first, second = np.array([[1.0, 4.0], [NAN, 2.5]]), np.array([[0.0, 9.0]])
    moments = A.seen(A.seen(np.zeros(3), first), second)
    np.testing.assert_array_equal(np.isnan(A.scaled(first, moments)), np.isnan(first))
    close(A.scaled(second, moments), second / std([1, 4, 2.5, 0, 9]))
    np.testing.assert_array_equal(A.scaled(first, np.zeros(3)), first)
    np.testing.assert_array_equal(A.scaled(first, A.seen(np.zeros(3), np.array([[2.0, 2.0]]))), first)


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
        close(advantages[i, :n], gae_by_hand(rewards[i], values[i], n, gamma, lam))
        close(returns[i, :n], advantages[i, :n] + values[i, :n])
        assert not advantages[i, n:].any() and not returns[i, n:].any()
    far = np.where(A.inside(lengths, 7), 0, NAN)
    for found, wanted in zip(
        A.gae(rewards + far, values + far, lengths, gamma, lam), (advantages, returns), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_gae_without_bootstrapping_is_return_less_value():
    """gamma = lam = 1: what is still to come, less what was expected."""
    rng = np.random.default_rng(4)
    kl, values, lengths = rng.normal(0, 1, (3, 5)), rng.normal(0, 1, (3, 5)), np.array([5, 2, 3])
    rewards = A.token_rewards(kl, np.array([1.5, -0.25, 0.0]), lengths, 0.1)
    advantages, returns = A.gae(rewards, values, lengths, 1.0, 1.0)
    close(A.returns_to_go(rewards, lengths), returns)
    for i, (n, score) in enumerate(zip(lengths, (1.5, -0.25, 0.0), strict=True)):
        close(returns[i, :n], [score - 0.1 * kl[i, t:n].sum() for t in range(n)])
        close(advantages[i, :n], returns[i, :n] - values[i, :n])


def test_token_rewards_give_no_reward_to_what_has_no_score():
    kl = np.ones((3, 4))
    found = A.token_rewards(kl, np.array([NAN, 2.0, 1.0]), np.array([3, 2, 0]), 0.5)
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [-0.5, 1.5, 0, 0], [0, 0, 0, 0]])


def test_discounted_returns_are_their_sum():
    rewards, gamma = np.array([[1.0, 0.0, -2.0, 9.0]]), 0.5
    np.testing.assert_array_equal(A.returns_to_go(rewards, np.array([3]), gamma), [[1 - 0.5, -1, -2, 0]])


def test_whitening_has_mean_zero_and_unbiased_variance_one_over_the_tokens_alone():
    rng = np.random.default_rng(5)
    x, where = rng.normal(3, 2, (4, 6)), A.inside(np.array([6, 2, 0, 5]), 6)
    flat = [float(v) for v in x[where]]
    deviation = (statistics.variance(flat) + 1e-8) ** 0.5
    wanted = np.where(where, (x - statistics.fmean(flat)) / deviation, 0)
    close(A.whiten(x, where), wanted)
    close(A.whiten_around_mean(x, where), np.where(where, wanted + statistics.fmean(flat), 0))
    np.testing.assert_array_equal(A.whiten(np.where(where, x, NAN), where), A.whiten(x, where))
    for few in (np.zeros((4, 6), bool), A.inside(np.array([1, 0, 0, 0]), 6)):
        assert not A.whiten(x, few).any()


def test_reinforce_plus_plus_with_a_groups_baseline_whitens_over_tokens():
    scores, lengths = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[3, 1], [2, 2]])
    found = A.whiten(A.at_tokens(A.centred(scores), lengths, 3), A.inside(lengths.ravel(), 3))
    tokens = [0.5] * 3 + [-0.5] + [0] * 4
    wanted = [
        (x - statistics.fmean(tokens)) / (statistics.variance(tokens) + 1e-8) ** 0.5 for x in (0.5, -0.5, 0)
    ]
    close(found, [[wanted[0]] * 3, [wanted[1], 0, 0], [wanted[2]] * 2 + [0], [wanted[2]] * 2 + [0]])


def test_normalising_over_the_batch_leaves_out_what_has_no_score():
    advantages = np.array([[1.0, -2.0], [NAN, 0.5]])
    flat = [1, -2, 0.5]
    close(
        A.standardised(advantages), np.nan_to_num((advantages - statistics.fmean(flat)) / (std(flat) + 1e-4))
    )
    assert not A.standardised(np.array([[2.0, 2.0]])).any()


# Weights

LENGTHS = np.array([[4, 1, 0], [10, 3, 2], [5, 5, 5]])
KEEP = np.array(
    [[True, True, True], [True, False, True], [False, False, False]]
)  # the empty place is never kept


def test_weight_rules_are_their_formulas():
    close(A.token_mean(LENGTHS, KEEP), np.where(KEEP & (LENGTHS > 0), 1 / 17, 0))
    close(A.sequence_mean(LENGTHS, KEEP), [[1 / 16, 1 / 4, 0], [1 / 40, 0, 1 / 8], [0, 0, 0]])
    close(A.prompt_mean(LENGTHS, KEEP), [[1 / 10, 1 / 10, 0], [1 / 24, 0, 1 / 24], [0, 0, 0]])
    close(A.constant_length(LENGTHS, KEEP, 20), np.where(KEEP & (LENGTHS > 0), 1 / 160, 0))
    close(A.sequence_sum(LENGTHS, KEEP), np.where(KEEP & (LENGTHS > 0), 1 / 4, 0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=5
    )
)
def test_the_weights_of_all_tokens_sum_to_one_or_to_what_the_rule_says(batch):
    lengths, keep = (np.array([[place[i] for place in group] for group in batch]) for i in range(2))
    kept = keep & (lengths > 0)
    sums = {name: float((rule(lengths, keep) * lengths).sum()) for name, rule in RULES.items()}
    if not kept.any():
        assert set(sums.values()) == {0.0}
        return
    for name in ("token_mean", "sequence_mean", "prompt_mean"):
        assert abs(sums[name] - 1) < 1e-12
    assert sums["constant_length"] == pytest.approx(
        (lengths * kept).sum() / (20 * (lengths > 0).sum()), rel=1e-12
    )
    assert sums["sequence_sum"] == pytest.approx(lengths[kept].mean(), rel=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_weights_are_zero_for_what_is_not_kept_and_keep_says_so_of_every_completion(name):
    assert not RULES[name](LENGTHS, KEEP)[~KEEP | (LENGTHS == 0)].any()
    assert not RULES[name](LENGTHS, np.zeros((3, 3), bool)).any()
    with pytest.raises(ValueError, match=r"each completion .* \(3, 3\); found \(3,\)"):
        RULES[name](LENGTHS, KEEP[0])


def test_unscorable_cut_off_and_even_groups_are_left_out_by_one_mask():
    scores = np.array([[1.0, 0.0, NAN], [0.5, 0.5, 0.5]])
    finished = np.array([[True, False, True], [True, True, True]])
    keep = A.scorable(scores) & A.varied(scores) & finished
    np.testing.assert_array_equal(keep, [[True, False, False], [False, False, False]])
    assert A.token_mean(np.full((2, 3), 7), keep).sum() * 7 == pytest.approx(1)


def test_a_completion_longer_than_the_limit_is_refused():
    with pytest.raises(ValueError, match="at most 9 tokens, found 10"):
        A.constant_length(LENGTHS, KEEP, 9)


@pytest.mark.parametrize("wrong", [{"gamma": 1.5}, {"lam": -0.1}, {"lam": NAN}])
def test_discounts_beyond_0_and_1_are_refused(wrong):
    with pytest.raises(ValueError, match=r"gamma and lam are in \[0, 1\]"):
        A.gae(np.ones((1, 2)), np.ones((1, 2)), np.array([2]), **wrong)


def test_a_penalty_that_rewards_a_missing_end_is_refused():
    with pytest.raises(ValueError, match="a penalty for a missing end is from 0 up, found -1"):
        A.missing_eos(np.ones((1, 1)), np.ones((1, 1), bool), -1.0)
