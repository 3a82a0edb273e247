"""Trained decoders of multimodal checkpoints: adapters for transformers' classes, folders that keep their
class, text models and GGUF files.
"""

import dataclasses
import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts_in_process import call
from tiny_families import logits_of, rows
from tiny_tokenizers import tiny

from jaxft.models.adapted import adapted
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import pair_layouts
from jaxft.nn.param_spec import is_spec
from jaxft.nn.quant import Quant
from jaxft.train import trainable_params
from jaxft.train.export import export
from jaxft.weights import pretrained
from jaxft.weights.edit import extended_model
from jaxft.weights.hf import hf_read
from jaxft.weights.hf.model_card import Card, write_card
from jaxft.weights.hf.safetensors import open_safetensors
from jaxft.weights.hf.tokenizer_files import TEMPLATES_FOLDER
from jaxft.weights.param_loading import param_readers, read_whole
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
tiny_vision = pytest.importorskip("tiny_vision")
IDS = np.random.default_rng(0).integers(20, 96, (2, 20))  # none of them of an image
LORA = Adapter(rank=2, alpha=4.0)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_e", "ignore:`is_gradient_check"
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """For the name of a case: (its folder, transformers' model, jaxft's model, the parameters)."""
    found = {}

    def world(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("model")
            theirs = tiny_vision.write_tiny(kind, folder)
            model = pretrained.model_for(str(folder), dtype=jnp.float32)
            readers = param_readers(hf_read.open_folder(folder), model)
            params = {path: jnp.asarray(read_whole(reader)) for path, reader in readers.items()}
            found[kind] = folder, theirs, model, tree.nested(params)
        return found[kind]

    return world


def random_adapter(model, settings, seed=0):
    """An adapter far from the base's weights; a and b are zero beyond the rank of their layer."""
    rng, layouts = np.random.default_rng(seed), pair_layouts(model.specs, settings, model.weight_names)

    def leaf(path, spec):
        above, _, name = path.rpartition("/")
        value = rng.normal(0, 0.3, spec.shape).astype(np.float32)
        if name in ("weight", "rows", "magnitude"):
            return np.abs(value) + 1 if name == "magnitude" else value
        ranks, alphas = layouts[above]
        if name == "scale":
            scales = [
                settings.scale_of(*x) if x[0] else settings.scale for x in zip(ranks, alphas, strict=True)
            ]
            return np.float32(scales).reshape(spec.shape)
        used = np.arange(max(ranks)) < np.array(ranks)[:, None]
        used = used[:, :, None] if name == "b" else used[:, None]
        return np.where(used if spec.shape[:-2] else used[0], value, np.float32(0))

    return tree.map_with_path(leaf, adapted(model, settings).specs["adapter"], is_leaf=is_spec)


def text_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.float().numpy()


def loaded(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32).eval()


def raw_tensors(folder):
    """(dtype, shape, bytes, name of the file) of every tensor in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, x in open_safetensors(folder, [path]).tensors.items():
            with safe_open(path, "pt") as file:
                value = file.get_tensor(name)
            found[name] = value.dtype, x.shape, value.view(torch.uint8).numpy().tobytes(), path.name
    return found


CASES = [(kind, LORA) for kind in tiny_vision.CASES]
CASES += [
    ("gemma3", replace(LORA, targets=("q",), modules_to_save=("embed_tokens",))),
    ("gemma3", replace(LORA, targets=("q",), modules_to_save=("lm_head", "norm"))),
    ("gemma3", replace(LORA, targets=("q",), trainable_token_indices=(5, 30))),
    ("gemma3", replace(LORA, targets=(), trainable_token_indices=(5, 30))),
    ("llava", replace(LORA, targets=("q", "lm_head", "embed_tokens"))),
    ("llava", replace(LORA, targets=("q", "v"), dora=True, rank_pattern=(("q_proj", 3),))),
    ("mistral3", replace(LORA, rank_pattern=((r"layers\.1\.self_attn\.k_proj", 1), ("down_proj", 3)))),
    ("smolvlm", replace(LORA, targets=("q", "down"), layers_to_transform=(1,))),
    ("qwen2_5_vl", replace(LORA, targets=("q", "down"), bias="lora_only")),
]


def as_on_its_card(adapter, base):
    """The model that the Python code on an adapter's card loads."""
    write_card(adapter, Card("a", str(base), "adapter", "peft", "A text.", multimodal=True))
    (code,) = re.findall(r"```python\n(.*?)tokenizer = ", (adapter / "README.md").read_text(), re.DOTALL)
    names = {"BASE": str(base), "FOLDER": str(adapter)}
    exec(code, names)
    return names["model"]


def case_name(value):
    """The name of a case, or what an adapter's settings have that is not LORA's."""
    if isinstance(value, str):
        return value
    changed = {x.name for x in dataclasses.fields(value) if getattr(value, x.name) != getattr(LORA, x.name)}
    return " ".join(f"{name}={getattr(value, name)}" for name in sorted(changed)) or "LoRA"


@pytest.mark.quick_cases("gemma3-targets=('q',)*indices*", "mistral3-rank_pattern*")
@pytest.mark.parametrize("kind, settings", CASES, ids=case_name)
def test_an_adapter_has_the_same_logits_in_peft_on_transformers_class_and_merged(
    worlds, tmp_path, kind, settings
):
    folder, theirs, model, params = worlds(kind)
    adapter = random_adapter(model, settings)
    whole = adapted(model, settings)
    expected = np.asarray(logits_of(whole, {"base": params, "adapter": adapter}, rows(IDS)))
    assert np.abs(expected - text_logits(theirs)).max() > 0.3

    peft_write.save_adapter(tmp_path / "a", adapter, settings, model, str(folder))
    found = as_on_its_card(tmp_path / "a", folder).eval()
    np.testing.assert_allclose(text_logits(found), expected, atol=2e-4)
    again, read = peft_read.read_adapter(tmp_path / "a", model)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)

    ids = read.trainable_token_indices
    source = export.ExportSource(str(folder), model, None, again, token_ids=ids)
    export.export_model(tmp_path / "m", source)
    merged = loaded(tmp_path / "m")
    assert type(merged) is type(theirs)
    np.testing.assert_allclose(text_logits(merged), expected, atol=2e-4)


def processor_files(folder):
    """Write files as processors have them, and others that are no part of a model."""
    tiny("chatml").save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text('{"size":   {"height": 28}}')
    (folder / "processor_config.json").write_text("{ }")
    (folder / "chat_template.json").write_text('{"chat_template": "x"}')
    (folder / "modeling_tiny.py").write_text("1 / 0")
    (folder / "untrained_tokens.json").write_text('{"tokens": {}}')
    (folder / "optimizer.pt").write_bytes(b"no model")
    (folder / "model.fp16.safetensors.index.json").write_text("{}")
    (folder / TEMPLATES_FOLDER).mkdir()
    (folder / TEMPLATES_FOLDER / "tool_use.jinja").write_text("{{ messages }}")
    return {
        "preprocessor_config.json", "processor_config.json", "chat_template.json", "modeling_tiny.py",
        f"{TEMPLATES_FOLDER}/tool_use.jinja",
    }  # fmt: skip


def test_all_that_was_not_trained_is_copied_byte_for_byte_into_the_same_files(tmp_path):
    """Of a decoder in bfloat16 with a tower in float32, whole numbers among it, in several files."""
    theirs = tiny_vision.write_tiny("mistral3", tmp_path / "unused")
    folder, out = tmp_path / "base", tmp_path / "merged"
    theirs.model.language_model.bfloat16()
    theirs.model.vision_tower.register_buffer("whole_numbers", torch.arange(3))
    theirs.save_pretrained(folder, max_shard_size=40_000)
    small = processor_files(folder)
    model, settings = pretrained.model_for(str(folder)), replace(LORA, targets=("q",))
    tokenizer = pretrained.load_tokenizer(str(folder))
    source = export.ExportSource(str(folder), model, tokenizer, random_adapter(model, settings))
    export.export_model(out, source)
    old, new = raw_tensors(folder), raw_tensors(out)
    assert old.keys() == new.keys() and len({file for *_, file in old.values()}) > 3
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert all(old[name][:2] == new[name][:2] and old[name][3] == new[name][3] for name in changed)
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    files = {str(path.relative_to(folder)) for path in paths}
    others = {"optimizer.pt", "untrained_tokens.json", "model.fp16.safetensors.index.json"}
    assert small < files and "model.safetensors.index.json" in files
    for name in files - others:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not others & {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "image-text-to-text" in card and "AutoModelForImageTextToText.from_pretrained(FOLDER)" in card


def test_a_wider_dtype_and_a_head_of_its_own_are_in_config_and_index(tmp_path):
    theirs = tiny_vision.write_tiny("gemma3", tmp_path / "unused").bfloat16()
    folder = tmp_path / "base"
    theirs.save_pretrained(folder, max_shard_size=40_000)
    model, settings = (
        pretrained.model_for(str(folder)),
        Adapter(targets=(), modules_to_save=("embed_tokens",)),
    )
    source = export.ExportSource(str(folder), model, None, random_adapter(model, settings))
    export.export_model(tmp_path / "out", source, "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["dtype"] == "float32"
    assert config["vision_config"] == json.loads((folder / "config.json").read_text())["vision_config"]
    old, new = raw_tensors(folder), raw_tensors(tmp_path / "out")
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    assert {name for name in new if new[name] != old.get(name)} == {head, table}
    assert new[head][2] != new[table][2] and new[head][3] == new[table][3]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (*_, file) in new.items()}
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data, _ in new.values())


def test_an_adapter_of_a_quantised_base_changes_the_weights_that_were_quantised(worlds, tmp_path):
    folder, _, model, _ = worlds("mistral3")
    settings = replace(LORA, targets=("q",))
    source = export.ExportSource(str(folder), model, None, random_adapter(model, settings), Quant("int8"))
    export.export_model(tmp_path / "out", source)
    old, new = raw_tensors(folder), raw_tensors(tmp_path / "out")
    linear = {name for name in old if "language_model" in name and name.endswith("_proj.weight")}
    assert {name for name in old if old[name] != new[name]} == linear


def test_a_run_that_trains_the_decoder_in_part_copies_the_rest(worlds, tmp_path):
    folder, _, model, params = worlds("llava")
    t = trainable_params.partition_params(model, None, "base/layers/mlp/.*")
    moved = tree.map_with_path(lambda path, x: x + 1 if "mlp" in path else x * 1.001, params)
    run = SimpleNamespace(adapter=None, model=model, weights=str(folder))
    out = export.export_run(t, {"base": moved}, run, None, tmp_path)
    old, new = raw_tensors(folder), raw_tensors(out)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {name for name in old if "language_model" in name and ".mlp." in name}
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    with safe_open(out / "model.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor(name), moved["layers"]["mlp"]["up"][1].T)


def test_the_decoder_alone_is_a_text_model_and_a_gguf_file(worlds, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, theirs, model, params = worlds("qwen2_5_vl")
    source = export.ExportSource(str(folder), model, tiny("chatml"))
    export.export_model(tmp_path / "text", source, "float32", text_only=True)
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "text")).eval()
    assert type(again).__name__ == "Qwen2ForCausalLM"
    np.testing.assert_allclose(text_logits(again), text_logits(theirs), atol=1e-4)
    assert not [name for name in raw_tensors(tmp_path / "text") if "visual" in name]


def read_params(ref, model):
    readers = param_readers(pretrained.open_files(str(ref)), model)
    return tree.nested({path: jnp.asarray(read_whole(reader)) for path, reader in readers.items()})


@pytest.mark.quick_cases("mistral3")
@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "llava", "qwen2_5_vl", "qwen3_vl"])
def test_the_gguf_file_of_a_decoder_is_the_same_text_model(worlds, tmp_path, kind):
    folder, theirs, model, _ = worlds(kind)
    source = export.ExportSource(str(folder), model, tiny("chatml"))
    summary = export.export_gguf(tmp_path / "m.gguf", source, "F32")
    assert "images are not supported" in summary
    read = pretrained.model_for(str(tmp_path / "m.gguf"), dtype=jnp.float32)
    found = logits_of(read, read_params(tmp_path / "m.gguf", read), rows(IDS))
    np.testing.assert_allclose(found, text_logits(theirs), atol=1e-4)


@pytest.mark.parametrize(
    "targets", [r".*language_model.*\.(q_proj|down_proj)", ["q_proj", "down_proj"]], ids=str
)
def test_peft_s_own_adapter_of_the_whole_model_is_read_for_its_decoder(worlds, tmp_path, targets):
    """A regular expression for whole names, ranks by whole names; pairs of the tower change nothing."""
    folder, _, model, params = worlds("mistral3")
    name = "model.language_model.layers.1.self_attn.q_proj"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=targets, rank_pattern={name: 3}, alpha_pattern={name: 5},
        modules_to_save=["language_model.norm"],
    )  # fmt: skip
    theirs = peft.get_peft_model(loaded(folder), settings).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(str(tmp_path))
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        assert any("vision_tower" in name for name in file.keys()) == isinstance(targets, list)  # noqa: SIM118
    adapter, read = peft_read.read_adapter(tmp_path, model)
    assert read.modules_to_save == ("model.norm",) and adapter["layers"]["attn"]["q"]["a"].shape[-1] == 3
    ours = logits_of(adapted(model, read), {"base": params, "adapter": adapter}, rows(IDS))
    np.testing.assert_allclose(ours, text_logits(theirs), atol=2e-4)


def test_new_tokens_and_a_template_leave_a_multimodal_model_one(worlds, tmp_path, monkeypatch):
    folder, theirs, model, params = worlds("mistral3")
    base, out = tmp_path / "base", tmp_path / "out"
    theirs.save_pretrained(base)
    templates = {"chat_template.json", f"{TEMPLATES_FOLDER}/tool_use.jinja"}  # the tokenizer has others now
    small = processor_files(base) - templates
    extended_model.extend_model(out, str(base), extended_model.Extension(("<new>",)))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mistral3" and config["text_config"]["vocab_size"] == 384
    old, new = raw_tensors(base), raw_tensors(out)
    assert {name for name in new if new[name] != old[name]} == {"language_model.model.embed_tokens.weight"}
    assert small < {path.name for path in out.iterdir()}
    larger = loaded(out)
    assert larger.get_input_embeddings().weight.shape[0] == 384
    np.testing.assert_allclose(text_logits(larger)[..., :321], text_logits(theirs), atol=1e-5)

    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    linked, _ = extended_model.extended_ref(str(base), extended_model.Extension(template="chatml"))
    assert hf_read.text_part_of(linked) and small < set(os.listdir(linked))


def test_quantised_weights_are_those_of_a_text_model(worlds, tmp_path):
    folder, _, model, _ = worlds("mistral3")
    source = export.ExportSource(str(folder), model, None)
    export.export_model(tmp_path / "packed", source, None, export.ExportQuant(Quant("int8")))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["model_type"] == "mistral" and "vision_config" not in config


def test_a_folder_that_is_gone_changed_or_quantised_is_one_line(worlds, tmp_path):
    _, theirs, model, params = worlds("mistral3")
    base, out = tmp_path / "base", tmp_path / "out"
    run = SimpleNamespace(adapter=None, model=model, weights=str(base))
    parts = trainable_params.partition_params(model, None, "base/.*")
    source = export.ExportSource(str(base), model, None, random_adapter(model, LORA))

    def line_of(error, write):
        with pytest.raises(error) as caught:
            write()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def write_run():
        export.export_run(parts, {"base": params}, run, None, tmp_path / "run")

    for write in (write_run, lambda: export.export_model(out, source)):
        assert "base: no such model file or folder" in line_of(FileNotFoundError, write)
    theirs.save_pretrained(base)
    state = load_file(base / "model.safetensors")
    save_file({x: value for x, value in state.items() if "layers.1." not in x}, base / "model.safetensors")
    expected = "of the text decoder is missing; use the model's folder as it was when the decoder was trained"
    assert expected in line_of(ValueError, write_run)
    assert "tensors are missing" in line_of(ValueError, lambda: export.export_model(out, source))
    quantise_fp8(base, state)
    expected = "the weights of this multimodal model are quantised, .* use --text-only for a text model"
    assert re.search(expected, line_of(ValueError, lambda: export.export_model(out, source)))
    assert not out.exists()
    export.export_model(out, source, text_only=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "mistral"


def quantise_fp8(folder, state):
    """Write tensors with the MLPs of the decoder in blocks of FP8, as fine-grained checkpoints have them."""
    out = {}
    for name, value in state.items():
        if "language_model" in name and ".mlp." in name:
            blocks = [-(-size // 32) for size in value.shape]
            out |= {name: value.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(blocks)}
        else:
            out[name] = value.contiguous()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))


ROWS = [
    {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i % 7}"}]}
    for i in range(40)
]


@pytest.mark.slow
def test_a_run_on_a_multimodal_folder_is_used_like_any_other(tmp_path, monkeypatch, capsys):
    """Two steps with LoRA and two in full, exported, sampled and loaded by transformers and PEFT."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    tiny_vision.write_tiny("gemma3", base)
    tiny("chatml").save_pretrained(str(base))
    (base / "preprocessor_config.json").write_text('{"size":   {"height": 28}}')
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ("model=base", "data=rows.jsonl", "loop.steps=2", "data.batch=4", "data.max_length=64")

    def run(name, *args):
        code, out, err = call(monkeypatch, capsys, name, *args)
        assert code == 0, out + err
        return out + err

    assert "images are not supported" in run("train", "--config", "sft", *options, "name=lora")
    run("train", "--config", "sft_full", *options, "name=full")
    assert "as a multimodal model" in run("export", "--run", "runs/lora", "--out", "merged")
    run("generate", "--model", "merged", "--prompt", "what is 3?", "--max-new", "4")
    whole, before = loaded("merged"), text_logits(loaded(base))
    found = peft.PeftModel.from_pretrained(loaded(base), "runs/lora/adapter").eval()
    assert np.abs(text_logits(found) - before).max() > 0.05
    np.testing.assert_allclose(text_logits(found), text_logits(whole), atol=5e-3)
    run("extract", "base", "merged", "--rank", "16", "--out", "again")
    again = peft.PeftModel.from_pretrained(loaded(base), "again").eval()
    np.testing.assert_allclose(text_logits(again), text_logits(whole), atol=5e-3)
    full = loaded("runs/full/model")
    assert {type(whole).__name__, type(full).__name__} == {"Gemma3ForConditionalGeneration"}
    assert np.abs(text_logits(full) - before).max() > 0.05
    for folder in ("merged", "runs/full/model"):
        assert (tmp_path / folder / "preprocessor_config.json").read_bytes() == b'{"size":   {"height": 28}}'
