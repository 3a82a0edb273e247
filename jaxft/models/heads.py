"""Scalar heads: one number per text, `hidden @ score` at its last token, as in a reward model or a critic.

A head is a leaf "score" [D, 1] without a bias, the score.weight [1, D] of Hugging Face's classifiers with one
label. A reward model that is trained has the whole tree {"base", "adapter", "score"}. Further models share
the base of a policy; each has a name, under which its adapter and its head are stored: {"base", "adapter",
"critic": {"adapter", "score"}}. Then `{"base": params["base"], **params["critic"]}` are the parameters of
that model (see `view`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models.model import Model
from jaxft.nn.lora import Adapter, adapter_specs
from jaxft.nn.matmul import accumulation_dtype
from jaxft.nn.param import ParamSpec, normal
from jaxft.tree import Params

SCORE = ("score.weight", True)  # its name in a checkpoint
INIT = normal(0.02)  # transformers' initialisation of a new head


@dataclass(frozen=True)
class HeadSettings:
    """A model with a scalar head on the base of a run: a critic, or a reward model.

    adapter: its own LoRA settings, None for a head without an adapter. start: a PEFT folder, or a run's, that
    adapter and head are loaded from; None initialises both. trained: False freezes both. weights: a
    checkpoint for a separate base, which is trained in full; then it has no adapter, and its head is loaded
    from the checkpoint if that has one.
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

    A head [D, K, 1] is K heads; the rows of h are K equal groups, one for each, as nn.matmul.linear takes
    several adapters.
    """
    wide, highest = accumulation_dtype(h.dtype), jax.lax.Precision.HIGHEST
    w, h = params["score"][..., 0].astype(wide), h.astype(wide)
    if w.ndim == 1:
        return jnp.einsum("...d,d->...", h, w, precision=highest)
    groups = h.reshape(w.shape[1], h.shape[0] // w.shape[1], *h.shape[1:])
    return jnp.einsum("k...d,dk->k...", groups, w, precision=highest).reshape(h.shape[:-1])


def with_scalar_head(model: Model) -> Model:
    """Return the model with a scalar head in place of its language model head.

    Its head, logits, prefill and decode raise ValueError.
    """
    specs = {name: spec for name, spec in model.specs.items() if name != "head"}
    names = {path: name for path, name in model.weight_names.items() if path != "head"}
    width, vocab = model.config.width, model.config.vocab

    def forward_flops(tokens: int, context: int) -> float:
        return model.forward_flops(tokens, context) - 2.0 * tokens * width * vocab

    return replace(
        model,
        specs=specs,
        logits=_no_text,
        head=_no_text,
        prefill=_no_text,
        decode=_no_text,
        weight_names={**names, "score": SCORE},
        forward_flops=forward_flops,
        heads={**model.heads, "score": head_spec(model)},
        scores=scores,
        generates=False,
    )


def _no_text(*_: Any, **__: Any) -> Any:
    raise ValueError(
        "this model has a scalar head and generates no text; use the language model that it was made from"
    )


def head_spec(model: Model) -> ParamSpec:
    """Declare a scalar head for a model of this width."""
    return ParamSpec((model.config.width, 1), ("table_width", "score"), INIT)


def with_heads(model: Model, heads: Mapping[str, HeadSettings]) -> Model:
    """Return the model with further models on the same base, each under its name in the tree of parameters.

    Raises ValueError for a name that the tree already has.
    """
    if not heads:
        return model
    taken = {"base", "adapter", *model.heads} & heads.keys()
    if taken:
        raise ValueError(
            f"a head cannot be named {min(taken)}, a name of the run's own parameters; choose another name"
        )
    specs = {name: _specs(model, settings) for name, settings in heads.items()}
    return replace(model, heads={**model.heads, **specs}, scores=scores)


def _specs(model: Model, settings: HeadSettings) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    if settings.adapter:
        specs["adapter"] = adapter_specs(model.specs, settings.adapter)
    if settings.weights is not None:
        specs["base"] = {name: spec for name, spec in model.specs.items() if name != "head"}
    if "head" in specs.get("adapter", ()):
        raise ValueError(
            "the adapter of a model with a scalar head targets the language model head; leave 'head' out"
        )
    return {**specs, "score": head_spec(model)}


def view(params: Params, name: str) -> Params:
    """Return the parameters of one of the further models: its own, plus the shared base unless it has its own
    base.
    """
    return {"base": params["base"], **params[name]}


def as_checkpoint(model: Model) -> Model:
    """Return a model with a scalar head as a checkpoint stores it: base and head in one tree of specs."""
    specs = {**model.specs.get("base", model.specs), "score": model.heads["score"]}
    return replace(model, specs=specs, heads={})
