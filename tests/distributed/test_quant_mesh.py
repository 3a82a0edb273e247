"""Quantised weights on a mesh: sharded between blocks, with the same values and gradients as on one
device.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from tiny_model import assert_close

from jaxft.distributed import sharding
from jaxft.distributed.sharding import MESH_AXES, MeshShape, make_mesh
from jaxft.models.families.llama import PRESETS, LlamaConfig, llama
from jaxft.nn import matmul, param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import KINDS, Quant, is_qtensor, quantize
from jaxft.train import trainable_params
from jaxft.weights import storage
from jaxft.weights.quantised.file_format import block_layout

SMOL, EIGHT_B = PRESETS["HuggingFaceTB/SmolLM2-135M"], PRESETS["meta-llama/Llama-3.1-8B"]


def leaf_specs(config, path, quant, **sizes):
    """Return the PartitionSpecs of the arrays of a quantised leaf."""
    t = trainable_params.partition_params(llama(config), Adapter(), None, quant)
    spec, path = param_spec.spec_paths(t.specs)[f"base/layers/{path}"], f"base/layers/{path}"
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    leaf = storage.leaf_sharding(spec, storage.leaf_shapes(spec, t.storage[path]), mesh, path)
    return {name: value.spec for name, value in leaf.__dict__.items() if hasattr(value, "spec")}


@pytest.mark.parametrize(
    "config, path, quant, sizes, expected",
    [
        (EIGHT_B, "attn/q", Quant(), {"fsdp": 8, "tensor": 4}, P(None, "fsdp", "tensor")),
        (EIGHT_B, "attn/o", Quant(), {"fsdp": 8, "tensor": 4}, P(None, ("tensor", "fsdp"), None)),
        (
            EIGHT_B,
            "mlp/down",
            Quant("int4", 128),
            {"fsdp": 2, "tensor": 8},
            P(None, ("tensor", "fsdp"), None),
        ),
        (SMOL, "attn/q", Quant(), {"fsdp": 3}, P(None, "fsdp", None)),
        # 4 does not divide the 9 blocks, but the 576 outputs
        (SMOL, "attn/q", Quant(), {"fsdp": 4}, P(None, None, "fsdp")),
        (SMOL, "attn/q", Quant(), {"fsdp": 2, "tensor": 3}, P(None, None, ("tensor", "fsdp"))),
        (SMOL, "attn/q", Quant(), {"fsdp": 5}, P(None, None, None)),
        (SMOL, "attn/o", Quant(), {"fsdp": 5, "tensor": 3}, P(None, "tensor", None)),
        (SMOL, "attn/o", Quant(), {"fsdp": 2, "tensor": 3}, P(None, "tensor", "fsdp")),
        # with a short last block the inputs are never sharded
        (SMOL, "attn/q", Quant("int4", 128), {"fsdp": 3}, P(None, None, "fsdp")),
        (SMOL, "attn/q", Quant("int8"), {"fsdp": 4}, P(None, "fsdp", None)),
        (SMOL, "attn/q", Quant("fp8"), {"fsdp": 4}, P(None, "fsdp", None)),
        (SMOL, "attn/q", Quant("affine4"), {"data": 4}, P(None, None, None)),
    ],
)
def test_codes_are_sharded_between_blocks_and_scales_with_them(config, path, quant, sizes, expected):
    specs = leaf_specs(config, path, quant, **sizes)
    assert specs.pop("codes") == expected
    if quant.kind in ("int8", "fp8"):
        expected = P(expected[0], None, expected[2])  # one scale for all inputs
    for name in ("outer", "mean"):
        assert specs.pop(name, P()) == P()
    assert specs.keys() == ({"scale", "offset"} if quant.kind == "affine4" else {"scale"})
    assert set(specs.values()) == {expected}


def test_codes_of_per_channel_blocks_are_sharded_between_bytes():
    """GPTQ without groups: the 68 bytes of 136 inputs do not divide over 8 devices; the outputs do."""
    spec = param_spec.ParamSpec((2, 136, 64), ("layers", "width", "mlp"), param_spec.full(0.0))
    mesh = AbstractMesh((1, 1, 8, 1, 1, 1), MESH_AXES)
    leaf = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype),
        block_layout("int4", (136, 64), None, np.float16),
    )
    assert storage.leaf_sharding(spec, leaf, mesh, "w").codes.spec == P(None, None, "fsdp")


@pytest.mark.parametrize(
    "path, quant, tensor, message",
    [
        (
            "attn/o",
            Quant("nf4", 128),
            3,
            "an input axis of 576 in blocks of 128 can't be sharded over tensor=3; use one of (1,) for",
        ),
        (
            "mlp/down",
            Quant("int4", 256),
            4,
            "an input axis of 1536 in blocks of 256 can't be sharded over tensor=4; use one of (1, 2, ",
        ),
        ("attn/o", Quant(), 2, "9 heads do not divide over tensor=2; use one of (1,)"),
    ],
)
def test_tensor_must_divide_the_blocks(path, quant, tensor, message):
    with pytest.raises(ValueError) as error:
        leaf_specs(SMOL, path, quant, tensor=tensor)
    assert str(error.value).startswith(f"base/layers/{path}: {message}") and "\n" not in str(error.value)


def test_parameter_table_shows_sharded_and_replicated_dimensions():
    config = LlamaConfig(vocab=64, width=48, layers=2, heads=2, kv_heads=2, head_dim=10, mlp=64)
    t = trainable_params.partition_params(llama(config), Adapter(rank=2), None, Quant("nf4", 16))
    rows = {
        line.split()[0]: line
        for line in trainable_params.parameter_table(t, make_mesh(MeshShape(1, 8))).splitlines()
    }
    assert " -,-,- " in rows["base/layers/attn/q"]  # 3 blocks and 20 outputs: neither divides by 8
    assert " -,-,fsdp " in rows["base/layers/mlp/gate"] and " -,-,fsdp " in rows["base/layers/attn/o"]
    assert " fsdp,- " in rows["base/embed"]


jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # halves compile time


def shard_tree(mesh, specs, params):
    """Shard a tree over the mesh as a run does."""
    flat = param_spec.spec_paths(specs)
    return tree.map_with_path(
        lambda path, x: jax.tree.map(jax.device_put, x, storage.leaf_sharding(flat[path], x, mesh, path)),
        params,
        is_leaf=is_qtensor,
    )


@pytest.mark.quick_cases("column-nf4", "row-int8", "row-affine4", "column-fp8")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "axes", [("layers", "width", "mlp"), ("layers", "mlp", "width")], ids=["column", "row"]
)
def test_quantised_matmul_on_a_mesh_equals_one_device(x64, kind, axes):
    rng, mesh = np.random.default_rng(0), make_mesh(MeshShape(2, 2, 2))
    spec = param_spec.ParamSpec((2, 64, 64), axes, param_spec.full(0.0))
    q = quantize(jnp.asarray(rng.normal(size=spec.shape)), kind, None if kind in ("int8", "fp8") else 16)
    x = jnp.asarray(rng.normal(size=(8, 3, 64)))

    def loss(x, q):
        def body(h, w):
            return sharding.constrain(jnp.tanh(matmul.linear(h, w)), "rows", "time", "act_width"), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, q)[0] ** 2)

    one = jax.jit(jax.value_and_grad(loss))(x, q)
    sharded = shard_tree(mesh, {"w": spec}, {"w": q})["w"]
    assert sharded.codes.sharding.shard_shape(sharded.codes.shape)[1:] == (q.codes.shape[1] // 2, 32)
    with jax.set_mesh(mesh):
        many = jax.jit(jax.value_and_grad(loss))(
            jax.device_put(x, sharding.array_sharding(mesh, ("rows", "time", "act_width"))), sharded
        )
    assert_close(jax.device_get(many), jax.device_get(one))
