"""The patterns of adapter settings that select some of a model's modules, as in PEFT.

A module has two full names: that in Hugging Face files (model.layers.3.self_attn.q_proj) and that of its path
(layers.3.attn.q), see nn/tensor_names.py. A pattern selects a module by either.
"""

import functools
import re
from collections.abc import Collection, Sequence

from jaxft import tree
from jaxft.nn.tensor_names import ModuleNames

SCORE_MODULES = ("score", "classifier")  # heads of sequence classifiers; peft always trains both


def matches_module(pattern: str, names: ModuleNames, setting: str) -> bool:
    """Whether a regular expression matches a module's name, or the end of it after a dot, as keys of PEFT's
    rank_pattern do.
    """
    compiled = _compiled(rf"(.*\.)?({pattern})", setting)
    return any(map(compiled.fullmatch, names))


_compiled = functools.cache(tree.regex)  # a model may have 20,000 modules


def is_name(text: str) -> bool:
    """Whether a setting is a module's name, and not a regular expression: words with dots between them."""
    return re.fullmatch(r"\w+(\.\w+)*", text) is not None


def is_saved(listed: str, module: str) -> bool:
    """Whether a name of modules_to_save selects a module by its Hugging Face name: it is the end of that
    name, or of a module's around it ("mlp" all layers of the MLP), as in PEFT.
    """
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(listed) for n in range(len(parts)))


def name_ends(names: ModuleNames) -> list[str]:
    """Return the ends of a module's names that follow a dot, and the names themselves."""
    parts = [name.split(".") for name in names]
    return [".".join(one[n:]) for one in parts for n in range(len(one))]


def is_listed(listed: str | Collection[str], names: ModuleNames, setting: str) -> bool:
    """Whether a regular expression matches a module's whole name, or a list contains the end of it, as PEFT's
    target_modules and exclude_modules do. Long lists are sets.
    """
    if isinstance(listed, str):
        return any(map(_compiled(listed, setting).fullmatch, names))
    return any(end in listed for end in name_ends(names))


def values_by_pattern(
    patterns: Sequence[tuple[str, float]], modules: Sequence[ModuleNames], setting: str
) -> list[float | None]:
    """Return the value of the first pattern that matches each module, None where none does.

    Raises ValueError for a pattern that matches no module, or only modules that an earlier one matches.
    """
    found: list[float | None] = [None] * len(modules)
    for number, (pattern, value) in enumerate(patterns):
        hits = [i for i, names in enumerate(modules) if matches_module(pattern, names, setting)]
        if not hits:
            near = tree.nearest(
                pattern, list(dict.fromkeys(names[0].rpartition(".")[2] for names in modules))
            )
            raise ValueError(f"{setting}: {pattern!r} matches no adapted module; near: {', '.join(near)}")
        new = [i for i in hits if found[i] is None]
        if not new:
            earlier = next(p for p, _ in patterns[:number] if matches_module(p, modules[hits[0]], setting))
            raise ValueError(
                f"{setting}: {pattern!r} is never used, because {earlier!r} comes first and matches the same "
                "modules; remove one of them, or write the narrower pattern first"
            )
        for i in new:
            found[i] = value
    return found
