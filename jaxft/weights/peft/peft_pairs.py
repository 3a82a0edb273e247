"""LoRA pairs of a model's modules: their tensors in adapters' files, their leaves in an adapter's tree, and
the patterns, layer numbers and lists of modules by which PEFT's adapter_config.json declares their ranks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxft.models.model import Model
from jaxft.nn.adapters.full_modules import base_modules
from jaxft.nn.adapters.lora import Adapter, target_paths
from jaxft.nn.adapters.lora_specs import PairRanks
from jaxft.nn.param import spec_paths
from jaxft.nn.tensor_names import ModuleNames, matches_module
from jaxft.weights.hf.safetensors import SafetensorsFiles
from jaxft.weights.peft.peft_modules import read_float, read_shaped
from jaxft.weights.peft.peft_names import PREFIX
from jaxft.weights.tensors import Tensor, TensorTable, stack, tensors_of

MAGNITUDE = "lora_magnitude_vector"  # of DoRA
Number = TypeVar("Number", int, float)


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


def ranked_modules(layouts: Mapping[str, PairRanks], model: Model) -> dict[Tensor, tuple[int, float]]:
    """Return the rank and alpha of each module that has a pair. layouts: by path."""
    table = adaptable_tensors(model)
    return {
        tensor: (rank, alpha)
        for path, layout in layouts.items()
        for tensor, rank, alpha in zip(table[path], *layout, strict=True)
        if rank
    }


def with_patterns(default: Adapter, layouts: Mapping[str, PairRanks], model: Model) -> Adapter:
    """Return the settings that declare these pairs. default: those of everything but ranks and alphas."""
    ranked, base = ranked_modules(layouts, model), model.specs.get("base", model.specs)
    targets = tuple(dict.fromkeys(one.path.rpartition("/")[2] for one in ranked))
    modules = base_modules(spec_paths(base), model.weight_names)
    paths = target_paths(base, targets) if targets else []
    selected = {module.names: module.layer for path in paths for module in modules[path]}
    return replace(_declared(default, ranked, selected), targets=targets)


def with_module_names(
    default: Adapter, layouts: Mapping[str, PairRanks], model: Model, full_names: bool = False
) -> Adapter:
    """Return the settings that declare pairs of these ranks and alphas, by path, with the names of modules in
    Hugging Face files as targets, as PEFT reads them. full_names: name every module with its layer.
    """
    ranked, layers = ranked_modules(layouts, model), dict[str, int | None]()
    for tensors in tensors_of(model, tied_head=True).values():
        layers |= {tensor.module: tensor.layer for tensor in tensors}
    ends = {one.module.rpartition(".")[2] for one in ranked}
    selected: dict[ModuleNames, int | None] = {
        (name,): layer for name, layer in layers.items() if name.rpartition(".")[2] in ends
    }
    declared = _declared(default, ranked, selected)
    # versions of PEFT differ in which one of two numbers in a name is the layer's
    two_numbers = declared.layers_to_transform and any(re.search(r"\.\d+\.", x.in_layer) for x in ranked)
    if full_names or two_numbers or declared.exclude_modules:
        ends = {one.module for one in ranked}
        declared = replace(declared, layers_to_transform=None)
    elif declared.layers_to_transform:  # PEFT looks for a layer's number in all names but those in full
        ends = {one.module if one.layer is None else one.module.rpartition(".")[2] for one in ranked}
    return replace(declared, targets=tuple(sorted(ends)), exclude_modules=())


def _declared(
    default: Adapter,
    ranked: Mapping[Tensor, tuple[int, float]],
    selected: Mapping[ModuleNames, int | None],
) -> Adapter:
    """Return settings with the ranks and alphas of modules, and the layers to which these are limited, or the
    names of the other modules that the targets select.

    selected: the layers of all modules that the targets select, by the names that patterns match.
    """
    wanted = {one.module: one for one in ranked}
    limits = {layer for (name, *_), layer in selected.items() if name in wanted and layer is not None}
    limited = {name for (name, *_), layer in selected.items() if layer is None or layer in limits}
    excluded = [name for name, *_ in selected if name not in wanted]
    in_layers = bool(excluded and limits) and limited == wanted.keys()
    names = {wanted[of[0]]: of for of in selected if of[0] in wanted}
    ranks = {one: rank for one, (rank, _) in ranked.items()}
    alphas = {one: alpha for one, (_, alpha) in ranked.items()}
    return replace(
        default,
        layers_to_transform=tuple(sorted(limits)) if in_layers else None,
        exclude_modules=() if in_layers else tuple(excluded),
        rank_pattern=tuple(_patterns(ranks, default.rank, names)),
        alpha_pattern=tuple(_patterns(alphas, default.alpha, names)),
    )


def _patterns(
    values: Mapping[Tensor, Number], default: Number, names: Mapping[Tensor, ModuleNames]
) -> Iterator[tuple[str, Number]]:
    """Yield patterns and values: the shortest ones that match modules of the same value only, for all layers
    and numbers in a module's name, or for all layers; else full names.
    """
    found = {one: one.module for one, value in values.items() if value != default}
    for number in (r"\g<0>", r".\\d+."):
        done = set[Tensor]()
        for pattern in dict.fromkeys(re.sub(r"\.\d+\.", number, one.in_layer) for one in found):
            matched = [one for one in values if matches_module(pattern, names[one], "pattern")]
            if len({values[one] for one in matched}) == 1 and not done.issuperset(matched):
                done.update(matched)
                found |= dict.fromkeys(matched, pattern)
    yield from dict.fromkeys((pattern, values[one]) for one, pattern in found.items())
