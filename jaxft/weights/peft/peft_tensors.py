"""Tensors of adapters in PEFT's layout and the fields of adapter_config.json that declare them, both ways.

LoRA pairs: their leaves in an adapter's tree, and the patterns, layer numbers and lists of modules by which
PEFT declares their ranks. Parameters that an adapter trains in full: modules_to_save, biases, rows of tokens.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxft.models.model import Model
from jaxft.nn.adapters.full_modules import base_modules, in_all_layers, selected_modules
from jaxft.nn.adapters.lora import Adapter, target_paths
from jaxft.nn.adapters.lora_specs import PairRanks
from jaxft.nn.param_spec import spec_paths
from jaxft.nn.tensor_names import HEAD_MODULE, SCORE_MODULES, ModuleNames, is_saved, matches_module, name_ends
from jaxft.weights.hf.safetensors import SafetensorsFiles, TensorToWrite, read_tensor
from jaxft.weights.peft.peft_config import MERGE, PREFIX, renamed
from jaxft.weights.tensors import (
    Tensor,
    TensorTable,
    cast_finite,
    errors_name,
    layer_on_host,
    require_finite,
    stack,
    tensor_on_host,
    tensors_of,
)

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
ONLY_TOKENS = "TRAINABLE_TOKENS"  # the peft_type of an adapter without LoRA pairs
ONLY_TOKEN_ROWS = "trainable_tokens_delta"
NO_TARGETS = "dummy-target-modules"  # peft's target_modules of an adapter without pairs
MAGNITUDE = "lora_magnitude_vector"  # of DoRA
Number = TypeVar("Number", int, float)


def _read_float(files: SafetensorsFiles, name: str) -> np.ndarray:
    """Read a float tensor; float64 becomes float32. Raises ValueError for other types, NaN and infinity."""
    with errors_name(f"{files.where}: tensor {name}"):
        value = require_finite(read_tensor(files, name))
        if not jnp.issubdtype(value.dtype, np.floating):
            raise ValueError(f"it has type {value.dtype}; expected floats, as peft's save_pretrained writes")
        return cast_finite(value, np.float32) if value.dtype == np.float64 else value


def read_shaped(files: SafetensorsFiles, name: str, shape: tuple[int, ...], because: str) -> np.ndarray:
    """Read a float tensor, as _read_float does. Raises ValueError if it is missing or has another shape.
    because: why the model needs it, for the error.
    """
    stored = files.tensors.get(name)
    if stored is None or stored.shape != shape:
        state = "is missing" if stored is None else f"has shape {stored.shape}"
        raise ValueError(
            f"{files.where}: tensor {name} {state}; this model needs {shape}, because {because}; "
            "use the base model of the adapter, or download the adapter again"
        )
    return _read_float(files, name)


# LoRA pairs


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
    """Return by path the tensors of all weights that may have a LoRA pair: linear layers, the embedding table
    and a language model's head, tied or not. Each tensor is the weight of one module.
    """
    table = tensors_of(model, tied_head=True)
    kernels = [path for path, (first, *_) in table.items() if first.is_kernel or path == "embed"]
    return {path: table[path] for path in sorted(kernels, key=lambda path: path != "head")}


def pair_names(tensor: Tensor, dora: bool = False) -> tuple[str, ...]:
    """Return the names in PEFT files of a module's A [R, in] and B [out, R], and with DoRA its magnitude."""
    form = "lora_embedding_{}" if tensor.path == "embed" else "lora_{}.weight"
    ends = [form.format("A"), form.format("B"), *([MAGNITUDE] if dora else [])]
    return tuple(f"{PREFIX}{tensor.module}.{end}" for end in ends)


def read_pair(files: SafetensorsFiles, tensor: Tensor, config: dict[str, Any]) -> Pair | None:
    """Read the pair of a module; None if the files have none. config: adapter_config.json. Raises ValueError
    for an incomplete pair, or one with other shapes than the model and the configuration need.
    """
    names, module, (ins, outs) = pair_names(tensor), tensor.module, tensor.values
    if not files.tensors.keys() & set(names):
        return None
    arrays = []
    for name in names:
        if name not in files.tensors:
            raise ValueError(f"{files.where}: tensor {name} is missing; copy or download the file again")
        arrays.append(_read_float(files, name).T)
    a, b = arrays
    rank = _matching(config, "rank_pattern", module, config["r"])
    if a.shape != (ins, rank) or b.shape != (rank, outs):
        raise ValueError(
            f"{files.where}: {module} has lora_A {a.T.shape} and lora_B {b.T.shape}; rank {rank} on this "
            f"model needs {(rank, ins)} and {(outs, rank)}; use the base model of the adapter"
        )
    alpha = float(_matching(config, "alpha_pattern", module, config["lora_alpha"]))
    if not config.get("use_dora"):
        return Pair(a, b, alpha)
    listed = "adapter_config.json has use_dora=true"
    return Pair(a, b, alpha, read_shaped(files, f"{PREFIX}{module}.{MAGNITUDE}", (outs,), listed))


def _matching(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """Return config[key]'s value for a module: the first pattern that matches its name's end decides."""
    for pattern, value in (config.get(key) or {}).items():
        if matches_module(pattern, (module,), key):
            return value
    return default


def adapter_of(
    pairs: Mapping[str, Sequence[Pair | None]], default: Adapter, model: Model
) -> tuple[dict[str, dict[str, np.ndarray]], Adapter]:
    """Build an adapter from pairs: return its nodes {"a", "b", "scale"} by path, and settings that declare
    the pairs' ranks and alphas.

    pairs: by path, the pairs of a kernel's modules in row-major order, None for a module without a pair; they
    are padded with zeros to the kernel's largest rank. default: all other settings.
    """
    nodes, layouts, table = {}, dict[str, PairRanks](), adaptable_tensors(model)
    for path, of_path in pairs.items():
        nodes[path] = _stacked(table[path], of_path, default)
        ranks = tuple(0 if pair is None else pair.rank for pair in of_path)
        layouts[path] = PairRanks(ranks, tuple(0.0 if pair is None else pair.alpha for pair in of_path))
    return nodes, with_patterns(default, layouts, model)


def _stacked(
    tensors: Sequence[Tensor], pairs: Sequence[Pair | None], settings: Adapter
) -> dict[str, np.ndarray]:
    """Return a kernel's leaves a [L, in, R], b [L, R, out] and scale [L], with DoRA magnitude [L, out]."""
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
    """Return (rank, alpha) of each module with a pair, by tensor. layouts: ranks and alphas by path."""
    table = adaptable_tensors(model)
    return {
        tensor: (rank, alpha)
        for path, layout in layouts.items()
        for tensor, rank, alpha in zip(table[path], *layout, strict=True)
        if rank
    }


def with_patterns(default: Adapter, layouts: Mapping[str, PairRanks], model: Model) -> Adapter:
    """Return `default` with settings that declare pairs with the ranks and alphas in `layouts`, by path."""
    ranked, base = ranked_modules(layouts, model), model.specs.get("base", model.specs)
    targets = tuple(dict.fromkeys(tensor.path.rpartition("/")[2] for tensor in ranked))
    modules = base_modules(spec_paths(base), model.weight_names)
    paths = target_paths(base, targets) if targets else []
    selected = {module.names: module.layer for path in paths for module in modules[path]}
    return replace(_declared(default, ranked, selected), targets=targets)


def with_module_names(
    default: Adapter, layouts: Mapping[str, PairRanks], model: Model, full_names: bool = False
) -> Adapter:
    """Return the settings of with_patterns with Hugging Face names of modules as targets, as PEFT reads them.

    full_names: use full names, such as model.layers.0.self_attn.q_proj, in place of their ends.
    """
    ranked, layers = ranked_modules(layouts, model), dict[str, int | None]()
    for tensors in tensors_of(model, tied_head=True).values():
        layers |= {tensor.module: tensor.layer for tensor in tensors}
    ends = {tensor.module.rpartition(".")[2] for tensor in ranked}
    selected: dict[ModuleNames, int | None] = {
        (name,): layer for name, layer in layers.items() if name.rpartition(".")[2] in ends
    }
    declared = _declared(default, ranked, selected)
    # of two numbers in a name, versions of PEFT take the first or the second as the layer
    two_numbers = declared.layers_to_transform and any(re.search(r"\.\d+\.", x.in_layer) for x in ranked)
    if full_names or two_numbers or declared.exclude_modules:
        ends = {tensor.module for tensor in ranked}
        declared = replace(declared, layers_to_transform=None)
    elif declared.layers_to_transform:  # PEFT looks for a layer's number in all names but those in full
        ends = {x.module if x.layer is None else x.module.rpartition(".")[2] for x in ranked}
    return replace(declared, targets=tuple(sorted(ends)), exclude_modules=())


def _declared(
    default: Adapter, ranked: Mapping[Tensor, tuple[int, float]], selected: Mapping[ModuleNames, int | None]
) -> Adapter:
    """Return `default` with the ranks and alphas of the modules in `ranked`, and limited to these modules.

    selected: for every module that the targets select, by its names, the number of its layer, None outside
    layers. If the targets select more modules than `ranked` has, layers_to_transform limits them, or
    exclude_modules lists the other modules if no choice of layers is right.
    """
    wanted = {tensor.module: tensor for tensor in ranked}
    limits = {layer for (name, *_), layer in selected.items() if name in wanted and layer is not None}
    limited = {name for (name, *_), layer in selected.items() if layer is None or layer in limits}
    excluded = [name for name, *_ in selected if name not in wanted]
    in_layers = bool(excluded and limits) and limited == wanted.keys()
    names = {wanted[of[0]]: of for of in selected if of[0] in wanted}
    ranks = {tensor: rank for tensor, (rank, _) in ranked.items()}
    alphas = {tensor: alpha for tensor, (_, alpha) in ranked.items()}
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
    """Yield (pattern, value) for the modules whose value, a rank or an alpha, is not the default.

    A pattern matches only modules with the same value. It is the first of these for which that holds: the
    module's name inside its layer, for all layers, with any number in place of numbers in it; that name as it
    is; the full name. names: by module, all names that a pattern may match.
    """
    patterns = {tensor: tensor.module for tensor, value in values.items() if value != default}
    for number in (r"\g<0>", r".\\d+."):
        done = set[Tensor]()
        for pattern in dict.fromkeys(re.sub(r"\.\d+\.", number, tensor.in_layer) for tensor in patterns):
            matched = [tensor for tensor in values if matches_module(pattern, names[tensor], "pattern")]
            if len({values[tensor] for tensor in matched}) == 1 and not done.issuperset(matched):
                done.update(matched)
                patterns |= dict.fromkeys(matched, pattern)
    yield from dict.fromkeys((pattern, values[tensor]) for tensor, pattern in patterns.items())


# Parameters that are trained in full


class Modules(NamedTuple):
    """The parameters that an adapter trains in full, in addition to LoRA pairs.

    nodes: {"weight"} or {"rows"} by path. settings: values of nn.adapters.lora.Adapter's fields by name.
    used: names of the parameters' tensors in the files.
    """

    nodes: dict[str, dict[str, np.ndarray]]
    settings: dict[str, Any]
    used: set[str]


def read_modules(
    where: Path, config: Mapping[str, Any], files: SafetensorsFiles, model: Model, adapted: set[str]
) -> Modules:
    """Read the parameters that an adapter trains in full: modules_to_save, biases and rows of tokens.

    where: path of adapter_config.json, for errors. adapted: full names of the modules with pairs. Raises
    ValueError for parameters that the model or the files lack, and for modules in only some layers.
    """
    nodes: dict[str, dict[str, np.ndarray]] = {}
    used = set[str]()
    table = tensors_of(model, tied_head=True)
    modules = {path: [tensor.module for tensor in tensors] for path, tensors in table.items()}
    saved = [end for end in config.get("modules_to_save") or [] if end not in SCORE_MODULES]
    biases = config.get("bias", "none")
    settings: dict[str, Any] = {}
    selected = {end: {x for of in modules.values() for x in of if is_saved(end, x)} for end in saved}
    if missing := [end for end, selected_modules in selected.items() if not selected_modules]:
        raise ValueError(
            f"{where}: modules_to_save={saved!r}: this model has no module {min(missing)!r}; use the base "
            "model of the adapter"
        )
    why = f"which is not supported; {MERGE}"
    in_modules = in_all_layers(
        set().union(*selected.values()), modules, f"{where}: modules_to_save={saved!r}", why
    )
    of_biases = {path: names for path, names in modules.items() if path.endswith("_bias")}
    trained = [path for path in of_biases if biases == "all"]
    if biases == "lora_only":
        trained = in_all_layers(adapted, of_biases, f"{where}: bias={biases!r}", why)
    if not set(in_modules).issuperset(trained):
        settings["bias"] = biases
    for path in dict.fromkeys([*in_modules, *trained]):
        tensors = table[path]
        names = [_tensor_name(files, tensor) for tensor in tensors]
        listed = "bias or modules_to_save in adapter_config.json lists it"
        values = [
            tensor.turned(read_shaped(files, name, tensor.shape, listed))
            for name, tensor in zip(names, tensors, strict=True)
        ]
        nodes[path] = {"weight": stack(tensors, values)}
        used |= set(names)
    settings["modules_to_save"] = tuple(module_list(set(in_modules), model))
    tokens = _read_tokens(where, config, files, model)
    nodes |= tokens.nodes
    return Modules(nodes, settings | tokens.settings, used | tokens.used)


def without_head(config: dict[str, Any], files: SafetensorsFiles) -> tuple[dict[str, Any], SafetensorsFiles]:
    """Return an adapter's configuration and tensors without the language model head's entries."""

    def others(names: Any) -> Any:
        return [name for name in names if not _is_head(name)] if isinstance(names, list) else names

    fields = {key: others(config.get(key)) for key in ("modules_to_save", "target_modules")}
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict):
        tokens = {key: ids for key, ids in tokens.items() if not _is_head(key)}
    kept = {name: name for name in files.tensors if not name.startswith(f"{PREFIX}{HEAD_MODULE}.")}
    return {**config, **fields, "trainable_token_indices": tokens}, renamed(files, kept)


def _is_head(name: Any) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] == HEAD_MODULE


def _tensor_name(files: SafetensorsFiles, tensor: Tensor) -> str:
    """Return a parameter's name in an adapter's files, where peft wraps an adapted layer with a bias."""
    wrapped = f"{PREFIX}{tensor.module}.base_layer.bias"
    return wrapped if tensor.path.endswith("_bias") and wrapped in files.tensors else PREFIX + tensor.name


def _read_tokens(where: Path, config: Mapping[str, Any], files: SafetensorsFiles, model: Model) -> Modules:
    """Read the rows of trainable tokens in the embedding table, and in the head if it is not tied."""
    only = config.get("peft_type") == ONLY_TOKENS
    listed = config.get("token_indices" if only else "trainable_token_indices")
    if not listed:
        return Modules({}, {}, set())
    targets = config.get("target_modules") or ["embed_tokens"]
    targets = [targets] if isinstance(targets, str) else targets
    by_module = (
        listed if isinstance(listed, dict) else dict.fromkeys(targets if only else ["embed_tokens"], listed)
    )
    ends = {str(name).rpartition(".")[2]: ids for name, ids in by_module.items()}
    ids: Any = ends.get("embed_tokens")
    are_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < model.config.vocab for i in ids)
    if not are_ids or len(set(ids)) < len(ids) or any(
        name not in ("embed_tokens", "lm_head") or other != ids for name, other in ends.items()
    ):  # fmt: skip
        raise ValueError(
            f"{where}: trainable token indices {repr(listed)[:80]}; expected ids from 0 to "
            f"{model.config.vocab - 1}, the same for embed_tokens and lm_head. Other rows are not supported; "
            f"{MERGE}"
        )
    own_head, table = "head" in model.weight_names, tensors_of(model)
    nodes, used = {}, set()
    for path in ("embed", *(["head"] if own_head and "lm_head" in ends else [])):
        name = f"{PREFIX}{table[path][0].module}.{ONLY_TOKEN_ROWS if only else TOKEN_ROWS}"
        listed = "trainable_token_indices or token_indices of adapter_config.json lists them"
        nodes[path] = {"rows": read_shaped(files, name, (len(ids), model.config.width), listed)}
        used.add(name)
    settings = {"trainable_token_indices": tuple(ids), "token_head": "head" in nodes or not own_head}
    return Modules(nodes, settings, used)


def module_tensors(
    nodes: Mapping[str, dict[str, Any]], model: Model, adapted: Collection[str], only_tokens: bool
) -> list[TensorToWrite]:
    """Return the tensors to write for parameters and token rows that an adapter trains in full.

    nodes: {"weight"} or {"rows"} by path. adapted: names of the modules that have a pair, such as
    model.layers.0.self_attn.q_proj, whose biases peft names MODULE.base_layer.bias. only_tokens: whether the
    adapter has only token rows, for which PEFT has a separate type.
    """
    tensors, table = [], tensors_of(model, tied_head=True)
    for path, node in nodes.items():
        for tensor in table[path]:
            if "rows" in node:
                name = f"{tensor.module}.{ONLY_TOKEN_ROWS if only_tokens else TOKEN_ROWS}"
                shape, fetch = tuple(node["rows"].shape), partial(layer_on_host, node["rows"])
            else:
                wrapped = path.endswith("_bias") and tensor.module in adapted
                name = f"{tensor.module}.base_layer.bias" if wrapped else tensor.name
                shape, fetch = tensor.shape, partial(tensor_on_host, [tensor], {path: node["weight"]})
            (value,) = node.values()
            tensors.append(TensorToWrite(PREFIX + name, np.dtype(value.dtype), shape, fetch))
    return tensors


def module_fields(
    nodes: Mapping[str, dict[str, Any]], settings: Adapter, model: Model, full_names: bool = False
) -> dict[str, Any]:
    """Return the fields of adapter_config.json that declare parameters and token rows trained in full.

    nodes: see module_tensors. full_names: see module_list.
    """
    fields: dict[str, Any] = {"bias": settings.bias}
    saved = {path for path, node in nodes.items() if "weight" in node}
    if settings.bias != "none":
        modules = {path: tensors[0].module for path, tensors in tensors_of(model, tied_head=True).items()}
        kernels = {modules[path] for path in saved if not path.endswith("_bias")}
        saved = {path for path in saved if not path.endswith("_bias") or modules[path] in kernels}
    fields["modules_to_save"] = module_list(saved, model, full_names) or None
    if settings.trainable_token_indices:
        ids = list(settings.trainable_token_indices)
        with_head = "rows" in nodes.get("head", {})
        fields["trainable_token_indices"] = {"embed_tokens": ids, "lm_head": ids} if with_head else ids
    return fields


def module_list(saved: set[str], model: Model, full_names: bool = False) -> list[str]:
    """Return names for modules_to_save that select exactly the modules of the paths `saved`.

    PEFT selects every module whose name ends with an entry, so entries are the shortest ends that no other
    module has, else full names. full_names: use full names, except for embeddings and head, because PEFT will
    load the adapter on a model with more modules.
    """
    modules = base_modules(spec_paths(model.specs.get("base", model.specs)), model.weight_names)
    wanted = {module.name for path in saved for module in modules[path]}
    listed: set[str] = set()
    for path in saved:
        names = {module.name for module in modules[path]}
        ends = [] if full_names and path not in ("embed", "head") else name_ends((modules[path][0].name,))
        fits = [end for end in ends if names <= selected_modules(end, modules) <= wanted]
        listed |= {fits[-1]} if fits else names
    return sorted(listed)
