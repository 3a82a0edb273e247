"""Phi-3: config.json of transformers 4, refusals, presets, and targets of adapters on fused layers."""

import pytest
from tiny_families import SIZES

from jaxft.models.families.phi3 import PHI3_PRESETS, phi3
from jaxft.models.model_types import FAMILIES, preset
from jaxft.nn.adapters.lora import Adapter, target_paths
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import count_params, spec_paths

TINY = {**SIZES, "model_type": "phi3"}
FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_older_names_of_longrope_are_read(key, name):
    c = FAMILIES["phi3"].from_hf(
        {**TINY, "max_position_embeddings": 8192, "rope_scaling": {key: name, **FACTORS}}
    )
    assert c.rope.kind == "longrope"
    assert c.rope.original_max_positions == 4096 and c.rope.factor == 2.0  # transformers' default


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; use hidden_act='silu'"),
        ({"sliding_window": 0}, "sliding_window must be a positive whole number or null, got 0"),
        (
            {"rope_scaling": {"type": "su", **FACTORS, "short_factor": [1.0]}},
            "short_factor must have 6 numbers",
        ),
    ],
)
def test_unsupported_settings_are_one_line(changes, says):
    with pytest.raises(ValueError, match=says) as e:
        FAMILIES["phi3"].from_hf({**TINY, **changes})
    assert "\n" not in str(e.value)


# Parameters of the published safetensors files.
PARAMETERS = {
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
}


@pytest.mark.parametrize("name", PHI3_PRESETS)
def test_presets_have_the_parameters_of_the_files_and_survive_config_json(name):
    model = preset(name)
    assert count_params(model.specs) == PARAMETERS[name]
    written = FAMILIES["phi3"].to_hf(model.config)
    assert FAMILIES["phi3"].from_hf(written) == model.config


SPECS = phi3(FAMILIES["phi3"].from_hf(TINY)).specs


def test_a_fused_layer_has_one_adapter():
    found = {p.rsplit("/", 1)[-1] for p in target_paths(SPECS, "all-linear")}
    assert found == {"qkv", "o", "gate_up", "down"}
    for targets in (("qkv_proj", "gate_up_proj"), ("qkv", "gate_up")):
        assert target_paths(SPECS, targets) == ["layers/attn/qkv", "layers/mlp/gate_up"]
    shapes = {path: spec.shape for path, spec in spec_paths(adapter_specs(SPECS, Adapter(rank=3))).items()}
    assert shapes["layers/attn/qkv/b"] == (4, 3, (4 + 2 * 2) * 12)
    assert shapes["layers/mlp/gate_up/b"] == (4, 3, 2 * 80)


@pytest.mark.parametrize(
    "kind, target, says",
    [
        ("phi3", "q", "'q' is a part of the layer 'qkv' (qkv_proj) of this model, which has one adapter"),
        ("phi3", "v_proj", "'v_proj' is a part of the layer 'qkv'"),
        ("phi3", "up", "'up' is a part of the layer 'gate_up'"),
        ("llama", "qkv", "'qkv' is 3 layers in this model; use q, k, v"),
        ("llama", "gate_up_proj", "'gate_up_proj' is 2 layers in this model; use gate, up"),
    ],
)  # fmt: skip
def test_a_part_of_a_fused_layer_is_named_with_the_layer(kind, target, says):
    family = FAMILIES[kind]
    specs = family.build(family.from_hf({**TINY, "model_type": kind})).specs
    with pytest.raises(ValueError) as e:
        target_paths(specs, ("o", target))
    assert str(e.value).startswith("adapter.targets: ") and says in str(e.value)
