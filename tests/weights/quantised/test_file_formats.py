"""Laws of every file format of quantised weights in the table."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_experts
from safetensors.numpy import save_file
from test_tensors import expert_model

from jaxft.nn.quant import Quant, quantize, with_defaults
from jaxft.nn.tensor_names import TensorName
from jaxft.train.export.export import ExportQuant, layer_quantizer
from jaxft.weights.edit.merged_weights import RoundingError
from jaxft.weights.hf.safetensors import open_safetensors, write_safetensors
from jaxft.weights.quantised.quantised_checkpoints import (
    FILE_FORMATS,
    as_stored,
    dequantised,
    open_tensors,
    quantised_tensors,
    written_format,
)
from jaxft.weights.tensors import tensors_of

WRITTEN = [(format.name, kind) for format in FILE_FORMATS.values() for kind in format.kinds]


@pytest.mark.parametrize("name, kind", WRITTEN)
def test_a_format_opens_what_it_writes_with_the_same_values(tmp_path, name, kind):
    format, (block, double) = FILE_FORMATS[name], with_defaults(kind, None, None)
    weight = np.random.default_rng(0).normal(size=(192, 24)).astype(np.float32)
    q, _ = as_stored(quantize(weight, kind), format, "a.weight")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, quantised_tensors("a.weight", q, lambda: q, name))
    config = json.loads(json.dumps(format.config(Quant(kind, block, double), [], [])))
    files = open_tensors(open_safetensors(tmp_path, [path]), {"quant_method": name, **config})
    assert set(files.tensors) == {"a.weight"} and set(files.quantised["a.weight"].tensors)
    values = dequantised(q).T
    np.testing.assert_array_equal(files.read("a.weight"), values)
    for part in ((slice(8, 16),), (slice(0, 24), slice(64, 128)), (slice(3, 5), slice(70, 75))):
        np.testing.assert_array_equal(files.read("a.weight", part), values[part])


@pytest.mark.parametrize(
    "name, tensor, settings",
    [
        ("gptq", "a.qweight", {"bits": 4, "group_size": 32}),
        ("awq", "a.qweight", {"bits": 4, "group_size": 32}),
        ("jaxft", "a.weight.codes", {"kind": "nf4", "block": 64, "double": False}),
    ],
)
def test_codes_that_are_no_matrix_or_no_codes_are_one_line_with_their_name(tmp_path, name, tensor, settings):
    path, kind = tmp_path / "model.safetensors", "uint8" if name == "jaxft" else "int32"
    for wrong in (np.zeros((2, 4, 8), kind), np.zeros(8, kind), np.zeros((8, 16), np.float32)):
        save_file({tensor: wrong}, path)
        shown = (
            rf"{tensor} is {wrong.dtype}\[.*\], expected a matrix of {kind}, the codes of a quantised "
            "weight; download the model again$"
        )
        with pytest.raises(ValueError, match=shown):
            open_tensors(open_safetensors(tmp_path, [path]), {"quant_method": name, **settings})


def test_a_format_that_is_unknown_or_only_read_is_one_line_that_names_the_others():
    written = ", ".join(dict(WRITTEN))
    for name in ("marlin", "fp8"):
        with pytest.raises(ValueError, match=f"^--format {name} cannot be written; use one of {written}$"):
            written_format({}, name)


EXCLUDES = {  # whether a program skips a module, by how it reads quantization_config
    # GPTQModel's dynamic_get and vLLM's get_dynamic_override
    ("gptq", "int4"): lambda q, name: any(re.match(key[2:], name) for key in q["dynamic"]),
    # vLLM's is_layer_skipped with substrings; transformers compares starts and ends
    ("awq", "int4"): lambda q, name: any(key in name for key in q["modules_to_not_convert"]),
    # compressed-tensors' match_name
    ("compressed-tensors", "int4"): lambda q, name: any(
        re.match(key[3:], name) if key.startswith("re:") else key == name for key in q["ignore"]
    ),
    # vLLM's is_layer_skipped_bnb: a part of the name, or all of it
    ("bitsandbytes", "nf4"): lambda q, name: bool({*name.split("."), name} & set(q["llm_int8_skip_modules"])),
}


@pytest.mark.parametrize("format, kind", EXCLUDES)
def test_programs_skip_the_modules_that_are_not_quantised_and_no_others(format, kind):
    """The router's name is the start of a quantised one's, and a dense MLP has the last name of experts."""
    dense = TensorName("model.layers.{i}.shared_mlp.down_proj.weight", True)
    model = tiny_experts.experts(tiny_experts.CONFIG)
    model = replace(model, weight_names=model.weight_names | {"layers/attn/o": dense})
    quant = Quant(kind, 8, None, targets="layers/mlp/experts/.*")
    settings = layer_quantizer(model, ExportQuant(quant, format), RoundingError()).settings
    kernels = [x for tensors in tensors_of(model, tied_head=True).values() for x in tensors if x.is_kernel]
    modules = [x.module for x in kernels if x.module != "lm_head"]  # which has settings of its own
    skipped = {name for name in modules if EXCLUDES[format, kind](settings, name)}
    assert skipped == {name for name in modules if ".experts." not in name}


@pytest.mark.parametrize("style", ["a tensor for all experts", "gate and up in one tensor"])
def test_experts_in_one_tensor_are_not_written_quantised(style):
    model, quant = expert_model(style), Quant("nf4", 8, False, targets="layers/mlp/gate")
    with pytest.raises(
        ValueError, match=r"^layers/mlp/gate: .* one linear layer can .* but model\.layers\.0\.mlp"
    ):
        layer_quantizer(model, ExportQuant(quant), RoundingError())
