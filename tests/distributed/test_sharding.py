"""Partition specs from logical axes: divisibility, replication, and one-line errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxft.distributed import sharding
from jaxft.distributed.sharding import AXES, MESH_AXES, MeshShape, make_mesh, partition_spec
from jaxft.models.families.llama import PRESETS, LlamaConfig, llama
from jaxft.nn import param_spec
from jaxft.nn.adapters.lora import Adapter
from jaxft.train import trainable_params
from jaxft.weights import storage

SMOL, EIGHT_B = PRESETS["HuggingFaceTB/SmolLM2-135M"], PRESETS["meta-llama/Llama-3.1-8B"]


def abstract(data=1, fsdp=1, tensor=1):
    """An abstract mesh, whose devices need not exist."""
    return AbstractMesh((1, data, fsdp, 1, 1, tensor), MESH_AXES)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_minus_one_takes_the_remaining_devices():
    sizes = lambda shape: tuple(dict(make_mesh(shape).shape)[axis] for axis in MESH_AXES)  # noqa: E731
    assert MESH_AXES == ("slices", "data", "fsdp", "expert", "context", "tensor")
    assert sizes(MeshShape()) == (1, 8, 1, 1, 1, 1)
    assert sizes(MeshShape(2, -1, 2)) == (1, 2, 2, 1, 1, 2)
    assert sizes(MeshShape(1, -1, context=2, slices=2)) == (2, 1, 2, 1, 2, 1)
    assert sizes(MeshShape(1, expert=4, tensor=-1)) == (1, 1, 1, 4, 1, 2)
    assert make_mesh(MeshShape(2, 1, 1), jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            MeshShape(-1, 3),
            "needs a multiple of 3 devices, got 8; change mesh.data, mesh.fsdp, mesh.expert or mesh.tensor",
        ),
        (
            MeshShape(-1, 16),
            "needs a multiple of 16 devices, got 8; change mesh.data, mesh.fsdp, mesh.expert or mesh.tensor",
        ),
        (
            MeshShape(2, 2, 1),
            "needs 4 devices, got 8; change mesh.data, mesh.fsdp, mesh.expert or mesh.tensor",
        ),
    ],
    ids=str,
)
def test_mesh_that_does_not_match_the_devices_is_an_error(shape, message):
    with pytest.raises(ValueError) as error:
        make_mesh(shape)
    assert message in one_line(error)


@pytest.mark.parametrize(
    "config, path, tensor, message",
    [
        (
            EIGHT_B,
            "layers/attn/k",
            16,
            "layers/attn/k: 8 kv heads do not divide over tensor=16; use one of (1, 2, 4, 8) for mesh.tensor",
        ),
        (
            SMOL,
            "layers/attn/k",
            2,
            "layers/attn/k: 3 kv heads do not divide over tensor=2; use one of (1,) for mesh.tensor",
        ),
        (
            SMOL,
            "layers/attn/v",
            9,
            "layers/attn/v: 3 kv heads do not divide over tensor=9; use one of (1, 3) for mesh.tensor",
        ),
        (
            SMOL,
            "layers/attn/q",
            2,
            "layers/attn/q: 9 heads do not divide over tensor=2; use one of (1,) for mesh.tensor",
        ),
        (
            SMOL,
            "layers/attn/o",
            6,
            "layers/attn/o: 9 heads do not divide over tensor=6; use one of (1, 3) for mesh.tensor",
        ),
        (
            SMOL,
            "embed",
            5,
            "embed: vocab of size 49152 does not divide over tensor=5; "
            "use one of (1, 2, 3, 4) for mesh.tensor",
        ),
        (
            SMOL,
            "layers/mlp/up",
            5,
            "layers/mlp/up: mlp of size 1536 does not divide over tensor=5; "
            "use one of (1, 2, 3, 4) for mesh.tensor",
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, int | str) and len(str(x)) < 20 else "",
)
def test_tensor_must_divide_the_heads_not_only_the_flattened_width(config, path, tensor, message):
    spec = param_spec.spec_paths(llama(config).specs)[path]
    with pytest.raises(ValueError) as error:
        param_spec.sharding_of(spec, abstract(tensor=tensor), path)
    assert one_line(error) == message


def test_sizes_suggested_by_the_error_are_valid():
    specs = param_spec.spec_paths(llama(EIGHT_B).specs)
    for tensor in (1, 2, 4, 8):
        spec = param_spec.sharding_of(specs["layers/attn/k"], abstract(tensor=tensor), "k").spec
        assert spec == P(None, None, "tensor" if tensor > 1 else None)


def test_adapter_of_a_kernel_is_sharded_between_heads():
    t = trainable_params.partition_params(llama(SMOL), Adapter(rank=4, targets=("k", "o")), None)
    with pytest.raises(ValueError, match="adapter/layers/attn/k/b: 3 kv heads do not divide over tensor=2"):
        storage.sharded_shapes(t.stored, make_mesh(MeshShape(-1, 1, 2)))
    with pytest.raises(ValueError, match="o/a: 9 heads"):
        param_spec.sharding_of(
            param_spec.spec_paths(t.specs)["adapter/layers/attn/o/a"], abstract(tensor=2), "o/a"
        )


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_fsdp_shards_kernels_along_their_inputs(sizes):
    """To gather along outputs, XLA on GPU transposes the stacked layers: a second copy of them in every
    step.
    """
    for path, spec in param_spec.spec_paths(llama(EIGHT_B).specs["layers"]).items():
        if len(spec.axes) == 3:
            ins, outs = (
                str(entry)
                for entry in partition_spec(abstract(**sizes), spec.axes, spec.shape, path, spec.heads)[1:]
            )
            assert "fsdp" in ins and "fsdp" not in outs, path


def test_tensor_shards_every_matrix_if_it_divides_the_heads():
    for config, tensor in ((SMOL, 3), (EIGHT_B, 8)):
        for spec in param_spec.spec_paths(llama(config).specs).values():
            entries = partition_spec(abstract(fsdp=4, tensor=tensor), spec.axes, spec.shape, "", spec.heads)
            assert len(spec.axes) - ("layers" in spec.axes) == 1 or "tensor" in str(entries)


def test_fsdp_is_left_out_if_it_does_not_divide():
    mesh = abstract(fsdp=5, tensor=2)
    assert partition_spec(mesh, ("layers", "width", "mlp"), (3, 32, 48)) == P(None, None, "tensor")
    assert partition_spec(mesh, ("layers", "width", "mlp"), (3, 35, 48)) == P(None, "fsdp", "tensor")
    assert partition_spec(mesh, ("vocab", "table_width"), (42, 32)) == P("tensor", None)
    assert partition_spec(mesh, ("vocab", "table_width"), (40, 32)) == P(("tensor", "fsdp"), None)
    assert partition_spec(abstract(fsdp=5), ("vocab", "table_width"), (42, 32)) == P(None, None)


def test_no_array_uses_a_mesh_axis_twice():
    mesh = abstract(2, 2, 2)
    config = LlamaConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48)
    t = trainable_params.partition_params(
        llama(config), Adapter(rank=4, targets=("q", "o", "down", "head")), None
    )
    for path, spec in param_spec.spec_paths(t.specs).items():
        entries = [
            entry if isinstance(entry, tuple) else (entry,)
            for entry in param_spec.sharding_of(spec, mesh, path).spec
        ]
        used = [axis for entry in entries for axis in entry if axis]
        assert len(used) == len(set(used)), path
    assert all(a in MESH_AXES for axes in AXES.values() for a in axes)


def test_constraints_are_no_ops_on_one_device():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "rows", "heads") is x  # 5 heads would not divide
    with jax.set_mesh(make_mesh(MeshShape(1), jax.devices()[:1])):
        assert sharding.constrain(x, "rows", "heads") is x
        assert sharding.per_device(lambda a: a, (("rows", "heads"),), ("rows", "heads"), x.shape)(x) is x


def test_constrain_and_per_device_shard_by_logical_axes():
    mesh = make_mesh(MeshShape(2, 2, 2))
    x = jnp.arange(64.0).reshape(8, 8)
    with jax.set_mesh(mesh):
        constrained = jax.jit(lambda x: sharding.constrain(x, "rows", "heads"))(x)
        local_size = sharding.per_device(
            lambda a: jnp.full_like(a, a.size), (("rows", "heads"),), ("rows", "heads"), x.shape
        )
        sizes = jax.jit(local_size)(x)
    assert constrained.sharding.spec == P(("data", "fsdp"), "tensor")
    np.testing.assert_array_equal(constrained, x)
    assert np.all(np.asarray(sizes) == 8)  # 2 rows of 4


def test_batch_is_sharded_by_rows_and_rows_must_divide():
    mesh = make_mesh(MeshShape(2, 2, 2))
    placed = sharding.shard_batch(mesh, {"ids": np.arange(48).reshape(2, 8, 3), "w": np.ones((2, 8))})
    assert placed["ids"].sharding.spec[1] == AXES["rows"] and placed["ids"].addressable_shards[
        0
    ].data.shape == (2, 2, 3)
    np.testing.assert_array_equal(placed["ids"], np.arange(48).reshape(2, 8, 3))
    with pytest.raises(ValueError) as error:
        sharding.shard_batch(mesh, np.ones((2, 6, 3)))
    assert one_line(error) == (
        "6 rows of a microbatch do not divide over slices x data x fsdp = 4 devices; "
        "make data.batch / data.micro a multiple of 4, or change mesh.data or mesh.fsdp"
    )
