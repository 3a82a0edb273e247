"""Attention compiled ahead of time for GPUs and TPUs that are not here: what its programs hold.

Tests that compile for NVIDIA GPUs need jax's CUDA plugin and those for TPUs libtpu, or are skipped.
"""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_attention import abstract_ranges, repeating, value_and_gradients
from tiny_plan import HAS_CUDA, HAS_TPU

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh, replicated
from jaxft.nn.attention import attention
from jaxft.plan import hlo, machines, plan
from jaxft.runs.settings.config import load_config

NEEDS_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="needs jax's CUDA plugin, pip install 'jaxft[cuda12]'")
NEEDS_TPU = pytest.mark.skipif(not HAS_TPU, reason="needs libtpu, pip install 'jaxft[tpu]'")
B, T, H, K = 2, 4096, 8, 2


def compiled_for(name, head_dim, branches, attend=attention.attention):
    """Attention and its gradients on one device of a machine, as a parsed program."""
    mesh = make_mesh(MeshShape(), machines.machine(name).devices[:1])
    with jax.set_mesh(mesh):
        shapes = [
            jax.ShapeDtypeStruct((B, T, heads, head_dim), jnp.bfloat16, sharding=replicated(mesh))
            for heads in (H, K, K, H)
        ]
        ranges = abstract_ranges(B, T, branches=branches)
        ranges = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), ranges
        )
        with jax.numpy_dtype_promotion("standard"):
            compiled = value_and_gradients.lower(attend, *shapes, ranges).compile()
    return hlo.parse_hlo(compiled.as_text())


KERNELS = ("tpu_custom_call", "triton", "__cudnn$fmha")  # other custom calls are changes of layout


def kernels(program, size=None):
    """For each attention kernel of a program, the number of its operands with `size` elements; by default of
    the keys of all key heads.
    """
    found = []
    for one, where, *_ in hlo.walk(program):
        if one.opcode == "custom-call" and any(name in one.attributes for name in KERNELS):
            arrays = [program.computations[where][name].arrays for name in one.operands]
            found.append(sum(math.prod(a.shape) == size for of_one in arrays for a in of_one))
    return found


def largest(program):
    """Elements of the largest array that the program writes to memory."""
    return max(map(math.prod, written(program)))


def written(program):
    """The shapes of all arrays that the program writes to memory."""
    return [tuple(a.shape) for one, _, _, fused in hlo.walk(program) if not fused for a in one.arrays]


@NEEDS_CUDA
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["h100:1", "a100-80:1", "rtx4090:1"])
def test_the_kernels_compile_for_gpus_without_repeated_keys_or_a_t_by_t_array(name, head_dim):
    program = compiled_for(name, head_dim, branches=True)
    assert kernels(program, B * T * K * head_dim) == [2, 2, 2]  # keys and values
    assert largest(program) == B * T * H * head_dim
    assert all(shape.count(T) < 2 for shape in written(program))  # for 256, T * T numbers are as many


@NEEDS_CUDA
def test_repeated_keys_would_be_found():
    program = compiled_for("h100:1", 128, True, repeating(attention.attention))
    assert kernels(program, B * T * K * 128) == [0, 0, 0]


@NEEDS_CUDA
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_compiles_for_hopper_without_repeated_keys_or_a_t_by_t_array(head_dim):
    """For rows of one example each: a forward kernel and a backward one, which also takes the output."""
    program = compiled_for("h100:1", head_dim, False, partial(attention.attention, packed=False))
    assert kernels(program, B * T * K * head_dim) == [2, 2]
    assert largest(program) == B * T * H * head_dim


@NEEDS_TPU
@pytest.mark.parametrize(("branches", "count"), [(False, 3), (True, 6)])
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:1x1x1"])
def test_the_kernels_compile_for_tpus_without_repeated_keys_or_a_t_by_t_array(name, branches, count):
    program = compiled_for(name, 128, branches)
    assert kernels(program, B * T * K * 128) == [2] * count and largest(program) == B * T * H * 128


@NEEDS_CUDA
def test_a_ring_compiles_for_gpus_with_asynchronous_transfers_and_without_all_keys():
    """Six heads on eight devices."""
    T, heads = 8 * attention.RING_LEAST, {"heads": 6, "kv_heads": 2}
    mesh = make_mesh(MeshShape(1, context=8), machines.machine("h100:8").devices)

    def on_mesh(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=array_sharding(mesh, axes, shape))

    with jax.set_mesh(mesh):
        shapes = [
            on_mesh((1, T, heads[axis], 128), jnp.bfloat16, "rows", "time", axis, "head_dim")
            for axis in ("heads", "kv_heads", "kv_heads", "heads")
        ]
        ranges = abstract_ranges(1, T, branches=True)
        ranges = jax.tree.map(lambda x: on_mesh(x.shape, x.dtype, "rows", "whole_time"), ranges)
        with jax.numpy_dtype_promotion("standard"):
            text = value_and_gradients.lower(attention.attention, *shapes, ranges).compile().as_text()
    program = hlo.parse_hlo(text)
    # in the loop, and for the last block of keys after it
    assert len(kernels(program)) == 2 * 3 and "collective-permute-start" in text
    assert "all-gather" not in text and largest(program) < T * heads["kv_heads"] * 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quant", "kernel"),
    [
        pytest.param("h100:1", "none", "Pallas", marks=NEEDS_CUDA),
        pytest.param("a100-80:1", "none", "Pallas", marks=NEEDS_CUDA),
        pytest.param("rtx4090:1", "nf4", "Pallas", marks=NEEDS_CUDA),
        pytest.param("v5e:1x1", "nf4", "splash", marks=NEEDS_TPU),
        pytest.param("v5p:2x2x1", "none", "splash", marks=NEEDS_TPU),
    ],
)
def test_shared_prompts_take_the_planned_bytes_of_separate_ones(name, quant, kernel):
    """Llama 3.1 8B with LoRA, on rows of the same shape with and without branches."""
    path, machine = Path(__file__).resolve().parents[2] / "configs/llama31_8b_dpo.py", machines.machine(name)
    count, sizes = len(machine.devices), []
    settings = [f"batch={2 * count}", "micro=2", f"quant={quant}"]
    try:
        plan.set_quick(machine.tpu)
        for layout in ("plain", "branches"):
            run = load_config(str(path), [*settings, f"data.layout={layout}", *["remat=full"] * machine.tpu])
            found = plan.plan(run, machine)
            assert any(f"attention: {kernel}" in note for note in found.notes)
            sizes.append(found.total)
    finally:
        plan.set_quick(False)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
