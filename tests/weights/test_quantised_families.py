"""Quantised checkpoints of every family: logits are those of transformers with the dequantised weights, and
linear layers stay quantised. Rows of QUICK in the default run, the others in the slow one.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from loading_process import one_device
from quantised_folders import SIZES, by_bitsandbytes, by_llm_int8, write_grouped
from tiny_families import FAMILIES, logits_of, random_ids, random_torch, rows
from tiny_llama import write_folder

from jaxft.nn.lora import Adapter, target_paths
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.objectives.sft import sft
from jaxft.train import export, partition
from jaxft.tree import paths
from jaxft.weights import gptq, pretrained

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
    t = partition.partition_params(model, Adapter(rank=2), None, Quant("checkpoint"), str(folder))
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


def packed(folder, out, kind, moments=None):
    """(model, base) of what is written with this kind."""
    source = export.ExportSource(str(folder), pretrained.model_for(str(folder), dtype=jnp.float32), None)
    export.export_model(out, source, "float32", export.ExportQuant(Quant(kind), moments or {}))
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


def test_gptq_uses_the_inputs_of_fused_layers_and_changes_their_outputs_less(phi3, tmp_path):
    theirs, folder = phi3
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    exact, seen = linear_weights(theirs, model), {}

    def look(name):
        return lambda _, x: seen.update({name: x[0].detach().numpy().reshape(-1, x[0].shape[-1])})

    for name, layer in theirs.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(look(name))
    batch = rows(random_ids(8, 40))
    batch = batch.replace(
        read=batch.positions[:, :-1], targets=batch.ids[:, 1:], token_weights=jnp.ones((8, 39))
    )
    theirs(torch.tensor(np.asarray(batch.ids)).long())
    full = pretrained.load_frozen(str(folder), model, one_device())
    moments = gptq.second_moments(
        model, full, list(exact), [batch], lambda params, batch: sft(model)(params, batch, None, {})[0]
    )
    off = {}
    for kind, given in (("nearest", None), ("gptq", moments)):
        _, base = packed(folder, tmp_path / kind, "int4", given)
        values = {path: np.asarray(dequantize(paths(base, is_qtensor)[path])) for path in exact}
        for path, w in exact.items():
            name = model.weight_names[path][0].removesuffix(".weight")
            changes = [seen[name.format(i=i)] @ (values[path][i] - w[i]) for i in range(4)]
            off[path, kind] = np.square(changes).sum()
    for path in exact:
        assert off[path, "gptq"] < 0.8 * off[path, "nearest"], path
