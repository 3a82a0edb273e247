"""Blends of adapters against blends of the weights that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives.preference import RANKS, blend, widened_pairs

pytestmark = pytest.mark.usefixtures("x64")
LAYERS, INS, OUTS, RANK = 2, 12, 9, 2


def random_adapter(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(LAYERS, INS, RANK)), rng.normal(size=(LAYERS, RANK, OUTS))
    pair = {"a": jnp.asarray(a), "b": jnp.asarray(b), "scale": None}
    return {"base": {"norm": None}, "adapter": {"q": pair}, "head": jnp.ones(3) * seed}


def weights(params):
    """The products of all layers in NumPy."""
    pair = params["adapter"]["q"]
    return np.einsum("lir,lro->lio", np.asarray(pair["a"]), np.asarray(pair["b"]))


def test_widening_changes_no_weight():
    params = random_adapter(0)
    wide = widened_pairs(params)
    assert wide["adapter"]["q"]["a"].shape == (LAYERS, INS, RANKS * RANK)
    np.testing.assert_array_equal(weights(wide), weights(params))


@pytest.mark.parametrize("alpha", [0.6, 0.1])
def test_a_blend_of_two_adapters_is_that_of_their_weights(alpha):
    old, new = random_adapter(1), random_adapter(2)
    found, error = blend(new, widened_pairs(old), alpha)
    np.testing.assert_allclose(weights(found), alpha * weights(new) + (1 - alpha) * weights(old), atol=1e-12)
    sides = [alpha * new["adapter"]["q"][x] + (1 - alpha) * old["adapter"]["q"][x] for x in "ab"]
    apart = np.einsum("lir,lro->lio", *map(np.asarray, sides))
    assert np.abs(apart - weights(found)).max() > 0.1
    np.testing.assert_allclose(found["head"], 1 + alpha)
    assert error < 1e-6


def test_the_error_of_a_blend_is_the_distance_from_the_blended_weights():
    now, exact = widened_pairs(random_adapter(0)), weights(random_adapter(0))
    for seed in (1, 2):
        new = random_adapter(seed)
        exact = 0.5 * weights(new) + 0.5 * weights(now)
        now, error = blend(new, now, 0.5)
    distance = np.linalg.norm(weights(now) - exact) / np.linalg.norm(exact)
    assert distance > 0.05
    np.testing.assert_allclose(error, distance, rtol=1e-5)


def test_one_trained_side_of_a_pair_is_blended_alone():
    old, new = random_adapter(1), random_adapter(2)
    for params in (old, new):
        params["adapter"]["q"]["a"] = None
    found, error = blend(new, widened_pairs(old), 0.25)
    expected = 0.25 * new["adapter"]["q"]["b"] + 0.75 * old["adapter"]["q"]["b"]
    np.testing.assert_allclose(found["adapter"]["q"]["b"], expected, rtol=1e-14)
    assert found["adapter"]["q"]["a"] is None and error == 0


def test_an_adapter_wider_than_its_weight_is_blended_too():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 8), "b": (8, 5)}
    old, new = ({name: jnp.asarray(rng.normal(size=x)) for name, x in shapes.items()} for _ in range(2))
    found, _ = blend(new, widened_pairs(old), 0.3)
    expected = 0.3 * new["a"] @ new["b"] + 0.7 * old["a"] @ old["b"]
    assert found["a"].shape == (3, 16)
    np.testing.assert_allclose(found["a"] @ found["b"], expected, atol=1e-12)
