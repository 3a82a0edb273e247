"""Attention compiled ahead of time for GPUs and TPUs that are not here: what its programs hold.

Tests that compile for NVIDIA GPUs need jax's CUDA plugin and those for TPUs libtpu, or are skipped.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_attention import abstract_ranges, value_and_gradients
from tiny_plan import HAS_CUDA, HAS_TPU

from jaxft.distributed.sharding import MeshShape, array_sharding, make_mesh, replicated
from jaxft.nn import attention
from jaxft.plan import hlo, machines, plan
from jaxft.runs.config import load_config

NEEDS_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="needs jax's CUDA plugin, pip install 'jaxft[cuda12]'")
NEEDS_TPU = pytest.mark.skipif(not HAS_TPU, reason="needs libtpu, pip install 'jaxft[tpu]'")
B, T, H, K = 2, 4096, 8, 2


def compiled_for(name, head_dim, branches):
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
            compiled = value_and_gradients.lower(attention.attention, *shapes, ranges).compile()
    return hlo.parse_hlo(compiled.as_text())


def kernels(program):
    """The number of Pallas kernels; other custom calls are changes of layout."""
    calls = [one.attributes for one, *_ in hlo.walk(program) if one.opcode == "custom-call"]
    return sum("tpu_custom_call" in attributes or "triton" in attributes for attributes in calls)


def largest(program):
    """Elements of the largest array that the program writes to memory."""
    return max(math.prod(a.shape) for one, _, _, fused in hlo.walk(program) if not fused for a in one.arrays)


@NEEDS_CUDA
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["h100:1", "a100-80:1", "rtx4090:1"])
def test_the_kernels_compile_for_gpus_without_repeated_keys_or_a_t_by_t_array(name, head_dim):
    program = compiled_for(name, head_dim, branches=True)
    assert kernels(program) == 3
    assert largest(program) == B * T * H * head_dim  # less than the keys of every query head, twice


@NEEDS_TPU
@pytest.mark.parametrize(("branches", "count"), [(False, 3), (True, 6)])
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:1x1x1"])
def test_the_kernels_compile_for_tpus_without_repeated_keys_or_a_t_by_t_array(name, branches, count):
    program = compiled_for(name, 128, branches)
    assert kernels(program) == count and largest(program) == B * T * H * 128


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
    assert kernels(program) == 3 and "collective-permute-start" in text
    assert "all-gather" not in text and largest(program) < T * heads["kv_heads"] * 128


@NEEDS_CUDA
@pytest.mark.slow
@pytest.mark.parametrize(("name", "quant"), [("h100:1", "none"), ("a100-80:1", "none"), ("rtx4090:1", "nf4")])
def test_shared_prompts_take_the_planned_bytes_of_separate_ones(name, quant):
    """Llama 3.1 8B with LoRA, on rows of the same shape with and without branches."""
    path = Path(__file__).resolve().parents[2] / "configs/llama31_8b_dpo.py"
    sizes = []
    for layout in ("plain", "branches"):
        run = load_config(str(path), ["batch=2", "micro=2", f"data.layout={layout}", f"quant={quant}"])
        found = plan.plan(run, machines.machine(name))
        assert any("attention: Pallas" in note for note in found.notes)
        sizes.append(found.total)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
