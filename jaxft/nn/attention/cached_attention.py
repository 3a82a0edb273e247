"""Attention of one token per completion, or a chunk of them, to the cached keys of its prompt and of its own
earlier tokens.

Completions of a prompt share the prompt's keys, which are read once for all of them (Hydragen, Juravsky et
al. 2024, arXiv:2402.05099). One softmax over both parts of the keys normalises them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.nn.attention.flash_attention import MASKED, soft_capped
from jaxft.nn.attention.layer_attention import AttentionRule
from jaxft.nn.contractions import concat_bits, wide_einsum
from jaxft.tree import struct


@struct
class Keys:
    """Cached keys [L, B, K, E, S] and values [L, B, K, S, E] of L layers, in the layouts of the two matmuls.

    As raw bits of the compute dtype, or quantised with a scale for each token and head, [L, B, K, S].

    Those of one layer, in attention, have no L and are in the compute dtype, to be multiplied by the scales.
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None

    def part(self, start: int, end: int) -> "Keys":
        """Return the slots of a layer from start to before end."""
        scales = (None if x is None else x[:, :, start:end] for x in (self.k_scale, self.v_scale))
        return Keys(self.k[..., start:end], self.v[:, :, start:end], *scales)

    def of_rows(self, rows: Array) -> "Keys":
        """Return the keys of a layer of these rows (or prompts)."""
        return jax.tree.map(lambda x: x[rows], self)


def joined_keys(parts: Sequence[Keys]) -> Keys:
    """Return keys with the slots of all parts. Parts without scales have scales of 1, if others have some."""

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
    """Which rows complete which prompt.

    rows: the row of each completion of each prompt, int32 [P, G]. places: the index of each row in
    `rows.ravel()`, int32 [R]. A place without a row may name any row; its result is not used.
    """

    rows: Any
    places: Any

    def to_groups(self, x: Array) -> Array:
        """Return an array [R, ...] as [P, G, ...]."""
        return x[self.rows]

    def to_rows(self, x: Array) -> Array:
        """Return an array [P, G, ...] as [R, ...]."""
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[self.places]


def cached_attention(
    q_RHE: Float[Array, "R H E"],
    prompts: tuple[Keys, Bool[Array, "P g S"]],
    rows: tuple[Keys, Bool[Array, "R N"]],
    groups: RowGroups,
    softcap: float | None = None,
) -> Float[Array, "R H E"]:
    """Return softmax(q k^T / sqrt(E)) v over a row's visible keys: those of its prompt and its own.

    prompts, rows: keys, and which of them the query of each completion (of each row) attends to. softcap: see
    attention.dense. A row without visible keys is 0.
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
    """Return softmax(q k^T / sqrt(E)) v of several queries for each row over the row's visible keys.

    at: where in the row's text the keys and the queries are. A query sees the keys at its place and before
    it, within the window.
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
    """Return scores [B, K, M, S] scaled, and capped."""
    s = s * head_dim**-0.5
    return soft_capped(s if keys.k_scale is None else s * keys.k_scale[:, :, None].astype(s.dtype), softcap)


def _weights(p: Array, keys: Keys) -> Array:
    """Return probabilities [B, K, ..., S] times the scales of the values, in the values' dtype."""
    if keys.v_scale is not None:
        scale = keys.v_scale.astype(p.dtype)
        p = p * scale.reshape(*scale.shape[:2], *(1,) * (p.ndim - 3), scale.shape[-1])
    return p.astype(keys.v.dtype)
