"""Merge a base and an adapter into one model's weights, one tensor at a time as it is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters import full_modules, lora
from jaxft.nn.quant import is_qtensor
from jaxft.nn.tree import Params
from jaxft.weights.param_loading import ParamReader, read_whole
from jaxft.weights.tensors import Index, Tensor, full_index, layer_on_host


@dataclass(frozen=True)
class LazyTensor:
    """A parameter that is computed when it is needed. make(index): returns the part at an index along the
    leading axes, such as a layer; all of it for ().
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[tuple[int, ...]], np.ndarray]

    def __getitem__(self, index: int | tuple[int, ...]) -> np.ndarray:
        return self.make(index if isinstance(index, tuple) else (index,))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self.make(())

    def map(self, dtype: DTypeLike, fn: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        """Return the parameter with `fn` applied to each part; `fn` returns values of dtype `dtype`."""
        return LazyTensor(self.shape, np.dtype(dtype), lambda index: fn(self.make(index)))

    def astype(self, dtype: DTypeLike) -> "LazyTensor":
        """Return the parameter in another dtype."""
        return self.map(dtype, lambda x: x.astype(dtype, copy=False))


class RoundingError:
    """Accumulates the rounding error of weights while they are cast to a narrower dtype."""

    def __init__(self) -> None:
        self._error, self._total = 0.0, 0.0

    @property
    def fraction(self) -> float:
        """Root mean square of all errors so far, divided by the root mean square of the weights."""
        return (self._error / self._total) ** 0.5 if self._total else 0.0

    def add(self, exact: np.ndarray, rounded: np.ndarray) -> None:
        """Add the error of a weight to the accumulated error. rounded: the weight after rounding."""
        with np.errstate(over="ignore", invalid="ignore"):  # the writer refuses values that are not finite
            self._error += float(np.square(exact - rounded, dtype=np.float64).sum())
            self._total += float(np.square(exact, dtype=np.float64).sum())

    def cast(self, leaf: LazyTensor, dtype: DTypeLike) -> LazyTensor:
        """Return the parameter in `dtype`; each part, when it is computed, adds its error to the total."""

        def rounded(exact: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):
                value = exact.astype(dtype)
            self.add(exact, value.astype(exact.dtype))
            return value

        return leaf.map(dtype, rounded)


def merge_files(
    readers: Mapping[str, ParamReader],
    model: Model,
    adapter: Params | None,
    dtype: DTypeLike,
    token_ids: tuple[int, ...] = (),
) -> Params:
    """Merge an adapter into the base in a model's files. Return the tree of LazyTensors in `dtype`.

    adapter: a tree of arrays; None for the base alone. token_ids: the tokens whose rows the adapter replaces.
    A tied head is untied if the adapter changes the head, or only the embedding table.
    """
    merged = tree.paths(merge_params(lazy_params(readers), adapter, dtype, token_ids))
    paths = [path for path in merged if path != "head" or model.generates]
    return tree.nested({path: merged[path].astype(dtype) for path in paths})


def lazy_params(readers: Mapping[str, ParamReader]) -> Params:
    """Return the parameters in a model's files, each read when it is needed, in the readers' dtypes."""
    return tree.nested({path: _read_lazily(reader) for path, reader in readers.items()})


def _read_lazily(reader: ParamReader) -> LazyTensor:
    tensors = {tensor.index: tensor for tensor in reader.tensors}

    def make(index: tuple[int, ...]) -> np.ndarray:
        return reader.read(tensors[index]) if index in tensors else read_whole(reader)[index]

    return LazyTensor(reader.shape, reader.dtype, make).astype(reader.dtype)


def merge_on_read(
    readers: Mapping[str, ParamReader], model: Model, adapter: Params, token_ids: tuple[int, ...] = ()
) -> dict[str, ParamReader]:
    """Return readers that merge an adapter into the weights, in float32, when they are read.

    token_ids: the tokens whose rows the adapter replaces. Raises ValueError for an adapter that unties a tied
    head, since the files have no tensor for the untied head.
    """
    nodes, out = lora.pairs_by_path(adapter), dict(readers)
    if full_modules.unties(nodes) and "head" not in readers and model.generates:
        where = readers["embed"].files.where
        raise ValueError(
            f"{where}: an adapter of the head or the embeddings, which are tied, cannot be merged while the "
            "files are read; write the merged model with scripts/export.py and use it as model="
        )
    for path, node in nodes.items():
        changed = partial(_merged_part, readers[path], node, token_ids)
        out[path] = replace(readers[path], dtype=np.dtype(np.float32), layout=None, changed=changed)
    return out


def _merged_part(
    reader: ParamReader, node: Params, token_ids: tuple[int, ...], tensor: Tensor, index: Index = ()
) -> np.ndarray:
    """Return the part of a tensor at `index`, merged with the adapter's leaves for it, `node`."""
    if "magnitude" in node and index:  # norms are over all inputs
        return _merged_part(reader, node, token_ids, tensor)[index]
    index = full_index(index, tensor.values)

    def leaf(name: str, *part: Any) -> np.ndarray:
        return layer_on_host(node[name], tensor.index)[part].astype(np.float32)

    if "weight" in node:
        return leaf("weight", *index)
    value: Any = reader.read(tensor, index).astype(np.float32)
    if "rows" in node:
        (tokens, dims), table, rows = tensor.in_file(index), tensor.turned(value), leaf("rows")
        for number, token in enumerate(token_ids):
            if tokens.start <= token < tokens.stop:
                table[token - tokens.start] = rows[number][dims]
        return value
    *lead, ins, outs = index
    a, b = leaf("a", *lead, ins), leaf("b", *lead, slice(None), outs)
    value = value + (a * leaf("scale", *lead, None, None)) @ b
    if "magnitude" in node:
        return np.asarray(lora.rescaled(jnp.asarray(value), jnp.asarray(leaf("magnitude"))))
    return value


def merge_params(
    base: Params, adapter: Params | None, dtype: DTypeLike, token_ids: tuple[int, ...] = ()
) -> Params:
    """Merge an adapter (or None) into a base tree, which may be sharded over the devices of several
    processes.

    The adapted parameters become LazyTensors in `dtype`; a layer is gathered and merged when it is fetched.
    token_ids, and when a tied head is untied: see merge_files.
    """
    leaves, nodes = tree.paths(base, is_qtensor), lora.pairs_by_path(adapter)
    merged = dict(leaves)
    for path, node in nodes.items():
        if path in leaves:
            merged[path] = _merged(path, leaves[path], node, dtype, token_ids)
    if full_modules.unties(nodes) and "head" not in leaves:
        table, of_table = leaves["embed"], nodes.get("embed", {})
        head = LazyTensor(table.shape[::-1], np.dtype(table.dtype), lambda _: layer_on_host(table).T)
        head = _merged("head", head, of_table, np.float32, token_ids) if "rows" in of_table else head
        of_head = nodes.get("head")
        merged["head"] = _merged("head", head, of_head, dtype, token_ids) if of_head else head.astype(dtype)
    return tree.nested(merged)


def _merged(path: str, leaf: Any, node: Params, dtype: DTypeLike, token_ids: tuple[int, ...]) -> LazyTensor:
    def make(index: tuple[int, ...]) -> np.ndarray:
        weight = layer_on_host(leaf, index)
        of_part = {name: layer_on_host(x, index) for name, x in node.items()}
        if full_modules.is_replacement(of_part):
            return np.asarray(full_modules.merge_replacement(path, weight, of_part, dtype, token_ids))
        return np.asarray(lora.merge_leaf(weight, of_part, dtype))

    return LazyTensor(leaf.shape, np.dtype(dtype), make)
