"""What an adapter trains besides pairs of linear layers: whole modules, biases, the table, rows of tokens.
Here and in peft, merged, and as the start of a run.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from merged_arrays import merged_arrays
from safetensors.numpy import load_file, save_file
from tiny_llama import our_logits, some_tokens, tiny_tokenizer, tiny_torch, torch_logits, write_folder

from jaxft.distributed import sharding
from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.train.export import export
from jaxft.weights import initial_params, pretrained
from jaxft.weights.edit.merged_weights import merge_on_read, merge_params
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
KINDS = {"untied": {}, "tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True}}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_e"
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    found = {}
    for kind, changes in KINDS.items():
        theirs = tiny_torch(**changes)
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.3)
        folder = write_folder(tmp_path_factory.mktemp(kind), theirs)
        model = pretrained.model_for(str(folder), dtype=jnp.float32)
        found[kind] = folder, model, load_on_host(str(folder), model, lambda path, array: jnp.asarray(array))
    return found


def torch_model(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(world[0])).eval()


def trained(world, settings):
    """A fresh adapter, started from the base's files, with noise on all that is trained."""
    model = adapted(world[1], settings)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    head = initial_params.HeadSettings(settings)
    fresh = initial_params.init_all_but_base(model, mesh, 0, head, str(world[0]))["adapter"]
    key = jax.random.key(1)

    def move(path, x):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(key, len(path)), x.shape)
        return x if path.endswith("scale") else x + noise

    return fresh, tree.map_with_path(move, fresh)


def ours(world, adapter, settings):
    params = {"base": world[2], "adapter": adapter}
    return our_logits(adapted(world[1], settings), params, some_tokens())


CASES = [
    ("untied", dict(targets=("q",), modules_to_save=("lm_head", "embed_tokens", "norm"))),
    ("tied", dict(targets=("q", "v"), modules_to_save=("lm_head", "final_norm"))),
    ("tied", dict(targets=("q",), modules_to_save=("embed_tokens",))),
    ("untied", dict(targets=("q", "embed_tokens"))),
    ("tied", dict(targets=("q", "embed"))),
    ("untied", dict(targets=("q",), trainable_token_indices=(5, 300, 7))),
    ("untied", dict(targets=("q",), trainable_token_indices=(5, 7), token_head=False)),
    ("tied", dict(targets=("q",), trainable_token_indices=(5, 300, 7))),
    ("tied", dict(targets=(), trainable_token_indices=(300, 5))),
    ("untied", dict(targets=(), trainable_token_indices=(300, 5))),
    ("biased", dict(targets=("q", "down"), bias="all")),
    ("biased", dict(targets=("q", "down"), bias="lora_only", modules_to_save=("k_proj",))),
]


@pytest.mark.quick_cases("untied-*modules_to_save*", "tied-*(5, 300, 7)*", "biased-*'all'}", "tied-*embed')}")
@pytest.mark.parametrize("kind, changes", CASES, ids=str)
def test_ours_has_the_same_logits_in_peft_merged_and_read_again(worlds, tmp_path, kind, changes):
    world, settings = worlds[kind], Adapter(rank=4, alpha=12.0, **changes)
    fresh, adapter = trained(world, settings)
    base = our_logits(world[1], world[2], some_tokens())
    np.testing.assert_allclose(ours(world, fresh, settings), base, atol=1e-5)
    expected = ours(world, adapter, settings)
    assert np.abs(expected - base).max() > 0.1

    peft_write.save_adapter(tmp_path / "a", adapter, settings, world[1], str(world[0]))
    theirs = peft.PeftModel.from_pretrained(torch_model(world), str(tmp_path / "a")).eval()
    np.testing.assert_allclose(torch_logits(theirs, some_tokens()), expected, atol=1e-4)

    again, found = peft_read.read_adapter(tmp_path / "a", world[1])
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, adapter))
    specs = [adapter_specs(world[1].specs, x, world[1].weight_names) for x in (settings, found)]
    shapes = [jax.tree.map(lambda s: s.shape, x, is_leaf=lambda x: hasattr(x, "init")) for x in specs]
    assert shapes[0] == shapes[1] and found.trainable_token_indices == settings.trainable_token_indices
    np.testing.assert_allclose(ours(world, again, found), expected, atol=1e-5)

    ids = settings.trainable_token_indices
    merged = merged_arrays(world[2], adapter, jnp.float32, ids)
    np.testing.assert_allclose(our_logits(world[1], merged, some_tokens()), expected, atol=1e-4)
    source = export.ExportSource(str(world[0]), world[1], tiny_tokenizer(), adapter, token_ids=ids)
    summary = export.export_model(tmp_path / "m", source, "float32")
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(str(tmp_path / "m")).eval()
    np.testing.assert_allclose(torch_logits(whole, some_tokens()), expected, atol=1e-4)
    untied = kind == "tied" and not ids
    assert ("a matrix of its own" in summary) == untied
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (kind == "tied" and not untied)

    if untied:
        with pytest.raises(ValueError, match="which are tied, cannot be merged"):
            merge_on_read(pretrained.open_params(str(world[0]), world[1]), world[1], adapter, ids)
    else:
        readers = merge_on_read(pretrained.open_params(str(world[0]), world[1]), world[1], adapter, ids)
        written = load_file(tmp_path / "m" / "model.safetensors")
        for reader in readers.values():
            for tensor in reader.tensors:
                whole = written.pop(tensor.name)
                whole = whole.T if tensor.transposed else whole
                np.testing.assert_allclose(reader.read(tensor), whole, atol=1e-5, err_msg=tensor.name)
                part = tuple(slice(2, max(3, n // 2)) for n in whole.shape)
                read = reader.read(tensor, part)
                np.testing.assert_allclose(read, whole[part], atol=1e-5, err_msg=tensor.name)
        assert not written


def test_a_head_made_of_a_tied_table_has_the_replaced_rows(worlds, tmp_path):
    world = worlds["tied"]
    settings = Adapter(rank=4, alpha=12.0, targets=("q", "head"), trainable_token_indices=(5, 300, 7))
    ids = settings.trainable_token_indices
    _, adapter = trained(world, settings)
    expected = ours(world, adapter, settings)
    merged = merged_arrays(world[2], adapter, jnp.float32, ids)
    np.testing.assert_allclose(our_logits(world[1], merged, some_tokens()), expected, atol=1e-4)
    stored = merge_params(world[2], adapter, np.float32, ids)["head"]
    np.testing.assert_allclose(stored, merged["head"], atol=1e-6)
    source = export.ExportSource(str(world[0]), world[1], tiny_tokenizer(), adapter, token_ids=ids)
    export.export_model(tmp_path / "m", source, "float32")
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(str(tmp_path / "m")).eval()
    np.testing.assert_allclose(torch_logits(whole, some_tokens()), expected, atol=1e-4)


THEIRS = [
    ("untied", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"])),
    ("tied", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    ("tied", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "mlp"])),
    (
        "tied",
        dict(
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
            init_lora_weights="mica",
        ),
    ),
    ("tied", dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    ("untied", dict(target_modules=["q_proj", "embed_tokens"])),
    ("untied", dict(target_modules=["q_proj"], trainable_token_indices=[5, 300, 7])),
    (
        "untied",
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 7], "lm_head": [5, 7]}),
    ),
    ("tied", dict(target_modules=["q_proj"], trainable_token_indices=[5, 300, 7])),
    ("biased", dict(target_modules=["layers.1.self_attn.q_proj", "down_proj"], bias="all")),
    ("biased", dict(target_modules=["q_proj", "down_proj"], bias="lora_only")),
    ("untied", dict(target_modules=["q_proj"], bias="all")),
]


@pytest.mark.quick_cases("untied-*modules_to_save*", "tied-*trainable*", "biased-*lora_only*")
@pytest.mark.parametrize("kind, config", THEIRS, ids=str)
def test_an_adapter_by_peft_has_the_same_logits_here_and_goes_back(worlds, tmp_path, kind, config):
    world = worlds[kind]
    torch.manual_seed(3)
    made = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **config)
    theirs = peft.get_peft_model(torch_model(world), made).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    theirs.save_pretrained(str(tmp_path / "in"))
    expected = torch_logits(theirs, some_tokens())
    adapter, settings = peft_read.read_adapter(tmp_path / "in", world[1])
    peft_read.check_base_copies(tmp_path / "in", pretrained.open_files(str(world[0])))
    assert np.abs(expected - our_logits(world[1], world[2], some_tokens())).max() > 0.1
    np.testing.assert_allclose(ours(world, adapter, settings), expected, atol=1e-4)
    peft_write.save_adapter(tmp_path / "out", adapter, settings, world[1], str(world[0]))
    back = peft.PeftModel.from_pretrained(torch_model(world), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(torch_logits(back, some_tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rows_of_tokens_by_pefts_own_type_have_the_same_logits_here(worlds, tmp_path, kind):
    world = worlds[kind]
    made = peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[5, 300], target_modules=["embed_tokens"]
    )
    theirs = peft.get_peft_model(torch_model(world), made).eval()
    torch.manual_seed(3)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(str(tmp_path))
    tokens = some_tokens()
    tokens.ids[0, :2] = 5, 300
    adapter, settings = peft_read.read_adapter(tmp_path, world[1])
    params = {"base": world[2], "adapter": adapter}
    found, expected = our_logits(adapted(world[1], settings), params, tokens), torch_logits(theirs, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - our_logits(world[1], world[2], tokens)).max() > 0.1


@pytest.mark.slow
def test_gradients_of_replaced_rows_are_those_of_the_whole_table(worlds):
    """The gradient of the rows is the rows of the table's gradient, as token and as output."""
    world = worlds["tied"]
    settings = Adapter(rank=2, targets=(), trainable_token_indices=(9, 5, 300))
    ids = jnp.array(settings.trainable_token_indices)
    tokens = some_tokens(1, 6)
    tokens = tokens.replace(ids=jnp.asarray(tokens.ids).at[0, 2].set(5).at[0, 4].set(9))
    rows = world[2]["embed"][ids] + 0.1

    def logits(base, adapter):
        model = adapted(world[1], settings)
        whole = {"base": base, "adapter": adapter}
        return jnp.sum(jnp.sin(model.logits(model.head(whole), model.hidden(whole, tokens)[0])))

    got = jax.grad(lambda rows: logits(world[2], {"embed": {"rows": rows}}))(rows)
    table = world[2]["embed"].at[ids].set(rows)
    expected = jax.grad(lambda table: logits({**world[2], "embed": table}, {}))(table)[ids]
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
    assert np.all(np.abs(np.asarray(got)).max(1) > 0)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("tied", dict(modules_to_save=("lm_haed",)), ("'lm_haed' is not a module", "lm_head")),
        ("tied", dict(modules_to_save=("layers.0.input_layernorm",)), ("in some layers only",)),
        ("tied", dict(targets=("q", "head"), modules_to_save=("lm_head",)), ("head is in targets and in",)),
        ("tied", dict(bias="all"), ("adapter.bias=all", "no biases", "bias=none")),
        ("biased", dict(targets=("down",), bias="lora_only"), ("the adapted layers have no biases",)),
        (
            "biased",
            dict(targets=("q",), layers_to_transform=(0,), bias="lora_only"),
            ("in some layers only",),
        ),
        ("tied", dict(trainable_token_indices=(320,)), ("320 is no token id", "0 to 319")),
        ("tied", dict(trainable_token_indices=(3, 3)), ("twice",)),
        (
            "tied",
            dict(trainable_token_indices=(3,), modules_to_save=("embed_tokens",)),
            ("embed is trained by modules_to_save or targets as well",),
        ),
        ("untied", dict(trainable_token_indices=(3,), targets=("head",)), ("adapter.token_head=false",)),
        ("tied", dict(targets=()), ("adapter.targets names no layer",)),
        ("tied", dict(trainable_token_indices=(3,), token_head=False), ("tied to its embeddings",)),
    ],
    ids=str,
)
def test_settings_that_contradict_or_select_nothing_are_refused_in_one_line(worlds, kind, changes, words):
    model = worlds[kind][1]
    with pytest.raises(ValueError) as caught:
        adapter_specs(model.specs, Adapter(rank=4, **changes), model.weight_names)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_files_with_missing_or_other_modules_are_refused_in_one_line(worlds, tmp_path):
    world = worlds["tied"]
    settings = Adapter(rank=2, targets=("q",), modules_to_save=("norm",), trainable_token_indices=(3, 4))
    peft_write.save_adapter(tmp_path, trained(world, settings)[1], settings, world[1], "base")
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, text = load_file(path), config.read_text()
    norm = "base_model.model.model.layers.1.input_layernorm.weight"
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for name in (norm, rows):
        for changed in ({k: v for k, v in good.items() if k != name}, {**good, name: good[name][:1]}):
            save_file(changed, path)
            with pytest.raises(ValueError, match=rf"tensor {name} (is missing|has shape)") as caught:
                peft_read.read_adapter(tmp_path, world[1])
            assert "\n" not in str(caught.value)
    save_file(good, path)
    for change, words in [
        ({"modules_to_save": ["norms"]}, "no module 'norms'"),
        ({"modules_to_save": ["layers.1.input_layernorm"]}, "some layers only"),
        ({"modules_to_save": "norm"}, "expected a list of names"),
        ({"trainable_token_indices": [3, 320]}, "expected ids from 0 to 319"),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3]}},
            "the same for embed_tokens and lm_head.*merge_and_unload",
        ),
        ({"trainable_token_indices": None}, "trainable_tokens_delta is not part of"),
        ({"modules_to_save": None}, "input_layernorm.weight is not part of"),
    ]:
        config.write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(ValueError, match=words) as caught:
            peft_read.read_adapter(tmp_path, world[1])
        assert "\n" not in str(caught.value)


def test_adapters_that_peft_loads_and_jaxft_does_not_are_refused_with_a_remedy(worlds, tmp_path):
    for kind, config, words in [
        (
            "biased",
            dict(target_modules=["q_proj"], bias="lora_only", layers_to_transform=[1]),
            r"bias='lora_only' selects layers/attn/\w_bias in some layers only, .*merge_and_unload",
        ),
        (
            "untied",
            dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
            r"use_dora=true with a LoRA pair of embed_tokens .*merge_and_unload",
        ),
    ]:
        made = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **config)
        peft.get_peft_model(torch_model(worlds[kind]), made).save_pretrained(str(tmp_path / kind))
        with pytest.raises(ValueError, match=words) as caught:
            peft_read.read_adapter(tmp_path / kind, worlds[kind][1])
        message = str(caught.value)
        assert "\n" not in message and str(tmp_path / kind) in message, message


def test_a_head_that_its_configuration_ties_has_the_values_of_the_embeddings(worlds, tmp_path):
    world, settings = worlds["tied"], Adapter(rank=2, targets=("q",), modules_to_save=("embed", "lm_head"))
    peft_write.save_adapter(tmp_path, trained(world, settings)[1], settings, world[1], "base")
    path = tmp_path / "adapter_config.json"
    changes = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match="lm_head.weight is not .*embed_tokens.weight, but") as caught:
        peft_read.read_adapter(tmp_path, world[1])
    assert "\n" not in str(caught.value)
