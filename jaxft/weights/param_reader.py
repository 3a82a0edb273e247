"""Read a model's parameters from its files in parts, so that host memory never holds a full parameter."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import QTensor
from jaxft.weights import finite, hf
from jaxft.weights.model_files import Index, ModelFiles, full_index

PIECE_BYTES = 1 << 22  # bytes that are read and cast at a time, so that they stay in cache
COPY_COLUMNS = 16  # columns per transposing copy: 4 times as fast as all at once


@dataclass(frozen=True)
class ParamReader:
    """A parameter in a model's files, of which `read_values` and `read_quantised` read parts.

    names: its tensors, one per layer if it is `stacked`, else one. shape: the parameter's, with the layers
    axis. transposed: whether the files store [out, in]. dtype: the files' dtype, float32 if its tensors
    differ. layout: see hf.common_layout.
    """

    files: ModelFiles
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    transposed: bool
    dtype: np.dtype
    layout: QTensor | None

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer, or of a parameter without layers."""
        return self.shape[1:] if self.stacked else self.shape


def param_readers(files: ModelFiles, model: Model) -> dict[str, ParamReader]:
    """Return a reader for every base parameter by path. Raises ValueError if the files do not contain exactly
    the model's.
    """
    hf.check_tensors(files, model)
    readers = {}
    for path, spec in spec_paths(model.specs.get("base", model.specs)).items():
        name, transposed = model.weight_names[path]
        stacked = "{i}" in name
        names = tuple(name.format(i=i) for i in range(spec.shape[0])) if stacked else (name,)
        dtypes = {files.dtypes[name] for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        layout = hf.common_layout(files, model, path)
        readers[path] = ParamReader(files, names, stacked, spec.shape, transposed, dtype, layout)
    return readers


def read_values(reader: ParamReader, layer: int, index: Index) -> np.ndarray:
    """Read the part of a layer [in, out] at `index` in the reader's dtype, dequantised if the files store it
    quantised. Raises ValueError for values that are not finite.
    """
    in_file = index[::-1] if reader.transposed else index
    value = finite.require_finite(reader.files.read(reader.names[layer], in_file))
    value = value.astype(reader.dtype, copy=False)
    return value.T if reader.transposed else value


def read_quantised(reader: ParamReader, layer: int, index: Index) -> QTensor:
    """Read the codes and scales of the part of a layer [in, out] at `index`, whose limits are limits of
    blocks.

    Only for a reader with a layout. Raises ValueError for scales that are not finite.
    """
    value = finite.require_finite_scales(reader.files.quantised[reader.names[layer]].read(index))
    assert isinstance(value, QTensor)
    return value


def read_whole(reader: ParamReader) -> np.ndarray:
    """Read a parameter with all its layers, in the reader's dtype."""
    out = np.empty(reader.shape, reader.dtype)
    for layer in range(len(reader.names)):
        for index in small_parts(reader, full_index((), reader.layer_shape)):
            with errors_name_tensor(reader, layer, index):
                value = read_values(reader, layer, index)
            copy_into((out[layer] if reader.stacked else out)[index], value)
    return out


def read_table_rows(reader: ParamReader, numbers: Sequence[int], transposed: bool) -> np.ndarray:
    """Read rows [N, D] of a table [V, D], or columns of a head [D, V] if `transposed`."""
    rows = []
    for number in numbers:
        one = (slice(number, number + 1),)
        index = full_index((slice(None), *one) if transposed else one, reader.layer_shape)
        with errors_name_tensor(reader, 0, index):
            rows.append(read_values(reader, 0, index).reshape(-1))
    return np.stack(rows)


def small_parts(reader: ParamReader, index: Index) -> list[Index]:
    """Split a part of a layer into parts of at most PIECE_BYTES bytes that are contiguous in the files.

    Quantised tensors are not split, because some are dequantised whole.
    """
    if not index or any(name in reader.files.quantised for name in reader.names):
        return [index]
    axis = len(index) - 1 if reader.transposed else 0
    others = math.prod(s.stop - s.start for i, s in enumerate(index) if i != axis)
    step = max(1, PIECE_BYTES // max(1, others * reader.dtype.itemsize) // COPY_COLUMNS) * COPY_COLUMNS
    first, last = index[axis].start, index[axis].stop
    return [
        (*index[:axis], slice(start, min(start + step, last)), *index[axis + 1 :])
        for start in range(first, last, step)
    ]


@contextlib.contextmanager
def errors_name_tensor(reader: ParamReader, layer: int, index: Index) -> Iterator[None]:
    """Add the file, the tensor and the part of it to the message of a ValueError."""
    try:
        yield
    except ValueError as e:
        is_part = full_index(index, reader.layer_shape) != full_index((), reader.layer_shape)
        part = ", ".join(f"{s.start}:{s.stop}" for s in index)
        where = reader.files.where
        named = str(e).startswith((f"{where}:", f"{where}/"))
        message = str(e) if named else f"{where}: {reader.names[layer]}: {e}"
        raise ValueError(f"{message} (in its part [{part}])" if is_part else message) from e


def copy_into(out: np.ndarray, value: np.ndarray) -> None:
    """Set `out[...] = value` fast: transposed values some columns at a time, dtypes unknown to NumPy as
    unsigned integers.
    """
    if out.dtype == value.dtype and out.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, value = out.view(bits), value.view(bits)
    if value.ndim < 2 or value.strides[-1] <= value.strides[-2]:
        out[...] = value
        return
    for start in range(0, value.shape[-1], COPY_COLUMNS):
        out[..., start : start + COPY_COLUMNS] = value[..., start : start + COPY_COLUMNS]
