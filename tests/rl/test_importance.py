"""Importance weights between the sampler and the training program."""

import itertools

import numpy as np
import pytest

from jaxft.rl import token_weights as T

NAN = float("nan")
RATIOS = np.array([[0.5, 2.0, 4.0], [0.25, NAN, NAN], [NAN, NAN, NAN]])  # beyond the lengths: anything
LENGTHS = np.array([3, 1, 0])
CORRECTIONS = [T.truncated_tokens, T.masked_tokens, T.truncated_completions, T.masked_completions]


def weights(correction, **bounds):
    """The weights of tokens and of samples as lists."""
    found = correction(np.log(RATIOS), LENGTHS, **bounds)
    return found.tokens.round(12).tolist(), found.samples.round(12).tolist()


def test_weights_of_tokens_are_truncated_or_masked_one_by_one():
    """By hand, with TRL 1.16's bounds: none below, 3 above."""
    truncated = [[0.5, 2, 3], [0.25, 0, 0], [0, 0, 0]]
    assert weights(T.truncated_tokens) == (truncated, [0.5, 2, 3, 0.25])
    assert weights(T.masked_tokens) == ([[0.5, 2, 0], [0.25, 0, 0], [0, 0, 0]], [0.5, 2, 0, 0.25])
    assert weights(T.truncated_tokens, least=0.4, most=1.5)[1] == [0.5, 1.5, 1.5, 0.4]
    assert weights(T.masked_tokens, least=0.5, most=4.0)[1] == [0.5, 2, 4, 0]  # the bounds are inside


def test_weights_of_completions_are_products_of_their_tokens_ratios():
    """0.5 * 2 * 4 = 4, and 0.25; an empty completion is no sample."""
    assert weights(T.truncated_completions) == ([[3, 3, 3], [0.25, 0, 0], [0, 0, 0]], [3, 0.25])
    assert weights(T.masked_completions) == ([[0, 0, 0], [0.25, 0, 0], [0, 0, 0]], [0, 0.25])
    assert weights(T.masked_completions, least=0.3, most=4.5)[1] == [4, 0]


def test_a_geometric_mean_masks_a_completion_whatever_its_length():
    """Of ratios 0.5, 2 and 4 it is 4^(1/3) = 1.587; of 0.25 alone 0.25. Within the bounds the weight is 1."""
    assert weights(T.masked_geometric_means, least=0.5, most=1.6) == ([[1, 1, 1], [0] * 3, [0] * 3], [1, 0])
    assert weights(T.masked_geometric_means, least=0.2, most=1.5)[1] == [0, 1]
    assert weights(T.masked_geometric_means)[1] == [0, 0]
    found = T.masked_geometric_means(np.full((1, 1000), 0.0009), np.array([1000]))  # their product is 2.5
    assert (
        found.tokens.all() and T.masked_completions(np.full((1, 1000), 0.0015), np.array([1000])).samples == 0
    )


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_weights_within_the_bounds_turn_means_of_samples_into_means_under_the_training_program(correction):
    """Over all texts of one token (for weights of tokens) or of three."""
    rng = np.random.default_rng(0)
    size = 3 if "completions" in correction.__name__ else 1
    mu, pi = (rng.dirichlet(np.full(4, 5.0), size) for _ in range(2))  # of each position and token
    texts = np.array(list(itertools.product(range(4), repeat=size)))
    at = np.arange(size), texts
    value = rng.normal(size=len(texts))
    log_ratio = np.log(pi[at]) - np.log(mu[at])
    found = correction(log_ratio, np.full(len(texts), size), most=1e6)
    mean = (mu[at].prod(1) * found.tokens[:, -1] * value).sum()
    np.testing.assert_allclose(mean, (pi[at].prod(1) * value).sum(), rtol=1e-12)
    np.testing.assert_allclose((mu[at].prod(1) * found.samples.reshape(len(texts), -1)[:, 0]).sum(), 1)


def test_the_effective_sample_size_is_a_fraction():
    for sizes, expected in (([2.0] * 5, 1), ([0.0, 7.0, 0.0, 0.0], 1 / 4), ([3.0, 1.0], 16 / 20), ([0.0], 0)):
        assert T.effective_samples(np.array(sizes)) == pytest.approx(expected)


def test_weights_are_logged_with_mean_extremes_and_effective_sample_size():
    metrics = T.weight_metrics(T.truncated_tokens(np.log(RATIOS), LENGTHS))
    values = {name.rpartition("/")[2]: x for name, x in metrics.items()}
    assert values["mean"].total / values["mean"].weight == pytest.approx(5.75 / 4)
    assert (values["min"].value, values["max"].value) == (pytest.approx(0.25), pytest.approx(3))
    effective = values["effective_samples"]
    assert effective.total / effective.weight == pytest.approx(5.75**2 / (4 * (0.25 + 4 + 9 + 0.0625)))
    assert all(name.startswith("sampling/importance_sampling_ratio/") for name in metrics)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_extreme_ratios_are_finite_and_bounds_are_checked(correction):
    log_ratio = np.array([[900.0, -900.0], [-900.0, -900.0]])
    found = correction(log_ratio, np.array([2, 2]))
    assert np.isfinite(found.tokens).all() and found.tokens.max() <= 3
    for least, most in ((-1, 2), (2, 2)):
        with pytest.raises(ValueError, match=rf"correction_bounds={least},{most} .* Use 0 <= least < most"):
            correction(log_ratio, np.array([2, 2]), least=least, most=most)
