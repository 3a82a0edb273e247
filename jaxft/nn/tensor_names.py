"""Names of a model's tensors in Hugging Face files and of the modules that they belong to, and patterns that
select modules.

A family declares one template for each parameter, such as `model.layers.{i}.mlp.gate_proj.weight`: {i} is the
number of the layer, {x} the number of the expert. If a template has no {x}, the files store all experts in
one tensor. Only this file fills in templates; weights/tensors.py lists a model's tensors.

A module has two full names: in Hugging Face files (model.layers.3.self_attn.q_proj), and by its path
(layers.3.attn.q). A pattern of an adapter's settings selects a module by either, as in PEFT.
"""

import functools
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.nn import tree
from jaxft.nn.param_spec import ParamSpec, layer_numbers, lead_axes

HEAD_MODULE = "lm_head"
NAME_FIELDS = {"layers": "i", "experts": "x"}  # of a template, by the axis that they number
ModuleNames = tuple[str, ...]  # of one module, by any of which a setting may name it


class TensorName(NamedTuple):
    """The template of a parameter's name in Hugging Face files.

    transposed: whether the files store [out, in]. part: if the files store several parameters side by side
    along the outputs of one tensor (a fused projection), the place of this parameter: 0, 1, ...; else None.
    """

    template: str
    transposed: bool = False
    part: int | None = None

    @property
    def module(self) -> str:
        """The template of the module's name: the parameter's without .weight or .bias."""
        return self.template.removesuffix(".weight").removesuffix(".bias")

    @property
    def in_layer(self) -> str:
        """The template of the module's name inside its layer, such as mlp.gate_proj."""
        return self.module.rpartition("{i}.")[2]

    def axes(self, spec: ParamSpec) -> tuple[str, ...]:
        """Return the parameter's axes, "layers" or "experts", along which files have a tensor per index."""
        return tuple(axis for axis in lead_axes(spec) if f"{{{NAME_FIELDS[axis]}}}" in self.template)

    def is_linear(self, spec: ParamSpec) -> bool:
        """Return whether each matrix of the parameter is a separate tensor in the files, the weight of one
        linear layer: not a part of a fused tensor, nor one of several matrices in a tensor.
        """
        return self.transposed and self.part is None and self.axes(spec) == lead_axes(spec)


WeightNames = dict[str, TensorName]  # by parameter path
TIED_HEAD = TensorName(f"{HEAD_MODULE}.weight", True)  # of a model whose names have no head


class Module(NamedTuple):
    """The module of one parameter, or of one layer or expert of a stacked parameter.

    name: in Hugging Face files, such as model.layers.3.mlp.gate_proj. path_name: from the parameter's path,
    such as layers.3.mlp.gate. layer: the number of the layer in the model, 3 here; None outside layers.
    """

    name: str
    path_name: str
    layer: int | None

    @property
    def names(self) -> ModuleNames:
        """(name, path_name): a pattern selects the module if it matches either."""
        return self.name, self.path_name


def modules_of(path: str, spec: ParamSpec, names: WeightNames) -> list[Module]:
    """Return the modules of a stacked parameter: one per layer and expert, in row-major order.

    path, spec: of the parameter. A parameter that is not in `names` is named like its path, a head "lm_head".
    """
    path_template = _path_template(path, spec)
    template = names[path].module if path in names else HEAD_MODULE if path == "head" else path_template
    return [
        Module(template.format(**numbers), path_template.format(**numbers), numbers.get("i"))
        for numbers in numbers_at(spec, lead_axes(spec)).values()
    ]


def numbers_at(spec: ParamSpec, axes: tuple[str, ...]) -> dict[tuple[int, ...], dict[str, int]]:
    """Return the values for a template's fields at each index along `axes`, in row-major order.

    axes: some of the axes "layers" and "experts" with which the parameter starts. A value is, for example,
    {(0, 2): {"i": 0, "x": 2}}: i is the layer's number in the model, x the expert's.
    """
    fields = [(NAME_FIELDS[axis], layer_numbers(spec) if axis == "layers" else None) for axis in axes]
    return {
        index: {
            field: n if numbers is None else numbers[n]
            for (field, numbers), n in zip(fields, index, strict=True)
        }
        for index in np.ndindex(*spec.shape[: len(axes)])
    }


def _path_template(path: str, spec: ParamSpec) -> str:
    """Return the template of a name by a parameter's path, as in layers.{i}.mlp.{x}.gate."""
    axes, (*above, last) = lead_axes(spec), path.split("/")
    stack = [*above[:1], *(["{i}"] if "layers" in axes else [])]
    return ".".join([*stack, *above[1:], *(["{x}"] if "experts" in axes else []), last])


SCORE_MODULES = ("score", "classifier")  # heads of sequence classifiers; peft always trains both


def matches_module(pattern: str, names: ModuleNames, setting: str) -> bool:
    """Return whether a regular expression matches one of a module's names, or the end of a name after a dot,
    as for the keys of PEFT's rank_pattern. setting: the expression's name in errors.
    """
    compiled = _compiled(rf"(.*\.)?({pattern})", setting)
    return any(map(compiled.fullmatch, names))


_compiled = functools.cache(tree.regex)  # a model may have 20,000 modules


def is_name(text: str) -> bool:
    """Return whether a text is a module's name (words with dots between them), not a regular expression."""
    return re.fullmatch(r"\w+(\.\w+)*", text) is not None


def is_saved(listed: str, module: str) -> bool:
    """Return whether an entry of modules_to_save selects a module by its Hugging Face name, as in PEFT: the
    name of the module, or of a module that contains it, ends with the entry ("mlp" selects what is in mlp).
    """
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(listed) for n in range(len(parts)))


def name_ends(names: ModuleNames) -> list[str]:
    """Return a module's names and all their ends after a dot: for a.b.c these are a.b.c, b.c and c."""
    parts = [name.split(".") for name in names]
    return [".".join(path[n:]) for path in parts for n in range(len(path))]


def is_listed(listed: str | Collection[str], names: ModuleNames, setting: str) -> bool:
    """Return whether `listed` selects a module, as PEFT's target_modules and exclude_modules do.

    listed: a regular expression for a whole name, or names, of which one must be the module's name or the end
    of it after a dot; pass a set if there are many. setting: the setting's name in errors. Raises ValueError
    for an invalid regular expression.
    """
    if isinstance(listed, str):
        return any(map(_compiled(listed, setting).fullmatch, names))
    return any(end in listed for end in name_ends(names))


def values_by_pattern(
    patterns: Sequence[tuple[str, float]], modules: Sequence[ModuleNames], setting: str
) -> list[float | None]:
    """Return for each module the value of the first pattern that matches it, None if no pattern does.

    patterns: (regular expression, value) pairs; see matches_module. setting: their name in errors. Raises
    ValueError for a pattern that matches no module, or only modules that earlier patterns match.
    """
    values: list[float | None] = [None] * len(modules)
    for number, (pattern, value) in enumerate(patterns):
        hits = [i for i, names in enumerate(modules) if matches_module(pattern, names, setting)]
        if not hits:
            near = tree.nearest(
                pattern, list(dict.fromkeys(names[0].rpartition(".")[2] for names in modules))
            )
            raise ValueError(
                f"{setting}: {pattern!r} matches no adapted module; similar names: {', '.join(near)}"
            )
        new = [i for i in hits if values[i] is None]
        if not new:
            earlier = next(p for p, _ in patterns[:number] if matches_module(p, modules[hits[0]], setting))
            raise ValueError(
                f"{setting}: {pattern!r} is never used, because {earlier!r} comes first and matches the same "
                "modules; remove one of them, or write the narrower pattern first"
            )
        for i in new:
            values[i] = value
    return values
