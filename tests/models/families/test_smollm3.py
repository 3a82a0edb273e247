"""SmolLM3: which layers have rope and windows, by every form of config.json; refusals and presets."""

import pytest
from tiny_families import SIZES

from jaxft.models.families.llama import SMOLLM3_PRESETS, smollm3
from jaxft.models.model_types import FAMILIES, preset
from jaxft.nn.param_spec import count_params

TINY = {**SIZES, "model_type": "smollm3"}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}


@pytest.mark.parametrize(
    "changes, has_rope",
    [
        ({}, (True, True, True, False)),
        ({"no_rope_layer_interval": 2}, (True, False, True, False)),
        ({"no_rope_layers": [0, 1, 1, 0], "no_rope_layer_interval": 2}, (False, True, True, False)),
        ({"no_rope_layers": [0, 1, 1, 0, 1, 1]}, (False, True, True, False)),  # longer than the model
        ({"no_rope_layer_interval": 1}, (False,) * 4),
    ],
)
def test_layers_with_rope_are_those_of_config_json(changes, has_rope):
    c = FAMILIES["smollm3"].from_hf({**TINY, **changes})
    assert c.has_rope == has_rope
    a = smollm3(c).attention
    assert tuple(a.kinds[kind].rope.kind != "none" for kind in a.layout) == has_rope


def test_layers_without_rope_have_the_window_by_default():
    c = FAMILIES["smollm3"].from_hf({**TINY, **WINDOW, "no_rope_layer_interval": 2})
    a = smollm3(c).attention
    assert [a.kinds[kind].window for kind in a.layout] == [None, 7, None, 7] and c.window == 7


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of at least 4 numbers"),
        ({"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers must be a list of at least 4 numbers"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval must be a whole number above 0, got 0"),
        (
            {"layer_types": ["sliding_attention"] * 4, "sliding_window": 7},
            "layer_types has sliding_attention, but use_sliding_window=False and sliding_window=7",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_unsupported_settings_are_one_line(changes, says):
    with pytest.raises(ValueError, match=says) as e:
        FAMILIES["smollm3"].from_hf({**TINY, **changes})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", SMOLLM3_PRESETS)
def test_presets_have_the_parameters_of_the_files_and_survive_config_json(name):
    model = preset(name)
    assert count_params(model.specs) == 3_075_098_624
    written = FAMILIES["smollm3"].to_hf(model.config)
    assert FAMILIES["smollm3"].from_hf(written) == model.config
