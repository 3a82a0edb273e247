"""The table of file formats of quantised weights: open a model in one of them, choose one to write."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.nn.quant import KINDS, QTensor, Quant, dequantize, is_paired
from jaxft.nn.quant_formats import FORMATS
from jaxft.weights.hf.safetensors import SafetensorsFiles, TensorToWrite, read_stored, read_tensor
from jaxft.weights.quantised import file_format as ff
from jaxft.weights.quantised.bitsandbytes import BITSANDBYTES
from jaxft.weights.quantised.file_format import FileFormat, QuantConfig, Weights, WrittenTensor
from jaxft.weights.quantised.packed_formats import AWQ, COMPRESSED_TENSORS, FINE_GRAINED_FP8, GPTQ
from jaxft.weights.tensors import FileTensor, Index, ModelFiles, QuantisedTensor, full_index

# jaxft's own format: the arrays of a QTensor as NAME.codes, NAME.scale and so on.


def _open_arrays(files: SafetensorsFiles, settings: QuantConfig) -> Weights:
    try:
        quant = Quant(settings["kind"], settings["block"], settings["double"])
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(
            f"{files.where}: its quantization_config is not a format of jaxft ({e}); "
            "write the model again with scripts/quantize.py"
        ) from e

    def weight(name: str) -> QuantisedTensor:
        rows, outs = ff.matrix_shape(files, f"{name}.codes", FORMATS[quant.kind].code_dtype)
        layout = ff.quantize_layout((rows * (2 if is_paired(quant.kind) else 1), outs), quant)
        arrays = ff.arrays_of(layout)

        def decode(index: Index) -> dict[str, Any]:
            return {
                array: read_tensor(files, f"{name}.{array}", ff.array_index(layout, array, index), x.shape)
                for array, x in arrays.items()
            }

        return ff.quantised_tensor("jaxft", [f"{name}.{array}" for array in arrays], layout, decode)

    return {name: weight(name) for name in ff.stems(files, ".codes")}


def _write_arrays(name: str, layout: QTensor) -> list[WrittenTensor]:
    arrays = ff.arrays_of(layout).items()
    return [WrittenTensor(f"{name}.{array}", x.dtype, x.shape, attrgetter(array)) for array, x in arrays]


OWN_ARRAYS = FileFormat(
    "jaxft",
    _open_arrays,
    kinds=KINDS,
    summary="jaxft's own layout (quant=checkpoint reads it; transformers and vLLM do not)",
    write=_write_arrays,
    config=lambda quant, plain, packed: {"kind": quant.kind, "block": quant.block, "double": quant.double},
    whole_blocks=False,
)

FILE_FORMATS = {
    x.name: x for x in (BITSANDBYTES, GPTQ, AWQ, FINE_GRAINED_FP8, COMPRESSED_TENSORS, OWN_ARRAYS)
}
USUAL_FORMATS = {"nf4": BITSANDBYTES, "fp4": BITSANDBYTES, "fp8": COMPRESSED_TENSORS}  # by kind


def open_tensors(files: SafetensorsFiles, settings: QuantConfig | None) -> ModelFiles:
    """Return the tensors of a model; quantised weights have the names of plain weights.

    settings: config.json's quantization_config, if it has one. Raises ValueError for a format that is not
    supported and for inconsistent tensors.
    """
    quantised: Weights = {}
    if isinstance(settings, dict):
        name = settings.get("quant_method")
        if not isinstance(name, str) or name not in FILE_FORMATS:
            raise ValueError(
                f"{files.where}: its config.json has quant_method={name!r}, but jaxft reads "
                f"{', '.join(FILE_FORMATS)}; use the model's unquantised weights"
            )
        quantised = FILE_FORMATS[name].open(files, settings)
    parts = {part for weight in quantised.values() for part in weight.tensors}
    tensors = {
        name: FileTensor(x.shape, x.dtype, partial(read_stored, x))
        for name, x in files.tensors.items()
        if name not in parts
    }
    for name, weight in quantised.items():
        read = partial(dequantised_part, weight)
        tensors[name] = FileTensor(weight.shape[::-1], np.dtype(np.float32), read, weight)
    return ModelFiles(files.where, tensors)


def dequantised(x: QTensor | np.ndarray) -> np.ndarray:
    """Return a QTensor dequantised to float32 on the host, and an array as it is."""
    return np.asarray(dequantize(replace(x, dtype=jnp.dtype(jnp.float32)))) if isinstance(x, QTensor) else x


def dequantised_part(tensor: QuantisedTensor, index: Index = ()) -> np.ndarray:
    """Return the part of a quantised weight [out, in] at `index`, dequantised to float32. Only the part's
    blocks are read, unless the format quantises its scales or stores an index of blocks.
    """
    layout = tensor.layout
    if layout is None or layout.outer is not None or layout.index is not None:
        return dequantised(tensor.read()).T[index]
    outs, ins = full_index(index, tensor.shape[::-1])
    unit = 2 * (layout.block or 1)
    start, stop = ins.start // unit * unit, min(-(-ins.stop // unit) * unit, tensor.shape[0])
    blocks = dequantised(tensor.read((slice(start, stop), outs)))
    return blocks[ins.start - start : ins.stop - start].T


# Writing


def written_format(layouts: Mapping[str, QTensor], requested: str | None = None) -> tuple[FileFormat, str]:
    """Return the format for writing weights, and one sentence for the user.

    layouts: of the weights, by parameter path. requested: a format's name; None for the usual format of the
    weights' kind, or jaxft's own if a weight does not fit. Raises ValueError if a weight does not fit into
    the requested format.
    """
    if requested is not None:
        written = {name: format for name, format in FILE_FORMATS.items() if format.kinds}
        if requested not in written:
            raise ValueError(f"--format {requested} cannot be written; use one of {', '.join(written)}")
        format = written[requested]
    else:
        kinds = {q.kind for q in layouts.values()}
        format = USUAL_FORMATS.get(kinds.pop(), OWN_ARRAYS) if len(kinds) == 1 else OWN_ARRAYS
    wrong = next(filter(None, (_misfit(format, path, q) for path, q in layouts.items())), "")
    if wrong and requested:
        raise ValueError(f"--format {requested}: {wrong}")
    if wrong:
        return (
            OWN_ARRAYS,
            f"warning: {OWN_ARRAYS.summary} and not the layout of {format.name}, because {wrong}",
        )
    return format, format.head_summary if "head" in layouts and format.head_summary else format.summary


def _misfit(format: FileFormat, path: str, q: QTensor) -> str:
    """Return why the parameter at `path` cannot be written in a format, and a remedy; "" if it can."""
    ins, outs = q.shape[-2:]
    if q.kind not in format.kinds:
        kinds = " or ".join(format.kinds)
        return f"it stores {kinds}, and these weights are {q.kind}; quantise to {format.kinds[0]}"
    if format.whole_blocks and ins % (q.block or ins):
        return f"the block size {q.block} does not divide the {ins} inputs of {path}; use one that does"
    if path == "head" and not format.with_head:
        return f"transformers loads no head in the layout of {format.name}; leave the head out of the targets"
    if q.kind == "int4" and (ins % format.int4_multiples[0] or outs % format.int4_multiples[1]):
        sizes = " and ".join(map(str, format.int4_multiples))
        return f"{path} has {ins} inputs and {outs} outputs, not multiples of {sizes}; use another format"
    return ""


def exceptions(plain: Collection[str], packed: Collection[str]) -> list[str]:
    """Return the names by which a quantization_config excludes the modules `plain`, which are not quantised:
    the last part of each name, or the full name if the name of a quantised module in `packed` contains it.
    """
    last = {name.rpartition(".")[2] for name in plain}
    clashing = {part for part in last if any(part in name for name in packed)}
    return sorted({name if (part := name.rpartition(".")[2]) in clashing else part for name in plain})


def as_stored(q: QTensor, format: FileFormat, where: str) -> tuple[QTensor, str]:
    """Return a quantised weight with its scales in the format's dtype, and a warning if that rounds some; ""
    if not.

    Scales below float16's normal range lose digits. where: the weight, for messages. Raises ValueError for
    scales that are too large for the dtype.
    """
    if format.scale_dtype is None:
        return q, ""
    wide, dtype = np.asarray(q.scale, np.float32), np.dtype(format.scale_dtype)
    if wide.max(initial=0) > float(jnp.finfo(dtype).max):
        raise ValueError(
            f"{where}: the scale {wide.max():.3g} is too large for {dtype}, in which {format.name} stores "
            "scales; use --format compressed-tensors"
        )
    narrow = wide.astype(dtype)
    rounded = np.count_nonzero(narrow.astype(np.float32) != wide)
    warning = (
        f"warning: {rounded} of {wide.size} scales of {where} are too small for {dtype}, in which --format "
        f"{format.name} stores them, and lose digits; if its error matters, use --format compressed-tensors"
    )
    return replace(q, scale=narrow), warning if rounded else ""


def quantised_tensors(
    name: str, layout: QTensor, make: Callable[[], QTensor], method: str
) -> list[TensorToWrite]:
    """Return the tensors of the weight `name` in the format `method`.

    method: a key of FILE_FORMATS. make: returns the weight on the host in this layout, see `as_stored`;
    called once, when the first of the tensors is written.
    """
    parts, values = FILE_FORMATS[method].write(name, layout), dict[str, np.ndarray]()

    def fetch(name: str) -> np.ndarray:
        if name not in values:
            weight = make()
            values.update({part.name: np.asarray(part.values(weight)) for part in parts})
        return values.pop(name)

    return [TensorToWrite(x.name, np.dtype(x.dtype), x.shape, partial(fetch, x.name)) for x in parts]
