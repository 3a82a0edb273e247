"""Weighted means of weights that are given as low-rank pairs: `alpha a b + (1 - alpha) a' b'` as one pair.

Blending a and b apart would be off by `alpha (1 - alpha) (a - a') (b - b')`. The mean of the products has up
to the sum of the two ranks. It is reduced to the nearest product of a fixed rank (Eckart & Young 1936), and
what that drops is returned.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.nn.lora import padded_pair
from jaxft.tree import Params

RANKS = 2  # rank of a blend, in ranks of the adapter


def widened_pairs(params: Params) -> Params:
    """Return the tree with the rank of every (a, b) pair multiplied by RANKS, padded with zeros: room for
    blends.

    A pair of which only one side is there is left as it is. Raises ValueError for DoRA.
    """
    if isinstance(params, dict) and params.get("magnitude") is not None:
        raise ValueError(
            "a mean of DoRA adapters is no adapter of a low rank; set adapter.dora=false, or moving=none"
        )
    if _is_pair(params):
        return padded_pair(params, RANKS * params["a"].shape[-1])
    if isinstance(params, dict):
        return {name: widened_pairs(x) for name, x in params.items()}
    return params


def blend(new: Params, old: Params, alpha: float) -> tuple[Params, Float[Array, ""]]:
    """Return `alpha new + (1 - alpha) old`, of products where both sides of a pair are there, and the
    relative error.

    old: a tree of widened_pairs, whose ranks the result has. The error is the Frobenius norm of what all
    reductions of the rank dropped, divided by that of all blended products; float32, 0 without pairs.
    """
    squares: list[tuple[Array, Array]] = []

    def walk(new: Params, old: Params) -> Params:
        if _is_pair(old):
            a, b, dropped, total = _blended_pair((new["a"], new["b"]), (old["a"], old["b"]), alpha)
            squares.append((dropped, total))
            return {**old, "a": a, "b": b}
        if isinstance(old, dict):
            return {name: walk(new[name], x) for name, x in old.items()}
        return jax.tree.map(lambda n, o: alpha * n + (1 - alpha) * o, new, old)

    with jax.default_matmul_precision("highest"):
        blended = walk(new, old)
    dropped, total = (
        sum((pair[i].astype(jnp.float32) for pair in squares), jnp.float32(0)) for i in range(2)
    )
    return blended, jnp.sqrt(dropped / jnp.where(total > 0, total, 1))


def _is_pair(node: Any) -> bool:
    """Whether a node of a tree of parameters has both sides of a low-rank pair."""
    return isinstance(node, dict) and node.get("a") is not None and node.get("b") is not None


def _blended_pair(
    new: tuple[Array, Array], old: tuple[Array, Array], alpha: float
) -> tuple[Array, Array, Array, Array]:
    """(a [..., I, R], b [..., R, O], squared norm of what was dropped, squared norm before), R of `old`."""
    wide = np.promote_types(old[0].dtype, np.float32)
    a = jnp.concatenate([new[0].astype(wide), old[0].astype(wide)], -1)
    b = jnp.concatenate([alpha * new[1].astype(wide), (1 - alpha) * old[1].astype(wide)], -2)
    left, core_left = jnp.linalg.qr(a)
    right, core_right = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vt = jnp.linalg.svd(core_left @ jnp.swapaxes(core_right, -1, -2), full_matrices=False)
    rank = old[0].shape[-1]
    root = jnp.sqrt(s[..., :rank])
    a = left @ (u[..., :rank] * root[..., None, :])
    b = (root[..., :, None] * vt[..., :rank, :]) @ jnp.swapaxes(right, -1, -2)
    pair, squares = padded_pair({"a": a, "b": b}, rank), jnp.square(s)
    return (
        pair["a"].astype(old[0].dtype),
        pair["b"].astype(old[1].dtype),
        jnp.sum(squares[..., rank:]),
        jnp.sum(squares),
    )
