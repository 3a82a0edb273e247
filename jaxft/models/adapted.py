"""A model over the whole parameter tree {"base", "adapter", **heads}, with the adapter attached at trace
time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxft.models.heads import TEACHER, shares_base, view
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter, Several, attach
from jaxft.nn.adapters.lora_rows import specs_like
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.tree import Params


def adapted(model: Model, settings: Adapter | None) -> Model:
    """Return the model over {"base", "adapter", **heads}, with "initial_adapter" if the adapter changes the
    base and heads share it (see models/heads.py). Without "adapter" in the parameters it is the base model.

    Parameters that heads.view returns have the adapter of that critic or reward model, with its dropout and
    its tokens. A teacher's functions take the whole tree as well. Raises ValueError if the adapter includes
    the language model head of a model with a scalar head.
    """

    def attached(params: Any) -> Any:
        own = model.head_adapters.get(params["viewed"].name, settings) if "viewed" in params else settings
        dropout, token_ids = (own.dropout, own.trainable_token_indices) if own else (0.0, ())
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

    See lora_rows.py. Parameters without a stack are those of the base model. Its specs are the base's.
    """

    def attached(params: Params) -> Params:
        return attach(params["base"], Several(params.get("stack")), rows=params["rows"])

    return _reading(model, attached, {"base": model.specs})
