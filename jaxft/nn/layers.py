"""Layers that model families share: embedding, norm, gated MLP, language model head; remat's names."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxft.distributed import sharding
from jaxft.nn.adapters.full_modules import Replaced, TokenRows
from jaxft.nn.adapters.lora import Adapted, output_factors, scale_outputs
from jaxft.nn.adapters.lora_rows import adapters_of_rows, chosen
from jaxft.nn.matmul import (
    Weight,
    accumulation_dtype,
    batched_dot,
    expand,
    expand_after,
    from_bits,
    gather_weight,
    group_rows,
    linear,
    matmul,
    to_bits,
)
from jaxft.nn.quant import LIKE_WEIGHT, QTensor, take_rows
from jaxft.nn.tree import Params


def embed(table: Weight, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Return the embeddings of tokens: rows of the table [V, D], rounded to `dtype`.

    A quantised table is dequantised after the look-up. On a mesh the table is gathered once along fsdp and
    context, and its gradient is reduced once. The table may have an adapter (Adapted), trained rows of some
    tokens (TokenRows), or be replaced by a trained table (Replaced).
    """
    if isinstance(table, Replaced):
        return embed(table.weight, ids, dtype)
    if isinstance(table, TokenRows):
        return with_token_rows(embed(table.weight, ids, dtype), table, ids)
    if isinstance(table, Adapted):
        return embed(table.weight, ids, dtype) + _embedded_pair(table, ids, dtype)
    if not sharding.is_multi_device():
        return take_rows(table, ids).astype(dtype) if isinstance(table, QTensor) else _take(table, ids, dtype)
    if isinstance(table, QTensor):
        return take_rows(gather_weight(table, TABLE), ids).astype(dtype)
    return _embed_spread(table, ids, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(table, ids, dtype):
    """Return rows of a plain table. Its gradient is summed over tokens in float32 or wider, then rounded."""
    return jnp.take(table, ids, axis=0).astype(dtype)


def _take_bwd(dtype, residuals, g):
    table, ids = residuals
    wide = jax.ShapeDtypeStruct(table.shape, accumulation_dtype(table.dtype))
    transposed = jax.linear_transpose(lambda table: jnp.take(table, ids, axis=0), wide)
    return transposed(g.astype(wide.dtype))[0].astype(table.dtype), None


_take.defvjp(lambda table, ids, dtype: (_take(table, ids, dtype), (table, ids)), _take_bwd)


def _embedded_pair(table: Adapted, ids: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Return the embeddings that the LoRA adapter of a table adds. With `table.rows` [B] the table has a
    stack of adapters, and the tokens in row i of `ids` use adapter `table.rows[i]`.
    """
    if table.rows is None:
        a = sharding.constrain(table.a, None, "rank")
        low = _take(a, ids, dtype) * table.scale.astype(dtype)
        return matmul(low, table.b, False, False)
    low = chosen(table.a, (table.rows[:, None], ids), dtype).astype(dtype)
    low = low * table.scale[table.rows].astype(dtype)[:, None, None]
    return batched_dot(low, chosen(table.b, table.rows, dtype).astype(dtype), (1, 0), dtype)


def with_token_rows(
    h: Float[Array, "B T D"], table: TokenRows, ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Return the embeddings `h` of `ids`, with the tokens in `table.ids` replaced by their trained rows."""
    order = np.argsort(table.ids)
    ordered = jnp.asarray(np.asarray(table.ids)[order], ids.dtype)
    at = jnp.minimum(jnp.searchsorted(ordered, ids), len(order) - 1)
    rows = _take(table.rows, jnp.asarray(order)[at], h.dtype)
    return jnp.where((ordered[at] == ids)[..., None], rows, h)


def neftune_noise(
    key: Key[Array, ""], segments: Int[Array, "B T"], width: int, alpha: float
) -> Float[Array, "B T D"]:
    """Return NEFTune's noise (Jain et al. 2024, arXiv:2310.05914): uniform in [-1, 1] times
    `alpha / sqrt(L D)`, where L is the number of tokens in the token's example (segment) and D is `width`; 0
    at padding.
    """
    B, T = segments.shape
    counts = jax.vmap(lambda row: jnp.zeros(T + 1, jnp.int32).at[row].add(1))(segments)
    lengths = jnp.take_along_axis(counts, segments, axis=1).astype(jnp.float32)
    scale = jnp.where(segments > 0, alpha / jnp.sqrt(lengths * width), 0.0)
    return jax.random.uniform(key, (B, T, width), jnp.float32, -1.0, 1.0) * scale[..., None]


TABLE = ("vocab", "table_width")


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed_spread(table, ids, dtype):
    sharded = sharding.constrain(table.astype(dtype), *TABLE)  # rounded before it is gathered
    return jnp.take(sharding.constrain(sharded, *sharding.gathered_axes(TABLE)), ids, axis=0)


def _embed_bwd(dtype, residuals, g):
    table, ids = residuals
    blocks = sharding.num_shards(("rows", "time"), ids.shape)
    wide = accumulation_dtype(table.dtype)
    height = table.shape[0] // sharding.num_shards(("act_vocab",), table.shape[:1])

    def add(ids, g):
        at = ids - (sharding.shard_start("tensor", height) if sharding.mesh_has("tensor") else 0)
        at = jnp.where(at < 0, height, at)  # rows of other parts of the table are out of range and dropped
        zeros = jnp.zeros((1, height, g.shape[-1]), wide)
        return zeros.at[0, at].add(g.astype(wide), mode="drop")

    axes, shape = ("read_rows", *sharding.gathered_axes(TABLE)), (blocks, *table.shape)
    parts = sharding.per_device(add, (("rows", "time"), ("rows", "time", "act_width")), axes, shape)(ids, g)
    return sharding.constrain(jnp.sum(parts, 0), *TABLE).astype(table.dtype), None


_embed_spread.defvjp(lambda table, ids, dtype: (_embed_spread(table, ids, dtype), (table, ids)), _embed_bwd)


def embed_tokens(
    table: Weight, ids: Int[Array, "B T"], dtype: DTypeLike, residual: DTypeLike
) -> Float[Array, "B T D"]:
    """Return the embeddings that start the residual stream: rounded to `dtype`, then cast to `residual`."""
    h = embed(table, sharding.constrain(ids, "rows", "time"), dtype).astype(residual)
    return sharding.constrain(h, "rows", "time", "act_width")


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float, out: DTypeLike
) -> Float[Array, "... D"]:
    """Return `x / sqrt(mean(x^2) + eps) * weight` in the dtype `out`, computed in float32 or wider."""
    wide = x.astype(accumulation_dtype(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + jnp.asarray(eps, wide.dtype))
    return (wide * scale * to_rank(weight.astype(wide.dtype), x.ndim)).astype(out)


def to_rank(x: Float[Array, "..."], rank: int) -> Float[Array, "..."]:
    """Add leading axes of size 1 until x has `rank` axes, as NumPy's broadcasting does implicitly."""
    return jnp.expand_dims(x, range(rank - x.ndim))


def gated(gate: Array, up: Array, activation: Callable[[Array], Array] = jax.nn.silu) -> Array:
    """Return `activation(gate) * up`, computed in float32 or wider, in the dtype of `gate`."""
    wide = accumulation_dtype(gate.dtype)
    return (activation(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def biased_linear(p: Params, name: str, x: Float[Array, "... I"], key: Array | None) -> Float[Array, "... O"]:
    """Return `x @ p[name]`, plus the bias `p["{name}_bias"]` if the family declares one.

    The bias is added in float32 or wider, so that its gradient, a sum over all tokens, has this precision.
    key: for dropout of an adapter's input, or None.
    """
    y, bias = linear(x, p[name], key), p.get(f"{name}_bias")
    if bias is None:
        return y
    wide = accumulation_dtype(y.dtype)
    return (y.astype(wide) + to_rank(bias.astype(wide), y.ndim)).astype(y.dtype)


def gated_mlp(
    p: Params, x_BTD: Float[Array, "B T D"], keys: Any, activation: Callable[[Array], Array] = jax.nn.silu
) -> Float[Array, "B T D"]:
    """Return `down(activation(gate(x)) * up(x))`. keys: three keys for the adapters' dropout, or Nones."""
    gate = saveable(
        sharding.constrain(biased_linear(p, "gate", x_BTD, keys[0]), "rows", "time", "mlp"), "gate"
    )
    up = saveable(sharding.constrain(biased_linear(p, "up", x_BTD, keys[1]), "rows", "time", "mlp"), "up")
    return biased_linear(p, "down", gated(gate, up, activation), keys[2])


def split_keys(key: Array | None, count: int) -> Any:
    """Split a random key into `count` keys; without a key, return `count` Nones."""
    return (None,) * count if key is None else jax.random.split(key, count)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def saveable(x: Array, name: str) -> Array:
    """Return x, named for remat: policies that save `name` store it for the backward pass, as raw bits."""
    return x


def _saveable_fwd(x, name):
    return from_bits(checkpoint_name(to_bits(x), name), x.dtype), None


saveable.defvjp(_saveable_fwd, lambda name, _, g: (g,))


def lm_head(params: dict[str, Weight], h: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Return the logits of hidden states h in float32 or wider, by the matrix `head` [D, V] or, with a tied
    head, by the table `embed` [V, D].

    params: has one or both of them. The adapter of a tied head is an Adapted `head` whose weight is None.
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
        return scale_outputs(logits, head.gain)
    if head.magnitude is None:
        return logits
    weight = expand_after(params["embed"], h).T if w is None else expand_after(w, h)
    factors = output_factors(head.magnitude, weight, head.a, head.b, head.scale)
    return scale_outputs(logits, factors)


def _with_pairs_of_rows(logits: Float[Array, "B *T V"], h: Float[Array, "B *T D"], head: Adapted) -> Array:
    """Add the output of each row's LoRA adapter to the base's logits. head: its leaves start with axis B."""
    low = batched_dot(group_rows(h, len(head.a)), head.a.astype(h.dtype), (1, 0), h.dtype)
    low = low * head.scale.astype(h.dtype)[:, None, None]
    logits = logits + batched_dot(low, head.b.astype(h.dtype), (1, 0), logits.dtype).reshape(logits.shape)
    return logits if head.gain is None else scale_outputs(logits, head.gain)


def _head_matmul(h: Float[Array, "... D"], w: Weight, transposed: bool) -> Float[Array, "... V"]:
    """Return logits by a table [V, D] (`transposed`) or a head [D, V]; either may be a TokenRows."""
    if not isinstance(w, TokenRows):
        return matmul(h, w, transposed, True)
    return matmul(h, w.weight, transposed, True).at[..., np.asarray(w.ids)].set(matmul(h, w.rows, True, True))


def base_table(table: Weight) -> Weight:
    """Return the table that a tied head uses: without a LoRA adapter of the embeddings, and the base's in
    place of a trained one (Replaced). Trained rows of tokens (TokenRows) remain.
    """
    if isinstance(table, Adapted):
        return table.weight
    return table.base if isinstance(table, Replaced) else table


def head_params(params: dict[str, Weight]) -> dict[str, Weight]:
    """Return the entries of `params` that lm_head uses: "head"; if tied, "embed" and the adapter's "head"."""
    head = params.get("head")
    tied = head is None or (isinstance(head, Adapted) and head.weight is None)
    table = {"embed": base_table(params["embed"])} if tied and "embed" in params else {}
    return {**table, **({"head": head} if "head" in params else {})}


def head_of_tokens(head: dict[str, Weight], ids: Int[Array, " U"]) -> dict[str, Weight]:
    """Return a language model head for U tokens only: with it, lm_head returns logits [..., U].

    head: the result of head_params. ids: the tokens, each once. Only their rows of the table, or their
    columns of the matrix, are read.
    """
    parts = {"embed": _rows, "head": _columns}
    return {name: part(head[name], ids) for name, part in parts.items() if name in head}


def _rows(table: Weight, ids: Int[Array, " U"]) -> Float[Array, "U D"]:
    if isinstance(table, TokenRows):
        return with_token_rows(_rows(table.weight, ids)[None], table, ids[None])[0]
    return take_rows(table, ids) if isinstance(table, QTensor) else jnp.take(table, ids, axis=0)


def _columns(w: Weight, ids: Int[Array, " U"]) -> Weight:
    """Return the columns [D, U] of the tokens `ids` in a head [D, V]."""

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
