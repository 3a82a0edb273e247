"""Attention over packed rows: a reference implementation, several kernels, and the choice between them.

Key s is visible to query t iff both are in the same segment, s is not after t in storage, and the branch of s
is 0 (a shared prompt) or that of t; in a layer with a sliding window also the position of s must be above
that of t minus the window. Windows count positions, not storage: behind a shared prompt, the window of a
response's token covers its own branch and then the end of the prompt. Segment 0 is padding: its queries have
no visible keys and return zeros (in the accelerators' kernels any finite number). G = H / K query heads share
a key head; only the Triton kernel, which has no grouped heads, repeats keys and values.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.distributed.sharding import constrain, num_shards, per_device, shard_start
from jaxft.nn.flash_attention import (
    MASKED,
    PLAIN_RULE,
    AttentionRule,
    KeyMask,
    Visibility,
    checked,
    flash,
    flash_part,
    pad_time,
    soft_capped,
    visible,
    wide_einsum,
)

Kernel = Callable[..., jax.Array]


def dense(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B T K E"],
    v_BSKE: Float[Array, "B T K E"],
    rows: Visibility,
    rule: AttentionRule = PLAIN_RULE,
) -> Float[Array, "B T H E"]:
    """Reference implementation: softmax(q k^T / sqrt(E)) v over visible keys in float32 or wider, with all
    scores in memory.
    """
    rows, rule = checked(rows, rule)
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    q_BTKGE = q_BTHE.reshape(B, T, K, H // K, E)
    causal_TS = jnp.tril(jnp.ones((T, T), bool))[None]
    seen = visible(rows, rows, causal_TS, rule.window)[:, None, None]
    s_BKGTS = soft_capped(wide_einsum("btkge,bske->bkgts", q_BTKGE, k_BSKE) * E**-0.5, rule.softcap)
    s_BKGTS = jnp.where(seen, s_BKGTS, MASKED)
    p_BKGTS = jnp.where(seen, jax.nn.softmax(s_BKGTS, axis=-1), 0)
    o = wide_einsum("bkgts,bske->btkge", p_BKGTS, v_BSKE.astype(p_BKGTS.dtype))
    return o.reshape(B, T, H, E).astype(q_BTHE.dtype)


def _only_segments(kernel: str, rows: Visibility, rule: AttentionRule, softcap: bool = False) -> jax.Array:
    """Return the segments. Raises ValueError for what the kernel lacks: kernel_for does not choose it."""
    if rows.branches is not None or rule.window is not None or (rule.softcap is not None and not softcap):
        raise ValueError(f"{kernel} attention has no shared prompts, window or soft cap: use flash")
    return rows.segments


def triton(q_BTHE, k_BTKE, v_BTKE, rows, rule=PLAIN_RULE, interpret: bool = False):
    """Pallas's Triton kernel for NVIDIA GPUs. It has no grouped heads, so keys and values are repeated."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    segments_BT = _only_segments("Triton", rows, rule)
    T, H, E = q_BTHE.shape[1:]
    q, k, v, segments = (pad_time(x, -T % 128) for x in (q_BTHE, k_BTKE, v_BTKE, segments_BT))
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    return mha(q, k, v, segments, sm_scale=E**-0.5, causal=True, interpret=interpret)[:, :T]


def splash(q_BTHE, k_BTKE, v_BTKE, rows, rule=PLAIN_RULE, interpret: bool = False):
    """Pallas's splash attention for TPUs. It has soft caps, and windows of static size only."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    segments_BT = _only_segments("splash", rows, rule, softcap=True)
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
        attn_logits_soft_cap=rule.softcap,
        interpret=interpret,
    )
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(kernel)(*heads_first, kernels.SegmentIds(segments, segments)).swapaxes(1, 2)[:, :T]


def cudnn(q_BTHE, k_BTKE, v_BTKE, rows, rule=PLAIN_RULE, implementation: Literal["cudnn", "xla"] = "cudnn"):
    """cuDNN's flash attention for NVIDIA GPUs. A row is one example, padded at its end."""
    segments_BT = _only_segments("cuDNN", rows, rule)
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


def kernel_for(
    device: Any,
    head_dim: int,
    dtype: DTypeLike,
    packed: bool = True,
    branches: bool = False,
    rule: AttentionRule = PLAIN_RULE,
) -> Kernel:
    """Return the fastest kernel that works on a jax.sharding.AbstractDevice; `flash` works on all.

    packed: see attention. branches: the rows have shared prompts.
    """
    dtype = jnp.dtype(dtype)
    if branches or rule.window is not None:
        return flash
    if device.platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return splash
    if rule.softcap is not None:
        return flash
    nvidia = device.platform in ("gpu", "cuda") and "NVIDIA" in device.device_kind
    if nvidia and not BEFORE_AMPERE.search(device.device_kind) and dtype.itemsize == 2 and head_dim <= 128:
        return triton if packed or head_dim % 8 else cudnn
    return flash


def needed_window(window: int | None, length: int) -> int | None:
    """Return the window, or None if no row of `length` tokens reaches its end.

    A faster kernel may run without it. Positions start at 0 in each segment, so none is above length - 1.
    """
    return None if window is None or window >= length else window


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
    rows: Visibility,
    packed: bool = True,
    rule: AttentionRule = PLAIN_RULE,
) -> Float[Array, "B T H E"]:
    """Attention by the fastest kernel for the devices of the ambient mesh, present or described; else by
    `flash`.

    packed: a row may have several segments, or padding before its first token. Rows with branches, and layers
    with a window, use `flash`. Each device computes its own rows and heads (sharding.py). If the mesh shards
    time, heads are sharded instead during attention (Ulysses, Jacobs et al. 2023, arXiv:2309.14509); if they
    do not divide, each device gathers all keys for its queries.
    """
    chex.assert_equal_shape([k_BTKE, v_BTKE])
    chex.assert_equal_shape_prefix([q_BTHE, k_BTKE, rows.segments], 2)
    if isinstance(rule.window, int):
        rule = replace(rule, window=needed_window(rule.window, q_BTHE.shape[1]))
    rows, rule = checked(rows, rule)
    heads, kv_heads, ways = q_BTHE.shape[2], k_BTKE.shape[2], _head_shards()
    layout, kernel = _choice(q_BTHE, kv_heads, rows.branches is not None, packed, rule)
    if layout == "queries":
        return _sharded_queries(q_BTHE, k_BTKE, v_BTKE, rows, rule)
    arrays = q_BTHE, k_BTKE, v_BTKE, rows.segments, rows.branches, rows.positions, rule.window
    fn = _of_arrays(kernel, rule.softcap)
    if layout == "rows":
        return per_device(fn, (Q, K, K, ROW, ROW, ROW, None), Q, q_BTHE.shape)(*arrays)
    keys = SPREAD
    if kv_heads % ways:
        keys, fn = KEYS, _one_key_head(fn, heads // ways, heads // kv_heads)
    axes = (SPREAD, keys, keys, WHOLE, WHOLE, WHOLE, None)
    return constrain(per_device(fn, axes, SPREAD, q_BTHE.shape)(*arrays), *Q)


Layout = Literal["rows", "heads", "queries"]  # of a device: its rows; with time sharded, heads or queries


def _head_shards() -> int:
    """Return over how many devices heads are spread inside attention on a mesh that shards time."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return sizes.get("context", 1) * sizes.get("tensor", 1)


def _choice(
    q_BTHE: Any, kv_heads: int, branches: bool, packed: bool, rule: AttentionRule
) -> tuple[Layout, Kernel]:
    """Return how attention is divided over the ambient mesh and which kernel runs on each device."""
    mesh, (_, T, heads, head_dim), ways = jax.sharding.get_abstract_mesh(), q_BTHE.shape, _head_shards()
    layout: Layout = "heads"
    if dict(mesh.shape).get("context", 1) == 1 or num_shards(("time",), (T,)) == 1:
        layout = "rows"
    elif heads % ways or (kv_heads % ways and ways % kv_heads):
        return "queries", flash
    if mesh.empty:
        return layout, flash
    return layout, kernel_for(mesh.abstract_device, head_dim, q_BTHE.dtype, packed, branches, rule)


KERNEL_NAMES = {triton: "Triton", splash: "splash", cudnn: "cuDNN", flash: "blockwise XLA (flash)"}


def attention_line(
    q_BTHE: jax.ShapeDtypeStruct,
    kv_heads: int,
    branches: bool = False,
    packed: bool = True,
    rules: Sequence[AttentionRule] = (PLAIN_RULE,),
) -> str:
    """Return which kernels run for rows of this shape on the ambient mesh, and why no faster one does.

    rules: those of the model's layers, with windows as ints; layers of one scan have one kernel.
    """
    T, reasons = q_BTHE.shape[1], []
    rules = [replace(rule, window=needed_window(rule.window, T)) for rule in rules]
    windows = sorted({rule.window for rule in rules if rule.window is not None})
    caps = sorted({rule.softcap for rule in rules if rule.softcap is not None})
    rule = AttentionRule(min(windows, default=None), min(caps, default=None))
    layout, kernel = _choice(q_BTHE, kv_heads, branches, packed, rule)
    without = _choice(q_BTHE, kv_heads, False, packed, PLAIN_RULE)[1]  # flash too: the device has no other
    features = [f"sliding windows of {' and '.join(map(str, windows))}"] if windows else []
    features += [f"scores capped at {' and '.join(f'{cap:g}' for cap in caps)}"] if caps else []
    if kernel is not without and features:
        reasons.append(f"this model has {' and '.join(features)}")
    if kernel is not without and branches:
        reasons.append("responses share their prompt")
    if layout == "queries":
        reasons.append(f"{q_BTHE.shape[2]} heads do not divide over mesh.context x mesh.tensor")
    return f"attention: {KERNEL_NAMES[kernel]}" + (f": {'; '.join(reasons)}" if reasons else "")


def _of_arrays(kernel: Kernel, softcap: float | None) -> Kernel:
    """Return a kernel of arrays alone, as per_device shards them: a traced window is an argument."""

    def fn(q_BTHE, k_BTKE, v_BTKE, *rest):
        (*of_rows, window) = rest  # segments, branches and positions
        return kernel(q_BTHE, k_BTKE, v_BTKE, Visibility(*of_rows), AttentionRule(window, softcap))

    return fn


def _one_key_head(kernel: Kernel, queries: int, shared: int) -> Kernel:
    """Return the kernel for a device's `queries` heads, which share one key head; shared: query heads per key
    head.
    """

    def fn(q_BTHE, k_BTKE, v_BTKE, *rest):
        at = shard_start("context", queries) // np.int32(shared)
        k, v = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=2) for x in (k_BTKE, v_BTKE))
        return kernel(q_BTHE, k, v, *rest)

    return fn


def _sharded_queries(q_BTHE, k_BTKE, v_BTKE, rows: Visibility, rule: AttentionRule):
    """Attention on a mesh that shards time: each device gathers all keys for its part of the queries."""

    def part(q_BTHE, k_BSKE, v_BSKE, *rest):
        queries, keys, window = Visibility(*rest[:3]), Visibility(*rest[3:6]), rest[6]
        start = shard_start("context", q_BTHE.shape[1])
        mask = KeyMask(queries, keys, start, AttentionRule(window, rule.softcap))
        return flash_part(q_BTHE, k_BSKE, v_BSKE, mask)

    of_rows = rows.segments, rows.branches, rows.positions
    axes = (Q, KEYS, KEYS, ROW, ROW, ROW, WHOLE, WHOLE, WHOLE, None)
    arrays = q_BTHE, k_BTKE, v_BTKE, *of_rows, *of_rows, rule.window
    return per_device(part, axes, Q, q_BTHE.shape)(*arrays)
