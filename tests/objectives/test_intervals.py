"""Intervals and tests equal SciPy's or worked examples, and cover as often as they say."""

import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from jaxft.objectives.intervals import (
    fraction_text,
    interval_of,
    mean_interval,
    paired,
    paired_fractions,
    paired_means,
    sign_test,
    wilson,
)
from jaxft.rl.rollout_metrics import prompt_counts
from jaxft.runs.console import ConsoleView
from jaxft.runs.run_texts import headlines, metric_cell

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("wins", "count"), [(0, 1), (11, 20), (20, 20), (53, 106), (999, 1000)])
def test_the_interval_of_a_fraction_is_wilsons(wins, count):
    expected = stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert wilson(wins / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_fraction_outside_of_0_to_1_or_of_nothing_is_refused():
    for fraction, count in ((1.1, 5), (-0.1, 5), (0.5, 0)):
        with pytest.raises(ValueError, match="wilson needs a fraction"):
            wilson(fraction, count)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (6, 0), (4, 9), (700, 800)])
def test_the_sign_test_is_the_binomial_test_of_one_half(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_a_mean_is_students_and_a_constant_weight_changes_nothing():
    x = RNG.normal(1, 2, 7)
    expected = stats.ttest_1samp(x, 0).confidence_interval()
    assert mean_interval(x) == pytest.approx((expected.low, expected.high))
    assert mean_interval(x, [3.0] * 7) == pytest.approx(mean_interval(x))
    assert mean_interval([2.0]) == (-math.inf, math.inf)


def test_the_interval_of_a_weighted_mean_is_near_the_bootstraps():
    w = RNG.integers(1, 40, 400).astype(float)
    x = RNG.normal(2 + w / 40, 1)
    found = stats.bootstrap(
        (x, w), lambda x, w, axis: (x * w).sum(axis) / w.sum(axis), paired=True, rng=np.random.default_rng(1)
    ).confidence_interval
    assert mean_interval(x, w) == pytest.approx((found.low, found.high), abs=0.02)


def test_paired_means_are_the_paired_t_test():
    one, other = RNG.normal(size=(2, 12))
    found, expected = paired_means(one, other), stats.ttest_rel(other, one).confidence_interval()
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx(other.mean() - one.mean()) and found.rows == 12


def test_one_pair_of_twenty_is_not_distinguishable_and_fifteen_are():
    one = [1.0] * 10 + [0.0] * 10
    for more, distinguishable in ((1, False), (4, False), (6, True), (10, True)):
        other = [1.0] * (10 + more) + [0.0] * (10 - more)
        found = paired_fractions(one, other)
        assert found.difference == pytest.approx(more / 20) and found.interval.has(more / 20)
        assert found.distinguishable == distinguishable == (not found.interval.has(0))
        assert ("not distinguishable with 20 pairs" in found.text("pairs")) != distinguishable
    assert paired_fractions(one, one).p == 1 and paired_fractions(one, one).interval.has(0)


def test_agresti_and_mins_interval_is_that_of_their_formula():
    """b = 8 and c = 3 discordant of n = 50: (b' - c') / n' with b' = 8.5, c' = 3.5, n' = 52, and the standard
    error sqrt(b' + c' - (b' - c')^2 / n') / n'.
    """
    one = [0.0] * 8 + [1.0] * 3 + [1.0] * 39
    other = [1.0] * 8 + [0.0] * 3 + [1.0] * 39
    error = math.sqrt(12 - 25 / 52) / 52
    found = paired_fractions(one, other).interval
    assert found == pytest.approx((5 / 52 - 1.96 * error, 5 / 52 + 1.96 * error), abs=1e-5)


def test_the_paired_interval_covers_the_difference_in_95_percent_of_samples():
    truth, hits = 0.1, 0
    for _ in range(2000):
        drawn = RNG.choice(3, 40, p=[0.25, 0.15, 0.6])  # right by the second, by the first, by both alike
        hits += paired_fractions((drawn == 1).astype(float), (drawn == 0).astype(float)).interval.has(truth)
    assert 0.93 < hits / 2000 < 0.98


def test_models_without_a_row_that_both_have_a_value_for_are_not_distinguishable():
    none = paired([math.nan, 1.0], [0.0, math.nan])
    assert none.rows == 0 and not none.distinguishable and "with 0 rows" in none.text()
    assert all(map(math.isnan, interval_of([math.nan])))


def test_a_tie_counts_half():
    found = paired_fractions([0.5, 0.5, 1.0], [1.0, 0.5, 0.0])
    assert found.difference == pytest.approx(-0.5 / 3) and found.p == 1


def test_a_fraction_is_shown_with_its_interval_and_number():
    assert fraction_text(0.55, 20) == "0.55 [0.34, 0.74] of 20 pairs" and fraction_text(0.55, None) == "0.55"


def test_rewards_of_0_and_1_have_the_number_of_their_prompts_and_an_interval(capsys):
    nan = math.nan
    exact = np.array([[1.0, 0.0], [1.0, nan], [0.0, 0.0], [nan, nan]])  # four prompts, two completions each
    length = np.array([[0.3, 1.0], [0.0, 1.0], [1.0, 1.0], [0.2, 0.1]])
    rewards = np.stack([exact, length], -1)
    counts = prompt_counts(("exact", "length"), exact, rewards)
    assert counts == {"reward_prompts": 3.0, "rewards/exact/mean_prompts": 3.0}
    assert prompt_counts(("exact", "length"), exact + length, rewards) == {"rewards/exact/mean_prompts": 3.0}
    assert prompt_counts(("exact",), np.full((2, 1), nan), np.full((2, 1, 1), nan)) == {}
    metrics = {"eval_reward": 0.4, "eval_reward_prompts": 20.0}
    expected = stats.binomtest(8, 20).proportion_ci(method="wilson")
    interval = f"[{expected.low:.3f}, {expected.high:.3f}]"
    assert metric_cell({"metrics": metrics}, "eval_reward") == f"0.4000 {interval} of 20 prompts"
    assert list(headlines({"metrics": metrics})) == ["eval_reward"]
    view = ConsoleView("r", 5, console=Console(width=200))
    view.log(5, metrics, {})
    out = capsys.readouterr().out
    assert "eval_reward 0.40 [0.22, 0.61] of 20 prompts" in out and "reward_prompts" not in out
