"""Contractions of 16-bit floats on CPUs with and without bfloat16 matmuls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import products

DIMS = (((1,), (0,)), ((), ()))


def operands(dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((24, 96), (96, 40)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_contraction_is_the_float64_sum_of_the_products_of_its_operands(monkeypatch, native, dtype):
    monkeypatch.setattr(products, "cpu_has_bfloat16_matmuls", lambda: native)
    x, w = operands(dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    bound = 96 * np.finfo(np.float32).eps * (abs(np.asarray(x, np.float64)) @ abs(np.asarray(w, np.float64)))
    for result in (products.wide_dot(x, w, DIMS), products.wide_einsum("ti,io->to", x, w)):
        assert result.dtype == jnp.float32
        assert (abs(np.asarray(result, np.float64) - exact) <= bound).all()


@pytest.mark.parametrize(("platform", "native", "operand"), [
    ("cpu", True, "bf16"), ("cpu", False, "f32"), ("cuda", False, "bf16"), ("tpu", False, "bf16"),
])  # fmt: skip
def test_only_programs_for_a_cpu_without_bfloat16_matmuls_widen_the_operands(
    monkeypatch, platform, native, operand
):
    monkeypatch.setattr(products, "cpu_has_bfloat16_matmuls", lambda: native)
    traced = jax.jit(lambda x, w: products.wide_dot(x, w, DIMS)).trace(*operands("bfloat16"))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f"(tensor<24x96x{operand}>, tensor<96x40x{operand}>) -> tensor<24x40xf32>" in text
