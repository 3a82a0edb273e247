"""The error for a model that no family implements: one line that names the parts that jaxft lacks."""

import re

import pytest

from jaxft.models.model_types import family_of

LIST = "supported types: python scripts/help.py models"
EXPERTS, TOWERS = "mixture-of-experts layers", "parts for images, audio or video"
STATES = "state-space, recurrent, convolution or linear-attention layers"
ENCODER, LATENT = "an encoder next to its decoder", "multi-head latent attention"
MISSING = {
    "mixtral": [EXPERTS],
    "qwen2_moe": [EXPERTS],
    "qwen3_moe": [EXPERTS],
    "gpt_oss": [EXPERTS],
    "olmoe": [EXPERTS],
    "granitemoe": [EXPERTS],
    "phimoe": [EXPERTS],
    "dbrx": [EXPERTS],
    "glm4_moe": [EXPERTS],
    "deepseek_v3": [EXPERTS, LATENT],
    "aya_vision": [TOWERS],
    "cohere2_vision": [TOWERS],
    "qwen3_vl_moe": [TOWERS, EXPERTS],
    "llama4": [TOWERS, EXPERTS],
    "mllama": [TOWERS],
    "phi4_multimodal": [TOWERS],
    "paligemma": [TOWERS],
    "voxtral": [TOWERS],
    "mamba": [STATES],
    "mamba2": [STATES],
    "falcon_mamba": [STATES],
    "recurrent_gemma": [STATES],
    "falcon_h1": [STATES],
    "lfm2": [STATES],
    "rwkv": [STATES],
    "qwen3_next": [EXPERTS, STATES],
    "jamba": [EXPERTS, STATES],
    "granitemoehybrid": [EXPERTS, STATES],
    "nemotron_h": [EXPERTS, STATES],
    "minimax": [EXPERTS, STATES],
    "t5": [ENCODER],
    "bart": [ENCODER],
    "bert": ["an encoder with attention in both directions"],
    "gpt2": ["layer norms with a mean"],
    "cohere2": ["layer norms with a mean"],
    "stablelm": ["layer norms with a mean"],
    "arcee": ["the activation relu2"],
    "glm4": ["rope that rotates neighbouring dimensions"],
}


def line_of(config):
    with pytest.raises(ValueError) as error:
        family_of(config)
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.quick_cases(
    "mixtral", "deepseek_v3", "aya_vision", "mamba", "qwen3_next", "t5", "bert", "gpt2", "arcee", "glm4"
)
@pytest.mark.parametrize("kind", MISSING)
def test_a_model_type_of_transformers_is_refused_with_the_parts_that_jaxft_lacks(kind):
    auto = pytest.importorskip("transformers").AutoConfig
    line = line_of(auto.for_model(kind).to_dict())
    expected = f"model_type {kind!r} is not supported: it has {' and '.join(MISSING[kind])}; "
    assert line.startswith(expected)
    rest = line.removeprefix(expected)
    assert rest == LIST or re.fullmatch(r"its text decoder \(\w+\) is supported: save it .*", rest)


def test_the_missing_parts_are_named_by_model_type_alone():
    """For a config.json that lacks the settings that show the parts."""
    for kind, parts in MISSING.items():
        if parts != ["the activation relu2"]:
            line = line_of({"model_type": kind, "hidden_size": 64, "hidden_act": "silu"})
            assert line.startswith(f"model_type {kind!r} is not supported: it has ")
            assert any(part in line for part in parts), kind


def test_the_missing_parts_of_an_unknown_type_follow_from_its_settings():
    config = {"model_type": "my_model", "hidden_size": 64}
    cases = {
        EXPERTS: {"n_routed_experts": 8},
        TOWERS: {"vision_config": {"depth": 2}},
        STATES: {"layer_types": ["full_attention", "linear_attention"]},
        ENCODER: {"is_encoder_decoder": True},
        LATENT: {"kv_lora_rank": 512},
    }
    for part, settings in cases.items():
        assert line_of(config | settings) == f"model_type 'my_model' is not supported: it has {part}; {LIST}"
    off = {"num_experts": 0, "kv_lora_rank": None, "is_encoder_decoder": False, "vision_config": {}}
    assert re.fullmatch(
        rf"model_type 'my_model' is not supported \(near: .*\); {LIST}", line_of(config | off)
    )


def test_a_misspelt_type_is_answered_with_the_nearest_ones_on_a_line_or_two():
    for kind, near in {"qwen2_5": "qwen2", "gemma3text": "gemma3_text", "phi-3": "phi3"}.items():
        line = line_of({"model_type": kind})
        assert re.search(r"near: ([\w-]+)", line)[1] == near and len(line) < 160


def test_a_text_decoder_that_jaxft_has_is_named():
    line = line_of(
        {"model_type": "fast_vlm", "vision_config": {"depth": 2}, "text_config": {"model_type": "qwen2"}}
    )
    assert re.search(r"its text decoder \(qwen2\) is supported: save it", line)


@pytest.mark.parametrize("kind", [None, 3, ["llama"]])
def test_a_model_type_that_is_not_a_string_is_refused(kind):
    start = "config: model_type is missing" if kind is None else f"model_type {kind!r} is not supported"
    assert line_of({"model_type": kind}).startswith(start)
