"""Fused projections: outputs and gradients are those of separate matmuls, on one device and with tensor
parallelism, and what moves between devices.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh, partition_spec
from jaxft.models.families.phi3 import fused_linear
from jaxft.nn.adapters.lora import ADAPTERS, Adapted
from jaxft.nn.matmul import gather_layer, linear
from jaxft.nn.param_spec import ParamSpec, fan_in, sharding_of
from jaxft.nn.quant import dequantize, is_qtensor, quantize
from jaxft.plan.hlo import parse_hlo
from jaxft.plan.program_bytes import collectives
from jaxft.weights.storage import leaf_sharding

WIDTHS = (12, 4, 4)
SPEC = ParamSpec((32, 20), ("fused_width", "fused_kv_heads"), fan_in(32), 2)
MESHES = {"tensor 2": MeshShape(2, 2, 2), "context": MeshShape(1, 2, 2, context=2)}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def adapted(weight, several=False):
    a, b = array(32, 3, seed=1), array(3, 20, seed=2)
    return Adapted(
        weight, *((jnp.stack([a, a + 1]), jnp.stack([b, b - 1])) if several else (a, b)),
        jnp.full((2,) if several else (), 0.5), over=(ADAPTERS,) * several,
    )  # fmt: skip


WEIGHTS = {
    "plain": lambda: array(32, 20),
    "nf4 with quantised scales": lambda: quantize(array(32, 20), "nf4", 8, True),
    "int8": lambda: quantize(array(32, 20), "int8"),
    "affine4": lambda: quantize(array(32, 20), "affine4", 8),
    "adapted": lambda: adapted(array(32, 20)),
    "adapted nf4 with quantised scales": lambda: adapted(quantize(array(32, 20), "nf4", 8, True)),
    "two adapters": lambda: adapted(array(32, 20), several=True),
}


def by_columns(w, start, stop):
    """The columns of a weight, dequantised."""
    if isinstance(w, Adapted):
        return replace(w, weight=by_columns(w.weight, start, stop), b=w.b[..., start:stop])
    return (dequantize(w) if is_qtensor(w) else w)[:, start:stop].astype(jnp.float64)


def separate(x, w):
    edges = np.cumsum((0, *WIDTHS)).tolist()
    return [linear(x, by_columns(w, *edge)) for edge in zip(edges, edges[1:], strict=False)]


def gradients(fn, x, w):
    """(outputs, gradient of x, of the float weights that train) of a sum with random factors."""
    trained = {"a": w.a, "b": w.b} if isinstance(w, Adapted) else {} if is_qtensor(w) else {"w": w}

    def loss(x, trained):
        used = trained.get("w", w)
        if "a" in trained:
            used = replace(w, **trained)
        out = fn(x, used)
        factors = [array(*part.shape, seed=i) for i, part in enumerate(out)]
        return sum(jnp.sum(part * f) for part, f in zip(out, factors, strict=True)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, trained)


@pytest.mark.quick_cases(
    "plain-None",
    "nf4*-tensor 2",
    "int8-context",
    "adapted-tensor 2",
    "adapted nf4*-context",
    "two adapters-None",
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mesh", [None, *MESHES])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_fused_projections_are_the_separate_ones(kind, mesh):
    x, w = array(4, 6, 32, seed=3), WEIGHTS[kind]()
    expected = gradients(separate, x, w)

    def fused(x, w):
        return fused_linear(x, gather_layer({"w": w}, {"w": SPEC.axes})["w"], WIDTHS)

    if mesh is None:
        found = gradients(fused, x, w)
    else:
        devices = make_mesh(MESHES[mesh])
        stored = w.weight if isinstance(w, Adapted) else w
        stored = jax.tree.map(jax.device_put, stored, leaf_sharding(SPEC, stored, devices, "qkv"))
        w = replace(w, weight=stored) if isinstance(w, Adapted) else stored
        with jax.set_mesh(devices):
            found = gradients(fused, x, w)
    # quantised scales are decoded in float32, where two programs may round differently
    tolerance = 1e-5 if "quantised scales" in kind else 1e-10
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=tolerance, atol=tolerance), found, expected
    )


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_only_a_fraction_of_the_weight_moves_and_no_activation_does(kind):
    """Along tensor: each device sends and receives 1/2 of its half of the weight."""
    devices = make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    spec = ParamSpec((256, 320), SPEC.axes, fan_in(256), 2)
    w = jax.random.normal(jax.random.key(0), spec.shape)
    w = quantize(w, "nf4", 64) if kind == "nf4" else w
    w = jax.tree.map(jax.device_put, w, leaf_sharding(spec, w, devices, "qkv"))
    size = max(x.nbytes for x in jax.tree.leaves(w))
    x = jax.device_put(jnp.ones((8, 512, 256)), array_sharding(devices, ("rows", "time", "act_width")))

    def forward(x, w):
        q, k, v = fused_linear(x, gather_layer({"w": w}, {"w": spec.axes})["w"], (192, 64, 64))
        spread = array_sharding(devices, ("rows", "time", "heads"))
        return [jax.lax.with_sharding_constraint(part, spread) for part in (q, k, v)]

    with jax.set_mesh(devices):
        text = jax.jit(forward).lower(x, w).compile().as_text()
    found = collectives(parse_hlo(text), [0, 0])
    assert found and {one.kind for one in found} == {"all-to-all"}
    assert max(one.size for one in found) <= size // 2
    assert sum(one.size for one in found) <= size // 2 * 1.5


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused():
    devices = make_mesh(MeshShape(1, 1, 8))
    with pytest.raises(ValueError, match=r"qkv: 2 kv heads do not divide over tensor=8; use one of \(1, 2\)"):
        sharding_of(SPEC, devices, "qkv")
    assert partition_spec(make_mesh(MeshShape(1, 4, 2)), SPEC.axes, SPEC.shape, "qkv", 2)[0] == (
        "fsdp",
        "tensor",
    )
