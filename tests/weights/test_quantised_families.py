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

from jaxft.nn.lora import Adapter, target_paths
from jaxft.nn.quant import Quant, is_qtensor
from jaxft.train import partition
from jaxft.tree import paths
from jaxft.weights import pretrained

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


@pytest.mark.parametrize("name, method", CASES)
def test_a_quantised_folder_has_the_logits_of_its_dequantised_weights(name, method, tmp_path):
    folder, reference = METHODS[method](tmp_path, partial(random_torch, name))
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    t = partition.partition_params(model, Adapter(rank=2), None, Quant("checkpoint"), str(folder))
    base = pretrained.load_base(str(folder), t.stored, one_device())
    packed = {path for path, leaf in paths(base, is_qtensor).items() if is_qtensor(leaf)}
    assert packed == set(target_paths(model.specs, "all-linear"))
    assert pretrained.storage_changes(str(folder), t.stored) == []
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = reference(torch.tensor(ids).long()).logits.numpy()
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(logits_of(model, base, rows(ids)), expected, atol=2e-4)
