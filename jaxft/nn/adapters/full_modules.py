"""Parameters that an adapter trains in full in place of the base's: modules (PEFT's modules_to_save), biases,
and rows of the embedding table and the head (trainable_token_indices).

In an adapter's tree such a parameter is a node {"weight": an array shaped like the base's}, and trained rows
of N tokens are {"rows": [N, D]} at "embed" or "head". The base is unchanged: several adapters can share it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.nn import tree
from jaxft.nn.param_spec import ParamSpec, normal
from jaxft.nn.tensor_names import SCORE_MODULES, Module, WeightNames, is_saved, modules_of, name_ends
from jaxft.nn.tree import static, struct


@struct
class Replaced:
    """An embedding table that an adapter trains in full; a tied head still reads the base's table."""

    weight: Any  # [V, D]
    base: Any


@struct
class TokenRows:
    """A table [V, D], or a head [D, V], in which the tokens `ids` have the trained rows `rows`."""

    weight: Any
    rows: Any  # [N, D]
    ids: tuple[int, ...] = static()


def is_replacement(node: Any) -> bool:
    """Return whether a node of an adapter's tree replaces a parameter, or rows of it."""
    return isinstance(node, dict) and (node.keys() == {"weight"} or node.keys() == {"rows"})


def unties(paths: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether merging an adapter into a base with a tied head makes the head a separate matrix: the
    adapter changes the head, or changes the table for embeddings but not for the head.

    paths: the adapter's nodes by path.
    """
    return "head" in paths or ("embed" in paths and "rows" not in paths["embed"])


def merge_replacement(
    path: str, weight: Any, node: Mapping[str, Any], dtype: DTypeLike, token_ids: tuple[int, ...]
) -> jax.Array:
    """Return a base's parameter, or one layer of it, after an adapter's replacement, in `dtype`.

    path, weight: of the parameter. node: of the adapter. token_ids: the tokens of its rows.
    """
    if "weight" in node:
        return jnp.asarray(node["weight"]).astype(dtype)
    ids, rows, value = np.asarray(token_ids), jnp.asarray(node["rows"]).astype(dtype), jnp.asarray(weight)
    if path == "head":
        return value.astype(dtype).at[:, ids].set(rows.T)
    return value.astype(dtype).at[ids].set(rows)


def base_spec(base: Mapping[str, ParamSpec], path: str) -> ParamSpec:
    """Return the spec of a base's parameter; for the "head" of a base without one, the transposed table's."""
    if path in base:
        return base[path]
    table = base["embed"]
    return ParamSpec(table.shape[::-1], table.axes[::-1], table.init)


def base_modules(base: Mapping[str, ParamSpec], names: WeightNames) -> dict[str, list[Module]]:
    """Return the modules of each parameter of a base by path, also for a tied head. See modules_of."""
    paths = dict.fromkeys([*base, *(["head"] if "embed" in base else [])])
    return {path: modules_of(path, base_spec(base, path), names) for path in paths}


def saved_paths(base: Mapping[str, ParamSpec], listed: Sequence[str], names: WeightNames) -> list[str]:
    """Return the paths of the parameters in the modules that modules_to_save, `listed`, selects.

    As in PEFT, a name selects every module whose Hugging Face name ends with it ("norm": all norms), and the
    modules inside of it ("mlp"). A name of jaxft's, such as attn.q, selects too. "score", the head of a
    reward model, may be listed; it is no parameter of the base. Raises ValueError for a name that selects
    nothing, or a module in some layers only.
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
    """Return the full Hugging Face names of the modules that one name in modules_to_save selects.

    modules: all modules of the base, by path.
    """
    return {
        module.name
        for of_path in modules.values()
        for module in of_path
        if is_saved(listed, module.name) or listed in name_ends((module.path_name,))
    }


def in_all_layers(
    selected: set[str], modules: Mapping[str, Sequence[str]], setting: str, why: str
) -> list[str]:
    """Return the paths of the parameters whose modules are selected.

    selected: full names of modules. modules: the full names of a parameter's modules, by path. Raises
    ValueError if only some layers of a parameter are selected; setting, why: the error's beginning and end.
    """
    for path, names in modules.items():
        if 0 < len(selected.intersection(names)) < len({*names}):
            raise ValueError(f"{setting} selects {path} in some layers only, {why}")
    return [path for path, names in modules.items() if names[0] in selected]


def bias_paths(
    base: Mapping[str, ParamSpec], bias: str, adapted: Mapping[str, Sequence[int]], names: WeightNames
) -> list[str]:
    """Return the paths of the biases that an adapter trains. bias: none, all or, for the biases of adapted
    layers only, lora_only.

    adapted: by path of an adapted kernel, the rank in each layer; 0 for no adapter. Raises ValueError if no
    bias is selected, and for lora_only if a bias belongs to layers of which some are not adapted.
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
        raise ValueError(f"adapter.bias={bias}: {where} no biases; use adapter.bias=none")
    return biases


def token_specs(
    base: Mapping[str, ParamSpec], token_ids: Sequence[int], with_head: bool, taken: Collection[str]
) -> dict[str, dict[str, ParamSpec]]:
    """Return the specs of trained rows: of the embedding table and, if `with_head`, of a head that is not
    tied.

    taken: paths that the adapter trains otherwise, by a pair or in full. Raises ValueError if the table or
    the head is one of them, and for ids that are no token ids or listed twice.
    """
    table = base["embed"]
    vocab, width = table.shape
    wrong = next((i for i in token_ids if not 0 <= i < vocab), None)
    if wrong is not None:
        raise ValueError(
            f"adapter.trainable_token_indices: {wrong} is no token id; use ids from 0 to {vocab - 1}"
        )
    if len(set(token_ids)) < len(token_ids):
        twice = next(i for n, i in enumerate(token_ids) if i in token_ids[:n])
        raise ValueError(f"adapter.trainable_token_indices has the token id {twice} twice; list each id once")
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
