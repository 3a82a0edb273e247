"""Blockwise attention in plain XLA for packed rows, on every backend (attention.py defines visibility)."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxft.tree import static, struct

MASKED = -1e30  # a masked score: finite, so that a row without visible keys makes no NaN


def _wide(dtype: DTypeLike) -> Any:
    return np.promote_types(dtype, np.float32)  # jnp's raises under jax_numpy_dtype_promotion=strict


def wide_einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum that accumulates in float32 or wider."""
    return jnp.einsum(spec, x, y, preferred_element_type=_wide(x.dtype))


@struct
class Visibility:
    """What determines together with storage order which keys are visible, for each token of rows."""

    segments: Any  # integers [..., T]; 0 is padding
    branches: Any = None  # as segments, or None: no shared prompts
    positions: Any = None  # as segments; only a window reads them


@struct
class AttentionRule:
    """What a layer's attention does in addition to visibility.

    window: a query at position p sees keys at positions above p - window: its own and the window - 1 before
    it. An int, or an int32 scalar array, which may differ between the layers of a scan; None: no window.
    softcap: scores s become softcap * tanh(s / softcap) before the mask; None: as they are.
    """

    window: Any = None
    softcap: float | None = static(default=None)


PLAIN_RULE = AttentionRule()  # neither a window nor a soft cap


@struct
class KeyMask:
    """Which keys each of T successive queries of longer rows sees, and how their scores are capped.

    queries, keys: their visibility. start: storage position of the first query.
    """

    queries: Visibility
    keys: Visibility
    start: Any
    rule: AttentionRule


def visible(
    queries: Visibility, keys: Visibility, causal_TS: Bool[Array, "..."], window: Any = None
) -> Bool[Array, "..."]:
    """Return which keys S are visible to each query T; causal_TS: keys that are not after the query."""
    segments_T, segments_S = queries.segments, keys.segments
    visible_TS = (
        causal_TS & (segments_T[..., :, None] == segments_S[..., None, :]) & (segments_T[..., :, None] != 0)
    )
    if queries.branches is not None:
        shared = (keys.branches == 0)[..., None, :]
        visible_TS &= shared | (queries.branches[..., :, None] == keys.branches[..., None, :])
    if window is not None:
        visible_TS &= queries.positions[..., :, None] - keys.positions[..., None, :] < window
    return visible_TS


def checked(rows: Visibility, rule: AttentionRule) -> tuple[Visibility, AttentionRule]:
    """Return rows and rule with positions only where a window reads them, and the window as an array.

    Raises ValueError if there is a window but no positions.
    """
    if rule.window is None:
        return replace(rows, positions=None), rule
    if rows.positions is None:
        raise ValueError("a sliding window needs the positions of the tokens: set Visibility.positions")
    return rows, replace(rule, window=jnp.asarray(rule.window, jnp.int32))


def soft_capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """Return cap * tanh(scores / cap); without a cap the scores."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def flash(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    rows: Visibility,
    rule: AttentionRule = PLAIN_RULE,
    block: int = 256,
) -> Float[Array, "B T H E"]:
    """Blockwise attention (FlashAttention-2, arXiv 2307.08691) in plain XLA; memory grows with T, not with T
    x T.

    Blocks of keys that are visible to no query of a block are skipped, row by row, so that the cost of a
    layer with a window grows with T x window. The backward pass recomputes the probabilities; with a remat
    policy that saves "attn_out" and "attn_lse" it skips the forward pass.
    """
    return flash_part(q_BTHE, k_BTKE, v_BTKE, KeyMask(rows, rows, jnp.int32(0), rule), block)


def flash_part(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    mask: KeyMask,
    block: int = 256,
) -> Float[Array, "B T H E"]:
    """flash for T successive queries of longer rows; see KeyMask."""
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    count = -(-T // block)
    step = math.gcd(block, 16)
    block = -(-T // (count * step)) * step  # the smallest size that makes `count` blocks: least padding
    (queries, rule), (keys, _) = checked(mask.queries, mask.rule), checked(mask.keys, mask.rule)
    q_BTKGE = q_BTHE.reshape(B, T, K, H // K, E)
    q, queries = jax.tree.map(lambda x: pad_time(x, -T % block), (q_BTKGE, queries))
    k, v, keys = jax.tree.map(lambda x: pad_time(x, -x.shape[1] % block), (k_BSKE, v_BSKE, keys))
    o = _flash((q, k, v), KeyMask(queries, keys, mask.start, rule), block)
    return o.reshape(B, T + -T % block, H, E)[:, :T]


def pad_time(x_BT: jax.Array, extra: int) -> jax.Array:
    """Append positions of zeros to each row; a segment of 0 is padding."""
    return jnp.pad(x_BT, ((0, 0), (0, extra)) + ((0, 0),) * (x_BT.ndim - 2)) if extra else x_BT


# Below, a block is N storage positions of a row. All blocks of all rows form one list: C = B * T / N of
# queries, D = B * S / N of keys. Query heads that share a key head are folded into the rows of a matmul, M =
# G * N. The shapes follow from XLA:CPU: it runs 16-bit matmuls on its fast path only if no transpose can be
# folded into their operands, so keys are transposed once outside the loops; and it widens every other 16-bit
# operation to float32, whole loop-carried buffers included, so loops carry 16-bit floats as uint16.


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _blocks(x_BT: jax.Array, block: int) -> jax.Array:
    B, T = x_BT.shape[:2]
    return x_BT.reshape(B * (T // block), block, *x_BT.shape[2:])


def _overlap(
    x_BCN: jax.Array, y_BDN: jax.Array, ignored: tuple[jax.Array, jax.Array]
) -> Bool[Array, "B C D"]:
    """Whether the value ranges of two blocks of a row overlap; a block whose values are all ignored overlaps
    none.
    """
    info = jnp.iinfo(x_BCN.dtype)
    ranges = [
        (jnp.where(out, info.max, z).min(2), jnp.where(out, info.min, z).max(2))
        for z, out in zip((x_BCN, y_BDN), ignored, strict=True)
    ]
    (low_BC, high_BC), (low_BD, high_BD) = ranges
    return (low_BC[:, :, None] <= high_BD[:, None]) & (low_BD[:, None] <= high_BC[:, :, None])


def _reaches(queries: Visibility, keys: Visibility, window: jax.Array, step: int) -> Bool[Array, "B C D"]:
    """Whether a block's last key may be in the window of a block's first query, segment by segment.

    A token's place is its position plus `step` times its segment. Two tokens of a segment are as far apart
    as their positions, whatever `step` is; if it is at least a row's length, the segments of a sorted row
    don't overlap. step * segment is bounded so that it fits into an int32.
    """

    def places(rows: Visibility, padding: int) -> jax.Array:
        at = jnp.minimum(rows.segments, 2**30 // step) * step + rows.positions
        return jnp.where(rows.segments == 0, padding, at)

    info = np.iinfo(np.int32)
    first_BC, last_BD = places(queries, info.max).min(2), places(keys, info.min).max(2)
    return last_BD[:, None, :] > (first_BC - window)[:, :, None]


def _visits(mask: KeyMask, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return per query block the key blocks that it must visit, as indices into all key blocks (the first
    `count` entries), `count`, and the storage position of its first query, on the scale of that list.
    """
    (B, T), S = mask.queries.segments.shape, mask.keys.segments.shape[1]
    C, D = T // block, S // block
    queries, keys = (
        jax.tree.map(lambda x: x.reshape(B, x.shape[1] // block, block), rows)
        for rows in (mask.queries, mask.keys)
    )
    first_C = mask.start + block * jnp.arange(C, dtype=jnp.int32)
    overlapping = block * jnp.arange(D, dtype=jnp.int32)[None, :] < first_C[:, None] + block
    empty = queries.segments == 0, keys.segments == 0
    overlapping = overlapping[None] & _overlap(queries.segments, keys.segments, empty)
    if queries.branches is not None and keys.branches is not None:
        shared = (keys.branches == 0).any(2)[:, None]
        none = jnp.zeros(queries.branches.shape, bool), jnp.zeros(keys.branches.shape, bool)
        overlapping &= shared | _overlap(queries.branches, keys.branches, none)
    if mask.rule.window is not None:
        overlapping &= _reaches(queries, keys, mask.rule.window, S)
    row = jnp.arange(B, dtype=jnp.int32)[:, None, None] * D
    key_blocks = row + jnp.argsort(~overlapping, axis=2, stable=True).astype(jnp.int32)
    firsts = (row[:, :, 0] * block + first_C[None]).reshape(B * C)
    return key_blocks.reshape(B * C, D), overlapping.sum(2, dtype=jnp.int32).reshape(B * C), firsts


def _scores(q_KME, k_KNE, mask: KeyMask, first, at: tuple[jax.Array, jax.Array]):
    """Return the masked scores of query block i, which starts at storage position `first`, and key block j,
    in float32 or wider; and the derivative of the soft cap, also of masked scores, or None.
    """
    (K, M, E), (i, j), cap = q_KME.shape, at, mask.rule.softcap
    N = k_KNE.shape[1]
    steps = jnp.arange(N, dtype=jnp.int32)
    causal_NN = (j * N + steps)[None, :] <= (first + steps)[:, None]
    queries, keys = jax.tree.map(lambda x: x[i], mask.queries), jax.tree.map(lambda x: x[j], mask.keys)
    seen_NN = visible(queries, keys, causal_NN, mask.rule.window)
    s_KMN = soft_capped(wide_einsum("kme,kne->kmn", q_KME, k_KNE) * E**-0.5, cap)
    slope_KMN = None if cap is None else 1 - jnp.square(s_KMN / cap)
    masked = jnp.where(seen_NN[None, None], s_KMN.reshape(K, M // N, N, N), MASKED).reshape(K, M, N)
    return masked, slope_KMN


def _queries(x_CNKGE: jax.Array, i: jax.Array, dtype: DTypeLike, transposed: bool = False) -> jax.Array:
    """Return query block i as [K, M, E], or transposed as [K, E, M]."""
    N, K, G, E = x_CNKGE.shape[1:]
    x_NKGE = x_CNKGE[i]
    if transposed:
        return _floats(x_NKGE.transpose(1, 3, 2, 0).reshape(K, E, G * N), dtype)
    return _floats(x_NKGE.transpose(1, 2, 0, 3).reshape(K, G * N, E), dtype)


def _storage(x_KME: jax.Array, N: int) -> jax.Array:
    """Invert _queries: [N, K, G, E], as bits."""
    K, M, E = x_KME.shape
    return _bits(x_KME.reshape(K, M // N, N, E).transpose(2, 0, 1, 3))


def _in_blocks(mask: KeyMask, block: int) -> KeyMask:
    queries, keys = jax.tree.map(lambda x: _blocks(x, block), (mask.queries, mask.keys))
    return replace(mask, queries=queries, keys=keys)


def _forward(qkv, mask, block, dtype):
    """Return o [B, T, K, G, E] as bits and the log-sum-exp of the scores [C, K, M]."""
    B, T, K, G, E = qkv[0].shape
    M, wide = G * block, _wide(dtype)
    (key_blocks, counts, firsts), mask = _visits(mask, block), _in_blocks(mask, block)
    q_CNKGE, k_DNKE, v_DNKE = (_blocks(x, block) for x in qkv)
    k_DKNE, v_DKNE = k_DNKE.swapaxes(1, 2), v_DNKE.swapaxes(1, 2)

    def query_block(i):
        q_KME = _queries(q_CNKGE, i, dtype)

        def visit(n, carry):
            o_KME, m_KM, l_KM = carry
            j = key_blocks[i, n]
            s_KMN, _ = _scores(q_KME, _floats(k_DKNE[j], dtype), mask, firsts[i], (i, j))
            top_KM = jnp.maximum(m_KM, s_KMN.max(2))
            p_KMN = jnp.exp(s_KMN - top_KM[:, :, None])
            shrink_KM = jnp.exp(m_KM - top_KM)
            add_KME = wide_einsum("kmn,kne->kme", p_KMN.astype(dtype), _floats(v_DKNE[j], dtype))
            return o_KME * shrink_KM[:, :, None] + add_KME, top_KM, l_KM * shrink_KM + p_KMN.sum(2)

        # The running maximum starts between HIDDEN and any real score: a query without visible keys sums to
        # 0, not to N.
        none = jnp.zeros((K, M, E), wide), jnp.full((K, M), MASKED / 2, wide), jnp.zeros((K, M), wide)
        o_KME, m_KM, l_KM = lax.fori_loop(0, counts[i], visit, none)
        empty_KM = l_KM == 0
        l_KM = jnp.where(empty_KM, 1, l_KM)
        lse_KM = jnp.where(empty_KM, -MASKED, m_KM + jnp.log(l_KM))
        return _storage((o_KME / l_KM[:, :, None]).astype(dtype), block), lse_KM

    o_CNKGE, lse_CKM = lax.map(query_block, jnp.arange(key_blocks.shape[0], dtype=jnp.int32))
    return o_CNKGE.reshape(B, T, K, G, E), lse_CKM


def _backward(qkv, mask, results, block, dtype):
    """Return the gradients of q, k and v; results: o, its log-sum-exp and its cotangent.

    Transposed copies of q and do keep all five matmuls on the fast path.
    """
    (B, T, K, G, E), S = qkv[0].shape, qkv[1].shape[1]
    (o, lse_CKM, do), M, wide = results, G * block, _wide(dtype)
    (key_blocks, counts, firsts), mask = _visits(mask, block), _in_blocks(mask, block)
    q_CNKGE, k_DNKE, v_DNKE, o, do = (_blocks(x, block) for x in (*qkv, o, do))
    k_DKNE, v_DKNE = k_DNKE.swapaxes(1, 2), v_DNKE.swapaxes(1, 2)

    def query_block(carry, i):
        q_KME, q_KEM = _queries(q_CNKGE, i, dtype), _queries(q_CNKGE, i, dtype, True)
        do_KME, do_KEM = _queries(do, i, dtype), _queries(do, i, dtype, True)
        lse_KM = lse_CKM[i]
        delta_KM = (do_KME.astype(wide) * _queries(o, i, dtype).astype(wide)).sum(2)

        def visit(n, carry):
            dq_KME, dk_DKEN, dv_DKEN = carry
            j = key_blocks[i, n]
            k_KNE = _floats(k_DKNE[j], dtype)
            s_KMN, slope_KMN = _scores(q_KME, k_KNE, mask, firsts[i], (i, j))
            p_KMN = jnp.exp(s_KMN - lse_KM[:, :, None]).astype(dtype)
            dv_DKEN = _add(dv_DKEN, j, wide_einsum("kem,kmn->ken", do_KEM, p_KMN))
            dp_KMN = wide_einsum("kme,kne->kmn", do_KME, _floats(v_DKNE[j], dtype))
            ds_KMN = p_KMN.astype(wide) * (dp_KMN - delta_KM[:, :, None]) * E**-0.5
            ds_KMN = (ds_KMN if slope_KMN is None else ds_KMN * slope_KMN).astype(dtype)
            dk_DKEN = _add(dk_DKEN, j, wide_einsum("kem,kmn->ken", q_KEM, ds_KMN))
            return dq_KME + wide_einsum("kmn,kne->kme", ds_KMN, k_KNE), dk_DKEN, dv_DKEN

        dq_KME, *carry = lax.fori_loop(0, counts[i], visit, (jnp.zeros((K, M, E), wide), *carry))
        return tuple(carry), _storage(dq_KME.astype(dtype), block)

    zeros = jnp.zeros((B * S // block, K, E, block), wide)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(key_blocks.shape[0], dtype=jnp.int32))
    dk, dv = (_bits(x.astype(dtype)).transpose(0, 3, 1, 2).reshape(B, S, K, E) for x in (dk, dv))
    return tuple(_floats(x, dtype) for x in (dq.reshape(B, T, K, G, E), dk, dv))


def _add(x: jax.Array, j: jax.Array, y: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, j, 0, keepdims=False) + y, j, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(qkv, mask, block):
    return _flash_forward(qkv, mask, block)[0]


def _flash_forward(qkv, mask, block):
    dtype = qkv[0].dtype
    o, lse = _forward(tuple(_bits(x) for x in qkv), mask, block, dtype)
    o, lse = checkpoint_name(o, "attn_out"), checkpoint_name(lse, "attn_lse")
    return _floats(o, dtype), (qkv, mask, o, lse)


def _flash_backward(block, saved, do):
    qkv, mask, o, lse = saved
    results = o, lse, _bits(do)
    return _backward(tuple(_bits(x) for x in qkv), mask, results, block, qkv[0].dtype), None


_flash.defvjp(_flash_forward, _flash_backward)
