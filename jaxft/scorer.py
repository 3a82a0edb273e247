"""Reward models from elsewhere: a sequence classifier's folder, or a language model with an adapter and a head, as a function."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft import attention, prepare, starts, weights
from jaxft.batch import Tokens
from jaxft.models import heads
from jaxft.params import Model
from jaxft.quant import Quant
from jaxft.weights import hub

KIND = "ForSequenceClassification"


@dataclass(frozen=True)
class Loaded:
    """A frozen scorer on a mesh. score(params, tokens) -> [rows], each row's reward; model: over the whole tree `params`."""

    score: Callable[[Any, Tokens], Array]
    params: Any
    model: Model


def load(ref: str, mesh: Any, adapter: str | Path | None = None, quant: Quant | None = None, dtype: Any = jnp.bfloat16) -> Loaded:
    """A reward model on the mesh, its base in `dtype` or packed as `quant` says, its head in float32.

    ref: a Hugging Face classifier with one label (LlamaForSequenceClassification), or with `adapter`, a PEFT folder or a run's
    with a head, the base below it. Raises ValueError for what is no classifier, has several labels, or lacks its head.
    """
    with jax.set_mesh(mesh):
        model = heads.scorer(weights.model_for(ref, dtype=dtype))
        model = model.with_attention(attention.choose(mesh, model.config.head_dim, dtype))
        if adapter is None:
            check(ref)
            start = heads.Scorer(trained=False)
        else:
            start = heads.Scorer(prepare.adapter_settings(str(adapter), model), str(adapter), trained=False)
        t = prepare.all_frozen(model, quant, ref, start.adapter)
        params = {"base": prepare.load_base(ref, t, mesh), **starts.start_beside(t, mesh, 0, start, ref)}
    return Loaded(lambda params, tokens: score(t.model, params, tokens), params, t.model)


def score(model: Model, params: Any, tokens: Tokens) -> Float[Array, "B"]:
    """The reward of each row, read at the last of its tokens; rows may be padded in front or behind, and hold one text each."""
    h_BTD = model.hidden(params, tokens)
    return heads.scores(params, jnp.take_along_axis(h_BTD, last(tokens)[:, None, None], axis=1))[:, 0]


def last(tokens: Tokens) -> Array:
    """The column of each row's last token."""
    T = tokens.segments.shape[1]
    return jnp.max(jnp.where(tokens.segments > 0, jnp.arange(T, dtype=jnp.int32), 0), axis=1)


def check(ref: str) -> None:
    """Raise ValueError where the configuration of `ref` isn't that of a classifier with one label."""
    located = hub.locate(ref, config_only=True)
    config = weights.read_config(located)
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith(KIND) for kind in kinds):
        found = ", ".join(map(str, kinds)) or "no architecture"
        raise ValueError(f"{ref}: found {found}, wanted a sequence classifier (...{KIND}), or an adapter with a head")
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))  # transformers' default is two
    if labels != 1:
        raise ValueError(f"{ref}: a classifier of {labels} labels, and a reward model has one; take another folder")
    if not is_classifier(ref):
        raise ValueError(f"{ref}: {heads.SCORE[0]} is missing, the head of a sequence classifier; is the download complete?")


def is_classifier(ref: str) -> bool:
    """Whether the files of `ref` hold a classifier's head."""
    return heads.SCORE[0] in weights.open_tensors(ref).shapes
