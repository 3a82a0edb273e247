"""Laws of every file format of quantised weights in the table."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.nn.quant import Quant, quantize, with_defaults
from jaxft.weights.quantised.formats import (
    FILE_FORMATS,
    as_stored,
    dequantised,
    open_tensors,
    quantised_tensors,
    written_format,
)
from jaxft.weights.safetensors import open_safetensors, write_safetensors

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
    assert set(files.shapes) == {"a.weight"} and set(files.quantised["a.weight"].tensors)
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
def test_codes_that_are_no_matrix_are_one_line_with_their_name(tmp_path, name, tensor, settings):
    path = tmp_path / "model.safetensors"
    save_file({tensor: np.zeros((2, 4, 8), np.int32)}, path)
    with pytest.raises(ValueError, match=rf"{tensor} has shape \[2, 4, 8\]; codes of a weight are a matrix$"):
        open_tensors(open_safetensors(tmp_path, [path]), {"quant_method": name, **settings})


def test_a_format_that_is_unknown_or_only_read_is_one_line_that_names_the_others():
    written = ", ".join(dict(WRITTEN))
    for name in ("marlin", "fp8"):
        with pytest.raises(ValueError, match=f"^--format {name}: use one of {written}$"):
            written_format({}, name)
