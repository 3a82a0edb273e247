"""Attention over packed rows: one meaning, several kernels, and the choice between them.

Key s is visible to query t iff both are in the same segment, s is not after t in storage, and s's branch is 0 (a shared
prompt) or t's. Segment 0 is padding: its queries see nothing and get zeros (the accelerators' kernels: anything finite).
G = H / K query heads share a key head; nothing here repeats keys or values but the Triton kernel, which can't do without.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxft.sharding import per_device

Attention = Callable[..., jax.Array]
HIDDEN = -1e30  # a masked score: finite, so that a row without visible keys makes no NaN


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


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
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    visible_BS: Bool[Array, "B S"],
) -> Float[Array, "B H E"]:
    """One query a row against a cache of S keys."""
    B, H, E = q_BHE.shape
    K = k_BSKE.shape[2]
    s_BKGS = _dot("bkge,bske->bkgs", q_BHE.reshape(B, K, H // K, E), k_BSKE) * E**-0.5
    seen = visible_BS[:, None, None, :]
    p_BKGS = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s_BKGS, HIDDEN), axis=-1), 0)
    return _dot("bkgs,bske->bkge", p_BKGS.astype(v_BSKE.dtype), v_BSKE).reshape(B, H, E).astype(q_BHE.dtype)


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
    probabilities; a remat policy that saves the names "attn_out" and "attn_lse" saves it the forward pass.
    """
    return dense(q_BTHE, k_BTKE, v_BTKE, segments_BT, branches_BT)


def choose(mesh: Any, head_dim: int, dtype: Any) -> Attention:
    """The attention function (q, k, v, segments, branches=None) -> o for a mesh's devices, present or only described."""

    def attention(q_BTHE, k_BTKE, v_BTKE, segments_BT, branches_BT=None):
        return flash(q_BTHE, k_BTKE, v_BTKE, segments_BT, branches_BT)

    return attention
