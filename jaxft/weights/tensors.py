"""Tensors in a model's files: read by Hugging Face name from every format, and listed by parameter.

Readers, writers, adapters' files, merging, extraction and calibration use the table (`tensors_of`), so that
none of them knows how tensors are named, or along which axes the files split a parameter. Values are checked
to be finite when they are read and written.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from jaxft.distributed import sharding, sync
from jaxft.models.model import Model
from jaxft.nn.adapters.full_modules import base_spec
from jaxft.nn.param_spec import ParamSpec, spec_paths
from jaxft.nn.quant import QTensor, dequantize, is_qtensor
from jaxft.nn.tensor_names import TIED_HEAD, WeightNames, numbers_at

Index = tuple[slice, ...]  # of an array's leading dimensions; the other dimensions are taken in full
ReadPart = Callable[[Index], np.ndarray]

# A 16-bit float is infinite or NaN if its bits without the sign are at least this number. Comparing bits is
# many times as fast as np.isfinite for these dtypes.
INFINITE_BITS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
ADVICE = "repair the file, or download it again"


@dataclass(frozen=True)
class QuantisedTensor:
    """A weight [in, out] that the files store quantised.

    method: the quantisation method, for messages. layout: a QTensor of ShapeDtypeStructs that represents
    exactly the values in the files; None if no QTensor can. read(index): returns the weight, or the part of
    it at `index` [in, out], which begins and ends at blocks, as a QTensor of NumPy arrays; if layout is None,
    call it without an index: it returns float32. reason: why layout is None, or larger than the files, or "".
    tensors: names in the files of the codes and scales that make up the weight, empty if the weight is one
    tensor under its usual name.
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

    shape, dtype: of its values, dequantised if it is quantised. read(index): returns a part of the values in
    fresh memory. quantised: the weight as the files store it, None for a plain tensor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: ReadPart
    quantised: QuantisedTensor | None = None


@dataclass(frozen=True)
class ModelFiles:
    """The tensors of a model by name. where: the file or folder, for messages. ignored: names of tensors of a
    multimodal model that do not belong to its text decoder.
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


@dataclass(frozen=True)
class Tensor:
    """A tensor in a model's files, or the part of one that belongs to a parameter.

    path: path of the parameter. index: where the values are along the parameter's leading axes, such as the
    layer; () if the tensor is the whole parameter. name, shape: of the tensor in the files. transposed:
    whether the files store [out, in]. values: shape of the values in the parameter, [..., in, out] for a
    kernel. offset: the parameter's first output in a tensor that several parameters share; None if none share
    it. is_kernel: whether the tensor is the weight of one linear layer. layer: number of the layer in the
    model, None outside layers. in_layer: name of the module inside the layer, such as mlp.gate_proj; the full
    name outside layers.
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
        """The name of the linear layer or norm in the files: the tensor's name without .weight or .bias."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    def turned(self, values: Any) -> Any:
        """Transpose values from the files' layout to the parameter's, or back, if the two layouts differ."""
        return values.swapaxes(-1, -2) if self.transposed else values

    def in_file(self, index: Index) -> Index:
        """Return the index in the stored tensor of the values at `index` [..., in, out]."""
        if self.offset is None and not index:
            return ()
        *above, outs = full_index(index, self.values)
        first = self.offset or 0
        outs = slice(outs.start + first, outs.stop + first)
        return (*above[:-1], outs, above[-1]) if self.transposed else (*above, outs)

    def read(self, files: ModelFiles, index: Index = ()) -> np.ndarray:
        """Read the values, or the part of them at `index`, in the parameter's layout."""
        return self.turned(files.read(self.name, self.in_file(index)))


TensorTable = dict[str, tuple[Tensor, ...]]  # by path of the parameter, in row-major order of the index


def tensors_of(model: Model, tied_head: bool = False) -> TensorTable:
    """Map each parameter of a model's base to its tensors in Hugging Face files.

    tied_head: also list the "head" of a language model whose head is the embedding. The model's own files do
    not contain this tensor, but an adapter or a merged model may.

    >>> from jaxft.weights.pretrained import model_for
    >>> tensors_of(model_for("HuggingFaceTB/SmolLM2-135M"))["layers/attn/q"][3].name
    'model.layers.3.self_attn.q_proj.weight'
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
    """Stack values, one array for each of the `tensors` of a parameter, into the parameter."""
    lead = tuple(n + 1 for n in tensors[-1].index)
    return np.stack(values).reshape(lead + np.shape(values[0]))


def tensor_on_host(parts: Sequence[Tensor], leaves: Mapping[str, Any]) -> np.ndarray:
    """Return a tensor of the files in their layout. parts: its entries in tensors_of, several if it contains
    several parameters. leaves: parameters by path.
    """
    in_order = sorted(parts, key=lambda part: part.offset or 0)
    values = [layer_on_host(leaves[part.path], part.index) for part in in_order]
    return parts[0].turned(np.concatenate(values, -1) if len(values) > 1 else values[0])


def layer_on_host(leaf: Any, index: tuple[int, ...] = ()) -> np.ndarray:
    """Return the part of a parameter at an index along its leading axes on the host; () means all of it. A
    QTensor is dequantised.

    If the parameter is sharded over processes, all of them call this, and only that part is gathered.
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
    """Return a compiled function that gathers a part of an array; one serves all layers."""

    def part(x: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        for number in index:
            x = jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
        return x

    return jax.jit(part, out_shardings=replicated)


# Checks that values are finite


def is_finite(x: np.ndarray) -> bool:
    """Return whether no value of an array is infinite or NaN. True for integers."""
    if x.dtype in INFINITE_BITS:
        positive, negative = x.view(np.int16).max(initial=0), x.view(np.uint16).max(initial=0)
        return int(positive) < INFINITE_BITS[x.dtype] and int(negative) < 0x8000 + INFINITE_BITS[x.dtype]
    if x.dtype in (np.float32, np.float64):
        return bool(np.isfinite(x).all())
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        return True
    return bool(np.isfinite(x.astype(np.float32)).all())  # 8-bit floats


def require_finite(x: np.ndarray, advice: str = ADVICE) -> np.ndarray:
    """Return the array. Raises ValueError with count and first place of non-finite values, and `advice`."""
    if not is_finite(x):
        bad = ~np.isfinite(x.astype(np.float32))
        first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{int(bad.sum())} of {x.size} values are NaN or infinite, the first at [{first}]; {advice}"
        )
    return x


def require_finite_scales(x: Any) -> Any:
    """Return `x` unchanged. Raises ValueError if it is a QTensor with scales that are not finite."""
    if isinstance(x, QTensor):
        for name in ("scale", "offset", "outer", "mean"):
            array = getattr(x, name)
            if array is not None and not is_finite(np.asarray(array)):
                raise ValueError(f"its quantisation array {name!r} has NaN or infinite values; {ADVICE}")
    return x


def cast_finite(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast finite floats. Raises ValueError where a value is too large for `dtype`."""
    with np.errstate(over="ignore"):
        out = x.astype(dtype, copy=False)
    narrower = float(ml_dtypes.finfo(out.dtype).max) < float(ml_dtypes.finfo(x.dtype).max)
    if narrower and not is_finite(out):
        largest = float(np.abs(x).max())
        fits = largest <= float(np.finfo(np.float32).max)
        remedy = "dtype=float32, or another model" if fits else "another model"
        raise ValueError(f"some values are too large for {out.dtype}, up to {largest:.3g}; use {remedy}")
    return out


@contextlib.contextmanager
def errors_name(where: str) -> Iterator[None]:
    """Add `where`, such as a file and a tensor in it, to the front of a ValueError raised in the context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
