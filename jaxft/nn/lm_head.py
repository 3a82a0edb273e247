"""The head of a language model: logits by a matrix, the embedding table or replaced rows, with an adapter; of
all tokens, or of some.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.nn.adapters import dora
from jaxft.nn.adapters.full_modules import Replaced, TokenRows
from jaxft.nn.adapters.lora import Adapted
from jaxft.nn.adapters.lora_rows import adapters_of_rows
from jaxft.nn.layers import with_token_rows
from jaxft.nn.matmul import Weight, batched_dot, expand, expand_after, group_rows, matmul
from jaxft.nn.quant.quant import LIKE_WEIGHT, QTensor, take_rows


def lm_head(params: dict[str, Weight], h: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Return logits in float32 or wider, from `head` [D, V] or, tied, from `embed` [V, D].

    The adapter of a tied head is an Adapted `head` without a weight.
    """
    head = params.get("head")
    w = head.weight if isinstance(head, Adapted) else head
    logits = _head_matmul(h, base_table(params["embed"]), True) if w is None else _head_matmul(h, w, False)
    if not isinstance(head, Adapted):
        return logits
    if head.rows is not None:
        return _with_pairs_of_rows(logits, h, adapters_of_rows(head, h.dtype))
    low = matmul(h, head.a, False, False) * head.scale.astype(h.dtype)
    logits = logits + matmul(low, head.b, False, True)
    if head.gain is not None:
        return dora.scale_outputs(logits, head.gain)
    if head.magnitude is None:
        return logits
    weight = expand_after(params["embed"], h).T if w is None else expand_after(w, h)
    factors = dora.output_factors(head.magnitude, weight, head.a, head.b, head.scale)
    return dora.scale_outputs(logits, factors)


def _with_pairs_of_rows(logits: Float[Array, "B *T V"], h: Float[Array, "B *T D"], head: Adapted) -> Array:
    """Return logits with the adapter of each row."""
    low = batched_dot(group_rows(h, len(head.a)), head.a.astype(h.dtype), (1, 0), h.dtype)
    low = low * head.scale.astype(h.dtype)[:, None, None]
    logits = logits + batched_dot(low, head.b.astype(h.dtype), (1, 0), logits.dtype).reshape(logits.shape)
    return logits if head.gain is None else dora.scale_outputs(logits, head.gain)


def _head_matmul(h: Float[Array, "... D"], w: Weight, transposed: bool) -> Float[Array, "... V"]:
    """Return logits by a table [V, D] (`transposed`) or a head [D, V], of which rows may be replaced."""
    if not isinstance(w, TokenRows):
        return matmul(h, w, transposed, True)
    return matmul(h, w.weight, transposed, True).at[..., np.asarray(w.ids)].set(matmul(h, w.rows, True, True))


def base_table(table: Weight) -> Weight:
    """Return the table that a tied head reads: adapters of the table and its replacement do not change it,
    replaced rows do.
    """
    if isinstance(table, Adapted):
        return table.weight
    return table.base if isinstance(table, Replaced) else table


def head_params(params: dict[str, Weight]) -> dict[str, Weight]:
    """Return the subtree that lm_head reads: the head, or for a tied one the table and the adapter on it."""
    head = params.get("head")
    tied = head is None or (isinstance(head, Adapted) and head.weight is None)
    table = {"embed": base_table(params["embed"])} if tied and "embed" in params else {}
    return {**table, **({"head": head} if "head" in params else {})}


def head_of_tokens(head: dict[str, Weight], ids: Int[Array, " U"]) -> dict[str, Weight]:
    """Return the head of U tokens alone: from it, the logits function of a model returns [..., U].

    head: what lm_head reads. Only these tokens' rows of a table, and columns of a matrix, are read. ids: each
    token once.
    """
    found = {}
    if "embed" in head:
        found["embed"] = _rows(head["embed"], ids)
    if "head" in head:
        found["head"] = _columns(head["head"], ids)
    return found


def _rows(table: Weight, ids: Int[Array, " U"]) -> Float[Array, "U D"]:
    if isinstance(table, TokenRows):
        return with_token_rows(_rows(table.weight, ids)[None], table, ids[None])[0]
    return take_rows(table, ids) if isinstance(table, QTensor) else jnp.take(table, ids, axis=0)


def _columns(w: Weight, ids: Int[Array, " U"]) -> Weight:
    """Return the columns [D, U] of a head [D, V]."""

    def last(x: Array | None) -> Array | None:
        return None if x is None else jnp.take(x, ids, axis=-1)

    if isinstance(w, Adapted):
        weight = None if w.weight is None else _columns(w.weight, ids)
        return replace(w, weight=weight, b=last(w.b), magnitude=last(w.magnitude), gain=last(w.gain))
    if isinstance(w, TokenRows):
        columns = expand(_columns(w.weight, ids), w.rows.dtype)
        return with_token_rows(columns.T[None], w, ids[None])[0].T
    if isinstance(w, QTensor):
        parts: dict[str, Any] = {name: last(getattr(w, name)) for name in LIKE_WEIGHT}
        return replace(w, **parts)
    return last(w)
