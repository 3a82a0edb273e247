"""Merge a base and an adapter into one model's weights, one tensor at a time as it is written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft import tree
from jaxft.models.model import Model
from jaxft.nn import dora, lora, replaced
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


def merge_files(
    files: ModelFiles,
    model: Model,
    adapter: Params | None,
    dtype: DTypeLike,
    token_ids: tuple[int, ...] = (),
) -> Params:
    """Merge an adapter (arrays, or None) into the base in a model's files; return LazyTensors in `dtype`.

    token_ids: the tokens of replaced rows. A tied head becomes a head of its own where the adapter changes
    it, or the table alone. Raises ValueError if the files do not contain the model's tensors.
    """
    check_tensors(files, model)
    pairs = lora.pairs_by_path(adapter)
    shapes = {path: spec.shape for path, spec in spec_paths(model.specs).items()}
    if replaced.unties(pairs) and "head" not in shapes and model.generates:
        shapes["head"] = shapes["embed"][::-1]
    leaves = {}
    for path, shape in shapes.items():
        name, transposed = model.weight_names.get(path, (model.weight_names["embed"][0], True))
        table = None if path in model.weight_names else pairs.get("embed")
        read = _with_rows(partial(_read_layer, files, name, transposed), table, token_ids)
        fold = partial(lora.merge_node, path, dtype=np.dtype(dtype), token_ids=token_ids)
        leaves[path] = LazyTensor(
            shape, np.dtype(dtype), partial(_merge_layer, read, pairs.get(path), fold, np.dtype(dtype))
        )
    return _nested(leaves)


def merge_on_read(
    files: ModelFiles, model: Model, adapter: Params, token_ids: tuple[int, ...] = ()
) -> ModelFiles:
    """Return the files with an adapter merged into the weights, in float32, as they are read.

    Raises ValueError for an adapter that gives a tied head a matrix of its own, which the files have not.
    """
    nodes = lora.pairs_by_path(adapter)
    if replaced.unties(nodes) and "head" not in model.weight_names and model.generates:
        raise ValueError(
            f"{files.where}: an adapter of the head or the embeddings, which are tied, cannot be merged "
            "while they are read; write the merged model with scripts/export.py and use it as model="
        )
    merged: dict[str, _Merged] = {}
    for path, node in nodes.items():
        name, transposed = model.weight_names[path]
        for i in range(next(iter(node.values())).shape[0]) if "{i}" in name else (None,):
            merged[name.format(i=i)] = _Merged(path, transposed, node, i, token_ids)

    def read(name: str, index: Index = ()) -> np.ndarray:
        if name not in merged:
            return files.read(name, index)
        one, shape = merged[name], files.shapes[name]
        if "magnitude" in one.node:  # norms are over all inputs
            whole = one.part(files.read(name).astype(np.float32), full_index((), shape))
            return one.rescaled(whole)[full_index(index, shape)]
        return one.part(files.read(name, index).astype(np.float32), full_index(index, shape))

    dtypes = {**files.dtypes, **dict.fromkeys(merged, np.dtype(np.float32))}
    quantised = {name: x for name, x in files.quantised.items() if name not in merged}
    return replace(files, dtypes=dtypes, read=read, quantised=quantised)


@dataclass(frozen=True)
class _Merged:
    """What an adapter does to one tensor in the files: its node at `path`, in layer `layer` if stacked."""

    path: str
    transposed: bool
    node: Params
    layer: int | None
    token_ids: tuple[int, ...]

    def leaf(self, name: str) -> np.ndarray:
        """One layer of a leaf of the node, in float32."""
        value = self.node[name]
        return np.asarray(value if self.layer is None else value[self.layer], np.float32)

    def rescaled(self, value: np.ndarray) -> np.ndarray:
        """Return a weight [out, in] with DoRA's magnitudes as norms."""
        return np.asarray(dora.rescaled(jnp.asarray(value.T), jnp.asarray(self.leaf("magnitude")))).T

    def part(self, value: np.ndarray, index: Index) -> np.ndarray:
        """Return the part of the merged tensor at a full index in the files, whose base is `value`."""
        if "weight" in self.node:
            whole = self.leaf("weight")
            return (whole.T if self.transposed else whole)[index]
        if "rows" in self.node:
            value, rows = value.copy(), self.leaf("rows")
            for number, token in enumerate(self.token_ids):
                if index[0].start <= token < index[0].stop:
                    value[token - index[0].start] = rows[number][index[1]]
            return value
        outs, ins = index if self.transposed else index[::-1]
        low = (self.leaf("a")[ins] * self.leaf("scale")) @ self.leaf("b")[:, outs]
        return value + (low.T if self.transposed else low)


def merge_params(
    base: Params, adapter: Params | None, dtype: DTypeLike, token_ids: tuple[int, ...] = ()
) -> Params:
    """Merge an adapter (or None) into a base tree as it is stored, also on the devices of several processes.

    The adapted parameters become LazyTensors in `dtype`; a layer is gathered and merged when it is fetched. A
    tied head becomes a head of its own where the adapter changes it, or the table alone.
    """
    leaves = tree.paths(base, is_qtensor)
    pairs: dict[str, Any] = dict(lora.pairs_by_path(adapter))
    merged = dict(leaves)
    if replaced.unties(pairs) and "head" not in leaves and "head" not in pairs:
        pairs["head"] = None
    for path, pair in pairs.items():
        if path in leaves:
            shape, table = leaves[path].shape, None
            read = partial(layer_on_host, leaves[path], transpose=False)
        elif path == "head":
            shape, table = leaves["embed"].shape[::-1], pairs.get("embed")
            read = partial(layer_on_host, leaves["embed"], transpose=True)
        else:
            continue
        fold = partial(lora.merge_node, path, dtype=dtype, token_ids=token_ids)
        make = partial(_merge_stored_layer, _with_rows(read, table, token_ids), pair, fold, np.dtype(dtype))
        merged[path] = LazyTensor(shape, np.dtype(dtype), make)
    return _nested(merged)


def _read_layer(files: ModelFiles, name: str, transposed: bool, layer: int | None) -> np.ndarray:
    value = files.read(name.format(i=layer))
    return value.T if transposed else value


def _with_rows(
    read: Callable[[int | None], np.ndarray], table: Params | None, token_ids: tuple[int, ...]
) -> Callable[[int | None], np.ndarray]:
    """Return the reader of a head that was tied to a table, with the rows that the adapter replaces there."""
    if not table or "rows" not in table:
        return read

    def replacing(layer: int | None) -> np.ndarray:
        rows = {"rows": layer_on_host(table["rows"], None, False)}
        return np.asarray(replaced.merge_replacement("head", read(layer), rows, np.float32, token_ids))

    return replacing


def _merge_layer(
    read: Callable[[int | None], np.ndarray],
    pair: Params | None,
    fold: Callable[..., jax.Array],
    dtype: np.dtype,
    layer: int | None,
) -> np.ndarray:
    value = read(layer)
    if pair is None:
        return value.astype(dtype)
    one = pair if layer is None else jax.tree.map(lambda x: x[layer], pair)
    return np.asarray(fold(value, one))


def _merge_stored_layer(
    read: Callable[[int | None], np.ndarray],
    pair: dict[str, Any] | None,
    fold: Callable[..., jax.Array],
    dtype: np.dtype,
    layer: int | None,
) -> np.ndarray:
    weight = read(layer)
    if pair is None:
        return weight.astype(dtype)
    return np.asarray(fold(weight, {name: layer_on_host(x, layer, False) for name, x in pair.items()}))


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
