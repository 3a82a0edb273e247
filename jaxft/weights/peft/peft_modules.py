"""Parameters that an adapter trains in full, in PEFT's layout: modules_to_save, biases, rows of tokens."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.models.model import Model
from jaxft.nn.adapters.full_modules import base_modules, in_all_layers, selected_modules
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param import spec_paths
from jaxft.nn.tensor_names import HEAD_MODULE, SCORE_MODULES, is_saved, name_ends
from jaxft.weights import finite
from jaxft.weights.hf.safetensors import SafetensorsFiles, TensorToWrite, read_tensor
from jaxft.weights.peft.peft_names import PREFIX, renamed
from jaxft.weights.peft.peft_refusals import MERGE
from jaxft.weights.tensors import Tensor, layer_on_host, stack, tensor_on_host, tensors_of

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
ONLY_TOKENS = "TRAINABLE_TOKENS"  # the peft_type of an adapter without LoRA pairs
ONLY_TOKEN_ROWS = "trainable_tokens_delta"
NO_TARGETS = "dummy-target-modules"  # peft's target_modules of an adapter without pairs


class Modules(NamedTuple):
    """The tensors of an adapter's files besides LoRA pairs.

    nodes: {"weight"} or {"rows"} by path. settings: fields of nn.lora.Adapter. used: names of tensors.
    """

    nodes: dict[str, dict[str, np.ndarray]]
    settings: dict[str, Any]
    used: set[str]


def read_modules(
    where: Path, config: Mapping[str, Any], files: SafetensorsFiles, model: Model, adapted: set[str]
) -> Modules:
    """Read the parameters that an adapter replaces. where: of adapter_config.json. adapted: full names of the
    modules with pairs.

    Raises ValueError for modules, biases and tokens that the model or the files lack, or have in part.
    """
    nodes: dict[str, dict[str, np.ndarray]] = {}
    used = set[str]()
    table = tensors_of(model, tied_head=True)
    modules = {path: [tensor.module for tensor in tensors] for path, tensors in table.items()}
    saved = [one for one in config.get("modules_to_save") or [] if one not in SCORE_MODULES]
    biases = config.get("bias", "none")
    settings: dict[str, Any] = {}
    selected = {one: {x for of in modules.values() for x in of if is_saved(one, x)} for one in saved}
    if missing := [one for one, found in selected.items() if not found]:
        raise ValueError(
            f"{where}: modules_to_save={saved!r}: this model has no module {min(missing)!r}; is the adapter "
            "for another base model?"
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
        listed = "bias or modules_to_save in adapter_config.json has it"
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
    """Return an adapter's configuration and tensors without those of the language model head, for a model
    with a scalar head in its place.
    """

    def others(names: Any) -> Any:
        return [one for one in names if not _is_head(one)] if isinstance(names, list) else names

    fields = {key: others(config.get(key)) for key in ("modules_to_save", "target_modules")}
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict):
        tokens = {key: ids for key, ids in tokens.items() if not _is_head(key)}
    kept = {name: name for name in files.tensors if not name.startswith(f"{PREFIX}{HEAD_MODULE}.")}
    return {**config, **fields, "trainable_token_indices": tokens}, renamed(files, kept)


def _is_head(name: Any) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] == HEAD_MODULE


def _tensor_name(files: SafetensorsFiles, tensor: Tensor) -> str:
    """Return the name of a saved parameter in an adapter's files; the bias of an adapted layer is named after
    the layer that the adapter wraps.
    """
    wrapped = f"{PREFIX}{tensor.module}.base_layer.bias"
    return wrapped if tensor.path.endswith("_bias") and wrapped in files.tensors else PREFIX + tensor.name


def _read_tokens(where: Path, config: Mapping[str, Any], files: SafetensorsFiles, model: Model) -> Modules:
    """Read the rows of trainable tokens in the table, and in a head of its own."""
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
    if not _are_ids(ids, model.config.vocab) or any(
        name not in ("embed_tokens", "lm_head") or other != ids for name, other in ends.items()
    ):
        raise ValueError(
            f"{where}: trainable token indices {repr(listed)[:80]}; expected ids from 0 to "
            f"{model.config.vocab - 1}, the same of embed_tokens and lm_head. Other rows are not supported; "
            f"{MERGE}"
        )
    own_head, table = "head" in model.weight_names, tensors_of(model)
    nodes, used = {}, set()
    for path in ("embed", *(["head"] if own_head and "lm_head" in ends else [])):
        name = f"{PREFIX}{table[path][0].module}.{ONLY_TOKEN_ROWS if only else TOKEN_ROWS}"
        listed = "trainable_token_indices or token_indices of adapter_config.json has them"
        nodes[path] = {"rows": read_shaped(files, name, (len(ids), model.config.width), listed)}
        used.add(name)
    settings = {"trainable_token_indices": tuple(ids), "token_head": "head" in nodes or not own_head}
    return Modules(nodes, settings, used)


def _are_ids(ids: Any, vocab: int) -> bool:
    return (
        isinstance(ids, list)
        and all(type(i) is int and 0 <= i < vocab for i in ids)
        and len(set(ids)) == len(ids)
    )


def read_float(files: SafetensorsFiles, name: str) -> np.ndarray:
    """Read a float tensor, at most in float32. Raises ValueError that names it if it has another type, or a
    value that is not finite.
    """
    with finite.errors_name(f"{files.where}: tensor {name}"):
        value = finite.require_finite(read_tensor(files, name))
        if not jnp.issubdtype(value.dtype, np.floating):
            raise ValueError(f"it has type {value.dtype}; expected floats, as peft's save_pretrained writes")
        return finite.cast_finite(value, np.float32) if value.dtype == np.float64 else value


def read_shaped(files: SafetensorsFiles, name: str, shape: tuple[int, ...], because: str) -> np.ndarray:
    """Read a float tensor of this shape, as read_float does. because: why it must be there, for the error."""
    stored = files.tensors.get(name)
    if stored is None or stored.shape != shape:
        found = "is missing" if stored is None else f"has shape {stored.shape}"
        raise ValueError(f"{files.where}: tensor {name} {found}; this model needs {shape}, because {because}")
    return read_float(files, name)


def module_tensors(
    nodes: Mapping[str, dict[str, Any]], model: Model, adapted: Collection[str], only_tokens: bool
) -> list[TensorToWrite]:
    """Return the tensors of replaced parameters and rows.

    adapted: names of the modules that have a pair, such as model.layers.0.self_attn.q_proj, whose biases peft
    names after the layer that it wraps. only_tokens: for PEFT's type of adapters with rows of tokens alone.
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
    """Return the fields of adapter_config.json that declare replaced parameters and rows. full_names: see
    module_list.
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
    """Return names for modules_to_save that select, by their ends, exactly the modules of these paths: the
    shortest ones with which no other module ends, else full names. full_names: of a model with other modules
    than `model` has.
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
