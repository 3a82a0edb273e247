"""Blocks of the attention kernels for NVIDIA GPUs: their sizes, and which of them a program visits.

Visits are computed outside the kernels.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxft.nn.key_ranges import NEVER, KeyRanges


@dataclass(frozen=True)
class Tile:
    """How one kernel is divided: queries and keys of a block, warps of a program, stages of its pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Tiles:
    """The Tile of each kernel: output, gradient of queries, gradients of keys and values."""

    output: Tile
    queries: Tile
    keys: Tile


def tiles_for(head_dim: int) -> Tiles:
    """Return tiles that fit the 99 KB of shared memory that a program has on every GPU since Ampere."""
    if head_dim <= 64:
        return Tiles(Tile(128, 64), Tile(64, 64), Tile(64, 64))
    if head_dim <= 128:
        return Tiles(Tile(128, 64, warps=8), Tile(64, 32), Tile(32, 64))
    return Tiles(Tile(64, 32, warps=8), Tile(32, 32, warps=8), Tile(32, 32, warps=8))


def _hulls(ranges: KeyRanges, tile: Tile) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the key blocks [from, to) of each query block's prompts, and those of its own ranges: [B, C].

    They cover every visible key. No block is in both, and the prompts' come first.
    """

    def blocks(start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        start, end = (x.reshape(x.shape[0], x.shape[1] // tile.queries, tile.queries) for x in (start, end))
        size = np.int32(tile.keys)
        return lax.div(start.min(2), size), lax.div(end.max(2) + (size - 1), size)

    own_from, own_to = blocks(ranges.own_start, ranges.own_end)
    if ranges.prompt_start is None:
        return own_from, own_from, own_from, own_to
    prompt_from, prompt_to = blocks(ranges.prompt_start, ranges.prompt_end)
    return prompt_from, jnp.minimum(prompt_to, own_from), own_from, own_to


def key_visits(ranges: KeyRanges, tile: Tile) -> Int[Array, "B C 4"]:
    """Return for each query block: its first prompt block, how many of them, the first own block, and the
    number of all key blocks to visit.
    """
    prompt_from, prompt_to, own_from, own_to = _hulls(ranges, tile)
    prompts = jnp.maximum(prompt_to - prompt_from, 0)
    total = prompts + jnp.maximum(own_to - own_from, 0)
    return jnp.stack([prompt_from, prompts, own_from, total], axis=2)


def query_visits(ranges: KeyRanges, tile: Tile, count: int) -> Int[Array, "B D 2"]:
    """Return for each of `count` key blocks the first query block that sees it, and how many blocks from
    there to the last one that does.
    """
    hulls = [x[:, :, None] for x in _hulls(ranges, tile)]
    key = lax.broadcasted_iota(jnp.int32, (1, 1, count), 2)
    sees = ((hulls[0] <= key) & (key < hulls[1])) | ((hulls[2] <= key) & (key < hulls[3]))
    query = lax.broadcasted_iota(jnp.int32, (1, sees.shape[1], 1), 1)
    first = jnp.where(sees, query, NEVER).min(1)
    total = jnp.maximum(jnp.where(sees, query + 1, 0).max(1) - first, 0)
    return jnp.stack([jnp.where(total > 0, first, 0), total], axis=2)
