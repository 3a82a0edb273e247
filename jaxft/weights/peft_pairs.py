"""LoRA pairs of a model's modules: their tensors in adapters' files, their leaves in an adapter's tree, and
the patterns, layer numbers and lists of modules by which PEFT's adapter_config.json declares their ranks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.lora import Adapter
from jaxft.nn.lora_patterns import matches_module
from jaxft.nn.lora_specs import PairRanks
from jaxft.weights.peft_modules import read_float, read_shaped
from jaxft.weights.peft_names import PREFIX
from jaxft.weights.safetensors import SafetensorsFiles
from jaxft.weights.tensors import Tensor, TensorTable, stack, tensors_of

MAGNITUDE = "lora_magnitude_vector"  # of DoRA


class Pair(NamedTuple):
    """A LoRA pair of one module: a [in, R], b [R, out], alpha; with DoRA magnitude [out]."""

    a: np.ndarray
    b: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The number of columns of a."""
        return self.a.shape[1]


def adaptable_tensors(model: Model) -> TensorTable:
    """Return the tensors of the weights that may have a pair, by path: linear layers, the table, and the head
    of a language model, also a tied one. Each tensor is the weight of one module.
    """
    table = tensors_of(model, tied_head=True)
    kernels = [path for path, (first, *_) in table.items() if first.is_kernel or path == "embed"]
    return {path: table[path] for path in sorted(kernels, key=lambda path: path != "head")}


def pair_names(tensor: Tensor, dora: bool = False) -> tuple[str, ...]:
    """Return the names of a module's tensors A [R, in] and B [out, R], with DoRA of its magnitude."""
    form = "lora_embedding_{}" if tensor.path == "embed" else "lora_{}.weight"
    ends = [form.format("A"), form.format("B"), *([MAGNITUDE] if dora else [])]
    return tuple(f"{PREFIX}{tensor.module}.{end}" for end in ends)


def read_pair(files: SafetensorsFiles, tensor: Tensor, config: dict[str, Any]) -> Pair | None:
    """Read the pair of a module, None if the files have none."""
    names, module, (ins, outs) = pair_names(tensor), tensor.module, tensor.values
    if not files.tensors.keys() & set(names):
        return None
    arrays = []
    for name in names:
        if name not in files.tensors:
            raise ValueError(f"{files.where}: tensor {name} is missing")
        shape = files.tensors[name].shape
        if len(shape) != 2:
            raise ValueError(f"{files.where}: {name} has shape {shape}, expected two dimensions")
        arrays.append(read_float(files, name).T)
    a, b = arrays
    rank = _matching(config, "rank_pattern", module, config["r"])
    if a.shape != (ins, rank) or b.shape != (rank, outs):
        raise ValueError(
            f"{files.where}: {module} has lora_A {a.T.shape} and lora_B {b.T.shape}; "
            f"rank {rank} on this model needs {(rank, ins)} and {(outs, rank)}"
        )
    alpha = float(_matching(config, "alpha_pattern", module, config["lora_alpha"]))
    if not config.get("use_dora"):
        return Pair(a, b, alpha)
    listed = "adapter_config.json has use_dora=true"
    return Pair(a, b, alpha, read_shaped(files, f"{PREFIX}{module}.{MAGNITUDE}", (outs,), listed))


def _matching(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """Apply PEFT's rule: the first pattern that matches the end of the module's name after a dot, or the
    whole name.
    """
    for pattern, value in (config.get(key) or {}).items():
        if matches_module(pattern, (module,), key):
            return value
    return default


def adapter_of(
    pairs: Mapping[str, Sequence[Pair | None]], default: Adapter, model: Model
) -> tuple[dict[str, dict[str, np.ndarray]], Adapter]:
    """Return the nodes {"a", "b", "scale"} by path of an adapter with these pairs, and settings that declare
    them.

    pairs: of each adapted kernel's modules in row-major order, None for a module without one. default: the
    settings of everything but ranks and alphas. Pairs are padded with zeros to the largest rank of a kernel.
    """
    nodes, layouts, table = {}, dict[str, PairRanks](), adaptable_tensors(model)
    for path, found in pairs.items():
        nodes[path] = _stacked(table[path], found, default)
        ranks = tuple(0 if pair is None else pair.rank for pair in found)
        layouts[path] = PairRanks(ranks, tuple(0.0 if pair is None else pair.alpha for pair in found))
    return nodes, with_patterns(default, layouts, model)


def _stacked(
    tensors: Sequence[Tensor], pairs: Sequence[Pair | None], settings: Adapter
) -> dict[str, np.ndarray]:
    """Return the leaves [L, in, R], [L, R, out] and [L] of a kernel, with DoRA [L, out]."""
    (ins, outs), without = tensors[0].values, np.float32
    none = Pair(np.zeros((ins, 0), without), np.zeros((0, outs), without), 0.0, np.zeros(outs, without))
    full = [none if pair is None else pair for pair in pairs]
    rank, dtypes = max(pair.rank for pair in full), {pair.a.dtype for pair in full}
    dtype = np.result_type(np.float32) if len(dtypes) > 1 else full[0].a.dtype
    scales = [settings.scale_of(x.rank, x.alpha) if x.rank else settings.scale for x in full]
    leaves: dict[str, Any] = {
        "a": [np.pad(x.a, ((0, 0), (0, rank - x.rank))).astype(dtype) for x in full],
        "b": [np.pad(x.b, ((0, rank - x.rank), (0, 0))).astype(dtype) for x in full],
        "scale": [np.float32(scale) for scale in scales],
    }
    if settings.dora:
        leaves["magnitude"] = [np.asarray(x.magnitude, dtype) for x in full]
    return {name: stack(tensors, values) for name, values in leaves.items()}


def with_patterns(default: Adapter, layouts: Mapping[str, PairRanks], model: Model) -> Adapter:
    """Return the settings that declare these pairs. default: those of everything but ranks and alphas."""
    targets = tuple(path.rpartition("/")[2] for path in layouts)
    return replace(with_module_names(default, layouts, model), targets=targets)


def with_module_names(
    default: Adapter, layouts: Mapping[str, PairRanks], model: Model, full_names: bool = False
) -> Adapter:
    """Return the settings that declare pairs of these ranks and alphas, by path, with the names of modules in
    Hugging Face files as targets. full_names: name every module with its layer.
    """
    table = adaptable_tensors(model)
    ranked = {path: list(zip(table[path], x.ranks, x.alphas, strict=True)) for path, x in layouts.items()}
    present = {path: [x for x in modules if x[1]] for path, modules in ranked.items()}
    stacked = [path for path in layouts if table[path][0].index]
    missing = [tensor for path in stacked for tensor, rank, _ in ranked[path] if not rank]
    numbers = {tensor.layer for path in stacked for tensor, *_ in present[path]}
    layers = tuple(sorted(number for number in numbers if number is not None))
    in_layers = missing and all(
        bool(rank) == (tensor.layer in layers) for path in stacked for tensor, rank, _ in ranked[path]
    )
    by_name = full_names or bool(missing and not in_layers)
    # with layers_to_transform PEFT looks for a layer's number in every name, except in those written in full
    ends = [
        tensor.module if in_layers and not tensor.index else tensor.module.rpartition(".")[2]
        for modules in present.values()
        for tensor, *_ in modules
    ]
    named = [tensor.module for modules in present.values() for tensor, *_ in modules]
    return replace(
        default,
        targets=tuple(sorted(set(named if by_name else ends))),
        layers_to_transform=layers if in_layers and not by_name else None,
        exclude_modules=() if in_layers else tuple(tensor.module for tensor in missing),
        rank_pattern=tuple((k, int(v)) for x in present.values() for k, v in _pattern_of(x, 1, default.rank)),
        alpha_pattern=tuple(item for x in present.values() for item in _pattern_of(x, 2, default.alpha)),
    )


def _pattern_of(
    modules: Sequence[tuple[Any, ...]], field: int, default: float
) -> Iterator[tuple[str, float]]:
    """Yield the pattern and the value of modules that differ from the default: one for all of a kernel where
    they agree, else one for each.
    """
    values = {module[0]: module[field] for module in modules}
    if set(values.values()) == {default}:
        return
    if len(set(values.values())) == 1:
        names = {re.sub(r"\.\d+\.", r".\\d+.", tensor.in_layer): value for tensor, value in values.items()}
        yield from names.items()
        return
    for tensor, value in values.items():
        if value != default:
            yield tensor.module, value
