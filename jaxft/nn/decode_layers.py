"""A model's stacked layers in generation: prefill, decoding and extending with a cache (cache.py)."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.nn.bits import to_bits
from jaxft.nn.cache import (
    Cache,
    GivenChunk,
    LayerKeys,
    NextToken,
    PromptKeys,
    Step,
    append,
    append_chunks,
    attend,
    attend_chunk,
    prompt_keys,
    store,
)
from jaxft.nn.cached_attention import Keys
from jaxft.nn.layer_attention import (
    AttentionLayers,
    AttentionRule,
    Extras,
    angles_of,
    attend_rows,
    batch_ranges,
    checked_values,
    generation_angles,
    query_factor,
    rotated,
    rule_of,
)
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

        def attend_prompts(q: Array, k: Array, v: Array) -> tuple[Array, Extras]:
            o, (k, v) = attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)
            return o, Extras((to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2))))

        h, extras = layer(p, h, attend_prompts, None)
        return h, extras.cached

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
    """Return the residual stream of one token per row after all layers, and the cache with that token."""
    lengths = at.positions - at.counts + 1 + cache.new
    angles = generation_angles(a, at.positions[:, None], lengths[:, None], h_R1D.dtype)
    step = Step(at, cache.prompts.visible, at.groups.to_groups(at.counts))

    def stored(keys: Keys, k: Array, v: Array, i: Array, used: Any) -> Keys:
        return append(keys, k, v, i, at.counts, used)

    def attended(qkv: tuple[Array, ...], keys: tuple[Keys, Keys], i: Array, rule: AttentionRule) -> Array:
        return attend(qkv[0], keys, i, step, rule)

    h_R1D, rows, _ = _cached_layers(layer, h_R1D, layers, cache, (a, angles, stored, attended))
    return h_R1D, replace(cache, rows=rows)


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

    def attended(
        qkv: tuple[Array, Array, Array], keys: tuple[Keys, Keys], i: Array, rule: AttentionRule
    ) -> Array:
        return attend_chunk(qkv, keys, i, (chunk, cache.prompts.visible), rule)

    # stored after all layers: XLA would copy the cache in a layer that reads it before it changes it
    h_rCD, rows, new = _cached_layers(layer, h_rCD, layers, cache, (a, angles, None, attended))
    return h_rCD, replace(cache, rows=append_chunks(rows, new, chunk, a))


def _cached_layers(
    layer: Layer, h: Float[Array, "R T D"], layers: Params, cache: Cache, how: tuple[Any, ...]
) -> tuple[Float[Array, "R T D"], LayerKeys, Any]:
    """Run all layers on new tokens of rows, which attend to cached keys. Return the residual stream and the
    rows' keys with the new ones; if `stored` is None without them, and the new Keys of all layers.

    how: attention settings; angles; stored(keys, k, v, index of the layer in keys, whether to store) -> keys;
    attended((q, k, v), (keys of prompts, and of rows), index, rule) -> o. The scan carries the rows' keys and
    updates them in place: as xs and ys they would be copied for each token.
    """
    (a, angles, stored, attended), prompts = how, cache.prompts.layers
    size, windowed = cache.prompts.visible.shape[1] + cache.new, a.windowed
    place = np.where(windowed, np.cumsum(windowed), np.cumsum(~windowed)) - 1  # index in full or in window

    def body(carry: tuple[Array, LayerKeys], x: Any) -> tuple[Any, Any]:
        h, rows = carry
        p, i, has_window, kind = x
        rule = rule_of(a, kind, size)

        def attend_cached(q: Array, k: Array, v: Array) -> tuple[Array, Extras]:
            (q, k), v = rotated(q, k, angles_of(angles, kind), query_factor(a)), checked_values(v)
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            full, window = rows.full, rows.window
            if full is not None and stored is not None:
                full = stored(full, k, v, i, True if window is None else ~has_window)
            if window is not None and stored is not None:
                window = stored(window, k, v, i, True if full is None else has_window)

            def of_full() -> Array:
                assert prompts.full is not None and full is not None
                return attended((q, k, v), (prompts.full, full), i, rule)

            def of_window() -> Array:
                assert prompts.window is not None and window is not None
                return attended((q, k, v), (prompts.window, window), i, rule)

            if window is None:
                o = of_full()
            elif full is None:
                o = of_window()
            else:
                o = jax.lax.cond(has_window, of_window, of_full)
            like = full or window
            assert like is not None
            return o, Extras((LayerKeys(full, window), store(k, v, like) if stored is None else None))

        h, extras = layer(p, h, attend_cached, None)
        rows, new = extras.cached
        return (h, rows), new

    xs = layers, place.astype(np.int32), windowed, a.kind_numbers
    (h, rows), new = jax.lax.scan(body, (h, cache.rows), xs)
    return h, rows, new
