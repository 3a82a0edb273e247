"""Laws of sampling from a softmax: in blocks on CPUs, and with noise for every logit elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.engine import sampling
from jaxft.engine.sampling import from_softmax

ROWS = 20_000


@pytest.mark.parametrize("sampler", [from_softmax, sampling._by_noise])
def test_samples_follow_the_softmax_also_across_blocks(sampler):
    """Over 600 logits, two blocks and a part of one, of which one has a single token and many none."""
    logits = np.full(600, -np.inf, np.float32)
    likely = np.array([0, 1, 100, 255, 300, 512, 590, 599])
    logits[likely] = np.random.default_rng(0).normal(0, 1.0, len(likely))
    found = jax.jit(sampler)(
        jnp.broadcast_to(jnp.asarray(logits), (ROWS, 600)), jax.random.split(jax.random.key(0), ROWS)
    )
    counts = np.bincount(found, minlength=600)
    assert counts.sum() == counts[likely].sum() == ROWS
    expected = ROWS * np.asarray(jax.nn.softmax(jnp.asarray(logits)))[likely]
    chi2 = ((counts[likely] - expected) ** 2 / expected).sum()
    assert chi2 < 32  # 7 degrees of freedom: a correct sampler exceeds this once in 20,000


def test_a_row_does_not_depend_on_the_others():
    logits = jax.random.normal(jax.random.key(1), (9, 1000)) * 3
    keys = jax.random.split(jax.random.key(2), 9)
    together = jax.jit(from_softmax)(logits, keys)
    alone = [jax.jit(from_softmax)(logits[i : i + 1], keys[i : i + 1])[0] for i in range(9)]
    assert together.tolist() == [int(x) for x in alone]
    assert len(set(together.tolist())) > 5


@pytest.mark.quick_cases("_by_noise")
@pytest.mark.parametrize("sampler", [from_softmax, sampling._by_noise])
def test_rounding_of_logits_changes_few_samples(sampler):
    """Of a flat distribution over 49152 tokens, whose logits differ as those of two bfloat16 programs do."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1.0, (300, 49152)).astype(np.float32)
    rounded = (logits + rng.normal(0, 0.01, logits.shape)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 300)
    one, other = (np.asarray(jax.jit(sampler)(jnp.asarray(x), keys)) for x in (logits, rounded))
    assert len(set(one.tolist())) > 280  # flat
    assert (one != other).mean() < 0.04  # a search in running sums changes 10 %
