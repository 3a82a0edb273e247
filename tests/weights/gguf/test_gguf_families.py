"""GGUF files of every architecture that is read: configuration, tensors and logits, against the transformers
models that they are made from and against transformers' own reader of GGUF.
"""

import gguf as gguf_package
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_families import FAMILIES, LOCAL_ROPE, tiny_family, write_family
from host_weights import load_on_host
from tiny_llama import our_logits, some_tokens, torch_logits

from jaxft.models import model_types
from jaxft.nn.quant import dequantize
from jaxft.weights import pretrained
from jaxft.weights.gguf import gguf_architectures, gguf_config
from jaxft.weights.gguf.gguf_file import read_gguf_header
from jaxft.weights.gguf.gguf_write import check_config
from jaxft.weights.hf import hf_read

torch = pytest.importorskip("torch")
TOKENS = some_tokens(time=24, vocab=96)  # longer than windows (5) and lengths before scaling (16)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, the model, its file)."""
    model = tiny_family(request.param)
    path = tmp_path_factory.mktemp("gguf") / f"{request.param.replace(' ', '-')}.gguf"
    return request.param, model, write_family(path, request.param, model)


def config_of(path):
    return gguf_config.gguf_config(read_gguf_header(path))


def state_of(model):
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: x.numpy() for name, x in model.state_dict().items() if name not in tied}


def test_every_tensor_is_the_models_under_its_name(family):
    _, model, path = family
    files, state = pretrained.open_files(str(path)), state_of(model)
    assert files.tensors.keys() == state.keys()
    for name, value in state.items():
        assert files.tensors[name].shape == value.shape
        assert files.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(files.read(name), value, err_msg=name)
        part = (slice(1, 3),) * value.ndim
        np.testing.assert_array_equal(files.read(name, part), value[part], err_msg=name)


# What a file does not state: how weights were initialised, dropout, padding, and what only tells how
# transformers loads or runs a model.
UNSTATED = {
    "architectures", "initializer_range", "dtype", "pad_token_id", "transformers_version", "_name_or_path",
    "max_window_layers",
}  # fmt: skip


def test_the_config_is_the_models(family):
    from transformers import AutoConfig

    name, model, path = family
    config = config_of(path)
    architectures = config.pop("architectures")
    assert architectures == [type(model).__name__]
    theirs = AutoConfig.for_model(config.pop("model_type"), **config)
    assert type(theirs) is type(model.config)
    got, expected = theirs.to_dict(), model.config.to_dict()
    assert {key: got.get(key) for key in expected if key not in UNSTATED} == {
        key: value for key, value in expected.items() if key not in UNSTATED
    }


def test_a_model_of_the_config_and_the_tensors_has_the_same_logits(family):
    """In transformers' own models, so that rope, windows, soft caps and scales are compared by what they
    compute.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _, model, path = family
    config = config_of(path)
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    files = pretrained.open_files(str(path))
    state = {name: torch.tensor(files.read(name)) for name in files.tensors}
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    again.tie_weights()
    np.testing.assert_allclose(torch_logits(again, TOKENS), torch_logits(model, TOKENS), rtol=1e-5, atol=1e-5)


def test_the_file_is_the_family_of_the_models_config_json(family):
    _, model, path = family
    if model.config.model_type not in model_types.FAMILIES:
        pytest.skip("jaxft has no such family")
    ours = pretrained.model_for(str(path))
    assert ours.config == model_types.FAMILIES[model.config.model_type].from_hf(model.config.to_dict())
    hf_read.check_tensors(pretrained.open_files(str(path)), ours)


def test_llama_cpp_computes_what_the_converters_file_states_but_for_ignored_windows(family):
    name, _, path = family
    config, tied = (
        pretrained.model_for(str(path)).config,
        "output.weight" not in read_gguf_header(path).tensors,
    )
    if name in ("mistral", "phi3"):
        return check_lacks(path, config, "sliding_window=5")
    assert check_config(path, config, tied) == []


def check_lacks(path, config, setting):
    """A written file is refused; one whose metadata were copied has the setting's source as an excuse."""
    with pytest.raises(ValueError, match=f"llama.cpp's architecture \\w+ lacks .*{setting}") as caught:
        check_config(path, config, False)
    assert "\n" not in str(caught.value)
    (warning,) = check_config(path, config, False, read_gguf_header(path))
    assert warning.startswith("warning: llama.cpp ignores ") and setting in warning


IGNORED = {  # metadata that llama.cpp does not read, and the setting that it lacks for that reason
    "YaRN's attention_factor": (
        "qwen2 yarn", {}, [("add_rope_scaling_yarn_attn_factor", 1.25)], "attention_factor=1.25",
    ),
    "YaRN's betas": ("qwen2 yarn", {}, [("add_rope_scaling_yarn_beta_slow", 0.1)], "beta_slow=0.1"),
    "YaRN's mscale": ("qwen2 yarn", {}, [("add_rope_scaling_yarn_log_mul", 1.0)], "mscale_all_dim=1.0"),
    "OLMo 3's local theta": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {**LOCAL_ROPE, "rope_theta": 5e5},
                "sliding_attention": LOCAL_ROPE,
            }
        },
        [],
        "local_rope of type 'default' with theta=10000.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", IGNORED)
def test_the_check_does_not_believe_metadata_that_llama_cpp_ignores(tmp_path, what):
    """Although jaxft's reader does, because the converter wrote them from the model's config.json."""
    name, changes, fields, setting = IGNORED[what]
    path = write_family(tmp_path / "tiny.gguf", name, tiny_family(name, **changes), fields=fields)
    check_lacks(path, pretrained.model_for(str(path)).config, setting)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi4 mini", "granite"])
def test_logits_of_the_file_equal_the_models(tmp_path, name):
    """Of the families with most settings in the metadata; every family has the tests of its folder."""
    if FAMILIES[name][1] not in model_types.FAMILIES:
        pytest.skip("jaxft has no such family")
    model = tiny_family(name)
    path = write_family(tmp_path / "tiny.gguf", name, model)
    ours = pretrained.model_for(str(path), dtype=jnp.float32)
    base = load_on_host(str(path), ours, lambda path, array: array)
    np.testing.assert_allclose(our_logits(ours, base, TOKENS), torch_logits(model, TOKENS), atol=1e-4)


READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_tensors_and_sizes_are_those_that_transformers_reads(tmp_path, name):
    from transformers import AutoModelForCausalLM

    fields = [("add_vocab_size", 96), ("add_name", "tiny")]
    # transformers takes the width of Qwen 3's heads to be 128, whatever the file says
    model = tiny_family(name, **({"head_dim": 128} if name == "qwen3" else {}))
    path = write_family(tmp_path / "tiny.gguf", name, model, fields=fields)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    files, config = pretrained.open_files(str(path)), config_of(path)
    for tensor, value in state_of(theirs).items():
        np.testing.assert_array_equal(files.read(tensor), value, err_msg=tensor)
    stated = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for key in (*stated, "intermediate_size", "max_position_embeddings", "model_type"):
        assert config[key] == getattr(theirs.config, key), key


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "smollm3"])
def test_quantised_tensors_stay_packed(tmp_path, name):
    """Blocks lie along rows, so that the model's own rows, quantised, are what is expected."""
    model = tiny_family(name)
    files = pretrained.open_files(str(write_family(tmp_path / "tiny.gguf", name, model, Kind.Q8_0)))
    matrices = {key: value for key, value in state_of(model).items() if value.ndim == 2}
    assert files.quantised.keys() == matrices.keys()
    for key, value in matrices.items():
        expected = gguf_package.quants.dequantize(gguf_package.quants.quantize(value, Kind.Q8_0), Kind.Q8_0)
        packed = files.quantised[key].read()
        assert packed.kind == "int8"
        np.testing.assert_array_equal(np.asarray(dequantize(packed)).T, expected, err_msg=key)
        np.testing.assert_array_equal(files.read(key), expected, err_msg=key)


def test_modules_are_those_of_the_gguf_package():
    names = {value: key for key, value in gguf_package.MODEL_ARCH_NAMES.items()}
    assert gguf_architectures.ARCHITECTURES.keys() == gguf_config.SETTINGS.keys()
    assert {architecture for architecture, *_ in FAMILIES.values()} == gguf_config.SETTINGS.keys()
    for name, architecture in gguf_architectures.ARCHITECTURES.items():
        tensors = {
            gguf_package.TENSOR_NAMES[t].removeprefix("blk.{bid}.")
            for t in gguf_package.MODEL_TENSORS[names[name]]
        }
        assert architecture.modules.keys() | {"token_embd", "output_norm"} <= tensors


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_of_27b_scale_queries_by_width_over_heads(tmp_path, name, layers):
    """The number of layers tells: gemma-2-27b has 4608 / 32 = 144, gemma-3-27b 5376 / 32 = 168. Their heads
    have 128 dimensions.
    """
    sizes = {"head_dim": 32, "num_hidden_layers": layers, "query_pre_attn_scalar": 16, "layer_types": None}
    model = tiny_family(name, **sizes)
    config = config_of(write_family(tmp_path / "tiny.gguf", name, model))
    assert config["query_pre_attn_scalar"] == 16 == config["hidden_size"] // config["num_attention_heads"]


def test_defaults_of_llama_cpp_fill_what_older_files_do_not_state(tmp_path):
    """Gemma 2's window and soft caps, Gemma 3's local rope; a pattern may be a period."""
    path = write_family(tmp_path / "tiny.gguf", "gemma2")
    without(path, "sliding_window", "softcapping")
    config = config_of(path)
    assert config["sliding_window"] == 4096
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    path = write_family(tmp_path / "tiny.gguf", "gemma3")
    without(path, "freq_base_swa")
    assert config_of(path)["rope_parameters"]["sliding_attention"] == {
        "rope_type": "default",
        "rope_theta": 1e4,
    }
    path = write_family(tmp_path / "tiny.gguf", "olmo3", fields=[("add_sliding_window_pattern", 2)])
    assert config_of(path)["layer_types"] == ["sliding_attention", "full_attention"] * 2
    path = write_family(tmp_path / "tiny.gguf", "gemma3", fields=[("add_sliding_window", 0)])
    config = config_of(path)
    assert config["sliding_window"] is None and set(config["layer_types"]) == {"full_attention"}


def without(path, *names):
    """Take metadata whose keys contain these names away: the first letter of their keys changes."""
    raw, header = bytearray(path.read_bytes()), read_gguf_header(path)
    for key in header.metadata:
        if any(name in key for name in names):
            at = raw.find(key.encode())
            raw[at : at + 1] = b"_"
    path.write_bytes(raw)


REFUSED = {
    "other metadata": ("qwen3", [("add_pooling_type", gguf_package.PoolingType.LAST)], (), "pooling_type"),
    "a soft cap": ("qwen2", [("add_final_logit_softcapping", 30.0)], (), "qwen2.final_logit_softcapping"),
    "another local rope": ("gemma2", [("add_rope_freq_base_swa", 5e4)], (), "gemma2.rope.freq_base_swa"),
    "Ministral 3": ("mistral small", [("add_attn_temperature_scale", 0.1)], (), "temperature_scale"),
    "experts": (
        "qwen2", [("add_expert_count", 8)], (), "GGUF architecture 'qwen2' with 8 experts is not supported",
    ),
    "Granite without rope": ("granite", [("add_rope_scaling_finetuned", False)], (), "finetuned is false"),
    "partial rope": ("olmo2", [("add_rope_dimension_count", 8)], (), "rope rotates 8 of 16"),
    "rope wider than a head": ("phi3", [("add_rope_dimension_count", 32)], (), "rope rotates 32 of 16"),
    "layers": ("qwen2", [("add_block_count", 10**6)], (), "block_count is 1000000, but the file has"),
    "a pattern": ("olmo3", [("add_sliding_window_pattern", [True])], (), "has 1 entries for 4 layers"),
    "a period": ("olmo3", [("add_sliding_window_pattern", 0)], (), "must be above 0, got 0"),
    "yarn without yarn": ("qwen2", [("add_rope_scaling_yarn_attn_factor", 1.5)], (), "'linear' (not stated"),
    "half a yarn": ("qwen2 yarn", [("add_rope_scaling_yarn_ext_factor", 0.5)], (), "yarn_ext_factor 0.5"),
    "a table of another rope": (
        "qwen2 yarn",
        (),
        [("rope_freqs.weight", np.ones(8, np.float32))],
        "rope_freqs.weight does not belong to rope scaling 'yarn' (stated in the file)",
    ),
    "half a longrope": (
        "phi3",
        (),
        [("rope_factors_long.weight", np.ones(8, np.float32))],
        "needs tensor rope_factors_short.weight",
    ),
    "a short table": (
        "phi3",
        (),
        [(f"rope_factors_{kind}.weight", np.ones(4, np.float32)) for kind in ("long", "short")],
        "rope_factors_long.weight has 4 numbers, but rope rotates 8 pairs",
    ),
    "a table with zeros": (
        "phi3",
        (),
        [(f"rope_factors_{kind}.weight", np.zeros(8, np.float32)) for kind in ("long", "short")],
        "must contain finite numbers above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_config_states_is_one_line(tmp_path, what):
    name, fields, extra, words = REFUSED[what]
    path = write_family(tmp_path / "tiny.gguf", name, fields=fields, extra=extra)
    with pytest.raises(ValueError) as caught:
        config_of(path)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message


def test_a_tensor_of_another_architecture_keeps_its_name_and_is_refused(tmp_path):
    """Biases exist in Qwen 2 only; llama.cpp runs a Llama with them under the same name."""
    bias = [("blk.0.attn_q.bias", np.zeros(64, np.float32))]
    path = write_family(tmp_path / "tiny.gguf", "qwen3", extra=bias)
    assert "blk.0.attn_q.bias" in pretrained.open_files(str(path)).tensors


def test_a_factor_of_attention_other_than_the_default_is_read(tmp_path):
    fields = [("add_rope_scaling_attn_factors", 1.5)]
    path = write_family(tmp_path / "tiny.gguf", "phi4 mini", fields=fields)
    assert config_of(path)["rope_scaling"]["attention_factor"] == 1.5
    path = write_family(tmp_path / "tiny.gguf", "qwen2 yarn", fields=fields)
    # llama.cpp multiplies YaRN's own factor, 0.1 log(4) + 1, by it
    assert config_of(path)["rope_scaling"]["attention_factor"] == pytest.approx(1.5 * 1.1386294)
    stated = [("add_rope_scaling_yarn_attn_factor", 1.25)]
    path = write_family(tmp_path / "tiny.gguf", "qwen2 yarn", fields=stated)
    assert config_of(path)["rope_scaling"]["attention_factor"] == 1.25
    multiplier = [("add_rope_scaling_yarn_log_mul", 1.0)]
    path = write_family(tmp_path / "tiny.gguf", "qwen2 yarn", fields=multiplier)
    scaling = config_of(path)["rope_scaling"]
    assert (scaling["mscale"], scaling["mscale_all_dim"]) == (1.0, 1.0)
