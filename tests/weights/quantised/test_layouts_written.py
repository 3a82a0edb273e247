"""int4 and int8 weights in the layouts of GPTQ, AWQ and compressed-tensors: decoded by their definitions,
read again without rounding, and loaded by compressed-tensors itself.
"""

import copy
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from quantised_folders import SIZES, is_linear
from safetensors.numpy import load_file
from scripts_in_process import call
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits, write_folder

from jaxft.nn.quant import Quant
from jaxft.train.export.export import ExportQuant, ExportSource, export_model
from jaxft.weights import pretrained

torch = pytest.importorskip("torch")
CASES = [
    ("gptq", "int4"),
    ("awq", "int4"),
    ("compressed-tensors", "int4"),
    ("compressed-tensors", "int8"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model's folder, and the model."""
    reference = tiny_torch(num_hidden_layers=1, **SIZES)
    return write_folder(tmp_path_factory.mktemp("base"), reference), reference


def nibbles(words, axis, order=range(8)):
    """The 4-bit numbers of int32 words; order[i]: where the i-th lowest is among its eight."""
    wide = np.moveaxis(words.astype(np.int64) & 0xFFFFFFFF, axis, -1)
    out = np.zeros((*wide.shape, 8), np.int64)
    for i, at in enumerate(order):
        out[..., at] = (wide // 16**i) % 16
    return np.moveaxis(out.reshape(*wide.shape[:-1], 8 * wide.shape[-1]), -1, axis)


def decoded(tensors, stem, method, kind):
    """(values [out, in], scale of each) by the method's own definition."""
    get = {name.removeprefix(stem): x for name, x in tensors.items() if name.startswith(stem)}
    if method == "gptq":
        scale = get["scales"].astype(np.float64)[get["g_idx"]]
        zeros = (nibbles(get["qzeros"], 1) + 1)[get["g_idx"]]
        return ((nibbles(get["qweight"], 0) - zeros) * scale).T, scale.T
    if method == "awq":
        order, rows = (0, 2, 4, 6, 1, 3, 5, 7), np.arange(len(get["qweight"])) // 64
        scale = get["scales"].astype(np.float64)[rows]
        zeros = nibbles(get["qzeros"], 1, order)[rows]
        return ((nibbles(get["qweight"], 1, order) - zeros) * scale).T, scale.T
    codes = get["weight"].astype(np.int64) if kind == "int8" else nibbles(get["weight_packed"], 1) - 8
    assert kind == "int8" or tuple(get["weight_shape"]) == codes.shape
    scale = get["weight_scale"].astype(np.float64)
    scale = np.repeat(scale, codes.shape[1] // scale.shape[1], 1)
    return codes * scale, scale


def export(monkeypatch, capsys, *args):
    code, out, err = call(monkeypatch, capsys, "export", *args)
    assert code == 0, err
    return out


@pytest.mark.parametrize("method, kind", CASES)
def test_values_are_those_of_the_layouts_definition_and_are_read_unchanged(
    base, tmp_path, monkeypatch, capsys, method, kind
):
    folder, reference = base
    out = export(monkeypatch, capsys, "--model", folder, "--out", tmp_path / "q", "--pack", kind, "--format",
                 method, "--dtype", "float32")  # fmt: skip
    package = {"gptq": "gptqmodel", "awq": "gptqmodel"}.get(method, method)
    assert f"layout, which vLLM loads, and transformers with {package}" in out
    tensors, files = (
        load_file(tmp_path / "q" / "model.safetensors"),
        pretrained.open_files(str(tmp_path / "q")),
    )
    weights = [name for name, _ in reference.named_parameters() if is_linear(name)]
    assert set(files.quantised) == set(weights)
    for name in weights:
        values, scale = decoded(tensors, name.removesuffix("weight"), method, kind)
        exact = reference.get_parameter(name).detach().numpy()
        assert (np.abs(values - exact) <= scale * 0.5000001).all()  # rounded to nearest
        np.testing.assert_array_equal(files.read(name), values.astype(np.float32))
    model = pretrained.model_for(str(tmp_path / "q"), dtype=jnp.float32)
    params = load_on_host(str(tmp_path / "q"), model, lambda path, x: jnp.asarray(x))
    reference = copy.deepcopy(reference)
    with torch.no_grad():
        for name in weights:
            reference.get_parameter(name).copy_(torch.tensor(np.asarray(files.read(name))))
    np.testing.assert_allclose(
        our_logits(model, params, some_tokens()), torch_logits(reference, some_tokens()), atol=1e-4
    )


@pytest.mark.parametrize(
    "sizes, args, words",
    [
        ({}, ("--pack", "nf4", "--format", "gptq"), "gptq: it stores int4, and these weights are nf4"),
        ({}, ("--pack", "int8", "--format", "awq"), "awq: it stores int4, and these weights are int8"),
        (
            dict(intermediate_size=96),
            ("--pack", "int4", "--format", "gptq"),
            "does not divide the 96 inputs of layers/mlp/down",
        ),
        ({}, ("--format", "gptq"), "add --pack int4"),
    ],
)
def test_a_layout_that_cannot_have_the_weights_is_one_line(tmp_path, monkeypatch, capsys, sizes, args, words):
    folder = write_folder(tmp_path / "base", tiny_torch(num_hidden_layers=1, **{**SIZES, **sizes}))
    code, _, err = call(monkeypatch, capsys, "export", "--model", folder, "--out", tmp_path / "q", *args)
    assert code and words in err.splitlines()[-1] and not (tmp_path / "q").exists(), err


def test_gptqs_config_says_whether_the_head_is_quantised(base, tmp_path, monkeypatch, capsys):
    options = ("--model", base[0], "--kind", "int4", "--targets", "layers/attn/q|head")
    for targets in ("layers/attn/q|head", "layers/attn/q"):
        out = tmp_path / str(len(targets))
        args = (*options[:-1], targets, "--format", "gptq", "--out", out)
        code, _, err = call(monkeypatch, capsys, "quantize", *args)
        assert code == 0, err
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        written = "lm_head.qweight" in load_file(out / "model.safetensors")
        assert settings["lm_head"] is written is ("head" in targets)
        assert settings["modules_in_block_to_quantize"] == [["self_attn.q_proj"]]
    args = (*options, "--format", "awq", "--out", tmp_path / "awq")
    code, _, err = call(monkeypatch, capsys, "quantize", *args)
    assert code == 1 and "leave the head out" in err.splitlines()[-1] and not (tmp_path / "awq").exists()


def test_the_printed_error_is_that_of_scales_in_float16(base, tmp_path, monkeypatch, capsys):
    """Weights so small that a scale is two or three steps of float16, 2^-24."""
    reference = copy.deepcopy(base[1])
    names = [name for name, _ in reference.named_parameters() if is_linear(name)]
    with torch.no_grad():
        for name in names:
            reference.get_parameter(name).mul_(2e-6)
    folder = write_folder(tmp_path / "base", reference)
    options = ("--pack", "int4", "--format", "gptq")
    out = export(monkeypatch, capsys, "--model", folder, "--out", tmp_path / "q", *options)
    files, error, total = pretrained.open_files(str(tmp_path / "q")), 0.0, 0.0
    for name in names:
        exact = reference.get_parameter(name).detach().double().numpy()
        error, total = error + np.square(files.read(name) - exact).sum(), total + np.square(exact).sum()
    printed = float(re.search(r"quantisation changed these by ([\d.]+) %", out)[1])
    assert printed == pytest.approx(100 * (error / total) ** 0.5, rel=1e-3) and printed > 12
    assert "too small for float16" in out and "--format compressed-tensors" in out
    out = export(monkeypatch, capsys, "--model", base[0], "--out", tmp_path / "p", *options)
    assert "warning" not in out


def test_calibrated_codes_go_into_gptqs_layout(base, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"a{i}", "completion": "b" * 40}) + "\n" for i in range(40))
    )
    options = ("--model", base[0], "--kind", "int4", "--calibrate", rows, "--tokens", 256, "--targets",
               "layers/attn/[qo]")  # fmt: skip
    for method in ("gptq", "jaxft"):
        code, _, err = call(monkeypatch, capsys, "quantize", *options, "--max-length", 64, "--format", method,
                            "--out", tmp_path / method)  # fmt: skip
        assert code == 0, err
    first, second = (pretrained.open_files(str(tmp_path / method)) for method in ("gptq", "jaxft"))
    for name in first.quantised:
        np.testing.assert_array_equal(first.read(name), second.read(name))


READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False))
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    print(json.dumps(model(ids).logits.float().tolist()))
"""


def rounded_matrix(x):
    """The matrices of all layers [L, in, out] rounded to bfloat16; norms [L, width] as they are."""
    return x.astype(jnp.bfloat16).astype(jnp.float32) if x.ndim == 3 else x


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_transformers_and_compressed_tensors_load_what_is_written(
    base, tmp_path_factory, tmp_path, monkeypatch, capsys, kind
):
    target = tmp_path_factory.getbasetemp() / "compressed-tensors"
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, "compressed-tensors", "loguru"], check=True)
    export(monkeypatch, capsys, "--model", base[0], "--out", tmp_path / "q", "--pack", kind, "--format",
           "compressed-tensors", "--dtype", "float32")  # fmt: skip
    ids = some_tokens().ids
    command = [sys.executable, "-c", READ, str(tmp_path / "q"), json.dumps(np.asarray(ids).tolist())]
    done = subprocess.run(command, env={"PYTHONPATH": str(target), "PATH": "/usr/bin"}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    model = pretrained.model_for(str(tmp_path / "q"), dtype=jnp.float32)
    params = load_on_host(str(tmp_path / "q"), model, lambda path, x: jnp.asarray(x))
    if kind == "int4":  # its scales are bfloat16, and transformers multiplies in the scales' dtype
        params["layers"] = jax.tree.map(rounded_matrix, params["layers"])
    expected = our_logits(model, params, some_tokens())
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), expected, atol=1e-4)


READ_BY_GPTQMODEL = """
import json, sys, torch
from transformers import AutoModelForCausalLM
with open(sys.argv[1] + "/ids.json") as file:
    ids = torch.tensor(json.load(file))
found = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1] + "/" + name, dtype=torch.float32, device_map={"": "cpu"})
    packed = [n for n, x in model.named_modules() if hasattr(x, "qweight")]
    with torch.no_grad():
        found[name] = packed, model(ids).logits.float().tolist()
with open(sys.argv[1] + "/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_transformers_and_gptqmodel_compute_the_same_logits_from_gptq_and_awq_folders(base, tmp_path):
    """GPTQModel's kernels for CPUs, on the packed weights. GPTQMODEL_PYTHON: the Python of an environment
    that has it, if it is not this one.
    """
    python = os.environ.get("GPTQMODEL_PYTHON", sys.executable)
    packages = [python, "-c", "import gptqmodel, optimum"]
    if subprocess.run(packages, env={"PATH": "/usr/bin"}, capture_output=True, check=False).returncode:
        pytest.skip(f"{python}: BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel optimum")
    model = pretrained.model_for(str(base[0]), dtype=jnp.float32)
    source = ExportSource(str(base[0]), model, pretrained.load_tokenizer(str(base[0])))
    counts, expected, tokens = {}, {}, some_tokens()
    for method in ("gptq", "awq"):
        for name, block, targets, count in [
            ("all", 32, "layers/.*", 7),
            ("some", 64, "layers/attn/[qko]", 3),
        ]:
            folder = tmp_path / f"{method}-{name}"
            quant = Quant("int4", block, targets=targets)
            export_model(folder, source, "float32", ExportQuant(quant, method))
            params = load_on_host(str(folder), model, lambda path, x: jnp.asarray(x))
            counts[folder.name], expected[folder.name] = count, our_logits(model, params, tokens)
    (tmp_path / "ids.json").write_text(json.dumps(np.asarray(tokens.ids).tolist()))
    command = [python, "-c", READ_BY_GPTQMODEL, str(tmp_path), *counts]
    done = subprocess.run(command, env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (packed, logits) in json.loads((tmp_path / "found.json").read_text()).items():
        assert len(packed) == counts[name], name
        np.testing.assert_allclose(np.array(logits), expected[name], atol=1e-4, err_msg=name)
