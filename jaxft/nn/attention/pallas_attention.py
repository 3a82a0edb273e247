"""Attention by key ranges for NVIDIA GPUs: FlashAttention-2 (arXiv 2307.08691) as Pallas kernels for Triton.

A program of a kernel computes one block of queries and visits only the blocks of keys that they see: first
the shared prompts' blocks, then the queries' own ranges. (For the gradients of keys and values, a
program computes a block of keys and visits blocks of queries.) Keys are not copied for the query heads that
share them. The size of a block is a power of two, and a head is padded to a power of two in the kernel.

Pallas is imported only inside the functions that use it, since the import takes 0.2 s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxft.nn.attention.flash_attention import MASKED, NEVER, KeyRanges, pad_queries, pad_time, visible

LOG2_E = math.log2(math.e)  # the kernels' scores are in units of log 2, since exp2 is one instruction


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel: queries and keys per block, warps per program, stages of the software pipeline."""

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


@dataclass(frozen=True)
class KernelOptions:
    """Options of kernels. tiles: None for tiles_for(head_dim). interpret: run as JAX operations."""

    tiles: Tiles | None = None
    interpret: bool = False


@dataclass(frozen=True)
class _Settings:
    """The static arguments of a compiled kernel."""

    tiles: Tiles
    softcap: float | None
    interpret: bool
    wide: bool = False  # results are float32 instead of the dtype of q


def ranged_attention(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    ranges: KeyRanges,
    softcap: float | None = None,
    options: KernelOptions = KernelOptions(),
) -> Float[Array, "B T H E"]:
    """Attention by key ranges on NVIDIA GPUs of compute capability 8.0 and above.

    ranges: the keys that each query sees. softcap: as in attention.dense. Sums are float32; the attention
    weights, and the gradients of the scores, are rounded to the dtype of q for their matmuls. With a remat
    policy that saves "attn_out" and "attn_lse" the backward pass does not repeat the forward kernel.
    """
    qkv, ranges, settings = _in_tiles((q_BTHE, k_BSKE, v_BSKE), ranges, softcap, options)
    return _attend(qkv, ranges, settings)[:, : q_BTHE.shape[1]]


def _in_tiles(
    qkv: tuple[jax.Array, ...], ranges: KeyRanges, softcap: float | None, options: KernelOptions
) -> tuple[tuple[jax.Array, ...], KeyRanges, _Settings]:
    """Return (q, k, v), ranges and the kernels' static settings; time is padded to full tiles."""
    T, S = qkv[0].shape[1], qkv[1].shape[1]
    tiles = options.tiles or tiles_for(qkv[0].shape[3])
    all_tiles = tiles.output, tiles.queries, tiles.keys
    of_queries, of_keys = (math.lcm(*sizes) for sizes in zip(*((t.queries, t.keys) for t in all_tiles)))
    q, ranges = pad_time(qkv[0], -T % of_queries), pad_queries(ranges, -T % of_queries)
    k, v = (pad_time(x, -S % of_keys) for x in qkv[1:])
    return (q, k, v), ranges, _Settings(tiles, softcap, options.interpret)


def pallas_output(
    qkv: tuple[jax.Array, ...],
    ranges: KeyRanges,
    softcap: float | None,
    options: KernelOptions = KernelOptions(),
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Return float32 outputs and log-sum-exps (1e30 without keys), see flash_attention.flash_output."""
    T = qkv[0].shape[1]
    qkv, ranges, settings = _in_tiles(qkv, ranges, softcap, options)
    o, lse = output(qkv, ranges, replace(settings, wide=True))
    return o[:, :T], lse[:, :, :T]


def pallas_gradients(
    qkv: tuple[jax.Array, ...],
    ranges: KeyRanges,
    results: tuple[jax.Array, jax.Array, jax.Array],
    softcap: float | None,
    options: KernelOptions = KernelOptions(),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v in float32; see flash_attention.flash_gradients."""
    T, S, (o, lse, do) = qkv[0].shape[1], qkv[1].shape[1], results
    qkv, ranges, settings = _in_tiles(qkv, ranges, softcap, options)
    extra = qkv[0].shape[1] - T
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, extra)), constant_values=-MASKED)
    saved = qkv, ranges, pad_time(o, extra), lse
    (dq, dk, dv), _ = _attend_backward(replace(settings, wide=True), saved, pad_time(do, extra))
    return dq[:, :T], dk[:, :S], dv[:, :S]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv, ranges, settings):
    return _attend_forward(qkv, ranges, settings)[0]


def _attend_forward(qkv, ranges, settings):
    o, lse = output(qkv, ranges, settings)
    o, lse = checkpoint_name(o, "attn_out"), checkpoint_name(lse, "attn_lse")
    return o, (qkv, ranges, o, lse)


def _attend_backward(settings, saved, do):
    qkv, ranges, o, lse = saved
    delta_BTH = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(3)
    cotangents = do, lse, delta_BTH.swapaxes(1, 2)
    dq = query_gradient(qkv, ranges, cotangents, settings)
    return (dq, *key_gradients(qkv, ranges, cotangents, settings)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _rows_of(ranges: KeyRanges) -> Int[Array, "B R T"]:
    """Return the starts and ends of the ranges as one array; R is 2, or 4 with shared prompts."""
    return jnp.stack(jax.tree.leaves(ranges), axis=1)


LEAST_CONTRACTED = 16  # the smallest contracted axis of Triton's 16-bit matmuls


def _padded(head_dim: int) -> int:
    return max(LEAST_CONTRACTED, 1 << (head_dim - 1).bit_length())


# The blocks that a program visits, which are computed outside the kernels.


def _hulls(ranges: KeyRanges, tile: Tile) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return prompt_from, prompt_to, own_from, own_to, [B, C]: the intervals of key blocks that contain all
    keys that a query block sees in prompts, and in its own ranges.

    No key block is in both intervals. Without shared prompts the first interval is empty.
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
    """Return four numbers for each query block: the first key block of its prompts, the count of these, the
    first key block of its own ranges, and the count of all key blocks to visit.
    """
    prompt_from, prompt_to, own_from, own_to = _hulls(ranges, tile)
    prompts = jnp.maximum(prompt_to - prompt_from, 0)
    total = prompts + jnp.maximum(own_to - own_from, 0)
    return jnp.stack([prompt_from, prompts, own_from, total], axis=2)


def query_visits(ranges: KeyRanges, tile: Tile, count: int) -> Int[Array, "B D 2"]:
    """Return two numbers for each of `count` key blocks: the first query block that sees a key of it, and the
    count of query blocks from there to the last one that does.
    """
    hulls = [x[:, :, None] for x in _hulls(ranges, tile)]
    key = lax.broadcasted_iota(jnp.int32, (1, 1, count), 2)
    sees = ((hulls[0] <= key) & (key < hulls[1])) | ((hulls[2] <= key) & (key < hulls[3]))
    query = lax.broadcasted_iota(jnp.int32, (1, sees.shape[1], 1), 1)
    first = jnp.where(sees, query, NEVER).min(1)
    total = jnp.maximum(jnp.where(sees, query + 1, 0).max(1) - first, 0)
    return jnp.stack([jnp.where(total > 0, first, 0), total], axis=2)


# Parts of kernels. M queries and N keys are a block; E is the padded size of a head.


def _load(ref: Any, head_dim: int, *at: Any) -> jax.Array:
    """Return ref[at], [..., E], with zeros where the padded head exceeds head_dim."""
    from jax.experimental.pallas import triton as plgpu

    ref = ref.at[(*at, slice(None))] if at else ref
    if ref.shape[-1] == head_dim:
        return ref[...]
    return plgpu.load(ref, mask=_in_head(ref.shape[-1], head_dim), other=0.0)


def _store(ref: Any, value: jax.Array, head_dim: int) -> None:
    from jax.experimental.pallas import triton as plgpu

    if value.shape[-1] == head_dim:
        ref[...] = value.astype(ref.dtype)
    else:
        plgpu.store(ref, value.astype(ref.dtype), mask=_in_head(value.shape[-1], head_dim))


def _dot(x: jax.Array, y: jax.Array, x_axis: int = 1, y_axis: int = 0) -> jax.Array:
    """Return the matmul of x and y over one axis of each, in float32."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _in_head(padded: int, head_dim: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (1, padded), 1) < head_dim


def _scores(q_ME: jax.Array, k_NE: jax.Array, seen_MN: jax.Array, scale: float, softcap: float | None):
    """Return the masked scores divided by log 2, for exp2, and the soft cap's derivative at each or None."""
    s_MN = _dot(q_ME, k_NE, 1, 1)
    if softcap is None:
        return jnp.where(seen_MN, s_MN * (scale * LOG2_E), MASKED), None
    s_MN = jnp.tanh(s_MN * (scale / softcap))
    return jnp.where(seen_MN, s_MN * (softcap * LOG2_E), MASKED), 1.0 - s_MN * s_MN


def _seen(rows_RM: list[jax.Array], first_key: jax.Array, count: int) -> jax.Array:
    return visible(KeyRanges(*rows_RM), first_key + lax.iota(jnp.int32, count))


def _key_blocks(visits_ref: Any, prompts: bool) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Return a function from n to the index of the nth key block that a program visits, and the count of its
    visits. visits_ref: the result of key_visits for its query block. prompts: whether prompts are shared.
    """
    prompt, count, own, total = (visits_ref[i] for i in range(4))  # outside the loop, which prefetches keys
    if not prompts:
        return lambda n: own + n, total
    return lambda n: jnp.where(n < count, prompt + n, own - count + n), total


# The kernels


def _output_kernel(*refs, head_dim, softcap, tile):
    from jax.experimental import pallas as pl

    visits_ref, q_ref, k_ref, v_ref, rows_ref, o_ref, lse_ref = refs
    q_ME, scale = _load(q_ref, head_dim), head_dim**-0.5
    rows = [rows_ref[r] for r in range(rows_ref.shape[0])]
    block, total = _key_blocks(visits_ref, len(rows) > 2)

    def visit(n, carry):
        o_ME, top_M, sum_M = carry
        first = block(n) * tile.keys
        k_NE = _load(k_ref, head_dim, pl.ds(first, tile.keys))
        s_MN, _ = _scores(q_ME, k_NE, _seen(rows, first, tile.keys), scale, softcap)
        new_M = jnp.maximum(top_M, s_MN.max(1))
        p_MN, shrink_M = jnp.exp2(s_MN - new_M[:, None]), jnp.exp2(top_M - new_M)
        v_NE = _load(v_ref, head_dim, pl.ds(first, tile.keys))
        o_ME = o_ME * shrink_M[:, None] + _dot(p_MN.astype(v_NE.dtype), v_NE)
        return o_ME, new_M, sum_M * shrink_M + p_MN.sum(1)

    # The maximum starts between MASKED and any real score: a query without visible keys sums to 0.
    top_M = jnp.full(q_ME.shape[:1], MASKED / 2, jnp.float32)
    none = jnp.zeros(q_ME.shape, jnp.float32), top_M, jnp.zeros_like(top_M)
    o_ME, top_M, sum_M = lax.fori_loop(0, total, visit, none)
    empty_M = sum_M == 0
    sum_M = jnp.where(empty_M, 1.0, sum_M)
    _store(o_ref, o_ME / sum_M[:, None], head_dim)
    lse_ref[...] = jnp.where(empty_M, -MASKED, (top_M + jnp.log2(sum_M)) / LOG2_E)


def _query_kernel(*refs, head_dim, softcap, tile):
    from jax.experimental import pallas as pl

    visits_ref, q_ref, k_ref, v_ref, rows_ref, do_ref, lse_ref, delta_ref, dq_ref = refs
    q_ME, do_ME, scale = _load(q_ref, head_dim), _load(do_ref, head_dim), head_dim**-0.5
    rows = [rows_ref[r] for r in range(rows_ref.shape[0])]
    (block, total), lse_M = _key_blocks(visits_ref, len(rows) > 2), lse_ref[...] * LOG2_E
    delta_M = delta_ref[...]

    def visit(n, dq_ME):
        first = block(n) * tile.keys
        k_NE, v_NE = (_load(ref, head_dim, pl.ds(first, tile.keys)) for ref in (k_ref, v_ref))
        s_MN, slope_MN = _scores(q_ME, k_NE, _seen(rows, first, tile.keys), scale, softcap)
        ds_MN = jnp.exp2(s_MN - lse_M[:, None]) * (_dot(do_ME, v_NE, 1, 1) - delta_M[:, None])
        ds_MN = ds_MN if slope_MN is None else ds_MN * slope_MN
        return dq_ME + _dot(ds_MN.astype(k_NE.dtype), k_NE)

    dq_ME = lax.fori_loop(0, total, visit, jnp.zeros(q_ME.shape, jnp.float32))
    _store(dq_ref, dq_ME * scale, head_dim)


def _key_kernel(*refs, head_dim, softcap, tile):
    from jax.experimental import pallas as pl

    visits_ref, q_ref, k_ref, v_ref, rows_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
    k_NE, v_NE, scale = _load(k_ref, head_dim), _load(v_ref, head_dim), head_dim**-0.5
    first, count = visits_ref[0], visits_ref[1]
    heads, first_key = np.int32(q_ref.shape[1]), pl.program_id(0) * tile.keys

    def visit(n, carry):  # every head of a block of queries, then the next block
        dk_NE, dv_NE = carry
        g, at = lax.rem(n, heads), pl.ds((first + lax.div(n, heads)) * tile.queries, tile.queries)
        q_ME, do_ME = (_load(ref, head_dim, at, g) for ref in (q_ref, do_ref))
        seen_MN = _seen([rows_ref[r, at] for r in range(rows_ref.shape[0])], first_key, tile.keys)
        s_MN, slope_MN = _scores(q_ME, k_NE, seen_MN, scale, softcap)
        p_MN = jnp.exp2(s_MN - lse_ref[g, at][:, None] * LOG2_E)
        dv_NE = dv_NE + _dot(p_MN.astype(do_ME.dtype), do_ME, 0, 0)
        ds_MN = p_MN * (_dot(do_ME, v_NE, 1, 1) - delta_ref[g, at][:, None])
        ds_MN = ds_MN if slope_MN is None else ds_MN * slope_MN
        return dk_NE + _dot(ds_MN.astype(q_ME.dtype), q_ME, 0, 0), dv_NE

    zeros = jnp.zeros(k_NE.shape, jnp.float32)
    dk_NE, dv_NE = lax.fori_loop(0, count * heads, visit, (zeros, zeros))
    _store(dk_ref, dk_NE * scale, head_dim)
    _store(dv_ref, dv_NE, head_dim)


# Calls of the kernels. Inside, c is the block of queries or of keys, b the row and h the head.


def _call(kernel: Callable, tile: Tile, settings: _Settings, head_dim: int, **call: Any) -> Callable:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    return pl.pallas_call(
        partial(kernel, head_dim=head_dim, softcap=settings.softcap, tile=tile),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
        name=f"attention{kernel.__name__}",
        **call,
    )


def _result(x: jax.Array, settings: _Settings) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32) if settings.wide else x.dtype)


def _by_query(q: jax.Array, k: jax.Array, rows: jax.Array, tile: Tile) -> tuple[tuple, list, Any, Any]:
    """Return for a kernel over blocks of queries: its grid, the BlockSpecs of [visits, q, k, v, rows], and
    the BlockSpecs of further arrays [B, T, H, E] and [B, H, T].

    rows: as _rows_of returns them. The last queries of a row, which see the most keys, start first.
    """
    from jax.experimental import pallas as pl

    (B, T, H, E), (S, K) = q.shape, k.shape[1:3]
    C, G, padded = T // tile.queries, H // K, _padded(E)
    query = pl.BlockSpec((None, tile.queries, None, padded), lambda c, b, h: (b, C - 1 - c, h, 0))
    key = pl.BlockSpec((None, S, None, padded), lambda c, b, h: (b, 0, h // G, 0))
    visits = pl.BlockSpec((None, None, 4), lambda c, b, h: (b, C - 1 - c, 0))
    ranges = pl.BlockSpec((None, rows.shape[1], tile.queries), lambda c, b, h: (b, 0, C - 1 - c))
    scalars = pl.BlockSpec((None, None, tile.queries), lambda c, b, h: (b, h, C - 1 - c))
    return (C, B, H), [visits, query, key, key, ranges], query, scalars


@partial(jax.jit, static_argnums=2)  # without jit, a rematerialised layer keeps the kernel though it is dead
def output(
    qkv: tuple[jax.Array, jax.Array, jax.Array], ranges: KeyRanges, settings: _Settings
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Run the output kernel: return the output and the log-sum-exp of scores (1e30 without visible keys)."""
    (q, k, v), tile, rows = qkv, settings.tiles.output, _rows_of(ranges)
    (B, T, H, E) = q.shape
    grid, in_specs, query, scalars = _by_query(q, k, rows, tile)
    shapes = _result(q, settings), jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    call = _call(
        _output_kernel, tile, settings, E, grid=grid, in_specs=in_specs, out_specs=(query, scalars),
        out_shape=shapes,
    )  # fmt: skip
    return call(key_visits(ranges, tile), q, k, v, rows)


Cotangents = tuple[Float[Array, "B T H E"], Float[Array, "B H T"], Float[Array, "B H T"]]


def query_gradient(
    qkv: tuple[jax.Array, jax.Array, jax.Array], ranges: KeyRanges, given: Cotangents, settings: _Settings
) -> Float[Array, "B T H E"]:
    """Run the kernel for the gradient of q. given: do, the cotangent of the output o; the log-sum-exp of the
    scores; the sum of o * do over E.
    """
    (q, k, v), tile, rows = qkv, settings.tiles.queries, _rows_of(ranges)
    grid, in_specs, query, scalars = _by_query(q, k, rows, tile)
    call = _call(
        _query_kernel, tile, settings, q.shape[3], grid=grid, in_specs=[*in_specs, query, scalars, scalars],
        out_specs=query, out_shape=_result(q, settings),
    )  # fmt: skip
    return call(key_visits(ranges, tile), q, k, v, rows, *given)


def key_gradients(
    qkv: tuple[jax.Array, jax.Array, jax.Array], ranges: KeyRanges, given: Cotangents, settings: _Settings
) -> tuple[Float[Array, "B S K E"], Float[Array, "B S K E"]]:
    """Run the kernel for the gradients of k and v, whose programs sum over the query heads that share a key
    head. given: as in query_gradient.
    """
    from jax.experimental import pallas as pl

    (q, k, v), tile, rows = qkv, settings.tiles.keys, _rows_of(ranges)
    (B, T, H, E), (S, K) = q.shape, k.shape[1:3]
    count, G, padded = S // tile.keys, H // K, _padded(E)
    key = pl.BlockSpec((None, tile.keys, None, padded), lambda c, b, h: (b, c, h, 0))
    query = pl.BlockSpec((None, T, G, padded), lambda c, b, h: (b, 0, h, 0))
    visits = pl.BlockSpec((None, None, 2), lambda c, b, h: (b, c, 0))
    row = pl.BlockSpec((None, rows.shape[1], T), lambda c, b, h: (b, 0, 0))
    scalars = pl.BlockSpec((None, G, T), lambda c, b, h: (b, h, 0))
    shape = _result(k, settings)
    call = _call(
        _key_kernel, tile, settings, E, grid=(count, B, K), out_specs=(key, key), out_shape=(shape, shape),
        in_specs=[visits, query, key, key, row, query, scalars, scalars],
    )  # fmt: skip
    return call(query_visits(ranges, tile, count), q, k, v, rows, *given)
