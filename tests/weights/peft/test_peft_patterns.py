"""Adapters whose modules differ: ranks, alphas, layers and exclusions, here and in peft."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.models.adapted import adapted
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs, pair_layouts
from jaxft.nn.matmul import lora_matmul
from jaxft.nn.param_spec import init_params
from jaxft.weights import pretrained
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("base"), tiny_torch())
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    return folder, model, load_on_host(str(folder), model, lambda path, array: jnp.asarray(array))


def fresh(model, settings):
    return init_params(adapter_specs(model.specs, settings, model.weight_names), jax.random.key(0))


def trained(model, settings):
    """An adapter whose b is not zero any more where its a is not."""

    def move(pair):
        if "a" not in pair:
            return {name: move(x) for name, x in pair.items()}
        noise = 0.1 * jax.random.normal(jax.random.key(1), pair["b"].shape)
        used = jnp.any(pair["a"] != 0, axis=-2)[..., None]
        return {**pair, "b": jnp.where(used, noise, 0.0)}

    return move(fresh(model, settings))


SETTINGS = [
    dict(rank_pattern=(("q_proj", 6), (r"layers\.1\.mlp\.up_proj", 2))),
    dict(alpha_pattern=((r".*\.0\..*o_proj", 3.0), ("up", 20.0))),
    dict(layers_to_transform=(0, 2), rslora=True),
    dict(layers_to_transform=(0, 2), targets=("q", "embed")),
    dict(exclude_modules=("mlp.down_proj", "k"), targets="all-linear"),
    dict(exclude_modules=r".*layers\.1\.mlp\..*", rank_pattern=(("layers.2.attn.q", 8),)),
]


@pytest.mark.quick_cases("*rslora*", "*alpha_pattern*", "*exclude_modules': (*")
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_our_adapter_has_the_same_logits_and_pairs_in_peft_and_round_trips(world, tmp_path, changes):
    model, settings = world[1], Adapter(rank=4, alpha=12.0, **changes)
    adapter, tokens = trained(model, settings), some_tokens()
    peft_write.save_adapter(tmp_path, adapter, settings, model, str(world[0]))
    expected = our_logits(adapted(model, settings), {"base": world[2], "adapter": adapter}, tokens)
    base = torch_model(world)
    assert np.abs(expected - torch_logits(base, tokens)).max() > 0.1
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    np.testing.assert_allclose(torch_logits(theirs, tokens), expected, atol=1e-4)
    # the pairs of the file are all that peft's model has
    shapes = {
        name.replace(".default", ""): tuple(p.shape)
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    from safetensors.numpy import load_file

    assert shapes == {n: x.shape for n, x in load_file(tmp_path / "adapter_model.safetensors").items()}
    again, found = peft_read.read_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    layouts = [pair_layouts(model.specs, x, model.weight_names) for x in (settings, found)]
    assert layouts[0] == layouts[1]


def torch_model(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(world[0])).eval()


@pytest.mark.parametrize(
    "config, layers",
    [
        (dict(target_modules="all-linear", rank_pattern={"q_proj": 6, r"layers\.1\..*up_proj": 2}), None),
        (dict(target_modules="all-linear", exclude_modules=["v_proj", "layers.0.mlp.up_proj"]), None),
        (dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]), (0, 2)),
    ],
    ids=str,
)
def test_settings_of_an_adapter_by_peft_declare_its_pairs(world, tmp_path, config, layers):
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        torch_model(world), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **config)
    )
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    theirs.save_pretrained(str(tmp_path))
    adapter, settings = peft_read.read_adapter(tmp_path, world[1])
    assert settings.layers_to_transform == layers
    ours = our_logits(adapted(world[1], settings), {"base": world[2], "adapter": adapter}, some_tokens())
    np.testing.assert_allclose(ours, torch_logits(theirs.eval(), some_tokens()), atol=1e-4)
    specs = adapter_specs(world[1].specs, settings, world[1].weight_names)
    shapes = jax.tree.map(lambda s: s.shape, specs, is_leaf=lambda x: hasattr(x, "init"))
    assert shapes == jax.tree.map(lambda x: x.shape, adapter)
    used = sum(max(0, rank) for x in pair_layouts(world[1].specs, settings, world[1].weight_names).values()
               for rank in x.ranks)  # fmt: skip
    assert used == sum(p.shape[0] for name, p in theirs.named_parameters() if "lora_A" in name)


def test_adapter_config_has_the_shortest_patterns(world, tmp_path):
    settings = Adapter(rank=4, alpha=8.0, rank_pattern=(("self_attn.q_proj", 6), ("layers.1.mlp.up_proj", 2)),
                       layers_to_transform=(0, 1))  # fmt: skip
    peft_write.save_adapter(tmp_path, fresh(world[1], settings), settings, world[1], "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"self_attn.q_proj": 6, "model.layers.1.mlp.up_proj": 2}
    assert config["layers_to_transform"] == [0, 1] and config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_the_zero_columns_of_a_smaller_rank_get_no_gradient(x64):
    key = jax.random.key(0)
    x, w, a, b = (
        jax.random.normal(jax.random.fold_in(key, i), s, jnp.float64)
        for i, s in enumerate([(7, 5), (5, 6), (5, 4), (4, 6)])
    )
    a, b = a.at[:, 2:].set(0.0), b.at[2:].set(0.0)
    da, db = jax.grad(
        lambda a, b: jnp.sum(jnp.sin(lora_matmul(x, x, w, a, b, jnp.float64(3.0)))), argnums=(0, 1)
    )(a, b)
    assert not np.any(da[:, 2:]) and not np.any(db[2:])
    assert np.all(np.abs(da[:, :2]) > 0) and np.all(np.abs(db[:2]) > 0)


def test_a_fresh_adapter_is_zero_beyond_each_layers_rank(world):
    settings = Adapter(
        rank=4, rank_pattern=(("layers.1.self_attn.q_proj", 6),), exclude_modules=("layers.2.attn.q",)
    )
    a = np.asarray(fresh(world[1], settings)["layers"]["attn"]["q"]["a"])
    assert a.shape == (3, 64, 6)
    assert [int(np.any(one != 0, axis=0).sum()) for one in a] == [4, 6, 0]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rank_pattern=(("q_prj", 3),)), ("rank_pattern", "'q_prj' matches no adapted module", "q_proj")),
        (dict(rank_pattern=(("mlp.*", 3), ("up_proj", 4))), ("'up_proj' is never used", "'mlp.*' comes")),
        (dict(alpha_pattern=(("q_proj", 3.0), ("q_proj", 4.0))), ("alpha_pattern", "never used")),
        (dict(exclude_modules=("k_proj", "q_prj")), ("exclude_modules: 'q_prj' matches none", "q_proj")),
        (dict(exclude_modules="q_prj"), ("exclude_modules: 'q_prj' matches none", "q_proj")),
        (dict(targets=("head",), layers_to_transform=(0,)), ("layers_to_transform", "(head) is in a layer")),
        (dict(exclude_modules=".*"), ("excludes every module",)),
        (dict(exclude_modules=("q_proj",), rank_pattern=(("q_proj", 3),)), ("matches no adapted module",)),
        (dict(layers_to_transform=(0, 3)), ("=0,3: the layers with adapter.targets are 0 to 2",)),
        (dict(layers_to_transform=(1, 1)), ("layers_to_transform=1,1 has a layer twice",)),
        (dict(layers_to_transform=()), ("the layers with adapter.targets are 0 to 2",)),
        (dict(rank_pattern=(("(", 3),)), ("rank_pattern", "not a valid regular expression")),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_select_nothing_or_contradict_are_refused_in_one_line(world, changes, words):
    with pytest.raises(ValueError) as caught:
        fresh(world[1], Adapter(rank=4, **changes))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rank_pattern=.*; expected at least 1 as value 2 in q:0"):
        Adapter(rank_pattern=(("q", 0),))
    with pytest.raises(ValueError, match="alpha_pattern: the alpha of 'q' must be finite"):
        Adapter(alpha_pattern=(("q", float("inf")),))


@pytest.mark.parametrize("name", ["k_proj", "k", "layers.1.self_attn.k_proj", "layers.1.attn.k"])
def test_a_single_name_to_exclude_is_a_list_of_one(world, name):
    one, listed = (
        pair_layouts(world[1].specs, Adapter(exclude_modules=names), world[1].weight_names)
        for names in (name, (name,))
    )
    assert one == listed and len(one) == (6 if name.startswith("k") else 7)
