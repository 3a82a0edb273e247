"""What is said of a model that no family implements: one line with the part that is missing."""

import re

import pytest

from jaxft.models.families import FAMILIES, family_of

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
    "qwen2_vl": [TOWERS],
    "qwen2_5_vl": [TOWERS],
    "qwen3_vl_moe": [TOWERS, EXPERTS],
    "llava": [TOWERS],
    "llama4": [TOWERS, EXPERTS],
    "mllama": [TOWERS],
    "idefics3": [TOWERS],
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


@pytest.mark.parametrize("kind", MISSING)
def test_a_model_type_of_transformers_is_refused_with_what_is_missing(kind):
    auto = pytest.importorskip("transformers").AutoConfig
    line = line_of(auto.for_model(kind).to_dict())
    expected = f"model_type {kind!r} is not implemented: it has {' and '.join(MISSING[kind])}; jaxft has "
    assert line.startswith(expected)
    whole = ", ".join(FAMILIES)
    rest = line.removeprefix(expected)
    assert rest == whole or re.fullmatch(r"its text decoder \(\w+\): save that alone .*", rest)


@pytest.mark.parametrize(
    "kind", [kind for kind, parts in MISSING.items() if parts != ["the activation relu2"]]
)
def test_the_type_alone_is_enough(kind):
    """A config.json that lacks the settings by which a type is known."""
    line = line_of({"model_type": kind, "hidden_size": 64, "hidden_act": "silu"})
    assert line.startswith(f"model_type {kind!r} is not implemented: it has ")
    assert any(part in line for part in MISSING[kind])


def test_settings_tell_of_an_unknown_type():
    config = {"model_type": "my_model", "hidden_size": 64}
    cases = {
        EXPERTS: {"n_routed_experts": 8},
        TOWERS: {"vision_config": {"depth": 2}},
        STATES: {"layer_types": ["full_attention", "linear_attention"]},
        ENCODER: {"is_encoder_decoder": True},
        LATENT: {"kv_lora_rank": 512},
    }
    for part, settings in cases.items():
        assert line_of(config | settings).startswith(
            f"model_type 'my_model' is not implemented: it has {part};"
        )
    off = {"num_experts": 0, "kv_lora_rank": None, "is_encoder_decoder": False, "vision_config": {}}
    assert line_of(config | off).startswith("model_type 'my_model' is not implemented; jaxft has llama")


def test_a_text_decoder_that_jaxft_has_is_named():
    line = line_of(
        {"model_type": "llava", "vision_config": {"depth": 2}, "text_config": {"model_type": "qwen2"}}
    )
    assert re.search(r"jaxft has its text decoder \(qwen2\): save that alone", line)


@pytest.mark.parametrize("kind", [None, 3, ["llama"]])
def test_a_model_type_that_is_no_name_is_refused(kind):
    start = "config: model_type is missing" if kind is None else f"model_type {kind!r} is not implemented"
    assert line_of({"model_type": kind}).startswith(start)
