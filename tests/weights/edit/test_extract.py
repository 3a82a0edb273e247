"""An adapter extracted from two models: exact where the difference has its rank, and else the nearest one."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from safetensors.numpy import load_file, save_file
from scripts_in_process import call
from tiny_llama import (
    edit_config,
    some_tokens,
    tiny_tokenizer,
    tiny_torch,
    torch_logits,
    write_folder,
)

from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import init_params
from jaxft.train.export import export
from jaxft.weights import pretrained
from jaxft.weights.edit import new_adapters
from jaxft.weights.peft import peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base's folder, its model and parameters, the folder of the base with an adapter of rank 8 merged into
    it, and that adapter.
    """
    folder = write_folder(tmp_path_factory.mktemp("base"), tiny_torch())
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    base = load_on_host(str(folder), model, lambda path, array: jnp.asarray(array))
    specs = adapter_specs(model.specs, Adapter(rank=8, alpha=16.0))

    def move(path, x):
        noise = 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)
        return x if path.endswith("scale") else x + noise

    adapter = tree.map_with_path(move, init_params(specs, jax.random.key(0)))
    tuned = tmp_path_factory.mktemp("tuned")
    source = export.ExportSource(str(folder), model, tiny_tokenizer(), adapter)
    export.export_model(tuned, source, "float32")
    return folder, model, base, tuned, adapter


def extracted(world, tuned, *args, **options):
    what = new_adapters.Extraction(*args, **options)
    return new_adapters.extract_adapter(str(world[0]), str(tuned), world[1], what, lambda line: None)


def hf_logits(folder):
    from transformers import AutoModelForCausalLM

    return torch_logits(AutoModelForCausalLM.from_pretrained(str(folder)).eval(), some_tokens())


def with_adapter(folder, adapter):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(folder))
    return torch_logits(peft.PeftModel.from_pretrained(base, str(adapter)).eval(), some_tokens())


def test_an_adapter_of_rank_8_is_found_again_at_rank_8(world, tmp_path):
    found = extracted(world, world[3], 8)
    assert not found.others and found.errors[-1].path == "total"
    assert all(one.error < 1e-4 and one.change > 0.1 for one in found.errors)
    peft_write.save_adapter(tmp_path, found.params, found.settings, world[1], str(world[0]))
    logits = with_adapter(world[0], tmp_path)
    np.testing.assert_allclose(logits, hf_logits(world[3]), atol=1e-4)
    assert np.abs(logits - hf_logits(world[0])).max() > 0.1


def test_a_lower_rank_has_the_error_of_the_largest_singular_values(world, monkeypatch):
    pair = world[4]["layers"]["mlp"]["up"]
    change = np.einsum("lir,lro->lio", pair["a"], pair["b"]) * pair["scale"][:, None, None]
    values = np.linalg.svd(change, compute_uv=False) ** 2
    expected = (values[:, 5:].sum() / values.sum()) ** 0.5
    before = tree.paths(world[2])["layers/mlp/up"]
    for limit in (new_adapters.FULL_SVD, 0):  # all singular values; the randomised ones
        monkeypatch.setattr(new_adapters, "FULL_SVD", limit)
        found = extracted(world, world[3], 5, ("up_proj",))
        (kind, total) = found.errors
        assert kind.path == "layers/mlp/up" and kind.error == pytest.approx(expected, rel=1e-4)
        assert total.error == kind.error
        assert kind.change == pytest.approx((values.sum() / np.square(before).sum()) ** 0.5, rel=1e-4)
        ours = np.einsum("lir,lro->lio", *(found.params["layers"]["mlp"]["up"][side] for side in "ab"))
        lost = np.linalg.norm(change - ours) / np.linalg.norm(change)
        assert lost == pytest.approx(expected, rel=1e-3)


@pytest.mark.quick_cases("tied", "biased")
@pytest.mark.parametrize("kind", ["untied", "tied", "biased"])
def test_other_parameters_that_changed_are_named_and_stored_in_full_if_asked(tmp_path, kind):
    changes = {"untied": {}, "tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True}}[kind]
    theirs = tiny_torch(**changes)
    folder = write_folder(tmp_path / "base", theirs)
    torch.manual_seed(3)
    changed = ["norm", "embed_tokens"] + ["q_proj.bias"] * (kind == "biased")
    for name, p in theirs.named_parameters():
        if any(part in name for part in changed):
            p.data += 0.1 * torch.randn_like(p)
        if "v_proj.weight" in name:  # of rank 2
            p.data += torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])
    tuned = write_folder(tmp_path / "tuned", theirs)
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    args = str(folder), str(tuned), model
    plain = new_adapters.extract_adapter(*args, new_adapters.Extraction(2), lambda line: None)
    (line,) = plain.others
    assert "embed by" in line and "norm by" in line and "--save-others" in line
    assert ("q_bias" in line) == (kind == "biased")
    found = new_adapters.extract_adapter(
        *args, new_adapters.Extraction(2, save_others=True), lambda line: None
    )
    peft_write.save_adapter(tmp_path / "out", found.params, found.settings, model, str(folder))
    logits = with_adapter(folder, tmp_path / "out")
    np.testing.assert_allclose(logits, hf_logits(tuned), atol=1e-4)
    again = peft_read.read_adapter(tmp_path / "out", model)[0]
    jax.tree.map(np.testing.assert_array_equal, again, found.params)


def test_the_command_prints_the_errors_and_writes_the_adapter(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = [world[0], world[3], "--rank", "4", "--out", "out", "--targets", "q_proj,v_proj"]
    code, out, err = call(monkeypatch, capsys, "extract", *argv)
    assert code == 0, err
    assert "layers/attn/q" in out and "total" in out and "error" in out and "parameters without a pair" in out
    assert "layers/mlp/up by" in out  # a kernel that was not extracted
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "README.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_settings_that_differ_by_the_rounding_of_float32_only_are_the_same(world):
    """GGUF files store them in float32."""
    config = world[1].config
    rounded = replace(config, norm_eps=float(np.float32(config.norm_eps)), max_positions=99)
    assert rounded.norm_eps != config.norm_eps and pretrained.config_differences(config, rounded) == []


def damaged(world, tmp_path, how):
    """The tuned model with another vocabulary, width or setting, without a tensor, or with one more."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    for path in world[3].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if how == "rope":
        edit_config(folder, drop=("rope_parameters",), rope_theta=5e5)
    elif how == "norm":
        edit_config(folder, rms_norm_eps=1e-3)
    elif how == "bias":
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.ones(64, np.float32)
    elif how == "vocabulary":
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.concatenate([tensors[name], tensors[name][:4]])
        edit_config(folder, vocab_size=324)
    elif how == "width":
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((97, 64), np.float32)
    else:
        del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "how, argv, words",
    [
        ("vocabulary", "BASE TUNED --rank 2", ("vocabularies differ", "extend.py", "(324, 64)")),
        ("width", "BASE TUNED --rank 2", ("model.layers.1.mlp.up_proj.weight has shape (97, 64)",)),
        ("missing", "BASE TUNED --rank 2", ("model.layers.1.mlp.up_proj.weight is missing",)),
        ("rope", "BASE TUNED --rank 2", ("rope.theta 10000.0 and 500000.0", "the base")),
        ("norm", "BASE TUNED --rank 2", ("norm_eps 1e-06 and 0.001",)),
        ("bias", "BASE TUNED --rank 2", ("model.layers.1.self_attn.q_proj.bias",)),
        (None, "BASE TUNED --rank 33", ("--rank 33", "layers/attn/k is a matrix of 64 x 32")),
        (None, "BASE BASE --rank 2", ("nothing to extract",)),
        (None, "BASE TUNED --rank 2 --targets q_porj", ("q_porj", "q_proj")),
        (None, "BASE missing --rank 2", ("missing",)),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(
    world, monkeypatch, capsys, tmp_path, how, argv, words
):
    monkeypatch.chdir(tmp_path)
    tuned = damaged(world, tmp_path, how) if how else world[3]
    argv = argv.replace("BASE", str(world[0])).replace("TUNED", str(tuned)).split()
    code, out, err = call(monkeypatch, capsys, "extract", *argv, "--out", "out")
    assert code == 1 and not out and not (tmp_path / "out").exists()
    lines = err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), err
