"""Token weights against their formulas, and their sums."""

import inspect
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.rl import token_weights as T
from jaxft.rl.advantages import has_score, nonconstant_groups
from jaxft.rl.rewards import number
from jaxft.rl.rollout_rules import Rules

NAN = float("nan")
RULES = {
    "token_mean": T.token_mean,
    "sequence_mean": T.sequence_mean,
    "prompt_mean": T.prompt_mean,
    "constant_length": T.constant_length,
    "sequence_sum": T.sequence_sum,
}
LENGTHS = np.array([[4, 1, 0], [10, 3, 2], [5, 5, 5]])
MASK = np.array([[True, True, True], [True, False, True], [False, False, False]])  # the third slot is empty


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_token_weights_follow_their_formulas():
    in_loss = MASK & (LENGTHS > 0)
    assert_close(T.token_mean(LENGTHS, MASK, 20), np.where(in_loss, 1 / 17, 0))
    assert_close(T.sequence_mean(LENGTHS, MASK, 20), [[1 / 16, 1 / 4, 0], [1 / 40, 0, 1 / 8], [0, 0, 0]])
    assert_close(T.prompt_mean(LENGTHS, MASK, 20), [[1 / 10, 1 / 10, 0], [1 / 24, 0, 1 / 24], [0, 0, 0]])
    assert_close(T.constant_length(LENGTHS, MASK, 20), np.where(in_loss, 1 / 160, 0))
    assert_close(T.sequence_sum(LENGTHS, MASK, 20), np.where(in_loss, 1 / 4, 0))


slots = st.tuples(st.integers(0, 20), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(slots, min_size=3, max_size=3), min_size=1, max_size=5))
def test_weights_of_all_tokens_sum_to_1_or_to_what_the_docstring_says(batch):
    lengths, mask = (np.array([[slot[i] for slot in group] for group in batch]) for i in range(2))
    in_loss = mask & (lengths > 0)
    sums = {name: float((rule(lengths, mask, 20) * lengths).sum()) for name, rule in RULES.items()}
    if not in_loss.any():
        assert set(sums.values()) == {0.0}
        return
    for name in ("token_mean", "sequence_mean", "prompt_mean"):
        assert abs(sums[name] - 1) < 1e-12
    fraction = (lengths * in_loss).sum() / (20 * (lengths > 0).sum())
    assert sums["constant_length"] == pytest.approx(fraction, rel=1e-12)
    assert sums["sequence_sum"] == pytest.approx(lengths[in_loss].mean(), rel=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_weights_are_zero_outside_of_the_mask(name):
    assert not RULES[name](LENGTHS, MASK, 20)[~MASK | (LENGTHS == 0)].any()
    assert not RULES[name](LENGTHS, np.zeros((3, 3), bool), 20).any()


@pytest.mark.parametrize("name", RULES)
def test_a_mask_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"has shape \(3,\), the lengths \(3, 3\)"):
        inspect.unwrap(RULES[name])(LENGTHS, MASK[0], 20)


def test_one_mask_excludes_missing_scores_truncated_completions_and_constant_groups():
    scores = np.array([[1.0, 0.0, NAN], [0.5, 0.5, 0.5]])
    ended = np.array([[True, False, True], [True, True, True]])
    mask = has_score(scores) & nonconstant_groups(scores) & ended
    np.testing.assert_array_equal(mask, [[True, False, False], [False, False, False]])
    assert T.token_mean(np.full((2, 3), 7), mask, 20).sum() * 7 == pytest.approx(1)


def test_constant_length_refuses_a_longer_completion():
    with pytest.raises(ValueError, match="a completion has 10 tokens, more than length=9"):
        T.constant_length(LENGTHS, MASK, 9)


def test_constant_length_divides_by_max_new_unless_it_is_given_a_length():
    lengths, mask = np.array([[3, 0, 7]]), np.ones((1, 3), bool)
    rules = Rules((number,), token_weights=partial(T.constant_length, length=20))
    np.testing.assert_array_equal(rules.token_weights(lengths, mask, 8), T.constant_length(lengths, mask, 20))
    assert T.constant_length(lengths, mask, 8)[0, 0] == 1 / 16
