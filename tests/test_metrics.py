"""Metrics add: in any order and grouping, with the metrics of no rows as the neutral element."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import metrics
from jaxft.metrics import Max, Min, Sum

RNG = np.random.default_rng(0)
PARTS = [
    {"loss": Sum(jnp.float32(t), jnp.float32(w)), "longest": Max(jnp.float32(a)), "shortest": Min(jnp.float32(b))}
    for t, w, a, b in RNG.integers(-64, 64, (4, 4)) / 8  # sums of eighths are exact
]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_any_order_and_grouping_gives_the_same():
    whole = functools.reduce(metrics.add, PARTS)
    for order in itertools.permutations(PARTS):
        same(functools.reduce(metrics.add, order), whole)
    same(metrics.add(metrics.add(*PARTS[:2]), metrics.add(*PARTS[2:])), whole)


def test_neutral_changes_nothing():
    for part in PARTS:
        zero = metrics.neutral(part)
        same(metrics.add(zero, part), part)
        same(metrics.add(part, zero), part)
        abstract = jax.eval_shape(lambda part=part: part)
        same(metrics.neutral(abstract), zero)
    assert metrics.read(zero) == {"longest": -np.inf, "shortest": np.inf}


def test_a_weighted_mean_is_that_of_all_rows_at_once():
    values, weights = RNG.normal(size=12), RNG.uniform(size=12)
    for sizes in ([12], [5, 7], [1] * 12):
        parts = np.split(np.arange(12), np.cumsum(sizes)[:-1])
        found = [{"m": Sum((values[i] * weights[i]).sum(), weights[i].sum())} for i in parts]
        assert metrics.read(functools.reduce(metrics.add, found))["m"] == pytest.approx(np.average(values, weights=weights))


def test_the_largest_and_smallest_are_those_of_all_rows():
    found = metrics.read(functools.reduce(metrics.add, PARTS))
    assert found["longest"] == max(float(p["longest"].value) for p in PARTS)
    assert found["shortest"] == min(float(p["shortest"].value) for p in PARTS)


def test_a_mean_over_nothing_is_left_out_and_never_nan():
    found = metrics.read({"empty": Sum(jnp.float32(0), jnp.float32(0)), "one": Sum(jnp.float32(3), jnp.float32(2))})
    assert found == {"one": 1.5}


def test_a_loss_that_is_not_finite_is_shown_as_such():
    parts = [{"loss": Sum(jnp.float32(x), jnp.float32(1))} for x in (1.0, np.nan)]
    assert np.isnan(metrics.read(metrics.add(*parts))["loss"])
    assert np.isinf(metrics.read({"loss": Sum(jnp.float32(np.inf), jnp.float32(1))})["loss"])


def test_adding_is_the_same_on_the_host_and_in_a_program():
    inside = jax.jit(metrics.add)(*PARTS[:2])
    same(inside, metrics.add(*PARTS[:2]))
    same(jax.tree.map(np.float32, inside), metrics.add(*jax.device_get(PARTS[:2])))
    dtypes = {name: jax.tree.map(lambda x: x.dtype, m) for name, m in inside.items()}
    assert set(jax.tree.leaves(dtypes)) == {jnp.dtype(jnp.float32)}


def test_reading_gives_plain_floats():
    found = metrics.read(PARTS[0])
    assert all(type(x) is float for x in found.values()) and set(found) == {"loss", "longest", "shortest"}


def test_each_kind_is_told_from_a_leaf():
    assert all(metrics.is_metric(m) for m in PARTS[0].values()) and not metrics.is_metric(jnp.ones(()))
    assert len(jax.tree.leaves(PARTS[0], is_leaf=metrics.is_metric)) == 3
