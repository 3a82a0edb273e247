"""Settings of config.json that only Mistral, Qwen or CWM have, and which families have a classifier."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_families import FAMILIES, SIZES

from jaxft.models import model_types
from jaxft.models.dense_config import FULL, SLIDING
from jaxft.models.model_types import family_of, has_classifier

FIRST = {kind: name for name, (kind, _) in reversed(FAMILIES.items())}


def config_of(kind, **settings):
    config = {**SIZES, "model_type": kind, **settings}
    return family_of(config).from_hf(config)


def test_every_family_has_a_row_in_the_tests():
    assert {kind for kind, _ in FAMILIES.values()} == set(model_types.FAMILIES)


def test_a_mistral_with_layer_types_is_a_ministral_as_in_transformers(tmp_path):
    types = [FULL, SLIDING, FULL, SLIDING]
    settings = dict(sliding_window=5, layer_types=types)
    ours = config_of("mistral", **settings)
    assert (ours.window, list(ours.layer_types)) == (5, types)
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **settings, "model_type": "mistral"}))
    theirs = pytest.importorskip("transformers").AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == "ministral"
    assert config_of("ministral", **settings) == ours


def test_a_cwm_that_states_only_rope_theta_keeps_its_default_rope_scaling():
    alone, stated = config_of("cwm", rope_theta=5e5), config_of("cwm")
    assert (alone.rope.kind, alone.rope.factor, alone.rope.theta) == ("llama3", stated.rope.factor, 5e5)


@pytest.mark.parametrize(
    "kind, settings, line",
    [
        ("qwen2", dict(use_sliding_window=True, max_window_layers=None), "max_window_layers must be a whole"),
        ("qwen3", dict(layer_types=[SLIDING] * 4), "but use_sliding_window is false"),
        ("mistral", dict(num_hidden_layers="3"), "num_hidden_layers must be a positive whole"),
        ("mistral", dict(sliding_window=None, layer_types=[SLIDING] * 4), "but sliding_window is null"),
    ],
)
def test_contradictory_settings_are_refused_in_one_line(kind, settings, line):
    with pytest.raises(ValueError, match=line):
        config_of(kind, **settings)


def test_rope_settings_without_effect_are_ignored_and_yarns_factor_defaults_to_the_ratio_of_lengths():
    yarn = {"type": "yarn", "original_max_position_embeddings": 32, "finetuned": True}
    rope = config_of("mistral", rope_scaling=yarn).rope
    assert np.isclose(rope.factor, SIZES["max_position_embeddings"] / 32)
    sections = {"type": "default", "mrope_section": [2, 1, 1]}
    assert config_of("qwen2", rope_scaling=sections).rope.kind == "default"


def test_has_classifier_agrees_with_transformers():
    names = pytest.importorskip("transformers.models.auto.modeling_auto")
    classifiers = names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for kind in sorted({kind for kind, _ in FAMILIES.values()}):
        config = config_of(kind, **FAMILIES[FIRST[kind]][1])
        assert has_classifier(config) == (kind in classifiers), kind


def test_the_readme_lists_every_model_type():
    text = (Path(__file__).parents[3] / "configs/README.md").read_text()
    assert not [kind for kind in model_types.FAMILIES if f"`{kind}`" not in text]
