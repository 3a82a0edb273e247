"""A config.json that ties the head to the embedding, over files with a head of their own."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from safetensors.torch import load_file, save_file
from scripts_in_process import call
from tiny_llama import edit_config, our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.models import model_types
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_read

torch = pytest.importorskip("torch")


def tied_folder(folder, change=lambda head: head, dtype=torch.float32):
    """(folder, its model without tying) of a tied model whose files repeat the head, changed."""
    write_folder(folder, tiny_torch(tie_word_embeddings=True).to(dtype))
    state = load_file(folder / "model.safetensors")
    head = change(state["model.embed_tokens.weight"].clone())
    save_file({**state, "lm_head.weight": head}, folder / "model.safetensors")
    reference = tiny_torch(tie_word_embeddings=False)
    reference.load_state_dict({**reference.state_dict(), **load_file(folder / "model.safetensors")})
    return folder, reference


def one_value(head):
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_differs_in_one_value_is_untied_and_reported(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(hf_read, "COMPARED_VALUES", 1000)  # many pieces
    folder, reference = tied_folder(tmp_path, one_value, dtype)
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    assert not model.config.tied
    base = load_on_host(str(folder), model, lambda path, array: jnp.asarray(array, jnp.float32))
    tokens, last = some_tokens(), torch_logits(reference, some_tokens())
    np.testing.assert_allclose(our_logits(model, base, tokens), last, atol=1e-4)
    (line,) = pretrained.storage_changes(str(folder), pretrained.frozen_model(model, None, None))
    assert "tie_word_embeddings=true, but lm_head.weight is not the embedding" in line


@pytest.mark.parametrize("change", [lambda head: head, lambda head: head.to(torch.float64).float()])
def test_a_repeated_head_stays_tied(tmp_path, change):
    folder, reference = tied_folder(tmp_path, change)
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    assert model.config.tied and pretrained.file_notes(str(folder), model) == []
    base = load_on_host(str(folder), model, lambda path, array: jnp.asarray(array))
    tokens = some_tokens()
    np.testing.assert_allclose(our_logits(model, base, tokens), torch_logits(reference, tokens), atol=1e-4)


def test_an_export_is_untied_and_transformers_has_its_logits(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    folder, reference = tied_folder(tmp_path / "in", one_value)
    options = ("--model", folder, "--out", tmp_path / "out", "--dtype", "float32")
    code, out, err = call(monkeypatch, capsys, "export", *options)
    assert code == 0 and "is not the embedding: the head is a matrix of its own" in out, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    again, tokens = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")), some_tokens()
    np.testing.assert_allclose(torch_logits(again, tokens), torch_logits(reference, tokens), atol=1e-5)


def test_a_model_that_was_built_tied_does_not_load_another_head(tmp_path):
    """As a preset is, or a hub model whose weights were not here yet."""
    folder, _ = tied_folder(tmp_path, one_value)
    family = model_types.FAMILIES["llama"]
    config = family.from_hf(json.loads((folder / "config.json").read_text()))
    model = family.build(config)
    assert config.tied
    with pytest.raises(
        ValueError, match=r"lm_head.weight is another matrix; use this folder itself"
    ) as caught:
        pretrained.open_params(str(folder), model)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_not_here_leave_the_config_as_it_is(tmp_path):
    folder, _ = tied_folder(tmp_path, one_value)
    (folder / "model.safetensors").unlink()
    assert pretrained.model_for(str(folder)).config.tied
    edit_config(folder, tie_word_embeddings=False)
    assert not pretrained.model_for(str(folder)).config.tied
