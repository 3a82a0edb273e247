"""Adapters of experts in files: peft loads them, exports merge them, and a quantised base takes them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_experts
import torch
from merged_arrays import merged_arrays
from tiny_experts import CONFIG, KERNELS
from tiny_model import assert_close, examples, one_by_one

from jaxft import tree
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.models import families
from jaxft.models.adapted import adapted
from jaxft.nn.lora import Adapter, pairs_by_path
from jaxft.nn.lora_specs import differing_fields, pair_layouts
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.train.export import ExportSource, merged_base
from jaxft.weights import hf_write, peft_write, pretrained
from jaxft.weights import peft as peft_files
from jaxft.weights.lora_start import init_magnitudes
from jaxft.weights.tensors import tensors_of

SETTINGS = Adapter(
    rank=4,
    alpha=6.0,
    targets=("q", *KERNELS),
    rank_pattern=(("experts.1.up_proj", 2),),
    exclude_modules=("layers.1.mlp.experts.0.down_proj",),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of a base and of an adapter in it, model, base, adapter)."""
    folder = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "tiny_experts", tiny_experts.FAMILY)
        model, params = tiny_experts.tiny_experts(SETTINGS, jnp.float32)
        base, adapter = jax.tree.map(np.asarray, (params["base"], params["adapter"]))
        adapter = with_unused_zero(adapter, model)
        hf_write.save_folder(folder, tiny_experts.experts(CONFIG), base, None)
        peft_write.save_adapter(folder / "adapter", adapter, SETTINGS, model, str(folder))
        yield folder, tiny_experts.experts(CONFIG), base, adapter


def with_unused_zero(adapter, model):
    """The adapter with zeros beyond the rank of each module, as a run leaves them."""
    layouts = pair_layouts(model.specs["base"], SETTINGS, model.weight_names)

    def leaf(path, x):
        above, _, name = path.rpartition("/")
        if name != "b":
            return x
        ranks = np.reshape(layouts[above].ranks, x.shape[:-2])
        return np.where(np.arange(x.shape[-2])[:, None] < ranks[..., None, None], x, np.float32(0))

    return tree.map_with_path(leaf, adapter)


def torch_twin(model, base):
    """A torch module with a linear layer for every kernel of the base, under its name in files."""
    root, leaves = torch.nn.Module(), tree.paths(base)
    for path, tensors in tensors_of(model).items():
        for tensor in tensors if path.startswith("layers/") and tensors[0].is_kernel else ():
            *above, last = tensor.module.split(".")
            node = root
            for part in above:
                if not hasattr(node, part):
                    node.add_module(part, torch.nn.Module())
                node = getattr(node, part)
            linear = torch.nn.Linear(*tensor.values, bias=False)
            linear.weight.data = torch.tensor(np.array(leaves[path][tensor.index].T))
            node.add_module(last, linear)
    root.prepare_inputs_for_generation = None
    return root


def test_peft_loads_the_pair_of_every_expert_and_merges_it_as_exports_do(world):
    folder, model, base, adapter = world
    theirs = peft.PeftModel.from_pretrained(torch_twin(model, base), str(folder / "adapter"))
    layers = dict(theirs.base_model.model.named_modules())
    merged = tree.paths(merged_arrays(base, adapter, jnp.float32))
    exported = tree.paths(merged_base(ExportSource(str(folder), model, None, adapter)))
    layouts, changed = pair_layouts(model.specs, SETTINGS, model.weight_names), 0
    for path, layout in layouts.items():
        for tensor, rank in zip(tensors_of(model)[path], layout.ranks, strict=True):
            layer, before = layers[tensor.module], tree.paths(base)[path][tensor.index]
            after = before
            if rank:
                assert layer.r["default"] == rank
                after = before + layer.get_delta_weight("default").detach().numpy().T
                changed += np.abs(after - before).max() > 0.1
            np.testing.assert_allclose(merged[path][tensor.index], after, atol=1e-5)
            np.testing.assert_allclose(exported[path][tensor.index], after, atol=1e-5)
    assert changed == sum(bool(rank) for layout in layouts.values() for rank in layout.ranks) == 20


def test_an_adapter_is_read_as_it_was_written_with_the_settings_that_declare_it(world):
    folder, model, _, adapter = world
    found, settings = peft_files.read_adapter(folder / "adapter", model)
    before, after = pairs_by_path(adapter), pairs_by_path(found)
    assert before.keys() == after.keys()
    for path, pair in before.items():
        assert_close(after[path]["a"] @ after[path]["b"], pair["a"] @ pair["b"], 1e-6)
        assert_close(after[path]["scale"], pair["scale"], 1e-6)
    assert differing_fields(model.specs, settings, SETTINGS, model.weight_names) == []


def test_a_quantised_base_of_experts_trains_a_dora_adapter_and_is_merged(world):
    folder, model, base, _ = world
    mesh, rows = make_mesh(MeshShape(), jax.devices()[:1]), one_by_one(examples(2))
    packed = pretrained.load_frozen(str(folder), model, mesh, Quant("nf4", block=8))
    kernels = packed["layers"]["mlp"]["experts"]
    assert all(is_qtensor(kernels[name]) and kernels[name].scale.shape[:2] == (3, 2) for name in KERNELS)
    off = np.abs(dequantize(kernels["up"]) - base["layers"]["mlp"]["experts"]["up"])
    assert 0 < off.max() < 0.1
    whole = adapted(model, replace(SETTINGS, dora=True))
    _, params = tiny_experts.tiny_experts(replace(SETTINGS, dora=True), jnp.float32)
    adapter = init_magnitudes(packed, params["adapter"])
    hidden = jax.jit(lambda *args: model.hidden(*args)[0])
    expected, _ = jax.jit(whole.hidden)({"base": packed, "adapter": adapter}, rows)
    assert_close(hidden(merged_arrays(packed, adapter, jnp.float32), rows), expected, 1e-4)
    assert np.abs(hidden(packed, rows) - expected).max() > 1e-2
