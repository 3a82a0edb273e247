"""Rope settings of config.json, wherever files have them, against transformers' own frequencies."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.models import llama_config

pytest.importorskip("torch")
SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 16384,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"type": "linear", "factor": 4}


def frequencies(**rope):
    return llama_config.inverse_frequencies(llama_config.from_hf({**SIZES, **rope}))


def transformers_frequencies(**rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(copy.deepcopy({**SIZES, **rope}))  # which edits the groups
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


SAME = {
    "transformers 4": dict(rope_theta=5e5, rope_scaling=LLAMA3),
    "transformers 5": dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "both": dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_scaling={**LLAMA3, "rope_theta": 5e5}),
    "both, theta beside them": dict(rope_theta=5e5, rope_parameters=LLAMA3, rope_scaling=LLAMA3),
    "theta in three places": dict(
        rope_theta=500000, rope_parameters={"rope_theta": 5e5}, rope_scaling=LINEAR
    ),
    "scaling empty": dict(rope_scaling={}, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "scaling null": dict(rope_scaling=None, rope_theta=300.0),
    "two names of the type": dict(rope_scaling={**LINEAR, "rope_type": "linear"}),
    "original length beside it": dict(
        rope_scaling={k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        original_max_position_embeddings=8192,
    ),
    "nothing rotated less": dict(rope_parameters={"rope_theta": 3e4, "partial_rotary_factor": 1.0}),
}


@pytest.mark.parametrize("name", SAME)
def test_rope_settings_are_read_as_transformers_reads_them(name):
    np.testing.assert_allclose(frequencies(**SAME[name]), transformers_frequencies(**SAME[name]), rtol=1e-6)


REFUSED = {
    "another type": (
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=LINEAR),
        "rope_parameters has rope_type='default', but rope_scaling, which counts before it, means "
        "rope_type='linear'",
    ),
    "another factor": (
        dict(rope_parameters={**LINEAR, "factor": 2.0}, rope_scaling=LINEAR),
        "rope_parameters has factor=2.0, but rope_scaling",
    ),
    "theta that is not used": (  # transformers 5 takes 10000 here
        dict(rope_parameters={**LINEAR, "rope_theta": 5e5}, rope_scaling=LINEAR),
        "rope_parameters has rope_theta=500000.0, but rope_scaling, which counts before it, means "
        "rope_theta=10000.0",
    ),
    "theta beside another": (
        dict(rope_parameters={"rope_theta": 5e5}, rope_theta=1e4),
        "config.json has rope_theta=10000.0, but rope_parameters",
    ),
    "two types": (
        dict(rope_scaling={**LINEAR, "rope_type": "llama3"}),
        "rope_type='llama3' and type='linear'",
    ),
    "no object": (dict(rope_scaling="linear"), "rope_scaling must be an object"),
    "a number as text": (
        dict(rope_scaling={**LINEAR, "factor": "4"}),
        "factor of rope_scaling must be a finite number, got '4'",
    ),
    "theta not finite": (dict(rope_theta=float("nan")), "rope_theta of config.json must be a finite number"),
    "a part missing": (
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope type 'llama3' needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "part of a head": (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    "unknown": (dict(rope_parameters={"mscale": 1.0}), "rope setting 'mscale' in rope_parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictory_or_invalid_rope_settings_are_one_line(name):
    rope, words = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        frequencies(**rope)
    assert words in str(caught.value) and "\n" not in str(caught.value)


THETAS = st.sampled_from([{}, {"rope_theta": 10000}, {"rope_theta": 5e5}])
TYPES = st.sampled_from(
    [{}, LLAMA3, LINEAR, {**LINEAR, "rope_type": "linear"}, {"type": "default"}, {**LLAMA3, "factor": 32}]
)
GROUPS = st.builds(lambda kind, theta: {**kind, **theta}, TYPES, THETAS)


@given(st.none() | GROUPS, st.none() | GROUPS, THETAS)
@settings(max_examples=80, deadline=None)
def test_any_accepted_rope_setting_gives_transformers_frequencies(scaling, parameters, theta):
    rope = {"rope_scaling": scaling, "rope_parameters": parameters, **theta}
    try:
        ours = frequencies(**rope)
    except ValueError as e:
        assert "counts before it" in str(e)
        return
    np.testing.assert_allclose(ours, transformers_frequencies(**rope), rtol=1e-6)
