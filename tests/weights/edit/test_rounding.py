"""Laws of calibrated rounding: errors of outputs, scales, the target of a layer, low-rank corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import quant
from jaxft.nn.quant import quantize
from jaxft.nn.quant_formats import NF4
from jaxft.weights.edit import calibrated_rounding
from jaxft.weights.edit.calibrated_rounding import InputMoments

FORMS = [("nf4", 16, True), ("nf4", 16, False), ("fp4", 16, True), ("int4", 16, None), ("affine4", 16, None),
         ("int8", None, None), ("fp8", None, None)]  # fmt: skip


def inputs(count=400, size=48, seed=0):
    """Inputs that go together, as a layer's do, of unequal size."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(12, size)) * np.geomspace(0.3, 3, size)
    return (rng.normal(size=(count, 12)) @ mixed + 0.3 * rng.normal(size=(count, size))).astype(np.float32)


def weight(ins=48, outs=40, seed=1):
    return np.random.default_rng(seed).standard_t(4, size=(ins, outs)).astype(np.float32)


def value(q):
    return np.asarray(quant.dequantize(q), np.float64)


def error(q, w, moment):
    off = value(q) - w
    return float(np.sum(off * (moment @ off)))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f[0]}-{f[2]}")
def test_the_error_of_the_outputs_is_below_that_of_gptq_and_of_rounding_to_nearest(form):
    x, w = inputs(), weight()
    moment = x.T @ x
    found = calibrated_rounding.quantize_calibrated(w, moment, *form)
    plain, factor = quantize(w, *form), calibrated_rounding.inverse_factor(jnp.asarray(moment))
    by_gptq = calibrated_rounding.with_codes(
        plain, calibrated_rounding.gptq_codes(jnp.asarray(w), factor, plain, form[0])
    )
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, plain)  # as many bits
    assert jax.tree.map(jnp.asarray, found).scale.dtype == plain.scale.dtype
    damped = np.asarray(calibrated_rounding.damped(jnp.asarray(moment)), np.float64)
    errors = [error(q, w, damped) for q in (found, by_gptq, plain)]
    assert errors[0] < errors[1] < errors[2]


def test_a_pass_of_coordinate_descent_gives_each_input_the_best_of_all_levels_in_turn():
    x, w = inputs(), weight()
    moment = calibrated_rounding.damped(jnp.asarray(x.T @ x))
    plain = quantize(w, "nf4", 16, False)
    found = calibrated_rounding.with_codes(
        plain, calibrated_rounding._descended_codes(plain, jnp.asarray(w), moment)
    )
    exact, expected = np.asarray(moment, np.float64), value(plain)
    levels, scale = NF4.astype(np.float64), np.repeat(plain.scale.astype(np.float64), 16, 0)
    for j in range(48):
        errors = []
        for level in levels:
            expected[j] = level * scale[j]
            off = expected - w
            errors.append(np.sum(off * (exact @ off), 0))
        expected[j] = levels[np.argmin(errors, 0)] * scale[j]
    assert np.isclose(value(found), expected, atol=1e-5).mean() > 0.99  # ties fall either way in float32
    off = expected - w
    assert error(found, w, exact) == pytest.approx(np.sum(off * (exact @ off)), rel=0.01)
    assert error(found, w, exact) < 0.7 * error(plain, w, exact)


def test_the_error_is_never_above_that_of_rounding_to_nearest():
    for seed in range(6):
        w, x = weight(8, 3, seed), inputs(20, 8, seed)
        for moment in (x.T @ x, np.eye(8, dtype=np.float32), np.zeros((8, 8), np.float32)):
            damped = np.asarray(calibrated_rounding.damped(jnp.asarray(moment)), np.float64)
            found = calibrated_rounding.quantize_calibrated(w, moment, "nf4", 4, True)
            assert error(found, w, damped) <= error(quantize(w, "nf4", 4, True), w, damped) * (1 + 1e-5)


def test_values_that_are_not_finite_are_refused_and_a_candidate_that_is_not_never_wins():
    x, w = inputs(), weight()
    moment = x.T @ x
    for target, own in ((w * np.float32(np.nan), moment), (w, moment * np.float32(np.inf))):
        with pytest.raises(ValueError, match=r"are not finite; round to nearest \(quant.calibrate=none"):
            calibrated_rounding.quantize_calibrated(target, own, "nf4", 16, True)
    broken = calibrated_rounding.inverse_factor(jnp.asarray(moment))._replace(
        upper=jnp.full((48, 48), jnp.nan)
    )
    damped = np.asarray(calibrated_rounding.damped(jnp.asarray(moment)), np.float64)
    found = calibrated_rounding.quantize_calibrated(w, moment, "fp8", factor=broken)
    assert error(found, w, damped) <= error(quantize(w, "fp8"), w, damped) * (1 + 1e-5)


def test_a_short_last_block_and_inputs_that_are_always_zero_are_rounded():
    x, w = inputs(size=50), weight(50)
    x[:, [3, 49]] = 0
    found = calibrated_rounding.quantize_calibrated(w, x.T @ x, "nf4", 16, True)
    plain = quantize(w, "nf4", 16, True)
    assert np.isfinite(value(found)).all()
    assert error(found, w, x.T @ x) < 0.7 * error(plain, w, x.T @ x)


def test_the_target_maps_the_inputs_to_the_exact_outputs_with_the_least_error():
    exact, w = inputs(), weight()
    own = exact + 0.2 * np.random.default_rng(5).normal(size=exact.shape).astype(np.float32)
    factor = calibrated_rounding.inverse_factor(jnp.asarray(own.T @ own))
    found = np.asarray(
        calibrated_rounding.compensated_weight(
            jnp.asarray(w), InputMoments(own.T @ own, own.T @ exact), factor
        )
    )
    damping = np.sqrt(calibrated_rounding.DAMPING * np.square(own).sum(0).mean()) * np.eye(48)  # towards w
    rows, goal = np.vstack([own, damping]), np.vstack([exact @ w, damping @ w])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, goal, rcond=None)[0], atol=2e-3)
    off = [np.square(own @ v - exact @ w).sum() for v in (w, found)]
    assert off[1] < 0.9 * off[0]
    same = calibrated_rounding.compensated_weight(
        jnp.asarray(w), InputMoments(own.T @ own, own.T @ own), factor
    )
    np.testing.assert_allclose(same, w, atol=1e-6)


def test_a_correction_leaves_the_smallest_singular_values_of_the_weighted_error():
    x, w = inputs(), weight()
    moment = x.T @ x
    off = w - value(quantize(w, "nf4", 16)).astype(np.float32)
    a, b = calibrated_rounding.correction(jnp.asarray(off), jnp.asarray(moment), 5)
    damped = np.asarray(calibrated_rounding.damped(jnp.asarray(moment)), np.float64)
    values = np.linalg.svd(np.linalg.cholesky(damped).T @ off, compute_uv=False)
    rest = off - a.astype(np.float64) @ b
    assert np.sum(rest * (damped @ rest)) == pytest.approx(np.sum(values[5:] ** 2), rel=1e-4)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4)
