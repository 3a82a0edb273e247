"""AWQ: 4-bit codes along the outputs, scales and zeros per group of inputs; read and, symmetric, written."""

from functools import partial

import numpy as np

from jaxft.weights.hf.safetensors import SafetensorsFiles
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.quantised.grouped_int4 import Grouping, group_size, read_grouped, variant, write_grouped
from jaxft.weights.tensors import QuantisedTensor

GROUPING = Grouping(axis=1, order=(0, 2, 4, 6, 1, 3, 5, 7))


def _open(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    variant(files.where, settings, ("version", "format", "checkpoint_format"), ("gemm",))
    group = group_size(files.where, settings)

    def weight(stem: str) -> QuantisedTensor:
        ins, columns = ff.matrix_shape(files, f"{stem}.qweight", np.int32)
        layout = ff.block_layout("affine4", (ins, 8 * columns), group, np.float16, np.float32)
        tensors = [f"{stem}.{tensor}" for tensor in ("qweight", "qzeros", "scales")]
        return ff.quantised_tensor(
            "awq", tensors, layout, partial(read_grouped, files, stem, layout, GROUPING)
        )

    return {f"{stem}.weight": weight(stem) for stem in ff.stems(files, ".qweight")}


AWQ = ff.FileFormat(
    "awq",
    _open,
    kinds=("int4",),
    summary="AWQ's layout, which vLLM loads, and transformers with gptqmodel (autoawq before transformers 5) "
    "installed",
    write=partial(write_grouped, how=GROUPING),
    config=lambda quant, plain, packed: {
        "bits": 4,
        "group_size": quant.block or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": plain,
    },
    scale_dtype=np.float16,
    with_head=False,
    int4_multiples=(8, 8),
)
