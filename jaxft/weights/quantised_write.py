"""Write quantised weights: in the layouts of bitsandbytes and compressed-tensors, which transformers and vLLM
load, or as jaxft's own arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxft.nn.quant import QTensor, Quant
from jaxft.weights.bitsandbytes import TABLES, tensors_of_4bit
from jaxft.weights.fp8_files import fp8_settings, tensors_of_fp8
from jaxft.weights.quant_layout import array_names
from jaxft.weights.safetensors import TensorToWrite


def method_for(layouts: Mapping[str, QTensor]) -> tuple[str, str]:
    """Return the quantisation method whose layout is written, and one sentence for the user.

    It is "compressed-tensors" for fp8, "bitsandbytes" for nf4 and fp4 if blocks divide the inputs of every
    weight, as its flat blocks require; else "jaxft". layouts: by parameter path.
    """
    if layouts and all(q.kind == "fp8" for q in layouts.values()):
        return "compressed-tensors", "compressed-tensors' layout, which transformers and vLLM load"
    own = "jaxft's own layout (quant=checkpoint reads it; transformers and vLLM do not)"
    for path, q in layouts.items():
        if q.kind not in TABLES:
            return "jaxft", own
        if not q.block or q.shape[-2] % q.block:
            return "jaxft", (
                f"warning: {own} and not bitsandbytes', because {path} has {q.shape[-2]} inputs, which are "
                f"not a multiple of the block size {q.block}"
            )
    return "bitsandbytes", "bitsandbytes' layout, which transformers and vLLM load"


def tensors_of(name: str, layout: QTensor, make: Callable[[], QTensor], method: str) -> list[TensorToWrite]:
    """Return the tensors of the weight `name` in the layout of `method`, see `method_for`.

    make: returns the weight on the host in this layout. It is called once, when the first of the tensors is
    written.
    """
    once = _Once(make, len(array_names(layout)))
    if method == "bitsandbytes":
        return tensors_of_4bit(name, layout, once)
    if method == "compressed-tensors":
        return tensors_of_fp8(name, layout, once)
    return [_array_to_write(name, array, layout, once) for array in array_names(layout)]


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


def quantization_config(quant: Quant, method: str, plain: list[str]) -> dict[str, Any]:
    """Return config.json's quantization_config for weights written by `tensors_of`. plain: modules that are
    not quantised.
    """
    if method == "compressed-tensors":
        return fp8_settings(plain)
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
