"""One of several processes that load models onto one mesh; helpers of the tests of loading, without torch."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.distributed import sharding
from jaxft.models.adapted import HeadSettings
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant
from jaxft.train import trainable_params
from jaxft.weights import initial_params, pretrained
from jaxft.weights.gguf import gguf_tensors
from jaxft.weights.hf import safetensors
from jaxft.weights.peft import adapter_folders
from jaxft.weights.quantised import quantised_checkpoints

FORMS = {
    "float32": None, "bits": None, "trained": None, "int8": Quant("int8"), "int4": Quant("int4", 16),
    "fp8": Quant("fp8"),
    "nf4": Quant("nf4", 16), "nf4, plain scales": Quant("nf4", 16, False), "fp4": Quant("fp4", 32),
    "affine4": Quant("affine4", 16),
    "a short block": Quant("nf4", 48, targets="layers/(attn/(q|v)|mlp/gate)"),
    "tables too": Quant("nf4", 16, targets="embed|head|layers/attn/.*"),
    "tables in int8": Quant("int8", targets="embed|head|layers/mlp/.*"), "checkpoint": Quant("checkpoint"),
}  # fmt: skip
MESHES = {
    "1x8": dict(data=1, fsdp=8),
    "2x2x2": dict(data=2, fsdp=2, tensor=2),
    "1x4x2": dict(data=1, fsdp=4, tensor=2),
}


def held_as(folder, form):
    """The Trained of a form above."""
    model = pretrained.model_for(str(folder), dtype=jnp.float32 if form == "float32" else jnp.bfloat16)
    return trainable_params.partition_params(
        model, None if form == "trained" else Adapter(rank=2), None, FORMS[form], str(folder)
    )


def mesh_of(name, devices=None):
    return sharding.make_mesh(sharding.MeshShape(**MESHES[name]), devices)


def one_device():
    return sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])


def assert_has_the_bits_of(found, expected):
    """Every shard that this process has is that part of one device's array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, x in tree.paths(found).items():
        one = np.asarray(tree.paths(expected)[path])
        assert x.shape == one.shape and x.dtype == one.dtype, path
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), one[shard.index], err_msg=path)


def count_reads():
    """A list that grows by the bytes of every part of a tensor that is read from a safetensors file or
    mapped.
    """
    counted, inside = [], []
    read_stored, map_array = safetensors.read_stored, safetensors.map_array

    def counting(read):
        def wrapped(*args):
            inside.append(read)
            try:
                value = read(*args)
            finally:
                inside.pop()
            if not inside:  # read_stored itself maps some dtypes
                counted.append(value.nbytes)
            return value

        return wrapped

    safetensors.read_stored, safetensors.map_array = counting(read_stored), counting(map_array)
    quantised_checkpoints.read_stored, gguf_tensors.map_array = safetensors.read_stored, safetensors.map_array
    return counted


def load(folder, form, mesh, counted):
    """(the base, bytes read of weight files)"""
    t = held_as(folder, form)
    counted.clear()
    base = jax.block_until_ready(pretrained.load_base(str(folder), t.stored, mesh))
    return base, sum(counted)


def main(port, count, process, cases, adapter):
    """Compare every case on every mesh with one device; print the fraction of bytes that was read."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=60)
    counted, fractions = count_reads(), []
    devices = jax.devices()
    mixed = [
        devices[i // 2 + i % 2 * (len(devices) // 2)] for i in range(len(devices))
    ]  # each process holds every second part
    meshes = {"1x8": mesh_of("1x8"), "2x2x2": mesh_of("2x2x2"), "mixed": mesh_of("1x4x2", mixed)}
    for folder, form, names in cases:
        expected, all_bytes = load(folder, form, one_device(), counted)
        for name in names:
            found, some = load(folder, form, meshes[name], counted)
            assert_has_the_bits_of(found, expected)
            fractions.append([folder, form, name, some / all_bytes])
    t = held_as(cases[0][0], "bits")
    for start in (None, adapter):
        settings = adapter_folders.read_adapter_settings(start, t.model) if start else Adapter(rank=2)
        t = trainable_params.partition_params(pretrained.model_for(cases[0][0]), settings, None)
        one, many = (
            initial_params.init_all_but_base(t.model, mesh, 7, HeadSettings(settings, start))
            for mesh in (one_device(), meshes["1x8"])
        )
        assert_has_the_bits_of(many, one)
    print(json.dumps(fractions), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), json.loads(sys.argv[4]), sys.argv[5])
    os._exit(0)
