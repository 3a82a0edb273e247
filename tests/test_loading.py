"""Loading at size: a process reads the bytes of its own shards, holds no more than they, and has one device's bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_gguf import Kind, write_gguf
from test_packed import by_bitsandbytes, write_grouped
from tiny_llama import tiny_torch, write_folder

from jaxft import export, params, prepare, sharding, tree, weights
from jaxft.lora import Adapter
from jaxft.params import ParamSpec, constant
from jaxft.quant import Quant, is_qtensor, quantize
from jaxft.weights import hf, leaves, shards
from jaxft.weights.merged import Lazy
from jaxft.weights.packed import within
from jaxft.weights.tensors import Range, read_range

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2)
FORMS = {
    "float32": None, "bits": None, "trained": None, "int8": Quant("int8"), "int4": Quant("int4", 16), "nf4": Quant("nf4", 16),
    "nf4, plain scales": Quant("nf4", 16, False), "fp4": Quant("fp4", 32), "affine4": Quant("affine4", 16),
    "a short block": Quant("nf4", 48), "tables too": Quant("nf4", 16, targets="embed|head|layers/attn/.*"),
    "tables in int8": Quant("int8", targets="embed|head|layers/mlp/.*"),
}  # fmt: skip


def held_as(folder, form):
    """(model, Trained) of a form above, or of weights that are kept."""
    model = weights.model_for(str(folder), dtype=jnp.float32 if form == "float32" else jnp.bfloat16)
    quant = Quant("kept") if form == "kept" else FORMS[form]
    return prepare.trained(model, None if form == "trained" else Adapter(rank=2), None, quant, str(folder))


def assert_has_the_bits_of(found, wanted):
    """Every shard that this process has is that part of one device's array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, x in tree.paths(found).items():
        one = np.asarray(tree.paths(wanted)[path])
        assert x.shape == one.shape and x.dtype == one.dtype, path
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), one[shard.index], err_msg=path)


def on_one_device(ref, t):
    return prepare.load_base(str(ref), t, sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1]))


def write_kept(folder, way):
    """A tiny model's folder or file with packed weights."""
    if way == "gguf":
        return write_gguf(folder / "tiny.gguf", tiny_torch(tie_word_embeddings=False, **SIZES), Kind.Q4_1)
    if way in ("gptq", "awq"):
        return write_grouped(folder, way, changes=SIZES)[0]
    if way == "gptq, act-order":
        return write_grouped(folder, "gptq", ordered=True, sym=True, changes=SIZES)[0]
    if way.startswith("bitsandbytes"):
        return by_bitsandbytes(folder, "nf4", way.endswith("double"), **SIZES)[0]
    source = str(write_folder(folder / "plain", tiny_torch(tie_word_embeddings=False, **SIZES).to(torch.bfloat16)))
    quant = Quant("nf4", 16) if way == "own nf4" else Quant("int8")
    whole = export.Whole(source, weights.model_for(source), None)
    export.write(folder / "own", whole, "bfloat16", export.Pack(quant))
    return folder / "own"


KEPT = ("gguf", "gptq", "gptq, act-order", "awq", "bitsandbytes", "bitsandbytes, double", "own nf4", "own int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bfloat16 model in several files, and packed ones."""
    root = tmp_path_factory.mktemp("loading")
    plain = write_folder(root / "plain", tiny_torch(tie_word_embeddings=False, **SIZES).to(torch.bfloat16), max_shard_size="100KB")
    assert len(list(plain.glob("*.safetensors"))) > 5
    write_folder(root / "tied", tiny_torch(tie_word_embeddings=True, **SIZES).to(torch.float16))
    for way in KEPT:
        (root / way).mkdir()
    return {"plain": plain, "tied": root / "tied", **{way: write_kept(root / way, way) for way in KEPT}}


MESHES = {"1x8": dict(data=1, fsdp=8), "2x2x2": dict(data=2, fsdp=2, tensor=2)}
CASES = [("plain", form) for form in FORMS] + [("tied", "bits"), ("tied", "nf4")] + [(way, "kept") for way in KEPT]
CASES += [("gptq", "float32"), ("own nf4", "bits"), ("gguf", "trained"), ("bitsandbytes", "int8")]  # expanded again


@pytest.mark.parametrize("folder, form", CASES, ids=str)
def test_a_leaf_on_a_mesh_has_one_devices_bits(folders, folder, form):
    t = held_as(folders[folder], form)
    wanted = on_one_device(folders[folder], t)
    for shape in MESHES.values():
        mesh = sharding.make_mesh(sharding.MeshShape(**shape))
        found = prepare.load_base(str(folders[folder]), t, mesh)
        assert_has_the_bits_of(found, wanted)
        places = prepare.abstract_params(t, mesh)["base"]
        jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim) or pytest.fail(str(like)), found, places)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "trained"])
def test_one_devices_bits_are_those_of_the_whole_stacked_leaf(folders, form):
    state = {}
    for path in folders["plain"].glob("*.safetensors"):
        state |= load_file(path)
    t = held_as(folders["plain"], form)
    base = tree.paths(on_one_device(folders["plain"], t), is_qtensor)
    for path, spec in params.spec_paths(t.model.specs["base"]).items():
        name, turned = t.model.names[path]
        layers = [state[name.format(i=i)] for i in range(spec.shape[0] if "{i}" in name else 1)]
        value = np.stack([x.T if turned else x for x in layers]) if "{i}" in name else layers[0].T if turned else layers[0]
        held = t.held[f"base/{path}"]
        value = value if held.quantised else value.astype(held.dtype)
        wanted = quantize(value, *held.pack) if held.pack else value
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(base[path]), jax.tree.leaves(wanted))
