"""Layers against plain autodiff and transformers; precision, dtypes, residuals of the backward pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import decoded, prefilled
from jax.ad_checkpoint import print_saved_residuals
from tiny_model import assert_close, examples, one_by_one, tiny

from jaxft.distributed import sharding
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import layers, matmul, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import dequantize, quantize
from jaxft.objectives.sft import sft
from jaxft.train import trainable_params
from jaxft.weights import storage

RNG = np.random.default_rng(0)
# All sizes differ, so that a shape identifies an array.
DEEP = LlamaConfig(vocab=88, width=32, layers=13, heads=4, kv_heads=2, head_dim=10, mlp=48)
B, T = 4, 16


def random(*shape, dtype=None):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def batch32(count=B):
    """A batch as a run has it: 32-bit integers and float32 weights."""

    def narrow(x):
        return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)

    return jax.tree.map(narrow, one_by_one(examples(count)))


# Matmuls


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("transposed", [False, True], ids=["in-out", "out-in"])
def test_matmul_equals_plain_autodiff_in_value_and_gradients(x64, packed, transposed):
    x, cotangent = random(2, 3, 5), random(2, 3, 4)
    w = random(4, 5) if transposed else random(5, 4)
    w = quantize(w.astype(jnp.bfloat16), "bits") if packed else w

    def plain(x, w):
        w = dequantize(w).astype(x.dtype) if packed else w
        return x @ (w.T if transposed else w)

    def both(product):
        if packed:
            return jax.jit(jax.value_and_grad(lambda x: jnp.sum(cotangent * jnp.sin(product(x, w)))))(x)
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(cotangent * jnp.sin(product(x, w))), (0, 1)))(
            x, w
        )

    assert_close(both(lambda x, w: matmul.matmul(x, w, transposed, True)), both(plain))
    assert_close(both(lambda x, w: matmul.matmul(x, w, transposed, False)), both(plain))


def test_matmuls_accumulate_in_float32_and_return_the_compute_dtype():
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.float32)
    for wide_result, dtype in ((False, jnp.bfloat16), (True, jnp.float32)):
        y = matmul.matmul(x, w, False, wide_result)
        assert y.dtype == dtype and float(y[0, 0]) == 4096  # in bfloat16 a sum of ones stops at 256
    dx, dw = jax.grad(lambda x, w: jnp.sum(matmul.linear(x, w)).astype(jnp.float32), (0, 1))(
        jnp.ones((4096, 1), jnp.bfloat16), w[:1]
    )
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32 and float(dw[0, 0]) == 4096


def test_a_weight_gradient_has_the_precision_of_the_accumulator():
    x, g = random(512, 8, dtype=jnp.bfloat16), random(512, 4, dtype=jnp.bfloat16)
    dw = jax.vjp(matmul.linear, x, random(8, 4, dtype=jnp.float32))[1](g)[1]
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    assert np.abs(dw - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(
    "rows, ins, outs", [(64, 16, 48), (64, 48, 16), (128, 576, 4), (6, 16, 48), (64, 48, 3), (1, 8, 8)]
)
def test_outer_is_the_sum_of_outer_products_for_every_shape(rows, ins, outs):
    x, g = (jnp.asarray(RNG.normal(size=(rows, n)), jnp.bfloat16) for n in (ins, outs))
    target = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    for f in (
        matmul.outer,
        lambda x, g, out: jax.vmap(lambda x, g: matmul.outer(x, g, out))(x[None], g[None])[0],
    ):
        found = jax.jit(f, static_argnums=2)(x, g, jnp.float32)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, target, rtol=0, atol=1e-5 * np.abs(target).max())


@pytest.mark.parametrize("rank", [0, 2], ids=["linear", "lora"])
def test_no_dequantised_weight_is_a_residual(rank):
    from jaxft.nn.adapters.lora import Adapted

    w = quantize(random(6, 5, dtype=jnp.bfloat16), "bits")
    if rank:
        w = Adapted(w, jnp.ones((6, rank)), jnp.ones((rank, 5)), jnp.ones(()))
    kept = jax.tree.leaves(
        jax.eval_shape(lambda x: jax.vjp(lambda x: matmul.linear(x, w), x)[1], jnp.ones((3, 6), jnp.bfloat16))
    )
    assert (6, 5) in {x.shape for x in kept} and {x.dtype for x in kept if x.shape == (6, 5)} == {
        jnp.dtype(jnp.uint16)
    }


# Layers


def test_rms_norm_equals_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = random(2, 5, 24, dtype=jnp.float32), random(24, dtype=jnp.float32)
    theirs = LlamaRMSNorm(24, eps=1e-3)
    theirs.weight.data = torch.tensor(np.asarray(weight))
    for scale in (1.0, 1e-3, 1e4):  # eps matters in the second
        with torch.no_grad():
            target = theirs(torch.tensor(np.asarray(scale * x))).numpy()
        np.testing.assert_allclose(
            layers.rms_norm(scale * x, weight, 1e-3, jnp.float32), target, rtol=2e-6, atol=1e-6
        )
    assert layers.rms_norm(x, weight, 1e-3, jnp.bfloat16).dtype == jnp.bfloat16


def test_gated_equals_torch():
    torch = pytest.importorskip("torch")
    gate, up = random(3, 7, dtype=jnp.float32), random(3, 7, dtype=jnp.float32)
    target = torch.nn.functional.silu(torch.tensor(np.asarray(gate))) * torch.tensor(np.asarray(up))
    np.testing.assert_allclose(layers.gated(gate, up), target.numpy(), rtol=1e-6, atol=1e-6)
    assert layers.gated(gate.astype(jnp.bfloat16), up.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_embedding_from_a_quantised_table_equals_the_dequantised_one():
    table, ids = random(9, 4, dtype=jnp.bfloat16), jnp.array([[3, 0, 8], [3, 3, 1]])
    np.testing.assert_array_equal(
        layers.embed(quantize(table, "bits"), ids, table.dtype), np.asarray(table)[np.asarray(ids)]
    )
    np.testing.assert_array_equal(layers.embed(table, ids, table.dtype), np.asarray(table)[np.asarray(ids)])
    grad = jax.grad(lambda t: jnp.sum(layers.embed(t, ids, t.dtype)))(table.astype(jnp.float32))
    np.testing.assert_array_equal(grad[:, 0], np.bincount(np.ravel(ids), minlength=9))


# Residuals


@pytest.mark.parametrize(
    "dtype, kept", [(jnp.bfloat16, "u16"), (jnp.float32, "f32")], ids=["bfloat16", "float32"]
)
def test_a_saveable_value_is_stored_as_bits_where_the_policy_names_it(capsys, dtype, kept):
    def layer(x):
        return jnp.sum(jnp.sin(layers.saveable(jnp.sin(x), "here")).astype(jnp.float32))

    x = random(3, 5, dtype=dtype)
    for names, expected in ((("here",), True), (("elsewhere",), False)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        print_saved_residuals(jax.checkpoint(layer, policy=policy), x)
        found = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
        assert (
            (len(found) == 1 and found[0].startswith(f"{kept}[3,5] named 'here'")) if expected else not found
        )

    def plain(x):
        return jnp.sum(jnp.sin(jnp.sin(x)).astype(jnp.float32))

    np.testing.assert_array_equal(jax.grad(layer)(x), jax.grad(plain)(x))
    np.testing.assert_array_equal(layers.saveable(x, "here"), x)


SIZES = {  # of the arrays that a layer may store, in DEEP
    "q": (B, T, 4, 10), "k": (B, T, 2, 10), "attn_out": (B, T, 2, 2, 10), "attn_lse": (B, 4, T),
    "gate": (B, T, 48),
}  # fmt: skip
KEPT = {"full": (), "attention": ("attn_out",), "projections": ("q", "k", "attn_out", "gate")}


@functools.cache
def deep_program(adapter, remat):
    """The compiled gradient of the SFT loss of a deep bfloat16 model, stored as in a run."""
    t = trainable_params.partition_params(llama(DEEP, jnp.bfloat16, remat=remat), adapter, None)
    mesh = sharding.make_mesh(sharding.MeshShape(1), jax.devices()[:1])
    trainable, frozen = trainable_params.split_params(t, storage.sharded_shapes(t.stored, mesh))

    def gradient(trainable, frozen, batch):
        return jax.grad(lambda some: sft(t.model)(tree.combine(some, frozen), batch, None, {})[0])(trainable)

    text = jax.jit(gradient).lower(trainable, frozen, batch32()).compile().as_text()
    return {
        (dtype, tuple(map(int, dims.split(","))))
        for dtype, dims in re.findall(r"\b(\w+)\[13,([\d,]+)\]", text)
    }


@pytest.mark.quick_cases("projections")
@pytest.mark.parametrize("remat", KEPT)
def test_a_remat_policy_stores_what_it_names_and_16_bit_values_as_bits(remat):
    stacked = deep_program(Adapter(rank=3), remat)
    for name in ("q", "k", "attn_out", "gate"):
        found = {dtype for dtype, dims in stacked if dims == SIZES[name]}
        assert found == ({"u16"} if name in KEPT[remat] else set()), name
    assert ("f32", (B, T, 32)) in stacked  # a block's input


@pytest.mark.parametrize("adapter", [Adapter(rank=3), None], ids=["lora", "full"])
def test_stacked_weights_are_never_converted_all_at_once(adapter):
    stacked = deep_program(adapter, "projections")
    kernels = {"q": (32, 40), "k": (32, 20), "o": (40, 32), "gate": (32, 48), "down": (48, 32)}
    for name, dims in kernels.items():
        held = (
            "u16" if adapter else "f32"
        )  # frozen ones as raw bits; trainable ones and their gradients unchanged
        assert {dtype for dtype, found in stacked if found == dims} == {held}, name


# Dtypes and precision


DROPPED, HEAD = (
    Adapter(rank=3, dropout=0.1, targets=("q", "o", "down")),
    Adapter(rank=3, targets=("q", "head")),
)


@pytest.mark.parametrize("adapter", [DROPPED, HEAD, None], ids=["lora", "lora-head", "full"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_forward_objective_and_gradients_promote_no_dtype_implicitly(adapter, dtype, tied):
    config = LlamaConfig(**{**DEEP.__dict__, "tied": tied, "layers": 2})
    t = trainable_params.partition_params(llama(config, dtype), adapter, None)
    mesh = sharding.make_mesh(sharding.MeshShape(1), jax.devices()[:1])
    trainable, frozen = trainable_params.split_params(t, storage.sharded_shapes(t.stored, mesh))
    some, batch, key = tree.combine(trainable, frozen), batch32(), jax.random.key(0)

    def gradient(trainable, frozen, key):
        def loss(some):
            return sft(t.model)(tree.combine(some, frozen), batch, key, {})

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    with jax.numpy_dtype_promotion("strict"):
        h = jax.eval_shape(lambda p: t.model.hidden(p, batch)[0], some)
        logits = jax.eval_shape(lambda p: t.model.logits(t.model.head(p), t.model.hidden(p, batch)[0]), some)
        (loss, found), grads = jax.eval_shape(gradient, trainable, frozen, key)
        prefill = jax.eval_shape(lambda p: prefilled(t.model, p, batch, 4), some)
        token = batch.ids[:, 0], batch.ids[:, 0]
        step = jax.eval_shape(lambda p, cache: decoded(t.model, p, cache, token, 0), some, prefill[1])
    assert h.dtype == prefill[0].dtype == step[0].dtype == dtype and logits.dtype == loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((grads, found))} == {jnp.dtype(jnp.float32)}
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)


@pytest.mark.slow
def test_bfloat16_gradients_equal_float32_within_a_few_percent():
    grads = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model, whole = tiny(
            dtype, Adapter(rank=4, alpha=4.0, targets=("k", "o", "gate"))
        )  # some kernels with, some without
        gradient = jax.jit(jax.grad(lambda p, model=model: sft(model)(p, batch32(8), None, {})[0]))
        grads.append(tree.paths(gradient(whole)))
    for path, target in grads[0].items():
        if not path.endswith("scale"):
            error = np.linalg.norm(grads[1][path] - target) / np.linalg.norm(target)
            assert 0 < error < 0.05, f"{path}: {error}"
