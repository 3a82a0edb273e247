"""Laws of sampling from a softmax: by running sums on CPUs, by noise elsewhere; large vocabularies too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.inference import sampling
from jaxft.inference.sampling import from_softmax

ROWS = 20_000


@pytest.mark.parametrize("sampler", [from_softmax, sampling._by_gumbel_noise])
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


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])  # 1: as if u times the total were rounded up
def test_running_sums_equal_a_search_in_float64_and_never_sample_what_is_impossible(u):
    rng = np.random.default_rng(3)
    p = np.where(rng.random((500, 192)) < 0.3, rng.exponential(1, (500, 192)) ** 4, 0).astype(np.float32)
    p[:, 150:] = 0
    p[0], p[0, 7] = 0, 1e-30
    found = np.asarray(sampling._first_beyond(jnp.asarray(p), jnp.full(500, u, jnp.float32)))
    assert (p[np.arange(500), found] > 0).all()
    sums = np.cumsum(p.astype(np.float64), 1)
    before = np.where(found > 0, sums[np.arange(500), found - 1], 0)
    target, total = u * sums[:, -1], sums[:, -1]
    assert (before <= target + 1e-5 * total).all()
    assert (sums[np.arange(500), found] >= target - 1e-5 * total).all()
