"""Programs with an FP8 base, compiled for NVIDIA GPUs that are not here: they multiply in FP8."""

import re

import jax
import jax.numpy as jnp
import pytest
from tiny_plan import HAS_CUDA

from jaxft.distributed import sharding
from jaxft.nn import matmul
from jaxft.nn.adapters.lora import Adapted
from jaxft.nn.quant import QTensor
from jaxft.plan import hlo, machines

LAYERS, WIDTH, ROWS, RANK = 3, 1024, 512, 8
E4M3 = "f8e4m3fn"


def layer_gradients(machine):
    """The compiled gradients of adapters on FP8 layers, recomputed in the backward pass."""
    mesh = sharding.make_mesh(sharding.MeshShape(1), machine.devices[:1])
    place = sharding.replicated(mesh)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    codes, scale = array(LAYERS, WIDTH, WIDTH, dtype=jnp.uint8), array(LAYERS, 1, WIDTH)
    base = QTensor(codes, "fp8", jnp.dtype(jnp.bfloat16), None, scale)
    adapter = array(LAYERS, WIDTH, RANK), array(LAYERS, RANK, WIDTH), array(LAYERS)

    def loss(adapter, x, base):
        def body(h, layer):
            return h + matmul.linear(jax.nn.gelu(h), Adapted(layer[0], *layer[1])), None

        h, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, (base, adapter))
        return jnp.sum(jnp.square(h.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        x = array(1, ROWS, WIDTH, dtype=jnp.bfloat16)
        return jax.jit(jax.grad(loss)).lower(adapter, x, base).compile().as_text()


def matmuls(text):
    """The dtypes of the operands of every matmul with the base, by whether it is in the backward pass."""
    found = {False: set(), True: set()}
    for computation in hlo.parse_hlo(text).computations.values():
        for one in computation.values():
            if one.opcode == "dot" or "__cublas$lt$matmul" in one.attributes:
                operands = [computation[name].arrays[0] for name in one.operands[:2]]
                if all(RANK not in x.shape for x in operands):  # of the base
                    backward = "transpose(jvp" in one.attributes and "rematted" not in one.attributes
                    found[backward].add(tuple(x.dtype for x in operands))
    return found


@pytest.mark.skipif(not HAS_CUDA, reason="needs jax's CUDA plugin, pip install 'jaxft[cuda12]'")
@pytest.mark.parametrize("name", ["h100:1", "rtx4090:1"])
def test_the_base_is_multiplied_in_fp8_forward_and_for_input_gradients(name):
    text = layer_gradients(machines.machine(name))
    if name == "rtx4090:1":  # it has FP8 matmuls, but XLA does not use them
        assert matmuls(text) == {False: {("bf16", "bf16")}, True: {("bf16", "bf16")}}
        return
    assert matmuls(text) == {False: {(E4M3, E4M3)}, True: {(E4M3, E4M3)}}
    assert f"bf16[{WIDTH},{WIDTH}]" not in text and f"f32[{WIDTH},{WIDTH}]" not in text  # no dequantised copy
    stacks = re.findall(rf"u8\[{LAYERS},{WIDTH},{WIDTH}\]{{([\d,]+)", text)
    assert set(stacks) == {"2,1,0"}  # nor a transposed copy of all layers
