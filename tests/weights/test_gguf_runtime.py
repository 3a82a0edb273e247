"""GGUF files of tiny models in llama.cpp's runtime: adapters alone, added tokens, chat templates."""

import copy

import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
from scripts_in_process import call
from test_gguf_write import adapted_folder, plain_tokenizer, save, tiny_llama
from tiny_tokenizers import tiny as chat_tokenizer

from jaxft.weights import pretrained

torch = pytest.importorskip("torch")
IDS = [0, 40, 7, 301, 22, 90, 15]


def all_log_probs(runtime, ids, count):
    """Log-probabilities [count] of the token after `ids`."""
    found = runtime.log_probs(ids, count)
    return np.array([found[token] for token in range(count)])


def expected_log_probs(reference, ids):
    x = reference(torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(x, -1).detach().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_alone_on_its_base_is_the_merged_model(tmp_path, monkeypatch, capsys, rslora):
    """Log-probs of the runtime with base and adapter = with the merged file; those of the base differ."""
    folder, reference = tmp_path / "base", tiny_llama(num_hidden_layers=3)
    reference.save_pretrained(str(folder))
    plain_tokenizer().save_pretrained(str(folder))
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    adapted_folder(tmp_path / "adapter", model, folder, "all-linear", rslora=rslora)
    model_only, adapter = ("--model", folder), ("--adapter", tmp_path / "adapter")
    for name, argv in {
        "base": model_only,
        "merged": (*model_only, *adapter),
        "alone": (*model_only, *adapter, "--adapter-only"),
    }.items():
        out = ("--gguf", "F32", "--out", tmp_path / f"{name}.gguf")
        code, _, err = call(monkeypatch, capsys, "export", *argv, *out)
        assert code == 0, err
    base, merged, alone = (tmp_path / f"{name}.gguf" for name in ("base", "merged", "alone"))
    vocab = reference.config.vocab_size
    plain, whole, applied = (
        all_log_probs(llama_cpp.Runtime(path, adapters), IDS, vocab)
        for path, adapters in ((base, ()), (merged, ()), (base, (alone,)))
    )
    np.testing.assert_allclose(plain, expected_log_probs(reference, IDS), atol=1e-3)
    np.testing.assert_allclose(applied, whole, atol=1e-3)
    assert np.abs(plain - whole).max() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chatml", "gemma", "plain"])
def test_added_tokens_and_chat_template_are_those_of_the_tokenizer(tmp_path, kind):
    """Prompts of chats, their ids with added tokens, and the log-probs that follow, in the runtime."""
    tokenizer = copy.deepcopy(chat_tokenizer(kind))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    reference = tiny_llama(bos_token_id=0, eos_token_id=1)
    save(tmp_path / "tiny.gguf", reference, tokenizer=tokenizer, ends=(tokenizer.eos_token_id,))
    runtime = llama_cpp.Runtime(tmp_path / "tiny.gguf")
    chat = [
        {"role": "user", "content": "Hi 12, it's <tool>h\u00e9llo"},
        {"role": "assistant", "content": "<think>Yes<tool>"},
        {"role": "user", "content": "the rank\n\nof 345 matrices"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text = text.removeprefix(tokenizer.bos_token or "")  # the runtime adds it to the ids
    assert runtime.chat_text(chat) == text
    ids = tokenizer(text).input_ids
    assert runtime.token_ids(text) == ids
    added = tokenizer.convert_tokens_to_ids(["<tool>", "<think>"])
    assert [ids.count(token) for token in added] == [2, 1]
    found = all_log_probs(runtime, ids, reference.config.vocab_size)
    np.testing.assert_allclose(found, expected_log_probs(reference, ids), atol=1e-3)
