"""Linear layers that compute several projections by one matmul: Phi's qkv_proj and gate_up_proj.

With tensor parallelism each device needs some columns of every projection. Sharding the columns of a fused
weight [I, O] would give it columns of one projection only, so the weight is sharded over its inputs (axis
"fused_width"). Before a matmul, one all-to-all of the weight (of the codes if it is quantised) gives each
device its columns of every projection. It moves 1/tensor of the weight's bytes per device and no activations.
"""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxft.distributed import sharding
from jaxft.nn.lora import Adapted
from jaxft.nn.matmul import Weight, linear
from jaxft.nn.quant import QTensor
from jaxft.nn.quant_formats import decode_scales
from jaxft.nn.taps import InputTap


def fused_linear(
    x_BTI: Float[Array, "B T I"], w: Weight, widths: tuple[int, ...], key: Array | None = None
) -> list[Float[Array, "B T _"]]:
    """Return x @ w split into projections of these widths, in the order of w's columns.

    w: plain, quantised or adapted [I, sum of widths]. key: for dropout of an adapter's input. With tensor
    parallelism each projection is sharded over its columns, so mesh.tensor must divide every width.
    """
    ways = sharding.mesh_size("tensor")
    if ways == 1:
        return jnp.split(linear(x_BTI, w, key), np.cumsum(widths)[:-1].tolist(), -1)
    y = linear(x_BTI, _spread(w, widths, ways), key)
    B, T, outs = y.shape
    y = sharding.constrain(y.reshape(B, T, ways, outs // ways), "rows", "time", "part_shards", None)
    each = np.cumsum([width // ways for width in widths])[:-1].tolist()
    parts = zip(jnp.split(y, each, -1), widths, strict=True)
    return [part.reshape(B, T, width) for part, width in parts]


def _spread(w: Weight, widths: tuple[int, ...], ways: int) -> Weight:
    """Return the weight with its columns grouped and sharded by device."""
    order = partial(_by_device, widths=widths, ways=ways)
    if isinstance(w, Adapted):
        of_pair = partial(order, lead=w.over)
        magnitude, gain = (
            None if x is None else of_pair(x[..., None, :])[..., 0, :] for x in (w.magnitude, w.gain)
        )
        spread = _spread(w.weight, widths, ways)
        return replace(w, weight=spread, b=of_pair(w.b), magnitude=magnitude, gain=gain)
    if isinstance(w, InputTap):
        return replace(w, weight=_spread(w.weight, widths, ways))
    if not isinstance(w, QTensor):
        return order(w, inputs="width")
    scale = w.scale if w.outer is None else decode_scales(w.scale, w.outer, w.mean)
    return replace(
        w,
        codes=order(w.codes),
        scale=None if scale is None else order(scale),
        offset=None if w.offset is None else order(w.offset),
        outer=None,
        mean=None,
    )


def _by_device(
    x: Shaped[Array, "*L I O"],
    widths: tuple[int, ...],
    ways: int,
    inputs: str = "act_width",
    lead: tuple[str, ...] = (),
) -> Shaped[Array, "*L I O"]:
    """Group and shard columns by device. inputs: the logical axis of the input axis in the result. lead: the
    logical axes L.
    """
    *above, _ = x.shape
    parts = jnp.split(x, np.cumsum(widths)[:-1].tolist(), -1)
    x = jnp.concatenate([part.reshape(*above, ways, part.shape[-1] // ways) for part in parts], -1)
    x = sharding.constrain(x, *lead, inputs, "part_shards", "act_width")
    return x.reshape(*above, x.shape[-1] * x.shape[-2])
