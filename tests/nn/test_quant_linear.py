"""Functions of a weight accept a quantised one: values and gradients equal those of the dequantised one."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import DEEP, batch32
from tiny_model import CONFIG, assert_close, examples, one_by_one, tiny

from jaxft.distributed import sharding
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import layers, matmul, tree
from jaxft.nn.adapters import lora
from jaxft.nn.adapters.lora import ADAPTERS, Adapted, Adapter
from jaxft.nn.layers import lm_head
from jaxft.nn.quant import KINDS, Quant, dequantize, is_qtensor, quantize
from jaxft.objectives.logprobs import token_logps
from jaxft.objectives.sft import sft
from jaxft.train import trainable_params
from jaxft.weights import storage

FORMS = [
    *((kind, None, None) for kind in ("int8", "fp8")),  # formats with a scale per channel
    *((kind, 16, None) for kind in KINDS if kind not in ("int8", "fp8")),
    ("nf4", 16, False),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f)))
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time to compile


def random(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def packed(form, *shape, seed=0):
    return jax.tree.map(jnp.asarray, quantize(np.asarray(random(*shape, seed=seed)), *form))


def plain(whole):
    """Dequantise every weight of a tree."""
    return jax.tree.map(lambda x: jit(dequantize)(x) if is_qtensor(x) else x, whole, is_leaf=is_qtensor)


def assert_same(fn, w, *args):
    """Value and gradients by `args` of sum(cos * fn(w, ...)) for w and for its dequantised form."""

    def both(w):
        def loss(*args):
            y = fn(w, *args)
            return jnp.sum(jnp.sin(y.astype(jnp.float64)) * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

        return jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)

    assert_close(both(w), both(plain(w)))


# Matmuls


@every_form
@pytest.mark.parametrize("transposed", [False, True], ids=["in-out", "out-in"])
def test_matmul_of_a_quantised_weight(x64, form, transposed):
    w, x = packed(form, *((6, 42) if transposed else (42, 6))), random(2, 3, 42, seed=1)
    assert_same(lambda w, x: matmul.matmul(x, w, transposed, False), w, x)
    assert_same(lambda w, x: matmul.matmul(x, w, transposed, True), w, x)


@pytest.mark.quick_cases("int8*", "nf4-16-False", "affine4*")
@every_form
def test_matmuls_with_one_and_several_adapters(x64, form):
    w, x, key = packed(form, 42, 6), random(6, 5, 42, seed=1), jax.random.key(0)
    a, b, scale = random(42, 3, seed=2), random(3, 6, seed=3), jnp.asarray(1.7)
    assert_same(lambda w, x, a, b: matmul.linear(x, Adapted(w, a, b, scale, 0.5), key), w, x, a, b)
    a, b, scale = random(3, 42, 2, seed=2), random(3, 2, 6, seed=3), random(3, seed=4)
    over = (ADAPTERS,)
    assert_same(lambda w, x, a, b: matmul.linear(x, Adapted(w, a, b, scale, 0.5, over=over), key), w, x, a, b)


@pytest.mark.quick_cases("kept-nf4-16-None", "remat-nf4-16-False", "remat-int8*", "kept-affine4*")
@every_form
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_a_scan_over_layers_for_several_adapters_by_vmap(x64, form, remat):
    w, x = packed(form, 4, 42, 42), random(5, 42, seed=1)
    a, b, scale = random(3, 4, 42, 2, seed=2), random(3, 4, 2, 42, seed=3), random(4, seed=4)

    def deep(w, x, a, b):
        def body(h, layer):
            w, a, b, scale = layer
            return h + jnp.tanh(matmul.linear(h, Adapted(w, a, b, scale))), None

        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, x, (w, a, b, scale))[
            0
        ]

    assert_same(lambda w, x, a, b: jax.vmap(deep, (None, None, 0, 0))(w, x, a, b), w, x, a, b)


@pytest.mark.quick_cases("int8*", "nf4-16-None", "affine4*")
@every_form
def test_embedding_and_head_from_quantised_tables(x64, form):
    table, head, h, ids = (
        packed(form, 64, 40),
        packed(form, 40, 64, seed=1),
        random(2, 5, 40, seed=2),
        jnp.array([[3, 0], [63, 3]]),
    )
    found = jax.jit(layers.embed, static_argnums=2)(table, ids, table.dtype)
    np.testing.assert_array_equal(found, np.asarray(jit(dequantize)(table))[np.asarray(ids)])
    assert_same(lm_head, {"embed": table}, h)
    assert_same(lm_head, {"head": head}, h)
    pair = (random(40, 3, seed=3), random(3, 64, seed=4), jnp.asarray(0.7))
    assert_same(lambda w, h: lm_head({**w, "head": Adapted(None, *pair)}, h), {"embed": table}, h)


@pytest.mark.quick_cases("int8*", "nf4-16-False", "fp8*")
@every_form
def test_merging_adds_to_the_dequantised_weight(form):
    w = packed(form, 2, 42, 6)
    pair = {"a": random(2, 42, 3, seed=1), "b": random(2, 3, 6, seed=2), "scale": random(2, seed=3)}
    for dtype in (jnp.float32, jnp.bfloat16):
        merge = jit(lambda w, dtype=dtype: lora.merge_leaf(w, pair, dtype))
        assert merge(w).dtype == dtype
        assert_close(
            np.float64(merge(w)), np.float64(merge(dequantize(w))), 1e-6 if dtype == jnp.float32 else 2**-8
        )


@every_form
def test_results_have_the_dtype_of_the_activations_without_promotion(form):
    w = quantize(np.asarray(random(42, 6, dtype=jnp.bfloat16)), *form)
    x = random(5, 42, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        y = jax.eval_shape(lambda w, x: matmul.linear(x, w), w, x)
        back = jax.eval_shape(
            lambda w, x: jax.vjp(lambda x: matmul.linear(x, w), x)[1](matmul.linear(x, w))[0], w, x
        )
        row = jax.eval_shape(lambda w, ids: layers.embed(w, ids, w.dtype), w, jnp.array([[1]]))
        logits = jax.eval_shape(lambda h, w: lm_head({"embed": w}, h), x[:, :6], w)
    assert y.dtype == back.dtype == row.dtype == jnp.bfloat16 and logits.dtype == jnp.float32


# Whole models


def quantised(whole, form, pattern=r"layers/(attn|mlp)/.*"):
    def pack(path, x):
        return quantize(np.asarray(x), *form) if re.fullmatch(pattern, path) else x

    return {**whole, "base": tree.map_with_path(pack, whole["base"])}


@pytest.mark.quick_cases("int8")
@pytest.mark.parametrize(
    "form, remat",
    [(FORMS[0], "none"), (FORMS[2], "full"), (FORMS[3], "projections")],
    ids=["int8", "int4", "nf4"],
)
def test_loss_and_gradients_equal_those_of_the_dequantised_base(x64, form, remat):
    model, whole = tiny(adapter=Adapter(rank=3, alpha=5.0, dropout=0.2), remat=remat)
    whole, batch, key = quantised(whole, form), one_by_one(examples(4)), jax.random.key(1)

    def both(whole):
        def fn(adapter):
            return sft(model)({"base": whole["base"], "adapter": adapter}, batch, key, {})[0]

        return jit(jax.value_and_grad(fn))(whole["adapter"])

    assert_close(both(whole), both(plain(whole)))


@pytest.mark.parametrize("form, tied", [(FORMS[0], False), (FORMS[3], True)])
def test_a_quantised_head_and_table_work_in_the_chunked_loss(x64, form, tied):
    model, whole = tiny(adapter=Adapter(rank=3, targets=("q", "head")), tied=tied)
    whole, batch = quantised(whole, form, "head|embed"), one_by_one(examples(4))

    def both(whole):
        def loss(adapter, h):
            return jnp.sum(jnp.sin(token_logps(model, {**whole, "adapter": adapter}, h, batch.targets).logp))

        h = jit(model.hidden)(whole, batch)[0][:, : batch.targets.shape[1]]
        return jit(jax.value_and_grad(loss, (0, 1)))(whole["adapter"], h)

    assert_close(both(whole), both(plain(whole)))


# Memory


@every_form
@pytest.mark.parametrize("adapters", [0, 1, 3])
def test_no_dequantised_weight_is_a_residual(form, adapters):
    w = quantize(random(42, 6, dtype=jnp.bfloat16), *form)
    if adapters:
        each = (adapters,) if adapters > 1 else ()
        a, b, over = jnp.ones((*each, 42, 2)), jnp.ones((*each, 2, 6)), (ADAPTERS,) * len(each)
        w = Adapted(w, a, b, jnp.ones(each), over=over)
    dora = [dataclasses.replace(w, magnitude=jnp.ones((*each, 6)))] if adapters else []
    for weight in (w, *dora):
        kept = jax.tree.leaves(
            jax.eval_shape(
                lambda x, weight=weight: jax.vjp(lambda x: matmul.linear(x, weight), x)[1],
                jnp.ones((3, 42), jnp.bfloat16),
            )
        )
        assert not [x for x in kept if x.shape[-2:] == (42, 6) and jnp.issubdtype(x.dtype, jnp.floating)]
        assert [x for x in kept if x.dtype in (jnp.uint8, jnp.int8)]  # the codes are


def program(kind, config, remat="projections", dora=False):
    """The compiled gradient of the SFT loss of a bfloat16 model, stored as in a run."""
    model, quant = llama(config, jnp.bfloat16, remat=remat), Quant(kind) if kind else None
    t = trainable_params.partition_params(model, Adapter(rank=3, dora=dora), None, quant)
    mesh = sharding.make_mesh(sharding.MeshShape(1), jax.devices()[:1])
    trainable, frozen = trainable_params.split_params(t, storage.sharded_shapes(t.stored, mesh))

    def gradient(trainable, frozen, batch):
        return jax.grad(lambda some: sft(t.model)(tree.combine(some, frozen), batch, None, {})[0])(trainable)

    return jit(gradient).lower(trainable, frozen, batch32()).compile()


@pytest.mark.quick_cases("nf4-full*", "int8*")
@pytest.mark.parametrize(
    "kind, remat, dora",
    [
        ("nf4", "full", False),
        ("nf4", "projections", True),
        ("nf4", "none", False),
        ("int8", "none", True),
        ("fp8", "none", False),
    ],
)
def test_no_float_copy_of_the_base_exists_in_a_step(kind, remat, dora):
    text = program(kind, DEEP, remat, dora).as_text()
    found = {
        (dtype, tuple(map(int, dims.split(","))))
        for dtype, dims in re.findall(r"\b(\w+)\[13,([\d,]+)\]", text)
    }
    for size in ((32, 40), (32, 20), (40, 32), (32, 48), (48, 32)):
        floats = {dtype for dtype, dims in found if dims == size}
        assert floats <= {"s8", "u8"}, (size, floats)
        held = {"int8": ("s8", size), "fp8": ("u8", size)}.get(kind, ("u8", (size[0] // 2, size[1])))
        assert held in found, size


@pytest.mark.slow
def test_a_step_stores_the_base_in_its_bits_and_little_else():
    config = LlamaConfig(**{**DEEP.__dict__, "layers": 40, "width": 64, "mlp": 192, "vocab": 48})
    wide, narrow = (program(kind, config, "full").memory_analysis() for kind in (None, "nf4"))
    size = 40 * (64 * 40 * 2 + 64 * 20 * 2 + 3 * 64 * 192)
    saved = wide.argument_size_in_bytes - narrow.argument_size_in_bytes
    assert saved == pytest.approx(size * (16 - 4.127) / 8, rel=0.01)
    assert narrow.temp_size_in_bytes < wide.temp_size_in_bytes + 0.1 * 2 * size


def test_a_run_stores_its_targets_quantised_and_nothing_else():
    config = dataclasses.replace(CONFIG, tied=False)
    mesh = sharding.make_mesh(sharding.MeshShape(1), jax.devices()[:1])
    for pattern, expected in (  # of quant.targets
        ("all-linear", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("layers/mlp/.*|head", {"gate", "up", "down", "head"}),
        (".*/q|embed", {"q", "embed"}),
        (".*", {"q", "k", "v", "o", "gate", "up", "down", "head", "embed"}),
    ):
        t = trainable_params.partition_params(
            llama(config, jnp.bfloat16), Adapter(rank=2), None, Quant("int4", 16, targets=pattern)
        )
        whole = tree.paths(storage.sharded_shapes(t.stored, mesh), is_qtensor)
        found = {path.split("/")[-1] for path, x in whole.items() if is_qtensor(x) and x.kind == "int4"}
        assert found == expected
        assert all(is_qtensor(x) == (x.shape[-1] > 3 and len(x.shape) > 1 and "norm" not in path)
                   for path, x in whole.items() if path.startswith("base/"))  # fmt: skip


@pytest.mark.parametrize(
    "adapter, train, quant, says",
    [
        (None, None, Quant(), "quant=nf4 freezes base/layers/attn/k, which is trainable;"),
        (Adapter(), "adapter/.*|base/layers/mlp/up", Quant("int8"), "quant=int8 freezes base/layers/mlp/up"),
        (Adapter(), None, Quant(targets="layers/up"),
        "quant.targets='layers/up' matches no matrix; use a pattern of embed, head, "),
        (Adapter(), None, Quant(targets=".*norm"),
        "quant.targets='.*norm' matches no matrix; use a pattern of embed, head, "),
        (Adapter(), None, Quant(targets="("), "quant.targets: '(' is not a valid regular expression"),
    ],
)  # fmt: skip
def test_contradicting_settings_are_refused_in_one_line(adapter, train, quant, says):
    with pytest.raises(ValueError) as error:
        trainable_params.partition_params(llama(CONFIG), adapter, train, quant)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    trained = trainable_params.partition_params(
        llama(CONFIG), Adapter(), "adapter/.*|base/final_norm|base/embed", Quant()
    )
    assert trained.mask["base"]["embed"]


def test_the_parameter_table_shows_bits_per_parameter():
    t = trainable_params.partition_params(llama(PRESET), Adapter(), None, Quant("nf4"))
    lines = [
        line
        for line in trainable_params.parameter_table(t).splitlines()
        if line.startswith("base/layers/mlp/up")
    ]
    assert len(lines) == 1 and "nf4 4.127 bits" in lines[0] and lines[0].endswith("frozen")
    assert storage.quantisation_summary(t.stored) == "87 % of the base in nf4, 4.127 bits a parameter"


PRESET = LlamaConfig(vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336)
