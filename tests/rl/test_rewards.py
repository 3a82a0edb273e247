"""Reward functions: scores, faults, rules, and the functions that check an answer."""

import asyncio
import json
import math
import re
import sys
import time
from decimal import Decimal
from fractions import Fraction
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.data.rows.example import Completion
from jaxft.rl import advantages, rewards
from jaxft.rl.rewards import Faults, FunctionReward
from jaxft.rl.rollout_rules import Rules, shape_scores
from jaxft.rl.trajectory import Trajectory


def call(fn, prompts=("q",), completions=("a",), rows=(("row:1", {}),)):
    """The scores of completions by one function, and the faults."""
    return rewards.call_reward(FunctionReward(fn), prompts, completions, rows)[:2]


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        (lambda p, c, r: 1 / 0, "raised", "raised ZeroDivisionError"),
        (lambda p, c, r: r["nothing"], "raised", "raised KeyError"),
        (lambda p, c, r: None, "not_a_number", "returned NoneType None"),
        (lambda p, c, r: "0.5", "not_a_number", "returned str '0.5'"),
        (lambda p, c, r: math.nan, "not_a_number", "returned float nan"),
        (lambda p, c, r: [1.0], "not_a_number", "returned list [1.0]"),
        (lambda p, c, r: [[1], [2, 3]], "not_a_number", "returned list [[1], [2, 3]]"),
        (lambda p, c, r: np.array("a"), "not_a_number", "returned ndarray"),
        (lambda p, c, r: np.array(None), "not_a_number", "returned ndarray"),
        (lambda p, c, r: np.ones(1), "not_a_number", "returned ndarray"),
        (lambda p, c, r: 10**400, "not_a_number", "returned int 1000"),
        (lambda p, c, r: np.complex64(1 + 2j), "not_a_number", "returned complex64"),
    ],
)
def test_no_finite_number_is_a_fault_and_never_zero(returned, kind, message):
    scores, faults = call(returned, ["q"] * 2, ["a", "b"], [("rows:1", {}), ("rows:2", {})])
    assert np.isnan(scores).all()
    assert faults.raised + faults.not_a_number == 2
    assert (faults.raised == 2) == (kind == "raised")
    assert message in faults.first and "rows:1" in faults.first


def test_faults_add_and_keep_the_first_message():
    total = Faults(raised=1, first="a") + Faults(not_a_number=2, first="b")
    assert total == Faults(1, 2, "a") == Faults() + total


def test_names_of_rewards_are_unique():
    a, b = (FunctionReward(partial(rewards.matches, pattern=p)) for p in ("a", "b"))
    names = rewards.unique_names([a, FunctionReward(rewards.number), b, a])
    assert names == ["matches", "number", "matches_2", "matches_3"]


@pytest.mark.parametrize(
    "value", [jnp.float32(0.5), Decimal("0.5"), Fraction(1, 2), np.float16(0.5), np.array(0.5)]
)
def test_every_real_number_is_a_score(value):
    scores, faults = call(lambda p, c, r: value)
    assert scores[0] == 0.5 and faults == Faults()


def test_scores_stay_floating_point():
    for value, score in ((np.float32(0.3), float(np.float32(0.3))), (True, 1.0)):
        scores, _ = call(lambda p, c, r, value=value: value)
        assert scores.dtype == np.float64 and scores[0] == score


def test_scores_of_a_reward_model_are_checked():
    rows = [f"rows:{i}" for i in range(3)]
    scores, faults, _ = rewards.check_scores(np.array([1.0, np.nan, np.inf]), "judge", rows)
    assert scores[0] == 1 and np.isnan(scores[1:]).all()
    assert faults.not_a_number == 2 and "rows:1" in faults.first


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
def test_number_compares_the_last_numbers(completion, answer, score):
    assert rewards.number("", completion, {"answer": answer}) == score


@pytest.mark.parametrize(("completion", "score"), [(" Paris\n", 1), ("paris", 1), ("Paris.", 0), ("", 0)])
def test_exact_ignores_white_space_and_case_only(completion, score):
    assert rewards.exact("", completion, {"answer": "Paris"}) == score


@pytest.mark.parametrize(
    ("completion", "score"), [("<a>7</a>", 1), (" <a>1\n2</a> ", 1), ("so <a>7</a>", 0), ("", 0)]
)
def test_matches_requires_the_full_completion(completion, score):
    assert rewards.matches("", completion, {}, pattern="<a>.*</a>") == score


ANSWER = '{"type": "order", "count": 3, "paid": true, "note": null, "tags": ["a", "b"]}'


@pytest.mark.parametrize(
    "completion, score",
    [
        (ANSWER, 1.0),
        ('{"tags":["a","b"],"note":null,\n"paid":true,"count":3.0,"type":"order"}', 1.0),
        (ANSWER.replace("true", "1"), 0.0),
        (ANSWER.replace("3", "true"), 0.0),
        (ANSWER.replace("3", '"3"'), 0.0),
        (ANSWER.replace("3", "4"), 0.0),
        (ANSWER.replace("null", '""'), 0.0),
        (ANSWER.replace('"a", "b"', '"b", "a"'), 0.0),
        (ANSWER.replace(', "note": null', ""), 0.0),
        (ANSWER.replace("}", ', "note": null}'), 0.0),
        (ANSWER.replace("}", ', "more": 1}'), 0.0),
        (f"Sure! {ANSWER}", 0.0),
        (f"```json\n{ANSWER}\n```", 0.0),
        (ANSWER[:-1], 0.0),
        (ANSWER.replace("3", "NaN"), 0.0),
        (ANSWER.replace("3", "1e99999999999999999999"), 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
    ids=range(18),
)
def test_json_match_compares_the_values_of_the_whole_completion(completion, score):
    assert rewards.json_match("p", completion, {"answer": ANSWER}) == score
    assert rewards.json_match("p", completion, {"gold": json.loads(ANSWER)}, column="gold") == score


def test_an_answer_that_is_no_json_is_a_fault_of_the_row():
    with pytest.raises(ValueError, match="column 'answer' is not JSON .*: 'three'"):
        rewards.json_match("p", "3", {"answer": "three"})


def test_an_answer_without_a_number_is_a_fault_of_the_row():
    _, faults = call(rewards.number, ["q"], ["7"], [("rows:3", {"answer": "seven"})])
    problem = "column 'answer' has no number: 'seven'; correct the row, or set another column (rows:3)"
    assert faults.raised == 1 and problem in faults.first


def test_scores_are_clipped_before_missing_eos_is_subtracted():
    scores, ended = np.array([[9.0, -0.5, np.nan]]), np.array([[True, False, False]])
    shaped = shape_scores(scores, np.ones((1, 3), int), ended, missing_eos=1.0, limit=2.0)
    np.testing.assert_array_equal(shaped, [[2.0, -1.5, np.nan]])


def test_rules_need_a_reward_and_one_weight_for_each():
    with pytest.raises(ValueError, match="needs a reward"):
        Rules(())
    with pytest.raises(ValueError, match=r"reward_weights=\[.*\] for the rewards number, exact. Set one"):
        Rules((rewards.number, rewards.exact), reward_weights=(1.0,))
    with pytest.raises(ValueError, match="neither a function of .prompt, completion, row. nor a Reward"):
        Rules(("exact",))


def test_rules_wrap_plain_functions_once():
    rules = Rules((rewards.number, FunctionReward(rewards.exact)))
    assert rules.rewards == (FunctionReward(rewards.number), FunctionReward(rewards.exact))
    assert rules.reward_weights == (1.0, 1.0)
    assert all(r.fingerprint() is None and r.resident(None) == {} for r in rules.rewards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_weights": advantages.centred}, "token_weights=centred can't be called with (lengths, mask"),
        ({"filter": advantages.opo}, "filter=opo can't be called with (scores)"),
        ({"reward_weights": (math.nan,)}, "reward_weights=nan; expected a finite number"),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights=[1.0, 2.0] for the rewards exact. Set one"),
        ({"warm_up": -1}, "data.rules.warm_up=-1; expected at least 0"),
    ],
)
def test_rules_refuse_functions_and_numbers_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rules((rewards.exact,), **settings)


def test_a_reward_may_change_its_arguments():
    def greedy(prompt, completion, row):
        prompt.append("mine")
        row["list"].append(1)
        return len(prompt) + len(row["list"])

    prompt, columns = ["yours"], {"list": []}
    scores, faults = call(greedy, [prompt] * 3, ["a"] * 3, [("row", columns)] * 3)
    assert scores.tolist() == [3, 3, 3] and not faults.first
    assert prompt == ["yours"] and columns == {"list": []}


class WithoutRepr:
    """A value whose repr raises."""

    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize("value", [10**5000, WithoutRepr()], ids=["too long a number", "no repr"])
def test_a_value_that_cannot_be_printed_is_a_fault(value):
    scores, faults = call(lambda *_: value)
    assert np.isnan(scores).all() and faults.not_a_number == 1
    assert "expected a finite number (row:1)" in faults.first


def test_a_reward_that_exits_is_a_fault():
    scores, faults = call(lambda *_: sys.exit(3))
    assert np.isnan(scores).all() and faults.first.startswith("reward <lambda> raised SystemExit: 3")


# ---- async functions


async def slow(prompt, completion, row):
    await asyncio.sleep(0.2)
    return len(completion) / row["size"]


def test_async_rewards_are_called_at_once_and_counted_alone():
    began = time.monotonic()
    rows = [(f"r:{i}", {"size": i % 40}) for i in range(80)]
    found = rewards.call_reward(FunctionReward(slow), ["q"] * 80, ["abc"] * 80, rows)
    assert time.monotonic() - began < 4
    np.testing.assert_allclose(found.scores[1:40], 3 / np.arange(1, 40))
    assert np.isnan(found.scores[[0, 40]]).all() and found.faults.raised == 2
    assert found.faults.first == "reward slow raised ZeroDivisionError: division by zero (r:0)"


def test_async_rewards_begin_when_an_episode_ends():
    """Before the rollout is over; episodes with a fault are not scored."""
    begun_for = []

    async def judge(prompt, completion, row):
        begun_for.append((prompt, completion, row["number"]))
        return 1.0

    prompts = TokenisedPrompts(((1,), (2,)), ("a", "b"), (Completion("a", "p", ""), Completion("b", "q", "")),
                               ({"number": 0}, {"number": 1}))  # fmt: skip
    reward = FunctionReward(judge)
    begun, ended = rewards.begin_async([FunctionReward(rewards.exact), reward], prompts)
    said = ({"role": "assistant", "content": "hm"}, {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "yes"})  # fmt: skip
    ended(3, Trajectory(1, (2,), (), turns=said))
    ended(0, Trajectory(0, (1,), (), turns=said, fault="raised"))
    assert [*begun] == [(reward, 3)] and begun[reward, 3]() == 1.0
    assert begun_for == [("q", "yes", 1)]


def test_a_reward_with_the_parameters_of_trl_is_refused_in_one_line_that_says_which_it_has_here():
    def of_trl(completions, **kwargs):
        return [0.0 for _ in completions]

    def of_three_lists(prompts, completions, answer, **kwargs):
        return [0.0 for _ in completions]

    for fn in (of_trl, of_three_lists):
        with pytest.raises(
            ValueError, match=r"TRL's parameters.*def \w+\(prompt, completion, row\)"
        ) as found:
            FunctionReward(fn)
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"short\(text\): too many positional.*\(prompt, completion, row\)"):
        FunctionReward(short)
    for fn in (lambda *args: 0.0, lambda a, b, c, d=1: 0.0, max, partial(rewards.exact, column="label")):
        FunctionReward(fn)


def short(text):
    return 0.0
