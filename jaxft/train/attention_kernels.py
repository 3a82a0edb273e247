"""The attention kernel of a run: which one its train step has, why, and whether it is right on its device."""

from dataclasses import replace
from typing import Any

import jax

from jaxft.nn import attention
from jaxft.nn.kernel_check import context_parts, kernel_errors
from jaxft.nn.layer_attention import attention_needs
from jaxft.train.programs import Programs
from jaxft.tree import Batch


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
    """Return attention as a kernel, divided over the ambient mesh in a run's layout."""
    if layout == "gathered" or layout == "ring":
        settings = replace(settings, context_keys=layout)

    def kernel(q: Any, k: Any, v: Any, ranges: Any, softcap: float | None) -> jax.Array:
        return attention.attention(q, k, v, ranges, packed, settings)

    return kernel


def check_attention(p: Programs, batch: Batch) -> list[str]:
    """Compare the train step's attention kernel with blockwise XLA on a few rows; return a line about it, and
    none if that is the kernel.

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
