"""A model over the whole parameter tree {"base", "adapter", **heads}, with the adapter attached at trace
time; and a run's second, frozen model.

The second model is a teacher, or a reference policy with weights of its own. Its parameters are named
"teacher" in the run's tree: {"base", "adapter"}, without "base" if it shares the run's. The run's base
without an adapter has no parameters there and takes no memory. An objective reads it as it reads the run's
model, with the same parameters and log-probs of both in one pass over the heads:

    heads = [HeadInput(one, params, one.hidden(params, batch)[0]) for one in (model, model.teacher)]
    student, teacher = read_logps_of_heads(heads, (batch.read, batch.targets))
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxft.models.heads import TEACHER, shares_base, view
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter, Several, attach
from jaxft.nn.adapters.lora_rows import specs_like
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.quant import Quant
from jaxft.tree import Params


def adapted(model: Model, settings: Adapter | None) -> Model:
    """Return the model over {"base", "adapter", **heads}, with "initial_adapter" if the adapter changes the
    base and heads share it (see models/heads.py). Without "adapter" in the parameters it is the base model.

    Parameters that heads.view returns have the adapter of that critic or reward model, with its dropout and
    its tokens. A teacher's functions take the whole tree as well. Raises ValueError if the adapter includes
    the language model head of a model with a scalar head.
    """

    def attached(params: Any) -> Any:
        chosen = model.head_adapters.get(params["viewed"].name, settings) if "viewed" in params else settings
        dropout, token_ids = (chosen.dropout, chosen.trainable_token_indices) if chosen else (0.0, ())
        return attach(params["base"], params.get("adapter"), dropout, token_ids)

    specs = {"base": model.specs}
    if settings:
        specs["adapter"] = adapter_specs(model.specs, settings, model.weight_names)
        if not model.generates and "head" in specs["adapter"]:
            raise ValueError(
                "adapter.targets or adapter.modules_to_save includes the language model head, but this model "
                "has a scalar head instead; remove it from them"
            )
        if settings.changes_base and any(shares_base(head) for head in model.heads.values()):
            specs[INITIAL_ADAPTER] = specs["adapter"]
    whole = _reading(model, attached, specs | model.heads)
    if model.teacher is None:
        return whole
    return replace(whole, teacher=_reading(model.teacher, partial(view, name=TEACHER), whole.specs))


def _reading(model: Model, base: Callable[[Params], Params], specs: Params) -> Model:
    """Return the model over parameters of these specs, of which `base(params)` are the model's."""

    def on_whole(fn: Callable) -> Callable:
        return lambda params, *rest, **kw: fn(base(params), *rest, **kw)

    names = ("hidden", "head", "prefill", "extend", "decode")
    functions: dict[str, Any] = {name: on_whole(getattr(model, name)) for name in names}
    return replace(model, specs=specs, **functions)


def adapted_like(model: Model, adapter: Params) -> Model:
    """Return the model over {"base", "adapter"}, where the adapter has no settings: one of several of equal
    shapes, see nn/adapters/lora_rows.py.
    """
    return replace(
        adapted(model, None), specs={"base": model.specs, "adapter": specs_like(model.specs, adapter)}
    )


def adapted_by_row(model: Model) -> Model:
    """Return the model over {"base", "stack", "rows"}: in generation, row i has adapter rows[i] of the stack.

    See lora_rows.py. Without a stack it is the base model. Its specs are the base's.
    """

    def attached(params: Params) -> Params:
        return attach(params["base"], Several(params.get("stack")), rows=params["rows"])

    return _reading(model, attached, {"base": model.specs})


@dataclass(frozen=True)
class Teacher:
    """Settings of a second, frozen language model; by default it is the run's base without its adapter.

    start: a PEFT folder, or a run's, with an adapter that it has. adapter: the settings of that adapter.
    weights: where a base of its own comes from (see weights.hub); None shares the run's. model: the
    architecture of `weights`. quant: how these are stored; None for the compute dtype.

        Teacher()  # the base
        Teacher(weights="org/large", model=model_for("org/large"), quant=Quant("nf4"))
    """

    start: str | None = None
    adapter: Adapter | None = None
    weights: str | None = None
    model: Model | None = None
    quant: Quant | None = None

    def __post_init__(self) -> None:
        if (self.start is None) != (self.adapter is None):
            raise ValueError("teacher.start and teacher.adapter belong together; set both or neither")
        if (self.weights is None) != (self.model is None):
            raise ValueError("teacher.weights and teacher.model belong together; set both or neither")
        if self.quant and self.weights is None:
            raise ValueError(
                f"teacher.quant={self.quant.kind} needs teacher.weights: the run's base, which the teacher "
                "shares, is stored as quant says"
            )
        if self.quant and self.quant.calibrate:
            raise ValueError("teacher.quant.calibrate: only the run's own base is calibrated; leave it out")

    @property
    def shares_base(self) -> bool:
        """Whether its base is the run's."""
        return self.weights is None


def with_teacher(model: Model, teacher: Teacher | None) -> Model:
    """Return the model with a second one, whose parameters are named "teacher"; itself without a teacher."""
    if teacher is None:
        return model
    second = adapted(teacher.model or model, teacher.adapter)
    specs = {name: x for name, x in second.specs.items() if name == "adapter" or not teacher.shares_base}
    return replace(model, heads={**model.heads, TEACHER: specs}, teacher=second)
