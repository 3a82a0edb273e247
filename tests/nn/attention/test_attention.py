"""Laws of attention: every kernel equals `dense`, on one device or many, and none grows with T x T."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh
from jaxft.nn.attention import attention, flash_attention
from jaxft.nn.attention.attention import AttentionNeeds
from jaxft.nn.attention.flash_attention import key_ranges

QUERIES, KEYS, ROW = (
    ("rows", "time", "heads", "head_dim"),
    ("rows", "time", "kv_heads", "head_dim"),
    ("rows", "time"),
)


def packed(rng, B, T, most=4, padding=True):
    """Segments 1, 2, ... of unequal length in each row, the last tokens padding; branches 0 (shared) first,
    then 1, 2, 3.
    """
    segments, branches = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for b in range(B):
        used = T - int(rng.integers(0, T // 2 + 1)) if padding else T
        cuts = np.sort(rng.integers(0, used + 1, rng.integers(0, most)))
        for n, (start, stop) in enumerate(zip([0, *cuts], [*cuts, used], strict=True)):
            segments[b, start:stop] = n + 1
            branches[b, start:stop] = np.sort(rng.integers(0, 4, stop - start))
    return jnp.asarray(segments), jnp.asarray(branches)


def arrays(rng, B, T, H, K, E, dtype):
    """q, k, v and a cotangent for o."""
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, E)), dtype) for heads in (H, K, K, H))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(fn, q, k, v, cotangent, *rest):
    o, back = jax.vjp(lambda q, k, v: fn(q, k, v, *rest), q, k, v)
    return o, *back(cotangent)


def assert_close(found, expected, tolerance):
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.all(np.isfinite(x)), name
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max()), name


def by_the_definition(q, k, v, segments, branches):
    """Python loops over single queries: independent of everything under test."""
    q, k, v, segments = (np.asarray(x) for x in (q, k, v, segments))
    branches = np.zeros_like(segments) if branches is None else np.asarray(branches)
    o = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        seen = [
            s
            for s in range(t + 1)
            if segments[b, s] == segments[b, t] != 0 and branches[b, s] in (0, branches[b, t])
        ]
        if seen:
            score = k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[3])
            weight = np.exp(score - score.max())
            o[b, t, h] = weight @ v[b, seen, g] / weight.sum()
    return o


@pytest.mark.parametrize("branched", [False, True])
def test_dense_is_the_definition(branched):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, _ = arrays(rng, 3, 17, 4, 2, 8, jnp.float64)
        segments, branches = packed(rng, 3, 17)
        branches = branches if branched else None
        found = attention.dense(q, k, v, key_ranges(segments, branches))
        np.testing.assert_allclose(found, by_the_definition(q, k, v, segments, branches), atol=1e-13)


@pytest.mark.quick_cases("3-45-*-True", "2-37-*-False", "1-1-*-False", "1-300-*-True")
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "E", "block"),
    [
        (3, 45, 4, 2, 8, 16),
        (2, 37, 3, 1, 4, 8),
        (2, 64, 2, 2, 8, 16),
        (2, 13, 6, 3, 8, 256),
        (1, 1, 2, 1, 4, 256),
        (1, 300, 3, 3, 8, 256),
    ],
)
def test_flash_equals_dense_in_value_and_gradient(B, T, H, K, E, block, branched):
    rng = np.random.default_rng(T)
    with jax.enable_x64(True):
        x = arrays(rng, B, T, H, K, E, jnp.float64)
        segments, branches = packed(rng, B, T)
        rest = (key_ranges(segments, branches if branched else None),)
        expected = value_and_gradients(attention.dense, *x, *rest)
        assert_close(value_and_gradients(partial(attention.flash, block=block), *x, *rest), expected, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02), (jnp.float16, 0.003)]
)
def test_error_of_narrow_dtypes_is_their_rounding(dtype, tolerance):
    rng = np.random.default_rng(1)
    narrow = arrays(rng, 2, 80, 4, 2, 16, dtype)
    rest = (key_ranges(*packed(rng, 2, 80)),)
    found = value_and_gradients(partial(attention.flash, block=32), *narrow, *rest)
    assert all(x.dtype == dtype for x in found)
    with jax.enable_x64(True):
        expected = value_and_gradients(attention.dense, *(x.astype(jnp.float64) for x in narrow), *rest)
    assert_close(found, expected, tolerance)


def test_the_error_of_bfloat16_is_at_most_twice_the_rounding_of_the_reference():
    x = arrays(np.random.default_rng(0), 2, 256, 4, 2, 128, jnp.bfloat16)
    rows = key_ranges(jnp.ones((2, 256), jnp.int32))
    found, rounded = (value_and_gradients(fn, *x, rows) for fn in (attention.flash, attention.dense))
    truth = value_and_gradients(attention.dense, *(a.astype(jnp.float32) for a in x), rows)
    for ours, reference, exact in zip(found, rounded, truth, strict=True):
        ours, reference = (np.abs(np.asarray(a, np.float32) - exact).max() for a in (ours, reference))
        assert ours <= 2 * reference


def test_large_scores_stay_finite():
    rng = np.random.default_rng(2)
    q, k, v, do = arrays(rng, 1, 40, 2, 1, 8, jnp.float32)
    rows = key_ranges(packed(rng, 1, 40)[0])
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in (100 * q, 100 * k, v, do))
        expected = value_and_gradients(attention.dense, *wide, rows)
    found = value_and_gradients(partial(attention.flash, block=16), 100 * q, 100 * k, v, do, rows)
    assert_close(found, expected, 0.02)  # the resolution of float32 at a score of 10^4 is 10^-3


@pytest.mark.parametrize("kernel", [attention.dense, partial(attention.flash, block=16)])
def test_masked_tokens_change_nothing(kernel):
    """Bit for bit: other segments, other branches, later tokens and padding may have any finite value."""
    rng = np.random.default_rng(3)
    q, k, v, do = arrays(rng, 1, 64, 2, 1, 8, jnp.float32)
    segments = jnp.repeat(jnp.asarray([[1, 2, 3, 0]], jnp.int32), 16, axis=1)
    branches = jnp.asarray([[0] * 20 + [1] * 6 + [2] * 6 + [0] * 32], jnp.int32)
    rows = key_ranges(segments, branches)
    mine = jnp.asarray(
        [*range(16, 20), *range(26, 30)]
    )  # the prompt of the second segment, and most of its second branch
    others = jnp.ones(64, bool).at[mine].set(False)[None, :, None, None]
    do = jnp.where(others, 0, do)
    before = value_and_gradients(kernel, q, k, v, do, rows)
    noisy = (jnp.where(others, x + 50, x) for x in (q, k, v))
    after = value_and_gradients(kernel, *noisy, do, rows)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, mine], y[:, mine])
    for gradient in after[1:]:
        assert not np.any(np.where(others, gradient, 0))


def test_padding_returns_zeros_even_in_rows_of_padding_only():
    x = arrays(np.random.default_rng(4), 2, 40, 2, 1, 8, jnp.float32)
    rows = key_ranges(jnp.zeros((2, 40), jnp.int32))
    for found in value_and_gradients(partial(attention.flash, block=16), *x, rows):
        assert not np.any(found)


def test_packed_examples_equal_examples_alone():
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        q, k, v, _ = arrays(rng, 1, 50, 4, 2, 8, jnp.float64)
        segments = jnp.asarray([[1] * 11 + [2] * 30 + [3] * 9], jnp.int32)
        together = attention.flash(q, k, v, key_ranges(segments), block=16)
        for start, stop in ((0, 11), (11, 41), (41, 50)):
            rows = key_ranges(jnp.ones((1, stop - start), jnp.int32))
            alone = attention.flash(*(x[:, start:stop] for x in (q, k, v)), rows, block=16)
            np.testing.assert_allclose(together[:, start:stop], alone, atol=1e-12)


def test_completions_after_a_shared_prompt_equal_prompt_and_completion_alone():
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        q, k, v, _ = arrays(rng, 1, 40, 4, 2, 8, jnp.float64)
        branches = jnp.asarray([[0] * 13 + [1] * 12 + [2] * 15], jnp.int32)
        together = attention.flash(q, k, v, key_ranges(jnp.ones((1, 40), jnp.int32), branches), block=16)
        for start, stop in ((13, 25), (25, 40)):
            at = jnp.asarray([*range(13), *range(start, stop)])
            rows = key_ranges(jnp.ones((1, len(at)), jnp.int32))
            alone = attention.flash(q[:, at], k[:, at], v[:, at], rows, block=16)
            np.testing.assert_allclose(together[:, at], alone, atol=1e-12)


@partial(jax.jit, static_argnums=1)
def visits(ranges, block):
    """Return the key blocks that each query block visits, and how many."""
    return flash_attention._visits(ranges, ranges.own_start.shape[1], block)


def test_visits_skip_later_blocks_other_segments_padding_and_other_branches():
    segments = jnp.repeat(jnp.asarray([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], jnp.int32), 4, axis=1)
    places, counts = visits(key_ranges(segments), 4)
    assert counts.tolist() == [1, 2, 1, 2, 0, 1, 2, 3, 4, 5]
    assert places[3, :2].tolist() == [2, 3]
    assert places[8, :4].tolist() == [5, 6, 7, 8]
    branches = jnp.repeat(jnp.asarray([[0, 1, 2, 3, 3]] * 2, jnp.int32), 4, axis=1)
    places, counts = visits(key_ranges(segments, branches), 4)
    assert counts.tolist()[5:] == [1, 2, 2, 2, 3]
    assert places[9, :3].tolist() == [5, 8, 9]


@pytest.mark.quick_cases("data-False")
@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize(
    "shape", [MeshShape(data=8), MeshShape(data=2, fsdp=2, tensor=2)], ids=["data", "all"]
)
def test_sharded_equals_unsharded_and_moves_nothing(shape, branched):
    rng = np.random.default_rng(8)
    mesh = make_mesh(shape)
    with jax.enable_x64(True):
        x = arrays(rng, 8, 40, 4, 2, 8, jnp.float64)
        segments, branches = packed(rng, 8, 40)
        rest = key_ranges(segments, branches if branched else None)
        expected = value_and_gradients(attention.dense, *x, rest)
        placed = [
            jax.device_put(a, array_sharding(mesh, names, a.shape))
            for a, names in zip(x, (QUERIES, KEYS, KEYS, QUERIES), strict=True)
        ]
        placed.append(jax.tree.map(lambda a: jax.device_put(a, array_sharding(mesh, ROW, a.shape)), rest))
        with jax.set_mesh(mesh):
            compiled = value_and_gradients.lower(attention.attention, *placed).compile()
            assert_close(compiled(*placed), expected, 1e-10)
    between_devices = (
        r"replica_groups=(\{\{\d+,|\[\d+,(?!1\])\d+\])|collective-permute"  # a group of one moves nothing
    )
    assert not re.search(between_devices, compiled.as_text())


def layers(q, k, v, rows, policy):
    """Three layers as a model runs them: scanned, rematerialised."""

    def layer(x, _):
        return jax.checkpoint(lambda x: attention.flash(x, k, v, rows, block=16), policy=policy)(x), None

    return jax.lax.scan(layer, q, length=3)[0]


def products(fn, *args):
    return len(re.findall(r"= dot_general\[", str(jax.make_jaxpr(fn)(*args))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_saved_names_avoid_recomputing_the_forward_pass(monkeypatch, dtype):
    monkeypatch.setattr("jaxft.nn.matmul.cpu_has_bfloat16_matmuls", lambda: True)  # one form of each product
    q, k, v, do = arrays(np.random.default_rng(9), 1, 32, 2, 1, 8, dtype)
    rows = key_ranges(jnp.ones((1, 32), jnp.int32))
    names = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")
    count = {
        policy: products(partial(value_and_gradients, partial(layers, policy=policy)), q, k, v, do, rows)
        for policy in (
            names,
            jax.checkpoint_policies.everything_saveable,
            jax.checkpoint_policies.nothing_saveable,
        )
    }
    assert list(count.values()) == [2 + 5, 2 + 5, 2 + 2 + 5]


def abstract_ranges(*shape, branches=False):
    row = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.eval_shape(key_ranges, row, row if branches else None)


def key_operands(text, kernel, keys):
    """How many operands of shape `keys` (2x1024x2x64) each call of a kernel has in the text of a lowered
    program.
    """
    types = [line.rpartition(" : (")[2].partition(") -> ")[0] for line in text.splitlines() if kernel in line]
    return [one.count(f"tensor<{keys}x") for one in types]


def repeating(kernel):
    """A kernel's form that is to be avoided: keys and values are repeated for every query head."""

    def fn(q, k, v, ranges):
        return kernel(q, *(jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v)), ranges)

    return fn


def test_no_program_has_a_t_by_t_matrix():
    """Temporaries of a gradient grow with T (here 2 x), not with T^2 (4 x); one head's float32 scores would
    be 4 MB.
    """

    def temporaries(T):
        shapes = [jax.ShapeDtypeStruct((1, T, heads, 8), jnp.bfloat16) for heads in (4, 2, 2, 4)]
        rows = abstract_ranges(1, T)
        compiled = value_and_gradients.lower(attention.flash, *shapes, rows).compile()
        assert not re.search(rf"\[(\d+,)*{T},{T}[,\]]", compiled.as_text())
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(2048)
    assert large < 2.2 * small


def described(platform, device_kind):
    """A device of an abstract mesh."""
    return AbstractDevice(device_kind, None, platform)


H100 = described("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "expected"),
    [
        (described("cpu", "cpu"), 64, jnp.bfloat16, attention.flash),
        (H100, 128, jnp.bfloat16, attention.pallas),
        (H100, 256, jnp.bfloat16, attention.pallas),
        (H100, 512, jnp.bfloat16, attention.flash),
        (H100, 64, jnp.float32, attention.flash),
        (described("gpu", "Tesla V100-SXM2-16GB"), 64, jnp.float16, attention.flash),
        (described("gpu", "NVIDIA GeForce RTX 2080 Ti"), 64, jnp.float16, attention.flash),
        (described("gpu", "NVIDIA GeForce RTX 4090"), 64, jnp.float16, attention.pallas),
        (described("gpu", "NVIDIA GeForce MX550"), 64, jnp.float16, attention.flash),  # Turing
        (
            described("gpu", "NVIDIA GeForce MX570 A"),
            64,
            jnp.float16,
            attention.pallas,
        ),  # Ampere, as the next
        (described("gpu", "NVIDIA GeForce RTX 2050"), 64, jnp.float16, attention.pallas),
        (described("gpu", "NVIDIA GeForce GT 1030"), 64, jnp.float16, attention.flash),
        (described("gpu", "NVIDIA P106-100"), 64, jnp.float16, attention.flash),  # Pascal
        (described("gpu", "NVIDIA CMP 30HX"), 64, jnp.float16, attention.flash),
        (described("gpu", "NVIDIA CMP 170HX"), 64, jnp.float16, attention.pallas),
        (described("cuda", "NVIDIA A100-SXM4-40GB"), 64, jnp.bfloat16, attention.pallas),
        (described("cuda", "GRID A100-20C"), 64, jnp.bfloat16, attention.pallas),
        (described("gpu", "AMD Instinct MI300X"), 64, jnp.bfloat16, attention.flash),
        (described("tpu", "TPU v5 lite"), 64, jnp.bfloat16, attention.splash),
        (described("tpu", "TPU v5 lite"), 64, jnp.float64, attention.flash),
    ],
)
def test_the_kernel_is_chosen_from_the_described_device(device, head_dim, dtype, expected):
    assert attention.kernel_for(device, head_dim, dtype) is expected


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "why"),
    [
        (H100, 64, jnp.float32, ": GPU kernels compute in bfloat16 or float16, not float32"),
        (H100, 512, jnp.bfloat16, ": GPU kernels need a head_dim of at most 256, got 512"),
        (described("gpu", "Tesla T4"), 64, jnp.float16, ": Tesla T4 has a compute capability below 8.0"),
        (
            described("gpu", "AMD Instinct MI300X"),
            64,
            jnp.float16,
            ": AMD Instinct MI300X is not an NVIDIA GPU",
        ),
        (
            described("tpu", "TPU v5p"),
            64,
            jnp.float16,
            ": TPU kernels compute in bfloat16 or float32, not float16",
        ),
        (described("cpu", "cpu"), 64, jnp.float32, ""),
    ],
)
def test_the_line_says_why_a_device_has_no_kernel_of_its_own(device, head_dim, dtype, why):
    q = jax.ShapeDtypeStruct((2, 64, 4, head_dim), dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        line = attention.attention_line(q, 2, branches=True, windows=(8,))
    assert line == f"attention: blockwise XLA (flash){why}"


@pytest.mark.parametrize(("packed", "expected"), [(True, "pallas"), (False, "cudnn")])
def test_the_kernel_follows_from_the_ambient_mesh_at_trace_time(monkeypatch, packed, expected):
    used = []

    def spy(name):
        def kernel(q, *rest):
            used.append(name)
            return q

        return kernel

    for name in ("pallas", "cudnn", "splash", "flash"):
        monkeypatch.setattr(attention, name, spy(name))
    shapes = [jax.ShapeDtypeStruct((2, 40, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    fn = jax.jit(partial(attention.attention, packed=packed))
    fn.trace(*shapes, abstract_ranges(2, 40))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=H100)):
        fn.trace(*shapes, abstract_ranges(2, 40))
        fn.trace(*shapes, abstract_ranges(2, 40, branches=True))
    assert used == ["flash", expected, "pallas"]


def test_rows_of_one_example_go_to_cudnn_on_nvidia_and_nowhere_else():
    one = AttentionNeeds(packed=False)
    assert attention.kernel_for(H100, 128, jnp.bfloat16, one) is attention.cudnn
    assert attention.kernel_for(H100, 256, jnp.bfloat16, one) is attention.pallas
    assert attention.kernel_for(H100, 64, jnp.float32, one) is attention.flash
    assert attention.kernel_for(described("cpu", "cpu"), 64, jnp.bfloat16, one) is attention.flash


def test_lengths_equal_segments_for_rows_of_one_example():
    """The arguments for cuDNN, computed by the XLA implementation of the same public function."""
    rng = np.random.default_rng(11)
    q, k, v, do = arrays(rng, 3, 40, 4, 2, 16, jnp.float32)
    segments = (np.arange(40)[None] < np.array([[40], [17], [0]])).astype(np.int32)
    do = jnp.where(segments[:, :, None, None] == 0, 0, do)
    with jax.numpy_dtype_promotion("standard"):
        kernel = partial(attention.cudnn, implementation="xla")
        found = value_and_gradients(kernel, q, k, v, do, key_ranges(segments))
    expected = value_and_gradients(attention.dense, q, k, v, do, key_ranges(segments))
    real = segments[:, :, None, None] != 0
    assert np.all(np.isfinite(found[0]))
    assert_close([jnp.where(real, x, 0) for x in found], expected, 1e-5)
