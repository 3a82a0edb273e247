"""Attention over packed rows: a reference implementation, several kernels, and the choice between them.

Every kernel takes q, k, v, the keys that each query sees as key ranges (flash_attention.py), and a soft cap.
The output of a query without keys, such as padding, is 0 (in splash and cuDNN any finite number). G = H / K
query heads share a key head; no kernel repeats keys and values.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxft.annotations import check_bounds
from jaxft.distributed.sharding import constrain, mesh_size, num_shards, per_device, shard_start
from jaxft.nn.attention import flash_attention, pallas_attention
from jaxft.nn.attention.flash_attention import MASKED, KeyRanges, flash, soft_capped, visible
from jaxft.nn.attention.pallas_attention import ranged_attention as pallas
from jaxft.nn.attention.ring_attention import BlockKernel, balanced, ring
from jaxft.nn.attention.splash_attention import has_shared_prompts, splash, splash_of_scaled
from jaxft.nn.matmul import wide_einsum

Kernel = Callable[..., jax.Array]
# How a device gets the keys of its rows. With time sharded it has all time of some heads, or a part of the
# queries of all heads, for which keys are gathered or passed around a ring.
Layout = Literal["rows", "heads", "gathered", "ring"]


def dense(
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    ranges: KeyRanges,
    softcap: float | None = None,
) -> Float[Array, "B T H E"]:
    """Reference implementation: softmax(q k^T / sqrt(E)) v over visible keys in float32 or wider, with all
    scores in memory.

    softcap: scores s become softcap * tanh(s / softcap) before the mask; None: they are not changed.
    """
    B, T, H, E = q_BTHE.shape
    S, K = k_BSKE.shape[1:3]
    q_BTKGE = q_BTHE.reshape(B, T, K, H // K, E)
    seen = visible(ranges, jnp.arange(S, dtype=jnp.int32))[:, None, None]
    s_BKGTS = soft_capped(wide_einsum("btkge,bske->bkgts", q_BTKGE, k_BSKE) * E**-0.5, softcap)
    s_BKGTS = jnp.where(seen, s_BKGTS, MASKED)
    p_BKGTS = jnp.where(seen, jax.nn.softmax(s_BKGTS, axis=-1), 0)
    o = wide_einsum("bkgts,bske->btkge", p_BKGTS, v_BSKE.astype(p_BKGTS.dtype))
    return o.reshape(B, T, H, E).astype(q_BTHE.dtype)


def cudnn(q_BTHE, k_BTKE, v_BTKE, ranges, softcap=None, implementation: Literal["cudnn", "xla"] = "cudnn"):
    """cuDNN's flash attention for NVIDIA GPUs, for rows that are one example each, padded at the end.

    Raises ValueError for shared prompts, sliding windows and a soft cap.
    """
    if ranges.prompt_start is not None or ranges.windowed or softcap is not None:
        raise ValueError(
            "cuDNN attention supports no shared prompts, sliding window or soft cap; call attention.pallas"
        )
    lengths_B = jnp.maximum((ranges.own_end > 0).sum(1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q_BTHE, k_BTKE, v_BTKE, is_causal=True, query_seq_lengths=lengths_B, key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )  # fmt: skip


# Device kinds of NVIDIA GPUs below compute capability 8.0, which the devices of an abstract mesh do not
# state. (GeForce RTX 2050 and MX570, CMP 70HX and above are 8.x; developer.nvidia.com/cuda/gpus, /legacy.)
BEFORE_AMPERE = re.compile(
    r"GeForce (GTX?|MX[1-4]\d\d|MX550|\d{3}|RTX 20[678]0)|TITAN|Quadro|Tesla|GRID(?! A\d)|NVS|NVIDIA T\d|"
    r"P10\d-|CMP [345]0HX|Xavier|Tegra"
)


@dataclass(frozen=True)
class AttentionNeeds:
    """Features of rows and layers that a kernel must support.

    packed: a row may have several segments, or padding before its first token. branches: responses share
    prompts. windowed: a layer has a sliding window shorter than the row. softcap: scores are capped. part:
    the queries are only some of the row's tokens, the keys all.
    """

    packed: bool = True
    branches: bool = False
    windowed: bool = False
    softcap: bool = False
    part: bool = False


# How a device gets the keys of its part of each row. "auto": by heads, or by the length of rows.
ContextKeys = Literal["auto", "gathered", "ring"]
# "auto": the device's own kernel where there is one. "flash": blockwise XLA, on any device. "reference": all
# scores in memory, the only one that can be differentiated twice.
AttentionKernel = Literal["auto", "flash", "reference"]
VARIABLE = "JAXFT_ATTENTION"  # of the environment: a kernel for all models of any command


@dataclass(frozen=True)
class AttentionSettings:
    """Attention settings that all layers of a model share.

    softcap: see dense. context_keys: how devices get the keys of a row that mesh.context shards: "gathered",
    or "ring" (passed around a ring; not with the reference kernel). "auto" shards heads instead if devices
    can share them evenly; else it passes keys around a ring if a device has at least RING_LEAST tokens of a
    row and the kernel supports it, and gathers them otherwise. kernel: the kernel that each device runs;
    "auto" takes the fastest.
    """

    softcap: float | None = None
    context_keys: ContextKeys = "auto"
    kernel: Annotated[AttentionKernel, "attention"] = "auto"

    def __post_init__(self) -> None:
        check_bounds(self)


def asked_for(settings: AttentionSettings) -> str:
    """Return the setting that chooses a kernel, such as "attention=flash" or "JAXFT_ATTENTION=flash"; "" if
    the choice is automatic.

    Raises ValueError for an unknown value of the environment variable JAXFT_ATTENTION.
    """
    if settings.kernel != "auto":
        return f"attention={settings.kernel}"
    everywhere = os.environ.get(VARIABLE) or "auto"
    if everywhere not in get_args(AttentionKernel):
        raise ValueError(f"{VARIABLE}={everywhere} is unknown; use {', '.join(get_args(AttentionKernel))}")
    return "" if everywhere == "auto" else f"{VARIABLE}={everywhere}"


def kernel_for(
    device: Any, head_dim: int, dtype: DTypeLike, rows: AttentionNeeds = AttentionNeeds()
) -> Kernel:
    """Return the fastest kernel for a device that supports these rows; `flash` works on all devices.

    device: a jax.sharding.AbstractDevice.
    """
    if device.platform not in ("tpu", "gpu", "cuda") or flash_reason(device, head_dim, dtype):
        return flash
    if device.platform == "tpu":
        lacks = rows.windowed or rows.part or (rows.branches and not has_shared_prompts())
        return flash if lacks else splash
    ranged = rows.packed or rows.branches or rows.windowed or rows.part or rows.softcap
    return pallas if ranged or head_dim % 8 or head_dim > 128 else cudnn


def flash_reason(device: Any, head_dim: int, dtype: DTypeLike) -> str:
    """Return why a GPU or TPU runs `flash` for this head_dim and dtype; "" if it need not, and on a CPU."""
    kind, dtype = device.device_kind, jnp.dtype(dtype)
    if device.platform == "tpu":
        takes = dtype in (jnp.bfloat16, jnp.float32)
        return "" if takes else f"TPU kernels compute in bfloat16 or float32, not {dtype}"
    if device.platform not in ("gpu", "cuda"):
        return ""
    if BEFORE_AMPERE.search(kind):
        return f"{kind} has a compute capability below 8.0"
    if not re.search(r"NVIDIA|GRID A\d", kind):  # older virtual GPUs: "GRID A100-20C"
        return f"{kind} is not an NVIDIA GPU"
    if dtype.itemsize != 2:
        return f"GPU kernels compute in bfloat16 or float16, not {dtype}"
    return "" if head_dim <= 256 else f"GPU kernels need a head_dim of at most 256, got {head_dim}"


def needed_window(window: int | None, length: int) -> int | None:
    """Return the sliding window, or None if it is at least as long as rows of `length` tokens.

    Such a window masks nothing, because positions start at 0 in each segment, and without it a faster kernel
    may run.
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
    ranges: KeyRanges,
    packed: bool = True,
    settings: AttentionSettings = AttentionSettings(),
) -> Float[Array, "B T H E"]:
    """Attention, with scores divided by sqrt(E), by the fastest kernel for the devices of the ambient mesh
    (which may be abstract); without a mesh by `flash`.

    packed: a row may have several segments, or padding before its first token. settings: may choose a kernel,
    and how devices get keys. See attention_by for how the work is divided over the mesh.
    """
    branches, softcap = ranges.prompt_start is not None, settings.softcap
    rows = AttentionNeeds(packed, branches, ranges.windowed, softcap is not None)
    choice = chosen_kernel(q_BTHE, k_BTKE.shape[2], rows, settings)
    return attention_by(choice, q_BTHE, k_BTKE, v_BTKE, ranges, softcap)


def attention_by(
    choice: tuple[Layout, Kernel],
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    ranges: KeyRanges,
    softcap: float | None,
) -> Float[Array, "B T H E"]:
    """Attention by a given kernel, divided over the ambient mesh. choice: see chosen_kernel.

    Each device computes its rows and heads. Layout "heads", if the mesh shards time: heads are sharded
    instead during attention (Ulysses, Jacobs et al. 2023, arXiv:2309.14509). "gathered" and "ring", if
    the devices cannot share the heads evenly or context_keys is set: each device computes an early and a late
    part of the queries, and gathers all keys or passes them around a ring (ring_attention.py).
    """
    chex.assert_equal_shape([k_BTKE, v_BTKE])
    chex.assert_equal_shape_prefix([q_BTHE, k_BTKE, ranges.own_start], 2)
    heads, kv_heads, ways, (layout, kernel) = q_BTHE.shape[2], k_BTKE.shape[2], _head_shards(), choice
    of_queries = ranges.own_start, ranges.own_end, ranges.prompt_start, ranges.prompt_end
    arrays = q_BTHE, k_BTKE, v_BTKE, *of_queries

    def fn(q_BTHE, k_BTKE, v_BTKE, *of_queries):  # of arrays, which per_device can shard
        return kernel(q_BTHE, k_BTKE, v_BTKE, KeyRanges(*of_queries, windowed=ranges.windowed), softcap)

    if layout == "rows":
        return per_device(fn, (Q, K, K, *(ROW,) * 4), Q, q_BTHE.shape)(*arrays)
    if layout == "gathered":
        fn = balanced(fn, mesh_size("context"))
        return per_device(fn, (Q, KEYS, KEYS, *(WHOLE,) * 4), Q, q_BTHE.shape)(*arrays)
    if layout == "ring":
        fn = ring(BLOCK_KERNELS[kernel], ranges.windowed, softcap, mesh_size("context"))
        return per_device(fn, (Q, K, K, *(WHOLE,) * 4), Q, q_BTHE.shape)(*arrays)
    keys = SPREAD
    if kv_heads % ways:
        keys, fn = KEYS, _one_key_head(fn, heads // ways, heads // kv_heads)
    axes = (SPREAD, keys, keys, *(WHOLE,) * 4)
    return constrain(per_device(fn, axes, SPREAD, q_BTHE.shape)(*arrays), *Q)


# A ring stores a fraction of the keys and hides their transfer behind attention, but starts a kernel per
# block of keys. Attention of L queries to L keys, of which half are visible, is 2 L^2 H E FLOPs; the block's
# keys and values are 4 L K E bytes in 16 bits. That is L G / 2 FLOPs per byte, G = H / K. An H100 with NVLink
# computes 2,200 FLOPs per byte that it receives (989 TFLOP/s, 450 GB/s): L = 1,100 with G = 4. Twice that is
# needed where links have half that speed.
RING_LEAST = 2048  # tokens of a row that a device stores

BLOCK_KERNELS: dict[Kernel, BlockKernel] = {
    flash: BlockKernel(flash_attention.flash_output, flash_attention.flash_gradients),
    pallas: BlockKernel(pallas_attention.pallas_output, pallas_attention.pallas_gradients),
}


# For some kernels, the variant that takes queries which are already scaled. A model's layers scale queries in
# float32 as part of rope; the kernel itself would scale them after they are rounded, and round them again.
OF_SCALED_QUERIES: dict[Kernel, Kernel] = {splash: splash_of_scaled}


def _head_shards() -> int:
    """Return over how many devices the layout "heads" spreads heads: mesh.context times mesh.tensor."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return sizes.get("context", 1) * sizes.get("tensor", 1)


def chosen_kernel(
    q_BTHE: jax.Array | jax.ShapeDtypeStruct, kv_heads: int, rows: AttentionNeeds, settings: AttentionSettings
) -> tuple[Layout, Kernel]:
    """Return how `attention` is divided over the ambient mesh (see attention_by), and the kernel that each
    device runs. q_BTHE: only its shape and dtype are used. Raises ValueError for a ring with the reference
    kernel.
    """
    mesh, (_, T, heads, head_dim) = jax.sharding.get_abstract_mesh(), q_BTHE.shape
    context_keys, ways, asked = settings.context_keys, _head_shards(), asked_for(settings)
    # whether each device can have complete query heads and the keys of one or more of them
    divides = heads % ways == 0 and (kv_heads % ways == 0 or ways % kv_heads == 0)
    layout: Layout = "heads"
    if dict(mesh.shape).get("context", 1) == 1 or num_shards(("time",), (T,)) == 1:
        layout = "rows"
    elif context_keys != "auto" or not divides:
        is_long, is_reference = T // mesh_size("context") >= RING_LEAST, asked.endswith("=reference")
        if context_keys == "ring" and is_reference:
            raise ValueError(
                f"context_keys=ring passes keys around in blocks, which {asked} does not support; use "
                "context_keys=gathered, or attention=flash"
            )
        long: Layout = "ring" if is_long and not is_reference else "gathered"
        layout = long if context_keys == "auto" else context_keys
        rows = replace(rows, part=True)
    if asked:
        return layout, KERNELS[asked.partition("=")[2]]
    if mesh.empty:
        return layout, flash
    return layout, kernel_for(mesh.abstract_device, head_dim, q_BTHE.dtype, rows)


KERNELS: dict[str, Kernel] = {"flash": flash, "reference": dense}  # those that a setting may ask for
LAYOUT_NAMES: dict[Layout, str] = {
    "rows": "",
    "heads": ", heads divided over mesh.context",
    "gathered": ", keys gathered over mesh.context",
    "ring": ", keys in a ring over mesh.context",
}
KERNEL_NAMES = {
    pallas: "Pallas",
    splash: "splash",
    cudnn: "cuDNN",
    flash: "blockwise XLA (flash)",
    dense: "reference",
}


def attention_line(
    q_BTHE: jax.ShapeDtypeStruct,
    kv_heads: int,
    branches: bool = False,
    packed: bool = True,
    windows: Sequence[int | None] = (None,),
    settings: AttentionSettings = AttentionSettings(),
) -> str:
    """Return a line for the log: the kernel that runs for rows of this shape on the ambient mesh, and why.

    q_BTHE: shape and dtype of the queries. windows: of the model's layers, which all run the same kernel.
    """
    shown = sorted({w for w in windows if w is not None and needed_window(w, q_BTHE.shape[1])})
    features = {
        "packed": (packed, "rows are packed"),
        "branches": (branches, "responses share their prompt"),
        "windowed": (bool(shown), f"sliding windows of {' and '.join(map(str, shown))}"),
        "softcap": (settings.softcap is not None, f"scores are capped at {settings.softcap or 0:g}"),
    }
    bare = {name: False for name in features}
    has = {name: present for name, (present, _) in features.items()}

    def choice(needs: dict[str, bool]) -> tuple[Layout, Kernel]:
        return chosen_kernel(q_BTHE, kv_heads, AttentionNeeds(**needs), settings)

    layout, kernel = choice(has)
    usual = choice(bare)[1]
    reasons = [
        text
        for name, (present, text) in features.items()
        if present and choice({**bare, name: True})[1] is not usual
    ]
    mesh = jax.sharding.get_abstract_mesh()
    if asked := asked_for(settings):
        reasons.append(asked)
    elif not mesh.empty:
        why = flash_reason(mesh.abstract_device, q_BTHE.shape[3], q_BTHE.dtype)
        reasons = [why] if why else reasons
    if layout in ("gathered", "ring") and settings.context_keys != "auto":
        reasons.append(f"context_keys={settings.context_keys}")
    elif layout in ("gathered", "ring"):
        heads = q_BTHE.shape[2]
        kind = f"{heads} heads" if heads % _head_shards() else f"{kv_heads} kv heads"
        reasons.append(f"{kind} do not divide over mesh.context x mesh.tensor")
    name = KERNEL_NAMES[kernel] + LAYOUT_NAMES[layout]
    return f"attention: {name}" + (f": {'; '.join(reasons)}" if reasons else "")


def _one_key_head(kernel: Kernel, queries: int, shared: int) -> Kernel:
    """Return a kernel that uses only the key head which this device's query heads share."""

    def fn(q_BTHE, k_BTKE, v_BTKE, *rest):
        at = shard_start("context", queries) // np.int32(shared)
        k, v = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=2) for x in (k_BTKE, v_BTKE))
        return kernel(q_BTHE, k, v, *rest)

    return fn
