"""Blockwise attention in plain XLA for packed rows, on every backend; the keys that each query attends to, as
two ranges of its row.

A query sees the tokens of its segment up to itself; in a response that shares its prompt with others, the
tokens of the response up to itself, and the prompt. A sliding window shortens both ranges. Attention kernels
take these ranges, and no segments, branches or windows.

Rows are laid out as their sources write them. The tokens of a segment are contiguous, and 0 is padding. Where
responses share a prompt, the prompt (branch 0) comes first in its segment; then come the responses (branches
1, 2, ...), the tokens of each contiguous.
"""

import functools
import math
import operator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxft.nn.matmul import accumulation_dtype, to_bits, wide_einsum
from jaxft.nn.tree import static, struct

NEVER = np.int32(2**30)  # an empty range is [NEVER, 0), so that min and max over ranges ignore it


@struct
class KeyRanges:
    """The keys that each query sees: at positions [own_start, own_end) and [prompt_start, prompt_end).

    int32 arrays [..., T] of storage positions: indices into the row, not the positions of rope. prompt_start
    and prompt_end are None if no row has branches; an empty range is [2^30, 0). The prompt's range ends
    before the query's own range starts. windowed: a sliding window may have shortened the ranges.
    """

    own_start: Any
    own_end: Any
    prompt_start: Any = None
    prompt_end: Any = None
    windowed: bool = static(default=False, kw_only=True)

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        """Return [(own_start, own_end)] and, if rows have branches, also (prompt_start, prompt_end)."""
        own, prompts = (self.own_start, self.own_end), (self.prompt_start, self.prompt_end)
        return [own] if self.prompt_start is None else [own, prompts]


def key_ranges(segments: Int[Any, "B T"], branches: Int[Any, "B T"] | None = None) -> KeyRanges:
    """Return the key ranges of all queries of rows. Work and memory grow with T, not with T x T.

    segments: 0 is padding; the tokens of a segment are contiguous. branches: in each segment first the prompt
    (0), then its responses (1, 2, ...), the tokens of each contiguous.
    """
    segments = jnp.asarray(segments)
    at = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    real, new = segments != 0, _changes(segments)
    segment_start = own_start = lax.cummax(jnp.where(new, at, 0), axis=1)
    prompt_start = prompt_end = None
    if branches is not None:
        branches = jnp.asarray(branches)
        own_start = lax.cummax(jnp.where(new | _changes(branches), at, 0), axis=1)
        in_prompt = (branches == 0) & (own_start == segment_start)
        end = lax.cummax(jnp.where(in_prompt, at + 1, 0), axis=1)  # of the last prompt up to here
        prompt_start, prompt_end = _if(real & ~in_prompt & (end > segment_start), segment_start, end)
    own_start, own_end = _if(real, own_start, at + 1)
    return KeyRanges(own_start, own_end, prompt_start, prompt_end)


def _changes(x_BT: jax.Array) -> Bool[Array, "B T"]:
    """Return whether each entry of a row differs from the entry before it; True for the first entry."""
    return jnp.pad(x_BT[:, 1:] != x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _if(exists: jax.Array, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(exists, start, NEVER), jnp.where(exists, end, 0)


def within_window(ranges: KeyRanges, window: Any) -> KeyRanges:
    """Shorten the ranges so that a query sees only its last `window` keys, its own included.

    The window counts the tokens of the text, not of the row: for a token of a response that shares its
    prompt, it covers tokens of its response and, if it is longer than that, the end of the prompt. window: an
    int, an int32 scalar array, or None for all keys. ranges: as key_ranges returns them.
    """
    if window is None:
        return ranges
    reach = jnp.asarray(window, jnp.int32) - 1
    own_start = jnp.maximum(ranges.own_start, ranges.own_end - 1 - reach)
    shortened = replace(ranges, own_start=own_start, windowed=True)
    if ranges.prompt_start is None:
        return shortened
    before = ranges.own_end - 1 - ranges.own_start  # tokens of the response before the query's
    start = jnp.maximum(ranges.prompt_start, ranges.prompt_end + (before - reach))
    start, end = _if(start < ranges.prompt_end, start, ranges.prompt_end)
    return replace(shortened, prompt_start=start, prompt_end=end)


def visible(ranges: KeyRanges, keys: Int[Array, " S"]) -> Bool[Array, "..."]:
    """Return whether each query sees the keys at these storage positions (see KeyRanges): [..., T, S]."""
    keys = lax.broadcast_in_dim(keys, (1,) * ranges.own_start.ndim + keys.shape, (ranges.own_start.ndim,))
    seen = [(start[..., None] <= keys) & (keys < end[..., None]) for start, end in ranges.pairs]
    return functools.reduce(operator.or_, seen)


def overlaps(ranges: KeyRanges, count: int, size: int) -> Bool[Array, "..."]:
    """Return whether a query sees any key in each of `count` blocks of `size` keys: [..., T, count]."""
    ndim = ranges.own_start.ndim
    first = lax.broadcasted_iota(jnp.int32, (1,) * ndim + (count,), ndim) * np.int32(size)
    last = first + np.int32(size - 1)
    seen = [(start[..., None] <= last) & (end[..., None] > first) for start, end in ranges.pairs]
    return functools.reduce(operator.or_, seen)


def pad_queries(ranges: KeyRanges, extra: int) -> KeyRanges:
    """Pad each row's key ranges with `extra` queries that attend to no key."""
    if not extra:
        return ranges

    def pad(x: Any, value: Any) -> Any:
        return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value)

    padded = [x for start, end in ranges.pairs for x in (pad(start, NEVER), pad(end, 0))]
    return KeyRanges(*padded, windowed=ranges.windowed)


def in_parts(ranges: KeyRanges, parts: tuple[tuple[Any, Any], tuple[Any, Any]]) -> KeyRanges:
    """Return the ranges as indices into the keys of two parts of the row, concatenated.

    parts: (start, length) of each part in the row; the first part is before the second one.
    """

    def before(at: Any) -> Any:  # how many keys of the two parts are before a position of the row
        return sum(jnp.clip(at - start, 0, length) for start, length in parts)

    inside = [(before(start), before(end)) for start, end in ranges.pairs]
    arrays = [x for start, end in inside for x in _if(start < end, start, end)]
    return KeyRanges(*arrays, windowed=ranges.windowed)


MASKED = -1e30  # a masked score: finite, so that a row without visible keys makes no NaN


def soft_capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """Return cap * tanh(scores / cap); the scores if cap is None."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def flash(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    ranges: KeyRanges,
    softcap: float | None = None,
    block: int | None = None,
) -> Float[Array, "B T H E"]:
    """Blockwise attention (FlashAttention-2, arXiv 2307.08691) in plain XLA; memory grows with T, not with
    T x T.

    ranges: the keys that each query sees. softcap: scores s become softcap * tanh(s / softcap) before the
    mask. block: tokens of a block; None for default_block(). For each block of queries, the blocks of keys
    that none of them sees are skipped, so that the time of a layer with a window grows with T x window. The
    backward pass recomputes the probabilities; with a remat policy that saves "attn_out" and "attn_lse" it
    does not repeat the forward pass.
    """
    qkv, ranges, block = _in_blocks((q_BTHE, k_BSKE, v_BSKE), ranges, block)
    return _unblocked(_flash(qkv, ranges, (block, softcap)), q_BTHE)


def default_block() -> int:
    """Return the number of tokens in a block for the devices of the ambient mesh; without a mesh, for jax's
    default device.

    A CPU runs matmuls of small blocks at its full rate, and small blocks skip more of the keys that a query
    doesn't see: with three examples of 160 tokens in a row of 512, blocks of 64 compute 0.35 times as many
    scores as blocks of 256. Accelerators need fewer and larger matmuls. The size does not depend on the
    length of a row, so that the result of a prompt does not depend on its padding (engine/programs.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return 64 if platform == "cpu" else 256


def _in_blocks(
    qkv: tuple[jax.Array, ...], ranges: KeyRanges, block: int | None
) -> tuple[tuple[jax.Array, ...], KeyRanges, int]:
    """Pad T and S to full blocks; return ((q as [B, T, K, G, E], k, v), ranges, tokens of a block)."""
    T, K = qkv[0].shape[1], qkv[1].shape[2]
    block = block or default_block()
    count = -(-T // block)
    step = math.gcd(block, 16)
    block = -(-T // (count * step)) * step  # the smallest size that makes `count` blocks: least padding
    q, ranges = pad_time(_grouped(qkv[0], K), -T % block), pad_queries(ranges, -T % block)
    k, v = (pad_time(x, -x.shape[1] % block) for x in qkv[1:])
    return (q, k, v), ranges, block


def _grouped(x_BTHE: jax.Array, K: int) -> jax.Array:
    B, T, H, E = x_BTHE.shape
    return x_BTHE.reshape(B, T, K, H // K, E)


def _unblocked(x_BTKGE: jax.Array, like_BTHE: jax.Array) -> jax.Array:
    B, T, H, E = like_BTHE.shape
    return x_BTKGE.reshape(B, x_BTKGE.shape[1], H, E)[:, :T]


def flash_output(
    qkv: tuple[jax.Array, ...], ranges: KeyRanges, softcap: float | None, block: int | None = None
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Return the output of `flash`, in float32 or wider, and lse, the log-sum-exp of each query's scores;
    1e30 for a query without keys.

    Outputs o_i and lse_i of several blocks of keys give the output over all of them:
    sum_i exp(lse_i) o_i / sum_i exp(lse_i).
    """
    (q, *_), (B, T, H, _), wide = qkv, qkv[0].shape, accumulation_dtype(qkv[0].dtype)
    blocks, ranges, block = _in_blocks(qkv, ranges, block)
    o, lse_CKM = _forward(tuple(map(to_bits, blocks)), ranges, (block, softcap), q.dtype, wide)
    C, K, M = lse_CKM.shape
    lse = lse_CKM.reshape(B, C // B, K, M // block, block).transpose(0, 2, 3, 1, 4)
    return _unblocked(o, q), lse.reshape(B, H, C // B * block)[:, :, :T]


def flash_gradients(
    qkv: tuple[jax.Array, ...],
    ranges: KeyRanges,
    results: tuple[jax.Array, jax.Array, jax.Array],
    softcap: float | None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v in float32 or wider.

    results: output, log-sum-exp [B, H, T] (1e30 without keys), and the output's cotangent. If the output was
    computed from several blocks of keys, pass the k and v of one block; the gradient of q is the sum of the
    results over all blocks.
    """
    (q, k, _), (o, lse, do), (B, T, H, _) = qkv, results, qkv[0].shape
    K, S = k.shape[2:0:-1]
    blocks, ranges, block = _in_blocks(qkv, ranges, block)
    extra, C = -T % block, -(-T // block)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, extra)), constant_values=-MASKED)
    lse = lse.reshape(B, K, H // K, C, block).transpose(0, 3, 1, 2, 4).reshape(B * C, K, H // K * block)
    o, do = (to_bits(pad_time(_grouped(x, K), extra)) for x in (o, do))
    blocks, wide = tuple(map(to_bits, blocks)), accumulation_dtype(q.dtype)
    dq, dk, dv = _backward(blocks, ranges, (o, lse, do), (block, softcap), q.dtype, wide)
    return _unblocked(dq, q), dk[:, :S], dv[:, :S]


def pad_time(x_BT: jax.Array, extra: int) -> jax.Array:
    """Append `extra` zeros to each row along the time axis."""
    return jnp.pad(x_BT, ((0, 0), (0, extra)) + ((0, 0),) * (x_BT.ndim - 2)) if extra else x_BT


# Below, a block is N storage positions of a row. All blocks of all rows form one list: C = B * T / N of
# queries, D = B * S / N of keys. Query heads that share a key head are folded into the rows of a matmul, M =
# G * N. The shapes follow from XLA:CPU: it runs 16-bit matmuls on its fast path only if no transpose can be
# folded into their operands, so keys are transposed once outside the loops; and it widens all other 16-bit
# operations to float32, including full loop-carried buffers, so loops carry 16-bit floats as uint16.


def _floats(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _blocks(x_BT: jax.Array, block: int) -> jax.Array:
    B, T = x_BT.shape[:2]
    return x_BT.reshape(B * (T // block), block, *x_BT.shape[2:])


def _visits(ranges: KeyRanges, size: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Return which key blocks each query block visits: indices [B * C, D] into the key blocks of all rows,
    the visited ones first, and how many are visited [B * C]. C, D: query and key blocks of a row. size: keys
    of a row.
    """
    B, T = ranges.own_start.shape
    C, D = T // block, size // block
    in_blocks = jax.tree.map(lambda x: x.reshape(B, C, block), ranges)
    seen = overlaps(in_blocks, D, block).any(2)
    row = jnp.arange(B, dtype=jnp.int32)[:, None, None] * D
    key_blocks = row + jnp.argsort(~seen, axis=2, stable=True).astype(jnp.int32)
    return key_blocks.reshape(B * C, D), seen.sum(2, dtype=jnp.int32).reshape(B * C)


def _on_the_list(ranges: KeyRanges, size: int, block: int) -> KeyRanges:
    """Return the ranges of C query blocks, [C, N], as positions in the keys of all rows, `size` each."""
    row = jnp.arange(ranges.own_start.shape[0], dtype=jnp.int32)[:, None] * size
    return jax.tree.map(lambda x: _blocks(x + row, block), ranges)


def _scores(q_KME, k_KNE, ranges: KeyRanges, j: jax.Array, softcap: float | None):
    """Return a query block's masked scores with key block j, and the soft cap's derivative or None."""
    (K, M, E), N = q_KME.shape, k_KNE.shape[1]
    seen_NN = visible(ranges, j * N + jnp.arange(N, dtype=jnp.int32))
    s_KMN = soft_capped(wide_einsum("kme,kne->kmn", q_KME, k_KNE) * E**-0.5, softcap)
    slope_KMN = None if softcap is None else 1 - jnp.square(s_KMN / softcap)
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
    """Invert _queries: return [N, K, G, E], 16-bit floats as raw bits."""
    K, M, E = x_KME.shape
    return to_bits(x_KME.reshape(K, M // N, N, E).transpose(2, 0, 1, 3))


def _forward(qkv, ranges, settings, dtype, out):
    """Return o [B, T, K, G, E] in the dtype `out`, 16-bit floats as raw bits, and the log-sum-exp of the
    scores [C, K, M]. settings: (tokens of a block, soft cap). dtype: of q, k and v, which are raw bits.
    """
    (B, T, K, G, E), S, (block, softcap) = qkv[0].shape, qkv[1].shape[1], settings
    M, wide = G * block, accumulation_dtype(dtype)
    (key_blocks, counts), ranges = _visits(ranges, S, block), _on_the_list(ranges, S, block)
    q_CNKGE, k_DNKE, v_DNKE = (_blocks(x, block) for x in qkv)
    k_DKNE, v_DKNE = k_DNKE.swapaxes(1, 2), v_DNKE.swapaxes(1, 2)

    def query_block(i):
        q_KME, ranges_N = _queries(q_CNKGE, i, dtype), jax.tree.map(lambda x: x[i], ranges)

        def visit(n, carry):
            o_KME, m_KM, l_KM = carry
            j = key_blocks[i, n]
            s_KMN, _ = _scores(q_KME, _floats(k_DKNE[j], dtype), ranges_N, j, softcap)
            top_KM = jnp.maximum(m_KM, s_KMN.max(2))
            p_KMN = jnp.exp(s_KMN - top_KM[:, :, None])
            shrink_KM = jnp.exp(m_KM - top_KM)
            add_KME = wide_einsum("kmn,kne->kme", p_KMN.astype(dtype), _floats(v_DKNE[j], dtype))
            return o_KME * shrink_KM[:, :, None] + add_KME, top_KM, l_KM * shrink_KM + p_KMN.sum(2)

        # The running maximum starts between MASKED and any real score: a query without visible keys sums to
        # 0, not to N.
        none = jnp.zeros((K, M, E), wide), jnp.full((K, M), MASKED / 2, wide), jnp.zeros((K, M), wide)
        o_KME, m_KM, l_KM = lax.fori_loop(0, counts[i], visit, none)
        empty_KM = l_KM == 0
        l_KM = jnp.where(empty_KM, 1, l_KM)
        lse_KM = jnp.where(empty_KM, -MASKED, m_KM + jnp.log(l_KM))
        return _storage((o_KME / l_KM[:, :, None]).astype(out), block), lse_KM

    o_CNKGE, lse_CKM = lax.map(query_block, jnp.arange(key_blocks.shape[0], dtype=jnp.int32))
    return o_CNKGE.reshape(B, T, K, G, E), lse_CKM


def _backward(qkv, ranges, results, settings, dtype, out):
    """Return the gradients of q, k and v in the dtype `out`. results: o, the log-sum-exp, the cotangent of o.
    Other arguments: as in _forward.

    Transposed copies of q and do keep all five matmuls on the fast path of XLA's CPU compiler.
    """
    (B, T, K, G, E), S, (block, softcap) = qkv[0].shape, qkv[1].shape[1], settings
    (o, lse_CKM, do), M, wide = results, G * block, accumulation_dtype(dtype)
    (key_blocks, counts), ranges = _visits(ranges, S, block), _on_the_list(ranges, S, block)
    q_CNKGE, k_DNKE, v_DNKE, o, do = (_blocks(x, block) for x in (*qkv, o, do))
    k_DKNE, v_DKNE = k_DNKE.swapaxes(1, 2), v_DNKE.swapaxes(1, 2)

    def query_block(carry, i):
        q_KME, q_KEM = _queries(q_CNKGE, i, dtype), _queries(q_CNKGE, i, dtype, True)
        do_KME, do_KEM = _queries(do, i, dtype), _queries(do, i, dtype, True)
        lse_KM, ranges_N = lse_CKM[i], jax.tree.map(lambda x: x[i], ranges)
        delta_KM = (do_KME.astype(wide) * _queries(o, i, dtype).astype(wide)).sum(2)

        def visit(n, carry):
            dq_KME, dk_DKEN, dv_DKEN = carry
            j = key_blocks[i, n]
            k_KNE = _floats(k_DKNE[j], dtype)
            s_KMN, slope_KMN = _scores(q_KME, k_KNE, ranges_N, j, softcap)
            p_KMN = jnp.exp(s_KMN - lse_KM[:, :, None])
            dv_DKEN = _add(dv_DKEN, j, wide_einsum("kem,kmn->ken", do_KEM, p_KMN.astype(dtype)))
            dp_KMN = wide_einsum("kme,kne->kmn", do_KME, _floats(v_DKNE[j], dtype))
            ds_KMN = p_KMN * (dp_KMN - delta_KM[:, :, None]) * E**-0.5
            ds_KMN = (ds_KMN if slope_KMN is None else ds_KMN * slope_KMN).astype(dtype)
            dk_DKEN = _add(dk_DKEN, j, wide_einsum("kem,kmn->ken", q_KEM, ds_KMN))
            return dq_KME + wide_einsum("kmn,kne->kme", ds_KMN, k_KNE), dk_DKEN, dv_DKEN

        dq_KME, *carry = lax.fori_loop(0, counts[i], visit, (jnp.zeros((K, M, E), wide), *carry))
        return tuple(carry), _storage(dq_KME.astype(out), block)

    zeros = jnp.zeros((B * S // block, K, E, block), wide)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(key_blocks.shape[0], dtype=jnp.int32))
    dk, dv = (to_bits(x.astype(out)).transpose(0, 3, 1, 2).reshape(B, S, K, E) for x in (dk, dv))
    return tuple(_floats(x, out) for x in (dq.reshape(B, T, K, G, E), dk, dv))


def _add(x: jax.Array, j: jax.Array, y: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, j, 0, keepdims=False) + y, j, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(qkv, ranges, settings):  # settings: block and soft cap
    return _flash_forward(qkv, ranges, settings)[0]


def _flash_forward(qkv, ranges, settings):
    dtype = qkv[0].dtype
    o, lse = _forward(tuple(map(to_bits, qkv)), ranges, settings, dtype, dtype)
    o, lse = checkpoint_name(o, "attn_out"), checkpoint_name(lse, "attn_lse")
    return _floats(o, dtype), (qkv, ranges, o, lse)


def _flash_backward(settings, saved, do):
    qkv, ranges, o, lse = saved
    results, dtype = (o, lse, to_bits(do)), qkv[0].dtype
    return _backward(tuple(map(to_bits, qkv)), ranges, results, settings, dtype, dtype), None


_flash.defvjp(_flash_forward, _flash_backward)
