"""Scalar heads: one number for a text, `hidden @ score` at its last token, as in a reward model or a critic.

A head is a leaf "score" [D, 1] beside the base, without a bias: the score.weight [1, D] of Hugging Face's classifiers with
one label. A model of its own has the whole tree {"base", "adapter", "score"}. Further ones share a policy's base, each by a name
under which it has an adapter and a head: {"base", "adapter", "critic": {"adapter", "score"}}. Then
`{"base": whole["base"], **whole["critic"]}` are the parameters of that model (see `view`).
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

SCORE = ("score.weight", True)  # its name in a checkpoint
START = normal(0.02)  # as transformers starts a new head


@dataclass(frozen=True)
class Scorer:
    """A model with a scalar head on a run's base: a critic, or a reward model.

    adapter: its own, None for the head alone. start: a PEFT folder, or a run's, whose adapter and head it begins with; without
    one both are fresh. trained: False freezes both. weights: where a whole base of its own comes from, all of which is trained;
    then it has no adapter, and its head begins as those files hold it, or fresh.
    """

    adapter: Adapter | None = None
    start: str | None = None
    trained: bool = True
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and (self.adapter or self.start or not self.trained):
            raise ValueError(
                f"a scorer with weights={self.weights} trains them all: leave out adapter, start and trained"
            )


def scores(params: Any, h: Float[Array, "... D"]) -> Float[Array, "..."]:
    """`h @ params["score"]`, computed in float32 or wider whatever the dtype of h.

    A head [D, K, 1] is K of them, the rows of h in as many equal groups, as nn.linear takes several adapters.
    """
    wide, highest = accumulation_dtype(h.dtype), jax.lax.Precision.HIGHEST
    w, h = params["score"][..., 0].astype(wide), h.astype(wide)
    if w.ndim == 1:
        return jnp.einsum("...d,d->...", h, w, precision=highest)
    groups = h.reshape(w.shape[1], h.shape[0] // w.shape[1], *h.shape[1:])
    return jnp.einsum("k...d,dk->k...", groups, w, precision=highest).reshape(h.shape[:-1])


def scorer(model: Model) -> Model:
    """The model with a head that gives scores in place of the one that gives logits: the base has no "head" then.

    Raises ValueError, when called, in what writes text.
    """
    specs = {name: spec for name, spec in model.specs.items() if name != "head"}
    width, vocab = model.config.width, model.config.vocab
    return replace(
        model,
        specs=specs,
        logits=_speechless,
        head=_speechless,
        prefill=_speechless,
        decode=_speechless,
        weight_names={path: name for path, name in model.weight_names.items() if path != "head"}
        | {"score": SCORE},
        forward_flops=lambda tokens, context: (
            model.forward_flops(tokens, context) - 2.0 * tokens * width * vocab
        ),
        heads={**model.heads, "score": head_spec(model)},
        scores=scores,
        generates=False,
    )


def _speechless(*_: Any, **__: Any) -> Any:
    raise ValueError("this model gives scores, no text; use the language model that it was made from")


def head_spec(model: Model) -> ParamSpec:
    """The head of a model of this width."""
    return ParamSpec((model.config.width, 1), ("table_width", "score"), START)


def with_scorers(model: Model, scorers: Mapping[str, Scorer]) -> Model:
    """The model with room in its whole tree for further ones on the same base, each under its name.

    Raises ValueError for a name that the tree has already.
    """
    if not scorers:
        return model
    taken = {"base", "adapter", *model.heads} & scorers.keys()
    if taken:
        raise ValueError(
            f"a scorer is named {min(taken)}, which the run's own parameters are; choose another name"
        )
    beside = {name: _specs(model, one) for name, one in scorers.items()}
    return replace(
        model,
        heads={**model.heads, **beside},
        scores=scores,
    )


def _specs(model: Model, one: Scorer) -> dict[str, Any]:
    own: dict[str, Any] = {"adapter": adapter_specs(model.specs, one.adapter)} if one.adapter else {}
    if one.weights is not None:
        own["base"] = {name: spec for name, spec in model.specs.items() if name != "head"}
    if "head" in own.get("adapter", ()):
        raise ValueError(
            "a scorer's adapter names the head, and it gives scores, no text; leave it out of its targets"
        )
    return {**own, "score": head_spec(model)}


def view(whole: Any, name: str) -> Any:
    """The parameters of one of the models on the whole tree's base, or on its own."""
    return {"base": whole["base"], **whole[name]}


def in_files(model: Model) -> Model:
    """A scorer as a checkpoint holds it: base and head in one tree of specs."""
    return replace(
        model, specs={**model.specs.get("base", model.specs), "score": model.heads["score"]}, heads={}
    )
