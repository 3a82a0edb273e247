"""Attention over packed rows: one meaning, several kernels, and the choice between them.

Key s is visible to query t iff both are in the same segment, s is not after t in storage, and s's branch is 0 (a shared
prompt) or t's. Segment 0 is padding: its queries see nothing and get zeros (the accelerators' kernels: anything finite).
G = H / K query heads share a key head; nothing here repeats keys or values but the Triton kernel, which can't do without.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxft.sharding import per_device

Attention = Callable[..., jax.Array]
HIDDEN = -1e30  # a masked score: finite, so that a row without visible keys makes no NaN


def _wide(dtype: Any) -> Any:
    return np.promote_types(dtype, np.float32)  # jnp's raises under jax_numpy_dtype_promotion=strict


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=_wide(x.dtype))


def _visible(segments_T, segments_S, branches_T, branches_S, causal_TS):
    visible_TS = causal_TS & (segments_T[..., :, None] == segments_S[..., None, :]) & (segments_T[..., :, None] != 0)
    if branches_T is not None:
        shared = (branches_S == 0)[..., None, :]
        visible_TS &= shared | (branches_T[..., :, None] == branches_S[..., None, :])
    return visible_TS


def dense(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B T K E"],
    v_BSKE: Float[Array, "B T K E"],
    segments_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """The definition, with all scores in memory: softmax(q k^T / sqrt(E)) v over the visible keys, in float32 or wider."""
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    q_BTKGE = q_BTHE.reshape(B, T, K, H // K, E)
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    seen = _visible(segments_BT, segments_BT, branches_BT, branches_BT, causal_TS)[:, None, None]
    s_BKGTS = jnp.where(seen, _dot("btkge,bske->bkgts", q_BTKGE, k_BSKE) * E**-0.5, HIDDEN)
    p_BKGTS = jnp.where(seen, jax.nn.softmax(s_BKGTS, axis=-1), 0)
    o = _dot("bkgts,bske->btkge", p_BKGTS, v_BSKE.astype(p_BKGTS.dtype))
    return o.reshape(B, T, H, E).astype(q_BTHE.dtype)


def decode(
    q_BHE: Float[Array, "B H E"],
    k_BKES: Float[Array, "B K E S"],
    v_BKSE: Float[Array, "B K S E"],
    visible_BS: Bool[Array, "B S"],
) -> Float[Array, "B H E"]:
    """One query a row against a cache of S keys, stored as its two products read them: no copy is transposed."""
    B, H, E = q_BHE.shape
    K = k_BKES.shape[1]
    s_BKGS = _dot("bkge,bkes->bkgs", q_BHE.reshape(B, K, H // K, E), k_BKES) * E**-0.5
    seen = visible_BS[:, None, None, :]
    p_BKGS = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s_BKGS, HIDDEN), axis=-1), 0)
    return _dot("bkgs,bkse->bkge", p_BKGS.astype(v_BKSE.dtype), v_BKSE).reshape(B, H, E).astype(q_BHE.dtype)


def flash(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segments_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None = None,
    block: int = 256,
) -> Float[Array, "B T H E"]:
    """Blockwise attention (FlashAttention-2, arXiv 2307.08691) in plain XLA; memory grows with T, not with T x T.

    Blocks of keys that no query of a block can see are skipped, row by row. The backward pass recomputes the
    probabilities; a remat policy that saves the names "attn_out" and "attn_lse" spares it the forward pass.
    """
    B, T, H, E = q_BTHE.shape
    K = k_BTKE.shape[2]
    count = -(-T // block)
    step = math.gcd(block, 16)
    block = -(-T // (count * step)) * step  # the smallest that still makes `count` blocks, so that little is padding
    arrays = (q_BTHE.reshape(B, T, K, H // K, E), k_BTKE, v_BTKE, segments_BT, branches_BT)
    arrays = jax.tree.map(lambda x: _padded(x, count * block - T), arrays)
    return _flash(*arrays, block).reshape(B, count * block, H, E)[:, :T]


def _padded(x_BT: jax.Array, extra: int) -> jax.Array:
    """More positions at the end of each row; 0 makes them segment 0."""
    return jnp.pad(x_BT, ((0, 0), (0, extra)) + ((0, 0),) * (x_BT.ndim - 2)) if extra else x_BT


# Below, a block is N storage positions of one row, and all blocks of all rows stand in one list C = B * T / N. Query
# heads that share a key head are folded into the products' rows, M = G * N. What XLA:CPU makes of this decides its
# shape. It takes 16-bit products on its fast path only from operands that no transpose can be folded into, so keys are
# transposed once outside the loops; and it widens every other 16-bit operation to float32, whole loop-carried buffers
# included, so loops hold 16-bit floats as uint16.


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _blocks(x_BT: jax.Array, block: int) -> jax.Array:
    B, T = x_BT.shape[:2]
    return x_BT.reshape(B * (T // block), block, *x_BT.shape[2:])


def _overlap(x_BCN: jax.Array, ignored: Bool[Array, "B C N"]) -> Bool[Array, "B C C"]:
    """Whether the ranges of values of two blocks of a row meet; a block with all values ignored meets none."""
    info = jnp.iinfo(x_BCN.dtype)
    low = jnp.where(ignored, info.max, x_BCN).min(2)
    high = jnp.where(ignored, info.min, x_BCN).max(2)
    return (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])


def _visits(segments_BT, branches_BT, block):
    """The key blocks that each query block must look at (first `count` of a list), as places in the list of all blocks."""
    B, T = segments_BT.shape
    C = T // block
    segments_BCN = segments_BT.reshape(B, C, block)
    wanted = jnp.tril(jnp.ones((C, C), bool)) & _overlap(segments_BCN, segments_BCN == 0)
    if branches_BT is not None:
        branches_BCN = branches_BT.reshape(B, C, block)
        shared = (branches_BCN == 0).any(2)[:, None]
        wanted &= shared | _overlap(branches_BCN, jnp.zeros(branches_BCN.shape, bool))
    row = jnp.arange(B, dtype=jnp.int32)[:, None, None] * C
    places = row + jnp.argsort(~wanted, axis=2, stable=True).astype(jnp.int32)
    return places.reshape(B * C, C), wanted.sum(2, dtype=jnp.int32).reshape(B * C)


def _scores(q_KME, k_KNE, segments_CN, branches_CN, i, j):
    """Masked scores of query block i against key block j, in float32 or wider."""
    K, M, E = q_KME.shape
    N = k_KNE.shape[1]
    at = jnp.arange(N, dtype=jnp.int32)
    causal_NN = (j * N + at)[None, :] <= (i * N + at)[:, None]
    branches = (None, None) if branches_CN is None else (branches_CN[i], branches_CN[j])
    seen_NN = _visible(segments_CN[i], segments_CN[j], *branches, causal_NN)
    s_KMN = _dot("kme,kne->kmn", q_KME, k_KNE) * E**-0.5
    return jnp.where(seen_NN, s_KMN.reshape(K, M // N, N, N), HIDDEN).reshape(K, M, N)


def _queries(x_CNKGE: jax.Array, i: jax.Array, dtype: Any, transposed: bool = False) -> jax.Array:
    """Block i as [K, M, E], or [K, E, M]."""
    N, K, G, E = x_CNKGE.shape[1:]
    x_NKGE = x_CNKGE[i]
    if transposed:
        return _floats(x_NKGE.transpose(1, 3, 2, 0).reshape(K, E, G * N), dtype)
    return _floats(x_NKGE.transpose(1, 2, 0, 3).reshape(K, G * N, E), dtype)


def _storage(x_KME: jax.Array, N: int) -> jax.Array:
    """The inverse of _queries: [N, K, G, E], as bits."""
    K, M, E = x_KME.shape
    return _bits(x_KME.reshape(K, M // N, N, E).transpose(2, 0, 1, 3))


def _forward(arrays, block, dtype):
    """(o [B, T, K, G, E] as bits, log-sum-exp of the scores [C, K, M])."""
    q, _, _, segments_BT, branches_BT = arrays
    B, T, K, G, E = q.shape
    M, wide = G * block, _wide(dtype)
    places, counts = _visits(segments_BT, branches_BT, block)
    q_CNKGE, k_CNKE, v_CNKE, segments_CN, branches_CN = jax.tree.map(lambda x: _blocks(x, block), arrays)
    k_CKNE, v_CKNE = k_CNKE.swapaxes(1, 2), v_CNKE.swapaxes(1, 2)

    def query_block(i):
        q_KME = _queries(q_CNKGE, i, dtype)

        def visit(n, carry):
            o_KME, m_KM, l_KM = carry
            j = places[i, n]
            s_KMN = _scores(q_KME, _floats(k_CKNE[j], dtype), segments_CN, branches_CN, i, j)
            top_KM = jnp.maximum(m_KM, s_KMN.max(2))
            p_KMN = jnp.exp(s_KMN - top_KM[:, :, None])
            shrink_KM = jnp.exp(m_KM - top_KM)
            add_KME = _dot("kmn,kne->kme", p_KMN.astype(dtype), _floats(v_CKNE[j], dtype))
            return o_KME * shrink_KM[:, :, None] + add_KME, top_KM, l_KM * shrink_KM + p_KMN.sum(2)

        # The running maximum starts between HIDDEN and any real score: a query that sees nothing sums to 0, not to N.
        start = jnp.zeros((K, M, E), wide), jnp.full((K, M), HIDDEN / 2, wide), jnp.zeros((K, M), wide)
        o_KME, m_KM, l_KM = lax.fori_loop(0, counts[i], visit, start)
        empty_KM = l_KM == 0
        l_KM = jnp.where(empty_KM, 1, l_KM)
        lse_KM = jnp.where(empty_KM, -HIDDEN, m_KM + jnp.log(l_KM))
        return _storage((o_KME / l_KM[:, :, None]).astype(dtype), block), lse_KM

    o_CNKGE, lse_CKM = lax.map(query_block, jnp.arange(places.shape[0], dtype=jnp.int32))
    return o_CNKGE.reshape(B, T, K, G, E), lse_CKM


def _backward(arrays, o, lse_CKM, do, block, dtype):
    """Gradients of q, k and v. Transposed copies of q and do keep all five products on the fast path."""
    q, _, _, segments_BT, branches_BT = arrays
    B, T, K, G, E = q.shape
    M, wide = G * block, _wide(dtype)
    places, counts = _visits(segments_BT, branches_BT, block)
    arrays, o, do = jax.tree.map(lambda x: _blocks(x, block), (arrays, o, do))
    q_CNKGE, k_CNKE, v_CNKE, segments_CN, branches_CN = arrays
    k_CKNE, v_CKNE = k_CNKE.swapaxes(1, 2), v_CNKE.swapaxes(1, 2)

    def query_block(carry, i):
        q_KME, q_KEM = _queries(q_CNKGE, i, dtype), _queries(q_CNKGE, i, dtype, True)
        do_KME, do_KEM = _queries(do, i, dtype), _queries(do, i, dtype, True)
        lse_KM = lse_CKM[i]
        delta_KM = (do_KME.astype(wide) * _queries(o, i, dtype).astype(wide)).sum(2)

        def visit(n, carry):
            dq_KME, dk_CKEN, dv_CKEN = carry
            j = places[i, n]
            k_KNE = _floats(k_CKNE[j], dtype)
            s_KMN = _scores(q_KME, k_KNE, segments_CN, branches_CN, i, j)
            p_KMN = jnp.exp(s_KMN - lse_KM[:, :, None]).astype(dtype)
            dv_CKEN = _add(dv_CKEN, j, _dot("kem,kmn->ken", do_KEM, p_KMN))
            dp_KMN = _dot("kme,kne->kmn", do_KME, _floats(v_CKNE[j], dtype))
            ds_KMN = (p_KMN.astype(wide) * (dp_KMN - delta_KM[:, :, None]) * E**-0.5).astype(dtype)
            dk_CKEN = _add(dk_CKEN, j, _dot("kem,kmn->ken", q_KEM, ds_KMN))
            return dq_KME + _dot("kmn,kne->kme", ds_KMN, k_KNE), dk_CKEN, dv_CKEN

        dq_KME, *carry = lax.fori_loop(0, counts[i], visit, (jnp.zeros((K, M, E), wide), *carry))
        return tuple(carry), _storage(dq_KME.astype(dtype), block)

    zeros = jnp.zeros((places.shape[0], K, E, block), wide)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(places.shape[0], dtype=jnp.int32))
    dk, dv = (_bits(x.astype(dtype)).transpose(0, 3, 1, 2).reshape(B, T, K, E) for x in (dk, dv))
    return tuple(_floats(x, dtype) for x in (dq.reshape(B, T, K, G, E), dk, dv))


def _add(x: jax.Array, j: jax.Array, y: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, j, 0, keepdims=False) + y, j, 0)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, segments, branches, block):
    return _flash_forward(q, k, v, segments, branches, block)[0]


def _flash_forward(q, k, v, segments, branches, block):
    o, lse = _forward((_bits(q), _bits(k), _bits(v), segments, branches), block, q.dtype)
    o, lse = checkpoint_name(o, "attn_out"), checkpoint_name(lse, "attn_lse")
    return _floats(o, q.dtype), (q, k, v, segments, branches, o, lse)


def _flash_backward(block, saved, do):
    q, k, v, segments, branches, o, lse = saved
    arrays = (_bits(q), _bits(k), _bits(v), segments, branches)
    return *_backward(arrays, o, lse, _bits(do), block, q.dtype), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def triton(q_BTHE, k_BTKE, v_BTKE, segments_BT, interpret: bool = False):
    """Pallas's Triton kernel for NVIDIA GPUs. It has no grouped heads, so keys and values are repeated."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    T, H, E = q_BTHE.shape[1:]
    q, k, v, segments = (_padded(x, -T % 128) for x in (q_BTHE, k_BTKE, v_BTKE, segments_BT))
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    return mha(q, k, v, segments, sm_scale=E**-0.5, causal=True, interpret=interpret)[:, :T]


def splash(q_BTHE, k_BTKE, v_BTKE, segments_BT, interpret: bool = False):
    """Pallas's splash attention for TPUs."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    T, H, E = q_BTHE.shape[1:]
    q, k, v, segments = (_padded(x, -T % 128) for x in (q_BTHE * E**-0.5, k_BTKE, v_BTKE, segments_BT))
    padded = q.shape[1]
    size = next(n for n in (512, 384, 256, 128) if padded % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": size for name in names}
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((padded, padded))] * H),
        block_sizes=kernels.BlockSizes(**sizes),
        residual_checkpoint_name="attn_out",
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*heads_first, kernels.SegmentIds(segments, segments)).swapaxes(1, 2)[:, :T]


def cudnn(q_BTHE, k_BTKE, v_BTKE, segments_BT, implementation: Literal["cudnn", "xla"] = "cudnn"):
    """cuDNN's flash attention for NVIDIA GPUs, for rows of one example with the padding at the end: it knows no segments."""
    lengths_B = jnp.maximum((segments_BT > 0).sum(1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q_BTHE, k_BTKE, v_BTKE, is_causal=True, query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )  # fmt: skip


def _kernel_for(device: Any, head_dim: int, dtype: Any, packed: bool = True) -> Attention:
    """The fastest kernel known to work there; `flash` works everywhere."""
    dtype = jnp.dtype(dtype)
    if device.platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return splash
    if device.platform in ("gpu", "cuda") and "NVIDIA" in device.device_kind and dtype.itemsize == 2 and head_dim <= 128:
        fast = triton if packed or head_dim % 8 else cudnn
        return fast if float(getattr(device, "compute_capability", 0)) >= 8 else flash
    return flash


def choose(mesh: Any, head_dim: int, dtype: Any, packed: bool = True) -> Attention:
    """The attention function (q, k, v, segments, branches=None) -> o for a mesh's devices, present or only described.

    packed: rows may hold several examples, or padding before the first token. Rows with branches go to `flash` everywhere.
    On a mesh each device works on its own rows and heads (sharding.py).
    """
    kernel = _kernel_for(mesh.devices.flat[0], head_dim, dtype, packed)
    queries, keys, row = ("rows", "time", "heads", "head_dim"), ("rows", "time", "kv_heads", "head_dim"), ("rows", "time")

    def attention(
        q_BTHE: Float[Array, "B T H E"],
        k_BTKE: Float[Array, "B T K E"],
        v_BTKE: Float[Array, "B T K E"],
        segments_BT: Int[Array, "B T"],
        branches_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H E"]:
        if branches_BT is None:
            return per_device(kernel, (queries, keys, keys, row), queries)(q_BTHE, k_BTKE, v_BTKE, segments_BT)
        axes = (queries, keys, keys, row, row)
        return per_device(flash, axes, queries)(q_BTHE, k_BTKE, v_BTKE, segments_BT, branches_BT)

    return attention
