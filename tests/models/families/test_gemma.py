"""Gemma's presets, its config.json in the forms of the hub, what is refused, and multimodal checkpoints."""

import json
import math
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from reward_folders import begun, saved, torch_score
from tiny_llama import some_tokens

from jaxft.models import model_types
from jaxft.models.model_types import text_config
from jaxft.nn.param_spec import spec_paths
from jaxft.nn.rope import Rope
from jaxft.rl import reward_models
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_read, hf_write
from jaxft.weights.hf.model_card import Card, write_card
from jaxft.weights.param_loading import param_readers, read_whole

torch = pytest.importorskip("torch")
tiny_vision = pytest.importorskip("tiny_vision")

# Parameters of the published checkpoints on the hub, with a vision tower (and its projection [1152, D] and
# norm) in the larger Gemma 3.
VISION_TOWER = 416_866_032
SIZES = {
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 4_300_079_472,
    "google/gemma-3-12b-pt": 12_187_325_040,
    "google/gemma-3-27b-pt": 27_432_406_640,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_as_many_parameters_as_the_published_weights(name):
    model = model_types.preset(name)
    count = sum(math.prod(spec.shape) for spec in spec_paths(model.specs).values())
    if model.config.vocab == 262208:
        count += VISION_TOWER + 1152 * model.config.width + 1152
    assert count == SIZES[name]


def text_4b():
    """What google/gemma-3-4b-it has on the hub, shortened: everything else is transformers' default."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model"},
    }  # fmt: skip


def test_the_preset_of_a_multimodal_checkpoint_is_its_config_on_the_hub():
    config = text_config(text_4b())
    found = model_types.family_of(config).from_hf(config)
    assert found == model_types.preset_config("google/gemma-3-4b-it")
    assert found.rope == Rope(1e6, "linear", factor=8.0) and found.local_rope == Rope(1e4)
    assert found.layer_types.count("full_attention") == 5 and found.layer_types[5] == "full_attention"
    assert config["torch_dtype"] == "bfloat16" and "vision_config" not in config


GEMMA1 = {
    "model_type": "gemma", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    "acts", [{}, {"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}]
)
def test_gelu_in_a_gemma_1_means_the_tanh_approximation(acts):
    assert model_types.family_of(GEMMA1).from_hf(GEMMA1 | acts).activation == "gelu_tanh"


GEMMA3 = {**GEMMA1, "model_type": "gemma3_text", "sliding_window": 7}
REFUSED = {
    "an exact gelu next to another": (
        GEMMA1 | {"hidden_act": "gelu", "hidden_activation": "gelu"},
        "hidden_act='gelu_pytorch_tanh' (read by transformers 5) differ; set both to 'gelu_pytorch_tanh'",
    ),
    "an encoder": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "biases": (GEMMA1 | {"attention_bias": True}, "attention_bias"),
    "a soft cap that transformers ignores": (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit"),
    "a soft cap of 0": (GEMMA3 | {"final_logit_softcapping": 0}, "final_logit_softcapping=0; expected"),
    "a scale of text": (GEMMA3 | {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar="),
    "no scale": (GEMMA3 | {"query_pre_attn_scalar": None}, "query_pre_attn_scalar="),
    "a period of 0": (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern must be"),
    "no window": (
        GEMMA3 | {"sliding_window": None},
        "layer_types has sliding_attention, but sliding_window is null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_one_line(what):
    config, words = REFUSED[what]
    with pytest.raises(ValueError, match="config: ") as caught:
        model_types.family_of(config).from_hf(config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """The folder of a tiny Gemma 3 with a vision tower."""
    folder = tmp_path_factory.mktemp("multimodal")
    tiny_vision.write_tiny("gemma3", folder)
    return folder


def loaded(folder):
    """(the jaxft model of a folder, its parameters)."""
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    params = {}
    for path, reader in param_readers(hf_read.open_folder(folder), model).items():
        node = params
        *above, last = path.split("/")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(read_whole(reader))
    return model, params


@pytest.mark.slow
def test_a_reward_adapter_of_the_decoder_has_its_scores_as_loaded_on_its_card(multimodal, tmp_path):
    folder, options = multimodal, hf_write.WriteOptions(text_only=True)
    hf_write.save_folder(tmp_path / "base", *loaded(folder), None, str(folder), options)
    t, whole = begun(folder)
    adapter, tokens = saved(t, whole, folder, tmp_path), some_tokens(vocab=tiny_vision.TEXT["vocab_size"])
    theirs = loaded_as_on_the_card(tmp_path / "base", adapter, folder, scores=True, pad=0)
    found = [torch_score(theirs.float().eval(), ids) for ids in tokens.ids]
    expected = reward_models.score_rows(t.model, whole, tokens)
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-4)


def loaded_as_on_the_card(base, adapter, multimodal_base, **options):
    """The model that the Python code on the adapter's card loads."""
    card = Card("a", str(multimodal_base), "adapter", "peft", "A text.", text_decoder=True, **options)
    write_card(adapter, card)
    text = (adapter / "README.md").read_text()
    assert f"export.py --model {multimodal_base.name} --text-only --out BASE" in text
    (code,) = re.findall(r"```python\n(.*?)tokenizer = [^\n]*\n```", text, re.DOTALL)
    names = {"BASE": str(base), "FOLDER": str(adapter)}
    exec(code, names)
    return names["model"]


def test_a_head_that_is_not_the_embedding_counts_without_a_tied_setting_too(multimodal, tmp_path):
    """Gemma's config.json states none: transformers ties by default."""
    model, params = loaded(multimodal)
    untied, options = params | {"head": params["embed"].T + 1}, hf_write.WriteOptions(text_only=True)
    hf_write.save_folder(tmp_path, model, untied, None, str(multimodal), options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = pretrained.model_for(str(tmp_path))
    assert not found.config.tied and found.config == replace(model.config, tied=False)
    assert "lm_head.weight is not the embedding" in pretrained.file_notes(str(tmp_path), found)[0]
