"""Adapter files as peft and the trainers around it write them are the adapter that save_pretrained writes."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import tiny_torch, write_folder

from jaxft.weights import pretrained
from jaxft.weights.peft import peft_read
from jaxft.weights.peft.adapter_folders import adapter_folder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
LORA = dict(task_type="CAUSAL_LM", r=3, lora_alpha=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base's folder, its jaxft model, and peft adapters "default" and "left" on it."""
    folder = write_folder(tmp_path_factory.mktemp("base"), tiny_torch())
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(folder))
    config = peft.LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(base, config)
    theirs.add_adapter("left", peft.LoraConfig(**LORA, target_modules=["v_proj", "embed_tokens"]))
    torch.manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data += 0.05 * torch.randn_like(p)
    return folder, pretrained.model_for(str(folder), dtype=jnp.float32), theirs


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    assert found[1] == expected[1]


def in_wrappers(name):
    name = name.replace("base_model.model.", "base_model.model._orig_mod.")
    name = re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)
    return f"module.{name}"


VARIANTS = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight")
    .replace("lm_head.default", "lm_head.modules_to_save.default"),
    "a second prefix": lambda name: f"base_model.model.{name}",
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "modules_to_save without a name": lambda name: name.replace("lm_head.", "lm_head.modules_to_save."),
    "torch.compile, FSDP, checkpointing, DDP": in_wrappers,
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_in_use_are_those_of_save_pretrained(world, tmp_path, variant):
    world[2].save_pretrained(str(tmp_path))
    expected, path = peft_read.read_adapter(tmp_path, world[1]), tmp_path / "adapter_model.safetensors"
    plain = load_file(path)
    changed = {VARIANTS[variant](name): x for name, x in plain.items()}
    assert changed.keys() != plain.keys() and len(changed) == len(plain)
    save_file(changed, path)
    assert_same(peft_read.read_adapter(tmp_path, world[1]), expected)


def test_the_state_dict_of_a_peft_model_is_its_adapter(world, tmp_path):
    """With copies of the base's modules beside the saved ones; DoRA's vectors and rows of tokens too."""
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        **LORA, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"],
        trainable_token_indices=[5, 7],
    )  # fmt: skip
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(str(world[0])), config)
    theirs.save_pretrained(str(tmp_path))
    expected = peft_read.read_adapter(tmp_path, world[1])
    parts = "lora_", "modules_to_save", "original_module", "trainable_tokens_delta"
    state = {
        name: x.numpy() for name, x in theirs.state_dict().items() if any(part in name for part in parts)
    }
    assert sum("default" in name for name in state) > 6 and sum("original_module" in name for name in state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    assert_same(peft_read.read_adapter(tmp_path, world[1]), expected)


def test_an_adapter_with_a_name_is_in_a_subfolder(world, tmp_path):
    world[2].save_pretrained(str(tmp_path / "both"))
    world[2].save_pretrained(str(tmp_path / "one"), selected_adapters=["left"])
    both, left = tmp_path / "both", tmp_path / "one" / "left"
    assert adapter_folder(str(both)) == both and adapter_folder(str(tmp_path / "one")) == left
    assert set(peft_read.read_adapter(both, world[1])[0]) == {"layers", "head"}
    found = peft_read.read_adapter(left, world[1])
    assert set(found[0]) == {"layers", "embed"} and set(found[0]["layers"]) == {"attn"}
    assert_same(peft_read.read_adapter(both / "left", world[1]), found)
    a = world[2].state_dict()["base_model.model.model.layers.1.self_attn.v_proj.lora_A.left.weight"]
    np.testing.assert_array_equal(found[0]["layers"]["attn"]["v"]["a"][1].T, a.numpy())


def test_saved_embedding_layers_are_read_if_they_are_the_bases(world, tmp_path):
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(**LORA, target_modules=["q_proj"])
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(str(world[0])), config)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    expected = peft_read.read_adapter(tmp_path, world[1])
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    path, files = tmp_path / "adapter_model.safetensors", pretrained.open_files(str(world[0]))
    tensors, table = load_file(path), "base_model.model.model.embed_tokens.weight"
    assert table in tensors and "base_model.model.lm_head.weight" in tensors
    assert_same(peft_read.read_adapter(tmp_path, world[1]), expected)
    peft_read.check_base_copies(tmp_path, files)
    save_file({**tensors, table: tensors[table] + 1}, path)
    with pytest.raises(ValueError, match="list embed_tokens in modules_to_save of adapter_config.json"):
        peft_read.check_base_copies(tmp_path, files)
    save_file({**tensors, table: np.ones((330, 64), np.float32)}, path)
    with pytest.raises(ValueError, match="larger vocabulary; merge it"):
        peft_read.check_base_copies(tmp_path, files)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_files_keep_their_values_and_dtype(world, tmp_path, dtype):
    world[2].save_pretrained(str(tmp_path))
    path, exact = tmp_path / "adapter_model.safetensors", peft_read.read_adapter(tmp_path, world[1])[0]
    save_file({name: x.astype(dtype) for name, x in load_file(path).items()}, path)
    found = peft_read.read_adapter(tmp_path, world[1])[0]
    assert found["layers"]["mlp"]["down"]["b"].dtype == dtype and found["head"]["weight"].dtype == dtype
    for name in ("a", "b"):
        pairs = found["layers"]["attn"]["q"][name], exact["layers"]["attn"]["q"][name]
        np.testing.assert_array_equal(pairs[0], pairs[1].astype(dtype))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"


@pytest.mark.parametrize(
    "rename, words",
    [
        ({f"{A}.weight": f"{A}.left.weight"}, ("tensors of several adapters", "'left'", "selected_adapters")),
        ({f"{A}.weight": None}, ("lora_A.weight is missing",)),
        ({f"{A}.weight": f"{A}.bias"}, ("lora_A.weight is missing",)),
        ({"base_model.model.lm_head.weight": "lm_head.old_module.weight"}, ("lm_head.weight is missing",)),
        ({"extra": "base_model.model.v_head.summary.weight"}, ("v_head.summary.weight is not part of",)),
        ({"extra": "model.norm.original_module.weight"}, ("model.norm.original_module.weight is not part",)),
        ({"extra": f"{A}.default.weight"}, ("several adapters", "none (", "'default'")),
        ({"extra": f"base_model.model.{A}.weight"}, ("have the same name in PEFT's layout",)),
    ],
    ids=str,
)
def test_other_names_are_refused_in_one_line(world, tmp_path, rename, words):
    world[2].save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = {**load_file(path)}
    for old, new in rename.items():
        value = tensors.pop(old, np.zeros((3, 64), np.float32))
        tensors |= {new: value} if new else {}
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        peft_read.read_adapter(tmp_path, world[1])
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and all(word in message for word in words), message
