"""Names of a model's tensors in Hugging Face files, and of the modules that they belong to.

A family declares one template for each parameter, such as `model.layers.{i}.mlp.gate_proj.weight`: {i} is the
number of the layer, {x} that of the expert. Along an axis without a field in the template, the files have one
tensor for all. No other code fills in templates; see weights/tensors.py for a model's tensors.
"""

from typing import NamedTuple

import numpy as np

from jaxft.nn.param import ParamSpec, layer_numbers, lead_axes

HEAD_MODULE = "lm_head"
NAME_FIELDS = {"layers": "i", "experts": "x"}  # of a template, by the axis that they number
ModuleNames = tuple[str, ...]  # of one module, by any of which a setting may name it


class TensorName(NamedTuple):
    """How a parameter is named in Hugging Face files.

    transposed: whether they store [out, in]. part: the parameter's number among those that share the tensor,
    side by side along their outputs; None for a tensor of its own.
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

    name: in Hugging Face files, such as model.layers.3.mlp.gate_proj. path_name: that of the parameter's
    path, such as layers.3.mlp.gate. Both have the number of the layer in the model. layer: this number, None
    outside layers.
    """

    name: str
    path_name: str
    layer: int | None

    @property
    def names(self) -> ModuleNames:
        """Both names."""
        return self.name, self.path_name


def modules_of(path: str, spec: ParamSpec, names: WeightNames) -> list[Module]:
    """Return the module of a parameter at each index along its leading axes, in row-major order. A parameter
    without a tensor in the files is named like its path.
    """
    own = _path_template(path, spec)
    template = names[path].module if path in names else HEAD_MODULE if path == "head" else own
    return [
        Module(template.format(**numbers), own.format(**numbers), numbers.get("i"))
        for numbers in numbers_at(spec, lead_axes(spec)).values()
    ]


def numbers_at(spec: ParamSpec, axes: tuple[str, ...]) -> dict[tuple[int, ...], dict[str, int]]:
    """Return the numbers that fill in a template, by its fields, at each index along some of a parameter's
    leading axes, in row-major order: i, the number of the layer in the model, and x, that of the expert.
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
    """Return a path as the template of a name: the layer's number follows the name of the stack, an
    expert's that of its module.
    """
    axes, (*above, last) = lead_axes(spec), path.split("/")
    stack = [*above[:1], *(["{i}"] if "layers" in axes else [])]
    return ".".join([*stack, *above[1:], *(["{x}"] if "experts" in axes else []), last])
