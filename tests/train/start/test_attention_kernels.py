"""A kernel that is wrong on its device is found before a run trusts it, and a right one is not refused."""

from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_attention import H100

from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.nn.attention import attention, flash_attention
from jaxft.nn.attention.attention import AttentionNeeds, AttentionSettings
from jaxft.nn.attention.pallas_attention import KernelOptions
from jaxft.nn.attention.ring_attention import BlockKernel
from jaxft.train.start.attention_kernels import (
    context_parts,
    in_parts_of_rows,
    kernel_errors,
    rows_to_compare,
    sample_length,
)

QUERIES = jax.ShapeDtypeStruct((8, 256, 4, 16), jnp.bfloat16)
EVERYTHING = AttentionNeeds(packed=True, branches=True, windowed=True, softcap=True)
CAP = 2.0


def ignoring_prompts(q, k, v, ranges, softcap):
    return attention.dense(q, k, v, replace(ranges, prompt_start=None, prompt_end=None), softcap)


def one_key_less(q, k, v, ranges, softcap):
    """Every query misses the first key of its own range, except where it is the only one."""
    start = jnp.minimum(ranges.own_start + 1, jnp.maximum(ranges.own_end - 1, 0))
    return attention.dense(q, k, v, replace(ranges, own_start=start), softcap)


def not_a_number(q, k, v, ranges, softcap):
    return attention.dense(q, k, v, ranges, softcap).at[1, 100].set(jnp.nan)


@jax.custom_vjp
def smaller_gradient(v):
    return v


smaller_gradient.defvjp(lambda v: (v, None), lambda _, g: (g * jnp.bfloat16(0.9),))


def wrong_gradient(q, k, v, ranges, softcap):
    return attention.dense(q, k, smaller_gradient(v), ranges, softcap)


@pytest.mark.parametrize("kernel", [ignoring_prompts, one_key_less, not_a_number, wrong_gradient])
def test_a_wrong_kernel_has_a_larger_error_than_rounding_explains(kernel):
    error, limit = kernel_errors(kernel, QUERIES, 2, EVERYTHING, CAP)
    assert error > 2 * limit and limit < 0.02


def test_a_window_that_a_kernel_ignores_is_found():
    def kernel(q, k, v, ranges, softcap):
        whole, _ = rows_to_compare(AttentionNeeds())
        return attention.dense(q, k, v, whole)

    for rows, wrong in ((AttentionNeeds(windowed=True), True), (AttentionNeeds(), False)):
        error, limit = kernel_errors(kernel, QUERIES, 2, rows, None)
        assert (error > limit) == wrong


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(EVERYTHING, marks=pytest.mark.slow),  # interpreted
        AttentionNeeds(packed=False),
    ],
)
def test_the_kernels_of_jaxft_are_right(rows):
    cap = CAP if rows.softcap else None
    kernel, queries = partial(attention.pallas, options=KernelOptions(interpret=True)), QUERIES
    if not rows.packed:  # by the XLA implementation of the same public function
        kernel, queries = partial(attention.cudnn, implementation="xla"), QUERIES.update(dtype=jnp.float32)
    error, limit = kernel_errors(kernel, queries, 2, rows, cap)
    assert error <= limit


def test_a_kernel_that_is_wrong_in_long_rows_only_is_found():
    def kernel(q, k, v, ranges, softcap):
        end = jnp.where(ranges.own_end > 300, 0, ranges.own_end)
        return attention.dense(q, k, v, replace(ranges, own_end=end), softcap)

    for length, wrong in ((256, False), (512, True)):
        queries = QUERIES.update(shape=(8, length, 4, 16))
        error, limit = kernel_errors(kernel, queries, 2, AttentionNeeds(packed=False), None)
        assert (error > limit) == wrong


@pytest.mark.quick_cases("ring")
@pytest.mark.parametrize("layout", ["gathered", "ring", "heads"])
def test_a_kernel_that_is_wrong_for_a_part_of_a_row_only_is_found(monkeypatch, layout):
    """Of four heads each of two devices has two, or all for half of the queries or keys."""

    def kernel(q, k, v, ranges, softcap):
        wrong = q.shape[1:3] != (256, 4)
        return attention.dense(q, k, v, ranges, softcap) * jnp.asarray(0.9 if wrong else 1, q.dtype)

    def output(qkv, ranges, softcap):
        o, lse = flash_attention.flash_output(qkv, ranges, softcap)
        return 0.9 * o, lse

    monkeypatch.setattr(attention, "kernel_for", lambda *_: kernel)
    of_blocks = BlockKernel(output, flash_attention.flash_gradients)
    monkeypatch.setitem(attention.BLOCK_KERNELS, kernel, of_blocks)
    attend = in_parts_of_rows(True, layout, AttentionSettings())
    for parts, wrong in ((1, False), (2, True)):
        error, limit = kernel_errors(attend, QUERIES, 2, AttentionNeeds(), None, parts)
        assert (error > limit) == wrong


def test_sample_rows_are_as_long_as_those_of_the_run_and_in_as_many_parts():
    assert [sample_length(n) for n in (64, 1000, 4096, 8192, 131072 + 128)] == [64, 1000, 4096, 4608, 4480]
    assert [sample_length(n, 8) for n in (8192, 131072, 8 * 1000)] == [4096, 4096, 8 * (4 * 128 - 24)]
    for parts in range(1, 9):
        for part in range(4608 // parts // 128 * 128 + 128, 20_000, 128):
            sample = sample_length(part * parts, parts)
            for long, short in ((part, sample // parts), (part * parts, sample)):
                largest = [next(n for n in (512, 384, 256, 128) if T % n == 0) for T in (long, short)]
                assert largest[0] == largest[1], (parts, part)
            assert sample % parts == 0 and 1024 <= sample <= 4608
    for parts in (16, 32, 64):
        assert sample_length(parts * 1024, parts) % (parts * 128 if parts <= 32 else parts) == 0
    meshes = [make_mesh(MeshShape(8 // n, context=n)) for n in (1, 4, 8)]
    assert [context_parts(mesh) for mesh in meshes] == [1, 4, 8]
    with mock.patch.object(jax, "local_devices", lambda: jax.devices()[:6]):
        assert context_parts(meshes[2]) == 4


def test_an_error_that_rounding_to_bfloat16_would_explain_is_too_large_in_float32():
    def kernel(q, k, v, ranges, softcap):
        return attention.dense(q, k, v, ranges, softcap) * jnp.asarray(1.003, q.dtype)

    queries, rows = QUERIES.update(dtype=jnp.float32), AttentionNeeds(packed=False)
    error, limit = kernel_errors(kernel, queries, 2, rows, None)
    assert limit < error / 2 < 0.003


def test_sample_rows_have_what_kernels_are_asked_for():
    ranges, real = rows_to_compare(EVERYTHING)
    seen = np.asarray(ranges.own_end) - np.asarray(ranges.own_start)
    prompt = np.asarray(ranges.prompt_end) - np.asarray(ranges.prompt_start)
    assert not real.all() and seen[real].min() == 1 and seen[real].max() == 50 and prompt.max() == 49
    ranges, real = rows_to_compare(AttentionNeeds(packed=False))
    assert ranges.prompt_start is None and (real == np.sort(real)[:, ::-1]).all() and not real.all()
    assert (np.asarray(ranges.own_start)[real] == 0).all()


def test_a_setting_forbids_the_kernel_of_the_device_and_the_start_up_line_says_so(monkeypatch):
    mesh = AbstractMesh((1,), ("data",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        lines = [
            attention.attention_line(QUERIES, 2, settings=AttentionSettings(kernel=kernel))
            for kernel in ("auto", "flash")
        ]
        rows, settings = AttentionNeeds(), AttentionSettings(kernel="flash")
        assert attention.chosen_kernel(QUERIES, 2, rows, settings) == ("rows", attention.flash)
        monkeypatch.setenv("JAXFT_ATTENTION", "flash")
        lines.append(attention.attention_line(QUERIES, 2))
        assert attention.chosen_kernel(QUERIES, 2, rows, AttentionSettings()) == ("rows", attention.flash)
        settings = AttentionSettings(kernel="reference")
        lines.append(attention.attention_line(QUERIES, 2, settings=settings))
        monkeypatch.setenv("JAXFT_ATTENTION", "dense")
        with pytest.raises(ValueError, match="JAXFT_ATTENTION=dense is unknown; use auto, flash, reference"):
            attention.chosen_kernel(QUERIES, 2, rows, AttentionSettings())
    assert lines == [
        "attention: Pallas: rows are packed",
        "attention: blockwise XLA (flash): attention=flash",
        "attention: blockwise XLA (flash): JAXFT_ATTENTION=flash",
        "attention: reference: attention=reference",
    ]
    with pytest.raises(ValueError, match="attention='cudnn'; use one of auto, flash, reference"):
        AttentionSettings(kernel="cudnn")
