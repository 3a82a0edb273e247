"""A base and an adapter as one model's weights, each tensor made when it is written: memory holds one tensor, not a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft import tree
from jaxft.models.model import Model
from jaxft.nn import lora
from jaxft.nn.param import spec_paths
from jaxft.nn.quant import is_qtensor
from jaxft.weights.hf import check, layer_array
from jaxft.weights.safetensors import Tensors


@dataclass(frozen=True)
class Lazy:
    """A stacked leaf that `make(layer)` gives layer by layer; `make(None)` is the whole of one without layers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[int | None], np.ndarray]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.make(layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.make(None)


class Rounding:
    """Rounds leaves and adds up what that loses."""

    def __init__(self) -> None:
        self._lost, self._whole = 0.0, 0.0

    @property
    def share(self) -> float:
        """The root mean square of the error over that of the weights, of all that was made so far."""
        return (self._lost / self._whole) ** 0.5 if self._whole else 0.0

    def add(self, exact: np.ndarray, value: np.ndarray) -> None:
        """A weight and what became of it."""
        self._lost += float(np.square(exact - value, dtype=np.float64).sum())
        self._whole += float(np.square(exact, dtype=np.float64).sum())

    def to(self, leaf: Lazy, dtype: Any) -> Lazy:
        """The leaf in `dtype`."""

        def make(layer: int | None) -> np.ndarray:
            exact = leaf.make(layer)
            value = exact.astype(dtype)
            self.add(exact, value.astype(exact.dtype))
            return value

        return Lazy(leaf.shape, np.dtype(dtype), make)


def merged(tensors: Tensors, model: Model, adapter: Any, dtype: Any) -> dict[str, Any]:
    """The base tree of a checkpoint with `adapter` (arrays, or None) folded in: Lazy leaves in `dtype`, for hf.save_folder.

    An adapted tied head becomes a head of its own. Raises ValueError where the files don't hold the model's tensors.
    """
    check(tensors, model)
    pairs = _pairs(adapter)
    shapes = {path: spec.shape for path, spec in spec_paths(model.specs).items()}
    if "head" in pairs and "head" not in shapes:
        shapes["head"] = shapes["embed"][::-1]
    out: dict[str, Any] = {}
    for path, shape in shapes.items():
        name, transpose = model.weight_names.get(path, (model.weight_names["embed"][0], True))
        *above, last = path.split("/")
        node = out
        for key in above:
            node = node.setdefault(key, {})
        node[last] = Lazy(
            shape, np.dtype(dtype), _maker(tensors, name, transpose, pairs.get(path), np.dtype(dtype))
        )
    return out


def folded(base: Any, adapter: Any, dtype: Any) -> dict[str, Any]:
    """A base tree as it is held, on the devices of one or several processes, with `adapter` (or None) folded in.

    Its adapted leaves are Lazy ones in `dtype`, for hf.save_folder; a layer of one is gathered and merged when it is fetched. An
    adapted tied head becomes a head of its own.
    """
    leaves, pairs = tree.paths(base, is_qtensor), _pairs(adapter)
    shapes = {path: leaves[path].shape for path in pairs if path in leaves}
    if "head" in pairs and "head" not in leaves:
        shapes["head"] = leaves["embed"].shape[::-1]
    made = {
        path: Lazy(shape, np.dtype(dtype), _folder(leaves, path, pairs[path], dtype))
        for path, shape in shapes.items()
    }
    out: dict[str, Any] = {}
    for path, leaf in {**leaves, **made}.items():
        *above, last = path.split("/")
        node = out
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return out


def _folder(
    leaves: dict[str, Any], path: str, pair: dict[str, Any], dtype: Any
) -> Callable[[int | None], np.ndarray]:
    def make(layer: int | None) -> np.ndarray:
        weight = (
            layer_array(leaves[path], layer, False)
            if path in leaves
            else layer_array(leaves["embed"], layer, True)
        )
        return np.asarray(
            lora.merge_leaf(weight, {name: layer_array(x, layer, False) for name, x in pair.items()}, dtype)
        )

    return make


def _maker(
    tensors: Tensors, name: str, transpose: bool, pair: Any, dtype: np.dtype
) -> Callable[[int | None], np.ndarray]:
    def make(layer: int | None) -> np.ndarray:
        value = tensors.read(name.format(i=layer))
        value = value.T if transpose else value
        if pair is None:
            return value.astype(dtype)
        one = pair if layer is None else jax.tree.map(lambda x: x[layer], pair)
        return np.asarray(lora.merge_leaf(value, one, dtype))

    return make


def _pairs(adapter: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.paths(adapter or {}).items():
        above, _, name = path.rpartition("/")
        found.setdefault(above, {})[name] = leaf
    return found
