"""Attention over packed rows: a reference implementation, several kernels, and the choice between them.

Key s is visible to query t iff both are in the same segment, s is not after t in storage, and the branch of s
is 0 (a shared prompt) or that of t. Segment 0 is padding: its queries have no visible keys and return zeros
(in the accelerators' kernels any finite number). G = H / K query heads share a key head; only the Triton
kernel, which has no grouped heads, repeats keys and values.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxft.distributed.sharding import constrain, num_shards, per_device, shard_start
from jaxft.nn.flash_attention import MASKED, Visibility, flash, flash_part, pad_time, visible, wide_einsum

Kernel = Callable[..., jax.Array]


def dense(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B T K E"],
    v_BSKE: Float[Array, "B T K E"],
    segments_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H E"]:
    """Reference implementation: softmax(q k^T / sqrt(E)) v over visible keys in float32 or wider, with all
    scores in memory.
    """
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    q_BTKGE = q_BTHE.reshape(B, T, K, H // K, E)
    causal_TS = jnp.tril(jnp.ones((T, T), bool))[None]
    seen = visible(segments_BT, segments_BT, branches_BT, branches_BT, causal_TS)[:, None, None]
    s_BKGTS = jnp.where(seen, wide_einsum("btkge,bske->bkgts", q_BTKGE, k_BSKE) * E**-0.5, MASKED)
    p_BKGTS = jnp.where(seen, jax.nn.softmax(s_BKGTS, axis=-1), 0)
    o = wide_einsum("bkgts,bske->btkge", p_BKGTS, v_BSKE.astype(p_BKGTS.dtype))
    return o.reshape(B, T, H, E).astype(q_BTHE.dtype)


def cached_attention(
    q_BHE: Float[Array, "B H E"],
    k_BKES: Float[Array, "B K E S"],
    v_BKSE: Float[Array, "B K S E"],
    visible_BS: Bool[Array, "B S"],
) -> Float[Array, "B H E"]:
    """Attention of one query per row to a cache of S keys, stored in the layouts of the two matmuls."""
    B, H, E = q_BHE.shape
    K = k_BKES.shape[1]
    s_BKGS = wide_einsum("bkge,bkes->bkgs", q_BHE.reshape(B, K, H // K, E), k_BKES) * E**-0.5
    seen = visible_BS[:, None, None, :]
    p_BKGS = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s_BKGS, MASKED), axis=-1), 0)
    return (
        wide_einsum("bkgs,bkse->bkge", p_BKGS.astype(v_BKSE.dtype), v_BKSE)
        .reshape(B, H, E)
        .astype(q_BHE.dtype)
    )


def triton(q_BTHE, k_BTKE, v_BTKE, segments_BT, interpret: bool = False):
    """Pallas's Triton kernel for NVIDIA GPUs. It has no grouped heads, so keys and values are repeated."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    T, H, E = q_BTHE.shape[1:]
    q, k, v, segments = (pad_time(x, -T % 128) for x in (q_BTHE, k_BTKE, v_BTKE, segments_BT))
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    return mha(q, k, v, segments, sm_scale=E**-0.5, causal=True, interpret=interpret)[:, :T]


def splash(q_BTHE, k_BTKE, v_BTKE, segments_BT, interpret: bool = False):
    """Pallas's splash attention for TPUs."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    T, H, E = q_BTHE.shape[1:]
    q, k, v, segments = (pad_time(x, -T % 128) for x in (q_BTHE * E**-0.5, k_BTKE, v_BTKE, segments_BT))
    size_T = q.shape[1]
    size = next(n for n in (512, 384, 256, 128) if size_T % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": size for name in names}
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((size_T, size_T))] * H),
        block_sizes=kernels.BlockSizes(**sizes),
        residual_checkpoint_name="attn_out",
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*heads_first, kernels.SegmentIds(segments, segments)).swapaxes(1, 2)[:, :T]


def cudnn(q_BTHE, k_BTKE, v_BTKE, segments_BT, implementation: Literal["cudnn", "xla"] = "cudnn"):
    """cuDNN's flash attention for NVIDIA GPUs. A row is one example, padded at its end."""
    lengths_B = jnp.maximum((segments_BT > 0).sum(1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q_BTHE, k_BTKE, v_BTKE, is_causal=True, query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )  # fmt: skip


# Device kinds of NVIDIA GPUs below compute capability 8.0, which the devices of an abstract mesh do not
# state.
BEFORE_AMPERE = re.compile(
    r"GeForce (GTX|MX[1-4]\d\d|RTX 20[678]0)|TITAN|Quadro|Tesla|NVIDIA T\d|Xavier|Tegra"
)


def kernel_for(device: Any, head_dim: int, dtype: DTypeLike, packed: bool = True) -> Kernel:
    """Return the fastest kernel that works on a jax.sharding.AbstractDevice; `flash` works on all."""
    dtype = jnp.dtype(dtype)
    if device.platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return splash
    nvidia = device.platform in ("gpu", "cuda") and "NVIDIA" in device.device_kind
    if nvidia and not BEFORE_AMPERE.search(device.device_kind) and dtype.itemsize == 2 and head_dim <= 128:
        return triton if packed or head_dim % 8 else cudnn
    return flash


Q, K, ROW = ("rows", "time", "heads", "head_dim"), ("rows", "time", "kv_heads", "head_dim"), ("rows", "time")
SPREAD, KEYS = (
    ("rows", "whole_time", "spread_heads", "head_dim"),
    ("rows", "whole_time", "kv_heads", "head_dim"),
)
WHOLE = ("rows", "whole_time")


def attention(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segments_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None = None,
    packed: bool = True,
) -> Float[Array, "B T H E"]:
    """Attention by the fastest kernel for the devices of the ambient mesh, present or described; else by
    `flash`.

    packed: a row may have several segments, or padding before its first token. Rows with branches use
    `flash`. Each device computes its own rows and heads (sharding.py). If the mesh shards time, heads are
    sharded instead during attention (Ulysses, Jacobs et al. 2023, arXiv:2309.14509); if they do not divide,
    each device gathers all keys for its queries.
    """
    chex.assert_equal_shape([k_BTKE, v_BTKE])
    chex.assert_equal_shape_prefix([q_BTHE, k_BTKE, segments_BT], 2)
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    fast = flash if mesh.empty else kernel_for(mesh.abstract_device, q_BTHE.shape[3], q_BTHE.dtype, packed)
    context, ways = sizes.get("context", 1), sizes.get("context", 1) * sizes.get("tensor", 1)
    kernel = fast if branches_BT is None else flash
    rows = (segments_BT,) if branches_BT is None else (segments_BT, branches_BT)
    heads, kv_heads = q_BTHE.shape[2], k_BTKE.shape[2]
    if context == 1 or num_shards(("time",), q_BTHE.shape[1:2]) == 1:
        axes = (Q, K, K, *(ROW,) * len(rows))
        return per_device(kernel, axes, Q, q_BTHE.shape)(q_BTHE, k_BTKE, v_BTKE, *rows)
    if heads % ways or (kv_heads % ways and ways % kv_heads):
        return _sharded_queries(q_BTHE, k_BTKE, v_BTKE, segments_BT, branches_BT)
    if kv_heads % ways == 0:
        keys, fn = SPREAD, kernel
    else:
        keys, fn = KEYS, _one_key_head(kernel, heads // ways, heads // kv_heads)
    axes = (SPREAD, keys, keys, *(WHOLE,) * len(rows))
    return constrain(per_device(fn, axes, SPREAD, q_BTHE.shape)(q_BTHE, k_BTKE, v_BTKE, *rows), *Q)


def _one_key_head(kernel, queries: int, shared: int):
    """Return the kernel for a device's `queries` heads, which share one key head; shared: query heads per key
    head.
    """

    def fn(q_BTHE, k_BTKE, v_BTKE, *rows):
        at = shard_start("context", queries) // np.int32(shared)
        k, v = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=2) for x in (k_BTKE, v_BTKE))
        return kernel(q_BTHE, k, v, *rows)

    return fn


def _sharded_queries(q_BTHE, k_BTKE, v_BTKE, segments_BT, branches_BT):
    """Attention on a mesh that shards time: each device gathers all keys for its part of the queries."""

    def part(q_BTHE, k_BSKE, v_BSKE, *rows):
        queries, keys = Visibility(*rows[:2]), Visibility(*rows[2:])
        return flash_part(q_BTHE, k_BSKE, v_BSKE, (queries, keys), shard_start("context", q_BTHE.shape[1]))

    rows, axes = (segments_BT, branches_BT), (Q, KEYS, KEYS, ROW, ROW, WHOLE, WHOLE)
    return per_device(part, axes, Q, q_BTHE.shape)(q_BTHE, k_BTKE, v_BTKE, *rows, *rows)
