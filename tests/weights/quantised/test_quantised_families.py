"""Quantised checkpoints of every family: logits are those of transformers with the dequantised weights, and
linear layers stay quantised.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading_process import one_device
from quantised_folders import SIZES, by_bitsandbytes, by_llm_int8, write_grouped
from tiny_families import FAMILIES, logits_of, random_ids, random_torch, rows
from tiny_llama import write_folder

from jaxft.nn.adapters.lora import Adapter, target_paths
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.nn.tree import paths
from jaxft.train import trainable_params
from jaxft.train.export import export
from jaxft.weights import pretrained
from jaxft.weights.edit.calibrated_base import CalibrationRows, calibrate_layers, write_codes

torch = pytest.importorskip("torch")

QUICK = {
    ("phi3 with a window", "awq"),
    ("qwen2", "nf4"),
    ("qwen2", "gptq"),
    ("qwen2", "awq"),
    ("qwen2", "int8"),
    ("mistral", "gptq"),
}


def by_nf4(folder, make):
    """(folder, torch model with the dequantised weights) of a model that bitsandbytes has packed."""
    folder, dequantised = by_bitsandbytes(folder, "nf4", True, make, exact=True)
    reference = make(**SIZES)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(torch.tensor(dequantised[name]) if name in dequantised else p.bfloat16())
    return folder, reference


METHODS = {
    "nf4": by_nf4,
    "int8": by_llm_int8,
    "gptq": lambda folder, make: write_grouped(folder, "gptq", ordered=True, make=make),
    "awq": lambda folder, make: write_grouped(folder, "awq", version="gemm", make=make),
}
CASES = [
    pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for method in METHODS
]


def stored(folder):
    """(model, base) of a folder whose linear layers are all stored as its files store them."""
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    t = trainable_params.partition_params(model, Adapter(rank=2), None, Quant("checkpoint"), str(folder))
    base = pretrained.load_base(str(folder), t.stored, one_device())
    packed = {path for path, leaf in paths(base, is_qtensor).items() if is_qtensor(leaf)}
    assert packed == set(target_paths(model.specs, "all-linear"))
    assert pretrained.storage_changes(str(folder), t.stored) == []
    return model, base


@pytest.mark.parametrize("name, method", CASES)
def test_a_quantised_folder_has_the_logits_of_its_dequantised_weights(name, method, tmp_path):
    folder, reference = METHODS[method](tmp_path, partial(random_torch, name))
    model, base = stored(folder)
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long()).logits.numpy()
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(logits_of(model, base, rows(ids)), expected, atol=2e-4)


# Writing models with fused layers (Phi-3: attn/qkv and mlp/gate_up), as export.py --pack and quantize.py do.


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    """(transformers model, its folder)."""
    theirs = random_torch("phi3 with a window", **SIZES)
    return theirs, write_folder(tmp_path_factory.mktemp("phi3"), theirs)


def packed(folder, out, kind, codes=None):
    """(model, base) of what is written with this kind."""
    source = export.ExportSource(str(folder), pretrained.model_for(str(folder), dtype=jnp.float32), None)
    quant = Quant(kind, calibrate=codes and "some rows", codes=codes)
    export.export_model(out, source, "float32", export.ExportQuant(quant))
    return stored(out)


def linear_weights(theirs, model):
    """{path: weights [L, in, out] of a transformers model} of all linear layers."""
    named = dict(theirs.named_parameters())
    return {
        path: np.stack([named[model.weight_names[path][0].format(i=i)].detach().numpy().T for i in range(4)])
        for path in target_paths(model.specs, "all-linear")
    }


def test_int8_weights_of_fused_layers_are_within_half_a_step_of_the_exact_ones(phi3, tmp_path):
    theirs, folder = phi3
    model, base = packed(folder, tmp_path / "int8", "int8")
    for path, exact in linear_weights(theirs, model).items():
        step = np.abs(exact).max(1, keepdims=True) / 127  # of each column
        error = np.abs(np.asarray(dequantize(paths(base, is_qtensor)[path])) - exact)
        assert (error <= 0.501 * step).all() and error.any(), path


@pytest.mark.slow
def test_nf4_weights_of_fused_layers_have_the_same_values_in_transformers(phi3, tmp_path):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    theirs, folder = phi3
    model, base = packed(folder, tmp_path / "nf4", "nf4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16, device_map="cpu")
    for path in linear_weights(theirs, model):
        module = model.weight_names[path][0].removesuffix(".weight")
        for i in range(4):
            w = loaded.get_submodule(module.format(i=i)).weight
            w.quant_state.dtype = torch.float32
            expected = dequantize_4bit(w.data, w.quant_state).numpy().T
            found = np.asarray(dequantize(paths(base, is_qtensor)[path])[i])
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=path)


@pytest.mark.slow
def test_calibration_of_fused_layers_and_windows_brings_the_model_closer_to_the_exact_one(
    phi3, tmp_path, monkeypatch
):
    _, folder = phi3
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    model, batch = pretrained.model_for(str(folder), dtype=jnp.float32), rows(random_ids(8, 40))
    arrays = [np.asarray(x, np.int32) for x in (batch.ids, batch.segments, batch.positions)]
    calibration = CalibrationRows(*arrays)
    readers = pretrained.open_params(str(folder), model)
    with jax.set_mesh(one_device()):
        written = write_codes(
            "some", Quant("int4"), lambda: calibrate_layers(model, readers, Quant("int4"), calibration, {})
        )
        assert list(written) == list(range(1, model.config.layers + 1))
    exact = logits_of(model, pretrained.load_frozen(str(folder), model, one_device()), batch)
    off = {}
    for name, codes in (("nearest", None), ("calibrated", "some")):
        found = logits_of(*packed(folder, tmp_path / name, "int4", codes), batch)
        off[name] = np.square(np.asarray(found) - np.asarray(exact)).mean()
    assert off["calibrated"] < 0.6 * off["nearest"]
