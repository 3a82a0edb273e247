"""Caches for generation: keys and values of each prompt, stored once, and of the tokens that each completion
adds; attention to them.

A cache has P prompts and R rows. A row is a completion: it attends to the keys of its prompt, which all
completions of the prompt share and which are read once for all of them (Hydragen, Juravsky et al. 2024,
arXiv:2402.05099), and to the keys of its own tokens. One softmax normalises both. The key and value of a
token are stored in a slot, an index of the axis S or N. Layers with a sliding window of W tokens have slots
for the last W tokens only (rounded up to a multiple of 64 if W is above 64). Recurrent layers cache one
state for each prompt and row.

The caches of prompts and of rows are tuples with one part for each layer of the stacks' blocks (in the order
of stack.layers_of); a part contains Keys, or RecurrentState if its layer is recurrent.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.distributed.sharding import constrain
from jaxft.nn.attention.flash_attention import MASKED, soft_capped
from jaxft.nn.attention.layer_attention import EVERY_KEY, AttentionLayers, AttentionRule
from jaxft.nn.matmul import concat_bits, from_bits, to_bits, wide_einsum
from jaxft.nn.tree import static, struct


@struct
class Keys:
    """Cached keys [L, B, K, E, S] and values [L, B, K, S, E] of L layers, in the layouts of the two matmuls.

    B: prompts or rows. Stored in the compute dtype, 16-bit floats as raw bits (see to_bits), or quantised
    with a scale for each token and head, [L, B, K, S]. Inside attention, the Keys of one layer have no axis
    L, and k and v are converted to the compute dtype but not multiplied by their scales.
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None

    def part(self, start: int, end: int) -> "Keys":
        """Return the slots start .. end - 1 of one layer's Keys."""
        scales = (None if x is None else x[:, :, start:end] for x in (self.k_scale, self.v_scale))
        return Keys(self.k[..., start:end], self.v[:, :, start:end], *scales)

    def of_rows(self, rows: Array) -> "Keys":
        """Return the Keys of these rows (or prompts), from the Keys of one layer."""
        return jax.tree.map(lambda x: x[rows], self)


def joined_keys(parts: Sequence[Keys]) -> Keys:
    """Concatenate Keys of one layer along their slots. If only some parts have scales, others get 1."""

    def scales(of: Callable[[Keys], Any]) -> Any:
        if all(of(x) is None for x in parts):
            return None
        ones = [jnp.ones((*x.k.shape[:2], x.k.shape[3]), jnp.float32) for x in parts]
        return jnp.concatenate([y if of(x) is None else of(x) for x, y in zip(parts, ones, strict=True)], 2)

    k = concat_bits([x.k for x in parts], 3)
    v = concat_bits([x.v for x in parts], 2)
    return Keys(k, v, scales(lambda x: x.k_scale), scales(lambda x: x.v_scale))


@struct
class RowGroups:
    """The assignment of rows to the prompts that they complete.

    rows: the row of each of the up to G completions of a prompt, int32 [P, G]; the entries of missing
    completions may be any row, as their results are not used. places: the index of each row in
    `rows.ravel()`, int32 [R].
    """

    rows: Any
    places: Any

    def to_groups(self, x: Array) -> Array:
        """Group an array over rows by prompt: [R, ...] to [P, G, ...]."""
        return x[self.rows]

    def to_rows(self, x: Array) -> Array:
        """Invert to_groups: [P, G, ...] to [R, ...]."""
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[self.places]


def cached_attention(
    q_RHE: Float[Array, "R H E"],
    prompts: tuple[Keys, Bool[Array, "P g S"]],
    rows: tuple[Keys, Bool[Array, "R N"]],
    groups: RowGroups,
    softcap: float | None = None,
) -> Float[Array, "R H E"]:
    """Return softmax(q k^T / sqrt(E)) v of one query per row, over the visible keys of its prompt and of its
    own tokens.

    prompts: the prompts' Keys, and which of their slots each completion sees, [P, G, S] or [P, 1, S] if all
    see the same. rows: the rows' Keys, and which of its slots each row sees. softcap: see attention.dense.
    The output of a row without visible keys is 0.
    """
    (R, H, E), (of_prompts, seen_PGS), (own, seen_RN) = q_RHE.shape, prompts, rows
    P, K, _, S = of_prompts.k.shape
    if groups.rows.shape[1] == 1 and H == K:
        # XLA's CPU compiler multiplies a single query by other kernels than several, so there are two
        groups = RowGroups(jnp.repeat(groups.rows, 2, 1), groups.places * 2)
    G = groups.rows.shape[1]
    q_RKQE = q_RHE.reshape(R, K, H // K, E)
    q_PKGQE = groups.to_groups(q_RKQE).swapaxes(1, 2)
    s_PKGQS = wide_einsum(
        "pkme,pkes->pkms", q_PKGQE.reshape(P, K, G * (H // K), E), of_prompts.k, widen=False
    )
    s_PKGQS = _scores(s_PKGQS, of_prompts, E, softcap).reshape(P, K, G, H // K, S)
    s_RKQN = _scores(wide_einsum("rkqe,rken->rkqn", q_RKQE, own.k, widen=False), own, E, softcap)
    seen_PKGQS, seen_RKQN = seen_PGS[:, None, :, None], seen_RN[:, None, None]
    s_PKGQS, s_RKQN = jnp.where(seen_PKGQS, s_PKGQS, MASKED), jnp.where(seen_RKQN, s_RKQN, MASKED)
    top_RKQ = jnp.maximum(groups.to_rows(s_PKGQS.max(-1).swapaxes(1, 2)), s_RKQN.max(-1))
    top_PKGQ = groups.to_groups(top_RKQ).swapaxes(1, 2)
    p_PKGQS = jnp.where(seen_PKGQS, jnp.exp(s_PKGQS - top_PKGQ[..., None]), 0)
    p_RKQN = jnp.where(seen_RKQN, jnp.exp(s_RKQN - top_RKQ[..., None]), 0)
    sum_RKQ = groups.to_rows(p_PKGQS.sum(-1).swapaxes(1, 2)) + p_RKQN.sum(-1)
    sum_RKQ = jnp.where(sum_RKQ == 0, 1, sum_RKQ)
    sum_PKGQ = groups.to_groups(sum_RKQ).swapaxes(1, 2)
    p_PKMS = _weights(p_PKGQS / sum_PKGQ[..., None], of_prompts).reshape(P, K, G * (H // K), S)
    o_PKGQE = wide_einsum("pkms,pkse->pkme", p_PKMS, of_prompts.v, widen=False).reshape(P, K, G, H // K, E)
    o_RKQE = wide_einsum("rkqn,rkne->rkqe", _weights(p_RKQN / sum_RKQ[..., None], own), own.v, widen=False)
    o_RKQE = o_RKQE + groups.to_rows(o_PKGQE.swapaxes(1, 2))
    return o_RKQE.reshape(R, H, E).astype(q_RHE.dtype)


QUERIES_PER_BLOCK = 64  # of a chunk whose scores exist at a time


def chunk_attention(
    q_RCHE: Float[Array, "R C H E"],
    keys: Keys,
    at: tuple[Int[Array, "R S"], Int[Array, "R C"]],
    rule: AttentionRule,
) -> Float[Array, "R C H E"]:
    """Return softmax(q k^T / sqrt(E)) v of C queries per row, over the visible keys of the row.

    keys: of one layer, [R, ...]. at: (positions of the keys, positions of the queries) in the row's text. A
    query sees the keys at its position and before it that are in the window. rule: window and soft cap.
    """
    (R, C, H, E), K, (of_keys_RS, of_queries_RC) = q_RCHE.shape, keys.k.shape[1], at

    def block(q_RBHE: Array, at_RB: Array) -> Array:
        B, S = at_RB.shape[1], of_keys_RS.shape[1]
        q_RKQBE = q_RBHE.reshape(R, B, K, H // K, E).transpose(0, 2, 3, 1, 4)
        s_RKMS = wide_einsum("rkme,rkes->rkms", q_RKQBE.reshape(R, K, H // K * B, E), keys.k, widen=False)
        s_RKQBS = _scores(s_RKMS, keys, E, rule.softcap).reshape(R, K, H // K, B, S)
        back_RBS = at_RB[:, :, None] - of_keys_RS[:, None]
        seen_RBS = back_RBS >= 0 if rule.window is None else (back_RBS >= 0) & (back_RBS < rule.window)
        seen = seen_RBS[:, None, None]
        s_RKQBS = jnp.where(seen, s_RKQBS, MASKED)
        p_RKQBS = jnp.where(seen, jnp.exp(s_RKQBS - s_RKQBS.max(-1, keepdims=True)), 0)
        total = p_RKQBS.sum(-1, keepdims=True)
        p_RKQBS = _weights(p_RKQBS / jnp.where(total == 0, 1, total), keys)
        p_RKMS = p_RKQBS.reshape(R, K, H // K * B, S)
        o_RKME = wide_einsum("rkms,rkse->rkme", p_RKMS, keys.v, widen=False)
        o_RBKQE = o_RKME.reshape(R, K, H // K, B, E).transpose(0, 3, 1, 2, 4)
        return o_RBKQE.reshape(R, B, H, E).astype(q_RBHE.dtype)

    if C <= QUERIES_PER_BLOCK:
        return block(q_RCHE, of_queries_RC)
    count = -(-C // QUERIES_PER_BLOCK)

    def blocks(x: Array) -> Array:  # [R, C, ...] as [count, R, C / count, ...]
        x = jnp.pad(x, ((0, 0), (0, count * QUERIES_PER_BLOCK - C), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(R, count, QUERIES_PER_BLOCK, *x.shape[2:]).swapaxes(0, 1)

    o = jax.lax.map(lambda x: block(*x), (blocks(q_RCHE), blocks(of_queries_RC)))
    return o.swapaxes(0, 1).reshape(R, count * QUERIES_PER_BLOCK, H, E)[:, :C]


def _scores(s: Array, keys: Keys, head_dim: int, softcap: float | None) -> Array:
    """Divide scores q k^T [B, K, M, S] by sqrt(head_dim), apply the keys' scales, and soft-cap them."""
    s = s * head_dim**-0.5
    return soft_capped(s if keys.k_scale is None else s * keys.k_scale[:, :, None].astype(s.dtype), softcap)


def _weights(p: Array, keys: Keys) -> Array:
    """Return probabilities [B, K, ..., S], times the scales of the values, in the values' dtype."""
    if keys.v_scale is not None:
        scale = keys.v_scale.astype(p.dtype)
        p = p * scale.reshape(*scale.shape[:2], *(1,) * (p.ndim - 3), scale.shape[-1])
    return p.astype(keys.v.dtype)


CacheFormat = Literal["compute", "int8", "fp8"]  # of stored keys and values; compute: the compute dtype
K_AXES = ("layers", "rows", "kv_heads", "head_dim", "whole_time")
V_AXES = ("layers", "rows", "kv_heads", "whole_time", "head_dim")
SCALE_AXES = ("layers", "rows", "kv_heads", "whole_time")


@struct
class LayerKeys:
    """The cached Keys of several layers. full: of the layers that attend to all tokens. window: of the layers
    with a sliding window, which have fewer slots. None if there are no such layers.
    """

    full: Keys | None
    window: Keys | None


@struct
class RecurrentState:
    """The state of recurrent layers for each prompt or row. axes: the names of the axes after L and B."""

    value: Any  # [L, B, ...]
    axes: tuple[str, ...] = static()


CacheParts: TypeAlias = Any  # of a cache: a tuple, or in Cache.part one of its elements


@struct
class PromptKeys:
    """The cache of prompts. visible: bools [P, S], whether a slot has a token; the last slot always has."""

    layers: CacheParts
    visible: Any


@struct
class Cache:
    """The cached arrays of P prompts and of R completions of at most `new` tokens.

    rows: a row has N slots, and token i of its completion is in slot i % N. So attention sums over a row's
    keys in the same order, no matter at which decoding step the row started.
    """

    prompts: PromptKeys
    rows: CacheParts
    new: int = static()

    def part(self, number: int) -> "Cache":
        """Return the cache of one part: `prompts.layers` and `rows` are its entry, not a tuple of parts."""
        prompts = replace(self.prompts, layers=self.prompts.layers[number])
        return replace(self, prompts=prompts, rows=self.rows[number])


@struct
class NextToken:
    """The token of each row that a decoding step processes.

    positions: of the token in its text (prompt and completion), int32 [R]. counts: the number of tokens of
    its completion so far, this one included, int32 [R]. groups: which rows complete which prompt. read:
    attention sees only the first `read` slots of a row. prompt_read: it sees only the last `prompt_read`
    slots of a prompt. None: it sees all.
    """

    positions: Any
    counts: Any
    groups: RowGroups
    read: int | None = static(default=None)
    prompt_read: int | None = static(default=None)


@struct
class GivenChunk:
    """Tokens that are not sampled, such as a tool's output, for r rows; one pass of the model appends them.

    ids [r, C]: the tokens, padded on the right. lengths [r]: tokens of each chunk. counts [r]: tokens of the
    row's completion before the chunk. positions [r]: of the chunk's first token in the row's text. rows [r]:
    indices of the rows in the cache; chunks with an index of R or above are not stored. prompts [r]: indices
    of the rows' prompts in the cache.
    """

    ids: Any
    lengths: Any
    counts: Any
    positions: Any
    rows: Any
    prompts: Any


SLOTS_PER_READ = 64  # steps that read fewer slots than all read a multiple of this


def row_slots(tokens: int) -> int:
    """Return how many slots to store for this many tokens: `tokens` up to 64, otherwise rounded up to a
    multiple of 64.

    XLA's CPU compiler sums 64, 128 or more slots in the same order if the additional slots are 0, so the
    result of attention does not depend on how many slots a step reads, or how long other prompts are.
    """
    return tokens if tokens <= SLOTS_PER_READ else -(-tokens // SLOTS_PER_READ) * SLOTS_PER_READ


def empty_keys(
    a: AttentionLayers, heads: int, rows: int, slots: int, dtype: Any, stored: CacheFormat = "compute"
) -> LayerKeys:
    """Return Keys of zeros for all layers of `a`. heads: kv heads. rows: rows, or prompts. slots: per row.
    dtype: of the computation. stored: the format of the stored keys and values.
    """

    def of(layers: int, size: int) -> Keys | None:
        if not layers:
            return None
        shape = layers, rows, heads, a.head_dim, size
        if stored == "compute":
            bits = to_bits(jnp.zeros((), dtype)).dtype
            return Keys(jnp.zeros(shape, bits), jnp.zeros((*shape[:3], size, a.head_dim), bits))
        kind, scales = STORED_DTYPES[stored], jnp.zeros((*shape[:3], size), jnp.float32)
        return Keys(jnp.zeros(shape, kind), jnp.zeros((*shape[:3], size, a.head_dim), kind), scales, scales)

    windows = int(a.windowed.sum())
    return LayerKeys(of(len(a.layout) - windows, slots), of(windows, min(slots, row_slots(a.longest_window))))


# E4M3 as its bits: XLA's CPU compiler would widen float8 arrays, the full cache in each decoding step
STORED_DTYPES: dict[str, Any] = {"int8": jnp.int8, "fp8": jnp.uint8}
LARGEST = {"int8": 127.0, "uint8": 448.0}


def store(k: Array, v: Array, like: Keys) -> Keys:
    """Return keys [..., E, S] and values [..., S, E] as Keys in the format of `like`.

    If `like` has scales, they become int8 or E4M3 with a scale for each token and head; else they keep their
    dtype, 16-bit floats as raw bits (see to_bits).
    """
    if like.k_scale is None:
        return Keys(to_bits(k), to_bits(v))
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


def prompt_keys(k: Array, v: Array, a: AttentionLayers) -> LayerKeys:
    """Return the LayerKeys of left-padded prompts from k [L, P, K, E, S] and v [L, P, K, S, E], 16-bit floats
    as raw bits. Layers with a window keep only their last slots.
    """
    windowed = a.windowed

    def of(layers: np.ndarray, keep: int | None) -> Keys | None:
        if not layers.any():
            return None
        own_k, own_v = (k, v) if layers.all() else (k[np.flatnonzero(layers)], v[np.flatnonzero(layers)])
        start = 0 if keep is None else max(0, k.shape[4] - keep)
        return Keys(own_k[..., start:], own_v[:, :, :, start:])

    return LayerKeys(of(~windowed, None), of(windowed, row_slots(a.longest_window)))


def is_keys(x: Any) -> bool:
    """Return whether a node is a Keys. Pass it as `is_leaf` to tree functions over a cache."""
    return isinstance(x, Keys)


def insert_prompts(cache: Cache, new: PromptKeys, slots: Array, dtype: Any) -> Cache:
    """Return the cache with its prompts at the indices `slots` [p] replaced by p new prompts; indices of P
    and above are ignored.

    new: the new prompts in `dtype`, the compute dtype, 16-bit floats as raw bits; they are stored in the
    cache's format.
    """

    def put(old: Any, fresh: Any) -> Any:
        if is_keys(old):
            fresh = store(from_bits(fresh.k, dtype), from_bits(fresh.v, dtype), old)
        return jax.tree.map(lambda x, y: x.at[:, slots].set(y, mode="drop"), old, fresh)

    layers = jax.tree.map(put, cache.prompts.layers, new.layers, is_leaf=is_keys)
    visible = cache.prompts.visible.at[slots].set(new.visible, mode="drop")
    return replace(cache, prompts=PromptKeys(sharded(layers), visible))


def widen_prompts(keys: PromptKeys, like: PromptKeys) -> PromptKeys:
    """Pad the cache of prompts on the left to as many slots as `like` has."""

    def pad(x: Array, slots: int, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (slots - x.shape[axis], 0)
        return jnp.pad(x, widths)

    def of(part: Any, other: Any) -> Any:
        return (
            Keys(pad(part.k, other.k.shape[4], 4), pad(part.v, other.k.shape[4], 3))
            if is_keys(part)
            else part
        )

    layers = jax.tree.map(of, keys.layers, like.layers, is_leaf=is_keys)
    return PromptKeys(layers, pad(keys.visible, like.visible.shape[1], 1))


def cache_axes(layers: CacheParts) -> CacheParts:
    """Return a tree like `layers` with the logical axes of every array."""

    def of(x: Any) -> Any:
        if isinstance(x, RecurrentState):
            return replace(x, value=("layers", "rows", *x.axes))
        scale = None if x.k_scale is None else SCALE_AXES
        return Keys(K_AXES, V_AXES, scale, scale)

    return jax.tree.map(of, layers, is_leaf=lambda x: isinstance(x, Keys | RecurrentState))


def sharded(layers: CacheParts) -> CacheParts:
    """Shard a cache's parts over rows and heads."""
    return jax.tree.map(lambda x, axes: constrain(x, *axes), layers, cache_axes(layers))


def select_rows(layers: CacheParts, rows: Array) -> CacheParts:
    """Return the cache's parts for these rows (or prompts) only."""
    return jax.tree.map(lambda x: x[:, rows], layers)


def clear_values(layers: CacheParts, rows: Array) -> CacheParts:
    """Set the cached values (v) of rows, and their scales, to 0 before the rows are used again: a NaN of an
    earlier completion times an attention weight of 0 would be NaN.
    """

    def cleared(x: Array) -> Array:
        return x.at[:, rows].set(jnp.zeros((), x.dtype), mode="drop")

    def of(x: Any) -> Any:
        if not is_keys(x):
            return x
        return replace(x, v=cleared(x.v), v_scale=jax.tree.map(cleared, x.v_scale))

    return jax.tree.map(of, layers, is_leaf=is_keys)


def append(keys: Keys, k: Array, v: Array, layer: Array, counts: Array, used: Any = True) -> Keys:
    """Store one layer's keys k [R, K, E, 1] and values v [R, K, 1, E] of the last token of each row.

    layer: the layer's index in `keys`. counts: tokens of each completion, the last one included, int32 [R].
    used: if False, return `keys` unchanged.
    """
    new, layers, size = store(k, v, keys), keys.k.shape[0], keys.k.shape[4]
    slots = (counts - 1) % jnp.asarray(size, counts.dtype)
    layer = jnp.where(used, layer, layers).astype(counts.dtype)  # beyond the last, it is dropped
    at_R2 = jnp.stack([jnp.broadcast_to(layer, slots.shape), slots], -1)

    def put(axis: int, old: Array, x: Array) -> Array:
        # rows are a batching dimension, so that each device of a mesh updates its own
        where = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, old.ndim - 2)),
            inserted_window_dims=(0, axis),
            scatter_dims_to_operand_dims=(0, axis),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        updates = x.squeeze(axis - 1)
        return jax.lax.scatter(
            old, at_R2, updates, where, unique_indices=True, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
        )

    return _map_slots(put, keys, new)


def _map_slots(fn: Callable[..., Array], keys: Keys, *others: Keys) -> Keys:
    """Map `fn(axis, array, *other arrays)` over the arrays of Keys; axis: the array's axis of slots."""
    axes = Keys(4, 3) if keys.k_scale is None else Keys(4, 3, 3, 3)
    return jax.tree.map(fn, axes, keys, *others)


def append_chunks(rows: LayerKeys, new: Keys, chunk: GivenChunk, a: AttentionLayers) -> LayerKeys:
    """Append the keys and values of a chunk to its rows' cache. new: as `store` returns them."""

    def of(keys: Keys | None, layers: np.ndarray) -> Keys | None:
        if keys is None:
            return None
        of_layers = new if layers.all() else jax.tree.map(lambda x: x[np.flatnonzero(layers)], new)
        return append_chunk(keys, of_layers, chunk)

    return LayerKeys(of(rows.full, ~a.windowed), of(rows.window, a.windowed))


def append_chunk(keys: Keys, new: Keys, chunk: GivenChunk) -> Keys:
    """Append a chunk's Keys, k [L, r, K, E, C] and v [L, r, K, C, E], to the Keys of all rows."""
    rows, size, C = keys.k.shape[1], keys.k.shape[4], new.k.shape[4]
    i = jnp.arange(C, dtype=chunk.counts.dtype)[None]
    slots = (chunk.counts[:, None] + i) % jnp.asarray(size, i.dtype)
    stored = (i < chunk.lengths[:, None]) & (i >= chunk.lengths[:, None] - size)  # the last ones of a window
    at = jnp.where(stored, chunk.rows[:, None], rows)

    def put(axis: int, old: Array, x: Array) -> Array:
        index = (slice(None), at, *(slice(None),) * (axis - 2), slots)
        return old.at[index].set(jnp.moveaxis(x, (1, axis), (0, 1)), mode="drop")

    return _map_slots(put, keys, new)


@struct
class Step:
    """The arrays that all layers of a decoding step use. at: the token of each row. visible: as in
    PromptKeys. group_counts [P, G]: `at.counts`, grouped by prompt.
    """

    at: NextToken
    visible: Any
    group_counts: Any


def attend(
    q: Float[Array, "R 1 H E"], keys: tuple[Keys, Keys], index: Array, step: Step, rule: AttentionRule
) -> Float[Array, "R 1 H E"]:
    """Return the attention of each row's newest token, in one layer, to the tokens of its prompt and of its
    completion so far, itself included.

    q: queries of the newest tokens, whose keys are stored already. keys: of all prompts, and of all rows, for
    a stack of layers. index: of the layer in both. step: row counts and masks. rule: window and soft cap.
    """
    prompts, rows = (_layer_of(some, index, q.dtype) for some in keys)
    size, at = rows.k.shape[3], step.at
    rows = rows if at.read is None else rows.part(0, min(at.read, size))
    if at.prompt_read is not None:
        prompts = prompts.part(max(0, prompts.k.shape[3] - at.prompt_read), prompts.k.shape[3])
    slots, counts = jnp.arange(rows.k.shape[3], dtype=at.counts.dtype), at.counts[:, None]
    # tokens between the key and the query
    back = (counts - 1 - slots[None]) % jnp.asarray(size, counts.dtype)
    seen_rows = back < counts
    used = prompts.k.shape[3]
    from_end = jnp.arange(used - 1, -1, -1, dtype=at.counts.dtype)
    seen_prompts = step.visible[:, None, step.visible.shape[1] - used :]
    if rule.window is not None:
        seen_rows &= back < rule.window
        seen_prompts = seen_prompts & (step.group_counts[:, :, None] + from_end[None, None] < rule.window)
    return cached_attention(q[:, 0], (prompts, seen_prompts), (rows, seen_rows), at.groups, rule.softcap)[
        :, None
    ]


def attend_chunk(
    qkv: tuple[Float[Array, "r C H E"], Float[Array, "r K E C"], Float[Array, "r K C E"]],
    keys: tuple[Keys, Keys],
    index: Array,
    at: tuple[GivenChunk, Array],
    rule: AttentionRule,
) -> Float[Array, "r C H E"]:
    """Return the output of attention of each row's chunk in one layer: to the prompt, to the stored tokens of
    the completion, and causally to the chunk itself.

    qkv: of the chunk. keys, index, rule: as in attend; the chunk is not stored yet. at: (the chunk, which
    slots of prompts are visible).
    """
    (q, k, v), (chunk, visible) = qkv, at
    prompts, rows = (_layer_of(some, index, q.dtype) for some in keys)
    prompts, rows = prompts.of_rows(chunk.prompts), rows.of_rows(chunk.rows)
    used, size, counts = prompts.k.shape[3], rows.k.shape[3], chunk.counts[:, None]

    def numbers(count: int) -> Array:
        return jnp.arange(count, dtype=counts.dtype)[None]

    # positions in the text, relative to the first token of the completion
    nowhere = jnp.asarray(EVERY_KEY, counts.dtype)
    of_prompts = jnp.where(visible[chunk.prompts, -used:], numbers(used) - used, nowhere)
    of_rows = counts - 1 - (counts - 1 - numbers(size)) % jnp.asarray(size, counts.dtype)
    of_rows = jnp.where(of_rows >= 0, of_rows, nowhere)
    of_chunk = counts + numbers(q.shape[1])
    stored = joined_keys([prompts, rows, Keys(k, v)])
    places = jnp.concatenate([of_prompts, of_rows, of_chunk], 1)
    return chunk_attention(q, stored, (places, of_chunk), rule)


def _layer_of(keys: Keys, index: Array, dtype: Any) -> Keys:
    def of(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, index, 0, False)

    k, v = of(keys.k), of(keys.v)
    if keys.k_scale is None:
        return Keys(from_bits(k, dtype), from_bits(v, dtype))
    if k.dtype == jnp.uint8:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn) for x in (k, v))
    return Keys(k.astype(dtype), v.astype(dtype), of(keys.k_scale), of(keys.v_scale))
