"""A model over the whole parameter tree {"base", "adapter", **heads}, with the adapter attached at trace
time.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxft.models.heads import shares_base
from jaxft.models.model import Model
from jaxft.nn.lora import INITIAL_ADAPTER, Adapter, Several, attach
from jaxft.nn.lora_rows import specs_like
from jaxft.nn.lora_specs import adapter_specs
from jaxft.tree import Params


def adapted(model: Model, settings: Adapter | None) -> Model:
    """Return the model over {"base", "adapter", **heads}, with "initial_adapter" if the adapter changes the
    base and heads share it (see models/heads.py). Without "adapter" in the parameters it is the base model.

    Parameters that heads.view returns have the adapter of that critic or reward model, with its dropout and
    its tokens. Raises ValueError if the adapter includes the language model head of a model with a scalar
    head.
    """

    def attached(params: Any) -> Any:
        own = model.head_adapters.get(params["viewed"].name, settings) if "viewed" in params else settings
        dropout, token_ids = (own.dropout, own.trainable_token_indices) if own else (0.0, ())
        return attach(params["base"], params.get("adapter"), dropout, token_ids)

    def on_whole(fn: Callable) -> Callable:
        return lambda params, *rest, **kw: fn(attached(params), *rest, **kw)

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
    specs |= model.heads
    return replace(
        model,
        specs=specs,
        hidden=on_whole(model.hidden),
        head=on_whole(model.head),
        prefill=on_whole(model.prefill),
        extend=on_whole(model.extend),
        decode=on_whole(model.decode),
    )


def adapted_like(model: Model, adapter: Params) -> Model:
    """Return the model over {"base", "adapter"}, where the adapter has no settings: one of several of equal
    shapes, see nn/lora_rows.py.
    """
    return replace(
        adapted(model, None), specs={"base": model.specs, "adapter": specs_like(model.specs, adapter)}
    )


def adapted_by_row(model: Model) -> Model:
    """Return the model over {"base", "stack", "rows"}: in generation, row i has adapter rows[i] of the stack.

    See nn/lora_rows.py. Parameters without a stack are those of the base model. Its specs are the base's.
    """

    def by_row(fn: Callable) -> Callable:
        def call(params: Any, *rest: Any, **kw: Any) -> Any:
            stack = Several(params.get("stack"))
            return fn(attach(params["base"], stack, rows=params["rows"]), *rest, **kw)

        return call

    return replace(
        model,
        specs={"base": model.specs},
        hidden=by_row(model.hidden),
        head=by_row(model.head),
        prefill=by_row(model.prefill),
        extend=by_row(model.extend),
        decode=by_row(model.decode),
    )
