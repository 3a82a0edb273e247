"""Merge a base and an adapter into one model's weights, one tensor at a time as it is written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxft import tree
from jaxft.models.model import Model
from jaxft.nn import lora
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import is_qtensor
from jaxft.tree import Params
from jaxft.weights.gather import layer_on_host
from jaxft.weights.hf import check_tensors
from jaxft.weights.model_files import Index, ModelFiles, full_index


@dataclass(frozen=True)
class LazyTensor:
    """A stacked parameter that `make(layer)` computes layer by layer; `make(None)` computes one without
    layers.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int | None], np.ndarray]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.make(layer)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self.make(None)


class RoundingError:
    """The accumulated rounding error of the weights that were made so far."""

    def __init__(self) -> None:
        self._error, self._total = 0.0, 0.0

    @property
    def fraction(self) -> float:
        """Root mean square of the error over that of the weights."""
        return (self._error / self._total) ** 0.5 if self._total else 0.0

    def add(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        """Add the rounding error of a weight and its rounded value."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by the writer
            self._error += float(np.square(exact - rounded, dtype=np.float64).sum())
            self._total += float(np.square(exact, dtype=np.float64).sum())

    def cast(self, leaf: LazyTensor, dtype: DTypeLike) -> LazyTensor:
        """Return the parameter in `dtype`; its error is added when it is made."""

        def make(layer: int | None) -> np.ndarray:
            exact = leaf.make(layer)
            with np.errstate(over="ignore"):
                value = exact.astype(dtype)
            self.add(exact, value.astype(exact.dtype))
            return value

        return LazyTensor(leaf.shape, np.dtype(dtype), make)


def merge_files(files: ModelFiles, model: Model, adapter: Params | None, dtype: DTypeLike) -> Params:
    """Merge an adapter (arrays, or None) into the base in a model's files; return LazyTensors in `dtype`.

    An adapted tied head becomes a head of its own. Raises ValueError if the files do not contain the model's
    tensors.
    """
    check_tensors(files, model)
    pairs = lora.pairs_by_path(adapter)
    shapes = {path: spec.shape for path, spec in spec_paths(model.specs).items()}
    if "head" in pairs and "head" not in shapes:
        shapes["head"] = shapes["embed"][::-1]
    leaves = {}
    for path, shape in shapes.items():
        name, transposed = model.weight_names.get(path, (model.weight_names["embed"][0], True))
        read = partial(_read_layer, files, name, transposed)
        leaves[path] = LazyTensor(
            shape, np.dtype(dtype), partial(_merge_layer, read, pairs.get(path), np.dtype(dtype))
        )
    return _nested(leaves)


def merge_on_read(files: ModelFiles, model: Model, adapter: Params) -> ModelFiles:
    """Return the files with an adapter merged into the weights, in float32, as they are read.

    Raises ValueError for an adapter of a tied head, which the files have no weight of.
    """
    merged: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # scaled a [in, R] and b [R, out] by weight name
    for path, pair in lora.pairs_by_path(adapter).items():
        if path not in model.weight_names:
            raise ValueError(
                f"{files.where}: an adapter of the head, which is tied to the embeddings, cannot be merged "
                "while it is read; write the merged model with scripts/export.py and use it as model="
            )
        name = model.weight_names[path][0]
        for i in range(pair["a"].shape[0]) if "{i}" in name else (None,):
            one = pair if i is None else {key: x[i] for key, x in pair.items()}
            a, b, scale = (np.asarray(one[key], np.float32) for key in ("a", "b", "scale"))
            merged[name.format(i=i)] = (a * scale, b)

    def read(name: str, index: Index = ()) -> np.ndarray:
        value = files.read(name, index)
        if name not in merged:
            return value
        (a, b), (outs, ins) = merged[name], full_index(index, files.shapes[name])
        return value.astype(np.float32) + (a[ins] @ b[:, outs]).T

    dtypes = {**files.dtypes, **dict.fromkeys(merged, np.dtype(np.float32))}
    quantised = {name: x for name, x in files.quantised.items() if name not in merged}
    return replace(files, dtypes=dtypes, read=read, quantised=quantised)


def merge_params(base: Params, adapter: Params | None, dtype: DTypeLike) -> Params:
    """Merge an adapter (or None) into a base tree as it is stored, also on the devices of several processes.

    The adapted parameters become LazyTensors in `dtype`; a layer is gathered and merged when it is fetched.
    An adapted tied head becomes a head of its own.
    """
    leaves, pairs = tree.paths(base, is_qtensor), lora.pairs_by_path(adapter)
    merged = dict(leaves)
    for path, pair in pairs.items():
        if path in leaves:
            shape, read = leaves[path].shape, partial(layer_on_host, leaves[path], transpose=False)
        elif path == "head":
            shape, read = leaves["embed"].shape[::-1], partial(layer_on_host, leaves["embed"], transpose=True)
        else:
            continue
        merged[path] = LazyTensor(shape, np.dtype(dtype), partial(_merge_stored_layer, read, pair, dtype))
    return _nested(merged)


def _read_layer(files: ModelFiles, name: str, transposed: bool, layer: int | None) -> np.ndarray:
    value = files.read(name.format(i=layer))
    return value.T if transposed else value


def _merge_layer(
    read: Callable[[int | None], np.ndarray], pair: Params | None, dtype: np.dtype, layer: int | None
) -> np.ndarray:
    value = read(layer)
    if pair is None:
        return value.astype(dtype)
    one = pair if layer is None else jax.tree.map(lambda x: x[layer], pair)
    return np.asarray(lora.merge_leaf(value, one, dtype))


def _merge_stored_layer(
    read: Callable[[int | None], np.ndarray], pair: dict[str, Any], dtype: DTypeLike, layer: int | None
) -> np.ndarray:
    weight = read(layer)
    one = {name: layer_on_host(x, layer, False) for name, x in pair.items()}
    return np.asarray(lora.merge_leaf(weight, one, dtype))


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Return nested dicts of leaves by path."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = out
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out
