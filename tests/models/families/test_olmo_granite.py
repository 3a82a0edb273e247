"""Settings of OLMo, EXAONE, Granite and Llama's relatives in config.json: defaults, old forms, refusals."""

import dataclasses

import pytest

from jaxft.models.dense_config import FULL, SLIDING
from jaxft.models.model_types import family_of
from jaxft.nn.rope import Rope

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
VOCABULARY = SIZES | {"vocab_size": 131072}  # with the ids that transformers has by default


def config_of(kind, **settings):
    file = {"model_type": kind, **SIZES, **settings}
    return family_of(file).from_hf(file)


def test_olmo3_of_transformers_4_scales_only_the_rope_of_full_attention():
    """As allenai/Olmo-3-1025-7B: one rope_theta, and yarn for the layers that see every key."""
    yarn = {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.2079441541679836,
    }  # fmt: skip
    c = config_of("olmo3", rope_theta=500000, rope_scaling=yarn, max_position_embeddings=65536)
    assert c.local_rope == Rope(500000.0) and c.window == 4096
    assert (c.rope.kind, c.rope.theta, c.rope.factor) == ("yarn", 500000.0, 8.0)
    assert c.layer_types == (SLIDING, SLIDING, SLIDING, FULL) * 2


@pytest.mark.parametrize("kind, default", [("olmo3", 500000.0), ("olmo2", 10000.0), ("cwm", 1e6)])
def test_the_theta_of_a_file_without_one_is_that_of_transformers(kind, default):
    auto = pytest.importorskip("transformers").AutoConfig
    theirs = auto.for_model(kind, **SIZES).to_dict()["rope_parameters"]
    assert theirs.get("full_attention", theirs)["rope_theta"] == default
    assert config_of(kind).rope.theta == default


def test_a_cwm_without_rope_settings_has_the_scaled_rope_of_transformers():
    auto = pytest.importorskip("transformers").AutoConfig
    theirs = auto.for_model("cwm", **VOCABULARY).to_dict()
    assert config_of("cwm", **VOCABULARY) == family_of(theirs).from_hf(theirs)
    assert config_of("cwm").rope.kind == "llama3"
    stated = config_of("cwm", rope_theta=5e5).rope
    assert stated == dataclasses.replace(config_of("cwm").rope, theta=5e5)


@pytest.mark.parametrize(
    "kind", ["olmo2", "olmo3", "granite", "exaone4", "seed_oss", "internlm3", "iquestcoder", "cwm"]
)
def test_settings_that_a_file_does_not_have_are_those_of_transformers(kind):
    auto = pytest.importorskip("transformers").AutoConfig
    theirs = auto.for_model(kind, **VOCABULARY).to_dict()
    assert config_of(kind, **VOCABULARY) == family_of(theirs).from_hf(theirs)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; use hidden_act='silu'"),
        ("olmo3", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
        ("olmo3", {"layer_types": [FULL] * 7}, "layer_types must be a list of 8 types"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 8}, "'chunked_attention' is not supported"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier=0; expected above 1e-37"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling='8'; expected a number"),
        ("granite", {"residual_multiplier": float("nan")}, "residual_multiplier=nan; expected a finite"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern='LLLG' is not supported"),
        ("exaone4", {"sliding_window": None, "layer_types": [SLIDING] * 8}, "but sliding_window is null"),
        ("internlm3", {"qkv_bias": True, "bias": False}, "qkv_bias=True with bias=False is not supported"),
        ("iquestcoder", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported; use clip_qkv=None"),
        ("iquestcoder", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("cwm", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
        ("seed_oss", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_unsupported_settings_are_refused(kind, settings, message):
    with pytest.raises(ValueError) as error:
        config_of(kind, **settings)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_layer_types_of_exaone4_count_before_a_pattern():
    c = config_of("exaone4", sliding_window_pattern="LLLG", layer_types=[SLIDING, FULL] * 4)
    assert c.layer_types == (SLIDING, FULL) * 4
    assert config_of("exaone4", sliding_window=None, sliding_window_pattern=None).layer_types == (FULL,) * 8
