"""NaN and infinite weights, adapters, scales and settings are refused by name when read or written."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from quantised_folders import write_grouped
from safetensors.numpy import load_file, save_file
from scripts_in_process import call
from tiny_llama import edit_config, tiny_torch, write_folder

from jaxft.distributed import sharding
from jaxft.models.families.llama import LlamaConfig
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import init_params
from jaxft.nn.quant import Quant
from jaxft.nn.rope import Rope
from jaxft.optim.optimizer import Optim
from jaxft.weights import pretrained
from jaxft.weights.hf import safetensors
from jaxft.weights.hf.safetensors import TensorToWrite
from jaxft.weights.peft import peft_read, peft_write
from jaxft.weights.tensors import cast_finite, is_finite

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("nonfinite") / "base", tiny_torch())


def broken(base, folder, changes, dtype=None):
    """A copy of a model's folder with single values of some tensors replaced."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: x if dtype is None else x.astype(dtype) for name, x in tensors.items()}
    for name, value in changes.items():
        tensors[name].reshape(-1)[5] = value
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def load(ref, dtype=jnp.bfloat16, quant=None):
    mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
    return pretrained.load_frozen(ref, pretrained.model_for(ref, dtype=dtype), mesh, quant)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [DOWN, NORM, "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named(base, tmp_path, name, value):
    ref = broken(base, tmp_path / "model", {name: value})
    with pytest.raises(ValueError, match=rf"{name}: 1 of \d+ values are NaN or infinite, the first at \["):
        load(ref)


def test_a_folder_whose_name_is_in_the_message_is_named_too(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken(base, tmp_path / "inf", {NORM: np.inf})
    with pytest.raises(ValueError, match=rf"^inf: {NORM}: 1 of \d+ values are NaN or infinite"):
        load("inf")
    (tmp_path / "inf").rename(tmp_path / "whole")
    edit_config(tmp_path / "whole", vocab_size=1.5)
    with pytest.raises(ValueError, match=r"^whole/config.json: config: vocab_size must be a positive whole"):
        load("whole")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("quant", [None, Quant("int8"), Quant("nf4"), Quant("affine4")], ids=str)
def test_16_bit_files_are_checked_whether_they_are_quantised_or_not(base, tmp_path, dtype, quant):
    ref = broken(base, tmp_path / "model", {DOWN: np.inf}, dtype)
    with pytest.raises(ValueError, match=f"{DOWN}: 1 of"):
        load(ref, quant=quant)


def test_a_value_beyond_the_compute_dtype_is_named(base, tmp_path):
    ref = broken(base, tmp_path / "model", {DOWN: 70000.0})
    with pytest.raises(
        ValueError, match=f"{DOWN}: some values are too large for float16, up to 7e.04; use dtype=float32"
    ):
        load(ref, jnp.float16)
    with pytest.raises(ValueError, match="too large for float32, up to 1e.39; use another model"):
        cast_finite(np.array([1.0, 1e39]), np.float32)


def test_scales_of_gptq_and_gguf_files_are_checked(tmp_path):
    folder, _ = write_grouped(tmp_path / "gptq", "gptq")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("up_proj.scales"))
    tensors[name][0, 0] = np.inf
    save_file(tensors, folder / "model.safetensors")
    for quant in (None, Quant("checkpoint")):
        with pytest.raises(ValueError, match=f"{name.removesuffix('scales')}weight: .*NaN or infinite"):
            load(str(folder), quant=quant)
    path = write_gguf(tmp_path / "model.gguf", tiny_torch(), Kind.Q8_0)
    data = bytearray(path.read_bytes())
    data[-34:-32] = np.float16(np.inf).tobytes()  # the scale of the last block of 32
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"weight: \d+ of \d+ values are NaN or infinite"):
        load(str(path))


def test_scales_that_jaxft_wrote_are_checked(base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "packed"
    code, _, err = call(monkeypatch, capsys, "quantize", "--model", base, "--out", out, "--kind", "int8")
    assert code == 0, err
    tensors = load_file(out / "model.safetensors")
    name = next(n for n in tensors if n.endswith("up_proj.weight.scale"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight: its quantisation array 'scale' has NaN"):
        load(str(out), quant=Quant("checkpoint"))


# Adapters


@pytest.fixture(scope="module")
def model(base):
    return pretrained.model_for(str(base), dtype=jnp.float32)


@pytest.fixture
def adapter(base, model, tmp_path):
    """The folder of a fresh adapter."""
    settings = Adapter(rank=4)
    params = init_params(adapter_specs(model.specs, settings), jax.random.key(0))
    peft_write.save_adapter(tmp_path / "adapter", params, settings, model, str(base))
    return tmp_path / "adapter"


def change_adapter(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_adapter_that_is_not_finite_is_named(adapter, model):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    tensors[name][3, 2] = np.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name}: 1 of 384 values are NaN .* first at \[3, 2\]"):
        peft_read.read_adapter(adapter, model)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_alpha": float("inf")}, "and finite numbers"),
        ({"lora_alpha": float("nan")}, "and finite numbers"),
        ({"lora_alpha": 10**400}, "and finite numbers"),
        ({"lora_alpha": 1e39}, "and finite numbers"),
        ({"lora_alpha": 1e-50}, "adapter.alpha must be finite and other than 0 in float32"),
        ({"lora_dropout": float("nan")}, "and finite numbers"),
        ({"alpha_pattern": {"up_proj": float("inf")}}, "alpha_pattern has the value inf for 'up_proj'"),
        ({"alpha_pattern": {"up_proj": "8"}}, "alpha_pattern has the value '8' for 'up_proj'"),
        ({"alpha_pattern": {"(up_proj": 8}}, "alpha_pattern"),
        ({"alpha_pattern": ["up_proj"]}, "alpha_pattern has type list, expected an object"),
        ({"rank_pattern": {"up_proj": float("nan")}}, "rank_pattern has the value nan for 'up_proj'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_of_an_adapter_that_are_not_finite_are_named(adapter, model, changes, message):
    change_adapter(adapter, **changes)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
        peft_read.read_adapter(adapter, model)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; expected a finite number above"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
            "rope_theta[ =].*(must be a finite|expected)",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
            "rope_theta[ =].*(must be a finite|expected)",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "rope_theta[ =].*(must be a finite|expected)",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e-300}}, "rope's angles are not finite"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": float("nan")}},
            "factor of rope_parameters must be a finite number",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_of_a_model_that_are_not_finite_are_named(base, tmp_path, changes, message):
    shutil.copytree(base, tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        pretrained.model_for(str(tmp_path / "model"))


def test_rope_scaling_with_an_infinite_factor_is_refused():
    with pytest.raises(ValueError, match="low_freq_factor must be above 0 and below high_freq_factor"):
        Rope(kind="llama3", factor=8.0, original_max_positions=8192, high_freq_factor=float("inf"))
    fine = LlamaConfig(vocab=8, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp=8)
    assert replace(fine, rope=Rope(kind="linear", factor=1e-3)).rope.factor == 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": float("inf")}, {"eps": float("nan")}, {"eps": 1e-50}, {"clip": float("nan")},
        {"clip": float("inf")}, {"lr_groups": ((".*", float("inf")),)},
        {"lr_groups": ((".*", float("nan")),)}, {"weight_decay": float("nan")}, {"lr": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_an_optimizer_that_are_not_finite_are_refused(settings):
    with pytest.raises(ValueError, match=f"optim.{next(iter(settings))}"):
        Optim(**settings)


# Writing


def test_nothing_that_is_not_finite_is_written(tmp_path):
    value = np.ones((4, 4), np.float32)
    fine = TensorToWrite("fine", value.dtype, value.shape, lambda: value)
    wrong = value.copy()
    wrong[1, 2] = np.inf
    bad = TensorToWrite("bad", value.dtype, value.shape, lambda: wrong)
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"x\.safetensors: not written: tensor bad: 1 of 16 .* \[1, 2\]"):
        safetensors.write_safetensors(path, [fine, bad])
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_weights_that_overflow_the_dtype_they_are_written_in(
    base, tmp_path, monkeypatch, capsys
):
    ref = broken(base, tmp_path / "model", {DOWN: 1e5})
    argv = ["export", "--model", ref, "--out", tmp_path / "out", "--dtype", "float16"]
    code, _, err = call(monkeypatch, capsys, *argv)
    assert code == 1 and f"tensor {DOWN}: 1 of 6144 values are NaN or infinite" in err
    assert err.count("\n") == 1 and not list((tmp_path / "out").glob("*.safetensors*"))


def test_export_refuses_an_adapter_whose_product_overflows(
    base, model, adapter, tmp_path, monkeypatch, capsys
):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: np.full_like(x, 1e20) for name, x in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    out = tmp_path / "out"
    code, _, err = call(monkeypatch, capsys, "export", "--model", base, "--adapter", adapter, "--out", out)
    assert code == 1 and "not written: tensor model.layers.0." in err and not list(out.glob("*.safetensors*"))


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e5m2]
)
def test_is_finite_is_that_of_numpy_for_every_float(dtype):
    size = min(2, np.dtype(dtype).itemsize)
    bits = np.arange(256**size, dtype=f"u{size}")
    x = bits.view(dtype) if np.dtype(dtype).itemsize == size else bits.astype(dtype)
    for value in x if size == 1 else [*x[:: 256 // 16], *x[0x7BF0:0x7C10], *x[0x7F70:0x7F90], *x[-3:]]:
        assert is_finite(np.array([value])) == np.isfinite(np.float64(value))
    assert is_finite(x[:0])
    for value in (np.nan, np.inf, -np.inf):
        assert not is_finite(np.array([[1.0, value]], dtype).T)
    wide = np.array([[1.0, float(ml_dtypes.finfo(dtype).max)]], dtype)
    assert is_finite(wide) and is_finite(np.arange(3))
