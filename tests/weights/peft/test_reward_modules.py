"""What a reward model's adapter trains besides pairs of linear layers: whole modules, the table, rows of
tokens, with and without pairs. Here and in peft, merged, and as the start of a run.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading_process import one_device
from reward_folders import begun, saved, torch_score
from safetensors.numpy import load_file
from tiny_llama import some_tokens, tiny_tokenizer, tiny_torch, write_folder

from jaxft.models.adapted import HeadSettings, adapted, with_scalar_head
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.rl import reward_models
from jaxft.train.export import export
from jaxft.weights import initial_params, pretrained
from jaxft.weights.peft import adapter_folders, peft_read, peft_write

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_e"
)
IDS = (5, 300, 7)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    kinds = {"untied": {}, "tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True}}
    return {
        kind: write_folder(tmp_path_factory.mktemp(kind), tiny_torch(**changes))
        for kind, changes in kinds.items()
    }


def tokens():
    """Rows with the tokens whose rows are trained."""
    found = some_tokens()
    found.ids[:, 2:5] = IDS
    return found


def scored(t, whole):
    return np.asarray(reward_models.score_rows(t.model, whole, tokens()))


def by_torch(model):
    return [torch_score(model, ids) for ids in np.asarray(tokens().ids)]


def scorer(folder):
    return with_scalar_head(pretrained.model_for(str(folder), dtype=jnp.float32))


OURS = [
    ("tied", dict(targets=("q",), modules_to_save=("score", "embed_tokens", "norm"))),
    ("untied", dict(targets=("q",), trainable_token_indices=IDS)),
    ("tied", dict(targets=(), trainable_token_indices=IDS)),
    pytest.param("untied", dict(targets=(), modules_to_save=("embed_tokens", "mlp")), marks=pytest.mark.slow),
    pytest.param("tied", dict(targets=("q", "embed_tokens")), marks=pytest.mark.slow),
    pytest.param("biased", dict(targets=(), bias="all"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, changes", OURS, ids=str)
def test_ours_has_the_same_scores_in_peft_merged_and_read_again(bases, tmp_path, kind, changes):
    base, settings = bases[kind], Adapter(rank=4, alpha=12.0, **changes)
    t, whole = begun(base, settings)
    expected = scored(t, whole)
    assert np.abs(expected - scored(t, {**whole, "adapter": None})).max() > 0.01
    folder = saved(t, whole, base, tmp_path, settings)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=1).eval()
    np.testing.assert_allclose(by_torch(theirs), expected, atol=1e-4)

    found = adapter_folders.read_adapter_settings(str(folder), t.model)
    assert found.trainable_token_indices == settings.trainable_token_indices
    _, again = begun(base, found, str(folder))
    jax.tree.map(np.testing.assert_array_equal, again["adapter"], whole["adapter"])
    np.testing.assert_array_equal(again["score"], whole["score"])
    loaded = reward_models.load_reward_model(str(base), one_device(), folder, dtype=jnp.float32)
    np.testing.assert_allclose(loaded.score(loaded.params, tokens()), expected, atol=1e-5)

    parts = jax.device_get({name: whole[name] for name in ("adapter", "score")})
    source = export.ExportSource(
        str(base), scorer(base), tiny_tokenizer(), token_ids=settings.trainable_token_indices, **parts
    )
    summary = export.export_model(tmp_path / "merged", source, "float32")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert "a matrix of its own" not in summary
    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged")).eval()
    np.testing.assert_allclose(by_torch(merged), expected, atol=1e-4)


THEIRS = [
    ("tied", dict(modules_to_save=["score", "embed_tokens", "lm_head"])),
    ("untied", dict(trainable_token_indices=list(IDS))),
    pytest.param("untied", dict(modules_to_save=["embed_tokens", "norm"]), marks=pytest.mark.slow),
    pytest.param("biased", dict(modules_to_save=["mlp"], bias="all"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, changes", THEIRS, ids=str)
def test_an_adapter_by_peft_has_the_same_scores_here_and_goes_back(bases, tmp_path, kind, changes):
    from transformers import AutoModelForSequenceClassification

    base = bases[kind]
    torch.manual_seed(3)
    made = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["q_proj"], **changes)
    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    theirs = peft.get_peft_model(model, made).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(str(tmp_path / "in"))
    expected = by_torch(theirs)
    language = pretrained.model_for(str(base), dtype=jnp.float32)
    for model in (scorer(base), language):  # a reward model's own run reads it, and a policy's
        parts, settings = peft_read.read_parts(tmp_path / "in", model)
        assert "head" not in parts["adapter"]
    loaded = reward_models.load_reward_model(str(base), one_device(), tmp_path / "in", dtype=jnp.float32)
    np.testing.assert_allclose(loaded.score(loaded.params, tokens()), expected, atol=1e-4)
    peft_write.save_adapter(
        tmp_path / "out", parts["adapter"], settings, scorer(base), str(base), parts["score"]
    )
    back = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), num_labels=1)
    np.testing.assert_allclose(by_torch(back.eval()), expected, atol=1e-4)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("untied", dict(modules_to_save=("lm_head", "norm"), trainable_token_indices=IDS)),
        ("untied", dict(trainable_token_indices=IDS)),
        ("tied", dict(targets=("q", "head"))),
    ],
    ids=str,
)
def test_a_reward_model_starts_from_a_language_models_adapter_without_its_head(
    bases, tmp_path, kind, changes
):
    base, settings = bases[kind], Adapter(**{"rank": 4, "targets": ("q",), **changes})
    language = pretrained.model_for(str(base), dtype=jnp.float32)
    whole = adapted(language, settings)
    fresh = initial_params.init_all_but_base(whole, one_device(), 0, HeadSettings(settings), str(base))[
        "adapter"
    ]
    moved = tree.map_with_path(lambda path, x: np.asarray(x) + 0.1 * (not path.endswith("scale")), fresh)
    moved = jax.tree.map(np.float32, moved)
    peft_write.save_adapter(tmp_path, moved, settings, language, str(base))
    found = adapter_folders.adapter_settings(str(tmp_path), None, scorer(base))
    _, started = begun(base, found, str(tmp_path))
    head = moved.pop("head")
    assert head and started["adapter"].keys() == moved.keys() and started["score"].std() > 0.01
    for path in ("layers", *(["embed"] if "embed" in moved else [])):
        jax.tree.map(np.testing.assert_array_equal, started["adapter"][path], moved[path])
    (note,) = adapter_folders.left_out_notes(scorer(base), str(tmp_path))
    assert "trained the language model head, which is left out" in note
    assert not adapter_folders.left_out_notes(language, str(tmp_path))
    stored = pretrained.frozen_model(scorer(base), None, str(base))
    pretrained.load_base(str(base), stored, one_device(), adapter=tmp_path)  # as full=true starts


def test_an_adapter_without_pairs_is_written_for_pefts_lora_and_has_no_settings_of_pairs(bases, tmp_path):
    model = pretrained.model_for(str(bases["tied"]), dtype=jnp.float32)
    settings = Adapter(targets=(), modules_to_save=("final_norm",))
    weight = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    peft_write.save_adapter(tmp_path, {"final_norm": {"weight": weight}}, settings, model, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["target_modules"] == "dummy-target-modules"
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(bases["tied"])).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).merge_and_unload()
    np.testing.assert_array_equal(theirs.model.norm.weight.detach().numpy(), weight)
    found, again = peft_read.read_adapter(tmp_path, model)
    np.testing.assert_array_equal(found["final_norm"]["weight"], weight)
    assert again.targets == () and not adapter_folders.left_out_notes(scorer(bases["tied"]), str(tmp_path))
