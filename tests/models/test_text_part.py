"""Text decoders of multimodal checkpoints: log-probs as transformers' whole model has them, config.json."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import logits_of, rows

from jaxft.models import model_types
from jaxft.models.model_types import (  # fmt: skip
    SHARED_SETTINGS,
    TEXT_DEFAULTS,
    TEXT_PARTS,
    TIED,
    decoder_prefix,
    text_config,
    text_tensor,
)
from jaxft.nn import tree
from jaxft.nn.param_spec import spec_paths
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_read
from jaxft.weights.param_loading import param_readers, read_whole

torch = pytest.importorskip("torch")
tiny_vision = pytest.importorskip("tiny_vision")
IDS = np.random.default_rng(0).integers(20, 96, (2, 30))  # none of them of an image


def loaded(folder):
    """(the jaxft model of a folder, its parameters)."""
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    readers = param_readers(hf_read.open_folder(folder), model)
    return model, tree.nested({path: jnp.asarray(read_whole(reader)) for path, reader in readers.items()})


def text_logits(model, ids=IDS):
    """The logits of transformers' model on text alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids).long()).logits.float().numpy()


@pytest.mark.quick_cases("mistral3", "qwen3_vl")
@pytest.mark.parametrize("kind", tiny_vision.CASES)
def test_the_decoder_has_the_log_probs_of_transformers_whole_model_on_text(kind, tmp_path):
    theirs = tiny_vision.write_tiny(kind, tmp_path)
    ours = jax.nn.log_softmax(logits_of(*loaded(tmp_path), rows(IDS)))
    expected = torch.log_softmax(torch.tensor(text_logits(theirs)), -1)
    assert expected.min() < -8  # they are far from even
    np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_every_supported_type_has_a_case_of_parity():
    assert {kind.partition(" ")[0] for kind in tiny_vision.CASES} == set(TEXT_PARTS)


def test_names_of_the_decoder_in_transformers_4_and_5():
    old = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": None,
        "multi_modal_projector.mm_soft_emb_norm.weight": None,
    }
    new = {
        "model.language_model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "score.weight": "score.weight",
        "model.vision_tower.post_layernorm.weight": None,
    }
    nested = {
        "model.text_model.embed_tokens.weight": "model.embed_tokens.weight",
        "model.vision_model.encoder.layers.0.mlp.fc1.bias": None,
        "model.connector.modality_projection.proj.weight": None,
    }
    beside = {
        "model.layers.1.self_attn.q_proj.bias": "model.layers.1.self_attn.q_proj.bias",
        "visual.blocks.0.mlp.fc1.weight": None,
    }
    for expected in (old, new, nested, beside):
        prefix = decoder_prefix(expected)
        assert {name: text_tensor(name, prefix) for name in expected} == expected
    assert decoder_prefix(["vision_tower.encoder.weight", "model.visual.merger.weight"]) is None


@pytest.mark.parametrize("kind", TEXT_DEFAULTS)
def test_a_setting_that_text_config_lacks_has_transformers_default(kind):
    """Of every decoder, by the configuration that jaxft parses from transformers' own defaults."""
    from transformers import CONFIG_MAPPING

    whole = next(name for name, part in TEXT_PARTS.items() if kind in part.decoders)
    theirs = CONFIG_MAPPING[kind]().to_dict()

    def parsed(text):
        config = text_config({"model_type": whole, "text_config": text, "tie_word_embeddings": False})
        return model_types.family_of(config).from_hf(config)

    assert parsed({"model_type": kind}) == parsed(
        {name: x for name, x in theirs.items() if name not in (*SHARED_SETTINGS, TIED)}
    )


def test_old_qwen_vl_files_have_the_decoder_s_settings_at_the_top_level():
    flat = {
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000, "sliding_window": 32768, "use_sliding_window": False,
        "max_window_layers": 70, "tie_word_embeddings": True, "vision_config": {"depth": 32},
        "vision_start_token_id": 151652, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    config = text_config(flat)
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["rope_scaling"] == {"type": "default"} and not [x for x in config if "vision" in x]
    found = model_types.family_of(config).from_hf(config)
    assert (found.layers, found.tied, found.rope.theta) == (36, True, 1e6)


PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "torch_dtype": "float16",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
            "torch_dtype": "float16", "vocab_size": 32064,
        },
    },
    "Qwen/Qwen3-VL-4B-Instruct": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "text_config": {
            "attention_bias": False, "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728,
            "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32,
            "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"
            },
            "rope_theta": 5000000, "tie_word_embeddings": True, "vocab_size": 151936,
        },
    },
}  # fmt: skip
TEXT_PARAMETERS = {"llava-hf/llava-1.5-7b-hf": 6_738_939_904, "Qwen/Qwen3-VL-4B-Instruct": 4_022_468_096}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_decoder_its_number_of_parameters(name):
    """Vicuna 7B with 64 more rows in table and head; Qwen3 4B."""
    config = text_config(PUBLISHED[name])
    family = model_types.family_of(config)
    specs = spec_paths(family.build(family.from_hf(config)).specs)
    assert sum(math.prod(spec.shape) for spec in specs.values()) == TEXT_PARAMETERS[name]


REFUSED = {
    "no text_config": ({"model_type": "gemma3"}, "needs an object text_config with the settings of its text"),
    "a text": ({"model_type": "llava", "text_config": "llama"}, "decoder, got 'llama'"),
    "a soft cap": (
        {"model_type": "gemma3", "text_config": {"final_logit_softcapping": 30.0}},
        "final_logit_softcapping=30.0 of text_config is not supported, because transformers ignores it",
    ),
    "a type that jaxft lacks": (
        {"model_type": "mistral3", "text_config": {"model_type": "ministral3"}},
        "text_config of this 'mistral3': model_type 'ministral3' is not supported: it has queries that are "
        "scaled by their position",
    ),
    "a type whose head scales": (
        {"model_type": "llava_next", "text_config": {"model_type": "granite"}},
        "text_config of this 'llava_next': model_type 'granite' is supported alone, but not as its decoder",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_text_config_that_cannot_be_read_is_one_line(what, tmp_path):
    config, words = REFUSED[what]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: config: .*{re.escape(words)}") as caught:
        pretrained.model_for(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_files_without_the_decoder_are_refused_in_one_line(tmp_path):
    from safetensors.numpy import save_file

    tiny_vision.write_tiny("mistral3", tmp_path)
    save_file({"vision_tower.ln_pre.weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor of the text decoder of this multimodal model") as caught:
        hf_read.open_folder(tmp_path)
    assert "\n" not in str(caught.value)
