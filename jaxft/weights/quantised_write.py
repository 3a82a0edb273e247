"""Write quantised weights: in the layouts of bitsandbytes, compressed-tensors, GPTQ and AWQ, which
transformers and vLLM load, or as jaxft's own arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor, Quant
from jaxft.weights.bitsandbytes import tensors_of_4bit
from jaxft.weights.compressed_tensors_write import compressed_settings, tensors_of_compressed
from jaxft.weights.gptq_awq import (
    awq_settings,
    gptq_settings,
    tensors_of_awq,
    tensors_of_gptq,
    with_float16_scales,
)
from jaxft.weights.quant_layout import array_names
from jaxft.weights.safetensors import TensorToWrite

KINDS_OF: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("nf4", "fp4"),
    "compressed-tensors": ("fp8", "int8", "int4"),
    "gptq": ("int4",),
    "awq": ("int4",),
    "jaxft": ("int8", "fp8", "int4", "nf4", "fp4", "affine4"),
}
USUAL_LAYOUTS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "fp8": "compressed-tensors"}
POSSESSIVES = {"bitsandbytes": "bitsandbytes'", "compressed-tensors": "compressed-tensors'", "gptq": "GPTQ's",
         "awq": "AWQ's"}  # fmt: skip
PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
            "gptq": "gptqmodel and optimum", "awq": "gptqmodel (autoawq before transformers 5)"}  # fmt: skip
OWN_LAYOUT = "jaxft's own layout (quant=checkpoint reads it; transformers and vLLM do not)"


def method_for(layouts: Mapping[str, QTensor], requested: str | None = None) -> tuple[str, str]:
    """Return the quantisation method whose layout is written, and one sentence for the user.

    Without a requested one it is "compressed-tensors" for fp8, "bitsandbytes" for nf4 and fp4 if their flat
    blocks divide the inputs of every weight; else "jaxft". layouts: by parameter path. Raises ValueError if
    the requested layout cannot have these weights.
    """
    kinds = {q.kind for q in layouts.values()}
    method = requested or (USUAL_LAYOUTS.get(kinds.pop(), "jaxft") if len(kinds) == 1 else "jaxft")
    if method == "jaxft":
        return method, OWN_LAYOUT
    wrong = _misfit(layouts, method)
    if wrong and requested:
        raise ValueError(f"--format {method}: {wrong}")
    if wrong:
        return "jaxft", f"warning: {OWN_LAYOUT} and not {POSSESSIVES[method]}, because {wrong}"
    if method == "gptq" and "head" in layouts:
        return method, "GPTQ's layout, which vLLM loads, but transformers not: it leaves out a quantised head"
    return method, (
        f"{POSSESSIVES[method]} layout, which vLLM loads, and transformers with {PACKAGES[method]} installed"
    )


def _misfit(layouts: Mapping[str, QTensor], method: str) -> str:
    """Say why weights do not fit into a layout; "" if they do."""
    for path, q in layouts.items():
        ins, outs = q.shape[-2:]
        if q.kind not in KINDS_OF[method]:
            return f"its weights are {' or '.join(KINDS_OF[method])}, not {q.kind}; choose one of these"
        if ins % (q.block or ins):
            return f"{path} has {ins} inputs, which are not a multiple of the block size {q.block}"
        if path == "head" and method == "awq":
            return "transformers loads no quantised head in AWQ's layout; leave the head out of the targets"
        if q.kind == "int4" and (ins % 8 or (outs % 8 and method != "compressed-tensors")):
            return f"{path} has {ins} inputs and {outs} outputs, and eight codes share an int32"
    return ""


def packed_tensors(
    name: str, layout: QTensor, make: Callable[[], QTensor], method: str
) -> list[TensorToWrite]:
    """Return the tensors of the weight `name` in the layout of `method`, see `method_for`.

    make: returns the weight on the host in this layout. It is called once, when the first of the tensors is
    written.
    """
    once = _Once(make, len(array_names(layout)))
    if method in LAYOUT_WRITERS:
        return LAYOUT_WRITERS[method](name, layout, once)
    return [_array_to_write(name, array, layout, once) for array in array_names(layout)]


LAYOUT_WRITERS: dict[str, Callable[[str, QTensor, Callable[[], QTensor]], list[TensorToWrite]]] = {
    "bitsandbytes": tensors_of_4bit,
    "compressed-tensors": tensors_of_compressed,
    "gptq": tensors_of_gptq,
    "awq": tensors_of_awq,
}


def _array_to_write(name: str, array: str, layout: QTensor, make: Callable[[], QTensor]) -> TensorToWrite:
    x = getattr(layout, array)
    return TensorToWrite(
        f"{name}.{array}", np.dtype(x.dtype), x.shape, lambda: np.asarray(getattr(make(), array))
    )


class _Once:
    """A value that is made on the first call and released after the last of `calls` calls."""

    def __init__(self, make: Callable[[], QTensor], calls: int):
        self._make, self._left = make, calls
        self._value: QTensor | None = None

    def __call__(self) -> QTensor:
        value = self._make() if self._value is None else self._value
        self._left -= 1
        self._value = value if self._left else None
        return value


def as_stored(q: QTensor, method: str, where: str) -> tuple[QTensor, int]:
    """Return a quantised weight with the values that the layout of `method` stores, and how many of its
    scales the layout rounds. where: the weight, for errors.
    """
    return with_float16_scales(q, where) if method in ("gptq", "awq") else (q, 0)


def quantization_config(quant: Quant, method: str, plain: list[str], packed: list[str]) -> dict[str, Any]:
    """Return config.json's quantization_config for weights written by `tensors_of`. plain: last names of
    modules that are not quantised. packed: names of those that are, inside a layer, such as self_attn.q_proj.
    """
    if method == "compressed-tensors":
        return compressed_settings(quant.kind, quant.block, plain)
    if method == "gptq":
        return gptq_settings(quant.block, plain, packed)
    if method == "awq":
        return awq_settings(quant.block, plain)
    if method == "jaxft":
        return {"quant_method": method, "kind": quant.kind, "block": quant.block, "double": quant.double}
    return {
        "quant_method": method,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant.kind,
        "bnb_4bit_use_double_quant": quant.double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }
