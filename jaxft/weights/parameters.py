"""The parameters of a model as a checkpoint holds them, each read part by part: no leaf need ever be whole."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import QTensor
from jaxft.weights import hf
from jaxft.weights.safetensors import Index, Tensors, spans

PIECE = (
    1 << 22
)  # bytes of a file that are read at a time where numbers stay as they are, so that they stay in cache
COLUMNS = 16  # that a transposing copy takes at a time: 4 times as fast as all at once


@dataclass(frozen=True)
class Leaf:
    """A parameter in the files.

    names: its tensors, one a layer where it is `stacked`, else one. shape: the parameter's, with the layers. turned: whether the
    files hold [out, in]. dtype: the files', float32 where its tensors differ. form: see hf.form_in.
    """

    tensors: Tensors
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    turned: bool
    dtype: np.dtype
    form: QTensor | None

    @property
    def layer(self) -> tuple[int, ...]:
        """Shape of a layer, or of the parameter that has none."""
        return self.shape[1:] if self.stacked else self.shape


def leaves(tensors: Tensors, model: Model) -> dict[str, Leaf]:
    """Every parameter of the base under its path. Raises ValueError where the checkpoint doesn't hold exactly the model's."""
    hf.check(tensors, model)
    found = {}
    for path, spec in spec_paths(model.specs.get("base", model.specs)).items():
        name, turned = model.weight_names[path]
        stacked = "{i}" in name
        names = tuple(name.format(i=i) for i in range(spec.shape[0])) if stacked else (name,)
        dtypes = {tensors.dtypes[each] for each in names}
        common = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        found[path] = Leaf(
            tensors, names, stacked, spec.shape, turned, common, hf.form_in(tensors, model, path)
        )
    return found


def numbers(leaf: Leaf, layer: int, at: Index) -> np.ndarray:
    """Part of a layer [in, out] in the leaf's dtype."""
    value = leaf.tensors.read(leaf.names[layer], at[::-1] if leaf.turned else at).astype(
        leaf.dtype, copy=False
    )
    return value.T if leaf.turned else value


def as_packed(leaf: Leaf, layer: int, at: Index) -> QTensor:
    """Part of a layer [in, out] in the leaf's form, cut between blocks; see forms.within."""
    return leaf.tensors.packed[leaf.names[layer]].read(at)


def each(
    leaf: Leaf, boxes: list[Index], make: Callable[[int, Index], Any]
) -> Iterator[tuple[int, Index, Any]]:
    """(layer, at, `make(layer, at)`) for parts of each layer. Raises ValueError that names the tensor that `make` refused."""
    for layer, name in enumerate(leaf.names):
        for at in boxes:
            try:
                value = make(layer, at)
            except ValueError as e:
                where = (
                    "" if spans(at, leaf.layer) == spans((), leaf.layer) else f" (of its part {shown(at)})"
                )
                message = str(e) if leaf.tensors.where in str(e) else f"{leaf.tensors.where}: {name}: {e}"
                raise ValueError(f"{message}{where}") from e
            yield layer, at, value


def shown(at: Index) -> str:
    """An index as text: `[0:8, 4:6]`."""
    return "[" + ", ".join(f"{cut.start}:{cut.stop}" for cut in at) + "]"


def pieces(leaf: Leaf, at: Index) -> list[Index]:
    """A part of a layer in a few rows of the files at a time; of packed ones, which may be expanded whole, in one."""
    if not at or any(name in leaf.tensors.packed for name in leaf.names):
        return [at]
    axis = len(at) - 1 if leaf.turned else 0
    size = math.prod(cut.stop - cut.start for i, cut in enumerate(at) if i != axis) * leaf.dtype.itemsize
    step = max(1, PIECE // max(1, size) // COLUMNS) * COLUMNS
    starts = range(at[axis].start, at[axis].stop, step)
    return [(*at[:axis], slice(start, min(start + step, at[axis].stop)), *at[axis + 1 :]) for start in starts]


def whole(leaf: Leaf) -> np.ndarray:
    """A leaf on the host, its layers stacked, in the files' dtype."""
    out = np.empty(leaf.shape, leaf.dtype)
    for layer, at, value in each(
        leaf, pieces(leaf, spans((), leaf.layer)), lambda *part: numbers(leaf, *part)
    ):
        copy_into((out[layer] if leaf.stacked else out)[at], value)
    return out


def copy_into(to: np.ndarray, value: np.ndarray) -> None:
    """`to[...] = value`; a transposed value some columns at a time, and dtypes that are not numpy's as the bits they are."""
    if to.dtype == value.dtype and to.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{to.dtype.itemsize}")
        to, value = to.view(bits), value.view(bits)
    if value.ndim < 2 or value.strides[-1] <= value.strides[-2]:
        to[...] = value
        return
    for start in range(0, value.shape[-1], COLUMNS):
        to[..., start : start + COLUMNS] = value[..., start : start + COLUMNS]
