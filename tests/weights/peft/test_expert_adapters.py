"""Adapters of experts, and of models of several stacks, in files: peft loads them, exports merge them, and a
quantised base takes them.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_experts
import torch
from merged_arrays import merged_arrays
from safetensors.numpy import save_file
from tiny_experts import CONFIG, KERNELS
from tiny_model import assert_close, examples, one_by_one

from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.models import model_types
from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.full_modules import saved_paths
from jaxft.nn.adapters.lora import Adapter, pairs_by_path
from jaxft.nn.adapters.lora_specs import adapter_specs, differing_fields, pair_layouts
from jaxft.nn.param_spec import ParamSpec, full, init_params, is_spec, spec_paths
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.nn.tensor_names import TensorName
from jaxft.train.export.export import ExportSource, merged_base
from jaxft.train.start.eva import written_adapter
from jaxft.weights import pretrained
from jaxft.weights.edit.lora_start import init_magnitudes
from jaxft.weights.hf import hf_write
from jaxft.weights.peft import peft_read, peft_write
from jaxft.weights.peft.adapter_folders import load_adapter
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
        patch.setitem(model_types.FAMILIES, "tiny_experts", tiny_experts.FAMILY)
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
        for tensor in tensors if tensors[0].is_kernel and tensors[0].layer is not None else ():
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
    found, settings = peft_read.read_adapter(folder / "adapter", model)
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


@pytest.fixture(scope="module")
def three_stacks():
    """(model, base) of layers 0 to 3, of which 1 and 2 have experts and a shared one."""
    model = tiny_experts.three_stacks()
    specs = jax.tree.map(lambda s: s.shape, model.specs, is_leaf=is_spec)
    return model, jax.tree.map(
        lambda shape: np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32),
        specs,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def random_adapter(model, settings):
    """An adapter with a value of its own in every leaf, and zeros beyond the rank of each module."""
    specs = spec_paths(adapter_specs(model.specs, settings, model.weight_names))
    layouts, found = pair_layouts(model.specs, settings, model.weight_names), {}
    for path, spec in specs.items():
        above, _, name = path.rpartition("/")
        x = np.random.default_rng(len(found)).normal(size=spec.shape).astype(np.float32)
        if name == "scale":
            x = np.asarray(spec.init(jax.random.key(0), spec.shape, jnp.float32))
        if name in ("a", "b"):
            used = np.arange(max(layouts[above].ranks)) < np.array(layouts[above].ranks)[:, None]
            used = used.reshape(*spec.shape[:-2], -1)
            x = x * (used[..., None, :] if name == "a" else used[..., None])
        found[path] = x
    return tree.nested(found)


def deltas(model, adapter, settings):
    """What an adapter adds to each module, by its name in files."""
    pairs, layouts = pairs_by_path(adapter), pair_layouts(model.specs, settings, model.weight_names)
    return {
        tensor.module: np.einsum("ir,ro->oi", *(pairs[path][x][tensor.index] for x in "ab"))
        * pairs[path]["scale"][tensor.index]
        for path, layout in layouts.items()
        for tensor, rank in zip(tensors_of(model)[path], layout.ranks, strict=True)
        if rank
    }


SHARED = [f"model.layers.{i}.mlp.shared_expert.{name}_proj" for i in (1, 2) for name in KERNELS]
TAIL = [f"model.layers.3.mlp.{name}_proj" for name in KERNELS]
RANKS = ("shared_expert.down_proj", 4), ("experts.1.down_proj", 3)
ONE = r".*(experts\.0|\.1\.mlp).*"
SOME = {  # settings, how many modules they adapt, which they train in full
    "layers of one dense stack": (dict(targets=("q", "down"), layers_to_transform=(3,)), 2, []),
    "layers of two stacks": (dict(targets=("q", "gate"), layers_to_transform=(0, 2)), 2 + 1 + 3, []),
    "alpha of a layer": (dict(targets=("q",), alpha_pattern=(("layers.3.self_attn.q_proj", 16.0),)), 4, []),
    "rank of a layer": (dict(targets=("q",), rank_pattern=(("layers.0.self_attn.q_proj", 4),)), 4, []),
    "rank by a path": (dict(targets=("q", "k"), rank_pattern=(("moe.2.attn.q", 4),)), 8, []),
    "ranks of kinds of MLPs": (dict(targets=("down",), rank_pattern=RANKS), 2 + 2 * 3, []),
    "shared expert": (dict(targets="moe/mlp/shared/.*"), 6, []),
    "an expert": (dict(targets="moe/mlp/experts/(up|down)", exclude_modules=r".*experts\.0\..*"), 4, []),
    "an expert of a layer": (dict(targets="moe/mlp/experts/down", exclude_modules=ONE), 1, []),
    "all but an expert": (dict(exclude_modules=("layers.2.mlp.experts.1.up_proj",)), 16 + 6 + 18 - 1, []),
    "shared expert in full": (dict(targets=("q",), modules_to_save=("shared_expert",)), 4, SHARED),
    "a dense MLP in full": (dict(targets=("q",), modules_to_save=("layers.3.mlp",)), 4, TAIL),
}


@pytest.mark.parametrize("case", SOME)
def test_an_adapter_of_some_modules_of_several_stacks_is_in_peft_and_read_again_where_it_was(
    three_stacks, tmp_path, case
):
    (model, base), (changes, count, in_full) = three_stacks, SOME[case]
    settings = Adapter(rank=2, alpha=4.0, **changes)
    adapter = random_adapter(model, settings)
    expected = deltas(model, adapter, settings)
    assert len(expected) == count
    peft_write.save_adapter(tmp_path, adapter, settings, model, "base")
    theirs = peft.PeftModel.from_pretrained(torch_twin(model, base), str(tmp_path)).base_model.model
    layers = {name: x for name, x in theirs.named_modules() if hasattr(x, "get_delta_weight")}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        np.testing.assert_allclose(layer.get_delta_weight("default").detach(), expected[name], atol=1e-5)
    saved = [name for name, x in theirs.named_modules() if hasattr(x, "modules_to_save")]
    assert sorted(saved) == sorted(in_full)
    found, again = peft_read.read_adapter(tmp_path, model)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, adapter)
    assert differing_fields(model.specs, settings, again, model.weight_names) == []
    layouts = [pair_layouts(model.specs, x, model.weight_names) for x in (settings, again)]
    assert layouts[0] == layouts[1]
    patterns = [pattern for pattern, _ in (*again.rank_pattern, *again.alpha_pattern)]
    assert len(patterns) <= 2, patterns  # one for all layers of an expert


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["q_proj"], layers_to_transform=[1, 2]),
        dict(target_modules=["experts.1.down_proj", "tail"], alpha_pattern={"2.*": 7}),
        dict(target_modules=r".*\.[03]\.mlp\..*", rank_pattern={"layers.3.mlp.up_proj": 3}),
        dict(target_modules=["gate_proj"], modules_to_save=["shared_expert"]),
    ],
    ids=str,
)
def test_an_adapter_by_peft_of_some_modules_of_several_stacks_is_loaded(three_stacks, tmp_path, config):
    model, base = three_stacks
    theirs = peft.get_peft_model(
        torch_twin(model, base), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **config)
    )
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    theirs.save_pretrained(str(tmp_path))
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    save_file({"any": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    adapter, settings = load_adapter(tmp_path, model, mesh, str(tmp_path))
    specs = spec_paths(adapter_specs(model.specs, settings, model.weight_names))
    assert {path: s.shape for path, s in specs.items()} == {
        path: x.shape for path, x in tree.paths(adapter).items()
    }
    layers = {x: y for x, y in theirs.base_model.model.named_modules() if hasattr(y, "get_delta_weight")}
    ours = deltas(model, adapter, settings)
    assert ours.keys() == layers.keys()
    for name, layer in layers.items():
        np.testing.assert_allclose(ours[name], layer.get_delta_weight("default").detach(), atol=1e-5)


def test_what_is_trained_in_full_in_one_stack_is_no_other_stacks(three_stacks):
    model, _ = three_stacks
    base, names = spec_paths(model.specs), dict(model.weight_names)
    for stack in ("dense", "tail"):
        q = base[f"{stack}/attn/q"]
        base[f"{stack}/attn/q_bias"] = ParamSpec((1, 32), ("layers", "heads"), full(0.0), None, q.numbers)
        names[f"{stack}/attn/q_bias"] = TensorName("model.layers.{i}.self_attn.q_proj.bias")
    for listed, expected in [
        ("model.layers.0.mlp.down_proj", ["dense/mlp/down"]),
        ("layers.3.self_attn.q_proj", ["tail/attn/q", "tail/attn/q_bias"]),
        ("shared_expert", [f"moe/mlp/shared/{name}" for name in KERNELS]),
        ("tail.3.attn.q", ["tail/attn/q", "tail/attn/q_bias"]),
    ]:
        assert sorted(saved_paths(base, (listed,), names)) == sorted(expected)
    for layers, expected in [((0,), ["dense"]), ((0, 3), ["dense", "tail"]), ((1,), [])]:
        adapter = Adapter(rank=2, targets=("q",), layers_to_transform=layers, bias="lora_only")
        specs = tree.nested(base)
        if not expected:
            with pytest.raises(ValueError, match="the adapted layers have no biases"):
                adapter_specs(specs, adapter, names)
            continue
        declared = spec_paths(adapter_specs(specs, adapter, names))
        biases = [path for path in declared if "bias" in path]
        assert biases == [f"{stack}/attn/q_bias/weight" for stack in expected]


def test_all_linear_leaves_routers_out_and_parts_of_fused_experts_are_refused_before_training(three_stacks):
    model, _ = three_stacks
    adapted_paths = pair_layouts(model.specs, Adapter(), model.weight_names)
    assert "moe/mlp/experts/up" in adapted_paths and "moe/mlp/router" not in adapted_paths
    assert [*pair_layouts(model.specs, Adapter(targets=("router",)), model.weight_names)] == [
        "moe/mlp/router"
    ]
    fused = "model.layers.{i}.mlp.experts.{x}.gate_up_proj.weight"
    parts = {f"moe/mlp/experts/{name}": TensorName(fused, True, i) for i, name in enumerate(("gate", "up"))}
    for settings in (Adapter(), Adapter(targets=("gate",))):
        with pytest.raises(ValueError, match="adapter.targets: moe/mlp/experts/gate is a part of") as caught:
            adapter_specs(model.specs, settings, model.weight_names | parts)
        assert "\n" not in str(caught.value) and "adapter.exclude_modules" in str(caught.value)
    dense = Adapter(targets=("gate",), exclude_modules=r".*gate_up_proj")
    found = pair_layouts(model.specs, dense, model.weight_names | parts)
    assert [*found] == ["dense/mlp/gate", "moe/mlp/shared/gate", "tail/mlp/gate"]


def test_an_adapter_of_eva_without_ranks_in_a_stack_is_read_again(three_stacks, tmp_path):
    model, _ = three_stacks
    settings = Adapter(rank=2, alpha=4.0, targets=("q", "k"), init="eva")
    specs = adapter_specs(model.specs, settings, model.weight_names)
    started = init_params(specs, jax.random.key(0))
    none = tree.map_with_path(lambda path, x: 0 * x if path.startswith(("dense", "moe")) else x, started)
    adapter, written = written_adapter(none, settings, model)
    peft_write.save_adapter(tmp_path, adapter, written, model, "base")
    found, again = peft_read.read_adapter(tmp_path, model)
    assert set(pairs_by_path(found)) == {"tail/attn/q", "tail/attn/k"}
    assert differing_fields(model.specs, written, again, model.weight_names) == []
