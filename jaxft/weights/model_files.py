"""The tensors in a model's files under their Hugging Face names, for every file format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxft.nn.quant import QTensor

Index = tuple[slice, ...]  # of the leading dimensions of an array; the others are whole


class ReadTensor(Protocol):
    """Reads the tensor `name`, or only the part of it at `index`."""

    def __call__(self, name: str, index: Index = ()) -> np.ndarray:
        """Return the values as an array of a float dtype in fresh memory."""


class ReadQuantised(Protocol):
    """Reads a quantised weight, or only the part of it at `index` [in, out], whose limits are limits of
    blocks.
    """

    def __call__(self, index: Index = ()) -> QTensor | np.ndarray:
        """Return a QTensor of NumPy arrays, or the values in float32 where no QTensor represents them."""


@dataclass(frozen=True)
class QuantisedTensor:
    """A weight [in, out] that the files store quantised.

    method: the quantisation method, for messages. layout: a QTensor of ShapeDtypeStructs that represents
    exactly the values in the files, and what `read` returns; None if there is none. reason: why there is no
    layout, or not the smallest one. tensors: in the files that it consists of, if these have other names.
    """

    method: str
    shape: tuple[int, ...]
    layout: QTensor | None
    read: ReadQuantised
    reason: str = ""
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelFiles:
    """The tensors of a model, read from its files when they are needed.

    where: the file or folder, for messages. read: returns the values of a tensor, dequantised if it is
    quantised. quantised: the weights that the files store quantised, by name. ignored: tensors in the files
    that belong to other parts of a multimodal model than its text decoder.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    read: ReadTensor
    quantised: Mapping[str, QuantisedTensor] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def full_index(index: Index, shape: Sequence[int]) -> Index:
    """Return the index with slice(start, stop) for every dimension of `shape`."""
    slices = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(slices, shape, strict=True))


def lengths(index: Index) -> tuple[int, ...]:
    """Return the shape of the part at a full index."""
    return tuple(s.stop - s.start for s in index)
