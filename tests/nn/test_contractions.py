"""Contractions of 16-bit floats on CPUs with and without bfloat16 matmuls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import matmul

DIMS = (((1,), (0,)), ((), ()))


def operands(dtype, rows=72):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, 96), (96, 40)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_contraction_is_the_float64_sum_of_the_products_of_its_operands(monkeypatch, native, dtype):
    monkeypatch.setattr(matmul, "cpu_has_bfloat16_matmuls", lambda: native)
    x, w = operands(dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    bound = 96 * np.finfo(np.float32).eps * (abs(np.asarray(x, np.float64)) @ abs(np.asarray(w, np.float64)))
    for result in (matmul.wide_dot(x, w, DIMS), matmul.wide_einsum("ti,io->to", x, w)):
        assert result.dtype == jnp.float32
        assert (abs(np.asarray(result, np.float64) - exact) <= bound).all()


@pytest.mark.parametrize(("platform", "native", "operand"), [
    ("cpu", True, "bf16"), ("cpu", False, "f32"), ("cuda", False, "bf16"), ("tpu", False, "bf16"),
])  # fmt: skip
def test_only_programs_for_a_cpu_without_bfloat16_matmuls_widen_the_operands(
    monkeypatch, platform, native, operand
):
    monkeypatch.setattr(matmul, "cpu_has_bfloat16_matmuls", lambda: native)
    traced = jax.jit(lambda x, w: matmul.wide_dot(x, w, DIMS)).trace(*operands("bfloat16"))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert f"(tensor<72x96x{operand}>, tensor<96x40x{operand}>) -> tensor<72x40xf32>" in text


def test_few_rows_and_a_cache_are_not_copied_in_float32(monkeypatch):
    monkeypatch.setattr(matmul, "cpu_has_bfloat16_matmuls", lambda: False)
    x, w = operands("bfloat16", 32)
    for product in (
        lambda x, w: matmul.wide_dot(x, w, DIMS),
        lambda x, w: matmul.wide_einsum("ti,io->to", x, w, widen=False),
    ):
        text = jax.jit(product).lower(x, w).as_text()
        assert "(tensor<32x96xbf16>, tensor<96x40xbf16>) -> tensor<32x40xf32>" in text
