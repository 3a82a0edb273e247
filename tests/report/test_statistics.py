"""Paired comparisons of simulated studies whose truth is planted."""

import math

import numpy as np
import pytest

from jaxft.objectives.intervals import Interval
from jaxft.report import statistics
from jaxft.report.statistics import (
    Adjusted,
    Components,
    components,
    equivalence,
    holm,
    needed,
    paired_difference,
    power,
)

SEEDS, PROMPTS = 3, 60


def study(key, gap=0.0, spread=(0.0, 0.3, 0.5), shared=2.0, shape=(SEEDS, PROMPTS)):
    """Values [S, P] of two losses. spread: standard deviations of their difference over seeds, prompts and
    the rest; shared: of what both have in common, per prompt.
    """
    random = np.random.default_rng(key)
    common = shared * random.normal(size=(1, shape[1]))
    d = sum(
        s * random.normal(size=size)
        for s, size in zip(spread, ((shape[0], 1), (1, shape[1]), shape), strict=True)
    )
    return common + np.zeros(shape), common + gap + d


@pytest.mark.parametrize(
    "spread", [(0.0, 0.3, 0.5), (0.2, 0.3, 0.5), (0.3, 0.0, 0.2), (0.0, 0.0, 1.0)], ids=str
)
def test_at_most_one_in_twenty_duels_of_a_loss_with_itself_is_called_different(spread):
    found = [paired_difference(*study(key, spread=spread)).different() for key in range(200)]
    assert sum(found) <= 10


def test_duels_of_accuracies_are_called_different_no_more_often():
    """Both losses have the same chance of each prompt, but other luck."""

    def duel(key):
        random = np.random.default_rng(key)
        chance = random.beta(2, 1, size=(1, PROMPTS))
        return paired_difference(*(1.0 * (random.random((SEEDS, PROMPTS)) < chance) for _ in "ab"))

    assert sum(duel(key).different() for key in range(200)) <= 10


def test_a_gap_of_one_standard_error_is_found_as_often_as_its_power(monkeypatch):
    spread = (0.0, 0.4, 0.0)  # the prompts alone: the test is then Student's with P - 1 degrees of freedom
    error = Components(0.0, 0.4**2, 0.0).error(SEEDS, PROMPTS)
    monkeypatch.setattr(
        statistics, "bootstrap", lambda d, key: Interval(1.0, 2.0)
    )  # it takes most of the time
    found = [paired_difference(*study(key, error, spread)).different() for key in range(2000)]
    assert np.mean(found) == pytest.approx(power(error, error, PROMPTS - 1), abs=0.02)


def test_power_is_the_level_without_a_gap_and_grows_to_one():
    assert power(0, 1, 10) == pytest.approx(0.05, abs=1e-9)
    assert power(1, 1, 1e6) == pytest.approx(0.1700, abs=1e-3)  # P(|Z + 1| > 1.96), from a table of Z
    assert power(9, 1, 10) > 0.999


def test_common_seeds_and_prompts_at_least_halve_the_error():
    d = paired_difference(*study(1))
    assert d.error <= 0.5 * d.unpaired_error


def test_the_parts_of_the_variance_are_those_that_were_planted():
    spread = (0.5, 0.8, 1.0)
    found = np.mean(
        [components(np.subtract(*study(key, spread=spread, shape=(6, 40))[::-1])) for key in range(400)], 0
    )
    assert found == pytest.approx([0.25, 0.64, 1.0], rel=0.1)


def test_the_interval_covers_a_planted_gap():
    ends = [paired_difference(*study(key, 0.2, (0.2, 0.3, 0.5))).interval for key in range(200)]
    assert sum(one.has(0.2) for one in ends) >= 188


def test_one_seed_is_compared_by_students_test_of_its_prompts():
    a, b = study(3, 0.1, shape=(1, 5))
    x = (b - a)[0]
    d = paired_difference(a, b)
    assert d.error == pytest.approx(x.std(ddof=1) / math.sqrt(5))
    t = 2.776445105  # 97.5 % of Student's distribution with 4 degrees of freedom, from a table
    assert d.interval.high - d.mean == pytest.approx(t * d.error)


def test_holm_multiplies_the_smallest_by_the_number_of_comparisons():
    assert holm([0.02, 0.01, 0.9]) == pytest.approx([0.04, 0.03, 0.9])
    assert holm([]) == []


def test_a_small_difference_of_many_prompts_is_equivalent_and_not_different():
    d = paired_difference(*study(0, 0.0, (0.0, 0.1, 0.1), shape=(3, 2000)))
    assert d.verdict(margin=0.05) == "equivalent within 0.05"
    assert equivalence(d, 0.05) < 1e-6 < 0.5 < equivalence(paired_difference(*study(0, 0.2)), 0.05)


def test_no_difference_at_all_is_none():
    d = paired_difference(*study(0, spread=(0, 0, 0)))
    assert (d.mean, d.p, d.effect, d.wins, d.interval) == (0, 1, 0, 0.5, (0, 0))
    assert not d.different()
    assert "no feasible number" in d.verdict()


def test_as_many_prompts_as_are_said_to_be_needed_have_the_power():
    parts, gap = Components(0.0, 0.09, 0.25), 0.05
    prompts, seeds = needed(parts, gap, 3, PROMPTS)
    assert power(gap, parts.error(3, prompts), 1e6) == pytest.approx(0.8, abs=0.01)
    assert seeds is None  # the prompts alone leave an error above the gap
    assert (gap / 2.8) ** 2 < 0.09 / PROMPTS


def test_the_verdict_names_what_would_be_needed():
    text = paired_difference(*study(4, 0.02)).verdict()
    assert text.startswith("not distinguishable; about ") and " more prompts" in text
    one_seed = paired_difference(*study(4, 0.02, shape=(1, 20))).verdict()
    assert "at least 2 more seeds" in one_seed


def test_few_prompts_that_all_agree_are_neither_different_nor_equivalent():
    """A fair coin falls on the same side five times with probability 2 / 2^5, above 5 %; six times below."""
    for prompts, p in ((2, 1 / 2), (5, 1 / 16), (6, 1 / 32)):
        d = paired_difference(np.zeros((3, prompts)), np.ones((3, prompts)))
        assert d.p == p and d.different() == (prompts == 6)
    assert (
        paired_difference(np.zeros((3, 2)), np.ones((3, 2)))
        .verdict()
        .startswith("not distinguishable; about 4 more prompts")
    )
    same = paired_difference(np.ones((3, 36)), np.ones((3, 36)))
    assert equivalence(same, 0.05) == pytest.approx(0.95**36) and same.verdict(margin=0.05).endswith(
        "no prompts differ; about 23 more prompts would be needed to call them equivalent within 0.05"
    )
    assert 0.95 ** (36 + 23) < 0.05 < 0.95 ** (36 + 22)


def test_a_difference_that_is_missed_by_its_degrees_of_freedom_or_by_holm_needs_more_seeds_or_prompts():
    """Three seeds of means 0.03, 0.05, 0.07: t = 4.33 with 2 degrees of freedom, p = 0.049; adjusted 0.2."""
    d = paired_difference(np.zeros((3, 40)), np.repeat([[0.03], [0.05], [0.07]], 40, 1))
    assert d.p == pytest.approx(0.0494, abs=1e-4)
    text = d.verdict(Adjusted(4 * d.p))
    more = int(text.split("about ")[1].split()[0])
    error = 0.02 / math.sqrt(3 + more)
    assert (
        text == f"not distinguishable; about {more} more seeds would be needed to find a difference of 0.05"
    )
    assert (
        power(0.05, error, 3 + more - 1, 0.05 / 4)
        >= 0.8
        > power(0.05, 0.02 / math.sqrt(2 + more), 1 + more, 0.05 / 4)
    )
    x = np.tile([0.0, 2.0], 20)[None] + 1.9  # one seed: t = 1.9 * sqrt(40) / 1.01 without an end
    for comparisons in (2, 10**30):
        one = paired_difference(np.zeros((1, 40)), x)
        found = one.verdict(Adjusted(min(1.0, comparisons * one.p)))
        assert found == "different" if comparisons == 2 else "more prompts" in found


def test_where_neither_prompts_nor_seeds_suffice_alone_both_together_do():
    """A gap of half the spread of three seeds and of half of that of the prompts: either alone leaves the
    other's error.
    """
    random = np.random.default_rng(0)
    by_seed, by_prompt = random.normal(size=(3, 1)), random.normal(size=(1, 6))
    d = (by_seed - by_seed.mean()) / by_seed.std(ddof=1) + (by_prompt - by_prompt.mean()) / by_prompt.std(
        ddof=1
    )
    found = paired_difference(np.zeros((3, 6)), d + 0.3)
    assert needed(found.components, 0.3, 3, 6) == (None, None)
    text = found.verdict()
    seeds, prompts = (int(text.split(f" more {unit}")[0].split()[-1]) for unit in ("seeds", "prompts"))
    assert prompts == 2 * seeds  # six prompts for three seeds
    error = math.sqrt(1 / (3 + seeds) + 1 / (6 + prompts))  # of variances 1
    assert 2.8 * error == pytest.approx(0.3, rel=0.1)


def test_prompts_without_a_value_are_left_out_and_too_few_are_refused():
    a, b = study(0)
    b[1, 5] = np.nan
    assert paired_difference(a, b).prompts == PROMPTS - 1
    with pytest.raises(ValueError, match="1 prompts have values of both settings"):
        paired_difference(a[:, :1], b[:, :1])
