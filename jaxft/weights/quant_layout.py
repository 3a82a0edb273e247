"""The form of a packed weight: the QTensor that stands for the numbers in the files, and where parts of it are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nn.quant import QTensor, Quant, is_paired, quantize
from jaxft.weights.safetensors import Index


def within(form: QTensor, part: str, at: Index) -> Index:
    """Where in an array of a form the numbers are for a part [in, out] of the weight that is cut between blocks."""
    ins, outs = at
    if part == "codes":
        return (slice(ins.start // 2, -(-ins.stop // 2)) if is_paired(form.kind) else ins, outs)
    if part in ("outer", "mean", "index"):
        return ()
    if form.block is None or form.index is not None:
        return slice(None), outs
    return slice(ins.start // form.block, -(-ins.stop // form.block)), outs


def form(
    kind: str, ins: int, outs: int, block: int | None, scale: Any, offset: Any = None, indexed: bool = False
) -> QTensor:
    """A form whose scales (and offsets) have this dtype."""
    blocks = -(-ins // block) if block else 1
    rows, dtype = (ins // 2, np.uint8) if is_paired(kind) else (ins, np.int8)
    shaped: Callable[..., Any] = jax.ShapeDtypeStruct
    return QTensor(
        codes=shaped((rows, outs), dtype),
        kind=kind,
        dtype=jnp.dtype(jnp.float32),
        block=block,
        scale=shaped((blocks, outs), scale),
        offset=None if offset is None else shaped((blocks, outs), offset),
        index=shaped((ins,), np.int32) if indexed else None,
    )


def same_form(a: QTensor, b: QTensor) -> bool:
    """Whether two QTensors have the same arrays and the same meaning, whatever they are rounded to where they are used."""

    def about(q: QTensor) -> Any:
        return (
            q.kind,
            q.block,
            {part: (getattr(q, part).shape, np.dtype(getattr(q, part).dtype)) for part in arrays(q)},
        )

    return about(a) == about(b)


def form_of(shape: tuple[int, int], quant: Quant) -> QTensor:
    """What quant.quantize makes of a weight [in, out]."""
    pack = partial(quantize, kind=quant.kind, block=quant.block, double=quant.double)
    return jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, jnp.float32))


def arrays(q: QTensor) -> list[str]:
    """Names of the arrays that a QTensor has."""
    return [
        part
        for part in ("codes", "scale", "offset", "outer", "mean", "index")
        if getattr(q, part) is not None
    ]
