"""Quantised weights: error bounds, equality with bitsandbytes, equal bits on host and device, and slices."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh
from jaxft.nn import quant, quant_formats
from jaxft.nn.quant import (
    KINDS,
    QTensor,
    Quant,
    bits_per_param,
    dequantize,
    is_paired,
    is_qtensor,
    quantize,
    take_rows,
)

EVERY = np.arange(2**16, dtype=np.uint16).reshape(4, 128, 128)
OTHERS = [("int4", 128, None), ("affine4", 32, None), ("nf4", 64, False), ("fp4", 16, False)]
FORMS = [*((kind, None, None) for kind in KINDS), *OTHERS]
PER_CHANNEL = ("int8", "fp8")  # one scale for all inputs of a channel
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f)))


def random(*shape, seed=0, size=0.05):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def unpacked(q):
    """Codes [..., I, O] of a QTensor, by hand."""
    codes = np.asarray(q.codes)
    if not is_paired(q.kind):
        return codes
    *lead, pairs, outs = codes.shape
    return np.stack([codes // 16, codes % 16], -2).reshape(*lead, 2 * pairs, outs)


def scales(q):
    """Scales [..., N, O] in float32, by hand."""
    if q.outer is None:
        return np.asarray(q.scale).astype(np.float32)
    *lead, blocks, outs = q.scale.shape
    flat = quant_formats.DYNAMIC[np.swapaxes(q.scale, -1, -2).reshape(*lead, blocks * outs)]
    flat = flat * np.repeat(q.outer, 256, -1)[..., : blocks * outs] + np.asarray(q.mean)[..., None]
    return np.swapaxes(flat.reshape(*lead, outs, blocks), -1, -2)


def expanded(q):
    """The float32 weight of a QTensor in numpy."""
    ins = q.shape[-2]

    def each(x):
        return np.repeat(x, q.block or ins, -2)[..., :ins, :].astype(np.float32)

    codes, table = unpacked(q), {"nf4": quant_formats.NF4, "fp4": quant_formats.FP4}.get(q.kind)
    codes = codes.view(ml_dtypes.float8_e4m3fn) if q.kind == "fp8" else codes
    value = codes.astype(np.float32) - (8 if q.kind == "int4" else 0) if table is None else table[codes]
    return value * each(scales(q)) + (0 if q.offset is None else each(np.asarray(q.offset)))


# Exactness of 16-bit floats


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_kind_bits_stores_every_value_exactly(dtype):
    weight = jnp.asarray(
        EVERY.view(jnp.dtype(dtype))
    )  # NaNs with their payloads, infinities, subnormals, both zeros
    q = quantize(weight, "bits")
    assert q.codes.dtype == jnp.uint16 and q.dtype == dtype and q.shape == weight.shape
    np.testing.assert_array_equal(q.codes, EVERY)
    back = jax.jit(dequantize)(q)
    assert back.dtype == dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.uint16), EVERY)


# Error bounds


@st.composite
def weights(draw, kinds=KINDS):
    """(weight [..., I, O], kind, block, double): any size and spread, blocks of zeros and outliers, short
    last blocks.
    """
    kind = draw(st.sampled_from(kinds))
    block = None if kind in PER_CHANNEL else draw(st.sampled_from([None, 2, 16, 32, 128]))
    double = draw(st.sampled_from([None, False])) if kind in ("nf4", "fp4") else None
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    ins, outs = 2 * draw(st.integers(1, 90)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal((*lead, ins, outs)) + draw(st.sampled_from([0.0, 0.0, 3.0]))
    if draw(st.booleans()):
        w *= rng.random(w.shape) < draw(st.sampled_from([0.02, 0.5]))
    if draw(st.booleans()):
        w[..., rng.integers(ins), rng.integers(outs)] = draw(st.sampled_from([50.0, -1e4]))
    size = 10.0 ** draw(st.integers(-18, 18))
    return (size * w).astype(draw(st.sampled_from([np.float32, jnp.bfloat16]))), kind, block, double


def blocks_of(w, block):
    """The first and last input of each block."""
    return [(at, min(at + block, w.shape[-2])) for at in range(0, w.shape[-2], block)]


def half_a_step(kind, part):
    """The largest possible error of the values of a block, by the definition of the format."""
    absmax = np.abs(part).max(-2, keepdims=True)
    if kind == "int8":
        return absmax / 127 / 2
    if kind == "fp8":  # three bits of fraction; numbers below 2^-6 are 2^-9 apart
        return np.maximum(np.abs(part) * 2.0**-4, absmax / 448 * 2.0**-10)
    if kind == "int4":
        return absmax / 7 / 2 * (1 + 2**-7)  # the scale is rounded up to bfloat16
    if kind == "affine4":
        least, most = part.min(-2, keepdims=True), part.max(-2, keepdims=True)
        return (most - least + np.abs(least) * 2**-7) / 15 / 2 * (1 + 2**-7)
    table = np.sort({"nf4": quant_formats.NF4, "fp4": quant_formats.FP4}[kind])
    return absmax * np.diff(table).max() / 2


@given(weights())
@settings(max_examples=150, deadline=None)
def test_errors_are_at_most_half_a_step(example):
    w, kind, block, double = example
    q = quantize(w, kind, block, double)
    wide, ins = w.astype(np.float64), w.shape[-2]
    plain, back, scale = quantize(w, kind, block, False), expanded(q).astype(np.float64), scales(q)
    assert q.shape == w.shape == back.shape
    for n, (start, end) in enumerate(blocks_of(w, q.block or ins)):
        part = wide[..., start:end, :]
        moved = np.abs(
            np.float64(scale[..., n, None, :]) - np.float64(plain.scale[..., n, None, :])
        )  # by double quantisation
        allowed = half_a_step(kind, part) + moved + np.abs(part).max(-2, keepdims=True) * 2e-6
        assert np.all(np.abs(back[..., start:end, :] - part) <= allowed)
    np.testing.assert_array_equal(unpacked(q), unpacked(plain))  # codes are those of the exact scale


@given(weights(("nf4", "fp4")))
@settings(max_examples=60, deadline=None)
def test_a_code_is_the_nearest_level(example):
    w, kind, block, _ = example
    q = quantize(w, kind, block, False)
    table = {"nf4": quant_formats.NF4, "fp4": quant_formats.FP4}[kind].astype(np.float64)
    codes = unpacked(q)
    for n, (start, end) in enumerate(blocks_of(w, q.block)):
        scale = np.float64(q.scale[..., n, None, :])
        part, found = w[..., start:end, :].astype(np.float64), table[codes[..., start:end, :]] * scale
        nearest = np.abs(part[..., None] - table * scale[..., None]).min(-1)
        assert np.all(np.abs(part - found) <= nearest + 1e-6 * scale)


@given(weights(("nf4", "fp4")))
@settings(max_examples=60, deadline=None)
def test_quantised_scales_are_within_half_a_step_of_the_dynamic_code(example):
    w, kind, block, _ = example
    q, plain = quantize(w, kind, block, True), quantize(w, kind, block, False)
    *lead, blocks, outs = plain.scale.shape
    flat = np.swapaxes(plain.scale, -1, -2).reshape(*lead, blocks * outs).astype(np.float64)
    found = np.swapaxes(scales(q), -1, -2).reshape(*lead, blocks * outs).astype(np.float64)
    np.testing.assert_allclose(q.mean, flat.mean(-1), rtol=1e-6)
    largest = np.diff(quant_formats.DYNAMIC).max() / 2
    for start in range(0, blocks * outs, 256):
        away = flat[..., start : start + 256] - np.asarray(q.mean, np.float64)[..., None]
        outer = np.abs(away).max(-1, keepdims=True)
        error = np.abs(found[..., start : start + 256] - flat[..., start : start + 256])
        assert np.all(error <= outer * largest + 1e-6 * (outer + np.asarray(q.mean)[..., None]))


@every_form
def test_blocks_of_zeros_stay_zero_and_change_no_other_block(form):
    w = random(2, 256, 6)
    w[:, 128:, :3] = 0
    back = np.asarray(dequantize(quantize(w, *form)))
    assert not back[:, 128:, :3].any() or form[0] in PER_CHANNEL
    assert not np.asarray(dequantize(quantize(0 * w, *form))).any()
    assert np.abs(back - w).max() < 0.2 * np.abs(w).max()


@every_form
def test_an_outlier_affects_its_own_block_only(form):
    if form[0] in PER_CHANNEL or form[2] is None and form[0] in ("nf4", "fp4"):
        return  # all inputs of a channel are a block; scales in 8 bits share a mean
    w = random(256, 4)
    plain = np.asarray(dequantize(quantize(w, *form)))
    w[3, 1] = 1000.0
    back = np.asarray(dequantize(quantize(w, *form)))
    spoiled = np.zeros_like(w, bool)
    spoiled[: quantize(w, *form).block, 1] = True
    np.testing.assert_array_equal(back[~spoiled], plain[~spoiled])
    assert back[3, 1] == pytest.approx(1000.0, rel=0.02)


def test_magnitudes_below_2_to_the_minus_80_become_zero():
    w = np.array([[2.0**-81, -1e-44], [2.0**-80, 0.0]], np.float32)
    for kind in KINDS:
        np.testing.assert_allclose(
            dequantize(quantize(w, kind, None, False)), [[0, 0], [2.0**-80, 0]], rtol=0, atol=2.0**-86
        )


@every_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_dequantised_weight_is_code_times_scale_plus_offset_rounded_once(form, dtype):
    q = quantize(random(2, 130, 12).astype(dtype), *form)
    for expand in (dequantize, jax.jit(dequantize)):
        found = np.asarray(expand(q))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expanded(q).astype(dtype))


# The same bits


@every_form
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_host_device_and_jit_give_the_same_bits_stacked_and_by_layer(form, dtype):
    compiled = jax.jit(lambda w: quantize(w, *form))
    rng = np.random.default_rng(0)
    for size in (0.05, 1e-20, 1e20, 3.0):
        w = size * rng.standard_normal((3, 196, 70)) * rng.uniform(0.01, 1, (3, 1, 70)) ** 3
        w[:, 64:128, :3], w[1, 5, 7], w[2, 150] = 0, 40 * size, size
        w = w.astype(dtype)
        whole, other = quantize(w, *form), compiled(w)
        layers = jax.tree.map(lambda *x: np.stack(x), *[quantize(layer, *form) for layer in w])
        assert all(isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(whole))
        assert jax.tree.structure(whole) == jax.tree.structure(other) == jax.tree.structure(layers)
        for x, y, z in zip(*map(jax.tree.leaves, (whole, other, layers)), strict=True):
            assert x.dtype == y.dtype == z.dtype and x.shape == y.shape == z.shape
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes() == np.asarray(z).tobytes()
    eager = quantize(jnp.asarray(w), *form)
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (eager, whole)), strict=True))


@every_form
def test_quantising_a_few_channels_at_a_time_changes_nothing(form, monkeypatch):
    w = random(2, 130, 37)
    for order in "CF":  # files store [out, in], which is read transposed
        laid = np.asarray(w, order=order)
        monkeypatch.setattr(quant, "HOST_CHUNK", 1 << 20)
        whole = quantize(laid, *form)
        monkeypatch.setattr(quant, "HOST_CHUNK", 2 * 130 * 5)
        for x, y in zip(*map(jax.tree.leaves, (quantize(laid, *form), whole)), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)


def test_full_blocks_do_not_depend_on_a_short_last_one():
    w = random(130, 5)
    for kind in ("int4", "nf4", "fp4", "affine4"):
        long, short = quantize(w, kind, 64, False), quantize(w[:128], kind, 64, False)
        np.testing.assert_array_equal(long.codes[:64], short.codes)
        np.testing.assert_array_equal(long.scale[:2], short.scale)
        assert long.scale.shape == (3, 5) and long.shape == (130, 5)


# Size


@pytest.mark.parametrize(
    "form, expected",
    [
        (("int8", None, None), 8 + 32 / 2048),
        (("fp8", None, None), 8 + 32 / 2048),
        (("int4", 64, None), 4 + 16 / 64),
        (("int4", 128, None), 4 + 16 / 128),
        (("nf4", 64, False), 4 + 32 / 64),
        (("fp4", 64, False), 4 + 32 / 64),
        (("nf4", None, None), 4 + 8 / 64 + 32 / (64 * 256) + 32 / (2048 * 1024)),
        (("fp4", None, None), 4 + 8 / 64 + 32 / (64 * 256) + 32 / (2048 * 1024)),
        (("affine4", 32, None), 4 + 32 / 32),
        (("affine4", 64, None), 4 + 32 / 64),
        (("affine4", 128, None), 4 + 32 / 128),
    ],
    ids=str,
)
def test_bits_per_parameter_equal_the_buffers(form, expected):
    w = random(2048, 1024)
    q = jax.device_put(quantize(w, *form))
    held = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(q))
    assert 8 * held / w.size == expected == bits_per_param(q)
    if form[0] in ("nf4", "fp4") and form[2] is None:
        assert round(expected, 3) == 4.127  # QLoRA's figure


# bitsandbytes

# Its tables, and the thresholds of its kernels (csrc), as published
TABLE = {
    "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    "fp4": [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12, 0.0, -0.0625 / 12, -8 / 12,
    -1.0, -4 / 12, -6 / 12,
            -2 / 12, -3 / 12],
}  # fmt: skip
NF4_RISES = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
             -0.23460740596055984,
             -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513,
             0.2035212516784668,
             0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482,
             0.8614784181118011]  # fmt: skip
FP4_RISES = [
    (0.8333333, 3),
    (0.583333, 2),
    (0.4166667, 5),
    (0.29166667, 4),
    (0.20833333, 7),
    (0.0859375, 6),
    (0.00260417, 1),
]


def their_code(kind, x):
    """The kernels' decision for one float32 of magnitude up to 1."""
    if kind == "nf4":
        return sum(x > np.float32(rise) for rise in NF4_RISES)
    return next((code for rise, code in FP4_RISES if abs(x) > np.float32(rise)), 0) + (8 if x < 0 else 0)


def theirs(weight, kind, block=64):
    """quantize_4bit of a torch weight [out, in]: bytes and absmax, over its elements in order."""
    torch = pytest.importorskip("torch")
    flat = weight.float().reshape(-1, block)
    absmax = flat.abs().max(1).values
    scaled = (flat * (1 / absmax.clamp(min=1e-38))[:, None]).reshape(-1).numpy()
    codes = torch.tensor([their_code(kind, x) for x in scaled], dtype=torch.uint8)
    return (codes[0::2] << 4 | codes[1::2]).numpy(), absmax.numpy()


def their_dynamic_code():
    torch = pytest.importorskip("torch")
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def their_nested(absmax, offset):
    """quantize_blockwise of absmax - offset in blocks of 256: codes and the blocks' absmax."""
    torch = pytest.importorskip("torch")
    code = their_dynamic_code()
    away = torch.tensor(absmax) - offset
    groups = torch.nn.functional.pad(away, (0, -len(away) % 256)).reshape(-1, 256)
    outer = groups.abs().max(1).values
    nearest = torch.bucketize(groups * (1 / outer)[:, None], (code[1:] + code[:-1]) / 2)
    return nearest.reshape(-1)[: len(away)].numpy().astype(np.uint8), outer.numpy()


def test_tables_and_thresholds_equal_bitsandbytes():
    for kind, table in (("nf4", quant_formats.NF4), ("fp4", quant_formats.FP4)):
        np.testing.assert_array_equal(table, np.array(TABLE[kind], np.float32))
    np.testing.assert_array_equal(quant_formats.NF4_BOUNDS, np.array(NF4_RISES, np.float32))
    np.testing.assert_array_equal(
        quant_formats.FP4_BOUNDS, np.array([rise for rise, _ in FP4_RISES[::-1]], np.float32)
    )
    np.testing.assert_array_equal(quant_formats.DYNAMIC, their_dynamic_code().numpy())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_scales_and_pack_order_equal_bitsandbytes(kind, dtype):
    torch = pytest.importorskip("torch")
    w = random(24, 640) * np.random.default_rng(1).uniform(0.1, 1, (24, 1)).astype(np.float32)  # [out, in]
    weight = torch.tensor(w).to(getattr(torch, dtype))  # bfloat16 hits the thresholds themselves
    packed, absmax = theirs(weight, kind)
    q = quantize(np.ascontiguousarray(weight.float().numpy().T), kind, 64, False)
    np.testing.assert_array_equal(q.codes.T.reshape(-1), packed)
    np.testing.assert_array_equal(q.scale.T.reshape(-1), absmax)
    expected = (
        np.array(TABLE[kind], np.float32)[np.stack([packed >> 4, packed & 15], -1).reshape(-1, 64)]
        * absmax[:, None]
    )
    np.testing.assert_array_equal(np.asarray(dequantize(q)).T, expected.reshape(w.shape))

    nested = quantize(np.ascontiguousarray(weight.float().numpy().T), kind)
    np.testing.assert_allclose(
        nested.mean, torch.tensor(absmax).mean(), rtol=3e-7
    )  # the order of the sum is torch's own
    codes, outer = their_nested(absmax, float(nested.mean))
    np.testing.assert_array_equal(nested.scale.T.reshape(-1), codes)
    np.testing.assert_array_equal(nested.outer, outer)
    scale = their_dynamic_code().numpy()[codes] * np.repeat(outer, 256)[: len(codes)] + nested.mean
    found = quant_formats.decode_scales(nested.scale, nested.outer, nested.mean)
    np.testing.assert_allclose(np.asarray(found).T.reshape(-1), scale, rtol=2e-7)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_float_near_a_threshold_has_the_code_of_the_bitsandbytes_kernels(kind):
    rises = NF4_RISES if kind == "nf4" else [sign * rise for rise, _ in FP4_RISES for sign in (1, -1)]
    near = [np.float32(rise) for rise in [*rises, 0.0, 1.0, -1.0]]
    near = [np.nextafter(x, np.float32(way)) for x in near for way in (-2, x, 2)]
    x = np.clip(np.array([*near, *[1.0] * (2 - len(near) % 2)], np.float32), -1, 1)
    x = np.where(np.abs(x) < 2.0**-80, 0, x).astype(np.float32)  # zero has no sign here
    codes = unpacked(quantize(x[:, None], kind, 2 * len(x), False))
    np.testing.assert_array_equal(codes[:, 0], [their_code(kind, value) for value in x])


# Pytree behaviour


@every_form
def test_scan_vmap_and_indexing_slice_a_qtensor_and_its_shape(form):
    w = random(2, 130, 12)
    q = quantize(w, *form)
    assert q.shape == (2, 130, 12) and jax.eval_shape(lambda: q).shape == q.shape

    def body(_, layer):
        assert layer.shape == (130, 12)
        return None, dequantize(layer)

    def sliced(q):
        return jnp.stack([dequantize(jax.tree.map(lambda x, i=i: x[i], q)) for i in range(2)])

    for found in (lambda q: jax.lax.scan(body, None, q)[1], jax.vmap(dequantize), sliced):
        np.testing.assert_array_equal(jax.jit(found)(q), expanded(q))


@every_form
def test_take_rows_equals_rows_of_the_dequantised_table(form):
    q, ids = quantize(random(130, 12), *form), jnp.array([[0, 1, 129], [64, 63, 1]])
    np.testing.assert_array_equal(
        jax.jit(take_rows)(q, ids), np.asarray(jax.jit(dequantize)(q))[np.asarray(ids)]
    )
    plain = quantize(jnp.asarray(random(9, 4), jnp.bfloat16), "bits")
    np.testing.assert_array_equal(
        take_rows(plain, ids % 9), np.asarray(dequantize(plain))[np.asarray(ids % 9)]
    )


def test_look_up_and_selection_return_the_same_levels():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 5, 7), np.uint8))
    for table in (quant_formats.NF4, quant_formats.FP4):
        for way in (quant_formats.look_up, quant_formats.by_bits, quant_formats.level):
            found = jax.jit(partial(way, table=table))(codes)
            assert found.dtype == jnp.float32 and np.array_equal(found, table[np.asarray(codes)])


def test_is_qtensor_stops_at_a_qtensor_whose_kind_is_structure():
    q = quantize(jnp.ones((2, 2), jnp.bfloat16), "bits")
    assert is_qtensor(q) and not is_qtensor(q.codes) and len(jax.tree.leaves(q)) == 1
    assert jax.tree.leaves({"w": q}, is_leaf=is_qtensor) == [q]
    weight = np.ones((4, 2), np.float16)
    forms = [
        ("bits", None, None),
        *((kind, None, None) for kind in PER_CHANNEL),
        *itertools.product(("int4",), (2, 4), (None,)),
    ]
    forms += [*itertools.product(("nf4", "fp4"), (2, 4), (False, True))]
    for one, other in itertools.combinations(forms, 2):
        assert jax.tree.structure(quantize(weight, *one)) != jax.tree.structure(quantize(weight, *other))
    assert len(jax.tree.leaves(quantize(weight, "nf4"))) == 4


def test_a_qtensor_is_sharded_like_its_weight():
    mesh = make_mesh(MeshShape(2, 2, 2))
    place = array_sharding(mesh, ("layers", "width", "mlp"), (3, 8, 8))
    weight = jnp.arange(3 * 8 * 8, dtype=jnp.bfloat16).reshape(3, 8, 8)
    q = jax.device_put(quantize(weight, "bits"), place)
    assert q.codes.addressable_shards[0].data.shape == (3, 4, 4)
    out = jax.jit(dequantize)(q)
    assert out.sharding.is_equivalent_to(place, 3)
    np.testing.assert_array_equal(out, weight)


def test_a_qtensor_has_no_gradient():
    q = QTensor(jnp.zeros((2, 2), jnp.uint16), "bits", jnp.dtype(jnp.bfloat16))
    with pytest.raises(TypeError):
        jax.grad(lambda q: dequantize(q).sum().astype(jnp.float32))(q)


# Errors


@pytest.mark.parametrize(
    "call, says",
    [
        (
            partial(quantize, np.ones((2, 2)), "int3"),
            "quant=int3: this quantisation is not implemented; use one of int8, fp8, int4, ",
        ),
        (
            partial(quantize, np.ones((2, 2), np.float32), "bits"),
            "kind 'bits' stores 16-bit floats, got float32; cast",
        ),
        (
            partial(quantize, np.ones((2, 2), np.uint16), "bits"),
            "kind 'bits' stores 16-bit floats, got uint16",
        ),
        (partial(quantize, np.ones((2, 2), np.int32), "nf4"), "nf4 stores floats, got int32"),
        (
            partial(quantize, np.ones((0, 8)), "nf4"),
            "a weight of shape (0, 8) cannot be quantised; pass one of shape [..., inputs, outputs]",
        ),
        (
            partial(quantize, np.ones(8), "nf4"),
            "a weight of shape (8,) cannot be quantised; pass one of shape [..., inputs, outputs]",
        ),
        (
            partial(quantize, np.ones((3, 2)), "nf4"),
            "two codes of nf4 share a byte along the input axis, whose size 3 is odd",
        ),
        (partial(Quant, "nf3"), "quant=nf3: this quantisation is not implemented; use one of int8"),
        (
            partial(Quant, "int8", 64),
            "quant.block=64: int8 has one scale per channel; set quant.block=none",
        ),
        (
            partial(Quant, "fp8", 128),
            "quant.block=128: fp8 has one scale per channel; set quant.block=none",
        ),
        (
            partial(Quant, "int8", fp8_matmul=True),
            "quant.fp8_matmul=True needs quant=fp8 or quant=checkpoint, got quant=int8; leave it out",
        ),
        (partial(Quant, "fp8", fp8_matmul="yes"), "quant.fp8_matmul='yes'; use one of true, false, none"),
        (partial(Quant, "nf4", 63), "quant.block=63 must be even and at least 2, because two nf4 codes"),
        (partial(Quant, "int4", 0), "quant.block=0; expected at least 1, or none"),
        (
            partial(Quant, "int4", None, True),
            "quant.double=true: the scales of int4 cannot be quantised; use quant.double=false, or quant=nf4",
        ),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)
def test_weights_that_cannot_be_quantised_are_refused_in_one_line(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**80])
@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_values_without_a_code_are_refused_with_their_position(kind, value, wrap):
    w = random(2, 6, 4)
    w[1, 3, 2] = value
    shown = {np.inf: "inf", -np.inf: "-inf"}.get(value, f"{value}")
    with pytest.raises(ValueError) as error:
        quantize(wrap(w), kind)
    problem = f"1 of 48 values are not finite or too large, the first {shown} at (1, 3, 2)"
    assert str(error.value) == f"{problem}; correct the weight, or set quant=none"


def test_quant_settings_have_the_defaults_of_their_kind():
    assert Quant() == Quant("nf4") and Quant("nf4").block is None
    assert quantize(random(128, 2), "nf4").block == 64 and quantize(random(128, 2), "int8").block is None
