"""Attention as the Mixer of layers (nn/stack.py): over rows, and in generation with a cache (kv_cache.py)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxft.nn.attention.kv_cache import (
    Cache,
    CacheFormat,
    GivenChunk,
    Keys,
    LayerKeys,
    NextToken,
    Step,
    append,
    append_chunks,
    attend,
    attend_chunk,
    empty_keys,
    prompt_keys,
    row_slots,
    store,
)
from jaxft.nn.attention.layer_attention import (
    Attend,
    AttentionLayers,
    AttentionRule,
    Extras,
    angles_of,
    attend_rows,
    batch_angles,
    batch_ranges,
    checked_values,
    generation_angles,
    query_factor,
    rotated,
    window_of,
)
from jaxft.nn.matmul import to_bits
from jaxft.nn.stack import Mixer, Pass
from jaxft.nn.tree import Batch


def attention_mixer(a: AttentionLayers, kv_heads: int) -> Mixer:
    """Return the Mixer of layers with these attention settings. Their `mix` is `mix(q, k, v) -> (o, extras)`;
    their part of a cache is a LayerKeys.
    """

    def empty(prompts: tuple[int, int], rows: tuple[int, int], dtype: Any, stored: CacheFormat) -> Any:
        def keys(count: int, slots: int) -> LayerKeys:
            return empty_keys(a, kv_heads, count, slots, dtype, stored)

        return keys(*prompts), keys(rows[0], row_slots(rows[1]))

    return Mixer(partial(_rows, a), partial(_prompts, a), partial(_token, a), partial(_chunk, a), empty)


def _rows(a: AttentionLayers, tokens: Batch, dtype: DTypeLike) -> Pass:
    angles, ranges = batch_angles(a, tokens, dtype), batch_ranges(tokens)

    def mix(kind: Any, _: None) -> Attend:
        return lambda q, k, v: (attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)[0], Extras())

    return Pass(mix, None if a.kind_numbers is None else jnp.asarray(a.kind_numbers))


def _prompts(a: AttentionLayers, tokens: Batch, new: int, dtype: DTypeLike) -> Pass:
    """Return the Pass over left-padded prompts. new: the maximum number of tokens of a completion."""
    T = tokens.ids.shape[1]
    lengths = tokens.positions[:, -1:] + 1 + new
    angles = generation_angles(a, tokens.positions, jnp.broadcast_to(lengths, (len(lengths), T)), dtype)
    ranges = batch_ranges(tokens)

    def mix(kind: Any, _: None) -> Attend:
        def attend_prompts(q: Array, k: Array, v: Array) -> tuple[Array, Extras]:
            o, (k, v) = attend_rows(a, kind, (q, k, v), angles, ranges, tokens.packed)
            return o, Extras((None, (to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.swapaxes(1, 2)))))

        return attend_prompts

    return Pass(mix, a.kind_numbers, end=lambda _, kv: prompt_keys(kv[0], kv[1], a))


def _token(a: AttentionLayers, cache: Cache, at: NextToken, dtype: DTypeLike) -> Pass:
    lengths = at.positions - at.counts + 1 + cache.new
    angles = generation_angles(a, at.positions[:, None], lengths[:, None], dtype)
    step = Step(at, cache.prompts.visible, at.groups.to_groups(at.counts))

    def stored(keys: Keys, k: Array, v: Array, i: Array, used: Any) -> Keys:
        return append(keys, k, v, i, at.counts, used)

    def attended(qkv: tuple[Array, ...], keys: tuple[Keys, Keys], i: Array, rule: AttentionRule) -> Array:
        return attend(qkv[0], keys, i, step, rule)

    return _cached(a, cache, angles, stored, attended)._replace(end=lambda rows, _: rows)


def _chunk(a: AttentionLayers, cache: Cache, chunk: GivenChunk, dtype: DTypeLike) -> Pass:
    positions = chunk.positions[:, None] + jnp.arange(chunk.ids.shape[1], dtype=chunk.positions.dtype)[None]
    lengths = chunk.positions - chunk.counts + cache.new
    angles = generation_angles(a, positions, jnp.broadcast_to(lengths[:, None], positions.shape), dtype)

    def attended(
        qkv: tuple[Array, Array, Array], keys: tuple[Keys, Keys], i: Array, rule: AttentionRule
    ) -> Array:
        return attend_chunk(qkv, keys, i, (chunk, cache.prompts.visible), rule)

    # stored after all layers: XLA would copy the cache in a layer that reads it before it changes it
    def end(rows: Any, new: Any) -> Any:
        return append_chunks(rows, new, chunk, a)

    return _cached(a, cache, angles, None, attended)._replace(end=end)


def _cached(
    a: AttentionLayers, cache: Cache, angles: Any, stored: Callable[..., Keys] | None, attended: Callable
) -> Pass:
    """Return a Pass over new tokens of rows, which attend to cached keys.

    angles: of the new tokens, for each LayerKind. stored(keys, k, v, layer's index in keys, whether to store)
    returns `keys` with the new tokens' k and v; None: leave the cache as it is and return the new Keys as the
    Pass's values. attended((q, k, v), (keys of prompts, keys of rows), layer's index, rule) returns o. The
    rows' keys are the carry of the scan, which is updated in place; as xs and ys of the scan they would be
    copied for each token.
    """
    prompts, size = cache.prompts.layers, cache.prompts.visible.shape[1] + cache.new
    windowed = a.windowed
    place = np.where(windowed, np.cumsum(windowed), np.cumsum(~windowed)) - 1  # index in full or in window

    def mix(x: Any, rows: LayerKeys) -> Attend:
        i, has_window, kind = x
        rule = AttentionRule(window_of(a, kind, size), a.settings.softcap)

        def attend_cached(q: Array, k: Array, v: Array) -> tuple[Array, Extras]:
            (q, k), v = rotated(q, k, angles_of(angles, kind), query_factor(a)), checked_values(v)
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            full, window = rows.full, rows.window
            if full is not None and stored is not None:
                full = stored(full, k, v, i, True if window is None else ~has_window)
            if window is not None and stored is not None:
                window = stored(window, k, v, i, True if full is None else has_window)

            pairs: list[Any] = [
                x for x in ((prompts.full, full), (prompts.window, window)) if x[1] is not None
            ]
            ways = [partial(attended, (q, k, v), pair, i, rule) for pair in pairs]
            o = ways[0]() if len(ways) == 1 else jax.lax.cond(has_window, ways[1], ways[0])
            new = store(k, v, pairs[0][1]) if stored is None else None
            return o, Extras((LayerKeys(full, window), new))

        return attend_cached

    return Pass(mix, (place.astype(np.int32), windowed, a.kind_numbers), cache.rows)
