"""A model's stacked layers in generation: prefill, decoding and extending with a cache (cache.py)."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.distributed.sharding import replicated_as
from jaxft.nn.bits import to_bits
from jaxft.nn.cache import (
    Cache,
    GivenChunk,
    NextToken,
    PromptKeys,
    Step,
    append,
    append_chunk,
    attend,
    attend_chunk,
    prompt_keys,
)
from jaxft.nn.cached_attention import Keys
from jaxft.nn.layer_attention import (
    AttentionLayers,
    AttentionRule,
    attend_rows,
    batch_ranges,
    checked_values,
    generation_angles,
    query_factor,
    rotated,
    rule_of,
)
from jaxft.nn.quant import is_qtensor
from jaxft.nn.scan import Layer
from jaxft.tree import Batch, Params


def prefill_layers(
    layer: Layer,
    h_PTD: Float[Array, "P T D"],
    layers: Params,
    tokens: Batch,
    new: int,
    a: AttentionLayers,
) -> tuple[Float[Array, "P T D"], PromptKeys]:
    """Return the residual stream of prompts after all layers, and their keys.

    Prompts are left-padded (segment 0). new: the most tokens that a completion has, for ropes that depend on
    the length of the text.
    """
    T = tokens.ids.shape[1]
    lengths = tokens.positions[:, -1:] + 1 + new
    angles = generation_angles(a, tokens.positions, jnp.broadcast_to(lengths, (len(lengths), T)), h_PTD.dtype)
    ranges = batch_ranges(tokens)

    def body(h: Array, x: Any) -> tuple[Array, Any]:
        p, kind = x

        def attend_prompts(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            o, (k, v) = attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)
            return o, (to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2)))

        return layer(p, h, attend_prompts, None)

    h_PTD, (k, v) = jax.lax.scan(body, h_PTD, (layers, a.kind_numbers))
    return h_PTD, prompt_keys(k, v, tokens.segments > 0, a)


def decode_layers(
    layer: Layer,
    h_R1D: Float[Array, "R 1 D"],
    layers: Params,
    cache: Cache,
    at: NextToken,
    a: AttentionLayers,
) -> tuple[Float[Array, "R 1 D"], Cache]:
    """Return the residual stream of one token per row after all layers, and the cache with that token among
    the recent ones.
    """
    lengths = at.positions - at.counts + 1 + cache.new
    angles = generation_angles(a, at.positions[:, None], lengths[:, None], h_R1D.dtype)
    step = Step(at, cache.prompts.visible, at.groups.to_groups(at.counts))

    def attended(qkv: tuple[Array, ...], keys: _Stored, rule: AttentionRule) -> tuple[Array, Keys]:
        (q, k, v), (prompts, rows, recent) = qkv, keys
        recent = append(recent, k, v, at.counts)
        return attend(q, (prompts, rows, recent), step, rule), recent

    h_R1D, recent = _cached_layers(layer, h_R1D, layers, cache, (a, angles, attended))
    return h_R1D, replace(cache, recent=recent)


def extend_layers(
    layer: Layer,
    h_rCD: Float[Array, "r C D"],
    layers: Params,
    cache: Cache,
    chunk: GivenChunk,
    a: AttentionLayers,
) -> tuple[Float[Array, "r C D"], Cache]:
    """Return the residual stream of a chunk for each row after all layers, and the cache with the chunks."""
    positions = chunk.positions[:, None] + jnp.arange(h_rCD.shape[1], dtype=chunk.positions.dtype)[None]
    lengths = chunk.positions - chunk.counts + cache.new
    angles = generation_angles(a, positions, jnp.broadcast_to(lengths[:, None], positions.shape), h_rCD.dtype)

    def attended(qkv: tuple[Array, ...], keys: _Stored, rule: AttentionRule) -> tuple[Array, Any]:
        (q, k, v), (prompts, rows, recent) = qkv, keys
        o = attend_chunk((q, k, v), (prompts, rows), (chunk, cache.prompts.visible), rule)
        return o, tuple(append_chunk(some, k, v, chunk) for some in (rows, recent))

    h_rCD, stored = _cached_layers(layer, h_rCD, layers, cache, (a, angles, attended))
    rows, recent = zip(*stored, strict=True)
    return h_rCD, replace(cache, rows=rows, recent=recent)


_Stored = tuple[Keys, Keys, Keys]  # of a layer: of prompts, of rows, and recent ones


def _cached_layers(
    layer: Layer, h: Float[Array, "R T D"], layers: Params, cache: Cache, how: tuple[Any, ...]
) -> tuple[Float[Array, "R T D"], tuple[Any, ...]]:
    """Run all layers on new tokens of rows, which attend to cached keys. Return the residual stream, and what
    `attended` returns for each layer.

    how: attention settings; angles; attended((q, k, v), stored keys, rule) -> (o, new keys). Layers are not
    scanned: a scan would copy each layer's weights and keys out of stacked arrays in every step.
    """
    (a, angles, attended), size = how, cache.prompts.visible.shape[1] + cache.new
    angles = jax.lax.optimization_barrier(angles)  # XLA would compute them again in every layer

    def run(h: Array, i: int) -> tuple[Array, Any]:
        p, h = _layer_after(layers, i, h)
        kind, keys = a.layout[i], (cache.prompts.layers[i], cache.rows[i], cache.recent[i])
        rule = rule_of(a, kind, size)

        def attend_cached(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            (q, k), v = rotated(q, k, angles[kind], query_factor(a)), checked_values(v)
            return attended((q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)), keys, rule)

        return layer(p, h, attend_cached, None)

    stored = []
    for i in range(len(a.layout)):
        h, keys = run(h, i)
        stored.append(keys)
    return h, tuple(stored)


LARGEST_COPIED = 2**31  # bytes of layers of which XLA may make a copy before a loop over decoding steps


def _layer_after(layers: Params, index: int, h: Array) -> tuple[Params, Array]:
    """Return the parameters of one layer, of stacked or of separate ones, and h.

    What XLA does to weights before it multiplies (slicing, and converting them on CPUs that do not multiply
    bfloat16), it would do to all layers before the loop over steps, which takes as much memory again. With
    large models a layer is only used after h is computed.
    """
    separate = isinstance(layers, tuple)
    if not separate or sum(x.nbytes for x in jax.tree.leaves(layers)) > LARGEST_COPIED:
        layers, h = jax.lax.optimization_barrier((layers[index] if separate else layers, h))
        return layers if separate else jax.tree.map(lambda x: x[index], layers), h
    return layers[index], h


def separate_layers(params: Params) -> Params:
    """Return parameters with a tuple of layers in place of stacked ones, for `decode` and `extend`: XLA's CPU
    compiler copies a layer out of stacked arrays in every step.

    params: a base, adapters, or a tree of them, on one CPU device; or their shapes. The layers' arrays share
    the memory of the stacked ones where their addresses are aligned. Raw bits become 16-bit floats.
    """

    def parts(x: Any, dtype: Any) -> list[Any]:
        if isinstance(x, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(x.shape[1:], dtype, sharding=x.sharding)] * x.shape[0]
        where = replicated_as(x)
        return [jax.device_put(part.view(dtype), where, may_alias=True) for part in np.asarray(x)]

    def of_node(x: Any) -> list[Any]:
        if is_qtensor(x) and x.kind != "bits":
            leaves, structure = jax.tree.flatten(x)
            return [
                jax.tree.unflatten(structure, one)
                for one in zip(*(parts(y, y.dtype) for y in leaves), strict=True)
            ]
        return parts(x.codes, x.dtype) if is_qtensor(x) else parts(x, x.dtype)

    def separate(name: str, node: Any) -> Any:
        if name != "layers":
            return separate_layers(node) if isinstance(node, dict) else node
        nodes, structure = jax.tree.flatten(node, is_leaf=is_qtensor)
        return tuple(jax.tree.unflatten(structure, one) for one in zip(*map(of_node, nodes), strict=True))

    return {name: separate(name, node) for name, node in params.items()}
