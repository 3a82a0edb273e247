"""The table of a model's tensors in its files: which part of which parameter each of them is.

Readers, writers, adapters' files, merging, extraction and calibration iterate over it, so that none of them
knows how tensors are named, or along which axes the files split a parameter.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.distributed import sharding, sync
from jaxft.models.model import Model
from jaxft.nn.adapters.full_modules import base_spec
from jaxft.nn.param import ParamSpec, spec_paths
from jaxft.nn.quant import dequantize, is_qtensor
from jaxft.nn.tensor_names import TIED_HEAD, WeightNames, numbers_at
from jaxft.weights.model_files import Index, ModelFiles, full_index


@dataclass(frozen=True)
class Tensor:
    """A tensor in a model's files, or the part of one that belongs to a parameter.

    path: of the parameter. index: where its values are along the parameter's leading axes, () for all of the
    parameter. name, shape: in the files. transposed: whether the files store [out, in]. values: the shape of
    its values in the parameter, [..., in, out] of a kernel. offset: number of the first of its outputs in a
    tensor that several parameters share, None in one of its own. is_kernel: whether it is the weight of one
    linear layer and nothing else. layer: the number of the layer in the model, None outside layers. in_layer:
    the name of its module inside its layer, such as mlp.gate_proj; outside layers the whole name.

    `tensors_of(model)["layers/attn/q"][3].name` is "model.layers.3.self_attn.q_proj.weight".
    """

    path: str
    index: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool
    values: tuple[int, ...]
    offset: int | None = None
    is_kernel: bool = False
    layer: int | None = None
    in_layer: str = ""

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    def turned(self, values: Any) -> Any:
        """Return values in the files as they are in the parameter, or the other way round."""
        return values.swapaxes(-1, -2) if self.transposed else values

    def in_file(self, index: Index) -> Index:
        """Return where in the files the values at `index` are."""
        if self.offset is None and not index:
            return ()
        *above, outs = full_index(index, self.values)
        first = self.offset or 0
        outs = slice(outs.start + first, outs.stop + first)
        return (*above[:-1], outs, above[-1]) if self.transposed else (*above, outs)

    def read(self, files: ModelFiles, index: Index = ()) -> np.ndarray:
        """Read its values, or the part of them at `index`, from the files."""
        return self.turned(files.read(self.name, self.in_file(index)))


TensorTable = dict[str, tuple[Tensor, ...]]  # by path of the parameter, in row-major order of the index


def tensors_of(model: Model, tied_head: bool = False) -> TensorTable:
    """Return the tensors of each parameter of a model's base.

    tied_head: with the "head" of a language model whose head is the embedding. It has no tensor in the
    model's files, but may have one in an adapter's, and in those of a merged model.
    """
    specs = spec_paths(model.specs.get("base", model.specs))
    names = {path: model.weight_names[path] for path in specs}
    if tied_head and model.generates and "head" not in specs:
        specs["head"], names["head"] = base_spec(specs, "head"), TIED_HEAD
    return {path: _tensors(path, names, specs) for path in specs}


def _tensors(path: str, names: WeightNames, specs: Mapping[str, ParamSpec]) -> tuple[Tensor, ...]:
    name, spec, offset, outs = names[path], specs[path], None, specs[path].shape[-1]
    if name.part is not None:
        sharing = {x.part: specs[other].shape[-1] for other, x in names.items() if x[:2] == name[:2]}
        offset, outs = sum(sharing[part] for part in range(name.part)), sum(sharing.values())
    tensors = []
    for index, numbers in numbers_at(spec, name.axes(spec)).items():
        values = spec.shape[len(index) :]
        shape = (*values[:-1], outs)
        shape = (*shape[:-2], shape[-1], shape[-2]) if name.transposed else shape
        full_name, in_layer = (template.format(**numbers) for template in (name.template, name.in_layer))
        of_file = name.transposed, values, offset, name.is_linear(spec)
        tensors.append(Tensor(path, index, full_name, shape, *of_file, numbers.get("i"), in_layer))
    return tuple(tensors)


def stack(tensors: Sequence[Tensor], values: Sequence[np.ndarray]) -> np.ndarray:
    """Return a parameter from the values of all its tensors, which are in the same order."""
    lead = tuple(n + 1 for n in tensors[-1].index)
    return np.stack(values).reshape(lead + np.shape(values[0]))


def tensor_on_host(parts: Sequence[Tensor], leaves: Mapping[str, Any]) -> np.ndarray:
    """Return a tensor as it is in the files. parts: of all parameters that are in it, which `leaves` has by
    path.
    """
    in_order = sorted(parts, key=lambda part: part.offset or 0)
    values = [layer_on_host(leaves[part.path], part.index) for part in in_order]
    return parts[0].turned(np.concatenate(values, -1) if len(values) > 1 else values[0])


def layer_on_host(leaf: Any, index: tuple[int, ...] = ()) -> np.ndarray:
    """Return a parameter at an index along its leading axes (all of it for ()) on the host, a QTensor
    dequantised.

    If several processes store it, only that part is gathered, and all of them call this.
    """
    leaf = jax.tree.map(lambda x: _take(x, index), leaf)
    return np.asarray(dequantize(leaf) if is_qtensor(leaf) else leaf)


def _take(x: Any, index: tuple[int, ...]) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        sync.wait_for_all()  # process 0 may still be writing the previous one
        mesh: Any = x.sharding.mesh  # type: ignore[attr-defined]
        return _gather_part(sharding.replicated(mesh))(x, tuple(map(np.int32, index)))
    return x[index] if index else x


@functools.cache
def _gather_part(replicated: Sharding) -> Callable[..., jax.Array]:
    """Compile once for all layers: the index is an argument."""

    def part(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        for number in index:
            x = jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
        return x

    return jax.jit(part, out_shardings=replicated)
