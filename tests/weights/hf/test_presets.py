"""Presets: their settings are compared with the files before these are loaded."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from tiny_llama import edit_config, tiny_torch, write_folder

from jaxft.models import model_types
from jaxft.models.families import llama
from jaxft.nn.rope import Rope
from jaxft.weights import pretrained
from jaxft.weights.hf import hub

NAME = "someone/tiny-llama"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of a hub model, without a hub."""
    path = write_folder(tmp_path, tiny_torch())
    monkeypatch.setattr(hub, "locate", lambda ref, **_: hub.Located("folder", path, ref))
    return path


def preset_of(folder, monkeypatch, **changes):
    """The model of a preset that differs from the folder's config.json by `changes`."""
    config = replace(pretrained.model_for(str(folder), dtype=jnp.float32).config, **changes)
    monkeypatch.setitem(llama.PRESETS, NAME, config)
    return model_types.preset(NAME, dtype=jnp.float32)


@pytest.mark.parametrize("changes", [{}, {"eos": (1, 2), "max_positions": 99}])
def test_a_preset_with_the_settings_of_the_files_is_loaded(folder, monkeypatch, changes):
    assert pretrained.open_params(NAME, preset_of(folder, monkeypatch, **changes))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"norm_eps": 1e-3}, "norm_eps 0.001"),
        ({"rope": Rope(500.0)}, "differ: rope.theta 500.0 and 10000.0. "),
    ],
)
def test_a_preset_with_other_settings_than_the_files_is_refused(folder, monkeypatch, changes, named):
    model = preset_of(folder, monkeypatch, **changes)
    with pytest.raises(ValueError, match="settings for this name and the files' settings differ") as error:
        pretrained.open_params(NAME, model)
    assert named in str(error.value) and str(folder) in str(error.value)


def test_a_preset_of_another_family_than_the_files_is_refused(folder, monkeypatch):
    edit_config(folder, model_type="mistral", sliding_window=None)
    monkeypatch.setitem(llama.PRESETS, NAME, llama.PRESETS["meta-llama/Llama-3.2-1B"])
    with pytest.raises(
        ValueError, match="differ: .*LlamaConfig.* and .*MistralConfig.* Use the files' folder"
    ):
        pretrained.open_params(NAME, model_types.preset(NAME, dtype=jnp.float32))


def test_every_preset_name_has_one_family():
    names = [name for family in model_types.FAMILIES.values() for name in family.presets]
    assert len(names) == len(set(names)) > 30
