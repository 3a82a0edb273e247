"""Packed weights written: in bitsandbytes' layout, which transformers and vLLM load, or as the arrays that jaxft holds."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from jaxft.nn import quant_formats as qf
from jaxft.nn.quant import QTensor, Quant
from jaxft.weights.quant_layout import arrays
from jaxft.weights.quantised import STATE, TABLES
from jaxft.weights.safetensors import Outgoing


def method_for(forms: Iterable[QTensor]) -> str:
    """bitsandbytes for nf4 and fp4 whose blocks divide the inputs, as its flat blocks need; else jaxft."""
    return (
        "bitsandbytes"
        if all(q.kind in TABLES and q.block and q.shape[-2] % q.block == 0 for q in forms)
        else "jaxft"
    )


def outgoing(name: str, want: QTensor, make: Callable[[], QTensor], method: str) -> list[Outgoing]:
    """The tensors that hold the weight `name` in the layout of `method`, bitsandbytes or jaxft.

    `make()` gives the QTensor on the host, of the form `want`; it is called once, when the first of the tensors is written.
    """
    if method == "bitsandbytes":
        return _outgoing_bnb(name, want, _Once(make, len(arrays(want))))
    once = _Once(make, len(arrays(want)))
    take = lambda part: np.asarray(getattr(once(), part))  # noqa: E731
    parts = {part: getattr(want, part) for part in arrays(want)}
    return [
        Outgoing(f"{name}.{part}", np.dtype(x.dtype), x.shape, partial(take, part))
        for part, x in parts.items()
    ]


class _Once:
    """A value that is made when it is first asked for and let go after it was asked for `times` times."""

    def __init__(self, make: Callable[[], Any], times: int):
        self._make, self._left, self._value = make, times, None

    def __call__(self) -> Any:
        if self._value is None:
            self._value = self._make()
        value, self._left = self._value, self._left - 1
        if not self._left:
            self._value = None
        return value


def _outgoing_bnb(name: str, want: QTensor, once: Callable[[], QTensor]) -> list[Outgoing]:
    ins, outs = want.shape
    blocks = int(np.prod(want.scale.shape))
    state: dict[str, Any] = {
        "quant_type": want.kind,
        "blocksize": want.block,
        "dtype": "bfloat16",
        "shape": [outs, ins],
    }
    by_channel = lambda x: np.ascontiguousarray(np.asarray(x).T).reshape(-1)  # noqa: E731
    f32 = np.dtype(np.float32)
    out = [
        Outgoing(name, np.dtype(np.uint8), (ins * outs // 2, 1), lambda: by_channel(once().codes)[:, None]),
        Outgoing(f"{name}.absmax", np.dtype(want.scale.dtype), (blocks,), lambda: by_channel(once().scale)),
        Outgoing(f"{name}.quant_map", f32, (16,), lambda: TABLES[want.kind]),
    ]
    room = 0
    if want.outer is not None:
        state |= {"nested_blocksize": qf.GROUP, "nested_dtype": "float32"}
        room = len('"nested_offset": , ') + 24  # the mean is known only when the weight is
        out += [
            Outgoing(f"{name}.nested_absmax", f32, want.outer.shape, lambda: np.asarray(once().outer)),
            Outgoing(f"{name}.nested_quant_map", f32, (256,), lambda: qf.DYNAMIC),
        ]
    size = len(json.dumps(state)) + room

    def told() -> np.ndarray:
        known = state if want.outer is None else {**state, "nested_offset": float(once().mean)}
        return np.frombuffer(json.dumps(known).ljust(size).encode(), np.uint8)

    return [*out, Outgoing(f"{name}{STATE}{want.kind}", np.dtype(np.uint8), (size,), told)]


def settings(quant: Quant, method: str, plain: list[str]) -> dict[str, Any]:
    """config.json's quantization_config for weights written by `outgoing`. plain: modules that are not packed."""
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
