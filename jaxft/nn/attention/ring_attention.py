"""Attention over rows whose tokens are sharded over devices, with equal work on each device. Keys are
gathered, or passed around a ring.

A query sees the keys before it, so the last part of a row has many times the work of the first one. Of 2 n
parts of a row, device i stores parts 2 i and 2 i + 1 and computes the queries of parts 2 i and 2 n - 1 - 2 i,
an early and a late one, which together see as many keys on every device. It swaps its second part with device
n - 1 - i for that, and swaps the outputs back. (Llama 3, arXiv 2407.21783, and
ring-flash-attention pair parts i and 2 n - 1 - i, which would move twice as many parts.)

The swap is inside attention, so that everything else that depends on a token's position (dropout, noise,
read positions, other attention layouts) is the same as on one device, and gathered keys are in order. The
swap moves half of a device's queries and outputs; attention moves the keys of all other devices.

In ring attention (Liu et al. 2023, arXiv 2310.01889) each device stores one block of keys and values at a
time and passes it on while it attends to it, so that no device stores all keys. Outputs are merged by their
log-sum-exps; the backward pass takes the merged output and log-sum-exp, and the gradients of a block travel
with it, in float32: sums of 16-bit floats would be rounded once per device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from jaxft.nn.attention.flash_attention import MASKED, KeyRanges, in_parts


class BlockKernel(NamedTuple):
    """A kernel for attention to one of several blocks of keys. output: a function such as
    flash_attention.flash_output, which also returns the log-sum-exp. gradients: one such as flash_gradients,
    which takes the output and log-sum-exp over all blocks.
    """

    output: Callable
    gradients: Callable


class _Ring(NamedTuple):
    kernel: BlockKernel
    softcap: float | None
    devices: int


Parts = tuple[tuple[Any, Any], tuple[Any, Any]]


def early_and_late(device: Any, devices: int, length: int) -> Parts:
    """Return (start, length) of the two parts of a row that a device computes, in their order in the row.

    device: its index on mesh.context, of `devices` in all. length: tokens of a row that a device stores.
    """
    mirror, half = devices - 1 - device, length // 2
    kept = device * np.int32(length), np.int32(length - half)
    swapped = mirror * np.int32(length) + np.int32(length - half), np.int32(half)
    late = device > mirror
    first = jnp.where(late, swapped[0], kept[0]), jnp.where(late, swapped[1], kept[1])
    second = jnp.where(late, kept[0], swapped[0]), jnp.where(late, kept[1], swapped[1])
    return first, second


def _is_late(devices: int) -> jax.Array:
    return 2 * lax.axis_index("context") > devices - 1


def _mirrored(x: jax.Array, devices: int) -> jax.Array:
    return lax.ppermute(x, "context", [(i, devices - 1 - i) for i in range(devices)])


def _exchanged(x_BL: jax.Array, devices: int) -> jax.Array:
    """Exchange stored parts [B, L, ...] with the mirror device; return the two that this one computes."""
    length = x_BL.shape[1]
    half = length // 2
    arrived = _mirrored(x_BL[:, length - half :], devices)
    both = jnp.concatenate([arrived, x_BL[:, : length - half], arrived], axis=1)
    start = jnp.where(_is_late(devices), 0, half).astype(jnp.int32)
    return lax.dynamic_slice_in_dim(both, start, length, axis=1)


def _returned(x_BL: jax.Array, devices: int) -> jax.Array:
    """Invert _exchanged: return the two parts that this device stores."""
    length = x_BL.shape[1]
    half = length // 2
    late = _is_late(devices)
    kept, others = (
        lax.dynamic_slice_in_dim(x_BL, jnp.where(late, *starts).astype(jnp.int32), size, axis=1)
        for starts, size in (((half, 0), length - half), ((0, length - half), half))
    )
    return jnp.concatenate([kept, _mirrored(others, devices)], axis=1)


def _rows_of_parts(x_BT: Int[Array, "B T"], parts: Parts, length: int) -> Int[Array, "B L"]:
    (first, count), (second, _) = parts
    at = jnp.arange(length, dtype=jnp.int32)
    return jnp.take(x_BT, jnp.where(at < count, first + at, second + at - count), axis=1)


def balanced(kernel: Callable, devices: int) -> Callable:
    """Wrap a kernel so that each device of mesh.context computes an early and a late part of the queries.

    The result takes the queries [B, L, H, E] that a device stores, the keys and values of full rows, and the
    key ranges of full rows as arrays [B, T].
    """

    def fn(q_BLHE, k_BSKE, v_BSKE, *of_queries):
        length = q_BLHE.shape[1]
        parts = early_and_late(lax.axis_index("context"), devices, length)
        ranges = (None if x is None else _rows_of_parts(x, parts, length) for x in of_queries)
        return _returned(kernel(_exchanged(q_BLHE, devices), k_BSKE, v_BSKE, *ranges), devices)

    return fn


def ring(kernel: BlockKernel, windowed: bool, softcap: float | None, devices: int) -> Callable:
    """Return a function for ring attention over mesh.context. It takes the q [B, L, H, E], k and v that a
    device stores, and the key ranges of full rows as arrays [B, T].
    """

    def fn(q_BLHE, k_BLKE, v_BLKE, *of_queries):
        length = q_BLHE.shape[1]
        parts = early_and_late(lax.axis_index("context"), devices, length)
        ranges = (None if x is None else _rows_of_parts(x, parts, length) for x in of_queries)
        qkv = tuple(_exchanged(x, devices) for x in (q_BLHE, k_BLKE, v_BLKE))
        o = _ring(qkv, KeyRanges(*ranges, windowed=windowed), _Ring(kernel, softcap, devices))
        return _returned(o, devices)

    return fn


def _next_device(tree: Any, devices: int) -> Any:
    return jax.tree.map(
        lambda x: lax.ppermute(x, "context", [(i, (i + 1) % devices) for i in range(devices)]), tree
    )


def _ranges_in_block(ranges: KeyRanges, step: jax.Array, devices: int, length: int) -> KeyRanges:
    """Return the ranges as indices into the keys that this device has at a step of the ring."""
    source = lax.rem(lax.axis_index("context") - step + np.int32(devices), np.int32(devices))
    return in_parts(ranges, early_and_late(source, devices, length))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(np.promote_types(x.dtype, np.float32))


def _time_first(x_BHT: jax.Array) -> jax.Array:
    return x_BHT.swapaxes(1, 2)[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring(qkv, ranges, settings):
    return _ring_forward(qkv, ranges, settings)[0]


def _ring_forward(qkv, ranges, settings):
    (q, *keys), (kernel, softcap, devices) = qkv, settings
    B, L, H, _ = q.shape

    def visit(step, keys, o, lse):
        part, part_lse = kernel.output((q, *keys), _ranges_in_block(ranges, step, devices, L), softcap)
        part_lse = jnp.where(part_lse == -MASKED, MASKED, part_lse.astype(lse.dtype))
        both = jnp.logaddexp(lse, part_lse)
        o = o * _time_first(jnp.exp(lse - both)) + part * _time_first(jnp.exp(part_lse - both))
        return o, both

    def pass_on(step, carry):
        keys, *sums = carry
        arriving = _next_device(keys, devices)  # before the kernel, so that the transfer runs meanwhile
        return arriving, *visit(step, keys, *sums)

    none = jnp.zeros_like(_wide(q)), jnp.full((B, H, L), MASKED, _wide(q).dtype)
    last = np.int32(devices - 1)  # the last block of keys is not passed on
    carry = lax.fori_loop(np.int32(0), last, pass_on, (tuple(keys), *none))
    o, lse = visit(last, *carry)
    lse = jnp.where(lse < MASKED / 2, -MASKED, lse)
    o, lse = checkpoint_name(o.astype(q.dtype), "attn_out"), checkpoint_name(lse, "attn_lse")
    return o, (qkv, ranges, o, lse)


def _ring_backward(settings, saved, do):
    (q, *keys), ranges, o, lse = saved
    kernel, softcap, devices = settings

    def visit(step, keys, sums, dq):
        ranges_here = _ranges_in_block(ranges, step, devices, q.shape[1])
        part, *parts = kernel.gradients((q, *keys), ranges_here, (o, lse, do), softcap)
        sums = tuple(x + y for x, y in zip(sums, parts, strict=True))
        return _next_device(sums, devices), dq + part  # after the last block, sums are on their first device

    def pass_on(step, carry):
        keys, *results = carry
        arriving = _next_device(keys, devices)
        return arriving, *visit(step, keys, *results)

    none = tuple(jnp.zeros_like(_wide(x)) for x in keys), jnp.zeros_like(_wide(q))
    last = np.int32(devices - 1)
    carry = lax.fori_loop(np.int32(0), last, pass_on, (tuple(keys), *none))
    sums, dq = visit(last, *carry)
    return tuple(x.astype(q.dtype) for x in (dq, *sums)), None


_ring.defvjp(_ring_forward, _ring_backward)
