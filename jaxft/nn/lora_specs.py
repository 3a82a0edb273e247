"""The parameters of an adapter, declared from its settings: pairs with the rank of each layer, and parameters
that replace the base's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.nn import replaced
from jaxft.nn.lora import EVA, Adapter, target_paths
from jaxft.nn.lora_patterns import is_listed, is_name, values_by_pattern
from jaxft.nn.param import Init, ParamSpec, Specs, full, kaiming_uniform, normal, spec_paths
from jaxft.nn.tensor_names import ModuleNames, WeightNames, module_names


class PairRanks(NamedTuple):
    """Rank and alpha of the pair in each layer of a kernel, both 0 for no pair; one of each for a kernel
    without layers.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


def pair_layouts(specs: Specs, settings: Adapter, names: WeightNames) -> dict[str, PairRanks]:
    """Return the rank and alpha of each adapted kernel's layers by path.

    names: the model's weight_names. Raises ValueError for patterns, exclusions and layers that select
    nothing, or everything.
    """
    base = spec_paths(specs)
    if not settings.targets and settings.replaces_weights:
        _check_no_pairs(settings)
        return {}
    saved = replaced.saved_paths(base, settings.modules_to_save, names)
    targets = target_paths(specs, settings.targets)
    is_list = isinstance(settings.targets, tuple) or is_name(settings.targets)
    if is_list and set(targets) & set(saved):
        raise ValueError(
            f"adapter: {min(set(targets) & set(saved))} is in targets and in modules_to_save, which "
            "trains it in full; name it in one of them"
        )
    modules = [
        (path, layer, name)
        for path in targets
        if path not in saved
        for layer, name in enumerate(module_names(path, replaced.base_spec(base, path), names))
    ]
    selected = [
        (path, layer, name) for path, layer, name in modules if _is_selected(settings, base, path, layer)
    ]
    if settings.layers_to_transform is not None and not any(_layer_count(base, path) for path in targets):
        raise ValueError(
            f"adapter.layers_to_transform: none of adapter.targets ({', '.join(targets)}) is in a layer; set "
            "adapter.layers_to_transform=none"
        )
    excluded = [m for m in selected if is_listed(settings.exclude_modules, m[2], "adapter.exclude_modules")]
    _check_exclusions(settings.exclude_modules, [name for _, _, name in selected])
    if len(excluded) == len(selected):
        raise ValueError(
            f"adapter.exclude_modules={settings.exclude_modules!r} excludes every module that "
            "adapter.targets selects; correct one of them"
        )
    kept = [m for m in selected if m not in excluded]
    all_names = [name for _, _, name in kept]
    ranks = values_by_pattern(settings.rank_pattern, all_names, "adapter.rank_pattern")
    alphas = values_by_pattern(settings.alpha_pattern, all_names, "adapter.alpha_pattern")
    pairs = {
        (path, layer): (
            int(settings.rank if rank is None else rank),
            settings.alpha if alpha is None else alpha,
        )
        for (path, layer, _), rank, alpha in zip(kept, ranks, alphas, strict=True)
    }
    layouts = {}
    for path in dict.fromkeys(path for path, _, _ in kept):
        count = _layer_count(base, path) or 1
        found = [pairs.get((path, layer), (0, 0.0)) for layer in range(count)]
        layouts[path] = PairRanks(tuple(rank for rank, _ in found), tuple(alpha for _, alpha in found))
    return layouts


def _check_no_pairs(settings: Adapter) -> None:
    """Raise ValueError for settings of pairs in an adapter without any."""
    given = {
        "rank_pattern": bool(settings.rank_pattern),
        "alpha_pattern": bool(settings.alpha_pattern),
        "exclude_modules": bool(settings.exclude_modules),
        "layers_to_transform": settings.layers_to_transform is not None,
        "dora": settings.dora,
    }
    if any(given.values()):
        named = next(name for name, is_given in given.items() if is_given)
        raise ValueError(f"adapter.{named} has no effect without adapter.targets; leave it out, or name some")


def _check_exclusions(excluded: str | tuple[str, ...], modules: Sequence[ModuleNames]) -> None:
    """Raise ValueError for an expression, or a name in a list, that excludes none of the adapted modules."""
    entries: list[str | tuple[str, ...]] = [(name,) for name in excluded]
    if isinstance(excluded, str):
        entries = [excluded] if excluded else []
    for one in entries:
        if not any(is_listed(one, names, "adapter.exclude_modules") for names in modules):
            near = ", ".join(dict.fromkeys(names[0].rpartition(".")[2] for names in modules))
            shown = one if isinstance(one, str) else one[0]
            raise ValueError(
                f"adapter.exclude_modules: {shown!r} matches none of the adapted modules ({near})"
            )


def _layer_count(base: dict[str, ParamSpec], path: str) -> int | None:
    """The size of a kernel's layers axis, None if it has none."""
    spec = base.get(path)
    return spec.shape[0] if spec is not None and spec.axes[0] == "layers" else None


def _is_selected(settings: Adapter, base: dict[str, ParamSpec], path: str, layer: int) -> bool:
    """Whether layers_to_transform includes a layer of a kernel. Raises ValueError for numbers of no layer."""
    numbers, count = settings.layers_to_transform, _layer_count(base, path)
    if numbers is None or count is None:
        return True
    if not numbers or not all(0 <= number < count for number in numbers):
        raise ValueError(
            f"adapter.layers_to_transform={','.join(map(str, numbers))}: the layers are 0 to {count - 1}; "
            "name some of them, or none for all"
        )
    return layer in numbers


def same_pairs(specs: Specs, one: Adapter, other: Adapter, names: WeightNames) -> bool:
    """Whether two settings declare the same pairs and replaced parameters on a base, however they name them;
    dropout may differ.
    """
    both = one, other
    layouts = [pair_layouts(specs, settings, names) for settings in both]
    shapes = [
        {path: spec.shape for path, spec in spec_paths(adapter_specs(specs, x, names)).items()} for x in both
    ]
    tokens = [x.trainable_token_indices for x in both]
    return (
        layouts[0] == layouts[1]
        and shapes[0] == shapes[1]
        and tokens[0] == tokens[1]
        and (one.rslora, one.dora) == (other.rslora, other.dora)
    )


def differing_fields(specs: Specs, one: Adapter, other: Adapter, names: WeightNames) -> list[str]:
    """Return the names of the fields in which two settings differ; of fields that only name the same modules
    in other words, none.
    """
    fields = [name for name in vars(one) if getattr(one, name) != getattr(other, name)]
    layouts = [pair_layouts(specs, settings, names) for settings in (one, other)]
    present = [{path: tuple(map(bool, x.ranks)) for path, x in layout.items()} for layout in layouts]
    same = {"dropout", "init", "eva_rho", "eva_tokens"}
    if present[0] == present[1]:
        same |= {"targets", "exclude_modules", "layers_to_transform"}
    if layouts[0] == layouts[1]:
        same |= {"rank", "alpha", "rank_pattern", "alpha_pattern"}
    return [name for name in fields if name not in same]


def adapter_specs(specs: Specs, settings: Adapter, names: WeightNames | None = None) -> dict[str, Any]:
    """Declare the adapter of a base. As in PEFT, a starts Kaiming-uniform and b zero. Magnitudes start at 0
    and get the norms of the base's weights by weights.lora_start.init_magnitudes.

    names: the model's weight_names; without them patterns match names of paths only.
    """
    base, names = spec_paths(specs), names or {}
    layouts = pair_layouts(specs, settings, names)
    if "embed" in layouts and settings.dora:
        raise ValueError(
            "adapter.dora is for linear layers; leave embed_tokens out of adapter.targets, or set "
            "adapter.dora=false"
        )
    nodes: dict[str, dict[str, ParamSpec]] = {
        path: _pair_specs(replaced.base_spec(base, path), layout, settings, is_table=path == "embed")
        for path, layout in layouts.items()
    }
    ranks = {path: layout.ranks for path, layout in layouts.items()}
    saved = replaced.saved_paths(base, settings.modules_to_save, names)
    for path in [*saved, *replaced.bias_paths(base, settings.bias, ranks, names)]:
        nodes[path] = {"weight": replaced.base_spec(base, path)}
    if settings.trainable_token_indices:
        ids = settings.trainable_token_indices
        if not settings.token_head and "head" not in base:
            raise ValueError(
                "adapter.token_head=false: this model has no head of its own (it is tied to its embeddings, "
                "or a score head is in its place); leave it out"
            )
        nodes |= replaced.token_specs(base, ids, settings.token_head and "head" not in saved, nodes)
    out: dict[str, Any] = {}
    for path, specs_of_node in nodes.items():
        node = out
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node.update(specs_of_node)
    return out


def _pair_specs(
    spec: ParamSpec, layout: PairRanks, settings: Adapter, is_table: bool
) -> dict[str, ParamSpec]:
    """Declare a, b and scale of one kernel, or of the table, whose a starts at zero and b normal, as in
    PEFT.
    """
    *lead, size_in, size_out = spec.shape
    *lead_axes, axis_in, axis_out = spec.axes
    rank, ranks = max(layout.ranks), layout.ranks
    if settings.init == EVA:  # the ranks of the layers are known only when the run has read its rows
        rank = most_components(rank, settings.eva_rho, size_in)
        ranks = tuple(rank if one else 0 for one in ranks)
    scales = [settings.scale_of(r, alpha) if r else settings.scale for r, alpha in zip(*layout, strict=True)]
    start, start_b = (full(0.0), normal(1.0)) if is_table else (kaiming_uniform(size_in), full(0.0))
    if min(ranks) < rank:
        start = _zero_beyond(start, ranks)
    magnitude = ParamSpec((*lead, size_out), (*lead_axes, axis_out), full(0.0), spec.heads)
    return {
        "a": ParamSpec((*lead, size_in, rank), (*lead_axes, axis_in, "rank"), start, spec.heads),
        "b": ParamSpec((*lead, rank, size_out), (*lead_axes, "rank", axis_out), start_b, spec.heads),
        "scale": ParamSpec(tuple(lead), tuple(lead_axes), _constant(scales)),
        **({"magnitude": magnitude} if settings.dora else {}),
    }


def most_components(rank: int, rho: float, inputs: int) -> int:
    """Return the largest rank that EVA may give a module of this rank: rho times it, as PEFT rounds it."""
    return min(round(rank * rho), inputs)


def _zero_beyond(start: Init, ranks: Sequence[int]) -> Init:
    """Return an initialiser of [L, I, R] whose columns beyond the rank of each layer are zero."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        used = jnp.arange(shape[-1])[None, :] < jnp.asarray(ranks)[:, None]
        return jnp.where(used[:, None, :], start(key, shape, dtype), jnp.zeros((), dtype))

    return init


def _constant(values: Sequence[float]) -> Init:
    """Return an initialiser that sets each element of a vector, or a scalar, to its value."""
    return lambda key, shape, dtype: jnp.asarray(values, dtype).reshape(shape)
