"""Ranks and alphas of an adapter's modules as the patterns, layer numbers and lists of modules of PEFT's
adapter_config.json.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxft.nn.lora_specs import PairRanks


class Patterns(NamedTuple):
    """Settings that give each module its rank and alpha.

    targets: module names. layers: layers_to_transform, None for all. excluded: modules of `targets` without
    a pair, for settings that name no modules one by one. ranks, alphas: rank_pattern and alpha_pattern.
    """

    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    excluded: tuple[str, ...]
    ranks: tuple[tuple[str, int], ...]
    alphas: tuple[tuple[str, float], ...]


def find_patterns(
    layouts: Mapping[str, PairRanks], formats: Mapping[str, str], rank: int, alpha: float, full_names: bool
) -> Patterns:
    """Return settings for pairs of these ranks and alphas on a model.

    layouts: by path. formats: the Hugging Face name of each path's module, with {i} for the layer. rank,
    alpha: the defaults. full_names: name every module in `targets`, with its layer.
    """
    present = {
        path: tuple(i for i, rank in enumerate(layout.ranks) if rank) for path, layout in layouts.items()
    }
    stacked = [path for path in layouts if "{i}" in formats[path]]
    sets = {present[path] for path in stacked}
    partial = any(len(present[path]) < len(layouts[path].ranks) for path in stacked)
    layers = sets.pop() if partial and len(sets) == 1 else None
    missing = tuple(
        formats[path].format(i=i)
        for path in stacked
        for i in range(len(layouts[path].ranks))
        if partial and layers is None and i not in present[path]
    )
    named = [formats[path].format(i=i) for path in layouts for i in present[path]]
    # with layers_to_transform PEFT looks for a layer's number in every name, except in those written in full
    ends = [
        formats[path] if layers is not None and path not in stacked else formats[path].rpartition(".")[2]
        for path in layouts
    ]
    by_name = full_names or bool(missing)
    return Patterns(
        tuple(sorted(set(named if by_name else ends))),
        None if by_name else layers,
        missing,
        tuple((k, int(v)) for k, v in _pattern_of(layouts, formats, 0, rank)),
        tuple(_pattern_of(layouts, formats, 1, alpha)),
    )


def _pattern_of(
    layouts: Mapping[str, PairRanks], formats: Mapping[str, str], field: int, default: float
) -> Iterable[tuple[str, float]]:
    """Yield the pattern and the value of modules that differ from the default: one for all layers where they
    agree, else one for each layer.
    """
    for path, layout in layouts.items():
        values = {i: layout[field][i] for i, rank in enumerate(layout.ranks) if rank}
        if set(values.values()) == {default}:
            continue
        if len(set(values.values())) == 1:
            yield formats[path].rpartition("{i}.")[2], next(iter(values.values()))
            continue
        for i, value in values.items():
            if value != default:
                yield formats[path].format(i=i), value
