"""Reward models in files: adapters with a head in peft and torch, full classifiers, runs that start from
them, errors.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading_process import one_device
from reward_folders import SETTINGS, begun, saved, torch_score
from safetensors.numpy import load_file, save_file
from tiny_families import random_torch
from tiny_llama import VOCAB, some_tokens, tiny_tokenizer, tiny_torch, write_folder

from jaxft.models import adapted
from jaxft.models.adapted import HeadSettings
from jaxft.rl import reward_models
from jaxft.train import trainable_params
from jaxft.train.export import export
from jaxft.weights import initial_params, pretrained
from jaxft.weights.peft import adapter_folders, peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module", params=[False, True], ids=["head of its own", "tied"])
def base(request, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("base"), tiny_torch(tie_word_embeddings=request.param))


def parts(whole):
    return {name: whole[name] for name in ("adapter", "score")}


def scored(t, whole, tokens):
    return np.asarray(reward_models.score_rows(t.model, whole, tokens))


def by_torch(model, tokens):
    return [torch_score(model, ids) for ids in np.asarray(tokens.ids)]


def in_full(folder, **options):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(str(folder), **options).eval()


def test_our_adapter_with_a_head_has_the_same_scores_in_peft_and_round_trips(base, tmp_path):
    t, whole = begun(base)
    folder, tokens = saved(t, whole, base, tmp_path), some_tokens()
    expected = scored(t, whole, tokens)
    assert np.abs(expected - scored(t, {**whole, "adapter": None}, tokens)).max() > 0.01
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=1).eval()
    np.testing.assert_allclose(by_torch(theirs, tokens), expected, rtol=1e-5, atol=1e-4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    again, whole_again = begun(base, adapter_folders.read_adapter_settings(str(folder), t.model), str(folder))
    jax.tree.map(np.testing.assert_array_equal, parts(whole_again), parts(whole))
    loaded = reward_models.load_reward_model(str(base), one_device(), folder, dtype=jnp.float32)
    np.testing.assert_allclose(loaded.score(loaded.params, tokens), expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_with_a_head_by_peft_has_the_same_scores_here(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    ).eval()
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(str(tmp_path))
    tokens = some_tokens()
    loaded = reward_models.load_reward_model(str(base), one_device(), tmp_path, dtype=jnp.float32)
    np.testing.assert_allclose(
        loaded.score(loaded.params, tokens), by_torch(model, tokens), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("adapter", [None, SETTINGS], ids=["full", "merged"])
def test_a_full_reward_model_is_a_classifier_in_transformers_and_starts_the_next_run(base, tmp_path, adapter):
    t, whole = begun(base, adapter)
    tokens = some_tokens()
    if adapter:
        folder, model = (
            tmp_path / "merged",
            adapted.with_scalar_head(pretrained.model_for(str(base), dtype=jnp.float32)),
        )
        export.export_model(
            folder,
            export.ExportSource(str(base), model, tiny_tokenizer(), **jax.device_get(parts(whole))),
            "float32",
        )
    else:
        folder = saved(t, whole, base, tmp_path, None)
    theirs = in_full(folder)
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    expected = scored(t, whole, tokens)
    np.testing.assert_allclose(by_torch(theirs, tokens), expected, rtol=1e-5, atol=1e-4)
    _, again = begun(folder, None)
    np.testing.assert_array_equal(again["score"], whole["score"])
    np.testing.assert_allclose(scored(t, again, tokens), expected, rtol=1e-5, atol=1e-5)
    padded = torch.tensor(
        np.pad(np.asarray(tokens.ids), ((0, 0), (0, 3)), constant_values=theirs.config.pad_token_id)
    ).long()
    mask = torch.tensor(np.pad(np.ones_like(tokens.ids), ((0, 0), (0, 3)))).long()
    with torch.no_grad():
        found = theirs(padded, attention_mask=mask).logits[:, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name, kind",
    [("gemma2", "Gemma2ForSequenceClassification"), ("gemma3", "Gemma3TextForSequenceClassification")],
)
def test_a_full_gemma_reward_model_is_a_classifier_in_transformers_and_starts_the_next_run(
    name, kind, tmp_path
):
    base = write_folder(tmp_path / "base", random_torch(name, vocab_size=VOCAB))
    t, whole = begun(base, None)
    folder, tokens = saved(t, whole, base, tmp_path / "out", None), some_tokens(time=20)
    theirs = in_full(folder, attn_implementation="eager")  # others leave out Gemma 2's soft cap of scores
    assert type(theirs).__name__ == kind and theirs.config.num_labels == 1
    expected = scored(t, whole, tokens)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(by_torch(theirs, tokens), expected, rtol=1e-5, atol=1e-4)
    _, again = begun(folder, None)
    np.testing.assert_array_equal(again["score"], whole["score"])
    np.testing.assert_allclose(scored(t, again, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_head_joins_a_language_models_adapter_and_a_critic_starts_from_the_reward_model(
    base, tmp_path
):
    t, whole = begun(base)
    language = pretrained.model_for(str(base), dtype=jnp.float32)
    peft_write.save_adapter(tmp_path / "sft", whole["adapter"], SETTINGS, language, str(base))
    settings = adapter_folders.read_adapter_settings(str(tmp_path / "sft"), t.model)
    _, fresh = begun(base, settings, str(tmp_path / "sft"))
    np.testing.assert_array_equal(
        fresh["adapter"]["layers"]["attn"]["q"]["b"], whole["adapter"]["layers"]["attn"]["q"]["b"]
    )
    assert fresh["score"].std() > 0.01
    folder = saved(t, whole, base, tmp_path)
    other_heads = {
        "critic": HeadSettings(settings, str(folder)),
        "judge": HeadSettings(settings, str(folder), trained=False),
    }
    policy = trainable_params.partition_params(
        adapted.with_heads(language, other_heads),
        None,
        trainable_params.trainable_patterns(language, None, None, other_heads),
    )
    found = initial_params.init_all_but_base(
        policy.model, one_device(), 0, HeadSettings(), str(base), other_heads
    )
    for name in other_heads:
        jax.tree.map(np.testing.assert_array_equal, found[name], parts(whole))
    with pytest.raises(ValueError, match="a reward model's adapter, but this run has no scalar head"):
        initial_params.init_all_but_base(
            trainable_params.partition_params(language, settings, None).model,
            one_device(),
            0,
            HeadSettings(settings, str(folder)),
        )
    with pytest.raises(ValueError, match="sft is not a reward model: it has no scalar head; give the folder"):
        judge = {"judge": HeadSettings(settings, str(tmp_path / "sft"), trained=False)}
        frozen = trainable_params.partition_params(adapted.with_heads(language, judge), None, None)
        initial_params.init_all_but_base(frozen.model, one_device(), 0, HeadSettings(), str(base), judge)


def test_an_adapter_that_is_not_a_reward_model_is_refused(base, tmp_path):
    t, whole = begun(base)
    folder, language = saved(t, whole, base, tmp_path), pretrained.model_for(str(base), dtype=jnp.float32)
    with pytest.raises(ValueError, match="a reward model's adapter, which generates no text"):
        peft_read.read_adapter(folder, language)
    path, name = folder / "adapter_model.safetensors", "base_model.model.score.weight"
    good = load_file(path)
    assert good[name].shape == (1, 64)
    save_file({**good, name: np.zeros((2, 64), np.float32)}, path)
    with pytest.raises(
        ValueError,
        match=r"score.weight has shape \(2, 64\); this model needs \(1, 64\), because .* has one label",
    ):
        peft_read.read_parts(folder, language)
    save_file({k: v for k, v in good.items() if k != name}, path)
    with pytest.raises(ValueError, match="score.weight is missing"):
        peft_read.read_parts(folder, language)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"task_type": "TOKEN_CLS"}, {"modules_to_save": None}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(
            ValueError,
            match="is not supported; jaxft reads LoRA with task_type='CAUSAL_LM', and reward",
        ):
            peft_read.read_parts(folder, language)
