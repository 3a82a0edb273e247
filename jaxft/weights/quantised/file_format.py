"""The type of a file format of quantised weights, and their layouts: QTensors of ShapeDtypeStructs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.nn.quant import QTensor, Quant, is_paired, quantize
from jaxft.nn.quant_formats import FORMATS
from jaxft.weights.hf.safetensors import SafetensorsFiles, required
from jaxft.weights.tensors import Index, QuantisedTensor, full_index

QuantConfig = dict[str, Any]  # quantization_config of a config.json
Weights = dict[str, QuantisedTensor]  # by the names that they have in a plain model


class WrittenTensor(NamedTuple):
    """A tensor to write for a quantised weight, such as its scales. values(weight): computes it."""

    name: str
    dtype: DTypeLike
    shape: tuple[int, ...]
    values: Callable[[QTensor], Any]


def _no_tensors(name: str, layout: QTensor) -> list[WrittenTensor]:
    return []


def _no_config(quant: Quant, plain: list[str], packed: list[str]) -> QuantConfig:
    return {}


@dataclass(frozen=True)
class FileFormat:
    """A file format of quantised weights.

    name: the `quant_method` of config.json's quantization_config. open(files, settings): returns the
    quantised weights, each with its layout and a function that decodes parts of it (see quantised_tensor); it
    reads only headers and small tensors, and raises ValueError for weights that jaxft does not read.

    All other fields are for writing. kinds: kinds of weights (see nn.quant) that the format stores; () if
    jaxft only reads it. summary: a line for the user that names the programs that load the format;
    head_summary: the same for a model with a quantised head. write(name, layout): returns the tensors of the
    weight `name`. config(quant, plain, packed): returns the quantization_config without quant_method; plain:
    modules that are not quantised, see quantised_checkpoints.exceptions; packed: names of quantised modules
    inside a layer, such as self_attn.q_proj. scale_dtype: dtype of written scales, None for the dtype that
    they have. with_head: whether the head can be quantised. whole_blocks: whether the block size must divide
    a weight's inputs. int4_multiples: numbers that must divide the inputs and outputs of an int4 weight.
    """

    name: str
    open: Callable[[SafetensorsFiles, QuantConfig], Weights]
    kinds: tuple[str, ...] = ()
    summary: str = ""
    head_summary: str = ""
    write: Callable[[str, QTensor], list[WrittenTensor]] = _no_tensors
    config: Callable[[Quant, list[str], list[str]], QuantConfig] = _no_config
    scale_dtype: DTypeLike | None = None
    with_head: bool = True
    whole_blocks: bool = True
    int4_multiples: tuple[int, int] = (1, 1)


def quantised_tensor(
    format: str,
    tensors: Iterable[str],
    layout: QTensor,
    decode: Callable[[Index], dict[str, Any]],
    reason: str = "",
) -> QuantisedTensor:
    """Return a quantised weight of the file format named `format`. tensors, reason: see QuantisedTensor.

    decode(index): returns the QTensor's arrays by name for the part of the weight at a full index [in, out],
    which begins and ends at blocks.
    """

    def read(index: Index = ()) -> QTensor:
        return replace(layout, **decode(full_index(index, layout.shape)))

    return QuantisedTensor(format, layout.shape, layout, read, reason, frozenset(tensors))


def stems(files: SafetensorsFiles, ending: str) -> list[str]:
    """Return the names of all tensors that end with `ending`, with the ending removed."""
    return [name.removesuffix(ending) for name in files.tensors if name.endswith(ending)]


def matrix_shape(files: SafetensorsFiles, name: str, dtype: DTypeLike) -> tuple[int, int]:
    """Return the (rows, columns) of a weight's codes; ValueError unless they are a matrix of this dtype."""
    codes, expected = required(files, name), np.dtype(dtype)
    if codes.dtype != expected or len(codes.shape) != 2:
        raise ValueError(
            f"{files.where}: {name} is {codes.dtype}{list(codes.shape)}, expected a matrix of {expected}, "
            "the codes of a quantised weight; download the model again"
        )
    return codes.shape[0], codes.shape[1]


# Layouts


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

    block: inputs of a block, None for one block of all inputs. indexed: whether the files store which block
    each input belongs to, so that blocks need not be consecutive inputs.
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
    """Return whether two QTensors have the same kind, blocks and arrays. Their `dtype` is not compared."""

    def facts(q: QTensor) -> tuple[Any, ...]:
        return q.kind, q.block, {name: (x.shape, np.dtype(x.dtype)) for name, x in arrays_of(q).items()}

    return facts(a) == facts(b)


def arrays_of(q: QTensor) -> dict[str, Any]:
    """Return the arrays that a QTensor has, by name."""
    names = ("codes", "scale", "offset", "outer", "mean", "index")
    return {name: getattr(q, name) for name in names if getattr(q, name) is not None}


def array_index(layout: QTensor, array: str, index: Index) -> Index:
    """Convert the index of a part of a weight [..., in, out], which begins and ends at blocks, to the index
    in one of its arrays. array: the array's name, such as "codes" or "scale".
    """
    *above, ins, outs = index
    if array in ("outer", "mean", "index"):
        return tuple(above)
    per_row = layout.block if layout.index is None else None
    if array == "codes":
        per_row = 2 if is_paired(layout.kind) else 1
    rows = slice(ins.start // per_row, -(-ins.stop // per_row)) if per_row else slice(None)
    return (*above, rows, outs)
