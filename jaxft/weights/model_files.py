"""The tensors in a model's files under their Hugging Face names, for every file format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.nn.quant import QTensor

Index = tuple[slice, ...]  # of the leading dimensions of an array; the others are whole
ReadPart = Callable[[Index], np.ndarray]


@dataclass(frozen=True)
class QuantisedTensor:
    """A weight [in, out] that the files store quantised.

    method: the quantisation method, for messages. layout: a QTensor of ShapeDtypeStructs that represents
    exactly the values in the files; None if there is none. read(index): returns the weight, or the part of it
    at `index` [in, out], whose limits are limits of blocks: a QTensor of NumPy arrays in that layout, or
    without one the values in float32. reason: why there is no layout, or not the smallest one. tensors: in
    the files that it consists of, if these have other names.
    """

    method: str
    shape: tuple[int, ...]
    layout: QTensor | None
    read: Callable[..., QTensor | np.ndarray]
    reason: str = ""
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a model's files, which is read when it is needed.

    shape, dtype, read(index): of its values, dequantised if it is quantised; read returns a part of them in
    fresh memory. quantised: the weight as the files store it, None if that is as it is read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: ReadPart
    quantised: QuantisedTensor | None = None


@dataclass(frozen=True)
class ModelFiles:
    """The tensors of a model by name. where: the file or folder, for messages. ignored: tensors in the files
    that belong to other parts of a multimodal model than its text decoder.
    """

    where: str
    tensors: Mapping[str, FileTensor]
    ignored: tuple[str, ...] = ()

    @property
    def quantised(self) -> dict[str, QuantisedTensor]:
        """The weights that the files store quantised."""
        return {name: x.quantised for name, x in self.tensors.items() if x.quantised is not None}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """Read the values of a tensor, or the part of them at `index`."""
        return self.tensors[name].read(index)


def full_index(index: Index, shape: Sequence[int]) -> Index:
    """Return the index with slice(start, stop) for every dimension of `shape`."""
    slices = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(slices, shape, strict=True))


def lengths(index: Index) -> tuple[int, ...]:
    """Return the shape of the part at a full index."""
    return tuple(s.stop - s.start for s in index)
