"""Read a model's parameters from its files in parts, so that host memory never holds a full parameter."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import QTensor
from jaxft.weights import finite
from jaxft.weights.hf import hf
from jaxft.weights.model_files import Index, ModelFiles, full_index
from jaxft.weights.quantised.file_format import same_layout
from jaxft.weights.tensors import Tensor, tensors_of

PIECE_BYTES = 1 << 22  # bytes that are read and cast at a time, so that they stay in cache
COPY_COLUMNS = 16  # columns per transposing copy: 4 times as fast as all at once


@dataclass(frozen=True)
class ParamReader:
    """A parameter in a model's files, of which `read_values` and `read_quantised` read parts.

    tensors: in row-major order. shape: the parameter's. dtype: the files' dtype, float32 if its tensors
    differ. layout: in which the files store all of its tensors quantised, None if there is not one, or if
    other parameters share them. changed(tensor, index): returns values in place of those in the files, None
    for the same.
    """

    files: ModelFiles
    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: QTensor | None
    changed: Callable[[Tensor, Index], np.ndarray] | None = None

    def read(self, tensor: Tensor, index: Index = ()) -> np.ndarray:
        """Return the part of a tensor's values [in, out] at `index`, dequantised, in the files' dtype."""
        return self.changed(tensor, index) if self.changed else tensor.read(self.files, index)


def param_readers(files: ModelFiles, model: Model) -> dict[str, ParamReader]:
    """Return a reader for every base parameter by path. Raises ValueError if the files do not contain exactly
    the model's.
    """
    hf.check_tensors(files, model)
    readers = {}
    specs = spec_paths(model.specs.get("base", model.specs))
    for path, tensors in tensors_of(model).items():
        dtypes = {files.tensors[tensor.name].dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        layout = _common_layout(files, tensors)
        readers[path] = ParamReader(files, tensors, specs[path].shape, dtype, layout)
    return readers


def _common_layout(files: ModelFiles, tensors: Sequence[Tensor]) -> QTensor | None:
    stored = [files.tensors[tensor.name].quantised for tensor in tensors]
    layouts = [x.layout for x in stored if x is not None and x.layout is not None]
    own = tensors[0].transposed and tensors[0].offset is None
    if not own or len(layouts) < len(tensors) or not all(same_layout(x, layouts[0]) for x in layouts):
        return None
    return layouts[0]


def read_values(reader: ParamReader, tensor: Tensor, index: Index = ()) -> np.ndarray:
    """Read the part of a tensor's values [in, out] at `index` in the reader's dtype, dequantised if the files
    store it quantised. Raises ValueError for values that are not finite.
    """
    in_file = finite.require_finite(tensor.turned(reader.read(tensor, index)))  # whose error names the place
    return tensor.turned(in_file.astype(reader.dtype, copy=False))


def read_quantised(reader: ParamReader, tensor: Tensor, index: Index = ()) -> QTensor:
    """Read the codes and scales of the part of a tensor's values [in, out] at `index`, whose limits are
    limits of blocks.

    Only for a reader with a layout. Raises ValueError for scales that are not finite.
    """
    stored = reader.files.tensors[tensor.name].quantised
    value = stored and finite.require_finite_scales(stored.read(index))
    assert isinstance(value, QTensor)
    return value


def read_whole(reader: ParamReader) -> np.ndarray:
    """Read a whole parameter in the reader's dtype."""
    out = np.empty(reader.shape, reader.dtype)
    for tensor in reader.tensors:
        for index in small_parts(reader, tensor, full_index((), tensor.values)):
            with errors_name_tensor(reader, tensor, index):
                value = read_values(reader, tensor, index)
            copy_into(out[tensor.index][index], value)
    return out


def read_table_rows(reader: ParamReader, numbers: Sequence[int], transposed: bool) -> np.ndarray:
    """Read rows [N, D] of a table [V, D], or columns of a head [D, V] if `transposed`."""
    rows, (tensor,) = [], reader.tensors
    for number in numbers:
        one = (slice(number, number + 1),)
        index = full_index((slice(None), *one) if transposed else one, tensor.values)
        with errors_name_tensor(reader, tensor, index):
            rows.append(read_values(reader, tensor, index).reshape(-1))
    return np.stack(rows)


def small_parts(reader: ParamReader, tensor: Tensor, index: Index) -> list[Index]:
    """Split a part of a tensor into parts of at most PIECE_BYTES bytes that are contiguous in the files.

    Quantised tensors are not split, because some are dequantised whole.
    """
    if not index or reader.files.tensors[tensor.name].quantised:
        return [index]
    axis = len(index) - 1 if tensor.transposed else 0
    others = math.prod(s.stop - s.start for i, s in enumerate(index) if i != axis)
    step = max(1, PIECE_BYTES // max(1, others * reader.dtype.itemsize) // COPY_COLUMNS) * COPY_COLUMNS
    first, last = index[axis].start, index[axis].stop
    return [
        (*index[:axis], slice(start, min(start + step, last)), *index[axis + 1 :])
        for start in range(first, last, step)
    ]


@contextlib.contextmanager
def errors_name_tensor(reader: ParamReader, tensor: Tensor, index: Index) -> Iterator[None]:
    """Add the file, the tensor and the part of it to the message of a ValueError."""
    try:
        yield
    except ValueError as e:
        is_part = full_index(index, tensor.values) != full_index((), tensor.values)
        part = ", ".join(f"{s.start}:{s.stop}" for s in index)
        where = reader.files.where
        named = str(e).startswith((f"{where}:", f"{where}/"))
        message = str(e) if named else f"{where}: {tensor.name}: {e}"
        raise ValueError(f"{message} (in its part [{part}])" if is_part else message) from e


def copy_into(out: np.ndarray, value: np.ndarray) -> None:
    """Set `out[...] = value` fast: transposed values some columns at a time, dtypes unknown to NumPy as
    unsigned integers.
    """
    if out.dtype == value.dtype and out.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, value = out.view(bits), value.view(bits)
    if list(value.strides[-2:]) == sorted(value.strides[-2:], reverse=True):  # not transposed
        out[...] = value
        return
    for start in range(0, value.shape[-1], COPY_COLUMNS):
        out[..., start : start + COPY_COLUMNS] = value[..., start : start + COPY_COLUMNS]
