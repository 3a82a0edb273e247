"""Names of a model's tensors in Hugging Face files and of the modules that they belong to, and patterns that
select modules.

A family declares one template for each parameter, such as `model.layers.{i}.mlp.gate_proj.weight`: {i} is the
number of the layer, {x} the number of the expert. Along an axis without a field in the template, the files
have one tensor for all. No other code fills in templates; see weights/tensors.py for a model's tensors.

A module has two full names: in Hugging Face files (model.layers.3.self_attn.q_proj), and by its path
(layers.3.attn.q). A pattern of an adapter's settings selects a module by either, as in PEFT.
"""

import functools
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxft import tree
from jaxft.nn.param import ParamSpec, layer_numbers, lead_axes

HEAD_MODULE = "lm_head"
NAME_FIELDS = {"layers": "i", "experts": "x"}  # of a template, by the axis that they number
ModuleNames = tuple[str, ...]  # of one module, by any of which a setting may name it


class TensorName(NamedTuple):
    """The name of a parameter in Hugging Face files.

    transposed: whether they store [out, in]. part: the parameter's number among the parameters that share the
    tensor, side by side along their outputs; None for a tensor of its own.
    """

    template: str
    transposed: bool = False
    part: int | None = None

    @property
    def module(self) -> str:
        """The template of the module's name."""
        return self.template.removesuffix(".weight").removesuffix(".bias")

    @property
    def in_layer(self) -> str:
        """The template of the module's name inside its layer, such as mlp.gate_proj."""
        return self.module.rpartition("{i}.")[2]

    def axes(self, spec: ParamSpec) -> tuple[str, ...]:
        """Return the leading axes of the parameter along which the files have a tensor each."""
        return tuple(axis for axis in lead_axes(spec) if f"{{{NAME_FIELDS[axis]}}}" in self.template)

    def is_linear(self, spec: ParamSpec) -> bool:
        """Whether each kernel of the parameter is the weight of one linear layer and nothing else."""
        return self.transposed and self.part is None and self.axes(spec) == lead_axes(spec)


WeightNames = dict[str, TensorName]  # by parameter path
TIED_HEAD = TensorName(f"{HEAD_MODULE}.weight", True)  # of a model whose names have no head


class Module(NamedTuple):
    """A module that a parameter belongs to, or its part at an index along the parameter's leading axes.

    name: in Hugging Face files, such as model.layers.3.mlp.gate_proj. path_name: from the parameter's path,
    such as layers.3.mlp.gate. Both have the number of the layer in the model. layer: this number, None
    outside layers.
    """

    name: str
    path_name: str
    layer: int | None

    @property
    def names(self) -> ModuleNames:
        """(name, path_name): a pattern selects the module if it matches either."""
        return self.name, self.path_name


def modules_of(path: str, spec: ParamSpec, names: WeightNames) -> list[Module]:
    """Return the module of a parameter at each index along its leading axes, in row-major order. A parameter
    without a tensor in the files is named like its path.
    """
    path_template = _path_template(path, spec)
    template = names[path].module if path in names else HEAD_MODULE if path == "head" else path_template
    return [
        Module(template.format(**numbers), path_template.format(**numbers), numbers.get("i"))
        for numbers in numbers_at(spec, lead_axes(spec)).values()
    ]


def numbers_at(spec: ParamSpec, axes: tuple[str, ...]) -> dict[tuple[int, ...], dict[str, int]]:
    """Return the fields of a template, i (the layer's number in the model) and x (the expert's), at each
    index along some of a parameter's leading axes, in row-major order.
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
    """Return a path as the template of a name: the layer's number follows the name of the stack, an expert's
    number the name of its module.
    """
    axes, (*above, last) = lead_axes(spec), path.split("/")
    stack = [*above[:1], *(["{i}"] if "layers" in axes else [])]
    return ".".join([*stack, *above[1:], *(["{x}"] if "experts" in axes else []), last])


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
    """Whether an entry of modules_to_save selects a module by its Hugging Face name, as in PEFT: the name of
    the module, or of a module that contains it, ends with the entry ("mlp" selects all layers of the MLP).
    """
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(listed) for n in range(len(parts)))


def name_ends(names: ModuleNames) -> list[str]:
    """Return a module's names and all their ends after a dot: a.b.c, b.c and c."""
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
    values: list[float | None] = [None] * len(modules)
    for number, (pattern, value) in enumerate(patterns):
        hits = [i for i, names in enumerate(modules) if matches_module(pattern, names, setting)]
        if not hits:
            near = tree.nearest(
                pattern, list(dict.fromkeys(names[0].rpartition(".")[2] for names in modules))
            )
            raise ValueError(f"{setting}: {pattern!r} matches no adapted module; near: {', '.join(near)}")
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
