"""Scalar heads of reward models and critics: `hidden @ score`, one number per token.

A head is a leaf "score" [D, 1] without bias, which is score.weight [1, D] in Hugging Face classifiers with
one label. The parameters of a reward model in training are {"base", "adapter", "score"}. A policy's run can
have further models on the same base, each with its adapter and head under its name: {"base", "adapter",
"critic": {"adapter", "score"}}. `view` returns the parameters of one of them.

If the policy's adapter changes the base (PiSSA, OLoRA, LoftQ, QERA), these models see that base together with
the adapter as it is at step 0, "initial_adapter", which is frozen: with the residual base alone they would
compute something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models.model import Model
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter, Several, join_adapters
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.contractions import accumulation_dtype
from jaxft.nn.param import ParamSpec, normal
from jaxft.nn.tensor_names import TensorName
from jaxft.tree import Params, static, struct

SCORE = TensorName("score.weight", True)  # its name in a checkpoint
TEACHER = "teacher"  # the name of the run's second model, see models/adapted.py
INIT = normal(0.02)  # transformers' initialisation of a new head


@dataclass(frozen=True)
class HeadSettings:
    """Settings of a critic or reward model that shares the base of a run.

    adapter: its LoRA settings, None for a head without an adapter. start: a PEFT folder or a run's folder
    from which adapter and head are loaded; None initialises both. trained: False freezes both. weights: a
    checkpoint that replaces the shared base and is trained in full, without an adapter; the head is loaded
    from it if it has one.
    """

    adapter: Adapter | None = None
    start: str | None = None
    trained: bool = True
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and (self.adapter or self.start or not self.trained):
            raise ValueError(
                f"a head with weights={self.weights} trains a full model; omit adapter, start and trained"
            )


def scores(params: Params, h: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Return `h @ params["score"]`, computed in float32 or wider for any dtype of h.

    The heads of Several models are [K, D, 1], and the rows of h are K groups of equal size, as in
    nn.matmul.linear.
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
    """Declare a scalar head for a model of this width."""
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
    if settings.adapter:  # rows of tokens in a head mean nothing here
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
    """The name of the critic or reward model whose parameters a tree has. It has no leaves."""

    name: str = static()


def view(params: Params, name: str) -> Params:
    """Return the parameters of the critic, reward model or teacher `name`: its own, and the shared base
    unless it has a base of its own. "viewed" names it, so that the run's model attaches its adapter as its
    settings say.

    Its adapter then contains the pairs of "initial_adapter", if there are any.
    """
    viewed = {"base": params["base"], **params[name], "viewed": Viewed(name)}
    if "base" in params[name] or INITIAL_ADAPTER not in params:
        return viewed
    return {**viewed, "adapter": join_adapters(viewed.get("adapter"), params[INITIAL_ADAPTER])}


def shares_base(head: Any) -> bool:
    """Whether the specs under a head's name are of a further model on the policy's base.

    The head of the model itself is one leaf.
    """
    return isinstance(head, dict) and "base" not in head


def as_checkpoint(model: Model) -> Model:
    """Return a model with a scalar head whose specs are one tree of base and head, as in a checkpoint."""
    specs = {**model.specs.get("base", model.specs), "score": model.heads["score"]}
    return replace(model, specs=specs, heads={})
