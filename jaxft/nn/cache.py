"""Caches of keys and values for generation: prompts once, and the tokens that each completion adds.

A cache has P prompts and R rows. A row is a completion: it attends to the keys of its prompt, which all
completions of the prompt share, and to the keys of its own tokens. A layer with a sliding window of W tokens
caches only the last W of both (rounded up to a multiple of 64 if W is larger).

Each layer has arrays of its own. A decoding step reads those of prompts and rows without a copy and without a
change: it writes the token's keys to a few recent slots, from which `settle` copies them after at most RECENT
steps. XLA's CPU compiler would rewrite, in every step, arrays of 16-bit floats that change in part.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.distributed.sharding import constrain
from jaxft.nn.bits import from_bits, put_bits, to_bits
from jaxft.nn.cached_attention import (
    Keys,
    RowGroups,
    cached_attention,
    chunk_attention,
    joined_keys,
)
from jaxft.nn.layer_attention import EVERY_KEY, AttentionLayers, AttentionRule
from jaxft.tree import static, struct

CacheFormat = Literal["compute", "int8", "fp8"]  # of stored keys and values; compute: the compute dtype
LayerKeys = tuple[Keys, ...]  # of each layer
K_AXES = ("rows", "kv_heads", "head_dim", "whole_time")
V_AXES = ("rows", "kv_heads", "whole_time", "head_dim")
SCALE_AXES = ("rows", "kv_heads", "whole_time")


@struct
class PromptKeys:
    """The keys of prompts, and which of their slots [P, S] have a token. Prompts end in the last slot."""

    layers: LayerKeys
    visible: Any


@struct
class Cache:
    """The keys of P prompts and those of R completions of at most `new` tokens.

    rows: with N slots for each row, token i of its completion is in slot i % N. So attention adds over a
    row's keys in the same order whenever the row started. recent: the same with few slots, of which a token
    reads those in its block of RECENT tokens and in the one before, and none of these in `rows`.
    """

    prompts: PromptKeys
    rows: LayerKeys
    recent: LayerKeys
    new: int = static()


@struct
class NextToken:
    """The token of each row that a decoding step processes.

    positions: in its text, int32 [R]. counts: tokens of its completion, including this one, int32 [R].
    groups: which rows complete which prompt. read, prompt_read: only the first slots of rows and the last
    ones of prompts are read; None for all.
    """

    positions: Any
    counts: Any
    groups: RowGroups
    read: int | None = static(default=None)
    prompt_read: int | None = static(default=None)


@struct
class GivenChunk:
    """A chunk of given tokens for each of r rows in progress, which one pass over the model appends.

    ids [r, C]: padded on the right. lengths [r]: tokens of each row's chunk. counts [r]: tokens of its
    completion before the chunk. positions [r]: of the chunk's first token in the row's text. rows [r]: rows
    of the cache; beyond the last, nothing is stored. prompts [r]: prompt slots of these rows.
    """

    ids: Any
    lengths: Any
    counts: Any
    positions: Any
    rows: Any
    prompts: Any


RECENT = 16  # the most decoding steps between two calls of settle
SLOTS_PER_READ = 64  # steps that read fewer slots than all read a multiple of this


def row_slots(tokens: int) -> int:
    """Return how many slots to store for this many tokens: above 64, the next multiple of 64.

    XLA's CPU compiler sums 64, 128 or more slots in the same order, if the additional ones are 0. So
    attention does not depend on how many slots a step reads, or how long other prompts are.
    """
    return tokens if tokens <= SLOTS_PER_READ else -(-tokens // SLOTS_PER_READ) * SLOTS_PER_READ


def layer_slots(a: AttentionLayers, slots: int) -> list[int]:
    """Return how many of `slots` successive tokens each layer stores."""
    windows = [a.kinds[kind].window for kind in a.layout]
    return [slots if window is None else min(slots, row_slots(window)) for window in windows]


def empty_keys(
    heads: tuple[int, int], rows: int, slots: Sequence[int], dtype: Any, stored: CacheFormat = "compute"
) -> LayerKeys:
    """Return zeros for the keys of all layers. heads: their number, and the size of one. slots: of each
    layer. dtype: of the computation.
    """
    count, head_dim = heads

    def of(size: int) -> Keys:
        shape = rows, count, head_dim, size
        if stored == "compute":
            return Keys(jnp.zeros(shape, dtype), jnp.zeros((*shape[:2], size, head_dim), dtype))
        kind, scales = STORED_DTYPES[stored], [jnp.zeros((*shape[:2], size), jnp.float32) for _ in range(2)]
        return Keys(jnp.zeros(shape, kind), jnp.zeros((*shape[:2], size, head_dim), kind), *scales)

    return tuple(of(size) for size in slots)


# E4M3 as its bits: XLA's CPU compiler widens every other float8 array, a whole cache in each decoding step
STORED_DTYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.uint8}
LARGEST = {"int8": 127.0, "uint8": 448.0}


def store(k: Array, v: Array, like: Keys) -> Keys:
    """Return keys [..., E, S] and values [..., S, E] as `like` stores them: unchanged or, with a scale per
    token and head, as int8 or E4M3.
    """
    if like.k_scale is None:
        return Keys(k, v)
    (k, k_scale), (v, v_scale) = _scaled(k, -2, like.k.dtype), _scaled(v, -1, like.v.dtype)
    return Keys(k, v, k_scale, v_scale)


def _scaled(x: Array, axis: int, dtype: Any) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    largest = jnp.asarray(LARGEST[jnp.dtype(dtype).name], jnp.float32)
    scale = jnp.abs(x).max(axis) / largest
    x = x / jnp.expand_dims(jnp.where(scale == 0, jnp.ones_like(scale), scale), axis)
    if dtype == jnp.int8:
        return jnp.round(x).astype(dtype), scale
    return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), dtype), scale


def prompt_keys(k: Array, v: Array, visible: Array, a: AttentionLayers) -> PromptKeys:
    """Return the keys of left-padded prompts, from k [L, P, K, E, S] and v [L, P, K, S, E] as raw bits."""
    size = k.shape[4]
    layers = enumerate(layer_slots(a, size))
    return PromptKeys(tuple(Keys(k[i, ..., size - n :], v[i, :, :, size - n :]) for i, n in layers), visible)


def insert_prompts(cache: Cache, new: PromptKeys, slots: Array, dtype: Any) -> Cache:
    """Return the cache with new prompts in these prompt slots [p]; slots beyond the last are ignored.

    new: in the compute dtype.
    """

    def put(old: Keys, fresh: Keys) -> Keys:
        fresh = store(from_bits(fresh.k, dtype), from_bits(fresh.v, dtype), old)
        return jax.tree.map(lambda x, y: put_bits(x, slots, y), old, fresh)

    layers = tuple(put(*both) for both in zip(cache.prompts.layers, new.layers, strict=True))
    visible = cache.prompts.visible.at[slots].set(new.visible, mode="drop")
    return replace(cache, prompts=PromptKeys(sharded(layers), visible))


def widen_prompts(keys: PromptKeys, like: PromptKeys) -> PromptKeys:
    """Return the keys of prompts padded on the left to the slots of `like`, as prompt_keys returns them for
    longer prompts.
    """

    def pad(x: Array, slots: int, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (slots - x.shape[axis], 0)
        return jnp.pad(x, widths)

    def of(own: Keys, other: Keys) -> Keys:
        slots = other.k.shape[3]
        return Keys(pad(own.k, slots, 3), pad(own.v, slots, 2))

    layers = tuple(of(*both) for both in zip(keys.layers, like.layers, strict=True))
    return PromptKeys(layers, pad(keys.visible, like.visible.shape[1], 1))


def key_axes(layers: LayerKeys) -> LayerKeys:
    """Return the logical axes of every array of the keys."""

    def of(keys: Keys) -> Keys:
        scale = None if keys.k_scale is None else SCALE_AXES
        return Keys(K_AXES, V_AXES, scale, scale)

    return tuple(of(keys) for keys in layers)


def sharded(layers: LayerKeys) -> LayerKeys:
    """Shard keys over rows and heads."""
    return jax.tree.map(lambda x, axes: constrain(x, *axes), layers, key_axes(layers))


def select_rows(layers: LayerKeys, rows: Array) -> LayerKeys:
    """Return the keys of these rows (or prompts)."""
    return jax.tree.map(lambda x: x[rows], layers)


def clear_values(layers: LayerKeys, rows: Array) -> LayerKeys:
    """Set the values of rows to 0: a NaN of an earlier completion would pass through weights of 0."""

    def zero(x: Array | None) -> Array | None:
        return None if x is None else put_bits(x, rows, jnp.zeros((), x.dtype))

    return tuple(Keys(keys.k, zero(keys.v), keys.k_scale, zero(keys.v_scale)) for keys in layers)


def append(recent: Keys, k: Array, v: Array, counts: Array) -> Keys:
    """Store a layer's keys [R, K, E, 1] and values [R, K, 1, E] of the last token of each row.

    counts: tokens of the completions, including this one, int32 [R].
    """
    new, size = store(k, v, recent), recent.k.shape[3]
    here = (
        jnp.arange(size, dtype=counts.dtype)[None]
        == ((counts - 1) % jnp.asarray(size, counts.dtype))[:, None]
    )

    def put(old: Array | None, x: Array | None, axis: int) -> Array | None:
        if old is None or x is None:
            return None
        return jnp.where(_along(here, axis, old), jnp.broadcast_to(x, old.shape), old)

    return Keys(
        put(recent.k, new.k, 3), put(recent.v, new.v, 2), put(recent.k_scale, new.k_scale, 2),
        put(recent.v_scale, new.v_scale, 2),
    )  # fmt: skip


def _along(x: Array, axis: int, like: Array) -> Array:
    """Return an array [R, S] in the shape of keys with the slots on this axis."""
    shape = [1] * like.ndim
    shape[0], shape[axis] = x.shape
    return jnp.broadcast_to(x.reshape(shape), (*like.shape[:axis], x.shape[1], *like.shape[axis + 1 :]))


def settle(cache: Cache, before: Array, after: Array) -> Cache:
    """Copy recent tokens to the slots of rows. before, after: tokens of each row's completion at the last
    call and now, at most RECENT more, int32 [R].
    """

    def copied(rows: Keys, recent: Keys) -> Keys:
        tokens, size = _tokens_in_slots(after, rows.k.shape[3]), recent.k.shape[3]
        is_new, at = tokens >= before[:, None], tokens % jnp.asarray(size, tokens.dtype)

        def put(old: Array | None, new: Array | None, axis: int) -> Array | None:
            if old is None or new is None:
                return None
            found = jnp.take_along_axis(to_bits(new), _along(at, axis, old), axis)
            return from_bits(jnp.where(_along(is_new, axis, old), found, to_bits(old)), old.dtype)

        return Keys(
            put(rows.k, recent.k, 3), put(rows.v, recent.v, 2), put(rows.k_scale, recent.k_scale, 2),
            put(rows.v_scale, recent.v_scale, 2),
        )  # fmt: skip

    return replace(cache, rows=tuple(map(copied, cache.rows, cache.recent)))


def _tokens_in_slots(counts: Array, size: int) -> Array:
    """Return which token of its completion is in each slot of each row, int32 [R, size]; below 0 for none."""
    last, slots = counts[:, None] - 1, jnp.arange(size, dtype=counts.dtype)[None]
    return last - (last - slots) % jnp.asarray(size, counts.dtype)


def append_chunk(keys: Keys, k: Array, v: Array, chunk: GivenChunk) -> Keys:
    """Store a layer's keys [r, K, E, C] and values [r, K, C, E] of a chunk."""
    new, (rows, *_, size), C = store(k, v, keys), keys.k.shape, k.shape[3]
    i = jnp.arange(C, dtype=chunk.counts.dtype)[None]
    slots = (chunk.counts[:, None] + i) % jnp.asarray(size, i.dtype)
    stored = (i < chunk.lengths[:, None]) & (i >= chunk.lengths[:, None] - size)  # the last ones of a window
    at = jnp.where(stored, chunk.rows[:, None], rows)

    def put(old: Array | None, x: Array | None, axis: int) -> Array | None:
        if old is None or x is None:
            return None
        index = (at, *(slice(None),) * (axis - 1), slots)
        return put_bits(old, index, jnp.moveaxis(x, axis, 1))

    return Keys(
        put(keys.k, new.k, 3), put(keys.v, new.v, 2), put(keys.k_scale, new.k_scale, 2),
        put(keys.v_scale, new.v_scale, 2),
    )  # fmt: skip


@struct
class Step:
    """What the layers of a decoding step share: the prompts' visible slots, and the rows' tokens.

    group_counts [P, G]: counts of the rows of each prompt.
    """

    at: NextToken
    visible: Any
    group_counts: Any


def attend(
    q: Float[Array, "R 1 H E"], keys: tuple[Keys, Keys, Keys], step: Step, rule: AttentionRule
) -> Float[Array, "R 1 H E"]:
    """Return the attention of each row's token in one layer.

    keys: of prompts, of rows and recent ones, as stored. rule: window and soft cap.
    """
    prompts, rows, recent = (_as_computed(some, q.dtype) for some in keys)
    size, at = rows.k.shape[3], step.at
    tokens, of_recent = (_tokens_in_slots(at.counts, n) for n in (size, recent.k.shape[3]))
    if at.read is not None and at.read < size:
        rows, tokens = rows.part(0, at.read), tokens[:, : at.read]
    if at.prompt_read is not None:
        prompts = prompts.part(max(0, prompts.k.shape[3] - at.prompt_read), prompts.k.shape[3])
    first_recent = ((at.counts - 1) // RECENT - 1)[:, None] * RECENT
    seen_rows, seen_recent = (
        (tokens >= 0) & (tokens < first_recent),
        of_recent >= jnp.maximum(first_recent, 0),
    )
    used = prompts.k.shape[3]
    from_end = jnp.arange(used - 1, -1, -1, dtype=at.counts.dtype)
    seen_prompts = step.visible[:, None, step.visible.shape[1] - used :]
    if rule.window is not None:
        first = at.counts[:, None] - rule.window
        seen_rows, seen_recent = seen_rows & (tokens >= first), seen_recent & (of_recent >= first)
        seen_prompts = seen_prompts & (step.group_counts[:, :, None] + from_end[None, None] < rule.window)
    own = (rows, seen_rows), (recent, seen_recent)
    return cached_attention(q[:, 0], (prompts, seen_prompts), own, at.groups, rule.softcap)[:, None]


def attend_chunk(
    qkv: tuple[Float[Array, "r C H E"], Float[Array, "r K E C"], Float[Array, "r K C E"]],
    keys: tuple[Keys, Keys],
    at: tuple[GivenChunk, Array],
    rule: AttentionRule,
) -> Float[Array, "r C H E"]:
    """Return the attention of each row's chunk in one layer: to its prompt, to its stored keys and causally
    to itself.

    qkv: of the chunk. keys: as in attend, before the chunk is stored. at: the chunk, and which slots of
    prompts are visible.
    """
    (q, k, v), (chunk, visible) = qkv, at
    prompts, rows = (_as_computed(some, q.dtype) for some in keys)
    prompts, rows = prompts.of_rows(chunk.prompts), rows.of_rows(chunk.rows)
    used, size, counts = prompts.k.shape[3], rows.k.shape[3], chunk.counts[:, None]

    def numbers(count: int) -> Array:
        return jnp.arange(count, dtype=counts.dtype)[None]

    # places in the text, counted from the first token of the completion
    nowhere = jnp.asarray(EVERY_KEY, counts.dtype)
    of_prompts = jnp.where(visible[chunk.prompts, -used:], numbers(used) - used, nowhere)
    of_rows = _tokens_in_slots(chunk.counts, size)
    of_rows = jnp.where(of_rows >= 0, of_rows, nowhere)
    of_chunk = counts + numbers(q.shape[1])
    stored = joined_keys([prompts, rows, Keys(k, v)])
    places = jnp.concatenate([of_prompts, of_rows, of_chunk], 1)
    return chunk_attention(q, stored, (places, of_chunk), rule)


def _as_computed(keys: Keys, dtype: Any) -> Keys:
    """Return stored keys in the compute dtype, with their scales."""
    k, v = keys.k, keys.v
    if k.dtype == jnp.uint8:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn) for x in (k, v))
    return Keys(k.astype(dtype), v.astype(dtype), keys.k_scale, keys.v_scale)
