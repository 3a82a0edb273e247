"""The parameters of an adapter, declared from its settings: pairs with the rank of each layer, and parameters
that replace the base's.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.nn import tree
from jaxft.nn.adapters import full_modules
from jaxft.nn.adapters.lora import EVA, Adapter, pair_axes, target_paths
from jaxft.nn.param_spec import Init, ParamSpec, Specs, full, kaiming_uniform, normal, spec_paths
from jaxft.nn.tensor_names import ModuleNames, WeightNames, is_listed, is_name, name_ends, values_by_pattern


class PairRanks(NamedTuple):
    """Ranks and alphas of a parameter's LoRA pairs: one of each per kernel of the stack, in the order of
    np.ndindex(lead_shape(spec)); both are 0 for a kernel without a pair. A parameter that is no stack has
    one.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


def pair_layouts(specs: Specs, settings: Adapter, names: WeightNames) -> dict[str, PairRanks]:
    """Return the ranks and alphas of the adapted kernels by path.

    specs, names: the specs and weight_names of the model. Raises ValueError for targets, patterns, exclusions
    or layers in the settings that select nothing, for exclusions that leave nothing, and for kernels that
    cannot have a pair.
    """
    base = spec_paths(specs)
    if not settings.targets and settings.replaces_weights:
        _check_no_pairs(settings)
        return {}
    saved = full_modules.saved_paths(base, settings.modules_to_save, names)
    targets = target_paths(specs, settings.targets)
    is_list = isinstance(settings.targets, tuple) or is_name(settings.targets)
    of_base = full_modules.base_modules(base, names)
    modules = {path: of_base[path] for path in targets}
    _check_layers(settings, list(targets), {x.layer for of_path in modules.values() for x in of_path})
    numbers = settings.layers_to_transform
    selected = {
        (path, i): module
        for path, of_path in modules.items()
        if is_list or path not in saved
        for i, module in enumerate(of_path)
        if numbers is None or module.layer is None or module.layer in numbers
    }
    listed, setting = settings.exclude_modules, "adapter.exclude_modules"
    names_listed = [listed] if isinstance(listed, str) and is_name(listed) else listed
    excluded = names_listed if isinstance(names_listed, str) else frozenset(names_listed)
    kept = {at: x.names for at, x in selected.items() if not is_listed(excluded, x.names, setting)}
    _check_exclusions(excluded, [x.names for x in selected.values()])
    if not kept:
        raise ValueError(
            f"{setting}={settings.exclude_modules!r} excludes every module that adapter.targets selects; "
            "correct one of them"
        )
    for path in dict.fromkeys(path for path, _ in kept):
        if path in saved:
            raise ValueError(
                f"adapter: {path} is in targets and in modules_to_save, which trains it in full; name it in "
                "one of them, or in exclude_modules"
            )
        _check_own_tensor(path, base, names)
    adapted = list(kept.values())
    ranks = values_by_pattern(settings.rank_pattern, adapted, "adapter.rank_pattern")
    alphas = values_by_pattern(settings.alpha_pattern, adapted, "adapter.alpha_pattern")
    pairs = {
        at: (int(settings.rank if rank is None else rank), settings.alpha if alpha is None else alpha)
        for at, rank, alpha in zip(kept, ranks, alphas, strict=True)
    }
    layouts = {}
    for path in dict.fromkeys(path for path, _ in kept):
        of_stack = [pairs.get((path, i), (0, 0.0)) for i in range(len(modules[path]))]
        layouts[path] = PairRanks(*zip(*of_stack, strict=True))
    return layouts


def _check_no_pairs(settings: Adapter) -> None:
    """Raise ValueError for settings of LoRA pairs in an adapter that has no pairs."""
    for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "dora"):
        if getattr(settings, name) not in (getattr(Adapter, name), ""):
            raise ValueError(
                f"adapter.{name} has no effect without adapter.targets; leave it out, or set adapter.targets"
            )


def _check_exclusions(excluded: str | frozenset[str], modules: Sequence[ModuleNames]) -> None:
    """Raise ValueError for a regular expression, or a name in a set, that excludes none of the modules."""
    if isinstance(excluded, str):
        hit = not excluded or any(is_listed(excluded, names, "adapter.exclude_modules") for names in modules)
        unused = [] if hit else [excluded]
    else:
        unused = sorted(excluded.difference(*map(name_ends, modules)))
    if unused:
        near = ", ".join(dict.fromkeys(names[0].rpartition(".")[2] for names in modules))
        raise ValueError(
            f"adapter.exclude_modules: {unused[0]!r} matches none of the adapted modules; match one of {near}"
        )


def _check_layers(settings: Adapter, targets: Sequence[str], layers: AbstractSet[int | None]) -> None:
    """Raise ValueError if layers_to_transform is empty or lists a layer without any of the targets."""
    numbers, with_target = settings.layers_to_transform, sorted(n for n in layers if n is not None)
    if numbers is None or (numbers and layers >= set(numbers)):
        return
    if not with_target:
        raise ValueError(
            f"adapter.layers_to_transform: none of adapter.targets ({', '.join(targets)}) is in a layer; set "
            "adapter.layers_to_transform=none"
        )
    first, last = with_target[0], with_target[-1]
    shown = f"{first} to {last}" if len(with_target) > last - first else ", ".join(map(str, with_target))
    raise ValueError(
        f"adapter.layers_to_transform={','.join(map(str, numbers))}: the layers with adapter.targets are "
        f"{shown}; name some of them, or none for all"
    )


def _check_own_tensor(path: str, base: Mapping[str, ParamSpec], names: WeightNames) -> None:
    """Raise ValueError for a kernel that is no linear layer in files, where a pair would have no name."""
    if path in base.keys() & names.keys() - {"embed"} and not names[path].is_linear(base[path]):
        raise ValueError(
            f"adapter.targets: {path} is a part of {names[path].template} in the model's files, so that a "
            "LoRA pair of it cannot be saved; leave it out, or name it in adapter.exclude_modules"
        )


def differing_fields(specs: Specs, one: Adapter, other: Adapter, names: WeightNames) -> list[str]:
    """Return the names of the fields that make two adapters differ in their trained parameters on this base.

    Dropout and initial values do not count, nor do fields that select the same modules in different words.
    """
    layouts = [pair_layouts(specs, settings, names) for settings in (one, other)]
    present = [{path: tuple(map(bool, x.ranks)) for path, x in layout.items()} for layout in layouts]
    declared = [spec_paths(adapter_specs(specs, settings, names)) for settings in (one, other)]
    in_full = [{path for path in tree if path.endswith(("/weight", "/rows"))} for tree in declared]
    same = {"dropout"} if EVA in (one.init, other.init) else {"dropout", "init"}  # EVA's has other ranks
    if present[0] == present[1]:
        same |= {"targets", "exclude_modules", "layers_to_transform"}
    if layouts[0] == layouts[1]:
        same |= {"rank", "alpha", "rank_pattern", "alpha_pattern"}
    if in_full[0] == in_full[1]:
        same |= {"modules_to_save", "bias", "token_head"}
    return [name for name in vars(one) if getattr(one, name) != getattr(other, name) and name not in same]


def adapter_specs(specs: Specs, settings: Adapter, names: WeightNames | None = None) -> dict[str, Any]:
    """Return the specs of an adapter's parameters. As in PEFT, `a` starts Kaiming-uniform and `b` at zero.
    DoRA's magnitudes start at 0; weights.lora_start.init_magnitudes sets them to the norms of the base.

    specs: of the base. names: the model's weight_names; without them, settings can select modules only by
    names from jaxft's paths.

    >>> base = {"layers": {"q": ParamSpec((2, 8, 6), ("layers", "width", "heads"), full(0.0))}}
    >>> adapter = adapter_specs(base, Adapter(rank=4, targets=("q",)))
    >>> {name: spec.shape for name, spec in adapter["layers"]["q"].items()}
    {'a': (2, 8, 4), 'b': (2, 4, 6), 'scale': (2,)}
    """
    base, names = spec_paths(specs), names or {}
    layouts = pair_layouts(specs, settings, names)
    if "embed" in layouts and settings.dora:
        raise ValueError(
            "adapter.dora is for linear layers; leave embed_tokens out of adapter.targets, or set "
            "adapter.dora=false"
        )
    nodes: dict[str, dict[str, ParamSpec]] = {
        path: _pair_specs(full_modules.base_spec(base, path), layout, settings, is_table=path == "embed")
        for path, layout in layouts.items()
    }
    ranks = {path: layout.ranks for path, layout in layouts.items()}
    saved = full_modules.saved_paths(base, settings.modules_to_save, names)
    for path in [*saved, *full_modules.bias_paths(base, settings.bias, ranks, names)]:
        nodes[path] = {"weight": full_modules.base_spec(base, path)}
    if settings.trainable_token_indices:
        ids = settings.trainable_token_indices
        if not settings.token_head and "head" not in base:
            raise ValueError(
                "adapter.token_head=false: this model has no head of its own (it is tied to its embeddings, "
                "or a score head is in its place); leave it out"
            )
        nodes |= full_modules.token_specs(base, ids, settings.token_head and "head" not in saved, nodes)
    return tree.nested(nodes)


def _pair_specs(
    spec: ParamSpec, layout: PairRanks, settings: Adapter, is_table: bool
) -> dict[str, ParamSpec]:
    """Return the specs of a kernel's pair. is_table: `a` starts at zero and `b` normal, as in PEFT."""
    *lead, size_in, size_out = spec.shape
    rank, ranks = max(layout.ranks), layout.ranks
    if settings.init == EVA:  # the ranks of the layers are known only when the run has read its rows
        rank = most_components(rank, settings.eva_rho, size_in)
        ranks = tuple(rank if has_rank else 0 for has_rank in ranks)
    scales = [settings.scale_of(r, alpha) if r else settings.scale for r, alpha in zip(*layout, strict=True)]
    start, start_b = (full(0.0), normal(1.0)) if is_table else (kaiming_uniform(size_in), full(0.0))
    if min(ranks) < rank:
        start = _zero_beyond(start, ranks)
    axes = pair_axes(spec)
    magnitude = ParamSpec((*lead, size_out), axes["magnitude"], full(0.0), spec.heads, spec.numbers)
    return {
        "a": ParamSpec((*lead, size_in, rank), axes["a"], start, spec.heads, spec.numbers),
        "b": ParamSpec((*lead, rank, size_out), axes["b"], start_b, spec.heads, spec.numbers),
        "scale": ParamSpec(tuple(lead), axes["scale"], _constant(scales), None, spec.numbers),
        **({"magnitude": magnitude} if settings.dora else {}),
    }


def most_components(rank: int, rho: float, inputs: int) -> int:
    """Return the largest rank that EVA gives a module: rho * rank as PEFT rounds it, at most `inputs`."""
    return min(round(rank * rho), inputs)


def _zero_beyond(start: Init, ranks: Sequence[int]) -> Init:
    """Return an initialiser that sets the columns beyond each stacked kernel's rank to zero."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        *lead, _, most = shape
        used = (np.arange(most) < np.asarray(ranks)[:, None]).reshape(*lead, 1, most)
        return jnp.where(used, start(key, shape, dtype), jnp.zeros((), dtype))

    return init


def _constant(values: Sequence[float]) -> Init:
    """Return an initialiser that sets the elements to these values, in row-major order."""
    return lambda key, shape, dtype: jnp.asarray(values, dtype).reshape(shape)
