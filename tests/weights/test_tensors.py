"""The table of a model's tensors in files: experts with a tensor each, with one for all, and with one for
several parameters, read, written and merged by code that knows none of these.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import tree
from jaxft.nn.param_spec import ParamSpec, fan_in, init_params, spec_paths
from jaxft.nn.quant import quantize
from jaxft.nn.tensor_names import TensorName
from jaxft.weights import param_loading
from jaxft.weights.edit.merged_weights import lazy_params, merge_files, merge_on_read
from jaxft.weights.hf import hf_read, hf_write
from jaxft.weights.param_loading import load_param, param_readers, read_values, read_whole
from jaxft.weights.tensors import tensors_of

L, X, D, F = 2, 4, 16, 64
CONFIG = LlamaConfig(vocab=24, width=D, layers=L, heads=2, kv_heads=1, head_dim=8, mlp=F, tied=True)
MLP = "model.layers.{i}.mlp."
STYLES = {  # of names in files
    "a tensor for each expert": {
        name: TensorName(f"{MLP}experts.{{x}}.{name}_proj.weight", True) for name in ("gate", "up", "down")
    },
    "a tensor for all experts": {
        name: TensorName(f"{MLP}experts.{name}_proj", True) for name in ("gate", "up", "down")
    },
    "gate and up in one tensor": {
        "gate": TensorName(f"{MLP}experts.gate_up_proj", True, 0),
        "up": TensorName(f"{MLP}experts.gate_up_proj", True, 1),
        "down": TensorName(f"{MLP}experts.down_proj", True),
    },
}


def expert_model(style):
    """A Llama whose MLPs are declared as kernels of experts: for its files, not to be computed."""
    model = llama(CONFIG, dtype=jnp.float32)
    wide, narrow = ("layers", "experts", "width", "mlp"), ("layers", "experts", "from_mlp", "out_width")
    experts = {
        "gate": ParamSpec((L, X, D, F), wide, fan_in(D)),
        "up": ParamSpec((L, X, D, F), wide, fan_in(D)),
        "down": ParamSpec((L, X, F, D), narrow, fan_in(F)),
    }
    specs = {**model.specs, "layers": {**model.specs["layers"], "mlp": experts}}
    names = {f"layers/mlp/{name}": value for name, value in STYLES[style].items()}
    return replace(model, specs=specs, weight_names=model.weight_names | names)


@pytest.fixture(params=list(STYLES))
def written(request, tmp_path):
    """(model, parameters, their folder)"""
    model = expert_model(request.param)
    params = jax.tree.map(np.asarray, init_params(model.specs, jax.random.key(0)))
    hf_write.save_folder(tmp_path, model, params, None)
    return model, params, tmp_path


def readers_of(written):
    return param_readers(hf_read.open_folder(written[2]), written[0])


def test_files_have_the_experts_as_transformers_names_and_orients_them(tmp_path):
    for style in STYLES:
        model = expert_model(style)
        params = jax.tree.map(np.asarray, init_params(model.specs, jax.random.key(0)))
        hf_write.save_folder(tmp_path / style, model, params, None)
        files = load_file(tmp_path / style / "model.safetensors")
        mlp, prefix = params["layers"]["mlp"], "model.layers.1.mlp.experts."
        gate, up, down = (np.swapaxes(mlp[name][1], 1, 2) for name in ("gate", "up", "down"))
        if style == "a tensor for each expert":
            assert sum(".mlp." in name for name in files) == L * X * 3
            np.testing.assert_array_equal(files[f"{prefix}2.gate_proj.weight"], gate[2])
            np.testing.assert_array_equal(files[f"{prefix}0.down_proj.weight"], down[0])
        elif style == "a tensor for all experts":
            np.testing.assert_array_equal(files[f"{prefix}up_proj"], up)
        else:
            np.testing.assert_array_equal(files[f"{prefix}gate_up_proj"], np.concatenate([gate, up], 1))
            assert sum(".mlp." in name for name in files) == L * 2


def test_every_parameter_is_read_as_it_was_written(written):
    for path, reader in readers_of(written).items():
        np.testing.assert_array_equal(read_whole(reader), tree.paths(written[1])[path], err_msg=path)


def test_a_parameter_that_is_read_when_it_is_needed_has_every_part_of_it(written):
    readers = readers_of(written)
    lazy, whole = tree.paths(lazy_params(readers)), tree.paths(written[1])
    for path in ("layers/mlp/up", "embed", "layers/attn_norm"):
        np.testing.assert_array_equal(np.asarray(lazy[path]), whole[path])
        np.testing.assert_array_equal(lazy[path][1], whole[path][1])
        np.testing.assert_array_equal(lazy[path][1, 3], whole[path][1, 3])


def test_every_value_of_a_parameter_is_in_one_of_its_tensors_and_every_tensor_is_filled(written):
    model, params, _ = written
    values, sizes = dict[str, int](), dict[str, int]()
    for path, tensors in tensors_of(model).items():
        assert sum(np.prod(t.values) for t in tensors) == np.prod(spec_paths(model.specs)[path].shape)
        for t in tensors:
            values[t.name] = values.get(t.name, 0) + int(np.prod(t.values))
            sizes[t.name] = int(np.prod(t.shape))
    assert values == sizes


def test_the_number_of_a_layer_is_that_of_the_model_whatever_numbers_are_in_the_name():
    model = expert_model("a tensor for each expert")
    specs, names = spec_paths(model.specs), dict(model.weight_names)
    names["layers/mlp/gate"] = TensorName("model.stage.7.layers.{i}.mlp.experts.{x}.gate.weight", True)
    names["layers/attn/q"] = TensorName("model.mtp.9.proj.{i}.q.weight", True)
    names["final_norm"] = TensorName("model.mtp.0.norm.weight")
    assert names.keys() == specs.keys()
    table = tensors_of(replace(model, weight_names=names))
    assert [x.layer for x in table["layers/mlp/gate"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [x.layer for x in table["layers/attn/q"]] == [0, 1] and table["final_norm"][0].layer is None
    assert table["layers/mlp/gate"][-1].in_layer == "mlp.experts.3.gate"
    assert table["final_norm"][0].in_layer == "model.mtp.0.norm"


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_experts_on_several_devices_have_the_bits_of_the_whole_parameter(written, kind, monkeypatch):
    reader, whole = readers_of(written)["layers/mlp/up"], tree.paths(written[1])["layers/mlp/up"]
    mesh = jax.make_mesh((4,), ("experts",), devices=jax.devices()[:4])
    sharding, read = jax.NamedSharding(mesh, P(None, "experts")), []
    expected = whole if kind is None else quantize(whole, kind)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    shardings = jax.tree.map(lambda x: sharding, like)
    monkeypatch.setattr(param_loading, "read_values", recording(read_values, read))
    loaded = load_param(reader, like, shardings, unchanged=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert {tensor.index for tensor in read} == {tensor.index for tensor in reader.tensors}


def recording(read_values, seen):
    def read(reader, tensor, index):
        seen.append(tensor)
        return read_values(reader, tensor, index)

    return read


def test_an_adapter_of_experts_is_merged_as_einsum_merges_it(written):
    """By both ways: tensor by tensor for files that are written, and part by part as a base is read."""
    model, params, _ = written
    key = jax.random.key(3)
    node = {
        "a": np.asarray(jax.random.normal(key, (L, X, D, 2))),
        "b": np.asarray(jax.random.normal(key, (L, X, 2, F))),
        "scale": np.asarray(jax.random.normal(key, (L, X))),
    }
    adapter, base = {"layers": {"mlp": {"gate": node}}}, params["layers"]["mlp"]["gate"]
    expected = base + np.einsum("lxir,lxro,lx->lxio", node["a"], node["b"], node["scale"])
    readers = readers_of(written)
    on_read = merge_on_read(readers, model, adapter)["layers/mlp/gate"]
    merged = merge_files(readers, model, adapter, np.float32)["layers"]["mlp"]["gate"]
    for tensor in on_read.tensors:
        np.testing.assert_allclose(on_read.read(tensor), expected[tensor.index], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(merged[tensor.index], expected[tensor.index], rtol=1e-5, atol=1e-5)
    tensor = on_read.tensors[-1]
    part = (*(slice(0, n) for n in tensor.values[:-2]), slice(2, 9), slice(30, 33))
    np.testing.assert_array_equal(on_read.read(tensor, part), on_read.read(tensor)[part])
