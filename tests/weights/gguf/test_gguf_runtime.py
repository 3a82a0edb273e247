"""GGUF files of tiny models in llama.cpp's runtime: log-probs of every architecture and rope that is written,
adapters alone, added tokens, chat templates.
"""

import copy
import urllib.error

import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
from gguf_families import FAMILIES, ROPES, tiny_family, with_rope
from scripts_in_process import call
from test_gguf_write import ROWS, adapted_folder, mistral3_adapter, plain_tokenizer, save, tiny_llama
from tiny_tokenizers import tiny as chat_tokenizer

from jaxft.weights import pretrained
from jaxft.weights.gguf import gguf_config

torch = pytest.importorskip("torch")
IDS = [0, 40, 7, 301, 22, 90, 15]
PROMPT = [0, *(2 + 29 * i * i % 387 for i in range(1, 150))]


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
def test_an_adapter_alone_runs_on_a_base_of_mistral3(tmp_path, monkeypatch, capsys):
    base, alone, common = mistral3_adapter(tmp_path, monkeypatch, capsys)
    merged = tmp_path / "merged.gguf"
    assert call(monkeypatch, capsys, "export", *common, "--out", merged)[0] == 0
    applied, whole = (
        all_log_probs(llama_cpp.Runtime(path, adapters), IDS, ROWS)
        for path, adapters in ((base, (alone,)), (merged, ()))
    )
    np.testing.assert_allclose(applied, whole, atol=1e-3)


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


YARNS = {"yarn attention_factor 1.3", "yarn attention_factor 1", "yarn mscale"}
LONGROPES = {"longrope, short texts", "longrope, long texts"}
WRITTEN = {  # families and the ropes that their architectures have in llama.cpp
    **{name: {"default", "linear", "yarn"} | YARNS for name in FAMILIES},
    "gemma3": {"default", "linear", "yarn"},  # llama.cpp applies attention factors in windowed layers too
    "phi3": {"default"},
    "phi4 mini": LONGROPES,
}
for name in ("mistral", "mistral small"):  # as architecture mistral3
    WRITTEN[name] |= {"yarn betas"}
for name in ("llama", "mistral", "mistral small", "granite"):
    WRITTEN[name] |= {"llama3"} | LONGROPES
IGNORED_WINDOWS = ("mistral", "phi3")


class GgmlGelu(torch.nn.Module):
    """ggml's GELU on a CPU: a table of float16 (ggml_vec_gelu_f32)."""

    def forward(self, x):
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, y))


def largest_differences(path, name, rope, **changes):
    """Of log-probs in the runtime from transformers', and from transformers' with ggml's GELU. The prompt has
    40 tokens, more than windows of 5, or 150 for long texts; windows that llama.cpp ignores have one more.
    """
    gemma = name.startswith("gemma")
    sizes = {"vocab_size": ROWS, "max_position_embeddings": 1024, "initializer_range": 0.1 if gemma else 0.2}
    ids = PROMPT if rope == "longrope, long texts" else PROMPT[:40]
    windows = {"sliding_window": len(ids) + 1} if name in IGNORED_WINDOWS else {}
    reference = tiny_family(name, **{**sizes, **windows, **with_rope(name, rope), **changes})
    save(path, reference)
    found = all_log_probs(llama_cpp.Runtime(path), ids, ROWS)
    plain = np.abs(found - expected_log_probs(reference, ids)).max()
    for layer in reference.model.layers if gemma else ():
        layer.mlp.act_fn = GgmlGelu()
    return plain, np.abs(found - expected_log_probs(reference, ids)).max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rope"), [(name, rope) for name in FAMILIES for rope in ROPES])
def test_log_probs_of_a_written_file_are_those_of_transformers(tmp_path, monkeypatch, name, rope):
    """Or the model is refused. Only a file that is kept has architecture mistral3 with other ropes."""
    if name == "mistral small":
        monkeypatch.setitem(gguf_config.ARCHITECTURE_OF, "mistral", "mistral3")
    if name.startswith("phi") and rope not in WRITTEN[name]:
        pytest.skip("transformers refuses this rope in a Phi-3")
    if rope not in WRITTEN[name]:
        with pytest.raises(
            ValueError, match=f"llama.cpp's architecture {FAMILIES[name][0]} lacks (local_)?rope"
        ):
            largest_differences(tmp_path / "tiny.gguf", name, rope)
        return
    plain, with_ggml_gelu = largest_differences(tmp_path / "tiny.gguf", name, rope)
    assert plain < (2.5e-3 if name.startswith("gemma") else 1e-3)
    assert with_ggml_gelu < 1e-3


FULL, SLIDING = "full_attention", "sliding_attention"
SETTINGS = {
    "gemma2 soft caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma2 other windows": ("gemma2", {"layer_types": [FULL, SLIDING, FULL]}),
    "gemma3 soft cap": ("gemma3", {"final_logit_softcapping": 5.0}),
    "gemma3 other windows": ("gemma3", {"layer_types": [*[SLIDING, SLIDING, FULL] * 2, SLIDING]}),
    "olmo3 other windows": ("olmo3", {"layer_types": [SLIDING, FULL] * 2}),
    "smollm3 tied": ("smollm3", {"tie_word_embeddings": True}),
    "granite tied": ("granite", {"tie_word_embeddings": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SETTINGS)
def test_log_probs_with_other_settings_are_those_of_transformers(tmp_path, what):
    name, changes = SETTINGS[what]
    plain, with_ggml_gelu = largest_differences(tmp_path / "tiny.gguf", name, "default", **changes)
    assert plain < (2.5e-3 if name.startswith("gemma") else 1e-3) and with_ggml_gelu < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", IGNORED_WINDOWS)
def test_the_server_refuses_texts_for_which_an_ignored_window_matters(tmp_path, name):
    """The window is the context length, so that nothing is computed without it."""
    save(tmp_path / "tiny.gguf", tiny_family(name, vocab_size=ROWS, sliding_window=24))
    runtime = llama_cpp.Runtime(tmp_path / "tiny.gguf")
    assert runtime.log_probs(PROMPT[:23], ROWS)
    with pytest.raises(urllib.error.HTTPError):
        runtime.log_probs(PROMPT[:25], ROWS)
