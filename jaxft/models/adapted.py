"""A model over a run's parameters {"base", "adapter", **heads}: its adapter, scalar heads, a second model.

The adapter is attached at trace time. A scalar head scores tokens, `hidden @ score`: a leaf "score" [D, 1]
without bias, which is score.weight [1, D] in Hugging Face classifiers with one label. The parameters of a
reward model in training are {"base", "adapter", "score"}. A policy's run can have further models on the same
base, each with its adapter and head under its name: {"base", "adapter", "critic": {"adapter", "score"}}.
`view` returns the parameters of one of them. If the policy's adapter changes the base (PiSSA, OLoRA, LoftQ,
QERA), the further models use the changed base together with "initial_adapter", a frozen copy of the adapter
at step 0, which together are the unchanged base.

The second, frozen model is a teacher, or a reference policy with separate weights. Its parameters are
"teacher": {"base", "adapter"}, without "base" if it shares the run's base. A teacher that is the run's base
without an adapter has no parameters and takes no memory. An objective calls it like the run's model, with the
parameters of the run, and can compute the log-probs of both in one pass over the heads:

    heads = [HeadInput(one, params, one.hidden(params, batch)[0]) for one in (model, model.teacher)]
    student, teacher = read_logps_of_heads(heads, (batch.read, batch.targets))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models.model import Model
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter, Several, attach, join_adapters
from jaxft.nn.adapters.lora_rows import specs_like
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.matmul import accumulation_dtype
from jaxft.nn.param_spec import ParamSpec, normal
from jaxft.nn.quant import Quant
from jaxft.nn.tensor_names import TensorName
from jaxft.nn.tree import Params, static, struct

SCORE = TensorName("score.weight", True)  # its name in a checkpoint
TEACHER = "teacher"  # the name of the run's second model
INIT = normal(0.02)  # transformers' initialisation of a new head


@dataclass(frozen=True)
class HeadSettings:
    """Settings of a critic or reward model that shares the base of a run.

    adapter: its LoRA settings, None for a head without an adapter. start: a PEFT folder or a run's folder
    from which adapter and head are loaded; None initialises both. trained: False freezes adapter and head.
    weights: a checkpoint that replaces the shared base and is trained in full, without an adapter; its scalar
    head is loaded if it has one.
    """

    adapter: Adapter | None = None
    start: str | None = None
    trained: bool = True
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and (self.adapter or self.start or not self.trained):
            raise ValueError(
                f"a head with weights={self.weights} trains a full model; leave out its adapter, start and "
                "trained"
            )


def scores(params: Params, h: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Return `h @ params["score"]`, computed in float32 or wider for any dtype of h.

    If "score" is a Several, with the heads [K, D, 1] of K models, the rows of h are K groups of equal size,
    one for each head.
    """
    wide, highest = accumulation_dtype(h.dtype), jax.lax.Precision.HIGHEST
    score, h = params["score"], h.astype(wide)
    if not isinstance(score, Several):
        return jnp.einsum("...d,d->...", h, score[..., 0].astype(wide), precision=highest)
    w = score.params[..., 0].astype(wide)
    groups = h.reshape(len(w), h.shape[0] // len(w), *h.shape[1:])
    return jnp.einsum("k...d,kd->k...", groups, w, precision=highest).reshape(h.shape[:-1])


def with_scalar_head(model: Model) -> Model:
    """Return the model with a scalar head in place of its language model head.

    Its head, logits, prefill, extend and decode raise ValueError.
    """
    specs = {name: spec for name, spec in model.specs.items() if name != "head"}
    names = {path: name for path, name in model.weight_names.items() if path != "head"}

    def forward_flops(tokens: int, context: float, read: int | None = None) -> float:
        return model.forward_flops(tokens, context, read=0)

    of_text: dict[str, Any] = dict.fromkeys(("logits", "head", "prefill", "extend", "decode"), _no_text)
    return replace(
        model,
        specs=specs,
        **of_text,
        weight_names={**names, "score": SCORE},
        forward_flops=forward_flops,
        heads={**model.heads, "score": head_spec(model)},
        scores=scores,
        generates=False,
    )


def _no_text(*_: Any, **__: Any) -> Any:
    raise ValueError(
        "this model has a scalar head in place of the language model head and cannot generate text; use the "
        "language model that it was made from"
    )


def head_spec(model: Model) -> ParamSpec:
    """Return the spec of a scalar head for a model of this width."""
    return ParamSpec((model.config.width, 1), ("table_width", "score"), INIT)


def with_heads(model: Model, heads: Mapping[str, HeadSettings]) -> Model:
    """Return the model with critics or reward models on the same base, each under its name in the parameters.

    Raises ValueError if the parameters already have that name.
    """
    if not heads:
        return model
    taken = {"base", "adapter", INITIAL_ADAPTER, *model.heads} & heads.keys()
    if taken:
        raise ValueError(
            f"a head cannot be named {min(taken)!r}, because the run's parameters have that name; choose "
            "another one"
        )
    specs = {name: _specs(model, settings) for name, settings in heads.items()}
    adapters = {name: settings.adapter for name, settings in heads.items() if settings.adapter}
    return replace(model, heads={**model.heads, **specs}, head_adapters=adapters, scores=scores)


def _specs(model: Model, settings: HeadSettings) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    base = {name: spec for name, spec in model.specs.items() if name != "head"}
    if settings.adapter:  # `base` has no head whose rows could be trained
        of_table = replace(settings.adapter, token_head=True)
        specs["adapter"] = adapter_specs(base, of_table, model.weight_names)
    if settings.weights is not None:
        specs["base"] = base
    if "head" in specs.get("adapter", ()):
        raise ValueError(
            "the adapter of a model with a scalar head cannot target the language model head; remove 'head' "
            "from its targets"
        )
    return {**specs, "score": head_spec(model)}


@struct
class Viewed:
    """The name of the further model whose parameters `view` returned; a pytree without leaves."""

    name: str = static()


def view(params: Params, name: str) -> Params:
    """Return the parameters of the critic, reward model or teacher `name`, from the parameters of a run.

    They are "base" (the run's, unless the run's parameters have a base under that name), "adapter" and
    "score" if it has them, and "viewed", its name, by which `adapted` chooses the adapter settings. With the
    run's base, "adapter" also contains the pairs of "initial_adapter".
    """
    viewed = {"base": params["base"], **params[name], "viewed": Viewed(name)}
    if "base" in params[name] or INITIAL_ADAPTER not in params:
        return viewed
    return {**viewed, "adapter": join_adapters(viewed.get("adapter"), params[INITIAL_ADAPTER])}


def shares_base(head: Any) -> bool:
    """Return whether an entry of Model.heads is a further model on the policy's base: not a scalar head of
    the model itself, which is one spec, and not a model with a separate base.
    """
    return isinstance(head, dict) and "base" not in head


def as_checkpoint(model: Model) -> Model:
    """Return a model with a scalar head whose specs are one tree of base and head, as in a checkpoint."""
    specs = {**model.specs.get("base", model.specs), "score": model.heads["score"]}
    return replace(model, specs=specs, heads={})


# ---- adapters and teachers


def adapted(model: Model, settings: Adapter | None) -> Model:
    """Return the model over parameters {"base", "adapter", **heads}, with "initial_adapter" if the adapter
    changes a base that heads share. For parameters without "adapter" it is the base model.

    For parameters that `view` returns, it uses the adapter settings of the viewed model. The functions of its
    teacher take the run's parameters. Raises ValueError if the adapter changes the language model head, but
    the model has a scalar head instead.
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
    """Return `model` over other specs, whose parameters base(params) turns into the model's."""

    def on_whole(fn: Callable) -> Callable:
        return lambda params, *rest, **kw: fn(base(params), *rest, **kw)

    names = ("hidden", "head", "prefill", "extend", "decode")
    functions: dict[str, Any] = {name: on_whole(getattr(model, name)) for name in names}
    return replace(model, specs=specs, **functions)


def adapted_like(model: Model, adapter: Params) -> Model:
    """Return the model over {"base", "adapter"} whose specs follow from the arrays of `adapter` instead of
    adapter settings: for adapters that nn.adapters.lora_rows.of_equal_shapes returns.
    """
    return replace(
        adapted(model, None), specs={"base": model.specs, "adapter": specs_like(model.specs, adapter)}
    )


def adapted_by_row(model: Model) -> Model:
    """Return the model over {"base", "stack", "rows"}: in generation, row i uses adapter rows[i] of the stack
    (see lora_rows.py). Without "stack" it is the base model. Its specs are the base's.
    """

    def attached(params: Params) -> Params:
        return attach(params["base"], Several(params.get("stack")), rows=params["rows"])

    return _reading(model, attached, {"base": model.specs})


@dataclass(frozen=True)
class Teacher:
    """Settings of a second, frozen language model; by default it is the run's base without its adapter.

    start: a PEFT folder or a run's folder from which its adapter is loaded. adapter: the settings of that
    adapter. weights: the checkpoint of a separate base (see weights.hf.hub); None shares the run's base.
    model: the Model of `weights`. quant: how `weights` are stored; None for the compute dtype.

        Teacher()  # the run's base
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
                f"teacher.quant={self.quant.kind} needs teacher.weights: this teacher shares the run's base, "
                "which the setting quant quantises; set teacher.weights, or remove teacher.quant"
            )
        if self.quant and self.quant.calibrate:
            raise ValueError(
                f"teacher.quant.calibrate={self.quant.calibrate}: only the run's own base is calibrated; "
                "leave it out"
            )

    @property
    def shares_base(self) -> bool:
        """Whether the teacher's base is the run's."""
        return self.weights is None


def with_teacher(model: Model, teacher: Teacher | None) -> Model:
    """Return the model with a teacher, whose parameters are at "teacher"; `model` if teacher is None."""
    if teacher is None:
        return model
    second = adapted(teacher.model or model, teacher.adapter)
    specs = {name: x for name, x in second.specs.items() if name == "adapter" or not teacher.shares_base}
    return replace(model, heads={**model.heads, TEACHER: specs}, teacher=second)
