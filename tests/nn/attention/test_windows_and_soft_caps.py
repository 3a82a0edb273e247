"""Laws of sliding windows and soft caps: every kernel has them, or is not chosen for a layer that has."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractMesh
from test_attention import (
    H100,
    abstract_ranges,
    arrays,
    assert_close,
    described,
    packed,
    value_and_gradients,
    visits,
)

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh
from jaxft.nn.attention import attention
from jaxft.nn.attention.attention import AttentionNeeds, AttentionSettings
from jaxft.nn.attention.flash_attention import key_ranges, within_window
from jaxft.nn.attention.layer_attention import AttentionLayers, LayerKind, layer_ranges
from jaxft.nn.rope import Rope


class Rows(NamedTuple):
    """segments and branches (or None), int32 [B, T]."""

    segments: jax.Array
    branches: jax.Array | None = None

    def ranges(self, window=None):
        return within_window(key_ranges(*self), window)


ONE_ROW = Rows(jnp.ones((1, 64), jnp.int32))


def positions_of(rows):
    """How many tokens of its segment precede a token in its own branch and in the prompt."""
    s = np.asarray(rows.segments)
    b = np.zeros_like(s) if rows.branches is None else np.asarray(rows.branches)
    positions = np.zeros_like(s)
    for r, t in np.ndindex(s.shape):
        positions[r, t] = sum(s[r, u] == s[r, t] and b[r, u] in (0, b[r, t]) for u in range(t))
    return positions


def by_the_definition(q, k, v, rows, window, cap):
    """Loops over single queries and keys, in NumPy."""
    segments, positions = np.asarray(rows.segments), positions_of(rows)
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
        rows = Rows(segments, branches if branched else None)
        found = jax.jit(partial(attention.dense, softcap=cap))(q, k, v, rows.ranges(window))
        np.testing.assert_allclose(found, by_the_definition(q, k, v, rows, window, cap), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "block", "branched", "cap"),
    [
        ((2, 45, 4, 2, 8), 16, True, None),
        ((2, 45, 4, 2, 8), 16, False, 1.5),
        pytest.param((1, 300, 2, 1, 4), 256, True, 1.5, marks=pytest.mark.slow),
    ],
)
def test_flash_equals_dense_in_value_and_gradient(shape, block, branched, cap):
    """Windows of one token, around the size of a block, and longer than the row."""
    rng = np.random.default_rng(shape[1])
    with jax.enable_x64(True):
        x = arrays(rng, *shape, jnp.float64)
        segments, branches = packed(rng, *shape[:2])
        rows = Rows(segments, branches if branched else None)
        dense, flash = (partial(fn, softcap=cap) for fn in (attention.dense, attention.flash))
        flash = partial(flash, block=block)
        for window in (1, 7, block - 1, block, block + 1, 1000):
            ranges = rows.ranges(window)
            expected = value_and_gradients(dense, *x, ranges)
            assert_close(value_and_gradients(flash, *x, ranges), expected, 1e-10)


def test_a_window_of_every_size_visits_the_blocks_with_a_visible_key_only():
    """Against the pairs of the definition, one by one: a row of one example, and a packed row."""
    lengths = (3, 18, 2, 1, 24, 9)
    segments = jnp.asarray([np.repeat([1, 2, 3, 4, 5, 0], lengths)[:57]], jnp.int32)
    segments = jnp.pad(segments, ((0, 0), (0, 7)))
    for rows in (ONE_ROW, Rows(segments)):
        s, p = np.asarray(rows.segments)[0], positions_of(rows)[0]
        order = np.arange(64)
        seen = (s[:, None] == s) & (s[:, None] != 0) & (order <= order[:, None])
        for window in (1, 2, 3, 4, 5, 9, 64, 2**31 - 1):
            visible = seen & (p[:, None].astype(np.int64) - p < window)
            needed = visible.reshape(16, 4, 16, 4).any((1, 3))
            places, counts = visits(rows.ranges(window), 4)
            visited = [sorted(places[i, : counts[i]].tolist()) for i in range(16)]
            assert visited == [np.flatnonzero(row).tolist() for row in needed]


def test_blocks_behind_a_shared_prompt_visit_its_last_blocks_only():
    """A prompt of 32 tokens, then two responses of 16, in blocks of 4 with a window of 6."""
    branches = jnp.asarray([[0] * 32 + [1] * 16 + [2] * 16], jnp.int32)
    places, counts = visits(Rows(ONE_ROW.segments, branches).ranges(6), 4)
    visited = [sorted(places[i, : counts[i]].tolist()) for i in range(16)]
    assert visited[8:10] == [[6, 7, 8], [7, 8, 9]]
    assert visited[11:14] == [[9, 10, 11], [6, 7, 12], [7, 12, 13]]
    assert visited[15] == [13, 14, 15]


def test_the_cost_of_a_window_grows_with_the_row_and_not_with_its_square():
    def visited(length, window):
        return int(visits(Rows(jnp.ones((1, length), jnp.int32)).ranges(window), 16)[1].sum())

    assert visited(1024, 2048) == 64 * 65 // 2
    assert visited(1024, 48) == 4 * 64 - (3 + 2 + 1)  # a block and the three before it
    assert visited(2048, 48) == 4 * 128 - (3 + 2 + 1)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_keys_outside_the_window_change_nothing(cap):
    """Bit for bit, in values and gradients, whatever their size: a capped score of 1e30 has a slope of 0."""
    rng = np.random.default_rng(3)
    q, k, v, do = arrays(rng, 1, 64, 2, 1, 8, jnp.float32)
    outside, mine = jnp.arange(64) < 20, jnp.arange(64) >= 20 + 10 - 1
    do = jnp.where(mine[None, :, None, None], do, 0)
    ranges = ONE_ROW.ranges(10)
    for kernel in (attention.dense, partial(attention.flash, block=16)):
        kernel = partial(kernel, softcap=cap)
        before = value_and_gradients(kernel, q, k, v, do, ranges)
        loud = jnp.where(outside[None, :, None, None], 1e30, k)
        after = value_and_gradients(kernel, q, loud, v + jnp.where(loud == 1e30, 7, 0), do, ranges)
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(x[:, mine], y[:, mine])
        for gradient in after[2:]:
            assert not np.any(gradient[:, outside])


def test_completions_after_a_shared_prompt_equal_prompt_and_completion_alone():
    """A window of 6 behind a prompt of 13: it spans the branch's earlier tokens and the prompt's end."""
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        q, k, v, _ = arrays(rng, 1, 40, 4, 2, 8, jnp.float64)
        branches = jnp.asarray([[0] * 13 + [1] * 12 + [2] * 15], jnp.int32)
        ones = jnp.ones((1, 40), jnp.int32)
        flash = jax.jit(partial(attention.flash, softcap=2.0, block=16))
        together = flash(q, k, v, Rows(ones, branches).ranges(6))
        for start, stop in ((13, 25), (25, 40)):
            at = jnp.asarray([*range(13), *range(start, stop)])
            alone = Rows(ones[:, : len(at)]).ranges(6)
            expected = flash(q[:, at], k[:, at], v[:, at], alone)
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
    ranges = Rows(jnp.ones((2, 24), jnp.int32)).ranges(window)
    flash = partial(attention.flash, softcap=cap, block=8)
    assert_close(value_and_gradients(flash, q, k, v, do, ranges), expected, 3e-6)


def through_layers(fn, cap, q, k, v, ranges, windows):
    """A scan of layers with windows of their own, as in a model with local and global layers."""

    def layer(x, window):
        return fn(x, k, v, within_window(ranges, window), softcap=cap), None

    return jax.lax.scan(layer, q, windows)[0]


def sharded_attention(q, k, v, ranges, softcap):
    return attention.attention(q, k, v, ranges, settings=AttentionSettings(softcap))


@pytest.mark.quick_cases("queries")
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
        rows, windows = key_ranges(*packed(rng, 4, 40)), jnp.asarray([5, 2**31 - 1, 17], jnp.int32)
        run = partial(through_layers, attention.dense, 2.0)
        expected = value_and_gradients(run, *x, rows, windows)
        axes = [("rows", "time", name, "head_dim") for name in ("heads", "kv_heads", "kv_heads", "heads")]
        placed = [
            jax.device_put(a, array_sharding(devices, of, a.shape)) for a, of in zip(x, axes, strict=True)
        ]
        run = partial(through_layers, sharded_attention, 2.0)
        with jax.set_mesh(devices):
            assert_close(value_and_gradients(run, *placed, rows, windows), expected, 1e-10)


TPU = described("tpu", "TPU v5 lite")


@pytest.mark.parametrize("device", [H100, TPU, described("cpu", "cpu")])
def test_a_kernel_without_windows_or_soft_caps_is_not_chosen_for_them(device):
    choose = partial(attention.kernel_for, device, 64, jnp.bfloat16)
    ranged = attention.pallas if device is H100 else attention.flash
    for packs in (True, False):
        assert choose(AttentionNeeds(packs, windowed=True)) is ranged
        assert choose(AttentionNeeds(packs, windowed=True, softcap=True)) is ranged
        assert choose(AttentionNeeds(packs, part=True)) is ranged
        for others in (AttentionNeeds(packs, branches=True), AttentionNeeds(packs, softcap=True)):
            assert choose(others) is (attention.splash if device is TPU else ranged)


def test_a_kernel_that_lacks_something_refuses_it():
    q, k, v, _ = arrays(np.random.default_rng(0), 1, 8, 2, 1, 8, jnp.float32)
    rows = Rows(jnp.ones((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32))
    plain = Rows(rows.segments)
    with pytest.raises(ValueError, match="splash attention does not support sliding windows"):
        attention.splash(q, k, v, plain.ranges(4))
    for ranges, softcap in ((rows.ranges(), None), (plain.ranges(4), None), (plain.ranges(), 30.0)):
        with pytest.raises(ValueError, match="cuDNN attention supports no shared prompts, sliding window"):
            attention.cudnn(q, k, v, ranges, softcap)


def test_a_window_that_no_row_reaches_leaves_the_fast_kernel(monkeypatch):
    used = []
    for name in ("cudnn", "pallas"):
        monkeypatch.setattr(attention, name, lambda q, *rest, name=name: used.append(name) or q)
    shapes = [jax.ShapeDtypeStruct((2, 40, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=H100)):
        for window in (40, 39):
            layers = AttentionLayers((LayerKind(Rope(1e4), window),), (0,), 64)

            def layer(q, k, v, ranges, layers=layers):
                return attention.attention(q, k, v, layer_ranges(layers, None, ranges), packed=False)

            jax.jit(layer).trace(*shapes, abstract_ranges(2, 40))
    assert used == ["cudnn", "pallas"]


@pytest.mark.parametrize(
    ("device", "sizes", "rows", "expected"),
    [
        (H100, (1, 1), (False, False, [None], None), "cuDNN"),
        (H100, (1, 1), (False, True, [None], None), "Pallas: rows are packed"),
        (TPU, (1, 1), (False, True, [None], 50.0), "splash"),
        (H100, (1, 1), (False, False, [4096], None), "cuDNN"),
        (H100, (1, 1), (False, False, [512, None], None), "Pallas: sliding windows of 512"),
        (
            H100, (1, 1), (True, True, [512, 1024], 30.0),
            "Pallas: rows are packed; responses share their prompt; sliding windows of 512 and 1024; scores "
            "are capped at 30",
        ),
        (
            TPU, (1, 1), (True, True, [512, None], 50.0),
            "blockwise XLA (flash): sliding windows of 512",
        ),
        (TPU, (1, 1), (True, True, [None], None), "splash"),
        (
            H100, (4, 1), (False, True, [None], None),
            "Pallas, heads divided over mesh.context: rows are packed",
        ),
        (
            H100, (4, 2), (False, False, [None], None),
            "Pallas, keys gathered over mesh.context: 4 heads do not divide over mesh.context x mesh.tensor",
        ),
        (described("cpu", "cpu"), (1, 1), (True, True, [512], 50.0), "blockwise XLA (flash)"),
    ],
)  # fmt: skip
def test_the_start_up_line_names_the_kernel_that_runs(device, sizes, rows, expected):
    """On an abstract mesh of (context, tensor) devices, for rows of 2048 tokens and 4 heads; rows: branches,
    packed, windows and soft cap.
    """
    mesh = AbstractMesh(
        (1, 1, 1, *sizes), ("slices", "data", "fsdp", "context", "tensor"), abstract_device=device
    )
    q = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        line = attention.attention_line(q, 2, *rows[:3], settings=AttentionSettings(rows[3]))
    assert line == f"attention: {expected}"
