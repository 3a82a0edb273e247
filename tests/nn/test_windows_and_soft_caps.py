"""Laws of sliding windows and soft caps: every kernel has them, or is not chosen for a layer that has."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from test_attention import H100, arrays, assert_close, described, packed, value_and_gradients, visits

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh
from jaxft.nn import attention
from jaxft.nn.flash_attention import PLAIN_RULE, AttentionRule, Visibility

ONE_ROW = Visibility(jnp.ones((1, 64), jnp.int32), None, jnp.arange(64, dtype=jnp.int32)[None])


def with_positions(segments, branches):
    """Rows with the position of each token: how many tokens of its segment precede it in its own branch and
    in the prompt.
    """
    s, b = np.asarray(segments), np.zeros_like(segments) if branches is None else np.asarray(branches)
    positions = np.zeros_like(s)
    for r, t in np.ndindex(s.shape):
        positions[r, t] = sum(s[r, u] == s[r, t] and b[r, u] in (0, b[r, t]) for u in range(t))
    return Visibility(segments, branches, jnp.asarray(positions))


def by_the_definition(q, k, v, rows, window, cap):
    """Loops over single queries and keys, in NumPy."""
    segments, positions = np.asarray(rows.segments), np.asarray(rows.positions)
    branches = np.zeros_like(segments) if rows.branches is None else np.asarray(rows.branches)
    q, k, v = (np.asarray(x) for x in (q, k, v))
    o = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        total, weighted, g = 0.0, np.zeros(q.shape[3]), h // (q.shape[2] // k.shape[2])
        for s in range(t + 1):
            mine = segments[b, s] == segments[b, t] != 0 and branches[b, s] in (0, branches[b, t])
            if mine and positions[b, s] > positions[b, t] - window:
                score = q[b, t, h] @ k[b, s, g] / q.shape[3] ** 0.5
                weight = np.exp(cap * np.tanh(score / cap) if cap else score)
                total, weighted = total + weight, weighted + weight * v[b, s, g]
        o[b, t, h] = weighted / total if total else 0
    return o


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize(("window", "cap"), [(1, None), (4, 1.5), (100, 0.3)])
def test_dense_is_the_definition(window, cap, branched):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, _ = arrays(rng, 2, 19, 4, 2, 8, jnp.float64)
        segments, branches = packed(rng, 2, 19)
        rows = with_positions(segments, branches if branched else None)
        found = jax.jit(attention.dense)(q, k, v, rows, AttentionRule(window, cap))
        np.testing.assert_allclose(found, by_the_definition(q, k, v, rows, window, cap), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "block", "branched", "cap"),
    [
        ((2, 45, 4, 2, 8), 16, True, None),
        ((2, 45, 4, 2, 8), 16, False, 1.5),
        ((1, 300, 2, 1, 4), 256, True, 1.5),
    ],
)
def test_flash_equals_dense_in_value_and_gradient(shape, block, branched, cap):
    """Windows of one token, around the size of a block, and longer than the row."""
    rng = np.random.default_rng(shape[1])
    with jax.enable_x64(True):
        x = arrays(rng, *shape, jnp.float64)
        segments, branches = packed(rng, *shape[:2])
        rows = with_positions(segments, branches if branched else None)
        for window in (1, 7, block - 1, block, block + 1, 1000):
            rule = AttentionRule(jnp.int32(window), cap)  # traced: one program for all
            expected = value_and_gradients(attention.dense, *x, rows, rule)
            found = value_and_gradients(partial(attention.flash, block=block), *x, rows, rule)
            assert_close(found, expected, 1e-10)


BLOCKS_OF_8 = partial(attention.flash, block=8)
NUMBERS = [st.lists(st.integers(0, most), min_size=30, max_size=30) for most in (3, 2, 29)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(*NUMBERS, st.integers(1, 31))
def test_flash_equals_dense_for_any_order_of_segments_branches_and_positions(s, b, p, window):
    """Rows that no packer writes: skipping blocks outside a window must not lose a visible key."""
    with jax.enable_x64(True):
        x = arrays(np.random.default_rng(0), 1, 30, 2, 1, 4, jnp.float64)
        rows = Visibility(*(jnp.asarray([numbers], jnp.int32) for numbers in (s, b, p)))
        rule = AttentionRule(jnp.int32(window), 2.0)
        expected = value_and_gradients(attention.dense, *x, rows, rule)
        assert_close(value_and_gradients(BLOCKS_OF_8, *x, rows, rule), expected, 1e-10)


def test_a_window_of_every_size_visits_the_blocks_with_a_visible_key_only():
    """Against the pairs of the definition, one by one: a row of one example, and a packed row."""
    lengths = (3, 18, 2, 1, 24, 9)
    segments = jnp.asarray([np.repeat([1, 2, 3, 4, 5, 0], lengths)[:57]], jnp.int32)
    segments = jnp.pad(segments, ((0, 0), (0, 7)))
    for rows in (ONE_ROW, with_positions(segments, None)):
        s, p = np.asarray(rows.segments)[0], np.asarray(rows.positions)[0]
        order = np.arange(64)
        seen = (s[:, None] == s) & (s[:, None] != 0) & (order <= order[:, None])
        for window in (1, 2, 3, 4, 5, 9, 64, 2**31 - 1):
            visible = seen & (p[:, None].astype(np.int64) - p < window)
            needed = visible.reshape(16, 4, 16, 4).any((1, 3))
            places, counts = visits(rows, 4, AttentionRule(jnp.int32(window)))
            visited = [sorted(places[i, : counts[i]].tolist()) for i in range(16)]
            assert visited == [np.flatnonzero(row).tolist() for row in needed]


def test_blocks_behind_a_shared_prompt_visit_its_last_blocks_only():
    """A prompt of 32 tokens, then two responses of 16, in blocks of 4 with a window of 6."""
    branches = jnp.asarray([[0] * 32 + [1] * 16 + [2] * 16], jnp.int32)
    rows = with_positions(ONE_ROW.segments, branches)
    places, counts = visits(rows, 4, AttentionRule(jnp.int32(6)))
    visited = [sorted(places[i, : counts[i]].tolist()) for i in range(16)]
    assert visited[8:10] == [[6, 7, 8], [7, 8, 9]]
    assert visited[11:14] == [[9, 10, 11], [6, 7, 12], [7, 12, 13]]
    assert visited[15] == [13, 14, 15]


def test_the_cost_of_a_window_grows_with_the_row_and_not_with_its_square():
    def visited(length, window):
        rows = Visibility(jnp.ones((1, length), jnp.int32), None, jnp.arange(length, dtype=jnp.int32)[None])
        return int(visits(rows, 16, AttentionRule(jnp.int32(window)))[1].sum())

    assert visited(1024, 2048) == 64 * 65 // 2
    assert visited(1024, 48) == 4 * 64 - (3 + 2 + 1)  # a block and the three before it
    assert visited(2048, 48) == 4 * 128 - (3 + 2 + 1)


def test_places_of_tokens_do_not_overflow():
    """A segment's number times the row's length may be above 2^31, as in a row of 2^17 short examples."""
    segments = jnp.full((1, 64), 2**25 - 1, jnp.int32)
    rows = Visibility(segments, None, 40 + jnp.arange(64, dtype=jnp.int32)[None])
    places, counts = visits(rows, 16, AttentionRule(jnp.int32(5)))
    assert [sorted(places[i, : counts[i]].tolist()) for i in range(4)] == [[0], [0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize("cap", [None, 0.5])
def test_keys_outside_the_window_change_nothing(cap):
    """Bit for bit, in values and gradients, whatever their size: a capped score of 1e30 has a slope of 0."""
    rng = np.random.default_rng(3)
    q, k, v, do = arrays(rng, 1, 64, 2, 1, 8, jnp.float32)
    outside, mine = jnp.arange(64) < 20, jnp.arange(64) >= 20 + 10 - 1
    do = jnp.where(mine[None, :, None, None], do, 0)
    rule = AttentionRule(jnp.int32(10), cap)
    for kernel in (attention.dense, partial(attention.flash, block=16)):
        before = value_and_gradients(kernel, q, k, v, do, ONE_ROW, rule)
        loud = jnp.where(outside[None, :, None, None], 1e30, k)
        after = value_and_gradients(kernel, q, loud, v + jnp.where(loud == 1e30, 7, 0), do, ONE_ROW, rule)
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x[:, mine], y[:, mine])
        for gradient in after[2:]:
            assert not np.any(gradient[:, outside])


def test_completions_after_a_shared_prompt_equal_prompt_and_completion_alone():
    """A window of 6 behind a prompt of 13: it spans the branch's earlier tokens and the prompt's end."""
    rng, rule = np.random.default_rng(6), AttentionRule(jnp.int32(6), 2.0)
    with jax.enable_x64(True):
        q, k, v, _ = arrays(rng, 1, 40, 4, 2, 8, jnp.float64)
        branches = jnp.asarray([[0] * 13 + [1] * 12 + [2] * 15], jnp.int32)
        ones = jnp.ones((1, 40), jnp.int32)
        flash = jax.jit(partial(attention.flash, block=16))
        together = flash(q, k, v, with_positions(ones, branches), rule)
        for start, stop in ((13, 25), (25, 40)):
            at = jnp.asarray([*range(13), *range(start, stop)])
            alone = with_positions(ones[:, : len(at)], None)
            expected = flash(q[:, at], k[:, at], v[:, at], alone, rule)
            np.testing.assert_allclose(together[:, at], expected, atol=1e-12)


@pytest.mark.parametrize(("window", "cap"), [(5, 3.0), (1, None), (40, 0.5)])
def test_values_and_gradients_are_those_of_transformers(window, cap):
    """Gemma 2's eager attention, with the mask that transformers makes for a sliding window."""
    from transformers import Gemma2Config
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v, do = arrays(np.random.default_rng(2), 2, 24, 4, 2, 8, jnp.float32)
    config = Gemma2Config(sliding_window=window, attn_implementation="eager")
    mask = create_sliding_window_causal_mask(config, torch.zeros(2, 24, 4), None, None)
    x = [torch.tensor(np.asarray(a)).transpose(1, 2).requires_grad_() for a in (q, k, v)]
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    o, _ = eager_attention_forward(module, *x, mask, scaling=8**-0.5, softcap=cap)
    o.backward(torch.tensor(np.asarray(do)))
    expected = o.detach(), *(a.grad.transpose(1, 2) for a in x)
    rows = with_positions(jnp.ones((2, 24), jnp.int32), None)
    rule = AttentionRule(jnp.int32(window), cap)
    assert_close(value_and_gradients(BLOCKS_OF_8, q, k, v, do, rows, rule), expected, 3e-6)


def through_layers(fn, cap, q, k, v, rows, windows):
    """A scan of layers with windows of their own, as in a model with local and global layers."""

    def layer(x, window):
        return fn(x, k, v, rows, rule=AttentionRule(window, cap)), None

    return jax.lax.scan(layer, q, windows)[0]


@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads"),
    [
        (MeshShape(2, 2, 2), 4, 2),
        pytest.param(MeshShape(2, context=4), 8, 4, marks=pytest.mark.slow),
        (MeshShape(1, context=8), 8, 2),
        (MeshShape(2, context=2, tensor=2), 6, 2),
    ],
    ids=["rows", "heads", "replicated kv heads", "queries"],
)
def test_layers_of_one_scan_with_other_windows_equal_one_device_on_every_mesh(mesh, heads, kv_heads):
    rng, devices = np.random.default_rng(8), make_mesh(mesh)
    with jax.enable_x64(True):
        x = arrays(rng, 4, 40, heads, kv_heads, 8, jnp.float64)
        rows, windows = with_positions(*packed(rng, 4, 40)), jnp.asarray([5, 2**31 - 1, 17], jnp.int32)
        run = partial(through_layers, attention.dense, 2.0)
        expected = value_and_gradients(run, *x, rows, windows)
        axes = [("rows", "time", name, "head_dim") for name in ("heads", "kv_heads", "kv_heads", "heads")]
        placed = [
            jax.device_put(a, array_sharding(devices, of, a.shape)) for a, of in zip(x, axes, strict=True)
        ]
        run = partial(through_layers, attention.attention, 2.0)
        with jax.set_mesh(devices):
            assert_close(value_and_gradients(run, *placed, rows, windows), expected, 1e-10)


def test_positions_cost_nothing_without_a_window():
    """The same program, so the same numbers: with and without positions."""
    q, k, v, do = arrays(np.random.default_rng(0), 1, 64, 2, 1, 8, jnp.float32)

    def program(rows):
        call = partial(value_and_gradients, partial(attention.attention, rows=rows))
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(call)(q, k, v, do)))

    assert program(ONE_ROW) == program(Visibility(ONE_ROW.segments))


def test_a_window_without_positions_is_an_error():
    q, k, v, _ = arrays(np.random.default_rng(0), 1, 8, 2, 1, 8, jnp.float32)
    rows = Visibility(jnp.ones((1, 8), jnp.int32))
    for fn in (attention.dense, attention.flash, attention.attention):
        with pytest.raises(ValueError, match="a sliding window needs the positions of the tokens"):
            fn(q, k, v, rows, rule=AttentionRule(4))


TPU = described("tpu", "TPU v5 lite")


@pytest.mark.parametrize("device", [H100, TPU, described("cpu", "cpu")])
def test_a_kernel_without_windows_or_soft_caps_is_not_chosen_for_them(device):
    choose = partial(attention.kernel_for, device, 64, jnp.bfloat16)
    for packs in (True, False):
        assert choose(packs, rule=AttentionRule(4)) is attention.flash
        assert choose(packs, rule=AttentionRule(jnp.int32(4), 30.0)) is attention.flash
        assert choose(packs, branches=True) is attention.flash
        capped = attention.splash if device is TPU else attention.flash
        assert choose(packs, rule=AttentionRule(None, 30.0)) is capped


@pytest.mark.parametrize("kernel", [attention.triton, attention.cudnn, attention.splash])
def test_a_kernel_that_has_no_window_refuses_it(kernel):
    q, k, v, _ = arrays(np.random.default_rng(0), 1, 8, 2, 1, 8, jnp.float32)
    rows = Visibility(jnp.ones((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32))
    for other in (AttentionRule(4), *([] if kernel is attention.splash else [AttentionRule(None, 30.0)])):
        with pytest.raises(ValueError, match="has no shared prompts, window or soft cap"):
            kernel(q, k, v, Visibility(rows.segments), other)
    with pytest.raises(ValueError, match="has no shared prompts, window or soft cap"):
        kernel(q, k, v, rows)


def test_soft_caps_of_splash_equal_dense_when_interpreted():
    rng, rule = np.random.default_rng(10), AttentionRule(None, 0.8)
    q, k, v, do = arrays(rng, 1, 128, 2, 1, 64, jnp.float32)
    rows = Visibility(packed(rng, 1, 128)[0])
    real = rows.segments[:, :, None, None] != 0  # padding queries may return any finite number
    do = jnp.where(real, do, 0)
    with jax.numpy_dtype_promotion("standard"):
        kernel = partial(attention.splash, rule=rule, interpret=True)
        found = value_and_gradients(kernel, q, k, v, do, rows)
    expected = value_and_gradients(partial(attention.dense, rule=rule), q, k, v, do, rows)
    assert_close([jnp.where(real, x, 0) for x in found], expected, 1e-4)


def test_a_window_that_no_row_reaches_leaves_the_fast_kernel(monkeypatch):
    used = []
    for name in ("cudnn", "flash"):
        monkeypatch.setattr(attention, name, lambda q, *rest, name=name: used.append(name) or q)
    shapes = [jax.ShapeDtypeStruct((2, 40, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    row = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=H100)):
        for window in (40, 39):
            fn = partial(attention.attention, packed=False, rule=AttentionRule(window))
            jax.jit(fn).trace(*shapes, Visibility(row, None, row))
    assert used == ["cudnn", "flash"]


@pytest.mark.parametrize(
    ("device", "sizes", "packs", "branches", "rules", "expected"),
    [
        (H100, (1, 1), False, False, [PLAIN_RULE], "cuDNN"),
        (H100, (1, 1), True, False, [PLAIN_RULE], "Triton"),
        (TPU, (1, 1), True, False, [AttentionRule(None, 50.0)], "splash"),
        (H100, (1, 1), False, False, [AttentionRule(4096)], "cuDNN"),
        (
            H100, (1, 1), False, False, [AttentionRule(512), PLAIN_RULE],
            "blockwise XLA (flash): this model has sliding windows of 512",
        ),
        (
            TPU, (1, 1), True, True, [AttentionRule(512, 50.0), AttentionRule(None, 50.0)],
            "blockwise XLA (flash): this model has sliding windows of 512 and scores capped at 50; responses "
            "share their prompt",
        ),
        (H100, (4, 1), True, False, [PLAIN_RULE], "Triton"),
        (
            H100, (4, 2), True, False, [PLAIN_RULE],
            "blockwise XLA (flash): 4 heads do not divide over mesh.context x mesh.tensor",
        ),
        (described("cpu", "cpu"), (1, 1), True, False, [PLAIN_RULE], "blockwise XLA (flash)"),
    ],
)  # fmt: skip
def test_the_start_up_line_names_the_kernel_that_runs(device, sizes, packs, branches, rules, expected):
    """On an abstract mesh of (context, tensor) devices, for rows of 2048 tokens and 4 heads."""
    mesh = AbstractMesh(
        (1, 1, 1, *sizes), ("slices", "data", "fsdp", "context", "tensor"), abstract_device=device
    )
    q = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.attention_line(q, 2, branches, packs, rules) == f"attention: {expected}"
