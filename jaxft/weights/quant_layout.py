"""The layout of a quantised weight: a QTensor of ShapeDtypeStructs, and where parts of the weight are in its
arrays.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.nn.quant import FORMATS, QTensor, Quant, is_paired, quantize
from jaxft.weights.model_files import Index


def array_index(layout: QTensor, array: str, index: Index) -> Index:
    """Return where in one of a layout's arrays the part of the weight [..., in, out] at `index` is; these are
    limits of blocks.
    """
    *above, ins, outs = index
    if array == "codes":
        ins = slice(ins.start // 2, -(-ins.stop // 2)) if is_paired(layout.kind) else ins
        return *above, ins, outs
    if array in ("outer", "mean", "index"):
        return tuple(above)
    if layout.block is None or layout.index is not None:
        return *above, slice(None), outs
    return *above, slice(ins.start // layout.block, -(-ins.stop // layout.block)), outs


def block_layout(
    kind: str,
    shape: tuple[int, int],
    block: int | None,
    scale_dtype: DTypeLike,
    offset_dtype: DTypeLike | None = None,
    indexed: bool = False,
) -> QTensor:
    """Return the layout of a weight [in, out] with one scale (and offset, if it has a dtype) per block of
    inputs.

    block: None is one block of all inputs. indexed: whether an array stores the block of each input.
    """
    ins, outs = shape
    blocks = -(-ins // block) if block else 1
    rows, code_dtype = ins // 2 if is_paired(kind) else ins, FORMATS[kind].code_dtype
    return QTensor(
        codes=jax.ShapeDtypeStruct((rows, outs), code_dtype),
        kind=kind,
        dtype=jnp.dtype(jnp.float32),
        block=block,
        scale=jax.ShapeDtypeStruct((blocks, outs), scale_dtype),
        offset=None if offset_dtype is None else jax.ShapeDtypeStruct((blocks, outs), offset_dtype),
        index=jax.ShapeDtypeStruct((ins,), np.int32) if indexed else None,
    )


def quantize_layout(shape: tuple[int, ...], quant: Quant) -> QTensor:
    """Return the layout that nn.quant.quantize gives a weight [in, out]."""
    pack = partial(quantize, kind=quant.kind, block=quant.block, double=quant.double)
    return jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, jnp.float32))


def same_layout(a: QTensor, b: QTensor) -> bool:
    """Whether two QTensors have the same kind, blocks and arrays; the dtype that they dequantise to may
    differ.
    """

    def description(q: QTensor) -> tuple[Any, ...]:
        arrays = {name: getattr(q, name) for name in array_names(q)}
        return q.kind, q.block, {name: (x.shape, np.dtype(x.dtype)) for name, x in arrays.items()}

    return description(a) == description(b)


def array_names(q: QTensor) -> list[str]:
    """Return the names of the arrays that a QTensor has."""
    names = ("codes", "scale", "offset", "outer", "mean", "index")
    return [name for name in names if getattr(q, name) is not None]
