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
ModuleNames = tuple[str, ...]


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


WeightNames = dict[str, TensorName]  # by parameter path
TIED_HEAD = TensorName(f"{HEAD_MODULE}.weight", True)  # of a model whose names have no head


def tensor_name(path: str, names: WeightNames) -> TensorName:
    """Return the name of a parameter; for one without a tensor in files, a name like its path."""
    return names.get(path) or (TIED_HEAD if path == "head" else _path_name(path))


def indexed_names(name: TensorName, spec: ParamSpec) -> dict[tuple[int, ...], str]:
    """Return the names of a parameter's tensors by their index along its leading axes, in row-major order;
    that of a parameter without such axes by ().
    """
    axes = [axis for axis in lead_axes(spec) if f"{{{NAME_FIELDS[axis]}}}" in name.template]
    sizes = spec.shape[: len(axes)]
    return {index: _filled(name.template, spec, axes, index) for index in np.ndindex(*sizes)}


def module_names(path: str, spec: ParamSpec, names: WeightNames) -> list[ModuleNames]:
    """Return the names of a parameter's module for each index along its leading axes, in row-major order:
    that in Hugging Face files (model.layers.3.mlp.gate_proj) and that of its path (layers.3.mlp.gate).
    """
    name, axes = tensor_name(path, names), list(lead_axes(spec))
    forms = dict.fromkeys((name.module, _path_name(path, "experts" in axes).template))
    return [
        tuple(_filled(form, spec, axes, index) for form in forms)
        for index in np.ndindex(*spec.shape[: len(axes)])
    ]


def _filled(template: str, spec: ParamSpec, axes: list[str], index: tuple[int, ...]) -> str:
    at, numbers = dict(zip(axes, index, strict=True)), layer_numbers(spec)
    at |= {"layers": numbers[at["layers"]]} if "layers" in at else {}
    return template.format(**{NAME_FIELDS[axis]: number for axis, number in at.items()})


def _path_name(path: str, experts: bool = False) -> TensorName:
    above, dot, last = path.replace("layers/", "layers.{i}.", 1).replace("/", ".").rpartition(".")
    return TensorName(f"{above}.{{x}}.{last}" if experts else f"{above}{dot}{last}")
