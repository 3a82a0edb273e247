"""Parameters that an adapter trains in full in place of the base's: modules (PEFT's modules_to_save), biases,
and rows of the embedding table and the head (trainable_token_indices).

In an adapter's tree such a parameter is {"weight": shaped like the base's}, and rows are {"rows": [N, D]} at
"embed" or "head". The base keeps its own, so that several adapters share it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft import tree
from jaxft.nn.param import ParamSpec, normal
from jaxft.nn.tensor_names import SCORE_MODULES, Module, WeightNames, is_saved, modules_of, name_ends
from jaxft.tree import static, struct


@struct
class Replaced:
    """An embedding table that an adapter trains in full; a tied head still reads the base's table."""

    weight: Any  # [V, D]
    base: Any


@struct
class TokenRows:
    """A table [V, D], or a head [D, V], in which the rows of some tokens are replaced."""

    weight: Any
    rows: Any  # [N, D]
    ids: tuple[int, ...] = static()


def attach_replacement(name: str, base: Any, node: Mapping[str, Any], token_ids: tuple[int, ...]) -> Any:
    """Return the base's parameter `name` after replacement: an array, Replaced (a table) or TokenRows."""
    if "rows" in node:
        return TokenRows(base, node["rows"], token_ids)
    return Replaced(node["weight"], base) if name == "embed" else node["weight"]


def is_replacement(node: Any) -> bool:
    """Whether a node of an adapter's tree replaces a parameter, or rows of it."""
    return isinstance(node, dict) and (node.keys() == {"weight"} or node.keys() == {"rows"})


def unties(paths: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether merging an adapter makes a tied head a separate matrix, because the adapter adapts the head,
    or changes the table only where tokens are read. paths: the adapter's nodes by path.
    """
    return "head" in paths or ("embed" in paths and "rows" not in paths["embed"])


def merge_replacement(
    path: str, weight: Any, node: Mapping[str, Any], dtype: DTypeLike, token_ids: tuple[int, ...]
) -> jax.Array:
    """Return a base's parameter, or one layer of it, with its replacement, in `dtype`."""
    if "weight" in node:
        return jnp.asarray(node["weight"]).astype(dtype)
    ids, rows, value = np.asarray(token_ids), jnp.asarray(node["rows"]).astype(dtype), jnp.asarray(weight)
    if path == "head":
        return value.astype(dtype).at[:, ids].set(rows.T)
    return value.astype(dtype).at[ids].set(rows)


def base_spec(base: Mapping[str, ParamSpec], path: str) -> ParamSpec:
    """Return the spec of a base's parameter; a tied head is the table transposed."""
    if path in base:
        return base[path]
    table = base["embed"]
    return ParamSpec(table.shape[::-1], table.axes[::-1], table.init)


def base_modules(base: Mapping[str, ParamSpec], names: WeightNames) -> dict[str, list[Module]]:
    """Return the modules of each parameter of a base, and of a tied head, by path."""
    paths = dict.fromkeys([*base, *(["head"] if "embed" in base else [])])
    return {path: modules_of(path, base_spec(base, path), names) for path in paths}


def saved_paths(base: Mapping[str, ParamSpec], listed: Sequence[str], names: WeightNames) -> list[str]:
    """Return the paths of the parameters of the modules that modules_to_save names.

    As in PEFT, a name selects every module whose Hugging Face name ends with it ("norm": all norms), with all
    modules inside ("mlp"). The end of a parameter's path, after a dot, selects too. "score", a head that is
    no part of the base, may be listed. Raises ValueError for a name that selects nothing, or only some
    layers.
    """
    modules = base_modules(base, names) if listed else {}
    of_base = [name for name in listed if name not in SCORE_MODULES or "score" not in names]
    selected = {name: selected_modules(name, modules) for name in of_base}
    for name, full_names in selected.items():
        if not full_names:
            ends = dict.fromkeys(of_path[0].name.rpartition(".")[2] for of_path in modules.values())
            raise ValueError(
                f"adapter.modules_to_save: {name!r} is not a module of this model; near: "
                f"{', '.join(tree.nearest(name, list(ends)))}"
            )
    return in_all_layers(
        set().union(*selected.values()),
        {path: [module.name for module in of_path] for path, of_path in modules.items()},
        f"adapter.modules_to_save={','.join(listed)}",
        "and a module is saved in all layers or in none; name it without the layer's number",
    )


def selected_modules(listed: str, modules: Mapping[str, Sequence[Module]]) -> set[str]:
    """Return the full Hugging Face names of the modules that a name of modules_to_save selects."""
    return {
        module.name
        for of_path in modules.values()
        for module in of_path
        if is_saved(listed, module.name) or listed in name_ends((module.path_name,))
    }


def in_all_layers(
    selected: set[str], modules: Mapping[str, Sequence[str]], setting: str, why: str
) -> list[str]:
    """Return the paths whose modules, by full name, are selected. Raises ValueError if only some layers of a
    path are. setting, why: beginning and end of that error.
    """
    for path, names in modules.items():
        if 0 < len(selected.intersection(names)) < len({*names}):
            raise ValueError(f"{setting} has {path} in some layers only, {why}")
    return [path for path, names in modules.items() if names[0] in selected]


def bias_paths(
    base: Mapping[str, ParamSpec], bias: str, adapted: Mapping[str, Sequence[int]], names: WeightNames
) -> list[str]:
    """Return the paths of the biases that bias=none, all or lora_only trains.

    adapted: the ranks of each adapted kernel's layers. Raises ValueError if there are none, and for layers
    without an adapter whose biases would be trained.
    """
    if bias == "none":
        return []
    modules = {path: [module.name for module in of] for path, of in base_modules(base, names).items()}
    biases = [path for path in base if path.endswith("_bias")]
    if bias == "lora_only":
        ranks = [(modules[path][i], rank) for path, of in adapted.items() for i, rank in enumerate(of)]
        why = "and its biases are trained in all layers or in none; use bias=all, or adapt all layers"
        with_pair = {module for module, rank in ranks if rank}
        of_biases = {path: modules[path] for path in biases}
        biases = in_all_layers(with_pair, of_biases, "adapter.bias=lora_only", why)
    if not biases:
        where = "the model has" if bias == "all" else "the adapted layers have"
        raise ValueError(f"adapter.bias={bias}: {where} no biases; use bias=none")
    return biases


def token_specs(
    base: Mapping[str, ParamSpec], token_ids: Sequence[int], with_head: bool, taken: Collection[str]
) -> dict[str, dict[str, ParamSpec]]:
    """Declare the trained rows of the table and, if `with_head`, of the separate head.

    taken: paths with a pair or a replacement. Raises ValueError for ids that are no tokens or listed twice,
    and for rows of a parameter that is trained otherwise.
    """
    table = base["embed"]
    vocab, width = table.shape
    wrong = next((i for i in token_ids if not 0 <= i < vocab), None)
    if wrong is not None:
        raise ValueError(
            f"adapter.trainable_token_indices: {wrong} is no token id; they are 0 to {vocab - 1}"
        )
    if len(set(token_ids)) < len(token_ids):
        raise ValueError("adapter.trainable_token_indices has a token id twice; list each once")
    spec = ParamSpec((len(token_ids), width), ("tokens", table.axes[1]), normal(0.02))
    out = {"embed": {"rows": spec}}
    if with_head and "head" in base:
        out["head"] = {"rows": spec}
    clash = out.keys() & set(taken)
    if clash:
        raise ValueError(
            f"adapter.trainable_token_indices: {min(clash)} is trained by modules_to_save or targets as "
            f"well; use one of them{', or set adapter.token_head=false' if clash == {'head'} else ''}"
        )
    return out
