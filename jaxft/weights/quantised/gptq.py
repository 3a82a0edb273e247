"""GPTQ: 4-bit codes along the inputs, scales and zeros per group of inputs; read and, symmetric, written."""

import re
from functools import partial
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor, Quant
from jaxft.weights.hf.safetensors import SafetensorsFiles, read_tensor
from jaxft.weights.model_files import Index, QuantisedTensor
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.quantised.grouped_int4 import Grouping, group_size, read_grouped, variant, write_grouped

ZEROS_LESS_1 = Grouping(axis=0, shift=1)


def _open(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    """Zeros are stored less 1, except in gptq_v2. With sym=true all of them are 8, which is int4; others are
    affine4. With desc_act the files have the group of each input.
    """
    version = variant(files.where, settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    how = ZEROS_LESS_1 if version == "gptq" else Grouping(axis=0)
    group = group_size(files.where, settings)
    kind, offset_dtype = ("int4", None) if settings.get("sym", True) else ("affine4", np.float32)
    indexed = bool(settings.get("desc_act", False) and group)

    def weight(stem: str) -> QuantisedTensor:
        rows, outs = ff.matrix_shape(files, f"{stem}.qweight", np.int32)
        layout = ff.block_layout(kind, (8 * rows, outs), group, np.float16, offset_dtype, indexed)
        tensors = [f"{stem}.{tensor}" for tensor in ("qweight", "qzeros", "scales", "g_idx")]
        return ff.quantised_tensor("gptq", tensors, layout, partial(_decode, files, stem, layout, how))

    return {f"{stem}.weight": weight(stem) for stem in ff.stems(files, ".qweight")}


def _decode(
    files: SafetensorsFiles, stem: str, layout: QTensor, how: Grouping, index: Index
) -> dict[str, Any]:
    ins, blocks, name = layout.shape[0], layout.scale.shape[0], f"{stem}.g_idx"
    in_order = np.arange(ins, dtype=np.int32) // (layout.block or ins)
    groups = read_tensor(files, name, (), (ins,)) if name in files.tensors else in_order
    if groups.min() < 0 or groups.max() >= blocks:
        raise ValueError(
            f"{files.where}: {name} has groups {groups.min()} to {groups.max()}, but there are {blocks}"
        )
    if layout.index is None and not np.array_equal(groups, in_order):
        raise ValueError(
            f"{files.where}: {name} is not in order, which requires desc_act=true in quantization_config"
        )
    arrays = read_grouped(files, stem, layout, how, index)
    return arrays if layout.index is None else {**arrays, "index": groups}


def _write(name: str, layout: QTensor) -> list[ff.WrittenTensor]:
    ins, index = layout.shape[0], f"{name.removesuffix('weight')}g_idx"
    groups = ff.WrittenTensor(
        index, np.int32, (ins,), lambda q: np.arange(ins, dtype=np.int32) // (q.block or ins)
    )
    return [*write_grouped(name, layout, ZEROS_LESS_1), groups]


def _config(quant: Quant, plain: list[str], packed: list[str]) -> ff.QuantConfig:
    """GPTQModel and vLLM read the exceptions in `dynamic`, transformers (optimum) in
    modules_in_block_to_quantize.
    """
    names = [name for name in plain if name != "lm_head"]
    skipped: dict[str, Any] = {
        f"-:{re.escape(name)}$" if "." in name else f"-:.*\\.{name}$": {} for name in names
    }
    return {
        "bits": 4,
        "group_size": quant.block or -1,
        "sym": True,
        "desc_act": False,
        "lm_head": "lm_head" not in plain,
        "checkpoint_format": "gptq",
        **({"dynamic": skipped, "modules_in_block_to_quantize": [packed]} if skipped else {}),
    }


GPTQ = ff.FileFormat(
    "gptq",
    _open,
    kinds=("int4",),
    summary="GPTQ's layout, which vLLM loads, and transformers with gptqmodel and optimum installed",
    head_summary="GPTQ's layout, which vLLM loads, but transformers not: it leaves out a quantised head",
    write=_write,
    config=_config,
    scale_dtype=np.float16,
    int4_multiples=(8, 8),
)
