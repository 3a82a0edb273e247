"""Reward functions: what is a score, what isn't and is counted, and the verifiable ones that ship."""

import math
import sys
from decimal import Decimal
from fractions import Fraction
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.rl import rewards
from jaxft.rl.completions import Rules, bounded


@pytest.mark.parametrize(
    ("gives", "kind", "words"),
    [
        (lambda p, c, r: 1 / 0, "raised", "raised ZeroDivisionError"),
        (lambda p, c, r: r["nothing"], "raised", "raised KeyError"),
        (lambda p, c, r: None, "not_a_number", "gave NoneType None"),
        (lambda p, c, r: "0.5", "not_a_number", "gave str '0.5'"),
        (lambda p, c, r: math.nan, "not_a_number", "gave float nan"),
        (lambda p, c, r: [1.0], "not_a_number", "gave list [1.0]"),
        (lambda p, c, r: np.array("a"), "not_a_number", "gave ndarray"),
        (lambda p, c, r: np.array(None), "not_a_number", "gave ndarray"),
        (lambda p, c, r: np.ones(1), "not_a_number", "gave ndarray"),
        (lambda p, c, r: 10**400, "not_a_number", "gave int 1000"),
        (lambda p, c, r: np.complex64(1 + 2j), "not_a_number", "gave complex64"),
    ],
)
def test_what_is_no_score_is_counted_and_never_zero(gives, kind, words):
    good = lambda prompt, completion, row: 0.25  # noqa: E731
    scores, faults = rewards.scored([good, gives], ["q"] * 2, ["a", "b"], [("rows:1", {}), ("rows:2", {})])
    np.testing.assert_array_equal(scores, [[0.25, np.nan]] * 2)
    assert faults.counts[kind] == 2 and words in faults.first and "rows:1" in faults.first


def test_two_rewards_of_one_name_are_told_apart():
    one, other = (partial(rewards.matches, pattern=p) for p in ("a", "b"))
    assert rewards.names_of([one, rewards.number, other, one]) == [
        "matches",
        "number",
        "matches_2",
        "matches_3",
    ]


@pytest.mark.parametrize(
    "value", [jnp.float32(0.5), Decimal("0.5"), Fraction(1, 2), np.float16(0.5), np.array(0.5)]
)
def test_what_has_a_real_value_is_a_score(value):
    scores, faults = rewards.scored([lambda p, c, r: value], [""], [""], [("", {})])
    assert scores[0, 0] == 0.5 and not any(faults.counts.values())


def test_scores_stay_floating_point():
    scores, _ = rewards.scored(
        [lambda p, c, r: np.float32(0.3), lambda p, c, r: True], [""], [""], [("", {})]
    )
    assert scores.dtype == np.float64 and scores[0].tolist() == [float(np.float32(0.3)), 1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("it is 1,234.", 1234, 1),
        ("3 + 4 = 7", "so #### 7", 1),
        ("7 or 8", 7, 0),
        ("none", 7, 0),
        ("-2", -2, 1),
        ("1.50", 1.5, 1),
        ("10-7", 7, 1),
        ("1,2", 2, 1),
        ("(1,2)", 12, 0),
        ("x=-3", -3, 1),
        ("-.5", -0.5, 1),
        ("1,234,567.5", 1234567.5, 1),
    ],  # fmt: skip
)
def test_number_compares_the_last_one(completion, answer, score):
    assert rewards.number("", completion, {"answer": answer}) == score


@pytest.mark.parametrize(("completion", "score"), [(" Paris\n", 1), ("paris", 1), ("Paris.", 0), ("", 0)])
def test_exact_forgives_white_space_and_case_only(completion, score):
    assert rewards.exact("", completion, {"answer": "Paris"}) == score


@pytest.mark.parametrize(
    ("completion", "score"), [("<a>7</a>", 1), (" <a>1\n2</a> ", 1), ("so <a>7</a>", 0), ("", 0)]
)
def test_matches_wants_the_whole_completion(completion, score):
    assert rewards.matches("", completion, {}, pattern="<a>.*</a>") == score


def test_an_answer_without_a_number_is_the_rows_fault():
    _, faults = rewards.scored([rewards.number], ["q"], ["7"], [("rows:3", {"answer": "seven"})])
    assert (
        faults.counts["raised"] == 1 and "column 'answer' holds no number: 'seven' (rows:3)" in faults.first
    )


def test_scores_are_bounded_before_a_missing_end_is_fined():
    scores, ended = np.array([[9.0, -0.5, np.nan]]), np.array([[True, False, False]])
    np.testing.assert_array_equal(
        bounded(scores, np.ones((1, 3)), ended, missing_eos=1.0, limit=2.0), [[2.0, -1.5, np.nan]]
    )


def test_a_reward_must_be_given():
    with pytest.raises(ValueError, match="needs a reward"):
        Rules(())
    with pytest.raises(ValueError, match="2 rewards .number, exact. need as many weights, found 1"):
        Rules((rewards.number, rewards.exact), weights=(1.0,))


def test_a_reward_may_change_what_it_is_given():
    def greedy(prompt, completion, row):
        prompt.append("mine")
        row["list"].append(1)
        return len(prompt) + len(row["list"])

    prompt, fields = ["yours"], {"list": []}
    found, faults = rewards.scored([greedy], [prompt] * 3, ["a"] * 3, [("row", fields)] * 3)
    assert (
        found.ravel().tolist() == [3, 3, 3]
        and prompt == ["yours"]
        and fields == {"list": []}
        and not faults.first
    )


class Unspeakable:
    """A value whose own words fail."""

    def __repr__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("value", [10**5000, Unspeakable()], ids=["too long a number", "no words"])
def test_what_cant_be_told_is_counted_too(value):
    found, faults = rewards.scored([lambda *_: value], ["a"], ["b"], [("row:1", {})])
    assert (
        np.isnan(found).all()
        and faults.counts["not_a_number"] == 1
        and "wanted a finite number (row:1)" in faults.first
    )


def test_a_reward_that_exits_is_a_fault():
    found, faults = rewards.scored([lambda *_: sys.exit(3)], ["a"], ["b"], [("row:1", {})])
    assert np.isnan(found).all() and faults.first.startswith("reward <lambda> raised SystemExit: 3")
