"""Metrics add: in any order and grouping, with the metrics of no rows as the neutral element."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.objectives import metrics
from jaxft.objectives.metrics import Correlation, LabelNoise, Max, Min, PerRow, Sum, WinRate
from jaxft.train.evaluate.evaluate import sum_metrics

RNG = np.random.default_rng(0)
PARTS = [
    {
        "loss": Sum(jnp.float32(t), jnp.float32(w)),
        "longest": Max(jnp.float32(a)),
        "shortest": Min(jnp.float32(b)),
    }
    for t, w, a, b in RNG.integers(-64, 64, (4, 4)) / 8  # sums of eighths are exact
]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_any_order_and_grouping_gives_the_same():
    whole = functools.reduce(metrics.add, PARTS)
    for order in itertools.permutations(PARTS):
        assert_same(functools.reduce(metrics.add, order), whole)
    assert_same(metrics.add(metrics.add(*PARTS[:2]), metrics.add(*PARTS[2:])), whole)


def test_values_of_single_rows_are_copied_once_however_many_batches_there_are(monkeypatch):
    one = {"loss": Sum(jnp.float32(2), jnp.float32(1)), "rows/loss": PerRow.of(jnp.arange(4.0), jnp.ones(4))}
    copied, join = [], np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts, *a: copied.append(join(parts, *a)) or copied[-1])
    total = sum_metrics(lambda batch: one, range(50), with_rows=True)
    assert sum(x.size for x in copied) == 2 * 50 * 4 and metrics.as_floats(total) == {"loss": 2.0}
    found = metrics.row_values(total)
    assert [row["loss"] for row in found.values()] == [0.0, 1.0, 2.0, 3.0] * 50
    assert sum_metrics(lambda batch: one, range(50)).keys() == {"loss"} and len(copied) == 2


def test_neutral_changes_nothing():
    for part in PARTS:
        zero = metrics.neutral(part)
        assert_same(metrics.add(zero, part), part)
        assert_same(metrics.add(part, zero), part)
        abstract = jax.eval_shape(lambda part=part: part)
        assert_same(metrics.neutral(abstract), zero)
    assert metrics.as_floats(zero) == {"longest": -np.inf, "shortest": np.inf}


def test_a_weighted_mean_equals_that_of_all_rows_at_once():
    values, weights = RNG.normal(size=12), RNG.uniform(size=12)
    for sizes in ([12], [5, 7], [1] * 12):
        parts = np.split(np.arange(12), np.cumsum(sizes)[:-1])
        found = [{"m": Sum((values[i] * weights[i]).sum(), weights[i].sum())} for i in parts]
        assert metrics.as_floats(functools.reduce(metrics.add, found))["m"] == pytest.approx(
            np.average(values, weights=weights)
        )


def test_max_and_min_are_those_of_all_rows():
    found = metrics.as_floats(functools.reduce(metrics.add, PARTS))
    assert found["longest"] == max(float(p["longest"].value) for p in PARTS)
    assert found["shortest"] == min(float(p["shortest"].value) for p in PARTS)


def test_a_win_rate_counts_a_tie_as_half_and_has_no_value_for_ties_alone():
    margin, where = jnp.array([0.5, -1.0, 0.0, 0.0, 3.0, 9.0]), jnp.array([True] * 5 + [False])
    whole = {"a": WinRate.of(margin, margin == 0, where)}
    assert metrics.as_floats(whole) == {"a": (2 + 2 / 2) / 5} and metrics.pair_counts(whole) == {"a_pairs": 5}
    parts = [{"a": WinRate.of(margin[i], margin[i] == 0, where[i])} for i in (slice(0, 3), slice(3, 6))]
    assert_same(metrics.add(*parts), whole)
    ties = {"a": WinRate.of(jnp.zeros(3), jnp.ones(3, bool), jnp.ones(3, bool))}
    assert metrics.as_floats(ties) == {} and metrics.pair_counts(ties) == {"a_pairs": 3}
    assert metrics.as_floats(metrics.neutral(ties)) == metrics.pair_counts(metrics.neutral(ties)) == {}
    lost = WinRate.of(jnp.array([jnp.nan, 1.0]), jnp.zeros(2, bool), jnp.ones(2, bool))
    assert np.isnan(metrics.as_floats({"a": lost})["a"])


def test_a_mean_over_nothing_is_left_out_and_never_nan():
    found = metrics.as_floats(
        {"empty": Sum(jnp.float32(0), jnp.float32(0)), "one": Sum(jnp.float32(3), jnp.float32(2))}
    )
    assert found == {"one": 1.5}


def test_a_non_finite_loss_is_reported_as_such():
    parts = [{"loss": Sum(jnp.float32(x), jnp.float32(1))} for x in (1.0, np.nan)]
    assert np.isnan(metrics.as_floats(metrics.add(*parts))["loss"])
    assert np.isinf(metrics.as_floats({"loss": Sum(jnp.float32(np.inf), jnp.float32(1))})["loss"])


def test_adding_is_the_same_on_the_host_and_in_a_program():
    inside = jax.jit(metrics.add)(*PARTS[:2])
    assert_same(inside, metrics.add(*PARTS[:2]))
    assert_same(jax.tree.map(np.float32, inside), metrics.add(*jax.device_get(PARTS[:2])))
    dtypes = {name: jax.tree.map(lambda x: x.dtype, m) for name, m in inside.items()}
    assert set(jax.tree.leaves(dtypes)) == {jnp.dtype(jnp.float32)}


def test_as_floats_returns_python_floats():
    found = metrics.as_floats(PARTS[0])
    assert all(type(x) is float for x in found.values()) and set(found) == {"loss", "longest", "shortest"}


def test_from_json_inverts_to_json():
    whole = {**PARTS[0], "noise": LabelNoise.of(jnp.linspace(-1, 2, 40), jnp.ones(40, bool))}
    back = metrics.from_json(json.loads(json.dumps(metrics.to_json(jax.device_get(whole)))))
    assert_same(back, whole)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float64)}


# The estimate of wrong labels


def first_sight(seed, pairs, wrong=0.0, hard=0.27):
    """Margins of the pairs of an epoch, each before its own update, as runs of configs/dpo.py on the shipped
    pairs have them.

    A quarter of the pairs is beyond the model; the others it learns by and by, and by size of the margin it
    is right about 100, 100, 96, 87, 79, 75, 72 and 61 % of the eighths. The first steps, of the warm-up, have
    none at all.
    """
    rng = np.random.default_rng(seed)
    done = np.linspace(0, 1, pairs)
    skill = np.where(rng.random(pairs) < hard, rng.normal(0, 0.3, pairs), rng.normal(1.1, 0.6, pairs))
    margin = 0.3 * np.maximum(done, 0.02) * (skill * np.minimum(1, 2 * done) + rng.normal(0, 0.1, pairs))
    margin[: pairs // 13] = 0
    flipped = rng.permutation(pairs) < round(wrong * pairs)
    return np.where(flipped, -margin, margin)


def counts(margin):
    """LabelNoise.of's, in NumPy."""
    margin = np.asarray(margin)
    size = np.clip(np.floor(4 * np.log2(np.maximum(np.abs(margin), 1e-12)) + 64), 0, 127).astype(int)
    return np.stack([np.bincount(size[side], minlength=128) for side in (margin > 0, margin < 0)]).astype(
        float
    )


def estimates(pairs, wrong, seeds=200):
    return np.array([LabelNoise(counts(first_sight(seed, pairs, wrong))).value() for seed in range(seeds)])


def test_label_noise_counts_equal_numpys_and_add():
    margin = first_sight(0, 300, 0.2)
    where = np.arange(300) % 7 > 0
    found = LabelNoise.of(jnp.asarray(margin, jnp.float32), jnp.asarray(where))
    np.testing.assert_array_equal(found.counts, counts(margin.astype(np.float32)[where]))
    parts = [
        {"x": LabelNoise.of(jnp.asarray(part, jnp.float32), jnp.ones(100, bool))}
        for part in np.split(margin, 3)
    ]
    whole = LabelNoise.of(jnp.asarray(margin, jnp.float32), jnp.ones(300, bool))
    assert_same(functools.reduce(metrics.add, parts), {"x": whole})


@pytest.mark.parametrize("wrong", [0.1, 0.2, 0.3])
def test_wrong_labels_are_estimated_within_5_points(wrong):
    """Of 216 pairs in four draws of five, whose scatter is that of which labels are wrong; of 1000 nearly
    always.
    """
    few, many = estimates(216, wrong), estimates(1000, wrong)
    assert (
        abs(few.mean() - wrong) < 0.03 and few.std() < 0.045 and (np.abs(few - wrong) <= 0.05).mean() > 0.75
    )
    assert abs(many.mean() - wrong) < 0.03 and (np.abs(many - wrong) <= 0.05).mean() > 0.95


@pytest.mark.parametrize("pairs", [64, 216, 1000])
def test_the_standard_error_is_the_standard_deviation_over_seeds(pairs):
    for wrong in (0.1, 0.2, 0.3):
        each = [LabelNoise(counts(first_sight(seed, pairs, wrong))) for seed in range(300)]
        assert np.mean([d.error() for d in each]) == pytest.approx(np.std([d.value() for d in each]), rel=0.2)
    reported = metrics.as_floats({"label_noise": each[0]})
    assert reported == {"label_noise": each[0].value(), "label_noise_error": each[0].error()}


def test_few_clean_labels_look_wrong():
    assert estimates(216, 0.0).mean() < 0.04 and np.quantile(estimates(216, 0.0), 0.95) < 0.06
    assert estimates(1000, 0.0).max() < 0.06


def test_a_model_that_is_right_where_it_is_certain_yields_the_exact_fraction():
    size = np.geomspace(0.01, 10, 2000)
    for share in (0.0, 0.2, 0.4):
        lost = np.arange(2000) % 5 < round(5 * share)
        assert LabelNoise(counts(np.where(lost, -size, size))).value() == pytest.approx(share, abs=0.01)


def test_fewer_than_24_pairs_give_no_estimate_and_ties_do_not_count():
    assert LabelNoise(counts(np.ones(23))).value() is None and LabelNoise(counts(np.ones(24))).value() == 0
    found = LabelNoise.of(jnp.array([0.0, 1.0, -1.0]), jnp.ones(3, bool))
    assert found.counts.sum() == 2 and LabelNoise(counts(-np.ones(30))).value() == 1


def test_the_correlation_equals_pearsons_over_all_rows():
    x, y = RNG.normal(size=60), RNG.normal(size=60)
    y = y + x
    thirds = zip(np.split(x, 3), np.split(y, 3), strict=True)
    parts = [{"c": Correlation.of(jnp.asarray(a), jnp.asarray(b), jnp.ones(20, bool))} for a, b in thirds]
    found = metrics.as_floats(functools.reduce(metrics.add, parts))["c"]
    assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert "c" not in metrics.as_floats(
        {"c": Correlation.of(jnp.ones(5), jnp.arange(5.0), jnp.ones(5, bool))}
    )
