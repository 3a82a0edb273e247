"""Presets against what was published: numbers of parameters, and settings of config.json files."""

import pytest

from jaxft.models.model_types import FAMILIES, config_to_hf, family_of, preset, preset_config
from jaxft.nn.param_spec import count_params

# Elements of the tensors in the published safetensors files.
COUNTS = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
}
# Settings of published config.json files, without those that are the defaults of transformers: type, width,
# MLP, layers, heads, kv heads, head dim, vocabulary, theta, epsilon, tied, longest row, and others.
KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings",
)  # fmt: skip
QWEN, CHAT = {"bos_token_id": 151643, "eos_token_id": 151643}, {"bos_token_id": 151643}
GRANITE = {
    "bos_token_id": 0, "eos_token_id": 0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
}  # fmt: skip
OLMO3 = {
    "eos_token_id": 100257, "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.2079441541679836,
    },
}  # fmt: skip
EXAONE4 = {
    "bos_token_id": 1, "eos_token_id": 361,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
FILES = {
    "mistralai/Mistral-7B-Instruct-v0.1": (
        ("mistral", 4096, 14336, 32, 32, 8, None, 32000, 1e4, 1e-5, False, 32768), {"sliding_window": 4096}
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        ("mistral", 4096, 14336, 32, 32, 8, None, 32000, 1e6, 1e-5, False, 32768), {"sliding_window": None}
    ),
    "mistralai/Mistral-Nemo-Base-2407": (
        ("mistral", 5120, 14336, 40, 32, 8, 128, 131072, 1e6, 1e-5, False, 128000), {"sliding_window": None}
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        ("mistral", 5120, 32768, 40, 32, 8, 128, 131072, 1e8, 1e-5, False, 32768), {"sliding_window": None}
    ),
    "Qwen/Qwen2.5-3B": (("qwen2", 2048, 11008, 36, 16, 2, None, 151936, 1e6, 1e-6, True, 32768), QWEN),
    "Qwen/Qwen2.5-7B": (("qwen2", 3584, 18944, 28, 28, 4, None, 152064, 1e6, 1e-6, False, 131072), QWEN),
    "Qwen/Qwen2.5-14B": (("qwen2", 5120, 13824, 48, 40, 8, None, 152064, 1e6, 1e-5, False, 131072), QWEN),
    "Qwen/Qwen2.5-32B": (("qwen2", 5120, 27648, 64, 40, 8, None, 152064, 1e6, 1e-5, False, 131072), QWEN),
    "Qwen/Qwen2.5-72B-Instruct": (
        ("qwen2", 8192, 29568, 80, 64, 8, None, 152064, 1e6, 1e-6, False, 32768), CHAT
    ),
    "Qwen/Qwen3-4B": (("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 1e6, 1e-6, True, 40960), CHAT),
    "Qwen/Qwen3-8B": (("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 1e6, 1e-6, False, 40960), CHAT),
    "Qwen/Qwen3-14B": (("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, 1e6, 1e-6, False, 40960), CHAT),
    "Qwen/Qwen3-32B": (("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 1e6, 1e-6, False, 40960), CHAT),
    "allenai/OLMo-2-1124-7B-Instruct": (
        ("olmo2", 4096, 11008, 32, 32, 32, None, 100352, 5e5, 1e-6, False, 4096), {"eos_token_id": 100257}
    ),
    "allenai/OLMo-2-1124-13B": (
        ("olmo2", 5120, 13824, 40, 40, 40, None, 100352, 5e5, 1e-6, False, 4096), {"eos_token_id": 100257}
    ),
    # Olmo 3: as DinoML's notes on olmo3 list the settings of these files.
    **{
        f"allenai/{name}": (sizes, OLMO3)
        for sizes, names in (
            (
                ("olmo3", 4096, 11008, 32, 32, 32, None, 100278, 5e5, 1e-6, False, 65536),
                ("Olmo-3-7B-Instruct", "Olmo-3-7B-Think"),
            ),
            (
                ("olmo3", 5120, 27648, 64, 40, 8, None, 100278, 5e5, 1e-6, False, 65536),
                ("Olmo-3-32B-Think",),
            ),
        )
        for name in names
    },
    # EXAONE 4: sizes, head and windows in the table of transformers' docs (exaone4.md); rope and epsilon in
    # ollama's (1.2B) and TensorRT-LLM's (32B) tests of the architecture.
    "LGAI-EXAONE/EXAONE-4.0-1.2B": (
        ("exaone4", 2048, 4096, 30, 32, 8, 64, 102400, 1e6, 1e-5, True, 65536),
        EXAONE4 | {"sliding_window": None, "sliding_window_pattern": None},
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": (
        ("exaone4", 5120, 27392, 64, 40, 8, 128, 102400, 1e6, 1e-5, False, 131072),
        EXAONE4 | {"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    # Seed-OSS: as in tests of seed_oss by Lablup, from the file of the Instruct model.
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (
        ("seed_oss", 5120, 27648, 64, 80, 8, 128, 155136, 1e7, 1e-6, False, 524288),
        {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    ),
    # Mistral Small 22B: sizes in GenZ-LLM-Analyzer, from the hub's file; the rest in tests of a Rust port.
    "mistralai/Mistral-Small-Instruct-2409": (
        ("mistral", 6144, 16384, 56, 48, 8, 128, 32768, 1e6, 1e-5, False, 32768), {"sliding_window": None}
    ),
    "ibm-granite/granite-3.3-2b-instruct": (
        ("granite", 2048, 8192, 40, 32, 8, None, 49159, 1e7, 1e-5, True, 131072),
        GRANITE | {"attention_multiplier": 0.015625, "logits_scaling": 8.0},
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        ("granite", 4096, 12800, 40, 32, 8, None, 49159, 1e7, 1e-5, True, 131072),
        GRANITE | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert count_params(preset(name).specs) == COUNTS[name]


@pytest.mark.parametrize("name", FILES)
def test_a_preset_has_the_settings_of_the_published_file(name):
    values, others = FILES[name]
    file = {key: value for key, value in zip(KEYS, values, strict=True) if value is not None} | others
    found, expected = family_of(file).from_hf(file), preset_config(name)
    eos = {"eos": expected.eos} if others is CHAT else {}  # the others end turns in generation_config.json
    assert type(found) is type(expected)
    assert vars(found) | eos == vars(expected)


PRESETS = {name: family for family in FAMILIES.values() for name in family.presets}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_written_to_a_config_json_is_read_as_it_is(name):
    written = config_to_hf(preset_config(name))
    assert family_of(written).from_hf(written) == preset_config(name)
