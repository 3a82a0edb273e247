"""Report which attention kernel a train step uses and why, and check that it is correct on this device.

A bug of the compiler, of a vendor's library or of the kernel can make a kernel wrong on one device without an
error. So before training, its outputs and gradients on two sample rows are compared with `flash`, blockwise
XLA, in float32. The sample rows are as long as the run's (long rows are shortened, see sample_length), and
sharded into as many parts by mesh.context.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.nn.attention import attention
from jaxft.nn.attention.attention import AttentionNeeds, Kernel
from jaxft.nn.attention.flash_attention import KeyRanges, flash, key_ranges, within_window
from jaxft.nn.attention.layer_attention import attention_needs
from jaxft.nn.tree import Batch
from jaxft.train.programs import Programs

SAMPLE_WINDOW = 50  # sliding window in a sample row of 256 tokens, if a layer has a window
# The largest relative error of a single rounding: to bfloat16 (8 significant bits), and to float16 or TF32
# (11 bits). Matmuls of float32 may round their operands to TF32.
ONE_ROUNDING, ONE_FINE_ROUNDING = 2.0**-8, 2.0**-11

# Segments of the two sample rows as (length in 256ths of a row, number of responses). A segment with
# responses begins with a prompt of half its length that they share. Padding fills the row.
PACKED_SAMPLE = ([(3, 0), (61, 0), (64, 0), (100, 0)], [(256, 0)])
BRANCHED_SAMPLE = ([(3, 0), (60, 2), (65, 0), (100, 4)], [(256, 3)])
PLAIN_SAMPLE = ([(200, 0)], [(256, 0)])
LONGEST_SAMPLE = 4608
# Kernels divide rows, or their parts on each device, into blocks of the first of these that divides them.
BLOCK_SIZES = (512, 384, 256, 128)


def _queries(p: Programs, batch: Batch) -> jax.ShapeDtypeStruct:
    model, (_, rows, length) = p.partition.model, batch.ids.shape
    return jax.ShapeDtypeStruct((rows, length, model.config.heads, model.config.head_dim), model.dtype)


def attention_summary(p: Programs, batch: Batch) -> str:
    """Return which attention kernel the train step runs for a batch [micro, rows, ...], and why."""
    model, layers = p.partition.model, p.partition.model.attention
    kind = batch.branches is not None, batch.packed, [kind.window for kind in layers.kinds], layers.settings
    with jax.set_mesh(p.mesh):
        return attention.attention_line(_queries(p, batch), model.config.kv_heads, *kind)


def in_parts_of_rows(packed: bool, layout: attention.Layout, settings: attention.AttentionSettings) -> Any:
    """Return a run's attention, sharded over the ambient mesh, as a function with a kernel's arguments.

    packed: whether rows have several examples. layout: how keys are sharded over mesh.context.
    """
    if layout == "gathered" or layout == "ring":
        settings = replace(settings, context_keys=layout)

    def kernel(q: Any, k: Any, v: Any, ranges: Any, softcap: float | None) -> jax.Array:
        return attention.attention(q, k, v, ranges, packed, settings)

    return kernel


def check_attention(p: Programs, batch: Batch) -> list[str]:
    """Compare the train step's attention kernel with blockwise XLA on two sample rows. Return a list with one
    line about it, [] if the kernel is blockwise XLA.

    Raises ValueError if outputs or gradients differ by more than rounding explains, or if the kernel cannot
    be compiled or run on this device.
    """
    model, layers, queries = p.partition.model, p.partition.model.attention, _queries(p, batch)
    rows = attention_needs(layers, queries.shape[1], batch.packed, batch.branches is not None)
    with jax.set_mesh(p.mesh):
        layout, kernel = attention.chosen_kernel(queries, model.config.kv_heads, rows, layers.settings)
    if kernel is attention.flash:
        return []
    parts = 1 if layout == "rows" else context_parts(p.mesh)
    checked = kernel if parts == 1 else in_parts_of_rows(batch.packed, layout, layers.settings)
    name, device = attention.KERNEL_NAMES[kernel], jax.local_devices()[0].device_kind
    remedy = (
        "Set attention=flash to train with blockwise XLA, or JAXFT_ATTENTION=flash in the environment for "
        "all models of every command, and report this with the output of `jaxft env`"
    )
    try:
        error, limit = kernel_errors(
            checked, queries, model.config.kv_heads, rows, layers.settings.softcap, parts
        )
    except Exception as e:  # errors of Pallas, Mosaic, MLIR, cuDNN and XLA have no other class in common
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise ValueError(f"attention: the {name} kernel fails on this {device} ({reason}). {remedy}") from e
    if error > limit:
        raise ValueError(
            f"attention: the {name} kernel is wrong on this {device}: its relative error is {error:.2g}, and "
            f"rounding explains {limit:.2g}. {remedy}"
        )
    return [
        f"attention: {name} agrees with blockwise XLA on {parts if parts > 1 else 'this'} {device}: relative "
        f"error {error:.2g}, and rounding explains {limit:.2g}"
    ]


def sample_length(length: int, parts: int = 1) -> int:
    """Return a length for short sample rows on which attention kernels behave as on rows of `length` tokens.

    parts: number of equal parts into which a row is sharded. A length up to LONGEST_SAMPLE is returned
    unchanged. A longer one becomes the largest length up to LONGEST_SAMPLE for which kernels choose the same
    block sizes, for the full row and for a part. With more than 8 parts there may be none; it is then the
    largest for which a part's length has the same remainder modulo 128.
    """
    if length <= LONGEST_SAMPLE:
        return length

    def layout(part: int) -> tuple[int | None, ...]:
        first = (next((n for n in BLOCK_SIZES if size % n == 0), None) for size in (part, part * parts))
        return part % BLOCK_SIZES[-1], *first

    long, sizes = layout(length // parts), range(LONGEST_SAMPLE // parts, 0, -1)
    alike = (size for size in sizes if layout(size) == long)
    remainder = (size for size in sizes if layout(size)[0] == long[0])
    return parts * next(chain(alike, remainder, sizes))


def rows_to_compare(rows: AttentionNeeds, tokens: int = 256) -> tuple[KeyRanges, np.ndarray]:
    """Return (key ranges of two sample rows, mask [2, T] of tokens that are not padding), for T=`tokens`. The
    sample rows have branches, packed examples and a window if the run's rows do, see `rows`.
    """
    layout = BRANCHED_SAMPLE if rows.branches else PACKED_SAMPLE if rows.packed else PLAIN_SAMPLE
    segments, branches = (np.zeros((2, tokens), np.int32) for _ in range(2))
    for r, parts in enumerate(layout):
        at = 0
        for number, (of_256, responses) in enumerate(parts, start=1):
            length = of_256 * tokens // 256
            segments[r, at : at + length] = number
            prompt = length // 2 if responses else length
            size = -(-(length - prompt) // responses) if responses else 1
            branches[r, at + prompt : at + length] = 1 + np.arange(length - prompt) // size
            at += length
    ranges = key_ranges(segments, branches if rows.branches else None)
    window = max(1, SAMPLE_WINDOW * tokens // 256) if rows.windowed else None
    return within_window(ranges, window), segments != 0


def context_parts(mesh: Mesh) -> int:
    """Return the number of devices over which check_attention shards a row: mesh.context, or its largest
    divisor that is at most the number of this process's devices.
    """
    context, here = dict(mesh.shape).get("context", 1), len(jax.local_devices())
    return max(n for n in range(1, min(context, here) + 1) if context % n == 0)


def _results(
    kernel: Callable, softcap: float | None, ranges: KeyRanges, x: Any, real_BT: jax.Array
) -> tuple[jax.Array, ...]:
    """Return a kernel's (output, dq, dk, dv), 0 in padding. x: (q, k, v, gradient of the output)."""
    *qkv, do = x
    real = real_BT[:, :, None, None]
    o, backward = jax.vjp(lambda q, k, v: kernel(q, k, v, ranges, softcap), *qkv)
    arrays = o, *backward(jnp.where(real, do, 0))
    return tuple(jnp.where(real, a.astype(jnp.float32), 0) for a in arrays)


def kernel_errors(
    kernel: Kernel,
    q_BTHE: jax.ShapeDtypeStruct,
    kv_heads: int,
    rows: AttentionNeeds,
    softcap: float | None,
    parts: int = 1,
) -> tuple[float, float]:
    """Return (the largest relative error of a kernel's output and gradients, the largest error that rounding
    explains).

    An error is the root mean square (RMS) of the difference from `flash` in float32, divided by the RMS of
    `flash`; infinite if the kernel returns a NaN. Rounding explains four times the error of `flash` in the
    kernel's dtype, and at least 2^-8 for bfloat16, 2^-11 for other dtypes. q_BTHE: the sample rows have its
    heads, head dimension and dtype, and the length sample_length(T, parts). rows: whether they have branches,
    packing and windows. Runs with mesh.context=parts on this process's first `parts` devices.
    """
    (_, length, heads, head_dim), dtype = q_BTHE.shape, q_BTHE.dtype
    tokens, rng = sample_length(length, parts), np.random.default_rng(0)

    def results(kernel: Callable, x: Any) -> list[np.ndarray]:
        fn = jax.jit(partial(_results, kernel, softcap))
        return [np.asarray(a) for a in fn(ranges, x, jnp.asarray(real))]

    with jax.set_mesh(make_mesh(MeshShape(1, context=parts), jax.local_devices()[:parts])):
        ranges, real = rows_to_compare(rows, tokens)
        x = [
            jnp.asarray(rng.standard_normal((2, tokens, n, head_dim), np.float32), dtype)
            for n in (heads, kv_heads, kv_heads, heads)
        ]
        with jax.default_matmul_precision("highest"):
            exact = results(flash, [a.astype(jnp.float32) for a in x])
        errors = [
            max(_relative_error(a, b) for a, b in zip(results(fn, x), exact, strict=True))
            for fn in (kernel, flash)
        ]
    least = ONE_ROUNDING if dtype == jnp.bfloat16 else ONE_FINE_ROUNDING
    return errors[0], max(4 * errors[1], least)  # vendors' kernels round intermediate values too


def _relative_error(computed: np.ndarray, exact: np.ndarray) -> float:
    error = float(np.sqrt(np.square(computed - exact).mean() / np.square(exact).mean()))
    return error if np.isfinite(error) else float("inf")
